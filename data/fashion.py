"""Fashion-MNIST, the default world: 70,000 photographs of clothes, 28x28, 10 classes (Xiao et al. 2017).

    python data/fashion.py                       # writes data/fashion/: tokens and labels of the training set
    python data/fashion.py --pack assets/fashion_tokens.npz    # the packed copy that this repository ships

The four raw files come from Debian (`apt-get install dataset-fashion-mnist`) or, failing that, from torchvision's
downloader. Images are padded to 32x32 and never flipped: all shoes point left, and a teacher should know that.
"""

import argparse
import gzip
import os
import struct
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

DEBIAN = "/usr/share/datasets/fashion-mnist"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


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
    from teachers import UserError

    raw = raw or DEBIAN
    if not os.path.isdir(raw):
        raw = download()
    try:
        img = read_idx(os.path.join(raw, f"{split}-images-idx3-ubyte.gz"))
        labels = read_idx(os.path.join(raw, f"{split}-labels-idx1-ubyte.gz"))
    except (OSError, EOFError, ValueError, struct.error) as err:
        raise UserError(f"cannot read Fashion-MNIST's files in {raw} ({err}); install Debian's package "
                        "dataset-fashion-mnist, or name a folder with the four .gz files by --raw")
    return np.pad(img, ((0, 0), (2, 2), (2, 2)))[:, None], labels.copy()


def download(root="data/fashion_raw"):
    """The folder of raw files as torchvision's downloader leaves it."""
    from teachers import UserError

    try:
        from torchvision.datasets import FashionMNIST
        FashionMNIST(root, download=True)
    except Exception as err:                          # no network, no torchvision, a broken mirror: one sentence
        raise UserError(f"Fashion-MNIST is not in {DEBIAN} and could not be downloaded to {root} ({err}); "
                        "install Debian's package dataset-fashion-mnist, or name the folder by --raw")
    return os.path.join(root, "FashionMNIST", "raw")
