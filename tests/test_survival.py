"""survival: tests."""

import json
import math
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import teachers
import train
import tteo
from data import check
from machinery import optim
from machinery.errors import UserError
from machinery.files import ROOT
from teachers import load_teacher
from tests.common import nano_run, run, same, NETS, other_world, one_of_two, lines


# ---------------------------------------------------------------------------------------------------------------------
# Speed: nothing waits, nothing breaks the graph, and a student leaves as one file.
def test_an_update_that_is_not_finite_changes_nothing_and_the_host_does_not_look():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = torch.optim.Adam([p], 0.1, fused=True)
    for g, inf in ((1.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0)):
        before, state = p.detach().clone(), {k: v.clone() for k, v in opt.state[p].items()}
        p.grad = torch.full((2,), g)
        norm, found = optim.update(opt, [p], 1.0, 0.1)
        assert found.item() == inf and bool(torch.isfinite(norm)) == (inf == 0) and p.grad is None
        assert torch.equal(p.detach(), before) == (inf == 1)
        assert inf == 0 or all(torch.equal(opt.state[p][k], v) for k, v in state.items())
    assert opt.state[p]["step"] == 2


def test_exported_students_draw_the_same_images_without_this_repository(tmp_path):
    start, expected = dict(init_ratio=0.6, noise=0.1, temperature=1.0), {}
    for name in ("maskbit-tiny", "meissonic-tiny", "maskgen-tiny"):
        teacher = load_teacher(name, random_weights=True)
        teachers.export(teacher, teacher.net, f"{tmp_path}/{name}.pt2", **start)
        rows = teacher.conditions(["a cat", "two dogs", "a cup"] if teacher.text else None)[:3]
        expected[name] = teachers.generate_student(teacher, teacher.net, rows, generator=torch.Generator().manual_seed(5), **start)
        torch.save(rows, f"{tmp_path}/{name}.rows")
    code = ("import torch\n"
            f"for name in {list(expected)}:\n"
            "    rows = torch.load(f'{name}.rows'); torch.manual_seed(5)\n"
            "    torch.save(torch.export.load(f'{name}.pt2').module()(rows), f'{name}.img')")
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    for name, img in expected.items():
        assert torch.equal(torch.load(f"{tmp_path}/{name}.img"), img), name


def test_the_four_lines_of_the_readme_draw_from_a_checkpoint_and_the_command_exports_it(tmp_path, capsys):
    state = run(tmp_path, teacher="maskbit-tiny", recipe=None, steps=1, out=f"{tmp_path}/run", batch=4, random_weights=True,
                init_from="teacher", data="assets/fashion/tokens.npz", eval_every=0, head_width=16, head_mlp=16)
    with open(os.path.join(ROOT, "README.md")) as f:
        lines = re.search(r"```python\n(.*?)```", f.read(), re.S).group(1)
    assert len(lines.splitlines()) == 4
    known = {}
    exec(lines.replace("out/run/ckpt.pt", f"{tmp_path}/run/ckpt.pt"), known)
    assert known["images"].shape == (8, 1, 32, 32) and known["images"].dtype == torch.uint8
    assert known["start"] == {k: state["config"][k] for k in ("init_ratio", "noise", "temperature")}
    ask = lambda *more: evaluate.main(evaluate.flags().parse_args(["--out", f"{tmp_path}/e", "--device", "cpu", *more]))
    ask("--ckpt", f"{tmp_path}/run/ckpt.pt", "--export", f"{tmp_path}/student.pt2")
    torch.manual_seed(3)
    img = torch.export.load(f"{tmp_path}/student.pt2").module()(torch.arange(5))
    drawn = teachers.generate_student(known["teacher"], known["net"], torch.arange(5), generator=torch.Generator().manual_seed(3),
                                **known["start"])
    assert torch.equal(img, drawn)
    with pytest.raises(UserError, match="--export .*none/x: cannot write there"):
        ask("--ckpt", f"{tmp_path}/run/ckpt.pt", "--export", f"{tmp_path}/none/x")
    with pytest.raises(UserError, match="writes one student"):
        ask("--export", f"{tmp_path}/x")


