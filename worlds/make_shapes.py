"""How the networks of the shapes world were made, in this order:

    python worlds/make_shapes.py --train tokenizer      # pictures to 8x8 tokens of 512 codes
    python worlds/make_shapes.py --train clip           # text encoder, and one of the two rewards
    python worlds/make_shapes.py --train teacher        # Meissonic's classes, on those tokens
    python worlds/make_shapes.py --train imagereward    # the other reward; wants a theta0

Each writes assets/shapes/NAME.safetensors, and a record beside it. assets/shapes/README.md has the
settings, times and results of the files that ship. worlds/measure_shapes.py measures them.
"""

import functools
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from scipy.cluster.vq import kmeans2
from tqdm import tqdm

sys.path.insert(0, f"{os.path.dirname(__file__)}/..")
from data.tokens import write_lines  # noqa: E402
from dimo import exact_mask, mask_ratio  # noqa: E402
from machinery.errors import guard  # noqa: E402
from machinery.files import ROOT  # noqa: E402
from machinery.flags import number, parser  # noqa: E402
from networks.blip import ImageReward, WordPiece  # noqa: E402
from networks.clip import preprocess  # noqa: E402
from networks.text import clip_ids  # noqa: E402
from networks.weights import load_state, read_weights  # noqa: E402
from soft_embed import embed_tokens  # noqa: E402
from teachers import (SHAPES_CLIP, SHAPES_REWARD, SPECS, build,  # noqa: E402
                      generate_student, generate_teacher,
                      load_student, to_bytes)
from worlds.shapes import (CELL, MIXED, WORDS,  # noqa: E402
                           astray, scenes)
from worlds.training import (fit, pixel_loss, ship,  # noqa: E402
                             training_flags)


SPEC = SPECS["meissonic-tiny"]
SEED = 1_000_003                         # of the scenes to train on; evaluation has other seeds


def in_parts(f, x, desc):
    return torch.cat([f(part) for part in tqdm(x.split(500), desc)])


def captioned(args):
    """(Scenes, their different prompts, which of these each picture has)."""
    drawn = scenes(args.n, SEED)
    prompts, which = np.unique(drawn.prompts, return_inverse=True)
    return drawn, prompts.tolist(), torch.from_numpy(which)


def random_rows(args):
    return torch.randint(args.n, (args.batch,))


# ------------------------------------------------------------------------------- the tokenizer
def patches(img):
    """Pictures (n, 3, H, W) -> their patches (n, L, 3 CELL^2), row by row."""
    return F.pixel_unshuffle(img, CELL).flatten(2).transpose(1, 2)


def code_patches(img, V, width, seed):
    """Of pictures in [0, 1] (centers (V, 3 CELL^2) of their patches, codes (V, width) for these).

    k-means of *different* patches, so that rare shapes weigh more than the ubiquitous ground. A
    code is its center's leading components.
    # choice: the codebook is not learned with the encoder. When it was, most codes were for the
    ground, and which one a patch got depended on the rest of the picture, as the encoder's norms
    are taken over all of it. To a teacher that is noise, and it learned little else.
    """
    seen = patches(img).flatten(0, 1).unique(dim=0)
    centers, _ = kmeans2(seen.numpy(), V, minit="++", seed=seed)
    centers = torch.from_numpy(centers)
    about_mean = centers - centers.mean(0)
    _, _, axes = torch.linalg.svd(about_mean, full_matrices=False)
    return centers, about_mean @ axes[:width].T


def tokenizer_loss(tok, centers, img):
    """The encoder learns each patch's right code, the decoder to draw pictures from right codes."""
    x = torch.cdist(patches(img), centers).argmin(-1)                        # (B, L)
    codes = tok.codebook.weight[x]                                           # (B, L, embed)
    z = tok.latents(img).float().flatten(2).transpose(1, 2)
    recon = pixel_loss(tok.pixels(codes).float(), img)
    miss = (z - codes).square().mean()
    right = tok.nearest(z) == x
    return recon + 5 * miss, dict(recon=recon, right=right.float().mean())


