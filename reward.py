"""Differentiable rewards: a frozen judge of (image, prompt) teaches the generator (Sec. 3.2.2).

A reward model R reads pixels, a discrete generator writes tokens, and between the two the tokenizer's decoder takes
tokens only. But a decoder, too, begins with a table look-up. Fed with the expected row (Eq. 3) instead of a drawn
one, the whole way from logits to score is one differentiable function, and Eq. 9 can be descended as it stands:

    L_reward(theta) = - sum_i lambda_i R_i(Dec(Emb_Dec(z_theta), c), c)                       (Eq. 9; Alg. 1, l. 16)

No policy gradient, no value network: the judge says pixel by pixel what it would like better. `reward_grad` asks
for d L_reward / d z in small chunks of images, as only one chunk's graph must fit into memory. Decoder and rewards
are frozen, and where the decoder's output is clamped to [0, 1] the gradient is zero.

    name         model                        R                 typical      offset   what it judges
    clip         CLIP ViT-H-14                s cos             25 .. 35        100   does the image fit the prompt
    hps          the same, HPS v2.1 weights   cos               0.15 .. 0.35      1   what do people prefer
    pickscore    the same, PickScore weights  s cos             18 .. 23         30   the same, other people
    imagereward  BLIP and a linear head       (x - mean) / std  -2.3 .. 2         2   the same, about N(0, 1)

s = exp(logit_scale), about 100, is learned with each model. Scales differ a hundredfold, hence the small lambdas:
1.0 ImageReward + 0.2 CLIP in the paper (SEED below; Tab. 5, 9), times 2000 against a Di[M]O loss of weight 1. ReNO,
whose mix test-time optimization takes over (RENO), writes each term as offset - R: the same gradient.

What goes wrong: a differentiable judge can be fooled, and its gradient shows how. Without the Di[M]O loss as an
anchor colors over-saturate, and FID rises with the score (HPS alone: 24.2 -> 38.4 on COCO; App. I.10, Tab. 8).
CLIP alone improves the prompt and not the looks, the others the looks more than the prompt: so they are mixed.

`python reward.py` optimizes one image's pixels for a tiny CLIP that has learned nothing. In seconds the cosine
rises from where all images lie to nearly 1, and ever more pixels end at 0 or 1: reward hacking, and nothing else.
"""

import argparse
import functools
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from machinery.errors import UserError
from machinery.files import local
from networks.blip import ImageReward, WordPiece
from networks.clip import CLIP_H, ClipReward, preprocess
from networks.weights import fetch, load_state, read_weights
from soft_embed import soft_embed


class Published(NamedTuple):
    repo: str
    file: str
    offset: float           # ReNO minimizes offset - R


