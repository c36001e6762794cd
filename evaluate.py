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

Published FIDs rest on the Inception network of 2015 (`Inception`) and on statistics of real images: `--reference`, an
.npz with mu and sigma (`adm` fetches ADM's of ImageNet), or `--real`, a folder. Either switches Inception on.

The tiny world has its own feature network, a small classifier (`data.fashion.FashionNet`). Its features are means
and standard deviations of the maps of *all* layers: the last layer alone hardly sees texture, and texture is what
betrays tokens that were drawn independently. Its FIDs compare only with each other. Where real images stand, the
floor, says assets/fashion/classifier.json.

    python evaluate.py --ckpt out/run/ckpt.pt --steps 1 16       # a student, and its teacher beside it
    python evaluate.py --ckpt out/run/ckpt.pt --temperature 0 0.5 1          # a sweep; 0 is argmax (Tab. 14)
    python evaluate.py --steps 1 2 4 8 16                        # the teacher alone
    python evaluate.py --teacher maskgit --steps 8 --order halton             # a published one; Tab. 2's baseline
    torchrun --nproc_per_node=4 evaluate.py --ckpt ... --metrics fid is prdc # ImageNet: 50,000 images, ADM's reference
    python evaluate.py --ckpt A B --steps 8 16 --temperature 0 0.5 1         # one table: OUT/table.md, table.json
    python evaluate.py --real val2014 --crop --resize clean --save_reference coco.npz        # once, for COCO-30k
    python evaluate.py --fake FOLDER --reference coco.npz --crop --resize clean              # pictures that are there
    python evaluate.py --ckpt ... --metrics clip hps geneval --metadata captions.txt HPDv2/benchmark metadata.jsonl
    python evaluate.py --teacher meissonic-tiny --steps 1 16     # GenEval on the world of shapes, and a CLIP's score
    python evaluate.py --ckpt ... --benchmark geneval --metadata evaluation_metadata.jsonl --detector mask2former
    python evaluate.py --ckpt ... --benchmark hps --metadata HPDv2/benchmark                 # and clip, captions.txt
    python evaluate.py --ckpt out/run/ckpt.pt --export student.pt2           # one file that runs without this code
    python evaluate.py --reconstruction                          # the tokenizer: what limits every student
    python evaluate.py --reconstruction --teacher maskgit --real imagenet/val                # rFID and PSNR of another
"""

import argparse
import functools
import hashlib
import json
import lzma
import math
import os
import re
import textwrap
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from tqdm import tqdm

import teachers
from data.benchmarks import (BENCHMARKS, RANDOM, expect_text, geneval_folder, geneval_table, load_benchmarks, picture,
                             save_images, verdict)
from data.fashion import FashionNet, load_images
from data.inception import INCEPTION, RESIZES, Inception, download, load_inception
from data.prompts import read_prompts
from data.weights import ROOT, UserError, fingerprint, load_state, read_weights, replacing
from dimo import initial_tokens, student_logits
from reward import load_judges
from soft_embed import embed_tokens, sample_tokens
from teachers import SPECS, check_device, decode_tokens, load_student, load_teacher
from tteo import now

ASSETS = os.path.join(ROOT, "assets", "fashion")


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

    Three conventions are about (IS_CONVENTIONS), and differ by sampling noise at 50,000 images: torch-fidelity's, the
    default and the paper's, ten splits after a fixed permutation; StyleGAN's, ten splits in order (shuffle=False);
    ADM's, chunks of 5,000 in order (split_size=5000, shuffle=False).
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


IS_CONVENTIONS = {"is": {}, "is_stylegan": dict(shuffle=False), "is_adm": dict(shuffle=False, split_size=5000)}


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
# An extractor maps images (B, C, H, W) in [0, 1] to (features (B, dim), logits (B, classes)): the tiny world's is
# FashionNet, that of published numbers Inception, with the resize inside it.
REFERENCES = {"adm": ("https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
                      "VIRTUAL_imagenet256_labeled.npz", None)}


@torch.no_grad()
def extract(extractor, img):
    """(features, logits) of uint8 images (B, C, H, W), or of a list of them of unequal sizes.

    In float32, without TF32, even where the caller generates under autocast.
    """
    device = next(extractor.parameters()).device
    unit = lambda i: i.to(device).float() / 255
    with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return extractor([unit(i) for i in img] if isinstance(img, list) else unit(img))


class Reference(NamedTuple):
    """The real side: moments of all images for FID, and the features of some of them (or None) for neighbours."""

    mu: np.ndarray
    sigma: np.ndarray
    features: torch.Tensor | None
    name: str


def load_reference(path, dim, device="cpu", made=None):
    """A Reference from any .npz with mu (dim,) and sigma (dim, dim), and `features` (n, dim) if it has them.

    made: how its images should have been prepared; a file of --save_reference says how they were.
    """
    try:
        with np.load(path) as f:
            mu, sigma = (f[key].astype(np.float64) for key in ("mu", "sigma"))
            features = torch.from_numpy(f["features"]).float().to(device) if "features" in f else None
            was = str(f["made"]) if "made" in f else made
    except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, zipfile.BadZipFile, lzma.LZMAError) as err:
        raise UserError(f"cannot read statistics from {path} ({err}): expected an .npz with mu and sigma")
    if (mu.shape, sigma.shape) != ((dim,), (dim, dim)) or (features is not None and features.shape[1:] != (dim,)):
        raise UserError(f"{path}: expected mu ({dim},) and sigma ({dim}, {dim}), got {mu.shape} and {sigma.shape}: "
                        "made with another feature network?")
    if made and was != made:
        raise UserError(f"--reference {path} was made with {was}, and these flags say {made}: both sides must agree")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: its mu or sigma is not finite")
    return Reference(mu, sigma, features, f"{os.path.basename(path)} {fingerprint([mu, sigma])}")


def load_extractor(spec, device="cpu"):
    """(extractor, reference) that ship for a teacher's images, or (None, None): others need --reference or --real."""
    if spec.image != (1, 32, 32):
        return None, None
    path = os.path.join(ASSETS, "classifier.safetensors")
    extractor = load_state(FashionNet(), read_weights(path), path).to(device).eval().requires_grad_(False)
    return extractor, load_reference(os.path.join(ASSETS, "reference.npz"), extractor.dim, device)


def folder_images(folder, flag, image=None):
    """(names, make, complain) of a folder and what is below it: make(i (b,)) -> a list of uint8 pictures (C, H, W).

    They are RGB, each of its own size; image (C, H, W): resized and centre-cropped to that. What cannot be read counts
    as black until complain() raises, on every process: left out, it would make the statistics those of other images.
    # choice: 16-bit grey keeps its high byte, transparency is laid on white (clean-fid clips the one, drops the other).
    """
    from data.imagenet import SUFFIXES, centre_crop, convert

    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder}: no such folder; expected one with images in it")
    names = sorted(os.path.join(where, f) for where, _, files in os.walk(folder) for f in files
                   if f.lower().endswith(SUFFIXES) and not f.startswith("."))
    if len(names) < 10:
        raise UserError(f"{flag} {folder}: statistics need 10 images at least, found {len(names)} "
                        f"({', '.join(SUFFIXES)})")
    C, H, W = image or (3, 1, 1)
    unreadable = []

    def read(i):
        try:
            with Image.open(names[i]) as file:
                img = convert(file, {1: "L", 3: "RGB"}[C])
            img = np.array(centre_crop(img, H) if image else img)
            return torch.from_numpy(img.reshape(*img.shape[:2], C)).permute(2, 0, 1)
        except Exception as err:                      # Pillow raises a dozen kinds for a broken file
            unreadable.append(" ".join(f"{names[i]} ({type(err).__name__}: {err})".split()))
            return torch.zeros(C, H, W, dtype=torch.uint8)

    def make(rows, **_):
        with ThreadPoolExecutor() as pool:            # Pillow works outside the GIL
            return list(pool.map(read, rows.tolist()))

    def complain():
        everyone = [unreadable]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, unreadable)
        if bad := sorted(sum(everyone, [])):
            raise UserError(f"{flag} {folder}: {len(bad)} of {len(names)} images cannot be read: mend or remove them; "
                            f"the first is {bad[0]}")

    return names, make, complain


