"""Command lines: each flag declares what it takes, once, and argparse says which flag was wrong
and how.
"""

import argparse
import math

import torch

from machinery.errors import UserError


def number(low=-math.inf, high=math.inf, kind=float, above=False):
    """An argparse type: a finite number from `low` to `high`; with above=True, `low` itself is
    not enough.
    """
    def parse(text):
        value = kind(text)
        inside = low < value <= high if above else low <= value <= high
        if not (inside and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"expected {words}, got {text}")
        return value

    what = "a whole number" if kind is int else "a number"
    if above:
        words = f"{what} above {low:g}"
    elif high < math.inf:
        words = f"{what} from {low:g} to {high:g}"
    elif low > -math.inf:
        words = f"{what} of {low:g} or more"
    else:
        words = "a finite number"
    parse.__name__ = what                             # argparse: "invalid a number value: 'x'"
    return parse


positive = number(0, above=True)
nonnegative = number(0)
share = number(0, 1)
positive_int = number(1, kind=int)
nonnegative_int = number(0, kind=int)


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device):
    """Complain of --device cuda where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; take --device cpu")


# ------------------------------------------------------------------------- what scripts have in common
def parser(description):
    """An argparse parser that shows a module's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_device(add):
    add("--device", choices=["cuda", "cpu"], default=default_device(),
        help="where to compute (%(default)s)")


def add_weights(add, *names):
    """--NAME_weights for networks whose published files may be replaced by local ones."""
    for name in names:
        add(f"--{name}_weights", metavar="PATH", help="local file instead of the published one")


def add_teacher_files(add):
    """The flags whose values teachers.load_teacher takes: where the networks come from."""
    add_weights(add, "teacher", "tokenizer", "text")
    add("--text_activation", choices=["gelu", "quick_gelu"],
        help="activation of the text encoder, where its files leave it open")
    add("--random_weights", action="store_true", help="no files at all: to try memory and speed")


# --------------------------------------------------------------------- a recipe between default and flag
class Flags:
    """Flags that come last: where one is not given, a recipe may speak before the default does.

    So argparse leaves out what was not given, and the defaults stand in `defaults`.
    """

    def __init__(self, description):
        self.parser = parser(description)
        self.defaults = {}

    def group(self, title):
        self.title = self.parser.add_argument_group(title)

    def add(self, name, default, kind, help, **more):
        """kind: bool for a switch, a list of choices, or an argparse type with its range."""
        if kind is bool:
            more["action"] = argparse.BooleanOptionalAction
        elif isinstance(kind, list):
            more["choices"] = kind
        else:
            more["type"] = kind
        self.title.add_argument(
            f"--{name}", default=argparse.SUPPRESS, help=f"{help} (default: {default})", **more)
        self.defaults[name] = default
