"""Shapes, the text-to-image world: colored shapes, captions, and a reader that scores them exactly.

A scene is one to four shapes of six colors on a gray ground, even or sloping, 32x32 pixels. Size,
place, shade and ground vary, so that many pictures fit a caption. They vary in steps and not
continuously: otherwise a teacher would mostly have to learn which of many nearly equal tokens comes
next. The captions are those of GenEval's six tasks, and mixtures of them:

    single_object   a ring                          colors       a red ring
    two_object      a ring and a square             color_attr   a red ring and a blue square
    counting        three rings                     position     a ring left of a square
    mixture         two red rings, a red ring above a blue square

Since everything is drawn, everything can be read back without a detector. What is saturated is an
object (the ground is gray), connected pixels are one object, its hue is its color, and how it fills
its box tells its shape.

`python worlds/measure_shapes.py --sheet out/shapes.png` shows 40 scenes, `--accuracy` says how
often the reader is right.
"""

import colorsys
import re
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from metrics.geneval import TASKS


SIZE, FINE = 32, 8                       # pixels per side; drawn FINE times larger, then reduced
CELL = 4                                 # pixels: all sides, places and gaps are multiples of it
SHAPES = "circle square triangle ring cross".split()
PLURALS = "circles squares triangles rings crosses".split()
NUMBERS = "two three four".split()
HUES = {"red": 0, "orange": 30,          # degrees
        "yellow": 58, "green": 125,
        "blue": 222, "purple": 285}
COLORS = list(HUES)
GRAYS = (70, 100, 130, 160, 190)         # of the ground
SHADES = (0.8, 1.0)                      # of a shape: its value in HSV
SIDES = {1: [3, 4],                      # of each of n objects, in cells
         2: [2, 3],
         3: [2], 4: [2]}
RELATIONS = {"left of": (-1, 0),
             "right of": (1, 0),
             "above": (0, -1),
             "below": (0, 1)}
MIXED = (*TASKS, "mixture", "mixture")   # what to train on
KINDS = (list(RELATIONS), COLORS,        # of words that a caption can be wrong in
         SHAPES, PLURALS, NUMBERS)
WORDS = "a an and of left right above below".split() + sum(KINDS[1:], [])


# -------------------------------------------------------------------------------- captions
class Caption(NamedTuple):
    prompt: str
    metadata: dict                       # in GenEval's own form; a class is a shape
    objects: list                        # [(shape, color or None for any), ...]
    relation: str | None = None          # where objects[1] stands, seen from objects[0]


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def phrase(noun, color):
    return f"{color} {noun}" if color else noun


def clause(shape, color, count=1, **more):
    """What GenEval demands of a picture."""
    colored = {"color": color} if color else {}
    return {"class": shape, "count": count} | colored | more


def caption(rng, task):
    """A random Caption of one of GenEval's six tasks, or of task "mixture"."""
    shapes = rng.choice(SHAPES, 2, replace=False).tolist()
    colors = rng.choice(COLORS, 2, replace=False).tolist()
    relation = str(rng.choice(KINDS[0]))
    n = int(rng.integers(2, 5))
    form = ("position", "counting")[rng.integers(2)]
    if task != "mixture":
        form = task
    if task not in ("colors", "color_attr", "mixture"):
        colors = [None, None]
    first, second = zip(shapes, colors)

    metadata = {"tag": task}
    if form == "counting":                                                   # three rings
        objects = n * [first]
        prompt = f"{NUMBERS[n - 2]} {phrase(PLURALS[SHAPES.index(shapes[0])], colors[0])}"
        metadata["include"] = [clause(*first, n)]
        metadata["exclude"] = [clause(shapes[0], None, n + 1)]
    elif form == "position":             # a ring left of a square: in GenEval the target is first
        objects = [second, first]
        prompt = f"{article(phrase(*first))} {relation} {article(phrase(*second))}"
        metadata["include"] = [clause(*second), clause(*first, position=[relation, 0])]
    else:                                                                    # a ring and a square
        assert form in TASKS, f"unknown task {task!r}"
        objects = [first, second] if form in ("two_object", "color_attr") else [first]
        prompt = " and ".join(article(phrase(*thing)) for thing in objects)
        metadata["include"] = [clause(*thing) for thing in objects]
    metadata["prompt"] = prompt
    return Caption(prompt, metadata, objects, relation if form == "position" else None)


