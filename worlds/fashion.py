"""Fashion-MNIST, the default world: 70,000 photographs of clothes, 28x28, 10 classes (Xiao et al. 2017).

    python worlds/fashion.py                                     # writes data/fashion/: the training set as tokens
    python worlds/fashion.py --pack assets/fashion/tokens.npz    # the packed copy that this repository ships

The four raw files come from Debian (`apt-get install dataset-fashion-mnist`) or, failing that, from torchvision's
downloader. Images are padded to 32x32 and never flipped: all shoes point left, and a teacher should know that.
"""

import argparse
import gzip
import json
import os
import struct
import sys
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.tokens import describe, load_tokenizer, token_dtype, write_folder, write_packed  # noqa: E402
from machinery.errors import UserError  # noqa: E402
from machinery.files import ROOT, replacing  # noqa: E402
from metrics.reference import load_reference  # noqa: E402
from networks.weights import load_state, read_weights  # noqa: E402


DEBIAN = "/usr/share/datasets/fashion-mnist"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
COUNT = {"train": 60_000, "t10k": 10_000}


def read_idx(path):
    """The array in a gzipped IDX file of bytes; ValueError if it is cut short or of another kind."""
    with gzip.open(path) as f:
        zero, kind, ndim = struct.unpack(">HBB", f.read(4))
        shape = struct.unpack(">" + "I" * ndim, f.read(4 * ndim))
        data = np.frombuffer(f.read(), np.uint8)
    if zero or kind != 8 or data.size != np.prod(shape):
        raise ValueError(f"{path}: expected an IDX file of {shape} bytes, got {data.size} bytes of kind {kind}")
    return data.reshape(shape)


def load_images(split="train", raw=None):
    """(images uint8 (N, 1, 32, 32), labels uint8 (N,)) of split "train" (60,000) or "t10k" (10,000)."""
    if raw is None:
        raw = DEBIAN if os.path.isdir(DEBIAN) else download()
    try:
        img = read_idx(os.path.join(raw, f"{split}-images-idx3-ubyte.gz"))
        labels = read_idx(os.path.join(raw, f"{split}-labels-idx1-ubyte.gz"))
        if img.shape != (COUNT[split], 28, 28) or labels.shape != img.shape[:1] or labels.max() >= len(CLASSES):
            raise ValueError(f"{split}: expected {COUNT[split]} images of 28x28 and a class for each, "
                             f"got images {img.shape} and labels {labels.shape}")
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as err:
        raise UserError(f"cannot read Fashion-MNIST's files in {raw} ({err}); install Debian's package "
                        "dataset-fashion-mnist, or name a folder with the four .gz files by --raw")
    return np.pad(img, ((0, 0), (2, 2), (2, 2)))[:, None], labels.copy()


def download(root=os.path.join(ROOT, "data", "fashion_raw")):
    """The folder of raw files as torchvision's downloader leaves it."""
    try:
        from torchvision.datasets import FashionMNIST
        FashionMNIST(root, download=True)
    except Exception as err:                          # no network, no torchvision, a broken mirror: one sentence
        why = (str(err).splitlines() or [""])[0]
        raise UserError(f"Fashion-MNIST is not in {DEBIAN} and could not be downloaded to {root} "
                        f"({type(err).__name__}: {why}); install Debian's package dataset-fashion-mnist, or name a "
                        "folder with the four .gz files by --raw")
    return os.path.join(root, "FashionMNIST", "raw")


class FashionNet(nn.Module):
    """A small classifier of clothes, (B, 1, 32, 32). Its features see texture: mean and deviation of every map.

    They are standardized over the training set, so that no layer dominates a distance.
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


def main(args):
    folder = (os.path.dirname(args.pack) or ".") if args.pack else args.out
    os.makedirs(folder, exist_ok=True)                # what cannot be written is said before the work
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write into {folder}: name another place by {'--pack' if args.pack else '--out'}")
    img, labels = load_images("train", args.raw)
    tokenizer = load_tokenizer("maskbit-tiny", args.tokenizer_weights)
    meta = describe(tokenizer, "maskbit-tiny", "Fashion-MNIST, training set")
    meta |= dict(n=len(img), variants=1, complete=True)

    tokens = np.empty((len(img), meta["L"], meta["G"]), token_dtype(meta["V"]))
    for i in tqdm(range(0, len(img), 500), unit="batch"):
        tokens[i : i + 500] = tokenizer.encode(torch.from_numpy(img[i : i + 500]).float() / 255).numpy()

    if args.pack:
        with replacing(args.pack) as f:
            write_packed(f, tokens=tokens, labels=labels, meta=json.dumps(meta))
        print(f"{args.pack}: {len(tokens):,} images, {os.path.getsize(args.pack) / 1e6:.2f} MB")
    else:
        write_folder(args.out, tokens, labels, meta)
        print(f"{args.out}: {len(tokens):,} images, {tokens.nbytes / 1e6:.2f} MB")


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", default=os.path.join(ROOT, "data", "fashion"), help="folder to write")
    ap.add_argument("--pack", metavar="FILE.npz", help="write one compressed file instead of the folder")
    ap.add_argument("--raw", metavar="DIR", help="folder with the four .gz files")
    ap.add_argument("--tokenizer_weights", metavar="PATH", help="another tokenizer than the one in assets/")
    try:
        main(ap.parse_args())
    except UserError as err:
        ap.exit(2, f"fashion.py: {err}\n")
    except OSError as err:
        ap.exit(2, f"fashion.py: cannot write ({err}); nothing that was there before is damaged\n")
ASSETS = os.path.join(ROOT, "assets", "fashion")


def load_extractor(spec, device="cpu"):
    """(extractor, reference) that ship for a teacher's images, or (None, None): others need --reference or --real."""
    if spec.world != "fashion":
        return None, None
    path = os.path.join(ASSETS, "classifier.safetensors")
    extractor = load_state(FashionNet(), read_weights(path), path).to(device).eval().requires_grad_(False)
    return extractor, load_reference(os.path.join(ASSETS, "reference.npz"), extractor.dim, device)
