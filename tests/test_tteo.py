"""tteo.py as a command: what it draws, prints, records and refuses.

That its loop is ReNO's, and Eq. 11 is climbed from every start, is proved in test_all.py.

    pytest tests/test_tteo.py
"""

import json
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import reward
import tteo
from machinery import processes
from machinery.files import ROOT, fingerprint
from metrics import benchmarks
from metrics.published import published
from teachers import load_teacher, to_bytes

TINY = ["--teacher", "maskgen-tiny", "--random_weights"]
PROMPT = ["--prompt", "a red ball"]


class Redness(torch.nn.Module):
    """A reward for a test: how red an image is, for prompts about red things."""

    def forward(self, img, prompts):
        assert all("red" in prompt for prompt in prompts) and len(prompts) == len(img)
        return {"clip": 10 * (2 * img[:, 0] - img[:, 1] - img[:, 2]).mean((1, 2))}


def redness(spec, names, *files, **settings):
    return Redness()


def run_script(monkeypatch, *argv, load=redness):
    """tteo.py as a script, in this process, with `load` for rewards_for: its exit code."""
    monkeypatch.setattr(reward, "rewards_for", load)
    monkeypatch.setattr(sys, "argv", ["tteo.py", "--device", "cpu", *map(str, argv)])
    try:
        runpy.run_path(f"{ROOT}/tteo.py", run_name="__main__")
    except SystemExit as err:
        return err.code
    return 0


def rows_in(folder, picture="tteo.png"):
    assert (folder / picture).stat().st_size > 1000
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------ one prompt
def test_the_command_line_draws_tells_and_records(monkeypatch, tmp_path, capsys):
    net = load_teacher("maskgen-tiny", random_weights=True).net
    torch.save(net.state_dict(), tmp_path / "student.pt")
    code = run_script(monkeypatch, *TINY, "--ckpt", tmp_path / "student.pt", *PROMPT,
                      "--rewards", "clip", "--starts", 3, "--iterations", 3, "--lr", 20,
                      "--checkpointing", "--out", tmp_path)
    assert code == 0 and "with TTEO" in capsys.readouterr().out
    (row,) = rows_in(tmp_path)
    assert row["student"] == fingerprint(net) and row["teacher"] == "maskgen-tiny"
    assert (row["noise"], row["init_ratio"]) == (0.1, 0.9) and row["best_of"]["n"] >= 1

    history = torch.tensor(row["history"])                                   # (iterations, starts)
    before, after = row["before"], row["after"]
    assert history.shape == (3, 3) and after["loss"] == history.min() < before["loss"]
    assert before["loss"] == pytest.approx(history[0].min().item(), abs=1e-6)
    assert history[after["iteration"], after["start"]] == history.min()
    assert after["score"] == pytest.approx(1 - after["loss"], abs=1e-6)


def test_the_command_line_climbs_real_rewards(monkeypatch, tmp_path):
    def load(spec, names, *files, **settings):
        tiny = dict(
            embed_dim=16,
            vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=8),
            text_cfg=dict(context_length=16, vocab_size=512, width=32, heads=2, layers=1),
        )
        configs = {"hps": tiny, "pickscore": tiny}
        return rewards_for(spec, names, *files, configs=configs, **settings)

    rewards_for = reward.rewards_for
    assert run_script(monkeypatch, "--teacher", "meissonic-tiny", "--random_weights",
                      *PROMPT, "--rewards", "hps", "pickscore", "--starts", 2, "--iterations", 2,
                      "--regularize", 0.01, "--clip", 0.1, "--chunk", 1, "--out", tmp_path,
                      load=load) == 0
    (row,) = rows_in(tmp_path)
    for kind in ("before", "after", "best_of"):
        score = 5 * row[kind]["hps"] + 0.05 * row[kind]["pickscore"]
        assert row[kind]["score"] == pytest.approx(score, abs=1e-5)
        assert row[kind]["loss"] == pytest.approx(5 + 0.05 * 30 - score, abs=1e-5)
    assert row["weights"] == {"hps": 5.0, "pickscore": 0.05}
    assert row["after"]["loss"] <= row["before"]["loss"] + 1e-6
    assert row["history"][0] != row["history"][1]


