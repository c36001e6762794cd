"""How good are the images? FID, Inception Score, precision, recall, density, coverage, and the speed.

All compare features of N generated images with features of real ones. With mean mu and covariance S of each set,

    FID = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))          lower is better, 0 for equal Gaussians
    IS  = exp(mean KL(p(y|x) || p(y)))                                   sharp and diverse, as a classifier sees it
    precision, recall       share of fakes inside some real's ball of k neighbours, and the other way round
    density, coverage       the same, counting balls, so outliers weigh little; share of real balls with a fake in

None of these is a property of a model alone. FID falls as N grows (below 10,000 by more than papers argue about),
and it depends on the feature network, the reference images, the resize, the rounding of pixels (truncated to uint8, or
rounded, as each teacher's authors do), temperature, guidance, the seed and the labels (here every class equally often).
So every row of results.jsonl holds all of them, with hashes: compare rows that differ in one.

The tiny world has its own feature network, a small classifier (`FashionNet`). Its features are means and standard
deviations of the maps of *all* layers: the last layer alone hardly sees texture, and texture is what betrays
tokens that were drawn independently. Its FIDs compare only with each other. Where real images stand, the floor,
says assets/fashion/reference.json.

    python evaluate.py --ckpt out/run/ckpt.pt --steps 1 16       # a student, and its teacher beside it
    python evaluate.py --ckpt out/run/ckpt.pt --temperature 0 0.5 1          # a sweep; 0 is argmax (Tab. 14)
    python evaluate.py --steps 1 2 4 8 16                        # the teacher alone
    python evaluate.py --teacher maskgit --steps 8 --order halton             # a published one; Tab. 2's baseline
    torchrun --nproc_per_node=4 evaluate.py --ckpt ... --n 50000
    python evaluate.py --teacher meissonic-tiny --steps 1 16     # GenEval on the world of shapes, and a CLIP's score
    python evaluate.py --ckpt ... --benchmark geneval --metadata evaluation_metadata.jsonl --detector mask2former
    python evaluate.py --ckpt ... --benchmark hps --metadata HPDv2/benchmark                 # and clip, captions.txt
    python evaluate.py --reconstruction                          # the tokenizer: what limits every student
    python evaluate.py --make_reference                          # made assets/fashion/{classifier,reference}.*
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import re
import textwrap
import time
import warnings
import zipfile
from collections import Counter
from typing import Callable, NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import teachers
from dimo import initial_tokens, student_logits
from reward import CLIP_G, CLIP_H, CLIP_L, ClipReward, load_judges, load_model, preprocess_longest, preprocess_pil
from soft_embed import sample_tokens
from teachers import (HERE, SPECS, UserError, decode_tokens, load_state, load_student, load_teacher, read_weights,
                      replacing)

ASSETS = os.path.join(HERE, "assets", "fashion")


# ================================================================================================= metrics
def fid(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two Gaussians, by the matrix root. Rank-deficient covariances (few images) are fine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", getattr(scipy.linalg, "LinAlgWarning", Warning))      # "singular": fine
        root = scipy.linalg.sqrtm(sigma1 @ sigma2)
        if not np.isfinite(root).all():
            eps = 1e-6 * np.eye(len(sigma1))
            root = scipy.linalg.sqrtm((sigma1 + eps) @ (sigma2 + eps))
    d = mu1 - mu2
    return float(d @ d + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)


def fid_eigenvalues(mu1, sigma1, mu2, sigma2):
    """The same number without a matrix root: tr((S1 S2)^(1/2)) sums the roots of the eigenvalues of S1 S2."""
    d, roots = mu1 - mu2, np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).astype(complex))
    return float(d @ d + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.real.sum())


class Moments:
    """Mean and covariance of features that come in batches, on several processes, by float64 sums.

    The sums run about `shift`, a point near the mean and the same on every process (here the reference's mean):
    E[f f^T] - mu mu^T would lose digits where means are large against the spread.
    """

    def __init__(self, dim, shift=0.0, device="cpu"):
        self.shift = torch.as_tensor(shift, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, f):
        f = f.double() - self.shift                                                           # (B, dim)
        self.count += len(f)
        self.sum += f.sum(0)
        self.outer += f.T @ f

    def result(self):
        """mu (dim,) and the unbiased covariance (dim, dim) of what all processes have seen, as float64 arrays."""
        n, total, outer = (all_reduce(t.clone()) for t in (self.count, self.sum, self.outer))
        mean = total / n
        sigma = (outer - n * mean[:, None] * mean) / (n - 1)
        return (mean + self.shift).cpu().numpy(), sigma.cpu().numpy()


def inception_score(logits, splits=10, split_size=None, shuffle=True):
    """(mean, population std) over splits of exp(mean KL(p(y|x) || p(y))), from the logits (N, classes).

    Three conventions are about, and differ by sampling noise at 50,000 images: torch-fidelity's (the default), ten
    splits after a fixed permutation; StyleGAN's, ten splits in order (shuffle=False); ADM's, chunks of 5,000 in
    order (split_size=5000, shuffle=False).
    """
    logp = torch.as_tensor(logits).double().log_softmax(-1)                                   # (N, classes)
    n = len(logp)
    if shuffle:
        logp = logp[torch.from_numpy(np.random.RandomState(2020).permutation(n)).to(logp.device)]
    splits = min(splits, n)
    edges = [*range(0, n, split_size), n] if split_size else [i * n // splits for i in range(splits + 1)]
    parts = [logp[a:b] for a, b in zip(edges, edges[1:])]
    log_mean = [part.logsumexp(0) - math.log(len(part)) for part in parts]                    # log p(y), (classes,)
    kl = [(part.exp() * (part - log_p)).sum(1).mean() for part, log_p in zip(parts, log_mean)]
    scores = torch.stack(kl).exp()
    return scores.mean().item(), scores.std(correction=0).item()


def squared_distances(a, b):
    """|a_i - b_j|^2 (n, m) as |a|^2 + |b|^2 - 2 a b: a matrix product, and ten times faster than differences."""
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(a.square().sum(1)[:, None])


def prdc(real, fake, k=3, block_bytes=2**26):
    """Precision, recall (Kynkaanniemi 2019), density, coverage (Naeem 2020) of features (N, dim), as a dict.

    A ball about a point reaches to its k-th neighbour in its own set, itself not counted, and its surface is
    outside: distances compare by a strict <. Float64 and a margin of 1e-12 see to that: the expanded square is off
    by 1e-15 or so, which would decide exact ties (duplicate images) at random. Blocks keep 50k x 10k small.
    """
    real, fake = (torch.as_tensor(f).double() for f in (real, fake))
    if min(len(real), len(fake)) <= k:
        raise UserError(f"{k} neighbours need more than {k} images a side: got {len(real)} real, {len(fake)} fake")
    real, fake = real - real.mean(0), fake - real.mean(0)        # the same distances, of smaller squares
    tie = 1e-12 * max(f.square().sum(1).max().item() for f in (real, fake))
    blocks = lambda a, b: a.split(max(1, block_bytes // (8 * len(b))))
    radii = lambda f: torch.cat([squared_distances(part, f).kthvalue(k + 1).values for part in blocks(f, f)])
    r_real, r_fake = radii(real) - tie, radii(fake) - tie        # squared
    precise = inside = 0
    recalled = covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    start = 0
    for part in blocks(fake, real):
        d = squared_distances(part, real)                                                     # (block, N real)
        in_real = d < r_real
        precise += in_real.any(1).sum().item()
        inside += in_real.sum().item()
        covered = covered | in_real.any(0)                       # if any fake is inside, the nearest one is
        recalled = recalled | (d < r_fake[start:start + len(part), None]).any(0)
        start += len(part)
    return dict(precision=precise / len(fake), recall=recalled.double().mean().item(),
                density=inside / (k * len(fake)), coverage=covered.double().mean().item())


# ================================================================================ extractors and references
# An extractor maps images (B, C, H, W) in [0, 1] to (features (B, dim), logits (B, classes)). The tiny world's is
# this one. For photographs in colour it will be the Inception network of 2015, with the resize inside it.
class FashionNet(nn.Module):
    """A small classifier of clothes, (B, 1, 32, 32). Its features see texture: mean and deviation of every map.

    They are standardised over the training set, so that no layer dominates a distance.
    """

    def __init__(self, widths=(16, 24, 32, 32), strides=(1, 2, 2, 1), classes=10):
        super().__init__()
        self.dim, self.classes = 2 * sum(widths), classes
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, s, padding=1, bias=False)
                                   for a, b, s in zip((1, *widths), widths, strides))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths)
        self.standard = nn.BatchNorm1d(self.dim, affine=False)
        self.head = nn.Linear(self.dim, classes)

    def forward(self, img):
        h, stats = img, []
        for conv, norm in zip(self.convs, self.norms):
            h = F.relu(norm(conv(h)))                            # (B, width, H, W), 32 to 8 px
            mean = h.mean((2, 3), keepdim=True)                                               # (B, width, 1, 1)
            stats += [mean[:, :, 0, 0], ((h - mean).square().mean((2, 3)) + 1e-6).sqrt()]
        features = self.standard(torch.cat(stats, 1))                                         # (B, dim)
        return features, self.head(features)


@torch.no_grad()
def extract(extractor, img):
    """(features, logits) of uint8 images, in float32 even where the caller generates under autocast."""
    with torch.autocast(img.device.type, enabled=False):
        return extractor(img.float() / 255)


class Reference(NamedTuple):
    """The real side: moments of all images for FID, and the features of some of them (or None) for neighbours."""

    mu: np.ndarray
    sigma: np.ndarray
    features: torch.Tensor | None
    name: str


def load_reference(path, dim, device="cpu"):
    """A Reference from any .npz with mu (dim,) and sigma (dim, dim), and `features` (n, dim) if it has them."""
    try:
        with np.load(path) as f:
            mu, sigma = (f[key].astype(np.float64) for key in ("mu", "sigma"))
            features = torch.from_numpy(f["features"]).float().to(device) if "features" in f else None
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as err:
        raise UserError(f"cannot read statistics from {path} ({err}): expected an .npz with mu and sigma")
    if (mu.shape, sigma.shape) != ((dim,), (dim, dim)) or (features is not None and features.shape[1:] != (dim,)):
        raise UserError(f"{path}: expected mu ({dim},) and sigma ({dim}, {dim}), got {mu.shape} and {sigma.shape}: "
                        "made with another feature network?")
    return Reference(mu, sigma, features, f"{os.path.basename(path)} {fingerprint([mu, sigma])}")


def load_extractor(spec, device="cpu"):
    """(extractor, reference) for a teacher's images, or (None, None): then images are drawn and timed, not judged."""
    if spec.image != (1, 32, 32):                     # Inception features are not part of this version yet
        return None, None
    path = os.path.join(ASSETS, "classifier.safetensors")
    extractor = load_state(FashionNet(), read_weights(path), path).to(device).eval().requires_grad_(False)
    return extractor, load_reference(os.path.join(ASSETS, "reference.npz"), extractor.dim, device)


def fingerprint(arrays):
    """Twelve hex digits of the SHA-256 of arrays, or of a module's weights: files may have been renamed."""
    if isinstance(arrays, nn.Module):
        arrays = arrays.state_dict().values()
    digest = hashlib.sha256()
    for a in arrays:
        digest.update(torch.as_tensor(a).detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


# ============================================================================================== generation
@torch.no_grad()
def generate_student(teacher, net, rows, *, init_ratio=0.6, noise=0.1, temperature=1.0, generator=None, seconds=None):
    """One pass of the generator `net`: rows (B, ...) of teacher.conditions -> uint8 images (B, C, H, W).

    temperature 0 is argmax. seconds, a Counter, receives the time of the "tokens" and of the "pixels", the decoder's.
    """
    start, device, shape = now(rows.device), rows.device, (len(rows), net.L, net.G)
    (E, bias), cond = net.tables(), teacher.cond(rows)
    tokens = torch.randint(net.V, shape, generator=generator, device=device)
    scores, u = (torch.rand(shape, generator=generator, device=device) for _ in range(2))
    n = torch.randn(*shape[:2], E.shape[-1], generator=generator, device=device) * teacher.noise_unit(net)
    x_init = initial_tokens(tokens, init_ratio, scores, net.V)                                # Alg. 1, l. 4
    z = student_logits(net, x_init, cond, E, bias, noise, n)                                  # l. 5: (B, L, G, V)
    if not torch.isfinite(z).all():
        raise UserError("the student's logits are not finite: its training diverged, take an earlier checkpoint")
    x = sample_tokens(z, temperature, u).clamp_(max=net.V - 1)                                # l. 6, no masks
    return to_pixels(teacher, x, cond, start, seconds)


@torch.no_grad()
def generate_teacher(teacher, rows, steps, *, guidance=None, temperature=None, order=None, generator=None, seconds=None):
    """The multi-step teacher: rows (B, ...) of conditions -> uint8 images, with its published settings or these."""
    start, net, spec = now(rows.device), teacher.net, teacher.spec
    plan = spec.plan(net.L * net.G, steps, **spec.settings(steps, guidance=guidance, temperature=temperature))
    if order == "halton" and net.grid is None:
        raise UserError(f"--order halton needs a grid of tokens, and {spec.name}'s have no place in the image")
    order = teachers.halton_order(net.grid) if order == "halton" else None
    draws = lambda i: torch.rand(2, len(rows), net.L, net.G, generator=generator, device=rows.device)
    cond = teacher.cond(rows)
    return to_pixels(teacher, teachers.sample(net, cond, plan, order=order, draws=draws), cond, start, seconds)


def to_pixels(teacher, x, cond, start, seconds):
    """Tokens (B, L, G) -> uint8 images, truncated or rounded as the teacher's authors do; always decoded in float32."""
    middle = now(x.device)
    with torch.autocast(x.device.type, enabled=False):
        img = to_bytes(decode_tokens(teacher.tokenizer, x, cond), teacher.spec)
    if seconds is not None:
        seconds.update(tokens=middle - start, pixels=now(x.device) - middle)
    return img


def to_bytes(img, spec):
    """Images in [0, 1] -> uint8, truncated or rounded as the teacher's authors do."""
    return (img * 255 + spec.rounds / 2).to(torch.uint8)


def now(device):
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ============================================================================================== evaluation
def all_reduce(t):
    """The sum over processes, in place; every process must call it."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def in_batches(make_images, rows, batch, seed, desc, facts):
    """The images of `rows`, batch by batch, this process's share of them: yields (slice, uint8 images).

    Batch i draws from a generator seeded by (seed, i), and whole batches go to processes in turn. At the end the
    speed of all processes together is put into `facts`.
    """
    device, seconds, timed = rows.device, Counter(), 0
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank, math.ceil(len(rows) / batch), world)
    for i in tqdm(mine, desc, unit="batch", disable=rank > 0 or desc is None, leave=False, dynamic_ncols=True):
        if i == rank + world:                         # the first batch only warmed caches and kernels up
            seconds.clear()
            timed = 0
        part = slice(i * batch, (i + 1) * batch)
        own_seed = int(np.random.SeedSequence((seed, i)).generate_state(1)[0])
        generator = torch.Generator(device).manual_seed(own_seed)
        img = make_images(rows[part], generator=generator, seconds=seconds)
        timed += len(img)
        yield part, img
    rates = [timed / s if s else 0.0 for s in (seconds.total(), seconds["tokens"])]
    rates = all_reduce(torch.tensor(rates, dtype=torch.float64, device=device)).tolist()
    facts.update({"images/s": rates[0] or None, "tokens_only/s": rates[1] or None, "processes": world})


@torch.no_grad()
def evaluate(make_images, labels, extractor, reference, batch=250, seed=0, k=3, desc=None):
    """All metrics of len(labels) images, as a dict; desc names the progress bar (none without).

    labels: conditions, a row an image. make_images(labels (b, ...), generator=, seconds=) -> uint8 images; bind the
    rest with functools.partial. Without an extractor the images are only made and timed. Batch i draws from a
    generator seeded by (seed, i), and whole batches go to processes in turn: so the images, their order, and the
    numbers do not depend on the number of processes. (They do depend on `batch`.)
    """
    device, n = labels.device, len(labels)
    if extractor is not None:
        features, logits = (torch.zeros(n, width, device=device) for width in (extractor.dim, extractor.classes))
        moments = Moments(extractor.dim, reference.mu, device)
    facts = dict(seed=seed, batch=batch)
    for part, img in in_batches(make_images, labels, batch, seed, desc, facts):
        if extractor is not None:
            features[part], logits[part] = extract(extractor, img)
            moments.add(features[part])
    if extractor is None:
        return dict(n=n, **facts)
    all_reduce(features), all_reduce(logits)          # each row is zero but on the process that made it
    mu, sigma = moments.result()
    row = dict(n=n, fid=fid(mu, sigma, reference.mu, reference.sigma),
               fid_eigenvalues=fid_eigenvalues(mu, sigma, reference.mu, reference.sigma))
    row["is"], row["is_std"] = inception_score(logits)
    if reference.features is not None:
        row.update(prdc(reference.features, features, k), k=k)
    row.update(facts, extractor=f"{type(extractor).__name__} {fingerprint(extractor)}", reference=reference.name)
    return row


def scored(make_images, rows, score, width, batch, seed, desc):
    """(scores (n, width) float64, facts) of the images of `rows`, where score(slice, uint8 images) -> (b, width)."""
    scores = torch.zeros(len(rows), width, dtype=torch.float64, device=rows.device)
    facts = dict(seed=seed, batch=batch)
    for part, img in in_batches(make_images, rows, batch, seed, desc, facts):
        with torch.autocast(img.device.type, enabled=False):
            scores[part] = score(part, img).to(scores)
    return all_reduce(scores), facts                  # each row is zero but on the process that made it


def in_turn(conditions, n):
    """n rows of conditions, 0, 1, ..., then from the first again: every class, or prompt, equally often."""
    return conditions[torch.arange(n, device=conditions.device) % len(conditions)]


def read_prompts(path, flag="--prompts", numbered=False):
    """The prompts of a text file, one a line, empty lines left out; numbered: there must be none but at the end."""
    try:
        with open(teachers.local(path), encoding="utf-8") as f:
            lines = f.read().rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"{flag} {path}: cannot read ({err}); expected a text file, one prompt a line")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{flag} {path}: no prompt in it; expected a text file, one prompt a line")
    if numbered and len(prompts) < len(lines):
        raise UserError(f"{flag} {path}: a line amid it is empty; expected a caption on each, as image i has line i")
    return prompts


@torch.no_grad()
def evaluate_prompts(teacher, rewards, make_images, n, batch=250, seed=0, desc=None):
    """The shapes world's judge: GenEval's six tasks, scored exactly by its reader, and rewards, on n prompts.

    Chroma, max - min of a pixel's colours in [0, 1], tells over-saturation: what becomes of a reward without Di[M]O.

    The arguments are those of `evaluate`, and batches go to processes in the same way.
    """
    from data.shapes import benchmark, detect

    prompts, metadata = benchmark(n, seed)
    rows, names = teacher.conditions(prompts), list(rewards.models)

    def score(part, img):
        right = [verdict(meta, *detect(pixels))[0] for meta, pixels in zip(metadata[part], img.cpu().numpy())]
        scores = rewards(img.float() / 255, prompts[part])
        chroma = (img.amax(1) - img.amin(1)).float().mean((1, 2)) / 255                       # (b,)
        return torch.stack([torch.tensor(right).to(chroma), chroma, *(scores[name] for name in names)], 1)

    right, facts = scored(make_images, rows, score, 2 + len(names), batch, seed, desc)
    tasks = geneval_table((meta["tag"], r) for meta, r in zip(metadata, right[:, 0].tolist()))
    return {"n": n, "geneval": tasks.pop("overall"), **tasks, **dict(zip(("chroma", *names), right[:, 1:].mean(0).tolist())),
            **facts, "reader": "data/shapes.py"}


def load_judge(teacher, device="cpu"):
    """judge(make_images, n, batch=, seed=, desc=) -> a row of results for this teacher's world, or None.

    Fashion is judged by FID and its relatives, shapes by GenEval and CLIP; published teachers not yet.
    """
    spec = teacher.spec
    if spec.image == (1, 32, 32):
        extractor, reference = load_extractor(spec, device)
        conditions = teacher.conditions()
        return lambda make, n, batch=250, seed=0, desc=None: evaluate(make, in_turn(conditions, n), extractor, reference,
                                                                      batch, seed, desc=desc)
    if spec.rewards and all(os.path.exists(teachers.local(path)) for path, _ in spec.rewards.values()):
        rewards = load_judges(spec, spec.rewards, device=device)
        return functools.partial(evaluate_prompts, teacher, rewards)
    return None


def headline(row):
    """A row in a few words."""
    if "fid" in row:
        return f"FID {row['fid']:.2f}, precision {row['precision']:.3f}, recall {row['recall']:.3f}"
    return f"GenEval {row['geneval']:.3f}, CLIP {row['clip']:.2f}"


# ===================================================================================== tables and pictures
COLUMNS = {"steps": "d", "temperature": "g", "guidance": "g", "n": "d", "fid": ".2f", "is": ".2f",
           "geneval": ".3f", "single_object": ".2f", "two_object": ".2f", "counting": ".2f", "colors": ".2f",
           "position": ".2f", "color_attr": ".2f", "clip": ".2f", "chroma": ".3f", "clip_score": ".4f", "hps": ".2f", "anime": ".2f",
           "concept-art": ".2f", "paintings": ".2f", "photo": ".2f", "precision": ".3f", "recall": ".3f",
           "density": ".3f", "coverage": ".3f", "images/s": ".1f", "tokens_only/s": ".1f"}   # key of a row: its format


def table(rows):
    """Markdown: a line for each row of `evaluate` (plus model, steps, temperature, guidance), and notes below."""
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    cell = lambda row, key: format(row[key], COLUMNS[key]) if row.get(key) is not None else "-"
    lines = [["model", *(key.replace("_", " ") for key in columns)]]
    lines += [[row.get("model", "-"), *(cell(row, key) for key in columns)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    if small := sorted({row["n"] for row in rows if row["n"] < 10_000 and row.get("fid") is not None}):
        lines += ["", f"N = {', '.join(map(str, small))}: below 10,000, FID is biased upward; compare at equal N."]
    lines += [line for note in dict.fromkeys(row["note"] for row in rows if row.get("note")) for line in ("", note)]

    timed = lambda kind: [row for row in rows if row.get("kind") == kind and row.get("images/s")]
    if timed("teacher") and timed("student"):
        slow = max(timed("teacher"), key=lambda row: row["steps"])
        fast = max(timed("student"), key=lambda row: row["images/s"])
        image, tokens = (fast[key] / slow[key] for key in ("images/s", "tokens_only/s"))
        lines += ["", f"One step is {image:.1f} times faster an image than the teacher's {slow['steps']} steps; "
                      f"{tokens:.1f} times without the decoder, which both share."]
    return "\n".join(lines)


def sheet(rows, path, scale=None, columns=None, words=None):
    """A PNG of labelled rows: [(caption, uint8 images (n, C, H, W)), ...], wrapped after `columns` images.

    Pixels are enlarged `scale` times, never smoothed; by default small images become 96 px high, and ten fit a row.
    words: what the images of every row were asked for, written over each.
    """
    from PIL import ImageDraw, ImageFont

    H, W = rows[0][1].shape[2:]
    scale, gap, caption = scale or max(1, 96 // H), 2, 16
    over, font = 26 if words else 0, ImageFont.load_default(10)
    high, wide = scale * H + gap + over, scale * W + gap
    columns = min(columns or max(2, min(10, 2048 // wide)), max(len(img) for _, img in rows))
    heights = [caption + high * math.ceil(len(img) / columns) for _, img in rows]
    page = Image.new("RGB", (wide * columns + gap, sum(heights) + gap), "white")
    draw, top = ImageDraw.Draw(page), 0
    for (text, img), height in zip(rows, heights):
        draw.text((gap + 1, top + 1), text, "black", ImageFont.load_default(12))
        for i, pixels in enumerate(img.cpu().permute(0, 2, 3, 1).numpy()):                    # (H, W, C)
            tile = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
            tile = tile.resize((scale * W, scale * H), Image.Resampling.NEAREST)
            x, y = gap + i % columns * wide, top + caption + i // columns * high
            if words:
                lines = textwrap.wrap(words[i], max(8, scale * W // 6), max_lines=2, placeholder=" ...")
                draw.multiline_text((x + 1, y), "\n".join(lines), "black", font, spacing=1)
            page.paste(tile, (x, y + over))
        top += height
    with replacing(path) as f:
        page.save(f, format="PNG", optimize=True)


def spread(everything, n):
    """n of them, in even steps, from the first on; some twice where there are fewer."""
    return [everything[i * len(everything) // n] for i in range(n)]


def fixed_sample(make_images, conditions, n=10, seed=0):
    """n images, spread over the conditions, from starts that the seed fixes: what a sheet shows of each model."""
    generator = torch.Generator(conditions.device).manual_seed(seed)
    return make_images(torch.stack(spread(conditions, n)), generator=generator)


# ================================================================================== real images: the tiny world
def make_reference(args):
    """Train FashionNet, then write its weights (float16), the training set's statistics, and a record of both."""
    from data.fashion import load_images
    from safetensors.torch import save_file

    start = time.time()
    torch.manual_seed(args.seed)
    img, labels, test, test_labels = (torch.from_numpy(a) for s in ("train", "t10k") for a in load_images(s))
    net, batch = FashionNet().to(args.device), 128
    opt = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    bar = tqdm(range(args.epochs * (len(img) // batch)), "classifier", mininterval=2, dynamic_ncols=True)
    for n in bar:
        epoch, k = divmod(n, len(img) // batch)
        if k == 0:
            order = torch.randperm(len(img)).split(batch)
        decay = (1.01 + 0.99 * math.cos(math.pi * n / bar.total)) / 2
        opt.param_groups[0]["lr"] = 5e-3 * min(1, (n + 1) / 100) * decay
        z = net(img[order[k]].to(args.device).float() / 255)[1]
        loss = F.cross_entropy(z, labels[order[k]].to(args.device).long())
        opt.zero_grad()
        loss.backward()
        opt.step()
        if n % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")

    # The shipped weights are rounded, so the statistics are taken with the rounded ones.
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    net.eval().requires_grad_(False)
    features = torch.cat([extract(net, part.to(args.device))[0] for part in img.split(500)])
    moments = Moments(net.dim, features.double().mean(0), args.device)
    moments.add(features)
    mu, sigma = moments.result()
    some = features[:: len(img) // 5000].half().cpu().numpy()    # (5000, dim)
    os.makedirs(ASSETS, exist_ok=True)
    save_file({k: v.cpu().contiguous() for k, v in state.items()}, os.path.join(ASSETS, "classifier.safetensors"))
    np.savez_compressed(os.path.join(ASSETS, "reference.npz"), mu=mu, sigma=sigma.astype(np.float32), n=len(img),
                        features=some)
    record = dict(epochs=args.epochs, seed=args.seed, device=args.device, seconds=round(time.time() - start),
                  n=len(img), n_features=len(some), dim=net.dim,
                  parameters=sum(p.numel() for p in net.parameters()))

    # What the metric says of real images it was not made from: the floor of every number here.
    net, reference = load_extractor(SPECS["maskbit-tiny"], args.device)
    right = [extract(net, part.to(args.device))[1].argmax(1).cpu() for part in test.split(500)]
    record["test_accuracy"] = (torch.cat(right) == test_labels).double().mean().item()
    test = test.to(args.device)
    record["test_images"] = evaluate(lambda i, **_: test[i], torch.arange(len(test), device=args.device), net,
                                      reference)
    with open(os.path.join(ASSETS, "reference.json"), "w") as f:
        json.dump(record, f, indent=1)
    print(json.dumps(record, indent=1))


def reconstruction(teacher, device, n, batch):
    """Rows for real images, and for decode(encode(them)) with PSNR: the tokenizer bounds the student (App. D)."""
    from data.fashion import load_images

    net, reference = load_extractor(teacher.spec, device)
    if net is None:
        raise UserError(f"--reconstruction reads Fashion-MNIST, which {teacher.spec.name} does not know; for other "
                        f"images: python teachers.py --check {teacher.spec.name} --images FOLDER")
    for split in ("train", "t10k"):
        img = torch.from_numpy(load_images(split)[0])
        img = img[:: max(1, len(img) // n)][:n].to(device)
        error = torch.zeros((), dtype=torch.float64, device=device)

        def rebuild(i, **_):
            x = teacher.tokenizer.encode(img[i].float() / 255)
            back = (decode_tokens(teacher.tokenizer, x) * 255).to(torch.uint8)
            error.add_((back.double() - img[i]).square().sum())
            return back

        for model, make in ((f"real {split}", lambda i, **_: img[i]), (f"{split} reconstructed", rebuild)):
            row = evaluate(make, torch.arange(len(img), device=device), net, reference, batch, desc=model)
            if make is rebuild:
                row["psnr"] = 10 * math.log10(255**2 * img.numel() / all_reduce(error).item())
            yield dict(model=model, kind="real", tokenizer=fingerprint(teacher.tokenizer), **row)


# ============================================================================== GenEval: is it what was asked for?
# A detector says what it sees, and rules say whether that is what the prompt asked for: six tasks, 553 prompts,
# four images each (Ghosh et al. 2023; the rules are evaluation/evaluate_images.py of their repository). Published
# scores rest on one detector, mmdetection's Mask2Former with Swin-S, and one judge of colours, OpenAI's CLIP
# ViT-L-14; with others, numbers compare only with each other. So both are arguments here,
#     detector(image) -> {class: [((x1, y1, x2, y2), score), ...]}, in any order
#     colour_of(image, box, class) -> one of COLOURS; the box comes as the detector made it, and may carry a mask
# and `write_geneval` writes the folder that the official programs read.
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


def kept(found, tag):
    """The boxes of a class that count, surest first: scores strictly above 0.3 (0.9 in counting), 16 at most."""
    score = np.array([s for _, s in found], dtype=np.float32)
    low = np.float32(0.9 if tag == "counting" else 0.3)          # in float32 as well: a score of 0.3 is out
    order = np.argsort(score, kind="stable")[::-1]               # (numpy's default orders ties by CPU)
    return [found[i][0] for i in order if score[i] > low][:16]


def relations(box_a, box_b):
    """Where A is, seen from B: a set of RELATIONS, none, one or two of them (y points down).

    With o from B's centre to A's, per axis r = sign(o) max(|o| - 0.1 (size A + size B), 0): boxes about one centre
    have no relation. A is left of B where r_x < -|o| / 2, and so on; |o| is the length before shrinking.
    """
    a, b = (np.asarray(box, dtype=np.float32)[:4].reshape(2, 2) for box in (box_a, box_b))    # corners (x, y)
    o = a.mean(0) - b.mean(0)
    size = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])             # absolute: corners may come in any order
    r = np.maximum(np.abs(o) - np.float32(0.1) * size, 0) * np.sign(o)
    if (np.abs(r) < 1e-3).all():
        return set()
    x, y = r / np.linalg.norm(o)
    return {name for name, holds in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)) if holds}


def complaint(clause, boxes, groups, colour):
    """What is wrong with the boxes for an `include` clause, or None. groups: what fulfilled each earlier clause."""
    name, count = clause["class"], clause["count"]
    if len(boxes) < count:
        return f"expected {count} {name}, found {len(boxes)}"
    if "color" in clause:
        seen = [colour(box, name) for box in boxes]
        if any(c != clause["color"] for c in seen):
            return f"expected {count} {clause['color']} {name}, found {' and '.join(seen)}"
    if "position" in clause:
        where, target = clause["position"]
        if groups[target] is None:
            return f"expected {name} {where} something that is missing or wrong itself"
        for true in (relations(a, b) for a in boxes for b in groups[target]):
            if where not in true:
                return f"expected {name} {where} its target, found it {' and '.join(sorted(true)) or 'at no side'}"
    return None


def verdict(metadata, detections, colour):
    """(right?, why not) of one image: what the detector found, against a line of the benchmark.

    colour(box, class) -> name is asked where a clause speaks of one. Of each class only the surest boxes are
    judged, as many as were asked for: a blue bench beside a surer red one is no blue bench.
    """
    found = {name: kept(boxes, metadata["tag"]) for name, boxes in detections.items()}
    groups, wrong = [], []
    for clause in metadata.get("include", []):                   # all must hold
        boxes = found.get(clause["class"], [])[:clause["count"]]
        why = complaint(clause, boxes, groups, colour)
        groups.append(None if why else boxes)
        wrong += [why] if why else []
    for clause in metadata.get("exclude", []):                   # none may: "two apples" excludes three
        if (n := len(found.get(clause["class"], []))) >= clause["count"]:
            wrong.append(f"expected fewer than {clause['count']} {clause['class']}, found {n}")
    return not wrong, "; ".join(wrong)


def geneval(folder, detector, colour_of):
    """Rows (task, right?, why not), one an image, of a folder that `write_geneval` wrote."""
    for metadata, images in read_geneval(folder):
        for img in images:
            yield metadata["tag"], *verdict(metadata, detector(img), functools.partial(colour_of, img))


def geneval_table(rows):
    """{task: share of right images, "overall": mean of the six tasks, not of the images} from `geneval`'s rows.

    A task without images is left out, and then overall is None.
    """
    right = {tag: [] for tag in TASKS}
    for tag, correct, *_ in rows:
        right[tag].append(correct)
    table = {tag: sum(r) / len(r) for tag, r in right.items() if r}
    return {**table, "overall": sum(table.values()) / len(TASKS) if len(table) == len(TASKS) else None}


def parse_metadata(text, where):
    """A line of evaluation_metadata.jsonl as a dict, or a sentence on what the rules above would not understand."""
    def expect(holds, words):
        if not holds:
            raise ValueError(f"expected {words}")
    try:
        line = json.loads(text)
        expect({"tag", "prompt", "include"} <= set(line), "tag, prompt and include")
        expect(line["tag"] in TASKS, f"a tag out of {', '.join(TASKS)}, got {line['tag']!r}")
        for i, clause in enumerate([*line["include"], *line.get("exclude", [])]):
            expect({"class", "count"} <= set(clause), "class and count in every entry")
            expect(clause["count"] in range(1, 17), f"a count from 1 to 16, got {clause['count']!r}")
            expect(clause.get("color", "red") in COLOURS, f"a color out of {', '.join(COLOURS)}")
            where_to, target = clause.get("position", ("above", None))
            expect(where_to in RELATIONS and target in (None, *range(i)), "a position [relation, earlier entry]")
    except (ValueError, TypeError) as err:
        raise UserError(f"{where} is no prompt of GenEval: {err}")
    return line


def read_metadata(path):
    """GenEval's prompts, from its evaluation_metadata.jsonl. The place of a line, from 0, is its folder's name."""
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.readlines() or [""]
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"cannot read {path} ({err}): expected GenEval's evaluation_metadata.jsonl")
    return [parse_metadata(text, f"{path}, line {i}") for i, text in enumerate(lines, 1)]


def save_images(folder, images, kind, **options):
    """uint8 images (3, H, W) as <folder>/00000.<kind>, ... in a new folder: old ones in it would be judged, too."""
    try:
        os.makedirs(folder)
    except OSError as err:
        raise UserError(f"cannot make the folder {folder} ({err.strerror}): images go to a new one, lest they mix")
    for n, img in enumerate(images):
        pixels = img.permute(1, 2, 0).cpu().numpy()                                           # (H, W, 3)
        Image.fromarray(pixels).save(os.path.join(folder, f"{n:05d}.{kind}"), **options)


def write_geneval(folder, metadata_list, images_per_prompt):
    """<folder>/<00000>/metadata.jsonl and samples/<00000>.png. For each prompt uint8 images (n, 3, H, W).

    images_per_prompt may be a generator: 2,212 images need not fit into memory.
    """
    for i, (metadata, images) in enumerate(zip(metadata_list, images_per_prompt, strict=True)):
        save_images(os.path.join(folder, f"{i:05d}", "samples"), images, "png")
        with open(os.path.join(folder, f"{i:05d}", "metadata.jsonl"), "w") as f:
            json.dump(metadata, f)


def read_geneval(folder):
    """(metadata, [RGB pictures]) of such a folder, prompt by prompt."""
    path = folder
    try:
        for prompt in sorted(filter(str.isdigit, os.listdir(folder))):
            path = os.path.join(folder, prompt, "metadata.jsonl")
            with open(path, encoding="utf-8") as f:
                metadata = parse_metadata(f.read(), path)
            images, samples = [], os.path.join(folder, prompt, "samples")
            for name in sorted(n for n in os.listdir(samples) if re.fullmatch(r"\d+\.png", n)):
                path = os.path.join(samples, name)
                images.append(Image.open(path).convert("RGB"))
            yield metadata, images
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"cannot read {path} ({err}): expected <index>/metadata.jsonl, <index>/samples/<n>.png")


# ========================================================================= GenEval: a detector, a judge of colours
CLASSES = tuple("""person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,
parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,
frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,
cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,
bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(","))   # COCO's order
MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
RANDOM = "random weights: the numbers of this benchmark say nothing"
TINY_CLIP = dict(embed_dim=16, vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=16),
                 text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=1, layers=1))       # to try the code


class Box(tuple):
    """(x1, y1, x2, y2) in pixels; `mask`, a bool tensor (H, W), or None, is what of it belongs to the object."""

    mask = None


def instances(z_class, z_mask, padded, resized, size, best=100):
    """Logits of a Mask2Former's queries, (Q, 81) and (Q, h, w) -> {class: [(Box, score), ...]} (mmdetection 2.x).

    padded, resized, size: (H, W) of the network's input, of the image in its upper left corner, and of the image.
    A score is the class's probability times the mean probability of the mask's pixels. One query may be in several
    of the `best` pairs (query, class).
    """
    p, pair = z_class.softmax(-1)[:, :-1].flatten().topk(min(best, z_class[:, :-1].numel()))  # the last is "nothing"
    query, label = pair // (z_class.shape[1] - 1), pair % (z_class.shape[1] - 1)
    z = F.interpolate(z_mask[None], padded, mode="bilinear")[..., : resized[0], : resized[1]]
    z = F.interpolate(z, size, mode="bilinear")[0]                                            # (Q, H, W)
    mask = z > 0
    sure = (z.sigmoid() * mask).sum((1, 2)) / (mask.sum((1, 2)) + 1e-6)
    down, across = (mask.any(axis).cpu().numpy() for axis in (2, 1))                          # (Q, H), (Q, W)
    found = {}
    for s, q, c in zip((p * sure[query]).tolist(), query.tolist(), label.tolist()):
        y, x = (np.flatnonzero(line[q]).tolist() or [0, -1] for line in (down, across))       # an empty mask: 0, 0, 0, 0
        box = Box((x[0], y[0], x[-1] + 1, y[-1] + 1))
        box.mask = mask[q]
        found.setdefault(CLASSES[c], []).append((box, s))
    return found


def mask2former(net, device="cpu"):
    """A detector from transformers' Mask2Former: PIL picture -> {class: [(Box, score), ...]}."""
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]], device=device).view(2, 3, 1, 1)

    @torch.no_grad()
    def detector(image):
        W, H = image.size
        scale = min(800 / min(W, H), 1333 / max(W, H))
        h, w = int(H * scale + 0.5), int(W * scale + 0.5)
        img = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None].float()     # (1, 3, H, W), 0 to 255
        img = F.interpolate(img, (h, w), mode="bilinear").round()                             # OpenCV's: no antialias
        img = F.pad((img - mean) / std, (0, -w % 32, 0, -h % 32))
        out = net(pixel_values=img)
        return instances(out.class_queries_logits[0], out.masks_queries_logits[0], img.shape[2:], (h, w), (H, W))
    return detector