def test_a_profile_adds_up_and_writes_nothing(tmp_path, capsys):
    out = f"{tmp_path}/out"
    c = train.settle(dict(teacher="maskbit-tiny", gan=True, profile=2, batch=4, device="cpu", dtype="fp32", out=out),
                     train.flags()[1])
    row = train.train(c)
    assert sum(row["phases"].values()) == pytest.approx(row["ms"]) and not os.path.exists(out)
    assert row["share_of_ceiling"] == pytest.approx(row["tflop_per_s"] / row["ceiling_tflop_per_s"])
    B = 4
    linear = lambda m: sum(p.numel() for p in m.parameters() if p.ndim == 2)
    assert row["tflop"] * 1e12 > 12 * 2 * B * 64 * linear(load_teacher("maskbit-tiny").net.blocks)     # 12 passes or more
    assert 0 < row["not_matmul"] < 1 and "passes" in capsys.readouterr().out


def test_compiled_networks_have_no_graph_breaks_and_are_compiled_once(tmp_path, monkeypatch):
    from torch._dynamo.testing import CompileCounter
    frames = []
    for steps in (3, 6):
        torch._dynamo.reset()
        counter = CompileCounter()
        monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: self._set(counter, kw), raising=True)
        monkeypatch.setattr(nn.Module, "_set", lambda self, backend, kw: setattr(
            self, "_compiled_call_impl", torch.compile(self._call_impl, backend=backend, fullgraph=True, **kw)), raising=False)
        run(tmp_path, steps=steps, compile=True, overwrite=True, feature_noise=0.1, dtype="bf16")
        frames.append(counter.frame_count)
    # student; auxiliary in Eq. 2, in Eq. 1; teacher guided, for Eq. 8, for Eq. 7; heads for Eq. 8, for Eq. 7
    assert frames == [8, 8]


def test_the_host_reads_nothing_of_the_device_between_log_lines(tmp_path, monkeypatch):
    """On a GPU each such read waits for all that is queued. CPU tensors have the same calls, so they are counted here."""
    reads = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
                                        torch.ops.aten.equal, torch.ops.aten.is_nonzero):
                reads.append(str(func))
            return func(*args, **(kwargs or {}))
    true = train.draw_step

    def draw_step(c, step, *args):
        reads.append(step)
        return true(c, step, *args)
    monkeypatch.setattr(train, "draw_step", draw_step)
    with Count():
        run(tmp_path, steps=5, log_every=5, save_every=5, accum=2)
    between = reads[reads.index(0) : len(reads) - reads[::-1].index(4)]                # the last step logs, saves
    assert between == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert "aten._local_scalar_dense.default" in reads[len(between):]
# ---------------------------------------------------------------------------------------------------------------------
# Runs that survive. KILLS=20 pytest test_all.py -k kill is the long form.
KILLS = int(os.environ.get("KILLS", 0))
STEPS = 12 * KILLS or 30
SHORT_RUN = (f"--teacher maskbit-tiny --random_weights --init_from teacher --gan --steps {STEPS} --batch 4 --head_width 16 --head_mlp 16 "
             "--student_start 3 --eval_every 0 --save_every 3 --log_every 1 --dropout 0.1 --device cpu").split()


def end_of(out):
    """What a run came to: networks, optimizers, and its log but for the clock."""
    ckpt = torch.load(f"{out}/ckpt.pt", weights_only=True)
    rows = [json.loads(line) for line in open(f"{out}/log.jsonl")]
    return {k: ckpt[k] for k in NETS}, [{k: v for k, v in row.items() if k != "img_s"} for row in rows]


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    command = lambda out: [sys.executable, "train.py", *SHORT_RUN, "--out", f"{tmp_path}/{out}"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    whole = subprocess.Popen(command("whole"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    draw, killed, log = np.random.default_rng(0), 0, f"{tmp_path}/cut/log.jsonl"
    while True:
        more = ["--resume"] * os.path.exists(f"{tmp_path}/cut/ckpt.pt")
        process, before = subprocess.Popen(command("cut") + (more or ["--overwrite"]), cwd=ROOT, stdout=subprocess.DEVNULL,
                                           stderr=subprocess.DEVNULL, env=env), lines(log)
        if killed < (KILLS or 2):
            while process.poll() is None and lines(log) <= min(before, STEPS - 1):   # a step further, then any moment
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.6))
            process.kill()
            killed += 1
        if process.wait() == 0:
            break
        assert process.returncode == -9
    assert whole.wait() == 0
    assert same(end_of(f"{tmp_path}/whole"), end_of(f"{tmp_path}/cut"))


def test_two_processes_of_which_one_is_killed_go_on_by_themselves_and_end_the_same(tmp_path):
    def start(out):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   f"--max-restarts={KILLS or 1}", "train.py", *SHORT_RUN, "--out", f"{tmp_path}/{out}"]
        return subprocess.Popen(command, cwd=ROOT, stdout=open(f"{tmp_path}/{out}.txt", "w"), stderr=subprocess.STDOUT,
                                env=dict(os.environ, OMP_NUM_THREADS="1"))

    def ended(process, out):
        assert process.wait(120) == 0, open(f"{tmp_path}/{out}.txt").read()[-3000:]
    ended(start("whole"), "whole")
    draw, log, process = np.random.default_rng(1), f"{tmp_path}/cut/log.jsonl", start("cut")
    for _ in range(KILLS or 1):
        before = lines(log)
        while process.poll() is None and lines(log) <= before + 2:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.6))
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        if workers and process.poll() is None:
            os.kill(int(workers[draw.integers(len(workers))]), 9)
    ended(process, "cut")
    assert same(end_of(f"{tmp_path}/whole"), end_of(f"{tmp_path}/cut"))