REWARDS = {"clip": Published("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "open_clip_pytorch_model.bin", 100.0),
           "hps": Published("xswu/HPSv2", "HPS_v2.1_compressed.pt", 1.0),
           "pickscore": Published("yuvalkirstain/PickScore_v1", "model.safetensors", 30.0),
           "imagereward": Published("THUDM/ImageReward", "ImageReward.pt", 2.0)}
MEASURING_CLIPS = {"clip_g": Published("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "open_clip_pytorch_model.bin", 1.0),
          "clip_l": Published("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors", 1.0)}
VOCAB = ("google-bert/bert-base-uncased", "vocab.txt")
SEED = {"imagereward": 1.0, "clip": 0.2}                                                      # Tab. 5, 9
RENO = {"hps": 5.0, "imagereward": 1.0, "clip": 0.01, "pickscore": 0.05}                      # test time (Sec. 4.3)


class Rewards(nn.Module):
    """Frozen rewards side by side: images and as many prompts -> {name: (B,)}. Gradients flow to the pixels alone.

    bf16: matrices are bfloat16, multiplied under autocast; LayerNorms, cosines and ImageReward's head are float32.
    checkpointing: the backward pass computes each reward anew, and holds one at a time in memory.
    """

    def __init__(self, models, bf16=False, checkpointing=False):
        super().__init__()
        self.models, self.bf16, self.checkpointing = nn.ModuleDict(models), bf16, checkpointing
        self.eval().requires_grad_(False)

    def forward(self, img, prompts):
        """Pixels (B, 3 or 1, H, W) in [0, 1], any size, and a list of B prompts -> scores, float32."""
        check(img, prompts)
        ready = {size: preprocess(img, size) for size in {m.size for m in self.models.values()}}
        scores = {}
        with torch.autocast(img.device.type, torch.bfloat16, enabled=self.bf16):    # whatever the caller's may be
            for name, model in self.models.items():
                args = ready[model.size], model.tokenize(prompts).to(img.device)
                scores[name] = checkpoint(model, *args, use_reentrant=False) if self.checkpointing else model(*args)
        return scores


def check(img, prompts):
    """Complain of what would otherwise be scored without a word: bytes, pixels in [-1, 1], one string for all."""
    if img.ndim != 4 or img.shape[1] not in (1, 3) or not img.is_floating_point():
        raise UserError(f"rewards read floating-point images (B, 3 or 1, H, W), got {tuple(img.shape)} {img.dtype}")
    low, high = img.detach().aminmax()
    if low < -0.1 or high > 1.1:                                  # NaN passes: the trainer skips such steps
        raise UserError(f"rewards read pixels in [0, 1], got {low:.3g} to {high:.3g}")
    check_prompts(prompts, len(img))


def check_prompts(prompts, B):
    if not isinstance(prompts, (list, tuple)) or len(prompts) != B or not all(isinstance(p, str) for p in prompts):
        got = len(prompts) if isinstance(prompts, (list, tuple)) else type(prompts).__name__
        raise UserError(f"expected a list of {B} prompts, one string an image, got {got}")


def load_model(name, make, path=None, random_weights=False):
    """What make() builds, with the weights of `path`, else those published for `name`, or always the same random ones."""
    if random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()
    path = path or fetch(*{**REWARDS, **MEASURING_CLIPS}[name][:2], f"--{name}_weights")
    with torch.device("meta"):                                    # no time lost on initial values
        model = make()
    return load_state(model.to_empty(device="cpu"), read_weights(local(path)), path)


def load_rewards(names, paths={}, device="cpu", dtype=None, vocab=None, random_weights=False, configs={},
                 clip_scaled=True, checkpointing=False):
    """The frozen rewards called `names`: Rewards.

    Weights come from paths[name], else from the hub; random_weights needs no file. configs[name]: other sizes, as
    ClipReward's config or ImageReward's arguments. dtype: torch.bfloat16 halves the memory, 2.9 GB for SEED's two.
    vocab: BERT's, a file. # choice: clip is s cos, or with clip_scaled=False cos; the paper does not say.
    """
    if unknown := [n for n in (*names, *paths, *configs) if n not in REWARDS]:
        raise UserError(f"unknown reward {unknown[0]!r}: expected some of {', '.join(REWARDS)}")
    if not names or dtype not in (None, torch.float32, torch.bfloat16):
        raise UserError(f"expected names of rewards, in float32 or bfloat16; got {list(names)}, {dtype}")
    models = {}
    for name in names:
        make = functools.partial(ClipReward, configs.get(name, CLIP_H), name)
        if name == "imagereward":
            vocab = vocab or (None if random_weights else fetch(*VOCAB, "--bert_vocab"))
            make = functools.partial(ImageReward, wordpiece=WordPiece(vocab and local(vocab)), **configs.get(name, {}))
        model = load_model(name, make, paths.get(name), random_weights)
        if name == "imagereward" and vocab and len(model.wordpiece.ids) + 2 != model.words.num_embeddings:
            raise UserError(f"{vocab} has {len(model.wordpiece.ids)} pieces, expected "
                            f"{model.words.num_embeddings - 2}: is it the vocabulary of bert-base-uncased?")
        for key, m in model.named_modules() if dtype == torch.bfloat16 else ():
            if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding, nn.MultiheadAttention)) and "head" not in key:
                m.to(dtype)
        models[name] = model.to(device)
    if "clip" in models:
        models["clip"].scaled = clip_scaled
    return Rewards(models, dtype == torch.bfloat16, checkpointing)


def rewards_for(spec, weights, paths={}, random_weights=False, **kwargs):
    """The rewards named in `weights`: a tiny world's own where its spec has them, else the published ones."""
    own = {name: spec.rewards[name] for name in weights if name in spec.rewards}
    paths = {**{name: path for name, (path, _) in own.items()}, **{name: path for name, path in paths.items() if path}}
    if own:
        kwargs["configs"], random_weights = {name: config for name, (_, config) in own.items()}, False
        kwargs["vocab"] = kwargs.get("vocab") or spec.bert_vocab
    return load_rewards(list(weights), paths, random_weights=random_weights, **kwargs)


