"""The real side of a FID: moments and features of real images, from a file or from a folder.

The network of published FIDs, Inception, and its real side belong together: `load_feature_space`.
"""

import hashlib
import math
import os
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from data.images import folder_images
from machinery.errors import UserError, explain
from machinery.files import fingerprint, replacing
from machinery.processes import is_main
from metrics.benchmarks import RANDOM
from metrics.engine import extracted
from metrics.fid import METRICS
from networks.inception import RESIZES, Inception, load_inception
from networks.weights import download

ADM = ("https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
       "VIRTUAL_imagenet256_labeled.npz")             # --reference adm: ImageNet's, 256 px


class Reference(NamedTuple):
    """Moments of all real images for FID, and the features of some of them for neighbors."""

    mu: np.ndarray                                    # (dim,)
    sigma: np.ndarray                                 # (dim, dim)
    features: torch.Tensor | None                     # (n, dim)
    name: str


# ----------------------------------------------------------------------------------- from a file
def load_reference(path, dim, device="cpu", made=None):
    """A Reference from any .npz with mu (dim,), sigma (dim, dim), and perhaps features (n, dim).

    made: how its images should have been prepared; a file of --save_reference says how they were.
    """
    sentence = f"cannot read statistics from {path} ({{}}): expected an .npz with mu and sigma"
    with explain(sentence, Exception), np.load(path) as f:       # numpy raises a dozen kinds
        mu, sigma = f["mu"].astype(np.float64), f["sigma"].astype(np.float64)
        features = f.get("features")
        was = str(f.get("made", made))
    width = dim if features is None else features.shape[-1]
    if (mu.shape, sigma.shape, width) != ((dim,), (dim, dim), dim):
        raise UserError(f"{path}: expected mu ({dim},) and sigma ({dim}, {dim}), got {mu.shape} "
                        f"and {sigma.shape}: made with another feature network?")
    if made and was != made:
        raise UserError(f"--reference {path} was made with {was}, and these flags say {made}: both "
                        "sides must agree")
    if not np.isfinite(mu.sum() + sigma.sum()):
        raise UserError(f"{path}: its mu or sigma is not finite")
    if features is not None:
        features = torch.from_numpy(features).float().to(device)
    return Reference(mu, sigma, features, f"{os.path.basename(path)} {fingerprint([mu, sigma])}")


def with_neighbors(reference, path, args, net, device):
    """The reference of a file; where it has no features, with those of its `arr_0`.

    Those are images, uint8 (n, H, W, 3). ADM's file has 10,000 of them; its mu and sigma are of the
    whole training set.
    """
    if reference.features is not None or "prdc" not in (args.metrics or METRICS):
        return reference
    with np.load(path) as f:
        img = f.get("arr_0")
    if img is None:
        if args.metrics:
            raise UserError(f"--metrics prdc needs real images, and {path} holds neither arr_0 nor "
                            "features: take --reference adm, or --real FOLDER")
        return reference
    if img.dtype != np.uint8 or img.shape[3:] != (3,):
        raise UserError(f"--reference {path}: expected images, uint8 (n, H, W, 3), in its arr_0, "
                        f"got {img.dtype} {img.shape}")
    img = torch.from_numpy(img).permute(0, 3, 1, 2)
    real = extracted(lambda i, **_: img[i.cpu()], torch.arange(len(img), device=device), net,
                     batch=args.batch or 64, desc="arr_0")
    name = f"{reference.name}, neighbors: its {len(img):,} images"
    return reference._replace(features=real.features, name=name)


# --------------------------------------------------------------------------------- from a folder
def folder_reference(folder, extractor, device, batch):
    """The Reference of a folder's images; of 10,000 at most, evenly spread, features are kept.

    Its hash is of the files' names and sizes: the last digits of sums differ with the number of
    processes.
    """
    names, make, complain = folder_images(folder, "--real")
    real = extracted(make, torch.arange(len(names), device=device), extractor, batch=batch,
                     desc=folder, every=math.ceil(len(names) / 10_000))
    complain()
    files = [f"{os.path.relpath(name, folder)} {os.path.getsize(name)}" for name in names]
    digest = hashlib.sha256(os.fsencode("\n".join(files))).hexdigest()[:12]
    name = f"{os.path.basename(os.path.abspath(folder))}, {len(names):,} images, {digest}"
    return Reference(real.mu, real.sigma, real.features, name)


# ------------------------------------------------------------------ as the flags of evaluate.py say
def check_sides(args):
    """Complain of flags that do not say one real side, before any model is read."""
    if not (args.reference or args.real):
        needs = ["fake", "save_reference"]
        if not args.metrics:                          # with it, ImageNet's teachers have ADM's
            needs += ["inception", "resize", "crop"]
        for flag in needs:
            if getattr(args, flag):
                raise UserError(f"--{flag} belongs to a FID by Inception: add --reference "
                                "PATH.npz, or --real FOLDER")
        return
    if args.reference and args.real and not args.reconstruction:
        raise UserError(f"--reference {args.reference} and --real {args.real} are both the real "
                        "side: give one")
    if args.reconstruction and not args.real:
        raise UserError(f"--reconstruction against --reference {args.reference}: add --real "
                        "FOLDER, what to reconstruct")
    if args.save_reference and (not args.real or args.reconstruction):
        raise UserError(f"--save_reference {args.save_reference} keeps the statistics of a "
                        "folder: add --real FOLDER")


def inception(args, mode, device):
    """Inception as the flags say, and what rows say of it."""
    weights = args.inception or "plain"
    random = args.random_weights and not args.inception
    net = load_inception(weights, mode, args.crop, device, random)
    net.facts = dict(resize=mode, crop="coco_crop to 256 px" if args.crop else None,
                     features="fp32", inception="random" if random else os.path.basename(weights))
    if random:
        net.facts["note"] = RANDOM
    return net


def load_prepared(path, device, random_weights=False):
    """(Inception, Reference) of a file, or of ADM's ("adm"); images are prepared as the file says.

    For train.py, in whose evaluations the real side decides how the other is made.
    """
    if path == "adm":
        path = download(ADM, None, "--eval_reference")
    reference = load_reference(path, Inception.dim, device)
    with np.load(path) as f:
        made = str(f.get("made", f"resize {RESIZES[0]}, no crop"))
    mode, crop = made.removeprefix("resize ").split(", ")
    args = SimpleNamespace(inception=None, crop=crop == "coco_crop", random_weights=random_weights)
    return inception(args, mode, device), reference


def load_feature_space(args, device):
    """(Inception, Reference) as --reference or --real ask for; None where neither does.

    With --reconstruction, --real has the images themselves: without --reference they are their own
    real side, and the Reference is None.
    """
    check_sides(args)
    path, mode = args.reference, args.resize or RESIZES[0]
    if not (path or args.real):
        return None
    made = f"resize {mode}, {'coco_crop' if args.crop else 'no crop'}"
    if path == "adm":
        path = download(ADM, None, "--reference")
    if path:
        reference = load_reference(path, Inception.dim, device, made)
    net = inception(args, mode, device)               # after the file, which is read faster
    if path:
        return net, with_neighbors(reference, path, args, net, device)
    if args.reconstruction:
        return net, None
    reference = folder_reference(args.real, net, device, args.batch or 64)
    if args.save_reference and is_main():
        with replacing(args.save_reference) as f:
            np.savez(f, mu=reference.mu, sigma=reference.sigma, made=made,
                     features=reference.features.float().cpu().numpy())
        print(f"{args.save_reference}: {reference.name}, {made}")
    return net, reference
