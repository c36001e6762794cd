"""Published weights: they load completely, into the right places, or are refused with a sentence.

The files themselves are not needed: tests/common.py knows the names and shapes in each, and gives
them seeded numbers. That the lists of names are the published ones, their digests say.

    pytest tests/test_weights.py
"""

import json
import os
import sys
import types
import zlib

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import teachers
from machinery.errors import UserError
from networks import autoencoders, blocks, weights
from networks import text as text_net
from teachers import SPECS, load_teacher
from tests.common import (
    SIZES, SMALL, TINY, clip_file, close, empty, filled, fingerprint, generator_file,
    maskgen_file, maskgit_file, meissonic_file, mini_net, normal, open_clip_file, refusal,
    seeded, shapes_in, tiny_teacher, titok_file, tokenizer_file, vqgan_file, vqvae_file,
)


def published(name, extras={}):
    """The seeded published file of a small network, perhaps with more in it."""
    _, file, sizes = SMALL[name]
    return seeded(shapes_in(file, sizes) | extras)


def loaded(name, state):
    """The state dict of a small network after loading."""
    return weights.load_state(empty(name), state, name).state_dict()


def shapes_of(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def assert_same(state, expected):
    """Every tensor of `expected` is in `state`, to the last bit."""
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def assert_same_weights(module, other):
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


# ----------------------------------------------------------------- the published files are complete
def open_clip_h_file():
    return open_clip_file(1024, 24, 1024)


@pytest.mark.parametrize("teacher, role, file, count, digest, parameters", [
    ("maskbit", "net", generator_file, 301,
     "1eeed3f0dcfef5574a3a85d21d46677c225546c88f96f55821276d353b8c2d48", 304_929_024),
    ("maskbit", "tokenizer", tokenizer_file, 177,
     "e4f39a5bb2de414bf1017f5331331a8906af42181e96e5c0446e153f18f57dc1", 54_489_489),
    ("maskgit", "net", maskgit_file, 305,
     "05951913674e114e9c3a7eed3a0034148e9855bbdb29455a39d1b463bdf98cce", 174_160_874),
    ("maskgit-512", "net", maskgit_file, 305,
     "75b5b86b31174ee4ee04ba387b62686a7dbeb951d21b76fcc350bf9cea489f04", 176_306_666),
    ("maskgit", "tokenizer", vqgan_file, 343,
     "daa361925932ed87b817215688950b279b7a18066684a6df4da5a26a61434258", 72_141_699),
    ("meissonic", "net", meissonic_file, 867,
     "9ec30148fd1d0824fa07ae1b3458e913f4e6871d9ba796bd50d37969f83065da", 1_006_946_304),
    ("meissonic", "tokenizer", vqvae_file, 277,
     "5d919826cdd3bff4b1cb8ab1d15b7af812af027b51a3f5a1a6363b5984e352c5", 146_244_675),
    ("meissonic", "text", clip_file, 389,
     "a89288e7a8db1ef0ab1516f4d95fdb7a5277ed8d75e43836e0ba19824022c68a", 354_032_640),
    ("meissonic", "text", open_clip_h_file, 294,
     "cc1dcd8205bd26c35514546a332054e7f38cba4b6f1e34d011e99c43e1b8272f", 354_032_640),
    ("maskgen", "net", maskgen_file, 450,
     "360e8da7bec94792a8f2b35fa6436bcfa4de3c4ad1aa39da4ed1c8955d4473c3", 604_311_552),
    ("maskgen-xl", "net", maskgen_file, 562,
     "346e220267b87e68d61c4468077479f6ee7ebaef09694681b37db6b993e26dd2", 1_176_611_840),
    ("maskgen", "tokenizer", titok_file, 462,
     "3740cb0deb2894bd433d1168e1f2920ae5580e970f5a3c9bd013dae59dc246c8", 391_046_292),
    ("maskgen", "text", open_clip_file, 150,
     "063377c770e7ff633838b906f2ff5b3838384ade1b302c2d93b9f4f57e271ec6", 123_650_304),
])
def test_published_sizes_have_exactly_the_published_tensors(teacher, role, file, count, digest, parameters):
    spec = SPECS[teacher]
    make, sizes = {
        "net": (spec.Net, spec.net),
        "tokenizer": (spec.Tokenizer, spec.tokenizer),
        "text": (text_net.TextTower, spec.text),
    }[role]
    shapes = shapes_in(file, sizes)
    assert len(shapes) == count
    assert fingerprint(shapes) == digest                              # the file's true list of keys
    with torch.device("meta"):
        module = make(**sizes)
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        state, complaints = weights.published_state(tensors, module)
    assert not complaints
    assert shapes_of(state) == shapes_of(module.state_dict())
    assert sum(p.numel() for p in module.parameters()) == parameters


def heads(module, *kinds):
    return {m.heads for m in module.modules() if isinstance(m, kinds)}


def test_head_counts_are_right_though_no_file_says_them():
    with torch.device("meta"):                  # other counts would load as well, and give nonsense
        net = {name: spec.Net(**spec.net) for name, spec in SPECS.items()}
        tokenizer = {name: spec.Tokenizer(**spec.tokenizer) for name, spec in SPECS.items()}
    assert heads(net["maskbit"], blocks.Attention) == {16}
    assert heads(net["maskgit"], blocks.Attention) == {16}
    assert heads(net["meissonic"], blocks.Stream, blocks.SingleBlock) == {8}
    assert heads(net["maskgen"], blocks.Stream) == {16}
    assert heads(net["maskgen-xl"], blocks.Stream) == {16}
    assert heads(tokenizer["maskgit"], blocks.Attention) == {1}
    assert heads(tokenizer["meissonic"], blocks.Attention) == set()
    assert heads(tokenizer["maskgen"].encoder, blocks.Attention) == {12}
    assert heads(tokenizer["maskgen"].decoder, blocks.Attention) == {16}


# --------------------------------------------------------------------- every tensor finds its place
def test_aliases_prefixes_wrappers_and_extras_load_to_the_same_weights():
    file = seeded(generator_file(**SIZES))
    plain = weights.load_state(mini_net(), file, "plain").state_dict()
    for ours, theirs in (("blocks.1.attn.qkv.weight", "transformer.layers.1.0.mha.in_proj_weight"),
                         ("blocks.0.mlp.2.bias", "transformer.layers.0.1.net.2.bias")):
        assert torch.equal(plain[ours], file[theirs])
    extra = {"bits_to_indices": torch.tensor([1, 2], dtype=torch.int32)}
    renamed = {k.replace("input_proj.", "token_emb."): v for k, v in file.items()}
    for variant in (
        plain,
        file | extra,
        {"state_dict": file | extra},
        {"model_state_dict": file, "step": 7},
        renamed,
        {f"module.{k}": v for k, v in (file | extra).items()},
        {f"_orig_mod.{k}": v for k, v in file.items()},
        {f"module._orig_mod.{k}": v for k, v in renamed.items()},
    ):
        assert_same(weights.load_state(mini_net(), variant, "variant").state_dict(), plain)


@pytest.mark.parametrize("name, theirs, ours", [
    ("MaskGit", "pos_emb", "pos_emb"), ("MaskGen", "embeddings.weight", "tok_emb.weight"),
    ("Meissonic", "mlm_layer.conv2.weight", "to_logits.weight")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_into_float32(name, theirs, ours, dtype):
    file = {k: v.to(dtype) for k, v in published(name).items()}
    state = loaded(name, file)
    assert {v.dtype for v in state.values()} == {torch.float32}
    assert torch.equal(state[ours].flatten(), file[theirs].float().flatten())


@pytest.mark.parametrize("name, part, packed", [
    ("Meissonic", "transformer_blocks.1.attn.to_{}.weight", "blocks.1.image.qkv.weight"),
    ("Meissonic", "transformer_blocks.0.attn.add_{}_proj.bias", "blocks.0.text.qkv.bias"),
    ("Meissonic", "single_transformer_blocks.2.attn.to_{}.weight", "single.2.qkv.weight"),
    ("MaskGen", "blocks.2.attn.add_{}_proj.weight", "blocks.2.text.qkv.weight"),
    ("VQGAN", "decoder.up.1.attn.2.{}.weight", "decoder.up.0.attn.2.attn.qkv.weight"),
    ("TextTower", "text_model.encoder.layers.1.self_attn.{}_proj.bias",
     "tower.transformer.resblocks.1.attn.in_proj_bias")])
def test_packed_rows_are_the_files_q_k_and_v_in_this_order(name, part, packed):
    file = published(name)
    reversed_file = dict(reversed(file.items()))
    rows = torch.cat([file[part.format(c)] for c in "qkv"])
    if rows.ndim == 4:                                                      # 1x1 convolutions
        rows = rows.flatten(1)
    assert torch.equal(loaded(name, reversed_file)[packed], rows)

    k = part.format("k")
    sentence = refusal(empty(name), {key: v for key, v in file.items() if key != k})
    assert f"part k of {packed} missing" in sentence and "unexpected" not in sentence
    wide = torch.stack([file[k]] * 2, -1)
    assert f"missing {packed}" in refusal(empty(name), file | {k: wide}), "they do not fit"


def test_last_text_stream_of_maskgen_has_no_way_out_and_its_scale_comes_first():
    file, h, s = published("MaskGen"), normal(0, 1, 5, 48), normal(1, 1, 48)
    assert not any("blocks.2.ff_context" in key for key in file)
    assert not any("blocks.2.attn.to_add_out" in key for key in file)

    def through(x, name):
        return F.linear(x, file[f"blocks.2.{name}.weight"], file[f"blocks.2.{name}.bias"])

    scale, shift = through(s, "norm1_context.linear").chunk(2, -1)
    q = through(F.layer_norm(h, (48,), eps=1e-6) * (1 + scale) + shift, "attn.add_q_proj")
    net = weights.load_state(empty("MaskGen"), file, "seeded")
    (entered, _, _), _ = net.blocks[2].text.enter(h, s)                     # (1, heads, 5, 12)
    assert close(entered.transpose(1, 2).flatten(2), q, atol=1e-5)


def test_a_tied_output_layer_may_be_in_the_file_twice_but_not_differ():
    file = published("MaskGen")
    plain, head = loaded("MaskGen", file), file["embeddings.weight"]
    alone = {k.replace("embeddings", "lm_head"): v for k, v in file.items()}
    for variant in (alone, file | {"lm_head.weight": head.clone()}, {"lm_head.weight": head} | file):
        assert_same(loaded("MaskGen", variant), plain)
    sentence = refusal(empty("MaskGen"), file | {"lm_head.weight": head + 1e-3})
    assert "two different tensors for tok_emb.weight, one of them lm_head.weight" in sentence


@pytest.mark.parametrize("name, extras", [
    ("VQGAN", {"loss.discriminator.main.0.weight": [4, 3, 4, 4],
               "loss.perceptual_loss.lin0.model.1.weight": [1, 4]}),
    ("TATiTok", {"quantize.embed_prob": [40]}),
    ("TextTower", {"logit_scale": [], "vision_model.encoder.layers.0.mlp.fc1.weight": [4, 4],
                   "visual_projection.weight": [48, 4], "text_model.embeddings.position_ids": [1, 9]})])
def test_what_else_a_published_file_holds_is_dropped(name, extras):
    plain = published(name)
    wrapped = {f"module.{k}": v for k, v in published(name, extras).items()}
    assert_same(loaded(name, {"state_dict": wrapped, "epoch": 3}), loaded(name, plain))
    assert "unexpected other.weight" in refusal(empty(name), plain | {"other.weight": torch.zeros(1)})


def test_a_text_tower_loads_from_either_librarys_file():
    file = published("TextTower")
    own = loaded("TextTower", file)
    assert torch.equal(own["tower.text_projection"], file["text_projection.weight"].T)
    other = {k.removeprefix("tower."): v for k, v in own.items()}           # open_clip's names
    assert other.keys() == open_clip_file(32, 2, 48, 64, 9).keys() - {"logit_scale"}
    visual = {"visual.conv1.weight": torch.zeros(3), "logit_scale": torch.zeros(())}
    assert_same(loaded("TextTower", other | visual), own)


@pytest.mark.parametrize("name, role", [(name, role) for name in TINY for role in SPECS[name].roles])
def test_a_networks_own_names_load_unchanged(name, role):
    module = teachers.build(SPECS[name], role, random_weights=True)
    state = {k: v + 1 if v.is_floating_point() else v for k, v in module.state_dict().items()}
    own = weights.load_state(module, state, "own").state_dict()
    assert_same(own, state)                                         # nothing stays by accident


@pytest.mark.parametrize("name, finest", [("VQGAN", "decoder.up.0.block.0.norm1.weight"),
                                          ("VQ-VAE", "decoder.up_blocks.1.resnets.0.norm1.weight")])
def test_decoder_levels_are_stored_from_the_finest_in_one_file_and_the_coarsest_in_the_other(name, finest):
    file = published(name)
    own = loaded(name, file)
    assert own["decoder.up.0.res_blocks.0.conv1.weight"].shape == (16, 16, 3, 3)    # the coarsest
    assert torch.equal(own["decoder.up.1.res_blocks.0.norm1.weight"], file[finest])


def test_attention_on_a_cpu_is_the_fused_kernel_of_a_gpu():
    torch.manual_seed(0)
    attn, h = blocks.Attention(32, 4), torch.randn(2, 9, 32)
    q, k, v = (t.view(2, 9, 4, 8).transpose(1, 2) for t in attn.qkv(h).chunk(3, -1))
    fused = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 32)
    assert close(attn(h), attn.out(fused))


# ------------------------------------------------------------------------------------ or is refused
def test_a_file_that_does_not_fit_is_refused_by_name():
    file = seeded(generator_file(**SIZES))
    file["class.weight"] = file.pop("class_emb.weight")
    file["pos_emb"] = file["pos_emb"][:, :3]
    sentence = refusal(mini_net(), file, "some.bin")
    for words in ("some.bin does not fit MaskBit", "missing class_emb.weight",
                  "unexpected class.weight", "of another shape pos_emb (1, 3, 8) instead of (1, 5, 8)"):
        assert words in sentence
    many = {f"x{i}": torch.zeros(1) for i in range(13)}
    assert "and 9 more" in refusal(mini_net(), many | mini_net().state_dict())
    assert "expected a dict of tensors, got list" in refusal(mini_net(), [1, 2])
    settings = {"config": {"lr": 1e-4}, "name": "a run"}
    assert "unexpected config, name" in refusal(mini_net(), settings | mini_net().state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_every_file_but_the_right_one_is_refused_with_a_sentence(name):
    net, file = empty(name), published(name)
    for other in SMALL.keys() - {name}:
        sentence = refusal(net, published(other), f"{other}.bin")
        assert f"{other}.bin does not fit {type(net).__name__}: " in sentence
        assert "another teacher's file" in sentence
    for key in list(file)[::7]:
        renamed = {"else." + k if k == key else k: v for k, v in file.items()}
        sentence = refusal(net, renamed)
        assert "missing" in sentence and "unexpected else." in sentence
        assert "of another shape" in refusal(net, {**file, key: torch.cat([file[key]] * 2)})
    assert weights.load_state(net, file, "right.bin") is net


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": [1]}])
def test_a_file_that_is_no_dict_is_refused_with_a_sentence(tmp_path, content):
    torch.save(content, tmp_path / "list.bin")
    with pytest.raises(UserError, match="expected a dict of tensors, got list"):
        teachers.load_student(str(tmp_path / "list.bin"), "maskbit-tiny")


# -------------------------------------------------------------------------- files are read, not run
@pytest.mark.parametrize("role, name", weights.HUB_FOLDERS.items())
def test_a_hubs_folder_is_read_with_the_file_in_it_or_in_its_subfolder(tmp_path, role, name):
    for folder in weights.HUB_FOLDERS.values():
        (tmp_path / folder).mkdir()
        if folder != name:
            save_file({"w": torch.zeros(2)}, tmp_path / folder / "model.safetensors")
    with pytest.raises(UserError, match=f"no weights in the folder .*, nor in its {name}/: exp"):
        weights.read_weights(str(tmp_path), role)
    save_file({"w": torch.ones(2)}, tmp_path / name / "diffusion_pytorch_model.safetensors")
    for folder in (tmp_path, tmp_path / name):
        assert weights.read_weights(str(folder), role)["w"].tolist() == [1, 1]
    torch.save({"w": 2 * torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert weights.read_weights(str(tmp_path), role)["w"].tolist() == [2, 2]  # the nearer one first


@pytest.mark.parametrize("name, save", [("a.bin", torch.save), ("a.safetensors", save_file)])
def test_unreadable_files_are_refused_with_a_sentence(tmp_path, name, save):
    file = seeded(generator_file(**SIZES))
    save(file, tmp_path / name)
    assert_same(weights.read_weights(str(tmp_path / name)), file)
    whole = (tmp_path / name).read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 50):
        (tmp_path / f"cut_{name}").write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"cannot read .*cut_{name}"):
            weights.read_weights(str(tmp_path / f"cut_{name}"))
    with pytest.raises(UserError, match="no weights at .*nowhere.bin"):
        weights.read_weights(str(tmp_path / "nowhere.bin"))


class Payload:
    """What an attacker would put into a pickle: a call."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def test_code_in_a_pickle_is_not_run(tmp_path):
    for name, payload in (("evil", Payload(os.mkdir, str(tmp_path / "ran"))),
                          ("os", Payload(os.path.normpath, str(tmp_path))),
                          ("odd", Payload(zlib.crc32, b"a"))):
        torch.save({"pos_emb": torch.zeros(2), "x": payload}, tmp_path / f"{name}.bin")
    with pytest.raises(UserError, match="cannot read .*evil.bin .*mkdir"):
        weights.read_weights(str(tmp_path / "evil.bin"))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="posixpath|ntpath"):
        weights.read_weights(str(tmp_path / "os.bin"))
    state = weights.read_weights(str(tmp_path / "odd.bin"))                 # not called, replaced
    assert state["pos_emb"].tolist() == [0, 0]


def test_a_pickle_that_mentions_unknown_classes_gives_its_tensors_and_runs_nothing(tmp_path, monkeypatch):
    class Callback:
        def __init__(self):
            self.best, self.seen = 0.5, [1, 2]

    Callback.__module__, Callback.__qualname__ = "old_trainer", "Callback"
    w, path = normal(0, 3, 4), str(tmp_path / "last.ckpt")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "old_trainer", types.SimpleNamespace(Callback=Callback))
        torch.save({"state_dict": {"w": w}, "callbacks": {Callback: Callback(), "n": 1}}, path)
    with pytest.raises(Exception, match="old_trainer"):
        torch.load(path, weights_only=True)
    assert torch.equal(weights.read_weights(path)["state_dict"]["w"], w)


# -------------------------------------------------------------------------------- files are fetched
def test_a_shipped_file_that_is_missing_is_a_sentence():
    words = "assets/none.bin does not ship .*--teacher_weights PATH, or add --random_weights"
    with pytest.raises(UserError, match=words):
        weights.fetch(None, "assets/none.bin", "--teacher_weights")
    shipped = weights.fetch(None, "assets/fashion/teacher.safetensors", "--teacher_weights")
    assert os.path.isfile(shipped)


@pytest.mark.parametrize("role, flag", [
    ("net", "--teacher_weights"), ("tokenizer", "--tokenizer_weights")])
def test_without_network_the_message_names_repository_file_and_flag(monkeypatch, role, flag):
    def no_network(repo, name, **_):
        raise ConnectionError("no route to host")

    hub = types.SimpleNamespace(hf_hub_download=no_network)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    files = SPECS["maskbit"].files
    assert files["tokenizer"] == ("markweber/maskbit_tokenizer_14bit", "maskbit_tokenizer_14bit.bin")
    repo, name = files[role]
    with pytest.raises(UserError) as err:
        weights.fetch(repo, name, flag)
    for word in (repo, name, flag, "ConnectionError", "--random_weights"):
        assert word in str(err.value)


# ---------------------------------------------------------------------------- teachers and students
def test_a_teacher_is_frozen_and_with_random_weights_needs_no_file():
    teacher = load_teacher("maskbit-tiny", random_weights=True)
    for module in (teacher.net, teacher.tokenizer):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
    with pytest.raises(UserError, match="unknown teacher 'maskgoat': expected one of maskbit,"):
        load_teacher("maskgoat")


@pytest.mark.parametrize("name", TINY)
def test_random_weights_are_always_the_same_and_leave_the_random_stream_alone(name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = load_teacher(name, random_weights=True)
    assert torch.equal(torch.rand(3), expected)
    assert_same_weights(again.net, tiny_teacher(name).net)
    assert_same_weights(again.tokenizer, tiny_teacher(name).tokenizer)


def test_teacher_files_given_by_path_are_the_ones_loaded(tmp_path):
    spec = SPECS["maskbit-tiny"]
    net_path, tokenizer_path = f"{tmp_path}/net.bin", f"{tmp_path}/tokenizer.bin"
    net, tokenizer = teachers.MaskBit(**spec.net), autoencoders.BitTokenizer(**spec.tokenizer)
    torch.save(net.state_dict(), net_path)
    torch.save(tokenizer.state_dict(), tokenizer_path)
    teacher = load_teacher("maskbit-tiny", net_path, tokenizer_path)
    assert_same_weights(teacher.net, net)
    assert_same_weights(teacher.tokenizer, tokenizer)
    with pytest.raises(UserError, match="net.bin does not fit BitTokenizer"):
        load_teacher("maskbit-tiny", net_path, net_path)


def test_a_config_beside_the_weights_knows_the_head_count(tmp_path):
    spec, config = SPECS["maskgen-tiny"], tmp_path / "config.json"
    net = teachers.build(spec, "net", random_weights=True)
    save_file(net.state_dict(), tmp_path / "model.safetensors")

    def built(path=tmp_path):
        return teachers.build(spec, "net", str(path))

    assert heads(built(), blocks.Stream) == {4}                             # the spec's
    stated = {"decoder_num_heads": 2, "sample_aesthetic_score": 5.0, "weight_init": [1]}
    config.write_text(json.dumps({"model": {"maskgen": stated}, "seed": 1}))
    assert heads(built(), blocks.Stream) == {2}
    assert heads(built(tmp_path / "model.safetensors"), blocks.Stream) == {2}
    assert built().score == 5.0
    config.write_text("{ cut short")
    with pytest.raises(UserError, match="cannot read .*config.json beside the weights"):
        built()


@pytest.mark.parametrize("name, file", [
    ("maskgit-tiny", maskgit_file), ("meissonic-tiny", meissonic_file)])
def test_a_bare_student_in_the_published_names_is_loaded_beside_its_teacher(tmp_path, name, file):
    sizes = SPECS[name].net
    torch.save(seeded(shapes_in(file, sizes)), tmp_path / "theta.bin")
    teacher, net, config = teachers.load_student(f"{tmp_path}/theta.bin", name, random_weights=True)
    expected = filled(SPECS[name].Net, file, **sizes).state_dict()
    state = net.state_dict()
    assert_same(expected, state)
    assert config == {}
    assert_same_weights(teacher.net, tiny_teacher(name).net)
    if teacher.text is not None:                                   # guidance needs the empty prompt
        assert torch.equal(net.null_text, teacher.net.null_text)
        assert not net.training


def test_a_student_checkpoint_brings_its_teacher_and_its_ema_weights(tmp_path):
    student, ema = (teachers.MaskBit(**SPECS["maskbit-tiny"].net).state_dict() for _ in range(2))
    config = {"teacher": "maskbit-tiny", "random_weights": True}
    torch.save({"config": config, "student": student, "ema": ema}, tmp_path / "ckpt.pt")
    teacher, net, stored = teachers.load_student(f"{tmp_path}/ckpt.pt")
    assert stored == config
    assert teacher.spec.name == "maskbit-tiny"
    assert not net.training
    assert_same(ema, net.state_dict())
    torch.save(ema, tmp_path / "bare.bin")
    with pytest.raises(UserError, match="bare.bin is a bare state dict.*--teacher NAME"):
        teachers.load_student(f"{tmp_path}/bare.bin")
