"""MaskGit: the transformer, its VQGAN, and its sampler, which may draw the mask.

Golden numbers are the public implementation's (tests/golden/maskgit.json).
"""

import numpy as np
import pytest
import torch

import dimo
import soft_embed as se
import teachers
from tests.common import agrees, golden, uniform
from tests.small_teachers import count_masks, f32, small_maskgit, small_vqgan, traced_sample

GOLDEN = golden("maskgit")


# ------------------------------------------------------------------------------------ networks
def test_maskgit_gives_the_golden_logits_plain_perturbed_and_guided():
    rng, net, expected = np.random.RandomState(0), small_maskgit(), GOLDEN["logits"]
    x = torch.from_numpy(rng.randint(0, 33, (3, 16, 1)))
    labels = torch.from_numpy(rng.randint(0, 10, 3))
    noise = f32(rng.standard_normal((3, 17, 48)))[:, :16]
    e = se.embed_tokens(x, *net.tables())
    dropped = torch.tensor([False, True, False])
    cond = (torch.where(dropped, 10, labels),)
    z = net(e, cond)
    agrees(z, **expected["plain"])
    agrees(z[2, 15, 0], **expected["last_position"])        # each position has biases of its own
    agrees(net(e, cond, s=0.3, noise=noise), **expected["perturbed"])
    agrees(dimo.guided_logits(net, e, (labels,), 2.0), **expected["guided"])


def test_vqgan_gives_the_golden_latents_codes_and_images():
    rng, tokenizer, expected = np.random.RandomState(0), small_vqgan(), GOLDEN["vqgan"]
    x = torch.from_numpy(rng.randint(0, 24, (2, 64, 1)))
    img = (f32(rng.uniform(-1, 1, (2, 3, 32, 32))) + 1) / 2
    no_codes = f32(rng.standard_normal((2, 8, 8, 8))).flatten(2).transpose(1, 2)
    agrees(tokenizer.latents(img), **expected["latents"])
    found = tokenizer.encode(img)
    assert found[0, :32, 0].tolist() == expected["codes"]
    assert found.sum() == expected["codes_sum"]

    def inside(e):                                          # it works in [-1, 1]
        return 2 * tokenizer.decode(e, clamp=False) - 1

    agrees(inside(se.embed_tokens(x, *tokenizer.tables())), **expected["image"])
    agrees(inside(no_codes), **expected["image_of_noise"])


# ------------------------------------------------------------------------------------- sampler
def test_maskgit_sampler_draws_the_golden_tokens():
    u, rng, expected = uniform(1, 5, 3, 16, 1), np.random.RandomState(0), GOLDEN["sampling"]
    noise = torch.from_numpy(np.stack([rng.gumbel(size=(3, 16, 1)) for _ in range(5)]))
    u_noise = (-(-noise).exp()).exp()                       # whose Gumbel noise is `noise`
    plan = teachers.maskgit_plan(16, 5, guidance=3.0, temperature=4.5)
    assert [step.w for step in plan] == expected["guidance"]
    cond = (torch.tensor([7, 9, 9]),)
    x, trace = traced_sample(small_maskgit(), cond, plan, zip(u, u_noise))
    assert count_masks(trace, 32) == expected["masked"]     # masks that were drawn stay
    assert trace[3][..., 0].tolist() == expected["at_step_3"]
    assert x[..., 0].tolist() == expected["codes"]


def test_a_mask_that_maskgit_draws_counts_as_revealed_and_is_decoded_as_the_last_code():
    def always_mask(z, temperature, u):
        return torch.full(z.shape[:-1], 32)

    plan = teachers.maskgit_plan(16, 3)
    x, trace = traced_sample(small_maskgit(), (torch.tensor([7]),), plan, draw=always_mask)
    assert len(trace) == 3 and all((t == 32).all() for t in trace)
    assert (x == 31).all()
    E, _ = small_vqgan().tables()
    assert E.shape == (1, 25, 8)
    assert torch.equal(E[0, 24], E[0, 23])


@pytest.mark.parametrize("case", GOLDEN["revealed"], ids=lambda case: case["schedule"])
def test_maskgit_reveals_the_golden_numbers_of_tokens(case):
    units, expected = case["grid"] ** 2, case["tokens"]
    plan = teachers.maskgit_plan(units, len(expected), schedule=case["schedule"])
    hidden = [units, *(step.hidden for step in plan)]
    assert [before - after for before, after in zip(hidden, hidden[1:])] == expected
