"""Memory of a training step, counted at full size without a GPU: fake tensors hold no data."""

import functools
import math
import weakref

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dimo
import soft_embed as se
from machinery.optim import Sharded, balanced, update
from machinery.processes import group_of_one
from teachers import SPECS
from tests.runs import same


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages alive."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def see(self, t):
        storage = t.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.see(t)
        return out


def halve(net):
    """net.halve(), for fake tensors."""
    for block in [*net.blocks, *net.single]:
        for m in block.modules():
            if isinstance(m, nn.Linear):
                m.weight, m.bias = (
                    nn.Parameter(p.bfloat16(), requires_grad=False) for p in (m.weight, m.bias)
                )


def trainable(net):
    """Adam over all but the frozen parameters, its moments made, as from the first step on."""
    for p in net.frozen():
        p.requires_grad_(False)
    opt = torch.optim.Adam(net.parameters(), foreach=False)
    for p in net.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    opt.step()
    opt.zero_grad()
    return opt


def test_memory_of_a_meissonic_step_at_1024_pixels_counts_well_below_80_gb():
    B, L, d, V, spec = 4, 4096, 1024, 8192, SPECS["meissonic"]
    bf16 = torch.autocast("cpu", torch.bfloat16)
    with FakeTensorMode(), LiveBytes() as live:
        teacher, student, aux, ema = (spec.Net(**spec.net) for _ in range(4))
        tokenizer = spec.Tokenizer(**spec.tokenizer)
        for m in (teacher, ema, tokenizer):
            m.requires_grad_(False)
        halve(teacher)
        student_opt, aux_opt = trainable(student), trainable(aux)
        cond = torch.empty(B, 77, 1024), torch.empty(B, 1024), torch.empty(B, 5), torch.empty(B)
        teacher.null_text, teacher.null_pooled = cond[0][:1], cond[1][:1]
        x = torch.zeros(B, L, 1).long()
        mask = torch.ones(B, L, 1).bool()
        noise = torch.empty(B, L, d)
        E, bias = (t.detach() for t in student.tables())
        embed = functools.partial(se.embed_tokens, E=E, bias=bias)

        def step():                                         # of Di[M]O, as in train.py
            live.peak = live.now
            with bf16:
                z = dimo.student_logits(student, x, cond, E, bias, 0.3, noise)
                drawn = se.sample_tokens(z.detach(), u=torch.empty(B, L, 1))
                g, _ = dimo.dimo_grad(teacher, aux, embed(drawn), cond, mask, 4.0)
                z.backward(g)
            student_opt.step()
            student_opt.zero_grad()
            with bf16:
                dimo.aux_loss(aux(embed(drawn), cond), drawn, mask).backward()
            aux_opt.step()
            aux_opt.zero_grad()
            return live.peak

        plain = step()
        for m in (teacher, student, aux, tokenizer):
            m.set_checkpointing()
        checkpointed = step()
        rest = live.now

        live.peak = rest                                    # the decoder, for rewards
        z = torch.empty(1, L, 1, V, requires_grad=True)
        tokenizer.decode(se.soft_embed(z, *tokenizer.tables())).mean().backward()
        decoder = live.peak - rest
    print(f"at rest {rest / 1e9:.1f} GB, Di[M]O step {checkpointed / 1e9:.1f} with checkpointing, "
          f"{plain / 1e9:.1f} without, decoder {decoder / 1e9:.1f} above rest")
    assert 30e9 < rest < 32e9
    assert checkpointed < 41e9 < plain < 60e9
    assert decoder < 11e9


def test_a_sharded_optimizer_skips_what_is_not_finite_and_has_the_state_dict_of_the_whole_one():
    def trained(make):
        params = [nn.Parameter(torch.ones(n)) for n in (2, 5, 3)]
        optimizer = make(params, lr=0.1, fused=True)
        for grads in ((1.0, 2.0, None), (math.inf, 1.0, None), (0.5, 1.0, None)):
            for p, g in zip(params, grads):
                p.grad = None if g is None else torch.full_like(p, g)
            update(optimizer, params, clip=1.0, lr=0.1)
        return params, optimizer.state_dict()

    with group_of_one("cpu"):
        sharded = trained(functools.partial(Sharded, torch.optim.Adam))
    assert same(sharded, trained(torch.optim.Adam))
    assert sharded[1]["state"][0]["step"] == 2 and 2 not in sharded[1]["state"]


def test_shares_of_tensors_are_balanced():
    assert balanced([1, 7, 2, 4, 1], 2) == [1, 0, 1, 1, 0]
    assert balanced([3, 3], 4) == [0, 1]
