"""teachers: tests."""

import copy
import dataclasses
import functools
import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dimo
import soft_embed as se
import teachers
from networks import autoencoders, blocks, titok
from networks import text as text_net
from worlds.make_fashion import mdm_loss, tokenizer_loss
from teachers import SPECS, load_teacher
from tests.common import agrees, close, uniform, normal, integers, maskgit_file, vqgan_file, vqvae_file, meissonic_file, maskgen_file, titok_file, clip_file, open_clip_file, filled, small_net, small_tokenizer, mini_net, half_masked_tokens, run_with_hooks, TableNet, MASKGIT, MEISSONIC, MASKGEN, TITOK, TINY, tiny_teacher, tiny_inputs


def f32(a):
    return torch.from_numpy(np.asarray(a, dtype=np.float32))


# ================================================================================= teachers: MaskBit's tokens
def test_tokens_are_bits_lowest_first_in_two_groups():
    t = torch.tensor([0, 1, 2, 127, 128, 129, 5461, 8192, 10000, 16383])
    groups = [[0, 0], [1, 0], [2, 0], [127, 0], [0, 1], [1, 1], [85, 42], [0, 64], [16, 78], [127, 127]]
    bits = autoencoders.bits_of(t, 14)
    assert bits[8].tolist() == [-1, -1, -1, -1, 1, -1, -1, -1, 1, 1, 1, -1, -1, 1]
    tok = autoencoders.BitTokenizer(hidden=32, mult=(1,), blocks=1)
    tok.encoder = nn.Identity()                                                     # an image that is its latent
    assert tok.encode(0.1 * bits.T.view(1, 14, 1, 10))[0].tolist() == groups
    assert torch.equal(se.embed_tokens(torch.tensor([groups]), *tok.tables())[0], bits)


def test_a_zero_latent_is_a_minus_bit():
    tok = autoencoders.BitTokenizer(hidden=32, mult=(1,), blocks=1)
    tok.encoder = nn.Identity()
    assert (tok.encode(torch.zeros(1, 14, 2, 2)) == 0).all()


def test_a_masked_group_is_zero_and_leaves_the_other_alone():
    E, bias = autoencoders.BitTokenizer(hidden=32, mult=(1,), blocks=1).tables()
    e = se.embed_tokens(torch.tensor([[[128, 5], [5, 128], [128, 128]]]), E, bias)[0]
    assert e.tolist() == [[0] * 7 + [1, -1, 1, -1, -1, -1, -1], [1, -1, 1, -1, -1, -1, -1] + [0] * 7, [0] * 14]
    net = small_net()
    assert torch.equal(se.embed_tokens(torch.full((1, 1, 2), 16), *net.tables())[0, 0], net.input_proj.bias)


def test_generator_reads_tokens_through_its_input_layer():
    x, net = half_masked_tokens()[0], small_net()
    bits = autoencoders.bits_of(x, 4) * (x < 16)[..., None]                             # (3, 16, 2, 4)
    assert bits.sum() == -6 and bits.abs().sum() == 188                             # golden, of generator.bits
    assert close(se.embed_tokens(x, *net.tables()), net.input_proj(bits.flatten(2)), atol=2e-6)


# ============================================================================== teachers: MaskBit's generator
def test_generator_gives_the_golden_embedding_features_and_logits():
    x, cond = half_masked_tokens()
    net = small_net()
    e = se.embed_tokens(x, *net.tables())
    first, hidden, z = run_with_hooks(net, e, cond)                                 # L+1 positions, class last
    agrees(first, [0.2041739, 0.0593009, -0.1778337, 0.05064904, -0.1017807, -0.1957781], 1462.59853)
    agrees(hidden[0], [1.609295, 0.3136073, -2.033577, -0.2294688, -0.804172, -0.8612922], 2528.26462)
    agrees(hidden[1], [0.3004954, -0.3590499, -2.578125, -1.140411, 0.07654111, -0.010068], 2646.99346)
    agrees(hidden[2], [0.9116711, 0.1087366, -3.01099, -1.663104, 0.05276957, -0.4673339], 2569.55283)
    agrees(z, [-1.884787, -0.2110016, -0.5188801, -1.249709, 1.302471, -1.137711], 1364.17221)
    assert z.shape == (3, 16, 2, 16)
    for layers in [(0,), (1,), (0, 2), (0, 1, 2)]:                                  # without the class position
        features = net(e, cond, layers=layers)
        assert all(torch.equal(f, hidden[i][:, :16]) for f, i in zip(features, layers, strict=True))


def test_generator_gives_the_golden_logits_from_nothing_but_masks():
    net = small_net()
    z = net(se.embed_tokens(torch.full((3, 16, 2), 16), *net.tables()), (torch.tensor([3, 7, 0]),))
    agrees(z, [-1.786882, -0.1671775, 0.1113678, -0.9100456, 1.626079, -2.006689], 1603.0981)


def test_features_cost_only_the_layers_up_to_the_last_asked_for():
    net, calls = small_net(), []
    parts = enumerate([*net.blocks, net.head])
    handles = [m.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, m in parts]
    net(torch.zeros(1, 16, 64), (torch.tensor([0]),), layers=(1,))
    assert calls == [0, 1]
    for h in handles:
        h.remove()


def test_null_condition_is_the_last_class_and_writes_nothing():
    labels = torch.tensor([3, 7, 0])
    assert small_net().null((labels,))[0].tolist() == [10, 10, 10] and labels.tolist() == [3, 7, 0]


def test_frozen_parameters_are_the_embedding_layer():
    net = teachers.MaskBit(bits=4, grid=2, width=8, depth=1, heads=2, mlp=16, classes=3)
    frozen = [k for k, p in net.named_parameters() if any(p is q for q in net.frozen())]
    assert sorted(frozen) == ["class_emb.weight", "input_proj.bias", "input_proj.weight", "pos_emb"]


def test_dropout_is_active_in_training_alone_and_can_be_switched_off():
    net, x = mini_net().set_dropout(0.5), (torch.zeros(1, 4, 8), (torch.tensor([0]),))
    dropping = [m for m in net.modules() if isinstance(m, (nn.Dropout, blocks.Attention))]
    assert [getattr(m, "p", None) or m.dropout for m in dropping] == [0.5] * 5
    still = net.eval()(*x)
    assert torch.equal(net(*x), still) and not torch.equal(net.train()(*x), net(*x))
    assert close(net.set_dropout(0.0).train()(*x), still)


def test_noise_is_measured_in_the_root_mean_square_of_the_table():
    teacher = teachers.Teacher(small_net(), None, teachers.SPECS["maskbit-tiny"])
    E, _ = teacher.net.tables()
    assert teacher.noise_scale() == pytest.approx(E[:, :16].square().mean().sqrt().item())  # but the mask's row
    spec = dataclasses.replace(teacher.spec, noise_scale=1.5)                       # or as a spec says itself
    assert teacher._replace(spec=spec).noise_scale() == 1.5


def test_logits_are_float32_under_bf16_autocast():
    net = small_net()
    with torch.autocast("cpu", torch.bfloat16):
        z = net(torch.zeros(1, 16, 64), (torch.tensor([0]),))
    assert z.dtype == torch.float32
    assert z.bfloat16().float().ne(z).any(), "they were not rounded on the way"


# ============================================================================== teachers: MaskBit's tokenizer
def test_same_padding_puts_the_odd_pixel_right_and_below():
    step, img = autoencoders.Level(2, 2, 0, 1, "down"), normal(0, 1, 2, 6, 8)
    padded = F.pad(img, (0, 1, 0, 1))                                               # left, right, above, below
    assert close(step(img), F.conv2d(padded, step.down_conv.weight, step.down_conv.bias, 2))


