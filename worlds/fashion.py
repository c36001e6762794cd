"""Fashion, the default world: 70,000 photographs of clothes, 28x28, 10 classes (Xiao et al. 2017).

    python worlds/fashion.py                                     # data/fashion/, as tokens
    python worlds/fashion.py --pack assets/fashion/tokens.npz    # the packed copy that ships

It is real data with a real distribution, and small: a diffusion model of it learns in minutes. It
has a feature space of its own for FID, `FashionNet`.

The four raw files come from Debian (`apt-get install dataset-fashion-mnist`) or, where that is
missing, from torchvision's downloader. Images are padded to 32x32 and never flipped: all shoes
point left, and a teacher should know that.
"""

import gzip
import json
import os
import sys
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import trange

sys.path.insert(0, f"{os.path.dirname(__file__)}/..")
from data.tokens import (describe, encode, load_tokenizer,  # noqa: E402
                         write_folder, write_packed)
from machinery.errors import UserError, explain, guard  # noqa: E402
from machinery.files import ROOT, replacing  # noqa: E402
from machinery.flags import add_weights, parser  # noqa: E402
from metrics.reference import load_reference  # noqa: E402
from networks.weights import load_state, read_weights  # noqa: E402


DEBIAN = "/usr/share/datasets/fashion-mnist"
ASSETS = f"{ROOT}/assets/fashion"
CLASSES = "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
COUNT = {"train": 60_000, "t10k": 10_000}
INSTALL = ("install Debian's package dataset-fashion-mnist, or name a folder with the four .gz "
           "files by --raw")


# ----------------------------------------------------------------------------- the photographs
def read_idx(path, *shape):
    """The bytes in a gzipped IDX file of this shape; ValueError if it has another."""
    with gzip.open(path) as f:
        data = f.read()
    header = np.frombuffer(data, ">i4", 1 + len(shape))
    if header.tolist() != [0x800 + len(shape), *shape]:                      # 8: unsigned bytes
        raise ValueError(f"expected {shape[0]} images of 28x28 and a class for each, "
                         f"got an array of {header[1:]} in {path}")
    return np.frombuffer(data, np.uint8, offset=header.nbytes).reshape(shape)


def download():
    """The folder of raw files as torchvision's downloader leaves it."""
    root = f"{ROOT}/data/fashion_raw"
    with explain(f"Fashion-MNIST is not in {DEBIAN} and could not be downloaded to {root} ({{}}); "
                 f"{INSTALL}", Exception):        # no network, no torchvision, a broken mirror
        from torchvision.datasets import FashionMNIST
        FashionMNIST(root, download=True)
    return f"{root}/FashionMNIST/raw"


def load_images(split, raw=None):
    """(images uint8 (N, 1, 32, 32), labels uint8 (N,)) of "train" (N = 60,000) or "t10k" (10,000).

    raw: a folder with the four files. The default is Debian's; without it they are downloaded.
    """
    if raw is None:
        raw = DEBIAN if os.path.isdir(DEBIAN) else download()
    n = COUNT[split]
    with explain(f"cannot read Fashion-MNIST's files in {raw} ({{}}); {INSTALL}",
                 OSError, EOFError, ValueError, zlib.error):
        img = read_idx(f"{raw}/{split}-images-idx3-ubyte.gz", n, 28, 28)
        labels = read_idx(f"{raw}/{split}-labels-idx1-ubyte.gz", n)
        if labels.max() >= len(CLASSES):
            raise ValueError(f"{split}: there are classes above {len(CLASSES) - 1}")
    img = np.pad(img, ((0, 0), (2, 2), (2, 2)))                              # (N, 32, 32)
    return img[:, None], labels.copy()


# -------------------------------------------------------------------- the feature space of its FID
class FashionNet(nn.Module):
    """A small classifier: images (B, 1, 32, 32) in [0, 1] -> (features (B, dim), logits (B, 10)).

    Its features see texture: they are mean and deviation of every map of every layer. They are
    standardized over the training set, so that no layer dominates a distance.
    """

    def __init__(self):
        super().__init__()
        widths, strides = (16, 24, 32, 32), (1, 2, 2, 1)
        self.dim, self.classes = 2 * sum(widths), len(CLASSES)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
            for before, after, stride in zip((1, *widths), widths, strides))
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, widths))
        self.standard = nn.BatchNorm1d(self.dim, affine=False)
        self.head = nn.Linear(self.dim, self.classes)

    def forward(self, img):
        h, stats = img, []
        for conv, norm in zip(self.convs, self.norms):
            h = F.relu(norm(conv(h)))                                        # (B, width, H, W)
            mean = h.mean((2, 3))                                            # (B, width)
            variance = (h - mean[..., None, None]).square().mean((2, 3))
            stats += [mean, (variance + 1e-6).sqrt()]
        features = self.standard(torch.cat(stats, 1))                        # (B, dim)
        return features, self.head(features)


def load_extractor(spec, device="cpu"):
    """(extractor, reference) that ship for a teacher's images: fashion's, else (None, None).

    Teachers of other images need --reference or --real.
    """
    if spec.world != "fashion":
        return None, None
    path = f"{ASSETS}/classifier.safetensors"
    extractor = load_state(FashionNet(), read_weights(path), path)
    extractor.to(device).eval().requires_grad_(False)
    return extractor, load_reference(f"{ASSETS}/reference.npz", extractor.dim, device)


# ------------------------------------------------------------------------- photographs to tokens
def main(args):
    folder = os.path.dirname(args.pack or f"{args.out}/") or "."
    os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK):                                       # said before the work
        raise UserError(f"cannot write into {folder}: name another place by --out or --pack")

    img, labels = load_images("train", args.raw)
    tokenizer = load_tokenizer("maskbit-tiny", args.tokenizer_weights)
    meta = describe(tokenizer, "maskbit-tiny", "Fashion-MNIST, training set")
    meta |= {"n": len(img), "variants": 1, "complete": True}
    pixels = torch.from_numpy(img)
    parts = [encode(tokenizer, pixels[i : i + 500], 500) for i in trange(0, len(img), 500)]
    tokens = np.concatenate(parts)                                           # (N, L, G)
    if args.pack:
        with replacing(args.pack) as f:
            write_packed(f, tokens=tokens, labels=labels, meta=json.dumps(meta))
    else:
        write_folder(args.out, tokens, labels, meta)
    print(f"{args.pack or args.out}: {len(tokens):,} images")


if __name__ == "__main__":
    ap = parser(__doc__)
    add = ap.add_argument
    add("--out", default=f"{ROOT}/data/fashion", help="folder to write (%(default)s)")
    add("--pack", metavar="FILE.npz", help="write one compressed file instead of the folder")
    add("--raw", metavar="DIR", help="folder with the four .gz files")
    add_weights(add, "tokenizer")
    guard(lambda: main(ap.parse_args()))
