"""What all four teachers share: the interface in teachers.py, proved on the tiny versions; prompts.

Golden numbers: test_maskbit.py, test_maskgit.py, test_meissonic.py, test_maskgen.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

import dimo
import soft_embed as se
import teachers
from networks.blocks import attend, rope_table, rotate
from networks.text import TextTower
from teachers import load_teacher
from tests.common import TINY, close, golden, integers, normal, tiny_inputs, tiny_teacher, uniform
from tests.small_teachers import Calls, traced_sample

CLIP_IDS = golden("clip_ids")
TEXT = ("meissonic-tiny", "maskgen-tiny")


# ------------------------------------------------------------------------------------- prompts
def test_prompts_become_the_golden_tokens_of_clip():
    tower = TextTower(32, 2, 1, 32)
    ids = tower.tokenize(["A cozy cabin in the middle of a snowy forest.", "", "word " * 100])
    assert ids.shape == (3, 77)
    assert ids[:, :14].tolist() == CLIP_IDS["first_14"]
    assert ids[:, -3:].tolist() == CLIP_IDS["last_3"]       # cut, but for the end


def test_meissonics_tokenizer_reads_a_bang_as_padding():
    bang = TextTower(32, 2, 1, 32, pads_with_bang=True)
    plain = TextTower(32, 2, 1, 32)
    for tower, expected in (
        (bang, CLIP_IDS["bang_is_padding"]),
        (plain, CLIP_IDS["bang_is_a_word"]),
    ):
        for prompt, ids in expected.items():
            assert tower.tokenize([prompt])[0, : len(ids) + 1].tolist() == [*ids, 0]
    start, end = 49406, 49407
    assert bang.tokenize(["!" * 99])[0].tolist() == [start] + [0] * 75 + [end]


@pytest.mark.parametrize("flag, name", [
    (None, "QuickGELU"),
    ("gelu", "GELU"),
    ("quick_gelu", "QuickGELU"),
])
def test_the_activation_of_a_text_tower_is_the_specs_or_the_flags(flag, name):
    text = load_teacher("maskgen-tiny", random_weights=True, text_activation=flag).text
    blocks = text.tower.transformer.resblocks
    assert {type(block.mlp.gelu).__name__ for block in blocks} == {name}


# --------------------------------------------------------------------------------- every teacher
@pytest.mark.parametrize("name", TINY)
def test_one_hot_logits_are_hard_tokens_bit_for_bit_in_every_teacher(name):
    net, tokenizer, *_ = tiny_teacher(name)
    mask = uniform(3, 3, net.L, net.G) < 0.5
    for E, bias in (net.tables(), tokenizer.tables()):
        assert E.shape[:2] == (net.G, net.V + 1)
        V = E.shape[1] - 1
        x = integers(2, V, 3, net.L, net.G)
        entries = V + (name == "maskgit-tiny")              # whose logits have a mask entry
        z = 1e4 * F.one_hot(x, entries).float()
        assert torch.equal(se.soft_embed(z, E, bias), se.embed_tokens(x, E, bias))
        hard = se.embed_tokens(x.masked_fill(mask, V), E, bias)
        assert torch.equal(se.soft_embed(z, E, bias, mask), hard)


@pytest.mark.parametrize("name", TINY)
def test_every_teacher_samples_tokens_that_its_tokenizer_decodes(name):
    teacher, _, _, cond = tiny_inputs(name)
    net, tokenizer, spec = teacher.net, teacher.tokenizer, teacher.spec
    torch.manual_seed(0)
    plan = spec.plan(net.L * net.G, 3, **spec.settings(3))
    x, trace = traced_sample(net, cond, plan)
    for before, after in zip(trace, [*trace[1:], x]):
        known = before < net.V
        assert torch.equal(before[known], after[known])
    assert (x < net.V).all()
    img = teachers.decode_tokens(tokenizer, x, cond)
    assert img.shape == (2, *spec.image)
    assert img.min() >= 0 and img.max() <= 1
    assert tokenizer.encode(img).shape == x.shape
    assert (tokenizer.V, tokenizer.G) == (net.V, net.G)


@pytest.mark.parametrize("name", TINY)
def test_features_stop_at_the_last_layer_asked_for(name):
    teacher, _, e, cond = tiny_inputs(name)
    net = teacher.net
    blocks = [*net.blocks, *getattr(net, "single", ())]     # Meissonic: 2 joint, 3 single
    with Calls(blocks) as calls:
        every = net(e, cond, layers=tuple(range(net.depth)))
        assert calls.numbers == list(range(net.depth)) and len(every) == net.depth
        for layers in [(0,), (1,), (0, 2), (1, 2), (net.depth - 1,)]:
            calls.numbers.clear()
            features = net(e, cond, layers=layers)
            assert calls.numbers == list(range(max(layers) + 1))
            for f, i in zip(features, layers, strict=True):
                assert torch.equal(f, every[i])


def value_and_gradients(module, f, e):
    e = e.clone().requires_grad_()
    out = f(e)
    loss = (out * normal(5, *out.shape)).sum()
    return [out, *torch.autograd.grad(loss, [e, *module.parameters()], allow_unused=True)]


def with_and_without_checkpointing(module, f, e, block):
    """Value and gradients without and with it, and how often the block ran in all."""
    runs = []
    handle = block.register_forward_pre_hook(lambda *_: runs.append(1))
    results = [value_and_gradients(module.set_checkpointing(on), f, e) for on in (False, True)]
    handle.remove()
    return results, len(runs)


@pytest.mark.parametrize("part", ["net", "tokenizer"])
@pytest.mark.parametrize("name", TINY)
def test_checkpointing_changes_neither_outputs_nor_gradients(name, part):
    teacher, x, e, cond = tiny_inputs(name)
    module = copy.deepcopy(getattr(teacher, part)).requires_grad_()
    if part == "net":
        block = module.blocks[-1]
    else:
        x = x.clamp(max=teacher.net.V - 1)
        e = se.embed_tokens(x, *module.tables()).detach()
        if name == "maskgen-tiny":
            block = module.decoder.transformer[-1]
        else:
            block = module.decoder.mid.res_blocks[0]

    def run(e):
        if part == "net":
            return module(e, cond)
        return module.decode(e, cond, clamp=False)

    results, runs = with_and_without_checkpointing(module, run, e, block)
    assert runs == 1 + 2, "computed again on the way back"
    for a, b in zip(*results, strict=True):
        assert b is None if a is None else torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("name", TINY)
def test_logits_of_every_teacher_are_float32_under_bf16_autocast(name):
    teacher, _, e, cond = tiny_inputs(name)
    exact = teacher.net(e, cond)
    with torch.autocast("cpu", torch.bfloat16):
        z = teacher.net(e, cond)
    assert z.dtype == torch.float32
    assert z.bfloat16().float().ne(z).any(), "they were not rounded on the way"
    assert 0 < (z - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("name", TINY)
def test_dropout_is_where_a_teacher_was_trained_with_it(name):
    teacher, _, e, cond = tiny_inputs(name)
    net = copy.deepcopy(teacher.net).set_dropout(0.5)
    still = net.eval()(e, cond)
    assert torch.equal(net.train()(e, cond), still) == (name in TEXT)
    assert torch.equal(net.set_dropout(0.0).train()(e, cond), still)


# ------------------------------------------------------------------------- where they differ
@pytest.mark.parametrize("name", TEXT)
def test_the_unconditional_condition_changes_the_prompt_alone(name):
    teacher, _, e, cond = tiny_inputs(name)
    null = teacher.net.null(cond)
    empty = teacher.cond(teacher.conditions([teacher.spec.negative]))
    for i in (0, 1):                                        # text states, pooled text
        assert torch.equal(null[i], empty[i].expand_as(cond[i]))
    for i in (2, 3):                                        # size and time; score and guide
        assert null[i] is cond[i]
    assert not torch.equal(teacher.net(e, null), teacher.net(e, cond))


def test_the_unconditional_condition_of_maskgit_is_the_last_class_and_writes_nothing():
    labels = torch.tensor([3, 0])
    assert tiny_teacher("maskgit-tiny").net.null((labels,))[0].tolist() == [10, 10]
    assert labels.tolist() == [3, 0]


@pytest.mark.parametrize("name", TINY)
def test_the_decoder_of_maskgen_reads_the_prompt_and_no_other_does(name):
    teacher, x, _, cond = tiny_inputs(name)
    x = x.clamp(max=teacher.net.V - 1)
    swapped = tuple(c.flip(0) for c in cond)
    a, b = (teachers.decode_tokens(teacher.tokenizer, x, c) for c in (cond, swapped))
    assert torch.equal(a, b) == (name != "maskgen-tiny")


@pytest.mark.parametrize("name", ["maskbit-tiny", "maskgit-tiny", "maskgen-tiny"])
def test_perturbed_input_is_noise_on_the_embedding_where_no_norm_comes_first(name):
    teacher, _, e, cond = tiny_inputs(name)
    noise = normal(2, *e.shape)
    perturbed = teacher.net(e, cond, s=0.3, noise=noise)
    assert torch.equal(perturbed, teacher.net(dimo.perturb(e, 0.3, noise), cond))


@pytest.mark.parametrize("Net, millions", [
    (teachers.Meissonic, 988.0),
    (teachers.MaskGit, 171.9),
    (teachers.MaskGen, 594.8),
])
def test_distillation_trains_all_but_the_embedding_layer_and_the_output_layer(Net, millions):
    with torch.device("meta"):
        net = Net()
    frozen = {id(p) for p in net.frozen()}
    trained = sum(p.numel() for p in net.parameters() if id(p) not in frozen)
    assert abs(trained / 1e6 - millions) < 0.05


def test_attention_turns_both_queries_and_keys():
    q, k, v = (normal(seed, 1, 2, 5, 16) for seed in range(3))
    rope = rope_table(1, 2, 2, (4, 6, 6), torch.device("cpu"))
    assert close(attend(q, k, v, rope), attend(rotate(q, rope), rotate(k, rope), v))
    assert not close(attend(q, k, v, rope), attend(q, k, v))
