"""Shapes, the text-to-image world: scenes of coloured shapes, their captions, and a reader that scores them exactly.

    python data/shapes.py --accuracy            # how often the reader is right on fresh renderings, task by task
    python data/shapes.py --sheet out/shapes.png

A scene is one to four shapes of six colours on a grey ground, even or sloping, 32x32 pixels. Size, place, shade and
ground vary, so that many pictures fit a caption; but in steps, not continuously, or most of what a teacher has to learn
would be which of many nearly equal tokens comes next. Captions are those of GenEval's six tasks, and free mixtures:

    single_object   a ring                          colors       a red ring
    two_object      a ring and a square             color_attr   a red ring and a blue square
    counting        three rings                     position     a ring left of a square
    mixtures        two red rings, a red ring above a blue square

Since everything is drawn, everything can be read back without a detector: what is saturated is an object (the ground
is grey), connected pixels are one object, hue is its colour, and its shape shows in how it fills its box.
"""

import argparse
import colorsys
import functools
import json
import math
import os
import re
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from data.benchmarks import TASKS, geneval_table, verdict  # noqa: E402
from data.tiny import fit, pixel_loss, ship  # noqa: E402
from data.weights import UserError, load_state, read_weights, replacing  # noqa: E402
from dimo import exact_mask, mask_ratio  # noqa: E402
from reward import ImageReward, WordPiece, load_judges, preprocess  # noqa: E402
from soft_embed import embed_tokens  # noqa: E402
from teachers import SHAPES_CLIP, SHAPES_REWARD, SPECS, build, clip_ids, load_student, load_teacher  # noqa: E402

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
GREYS, SHADES = (70, 100, 130, 160, 190), (0.8, 1.0)  # of the ground; HSV values of a shape
SIDES = {1: (3, 4), 2: (2, 3), 3: (2,), 4: (2,)}      # of n objects, in units


# ===================================================================================================== captions
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


# ==================================================================================================== renderings
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
    grounds = (flat, ramp, -ramp, ramp.T, -ramp.T)                                            # even, or a slope of grey
    ground = (int(rng.choice(GREYS)) + grounds[rng.integers(5)])[..., None]                   # (SIZE, SIZE, 1)
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


# ==================================================================================================== the reader
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
    """The reader as GenEval's rules want it: detections {class: [(box, score), ...]}, and a judge of colours."""
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


# ================================================================================ the tiny teacher, from scratch
def patches(img, side=UNIT):
    """Pictures (n, 3, H, W) -> their patches (n, L, 3 side^2), row by row."""
    return img.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def code_patches(img, V, width, seed=0):
    """(centres (V, 3 side^2) of the patches that occur in pictures in [0, 1], codes (V, width) that stand for them).

    k-means of *different* patches, so that rare shapes weigh more than the ubiquitous ground; a code is its centre's
    leading components. # choice: the codebook is not learned with the encoder. It was: then most codes were for the
    ground, and which one a patch got depended on the rest of the picture, as the encoder's norms are taken over all of
    it (3.2 nats given the patch and its place). To a teacher that is noise, and it learned little else.
    """
    from scipy.cluster.vq import kmeans2

    seen = patches(img).flatten(0, 1).unique(dim=0)
    centres = torch.from_numpy(kmeans2(seen.numpy(), V, minit="++", seed=seed)[0])
    axes = torch.linalg.svd(centres - centres.mean(0), full_matrices=False)[2][:width]
    return centres, (centres - centres.mean(0)) @ axes.T


def tokenizer_loss(tok, centres, img):
    """The encoder learns which code is right for each patch, the decoder to draw pictures from the right codes."""
    x = torch.cdist(patches(img), centres).argmin(-1)                                         # (B, L)
    codes = tok.codebook.weight[x]                                                            # (B, L, embed)
    z, out = tok.latents(img).float().flatten(2).transpose(1, 2), tok.pixels(codes).float()
    recon, miss = pixel_loss(out, img), (z - codes).square().mean()
    right = (tok.nearest(z) == x).float().mean()
    return recon + 5 * miss, dict(recon=recon.detach(), right=right)


