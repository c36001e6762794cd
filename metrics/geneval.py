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
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch.nn.functional as F
from PIL import Image

from machinery.errors import explain
from machinery.pictures import save_images
from networks.clip import preprocess_pil


TASKS = "single_object two_object counting colors position color_attr".split()
COLORS = "red orange yellow green blue purple pink brown black white".split()
RELATIONS = ("left of", "right of", "above", "below")


class Detector(NamedTuple):
    """What looks at a picture. A box is (x1, y1, x2, y2), a tuple, in pixels."""

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
    corners = np.float32([box_a, box_b]).reshape(2, 2, 2)                    # (box, corner, xy)
    size = np.ptp(corners, axis=1).sum(0)                # corners may come in any order
    a, b = corners.mean(1)
    o = a - b
    r = np.sign(o) * np.maximum(abs(o) - 0.1 * size, 0)
    if abs(r).max() < 1e-3:
        return set()
    x, y = r / np.linalg.norm(o)
    return set(itertools.compress(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)))


def verdict(metadata, detections, color):
    """(right?, why not) of one picture: what the detector found, against what was asked for.

    detections: {class: [(box, score), ...]}. color(box, class) -> name is called where a clause has
    a color. The reason is the first that was found, or "".

    Of each clause only the surest boxes are looked at, as many as were asked for: with a surer red
    bench beside it, a blue bench does not count as "a blue bench".
    """
    tag, matched = metadata["tag"], []
    for clause in metadata["include"]:                   # all of them must hold
        name, count = clause["class"], clause["count"]
        boxes = kept(detections.get(name, []), tag)[:count]
        if len(boxes) < count:
            return False, f"expected {count} {name}, found {len(boxes)}"
        if "color" in clause:
            seen = [color(box, name) for box in boxes]
            if set(seen) != {clause["color"]}:
                why = f"expected {count} {clause['color']} {name}, found {' and '.join(seen)}"
                return False, why
        if "position" in clause:
            relation, target = clause["position"]
            for box, other in itertools.product(boxes, matched[target]):
                where = relations(box, other)
                if relation not in where:
                    where = " and ".join(sorted(where)) or "at no side"
                    return False, f"expected {name} {relation} its target, found it {where}"
        matched.append(boxes)
    for clause in metadata.get("exclude", []):           # "two apples" excludes a third one
        n = len(kept(detections.get(clause["class"], []), tag))
        if n >= clause["count"]:
            return False, f"expected fewer than {clause['count']} {clause['class']}, found {n}"
    return True, ""


def geneval_table(verdicts):
    """{"geneval": mean of the six tasks (not of the images), task: share of right images, ...}.

    verdicts: (task, right?) of each image. A task without images is left out, and then the
    mean is None.
    """
    verdicts, shares = list(verdicts), {}
    for task in TASKS:
        right = [correct for tag, correct in verdicts if tag == task]
        if right:
            shares[task] = sum(right) / len(right)
    mean = sum(shares.values()) / len(TASKS) if len(shares) == len(TASKS) else None
    return {"geneval": mean, **shares}


# ------------------------------------------------------------------------- prompts and folders
def expect(holds, words):
    if not holds:
        raise ValueError(f"expected {words}")


def parse_metadata(text, where):
    """A line of evaluation_metadata.jsonl as a dict; UserError where the rules cannot follow it."""
    with explain(f"{where} is no prompt of GenEval: {{}}", ValueError, TypeError):
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
    return line


def read_metadata(path):
    """GenEval's prompts from its evaluation_metadata.jsonl. A line's index names its folder."""
    with explain(f"cannot read {path} ({{}}): expected GenEval's evaluation_metadata.jsonl"):
        lines = Path(path).read_text("utf-8").removesuffix("\n").split("\n")
    return [parse_metadata(text, f"{path}, line {i}") for i, text in enumerate(lines, 1)]


def write_geneval(folder, lines):
    """<folder>/<00000>/metadata.jsonl, and beside it an empty samples/ for images <00000>.png."""
    for i, metadata in enumerate(lines):
        save_images(f"{folder}/{i:05d}/samples", (), "png")
        Path(f"{folder}/{i:05d}/metadata.jsonl").write_text(json.dumps(metadata))


def read_geneval(folder):
    """Yields (metadata, [RGB pictures]) of such a folder, prompt by prompt."""
    for place in sorted(Path(folder).glob("[0-9]*")):
        metadata = read_metadata(f"{place}/metadata.jsonl")[0]
        images = []
        for path in sorted(place.glob("samples/[0-9]*.png")):
            with explain(f"cannot read {path} ({{}}): expected an image of GenEval"):
                images.append(Image.open(path).convert("RGB"))
        yield metadata, images


# -------------------------------------------------------------------------- the color of a box
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


@functools.cache
def color_vectors(model, name, device):
    """(10, embed): for each of COLORS the mean direction of TEMPLATES about a `name`."""
    texts = [words.format(color, name) for color in COLORS for words in TEMPLATES]
    g = model.text_features(model.tokenize(texts).to(device))    # (30, embed), each of length 1
    return F.normalize(g.view(10, 3, -1).mean(1))


def color_classifier(model, device):
    """color_of(picture, box, class) -> the one of COLORS whose text a CLIP finds nearest.

    The picture is painted gray outside box.mask, (H, W), and then cut to the box.
    """
    def color_of(picture, box, name):
        gray = Image.new("RGB", picture.size, "#999")
        mask = Image.fromarray(box.mask.cpu().numpy())
        crop = Image.composite(picture, gray, mask).crop(box)
        pixels = preprocess_pil(crop, model.size)[None].to(device)
        cosines = color_vectors(model, name, device) @ model.image_features(pixels)[0]
        return COLORS[cosines.argmax()]

    return color_of
