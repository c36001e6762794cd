"""The claims of the method as proofs, equation by equation: `pytest test_all.py`, seconds on a CPU.

The order is the README's: soft embeddings (Eq. 3, 5, 13-15), Di[M]O (starts, masks, guidance, Eq. 2
and the auxiliary's Eq. 1), the discriminator (Eq. 7-8), rewards (Eq. 9), test-time optimization
(Eq. 11), and at the end Algorithm 1, two whole training steps by train.py. What else is claimed,
about networks, files, metrics and scripts, is proved in tests/; `pytest` alone runs everything.

No network access, and every run is the same. Expected numbers ("golden") were measured on public
implementations at small sizes: see tests/golden/ and tests/common.py.
"""

import copy
import functools
import itertools
import math
import tempfile
import types
import weakref
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import dimo
import gan
import reward
import soft_embed as se
import teachers
import train
import tteo
from networks import autoencoders
from networks import clip as clip_net
from recipes import set_up
from recipes.settings import settle
from teachers import SPECS, MaskBit, load_teacher
from tests.common import (ASKED, NANO, TINY, TableNet, agrees, close, eq9_inputs, filled, golden,
                          half_masked_tokens, ids_of, integers, maskgit_file, normal, rewards_of,
                          run_with_hooks, seed, small_net, small_reward, small_tokenizer,
                          tiny_inputs, uniform)
from tests.runs import finished, log_of

GOLDEN = golden("dimo")


def grad(value, at):
    """The gradient of a scalar at one tensor; the graph stays."""
    return torch.autograd.grad(value, at, retain_graph=True)[0]


def untouched(*modules):
    """No parameter of these modules has a gradient."""
    return all(p.grad is None for module in modules for p in module.parameters())


# --------------------------------------------------------------------------------------
# Soft embeddings: Eq. 3
# --------------------------------------------------------------------------------------
def groups_of_two():
    """A table of two groups with V = 5 and d = 8, logits (3, 4, 2, 5), a mask."""
    return normal(0, 2, 6, 8), normal(1, 3, 4, 2, 5), uniform(2, 3, 4, 2) < 0.5


def enumerate_tokens(L, G, V):
    """All V^(L*G) token arrays, (V^(L*G), L, G)."""
    return torch.tensor(list(itertools.product(range(V), repeat=L * G))).view(-1, L, G)


def joint_probability(z, x):
    """p(x) under logits z (1, L, G, V) for many x (N, L, G): (N,)."""
    p = z.softmax(-1).expand(len(x), *z.shape[1:])
    return p.gather(-1, x[..., None]).flatten(1).prod(1)


def test_soft_embedding_of_one_hot_logits_is_the_hard_embedding_bit_for_bit():
    any_table, any_bias = normal(0, 1, 12, 20), normal(1, 20)
    for E, bias in [(any_table, any_bias), small_net().tables(), small_tokenizer().tables()]:
        V = E.shape[1] - 1
        x = integers(2, V, 5, 16, len(E))
        mask = uniform(3, *x.shape) < 0.5
        z = 1e4 * F.one_hot(x, V).float()
        assert torch.equal(se.soft_embed(z, E, bias), se.embed_tokens(x, E, bias))
        masked = se.embed_tokens(x.masked_fill(mask, V), E, bias)
        assert torch.equal(se.soft_embed(z, E, bias, mask), masked)


def test_masked_units_become_the_mask_row_and_pass_no_gradient():
    E, z, mask = groups_of_two()
    bias = normal(1, 8)
    z.requires_grad_()
    se.soft_embed(z, E, bias, mask).square().sum().backward()
    assert (z.grad[mask] == 0).all()
    assert (z.grad[~mask].abs().sum(-1) > 0).all()
    everything = se.soft_embed(z, E, bias, torch.ones_like(mask))
    assert close(everything, (E[0, -1] + E[1, -1] + bias).expand_as(everything))


def test_probabilities_of_the_mask_itself_weigh_its_row():
    E = normal(0, 1, 6, 8)
    p = normal(1, 2, 3, 1, 6).softmax(-1)                               # V+1 entries, as MaskGit's
    assert close(se.embed_probs(p, E), p[:, :, 0] @ E[0])


def test_gradient_is_exact_for_linear_f():
    E, w = normal(0, 2, 4, 5), normal(1, 2, 5)                          # L = 2, G = 2, V = 3
    z = normal(2, 1, 2, 2, 3).requires_grad_()
    x = enumerate_tokens(2, 2, 3)                                       # (81, 2, 2)
    f = (se.embed_tokens(x, E) * w).sum((1, 2))                         # (81,)
    truth = (joint_probability(z, x) * f).sum()
    surrogate = (se.soft_embed(z, E) * w).sum()
    assert abs(truth - surrogate) < 1e-6
    assert close(grad(truth, z), grad(surrogate, z))


def test_two_groups_and_a_flat_vocabulary_agree_where_they_mean_the_same():
    tokenizer = autoencoders.BitTokenizer(hidden=32, mult=(1,), blocks=1)
    E, bias = tokenizer.tables()                                        # 14 bits, two groups of 128
    bits = autoencoders.bits_of(torch.arange(2**14), 14)
    flat = F.pad(bits, (0, 0, 0, 1))[None]                              # (1, 16384 + 1, 14)
    z = 2 * normal(0, 2, 3, 2, 128)
    joint = z[..., 1, :, None] + z[..., 0, None, :]                     # token g0 + 128 g1
    joint = joint.flatten(-2)[:, :, None]                               # (2, 3, 1, 16384)
    assert close(se.soft_embed(z, E, bias), se.soft_embed(joint, flat), atol=5e-6)


def test_tau_divides_the_logits():
    E, z, _ = groups_of_two()
    assert close(se.soft_embed(z, E, tau=0.25), se.soft_embed(4 * z, E))
    assert close(se.soft_embed(z, E, tau=1e-4), se.embed_tokens(z.argmax(-1), E))
    noise = torch.randn(z.shape, generator=seed(0))
    noisy = se.gumbel_embed(z, E, tau=0.25, noise=noise)
    assert close(noisy, se.soft_embed(4 * (z + noise), E))


def test_soft_embedding_is_float32_under_bf16_autocast():
    E, z = normal(0, 1, 1025, 8), normal(1, 2, 3, 1, 1024)
    with torch.autocast("cpu", torch.bfloat16):
        e = se.soft_embed(z.bfloat16(), E.bfloat16())
    assert e.dtype == torch.float32
    assert close(e, se.soft_embed(z.bfloat16().float(), E.bfloat16().float()))


def test_teacher_fed_soft_tokens_gives_the_golden_logits():
    expected = golden("soft_embed")
    net = small_net()
    z, mask = 3 * normal(12, 3, 16, 2, 16), uniform(13, 3, 16, 2) < 0.5
    _, cond = half_masked_tokens()
    first, _, logits = run_with_hooks(net, se.soft_embed(z, *net.tables(), mask), cond)
    agrees(first, **expected["teacher_embedding"])
    agrees(logits, **expected["teacher_logits"])


def test_decoder_fed_soft_tokens_gives_the_golden_image():
    tokenizer = small_tokenizer()
    z = 3 * normal(12, 3, 16, 2, 16)[:2]
    img = tokenizer.decode(se.soft_embed(z, *tokenizer.tables()), clamp=False)
    agrees(img, **golden("soft_embed")["decoder_image"])


