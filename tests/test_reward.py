"""reward: tests."""

import math
import sys
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import reward
from machinery import files as machinery_files
from networks import blip, weights
from networks import clip as clip_net
from machinery.errors import UserError
from teachers import SPECS
from tests.common import seeded, agrees, close, uniform, normal, fingerprint, refusal, clip_reward_file, pickscore_file, imagereward_file, CLIP, BLIP, CLIP_IDS, BLIP_IDS, reward_file, new_reward, small_reward, ids_of, rewards_of, ASKED, eq9_inputs


@pytest.mark.parametrize("name, image, image_sum, text, text_sum", [
    ("clip", [-0.21972844, -0.89318186, -1.3126886, -0.3063544, -1.1361356, -0.71204489], 52.8878,
     [1.953198, 2.3370972, -0.82737952, -0.48016497, 0.43021369, 1.5099404], 65.974692),
    ("pickscore", [-0.65420979, 1.1045085, -0.65057993, -2.8145766, -0.88793361, 0.27163789], 55.672854,
     [-0.10486971, -1.9256587, 0.42523232, -1.2880697, -0.99182034, -1.3936963], 60.077098)])
def test_towers_of_clip_give_the_golden_features_from_either_librarys_file(name, image, image_sum, text, text_sum):
    model, x = small_reward(name), normal(100, 2, 3, 56, 56)
    f, g = model.image_features(x), model.text_features(CLIP_IDS)
    agrees(model.clip.encode_image(x), image, image_sum)
    agrees(model.clip.encode_text(CLIP_IDS), text, text_sum)
    assert close(f.norm(dim=-1), torch.ones(2)) and close(g, F.normalize(model.clip.encode_text(CLIP_IDS), dim=-1))


@pytest.mark.parametrize("name, first, second, crossed", [
    ("hps", 0.033681177, -0.13000922, (-0.16778989, 0.038214296)),
    ("clip", 0.033681177 * 1.0999289, -0.13000922 * 1.0999289, (-0.16778989 * 1.0999289, 0.038214296 * 1.0999289)),
    ("pickscore", 0.037653606, 0.23647058, (0.27435723, -0.0013552046))])
def test_scores_of_the_clips_are_the_golden_ones_of_the_pairs(name, first, second, crossed):
    model, x = small_reward(name), normal(100, 2, 3, 56, 56)
    agrees(model(x, CLIP_IDS), [first, second], tol=1e-6)               # image i with prompt i, and no other pair
    agrees(model(x, CLIP_IDS.flip(0)), crossed, tol=1e-6)
    agrees(model(x[1:], CLIP_IDS[1:]), [second], tol=1e-6)


def test_imagereward_gives_the_golden_states_and_rewards():
    model, x = small_reward("imagereward"), normal(200, 2, 3, 56, 56)
    image = model.see(x)
    agrees(image, [-0.5971055, 0.20513274, 1.7414109, -0.45013115, -0.10107156, 1.2976359], 1316.3491)
    text = model.read(BLIP_IDS, image)
    agrees(text, [1.1846226, 0.66946173, -1.9006683, 0.63922787, -0.28535184, -1.1390226], 623.1195)
    agrees(model.head(text[:, 0]), [-2.0334203, -1.6663176])
    agrees(model(x, BLIP_IDS), [-2.1295943, -1.7743357])


def test_padding_is_not_read():
    model, x = small_reward("imagereward"), normal(200, 2, 3, 56, 56)
    assert close(model(x, BLIP_IDS), model(x, F.pad(BLIP_IDS, (0, 9))))
    assert close(model(x[1:], BLIP_IDS[1:, :4]), model(x, BLIP_IDS)[1:])
    unpadded = torch.where(BLIP_IDS == 0, 9, BLIP_IDS)                  # other words in its place do matter
    assert (model(x, unpadded) - model(x, BLIP_IDS)).abs().min() > 0.01


