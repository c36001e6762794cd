"""train.py: what a run comes to, whatever interrupts it, splits it, or is switched on in it."""

import copy
import functools
import json
import math
import os

import pytest
import torch
import torch.nn as nn
from PIL import Image

import evaluate
import teachers
import train
from data.tokens import TextFeatures, load_tokens
from machinery import optim
from machinery.errors import UserError
from machinery.files import ROOT, read_tensors
from networks.weights import load_state
from recipes.settings import RECIPES, settle
from soft_embed import embed_tokens
from teachers import SPECS, MaskBit, load_teacher
from tests.common import integers
from tests.runs import (PAIRED, by_two_processes, close_run, finished, log_of, made_up_data, run,
                        same, same_run)
from worlds.judges import load_judge

TINY = ["maskgit-tiny", "meissonic-tiny", "maskgen-tiny"]
FROM_NOISE = dict(random_weights=True, init_from="teacher", device="cpu", student_start=0)


# --------------------------------------------------------------------------------------- resuming
def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path):
    whole = run(tmp_path, out=f"{tmp_path}/whole", dropout=0.1)
    run(tmp_path, out=f"{tmp_path}/cut", dropout=0.1, steps=4)
    with open(f"{tmp_path}/cut/log.jsonl", "a") as f:
        f.write('{"step": 5, "loss_aux": 9.0}\n{"step": 6, "lo')   # what a killed process leaves
    cut = run(tmp_path, out=f"{tmp_path}/cut", dropout=0.1, resume=True)
    assert same_run(whole, cut) and whole["step"] == 6
    log, cut_log = log_of(f"{tmp_path}/whole"), log_of(f"{tmp_path}/cut")
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert log[:3] == cut_log[:3] and log[4:] == cut_log[4:]


EVERY_FLAG = dict(
    gan=True, redraw=True, soft_state=True, cfg_schedule="cosine", w_t="inverse", beta=-0.2,
    dropout=0.1, soft_target=0.3, estimator="straight-through", feature_noise=0.1,
    checkpointing=True, dtype="bf16", accum=2)


@pytest.mark.parametrize("flags", [dict(gan=False), dict(gan=True), EVERY_FLAG],
                         ids=["Di[M]O", "GAN", "every flag"])
@pytest.mark.parametrize("name", TINY)
def test_every_tiny_teacher_trains_with_every_flag_and_resumes_to_the_bit(name, flags, tmp_path):
    given = FROM_NOISE | dict(teacher=name, dtype="fp32", batch=4, warmup=0, save_every=1,
                              log_every=1, eval_every=0) | flags
    if given["gan"]:
        given["data"] = made_up_data(f"{tmp_path}/data", name)
    whole = finished(settle(given | dict(steps=2, out=f"{tmp_path}/whole")))
    finished(settle(given | dict(steps=1, out=f"{tmp_path}/cut")))
    cut = finished(settle(given | dict(steps=2, out=f"{tmp_path}/cut", resume=True)))
    assert same_run(whole, cut) and ("disc" in whole) == given["gan"] and whole["skipped"] == 0

    start = load_teacher(name, random_weights=True).net.state_dict()
    moved = [key for key, tensor in whole["student"].items() if not torch.equal(tensor, start[key])]
    assert len(moved) > 40
    assert not any(key.startswith(("tok_emb", "pos_emb", "to_logits")) for key in moved)


def test_reward_training_resumes_to_the_bit_whatever_the_chunks_and_logs_score_and_gradient(tmp_path):
    given = FROM_NOISE | dict(teacher="meissonic-tiny", dtype="fp32", batch=4, steps=2, warmup=0,
                              save_every=1, log_every=1, eval_every=0, reward=True, reward_start=0)
    whole = finished(settle(given | dict(out=f"{tmp_path}/whole", reward_chunk=2)))
    cut = given | dict(out=f"{tmp_path}/cut", reward_chunk=2)
    finished(settle(cut | dict(steps=1)))
    assert same_run(whole, finished(settle(cut | dict(resume=True))))
    first = log_of(f"{tmp_path}/whole")[0]
    assert first["grad_reward"] > 0 and first["grad_dimo"] > 0 and "clip" in first
    finished(settle(given | dict(out=f"{tmp_path}/chunked", reward_chunk=4, steps=1)))
    chunked = log_of(f"{tmp_path}/chunked")[0]
    assert chunked["grad_reward"] == pytest.approx(first["grad_reward"], rel=1e-3)


