"""Checkpoints and logs that survive."""

import contextlib
import json
import os

import torch

from machinery.errors import UserError
from machinery.files import read_tensors, replacing



FORMAT = 1              # of the checkpoint; another number where an older one cannot be resumed any more


def save_checkpoint(path, state):
    """Write beside the old checkpoint, then rename: a kill or a full disk at any moment leaves the old one whole."""
    try:
        with replacing(path) as f:
            torch.save(state, f)
    except (OSError, RuntimeError) as err:            # torch's own writer reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        raise UserError(f"could not write {path} ({err}); is the disk full? The previous checkpoint is untouched: "
                        "make room and go on with --resume")


def trim_log(path, step):
    """Keep the whole lines of log.jsonl up to `step`: what a killed run wrote after its checkpoint is done again."""
    if os.path.exists(path):
        keep = []
        with open(path) as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    if json.loads(line).get("step", 0) <= step:
                        keep.append(line)
        with replacing(path) as f:
            f.write("".join(keep).encode())


def logged(path):
    """The evaluations in log.jsonl."""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [row for row in map(json.loads, f) if "model" in row]


def restarted(path):
    """Is this a restart by torchrun --max-restarts, of a run that has the checkpoint `path` already?

    On several nodes each torchrun counts only the restarts that its own processes caused. What all share is the name of
    the launch (--rdzv_id), which the checkpoint has too.
    """
    env = os.environ
    if not os.path.exists(path) or "TORCHELASTIC_RUN_ID" not in env:
        return False
    if env["GROUP_WORLD_SIZE"] == "1":
        return env["TORCHELASTIC_RESTART_COUNT"] != "0"
    return read_tensors(path).get("launch") == env["TORCHELASTIC_RUN_ID"]