def test_renos_total_and_its_gradient_at_the_pixels_are_the_golden_ones():
    img = uniform(400, 1, 3, 80, 72).float().requires_grad_()
    pixels = clip_net.preprocess(img, 56)
    scores = {name: small_reward(name)(pixels, ids_of(name)[:1]) for name in reward.RENO}
    for name, loss in {"hps": 0.95804465, "clip": 99.95385, "pickscore": 29.914022, "imagereward": 4.3909478}.items():
        assert abs(reward.REWARDS[name].offset - scores[name].item() - loss) < 1e-5
    total = reward.reno_loss(scores)
    g = torch.autograd.grad(total.sum(), img)[0]
    assert abs(total.item() - 11.676411) < 1e-5
    assert (g[:, :, :2] == 0).all() and abs(g.abs().sum() / 228.1995 - 1) < 1e-5
    assert abs(g.mean() + 0.00045628383) < 1e-8 and abs(g.std(correction=0) - 0.017959689) < 1e-7
    assert close(reward.reno_loss(scores), 5 + 2 + 1 + 1.5 - reward.weighted(scores, reward.RENO))


# ==================================================================================== reward.py: preprocessing
def test_preprocessing_is_the_golden_one():
    img = uniform(300, 2, 3, 80, 72).float()
    x = clip_net.preprocess(img, 56)
    agrees(x, [0.44861475, -1.2568077, -0.99515504, -0.45824152, 1.1641777, 1.4389834], 11104.956)
    assert x.shape == (2, 3, 56, 56) and abs(x.mean() - 0.19588417) < 1e-6
    y = clip_net.preprocess_longest(img[:1], 56)                          # HPSv2's own: before normalization
    black = clip_net.normalize(torch.zeros(1, 3, 56, 56))
    plain = (y - black) / (clip_net.normalize(torch.ones(1, 3, 56, 56)) - black)
    agrees(plain, [0.0, 0.0, 0.0, 0.4495967, 0.29344335, 0.38462675, 0.51855481], tol=1e-6)
    assert abs(plain.abs().sum() / 4215.5192 - 1) < 1e-6
    agrees(plain[0, 0, 28], [0.0, 0.0, 0.0, 0.26428786, 0.34196347, 0.43008566], tol=1e-6)
    agrees(clip_net.preprocess_longest((img[:1] * 255).byte().float() / 255, 56),
           [-1.7922626, -1.7922626, -1.7922626, -0.12263338, -0.70447391, -0.3652218], 6131.3823)


@pytest.mark.parametrize("H, W, h, w, top, left", [
    (64, 64, 56, 56, 0, 0), (80, 72, 62, 56, 3, 0), (72, 80, 56, 62, 0, 3), (63, 40, 88, 56, 16, 0),
    (41, 40, 57, 56, 0, 0), (40, 42, 56, 58, 0, 1), (56, 59, 56, 59, 0, 2), (30, 40, 56, 74, 0, 9),
    (56, 56, 56, 56, 0, 0), (56, 61, 56, 61, 0, 2), (56, 63, 56, 63, 0, 4)])
def test_sizes_are_truncated_and_crops_start_at_the_rounded_half(H, W, h, w, top, left):
    img = uniform(1, 1, 3, H, W)
    big = F.interpolate(img, (h, w), mode="bicubic", antialias=True)
    assert close(clip_net.preprocess(img, 56), clip_net.normalize(big[:, :, top : top + 56, left : left + 56]))


@pytest.mark.parametrize("H, W, h, w, top, left", [
    (80, 72, 56, 50, 0, 3), (40, 63, 36, 56, 10, 0), (56, 31, 56, 31, 0, 12), (80, 71, 56, 50, 0, 3),
    (64, 64, 56, 56, 0, 0), (20, 32, 35, 56, 10, 0)])
def test_the_longer_side_may_be_fitted_instead_and_the_rest_is_black(H, W, h, w, top, left):
    img = uniform(2, 1, 3, H, W)
    black = torch.zeros(1, 3, 56, 56).double()
    black[:, :, top : top + h, left : left + w] = F.interpolate(img, (h, w), mode="bicubic", antialias=True)
    assert close(clip_net.preprocess_longest(img, 56), clip_net.normalize(black))


