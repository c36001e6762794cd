"""Errors are sentences: what was expected, what came, what to do. Scripts run behind `guard`."""

import contextlib
import os
import re
import sys
import threading
import traceback

import torch
import torch.distributed as dist

from machinery.processes import joined


class UserError(Exception):
    """Something the user can mend: scripts print its sentence and exit with 2, no stack trace."""


def first_line(err, most=200):
    """The beginning of an error's message, on one line."""
    return (str(err).splitlines() or [""])[0][:most]


@contextlib.contextmanager
def explain(sentence, *errors):
    """Turn `errors` (OSError and ValueError, if none are named) into a UserError.

    {} in the sentence stands for the reason: "cannot read x.json ({}): expected a list".
    """
    try:
        yield
    except errors or (OSError, ValueError) as err:
        raise UserError(sentence.replace("{}", f"{type(err).__name__}: {first_line(err)}"))


def peer_is_gone(err):
    """Is this what a process hears in its next collective when another of the group has died?"""
    heard = re.search(r"closed by peer|reset by peer|timed? ?out|NCCL|remote process", str(err))
    return joined() and heard is not None


def explained(err, out_of_memory, peer_lost, cannot_write):
    """(exit code, sentence) for what the user can mend; None for a mistake of ours."""
    if isinstance(err, UserError):
        return 2, str(err)
    if isinstance(err, torch.OutOfMemoryError):
        return 2, f"{first_line(err)} To need less memory, {out_of_memory}"
    if type(err).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return 2, f"--compile failed ({first_line(err)}): --no-compile does without"
    if isinstance(err, RuntimeError) and peer_is_gone(err):
        return 3, (f"another process is gone ({first_line(err)}). Its own message says why: "
                   f"{peer_lost}")
    if isinstance(err, OSError):
        return 2, f"{err}; {cannot_write}"
    if isinstance(err, KeyboardInterrupt):
        return 130, "stopped"
    return None


def leave(code):
    """Exit. Out of a process group at once: to destroy it would wait for the others, and they wait
    for this process. Only a checkpoint that is being written is finished first.
    """
    if not joined():
        sys.exit(code)
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def guard(main, out_of_memory="take a smaller --batch", peer_lost="start all processes again",
          cannot_write="nothing that was there before is damaged"):
    """Run a script's main(); what goes wrong ends in one sentence where the user can mend it.

    Exit codes: 2 for such a sentence, 3 where another process is gone, 130 for Ctrl-C. The three
    hints say what helps in this script: memory is full, a process died, the disk is full.
    """
    try:
        main()
    except (Exception, KeyboardInterrupt) as err:
        found = explained(err, out_of_memory, peer_lost, cannot_write)
        if found:
            code, sentence = found
            print(f"{os.path.basename(sys.argv[0])}: {sentence}", file=sys.stderr)
            leave(code)
        if not joined():
            raise
        traceback.print_exc()
        leave(1)
    if joined():
        dist.destroy_process_group()
