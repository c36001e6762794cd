"""train.py, run as a user runs it, comes to what Algorithm 1 comes to when it is written plainly.

The plain one is tests/algorithm1.py, in float64. Each run sets many things at once, each to a value
at which ignoring it shows.
"""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import train
from data.tokens import RealTokens
from gan import Discriminator, head_layers
from machinery.files import read_tensors
from networks.weights import load_state
from reward import rewards_for
from teachers import SPECS, load_teacher
from tests.algorithm1 import algorithm1, in_float64
from tests.common import seeded
from tests.runs import by_two_processes, log_of, made_up_data, nano_settings

# Of these algorithm1 knows. What is said here is said to both, whatever the defaults are.
PLAIN = dict(
    batch=4, steps=3, accum=1, seed=3, init_from="teacher",
    cfg=2.5, cfg_low=1.0, cfg_schedule="constant",
    w_dimo=1.0, beta=0.0, init_ratio=0.6, noise=0.1, schedule="arccos", ratio_range=[0.0, 1.0],
    w_t="one", soft_state=False, smoothing=0.1, soft_target=0.0, redraw=False, student_start=0,
    gan=True, w_gan=1.0, gan_start=0, gan_ratio=[0.0, 0.95], estimator="soft", tau=1.0,
    heads=2, head_width=16, head_mlp=16, feature_noise=0.0,
    reward=False, w_reward=1.0, rewards={"clip": 1.0}, reward_start=0, clip_reward=0.0,
    optimizer="adam", lr=1e-3, aux_lr=1e-3, disc_lr=1e-3, warmup=0, lr_end=1.0, weight_decay=0.0,
    clip=1.0, ema=0.9)
SYSTEM = dict(device="cpu", dtype="fp32", log_every=1, save_every=2, eval_every=0, dropout=0.0,
              random_weights=False)

RUNS = {
    "much": dict(
        teacher="nano", batch=8, steps=5, seed=4, accum=2, init_from="theta_0.safetensors",
        cfg=3.0, cfg_low=-1.0, cfg_schedule="cosine", w_dimo=0.7, beta=-0.2,
        init_ratio=0.4, noise=0.5, schedule="cosine", ratio_range=[0.2, 0.8], w_t="inverse",
        soft_state=True, smoothing=0.3, soft_target=0.4, redraw=True, student_start=1,
        w_gan=30.0, gan_start=2, gan_ratio=[0.2, 0.7], estimator="gumbel", tau=1.6,
        feature_noise=0.0, aux_lr=2e-3, disc_lr=3e-3, warmup=2, lr_end=0.2,
        weight_decay=0.05, clip=0.5, ema=0.2),
    "no GAN": dict(
        teacher="nano", gan=False, aux_lr=None, redraw=True, beta=0.7, cfg_schedule="linear", optimizer="adamw",
        weight_decay=0.5, schedule="square"),
    "no Di[M]O": dict(teacher="nano", w_dimo=0.0, w_gan=50.0),
    "Muon": dict(teacher="nano", optimizer="muon", weight_decay=0.5, beta=1.0, schedule="linear"),
    "maskbit-tiny": dict(teacher="maskbit-tiny", w_gan=10.0),
    "maskgit-tiny": dict(teacher="maskgit-tiny", w_gan=10.0),
    "maskgen-tiny": dict(teacher="maskgen-tiny", w_gan=10.0),
    "meissonic-tiny": dict(teacher="meissonic-tiny", w_gan=10.0),
    "reward": dict(teacher="meissonic-tiny", gan=False, reward=True, w_reward=0.05,
        rewards={"imagereward": 1.0, "clip": 0.2}, reward_start=1, clip_reward=0.5,
        prompts="assets/shapes/prompts.txt"),
}


# ------------------------------------------------------------------------------------ train.py
def command(settings):
    """Settings as the words of a command."""
    words = ["train.py"]
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
            continue
        if value is None:
            continue
        if isinstance(value, dict):
            value = ",".join(f"{key}={weight}" for key, weight in value.items())
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def trained(monkeypatch, settings):
    """What a command leaves: checkpoint and log."""
    monkeypatch.setattr(sys, "argv", command(settings))
    train.main()
    return read_tensors(f"{settings['out']}/ckpt.pt"), log_of(settings["out"])


def whole(folder, run):
    """All settings of a run, and the files that they name."""
    c = PLAIN | SYSTEM | RUNS[run] | dict(out=f"{folder}/run")
    name = c["teacher"]
    if not SPECS[name].files:
        teacher = load_teacher(name, random_weights=True)
        for role in teacher.spec.roles:
            c[f"{role}_weights".replace("net", "teacher")] = write(
                f"{folder}/{role}.safetensors", getattr(teacher, role), 0)
        if c["init_from"] != "teacher":
            c["init_from"] = write(f"{folder}/{c['init_from']}", teacher.net, 1)
    if c["gan"]:
        c["data"] = nano_settings(folder).data if name == "nano" else made_up_data(f"{folder}/data", name)
    return c


