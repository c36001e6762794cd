"""The teachers: masked diffusion models (MDMs) over image tokens, their tokenizers, and their multi-step samplers.

Everything else in this repository sees a teacher through one small interface, and never asks which one it has:

    net.tables()              E (G, V+1, d) and a bias: every teacher embeds tokens by a sum of table rows, so one
                              soft embedding (Eq. 3) serves them all; row V is the mask
    net(e, cond, layers=())   embeddings e (B, L, d) and a condition -> logits z (B, L, G, V), and on request the
                              outputs of some layers, (B, L, width) each, for the discriminator
    net.null(cond)            the unconditional condition, for guidance u + w (c - u)
    net.frozen()              the parameters of the embedding layer, fixed during distillation (App. H.1)
    tokenizer.encode(img)     images (B, C, H, W) in [0, 1] -> tokens (B, L, G)
    tokenizer.tables()        the decoder's table, for Emb_Dec (Eq. 9)
    tokenizer.decode(e)       decoder embeddings (B, L, d_dec) -> images in [0, 1]
    spec                      name, sizes, grid, classes, sampling, published files

A condition is a tuple of tensors, batch first: `(labels,)` for a class, the text encoder's outputs for a prompt.
`spec.grid` is the side of the token grid, or None where tokens have no place in the image (MaskGen).
Student, auxiliary and EMA are further instances of the teacher's `net`.

    python teachers.py --train_tokenizer    # make the tiny world's tokenizer from photographs (README, "The tiny world")
    python teachers.py --train_mdm          # and the tiny teacher from its tokens
"""

import argparse
import json
import math
import os
import re
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from dimo import mask_ratio
from soft_embed import embed_tokens, sample_tokens

HERE = os.path.dirname(os.path.abspath(__file__))


class UserError(Exception):
    """Something the user can mend. Scripts print its sentence and exit with 2, without a stack trace."""


@dataclass
class Spec:
    """What a teacher says of itself. Sizes are constructor arguments; files are (hub repository, file name)."""

    name: str
    net: dict                     # arguments of MaskBit
    tokenizer: dict               # arguments of BitTokenizer
    sampling: dict                # {steps: arguments of `sample`}; other numbers of steps take the nearest entry's
    image: tuple                  # (C, H, W)
    files: dict = field(default_factory=dict)
    record: str = ""              # evaluations of the teacher that ship with it, JSON lines
    noise_scale: float | None = None  # unit of the embedding perturbation; None: the table's root mean square

    @property
    def grid(self):
        return self.net["grid"]

    @property
    def classes(self):
        return self.net["classes"]

    def sampling_for(self, steps):
        return self.sampling[min(self.sampling, key=lambda n: abs(math.log(n / steps)))]


class Teacher(NamedTuple):
    net: nn.Module
    tokenizer: nn.Module
    spec: Spec

    def noise_unit(self):
        """What the embedding perturbation's noise is measured in: MaskGit's table has unit entries, MaskBit's small ones.

        # choice: the root mean square of the table, where a spec does not say; the paper is silent.
        """
        return self.spec.noise_scale or self.net.tables()[0][:, : self.net.V].square().mean().sqrt().item()


