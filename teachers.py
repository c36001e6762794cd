"""The teachers: masked diffusion models (MDMs) over image tokens, their tokenizers, and their multi-step samplers.

Everything else in this repository sees a teacher through one small interface, and never asks which one it has:

    net.tables()              E (G, V+1, d) and a bias: every teacher embeds tokens by a sum of table rows, so one
                              soft embedding (Eq. 3) serves them all; row V is the mask
    net(e, cond, layers=())   embeddings e (B, L, d) and a condition -> logits z (B, L, G, V), and on request the
                              outputs of some layers, (B, N, width) each, for the discriminator. MaskGit's logits have
                              V+1 entries: it can draw the mask. s=, noise=: the start's perturbation, for the student
    net.null(cond)            the unconditional condition, for guidance u + w (c - u)
    net.frozen()              the parameters of the embedding layer, fixed during distillation (App. H.1)
    tokenizer.encode(img)     images (B, C, H, W) in [0, 1] -> tokens (B, L, G)
    tokenizer.tables()        the decoder's table, for Emb_Dec (Eq. 9)
    tokenizer.decode(e, cond) decoder embeddings (B, L, d_dec) -> images in [0, 1]
    teacher.conditions(...)   all that can be asked for, a row each: class labels, or prompts as CLIP's token ids
    teacher.cond(rows)        such rows as a condition: a tuple of tensors, batch first
    spec                      name, sizes, sampling, published files

Student, auxiliary and EMA are further instances of the teacher's `net`. Read the shared blocks, then one teacher:

    MaskBit    class -> image, 256 px   tokens are bits                     post-norm transformer
    MaskGit    class -> image, 256 px   one table for tokens and classes    pre-norm transformer
    Meissonic  text -> image, 1024 px   4,096 tokens, RoPE                  joint blocks (MM-DiT), then single ones
    MaskGen    text -> image, 256 px    128 tokens without a place          joint blocks

    python teachers.py --check maskbit                               # are the published files the right ones?
    python teachers.py --check maskbit --images /path/to/val         # and do they know real images?
"""

import argparse
import copy
import functools
import json
import math
import os
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.weights import UserError, fetch, load_state, local, read_weights, renames
from dimo import exact_mask, guided_logits, mask_ratio, perturb
from soft_embed import embed_tokens, sample_tokens


@dataclass
class Spec:
    """What a teacher says of itself. Sizes are constructor arguments, files (hub repository, file name) by role."""

    name: str
    Net: type
    net: dict                     # arguments of Net
    Tokenizer: type
    tokenizer: dict               # arguments of Tokenizer
    plan: Callable                # its sampler: (units, steps, **settings) -> [Step]
    sampling: dict                # {steps: settings}, the first is the default; other steps take the nearest entry's
    image: tuple                  # (C, H, W)
    student: dict                 # how its one-step student starts and draws (Tab. 5): init_ratio, noise, temperature
    text: dict | None = None      # arguments of TextTower; None: conditions are class labels
    negative: str = ""            # the prompt of the unconditional branch
    prompts: str = "assets/prompts.txt"   # what it is asked for, where nobody says
    rounds: bool = False          # pixels become uint8 by rounding, else by truncation, as its authors have it
    files: dict = field(default_factory=dict)
    rewards: dict = field(default_factory=dict)   # a tiny world's own: {name: (file, its sizes)}
    bert_vocab: str | None = None                 # its imagereward's vocabulary, a file
    record: str = ""              # evaluations of the teacher that ship with it, JSON lines
    noise_scale: float | None = None  # unit of the embedding perturbation; None: the table's root mean square

    @property
    def classes(self):
        return self.net.get("classes")

    @property
    def roles(self):
        return ("net", "tokenizer") if self.text is None else ("net", "tokenizer", "text")

    def settings(self, steps, **given):
        """What `plan` is given for a number of steps: the published settings, or those given."""
        nearest = self.sampling[min(self.sampling, key=lambda n: abs(math.log(n / steps)))]
        return {**nearest, **{k: v for k, v in given.items() if v is not None}}


class Teacher(NamedTuple):
    net: nn.Module
    tokenizer: nn.Module
    spec: Spec
    text: nn.Module | None = None

    def noise_unit(self, net=None):
        """The unit of the embedding perturbation's noise: MaskGit's table has unit entries, MaskBit's small ones.

        # choice: the root mean square of the table, where a spec does not say; the paper is silent.
        """
        return self.spec.noise_scale or (net or self.net).tables()[0][:, : self.net.V].square().mean().sqrt()

    def conditions(self, prompts=None):
        """The condition dataset D_c of Alg. 1, a row each: labels (classes,), or prompts' token ids (n, context)."""
        device = next(self.net.parameters()).device
        if self.text is None:
            return torch.arange(self.spec.classes, device=device)
        return self.text.tokenize(prompts).to(device)

    def draw_start(self, net, n, generator=None):
        """What n starts of a student are made from: tokens, scores and u (n, L, G), noise (n, L, d) of scale one unit.

        Drawn in this order, so a seed means the same start wherever it is used. u draws tokens; TTEO draws none.
        """
        E = net.tables()[0]
        shape, how = (n, net.L, net.G), dict(device=E.device)
        how |= {"generator": generator} if generator else {}          # torch.export knows the global one alone
        tokens = torch.randint(net.V, shape, **how)
        scores, u = (torch.rand(shape, **how) for _ in range(2))
        noise = torch.randn(*shape[:2], E.shape[-1], **how) * self.noise_unit(net)
        return tokens, scores, u, noise

    def cond(self, rows):
        """The condition that rows of `conditions` stand for: a tuple of tensors, batch first."""
        return (rows,) if self.text is None else self.net.condition(*self.text(rows))


# ======================================================================================= shared blocks
class Network(nn.Module):
    """What all networks share: dropout that can be set, and activations that can be recomputed instead of kept."""

    checkpointing = False

    def run(self, block, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def walk(self, blocks, h, layers=(), *args, view=lambda h: h, first=0):
        """h through the blocks, and view(h) after each of `layers`; it goes no deeper than the last of them."""
        features = []
        for i, block in enumerate(blocks, first):
            h = self.run(block, h, *args)
            if i in layers:
                features.append(view(h))                                                      # (B, N, width)
            if layers and i >= max(layers):
                break                                             # the discriminator needs no deeper layer, no logits
        return h, features

    def set_dropout(self, p):
        """Dropout wherever the teacher was trained with it: Meissonic and MaskGen were not."""
        for m in self.modules():
            if isinstance(m, nn.Dropout):
                m.p = p
            if isinstance(m, Attention):
                m.dropout = p
        return self

    def set_checkpointing(self, on=True):
        """Trade time for memory: a third more forward passes, and only the blocks' inputs are kept."""
        for m in self.modules():
            if isinstance(m, Network):
                m.checkpointing = on
        return self

    def halve(self):
        """Frozen weights in bf16: the blocks' matrices alone, which bf16 autocast rounds in every pass anyway."""
        for blocks in (self.blocks, getattr(self, "single", ())):
            for m in (m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)):
                m.to(torch.bfloat16)
        return self

    @property
    def feature_grid(self):
        """Rows and columns of the features, for the discriminator; None where tokens have no place in the image."""
        return self.grid

    def at(self, cond, t):
        """The condition with the sampler's time in it; most teachers see from the masks how far they are."""
        return cond


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last axis. The gain takes the input's precision, or no fused kernel fits."""

    def __init__(self, width):
        super().__init__(width, eps=1e-6)

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def split_heads(qkv, heads):
    """Packed (B, T, 3 D), whose last axis is q, k, v -> three of (B, heads, T, D / heads)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def attend(q, k, v, dropout=0.0):
    """softmax(q k^T / sqrt(d)) v, (B, heads, T, d) each, heads joined again: (B, T, heads d)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and k.shape[2] <= 512:
        p = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
        y = F.dropout(p, dropout) @ v                 # the fused kernel's backward pass is five times slower there
    else:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention, packed qkv. x (B, T, D)."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        return self.out(attend(*split_heads(self.qkv(x), self.heads), self.dropout if self.training else 0.0))


class PostNormBlock(nn.Module):
    """BERT's block: the LayerNorm comes after each residual sum. MaskBit's is this one."""

    def __init__(self, width, heads, mlp, dropout):
        super().__init__()
        self.attn, self.norm1 = Attention(width, heads, dropout), nn.LayerNorm(width, eps=1e-12)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))
        self.norm2, self.drop = nn.LayerNorm(width, eps=1e-12), nn.Dropout(dropout)

    def forward(self, h):
        h = self.norm1(h + self.drop(self.attn(h)))
        return self.norm2(h + self.drop(self.mlp(h)))


class PreNormBlock(nn.Module):
    """The vision transformer's block: MaskGit, and the tokenizer of MaskGen."""

    def __init__(self, width, heads, mlp, dropout=0.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp, width),
                                 nn.Dropout(dropout))

    def forward(self, h):
        h = h + self.attn(self.norm1(h))
        return h + self.mlp(self.norm2(h))


