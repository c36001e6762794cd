"""Text towers and the tokens they read."""

import functools
import math

import torch
import torch.nn as nn

from machinery.errors import UserError
from networks.weights import renames


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
            return states, final, end @ self.tower.text_projection                            # not normalized

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
