"""worlds/looking.py: what a run shows of itself. Evaluations, the best of them, weights, curves.

    pytest tests/test_looking.py
"""

import ctypes
import functools
import json
import os
import platform
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import evaluate
import teachers
import train
from data.tokens import write_lines
from machinery import pictures, processes
from machinery.errors import UserError
from machinery.files import fingerprint
from metrics import benchmarks, fid, geneval, reference
from networks import inception
from networks.weights import load_state, read_weights
from recipes.settings import settle
from teachers import load_teacher
from tests.common import command
from tests.runs import log_of
from tests.test_metrics import Small
from worlds import judges, looking, shapes

QUICK = dict(random_weights=True, init_from="teacher", device="cpu", dtype="fp32", student_start=0,
             warmup=0, batch=4, eval_every=1, n_eval=12)


def evaluations(out):
    return [row for row in log_of(out) if "model" in row]


def content(path):
    with open(path, "rb") as f:
        return f.read()


# --------------------------------------------------------------------- by Inception, and the best
def test_a_run_is_judged_as_evaluate_py_judges_it_and_keeps_the_best_and_the_last_weights(
        tmp_path, monkeypatch):
    for module in (inception, reference):
        monkeypatch.setattr(module, "Inception", Small)
    f = np.random.RandomState(0).standard_normal((200, 12))
    real, out = f"{tmp_path}/real.npz", f"{tmp_path}/run"
    np.savez(real, mu=f.mean(0), sigma=np.cov(f, rowvar=False), made="resize clean, coco_crop")
    given = QUICK | dict(teacher="maskgit-tiny", eval_reference=real, out=out, keep=4, lr=1e-3)
    train.train(settle(given | dict(steps=3)))
    kept = {step: content(f"{out}/student_{step:06d}.safetensors") for step in range(4)}
    assert len(set(kept.values())) == 4
    first = evaluations(out)
    assert [row["step"] for row in first] == [0, 1, 2, 3]
    assert first[-1]["resize"] == "clean" and first[-1]["crop"]
    fids = [row["fid"] for row in first]
    assert [row["best"] for row in first] == [int(np.argmin(fids[: n + 1])) for n in range(4)]
    assert content(f"{out}/best.safetensors") == kept[first[-1]["best"]]

    flags = f"--ckpt {out}/ckpt.pt --reference {real} --resize clean --crop --n 12"
    row = command(tmp_path, *flags.split())[0]
    assert row["fid"] == fids[-1] and row["extractor"] == first[-1]["extractor"]

    # resumed, the best so far is known from the log
    train.train(settle(given | dict(steps=5, keep=2, resume=True)))
    rows = evaluations(out)
    fids = [row["fid"] for row in rows]
    assert rows[:4] == first
    assert rows[-1]["best"] == np.argmin(fids) < 4, "expected a case of an earlier best"
    assert content(f"{out}/best.safetensors") == kept[rows[-1]["best"]]
    files = {name for name in os.listdir(out) if name.startswith("student_")}
    assert files == {"student_000004.safetensors", "student_000005.safetensors"}
    net = load_teacher("maskgit-tiny", random_weights=True).net
    load_state(net, read_weights(f"{out}/best.safetensors"), "best")             # for --init_from


def test_the_best_is_of_the_lowest_fid_else_of_the_highest_geneval_else_the_last():
    numbers = (0, 3.0, 0.1), (1, 2.0, 0.2), (2, 2.0, 0.3)
    rows = [dict(step=n, fid=a, geneval=b) for n, a, b in numbers]
    assert looking.best(rows)["step"] == 1
    for row in rows:
        row["fid"] = None
    assert looking.best(rows)["step"] == 2
    rows[1]["geneval"] = 0.3
    assert looking.best(rows)["step"] == 1            # the first of equals
    assert looking.best([dict(step=0), dict(step=1)])["step"] == 1


# -------------------------------------------------------------------------------------- by GenEval
LINES = [
    {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}],
     "prompt": "a red ring"},
    {"tag": "single_object", "include": [{"class": "square", "count": 1}], "prompt": "a square"},
]