# ---------------------------------------------------------------- the same update, made otherwise
# with the noise of everything that has noise, but for dropout
NOISY = dict(feature_noise=0.3, estimator="gumbel")


def assert_same_log(one, two):
    """Every number of two logs agrees, but for the order of sums.

    abs: loss_dimo is some 1e-3 here, what is left of logarithms around 1 that cancel.
    """
    rows, others = log_of(one), log_of(two)
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_accumulation_equals_the_joint_batch(shared, tmp_path):
    given = NOISY | dict(steps=3, clip=1e9, share_passes=shared)
    one, two = (run(tmp_path, out=f"{tmp_path}/{a}", accum=a, **given) for a in (1, 2))
    assert close_run(one, two)
    assert_same_log(f"{tmp_path}/1", f"{tmp_path}/2")


def test_two_gloo_processes_make_the_same_update_as_one_also_with_sharded_optimizers(tmp_path):
    one = run(tmp_path, out=f"{tmp_path}/one", **NOISY)
    zero = NOISY | dict(out=f"{tmp_path}/zero", zero=True)
    by_two_processes(tmp_path, NOISY | dict(out=f"{tmp_path}/two"), zero | dict(steps=4))
    by_two_processes(tmp_path, zero | dict(resume=True))
    assert_same_log(f"{tmp_path}/one", f"{tmp_path}/two")
    two = torch.load(f"{tmp_path}/two/ckpt.pt", weights_only=True)
    sharded = torch.load(f"{tmp_path}/zero/ckpt.pt", weights_only=True)
    assert close_run(one, two)
    assert same_run(two, sharded)                     # the optimizers' state dicts, too
    further = run(tmp_path, out=f"{tmp_path}/zero", resume=True, steps=8)     # by one process
    assert further["step"] == 8
    assert all(torch.isfinite(t).all() for t in further["student"].values())


