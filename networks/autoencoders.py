"""Convolutional tokenizers."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from networks.blocks import Attention, Network
from networks.weights import renames


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
    """What all tokenizers share: decoding in chunks, and quantization to the nearest row of a codebook."""

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
        """Images in [0, 1] -> (B, embed, h, w), not yet quantized."""
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
