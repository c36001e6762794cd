"""Meissonic: transformer, rotary positions, VQ-VAE, text tower, sampler, the student's start.

Golden numbers are those of the public implementations (tests/golden/meissonic.json).
"""

import itertools

import numpy as np
import pytest
import torch

import dimo
import soft_embed as se
import teachers
from networks.blocks import rope_table, rotate
from tests.common import TableNet, agrees, close, golden, normal
from tests.small_teachers import (
    Calls,
    f32,
    first_position_last,
    small_meissonic,
    small_tower,
    small_vqvae,
    traced_sample,
)

GOLDEN = golden("meissonic")
CPU = torch.device("cpu")


def inputs():
    """Half masked tokens of an 8 x 12 grid (2, 96, 1), their embedding, and a condition."""
    rng, net = np.random.RandomState(100), small_meissonic()
    x = torch.from_numpy(rng.randint(0, 64, (2, 96, 1)))
    masked = torch.from_numpy(rng.random_sample((2, 96, 1)) < 0.5)
    text = f32(rng.standard_normal((2, 9, 48)))
    pooled = f32(rng.standard_normal((2, 64)))
    micro = torch.tensor([[1024, 1024, 0, 0, 6.0], [768, 640, 16, 32, 5.5]])
    x = x.masked_fill(masked, 64)
    return x, se.embed_tokens(x, *net.tables()), (text, pooled, micro, torch.zeros(2))


class SharedGenerator:
    """Draws tokens, and then the noise on the confidence, from one generator, as the official
    sampler does."""

    def __init__(self, seed, *shape):
        self.generator = torch.Generator().manual_seed(seed)
        self.shape, self.noise = shape, torch.empty(shape)

    def uniforms(self):
        return itertools.repeat((None, self.noise))

    def draw(self, z, temperature, u):
        p = z.softmax(-1).flatten(0, 2)
        x = torch.multinomial(p, 1, generator=self.generator).view(self.shape)
        self.noise.copy_(torch.rand(self.shape, generator=self.generator))
        return x


# --------------------------------------------------------------------------------- transformer
def test_meissonic_gives_the_golden_features_and_logits():
    net = small_meissonic()
    _, e, cond = inputs()
    with Calls(net.single) as calls:
        z = net(e, cond)
    agrees(first_position_last(z), **GOLDEN["logits"]["plain"])
    for h, expected in zip(calls.outputs, GOLDEN["single_blocks"], strict=True):
        agrees(h, **expected)                               # text and image
    features = net(e, cond, layers=(0, 1, 2, 3, 4))
    for f, expected in zip(features, GOLDEN["joint_blocks"]):
        agrees(f, **expected)                               # the image alone
    for f, h in zip(features[2:], calls.outputs, strict=True):
        assert torch.equal(f, h[:, 9:])


def test_meissonic_sees_the_time_step_times_a_thousand():
    net, expected = small_meissonic(), GOLDEN["logits"]
    _, e, cond = inputs()
    z = net(e, net.at(cond, 63))
    agrees(first_position_last(z), **expected["at_step_63"])
    z = net(e, (*cond[:3], torch.tensor([37.0, 512.0])))    # fast waves: a float32 ulp shows
    agrees(first_position_last(z), **expected["at_steps_37_and_512"])


def test_rotary_angles_are_the_golden_ones_and_turn_no_text():
    cos, sin = rope_table(9, 4, 6, (4, 6, 6), CPU)          # 9 text states, 4 x 6 places
    expected = GOLDEN["rotary"]
    agrees(cos[-1], **expected["cos_of_last"])
    agrees(sin[-1], **expected["sin_of_last"])
    agrees(cos, **expected["cos"])
    agrees(sin, **expected["sin"])
    assert (cos[:10] == 1).all() and (sin[:10] == 0).all()  # text, and the place (0, 0)


def test_rotated_queries_and_keys_know_only_their_distance():
    rope = rope_table(0, 5, 5, (4, 6, 6), CPU)
    q, k = (rotate(normal(seed, 1, 1, 1, 16).expand(1, 1, 25, 16), rope)[0, 0] for seed in (0, 1))
    scores = (q @ k.T).view(5, 5, 5, 5)                     # (row, column) of q, then of k
    assert close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], atol=1e-5)
    assert abs(scores[0, 0, 1, 0] - scores[0, 0, 0, 1]) > 0.1, "rows and columns differ"


def test_meissonic_fed_soft_tokens_gives_the_golden_logits_and_gradient():
    net, expected = small_meissonic(), GOLDEN["soft_tokens"]
    x, _, cond = inputs()
    z = (3 * normal(1100, 2, 96, 1, 64)).requires_grad_()
    out = net(se.soft_embed(z, *net.tables()), cond)
    agrees(first_position_last(out), **expected["logits"])
    agrees(torch.autograd.grad(out.square().mean(), z)[0], **expected["gradient"])
    masked = net(se.soft_embed(z, *net.tables(), x == 64), cond)
    agrees(first_position_last(masked), **expected["logits_masked"])


def test_meissonic_is_perturbed_behind_its_first_norm_and_projection():
    net = small_meissonic()
    x, _, cond = inputs()
    noise = normal(3100, 2, 64, 96).transpose(1, 2)
    z = dimo.student_logits(net, x, cond, *net.tables(), 0.3, noise)
    agrees(first_position_last(z), **GOLDEN["logits"]["perturbed"])