def test_grey_images_count_as_three_equal_channels_and_half_precision_is_resized_in_float32():
    img = uniform(3, 2, 1, 32, 28).float()
    assert torch.equal(clip_net.preprocess(img, 56), clip_net.preprocess(img.expand(-1, 3, -1, -1), 56))
    half = clip_net.preprocess(img.bfloat16(), 56)
    assert half.dtype == torch.float32 and torch.equal(half, clip_net.preprocess(img.bfloat16().float(), 56))


# ======================================================================================== reward.py: loading
@pytest.mark.parametrize("name, file, count, digest, parameters", [
    ("clip", clip_reward_file, 686, "2d21a943bdca7a5569e9ad67870e7f0e5fc6deb5d023c6c177a279cc47148c4e", 986_109_441),
    ("hps", clip_reward_file, 686, "2d21a943bdca7a5569e9ad67870e7f0e5fc6deb5d023c6c177a279cc47148c4e", 986_109_441),
    ("pickscore", pickscore_file, 912, "3e7dfbae763da2a86242ae85086d490c3eded4729854ab00fe76ba105f7c615a", 986_109_441),
    ("imagereward", imagereward_file, 625, "b483298b77da9ee322e5b54d925cbce2019d169d5b4c4b48789138fa629baa7c",
     446_665_953)])
def test_published_rewards_have_exactly_the_published_tensors(name, file, count, digest, parameters):
    shapes = file()
    if name == "pickscore":
        shapes |= {"text_model.embeddings.position_ids": [1, 77], "vision_model.embeddings.position_ids": [1, 257]}
    assert len(shapes) == count and fingerprint(shapes) == digest       # the files' true key list
    with torch.device("meta"):
        model = blip.ImageReward() if name == "imagereward" else clip_net.ClipReward(kind=name)
        state, complaints = weights.published_state({k: torch.empty(s) for k, s in shapes.items()}, model)
    shape = lambda tensors: {k: v.shape for k, v in tensors.items()}
    assert not complaints and shape(state) == shape(model.state_dict())
    unused = sum(math.prod(s) for k, s in shapes.items() if k.startswith(("blip.vision_proj", "blip.text_proj")))
    assert sum(p.numel() for p in model.parameters()) + unused == parameters


def test_no_file_says_the_numbers_of_heads():
    with torch.device("meta"):
        clip, judge = clip_net.ClipReward().clip, blip.ImageReward()
    assert {b.attn.num_heads for b in (*clip.visual.transformer.resblocks, *clip.transformer.resblocks)} == {16}
    assert {b.attn.heads for b in judge.blocks} == {16}
    assert {r.heads for b in judge.layers for r in (b.attn, b.cross)} == {12}
    activations = {type(m) for model in (clip, judge) for m in model.modules() if "GELU" in type(m).__name__}
    assert activations == {nn.GELU} and {m.approximate for m in clip.modules() if isinstance(m, nn.GELU)} == {"none"}
    eps = lambda model: {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}
    assert eps(clip) == {1e-5} and eps(judge.blocks) == {judge.norm.eps} == {1e-6} and eps(judge.layers) == {1e-12}


def test_packed_rows_of_a_tower_are_the_files_q_k_and_v_and_projections_are_turned():
    file, state = seeded(reward_file("pickscore")), small_reward("pickscore").state_dict()
    name = "encoder.layers.2.self_attn"
    for side, block in (("text_model", "clip.transformer.resblocks.2.attn"),
                        ("vision_model", "clip.visual.transformer.resblocks.2.attn")):
        for end in ("weight", "bias"):
            rows = torch.cat([file[f"{side}.{name}.{part}_proj.{end}"] for part in "qkv"])
            assert torch.equal(state[f"{block}.in_proj_{end}"], rows)
    assert torch.equal(state["clip.visual.proj"], file["visual_projection.weight"].T)
    assert torch.equal(state["clip.text_projection"], file["text_projection.weight"].T)


