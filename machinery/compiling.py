"""torch.compile for training: one graph per network and shape, and never a silent way back."""

import contextlib

import torch

# Student, auxiliary and teacher share one code object, so torch counts their graphs together: six
# in a run of MaskBit with a GAN. Its own limit is eight.
GRAPHS = 64


def compile_in_place(*networks):
    """Compile networks where they are, so that the keys of their state dicts stay.

    DDP would split each graph at its buckets, one of MaskBit's into 14, so that gradients travel
    during the backward pass. Here they travel after it. An estimate for MaskBit on four H100s: 6 ms
    each for student and auxiliary (a ring moves 1.8 GB per GPU at 300 GB/s), in a step of some 330.
    What is gained is one graph to fuse and to compile.

    The backward pass is compiled outside of autocast. By default torch traces it inside, and the
    float32 islands of a bf16 network would get bf16 gradients.
    """
    dynamo = torch._dynamo.config
    dynamo.optimize_ddp = False
    dynamo.recompile_limit = GRAPHS
    dynamo.fail_on_recompile_limit_hit = True
    torch._functorch.config.backward_pass_autocast = "off"
    for network in networks:
        network.compile(dynamic=False)                # one graph per shape: there are two or three


def eagerly(compiled):
    """A context in which `compiled` networks run as they are written: evaluations have batches of
    other sizes, and each would be compiled.
    """
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
