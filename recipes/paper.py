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
        ratio_range=[0.02, 0.98],
        checkpointing=True, w_reward=2000.0),
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
    lr=5e-7, w_gan=200.0)

RECIPES["maskgit-512"] = RECIPES["maskgit"] | dict(teacher="maskgit-512")
RECIPES["maskgen-xl"] = RECIPES["maskgen"] | dict(teacher="maskgen-xl")