# ======================================================================================= shared blocks
class Attention(nn.Module):
    """Multi-head self-attention, packed qkv (the rows of `qkv` are q, k, v), fused kernel. x (B, T, D)."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, T, D/heads)
        dropout = self.dropout if self.training else 0.0
        if x.device.type == "cpu":    # torch's fused CPU kernel halves the speed of a training step at short lengths
            p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            y = F.dropout(p, dropout) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


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


def bits_of(t, n):
    """The n bits of integers t, least significant first, as -1 / +1 floats: (...) -> (..., n)."""
    return (t[..., None] >> torch.arange(n, device=t.device) & 1).float() * 2 - 1


# =============================================================================================== MaskBit
# Weber et al. 2024. A token is its bits. The tokenizer's latent is the sign of `bits` channels; the generator reads
# the very same +-1 numbers through one linear layer, so there is no embedding table to learn, and none for the mask:
# a masked group of bits is all zeros. Bits are split into G = 2 groups, each predicted by a softmax over 2^(bits/G)
# entries, and each masked on its own.
#
#                      bits  groups   V   grid  width  layers  heads  parameters
#     maskbit           14      2    128  16x16  1024     24     16   304,929,024 + 54,489,489 (tokenizer)
#     maskbit-tiny      10      2     32   8x8    128      4      4   0.8 + 0.6 million, the same classes
#
# Guidance: published samplers write c + s (c - u); here it is u + w (c - u), so w = 1 + s.
class MaskBit(nn.Module):
    """MaskBit's bit-token generator: e (B, L, d) and labels (B,) -> logits z (B, L, G, V), at every position."""

    def __init__(self, bits=14, groups=2, grid=16, width=1024, depth=24, heads=16, mlp=4096, classes=1000, dropout=0.0):
        super().__init__()
        self.bits, self.G, self.V, self.L = bits, groups, 2 ** (bits // groups), grid**2
        self.width, self.depth, self.classes = width, depth, classes
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
        return torch.einsum("vn,dgn->gvd", B, W), self.input_proj.bias

    def forward(self, e, cond, layers=()):
        h = torch.cat([e, self.class_emb(cond[0])[:, None]], 1) + self.pos_emb                # (B, L+1, width)
        h = self.drop(self.norm_in(h))
        features = []
        for i, block in enumerate(self.blocks):
            h = block(h)
            if i in layers:
                features.append(h[:, : self.L])                                               # (B, L, width)
                if len(features) == len(layers) and i == max(layers):
                    return features                           # the discriminator needs no deeper layer and no logits
        h = self.head(h[:, : self.L])
        with torch.autocast(h.device.type, enabled=False):    # float32: Eq. 2 takes differences of log-probabilities
            z = F.linear(h.float(), self.to_logits.weight.float(), self.to_logits.bias.float())
        return z.view(*z.shape[:2], self.G, self.V)                                           # (B, L, G, V)

    def null(self, cond):
        return (torch.full_like(cond[0], self.classes),)

    def set_dropout(self, p):
        """Dropout everywhere it was trained with: after the embedding, on attention weights, on both residuals."""
        for m in self.modules():
            if isinstance(m, nn.Dropout):
                m.p = p
            if isinstance(m, Attention):
                m.dropout = p
        return self

    def frozen(self):
        """# choice: input projection, class and position tables, as the official code freezes MaskGit's tables."""
        return [*self.input_proj.parameters(), self.class_emb.weight, self.pos_emb]

    published_names = [  # (pattern in the published file, name here)
        (r"^token_emb\.", "input_proj."),                                  # the file's older alias
        (r"^transformer\.layers\.(\d+)\.0\.mha\.in_proj_", r"blocks.\1.attn.qkv."),
        (r"^transformer\.layers\.(\d+)\.0\.mha\.out_proj\.", r"blocks.\1.attn.out."),
        (r"^transformer\.layers\.(\d+)\.0\.norm\.", r"blocks.\1.norm1."),
        (r"^transformer\.layers\.(\d+)\.1\.net\.", r"blocks.\1.mlp."),
        (r"^transformer\.layers\.(\d+)\.1\.norm\.", r"blocks.\1.norm2."),
        (r"^first_layer\.0\.", "norm_in."),
        (r"^last_layer\.", "head."),
        (r"^prediction_layer\.", "to_logits."),
    ]
    published_extras = {"bits_to_indices"}


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: at stride 2 the odd pixel is padded right and below."""

    def forward(self, x):
        pad = [max((math.ceil(n / s) - 1) * s + k - n, 0)                                     # height, width
               for n, k, s in zip(x.shape[2:], self.kernel_size, self.stride)]
        if any(p % 2 for p in pad):
            (top, left), (bottom, right) = (p // 2 for p in pad), (p - p // 2 for p in pad)
            x, pad = F.pad(x, (left, right, top, bottom)), (0, 0)
        return F.conv2d(x, self.weight, self.bias, self.stride, [p // 2 for p in pad])


class BitResBlock(nn.Module):
    """Residual block; where the width changes there is no skip: nin_shortcut acts on h, and so it was trained."""

    def __init__(self, c_in, c_out, norm_groups):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(norm_groups, c_in, eps=1e-6), nn.GroupNorm(norm_groups, c_out, eps=1e-6)
        self.conv1, self.conv2 = SameConv(c_in, c_out, 3, bias=False), SameConv(c_out, c_out, 3, bias=False)
        self.nin_shortcut = SameConv(c_out, c_out, 1, bias=False) if c_in != c_out else None

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class Level(nn.Module):
    """Some residual blocks of one resolution, and the step to the next: down_conv, upsample_conv, or neither."""

    def __init__(self, c_in, c_out, blocks, norm_groups, step=None):
        super().__init__()
        widths = [c_in] + [c_out] * blocks
        self.res_blocks = nn.ModuleList(BitResBlock(a, b, norm_groups) for a, b in zip(widths, widths[1:]))
        if step == "down":
            self.down_conv = SameConv(c_out, c_out, 3, stride=2)
        if step == "up":
            self.upsample_conv = SameConv(c_out, c_out, 3)

    def forward(self, h):
        for block in self.res_blocks:
            h = block(h)
        if hasattr(self, "down_conv"):
            h = self.down_conv(h)
        if hasattr(self, "upsample_conv"):
            h = self.upsample_conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return h


class BitEncoder(nn.Module):
    def __init__(self, channels, hidden, mult, blocks, bits, norm_groups):
        super().__init__()
        w = [hidden * m for m in (1, *mult)]
        self.conv_in = SameConv(channels, hidden, 3, bias=False)
        self.down = nn.ModuleList(Level(w[i], w[i + 1], blocks, norm_groups, "down" if i < len(mult) - 1 else None)
                                  for i in range(len(mult)))
        self.mid = Level(w[-1], w[-1], blocks, norm_groups)
        self.norm_out, self.conv_out = nn.GroupNorm(norm_groups, w[-1], eps=1e-6), SameConv(w[-1], bits, 1)

    def forward(self, img):
        h = self.conv_in(img)
        for level in (*self.down, self.mid):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))                                        # (B, bits, h, w)


class BitDecoder(nn.Module):
    def __init__(self, channels, hidden, mult, blocks, bits, norm_groups):
        super().__init__()
        w = [hidden * m for m in reversed((*mult, mult[-1]))]                                 # coarse to fine
        self.conv_in = SameConv(bits, w[0], 3)
        self.mid = Level(w[0], w[0], blocks, norm_groups)
        self.up = nn.ModuleList(Level(w[i], w[i + 1], blocks, norm_groups, "up" if i < len(mult) - 1 else None)
                                for i in range(len(mult)))
        self.norm_out, self.conv_out = nn.GroupNorm(norm_groups, w[-1], eps=1e-6), SameConv(w[-1], channels, 3)

    def forward(self, z):
        h = self.conv_in(z)
        for level in (self.mid, *self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))                                        # (B, C, H, W)


class BitTokenizer(nn.Module):
    """MaskBit's tokenizer: a convolutional autoencoder whose latent is the sign of `bits` channels, no codebook."""

    def __init__(self, channels=3, hidden=128, mult=(1, 1, 2, 2, 4), blocks=2, bits=14, groups=2, norm_groups=32):
        super().__init__()
        self.bits, self.G, self.V = bits, groups, 2 ** (bits // groups)
        self.encoder = BitEncoder(channels, hidden, mult, blocks, bits, norm_groups)
        self.decoder = BitDecoder(channels, hidden, mult, blocks, bits, norm_groups)

    def encode(self, img):
        """Images (B, C, H, W) in [0, 1] -> tokens (B, L, G), row-major; group 0 holds the low bits."""
        z = self.encoder(img).flatten(2).transpose(1, 2)                                      # (B, L, bits)
        bit = (z > 0).view(*z.shape[:2], self.G, -1).long()                                   # zero gives -1
        return (bit << torch.arange(bit.shape[-1], device=z.device)).sum(-1)                  # (B, L, G)

    def tables(self):
        """E (G, V+1, bits) of the decoder: the bits of an entry in its group's channels, zeros elsewhere; no bias."""
        n = self.bits // self.G
        E = next(self.parameters()).new_zeros(self.G, self.V + 1, self.bits)
        for g in range(self.G):
            E[g, : self.V, g * n : (g + 1) * n] = bits_of(torch.arange(self.V, device=E.device), n)
        return E, E.new_zeros(())

    def decode(self, e, clamp=True, chunk=None):
        """Decoder embeddings e (B, L, bits) -> images (B, C, H, W) in [0, 1], `chunk` images at a time."""
        chunk = chunk or (16 if e.device.type == "cpu" else 256)                              # 16 fit a CPU's cache
        side = math.isqrt(e.shape[1])
        z = e.transpose(1, 2).reshape(len(e), self.bits, side, side)
        img = torch.cat([self.decoder(part) for part in z.split(chunk)])
        return img.clamp(0, 1) if clamp else img

    published_extras = {"quantize.bits_to_indices", "quantize.codebook"}


# ========================================================================================== the sampler
@torch.no_grad()
def sample(net, cond, steps, *, guidance=0.0, temperature=0.0, scale_pow=3.0, annealing="cosine", schedule="arccos",
           softmax_temperature=1.0, draws=None, trace=None):
    """MaskBit's multi-step sampler: tokens (B, L, G) after `steps` rounds of draw, rank, and mask again.

    guidance is s of c + s (c - u), annealed over the steps as G (1 - cos(pi (i/N)^scale_pow)) / 2, or "linear", or
    "none". temperature scales the Gumbel noise on the confidence, which vanishes in the last step. draws(i) gives
    two uniforms (B, L, G) for step i: one decides the tokens, one the noise. trace, a list, receives the tokens that
    entered each step.
    """
    E, bias = net.tables()
    B, units = len(cond[0]), net.L * net.G
    x = torch.full((B, net.L, net.G), net.V, device=E.device)
    hidden = units                                                                            # masked units a sample
    both = tuple(torch.cat(pair) for pair in zip(cond, net.null(cond)))
    for i in range(steps):
        if trace is not None:
            trace.append(x.clone())
        q = (i + 1) / steps
        s = {"cosine": (1 - math.cos(math.pi * (i / steps) ** scale_pow)) / 2, "linear": i / steps, "none": 1.0}[annealing]
        e = embed_tokens(x, E, bias)
        if guidance:
            c, u = net(torch.cat([e, e]), both).chunk(2)
            z = c + guidance * s * (c - u)
        else:
            z = net(e, cond)
        u_token, u_noise = draws(i) if draws else torch.rand(2, *x.shape, device=x.device)
        masked = x == net.V
        drawn = torch.where(masked, sample_tokens(z, softmax_temperature, u_token), x)
        logp = (z.float() / softmax_temperature).log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        noise = -torch.log(-torch.log(u_noise.clamp(1e-20, 1 - 1e-7)))
        confidence = torch.where(masked, logp + temperature * (1 - q) * noise, torch.inf)
        hidden = min(max(math.floor(units * sampling_ratio(q, schedule)), 1), max(hidden - 1, 1))
        threshold = confidence.flatten(1).kthvalue(hidden, 1).values                          # all units in one ranking
        x = torch.where(confidence <= threshold[:, None, None], net.V, drawn)
    return drawn                                                   # the last re-masking is discarded


def sampling_ratio(q, schedule="arccos"):
    """Share of units masked after progress q in (0, 1]: the training schedule with a floor, and `root` besides."""
    if schedule == "root":
        return min(max(1 - math.sqrt(q), 1e-6), 1.0)
    if schedule in ("linear", "square"):                                                      # these fall with q
        return min(max(1 - q ** (1 if schedule == "linear" else 2), 1e-6), 1.0)
    return min(max(float(mask_ratio(torch.tensor(q, dtype=torch.float64), schedule)), 1e-6), 1.0)


@torch.no_grad()
def decode_tokens(tokenizer, x):
    """Tokens (B, L, G) -> images (B, C, H, W) in [0, 1]."""
    if int(x.max()) >= tokenizer.V:
        raise ValueError(f"expected tokens below V = {tokenizer.V}, got {int(x.max())}: unmask before decoding")
    return tokenizer.decode(embed_tokens(x, *tokenizer.tables()))


# ============================================================================== making the tiny world
def fit(model, loss_fn, steps, lr, betas=(0.9, 0.99), weight_decay=0.01, ema_decay=0.999, bf16=False):
    """Minimise loss_fn() for `steps` steps of AdamW, warm-up then cosine; leaves the average of the weights."""
    opt = torch.optim.AdamW(model.parameters(), lr, betas, weight_decay=weight_decay)
    factor = lambda n: min(1.0, (n + 1) / 200) * (0.02 + 0.98 * (1 + math.cos(math.pi * n / steps)) / 2)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    bar = tqdm(range(steps), mininterval=5, unit="step")
    device = next(model.parameters()).device.type
    for n in bar:
        for group in opt.param_groups:
            group["lr"] = lr * factor(n)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss, log = loss_fn()
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        rate = min(ema_decay, (1 + n) / (10 + n))
        for k, v in model.state_dict().items():
            ema[k].lerp_(v, 1 - rate)
        if n % 50 == 0:
            bar.set_postfix_str(" ".join(f"{k} {float(v):.4f}" for k, v in log.items()))
    model.load_state_dict(ema)
    return model.eval()


def tokenizer_loss(tok, img, w_entropy=0.02, w_commit=0.02):
    """Reconstruction of pixels and edges, commitment, and LFQ's entropy term.

    Each latent channel gives its bit a probability, sigmoid(4 z). Every position should be sure of its bits (low
    entropy of each), and the batch should use all codes (high entropy of the mean over the joint 2^bits codes, which
    factorises per position into the two groups). Without the second term a sign quantiser keeps a handful of codes.
    """
    z = tok.encoder(img).float()                                                              # (B, bits, h, w)
    sign = torch.where(z > 0, 1.0, -1.0)
    out = tok.decoder(z + (sign - z).detach()).float()                                        # straight-through
    edges = sum((out.diff(dim=a) - img.diff(dim=a)).abs().mean() for a in (2, 3))
    recon = (out - img).abs().mean() + 5 * (out - img).square().mean() + edges
    commit = (z - sign).square().mean()
    p = torch.sigmoid(4 * z).flatten(2).transpose(1, 2).reshape(-1, tok.bits).clamp(1e-6, 1 - 1e-6)    # (N, bits)
    sure = -(p * p.log() + (1 - p) * (1 - p).log()).sum(1).mean()
    n, on = tok.bits // tok.G, (bits_of(torch.arange(tok.V, device=p.device), tok.bits // tok.G) > 0).float()
    groups = [(p_g.log() @ on.T + (1 - p_g).log() @ (1 - on).T).exp() for p_g in p.split(n, 1)]        # (N, V) each
    joint = groups[0].T @ groups[-1] / len(p) if tok.G == 2 else groups[0].mean(0)
    used = -(joint * (joint + 1e-12).log()).sum()
    loss = recon + w_commit * commit + w_entropy * (sure - used)
    return loss, dict(recon=recon.detach(), sure=sure.detach(), used=used.detach())


def mdm_loss(net, x, labels, dropout_label=0.1):
    """Eq. 1 as MaskBit trains: label-smoothed cross-entropy over all units, each masked with its image's ratio."""
    ratio = mask_ratio(torch.rand(len(x), device=x.device), "arccos")
    x_t = torch.where(torch.rand(x.shape, device=x.device) < ratio[:, None, None], net.V, x)
    cond = torch.where(torch.rand(len(x), device=x.device) < dropout_label, net.classes, labels)
    z = net(embed_tokens(x_t, *net.tables()), (cond,))
    ce = F.cross_entropy(z.flatten(0, 2), x.flatten(), reduction="none", label_smoothing=0.1)
    masked = (x_t == net.V).flatten()
    return ce.mean(), dict(all=ce.detach().mean(), masked=(ce.detach() * masked).sum() / masked.sum())


# =============================================================================================== loading
def published_state(state, module):
    """A published state dict with this module's names; prefixes and known extras dropped."""
    out = {}
    for key, tensor in state.items():
        key = re.sub(r"^((module|_orig_mod)\.)+", "", key)
        if key in getattr(module, "published_extras", ()):
            continue
        for pattern, name in getattr(module, "published_names", ()):
            key = re.sub(pattern, name, key)
        out[key] = tensor
    return out


def load_state(module, state, source):
    """Copy a state dict into a module, strictly; a UserError names what is missing, unexpected, or of another shape.

    Float16 and bfloat16 tensors become the module's own dtype. `source` is how messages call the file.
    """
    for wrapper in ("state_dict", "model_state_dict"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise UserError(f"{source}: expected a dict of tensors, got {type(state).__name__}")
    state, own = published_state(state, module), module.state_dict()
    few = lambda names: ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    complaints = []
    if missing := own.keys() - state.keys():
        complaints.append(f"missing {few(missing)}")
    if unexpected := state.keys() - own.keys():
        complaints.append(f"unexpected {few(unexpected)}")
    shape = lambda t: tuple(getattr(t, "shape", ()))
    if misshapen := [k for k in own.keys() & state.keys() if shape(own[k]) != shape(state[k])]:
        complaints.append("of another shape " + few([f"{k} {shape(state[k])} instead of {shape(own[k])}" for k in misshapen]))
    if complaints:
        raise UserError(f"{source} does not fit {type(module).__name__}: " + "; ".join(complaints)
                        + ". Is it another teacher's file, or another size?")
    module.load_state_dict(state)
    return module


def local(path):
    """A path as given, or, where it does not exist, relative to this repository: so shipped files are found."""
    return path if os.path.exists(path) else os.path.join(HERE, path)


def read_weights(path):
    """The state dict in a .safetensors or torch file, on the CPU, without executing anything it contains."""
    if not os.path.isfile(path):
        raise UserError(f"no weights at {path}: expected a .safetensors or torch file")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as err:       # truncated, not a checkpoint at all, or a pickle of more than tensors
        raise UserError(f"cannot read {path} as weights ({type(err).__name__}: {str(err).splitlines()[0][:200]}); "
                        "it may be cut short: fetch or write it again")


def fetch(repo, name, flag):
    """The local path of a published file: from this repository's assets (repo None), else from the hub."""
    if repo is None:
        return local(name)
    try:
        from huggingface_hub import hf_hub_download
        return hf_hub_download(repo, name)
    except Exception as err:
        raise UserError(f"cannot download {name} from the Hugging Face hub, repository {repo} ({type(err).__name__}). "
                        f"Without network, fetch it elsewhere and name the local file by {flag} PATH; "
                        "or try sizes and speed with --random_weights")


def load_published(module, spec, role, path=None):
    """The module with its weights from `path`, else from the published file of its role, "net" or "tokenizer"."""
    flag = {"net": "--teacher_weights", "tokenizer": "--tokenizer_weights"}[role]
    path = path or fetch(*spec.files[role], flag)
    return load_state(module, read_weights(path), path)


def load_teacher(name, teacher_weights=None, tokenizer_weights=None, random_weights=False, device="cpu"):
    """The frozen teacher called `name`, in eval mode: a Teacher(net, tokenizer, spec).

    Weights come from the given paths, else from `spec.files` (assets, or the hub); random_weights needs no file.
    """
    if name not in SPECS:
        raise UserError(f"unknown teacher {name!r}: expected one of {', '.join(SPECS)}")
    spec = SPECS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)                       # random weights are the same in every process and every run
        net, tokenizer = MaskBit(**spec.net), BitTokenizer(**spec.tokenizer)
    if not random_weights:
        load_published(net, spec, "net", teacher_weights)
        load_published(tokenizer, spec, "tokenizer", tokenizer_weights)
    tokenizer.to(memory_format=torch.channels_last)                # convolutions a tenth faster
    return Teacher(*(m.to(device).eval().requires_grad_(False) for m in (net, tokenizer)), spec)


def load_student(path, name=None, device="cpu", **files):
    """A one-step generator from a file: (teacher, net, config), the net in eval mode.

    A checkpoint of train.py says in its config which teacher it has and how it starts, and its EMA weights are
    taken; config is {} for a bare state dict (an official Di[M]O student, a theta_0), which needs the teacher's name.
    files: teacher_weights, tokenizer_weights and random_weights of `load_teacher`, over those of the config.
    """
    state = read_weights(local(path))
    config = state.get("config", {}) if isinstance(state, dict) else {}
    if "ema" in state:
        state = state["ema"]
    name = config.get("teacher", name)
    if name is None:
        raise UserError(f"{path} is a bare state dict and does not name its teacher: add --teacher NAME")
    files = {k: files.get(k) or config.get(k) for k in ("teacher_weights", "tokenizer_weights", "random_weights")}
    teacher = load_teacher(name, device=device, **files)
    net = MaskBit(**teacher.spec.net).to(device)
    return teacher, load_state(net, state, path).eval().requires_grad_(False), config


SPECS = {
    "maskbit": Spec(
        "maskbit", net=dict(grid=16, classes=1000), tokenizer=dict(bits=14), image=(3, 256, 256),
        sampling={64: dict(guidance=7.1, temperature=7.8), 128: dict(guidance=7.1, temperature=9.0),
                  256: dict(guidance=5.8, temperature=10.3)},
        files={"net": ("markweber/maskbit_generator_14bit", "maskbit_generator_14bit.bin"),
               "tokenizer": ("markweber/maskbit_tokenizer_14bit", "maskbit_tokenizer_14bit.bin")}),
    "maskbit-tiny": Spec(
        "maskbit-tiny", image=(1, 32, 32),
        net=dict(bits=10, grid=8, width=128, depth=4, heads=4, mlp=512, classes=10),
        tokenizer=dict(channels=1, hidden=32, mult=(1, 2, 2), blocks=1, bits=10, norm_groups=8),
        sampling={16: dict(guidance=5.0, temperature=11.0)},
        record="assets/fashion/teacher_steps.jsonl",
        files={"net": (None, "assets/fashion/teacher.safetensors"),
               "tokenizer": (None, "assets/fashion/tokenizer.safetensors")}),
}


@torch.no_grad()
def codebook_report(tok, img):
    """PSNR of the reconstruction in dB, codes used, and their perplexity, over uint8 images (N, C, H, W)."""
    error, count = 0.0, torch.zeros(2**tok.bits)
    for part in img.split(500):
        part = part.float() / 255
        x = tok.encode(part)
        error += (decode_tokens(tok, x) - part).square().sum().item()
        shift = torch.arange(tok.G, device=x.device) * (tok.bits // tok.G)
        count += torch.bincount((x << shift).sum(-1).flatten().cpu(), minlength=2**tok.bits)
    p = count / count.sum()
    return dict(psnr=-10 * math.log10(error / img.numel()), codes_used=int((count > 0).sum()), codes=2**tok.bits,
                perplexity=math.exp(-(p * (p + 1e-12).log()).sum()))


def make_tiny(args):
    """Train the tiny tokenizer or the tiny teacher, and write float16 safetensors with a record beside them."""
    from safetensors.torch import save_file
    from data.fashion import load_images

    torch.manual_seed(args.seed)
    spec, start = SPECS["maskbit-tiny"], time.time()
    if args.train_tokenizer:
        img = torch.from_numpy(load_images()[0])
        model = BitTokenizer(**spec.tokenizer).to(args.device, memory_format=torch.channels_last)

        def loss_fn():
            part = img[torch.randint(len(img), (args.batch,))].to(args.device).float() / 255
            return tokenizer_loss(model, part.contiguous(memory_format=torch.channels_last))
    else:
        with np.load(os.path.join(HERE, "assets/fashion/tokens.npz")) as f:
            x, labels = torch.from_numpy(f["tokens"]).long(), torch.from_numpy(f["labels"]).long()
        model = MaskBit(**spec.net, dropout=args.dropout).to(args.device)

        def loss_fn():
            i = torch.randint(len(x), (args.batch,))
            return mdm_loss(model, x[i].to(args.device), labels[i].to(args.device))

    fit(model, loss_fn, args.steps, args.lr, bf16=args.bf16)
    path = os.path.join(HERE, spec.files["tokenizer" if args.train_tokenizer else "net"][1])
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, path + ".tmp")
    os.replace(path + ".tmp", path)
    record = dict(vars(args), parameters=sum(p.numel() for p in model.parameters()), seconds=round(time.time() - start))
    if args.train_tokenizer:
        record.update(codebook_report(model.half().float(), torch.from_numpy(load_images("t10k")[0])))
    with open(path.replace(".safetensors", ".json"), "w") as f:
        json.dump(record, f, indent=1)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    from teachers import UserError, make_tiny         # this file under the name by which data/fashion.py knows it

    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--train_tokenizer", action="store_true", help="train the tiny tokenizer on Fashion-MNIST")
    ap.add_argument("--train_mdm", action="store_true", help="train the tiny teacher on the tokens in assets/")
    ap.add_argument("--steps", type=int, default=6000)
    ap.add_argument("--batch", type=int, default=64)
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--dropout", type=float, default=0.0)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--bf16", action="store_true", help="bfloat16 autocast (fast on CPUs with AMX and on GPUs)")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = ap.parse_args()
    try:
        make_tiny(args)
    except UserError as err:
        ap.exit(2, f"teachers.py: {err}\n")
