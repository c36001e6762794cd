"""Soft-Di[M]O (Algorithm 1): a multi-step teacher distilled into a one-step generator, and refined beyond it.

    python train.py                                                   # the tiny world, minutes on a laptop's CPU
    python train.py --teacher maskbit --gan --data data/imagenet      # one GPU
    torchrun --nproc_per_node=4 train.py --teacher maskbit --gan      # four, the paper's run
    python train.py --teacher meissonic-tiny --reward                 # text to image, and a reward on top
    python train.py --out out/run --resume                            # go on after any interruption

Each idea is a flag: --w_dimo 0 leaves the GAN alone, --no-gan leaves Di[M]O alone, --estimator straight-through
takes the baseline's gradient, --reward adds Eq. 9. Every term of the generator's loss (Eq. 10) is computed as its gradient at the
logits z, so terms are weighed, compared and logged there, and the student is differentiated once: z.backward(g).

All randomness of a step is a function of (seed, step, place in the global batch). So a resumed run repeats nothing
and forgets nothing, and two processes make the same update as one with the joint batch.
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import os
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import evaluate as ev
from data.prompts import read_prompts
from dimo import (SCHEDULES, aux_loss, dimo_grad, exact_mask, guidance_scale, initial_tokens, mask_ratio,
                  student_logits)
from gan import Discriminator, disc_logits, disc_loss, gan_grad, head_layers
from reward import REWARDS, SEED, load_judges, mix, reward_grad
from soft_embed import ESTIMATORS, concentration, embed_tokens, sample_tokens, soft_embed
from teachers import SPECS, UserError, fingerprint, load_state, load_teacher, local, read_weights, replacing

# ============================================================================================ settings
# Tab. 5, one column a teacher; flags override it. `maskbit-long` is the second 50k steps (numbers in brackets there).
# The tiny worlds' are ours, for 2 cores and minutes instead of 4 H100s and days: larger rates, an auxiliary faster than
# the student. maskbit-tiny-scratch is Di[M]O from the teacher, and made the theta_0 from which maskbit-tiny goes on.
# How the student starts and draws (init_ratio, noise, temperature) stands with the teacher, in teachers.SPECS.
TABLE_5 = {
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
TABLE_5["maskbit-long"] = dict(TABLE_5["maskbit"], optimizer="adamw", lr=5e-7, weight_decay=0.01, w_gan=200.0)
TABLE_5["maskgit-512"] = dict(TABLE_5["maskgit"], teacher="maskgit-512")
TABLE_5["maskgen-xl"] = dict(TABLE_5["maskgen"], teacher="maskgen-xl")
TABLE_5["maskbit-tiny"] = dict(
    TABLE_5["maskbit-tiny-scratch"], init_from="assets/fashion/theta0.safetensors", steps=150, student_start=30,
    lr=1e-4, aux_lr=5e-4, disc_lr=1e-4, ema=0.98, gan=True, gan_start=0, eval_every=75, save_every=50)
# choice: beta 0.5 (0 leaves crumbs) and Muon (a quarter of Adam's steps). No label smoothing: this teacher had none.
TABLE_5["meissonic-tiny-scratch"] = dict(
    TABLE_5["meissonic"], teacher="meissonic-tiny", batch=64, steps=4000, cfg=3.0, beta=0.5, schedule="arccos",
    optimizer="muon", lr=5e-4, aux_lr=1.5e-3, ema=0.99, warmup=20, lr_end=0.05, smoothing=0.0, checkpointing=False,
    heads=2, head_width=32, head_mlp=32, prompts="assets/shapes/prompts.txt", rewards={"clip": 1.0}, reward_chunk=64,
    w_reward=2.0, log_every=25, eval_every=500, n_eval=600, save_every=250)
TABLE_5["meissonic-tiny"] = dict(
    TABLE_5["meissonic-tiny-scratch"], init_from="assets/shapes/theta0.safetensors", steps=300, student_start=50, lr=1e-4,
    aux_lr=5e-4, reward_start=50, eval_every=150, save_every=50)
for name, prompts in (("maskgit", None), ("maskgen", "assets/prompts.txt")):
    TABLE_5[f"{name}-tiny"] = dict(
        TABLE_5[name], teacher=f"{name}-tiny", batch=8, steps=4, lr=1e-4, heads=2, head_width=32, head_mlp=32, gan_start=0,
        data=None, prompts=prompts, eval_every=4, n_eval=16, log_every=1, save_every=2)


def flags():
    """The parser, and the defaults that hold where neither a flag nor the teacher's column of Tab. 5 says otherwise."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {}

    def add(group, name, default, help, **kw):
        if isinstance(default, bool):
            kw.update(action=argparse.BooleanOptionalAction)
        elif "type" not in kw and default is not None:
            kw.update(type=type(default))
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=f"{help} (default: {default})", **kw)
        defaults[name] = default

    g = ap.add_argument_group("run")
    add(g, "teacher", "maskbit-tiny", f"one of {', '.join(SPECS)}")
    add(g, "recipe", None, f"column of Tab. 5, one of {', '.join(TABLE_5)}; the teacher's own if not given")
    add(g, "out", "out/run", "folder for checkpoints, log.jsonl, pictures and the final table")
    add(g, "resume", False, "go on from the checkpoint in --out; its settings hold")
    add(g, "overwrite", False, "start anew where --out already holds a run")
    add(g, "steps", 50_000, "student updates in all")
    add(g, "batch", 256, "images a step, over all processes and accumulation steps")
    add(g, "accum", 1, "gradient accumulation steps: memory for time")
    add(g, "seed", 0, "of everything random")
    add(g, "init_from", "teacher", "weights of a one-step generator theta_0 to start from (Alg. 1), or: teacher", type=str)
    add(g, "log_every", 50, "steps between log lines; the host waits for the device only then")
    add(g, "save_every", 1000, "steps between checkpoints")
    add(g, "eval_every", 2000, "steps between evaluations (FID and a strip of samples); 0: none, nor at the end")
    add(g, "n_eval", 5000, "images an evaluation")
    g = ap.add_argument_group("teacher")
    add(g, "teacher_weights", None, "local file instead of the published one")
    add(g, "tokenizer_weights", None, "local file instead of the published one")
    add(g, "text_weights", None, "local file of the text encoder instead of the published one", type=str)
    add(g, "text_activation", None, "of the text encoder, where its files leave it open", choices=["gelu", "quick_gelu"])
    add(g, "random_weights", False, "no files at all: to try memory and speed")
    add(g, "prompts", None, "what text teachers are asked for: a text file, one prompt a line; with --gan the data's", type=str)
    add(g, "text_cache", "memory", "where prompts' features are kept: memory, off, or a folder, for later runs too", metavar="WHERE")
    add(g, "cfg", 1.5, "teacher guidance w of u + w (c - u)")
    add(g, "cfg_low", 1.0, "where guidance falls to as the mask ratio falls, with --cfg_schedule linear or cosine")
    add(g, "cfg_schedule", "constant", "guidance over the mask ratio (App. I.9)", choices=["constant", "linear", "cosine"])
    g = ap.add_argument_group("Di[M]O (Eq. 2)")
    add(g, "w_dimo", 1.0, "weight of the Di[M]O term")
    add(g, "beta", 0.0, "divergence: 0 forward KL, 1 reverse KL, else generalised Jeffreys")
    add(g, "init_ratio", 0.6, "share of masked units in x_init")
    add(g, "noise", 0.1, "embedding perturbation s of the start")
    add(g, "schedule", "arccos", "mask schedule, student's and auxiliary's", choices=SCHEDULES)
    add(g, "ratio_range", [0.0, 1.0], "bounds of the mask ratio it gives", nargs=2, type=float, metavar=("A", "B"))
    add(g, "w_t", "one", "w(t) of Eq. 2: one, or 1 / mask ratio", choices=["one", "inverse"])
    add(g, "soft_state", False, "soft embeddings in the forward state x_t (App. I.15)")
    add(g, "smoothing", 0.1, "label smoothing of the auxiliary loss")
    add(g, "soft_target", 0.0, "share of the soft target in the auxiliary loss")
    add(g, "redraw", False, "the auxiliary gets fresh tokens from the updated student (official code), not x_theta (Alg. 1)")
    add(g, "student_start", 0, "first updates of the auxiliary and the discriminator alone")
    add(g, "temperature", 1.0, "of sampling the student in evaluations; training always draws at 1")
    g = ap.add_argument_group("GAN (Eq. 7-8)")
    add(g, "gan", False, "refine by the masked-embedding GAN on real tokens")
    add(g, "data", None, "real tokens: a folder written by data/*.py, or a packed .npz", type=str)
    add(g, "w_gan", 25.0, "weight of the GAN term")
    add(g, "gan_start", 1000, "steps before the GAN term joins the student's loss (Fig. 9)")
    add(g, "gan_ratio", [0.0, 0.95], "masking of the discriminator's input, r ~ U[a, b]", nargs=2, type=float, metavar=("A", "B"))
    add(g, "estimator", "soft", "gradient through the tokens (Fig. 4a)", choices=list(ESTIMATORS))
    add(g, "tau", 1.0, "softmax temperature of the soft embedding (Fig. 8)")
    add(g, "heads", 4, "layers of the teacher that the discriminator reads")
    add(g, "head_width", 1024, "channels of a head")
    add(g, "head_mlp", 2048, "hidden width of the last MLP")
    add(g, "feature_noise", 0.0, "std of noise on the teacher's features (App. H.3)")
    g = ap.add_argument_group("reward (Eq. 9)")
    add(g, "reward", False, "refine by differentiable rewards, through the tokenizer's decoder; text teachers alone")
    add(g, "w_reward", 2000.0, "weight of the reward term")
    add(g, "rewards", SEED, "which, and how they are mixed", type=mix, metavar="NAME=W,NAME=W")
    add(g, "reward_start", 0, "steps before the reward term joins the student's loss")
    add(g, "reward_chunk", 1, "images decoded and judged at a time")
    for name in REWARDS:
        add(g, f"{name}_weights", None, "local file instead of the published one", type=str)
    add(g, "bert_vocab", None, "local file instead of the published one, for imagereward", type=str)
    add(g, "clip_cosine", False, "CLIP's reward is the bare cosine, not 100 times it")
    g = ap.add_argument_group("optimiser")
    add(g, "optimizer", "adam", "adam, adamw, or muon for matrices", choices=["adam", "adamw", "muon"])
    add(g, "lr", 1e-6, "of the student")
    add(g, "aux_lr", None, "of the auxiliary; the student's if not given", type=float)
    add(g, "disc_lr", None, "of the discriminator; the student's if not given", type=float)
    add(g, "warmup", 100, "steps of linear warm-up")
    add(g, "lr_end", 1.0, "last learning rate as a share of the first, by a cosine; 1 is constant")
    add(g, "weight_decay", 0.0, "")
    add(g, "clip", 1.0, "largest gradient norm, for each of the three networks")
    add(g, "ema", 0.9999, "decay of the student's average, reached by the ramp (1 + n) / (10 + n)")
    add(g, "dropout", 0.0, "in student and auxiliary")
    g = ap.add_argument_group("system")
    add(g, "device", "cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")
    add(g, "dtype", "bf16" if torch.cuda.is_available() else "fp32", "autocast; weights stay float32", choices=["bf16", "fp32"])
    add(g, "compile", False, "torch.compile the networks in place")
    add(g, "checkpointing", False, "recompute activations in the backward pass: memory for time")
    return ap, defaults


