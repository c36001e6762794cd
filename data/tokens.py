"""Real images as tokens, and prompts as features: the folder that scripts write and training reads.

    tokens.npy    (N, L, G) the tokens, uint8 where V <= 256, else uint16; read as a memory map
    labels.npy    (N,)      class ids; for a text teacher lines of prompts.txt, counted from 0
    meta.json     teacher, sha256 of its tokenizer's weights, V, L, G, classes, n = N, "complete"
    prompts.txt   for a text teacher, one prompt per line
    skipped.txt   images that could not be read, and why

The same arrays in one .npz will do (`prompts` an array of strings). A folder without meta.json is
unfinished: it is removed first and written last.
"""

import functools
import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from machinery.errors import UserError, explain
from machinery.files import fingerprint, local, replacing
from machinery.flags import add_device, add_weights, check_device, positive_int
from machinery.processes import send, true_float32
from teachers import SPECS, build


# ---------------------------------------------------------------------------------------- writing
def tokenizer_flags(ap, teachers, default):
    """The flags of every script that turns images into tokens."""
    add = ap.add_argument
    add("--teacher", default=default, choices=teachers,
        help="whose tokenizer and image size (%(default)s)")
    add_weights(add, "tokenizer")
    add("--random_weights", action="store_true",
        help="untrained tokenizer: to try speed before a download")
    add("--batch", type=positive_int, default=64,
        help="images that the tokenizer takes at a time (%(default)s)")
    add_device(add)


def load_tokenizer(name, path=None, random_weights=False, device="cpu"):
    """The frozen tokenizer of the teacher called `name`, without the teacher."""
    check_device(device)
    tokenizer = build(SPECS[name], "tokenizer", path, random_weights)
    return tokenizer.eval().requires_grad_(False).to(device)


def encode(tokenizer, pixels, batch=64):
    """uint8 images (n, C, H, W) -> tokens (n, L, G), a numpy array.

    # choice: in true float32, without TF32: a folder of tokens is kept, and a bit is a sign.
    """
    device = next(tokenizer.parameters()).device
    with true_float32():
        x = [tokenizer.encode(part.to(device).float() / 255) for part in pixels.split(batch)]
    x = torch.cat(x)
    return x.cpu().numpy().astype(token_dtype(tokenizer.V))


def describe(tokenizer, name, source):
    """What meta.json says of the tokenizer: tokens of other weights must not be taken for these."""
    spec, sha256 = SPECS[name], hashlib.sha256()
    for key, tensor in sorted(tokenizer.state_dict().items()):
        sha256.update(key.encode() + tensor.cpu().numpy().tobytes())
    _, L, G = encode(tokenizer, torch.zeros(1, *spec.image, dtype=torch.uint8)).shape
    return dict(teacher=name, V=tokenizer.V, L=L, G=G, classes=spec.classes, source=source,
                tokenizer=sha256.hexdigest())


def token_dtype(V):
    return np.min_scalar_type(V - 1)


def begin_folder(out):
    """Make a folder for tokens. What an older meta.json claims of it no longer holds."""
    os.makedirs(out, exist_ok=True)
    for name in ("meta.json", "skipped.txt"):
        Path(f"{out}/{name}").unlink(missing_ok=True)


def write_lines(path, lines):
    """A text file, where there is a line to write; names of files can be any bytes."""
    if lines:
        with replacing(path) as f:
            f.writelines(f"{line}\n".encode(errors="surrogateescape") for line in lines)


def save_array(path, array):
    try:
        with replacing(path) as f:
            np.save(f, array)
    finally:                                          # on a full disk, give back what was written
        Path(f"{path}.tmp").unlink(missing_ok=True)


def write_meta(out, meta):
    with replacing(f"{out}/meta.json") as f:
        f.write(json.dumps(meta, indent=1).encode())


def write_folder(out, tokens, labels, meta, texts={}):
    """All files of a folder; texts is {file name: lines}.

    meta.json, the claim that the folder is whole, goes first and comes last.
    """
    begin_folder(out)
    for name, lines in texts.items():
        write_lines(f"{out}/{name}", lines)
    save_array(f"{out}/tokens.npy", tokens)
    save_array(f"{out}/labels.npy", labels)
    write_meta(out, meta)


def write_packed(f, **arrays):
    """np.savez_compressed by LZMA, a sixth smaller here; np.load reads it like any .npz."""
    with zipfile.ZipFile(f, "w", zipfile.ZIP_LZMA) as packed:
        for name, array in arrays.items():
            with packed.open(f"{name}.npy", "w", force_zip64=True) as part:
                np.lib.format.write_array(part, np.asarray(array))


# ---------------------------------------------------------------------------------------- reading
def read_arrays(path, text):
    """(tokens, labels, prompts, meta) as they stand in a folder, memory-mapped, or in an .npz."""
    prompts = None
    if os.path.isdir(path):
        x = np.load(f"{path}/tokens.npy", mmap_mode="r")
        labels = np.load(f"{path}/labels.npy", mmap_mode="r")
        meta = Path(f"{path}/meta.json").read_text()
        if text:
            prompts = Path(f"{path}/prompts.txt").read_text("utf-8").splitlines()
    else:
        with np.load(path) as f:
            x, labels, meta = f["tokens"], f["labels"], f.get("meta", "{}")
            if text:
                prompts = f["prompts"].tolist()
    return x, labels, prompts, json.loads(str(meta))