@pytest.mark.parametrize("name", reward.REWARDS)
def test_rewards_load_from_half_precision_wrapped_and_own_files_with_what_else_they_hold(name, tmp_path):
    expected, file = small_reward(name).state_dict(), seeded(reward_file(name))
    ids = {"imagereward": {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]},
           "pickscore": {"text_model.embeddings.position_ids": torch.arange(16)[None],
                         "vision_model.embeddings.position_ids": torch.arange(17)[None]}}.get(name, {})
    half = {k: v.half() for k, v in file.items()}
    for i, variant in enumerate((file | ids, expected, {"state_dict": file, "epoch": 3}, {"state_dict": half})):
        torch.save(variant, tmp_path / f"{i}.pt")
        model = weights.load_state(new_reward(name), weights.read_weights(str(tmp_path / f"{i}.pt")), "variant")
        for k, v in model.state_dict().items():
            assert v.dtype == torch.float32 and torch.equal(v, expected[k].half().float() if i == 3 else expected[k])


@pytest.mark.parametrize("name", reward.REWARDS)
def test_every_file_but_the_right_one_is_refused_by_a_reward(name):
    file, model = seeded(reward_file(name)), small_reward(name)
    assert "missing" in refusal(model, {k: v for k, v in file.items() if "fc" not in k and "dense" not in k})
    assert "unexpected" in refusal(model, file | {"visual.extra": torch.zeros(1)})
    key = next(k for k, v in file.items() if k.endswith(("ln_1.bias", "layer_norm1.bias", "norm1.bias")))
    assert "of another shape" in refusal(model, file | {key: torch.zeros(7)})
    other = "clip" if name == "imagereward" else "imagereward"
    message = refusal(model, seeded(reward_file(other)), "wrong.pt")
    assert message.startswith(f"wrong.pt does not fit {type(model).__name__}") and len(message) < 900