@pytest.mark.parametrize("name", ["maskbit-tiny", *TINY])
def test_frozen_weights_in_bf16_change_nothing_under_autocast(name):
    teacher = load_teacher(name, random_weights=True)
    net = teacher.net
    cond = teacher.cond(teacher.conditions(["a", "b!"] if teacher.text else None)[:2])
    e = embed_tokens(integers(0, net.V + 1, 2, net.L, net.G), *net.tables())
    before = sum(p.nbytes for p in net.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = net(e, cond)
        assert torch.equal(net.halve()(e, cond), expected)
    assert sum(p.nbytes for p in net.parameters()) < 0.75 * before


@pytest.mark.parametrize("gan, shared, expected", [
    (False, False, 9), (False, True, 8), (True, False, 13), (True, True, 11)])
def test_a_step_makes_the_passes_that_the_docs_count(
        gan, shared, expected, tmp_path, monkeypatch):
    true, passes = MaskBit.forward, []

    def counted(self, e, *args, **kwargs):
        passes.append(len(e) / 8)                     # of a batch of 8
        if torch.is_grad_enabled() and next(self.blocks.parameters()).requires_grad:
            passes.append(2 * len(e) / 8)             # back, to the input and to the weights
        elif e.requires_grad:
            passes.append(len(e) / 8)                 # back, to the input
        return true(self, e, *args, **kwargs)

    monkeypatch.setattr(MaskBit, "forward", counted)
    run(tmp_path, steps=1, gan=gan, share_passes=shared)
    assert sum(passes) == expected


# ------------------------------------------------------------------------------- what a flag does
def test_ablations_are_flags(tmp_path):
    dimo_only = run(tmp_path, out=f"{tmp_path}/a", gan=False, steps=3)
    gan_only = run(tmp_path, out=f"{tmp_path}/b", w_dimo=0.0, steps=3)
    late = run(tmp_path, out=f"{tmp_path}/c", student_start=3, steps=3)
    assert "disc" not in dimo_only and "aux" not in gan_only    # without Eq. 2 nothing reads it
    assert not same(dimo_only["student"], gan_only["student"])
    start = dict(load_teacher("nano", random_weights=True).net.state_dict())
    assert same(late["student"], start)               # nothing has joined the student's loss yet
    assert not same(late["aux"], start)
    net = MaskBit(**SPECS["nano"].net)
    embedding = {id(p) for p in net.frozen()}
    names = [name for name, p in net.named_parameters() if id(p) in embedding]
    assert len(names) == 4
    assert all(torch.equal(gan_only["student"][name], start[name]) for name in names)


def test_prompts_beside_a_gan_are_for_eq_2_and_the_pairs_keep_their_own(tmp_path, monkeypatch):
    data = made_up_data(f"{tmp_path}/data", "maskgen-tiny")
    (tmp_path / "prompts.txt").write_text("a blue boat\ntwo green cups\n")
    conds = {}                                        # what each term's networks were told
    real = {}

    def telling(name, place):
        true = getattr(train, name)

        def told(*args, **kwargs):
            conds.setdefault(name, []).append(args[place][0])
            real.setdefault(name, []).append(args[1])
            return true(*args, **kwargs)
        monkeypatch.setattr(train, name, told)

    for name, place in (("dimo_grad", 3), ("gan_grad", 3), ("real_and_fake", 4)):
        telling(name, place)
    given = FROM_NOISE | dict(
        teacher="maskgen-tiny", gan=True, data=data, prompts=f"{tmp_path}/prompts.txt", accum=2,
        batch=8, steps=2, warmup=0, log_every=1, eval_every=0, out=f"{tmp_path}/run")
    ckpt = finished(settle(given))
    teacher = load_teacher("maskgen-tiny", random_weights=True)

    def told_of(prompts):
        return list(teacher.cond(teacher.conditions(prompts))[0])

    def among(cond, known):
        return any(torch.allclose(cond, other, atol=1e-5) for other in known)

    listed, pairs = told_of(["a blue boat", "two green cups"]), told_of(PAIRED)
    assert all(among(cond, listed) for batch in conds["dimo_grad"] for cond in batch)
    x, labels, _ = load_tokens(data, teacher)
    rows = {tuple(row.ravel()): label for row, label in zip(x, labels)}
    for told, told_too, x_real in zip(
            conds["gan_grad"], conds["real_and_fake"], real["real_and_fake"]):
        assert torch.equal(told, told_too)
        for cond, row in zip(told, x_real.numpy()):   # the prompt that came with this real image
            assert among(cond, [pairs[rows[tuple(row.ravel())]]])
    assert len(conds["dimo_grad"]) == len(conds["gan_grad"]) == 4

    monkeypatch.undo()                                # both terms move the student
    one, two = (finished(settle(given | more | dict(out=f"{tmp_path}/{i}", overwrite=True)))
                for i, more in enumerate((dict(w_gan=0.0), dict(w_dimo=1e-9))))
    assert not same(ckpt["student"], one["student"])
    assert not same(ckpt["student"], two["student"])


@pytest.mark.parametrize("flag", [
    dict(estimator="straight-through"), dict(estimator="gumbel", tau=2.0), dict(soft_state=True),
    dict(redraw=True), dict(cfg_schedule="cosine"), dict(w_t="inverse"), dict(beta=-0.2),
    dict(soft_target=0.5)], ids=str)
def test_every_variant_trains(flag, tmp_path):
    ckpt = run(tmp_path, steps=2, **flag)
    assert all(torch.isfinite(tensor).all() for tensor in ckpt["student"].values())


def test_mask_ratios_keep_within_the_bounds_that_the_official_meissonic_code_has(tmp_path):
    teacher = load_teacher("meissonic-tiny", random_weights=True)
    asked = teacher.conditions(["a", "b"])

    def ratios(*bounds):
        c = settle(dict(teacher="meissonic-tiny", schedule="cosine", ratio_range=list(bounds),
                        batch=200, out=str(tmp_path)))
        steps = [train.draw_step(c, n, teacher.net, len(asked), asked.device)
                 for n in range(10)]
        return torch.cat([draws[name] for draws in steps for name in ("ratio", "ratio_aux")])

    free = ratios(0.0, 1.0)
    assert free.min() < 0.01 and free.max() > 0.99
    assert torch.equal(ratios(0.02, 0.98), free.clamp(0.02, 0.98))
    assert RECIPES["meissonic"]["ratio_range"] == [0.02, 0.98]


TABLES = {                                            # 5, and 7 to 10 for the last five
    "maskgit": dict(batch=256, steps=30_000, cfg=2.0, init_ratio=0.6, beta=-0.2, temperature=12.0,
                    schedule="arccos", w_gan=100.0, gan_ratio=[0.0, 0.5], heads=4, lr=1e-5),
    "maskbit": dict(batch=256, steps=50_000, cfg=1.5, init_ratio=0.6, beta=0.0, temperature=0.1,
                    schedule="arccos", w_gan=25.0, gan_ratio=[0.0, 0.95], heads=4, lr=1e-6),
    "meissonic": dict(batch=16, steps=10_000, cfg=4.0, init_ratio=0.6, beta=0.0, temperature=0.5,
                      schedule="cosine", lr=1e-6),
    "maskgen": dict(batch=64, steps=50_000, cfg=4.0, init_ratio=0.9, beta=0.0, temperature=1.0,
                    schedule="arccos", w_gan=100.0, gan_ratio=[0.0, 0.95], heads=6, lr=1e-6),
    "maskbit-long": dict(batch=256, steps=50_000, lr=5e-7, w_gan=200.0, optimizer="adamw",
                         weight_decay=0.01, dropout=0.0),
    "maskbit-ablation": dict(batch=64, steps=50_000, lr=1e-6, w_gan=25.0, gan_start=1000),
    "meissonic-reward": dict(batch=16, steps=10_000, w_dimo=0.0, reward=True, w_reward=2000.0,
                             rewards={"imagereward": 1.0, "clip": 0.2}),
    "maskgen-dimo": dict(batch=64, steps=100_000, cfg=4.0, w_dimo=1.0, reward=False, gan=False),
    "maskgen-reward": dict(batch=32, steps=50_000, w_dimo=1.0, reward=True, w_reward=2000.0,
                           rewards={"imagereward": 1.0, "clip": 0.2})}
COMMON = dict(ema=0.9999, warmup=100, clip=1.0, weight_decay=0.0, optimizer="adam",
              lr_end=1.0, w_t="one", smoothing=0.1, estimator="soft", tau=1.0)


@pytest.mark.parametrize("name", TABLES)
def test_settings_of_the_papers_tables_reach_every_recipe(name):
    c = settle(dict(recipe=name, prompts="assets/prompts.txt", out="nowhere"))
    for key, value in (COMMON | TABLES[name]).items():
        assert getattr(c, key) == value, key
    assert c.dropout == (0.1 if name in ("maskbit", "maskbit-ablation") else 0.0)
    assert c.aux_lr == c.disc_lr == c.lr


# -------------------------------------------------------------------- the optimizers' small parts
def test_warm_up_starts_at_zero_and_ema_follows_the_official_ramp():
    factors = [optim.lr_factor(n, 100, 5000) for n in (0, 1, 2, 50, 99, 100, 1000)]
    assert factors == [0.0, 0.01, 0.02, 0.5, 0.99, 1.0, 1.0]
    assert abs(optim.lr_factor(5000, 100, 5000, 0.1) - 0.1) < 1e-12
    official = {0: 0.1, 1: 0.18181818, 10: 0.55, 1000: 0.99108911, 30000: 0.9997001, 89991: 0.9999}
    for n, rate in official.items():
        ema, net = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        ema.weight.data.fill_(1.0)
        net.weight.data.fill_(0.0)
        optim.ema_update(ema, net, n, 0.9999)
        assert abs(ema.weight.item() - rate) < 1e-6


def test_muon_moves_matrices_by_orthogonal_steps_and_the_rest_as_adam_does():
    torch.manual_seed(0)
    settings = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, fused=True)
    matrix, gain, kernel = (nn.Parameter(torch.randn(s)) for s in ((24, 8), (8,), (4, 3, 3, 3)))
    copies = [nn.Parameter(p.detach().clone()) for p in (gain, kernel)]
    muon = optim.Muon([matrix, gain, kernel], **settings)
    adam = torch.optim.Adam(copies, **settings)
    before = matrix.detach().clone()
    for p in (matrix, gain, kernel):
        p.grad = torch.randn_like(p)
    for p, original in zip(copies, (gain, kernel)):
        p.grad = original.grad.clone()
    muon.step()
    adam.step()
    assert torch.equal(gain, copies[0]) and torch.equal(kernel, copies[1])
    step = torch.linalg.svdvals((matrix - before).detach()) / (0.01 * 0.2 * math.sqrt(24))
    assert 0.6 < step.min() and step.max() < 1.3      # all near 1, whatever the gradient was
    groups = [id(group) for part in muon.parts for group in part.param_groups]
    assert [id(group) for group in muon.param_groups] == groups

    again = optim.Muon([matrix, gain, kernel], **settings)
    again.load_state_dict(muon.state_dict())
    momentum = [opt.parts[0].state[matrix]["momentum_buffer"] for opt in (muon, again)]
    assert torch.equal(*momentum)
    muon.zero_grad()
    assert matrix.grad is None and gain.grad is None


