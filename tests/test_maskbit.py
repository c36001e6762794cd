"""MaskBit: tokens that are bits, the generator, the tokenizer, the sampler; how they are trained.

Golden numbers are the public implementation's (tests/golden/maskbit.json).
"""

import dataclasses
import functools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import soft_embed as se
import teachers
from networks import blocks
from networks.autoencoders import BitTokenizer, Level, bits_of
from teachers import SPECS
from tests.common import (
    agrees,
    close,
    golden,
    half_masked_tokens,
    integers,
    mini_net,
    normal,
    run_with_hooks,
    small_net,
    small_tokenizer,
    uniform,
)
from tests.small_teachers import Calls, count_masks, traced_sample
from worlds.make_fashion import mdm_loss, tokenizer_loss

GOLDEN = golden("maskbit")


def codes(x):
    """Tokens (B, L, 2) of 4 + 4 bits as the numbers from 0 to 255 of the golden entries."""
    return (x[..., 0] + 16 * x[..., 1]).tolist()


def tokenizer_of_latents():
    """A tokenizer of 14 bits for images that are their latents."""
    tokenizer = BitTokenizer(hidden=32, mult=(1,), blocks=1)
    tokenizer.encoder = nn.Identity()
    return tokenizer


# -------------------------------------------------------------------------------------- tokens
def test_tokens_are_bits_lowest_first_in_two_groups():
    expected = GOLDEN["bits"]
    tokens = torch.tensor(expected["tokens"])
    bits = bits_of(tokens, 14)
    assert bits[tokens == 10000][0].tolist() == expected["of_10000"]
    tokenizer = tokenizer_of_latents()
    latents = 0.1 * bits.T.view(1, 14, 1, 10)
    assert tokenizer.encode(latents)[0].tolist() == expected["groups"]
    groups = torch.tensor([expected["groups"]])
    assert torch.equal(se.embed_tokens(groups, *tokenizer.tables())[0], bits)


def test_a_zero_latent_is_a_minus_bit():
    assert (tokenizer_of_latents().encode(torch.zeros(1, 14, 2, 2)) == 0).all()


def test_a_masked_group_is_zero_and_leaves_the_other_alone():
    five = [1, -1, 1, -1, -1, -1, -1]
    zero = [0] * 7
    x = torch.tensor([[[128, 5], [5, 128], [128, 128]]])
    e = se.embed_tokens(x, *tokenizer_of_latents().tables())
    assert e[0].tolist() == [zero + five, five + zero, zero + zero]
    net = small_net()
    masks = torch.full((1, 1, 2), 16)
    assert torch.equal(se.embed_tokens(masks, *net.tables())[0, 0], net.input_proj.bias)


def test_generator_reads_tokens_through_its_input_layer():
    x, _ = half_masked_tokens()
    net = small_net()
    bits = bits_of(x, 4) * (x < 16)[..., None]                              # (3, 16, 2, 4)
    assert bits.sum() == GOLDEN["bits"]["half_masked_sum"]
    assert bits.abs().sum() == GOLDEN["bits"]["half_masked_abs_sum"]
    assert close(se.embed_tokens(x, *net.tables()), net.input_proj(bits.flatten(2)), atol=2e-6)


# ----------------------------------------------------------------------------------- generator
def test_generator_gives_the_golden_embedding_features_and_logits():
    x, cond = half_masked_tokens()
    net, expected = small_net(), GOLDEN["generator"]
    e = se.embed_tokens(x, *net.tables())
    first, hidden, z = run_with_hooks(net, e, cond)         # L+1 positions, class last
    agrees(first, **expected["input"])
    for h, numbers in zip(hidden, expected["blocks"], strict=True):
        agrees(h, **numbers)
    agrees(z, **expected["logits"])
    assert z.shape == (3, 16, 2, 16)
    for layers in [(0,), (1,), (0, 2), (0, 1, 2)]:          # without the class position
        features = net(e, cond, layers=layers)
        for f, i in zip(features, layers, strict=True):
            assert torch.equal(f, hidden[i][:, :16])


def test_generator_gives_the_golden_logits_from_nothing_but_masks():
    net = small_net()
    masks = torch.full((3, 16, 2), 16)
    z = net(se.embed_tokens(masks, *net.tables()), (torch.tensor([3, 7, 0]),))
    agrees(z, **GOLDEN["generator"]["logits_all_masked"])


def test_features_cost_only_the_layers_up_to_the_last_asked_for():
    net = small_net()
    with Calls([*net.blocks, net.head]) as calls:
        net(torch.zeros(1, 16, 64), (torch.tensor([0]),), layers=(1,))
    assert calls.numbers == [0, 1]


def test_null_condition_is_the_last_class_and_writes_nothing():
    labels = torch.tensor([3, 7, 0])
    assert small_net().null((labels,))[0].tolist() == [10, 10, 10]
    assert labels.tolist() == [3, 7, 0]


