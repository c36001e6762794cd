"""The multi-step sampler that all four teachers share, and the Halton baseline.

What each paper's plan holds is tested with its teacher: test_maskbit.py and so on.
"""

import pytest
import torch

import soft_embed as se
import teachers
from networks import samplers
from machinery.errors import UserError
from tests.common import golden, mini_net, tiny_teacher, uniform
from tests.small_teachers import count_masks, small_maskgit, traced_sample


class Coin:
    """A full-size grid of coins, V = 2: conditional logits (1, 0), unconditional (0, 0)."""

    V, G, L = 2, 2, 256

    def __init__(self):
        self.batches = []

    def tables(self):
        return torch.zeros(2, 3, 1), torch.zeros(1)

    def null(self, cond):
        return (torch.ones_like(cond[0]),)

    def at(self, cond, t):
        return cond

    def __call__(self, e, cond):
        self.batches.append(len(e))
        conditional = (cond[0] == 0).float().view(-1, 1, 1, 1)
        return torch.tensor([1.0, 0.0]) * conditional.expand(-1, 256, 2, 1)


# ----------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize("schedule", ["arccos", "cosine", "linear", "square", "root"])
def test_sampling_ratios_are_the_golden_ones(schedule):
    ratios = [float(samplers.schedule_ratio(q, schedule)) for q in (0.25, 0.5, 0.75, 1.0)]
    floored = [max(ratio, 1e-6) for ratio in ratios]        # as MaskBit's code does: of no effect
    expected = golden("maskbit")["ratios"][schedule]
    assert floored == pytest.approx(expected, rel=1e-9, abs=6e-7)


def test_sampler_reveals_a_unit_every_step_until_one_is_left():
    net, plan = mini_net(), teachers.maskbit_plan(8, 12)    # 8 units, more steps than that
    assert [step.hidden for step in plan] == [7, 6, 5, 4, 3, 2, 1, 1, 1, 1, 1, 0]
    pairs = [uniform(i, 2, 1, 4, 2) for i in range(12)]
    _, trace = traced_sample(net, (torch.tensor([0]),), plan, pairs)
    left = [8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1, 1]
    assert count_masks(trace, net.V) == [[n] for n in left]


@pytest.mark.parametrize("guidance, batches", [
    ([4, 4, 4, 4], [2, 2, 2, 2]),
    ([1, 2, 3, 4], [1, 2, 2, 2]),
    ([1, 1, 1, 1], [1, 1, 1, 1]),
])
def test_sampler_applies_the_plans_guidance_and_temperature_and_may_go_without(guidance, batches):
    seen, net = [], Coin()                                  # first guided logits, by step

    def watching(z, temperature, u):
        seen.append((z.flatten()[0].item(), temperature))
        return se.sample_tokens(z, temperature, u)

    plan = [
        step._replace(w=w, divide=0.5, draw=0.7)
        for step, w in zip(teachers.maskbit_plan(512, 4), guidance)
    ]
    traced_sample(net, (torch.tensor([0]),), plan, draw=watching)
    assert seen == [(2 * w, 0.7) for w in guidance]
    assert net.batches == batches


def test_no_guidance_is_w_1_in_every_step():
    assert {step.w for step in teachers.maskbit_plan(512, 4, guidance=0.0)} == {1}


# ------------------------------------------------------------------------------ Halton's order
@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (8, 8), (16, 16), (32, 32), (8, 12)])
def test_halton_order_visits_every_cell(grid):
    order = teachers.halton_order(grid)
    cells = grid[0] * grid[1]
    assert order.shape == (cells, 1)
    assert set(order[:, 0].tolist()) == set(range(cells))


def test_halton_order_begins_as_by_hand():
    points = [(1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9),
              (5/8, 7/9), (3/8, 2/9), (7/8, 5/9), (1/16, 8/9)]
    cells = [4 * int(4 * a) + int(4 * b) for a, b in points]
    assert cells == [9, 6, 12, 1, 11, 4, 14, 3]             # row-major, all different
    assert teachers.halton_order((4, 4))[cells, 0].tolist() == list(range(8))
    wide = [8 * int(2 * a) + int(8 * b) for a, b in points[:4]]             # 2 rows, 8 columns
    assert wide == [10, 5, 8, 3]
    assert teachers.halton_order((2, 8))[wide, 0].tolist() == [0, 1, 2, 3]


def test_given_an_order_the_sampler_keeps_the_lowest_ranks_first():
    def never_the_mask(z, temperature, u):
        return z[..., :32].argmax(-1)

    net = small_maskgit()
    order = teachers.halton_order(net.grid)
    plan = teachers.maskbit_plan(16, 6, guidance=2.0, temperature=5.0)
    cond = (torch.tensor([1, 2]),)
    x, trace = traced_sample(net, cond, plan, draw=never_the_mask, order=order)
    assert (x < 32).all()
    for t, hidden in zip(trace, [16, *(step.hidden for step in plan)]):
        assert ((t < 32) == (order < 16 - hidden)).all()


def test_a_teacher_samples_in_order_of_confidence_unless_asked_for_haltons():
    teacher = tiny_teacher("maskgit-tiny")
    asked = torch.arange(2)

    def draw(**how):
        generator = torch.Generator().manual_seed(0)
        return teachers.generate_teacher(teacher, asked, 4, generator=generator, **how)

    assert torch.equal(draw(), draw(order="confidence"))
    assert not torch.equal(draw(), draw(order="halton"))
    teacher = tiny_teacher("maskgen-tiny")
    asked = teacher.conditions(["a cat"])
    with pytest.raises(UserError, match="--order halton needs a grid of tokens, and maskgen-tiny"):
        draw(order="halton")
