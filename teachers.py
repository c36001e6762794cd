"""The teachers: masked diffusion models (MDMs) over image tokens, their tokenizers, and their multi-step samplers.

Everything else in this repository sees a teacher through one small interface, and never asks which one it has:

    net.tables()              E (G, V+1, d) and a bias: every teacher embeds tokens by a sum of table rows, so one
                              soft embedding (Eq. 3) serves them all; row V is the mask
    net(e, cond, layers=())   embeddings e (B, L, d) and a condition -> logits z (B, L, G, V), and on request the
                              outputs of some layers, (B, N, width) each, for the discriminator. MaskGit's logits have
                              V+1 entries: it can draw the mask. s=, noise=: the start's perturbation, for the student
    net.null(cond)            the unconditional condition, for guidance u + w (c - u)
    net.frozen()              the parameters of the embedding layer, fixed during distillation (App. H.1)
    tokenizer.encode(img)     images (B, C, H, W) in [0, 1] -> tokens (B, L, G)
    tokenizer.tables()        the decoder's table, for Emb_Dec (Eq. 9)
    tokenizer.decode(e, cond) decoder embeddings (B, L, d_dec) -> images in [0, 1]
    teacher.conditions(...)   all that can be asked for, a row each: class labels, or prompts as CLIP's token ids
    teacher.cond(rows)        such rows as a condition: a tuple of tensors, batch first
    spec                      name, sizes, sampling, published files

Student, auxiliary and EMA are further instances of the teacher's `net`. Read the shared blocks, then one teacher:

    MaskBit    class -> image, 256 px   tokens are bits                     post-norm transformer
    MaskGit    class -> image, 256 px   one table for tokens and classes    pre-norm transformer
    Meissonic  text -> image, 1024 px   4,096 tokens, RoPE                  joint blocks (MM-DiT), then single ones
    MaskGen    text -> image, 256 px    128 tokens without a place          joint blocks

    python teachers.py --check maskbit                               # are the published files the right ones?
    python teachers.py --check maskbit --images /path/to/val         # and do they know real images?
"""

import copy
import functools
import json
import math
import os
from dataclasses import dataclass, field
from typing import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from dimo import guided_logits, initial_tokens, mask_ratio, perturb, student_logits
from machinery.errors import UserError
from machinery.files import local, replacing
from machinery.pictures import spread
from machinery.processes import now
from networks.autoencoders import BitTokenizer, Encoder, VQTokenizer, bits_of
from networks.blocks import Attention, JointBlock, Network, PostNormBlock, PreNormBlock, RMSNorm, SingleBlock, linear32, modulate, rope_table, sinusoid
from networks.text import TextTower
from networks.titok import TATiTok
from networks.weights import fetch, load_state, read_weights, renames
from soft_embed import embed_tokens, sample_tokens


@dataclass
class Spec:
    """What a teacher says of itself. Sizes are constructor arguments, files (hub repository, file name) by role."""

    name: str
    Net: type
    net: dict                     # arguments of Net
    Tokenizer: type
    tokenizer: dict               # arguments of Tokenizer
    plan: Callable                # its sampler: (units, steps, **settings) -> [Step]
    sampling: dict                # {steps: settings}, the first is the default; other steps take the nearest entry's
    image: tuple                  # (C, H, W)
    student: dict                 # how its one-step student starts and draws (Tab. 5): init_ratio, noise, temperature
    text: dict | None = None      # arguments of TextTower; None: conditions are class labels
    negative: str = ""            # the prompt of the unconditional branch
    prompts: str = "assets/prompts.txt"   # what it is asked for, where nobody says
    rounds: bool = False          # pixels become uint8 by rounding, else by truncation, as its authors have it
    files: dict = field(default_factory=dict)
    rewards: dict = field(default_factory=dict)   # a tiny world's own: {name: (file, its sizes)}
    bert_vocab: str | None = None                 # its imagereward's vocabulary, a file
    world: str = ""               # which tiny world it draws, "fashion" or "shapes": worlds/judges.py scores it there
    record: str = ""              # evaluations of the teacher that ship with it, JSON lines
    noise_scale: float | None = None  # unit of the embedding perturbation; None: the table's root mean square

    @property
    def classes(self):
        return self.net.get("classes")

    @property
    def roles(self):
        return ("net", "tokenizer") if self.text is None else ("net", "tokenizer", "text")

    def settings(self, steps, **given):
        """What `plan` is given for a number of steps: the published settings, or those given."""
        nearest = self.sampling[min(self.sampling, key=lambda n: abs(math.log(n / steps)))]
        return {**nearest, **{k: v for k, v in given.items() if v is not None}}


class Teacher(NamedTuple):
    net: nn.Module
    tokenizer: nn.Module
    spec: Spec
    text: nn.Module | None = None

    def noise_scale(self, net=None):
        """The unit of the embedding perturbation's noise: MaskGit's table has unit entries, MaskBit's small ones.

        # choice: the root mean square of the table, where a spec does not say; the paper is silent.
        """
        return self.spec.noise_scale or (net or self.net).tables()[0][:, : self.net.V].square().mean().sqrt()

    def conditions(self, prompts=None):
        """The condition dataset D_c of Alg. 1, a row each: labels (classes,), or prompts' token ids (n, context)."""
        device = next(self.net.parameters()).device
        if self.text is None:
            return torch.arange(self.spec.classes, device=device)
        return self.text.tokenize(prompts).to(device)

    def draw_start(self, net, n, generator=None):
        """What n starts of a student are made from: tokens, scores and u (n, L, G), noise (n, L, d) of scale one unit.

        Drawn in this order, so a seed means the same start wherever it is used. u draws tokens; TTEO draws none.
        """
        E = net.tables()[0]
        shape, how = (n, net.L, net.G), dict(device=E.device)
        how |= {"generator": generator} if generator else {}          # torch.export knows the global one alone
        tokens = torch.randint(net.V, shape, **how)
        scores, u = (torch.rand(shape, **how) for _ in range(2))
        noise = torch.randn(*shape[:2], E.shape[-1], **how) * self.noise_scale(net)
        return tokens, scores, u, noise

    def cond(self, rows):
        """The condition that rows of `conditions` stand for: a tuple of tensors, batch first."""
        return (rows,) if self.text is None else self.net.condition(*self.text(rows))