def settle(given, defaults):
    """All settings: defaults, then the teacher's column of Tab. 5, then the flags; checked before any work is done."""
    if given.get("teacher", "maskbit-tiny") not in SPECS:
        raise UserError(f"unknown --teacher {given['teacher']!r}: expected one of {', '.join(SPECS)}")
    name = given.get("recipe") or given.get("teacher", defaults["teacher"])
    if name not in TABLE_5:
        raise UserError(f"unknown --recipe {name!r}: expected one of {', '.join(TABLE_5)}")
    own = SPECS[TABLE_5[name]["teacher"]].student
    c = argparse.Namespace(**{**defaults, **own, **TABLE_5[name], **given, "recipe": name})
    if c.teacher != TABLE_5[name]["teacher"]:
        raise UserError(f"--recipe {name} is for --teacher {TABLE_5[name]['teacher']}, not {c.teacher}")
    c.aux_lr, c.disc_lr = c.aux_lr or c.lr, c.disc_lr or c.lr
    positive = ("steps", "batch", "accum", "log_every", "save_every", "heads", "head_width", "head_mlp", "lr", "tau", "clip",
                "reward_chunk")
    for key in positive:
        if not getattr(c, key) > 0:
            raise UserError(f"--{key} {getattr(c, key)}: expected a number above 0")
    for key in ("w_dimo", "w_gan", "noise", "init_ratio", "smoothing", "ema", "dropout", "soft_target", "feature_noise",
                "w_reward", "reward_start", "gan_start", "student_start", "warmup", "eval_every", "n_eval", "weight_decay", "lr_end", "temperature"):
        if not getattr(c, key) >= 0:
            raise UserError(f"--{key} {getattr(c, key)}: expected 0 or more")
    for key in ("noise", "init_ratio", "smoothing", "ema", "dropout", "soft_target", "lr_end"):
        if getattr(c, key) > 1:
            raise UserError(f"--{key} {getattr(c, key)}: expected at most 1")
    for key in ("gan_ratio", "ratio_range"):
        if not 0 <= getattr(c, key)[0] <= getattr(c, key)[1] <= 1:
            raise UserError(f"--{key} {getattr(c, key)}: expected 0 <= A <= B <= 1")
    if c.w_dimo == 0 and not (c.gan and c.w_gan) and not (c.reward and c.w_reward):
        raise UserError("nothing to train: --w_dimo 0, and neither GAN nor reward; add --gan with --w_gan above 0, or --reward")
    if c.reward and SPECS[c.teacher].text is None:
        raise UserError(f"--reward judges pictures by their prompts, and {c.teacher} draws classes: take a text teacher")
    if c.gan and not c.data:
        raise UserError("--gan compares with real images and found none: add --data FOLDER, written by data/imagenet.py "
                        "or data/fashion.py, or leave out --gan")
    if SPECS[c.teacher].text and not c.gan and not c.prompts:
        raise UserError(f"{c.teacher} draws what it is told: add --prompts FILE, one prompt a line (the paper's are "
                        "captions of LAION-Aesthetics; to try it, assets/prompts.txt)")
    if c.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; take --device cpu")
    if os.path.exists(os.path.join(c.out, "ckpt.pt")) and not (c.resume or c.overwrite):
        raise UserError(f"--out {c.out} already holds a run: go on with --resume, start anew with --overwrite, or name "
                        "another folder")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if c.batch % (world * c.accum):
        raise UserError(f"--batch {c.batch} does not divide by {world} processes x {c.accum} accumulation steps")
    return c


