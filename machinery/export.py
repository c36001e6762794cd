"""A model as one file that runs without this repository."""

import torch
import torch.nn as nn

from machinery.errors import UserError
from machinery.files import replacing


class Program(nn.Module):
    """A function of a tensor, and the networks whose weights it uses, as one module."""

    def __init__(self, function, networks):
        super().__init__()
        self.function = function
        self.networks = nn.ModuleList(m for m in networks if m is not None)

    def forward(self, inputs):
        return self.function(inputs)


def seeded(model, inputs):
    """What the model gives for twice the inputs, its random numbers fixed."""
    torch.manual_seed(0)
    return model(torch.cat([inputs, inputs]))


@torch.no_grad()
def export_program(function, networks, inputs, path):
    """Write a function as a file of torch.export, for any batch from 2 on.

    networks are those whose weights it uses, inputs (n, ...) is an example. The file runs on the
    kind of device on which it was written, and torch.manual_seed fixes what it draws. The program
    is compared with the function before it is kept.
    """
    model = Program(function, networks).eval()
    dynamic = {0: torch.export.Dim("batch", min=2)}
    with torch.random.fork_rng():
        # called before it is traced: tensors that networks keep from call to call must be real
        expected = seeded(model, inputs)
        program = torch.export.export(model, (inputs,), dynamic_shapes=(dynamic,), strict=False)
        exported = seeded(program.module(), inputs)
    if not torch.equal(expected, exported):
        raise UserError(
            f"--export {path}: the exported program draws other images than the student; "
            "nothing is written"
        )
    try:
        with replacing(path) as f:
            torch.export.save(program, f)
    except OSError as err:
        raise UserError(f"--export {path}: cannot write there ({err.strerror})")