def train_tokenizer(args):
    img, _, _ = scenes(args.n, SEED)
    model = SPEC.Tokenizer(**SPEC.tokenizer).to(memory_format=torch.channels_last)
    centers, codes = code_patches(
        img[:3000].float() / 255,
        model.V,
        width=SPEC.tokenizer["embed"],
        seed=args.seed)
    model.codebook.weight = torch.nn.Parameter(codes, requires_grad=False)

    def loss_fn():
        part = img[random_rows(args)].float().contiguous(memory_format=torch.channels_last)
        return tokenizer_loss(model, centers, part / 255)

    return fit(model, loss_fn, args)


# -------------------------------------------------------------------------------------- CLIP
def clip_loss(model, img, ids, same):
    """CLIP's loss, but pictures of one caption are each other's right answers.

    same (B, B) is true where captions are.
    """
    f = F.normalize(model.encode_image(img).float(), dim=-1)
    g = F.normalize(model.encode_text(ids).float(), dim=-1)
    z = model.logit_scale.exp().clamp(max=100) * f @ g.T                     # (B, B)
    target = same.float() / same.sum(1, keepdim=True)
    of_image = (target * z.log_softmax(1)).sum(1).mean()
    of_caption = (target * z.log_softmax(0)).sum(0).mean()
    loss = -of_image / 2 - of_caption / 2
    right = same.gather(1, z.argmax(1, keepdim=True))
    return loss, dict(loss=loss, right=right.float().mean())


