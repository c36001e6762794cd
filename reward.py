"""Differentiable rewards: a frozen judge of (image, prompt) teaches the generator (Sec. 3.2.2).

A reward model R reads pixels, a discrete generator writes tokens, and between the two the
tokenizer's decoder takes tokens only. But a decoder, too, begins with a table look-up. Feed it the
expected row (Eq. 3) instead of a drawn one, and the whole way from logits to score is one
differentiable function. Then Eq. 9 can be descended as it stands:

    L_reward(theta) = - sum_i lambda_i R_i(Dec(Emb_Dec(z_theta), c), c)     (Eq. 9; Alg. 1, l. 16)

No policy gradient, no value network: the judge says pixel by pixel what it would like better.
`reward_grad` computes d L_reward / d z for a few images at a time, because the graph of such a
chunk must fit into memory. Decoder and rewards are frozen, and where the decoder's output is
clamped to [0, 1] the gradient is zero.

    name         model                        R                 typical       what it judges
    clip         CLIP ViT-H-14                s cos             25 .. 35      does it fit the prompt
    hps          the same, HPS v2.1 weights   cos               0.15 .. 0.35  what do people prefer
    pickscore    the same, PickScore weights  s cos             18 .. 23      the same, other people
    imagereward  BLIP and a linear head       (x - mean) / std  -2.3 .. 2     the same, near N(0, 1)

s = exp(logit_scale), about 100, is learned with each model. Scales differ a hundredfold, hence the
small lambdas: 1.0 ImageReward + 0.2 CLIP in the paper (SEED below; Tab. 5, 9), times 2000 against a
Di[M]O loss of weight 1. Test-time optimization takes its mix from ReNO (RENO), which writes each
term as offset - R: the same gradient.

What goes wrong: a differentiable judge can be fooled, and its gradient shows how. Without the
Di[M]O loss as an anchor colors over-saturate, and FID rises with the score (HPS alone: 24.2 -> 38.4
on COCO; App. I.10, Tab. 8). CLIP alone improves the prompt and not the looks, the others the looks
more than the prompt: so they are mixed.

`python reward.py` optimizes one image's pixels for a tiny CLIP that has learned nothing. In seconds
the cosine rises from where all images lie to nearly 1, and ever more pixels end at 0 or 1: reward
hacking, and nothing else.
"""

import argparse
import functools
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from machinery.errors import UserError
from machinery.files import local
from machinery.processes import autocast, send
from networks.blip import ImageReward, WordPiece
from networks.clip import CLIP_H, ClipReward, preprocess
from networks.weights import fetch, load_state, read_weights
from soft_embed import soft_embed


# --------------------------------------------------------------------------- Eq. 9 and its gradient
def weighted(scores, weights):
    """sum_i lambda_i R_i, (B,), of scores {name: (B,)}. Scores without weight are only shown."""
    return sum(weight * scores[name] for name, weight in weights.items())


def clip_each(g, limit, eps=0.0):
    """Scale the gradient of each image in g (B, ...) down to a norm of at most `limit`."""
    norm = g.flatten(1).norm(dim=1)                                                           # (B,)
    factor = (limit / (norm + eps)).clamp(max=1)
    return torch.vmap(torch.mul)(g, factor)


def reward_grad(z, tokenizer, cond, rewards, prompts, weights, embed=soft_embed, chunk=1, clip=0):
    """Gradient of Eq. 9 at the student's logits: (g (B, L, G, V), {name: mean score}).

    z (B, L, G, V) student logits; cond the teacher's condition, for decoders that read it;
    prompts a list of B strings; embed the estimator, Eq. (3), or one of Fig. 11. The loss is a mean
    over the batch, so g contains 1/B. `chunk` images are decoded and judged at a time, and their
    graph is gone before the next: what stays for all is the step from logits to embeddings. clip
    limits the norm of one image's gradient, before the 1/B; 0 does not. A judge has cliffs, and an
    image on one outweighs the others: on shapes a twentieth of the images had nine tenths of the
    squared norm.
    """
    check_prompts(prompts, len(z))
    z = z.detach().requires_grad_()
    e = embed(z, *tokenizer.tables())                                       # Emb_Dec: (B, L, d_dec)
    g_e, seen = [], []                                                      # gradients at e
    for i in range(0, len(z), chunk):
        part = slice(i, i + chunk)
        e_part = e[part].detach().requires_grad_()
        img = tokenizer.decode(e_part, tuple(c[part] for c in cond), clamp=True)      # (b, C, H, W)
        scores = rewards(img, prompts[part], in_range=True)                           # clamped
        loss = -weighted(scores, weights).sum()                                            # Eq. (9)
        g_e += torch.autograd.grad(loss, e_part)
        seen.append(torch.stack(list(scores.values())).detach())                      # (rewards, b)
    (g,) = torch.autograd.grad(e, z, torch.cat(g_e))
    if clip:
        g = clip_each(g, clip)
    return g / len(z), dict(zip(scores, torch.cat(seen, 1).mean(1)))


