"""What a training run shows of itself: samples and metrics on the way, a picture and a table.

`run` is the namespace that train.py's set_up makes.
"""

import functools
import json

from data.tokens import write_lines
from machinery.checkpoint import due
from machinery.files import local
from machinery.pictures import sheet, spread
from machinery.processes import is_main
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
    with run.autocast():
        return fixed_sample(make_images, run.conditions, n=n)


def write_sheet(run, name, strips):
    """Labeled strips of images, with the prompts of a text teacher, as a picture of the run."""
    words = spread(run.prompts, len(strips[0][1])) if run.prompts else None
    sheet(strips, f"{run.c.out}/{name}", words=words)


def look(run, step):
    """Every --eval_every steps and at the end: a row of metrics, and a strip of samples."""
    c = run.c
    if not c.eval_every or not due(step, c.eval_every, c.steps):
        return
    name = f"student, step {step}" if step else "start of this run"
    make_images = one_step(run, run.ema)
    if run.judge and c.n_eval:
        row = run.judge(make_images, c.n_eval, desc=name)
        run.say(f"{name}: {headline(row)}")
        row = dict(model=name, kind="student", steps=1, temperature=c.temperature, **row)
        run.rows.append(row)
        if is_main():
            append_rows(run.log_path, [dict(step=step, **row)])
    if is_main():
        write_sheet(run, f"samples_{step:06d}.png", [(name, samples(run, make_images))])


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
    with run.autocast():
        n = 500 if spec.record else c.n_eval
        timed = run.judge(many_steps, n, desc="the teacher")
    if is_main():
        shipped = teacher_rows(spec, timed, N)
        rows = [row for row in shipped if row["n"] == c.n_eval] + run.rows
        write_lines(f"{c.out}/results.jsonl", map(json.dumps, rows))
        text = table(rows)
        write_lines(f"{c.out}/table.md", [text])
        run.say("\n" + text)


def teacher_rows(spec, timed, N):
    """The teacher's rows of the final table. timed: its row by N steps, measured in this run.

    The quality is read from the record that ships with a tiny teacher (minutes to make: evaluate.py
    --steps ...). The speed is measured here, since the ratio depends on the machine.
    """
    if not spec.record:
        settings = spec.settings(N)
        return [dict(timed, model="teacher", kind="teacher", steps=N, **settings)]
    with open(local(spec.record)) as f:
        rows = [dict(json.loads(line), model="teacher, shipped record") for line in f]
    for row in rows:
        for speed in ("images/s", "tokens_only/s"):
            row[speed] = timed[speed] if row["steps"] == N else None
    return rows
