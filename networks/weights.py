"""Published weights: files from anywhere, read without running what is in them, and made to fit our modules.

A published state dict has its own names, its own packing and its trainer's luggage. Each module says how it is called
elsewhere (`published_names`, `published_extras`), and `load_state` is strict: every tensor finds its place in its
shape, or one sentence says what is missing, unexpected, or other. Also here: how this repository writes a file
(`replacing`) and tells two models apart (`fingerprint`).
"""

import itertools
import os
import re

import torch

from machinery.errors import UserError
from machinery.files import read_tensors, local


FOLDERS = {"net": "transformer", "tokenizer": "vqvae", "text": "text_encoder"}               # as hubs lay models out
NAMES = tuple(f"{stem}.{kind}" for stem in ("diffusion_pytorch_model", "model", "open_clip_model", "pytorch_model",
              "open_clip_pytorch_model") for kind in ("safetensors", "fp16.safetensors", "bin"))


def read_weights(path, role="net"):
    """The state dict in a .safetensors or torch file, or in a hub's folder of such, memory-mapped, on the CPU.

    Nothing that the file contains is executed: torch's weights-only reader sees to that, and classes that it does
    not know (the published VQGAN's file refers to a trainer's callbacks) are replaced by an inert one.
    """
    if os.path.isdir(path):
        found = [p for folder in ("", FOLDERS[role]) for name in NAMES
                 if os.path.isfile(p := os.path.join(path, folder, name))]
        if not found:
            raise UserError(f"no weights in the folder {path}, nor in its {FOLDERS[role]}/: expected one of "
                            f"{', '.join(NAMES[:4])}, ...")
        path = found[0]
    return read_tensors(path)


def fetch(repo, name, flag):
    """The local path of a published file: from this repository's assets (repo None), else from the hub."""
    if repo is None:
        if not os.path.exists(local(name)):
            raise UserError(f"{name} does not ship with this version: make it (README), name a file of your own by {flag} "
                            "PATH, or add --random_weights to try the code")
        return local(name)
    try:
        from huggingface_hub import hf_hub_download
        return hf_hub_download(repo, name)
    except Exception as err:
        raise UserError(f"cannot download {name} from the Hugging Face hub, repository {repo} "
                        f"({type(err).__name__}). Without network, fetch it elsewhere and name the file by {flag} PATH; "
                        "or try sizes and speed with --random_weights")


def renames(text):
    """Pairs "theirs ours" as rules that lead from published names to those here.

    * is a number; .x holds anywhere, x at the start. ours#i is part i of a packed tensor; ours^T is stored transposed
    (see `published_state`).
    """
    words, rules = text.split(), []
    for theirs, ours in zip(words[::2], words[1::2]):
        numbers = itertools.count(1)
        rules.append(("^" * (theirs[0] != ".") + re.escape(theirs).replace(r"\*", r"(\d+)"),
                      re.sub(r"\*", lambda _: rf"\{next(numbers)}", ours)))
    return rules


def published_state(state, module):
    """(a published state dict with this module's names, prefixes and known extras dropped; what is wrong in itself).

    In `published_names`, name#i is row block i of a packed tensor, name^T is stored transposed. 1x1 convolutions
    become the matrices they are. Two keys for one tensor (a tied output layer) must hold the same numbers.
    """
    own, out, parts, complaints = module.state_dict(), {}, {}, []
    for original, tensor in state.items():
        key = re.sub(r"^((module|_orig_mod)\.)+", "", original)
        if re.match(getattr(module, "published_extras", r"$^"), key):
            continue
        for pattern, name in getattr(module, "published_names", ()):
            key = re.sub(pattern, name, key)
        if key.endswith("^T"):
            key, tensor = key[:-2], tensor.T
        if (part := re.search(r"#(\d)", key)) and isinstance(tensor, torch.Tensor):
            parts.setdefault(re.sub(r"#\d", "", key), {})[int(part[1])] = tensor
            continue
        if key in own and own[key].ndim == 2 and getattr(tensor, "ndim", 0) == 4 and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)
        if key in out and not tensor.is_meta and not torch.equal(out[key], tensor):
            complaints.append(f"two different tensors for {key}, one of them {original}")
        out[key] = tensor
    for key, rows in parts.items():
        if missing := {0, 1, 2} - rows.keys():
            complaints.append(f"part {', '.join('qkv'[i] for i in sorted(missing))} of {key} missing")
            rows |= {i: torch.empty_like(next(iter(rows.values()))) for i in missing}         # said once, enough
        if len({t.shape[1:] for t in rows.values()}) == 1:
            out[key] = torch.cat([rows[i].flatten(1) if rows[i].ndim == 4 else rows[i] for i in sorted(rows)])
    return out, complaints


def load_state(module, state, source):
    """Copy a state dict into a module, strictly; a UserError names what is missing, unexpected, or of another shape.

    Float16 and bfloat16 tensors become the module's own dtype. `source` is how messages call the file.
    """
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and not isinstance(state.get(wrapper, 0), (int, torch.Tensor)):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise UserError(f"{source}: expected a dict of tensors, got {type(state).__name__}")
    (state, complaints), own = published_state(state, module), module.state_dict()
    few = lambda names: ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    shape = lambda t: tuple(getattr(t, "shape", ()))
    misshapen = {k: shape(state[k]) for k in own.keys() & state.keys() if shape(own[k]) != shape(state[k])}
    if missing := own.keys() - state.keys():
        complaints.append(f"missing {few(missing)}")
    if unexpected := state.keys() - own.keys():
        complaints.append(f"unexpected {few(unexpected)}")
    if misshapen:
        complaints.append("of another shape "
                          + few([f"{k} {v} instead of {shape(own[k])}" for k, v in misshapen.items()]))
    if complaints:
        raise UserError(f"{source} does not fit {type(module).__name__}: " + "; ".join(complaints)
                        + ". Is it another teacher's file, or another size?")
    module.load_state_dict(state)
    return module


def download(url, digest, flag):
    """The local path of a file from the web, kept in torch's cache."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if not os.path.isfile(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path, digest)
        except (OSError, RuntimeError) as err:        # no network, no room; another file than expected
            raise UserError(f"cannot download {url} ({' '.join(str(err).split())[:200]}): fetch it elsewhere and name "
                            f"the file by {flag} PATH")
    return path
