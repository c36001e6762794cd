"""The claims of this repository as proofs: `pytest test_all.py`. CPU, no network, every run the same.

Expected numbers ("golden") were measured on the public implementations of the four teachers and of Di[M]O, at small
sizes and on weights that `seeded` makes from names and shapes alone: so two programs are compared without a download.

    FULL_SIZE=1 pytest test_all.py -k full_size    # MaskBit at its published size too: a minute, 4 GB of memory
"""

import copy
import functools
import itertools
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import dimo
import soft_embed as se
import gan
import reward
import teachers
import tteo
from networks import autoencoders
from networks import clip as clip_net
from teachers import MaskBit, load_teacher
from tests.common import agrees, close, uniform, normal, integers, maskgit_file, filled, small_net, small_tokenizer, half_masked_tokens, run_with_hooks, TableNet, TINY, tiny_inputs, NANO, small_reward, ids_of, rewards_of, ASKED, eq9_inputs, seed


def enumerate_tokens(L, G, V):
    """All V^(L*G) token arrays, (V^(L*G), L, G)."""
    return torch.tensor(list(itertools.product(range(V), repeat=L * G))).view(-1, L, G)


# ============================================================================================ soft embeddings
def test_soft_embedding_of_one_hot_logits_is_the_hard_embedding_bit_for_bit():
    any_table, any_bias = normal(0, 1, 12, 20), normal(1, 20)
    for E, bias in [(any_table, any_bias), small_net().tables(), small_tokenizer().tables()]:
        x, V = integers(2, E.shape[1] - 1, 5, 16, len(E)), E.shape[1] - 1
        z, mask = 1e4 * F.one_hot(x, V).float(), uniform(3, *x.shape) < 0.5
        assert torch.equal(se.soft_embed(z, E, bias), se.embed_tokens(x, E, bias))
        assert torch.equal(se.soft_embed(z, E, bias, mask), se.embed_tokens(x.masked_fill(mask, V), E, bias))


def test_masked_units_become_the_mask_row_and_pass_no_gradient():
    E, bias, mask = normal(0, 2, 6, 8), normal(1, 8), uniform(2, 3, 4, 2) < 0.5
    z = normal(3, 3, 4, 2, 5).requires_grad_()
    se.soft_embed(z, E, bias, mask).square().sum().backward()
    assert (z.grad[mask] == 0).all() and (z.grad[~mask].abs().sum(-1) > 0).all()
    everything = se.soft_embed(z, E, bias, torch.ones_like(mask))
    assert close(everything, (E[0, -1] + E[1, -1] + bias).expand_as(everything))


def test_probabilities_of_the_mask_itself_weigh_its_row():
    E, p = normal(0, 1, 6, 8), normal(1, 2, 3, 1, 6).softmax(-1)                    # V+1 entries, as MaskGit's
    assert close(se.embed_probs(p, E), p[:, :, 0] @ E[0])


def test_gradient_is_exact_for_linear_f():
    E, w = normal(0, 2, 4, 5), normal(1, 2, 5)                                      # L = 2, G = 2, V = 3
    z = normal(2, 1, 2, 2, 3).requires_grad_()
    x = enumerate_tokens(2, 2, 3)                                                   # (81, 2, 2)
    p = z.softmax(-1).expand(81, 2, 2, 3).gather(-1, x[..., None]).flatten(1).prod(1)  # (81,) joint
    truth = (p * (se.embed_tokens(x, E) * w).sum((1, 2))).sum()
    surrogate = (se.soft_embed(z, E) * w).sum()
    assert abs(truth - surrogate) < 1e-6
    assert close(*(torch.autograd.grad(f, z)[0] for f in (truth, surrogate)))


def test_eq_5_bias_is_half_the_trace_of_curvature_times_covariance():
    E, A = normal(0, 1, 17, 6), normal(1, 6, 6)
    H = A + A.T
    f = lambda e: 0.5 * (e @ H * e).sum(-1)
    last = math.inf
    for sharpness in (1, 3, 9, 27):
        z = sharpness * normal(2, 1, 1, 1, 16)
        p, e = z.softmax(-1).flatten(), se.soft_embed(z, E)[0, 0]
        S = torch.einsum("v,vi,vj->ij", p, E[0, :16] - e, E[0, :16] - e)
        bias = (p * f(E[0, :16])).sum() - f(e)
        assert abs(bias - 0.5 * (H @ S).trace()) < 2e-5
        C = torch.linalg.eigvalsh(H).abs().max()
        assert abs(bias) <= C / 2 * S.trace() + 1e-5                                # Eq. (5)
        assert S.trace() < last, "the sharper the logits, the tighter the bound"
        last = S.trace()
    assert last < 1e-3


def test_two_groups_and_a_flat_vocabulary_agree_where_they_mean_the_same():
    tok = autoencoders.BitTokenizer(hidden=32, mult=(1,), blocks=1)                     # 14 bits, two groups of 128
    E, bias = tok.tables()
    flat = F.pad(autoencoders.bits_of(torch.arange(2**14), 14), (0, 0, 0, 1))[None]     # (1, 16384 + 1, 14)
    z = 2 * normal(0, 2, 3, 2, 128)
    joint = (z[..., 1, :, None] + z[..., 0, None, :]).flatten(-2)[:, :, None]       # t = g0 + 128 g1
    assert close(se.soft_embed(z, E, bias), se.soft_embed(joint, flat), atol=5e-6)


def test_tau_divides_the_logits():
    E, z = normal(0, 2, 6, 8), normal(1, 3, 4, 2, 5)
    assert close(se.soft_embed(z, E, tau=0.25), se.soft_embed(4 * z, E))
    assert close(se.soft_embed(z, E, tau=1e-4), se.embed_tokens(z.argmax(-1), E))
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    assert close(se.gumbel_embed(z, E, tau=0.25, noise=noise), se.soft_embed(4 * (z + noise), E))


def test_soft_embedding_is_float32_under_bf16_autocast():
    E, z = normal(0, 1, 1025, 8), normal(1, 2, 3, 1, 1024)
    with torch.autocast("cpu", torch.bfloat16):
        e = se.soft_embed(z.bfloat16(), E.bfloat16())
    assert e.dtype == torch.float32
    assert close(e, se.soft_embed(z.bfloat16().float(), E.bfloat16().float()))


def test_gumbel_without_noise_is_the_soft_embedding():
    E, z, mask = normal(0, 2, 6, 8), normal(1, 3, 4, 2, 5), uniform(2, 3, 4, 2) < 0.5
    without = se.gumbel_embed(z, E, 0.5, mask, 0.7, torch.zeros_like(z))
    assert torch.equal(without, se.soft_embed(z, E, 0.5, mask, 0.7))


def test_gumbel_noise_makes_argmax_a_draw_from_the_softmax():
    z = normal(0, 6)
    noise = se.gumbel_noise((40000, 6), generator=torch.Generator().manual_seed(0))
    freq = torch.bincount((z + noise).argmax(-1), minlength=6) / 40000
    assert close(freq, z.softmax(-1), atol=0.01) and noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.std() - math.pi / 6**0.5) < 0.02


