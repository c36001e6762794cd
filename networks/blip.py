"""ImageReward."""

import unicodedata

import torch
import torch.nn as nn
import torch.nn.functional as F

from machinery.errors import UserError
from networks.blocks import PreNormBlock
from networks.weights import renames


class Reads(nn.Module):
    """x (B, S, width) attends to y (B, N, source); added to x, then LayerNorm: BERT's attention, self or cross."""

    def __init__(self, width, heads, source):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)
        self.out, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x, y, mask=None):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), self.k(y), self.v(y)))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                           # (B, heads, S, d)
        return self.norm(x + self.out(h.transpose(1, 2).flatten(2)))


class ReadingBlock(nn.Module):
    """BERT's post-norm layer with one more sublayer, in which every word looks at the image."""

    def __init__(self, width, heads, mlp, source):
        super().__init__()
        self.attn, self.cross = Reads(width, heads, width), Reads(width, heads, source)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, h, image, mask):
        h = self.cross(self.attn(h, h, mask), image)
        return self.norm(h + self.mlp(h))


class ImageReward(nn.Module):
    """BLIP as a judge: a ViT sees, a BERT reads the prompt while looking at it, a head scores the first position.

    vision and text are (width, depth, heads). The head has no activation between its layers: so it was published.
    """

    MEAN, STD, CONTEXT = 0.16717362830052426, 1.0333394966054072, 35            # over its training set

    def __init__(self, size=224, patch=16, vision=(1024, 24, 16), text=(768, 12, 12), mlp=3072, vocab=30524,
                 positions=512, head=(1024, 128, 64, 16), wordpiece=None):
        super().__init__()
        (D, depth, heads), (d, layers, text_heads) = vision, text
        self.size, self.wordpiece = size, wordpiece
        self.patch = nn.Conv2d(3, D, patch, stride=patch)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, D))
        self.pos = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, D))
        self.blocks = nn.ModuleList(PreNormBlock(D, heads, 4 * D) for _ in range(depth))
        self.norm = nn.LayerNorm(D)
        for m in self.modules():
            if isinstance(m, nn.LayerNorm):
                m.eps = 1e-6                                      # the image tower's; the text tower has 1e-12
        self.words, self.places = nn.Embedding(vocab, d), nn.Embedding(positions, d)
        self.text_norm = nn.LayerNorm(d, eps=1e-12)
        self.layers = nn.ModuleList(ReadingBlock(d, text_heads, mlp, D) for _ in range(layers))
        self.head = nn.Sequential(*(nn.Linear(a, b) for a, b in zip((d, *head), (*head, 1))))

    def tokenize(self, prompts):
        return torch.tensor([self.wordpiece(p, min(self.CONTEXT, len(self.places.weight))) for p in prompts])

    def see(self, pixels):
        h = self.patch(pixels).flatten(2).transpose(1, 2)                                     # (B, N, D)
        h = torch.cat([self.cls_token.expand(len(h), -1, -1), h], 1) + self.pos               # (B, N+1, D)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)

    def read(self, ids, image):
        mask = (ids != 0)[:, None, None]                          # padding is not attended to: (B, 1, 1, S)
        h = self.text_norm(self.words(ids) + self.places.weight[: ids.shape[1]])              # (B, S, d)
        for layer in self.layers:
            h = layer(h, image, mask)
        return h

    def raw(self, image, ids):
        """What see() saw, (B, N+1, D), and ids (B, S), 0 where padded -> scores (B,) as the head gives them."""
        first = self.read(ids, image)[:, 0]                                                   # (B, d)
        with torch.autocast(image.device.type, enabled=False):
            return self.head(first.to(self.head[0].weight.dtype))[:, 0]                       # (B,)

    def forward(self, pixels, ids):
        """Preprocessed pixels (B, 3, size, size) and ids (B, S), 0 where padded -> rewards (B,), about N(0, 1)."""
        return (self.raw(self.see(pixels), ids) - self.MEAN) / self.STD

    published_names = renames("""
        blip.visual_encoder.cls_token         cls_token    blip.visual_encoder.pos_embed          pos
        blip.visual_encoder.patch_embed.proj. patch.       blip.visual_encoder.norm.              norm.
        blip.visual_encoder.blocks.           blocks.      blocks.*.attn.proj.                    blocks.*.attn.out.
        blocks.*.mlp.fc1.           blocks.*.mlp.0.        blocks.*.mlp.fc2.                      blocks.*.mlp.3.
        blip.text_encoder.embeddings.word_embeddings.      words.
        blip.text_encoder.embeddings.position_embeddings.  places.
        blip.text_encoder.embeddings.LayerNorm.            text_norm.
        blip.text_encoder.encoder.layer.                   layers.
        layers.*.attention.         layers.*.attn.         layers.*.crossattention.               layers.*.cross.
        layers.*.intermediate.dense. layers.*.mlp.0.       layers.*.output.dense.                 layers.*.mlp.2.
        layers.*.output.LayerNorm.  layers.*.norm.         .output.LayerNorm. .norm.     .output.dense. .out.
        .self.query. .q.            .self.key. .k.         .self.value. .v.
        mlp.layers.0. head.0.       mlp.layers.2. head.1.  mlp.layers.4. head.2.
        mlp.layers.6. head.3.       mlp.layers.7. head.4.
    """)
    published_extras = r"blip\.(vision_proj|text_proj)\.|blip\.text_encoder\.embeddings\.position_ids$"