def folder_reference(folder, extractor, device, batch):
    """The Reference of a folder's images; of 10,000 at most, evenly spread, the features are kept for neighbours.

    Its hash is of the files' names and sizes: sums differ in their last digit with the number of processes.
    """
    names, make, complain = folder_images(folder, "--real")
    features, _, mu, sigma, _ = extracted(make, torch.arange(len(names), device=device), extractor, batch=batch,
                                          desc=folder, every=math.ceil(len(names) / 10_000))
    complain()
    listed = "\n".join(f"{os.path.relpath(name, folder)} {os.path.getsize(name)}" for name in names)
    digest = hashlib.sha256(os.fsencode(listed)).hexdigest()[:12]
    name = f"{os.path.basename(os.path.abspath(folder))}, {len(names):,} images, {digest}"
    return Reference(mu, sigma, features, name)


def npz_images(path):
    """`arr_0` of an .npz: uint8 images (n, 3, H, W), or None. In ADM's file 10,000; its mu and sigma are of more."""
    with np.load(path) as f:
        if "arr_0" not in f:
            return None
        if (img := f["arr_0"]).dtype != np.uint8 or img.ndim != 4 or img.shape[3] != 3:
            raise UserError(f"--reference {path}: expected images, uint8 (n, H, W, 3), in its arr_0, got {img.dtype} "
                            f"{img.shape}")
        return torch.from_numpy(img).permute(0, 3, 1, 2)


