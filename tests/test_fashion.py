"""worlds/fashion.py: its raw files, and its training set as tokens.

    pytest tests/test_fashion.py
"""

import gzip
import json
import struct
import types

import numpy as np
import pytest
import torch

from data.tokens import load_tokens
from machinery.errors import UserError
from teachers import build, load_teacher
from worlds import fashion

IMAGES = "train-images-idx3-ubyte.gz"
LABELS = "train-labels-idx1-ubyte.gz"


def write_idx(path, array):
    """An array of bytes the way Fashion-MNIST is published: two zeros, type 8, rank, shape, data."""
    header = struct.pack(">HBB", 0, 8, array.ndim)
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(path, "wb") as f:
        f.write(header + shape + array.tobytes())


@pytest.fixture
def raw(tmp_path):
    """A folder with the two training files, of 20 images."""
    draw = np.random.default_rng(0)
    write_idx(tmp_path / IMAGES, draw.integers(0, 256, (20, 28, 28), dtype=np.uint8))
    write_idx(tmp_path / LABELS, np.arange(20, dtype=np.uint8) % 10)
    return tmp_path


# ------------------------------------------------------------------------------------ as tokens
def test_fashion_folder_and_packed_file_hold_the_tokenizers_own_tokens(raw, monkeypatch):
    monkeypatch.setitem(fashion.COUNT, "train", 20)
    teacher = load_teacher("maskbit-tiny", random_weights=True)
    tokenizer = build(teacher.spec, "tokenizer", random_weights=True).eval()
    weights, folder, packed = f"{raw}/tokenizer.pt", f"{raw}/tokens", f"{raw}/tokens.npz"
    torch.save(tokenizer.state_dict(), weights)
    for pack in (None, packed):
        fashion.main(types.SimpleNamespace(
            raw=str(raw), tokenizer_weights=weights, out=folder, pack=pack))

    x, labels, _ = load_tokens(folder, teacher)
    assert x.shape == (20, 64, 2)
    assert x.dtype == np.uint8
    assert isinstance(x, np.memmap)
    assert list(labels) == [i % 10 for i in range(20)]
    img, _ = fashion.load_images("train", str(raw))
    img = torch.from_numpy(img).float() / 255
    assert not img[:, :, :2].any()                    # padded
    assert np.array_equal(x, tokenizer.encode(img))   # and never flipped

    x_packed, labels_packed, _ = load_tokens(packed, teacher)
    assert np.array_equal(x, x_packed)
    assert np.array_equal(labels, labels_packed)
    with open(f"{folder}/meta.json") as f:
        meta = json.load(f)
    assert meta["complete"]
    assert json.loads(str(np.load(packed)["meta"])) == meta


# ------------------------------------------------------------------------------------ the raw files
def test_fashion_files_of_another_size_are_refused(raw):
    with pytest.raises(UserError, match="expected 60000 images"):
        fashion.load_images("train", str(raw))
    with pytest.raises(UserError, match="--raw"):
        fashion.load_images("train", str(raw / "nowhere"))


def test_fashion_files_that_are_short_or_damaged_are_refused(raw):
    whole = (raw / IMAGES).read_bytes()
    damaged = whole[:3000] + bytes(100) + whole[3100:]
    for content in (whole[:3000], damaged, b"", b"\x1f\x8b"):
        (raw / IMAGES).write_bytes(content)
        with pytest.raises(UserError, match="--raw"):
            fashion.load_images("train", str(raw))
