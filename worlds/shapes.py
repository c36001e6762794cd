"""Shapes, the text-to-image world: scenes of colored shapes, their captions, and a reader that scores them exactly.

    python worlds/make_shapes.py --accuracy            # how often the reader is right on fresh renderings, task by task
    python worlds/make_shapes.py --sheet out/shapes.png

A scene is one to four shapes of six colors on a gray ground, even or sloping, 32x32 pixels. Size, place, shade and
ground vary, so that many pictures fit a caption; but in steps, not continuously, or most of what a teacher has to learn
would be which of many nearly equal tokens comes next. Captions are those of GenEval's six tasks, and free mixtures:

    single_object   a ring                          colors       a red ring
    two_object      a ring and a square             color_attr   a red ring and a blue square
    counting        three rings                     position     a ring left of a square
    mixtures        two red rings, a red ring above a blue square

Since everything is drawn, everything can be read back without a detector: what is saturated is an object (the ground
is gray), connected pixels are one object, hue is its color, and its shape shows in how it fills its box.
"""

import colorsys
import re

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from metrics.geneval import TASKS, geneval_table, verdict


SIZE, FINE = 32, 8                                    # pixels a side; drawn FINE times larger, then reduced
SHAPES = ("circle", "square", "triangle", "ring", "cross")
HUES = {"red": 0, "orange": 30, "yellow": 58, "green": 125, "blue": 222, "purple": 285}       # degrees
COLORS = tuple(HUES)
MIXED = (*TASKS, "mixture", "mixture")                # what to train on
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = tuple(s + ("es" if s == "cross" else "s") for s in SHAPES)
KINDS = (tuple(RELATIONS), COLORS, SHAPES, PLURALS, tuple(NUMBERS.values()))      # of words that a caption can be wrong in
WORDS = (*"a an and of left right above below".split(), *(w for kind in KINDS[1:] for w in kind))
UNIT = 4                                              # sides, places and gaps are multiples of it: the tokens' patch
GRAYS, SHADES = (70, 100, 130, 160, 190), (0.8, 1.0)  # of the ground; HSV values of a shape
SIDES = {1: (3, 4), 2: (2, 3), 3: (2,), 4: (2,)}      # of n objects, in units


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption(rng, task):
    """(prompt, GenEval's metadata, objects [(shape, color or None)], relation or None) of a random scene of a task.

    tasks are GenEval's six, or "mixture". Metadata has GenEval's own form; a class is a shape.
    """
    s1, s2 = rng.choice(SHAPES, 2, replace=False).tolist()
    c1, c2 = rng.choice(COLORS, 2, replace=False).tolist()
    relation, n, kind = str(rng.choice(list(RELATIONS))), int(rng.integers(2, 5)), int(rng.integers(2))
    one = lambda s, c=None, **more: {"class": s, "count": 1, **({"color": c} if c else {}), **more}
    if task == "single_object":
        prompt, include, objects = article(s1), [one(s1)], [(s1, None)]
    elif task == "colors":
        prompt, include, objects = article(f"{c1} {s1}"), [one(s1, c1)], [(s1, c1)]
    elif task == "two_object":
        prompt, include, objects = f"{article(s1)} and {article(s2)}", [one(s1), one(s2)], [(s1, None), (s2, None)]
    elif task == "color_attr":
        prompt = f"{article(f'{c1} {s1}')} and {article(f'{c2} {s2}')}"
        include, objects = [one(s1, c1), one(s2, c2)], [(s1, c1), (s2, c2)]
    elif task == "counting" or task == "mixture" and kind:
        color = c1 if task == "mixture" else None
        prompt = f"{NUMBERS[n]} {color + ' ' if color else ''}{PLURALS[SHAPES.index(s1)]}"
        include = [{"class": s1, "count": n, **({"color": color} if color else {})}]
        meta = {"tag": task, "include": include, "exclude": [{"class": s1, "count": n + 1}], "prompt": prompt}
        return prompt, meta, [(s1, color)] * n, None
    elif task in ("position", "mixture"):             # GenEval's order: include[0] is the target, include[1] is placed
        a, b = (None, None) if task == "position" else (c1, c2)
        name = lambda s, c: article(f"{c} {s}" if c else s)
        prompt = f"{name(s1, a)} {relation} {name(s2, b)}"
        include, objects = [one(s2, b), one(s1, a, position=[relation, 0])], [(s2, b), (s1, a)]
        return prompt, {"tag": task, "include": include, "prompt": prompt}, objects, relation
    else:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}, mixture")
    return prompt, {"tag": task, "include": include, "prompt": prompt}, objects, None


