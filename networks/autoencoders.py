"""Convolutional tokenizers: an image becomes a small map of codes, and codes become an image.

The tokenizers of MaskBit, MaskGit and Meissonic are one architecture: levels of residual blocks,
each level but the coarsest followed by a step to the next. They differ in what a code is: the
nearest row of a codebook (`VQTokenizer`) or the signs of some channels (`BitTokenizer`, the
argument `bit` below). The names of attributes are those in the weight files, so they stay.
"""

import math
from itertools import zip_longest

import torch
import torch.nn as nn
import torch.nn.functional as F

from networks.blocks import Attention, Network
from networks.weights import renames


# -------------------------------------------------------------------------------- blocks and levels
def conv3(c_in, c_out, bias=True):
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)


def table(*shape):
    """A learned table, at first small noise."""
    return nn.Parameter(0.02 * torch.randn(*shape))


def as_rows(h):
    """(B, d, h, w) -> (B, L, d), row-major."""
    return h.flatten(2).transpose(1, 2)


def as_map(e, grid=None):
    """(B, L, d), row-major -> (B, d, h, w); square where the grid is not given."""
    return e.transpose(1, 2).unflatten(2, grid or (math.isqrt(e.shape[1]), -1))


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3, twice, added to x; where the width changes, through nin_shortcut, 1x1.

    MaskBit's nin_shortcut acts on h instead, which leaves no skip, and its convolutions have no
    bias: it was trained that way.
    """

    def __init__(self, c_in, c_out, norm_groups, bit=False):
        super().__init__()
        self.bit = bit
        self.norm1 = nn.GroupNorm(norm_groups, c_in, 1e-6)
        self.norm2 = nn.GroupNorm(norm_groups, c_out, 1e-6)
        self.conv1 = conv3(c_in, c_out, bias=not bit)
        self.conv2 = conv3(c_out, c_out, bias=not bit)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_out if bit else c_in, c_out, 1, bias=not bit)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if not hasattr(self, "nin_shortcut"):
            return h + x
        return h + self.nin_shortcut(h if self.bit else x)


class PixelAttention(nn.Module):
    """Attention of one head among all places of a map (B, C, h, w), added to it."""

    def __init__(self, width, norm_groups):
        super().__init__()
        self.norm_in = nn.GroupNorm(norm_groups, width, 1e-6)
        self.attn = Attention(width, heads=1)

    def forward(self, x):
        return x + as_map(self.attn(as_rows(self.norm_in(x))), x.shape[2:])


class Level(Network):
    """Residual blocks of one resolution, attention after the first few, perhaps a step."""

    def __init__(self, c_in, c_out, blocks, norm_groups, step=None, attention=0, bit=False):
        super().__init__()
        self.step = step
        self.res_blocks = nn.ModuleList(
            ResBlock(c_out if i else c_in, c_out, norm_groups, bit) for i in range(blocks))
        self.attn = nn.ModuleList(PixelAttention(c_out, norm_groups) for _ in range(attention))
        if step == "down":
            self.down_conv = nn.Conv2d(c_out, c_out, 3, stride=2)
        if step == "up":
            self.upsample_conv = conv3(c_out, c_out)

    def forward(self, h):
        for block, attention in zip_longest(self.res_blocks, self.attn):
            h = self.run(block, h)
            if attention is not None:
                h = self.run(attention, h)
        if self.step == "down":
            return self.down_conv(F.pad(h, (0, 1, 0, 1)))         # one pixel more, right and below
        if self.step == "up":
            return self.upsample_conv(F.interpolate(h, scale_factor=2.0))
        return h


# ------------------------------------------------------------------------------ encoder and decoder
def levels(order, step, widths, attention, blocks, norm_groups, bit):
    """Levels one after the other, with a step after each but the last. attention: which have it."""
    stack = nn.Sequential()
    c_in = widths[order[0]]
    for i in order:
        stack.append(Level(
            c_in, widths[i], blocks, norm_groups, bit=bit,
            step=None if i == order[-1] else step,
            attention=blocks if i in attention else 0))
        c_in = widths[i]
    return stack


def middle(width, attention, blocks, norm_groups, bit):
    """The level where both halves meet: two blocks, in MaskBit as many as in the other levels."""
    count = blocks if bit else 2
    return Level(width, width, count, norm_groups, attention=1 if attention else 0, bit=bit)


class Encoder(nn.Sequential):
    """Images (B, C, H, W) -> latents (B, latent, h, w).

    widths: channels of each level; attention: the levels that have it. The finest level is 0.
    """

    def __init__(self, channels, widths, latent, blocks, norm_groups, attention=(), bit=False):
        super().__init__()
        order = range(len(widths))
        self.conv_in = conv3(channels, widths[0], bias=not bit)
        self.down = levels(order, "down", widths, attention, blocks, norm_groups, bit)
        self.mid = middle(widths[-1], attention, blocks, norm_groups, bit)
        self.norm_out = nn.GroupNorm(norm_groups, widths[-1], 1e-6)
        self.silu = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], latent, 1) if bit else conv3(widths[-1], latent)


class Decoder(nn.Sequential):
    """Latents (B, latent, h, w) -> images (B, C, H, W): the same levels, from coarse to fine."""

    def __init__(self, channels, widths, latent, blocks, norm_groups, attention=(), bit=False):
        super().__init__()
        order = range(len(widths))[::-1]
        self.conv_in = conv3(latent, widths[-1])
        self.mid = middle(widths[-1], attention, blocks, norm_groups, bit)
        self.up = levels(order, "up", widths, attention, blocks, norm_groups, bit)
        self.norm_out = nn.GroupNorm(norm_groups, widths[0], 1e-6)
        self.silu = nn.SiLU()
        self.conv_out = conv3(widths[0], channels)


# --------------------------------------------------------------------------------------- tokenizers
class TokenCoder(Network):
    """What all tokenizers share: decoding in chunks, and the nearest row of a codebook."""

    G = 1

    def decode(self, e, cond=(), clamp=True, chunk=None):
        """Decoder embeddings e (B, L, d_dec) -> images (B, C, H, W) in [0, 1].

        cond is the teacher's condition, where MaskGen's decoder finds the prompt. chunk: images at
        a time.
        """
        # 1,024 tokens, 16 images of the tiny world, fit a CPU's cache; 16,384 are 4 of 1024 px.
        most = 1024 if e.device.type == "cpu" else 2**14
        chunk = chunk or max(1, most // e.shape[1])
        parts = zip(e.split(chunk), *(c.split(chunk) for c in cond))
        img = torch.cat([self.pixels(e_part, cond_part) for e_part, *cond_part in parts])
        return img.clamp(0, 1) if clamp else img

    def tables(self):
        """E (1, V+1, d_dec), no bias: the codebook, and its last row again in the mask's place."""
        E = self.codebook.weight
        E = torch.cat([E, E[-1:]])
        return E[None], E.new_zeros(())

    def nearest(self, z):
        """z (..., d_dec) -> index of the nearest row (Euclid), in float32 even under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            E = self.codebook.weight.float()
            distance = E.square().sum(1) - 2 * z.float() @ E.T    # less |z|^2, the same for all
        return distance.argmin(-1)


class VQTokenizer(TokenCoder):
    """The tokenizer of MaskGit (attention at the coarsest level) and Meissonic (none).

    A code is a row of a codebook (V, embed); 1x1 convolutions lead from the encoder's `latent`
    channels to it and back.
    """

    def __init__(
        self,
        widths=(128, 128, 256, 256, 512),       # channels of each level, the finest first
        blocks=2,                               # per level; the decoder has one more
        latent=256,
        embed=256,
        V=1024,
        norm_groups=32,
        attention=(4,),                         # levels
        signed=True,                            # images inside are in [-1, 1]
        grid=None,                              # rows and columns, where the map is not square
    ):
        super().__init__()
        self.V, self.signed, self.grid = V, signed, grid
        self.encoder = Encoder(3, widths, latent, blocks, norm_groups, attention)
        self.quant_conv = nn.Conv2d(latent, embed, 1)
        self.codebook = nn.Embedding(V, embed)
        self.post_quant_conv = nn.Conv2d(embed, latent, 1)
        self.decoder = Decoder(3, widths, latent, blocks + 1, norm_groups, attention)

    def latents(self, img):
        """Images in [0, 1] -> (B, embed, h, w), not yet quantized."""
        return self.quant_conv(self.encoder(2 * img - 1 if self.signed else img))

    def encode(self, img):
        return self.nearest(as_rows(self.latents(img)))[..., None]            # (B, L, 1)

    def pixels(self, e, cond=()):
        img = self.decoder(self.post_quant_conv(as_map(e, self.grid)))
        return (img + 1) / 2 if self.signed else img

    @property
    def published_names(self):
        # MaskGit counts the decoder's levels from the finest; diffusers and we, from the coarsest.
        finest = len(self.decoder.up) - 1
        theirs = r"^decoder\.up\.(\d+)\.(?=block\.|attn\.\d+\.(?:norm|q|k|v|proj_out)\.|upsample\.)"
        upside_down = (theirs, lambda match: f"decoder.up.{finest - int(match[1])}.")
        return [upside_down, *VQ_NAMES]

    published_extras = r"loss\."


def bits_of(t, n):
    """The n bits of integers t, least significant first, as -1 / +1 floats: (...) -> (..., n)."""
    bits = t[..., None] >> torch.arange(n, device=t.device) & 1
    return bits.float() * 2 - 1


class BitTokenizer(TokenCoder):
    """MaskBit's tokenizer (Weber et al. 2024): a token is its bits, the signs of the latent.

    There is no codebook, and no table to learn in the generator, which reads the very same +-1
    numbers through one linear layer; a masked group of bits is all zeros. Bits are split into G = 2
    groups, each predicted by a softmax over V = 2^(bits / G) entries, and each masked on its own.

                      bits   V   grid  width  layers  heads  parameters
        maskbit         14  128  16x16  1024      24     16  304,929,024 + 54,489,489 (tokenizer)
        maskbit-tiny    10   32  8x8     128       4      4  0.8 + 0.6 million, the same classes
    """

    G = 2

    def __init__(self, channels=3, hidden=128, mult=(1, 1, 2, 2, 4),
                 blocks=2, bits=14, norm_groups=32):
        super().__init__()
        self.bits = bits
        self.V = 2 ** (bits // self.G)
        widths = [hidden * m for m in mult]
        self.encoder = Encoder(channels, widths, bits, blocks, norm_groups, bit=True)
        self.decoder = Decoder(channels, widths, bits, blocks, norm_groups, bit=True)

    def encode(self, img):
        """Images (B, C, H, W) in [0, 1] -> tokens (B, L, G); group 0 holds the low bits."""
        z = as_rows(self.encoder(img))                                        # (B, L, bits)
        bit = (z > 0).unflatten(-1, (self.G, -1)).long()                      # zero gives -1
        return (bit << torch.arange(bit.shape[-1], device=z.device)).sum(-1)

    def tables(self):
        """E (G, V+1, bits), no bias: an entry's bits in its group's channels, zeros elsewhere."""
        own = next(self.parameters())
        bits = bits_of(torch.arange(self.V, device=own.device), self.bits // self.G).to(own)
        E = torch.block_diag(bits, bits).unflatten(0, (self.G, self.V))       # (G, V, bits)
        return F.pad(E, (0, 0, 0, 1)), E.new_zeros(())

    def pixels(self, e, cond=()):
        return self.decoder(as_map(e))

    published_extras = r"quantize\.(bits_to_indices|codebook)$"


# ---------------------------------------------------------------------------------- published names
VQ_NAMES = renames("""
    .mid.block_1.           .mid.res_blocks.0.
    .mid.block_2.           .mid.res_blocks.1.
    .attn_1.                .attn.0.
    .block.                 .res_blocks.
    .downsample.conv.       .down_conv.
    .upsample.conv.         .upsample_conv.
    .attn.*.norm.           .attn.*.norm_in.
    .attn.*.q.              .attn.*.attn.qkv#0.
    .attn.*.k.              .attn.*.attn.qkv#1.
    .attn.*.v.              .attn.*.attn.qkv#2.
    .attn.*.proj_out.       .attn.*.attn.out.
    .down_blocks.           .down.
    .up_blocks.             .up.
    .mid_block.             .mid.
    .resnets.               .res_blocks.
    .downsamplers.0.conv.   .down_conv.
    .upsamplers.0.conv.     .upsample_conv.
    .conv_shortcut.         .nin_shortcut.
    .conv_norm_out.         .norm_out.
    quantize.embedding.     codebook.
""")                                                          # MaskGit's first, then diffusers'
