"""weights: tests."""

import json
import os
import sys
import types
import zlib

import pytest
import torch
import torch.nn.functional as F

import teachers
from machinery import errors
from networks import autoencoders, blocks, weights
from networks import text as text_net
from machinery.errors import UserError
from teachers import SPECS, load_teacher
from tests.common import seeded, close, normal, generator_file, tokenizer_file, maskgit_file, vqgan_file, vqvae_file, meissonic_file, maskgen_file, titok_file, clip_file, open_clip_file, shapes_in, filled, SIZES, mini_net, TINY, tiny_teacher, fingerprint, refusal, SMALL, empty


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
    ("meissonic", "text", lambda: open_clip_file(1024, 24, 1024), 294,
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
    make, sizes = {"net": (spec.Net, spec.net), "tokenizer": (spec.Tokenizer, spec.tokenizer),
                   "text": (text_net.TextTower, spec.text)}[role]
    shapes = shapes_in(file, sizes)
    assert len(shapes) == count and fingerprint(shapes) == digest                   # the files' true key list
    with torch.device("meta"):
        module = make(**sizes)
        state, complaints = weights.published_state({k: torch.empty(s) for k, s in shapes.items()}, module)
    shape = lambda tensors: {k: v.shape for k, v in tensors.items()}
    assert not complaints and shape(state) == shape(module.state_dict())
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_head_counts_are_right_though_no_file_says_them():
    heads = lambda module, *kinds: {m.heads for m in module.modules() if isinstance(m, kinds)}
    with torch.device("meta"):                                                      # others load as well: nonsense
        net = {k: spec.Net(**spec.net) for k, spec in SPECS.items()}
        tok = {k: spec.Tokenizer(**spec.tokenizer) for k, spec in SPECS.items()}
    Attention, Stream = blocks.Attention, blocks.Stream
    assert heads(net["maskbit"], Attention) == heads(net["maskgit"], Attention) == {16}
    assert heads(net["meissonic"], Stream, blocks.SingleBlock) == {8}
    assert heads(net["maskgen"], Stream) == heads(net["maskgen-xl"], Stream) == {16}
    assert heads(tok["maskgit"], Attention) == {1} and not heads(tok["meissonic"], Attention)
    assert heads(tok["maskgen"].encoder, Attention) == {12} and heads(tok["maskgen"].decoder, Attention) == {16}


def test_aliases_prefixes_wrappers_and_extras_load_to_the_same_weights():
    file = seeded(generator_file(**SIZES))
    file["bits_to_indices"] = torch.tensor([1, 2], dtype=torch.int32)
    without_extra = {k: v for k, v in file.items() if k != "bits_to_indices"}
    plain = weights.load_state(mini_net(), file, "plain").state_dict()
    assert torch.equal(plain["blocks.1.attn.qkv.weight"], file["transformer.layers.1.0.mha.in_proj_weight"])
    assert torch.equal(plain["blocks.0.mlp.2.bias"], file["transformer.layers.0.1.net.2.bias"])
    for variant in (without_extra, plain, {"state_dict": file}, {"model_state_dict": file, "step": 7},
                    {k.replace("input_proj.", "token_emb."): v for k, v in file.items()},
                    {f"module.{k}": v for k, v in file.items()}, {f"_orig_mod.{k}": v for k, v in file.items()},
                    {f"module._orig_mod.{k.replace('input_proj.', 'token_emb.')}": v for k, v in file.items()}):
        state = weights.load_state(mini_net(), variant, "variant").state_dict()
        assert all(torch.equal(state[k], v) for k, v in plain.items())


def test_half_precision_files_load_into_float32():
    for name, theirs, ours in [("MaskGit", "pos_emb", "pos_emb"), ("MaskGen", "embeddings.weight", "tok_emb.weight"),
                               ("Meissonic", "mlm_layer.conv2.weight", "to_logits.weight")]:
        for dtype in (torch.float16, torch.bfloat16):
            file = {k: v.to(dtype) for k, v in published(name).items()}
            state = weights.load_state(empty(name), file, "half").state_dict()
            assert all(v.dtype == torch.float32 for v in state.values())
            assert torch.equal(state[ours].flatten(), file[theirs].float().flatten())


def test_a_file_that_does_not_fit_is_refused_by_name():
    file = seeded(generator_file(**SIZES))
    file["class.weight"] = file.pop("class_emb.weight")
    file["pos_emb"] = file["pos_emb"][:, :3]
    net = mini_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(errors.UserError) as err:
        weights.load_state(net, file, "some.bin")
    for words in ("some.bin does not fit MaskBit", "missing class_emb.weight", "unexpected class.weight",
                  "pos_emb (1, 3, 8) instead of (1, 5, 8)"):
        assert words in str(err.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "nothing is half loaded"
    with pytest.raises(errors.UserError, match="and 9 more"):
        weights.load_state(net, {f"x{i}": torch.zeros(1) for i in range(13)} | net.state_dict(), "long.bin")
    with pytest.raises(errors.UserError, match="expected a dict of tensors, got list"):
        weights.load_state(net, [1, 2], "list.bin")


def published(name, extras={}):
    """Its seeded published file, perhaps with more in it."""
    _, file, sizes = SMALL[name]
    return seeded(shapes_in(file, sizes) | extras)


@pytest.mark.parametrize("name", SMALL)
def test_every_file_but_the_right_one_is_refused_with_a_sentence(name):
    net, file = empty(name), published(name)
    for other in SMALL.keys() - {name}:
        sentence = refusal(net, published(other), f"{other}.bin")
        assert f"{other}.bin does not fit {type(net).__name__}: " in sentence and "another teacher's file" in sentence
    for key in list(file)[::7]:                                                     # one under another name
        sentence = refusal(net, {"else." + k if k == key else k: v for k, v in file.items()})
        assert "missing" in sentence and "unexpected else." in sentence
        assert "of another shape" in refusal(net, {**file, key: torch.cat([file[key]] * 2)})
    assert weights.load_state(net, file, "right.bin") is net


@pytest.mark.parametrize("name, part, packed", [
    ("Meissonic", "transformer_blocks.1.attn.to_{}.weight", "blocks.1.image.qkv.weight"),
    ("Meissonic", "transformer_blocks.0.attn.add_{}_proj.bias", "blocks.0.text.qkv.bias"),
    ("Meissonic", "single_transformer_blocks.2.attn.to_{}.weight", "single.2.qkv.weight"),
    ("MaskGen", "blocks.2.attn.add_{}_proj.weight", "blocks.2.text.qkv.weight"),
    ("VQGAN", "decoder.up.1.attn.2.{}.weight", "decoder.up.0.attn.2.attn.qkv.weight"),
    ("TextTower", "text_model.encoder.layers.1.self_attn.{}_proj.bias",
     "tower.transformer.resblocks.1.attn.in_proj_bias")])
def test_packed_rows_are_the_files_q_k_and_v_in_this_order(name, part, packed):
    net, file = empty(name), published(name)
    own = weights.load_state(net, dict(reversed(file.items())), "reversed").state_dict()
    rows = torch.cat([file[part.format(c)] for c in "qkv"])
    assert torch.equal(own[packed], rows.flatten(1) if rows.ndim == 4 else rows)
    sentence = refusal(net, {k: v for k, v in file.items() if k != part.format("k")})
    assert f"part k of {packed} missing" in sentence and "unexpected" not in sentence


def test_last_text_stream_of_maskgen_has_no_way_out_and_its_scale_comes_first():
    net, file, h, s = empty("MaskGen"), published("MaskGen"), normal(0, 1, 5, 48), normal(1, 1, 48)
    assert not any("blocks.2.ff_context" in k or "blocks.2.attn.to_add_out" in k for k in file)
    through = lambda x, name: F.linear(x, file[f"blocks.2.{name}.weight"], file[f"blocks.2.{name}.bias"])
    scale, shift = through(s, "norm1_context.linear").chunk(2, -1)
    q = through(F.layer_norm(h, (48,), eps=1e-6) * (1 + scale) + shift, "attn.add_q_proj")
    entered = weights.load_state(net, file, "seeded").blocks[2].text.enter(h, s)[0][0]         # (1, heads, 5, 12)
    assert close(entered.transpose(1, 2).flatten(2), q, atol=1e-5)


def test_a_tied_output_layer_may_be_in_the_file_twice_but_not_differ():
    file = published("MaskGen")
    plain, head = weights.load_state(empty("MaskGen"), file, "plain").state_dict(), file["embeddings.weight"]
    alone = {k.replace("embeddings", "lm_head"): v for k, v in file.items()}
    for variant in (alone, file | {"lm_head.weight": head.clone()}, {"lm_head.weight": head} | file):
        state = weights.load_state(empty("MaskGen"), variant, "tied").state_dict()
        assert all(torch.equal(state[k], v) for k, v in plain.items())
    sentence = refusal(empty("MaskGen"), file | {"lm_head.weight": head + 1e-3})
    assert "two different tensors for tok_emb.weight, one of them lm_head.weight" in sentence


@pytest.mark.parametrize("name, extras", [
    ("VQGAN", {"loss.discriminator.main.0.weight": [4, 3, 4, 4], "loss.perceptual_loss.lin0.model.1.weight": [1, 4]}),
    ("TATiTok", {"quantize.embed_prob": [40]}),
    ("TextTower", {"logit_scale": [], "vision_model.encoder.layers.0.mlp.fc1.weight": [4, 4],
                   "visual_projection.weight": [48, 4], "text_model.embeddings.position_ids": [1, 9]})])
def test_what_else_a_published_file_holds_is_dropped(name, extras):
    plain, wrapped = published(name), {f"module.{k}": v for k, v in published(name, extras).items()}
    own = weights.load_state(empty(name), plain, "plain").state_dict()
    state = weights.load_state(empty(name), {"state_dict": wrapped, "epoch": 3}, "extras").state_dict()
    assert all(torch.equal(state[k], v) for k, v in own.items())
    assert "unexpected other.weight" in refusal(empty(name), plain | {"other.weight": torch.zeros(1)})


def test_a_text_tower_loads_from_either_librarys_file():
    file = published("TextTower")
    own = weights.load_state(empty("TextTower"), file, "transformers").state_dict()
    assert torch.equal(own["tower.text_projection"], file["text_projection.weight"].T)  # (32, 48) from (48, 32)
    other = {k.removeprefix("tower."): v for k, v in own.items()}                   # open_clip's names
    assert other.keys() == open_clip_file(32, 2, 48, 64, 9).keys() - {"logit_scale"}
    visual = {"visual.conv1.weight": torch.zeros(3), "logit_scale": torch.zeros(())}
    state = weights.load_state(empty("TextTower"), other | visual, "open_clip").state_dict()
    assert all(torch.equal(state[k], v) for k, v in own.items())


@pytest.mark.parametrize("name, role", [(n, r) for n in TINY for r in SPECS[n].roles])
def test_a_networks_own_names_load_unchanged(name, role):
    module = teachers.build(SPECS[name], role, random_weights=True)
    state = {k: v + 1 if v.is_floating_point() else v for k, v in module.state_dict().items()}
    loaded = weights.load_state(module, state, "own").state_dict()                 # nothing stays by accident
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


def test_decoder_levels_are_stored_from_the_finest_in_one_file_and_the_coarsest_in_the_other():
    for name, finest in (("VQGAN", "up.0.block.0.norm1"), ("VQ-VAE", "up_blocks.1.resnets.0.norm1")):
        file = published(name)
        own = weights.load_state(empty(name), file, name).state_dict()
        assert own["decoder.up.0.res_blocks.0.conv1.weight"].shape == (16, 16, 3, 3)  # the coarsest
        assert torch.equal(own["decoder.up.1.res_blocks.0.norm1.weight"], file[f"decoder.{finest}.weight"])


def test_a_hubs_folder_is_read_with_the_file_in_it_or_in_its_subfolder(tmp_path):
    from safetensors.torch import save_file

    for role, name in (("net", "transformer"), ("tokenizer", "vqvae"), ("text", "text_encoder")):
        (tmp_path / "hub" / name).mkdir(parents=True)
        save_file({"w": torch.ones(2)}, tmp_path / "hub" / name / "diffusion_pytorch_model.safetensors")
        (tmp_path / f"x{role}").mkdir()
        with pytest.raises(UserError, match=f"no weights in the folder .*x{role}, nor in its {name}/: expected"):
            weights.read_weights(str(tmp_path / f"x{role}"), role)
        for folder in ("hub", f"hub/{name}"):
            assert weights.read_weights(str(tmp_path / folder), role)["w"].tolist() == [1, 1]
    torch.save({"w": torch.zeros(2)}, tmp_path / "hub" / "pytorch_model.bin")
    assert weights.read_weights(str(tmp_path / "hub"), "text")["w"].tolist() == [0, 0]         # the nearer one first


def test_a_config_beside_the_weights_knows_the_head_count(tmp_path):
    from safetensors.torch import save_file

    spec = SPECS["maskgen-tiny"]
    save_file(teachers.build(spec, "net", random_weights=True).state_dict(), tmp_path / "model.safetensors")
    heads = lambda path: {b.image.heads for b in teachers.build(spec, "net", str(path)).blocks}
    assert heads(tmp_path) == {4}                                                   # the spec's
    stated = {"decoder_num_heads": 2, "sample_aesthetic_score": 5.0, "weight_init": [1]}
    (tmp_path / "config.json").write_text(json.dumps({"model": {"maskgen": stated}, "seed": 1}))
    assert heads(tmp_path) == heads(tmp_path / "model.safetensors") == {2}
    assert teachers.build(spec, "net", str(tmp_path)).score == 5.0
    (tmp_path / "config.json").write_text("{ cut short")
    with pytest.raises(UserError, match="cannot read .*config.json beside the weights"):
        teachers.build(spec, "net", str(tmp_path))


def test_unreadable_files_are_refused_with_a_sentence(tmp_path):
    from safetensors.torch import save_file

    file = seeded(generator_file(**SIZES))
    torch.save(file, tmp_path / "a.bin"), save_file(file, tmp_path / "a.safetensors")
    for name in ("a.bin", "a.safetensors"):
        whole = (tmp_path / name).read_bytes()
        state = weights.read_weights(str(tmp_path / name))
        assert all(torch.equal(state[k], v) for k, v in file.items())
        for size in (0, 100, len(whole) // 2, len(whole) - 50):
            (tmp_path / f"cut_{name}").write_bytes(whole[:size])
            with pytest.raises(errors.UserError, match=f"cannot read .*cut_{name}"):
                weights.read_weights(str(tmp_path / f"cut_{name}"))
    with pytest.raises(errors.UserError, match="no weights at .*nowhere.bin"):
        weights.read_weights(str(tmp_path / "nowhere.bin"))


class Payload:
    """What an attacker would put into a pickle: a call."""

    def __init__(self, f, path):
        self.call = f, (path,)

    def __reduce__(self):
        return self.call


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"pos_emb": torch.zeros(2), "x": Payload(os.mkdir, str(tmp_path / "ran"))}, tmp_path / "evil.bin")
    with pytest.raises(errors.UserError, match="cannot read .*evil.bin .*mkdir"):
        weights.read_weights(str(tmp_path / "evil.bin"))
    assert not (tmp_path / "ran").exists()
    torch.save({"pos_emb": torch.zeros(2), "x": Payload(os.path.normpath, str(tmp_path))}, tmp_path / "os.bin")
    torch.save({"pos_emb": torch.zeros(2), "x": Payload(zlib.crc32, b"a")}, tmp_path / "odd.bin")
    with pytest.raises(errors.UserError, match="posixpath|ntpath"):
        weights.read_weights(str(tmp_path / "os.bin"))
    assert weights.read_weights(str(tmp_path / "odd.bin"))["pos_emb"].tolist() == [0, 0]       # not called, replaced


def test_a_pickle_that_mentions_unknown_classes_gives_its_tensors_and_runs_nothing(tmp_path):
    trainer = types.ModuleType("old_trainer")
    exec("class Callback:\n    def __init__(self): self.best, self.seen = 0.5, [1, 2]", vars(trainer))
    trainer.Callback.__module__, sys.modules["old_trainer"] = "old_trainer", trainer
    w = normal(0, 3, 4)
    try:
        callbacks = {trainer.Callback: trainer.Callback(), "n": 1}
        torch.save({"state_dict": {"w": w}, "callbacks": callbacks}, tmp_path / "last.ckpt")
    finally:
        del sys.modules["old_trainer"]
    with pytest.raises(Exception, match="old_trainer"):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(weights.read_weights(str(tmp_path / "last.ckpt"))["state_dict"]["w"], w)


@pytest.mark.parametrize("name, file", [("maskgit-tiny", maskgit_file), ("meissonic-tiny", meissonic_file)])
def test_a_bare_student_in_the_published_names_is_loaded_beside_its_teacher(tmp_path, name, file):
    torch.save(seeded(shapes_in(file, SPECS[name].net)), tmp_path / "theta.bin")
    teacher, net, config = teachers.load_student(str(tmp_path / "theta.bin"), name, random_weights=True)
    expected = filled(SPECS[name].Net, file, **SPECS[name].net).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in net.state_dict().items()) and config == {}
    assert all(torch.equal(v, w) for v, w in zip(teacher.net.parameters(), tiny_teacher(name).net.parameters()))
    if teacher.text is not None:                                                    # guidance needs the empty prompt
        assert torch.equal(net.null_text, teacher.net.null_text) and not net.training


