"""Runs that are killed at any moment end with the same bits. KILLS=20 pytest -k kill is the long form."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

import train
from machinery import checkpoint
from machinery.errors import UserError, guard
from machinery.files import ROOT
from tests.runs import SERVER, exit_code, log_of, run, same, same_run, start, two_started

KILLS = int(os.environ.get("KILLS", 0))
STEPS = 12 * KILLS or 30
SHORT_RUN = (
    f"--teacher maskbit-tiny --random_weights --init_from teacher --gan --steps {STEPS} --batch 4 "
    "--head_width 16 --head_mlp 16 --student_start 3 --eval_every 0 --save_every 3 --log_every 1 "
    "--dropout 0.1 --device cpu").split()


def lines_in(path):
    """How many lines a file has, 0 without one."""
    if not os.path.exists(path):
        return 0
    with open(path) as f:
        return sum(1 for _ in f)


def wait_for(condition, running, seconds=300):
    end = time.time() + seconds
    while not condition() and running() and time.time() < end:
        time.sleep(0.01)


def some_steps_and_a_moment(log, draw, running):
    """Wait until a log has a few more lines, then a part of a step: most steps are yet to come."""
    enough = lines_in(log) + draw.integers(1, 6)
    wait_for(lambda: lines_in(log) >= enough, running)
    time.sleep(draw.uniform(0, 0.1))


def assert_same_end(one, two):
    """Networks, optimizers and logs of two finished runs agree to the bit."""
    ckpts = [torch.load(f"{out}/ckpt.pt", weights_only=True) for out in (one, two)]
    assert same_run(*ckpts) and same(log_of(one), log_of(two))


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    whole, cut = f"{tmp_path}/whole", f"{tmp_path}/cut"
    undisturbed = start("train.py", *SHORT_RUN, "--out", whole)
    draw, landed = np.random.default_rng(0), 0
    while True:
        go_on = "--resume" if os.path.exists(f"{cut}/ckpt.pt") else "--overwrite"
        process = start("train.py", *SHORT_RUN, "--out", cut, go_on)
        if landed < (KILLS or 2):
            some_steps_and_a_moment(f"{cut}/log.jsonl", draw, process.is_alive)
            process.kill()
        code = exit_code(process)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        landed += 1
    assert landed > 0 and exit_code(undisturbed) == 0
    assert_same_end(whole, cut)


def test_two_processes_of_which_one_is_killed_go_on_by_themselves_and_end_the_same(tmp_path):
    undisturbed = two_started("train.py", *SHORT_RUN, "--out", f"{tmp_path}/whole",
                              log=f"{tmp_path}/whole")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                f"--max-restarts={KILLS or 1}", "train.py", *SHORT_RUN, "--out", f"{tmp_path}/cut"]
    with open(f"{tmp_path}/cut.txt", "w") as f:
        process = subprocess.Popen(torchrun, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"),
                                   stdout=f, stderr=subprocess.STDOUT)
    draw, landed = np.random.default_rng(1), 0
    for _ in range(KILLS or 1):
        some_steps_and_a_moment(f"{tmp_path}/cut/log.jsonl", draw, lambda: process.poll() is None)
        children = ["pgrep", "-P", str(process.pid)]
        workers = subprocess.run(children, capture_output=True, text=True).stdout.split()
        if workers and process.poll() is None:
            os.kill(int(workers[draw.integers(len(workers))]), signal.SIGKILL)
            landed += 1
    assert landed > 0
    with open(f"{tmp_path}/cut.txt") as f:
        assert process.wait(300) == 0, f.read()[-3000:]
    assert [exit_code(peer) for peer in undisturbed] == [0, 0]
    assert_same_end(f"{tmp_path}/whole", f"{tmp_path}/cut")


def test_a_run_whose_peer_dies_ends_with_a_sentence_within_seconds(tmp_path):
    """Without torchrun, which would stop it: two processes, one is killed, the other says so."""
    peers = two_started("train.py", *SHORT_RUN, "--steps", "4000", "--out", f"{tmp_path}/out",
                        log=f"{tmp_path}/")
    wait_for(lambda: os.path.exists(f"{tmp_path}/out/ckpt.pt"), peers[0].is_alive)
    peers[1].kill()
    assert exit_code(peers[0]) == 3
    with open(f"{tmp_path}/0.txt") as f:
        said = f.read()
    assert "train.py: another process is gone" in said
    assert "--resume" in said and "Traceback" not in said


def full_disk(state, f):
    f.write(b"half of a checkpoint")
    raise OSError(28, "No space left on device")


def dies_while_saving(path, state):
    def save(state, f):
        f.write(b"half")
        f.flush()
        os._exit(9)

    torch.save = save
    checkpoint.save_checkpoint(path, state)


def test_a_full_disk_or_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = str(tmp_path / "ckpt.pt")
    checkpoint.save_checkpoint(path, dict(step=1))
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="disk full.*--resume"):
        checkpoint.save_checkpoint(path, dict(step=2))
    assert torch.load(path, weights_only=True) == dict(step=1)
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    process = SERVER.Process(target=dies_while_saving, args=(path, dict(step=3)))
    process.start()
    assert exit_code(process) == 9
    assert torch.load(path, weights_only=True) == dict(step=1)


def test_a_checkpoint_is_a_copy_written_while_training_goes_on_and_an_error_of_it_ends_the_run(
        tmp_path, monkeypatch):
    path, writer, weights = str(tmp_path / "ckpt.pt"), checkpoint.Writer(), torch.zeros(3)
    trained, save = threading.Event(), torch.save

    def slow_disk(state, f):
        assert trained.wait(60)
        save(state, f)

    monkeypatch.setattr(torch, "save", slow_disk)
    writer.save(path, dict(step=1, nets=[dict(weights=weights)]))
    weights += 1
    writer.check()
    assert not os.path.exists(path)
    trained.set()
    writer.wait()
    kept = dict(step=1, nets=[dict(weights=torch.zeros(3))])
    assert same(torch.load(path, weights_only=True), kept)

    monkeypatch.setattr(torch, "save", full_disk)
    writer.save(path, dict(step=2))
    for again in (writer.wait, writer.check, lambda: writer.save(path, dict(step=3))):
        with pytest.raises(UserError, match="disk full"):
            again()
    assert same(torch.load(path, weights_only=True), kept)
    with pytest.raises(UserError, match="disk full"):             # at the last step, too
        run(tmp_path, steps=1)


def test_an_error_in_a_process_group_ends_the_process_at_once_and_its_checkpoint_whole(tmp_path):
    """destroy_process_group() would wait for the others, who wait for this one, where NCCL is used."""
    said, save = tmp_path / "said.txt", torch.save

    def slow_disk(state, f):
        time.sleep(0.3)
        save(state, f)

    for err, code, words in ((UserError("too few"), 2, "too few"), (KeyError(), 1, "Traceback")):
        def fail():
            checkpoint.Writer().save(f"{tmp_path}/{code}.pt", dict(step=code))
            raise err

        child = os.fork()
        if child == 0:
            sys.stderr = open(said, "w")
            torch.save = slow_disk
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            try:
                guard(fail)
            finally:
                os._exit(77)                          # it has not left at once
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
        assert words in said.read_text()
        assert torch.load(f"{tmp_path}/{code}.pt", weights_only=True) == dict(step=code)


def test_a_resumed_run_writes_where_the_flags_say_and_not_where_the_checkpoint_does(
        tmp_path, monkeypatch):
    state = run(tmp_path, steps=2, out=f"{tmp_path}/out/run")
    state["config"].update(out=f"{tmp_path}/elsewhere", text_cache=f"{tmp_path}/cache", steps=3)
    torch.save(state, f"{tmp_path}/out/run/ckpt.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume"])    # --out has its default, out/run
    train.main()
    assert torch.load(f"{tmp_path}/out/run/ckpt.pt", weights_only=True)["step"] == 3
    assert not os.path.exists(f"{tmp_path}/elsewhere") and not os.path.exists(f"{tmp_path}/cache")


def test_a_new_run_in_an_old_folder_leaves_no_older_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    run(tmp_path, steps=4)
    monkeypatch.setattr(train, "draw_step", lambda *_: 1 / 0)     # dies before its first checkpoint
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, overwrite=True)
    assert not os.path.exists(f"{tmp_path}/run/ckpt.pt")