# ============================================================================================ small pieces
def draw_step(c, step, first, count, net, conditions):
    """Every random choice of one step, for images first .. first + count of its global batch, as a namespace.

    All of the global batch is drawn, from a generator seeded by (seed, step) alone, and a slice returned: so the
    choices depend neither on the number of processes nor on restarts. (Dropout, Gumbel and feature noise are drawn
    by each process for itself, seeded by (seed, step, rank).)
    """
    device = conditions.device
    gen = torch.Generator(device).manual_seed((c.seed + 1) * 1_000_003 + step)
    part = slice(first, first + count)
    rand = lambda *shape: torch.rand(c.batch, *shape, generator=gen, device=device)
    unit = (net.L, net.G)
    which = lambda: torch.randint(len(conditions), (c.batch,), generator=gen, device=device)[part]

    def start():       # conditions, random tokens, which of them are masked, embedding noise, the uniforms that draw x_theta
        return dict(which=which(),
                    tokens=torch.randint(net.V, (c.batch, *unit), generator=gen, device=device)[part],
                    scores=rand(*unit)[part], u=rand(*unit)[part],
                    noise=torch.randn(c.batch, net.L, net.width, generator=gen, device=device)[part])

    ratio = lambda: mask_ratio(rand(), c.schedule).clamp(*c.ratio_range)
    r = argparse.Namespace(**start(), ratio=ratio()[part], scores_t=rand(*unit)[part])
    ratio_aux = ratio()
    r.ratio_aux, r.scores_aux = ratio_aux[part], rand(*unit)[part]
    r.aux_units = (ratio_aux * net.L * net.G).round().clamp(min=1).sum()    # masked units of the global batch
    lo, hi = c.gan_ratio
    r.ratio_gan, r.scores_gan = (lo + (hi - lo) * rand())[part], rand(*unit)[part]
    r.ratio_disc, r.scores_disc = (lo + (hi - lo) * rand())[part], rand(*unit)[part]
    r.again = argparse.Namespace(**start()) if c.redraw else None
    return r


