"""worlds/fashion.py: its raw files, and its training set as tokens."""

import gzip
import json
import struct
import types

import numpy as np
import pytest
import torch

from machinery.errors import UserError
from networks.autoencoders import BitTokenizer
from teachers import SPECS
from tests.common import load
from worlds import fashion


def write_idx(path, array):
    with gzip.open(path, "wb") as f:
        f.write(struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(">" + "I" * array.ndim, *array.shape) + array.tobytes())


def make_raw(folder, n=20):
    """Fashion-MNIST's two training files in small, the way they are published."""
    rng = np.random.default_rng(0)
    write_idx(folder / "train-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
    write_idx(folder / "train-labels-idx1-ubyte.gz", (np.arange(n) % 10).astype(np.uint8))
    return str(folder)


def test_fashion_folder_and_packed_file_hold_the_tokenizers_own_tokens(tmp_path, monkeypatch):
    monkeypatch.setitem(fashion.COUNT, "train", 20)
    raw, torch_file = make_raw(tmp_path), str(tmp_path / "tokenizer.pt")
    tokenizer = BitTokenizer(**SPECS["maskbit-tiny"].tokenizer).eval()
    torch.save(tokenizer.state_dict(), torch_file)
    args = dict(raw=raw, tokenizer_weights=torch_file, out=str(tmp_path / "t"))
    fashion.main(types.SimpleNamespace(**args, pack=None))
    fashion.main(types.SimpleNamespace(**args, pack=str(tmp_path / "t.npz")))
    (x, y, meta), (x_packed, y_packed, _) = load(tmp_path / "t"), load(tmp_path / "t.npz")
    assert x.dtype == np.uint8 and x.shape == (20, 64, 2) and isinstance(x, np.memmap)
    assert json.loads(str(np.load(tmp_path / "t.npz")["meta"])) == meta and meta["complete"]
    assert np.array_equal(x, x_packed) and np.array_equal(y, y_packed) and list(y) == [i % 10 for i in range(20)]
    img = torch.from_numpy(fashion.load_images("train", raw)[0]).float() / 255
    assert np.array_equal(x, tokenizer.encode(img).numpy()) and not img[:, :, :2].any()      # padded, never flipped


def test_fashion_files_that_are_short_or_of_another_set_are_refused(tmp_path):
    raw = make_raw(tmp_path)
    with pytest.raises(UserError, match="expected 60000 images"):
        fashion.load_images("train", raw)
    whole = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    for broken in (whole[:3000], whole[:3000] + bytes(100) + whole[3100:], b"", b"\x1f\x8b"):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(broken)
        with pytest.raises(UserError, match="--raw"):
            fashion.load_images("train", raw)
    with pytest.raises(UserError, match="--raw"):
        fashion.load_images("train", str(tmp_path / "nowhere"))
