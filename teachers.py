"""The teachers: masked diffusion models (MDMs) over image tokens.

Everything else in this repository sees a teacher through one small interface, and never asks which
one it has:

    net.tables()              E (G, V+1, d) and a bias. Every teacher embeds tokens by a sum of
                              table rows, so one soft embedding (Eq. 3) serves all. Row V: the mask
    net(e, cond)              embeddings e (B, L, d) and a condition -> logits z (B, L, G, V).
                              MaskGit's have V+1 entries: it can draw the mask
        layers=(0, 2)         ... or what comes out of these layers, (B, N, width) each, for the
                              discriminator
        s=, noise=            ... with the embedding perturbation of the student's start
    net.null(cond)            the unconditional condition, for guidance u + w (c - u)
    net.frozen()              parameters of the embedding layer, fixed in distillation (App. H.1)
    tokenizer.encode(img)     images (B, C, H, W) in [0, 1] -> tokens (B, L, G)
    tokenizer.tables()        the decoder's table, for Emb_Dec (Eq. 9)
    tokenizer.decode(e, cond) decoder embeddings (B, L, d_dec) -> images in [0, 1]
    teacher.conditions()      all that can be asked for, a row each: labels, or prompts as token ids
    teacher.cond(asked)       such rows as a condition: a tuple of tensors, batch first
    teacher.spec              what there is to know of it besides: sizes, settings, files

Student, auxiliary and EMA are further instances of the teacher's `net`. Tokenizers and samplers are
in networks/autoencoders.py, titok.py and samplers.py. Read networks/blocks.py, then one teacher:

    MaskBit    class -> image, 256 px   tokens are bits                    post-norm transformer
    MaskGit    class -> image, 256 px   one table for tokens and classes   pre-norm transformer
    Meissonic  text -> image, 1024 px   4,096 tokens, RoPE                 joint, then single blocks
    MaskGen    text -> image, 256 px    128 tokens without a place         joint blocks (MM-DiT)

`python data/check.py maskbit` says whether the published files are the right ones, and with images
whether the teacher knows them.
"""

import copy
import functools
import math
from dataclasses import dataclass, field, replace
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from dimo import initial_tokens, perturb, student_logits
from machinery.errors import UserError
from machinery.export import export_program
from machinery.files import local
from machinery.pictures import spread
from machinery.processes import now, true_float32
from networks import published_names as published
from networks import sizes
from networks.autoencoders import BitTokenizer, Encoder, VQTokenizer, bits_of
from networks.blocks import Attention, JointBlock, Network, PostNormBlock, PreNormBlock, RMSNorm
from networks.blocks import SingleBlock, linear32, modulate, rope_table, sinusoid
from networks.samplers import halton_order, sample
from networks.samplers import maskbit_plan, maskgen_plan, maskgit_plan, meissonic_plan
from networks.sizes import SHAPES_CLIP, SHAPES_REWARD
from networks.text import TextTower
from networks.titok import TATiTok
from networks.weights import fetch, load_state, read_weights
from soft_embed import embed_tokens, sample_tokens


# ------------------------------------------------------------------------------- the interface
@dataclass
class Spec:
    """All that this repository knows of a teacher. To add one, write a Spec and put it in SPECS."""

    name: str                    # what --teacher calls it
    Net: type                    # class of the transformer, with the interface above ...
    net: dict                    # ... and its arguments
    Tokenizer: type              # likewise
    tokenizer: dict
    plan: Callable               # its sampler: plan(units, steps, **settings) -> a Step per step
    sampling: dict               # {steps: settings of plan}; the first is the default
    image: tuple                 # (C, H, W) in pixels
    student: dict                # how its student starts and draws: init_ratio, noise, temperature
    rounds: bool = False         # pixels become uint8 by rounding, not by truncation
    noise_scale: float | None = None   # std of the perturbation's noise; None: the table's RMS
    text: dict | None = None     # arguments of its TextTower; None: conditions are class labels
    negative: str = ""           # prompt of the unconditional branch
    prompts: str = "assets/prompts.txt"   # file with what it is asked for, where nobody says
    files: dict = field(default_factory=dict)     # {role: (hub repository or None, file)}
    world: str = ""              # tiny world that it draws: "fashion" or "shapes"
    record: str = ""             # file with evaluations of it that ship, as JSON lines
    rewards: dict = field(default_factory=dict)   # its world's own: {name: (file, sizes)}
    bert_vocab: str | None = None      # file with the vocabulary of its world's imagereward

    @property
    def classes(self):
        return self.net.get("classes")

    @property
    def roles(self):
        if self.text is None:
            return "net", "tokenizer"
        return "net", "tokenizer", "text"

    def settings(self, steps, **given):
        """What `plan` is given for a number of steps: the published settings, or those given."""
        nearest = min(self.sampling, key=lambda n: abs(math.log(n / steps)))
        return self.sampling[nearest] | {k: v for k, v in given.items() if v is not None}