def test_frozen_parameters_are_the_embedding_layer():
    net = mini_net()
    fixed = {id(p) for p in net.frozen()}
    names = [name for name, p in net.named_parameters() if id(p) in fixed]
    assert sorted(names) == ["class_emb.weight", "input_proj.bias", "input_proj.weight", "pos_emb"]


def test_dropout_is_active_in_training_alone_and_can_be_switched_off():
    net = mini_net().set_dropout(0.5)                       # 2 blocks
    rates = [m.p for m in net.modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.5] * 5
    assert sum(isinstance(m, blocks.Attention) for m in net.modules()) == 2
    inputs = torch.zeros(1, 4, 8), (torch.tensor([0]),)
    still = net.eval()(*inputs)
    assert torch.equal(net(*inputs), still)
    assert not torch.equal(net.train()(*inputs), net(*inputs))
    assert close(net.set_dropout(0.0).train()(*inputs), still)


def test_noise_is_measured_in_the_root_mean_square_of_the_table():
    teacher = teachers.Teacher(small_net(), None, SPECS["maskbit-tiny"])
    E, _ = teacher.net.tables()
    rows = E[:, :16]                                        # all but the mask's
    assert teacher.noise_scale() == pytest.approx(rows.square().mean().sqrt().item())
    spec = dataclasses.replace(teacher.spec, noise_scale=1.5)
    assert teacher._replace(spec=spec).noise_scale() == 1.5


def test_logits_are_float32_under_bf16_autocast():
    net = small_net()
    with torch.autocast("cpu", torch.bfloat16):
        z = net(torch.zeros(1, 16, 64), (torch.tensor([0]),))
    assert z.dtype == torch.float32
    assert z.bfloat16().float().ne(z).any(), "they were not rounded on the way"


# ----------------------------------------------------------------------------------- tokenizer
def test_same_padding_puts_the_odd_pixel_right_and_below():
    step = Level(2, 2, 0, 1, "down")
    img = normal(0, 1, 2, 6, 8)
    padded = F.pad(img, (0, 1, 0, 1))                       # left, right, above, below
    assert close(step(img), F.conv2d(padded, step.down_conv.weight, step.down_conv.bias, 2))


def test_tokenizer_gives_the_golden_latent_tokens_and_reconstruction():
    tokenizer, expected = small_tokenizer(), GOLDEN["tokenizer"]
    img = F.interpolate(uniform(14, 2, 3, 8, 8).float(), scale_factor=8)    # (2, 3, 64, 64)
    agrees(tokenizer.encoder(img), **expected["latent"])
    x = tokenizer.encode(img)                                               # (2, 16, 2)
    assert codes(x) == expected["codes"]
    out = tokenizer.decode(se.embed_tokens(x, *tokenizer.tables()), clamp=False)
    agrees(out, **expected["reconstruction"])