def test_a_shipped_file_that_is_missing_is_a_sentence():
    with pytest.raises(UserError, match="assets/none.bin does not ship .*--teacher_weights PATH, or add --random_weights"):
        weights.fetch(None, "assets/none.bin", "--teacher_weights")
    assert os.path.isfile(weights.fetch(None, "assets/fashion/teacher.safetensors", "--teacher_weights"))


def test_without_network_the_message_names_repository_file_and_flag(monkeypatch):
    def no_network(repo, name, **_):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=no_network))
    for role, flag in (("net", "--teacher_weights"), ("tokenizer", "--tokenizer_weights")):
        repo, name = teachers.SPECS["maskbit"].files[role]
        with pytest.raises(errors.UserError) as err:
            weights.fetch(repo, name, flag)
        assert all(word in str(err.value) for word in (repo, name, flag, "ConnectionError", "--random_weights"))
    assert repo == "markweber/maskbit_tokenizer_14bit" and name == "maskbit_tokenizer_14bit.bin"


def test_a_teacher_is_frozen_and_with_random_weights_needs_no_file():
    teacher = teachers.load_teacher("maskbit-tiny", random_weights=True)
    assert not any(p.requires_grad for m in teacher[:2] for p in m.parameters())
    assert not teacher.net.training and not teacher.tokenizer.training
    with pytest.raises(errors.UserError, match="unknown teacher 'maskgoat': expected one of maskbit,"):
        teachers.load_teacher("maskgoat")