def modulate(h, shift, scale):
    """Adaptive LayerNorm: normalise without learned gains, then those that the condition chose, (B, 1, D)."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Stream(nn.Module):
    """One side, text or image, of a joint block: its modulation, its way into the attention and out, its MLP."""

    def __init__(self, width, heads, qk_norm=False, last=False):
        super().__init__()
        self.heads, self.last = heads, last
        self.mod, self.qkv = nn.Linear(width, (2 if last else 6) * width), nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (RMSNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2))
        if not last:                                              # the last block's text goes nowhere: no way out
            self.out = nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"),
                                     nn.Linear(4 * width, width))

    def enter(self, h, s):
        mod = self.mod(s)[:, None].chunk(2 if self.last else 6, -1)                           # (B, 1, D) each
        shift, scale = mod[1::-1] if self.last else mod[:2]       # published files store the last text's in reverse
        q, k, v = split_heads(self.qkv(modulate(h, shift, scale)), self.heads)
        return (self.q_norm(q), self.k_norm(k), v), mod[2:]

    def leave(self, h, attended, gate_a, shift, scale, gate_m):
        h = h + gate_a * self.out(attended)
        return h + gate_m * self.mlp(modulate(h, shift, scale))


class JointBlock(nn.Module):
    """MM-DiT: text and image, each with weights of its own, meet in one attention. Meissonic and MaskGen."""

    def __init__(self, width, heads, qk_norm=False, last=False):
        super().__init__()
        self.text, self.image = Stream(width, heads, qk_norm, last), Stream(width, heads, qk_norm)

    def forward(self, h, s, rope=None):
        """h = (text (B, S, D), image (B, N, D)) and the condition s (B, D) -> the two anew."""
        (q_c, k_c, v_c), mod_c = self.text.enter(h[0], s)
        (q_x, k_x, v_x), mod_x = self.image.enter(h[1], s)
        q, k, v = torch.cat([q_c, q_x], 2), torch.cat([k_c, k_x], 2), torch.cat([v_c, v_x], 2)     # text first
        c, x = attend(rotate(q, rope), rotate(k, rope), v).split([h[0].shape[1], h[1].shape[1]], 1)
        return h[0] if self.text.last else self.text.leave(h[0], c, *mod_c), self.image.leave(h[1], x, *mod_x)

    published_names = renames("""
        transformer_blocks.          blocks.
        blocks.*.norm1.linear.       blocks.*.image.mod.     blocks.*.norm1_context.linear.      blocks.*.text.mod.
        blocks.*.attn.to_q.          blocks.*.image.qkv#0.   blocks.*.attn.add_q_proj.           blocks.*.text.qkv#0.
        blocks.*.attn.to_k.          blocks.*.image.qkv#1.   blocks.*.attn.add_k_proj.           blocks.*.text.qkv#1.
        blocks.*.attn.to_v.          blocks.*.image.qkv#2.   blocks.*.attn.add_v_proj.           blocks.*.text.qkv#2.
        blocks.*.attn.norm_q.        blocks.*.image.q_norm.  blocks.*.attn.norm_added_q.         blocks.*.text.q_norm.
        blocks.*.attn.norm_k.        blocks.*.image.k_norm.  blocks.*.attn.norm_added_k.         blocks.*.text.k_norm.
        blocks.*.attn.to_out.0.      blocks.*.image.out.     blocks.*.attn.to_add_out.           blocks.*.text.out.
        blocks.*.ff.net.0.proj.      blocks.*.image.mlp.0.   blocks.*.ff_context.net.0.proj.     blocks.*.text.mlp.0.
        blocks.*.ff.net.2.           blocks.*.image.mlp.2.   blocks.*.ff_context.net.2.          blocks.*.text.mlp.2.
    """)                                                          # as the diffusers library calls them


def rotate(x, rope):
    """Rotary positions: adjacent pairs of x (B, heads, T, d) turned by the angles of rope = cos, sin (T, d/2)."""
    if rope is None:
        return x
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * rope[0] - b * rope[1], b * rope[0] + a * rope[1]], -1).flatten(-2).to(x.dtype)


def sinusoid(t, dim, period=10_000.0):
    """Numbers (N,) as waves: cosines and sines, (N, dim / 2) each, of frequencies from 1 to 1/period, in float32."""
    i = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    a = t.float()[:, None] * torch.exp(-math.log(period) * i / (dim // 2))
    return a.cos(), a.sin()


def linear32(h, weight, bias=None):
    """A linear map in float32 even under bf16 autocast: Eq. 2 takes differences of log-probabilities."""
    with torch.autocast(h.device.type, enabled=False):
        return F.linear(h.float(), weight.float(), None if bias is None else bias.float())


# ----------------------------------------------------------------------------- convolutional autoencoders
# The tokenizers of MaskBit, MaskGit and Meissonic are one architecture: levels of residual blocks, each level but
# the coarsest followed by a step to the next. MaskBit's (`bit`) differs in its residual blocks.
class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3, twice. Where the width changes, x goes around by a 1x1 convolution, nin_shortcut.

    MaskBit's acts on h instead, which leaves no skip, and its convolutions have no bias: so it was trained.
    """

    def __init__(self, c_in, c_out, norm_groups, bit=False):
        super().__init__()
        self.bit = bit
        self.norm1, self.norm2 = nn.GroupNorm(norm_groups, c_in, eps=1e-6), nn.GroupNorm(norm_groups, c_out, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=not bit)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=not bit)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_out if bit else c_in, c_out, 1, bias=not bit)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(h if self.bit else x) if hasattr(self, "nin_shortcut") else x)


