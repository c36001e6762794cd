"""train: tests."""

import copy
import functools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import soft_embed as se
import evaluate
import teachers
import train
from machinery import checkpoint, optim
from networks import weights
from recipes import tiny as tiny_recipes
from worlds import judges
from data.tokens import TextFeatures
from machinery.errors import UserError
from machinery.files import ROOT
from teachers import SPECS, MaskBit, load_teacher
from tests.common import integers, NANO, seed, nano_run, run, same, NETS, other_world, one_of_two


def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path):
    whole = run(tmp_path, out=f"{tmp_path}/whole", dropout=0.1)
    run(tmp_path, out=f"{tmp_path}/cut", dropout=0.1, steps=4)
    with open(f"{tmp_path}/cut/log.jsonl", "a") as f:
        f.write('{"step": 5, "loss_aux": 9.0}\n{"step": 6, "lo')            # what a killed process leaves behind
    cut = run(tmp_path, out=f"{tmp_path}/cut", dropout=0.1, resume=True)
    assert all(same(whole[k], cut[k]) for k in NETS) and whole["step"] == 6
    lines = [[{k: v for k, v in json.loads(line).items() if k != "img_s"} for line in open(f"{tmp_path}/{d}/log.jsonl")]
             for d in ("whole", "cut")]
    assert [row["step"] for row in lines[0]] == [1, 2, 3, 4, 5, 6] and lines[0][:3] == lines[1][:3]
    assert lines[0][4:] == lines[1][4:]


@pytest.mark.parametrize("name", ["maskgit-tiny", "meissonic-tiny", "maskgen-tiny"])
def test_every_tiny_teacher_trains_with_every_flag_and_resumes_to_the_bit(name, tmp_path):
    data = other_world(f"{tmp_path}/data", name)
    every = dict(gan=True, data=data, redraw=True, soft_state=True, cfg_schedule="cosine", w_t="inverse", beta=-0.2, dropout=0.1,
                 soft_target=0.3, estimator="straight-through", feature_noise=0.1, checkpointing=True, dtype="bf16", accum=2)
    for kw in (dict(gan=False), dict(gan=True, data=data), every):
        def go(out, **more):
            given = {"dtype": "fp32", **kw, **more, "out": f"{tmp_path}/{out}"}
            given |= dict(teacher=name, random_weights=True, init_from="teacher", student_start=0, device="cpu", save_every=1, log_every=1, batch=4, eval_every=0, warmup=0)
            c = train.settle(given, train.flags()[1])
            train.train(c)
            return torch.load(f"{c.out}/ckpt.pt", weights_only=True)
        whole = go(f"whole{len(kw)}", steps=2)
        go(f"cut{len(kw)}", steps=1)
        cut = go(f"cut{len(kw)}", steps=2, resume=True)
        assert all(same(whole[k], cut[k]) for k in NETS if k in whole) and ("disc" in whole) == kw["gan"]
        assert whole["skipped"] == 0
        moved = [k for k, v in whole["student"].items() if not torch.equal(v, load_teacher(name, random_weights=True).net.state_dict()[k])]
        assert len(moved) > 40 and not any(k.startswith(("tok_emb", "pos_emb", "to_logits")) for k in moved)


@pytest.mark.parametrize("name", ["maskgit-tiny", "meissonic-tiny", "maskgen-tiny"])
def test_every_tiny_teacher_is_evaluated_beside_its_student(name, tmp_path):
    c = train.settle(dict(teacher=name, random_weights=True, device="cpu", dtype="fp32", steps=1, warmup=0, n_eval=12, batch=4,
                          init_from="teacher", eval_every=1, student_start=0, out=f"{tmp_path}/run"), train.flags()[1])
    train.train(c)                                                # with a strip of samples, and a picture at the end
    assert {"samples_000000.png", "samples_000001.png", "picture.png", "student.safetensors"} <= set(os.listdir(c.out))
    args = evaluate.flags().parse_args(["--ckpt", f"{c.out}/ckpt.pt", "--steps", "2", "--n", "12", "--out", f"{tmp_path}/e", "--device", "cpu"])
    evaluate.main(args)
    rows = [json.loads(line) for line in open(f"{tmp_path}/e/results.jsonl")]
    assert [(row["kind"], row["steps"], row["n"]) for row in rows] == [("student", 1, 12), ("teacher", 2, 12)]
    assert all(("geneval" in row) == (name == "meissonic-tiny") for row in rows)
    assert all("fid" not in row and row["images/s"] > 0 for row in rows) and rows[0]["noise"] == SPECS[name].student["noise"]
    assert rows[1].items() >= next(iter(SPECS[name].sampling.values())).items()
    C, H, W = SPECS[name].image
    with Image.open(f"{tmp_path}/e/sheet.png") as sheet:
        assert sheet.size[0] > 3 * W and sheet.size[1] > 2 * H