# ----------------------------------------------------------------------------------- a benchmark
def test_a_benchmark_compares_one_start_tteo_and_best_of_n_by_reward_geneval_and_time(
        monkeypatch, tmp_path, capsys):
    code = run_script(monkeypatch, "--teacher", "meissonic-tiny", "--random_weights",
                      "--benchmark", 6, "--starts", 2, "--iterations", 2, "--lr", 50,
                      "--rewards", "clip", "--out", tmp_path, load=reward.rewards_for)
    assert code == 0 and "TTEO, 2 starts x 2" in capsys.readouterr().out
    one, best, more = rows = rows_in(tmp_path)
    assert (one["model"], best["model"]) == ("1 start", "TTEO, 2 starts x 2")
    assert re.fullmatch(r"best of \d+", more["model"])
    assert int(more["model"].split()[-1]) > 1, "TTEO's time, in starts"
    assert one["clip"] < best["clip"] and one["clip"] < more["clip"] and one["n"] == 6
    assert 0 <= best["geneval"] <= 1
    assert all(row["seconds/prompt"] == pytest.approx(1 / row["images/s"]) for row in rows)


SHAPES = [
    {"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}],
     "prompt": "a red ring"},
    {"tag": "single_object", "include": [{"class": "square", "count": 1}], "prompt": "a square"},
    {"tag": "single_object", "include": [{"class": "cross", "count": 1}], "prompt": "a cross"},
]
METRICS = ["--teacher", "meissonic-tiny", "--random_weights", "--starts", 2, "--iterations", 2,
           "--lr", 50, "--best_of", 2]


