"""Real tokens and the conditions of training: the folder that every script of data/ writes, and how train.py reads it.

    tokens.npy    (N, L, G) the tokens, uint8 where V <= 256, else uint16; opened as a memory map, never read whole
    labels.npy    (N,)      class ids; for a text teacher lines of prompts.txt, counted from 0
    meta.json     which teacher and tokenizer (sha256 of its weights), V, L, G, classes, n = N, and "complete"
    prompts.txt   for a text teacher, a prompt a line

The same arrays in one .npz will do (`prompts` an array of strings). A folder without meta.json is unfinished.
"""

import hashlib
import json
import lzma
import math
import os
import zipfile

import numpy as np
import torch

from machinery.errors import UserError
from machinery.files import fingerprint, local, replacing
from machinery.processes import send
from teachers import SPECS, build


def load_tokenizer(name, path=None, random_weights=False):
    """The frozen tokenizer of the teacher called `name`, without the teacher, which data do not need."""
    return build(SPECS[name], "tokenizer", path, random_weights).eval().requires_grad_(False)


def describe(tokenizer, name, source):
    """The part of meta.json that follows from the tokenizer: tokens of other weights must not be taken for these."""
    spec, sha256 = SPECS[name], hashlib.sha256()
    for key, tensor in sorted(tokenizer.state_dict().items()):
        sha256.update(key.encode() + tensor.cpu().numpy().tobytes())
    device = next(tokenizer.parameters()).device
    L, G = tokenizer.encode(torch.zeros(1, *spec.image, device=device)).shape[1:]
    return dict(teacher=name, V=tokenizer.V, L=L, G=G, classes=spec.classes, source=source, tokenizer=sha256.hexdigest())


def token_dtype(V):
    return np.dtype(np.uint8 if V <= 256 else np.uint16)


def write_folder(out, tokens, labels, meta):
    """tokens.npy, labels.npy and meta.json; without its meta.json a folder counts as unfinished, so it comes last."""
    os.makedirs(out, exist_ok=True)
    if os.path.exists(os.path.join(out, "meta.json")):
        os.remove(os.path.join(out, "meta.json"))
    for name, array in (("tokens.npy", tokens), ("labels.npy", labels)):
        with replacing(os.path.join(out, name)) as f:
            np.save(f, array)
    with replacing(os.path.join(out, "meta.json")) as f:
        f.write(json.dumps(meta, indent=1).encode())


def write_packed(f, **arrays):
    """np.savez_compressed by LZMA, which is a sixth smaller here; np.load reads it as it reads any .npz."""
    with zipfile.ZipFile(f, "w", zipfile.ZIP_LZMA) as packed:
        for name, array in arrays.items():
            with packed.open(f"{name}.npy", "w", force_zip64=True) as part:
                np.lib.format.write_array(part, np.asarray(array))


class RealTokens:
    """Real tokens x (n, L, G), memory-mapped, and their conditions, in an order that is a function of (seed, index)."""

    def __init__(self, path, teacher, seed):
        self.x, self.labels, self.prompts = load_tokens(path, teacher) if path else synthetic_tokens(teacher)
        self.conditions = teacher.conditions(self.prompts)
        self.V, self.seed, self.epoch, self.order = teacher.net.V, seed, None, None

    def batch(self, start, count):
        """Tokens (count, L, G) on the device, and which of `conditions` they belong to, on the host."""
        rows = []
        for i in range(start, start + count):
            epoch, k = divmod(i, len(self.labels))
            if epoch != self.epoch:
                self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.labels))
                self.epoch = epoch
            rows.append(self.order[k])
        x, labels = (a[rows].astype(np.int64) for a in (self.x, self.labels))
        if x.max() >= self.V or x.min() < 0:
            raise UserError(f"--data: a token {x.max()} among rows {rows}, where all are below {self.V}: the file is damaged, "
                            "make it again")
        return send(torch.from_numpy(x), self.conditions.device), torch.from_numpy(labels)


def synthetic_prompts():
    return [f"prompt {i}" for i in range(64)]


def synthetic_tokens(teacher, n=1024):
    """As load_tokens, drawn at random: for --profile."""
    draw, prompts = np.random.default_rng(0), synthetic_prompts() if teacher.text else None
    count = len(prompts) if prompts else teacher.spec.classes
    return draw.integers(teacher.net.V, size=(n, teacher.net.L, teacher.net.G)), draw.integers(count, size=n), prompts


