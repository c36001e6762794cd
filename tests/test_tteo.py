"""tteo: tests."""

import functools
import json
import re
import runpy
import sys

import pytest
import torch

import reward
from machinery import files as machinery_files
from machinery.files import ROOT
from teachers import load_teacher


# ---------------------------------------------------------------------------------------- its command line
class Redness(torch.nn.Module):
    """A reward for a test: how red an image is, for prompts about red things."""

    def forward(self, img, prompts):
        assert all("red" in p for p in prompts) and len(prompts) == len(img)
        return {"clip": 10 * (2 * img[:, 0] - img[:, 1] - img[:, 2]).mean((1, 2))}


def run_script(monkeypatch, *argv, load=lambda names, paths={}, **_: Redness()):
    """tteo.py as a script, in this process, with `load` for load_rewards: its exit code."""
    monkeypatch.setattr(reward, "load_rewards", load)
    monkeypatch.setattr(sys, "argv", ["tteo.py", *argv])
    try:
        runpy.run_path(f"{ROOT}/tteo.py", run_name="__main__")
    except SystemExit as err:
        return err.code
    return 0


def test_the_command_line_draws_tells_and_records(monkeypatch, tmp_path, capsys):
    net = load_teacher("maskgen-tiny", random_weights=True).net
    torch.save(net.state_dict(), tmp_path / "student.pt")
    assert run_script(monkeypatch, "--ckpt", f"{tmp_path}/student.pt", "--teacher", "maskgen-tiny", "--random_weights",
                      "--prompt", "a red ball", "--rewards", "clip", "--starts", "3", "--iterations", "3", "--lr", "20",
                      "--checkpointing", "--device", "cpu", "--out", f"{tmp_path}/out") == 0
    row, = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    history = torch.tensor(row["history"])                                                    # (iterations, starts)
    assert history.shape == (3, 3) and row["after"]["loss"] == history.min() < row["before"]["loss"]
    assert row["before"]["loss"] == pytest.approx(history[0].min().item(), abs=1e-6)
    assert history[row["after"]["iteration"], row["after"]["start"]] == history.min()
    assert row["after"]["score"] == pytest.approx(1 - row["after"]["loss"], abs=1e-6) and row["best_of"]["n"] >= 1
    assert row["student"] == machinery_files.fingerprint(net) and (row["noise"], row["init_ratio"]) == (0.1, 0.9)
    assert (tmp_path / "out" / "tteo.png").stat().st_size > 1000 and "with TTEO" in capsys.readouterr().out


def test_a_benchmark_compares_one_start_tteo_and_best_of_n_by_reward_geneval_and_time(monkeypatch, tmp_path, capsys):
    assert run_script(monkeypatch, "--teacher", "meissonic-tiny", "--random_weights", "--benchmark", "12", "--starts", "2",
                      "--iterations", "3", "--lr", "50", "--device", "cpu", "--out", f"{tmp_path}/out",
                      load=reward.load_rewards) == 0
    one, best, more = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert [row["model"] for row in (one, best)] == ["1 start", "TTEO, 2 starts x 3"]
    assert re.fullmatch(r"best of \d+", more["model"]) and int(more["model"].split()[-1]) > 1     # TTEO's time, in starts
    assert one["clip"] < best["clip"] and one["clip"] < more["clip"] and one["n"] == 12
    assert min(row["images/s"] for row in (one, best, more)) > 0 and 0 <= best["geneval"] <= 1
    assert "TTEO, 2 starts x 3" in capsys.readouterr().out and (tmp_path / "out" / "tteo.png").stat().st_size > 1000
    assert run_script(monkeypatch, "--teacher", "maskgen-tiny", "--random_weights", "--benchmark", "12") == 2
    assert "--benchmark is of the world of shapes, which maskgen-tiny does not draw" in capsys.readouterr().err


def test_the_command_line_climbs_real_rewards(monkeypatch, tmp_path):
    tiny = dict(embed_dim=16, vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=8),
                text_cfg=dict(context_length=16, vocab_size=512, width=32, heads=2, layers=1))
    load = functools.partial(reward.load_rewards, configs={"hps": tiny, "pickscore": tiny})
    assert run_script(monkeypatch, "--teacher", "meissonic-tiny", "--random_weights", "--prompt", "a red ball",
                      "--rewards", "hps", "pickscore", "--starts", "2", "--iterations", "2", "--regularize", "0.01",
                      "--clip", "0.1", "--chunk", "1", "--device", "cpu", "--out", f"{tmp_path}", load=load) == 0
    row = json.loads((tmp_path / "results.jsonl").read_text())
    for kind in ("before", "after", "best_of"):
        score = 5 * row[kind]["hps"] + 0.05 * row[kind]["pickscore"]
        assert row[kind]["score"] == pytest.approx(score, abs=1e-5)
        assert row[kind]["loss"] == pytest.approx(5 + 0.05 * 30 - score, abs=1e-5)
    assert row["after"]["loss"] <= row["before"]["loss"] + 1e-6 and row["weights"] == {"hps": 5.0, "pickscore": 0.05}
    assert row["history"][0] != row["history"][1]


def test_what_tteo_cannot_do_is_refused_with_a_sentence(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    tiny = ["--teacher", "maskgen-tiny", "--random_weights"]
    for argv, words in ((["--rewards", "taste"], "taste"), (["--starts", "0"], "expected a number"),
                        ([], "--teacher NAME"), (["--teacher", "nobody"], "unknown teacher"),
                        (["--ckpt", "nowhere.pt"], "nowhere.pt"), (["--teacher", "maskgen-tiny"], "--random_weights"),
                        (["--teacher", "maskbit-tiny", "--random_weights"], "needs a text teacher"),
                        ([*tiny, "--out", f"{tmp_path}/file/out"], "cannot write")):
        argv = ["--out", f"{tmp_path}/out", *argv]
        assert run_script(monkeypatch, "--prompt", "a red ball", "--device", "cpu", *argv) == 2, argv
        assert words in (said := capsys.readouterr().err) and "Traceback" not in said
    assert run_script(monkeypatch, *tiny) == 2 and "--prompt" in capsys.readouterr().err