def test_straight_through_is_hard_forward_and_gumbel_backward():
    E, mask, w = normal(0, 2, 6, 8), uniform(2, 3, 4, 2) < 0.3, normal(4, 3, 4, 8)
    z, noise = normal(1, 3, 4, 2, 5).requires_grad_(), normal(3, 3, 4, 2, 5)
    hard = se.straight_through_embed(z, E, 0.5, mask, 0.7, noise)
    x = (z + noise).argmax(-1).masked_fill(mask, 5)
    assert close(hard, se.embed_tokens(x, E, 0.5))
    soft = se.gumbel_embed(z, E, 0.5, mask, 0.7, noise)
    assert close(*(torch.autograd.grad((e * w).sum(), z)[0] for e in (hard, soft)))


def test_reinforce_is_unbiased_over_all_tokens():
    z, x = normal(0, 1, 2, 2, 3).requires_grad_(), enumerate_tokens(2, 2, 3)
    many = z.detach().expand(81, 2, 2, 3).clone().requires_grad_()
    p = z.softmax(-1).expand(81, 2, 2, 3).gather(-1, x[..., None]).flatten(1).prod(1)  # (81,)
    f = normal(1, 81)                                                               # any function of the tokens
    truth = torch.autograd.grad((p * f).sum(), z)[0][0]
    each = 81 * torch.autograd.grad(se.reinforce(many, x, f), many)[0]              # (81, 2, 2, 3): f grad log p
    assert close((p.detach()[:, None, None, None] * each).sum(0), truth)


def test_given_uniforms_decide_the_tokens_by_the_cumulative_rule():
    z, u = 2 * normal(0, 3, 4, 2, 5), uniform(1, 3, 4, 2)
    x = se.sample_tokens(z, 0.7, u)
    steps = (z / 0.7).softmax(-1).double().cumsum(-1)
    for i in np.ndindex(3, 4, 2):
        assert x[i] == min(int(np.searchsorted(steps[i].numpy(), u[i].item(), side="right")), 4)
    almost_one = torch.full((100, 1, 1), 1 - 1e-12, dtype=torch.float64)            # rounded p often sum to less
    assert se.sample_tokens(normal(2, 100, 1, 1, 50), u=almost_one).max() == 49


def test_sampled_frequencies_are_the_softmax_and_temperature_zero_is_argmax():
    N, z = 5000, normal(0, 1, 1, 1, 7)
    grid = ((torch.arange(N) + 0.5) / N).view(N, 1, 1)                              # every quantile once
    for temperature in (1.0, 3.0):
        x = se.sample_tokens(z.expand(N, 1, 1, 7), temperature, grid)
        freq = torch.bincount(x.flatten(), minlength=7) / N
        assert close(freq, (z / temperature).softmax(-1).flatten(), atol=1.5 / N)
    torch.manual_seed(0)
    freq = torch.bincount(se.sample_tokens(z.expand(20000, 1, 1, 7)).flatten(), minlength=7) / 20000
    assert close(freq, z.softmax(-1).flatten(), atol=0.015)                # and with its own uniforms
    assert torch.equal(se.sample_tokens(z, 0), z.argmax(-1))


def test_concentration_of_known_distributions():
    entropy, top1 = se.concentration(torch.zeros(2, 3, 2, 8))
    assert abs(entropy - math.log(8)) < 1e-6 and abs(top1 - 1 / 8) < 1e-6
    entropy, top1 = se.concentration(torch.tensor([0.7, 0.2, 0.1]).log().view(1, 1, 1, 3))
    assert abs(entropy - 0.801819) < 1e-5 and abs(top1 - 0.7) < 1e-6


def test_teacher_fed_soft_tokens_gives_the_golden_logits():
    z, mask = 3 * normal(12, 3, 16, 2, 16), uniform(13, 3, 16, 2) < 0.5
    net = small_net()
    first, _, logits = run_with_hooks(net, se.soft_embed(z, *net.tables(), mask), half_masked_tokens()[1])
    agrees(first, [0.3112896, -0.1164358, 0.8452866, 0.7128058, 1.536242, 0.2294082], 1053.83687)
    agrees(logits, [-0.8597666, 0.3805242, -0.8862616, 0.8370671, 1.13025, 0.7418389], 1339.17286)


def test_decoder_fed_soft_tokens_gives_the_golden_image():
    z, tok = 3 * normal(12, 3, 16, 2, 16)[:2], small_tokenizer()
    img = tok.decode(se.soft_embed(z, *tok.tables()), clamp=False)
    agrees(img, [-0.1725584, -0.3846125, -0.5363255, -0.6236732, -0.6844736, -0.6414636], 13561.109)
# ========================================================================= Di[M]O: masks, starts and guidance
U = [0.0, 0.01, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 0.99, 0.9999]
MASKED_OF_256 = {  # golden: masked positions of 256 at each of U
    "linear": [1, 3, 26, 64, 77, 128, 179, 192, 230, 253, 256],
    "square": [1, 1, 3, 16, 23, 64, 125, 144, 207, 251, 256],
    "cosine": [256, 256, 253, 237, 228, 181, 116, 98, 40, 4, 1],
    "arccos": [256, 254, 240, 215, 206, 171, 130, 118, 74, 23, 2],
}


@pytest.mark.parametrize("schedule", MASKED_OF_256)
def test_schedules_mask_the_golden_number_of_positions(schedule):
    ratio = dimo.mask_ratio(torch.tensor(U), schedule)
    exact = {"linear": lambda u: u, "square": lambda u: u * u, "cosine": lambda u: math.cos(u * math.pi / 2),
             "arccos": lambda u: math.acos(u) / (math.pi / 2)}[schedule]
    assert close(ratio, torch.tensor([exact(u) for u in U]))
    mask = dimo.exact_mask(ratio, uniform(0, len(U), 256, 1))
    assert mask.sum((1, 2)).tolist() == MASKED_OF_256[schedule]


def test_a_token_of_probability_zero_is_not_drawn_even_where_u_is_on_its_edge():
    z = torch.tensor([-math.inf, 0.0, 0.0, -math.inf]).expand(1, 3, 1, 4)
    assert se.sample_tokens(z, u=torch.tensor([0.0, 0.5, 0.49]).view(1, 3, 1)).flatten().tolist() == [1, 2, 1]


def test_mage_ratios_are_a_normal_truncated_to_half_and_one():
    r = dimo.mask_ratio((torch.arange(20000) + 0.5) / 20000, "mage")                # every quantile once
    assert (r >= 0.5).all() and (r <= 1).all() and (r.diff() >= 0).all() and r[0] < 0.501 and r[-1] > 0.999
    pdf = lambda b: math.exp(-b * b / 2) / math.sqrt(2 * math.pi)
    cdf = lambda b: (1 + math.erf(b / math.sqrt(2))) / 2
    lo, hi = (0.5 - 0.55) / 0.25, (1 - 0.55) / 0.25
    assert abs(r.mean() - (0.55 + 0.25 * (pdf(lo) - pdf(hi)) / (cdf(hi) - cdf(lo)))) < 1e-4  # 0.694


