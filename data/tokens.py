"""Real images as tokens, and prompts as features: the folder that scripts write and training reads.

    tokens.npy    (N, L, G) the tokens, uint8 where V <= 256, else uint16; read as a memory map
    labels.npy    (N,)      class ids; for a text teacher lines of prompts.txt, counted from 0
    meta.json     teacher, sha256 of its tokenizer's weights, V, L, G, classes, n = N, "complete"
    prompts.txt   for a text teacher, one prompt per line
    skipped.txt   images that could not be read, and why

The same arrays in one .npz will do (`prompts` an array of strings). A folder without meta.json is
unfinished: it is removed first and written last.
"""

import hashlib
import json
import lzma
import math
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from machinery.errors import UserError
from machinery.files import fingerprint, local, replacing
from machinery.flags import check_device, default_device, positive_int
from machinery.processes import send
from teachers import SPECS, build


# ---------------------------------------------------------------------------------------- writing
def tokenizer_flags(ap, teachers, default):
    """The flags of every script that turns images into tokens."""
    add = ap.add_argument
    add("--teacher", default=default, choices=teachers,
        help="whose tokenizer and image size (%(default)s)")
    add("--tokenizer_weights", metavar="PATH", help="local file instead of the published tokenizer")
    add("--random_weights", action="store_true",
        help="untrained tokenizer: to try speed before a download")
    add("--batch", type=positive_int, default=64,
        help="images that the tokenizer takes at a time (%(default)s)")
    add("--device", choices=["cuda", "cpu"], default=default_device(),
        help="where the tokenizer runs (%(default)s)")


def load_tokenizer(name, path=None, random_weights=False):
    """The frozen tokenizer of the teacher called `name`, without the teacher."""
    return build(SPECS[name], "tokenizer", path, random_weights).eval().requires_grad_(False)


def tokenizer_of(args):
    """The tokenizer that tokenizer_flags name, on its device."""
    check_device(args.device)
    tokenizer = load_tokenizer(args.teacher, args.tokenizer_weights, args.random_weights)
    return tokenizer.to(args.device)


def encode(tokenizer, pixels, batch=64):
    """uint8 images (n, C, H, W) -> tokens (n, L, G), numpy to numpy."""
    device, parts = next(tokenizer.parameters()).device, torch.from_numpy(pixels).split(batch)
    x = torch.cat([tokenizer.encode(part.to(device).float() / 255) for part in parts])
    return x.cpu().numpy()


def describe(tokenizer, name, source):
    """What meta.json says of the tokenizer: tokens of other weights must not be taken for these."""
    spec, sha256 = SPECS[name], hashlib.sha256()
    for key, tensor in sorted(tokenizer.state_dict().items()):
        sha256.update(key.encode() + tensor.cpu().numpy().tobytes())
    _, L, G = encode(tokenizer, np.zeros((1, *spec.image), np.uint8)).shape
    sizes = dict(V=tokenizer.V, L=L, G=G, classes=spec.classes)
    return dict(teacher=name, **sizes, source=source, tokenizer=sha256.hexdigest())


def token_dtype(V):
    return np.dtype(np.uint8 if V <= 256 else np.uint16)


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
    for name, array in (("tokens", tokens), ("labels", labels)):
        with replacing(f"{out}/{name}.npy") as f:
            np.save(f, array)
    write_meta(out, meta)


def write_packed(f, **arrays):
    """np.savez_compressed by LZMA, a sixth smaller here; np.load reads it like any .npz."""
    with zipfile.ZipFile(f, "w", zipfile.ZIP_LZMA) as packed:
        for name, array in arrays.items():
            with packed.open(f"{name}.npy", "w", force_zip64=True) as part:
                np.lib.format.write_array(part, np.asarray(array))


# ---------------------------------------------------------------------------------------- reading
class Loaded(NamedTuple):
    tokens: np.ndarray                                # (n, L, G)
    labels: np.ndarray                                # (n,) classes, or lines of the prompts
    prompts: list | None                              # None for class teachers


def read_arrays(path, text):
    """(Loaded, meta) as they stand in a folder, memory-mapped, or in an .npz."""
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
    return Loaded(x, labels, prompts), json.loads(str(meta))


