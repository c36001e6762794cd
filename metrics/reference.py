"""The real side of a distance."""

import hashlib
import lzma
import math
import os
import zipfile
from typing import NamedTuple

import numpy as np
import torch

from data.images import folder_images
from machinery.errors import UserError
from machinery.files import fingerprint, replacing
from machinery.processes import is_main
from metrics.benchmarks import RANDOM
from metrics.engine import extracted
from metrics.fid import METRICS
from networks.inception import RESIZES, Inception, load_inception
from networks.weights import download


# An extractor maps images (B, C, H, W) in [0, 1] to (features (B, dim), logits (B, classes)): the tiny world's is
# FashionNet, that of published numbers Inception, with the resize inside it.
REFERENCES = {"adm": ("https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
                      "VIRTUAL_imagenet256_labeled.npz", None)}


class Reference(NamedTuple):
    """The real side: moments of all images for FID, and the features of some of them (or None) for neighbors."""

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


def folder_reference(folder, extractor, device, batch):
    """The Reference of a folder's images; of 10,000 at most, evenly spread, the features are kept for neighbors.

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


def load_feature_space(args, device):
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
    elif reference.features is None and "prdc" in (args.metrics or METRICS) and (img := npz_images(path)) is not None:
        rows = torch.arange(len(img), device=device)
        features = extracted(lambda i, **_: img[i.cpu()], rows, net, batch=batch, desc="arr_0")[0]
        reference = reference._replace(features=features, name=f"{reference.name}, neighbors: its {len(img):,} images")
    if "prdc" in (args.metrics or ()) and reference.features is None:
        raise UserError(f"--metrics prdc needs real images, and {path} holds neither arr_0 nor features: take "
                        "--reference adm, or --real FOLDER")
    if args.save_reference and is_main():
        try:
            with replacing(args.save_reference) as f:
                some = reference.features.cpu().numpy()
                np.savez(f, mu=reference.mu, sigma=reference.sigma, features=some, made=made)
        except OSError as err:
            raise UserError(f"--save_reference {args.save_reference}: cannot write there ({err.strerror})")
        print(f"{args.save_reference}: {reference.name}, {made}")
    return net, reference
