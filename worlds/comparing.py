"""Test-time optimization beside its baseline, best-of-N in the same time: numbers and a picture.

All is drawn by draw(prompts, starts=, iterations=, generator=), which is tteo.py's. It
returns the best image of each prompt, and the seconds that took. With one iteration nothing is
optimized, and what it returns is the best of its starts. So it is drawn twice, with and without
updates, and from the two times follows how many plain starts TTEO's time would pay for.

Results are appended to results.jsonl, in the folder --out. Pictures are beside it, in tteo.png or
in one of a benchmark's name.
"""

import functools

import torch

from machinery.errors import UserError
from machinery.files import file_name
from machinery.pictures import sheet, spread
from machinery.processes import from_first, is_main
from machinery.records import append_rows, environment, print_rows
from metrics.benchmarks import run_benchmark
from metrics.published import published
from metrics.tables import table
from reward import weighted
from teachers import fixed_sample, to_bytes
from worlds.judges import judge_shapes
from worlds.shapes import benchmark as shapes_benchmark


def one_prompt(args, teacher, rewards, weights, draw, facts):
    """The same starts without and with TTEO, then others in TTEO's time: table, record, picture."""
    N = args.starts

    def found(starts, iterations, seed=args.seed):
        generator = torch.Generator(args.device).manual_seed(seed)
        # equal batches, so times compare
        return draw([args.prompt], starts, iterations, generator, args.chunk or N)

    def numbers(best):
        if not best.loss.isfinite():
            raise UserError("no start has a finite loss: the student's training diverged, or a "
                            "reward overflowed")
        scores = rewards(best.img, [args.prompt])
        row = {"score": weighted(scores, weights), "loss": best.loss, "seconds": best.seconds}
        return {name: float(value) for name, value in (row | scores).items()}

    found(1, 2)                                       # untimed: the first pass of anything is slow
    before = found(N, 1)
    after = found(N, args.iterations)
    n = max(1, round(N * after.seconds / before.seconds))
    others = found(n, 1, args.seed + 1)
    captions = [f"best of {N} starts", "the same, with TTEO", f"best of {n} others"]
    rows = [numbers(best) for best in (before, after, others)]
    print_rows(dict(zip(captions, rows)))
    start = after.start.item()
    k = after.every.index[0, start].item()
    print(f"TTEO's best is start {start} at iteration {k}, both counted from 0")

    append_rows(f"{args.out}/results.jsonl", [vars(args) | facts | environment(args.device) | {
        "teacher": teacher.spec.name,
        "weights": weights,
        "history": after.every.history[:, 0].tolist(),                     # (iterations, N)
        "before": rows[0],
        "after": rows[1] | {"start": start, "iteration": k},
        "best_of": rows[2] | {"n": n},
    }])
    captions[0] = f"{N} starts"                       # all of them are shown
    images = before.every.img[0], after.every.img[0], others.img
    strips = [(text, to_bytes(img, teacher.spec)) for text, img in zip(captions, images)]
    sheet(strips, f"{args.out}/tteo.png", columns=N)


# ------------------------------------------------------------------------------------ benchmarks
def on_shapes(args, teacher, rewards, draw, facts, config):
    """`compare` on args.benchmark prompts of the world of shapes: GenEval, exact, and rewards."""
    if not teacher.spec.rewards:
        raise UserError("--benchmark is of the world of shapes, which "
                        f"{teacher.spec.name} does not draw: give it a --prompt, or --metrics")
    prompts, _ = shapes_benchmark(args.benchmark, args.seed)
    judge = functools.partial(judge_shapes, teacher, rewards, n=args.benchmark)
    compare(args, teacher, draw, facts, config, prompts, judge, args.batch or 20)


def on_benchmark(args, teacher, draw, facts, config, task, bench):
    """`compare` on a Benchmark: its folders are below OUT, one for each way."""
    def judge(make_images, asked, desc, **how):
        folder = f"{args.out}/{task}/{file_name(desc)}"
        return run_benchmark(bench, asked, make_images, folder, desc=desc, **how)

    compare(args, teacher, draw, facts, config, bench.prompts, judge, args.batch or 4, task)


def compare(args, teacher, draw, facts, config, prompts, judge, batch, task="tteo"):
    """All prompts from one start, with TTEO, and by best-of-N: a row of results for each way.

    judge(make_images, asked=, batch=, seed=, desc=) -> a row; make_images is given rows of `asked`,
    which are places in `prompts`. All images are the soft ones. The columns are those of Tab. 3,
    Fig. 14 and Tab. 6, whose seconds are those that one process takes for a prompt.
    """
    asked = torch.arange(len(prompts), device=args.device)

    def make_images(asked, generator, starts, iterations, seconds=None):
        some = [prompts[i] for i in asked.tolist()]
        found = draw(some, starts, iterations, generator)
        if seconds is not None:
            seconds["all"] += found.seconds
        return to_bytes(found.img, teacher.spec)

    def seconds_of(starts, iterations):
        return draw(prompts[:batch], starts, iterations).seconds

    shown = min(len(prompts), 20 if teacher.spec.image[1] < 100 else 4)
    N, k = args.starts, args.iterations
    ways = [("1 start", "student", 1, 1), (f"TTEO, {N} starts x {k}", f"TTEO-{N}x{k}", N, k)]
    for n in args.best_of or [starts_in_the_same_time(N, k, seconds_of)]:
        ways.append((f"best of {n}", f"best-of-{n}", n, 1))
    rows, strips = [], []
    for name, kind, starts, iterations in ways:
        make = functools.partial(make_images, starts=starts, iterations=iterations)
        row = {"model": name, "kind": kind, "steps": 1, "teacher": teacher.spec.name}
        row |= {"starts": starts, "iterations": iterations} | facts
        row |= judge(make, asked=asked, batch=batch, seed=args.seed, desc=name)
        row["seconds/prompt"] = row.get("per_prompt", 1) * row["processes"] / row["images/s"]
        row["published"] = published(row, config) or None
        rows.append(row)
        if is_main():                                 # at once: a later crash must not cost it
            append_rows(f"{args.out}/results.jsonl", [row | environment(args.device)])
        strips.append((name, fixed_sample(make, asked, shown, args.seed)))
    if is_main():
        sheet(strips, f"{args.out}/{task}.png", words=spread(prompts, shown))
        print(table(rows))


def starts_in_the_same_time(N, iterations, seconds_of):
    """How many plain starts the time of TTEO from N starts pays for.

    seconds_of(starts, iterations): of a batch of prompts.
    """
    seconds_of(N, 2)                                  # untimed: the first pass of anything is slow
    goal = seconds_of(N, iterations)
    n = N
    for _ in range(2):                                # again: a start may cost more among many
        n = max(1, round(n * goal / seconds_of(n, 1)))
    return from_first(n)