def test_unknown_schedules_are_named():
    for f in (dimo.mask_ratio, lambda u, s: dimo.guidance_scale(u, 2.0, schedule=s)):
        with pytest.raises(ValueError, match="unknown .* schedule 'sine'"):
            f(torch.rand(2), "sine")


@pytest.mark.parametrize("L, counts", [(128, [1, 13, 64, 77, 115, 122, 128]),
                                       (256, [1, 26, 128, 154, 230, 243, 256]),
                                       (4096, [1, 410, 2048, 2458, 3686, 3891, 4096])])
def test_initial_mask_has_the_golden_count(L, counts):
    for ratio, count in zip([0.0, 0.1, 0.5, 0.6, 0.9, 0.95, 1.0], counts):
        x = dimo.initial_tokens(integers(1, 9, 3, L, 1), ratio, uniform(2, 3, L, 1), V=9)
        assert (x == 9).sum((1, 2)).tolist() == [count] * 3


def test_mask_counts_round_half_to_even_and_differ_by_sample():
    assert dimo.exact_mask(0.5, uniform(0, 2, 5, 1)).sum((1, 2)).tolist() == [2, 2]  # 2.5 -> 2
    assert dimo.exact_mask(0.5, uniform(0, 2, 7, 1)).sum((1, 2)).tolist() == [4, 4]  # 3.5 -> 4
    ratio = torch.tensor([0.0, 0.25, 1.0])
    assert dimo.exact_mask(ratio, uniform(0, 3, 4, 2)).sum((1, 2)).tolist() == [1, 2, 8]  # units, not positions
    assert dimo.exact_mask(ratio, uniform(0, 3, 4, 2), least=0).sum((1, 2)).tolist() == [0, 2, 8]


def test_smallest_scores_are_masked_so_that_every_unit_is_equally_likely():
    scores = uniform(0, 4000, 5, 2)
    mask = dimo.exact_mask(0.3, scores)
    assert (scores.masked_fill(~mask, 0).amax((1, 2)) < scores.masked_fill(mask, 1).amin((1, 2))).all()
    assert close(mask.float().mean(0), torch.full((5, 2), 0.3), atol=0.025)
    assert (mask[..., 0] != mask[..., 1]).any(), "the groups of one position are masked on their own"


def test_initial_tokens_are_the_given_ones_where_not_masked():
    tokens, scores = integers(0, 9, 3, 16, 2), uniform(1, 3, 16, 2)
    x = dimo.initial_tokens(tokens, 0.6, scores, V=9)
    mask = dimo.exact_mask(0.6, scores)
    assert torch.equal(x[~mask], tokens[~mask]) and (x[mask] == 9).all()
    assert (x == 9).sum((1, 2)).tolist() == [19] * 3                                # of 32 units, at 0.6


def test_perturbation_keeps_the_variance_and_reaches_the_network():
    e, noise, E = normal(0, 400, 16, 32), normal(1, 400, 16, 32), normal(2, 1, 5, 32)
    assert abs(dimo.perturb(e, 0.3, noise).var() - 1) < 0.01
    assert close(dimo.perturb(e, 0.6, noise), 0.6 * noise + 0.8 * e)
    x, identity = integers(3, 5, 400, 16, 1), lambda e, cond, s=0.0, noise=None: dimo.perturb(e, s, noise) if s else e
    assert torch.equal(dimo.student_logits(identity, x, (), E, 1.0), se.embed_tokens(x, E, 1.0))
    assert close(dimo.student_logits(identity, x, (), E, 1.0, 0.6, noise),
                          0.6 * noise + 0.8 * se.embed_tokens(x, E, 1.0))


def test_guidance_extrapolates_from_the_unconditional_logits_in_one_batch():
    c, u, cond = normal(0, 2, 4, 1, 7), normal(1, 2, 4, 1, 7), (torch.tensor([3, 5]),)
    net, e = TableNet(c, u), torch.zeros(2, 4, 8)
    assert torch.equal(dimo.guided_logits(net, e, cond, 1.0), c) and net.calls == [2]  # w = 1 costs one pass
    assert close(dimo.guided_logits(net, e, cond, 2.0), 2 * c - u) and net.calls == [2, 4]
    z = dimo.guided_logits(net, e, cond, torch.tensor([0.0, 1.5]))
    assert close(z[0], u[0]) and close(z[1], 1.5 * c[1] - 0.5 * u[1])


def test_guidance_schedules_start_low_and_end_high():
    r = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert dimo.guidance_scale(r, 3.0).tolist() == [3.0] * 4
    for low, schedule, expected in [(1.0, "linear", [1.0, 1.5, 2.0, 3.0]), (2.0, "linear", [2.0, 2.25, 2.5, 3.0]),
                                    (1.0, "cosine", [1.0, 2 - 0.5**0.5, 2.0, 3.0])]:
        assert close(dimo.guidance_scale(r, 3.0, low, schedule), torch.tensor(expected))


# ======================================================================================= Di[M]O: the gradient
def four_logits():
    """Golden inputs: teacher with and without condition, auxiliary, student, (2, 4, 1, 7) each; mask; targets."""
    rng = np.random.RandomState(0)
    z = [torch.from_numpy((2 * rng.standard_normal((2, 4, 1, 7))).astype(np.float32)) for _ in range(4)]
    mask = torch.from_numpy(rng.uniform(size=(2, 4, 1)) < 0.6)
    return *z, mask, torch.from_numpy(rng.randint(0, 7, (2, 4, 1)))


@pytest.mark.parametrize("beta, first, abs_sum, half_square", [
    (0.0, [-0.01945913, 0.3668868, 0.001037836, -0.2920607, -0.08509952, 0.005899787], 2.0657158, 0.54736656),
    (1.0, [-0.01301312, 0.886135, -0.02885032, -0.3401237, -0.3921244, 0.01457721], 2.7841565, 1.2037075),
    (-0.2, [-0.02074838, 0.2630371, 0.007015467, -0.2824481, -0.02369452, 0.004164279], 2.0444738, 0.5456574),
])
def test_guided_loss_gradient_is_the_golden_one(beta, first, abs_sum, half_square):
    c, u, z_aux, _, mask, _ = four_logits()
    unguided = TableNet(z_aux, torch.full_like(z_aux, math.nan))                    # the auxiliary is not guided
    args = TableNet(c, u), unguided, torch.zeros(2, 4, 8), (torch.tensor([0, 1]),), mask
    g = dimo.dimo_grad(*args, w=2.0, beta=beta)
    agrees(g / 2, first, abs_sum, tol=1e-6)
    assert abs(0.5 * g.square().sum() / 2 - half_square) < 1e-6
    weighted = dimo.dimo_grad(*args, w=2.0, beta=beta, weight=torch.tensor([3.0, 5.0]))
    assert close(weighted, g * torch.tensor([3.0, 5.0]).view(2, 1, 1, 1))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.2, 0.5])
