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
whose mix test-time optimisation takes over (RENO), writes each term as offset - R: the same gradient.

What goes wrong: a differentiable judge can be fooled, and its gradient shows how. Without the Di[M]O loss as an
anchor colours over-saturate, and FID rises with the score (HPS alone: 24.2 -> 38.4 on COCO; App. I.10, Tab. 8).
CLIP alone improves the prompt and not the looks, the others the looks more than the prompt: so they are mixed.

`python reward.py` optimises one image's pixels for a tiny CLIP that has learned nothing. In seconds the cosine
rises from where all images lie to nearly 1, and ever more pixels end at 0 or 1: reward hacking, and nothing else.
"""

import argparse
import functools
import math
import unicodedata
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

from data.weights import UserError, fetch, load_state, local, read_weights, renames
from soft_embed import soft_embed
from teachers import PreNormBlock, clip_ids


# ------------------------------------------------------------------------ pixels
def normalise(img):
    """Pixels in [0, 1] -> what all four rewards were trained on."""
    mean, std = img.new_tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    return (img - mean[:, None, None]) / std[:, None, None]


def resize(img, h, w):
    """Bicubic and antialiased; in float32 at least, and not clamped, though it overshoots [0, 1] a little."""
    img = img.float() if img.dtype in (torch.float16, torch.bfloat16) else img
    img = img.expand(-1, 3, -1, -1)                                                           # grey: (B, 1, H, W)
    return img if img.shape[2:] == (h, w) else F.interpolate(img, (h, w), mode="bicubic", antialias=True)


def preprocess(img, size=224):
    """Images (B, 3 or 1, H, W) in [0, 1] -> (B, 3, size, size): one differentiable tensor for all rewards.

    The shorter side becomes `size`, the longer one is truncated to an integer, then the centre is cropped.
    """
    H, W = img.shape[2:]
    h, w = int(size * H / min(H, W)), int(size * W / min(H, W))
    top, left = round((h - size) / 2), round((w - size) / 2)                                  # halves to even
    return normalise(resize(img, h, w)[:, :, top : top + size, left : left + size])


def preprocess_longest(img, size=224):
    """As HPSv2's own benchmark has it: the longer side becomes `size`, the rest is padded with black."""
    H, W = img.shape[2:]
    h, w = round(H * size / max(H, W)), round(W * size / max(H, W))
    top, left = (size - h) // 2, (size - w) // 2
    return normalise(F.pad(resize(img, h, w), (left, size - w - left, top, size - h - top)))


def preprocess_pil(img, size=224):
    """As open_clip evaluates: a PIL picture -> (3, size, size), resized by PIL, which rounds to bytes and clamps."""
    (W, H), short = img.size, min(img.size)
    w, h = int(size * W / short), int(size * H / short)
    left, top = round((w - size) / 2), round((h - size) / 2)
    img = img.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size)).convert("RGB")
    return normalise(torch.from_numpy(np.array(img)).permute(2, 0, 1).float() / 255)


# ------------------------------------------------------------------------ CLIP, HPS v2.1, PickScore
CLIP_H = dict(embed_dim=1024, vision_cfg=dict(image_size=224, layers=32, width=1280, head_width=80, patch_size=14),
              text_cfg=dict(context_length=77, vocab_size=49408, width=1024, heads=16, layers=24))
# Two that measure and never teach (evaluate.py): CLIP score's, and GenEval's judge of colours.
CLIP_G = dict(CLIP_H, vision_cfg=dict(image_size=224, layers=40, width=1408, head_width=88, mlp_ratio=4.3637,
                                      patch_size=14))
CLIP_L = dict(embed_dim=768, quick_gelu=True, vision_cfg=dict(image_size=224, layers=24, width=1024, patch_size=14),
              text_cfg=dict(context_length=77, vocab_size=49408, width=768, heads=12, layers=12))