def load_mask2former(path=None, random_weights=False, device="cpu"):
    """transformers' Mask2Former with the 80 classes of COCO, from a folder or the hub; or a tiny random one."""
    try:
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    except ImportError:
        raise UserError("--detector mask2former is transformers' Mask2Former: pip install transformers")
    if random_weights and not path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stages = ["stage1", "stage2", "stage3", "stage4"]
            swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_features=stages)
            return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
                backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2,
                dim_feedforward=32, encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_queries=10,
                num_labels=80)).to(device).eval()
    hint = "expected a folder with config.json and model.safetensors, of COCO instances"
    if path and not os.path.isdir(path):
        raise UserError(f"--detector_weights {path}: no such folder; {hint}")
    try:
        net, said = Mask2FormerForUniversalSegmentation.from_pretrained(path or MASK2FORMER, output_loading_info=True)
    except Exception as err:                          # no network, another architecture, a file cut short
        raise UserError(f"cannot load the detector {path or MASK2FORMER} ({type(err).__name__}: "
                        f"{(str(err).splitlines() or [''])[0][:200]}); {hint}, named by --detector_weights PATH")
    missing = {*said["missing_keys"], *(k for k, *_ in said["mismatched_keys"])} & {k for k, _ in net.named_parameters()}
    if missing or net.config.num_labels != len(CLASSES):
        what = f"lacks {', '.join(sorted(missing)[:3])}" if missing else f"has {net.config.num_labels} classes, not 80"
        raise UserError(f"the detector {path or MASK2FORMER} {what}; {hint}")
    return net.to(device).eval()


