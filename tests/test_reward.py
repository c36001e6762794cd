"""reward.py: the four judges give the published numbers, from the published files, or say why not.

That Eq. 9's gradient is right is proved in test_all.py.

    pytest tests/test_reward.py
"""

import argparse
import json
import math
import pathlib
import sys
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import reward
from machinery import files as machinery_files
from machinery.errors import UserError
from networks import blip, weights
from networks import clip as clip_net
from teachers import SPECS
from tests.common import (ASKED, BLIP, BLIP_IDS, CLIP, CLIP_IDS, agrees, clip_reward_file, close,
                          eq9_inputs, fingerprint, ids_of, imagereward_file, new_reward, normal,
                          pickscore_file, refusal, reward_file, rewards_of, seeded, small_reward,
                          uniform)

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "reward.json").read_text())


# ----------------------------------------------------------------------- what each judge says
@pytest.mark.parametrize("name", GOLDEN["towers"])
def test_towers_of_clip_give_the_golden_features_from_either_librarys_file(name):
    model, x = small_reward(name), normal(100, 2, 3, 56, 56)
    image_features, text_features = model.image_features(x), model.text_features(CLIP_IDS)
    text = model.clip.encode_text(CLIP_IDS)           # after text_features, which sets its mask
    agrees(model.clip.encode_image(x), **GOLDEN["towers"][name]["image"])
    agrees(text, **GOLDEN["towers"][name]["text"])
    assert close(image_features.norm(dim=-1), torch.ones(2))
    assert close(text_features, F.normalize(text, dim=-1))


@pytest.mark.parametrize("name", GOLDEN["scores"])
def test_scores_of_the_clips_are_the_golden_ones_of_the_pairs(name):
    model, x = small_reward(name), normal(100, 2, 3, 56, 56)
    expected = GOLDEN["scores"][name]
    pairs, crossed = ([expected["scale"] * cosine for cosine in expected[key]]
                      for key in ("pairs", "crossed"))
    agrees(model(x, CLIP_IDS), pairs, tol=1e-6)       # image i with prompt i, and no other pair
    agrees(model(x, CLIP_IDS.flip(0)), crossed, tol=1e-6)
    agrees(model(x[1:], CLIP_IDS[1:]), pairs[1:], tol=1e-6)


def test_imagereward_gives_the_golden_states_and_rewards():
    model, x = small_reward("imagereward"), normal(200, 2, 3, 56, 56)
    expected = GOLDEN["imagereward"]
    image = model.see(x)
    text = model.read(BLIP_IDS, image)
    agrees(image, **expected["image"])
    agrees(text, **expected["text"])
    agrees(model.head(text[:, 0]), expected["raw"])
    agrees(model(x, BLIP_IDS), expected["reward"])


def test_padding_is_not_read():
    model, x = small_reward("imagereward"), normal(200, 2, 3, 56, 56)
    scores = model(x, BLIP_IDS)
    assert close(scores, model(x, F.pad(BLIP_IDS, (0, 9))))
    assert close(model(x[1:], BLIP_IDS[1:, :4]), scores[1:])
    unpadded = torch.where(BLIP_IDS == 0, 9, BLIP_IDS)
    difference = (model(x, unpadded) - scores).abs()
    assert difference.min() > 0.01, "other words in the place of padding do matter"


# --------------------------------------------------------------------------- the mix of rewards
def test_renos_total_and_its_gradient_at_the_pixels_are_the_golden_ones():
    expected = GOLDEN["reno"]
    img = uniform(400, 1, 3, 80, 72).float().requires_grad_()
    pixels = clip_net.preprocess(img, 56)
    scores = {name: small_reward(name)(pixels, ids_of(name)[:1]) for name in reward.RENO}
    for name, loss in expected["losses"].items():
        assert abs(reward.OFFSETS[name] - scores[name].item() - loss) < 1e-5
    total = reward.reno_loss(scores)
    assert abs(total.item() - expected["total"]) < 1e-5
    assert close(total, 5 + 2 + 1 + 1.5 - reward.weighted(scores, reward.RENO))

    (g,) = torch.autograd.grad(total.sum(), img)
    assert (g[:, :, :2] == 0).all(), "what is cropped away has no gradient"
    assert abs(g.abs().sum() / expected["gradient"]["abs_sum"] - 1) < 1e-5
    assert abs(g.mean() - expected["gradient"]["mean"]) < 1e-8
    assert abs(g.std(correction=0) - expected["gradient"]["std"]) < 1e-7


