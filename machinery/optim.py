"""What is trained, and how it moves: learning rates, one update, the average of a network's
weights.
"""

import contextlib
import functools
import math

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from machinery.processes import broadcast, gather, is_main, joined, rank, world_size
from machinery.profile import phase


def lr_factor(n, warmup, steps, end=1.0):
    """Share of the learning rate at update n: linear warm-up from 0, then constant, or a cosine
    down to the share `end`.
    """
    if n < warmup:
        return n / warmup
    progress = (n - warmup) / max(steps - warmup, 1)
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def ema_update(ema, net, n, decay):
    """ema <- rate ema + (1 - rate) net at update n = 0, 1, ...

    # choice: the rate rises to `decay` by the ramp of the official code; the paper names 0.9999
    # alone, which it reaches at n = 89,990.
    """
    rate = min(decay, (1 + n) / (10 + n))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - rate)


class Muon:
    """Matrices by Muon (Jordan et al. 2024) with steps of Adam's size; the rest by Adam.

    Changes nothing where found_inf is 1, as fused Adam does. # choice: torch's Muon does not read
    found_inf on the device, so here the host waits for it: this optimizer is for the tiny worlds.
    """

    found_inf = None

    def __init__(self, params, lr, betas, eps, weight_decay, fused):
        matrices = [p for p in params if p.ndim == 2]
        rest = [p for p in params if p.ndim != 2]
        self.parts = (torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw"),
                      torch.optim.Adam(rest, lr, betas, eps, weight_decay, fused=fused))

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        if not self.found_inf:
            for part in self.parts:
                part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


def balanced(sizes, n):
    """Which of n processes has each tensor: the largest first, each to the one that has least."""
    load = [0] * n
    owner = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner[i] = load.index(min(load))
        load[owner[i]] += sizes[i]
    return owner


class Sharded:
    """ZeRO, stage 1: each process has the state of some tensors and updates these; then it sends
    them to the others.

    make: Adam or AdamW. To send, the tensors of a process are copied into one. That takes as much
    memory as the network, when no activations are alive.
    """

    found_inf = None

    def __init__(self, make, params, **settings):
        self.params = params
        self.owner = balanced([p.numel() for p in params], world_size())
        self.shares = [[] for _ in range(world_size())]
        for p, owner in zip(params, self.owner):
            self.shares[owner].append(p)
        self.own = make([dict(params=self.shares[rank()])], **settings)      # may be none
        self.param_groups = self.own.param_groups

    @torch.no_grad()
    def step(self):
        self.own.found_inf = self.found_inf
        self.own.step()
        shares = [share for share in self.shares if share]            # the last may have none
        flat = [torch.cat([p.flatten() for p in share]) for share in shares]
        sent = [broadcast(t, owner) for owner, t in enumerate(flat)]
        for share, t, work in zip(shares, flat, sent):
            work.wait()
            parts = t.split([p.numel() for p in share])
            torch._foreach_copy_(share, [new.view_as(p) for p, new in zip(share, parts)])

    def zero_grad(self, set_to_none=True):
        for p in self.params:
            p.grad = None

    def state_dict(self):
        """That of the optimizer that is not sharded, on the host of the main process; every process
        must call it.
        """
        known = gather([i for i, p in enumerate(self.params) if p in self.own.state])
        state = {}
        for i in sorted(sum(known, [])):
            p = self.params[i]
            empty = dict(step=p.new_empty(()), exp_avg=torch.empty_like(p),
                         exp_avg_sq=torch.empty_like(p))
            parts = self.own.state.get(p, empty)
            for t in parts.values():
                broadcast(t, self.owner[i]).wait()
            if is_main():
                state[i] = {key: t.cpu() for key, t in parts.items()}
        (group,) = self.own.state_dict()["param_groups"]
        return dict(state=state, param_groups=[group | dict(params=list(range(len(self.params))))])

    def load_state_dict(self, state):
        """Keep one's own part; torch moves it, with the fused optimizer's `step`, to the device."""
        mine = [i for i, owner in enumerate(self.owner) if owner == rank()]
        own = {n: state["state"][i] for n, i in enumerate(mine) if i in state["state"]}
        (group,) = state["param_groups"]
        group = group | dict(params=list(range(len(mine))))
        self.own.load_state_dict(dict(state=own, param_groups=[group]))
        self.param_groups = self.own.param_groups


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}


def update(optimizer, params, clip, lr):
    """Clip the gradient to the norm `clip` and step, unless it is not finite; returns its norm
    before clipping.

    The norm is a tensor on the device, and the host does not wait for it: fused Adam reads
    found_inf there, and changes nothing where that is 1. Under DDP the gradient is the average
    over processes, so all see the same norm and decide alike. # choice: all three networks are
    clipped (App. H.1 does not say which); the official code clips the student alone.
    """
    norm = torch.nn.utils.clip_grad_norm_(params, clip)
    optimizer.found_inf = (~torch.isfinite(norm)).float()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class Trained:
    """A network in training: the module itself, `model` to call where gradients must be averaged,
    and its optimizer.

    With several processes `model` is the DDP wrapper. Calling the bare module there would
    silently train each alone.
    """

    def __init__(self, module, c, lr, beta1=0.9):
        self.module = self.model = module
        self.lr = lr
        self.params = [p for p in module.parameters() if p.requires_grad]
        # choice: eps of the official code, and weight decay for all three; Tab. 5 tells neither
        make = OPTIMIZERS[c.optimizer]
        if c.zero and joined():
            make = functools.partial(Sharded, make)
        self.optimizer = make(self.params, lr=lr, betas=(beta1, 0.999), eps=1e-6,
                              weight_decay=c.weight_decay, fused=True)

    def wrap(self, device):
        if joined():
            devices = [device.index] if device.type == "cuda" else None
            self.model = DDP(self.module, devices, gradient_as_bucket_view=True)

    def syncing(self, last):
        """Under accumulation gradients travel between processes once per step, with the last
        micro-batch.
        """
        if world_size() == 1 or last:
            return contextlib.nullcontext()
        return self.model.no_sync()

    @phase("updates")
    def update(self, clip, factor):
        """One update at `factor` times the learning rate; returns the gradient's norm before
        clipping.
        """
        return update(self.optimizer, self.params, clip, self.lr * factor)
