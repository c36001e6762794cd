"""GenEval: a detector says what it sees, and rules say whether that is what the prompt asked for.

553 prompts in six tasks, four images each (Ghosh et al. 2023). The rules here are those of
evaluation/evaluate_images.py in their repository. Published scores rest on one detector
(mmdetection's Mask2Former with Swin-S) and one classifier of colors (OpenAI's CLIP ViT-L-14).
Scores by other networks compare only with each other, so both networks are arguments here: a
`Detector`.

A line of evaluation_metadata.jsonl, called `metadata`, says what one prompt asks for:

    {"tag": one of TASKS, "prompt": "a photo of ...", "include": [clause, ...], "exclude": [clause]}
    clause: {"class": "dog", "count": 2, "color": "red", "position": ["left of", 0]}

Color and position are optional; a position is relative to an earlier clause, given by its index.

evaluate.py runs it: --metrics geneval.
"""

import functools
import itertools
import json
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from PIL import Image

from machinery.errors import UserError
from machinery.pictures import save_images
from networks.clip import preprocess_pil


TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"
)
RELATIONS = ("left of", "right of", "above", "below")


class Detector(NamedTuple):
    """What looks at a picture. A box is (x1, y1, x2, y2) in pixels, and may carry a `mask`."""

    find: Callable               # find(picture) -> {class: [(box, score), ...]}, in any order
    color_of: Callable           # color_of(picture, box, class) -> one of COLORS
    classes: tuple               # what `find` can find
    facts: dict                  # what a row of results says about the two

    def is_right(self, metadata, picture):
        color = functools.partial(self.color_of, picture)
        return verdict(metadata, self.find(picture), color)[0]


# ---------------------------------------------------------------------------------------- the rules
def kept(boxes, tag):
    """The boxes of one class that count, surest first: at most 16, with scores above 0.3.

    boxes: [(box, score), ...]. In counting the limit is 0.9. Scores are compared in float32, as in
    the official program, so a score of exactly 0.3 does not count.
    """
    limit = np.float32(0.9 if tag == "counting" else 0.3)
    surest = sorted(boxes, key=lambda found: found[1])[::-1]
    return [box for box, score in surest if np.float32(score) > limit][:16]


def relations(box_a, box_b):
    """Where A is, seen from B: a set of none, one or two of RELATIONS (y points down).

    With o from B's center to A's, per axis r = sign(o) max(|o| - 0.1 (size A + size B), 0): boxes
    about one center have no relation. A is left of B where r_x < -|o| / 2, and so on; |o| is the
    length before shrinking.
    """
    corners = np.array([box_a, box_b], dtype=np.float32).reshape(2, 2, 2)    # (box, corner, xy)
    size = np.ptp(corners, axis=1).sum(0)                # corners may come in any order
    a, b = corners.mean(1)
    o = a - b
    r = np.sign(o) * np.maximum(abs(o) - 0.1 * size, 0)
    if abs(r).max() < 1e-3:
        return set()
    x, y = r / np.linalg.norm(o)
    return set(itertools.compress(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)))


def complaints(metadata, detections, color):
    """Yields what is wrong with a picture, clause by clause.

    What comes after the first complaint may only follow from it. Of each clause only the surest
    boxes are looked at, as many as were asked for: with a surer red bench beside it, a blue bench
    does not count as "a blue bench".
    """
    tag, matched = metadata["tag"], []
    for clause in metadata["include"]:                   # all of them must hold
        name, count = clause["class"], clause["count"]
        boxes = kept(detections.get(name, []), tag)[:count]
        if len(boxes) < count:
            yield f"expected {count} {name}, found {len(boxes)}"
        if "color" in clause:
            seen = [color(box, name) for box in boxes]
            if set(seen) != {clause["color"]}:
                yield f"expected {count} {clause['color']} {name}, found {' and '.join(seen)}"
        if "position" in clause:
            relation, target = clause["position"]
            for box, other in itertools.product(boxes, matched[target]):
                where = relations(box, other)
                if relation not in where:
                    where = " and ".join(sorted(where)) or "at no side"
                    yield f"expected {name} {relation} its target, found it {where}"
        matched.append(boxes)
    for clause in metadata.get("exclude", []):           # "two apples" excludes a third one
        name, limit = clause["class"], clause["count"]
        n = len(kept(detections.get(name, []), tag))
        if n >= limit:
            yield f"expected fewer than {limit} {name}, found {n}"


def verdict(metadata, detections, color):
    """(right?, why not) of one picture: what the detector found, against what was asked for.

    detections: {class: [(box, score), ...]}. color(box, class) -> name is called where a clause has
    a color. The reason is the first of the complaints, or "".
    """
    why = next(complaints(metadata, detections, color), "")
    return not why, why


