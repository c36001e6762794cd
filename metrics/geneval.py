"""Benchmarks of text to image: GenEval, HPS v2, CLIP score. What to draw, where it is written, how it is judged.

GenEval. A detector says what it sees, and rules say whether that is what the prompt asked for: six tasks, 553 prompts,
four images each (Ghosh et al. 2023; the rules are evaluation/evaluate_images.py of their repository). Published scores
rest on one detector, mmdetection's Mask2Former with Swin-S, and one judge of colors, OpenAI's CLIP ViT-L-14; with
others, numbers compare only with each other. So both are arguments here,

    detector(image) -> {class: [((x1, y1, x2, y2), score), ...]}, in any order
    color_of(image, box, class) -> one of COLORS; the box comes as the detector made it, and may carry a mask

and `write_geneval` writes the folder that the official programs read.

COCO-30k. A fixed list of 30,000 captions (DMD2's captions_coco14_test.txt), an image each. FID compares with *all*
40,504 images of val2014, and both sides go through `coco_crop` to 256 px, then `clean_resize` to Inception's 299.
MJHQ-30k: its 30,000 prompts against its 30,000 images, `clean_resize` alone; the paper states no crop.
--benchmark clip --save_images writes the generated side of either.

evaluate.py runs them: --metrics clip hps geneval.
"""

import functools
import json
import os
import re

import numpy as np
import torch.nn.functional as F
from PIL import Image

from machinery.errors import UserError
from machinery.pictures import save_images
from networks.clip import preprocess_pil


TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


def kept(found, tag):
    """The boxes of a class that count, surest first: scores strictly above 0.3 (0.9 in counting), 16 at most."""
    score = np.array([s for _, s in found], dtype=np.float32)
    low = np.float32(0.9 if tag == "counting" else 0.3)          # in float32 as well: a score of 0.3 is out
    order = np.argsort(score, kind="stable")[::-1]               # (numpy's default orders ties by CPU)
    return [found[i][0] for i in order if score[i] > low][:16]


def relations(box_a, box_b):
    """Where A is, seen from B: a set of RELATIONS, none, one or two of them (y points down).

    With o from B's center to A's, per axis r = sign(o) max(|o| - 0.1 (size A + size B), 0): boxes about one center
    have no relation. A is left of B where r_x < -|o| / 2, and so on; |o| is the length before shrinking.
    """
    a, b = (np.asarray(box, dtype=np.float32)[:4].reshape(2, 2) for box in (box_a, box_b))    # corners (x, y)
    o = a.mean(0) - b.mean(0)
    size = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])             # absolute: corners may come in any order
    r = np.maximum(np.abs(o) - np.float32(0.1) * size, 0) * np.sign(o)
    if (np.abs(r) < 1e-3).all():
        return set()
    x, y = r / np.linalg.norm(o)
    return {name for name, holds in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)) if holds}


def complaint(clause, boxes, groups, color):
    """What is wrong with the boxes for an `include` clause, or None. groups: what fulfilled each earlier clause."""
    name, count = clause["class"], clause["count"]
    if len(boxes) < count:
        return f"expected {count} {name}, found {len(boxes)}"
    if "color" in clause:
        seen = [color(box, name) for box in boxes]
        if any(c != clause["color"] for c in seen):
            return f"expected {count} {clause['color']} {name}, found {' and '.join(seen)}"
    if "position" in clause:
        where, target = clause["position"]
        if groups[target] is None:
            return f"expected {name} {where} something that is missing or wrong itself"
        for true in (relations(a, b) for a in boxes for b in groups[target]):
            if where not in true:
                return f"expected {name} {where} its target, found it {' and '.join(sorted(true)) or 'at no side'}"
    return None


def verdict(metadata, detections, color):
    """(right?, why not) of one image: what the detector found, against a line of the benchmark.

    color(box, class) -> name is asked where a clause speaks of one. Of each class only the surest boxes are
    judged, as many as were asked for: a blue bench beside a surer red one is no blue bench.
    """
    found = {name: kept(boxes, metadata["tag"]) for name, boxes in detections.items()}
    groups, wrong = [], []
    for clause in metadata.get("include", []):                   # all must hold
        boxes = found.get(clause["class"], [])[:clause["count"]]
        why = complaint(clause, boxes, groups, color)
        groups.append(None if why else boxes)
        wrong += [why] if why else []
    for clause in metadata.get("exclude", []):                   # none may: "two apples" excludes three
        if (n := len(found.get(clause["class"], []))) >= clause["count"]:
            wrong.append(f"expected fewer than {clause['count']} {clause['class']}, found {n}")
    return not wrong, "; ".join(wrong)