# --------------------------------------------------------------------------------------
# Soft embeddings: how far an average is from a draw, Eq. 5
# --------------------------------------------------------------------------------------
def test_eq_5_bias_is_half_the_trace_of_curvature_times_covariance():
    E, A = normal(0, 1, 17, 6), normal(1, 6, 6)
    H = A + A.T                                                         # f(e) = e^T H e / 2
    tokens = E[0, :16]
    C = torch.linalg.eigvalsh(H).abs().max()

    def f(e):
        return 0.5 * (e @ H * e).sum(-1)

    spreads = []
    for sharpness in (1, 3, 9, 27):
        z = sharpness * normal(2, 1, 1, 1, 16)
        p = z.softmax(-1).flatten()
        e = se.soft_embed(z, E)[0, 0]
        S = torch.einsum("v,vi,vj->ij", p, tokens - e, tokens - e)
        bias = (p * f(tokens)).sum() - f(e)
        assert abs(bias - 0.5 * (H @ S).trace()) < 2e-5
        assert abs(bias) <= C / 2 * S.trace() + 1e-5                    # Eq. (5)
        spreads.append(S.trace())
    for sharp, sharper in zip(spreads, spreads[1:]):
        assert sharper < sharp, "the sharper the logits, the tighter the bound"
    assert spreads[-1] < 1e-3


def test_concentration_of_known_distributions():
    entropy, top1 = se.concentration(torch.zeros(2, 3, 2, 8))
    assert abs(entropy - math.log(8)) < 1e-6
    assert abs(top1 - 1 / 8) < 1e-6
    entropy, top1 = se.concentration(torch.tensor([0.7, 0.2, 0.1]).log().view(1, 1, 1, 3))
    assert abs(entropy - 0.801819) < 1e-5
    assert abs(top1 - 0.7) < 1e-6


# --------------------------------------------------------------------------------------
# The estimators that soft embeddings replace: Eq. 13-15
# --------------------------------------------------------------------------------------
def test_reinforce_is_unbiased_over_all_tokens():
    z, x = normal(0, 1, 2, 2, 3).requires_grad_(), enumerate_tokens(2, 2, 3)
    f = normal(1, 81)                                                   # any function of the tokens
    p = joint_probability(z, x)                                         # (81,)
    truth = grad((p * f).sum(), z)[0]
    many = z.detach().expand(81, 2, 2, 3).clone().requires_grad_()
    each = 81 * grad(se.reinforce(many, x, f), many)                    # f grad log p
    mean = (p.detach()[:, None, None, None] * each).sum(0)
    assert close(mean, truth)                                           # Eq. (13)


def test_gumbel_noise_makes_argmax_a_draw_from_the_softmax():
    z = normal(0, 6)
    noise = se.gumbel_noise((40000, 6), generator=seed(0))
    frequency = torch.bincount((z + noise).argmax(-1), minlength=6) / 40000
    assert close(frequency, z.softmax(-1), atol=0.01)
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.02                            # Euler's constant
    assert abs(noise.std() - math.pi / 6**0.5) < 0.02


def test_gumbel_noise_is_a_function_of_uniforms_and_finite_at_both_ends():
    u = uniform(0, 1000).float()
    assert torch.equal(se.gumbel(u), -torch.log(-torch.log(u)))
    assert se.gumbel(torch.tensor([0.0, 1.0])).isfinite().all()
    drawn = se.gumbel(torch.rand(3, 4, generator=seed(5)))
    assert torch.equal(se.gumbel_noise((3, 4), generator=seed(5)), drawn)


def test_gumbel_without_noise_is_the_soft_embedding():
    E, z, mask = groups_of_two()
    without = se.gumbel_embed(z, E, 0.5, mask, 0.7, torch.zeros_like(z))  # Eq. (14)
    assert torch.equal(without, se.soft_embed(z, E, 0.5, mask, 0.7))


def test_straight_through_is_hard_forward_and_gumbel_backward():
    E, z, _ = groups_of_two()
    z.requires_grad_()
    mask, noise, w = uniform(2, 3, 4, 2) < 0.3, normal(3, 3, 4, 2, 5), normal(4, 3, 4, 8)
    hard = se.straight_through_embed(z, E, 0.5, mask, 0.7, noise)       # Eq. (15)
    x = (z + noise).argmax(-1).masked_fill(mask, 5)
    assert close(hard, se.embed_tokens(x, E, 0.5))
    soft = se.gumbel_embed(z, E, 0.5, mask, 0.7, noise)
    assert close(grad((hard * w).sum(), z), grad((soft * w).sum(), z))


# --------------------------------------------------------------------------------------
# Drawing tokens
# --------------------------------------------------------------------------------------
def test_given_uniforms_decide_the_tokens_by_the_cumulative_rule():
    z, u = 2 * normal(0, 3, 4, 2, 5), uniform(1, 3, 4, 2)
    x = se.sample_tokens(z, 0.7, u)
    cumulative = (z / 0.7).softmax(-1).double().cumsum(-1)
    for i in np.ndindex(3, 4, 2):
        below = int(np.searchsorted(cumulative[i].numpy(), u[i].item(), side="right"))
        assert x[i] == min(below, 4)
    almost_one = torch.full((100, 1, 1), 1 - 1e-12, dtype=torch.float64)
    x = se.sample_tokens(normal(2, 100, 1, 1, 50), u=almost_one)
    assert x.max() == 49, "rounded probabilities often sum to less than u"


def test_a_token_of_probability_zero_is_not_drawn_even_where_u_is_on_its_edge():
    z = torch.tensor([-math.inf, 0.0, 0.0, -math.inf]).expand(1, 3, 1, 4)
    u = torch.tensor([0.0, 0.5, 0.49]).view(1, 3, 1)
    assert se.sample_tokens(z, u=u).flatten().tolist() == [1, 2, 1]


def test_sampled_frequencies_are_the_softmax_and_temperature_zero_is_argmax():
    N, z = 5000, normal(0, 1, 1, 1, 7)

    def frequency(x):
        return torch.bincount(x.flatten(), minlength=7) / x.numel()

    every_quantile = ((torch.arange(N) + 0.5) / N).view(N, 1, 1)
    for temperature in (1.0, 3.0):
        x = se.sample_tokens(z.expand(N, 1, 1, 7), temperature, every_quantile)
        assert close(frequency(x), (z / temperature).softmax(-1).flatten(), atol=1.5 / N)
    torch.manual_seed(0)
    x = se.sample_tokens(z.expand(20000, 1, 1, 7))                      # with its own uniforms
    assert close(frequency(x), z.softmax(-1).flatten(), atol=0.015)
    assert torch.equal(se.sample_tokens(z, 0), z.argmax(-1))


# --------------------------------------------------------------------------------------
# Di[M]O: masks
# --------------------------------------------------------------------------------------
def test_unknown_schedules_are_named():
    with pytest.raises(ValueError, match="unknown mask schedule 'sine'"):
        dimo.mask_ratio(torch.rand(2), "sine")
    with pytest.raises(ValueError, match="unknown guidance schedule 'sine'"):
        dimo.guidance_scale(torch.rand(2), 2.0, schedule="sine")


