"""Published weights: found on disk or fetched, and made to fit our modules.

A published state dict has its own names, its own packing and its trainer's luggage. Each module
says how it is called elsewhere (`published_names`, `published_extras`), and `load_state` is strict:
every tensor finds its place in its shape, or one sentence says what is missing, unexpected, or of
another shape. How a file is read without running what is in it: machinery/files.py.
"""

import contextlib
import os
import re

import torch

from machinery.errors import UserError, explain, first_line
from machinery.files import local, read_tensors


# ----------------------------------------------------------------------------- finding and fetching
HUB_FOLDERS = {"net": "transformer", "tokenizer": "vqvae", "text": "text_encoder"}
HUB_STEMS = "diffusion_pytorch_model model open_clip_model pytorch_model open_clip_pytorch_model"
HUB_KINDS = "safetensors fp16.safetensors bin"
HUB_NAMES = [f"{stem}.{kind}" for stem in HUB_STEMS.split() for kind in HUB_KINDS.split()]


def read_weights(path, role="net"):
    """The state dict in a .safetensors or torch file, or in a folder as hubs lay models out."""
    if not os.path.isdir(path):
        return read_tensors(path)
    for folder in (path, f"{path}/{HUB_FOLDERS[role]}"):
        for name in HUB_NAMES:
            if os.path.isfile(f"{folder}/{name}"):
                return read_tensors(f"{folder}/{name}")
    raise UserError(f"no weights in the folder {path}, nor in its {HUB_FOLDERS[role]}/: "
                    f"expected one of {', '.join(HUB_NAMES[:4])}, ...")


def fetch(repo, name, flag):
    """The local path of a published file: of this repository (repo None), else from the hub."""
    if repo:
        with explain(
                f"cannot download {name} from the Hugging Face hub, repository {repo} ({{}}). "
                f"Without network, fetch it elsewhere and name the file by {flag} PATH; or try "
                "sizes and speed with --random_weights", Exception):
            from huggingface_hub import hf_hub_download
            return hf_hub_download(repo, name)
    if not os.path.exists(local(name)):
        raise UserError(
            f"{name} does not ship with this version: make it (README), name a file of your "
            f"own by {flag} PATH, or add --random_weights to try the code")
    return local(name)


def download(url, digest, flag):
    """The local path of a file from the web, kept in torch's cache; its SHA-256 begins so."""
    folder = f"{torch.hub.get_dir()}/checkpoints"
    path = f"{folder}/{os.path.basename(url)}"
    try:
        if not os.path.isfile(path):
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(url, path, digest)
    except (OSError, RuntimeError) as err:      # no network, no room; another file than expected
        raise UserError(f"cannot download {url} ({first_line(err)}): fetch it elsewhere and name "
                        f"the file by {flag} PATH")
    return path


# ------------------------------------------------------------------------------------ making it fit
def renames(text):
    """Pairs "theirs ours" as rules (pattern, replacement) from published names to those here.

    * is a number, at most one per name; .x holds anywhere, x at the start. ours#i is part i of a
    packed tensor; ours^T is stored transposed (see `published_state`).
    """
    words = iter(text.split())
    rules = []
    for theirs, ours in zip(words, words):                        # two at a time
        start = "" if theirs.startswith(".") else "^"
        pattern = start + re.escape(theirs).replace(r"\*", r"(\d+)")
        rules.append((pattern, ours.replace("*", r"\1")))
    return rules


def published_state(state, module):
    """A published state dict -> (the same with this module's names, what is wrong in the file).

    Prefixes of wrappers and known extras are dropped. In `published_names`, name#i is row block i
    of a packed q, k, v, and name^T is stored transposed. 1x1 convolutions become the matrices they
    are. Two keys for one tensor (a tied output layer) must hold the same numbers.
    """
    own = module.state_dict()
    out, packed, complaints = {}, {}, []
    for original, tensor in state.items():
        key = re.sub(r"^((module|_orig_mod)\.)+", "", original)
        if re.match(getattr(module, "published_extras", "$^"), key):
            continue
        for rule in getattr(module, "published_names", ()):
            key = re.sub(*rule, key)
        if key.endswith("^T"):
            key, tensor = key[:-2], tensor.T
        part = re.search(r"#(\d)", key)
        key = re.sub(r"#\d", "", key)
        if key in own and own[key].ndim == 2 and shape_of(tensor)[2:] == (1, 1):
            tensor = tensor.flatten(1)
        if part:
            packed.setdefault(key, {})["qkv"[int(part[1])]] = tensor
        elif key in out and not torch.equal(out[key], tensor):
            complaints.append(f"two different tensors for {key}, one of them {original}")
        else:
            out[key] = tensor
    for key, parts in packed.items():
        missing = sorted({*"qkv"} - parts.keys())
        if missing:
            complaints.append(f"part {', '.join(missing)} of {key} missing")
            out[key] = own.get(key)                   # said once, that is enough
            continue
        with contextlib.suppress(RuntimeError):       # parts of unequal shapes: `key` is missing
            out[key] = torch.cat([parts[part] for part in "qkv"])
    return out, complaints


def load_state(module, state, source):
    """Copy a state dict into a module, strictly: a UserError names every kind of misfit.

    Float16 and bfloat16 tensors become the module's own dtype. source: how messages call the file.
    """
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict):
            state = state.get(wrapper, state)
    if not isinstance(state, dict):
        raise UserError(f"{source}: expected a dict of tensors, got {type(state).__name__}")
    state, complaints = published_state(state, module)
    got = {key: shape_of(tensor) for key, tensor in state.items()}
    expected = {key: shape_of(tensor) for key, tensor in module.state_dict().items()}
    misfits = {
        "missing": expected.keys() - got.keys(),
        "unexpected": got.keys() - expected.keys(),
        "of another shape": [f"{key} {got[key]} instead of {expected[key]}"
                             for key in got.keys() & expected.keys() if got[key] != expected[key]],
    }
    for what, names in misfits.items():
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            complaints.append(f"{what} {', '.join(sorted(names)[:4])}{more}")
    if complaints:
        raise UserError(f"{source} does not fit {type(module).__name__}: {'; '.join(complaints)}. "
                        "Is it another teacher's file, or another size?")
    module.load_state_dict(state)
    return module


def shape_of(tensor):
    return tuple(getattr(tensor, "shape", ()))