def colour_vectors(model, name, device="cpu"):
    """A vector for each of COLOURS, (10, embed): of what TEMPLATES say of a thing called `name`, the mean direction."""
    ids = model.tokenize([words.format(colour, name) for colour in COLOURS for words in TEMPLATES])
    g = model.text_features(ids.to(device)).unflatten(0, (-1, len(TEMPLATES)))                # (10, 3, embed), length 1
    return F.normalize(g.mean(1), dim=-1)


def colour_judge(model, device="cpu"):
    """colour_of(PIL picture, box, class) -> the one of COLOURS whose text a CLIP finds nearest to the object.

    The picture is painted grey outside the object's mask, then cut to its box.
    """
    vectors = functools.cache(lambda name: colour_vectors(model, name, device))

    def colour_of(image, box, name):
        if (mask := getattr(box, "mask", None)) is not None:
            grey = Image.new("RGB", image.size, "#999")
            image = Image.composite(image, grey, Image.fromarray(mask.cpu().numpy()))
        pixels = preprocess_pil(image.crop(box), model.size)[None].to(device)
        return COLOURS[int((vectors(name) @ model.image_features(pixels)[0]).argmax())]
    return colour_of


def load_clip(args, name, config, device):
    """(a frozen CLIP that measures, what rows say of it); tiny and random if --random_weights has no file for it."""
    path = getattr(args, f"{name}_weights")
    tiny = args.random_weights and not path
    model = load_model(name, functools.partial(ClipReward, TINY_CLIP if tiny else config, name), path, tiny)
    model = model.to(device).eval().requires_grad_(False)
    return model, {f"{name}_weights": "random" if tiny else fingerprint(model), **(dict(note=RANDOM) if tiny else {})}