def astray(rng, prompt):
    """A caption that no picture of `prompt` fulfils: one word is another of its kind, or two have changed places."""
    said = [[w for w in kind if re.search(rf"\b{w}\b", prompt)] for kind in KINDS]
    pairs = [words for words in said[1:3] if len(words) == 2 and (said[0] or len(said[1]) == 2)]    # whose order matters
    if pairs and rng.random() < 0.4:
        u, v = pairs[rng.integers(len(pairs))]
        change = {u: v, v: u}
    else:
        k = rng.choice([k for k, words in enumerate(said) if words])
        k = 0 if said[0] and rng.random() < 0.5 else k            # places are hardest to learn
        change = {str(rng.choice(said[k])): str(rng.choice([w for w in KINDS[k] if w not in said[k]]))}
    prompt = re.sub(rf"\b({'|'.join(change)})\b", lambda m: change[m[0]], prompt)
    return re.sub(r"\ban? (\w+)", lambda m: article(m[1]), prompt)


def place(rng, n, relation=None, touching=False):
    """Boxes (x, y, side) of n objects in pixels, a unit or more apart; box 1 stands in `relation` to box 0.

    All are multiples of UNIT, so that a shape is one of few sets of tokens: a teacher learns to draw it in minutes.
    touching: no gap between an object and one before it, so that a detector sees fewer.
    """
    gap = lambda a, b: max(max(q - p - a[2], p - q - b[2]) for p, q in zip(a[:2], b[:2]))     # in units; negative: overlap
    cells = SIZE // UNIT
    while n:
        boxes = []
        for _ in range(60):
            side = int(rng.choice(SIDES[n]))
            x, y = rng.integers(0, cells - side + 1, 2).tolist()
            nearest = min((gap((x, y, side), b) for b in boxes), default=None)
            if nearest is None or (nearest == 0 if touching else nearest >= 1):
                boxes.append((x, y, side))
            if len(boxes) == n:
                break
        if len(boxes) == n and (relation is None or stands(boxes[1], boxes[0], RELATIONS[relation])):
            return [(x * UNIT, y * UNIT, side * UNIT) for x, y, side in boxes]
    return []


def stands(a, b, direction):
    """Is box a in a direction (x, y) of box b, clearly so and not diagonally?"""
    offset = np.array([a[i] + a[2] / 2 - b[i] - b[2] / 2 for i in (0, 1)])
    along, across = offset @ direction, offset @ direction[::-1]
    return along >= (a[2] + b[2]) / 2 and along > 1.5 * abs(across)


def draw_shape(draw, shape, x, y, side, fill):
    """One shape in the box at (x, y), on a canvas FINE times as large as the picture."""
    x, y, s = (v * FINE for v in (x, y, side))
    if shape == "circle":
        draw.ellipse((x, y, x + s, y + s), fill)
    elif shape == "ring":
        draw.ellipse((x, y, x + s, y + s), outline=fill, width=round(0.26 * s))
    elif shape == "square":
        draw.rectangle((x, y, x + s, y + s), fill)
    elif shape == "triangle":
        draw.polygon((x, y + s, x + s, y + s, x + s / 2, y), fill)
    elif shape == "cross":
        draw.rectangle((x + 0.33 * s, y, x + 0.67 * s, y + s), fill)
        draw.rectangle((x, y + 0.33 * s, x + s, y + 0.67 * s), fill)


def render(rng, objects, relation=None, touching=False):
    """A picture (SIZE, SIZE, 3), uint8, of objects [(shape, color or None for any)], which are apart or touching."""
    ramp, flat = np.broadcast_to(np.linspace(-20, 20, SIZE), (SIZE, SIZE)), np.zeros((SIZE, SIZE))
    grounds = (flat, ramp, -ramp, ramp.T, -ramp.T)                                            # even, or a slope of gray
    ground = (int(rng.choice(GRAYS)) + grounds[rng.integers(5)])[..., None]                   # (SIZE, SIZE, 1)
    ink = Image.new("RGB", (SIZE * FINE,) * 2)
    cover = Image.new("L", ink.size)
    for (shape, color), (x, y, side) in zip(objects, place(rng, len(objects), relation, touching)):
        rgb = colorsys.hsv_to_rgb(HUES[color or str(rng.choice(COLORS))] / 360, 0.9, rng.choice(SHADES))
        draw_shape(ImageDraw.Draw(ink), shape, x, y, side, tuple(round(255 * v) for v in rgb))
        draw_shape(ImageDraw.Draw(cover), shape, x, y, side, 255)
    fine = lambda img: np.asarray(img, np.float32).reshape(SIZE, FINE, SIZE, FINE, -1).mean((1, 3))
    alpha = fine(cover) / 255                                                                 # (SIZE, SIZE, 1)
    pixels = fine(ink) + (1 - alpha) * ground
    return pixels.round().clip(0, 255).astype(np.uint8)