def test_surrogate_gradient_is_the_gradient_of_the_divergence(beta):
    z_phi, z_psi = (2 * normal(seed, 3, 6, 2, 9).double() for seed in (0, 1))
    mask, _ = uniform(2, 3, 6, 2) < 0.5, z_psi.requires_grad_()
    log_q, log_p = z_phi.log_softmax(-1), z_psi.log_softmax(-1)
    forward, reverse = (log_q.exp() * (log_q - log_p)).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)
    assert (forward > 0).all() and (reverse > 0).all()
    (((1 - beta) * forward + beta * reverse) * mask).sum().backward()               # float64 autograd
    g = dimo.divergence_grad(z_phi, z_psi.detach(), mask, beta)
    assert close(g.double(), z_psi.grad, atol=2e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.2, 0.5])
def test_gradient_vanishes_at_equality_off_the_mask_and_in_sum(beta):
    z_phi, z_psi, mask = normal(0, 3, 6, 2, 9), normal(1, 3, 6, 2, 9), uniform(2, 3, 6, 2) < 0.5
    g = dimo.divergence_grad(z_phi, z_psi, mask, beta)
    assert (g[~mask] == 0).all() and (g[mask].abs().sum(-1) > 0.01).all()
    assert g.sum(-1).abs().max() < 1e-6, "a shift of the logits changes nothing"
    same = dimo.divergence_grad(z_phi, z_phi + 3.0, mask, beta)                     # equal up to such a shift
    assert same.abs().max() < 1e-6


def test_gradient_of_bf16_logits_is_computed_in_float32():
    z_phi, z_psi = normal(0, 2, 3, 1, 9).bfloat16(), normal(1, 2, 3, 1, 9).bfloat16()
    mask = torch.ones(2, 3, 1).bool()
    g = dimo.divergence_grad(z_phi, z_psi, mask, -0.2)
    assert g.dtype == torch.float32
    assert torch.equal(g, dimo.divergence_grad(z_phi.float(), z_psi.float(), mask, -0.2))


def test_descending_the_gradient_lowers_the_divergence():
    z_phi, z_psi, mask = normal(0, 2, 3, 1, 9), normal(1, 2, 3, 1, 9), torch.ones(2, 3, 1).bool()
    for beta in (0.0, 1.0, -0.2):
        z = z_psi.clone()
        for _ in range(2000):
            z -= dimo.divergence_grad(z_phi, z, mask, beta)
        assert close(z.softmax(-1), z_phi.softmax(-1), atol=1e-3), f"beta = {beta} does not arrive"


def test_backward_with_g_is_the_squared_error_trick():
    W, h, g = normal(0, 5, 9).requires_grad_(), normal(1, 2, 3, 1, 5), normal(2, 2, 3, 1, 9)
    z = h @ W
    direct = torch.autograd.grad(z, W, g / 2, retain_graph=True)[0]
    trick = torch.autograd.grad(0.5 * (z - (z - g).detach()).square().sum() / 2, W)[0]
    assert close(direct, trick, atol=1e-5)


def test_no_gradient_reaches_teacher_or_auxiliary():
    teacher, aux = (nn.Linear(8, 9) for _ in range(2))
    nets = [lambda e, cond, m=m: m(e)[:, :, None] for m in (teacher, aux)]
    g = dimo.dimo_grad(*nets, normal(0, 2, 3, 8), (), torch.ones(2, 3, 1).bool())
    assert not g.requires_grad and g.shape == (2, 3, 1, 9)


# ====================================================================================== Di[M]O: the auxiliary
@pytest.mark.parametrize("alpha, loss, first, abs_sum", [
    (0.0, 2.1218758, [-0.003803841, 0.2398664, -0.00162385, 0.02193434, -0.2690989, -0.0008281669], 1.2416957),
    (1.0, 0.24525063, [-0.01899043, 0.03159697, -0.01076135, 0.0004518298, -0.004767571, 7.860296e-05], 0.1936351),
])
def test_auxiliary_loss_is_the_golden_one(alpha, loss, first, abs_sum):
    _, _, z, z_student, mask, x = four_logits()
    z.requires_grad_(), z_student.requires_grad_()
    value = dimo.aux_loss(z, x, mask, z_student=z_student, alpha=alpha)
    value.backward()
    assert abs(value - loss) < 1e-6 and z_student.grad is None
    agrees(z.grad, first, abs_sum, tol=1e-6)


def test_auxiliary_loss_mixes_its_targets_and_divides_by_a_given_count():
    _, _, z, z_student, mask, x = four_logits()
    hard, soft, mixed = (dimo.aux_loss(z, x, mask, z_student=z_student, alpha=a) for a in (0.0, 1.0, 0.25))
    assert close(mixed, 0.75 * hard + 0.25 * soft)
    for alpha, loss in ((0.0, hard), (1.0, soft)):                                  # three units are masked
        assert close(dimo.aux_loss(z, x, mask, count=6, z_student=z_student, alpha=alpha), loss / 2)


def test_auxiliary_of_unsmoothed_loss_is_least_at_the_students_distribution():
    p = normal(0, 7).softmax(-1)
    x = torch.repeat_interleave(torch.arange(7), (p * 1e4).round().long())[None, :, None]  # in the shares of p
    z = p.log().expand(1, x.shape[1], 1, 7).clone().requires_grad_()
    dimo.aux_loss(z, x, torch.ones_like(x).bool(), smoothing=0.0).backward()
    assert z.grad.sum((0, 1, 2)).abs().max() < 1e-4


# =========================================================================== Di[M]O: two whole training steps
def seeded_maskgit(seed):
    """A small MaskGit on seeded weights, all trained but the embedding layer, as the official code has it."""
    net = filled(teachers.MaskGit, maskgit_file, seed, V=32, grid=4, width=48, depth=2, heads=4, mlp=96, classes=10)
    net.requires_grad_()
    for p in net.frozen():
        p.requires_grad_(False)
    return net


@functools.cache
def two_training_steps(beta, B=3):
    """The official recipe, composed of dimo's functions, all random choices given: student, aux, ema, log."""
    teacher, student, aux = (seeded_maskgit(seed) for seed in range(3))
    ema, log, rng = {k: v.clone() for k, v in student.state_dict().items()}, [], np.random.RandomState(0)
    opt, opt_aux = (torch.optim.Adam(m.parameters(), 1e-3, eps=1e-6) for m in (student, aux))

    def choices():
        labels, x_init = rng.randint(0, 10, (B,)), rng.randint(0, 33, (B, 16, 1))
        noise = rng.standard_normal((B, 17, 48)).astype(np.float32)[:, :16]
        x, mask = rng.randint(0, 33, (B, 16, 1)), rng.uniform(size=(B, 16, 1)) < 0.6
        return *(torch.from_numpy(a) for a in (labels, x_init, noise, x, mask)),

    embed = lambda net, x: se.embed_tokens(x, *net.tables())
    for step in range(2):
        labels, x_init, noise, x, mask = choices()
        z = dimo.student_logits(student, x_init, (labels,), *student.tables(), 0.1, noise)
        x_t = x.masked_fill(mask, 32)
        aux_on_x_t = lambda e, cond: aux(embed(aux, x_t), cond)                     # here its table is its own
        g = dimo.dimo_grad(teacher, aux_on_x_t, embed(teacher, x_t), (labels,), mask, 2.0, beta)
        opt.zero_grad(), z.backward(g / B)
        grad = student.last[4].weight.grad.clone()
        student_norm = nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        opt.step()

        labels, x_init, noise, x, mask = choices()                                  # everything is drawn again
        loss = dimo.aux_loss(aux(embed(aux, x.masked_fill(mask, 32)), (labels,)), x, mask)
        opt_aux.zero_grad(), loss.backward()
        aux_norm = nn.utils.clip_grad_norm_(aux.parameters(), math.inf)
        opt_aux.step()

        rate = min(0.9999, (1 + step) / (10 + step))
        for k, v in student.state_dict().items():
            ema[k].lerp_(v, 1 - rate)
        log.append((0.5 * g.square().sum() / B, student_norm, loss, aux_norm, grad))
    return student.state_dict(), aux.state_dict(), ema, log