def clip_loss(model, img, ids, same):
    """CLIP's loss; pictures of the same caption are each other's right answers. same (B, B), true where captions agree."""
    f = F.normalize(model.encode_image(img).float(), dim=-1)
    g = F.normalize(model.encode_text(ids).float(), dim=-1)
    z = model.logit_scale.exp().clamp(max=100) * f @ g.T                                      # (B, B), image by caption
    target = same.float() / same.sum(1, keepdim=True)
    loss = -(target * z.log_softmax(1)).sum(1).mean() / 2 - (target * z.log_softmax(0)).sum(0).mean() / 2
    return loss, dict(loss=loss.detach(), right=same[torch.arange(len(z)), z.argmax(1)].float().mean())


def spoiled(e):
    """Embeddings (B, L, d) of pictures, with patches of others in them, here and there or in a rectangle, out of place.

    Half of them are blends, as soft embeddings are: so a judge that is trained on them likes a sure drawing.
    """
    B, side = len(e), round(e.shape[1] ** 0.5)
    at = torch.arange(side)
    inside = lambda low, size: (low[:, None] <= at) & (at < (low + size)[:, None])            # (B, side)
    row, column = (inside(torch.randint(side - 2, (B,)), torch.randint(1, 6, (B,))) for _ in range(2))
    box, dots = row[:, :, None] & column[:, None], torch.rand(B, side, side) < 0.3 * torch.rand(B, 1, 1)
    change = torch.where(torch.rand(B, 1, 1) < 0.5, box, dots)[..., None]                     # (B, side, side, 1)
    e = e.unflatten(1, (side, side))
    other = e.roll((1, *torch.randint(side, (2,)).tolist()), (0, 1, 2))
    share = torch.where(torch.rand(B, 1, 1, 1) < 0.5, 1.0, torch.rand(B, 1, 1, 1))
    return torch.lerp(e, other, change * share).flatten(1, 2)