class MaskBit(Network):
    """MaskBit's bit-token generator: e (B, L, d) and labels (B,) -> logits z (B, L, G, V), at every position."""

    def __init__(self, bits=14, groups=2, grid=16, width=1024, depth=24, heads=16, mlp=4096, classes=1000,
                 dropout=0.0):
        super().__init__()
        self.bits, self.G, self.V, self.L = bits, groups, 2 ** (bits // groups), grid**2
        self.width, self.depth, self.classes, self.grid = width, depth, classes, (grid, grid)
        self.input_proj = nn.Linear(bits, width)
        self.class_emb = nn.Embedding(classes + 1, width)                 # the last row is the null class
        self.pos_emb = nn.Parameter(torch.empty(1, self.L + 1, width))    # the last row is the class token's
        self.norm_in, self.drop = nn.LayerNorm(width, eps=1e-12), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(PostNormBlock(width, heads, mlp, dropout) for _ in range(depth))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12))
        self.to_logits = nn.Linear(width, self.G * self.V)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)
            if isinstance(m, Attention):
                nn.init.xavier_uniform_(m.qkv.weight)
        nn.init.normal_(self.pos_emb, std=0.02)

    def tables(self):
        """E (G, V+1, d): the bits of each entry through the input layer, the mask row zero; and its bias (d,)."""
        n = self.bits // self.G
        B = bits_of(torch.arange(self.V, device=self.pos_emb.device), n)                      # (V, n)
        B = torch.cat([B, B.new_zeros(1, n)])                                                 # (V+1, n)
        W = self.input_proj.weight.view(self.width, self.G, n)
        return torch.einsum("vn,dgn->gvd", B.to(W.dtype), W), self.input_proj.bias

    def forward(self, e, cond, layers=(), s=0.0, noise=None):
        e = perturb(e, s, noise) if s else e
        h = torch.cat([e, self.class_emb(cond[0])[:, None]], 1) + self.pos_emb                # (B, L+1, width)
        h, features = self.walk(self.blocks, self.drop(self.norm_in(h)), layers, view=lambda h: h[:, : self.L])
        if layers:
            return features
        z = linear32(self.head(h[:, : self.L]), self.to_logits.weight, self.to_logits.bias)
        return z.unflatten(-1, (self.G, self.V))                                              # (B, L, G, V)

    def null(self, cond):
        return (torch.full_like(cond[0], self.classes),)

    def frozen(self):
        """# choice: input projection, class and position tables, as the official code freezes MaskGit's tables."""
        return [*self.input_proj.parameters(), self.class_emb.weight, self.pos_emb]

    published_names = renames("""
        transformer.layers.            blocks.            token_emb.              input_proj.
        blocks.*.0.mha.in_proj_        blocks.*.attn.qkv. blocks.*.0.mha.out_proj. blocks.*.attn.out.
        blocks.*.0.norm.               blocks.*.norm1.    blocks.*.1.norm.        blocks.*.norm2.
        blocks.*.1.net.                blocks.*.mlp.      first_layer.0.          norm_in.
        last_layer.                    head.              prediction_layer.       to_logits.
    """)                                                          # token_emb: the file's older alias
    published_extras = r"bits_to_indices$"


# Chang et al. 2022, in the PyTorch of Besnier & Chen. One table embeds tokens, mask, and classes, and its transpose
# is the output layer, with a bias of its own for each position. The mask has a logit: it can be drawn, stays to the
# end, and is decoded as the last code. The head count is nowhere in the file: 8 or 12 load too, and give nonsense.
#
#                      V    grid  width  layers  heads  parameters
#     maskgit         1024  16x16   768    24     16    174,160,874 + 72,141,699 (tokenizer)
#     maskgit-512     1024  32x32   768    24     16    176,306,666 + the same
#     maskgit-tiny      64   8x8     64     4      4    the same classes, without weights
class MaskGit(Network):
    """MaskGit's transformer: e (B, L, d) and labels (B,) -> logits z (B, L, 1, V+1), the mask's the last."""

    def __init__(self, V=1024, grid=16, width=768, depth=24, heads=16, mlp=3072, classes=1000, dropout=0.0):
        super().__init__()
        self.V, self.G, self.L, self.grid = V, 1, grid**2, (grid, grid)
        self.width, self.depth, self.classes = width, depth, classes
        entries, norm = V + 1 + classes + 1, functools.partial(nn.LayerNorm, width, eps=1e-12)
        self.tok_emb = nn.Embedding(entries, width)                       # tokens, mask, classes, null class
        self.pos_emb = nn.Parameter(torch.empty(1, self.L + 1, width))    # the last row is the class token's
        self.bias = nn.Parameter(torch.zeros(self.L + 1, entries))
        self.first = nn.Sequential(norm(), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(),
                                   norm(), nn.Dropout(dropout), nn.Linear(width, width))
        self.blocks = nn.ModuleList(PreNormBlock(width, heads, mlp, dropout) for _ in range(depth))
        self.last = nn.Sequential(norm(), nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(), norm())
        nn.init.trunc_normal_(self.pos_emb, std=0.02)

    def tables(self):
        return self.tok_emb.weight[None, : self.V + 1], self.tok_emb.weight.new_zeros(())     # (1, V+1, d)

    def forward(self, e, cond, layers=(), s=0.0, noise=None):
        e = perturb(e, s, noise) if s else e
        label = self.tok_emb(self.V + 1 + cond[0])[:, None]                                   # (B, 1, d)
        h = self.first(torch.cat([e, label], 1) + self.pos_emb)                               # (B, L+1, d), class last
        h, features = self.walk(self.blocks, h, layers, view=lambda h: h[:, : self.L])
        if layers:
            return features
        z = linear32(self.last(h[:, : self.L]), self.tok_emb.weight[: self.V + 1])
        return (z + self.bias[: self.L, : self.V + 1])[:, :, None]                            # (B, L, 1, V+1)

    def null(self, cond):
        return (torch.full_like(cond[0], self.classes),)

    def frozen(self):
        """The token table, hence the output layer, positions and output bias, as in the official code."""
        return [self.tok_emb.weight, self.pos_emb, self.bias]

    published_names = renames("""
        transformer.layers.    blocks.          first_layer.                 first.
        last_layer.            last.            blocks.*.1.fn.net.           blocks.*.mlp.
        blocks.*.0.norm.       blocks.*.norm1.  blocks.*.0.fn.mha.in_proj_   blocks.*.attn.qkv.
        blocks.*.1.norm.       blocks.*.norm2.  blocks.*.0.fn.mha.out_proj.  blocks.*.attn.out.
    """)