def test_a_vocabulary_that_the_user_names_is_taken_also_where_a_tiny_world_has_its_own(tmp_path):
    (tmp_path / "words.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    with pytest.raises(UserError, match="words.txt has 5 pieces, expected 31"):
        reward.rewards_for(SPECS["meissonic-tiny"], {"imagereward": 1.0}, vocab=str(tmp_path / "words.txt"))


def test_load_rewards_reads_the_given_files_and_freezes(tmp_path, monkeypatch):
    monkeypatch.setattr(machinery_files, "ROOT", str(tmp_path))                # relative paths may be the repository's
    for name in reward.RENO:
        torch.save(seeded(reward_file(name)), tmp_path / f"{name}.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(64))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    paths = {name: str(tmp_path / f"{name}.pt") for name in reward.RENO} | {"clip": "clip.pt"}
    configs = {name: BLIP if name == "imagereward" else CLIP for name in reward.RENO}
    rewards = reward.load_rewards(list(reward.RENO), paths, vocab=str(tmp_path / "vocab.txt"), configs=configs)
    img, prompts = uniform(7, 2, 3, 80, 72).float(), ["w3 w60", "w1"]
    scores = rewards(img, prompts)
    pixels = clip_net.preprocess(img, 56)
    for name, model in rewards.models.items():
        assert close(scores[name], small_reward(name)(pixels, model.tokenize(prompts)))
        assert scores[name].shape == (2,) and scores[name].dtype == torch.float32
    assert not rewards.training and not any(p.requires_grad for p in rewards.parameters())
    assert rewards.models["imagereward"].tokenize(prompts)[:, :5].tolist() == [[2, 7, 64, 3, 0], [2, 5, 3, 0, 0]]


def test_the_scale_of_the_clip_score_is_an_option():
    img = uniform(8, 2, 3, 56, 56).float()
    (s, p), (cosine, q) = (rewards_of("clip", "pickscore", clip_scaled=on)(img, ASKED[:2]).values()
                           for on in (True, False))
    scale = rewards_of("clip").models["clip"].clip.logit_scale.exp()
    assert close(s, scale * cosine) and torch.equal(p, q) and abs(scale - 1 / 0.07) < 1e-4


def test_bf16_rewards_are_close_and_keep_their_norms_in_float32():
    torch.manual_seed(0)
    for name in reward.REWARDS:
        full, half = rewards_of(name), rewards_of(name, dtype=torch.bfloat16)
        img = uniform(9, 4, 3, 60, 60).float().requires_grad_()
        a, b = full(img, ASKED[:4])[name], half(img, ASKED[:4])[name]
        g, h = (torch.autograd.grad(s.sum(), img)[0] for s in (a, b))
        unit = 1 / 0.07 if name in ("clip", "pickscore") else 1.0
        assert b.dtype == torch.float32 and (a - b).abs().max() < 0.01 * unit
        assert F.cosine_similarity(g.flatten(), h.flatten(), dim=0) > 0.99
        kinds = lambda *types: {p.dtype for m in half.modules() if isinstance(m, types) for p in m.parameters()}
        assert kinds(nn.LayerNorm) == {torch.float32} and kinds(nn.Conv2d, nn.MultiheadAttention) == {torch.bfloat16}
        bits = [sum(p.nbytes for k, p in r.named_parameters() if "head" not in k) for r in (full, half)]
        assert bits[1] < 0.56 * bits[0]


def test_rewards_run_in_their_own_precision_whatever_the_callers():
    rewards, img = rewards_of("clip", "imagereward"), uniform(10, 2, 3, 56, 56).float()
    plain = rewards(img, ASKED[:2])
    with torch.autocast("cpu", torch.bfloat16):
        inside = rewards(img, ASKED[:2])
    assert all(torch.equal(plain[k], inside[k]) for k in plain)


def test_random_rewards_are_always_the_same_and_leave_the_random_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = rewards_of("clip", "imagereward")
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(v, w) for v, w in zip(a.parameters(), rewards_of("clip", "imagereward").parameters()))


@pytest.mark.parametrize("change, words", [
    (dict(names=["clop"]), "unknown reward 'clop': expected some of clip, hps, pickscore, imagereward"),
    (dict(paths={"hsp": "x"}), "unknown reward 'hsp'"), (dict(names=[]), "expected names of rewards"),
    (dict(dtype=torch.float16), "in float32 or bfloat16"),
    (dict(paths={"clip": "/nowhere/x.pt"}), "no weights at /nowhere/x.pt"),
    (dict(names=["imagereward"], vocab="/nowhere/v.txt"), "cannot read /nowhere/v.txt as a vocabulary")])
def test_rewards_that_cannot_be_loaded_are_refused_with_a_sentence(change, words):
    with pytest.raises(UserError, match=words):
        reward.load_rewards(**{"names": ["clip"], "configs": {"clip": CLIP}, **change})


def test_vocabularies_that_do_not_fit_are_refused_with_a_sentence(tmp_path):
    path = tmp_path / "vocab.txt"
    for text, words in (("a\nb", "is not BERT's vocabulary"), ("[CLS]\n[PAD]\n[UNK]\n[SEP]", "expected .PAD. first"),
                        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\na", "has 5 pieces, expected 68")):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            reward.load_rewards(["imagereward"], vocab=str(path), random_weights=True, configs={"imagereward": BLIP})
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="UnicodeDecodeError"):
        blip.WordPiece(str(path))


def test_missing_packages_and_missing_network_are_named(monkeypatch):
    def no_network(repo, name, **_):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=no_network))
    for name, (repo, file, _) in reward.REWARDS.items():
        with pytest.raises(UserError) as err:
            reward.load_rewards([name], vocab=None, configs={} if name == "imagereward" else {name: CLIP})
        repo, file = reward.VOCAB if name == "imagereward" else (repo, file)
        flag = "--bert_vocab" if name == "imagereward" else f"--{name}_weights"
        assert all(w in str(err.value) for w in (repo, file, flag, "ConnectionError"))
    monkeypatch.setitem(sys.modules, "open_clip.model", None)
    with pytest.raises(UserError, match="pip install open_clip_torch"):
        clip_net.ClipReward(CLIP)