class RealTokens:
    """Real tokens x (n, L, G), memory-mapped, and their conditions, in an order that is a function of (seed, index)."""

    def __init__(self, path, teacher, seed):
        self.x, self.labels, self.prompts = load_tokens(path, teacher)
        self.conditions = teacher.conditions(self.prompts)
        self.seed, self.epoch, self.order = seed, None, None

    def batch(self, start, count):
        """Tokens (count, L, G), and which of `conditions` they belong to."""
        rows = []
        for i in range(start, start + count):
            epoch, k = divmod(i, len(self.labels))
            if epoch != self.epoch:
                self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.labels))
                self.epoch = epoch
            rows.append(self.order[k])
        x, labels = (torch.from_numpy(a[rows].astype(np.int64)) for a in (self.x, self.labels))
        return x.to(self.conditions.device), labels.to(self.conditions.device)


def load_tokens(path, teacher):
    """(tokens (n, L, G), labels (n,), prompts) of a folder that data/*.py wrote, memory-mapped, or of a packed .npz.

    For a text teacher a label is the line of prompts.txt beside the tokens; otherwise prompts is None.
    """
    net, text, prompts = teacher.net, teacher.text is not None, None
    path, meta = local(path), {}
    try:
        if os.path.isdir(path):
            x, labels = (np.load(os.path.join(path, f"{k}.npy"), mmap_mode="r") for k in ("tokens", "labels"))
            with open(os.path.join(path, "meta.json")) as f:
                meta = json.load(f)
            if text:
                with open(os.path.join(path, "prompts.txt"), encoding="utf-8") as f:
                    prompts = f.read().splitlines()
        else:
            with np.load(path) as f:
                x, labels = f["tokens"], f["labels"]
                meta = json.loads(str(f["meta"])) if "meta" in f else {}
                prompts = f["prompts"].tolist() if text else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as err:
        raise UserError(f"--data {path}: cannot read real tokens{' with their prompts' * text} ({err}); prepare them "
                        "with " + ("data/prompts.py --images" if text else "data/fashion.py or data/imagenet.py"))
    if not meta.get("complete", True):
        raise UserError(f"--data {path}: these tokens are unfinished; run the command that makes them again, it goes on")
    if x.shape[1:] != (net.L, net.G) or len(x) != len(labels) or len(x) == 0 or meta.get("V", net.V) != net.V:
        raise UserError(f"--data {path}: expected tokens (n, {net.L}, {net.G}) below {net.V} and n labels, got {x.shape} "
                        f"and {labels.shape}{meta.get('teacher', '') and ' of ' + meta['teacher']}; were they made with "
                        "this teacher's tokenizer?")
    if int(labels.max()) >= (known := len(prompts) if text else teacher.spec.classes):
        raise UserError(f"--data {path}: label {int(labels.max())}, but {known} {'prompts' if text else 'classes'}")
    return x, labels, prompts


class TextFeatures:
    """The conditions that prompts stand for, each prompt encoded once: when first drawn, kept in memory or in a folder.

    16 prompts at a time, always, so that a prompt's features are the same bits whichever others are new with it, and a
    resumed run stays exact. conditions (n, context) are token ids. In a folder (`--text_cache`) features outlive the run,
    for the same prompts and tower: a sparse file for each part of the condition, the last says which rows are filled in.
    """

    CHUNK = 16

    def __init__(self, teacher, conditions, cache="memory", limit=16e9):
        self.teacher, self.conditions, self.parts, self.why = teacher, conditions, None, None
        if cache == "off" or teacher.text is None:
            return
        first, n = [part[:1].cpu() for part in teacher.cond(conditions[:1])], len(conditions)
        shapes = [((n, *part.shape[1:]), part.dtype) for part in first] + [((n,), torch.bool)]
        if cache == "memory":                         # untouched pages take none
            if (size := n * sum(part.nbytes for part in first)) > limit:
                self.why = (f"the features of {n:,} prompts would take {size / 1e9:.0f} GB of memory: each is encoded whenever "
                            "it is drawn. --text_cache FOLDER keeps them on disk")
                return
            *self.parts, self.known = (torch.zeros(shape, dtype=dtype) for shape, dtype in shapes)
        else:
            folder = os.path.join(cache, f"{teacher.spec.name}-{fingerprint([conditions, *first])}")
            os.makedirs(folder, exist_ok=True)
            *self.parts, self.known = (
                torch.from_file(os.path.join(folder, f"{i}.bin"), True, math.prod(shape), dtype=dtype).view(shape)
                for i, (shape, dtype) in enumerate(shapes))

    def __call__(self, which):
        """cond of rows `which` (B,) of the conditions."""
        if self.parts is None:
            return self.teacher.cond(self.conditions[which])
        rows = which.cpu()
        for new in filter(len, rows[~self.known[rows]].unique().split(self.CHUNK)):
            full = new[torch.arange(self.CHUNK) % len(new)]
            for part, c in zip(self.parts, self.teacher.cond(self.conditions[full.to(which.device)])):
                part[new] = c[: len(new)].cpu()
            self.known[new] = True                    # after the features: a killed run leaves no holes
        return tuple(part[rows].to(which.device) for part in self.parts)