@pytest.mark.parametrize("schedule, gamma", [
    ("linear", lambda u: u),
    ("square", lambda u: u * u),
    ("cosine", lambda u: math.cos(u * math.pi / 2)),
    ("arccos", lambda u: math.acos(u) / (math.pi / 2)),
])
def test_schedules_mask_the_golden_number_of_positions(schedule, gamma):
    expected = GOLDEN["masked_of_256"]
    U = expected["u"]
    ratio = dimo.mask_ratio(torch.tensor(U), schedule)
    assert close(ratio, torch.tensor([gamma(u) for u in U]))
    mask = dimo.exact_mask(ratio, uniform(0, len(U), 256, 1))
    assert mask.sum((1, 2)).tolist() == expected[schedule]


def test_mage_ratios_are_a_normal_truncated_to_half_and_one():
    r = dimo.mask_ratio((torch.arange(20000) + 0.5) / 20000, "mage")    # every quantile once
    assert (r >= 0.5).all() and (r <= 1).all()
    assert (r.diff() >= 0).all()
    assert r[0] < 0.501 and r[-1] > 0.999

    def pdf(b):
        return math.exp(-b * b / 2) / math.sqrt(2 * math.pi)

    def cdf(b):
        return (1 + math.erf(b / math.sqrt(2))) / 2

    low, high = (0.5 - 0.55) / 0.25, (1 - 0.55) / 0.25
    mean = 0.55 + 0.25 * (pdf(low) - pdf(high)) / (cdf(high) - cdf(low))
    assert abs(r.mean() - mean) < 1e-4                                  # 0.694


def test_mask_counts_round_half_to_even_and_differ_by_sample():
    def counts(ratio, *shape, **settings):
        return dimo.exact_mask(ratio, uniform(0, *shape), **settings).sum((1, 2)).tolist()

    assert counts(0.5, 2, 5, 1) == [2, 2]                               # 2.5 -> 2
    assert counts(0.5, 2, 7, 1) == [4, 4]                               # 3.5 -> 4
    ratio = torch.tensor([0.0, 0.25, 1.0])
    assert counts(ratio, 3, 4, 2) == [1, 2, 8]                          # units, not positions
    assert counts(ratio, 3, 4, 2, least=0) == [0, 2, 8]


def test_smallest_scores_are_masked_so_that_every_unit_is_equally_likely():
    scores = uniform(0, 4000, 5, 2)
    mask = dimo.exact_mask(0.3, scores)
    largest_masked = scores.masked_fill(~mask, 0).amax((1, 2))
    smallest_other = scores.masked_fill(mask, 1).amin((1, 2))
    assert (largest_masked < smallest_other).all()
    assert close(mask.float().mean(0), torch.full((5, 2), 0.3), atol=0.025)
    alone = mask[..., 0] != mask[..., 1]
    assert alone.any(), "the groups of one position are masked on their own"


# --------------------------------------------------------------------------------------
# Di[M]O: starts and guidance
# --------------------------------------------------------------------------------------
@pytest.mark.parametrize("L", [128, 256, 4096])
def test_initial_mask_has_the_golden_count(L):
    expected = GOLDEN["masked_at_the_start"]
    for ratio, count in zip(expected["ratio"], expected[str(L)], strict=True):
        x = dimo.initial_tokens(integers(1, 9, 3, L, 1), ratio, uniform(2, 3, L, 1), V=9)
        assert (x == 9).sum((1, 2)).tolist() == [count] * 3


def test_initial_tokens_are_the_given_ones_where_not_masked():
    tokens, scores = integers(0, 9, 3, 16, 2), uniform(1, 3, 16, 2)
    x = dimo.initial_tokens(tokens, 0.6, scores, V=9)
    mask = dimo.exact_mask(0.6, scores)
    assert torch.equal(x[~mask], tokens[~mask])
    assert (x[mask] == 9).all()
    assert (x == 9).sum((1, 2)).tolist() == [19] * 3                    # of 32 units, at 0.6


def test_perturbation_keeps_the_variance_and_reaches_the_network():
    e, noise, E = normal(0, 400, 16, 32), normal(1, 400, 16, 32), normal(2, 1, 5, 32)
    assert abs(dimo.perturb(e, 0.3, noise).var() - 1) < 0.01
    assert close(dimo.perturb(e, 0.6, noise), 0.6 * noise + 0.8 * e)

    def identity(e, cond, s=0.0, noise=None):
        return dimo.perturb(e, s, noise) if s else e

    x = integers(3, 5, 400, 16, 1)
    e = se.embed_tokens(x, E, 1.0)
    assert torch.equal(dimo.student_logits(identity, x, (), E, 1.0), e)
    perturbed = dimo.student_logits(identity, x, (), E, 1.0, 0.6, noise)
    assert close(perturbed, 0.6 * noise + 0.8 * e)


def test_guidance_extrapolates_from_the_unconditional_logits_in_one_batch():
    c, u, cond = normal(0, 2, 4, 1, 7), normal(1, 2, 4, 1, 7), (torch.tensor([3, 5]),)
    net, e = TableNet(c, u), torch.zeros(2, 4, 8)
    assert torch.equal(dimo.guided_logits(net, e, cond, 1.0), c)
    assert net.calls == [2], "w = 1 costs one pass"
    assert close(dimo.guided_logits(net, e, cond, 2.0), 2 * c - u)
    assert net.calls == [2, 4]
    z = dimo.guided_logits(net, e, cond, torch.tensor([0.0, 1.5]))
    assert close(z[0], u[0])
    assert close(z[1], 1.5 * c[1] - 0.5 * u[1])


def test_guidance_schedules_start_low_and_end_high():
    r = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert dimo.guidance_scale(r, 3.0).tolist() == [3.0] * 4
    for low, schedule, expected in [
        (1.0, "linear", [1.0, 1.5, 2.0, 3.0]),
        (2.0, "linear", [2.0, 2.25, 2.5, 3.0]),
        (1.0, "cosine", [1.0, 2 - 0.5**0.5, 2.0, 3.0]),
    ]:
        assert close(dimo.guidance_scale(r, 3.0, low, schedule), torch.tensor(expected))


# --------------------------------------------------------------------------------------
# Di[M]O: the gradient, Eq. 2
# --------------------------------------------------------------------------------------
BETAS = [0.0, 1.0, -0.2, 0.5]                                           # FKL, RKL, Jeffreys


def four_logits():
    """Golden inputs: teacher with and without condition, auxiliary, student, (2, 4, 1, 7) each."""
    rng = np.random.RandomState(0)
    noise = [2 * rng.standard_normal((2, 4, 1, 7)) for _ in range(4)]
    z_c, z_u, z_aux, z_student = (torch.from_numpy(n.astype(np.float32)) for n in noise)
    mask = torch.from_numpy(rng.uniform(size=(2, 4, 1)) < 0.6)          # three units
    x = torch.from_numpy(rng.randint(0, 7, (2, 4, 1)))
    return types.SimpleNamespace(z_c=z_c, z_u=z_u, z_aux=z_aux, z_student=z_student, mask=mask, x=x)