class PixelAttention(nn.Module):
    """Attention of one head among all places of a map (B, C, h, w), added to it."""

    def __init__(self, width, norm_groups):
        super().__init__()
        self.norm_in, self.attn = nn.GroupNorm(norm_groups, width, eps=1e-6), Attention(width, 1)

    def forward(self, x):
        return x + self.attn(self.norm_in(x).flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


class Level(Network):
    """Some residual blocks of one resolution, attention after the first few, and perhaps a step to the next level."""

    def __init__(self, c_in, c_out, blocks, norm_groups, step=None, attention=0, bit=False):
        super().__init__()
        widths = [c_in] + [c_out] * blocks
        self.res_blocks = nn.ModuleList(ResBlock(a, b, norm_groups, bit) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(PixelAttention(c_out, norm_groups) for _ in range(attention))
        if step == "down":
            self.down_conv = nn.Conv2d(c_out, c_out, 3, stride=2)
        if step == "up":
            self.upsample_conv = nn.Conv2d(c_out, c_out, 3, padding=1)

    def forward(self, h):
        for i, block in enumerate(self.res_blocks):
            h = self.run(block, h)
            h = self.run(self.attn[i], h) if i < len(self.attn) else h
        if hasattr(self, "down_conv"):
            h = self.down_conv(F.pad(h, (0, 1, 0, 1)))            # the odd pixel is padded right and below
        if hasattr(self, "upsample_conv"):
            h = self.upsample_conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return h


class Encoder(nn.Module):
    """Images (B, C, H, W) -> latents (B, latent, h, w). `attention` lists the levels that have it, finest is 0."""

    def __init__(self, channels, first, widths, blocks, latent, norm_groups, attention=(), bit=False):
        super().__init__()
        ends = len(widths) - 1
        self.conv_in = nn.Conv2d(channels, first, 3, padding=1, bias=not bit)
        self.down = nn.ModuleList(
            Level(a, b, blocks, norm_groups, "down" if i < ends else None, blocks if i in attention else 0, bit)
            for i, (a, b) in enumerate(zip((first, *widths), widths)))
        self.mid = Level(widths[-1], widths[-1], blocks if bit else 2, norm_groups, None, int(bool(attention)), bit)
        self.norm_out = nn.GroupNorm(norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], latent, 1 if bit else 3, padding=0 if bit else 1)

    def forward(self, img):
        h = self.conv_in(img)
        for level in (*self.down, self.mid):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents (B, latent, h, w) -> images (B, C, H, W); `up` runs from coarse to fine."""

    def __init__(self, channels, widths, blocks, latent, norm_groups, attention=(), bit=False):
        super().__init__()
        ends = len(widths) - 1
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.mid = Level(widths[-1], widths[-1], blocks if bit else 2, norm_groups, None, int(bool(attention)), bit)
        self.up = nn.ModuleList(
            Level(widths[min(i + 1, ends)], widths[i], blocks, norm_groups, "up" if i else None,
                  blocks if i in attention else 0, bit) for i in range(ends, -1, -1))
        self.norm_out = nn.GroupNorm(norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)
        for level in (self.mid, *self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class TokenCoder(Network):
    """What all tokenizers share: decoding in chunks, and quantisation to the nearest row of a codebook."""

    G = 1

    def decode(self, e, cond=(), clamp=True, chunk=None):
        """Decoder embeddings e (B, L, d_dec) -> images (B, C, H, W) in [0, 1], `chunk` images at a time.

        cond is the teacher's condition; MaskGen's decoder reads the prompt in it, the others do not look.
        """
        # 1,024 tokens, 16 images of the tiny world, fit a CPU's cache; 16,384 are 4 images of 1024 px
        chunk = chunk or max(1, (1024 if e.device.type == "cpu" else 2**14) // e.shape[1])
        parts = zip(e.split(chunk), *(c.split(chunk) for c in cond))
        img = torch.cat([self.pixels(part, conds) for part, *conds in parts])
        return img.clamp(0, 1) if clamp else img

    def tables(self):
        """E (1, V+1, d_dec): the codebook, its last row twice, for so a mask that MaskGit draws is read; no bias."""
        E = self.codebook.weight
        return torch.cat([E, E[-1:]])[None], E.new_zeros(())

    def nearest(self, z):
        """z (..., d_dec) -> index of the nearest row of the codebook (Euclid), in float32 even under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            E = self.codebook.weight.float()
            return (E.square().sum(1) - 2 * z.float() @ E.T).argmin(-1)


def as_map(e, grid=None):
    """(B, L, d), row-major -> (B, d, h, w); square where the grid is not given."""
    side = math.isqrt(e.shape[1])
    return e.transpose(1, 2).unflatten(2, grid or (side, side))


class VQTokenizer(TokenCoder):
    """The convolutional tokenizer of MaskGit (attention at the coarsest level) and Meissonic (none).

    widths: channels of each level, finest first. A code is a row of a codebook (V, embed); 1x1 convolutions lead
    from the encoder's `latent` channels to it and back. signed: images inside are in [-1, 1].
    """

    def __init__(self, channels=3, widths=(128, 128, 256, 256, 512), first=None, blocks=2, latent=256, embed=256,
                 V=1024, norm_groups=32, attention=(4,), signed=True, grid=None):
        super().__init__()
        self.V, self.signed, self.grid = V, signed, grid
        self.encoder = Encoder(channels, first or widths[0], widths, blocks, latent, norm_groups, attention)
        self.quant_conv = nn.Conv2d(latent, embed, 1)
        self.codebook = nn.Embedding(V, embed)
        self.post_quant_conv = nn.Conv2d(embed, latent, 1)
        self.decoder = Decoder(channels, widths, blocks + 1, latent, norm_groups, attention)

    def latents(self, img):
        """Images in [0, 1] -> (B, embed, h, w), not yet quantised."""
        return self.quant_conv(self.encoder(2 * img - 1 if self.signed else img))

    def encode(self, img):
        return self.nearest(self.latents(img).flatten(2).transpose(1, 2))[..., None]          # (B, L, 1)

    def pixels(self, e, cond=()):
        img = self.decoder(self.post_quant_conv(as_map(e, self.grid)))
        return (img + 1) / 2 if self.signed else img

    @property
    def published_names(self):
        finest = len(self.decoder.up) - 1                         # MaskGit counts the decoder's levels from the finest
        upside_down = (r"^decoder\.up\.(\d+)\.(?=block\.|attn\.\d+\.(?:norm|q|k|v|proj_out)\.|upsample\.)",
                       lambda m: f"decoder.up.{finest - int(m[1])}.")
        return [upside_down, *renames("""
            .mid.block_1.       .mid.res_blocks.0.   .mid.block_2.          .mid.res_blocks.1.
            .attn_1.            .attn.0.
            .block.             .res_blocks.         .downsample.conv.      .down_conv.
            .upsample.conv.     .upsample_conv.      .attn.*.norm.          .attn.*.norm_in.
            .attn.*.q.          .attn.*.attn.qkv#0.  .attn.*.k.             .attn.*.attn.qkv#1.
            .attn.*.v.          .attn.*.attn.qkv#2.  .attn.*.proj_out.      .attn.*.attn.out.
            .down_blocks.       .down.               .up_blocks.            .up.
            .mid_block.         .mid.                .resnets.              .res_blocks.
            .downsamplers.0.conv.  .down_conv.       .upsamplers.0.conv.    .upsample_conv.
            .conv_shortcut.     .nin_shortcut.       .conv_norm_out.        .norm_out.
            quantize.embedding. codebook.
        """)]                                                     # the first half MaskGit's, the second diffusers'

    published_extras = r"loss\."


# =============================================================================================== MaskBit
# Weber et al. 2024. A token is its bits. The tokenizer's latent is the sign of `bits` channels; the generator reads
# the very same +-1 numbers through one linear layer, so there is no embedding table to learn, and none for the mask:
# a masked group of bits is all zeros. Bits are split into G = 2 groups, each predicted by a softmax over 2^(bits/G)
# entries, and each masked on its own.
#
#                      bits  groups   V   grid  width  layers  heads  parameters
#     maskbit           14      2    128  16x16  1024     24     16   304,929,024 + 54,489,489 (tokenizer)
#     maskbit-tiny      10      2     32   8x8    128      4      4   0.8 + 0.6 million, the same classes
def bits_of(t, n):
    """The n bits of integers t, least significant first, as -1 / +1 floats: (...) -> (..., n)."""
    return (t[..., None] >> torch.arange(n, device=t.device) & 1).float() * 2 - 1


class MaskBit(Network):
    """MaskBit's bit-token generator: e (B, L, d) and labels (B,) -> logits z (B, L, G, V), at every position."""

    def __init__(self, bits=14, groups=2, grid=16, width=1024, depth=24, heads=16, mlp=4096, classes=1000,
                 dropout=0.0):
        super().__init__()
        self.bits, self.G, self.V, self.L = bits, groups, 2 ** (bits // groups), grid**2
        self.width, self.depth, self.classes, self.grid = width, depth, classes, (grid, grid)
        self.input_proj = nn.Linear(bits, width)
        self.class_emb = nn.Embedding(classes + 1, width)                 # the last row is the null class
        self.pos_emb = nn.Parameter(torch.empty(1, self.L + 1, width))    # the last row is the class token's
        self.norm_in, self.drop = nn.LayerNorm(width, eps=1e-12), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(PostNormBlock(width, heads, mlp, dropout) for _ in range(depth))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12))
        self.to_logits = nn.Linear(width, self.G * self.V)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)
            if isinstance(m, Attention):
                nn.init.xavier_uniform_(m.qkv.weight)
        nn.init.normal_(self.pos_emb, std=0.02)

    def tables(self):
        """E (G, V+1, d): the bits of each entry through the input layer, the mask row zero; and its bias (d,)."""
        n = self.bits // self.G
        B = bits_of(torch.arange(self.V, device=self.pos_emb.device), n)                      # (V, n)
        B = torch.cat([B, B.new_zeros(1, n)])                                                 # (V+1, n)
        W = self.input_proj.weight.view(self.width, self.G, n)
        return torch.einsum("vn,dgn->gvd", B.to(W.dtype), W), self.input_proj.bias

    def forward(self, e, cond, layers=(), s=0.0, noise=None):
        e = perturb(e, s, noise) if s else e
        h = torch.cat([e, self.class_emb(cond[0])[:, None]], 1) + self.pos_emb                # (B, L+1, width)
        h, features = self.walk(self.blocks, self.drop(self.norm_in(h)), layers, view=lambda h: h[:, : self.L])
        if layers:
            return features
        z = linear32(self.head(h[:, : self.L]), self.to_logits.weight, self.to_logits.bias)
        return z.unflatten(-1, (self.G, self.V))                                              # (B, L, G, V)

    def null(self, cond):
        return (torch.full_like(cond[0], self.classes),)

    def frozen(self):
        """# choice: input projection, class and position tables, as the official code freezes MaskGit's tables."""
        return [*self.input_proj.parameters(), self.class_emb.weight, self.pos_emb]

    published_names = renames("""
        transformer.layers.            blocks.            token_emb.              input_proj.
        blocks.*.0.mha.in_proj_        blocks.*.attn.qkv. blocks.*.0.mha.out_proj. blocks.*.attn.out.
        blocks.*.0.norm.               blocks.*.norm1.    blocks.*.1.norm.        blocks.*.norm2.
        blocks.*.1.net.                blocks.*.mlp.      first_layer.0.          norm_in.
        last_layer.                    head.              prediction_layer.       to_logits.
    """)                                                          # token_emb: the file's older alias
    published_extras = r"bits_to_indices$"


