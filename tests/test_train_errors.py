"""What train.py cannot do is answered with a sentence, before any work; and so is whatever else is typed."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import evaluate
import train
import tteo
from data import check
from machinery.errors import UserError, guard
from machinery.files import ROOT
from recipes.settings import flags, settle
from tests.runs import made_up_data, run
from tests.test_survival import SHORT_RUN


def answer(monkeypatch, capsys, *argv, script="train.py", main=train.main):
    """(exit code, standard error) of a command, run in this process."""
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as end:
        guard(main)
    return end.value.code, capsys.readouterr().err


NANO = "--teacher nano --data assets/fashion/tokens.npz"
SENTENCES = [
    ("--teacher nope", "argument --teacher: invalid choice: 'nope' (choose from"),
    ("--recipe nope", "argument --recipe: invalid choice: 'nope'"),
    ("--recipe maskgit --teacher maskbit", "--recipe maskgit is for --teacher maskgit, not maskbit"),
    (f"{NANO} --accum 2 --batch 9", "--batch 9 does not divide by 1 processes x 2 accumulation"),
    ("--teacher nano --gan", "--gan compares with real images and found none: add --data FOLDER"),
    (f"{NANO} --w_dimo 0 --no-gan", "nothing to train"),
    (f"{NANO} --lr -1", "argument --lr: expected a number above 0, got -1"),
    (f"{NANO} --lr nan", "argument --lr: expected a number above 0, got nan"),
    (f"{NANO} --cfg inf", "argument --cfg: expected a finite number, got inf"),
    (f"{NANO} --steps 0", "argument --steps: expected a whole number of 1 or more, got 0"),
    (f"{NANO} --init_ratio 1.5", "argument --init_ratio: expected a number from 0 to 1, got 1.5"),
    (f"{NANO} --gan_ratio 0.5 0.2", "--gan_ratio 0.5 0.2: expected 0 <= A <= B <= 1"),
    (f"{NANO} --share_passes --redraw", "--share_passes lets Eq. 1 take the pass of Eq. 2"),
    (f"{NANO} --share_passes --soft_state", "with --soft_state the two read different inputs"),
    (f"{NANO} --zero --optimizer muon", "--zero shards the state of adam and adamw"),
    ("--teacher maskbit-tiny --reward", "--reward judges pictures by their prompts, and maskbit-tiny "
                                        "draws classes"),
    ("--teacher meissonic-tiny --reward --rewards beauty=1", "unknown reward 'beauty'"),
    ("--teacher maskgen", "maskgen draws what it is told: add --prompts FILE"),
    ("--resume --out {0}/none", "no weights at"),
    ("--teacher maskgen-tiny --random_weights --prompts {0}/none.txt", "none.txt: cannot read"),
    ("--teacher maskgen-tiny --random_weights --prompts {0}/empty.txt", "empty.txt: no prompt in it"),
    ("--teacher maskgen-tiny --random_weights --prompts {0}/latin.txt", "latin.txt: cannot read"),
    ("--teacher nano --data {0}/missing", "cannot read real tokens"),
    ("--teacher nano --data {0}/other.npz", "expected tokens (n, 16, 2)"),
]


@pytest.mark.parametrize("command, words", SENTENCES, ids=[command for command, _ in SENTENCES])
def test_what_cannot_be_done_is_answered_with_a_sentence(
        command, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    np.savez(tmp_path / "other.npz", tokens=np.zeros((5, 9, 1), np.uint8),
             labels=np.zeros(5, np.uint8))
    argv = command.format(tmp_path).split()
    if "--out" not in argv:
        argv += ["--out", f"{tmp_path}/out"]
    code, said = answer(monkeypatch, capsys, *argv, "--device", "cpu")
    assert code == 2 and words in said and "Traceback" not in said


def test_checkpoints_of_other_runs_and_versions_are_answered_with_a_sentence(
        tmp_path, monkeypatch, capsys):
    state = run(tmp_path, steps=2)
    out = f"{tmp_path}/run"
    code, said = answer(monkeypatch, capsys, "--resume", "--out", out, "--teacher", "maskbit")
    assert code == 2 and "is a run with --teacher nano, and now --teacher is maskbit" in said
    code, said = answer(monkeypatch, capsys, "--teacher", "maskbit", "--no-gan", "--out", out)
    assert code == 2 and "already holds a run" in said
    torch.save(state | dict(format=0), f"{out}/ckpt.pt")
    code, said = answer(monkeypatch, capsys, "--resume", "--out", out)
    assert code == 2 and "another version of train.py (format 0, here 1)" in said
    torch.save(state["ema"], f"{out}/ckpt.pt")
    code, said = answer(monkeypatch, capsys, "--resume", "--out", out)
    assert code == 2 and "holds weights, not a checkpoint of train.py" in said


def test_damaged_data_is_answered_with_a_sentence(tmp_path):
    data = made_up_data(f"{tmp_path}/data", "maskgit-tiny")
    given = dict(teacher="maskgit-tiny", random_weights=True, gan=True, data=data, device="cpu",
                 eval_every=0, out=f"{tmp_path}/o", overwrite=True, steps=6)
    with open(f"{data}/tokens.npy", "rb") as f:
        whole = f.read()
    x = np.load(f"{data}/tokens.npy")
    too_large = x.copy()
    too_large[3] = 200
    for content, words in ((x.astype(np.float32) * np.nan, "expected integers, got tokens of float32"),
                           (too_large, "a token 200 .* below 64")):
        np.save(f"{data}/tokens.npy", content)
        with pytest.raises(UserError, match=words):
            train.train(settle(given))
    with open(f"{data}/tokens.npy", "wb") as f:
        f.write(whole[:-100])                         # cut short
    with pytest.raises(UserError, match="cannot read real tokens"):
        train.train(settle(given))


def test_prompts_that_do_not_fit_the_real_tokens_are_answered_with_a_sentence(tmp_path):
    data = made_up_data(f"{tmp_path}/data", "maskgen-tiny")
    given = dict(teacher="maskgen-tiny", random_weights=True, device="cpu", out=f"{tmp_path}/o",
                 gan=True, data=data)
    with open(f"{data}/prompts.txt", "w") as f:
        f.write("only one\n")
    with pytest.raises(UserError, match="label 4, but 1 prompts"):
        train.train(settle(given))
    os.remove(f"{data}/prompts.txt")
    with pytest.raises(UserError, match="cannot read real tokens with their prompts .*prompts.txt"):
        train.train(settle(given))


def test_without_a_compiler_the_way_out_is_named(tmp_path):
    env = dict(os.environ, CXX="/bin/false", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1",
               TORCHINDUCTOR_COMPILE_THREADS="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "train.py", *SHORT_RUN, "--compile", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "train.py: --compile failed" in done.stderr and "--no-compile" in done.stderr


# ---------------------------------------------------------------------------------------- fuzzing
FUZZ = int(os.environ.get("FUZZ", 8))
NAMES = ["maskgen-tiny", "meissonic-tiny", "maskbit-tiny", "nope"]
NUMBERS = ["-1", "0", "-7", "x", "1.5", "", "nan", "inf", "1e300", "3"]
WORDS = ["", "nope", "/dev/null", "..", "🙂", "\x01", "a" * 300, "{0}/binary", "{0}/text", "{0}/none"]
SCRIPTS = {
    "train.py": (
        "--random_weights --init_from teacher --steps 2 --batch 4 --head_width 16 --head_mlp 16 "
        "--eval_every 0 --student_start 0 --log_every 1 --device cpu --out {0}/out --teacher",
        flags().parser, lambda args: train.main()),
    "evaluate.py": (
        "--random_weights --steps 1 --n 8 --device cpu --out {0}/out --teacher",
        evaluate.flags(), evaluate.main),
    "tteo.py": (
        "--ckpt assets/shapes/theta0.safetensors --starts 2 --iterations 1 --device cpu "
        "--out {0}/out --prompt cat --teacher",
        tteo.flags(), tteo.main),
    "check.py": ("--random_weights --device cpu", check.flags(), check.check),
}


def random_flag(draw, flag, folder):
    """A flag with values that may or may not make sense."""
    if flag.choices:
        pool = [*map(str, flag.choices), "nope"]
    elif flag.type in (None, str):
        pool = [word.format(folder) for word in WORDS]
    else:
        pool = NUMBERS
    values = flag.nargs if isinstance(flag.nargs, int) else 1
    return [flag.option_strings[0], *(pool[draw.integers(len(pool))] for _ in range(values))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_whatever_the_flags_the_answer_is_a_result_or_a_sentence(
        script, tmp_path, monkeypatch, capsys):
    """FUZZ=200 pytest -k whatever is the long form."""
    base, parser, main = SCRIPTS[script]
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "text").write_text("a cat\n")
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(FUZZ)
    known = [flag for flag in parser._actions
             if flag.option_strings and flag.dest not in ("help", "real", "n")]
    for i in range(FUZZ):
        argv = [*base.format(f"{tmp_path}/{i}").split(), NAMES[draw.integers(4)]]
        if draw.random() < 0.1:
            argv.append("--nonsense")
        for flag in draw.choice(known, draw.integers(1, 4), replace=False):
            argv += random_flag(draw, flag, tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *argv])
        try:
            guard(lambda: main(parser.parse_args()))
        except SystemExit as end:
            assert end.code == 2, argv
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err, argv
