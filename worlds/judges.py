"""How the worlds' pictures are scored: the one place that knows which judge a world has.

A judge is a function judge(make_images, n, batch=, seed=, desc=) -> a row of results. Its
make_images, and the way batches go to processes, are those of `metrics.fid.image_metrics`.
Photographs of other worlds have no judge here: see `metrics.reference.load_feature_space`.
"""

import functools
import os

import numpy as np
import torch

from machinery.files import local
from metrics.benchmarks import mask2former_detector
from metrics.engine import in_turn, scored
from metrics.fid import image_metrics
from metrics.geneval import geneval_table, verdict
from reward import rewards_for
from worlds.fashion import load_extractor
from worlds.shapes import SHAPES, benchmark, detect


def judge_fashion(teacher, extractor, reference, make_images, n, batch=250, seed=0, desc=None):
    """FID and its relatives in FashionNet's feature space, on n images, all classes in turn."""
    asked = in_turn(teacher.conditions(), n)
    return image_metrics(make_images, asked, extractor, reference, batch, seed, desc=desc)


@torch.no_grad()
def judge_shapes(teacher, rewards, make_images, n, batch=250, seed=0, desc=None,
                 asked=None):
    """GenEval's six tasks, scored exactly by the reader of shapes, and rewards, on n prompts.

    Chroma, max - min of a pixel's colors in [0, 1], tells over-saturation, which is what a reward
    without Di[M]O ends in. asked: for each prompt what make_images draws it from, by default rows
    of teacher.conditions.
    """
    prompts, metadata = benchmark(n, seed)

    def score(part, img):
        """(b, 2 + rewards) of uint8 images (b, 3, H, W): right or wrong, chroma, rewards."""
        pictures = zip(metadata[part], img.cpu())
        right = [verdict(line, *detect(pixels))[0] for line, pixels in pictures]
        chroma = (img.amax(1) - img.amin(1)).float().mean((1, 2)) / 255      # (b,)
        scores = rewards(img.float() / 255, prompts[part])
        return torch.stack([torch.tensor(right).to(chroma), chroma, *scores.values()], 1)

    names = ["right", "chroma", *rewards.models]
    if asked is None:
        asked = teacher.conditions(prompts)
    scores, facts = scored(make_images, asked, score, len(names), batch, seed, desc)
    tags = [line["tag"] for line in metadata]
    tasks = geneval_table(zip(tags, scores[:, 0].tolist()))
    means = dict(zip(names, scores.mean(0).tolist()))
    del means["right"]
    return {"n": n, **tasks, **means, **facts, "reader": "worlds/shapes.py"}


def load_judge(teacher, device="cpu"):
    """The judge of this teacher's world; None without a world, or without the rewards' weights."""
    spec = teacher.spec
    if spec.world == "fashion":
        return functools.partial(judge_fashion, teacher, *load_extractor(spec, device))
    ships = all(os.path.exists(local(path)) for path, _ in spec.rewards.values())
    if spec.world == "shapes" and ships:
        rewards = rewards_for(spec, spec.rewards, device=device)
        return functools.partial(judge_shapes, teacher, rewards)


def load_detector(args, device):
    """(detector, color_of, the classes they know, what rows say of them), as --detector says."""
    if args.detector != "shapes":
        return mask2former_detector(args, device)

    def see(image):
        return detect(np.array(image).transpose(2, 0, 1))

    def detector(image):
        return see(image)[0]

    def color_of(image, box, name):
        return see(image)[1](box, name)

    note = "not comparable with published GenEval, whose detector is another"
    facts = dict(detector="worlds/shapes.py", note=f"worlds/shapes.py detects: {note}")
    return detector, color_of, SHAPES, facts