def geneval_table(verdicts):
    """{"geneval": mean of the six tasks (not of the images), task: share of right images, ...}.

    verdicts: (task, right?, ...) of each image. A task without images is left out, and then the
    mean is None.
    """
    right = {task: [] for task in TASKS}
    for task, correct, *_ in verdicts:
        right[task].append(correct)
    shares = {task: sum(each) / len(each) for task, each in right.items() if each}
    mean = sum(shares.values()) / len(TASKS) if len(shares) == len(TASKS) else None
    return {"geneval": mean, **shares}


# ------------------------------------------------------------------------- prompts and folders
def expect(holds, words):
    if not holds:
        raise ValueError(f"expected {words}")


def parse_metadata(text, where):
    """A line of evaluation_metadata.jsonl as a dict; UserError where the rules cannot follow it."""
    try:
        line = json.loads(text)
        expect({"tag", "prompt", "include"} <= set(line), "tag, prompt and include")
        expect(line["tag"] in TASKS, f"a tag out of {', '.join(TASKS)}, got {line['tag']!r}")
        for i, clause in enumerate([*line["include"], *line.get("exclude", [])]):
            expect({"class", "count"} <= set(clause), "class and count in every entry")
            count = clause["count"]
            expect(count in range(1, 17), f"a count from 1 to 16, got {count!r}")
            expect(clause.get("color", "red") in COLORS, f"a color out of {', '.join(COLORS)}")
            if "position" in clause:
                relation, target = clause["position"]
                known = relation in RELATIONS and target in range(i)
                expect(known, "a position [relation, earlier entry]")
    except (ValueError, TypeError) as err:
        raise UserError(f"{where} is no prompt of GenEval: {err}")
    return line


def read_metadata(path):
    """GenEval's prompts from its evaluation_metadata.jsonl. A line's index names its folder."""
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.readlines() or [""]
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"cannot read {path} ({err}): expected GenEval's evaluation_metadata.jsonl")
    return [parse_metadata(text, f"{path}, line {i}") for i, text in enumerate(lines, 1)]


def write_geneval(folder, lines):
    """<folder>/<00000>/metadata.jsonl, and beside it an empty samples/ for images <00000>.png."""
    for i, metadata in enumerate(lines):
        save_images(f"{folder}/{i:05d}/samples", (), "png")
        with open(f"{folder}/{i:05d}/metadata.jsonl", "w") as f:
            json.dump(metadata, f)


def read_geneval(folder):
    """Yields (metadata, [RGB pictures]) of such a folder, prompt by prompt."""
    path = folder
    try:
        for index in sorted(filter(str.isdigit, os.listdir(folder))):
            path = f"{folder}/{index}/metadata.jsonl"
            with open(path, encoding="utf-8") as f:
                metadata = parse_metadata(f.read(), path)
            images = []
            for name in sorted(os.listdir(f"{folder}/{index}/samples")):
                if re.fullmatch(r"\d+\.png", name):
                    path = f"{folder}/{index}/samples/{name}"
                    images.append(Image.open(path).convert("RGB"))
            yield metadata, images
    except (OSError, UnicodeDecodeError) as err:
        expected = "expected <index>/metadata.jsonl, <index>/samples/<n>.png"
        raise UserError(f"cannot read {path} ({err}): {expected}")


# -------------------------------------------------------------------------- the color of a box
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


@functools.cache
def color_vectors(model, name, device="cpu"):
    """(10, embed): for each of COLORS the mean direction of TEMPLATES about a `name`."""
    texts = [words.format(color, name) for color in COLORS for words in TEMPLATES]
    g = model.text_features(model.tokenize(texts).to(device))    # (30, embed), each of length 1
    return F.normalize(g.unflatten(0, (-1, len(TEMPLATES))).mean(1), dim=-1)


def color_classifier(model, device="cpu"):
    """color_of(picture, box, class) -> the one of COLORS whose text a CLIP finds nearest.

    The picture is painted gray outside the object's mask, then cut to its box.
    """
    def color_of(picture, box, name):
        mask = getattr(box, "mask", None)
        if mask is not None:
            gray = Image.new("RGB", picture.size, "#999")
            picture = Image.composite(picture, gray, Image.fromarray(mask.cpu().numpy()))
        pixels = preprocess_pil(picture.crop(box), model.size)[None].to(device)
        cosines = color_vectors(model, name, device) @ model.image_features(pixels)[0]
        return COLORS[cosines.argmax()]

    return color_of