def is_ideograph(c):
    return any(a <= ord(c) <= b for a, b in ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
                                             (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0x2F800, 0x2FA1F)))


class WordPiece:
    """BERT's tokenizer: lower case, no accents; in each word, from the left, the longest pieces that are known.

    path: a file with a piece a line, an id is the line's number. Without it, single ASCII characters, to try code.
    """

    def __init__(self, path=None):
        chars = [chr(i) for i in range(33, 127)]
        lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *chars, *("##" + c for c in chars)]
        if path is not None:
            try:
                with open(path, encoding="utf-8") as f:
                    lines = f.read().rstrip("\n").split("\n")
            except (OSError, UnicodeDecodeError) as err:
                raise UserError(f"cannot read {path} as a vocabulary ({type(err).__name__}): one piece a line")
        self.ids = {piece: i for i, piece in enumerate(lines)}
        if lines[0] != "[PAD]" or {"[UNK]", "[CLS]", "[SEP]"} - self.ids.keys():
            raise UserError(f"{path} is not BERT's vocabulary: expected [PAD] first, and [UNK], [CLS], [SEP]")

    def split(self, text):
        """Words; each mark of punctuation and each ideograph is one."""
        out = ""
        for c in unicodedata.normalize("NFD", text.lower()):
            kind = unicodedata.category(c)
            if c in "\t\n\r" or kind == "Zs":
                out += " "
            elif kind[0] == "P" or c in "$+<=>^`|~" or is_ideograph(c):                   # all ASCII symbols count
                out += f" {c} "
            elif kind != "Mn" and kind[0] != "C" and c != "\ufffd":                       # no accents, no controls
                out += c
        return out.split()

    def pieces(self, word):
        found, start = [], 0
        while start < len(word):
            ends = range(len(word), start, -1) if len(word) <= 100 else ()
            match = next((p for e in ends if (p := "##" * (start > 0) + word[start:e]) in self.ids), None)
            if match is None:
                return ["[UNK]"]
            found.append(match)
            start += len(match) - 2 * (start > 0)
        return found

    def __call__(self, text, length=35):
        body = [p for word in self.split(text) for p in self.pieces(word)][: length - 2]
        row = ["[CLS]", *body, "[SEP]"]
        return [self.ids[p] for p in row] + [self.ids["[PAD]"]] * (length - len(row))