def astray(rng, prompt):
    """A caption that no picture of `prompt` fulfills.

    One word is another of its kind, or two have changed places.
    """
    said = [[w for w in kind if f" {w} " in f" {prompt} "] for kind in KINDS]
    relations, colors, shapes = said[:3]
    order_matters = relations or len(colors) == 2
    pairs = [words for words in (colors, shapes) if len(words) == 2]
    if order_matters and pairs and rng.random() < 0.4:
        u, v = pairs[rng.integers(len(pairs))]
        change = {u: v, v: u}
    else:
        k = rng.choice([k for k, words in enumerate(said) if words])
        if relations and rng.random() < 0.5:           # places are hardest to learn
            k = 0
        others = [w for w in KINDS[k] if w not in said[k]]
        change = {rng.choice(said[k]): rng.choice(others)}
    prompt = re.sub(rf"\b({'|'.join(change)})\b", lambda found: change[found[0]], prompt)
    return re.sub(r"\ban? (\w+)", lambda found: article(found[1]), prompt)


# -------------------------------------------------------------------------------- pictures
def offset(a, b):
    """From the center of box b to that of box a, arrays (x, y, side): (x, y)."""
    return a[:2] + a[2] / 2 - b[:2] - b[2] / 2


def gap(a, b):
    """Cells between two boxes: 0 where they touch, negative where they overlap."""
    return abs(offset(a, b)).max() - (a[2] + b[2]) / 2


def stands(a, b, relation):
    """Does box a, which does not overlap b, stand so to it, clearly and not diagonally?"""
    direction = RELATIONS[relation]
    along = offset(a, b) @ direction
    across = offset(a, b) @ direction[::-1]
    return along > 1.5 * abs(across)