def test_mask_ratios_keep_within_the_bounds_that_the_official_meissonic_code_has(tmp_path):
    teacher = load_teacher("meissonic-tiny", random_weights=True)
    rows, ratios = teacher.conditions(["a", "b"]), {}
    for bounds in ([0.0, 1.0], [0.02, 0.98]):
        c = train.settle(dict(teacher="meissonic-tiny", schedule="cosine", ratio_range=bounds, batch=200, out=f"{tmp_path}"), train.flags()[1])
        steps = [train.draw_step(c, n, 0, 200, teacher.net, rows) for n in range(10)]
        ratios[bounds[0]] = torch.cat([r for s in steps for r in (s.ratio, s.ratio_aux)])
    assert ratios[0.0].min() < 0.01 and ratios[0.0].max() > 0.99
    assert torch.equal(ratios[0.02], ratios[0.0].clamp(0.02, 0.98))
    assert tiny_recipes.RECIPES["meissonic"]["ratio_range"] == [0.02, 0.98]


@pytest.mark.parametrize("name", ["meissonic-tiny", "maskgen-tiny"])
def test_features_of_prompts_are_the_same_bits_however_they_came_and_outlive_the_run_in_a_folder(name, tmp_path):
    teacher = load_teacher(name, random_weights=True)
    rows = teacher.conditions([f"thing {i}" for i in range(40)])
    memory, folder, off = (TextFeatures(teacher, rows, k) for k in ("memory", f"{tmp_path}/t", "off"))
    for i in range(6):
        which = torch.randint(40, (9,), generator=seed(i))
        assert same(memory(which), folder(which))
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(memory(which), off(which)))
    backwards, every = TextFeatures(teacher, rows), torch.arange(40)                    # another order of arrival
    assert same(backwards(every.flip(0)), memory(every.flip(0)))
    (kept,) = os.listdir(f"{tmp_path}/t")
    again = TextFeatures(teacher, rows, f"{tmp_path}/t")
    assert torch.equal(again.known, folder.known) and 9 < again.known.sum() <= 40
    again.parts[0][which] += 1                                    # read, not encoded anew; another prompt list, another folder
    assert torch.equal(TextFeatures(teacher, rows, f"{tmp_path}/t")(which)[0], memory(which)[0] + 1)
    TextFeatures(teacher, rows[:30], f"{tmp_path}/t")
    assert len(os.listdir(f"{tmp_path}/t")) == 2
    much = TextFeatures(teacher, rows, limit=1000)
    assert "--text_cache FOLDER" in much.why and same(much(which), off(which))