class BitTokenizer(TokenCoder):
    """MaskBit's tokenizer: a convolutional autoencoder whose latent is the sign of `bits` channels, no codebook."""

    def __init__(self, channels=3, hidden=128, mult=(1, 1, 2, 2, 4), blocks=2, bits=14, groups=2, norm_groups=32,
                 grid=None):
        super().__init__()
        self.bits, self.G, self.V, self.grid = bits, groups, 2 ** (bits // groups), grid
        widths = [hidden * m for m in mult]
        self.encoder = Encoder(channels, hidden, widths, blocks, bits, norm_groups, bit=True)
        self.decoder = Decoder(channels, widths, blocks, bits, norm_groups, bit=True)

    def encode(self, img):
        """Images (B, C, H, W) in [0, 1] -> tokens (B, L, G), row-major; group 0 holds the low bits."""
        z = self.encoder(img).flatten(2).transpose(1, 2)                                      # (B, L, bits)
        bit = (z > 0).unflatten(-1, (self.G, -1)).long()                                      # zero gives -1
        return (bit << torch.arange(bit.shape[-1], device=z.device)).sum(-1)                  # (B, L, G)

    def tables(self):
        """E (G, V+1, bits) of the decoder: the bits of an entry in its group's channels, zeros elsewhere; no bias."""
        n = self.bits // self.G
        E = next(self.parameters()).new_zeros(self.G, self.V + 1, self.bits)
        for g in range(self.G):
            E[g, : self.V, g * n : (g + 1) * n] = bits_of(torch.arange(self.V, device=E.device), n)
        return E, E.new_zeros(())

    def pixels(self, e, cond=()):
        return self.decoder(as_map(e, self.grid))

    published_extras = r"quantize\.(bits_to_indices|codebook)$"


# =============================================================================================== MaskGit
# Chang et al. 2022, in the PyTorch of Besnier & Chen. One table embeds tokens, mask, and classes, and its transpose
# is the output layer, with a bias of its own for each position. The mask has a logit: it can be drawn, stays to the
# end, and is decoded as the last code. The head count is nowhere in the file: 8 or 12 load too, and give nonsense.
#
#                      V    grid  width  layers  heads  parameters
#     maskgit         1024  16x16   768    24     16    174,160,874 + 72,141,699 (tokenizer)
#     maskgit-512     1024  32x32   768    24     16    176,306,666 + the same
#     maskgit-tiny      64   8x8     64     4      4    the same classes, without weights
class MaskGit(Network):
    """MaskGit's transformer: e (B, L, d) and labels (B,) -> logits z (B, L, 1, V+1), the mask's the last."""

    def __init__(self, V=1024, grid=16, width=768, depth=24, heads=16, mlp=3072, classes=1000, dropout=0.0):
        super().__init__()
        self.V, self.G, self.L, self.grid = V, 1, grid**2, (grid, grid)
        self.width, self.depth, self.classes = width, depth, classes
        entries, norm = V + 1 + classes + 1, functools.partial(nn.LayerNorm, width, eps=1e-12)
        self.tok_emb = nn.Embedding(entries, width)                       # tokens, mask, classes, null class
        self.pos_emb = nn.Parameter(torch.empty(1, self.L + 1, width))    # the last row is the class token's
        self.bias = nn.Parameter(torch.zeros(self.L + 1, entries))
        self.first = nn.Sequential(norm(), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(),
                                   norm(), nn.Dropout(dropout), nn.Linear(width, width))
        self.blocks = nn.ModuleList(PreNormBlock(width, heads, mlp, dropout) for _ in range(depth))
        self.last = nn.Sequential(norm(), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(), norm())
        nn.init.trunc_normal_(self.pos_emb, std=0.02)

    def tables(self):
        return self.tok_emb.weight[None, : self.V + 1], self.tok_emb.weight.new_zeros(())     # (1, V+1, d)

    def forward(self, e, cond, layers=(), s=0.0, noise=None):
        e = perturb(e, s, noise) if s else e
        label = self.tok_emb(self.V + 1 + cond[0])[:, None]                                   # (B, 1, d)
        h = self.first(torch.cat([e, label], 1) + self.pos_emb)                               # (B, L+1, d), class last
        h, features = self.walk(self.blocks, h, layers, view=lambda h: h[:, : self.L])
        if layers:
            return features
        z = linear32(self.last(h[:, : self.L]), self.tok_emb.weight[: self.V + 1])
        return (z + self.bias[: self.L, : self.V + 1])[:, :, None]                            # (B, L, 1, V+1)

    def null(self, cond):
        return (torch.full_like(cond[0], self.classes),)

    def frozen(self):
        """The token table, hence the output layer, positions and output bias, as in the official code."""
        return [self.tok_emb.weight, self.pos_emb, self.bias]

    published_names = renames("""
        transformer.layers.    blocks.          first_layer.                 first.
        last_layer.            last.            blocks.*.1.fn.net.           blocks.*.mlp.
        blocks.*.0.norm.       blocks.*.norm1.  blocks.*.0.fn.mha.in_proj_   blocks.*.attn.qkv.
        blocks.*.1.norm.       blocks.*.norm2.  blocks.*.0.fn.mha.out_proj.  blocks.*.attn.out.
    """)


# ============================================================================================= Meissonic
# Bai et al. 2024. 4,096 tokens of a 64x64 grid are embedded, normalised, halved in resolution (32x32), and go with
# 77 text states through joint blocks, then as one sequence through single blocks, with rotary positions; up again,
# and a head of its own. What is asked for otherwise (size, crop, aesthetic score: the micro-conditions; the pooled
# text; a time step) becomes one vector that modulates every block.
#
#                       V   grid   width  joint + single blocks  heads  parameters
#     meissonic       8192  64x64   1024        14 + 28            8    1,006,946,304 + 146,244,675 + 354,032,640
#     meissonic-tiny   512   8x8     128         2 + 3             4    the same classes     (tokenizer)  (text)
#
# The time step: it was trained on 1000 x the mask ratio, and the module multiplies by another 1000. The published
# sampler passes the index of the step, N-1 ... 0; distillation, as in the official Di[M]O code, passes 0. So here.
class Meissonic(Network):
    """Meissonic's transformer: e (B, L, d), cond = (text, pooled, micro, t) -> logits z (B, L, 1, V).

    text (B, S, text_width) penultimate states of the text tower, pooled (B, width) its summary, micro (B, 5) floats,
    t (B,). V+1 .. table - 1 are rows of the published table that are never used; the mask is its last row.
    """

    def __init__(self, V=8192, table=8256, grid=64, heads=8, head_width=128, joint=14, single=28, text_width=1024,
                 axes=(16, 56, 56), micro=(1024, 1024, 0, 0, 6.0)):
        super().__init__()
        D = heads * head_width
        norm, lin = functools.partial(RMSNorm, D), functools.partial(nn.Linear, bias=False)
        mlp = lambda n, linear: nn.Sequential(linear(n, D), nn.SiLU(), linear(D, D))
        self.grid = (grid, grid) if isinstance(grid, int) else tuple(grid)                    # even numbers
        self.V, self.G, self.L, self.width, self.depth = V, 1, self.grid[0] * self.grid[1], D, joint + single
        self.axes, self.micro, self.null_text, self.null_pooled = tuple(axes), micro, None, None
        self.tok_emb = nn.Embedding(table, D)
        self.norm_in, self.proj_in = norm(), lin(D, D)
        self.norm_down, self.down = norm(), nn.Conv2d(D, D, 2, 2, bias=False)
        self.norm_tokens, self.proj_tokens = norm(), lin(D, D)
        self.proj_text, self.norm_text = nn.Linear(text_width, D), norm()
        self.embed_cond = mlp(D + 5 * 256, lin)
        self.embed_text, self.embed_time = mlp(D, nn.Linear), mlp(256, nn.Linear)
        self.blocks = nn.ModuleList(JointBlock(D, heads, qk_norm=True) for _ in range(joint))
        self.single = nn.ModuleList(SingleBlock(D, heads) for _ in range(single))
        self.norm_out, self.proj_out = norm(), lin(D, D)
        self.norm_up, self.up = norm(), nn.ConvTranspose2d(D, D, 2, 2, bias=False)
        self.head, self.norm_head, self.to_logits = lin(D, D), norm(), lin(D, V)

    def tables(self):
        E = self.tok_emb.weight
        return torch.cat([E[: self.V], E[-1:]])[None], E.new_zeros(())                        # (1, V+1, d)

    def condition(self, states, final, pooled):
        """The text tower's three outputs -> cond; no padding mask: the network was trained to attend to padding."""
        micro = torch.tensor(self.micro, device=pooled.device).expand(pooled.shape[0], -1)
        return states, pooled, micro, torch.zeros(pooled.shape[0], device=pooled.device)

    @property
    def feature_grid(self):
        return self.grid[0] // 2, self.grid[1] // 2

    def at(self, cond, t):
        return (*cond[:3], torch.full_like(cond[3], t))

    def forward(self, e, cond, layers=(), s=0.0, noise=None):
        text, pooled, micro, t = cond
        (H, W), S = self.grid, text.shape[1]
        wave = lambda t: torch.cat(sinusoid(t, 256), -1).to(pooled.dtype)                     # cosines first
        v = self.embed_cond(torch.cat([pooled, wave(micro.flatten()).view(e.shape[0], -1)], 1))
        v = F.silu(self.embed_time(wave(1000 * t)) + self.embed_text(v))                      # (B, D), to every block
        c = self.norm_text(self.proj_text(text))                                              # (B, S, D)
        x = self.proj_in(self.norm_in(e))                                                     # (B, L, D)
        x = perturb(x, s, noise) if s else x                      # the official code's place for it
        x = self.down(self.norm_down(x).transpose(1, 2).unflatten(2, (H, W)))                 # (B, D, H/2, W/2)
        x = self.proj_tokens(self.norm_tokens(x.flatten(2).transpose(1, 2)))                  # (B, N, D), N = L/4
        rope = rope_table(S, H // 2, W // 2, self.axes, e.device)
        (c, x), features = self.walk(self.blocks, (c, x), layers, v, rope, view=lambda h: h[1])
        if layers and max(layers) < len(self.blocks):
            return features
        h, more = self.walk(self.single, torch.cat([c, x], 1), layers, v, rope, view=lambda h: h[:, S:],
                            first=len(self.blocks))
        if layers:
            return features + more
        x = self.proj_out(self.norm_out(h[:, S:]))                                            # (B, N, D)
        x = self.norm_up(x).transpose(1, 2).unflatten(2, (H // 2, W // 2))
        x = self.head(self.up(x).flatten(2).transpose(1, 2))                                  # (B, L, D)
        return linear32(self.norm_head(x), self.to_logits.weight)[:, :, None]                 # (B, L, 1, V)

    def null(self, cond):
        return (self.null_text.expand_as(cond[0]), self.null_pooled.expand_as(cond[1]), *cond[2:])

    def frozen(self):
        """The input embedding and the whole output head, as in the official code: 988.0 of 1,006.9 million train."""
        return [p for m in (self.tok_emb, self.norm_in, self.proj_in, self.head, self.norm_head, self.to_logits)
                for p in m.parameters()]

    published_names = JointBlock.published_names + renames("""
        single_transformer_blocks. single.
        single.*.norm.linear.       single.*.mod.      single.*.attn.to_q.           single.*.qkv#0.
        single.*.attn.to_k.         single.*.qkv#1.    single.*.attn.to_v.           single.*.qkv#2.
        single.*.attn.norm_q.       single.*.q_norm.   single.*.attn.norm_k.         single.*.k_norm.
        embed.embeddings.           tok_emb.           embed.layer_norm.             norm_in.
        embed.conv.                 proj_in.           down_block.downsample.norm.   norm_down.
        down_block.downsample.conv. down.              project_to_hidden_norm.       norm_tokens.
        project_to_hidden.          proj_tokens.       context_embedder.             proj_text.
        encoder_proj_layer_norm.    norm_text.         project_from_hidden_norm.     norm_out.
        project_from_hidden.        proj_out.          up_block.upsample.norm.       norm_up.
        up_block.upsample.conv.     up.                mlm_layer.conv1.              head.
        mlm_layer.layer_norm.       norm_head.         mlm_layer.conv2.              to_logits.
        cond_embed.linear_1.        embed_cond.0.      cond_embed.linear_2.          embed_cond.2.
        time_text_embed.text_embedder.linear_1.      embed_text.0.
        time_text_embed.text_embedder.linear_2.      embed_text.2.
        time_text_embed.timestep_embedder.linear_1.  embed_time.0.
        time_text_embed.timestep_embedder.linear_2.  embed_time.2.
    """)


class SingleBlock(nn.Module):
    """Text and image as one sequence z (B, T, D): attention and MLP side by side, one projection for both."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.mod, self.qkv = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (RMSNorm(width // heads) for _ in range(2))
        self.proj_mlp, self.proj_out = nn.Linear(width, 4 * width), nn.Linear(5 * width, width)

    def forward(self, z, s, rope):
        shift, scale, gate = self.mod(s)[:, None].chunk(3, -1)
        n = modulate(z, shift, scale)
        q, k, v = split_heads(self.qkv(n), self.heads)
        a = attend(rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope), v)
        f = F.gelu(self.proj_mlp(n), approximate="tanh")
        return z + gate * self.proj_out(torch.cat([a, f], -1))


@functools.lru_cache(maxsize=8)
def angles(text, h, w, axes, device):
    """cos and sin (text + h w, sum(axes) / 2): text at the origin, unturned, then places (0, row, column) of a grid.

    axes[k] dimensions of a head, in adjacent pairs, turn with coordinate k. Angles in float64, tables in float32.
    """
    cells = torch.cartesian_prod(torch.arange(1.0), torch.arange(float(h)), torch.arange(float(w))).double()
    place = torch.cat([torch.zeros(text, 3, dtype=torch.float64), cells])                     # (text + h w, 3)
    turns = [10_000 ** -(torch.arange(0, n, 2, dtype=torch.float64) / n) for n in axes]       # per unit of place
    angle = torch.cat([place[:, k, None] * turn for k, turn in enumerate(turns)], 1)
    return angle.cos().float().to(device), angle.sin().float().to(device)


@torch.compiler.assume_constant_result
def rope_table(*where):
    """angles(...), which compiled graphs hold as a constant: they would compute them in every pass."""
    return angles(*where)


# =============================================================================================== MaskGen
# Kim et al. 2025, the VQ variant. An image is 128 tokens without a place: each may say something of all of it. So
# there is no grid, the discriminator's convolutions run along the index, and the decoder is a vision transformer
# that is told the prompt besides. Joint blocks as in Meissonic, without rotary positions; the output layer is the
# token table. Conditions: text states, pooled text, and an aesthetic score that the published sampler fixes at 6.5.
#
#                       V    L   width  blocks  heads  parameters
#     maskgen         8192  128   1024    16     16     604,311,552 + 391,046,292 (tokenizer) + 123,650,304 (text)
#     maskgen-xl      8192  128   1280    20     16   1,176,611,840 + the same
#     maskgen-tiny      64   16     64     3      4     the same classes, without weights
class MaskGen(Network):
    """MaskGen's transformer: e (B, L, d), cond = (text, pooled, score, guide) -> logits z (B, L, 1, V).

    text (B, S, text_width) penultimate states of the text tower, pooled (B, text_width), score (B,); guide is for the
    decoder. `spare` are published table rows that nothing uses.
    """

    grid = None

    def __init__(self, V=8192, L=128, width=1024, depth=16, heads=16, text_width=768, micro=256, spare=1001,
                 score=6.5):
        super().__init__()
        self.V, self.G, self.L, self.width, self.depth = V, 1, L, width, depth
        self.micro, self.score, self.null_text, self.null_pooled = micro, score, None, None
        self.tok_emb = nn.Embedding(V + 1 + spare, width)
        self.pos_emb = nn.Parameter(0.02 * torch.randn(1, L, width))
        self.proj_text, self.proj_cond = nn.Linear(text_width, width), nn.Linear(text_width + micro, width)
        self.blocks = nn.ModuleList(JointBlock(width, heads, last=i == depth - 1) for i in range(depth))
        self.mod_out = nn.Linear(width, 2 * width)
        nn.init.normal_(self.tok_emb.weight, std=0.02)

    def tables(self):
        return self.tok_emb.weight[None, : self.V + 1], self.tok_emb.weight.new_zeros(())     # (1, V+1, d)

    def condition(self, states, final, pooled):
        return states, pooled, pooled.new_full((pooled.shape[0],), self.score), final

    def forward(self, e, cond, layers=(), s=0.0, noise=None):
        text, pooled, score = cond[:3]
        e = perturb(e, s, noise) if s else e
        cos, sin = sinusoid(100 * score, self.micro, period=1000.0)
        wave = torch.cat([sin, cos], 1).to(pooled.dtype)                                      # sines first
        v = F.silu(self.proj_cond(torch.cat([pooled, wave], 1)))                              # (B, D), to every block
        h = self.proj_text(text), e + self.pos_emb                                            # (B, S, D), (B, L, D)
        (_, x), features = self.walk(self.blocks, h, layers, v, view=lambda h: h[1])
        if layers:
            return features
        scale, shift = self.mod_out(v)[:, None].chunk(2, -1)
        return linear32(modulate(x, shift, scale), self.tok_emb.weight[: self.V])[:, :, None]  # (B, L, 1, V)

    def null(self, cond):
        """The empty prompt's text states and pooled text; the score stays."""
        return (self.null_text.expand_as(cond[0]), self.null_pooled.expand_as(cond[1]), *cond[2:])

    def frozen(self):
        """# choice: the token table, and with it the tied output layer, and positions, as for MaskGit."""
        return [self.tok_emb.weight, self.pos_emb]

    published_names = JointBlock.published_names + renames("""
        embeddings.  tok_emb.    lm_head.           tok_emb.     pos_embed     pos_emb
        norm.linear. mod_out.    text_embed_proj.   proj_text.   cond_pooled_proj.  proj_cond.
    """)                                                          # embeddings and lm_head are tied
    published_config = {"codebook_size": "V", "num_latent_tokens": "L", "text_embed_dim": "text_width",
                        "decoder_embed_dim": "width", "decoder_depth": "depth", "decoder_num_heads": "heads",
                        "micro_condition_embed_dim": "micro", "sample_aesthetic_score": "score"}


class ViTHalf(Network):
    """What TA-TiTok's two vision transformers share: a sequence, a class token first, between two LayerNorms."""

    def __init__(self, width, depth, heads, places, L):
        super().__init__()
        table = lambda *shape: nn.Parameter(0.02 * torch.randn(*shape))
        self.class_embedding, self.positional_embedding = table(1, width), table(places + 1, width)
        self.latent_token_positional_embedding = table(L, width)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleList(PreNormBlock(width, heads, 4 * width) for _ in range(depth))

    def through(self, *parts):
        return self.walk(self.transformer, self.ln_pre(torch.cat(parts, 1)))[0]

    def with_class(self, h):
        return torch.cat([self.class_embedding.expand(h.shape[0], 1, -1), h], 1) + self.positional_embedding


class TiTokEncoder(ViTHalf):
    def __init__(self, channels, patch, width, depth, heads, places, L, embed):
        super().__init__(width, depth, heads, places, L)
        self.patch_embed, self.conv_out = nn.Conv2d(channels, width, patch, patch), nn.Linear(width, embed)

    def forward(self, img, latent_tokens):
        h = self.with_class(self.patch_embed(img).flatten(2).transpose(1, 2))                 # (B, 1 + places, width)
        queries = (latent_tokens + self.latent_token_positional_embedding).expand(img.shape[0], -1, -1)
        return self.conv_out(self.ln_post(self.through(h, queries)[:, h.shape[1]:]))          # (B, L, embed)


class TiTokDecoder(ViTHalf):
    def __init__(self, channels, patch, width, depth, heads, places, L, embed, text, text_width):
        super().__init__(width, depth, heads, places, L)
        self.places, self.patch, self.grid = places, patch, math.isqrt(places)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.text_guidance_positional_embedding = nn.Parameter(0.02 * torch.randn(text, width))
        self.text_guidance_proj, self.decoder_embed = nn.Linear(text_width, width), nn.Linear(embed, width)
        self.to_patch = nn.Linear(width, channels * patch**2)     # row, column, channel
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, e, guide):
        """e (B, L, embed), guide (B, text, text_width) -> images (B, C, H, W), about in [0, 1]."""
        blank = self.with_class(self.mask_token.expand(e.shape[0], self.places, -1))              # a place for each patch
        tokens = self.decoder_embed(e) + self.latent_token_positional_embedding
        text = self.text_guidance_proj(guide) + self.text_guidance_positional_embedding
        h = self.ln_post(self.through(blank, tokens, text)[:, 1 : 1 + self.places])           # (B, places, width)
        h = self.to_patch(h).unflatten(1, (self.grid, self.grid)).unflatten(-1, (self.patch, self.patch, -1))
        return self.conv_out(h.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3))            # (B, C, H, W)


class TATiTok(TokenCoder):
    """MaskGen's tokenizer: L learned queries collect the image into tokens; the decoder, told the prompt, spreads them.

    enc and dec are (width, depth, heads).
    """

    def __init__(self, V=8192, L=128, size=256, patch=16, embed=64, enc=(768, 12, 12), dec=(1024, 24, 16), text=77,
                 text_width=768, channels=3):
        super().__init__()
        self.V, places = V, (size // patch) ** 2
        self.latent_tokens = nn.Parameter(0.02 * torch.randn(L, enc[0]))
        self.encoder = TiTokEncoder(channels, patch, *enc, places, L, embed)
        self.codebook = nn.Embedding(V, embed)
        self.decoder = TiTokDecoder(channels, patch, *dec, places, L, embed, text, text_width)

    def latents(self, img):
        return self.encoder(img, self.latent_tokens)                                          # (B, L, embed)

    def encode(self, img):
        return self.nearest(self.latents(img))[..., None]                                     # (B, L, 1)

    def pixels(self, e, cond):
        return self.decoder(e, cond[-1])

    published_names = renames("""
        .transformer.*.ln_1.            .transformer.*.norm1.      .transformer.*.ln_2.       .transformer.*.norm2.
        .transformer.*.attn.in_proj_    .transformer.*.attn.qkv.   .transformer.*.mlp.c_fc.   .transformer.*.mlp.0.
        .transformer.*.attn.out_proj.   .transformer.*.attn.out.   .transformer.*.mlp.c_proj. .transformer.*.mlp.3.
        decoder.ffn.0.                  decoder.to_patch.          quantize.embedding.        codebook.
    """)
    published_extras = r"quantize\.embed_prob$"


# ============================================================================================ text towers
class TextTower(nn.Module):
    """The text half of a CLIP, by open_clip's own class: token ids (B, context) -> what text teachers read.

    meissonic: ViT-H-14's shape, its own weights; "!" is its tokenizer's padding token (pads_with_bang).
    maskgen: ViT-L-14-336. OpenAI trained with quick_gelu; which one MaskGen was trained with its code leaves open
    (before open_clip 2.29 the quick one): --text_activation, to be settled by --check with images and captions.
    """

    def __init__(self, width=1024, heads=16, depth=24, out=1024, vocab=49408, context=77, quick_gelu=False,
                 pads_with_bang=False):
        super().__init__()
        try:
            from open_clip.transformer import QuickGELU, TextTransformer
        except ImportError:
            raise UserError("text teachers read prompts by open_clip: pip install open_clip_torch")
        self.context, self.vocab, self.pads_with_bang = context, vocab, pads_with_bang
        self.tower = TextTransformer(context, vocab, width, heads, depth, output_dim=out,
                                     act_layer=QuickGELU if quick_gelu else nn.GELU)

    def tokenize(self, prompts):
        return clip_ids(prompts, self.context, self.vocab, self.pads_with_bang)

    @torch.no_grad()
    def forward(self, ids):
        """States before the last block and after the final norm (B, S, width), pooled text (B, out), in float32."""
        with torch.autocast(ids.device.type, enabled=False):
            h = self.tower.token_embedding(ids) + self.tower.positional_embedding[: ids.shape[1]]
            causal = torch.full((ids.shape[1],) * 2, -math.inf, device=ids.device).triu(1)
            for block in self.tower.transformer.resblocks:
                states, h = h, block(h, attn_mask=causal)
            final = self.tower.ln_final(h)
            end = final[torch.arange(ids.shape[0], device=ids.device), ids.argmax(-1)]            # the largest id ends it
            return states, final, end @ self.tower.text_projection                            # not normalised

    published_names = renames("""
        text_model.embeddings.token_embedding.            token_embedding.
        text_model.embeddings.position_embedding.weight   positional_embedding
        text_model.encoder.layers.*.layer_norm1.          transformer.resblocks.*.ln_1.
        text_model.encoder.layers.*.layer_norm2.          transformer.resblocks.*.ln_2.
        text_model.encoder.layers.*.self_attn.q_proj.     transformer.resblocks.*.attn.in_proj_#0
        text_model.encoder.layers.*.self_attn.k_proj.     transformer.resblocks.*.attn.in_proj_#1
        text_model.encoder.layers.*.self_attn.v_proj.     transformer.resblocks.*.attn.in_proj_#2
        text_model.encoder.layers.*.self_attn.out_proj.   transformer.resblocks.*.attn.out_proj.
        text_model.encoder.layers.*.mlp.fc1.              transformer.resblocks.*.mlp.c_fc.
        text_model.encoder.layers.*.mlp.fc2.              transformer.resblocks.*.mlp.c_proj.
        text_model.final_layer_norm.                      ln_final.
        text_projection.weight                            text_projection^T
        token_embedding. tower.token_embedding.    positional_embedding tower.positional_embedding
        transformer.     tower.transformer.        text_projection      tower.text_projection
        ln_final.        tower.ln_final.
    """)                                                          # first transformers' names made open_clip's
    published_extras = (r"visual|vision_model|logit_scale$|logit_bias$|input_resolution$|context_length$|vocab_size$"
                        r"|attn_mask$|text_model\.embeddings\.position_ids$")


def clip_ids(prompts, context, V, pads_with_bang=False):
    """A list of prompts -> CLIP's token ids (n, context): start, byte pairs, end, then zeros; long prompts are cut.

    pads_with_bang: every "!" is the padding token, id 0, and splits the prompt (Meissonic's tokenizer). # choice: in a
    tiny world's vocabulary, V below CLIP's 49,408, the pairs are folded, and the last two entries are start and end.
    """
    bpe, ids = byte_pairs(), torch.zeros(len(prompts), context, dtype=torch.int32)
    for row, prompt in zip(ids, prompts):
        body = []
        for i, piece in enumerate(prompt.split("!") if pads_with_bang else [prompt]):
            body += [0] * (i > 0) + bpe.encode(piece)
        body = [V - 2, *(i % (V - 2) for i in body[: context - 2]), V - 1]
        row[: len(body)] = torch.tensor(body)
    return ids


@functools.cache
def byte_pairs():
    from open_clip.tokenizer import SimpleTokenizer
    return SimpleTokenizer()


# ========================================================================================= the samplers
# All four teachers sample alike: guess every masked token, keep the guesses one is surest of, mask the rest again.
# They differ in numbers that change from step to step, so a sampler is a *plan*: a table with a row for each step.
class Step(NamedTuple):
    w: float                # guidance u + w (c - u)
    divide: float           # softmax temperature: guided logits are divided by it
    noise: float            # scale of the Gumbel noise on the confidence
    hidden: int             # units masked again afterwards, those of least confidence; 0 ends it
    draw: float = 1.0       # temperature of the draw, on top of `divide`; 0 is argmax
    by_logit: bool = False  # confidence is the logit of the drawn token, else its log-probability


def hidden_counts(units, ratios):
    """Units left masked after each step: floor(units * ratio), one fewer at least, 1 at least; 0 at the end."""
    counts, hidden = [], units
    for ratio in ratios[:-1]:
        hidden = max(min(math.floor(units * ratio), hidden - 1), 1)
        counts.append(hidden)
    return [*counts, 0]


def schedule_ratio(q, schedule, floor=0.0):
    """Share of units masked at progress q in [0, 1]: the training schedule, `root` besides; a float32 tensor."""
    q = torch.as_tensor(q, dtype=torch.float32)
    falling = {"linear": 1 - q, "square": 1 - q**2, "root": 1 - q.sqrt()}                     # these fall with q
    return (falling[schedule] if schedule in falling else mask_ratio(q, schedule)).clamp(floor, 1)


def maskbit_plan(units, N, guidance=0.0, temperature=0.0, scale_pow=3.0, annealing="cosine", schedule="arccos",
                 softmax_temperature=1.0):
    """guidance G: c + s (c - u), so w = 1 + s, where s rises as G (1 - cos(pi (i/N)^scale_pow)) / 2; temperature T:
    noise T (1 - (i+1)/N)."""
    rise = {"cosine": lambda p: (1 - math.cos(math.pi * p**scale_pow)) / 2, "linear": lambda p: p,
            "none": lambda p: 1.0}[annealing]
    hidden = hidden_counts(units, [float(schedule_ratio((i + 1) / N, schedule, 1e-6)) for i in range(N)])
    return [Step(1 + guidance * rise(i / N), softmax_temperature, temperature * (1 - (i + 1) / N), k)
            for i, k in enumerate(hidden)]


def maskgit_plan(units, N, guidance=3.0, temperature=4.5, sm_temp=1.0, schedule="arccos"):
    """guidance G: u + (1 + G f) (c - u), f from 0 in the first step to 1 in the last; temperature: noise T (1 - f).

    sm_temp multiplies the logits. The schedule says how many tokens each step reveals (not how many it leaves).
    """
    v = schedule_ratio(torch.linspace(1, 0, N), schedule)
    reveal = (v / v.sum().clamp(min=1e-9) * units).round().clamp(min=1).int().tolist()        # half to even
    hidden = [max(units - sum(reveal[: i + 1]), 0) for i in range(N - 1)] + [0]
    f = [i / (N - 1) if N > 1 else 1.0 for i in range(N)]
    return [Step(1 + guidance * f[i], 1 / sm_temp, temperature * (1 - f[i]), hidden[i]) for i in range(N)]


def meissonic_plan(units, N, guidance=9.0, temperature=2.0, schedule="cosine"):
    """guidance: w itself, constant; temperature T: noise from T in the first step to 0 in the last."""
    hidden = hidden_counts(units, schedule_ratio((torch.arange(N) + 1) / N, schedule).tolist())
    return [Step(guidance, 1.0, noise, k) for noise, k in zip(torch.linspace(temperature, 0, N).tolist(), hidden)]


def maskgen_plan(units, N, guidance=12.0, temperature=2.0, scale_pow=1.0, annealing="cosine", schedule="arccos"):
    """guidance G: c + s (c - u), w = 1 + s, s from about 1 to G with r = (i+1)/N; temperature T: both the draw's and
    the confidence's, T (1 - r); the softmax's falls from 1.25 to 0.5, and confidence is the logit itself."""
    rise = {"cosine": lambda r: 1 + (guidance - 1) * (1 - math.cos(math.pi * r**scale_pow)) / 2,
            "linear": lambda r: 1 + (guidance - 1) * r, "none": lambda r: guidance,
            "flippedcosine": lambda r: 1 + (guidance - 1) * math.cos(math.pi * r) / 2}[annealing]
    hidden = hidden_counts(units, [float(schedule_ratio((i + 1) / N, schedule)) for i in range(N)])
    rows = [((i + 1) / N, temperature * (1 - (i + 1) / N), k) for i, k in enumerate(hidden)]
    return [Step(1 + rise(r), 0.5 + 0.8 * (1 - r), T, k, draw=T, by_logit=True) for r, T, k in rows]


def gumbel(u):
    """Uniforms in [0, 1) -> standard Gumbel noise."""
    return -(-u.clamp(min=1e-20).log()).clamp(min=1e-20).log()


@torch.no_grad()
def sample(net, cond, plan, *, x=None, order=None, draws=None, draw=sample_tokens, trace=None):
    """The multi-step sampler: tokens (B, L, G) after the steps of `plan`; a mask that MaskGit drew becomes token V-1.

    x are tokens to start from, V where there is none yet; by default all masked. order (L, G), if given, takes the
    place of confidence: units of low rank are kept first (`halton_order`). draws(i) gives two uniforms (B, L, G) for
    step i, one for draw(z, temperature, u), one for the noise on the confidence. trace, a list, receives the tokens
    that entered each step.
    """
    E, bias = net.tables()
    x = torch.full((len(cond[0]), net.L, net.G), net.V, device=E.device) if x is None else x
    masked = x == net.V
    for i, step in enumerate(plan):
        if trace is not None:
            trace.append(x.clone())
        e, now = embed_tokens(x, E, bias), net.at(cond, len(plan) - 1 - i)
        z = guided_logits(net, e, now, step.w).float() / step.divide                          # (B, L, G, V)
        u_token, u_noise = draws(i) if draws else torch.rand(2, *x.shape, device=x.device)
        drawn = torch.where(masked, draw(z, step.draw, u_token), x)
        if not step.hidden:
            return drawn.clamp(max=net.V - 1)
        score = (z if step.by_logit else z.log_softmax(-1)).gather(-1, drawn[..., None])[..., 0]
        confidence = score + step.noise * gumbel(u_noise) if order is None else -order.to(z).expand(x.shape)
        confidence = torch.where(masked, confidence, torch.inf)
        k = (masked.flatten(1).sum(1) - 1).clamp(1, step.hidden)                              # (B,), one fewer or less
        threshold = confidence.flatten(1).sort(1).values.gather(1, k[:, None] - 1)            # one ranking of all units
        masked = masked & (confidence <= threshold[:, None])
        x = torch.where(masked, net.V, drawn)


def halton_order(grid):
    """Ranks (L, 1) of a (rows, columns) grid's cells: when a 2-D Halton sequence (bases 2 and 3) first visits each.

    It spreads the tokens of one step evenly over the image, so that they depend on each other least (Besnier et al.
    2025): the training-free baseline of Tab. 2. The first point is (1/2, 1/3).
    """
    from scipy.stats import qmc
    (rows, columns), cells = grid, grid[0] * grid[1]
    points = qmc.Halton(2, scramble=False).fast_forward(1).random(100 * cells)                # (n, 2) in [0, 1)
    visited = dict.fromkeys(int(y * rows) * columns + int(x * columns) for y, x in points)    # keeps the first visits
    if len(visited) < cells:
        raise ValueError(f"a Halton sequence of {len(points)} points misses cells of a {rows} x {columns} grid")
    return torch.tensor(list(visited)).argsort()[:, None]


@torch.no_grad()
def decode_tokens(tokenizer, x, cond=()):
    """Tokens (B, L, G) -> images (B, C, H, W) in [0, 1]."""
    if int(x.max()) >= tokenizer.V:
        raise ValueError(f"expected tokens below V = {tokenizer.V}, got {int(x.max())}: unmask before decoding")
    return tokenizer.decode(embed_tokens(x, *tokenizer.tables()), cond)


# =============================================================================================== loading
FLAGS = {"net": "--teacher_weights", "tokenizer": "--tokenizer_weights", "text": "--text_weights"}


def source(spec, role, path=None):
    """The path of a role's weights: as given, else the published file."""
    if path is None and role not in spec.files:
        raise UserError(f"{spec.name} has no published weights, it is there to try the code: add --random_weights, or "
                        f"name a file of your own by {FLAGS[role]} PATH")
    return path or fetch(*spec.files[role], FLAGS[role])


def build(spec, role, path=None, random_weights=False, text_activation=None):
    """The network of a role, net, tokenizer or text, with random weights or those of `path` or the published file."""
    make = {"net": spec.Net, "tokenizer": spec.Tokenizer, "text": TextTower}[role]
    sizes = dict(getattr(spec, role))
    if role == "text" and text_activation:
        sizes["quick_gelu"] = text_activation == "quick_gelu"
    if random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)                      # random weights are the same in every process and every run
            return make(**sizes)
    path = source(spec, role, path)
    config = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    if names := getattr(make, "published_config", None):          # a config.json beside the weights knows better
        sizes |= stated_sizes(config, names)
    with torch.device("meta"):                        # no time lost on initial values
        module = make(**sizes)
    return load_state(module.to_empty(device="cpu"), read_weights(path, role), path)


def check_device(device):
    """Complain of --device cuda where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable GPU; take --device cpu")


def stated_sizes(path, names):
    """What a published config.json (nested dicts) states, as our arguments: head counts are seen nowhere else."""
    def leaves(d):
        for k, v in d.items():
            yield from leaves(v) if isinstance(v, dict) else [(k, v)]
    if not os.path.isfile(path):
        return {}
    try:
        with open(path) as f:
            return {names[k]: v for k, v in leaves(json.load(f)) if k in names}
    except (ValueError, AttributeError) as err:
        raise UserError(f"cannot read {path} beside the weights ({err}): fetch it again, or remove it")


def load_teacher(name, teacher_weights=None, tokenizer_weights=None, random_weights=False, device="cpu",
                 text_weights=None, text_activation=None):
    """The frozen teacher called `name`, in eval mode: a Teacher(net, tokenizer, spec, text).

    Weights come from the given paths, else from `spec.files` (assets, or the hub); random_weights needs no file.
    text_activation: "gelu" or "quick_gelu", instead of the spec's.
    """
    if name not in SPECS:
        raise UserError(f"unknown teacher {name!r}: expected one of {', '.join(SPECS)}")
    spec, paths = SPECS[name], {"net": teacher_weights, "tokenizer": tokenizer_weights, "text": text_weights}
    for role in spec.roles:                           # complain before anything large is read
        random_weights or source(spec, role, paths[role])
    return assemble(spec, {role: build(spec, role, paths[role], random_weights, text_activation)
                           for role in spec.roles}, device)


def assemble(spec, modules, device="cpu"):
    """Networks by role -> the frozen Teacher on its device, with the unconditional condition prepared."""
    if isinstance(modules["tokenizer"].encoder, Encoder):
        modules["tokenizer"].to(memory_format=torch.channels_last)                            # a tenth faster
    teacher = Teacher(spec=spec, **{k: m.to(device).eval().requires_grad_(False) for k, m in modules.items()})
    if teacher.text is not None:
        teacher.net.null_text, teacher.net.null_pooled = teacher.cond(teacher.conditions([spec.negative]))[:2]
    return teacher


def load_student(path, name=None, device="cpu", **files):
    """A one-step generator from a file: (teacher, net, config), the net in eval mode.

    A checkpoint of train.py says in its config which teacher it has and how it starts, and its EMA weights are
    taken; config is {} for a bare state dict (an official Di[M]O student, a theta_0), which needs the teacher's name.
    files: the arguments of `load_teacher`, over those of the config.
    """
    state = read_weights(local(path))
    config = state.get("config", {}) if isinstance(state, dict) else {}
    if "ema" in state:
        state = state["ema"]
    name = config.get("teacher", name)
    if name is None:
        raise UserError(f"{path} is a bare state dict and does not name its teacher: add --teacher NAME")
    files = {k: files.get(k) or config.get(k) for k in ("teacher_weights", "tokenizer_weights", "random_weights",
                                                        "text_weights", "text_activation")}
    teacher = load_teacher(name, device=device, **files)
    net = copy.deepcopy(teacher.net)
    return teacher, load_state(net, state, path).eval().requires_grad_(False), config


# ============================================================================================ the teachers
QUALITY = ("worst quality, low quality, low res, blurry, distortion, watermark, logo, signature, text, "
           "jpeg artifacts, signature, sketch, duplicate, ugly, identifying mark")
MASKGIT, MEISSONIC = "llvictorll/Maskgit-pytorch", "MeissonFlow/Meissonic"
VQGAN_FILE = (MASKGIT, "pretrained_maskgit/VQGAN/last.ckpt")
MEISSONIC_VQ = dict(widths=(128, 256, 256, 512, 768), latent=64, embed=64, V=8192, attention=(), signed=False)
CLIP_L_336 = dict(width=768, heads=12, depth=12, out=768, quick_gelu=True)
MASKGEN_FILES = {"tokenizer": ("turkeyju/tokenizer_tatitok_bl128_vq", "model.safetensors"),
                 "text": ("timm/vit_large_patch14_clip_336.openai", "open_clip_model.safetensors")}
TINY_VQ = dict(widths=(16, 32, 32), blocks=1, latent=8, embed=8, V=64, norm_groups=8)
TINY_TEXT = dict(width=32, heads=2, depth=2, context=16)
SHAPES_CLIP = dict(embed_dim=128, vision_cfg=dict(image_size=32, patch_size=4, width=96, layers=3, head_width=32),
                   text_cfg=dict(context_length=16, vocab_size=341, width=64, heads=2, layers=3))
SHAPES_REWARD = dict(size=32, patch=4, vision=(64, 4, 2), text=(64, 2, 2), mlp=256, vocab=33, positions=16, head=(32, 16))

SPECS = {spec.name: spec for spec in (
    Spec("maskbit", MaskBit, dict(classes=1000), BitTokenizer, {}, maskbit_plan,
         {256: dict(guidance=5.8, temperature=10.3), 128: dict(guidance=7.1, temperature=9.0),
          64: dict(guidance=7.1, temperature=7.8)},
         image=(3, 256, 256), student=dict(init_ratio=0.6, noise=0.1, temperature=0.1),
         files={"net": ("markweber/maskbit_generator_14bit", "maskbit_generator_14bit.bin"),
                "tokenizer": ("markweber/maskbit_tokenizer_14bit", "maskbit_tokenizer_14bit.bin")}),
    Spec("maskgit", MaskGit, dict(classes=1000), VQTokenizer, {}, maskgit_plan,
         {8: dict(guidance=3.0, temperature=4.5)}, rounds=True, noise_scale=1.0,
         image=(3, 256, 256), student=dict(init_ratio=0.6, noise=0.1, temperature=12.0),
         files={"net": (MASKGIT, "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth"), "tokenizer": VQGAN_FILE}),
    Spec("maskgit-512", MaskGit, dict(classes=1000, grid=32), VQTokenizer, {}, maskgit_plan,
         {15: dict(guidance=2.8, temperature=7.0)}, rounds=True, noise_scale=1.0,
         image=(3, 512, 512), student=dict(init_ratio=0.6, noise=0.1, temperature=12.0),
         files={"net": (MASKGIT, "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_512.pth"), "tokenizer": VQGAN_FILE}),
    Spec("meissonic", Meissonic, {}, VQTokenizer, MEISSONIC_VQ, meissonic_plan,
         {64: dict(guidance=9.0, temperature=2.0)}, rounds=True, noise_scale=1.0,
         image=(3, 1024, 1024), student=dict(init_ratio=0.6, noise=0.3, temperature=0.5),
         text=dict(pads_with_bang=True), negative=QUALITY,
         files={"net": (MEISSONIC, "transformer/diffusion_pytorch_model.safetensors"),
                "tokenizer": (MEISSONIC, "vqvae/diffusion_pytorch_model.safetensors"),
                "text": (MEISSONIC, "text_encoder/model.safetensors")}),
    Spec("maskgen", MaskGen, {}, TATiTok, {}, maskgen_plan, {16: dict(guidance=12.0, temperature=2.0)},
         image=(3, 256, 256), student=dict(init_ratio=0.9, noise=0.1, temperature=1.0), text=CLIP_L_336,
         files={"net": ("turkeyju/generator_maskgen_vq_l", "model.safetensors"), **MASKGEN_FILES}),
    Spec("maskgen-xl", MaskGen, dict(width=1280, depth=20), TATiTok, {}, maskgen_plan,
         {16: dict(guidance=12.0, temperature=2.0)},
         image=(3, 256, 256), student=dict(init_ratio=0.9, noise=0.1, temperature=1.0), text=CLIP_L_336,
         files={"net": ("turkeyju/generator_maskgen_vq_xl", "model.safetensors"), **MASKGEN_FILES}),
    # The tiny ones. maskbit-tiny knows clothes (README, "The tiny world"); the others have no weights, for trying code.
    Spec("maskbit-tiny", MaskBit, dict(bits=10, grid=8, width=128, depth=4, heads=4, mlp=512, classes=10),
         BitTokenizer, dict(channels=1, hidden=32, mult=(1, 2, 2), blocks=1, bits=10, norm_groups=8), maskbit_plan,
         {16: dict(guidance=5.0, temperature=11.0)},
         image=(1, 32, 32), student=dict(init_ratio=0.6, noise=0.1, temperature=1.0),
         record="assets/fashion/teacher_steps.jsonl",
         files={"net": (None, "assets/fashion/teacher.safetensors"),
                "tokenizer": (None, "assets/fashion/tokenizer.safetensors")}),
    Spec("maskgit-tiny", MaskGit, dict(V=64, grid=8, width=64, depth=4, heads=4, mlp=128, classes=10),
         VQTokenizer, dict(TINY_VQ, attention=(2,)), maskgit_plan, {4: dict(guidance=3.0, temperature=4.5)},
         image=(3, 32, 32), student=dict(init_ratio=0.6, noise=0.1, temperature=1.0), rounds=True, noise_scale=1.0),
    Spec("meissonic-tiny", Meissonic,
         dict(V=512, table=520, grid=8, heads=4, head_width=32, joint=2, single=3, text_width=64, axes=(8, 12, 12),
              micro=(32, 32, 0, 0, 6.0)),
         VQTokenizer, dict(widths=(32, 64, 64), blocks=1, latent=16, embed=16, V=512, norm_groups=8, attention=(),
                           signed=False), meissonic_plan,
         {32: dict(guidance=2.5, temperature=2.0)}, rounds=True, noise_scale=1.0,
         image=(3, 32, 32), student=dict(init_ratio=0.985, noise=0.1, temperature=0.3),
         text=dict(width=64, heads=2, depth=3, out=128, vocab=341, context=16, pads_with_bang=True),
         files={"net": (None, "assets/shapes/teacher.safetensors"), "text": (None, "assets/shapes/clip.safetensors"),
                "tokenizer": (None, "assets/shapes/tokenizer.safetensors")},
         prompts="assets/shapes/prompts.txt", bert_vocab="assets/shapes/words.txt",
         rewards={"clip": ("assets/shapes/clip.safetensors", SHAPES_CLIP),
                  "imagereward": ("assets/shapes/imagereward.safetensors", SHAPES_REWARD)}),
    Spec("maskgen-tiny", MaskGen, dict(V=64, L=16, width=64, depth=3, heads=4, text_width=32, micro=16, spare=11),
         TATiTok, dict(V=64, L=16, size=32, patch=8, embed=8, enc=(32, 2, 2), dec=(48, 2, 4), text=16, text_width=32),
         maskgen_plan, {4: dict(guidance=12.0, temperature=2.0)},
         image=(3, 32, 32), student=dict(init_ratio=0.9, noise=0.1, temperature=1.0),
         text=dict(TINY_TEXT, out=32, quick_gelu=True)),
)}


# ============================================================================= --check: are the weights right?
def real_images(folder, spec, n):
    """n images spread over a folder, uint8 (n, C, H, W), and their conditions: labels, or prompts.

    Classes are subfolders, as for data/imagenet.py; a prompt is the text file beside an image, NAME.txt.
    """
    from data.imagenet import SUFFIXES, list_images, variants
    if spec.text is None:
        _, names, what = list_images(folder)
    else:
        if not os.path.isdir(folder):
            raise UserError(f"--images {folder}: no such folder")
        names = sorted(f for f in os.listdir(folder) if f.lower().endswith(SUFFIXES)
                       and os.path.isfile(os.path.join(folder, os.path.splitext(f)[0] + ".txt")))
        if not names:
            raise UserError(f"--images {folder}: expected images, each with its prompt in a text file of its name")
        what = [open(os.path.join(folder, os.path.splitext(f)[0] + ".txt")).read().strip() for f in names]
    some = [i * len(names) // n for i in range(n)] if n < len(names) else range(len(names))
    img = [variants(os.path.join(folder, names[i]), i, spec.image, False, 0, 0) for i in some]
    if bad := [names[i] + ": " + v for i, v in zip(some, img) if isinstance(v, str)]:
        raise UserError(f"--images {folder}: cannot read {bad[0]}")
    return torch.stack([torch.from_numpy(v[0]) for v in img]), [what[i] for i in some]


@torch.no_grad()
def knows(teacher, img, what, batch=8, ratio=0.5):
    """What right weights do well, on uint8 images: reconstruction in dB; nats a masked token, half of them masked.

    `null` is without the condition, `uniform` what a network that knows nothing would pay.
    """
    net, tokenizer, spec, _ = teacher
    (E, bias), device = net.tables(), next(net.parameters()).device
    rows = torch.tensor(what, device=device) if spec.text is None else teacher.conditions(what)
    gen, error, nats = torch.Generator().manual_seed(0), 0.0, torch.zeros(2)
    for part, row in zip(img.split(batch), rows.split(batch)):
        cond, part = teacher.cond(row), part.to(device).float() / 255
        x = tokenizer.encode(part)                                                            # (B, L, G)
        error += (decode_tokens(tokenizer, x, cond) - part).square().sum().item()
        mask = exact_mask(ratio, torch.rand(x.shape, generator=gen)).to(device)
        e = embed_tokens(x.masked_fill(mask, net.V), E, bias)
        for i, c in enumerate((cond, net.null(cond))):
            nats[i] += F.cross_entropy(net(e, c)[mask], x[mask]).item() * len(part) / len(img)
    return {"psnr": -10 * math.log10(error / img.numel()), "nats": nats[0].item(), "nats_null": nats[1].item(),
            "nats_uniform": math.log(net.V), "images": len(img)}


def check(args):
    """Report on a teacher's files: found, fitting, how large, and what they know of real images."""
    if args.n < 1:
        raise UserError(f"--n {args.n}: expected 1 image or more")
    check_device(args.device)
    spec, modules = SPECS[args.check], {}
    for role, path in zip(spec.roles, (args.teacher_weights, args.tokenizer_weights, args.text_weights)):
        try:
            modules[role] = build(spec, role, path, args.random_weights, args.text_activation)
            m, state = modules[role], modules[role].state_dict()
            where = "random weights" if args.random_weights else source(spec, role, path)
            finite = all(torch.isfinite(t).all() for t in state.values())
            print(f"{role:9s}  ok   {where}: {type(m).__name__}, {len(state)} tensors, "
                  f"{sum(p.numel() for p in m.parameters()):,} parameters, all finite: {'yes' if finite else 'NO'}")
        except UserError as err:
            print(f"{role:9s}  NOT  {err}")
    if len(modules) < len(spec.roles):
        raise UserError(f"{spec.name} is not complete: see the lines above")
    if args.images:
        found = knows(assemble(spec, modules, args.device), *real_images(args.images, spec, args.n))
        print("on {images} real images: reconstruction {psnr:.2f} dB; {nats:.3f} nats a masked token, {nats_null:.3f} "
              "without the condition, {nats_uniform:.3f} for a guess".format(**found))
        print(json.dumps({"teacher": spec.name, **found}))


def flags():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--check", required=True, metavar="NAME", choices=SPECS, help=f"one of {', '.join(SPECS)}")
    ap.add_argument("--teacher_weights", metavar="PATH", help="local file or folder instead of the published one")
    ap.add_argument("--tokenizer_weights", metavar="PATH", help="likewise")
    ap.add_argument("--text_weights", metavar="PATH", help="likewise")
    ap.add_argument("--text_activation", choices=["gelu", "quick_gelu"], help="of the text encoder")
    ap.add_argument("--random_weights", action="store_true", help="no files at all: to see sizes")
    ap.add_argument("--images", metavar="FOLDER", help="real images: a subfolder a class, or with NAME.txt prompts")
    ap.add_argument("--n", type=int, default=64, help="how many of them (%(default)s)")
    ap.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    return ap


if __name__ == "__main__":
    ap = flags()
    try:
        check(ap.parse_args())
    except UserError as err:
        ap.exit(2, f"teachers.py: {err}\n")