def place(rng, n, relation, touching):
    """Boxes (x, y, side) of n objects in pixels, (n, 3); box 1 stands in `relation` to box 0.

    They are a cell or more apart. All are multiples of CELL, the patch of a token, so that a shape
    is one of few sets of tokens: a teacher learns to draw it in minutes.
    touching: each touches one before it, so that a detector sees fewer objects.
    """
    while True:
        boxes = []
        for _ in range(60):                                                  # or there is no room
            if len(boxes) == n:
                break
            side = int(rng.choice(SIDES[n]))
            corner = rng.integers(0, SIZE // CELL - side + 1, 2)
            box = np.append(corner, side)
            gaps = [gap(box, other) for other in boxes]
            if not gaps or (min(gaps) == 0 if touching else min(gaps) >= 1):
                boxes.append(box)
        if len(boxes) == n and (not relation or stands(boxes[1], boxes[0], relation)):
            return CELL * np.array(boxes)


def draw_shape(draw, shape, box, fill):
    """One shape in its box (x, y, side), on a canvas FINE times as large as the picture."""
    x, y, side = FINE * box
    right, bottom = x + side, y + side
    whole = (x, y, right, bottom)
    if shape == "circle":
        draw.ellipse(whole, fill)
    elif shape == "ring":
        draw.ellipse(whole, outline=fill, width=round(0.26 * side))
    elif shape == "square":
        draw.rectangle(whole, fill)
    elif shape == "triangle":
        draw.polygon((x, bottom, right, bottom, x + side / 2, y), fill)
    else:                                                                    # a cross
        low, high = 0.33 * side, 0.67 * side
        draw.rectangle((x + low, y, x + high, bottom), fill)
        draw.rectangle((x, y + low, right, y + high), fill)


def render(rng, objects, relation=None, touching=False):
    """A picture (SIZE, SIZE, 3), uint8, of objects [(shape, color or None for any), ...]."""
    flat, ramp = np.zeros(1), np.linspace(-20, 20, SIZE)[:, None]            # (SIZE, 1): by column
    slopes = (flat, ramp, -ramp, ramp[:, None], -ramp[:, None])
    ground = rng.choice(GRAYS) + slopes[rng.integers(5)]

    side = SIZE * FINE
    canvas = Image.new("RGBA", (side, side))                                 # transparent
    draw = ImageDraw.Draw(canvas)
    for (shape, color), box in zip(objects, place(rng, len(objects), relation, touching)):
        hue, shade = HUES[color or rng.choice(COLORS)], rng.choice(SHADES)
        draw_shape(draw, shape, box, f"hsv({hue}, 90%, {shade:.0%})")
    fine = np.asarray(canvas, np.float32).reshape(SIZE, FINE, SIZE, FINE, 4)
    pixels = fine.mean((1, 3))                                               # (SIZE, SIZE, 4)
    ink, alpha = pixels[..., :3], pixels[..., 3:] / 255
    return (ink + (1 - alpha) * ground).round().clip(0, 255).astype(np.uint8)


class Scenes(NamedTuple):
    img: torch.Tensor                    # uint8 (n, 3, SIZE, SIZE)
    prompts: list
    metas: list


def scenes(n, seed=0, tasks=MIXED, touching=False, again=0):
    """n Scenes of random tasks. A scene depends on the seed and its place alone.

    touching changes the pictures only, and so does another number `again`: it draws the same
    captions anew.
    """
    drawn = Scenes(torch.empty(n, 3, SIZE, SIZE, dtype=torch.uint8), [], [])
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        prompt, metadata, objects, relation = caption(rng, str(rng.choice(tasks)))
        if again:
            rng = np.random.default_rng([seed, i, again])
        img = torch.from_numpy(render(rng, objects, relation, touching))
        drawn.img[i] = img.permute(2, 0, 1)
        drawn.prompts.append(prompt)
        drawn.metas.append(metadata)
    return drawn


def benchmark(n, seed):
    """(prompts, metadata) of n prompts, GenEval's six tasks in turn.

    Each depends on the seed and its place alone.
    """
    metas = [caption(np.random.default_rng([seed, 77, i]), TASKS[i % 6]).metadata
             for i in range(n)]
    return [metadata["prompt"] for metadata in metas], metas


# ------------------------------------------------------------------------------- the reader
def read(img):
    """Objects of a picture (3, H, W) uint8, largest first: [(shape, color, (x1, y1, x2, y2)), ...].

    shape is None for a blob that is none of the five.
    """
    rgb = np.asarray(img, np.float32).transpose(1, 2, 0)                     # (H, W, 3)
    chroma = np.ptp(rgb, axis=-1)
    labels, count = ndimage.label(chroma > 60)
    parts = [labels == k for k in range(1, count + 1)]
    found = []
    for part in sorted(parts, key=np.sum, reverse=True):
        if part.sum() < 14:                                                  # a crumb
            break
        strong = chroma >= np.median(chroma[part])
        inner = rgb[part & strong].mean(0) / 255
        hue = 360 * colorsys.rgb_to_hsv(*inner)[0]
        color = min(HUES, key=lambda name: abs((hue - HUES[name] + 180) % 360 - 180))

        full = np.quantile(chroma[part], 0.75)
        cover = np.clip((chroma - 15) / (full - 15), 0, 1)
        cover *= ndimage.maximum_filter(part, 3)                             # with its rim
        box = Image.fromarray(part).getbbox()
        found.append((shape_of(cover, part), color, box))
    return found


def shape_of(cover, part):
    """A shape's name from how much of each pixel it covers (H, W), and its mask (H, W); or None.

    What tells it is a hole, the share of the box that it fills (square 1, circle 0.79, cross 0.56,
    triangle 0.5), and how far its weight is below the middle of the box (a triangle's by a sixth).
    """
    rows = cover.max(1)
    height, width = rows.sum(), cover.max(0).sum()                           # in parts of pixels
    if not 0.75 < height / width < 1.33:
        return None
    fill = cover.sum() / (height * width)
    below = ndimage.center_of_mass(cover)[0] - ndimage.center_of_mass(rows)[0]
    low = below / height
    hole = ndimage.binary_fill_holes(part) & ~part
    if hole.sum() >= 2:
        return "ring" if abs(low) < 0.1 else None
    if 0.07 <= low < 0.25 and 0.4 < fill < 0.72:
        return "triangle"
    if abs(low) >= 0.07 or fill <= 0.4:
        return None
    if fill < 0.68:
        return "cross"
    return "circle" if fill < 0.88 else "square"


def detect(img):
    """The reader as GenEval's rules want it: ({class: [(box, score), ...]}, color of a box)."""
    detections, colors = {}, {}
    for shape, color, box in read(img):
        colors[box] = color
        if shape:
            detections.setdefault(shape, []).append((box, 1.0))
    return detections, lambda box, shape: colors[box]
