"""Text towers, and the tokens that they read."""

import functools

import torch
import torch.nn as nn

from machinery.errors import UserError
from networks.published_names import TEXT_TOWER, TEXT_TOWER_EXTRAS


@functools.cache
def byte_pairs():
    """CLIP's byte-pair encoder."""
    from open_clip.tokenizer import SimpleTokenizer
    return SimpleTokenizer()


def clip_ids(prompts, context, V, pads_with_bang=False):
    """A list of prompts -> CLIP's token ids (n, context): start, byte pairs, end, then zeros.

    Long prompts are cut. pads_with_bang: "!" is the padding token, id 0, and splits the prompt.
    # choice: a tiny world's vocabulary has V entries, below CLIP's 49,408. Its last two are start
    and end, and all byte pairs are folded into the rest.
    """
    start, end = V - 2, V - 1
    ids = torch.zeros(len(prompts), context, dtype=torch.int32)
    for row, prompt in zip(ids, prompts):
        pieces = prompt.split("!") if pads_with_bang else [prompt]
        pairs = []
        for piece in pieces:                        # a padding token before each but the first
            pairs += [0, *byte_pairs().encode(piece)]
        words = [start, *(i % start for i in pairs[1 : context - 1]), end]
        row[: len(words)] = torch.tensor(words)
    return ids


class TextTower(nn.Module):
    """The text half of a CLIP, open_clip's own class: token ids (B, context) -> what teachers read.

    Meissonic has ViT-H-14's shape, weights of its own, and a tokenizer whose padding token is "!"
    (pads_with_bang). MaskGen has ViT-L-14-336. OpenAI trained that with quick_gelu; which one
    MaskGen was trained with, its code leaves open (before open_clip 2.29 it was the quick one):
    --text_activation chooses, and data/check.py, with images and captions, can tell.
    """

    published_names = TEXT_TOWER
    published_extras = TEXT_TOWER_EXTRAS

    def __init__(self, width=1024, heads=16, depth=24, out=1024, vocab=49408, context=77,
                 quick_gelu=False, pads_with_bang=False):
        super().__init__()
        try:
            from open_clip.transformer import QuickGELU, TextTransformer
        except ImportError:
            raise UserError("text teachers read prompts by open_clip: pip install open_clip_torch")
        self.tokenize = functools.partial(
            clip_ids, context=context, V=vocab, pads_with_bang=pads_with_bang
        )
        activation = QuickGELU if quick_gelu else nn.GELU
        self.tower = TextTransformer(context, vocab, width, heads, depth, output_dim=out,
                                     act_layer=activation)

    @torch.no_grad()
    def forward(self, ids):
        """States before the last block and after the final norm, pooled text; all in float32.

        (B, context, width) twice, and (B, out), not normalized.
        """
        tower = self.tower
        B, S = ids.shape
        with torch.autocast(ids.device.type, enabled=False):
            h = tower.token_embedding(ids) + tower.positional_embedding[:S]
            causal = nn.Transformer.generate_square_subsequent_mask(S, ids.device)
            for block in tower.transformer.resblocks:
                states = h
                h = block(h, attn_mask=causal)
            final = tower.ln_final(h)
            end = ids.argmax(-1)                # the end token has the largest id
            pooled = final[torch.arange(B, device=ids.device), end] @ tower.text_projection
            return states, final, pooled