def two_logits():
    """Teacher's and auxiliary's, (3, 6, 2, 9), and a mask."""
    return normal(0, 3, 6, 2, 9), normal(1, 3, 6, 2, 9), uniform(2, 3, 6, 2) < 0.5


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.2])
def test_guided_loss_gradient_is_the_golden_one(beta):
    expected = GOLDEN["loss_gradient"][str(beta)]
    given = four_logits()
    teacher = TableNet(given.z_c, given.z_u)
    aux = TableNet(given.z_aux, torch.full_like(given.z_aux, math.nan))  # nobody may guide it
    args = teacher, aux, torch.zeros(2, 4, 8), (torch.tensor([0, 1]),), given.mask
    g, loss = dimo.dimo_grad(*args, w=2.0, beta=beta)
    agrees(g / 2, **expected["gradient"], tol=1e-6)
    assert abs(0.5 * g.square().sum() / 2 - expected["half_square"]) < 1e-6
    weight = torch.tensor([3.0, 5.0])
    weighted, weighted_loss = dimo.dimo_grad(*args, w=2.0, beta=beta, weight=weight)
    assert close(weighted, g * weight.view(2, 1, 1, 1))
    assert close(weighted_loss, loss * weight)


@pytest.mark.parametrize("beta", BETAS)
def test_surrogate_gradient_is_the_gradient_of_the_divergence(beta):
    z_phi, z_psi = 2 * normal(0, 3, 6, 2, 9).double(), 2 * normal(1, 3, 6, 2, 9).double()
    mask = uniform(2, 3, 6, 2) < 0.5
    z_psi.requires_grad_()
    log_q, log_p = z_phi.log_softmax(-1), z_psi.log_softmax(-1)
    forward_kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    reverse_kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert (forward_kl > 0).all() and (reverse_kl > 0).all()
    divergence = (1 - beta) * forward_kl + beta * reverse_kl
    truth = grad((divergence * mask).sum(), z_psi)                      # float64 autograd
    g = dimo.divergence_grad(z_phi, z_psi.detach(), mask, beta)
    assert close(g.double(), truth, atol=2e-6)                          # Eq. (2)
    logged = dimo.divergence(z_phi, z_psi.detach(), mask, beta)
    assert close(logged.double(), (divergence * mask).sum((1, 2)), atol=1e-4)


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_vanishes_at_equality_off_the_mask_and_in_sum(beta):
    z_phi, z_psi, mask = two_logits()
    g = dimo.divergence_grad(z_phi, z_psi, mask, beta)
    assert (g[~mask] == 0).all()
    assert (g[mask].abs().sum(-1) > 0.01).all()
    assert g.sum(-1).abs().max() < 1e-6, "a shift of the logits changes nothing"
    at_equality = dimo.divergence_grad(z_phi, z_phi + 3.0, mask, beta)  # up to such a shift
    assert at_equality.abs().max() < 1e-6


def test_gradient_of_bf16_logits_is_computed_in_float32():
    z_phi, z_psi = normal(0, 2, 3, 1, 9).bfloat16(), normal(1, 2, 3, 1, 9).bfloat16()
    mask = torch.ones(2, 3, 1).bool()
    g = dimo.divergence_grad(z_phi, z_psi, mask, -0.2)
    assert g.dtype == torch.float32
    assert torch.equal(g, dimo.divergence_grad(z_phi.float(), z_psi.float(), mask, -0.2))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.2])
def test_descending_the_gradient_lowers_the_divergence(beta):
    z_phi, z = normal(0, 2, 3, 1, 9), normal(1, 2, 3, 1, 9)
    mask = torch.ones(2, 3, 1).bool()
    for _ in range(2000):
        z -= dimo.divergence_grad(z_phi, z, mask, beta)
    assert close(z.softmax(-1), z_phi.softmax(-1), atol=1e-3)


def test_backward_with_g_is_the_squared_error_trick():
    W, h, g = normal(0, 5, 9).requires_grad_(), normal(1, 2, 3, 1, 5), normal(2, 2, 3, 1, 9)
    z = h @ W
    (direct,) = torch.autograd.grad(z, W, g / 2, retain_graph=True)
    trick = 0.5 * (z - (z - g).detach()).square().sum() / 2
    assert close(direct, grad(trick, W), atol=1e-5)


def test_no_gradient_reaches_teacher_or_auxiliary():
    teacher, aux = nn.Linear(8, 9), nn.Linear(8, 9)

    def as_net(linear):
        return lambda e, cond: linear(e)[:, :, None]

    mask = torch.ones(2, 3, 1).bool()
    g, _ = dimo.dimo_grad(as_net(teacher), as_net(aux), normal(0, 2, 3, 8), (), mask)
    assert not g.requires_grad
    assert g.shape == (2, 3, 1, 9)


# --------------------------------------------------------------------------------------
# Di[M]O: the auxiliary, Eq. 1
# --------------------------------------------------------------------------------------
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_auxiliary_loss_is_the_golden_one(alpha):
    expected = GOLDEN["auxiliary"][str(alpha)]
    given = four_logits()
    z = given.z_aux.requires_grad_()
    z_student = given.z_student.requires_grad_()
    loss = dimo.aux_loss(z, given.x, given.mask, z_student=z_student, alpha=alpha)
    loss.backward()
    assert abs(loss - expected["loss"]) < 1e-6                          # Eq. (1)
    assert z_student.grad is None
    agrees(z.grad, **expected["gradient"], tol=1e-6)


def test_auxiliary_loss_mixes_its_targets_and_divides_by_a_given_count():
    given = four_logits()
    loss = functools.partial(dimo.aux_loss, given.z_aux, given.x, given.mask,
                             z_student=given.z_student)
    hard, soft = loss(alpha=0.0), loss(alpha=1.0)
    assert close(loss(alpha=0.25), 0.75 * hard + 0.25 * soft)
    assert close(loss(alpha=0.0, count=6), hard / 2)                    # three units are masked
    assert close(loss(alpha=1.0, count=6), soft / 2)


def test_auxiliary_of_unsmoothed_loss_is_least_at_the_students_distribution():
    p = normal(0, 7).softmax(-1)
    times = (p * 1e4).round().long()
    x = torch.repeat_interleave(torch.arange(7), times)[None, :, None]  # in the shares of p
    z = p.log().expand(1, x.shape[1], 1, 7).clone().requires_grad_()
    dimo.aux_loss(z, x, torch.ones_like(x).bool(), smoothing=0.0).backward()
    assert z.grad.sum((0, 1, 2)).abs().max() < 1e-4


# --------------------------------------------------------------------------------------
# The discriminator: Eq. 7 and 8
# --------------------------------------------------------------------------------------
def nano_gan(B=4):
    """A frozen nano teacher, a discriminator, logits, condition and tables, all seeded."""
    torch.manual_seed(0)
    net = MaskBit(**NANO.net).eval().requires_grad_(False)
    disc = gan.Discriminator(32, gan.head_layers(3, 2), width=16, mlp=16, grid=4)
    z, cond = torch.randn(B, 16, 2, 8), (torch.arange(B) % 3,)
    return net, disc, z, cond, *net.tables()


def test_gan_losses_are_equations_7_and_8():
    d_real, d_fake = torch.tensor([0.3, -1.2, 4.0]), torch.tensor([-0.7, 2.0, 0.1])
    real, fake = torch.sigmoid(d_real), torch.sigmoid(d_fake)
    eq_7 = -real.log().mean() - (1 - fake).log().mean()
    eq_8 = -fake.log().mean()
    assert torch.allclose(gan.disc_loss(d_real, d_fake), eq_7)          # Eq. (7)
    assert torch.allclose(gan.gen_loss(d_fake), eq_8)                   # Eq. (8)