@pytest.mark.parametrize("beta, loss, norms, grads", [
    (-0.2, (0.47420433, 0.35533658), (20.74114, 17.771184),
     [([-0.07407922, -0.4134999, 0.1088503, -0.01595422], 6.4698722),
      ([-0.05430209, -0.6395177, -0.052214, 0.1377407], 6.191268)]),
    (0.0, (0.5104354, 0.35864231), (21.860379, 18.213448),
     [([-0.07854707, -0.4319198, 0.142542, -0.01691756], 6.7175602),
      ([-0.04627868, -0.7026296, -0.04909799, 0.1416506], 6.2604123)]),
])
def test_training_steps_have_the_golden_losses_and_gradients(beta, loss, norms, grads):
    log = two_training_steps(beta)[-1]
    for step in range(2):
        half_square, student_norm, aux_loss, aux_norm, grad = log[step]
        assert half_square.item() == pytest.approx(loss[step], rel=5e-6)
        assert student_norm.item() == pytest.approx(norms[step], rel=5e-6)
        assert aux_loss.item() == pytest.approx((4.2303147, 3.8511181)[step], rel=1e-6)
        assert aux_norm.item() == pytest.approx((7.1805265, 5.0439053)[step], rel=5e-6)
        agrees(grad, *grads[step], tol=1e-5)
AUX_AFTER = [5576.88174, [-0.02610291, 0.04906511, 0.0842131, -0.2704769], 785.50728]  # sees no divergence


@pytest.mark.parametrize("beta, student, ema", [
    (-0.2, [5554.20803, [0.04294834, 0.1343205, 0.1013394, -0.08482286], 804.87903],
           [5554.18135, [0.0429663, 0.1341298, 0.101259, -0.08474259], 804.88023]),
    (0.0, [5554.34129, [0.04293081, 0.1343279, 0.1012743, -0.08480835], 804.8785],
          [5554.30522, [0.04295196, 0.1341359, 0.1012057, -0.08473072], 804.87683]),
])
def test_training_steps_leave_the_golden_weights(beta, student, ema):
    for state, (total, first, abs_sum) in zip(two_training_steps(beta), (student, AUX_AFTER, ema)):
        assert abs(sum(v.double().abs().sum() for v in state.values()) - total) < 2e-3
        agrees(state["blocks.0.attn.qkv.weight"], first, abs_sum, tol=5e-6)


def nano_gan(B=4):
    """A frozen nano teacher, a discriminator, logits, condition and tables, all seeded."""
    torch.manual_seed(0)
    net = MaskBit(**NANO.net).eval().requires_grad_(False)
    disc = gan.Discriminator(32, gan.head_layers(3, 2), width=16, mlp=16, grid=4)
    return net, disc, torch.randn(B, 16, 2, 8), (torch.arange(B) % 3,), *net.tables()


def test_gan_gradient_is_autograd_of_equation_8_and_reaches_the_student_alone():
    net, disc, z, cond, E, bias = nano_gan()
    mask = torch.rand(4, 16, 2) < 0.5
    g, loss = gan.gan_grad(z, disc, net, cond, mask, E, bias)
    z64 = z.double().requires_grad_()                       # the same by hand, in float64, without the functions of gan.py
    p = z64.softmax(-1)
    e = sum(torch.where(mask[:, :, k, None], E[k, -1].double(), p[:, :, k] @ E[k, :-1].double()) for k in range(2)) + bias
    d = copy.deepcopy(disc).double()(copy.deepcopy(net).double()(e, cond, disc.layers))
    true = -torch.sigmoid(d).log().mean()
    true.backward()
    assert abs(loss - true) < 1e-6 and (g - z64.grad).abs().max() < 1e-6 * max(1, z64.grad.abs().max())
    assert g.abs().sum() > 0 and all(p.grad is None for p in (*net.parameters(), *disc.parameters()))
    assert (g[mask] == 0).all() and (g[~mask].abs().sum(-1) > 0).all()      # masked units hide their logits


def test_discriminator_step_trains_the_heads_alone_and_masks_real_and_fake_alike():
    net, disc, z, cond, E, bias = nano_gan()
    x = torch.randint(8, (4, 16, 2))
    z = (F.one_hot(x, 8) * 1e4).float().requires_grad_()                    # one-hot fakes that equal the real tokens
    for share in (0.0, 0.4, 1.0):
        d_real, d_fake = gan.disc_logits(z, x, disc, net, cond, torch.rand(4, 16, 2) < share, E, bias)
        assert torch.allclose(d_real, d_fake, atol=1e-6)                    # same masks, so D cannot tell them apart
    gan.disc_loss(d_real, d_fake).backward()
    assert z.grad is None and all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in disc.parameters())


def test_gan_losses_are_equations_7_and_8():
    d_real, d_fake = torch.tensor([0.3, -1.2, 4.0]), torch.tensor([-0.7, 2.0, 0.1])
    D = torch.sigmoid
    assert torch.allclose(gan.disc_loss(d_real, d_fake), -D(d_real).log().mean() - (1 - D(d_fake)).log().mean())
    assert torch.allclose(gan.gen_loss(d_fake), -D(d_fake).log().mean())


def test_gan_mask_ratio_zero_masks_nothing():
    scores = torch.rand(2, 16, 2)
    assert dimo.exact_mask(0.0, scores, least=0).sum() == 0 and dimo.exact_mask(0.95, scores, least=0).sum() == 2 * 30


@pytest.mark.parametrize("teacher, depth, features, heads, mlp, grid, millions", [
    ("MaskBit", 24, 1024, 4, 2048, 16, 85), ("MaskGit", 24, 768, 4, 2048, 16, 72), ("MaskGen", 16, 1024, 6, 4096, None, 65)])
def test_discriminator_has_about_the_size_of_table_5(teacher, depth, features, heads, mlp, grid, millions):
    with torch.device("meta"):
        disc = gan.Discriminator(features, gan.head_layers(depth, heads), 1024, mlp, grid)
    assert abs(sum(p.numel() for p in disc.parameters()) / 1e6 / millions - 1) < 0.1
    assert len(disc.layers) == heads and disc.layers[-1] == depth - 1