def load_detector(args, device):
    """(detector, colour_of, the classes they know, what rows say of them) for --detector."""
    words = "{} detects: not comparable with published GenEval, whose detector is another"
    if args.detector == "shapes":
        from data.shapes import SHAPES, detect

        see = lambda image: detect(np.array(image).transpose(2, 0, 1))
        return (lambda image: see(image)[0], lambda image, box, name: see(image)[1](box, name), SHAPES,
                dict(detector="data/shapes.py", note=words.format("data/shapes.py")))
    net = load_mask2former(args.detector_weights, args.random_weights, device)
    model, said = load_clip(args, "clip_l", CLIP_L, device)
    random = args.random_weights and not (args.detector_weights and args.clip_l_weights)
    said.update(detector=f"{'random' if random else 'transformers'} mask2former {fingerprint(net)}",
                note=RANDOM if random else words.format("transformers' Mask2Former"))
    return mask2former(net, device), colour_judge(model, device), CLASSES, said


# =========================================================================================== COCO-30k and HPS v2
# COCO-30k: a fixed list of 30,000 captions (DMD2's captions_coco14_test.txt), an image each. FID compares with *all*
# 40,504 images of val2014, and both sides go through `coco_crop` to 256 px, then `clean_resize` to Inception's 299.
# MJHQ-30k: its 30,000 prompts against its 30,000 images, `clean_resize` alone; the paper states no crop.
# --benchmark clip --save_images writes the generated side of either.
def clean_resize(img, size=299):
    """clean-fid's mode "clean": a picture, or uint8 (H, W, 3) -> float32 (size, size, 3) in [0, 255], not rounded."""
    channels = np.moveaxis(np.asarray(img, dtype=np.float32), 2, 0)
    resized = [Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC) for c in channels]   # each of mode F
    return np.stack(resized, 2).clip(0, 255)