@pytest.mark.parametrize("name", TINY)
def test_random_weights_are_always_the_same_and_leave_the_random_stream_alone(name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = load_teacher(name, random_weights=True)
    assert torch.equal(torch.rand(3), expected)
    for m, n in zip((a.net, a.tokenizer), tiny_teacher(name)[:2]):
        assert all(torch.equal(v, w) for v, w in zip(m.parameters(), n.parameters(), strict=True))


def test_attention_on_a_cpu_is_the_fused_kernel_of_a_gpu():
    torch.manual_seed(0)
    attn, h = blocks.Attention(32, 4), torch.randn(2, 9, 32)
    q, k, v = (t.view(2, 9, 4, 8).transpose(1, 2) for t in attn.qkv(h).chunk(3, -1))
    fused = attn.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 32))
    assert close(attn(h), fused)


def test_a_file_that_is_no_dict_is_refused_with_a_sentence(tmp_path):
    for content in ([1, 2], {"state_dict": [1]}):
        torch.save(content, tmp_path / "list.bin")
        with pytest.raises(UserError, match="expected a dict of tensors, got list"):
            teachers.load_student(str(tmp_path / "list.bin"), "maskbit-tiny")


def test_teacher_files_given_by_path_are_the_ones_loaded(tmp_path):
    spec, paths = teachers.SPECS["maskbit-tiny"], [str(tmp_path / f) for f in ("net.bin", "tokenizer.bin")]
    modules = teachers.MaskBit(**spec.net), autoencoders.BitTokenizer(**spec.tokenizer)
    for m, path in zip(modules, paths):
        torch.save(m.state_dict(), path)
    for m, n in zip(modules, teachers.load_teacher("maskbit-tiny", *paths)[:2]):
        assert all(torch.equal(v, w) for v, w in zip(m.parameters(), n.parameters(), strict=True))
    with pytest.raises(errors.UserError, match="net.bin does not fit BitTokenizer"):
        teachers.load_teacher("maskbit-tiny", paths[0], paths[0])


def test_a_student_checkpoint_brings_its_teacher_and_its_ema_weights(tmp_path):
    student, ema = (teachers.MaskBit(**teachers.SPECS["maskbit-tiny"].net).state_dict() for _ in range(2))
    config = {"teacher": "maskbit-tiny", "random_weights": True}
    torch.save({"config": config, "student": student, "ema": ema}, tmp_path / "ckpt.pt")
    teacher, net, loaded = teachers.load_student(str(tmp_path / "ckpt.pt"))
    assert loaded == config and teacher.spec.name == "maskbit-tiny" and not net.training
    assert all(torch.equal(v, ema[k]) for k, v in net.state_dict().items())
    torch.save(ema, tmp_path / "bare.bin")
    with pytest.raises(errors.UserError, match="bare.bin is a bare state dict.*--teacher NAME"):
        teachers.load_student(str(tmp_path / "bare.bin"))