def test_geneval_and_clip_score_are_of_the_prompt_that_an_image_was_drawn_for():
    teacher = load_teacher("meissonic-tiny", random_weights=True)
    args = evaluate.flags().parse_args(["--random_weights", "--detector", "shapes"])
    clip, _ = benchmarks.load_clip(args, "clip_g", judges.CLIP_G, "cpu")
    detector = geneval.Detector(*judges.load_detector(args, "cpu"))
    drawn = [("ring", "red"), ("square", "blue"), ("ring", "blue"), ("square", "red"),
             ("ring", "red")]
    pixels = [shapes.render(np.random.default_rng(i), [shape]) for i, shape in enumerate(drawn)]
    img = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    asked = []

    def make_images(some, generator, seconds):
        first = sum(map(len, asked))
        asked.append(some)
        return img[first : first + len(some)]

    row = judges.judge_geneval(teacher, LINES, detector, clip, make_images, 5, batch=2)
    expected = teacher.conditions([LINES[i % 2]["prompt"] for i in range(5)])
    assert torch.equal(torch.cat(asked), expected)
    assert (row["n"], row["geneval"]) == (5, None)
    assert row["colors"] == pytest.approx(2 / 3) and row["single_object"] == 1
    words = [LINES[i % 2]["prompt"] for i in range(5)]
    cosines = benchmarks.clip_cosines(clip, [Image.fromarray(p) for p in pixels], words)
    assert row["clip_score"] == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert row["detector"] == "worlds/shapes.py"


def test_a_run_is_judged_by_all_that_its_flags_name(tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "Inception", Small)
    monkeypatch.setattr(reference, "Inception", Small)
    write_lines(f"{tmp_path}/meta.jsonl", map(json.dumps, LINES))
    np.savez(f"{tmp_path}/real.npz", mu=np.zeros(12), sigma=np.eye(12))
    teacher = load_teacher("meissonic-tiny", random_weights=True)
    given = QUICK | dict(teacher="meissonic-tiny", out=str(tmp_path))
    both = dict(eval_metadata=f"{tmp_path}/meta.jsonl", eval_reference=f"{tmp_path}/real.npz")

    def row(**flags):
        judge = judges.training_judge(settle(given | flags), teacher, ["a ring", "a cross"], "cpu")
        draw = functools.partial(teachers.generate_student, teacher, teacher.net)
        return judge(draw, 12, desc=None)

    joint = row(**both)
    assert joint["fid"] > 0 and joint["resize"] == "legacy_tensorflow" and joint["crop"] is None
    assert 0 <= joint["colors"] <= 1 and abs(joint["clip_score"]) < 1 and "chroma" not in joint
    assert "colors" not in row(eval_reference=both["eval_reference"])
    assert "fid" not in row(eval_metadata=both["eval_metadata"])
    assert "chroma" in row()                          # its world's own judge
    classes = load_teacher("maskgit-tiny", random_weights=True)
    with pytest.raises(UserError, match="--eval_metadata has prompts, and maskgit-tiny draws"):
        judges.training_judge(settle(given | both), classes, None, "cpu")


# ---------------------------------------------------------------- the shipped record of theta_0
@pytest.mark.parametrize("name", ["maskbit-tiny", "meissonic-tiny"])
def test_a_run_from_the_shipped_theta_0_has_its_first_row_from_the_record(name, tmp_path):
    c = settle(dict(teacher=name, out=str(tmp_path), device="cpu"))
    teacher = load_teacher(name)
    ema = load_state(load_teacher(name).net, read_weights(c.init_from), "theta0")

    def first_row(net=ema, **given):
        def measured(make_images, n, desc):
            return {"n": n, "measured": True}

        settings = types.SimpleNamespace(**(vars(c) | given))
        run = types.SimpleNamespace(c=settings, ema=net, teacher=teacher, judge=measured)
        return looking.evaluation(run, 0, "start of this run", None)

    row = first_row()
    assert row["model"] == "start of this run, shipped record" and "measured" not in row
    assert row["images/s"] is None and row["tokens_only/s"] is None
    assert row["weights"] == fingerprint(ema) and row["n"] == c.n_eval
    assert (row["fid"] if name == "maskbit-tiny" else row["geneval"]) is not None
    for other in (dict(n_eval=64), dict(temperature=0.9), dict(noise=0.2), dict(init_ratio=0.7),
                  dict(eval_reference="adm"), dict(init_from="teacher"), dict(net=teacher.net)):
        assert "measured" in first_row(**other), other