def load_measure(args, device):
    """(Inception, Reference) as --reference or --real ask for, or None where neither does; no model is read before.

    With --reconstruction, --real has the images themselves; without --reference they are their own, and it is None.
    """
    if not (args.reference or args.real):
        for flag in ("fake", "save_reference", "inception", "resize", "crop"):
            if getattr(args, flag) and (flag in ("fake", "save_reference") or not args.metrics):
                raise UserError(f"--{flag} belongs to a FID by Inception: add --reference PATH.npz, or --real FOLDER")
        return None
    if args.reference and args.real and not args.reconstruction:
        raise UserError(f"--reference {args.reference} and --real {args.real} are both the real side: give one")
    if args.reconstruction and not args.real:
        raise UserError(f"--reconstruction against --reference {args.reference}: add --real FOLDER, what to "
                        "reconstruct")
    if args.save_reference and (not args.real or args.reconstruction):
        raise UserError(f"--save_reference {args.save_reference} keeps the statistics of a folder: add --real FOLDER")
    path, mode, batch = args.reference, args.resize or RESIZES[0], args.batch or 64
    made = f"resize {mode}, {'coco_crop' if args.crop else 'no crop'}"
    if path:
        path = download(*REFERENCES[path], "--reference") if path in REFERENCES else path
        reference = load_reference(path, Inception.dim, device, made)
    random = args.random_weights and not args.inception
    net = load_inception(args.inception or "plain", mode, args.crop, device, random)
    net.facts = dict(resize=mode, crop="coco_crop to 256 px" if args.crop else None, features="fp32",
                     inception="random" if random else os.path.basename(args.inception or "plain"))
    net.facts |= dict(note=RANDOM) if random else {}
    if args.reconstruction and not path:
        return net, None
    if not path:
        reference = folder_reference(args.real, net, device, batch)
    elif reference.features is None and "prdc" in (args.metrics or JUDGED) and (img := npz_images(path)) is not None:
        rows = torch.arange(len(img), device=device)
        features = extracted(lambda i, **_: img[i.cpu()], rows, net, batch=batch, desc="arr_0")[0]
        reference = reference._replace(features=features, name=f"{reference.name}, neighbours: its {len(img):,} images")
    if "prdc" in (args.metrics or ()) and reference.features is None:
        raise UserError(f"--metrics prdc needs real images, and {path} holds neither arr_0 nor features: take "
                        "--reference adm, or --real FOLDER")
    if args.save_reference and is_first():
        try:
            with replacing(args.save_reference) as f:
                some = reference.features.cpu().numpy()
                np.savez(f, mu=reference.mu, sigma=reference.sigma, features=some, made=made)
        except OSError as err:
            raise UserError(f"--save_reference {args.save_reference}: cannot write there ({err.strerror})")
        print(f"{args.save_reference}: {reference.name}, {made}")
    return net, reference


# ============================================================================================== generation
def student_tokens(teacher, net, rows, init_ratio=0.6, noise=0.1, temperature=1.0, generator=None):
    """One pass of the generator `net`: rows (B, ...) of teacher.conditions -> logits z, tokens x, and what rows say."""
    (E, bias), cond = net.tables(), teacher.cond(rows)
    tokens, scores, u, n = teacher.draw_start(net, rows.shape[0], generator)
    x_init = initial_tokens(tokens, init_ratio, scores, net.V)                                # Alg. 1, l. 4
    z = student_logits(net, x_init, cond, E, bias, noise, n)                                  # l. 5: (B, L, G, V)
    return z, sample_tokens(z, temperature, u).clamp_(max=net.V - 1), cond                    # l. 6, no masks


@torch.no_grad()
def generate_student(teacher, net, rows, *, init_ratio=0.6, noise=0.1, temperature=1.0, generator=None, seconds=None):
    """One pass of the generator `net`: rows (B, ...) of teacher.conditions -> uint8 images (B, C, H, W).

    temperature 0 is argmax. seconds, a Counter, receives the time of the "tokens" and of the "pixels", the decoder's.
    """
    start = now(rows.device)
    z, x, cond = student_tokens(teacher, net, rows, init_ratio, noise, temperature, generator)
    if not torch.isfinite(z).all():
        raise UserError("the student's logits are not finite: its training diverged, take an earlier checkpoint")
    return to_pixels(teacher, x, cond, start, seconds)


class OneStep(nn.Module):
    """Student and decoder as one module, rows of teacher.conditions -> uint8 images; torch.manual_seed fixes the starts."""

    def __init__(self, teacher, net, **start):
        super().__init__()
        self.teacher, self.start = teacher, start
        self.net, self.tokenizer, self.text = net, teacher.tokenizer, teacher.text

    def forward(self, rows):
        _, x, cond = student_tokens(self.teacher, self.net, rows, **self.start)
        img = self.tokenizer.pixels(embed_tokens(x, *self.tokenizer.tables()), cond)          # in one piece, of any size
        return to_bytes(img.clamp(0, 1), self.teacher.spec)


@torch.no_grad()
def export(teacher, net, path, **start):
    """Write a OneStep as a file of torch.export: torch.export.load(path).module()(rows), for any batch from 2 on, without this code.

    It runs on the kind of device on which it was exported. Compared with the module itself before it is kept.
    """
    rows, model = teacher.conditions(["a photo"] * 3 if teacher.text else None)[:3], OneStep(teacher, net, **start).eval()
    draw = lambda run: (torch.manual_seed(0), run(torch.cat([rows, rows])))[1]
    with torch.random.fork_rng():
        images = draw(model)                          # first: what the networks keep from call to call must be real tensors
        program = torch.export.export(model, (rows,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},), strict=False)
        exported = draw(program.module())
    if not torch.equal(images, exported):
        raise UserError(f"--export {path}: the exported program draws other images than the student; nothing is written")
    try:
        with replacing(path) as f:
            torch.export.save(program, f)
    except OSError as err:
        raise UserError(f"--export {path}: cannot write there ({err.strerror})")


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


