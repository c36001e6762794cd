"""Runs that survive: a checkpoint replaces the old one whole or not at all, and the log is cut
back to it.
"""

import contextlib
import json
import os
import threading

import torch

from machinery.errors import UserError
from machinery.files import read_tensors, replacing

FORMAT = 1              # another number where older checkpoints cannot be resumed any more
FIXED = ("teacher", "recipe", "seed", "batch", "gan", "heads", "head_width", "head_mlp",
         "optimizer")


def due(step, every, last):
    """Is it time, after `step` updates? At every `every`-th, and at the last."""
    return step % every == 0 or step >= last


def save_checkpoint(path, state):
    """Write beside the old checkpoint, then rename: a kill or a full disk at any moment leaves
    the old one whole.
    """
    try:
        with replacing(path) as f:
            torch.save(state, f)
    except (OSError, RuntimeError) as err:            # the latter where torch finds the disk full
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        raise UserError(f"could not write {path} ({err}); is the disk full? The previous "
                        "checkpoint is untouched: make room and go on with --resume")


def on_host(value):
    """A copy of nested dicts and lists, tensors on the host; those of a GPU in pinned memory."""
    if isinstance(value, dict):
        return {key: on_host(part) for key, part in value.items()}
    if isinstance(value, list):
        return [on_host(part) for part in value]
    if not torch.is_tensor(value):
        return value
    copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return copy.copy_(value, non_blocking=True)


class Writer:
    """Writes checkpoints in a thread, from a copy of the state, while training goes on.

    What goes wrong in the thread is raised by the next `check`, `save` or `wait`.
    """

    def __init__(self):
        self.thread = self.error = None

    def save(self, path, state):
        self.wait()
        state = on_host(state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()                  # the copies are complete
        self.thread = threading.Thread(target=self.write, args=(path, state), name="checkpoint")
        self.thread.start()

    def write(self, path, state):
        try:
            save_checkpoint(path, state)
        except Exception as err:
            self.error = err

    def check(self):
        if self.error:
            raise self.error

    def wait(self):
        if self.thread:
            self.thread.join()
        self.check()


def resumed_settings(path, given):
    """The settings of a checkpoint, under the flags `given` now; those that would make it another
    run are refused.
    """
    state = read_tensors(path)
    if "config" not in state:
        raise UserError(f"{path} holds weights, not a checkpoint of train.py: start from them by "
                        "--init_from")
    if state.get("format") != FORMAT:
        raise UserError(f"{path} was written by another version of train.py (format "
                        f"{state.get('format')}, here {FORMAT}): finish it with that version, or "
                        f"start from its weights by --init_from {path}")
    # a checkpoint says what to read, not where to write
    config = state["config"] | dict(out=os.path.dirname(path))
    if config["text_cache"] != "off":
        config["text_cache"] = "memory"
    for key in FIXED:
        if key in given and given[key] != config[key]:
            raise UserError(f"{path} is a run with --{key} {config[key]}, and now --{key} is "
                            f"{given[key]}: leave the flag out, or start another run in another "
                            "--out")
    return config | given


def restarted(path):
    """Is this a restart by torchrun --max-restarts, of a run that has the checkpoint `path`
    already?

    On several nodes each torchrun counts only the restarts that its own processes caused. What
    all share is the name of the launch (--rdzv_id), which the checkpoint has too.
    """
    env = os.environ
    if not os.path.exists(path) or "TORCHELASTIC_RUN_ID" not in env:
        return False
    if env["GROUP_WORLD_SIZE"] == "1":
        return env["TORCHELASTIC_RESTART_COUNT"] != "0"
    return read_tensors(path).get("launch") == env["TORCHELASTIC_RUN_ID"]


# ---------------------------------------------------------------------------------------- the log
def trim_log(path, step):
    """Keep the whole lines of a log up to `step`: what a killed run wrote after its checkpoint is
    done again.
    """
    if not os.path.exists(path):
        return
    keep = []
    with open(path) as f:
        for line in f:
            with contextlib.suppress(ValueError):     # half a line
                if json.loads(line).get("step", 0) <= step:
                    keep.append(line)
    with replacing(path) as f:
        f.write("".join(keep).encode())


def logged_evaluations(path):
    """The evaluations in a log: its rows that name a model."""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [row for row in map(json.loads, f) if "model" in row]