def lr_factor(n, warmup, steps, end=1.0):
    """Linear warm-up (the first update has rate 0), then constant, or a cosine down to the share `end`."""
    if n < warmup:
        return n / warmup
    return end + (1 - end) * (1 + math.cos(math.pi * (n - warmup) / max(steps - warmup, 1))) / 2


@torch.no_grad()
def ema_update(ema, net, n, decay):
    """ema <- rate ema + (1 - rate) net, with the official ramp rate = min(decay, (1 + n) / (10 + n)), n = 0, 1, ..."""
    rate = min(decay, (1 + n) / (10 + n))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - rate)


class Muon:
    """Matrices by Muon (Jordan et al. 2024), momentum made orthogonal and as large as Adam's steps; the rest by Adam."""

    def __init__(self, params, lr, betas, eps, weight_decay, fused):
        matrices, rest = ([p for p in params if (p.ndim == 2) == wanted] for wanted in (True, False))
        self.parts = (torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw"),
                      torch.optim.Adam(rest, lr, betas, eps, weight_decay, fused=fused))

    param_groups = property(lambda self: [group for part in self.parts for group in part.param_groups])

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


def update(opt, params, clip, lr):
    """Clip and step, unless the gradient is not finite; returns its norm before clipping, and whether it stepped.

    Under DDP the gradient is the average over processes, so all of them see the same norm and decide alike.
    # choice: all three networks are clipped (App. H.1 does not say which); the official code clips the student alone.
    """
    norm = torch.nn.utils.clip_grad_norm_(params, clip)
    finite = bool(torch.isfinite(norm))
    if finite:
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
    opt.zero_grad(set_to_none=True)
    return norm, finite


def save_checkpoint(path, state):
    """Write beside the old checkpoint, then rename: a kill or a full disk at any moment leaves the old one whole."""
    try:
        with replacing(path) as f:
            torch.save(state, f)
    except (OSError, RuntimeError) as err:            # torch's own writer reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        raise UserError(f"could not write {path} ({err}); is the disk full? The previous checkpoint is untouched: "
                        "make room and go on with --resume")


def trim_log(path, step):
    """Keep the whole lines of log.jsonl up to `step`: what a killed run wrote after its checkpoint is done again."""
    if os.path.exists(path):
        keep = []
        with open(path) as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    if json.loads(line).get("step", 0) <= step:
                        keep.append(line)
        with replacing(path) as f:
            f.write("".join(keep).encode())


def logged(path):
    """The evaluations in log.jsonl."""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [row for row in map(json.loads, f) if "model" in row]


def autocast(c):
    return torch.autocast(c.device, torch.bfloat16, enabled=c.dtype == "bf16")


def count(module):
    return sum(p.numel() for p in module.parameters())


# ============================================================================================== evaluation
def student_row(c, teacher, net, model, judge, say):
    """One row of results for a one-step generator, on all processes together; None without a judge."""
    if judge is None or not c.n_eval:
        return None
    row = judge(one_step(c, teacher, net), c.n_eval, desc=model if say is print else None)
    say(f"{model}: {ev.headline(row)}")
    return dict(model=model, kind="student", steps=1, temperature=c.temperature, **row)


def show(c, make, teacher, conditions):
    """The pictures of a strip, from starts that are the same at every look."""
    with autocast(c):
        return ev.fixed_sample(make, conditions, n=20 if teacher.spec.image[1] < 100 else 4)


def one_step(c, teacher, net):
    return functools.partial(ev.generate_student, teacher, net, init_ratio=c.init_ratio, noise=c.noise,
                             temperature=c.temperature)