# ----------------------------------------------------------------------- tokenizer, text tower
def test_vqvae_gives_the_golden_latents_codes_and_images():
    rng, tokenizer, expected = np.random.RandomState(200), small_vqvae(), GOLDEN["vqvae"]
    img = f32(rng.random_sample((2, 3, 64, 96)))
    x = torch.from_numpy(rng.randint(0, 64, (2, 24, 1)))
    z = 3 * f32(rng.standard_normal((2, 24, 1, 64)))
    agrees(tokenizer.latents(img), **expected["latents"])
    found = tokenizer.encode(img)
    assert found[..., 0].tolist() == expected["codes"]
    tables = tokenizer.tables()
    for e, name in (
        (se.embed_tokens(x, *tables), "image"),
        (se.soft_embed(z, *tables), "image_of_soft_tokens"),
        (se.embed_tokens(found, *tables), "reconstruction"),
    ):
        agrees(tokenizer.decode(e, clamp=False), **expected[name])


def test_text_tower_of_meissonic_gives_the_golden_states():
    expected = GOLDEN["text_tower"]
    states, final, pooled = small_tower()(torch.tensor(expected["ids"]))
    agrees(states, **expected["states"])                    # before the last block
    agrees(final, **expected["final"])
    agrees(pooled, **expected["pooled"])                    # at the end token


# ------------------------------------------------------------------------------------- sampler
@pytest.mark.parametrize("case", GOLDEN["plans"], ids=lambda case: str(case["steps"]))
def test_meissonic_hides_the_golden_numbers_of_tokens(case):
    plan = teachers.meissonic_plan(case["units"], case["steps"])
    hidden = [step.hidden for step in plan]
    assert hidden[::8] == case["every_eighth"]
    assert sum(hidden) == case["sum"] and hidden[-1] == 0
    assert {step.w for step in plan} == {9.0}
    noise = torch.tensor([step.noise for step in teachers.meissonic_plan(64, 8)])
    assert close(noise, torch.linspace(2, 0, 8))            # golden: both ends included


@pytest.mark.parametrize("case", GOLDEN["sampling_steps"], ids=lambda case: f"t={case['t']}")
def test_a_sampling_step_from_partly_known_tokens_is_the_golden_one(case):
    z = 2 * normal(2100, 2, 64, 96).transpose(1, 2)[:, :, None]             # (2, 96, 1, 64)
    shared, net = SharedGenerator(7, 2, 96, 1), TableNet(z, z)
    known, _, _ = inputs()                                  # 50 and 43 of 96 are masked
    plan = teachers.meissonic_plan(96, 8)[7 - case["t"] :]
    cond = (torch.zeros(2),)
    end, trace = traced_sample(net, cond, plan, shared.uniforms(), shared.draw, x=known)
    x = [*trace, end][1]                                    # after one step
    x = x.masked_fill(x == 64, 79)                          # the golden numbers call the mask 79
    assert x.sum((1, 2)).tolist() == case["sums"]
    assert x[0, 12:24, 0].tolist() == case["row"]


def test_meissonic_from_prompt_to_tokens_is_the_golden_one():
    net, tower = small_meissonic((8, 8)), small_tower()
    prompt, _, empty = torch.tensor(GOLDEN["text_tower"]["ids"]).split(1)
    cond = net.condition(*tower(prompt))
    net.null_text, net.null_pooled = net.condition(*tower(empty))[:2]
    shared = SharedGenerator(11, 1, 64, 1)
    plan = teachers.meissonic_plan(64, 6)
    x, _ = traced_sample(net, cond, plan, shared.uniforms(), shared.draw)
    assert x.view(8, 8).tolist() == GOLDEN["from_prompt_to_tokens"]


class StepCounter:
    """A net of two tokens that remembers the times it was asked at."""

    V, G, L, at = 2, 1, 4, teachers.Meissonic.at

    def __init__(self):
        self.times = []

    def tables(self):
        return torch.zeros(1, 3, 1), 0.0

    def __call__(self, e, cond):
        self.times += cond[3].tolist()
        return torch.zeros(len(e), 4, 1, 2)


def test_meissonics_sampler_counts_its_steps_down_to_zero():
    net = StepCounter()
    cond = (torch.zeros(1, 2, 8), torch.zeros(1, 8), torch.zeros(1, 5), torch.zeros(1))
    teachers.sample(net, cond, teachers.meissonic_plan(4, 4, guidance=1))
    assert net.times == [3, 2, 1, 0]


# --------------------------------------------------------------------------------- the student
def test_official_start_of_meissonics_student_is_initial_tokens():
    torch.manual_seed(5)
    tokens = torch.randint(0, 64, (2, 64, 1), dtype=torch.float32).long()
    scores = torch.rand(2, 64).argsort(1)[..., None]
    x = dimo.initial_tokens(tokens, 0.6, scores, 79)
    expected = GOLDEN["student_start"]
    assert (x == 79).sum((1, 2)).tolist() == expected["masked"]
    assert x[0, :16, 0].tolist() == expected["first_16_of_the_first"]
    assert x[1, 48:, 0].tolist() == expected["last_16_of_the_second"]
