"""Files: written whole or not at all, found, told apart."""

import contextlib
import functools
import hashlib
import os
import zipfile

import torch
import torch.nn as nn


from machinery.errors import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@contextlib.contextmanager
def replacing(path):
    """A file to write, which takes the name `path` only when all of it is on the disk: no kill leaves half a file."""
    with open(path + ".tmp", "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def fingerprint(arrays):
    """Twelve hex digits of the SHA-256 of arrays, or of a module's weights: files may have been renamed."""
    if isinstance(arrays, nn.Module):
        arrays = arrays.state_dict().values()
    digest = hashlib.sha256()
    for a in arrays:
        digest.update(torch.as_tensor(a).detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def local(path):
    """A path as given, or, where it does not exist, relative to this repository: so shipped files are found."""
    return path if os.path.exists(path) else os.path.join(ROOT, path)


class Inert:
    """Stands for what else a pickle mentions, such as an old trainer's callbacks: takes anything, does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


DANGEROUS = ("builtins", "os", "posix", "posixpath", "nt", "ntpath", "sys", "subprocess", "shutil", "socket", "runpy")


def read_tensors(path):
    """The contents of a .safetensors or torch file, memory-mapped, on the CPU.

    Nothing that the file contains is executed: torch's weights-only reader sees to that, and classes that it does
    not know (the published VQGAN's file refers to a trainer's callbacks) are replaced by an inert one.
    """
    if not os.path.isfile(path):
        raise UserError(f"no weights at {path}: expected a .safetensors or torch file")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        load = functools.partial(torch.load, path, map_location="cpu", weights_only=True)
        if not zipfile.is_zipfile(path):                          # before torch 1.6: cannot be mapped nor looked into
            return load()
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if code := [name for name in unknown if name.split(".")[0] in DANGEROUS]:
            raise ValueError(f"it asks to run {code[0]}: not a file of weights")
        with torch.serialization.safe_globals([(type(name.split(".")[-1], (Inert,), {}), name) for name in unknown]):
            return load(mmap=True)
    except Exception as err:       # truncated, not a checkpoint at all, or a pickle of more than tensors
        why = f"{type(err).__name__}: {(str(err).splitlines() or [''])[0][:200]}"
        raise UserError(f"cannot read {path} as weights ({why}); it may be cut short: fetch or write it again")