def test_gan_gradient_is_autograd_of_equation_8_and_reaches_the_student_alone():
    net, disc, z, cond, E, bias = nano_gan()
    mask = torch.rand(4, 16, 2) < 0.5
    g, loss, _ = gan.gan_grad(z, disc, net, cond, mask, E, bias)

    z64 = z.double().requires_grad_()               # by hand, in float64, with nothing of gan_grad
    p, e = z64.softmax(-1), bias.double()
    for k in range(2):
        soft = p[:, :, k] @ E[k, :-1].double()
        e = e + torch.where(mask[:, :, k, None], E[k, -1].double(), soft)
    features = copy.deepcopy(net).double()(e, cond, disc.layers)
    truth = -torch.sigmoid(copy.deepcopy(disc).double()(features)).log().mean()
    g64 = grad(truth, z64)
    assert abs(loss - truth) < 1e-6                                     # Eq. (8)
    assert (g - g64).abs().max() < 1e-6 * max(1, g64.abs().max())
    assert g.abs().sum() > 0 and untouched(net, disc)
    assert (g[mask] == 0).all(), "masked units hide their logits"
    assert (g[~mask].abs().sum(-1) > 0).all()


def test_discriminator_step_trains_the_heads_alone_and_masks_real_and_fake_alike():
    net, disc, _, cond, E, bias = nano_gan()
    x = torch.randint(8, (4, 16, 2))
    z = (F.one_hot(x, 8) * 1e4).float().requires_grad_()                # fakes that equal the real
    for share in (0.0, 0.4, 1.0):
        mask = torch.rand(4, 16, 2) < share
        features = gan.real_and_fake(z, x, disc.layers, net, cond, mask, E, bias)
        d_real, d_fake = disc(features).chunk(2)
        same = torch.allclose(d_real, d_fake, atol=1e-6)
        assert same, "the masks are the same, so D cannot tell them apart"
    gan.disc_loss(d_real, d_fake).backward()
    assert z.grad is None and untouched(net)
    assert all(p.grad is not None for p in disc.parameters())