class ClipReward(nn.Module):
    """The cosine of two towers' features: open_clip's own CLIP, of any size, under three sets of weights.

    kind: "clip" and "pickscore" multiply by the learned scale s, "hps" does not.
    """

    def __init__(self, config=CLIP_H, kind="clip"):
        super().__init__()
        try:
            from open_clip.model import CLIP
        except ImportError:
            raise UserError(f"the reward {kind} is a CLIP by open_clip: pip install open_clip_torch")
        self.clip, self.size, self.scaled = CLIP(**config), config["vision_cfg"]["image_size"], kind != "hps"

    def tokenize(self, prompts):
        """Prompts -> ids (n, context), as they are: no template."""
        return clip_ids(prompts, self.clip.context_length, self.clip.vocab_size)

    def image_features(self, pixels):
        return self.unit(self.clip.encode_image(pixels))                                      # (B, embed)

    def text_features(self, ids):
        causal = torch.full((ids.shape[1],) * 2, -math.inf, device=ids.device).triu(1)
        self.clip.attn_mask = causal              # in no file, so a model that was built on "meta" comes without it
        return self.unit(self.clip.encode_text(ids))                                          # (B, embed)

    def unit(self, features):
        """Length 1, computed in the precision of the scale: float32 also where the matrices are bf16."""
        return F.normalize(features.to(self.clip.logit_scale.dtype), dim=-1)

    def forward(self, pixels, ids):
        """Preprocessed pixels (B, 3, size, size) and ids (B, context) -> scores (B,) of the pairs (i, i)."""
        cosine = (self.image_features(pixels) * self.text_features(ids)).sum(-1)
        return cosine * self.clip.logit_scale.exp() if self.scaled else cosine

    published_names = renames("""
        text_model.embeddings.token_embedding.             token_embedding.
        text_model.embeddings.position_embedding.weight    positional_embedding
        text_model.encoder.layers.                         transformer.resblocks.
        text_model.final_layer_norm.                       ln_final.
        text_projection.weight                             text_projection^T
        vision_model.embeddings.class_embedding            visual.class_embedding
        vision_model.embeddings.patch_embedding.           visual.conv1.
        vision_model.embeddings.position_embedding.weight  visual.positional_embedding
        vision_model.pre_layrnorm.   visual.ln_pre.        vision_model.post_layernorm.  visual.ln_post.
        vision_model.encoder.layers.                       visual.transformer.resblocks.
        visual_projection.weight                           visual.proj^T
        .layer_norm1.       .ln_1.                         .layer_norm2.         .ln_2.
        .mlp.fc1.           .mlp.c_fc.                     .mlp.fc2.             .mlp.c_proj.
        .self_attn.q_proj.  .attn.in_proj_#0               .self_attn.k_proj.    .attn.in_proj_#1
        .self_attn.v_proj.  .attn.in_proj_#2               .self_attn.out_proj.  .attn.out_proj.
    """) + [(r"^(?!clip\.)", "clip.")]                  # transformers' names to open_clip's, and those to ours
    published_extras = (r"(text_model|vision_model)\.embeddings\.position_ids$"
                        r"|(attn_mask|input_resolution|context_length|vocab_size)$")


# ------------------------------------------------------------------------ ImageReward
class Reads(nn.Module):
    """x (B, S, width) attends to y (B, N, source); added to x, then LayerNorm: BERT's attention, self or cross."""

    def __init__(self, width, heads, source):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)
        self.out, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x, y, mask=None):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), self.k(y), self.v(y)))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                           # (B, heads, S, d)
        return self.norm(x + self.out(h.transpose(1, 2).flatten(2)))


class ReadingBlock(nn.Module):
    """BERT's post-norm layer with one more sublayer, in which every word looks at the image."""

    def __init__(self, width, heads, mlp, source):
        super().__init__()
        self.attn, self.cross = Reads(width, heads, width), Reads(width, heads, source)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, h, image, mask):
        h = self.cross(self.attn(h, h, mask), image)
        return self.norm(h + self.mlp(h))