def finish(c, teacher, start, student, rows, conditions, prompts, judge, say):
    """The end of a run: weights in float16 for others to load, a picture, and a table against the teacher's steps.

    start is the strip of pictures with which the run began. The teacher's quality is read from the record that ships
    with it (minutes to make: evaluate.py --steps ...); its speed is measured here, on 500 images in batches like the
    student's: the ratio depends on the machine. Where no record ships, the teacher is judged here as well.
    """
    from safetensors.torch import save

    first = say is print
    if first:
        path = os.path.join(c.out, "student.safetensors")
        with replacing(path) as f:
            f.write(save({k: v.half().cpu().contiguous() for k, v in student.state_dict().items()}))
        say(f"wrote {path}")
    if not c.eval_every:
        return
    steps = next(iter(teacher.spec.sampling))
    many = functools.partial(ev.generate_teacher, teacher, steps=steps)
    if first:
        ev.sheet([(f"teacher, {steps} guided steps", show(c, many, teacher, conditions)),
                  ("start of this run, 1 step", start),
                  ("student, 1 step", show(c, one_step(c, teacher, student), teacher, conditions))],
                 os.path.join(c.out, "picture.png"), words=prompts and ev.spread(prompts, len(start)))
        say(f"wrote {c.out}/picture.png")
    if not rows:
        return
    with autocast(c):
        timed = judge(many, 500 if teacher.spec.record else c.n_eval, desc="the teacher" if first else None)
    if teacher.spec.record:
        with open(local(teacher.spec.record)) as f:
            shipped = [dict(json.loads(line), model="teacher, shipped record") for line in f]
        for row in shipped:
            row.update({k: timed[k] if row["steps"] == steps else None for k in ("images/s", "tokens_only/s")})
    else:
        shipped = [dict(timed, model="teacher", kind="teacher", steps=steps, **teacher.spec.settings(steps))]
    rows = [row for row in shipped if row["n"] == c.n_eval] + rows
    if first:
        with open(os.path.join(c.out, "results.jsonl"), "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        text = ev.table(rows)
        with open(os.path.join(c.out, "table.md"), "w") as f:
            f.write(text + "\n")
        say("\n" + text)


# ================================================================================================ training
def train(c):
    # ------------------------------------------------------------------------------- processes and device
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device(c.device, int(os.environ.get("LOCAL_RANK", 0))) if c.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")        # TF32 where a GPU has it, for what stays in float32
    say = print if rank == 0 else lambda *a, **k: None
    micro = c.batch // (world * c.accum)              # images a forward pass

    # -------------------------------------------------------------------------- the networks (Alg. 1, l. 1)
    teacher = load_teacher(c.teacher, c.teacher_weights, c.tokenizer_weights, c.random_weights, device, c.text_weights,
                           c.text_activation)
    net, spec = teacher.net, teacher.spec
    E, bias = net.tables()                            # frozen, so one table serves teacher, student and auxiliary
    unit = teacher.noise_unit()
    student = copy.deepcopy(net)
    if c.init_from and c.init_from != "teacher":
        load_state(student, read_weights(local(c.init_from)), c.init_from)
    aux, ema = copy.deepcopy(net), copy.deepcopy(student)
    for m in (student, aux):
        m.requires_grad_(True).set_dropout(c.dropout).train()
        for p in m.frozen():
            p.requires_grad_(False)
    if c.dtype == "bf16":
        net.halve()                                   # frozen: half the memory, no cast in every pass, the same results
    for m in (net, student, aux, teacher.tokenizer):
        m.set_checkpointing(c.checkpointing)
    nets = {"student": student, "aux": aux}
    if c.gan:
        real_data = RealTokens(c.data, teacher, c.seed)
        torch.manual_seed(c.seed)                     # the heads' initial weights, the same on every process
        layers = head_layers(net.depth, c.heads)
        disc = nets["disc"] = Discriminator(net.width, layers, c.head_width, c.head_mlp, net.feature_grid).to(device)
    prompts = None if spec.text is None else real_data.prompts if c.gan else read_prompts(c.prompts)
    conditions = teacher.conditions(prompts)
    features = TextFeatures(teacher, conditions, c.text_cache)
    if features.why:
        say(features.why)
    if c.reward:
        rewards = load_judges(spec, c.rewards, {name: getattr(c, f"{name}_weights") for name in c.rewards}, c.random_weights,
                              device=device, dtype=torch.bfloat16 if c.dtype == "bf16" else None, vocab=c.bert_vocab,
                              clip_scaled=not c.clip_cosine, checkpointing=c.checkpointing)
        if not c.w_dimo:
            say("warning: a reward without Di[M]O over-saturates (App. I.10); --w_dimo above 0 anchors it")

    params = {k: [p for p in m.parameters() if p.requires_grad] for k, m in nets.items()}
    rates = {"student": c.lr, "aux": c.aux_lr, "disc": c.disc_lr}
    betas = {"student": (0.9, 0.999), "aux": (0.9, 0.999), "disc": (0.0, 0.999)}
    Opt = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}[c.optimizer]
    opts = {k: Opt(params[k], rates[k], betas[k], eps=1e-6, weight_decay=c.weight_decay, fused=True) for k in nets}

    start = show(c, one_step(c, teacher, student.eval()), teacher, conditions) if rank == 0 and c.eval_every else None
    student.train()

    # ------------------------------------------------------------------------------------ files and resuming
    ckpt_path, log_path = os.path.join(c.out, "ckpt.pt"), os.path.join(c.out, "log.jsonl")
    first_step = skipped = 0
    if c.resume:
        state = read_weights(ckpt_path)
        for k, m in (*nets.items(), ("ema", ema)):
            load_state(m, state[k], f"{ckpt_path} ({k})")
        for k, opt in opts.items():
            opt.load_state_dict(state["optimizers"][k])
        first_step, skipped = state["step"], state["skipped"]
        del state
    if rank == 0:
        os.makedirs(c.out, exist_ok=True)
        trim_log(log_path, first_step if c.resume else -1)
    if world > 1:
        dist.barrier()                                # the log is whole before any process reads it
    say(f"{spec.name}: {count(net):,} parameters, " + (f"discriminator {count(disc):,}, {len(real_data.labels):,} real "
        "images" if c.gan else "no GAN") + f"; {world} process(es), {device}, {c.dtype}; step {first_step} of {c.steps}")
    say("settings " + json.dumps({k: v for k, v in vars(c).items() if k not in ("resume", "overwrite", "out")}))

    def checkpoint(step):
        if rank == 0:
            save_checkpoint(ckpt_path, dict(
                format=1, step=step, skipped=skipped, config=vars(c), ema=ema.state_dict(),
                optimizers={k: opt.state_dict() for k, opt in opts.items()}, **{k: m.state_dict() for k, m in nets.items()}))

    def log(row):
        if rank == 0:
            with open(log_path, "a") as f:
                f.write(json.dumps(row) + "\n")

    # ------------------------------------------------------------------------------------------ evaluation
    judge = ev.load_judge(teacher, device)
    if judge is None:
        say(f"{spec.name}: samples are drawn, not judged, while it trains; for FID see evaluate.py --reference")
    rows = logged(log_path)                           # of the part before a resume

    def look(model, net, step):
        """FID, a line in the log, and a strip of samples from starts that are the same at every look."""
        if row := student_row(c, teacher, net, model, judge, say):
            rows.append(row)
            log(dict(step=step, **row))
        if rank == 0:
            img = show(c, one_step(c, teacher, net), teacher, conditions)
            ev.sheet([(model, img)], os.path.join(c.out, f"samples_{step:06d}.png"),
                     words=prompts and ev.spread(prompts, len(img)))

    # --------------------------------------------------------------------------------- compile, then wrap
    if c.compile:                                     # in place: state-dict keys stay as they are
        for m in (net, *nets.values()):
            m.compile()
    # Where gradients must be averaged, call the DDP wrapper; calling the bare module silently trains each rank alone.
    wrap = lambda m: DDP(m, [device.index] if device.type == "cuda" else None, broadcast_buffers=False)
    wrapped = {k: wrap(m) if world > 1 else m for k, m in nets.items()}
    # Under accumulation gradients travel once a step, with the last micro-batch.
    hold = lambda m, a: contextlib.nullcontext() if world == 1 or a == c.accum - 1 else m.no_sync()

    # --------------------------------------------------------------------------------- the loop (Alg. 1)
    bar = tqdm(range(first_step, c.steps), initial=first_step, total=c.steps, unit="step", disable=rank > 0,
               dynamic_ncols=True)
    if c.eval_every and first_step == 0:
        look("start of this run", ema, 0)
    bad, tick, ticked = 0, time.time(), first_step
    for step in bar:
        logging = (step + 1) % c.log_every == 0 or step + 1 == c.steps
        factor = lr_factor(step, c.warmup, c.steps, c.lr_end)
        torch.manual_seed((c.seed + 1) * 7_919 + step * world + rank)
        gan_on = c.gan and c.w_gan > 0 and step >= c.gan_start
        reward_on = c.reward and c.w_reward > 0 and step >= c.reward_start
        learning = step >= c.student_start and (c.w_dimo > 0 or gan_on or reward_on)
        firsts = [(a * world + rank) * micro for a in range(c.accum)]
        batches = [draw_step(c, step, first, micro, net, conditions) for first in firsts]

        # --- Generate logits z_theta and tokens x_theta, update the generator (l. 3-18)
        for a, (r, first) in enumerate(zip(batches, firsts)):
            if c.gan:      # choice: real images bring the labels, so that real and fake share them (App. H.3)
                r.x_real, r.which = real_data.batch(step * c.batch + first, micro)
            r.cond = cond = features(r.which)
            x_init = initial_tokens(r.tokens, c.init_ratio, r.scores, net.V)                  # l. 4
            with autocast(c), hold(wrapped["student"], a), torch.set_grad_enabled(learning):
                model = wrapped["student"] if learning else student
                z = student_logits(model, x_init, cond, E, bias, c.noise, r.noise * unit)     # l. 5: (B, L, G, V)
            r.z, r.x = z.detach(), sample_tokens(z.detach(), u=r.u)                           # l. 6
            terms = {}
            if learning and c.w_dimo:
                mask = exact_mask(r.ratio, r.scores_t)                                        # l. 8
                e_t = (soft_embed(r.z, E, bias, mask) if c.soft_state                         # App. I.15
                       else embed_tokens(r.x.masked_fill(mask, net.V), E, bias))
                w = c.cfg if c.cfg_schedule == "constant" else guidance_scale(r.ratio, c.cfg, c.cfg_low, c.cfg_schedule)
                weight = 1.0 if c.w_t == "one" else 1 / r.ratio
                with autocast(c):
                    g = dimo_grad(net, aux, e_t, cond, mask, w, c.beta, weight)               # l. 9-11
                terms["dimo"] = c.w_dimo / (micro * c.accum) * g      # DDP's average makes this a sum / global batch
            if learning and gan_on:
                mask = exact_mask(r.ratio_gan, r.scores_gan, least=0)
                with autocast(c):
                    g, _ = gan_grad(r.z, disc, net, cond, mask, E, bias, c.estimator, c.tau, c.feature_noise)
                terms["gan"] = c.w_gan / c.accum * g                                          # l. 14
            if learning and reward_on:
                asked = [prompts[i] for i in r.which.tolist()]
                g, scores = reward_grad(r.z, teacher.tokenizer, cond, rewards, asked, c.rewards, chunk=c.reward_chunk)
                terms["reward"] = c.w_reward / c.accum * g                                    # l. 16
            if learning:
                with hold(wrapped["student"], a):
                    z.backward(sum(terms.values()))                                           # Eq. (10), l. 18
        norms, fine = {}, []
        if learning:
            norms["student"], ok = update(opts["student"], params["student"], c.clip, rates["student"] * factor)
            fine.append(ok)
            if ok:
                ema_update(ema, student, step - c.student_start, c.ema)

        # --- Update the auxiliary, an MDM of the student's tokens (l. 19-21)
        for a, r in enumerate(batches):
            if c.redraw:   # choice: off, x_theta is used again (l. 20); the official code draws all anew, from the new theta
                r.cond = r.cond if c.gan else features(r.again.which)
                x_init = initial_tokens(r.again.tokens, c.init_ratio, r.again.scores, net.V)
                with torch.no_grad(), autocast(c):
                    z = student_logits(student, x_init, r.cond, E, bias, c.noise, r.again.noise * unit)
                x = sample_tokens(z, u=r.again.u)
            else:
                z, x = r.z, r.x
            mask = exact_mask(r.ratio_aux, r.scores_aux)                                      # l. 20
            with autocast(c), hold(wrapped["aux"], a):
                z_aux = wrapped["aux"](embed_tokens(x.masked_fill(mask, net.V), E, bias), r.cond)
                loss_aux = aux_loss(z_aux, x, mask, c.smoothing, r.aux_units / world, z, c.soft_target)
                loss_aux.backward()                                                           # Eq. (1), l. 21
        norms["aux"], ok = update(opts["aux"], params["aux"], c.clip, rates["aux"] * factor)
        fine.append(ok)

        # --- Update the discriminator (l. 22-25)
        if c.gan:
            for a, r in enumerate(batches):
                mask = exact_mask(r.ratio_disc, r.scores_disc, least=0)                       # l. 23: one for both
                with autocast(c), hold(wrapped["disc"], a):
                    d_real, d_fake = disc_logits(r.z, r.x_real, wrapped["disc"], net, r.cond, mask, E, bias,
                                                 c.estimator, c.tau, c.feature_noise)
                    loss_disc = disc_loss(d_real, d_fake)                                     # Eq. (7), l. 25
                    (loss_disc / c.accum).backward()
            norms["disc"], ok = update(opts["disc"], params["disc"], c.clip, rates["disc"] * factor)
            fine.append(ok)

        # --- Not finite: skipped above, on every process alike; give up after ten steps in a row
        bad, skipped = (0, skipped) if all(fine) else (bad + 1, skipped + 1)
        if bad >= 10:
            raise UserError(f"gradients were not finite in 10 steps in a row, up to step {step} (norms: "
                            + ", ".join(f"{k} {float(v):.3g}" for k, v in norms.items()) + "). The checkpoint of step "
                            f"{step // c.save_every * c.save_every} is good: lower --lr, or try --dtype fp32, and --resume")

        # --- Log: what tells health, and not only loss
        if logging:
            entropy, top1 = concentration(r.z)
            row = dict(step=step + 1, entropy=entropy, top1=top1, loss_aux=loss_aux.detach() * c.accum, skipped=skipped,
                       **{f"grad_{k}": g.norm() for k, g in terms.items()},       # of each term at the logits
                       **{f"norm_{k}": v for k, v in norms.items()})              # of all parameters, before clipping
            if c.gan:
                row.update(loss_disc=loss_disc.detach(), d_real=d_real.detach().mean(), d_fake=d_fake.detach().mean())
            if "reward" in terms:
                row.update(scores)                                # of the soft images
            row = {k: round(float(v), 6) for k, v in row.items()}
            row.update(lr=rates["student"] * factor, img_s=round(c.batch * (step + 1 - ticked) / (time.time() - tick), 1))
            tick, ticked = time.time(), step + 1
            log(row)
            text = " ".join(f"{k} {v:.3g}" for k, v in row.items() if k not in ("step", "lr", "skipped"))
            if rank == 0:
                bar.write(f"step {step + 1:5d} | {text}")
        last_step = step + 1 == c.steps
        if c.eval_every and ((step + 1) % c.eval_every == 0 or last_step):
            look(f"student, step {step + 1}", ema, step + 1)
        if (step + 1) % c.save_every == 0 or last_step:
            checkpoint(step + 1)

    finish(c, teacher, start, ema, rows, conditions, prompts, judge, say)


def main():
    ap, defaults = flags()
    given = vars(ap.parse_args())
    try:
        if given.get("resume"):
            path = os.path.join(given.get("out", defaults["out"]), "ckpt.pt")
            config = read_weights(path).get("config")
            if config is None:
                raise UserError(f"{path} holds weights, not a checkpoint of train.py: start from them by --init_from")
            for key in ("teacher", "recipe", "seed", "batch", "heads", "head_width", "head_mlp", "gan", "optimizer"):
                if key in given and given[key] != config[key]:
                    raise UserError(f"{path} is a run with --{key} {config[key]}, and now --{key} is {given[key]}: "
                                    "leave the flag out, or start another run in another --out")
            given = {**config, **given}
        c = settle(given, defaults)
        train(c)
    except UserError as err:
        ap.exit(2, f"train.py: {err}\n")
    except OSError as err:                            # --out cannot be written, the disk is full, a file went away
        ap.exit(2, f"train.py: {err}. The last checkpoint, if there is one, is whole: go on with --resume\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