class Teacher(NamedTuple):
    net: nn.Module
    tokenizer: nn.Module
    spec: Spec
    text: nn.Module | None = None

    def noise_scale(self, net=None):
        """Standard deviation of the embedding perturbation at noise = 1.

        MaskGit's table has entries around 1, MaskBit's are small.
        # choice: the root mean square of the table, where a spec does not say; the paper is silent.
        """
        E, _ = (net or self.net).tables()
        return self.spec.noise_scale or E[:, : self.net.V].square().mean().sqrt()

    def conditions(self, prompts=None):
        """The condition dataset D_c of Alg. 1: labels (classes,), or prompts' ids (n, context)."""
        device = next(self.net.parameters()).device
        if self.text is None:
            return torch.arange(self.spec.classes, device=device)
        return self.text.tokenize(prompts).to(device)

    def cond(self, asked):
        """The condition that rows of `conditions` stand for: a tuple of tensors, batch first."""
        if self.text is None:
            return (asked,)
        return self.net.condition(*self.text(asked))

    def draw_start(self, net, n, generator=None):
        """What n starts of a student are made from, in the order in which it is drawn.

        tokens, scores (which of them are masked) and u (which tokens are drawn) are (n, L, G),
        noise is (n, L, d). A seed means the same start wherever it is used.
        """
        E, _ = net.tables()
        units = (n, net.L, net.G)
        how = {"device": E.device}
        if generator is not None:                # torch.export knows only the global one
            how["generator"] = generator
        tokens = torch.randint(net.V, units, **how)
        scores = torch.rand(units, **how)
        u = torch.rand(units, **how)
        noise = torch.randn(n, net.L, E.shape[-1], **how)
        return tokens, scores, u, noise * self.noise_scale(net)


class MDM(Network):
    """What the four transformers share.

    grid: rows and columns of the tokens, feature_grid those of the features; None where tokens have
    no place in the image.
    """

    G = 1

    def tables(self):
        E = self.tok_emb.weight
        return E[None, : self.V + 1], E.new_zeros(())                       # (1, V+1, d)

    def at(self, cond, t):
        """cond with the sampler's time t; most teachers see from the masks how far they are."""
        return cond


class ClassMDM(MDM):
    """MaskBit and MaskGit: the class is one more token, behind those of the image."""

    def null(self, cond):
        return (torch.full_like(cond[0], self.classes),)

    def forward(self, e, cond, layers=(), s=0.0, noise=None):
        if s:
            e = perturb(e, s, noise)
        label = self.embed_class(cond[0])[:, None]                          # (B, 1, d)
        h = self.enter(torch.cat([e, label], 1) + self.pos_emb)             # (B, L+1, width)
        h, features = self.walk(self.blocks, h, layers, view=lambda h: h[:, : self.L])
        if layers:
            return features
        return self.logits(h[:, : self.L])


class TextMDM(MDM):
    """Meissonic and MaskGen: text states and pooled text come first in the condition."""

    null_text = null_pooled = None               # of the negative prompt; `assemble` sets them

    def null(self, cond):
        text, pooled, *rest = cond
        return (self.null_text.expand_as(text), self.null_pooled.expand_as(pooled), *rest)


