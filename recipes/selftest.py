"""The first command on a new GPU machine: does everything agree there, and how fast is it?

    python train.py --selftest                         # --out, --device and --compile are heard

First what must agree: gradients in bf16 and compiled with those in float32 and eager; a resumed
run, also in a process group of one (NCCL on a GPU), with an undisturbed one. Then one table of
times. Rows are appended to OUT/selftest.jsonl; where something does not agree, the exit code is 2.
On a CPU all of it runs at tiny size.
"""

import contextlib
import functools
import gc
import io
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from types import SimpleNamespace

import torch

from machinery import profile
from machinery.errors import UserError
from machinery.flags import check_device
from machinery.processes import autocast, group_of_one
from machinery.records import append_rows, environment
from recipes.settings import settle
from teachers import generate_student, generate_teacher, load_teacher

# The least cosine with float32, eager: to rounding, and to that of bf16.
LEAST = {"fp32": 0.999, "bf16": 0.98}
SMALL = dict(
    steps=4, batch=8, student_start=0, gan_start=0, reward_start=0,
    dropout=0.0, optimizer="adam", lr_end=1.0,
    eval_every=0, save_every=2, log_every=4, overwrite=True)
TINY = {
    "maskbit-tiny": SMALL | dict(teacher="maskbit-tiny", gan=True, feature_noise=0.0),
    "meissonic-tiny": SMALL | dict(teacher="meissonic-tiny", reward=True, checkpointing=True)}
# Random weights and tokens, as with --profile. The batch is that of the table of times: what is
# compiled here is found again there.
FULL = SMALL | dict(teacher="maskbit", gan=True, batch=64, profile=1)
LARGE = 60e9                                          # bytes of a GPU on which that fits


# ------------------------------------------------------------------------------- what must agree
def free():
    """What the last run held goes back: the next has the whole card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def flat(params):
    return torch.cat([p.grad.flatten() for p in params])


def gradients(algorithm, c, like=None):
    """What each stage of a step gives, from the logits and tokens of the run `like`, if given.

    The auxiliary has moved a tenth away from the teacher: at the start of a run the two differ by
    little more than bf16.
    """
    run = algorithm.set_up(c)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in run.aux.params:
            p += 0.1 * p.abs().mean() * torch.randn_like(p)
    (batch,) = algorithm.draw_batches(run, 0)
    z = algorithm.generate(run, batch)
    seen = defaultdict(float)                         # what a log would tell
    stages = {"logits": batch.z - batch.z.mean(-1, keepdim=True)}
    if like:
        batch.z, batch.x = like.z, like.x
    stages["Di[M]O at the logits"] = algorithm.dimo_term(run, batch, seen)
    if c.gan:
        stages["GAN at the logits"] = algorithm.gan_term(run, batch, seen)
    if c.reward:
        stages["reward at the logits"] = algorithm.reward_term(run, batch, seen)
    g = like.g if like else sum(stages[term] / stages[term].norm() for term in [*stages][1:])
    algorithm.backward(run, batch, z, {"all": g}, seen)
    stages["student"] = flat(run.student.params)
    algorithm.aux_term(run, batch, seen)
    stages["auxiliary"] = flat(run.aux.params)
    if c.gan:
        algorithm.disc_term(run, batch, seen)
        stages["discriminator"] = flat(run.disc.params)
    return SimpleNamespace(stages=stages, z=batch.z, x=batch.x, g=g)


def cosine(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return (a @ b / (a.norm() * b.norm())).item()


def agreement(algorithm, settings, ways):
    """Rows: the cosine of every stage with that in float32, eager; ways: (dtype, compiled), ..."""
    exact = gradients(algorithm, settle(settings | dict(dtype="fp32", compile=False)))
    rows = []
    for dtype, compiled in ways:
        torch._dynamo.reset()
        free()
        c = settle(settings | dict(dtype=dtype, compile=compiled))
        other = gradients(algorithm, c, like=exact)
        how = f"{c.teacher}, {dtype}, {'compiled' if compiled else 'eager'}"
        for stage, g in exact.stages.items():
            value = cosine(g, other.stages[stage])
            rows.append(dict(check=f"{how}: {stage}", cosine=value, ok=value > LEAST[dtype]))
        del other
    return rows


def distance(one, two):
    """The largest difference of two checkpoints' weights."""
    names = [name for name in ("student", "aux", "disc", "ema") if name in one]
    return max((one[name][key] - two[name][key]).abs().max().item()
               for name in names for key in one[name])


def survival(algorithm, settings, folder):
    """Rows: how far a resumed run, and one resumed in a process group, end from an undisturbed one.

    To the bit; or, where a repeated run differs (a GPU's sums may come in any order), about as far.
    """
    def trained(name, **more):
        algorithm.train(settle(settings | dict(out=f"{folder}/{name}") | more))
        return torch.load(f"{folder}/{name}/ckpt.pt", map_location="cpu", weights_only=True)

    whole = trained("whole")
    trained("cut", steps=2)
    shutil.copytree(f"{folder}/cut", f"{folder}/group")
    resumed = dict(overwrite=False, resume=True)
    others = {"a resumed run": trained("cut", **resumed)}
    with group_of_one(settings["device"]) as backend:
        others[f"resumed by --zero under {backend}"] = trained("group", zero=True, **resumed)
    apart = {name: distance(whole, other) for name, other in others.items()}
    limit = 0.0
    if any(apart.values()):
        apart["a repeated run"] = distance(whole, trained("again"))
        limit = 10 * apart["a repeated run"]
    return [dict(check=name, difference=far, ok=far <= limit) for name, far in apart.items()]