# Bai et al. 2024. 4,096 tokens of a 64x64 grid are embedded, normalized, halved in resolution (32x32), and go with
# 77 text states through joint blocks, then as one sequence through single blocks, with rotary positions; up again,
# and a head of its own. What is asked for otherwise (size, crop, aesthetic score: the micro-conditions; the pooled
# text; a time step) becomes one vector that modulates every block.
#
#                       V   grid   width  joint + single blocks  heads  parameters
#     meissonic       8192  64x64   1024        14 + 28            8    1,006,946,304 + 146,244,675 + 354,032,640
#     meissonic-tiny   512   8x8     128         2 + 3             4    the same classes     (tokenizer)  (text)
#
# The time step: it was trained on 1000 x the mask ratio, and the module multiplies by another 1000. The published
# sampler passes the index of the step, N-1 ... 0; distillation, as in the official Di[M]O code, passes 0. So here.
class Meissonic(Network):
    """Meissonic's transformer: e (B, L, d), cond = (text, pooled, micro, t) -> logits z (B, L, 1, V).

    text (B, S, text_width) penultimate states of the text tower, pooled (B, width) its summary, micro (B, 5) floats,
    t (B,). V+1 .. table - 1 are rows of the published table that are never used; the mask is its last row.
    """

    def __init__(self, V=8192, table=8256, grid=64, heads=8, head_width=128, joint=14, single=28, text_width=1024,
                 axes=(16, 56, 56), micro=(1024, 1024, 0, 0, 6.0)):
        super().__init__()
        D = heads * head_width
        norm, lin = functools.partial(RMSNorm, D), functools.partial(nn.Linear, bias=False)
        mlp = lambda n, linear: nn.Sequential(linear(n, D), nn.SiLU(), linear(D, D))
        self.grid = (grid, grid) if isinstance(grid, int) else tuple(grid)                    # even numbers
        self.V, self.G, self.L, self.width, self.depth = V, 1, self.grid[0] * self.grid[1], D, joint + single
        self.axes, self.micro, self.null_text, self.null_pooled = tuple(axes), micro, None, None
        self.tok_emb = nn.Embedding(table, D)
        self.norm_in, self.proj_in = norm(), lin(D, D)
        self.norm_down, self.down = norm(), nn.Conv2d(D, D, 2, 2, bias=False)
        self.norm_tokens, self.proj_tokens = norm(), lin(D, D)
        self.proj_text, self.norm_text = nn.Linear(text_width, D), norm()
        self.embed_cond = mlp(D + 5 * 256, lin)
        self.embed_text, self.embed_time = mlp(D, nn.Linear), mlp(256, nn.Linear)
        self.blocks = nn.ModuleList(JointBlock(D, heads, qk_norm=True) for _ in range(joint))
        self.single = nn.ModuleList(SingleBlock(D, heads) for _ in range(single))
        self.norm_out, self.proj_out = norm(), lin(D, D)
        self.norm_up, self.up = norm(), nn.ConvTranspose2d(D, D, 2, 2, bias=False)
        self.head, self.norm_head, self.to_logits = lin(D, D), norm(), lin(D, V)

    def tables(self):
        E = self.tok_emb.weight
        return torch.cat([E[: self.V], E[-1:]])[None], E.new_zeros(())                        # (1, V+1, d)

    def condition(self, states, final, pooled):
        """The text tower's three outputs -> cond; no padding mask: the network was trained to attend to padding."""
        micro = torch.tensor(self.micro, device=pooled.device).expand(pooled.shape[0], -1)
        return states, pooled, micro, torch.zeros(pooled.shape[0], device=pooled.device)

    @property
    def feature_grid(self):
        return self.grid[0] // 2, self.grid[1] // 2

    def at(self, cond, t):
        return (*cond[:3], torch.full_like(cond[3], t))

    def forward(self, e, cond, layers=(), s=0.0, noise=None):
        text, pooled, micro, t = cond
        (H, W), S = self.grid, text.shape[1]
        wave = lambda t: torch.cat(sinusoid(t, 256), -1).to(pooled.dtype)                     # cosines first
        v = self.embed_cond(torch.cat([pooled, wave(micro.flatten()).view(e.shape[0], -1)], 1))
        v = F.silu(self.embed_time(wave(1000 * t)) + self.embed_text(v))                      # (B, D), to every block
        c = self.norm_text(self.proj_text(text))                                              # (B, S, D)
        x = self.proj_in(self.norm_in(e))                                                     # (B, L, D)
        x = perturb(x, s, noise) if s else x                      # the official code's place for it
        x = self.down(self.norm_down(x).transpose(1, 2).unflatten(2, (H, W)))                 # (B, D, H/2, W/2)
        x = self.proj_tokens(self.norm_tokens(x.flatten(2).transpose(1, 2)))                  # (B, N, D), N = L/4
        rope = rope_table(S, H // 2, W // 2, self.axes, e.device)
        (c, x), features = self.walk(self.blocks, (c, x), layers, v, rope, view=lambda h: h[1])
        if layers and max(layers) < len(self.blocks):
            return features
        h, more = self.walk(self.single, torch.cat([c, x], 1), layers, v, rope, view=lambda h: h[:, S:],
                            first=len(self.blocks))
        if layers:
            return features + more
        x = self.proj_out(self.norm_out(h[:, S:]))                                            # (B, N, D)
        x = self.norm_up(x).transpose(1, 2).unflatten(2, (H // 2, W // 2))
        x = self.head(self.up(x).flatten(2).transpose(1, 2))                                  # (B, L, D)
        return linear32(self.norm_head(x), self.to_logits.weight)[:, :, None]                 # (B, L, 1, V)

    def null(self, cond):
        return (self.null_text.expand_as(cond[0]), self.null_pooled.expand_as(cond[1]), *cond[2:])

    def frozen(self):
        """The input embedding and the whole output head, as in the official code: 988.0 of 1,006.9 million train."""
        return [p for m in (self.tok_emb, self.norm_in, self.proj_in, self.head, self.norm_head, self.to_logits)
                for p in m.parameters()]

    published_names = JointBlock.published_names + renames("""
        single_transformer_blocks. single.
        single.*.norm.linear.       single.*.mod.      single.*.attn.to_q.           single.*.qkv#0.
        single.*.attn.to_k.         single.*.qkv#1.    single.*.attn.to_v.           single.*.qkv#2.
        single.*.attn.norm_q.       single.*.q_norm.   single.*.attn.norm_k.         single.*.k_norm.
        embed.embeddings.           tok_emb.           embed.layer_norm.             norm_in.
        embed.conv.                 proj_in.           down_block.downsample.norm.   norm_down.
        down_block.downsample.conv. down.              project_to_hidden_norm.       norm_tokens.
        project_to_hidden.          proj_tokens.       context_embedder.             proj_text.
        encoder_proj_layer_norm.    norm_text.         project_from_hidden_norm.     norm_out.
        project_from_hidden.        proj_out.          up_block.upsample.norm.       norm_up.
        up_block.upsample.conv.     up.                mlm_layer.conv1.              head.
        mlm_layer.layer_norm.       norm_head.         mlm_layer.conv2.              to_logits.
        cond_embed.linear_1.        embed_cond.0.      cond_embed.linear_2.          embed_cond.2.
        time_text_embed.text_embedder.linear_1.      embed_text.0.
        time_text_embed.text_embedder.linear_2.      embed_text.2.
        time_text_embed.timestep_embedder.linear_1.  embed_time.0.
        time_text_embed.timestep_embedder.linear_2.  embed_time.2.
    """)


# Kim et al. 2025, the VQ variant. An image is 128 tokens without a place: each may say something of all of it. So
# there is no grid, the discriminator's convolutions run along the index, and the decoder is a vision transformer
# that is told the prompt besides. Joint blocks as in Meissonic, without rotary positions; the output layer is the
# token table. Conditions: text states, pooled text, and an aesthetic score that the published sampler fixes at 6.5.
#
#                       V    L   width  blocks  heads  parameters
#     maskgen         8192  128   1024    16     16     604,311,552 + 391,046,292 (tokenizer) + 123,650,304 (text)
#     maskgen-xl      8192  128   1280    20     16   1,176,611,840 + the same
#     maskgen-tiny      64   16     64     3      4     the same classes, without weights
class MaskGen(Network):
    """MaskGen's transformer: e (B, L, d), cond = (text, pooled, score, guide) -> logits z (B, L, 1, V).

    text (B, S, text_width) penultimate states of the text tower, pooled (B, text_width), score (B,); guide is for the
    decoder. `spare` are published table rows that nothing uses.
    """

    grid = None

    def __init__(self, V=8192, L=128, width=1024, depth=16, heads=16, text_width=768, micro=256, spare=1001,
                 score=6.5):
        super().__init__()
        self.V, self.G, self.L, self.width, self.depth = V, 1, L, width, depth
        self.micro, self.score, self.null_text, self.null_pooled = micro, score, None, None
        self.tok_emb = nn.Embedding(V + 1 + spare, width)
        self.pos_emb = nn.Parameter(0.02 * torch.randn(1, L, width))
        self.proj_text, self.proj_cond = nn.Linear(text_width, width), nn.Linear(text_width + micro, width)
        self.blocks = nn.ModuleList(JointBlock(width, heads, last=i == depth - 1) for i in range(depth))
        self.mod_out = nn.Linear(width, 2 * width)
        nn.init.normal_(self.tok_emb.weight, std=0.02)

    def tables(self):
        return self.tok_emb.weight[None, : self.V + 1], self.tok_emb.weight.new_zeros(())     # (1, V+1, d)

    def condition(self, states, final, pooled):
        return states, pooled, pooled.new_full((pooled.shape[0],), self.score), final

    def forward(self, e, cond, layers=(), s=0.0, noise=None):
        text, pooled, score = cond[:3]
        e = perturb(e, s, noise) if s else e
        cos, sin = sinusoid(100 * score, self.micro, period=1000.0)
        wave = torch.cat([sin, cos], 1).to(pooled.dtype)                                      # sines first
        v = F.silu(self.proj_cond(torch.cat([pooled, wave], 1)))                              # (B, D), to every block
        h = self.proj_text(text), e + self.pos_emb                                            # (B, S, D), (B, L, D)
        (_, x), features = self.walk(self.blocks, h, layers, v, view=lambda h: h[1])
        if layers:
            return features
        scale, shift = self.mod_out(v)[:, None].chunk(2, -1)
        return linear32(modulate(x, shift, scale), self.tok_emb.weight[: self.V])[:, :, None]  # (B, L, 1, V)

    def null(self, cond):
        """The empty prompt's text states and pooled text; the score stays."""
        return (self.null_text.expand_as(cond[0]), self.null_pooled.expand_as(cond[1]), *cond[2:])

    def frozen(self):
        """# choice: the token table, and with it the tied output layer, and positions, as for MaskGit."""
        return [self.tok_emb.weight, self.pos_emb]

    published_names = JointBlock.published_names + renames("""
        embeddings.  tok_emb.    lm_head.           tok_emb.     pos_embed     pos_emb
        norm.linear. mod_out.    text_embed_proj.   proj_text.   cond_pooled_proj.  proj_cond.
    """)                                                          # embeddings and lm_head are tied
    published_config = {"codebook_size": "V", "num_latent_tokens": "L", "text_embed_dim": "text_width",
                        "decoder_embed_dim": "width", "decoder_depth": "depth", "decoder_num_heads": "heads",
                        "micro_condition_embed_dim": "micro", "sample_aesthetic_score": "score"}


# All four teachers sample alike: guess every masked token, keep the guesses one is surest of, mask the rest again.
# They differ in numbers that change from step to step, so a sampler is a *plan*: a table with a row for each step.
class Step(NamedTuple):
    w: float                # guidance u + w (c - u)
    divide: float           # softmax temperature: guided logits are divided by it
    noise: float            # scale of the Gumbel noise on the confidence
    hidden: int             # units masked again afterwards, those of least confidence; 0 ends it
    draw: float = 1.0       # temperature of the draw, on top of `divide`; 0 is argmax
    by_logit: bool = False  # confidence is the logit of the drawn token, else its log-probability


def hidden_counts(units, ratios):
    """Units left masked after each step: floor(units * ratio), one fewer at least, 1 at least; 0 at the end."""
    counts, hidden = [], units
    for ratio in ratios[:-1]:
        hidden = max(min(math.floor(units * ratio), hidden - 1), 1)
        counts.append(hidden)
    return [*counts, 0]


def schedule_ratio(q, schedule, floor=0.0):
    """Share of units masked at progress q in [0, 1]: the training schedule, `root` besides; a float32 tensor."""
    q = torch.as_tensor(q, dtype=torch.float32)
    falling = {"linear": 1 - q, "square": 1 - q**2, "root": 1 - q.sqrt()}                     # these fall with q
    return (falling[schedule] if schedule in falling else mask_ratio(q, schedule)).clamp(floor, 1)


def maskbit_plan(units, N, guidance=0.0, temperature=0.0, scale_pow=3.0, annealing="cosine", schedule="arccos",
                 softmax_temperature=1.0):
    """guidance G: c + s (c - u), so w = 1 + s, where s rises as G (1 - cos(pi (i/N)^scale_pow)) / 2; temperature T:
    noise T (1 - (i+1)/N)."""
    rise = {"cosine": lambda p: (1 - math.cos(math.pi * p**scale_pow)) / 2, "linear": lambda p: p,
            "none": lambda p: 1.0}[annealing]
    hidden = hidden_counts(units, [float(schedule_ratio((i + 1) / N, schedule, 1e-6)) for i in range(N)])
    return [Step(1 + guidance * rise(i / N), softmax_temperature, temperature * (1 - (i + 1) / N), k)
            for i, k in enumerate(hidden)]


def maskgit_plan(units, N, guidance=3.0, temperature=4.5, sm_temp=1.0, schedule="arccos"):
    """guidance G: u + (1 + G f) (c - u), f from 0 in the first step to 1 in the last; temperature: noise T (1 - f).

    sm_temp multiplies the logits. The schedule says how many tokens each step reveals (not how many it leaves).
    """
    v = schedule_ratio(torch.linspace(1, 0, N), schedule)
    reveal = (v / v.sum().clamp(min=1e-9) * units).round().clamp(min=1).int().tolist()        # half to even
    hidden = [max(units - sum(reveal[: i + 1]), 0) for i in range(N - 1)] + [0]
    f = [i / (N - 1) if N > 1 else 1.0 for i in range(N)]
    return [Step(1 + guidance * f[i], 1 / sm_temp, temperature * (1 - f[i]), hidden[i]) for i in range(N)]


def meissonic_plan(units, N, guidance=9.0, temperature=2.0, schedule="cosine"):
    """guidance: w itself, constant; temperature T: noise from T in the first step to 0 in the last."""
    hidden = hidden_counts(units, schedule_ratio((torch.arange(N) + 1) / N, schedule).tolist())
    return [Step(guidance, 1.0, noise, k) for noise, k in zip(torch.linspace(temperature, 0, N).tolist(), hidden)]


def maskgen_plan(units, N, guidance=12.0, temperature=2.0, scale_pow=1.0, annealing="cosine", schedule="arccos"):
    """guidance G: c + s (c - u), w = 1 + s, s from about 1 to G with r = (i+1)/N; temperature T: both the draw's and
    the confidence's, T (1 - r); the softmax's falls from 1.25 to 0.5, and confidence is the logit itself."""
    rise = {"cosine": lambda r: 1 + (guidance - 1) * (1 - math.cos(math.pi * r**scale_pow)) / 2,
            "linear": lambda r: 1 + (guidance - 1) * r, "none": lambda r: guidance,
            "flippedcosine": lambda r: 1 + (guidance - 1) * math.cos(math.pi * r) / 2}[annealing]
    hidden = hidden_counts(units, [float(schedule_ratio((i + 1) / N, schedule)) for i in range(N)])
    rows = [((i + 1) / N, temperature * (1 - (i + 1) / N), k) for i, k in enumerate(hidden)]
    return [Step(1 + rise(r), 0.5 + 0.8 * (1 - r), T, k, draw=T, by_logit=True) for r, T, k in rows]


def gumbel(u):
    """Uniforms in [0, 1) -> standard Gumbel noise."""
    return -(-u.clamp(min=1e-20).log()).clamp(min=1e-20).log()


@torch.no_grad()
def sample(net, cond, plan, *, x=None, order=None, draws=None, draw=sample_tokens, trace=None):
    """The multi-step sampler: tokens (B, L, G) after the steps of `plan`; a mask that MaskGit drew becomes token V-1.

    x are tokens to start from, V where there is none yet; by default all masked. order (L, G), if given, takes the
    place of confidence: units of low rank are kept first (`halton_order`). draws(i) gives two uniforms (B, L, G) for
    step i, one for draw(z, temperature, u), one for the noise on the confidence. trace, a list, receives the tokens
    that entered each step.
    """
    E, bias = net.tables()
    x = torch.full((len(cond[0]), net.L, net.G), net.V, device=E.device) if x is None else x
    masked = x == net.V
    for i, step in enumerate(plan):
        if trace is not None:
            trace.append(x.clone())
        e, now = embed_tokens(x, E, bias), net.at(cond, len(plan) - 1 - i)
        z = guided_logits(net, e, now, step.w).float() / step.divide                          # (B, L, G, V)
        u_token, u_noise = draws(i) if draws else torch.rand(2, *x.shape, device=x.device)
        drawn = torch.where(masked, draw(z, step.draw, u_token), x)
        if not step.hidden:
            return drawn.clamp(max=net.V - 1)
        score = (z if step.by_logit else z.log_softmax(-1)).gather(-1, drawn[..., None])[..., 0]
        confidence = score + step.noise * gumbel(u_noise) if order is None else -order.to(z).expand(x.shape)
        confidence = torch.where(masked, confidence, torch.inf)
        k = (masked.flatten(1).sum(1) - 1).clamp(1, step.hidden)                              # (B,), one fewer or less
        threshold = confidence.flatten(1).sort(1).values.gather(1, k[:, None] - 1)            # one ranking of all units
        masked = masked & (confidence <= threshold[:, None])
        x = torch.where(masked, net.V, drawn)


def halton_order(grid):
    """Ranks (L, 1) of a (rows, columns) grid's cells: when a 2-D Halton sequence (bases 2 and 3) first visits each.

    It spreads the tokens of one step evenly over the image, so that they depend on each other least (Besnier et al.
    2025): the training-free baseline of Tab. 2. The first point is (1/2, 1/3).
    """
    from scipy.stats import qmc
    (rows, columns), cells = grid, grid[0] * grid[1]
    points = qmc.Halton(2, scramble=False).fast_forward(1).random(100 * cells)                # (n, 2) in [0, 1)
    visited = dict.fromkeys(int(y * rows) * columns + int(x * columns) for y, x in points)    # keeps the first visits
    if len(visited) < cells:
        raise ValueError(f"a Halton sequence of {len(points)} points misses cells of a {rows} x {columns} grid")
    return torch.tensor(list(visited)).argsort()[:, None]


@torch.no_grad()
def decode_tokens(tokenizer, x, cond=()):
    """Tokens (B, L, G) -> images (B, C, H, W) in [0, 1]."""
    if int(x.max()) >= tokenizer.V:
        raise ValueError(f"expected tokens below V = {tokenizer.V}, got {int(x.max())}: unmask before decoding")
    return tokenizer.decode(embed_tokens(x, *tokenizer.tables()), cond)


def student_tokens(teacher, net, rows, init_ratio=0.6, noise=0.1, temperature=1.0, generator=None):
    """One pass of the generator `net`: rows (B, ...) of teacher.conditions -> logits z, tokens x, and what rows say."""
    (E, bias), cond = net.tables(), teacher.cond(rows)
    tokens, scores, u, n = teacher.draw_start(net, rows.shape[0], generator)
    x_init = initial_tokens(tokens, init_ratio, scores, net.V)                                # Alg. 1, l. 4
    z = student_logits(net, x_init, cond, E, bias, noise, n)                                  # l. 5: (B, L, G, V)
    return z, sample_tokens(z, temperature, u).clamp_(max=net.V - 1), cond                    # l. 6, no masks


@torch.no_grad()
def generate_student(teacher, net, rows, *, init_ratio=0.6, noise=0.1, temperature=1.0, generator=None, seconds=None):
    """One pass of the generator `net`: rows (B, ...) of teacher.conditions -> uint8 images (B, C, H, W).

    temperature 0 is argmax. seconds, a Counter, receives the time of the "tokens" and of the "pixels", the decoder's.
    """
    start = now(rows.device)
    z, x, cond = student_tokens(teacher, net, rows, init_ratio, noise, temperature, generator)
    if not torch.isfinite(z).all():
        raise UserError("the student's logits are not finite: its training diverged, take an earlier checkpoint")
    return to_pixels(teacher, x, cond, start, seconds)


class OneStep(nn.Module):
    """Student and decoder as one module, rows of teacher.conditions -> uint8 images; torch.manual_seed fixes the starts."""

    def __init__(self, teacher, net, **start):
        super().__init__()
        self.teacher, self.start = teacher, start
        self.net, self.tokenizer, self.text = net, teacher.tokenizer, teacher.text

    def forward(self, rows):
        _, x, cond = student_tokens(self.teacher, self.net, rows, **self.start)
        img = self.tokenizer.pixels(embed_tokens(x, *self.tokenizer.tables()), cond)          # in one piece, of any size
        return to_bytes(img.clamp(0, 1), self.teacher.spec)


@torch.no_grad()
def export(teacher, net, path, **start):
    """Write a OneStep as a file of torch.export: torch.export.load(path).module()(rows), for any batch from 2 on, without this code.

    It runs on the kind of device on which it was exported. Compared with the module itself before it is kept.
    """
    rows, model = teacher.conditions(["a photo"] * 3 if teacher.text else None)[:3], OneStep(teacher, net, **start).eval()
    draw = lambda run: (torch.manual_seed(0), run(torch.cat([rows, rows])))[1]
    with torch.random.fork_rng():
        images = draw(model)                          # first: what the networks keep from call to call must be real tensors
        program = torch.export.export(model, (rows,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},), strict=False)
        exported = draw(program.module())
    if not torch.equal(images, exported):
        raise UserError(f"--export {path}: the exported program draws other images than the student; nothing is written")
    try:
        with replacing(path) as f:
            torch.export.save(program, f)
    except OSError as err:
        raise UserError(f"--export {path}: cannot write there ({err.strerror})")


@torch.no_grad()
def generate_teacher(teacher, rows, steps, *, guidance=None, temperature=None, order=None, generator=None, seconds=None):
    """The multi-step teacher: rows (B, ...) of conditions -> uint8 images, with its published settings or these."""
    start, net, spec = now(rows.device), teacher.net, teacher.spec
    plan = spec.plan(net.L * net.G, steps, **spec.settings(steps, guidance=guidance, temperature=temperature))
    if order == "halton" and net.grid is None:
        raise UserError(f"--order halton needs a grid of tokens, and {spec.name}'s have no place in the image")
    order = halton_order(net.grid) if order == "halton" else None
    draws = lambda i: torch.rand(2, len(rows), net.L, net.G, generator=generator, device=rows.device)
    cond = teacher.cond(rows)
    return to_pixels(teacher, sample(net, cond, plan, order=order, draws=draws), cond, start, seconds)


def to_pixels(teacher, x, cond, start, seconds):
    """Tokens (B, L, G) -> uint8 images, truncated or rounded as the teacher's authors do; always decoded in float32."""
    middle = now(x.device)
    with torch.autocast(x.device.type, enabled=False):
        img = to_bytes(decode_tokens(teacher.tokenizer, x, cond), teacher.spec)
    if seconds is not None:
        seconds.update(tokens=middle - start, pixels=now(x.device) - middle)
    return img


def to_bytes(img, spec):
    """Images in [0, 1] -> uint8, truncated or rounded as the teacher's authors do."""
    return (img * 255 + spec.rounds / 2).to(torch.uint8)


def fixed_sample(make_images, conditions, n=10, seed=0):
    """n images, spread over the conditions, from starts that the seed fixes: what a sheet shows of each model."""
    generator = torch.Generator(conditions.device).manual_seed(seed)
    return make_images(torch.stack(spread(conditions, n)), generator=generator)


FILES = ("teacher_weights", "tokenizer_weights", "text_weights", "text_activation", "random_weights")
FLAGS = {"net": "--teacher_weights", "tokenizer": "--tokenizer_weights", "text": "--text_weights"}


def source(spec, role, path=None):
    """The path of a role's weights: as given, else the published file."""
    if path is None and role not in spec.files:
        raise UserError(f"{spec.name} has no published weights, it is there to try the code: add --random_weights, or "
                        f"name a file of your own by {FLAGS[role]} PATH")
    return path or fetch(*spec.files[role], FLAGS[role])


def build(spec, role, path=None, random_weights=False, text_activation=None):
    """The network of a role, net, tokenizer or text, with random weights or those of `path` or the published file."""
    make = {"net": spec.Net, "tokenizer": spec.Tokenizer, "text": TextTower}[role]
    sizes = dict(getattr(spec, role))
    if role == "text" and text_activation:
        sizes["quick_gelu"] = text_activation == "quick_gelu"
    if random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)                      # random weights are the same in every process and every run
            return make(**sizes)
    path = source(spec, role, path)
    config = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    if names := getattr(make, "published_config", None):          # a config.json beside the weights knows better
        sizes |= stated_sizes(config, names)
    with torch.device("meta"):                        # no time lost on initial values
        module = make(**sizes)
    return load_state(module.to_empty(device="cpu"), read_weights(path, role), path)


def stated_sizes(path, names):
    """What a published config.json (nested dicts) states, as our arguments: head counts are seen nowhere else."""
    def leaves(d):
        for k, v in d.items():
            yield from leaves(v) if isinstance(v, dict) else [(k, v)]
    if not os.path.isfile(path):
        return {}
    try:
        with open(path) as f:
            return {names[k]: v for k, v in leaves(json.load(f)) if k in names}
    except (ValueError, AttributeError) as err:
        raise UserError(f"cannot read {path} beside the weights ({err}): fetch it again, or remove it")


def load_teacher(name, teacher_weights=None, tokenizer_weights=None, random_weights=False, device="cpu",
                 text_weights=None, text_activation=None):
    """The frozen teacher called `name`, in eval mode: a Teacher(net, tokenizer, spec, text).

    Weights come from the given paths, else from `spec.files` (assets, or the hub); random_weights needs no file.
    text_activation: "gelu" or "quick_gelu", instead of the spec's.
    """
    if name not in SPECS:
        raise UserError(f"unknown teacher {name!r}: expected one of {', '.join(SPECS)}")
    spec, paths = SPECS[name], {"net": teacher_weights, "tokenizer": tokenizer_weights, "text": text_weights}
    for role in spec.roles:                           # complain before anything large is read
        random_weights or source(spec, role, paths[role])
    return assemble(spec, {role: build(spec, role, paths[role], random_weights, text_activation)
                           for role in spec.roles}, device)


def assemble(spec, modules, device="cpu"):
    """Networks by role -> the frozen Teacher on its device, with the unconditional condition prepared."""
    if isinstance(modules["tokenizer"].encoder, Encoder):
        modules["tokenizer"].to(memory_format=torch.channels_last)                            # a tenth faster
    teacher = Teacher(spec=spec, **{k: m.to(device).eval().requires_grad_(False) for k, m in modules.items()})
    if teacher.text is not None:
        teacher.net.null_text, teacher.net.null_pooled = teacher.cond(teacher.conditions([spec.negative]))[:2]
    return teacher


def load_student(path, name=None, device="cpu", **files):
    """A one-step generator from a file: (teacher, net, config), the net in eval mode.

    A checkpoint of train.py says in its config which teacher it has and how it starts, and its EMA weights are
    taken; config is {} for a bare state dict (an official Di[M]O student, a theta_0), which needs the teacher's name.
    files: the arguments of `load_teacher`, over those of the config.
    """
    state = read_weights(local(path))
    config = state.get("config", {}) if isinstance(state, dict) else {}
    if "ema" in state:
        state = state["ema"]
    name = config.get("teacher", name)
    if name is None:
        raise UserError(f"{path} is a bare state dict and does not name its teacher: add --teacher NAME")
    files = {k: files.get(k) or config.get(k) for k in ("teacher_weights", "tokenizer_weights", "random_weights",
                                                        "text_weights", "text_activation")}
    teacher = load_teacher(name, device=device, **files)
    net = copy.deepcopy(teacher.net)
    return teacher, load_state(net, state, path).eval().requires_grad_(False), config


QUALITY = ("worst quality, low quality, low res, blurry, distortion, watermark, logo, signature, text, "
           "jpeg artifacts, signature, sketch, duplicate, ugly, identifying mark")
MASKGIT, MEISSONIC = "llvictorll/Maskgit-pytorch", "MeissonFlow/Meissonic"
VQGAN_FILE = (MASKGIT, "pretrained_maskgit/VQGAN/last.ckpt")
MEISSONIC_VQ = dict(widths=(128, 256, 256, 512, 768), latent=64, embed=64, V=8192, attention=(), signed=False)
CLIP_L_336 = dict(width=768, heads=12, depth=12, out=768, quick_gelu=True)
MASKGEN_FILES = {"tokenizer": ("turkeyju/tokenizer_tatitok_bl128_vq", "model.safetensors"),
                 "text": ("timm/vit_large_patch14_clip_336.openai", "open_clip_model.safetensors")}
TINY_VQ = dict(widths=(16, 32, 32), blocks=1, latent=8, embed=8, V=64, norm_groups=8)
TINY_TEXT = dict(width=32, heads=2, depth=2, context=16)
SHAPES_CLIP = dict(embed_dim=128, vision_cfg=dict(image_size=32, patch_size=4, width=96, layers=3, head_width=32),
                   text_cfg=dict(context_length=16, vocab_size=341, width=64, heads=2, layers=3))
SHAPES_REWARD = dict(size=32, patch=4, vision=(64, 4, 2), text=(64, 2, 2), mlp=256, vocab=33, positions=16, head=(32, 16))
SPECS = {spec.name: spec for spec in (
    Spec("maskbit", MaskBit, dict(classes=1000), BitTokenizer, {}, maskbit_plan,
         {256: dict(guidance=5.8, temperature=10.3), 128: dict(guidance=7.1, temperature=9.0),
          64: dict(guidance=7.1, temperature=7.8)},
         image=(3, 256, 256), student=dict(init_ratio=0.6, noise=0.1, temperature=0.1),
         files={"net": ("markweber/maskbit_generator_14bit", "maskbit_generator_14bit.bin"),
                "tokenizer": ("markweber/maskbit_tokenizer_14bit", "maskbit_tokenizer_14bit.bin")}),
    Spec("maskgit", MaskGit, dict(classes=1000), VQTokenizer, {}, maskgit_plan,
         {8: dict(guidance=3.0, temperature=4.5)}, rounds=True, noise_scale=1.0,
         image=(3, 256, 256), student=dict(init_ratio=0.6, noise=0.1, temperature=12.0),
         files={"net": (MASKGIT, "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth"), "tokenizer": VQGAN_FILE}),
    Spec("maskgit-512", MaskGit, dict(classes=1000, grid=32), VQTokenizer, {}, maskgit_plan,
         {15: dict(guidance=2.8, temperature=7.0)}, rounds=True, noise_scale=1.0,
         image=(3, 512, 512), student=dict(init_ratio=0.6, noise=0.1, temperature=12.0),
         files={"net": (MASKGIT, "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_512.pth"), "tokenizer": VQGAN_FILE}),
    Spec("meissonic", Meissonic, {}, VQTokenizer, MEISSONIC_VQ, meissonic_plan,
         {64: dict(guidance=9.0, temperature=2.0)}, rounds=True, noise_scale=1.0,
         image=(3, 1024, 1024), student=dict(init_ratio=0.6, noise=0.3, temperature=0.5),
         text=dict(pads_with_bang=True), negative=QUALITY,
         files={"net": (MEISSONIC, "transformer/diffusion_pytorch_model.safetensors"),
                "tokenizer": (MEISSONIC, "vqvae/diffusion_pytorch_model.safetensors"),
                "text": (MEISSONIC, "text_encoder/model.safetensors")}),
    Spec("maskgen", MaskGen, {}, TATiTok, {}, maskgen_plan, {16: dict(guidance=12.0, temperature=2.0)},
         image=(3, 256, 256), student=dict(init_ratio=0.9, noise=0.1, temperature=1.0), text=CLIP_L_336,
         files={"net": ("turkeyju/generator_maskgen_vq_l", "model.safetensors"), **MASKGEN_FILES}),
    Spec("maskgen-xl", MaskGen, dict(width=1280, depth=20), TATiTok, {}, maskgen_plan,
         {16: dict(guidance=12.0, temperature=2.0)},
         image=(3, 256, 256), student=dict(init_ratio=0.9, noise=0.1, temperature=1.0), text=CLIP_L_336,
         files={"net": ("turkeyju/generator_maskgen_vq_xl", "model.safetensors"), **MASKGEN_FILES}),
    # The tiny ones. maskbit-tiny knows clothes (README, "The tiny world"); the others have no weights, for trying code.
    Spec("maskbit-tiny", MaskBit, dict(bits=10, grid=8, width=128, depth=4, heads=4, mlp=512, classes=10),
         BitTokenizer, dict(channels=1, hidden=32, mult=(1, 2, 2), blocks=1, bits=10, norm_groups=8), maskbit_plan,
         {16: dict(guidance=5.0, temperature=11.0)},
         image=(1, 32, 32), student=dict(init_ratio=0.6, noise=0.1, temperature=1.0),
         world="fashion", record="assets/fashion/teacher_steps.jsonl",
         files={"net": (None, "assets/fashion/teacher.safetensors"),
                "tokenizer": (None, "assets/fashion/tokenizer.safetensors")}),
    Spec("maskgit-tiny", MaskGit, dict(V=64, grid=8, width=64, depth=4, heads=4, mlp=128, classes=10),
         VQTokenizer, dict(TINY_VQ, attention=(2,)), maskgit_plan, {4: dict(guidance=3.0, temperature=4.5)},
         image=(3, 32, 32), student=dict(init_ratio=0.6, noise=0.1, temperature=1.0), rounds=True, noise_scale=1.0),
    Spec("meissonic-tiny", Meissonic,
         dict(V=512, table=520, grid=8, heads=4, head_width=32, joint=2, single=3, text_width=64, axes=(8, 12, 12),
              micro=(32, 32, 0, 0, 6.0)),
         VQTokenizer, dict(widths=(32, 64, 64), blocks=1, latent=16, embed=16, V=512, norm_groups=8, attention=(),
                           signed=False), meissonic_plan,
         {32: dict(guidance=2.5, temperature=2.0)}, rounds=True, noise_scale=1.0,
         image=(3, 32, 32), student=dict(init_ratio=0.985, noise=0.1, temperature=0.3),
         text=dict(width=64, heads=2, depth=3, out=128, vocab=341, context=16, pads_with_bang=True),
         files={"net": (None, "assets/shapes/teacher.safetensors"), "text": (None, "assets/shapes/clip.safetensors"),
                "tokenizer": (None, "assets/shapes/tokenizer.safetensors")},
         world="shapes", prompts="assets/shapes/prompts.txt", bert_vocab="assets/shapes/words.txt",
         rewards={"clip": ("assets/shapes/clip.safetensors", SHAPES_CLIP),
                  "imagereward": ("assets/shapes/imagereward.safetensors", SHAPES_REWARD)}),
    Spec("maskgen-tiny", MaskGen, dict(V=64, L=16, width=64, depth=3, heads=4, text_width=32, micro=16, spare=11),
         TATiTok, dict(V=64, L=16, size=32, patch=8, embed=8, enc=(32, 2, 2), dec=(48, 2, 4), text=16, text_width=32),
         maskgen_plan, {4: dict(guidance=12.0, temperature=2.0)},
         image=(3, 32, 32), student=dict(init_ratio=0.9, noise=0.1, temperature=1.0),
         text=dict(TINY_TEXT, out=32, quick_gelu=True)),
)}
