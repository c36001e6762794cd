"""What a training run shows of itself: samples and metrics on the way, a picture and a table.

`run` is the namespace that train.py's set_up makes.
"""

import contextlib
import functools
import json
import math
import os
from operator import itemgetter

from data.tokens import write_lines
from machinery.checkpoint import due
from machinery.compiling import eagerly
from machinery.files import fingerprint, local
from machinery.pictures import curves, sheet, spread
from machinery.processes import is_main, world_size
from machinery.records import append_rows
from metrics.tables import headline, table
from teachers import fixed_sample, generate_student, generate_teacher
from worlds.training import write_weights


def one_step(run, net):
    """make_images(asked, generator=, seconds=) by one pass of `net`: what a judge calls."""
    c = run.c
    return functools.partial(generate_student, run.teacher, net, init_ratio=c.init_ratio,
                             noise=c.noise, temperature=c.temperature)


def samples(run, make_images):
    """The pictures of a strip, from starts that are the same at every look."""
    n = 20 if run.teacher.spec.image[1] < 100 else 4
    with run.autocast(), eagerly(run.c.compile):
        return fixed_sample(make_images, run.conditions, n=n)


def write_sheet(run, name, strips):
    """Labeled strips of images, with the prompts of a text teacher, as a picture of the run."""
    words = spread(run.prompts, len(strips[0][1])) if run.prompts else None
    sheet(strips, f"{run.c.out}/{name}", words=words)


def look(run, step):
    """Every --eval_every steps and at the end: a row of metrics, samples, curves, the weights."""
    c = run.c
    if not c.eval_every or not due(step, c.eval_every, c.steps):
        return
    make_images = one_step(run, run.ema)
    name = f"student, step {step}" if step else "start of this run"
    if run.judge and c.n_eval:
        row = evaluation(run, step, name, make_images)
        run.say(f"{row['model']}: {headline(row)}")
        run.rows.append(row)
        row["best"] = best(run.rows)["step"]
        if is_main():
            append_rows(run.log_path, [row])
    if is_main():
        write_sheet(run, f"samples_{step:06d}.png", [(name, samples(run, make_images))])
        keep_weights(run, step)
        panels = log_panels(run.log_path)
        if panels:
            curves(panels, f"{c.out}/curves.png")


def evaluation(run, step, name, make_images):
    """The row of metrics of the student's average, as it goes into the log."""
    c = run.c
    start = {key: getattr(c, key) for key in ("temperature", "init_ratio", "noise")}
    facts = dict(step=step, model=name, kind="student", steps=1, **start)
    if step == 0:
        facts["weights"] = fingerprint(run.ema)
        facts["tokenizer"] = fingerprint(run.teacher.tokenizer)
        shipped = shipped_row(c, facts)
        if shipped:
            return shipped
    return facts | run.judge(make_images, c.n_eval, desc=name)


def shipped_row(c, facts):
    """The record beside the file --init_from, where it is of these weights and settings; or None.

    It spares an evaluation of the shipped theta_0. Its speed was that of another machine.
    """
    path = os.path.splitext(local(c.init_from))[0] + ".jsonl"
    if c.eval_reference or c.eval_metadata or not os.path.exists(path):
        return None
    with open(path) as f:
        row = json.loads(f.readline())
    if (facts | {"n": c.n_eval}).items() <= row.items():
        speeds = {"images/s": None, "tokens_only/s": None}
        return row | speeds | {"model": f"{row['model']}, shipped record"}
    return None


def best(rows):
    """The evaluation with the lowest FID; without FID, with the highest GenEval; else the last."""
    for metric, choose in (("fid", min), ("geneval", max)):
        measured = [row for row in rows if row.get(metric) is not None]
        if measured:
            return choose(measured, key=itemgetter(metric))        # the first of equals
    return rows[-1]


def keep_weights(run, step):
    """best.safetensors, where the last evaluation is the best one; and --keep snapshots."""
    c = run.c
    if run.rows and run.rows[-1]["step"] == step == run.rows[-1]["best"]:
        write_weights(run.ema, f"{c.out}/best.safetensors")
        run.say(f"step {step} is the best so far: {c.out}/best.safetensors")
    if c.keep:
        write_weights(run.ema, snapshot(c, step))
        written = [*range(0, step, c.eval_every), step]
        for old in written[: -c.keep]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(snapshot(c, old))


def snapshot(c, step):
    return f"{c.out}/student_{step:06d}.safetensors"


# ----------------------------------------------------------------------------------------- curves
EVALUATED = {  # of the evaluations: in which panel
    "fid": "FID", "precision": "precision and recall", "recall": "precision and recall",
    "geneval": "GenEval", "clip_score": "CLIP score",
}


def log_panels(path):
    """{title: {name: [(step, value), ...]}} of a log: keys of one beginning share a panel.

    So loss_dimo and loss_aux are two lines of "loss". Values that are not finite are left out.
    """
    panels = {}
    if not os.path.exists(path):
        return panels
    with open(path) as f:
        rows = [json.loads(line) for line in f]
    for row in rows:
        titles = {key: key.partition("_")[0] for key in row}
        if "model" in row:
            titles = EVALUATED
        for key, title in titles.items():
            value = row.get(key)
            if key == "step" or value is None or not math.isfinite(value):
                continue
            lines = panels.setdefault(title, {})
            lines.setdefault(key, []).append((row["step"], value))
    return panels


def finish(run):
    """The student's weights for others to load, a picture, and a table beside the teacher."""
    c, spec = run.c, run.teacher.spec
    if c.profile:
        return
    if is_main():
        write_weights(run.ema, f"{c.out}/student.safetensors")
        run.say(f"wrote {c.out}/student.safetensors")
    if not c.eval_every:
        return
    N = next(iter(spec.sampling))
    many_steps = functools.partial(generate_teacher, run.teacher, steps=N)
    if is_main():
        write_sheet(run, "picture.png", [
            (f"teacher, {N} guided steps", samples(run, many_steps)),
            ("start of this run, 1 step", run.start),
            ("student, 1 step", samples(run, one_step(run, run.ema)))])
        run.say(f"wrote {c.out}/picture.png")
    if not run.rows:
        return
    rows = run.rows
    if not (c.eval_reference or c.eval_metadata):     # there a teacher may take hours: evaluate.py
        rows = teacher_rows(run, many_steps, N) + rows
    if is_main():
        write_lines(f"{c.out}/results.jsonl", map(json.dumps, rows))
        text = table(rows)
        write_lines(f"{c.out}/table.md", [text])
        run.say("\n" + text)


def teacher_rows(run, many_steps, N):
    """The teacher's rows of the final table, where many_steps draws by N steps.

    The quality is read from the record that ships with a tiny teacher (minutes to make: evaluate.py
    --steps ...). The speed is measured here, since the ratio depends on the machine: of each
    process's second batch of 64, which 16 steps draw faster than 250. In three trials on one core
    that gave 19.9 to 21.2 images/s.
    """
    c, spec = run.c, run.teacher.spec
    with run.autocast(), eagerly(c.compile):
        if not spec.record:
            row = run.judge(many_steps, c.n_eval, desc="the teacher")
            return [dict(row, model="teacher", kind="teacher", steps=N, **spec.settings(N))]
        timed = run.judge(many_steps, 128 * world_size(), batch=64, desc="the teacher's speed")
    with open(local(spec.record)) as f:
        rows = [dict(json.loads(line), model="teacher, shipped record") for line in f]
    for row in rows:
        for speed in ("images/s", "tokens_only/s"):
            row[speed] = timed[speed] if row["steps"] == N else None
    return [row for row in rows if row["n"] == c.n_eval]