def coco_crop(img, size=256):
    """A picture as COCO's FID and CLIP score see it, real or generated: uint8 (size, size, 3) (GigaGAN, DMD2)."""
    (W, H), side = img.size, min(img.size)
    left, top = round((W - side) / 2), round((H - side) / 2)     # halves to the even neighbour, as in torchvision
    img = img.convert("RGB").crop((left, top, left + side, top + side))
    return np.array(img.resize((size, size), Image.Resampling.LANCZOS))


def clip_score_tokens(captions):
    """Token ids (n, 77) of "A photo depicts" and the caption, for CLIP score (DMD2's coco_evaluator.py).

    The caption alone is cut to 77, then the words are slid in behind its start, and what now stands last is an end.
    (Unless that is a "!" amid punctuation: its id, 0, passes for padding. Kept: published scores have it so.)
    """
    ids = teachers.byte_pairs()(list(captions), 77)              # start, byte pairs, end, then zeros
    words = torch.tensor([320, 1125, 29340]).expand(len(ids), 3)
    ids = torch.cat([ids[:, :1], words, ids[:, 1:]], dim=1)[:, :77]
    ids[:, 76].masked_fill_(ids[:, 76] > 0, 49407)
    return ids


HPS_STYLES = ("anime", "concept-art", "paintings", "photo")      # 800 prompts each
JPEG = dict(quality=75)


