"""Test-time optimization beside its baseline, best-of-N in the same time: numbers and a picture.

Both functions are given draw(prompts, starts=, iterations=, generator=), which is tteo.py's. It
returns the best image of each prompt, and the seconds that took. With one iteration nothing is
optimized, and what it returns is the best of its starts. So it is drawn twice, with and without
updates, and from the two times follows how many plain starts TTEO's time would pay for.

Results are appended to results.jsonl, and the pictures are in tteo.png, in the folder --out.
"""

import functools

import torch

from machinery.errors import UserError
from machinery.pictures import sheet, spread
from machinery.records import append_rows, environment, print_rows
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


def benchmark(args, teacher, rewards, draw, facts, batch=20):
    """N prompts from one start, with TTEO, and by best-of-N in TTEO's time: GenEval and rewards.

    Three columns of Tab. 6, on the world where GenEval is exact. All pictures are the soft ones.
    """
    if not teacher.spec.rewards:
        raise UserError("--benchmark is of the world of shapes, which "
                        f"{teacher.spec.name} does not draw: give it a --prompt")
    prompts, _ = shapes_benchmark(args.benchmark, args.seed)
    conditions = teacher.conditions(prompts)
    prompt_of = dict(zip(map(tuple, conditions.tolist()), prompts))

    def make_images(asked, generator, starts, iterations, seconds=None):
        some = [prompt_of[tuple(row)] for row in asked.tolist()]
        found = draw(some, starts, iterations, generator)
        if seconds is not None:
            seconds["all"] += found.seconds
        return to_bytes(found.img, teacher.spec)

    def seconds_of(starts, iterations):
        return draw(prompts[:batch], starts, iterations).seconds

    N, k = args.starts, args.iterations
    seconds_of(N, 2)                                  # untimed: the first pass of anything is slow
    goal = seconds_of(N, k)
    n = N
    for _ in range(2):                                # again: a start may cost more among many
        n = max(1, round(n * goal / seconds_of(n, 1)))
    ways = ("1 start", 1, 1), (f"TTEO, {N} starts x {k}", N, k), (f"best of {n}", n, 1)
    rows, strips = [], []
    for name, starts, iterations in ways:
        make = functools.partial(make_images, starts=starts, iterations=iterations)
        scores = judge_shapes(teacher, rewards, make, args.benchmark, batch, args.seed, name)
        rows.append({"model": name, "steps": 1} | scores | facts)
        strips.append((name, fixed_sample(make, conditions, 20, args.seed)))
    append_rows(f"{args.out}/results.jsonl", rows)
    sheet(strips, f"{args.out}/tteo.png", words=spread(prompts, 20))
    print(table(rows))