def test_tokenizer_gives_the_golden_latent_tokens_and_reconstruction():
    img = F.interpolate(uniform(14, 2, 3, 8, 8).float(), scale_factor=8)            # (2, 3, 64, 64)
    tok = small_tokenizer()
    agrees(tok.encoder(img), [0.9607242, 0.1037607, -0.3168073, 0.03060886, 0.3128473, -1.208614], 135.664892)
    x = tok.encode(img)                                                             # (2, 16, 2)
    assert (x[..., 0] + 16 * x[..., 1]).tolist() == [
        [43, 137, 12, 169, 5, 72, 138, 139, 135, 13, 139, 159, 40, 205, 129, 207],
        [41, 162, 74, 170, 35, 137, 10, 11, 160, 8, 76, 170, 168, 107, 11, 139]]
    out = tok.decode(se.embed_tokens(x, *tok.tables()), clamp=False)
    agrees(out, [-0.1793668, -0.4257776, -0.2768627, -0.2023513, -0.2577169, -0.09058406], 12694.6894)


def test_tokenizer_decodes_the_golden_image_and_clamps_it():
    t, tok = integers(15, 256, 2, 16), small_tokenizer()
    x = torch.stack([t % 16, t // 16], -1)
    img = tok.decode(se.embed_tokens(x, *tok.tables()), clamp=False)
    agrees(img, [-0.09063487, -0.2989325, -0.2536427, -0.1758197, -0.2095416, -0.174988], 13203.471)
    assert close(teachers.decode_tokens(tok, x), img.clamp(0, 1))
    parts = tok.decode(se.embed_tokens(x, *tok.tables()), clamp=False, chunk=1)
    assert close(parts, img, atol=2e-4), "a batch decoded in parts is the same batch"


def test_masked_tokens_are_not_decoded():
    with pytest.raises(ValueError, match="below V = 16, got 16: unmask"):
        teachers.decode_tokens(small_tokenizer(), torch.full((1, 16, 2), 16))


# ====================================================================================== teachers: the sampler
def golden_run():
    trace, net = [], small_net()
    plan = teachers.maskbit_plan(32, 8, guidance=7.1, temperature=7.8)
    x = teachers.sample(net, (torch.tensor([1, 5, 2]),), plan, trace=trace,
                        draws=lambda i: (uniform(1000 + i, 3, 16, 2), uniform(2000 + i, 3, 16, 2)))
    return x, torch.stack(trace)                                                    # (8, 3, 16, 2)


def test_sampler_draws_the_golden_tokens():
    x, trace = golden_run()
    assert (trace == 16).sum((2, 3)).T.tolist() == [[32, 29, 26, 24, 21, 18, 14, 10]] * 3
    assert trace[3, 0].flatten().tolist() == [16, 16, 4, 8, 16, 16, 4, 16, 16, 16, 16, 16, 16, 16, 16, 2,
                                              16, 16, 5, 8, 16, 16, 16, 16, 4, 16, 16, 8, 16, 16, 16, 16]
    assert trace[7, 0].flatten().tolist() == [16, 2, 4, 8, 4, 12, 4, 5, 12, 13, 16, 16, 16, 16, 16, 2,
                                              10, 16, 5, 8, 16, 8, 7, 13, 4, 11, 5, 8, 16, 14, 16, 14]
    assert (x[..., 0] + 16 * x[..., 1]).tolist() == [
        [42, 132, 196, 84, 220, 93, 138, 42, 10, 133, 138, 215, 180, 133, 232, 238],
        [138, 36, 234, 43, 182, 212, 217, 232, 139, 132, 228, 234, 251, 142, 140, 204],
        [76, 248, 134, 196, 133, 235, 232, 252, 232, 232, 107, 232, 198, 107, 127, 228]]
    tok = small_tokenizer()
    img = tok.decode(se.embed_tokens(x, *tok.tables()), clamp=False)
    agrees(img, [-0.1283947, -0.2535913, -0.36886, -0.4228836, -0.4629348, -0.4474446], 19274.2005)


def test_sampler_never_changes_a_known_token():
    x, trace = golden_run()
    for before, after in zip(trace, [*trace[1:], x]):
        assert torch.equal(before[before < 16], after[before < 16])
    assert (x < 16).all()


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
        return torch.tensor([1.0, 0.0]) * (cond[0] == 0).float().view(-1, 1, 1, 1).expand(-1, 256, 2, 1)


@pytest.mark.parametrize("steps, masked, guidance", [
    (64, ([512, 471, 429, 386, 341, 291, 235, 164], 21071),
     ([0.0, 6.686449e-05, 0.004276153, 0.04860625, 0.2702278, 0.9939912, 2.687421, 5.356347], 99.6918643)),
    (128, ([512, 471, 429, 386, 341, 291, 235, 164], 41904),
     ([0.0, 6.686449e-05, 0.004276153, 0.04860625, 0.2702278, 0.9939912, 2.687421, 5.356347], 202.933709)),
    (256, ([512, 471, 429, 386, 341, 291, 235, 164], 83562),
     ([0.0, 5.46217e-05, 0.003493196, 0.03970652, 0.2207494, 0.8119929, 2.195358, 4.375607], 334.453678)),
])
def test_published_sampling_has_the_golden_schedules(steps, masked, guidance):
    plan = teachers.maskbit_plan(512, steps, **SPECS["maskbit"].settings(steps))
    counts, scale = [512, *(p.hidden for p in plan)][:-1], torch.tensor([p.w - 1 for p in plan])
    assert (counts[:: steps // 8], sum(counts)) == masked and plan[-1].hidden == 0
    assert close(scale[:: steps // 8], torch.tensor(guidance[0]), atol=2e-6)
    assert scale.sum().item() == pytest.approx(guidance[1], rel=1e-5)
    T = SPECS["maskbit"].sampling[steps]["temperature"]
    assert [p.noise for p in plan] == pytest.approx([T * (1 - (i + 1) / steps) for i in range(steps)])


def test_sampler_reveals_a_unit_every_step_until_one_is_left():
    trace, net, plan = [], mini_net(), teachers.maskbit_plan(8, 12)                 # 8 units, more steps than that
    teachers.sample(net, (torch.tensor([0]),), plan, trace=trace, draws=lambda i: uniform(i, 2, 1, 4, 2))
    assert [(x == net.V).sum().item() for x in trace] == [8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1, 1]


def test_published_settings_are_those_of_the_readme_and_the_nearest_is_taken():
    spec = teachers.SPECS["maskbit"]
    assert spec.sampling == {64: dict(guidance=7.1, temperature=7.8), 128: dict(guidance=7.1, temperature=9.0),
                             256: dict(guidance=5.8, temperature=10.3)}
    assert [spec.settings(n)["temperature"] for n in (1, 90, 93, 185, 999)] == [7.8, 7.8, 9.0, 10.3, 10.3]
    assert spec.settings(64, guidance=2.0, temperature=None) == dict(guidance=2.0, temperature=7.8)


def test_sampler_applies_the_plans_guidance_and_temperature_and_may_go_without(monkeypatch):
    seen, net = [], Coin()                                                          # first guided logits, by step

    def watching(z, temperature, u):
        seen.append((z.flatten()[0].item(), temperature))
        return se.sample_tokens(z, temperature, u)

    for settings, w, batch in [(dict(guidance=3.0, annealing="none"), [4, 4, 4, 4], [2] * 4),
                               (dict(guidance=4.0, annealing="linear"), [1, 2, 3, 4], [1, 2, 2, 2]),
                               (dict(guidance=0.0), [1, 1, 1, 1], [1] * 4)]:
        seen.clear(), net.batches.clear()
        plan = [p._replace(divide=0.5, draw=0.7) for p in teachers.maskbit_plan(512, 4, **settings)]
        teachers.sample(net, (torch.tensor([0]),), plan, draw=watching)
        assert seen == [(2 * scale, 0.7) for scale in w] and net.batches == batch


def test_sampling_ratios_are_the_golden_ones():
    golden = {"arccos": [0.839139, 0.666667, 0.460107, 1e-06], "cosine": [0.92388, 0.707107, 0.382683, 1e-06],
              "linear": [0.75, 0.5, 0.25, 1e-06], "square": [0.9375, 0.75, 0.4375, 1e-06],
              "root": [0.5, 0.292893, 0.133975, 1e-06]}
    for schedule, expected in golden.items():
        ratios = [float(teachers.schedule_ratio(q, schedule, 1e-6)) for q in (0.25, 0.5, 0.75, 1.0)]
        assert ratios == pytest.approx(expected, rel=1e-9, abs=6e-7)
small_maskgit = functools.cache(functools.partial(filled, teachers.MaskGit, maskgit_file, **MASKGIT))
small_vqgan = functools.cache(lambda: filled(
    autoencoders.VQTokenizer, vqgan_file, widths=(32, 32, 64), latent=16, embed=8, V=24, attention=(2,)))


def test_maskgit_gives_the_golden_logits_plain_perturbed_and_guided():
    rng, net = np.random.RandomState(0), small_maskgit()
    x, labels = torch.from_numpy(rng.randint(0, 33, (3, 16, 1))), torch.from_numpy(rng.randint(0, 10, 3))
    noise = f32(rng.standard_normal((3, 17, 48)))[:, :16]
    e, cond = se.embed_tokens(x, *net.tables()), (torch.where(torch.tensor([0, 1, 0]).bool(), 10, labels),)
    agrees(net(e, cond), [3.040429, -1.247109, 0.1730151, 1.052807, -2.329601], 1291.95635)
    agrees(net(e, cond)[2, 15, 0], [1.110613, -1.880531, 1.27534, 0.9858406, -0.5086411])  # positions have biases
    agrees(net(e, cond, s=0.3, noise=noise), [0.7930675, -1.106606, -0.474539, 0.7637024, -0.2837803], 1204.98514)
    guided = dimo.guided_logits(net, e, (labels,), 2.0)
    agrees(guided, [2.959652, -1.439541, 0.1565083, 0.9828535, -2.259242], 1312.6903)


def test_vqgan_gives_the_golden_latents_codes_and_images():
    rng, tok = np.random.RandomState(0), small_vqgan()
    codes, img = torch.from_numpy(rng.randint(0, 24, (2, 64, 1))), (f32(rng.uniform(-1, 1, (2, 3, 32, 32))) + 1) / 2
    latent = f32(rng.standard_normal((2, 8, 8, 8))).flatten(2).transpose(1, 2)      # no codes
    agrees(tok.latents(img), [1.113699, -0.340395, 1.082254, -0.2492165, -0.5980241], 542.36282)
    x = tok.encode(img)
    assert x[0, :32, 0].tolist() == [8, 11, 8, 8, 9, 6, 2, 2, 8, 8, 15, 2, 8, 8, 15, 9,
                                     6, 11, 8, 2, 9, 5, 2, 8, 2, 2, 6, 22, 11, 8, 4, 6] and x.sum() == 1099
    inside = lambda e: 2 * tok.decode(e, clamp=False) - 1                                       # it works in [-1, 1]
    agrees(inside(se.embed_tokens(codes, *tok.tables())), [0.2152174, 0.1369084, 0.1600291, 0.1554386], 2941.28657)
    agrees(inside(latent), [0.1506191, 0.3182902, 0.3938015, 0.1113399, 0.3747067], 2993.66295)


def test_maskgit_sampler_draws_the_golden_tokens():
    u, rng, trace = uniform(1, 5, 3, 16, 1), np.random.RandomState(0), []
    noise = torch.from_numpy(np.stack([rng.gumbel(size=(3, 16, 1)) for _ in range(5)]))
    plan = teachers.maskgit_plan(16, 5, guidance=3.0, temperature=4.5)
    assert [p.w for p in plan] == [1.0, 1.75, 2.5, 3.25, 4.0]
    x = teachers.sample(small_maskgit(), (torch.tensor([7, 9, 9]),), plan, trace=trace,
                        draws=lambda i: (u[i], (-(-noise[i]).exp()).exp()))         # whose Gumbel noise is noise[i]
    masks = [(t == 32).sum((1, 2)).tolist() for t in trace]                         # those that were drawn stay
    assert masks == [[16] * 3, [15] * 3, [13, 13, 14], [9, 9, 11], [4, 4, 7]]
    assert trace[3][..., 0].tolist() == [[32, 20, 32, 22, 32, 8, 32, 32, 29, 32, 32, 32, 24, 15, 1, 32],
                                         [22, 26, 32, 28, 32, 32, 32, 32, 32, 32, 32, 8, 30, 32, 24, 30],
                                         [32, 32, 29, 32, 19, 0, 32, 32, 32, 32, 32, 30, 24, 32, 32, 32]]
    assert x[..., 0].tolist() == [[23, 20, 8, 22, 0, 8, 2, 31, 29, 8, 8, 23, 24, 15, 1, 28],
                                  [22, 26, 22, 28, 12, 5, 2, 20, 2, 16, 31, 8, 30, 22, 24, 30],
                                  [24, 31, 29, 31, 19, 0, 30, 31, 23, 14, 20, 30, 24, 31, 12, 3]]


def test_a_mask_that_maskgit_draws_counts_as_revealed_and_is_decoded_as_the_last_code():
    net, trace, always = small_maskgit(), [], lambda z, temperature, u: torch.full(z.shape[:-1], 32)
    x = teachers.sample(net, (torch.tensor([7]),), teachers.maskgit_plan(16, 3), draw=always, trace=trace)
    assert len(trace) == 3 and all((t == 32).all() for t in trace) and (x == 31).all()
    E, _ = small_vqgan().tables()
    assert E.shape == (1, 25, 8) and torch.equal(E[0, 24], E[0, 23])


@pytest.mark.parametrize("schedule, grid, revealed", [
    ("arccos", 16, [1, 18, 26, 32, 38, 43, 48, 50]), ("arccos", 16, [1, 9, 13, 17, 19, 22, 24, 26, 28, 30, 32, 35]),
    ("arccos", 16, [1, 6, 9, 10, 12, 14, 15, 16, 18, 19, 20, 21, 22, 23, 25, 25]),
    ("arccos", 32, [1, 26, 38, 46, 54, 61, 67, 73, 79, 84, 89, 94, 99, 104, 109]),
    ("cosine", 16, [1, 12, 22, 32, 41, 47, 51, 50]), ("linear", 16, [1, 9, 18, 27, 37, 46, 55, 63]),
    ("square", 16, [1, 13, 24, 34, 41, 46, 49, 48]), ("root", 16, [1, 7, 14, 22, 30, 41, 55, 86]),
    ("square", 16, [1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 7, 7, 8, 8, 8, 9, 9, 10, 10, 10,
                    11, 11, 11, 11, 11, 12, 12, 12, 12, 12, 12, 10]),
    ("root", 32, [1, 7, 15, 22, 30, 39, 48, 57, 68, 79, 91, 105, 122, 144, 196])])
def test_maskgit_reveals_the_golden_numbers_of_tokens(schedule, grid, revealed):
    plan = teachers.maskgit_plan(grid**2, len(revealed), schedule=schedule)
    hidden = [grid**2, *(p.hidden for p in plan)]
    assert [a - b for a, b in zip(hidden, hidden[1:])] == revealed
small_meissonic = functools.cache(lambda grid=(8, 12): filled(
    teachers.Meissonic, meissonic_file, grid=grid, **MEISSONIC))
small_vqvae = functools.cache(lambda: filled(
    autoencoders.VQTokenizer, vqvae_file, widths=(16, 32, 32, 48, 64), latent=8, embed=8, V=64, attention=(),
    signed=False, norm_groups=8, grid=(4, 6)))
small_tower = functools.cache(lambda: filled(
    text_net.TextTower, clip_file, width=48, heads=4, depth=3, out=64, vocab=100, context=9))


def meissonic_inputs():
    """Half masked tokens of an 8 x 12 grid (2, 96, 1), their embedding, and a condition."""
    rng, net = np.random.RandomState(100), small_meissonic()
    x, masked = (torch.from_numpy(a) for a in (rng.randint(0, 64, (2, 96, 1)), rng.random_sample((2, 96, 1)) < 0.5))
    text, pooled = f32(rng.standard_normal((2, 9, 48))), f32(rng.standard_normal((2, 64)))
    x, micro = x.masked_fill(masked, 64), torch.tensor([[1024, 1024, 0, 0, 6.0], [768, 640, 16, 32, 5.5]])
    return x, se.embed_tokens(x, *net.tables()), (text, pooled, micro, torch.zeros(2))
channels_first = lambda z: z[:, :, 0].transpose(1, 2)                               # (B, L, 1, V) -> (B, V, L)


def test_meissonic_gives_the_golden_features_and_logits():
    net, hidden, (_, e, cond) = small_meissonic(), [], meissonic_inputs()
    handles = [b.register_forward_hook(lambda m, args, out: hidden.append(out)) for b in net.single]
    agrees(channels_first(net(e, cond)), [-1.166283, 0.5756382, -1.038456, 0.5028391, -1.265301], 9758.62206)
    for h in handles:
        h.remove()
    agrees(hidden[0], [-1.622211, -1.410151, 1.000096, 0.8734197, -1.606949], 3647.3362)        # text and image
    agrees(hidden[1], [-1.16055, -1.537131, 0.714828, 0.8842726, -1.5574], 3737.01458)
    agrees(hidden[2], [-1.144361, -1.717116, 0.8635588, 0.879055, -1.593311], 3775.14453)
    features = net(e, cond, layers=(0, 1, 2, 3, 4))
    agrees(features[0], [1.214843, -1.745568, -1.158067, 0.2639668, -0.9403231], 2594.85733)    # the image alone
    agrees(features[1], [1.257167, -1.575159, -0.9358265, 0.54066, -0.7855623], 2678.98439)
    assert all(torch.equal(f, h[:, 9:]) for f, h in zip(features[2:], hidden, strict=True))


def test_meissonic_sees_the_time_step_times_a_thousand():
    net, (_, e, (*cond, t)) = small_meissonic(), meissonic_inputs()
    z = net(e, net.at((*cond, t), 63))
    agrees(channels_first(z), [-1.439358, 0.6985233, -1.338871, -0.5228322, -2.10769], tol=5e-3)
    z = net(e, (*cond, torch.tensor([37.0, 512.0])))                                # fast waves: a float32 ulp shows
    agrees(channels_first(z), [-1.86701, 0.4928803, -1.490666, -0.8348637, -1.568403], tol=5e-2)


def test_rotary_angles_are_the_golden_ones_and_turn_no_text():
    cos, sin = blocks.rope_table(9, 4, 6, (4, 6, 6), torch.device("cpu"))         # 9 text states, 4 x 6 places
    agrees(cos[-1], [1, 1, -0.9899925, 0.9903207, 0.9999791, 0.2836622, 0.9731902, 0.999942], 14.4741735 / 2)
    agrees(sin[-1], [0, 0, 0.14112, 0.1387981, 0.006463259, -0.9589243, 0.2300017, 0.01077196], 2.97215868 / 2)
    agrees(cos, [1], 497.77266 / 2), agrees(sin, [0], 60.8519495 / 2)
    assert (cos[:10] == 1).all() and (sin[:10] == 0).all()                          # text, and the place (0, 0)


def test_rotated_queries_and_keys_know_only_their_distance():
    rope = blocks.rope_table(0, 5, 5, (4, 6, 6), torch.device("cpu"))
    q, k = (blocks.rotate(normal(seed, 1, 1, 1, 16).expand(1, 1, 25, 16), rope)[0, 0] for seed in (0, 1))
    scores = (q @ k.T).view(5, 5, 5, 5)                                             # (row, column) of q, then of k
    assert close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], atol=1e-5)
    assert abs(scores[0, 0, 1, 0] - scores[0, 0, 0, 1]) > 0.1, "rows and columns turn different pairs"


def test_meissonic_fed_soft_tokens_gives_the_golden_logits_and_gradient():
    net, (x, _, cond) = small_meissonic(), meissonic_inputs()
    z = (3 * normal(1100, 2, 96, 1, 64)).requires_grad_()
    out = net(se.soft_embed(z, *net.tables()), cond)
    agrees(channels_first(out), [-1.099551, 1.486006, 1.14651, -0.1283769, -0.3659184], 9877.10391)
    grad = torch.autograd.grad(out.square().mean(), z)[0]
    agrees(grad, [1.374088e-07, -1.374844e-09, -1.580505e-06, 4.929963e-08, -2.877073e-07], 0.279342228, tol=1e-10)
    masked = net(se.soft_embed(z, *net.tables(), x == 64), cond)
    agrees(channels_first(masked), [-2.71031, 0.1827533, 0.1007663, 0.9931123, -0.3730617], 9649.89819)


def test_meissonic_is_perturbed_behind_its_first_norm_and_projection():
    net, (x, _, cond) = small_meissonic(), meissonic_inputs()
    noise = normal(3100, 2, 64, 96).transpose(1, 2)
    z = dimo.student_logits(net, x, cond, *net.tables(), 0.3, noise)
    agrees(channels_first(z), [-1.390639, 0.6362945, -1.154932, 1.288452, -1.238725], 9723.78088)


def test_vqvae_gives_the_golden_latents_codes_and_images():
    rng, tok = np.random.RandomState(200), small_vqvae()
    img, codes = f32(rng.random_sample((2, 3, 64, 96))), torch.from_numpy(rng.randint(0, 64, (2, 24, 1)))
    z, image = 3 * f32(rng.standard_normal((2, 24, 1, 64))), lambda e: tok.decode(e, clamp=False)
    agrees(tok.latents(img), [-1.145846, 0.4275272, -0.4326202, 0.5921248, 0.1774369], 210.392954)
    x = tok.encode(img)
    assert x[..., 0].tolist() == [
        [17, 61, 32, 0, 46, 35, 0, 25, 25, 25, 8, 25, 25, 25, 25, 16, 25, 25, 8, 25, 25, 22, 8, 25],
        [23, 25, 8, 25, 31, 25, 16, 25, 25, 27, 25, 48, 2, 8, 25, 25, 61, 8, 47, 46, 2, 25, 25, 25]]
    agrees(image(se.embed_tokens(codes, *tok.tables())), [-0.192274, -0.1027096, -0.1745134, -0.1166877], 18009.6954)
    agrees(image(se.soft_embed(z, *tok.tables())), [-0.1785347, -0.1150031, -0.1612418, -0.08281529], 18804.3633)
    agrees(image(se.embed_tokens(x, *tok.tables())), [-0.2408127, -0.2313782, -0.3302997, -0.306192], 18594.7956)


def test_text_tower_of_meissonic_gives_the_golden_states():
    states, final, pooled = small_tower()(torch.tensor([
        [98, 5, 17, 33, 99, 0, 0, 0, 0], [98, 7, 8, 9, 10, 11, 12, 13, 99], [98, 99, 0, 0, 0, 0, 0, 0, 0]]))
    agrees(states, [-0.662697, 0.6808965, 0.1706954, 0.8630649, 1.420114], 1407.78673)  # before the last block
    agrees(final, [-0.3470765, 0.641583, -0.7551892, 0.3370731, 1.442524], 1023.25181)
    agrees(pooled, [-0.3563226, -1.453548, -0.8372415, -0.3706013, -0.3569431], 146.228141)  # at the end token


@pytest.mark.parametrize("units, N, hidden, total", [
    (4096, 64, [4094, 3996, 3744, 3348, 2824, 2191, 1474, 700], 164797),
    (4096, 48, [4093, 3919, 3478, 2799, 1930, 930], 123082), (64, 8, [62], 290)])
def test_meissonic_hides_the_golden_numbers_of_tokens(units, N, hidden, total):
    plan = teachers.meissonic_plan(units, N)
    assert [p.hidden for p in plan[::8]] == hidden and sum(p.hidden for p in plan) == total and not plan[-1].hidden
    noise = torch.tensor([p.noise for p in teachers.meissonic_plan(64, 8)])
    assert close(noise, torch.linspace(2, 0, 8)) and {p.w for p in plan} == {9.0}   # golden: both ends included


@pytest.mark.parametrize("t, total, row", [
    (3, [5298, 5065], [2, 79, 79, 79, 49, 48, 79, 79, 36, 79, 79, 58]),
    (1, [3912, 3953], [2, 79, 10, 79, 49, 48, 22, 22, 36, 59, 59, 58]),
    (0, [3017, 3098], [2, 23, 10, 37, 49, 48, 22, 22, 36, 59, 59, 58])])
def test_a_sampling_step_from_partly_known_tokens_is_the_golden_one(t, total, row):
    z, gen, noise = 2 * normal(2100, 2, 64, 96).transpose(1, 2)[:, :, None], torch.Generator().manual_seed(7), torch.empty(2, 96, 1)

    def draw(z, temperature, u):                                                    # one generator for both
        x = torch.multinomial(z.softmax(-1).view(-1, 64), 1, generator=gen).view(2, 96, 1)
        noise.copy_(torch.rand(2, 96, 1, generator=gen))
        return x

    trace, x = [], meissonic_inputs()[0]                                            # 50 and 43 of 96 are masked
    end = teachers.sample(TableNet(z, z), (torch.zeros(2),), teachers.meissonic_plan(96, 8)[7 - t:], x=x, trace=trace,
                          draws=lambda i: (None, noise), draw=draw)
    x = (trace[1] if t else end).masked_fill((trace[1] if t else end) == 64, 79)    # the golden numbers call the mask 79
    assert x.sum((1, 2)).tolist() == total and x[0, 12:24, 0].tolist() == row


def test_meissonic_from_prompt_to_tokens_is_the_golden_one():
    net, tower, gen = small_meissonic(8), small_tower(), torch.Generator().manual_seed(11)
    cond = net.condition(*tower(torch.tensor([[98, 5, 17, 33, 99, 0, 0, 0, 0]])))
    net.null_text, net.null_pooled = net.condition(*tower(torch.tensor([[98, 99, 0, 0, 0, 0, 0, 0, 0]])))[:2]
    noise = torch.empty(1, 64, 1)

    def draw(z, temperature, u):                                                    # one generator for both
        x = torch.multinomial(z.softmax(-1)[0, :, 0], 1, generator=gen)[None]
        noise.copy_(torch.rand(1, 64, 1, generator=gen))
        return x

    x = teachers.sample(net, cond, teachers.meissonic_plan(64, 6), draws=lambda i: (None, noise), draw=draw)
    assert x.view(8, 8).tolist() == [
        [29, 13, 29, 10, 5, 28, 29, 0], [1, 8, 41, 62, 41, 28, 19, 53], [62, 14, 59, 30, 21, 18, 12, 13],
        [59, 42, 59, 57, 59, 54, 50, 55], [48, 16, 27, 60, 29, 13, 63, 13], [50, 8, 7, 57, 4, 57, 4, 30],
        [45, 16, 29, 61, 34, 5, 23, 10], [2, 46, 41, 46, 63, 63, 63, 36]]


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
    net, cond = StepCounter(), (torch.zeros(1, 2, 8), torch.zeros(1, 8), torch.zeros(1, 5), torch.zeros(1))
    teachers.sample(net, cond, teachers.meissonic_plan(4, 4, guidance=1))
    assert net.times == [3, 2, 1, 0]


def test_official_start_of_meissonics_student_is_initial_tokens():
    torch.manual_seed(5)
    tokens = torch.randint(0, 64, (2, 64, 1), dtype=torch.float32).long()
    x = dimo.initial_tokens(tokens, 0.6, torch.rand(2, 64).argsort(1)[..., None], 79)
    assert (x == 79).sum((1, 2)).tolist() == [38, 38]
    assert x[0, :16, 0].tolist() == [35, 79, 79, 79, 38, 54, 16, 9, 8, 79, 79, 62, 79, 79, 79, 16]
    assert x[1, 48:, 0].tolist() == [30, 18, 0, 39, 79, 79, 59, 79, 79, 79, 79, 79, 79, 37, 79, 79]
small_titok = functools.cache(lambda: filled(titok.TATiTok, titok_file, **TITOK))


@functools.cache
def maskgen_tower(quick_gelu):
    """The three outputs of its text tower for two prompts and the empty one."""
    tower = filled(text_net.TextTower, open_clip_file, width=32, heads=4, depth=3, out=32, vocab=64, context=9,
                   quick_gelu=quick_gelu)
    return tower(torch.tensor([
        [62, 9, 25, 4, 40, 24, 16, 49, 63], [62, 11, 31, 53, 63, 0, 0, 0, 0], [62, 63, 0, 0, 0, 0, 0, 0, 0]]))


@functools.cache
def small_maskgen():
    """A MaskGen, and the condition of the two prompts."""
    net = filled(teachers.MaskGen, maskgen_file, **MASKGEN)
    cond = net.condition(*maskgen_tower(True))
    net.null_text, net.null_pooled = cond[0][2:], cond[1][2:]
    return net, tuple(c[:2] for c in cond)


def maskgen_inputs():
    """Tokens (2, 12, 1), partly masked, and a condition."""
    rng = np.random.RandomState(101)
    x, masked = (torch.from_numpy(a) for a in (rng.randint(0, 40, (2, 12, 1)), rng.random_sample((2, 12, 1)) < 0.6))
    text, pooled = f32(rng.standard_normal((2, 9, 32))), f32(rng.standard_normal((2, 32)))
    return x.masked_fill(masked, 40), (text, pooled, torch.tensor([6.5, 5.2]), None)


@pytest.mark.parametrize("quick, states, final, pooled", [
    (True, ([-0.7630023, 2.115347, -1.964464, -1.929082], 1283.18202),
     ([-0.7705418, 0.7416261, -0.74286, -2.033098], 729.58188),
     ([0.8040828, 1.665547, 0.2471397, 0.1167166], 91.0273508)),
    (False, ([-0.7632355, 2.122303, -1.966903, -1.931517], 1284.48339),
     ([-0.7710462, 0.7456155, -0.7479507, -2.031553], 729.784607),
     ([0.8038819, 1.67443, 0.2455183, 0.1306152], 91.0925008))])
def test_text_tower_of_maskgen_gives_the_golden_states_with_either_activation(quick, states, final, pooled):
    for got, expected in zip(maskgen_tower(quick), (states, final, pooled)):
        agrees(got, *expected)


def test_maskgen_gives_the_golden_features_and_logits():
    net, (x, cond) = small_maskgen()[0], maskgen_inputs()
    e = se.embed_tokens(x, *net.tables())
    agrees(net(e, cond), [-1.913822, -0.5555093, 0.4065936, -2.077173, 1.213661], 895.460211)
    features = net(e, cond, layers=(0, 1, 2))
    agrees(features[0], [-0.7984279, 0.2440962, -0.3116992, 0.5822107], 398.320702)
    agrees(features[1], [-0.8664747, -0.046124, -0.8839275, 0.4483891], 634.561451)
    agrees(features[2], [-1.052604, 0.02200247, -1.193571, 0.3775352], 848.990143)
    cos, sin = blocks.sinusoid(100 * torch.tensor([6.5, 5.0]), 256, period=1000.0)  # of the scores
    agrees(torch.cat([sin, cos], 1), [0.3047532, 0.0989351, -0.7443697, -0.07842953, 0.7503219], 330.493433)


def test_maskgen_and_its_decoder_fed_soft_tokens_give_the_golden_numbers():
    net, tok, (x, cond) = small_maskgen()[0], small_titok(), maskgen_inputs()
    z = f32(3 * np.random.RandomState(102).standard_normal((2, 12, 1, 40)))
    agrees(se.soft_embed(z, *net.tables()), [-0.1172604, -0.01681067, -0.2186748, 0.06650103, -0.1632817], 84.7191359)
    logits = net(se.soft_embed(z, *net.tables(), x == 40), cond)
    agrees(logits, [-2.152438, -0.6280303, 0.2724501, -2.21175], 906.309109)
    rng = np.random.RandomState(105)
    codes, guide = torch.from_numpy(rng.randint(0, 40, (2, 12, 1))), f32(rng.standard_normal((2, 9, 32)))
    image = lambda e: tok.decode(e, (guide,), clamp=False)
    agrees(image(se.embed_tokens(codes, *tok.tables())), [-0.4007056, -0.3281703, -1.815939, -0.3795486], 1185.11061)
    agrees(se.soft_embed(z, *tok.tables()), [-0.1985765, 0.3213078, 0.4190021, 0.3666705], 37.8919125)
    agrees(image(se.soft_embed(z, *tok.tables())), [-0.3407001, -0.1757645, -1.543245, -0.3000831], 1187.89241)


def test_titok_gives_the_golden_latents_and_codes():
    img = uniform(104, 2, 3, 16, 16).float()
    agrees(small_titok().latents(img).transpose(1, 2), [0.7846547, -0.04996341, -0.1444936, -0.5832853], 113.064351)
    assert small_titok().encode(img)[..., 0].tolist() == [[6, 8, 25, 32, 8, 21, 31, 22, 32, 6, 25, 35],
                                                          [6, 8, 31, 32, 8, 21, 31, 22, 32, 6, 25, 35]]


def test_maskgen_from_prompts_to_images_is_the_golden_one():
    (net, cond), rng, trace, shown = small_maskgen(), np.random.RandomState(103), [], maskgen_inputs()[0]
    e = se.embed_tokens(shown, *net.tables())
    agrees(net(e, cond), [-1.623105, -2.559797, -0.2644933, -1.364312, -0.2603985], 1201.24412)
    agrees(dimo.guided_logits(net, e, cond, 5.0), [-5.610256, -7.887344, 2.604558, -5.543235, -11.21913], 3741.85291)
    draws = lambda i: (f32(rng.random_sample((2, 12, 1, 40))), f32(rng.random_sample((2, 12, 1))))
    highest = lambda z, temperature, u: (z + temperature * teachers.gumbel(u)).argmax(-1)  # Gumbel noise draws
    x = teachers.sample(net, cond, teachers.maskgen_plan(12, 6, 3.0, 6.0), draws=draws, draw=highest, trace=trace)
    assert [(t == 40).sum((1, 2)).tolist() for t in trace] == [[n] * 2 for n in (12, 10, 9, 8, 6, 4)]
    assert trace[5][..., 0].tolist() == [[19, 40, 40, 40, 16, 19, 19, 17, 40, 16, 23, 8],
                                         [40, 3, 40, 17, 5, 17, 8, 8, 40, 38, 40, 17]]
    assert x[..., 0].tolist() == [[19, 19, 19, 19, 16, 19, 19, 17, 19, 16, 23, 8],
                                  [17, 3, 17, 17, 5, 17, 8, 8, 17, 38, 17, 17]]
    img = small_titok().decode(se.embed_tokens(x, *small_titok().tables()), cond, clamp=False)  # told the prompt
    agrees(img, [-0.1625785, -0.6285173, -2.09211, -0.6503586, -0.3968382], 1240.8958)


def test_maskgens_published_plan_is_the_golden_one():
    plan = teachers.maskgen_plan(128, 16, **SPECS["maskgen"].settings(16))
    assert [p.hidden for p in plan] == [122, 117, 112, 107, 102, 96, 91, 85, 79, 72, 66, 58, 50, 41, 28, 0]
    guidance = [1.10568082, 1.41866279, 1.9269172, 2.6109128, 3.44436407, 4.39524126, 5.42700386, 6.5, 7.57299662,
                8.60475922, 9.55563736, 10.3890877, 11.0730829, 11.5813379, 11.8943195, 12.0]
    assert [p.w - 1 for p in plan] == pytest.approx(guidance, abs=2e-6)
    assert [p.divide for p in plan] == pytest.approx([1.25 - 0.05 * i for i in range(16)])
    assert [p.noise for p in plan] == [p.draw for p in plan] == pytest.approx([1.875 - 0.125 * i for i in range(16)])
    hidden = [p.hidden for p in teachers.maskgen_plan(128, 64)]
    assert (hidden[7::8], sum(hidden)) == ([117, 107, 96, 85, 72, 58, 41, 0], 5243 - 128)


# ========================================================================================== teachers: prompts
def test_prompts_become_the_golden_tokens_of_clip():
    tower = text_net.TextTower(32, 2, 1, 32)
    ids = tower.tokenize(["A cozy cabin in the middle of a snowy forest.", "", "word " * 100])
    assert ids.shape == (3, 77) and ids[:, :14].tolist() == [
        [49406, 320, 14873, 14178, 530, 518, 3694, 539, 320, 14191, 4167, 269, 49407, 0], [49406, 49407] + [0] * 12,
        [49406] + [2653] * 13]
    assert ids[:, -3:].tolist() == [[0, 0, 0], [0, 0, 0], [2653, 2653, 49407]]      # cut, but for the end


def test_meissonics_tokenizer_reads_a_bang_as_padding():
    bang, plain = (text_net.TextTower(32, 2, 1, 32, pads_with_bang=b) for b in (True, False))
    start, a, cat, end = 49406, 320, 2368, 49407
    expected = {"a cat": [start, a, cat, end], "a cat!!": [start, a, cat, 0, 0, end], "!": [start, 0, end],
                "a! cat": [start, a, 0, cat, end], "!a!": [start, 0, a, 0, end]}
    for prompt, ids in expected.items():
        assert bang.tokenize([prompt])[0, : len(ids) + 1].tolist() == [*ids, 0]
    assert plain.tokenize(["a cat!!"])[0, :5].tolist() == [start, a, cat, 748, end]     # elsewhere "!!" is a word
    assert bang.tokenize(["!" * 99])[0].tolist() == [start] + [0] * 75 + [end]


def test_the_activation_of_a_text_tower_is_the_specs_or_the_flags():
    for flag, name in ((None, "QuickGELU"), ("gelu", "GELU"), ("quick_gelu", "QuickGELU")):
        text = load_teacher("maskgen-tiny", random_weights=True, text_activation=flag).text
        assert {type(block.mlp.gelu).__name__ for block in text.tower.transformer.resblocks} == {name}


@pytest.mark.parametrize("name", TINY)
def test_one_hot_logits_are_hard_tokens_bit_for_bit_in_every_teacher(name):
    net, tok, *_ = tiny_teacher(name)
    for E, bias in (net.tables(), tok.tables()):
        V = E.shape[1] - 1
        x, mask = integers(2, V, 3, net.L, net.G), uniform(3, 3, net.L, net.G) < 0.5
        z = 1e4 * F.one_hot(x, V + (name == "maskgit-tiny")).float()                # whose logits have a mask entry
        assert E.shape[:2] == (net.G, net.V + 1)
        assert torch.equal(se.soft_embed(z, E, bias), se.embed_tokens(x, E, bias))
        assert torch.equal(se.soft_embed(z, E, bias, mask), se.embed_tokens(x.masked_fill(mask, V), E, bias))


@pytest.mark.parametrize("name", TINY)
def test_every_teacher_samples_tokens_that_its_tokenizer_decodes(name):
    teacher, _, _, cond = tiny_inputs(name)
    net, tok, spec, _ = teacher
    trace, _ = [], torch.manual_seed(0)
    x = teachers.sample(net, cond, spec.plan(net.L * net.G, 3, **spec.settings(3)), trace=trace)
    for before, after in zip(trace, [*trace[1:], x]):
        assert torch.equal(before[before < net.V], after[before < net.V])           # what is known stays
    img = teachers.decode_tokens(tok, x, cond)
    assert (x < net.V).all() and img.shape == (2, *spec.image) and img.min() >= 0 and img.max() <= 1
    assert tok.encode(img).shape == x.shape and (tok.V, tok.G) == (net.V, net.G)


@pytest.mark.parametrize("name", TINY)
def test_features_stop_at_the_last_layer_asked_for(name):
    teacher, _, e, cond = tiny_inputs(name)
    net, calls, blocks = teacher.net, [], [*teacher.net.blocks, *getattr(teacher.net, "single", ())]
    handles = [b.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, b in enumerate(blocks)]
    every = net(e, cond, layers=tuple(range(net.depth)))
    assert calls == list(range(net.depth)) and len(every) == net.depth
    for layers in [(0,), (1,), (0, 2), (1, 2), (net.depth - 1,)]:                   # Meissonic: 2 joint, 2 single
        calls.clear()
        features = net(e, cond, layers=layers)
        assert calls == list(range(max(layers) + 1))
        assert all(torch.equal(f, every[i]) for f, i in zip(features, layers, strict=True))
    for h in handles:
        h.remove()


def value_and_gradients(module, f, e):
    e = e.clone().requires_grad_()
    out = f(e)
    loss = (out * normal(5, *out.shape)).sum()
    return [out, *torch.autograd.grad(loss, [e, *module.parameters()], allow_unused=True)]


@pytest.mark.parametrize("name", TINY)
def test_checkpointing_changes_neither_outputs_nor_gradients(name):
    teacher, x, e, cond = tiny_inputs(name)
    net, tok = (copy.deepcopy(m).requires_grad_() for m in teacher[:2])
    e_dec = se.embed_tokens(x.clamp(max=net.V - 1), *tok.tables()).detach()
    last = tok.decoder.transformer[-1] if name == "maskgen-tiny" else tok.decoder.mid.res_blocks[0]
    for module, f, inputs, block in ((net, lambda e: net(e, cond), e, net.blocks[-1]),
                                     (tok, lambda e: tok.decode(e, cond, clamp=False), e_dec, last)):
        runs, results = [], []
        handle = block.register_forward_pre_hook(lambda *_: runs.append(1))
        for on in (False, True):
            module.set_checkpointing(on)
            results.append(value_and_gradients(module, f, inputs))
        handle.remove()
        assert len(runs) == 1 + 2, "computed again on the way back"
        assert all(torch.equal(a, b) if a is not None else b is None for a, b in zip(*results, strict=True))


def test_the_unconditional_condition_changes_the_prompt_alone():
    for name, keeps in (("meissonic-tiny", (2, 3)), ("maskgen-tiny", (2, 3))):
        teacher, _, e, cond = tiny_inputs(name)
        null, empty = teacher.net.null(cond), teacher.cond(teacher.conditions([teacher.spec.negative]))
        assert all(null[i] is cond[i] for i in keeps)                               # size and time; score and guide
        assert all(torch.equal(null[i], empty[i].expand_as(cond[i])) for i in (0, 1))
        assert not torch.equal(teacher.net(e, null), teacher.net(e, cond))
    labels = torch.tensor([3, 0])
    assert tiny_teacher("maskgit-tiny").net.null((labels,))[0].tolist() == [10, 10] and labels.tolist() == [3, 0]


def test_the_decoder_of_maskgen_reads_the_prompt_and_no_other_does():
    for name in TINY:
        teacher, x, _, cond = tiny_inputs(name)
        x, swapped = x.clamp(max=teacher.net.V - 1), tuple(c.flip(0) for c in cond)
        a, b = (teachers.decode_tokens(teacher.tokenizer, x, c) for c in (cond, swapped))
        assert torch.equal(a, b) == (name != "maskgen-tiny")


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("name", TINY)
def test_logits_of_every_teacher_are_float32_under_bf16_autocast(name):
    teacher, _, e, cond = tiny_inputs(name)
    exact = teacher.net(e, cond)
    with torch.autocast("cpu", torch.bfloat16):
        z = teacher.net(e, cond)
    assert z.dtype == torch.float32 and z.bfloat16().float().ne(z).any(), "they were not rounded on the way"
    assert 0 < (z - exact).abs().max() < 0.1 * exact.abs().max()


def test_dropout_is_where_a_teacher_was_trained_with_it():
    for name in TINY:
        teacher, _, e, cond = tiny_inputs(name)
        net = copy.deepcopy(teacher.net).set_dropout(0.5)
        still = net.eval()(e, cond)
        assert torch.equal(net.train()(e, cond), still) == (name in ("meissonic-tiny", "maskgen-tiny"))
        assert torch.equal(net.set_dropout(0.0).train()(e, cond), still)


def test_perturbed_input_is_noise_on_the_embedding_where_no_norm_comes_first():
    for name in set(TINY) - {"meissonic-tiny"}:
        teacher, _, e, cond = tiny_inputs(name)
        noise = normal(2, *e.shape)
        assert torch.equal(teacher.net(e, cond, s=0.3, noise=noise), teacher.net(dimo.perturb(e, 0.3, noise), cond))


@pytest.mark.parametrize("make, millions", [(teachers.Meissonic, 988.0), (teachers.MaskGit, 171.9),
                                            (teachers.MaskGen, 594.8)])
def test_distillation_trains_all_but_the_embedding_layer_and_the_output_layer(make, millions):
    with torch.device("meta"):
        net = make()
    frozen = {id(p) for p in net.frozen()}
    assert abs(sum(p.numel() for p in net.parameters() if id(p) not in frozen) / 1e6 - millions) < 0.05


# ==================================================================================== memory, counted at full size
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages alive; with fake tensors, which have sizes and no data, at any size."""

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


def test_memory_of_a_meissonic_step_at_1024_pixels_counts_well_below_80_gb():
    B, spec, bf16 = 4, SPECS["meissonic"], torch.autocast("cpu", torch.bfloat16)
    with FakeTensorMode(), LiveBytes() as live:
        net, student, aux, ema = (spec.Net(**spec.net) for _ in range(4))
        tok = spec.Tokenizer(**spec.tokenizer).requires_grad_(False)
        net.requires_grad_(False), ema.requires_grad_(False)
        for m in (m for blocks in (net.blocks, net.single) for m in blocks.modules() if isinstance(m, nn.Linear)):
            m.weight, m.bias = (nn.Parameter(p.bfloat16(), requires_grad=False) for p in (m.weight, m.bias))    # net.halve()
        for m in (net, student, aux, tok):
            m.set_checkpointing()
        opts = [torch.optim.Adam([p.requires_grad_(False) if any(p is q for q in m.frozen()) else p for p in m.parameters()],
                                 foreach=False) for m in (student, aux)]
        cond = torch.empty(B, 77, 1024), torch.empty(B, 1024), torch.empty(B, 5), torch.empty(B)
        net.null_text, net.null_pooled = cond[0][:1], cond[1][:1]
        x, mask, noise = torch.zeros(B, 4096, 1).long(), torch.ones(B, 4096, 1).bool(), torch.empty(B, 4096, 1024)
        E, bias = (t.detach() for t in student.tables())
        for opt in opts:                                          # Adam's moments exist from the first step on
            for p in opt.param_groups[0]["params"]:
                p.grad = torch.empty_like(p) if p.requires_grad else None
            opt.step(), opt.zero_grad()
        del p
        live.peak = live.now
        with bf16:
            z = dimo.student_logits(student, x, cond, E, bias, 0.3, noise)
            drawn = se.sample_tokens(z.detach(), u=torch.empty(B, 4096, 1))
            z.backward(dimo.dimo_grad(net, aux, se.embed_tokens(drawn, E, bias), cond, mask, 4.0))
        opts[0].step(), opts[0].zero_grad()
        with bf16:
            dimo.aux_loss(aux(se.embed_tokens(drawn, E, bias), cond), drawn, mask).backward()
        opts[1].step(), opts[1].zero_grad()
        del z, drawn
        step, rest = live.peak, live.now
        live.peak, z = rest, torch.empty(1, 4096, 1, 8192, requires_grad=True)
        tok.decode(se.soft_embed(z, *tok.tables())).mean().backward()
    print(f"at rest {rest / 1e9:.1f} GB, Di[M]O step {step / 1e9:.1f}, decoder {(live.peak - rest) / 1e9:.1f} above rest")
    assert 30e9 < rest < 32e9 and step < 40e9 and live.peak - rest < 11e9


# ============================================================================== teachers: the Halton baseline
def test_halton_order_visits_every_cell_and_begins_as_by_hand():
    for rows, columns in [(2, 2), (4, 4), (8, 8), (16, 16), (32, 32), (8, 12)]:
        order = teachers.halton_order((rows, columns))
        assert order.shape == (rows * columns, 1) and set(order[:, 0].tolist()) == set(range(rows * columns))
    points = [(1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), (5/8, 7/9), (3/8, 2/9), (7/8, 5/9), (1/16, 8/9)]
    cells = [4 * int(4 * a) + int(4 * b) for a, b in points]
    assert cells == [9, 6, 12, 1, 11, 4, 14, 3]                                     # row-major, all different
    assert teachers.halton_order((4, 4))[cells, 0].tolist() == list(range(8))
    wide = [8 * int(2 * a) + int(8 * b) for a, b in points[:4]]                     # 2 rows, 8 columns
    assert wide == [10, 5, 8, 3] and teachers.halton_order((2, 8))[wide, 0].tolist() == [0, 1, 2, 3]


def test_given_an_order_the_sampler_keeps_the_lowest_ranks_first():
    net, order, trace = small_maskgit(), teachers.halton_order(small_maskgit().grid), []
    plan = teachers.maskbit_plan(16, 6, guidance=2.0, temperature=5.0)
    x = teachers.sample(net, (torch.tensor([1, 2]),), plan, order=order, trace=trace,
                        draw=lambda z, temperature, u: z[..., :32].argmax(-1))      # never the mask
    assert (x < 32).all()
    for t, hidden in zip(trace, [16, *(p.hidden for p in plan)]):
        assert ((t < 32) == (order < 16 - hidden)).all()


# ============================================================================= teachers: how they are trained
class Recorder:
    """A net for mdm_loss: gives the logits z, embeds a group's mask as 1, other tokens as 0, keeps its input."""

    V, classes = 16, 10

    def __init__(self, z):
        self.z = z

    def tables(self):
        E = torch.zeros(2, 17, 2)
        E[0, 16, 0] = E[1, 16, 1] = 1
        return E, torch.zeros(2)

    def __call__(self, e, cond):
        self.masked, self.labels = e > 0, cond[0]
        return self.z


def test_mdm_loss_is_the_golden_one(monkeypatch):
    net, x, mask = Recorder(normal(16, 3, 16, 2, 16)), integers(10, 16, 3, 16, 2), uniform(11, 3, 16, 2) < 0.5
    drawn = iter([torch.full((3,), 0.5), 1.0 - mask.float(), torch.ones(3)])        # ratio, units, label dropping
    monkeypatch.setattr(torch, "rand", lambda *size, **_: next(drawn))
    loss, log = mdm_loss(net, x, torch.tensor([1, 2, 3]))
    assert loss.item() == pytest.approx(3.2203765, abs=2e-6)
    assert log["masked"].item() == pytest.approx(3.1023631, abs=2e-6)
    assert torch.equal(net.masked, mask) and net.labels.tolist() == [1, 2, 3]


def test_mdm_training_masks_units_independently_at_one_ratio_an_image():
    torch.manual_seed(0)
    net = Recorder(torch.zeros(4000, 16, 2, 16))
    mdm_loss(net, torch.zeros(4000, 16, 2, dtype=torch.long), torch.zeros(4000, dtype=torch.long))
    m = net.masked.float()
    assert abs(m.mean() - 2 / math.pi) < 0.01                                       # E r, r = arccos(u) 2/pi
    assert abs((m[..., 0] * m[..., 1]).mean() - 4 * (math.pi - 2) / math.pi**2) < 0.01  # E r^2: both groups
    assert abs((m[:, 0] * m[:, 9]).mean() - 4 * (math.pi - 2) / math.pi**2) < 0.015  # and two positions
    assert set(net.labels.tolist()) == {0, 10} and abs((net.labels == 10).float().mean() - 0.1) < 0.015


def test_tokenizer_loss_knows_the_entropies_over_all_joint_codes():
    tok = autoencoders.BitTokenizer(channels=4, hidden=4, mult=(1,), blocks=1, bits=4, norm_groups=1)
    tok.encoder, tok.decoder, img = nn.Identity(), nn.Identity(), 0.3 * normal(0, 3, 4, 5, 5)
    log = tokenizer_loss(tok, img)[1]
    z = img.permute(0, 2, 3, 1).reshape(-1, 1, 4)                                   # (75, 1, 4)
    codes = torch.sigmoid(4 * z * autoencoders.bits_of(torch.arange(16), 4)).prod(-1)   # (75, 16), all 2^4 enumerated
    entropy = lambda p: -(p * p.log()).sum(-1)
    assert log["sure"].item() == pytest.approx(entropy(codes).mean().item(), abs=1e-4)
    assert log["used"].item() == pytest.approx(entropy(codes.mean(0)).item(), abs=1e-4)