def test_an_update_that_is_not_finite_changes_nothing_and_the_host_does_not_look():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    adam = torch.optim.Adam([p], 0.1, fused=True)
    for gradient in (1.0, math.nan, math.inf, 1.0):
        before = p.detach().clone()
        state = {key: value.clone() for key, value in adam.state[p].items()}
        p.grad = torch.full((2,), gradient)
        norm = optim.update(adam, [p], clip=1.0, lr=0.1)
        finite = math.isfinite(gradient)
        assert bool(torch.isfinite(norm)) == finite and p.grad is None
        assert torch.equal(p.detach(), before) == (not finite)
        if not finite:
            assert all(torch.equal(adam.state[p][key], value) for key, value in state.items())
    assert adam.state[p]["step"] == 2


def test_a_step_that_is_not_finite_is_skipped_counted_and_ends_the_run_after_ten(
        tmp_path, monkeypatch):
    true, calls = train.dimo_grad, []

    def broken(*args, **kwargs):
        calls.append(1)
        bad = len(calls) == 3 or len(calls) > 6
        g, loss = true(*args, **kwargs)
        return g * (math.nan if bad else 1.0), loss

    monkeypatch.setattr(train, "dimo_grad", broken)
    ckpt = run(tmp_path, steps=6)
    assert ckpt["skipped"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in ckpt["student"].values())
    with pytest.raises(UserError, match="not finite in 10 steps.*--resume"):
        run(tmp_path, steps=40, resume=True)