def write_hps(root, style, images):
    """<root>/<style>/<00000>.jpg, where hpsv2.evaluate looks: uint8 images (3, H, W), in the order of the prompts.

    JPEG of quality 75 is PIL's default, and so what published scores were taken from.
    """
    if style not in HPS_STYLES:
        raise ValueError(f"unknown style {style!r}: expected one of {', '.join(HPS_STYLES)}")
    save_images(os.path.join(root, style), images, "jpg", **JPEG)


def hps_benchmark(scores_by_style):
    """{style: (mean, deviation), "averaged": mean of all} of 100 cos, 800 a style, rounded as hpsv2 prints them.

    The deviation is that of ten means, of 80 consecutive prompts each (population), not of images. Without all four
    styles "averaged" is None. HPS v2.0 and v2.1 are different networks: say which one it was.
    """
    table, every = {}, []
    for style, scores in scores_by_style.items():
        if len(scores) != 800:
            raise UserError(f"HPS v2, {style}: expected 800 scores, one a prompt, got {len(scores)}")
        every.append(torch.as_tensor(scores, dtype=torch.float64).reshape(10, 80).mean(1))
        table[style] = round(every[-1].mean().item(), 2), round(every[-1].std(correction=0).item(), 4)
    whole = set(table) == set(HPS_STYLES)
    return {**table, "averaged": round(torch.cat(every).mean().item(), 2) if whole else None}


def read_hps(folder):
    """{style: its 800 prompts}, from the folder `benchmark` of the data set HPDv2."""
    prompts, wanted = {}, f"expected HPDv2's folder `benchmark`, with {', '.join(f'{s}.json' for s in HPS_STYLES)}"
    for path in (os.path.join(folder, f"{style}.json") for style in HPS_STYLES):
        try:
            with open(path, encoding="utf-8") as f:
                lines = json.load(f)
        except (OSError, ValueError) as err:
            raise UserError(f"cannot read {path} ({err}): {wanted}")
        if not (isinstance(lines, list) and len(lines) == 800 and all(isinstance(line, str) for line in lines)):
            got = f"{len(lines)} entries" if isinstance(lines, list) else type(lines).__name__
            raise UserError(f"{path}: expected a list of 800 strings, got {got}; {wanted}")
        prompts[os.path.basename(path)[:-5]] = lines
    return prompts


# ======================================================================================= text to image: benchmarks
class Benchmark(NamedTuple):
    """What to draw, where it is written, how it is judged."""

    prompts: list                 # one an image
    lay: Callable                 # lay(folder): the folders below it, still without images
    score: Callable               # score(folder, slice, [PIL pictures]) -> (b,): writes these images, and judges them
    row: Callable                 # row(scores (n,) of all images) -> what a row of results says