# ------------------------------------------------------------------------------------------ times
def training_speed(algorithm, settings, name):
    """A row of a Profile: what a step costs, and where its time goes."""
    torch._dynamo.reset()
    algorithm.train(settle(settings))
    row = profile.current.row
    profile.current = None
    return dict(speed=name, **row)


@torch.no_grad()
def sampling_speed(teacher, name, n, steps, device):
    """Rows: one step of a student, and `steps` of its teacher, n images at a time."""
    asked = teacher.conditions(["a photo"])
    asked = asked[torch.arange(n, device=asked.device) % len(asked)]
    makers = {1: functools.partial(generate_student, teacher, teacher.net)}
    for N in steps:
        makers[N] = functools.partial(generate_teacher, teacher, steps=N)
    rows = []
    for N, make in makers.items():
        with autocast(device, device == "cuda"):
            make(asked)                               # warms up
            seconds = Counter()
            make(asked, seconds=seconds)
        rows.append(dict(speed=f"{name}: {N} step(s), {n} images", ms=1000 * seconds.total(),
                         images_per_s=n / seconds.total()))
    return rows


def speed(algorithm, device, usual):
    """Rows of the table of times: training and sampling, on a GPU at full size; largest last."""
    maskbit, meissonic, batch, few, steps = "maskbit", "meissonic", 64, 4, (64, 256)
    if device == "cpu":
        maskbit, meissonic, batch, few, steps = "maskbit-tiny", "meissonic-tiny", 8, 2, (4, 8)
    for name, gan in (("MaskBit, Di[M]O", False), ("MaskBit, Di[M]O + GAN", True)):
        yield training_speed(
            algorithm, usual | dict(teacher=maskbit, gan=gan, batch=batch), name)
    for name, n, counts in ((maskbit, batch, steps), (meissonic, few, steps[:1])):
        teacher = load_teacher(name, random_weights=True, device=device)
        yield from sampling_speed(teacher, name, n, counts, device)
        del teacher
    # choice: not compiled, which would take minutes
    yield training_speed(
        algorithm, usual | dict(teacher=meissonic, batch=few, compile=False, optimizer="adam"),
        "Meissonic, Di[M]O, not compiled")


# ------------------------------------------------------------------------------------------ a page
def line(row):
    if "check" in row:
        value = row.get("cosine", row.get("difference"))
        return f"{row['check']:52s} {value:12.6g}   {'ok' if row['ok'] else 'FAILED'}"
    text = f"{row['speed']:36s} {row['ms']:10.1f} ms {row['images_per_s']:10.1f} images/s"
    if row.get("share_of_ceiling"):
        text += f"   {row['share_of_ceiling']:.0%} of {row['ceiling_tflop_per_s']:.2f} TFLOP/s"
    if row.get("peak_gb"):
        text += f"   {row['peak_gb']:.1f} GB"
    for name, ms in row.get("phases", {}).items():
        text += f"\n    {name:32s} {ms:10.1f} ms"
    return text


def rows_of(algorithm, device, compiled, folder):
    """All rows, one after the other."""
    usual = dict(device=device, compile=False, dtype="fp32", out=f"{folder}/run")
    ways = [("bf16", False)]
    if compiled:
        ways.append(("fp32", True))
    for settings in TINY.values():
        yield from agreement(algorithm, settings | usual, ways)
    if device == "cuda" and torch.cuda.mem_get_info()[1] > LARGE:
        yield from agreement(algorithm, FULL | usual, [("bf16", compiled)])
    yield from survival(algorithm, TINY["maskbit-tiny"] | usual, folder)
    free()
    usual |= dict(compile=compiled, profile=1)
    if device == "cuda":
        usual |= dict(dtype="bf16", profile=10)
    for row in speed(algorithm, device, usual):
        yield row
        free()


def verdict(rows):
    failed = [row["check"] for row in rows if not row.get("ok", True)]
    if failed:
        raise UserError(f"--selftest: {'; '.join(failed)}: not as it should be on this machine")


def selftest(algorithm, given, defaults):
    """Print and keep all rows. algorithm: train.py as a module; it imports this file."""
    c = SimpleNamespace(**(defaults | given))
    unheard = given.keys() - {"selftest", "out", "device", "compile"}
    if unheard:
        flags = ", ".join(f"--{name}" for name in sorted(unheard))
        raise UserError(f"--selftest has settings of its own: leave out {flags}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--selftest looks at one device: start it without torchrun")
    check_device(c.device)
    os.makedirs(c.out, exist_ok=True)
    path, done, hidden = f"{c.out}/selftest.jsonl", [], io.StringIO()
    where = environment(c.device)
    print(f"selftest on {where['gpu'] or 'the CPU'}, torch {where['torch']}")
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(algorithm, c.device, c.compile, folder)
        while True:
            with contextlib.redirect_stdout(hidden):  # what the runs say themselves
                row = next(rows, None)
            if row is None:
                break
            print(line(row), flush=True)
            append_rows(path, [where | row])
            done.append(row)
    print(f"rows are in {path}")
    verdict(done)
