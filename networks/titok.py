"""MaskGen's tokenizer, TA-TiTok: an image as a sequence of tokens that have no place in it.

Learned queries collect the image into L tokens; the decoder, told the prompt, spreads them again
over the patches. Both halves are vision transformers in OpenAI's manner, between two LayerNorms.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from networks.autoencoders import TokenCoder, as_map, as_rows, table
from networks.blocks import Network, PreNormBlock
from networks.weights import renames


class ViTHalf(Network):
    """What the two transformers share: a sequence, a class token first, between LayerNorms."""

    def __init__(self, width, depth, heads, places, L):
        super().__init__()
        self.class_embedding = table(1, width)
        self.positional_embedding = table(places + 1, width)
        self.latent_token_positional_embedding = table(L, width)
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(
            PreNormBlock(width, heads, 4 * width) for _ in range(depth))

    def through(self, patches, *others):
        """Patches (B, places, width), a class token before them, other sequences behind."""
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        h = torch.cat([first, patches], 1) + self.positional_embedding
        h, _ = self.walk(self.transformer, self.ln_pre(torch.cat([h, *others], 1)))
        return h


class TiTokEncoder(ViTHalf):
    def __init__(self, patch, embed, width, *vit):
        super().__init__(width, *vit)
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.conv_out = nn.Linear(width, embed)

    def forward(self, img, latent_tokens):
        queries = latent_tokens + self.latent_token_positional_embedding
        patches = as_rows(self.patch_embed(img))
        h = self.through(patches, queries.expand(img.shape[0], -1, -1))   # (B, 1 + places + L, width)
        return self.conv_out(self.ln_post(h[:, -len(queries) :]))     # (B, L, embed)


class TiTokDecoder(ViTHalf):
    def __init__(self, patch, embed, text, text_width, width, *vit):
        super().__init__(width, *vit)
        self.patch = patch
        self.mask_token = table(1, 1, width)
        self.text_guidance_positional_embedding = table(text, width)
        self.text_guidance_proj = nn.Linear(text_width, width)
        self.decoder_embed = nn.Linear(embed, width)
        self.to_patch = nn.Linear(width, 3 * patch**2)                # row, column, channel
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, e, guide):
        """e (B, L, embed), guide (B, text, text_width) -> images (B, 3, H, W), about in [0, 1]."""
        places = len(self.positional_embedding) - 1
        blank = self.mask_token.expand(e.shape[0], places, -1)
        tokens = self.decoder_embed(e) + self.latent_token_positional_embedding
        text = self.text_guidance_proj(guide) + self.text_guidance_positional_embedding
        h = self.through(blank, tokens, text)[:, 1 : 1 + places]
        h = self.to_patch(self.ln_post(h))                            # (B, places, patch patch 3)
        h = h.unflatten(2, (-1, 3)).mT.flatten(2)                     # (B, places, 3 patch patch)
        h = as_map(h).contiguous()
        return self.conv_out(F.pixel_shuffle(h, self.patch))          # (B, 3, H, W)


class TATiTok(TokenCoder):
    """The whole tokenizer."""

    def __init__(
        self,
        V=8192,
        L=128,
        size=256,                       # pixels
        patch=16,                       # pixels
        embed=64,                       # width of a code
        enc=(768, 12, 12),              # width, depth, heads
        dec=(1024, 24, 16),
        text=77,                        # positions of the prompt
        text_width=768,
    ):
        super().__init__()
        self.V = V
        places = (size // patch) ** 2
        self.latent_tokens = table(L, enc[0])
        self.encoder = TiTokEncoder(patch, embed, *enc, places, L)
        self.codebook = nn.Embedding(V, embed)
        self.decoder = TiTokDecoder(patch, embed, text, text_width, *dec, places, L)

    def latents(self, img):
        return self.encoder(img, self.latent_tokens)                  # (B, L, embed)

    def encode(self, img):
        return self.nearest(self.latents(img))[..., None]             # (B, L, 1)

    def pixels(self, e, cond):
        return self.decoder(e, cond[-1])

    published_names = renames("""
        .transformer.*.ln_1.            .transformer.*.norm1.
        .transformer.*.ln_2.            .transformer.*.norm2.
        .transformer.*.attn.in_proj_    .transformer.*.attn.qkv.
        .transformer.*.attn.out_proj.   .transformer.*.attn.out.
        .transformer.*.mlp.c_fc.        .transformer.*.mlp.0.
        .transformer.*.mlp.c_proj.      .transformer.*.mlp.3.
        decoder.ffn.0.                  decoder.to_patch.
        quantize.embedding.             codebook.
    """)
    published_extras = r"quantize\.embed_prob$"