@pytest.mark.parametrize("name", ["maskbit-tiny", "maskgit-tiny", "meissonic-tiny", "maskgen-tiny"])
def test_frozen_weights_in_bf16_change_nothing_under_autocast(name):
    teacher, text = load_teacher(name, random_weights=True), SPECS[name].text
    cond = teacher.cond(teacher.conditions(["a", "b!"] if text else None)[:2])
    e = se.embed_tokens(integers(0, teacher.net.V + 1, 2, teacher.net.L, teacher.net.G), *teacher.net.tables())
    before = sum(p.nbytes for p in teacher.net.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = teacher.net(e, cond)
        assert torch.equal(teacher.net.halve()(e, cond), expected)
    assert sum(p.nbytes for p in teacher.net.parameters()) < 0.75 * before


def test_settings_of_table_5_reach_every_teacher():
    columns = {"maskgit": (256, 30_000, 2.0, 0.6, -0.2, 12.0, "arccos", 100.0, [0.0, 0.5], 4, 1e-5),
               "maskbit": (256, 50_000, 1.5, 0.6, 0.0, 0.1, "arccos", 25.0, [0.0, 0.95], 4, 1e-6),
               "meissonic": (16, 10_000, 4.0, 0.6, 0.0, 0.5, "cosine", None, None, None, 1e-6),
               "maskgen": (64, 50_000, 4.0, 0.9, 0.0, 1.0, "arccos", 100.0, [0.0, 0.95], 6, 1e-6)}
    keys = ("batch", "steps", "cfg", "init_ratio", "beta", "temperature", "schedule", "w_gan", "gan_ratio", "heads", "lr")
    for name, values in columns.items():
        c = train.settle(dict(teacher=name, prompts="assets/prompts.txt", out="nowhere"), train.flags()[1])
        for key, value in zip(keys, values):
            assert value is None or getattr(c, key) == value, (name, key)
        assert c.ema == 0.9999 and c.warmup == 100 and c.clip == 1.0 and c.weight_decay == 0.0 and c.optimizer == "adam"


def test_accumulation_equals_the_joint_batch(tmp_path):
    one, two = (run(tmp_path, out=f"{tmp_path}/{a}", accum=a, clip=1e9) for a in (1, 2))
    for k in ("student", "aux", "disc", "ema"):
        assert all(torch.allclose(one[k][n], two[k][n], atol=2e-5) for n in one[k]), k


def test_two_gloo_processes_make_the_same_update_as_one(tmp_path):
    one = run(tmp_path, out=f"{tmp_path}/one")
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), 29531, dict(out=f"{tmp_path}/two")), nprocs=2)
    two = torch.load(f"{tmp_path}/two/ckpt.pt", weights_only=True)
    for k in ("student", "aux", "disc", "ema"):
        assert all(torch.allclose(one[k][n], two[k][n], atol=2e-5) for n in one[k]), k


def test_ablations_are_flags(tmp_path):
    dimo_only = run(tmp_path, out=f"{tmp_path}/a", gan=False, steps=3)
    gan_only = run(tmp_path, out=f"{tmp_path}/b", w_dimo=0.0, steps=3)
    late = run(tmp_path, out=f"{tmp_path}/c", w_dimo=0.0, gan_start=3, steps=3)
    assert "disc" not in dimo_only and not same(dimo_only["student"], gan_only["student"])
    frozen = MaskBit(**NANO.net)
    start = load_teacher("nano", random_weights=True).net.state_dict()
    assert same(late["student"], dict(start)) and not same(late["aux"], dict(start))     # nothing joined the student yet
    names = {n for n, p in frozen.named_parameters() if any(p is q for q in frozen.frozen())}
    assert len(names) == 4 and all(torch.equal(gan_only["student"][n], start[n]) for n in names)
    for kw in (dict(estimator="straight-through"), dict(estimator="gumbel", tau=2.0), dict(soft_state=True),
               dict(redraw=True), dict(cfg_schedule="cosine"), dict(w_t="inverse"), dict(beta=-0.2), dict(soft_target=0.5)):
        ckpt = run(tmp_path, out=f"{tmp_path}/d", steps=2, overwrite=True, **kw)
        assert all(torch.isfinite(t).all() for t in ckpt["student"].values()), kw


def test_warm_up_starts_at_zero_and_ema_follows_the_official_ramp():
    factors = [optim.lr_factor(n, 100, 5000) for n in (0, 1, 2, 50, 99, 100, 1000)]
    assert factors == [0.0, 0.01, 0.02, 0.5, 0.99, 1.0, 1.0] and abs(optim.lr_factor(5000, 100, 5000, 0.1) - 0.1) < 1e-12
    for n, rate in ((0, 0.1), (1, 0.18181818), (10, 0.55), (1000, 0.99108911), (30000, 0.9997001), (89991, 0.9999)):
        ema, net = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        ema.weight.data.fill_(1.0), net.weight.data.fill_(0.0)
        optim.ema_update(ema, net, n, 0.9999)
        assert abs(ema.weight.item() - rate) < 1e-6


