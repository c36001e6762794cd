"""The blocks of which the teachers and their tokenizers are made.

Names of parts (attn.qkv, norm1, mlp.0, ...) are the keys of the weights that ship here, and what
networks/published_names.py translates published keys to. Published weights fix the arithmetic too:
where a norm stands, its epsilon, which GELU, which half of a sinusoid comes first.
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class Network(nn.Module):
    """What all networks here share: they walk through blocks, and can trade time for memory."""

    checkpointing = False

    def run(self, block, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def walk(self, blocks, h, layers=(), *args, view=lambda h: h, first=0):
        """h through the blocks, numbered from `first`, and view(h) after each of `layers`.

        It goes no deeper than the last of them: the discriminator needs no logits.
        """
        features = []
        for i, block in enumerate(blocks, first):
            h = self.run(block, h, *args)
            if i in layers:
                features.append(view(h))
            if layers and i >= max(layers):
                break
        return h, features

    def set_dropout(self, p):
        """Dropout wherever the teacher was trained with it: Meissonic and MaskGen were not.

        Until it is called there is none.
        """
        for m in self.modules():
            if isinstance(m, nn.Dropout):
                m.p = p
        return self

    def halve(self):
        """Frozen weights in bf16: only the blocks' matrices, which autocast rounds anyway."""
        for block in [*self.blocks, *getattr(self, "single", ())]:
            for m in block.modules():
                if isinstance(m, nn.Linear):
                    m.to(torch.bfloat16)
        return self

    def set_checkpointing(self, on=True):
        """Keep only the inputs of the blocks, and compute each block once more on the way back."""
        for m in self.modules():
            if isinstance(m, Network):
                m.checkpointing = on
        return self


# ----------------------------------------------------------------------------------- attention
def split_heads(qkv, heads):
    """Packed (B, T, 3 D), whose last axis is q, k, v -> three of (B, heads, T, D / heads)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def rotate(x, rope):
    """Rotary positions: adjacent pairs of x (B, heads, T, d) turned; rope: cos, sin (T, d/2)."""
    cos, sin = rope
    pairs = x.float().unflatten(-1, (-1, 2))                                # (B, heads, T, d/2, 2)
    a, b = pairs.unbind(-1)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
    return turned.flatten(-2).to(x.dtype)


def attend(q, k, v, rope=None, dropout=0.0):
    """softmax(q k^T / sqrt(d)) v, (B, heads, T, d) each -> heads joined again, (B, T, heads d).

    rope turns q and k first (see `rotate`).
    """
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    on_cpu = q.device.type == "cpu"
    if on_cpu and q.dtype == torch.bfloat16 and q.requires_grad and k.shape[2] <= 512:
        # the fused kernel's backward pass is five times slower there
        p = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
        y = F.dropout(p, dropout) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention of x (B, T, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(0.0)             # holds the rate; `attend` drops

    def forward(self, x):
        dropout = self.drop.p if self.training else 0.0
        return self.out(attend(*split_heads(self.qkv(x), self.heads), dropout=dropout))


# ----------------------------------------------------------- blocks of class-to-image networks
class PostNormBlock(nn.Module):
    """BERT's block, with a LayerNorm after each residual sum: MaskBit."""

    def __init__(self, width, heads, mlp):
        super().__init__()
        self.attn = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp), nn.GELU(),
            nn.Linear(mlp, width)
        )
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.drop = nn.Dropout(0.0)

    def forward(self, h):
        h = self.norm1(h + self.drop(self.attn(h)))
        return self.norm2(h + self.drop(self.mlp(h)))


class PreNormBlock(nn.Module):
    """The vision transformer's block: MaskGit, and the tokenizer of MaskGen."""

    def __init__(self, width, heads, mlp):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp), nn.GELU(), nn.Dropout(0.0),
            nn.Linear(mlp, width), nn.Dropout(0.0)
        )

    def forward(self, h):
        h = h + self.attn(self.norm1(h))
        return h + self.mlp(self.norm2(h))