# ------------------------------------------------------------------------------------- MaskBit
# Weber et al. 2024. A token is its bits, and the generator reads the very +-1 numbers of the
# tokenizer's latent (networks/autoencoders.py) through one linear layer. So there is no embedding
# table to learn, and none for the mask: a masked group of bits is all zeros. Bits are split into
# G = 2 groups, each predicted by a softmax over 2^(bits/G) entries, and each masked on its own.
#
#                      bits  groups   V   grid  width  layers  heads  parameters
#     maskbit           14      2    128  16x16  1024     24     16   304,929,024
#     maskbit-tiny      10      2     32   8x8    128      4      4   0.8 million
class MaskBit(ClassMDM):
    """MaskBit's generator: e (B, L, d) and labels (B,) -> logits z (B, L, G, V), everywhere."""

    published_names = published.MASKBIT
    published_extras = r"bits_to_indices$"
    G = 2

    def __init__(self, bits=14, grid=16, width=1024, depth=24, heads=16, mlp=4096, classes=1000,
                 dropout=0.0):
        super().__init__()
        self.bits, self.V = bits, 2 ** (bits // self.G)
        self.grid = self.feature_grid = (grid, grid)
        self.L = grid**2
        self.width, self.depth, self.classes = width, depth, classes
        self.input_proj = nn.Linear(bits, width)
        self.class_emb = nn.Embedding(classes + 1, width)                   # last: the null class
        self.pos_emb = nn.Parameter(torch.empty(1, self.L + 1, width))      # last: the class token
        self.norm_in = nn.LayerNorm(width, eps=1e-12)
        self.drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(PostNormBlock(width, heads, mlp) for _ in range(depth))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(),
                                  nn.LayerNorm(width, eps=1e-12))
        self.to_logits = nn.Linear(width, self.G * self.V)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)
            if isinstance(m, Attention):
                nn.init.xavier_uniform_(m.qkv.weight)
        nn.init.normal_(self.pos_emb, std=0.02)
        self.set_dropout(dropout)

    def tables(self):
        """E (G, V+1, d): bits of an entry, zeros of the mask, by the input layer; and its bias."""
        n = self.bits // self.G
        weight = self.input_proj.weight.view(-1, self.G, n)                 # (d, G, n)
        rows = bits_of(torch.arange(self.V, device=weight.device), n)
        rows = torch.cat([rows, rows.new_zeros(1, n)]).to(weight.dtype)     # (V+1, n)
        return torch.einsum("vn,dgn->gvd", rows, weight), self.input_proj.bias

    def embed_class(self, label):
        return self.class_emb(label)

    def enter(self, h):
        return self.drop(self.norm_in(h))

    def logits(self, h):
        z = linear32(self.head(h), self.to_logits.weight, self.to_logits.bias)
        return z.unflatten(-1, (self.G, self.V))                            # (B, L, G, V)

    def frozen(self):
        """# choice: input layer, classes, positions, as the official code freezes MaskGit's."""
        return [*self.input_proj.parameters(), self.class_emb.weight, self.pos_emb]


# ------------------------------------------------------------------------------------- MaskGit
# Chang et al. 2022, in the PyTorch of Besnier & Chen. One table embeds tokens, mask, and classes,
# and its transpose is the output layer, with a bias of its own for each position. The mask has a
# logit: it can be drawn, then stays to the end, and is decoded as the last code. The head count is
# nowhere in the file: 8 or 12 load too, and give nonsense.
#
#                      V    grid  width  layers  heads  parameters
#     maskgit         1024  16x16   768    24     16    174,160,874 + 72,141,699 (tokenizer)
#     maskgit-512     1024  32x32   768    24     16    176,306,666 + the same
#     maskgit-tiny      64   8x8     64     4      4    the same classes, without weights
class MaskGit(ClassMDM):
    """MaskGit's transformer: e (B, L, d), labels (B,) -> z (B, L, 1, V+1), the mask's last."""

    published_names = published.MASKGIT

    def __init__(self, V=1024, grid=16, width=768, depth=24, heads=16, mlp=3072, classes=1000):
        super().__init__()
        self.grid = self.feature_grid = (grid, grid)
        self.V, self.L = V, grid**2
        self.width, self.depth, self.classes = width, depth, classes
        entries = V + 1 + classes + 1                                       # tokens, mask,
        self.tok_emb = nn.Embedding(entries, width)                         # classes, null class
        self.pos_emb = nn.Parameter(torch.empty(1, self.L + 1, width))      # last: the class token
        self.bias = nn.Parameter(torch.zeros(self.L + 1, entries))

        def mlp_layers():
            norm = functools.partial(nn.LayerNorm, width, eps=1e-12)
            return norm(), nn.Dropout(0.0), nn.Linear(width, width), nn.GELU(), norm()

        self.first = nn.Sequential(*mlp_layers(), nn.Dropout(0.0), nn.Linear(width, width))
        self.blocks = nn.ModuleList(PreNormBlock(width, heads, mlp) for _ in range(depth))
        self.last = nn.Sequential(*mlp_layers())
        nn.init.trunc_normal_(self.pos_emb, std=0.02)

    def embed_class(self, label):
        return self.tok_emb(self.V + 1 + label)

    def enter(self, h):
        return self.first(h)

    def logits(self, h):
        V = self.V + 1                                                      # the mask is drawn, too
        z = linear32(self.last(h), self.tok_emb.weight[:V]) + self.bias[: self.L, :V]
        return z[:, :, None]                                                # (B, L, 1, V+1)

    def frozen(self):
        """The table, hence the output layer, positions and output bias, as in the official code."""
        return [self.tok_emb.weight, self.pos_emb, self.bias]


