"""How a run's pictures are scored: the one place that knows which judge a world has.

A judge is a function judge(make_images, n, batch=, seed=, desc=) -> a row of results. Its
make_images, and the way batches go to processes, are those of `metrics.fid.image_metrics`.
Photographs of other worlds have a judge only where flags of train.py name one: `training_judge`.
"""

import functools
import os
from types import SimpleNamespace

import numpy as np
import torch

from machinery.errors import UserError
from machinery.files import local
from machinery.pictures import picture
from metrics.benchmarks import clip_cosines, load_checked, load_clip, mask2former_detector
from metrics.engine import in_turn, scored, usual_batch
from metrics.fid import image_metrics
from metrics.geneval import geneval_table, read_metadata, verdict
from metrics.reference import load_prepared
from networks.clip import CLIP_G
from reward import rewards_for
from worlds.fashion import load_extractor
from worlds.shapes import SHAPES, benchmark, detect


def judge_images(teacher, extractor, reference, make_images, n, batch=250, seed=0, desc=None,
                 prompts=None):
    """FID and its relatives in an extractor's feature space, on n images.

    All classes, or prompts, in turn.
    """
    asked = in_turn(teacher.conditions(prompts), n)
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


@torch.no_grad()
def judge_geneval(teacher, lines, detector, clip, make_images, n, batch=64, seed=0, desc=None):
    """GenEval's tasks by a Detector, and CLIP score, on n images: GenEval's prompts in turn."""
    prompts = [line["prompt"] for line in lines]
    which = in_turn(torch.arange(len(lines)), n).tolist()

    def score(part, img):
        """(b, 2) of uint8 images: right or wrong, the cosine of image and prompt."""
        pictures = [picture(pixels) for pixels in img]
        asked = [lines[i] for i in which[part]]
        right = [detector.is_right(line, seen) for line, seen in zip(asked, pictures)]
        cosine = clip_cosines(clip, pictures, [line["prompt"] for line in asked])
        return torch.stack([torch.tensor(right).to(cosine), cosine], 1)

    asked = in_turn(teacher.conditions(prompts), n)
    scores, facts = scored(make_images, asked, score, 2, batch, seed, desc)
    tags = [lines[i]["tag"] for i in which]
    tasks = geneval_table(zip(tags, scores[:, 0].tolist()))
    return {"n": n, **tasks, "clip_score": scores[:, 1].mean().item(), **facts, **detector.facts}


def training_judge(c, teacher, prompts, device):
    """The judge of a run of train.py with settings c: by Inception, by GenEval, or the world's."""
    judges, batch = [], usual_batch(teacher)
    if c.eval_reference:
        space = load_prepared(c.eval_reference, device, c.random_weights)
        judges.append(functools.partial(
            judge_images, teacher, *space, prompts=prompts, batch=batch))
    if c.eval_metadata:
        if teacher.text is None:
            raise UserError(f"--eval_metadata has prompts, and {teacher.spec.name} draws classes")
        lines = read_metadata(c.eval_metadata)
        names = ("detector", "clip_l", "clip_g")
        args = SimpleNamespace(
            detector="shapes" if teacher.spec.world == "shapes" else "mask2former",
            random_weights=c.random_weights, **{f"{name}_weights": None for name in names})
        detector = load_checked(args, lines, device, load_detector)
        clip, _ = load_clip(args, "clip_g", CLIP_G, device)
        judges.append(functools.partial(judge_geneval, teacher, lines, detector, clip, batch=batch))
    if not judges:
        return load_judge(teacher, device)

    def judge(*images, **how):
        row = {}
        for one in judges:
            row |= one(*images, **how)
        return row

    return judge


def load_judge(teacher, device="cpu"):
    """The judge of this teacher's world; None without a world, or without the rewards' weights."""
    spec = teacher.spec
    if spec.world == "fashion":
        return functools.partial(judge_images, teacher, *load_extractor(spec, device))
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