def scenes(n, seed=0, tasks=MIXED, touching=False, again=0):
    """n scenes of random tasks: (pictures uint8 (n, 3, SIZE, SIZE), prompts, metadata).

    touching changes pictures only, as does another number `again`: the same captions, drawn anew.
    """
    img, prompts, metas = np.empty((n, 3, SIZE, SIZE), np.uint8), [], []
    for i in range(n):
        rng = np.random.default_rng([seed, i])        # a picture depends on (seed, i) alone
        prompt, meta, objects, relation = caption(rng, str(rng.choice(tasks)))
        rng = np.random.default_rng([seed, i, again]) if again else rng
        img[i] = render(rng, objects, relation, touching).transpose(2, 0, 1)
        prompts.append(prompt)
        metas.append(meta)
    return img, prompts, metas


def benchmark(n, seed=0):
    """n prompts, GenEval's six tasks in turn: (prompts, metadata). They depend on the seed and their place alone."""
    drawn = [caption(np.random.default_rng([seed, 77, i]), TASKS[i % len(TASKS)]) for i in range(n)]
    return [d[0] for d in drawn], [d[1] for d in drawn]


def read(img, saturated=60, least=14):
    """Objects of a picture (3, H, W) uint8: a list of (shape, color, box (x1, y1, x2, y2)), largest first.

    shape is None for a blob that is none of the five.
    """
    rgb = np.asarray(img, np.float32).transpose(1, 2, 0)                                      # (H, W, 3)
    chroma = rgb.max(-1) - rgb.min(-1)
    labels, count = ndimage.label(chroma > saturated)
    found = []
    for k, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        part = labels == k
        if part.sum() < least:
            continue
        inner = rgb[part & (chroma >= np.median(chroma[part]))].mean(0) / 255
        hue = 360 * colorsys.rgb_to_hsv(*inner)[0]
        color = min(HUES, key=lambda c: abs((hue - HUES[c] + 180) % 360 - 180))
        near = ndimage.binary_dilation(part, np.ones((3, 3)))                                 # with its half-covered rim
        cover = np.clip((chroma - 15) / (np.quantile(chroma[part], 0.75) - 15), 0, 1) * near
        box = (columns.start, rows.start, columns.stop, rows.stop)
        found.append((int(part.sum()), shape_of(cover, part[rows, columns]), color, box))
    return [item[1:] for item in sorted(found, key=lambda item: -item[0])]


def shape_of(cover, part):
    """A shape's name from how much of each pixel it covers (H, W), and its mask, cut to its box.

    It is told by a hole, by the share of the box it fills (square 1, circle 0.79, cross 0.56, triangle 0.5), and by
    how far its weight is below the middle of the box (a triangle's is, by a sixth).
    """
    h, w = cover.max(1).sum(), cover.max(0).sum()                                             # sides, in parts of pixels
    if not 0.75 < h / w < 1.33:
        return None
    fill, rows = cover.sum() / (h * w), cover.max(1)
    middle = (np.arange(len(rows)) @ rows) / rows.sum()
    low = ((np.arange(len(rows)) @ cover.sum(1)) / cover.sum() - middle) / h
    if (ndimage.binary_fill_holes(part) & ~part).sum() >= 2:
        return "ring" if abs(low) < 0.1 else None
    if abs(low) < 0.07:
        return "cross" if 0.4 < fill < 0.68 else "circle" if 0.68 <= fill < 0.88 else "square" if fill >= 0.88 else None
    return "triangle" if 0.07 <= low < 0.25 and 0.4 < fill < 0.72 else None


def detect(img):
    """The reader as GenEval's rules want it: detections {class: [(box, score), ...]}, and a judge of colors."""
    objects, found = read(img), {}
    for shape, _, box in objects:
        if shape:
            found.setdefault(shape, []).append((box, 1.0))
    colors = {box: color for _, color, box in objects}
    return found, lambda box, shape: colors[box]


def accuracy(n=6000, seed=5):
    """Share of fresh renderings that the reader, under GenEval's rules, finds to be what was asked for, by task."""
    rows = []
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        _, meta, objects, relation = caption(rng, TASKS[i % len(TASKS)])
        rows.append((meta["tag"], *verdict(meta, *detect(render(rng, objects, relation).transpose(2, 0, 1)))))
    return geneval_table(rows)