# ----------------------------------------------------------------------------------- Meissonic
# Bai et al. 2024. 4,096 tokens of a 64x64 grid are embedded, normalized, halved in resolution
# (32x32), and go with 77 text states through joint blocks, then as one sequence through single
# blocks, with rotary positions; up again, and a head of its own. What is asked for otherwise (size,
# crop, aesthetic score: the micro-conditions; the pooled text; a time step) becomes one vector that
# modulates every block.
#
#                       V   grid   width  joint + single  heads  parameters
#     meissonic       8192  64x64   1024     14 + 28        8    1,006,946,304
#                                                                + 146,244,675 (tokenizer)
#                                                                + 354,032,640 (text)
#     meissonic-tiny   512   8x8     128      2 + 3         4    the same classes
#
# The time step: it was trained on 1000 x the mask ratio, and the module multiplies by another 1000.
# The published sampler passes the index of the step, N-1 ... 0; distillation, as in the official
# Di[M]O code, passes 0. That is how it is here.
class Meissonic(TextMDM):
    """Meissonic's transformer: e (B, L, d), cond = (text, pooled, micro, t) -> z (B, L, 1, V).

    text (B, S, text_width) penultimate states of the text tower, pooled (B, width) its summary,
    micro (B, 5) floats, t (B,). grid: even numbers of rows and columns. The published table has
    rows that are never used, V ... table-2; its last row is the mask.
    """

    published_names = published.MEISSONIC

    def __init__(self, V=8192, table=8256, grid=(64, 64), heads=8, head_width=128, joint=14,
                 single=28, text_width=1024, axes=(16, 56, 56), micro=(1024, 1024, 0, 0, 6.0)):
        super().__init__()
        D = heads * head_width
        H, W = self.grid = grid
        self.feature_grid = (H // 2, W // 2)
        self.V, self.L = V, H * W
        self.width, self.depth = D, joint + single
        self.axes, self.micro = axes, micro
        linear = functools.partial(nn.Linear, bias=False)

        def mlp(width, linear):
            return nn.Sequential(linear(width, D), nn.SiLU(), linear(D, D))

        self.tok_emb = nn.Embedding(table, D)
        self.norm_in, self.proj_in = RMSNorm(D), linear(D, D)
        self.norm_down, self.down = RMSNorm(D), nn.Conv2d(D, D, 2, 2, bias=False)
        self.norm_tokens, self.proj_tokens = RMSNorm(D), linear(D, D)
        self.proj_text, self.norm_text = nn.Linear(text_width, D), RMSNorm(D)
        self.embed_cond = mlp(D + 5 * 256, linear)
        self.embed_text = mlp(D, nn.Linear)
        self.embed_time = mlp(256, nn.Linear)
        self.blocks = nn.ModuleList(JointBlock(D, heads, qk_norm=True) for _ in range(joint))
        self.single = nn.ModuleList(SingleBlock(D, heads) for _ in range(single))
        self.norm_out, self.proj_out = RMSNorm(D), linear(D, D)
        self.norm_up, self.up = RMSNorm(D), nn.ConvTranspose2d(D, D, 2, 2, bias=False)
        self.head, self.norm_head, self.to_logits = linear(D, D), RMSNorm(D), linear(D, V)

    def tables(self):
        E = self.tok_emb.weight
        return torch.cat([E[: self.V], E[-1:]])[None], E.new_zeros(())      # (1, V+1, d)

    def condition(self, states, final, pooled):
        """The text tower's outputs -> cond. Without padding mask: that is how it was trained."""
        B = pooled.shape[0]                      # len() would fix the batch of an exported program
        micro = torch.cat([pooled.new_full((B, 1), size) for size in self.micro], 1)
        return states, pooled, micro, torch.zeros(B, device=pooled.device)

    def at(self, cond, t):
        return (*cond[:3], torch.full_like(cond[3], t))

    def modulation(self, pooled, micro, t):
        """The vector (B, D) that modulates every block."""
        def wave(x):
            return torch.cat(sinusoid(x, 256), -1).to(pooled.dtype)         # cosines first

        v = torch.cat([pooled, wave(micro.flatten()).view(t.shape[0], -1)], 1)
        return F.silu(self.embed_time(wave(1000 * t)) + self.embed_text(self.embed_cond(v)))

    def forward(self, e, cond, layers=(), s=0.0, noise=None):
        text, pooled, micro, t = cond
        S, joint = text.shape[1], len(self.blocks)
        v = self.modulation(pooled, micro, t)
        c = self.norm_text(self.proj_text(text))                            # (B, S, D)
        x = self.proj_in(self.norm_in(e))                                   # (B, L, D)
        if s:                                    # the official code's place for it
            x = perturb(x, s, noise)
        x = self.norm_down(x).transpose(1, 2).unflatten(2, self.grid)       # (B, D, H, W)
        x = self.down(x).flatten(2).transpose(1, 2)                         # (B, N, D), N = L/4
        x = self.proj_tokens(self.norm_tokens(x))
        rope = rope_table(S, *self.feature_grid, self.axes, e.device)
        h, features = self.walk(self.blocks, (c, x), layers, v, rope, view=lambda h: h[1])
        if layers and max(layers) < joint:
            return features
        h = torch.cat(h, 1)                                                 # (B, S+N, D)
        h, more = self.walk(self.single, h, layers, v, rope, view=lambda h: h[:, S:], first=joint)
        if layers:
            return features + more
        x = self.norm_up(self.proj_out(self.norm_out(h[:, S:])))            # (B, N, D)
        x = self.up(x.transpose(1, 2).unflatten(2, self.feature_grid))      # (B, D, H, W)
        x = self.norm_head(self.head(x.flatten(2).transpose(1, 2)))         # (B, L, D)
        return linear32(x, self.to_logits.weight)[:, :, None]               # (B, L, 1, V)

    def frozen(self):
        """Input embedding and output head, as in the official code: 988.0 of 1,006.9 M train."""
        parts = (self.tok_emb, self.norm_in, self.proj_in,
                 self.head, self.norm_head, self.to_logits)
        return [p for m in parts for p in m.parameters()]


# ------------------------------------------------------------------------------------- MaskGen
# Kim et al. 2025, the VQ variant. An image is 128 tokens without a place: each may say something of
# all of it. So there is no grid, the discriminator's convolutions run along the index, and the
# decoder is a vision transformer that is told the prompt besides. Joint blocks as in Meissonic,
# without rotary positions; the output layer is the token table. Conditions: text states, pooled
# text, and an aesthetic score that the published sampler fixes at 6.5.
#
#                    V    L   width  blocks  heads  parameters
#     maskgen      8192  128   1024    16     16     604,311,552
#                                                    + 391,046,292 (tokenizer)
#                                                    + 123,650,304 (text)
#     maskgen-xl   8192  128   1280    20     16   1,176,611,840 + the same
#     maskgen-tiny   64   16     64     3      4     the same classes, without weights
class MaskGen(TextMDM):
    """MaskGen's transformer: e (B, L, d), cond = (text, pooled, score, guide) -> z (B, L, 1, V).

    text (B, S, text_width) penultimate states of the text tower, pooled (B, text_width), score
    (B,); guide (B, S, text_width), the tower's last states, is for the decoder. `spare` are rows of
    the published table that nothing uses.
    """

    grid = feature_grid = None
    published_names = published.MASKGEN
    published_config = published.MASKGEN_SIZES

    def __init__(self, V=8192, L=128, width=1024, depth=16, heads=16, text_width=768, micro=256,
                 spare=1001, score=6.5):
        super().__init__()
        self.V, self.L, self.width, self.depth = V, L, width, depth
        self.micro, self.score = micro, score
        self.tok_emb = nn.Embedding(V + 1 + spare, width)
        self.pos_emb = nn.Parameter(0.02 * torch.randn(1, L, width))
        self.proj_text = nn.Linear(text_width, width)
        self.proj_cond = nn.Linear(text_width + micro, width)
        self.blocks = nn.ModuleList(JointBlock(width, heads, last=i == depth - 1)
                                    for i in range(depth))
        self.mod_out = nn.Linear(width, 2 * width)
        nn.init.normal_(self.tok_emb.weight, std=0.02)

    def condition(self, states, final, pooled):
        return states, pooled, pooled.new_full(pooled.shape[:1], self.score), final

    def forward(self, e, cond, layers=(), s=0.0, noise=None):
        text, pooled, score, _ = cond
        if s:
            e = perturb(e, s, noise)
        cos, sin = sinusoid(100 * score, self.micro, period=1000.0)
        wave = torch.cat([sin, cos], 1).to(pooled.dtype)                    # sines first
        v = F.silu(self.proj_cond(torch.cat([pooled, wave], 1)))            # (B, D), to every block
        h = (self.proj_text(text), e + self.pos_emb)                        # (B, S, D), (B, L, D)
        (_, x), features = self.walk(self.blocks, h, layers, v, view=lambda h: h[1])
        if layers:
            return features
        scale, shift = self.mod_out(v)[:, None].chunk(2, -1)
        E = self.tok_emb.weight[: self.V]
        return linear32(modulate(x, shift, scale), E)[:, :, None]           # (B, L, 1, V)

    def frozen(self):
        """# choice: the token table, with it the tied output layer, and positions, as MaskGit's."""
        return [self.tok_emb.weight, self.pos_emb]


# ---------------------------------------------------------------------------------- generation
def to_bytes(img, spec):
    """Images in [0, 1] -> uint8, truncated or rounded as the teacher's authors do."""
    return (img * 255 + spec.rounds / 2).to(torch.uint8)


@torch.no_grad()
def decode_tokens(tokenizer, x, cond=()):
    """Tokens (B, L, G) -> images (B, C, H, W) in [0, 1]."""
    if int(x.max()) >= tokenizer.V:
        raise ValueError(f"expected tokens below V = {tokenizer.V}, got {int(x.max())}: unmask "
                         "before decoding")
    return tokenizer.decode(embed_tokens(x, *tokenizer.tables()), cond)


def to_pixels(teacher, x, cond, start, seconds):
    """Tokens (B, L, G) -> uint8 images (B, C, H, W).

    # choice: decoded in true float32, without TF32, whatever drew the tokens: metrics read these
    pixels, and they should not depend on the card.

    seconds, a Counter or None, receives the time of "tokens", since `start`, and of "pixels".
    """
    middle = now(x.device)
    with true_float32():
        img = to_bytes(decode_tokens(teacher.tokenizer, x, cond), teacher.spec)
    if seconds is not None:
        seconds.update(tokens=middle - start, pixels=now(x.device) - middle)
    return img


def student_tokens(teacher, net, asked, init_ratio=0.6, noise=0.1, temperature=1.0,
                   generator=None):
    """One pass of the generator `net`: rows (B, ...) of teacher.conditions -> z, tokens x, cond.

    temperature 0 is argmax.
    """
    cond = teacher.cond(asked)
    tokens, scores, u, n = teacher.draw_start(net, asked.shape[0], generator)
    x_init = initial_tokens(tokens, init_ratio, scores, net.V)              # Alg. 1, l. 4
    z = student_logits(net, x_init, cond, *net.tables(), noise, n)          # l. 5: (B, L, G, V)
    x = sample_tokens(z, temperature, u).clamp_(max=net.V - 1)              # l. 6, no masks
    return z, x, cond


@torch.no_grad()
def generate_student(teacher, net, asked, *, seconds=None, **start):
    """The one-step student: rows (B, ...) of teacher.conditions -> uint8 images (B, C, H, W).

    start: init_ratio, noise, temperature and generator, as in `student_tokens`.
    """
    began = now(asked.device)
    z, x, cond = student_tokens(teacher, net, asked, **start)
    if not torch.isfinite(z).all():
        raise UserError("the student's logits are not finite: its training diverged, take an "
                        "earlier checkpoint")
    return to_pixels(teacher, x, cond, began, seconds)


@torch.no_grad()
def generate_teacher(teacher, asked, steps, *, order=None, generator=None, seconds=None, **given):
    """The multi-step teacher: rows (B, ...) of teacher.conditions -> uint8 images (B, C, H, W).

    With the published guidance and temperature for so many steps, or with those given. order: None
    or "confidence", or "halton".
    """
    began = now(asked.device)
    net, spec, cond = teacher.net, teacher.spec, teacher.cond(asked)
    ranks = None                                 # those of confidence
    if order == "halton":
        if net.grid is None:
            raise UserError(f"--order halton needs a grid of tokens, and {spec.name}'s have no "
                            "place in the image")
        ranks = halton_order(net.grid)
    plan = spec.plan(net.L * net.G, steps, **spec.settings(steps, **given))
    rand = functools.partial(torch.rand, generator=generator)
    x = sample(net, cond, plan, order=ranks, rand=rand)
    return to_pixels(teacher, x, cond, began, seconds)


def fixed_sample(make_images, conditions, n=10, seed=0):
    """n images, spread over the conditions, from starts that the seed fixes: the same each time."""
    generator = torch.Generator(conditions.device).manual_seed(seed)
    return make_images(torch.stack(spread(conditions, n)), generator=generator)


def export(teacher, net, path, **start):
    """Write a student as a file of torch.export, for any batch from 2 on, without this repository.

    torch.export.load(path).module()(asked) draws uint8 images; torch.manual_seed fixes its starts.
    """
    tokenizer = teacher.tokenizer

    def draw(asked):
        _, x, cond = student_tokens(teacher, net, asked, **start)
        img = tokenizer.pixels(embed_tokens(x, *tokenizer.tables()), cond)   # in one piece
        return to_bytes(img.clamp(0, 1), teacher.spec)

    asked = teacher.conditions(["a photo"] * 3)[:3]
    export_program(draw, (net, tokenizer, teacher.text), asked, path)


# ---------------------------------------------------------------------------- the four teachers
MASKBIT = Spec(
    name="maskbit",
    Net=MaskBit,
    net=dict(classes=1000),
    Tokenizer=BitTokenizer,
    tokenizer={},
    plan=maskbit_plan,
    sampling={256: dict(guidance=5.8, temperature=10.3),
              128: dict(guidance=7.1, temperature=9.0),
              64: dict(guidance=7.1, temperature=7.8)},
    image=(3, 256, 256),
    student=dict(init_ratio=0.6, noise=0.1, temperature=0.1),
    files=published.MASKBIT_FILES)

MASKGIT = Spec(
    name="maskgit",
    Net=MaskGit,
    net=dict(classes=1000),
    Tokenizer=VQTokenizer,
    tokenizer={},
    plan=maskgit_plan,
    sampling={8: dict(guidance=3.0, temperature=4.5)},
    image=(3, 256, 256),
    student=dict(init_ratio=0.6, noise=0.1, temperature=12.0),
    rounds=True,
    noise_scale=1.0,
    files=published.MASKGIT_FILES)

MEISSONIC = Spec(
    name="meissonic",
    Net=Meissonic,
    net={},
    Tokenizer=VQTokenizer,
    tokenizer=sizes.MEISSONIC_TOKENIZER,
    plan=meissonic_plan,
    sampling={64: dict(guidance=9.0, temperature=2.0)},
    image=(3, 1024, 1024),
    # choice: Tab. 5's and 10's temperature; App. H.5 says 1 for text
    student=dict(init_ratio=0.6, noise=0.3, temperature=0.5),
    rounds=True,
    noise_scale=1.0,
    text=dict(pads_with_bang=True),
    negative="worst quality, low quality, low res, blurry, distortion, watermark, logo, signature, "
             "text, jpeg artifacts, signature, sketch, duplicate, ugly, identifying mark",
    files=published.MEISSONIC_FILES)

MASKGEN = Spec(
    name="maskgen",
    Net=MaskGen,
    net={},
    Tokenizer=TATiTok,
    tokenizer={},
    plan=maskgen_plan,
    sampling={16: dict(guidance=12.0, temperature=2.0)},
    image=(3, 256, 256),
    # choice: Tab. 5's ratio; Sec. 4.4 and App. I.6 say 0.95
    student=dict(init_ratio=0.9, noise=0.1, temperature=1.0),
    text=sizes.MASKGEN_TEXT,
    files=published.MASKGEN_FILES)

# The others differ from these in what is said here. Of the tiny ones, maskbit-tiny knows clothes
# and meissonic-tiny shapes (README, "The tiny world"); two have no weights, and let you try code.
SPECS = {spec.name: spec for spec in (
    MASKBIT,
    MASKGIT,
    replace(
        MASKGIT,
        name="maskgit-512",
        net=dict(classes=1000, grid=32),
        sampling={15: dict(guidance=2.8, temperature=7.0)},
        image=(3, 512, 512),
        files=published.MASKGIT_512_FILES),
    MEISSONIC,
    MASKGEN,
    replace(
        MASKGEN,
        name="maskgen-xl",
        net=dict(width=1280, depth=20),
        files=published.MASKGEN_XL_FILES),
    replace(
        MASKBIT,
        name="maskbit-tiny",
        net=sizes.MASKBIT_TINY,
        tokenizer=sizes.MASKBIT_TINY_TOKENIZER,
        sampling={16: dict(guidance=5.0, temperature=11.0)},
        image=(1, 32, 32),
        student=dict(init_ratio=0.6, noise=0.1, temperature=1.0),
        files={"net": (None, "assets/fashion/teacher.safetensors"),
               "tokenizer": (None, "assets/fashion/tokenizer.safetensors")},
        world="fashion",
        record="assets/fashion/teacher_steps.jsonl"),
    replace(
        MASKGIT,
        name="maskgit-tiny",
        net=sizes.MASKGIT_TINY,
        tokenizer=sizes.MASKGIT_TINY_TOKENIZER,
        sampling={4: dict(guidance=3.0, temperature=4.5)},
        image=(3, 32, 32),
        student=dict(init_ratio=0.6, noise=0.1, temperature=1.0),
        files={}),
    replace(
        MEISSONIC,
        name="meissonic-tiny",
        net=sizes.MEISSONIC_TINY,
        tokenizer=sizes.MEISSONIC_TINY_TOKENIZER,
        sampling={32: dict(guidance=2.5, temperature=2.0)},
        image=(3, 32, 32),
        student=dict(init_ratio=0.985, noise=0.1, temperature=0.3),
        text=sizes.MEISSONIC_TINY_TEXT,
        negative="",
        prompts="assets/shapes/prompts.txt",
        files={"net": (None, "assets/shapes/teacher.safetensors"),
               "tokenizer": (None, "assets/shapes/tokenizer.safetensors"),
               "text": (None, "assets/shapes/clip.safetensors")},
        world="shapes",
        rewards={"clip": ("assets/shapes/clip.safetensors", SHAPES_CLIP),
                 "imagereward": ("assets/shapes/imagereward.safetensors", SHAPES_REWARD)},
        bert_vocab="assets/shapes/words.txt"),
    replace(
        MASKGEN,
        name="maskgen-tiny",
        net=sizes.MASKGEN_TINY,
        tokenizer=sizes.MASKGEN_TINY_TOKENIZER,
        sampling={4: dict(guidance=12.0, temperature=2.0)},
        image=(3, 32, 32),
        text=sizes.MASKGEN_TINY_TEXT,
        files={}),
)}


# ------------------------------------------------------------------------------------- loading
# What chooses a teacher's weights: flags of every script, keys of a run's config.
FILES = ("teacher_weights", "tokenizer_weights", "text_weights", "text_activation",
         "random_weights")
FLAGS = {"net": "--teacher_weights", "tokenizer": "--tokenizer_weights", "text": "--text_weights"}


def source(spec, role, path=None):
    """The path of a role's weights: as given, else the published file, fetched if need be."""
    if path is not None:
        return path
    if role not in spec.files:
        raise UserError(f"{spec.name} has no published weights, it is there to try the code: add "
                        f"--random_weights, or name a file of your own by {FLAGS[role]} PATH")
    return fetch(*spec.files[role], FLAGS[role])


def build(spec, role, path=None, random_weights=False, text_activation=None):
    """A role's network (net, tokenizer, text): random, or on the weights in path or published."""
    Module = {"net": spec.Net, "tokenizer": spec.Tokenizer, "text": TextTower}[role]
    sizes = dict(getattr(spec, role))
    if role == "text" and text_activation:
        sizes["quick_gelu"] = text_activation == "quick_gelu"
    if random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)        # the same in every process and every run
            return Module(**sizes)
    path = source(spec, role, path)
    sizes |= published.stated_sizes(Module, path)           # a config.json beside it knows better
    with torch.device("meta"):          # no time lost on initial values
        module = Module(**sizes)
    return load_state(module.to_empty(device="cpu"), read_weights(path, role), path)


