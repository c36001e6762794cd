"""MaskGen: the transformer, TA-TiTok, the text tower with either activation, the sampler.

Golden numbers are those of the public implementations (tests/golden/maskgen.json).
"""

import functools

import numpy as np
import pytest
import torch

import dimo
import soft_embed as se
import teachers
from networks.blocks import sinusoid
from networks.text import TextTower
from teachers import SPECS
from tests.common import agrees, filled, golden, open_clip_file, uniform
from tests.small_teachers import count_masks, f32, small_maskgen, small_titok, traced_sample

GOLDEN = golden("maskgen")


@functools.cache
def text_outputs(quick_gelu):
    """The three outputs of the text tower for two prompts and the empty one."""
    sizes = dict(width=32, heads=4, depth=3, out=32, vocab=64, context=9)
    tower = filled(TextTower, open_clip_file, quick_gelu=quick_gelu, **sizes)
    return tower(torch.tensor(GOLDEN["text_tower"]["ids"]))


def prompted():
    """The network, with the empty prompt in it, and the condition of the two prompts."""
    net = small_maskgen()
    cond = net.condition(*text_outputs(True))
    net.null_text, net.null_pooled = cond[0][2:], cond[1][2:]
    return net, tuple(c[:2] for c in cond)


def inputs():
    """Tokens (2, 12, 1), partly masked, and a condition."""
    rng = np.random.RandomState(101)
    x = torch.from_numpy(rng.randint(0, 40, (2, 12, 1)))
    masked = torch.from_numpy(rng.random_sample((2, 12, 1)) < 0.6)
    text = f32(rng.standard_normal((2, 9, 32)))
    pooled = f32(rng.standard_normal((2, 32)))
    return x.masked_fill(masked, 40), (text, pooled, torch.tensor([6.5, 5.2]), None)


# ------------------------------------------------------------------------------------ networks
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_tower_of_maskgen_gives_the_golden_states_with_either_activation(activation):
    states, final, pooled = text_outputs(activation == "quick_gelu")
    expected = GOLDEN["text_tower"][activation]
    agrees(states, **expected["states"])
    agrees(final, **expected["final"])
    agrees(pooled, **expected["pooled"])


def test_maskgen_gives_the_golden_features_and_logits():
    net = small_maskgen()
    x, cond = inputs()
    e = se.embed_tokens(x, *net.tables())
    agrees(net(e, cond), **GOLDEN["logits"]["plain"])
    features = net(e, cond, layers=(0, 1, 2))
    for f, expected in zip(features, GOLDEN["blocks"], strict=True):
        agrees(f, **expected)
    cos, sin = sinusoid(100 * torch.tensor([6.5, 5.0]), 256, period=1000.0)
    agrees(torch.cat([sin, cos], 1), **GOLDEN["waves_of_scores"])


def test_maskgen_fed_soft_tokens_gives_the_golden_numbers():
    net = small_maskgen()
    x, cond = inputs()
    z = f32(3 * np.random.RandomState(102).standard_normal((2, 12, 1, 40)))
    agrees(se.soft_embed(z, *net.tables()), **GOLDEN["soft_embedding"])
    logits = net(se.soft_embed(z, *net.tables(), x == 40), cond)
    agrees(logits, **GOLDEN["logits"]["of_soft_tokens"])


def test_maskgens_decoder_fed_tokens_hard_or_soft_gives_the_golden_images():
    tokenizer, expected = small_titok(), GOLDEN["titok"]
    z = f32(3 * np.random.RandomState(102).standard_normal((2, 12, 1, 40)))
    rng = np.random.RandomState(105)
    x = torch.from_numpy(rng.randint(0, 40, (2, 12, 1)))
    guide = f32(rng.standard_normal((2, 9, 32)))
    hard = se.embed_tokens(x, *tokenizer.tables())
    soft = se.soft_embed(z, *tokenizer.tables())
    agrees(soft, **expected["soft_embedding"])
    agrees(tokenizer.decode(hard, (guide,), clamp=False), **expected["image"])
    agrees(tokenizer.decode(soft, (guide,), clamp=False), **expected["image_of_soft_tokens"])


def test_titok_gives_the_golden_latents_and_codes():
    img = uniform(104, 2, 3, 16, 16).float()
    expected = GOLDEN["titok"]
    agrees(small_titok().latents(img).transpose(1, 2), **expected["latents"])
    assert small_titok().encode(img)[..., 0].tolist() == expected["codes"]


# ------------------------------------------------------------------------------------- sampler
def test_maskgen_from_prompts_to_images_is_the_golden_one():
    net, cond = prompted()
    expected = GOLDEN["sampling"]
    e = se.embed_tokens(inputs()[0], *net.tables())
    agrees(net(e, cond), **GOLDEN["logits"]["of_prompts"])
    agrees(dimo.guided_logits(net, e, cond, 5.0), **GOLDEN["logits"]["of_prompts_guided"])

    def gumbel_max(z, temperature, u):                      # that is how the official code draws
        return (z + temperature * se.gumbel(u)).argmax(-1)

    rng = np.random.RandomState(103)
    shapes = (2, 12, 1, 40), (2, 12, 1)
    uniforms = ([f32(rng.random_sample(shape)) for shape in shapes] for _ in range(6))
    plan = teachers.maskgen_plan(12, 6, 3.0, 6.0)
    x, trace = traced_sample(net, cond, plan, uniforms, gumbel_max)
    assert count_masks(trace, 40) == [[n] * 2 for n in expected["masked"]]
    assert trace[5][..., 0].tolist() == expected["at_step_5"]
    assert x[..., 0].tolist() == expected["codes"]
    e = se.embed_tokens(x, *small_titok().tables())
    img = small_titok().decode(e, cond, clamp=False)        # told the prompt
    agrees(img, **expected["image"])


def test_maskgens_published_plan_is_the_golden_one():
    plan = teachers.maskgen_plan(128, 16, **SPECS["maskgen"].settings(16))
    expected = GOLDEN["published_plan"]
    assert [step.hidden for step in plan] == expected["hidden"]
    assert [step.w - 1 for step in plan] == pytest.approx(expected["guidance"], abs=2e-6)
    assert [step.divide for step in plan] == pytest.approx([1.25 - 0.05 * i for i in range(16)])
    noise = [1.875 - 0.125 * i for i in range(16)]
    assert [step.noise for step in plan] == [step.draw for step in plan] == pytest.approx(noise)
    hidden = [step.hidden for step in teachers.maskgen_plan(128, 64)]
    assert hidden[7::8] == expected["hidden_of_64_steps_every_eighth"]
    assert sum(hidden) == expected["hidden_of_64_steps_sum"]
