"""ImageReward: BLIP as a judge of how well people would like an image for its prompt.

A vision transformer sees the image, a BERT reads the prompt while looking at it, and a head scores
BERT's first position. BERT's tokenizer is here too (`WordPiece`); it needs a vocabulary file.
"""

import re
import unicodedata
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from machinery.errors import UserError, explain
from networks.autoencoders import as_rows, table
from networks.blocks import PreNormBlock
from networks.weights import renames


# -------------------------------------------------------------------------------------- the network
class Reads(nn.Module):
    """BERT's attention, self or cross, and the LayerNorm after it.

    x (B, S, width) attends to y (B, N, source), and what it finds is added to it.
    """

    def __init__(self, width, heads, source):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(source, width)
        self.v = nn.Linear(source, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x, y, mask=None):
        q, k, v = (
            h.unflatten(-1, (self.heads, -1)).transpose(1, 2)                 # (B, heads, S, ...)
            for h in (self.q(x), self.k(y), self.v(y)))
        h = F.scaled_dot_product_attention(q, k, v, mask)
        h = h.transpose(1, 2).flatten(2)                                      # (B, S, width)
        return self.norm(x + self.out(h))


class ReadingBlock(nn.Module):
    """BERT's post-norm layer with one more sublayer, in which every word looks at the image."""

    def __init__(self, width, heads, mlp, source):
        super().__init__()
        self.attn = Reads(width, heads, width)
        self.cross = Reads(width, heads, source)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, h, image, mask):
        h = self.cross(self.attn(h, h, mask), image)
        return self.norm(h + self.mlp(h))


class ImageReward(nn.Module):
    """The network. The head has no activation between its layers: it was published that way."""

    MEAN, STD = 0.16717362830052426, 1.0333394966054072       # of the scores on its training set
    CONTEXT = 35

    def __init__(
        self,
        size=224,                       # pixels
        patch=16,                       # pixels
        vision=(1024, 24, 16),          # width, depth, heads
        text=(768, 12, 12),
        mlp=3072,                       # hidden width of the text tower's MLPs
        vocab=30524,
        positions=512,
        head=(1024, 128, 64, 16),       # widths
        wordpiece=None,                 # a WordPiece, which `tokenize` needs
    ):
        super().__init__()
        self.size, self.wordpiece = size, wordpiece
        D, depth, heads = vision
        self.patch = nn.Conv2d(3, D, patch, stride=patch)
        self.cls_token = table(1, 1, D)
        self.pos = table(1, (size // patch) ** 2 + 1, D)
        self.blocks = nn.Sequential(*(PreNormBlock(D, heads, 4 * D) for _ in range(depth)))
        self.norm = nn.LayerNorm(D)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6             # the image tower's; the text tower has 1e-12
        d, depth, heads = text
        self.words = nn.Embedding(vocab, d)
        self.places = nn.Embedding(positions, d)
        self.text_norm = nn.LayerNorm(d, eps=1e-12)
        self.layers = nn.ModuleList(ReadingBlock(d, heads, mlp, D) for _ in range(depth))
        self.head = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise((d, *head, 1))))

    def tokenize(self, prompts):
        length = min(self.CONTEXT, len(self.places.weight))
        return torch.tensor([self.wordpiece(prompt, length) for prompt in prompts])

    def see(self, pixels):
        """Preprocessed pixels (B, 3, size, size) -> what the text tower looks at, (B, N+1, D)."""
        h = as_rows(self.patch(pixels))                                       # (B, N, D)
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], 1) + self.pos
        return self.norm(self.blocks(h))

    def read(self, ids, image):
        """ids (B, S), 0 where padded, and what see() saw -> states (B, S, d)."""
        mask = (ids != 0)[:, None, None]      # padding is not attended to: (B, 1, 1, S)
        h = self.text_norm(self.words(ids) + self.places.weight[: ids.shape[1]])
        for layer in self.layers:
            h = layer(h, image, mask)
        return h

    def raw(self, image, ids):
        """What see() saw and ids (B, S) -> scores (B,) as the head gives them."""
        first = self.read(ids, image)[:, 0]                                   # (B, d)
        with torch.autocast(image.device.type, enabled=False):
            return self.head(first.to(self.head[0].weight.dtype))[:, 0]

    def forward(self, pixels, ids):
        """Preprocessed pixels (B, 3, size, size) and ids (B, S) -> rewards (B,), about N(0, 1)."""
        return (self.raw(self.see(pixels), ids) - self.MEAN) / self.STD

    published_names = renames("""
        blip.visual_encoder.cls_token                       cls_token
        blip.visual_encoder.pos_embed                       pos
        blip.visual_encoder.patch_embed.proj.               patch.
        blip.visual_encoder.norm.                           norm.
        blip.visual_encoder.blocks.                         blocks.
        blocks.*.attn.proj.                                 blocks.*.attn.out.
        blocks.*.mlp.fc1.                                   blocks.*.mlp.0.
        blocks.*.mlp.fc2.                                   blocks.*.mlp.3.
        blip.text_encoder.embeddings.word_embeddings.       words.
        blip.text_encoder.embeddings.position_embeddings.   places.
        blip.text_encoder.embeddings.LayerNorm.             text_norm.
        blip.text_encoder.encoder.layer.                    layers.
        layers.*.attention.                                 layers.*.attn.
        layers.*.crossattention.                            layers.*.cross.
        layers.*.intermediate.dense.                        layers.*.mlp.0.
        layers.*.output.dense.                              layers.*.mlp.2.
        layers.*.output.LayerNorm.                          layers.*.norm.
        .output.LayerNorm.                                  .norm.
        .output.dense.                                      .out.
        .self.query.                                        .q.
        .self.key.                                          .k.
        .self.value.                                        .v.
        mlp.layers.0.                                       head.0.
        mlp.layers.2.                                       head.1.
        mlp.layers.4.                                       head.2.
        mlp.layers.6.                                       head.3.
        mlp.layers.7.                                       head.4.
    """)
    published_extras = (r"blip\.(vision_proj|text_proj)\."
                        r"|blip\.text_encoder\.embeddings\.position_ids$")


