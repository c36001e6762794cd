"""MaskGen's tokenizer."""

import math

import torch
import torch.nn as nn

from networks.autoencoders import TokenCoder
from networks.blocks import Network, PreNormBlock
from networks.weights import renames


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