def mix(text):
    """An argparse type: "clip=0.2,imagereward=1" -> {"clip": 0.2, "imagereward": 1.0}."""
    try:
        weights = {name: float(w) for name, w in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=W,NAME=W, as in clip=0.2,imagereward=1, got {text!r}")
    if unknown := weights.keys() - REWARDS.keys():
        raise argparse.ArgumentTypeError(f"unknown reward {min(unknown)!r}: expected some of {', '.join(REWARDS)}")
    return weights


def weighted(scores, weights):
    """sum_i lambda_i R_i, (B,). Every weight needs its score; a score without weight is only looked at."""
    if missing := [name for name in weights if name not in scores]:
        raise UserError(f"no reward {missing[0]!r} among those loaded: {', '.join(scores)}")
    return sum(w * scores[name] for name, w in weights.items())


def reno_loss(scores, weights=RENO):
    """sum_i lambda_i (offset_i - R_i), (B,): what test-time optimization descends and selects by."""
    return sum(w * REWARDS[name].offset for name, w in weights.items()) - weighted(scores, weights)


def clip_each(g, limit, eps=0.0):
    """Scale the gradient of each image in g (B, ...) down to a norm of `limit` at most: images ignore each other."""
    factor = (limit / (g.flatten(1).norm(dim=1) + eps)).clamp(max=1)                          # (B,)
    return g * factor.view(-1, *[1] * (g.ndim - 1))


def reward_grad(z, tokenizer, cond, rewards, prompts, weights, tau=1.0, chunk=1, clip=None):
    """Gradient of Eq. 9 at the student's logits: (g (B, L, G, V), {name: mean score}). g has the 1/B of the mean.

    z (B, L, G, V) student logits; cond the teacher's condition, for decoders that read it. `chunk` images are
    decoded and judged at a time, and their graph is gone before the next: memory does not grow with B.
    clip, as in `clip_each`, is of one image's gradient, before the 1/B. A judge has cliffs, and an image on one outweighs
    the others: on shapes a twentieth of the images had nine tenths of the squared norm.
    """
    check_prompts(prompts, len(z))
    E, bias = tokenizer.tables()
    grads, seen = [], []
    for i in range(0, len(z), chunk):
        part = z[i : i + chunk].detach().requires_grad_()
        e = soft_embed(part, E, bias, tau=tau)                                              # Emb_Dec: (b, L, d_dec)
        img = tokenizer.decode(e, tuple(c[i : i + chunk] for c in cond), clamp=True)          # (b, C, H, W)
        scores = rewards(img, prompts[i : i + chunk])
        g = torch.autograd.grad(-weighted(scores, weights).sum(), part)[0]                    # Eq. (9)
        grads.append((clip_each(g, clip) if clip else g) / len(z))
        seen.append({name: score.detach() for name, score in scores.items()})
    return torch.cat(grads), {name: torch.cat([s[name] for s in seen]).mean() for name in seen[0]}


if __name__ == "__main__":
    torch.manual_seed(0)
    tiny = dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=2, width=64, head_width=32, patch_size=8),
                text_cfg=dict(context_length=16, vocab_size=512, width=64, heads=2, layers=2))
    rewards = load_rewards(["hps"], random_weights=True, configs={"hps": tiny})
    prompt, img = ["a red boat on a lake"], torch.rand(1, 3, 32, 32)
    others = rewards(torch.rand(256, 3, 32, 32), prompt * 256)["hps"]
    print(f"cosine of 256 random images: {others.mean():.3f} on average, {others.max():.3f} at most")
    for step in range(101):
        img = img.detach().requires_grad_()
        score = rewards(img, prompt)["hps"]
        if step % 20 == 0:
            saturated = ((img == 0) | (img == 1)).float().mean()
            print(f"step {step:3d}: cosine {score.item():.3f}   saturated pixels {saturated:4.0%}")
        g = torch.autograd.grad(score.sum(), img)[0]
        img = (img + 0.03 * g / g.abs().mean()).clamp(0, 1)