@pytest.mark.parametrize("name", TINY)
def test_discriminator_reads_every_teacher_and_its_gradient_reaches_the_logits(name):
    teacher, x, _, cond = tiny_inputs(name)
    net, mask = teacher.net, x == teacher.net.V
    torch.manual_seed(0)
    disc = gan.Discriminator(net.width, gan.head_layers(net.depth, 2), 16, 16, net.feature_grid)
    z = torch.randn(*x.shape, net.V + (name == "maskgit-tiny"))
    g, _ = gan.gan_grad(z, disc, net, cond, mask, *net.tables())
    assert g.shape == z.shape and (g[mask] == 0).all() and (g[~mask].abs().sum(-1) > 0).all()


def test_heads_read_a_row_of_tokens_by_convolutions_in_one_dimension():
    row = gan.Head(8, 8, grid=None)
    assert isinstance(row.net[0], torch.nn.Conv1d) and row(torch.randn(2, 12, 8)).shape == (2, 8)
    assert gan.head_layers(24, 4) == (5, 11, 17, 23) and gan.head_layers(16, 6) == (1, 4, 7, 9, 12, 15)


# ====================================================================================== reward.py: gradients
@pytest.mark.parametrize("name", reward.REWARDS)
def test_gradient_of_every_reward_at_the_pixels_is_its_finite_difference(name):
    model, ids = copy.deepcopy(small_reward(name)).double(), ids_of(name)
    img, direction = uniform(4, 2, 3, 61, 58).requires_grad_(), normal(5, 2, 3, 61, 58).double()
    f = lambda x: model(clip_net.preprocess(x, 56), ids)
    score = f(img)
    g = torch.autograd.grad(score[0], img)[0]
    step = 1e-5
    slope = (f(img + step * direction) - f(img - step * direction)).detach() / (2 * step)
    assert score.dtype == torch.float64 and abs((g * direction).sum() - slope[0]) < 1e-7 * max(1, abs(slope[0]))
    assert (g[1] == 0).all() and g[0].abs().sum() > 0                   # the second image is another pair's
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["maskbit-tiny", "maskgit-tiny", "maskgen-tiny"])
def test_reward_gradient_is_autograd_of_equation_9_and_reaches_the_student_alone(name):
    (z, tokenizer, cond, prompts), rewards = eq9_inputs(name), rewards_of("imagereward", "clip")
    z.requires_grad_()
    g, means = reward.reward_grad(z, tokenizer, cond, rewards, prompts, reward.SEED, tau=1.5)
    E, bias = tokenizer.tables()                                        # by hand, all images at once
    p = (z / 1.5).softmax(-1)
    img = tokenizer.decode(sum(p[:, :, k] @ E[k, :-1] for k in range(len(E))) + bias, cond).clamp(0, 1)
    scores = rewards(img, prompts)
    loss = -(1.0 * scores["imagereward"] + 0.2 * scores["clip"]).mean()
    expected = torch.autograd.grad(loss, z)[0]
    assert (g - expected).abs().max() < 1e-5 * expected.abs().max() and expected.abs().max() > 0
    assert means.keys() == scores.keys() and all(abs(means[k] - s.mean()) < 1e-5 for k, s in scores.items())
    assert z.grad is None and not g.requires_grad and not means["clip"].requires_grad
    assert all(p.grad is None and not p.requires_grad for m in (tokenizer, rewards) for p in m.parameters())


def test_chunks_change_nothing_but_the_memory():
    (z, tokenizer, cond, prompts), rewards = eq9_inputs("maskgen-tiny", B=5), rewards_of("imagereward", "clip")
    seen = []
    rewards.register_forward_pre_hook(lambda module, args: seen.append((len(args[0]), args[1])))
    g, means = reward.reward_grad(z, tokenizer, cond, rewards, prompts, reward.SEED, chunk=5)
    for chunk, sizes in ((1, [1] * 5), (2, [2, 2, 1]), (8, [5])):
        seen.clear()
        g_c, means_c = reward.reward_grad(z, tokenizer, cond, rewards, prompts, reward.SEED, chunk=chunk)
        assert [n for n, _ in seen] == sizes and sum([p for _, p in seen], []) == prompts
        assert (g_c - g).abs().max() < 1e-5 * g.abs().max()
        assert all(abs(means_c[k] - v) < 1e-5 for k, v in means.items())


def test_an_images_reward_gradient_is_clipped_by_itself():
    (z, tokenizer, cond, prompts), rewards = eq9_inputs("maskgen-tiny", B=5), rewards_of("imagereward", "clip")
    g, _ = reward.reward_grad(z, tokenizer, cond, rewards, prompts, reward.SEED)
    norms = 5 * g.flatten(1).norm(dim=1)                          # of R_i: without the 1/B of the mean
    limit = norms.sort()[0][2].item() * 1.01                      # three of five are below
    clipped, _ = reward.reward_grad(z, tokenizer, cond, rewards, prompts, reward.SEED, chunk=2, clip=limit)
    for own, image, norm in zip(clipped, g, norms):
        assert (own - image * min(1, limit / norm.item())).abs().max() < 1e-5 * image.abs().max()
    assert (norms > limit).sum() == 2


def test_only_one_chunks_graph_is_alive_at_a_time():
    (z, tokenizer, cond, prompts), rewards, alive = eq9_inputs("maskgen-tiny", B=4), rewards_of("clip"), []

    def look(module, args):
        assert not any(earlier() is not None for earlier in alive), "an earlier chunk's image is still in memory"
        alive.append(weakref.ref(args[0]))

    rewards.register_forward_pre_hook(look)
    reward.reward_grad(z, tokenizer, cond, rewards, prompts, {"clip": 1.0})
    assert len(alive) == 4


def test_climbing_the_gradient_raises_the_reward():
    (z, tokenizer, cond, prompts), rewards = eq9_inputs("maskbit-tiny"), rewards_of("hps")
    means = []
    for _ in range(15):
        g, mean = reward.reward_grad(z, tokenizer, cond, rewards, prompts, {"hps": 1.0}, chunk=3)
        z, _ = z - 0.5 * g / g.abs().max(), means.append(mean["hps"].item())
    assert all(b > a for a, b in zip(means[:8], means[1:])) and means[-1] > means[0] + 0.05


def test_checkpointing_changes_neither_scores_nor_gradients():
    plain, saving = (rewards_of("clip", "imagereward", checkpointing=on) for on in (False, True))
    img = uniform(6, 2, 3, 40, 40).float().requires_grad_()
    results, passes = [], {False: 0, True: 0}
    for rewards in (plain, saving):
        def count(module, args, on=rewards.checkpointing):
            passes[on] += 1

        rewards.models["clip"].clip.visual.register_forward_pre_hook(count)
        scores = rewards(img, ASKED[:2])
        results.append((scores, torch.autograd.grad(reward.weighted(scores, reward.SEED).sum(), img)[0]))
    (a, g), (b, h) = results
    assert all(torch.equal(a[k], b[k]) for k in a) and close(g, h) and passes == {False: 1, True: 2}