# ------------------------------------------------------------- what a run shows and what it draws
@pytest.mark.parametrize("name", TINY)
def test_every_tiny_teacher_is_evaluated_beside_its_student(name, tmp_path):
    c = settle(FROM_NOISE | dict(teacher=name, dtype="fp32", steps=1, warmup=0, n_eval=12, batch=4,
                                 eval_every=1, out=f"{tmp_path}/run"))
    train.train(c)
    shown = {"samples_000000.png", "samples_000001.png", "picture.png", "student.safetensors"}
    assert shown <= set(os.listdir(c.out))
    evaluate.main(evaluate.flags().parse_args([
        "--ckpt", f"{c.out}/ckpt.pt", "--steps", "2", "--n", "12", "--device", "cpu",
        "--out", f"{tmp_path}/e"]))
    with open(f"{tmp_path}/e/results.jsonl") as f:
        student, teacher = (json.loads(line) for line in f)
    assert (student["kind"], student["steps"], student["n"]) == ("student", 1, 12)
    assert (teacher["kind"], teacher["steps"], teacher["n"]) == ("teacher", 2, 12)
    for row in (student, teacher):
        assert ("geneval" in row) == (name == "meissonic-tiny")
        assert "fid" not in row and row["images/s"] > 0
    assert student["noise"] == SPECS[name].student["noise"]
    assert teacher.items() >= next(iter(SPECS[name].sampling.values())).items()
    C, H, W = SPECS[name].image
    with Image.open(f"{tmp_path}/e/sheet.png") as sheet:
        assert sheet.size[0] > 3 * W and sheet.size[1] > 2 * H