# ============================================================================================== evaluation
def all_reduce(t):
    """The sum over processes, in place; every process must call it."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def join_processes(kind):
    """This process's device, "cuda" or "cpu", and the process group, where torchrun started several processes.

    A restart (torchrun --max-restarts) on one node meets under a name of its own: torchrun's store still has the
    addresses of the processes that died. On several nodes no count of restarts is shared; there the store itself must
    be new, which TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 sees to (README).
    """
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return device


def peer_is_gone(err):
    """Is this RuntimeError what a process hears, in its next collective, when another of the group has died?"""
    return dist.is_initialized() and bool(re.search(r"closed by peer|reset by peer|timed? ?out|NCCL|remote process", str(err)))


def is_first():
    return not dist.is_initialized() or dist.get_rank() == 0


def in_batches(make_images, rows, batch, seed, desc, facts, folder=None):
    """The images of `rows`, batch by batch, this process's share of them: yields (slice, uint8 images).

    Batch i draws from a generator seeded by (seed, i), and whole batches go to processes in turn. At the end the
    speed of all processes together is put into `facts`. folder: a new one, where they are written, as PNG.
    """
    if folder and is_first():
        save_images(folder, (), "png")
    if folder and dist.is_initialized():
        dist.barrier()
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
        for k, pixels in zip(range(len(rows))[part], img if folder else ()):
            picture(pixels).save(os.path.join(folder, f"{k:05d}.png"))
        yield part, img
    rates = [timed / s if s else 0.0 for s in (seconds.total(), seconds["tokens"])]
    rates = all_reduce(torch.tensor(rates, dtype=torch.float64, device=device)).tolist()
    facts.update({"images/s": rates[0] or None, "tokens_only/s": rates[1] or None, "processes": world})


@torch.no_grad()
def extracted(make_images, rows, extractor, shift=0.0, batch=250, seed=0, desc=None, folder=None, every=1):
    """features (n, dim), logits (n, classes), mu, sigma, facts of the images of `rows`, of all processes together.

    every: features and logits of each `every`-th image alone are kept; mu and sigma are of all.
    """
    device, facts = rows.device, dict(seed=seed, batch=batch)
    features, logits = (torch.zeros(math.ceil(len(rows) / every), width, device=device)
                        for width in (extractor.dim, extractor.classes))
    moments = Moments(extractor.dim, shift, device)
    for part, img in in_batches(make_images, rows, batch, seed, desc, facts, folder):
        f, z = extract(extractor, img)
        moments.add(f)
        i = torch.arange(len(rows), device=device)[part]
        keep = i % every == 0
        features[i[keep] // every], logits[i[keep] // every] = f[keep], z[keep]
    return all_reduce(features), all_reduce(logits), *moments.result(), facts                 # else a row is zero


JUDGED = ("fid", "is", "prdc")


@torch.no_grad()
def evaluate(make_images, labels, extractor, reference, batch=250, seed=0, k=3, desc=None, metrics=JUDGED, folder=None):
    """All metrics of len(labels) images, or those of `metrics`, as a dict; desc names the progress bar (none without).

    labels: conditions, a row an image. make_images(labels (b, ...), generator=, seconds=) -> uint8 images; bind the
    rest with functools.partial. Without an extractor the images are only made and timed. Batch i draws from a
    generator seeded by (seed, i), and whole batches go to processes in turn: so the images, their order, and the
    numbers do not depend on the number of processes. (They do depend on `batch`.)
    """
    n = len(labels)
    if extractor is None:
        facts = dict(seed=seed, batch=batch)
        for _ in in_batches(make_images, labels, batch, seed, desc, facts, folder):
            pass
        return dict(n=n, **facts)
    features, logits, mu, sigma, facts = extracted(make_images, labels, extractor, reference.mu, batch, seed, desc,
                                                   folder)
    row = dict(n=n)
    if "fid" in metrics:
        both = torch.zeros(2, dtype=torch.float64, device=labels.device)
        if is_first():                                # half a minute of a core at 2048 features: on one is enough
            pair = mu, sigma, reference.mu, reference.sigma
            both[:] = torch.tensor([fid(*pair), fid_eigenvalues(*pair)], dtype=torch.float64)
        row["fid"], row["fid_eigenvalues"] = all_reduce(both).tolist()
    if "is" in metrics:
        for name, convention in IS_CONVENTIONS.items():
            row[name], row[f"{name}_std"] = inception_score(logits, **convention)
    if "prdc" in metrics and reference.features is not None:
        row.update(prdc(reference.features, features, k), k=k)
    row.update(facts, extractor=f"{type(extractor).__name__} {fingerprint(extractor)}", reference=reference.name,
               **getattr(extractor, "facts", {}))
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
    means = dict(zip(("chroma", *names), right[:, 1:].mean(0).tolist()))
    return {"n": n, **tasks, **means, **facts, "reader": "data/shapes.py"}


def run_benchmark(bench, teacher, make_images, folder, batch=250, seed=0, desc=None):
    """Draw an image a prompt, write them below `folder`, judge them: a row. Sharded and seeded as in `evaluate`."""
    if is_first():
        bench.lay(folder)
    if dist.is_initialized():
        dist.barrier()                                # the others write into what the first has laid out
    rows = teacher.conditions(bench.prompts)

    def score(part, img):
        return torch.as_tensor(bench.score(folder, part, [picture(p) for p in img]))[:, None]

    scores, facts = scored(make_images, rows, score, 1, batch, seed, desc)
    written = {"folder": folder} if os.path.isdir(folder) else {}
    return {"n": len(rows), **bench.row(scores[:, 0].cpu()), **facts, **written}


def load_judge(teacher, device="cpu"):
    """judge(make_images, n, batch=, seed=, desc=) -> a row of results for this teacher's world, or None.

    Fashion is judged by FID and its relatives, shapes by GenEval and CLIP; photographs by `load_measure`, not here.
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