def write(path, module, seed):
    """A file of seeded weights, whose networks are sure of what they say."""
    state = seeded({key: t.shape for key, t in module.state_dict().items()}, seed)
    save_file({key: t.contiguous() for key, t in state.items()}, path)
    return path


# ---------------------------------------------------------------------------------- algorithm1
def reference(settings):
    """What algorithm1 comes to, from the same start and with the same random choices."""
    c = SimpleNamespace(share_passes=False, **settings)
    weights = {f"{role}_weights": settings.get(f"{role}_weights")
               for role in ("teacher", "tokenizer", "text")}
    teacher = load_teacher(c.teacher, **weights)
    net, real, heads, rewards, prompts = teacher.net, None, None, None, None
    theta_0 = copy.deepcopy(net)
    if c.init_from != "teacher":
        load_state(theta_0, read_tensors(c.init_from), c.init_from)
    if c.gan:
        real = RealTokens(c.data, teacher, c.seed)
        prompts = real.prompts
        torch.manual_seed(c.seed)
        layers = head_layers(net.depth, c.heads)
        heads = Discriminator(net.width, layers, c.head_width, c.head_mlp, net.feature_grid)
    elif teacher.text:
        with open(c.prompts, encoding="utf-8") as f:
            prompts = f.read().splitlines()
    if c.reward:
        rewards = rewards_for(teacher.spec, c.rewards)
    asked = teacher.conditions(prompts)
    draws = [what_is_random(c, step, net, asked, real) for step in range(c.steps)]
    for module in (net, theta_0, teacher.tokenizer, teacher.text, heads, rewards):
        if module is not None:
            module.double()
    if teacher.text is not None:
        net.null_text, net.null_pooled = net.null_text.double(), net.null_pooled.double()
    with in_float64():
        for d in draws:
            d.cond = teacher.cond(asked[d.which])
            if c.redraw:
                d.again_cond = d.cond if c.gan else teacher.cond(asked[d.again_which])
            if prompts is not None:
                d.prompts = [prompts[i] for i in d.which.tolist()]
        result = algorithm1(teacher, theta_0, heads, rewards, draws, c)
    result.start = dict(student=theta_0, aux=net, disc=heads, ema=theta_0)
    return result


def what_is_random(c, step, net, asked, real):
    """The random tensors of a step's whole batch; mask ratios as the u ~ U(0, 1) behind them."""
    plain = SimpleNamespace(**vars(c) | dict(
        schedule="linear", ratio_range=[0.0, 1.0], gan_ratio=[0.0, 1.0]))
    d = SimpleNamespace(**train.draw_step(plain, step, net, asked))
    for key, value in vars(d).items():
        if value.is_floating_point():
            setattr(d, key, value.double())
    d.gumbel_gan = d.gumbel_disc = d.gumbel_reward = None
    d.features_gan = d.features_real = d.features_fake = None
    if real is not None:
        d.x_real, d.which = real.batch(step * c.batch, c.batch)
    return d


# ------------------------------------------------------------------------------------ the tests
def far(a, b):
    """Distance of two lists of tensors, relative to the second's size."""
    a, b = (torch.cat([t.detach().double().flatten() for t in part]) for part in (a, b))
    return ((a - b).norm() / b.norm()).item()


def moments(optimizer, key):
    """A kind of state of an optimizer's, in the parameters' order; Muon's matrices come first."""
    parts = optimizer if isinstance(optimizer, list) else [optimizer]
    return [state[key] for part in parts for _, state in sorted(part["state"].items())
            if key in state]


def report(ckpt, log, ref):
    print()
    for name, net in ref.nets.items():
        if name not in ckpt:
            continue
        state = net.state_dict()
        start = ref.start[name].state_dict()
        print(name, "params", far(ckpt[name].values(), state.values()), "update",
            far([ckpt[name][k].double() - start[k] for k in state], [state[k] - start[k] for k in state]))
        worst = max((far([ckpt[name][k].double() - start[k]], [state[k] - start[k]]), k) for k in state if not torch.equal(state[k], start[k]))
        print("  worst", worst)
        if name in ref.updates:
            up = ref.updates[name]
            opt = ckpt["optimizers"][name]
            if not isinstance(opt, list):
                print("  m", far(moments(opt, "exp_avg"), up.m), "v", far(moments(opt, "exp_avg_sq"), up.v))
    for a, b in zip(log, ref.log):
        for k in a:
            if k in b:
                r = abs(a[k]-b[k]) / (abs(b[k]) + 1e-30)
                if abs(a[k]-b[k]) > 1e-6 and r > 1e-5: print("   !!", a["step"], k, a[k], b[k])
        print("missing", [k for k in a if k not in b], [k for k in b if k not in a])


@pytest.mark.parametrize("run", RUNS)
def test_first(run, tmp_path, monkeypatch):
    import time
    t = time.time()
    settings = whole(tmp_path, run)
    if RUNS[run].get("optimizer") == "muon":
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t: t)
    t0 = time.time()
    ckpt, log = trained(monkeypatch, settings)
    t1 = time.time()
    ref = reference(settings)
    print(run, "prep", t0-t, "train", t1-t0, "ref", time.time() - t1)
    report(ckpt, log, ref)
