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

import argparse
import functools
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from dimo import exact_mask, mask_ratio  # noqa: E402
from machinery.errors import UserError  # noqa: E402
from machinery.files import ROOT, replacing  # noqa: E402
from networks.blip import ImageReward, WordPiece  # noqa: E402
from networks.clip import preprocess  # noqa: E402
from networks.text import clip_ids  # noqa: E402
from networks.weights import load_state, read_weights  # noqa: E402
from reward import rewards_for  # noqa: E402
from soft_embed import embed_tokens  # noqa: E402
from teachers import SHAPES_CLIP, SHAPES_REWARD, SPECS, build, generate_student, generate_teacher, load_student, load_teacher, to_bytes  # noqa: E402
from worlds.shapes import KINDS, MIXED, SIZE, UNIT, WORDS, accuracy, astray, benchmark, caption, scenes  # noqa: E402
from worlds.training import fit, pixel_loss, ship  # noqa: E402


def patches(img, side=UNIT):
    """Pictures (n, 3, H, W) -> their patches (n, L, 3 side^2), row by row."""
    return img.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def code_patches(img, V, width, seed=0):
    """(centers (V, 3 side^2) of the patches that occur in pictures in [0, 1], codes (V, width) that stand for them).

    k-means of *different* patches, so that rare shapes weigh more than the ubiquitous ground; a code is its center's
    leading components. # choice: the codebook is not learned with the encoder. It was: then most codes were for the
    ground, and which one a patch got depended on the rest of the picture, as the encoder's norms are taken over all of
    it (3.2 nats given the patch and its place). To a teacher that is noise, and it learned little else.
    """
    from scipy.cluster.vq import kmeans2

    seen = patches(img).flatten(0, 1).unique(dim=0)
    centers = torch.from_numpy(kmeans2(seen.numpy(), V, minit="++", seed=seed)[0])
    axes = torch.linalg.svd(centers - centers.mean(0), full_matrices=False)[2][:width]
    return centers, (centers - centers.mean(0)) @ axes.T


def tokenizer_loss(tok, centers, img):
    """The encoder learns which code is right for each patch, the decoder to draw pictures from the right codes."""
    x = torch.cdist(patches(img), centers).argmin(-1)                                         # (B, L)
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
    # learned in 7,500 steps what left and above mean; from these, once it knows colors and shapes, in 400.
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

    teacher, theta_0, _ = load_student("assets/shapes/theta0.safetensors", "meissonic-tiny")
    pixels = lambda e: to_bytes(teacher.tokenizer.decode(e, clamp=True), teacher.spec)
    embed = lambda img: embed_tokens(teacher.tokenizer.encode(img.float() / 255), *teacher.tokenizer.tables())
    parts = lambda f, x, desc: torch.cat([f(part) for part in tqdm(x.split(500), desc=desc)])
    e = parts(embed, img, "tokens")
    ways = [functools.partial(generate_teacher, teacher, steps=n) for n in (1, 4, 8)]
    ways += [functools.partial(generate_student, teacher, theta_0, **teacher.spec.student)] * 3
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
        centers, codes = code_patches(img[:3000].float() / 255, model.V, model.codebook.weight.shape[1], args.seed)
        model.codebook.weight = nn.Parameter(codes, requires_grad=False)
        loss_fn = lambda: tokenizer_loss(model, centers, (img[batch()].float() / 255).contiguous(
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

        def loss_fn():                                # half a batch at random, half from the neighbors of its captions
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


@torch.no_grad()
def reward_accuracy(n=1500, seed=5):
    """How often each reward is right on fresh scenes, {reward: {what is wrong: share}}: it should give a picture more for
    its caption than for one gone astray, by the kind of word that is; and more than to one where objects touch.

    "taste" should be low: the standard deviation over pictures that fit a caption, by that over all (picture, caption).
    """
    spec, rng = SPECS["meissonic-tiny"], np.random.default_rng(seed)
    rewards = rewards_for(spec, spec.rewards)
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

    if path == "teacher":
        teacher = load_teacher("meissonic-tiny")
        draw = functools.partial(generate_teacher, teacher, steps=next(iter(teacher.spec.sampling)))
    else:
        teacher, net, _ = load_student(path, "meissonic-tiny")
        draw = functools.partial(generate_student, teacher, net, **teacher.spec.student)
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
    if args.reward_accuracy:
        print(json.dumps(reward_accuracy(), indent=1))
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
    ap.add_argument("--reward_accuracy", action="store_true", help="how often the rewards prefer the right caption, by what is wrong")
    ap.add_argument("--alike", nargs="+", metavar="CKPT",
                    help="share of tokens that agree in two pictures of a prompt; a student's checkpoint or weights, or: teacher")
    ap.add_argument("--prompts", metavar="PATH", help="write --n captions, one a line, to distil from")
    args = ap.parse_args()
    if min(args.n, args.steps, args.batch) < 1 or not args.lr > 0:
        ap.exit(2, "make_shapes.py: --n, --steps and --batch are 1 or more, --lr is above 0\n")
    if args.train and args.n < 100:
        ap.exit(2, f"make_shapes.py: --n {args.n}: expected 100 scenes or more to train on\n")
    try:
        main(args)
    except (UserError, OSError) as err:
        ap.exit(2, f"make_shapes.py: {err}\n")