def test_a_run_on_fashion_ends_with_a_table_of_fids_beside_the_teachers_record(tmp_path):
    c = settle(dict(teacher="maskbit-tiny", gan=False, steps=1, student_start=0, batch=4, warmup=0,
                    eval_every=1, n_eval=64, device="cpu", dtype="fp32", out=f"{tmp_path}/run"))
    train.train(c)
    with open(f"{c.out}/results.jsonl") as f:
        rows = [json.loads(line) for line in f]
    assert [row["model"] for row in rows] == ["start of this run", "student, step 1"]
    for row in rows:
        assert {"fid", "is", "precision", "recall", "density", "coverage"} <= row.keys()
        assert row["n"] == 64 and row["extractor"].startswith("FashionNet")
    with open(f"{c.out}/table.md") as f:
        assert "student, step 1" in f.read()


def test_the_shipped_teacher_draws_what_it_is_told_in_many_steps_and_not_in_one():
    teacher = load_teacher("meissonic-tiny")
    judge = load_judge(teacher)

    def teacher_row(steps):
        draw = functools.partial(teachers.generate_teacher, teacher, steps=steps)
        return judge(draw, 60, batch=60)

    many, one = teacher_row(16), teacher_row(1)
    assert many["geneval"] > 0.5 > 0.3 > one["geneval"] and many["clip"] > 15 > 5 > one["clip"]
    student = copy.deepcopy(teacher.net)
    load_state(student, read_tensors(f"{ROOT}/assets/shapes/theta0.safetensors"), "theta0")
    start = {key: teacher.spec.student[key] for key in ("init_ratio", "noise")}
    row = judge(functools.partial(teachers.generate_student, teacher, student, **start), 60, batch=60)
    assert row["clip"] > 10 and row["chroma"] < 0.2 < one["chroma"]           # no crumbs


# ---------------------------------------------------------------------------- features of prompts
@pytest.mark.parametrize("name", ["meissonic-tiny", "maskgen-tiny"])
def test_features_of_prompts_are_the_same_bits_however_they_came_and_outlive_the_run_in_a_folder(
        name, tmp_path):
    teacher = load_teacher(name, random_weights=True)
    asked = teacher.conditions([f"thing {i}" for i in range(40)])
    memory, folder, off = (TextFeatures(teacher, asked, where)
                           for where in ("memory", f"{tmp_path}/t", "off"))
    for i in range(6):
        which = torch.randint(40, (9,), generator=torch.Generator().manual_seed(i))
        assert same(memory(which), folder(which))
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(memory(which), off(which)))
    backwards, every = TextFeatures(teacher, asked), torch.arange(40)         # another order of arrival
    assert same(backwards(every.flip(0)), memory(every.flip(0)))

    assert len(os.listdir(f"{tmp_path}/t")) == 1
    again = TextFeatures(teacher, asked, f"{tmp_path}/t")
    assert torch.equal(again.known, folder.known) and 9 < again.known.sum() <= 40
    again.parts[0][which] += 1                        # what is read is not encoded anew
    assert torch.equal(TextFeatures(teacher, asked, f"{tmp_path}/t")(which)[0], memory(which)[0] + 1)
    TextFeatures(teacher, asked[:30], f"{tmp_path}/t")            # other prompts, another folder
    assert len(os.listdir(f"{tmp_path}/t")) == 2
    much = TextFeatures(teacher, asked, limit=1000)
    assert "--text_cache FOLDER" in much.why and same(much(which), off(which))
