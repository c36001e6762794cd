"""Learning rates, optimizers, averages."""

import math

import torch


def lr_factor(n, warmup, steps, end=1.0):
    """Linear warm-up (the first update has rate 0), then constant, or a cosine down to the share `end`."""
    if n < warmup:
        return n / warmup
    return end + (1 - end) * (1 + math.cos(math.pi * (n - warmup) / max(steps - warmup, 1))) / 2


@torch.no_grad()
def ema_update(ema, net, n, decay):
    """ema <- rate ema + (1 - rate) net, with the official ramp rate = min(decay, (1 + n) / (10 + n)), n = 0, 1, ..."""
    rate = min(decay, (1 + n) / (10 + n))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - rate)


class Muon:
    """Matrices by Muon (Jordan et al. 2024), momentum made orthogonal and as large as Adam's steps; the rest by Adam.

    Changes nothing where found_inf is 1, as fused Adam. # choice: torch's Muon does not read it on the device, so here
    the host waits for it: this optimizer is for the tiny worlds.
    """

    found_inf = None

    def __init__(self, params, lr, betas, eps, weight_decay, fused):
        matrices, rest = ([p for p in params if (p.ndim == 2) == wanted] for wanted in (True, False))
        self.parts = (torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw"),
                      torch.optim.Adam(rest, lr, betas, eps, weight_decay, fused=fused))

    param_groups = property(lambda self: [group for part in self.parts for group in part.param_groups])

    def step(self):
        for part in () if self.found_inf else self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


def update(opt, params, clip, lr):
    """Clip and step, unless the gradient is not finite; returns its norm before clipping, and 1 if it is not, else 0.

    Both are tensors of the device, and the host does not wait for them: fused Adam reads found_inf there, and changes
    nothing where it is 1. Under DDP the gradient is the average over processes, so all see the same norm, decide alike.
    # choice: all three networks are clipped (App. H.1 does not say which); the official code clips the student alone.
    """
    norm = torch.nn.utils.clip_grad_norm_(params, clip)
    found_inf = getattr(opt, "optim", opt).found_inf = (~torch.isfinite(norm)).float()        # .optim: behind --zero
    for group in opt.param_groups:
        group["lr"] = lr
    opt.step()
    opt.zero_grad(set_to_none=True)
    return norm, found_inf