def geneval_table(rows):
    """{"geneval": mean of the six tasks, not of the images, task: share of right images, ...} from `geneval`'s rows.

    A task without images is left out, and then the mean is None.
    """
    right = {tag: [] for tag in TASKS}
    for tag, correct, *_ in rows:
        right[tag].append(correct)
    table = {tag: sum(r) / len(r) for tag, r in right.items() if r}
    return {"geneval": sum(table.values()) / len(TASKS) if len(table) == len(TASKS) else None, **table}


def parse_metadata(text, where):
    """A line of evaluation_metadata.jsonl as a dict, or a sentence on what the rules above would not understand."""
    def expect(holds, words):
        if not holds:
            raise ValueError(f"expected {words}")
    try:
        line = json.loads(text)
        expect({"tag", "prompt", "include"} <= set(line), "tag, prompt and include")
        expect(line["tag"] in TASKS, f"a tag out of {', '.join(TASKS)}, got {line['tag']!r}")
        for i, clause in enumerate([*line["include"], *line.get("exclude", [])]):
            expect({"class", "count"} <= set(clause), "class and count in every entry")
            expect(clause["count"] in range(1, 17), f"a count from 1 to 16, got {clause['count']!r}")
            expect(clause.get("color", "red") in COLORS, f"a color out of {', '.join(COLORS)}")
            where_to, target = clause.get("position", ("above", None))
            expect(where_to in RELATIONS and target in (None, *range(i)), "a position [relation, earlier entry]")
    except (ValueError, TypeError) as err:
        raise UserError(f"{where} is no prompt of GenEval: {err}")
    return line


def read_metadata(path):
    """GenEval's prompts, from its evaluation_metadata.jsonl. The place of a line, from 0, is its folder's name."""
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.readlines() or [""]
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"cannot read {path} ({err}): expected GenEval's evaluation_metadata.jsonl")
    return [parse_metadata(text, f"{path}, line {i}") for i, text in enumerate(lines, 1)]


def write_geneval(folder, metadata_list, images_per_prompt):
    """<folder>/<00000>/metadata.jsonl and samples/<00000>.png. For each prompt uint8 images (n, 3, H, W).

    images_per_prompt may be a generator: 2,212 images need not fit into memory.
    """
    for i, (metadata, images) in enumerate(zip(metadata_list, images_per_prompt, strict=True)):
        save_images(os.path.join(folder, f"{i:05d}", "samples"), images, "png")
        with open(os.path.join(folder, f"{i:05d}", "metadata.jsonl"), "w") as f:
            json.dump(metadata, f)


def read_geneval(folder):
    """(metadata, [RGB pictures]) of such a folder, prompt by prompt."""
    path = folder
    try:
        for prompt in sorted(filter(str.isdigit, os.listdir(folder))):
            path = os.path.join(folder, prompt, "metadata.jsonl")
            with open(path, encoding="utf-8") as f:
                metadata = parse_metadata(f.read(), path)
            images, samples = [], os.path.join(folder, prompt, "samples")
            for name in sorted(n for n in os.listdir(samples) if re.fullmatch(r"\d+\.png", n)):
                path = os.path.join(samples, name)
                images.append(Image.open(path).convert("RGB"))
            yield metadata, images
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"cannot read {path} ({err}): expected <index>/metadata.jsonl, <index>/samples/<n>.png")


def geneval(folder, detector, color_of):
    """Rows (task, right?, why not), one an image, of a folder that `write_geneval` wrote."""
    for metadata, images in read_geneval(folder):
        for img in images:
            yield metadata["tag"], *verdict(metadata, detector(img), functools.partial(color_of, img))


TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


def color_vectors(model, name, device="cpu"):
    """A vector for each of COLORS, (10, embed): of what TEMPLATES say of a thing called `name`, the mean direction."""
    ids = model.tokenize([words.format(color, name) for color in COLORS for words in TEMPLATES])
    g = model.text_features(ids.to(device)).unflatten(0, (-1, len(TEMPLATES)))                # (10, 3, embed), length 1
    return F.normalize(g.mean(1), dim=-1)


def color_judge(model, device="cpu"):
    """color_of(PIL picture, box, class) -> the one of COLORS whose text a CLIP finds nearest to the object.

    The picture is painted gray outside the object's mask, then cut to its box.
    """
    vectors = functools.cache(lambda name: color_vectors(model, name, device))

    def color_of(image, box, name):
        if (mask := getattr(box, "mask", None)) is not None:
            gray = Image.new("RGB", image.size, "#999")
            image = Image.composite(image, gray, Image.fromarray(mask.cpu().numpy()))
        pixels = preprocess_pil(image.crop(box), model.size)[None].to(device)
        return COLORS[int((vectors(name) @ model.image_features(pixels)[0]).argmax())]
    return color_of