def test_heads_are_normalized_after_each_convolution():
    """So the size of a convolution's weights is no matter."""
    torch.manual_seed(0)
    head = gan.Head(32, 16, grid=4)
    h = torch.randn(2, 16, 32)
    expected = head(h)
    convolutions = [m for m in head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 2
    for conv in convolutions:
        for p in conv.parameters():
            p.data *= 3
        off = (head(h) - expected).abs().max()
        assert off < 0.01 * expected.abs().max(), "no more than GroupNorm's eps"


def test_gan_mask_ratio_zero_masks_nothing():
    scores = torch.rand(2, 16, 2)
    assert dimo.exact_mask(0.0, scores, least=0).sum() == 0
    assert dimo.exact_mask(0.95, scores, least=0).sum() == 2 * 30


@pytest.mark.parametrize("name", TINY)
def test_discriminator_reads_every_teacher_and_its_gradient_reaches_the_logits(name):
    teacher, x, _, cond = tiny_inputs(name)
    net, mask = teacher.net, x == teacher.net.V
    torch.manual_seed(0)
    disc = gan.Discriminator(net.width, gan.head_layers(net.depth, 2), 16, 16, net.feature_grid)
    entries = net.V + 1 if name == "maskgit-tiny" else net.V            # it may draw the mask
    z = torch.randn(*x.shape, entries)
    g, _, _ = gan.gan_grad(z, disc, net, cond, mask, *net.tables())
    assert g.shape == z.shape
    assert (g[mask] == 0).all()
    assert (g[~mask].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("teacher, depth, features, heads, mlp, grid, millions", [
    ("MaskBit", 24, 1024, 4, 2048, 16, 85),
    ("MaskGit", 24, 768, 4, 2048, 16, 72),
    ("MaskGen", 16, 1024, 6, 4096, None, 65),
])
def test_discriminator_has_about_the_size_of_table_5(teacher, depth, features, heads, mlp, grid,
                                                     millions):
    with torch.device("meta"):
        disc = gan.Discriminator(features, gan.head_layers(depth, heads), 1024, mlp, grid)
    size = sum(p.numel() for p in disc.parameters()) / 1e6
    assert abs(size / millions - 1) < 0.1
    assert len(disc.layers) == heads and disc.layers[-1] == depth - 1


def test_heads_read_a_row_of_tokens_by_convolutions_in_one_dimension():
    row = gan.Head(8, 8, grid=None)
    assert isinstance(row.net[0], nn.Conv1d)
    assert row(torch.randn(2, 12, 8)).shape == (2, 8)


def test_layers_that_are_read_are_spread_evenly_and_include_the_last():
    assert gan.head_layers(24, 4) == (5, 11, 17, 23)
    assert gan.head_layers(16, 6) == (1, 4, 7, 9, 12, 15)


# --------------------------------------------------------------------------------------
# Rewards: Eq. 9
# --------------------------------------------------------------------------------------
def reward_gradient(given, rewards, weights=reward.SEED, **settings):
    """(gradient at the logits, {reward: mean}) for what `eq9_inputs` gives."""
    z, tokenizer, cond, prompts = given
    return reward.reward_grad(z, tokenizer, cond, rewards, prompts, weights, **settings)


@pytest.mark.parametrize("name", reward.REWARDS)
def test_gradient_of_every_reward_at_the_pixels_is_its_finite_difference(name):
    model, ids = copy.deepcopy(small_reward(name)).double(), ids_of(name)
    img = uniform(4, 2, 3, 61, 58).requires_grad_()
    direction = normal(5, 2, 3, 61, 58).double()

    def f(x):
        return model(clip_net.preprocess(x, 56), ids)

    score = f(img)
    g = grad(score[0], img)
    step = 1e-5
    slope = (f(img + step * direction) - f(img - step * direction)).detach() / (2 * step)
    assert score.dtype == torch.float64
    assert abs((g * direction).sum() - slope[0]) < 1e-7 * max(1, abs(slope[0]))
    assert (g[1] == 0).all() and g[0].abs().sum() > 0, "the second image is another pair's"
    assert untouched(model)


@pytest.mark.parametrize("name", ["maskbit-tiny", "maskgit-tiny", "maskgen-tiny"])
def test_reward_gradient_is_autograd_of_equation_9_and_reaches_the_student_alone(name):
    given, rewards = eq9_inputs(name), rewards_of("imagereward", "clip")
    z, tokenizer, cond, prompts = given
    z.requires_grad_()
    g, means = reward_gradient(given, rewards, embed=functools.partial(se.soft_embed, tau=1.5))

    E, bias = tokenizer.tables()                                        # by hand, without chunks
    p = (z / 1.5).softmax(-1)
    e = sum(p[:, :, k] @ E[k, :-1] for k in range(len(E))) + bias
    scores = rewards(tokenizer.decode(e, cond).clamp(0, 1), prompts)
    loss = -(1.0 * scores["imagereward"] + 0.2 * scores["clip"]).mean()  # Eq. (9)
    expected = grad(loss, z)
    assert expected.abs().max() > 0
    assert (g - expected).abs().max() < 1e-5 * expected.abs().max()
    assert means.keys() == scores.keys()
    for key, score in scores.items():
        assert abs(means[key] - score.mean()) < 1e-5
    assert z.grad is None and untouched(tokenizer, rewards)
    assert not g.requires_grad and not means["clip"].requires_grad
    assert not any(p.requires_grad for m in (tokenizer, rewards) for p in m.parameters())


def test_chunks_change_nothing_but_the_memory():
    given, rewards = eq9_inputs("maskgen-tiny", B=5), rewards_of("imagereward", "clip")
    prompts, seen = given[-1], []
    rewards.register_forward_pre_hook(lambda module, args: seen.append(args))
    g, means = reward_gradient(given, rewards, chunk=5)
    for chunk, sizes in ((1, [1] * 5), (2, [2, 2, 1]), (8, [5])):
        seen.clear()
        g_chunks, means_chunks = reward_gradient(given, rewards, chunk=chunk)
        assert [len(img) for img, _ in seen] == sizes
        assert [text for _, texts in seen for text in texts] == prompts
        assert (g_chunks - g).abs().max() < 1e-5 * g.abs().max()
        for key, mean in means.items():
            assert abs(means_chunks[key] - mean) < 1e-5


def test_an_images_reward_gradient_is_clipped_by_itself():
    given, rewards = eq9_inputs("maskgen-tiny", B=5), rewards_of("imagereward", "clip")
    g, _ = reward_gradient(given, rewards)
    norms = 5 * g.flatten(1).norm(dim=1)                                # without the mean's 1/B
    limit = norms.sort().values[2].item() * 1.01                        # three of five are below
    assert (norms > limit).sum() == 2
    clipped, _ = reward_gradient(given, rewards, chunk=2, clip=limit)
    for own, image, norm in zip(clipped, g, norms):
        expected = image * min(1, limit / norm.item())
        assert (own - expected).abs().max() < 1e-5 * image.abs().max()


def test_only_one_chunks_graph_is_alive_at_a_time():
    given, rewards = eq9_inputs("maskgen-tiny", B=4), rewards_of("clip")
    images = []

    def look(module, args):
        in_memory = [earlier for earlier in images if earlier() is not None]
        assert not in_memory, "an earlier chunk's image is still in memory"
        images.append(weakref.ref(args[0]))

    rewards.register_forward_pre_hook(look)
    reward_gradient(given, rewards, {"clip": 1.0})
    assert len(images) == 4


def test_climbing_the_gradient_raises_the_reward():
    (z, *rest), rewards = eq9_inputs("maskbit-tiny"), rewards_of("hps")
    means = []
    for _ in range(15):
        g, mean = reward_gradient((z, *rest), rewards, {"hps": 1.0}, chunk=3)
        means.append(mean["hps"].item())
        z = z - 0.5 * g / g.abs().max()
    assert all(after > before for before, after in zip(means[:8], means[1:]))
    assert means[-1] > means[0] + 0.05


def test_checkpointing_changes_neither_scores_nor_gradients():
    img = uniform(6, 2, 3, 40, 40).float().requires_grad_()

    def results(checkpointing):
        """Scores, the gradient at the pixels, and how often CLIP looked at them."""
        rewards = rewards_of("clip", "imagereward", checkpointing=checkpointing)
        passes = []
        visual = rewards.models["clip"].clip.visual
        visual.register_forward_pre_hook(lambda module, args: passes.append(1))
        scores = rewards(img, ASKED[:2])
        g = torch.autograd.grad(reward.weighted(scores, reward.SEED).sum(), img)[0]
        return scores, g, len(passes)

    scores, g, once = results(checkpointing=False)
    scores_again, g_again, twice = results(checkpointing=True)
    assert all(torch.equal(scores[key], scores_again[key]) for key in scores)
    assert close(g, g_again)
    assert (once, twice) == (1, 2)


# --------------------------------------------------------------------------------------
# Test-time embedding optimization, Eq. 11: the loop, on a generator of one line
# --------------------------------------------------------------------------------------
RENO = {name: run for name, run in golden("reno").items() if name != "source"}


def toy_generator():
    """The toy problem of the golden runs: start, image_of, loss_of, the variables it was given."""
    W = normal(700, 32, 192) / 32**0.5
    target, other = normal(800, 1, 3, 8, 8).sigmoid(), normal(900, 1, 3, 8, 8)
    seen = []

    def image_of(e):
        seen.append(e.detach().clone())
        return (e.flatten(1) @ W).sigmoid().view(-1, 3, 8, 8)

    def loss_of(img):
        distance = (img - target).square().mean((1, 2, 3))
        return 20 * distance + 0.05 * (30 - (img * other).sum((1, 2, 3)))

    return normal(600, 1, 2, 4, 4), image_of, loss_of, seen


def remembering():
    """A generator whose image is its variable, and the list of variables that it was given."""
    seen = []

    def image_of(e):
        seen.append(e.detach().clone())
        return e

    return image_of, seen


@pytest.mark.parametrize("run", RENO)
def test_the_loop_does_what_renos_own_does(run):
    expected = RENO[run]
    settings, index = expected["settings"], expected["best"]
    e, image_of, loss_of, seen = toy_generator()
    best = tteo.optimize(e, image_of, loss_of, **settings)
    norms = torch.stack([variable.norm() for variable in seen])
    for ours, theirs in (
        (best.history, expected["losses"]),
        (norms, expected["norms"]),
        (seen[-1], expected["last"]),
    ):
        agrees(ours, theirs, tol=1e-6 * max(map(abs, theirs)))
    assert len(seen) == settings["iterations"], "one image per iteration"
    assert best.index.tolist() == [index]
    assert best.loss == best.history[index]
    assert torch.equal(best.e, seen[index])
    assert torch.equal(best.img, image_of(best.e))


def test_the_best_iterate_is_a_copy_and_the_start_is_left_alone():
    e, image_of, loss_of, seen = toy_generator()
    before = e.clone()
    best = tteo.optimize(e, image_of, loss_of, iterations=6, lr=200.0)
    assert torch.equal(e, before)
    assert torch.equal(best.e, before), "overshooting: the best is the start"
    assert not any(torch.equal(variable, before) for variable in seen[1:])
    assert best.e.data_ptr() != e.data_ptr()
    assert not any(t.requires_grad for t in best)


@pytest.mark.parametrize("settings", [
    dict(lr=0.2),
    dict(lr=5.0, clip=0.1, regularize=0.01),
    dict(lr=200.0),
])
def test_starts_of_a_batch_do_not_know_of_each_other(settings):
    e, image_of, loss_of, _ = toy_generator()
    pair = torch.cat([e, 2 * normal(601, *e.shape)])
    both, one, two = (
        tteo.optimize(part, image_of, loss_of, **settings) for part in (pair, pair[:1], pair[1:]))
    for together, a, b in zip(both[:4], one, two):
        assert torch.allclose(together, torch.cat([a, b]), rtol=1e-5, atol=1e-5)
    assert torch.allclose(both.history, torch.cat([one.history, two.history], 1), atol=1e-5)


def test_two_nesterov_steps_by_hand():
    e, a, lr = normal(1, 2, 3).double(), torch.tensor([1.0, 0.5, 3.0]).double(), 0.1

    def image_of(e):
        return e

    def loss_of(e):
        return (a * e**2).sum(1) / 2

    v1 = a * e
    e1 = e - lr * (v1 + 0.9 * v1)                                       # 1.9 lr g
    v2 = 0.9 * v1 + a * e1
    e2 = e1 - lr * (a * e1 + 0.9 * v2)
    best = tteo.optimize(e, image_of, loss_of, iterations=3, lr=lr)
    by_hand = torch.stack([loss_of(e), loss_of(e1), loss_of(e2)])
    assert torch.allclose(best.history, by_hand, rtol=1e-12)
    plain = tteo.optimize(e, image_of, loss_of, iterations=2, lr=lr, momentum=0.0)
    by_hand = loss_of(e - lr * a * e)
    assert torch.allclose(plain.history[1], by_hand, rtol=1e-12), "no momentum, no Nesterov"


def test_the_regularizer_pulls_the_norm_to_that_of_noise_and_does_not_select():
    e = normal(2, 3, 4, 5).requires_grad_()
    n = e.detach().flatten(1).norm(dim=1).view(3, 1, 1)
    g = grad(tteo.norm_penalty(e).sum(), e)
    assert torch.allclose(g, e.detach() * (1 - 19 / n**2), atol=1e-6)
    at_rest = (e * 19**0.5 / n).detach().requires_grad_()
    assert grad(tteo.norm_penalty(at_rest).sum(), at_rest).abs().max() < 1e-6

    def always_seven(e):
        return 0 * e.sum((1, 2)) + 7

    image_of, seen = remembering()
    best = tteo.optimize(e, image_of, always_seven, iterations=3, lr=0.1, regularize=0.5)
    moved = (e - 0.1 * 1.9 * 0.5 * g).detach()
    assert torch.allclose(seen[1], moved, atol=1e-6), "it moves the variable"
    assert (best.history == 7).all(), "it is no part of the loss that selects"
    assert best.index.tolist() == [0, 0, 0]


def test_gradients_are_clipped_start_by_start():
    g = torch.tensor([[[3.0, 4.0]], [[0.03, 0.04]]])                    # norms 5 and 0.05
    clipped = reward.clip_each(g, 0.1)
    assert torch.allclose(clipped[0], g[0] * 0.1 / 5)
    assert torch.equal(clipped[1], g[1])

    def loss_of(e):
        return (e * g).sum((1, 2))

    image_of, seen = remembering()
    tteo.optimize(torch.zeros_like(g), image_of, loss_of, iterations=2, lr=1.0, clip=0.1)
    assert torch.allclose(seen[1], -1.9 * clipped)


def test_k_iterations_are_k_images_and_the_last_keeps_no_graph():
    e, image_of, loss_of, _ = toy_generator()
    graphs = []

    def spy(img):
        graphs.append(img.requires_grad)
        return loss_of(img)

    with torch.no_grad():                           # even where the caller switched gradients off
        tteo.optimize(e, image_of, spy, iterations=4)
    assert graphs == [True, True, True, False]
    with pytest.raises(AssertionError, match="one iteration at least"):
        tteo.optimize(e, image_of, loss_of, iterations=0)


def test_a_loss_of_nan_is_never_the_best():
    nan = math.nan
    losses = iter([[nan, 1.0, nan], [2.0, nan, nan], [2.0, 0.5, nan]])

    def loss_of(e):
        return 0 * e[:, 0] + torch.tensor(next(losses))

    best = tteo.optimize(torch.ones(3, 1), lambda e: e, loss_of, iterations=3)
    assert best.index.tolist() == [1, 2, 0]
    assert best.loss.tolist() == [2.0, 0.5, math.inf]


# --------------------------------------------------------------------------------------
# Test-time embedding optimization: through a student and its decoder
# --------------------------------------------------------------------------------------
@functools.cache
def tiny_world(name):
    """A teacher of random weights, its own student; two things to ask for; distance to an image."""
    teacher = load_teacher(name, random_weights=True)
    if teacher.text:
        asked = ["a blue ring above a green square", "two cats"]
    else:
        asked = torch.tensor([3, 1])
    target = normal(5, *teacher.spec.image).mul(0.2).add(0.5).clamp(0, 1)

    def loss_of(img, asked):
        return (img - target).square().flatten(1).sum(1)

    return teacher, asked, loss_of


def condition(teacher, asked):
    return teacher.cond(teacher.conditions(asked))


@pytest.mark.parametrize("name", TINY)
def test_tteo_lowers_its_loss_from_every_start(name):
    teacher, asked, loss_of = tiny_world(name)
    found = tteo.tteo(teacher, teacher.net, asked, loss_of, starts=3, lr=0.01, generator=seed(0))
    every = found.every
    assert every.history.shape == (4, 2, 3)
    assert every.img.shape == (2, 3, *teacher.spec.image)
    assert found.seconds > 0
    assert (every.loss < every.history[0]).all(), f"{name}: {every.history.tolist()}"
    assert torch.equal(every.loss, every.history.min(0).values)
    assert torch.equal(every.index, every.history.argmin(0))
    assert torch.equal(found.loss, every.loss.min(1).values)
    assert torch.equal(found.start, every.loss.argmin(1))
    assert torch.equal(found.img[1], every.img[1, found.start[1]]), "each prompt has its own best"
    again = loss_of(found.img, asked)
    assert torch.allclose(again, found.loss, rtol=1e-5), "the image is the one that was judged"
    assert 0 <= found.img.min() and found.img.max() <= 1


def test_networks_are_left_as_they_were_and_dropout_is_refused():
    teacher, asked, loss_of = tiny_world("maskgen-tiny")
    net = load_teacher("maskgen-tiny", random_weights=True).net.requires_grad_()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    tteo.tteo(teacher, net, asked, loss_of, starts=2, generator=seed(0))
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert untouched(net, teacher.net, teacher.tokenizer, teacher.text)
    with pytest.raises(AssertionError, match="eval mode"):
        tteo.tteo(teacher, net.train(), asked, loss_of)


@pytest.mark.parametrize("name", ["meissonic-tiny", "maskgen-tiny"])
def test_the_embedding_of_the_mask_has_a_gradient_too(name):
    teacher, asked, loss_of = tiny_world(name)
    net = teacher.net
    x, e, noise, cond = tteo.draw_starts(teacher, net, condition(teacher, asked), 2, 0.6, seed(0))
    e.requires_grad_()
    img = tteo.soft_image(teacher, net, e, cond, 0.1, noise)
    g = grad(loss_of(img, asked).sum(), e)
    masked = (x == net.V)[:, :, 0]
    assert masked.sum(1).tolist() == [round(0.6 * net.L)] * 4
    assert (g.norm(dim=-1) > 0).all()
    assert g[masked].norm() > 0.1 * g.norm()


@pytest.mark.parametrize("name", ["maskbit-tiny", "meissonic-tiny", "maskgen-tiny"])
def test_a_start_is_the_one_that_evaluate_draws_with_this_seed(name):
    teacher, asked, _ = tiny_world(name)
    net = teacher.net
    asked = teacher.conditions(asked) if teacher.text else asked
    x, e, noise, cond = tteo.draw_starts(teacher, net, teacher.cond(asked), 1, 0.6, seed(4))
    assert torch.equal(e, se.embed_tokens(x, *net.tables()))
    z = dimo.student_logits(net, x, cond, *net.tables(), 0.3, noise)
    img = teachers.decode_tokens(teacher.tokenizer, z.argmax(-1), cond)
    there = teachers.generate_student(teacher, net, asked, init_ratio=0.6, noise=0.3, temperature=0,
                                      generator=seed(4))
    assert torch.equal((img * 255 + teacher.spec.rounds / 2).to(torch.uint8), there)

    def one_hot(*args, **kwargs):
        return 1e4 * torch.eye(net.V)[net(*args, **kwargs).argmax(-1)]

    nothing_soft = tteo.soft_image(teacher, one_hot, e, cond, 0.3, noise)
    assert torch.allclose(nothing_soft, img, atol=1e-6)


def test_best_of_n_is_the_smallest_of_n_and_runs_repeat():
    teacher, asked, loss_of = tiny_world("maskgen-tiny")
    best_of = functools.partial(tteo.best_of, teacher, teacher.net, asked, loss_of, 5)
    one, again, other = (best_of(generator=seed(n)) for n in (0, 0, 1))
    assert one.every.history.shape == (1, 2, 5)
    assert torch.equal(one.loss, one.every.history[0].min(1).values)
    assert torch.equal(one.img, again.img) and not torch.equal(one.img, other.img)
    assert len(one.every.loss.unique()) == 10, "starts differ"

    optimized = functools.partial(tteo.tteo, teacher, teacher.net, asked, loss_of, starts=5,
                                  lr=0.01)
    whole, again = optimized(generator=seed(0)), optimized(generator=seed(0))
    chunks = optimized(generator=seed(0), chunk=3)
    assert torch.equal(whole.img, again.img)
    assert torch.allclose(whole.every.history, chunks.every.history, rtol=1e-5)
    assert torch.allclose(whole.img, chunks.img, atol=1e-5), "chunks only save memory"
    assert torch.equal(whole.every.history[0], one.every.loss), "the same seed, the same starts"


def test_starts_of_a_prompt_have_its_condition():
    teacher, asked, _ = tiny_world("maskgen-tiny")
    cond = condition(teacher, asked)
    repeated = tteo.draw_starts(teacher, teacher.net, cond, 2, 0.6)[3]
    for many, few in zip(repeated, cond, strict=True):
        assert torch.equal(many, few[[0, 0, 1, 1]])


def test_the_loss_is_told_what_each_image_was_asked_for():
    teacher, (first, second), loss_of = tiny_world("maskgen-tiny")
    told = []

    def spy(img, asked):
        told.append(asked)
        return loss_of(img, asked)

    tteo.tteo(teacher, teacher.net, [first, second], spy, starts=3, iterations=1, chunk=4)
    assert told == [[first] * 3 + [second], [second] * 2]


# --------------------------------------------------------------------------------------
# Algorithm 1: two whole training steps of the official recipe, by train.py's own loop
# --------------------------------------------------------------------------------------
OFFICIAL = dict(
    teacher="maskgit-tiny", gan=False, cfg=2.0, noise=0.1, redraw=True, smoothing=0.1,
    batch=3, steps=2, lr=1e-3, aux_lr=1e-3, warmup=0, clip=1.0, ema=0.9999,
    log_every=1, save_every=2, eval_every=0, random_weights=True, device="cpu", dtype="fp32")


def random_choices(rng, B=3):
    """What is random in an update, as the golden numbers have it, by the names of train.draw_step.

    Tokens x_theta were not drawn by u from z, but given: they stand in the place of u.
    """
    labels = rng.randint(0, 10, (B,))
    x_init = rng.randint(0, 33, (B, 16, 1))
    noise = rng.standard_normal((B, 17, 48)).astype(np.float32)[:, :16]
    x = rng.randint(0, 33, (B, 16, 1))
    mask = torch.from_numpy(rng.uniform(size=(B, 16, 1)) < 0.6)
    start = dict(which=labels, tokens=x_init, scores=x_init, u=x, noise=noise)
    start = {name: torch.from_numpy(choice) for name, choice in start.items()}
    return start, mask.float().mean((1, 2)), 1 - mask.float()           # the masked score lowest


@functools.cache
def two_training_steps(beta):
    """The checkpoint after two steps, and what each step measured."""
    rng = np.random.RandomState(0)
    gradients = []
    load_networks = set_up.load_networks

    def draw_step(*args, **kwargs):
        start, ratio, scores_t = random_choices(rng)
        again, ratio_aux, scores_aux = random_choices(rng)              # everything is drawn again
        draws = dict(ratio=ratio, scores_t=scores_t, ratio_aux=ratio_aux, scores_aux=scores_aux)
        return start | draws | {f"again_{name}": choice for name, choice in again.items()}

    def load_seeded(run):
        """Three networks that differ, also in their tables, of which train.py has one for all."""
        load_networks(run)
        nets = run.net, run.student.module, run.ema, run.aux.module
        for net, number in zip(nets, (0, 1, 1, 2)):
            net.load_state_dict(seeded_maskgit(number).state_dict())
            net.register_forward_pre_hook(functools.partial(by_own_table, run.E))
        run.student.module.last[4].weight.register_hook(gradients.append)
        run.aux.update = functools.partial(unclipped, run.aux)        # officially only the student

    spec = replace(SPECS["maskgit-tiny"], net=dict(V=32, grid=4, width=48, depth=2, heads=4, mlp=96,
                                                   classes=10))
    with (tempfile.TemporaryDirectory() as folder,
          mock.patch.dict(SPECS, {"maskgit-tiny": spec}),
          mock.patch.object(set_up, "load_networks", load_seeded),
          mock.patch.multiple(train, draw_step=draw_step,
                              initial_tokens=lambda x_init, *_: x_init,
                              sample_tokens=lambda z, u: u)):
        ckpt = finished(settle(OFFICIAL | dict(beta=beta, out=folder)))
        steps = log_of(folder)
    for row, gradient in zip(steps, gradients, strict=True):
        row |= dict(half_square=0.5 * 3 * row["grad_dimo"] ** 2, gradient=gradient)
    return ckpt, steps


def seeded_maskgit(seed):
    return filled(teachers.MaskGit, maskgit_file, seed, V=32, grid=4, width=48, depth=2, heads=4,
                  mlp=96, classes=10)


def by_own_table(E, net, args):
    """Embeddings by the teacher's table -> by the table of the network that reads them."""
    e, *others = args
    x = (e[:, :, None] - E[0]).square().sum(-1).argmin(-1, keepdim=True)                # (B, L, 1)
    return se.embed_tokens(x, *net.tables()), *others


def unclipped(trained, clip, factor):
    return type(trained).update(trained, math.inf, factor)


@pytest.mark.parametrize("beta", [-0.2, 0.0])
def test_training_steps_have_the_golden_losses_and_gradients(beta):
    expected = GOLDEN["two_training_steps"]
    aux = expected["auxiliary"]
    _, steps = two_training_steps(beta)
    for step, measured in enumerate(steps):
        student = expected[str(beta)]["steps"][step]
        assert measured["half_square"] == pytest.approx(student["half_square"], rel=5e-6)
        assert measured["norm_student"] == pytest.approx(student["student_norm"], rel=5e-6)
        assert measured["loss_aux"] == pytest.approx(aux["loss"][step], rel=1e-6)
        assert measured["norm_aux"] == pytest.approx(aux["norm"][step], rel=5e-6)
        agrees(measured["gradient"], **student["gradient"], tol=1e-5, sum_tol=5e-6)


@pytest.mark.parametrize("beta", [-0.2, 0.0])
def test_training_steps_leave_the_golden_weights(beta):
    expected = GOLDEN["two_training_steps"]
    ckpt, _ = two_training_steps(beta)
    for state, theirs in (
        (ckpt["student"], expected[str(beta)]["student"]),
        (ckpt["aux"], expected["auxiliary"]["weights"]),                # it sees no divergence
        (ckpt["ema"], expected[str(beta)]["ema"]),
    ):
        total = sum(t.double().abs().sum() for t in state.values())
        assert abs(total - theirs["all_abs_sum"]) < 2e-3
        agrees(state["blocks.0.attn.qkv.weight"], **theirs["qkv"], tol=5e-6)