def test_geneval_is_drawn_by_one_start_tteo_and_best_of_n_from_the_same_starts(
        monkeypatch, tmp_path, capsys):
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in SHAPES))
    code = run_script(monkeypatch, *METRICS, "--metrics", "geneval", "--metadata",
                      tmp_path / "meta.jsonl", "--detector", "shapes", "--per_prompt", 2,
                      "--seed", 3, "--chunk", 3, "--best_of", 2, 3, "--out", tmp_path,
                      load=reward.rewards_for)
    assert code == 0 and "TTEO, 2 starts x 2" in capsys.readouterr().out
    rows = rows_in(tmp_path, "geneval.png")
    names = ["1 start", "TTEO, 2 starts x 2", "best of 2", "best of 3"]
    assert [row["model"] for row in rows] == names
    for row in rows:
        assert row["n"] == 6 and row["per_prompt"] == 2 and 0 <= row["colors"] <= 1
        assert row["seconds/prompt"] == pytest.approx(2 / row["images/s"])
        assert row["detector"] == "worlds/shapes.py"

    teacher = load_teacher("meissonic-tiny", random_weights=True)
    judges = reward.rewards_for(teacher.spec, teacher.spec.rewards)
    weights = dict.fromkeys(teacher.spec.rewards, 1.0)

    def loss_of(img, prompts):
        return reward.reno_loss(judges(img, prompts), weights)

    def found(part, starts, iterations):              # images 0 to 3 of six, or the last two
        own = np.random.SeedSequence((3, part.start // 4)).generate_state(1).item()
        asked = [line["prompt"] for line in SHAPES for _ in range(2)][part]
        return tteo.tteo(teacher, teacher.net, asked, loss_of, starts, iterations, lr=50.0,
                         generator=torch.Generator().manual_seed(own))

    ways = (1, 1), (2, 2), (2, 1), (3, 1)
    for part in (slice(0, 4), slice(4, 6)):
        one, best, plain, more = each = [found(part, *way) for way in ways]
        assert torch.equal(best.every.history[0], plain.every.history[0])        # the same starts
        assert (best.loss <= plain.loss).all() and not torch.equal(best.img, plain.img)
        for row, way in zip(rows, each):
            for i, img in enumerate(to_bytes(way.img, teacher.spec), part.start):
                path = f"{row['folder']}/{i // 2:05d}/samples/{i % 2:05d}.png"
                pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
                # --chunk adds in another order
                assert (pixels.int() - img.int()).abs().max() <= 1


def test_hps_of_tteo_is_scored_in_a_folder_for_each_way(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks, "PER_STYLE", 10)
    for style in benchmarks.HPS_STYLES:
        lines = [f"{style} number {i}" for i in range(10)]
        (tmp_path / f"{style}.json").write_text(json.dumps(lines))
    assert run_script(monkeypatch, *METRICS, "--metrics", "hps", "--metadata", tmp_path,
                      "--rewards", "clip", "--batch", 40, "--out", tmp_path / "out",
                      load=reward.rewards_for) == 0
    rows = rows_in(tmp_path / "out", "hps.png")
    assert len({row["hps"] for row in rows}) == len({row["folder"] for row in rows}) == 3
    for row in rows:
        assert row["n"] == 40 and row["hps_version"] == "v2.1"
        assert row["seconds/prompt"] == pytest.approx(1 / row["images/s"])
        assert len(list((tmp_path / "out" / "hps").glob("*/*/*.jpg"))) == 120


def test_the_papers_numbers_stand_beside_its_own_setting_alone_and_each_hps_beside_its_version():
    row = dict(teacher="maskgen", kind="TTEO-4x4", geneval=0.6, hps=30.0)
    paper = {"of": "TTEO-4x4", "table": "Tab.3", "geneval": 0.63, "hps": 31.95}
    assert published(row, {}) == [paper]
    assert published(row | {"kind": "TTEO-4x2"}, {}) == []
    assert published(row | {"kind": "best-of-8"}, {}) == []
    row = {"teacher": "maskgen", "kind": "teacher", "steps": 16, "hps_v2.0": 27.0}
    assert published(row, {}) == [{"of": "16", "table": "Tab.13", "hps_v2.0": 27.58}]


# ------------------------------------------------------------------------------------- sentences
def test_one_prompt_is_not_drawn_by_several_processes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    assert run_script(monkeypatch, *TINY, *PROMPT, "--out", tmp_path) == 2
    assert "without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    ([*PROMPT, "--rewards", "taste"], "taste"),
    ([*PROMPT, "--starts", "0"], "--starts: expected a whole number of 1 or more, got 0"),
    (PROMPT, "--teacher NAME"),
    ([*PROMPT, "--teacher", "nobody"], "unknown teacher"),
    ([*PROMPT, "--ckpt", "nowhere.pt"], "nowhere.pt"),
    ([*PROMPT, "--teacher", "maskgen-tiny"], "--random_weights"),
    ([*PROMPT, "--teacher", "maskbit-tiny", "--random_weights"], "needs a text teacher"),
    ([*PROMPT, *TINY, "--out", "OUT/file/out"], "cannot write: name another folder by --out"),
    (TINY, "--prompt"),
    ([*TINY, "--benchmark", "12"],
     "--benchmark is of the world of shapes, which maskgen-tiny does not draw"),
    ([*TINY, "--metrics", "geneval"], "--metrics geneval needs --metadata PATH"),
    ([*PROMPT, *TINY, "--detector", "shapes"], "--detector shapes belongs to --metrics geneval"),
    ([*PROMPT, *TINY, "--best_of", "8"], "--best_of belongs to a benchmark"),
])
def test_what_tteo_cannot_do_is_refused_with_a_sentence(
        monkeypatch, tmp_path, capsys, flags, words):
    (tmp_path / "file").write_text("in the way")
    flags = [flag.replace("OUT", str(tmp_path)) for flag in flags]
    assert run_script(monkeypatch, "--out", tmp_path / "out", *flags) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
