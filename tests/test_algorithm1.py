"""train.py, run as a user runs it, comes to what Algorithm 1 comes to where it is written plainly.

That is tests/algorithm1.py, in float64. Few runs set many things each, to values at which it shows
if one is ignored or ends in another place: for each setting this was tried, by breaking its way.
"""

import copy
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import train
from data.prompts import read_prompts
from data.tokens import RealTokens
from gan import Discriminator
from machinery.files import read_tensors
from networks.weights import load_state
from recipes.set_up import load_networks
from reward import rewards_for
from teachers import SPECS, load_teacher
from tests.algorithm1 import algorithm1, in_float64
from tests.common import seeded
from tests.runs import by_two_processes, log_of, made_up_data, nano_settings

# Said to train.py and to algorithm1 alike, so that no default and no recipe decides.
PLAIN = dict(
    batch=4, steps=3, accum=1, seed=4, init_from="teacher",
    cfg=2.5, cfg_low=1.0, cfg_schedule="constant",
    w_dimo=1.0, beta=0.0, init_ratio=0.6, noise=0.1, schedule="arccos", ratio_range=[0.0, 1.0],
    w_t="one", soft_state=False, smoothing=0.1, soft_target=0.0, redraw=False, student_start=0,
    share_passes=False,
    prompts=None,
    gan=True, w_gan=10.0, gan_start=0, gan_ratio=[0.0, 0.95], estimator="soft", tau=1.0,
    heads=2, head_width=16, head_mlp=16, feature_noise=0.0,
    reward=False, w_reward=1.0, rewards={"clip": 1.0}, reward_start=0, clip_reward=0.0,
    optimizer="adam", lr=1e-3, aux_lr=1e-3, disc_lr=1e-3, warmup=0, lr_end=1.0, weight_decay=0.0,
    clip=1.0, ema=0.9)
SYSTEM = dict(
    device="cpu", dtype="fp32", dropout=0.0, random_weights=False,
    log_every=1, save_every=1, eval_every=0)

RUNS = {
    "nano": dict(
        batch=8, steps=5, accum=2, init_from="theta_0.safetensors",
        cfg=3.0, cfg_low=-1.0, cfg_schedule="cosine", w_dimo=0.7, beta=-0.2,
        init_ratio=0.4, noise=0.5, schedule="cosine", ratio_range=[0.2, 0.8], w_t="inverse",
        soft_state=True, smoothing=0.3, soft_target=0.4, redraw=True, student_start=1,
        w_gan=30.0, gan_start=2, gan_ratio=[0.2, 0.7], estimator="gumbel", tau=1.6,
        feature_noise=0.5, aux_lr=2e-3, disc_lr=3e-3, warmup=2, weight_decay=0.05, clip=0.1,
        ema=0.2),
    "nano, Di[M]O alone": dict(
        gan=False, redraw=True, beta=0.7, cfg_schedule="linear", cfg_low=0.0,
        optimizer="adamw", weight_decay=0.5, schedule="square", aux_lr=None,
        lr_end=0.2),
    "nano, GAN alone": dict(w_dimo=0.0, disc_lr=None),
    "nano, Muon": dict(optimizer="muon", weight_decay=0.5, beta=1.0, schedule="linear"),
    "maskbit-tiny": dict(batch=2),
    "maskgit-tiny": dict(),
    "maskgen-tiny": dict(
        seed=9, prompts="assets/prompts.txt", estimator="straight-through", tau=0.6,
        feature_noise=0.1, redraw=True),
    "meissonic-tiny": dict(
        batch=2, prompts="assets/shapes/prompts.txt", lr=1e-4, aux_lr=1e-4, disc_lr=1e-4,
        estimator="gumbel", tau=0.7, reward=True, w_reward=0.05, reward_start=1, clip_reward=0.5,
        rewards={"imagereward": 0.7, "clip": 0.3}),
}
BY_TWO = dict(
    batch=8, accum=2, share_passes=True, student_start=1, gan_start=2, feature_noise=0.5,
    estimator="straight-through")


