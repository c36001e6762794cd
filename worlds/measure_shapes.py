"""What is worth knowing about the shapes world, in numbers and pictures.

    python worlds/measure_shapes.py --accuracy                # how often the reader is right
    python worlds/measure_shapes.py --reward_accuracy         # how often the rewards are
    python worlds/measure_shapes.py --alike teacher out/run/ckpt.pt    # do pictures repeat?
    python worlds/measure_shapes.py --sheet out/shapes.png    # a picture of 40 scenes
    python worlds/measure_shapes.py --prompts FILE --n 4000   # captions, to distill from
"""

import functools
import json
import os
import sys

import numpy as np
import torch

sys.path.insert(0, f"{os.path.dirname(__file__)}/..")
from data.tokens import write_lines  # noqa: E402
from machinery.errors import guard  # noqa: E402
from machinery.flags import nonnegative_int, parser, positive_int  # noqa: E402
from machinery.pictures import sheet  # noqa: E402
from metrics.geneval import TASKS, geneval_table, verdict  # noqa: E402
from reward import rewards_for  # noqa: E402
from teachers import (SPECS, generate_student,  # noqa: E402
                      generate_teacher, load_student, load_teacher)
from worlds.shapes import (KINDS, MIXED, astray,  # noqa: E402
                           benchmark, caption, detect,
                           render, scenes)


SPEC = SPECS["meissonic-tiny"]


def accuracy(n=6000, seed=5):
    """Share of fresh renderings in which the reader finds what was asked for, per task.

    It decides by GenEval's rules.
    """
    rows = []
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        _, metadata, objects, relation = caption(rng, TASKS[i % len(TASKS)])
        img = render(rng, objects, relation).transpose(2, 0, 1)
        right, _ = verdict(metadata, *detect(img))
        rows.append((metadata["tag"], right))
    return geneval_table(rows)


def what_changed(prompt, other):
    """The kind of word in `other` that `prompt` lacks, or "order"."""
    for name, kind in zip(("place", "color", "shape", "shape", "number"), KINDS):
        if any(word in other and word not in prompt for word in kind):
            return name
    return "order"


@torch.no_grad()
def reward_accuracy(n=1500, seed=5):
    """How often each reward is right on fresh scenes: {reward: {what is wrong: share}}.

    It should give a picture more for its caption than for one gone astray, here by the kind of word
    that is wrong; and more than it gives to a picture in which objects touch. "taste" should be
    low: the standard deviation over pictures that fit a caption, by that over all pairs of a
    picture and a caption.
    """
    rng = np.random.default_rng(seed)
    rewards = rewards_for(SPEC, SPEC.rewards)
    img, prompts, _ = scenes(n, seed)
    touching = scenes(n, seed, touching=True).img
    twins = scenes(n, seed, again=1).img
    wrong = [astray(rng, prompt) for prompt in prompts]
    kinds = np.array(list(map(what_changed, prompts, wrong)))
    several = (touching != img).any((1, 2, 3))

    def score(img, prompts):
        return rewards(img.float() / 255, prompts)

    own, of_wrong = score(img, prompts), score(img, wrong)
    of_touching, of_twin = score(touching, prompts), score(twins, prompts)
    table = {}
    for name, r in own.items():
        r_wrong = of_wrong[name]
        right = (r > r_wrong).numpy()
        row = {kind: right[kinds == kind].mean() for kind in sorted(set(kinds))}
        row["touching"] = (r > of_touching[name])[several].double().mean()
        row["taste"] = (r - of_twin[name]).std() / 2**0.5 / torch.cat([r, r_wrong]).std()
        table[name] = {kind: round(float(share), 3) for kind, share in row.items()}
    return table


@torch.no_grad()
def alike(path, n=24, times=12, seed=3):
    """Share of tokens that agree in two pictures of a prompt, over n prompts; 1 if all are one.

    path: a student, or "teacher" for the teacher's own steps.
    """
    if path == "teacher":
        teacher = load_teacher(SPEC.name)
        draw = functools.partial(generate_teacher, teacher, steps=next(iter(SPEC.sampling)))
    else:
        teacher, net, _ = load_student(path, SPEC.name)
        draw = functools.partial(generate_student, teacher, net, **SPEC.student)
    torch.manual_seed(seed)
    prompts, _ = benchmark(n, seed)
    img = draw(teacher.conditions(np.repeat(prompts, times).tolist()))
    x = torch.cat([teacher.tokenizer.encode(part.float() / 255) for part in img.split(250)])
    x = x.view(n, times, -1)
    same = (x[:, :, None] == x[:, None]).float().mean(-1)                    # (n, times, times)
    pairs = n * times * (times - 1)
    return ((same.sum() - n * times) / pairs).item()


def show(facts):
    print(json.dumps(facts, indent=1))


def main(args):
    if args.accuracy:
        show(accuracy())
    if args.reward_accuracy:
        show(reward_accuracy())
    for path in args.alike:
        show({"student": path, "alike": round(alike(path), 3)})
    if args.prompts:
        prompts = []
        for i in range(args.n):
            rng = np.random.default_rng([args.seed, 78, i])
            prompts.append(caption(rng, str(rng.choice(MIXED))).prompt)
        write_lines(args.prompts, prompts)
    if args.sheet:
        img, prompts, _ = scenes(40)
        strip = ("scenes of the shapes world", img)
        sheet([strip], args.sheet, columns=10, words=prompts)


if __name__ == "__main__":
    ap = parser(__doc__)
    add = ap.add_argument
    add("--accuracy", action="store_true", help="score fresh renderings by the reader")
    add("--reward_accuracy", action="store_true",
        help="how often the rewards prefer the right caption, by what is wrong")
    add("--alike", nargs="+", metavar="CKPT", default=(),
        help="share of tokens that agree in two pictures of a prompt, of students "
             "(checkpoints or weights), or of: teacher")
    add("--sheet", metavar="PATH", help="write a picture of 40 scenes")
    add("--prompts", metavar="PATH", help="write --n captions, one per line")
    add("--n", type=positive_int, default=40_000, help="how many captions to write (%(default)s)")
    add("--seed", type=nonnegative_int, default=0, help="seed of the captions that are written")
    guard(lambda: main(ap.parse_args()))