# ============================================================================================= published numbers
# What the paper's tables say (Tab. 11's 16 steps as measured there), to stand beside a row of the same teacher: after
# its name the number of the teacher's steps, or which student. fid_coco and fid_mjhq are of 30,000 prompts each, hps is
# v2.1's average, and all ImageNet rows have 50,000 images and their best temperature.
PUBLISHED = """
maskbit    256          Tab.16    fid 1.58  is 306.12 precision 0.81 recall 0.60
maskbit    64           Tab.1     fid 1.66  is 320.0  precision 0.81 recall 0.60
maskbit    Di[M]O       Tab.1     fid 2.89  is 310.1  precision 0.87 recall 0.49
maskbit    Soft-Di[M]O  Tab.1     fid 1.96  is 281.4  precision 0.84 recall 0.55
maskbit    longer       Tab.1     fid 1.56  is 273.2  precision 0.81 recall 0.60
maskgit    16           Tab.2     fid 6.60  is 224.1  precision 0.83 recall 0.40 density 1.25 coverage 0.98
maskgit    8            Tab.2     fid 6.66  is 221.6  precision 0.83 recall 0.40 density 1.23 coverage 0.97
maskgit    4            Tab.2     fid 10.73 is 192.3  precision 0.75 recall 0.31 density 1.01 coverage 0.92
maskgit    2            Tab.2     fid 91.35 is 13.4   precision 0.18 recall 0.16 density 0.09 coverage 0.12
maskgit    32-halton    Tab.2     fid 9.62  is 296.2  precision 0.90 recall 0.28 density 1.47 coverage 0.98
maskgit    16-halton    Tab.2     fid 8.73  is 283.2  precision 0.89 recall 0.28 density 1.46 coverage 0.98
maskgit    8-halton     Tab.2     fid 7.73  is 248.8  precision 0.86 recall 0.31 density 1.37 coverage 0.97
maskgit    Di[M]O       Tab.2     fid 6.91  is 214.0  precision 0.83 recall 0.38 density 1.26 coverage 0.97
maskgit    Soft-Di[M]O  Tab.2     fid 6.40  is 214.8  precision 0.83 recall 0.39 density 1.27 coverage 0.97
meissonic  32           Tab.3     fid_coco 50.13 clip_score 0.318 geneval 0.46 hps 29.63
meissonic  Di[M]O       Tab.3     fid_coco 38.45 clip_score 0.322 geneval 0.43 hps 28.59
meissonic  Soft-Di[M]O  Tab.3     fid_coco 28.33 clip_score 0.319 geneval 0.53 hps 32.35
maskgen    64           Tab.11-13 fid_coco 22.60 fid_mjhq 7.35  clip_score 0.312 geneval 0.485 hps 27.70
maskgen    32           Tab.11-13 fid_coco 22.70 fid_mjhq 7.43  clip_score 0.312 geneval 0.479 hps 27.60
maskgen    16           Tab.11-13 fid_coco 22.64 fid_mjhq 7.59  clip_score 0.312 geneval 0.484 hps 27.43
maskgen    8            Tab.11-13 fid_coco 22.89 fid_mjhq 8.32  clip_score 0.311 geneval 0.462 hps 27.14
maskgen    4            Tab.11-13 fid_coco 24.84 fid_mjhq 11.58 clip_score 0.308 geneval 0.448 hps 26.11
maskgen    2            Tab.11-13 fid_coco 44.21 fid_mjhq 29.92 clip_score 0.287 geneval 0.324 hps 22.38
maskgen    1            Tab.11-13 fid_coco 88.70 fid_mjhq 77.57 clip_score 0.245 geneval 0.178 hps 16.65
maskgen    Di[M]O       Tab.3     fid_coco 24.15 clip_score 0.299 geneval 0.42 hps 27.14
maskgen    Soft-Di[M]O  Tab.3     fid_coco 23.43 clip_score 0.321 geneval 0.51 hps 29.38
maskgen-xl 32           Tab.12    geneval 0.487
maskgen-xl 16           Tab.12    geneval 0.482
maskgen-xl 1            Tab.12    geneval 0.165
"""


def published(row, config):
    """The paper's numbers for a row's metrics: [{"of", "table", metric: number, ...}].

    config: how train.py made the student; bare weights, without one, stand beside any student of their teacher.
    """
    kinds = [str(row["steps"]) + "-halton" * (row.get("order") == "halton")]
    if row["kind"] == "student":
        refined = config.get("gan") or config.get("reward")
        soft = "longer" if str(config.get("recipe")).endswith("long") else "Soft-Di[M]O"
        kinds = [soft if refined else "Di[M]O"] if config else ["Di[M]O", "Soft-Di[M]O", "longer"]
    found, has = [], lambda key: row.get(key) is not None or key.startswith("fid_") and "fid" in row
    for name, kind, place, *pairs in map(str.split, PUBLISHED.strip().splitlines()):
        numbers = {key: float(value) for key, value in zip(pairs[::2], pairs[1::2]) if has(key)}
        if name == row["teacher"] and kind in kinds and numbers:
            found.append({"of": kind, "table": place, **numbers})
    return found


def in_words(entry):
    """An entry of `published`: its numbers, and where they stand."""
    numbers = ", ".join(f"{key} {value:g}" for key, value in entry.items() if key not in ("of", "table"))
    return f"{entry['of']}: {numbers} ({entry['table']})"


# ===================================================================================== tables and pictures
COLUMNS = {"steps": "d", "temperature": "g", "guidance": "g", "n": "d", "fid": ".2f", "is": ".2f",
           "geneval": ".3f", "single_object": ".2f", "two_object": ".2f", "counting": ".2f", "colors": ".2f",
           "position": ".2f", "color_attr": ".2f", "clip": ".2f", "imagereward": ".2f", "chroma": ".3f",
           "clip_score": ".4f", "hps": ".2f", "anime": ".2f", "concept-art": ".2f", "paintings": ".2f", "photo": ".2f",
           "precision": ".3f", "recall": ".3f", "density": ".3f", "coverage": ".3f", "images/s": ".1f",
           "tokens_only/s": ".1f"}                    # key of a row: its format