# ================================================================================================= tteo.py
# ReNO's own loop, run on two losses of a linear-sigmoid generator, five times: settings of `optimize`, the weighted
# loss and the norm of the variable at every generation, the index of the best, first entries of the last variable.
RENO_RUNS = {
    "its defaults": (dict(iterations=8, lr=5.0, clip=0.1, regularize=0.01),
        [3.45747113, 3.16622734, 2.8104279, 2.50045347, 2.37743664, 2.41202855, 2.42957163, 2.41393423],
        [5.40261364, 4.78872108, 4.09782362, 3.71388507, 4.12794256, 4.82698536, 5.19040442, 5.22804499], 4,
        [-1.00446677, 1.28331852, -0.311138779, -0.684122801, 0.200449735, -1.46944427, 0.0507860035, -1.65121281]),
    "the paper's": (dict(iterations=4, lr=0.2),
        [3.45747113, 3.41872311, 3.36441422, 3.29718637], [5.40261364, 5.31785297, 5.19934893, 5.05322742], 3,
        [0.000586079143, -0.36716339, -1.22242379, -0.52241379, 0.482113838, -0.371284783, -0.183770269, -0.519194365]),
    "regularized": (dict(iterations=4, lr=0.2, regularize=0.01),
        [3.45747113, 3.41900992, 3.36525202, 3.29893541], [5.40261364, 5.31912708, 5.20309734, 5.06114149], 3,
        [0.00063741405, -0.367852747, -1.22430158, -0.52319628, 0.4828628, -0.371749878, -0.184104532, -0.519938171]),
    "plain momentum": (dict(iterations=4, lr=0.2, nesterov=False),
        [3.45747113, 3.43703437, 3.39856315, 3.34455991], [5.40261364, 5.35782576, 5.27378559, 5.15639925], 3,
        [0.0138891432, -0.40656656, -1.23729861, -0.521114767, 0.490625083, -0.346714646, -0.199974805, -0.512826264]),
    "overshooting": (dict(iterations=6, lr=200.0),
        [3.45747113, 5.75727272, 5.73713017, 5.73413324, 5.72744465, 5.67194653],
        [5.40261364, 117.876198, 170.306625, 217.164215, 259.369598, 297.425873], 0,
        [-22.0539742, 72.563591, 33.0910759, -3.09352708, 1.55658948, -49.0561523, 20.1533775, -23.3849716]),
}


def toy_generator(seen):
    """ReNO's toy problem: its start, image_of (which notes each variable it is given in `seen`), loss_of."""
    W, T, Q = normal(700, 32, 192) / 32**0.5, normal(800, 1, 3, 8, 8).sigmoid(), normal(900, 1, 3, 8, 8)

    def image_of(e):
        seen.append(e.detach().clone())
        return (e.flatten(1) @ W).sigmoid().view(-1, 3, 8, 8)

    def loss_of(img):
        return 20 * (img - T).square().mean((1, 2, 3)) + 0.05 * (30 - (img * Q).sum((1, 2, 3)))

    return normal(600, 1, 2, 4, 4), image_of, loss_of


@pytest.mark.parametrize("run", RENO_RUNS)
def test_the_loop_does_what_renos_own_does(run):
    settings, losses, norms, index, last = RENO_RUNS[run]
    e, image_of, loss_of = toy_generator(seen := [])
    best = tteo.optimize(e, image_of, loss_of, **settings)
    for ours, theirs in ((best.history, losses), (torch.stack([v.norm() for v in seen]), norms), (seen[-1], last)):
        agrees(ours, theirs, tol=1e-6 * max(map(abs, theirs)))
    assert best.index.tolist() == [index] and best.loss == best.history[index]
    assert torch.equal(best.e, seen[index]) and torch.equal(best.img, image_of(best.e))
    assert len(seen) == settings["iterations"] + 1, "an image an iteration, and the one of the line above"


def test_the_best_iterate_is_a_copy_and_the_start_is_left_alone():
    e, image_of, loss_of = toy_generator(seen := [])
    before = e.clone()
    best = tteo.optimize(e, image_of, loss_of, iterations=6, lr=200.0)
    assert torch.equal(e, before) and torch.equal(best.e, before), "overshooting: the best is the start"
    assert not any(torch.equal(v, before) for v in seen[1:]) and best.e.data_ptr() != e.data_ptr()
    assert not any(t.requires_grad for t in best)


@pytest.mark.parametrize("settings", [dict(lr=0.2), dict(lr=5.0, clip=0.1, regularize=0.01), dict(lr=200.0)])
def test_starts_of_a_batch_do_not_know_of_each_other(settings):
    e, image_of, loss_of = toy_generator([])
    pair = torch.cat([e, 2 * normal(601, *e.shape)])
    both, one, two = (tteo.optimize(part, image_of, loss_of, **settings) for part in (pair, pair[:1], pair[1:]))
    for together, a, b in zip(both[:4], one, two):
        assert torch.allclose(together, torch.cat([a, b]), rtol=1e-5, atol=1e-5)
    assert torch.allclose(both.history, torch.cat([one.history, two.history], 1), atol=1e-5)


def test_two_nesterov_steps_by_hand():
    e, a, lr = normal(1, 2, 3).double(), torch.tensor([1.0, 0.5, 3.0]).double(), 0.1
    loss_of = lambda e: (a * e**2).sum(1) / 2
    v1 = a * e
    e1 = e - lr * (v1 + 0.9 * v1)                                                             # 1.9 lr g
    v2 = 0.9 * v1 + a * e1
    e2 = e1 - lr * (a * e1 + 0.9 * v2)
    best = tteo.optimize(e, lambda e: e, loss_of, iterations=3, lr=lr)
    assert torch.allclose(best.history, torch.stack([loss_of(t) for t in (e, e1, e2)]), rtol=1e-12)
    plain = tteo.optimize(e, lambda e: e, loss_of, iterations=2, lr=lr, momentum=0.0)
    assert torch.allclose(plain.history[1], loss_of(e - lr * a * e), rtol=1e-12), "without momentum no Nesterov either"


def test_the_regularizer_pulls_the_norm_to_that_of_noise_and_does_not_select():
    e = normal(2, 3, 4, 5).requires_grad_()
    n = e.detach().flatten(1).norm(dim=1).view(3, 1, 1)
    g, = torch.autograd.grad(tteo.norm_penalty(e).sum(), e)
    assert torch.allclose(g, e.detach() * (1 - 19 / n**2), atol=1e-6)
    at_rest = (e * 19**0.5 / n).detach().requires_grad_()
    assert torch.autograd.grad(tteo.norm_penalty(at_rest).sum(), at_rest)[0].abs().max() < 1e-6
    seen = []
    best = tteo.optimize(e, lambda e: seen.append(e.detach().clone()) or e, lambda e: 0 * e.sum((1, 2)) + 7,
                         iterations=3, lr=0.1, regularize=0.5)
    assert torch.allclose(seen[1], (e - 0.1 * 1.9 * 0.5 * g).detach(), atol=1e-6), "it moves the variable"
    assert (best.history == 7).all() and best.index.tolist() == [0, 0, 0], "it is no part of the loss that selects"


def test_gradients_are_clipped_start_by_start():
    g = torch.stack([torch.tensor([3.0, 4.0]), torch.tensor([0.03, 0.04])])[:, None]          # norms 5 and 0.05
    clipped = reward.clip_each(g, 0.1)
    assert torch.allclose(clipped[0], g[0] * 0.1 / 5) and torch.equal(clipped[1], g[1])
    seen = []
    tteo.optimize(torch.zeros_like(g), lambda e: seen.append(e.detach().clone()) or e,
                  lambda e: (e * g).sum((1, 2)), iterations=2, lr=1.0, clip=0.1)
    assert torch.allclose(seen[1], -1.9 * clipped)