def train_clip(args):
    (img, _, metas), prompts, which = captioned(args)
    model = CLIP(**SHAPES_CLIP)
    ids = clip_ids(
        prompts,
        model.context_length,
        model.vocab_size,
        pads_with_bang=True)

    def words(i):
        """What the caption of scene i speaks of, in any order."""
        said = []
        for clause in metas[i]["include"]:
            said += [clause["class"], clause.get("color", "")]
        return sorted(said)

    neighbors = torch.tensor(sorted(range(args.n), key=words))       # same words, side by side

    def loss_fn():       # half a batch at random, half from the neighbors of its captions
        i = torch.randint(args.n, (args.batch // 2,))
        near = i + torch.randint(-40, 41, i.shape)
        i = neighbors[torch.cat([i, near]) % args.n]
        pixels = (img[i].float() / 255 - 0.45) / 0.27
        prompt = which[i]
        return clip_loss(model, pixels, ids[prompt], prompt == prompt[:, None])

    return fit(model, loss_fn, args)


# ------------------------------------------------------------------------------- the teacher
def teacher_loss(net, x, cond):
    """Eq. 1 as Meissonic trains: cross-entropy at masked tokens, their ratio by the cosine.

    A tenth of the images lose their prompt, in place in `cond`.
    # choice: the time says nothing, 0 or a random step. The published sampler and distillation do
    not tell it either.
    # choice: no label smoothing. A tenth of the mass on wrong tokens is a stray patch in most
    pictures.
    """
    B = len(x)
    ratio = mask_ratio(torch.rand(B), "cosine")
    mask = exact_mask(ratio, torch.rand(x.shape))
    drop = torch.rand(B) < 0.1
    for c, null in zip(cond, net.null(cond)):
        c[drop] = null[drop]
    t = torch.randint(64, (B,)) * (torch.rand(B) < 0.5).float()
    x_t = x.masked_fill(mask, net.V)
    z = net(embed_tokens(x_t, *net.tables()), (*cond[:3], t))
    scored = x.masked_fill(~mask, -100)                                      # -100: not scored
    loss = F.cross_entropy(z.flatten(0, 2), scored.flatten())
    return loss, dict(masked=loss)


def train_teacher(args):
    (img, *_), prompts, which = captioned(args)
    tokenizer = build(SPEC, "tokenizer").eval()
    text = build(SPEC, "text").eval()
    model = build(SPEC, "net") if args.go_on else SPEC.Net(**SPEC.net)

    def condition(prompts):
        return model.condition(*text(text.tokenize(prompts)))

    with torch.no_grad():
        x = in_parts(
            lambda part: tokenizer.encode(part.float() / 255),
            img, "tokens")
        features = condition(prompts)
        model.null_text, model.null_pooled = condition([SPEC.negative])[:2]
    net = torch.compile(model) if args.compile else model

    def loss_fn():
        i = random_rows(args)
        return teacher_loss(net, x[i], [c[which[i]] for c in features])

    return fit(model, loss_fn, args, muon=True)


# --------------------------------------------------------------------------- the ImageReward
def spoiled(e):
    """Embeddings (B, L, d) of pictures, with patches of others in them: dots, or a rectangle.

    Half of them are blends, as soft embeddings are: a reward trained on them likes a sure drawing.
    """
    B, side = len(e), round(e.shape[1] ** 0.5)

    def stripe():
        """(B, side): some rows or columns that follow each other."""
        low = torch.randint(side - 2, (B, 1))
        high = low + torch.randint(1, 6, (B, 1))
        at = torch.arange(side)
        return (low <= at) & (at < high)

    rectangle = stripe()[:, :, None] & stripe()[:, None]
    dots = torch.rand(B, side, side) < 0.3 * torch.rand(B, 1, 1)
    change = torch.where(torch.rand(B, 1, 1) < 0.5, rectangle, dots)[..., None]

    e = e.unflatten(1, (side, side))                                         # (B, side, side, d)
    other = e.roll((1, *torch.randint(side, (2,)).tolist()), (0, 1, 2))
    share = torch.where(torch.rand(B, 1, 1, 1) < 0.5, 1.0, torch.rand(B, 1, 1, 1))
    return torch.lerp(e, other, change * share).flatten(1, 2)


@torch.no_grad()
def drawings(img, touching, prompts, some):
    """(good, worse), uint8 like img: pictures through the tokenizer, for each a worse one.

    Worse means that it fits the picture's prompt less. The first `some` are theta_0's, and the
    teacher's in 1, 4 and 8 steps. In the next `some` objects touch, if there are several
    (`touching`, uint8 like img). The others are spoiled.
    """
    teacher, theta_0, _ = load_student("assets/shapes/theta0.safetensors", SPEC.name)
    tokenizer = teacher.tokenizer

    def embed(img):
        return embed_tokens(tokenizer.encode(img.float() / 255), *tokenizer.tables())

    def pixels(e):
        return to_bytes(tokenizer.decode(e, clamp=True), SPEC)

    e = in_parts(embed, img, "tokens")
    draw = [functools.partial(generate_teacher, teacher, steps=steps)
            for steps in (1, 4, 8)]
    student = functools.partial(
        generate_student, teacher, theta_0, **SPEC.student)
    draw += [student, student, student]
    parts = teacher.conditions(prompts[:some]).split(100)
    worse = [draw[i % 6](part) for i, part in enumerate(tqdm(parts, "drawn"))]

    e_worse = spoiled(e[some:])
    touching = touching[some : 2 * some]
    merged = (touching != img[some : 2 * some]).flatten(1).any(1)            # there are several
    e_worse[:some][merged] = in_parts(embed, touching[merged], "touching")
    worse.append(in_parts(pixels, e_worse, "worse"))
    return in_parts(pixels, e, "good"), torch.cat(worse)


def grid_code(side, width):
    """(side^2, width): sines and cosines of a patch's column and row.

    They make an eighth of a turn over the picture up to two.
    # choice: where the image tower starts to learn positions, instead of noise of 0.02. From noise
    it had not learned in 7,500 steps what left and above mean. From these it takes 400, once it
    knows colors and shapes.
    """
    turns = 2 ** torch.linspace(-3, 1, width // 4)
    angle = torch.outer(torch.arange(side) / side, 2 * math.pi * turns)
    code = 0.5 * torch.cat([angle.sin(), angle.cos()], 1)                    # (side, width / 2)
    return torch.cat([code.repeat(side, 1), code.repeat_interleave(side, 0)], 1)


def imagereward_loss(model, good, worse, ids, wrong):
    """ImageReward's loss, -log sigmoid(r_better - r_worse), of two kinds of pairs.

    They are two captions of a picture, and two pictures of a caption. good, worse: uint8
    (B, 3, H, W). ids (B, S): the captions. wrong (K, B, S): K that are false of `good`.
    """
    pixels = torch.cat([good, worse]).float() / 255
    seen, seen_worse = model.see(preprocess(pixels, model.size)).chunk(2)
    pictures = [seen] * (1 + len(wrong)) + [seen_worse]
    r = model.raw(torch.cat(pictures), torch.cat([ids, *wrong, ids]))
    r, *r_wrong, r_worse = r.split(len(ids))                                 # K + 2 of (B,)
    r_wrong = torch.stack(r_wrong)
    # Pairs leave the zero of the scores free: keep them near it.
    size = (r**2 + (r_wrong**2).mean(0) + r_worse**2).mean()
    ranks = F.softplus(r_wrong - r).mean() + F.softplus(r_worse - r).mean()
    right = dict(caption=(r > r_wrong).float().mean(),
                 picture=(r > r_worse).float().mean())
    return ranks + 1e-3 * size, right


def train_imagereward(args):
    tasks = (*MIXED, "position", "position", "counting", "mixture")
    img, prompts, _ = scenes(args.n, SEED, tasks)
    touching = scenes(args.n, SEED, tasks, touching=True).img
    rng = np.random.default_rng(args.seed)
    words = f"{ROOT}/{SPEC.bert_vocab}"
    write_lines(words, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])

    model = ImageReward(wordpiece=WordPiece(words), **SHAPES_REWARD)
    N, width = model.pos[0, 1:].shape
    model.pos.data[0, 1:] = grid_code(math.isqrt(N), width)
    easy = 0.5                           # share of wrong captions that are just another picture's
    if args.go_on:
        easy, path = 0.1, f"{ROOT}/assets/shapes/imagereward.safetensors"
        load_state(model, read_weights(path), path)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        good, worse = drawings(
            img, touching,
            prompts, some=args.n // 3)

    def false(prompt):
        if rng.random() < easy:
            return prompts[rng.integers(args.n)]
        return astray(rng, prompt)

    def loss_fn():
        i = random_rows(args)
        true = [prompts[k] for k in i]
        wrong = [model.tokenize(map(false, true))
                 for _ in range(3)]
        return imagereward_loss(
            model,
            good[i],
            worse[i],
            model.tokenize(true),
            torch.stack(wrong))

    return fit(model, loss_fn, args, muon=True)


# ------------------------------------------------------------------------------- the command
TRAININGS = {"tokenizer": train_tokenizer,
             "clip": train_clip,
             "teacher": train_teacher,
             "imagereward": train_imagereward}


def main(args):
    torch.manual_seed(args.seed)
    model = TRAININGS[args.train](args)
    ship(model, f"{ROOT}/assets/shapes/{args.train}.safetensors", args)


if __name__ == "__main__":
    ap = parser(__doc__)
    add = ap.add_argument
    add("--train", choices=TRAININGS, required=True, help="which network to train")
    add("--go_on", action="store_true",
        help="train the shipped teacher or imagereward further, not a new one")
    add("--n", type=number(100, kind=int),
        default=40_000,
        help="scenes to train on (%(default)s)")
    training_flags(add, steps=3000, batch=128, lr=1e-3)
    add("--compile", action="store_true",
        help="torch.compile the teacher (15%% faster; needs a C++ compiler)")
    guard(lambda: main(ap.parse_args()))