def table(rows):
    """Markdown: a line for each row of `evaluate` (plus model, steps, temperature, guidance), and notes below."""
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    cell = lambda row, key: format(row[key], COLUMNS[key]) if row.get(key) is not None else "-"
    lines = [["model", *(key.replace("_", " ") for key in columns)]]
    lines += [[row.get("model", "-"), *(cell(row, key) for key in columns)] for row in rows]
    if any(row.get("published") for row in rows):
        cells = ["published (the paper's, not measured here)"]
        cells += ["; ".join(map(in_words, row.get("published") or ())) or "-" for row in rows]
        lines = [[*line, cell] for line, cell in zip(lines, cells)]
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


def report(rows, criterion="fid"):
    """`table` of all rows; of a sweep of temperatures first a table a checkpoint, and its best enters the joint one."""
    best, text = [], []
    for model in dict.fromkeys(row.get("model") for row in rows):
        own = [row for row in rows if row.get("model") == model]
        scored = [row for row in own if row.get("kind") == "student" and row.get(criterion) is not None]
        if len({row["temperature"] for row in scored}) > 1:
            top = min(scored, key=lambda row: row[criterion])
            text += [table(own), f"{model}: the best of {len(scored)} temperatures is {top['temperature']:g}"
                                 f"{' (argmax)' * (top['temperature'] == 0)}, {criterion.upper()} {top[criterion]:.2f}"]
            own = [row for row in own if row is top or row not in scored]
        best += own
    return "\n\n".join(text + ([table(best)] if len({row.get("model") for row in rows}) > 1 or not text else []))


def small_print(row):
    """What the FID of a row depends on besides its model, in a sentence."""
    each = f", {row['per_class']:g} images a class" if row.get("per_class") else ""
    return (f"FID: {row['extractor']} ({row['inception']}), resize {row['resize']}, {row['crop'] or 'no crop'}, in "
            f"float32, against {row['reference']}; N = {row['n']}{each}, seed {row['seed']}, {row['pixels']}. IS: "
            f"torch-fidelity's splits (is_stylegan, is_adm: table.json). {row.get('note', '')}").strip()


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
        for i, pixels in enumerate(img):                                                      # (C, H, W)
            tile = picture(pixels).resize((scale * W, scale * H), Image.Resampling.NEAREST)
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