def test_muon_moves_matrices_by_orthogonal_steps_and_the_rest_as_adam_does():
    torch.manual_seed(0)
    matrix, gain, kernel = (nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (8,), (4, 3, 3, 3)))
    other = [nn.Parameter(p.detach().clone()) for p in (gain, kernel)]
    opt = optim.Muon([matrix, gain, kernel], 0.01, (0.9, 0.999), eps=1e-6, weight_decay=0.0, fused=True)
    adam, before = torch.optim.Adam(other, 0.01, (0.9, 0.999), eps=1e-6, fused=True), matrix.detach().clone()
    for p in (matrix, gain, kernel):
        p.grad = torch.randn_like(p)
    for p, q in zip(other, (gain, kernel)):
        p.grad = q.grad.clone()
    opt.step(), adam.step()
    assert torch.equal(gain, other[0]) and torch.equal(kernel, other[1])
    scale = torch.linalg.svdvals((matrix - before).detach()) / (0.01 * 0.2 * math.sqrt(24))   # all near 1, whatever g was
    assert scale.min() > 0.6 and scale.max() < 1.3
    assert {id(group) for group in opt.param_groups} == {id(group) for part in opt.parts for group in part.param_groups}
    again = optim.Muon([matrix, gain, kernel], 0.01, (0.9, 0.999), eps=1e-6, weight_decay=0.0, fused=True)
    again.load_state_dict(opt.state_dict())
    assert torch.equal(again.parts[0].state[matrix]["momentum_buffer"], opt.parts[0].state[matrix]["momentum_buffer"])
    opt.zero_grad()
    assert matrix.grad is gain.grad is None


def test_a_step_that_is_not_finite_is_skipped_counted_and_ends_the_run_after_ten(tmp_path, monkeypatch):
    true, calls = train.dimo_grad, []

    def broken(*a, **k):
        calls.append(1)
        return true(*a, **k) * (float("nan") if len(calls) == 3 or len(calls) > 6 else 1.0)
    monkeypatch.setattr(train, "dimo_grad", broken)
    ckpt = run(tmp_path, steps=6)
    assert ckpt["skipped"] == 1 and all(torch.isfinite(t).all() for t in ckpt["student"].values())
    with pytest.raises(UserError, match="not finite in 10 steps.*--resume"):
        run(tmp_path, steps=40, resume=True)


def test_a_full_disk_or_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = str(tmp_path / "ckpt.pt")
    checkpoint.save_checkpoint(path, dict(step=1))

    def full(state, f):
        f.write(b"half of a checkpoint")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="disk full.*--resume"):
        checkpoint.save_checkpoint(path, dict(step=2))
    assert torch.load(path, weights_only=True) == dict(step=1) and os.listdir(tmp_path) == ["ckpt.pt"]
    killed = ("import torch, os, train\n"                                  # the process dies in the middle of a write
              "def save(state, f): f.write(b'half'); f.flush(); os._exit(9)\n"
              f"torch.save = save\ntrain.save_checkpoint({path!r}, dict(step=3))")
    assert subprocess.run([sys.executable, "-c", killed], cwd=ROOT).returncode == 9
    assert torch.load(path, weights_only=True) == dict(step=1)


@pytest.mark.parametrize("kw, words", [
    (dict(teacher="nope"), "unknown --teacher 'nope'.*maskbit"), (dict(batch=9), "--batch 9 .*2 accumulation"),
    (dict(data=None), "--gan .*--data"), (dict(w_dimo=0.0, gan=False), "nothing to train"), (dict(lr=-1.0), "--lr -1"),
    (dict(gan_ratio=[0.5, 0.2]), "--gan_ratio"), (dict(init_ratio=1.5), "at most 1")])
def test_bad_settings_are_answered_with_a_sentence(tmp_path, kw, words):
    with pytest.raises(UserError, match=words):
        nano_run(tmp_path, **{"accum": 2, **kw}) if "teacher" not in kw else train.settle(kw, train.flags()[1])


def test_a_text_teacher_without_prompts_is_answered_with_a_sentence(tmp_path):
    settle = lambda **kw: train.settle(dict(teacher="maskgen-tiny", random_weights=True, device="cpu", out=f"{tmp_path}/o", **kw),
                                       train.flags()[1])
    with pytest.raises(UserError, match="maskgen draws what it is told: add --prompts FILE"):
        train.settle(dict(teacher="maskgen", out=f"{tmp_path}/o"), train.flags()[1])
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for name, words in (("none.txt", "cannot read"), ("empty.txt", "no prompt in it"), ("latin.txt", "cannot read")):
        with pytest.raises(UserError, match=f"--prompts .*{name}: {words}"):
            train.train(settle(prompts=f"{tmp_path}/{name}"))
    data = other_world(f"{tmp_path}/data", "maskgen-tiny")
    (tmp_path / "data/prompts.txt").write_text("only one\n")
    with pytest.raises(UserError, match="label 4, but 1 prompts"):
        train.train(settle(gan=True, data=data))
    os.remove(f"{data}/prompts.txt")
    with pytest.raises(UserError, match="cannot read real tokens with their prompts .*prompts.txt"):
        train.train(settle(gan=True, data=data))


