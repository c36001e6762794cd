"""Small training runs: settings of some seconds, made-up data, comparison to the last bit."""

import contextlib
import json
import os
import runpy
import socket
import sys

import numpy as np
import torch

import train
from machinery.files import ROOT
from recipes import settings
from recipes.settings import settle
from teachers import SPECS, load_teacher
from tests.common import NANO

NETS = ("student", "aux", "disc", "ema", "optimizers", "step")

SPECS["nano"] = NANO
settings.RECIPES["nano"] = dict(
    teacher="nano", batch=8, steps=6, lr=1e-3, ema=0.9, warmup=2, gan=True, w_gan=1.0, gan_start=0,
    heads=2, head_width=16, head_mlp=16, log_every=1, save_every=2, eval_every=0, n_eval=0,
    random_weights=True, device="cpu", dtype="fp32")


def nano_settings(folder, **given):
    """Settings of a run of a second: the nano teacher with random weights, 30 made-up images."""
    data = os.path.join(folder, "data.npz")
    if not os.path.exists(data):
        rng = np.random.default_rng(0)
        np.savez(data, tokens=rng.integers(0, 8, (30, 16, 2)).astype(np.uint8),
                 labels=rng.integers(0, 3, 30).astype(np.uint8))
    usual = dict(teacher="nano", data=data, out=os.path.join(folder, "run"))
    return settle(usual | given)


def finished(c):
    """Train with settings c; the checkpoint."""
    train.train(c)
    return torch.load(os.path.join(c.out, "ckpt.pt"), weights_only=True)


def run(folder, **given):
    """Train the nano teacher in `folder`; the checkpoint."""
    return finished(nano_settings(folder, **given))


def log_of(out):
    """The rows of a run's log, without what depends on the clock."""
    with open(os.path.join(out, "log.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    for row in rows:
        row.pop("img_s", None)
    return rows


def same(a, b):
    """Are nested dicts, lists and tensors equal to the last bit?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return a == b


def same_run(one, two):
    """Did two runs come to the same networks, optimizers and step?"""
    return all(same(one[k], two[k]) for k in NETS if k in one or k in two)


def close_run(one, two, atol=2e-5):
    """Did two runs come to the same networks but for the order of sums?

    A sum over a batch of 8 in another order differs by some 1e-7 relative; Adam divides gradients by
    their own size, so where a gradient is nearly zero an update of lr = 1e-3 may move by 1e-5.
    """
    for name in ("student", "aux", "disc", "ema"):
        for key, tensor in one[name].items():
            if not torch.allclose(tensor, two[name][key], atol=atol):
                return False
    return True


PAIRED = ["a red circle", "two dogs!", "a fox", "a", ""]


def made_up_data(folder, name):
    """A folder of 20 made-up images as tokens, for a tiny teacher; a text teacher's come with prompts."""
    os.makedirs(folder, exist_ok=True)
    net = load_teacher(name, random_weights=True).net
    rng = np.random.RandomState(0)
    np.save(f"{folder}/tokens.npy", rng.randint(0, net.V, (20, net.L, net.G)).astype(np.uint8))
    np.save(f"{folder}/labels.npy", rng.randint(0, 5, 20).astype(np.uint16))
    with open(f"{folder}/prompts.txt", "w") as f:
        f.writelines(f"{prompt}\n" for prompt in PAIRED if SPECS[name].text)
    with open(f"{folder}/meta.json", "w") as f:
        json.dump({"V": net.V, "complete": True}, f)
    return folder


@contextlib.contextmanager
def one_thread():
    """torch computes with one thread here, as in processes that tests start.

    Other numbers of threads add in other orders, and a draw close to a tie may end differently.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def free_port():
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


# To import torch and all of ours takes a process seconds. So one server does it once, computes
# nothing, and every process that a test starts is forked from it.
SERVER = torch.multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.runs"])


def as_script(path, flags, log, env):
    """What a process does for `python path flags`, with one thread; what it says goes to `log`."""
    os.environ.update(env)
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def start(script, *flags, log=os.devnull, **env):
    """A process of one of this repository's scripts: a multiprocessing.Process, running."""
    args = f"{ROOT}/{script}", [*map(str, flags)], str(log), env
    process = SERVER.Process(target=as_script, args=args, daemon=True)      # it ends with the tests
    process.start()
    return process


def exit_code(process, seconds=300):
    """Of a process that ends within this time; None where it goes on."""
    process.join(seconds)
    return process.exitcode


def two_started(script, *flags, log, **env):
    """Two processes of one run, as torchrun would start them; process r writes to `log`r.txt."""
    env |= dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    return [start(script, *flags, log=f"{log}{r}.txt", RANK=r, LOCAL_RANK=r, **env) for r in "01"]


def one_of_two(rank, folder, port, *runs):
    """Process `rank` of two: nano runs with these settings, one after the other."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for given in runs:
        train.train(nano_settings(folder, **given))


def by_two_processes(folder, *runs):
    torch.multiprocessing.start_processes(
        one_of_two, (str(folder), free_port(), *runs), nprocs=2, start_method="forkserver")