# ================================================================================================ real images
def reconstruction(teacher, device, n, batch, measure=None, folder=None):
    """Rows for real images, and for decode(encode(them)) with PSNR: the tokenizer bounds the student (App. D).

    Of Fashion-MNIST, or, with measure = (Inception, Reference or None), of n images spread over `folder`, resized and
    centre-cropped to the teacher's size; without a Reference, FID is between them and themselves before (rFID).
    PSNR is of the mean squared error over all images. MaskGen's decoder is told NAME.txt beside an image, or "".
    """
    spec, says = teacher.spec, lambda i: ()
    if measure:
        net, reference = measure
        names, make, complain = folder_images(folder, "--real", spec.image)
        sources = [(folder, torch.arange(len(names)), lambda i, **_: torch.stack(make(i)).to(device))]
        if teacher.text:
            said = [os.path.splitext(name)[0] + ".txt" for name in names]
            said = teacher.conditions([read_prompts(path)[0] if os.path.exists(path) else "" for path in said])
            says = lambda i: teacher.cond(said[i])
    else:
        (net, reference), complain = load_extractor(spec, device), lambda: None
        if net is None:
            raise UserError(f"--reconstruction reads Fashion-MNIST, which {spec.name} does not know: for other images "
                            "add --real FOLDER")
        sources = []
        for split in ("train", "t10k"):
            img = torch.from_numpy(load_images(split)[0])
            sources.append((split, torch.arange(len(img)), lambda i, img=img, **_: img[i.cpu()].to(device)))
    for split, rows, real in sources:
        rows = rows[:: max(1, len(rows) // n)][:n].to(device)
        error = torch.zeros((), dtype=torch.float64, device=device)

        def rebuild(i, **_):
            img, cond = real(i), says(i)
            x = teacher.tokenizer.encode(img.float() / 255)
            back = to_bytes(decode_tokens(teacher.tokenizer, x, cond), spec)
            error.add_((back.double() - img).square().sum())
            return back

        if reference is None:
            features, _, mu, sigma, _ = extracted(real, rows, net, batch=batch, desc=f"real {split}")
            reference = Reference(mu, sigma, features, f"the same {len(rows):,} images before")
            complain()
            models = [(f"{split} reconstructed", rebuild)]
        else:
            models = [(f"real {split}", real), (f"{split} reconstructed", rebuild)]
        for model, make_images in models:
            row = evaluate(make_images, rows, net, reference, batch, desc=model)
            complain()
            if make_images is rebuild:
                row["psnr"] = 10 * math.log10(255**2 * len(rows) * math.prod(spec.image) / all_reduce(error).item())
            yield dict(model=model, kind="real", teacher=spec.name, tokenizer=fingerprint(teacher.tokenizer), **row,
                       pixels="uint8, rounded" if spec.rounds else "uint8, truncated")


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
    add("--export", metavar="FILE", help="write the student and its decoder as one file of torch.export; draw nothing")
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

    add = ap.add_argument_group("which numbers").add_argument
    add("--metrics", nargs="+", choices=[*JUDGED, *BENCHMARKS], metavar="NAME",
        help="fid, is (Inception Score), prdc (precision, recall, density, coverage): all three by default; and clip, "
        "hps, geneval, the benchmarks of text to image, which have their own prompts")

    add = ap.add_argument_group("FID by the Inception network: with --reference or --real").add_argument
    add("--reference", metavar="PATH", help="real side: .npz of mu and sigma (for prdc also arr_0, images, or features)"
        "; adm fetches ADM's of ImageNet, and is its default with --metrics")
    add("--real", metavar="FOLDER", help="real side: images; with --reconstruction, what is reconstructed")
    add("--save_reference", metavar="PATH", help="write the statistics of --real, a later --reference; draw nothing")
    add("--fake", metavar="FOLDER", help="judge the images in it, draw nothing")
    add("--inception", metavar="PATH", help="its weights, plain or TorchScript; or what to fetch: "
        f"{' or '.join(INCEPTION)} (plain)")
    add("--resize", choices=RESIZES, help=f"to 299 px, as clean-fid calls it ({RESIZES[0]}; clean for COCO and MJHQ)")
    add("--crop", action="store_true", help="both sides to the central square and 256 px first (COCO-30k)")

    add = ap.add_argument_group("benchmarks of text to image").add_argument
    add("--benchmark", choices=list(BENCHMARKS), help="--metrics of one: draw it, write images below OUT, score them")
    add("--metadata", nargs="+", metavar="PATH", help="its prompts, of several benchmarks in their order: "
        + "; ".join(f"{b}: {w}" for b, (_, w) in BENCHMARKS.items()))
    add("--per_prompt", type=number(1, 1000, int), default=4, help="geneval: images a prompt (%(default)s)")
    add("--detector", choices=["mask2former", "shapes"], help="geneval: score it here, too (published: mmdetection's)")
    add("--geneval_folder", metavar="DIR", help="score this folder of GenEval's layout by --detector, draw nothing")
    add("--save_images", nargs="?", const="cropped", choices=["cropped", "whole"],
        help="keep PNGs below OUT: as CLIP score sees them at 256 px (COCO-30k), or whole (MJHQ-30k); a FID's whole")
    for name in ("detector", "clip_l", "hps", "clip_g"):
        add(f"--{name}_weights", metavar="PATH", help="local " + ("folder" if name == "detector" else "file")
            + " instead of the published one")

    add = ap.add_argument_group("how to measure").add_argument
    add("--n", "--n_images", type=number(1, 10**7, int), help="images a row (5000; by Inception 50000, or all prompts; "
        "benchmarks have their own). torchrun takes --n for its own: write --n_images")
    add("--batch", type=number(1, 10**5, int), help="images a batch of one process (250, fewer where images are large)")
    add("--seed", type=number(0, 2**32, int), default=0, help="of everything random (%(default)s)")
    add("--out", default="out/evaluate", help="folder of results.jsonl (appended) and sheet.png (%(default)s)")

    add = ap.add_argument_group("system").add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--bf16", action="store_true", help="networks in bfloat16; decoder and features stay in float32")
    return ap


FILES = ("teacher_weights", "tokenizer_weights", "text_weights", "text_activation", "random_weights")


def models(args, device):
    """One at a time: (teacher, make_images, what a row says of them, how a student was trained)."""
    hashes = lambda t: dict(teacher=t.spec.name, teacher_weights=fingerprint(t.net), tokenizer=fingerprint(t.tokenizer),
                            **({} if t.text is None else dict(text=fingerprint(t.text))))
    name, files = args.teacher, {k: getattr(args, k) for k in FILES}
    for path in args.ckpt:
        teacher, net, config = load_student(path, args.teacher, device, **files)
        name, config, trained = name or teacher.spec.name, {**teacher.spec.student, **config}, config
        files = {k: v or config.get(k) for k, v in files.items()}
        start = {k: config[k] if getattr(args, k) is None else getattr(args, k) for k in ("init_ratio", "noise")}
        for T in args.temperature or [config["temperature"]]:
            yield (teacher, functools.partial(generate_student, teacher, net, temperature=T, **start), dict(
                model=f"student {path}", kind="student", weights=fingerprint(net), steps=1, temperature=T, **start,
                **hashes(teacher)), trained)
    if not args.steps and (args.ckpt or args.reconstruction):
        return
    teacher = load_teacher(name or "maskbit-tiny", device=device, **files)
    for N in args.steps or ([1, 2, 4, 8, 16] if teacher.spec.record else [next(iter(teacher.spec.sampling))]):
        given = dict(guidance=args.guidance, temperature=args.teacher_temperature)
        yield (teacher, functools.partial(generate_teacher, teacher, steps=N, order=args.order, **given), dict(
            model="teacher", kind="teacher", steps=N, order=args.order, **teacher.spec.settings(N, **given),
            **hashes(teacher)), {})


def main(args):
    # ------------------------------------------------------------------------------- processes and device
    check_device(args.device)
    device = join_processes(args.device)
    first = is_first()
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as err:
        raise UserError(f"--out {args.out}: cannot write there ({err.strerror})")

    system = dict(dtype="bf16" if args.bf16 else "fp32",
                  device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", torch=torch.__version__)
    if args.export:
        if len(args.ckpt) != 1:
            raise UserError(f"--export {args.export} writes one student: name it by --ckpt PATH")
        make_images = next(models(args, device))[1]
        export(*make_images.args, args.export, **make_images.keywords)
        return print(f"wrote {args.export}: torch.export.load({args.export!r}).module() maps rows of conditions to images")
    benches, measure = load_benchmarks(args, device), load_measure(args, device)
    jobs = [*((None,) if args.metrics is None and not benches or {*(args.metrics or ())} & {*JUDGED} else ()), *benches]
    if args.save_reference:
        return
    judged = tuple(name for name in JUDGED if name in (args.metrics or JUDGED))

    # ---------------------------------------------------------------------------------------- a row each
    rows, pictures = [], []

    def record(row):                                  # at once: hours of one model survive the next one's crash
        rows.append(row)
        if first:
            with open(os.path.join(args.out, "results.jsonl"), "a") as f:
                f.write(json.dumps({**row, **system, "time": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")

    if args.geneval_folder:
        record(geneval_folder(args, device))
    if args.fake:
        names, make, complain = folder_images(args.fake, "--fake")
        rows_of = torch.arange(len(names), device=device)
        row = evaluate(make, rows_of, *measure, args.batch or 64, desc=args.fake, metrics=judged)
        complain()
        row = {"model": args.fake, "kind": "folder", **row, "seed": None, "pixels": "as they are"}
        record({**row, "note": small_print(row)})
    if args.reconstruction:
        teacher = load_teacher(args.teacher or "maskbit-tiny", device=device, **{k: getattr(args, k) for k in FILES})
        batch = args.batch or min(250, max(1, 2**14 // teacher.net.L))
        for row in reconstruction(teacher, device, args.n or (10**7 if args.real else 5000), batch, measure, args.real):
            record({**row, "note": small_print(row)} if measure else row)
    for teacher, make_images, facts, trained in () if args.geneval_folder or args.fake else models(args, device):
        batch = args.batch or min(250, max(1, 2**14 // teacher.net.L))
        shown = [f"{k} {facts[k]:g}" for k in ("steps", "temperature", "guidance") if k in facts]
        caption = ", ".join([facts["model"], *shown])
        name = re.sub(r"[^\w.]+", "-", " ".join([teacher.spec.name, caption]))
        for job in jobs:
            bench = benches.get(job)
            if bench:
                expect_text(teacher.spec, job)
            imagenet = teacher.spec.classes == 1000 and teacher.spec.image[1] == 256
            if args.metrics and imagenet and not (bench or measure):
                args.reference = "adm"
                measure = load_measure(args, device)
            extractor, reference = (None, None) if bench else measure or load_extractor(teacher.spec, device)
            judge = load_judge(teacher, device) if extractor is None and bench is None else None
            if args.metrics and not (bench or extractor):
                raise UserError(f"--metrics {' '.join(judged)} of {teacher.spec.name} needs --reference PATH.npz (adm: "
                                "ADM's of ImageNet), or --real FOLDER")
            if not (bench or judge or extractor) and first:
                print(f"{teacher.spec.name}: images are drawn and timed; FID needs --reference PATH or --real FOLDER")
            prompts = (bench.prompts if bench else
                       read_prompts(args.prompts or teacher.spec.prompts) if teacher.text else None)
            conditions = teacher.conditions(prompts)
            n = args.n or (5000 if not measure else 50_000 if teacher.spec.classes else len(prompts))
            if (judge or extractor) and n < 10:
                raise UserError(f"--n {n}: statistics need 10 images at least")
            folder = os.path.join(args.out, job or "images", name)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                if bench:
                    row = run_benchmark(bench, teacher, make_images, folder, batch, args.seed, caption)
                elif judge:
                    row = judge(make_images, n, batch=batch, seed=args.seed, desc=caption)
                else:
                    row = evaluate(make_images, in_turn(conditions, n), extractor, reference, batch, args.seed,
                                   desc=caption, metrics=judged, folder=folder if args.save_images else None)
            if teacher.spec.classes:
                row["per_class"] = n / teacher.spec.classes
            labels = (args.metadata[list(benches).index(job)] if bench else
                      "the shapes benchmark" if "geneval" in row else
                      f"{args.prompts or teacher.spec.prompts} in turn" if teacher.text else "each class in turn")
            row = {**facts, **row, "labels": labels,
                   "pixels": "uint8, rounded" if teacher.spec.rounds else "uint8, truncated"}
            if paper := published(row, trained):
                row["published"] = paper
            if measure and not bench:
                row["note"] = small_print(row)
            record(row)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            shown = min(n, 10 if teacher.spec.image[1] < 100 else 4)
            pictures.append((caption, fixed_sample(make_images, conditions, shown, args.seed)))
    if first:
        if pictures:
            words = spread(prompts, len(pictures[0][1])) if prompts else None
            sheet(pictures, os.path.join(args.out, "sheet.png"), words=words)
        lines = [f"{row['model']}: PSNR {row['psnr']:.2f} dB" for row in rows if "psnr" in row]
        text = "\n".join([report(rows), *lines])
        print(text)
        for kind, content in (("md", text), ("json", json.dumps([{**row, **system} for row in rows], indent=1))):
            with replacing(os.path.join(args.out, f"table.{kind}")) as f:
                f.write(content.encode() + b"\n")


if __name__ == "__main__":
    ap = flags()
    try:
        main(ap.parse_args())
    except UserError as err:
        ap.exit(2, f"evaluate.py: {err}\n")
    except RuntimeError as err:
        if not peer_is_gone(err):
            raise
        ap.exit(3, f"evaluate.py: another process is gone ({str(err).splitlines()[0][:200]}); its own message says why\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
