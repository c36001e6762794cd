"""Errors are sentences: what was expected, what came, what to do. Every script runs behind the one `guard` here."""

import os
import re
import sys

import torch
import torch.distributed as dist


class UserError(Exception):
    """Something the user can mend. Scripts print its sentence and exit with 2, without a stack trace."""


def first_line(err, most=200):
    """The beginning of an error's message, on one line."""
    return (str(err).splitlines() or [""])[0][:most]


def peer_is_gone(err):
    """Is this RuntimeError what a process hears, in its next collective, when another of the group has died?"""
    heard = re.search(r"closed by peer|reset by peer|timed? ?out|NCCL|remote process", str(err))
    return dist.is_initialized() and heard is not None


def guard(main, out_of_memory="take a smaller --batch", cannot_write="nothing that was there before is damaged",
          peer_lost="start all processes again"):
    """Run a script's main(). What the user can mend ends in one sentence and exit code 2, a lost peer in 3, Ctrl-C in 130.

    The three hints say what helps in this script: where memory is full, where the disk is, where a process died.
    """
    name = os.path.basename(sys.argv[0])

    def leave(code, sentence):
        print(f"{name}: {sentence}", file=sys.stderr)
        sys.exit(code)

    try:
        main()
    except UserError as err:
        leave(2, err)
    except torch.OutOfMemoryError as err:
        leave(2, f"{first_line(err)} To need less memory, {out_of_memory}")
    except RuntimeError as err:
        if type(err).__module__.startswith(("torch._dynamo", "torch._inductor")):
            leave(2, f"--compile failed ({first_line(err)}): --no-compile does without")
        if not peer_is_gone(err):
            raise
        leave(3, f"another process is gone ({first_line(err)}). Its own message says why: {peer_lost}")
    except OSError as err:
        leave(2, f"{err}; {cannot_write}")
    except KeyboardInterrupt:
        leave(130, "stopped")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