class ImageReward(nn.Module):
    """BLIP as a judge: a ViT sees, a BERT reads the prompt while looking at it, a head scores the first position.

    vision and text are (width, depth, heads). The head has no activation between its layers: so it was published.
    """

    MEAN, STD, CONTEXT = 0.16717362830052426, 1.0333394966054072, 35            # over its training set

    def __init__(self, size=224, patch=16, vision=(1024, 24, 16), text=(768, 12, 12), mlp=3072, vocab=30524,
                 positions=512, head=(1024, 128, 64, 16), wordpiece=None):
        super().__init__()
        (D, depth, heads), (d, layers, text_heads) = vision, text
        self.size, self.wordpiece = size, wordpiece
        self.patch = nn.Conv2d(3, D, patch, stride=patch)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, D))
        self.pos = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, D))
        self.blocks = nn.ModuleList(PreNormBlock(D, heads, 4 * D) for _ in range(depth))
        self.norm = nn.LayerNorm(D)
        for m in self.modules():
            if isinstance(m, nn.LayerNorm):
                m.eps = 1e-6                                      # the image tower's; the text tower has 1e-12
        self.words, self.places = nn.Embedding(vocab, d), nn.Embedding(positions, d)
        self.text_norm = nn.LayerNorm(d, eps=1e-12)
        self.layers = nn.ModuleList(ReadingBlock(d, text_heads, mlp, D) for _ in range(layers))
        self.head = nn.Sequential(*(nn.Linear(a, b) for a, b in zip((d, *head), (*head, 1))))

    def tokenize(self, prompts):
        return torch.tensor([self.wordpiece(p, min(self.CONTEXT, len(self.places.weight))) for p in prompts])

    def see(self, pixels):
        h = self.patch(pixels).flatten(2).transpose(1, 2)                                     # (B, N, D)
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], 1) + self.pos               # (B, N+1, D)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)

    def read(self, ids, image):
        mask = (ids != 0)[:, None, None]                          # padding is not attended to: (B, 1, 1, S)
        h = self.text_norm(self.words(ids) + self.places.weight[: ids.shape[1]])              # (B, S, d)
        for layer in self.layers:
            h = layer(h, image, mask)
        return h

    def raw(self, image, ids):
        """What see() saw, (B, N+1, D), and ids (B, S), 0 where padded -> scores (B,) as the head gives them."""
        first = self.read(ids, image)[:, 0]                                                   # (B, d)
        with torch.autocast(image.device.type, enabled=False):
            return self.head(first.to(self.head[0].weight.dtype))[:, 0]                       # (B,)

    def forward(self, pixels, ids):
        """Preprocessed pixels (B, 3, size, size) and ids (B, S), 0 where padded -> rewards (B,), about N(0, 1)."""
        return (self.raw(self.see(pixels), ids) - self.MEAN) / self.STD

    published_names = renames("""
        blip.visual_encoder.cls_token         cls_token    blip.visual_encoder.pos_embed          pos
        blip.visual_encoder.patch_embed.proj. patch.       blip.visual_encoder.norm.              norm.
        blip.visual_encoder.blocks.           blocks.      blocks.*.attn.proj.                    blocks.*.attn.out.
        blocks.*.mlp.fc1.           blocks.*.mlp.0.        blocks.*.mlp.fc2.                      blocks.*.mlp.3.
        blip.text_encoder.embeddings.word_embeddings.      words.
        blip.text_encoder.embeddings.position_embeddings.  places.
        blip.text_encoder.embeddings.LayerNorm.            text_norm.
        blip.text_encoder.encoder.layer.                   layers.
        layers.*.attention.         layers.*.attn.         layers.*.crossattention.               layers.*.cross.
        layers.*.intermediate.dense. layers.*.mlp.0.       layers.*.output.dense.                 layers.*.mlp.2.
        layers.*.output.LayerNorm.  layers.*.norm.         .output.LayerNorm. .norm.     .output.dense. .out.
        .self.query. .q.            .self.key. .k.         .self.value. .v.
        mlp.layers.0. head.0.       mlp.layers.2. head.1.  mlp.layers.4. head.2.
        mlp.layers.6. head.3.       mlp.layers.7. head.4.
    """)
    published_extras = r"blip\.(vision_proj|text_proj)\.|blip\.text_encoder\.embeddings\.position_ids$"