def test_the_scale_of_the_clip_score_is_an_option():
    img = uniform(8, 2, 3, 56, 56).float()
    scaled = rewards_of("clip", "pickscore", clip_scaled=True)
    plain = rewards_of("clip", "pickscore", clip_scaled=False)
    a, b = scaled(img, ASKED[:2]), plain(img, ASKED[:2])
    scale = scaled.models["clip"].clip.logit_scale.exp()
    assert abs(scale - 1 / 0.07) < 1e-4
    assert close(a["clip"], scale * b["clip"]) and torch.equal(a["pickscore"], b["pickscore"])


def test_a_mix_is_read_from_a_flag_or_refused_with_a_sentence():
    assert reward.mix("clip=0.2,imagereward=1") == {"clip": 0.2, "imagereward": 1.0}
    for text in ("clip", "clip=much", "clip=1,", "clip=1=2"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected NAME=W,NAME=W, as in clip="):
            reward.mix(text)
    with pytest.raises(UserError, match="unknown reward 'beauty': expected some"):
        reward.mix("clip=1,beauty=1")


def test_eq9_refuses_the_wrong_number_of_prompts_and_weights_without_a_reward():
    z, tokenizer, cond, prompts = eq9_inputs("maskbit-tiny")
    with pytest.raises(UserError, match="expected a list of 3 prompts"):
        reward.reward_grad(z, tokenizer, cond, rewards_of("hps"), prompts + ["more"], {"hps": 1.0})
    with pytest.raises(KeyError, match="imagereward"):
        reward.reward_grad(z, tokenizer, cond, rewards_of("hps"), prompts, reward.SEED)


# -------------------------------------------------------------------------------- preprocessing
def test_preprocessing_is_the_golden_one():
    expected = dict(GOLDEN["preprocessing"]["reno"])
    mean = expected.pop("mean")
    x = clip_net.preprocess(uniform(300, 2, 3, 80, 72).float(), 56)
    agrees(x, **expected)
    assert x.shape == (2, 3, 56, 56) and abs(x.mean() - mean) < 1e-6


def test_hps_own_preprocessing_is_the_golden_one():
    expected = GOLDEN["preprocessing"]["hps before normalization"]
    img = uniform(300, 2, 3, 80, 72).float()[:1]
    black = clip_net.normalize(torch.zeros(1, 3, 56, 56))
    white = clip_net.normalize(torch.ones(1, 3, 56, 56))
    plain = (clip_net.preprocess_longest(img, 56) - black) / (white - black)
    agrees(plain, expected["first"], expected["abs_sum"], tol=1e-6)
    agrees(plain[0, 0, 28], expected["row_28"], tol=1e-6)
    bytes_first = (img * 255).byte().float() / 255
    x = clip_net.preprocess_longest(bytes_first, 56)
    agrees(x, **GOLDEN["preprocessing"]["hps from uint8"])


@pytest.mark.parametrize("H, W, h, w, top, left", [
    (64, 64, 56, 56, 0, 0),
    (80, 72, 62, 56, 3, 0),
    (72, 80, 56, 62, 0, 3),
    (63, 40, 88, 56, 16, 0),
    (41, 40, 57, 56, 0, 0),
    (40, 42, 56, 58, 0, 1),
    (56, 59, 56, 59, 0, 2),
    (30, 40, 56, 74, 0, 9),
    (56, 56, 56, 56, 0, 0),
    (56, 61, 56, 61, 0, 2),
    (56, 63, 56, 63, 0, 4),
])
def test_sizes_are_truncated_and_crops_start_at_the_rounded_half(H, W, h, w, top, left):
    img = uniform(1, 1, 3, H, W)
    big = F.interpolate(img, (h, w), mode="bicubic", antialias=True)
    crop = big[:, :, top : top + 56, left : left + 56]
    assert close(clip_net.preprocess(img, 56), clip_net.normalize(crop))


@pytest.mark.parametrize("H, W, h, w, top, left", [
    (80, 72, 56, 50, 0, 3),
    (40, 63, 36, 56, 10, 0),
    (56, 31, 56, 31, 0, 12),
    (80, 71, 56, 50, 0, 3),
    (64, 64, 56, 56, 0, 0),
    (20, 32, 35, 56, 10, 0),
])
def test_the_longer_side_may_be_fitted_instead_and_the_rest_is_black(H, W, h, w, top, left):
    img = uniform(2, 1, 3, H, W)
    page = torch.zeros(1, 3, 56, 56).double()
    page[:, :, top : top + h, left : left + w] = F.interpolate(
        img, (h, w), mode="bicubic", antialias=True
    )
    assert close(clip_net.preprocess_longest(img, 56), clip_net.normalize(page))


def test_gray_images_count_as_three_equal_channels_and_half_precision_is_resized_in_float32():
    img = uniform(3, 2, 1, 32, 28).float()
    gray, color = clip_net.preprocess(img, 56), clip_net.preprocess(img.expand(-1, 3, -1, -1), 56)
    assert torch.equal(gray, color)
    half = clip_net.preprocess(img.bfloat16(), 56)
    assert half.dtype == torch.float32
    assert torch.equal(half, clip_net.preprocess(img.bfloat16().float(), 56))


# ------------------------------------------------------------------------------ published files
FILES = {"clip": clip_reward_file, "hps": clip_reward_file, "pickscore": pickscore_file,
         "imagereward": imagereward_file}
POSITIONS = {"text_model.embeddings.position_ids": [1, 77],
             "vision_model.embeddings.position_ids": [1, 257]}


def shapes_of(tensors):
    return {name: t.shape for name, t in tensors.items()}


@pytest.mark.parametrize("name", reward.REWARDS)
def test_published_rewards_have_exactly_the_published_tensors(name):
    expected, shapes = GOLDEN["published files"][name], FILES[name]()
    if name == "pickscore":
        shapes |= POSITIONS
    assert len(shapes) == expected["tensors"] and fingerprint(shapes) == expected["sha256"]
    with torch.device("meta"):
        model = blip.ImageReward() if name == "imagereward" else clip_net.ClipReward(kind=name)
        file = {key: torch.empty(shape) for key, shape in shapes.items()}
        state, complaints = weights.published_state(file, model)
    assert not complaints and shapes_of(state) == shapes_of(model.state_dict())
    count = sum(p.numel() for p in model.parameters())
    for key, shape in shapes.items():
        if key.startswith(("blip.vision_proj", "blip.text_proj")):
            count += math.prod(shape)                 # in the file, and not used
    assert count == expected["parameters"]


def test_no_file_says_the_numbers_of_heads():
    with torch.device("meta"):
        clip, judge = clip_net.ClipReward().clip, blip.ImageReward()
    blocks = *clip.visual.transformer.resblocks, *clip.transformer.resblocks
    assert {block.attn.num_heads for block in blocks} == {16}
    assert {block.attn.heads for block in judge.blocks} == {16}
    assert {part.heads for block in judge.layers for part in (block.attn, block.cross)} == {12}


def test_no_file_says_which_gelu_nor_which_epsilon():
    with torch.device("meta"):
        clip, judge = clip_net.ClipReward().clip, blip.ImageReward()

    def epsilons(model):
        return {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}

    activations = [m for model in (clip, judge) for m in model.modules()
                   if "GELU" in type(m).__name__]
    assert {type(m) for m in activations} == {nn.GELU}
    assert {m.approximate for m in activations} == {"none"}
    assert epsilons(clip) == {1e-5}
    assert epsilons(judge.blocks) == {judge.norm.eps} == {1e-6}
    assert epsilons(judge.layers) == {1e-12}


def test_packed_rows_of_a_tower_are_the_files_q_k_and_v_and_projections_are_turned():
    file, state = seeded(reward_file("pickscore")), small_reward("pickscore").state_dict()
    layer = "encoder.layers.2.self_attn"
    for side, block in (("text_model", "clip.transformer.resblocks.2.attn"),
                        ("vision_model", "clip.visual.transformer.resblocks.2.attn")):
        for end in ("weight", "bias"):
            rows = torch.cat([file[f"{side}.{layer}.{part}_proj.{end}"] for part in "qkv"])
            assert torch.equal(state[f"{block}.in_proj_{end}"], rows)
    assert torch.equal(state["clip.visual.proj"], file["visual_projection.weight"].T)
    assert torch.equal(state["clip.text_projection"], file["text_projection.weight"].T)


@pytest.mark.parametrize("name", reward.REWARDS)
def test_rewards_load_from_half_precision_wrapped_and_own_files_with_what_else_they_hold(
        name, tmp_path):
    expected, file = small_reward(name).state_dict(), seeded(reward_file(name))
    ids = {}
    if name == "imagereward":
        ids = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    elif name == "pickscore":
        ids = {"text_model.embeddings.position_ids": torch.arange(16)[None],
               "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    half = {"state_dict": {key: t.half() for key, t in file.items()}}
    path = str(tmp_path / "file.pt")
    for variant in (file | ids, expected, {"state_dict": file, "epoch": 3}, half):
        torch.save(variant, path)
        state = weights.load_state(new_reward(name), weights.read_weights(path), path).state_dict()
        for key, t in expected.items():
            t = t.half().float() if variant is half else t
            assert state[key].dtype == torch.float32 and torch.equal(state[key], t)


@pytest.mark.parametrize("name", reward.REWARDS)
def test_every_file_but_the_right_one_is_refused_by_a_reward(name):
    file, model = seeded(reward_file(name)), small_reward(name)
    less = {key: t for key, t in file.items() if "fc" not in key and "dense" not in key}
    assert "missing" in refusal(model, less)
    assert "unexpected" in refusal(model, file | {"visual.extra": torch.zeros(1)})
    norms = ("ln_1.bias", "layer_norm1.bias", "norm1.bias")
    key = next(key for key in file if key.endswith(norms))
    assert "of another shape" in refusal(model, file | {key: torch.zeros(7)})
    other = "clip" if name == "imagereward" else "imagereward"
    message = refusal(model, seeded(reward_file(other)), "wrong.pt")
    assert message.startswith(f"wrong.pt does not fit {type(model).__name__}")
    assert len(message) < 900


# -------------------------------------------------------------------------------------- loading
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def test_load_rewards_reads_the_given_files_and_freezes(tmp_path, monkeypatch):
    monkeypatch.setattr(machinery_files, "ROOT", str(tmp_path))
    for name in reward.RENO:
        torch.save(seeded(reward_file(name)), tmp_path / f"{name}.pt")
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join([*PIECES, *(f"w{i}" for i in range(64))]) + "\n")
    paths = {name: str(tmp_path / f"{name}.pt") for name in reward.RENO}
    paths["clip"] = "clip.pt"                         # relative to the repository
    configs = {name: BLIP if name == "imagereward" else CLIP for name in reward.RENO}
    rewards = reward.load_rewards(list(reward.RENO), paths, vocab=str(vocab), configs=configs)

    img, prompts = uniform(7, 2, 3, 80, 72).float(), ["w3 w60", "w1"]
    scores, pixels = rewards(img, prompts), clip_net.preprocess(img, 56)
    for name, model in rewards.models.items():
        assert close(scores[name], small_reward(name)(pixels, model.tokenize(prompts)))
        assert scores[name].shape == (2,) and scores[name].dtype == torch.float32
    assert not rewards.training and not any(p.requires_grad for p in rewards.parameters())
    ids = rewards.models["imagereward"].tokenize(prompts)
    assert ids[:, :5].tolist() == [[2, 7, 64, 3, 0], [2, 5, 3, 0, 0]]


def test_a_vocabulary_that_the_user_names_is_taken_also_where_a_tiny_world_has_its_own(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("\n".join([*PIECES, "a"]) + "\n")
    with pytest.raises(UserError, match="words.txt has 5 pieces, expected 31"):
        reward.rewards_for(SPECS["meissonic-tiny"], {"imagereward": 1.0}, vocab=str(words))


def test_a_tiny_worlds_own_rewards_are_loaded_unless_a_path_is_given_and_are_never_random():
    spec = SPECS["meissonic-tiny"]
    rewards = reward.rewards_for(spec, {"clip": 1.0}, {"clip": None}, random_weights=True)
    file = weights.read_weights(machinery_files.local(spec.rewards["clip"][0]))
    own = rewards.models["clip"].clip.state_dict()
    assert torch.equal(own["visual.conv1.weight"], file["visual.conv1.weight"].float())
    with pytest.raises(UserError, match="no weights at /nowhere/x.pt"):
        reward.rewards_for(spec, {"clip": 1.0}, {"clip": "/nowhere/x.pt"})


def test_a_file_that_is_named_is_read_also_among_random_rewards():
    with pytest.raises(UserError, match="no weights at /nowhere/x.pt"):
        reward.load_rewards(["clip"], {"clip": "/nowhere/x.pt"}, random_weights=True,
                            configs={"clip": CLIP})


def test_random_rewards_are_always_the_same_and_leave_the_random_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = rewards_of("clip", "imagereward")
    assert torch.equal(torch.rand(3), expected)
    b = rewards_of("clip", "imagereward")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("change, words", [
    (dict(names=["clop"]), "unknown reward 'clop': expected some of clip, hps, pickscore, image"),
    (dict(paths={"clip": "/nowhere/x.pt"}), "no weights at /nowhere/x.pt"),
    (dict(names=["imagereward"], vocab="/nowhere/v.txt"),
     "cannot read /nowhere/v.txt as a vocabulary"),
])
def test_rewards_that_cannot_be_loaded_are_refused_with_a_sentence(change, words):
    with pytest.raises(UserError, match=words):
        reward.load_rewards(**{"names": ["clip"], "configs": {"clip": CLIP}, **change})


@pytest.mark.parametrize("text, words", [
    (b"a\nb", "is not BERT's vocabulary"),
    (b"[CLS]\n[PAD]\n[UNK]\n[SEP]", "expected .PAD. first"),
    (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na", "has 5 pieces, expected 68"),
    (b"\xff\xfe\xfa", "UnicodeDecodeError"),
])
def test_vocabularies_that_do_not_fit_are_refused_with_a_sentence(tmp_path, text, words):
    path = tmp_path / "vocab.txt"
    path.write_bytes(text)
    with pytest.raises(UserError, match=words):
        reward.load_rewards(["imagereward"], vocab=str(path), random_weights=True,
                            configs={"imagereward": BLIP})


@pytest.mark.parametrize("name", reward.REWARDS)
def test_without_network_the_file_its_repository_and_the_flag_are_named(name, monkeypatch):
    def no_network(repo, name, **_):
        raise ConnectionError("no route to host")

    hub = types.SimpleNamespace(hf_hub_download=no_network)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    repo, file = reward.REWARDS[name]
    flag, configs = f"--{name}_weights", {name: CLIP}
    if name == "imagereward":                         # the vocabulary comes first
        (repo, file), flag, configs = reward.VOCAB, "--bert_vocab", {}
    with pytest.raises(UserError) as err:
        reward.load_rewards([name], configs=configs)
    for words in (repo, file, flag, "ConnectionError"):
        assert words in str(err.value)


def test_a_missing_open_clip_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip.model", None)
    with pytest.raises(UserError, match="pip install open_clip_torch"):
        clip_net.ClipReward(CLIP)


# ------------------------------------------------------------------------------------ precision
@pytest.mark.parametrize("name", reward.REWARDS)
def test_bf16_rewards_are_close_and_keep_their_norms_in_float32(name):
    torch.manual_seed(0)
    full, half = rewards_of(name), rewards_of(name, dtype=torch.bfloat16)
    img = uniform(9, 4, 3, 60, 60).float().requires_grad_()
    a, b = full(img, ASKED[:4])[name], half(img, ASKED[:4])[name]
    (g,), (h,) = (torch.autograd.grad(scores.sum(), img) for scores in (a, b))
    scale = 1 / 0.07 if name in ("clip", "pickscore") else 1.0
    assert b.dtype == torch.float32 and (a - b).abs().max() < 0.01 * scale
    assert F.cosine_similarity(g.flatten(), h.flatten(), dim=0) > 0.99

    def dtypes(*kinds):
        return {p.dtype for m in half.modules() if isinstance(m, kinds) for p in m.parameters()}

    def nbytes(rewards):
        return sum(p.nbytes for key, p in rewards.named_parameters() if "head" not in key)

    assert dtypes(nn.LayerNorm) == {torch.float32}
    assert dtypes(nn.Conv2d, nn.MultiheadAttention) == {torch.bfloat16}
    assert nbytes(half) < 0.56 * nbytes(full)


def test_rewards_run_in_their_own_precision_whatever_the_callers():
    rewards, img = rewards_of("clip", "imagereward"), uniform(10, 2, 3, 56, 56).float()
    plain = rewards(img, ASKED[:2])
    with torch.autocast("cpu", torch.bfloat16):
        inside = rewards(img, ASKED[:2])
    assert all(torch.equal(plain[name], inside[name]) for name in plain)


# ---------------------------------------------------------------------------- images and prompts
TWO, ONE = torch.rand(2, 3, 8, 8), torch.rand(1, 3, 8, 8)


@pytest.mark.parametrize("img, prompts, words", [
    (TWO, "a cat", "expected a list of 2 prompts, one string per image, got a str of 5"),
    (TWO, "ab", "got a str of 2"),
    (TWO, ["a cat"], "got a list of 1"),
    (ONE, ("a", "b"), "got a tuple of 2"),
    (TWO, ["a", None], "expected a list of 2"),
    (torch.rand(1, 4, 8, 8), ["a"], r"got \(1, 4, 8, 8\)"),
    (torch.rand(3, 8, 8), ["a"], r"got \(3, 8, 8\)"),
    ((ONE * 255).byte(), ["a"], "torch.uint8"),
    (ONE * 255, ["a"], r"pixels in \[0, 1\], got"),
    (ONE * 2 - 1, ["a"], r"pixels in"),
])
def test_what_cannot_be_scored_is_refused_with_a_sentence(img, prompts, words):
    with pytest.raises(UserError, match=words):
        rewards_of("clip")(img, prompts)


def test_odd_prompts_are_scored_and_no_sequence_is_too_long():
    odd = ["", " \n\t ", "x" * 10_000, "word " * 2_000, "\U0001F600\U0001F1FA\U0001F1F8\u200d",
           "!?.,;:-()[]{}'\"", "\u5c71 \u0301 caf\u00e9"]
    rewards = rewards_of("clip", "imagereward")
    for scores in rewards(torch.rand(len(odd), 3, 8, 8), odd).values():
        assert torch.isfinite(scores).all() and scores.shape == (len(odd),)
    start, end = 62, 63
    ids = rewards.models["clip"].tokenize(odd)
    assert ids.shape == (len(odd), 16)
    assert (ids[:, 0] == start).all() and ((ids == end).sum(1) == 1).all()
    assert ids[0].tolist() == ids[1].tolist() == [start, end] + [0] * 14 and ids[2, -1] == end
    ids = rewards.models["imagereward"].tokenize(odd)
    assert ids.shape == (len(odd), 35) and ids[0, :3].tolist() == [2, 3, 0] and ids[3, -1] == 3


@pytest.mark.parametrize("known", GOLDEN["tokens"], ids=lambda known: known["prompt"][:9])
def test_prompts_become_the_golden_tokens_of_every_reward(known, tmp_path):
    lines = [f"[unused{i}]" for i in range(30522)]
    for piece, i in GOLDEN["bert-base-uncased"].items():
        lines[i] = piece
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n")
    ids = blip.WordPiece(str(tmp_path / "vocab.txt"))(known["prompt"])
    assert ids == known["bert"] + [0] * (35 - len(known["bert"]))

    text = dict(CLIP["text_cfg"], context_length=77, vocab_size=49408)
    clip = clip_net.ClipReward(dict(CLIP, text_cfg=text))
    ids = clip.tokenize([known["prompt"]])[0].tolist()
    assert ids == known["clip"] + [0] * (77 - len(known["clip"]))


WORDPIECE = [*PIECES, *"un ##aff ##able ##a ##b a aa aff \u5c71 ! ' \u03c3 i ##i $ e".split()]


@pytest.mark.parametrize("text, pieces", [
    ("unaffable", "un ##aff ##able"),
    ("aaa", "aa ##a"),
    ("unaffx un", "[UNK] un"),
    ("a" * 101, "[UNK]"),
    ("a" * 100, "aa" + " ##a" * 32),                  # cut to 35 with start and end
    ("UN\u0301AFFABLE!a\u5c71a", "un ##aff ##able ! a \u5c71 a"),
    ("a\x00\u200da\tun\u00a0un\ufffd", "aa un un"),   # controls go, any space separates
    ("\u0130", "i"),                                  # a dotted capital I
    ("$e\u0301'", "$ e '"),
])
def test_wordpiece_takes_the_longest_piece_and_gives_up_whole_words(text, pieces, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDPIECE))
    ids = blip.WordPiece(str(tmp_path / "vocab.txt"))(text)
    said = [WORDPIECE[i] for i in ids]
    assert [piece for piece in said if piece not in ("[PAD]", "[CLS]", "[SEP]")] == pieces.split()


def test_wordpiece_pads_and_cuts_between_start_and_end(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDPIECE))
    bert = blip.WordPiece(str(tmp_path / "vocab.txt"))
    assert bert("", 4) == [2, 3, 0, 0] and bert("un un un un", 4) == [2, 4, 4, 3]