def grid_code(side, width):
    """Sines and cosines of a patch's column and row, an eighth of a turn over the picture up to two: (side^2, width).

    # choice: where the image tower starts to learn positions, in the place of noise of 0.02. From noise it had not
    # learned in 7,500 steps what left and above mean; from these, once it knows colours and shapes, in 400.
    """
    turn = torch.outer(torch.arange(side) / side, 2 * math.pi * 2 ** torch.linspace(-3, 1, width // 4))
    code = 0.5 * torch.cat([turn.sin(), turn.cos()], 1)                                       # (side, width / 2)
    return torch.cat([code.repeat(side, 1), code.repeat_interleave(side, 0)], 1)


def judge_loss(model, good, worse, ids, wrong):
    """ImageReward's loss, -log sigmoid(r_better - r_worse): of two captions of a picture, of two pictures of a caption.

    good, worse (B, 3, H, W) uint8; ids (B, S) of the captions, wrong (K, B, S) of K that are false of `good`.
    """
    K = len(wrong)
    right, spoilt = model.see(preprocess(torch.cat([good, worse]).float() / 255, model.size)).chunk(2)
    r = model.raw(torch.cat([right] * (1 + K) + [spoilt]), torch.cat([ids, *wrong, ids])).unflatten(0, (K + 2, -1))
    r, r_wrong, r_worse = r[0], r[1:-1], r[-1]                                                # (B,), (K, B), (B,)
    size = (r**2 + (r_wrong**2).mean(0) + r_worse**2).mean()      # pairs leave the zero free: keep scores near it
    loss = F.softplus(r_wrong - r).mean() + F.softplus(r_worse - r).mean() + 1e-3 * size
    return loss, dict(caption=(r > r_wrong).float().mean(), picture=(r > r_worse).float().mean())


@torch.no_grad()
def drawings(img, touching, prompts, some):
    """(good, worse), uint8 like img: pictures through the tokenizer, and for each one that fits its prompt less.

    The first `some` of the worse are theta_0's, and the teacher's in 1, 4 and 8 steps; of the next `some` objects touch,
    where there are several (`touching`, uint8 like img); others are spoiled.
    """
    import evaluate as ev                             # which imports this file's reader

    teacher, theta_0, _ = load_student("assets/shapes/theta0.safetensors", "meissonic-tiny")
    pixels = lambda e: ev.to_bytes(teacher.tokenizer.decode(e, clamp=True), teacher.spec)
    embed = lambda img: embed_tokens(teacher.tokenizer.encode(img.float() / 255), *teacher.tokenizer.tables())
    parts = lambda f, x, desc: torch.cat([f(part) for part in tqdm(x.split(500), desc=desc)])
    e = parts(embed, img, "tokens")
    ways = [functools.partial(ev.generate_teacher, teacher, steps=n) for n in (1, 4, 8)]
    ways += [functools.partial(ev.generate_student, teacher, theta_0, **teacher.spec.student)] * 3
    rows = teacher.conditions(prompts[:some]).split(100)
    worse = [ways[i % len(ways)](part) for i, part in enumerate(tqdm(rows, desc="drawn"))]
    merged = ((touching != img).flatten(1).any(1) & (torch.arange(len(img)) < 2 * some))[some:]
    e_worse = spoiled(e[some:])
    e_worse[merged] = parts(embed, touching[some:][merged], "touching")
    return parts(pixels, e, "good"), torch.cat([*worse, parts(pixels, e_worse, "worse")])


def teacher_loss(net, x, cond):
    """Eq. 1 as Meissonic trains: cross-entropy at masked tokens, mask ratio by the cosine, a tenth without a prompt.

    # choice: the time says nothing, 0 or a random step. The published sampler and distillation do not tell it either.
    # choice: no label smoothing. A tenth of the mass on wrong tokens is a stray patch in most pictures.
    """
    mask = exact_mask(mask_ratio(torch.rand(len(x)), "cosine"), torch.rand(x.shape))
    drop = torch.rand(len(x)) < 0.1
    cond = [torch.where(drop.reshape(-1, *[1] * (c.ndim - 1)), n, c) for c, n in zip(cond, net.null(cond))]
    cond[3] = torch.randint(64, (len(x),)) * (torch.rand(len(x)) < 0.5).float()
    z = net(embed_tokens(x.masked_fill(mask, net.V), *net.tables()), tuple(cond))
    loss = F.cross_entropy(z.flatten(0, 2), x.masked_fill(~mask, -100).flatten())        # -100: not scored
    return loss, dict(masked=loss.detach())


def train(args):
    """Train the part of meissonic-tiny that --train names; float16 safetensors in assets/shapes, its record beside it."""
    from open_clip.model import CLIP

    torch.manual_seed(args.seed)
    spec, start, folder = SPECS["meissonic-tiny"], time.time(), os.path.join(ROOT, "assets", "shapes")
    tasks = (*MIXED, "position", "position", "counting", "mixture") if args.train == "imagereward" else MIXED
    img, prompts, metas = scenes(args.n, 1_000_003, tasks)                                    # evaluation has other seeds
    img, unique = torch.from_numpy(img), sorted(set(prompts))
    index = {p: i for i, p in enumerate(unique)}
    which = torch.tensor([index[p] for p in prompts])
    batch = lambda: torch.randint(len(img), (args.batch,))
    if args.train == "tokenizer":
        model = spec.Tokenizer(**spec.tokenizer).to(memory_format=torch.channels_last)
        centres, codes = code_patches(img[:3000].float() / 255, model.V, model.codebook.weight.shape[1], args.seed)
        model.codebook.weight = nn.Parameter(codes, requires_grad=False)
        loss_fn = lambda: tokenizer_loss(model, centres, (img[batch()].float() / 255).contiguous(
            memory_format=torch.channels_last))
    elif args.train == "imagereward":
        rng, easy = np.random.default_rng(args.seed), 0.1 if args.go_on else 0.5
        words = os.path.join(ROOT, spec.bert_vocab)
        with replacing(words) as f:
            f.write("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, ""]).encode())
        model = ImageReward(wordpiece=WordPiece(words), **SHAPES_REWARD)
        model.pos.data[0, 1:] = grid_code(SIZE // SHAPES_REWARD["patch"], SHAPES_REWARD["vision"][0])
        if args.go_on:
            load_state(model, read_weights(os.path.join(folder, "imagereward.safetensors")), "imagereward.safetensors")
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            touching = torch.from_numpy(scenes(args.n, 1_000_003, tasks, touching=True)[0])
            good, worse = drawings(img, touching, prompts, args.n // 3)

        def loss_fn():                                # of the wrong captions a share is just any other, which is easier
            i = batch()
            asked = [prompts[k] for k in i]
            false = lambda p: prompts[rng.integers(args.n)] if rng.random() < easy else astray(rng, p)
            wrong = torch.stack([model.tokenize([false(p) for p in asked]) for _ in range(3)])
            return judge_loss(model, good[i], worse[i], model.tokenize(asked), wrong)
    elif args.train == "clip":
        model = CLIP(**SHAPES_CLIP)
        ids = clip_ids(unique, 16, SHAPES_CLIP["text_cfg"]["vocab_size"], pads_with_bang=True)
        words = [sorted(c.get(k, "") for c in m["include"] for k in ("class", "color")) for m in metas]
        alike = torch.tensor(sorted(range(len(img)), key=words.__getitem__))                  # same words, side by side

        def loss_fn():                                # half a batch at random, half from the neighbours of its captions
            i = torch.randint(len(img), (args.batch // 2,))
            i = alike[torch.cat([i, i + torch.randint(-40, 41, i.shape)]) % len(img)]
            return clip_loss(model, (img[i].float() / 255 - 0.45) / 0.27, ids[which[i]], which[i] == which[i, None])
    else:
        tokenizer, text = (build(spec, role).eval() for role in ("tokenizer", "text"))
        model = build(spec, "net") if args.go_on else spec.Net(**spec.net)
        with torch.no_grad():
            x = torch.cat([tokenizer.encode(part.float() / 255) for part in img.split(500)])
            features = model.condition(*text(text.tokenize(unique)))
            model.null_text, model.null_pooled = model.condition(*text(text.tokenize([spec.negative])))[:2]
        net = torch.compile(model) if args.compile else model

        def loss_fn():
            i = batch()
            return teacher_loss(net, x[i], [c[which[i]] for c in features])

    fit(model, loss_fn, args.steps, args.lr, bf16=args.bf16, muon=args.train in ("teacher", "imagereward"))
    ship(model, os.path.join(folder, f"{args.train}.safetensors"), args, start)


# ============================================================================== what tables do not say of the world
@torch.no_grad()
def judged(n=1500, seed=5):
    """How often each reward is right on fresh scenes, {reward: {what is wrong: share}}: it should give a picture more for
    its caption than for one gone astray, by the kind of word that is; and more than to one where objects touch.

    "taste" should be low: the standard deviation over pictures that fit a caption, by that over all (picture, caption).
    """
    spec, rng = SPECS["meissonic-tiny"], np.random.default_rng(seed)
    rewards = load_judges(spec, spec.rewards)
    (img, prompts, _), (touching, *_), (twin, *_) = scenes(n, seed), scenes(n, seed, touching=True), scenes(n, seed, again=1)
    several, wrong = (touching != img).any((1, 2, 3)), [astray(rng, p) for p in prompts]
    words = {w: name for name, kind in zip(("place", "color", "shape", "shape", "number"), KINDS) for w in kind}
    strange = lambda prompt, other: next((words[w] for w in words if w in other and w not in prompt), "order")
    kinds = np.array([strange(p, w) for p, w in zip(prompts, wrong)])
    score = lambda img, prompts: rewards(torch.from_numpy(img).float() / 255, prompts)
    own, astrays, merged = score(img, prompts), score(img, wrong), score(touching, prompts)
    other, rows = score(twin, prompts), {}
    for name in own:
        right, apart = (own[name] > astrays[name]).numpy(), (own[name] > merged[name]).numpy()
        taste = (own[name] - other[name]).std() / 2**0.5 / torch.cat([own[name], astrays[name]]).std()
        rows[name] = {kind: right[kinds == kind].mean() for kind in sorted(set(kinds))}
        rows[name] |= {"touching": apart[several].mean(), "taste": taste}
    return {name: {kind: round(float(share), 3) for kind, share in row.items()} for name, row in rows.items()}


@torch.no_grad()
def alike(path, n=24, times=12, seed=3):
    """Share of tokens that agree in two pictures of a prompt, over n prompts: 1 where a student draws one picture of each.

    path: a student, or "teacher" for the teacher's own steps.
    """
    import evaluate as ev

    if path == "teacher":
        teacher = load_teacher("meissonic-tiny")
        draw = functools.partial(ev.generate_teacher, teacher, steps=next(iter(teacher.spec.sampling)))
    else:
        teacher, net, _ = load_student(path, "meissonic-tiny")
        draw = functools.partial(ev.generate_student, teacher, net, **teacher.spec.student)
    torch.manual_seed(seed)
    img = draw(teacher.conditions([p for p in benchmark(n, seed)[0] for _ in range(times)]))
    x = torch.cat([teacher.tokenizer.encode(part.float() / 255) for part in img.split(250)])
    x = x.view(n, times, -1)
    same = (x[:, :, None] == x[:, None]).float().mean(-1)                                     # (n, times, times)
    return ((same.sum() - n * times) / (n * times * (times - 1))).item()


def main(args):
    if args.train:
        train(args)
    if args.accuracy:
        print(json.dumps(accuracy(), indent=1))
    if args.judges:
        print(json.dumps(judged(), indent=1))
    for path in args.alike or ():
        print(json.dumps({"student": path, "alike": round(alike(path), 3)}))
    if args.prompts:
        drawn = [np.random.default_rng([args.seed, 78, i]) for i in range(args.n)]
        with replacing(args.prompts) as f:
            f.write("".join(caption(rng, str(rng.choice(MIXED)))[0] + "\n" for rng in drawn).encode())
    if args.sheet:
        img, prompts, _ = scenes(40)
        page = Image.new("RGB", (10 * 100, 4 * 112), "white")
        for i, (pixels, text) in enumerate(zip(img, prompts)):
            x, y = i % 10 * 100, i // 10 * 112
            page.paste(Image.fromarray(pixels.transpose(1, 2, 0)).resize((96, 96), Image.Resampling.NEAREST), (x, y + 14))
            ImageDraw.Draw(page).text((x, y), text[:18], "black")
        page.save(args.sheet)


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--sheet", metavar="PATH", help="write a picture of 40 scenes")
    ap.add_argument("--train", choices=["tokenizer", "clip", "teacher", "imagereward"],
                    help="make a part of assets/shapes, in this order; the last wants a theta0 there, too")
    ap.add_argument("--go_on", action="store_true", help="train the shipped teacher or imagereward further, not a new one")
    ap.add_argument("--n", type=int, default=40_000, help="scenes to train on (%(default)s)")
    ap.add_argument("--steps", type=int, default=3000)
    ap.add_argument("--batch", type=int, default=128)
    ap.add_argument("--lr", type=float, default=1e-3)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--bf16", action="store_true", help="bfloat16 autocast (fast on CPUs with AMX and on GPUs)")
    ap.add_argument("--compile", action="store_true", help="torch.compile the teacher (15%% faster; wants a C++ compiler)")
    ap.add_argument("--accuracy", action="store_true", help="score fresh renderings by the reader")
    ap.add_argument("--judges", action="store_true", help="how often the rewards prefer the right caption, by what is wrong")
    ap.add_argument("--alike", nargs="+", metavar="CKPT",
                    help="share of tokens that agree in two pictures of a prompt; a student's checkpoint or weights, or: teacher")
    ap.add_argument("--prompts", metavar="PATH", help="write --n captions, one a line, to distil from")
    args = ap.parse_args()
    if min(args.n, args.steps, args.batch) < 1 or not args.lr > 0:
        ap.exit(2, "shapes.py: --n, --steps and --batch are 1 or more, --lr is above 0\n")
    if args.train and args.n < 100:
        ap.exit(2, f"shapes.py: --n {args.n}: expected 100 scenes or more to train on\n")
    try:
        main(args)
    except (UserError, OSError) as err:
        ap.exit(2, f"shapes.py: {err}\n")
