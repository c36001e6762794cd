"""Blocks of which the teachers are made."""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from networks.weights import renames


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
    """Adaptive LayerNorm: normalize without learned gains, then those that the condition chose, (B, 1, D)."""
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


def sinusoid(t, dim, period=10_000.0):
    """Numbers (N,) as waves: cosines and sines, (N, dim / 2) each, of frequencies from 1 to 1/period, in float32."""
    i = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    a = t.float()[:, None] * torch.exp(-math.log(period) * i / (dim // 2))
    return a.cos(), a.sin()


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


def linear32(h, weight, bias=None):
    """A linear map in float32 even under bf16 autocast: Eq. 2 takes differences of log-probabilities."""
    with torch.autocast(h.device.type, enabled=False):
        return F.linear(h.float(), weight.float(), None if bias is None else bias.float())