def test_k_iterations_are_k_images_and_the_last_keeps_no_graph():
    e, image_of, loss_of = toy_generator([])
    graphs = []
    spy = lambda img: graphs.append(img.requires_grad) or loss_of(img)
    with torch.no_grad():                                         # also where the caller has gradients switched off
        tteo.optimize(e, image_of, spy, iterations=4)
    assert graphs == [True, True, True, False]
    with pytest.raises(AssertionError, match="one iteration at least"):
        tteo.optimize(e, image_of, loss_of, iterations=0)


def test_a_loss_of_nan_is_never_the_best():
    losses = iter([[float("nan"), 1.0, float("nan")], [2.0, float("nan"), float("nan")], [2.0, 0.5, float("nan")]])
    best = tteo.optimize(torch.ones(3, 1), lambda e: e, lambda e: 0 * e[:, 0] + torch.tensor(next(losses)), 3)
    assert best.index.tolist() == [1, 2, 0] and best.loss.tolist() == [2.0, 0.5, float("inf")]


@functools.cache
def tiny_world(name):
    """A teacher of random weights as its own student; two things to ask for; the distance to a target image."""
    teacher = load_teacher(name, random_weights=True)
    what = ["a blue ring above a green square", "two cats"] if teacher.text else torch.tensor([3, 1])
    target = normal(5, *teacher.spec.image).mul(0.2).add(0.5).clamp(0, 1)
    return teacher, what, lambda img, what: (img - target).square().flatten(1).sum(1)


@pytest.mark.parametrize("name", ["maskbit-tiny", "maskgit-tiny", "meissonic-tiny", "maskgen-tiny"])
def test_tteo_lowers_its_loss_from_every_start(name):
    teacher, what, loss_of = tiny_world(name)
    found = tteo.tteo(teacher, teacher.net, what, loss_of, starts=3, lr=0.01, generator=seed(0))
    every, (C, H, W) = found.every, teacher.spec.image
    assert every.history.shape == (4, 2, 3) and every.img.shape == (2, 3, C, H, W) and found.seconds > 0
    assert (every.loss < every.history[0]).all(), f"{name}: {every.history.tolist()}"
    assert torch.equal(every.loss, every.history.min(0).values) and torch.equal(every.index, every.history.argmin(0))
    assert torch.equal(found.loss, every.loss.min(1).values) and torch.equal(found.start, every.loss.argmin(1))
    assert torch.equal(found.img[1], every.img[1, found.start[1]]), "each prompt has its own best"
    assert torch.allclose(loss_of(found.img, what), found.loss, rtol=1e-5), "the image is the one that was judged"
    assert 0 <= found.img.min() and found.img.max() <= 1


def test_networks_are_left_as_they_were_and_dropout_is_refused():
    teacher, what, loss_of = tiny_world("maskgen-tiny")
    net = load_teacher("maskgen-tiny", random_weights=True).net.requires_grad_()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    tteo.tteo(teacher, net, what, loss_of, starts=2, generator=seed(0))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for m in (net, *teacher[:2], teacher.text) for p in m.parameters())
    with pytest.raises(AssertionError, match="eval mode"):
        tteo.tteo(teacher, net.train(), what, loss_of)


@pytest.mark.parametrize("name", ["meissonic-tiny", "maskgen-tiny"])
def test_the_embedding_of_the_mask_has_a_gradient_too(name):
    teacher, what, loss_of = tiny_world(name)
    net = teacher.net
    x, e, noise, cond = tteo.draw_starts(teacher, net, teacher.cond(teacher.conditions(what)), 2, 0.6, seed(0))
    e.requires_grad_()
    g, = torch.autograd.grad(loss_of(tteo.soft_image(teacher, net, e, cond, 0.1, noise), what).sum(), e)
    masked = (x == net.V)[:, :, 0]
    assert masked.sum(1).tolist() == [round(0.6 * net.L)] * 4
    assert (g.norm(dim=-1) > 0).all() and g[masked].norm() > 0.1 * g.norm()


def test_a_start_is_the_one_that_evaluate_draws_with_this_seed():
    for name in ("maskbit-tiny", "meissonic-tiny", "maskgen-tiny"):
        teacher, what, _ = tiny_world(name)
        net, rows = teacher.net, teacher.conditions(what) if teacher.text else what
        x, e, noise, cond = tteo.draw_starts(teacher, net, teacher.cond(rows), 1, 0.6, seed(4))
        assert torch.equal(e, se.embed_tokens(x, *net.tables()))
        z = dimo.student_logits(net, x, cond, *net.tables(), 0.3, noise)
        img = teachers.decode_tokens(teacher.tokenizer, z.argmax(-1), cond)
        there = teachers.generate_student(teacher, net, rows, init_ratio=0.6, noise=0.3, temperature=0, generator=seed(4))
        assert torch.equal((img * 255 + teacher.spec.rounds / 2).to(torch.uint8), there)
        one_hot = lambda *a, **kw: 1e4 * torch.eye(net.V)[net(*a, **kw).argmax(-1)]
        assert torch.allclose(tteo.soft_image(teacher, one_hot, e, cond, 0.3, noise), img, atol=1e-6), "nothing is soft"


def test_best_of_n_is_the_smallest_of_n_and_runs_repeat():
    teacher, what, loss_of = tiny_world("maskgen-tiny")
    run = functools.partial(tteo.best_of, teacher, teacher.net, what, loss_of)
    one, again, other = (run(5, generator=seed(n)) for n in (0, 0, 1))
    assert one.every.history.shape == (1, 2, 5) and torch.equal(one.loss, one.every.history[0].min(1).values)
    assert torch.equal(one.img, again.img) and not torch.equal(one.img, other.img)
    assert len(one.every.loss.unique()) == 10, "starts differ"
    run = functools.partial(tteo.tteo, teacher, teacher.net, what, loss_of, starts=5, lr=0.01)
    a, b, c = run(generator=seed(0)), run(generator=seed(0)), run(generator=seed(0), chunk=3)
    assert torch.equal(a.img, b.img) and torch.allclose(a.every.history, c.every.history, rtol=1e-5)
    assert torch.allclose(a.img, c.img, atol=1e-5), "chunks only save memory"
    assert torch.equal(a.every.history[0], one.every.loss), "the same seed, the same starts"
    cond = teacher.cond(teacher.conditions(what))
    repeated = tteo.draw_starts(teacher, teacher.net, cond, 2, 0.6)[3]
    assert all(torch.equal(many, few[[0, 0, 1, 1]]) for many, few in zip(repeated, cond, strict=True))


def test_the_loss_is_told_what_each_image_was_asked_for():
    teacher, what, loss_of = tiny_world("maskgen-tiny")
    asked = []
    tteo.tteo(teacher, teacher.net, what, lambda img, what: asked.append(what) or loss_of(img, what), starts=3,
              iterations=1, chunk=4)
    assert asked == [[what[0]] * 3 + [what[1]], [what[1]] * 2]