def test_a_run_whose_peer_dies_ends_with_a_sentence_within_seconds(tmp_path):
    """Without torchrun, which would stop it: two processes, one is killed, the other says so."""
    port, start = 29547, time.time()
    peers = [subprocess.Popen([sys.executable, "train.py", *SHORT_RUN, "--steps", "4000", "--out", f"{tmp_path}/out"], cwd=ROOT,
                              stdout=subprocess.DEVNULL, stderr=open(f"{tmp_path}/{rank}.txt", "w"),
                              env=dict(os.environ, OMP_NUM_THREADS="1", WORLD_SIZE="2", RANK=str(rank), MASTER_ADDR="localhost",
                                       MASTER_PORT=str(port))) for rank in range(2)]
    while not os.path.exists(f"{tmp_path}/out/ckpt.pt") and all(p.poll() is None for p in peers) and time.time() < start + 90:
        time.sleep(0.05)
    peers[1].kill()
    assert peers[0].wait(60) == 3
    said = open(f"{tmp_path}/0.txt").read()
    assert "train.py: another process is gone" in said and "--resume" in said and "Traceback" not in said


def test_sharded_optimizers_make_the_same_run_and_checkpoints_for_any_number_of_processes(tmp_path):
    whole = run(tmp_path, out=f"{tmp_path}/whole")
    zero = dict(out=f"{tmp_path}/zero", zero=True)
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), 29533, dict(zero, steps=4), dict(zero, resume=True)), nprocs=2)
    two = torch.load(f"{tmp_path}/zero/ckpt.pt", weights_only=True)
    for k in ("student", "aux", "disc", "ema"):
        assert all(torch.allclose(whole[k][n], two[k][n], atol=2e-5) for n in whole[k]), k
    state = lambda ckpt: [s["exp_avg"] for k in ("student", "aux", "disc") for s in ckpt["optimizers"][k]["state"].values()]
    assert len(state(two)) == len(state(whole)) > 0
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(state(whole), state(two)))
    on = run(tmp_path, out=f"{tmp_path}/zero", resume=True, steps=8)             # by one process, not sharded
    assert on["step"] == 8 and all(torch.isfinite(t).all() for t in on["student"].values())
    with pytest.raises(UserError, match="--zero shards the state of adam and adamw"):
        nano_run(tmp_path, zero=True, optimizer="muon")


def test_damaged_data_and_checkpoints_of_other_versions_are_answered_with_a_sentence(tmp_path, monkeypatch, capsys):
    data = other_world(f"{tmp_path}/data", "maskgit-tiny")
    settle = lambda **kw: train.settle(dict(teacher="maskgit-tiny", random_weights=True, gan=True, data=data, device="cpu",
                                            out=f"{tmp_path}/o", **kw), train.flags()[1])
    x, whole = np.load(f"{data}/tokens.npy"), open(f"{data}/tokens.npy", "rb").read()
    for content, words in ((x.astype(np.float32) * np.nan, "expected integers, got tokens of float32"),
                           (np.where(np.arange(len(x))[:, None, None] == 3, 200, x).astype(np.uint8), "a token 200 .* below 64")):
        np.save(f"{data}/tokens.npy", content)
        with pytest.raises(UserError, match=words):
            train.train(settle(steps=6, overwrite=True))
    with open(f"{data}/tokens.npy", "wb") as f:
        f.write(whole[:-100])                                              # cut short
    with pytest.raises(UserError, match="cannot read real tokens"):
        train.train(settle())
    other = {**run(tmp_path, steps=2), "format": 0}
    torch.save(other, f"{tmp_path}/run/ckpt.pt")
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", f"{tmp_path}/run", "--resume"])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2 and "another version of train.py (format 0, here 1)" in capsys.readouterr().err