# ======================================================================================== reward.py: prompts
@pytest.mark.parametrize("img, prompts, words", [
    (torch.rand(2, 3, 8, 8), "a cat", "expected a list of 2 prompts, one string an image, got str"),
    (torch.rand(2, 3, 8, 8), ["a cat"], "got 1"), (torch.rand(1, 3, 8, 8), ["a", "b"], "got 2"),
    (torch.rand(2, 3, 8, 8), ["a", None], "expected a list of 2"),
    (torch.rand(1, 4, 8, 8), ["a"], r"got \(1, 4, 8, 8\)"),
    (torch.rand(3, 8, 8), ["a"], r"got \(3, 8, 8\)"), ((torch.rand(1, 3, 8, 8) * 255).byte(), ["a"], "torch.uint8"),
    (torch.rand(1, 3, 8, 8) * 255, ["a"], r"pixels in \[0, 1\], got"),
    (torch.rand(1, 3, 8, 8) * 2 - 1, ["a"], r"pixels in")])
def test_what_cannot_be_scored_is_refused_with_a_sentence(img, prompts, words):
    with pytest.raises(UserError, match=words):
        rewards_of("clip")(img, prompts)


def test_eq9_refuses_the_wrong_number_of_prompts_and_weights_without_a_reward():
    z, tokenizer, cond, prompts = eq9_inputs("maskbit-tiny")
    with pytest.raises(UserError, match="expected a list of 3 prompts"):
        reward.reward_grad(z, tokenizer, cond, rewards_of("hps"), prompts + ["more"], {"hps": 1.0})
    with pytest.raises(UserError, match="no reward 'imagereward' among those loaded: hps"):
        reward.reward_grad(z, tokenizer, cond, rewards_of("hps"), prompts, reward.SEED)
ODD = ["", " \n\t ", "x" * 10_000, "word " * 2_000, "\U0001F600\U0001F1FA\U0001F1F8\u200d", "!?.,;:-()[]{}'\"",
       "\u5c71 \u0301 caf\u00e9"]


def test_odd_prompts_are_scored_and_no_sequence_is_too_long():
    rewards = rewards_of("clip", "imagereward")
    scores = rewards(torch.rand(len(ODD), 3, 8, 8), ODD)
    assert all(torch.isfinite(s).all() and s.shape == (len(ODD),) for s in scores.values())
    ids = rewards.models["clip"].tokenize(ODD)
    assert ids.shape == (len(ODD), 16) and ((ids == 63).sum(1) == 1).all() and (ids[:, 0] == 62).all()
    assert ids[0].tolist() == ids[1].tolist() == [62, 63] + [0] * 14 and ids[2, -1] == 63
    ids = rewards.models["imagereward"].tokenize(ODD)
    assert ids.shape == (len(ODD), 35) and ids[0, :3].tolist() == [2, 3, 0] and ids[3, -1] == 3


