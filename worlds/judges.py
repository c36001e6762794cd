"""Which judge a world has."""

import functools
import os

import numpy as np
import torch

from machinery.files import local
from metrics.engine import in_turn, scored
from metrics.fid import image_metrics
from metrics.geneval import geneval_table, verdict
from metrics.benchmarks import mask2former_detector
from reward import rewards_for
from worlds.fashion import load_extractor
from worlds.shapes import SHAPES, benchmark, detect


@torch.no_grad()
def judge_shapes(teacher, rewards, make_images, n, batch=250, seed=0, desc=None):
    """The shapes world's judge: GenEval's six tasks, scored exactly by its reader, and rewards, on n prompts.

    Chroma, max - min of a pixel's colors in [0, 1], tells over-saturation: what becomes of a reward without Di[M]O.

    The arguments are those of `image_metrics`, and batches go to processes in the same way.
    """
    prompts, metadata = benchmark(n, seed)
    rows, names = teacher.conditions(prompts), list(rewards.models)

    def score(part, img):
        right = [verdict(meta, *detect(pixels))[0] for meta, pixels in zip(metadata[part], img.cpu().numpy())]
        scores = rewards(img.float() / 255, prompts[part])
        chroma = (img.amax(1) - img.amin(1)).float().mean((1, 2)) / 255                       # (b,)
        return torch.stack([torch.tensor(right).to(chroma), chroma, *(scores[name] for name in names)], 1)

    right, facts = scored(make_images, rows, score, 2 + len(names), batch, seed, desc)
    tasks = geneval_table((meta["tag"], r) for meta, r in zip(metadata, right[:, 0].tolist()))
    means = dict(zip(("chroma", *names), right[:, 1:].mean(0).tolist()))
    return {"n": n, **tasks, **means, **facts, "reader": "worlds/shapes.py"}


def load_judge(teacher, device="cpu"):
    """judge(make_images, n, batch=, seed=, desc=) -> a row of results for this teacher's world, or None.

    Fashion is judged by FID and its relatives, shapes by GenEval and CLIP; photographs by `load_feature_space`, not here.
    """
    spec = teacher.spec
    if spec.world == "fashion":
        extractor, reference = load_extractor(spec, device)
        conditions = teacher.conditions()
        return lambda make, n, batch=250, seed=0, desc=None: image_metrics(make, in_turn(conditions, n), extractor, reference, batch, seed, desc=desc)
    if spec.world == "shapes" and all(os.path.exists(local(path)) for path, _ in spec.rewards.values()):
        rewards = rewards_for(spec, spec.rewards, device=device)
        return functools.partial(judge_shapes, teacher, rewards)
    return None


def load_detector(args, device):
    """(detector, color_of, the classes they know, what rows say of them) for --detector."""
    if args.detector == "shapes":
        see = lambda image: detect(np.array(image).transpose(2, 0, 1))
        note = "worlds/shapes.py detects: not comparable with published GenEval, whose detector is another"
        return (lambda image: see(image)[0], lambda image, box, name: see(image)[1](box, name), SHAPES,
                dict(detector="worlds/shapes.py", note=note))
    return mask2former_detector(args, device)
