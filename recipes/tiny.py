"""Recipes."""

# Tab. 5, one column a teacher; flags override it. `maskbit-long` is the second 50k steps (numbers in brackets there).
# The tiny worlds' are ours, for 2 cores and minutes instead of 4 H100s and days: larger rates, an auxiliary faster than
# the student. maskbit-tiny-scratch is Di[M]O from the teacher, and made the theta_0 from which maskbit-tiny goes on.
# How the student starts and draws (init_ratio, noise, temperature) stands with the teacher, in teachers.SPECS.
RECIPES = {
    "maskbit": dict(
        teacher="maskbit", batch=256, steps=50_000, cfg=1.5, beta=0.0, schedule="arccos", lr=1e-6, ema=0.9999,
        w_gan=25.0, gan_ratio=[0.0, 0.95], heads=4, head_width=1024, head_mlp=2048, data="data/imagenet"),
    # choice: feature noise 0.1; App. H.3 says "a noise perturbation for the features" and not how much
    "maskgit": dict(
        teacher="maskgit", batch=256, steps=30_000, cfg=2.0, beta=-0.2, schedule="arccos", lr=1e-5, ema=0.9999,
        w_gan=100.0, gan_ratio=[0.0, 0.5], heads=4, head_width=1024, head_mlp=2048, feature_noise=0.1,
        data="data/imagenet"),
    "meissonic": dict(
        teacher="meissonic", batch=16, steps=10_000, cfg=4.0, beta=0.0, schedule="cosine", ratio_range=[0.02, 0.98],
        lr=1e-6, ema=0.9999, checkpointing=True, w_reward=2000.0),
    "maskgen": dict(
        teacher="maskgen", batch=64, steps=50_000, cfg=4.0, beta=0.0, schedule="arccos", lr=1e-6, ema=0.9999,
        w_gan=100.0, gan_ratio=[0.0, 0.95], heads=6, head_width=1024, head_mlp=4096),
    "maskbit-tiny-scratch": dict(
        teacher="maskbit-tiny", batch=64, steps=1500, cfg=1.5, beta=0.0, schedule="arccos", lr=3e-4, aux_lr=8e-4,
        ema=0.995, warmup=20, lr_end=0.05, w_gan=4.0, gan_ratio=[0.0, 0.95], heads=4, head_width=64, head_mlp=128,
        feature_noise=0.1, data="assets/fashion/tokens.npz", log_every=20, eval_every=500, save_every=100),
}

RECIPES["maskbit-long"] = dict(RECIPES["maskbit"], optimizer="adamw", lr=5e-7, weight_decay=0.01, w_gan=200.0)

RECIPES["maskgit-512"] = dict(RECIPES["maskgit"], teacher="maskgit-512")

RECIPES["maskgen-xl"] = dict(RECIPES["maskgen"], teacher="maskgen-xl")

RECIPES["maskbit-tiny"] = dict(
    RECIPES["maskbit-tiny-scratch"], init_from="assets/fashion/theta0.safetensors", steps=150, student_start=30,
    lr=1e-4, aux_lr=5e-4, disc_lr=1e-4, ema=0.98, gan=True, gan_start=0, eval_every=75, save_every=50)

# choice: beta 0.5 (0 leaves crumbs) and Muon (a quarter of Adam's steps). No label smoothing: this teacher had none.
RECIPES["meissonic-tiny-scratch"] = dict(
    RECIPES["meissonic"], teacher="meissonic-tiny", batch=64, steps=6500, cfg=3.0, beta=0.5, schedule="arccos",
    optimizer="muon", lr=1e-3, aux_lr=3e-3, ema=0.995, warmup=20, lr_end=0.05, smoothing=0.0, checkpointing=False,
    heads=2, head_width=32, head_mlp=32, prompts="assets/shapes/prompts.txt", rewards={"imagereward": 1.0, "clip": 0.2},
    reward_chunk=64, w_reward=100.0, clip_reward=0.5, log_every=50, eval_every=500, n_eval=600, save_every=500)

# choice: an image's reward gradient is clipped, by itself: else two or three of 64 images decide on a step.
# choice: bf16 on a CPU as well: a tenth faster with AMX.
RECIPES["meissonic-tiny"] = dict(
    RECIPES["meissonic-tiny-scratch"], init_from="assets/shapes/theta0.safetensors", steps=1000, student_start=50,
    reward_start=50, dtype="bf16", eval_every=250, save_every=50)

for name, prompts in (("maskgit", None), ("maskgen", "assets/prompts.txt")):
    RECIPES[f"{name}-tiny"] = dict(
        RECIPES[name], teacher=f"{name}-tiny", batch=8, steps=4, lr=1e-4, heads=2, head_width=32, head_mlp=32, gan_start=0,
        data=None, prompts=prompts, eval_every=4, n_eval=16, log_every=1, save_every=2)