def load_tokens(path, teacher):
    """Loaded, for this teacher, from a folder that a script wrote, or from a packed .npz.

    UserError where the tokens are unfinished, damaged, or not this teacher's.
    """
    net, text = teacher.net, teacher.text is not None
    what, maker = "real tokens", "worlds/fashion.py or data/imagenet.py"
    if text:
        what, maker = "real tokens with their prompts", "data/prompts.py --images"
    path = local(path)
    try:
        loaded, meta = read_arrays(path, text)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, lzma.LZMAError) as err:
        raise UserError(f"--data {path}: cannot read {what} ({err}); prepare them with {maker}")
    x, labels, prompts = loaded
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
    return loaded


def synthetic_prompts():
    return [f"prompt {i}" for i in range(64)]


def synthetic_tokens(teacher, n=1024):
    """Loaded, drawn at random: for --profile."""
    prompts = synthetic_prompts() if teacher.text else None
    known = len(prompts) if prompts else teacher.spec.classes
    draw, net = np.random.default_rng(0), teacher.net
    x = draw.integers(net.V, size=(n, net.L, net.G))
    return Loaded(x, draw.integers(known, size=n), prompts)


class RealTokens:
    """Real tokens x (n, L, G) and their conditions, in an order that (seed, index) determine."""

    def __init__(self, path, teacher, seed):
        loaded = load_tokens(path, teacher) if path else synthetic_tokens(teacher)
        self.x, self.labels, self.prompts = loaded
        self.conditions = teacher.conditions(self.prompts)
        self.V, self.seed, self.epoch = teacher.net.V, seed, None

    def place(self, i):
        """Where the i-th image of training is; each epoch is shuffled anew."""
        epoch, k = divmod(i, len(self.labels))
        if epoch != self.epoch:
            shuffle = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, shuffle.permutation(len(self.labels))
        return self.order[k]

    def batch(self, start, count):
        """Tokens (count, L, G) on the device; and which of `conditions` are theirs, on the host."""
        places = [self.place(i) for i in range(start, start + count)]
        x = self.x[places].astype(np.int64)
        labels = self.labels[places].astype(np.int64)
        if x.max() >= self.V or x.min() < 0:
            raise UserError(f"--data: a token {x.max()} among rows {places}, where all are below "
                            f"{self.V}: the file is damaged, make it again")
        return send(torch.from_numpy(x), self.conditions.device), torch.from_numpy(labels)


# ---------------------------------------------------------------------------------------- prompts
class TextFeatures:
    """The conditions that prompts stand for. Each prompt is encoded once, when it is first drawn.

    Always 16 prompts at a time: a prompt's features are the same bits whichever others are new
    with it, and a resumed run stays exact. conditions (n, context) are token ids. Features are kept
    in memory, or in a folder (--text_cache), where they outlive the run, for the same prompts and
    text encoder: a sparse file for each part of the condition, and one that says which rows are
    filled in.
    """

    CHUNK = 16

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
        if cache != "memory":
            cache += f"/{teacher.spec.name}-{fingerprint([conditions, *first])}"
            os.makedirs(cache, exist_ok=True)

        def rows(i, part):
            """n rows of the i-th part, zero until they are filled in."""
            shape, kind = (n, *part.shape[1:]), part.dtype
            if cache == "memory":
                return torch.zeros(shape, dtype=kind)             # untouched pages take none
            file = torch.from_file(f"{cache}/{i}.bin", True, math.prod(shape), dtype=kind)
            return file.view(shape)

        first.append(torch.zeros(1, dtype=torch.bool))            # known: is this row filled in?
        *self.parts, self.known = [rows(i, part) for i, part in enumerate(first)]

    def __call__(self, which):
        """cond of rows `which` (B,) of the conditions, a tensor on the host."""
        device = self.conditions.device
        if self.parts is None:
            return self.teacher.cond(self.conditions[send(which, device)])
        new = which[~self.known[which]].unique()
        for start in range(0, len(new), self.CHUNK):
            some = new[start : start + self.CHUNK]
            full = some[torch.arange(self.CHUNK) % len(some)]
            cond = self.teacher.cond(self.conditions[send(full, device)])
            for kept, part in zip(self.parts, cond):
                kept[some] = part[: len(some)].cpu()
            self.known[some] = True                   # after the features: a kill leaves no holes
        return tuple(send(part[which], device) for part in self.parts)