def load_tokens(path, teacher):
    """Tokens (n, L, G), labels (n,) and prompts for this teacher: from a folder, or a packed .npz.

    Labels are classes and prompts are None, or labels are lines of the prompts. UserError where the
    tokens are unfinished, damaged, or not this teacher's.
    """
    net, text, path = teacher.net, teacher.text is not None, local(path)
    what, maker = "real tokens", "worlds/fashion.py or data/imagenet.py"
    if text:
        what, maker = "real tokens with their prompts", "data/prompts.py --images"
    # Any exception: numpy, zipfile, lzma and json have one each for a broken file.
    with explain(f"--data {path}: cannot read {what} ({{}}); prepare them with {maker}", Exception):
        x, labels, prompts, meta = read_arrays(path, text)
    if not meta.get("complete", True):
        raise UserError(f"--data {path}: these tokens are unfinished; run the command that makes "
                        "them again, it goes on")
    fits = x.shape[1:] == (net.L, net.G) and len(x) == len(labels) > 0
    if not fits or meta.get("V", net.V) != net.V:
        origin = meta.get("teacher", "unknown origin")
        raise UserError(f"--data {path}: expected tokens (n, {net.L}, {net.G}) below {net.V} and n "
                        f"labels, got {x.shape} and {labels.shape} of {origin}; were they made "
                        "with this teacher's tokenizer?")
    if x.dtype.kind not in "ui" or labels.dtype.kind not in "ui":
        raise UserError(f"--data {path}: expected integers, got tokens of {x.dtype} and labels of "
                        f"{labels.dtype}")
    known = len(prompts) if text else teacher.spec.classes
    if labels.max() >= known:
        raise UserError(f"--data {path}: label {labels.max()}, but {known} "
                        f"{'prompts' if text else 'classes'}")
    return x, labels, prompts


def synthetic_prompts():
    return [f"prompt {i}" for i in range(64)]


def synthetic_tokens(teacher):
    """Drawn at random, as load_tokens returns them: for --profile."""
    net, n, draw = teacher.net, 1024, np.random.default_rng(0)
    prompts = synthetic_prompts() if teacher.text else None
    x = draw.integers(net.V, size=(n, net.L, net.G))
    return x, draw.integers(len(teacher.conditions(prompts)), size=n), prompts


class RealTokens:
    """Real tokens x (n, L, G) and their conditions, in an order that (seed, index) determine."""

    def __init__(self, path, teacher, seed):
        self.x, self.labels, self.prompts = (
            load_tokens(path, teacher) if path else synthetic_tokens(teacher))
        self.conditions = teacher.conditions(self.prompts)
        self.V, self.seed = teacher.net.V, seed

    @functools.lru_cache(maxsize=1)
    def order(self, epoch):
        """Each epoch is shuffled anew."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.labels))

    def batch(self, start, count):
        """Tokens (count, L, G) on the device; and which of `conditions` are theirs, on the host."""
        n = len(self.labels)
        places = [self.order(i // n)[i % n] for i in range(start, start + count)]
        x = self.x[places].astype(np.int64)
        labels = torch.from_numpy(self.labels[places].astype(np.int64))
        if x.max() >= self.V or x.min() < 0:
            raise UserError(f"--data: a token {x.max()} among rows {places}, where all are below "
                            f"{self.V}: the file is damaged, make it again")
        return send(torch.from_numpy(x), self.conditions.device), labels


# ---------------------------------------------------------------------------------------- prompts
CHUNK = 16                                            # prompts that are encoded at a time


class TextFeatures:
    """The conditions that prompts stand for. Each prompt is encoded once, when it is first drawn.

    Always CHUNK prompts at a time: a prompt's features are the same bits whichever others are new
    with it, and a resumed run stays exact. conditions (n, context) are token ids. Features are kept
    in memory, or in a folder (--text_cache), where they outlive the run, for the same prompts and
    text encoder: a sparse file for each part of the condition, and one that says which rows are
    filled in.
    """

    def __init__(self, teacher, conditions, cache="memory", limit=16e9):
        self.teacher, self.conditions = teacher, conditions
        self.parts = self.why = None                  # why: they are not kept
        if cache == "off" or teacher.text is None:
            return
        n, first = len(conditions), [part[:1].cpu() for part in teacher.cond(conditions[:1])]
        size = n * sum(part.nbytes for part in first)
        if cache == "memory" and size > limit:
            self.why = (f"the features of {n:,} prompts would take {size / 1e9:.0f} GB of memory: "
                        "each is encoded whenever it is drawn. --text_cache FOLDER keeps them on "
                        "disk")
            return
        folder = f"{cache}/{teacher.spec.name}-{fingerprint([conditions, *first])}"
        first.append(torch.zeros(1, dtype=torch.bool))            # known: is this row filled in?
        kept = []                                     # n rows for each of these, zero until then
        for i, part in enumerate(first):
            shape = n, *part.shape[1:]
            if cache == "memory":
                kept.append(part.new_zeros(shape))
            else:
                os.makedirs(folder, exist_ok=True)
                file = torch.from_file(
                    f"{folder}/{i}.bin", True, n * part.numel(), dtype=part.dtype)
                kept.append(file.view(shape))
        *self.parts, self.known = kept

    def __call__(self, which):
        """cond of rows `which` (B,) of the conditions, a tensor on the host."""
        device = self.conditions.device
        if self.parts is None:
            return self.teacher.cond(self.conditions[send(which, device)])
        new = which[~self.known[which]].unique()
        for start in range(0, len(new), CHUNK):
            some = new[start : start + CHUNK]
            full = some[torch.arange(CHUNK) % len(some)]
            cond = self.teacher.cond(self.conditions[send(full, device)])
            for kept, part in zip(self.parts, cond):
                kept[some] = part[: len(some)].cpu()
            self.known[some] = True                   # after the features: a kill leaves no holes
        return tuple(send(part[which], device) for part in self.parts)