def test_tokenizer_decodes_the_golden_image_and_clamps_it():
    tokenizer = small_tokenizer()
    code = integers(15, 256, 2, 16)
    x = torch.stack([code % 16, code // 16], -1)
    e = se.embed_tokens(x, *tokenizer.tables())
    img = tokenizer.decode(e, clamp=False)
    agrees(img, **GOLDEN["tokenizer"]["image"])
    assert close(teachers.decode_tokens(tokenizer, x), img.clamp(0, 1))
    parts = tokenizer.decode(e, clamp=False, chunk=1)
    assert close(parts, img, atol=2e-4), "a batch decoded in parts is the same batch"


def test_masked_tokens_are_not_decoded():
    with pytest.raises(ValueError, match="below V = 16, got 16: unmask"):
        teachers.decode_tokens(small_tokenizer(), torch.full((1, 16, 2), 16))


# ------------------------------------------------------------------------------------- sampler
@functools.cache
def golden_run():
    """Eight steps from nothing but masks: tokens (3, 16, 2), and those that entered each step."""
    plan = teachers.maskbit_plan(32, 8, guidance=7.1, temperature=7.8)
    uniforms = [(uniform(1000 + i, 3, 16, 2), uniform(2000 + i, 3, 16, 2)) for i in range(8)]
    return traced_sample(small_net(), (torch.tensor([1, 5, 2]),), plan, uniforms)


def test_sampler_draws_the_golden_tokens():
    x, trace = golden_run()
    expected = GOLDEN["sampling"]
    assert count_masks(trace, 16) == [[n] * 3 for n in expected["masked"]]
    assert trace[3][0].flatten().tolist() == expected["first_sample_at_step_3"]
    assert trace[7][0].flatten().tolist() == expected["first_sample_at_step_7"]
    assert codes(x) == expected["codes"]
    tokenizer = small_tokenizer()
    img = tokenizer.decode(se.embed_tokens(x, *tokenizer.tables()), clamp=False)
    agrees(img, **expected["image"])


def test_sampler_never_changes_a_known_token():
    x, trace = golden_run()
    for before, after in zip(trace, [*trace[1:], x]):
        assert torch.equal(before[before < 16], after[before < 16])
    assert (x < 16).all()


@pytest.mark.parametrize("steps", [64, 128, 256])
def test_published_sampling_has_the_golden_schedules(steps):
    expected = GOLDEN["schedules"][str(steps)]
    plan = teachers.maskbit_plan(512, steps, **SPECS["maskbit"].settings(steps))
    masked = [512, *(step.hidden for step in plan)]
    assert masked.pop() == 0
    assert masked[:: steps // 8] == expected["masked"]
    assert sum(masked) == expected["masked_sum"]
    guidance = torch.tensor([step.w - 1 for step in plan])
    assert close(guidance[:: steps // 8], torch.tensor(expected["guidance"]), atol=2e-6)
    assert guidance.sum().item() == pytest.approx(expected["guidance_sum"], rel=1e-5)
    T = SPECS["maskbit"].sampling[steps]["temperature"]
    noise = [T * (1 - (i + 1) / steps) for i in range(steps)]
    assert [step.noise for step in plan] == pytest.approx(noise)


def test_published_settings_are_those_of_the_readme_and_the_nearest_is_taken():
    spec = SPECS["maskbit"]
    assert spec.sampling == {
        64: dict(guidance=7.1, temperature=7.8),
        128: dict(guidance=7.1, temperature=9.0),
        256: dict(guidance=5.8, temperature=10.3),
    }
    nearest = [spec.settings(n)["temperature"] for n in (1, 90, 93, 185, 999)]
    assert nearest == [7.8, 7.8, 9.0, 10.3, 10.3]
    given = spec.settings(64, guidance=2.0, temperature=None)
    assert given == dict(guidance=2.0, temperature=7.8)


# ------------------------------------------------------------------------- how it is trained
class Recorder:
    """A net for mdm_loss: gives the logits z, embeds a group's mask as 1, tokens as 0, and keeps
    its input."""

    V, classes = 16, 10

    def __init__(self, z):
        self.z = z

    def tables(self):
        E = torch.zeros(2, 17, 2)
        E[0, 16, 0] = 1
        E[1, 16, 1] = 1
        return E, torch.zeros(2)

    def __call__(self, e, cond):
        self.masked, self.labels = e > 0, cond[0]
        return self.z


def test_mdm_loss_is_the_golden_one(monkeypatch):
    net = Recorder(normal(16, 3, 16, 2, 16))
    x = integers(10, 16, 3, 16, 2)
    mask = uniform(11, 3, 16, 2) < 0.5
    ratio, units, kept_labels = torch.full((3,), 0.5), 1.0 - mask.float(), torch.ones(3)
    drawn = iter([ratio, units, kept_labels])
    monkeypatch.setattr(torch, "rand", lambda *size, **_: next(drawn))
    loss, log = mdm_loss(net, x, torch.tensor([1, 2, 3]))
    assert loss.item() == pytest.approx(GOLDEN["training"]["loss"], abs=2e-6)
    assert log["masked"].item() == pytest.approx(GOLDEN["training"]["loss_at_masks"], abs=2e-6)
    assert torch.equal(net.masked, mask)
    assert net.labels.tolist() == [1, 2, 3]


def test_mdm_training_masks_units_independently_at_one_ratio_an_image():
    torch.manual_seed(0)
    B = 4000
    net = Recorder(torch.zeros(B, 16, 2, 16))
    mdm_loss(net, torch.zeros(B, 16, 2, dtype=torch.long), torch.zeros(B, dtype=torch.long))
    m = net.masked.float()
    mean, mean_square = 2 / math.pi, 4 * (math.pi - 2) / math.pi**2         # of r = arccos(u) 2/pi
    assert abs(m.mean() - mean) < 0.01
    assert abs((m[..., 0] * m[..., 1]).mean() - mean_square) < 0.01         # both groups
    assert abs((m[:, 0] * m[:, 9]).mean() - mean_square) < 0.015            # two positions
    assert set(net.labels.tolist()) == {0, 10}
    assert abs((net.labels == 10).float().mean() - 0.1) < 0.015


def test_tokenizer_loss_knows_the_entropies_over_all_joint_codes():
    tokenizer = BitTokenizer(channels=4, hidden=4, mult=(1,), blocks=1, bits=4, norm_groups=1)
    tokenizer.encoder, tokenizer.decoder = nn.Identity(), nn.Identity()
    img = 0.3 * normal(0, 3, 4, 5, 5)
    log = tokenizer_loss(tokenizer, img)[1]
    z = img.permute(0, 2, 3, 1).reshape(-1, 1, 4)                           # (75, 1, 4)
    every_code = bits_of(torch.arange(16), 4)                               # (16, 4)
    p = torch.sigmoid(4 * z * every_code).prod(-1)                          # (75, 16)

    def entropy(p):
        return -(p * p.log()).sum(-1)

    assert log["sure"].item() == pytest.approx(entropy(p).mean().item(), abs=1e-4)
    assert log["used"].item() == pytest.approx(entropy(p.mean(0)).item(), abs=1e-4)