def is_ideograph(c):
    return any(a <= ord(c) <= b for a, b in ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
                                             (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0x2F800, 0x2FA1F)))


class WordPiece:
    """BERT's tokenizer: lower case, no accents; in each word, from the left, the longest pieces that are known.

    path: a file with a piece a line, an id is the line's number. Without it, single ASCII characters, to try code.
    """

    def __init__(self, path=None):
        chars = [chr(i) for i in range(33, 127)]
        lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *chars, *("##" + c for c in chars)]
        if path is not None:
            try:
                with open(path, encoding="utf-8") as f:
                    lines = f.read().rstrip("\n").split("\n")
            except (OSError, UnicodeDecodeError) as err:
                raise UserError(f"cannot read {path} as a vocabulary ({type(err).__name__}): one piece a line")
        self.ids = {piece: i for i, piece in enumerate(lines)}
        if lines[0] != "[PAD]" or {"[UNK]", "[CLS]", "[SEP]"} - self.ids.keys():
            raise UserError(f"{path} is not BERT's vocabulary: expected [PAD] first, and [UNK], [CLS], [SEP]")

    def split(self, text):
        """Words; each mark of punctuation and each ideograph is one."""
        out = ""
        for c in unicodedata.normalize("NFD", text.lower()):
            kind = unicodedata.category(c)
            if c in "\t\n\r" or kind == "Zs":
                out += " "
            elif kind[0] == "P" or c in "$+<=>^`|~" or is_ideograph(c):                   # all ASCII symbols count
                out += f" {c} "
            elif kind != "Mn" and kind[0] != "C" and c != "\ufffd":                       # no accents, no controls
                out += c
        return out.split()

    def pieces(self, word):
        found, start = [], 0
        while start < len(word):
            ends = range(len(word), start, -1) if len(word) <= 100 else ()
            match = next((p for e in ends if (p := "##" * (start > 0) + word[start:e]) in self.ids), None)
            if match is None:
                return ["[UNK]"]
            found.append(match)
            start += len(match) - 2 * (start > 0)
        return found

    def __call__(self, text, length=35):
        body = [p for word in self.split(text) for p in self.pieces(word)][: length - 2]
        row = ["[CLS]", *body, "[SEP]"]
        return [self.ids[p] for p in row] + [self.ids["[PAD]"]] * (length - len(row))


# ------------------------------------------------------------------------ all of them, loaded and scored
class Published(NamedTuple):
    repo: str
    file: str
    offset: float           # ReNO minimises offset - R


REWARDS = {"clip": Published("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "open_clip_pytorch_model.bin", 100.0),
           "hps": Published("xswu/HPSv2", "HPS_v2.1_compressed.pt", 1.0),
           "pickscore": Published("yuvalkirstain/PickScore_v1", "model.safetensors", 30.0),
           "imagereward": Published("THUDM/ImageReward", "ImageReward.pt", 2.0)}
JUDGES = {"clip_g": Published("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "open_clip_pytorch_model.bin", 1.0),
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
    path = path or fetch(*{**REWARDS, **JUDGES}[name][:2], f"--{name}_weights")
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


def load_judges(spec, weights, paths={}, random_weights=False, **kwargs):
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


# ------------------------------------------------------------------------ Eq. 9
def weighted(scores, weights):
    """sum_i lambda_i R_i, (B,). Every weight needs its score; a score without weight is only looked at."""
    if missing := [name for name in weights if name not in scores]:
        raise UserError(f"no reward {missing[0]!r} among those loaded: {', '.join(scores)}")
    return sum(w * scores[name] for name, w in weights.items())


def reno_loss(scores, weights=RENO):
    """sum_i lambda_i (offset_i - R_i), (B,): what test-time optimisation descends and selects by."""
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