def test_bad_files_are_answered_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot read real tokens.*data/imagenet.py"):
        run(tmp_path, data=f"{tmp_path}/missing")
    np.savez(tmp_path / "other.npz", tokens=np.zeros((5, 9, 1), np.uint8), labels=np.zeros(5, np.uint8))
    with pytest.raises(UserError, match=r"expected tokens \(n, 16, 2\)"):
        run(tmp_path, data=f"{tmp_path}/other.npz")
    with pytest.raises(UserError, match="no weights at .*ckpt.pt"):
        run(tmp_path, resume=True)
    run(tmp_path, steps=1)
    command = [sys.executable, "train.py", "--resume", "--out", f"{tmp_path}/run", "--teacher", "maskbit"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "is a run with --teacher nano, and now --teacher is maskbit" in done.stderr
    assert "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------- rewards in training
def shapes_run(folder, **kw):
    given = {**dict(teacher="meissonic-tiny", random_weights=True, device="cpu", dtype="fp32", batch=4, steps=2, warmup=0,
                    save_every=1, log_every=1, eval_every=0, reward=True, reward_start=0, student_start=0,
                    init_from="teacher", out=folder), **kw}
    c = train.settle(given, train.flags()[1])
    train.train(c)
    return torch.load(f"{c.out}/ckpt.pt", weights_only=True), [json.loads(line) for line in open(f"{c.out}/log.jsonl")]


def test_reward_training_resumes_to_the_bit_whatever_the_chunks_and_logs_score_and_gradient(tmp_path):
    whole, log = shapes_run(f"{tmp_path}/whole", reward_chunk=2)
    shapes_run(f"{tmp_path}/cut", reward_chunk=2, steps=1)
    cut, _ = shapes_run(f"{tmp_path}/cut", reward_chunk=2, resume=True)
    assert all(same(whole[k], cut[k]) for k in NETS if k in whole)
    assert log[0]["grad_reward"] > 0 and log[0]["grad_dimo"] > 0 and "clip" in log[0]
    _, again = shapes_run(f"{tmp_path}/chunked", reward_chunk=4)
    assert again[0]["grad_reward"] == pytest.approx(log[0]["grad_reward"], rel=1e-3)


def test_the_shipped_teacher_draws_what_it_is_told_in_many_steps_and_not_in_one():
    teacher = load_teacher("meissonic-tiny")
    judge = judges.load_judge(teacher)
    many, one = (judge(functools.partial(teachers.generate_teacher, teacher, steps=N), 60, batch=60) for N in (16, 1))
    assert many["geneval"] > 0.5 > 0.3 > one["geneval"] and many["clip"] > 15 > 5 > one["clip"]
    student = copy.deepcopy(teacher.net)
    weights.load_state(student, weights.read_weights(f"{ROOT}/assets/shapes/theta0.safetensors"), "theta0")
    row = judge(functools.partial(teachers.generate_student, teacher, student, **{k: SPECS["meissonic-tiny"].student[k] for k in
                                                                           ("init_ratio", "noise")}), 60, batch=60)
    assert row["clip"] > 10 and row["chroma"] < 0.2 < one["chroma"]                           # no crumbs


def test_reward_without_a_text_teacher_is_refused(tmp_path):
    with pytest.raises(UserError, match="--reward judges pictures by their prompts, and maskbit-tiny draws classes"):
        train.settle(dict(teacher="maskbit-tiny", reward=True, out=f"{tmp_path}/x"), train.flags()[1])
    done = subprocess.run([sys.executable, "train.py", "--teacher", "meissonic-tiny", "--reward", "--rewards", "beauty=1"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown reward 'beauty'" in done.stderr and "Traceback" not in done.stderr
