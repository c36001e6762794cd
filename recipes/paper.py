"""The paper's runs: one column of Tab. 5 per teacher, and what its text adds. Flags override them.

How the student starts and draws (init_ratio, noise, temperature) stands with the teacher, in
teachers.SPECS.
"""

HEADS = dict(heads=4, head_width=1024, head_mlp=2048)             # of the discriminator

RECIPES = {
    "maskbit": dict(
        teacher="maskbit", data="data/imagenet",
        batch=256, steps=50_000,
        lr=1e-6, ema=0.9999,
        cfg=1.5, beta=0.0, schedule="arccos",
        # choice: the long run "reduces the dropout rate to 0" (App. H.3), so this one had some: as
        # much as the teacher was trained with
        dropout=0.1,
        # choice: Tab. 5's; the text of App. H.3 says 100 "in most experiments"
        w_gan=25.0, gan_ratio=[0.0, 0.95], **HEADS),
    "maskgit": dict(
        teacher="maskgit", data="data/imagenet",
        batch=256, steps=30_000,
        lr=1e-5, ema=0.9999,
        cfg=2.0, beta=-0.2, schedule="arccos",
        w_gan=100.0, gan_ratio=[0.0, 0.5], **HEADS,
        # choice: App. H.3 says "a noise perturbation for the features" and not how much
        feature_noise=0.1),
    "meissonic": dict(
        teacher="meissonic",
        batch=16, steps=10_000,
        lr=1e-6, ema=0.9999,
        cfg=4.0, beta=0.0, schedule="cosine",
        ratio_range=[0.02, 0.98], w_reward=2000.0),
    "maskgen": dict(
        teacher="maskgen",
        batch=64, steps=50_000,
        lr=1e-6, ema=0.9999,
        cfg=4.0, beta=0.0, schedule="arccos",
        w_gan=100.0, gan_ratio=[0.0, 0.95],
        heads=6, head_width=1024, head_mlp=4096),
}

# the second 50,000 steps of MaskBit (App. H.3; the numbers in brackets in Tab. 5)
RECIPES["maskbit-long"] = RECIPES["maskbit"] | dict(
    optimizer="adamw", weight_decay=0.01,
    lr=5e-7, w_gan=200.0, dropout=0.0)

# the ablations of Fig. 4, 8, 9, 12 (App. H.5)
RECIPES["maskbit-ablation"] = RECIPES["maskbit"] | dict(batch=64)

# rewards alone, in the mix and weight of Tab. 5 (the flags' defaults), from Di[M]O's Meissonic
# (Sec. 4.3; Tab. 10, where --w_reward is 1000)
RECIPES["meissonic-reward"] = RECIPES["meissonic"] | dict(reward=True, w_dimo=0.0)

# the one-step MaskGen from which the others start (Tab. 7), and its refinement by rewards (Tab. 9;
# Tab. 8: --w_dimo 0 --rewards hps=1)
RECIPES["maskgen-dimo"] = RECIPES["maskgen"] | dict(steps=100_000)
RECIPES["maskgen-reward"] = RECIPES["maskgen"] | dict(reward=True, batch=32)

RECIPES["maskgit-512"] = RECIPES["maskgit"] | dict(teacher="maskgit-512")
RECIPES["maskgen-xl"] = RECIPES["maskgen"] | dict(teacher="maskgen-xl")