# ------------------------------------------------------------------------------ the mix of rewards
REWARDS = {  # {name: (repository on the Hugging Face hub, file)}
    "clip": ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "open_clip_pytorch_model.bin"),
    "hps": ("xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "pickscore": ("yuvalkirstain/PickScore_v1", "model.safetensors"),
    "imagereward": ("THUDM/ImageReward", "ImageReward.pt"),
}
MEASURING_CLIPS = {  # they never teach: the CLIP score's, and the judge of colors in GenEval
    "clip_g": ("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "open_clip_pytorch_model.bin"),
    "clip_l": ("timm/vit_large_patch14_clip_224.openai", "open_clip_model.safetensors"),
}
VOCAB = ("google-bert/bert-base-uncased", "vocab.txt")                           # imagereward's
SEED = {"imagereward": 1.0, "clip": 0.2}                                                # Tab. 5, 9
RENO = {"hps": 5.0, "imagereward": 1.0, "clip": 0.01, "pickscore": 0.05}      # test time (Sec. 4.3)
OFFSETS = {"hps": 1.0, "imagereward": 2.0, "clip": 100.0, "pickscore": 30.0}   # ReNO's offset - R


def mix(text):
    """An argparse type: "clip=0.2,imagereward=1" -> {"clip": 0.2, "imagereward": 1.0}."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        weights = {name: float(weight) for name, weight in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError("expected NAME=W,NAME=W, as in clip=0.2,imagereward=1, "
                                         f"got {text!r}")
    check_names(weights)
    return weights


def check_names(names):
    for name in names:
        if name not in REWARDS:
            raise UserError(f"unknown reward {name!r}: expected some of {', '.join(REWARDS)}")


def reno_loss(scores, weights=RENO):
    """sum_i lambda_i (offset_i - R_i), (B,): what test-time optimization descends."""
    return weighted(OFFSETS, weights) - weighted(scores, weights)


# -------------------------------------------------------------------------- the judges, and loading
MATRICES = nn.Linear, nn.Conv2d, nn.Embedding, nn.MultiheadAttention


class Rewards(nn.Module):
    """Frozen rewards side by side: images and as many prompts -> {name: (B,)}.

    Gradients flow to the pixels alone. With dtype=torch.bfloat16 matrices and tables are in it, and
    are multiplied under autocast; LayerNorms, cosines and ImageReward's head stay float32.
    checkpointing: the backward pass computes each reward anew, and holds one at a time in memory.
    """

    def __init__(self, models, dtype, checkpointing):
        super().__init__()
        self.models = nn.ModuleDict(models)
        self.bf16, self.checkpointing = dtype == torch.bfloat16, checkpointing
        self.eval().requires_grad_(False)
        for name, part in self.named_modules():
            if self.bf16 and isinstance(part, MATRICES) and "head" not in name:
                part.bfloat16()

    def forward(self, img, prompts, in_range=False):
        """Pixels (B, 3 or 1, H, W) in [0, 1], any size, and B prompts -> scores, float32.

        in_range: the caller knows that, so the host need not wait for the pixels to be looked at.
        """
        check(img, prompts, in_range)
        resized = functools.cache(functools.partial(preprocess, img))     # once for each size
        scores = {}
        with autocast(img.device.type, self.bf16):            # whatever the caller's may be
            for name, model in self.models.items():
                run = model
                if self.checkpointing:
                    run = functools.partial(checkpoint, model, use_reentrant=False)
                scores[name] = run(resized(model.size), send(model.tokenize(prompts), img.device))
        return scores


def check(img, prompts, in_range=False):
    """Refuse what would be scored silently: bytes, pixels in [-1, 1], one string for all."""
    if img.ndim != 4 or img.shape[1] not in (1, 3) or not img.is_floating_point():
        raise UserError("rewards read floating-point images (B, 3 or 1, H, W), "
                        f"got {tuple(img.shape)} {img.dtype}")
    check_prompts(prompts, len(img))
    if in_range:
        return
    low, high = img.detach().aminmax()
    if low < -0.1 or high > 1.1:                          # NaN passes: the trainer skips such steps
        raise UserError(f"rewards read pixels in [0, 1], got {low:.3g} to {high:.3g}")


def check_prompts(prompts, B):
    if isinstance(prompts, str) or list(map(type, prompts)) != [str] * B:
        raise UserError(f"expected a list of {B} prompts, one string per image, "
                        f"got a {type(prompts).__name__} of {len(prompts)}")


def load_model(name, make, path=None, random_weights=False):
    """What make() builds, with the weights of `path` or those published for `name`.

    Random weights are the same every time, and leave the caller's random stream alone.
    """
    if random_weights and not path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()
    with torch.device("meta"):                                # no time lost on initial values
        model = make()
    path = path or fetch(*(REWARDS | MEASURING_CLIPS)[name], f"--{name}_weights")
    return load_state(model.to_empty(device="cpu"), read_weights(local(path)), path)


def make_imagereward(vocab, sizes):
    """ImageReward with its tokenizer, whose vocabulary must be the one that it was trained with."""
    wordpiece = WordPiece(vocab and local(vocab))
    model = ImageReward(wordpiece=wordpiece, **sizes)
    expected = model.words.num_embeddings - 2                                      # BLIP adds two
    if vocab and len(wordpiece.ids) != expected:
        raise UserError(f"{vocab} has {len(wordpiece.ids)} pieces, expected {expected}: "
                        "is it the vocabulary of bert-base-uncased?")
    return model


def rewards_for(spec, names, paths={}, random_weights=False, vocab=None, configs={}, device="cpu",
                dtype=None, clip_scaled=True, checkpointing=False):
    """The frozen rewards called `names`: a tiny world's own where its spec has any, else the hub's.

    Weights come from paths[name], else they are the shipped or published ones, or random ones where
    random_weights is set and nothing is shipped. vocab: BERT's, a file. configs[name]: other sizes,
    as ClipReward's config or ImageReward's arguments. dtype: torch.bfloat16 halves the memory, to
    2.9 GB for SEED's two.
    # choice: clip is s cos, or with clip_scaled=False cos; the paper does not say.
    """
    check_names(names)
    vocab = vocab or spec.bert_vocab
    if "imagereward" in names and not (vocab or random_weights):
        vocab = fetch(*VOCAB, "--bert_vocab")
    models = {}
    for name in names:
        shipped, sizes = spec.rewards.get(name, (None, configs.get(name)))
        make = functools.partial(ClipReward, sizes or CLIP_H, name)
        if name == "imagereward":
            make = functools.partial(make_imagereward, vocab, sizes or {})
        models[name] = load_model(name, make, paths.get(name) or shipped, random_weights)
        if name == "clip":
            models[name].scaled = clip_scaled
    return Rewards(models, dtype, checkpointing).to(device)


# The published rewards, whatever the world.
load_rewards = functools.partial(rewards_for, SimpleNamespace(rewards={}, bert_vocab=None))


# ---------------------------------------------------------------------------------------- the demo
if __name__ == "__main__":
    torch.manual_seed(0)
    tiny = dict(
        embed_dim=32,
        vision_cfg=dict(image_size=32, layers=2, width=64, head_width=32, patch_size=8),
        text_cfg=dict(context_length=16, vocab_size=512, width=64, heads=2, layers=2),
    )
    judge = load_rewards(["hps"], random_weights=True, configs={"hps": tiny})
    prompt = ["a red boat on a lake"]
    img = torch.rand(1, 3, 32, 32)
    others = judge(torch.rand(256, 3, 32, 32), prompt * 256)["hps"]
    print(f"cosine of 256 random images: {others.mean():.3f} on average, "
          f"{others.max():.3f} at most")
    for step in range(101):
        img.requires_grad_()
        score = judge(img, prompt)["hps"]
        if step % 20 == 0:
            saturated = ((img == 0) | (img == 1)).float().mean()
            print(f"step {step:3d}: cosine {score.item():.3f}   saturated pixels {saturated:4.0%}")
        (g,) = torch.autograd.grad(score.sum(), img)
        img = (img.detach() + 0.03 * g / g.abs().mean()).clamp(0, 1)