def run_benchmark(bench, teacher, make_images, folder, batch=250, seed=0, desc=None):
    """Draw an image a prompt, write them below `folder`, judge them: a row. Sharded and seeded as in `evaluate`."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        bench.lay(folder)
    if dist.is_initialized():
        dist.barrier()                                # the others write into what the first has laid out
    rows = teacher.conditions(bench.prompts)

    def score(part, img):
        pictures = [Image.fromarray(p) for p in img.permute(0, 2, 3, 1).cpu().numpy()]
        return torch.as_tensor(bench.score(folder, part, pictures))[:, None]

    scores, facts = scored(make_images, rows, score, 1, batch, seed, desc)
    written = {"folder": folder} if os.path.isdir(folder) else {}
    return {"n": len(rows), **bench.row(scores[:, 0].cpu()), **facts, **written}


def expect_classes(metadata, classes, detector):
    """Complain of prompts about what the detector cannot find: they would count as wrong."""
    for line in metadata:
        if unknown := {c["class"] for c in [*line["include"], *line.get("exclude", [])]} - set(classes):
            raise UserError(f"--detector {detector} does not know the class {min(unknown)!r} of {line['prompt']!r}; it "
                            f"knows {', '.join(classes)}")


def geneval_benchmark(args, device):
    """Four images a prompt in GenEval's layout, for its own programs; with --detector scored here, too."""
    metadata, per, detector, said = read_metadata(args.metadata), args.per_prompt, None, {}
    if args.detector:
        detector, colour_of, classes, said = load_detector(args, device)
        expect_classes(metadata, classes, args.detector)
    metadata = [line for line in metadata for _ in range(per)]                                # one an image

    def score(folder, part, pictures):
        right = []
        for i, img in zip(range(len(metadata))[part], pictures):
            img.save(os.path.join(folder, f"{i // per:05d}", "samples", f"{i % per:05d}.png"))
            right.append(detector and verdict(metadata[i], detector(img), functools.partial(colour_of, img))[0])
        return [float(bool(r)) for r in right]

    def row(scores):
        tasks = geneval_table((line["tag"], r) for line, r in zip(metadata, scores.tolist())) if detector else {}
        return {"per_prompt": per, "geneval": tasks.pop("overall", None), **tasks, **said}

    lay = lambda folder: write_geneval(folder, metadata[::per], itertools.repeat((), len(metadata) // per))
    return Benchmark([line["prompt"] for line in metadata], lay, score, row)


def geneval_folder(args, device):
    """The row of a folder that `write_geneval`, or any other program, wrote."""
    detector, colour_of, classes, said = load_detector(args, device)
    lines = [line for line, images in read_geneval(args.geneval_folder) for _ in images]      # is all of it readable?
    expect_classes(lines, classes, args.detector)
    if not lines:
        raise UserError(f"--geneval_folder {args.geneval_folder}: no images; expected <index>/samples/<n>.png in it")
    rows = tqdm(geneval(args.geneval_folder, detector, colour_of), "GenEval", len(lines), unit="image", leave=False)
    tasks = geneval_table(rows)
    return {"model": args.geneval_folder, "kind": "folder", "n": len(lines), "geneval": tasks.pop("overall"), **tasks,
            **said}


def hps_v2_benchmark(args, device):
    """HPS v2's 3,200 prompts, scored by the v2.1 weights from the JPEGs as written.

    # choice: in float32; hpsv2 itself computes in float16 on a GPU.
    """
    prompts = read_hps(args.metadata)
    model, said = load_clip(args, "hps", CLIP_H, device)
    places, prompts = [(s, i) for s in HPS_STYLES for i in range(800)], [p for s in HPS_STYLES for p in prompts[s]]

    def score(folder, part, pictures):
        read = []
        for (style, i), img in zip(places[part], pictures):
            path = os.path.join(folder, style, f"{i:05d}.jpg")
            img.save(path, **JPEG)
            read.append(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1))        # what JPEG left of it
        pixels = preprocess_longest(torch.stack(read).to(device).float() / 255, model.size)
        return 100 * model(pixels, model.tokenize(prompts[part]).to(device))                  # 100 cos

    def row(scores):
        table = hps_benchmark(dict(zip(HPS_STYLES, scores.split(800))))
        average, words = table.pop("averaged"), [f"{s} {mean:.2f} ({std:.4f})" for s, (mean, std) in table.items()]
        note = f"HPS v2.1, not comparable with v2.0: {', '.join(words)}, averaged {average:.2f}"
        return {"hps": average, **{s: mean for s, (mean, _) in table.items()}, "hps_version": "v2.1",
                "hps_std": {s: std for s, (_, std) in table.items()}, **said,
                "note": f"{note}; {said['note']}" if "note" in said else note}

    lay = lambda folder: [write_hps(folder, style, ()) for style in HPS_STYLES]
    return Benchmark(prompts, lay, score, row)


def clip_benchmark(args, device):
    """CLIP score: the mean cosine, not times 100, of ViT-g-14's features of an image and of its caption."""
    captions = read_prompts(args.metadata, "--metadata", numbered=True)
    model, said = load_clip(args, "clip_g", CLIP_G, device)

    def score(folder, part, pictures):
        crops = [Image.fromarray(coco_crop(img)) for img in pictures]
        for i, img in zip(range(len(captions))[part], {"cropped": crops, "whole": pictures}.get(args.save_images, ())):
            img.save(os.path.join(folder, f"{i:05d}.png"))
        f = model.image_features(torch.stack([preprocess_pil(img, model.size) for img in crops]).to(device))
        return (f * model.text_features(clip_score_tokens(captions[part]).to(device))).sum(-1)

    lay = lambda folder: args.save_images and save_images(folder, (), "png")
    return Benchmark(captions, lay, score, lambda scores: {"clip_score": scores.mean().item(), **said})


BENCHMARKS = {"geneval": (geneval_benchmark, "GenEval's evaluation_metadata.jsonl"),
              "hps": (hps_v2_benchmark, "HPDv2's folder `benchmark`"), "clip": (clip_benchmark, "a caption a line")}


def expect_text(spec, args):
    if spec.text is None:
        texts = ", ".join(name for name, other in SPECS.items() if other.text)
        raise UserError(f"--benchmark {args.benchmark} draws prompts, and {spec.name} draws classes: take --teacher "
                        f"{texts}, or a student of one of them")


def load_benchmark(args, device):
    """The Benchmark that the flags ask for, or None; everything that it reads is read and checked here."""
    uses = dict(metadata="geneval hps clip", detector="geneval", detector_weights="geneval", clip_l_weights="geneval",
                hps_weights="hps", save_images="clip", clip_g_weights="clip")
    for flag, names in uses.items():
        if getattr(args, flag) and (args.benchmark or args.geneval_folder and "geneval") not in names.split():
            raise UserError(f"--{flag} {getattr(args, flag)} belongs to --benchmark {' or '.join(names.split())}")
    if args.geneval_folder and not args.detector:
        raise UserError(f"--geneval_folder {args.geneval_folder} is scored here: add --detector mask2former, or shapes")
    if args.benchmark is None:
        return None
    load, wanted = BENCHMARKS[args.benchmark]
    if not args.metadata:
        raise UserError(f"--benchmark {args.benchmark} needs --metadata PATH: {wanted}")
    if (name := args.teacher or (None if args.ckpt else "maskbit-tiny")) in SPECS:
        expect_text(SPECS[name], args)                # before anything large is read
    return load(args, device)


# ============================================================================================ command line
def number(low, high=math.inf, kind=float):
    """An argparse type: a number in [low, high]."""
    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, got {text}")
        return value
    parse.__name__ = kind.__name__
    return parse


def flags():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument_group("what to evaluate").add_argument
    add("--ckpt", nargs="+", default=[], metavar="PATH", help="students: checkpoints of train.py, or bare weights")
    add("--teacher", metavar="NAME", help=f"one of {', '.join(SPECS)}; bare weights are a student of it, too")
    add("--steps", nargs="+", metavar="N", type=number(1, 4096, int),
        help="evaluate the teacher at these numbers of steps (default: its published one without --ckpt, none with it)")
    add("--reconstruction", action="store_true", help="evaluate the tokenizer, on the raw real images")
    add("--teacher_weights", metavar="PATH", help="local file instead of the published one")
    add("--tokenizer_weights", metavar="PATH", help="local file instead of the published one")
    add("--text_weights", metavar="PATH", help="local file of the text encoder instead of the published one")
    add("--text_activation", choices=["gelu", "quick_gelu"], help="of the text encoder (MaskGen's is not certain)")
    add("--random_weights", action="store_true", help="a teacher without files, to try memory and speed")
    add("--prompts", metavar="FILE", help="what to draw with a text teacher, one prompt a line, taken in turn "
        "(default: assets/prompts.txt, or a tiny world's own)")

    add = ap.add_argument_group("how to sample (default: what the checkpoint says; the teacher's own)").add_argument
    add("--temperature", nargs="+", type=number(0), metavar="T", help="of a student's softmax, a row each")
    add("--init_ratio", type=number(0, 1), help="share of masked units in a student's start")
    add("--noise", type=number(0, 1), help="embedding perturbation of a student's start")
    add("--guidance", type=number(-100, 1000), help="the teacher's scale, as its authors count it (teachers.py, *_plan)")
    add("--teacher_temperature", type=number(0), help="noise on the confidence that orders the teacher's tokens")
    add("--order", choices=["confidence", "halton"], default="confidence",
        help="which of the teacher's tokens are kept first: its surest, or places by a Halton sequence")

    add = ap.add_argument_group("benchmarks of text to image").add_argument
    add("--benchmark", choices=list(BENCHMARKS), help="draw one, write its images below OUT, score them")
    add("--metadata", metavar="PATH", help="its prompts: " + "; ".join(f"{b}: {w}" for b, (_, w) in BENCHMARKS.items()))
    add("--per_prompt", type=number(1, 1000, int), default=4, help="geneval: images a prompt (%(default)s)")
    add("--detector", choices=["mask2former", "shapes"], help="geneval: score it here, too (published: mmdetection's)")
    add("--geneval_folder", metavar="DIR", help="score this folder of GenEval's layout by --detector, draw nothing")
    add("--save_images", nargs="?", const="cropped", choices=["cropped", "whole"],
        help="clip: keep PNGs for a FID, as CLIP score sees them at 256 px (COCO-30k), or whole (MJHQ-30k)")
    for name in ("detector", "clip_l", "hps", "clip_g"):
        add(f"--{name}_weights", metavar="PATH", help="local " + ("folder" if name == "detector" else "file")
            + " instead of the published one")

    add = ap.add_argument_group("how to measure").add_argument
    add("--n", type=number(1, 10**7, int), default=5000, help="images a row (%(default)s; benchmarks have their own)")
    add("--batch", type=number(1, 10**5, int), help="images a batch of one process (250, fewer where images are large)")
    add("--seed", type=number(0, 2**32, int), default=0, help="of everything random (%(default)s)")
    add("--out", default="out/evaluate", help="folder of results.jsonl (appended) and sheet.png (%(default)s)")

    add = ap.add_argument_group("system").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (%(default)s)")
    add("--bf16", action="store_true", help="networks in bfloat16; decoder and features stay in float32")

    add = ap.add_argument_group("the tiny world's metric").add_argument
    add("--make_reference", action="store_true", help="train FashionNet; write it and its statistics to assets/")
    add("--epochs", type=number(1, 1000, int), default=6, help="of that training (%(default)s)")
    return ap


FILES = ("teacher_weights", "tokenizer_weights", "text_weights", "text_activation", "random_weights")


def models(args, device):
    """One at a time: (teacher, make_images, what a row says of them)."""
    hashes = lambda t: dict(teacher=t.spec.name, teacher_weights=fingerprint(t.net), tokenizer=fingerprint(t.tokenizer),
                            **({} if t.text is None else dict(text=fingerprint(t.text))))
    name, files = args.teacher, {k: getattr(args, k) for k in FILES}
    for path in args.ckpt:
        teacher, net, config = load_student(path, args.teacher, device, **files)
        name, config = name or teacher.spec.name, {**teacher.spec.student, **config}
        files = {k: v or config.get(k) for k, v in files.items()}
        start = {k: config[k] if getattr(args, k) is None else getattr(args, k) for k in ("init_ratio", "noise")}
        for T in args.temperature or [config["temperature"]]:
            yield (teacher, functools.partial(generate_student, teacher, net, temperature=T, **start), dict(
                model=f"student {path}", kind="student", weights=fingerprint(net), steps=1, temperature=T, **start,
                **hashes(teacher)))
    if not args.steps and (args.ckpt or args.reconstruction):
        return
    teacher = load_teacher(name or "maskbit-tiny", device=device, **files)
    for N in args.steps or ([1, 2, 4, 8, 16] if teacher.spec.record else [next(iter(teacher.spec.sampling))]):
        given = dict(guidance=args.guidance, temperature=args.teacher_temperature)
        yield (teacher, functools.partial(generate_teacher, teacher, steps=N, order=args.order, **given), dict(
            model="teacher", kind="teacher", steps=N, order=args.order, **teacher.spec.settings(N, **given),
            **hashes(teacher)))


def main(args):
    # ------------------------------------------------------------------------------- processes and device
    if args.device not in ("cuda", "cpu"):
        raise UserError(f"--device {args.device}: expected cuda or cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; take --device cpu")
    if args.make_reference:
        return make_reference(args)
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    first = not dist.is_initialized() or dist.get_rank() == 0
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as err:
        raise UserError(f"--out {args.out}: cannot write there ({err.strerror})")

    system = dict(dtype="bf16" if args.bf16 else "fp32",
                  device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", torch=torch.__version__)
    bench = load_benchmark(args, device)

    # ---------------------------------------------------------------------------------------- a row each
    rows, pictures = [], []

    def record(row):                                  # at once: hours of one model survive the next one's crash
        rows.append(row)
        if first:
            with open(os.path.join(args.out, "results.jsonl"), "a") as f:
                f.write(json.dumps({**row, **system, "time": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")

    if args.geneval_folder:
        record(geneval_folder(args, device))
    if args.reconstruction:
        teacher = load_teacher(args.teacher or "maskbit-tiny", device=device, **{k: getattr(args, k) for k in FILES})
        for row in reconstruction(teacher, device, args.n, args.batch or 250):
            record(row)
    for teacher, make_images, facts in () if args.geneval_folder else models(args, device):
        if bench:
            expect_text(teacher.spec, args)
        judge = None if bench else load_judge(teacher, device)
        if judge and args.n < 10:
            raise UserError(f"--n {args.n}: statistics need 10 images at least")
        if judge is None and bench is None and first:
            print(f"{teacher.spec.name}: images are drawn and timed; Inception features, and so FID, are not part of "
                  "this version yet")
        prompts = (bench.prompts if bench else
                   read_prompts(args.prompts or teacher.spec.prompts) if teacher.text else None)
        conditions = teacher.conditions(prompts)
        batch = args.batch or min(250, max(1, 2**14 // teacher.net.L))
        shown = [f"{k} {facts[k]:g}" for k in ("steps", "temperature", "guidance") if k in facts]
        caption = ", ".join([facts["model"], *shown])
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            if bench:
                name = re.sub(r"[^\w.]+", "-", " ".join([teacher.spec.name, caption]))
                row = run_benchmark(bench, teacher, make_images, os.path.join(args.out, args.benchmark, name), batch,
                                    args.seed, caption)
            elif judge:
                row = judge(make_images, args.n, batch=batch, seed=args.seed, desc=caption)
            else:
                row = evaluate(make_images, in_turn(conditions, args.n), None, None, batch, args.seed, desc=caption)
            shown = min(args.n, 10 if teacher.spec.image[1] < 100 else 4)
            shown = fixed_sample(make_images, conditions, shown, args.seed)
            pictures.append((caption, shown))
        record({**facts, **row, "labels": args.metadata if bench else "the shapes benchmark" if "geneval" in row else
                     f"{args.prompts or teacher.spec.prompts} in turn" if teacher.text else "each class in turn",
                     "pixels": "uint8, rounded" if teacher.spec.rounds else "uint8, truncated"})
    if first:
        if pictures:
            words = spread(prompts, len(pictures[0][1])) if prompts else None
            sheet(pictures, os.path.join(args.out, "sheet.png"), words=words)
        print(table(rows))
        for row in rows:
            if "psnr" in row:
                print(f"{row['model']}: PSNR {row['psnr']:.2f} dB")


if __name__ == "__main__":
    ap = flags()
    try:
        main(ap.parse_args())
    except UserError as err:
        ap.exit(2, f"evaluate.py: {err}\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