# ------------------------------------------------------------ blocks of text-to-image networks
class RMSNorm(nn.RMSNorm):
    """x / rms(x) * gain over the last axis. The gain is cast to x's precision: a fused kernel."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), eps=1e-6)


def modulate(h, shift, scale):
    """Adaptive LayerNorm: no learned gains, but those (B, 1, D) that the condition chooses."""
    h = F.layer_norm(h, h.shape[-1:], eps=1e-6)
    return h * (1 + scale) + shift


class Modulated(nn.Module):
    """How a sequence enters the attention of a block whose condition modulates it.

    The condition gives `parts` vectors: a shift, a scale, and what the block modulates besides.
    """

    reverse = False

    def __init__(self, width, heads, parts, qk_norm=True):
        super().__init__()
        self.heads = heads
        self.mod = nn.Linear(width, parts * width)
        self.qkv = nn.Linear(width, 3 * width)
        Norm = RMSNorm if qk_norm else nn.Identity
        self.q_norm, self.k_norm = Norm(width // heads), Norm(width // heads)

    def enter(self, h, s):
        """h (B, T, D), condition s (B, D) -> (q, k, v), and: h modulated, the other parts."""
        shift, scale, *others = self.mod(s)[:, None].split(h.shape[-1], -1)     # (B, 1, D) each
        if self.reverse:
            shift, scale = scale, shift
        h = modulate(h, shift, scale)
        q, k, v = split_heads(self.qkv(h), self.heads)
        return (self.q_norm(q), self.k_norm(k), v), [h, *others]


class Stream(Modulated):
    """One side, text or image, of a joint block.

    last: the text's side of the last block. It goes nowhere, so it has no way out; and published
    files store its shift and scale in reverse.
    """

    def __init__(self, width, heads, qk_norm, last=False):
        super().__init__(width, heads, 2 if last else 6, qk_norm)
        self.reverse = last
        if not last:
            self.out = nn.Linear(width, width)
            self.mlp = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"),
                nn.Linear(4 * width, width)
            )

    def leave(self, h, attended, gate_attention, shift, scale, gate_mlp):
        h = h + gate_attention * self.out(attended)
        return h + gate_mlp * self.mlp(modulate(h, shift, scale))


class JointBlock(nn.Module):
    """MM-DiT: text and image, with weights of their own, meet in one attention."""

    def __init__(self, width, heads, qk_norm=False, last=False):
        super().__init__()
        self.last = last
        self.text = Stream(width, heads, qk_norm, last)
        self.image = Stream(width, heads, qk_norm)

    def forward(self, h, s, rope=None):
        """h = text (B, S, D) and image (B, N, D), condition s (B, D) -> both anew."""
        text, image = h
        text_qkv, (_, *text_parts) = self.text.enter(text, s)
        image_qkv, (_, *image_parts) = self.image.enter(image, s)
        q, k, v = (torch.cat(pair, 2) for pair in zip(text_qkv, image_qkv))     # text first
        attended = attend(q, k, v, rope)                                        # (B, S+N, D)
        to_text, to_image = attended.split([text.shape[1], image.shape[1]], 1)
        if not self.last:
            text = self.text.leave(text, to_text, *text_parts)
        return text, self.image.leave(image, to_image, *image_parts)


class SingleBlock(Modulated):
    """Text and image as one sequence h (B, T, D): attention and MLP side by side."""

    def __init__(self, width, heads):
        super().__init__(width, heads, parts=3)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)

    def forward(self, h, s, rope):
        qkv, (n, gate) = self.enter(h, s)
        a = attend(*qkv, rope)                                                  # (B, T, D)
        f = F.gelu(self.proj_mlp(n), approximate="tanh")                        # (B, T, 4 D)
        return h + gate * self.proj_out(torch.cat([a, f], -1))


# ------------------------------------------------------------------------- positions and numbers
def sinusoid(t, dim, period=10_000.0):
    """Numbers t (N,) as waves: cosines and sines, (N, dim/2) each, in float32.

    Frequencies fall from 1 to 1/period.
    """
    i = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(period) * i / (dim // 2))
    angle = t.float()[:, None] * frequency                                  # (N, dim/2)
    return angle.cos(), angle.sin()


@functools.lru_cache(maxsize=8)
def angles(text, rows, columns, axes, device):
    """cos and sin (text + rows * columns, sum(axes) / 2) for `rotate`, text before the image.

    axes[k] dimensions of a head turn with coordinate k of a place (0, row, column). Text is at the
    origin, and so unturned. Angles are computed in float64, tables are float32.
    """
    place = torch.zeros(text + rows * columns, 3, dtype=torch.float64)
    place[text:, 1] = torch.arange(rows).repeat_interleave(columns)
    place[text:, 2] = torch.arange(columns).repeat(rows)
    turns = [10_000 ** -(torch.arange(0, n, 2, dtype=torch.float64) / n) for n in axes]
    angle = torch.cat(list(map(torch.outer, place.T, turns)), 1)
    return angle.cos().float().to(device), angle.sin().float().to(device)


@torch.compiler.assume_constant_result
def rope_table(*where):
    """angles(...), which compiled graphs hold as a constant and do not compute in every pass."""
    return angles(*where)


def linear32(h, *weight_and_bias):
    """A linear map in float32 even under bf16 autocast: Eq. 2 takes differences of log p."""
    with torch.autocast(h.device.type, enabled=False):
        return F.linear(h.float(), *(w.float() for w in weight_and_bias))