def load_tokens(path, teacher):
    """(tokens (n, L, G), labels (n,), prompts) of a folder that data/*.py wrote, memory-mapped, or of a packed .npz.

    For a text teacher a label is the line of prompts.txt beside the tokens; otherwise prompts is None.
    """
    net, text, prompts = teacher.net, teacher.text is not None, None
    path, meta = local(path), {}
    try:
        if os.path.isdir(path):
            x, labels = (np.load(os.path.join(path, f"{k}.npy"), mmap_mode="r") for k in ("tokens", "labels"))
            with open(os.path.join(path, "meta.json")) as f:
                meta = json.load(f)
            if text:
                with open(os.path.join(path, "prompts.txt"), encoding="utf-8") as f:
                    prompts = f.read().splitlines()
        else:
            with np.load(path) as f:
                x, labels = f["tokens"], f["labels"]
                meta = json.loads(str(f["meta"])) if "meta" in f else {}
                prompts = f["prompts"].tolist() if text else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, lzma.LZMAError) as err:
        raise UserError(f"--data {path}: cannot read real tokens{' with their prompts' * text} ({err}); prepare them "
                        "with " + ("data/prompts.py --images" if text else "worlds/fashion.py or data/imagenet.py"))
    if not meta.get("complete", True):
        raise UserError(f"--data {path}: these tokens are unfinished; run the command that makes them again, it goes on")
    if x.shape[1:] != (net.L, net.G) or len(x) != len(labels) or len(x) == 0 or meta.get("V", net.V) != net.V:
        raise UserError(f"--data {path}: expected tokens (n, {net.L}, {net.G}) below {net.V} and n labels, got {x.shape} "
                        f"and {labels.shape}{meta.get('teacher', '') and ' of ' + meta['teacher']}; were they made with "
                        "this teacher's tokenizer?")
    if x.dtype.kind not in "ui" or labels.dtype.kind not in "ui":
        raise UserError(f"--data {path}: expected integers, got tokens of {x.dtype} and labels of {labels.dtype}")
    if int(labels.max()) >= (known := len(prompts) if text else teacher.spec.classes):
        raise UserError(f"--data {path}: label {int(labels.max())}, but {known} {'prompts' if text else 'classes'}")
    return x, labels, prompts


class TextFeatures:
    """The conditions that prompts stand for, each prompt encoded once: when first drawn, kept in memory or in a folder.

    16 prompts at a time, always, so that a prompt's features are the same bits whichever others are new with it, and a
    resumed run stays exact. conditions (n, context) are token ids. In a folder (`--text_cache`) features outlive the run,
    for the same prompts and tower: a sparse file for each part of the condition, the last says which rows are filled in.
    """

    CHUNK = 16

    def __init__(self, teacher, conditions, cache="memory", limit=16e9):
        self.teacher, self.conditions, self.parts, self.why = teacher, conditions, None, None
        if cache == "off" or teacher.text is None:
            return
        first, n = [part[:1].cpu() for part in teacher.cond(conditions[:1])], len(conditions)
        shapes = [((n, *part.shape[1:]), part.dtype) for part in first] + [((n,), torch.bool)]
        if cache == "memory":                         # untouched pages take none
            if (size := n * sum(part.nbytes for part in first)) > limit:
                self.why = (f"the features of {n:,} prompts would take {size / 1e9:.0f} GB of memory: each is encoded whenever "
                            "it is drawn. --text_cache FOLDER keeps them on disk")
                return
            *self.parts, self.known = (torch.zeros(shape, dtype=dtype) for shape, dtype in shapes)
        else:
            folder = os.path.join(cache, f"{teacher.spec.name}-{fingerprint([conditions, *first])}")
            os.makedirs(folder, exist_ok=True)
            *self.parts, self.known = (
                torch.from_file(os.path.join(folder, f"{i}.bin"), True, math.prod(shape), dtype=dtype).view(shape)
                for i, (shape, dtype) in enumerate(shapes))

    def __call__(self, which):
        """cond of rows `which` (B,) of the conditions, a tensor on the host."""
        device = self.conditions.device
        if self.parts is None:
            return self.teacher.cond(self.conditions[send(which, device)])
        for new in filter(len, which[~self.known[which]].unique().split(self.CHUNK)):
            full = new[torch.arange(self.CHUNK) % len(new)]
            for part, c in zip(self.parts, self.teacher.cond(self.conditions[send(full, device)])):
                part[new] = c[: len(new)].cpu()
            self.known[new] = True                    # after the features: a killed run leaves no holes
        return tuple(send(part[which], device) for part in self.parts)