# --------------------------------------------------------------------------------- BERT's tokenizer
# Characters that are words, besides punctuation: ASCII's symbols, and ideographs.
ALONE = re.compile("[$+<=>^`|~\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
                   "\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]")


class WordPiece:
    """BERT's tokenizer: lower case, no accents, and the longest known pieces of each word.

    path: a file with a piece per line, an id is the line's number. Without it, single ASCII
    characters, to try code.
    """

    def __init__(self, path=None):
        letters = [chr(i) for i in range(33, 127)]
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]
        if path is not None:
            with explain(f"cannot read {path} as a vocabulary ({{}}): one piece per line"):
                pieces = Path(path).read_text("utf-8").rstrip("\n").split("\n")
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        if pieces[0] != "[PAD]" or {"[UNK]", "[CLS]", "[SEP]"} - self.ids.keys():
            raise UserError(f"{path} is not BERT's vocabulary: expected [PAD] first, and [UNK], "
                            "[CLS], [SEP]")

    def __call__(self, text, length=35):
        """A prompt -> ids, cut or padded with zeros to `length`."""
        body = [piece for word in self.split(text) for piece in self.pieces(word)]
        row = [self.ids[piece] for piece in ["[CLS]", *body[: length - 2], "[SEP]"]]
        return row + [0] * (length - len(row))

    def split(self, text):
        """Words. Punctuation marks and ideographs are words; accents and control characters go."""
        out = ""
        for c in unicodedata.normalize("NFD", text.lower()):
            kind = unicodedata.category(c)
            if c in "\t\n\r" or kind == "Zs":
                out += " "
            elif kind[0] == "P" or ALONE.match(c):
                out += f" {c} "
            elif kind != "Mn" and kind[0] != "C" and c != "\ufffd":
                out += c
        return out.split()

    def pieces(self, word):
        """The pieces of a word; [UNK] alone where a part is unknown or the word is overlong."""
        if len(word) > 100:
            return ["[UNK]"]
        found = []
        inside = ""                                               # "##" after the first piece
        while word:
            end = len(word)
            while inside + word[:end] not in self.ids:
                end -= 1
                if end == 0:
                    return ["[UNK]"]
            found.append(inside + word[:end])
            word = word[end:]
            inside = "##"
        return found