# ------------------------------------------------------------------------------------ train.py
def trained(monkeypatch, settings):
    """What a command leaves: checkpoint and log."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words(settings)])
    train.main()
    return left_in(settings["out"])


def left_in(out):
    return read_tensors(f"{out}/ckpt.pt"), log_of(out)


def words(settings):
    """Settings, as a user writes them."""
    words = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
            continue
        if isinstance(value, dict):
            value = ",".join(f"{key}={weight}" for key, weight in value.items())
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def settings_of(name, folder, **given):
    """All settings of a run, and the files that they name.

    A teacher without weights gets seeded ones: random initial ones make all logits nearly the same.
    """
    c = PLAIN | SYSTEM | given | dict(teacher=name, out=f"{folder}/run")
    if not SPECS[name].files:
        teacher = load_teacher(name, random_weights=True)
        for role in teacher.spec.roles:
            flag = "teacher_weights" if role == "net" else f"{role}_weights"
            c[flag] = write(f"{folder}/{role}.safetensors", getattr(teacher, role), 0)
        if c["init_from"] != "teacher":
            c["init_from"] = write(f"{folder}/{c['init_from']}", teacher.net, 1)
    if c["gan"] and name == "nano":
        c["data"] = nano_settings(folder).data
    elif c["gan"]:
        c["data"] = made_up_data(f"{folder}/data", name)
    return c


def write(path, module, seed):
    state = seeded({key: t.shape for key, t in module.state_dict().items()}, seed)
    save_file(state, path)
    return path


# ---------------------------------------------------------------------------------- algorithm1
def reference(settings):
    """What algorithm1 comes to, from the same start and with the same random choices."""
    c = SimpleNamespace(**settings)
    roles = "teacher", "tokenizer", "text"
    files = {f"{role}_weights": settings.get(f"{role}_weights") for role in roles}
    teacher = load_teacher(c.teacher, **files)
    net, heads, rewards = teacher.net, None, None
    theta_0 = copy.deepcopy(net)
    if c.init_from != "teacher":
        load_state(theta_0, read_tensors(c.init_from), c.init_from)
    if c.gan:
        torch.manual_seed(c.seed)
        layers = [net.depth * (i + 1) // c.heads - 1 for i in range(c.heads)]    # to the last
        heads = Discriminator(net.width, layers, c.head_width, c.head_mlp, net.feature_grid)
    if c.reward:
        rewards = rewards_for(teacher.spec, c.rewards)
    draws = [what_is_random(c, step, teacher) for step in range(c.steps)]
    for module in (net, theta_0, teacher.tokenizer, teacher.text, heads, rewards):
        if module is not None:
            module.double()
    if teacher.text is not None:
        net.null_text, net.null_pooled = net.null_text.double(), net.null_pooled.double()
    with in_float64():
        for start in (start for d in draws for start in (d.start, d.again, d.pair) if start):
            start.cond = teacher.cond(start.asked)
        result = algorithm1(teacher, theta_0, heads, rewards, draws, c)
    result.start = dict(student=theta_0, aux=net, disc=heads, ema=theta_0)
    return result


def what_is_random(c, step, teacher):
    """The random tensors of a step's whole batch; mask ratios as the u ~ U(0, 1) behind them."""
    net, real = teacher.net, None
    if c.gan:
        real = RealTokens(c.data, teacher, c.seed)
    prompts = read_prompts(c.prompts) if c.prompts else None
    apart = bool(c.gan and c.prompts)                 # the GAN's pairs have prompts of their own
    asked = teacher.conditions(prompts)
    plain = SimpleNamespace(**vars(c) | dict(
        schedule="linear", ratio_range=[0.0, 1.0], gan_ratio=[0.0, 1.0]))
    draws = train.draw_step(plain, step, net, len(asked), asked.device, apart)
    draws = {name: t.double() if t.is_floating_point() else t for name, t in draws.items()}

    def start(name):
        parts = ("which", "tokens", "scores", "u", "noise")
        start = SimpleNamespace(**{part: draws[f"{name}{part}"] for part in parts})
        start.asked = asked[start.which]
        return start

    d = SimpleNamespace(**draws, start=start(""), again=None, pair=None)
    if prompts:
        d.prompts = [prompts[i] for i in d.start.which]
    if c.redraw:
        d.again = start("again_")
    if apart:
        d.pair = start("pair_")
    if real:
        d.x_real, labels = real.batch(step * c.batch, c.batch)
        for start in [d.pair] if apart else [d.start, d.again]:
            if start:
                start.asked = real.conditions[labels]
    draw_noise(d, c, step, net, apart)
    return d


def draw_noise(d, c, step, net, apart):
    """Noise of the estimators, as uniforms, and on features, in the order of Algorithm 1.

    Each image has a generator of its own.
    """
    def generators(pair):
        seeds = [np.random.SeedSequence((c.seed, step, place, pair)) for place in range(c.batch)]
        return [torch.Generator().manual_seed(s.generate_state(1, np.uint64).item()) for s in seeds]

    def uniforms(generators):
        if c.estimator != "soft":
            entries = net.V + (c.teacher == "maskgit-tiny")
            return train.draw_each(generators, (net.L, net.G, entries), torch.rand).double()

    def on_features(generators):
        if c.feature_noise == 0:
            return torch.zeros(c.heads, len(generators), 1, 1)
        N = math.prod(net.feature_grid or (net.L,))
        noise = [train.draw_each(generators, (N, net.width)) for _ in range(c.heads)]
        return torch.stack(noise).double()                            # (heads, B, N, width)

    own = generators(False)
    of_the_gan = generators(True) if apart else own
    if step >= max(c.student_start, c.gan_start) and c.gan:
        d.gumbel_gan = uniforms(of_the_gan)
        d.noise_gan = on_features(of_the_gan)
    if step >= max(c.student_start, c.reward_start) and c.reward:
        d.gumbel_reward = uniforms(own)
    if c.gan:
        d.gumbel_disc = uniforms(of_the_gan)
        both = on_features(of_the_gan * 2)                              # real ones first
        d.noise_real, d.noise_fake = both[:, : c.batch], both[:, c.batch :]


