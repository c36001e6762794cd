"""Our runs on the tiny worlds: two cores and minutes, in the place of four H100s and days.

So rates are larger, and the auxiliary is faster than the student. The -scratch recipes are Di[M]O
alone, from the teacher; they made the theta_0 from which the others go on.
"""

from recipes import paper

RECIPES = {}

# --------------------------------------------------------------------------- fashion: maskbit-tiny
RECIPES["maskbit-tiny-scratch"] = dict(
    teacher="maskbit-tiny", data="assets/fashion/tokens.npz",
    batch=64, steps=1500, warmup=20,
    lr=3e-4, aux_lr=8e-4,
    lr_end=0.05, ema=0.995,
    cfg=1.5, beta=0.0, schedule="arccos",
    w_gan=4.0, gan_ratio=[0.0, 0.95], feature_noise=0.1,
    heads=4, head_width=64, head_mlp=128,
    log_every=20, eval_every=500, save_every=100)

RECIPES["maskbit-tiny"] = RECIPES["maskbit-tiny-scratch"] | dict(
    init_from="assets/fashion/theta0.safetensors",
    steps=150, student_start=30,
    lr=1e-4, aux_lr=5e-4,
    disc_lr=1e-4, ema=0.98,
    gan=True, gan_start=0,
    eval_every=75, save_every=50)

# -------------------------------------------------------------------------- shapes: meissonic-tiny
RECIPES["meissonic-tiny-scratch"] = paper.RECIPES["meissonic"] | dict(
    teacher="meissonic-tiny", prompts="assets/shapes/prompts.txt",
    batch=64, steps=6500, warmup=20,
    # choice: Muon takes a quarter of Adam's steps
    optimizer="muon", lr=1e-3,
    aux_lr=3e-3, lr_end=0.05,
    ema=0.995,
    # choice: beta 0 leaves crumbs; no label smoothing, for this teacher was trained without
    cfg=3.0, beta=0.5,
    schedule="arccos", smoothing=0.0,
    # choice: each image's reward gradient is clipped by itself, or else two of 64 decide on a step
    rewards={"imagereward": 1.0, "clip": 0.2}, w_reward=100.0,
    clip_reward=0.5, reward_chunk=64,
    heads=2, head_width=32, head_mlp=32,
    log_every=50, eval_every=500,
    n_eval=600, save_every=500)

RECIPES["meissonic-tiny"] = RECIPES["meissonic-tiny-scratch"] | dict(
    init_from="assets/shapes/theta0.safetensors",
    steps=1000, student_start=50, reward_start=50,
    # choice: bf16 on a CPU as well: a tenth faster with AMX
    dtype="bf16", eval_every=250, save_every=50)

# ---------------------------------------------------------------- no weights: there to try the code
NO_WEIGHTS = dict(
    batch=8, steps=4, lr=1e-4,
    gan_start=0, heads=2,
    head_width=32, head_mlp=32, data=None,
    log_every=1, eval_every=4,
    n_eval=16, save_every=2)
RECIPES["maskgit-tiny"] = paper.RECIPES["maskgit"] | NO_WEIGHTS | dict(teacher="maskgit-tiny")
RECIPES["maskgen-tiny"] = paper.RECIPES["maskgen"] | NO_WEIGHTS | dict(
    teacher="maskgen-tiny", prompts="assets/prompts.txt")