def test_prompts_become_the_golden_tokens_of_every_reward(tmp_path):
    clip = clip_net.ClipReward(dict(CLIP, text_cfg=dict(CLIP["text_cfg"], context_length=77, vocab_size=49408)))
    known = """
        101 [CLS] 102 [SEP] 0 [PAD] 100 [UNK] 1037 a 6302 photo 1997 of 6379 purple 4511 wine 3221 glass
        1998 and 2304 black 6207 apple 2417 red 3899 dog 1010 , 1016 2 8870 cats 1004 & 7668 cafe 1011 -
        2009 it 1005 ' 1055 s 24057 raining 999 ! 2019 an 5186 extremely 6851 detailed 4717 matt 2063 ##e
        4169 painting 3418 ancient 26433 overgrown 16941 cyber 14289 ##pu 8950 ##nk 5040 cathedral 2007 with
        16231 neon 9702 stained 3872 volume 12412 ##tric 2422 light 17796 intricate 9874 trend 2075 ##ing
        2006 on 2840 arts 12516 ##tation 1022 8 2243 ##k
    """.split()
    lines = [f"[unused{i}]" for i in range(30522)]
    for i, piece in zip(known[::2], known[1::2]):
        lines[int(i)] = piece
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n")
    bert = blip.WordPiece(str(tmp_path / "vocab.txt"))
    for prompt, bert_ids, clip_ids in (
        ("a photo of a purple wine glass and a black apple",
         [101, 1037, 6302, 1997, 1037, 6379, 4511, 3221, 1998, 1037, 2304, 6207, 102],
         [49406, 320, 1125, 539, 320, 5496, 2604, 3313, 537, 320, 1449, 3055, 49407]),
        ("A red dog, 2 cats & a caf\u00e9 -- it's RAINING!",
         [101, 1037, 2417, 3899, 1010, 1016, 8870, 1004, 1037, 7668, 1011, 1011, 2009, 1005, 1055, 24057, 999, 102],
         [49406, 320, 736, 1929, 267, 273, 3989, 261, 320, 15304, 2432, 585, 568, 13964, 256, 49407]),
        ("An extremely detailed matte painting of an ancient overgrown cyberpunk cathedral with neon stained glass, "
         "volumetric light, intricate, trending on artstation, 8k, by greg rutkowski and alphonse mucha, in the style "
         "of studio ghibli",
         [101, 2019, 5186, 6851, 4717, 2063, 4169, 1997, 2019, 3418, 26433, 16941, 14289, 8950, 5040, 2007, 16231,
          9702, 3221, 1010, 3872, 12412, 2422, 1010, 17796, 1010, 9874, 2075, 2006, 2840, 12516, 1010,
          1022, 2243, 102],
         [49406, 550, 6519, 12609, 19771, 3086, 539, 550, 5810, 1658, 7120, 36896, 7865, 593, 13919, 13751, 3313,
          267, 3563, 19950, 1395, 267, 29616, 267, 6087, 525, 1486, 2631, 267, 279, 330, 267, 638, 7943,
          14973, 17649, 537, 37865, 611, 42191, 267, 530, 518, 1844, 539, 3155, 40555, 49407])):
        assert bert(prompt) == bert_ids + [0] * (35 - len(bert_ids))
        assert clip.tokenize([prompt])[0].tolist() == clip_ids + [0] * (77 - len(clip_ids))


def test_wordpiece_takes_the_longest_piece_and_gives_up_whole_words(tmp_path):
    pieces = "[PAD] [UNK] [CLS] [SEP] un ##aff ##able ##a ##b a aa aff \u5c71 ! ' \u03c3 i ##i $ e".split()
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    bert = blip.WordPiece(str(tmp_path / "vocab.txt"))
    said = lambda text: [pieces[i] for i in bert(text) if i > 3 or i == 1]
    assert said("unaffable") == ["un", "##aff", "##able"] and said("aaa") == ["aa", "##a"]
    assert said("unaffx un") == ["[UNK]", "un"] and said("a" * 101) == ["[UNK]"]
    assert said("a" * 100) == ["aa"] + ["##a"] * 32                 # cut to 35 with start and end
    assert said("UN\u0301AFFABLE!a\u5c71a") == ["un", "##aff", "##able", "!", "a", "\u5c71", "a"]
    assert said("a\x00\u200da\tun\u00a0un\ufffd") == ["aa", "un", "un"]      # controls go, any space separates
    assert said("\u0130") == ["i"] and said("$e\u0301'") == ["$", "e", "'"]      # \u0130 is a dotted capital I
    assert bert("", 4) == [2, 3, 0, 0] and bert("un un un un", 4) == [2, 4, 4, 3]