# ------------------------------------------------------------------------------- several processes
def test_the_first_process_alone_computes_a_fid_and_tells_the_others(monkeypatch):
    img = torch.randint(0, 256, (20, 3, 8, 8)).to(torch.uint8)
    small = Small()
    real = reference.Reference(np.zeros(small.dim), np.eye(small.dim), None, "real")
    monkeypatch.setattr(fid, "is_main", lambda: False)
    monkeypatch.setattr(fid, "metrics_of", None)                          # a call would fail
    monkeypatch.setattr(fid, "from_first", lambda numbers: numbers or {"fid": 7.0})
    row = fid.image_metrics(lambda i, **_: img[i], torch.arange(20), small, real)
    assert row["fid"] == 7 and row["n"] == 20


# ----------------------------------------------------------------------------------------- curves
def test_numbers_of_a_log_share_a_panel_by_their_beginning(tmp_path):
    rows = [
        dict(step=0, model="start", fid=9.0, precision=0.5, recall=0.1, n=12, seed=0),
        dict(step=1, loss_dimo=1.0, loss_aux=2.0, top1=0.3, lr=1e-6),
        dict(step=2, loss_dimo=float("nan"), loss_aux=1.5, top1=0.4, lr=1e-6),
        dict(step=2, model="student", fid=8.0, precision=0.6, recall=None, n=12, seed=0),
    ]
    write_lines(f"{tmp_path}/log.jsonl", map(json.dumps, rows))
    assert looking.log_panels(f"{tmp_path}/log.jsonl") == {
        "FID": {"fid": [(0, 9.0), (2, 8.0)]},
        "precision and recall": {"precision": [(0, 0.5), (2, 0.6)], "recall": [(0, 0.1)]},
        "loss": {"loss_dimo": [(1, 1.0)], "loss_aux": [(1, 2.0), (2, 1.5)]},
        "top1": {"top1": [(1, 0.3), (2, 0.4)]},
        "lr": {"lr": [(1, 1e-6), (2, 1e-6)]},
    }
    assert looking.log_panels(f"{tmp_path}/none.jsonl") == {}


def test_a_curve_goes_from_its_first_point_to_its_last_within_the_frame(tmp_path):
    falling = {"up": [(0, 5.0), (10, 7.0)], "down": [(0, 7.0), (10, 5.0)]}
    pictures.curves({"loss": falling, "flat": {"flat": [(3, 1.0)]}}, f"{tmp_path}/c.png")
    with Image.open(f"{tmp_path}/c.png") as page:
        pixels = np.array(page.convert("RGB"))
    W, H = pictures.PANEL
    assert pixels.shape == (H, 3 * W, 3)
    for name, ends in (("up", "bottom top"), ("down", "top bottom")):
        color = ImageColor.getrgb(pictures.COLORS[name == "down"])
        ys, xs = np.nonzero((pixels[pictures.TOP - 2 :, :W] == color).all(2))    # below the title
        assert abs(xs.min() - pictures.LEFT) <= 2 and abs(W - pictures.RIGHT - xs.max()) <= 2
        height = {"top": 2, "bottom": H - pictures.BOTTOM - pictures.TOP + 2}
        for x, end in zip((xs.min() + 2, xs.max() - 2), ends.split()):
            assert abs(ys[xs == x].mean() - height[end]) < 4


# ----------------------------------------------------------------------------------------- memory
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc")
def test_glibc_is_told_to_keep_freed_memory_and_agrees(monkeypatch):
    libc, answers = ctypes.CDLL(None), {}

    def mallopt(name, value):
        answers[name] = value, libc.mallopt(name, value)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: types.SimpleNamespace(mallopt=mallopt))
    processes.join_processes("cpu")
    assert answers == {-3: (2**25, 1), -1: (2**31 - 1, 1)}
    answers.clear()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    processes.join_processes("cpu")
    assert answers == {}