# ------------------------------------------------------------------------------------ the tests
def off(a, b):
    """Distance of two lists of tensors, relative to the second's size."""
    a, b = (torch.cat([t.double().flatten() for t in part]) for part in (a, b))
    return ((a - b).norm() / b.norm()).item()


def agree(ckpt, log, ref):
    """Are networks, optimizers and log those of the reference?

    Where the tolerances come from. A float32 rounds by 6e-8, and a gradient, a sum of thousands of
    products, comes to 1e-6 of its norm (2e-5 where the terms cancel): so do the moments, and what
    the log tells. Parameters differ by less, and that says little, for they differ from their start
    by little: it is their *movement* that is compared. Adam divides each gradient by its own size,
    and makes as large a step of one that is mere rounding (the bias of keys has no other): so a
    movement of the whole network is off by up to 5e-5, measured. What is wrong moves it by 1e-2.
    """
    assert ref.margin > 5e-6, "another seed: here a rounding decides which token is drawn"
    assert {"student", "aux", "disc", "ema"} & ckpt.keys() == ref.nets.keys()
    for name, net in ref.nets.items():
        ours, theirs, start = net.state_dict(), ckpt[name], ref.start[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert off(theirs.values(), ours.values()) < 1e-5, name
        ours = [ours[key] - start[key] for key in start]
        theirs = [theirs[key].double() - start[key] for key in start]
        assert off(theirs, ours) < 3e-4, name
    assert ckpt["optimizers"].keys() == ref.updates.keys()
    for name, state in ckpt["optimizers"].items():
        update = ref.updates[name]
        for kind, of_muon, ours in (("momentum_buffer", True, update.m),
                                    ("exp_avg", False, update.m), ("exp_avg_sq", False, update.v)):
            theirs = moments(state, kind)
            ours = [t for t, muon in zip(ours, update.muon) if muon == of_muon]
            assert len(theirs) == len(ours)
            assert not ours or off(theirs, ours) < 1e-4, (name, kind)
    assert [row.keys() - {"skipped"} for row in log] == [row.keys() for row in ref.log]
    for theirs, ours in zip(log, ref.log):
        for key, value in ours.items():
            rounding = 1e-4 if key in ("clip", "loss_reward") else 1e-6         # of 100 cosines
            assert theirs[key] == pytest.approx(value, rel=3e-5, abs=rounding), (key, ours["step"])


def moments(optimizer, kind):
    """One kind of an optimizer's state, in the order of the parameters."""
    parts = optimizer if isinstance(optimizer, list) else [optimizer]
    states = [state for part in parts for _, state in sorted(part["state"].items())]
    return [state[kind] for state in states if kind in state]


@pytest.mark.parametrize("run", RUNS)
def test_training_comes_to_what_algorithm_1_comes_to(run, tmp_path, monkeypatch):
    name = run.split(",")[0]
    settings = settings_of(name, tmp_path, **RUNS[run])
    if settings["optimizer"] == "muon":                # orthogonal in bf16 would be so to 1e-2
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t: t)
    if run == "nano":
        trained(monkeypatch, settings | dict(steps=3))                   # then it goes on
        ckpt, log = trained(monkeypatch, dict(out=settings["out"], resume=True, steps=5))
    else:
        ckpt, log = trained(monkeypatch, settings)
    agree(ckpt, log, reference(settings))


def test_two_processes_come_to_what_algorithm_1_comes_to(tmp_path):
    settings = settings_of("nano", tmp_path, **BY_TWO)
    by_two_processes(tmp_path, settings)
    agree(*left_in(settings["out"]), reference(settings))


def test_seed_and_step_decide_everything_random():
    net = load_teacher("nano", random_weights=True).net

    def draws(seed, step):
        c = SimpleNamespace(**PLAIN | dict(seed=seed, batch=8, redraw=True))
        return train.draw_step(c, step, net, 1000, torch.device("cpu"), apart=True)

    one = draws(0, 0)
    for name, tensor in one.items():
        assert torch.equal(tensor, draws(0, 0)[name])
        assert not torch.equal(tensor, draws(1, 0)[name])
        assert not torch.equal(tensor, draws(0, 1)[name])
    same_kind = [t for t in one.values() if t.is_floating_point() and t.shape == one["u"].shape]
    assert len(same_kind) == len({t.sum().item() for t in same_kind}) == 10


def test_dropout_reaches_student_and_auxiliary(tmp_path):
    run = SimpleNamespace(c=nano_settings(tmp_path, dropout=0.3), device=torch.device("cpu"))
    load_networks(run)
    for module in (run.student.module, run.aux.module):
        assert module.training and dropouts(module) == {0.3}
    assert not run.net.training and dropouts(run.net) == {0.0}


def dropouts(module):
    return {m.p for m in module.modules() if isinstance(m, torch.nn.Dropout)}
