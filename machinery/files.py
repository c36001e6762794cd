"""Files: found, told apart, written whole or not at all, and read without being run."""

import contextlib
import hashlib
import os
import re
import zipfile

import torch
import torch.nn as nn
from safetensors.torch import load_file

from machinery.errors import UserError, explain

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))            # of this repository


def local(path):
    """A path as given or, where it does not exist, in this repository: shipped files are there."""
    return path if os.path.exists(path) else os.path.join(ROOT, path)


def file_name(words):
    """Words as the name of a file: what is neither a letter, a digit, _ nor . becomes a dash."""
    return re.sub(r"[^\w.]+", "-", words)


@contextlib.contextmanager
def replacing(path):
    """A file to write. It is called `path` only when all of it is on the disk: no half files."""
    with open(path + ".tmp", "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def fingerprint(arrays):
    """Twelve hex digits of the SHA-256 of arrays, or of a module's weights: names of files lie."""
    if isinstance(arrays, nn.Module):
        arrays = arrays.state_dict().values()
    digest = hashlib.sha256()
    for array in arrays:
        tensor = torch.as_tensor(array).detach().cpu().contiguous()
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------------------------- reading weights
# A torch file is a pickle, and a pickle can ask for any call. torch's weights-only reader allows
# tensors and plain containers. Published files mention more than that (the VQGAN's, its trainer's
# callbacks): what the reader does not know is replaced by a class that does nothing, unless its
# module gives away a payload.
DANGEROUS = "builtins os posix posixpath nt ntpath sys subprocess shutil socket runpy".split()


class Inert:
    """Stands for what else a pickle mentions: takes anything, does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read_tensors(path):
    """What is in a .safetensors or torch file, memory-mapped, on the CPU; none of it is run."""
    if not os.path.isfile(path):
        raise UserError(f"no weights at {path}: expected a .safetensors or torch file")
    # Exception: truncated, no checkpoint, or a pickle of more than tensors
    with explain(f"cannot read {path} as weights ({{}}); it may be cut short: fetch or write it "
                 "again", Exception):
        return load_file(path) if path.endswith(".safetensors") else read_pickle(path)


def read_pickle(path):
    """A torch file by the weights-only reader; classes it does not know are replaced by Inert."""
    mapped = zipfile.is_zipfile(path)         # before torch 1.6: cannot be mapped nor looked into
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if mapped else []
    for name in unknown:
        if name.split(".")[0] in DANGEROUS:
            raise ValueError(f"it asks to run {name}: not a file of weights")
    with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