def test_a_resumed_run_writes_where_the_flags_say_and_not_where_the_checkpoint_does(tmp_path, monkeypatch):
    state = run(tmp_path, steps=2, out=f"{tmp_path}/out/run")
    state["config"].update(out=f"{tmp_path}/elsewhere", text_cache=f"{tmp_path}/cache", steps=3)
    torch.save(state, f"{tmp_path}/out/run/ckpt.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume"])              # --out has its default, out/run
    train.main()
    assert torch.load(f"{tmp_path}/out/run/ckpt.pt", weights_only=True)["step"] == 3
    assert not os.path.exists(f"{tmp_path}/elsewhere") and not os.path.exists(f"{tmp_path}/cache")


def test_without_a_compiler_the_way_out_is_named(tmp_path):
    done = subprocess.run([sys.executable, "train.py", *SHORT_RUN, "--compile", "--out", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, env=dict(os.environ, CXX="/bin/false", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "train.py: --compile failed" in done.stderr and "--no-compile" in done.stderr


def test_a_new_run_in_an_old_folder_leaves_no_older_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    run(tmp_path, steps=4)
    monkeypatch.setattr(train, "draw_step", lambda *_: 1 / 0)               # dies before its first checkpoint
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, overwrite=True)
    assert not os.path.exists(f"{tmp_path}/run/ckpt.pt")
FUZZ = int(os.environ.get("FUZZ", 8))


@pytest.mark.parametrize("script", ["train", "evaluate", "tteo", "check"])
def test_whatever_the_flags_the_answer_is_a_result_or_a_sentence(script, tmp_path, monkeypatch, capsys):
    """FUZZ=200 pytest test_all.py -k whatever is the long form."""
    module, draw = dict(train=train, evaluate=evaluate, tteo=tteo, check=check)[script], np.random.default_rng(FUZZ)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "text").write_text("a cat\n")
    numbers, words = ["-1", "0", "-7", "x", "1.5", "", "nan", "inf", "1e300", "3"], ["", "nope", "/dev/null", "..", "🙂", "\x01",
        "a" * 300, *(f"{tmp_path}/{name}" for name in ("binary", "text", "none"))]
    base = dict(train="--random_weights --init_from teacher --steps 2 --batch 4 --head_width 16 --head_mlp 16 --eval_every 0 "
                      "--student_start 0 --log_every 1 --device cpu --teacher",
                evaluate="--random_weights --steps 1 --n 8 --device cpu --teacher",
                tteo="--ckpt assets/shapes/theta0.safetensors --starts 2 --iterations 1 --device cpu --prompt cat --teacher",
                check="--random_weights --device cpu --check")[script]
    parser = train.flags()[0] if script == "train" else module.flags()
    flags = [a for a in parser._actions if a.option_strings and a.dest not in ("help", "real", "n")]

    def word(a):
        pool = [*map(str, a.choices), "nope"] if a.choices else words if a.type in (None, str) else numbers
        return pool[draw.integers(len(pool))]
    for i in range(FUZZ):
        names = ["maskgen-tiny", "meissonic-tiny", "maskbit-tiny", "nope"]
        argv = [*base.split(), names[draw.integers(4)]] + ["--nonsense"] * (draw.random() < 0.1)
        argv += ["--out", f"{tmp_path}/{i}"] * (script != "check")
        for a in draw.choice(flags, draw.integers(1, 4), replace=False):
            argv += [a.option_strings[0], *(word(a) for _ in range(0 if a.nargs == 0 else a.nargs if isinstance(a.nargs, int) else 1))]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
        monkeypatch.chdir(tmp_path)
        try:
            if script == "train":
                train.main()
            else:
                getattr(module, "main", check.check)(parser.parse_args())
        except (SystemExit, UserError) as end:
            assert isinstance(end, UserError) or end.code == 2, argv
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err, argv