def assemble(spec, modules, device="cpu"):
    """Networks by role -> the frozen Teacher, its unconditional condition prepared."""
    if isinstance(modules["tokenizer"].encoder, Encoder):
        modules["tokenizer"].to(memory_format=torch.channels_last)          # a tenth faster
    for module in modules.values():
        module.to(device).eval().requires_grad_(False)
    teacher = Teacher(spec=spec, **modules)
    if teacher.text is not None:
        empty = teacher.cond(teacher.conditions([spec.negative]))
        teacher.net.null_text, teacher.net.null_pooled = empty[:2]
    return teacher


def load_teacher(name, teacher_weights=None, tokenizer_weights=None, random_weights=False,
                 device="cpu", text_weights=None, text_activation=None):
    """The frozen teacher called `name`, in eval mode.

    Weights come from the given paths, else from `spec.files` (assets, or the hub); random_weights
    needs no file. text_activation: "gelu" or "quick_gelu", instead of the spec's.
    """
    if name not in SPECS:
        raise UserError(f"unknown teacher {name!r}: expected one of {', '.join(SPECS)}")
    spec = SPECS[name]
    paths = {"net": teacher_weights, "tokenizer": tokenizer_weights, "text": text_weights}
    if not random_weights:
        for role in spec.roles:         # complain before anything large is read
            source(spec, role, paths[role])
    modules = {role: build(spec, role, paths[role], random_weights, text_activation)
               for role in spec.roles}
    return assemble(spec, modules, device)


def load_student(path, name=None, device="cpu", **files):
    """A one-step generator from a file: (teacher, net, config), the net in eval mode.

    A checkpoint of train.py says in its config which teacher it has and how it starts, and its EMA
    weights are taken. A bare state dict (an official Di[M]O student, a theta_0) has config {}, and
    needs the teacher's name. files: those arguments of `load_teacher`, over those of the config.
    """
    state, config = read_weights(local(path)), {}
    if isinstance(state, dict):
        config = state.get("config", {})
        state = state.get("ema", state)
    name = config.get("teacher", name)
    if name is None:
        raise UserError(f"{path} is a bare state dict and does not name its teacher: add "
                        "--teacher NAME")
    files = {key: files.get(key) or config.get(key) for key in FILES}
    teacher = load_teacher(name, device=device, **files)
    net = load_state(copy.deepcopy(teacher.net), state, path)
    return teacher, net.eval().requires_grad_(False), config
