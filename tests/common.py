"""What several test files share: weights made from names, the names in published files, tiny runs."""

import functools
import hashlib
import inspect
import json
import math
import os
import re
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import soft_embed as se
import evaluate
import reward
import teachers
import train
from data import prompts
from metrics import geneval
from networks import autoencoders, blip, inception, titok, weights
from networks import clip as clip_net
from networks import text as text_net
from recipes import tiny as tiny_recipes
from data.tokens import load_tokens
from machinery.errors import UserError
from networks.autoencoders import BitTokenizer
from teachers import SPECS, MaskBit, Spec, load_teacher


# ======================================================================== weights and numbers to compare with
def seeded(shapes, seed=0):
    """Tensors for {name: shape}: normal noise, its stream seeded by the name, its scale by the role.

    Matrices, tables and kernels get fan-in scaling, gains are around 1, biases around 0.
    """
    state = {}
    for name, shape in shapes.items():
        stream = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
        t = torch.from_numpy(stream.standard_normal(shape).astype(np.float32))
        state[name] = t / math.prod(shape[1:]) ** 0.5 if t.ndim > 1 else 0.1 * t + float(name.endswith("weight"))
    return state


def agrees(t, first, abs_sum=None, tol=5e-5):
    """Assert the first entries of t within tol, and the sum of all absolute values to a millionth."""
    t = t.detach().double().flatten()
    error = (t[: len(first)] - torch.tensor(first, dtype=torch.float64)).abs().max()
    assert error < tol, f"first entries {t[: len(first)].tolist()} are {error:.1e} off"
    if abs_sum is not None:
        assert abs(t.abs().sum() / abs_sum - 1) < 1e-6, f"abs sum {t.abs().sum():.9g}, expected {abs_sum}"
close = functools.partial(torch.allclose, rtol=0, atol=1e-6)


def uniform(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).random_sample(shape))


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def integers(seed, high, *shape):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, high, shape))


# The names and shapes of the published files, as a function of the sizes.
def linear(name, c_in, c_out):
    return {f"{name}.weight": [c_out, c_in], f"{name}.bias": [c_out]}


def norm(name, c):
    return {f"{name}.weight": [c], f"{name}.bias": [c]}


def conv(name, c_in, c_out, k, bias=True):
    return {f"{name}.weight": [c_out, c_in, k, k]} | ({f"{name}.bias": [c_out]} if bias else {})


def attention(name, d):
    return {f"{name}.in_proj_weight": [3 * d, d], f"{name}.in_proj_bias": [3 * d]} | linear(f"{name}.out_proj", d, d)


def generator_file(bits=14, grid=16, width=1024, depth=24, mlp=4096, classes=1000):
    n, d = bits // 2, width
    shapes = {"pos_emb": [1, grid**2 + 1, d], "bits_to_indices": [n], "class_emb.weight": [classes + 1, d]}
    shapes |= linear("input_proj", bits, d) | norm("first_layer.0", d)
    for i in range(depth):
        attn, net = f"transformer.layers.{i}.0", f"transformer.layers.{i}.1"
        shapes |= attention(f"{attn}.mha", d) | norm(f"{attn}.norm", d)
        shapes |= linear(f"{net}.net.0", d, mlp) | linear(f"{net}.net.2", mlp, d) | norm(f"{net}.norm", d)
    shapes |= linear("last_layer.0", d, d) | norm("last_layer.2", d)
    return shapes | linear("prediction_layer", d, 2 * 2**n)


def tokenizer_file(bits=14, hidden=128, mult=(1, 1, 2, 2, 4)):
    def res_blocks(name, a, b):
        shapes = {}
        for j, (p, q) in enumerate([(a, b), (b, b)]):
            block = f"{name}.res_blocks.{j}"
            shapes |= norm(f"{block}.norm1", p) | conv(f"{block}.conv1", p, q, 3, False)
            shapes |= norm(f"{block}.norm2", q) | conv(f"{block}.conv2", q, q, 3, False)
            shapes |= conv(f"{block}.nin_shortcut", q, q, 1, False) if p != q else {}
        return shapes

    w, last = [hidden * m for m in (mult[0], *mult, mult[-1])], len(mult) - 1  # w[i + 1] is level i's width
    shapes = conv("encoder.conv_in", 3, hidden, 3, False) | conv("decoder.conv_in", bits, w[-1], 3)
    for i in range(last + 1):
        shapes |= res_blocks(f"encoder.down.{i}", w[i], w[i + 1])
        shapes |= res_blocks(f"decoder.up.{i}", w[last + 2 - i], w[last + 1 - i])
        if i < last:
            shapes |= conv(f"encoder.down.{i}.down_conv", w[i + 1], w[i + 1], 3)
            shapes |= conv(f"decoder.up.{i}.upsample_conv", w[last + 1 - i], w[last + 1 - i], 3)
    shapes |= res_blocks("encoder.mid", w[-1], w[-1]) | res_blocks("decoder.mid", w[-1], w[-1])
    shapes |= norm("encoder.norm_out", w[-1]) | conv("encoder.conv_out", w[-1], bits, 1)
    shapes |= norm("decoder.norm_out", hidden) | conv("decoder.conv_out", hidden, 3, 3)
    return shapes | {"quantize.bits_to_indices": [bits], "quantize.codebook": [2**bits, bits]}


def maskgit_file(V=1024, grid=16, width=768, depth=24, mlp=3072, classes=1000):
    d, entries = width, V + 1 + classes + 1
    shapes = {"pos_emb": [1, grid**2 + 1, d], "bias": [grid**2 + 1, entries], "tok_emb.weight": [entries, d]}
    for name in ("first_layer", "last_layer"):
        shapes |= norm(f"{name}.0", d) | linear(f"{name}.2", d, d) | norm(f"{name}.4", d)
    shapes |= linear("first_layer.6", d, d)
    for i in range(depth):
        attn, net = f"transformer.layers.{i}.0", f"transformer.layers.{i}.1"
        shapes |= norm(f"{attn}.norm", d) | attention(f"{attn}.fn.mha", d) | norm(f"{net}.norm", d)
        shapes |= linear(f"{net}.fn.net.0", d, mlp) | linear(f"{net}.fn.net.3", mlp, d)
    return shapes


def vqgan_file(widths=(128, 128, 256, 256, 512), latent=256, embed=256, V=1024, attn=True):
    def block(name, a, b):
        shapes = norm(f"{name}.norm1", a) | conv(f"{name}.conv1", a, b, 3) | norm(f"{name}.norm2", b)
        return shapes | conv(f"{name}.conv2", b, b, 3) | (conv(f"{name}.nin_shortcut", a, b, 1) if a != b else {})

    first, c, last, shapes = widths[0], widths[-1], len(widths) - 1, {}
    for side, ins, outs in (("encoder", 3, latent), ("decoder", latent, 3)):
        start, end = (first, c) if side == "encoder" else (c, first)
        shapes |= conv(f"{side}.conv_in", ins, start, 3) | conv(f"{side}.conv_out", end, outs, 3)
        shapes |= norm(f"{side}.norm_out", end)
        shapes |= block(f"{side}.mid.block_1", c, c) | block(f"{side}.mid.block_2", c, c)
    for i, w in enumerate(widths):
        before, after = widths[max(i - 1, 0)], widths[min(i + 1, last)]
        shapes |= block(f"encoder.down.{i}.block.0", before, w) | block(f"encoder.down.{i}.block.1", w, w)
        shapes |= block(f"decoder.up.{i}.block.0", after, w)                        # decoder levels: finest is 0 too
        shapes |= block(f"decoder.up.{i}.block.1", w, w) | block(f"decoder.up.{i}.block.2", w, w)
        shapes |= conv(f"encoder.down.{i}.downsample.conv", w, w, 3) if i < last else {}
        shapes |= conv(f"decoder.up.{i}.upsample.conv", w, w, 3) if i else {}
    for name in ("encoder.mid.attn_1", "decoder.mid.attn_1", *(f"encoder.down.{last}.attn.{j}" for j in range(2)),
                 *(f"decoder.up.{last}.attn.{j}" for j in range(3))) if attn else ():
        shapes |= norm(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            shapes |= conv(f"{name}.{part}", c, c, 1)
    shapes |= conv("quant_conv", latent, embed, 1) | conv("post_quant_conv", embed, latent, 1)
    return shapes | {"quantize.embedding.weight": [V, embed]}


def vqvae_file(widths=(128, 256, 256, 512, 768), latent=64, embed=64, V=8192):
    """The same autoencoder without attention, in the diffusers library's names, where decoders begin coarse."""
    def rename(key):
        key = re.sub(r"decoder\.up\.(\d)", lambda m: f"decoder.up_blocks.{len(widths) - 1 - int(m[1])}", key)
        for here, there in ((".mid.block_1", ".mid_block.resnets.0"), (".mid.block_2", ".mid_block.resnets.1"),
                            (".down.", ".down_blocks."), (".block.", ".resnets."), ("nin_shortcut", "conv_shortcut"),
                            (".downsample.", ".downsamplers.0."), (".upsample.", ".upsamplers.0."),
                            ("norm_out", "conv_norm_out")):
            key = key.replace(here, there)
        return key
    return {rename(k): v for k, v in vqgan_file(widths, latent, embed, V, attn=False).items()}


def joint_block(name, d, head=None, last=False):
    """A joint block in the diffusers library's names. head: width of its q and k norms; last: no way out for text."""
    shapes = linear(f"{name}.norm1.linear", d, 6 * d)
    shapes |= linear(f"{name}.norm1_context.linear", d, (2 if last else 6) * d)
    parts = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    for part in parts[: 8 - last]:
        shapes |= linear(f"{name}.attn.{part}", d, d)
    for part in ("q", "k", "added_q", "added_k") if head else ():
        shapes |= {f"{name}.attn.norm_{part}.weight": [head]}
    for ff in ("ff",) if last else ("ff", "ff_context"):
        shapes |= linear(f"{name}.{ff}.net.0.proj", d, 4 * d) | linear(f"{name}.{ff}.net.2", 4 * d, d)
    return shapes


def meissonic_file(V=8192, table=8256, heads=8, head_width=128, joint=14, single=28, text_width=1024):
    d = heads * head_width
    shapes = {f"{name}.weight": [d] for name in (
        "embed.layer_norm", "project_to_hidden_norm", "encoder_proj_layer_norm", "project_from_hidden_norm",
        "mlm_layer.layer_norm", "down_block.downsample.norm", "up_block.upsample.norm")}
    for name in ("project_to_hidden", "project_from_hidden", "cond_embed.linear_2"):
        shapes |= {f"{name}.weight": [d, d]}
    shapes |= {"cond_embed.linear_1.weight": [d, d + 5 * 256], "embed.embeddings.weight": [table, d]}
    shapes |= conv("embed.conv", d, d, 1, False)
    shapes |= conv("mlm_layer.conv1", d, d, 1, False) | conv("mlm_layer.conv2", d, V, 1, False)
    shapes |= conv("down_block.downsample.conv", d, d, 2, False) | conv("up_block.upsample.conv", d, d, 2, False)
    shapes |= linear("context_embedder", text_width, d)
    for name, n in (("timestep_embedder", 256), ("text_embedder", d)):
        shapes |= linear(f"time_text_embed.{name}.linear_1", n, d) | linear(f"time_text_embed.{name}.linear_2", d, d)
    for i in range(joint):
        shapes |= joint_block(f"transformer_blocks.{i}", d, head_width)
    for name in (f"single_transformer_blocks.{i}" for i in range(single)):
        shapes |= linear(f"{name}.norm.linear", d, 3 * d)
        shapes |= linear(f"{name}.proj_mlp", d, 4 * d) | linear(f"{name}.proj_out", 5 * d, d)
        for part in "qkv":
            shapes |= linear(f"{name}.attn.to_{part}", d, d)
        shapes |= {f"{name}.attn.norm_q.weight": [head_width], f"{name}.attn.norm_k.weight": [head_width]}
    return shapes


def maskgen_file(V=8192, L=128, width=1024, depth=16, text_width=768, micro=256, spare=1001):
    d = width
    shapes = {"pos_embed": [1, L, d], "embeddings.weight": [V + 1 + spare, d]}
    shapes |= linear("text_embed_proj", text_width, d) | linear("norm.linear", d, 2 * d)
    shapes |= linear("cond_pooled_proj", text_width + micro, d)
    for i in range(depth):
        shapes |= joint_block(f"blocks.{i}", d, last=i == depth - 1)
    return shapes


def clip_block(name, d):
    shapes = norm(f"{name}.ln_1", d) | attention(f"{name}.attn", d) | norm(f"{name}.ln_2", d)
    return shapes | linear(f"{name}.mlp.c_fc", d, 4 * d) | linear(f"{name}.mlp.c_proj", 4 * d, d)


def titok_file(V=8192, L=128, size=256, patch=16, embed=64, enc=(768, 12), dec=(1024, 24), text=77, text_width=768):
    places, shapes = (size // patch) ** 2, {"latent_tokens": [L, enc[0]], "quantize.embedding.weight": [V, embed]}
    for side, (d, depth, *_) in (("encoder", enc), ("decoder", dec)):
        shapes |= {f"{side}.class_embedding": [1, d], f"{side}.positional_embedding": [places + 1, d],
                   f"{side}.latent_token_positional_embedding": [L, d]}
        shapes |= norm(f"{side}.ln_pre", d) | norm(f"{side}.ln_post", d)
        for i in range(depth):
            shapes |= clip_block(f"{side}.transformer.{i}", d)
    shapes |= conv("encoder.patch_embed", 3, enc[0], patch) | conv("encoder.conv_out", enc[0], embed, 1)
    shapes |= {"decoder.mask_token": [1, 1, d], "decoder.text_guidance_positional_embedding": [text, d]}
    shapes |= linear("decoder.text_guidance_proj", text_width, d) | linear("decoder.decoder_embed", embed, d)
    return shapes | conv("decoder.ffn.0", d, 3 * patch**2, 1) | conv("decoder.conv_out", 3, 3, 3)


def clip_file(width=1024, depth=24, out=1024, vocab=49408, context=77):
    """A text tower as the transformers library writes it."""
    d, table = width, "text_model.embeddings.{}_embedding.weight"
    shapes = {table.format("token"): [vocab, d], table.format("position"): [context, d]}
    shapes |= {"text_projection.weight": [out, d]}
    for name in (f"text_model.encoder.layers.{i}" for i in range(depth)):
        shapes |= norm(f"{name}.layer_norm1", d) | norm(f"{name}.layer_norm2", d)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{name}.self_attn.{part}", d, d)
        shapes |= linear(f"{name}.mlp.fc1", d, 4 * d) | linear(f"{name}.mlp.fc2", 4 * d, d)
    return shapes | norm("text_model.final_layer_norm", d)


def open_clip_file(width=768, depth=12, out=768, vocab=49408, context=77):
    """A text tower as open_clip writes it."""
    shapes = {"positional_embedding": [context, width], "text_projection": [width, out], "logit_scale": [],
              "token_embedding.weight": [vocab, width]} | norm("ln_final", width)
    for i in range(depth):
        shapes |= clip_block(f"transformer.resblocks.{i}", width)
    return shapes


def shapes_in(file, sizes):
    """file(**sizes), but for those sizes that no file shows: head counts above all."""
    known = inspect.signature(file).parameters
    return file(**{k: v for k, v in sizes.items() if k in known})


def filled(make, file, seed=0, **sizes):
    """The network make(**sizes) on seeded weights that come through its published file."""
    with torch.device("meta"):
        net = make(**sizes)
    net = weights.load_state(net.to_empty(device="cpu"), seeded(shapes_in(file, sizes), seed), "seeded")
    return net.eval().requires_grad_(False)


@functools.cache
def small_net():
    """A MaskBit generator of 8 bits on a 4x4 grid, seeded."""
    return filled(MaskBit, generator_file, bits=8, grid=4, width=64, depth=3, heads=4, mlp=256, classes=10)


@functools.cache
def small_tokenizer():
    """Its tokenizer, 64x64 pixels to 4x4 tokens of 8 bits, seeded."""
    return filled(BitTokenizer, tokenizer_file, bits=8, hidden=64)
SIZES = dict(bits=4, grid=2, width=8, depth=2, mlp=16, classes=3)


def mini_net():
    return teachers.MaskBit(heads=2, **SIZES)


def half_masked_tokens():
    """Tokens and labels of most golden entries; the third sample is unconditional (class 10 of 10)."""
    x = integers(10, 16, 3, 16, 2).masked_fill(uniform(11, 3, 16, 2) < 0.5, 16)
    return x, (torch.tensor([3, 7, 10]),)


def run_with_hooks(net, e, cond):
    """(input of the first LayerNorm, [output of each block], logits) of a MaskBit, all L+1 positions."""
    first, hidden = [], []
    handles = [net.norm_in.register_forward_pre_hook(lambda m, args: first.append(args[0]))]
    handles += [b.register_forward_hook(lambda m, args, out: hidden.append(out)) for b in net.blocks]
    z = net(e, cond)
    for h in handles:
        h.remove()
    return first[0], hidden, z


class TableNet:
    """Fixed logits z_c (B, L, G, V), z_u without the condition; remembers the batch sizes it has seen."""

    def __init__(self, z_c, z_u):
        self.z_c, self.z_u, self.calls, (_, self.L, self.G, self.V) = z_c, z_u, [], z_c.shape

    def tables(self):
        return torch.zeros(self.G, self.V + 1, 1), 0.0

    def at(self, cond, t):
        return cond

    def null(self, cond):
        return (torch.full_like(cond[0], -1),)

    def __call__(self, e, cond):
        self.calls.append(len(e))
        rows = torch.arange(len(e)) % len(self.z_c)
        return torch.where((cond[0] < 0)[:, None, None, None], self.z_u[rows], self.z_c[rows])
# ========================================================================================== teachers: MaskGit
MASKGIT = dict(V=32, grid=4, width=48, depth=2, heads=4, mlp=96, classes=10)
# ======================================================================================== teachers: Meissonic
MEISSONIC = dict(V=64, table=80, heads=4, head_width=16, joint=2, single=3, text_width=48, axes=(4, 6, 6))
# ========================================================================================== teachers: MaskGen
MASKGEN = dict(V=40, L=12, width=48, depth=3, heads=4, text_width=32, micro=16, spare=11)
TITOK = dict(V=40, L=12, size=16, patch=4, embed=8, enc=(32, 2, 4), dec=(48, 3, 4), text=9, text_width=32)
# ============================================================================== teachers: what all four share
TINY = ("maskbit-tiny", "maskgit-tiny", "meissonic-tiny", "maskgen-tiny")
tiny_teacher = functools.cache(functools.partial(load_teacher, random_weights=True))


def tiny_inputs(name):
    """A teacher with random weights, half masked tokens, their embedding, and a condition; batch of 2."""
    teacher = tiny_teacher(name)
    net, rows = teacher.net, teacher.conditions(["a cat", "two dogs on a red boat"])[:2]
    x = integers(0, net.V, 2, net.L, net.G).masked_fill(uniform(1, 2, net.L, net.G) < 0.5, net.V)
    return teacher, x, se.embed_tokens(x, *net.tables()), teacher.cond(rows)


# ========================================================================= teachers: published files, loading
def fingerprint(shapes):
    return hashlib.sha256("\n".join(sorted(f"{k} {list(s)}" for k, s in shapes.items())).encode()).hexdigest()


def refusal(module, state, source="some.bin"):
    """The sentence with which a file is refused; the module stays as it was."""
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(UserError) as err:
        weights.load_state(module, state, source)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items()), "nothing is half loaded"
    return str(err.value)
VQ = dict(widths=(8, 16), latent=8, embed=4, V=6, norm_groups=4)
SMALL = {  # class, published file, and sizes of a small one
    "MaskGit": (teachers.MaskGit, maskgit_file, MASKGIT),
    "VQGAN": (autoencoders.VQTokenizer, vqgan_file, dict(VQ, attention=(1,))),
    "VQ-VAE": (autoencoders.VQTokenizer, vqvae_file, dict(VQ, attention=(), signed=False)),
    "Meissonic": (teachers.Meissonic, meissonic_file, MEISSONIC),
    "MaskGen": (teachers.MaskGen, maskgen_file, MASKGEN),
    "TATiTok": (titok.TATiTok, titok_file, TITOK),
    "TextTower": (text_net.TextTower, clip_file, dict(width=32, heads=2, depth=2, out=48, vocab=64, context=9)),
}


def empty(name):
    """A small network of its class, its weights of no meaning."""
    make, _, sizes = SMALL[name]
    return make(**sizes)
# ================================================================================================= gan.py
NANO = Spec("nano", MaskBit, dict(bits=6, grid=4, width=32, depth=3, heads=2, mlp=64, classes=3),
            BitTokenizer, dict(channels=1, hidden=8, mult=(1, 2), blocks=1, bits=6, norm_groups=4),
            teachers.maskbit_plan, {4: dict(guidance=1.0, temperature=1.0)}, image=(1, 8, 8),
            student=dict(init_ratio=0.6, noise=0.1, temperature=1.0))


# =============================================================================== the rewards' published files
def clip_reward_file(vision=1280, layers=32, patch=14, size=224, out=1024, text=(1024, 24), vocab=49408, context=77):
    """A CLIP as open_clip writes it: ViT-H-14, under which name laion's and HPSv2's weights are published."""
    shapes = {"visual.class_embedding": [vision], "visual.positional_embedding": [(size // patch) ** 2 + 1, vision],
              "visual.proj": [vision, out]} | conv("visual.conv1", 3, vision, patch, False)
    shapes |= norm("visual.ln_pre", vision) | norm("visual.ln_post", vision)
    for i in range(layers):
        shapes |= clip_block(f"visual.transformer.resblocks.{i}", vision)
    return shapes | open_clip_file(*text, out, vocab, context)


def pickscore_file(vision=1280, layers=32, patch=14, size=224, out=1024, text=(1024, 24), vocab=49408, context=77):
    """The same as the transformers library writes it, less the position_ids."""
    side, rename = clip_file(vision, layers, out, vocab, (size // patch) ** 2 + 1), {
        "text_model.embeddings.position_": "vision_model.embeddings.position_", "text_model.enc": "vision_model.enc"}
    shapes = clip_file(*text, out, vocab, context) | {"logit_scale": [], "visual_projection.weight": [out, vision],
                                                      "vision_model.embeddings.class_embedding": [vision]}
    for old, new in rename.items():
        shapes |= {k.replace(old, new): v for k, v in side.items() if k.startswith(old)}
    shapes |= conv("vision_model.embeddings.patch_embedding", 3, vision, patch, False)
    return shapes | norm("vision_model.pre_layrnorm", vision) | norm("vision_model.post_layernorm", vision)


def imagereward_file(vision=(1024, 24), size=224, patch=16, text=(768, 12), mlp=3072, vocab=30524, positions=512):
    (D, depth), (d, layers), v, t = vision, text, "blip.visual_encoder", "blip.text_encoder"
    shapes = {f"{v}.cls_token": [1, 1, D], f"{v}.pos_embed": [1, (size // patch) ** 2 + 1, D]}
    shapes |= conv(f"{v}.patch_embed.proj", 3, D, patch) | norm(f"{v}.norm", D)
    for block in (f"{v}.blocks.{i}" for i in range(depth)):
        shapes |= norm(f"{block}.norm1", D) | norm(f"{block}.norm2", D)
        shapes |= linear(f"{block}.attn.qkv", D, 3 * D) | linear(f"{block}.attn.proj", D, D)
        shapes |= linear(f"{block}.mlp.fc1", D, 4 * D) | linear(f"{block}.mlp.fc2", 4 * D, D)
    shapes |= {f"{t}.embeddings.word_embeddings.weight": [vocab, d], f"{t}.embeddings.position_ids": [1, positions],
               f"{t}.embeddings.position_embeddings.weight": [positions, d]} | norm(f"{t}.embeddings.LayerNorm", d)
    for layer in (f"{t}.encoder.layer.{i}" for i in range(layers)):
        for part, source in (("attention", d), ("crossattention", D)):
            shapes |= linear(f"{layer}.{part}.self.query", d, d) | linear(f"{layer}.{part}.self.key", source, d)
            shapes |= linear(f"{layer}.{part}.self.value", source, d) | linear(f"{layer}.{part}.output.dense", d, d)
            shapes |= norm(f"{layer}.{part}.output.LayerNorm", d)
        shapes |= linear(f"{layer}.intermediate.dense", d, mlp) | linear(f"{layer}.output.dense", mlp, d)
        shapes |= norm(f"{layer}.output.LayerNorm", d)
    shapes |= linear("blip.vision_proj", D, 256) | linear("blip.text_proj", d, 256)
    for i, (a, b) in zip((0, 2, 4, 6, 7), ((d, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))):
        shapes |= linear(f"mlp.layers.{i}", a, b)
    return shapes
# ==================================================================================== reward.py: golden numbers
CLIP = dict(embed_dim=32, vision_cfg=dict(image_size=56, layers=3, width=40, head_width=20, patch_size=14),
            text_cfg=dict(context_length=16, vocab_size=64, width=48, heads=4, layers=3))
CLIP_FILE = dict(vision=40, layers=3, size=56, out=32, text=(48, 3), vocab=64, context=16)
BLIP = dict(size=56, patch=14, vision=(48, 3, 4), text=(32, 3, 4), mlp=128, vocab=70, positions=40)
BLIP_FILE = dict(BLIP, vision=(48, 3), text=(32, 3))
CLIP_IDS = torch.tensor([[62, 5, 9, 17, 33, 63, *[0] * 10], [62, 40, 7, 63, *[0] * 12]])
BLIP_IDS = torch.tensor([[2, 11, 23, 5, 41, 60, 3, *[0] * 5], [2, 33, 9, 3, *[0] * 8]])


def reward_file(name):
    return {"imagereward": imagereward_file(**BLIP_FILE), "pickscore": pickscore_file(**CLIP_FILE)}.get(
        name, clip_reward_file(**CLIP_FILE))


def new_reward(name):
    """An empty small reward, made as load_rewards makes them: without initial values."""
    with torch.device("meta"):
        model = blip.ImageReward(**BLIP) if name == "imagereward" else clip_net.ClipReward(CLIP, name)
    return model.to_empty(device="cpu")


@functools.cache
def small_reward(name):
    """A small frozen reward on seeded weights, which come through the published names."""
    return weights.load_state(new_reward(name), seeded(reward_file(name)), name).eval().requires_grad_(False)


def ids_of(name):
    return BLIP_IDS if name == "imagereward" else CLIP_IDS


def rewards_of(*names, **kw):
    """load_rewards at small sizes with random weights, CLIP's full vocabulary folded into 64 entries."""
    configs = {n: dict(BLIP, vocab=200) if n == "imagereward" else CLIP for n in names}
    return reward.load_rewards(list(names), random_weights=True, configs=configs, **kw)
ASKED = ["a cat", "two dogs on a red boat", "rain", "an apple!", "blue"]


def eq9_inputs(name, B=3):
    """A tiny teacher's tokenizer and condition, logits, prompts, and SEED's two rewards."""
    teacher, x, _, cond = tiny_inputs(name)
    E, _ = teacher.tokenizer.tables()
    torch.manual_seed(0)
    z = 3 * torch.randn(B, x.shape[1], len(E), E.shape[1] - 1)
    return z, teacher.tokenizer, tuple(c[torch.arange(B) % 2] for c in cond), ASKED[:B]
seed = lambda n: torch.Generator().manual_seed(n)


# ================================================================================================== data/
# Real tokens: written once by the scripts of data/, killed at any moment, read back by train.py as memory maps.
def load(path):
    """(tokens, labels, meta) through train.py's own reader."""
    meta = None if str(path).endswith(".npz") else json.loads((path / "meta.json").read_text())
    return *load_tokens(str(path), tiny_teacher("maskbit-tiny"))[:2], meta


# ========================================================================================= data/prompts.py
def listed(tmp_path, name, content, *flags):
    """What becomes of a source file: the lines of prompts.txt."""
    source, out = tmp_path / name, tmp_path / "out.txt"
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    prompts.main(prompts.parser().parse_args([str(source), "--out", str(out), *flags]))
    return out.read_bytes().decode().split("\n")[:-1]


# ------------------------------------------------------------------------------------------ generation
@pytest.fixture(scope="module")
def tiny():
    return teachers.load_teacher("maskbit-tiny", random_weights=True)


# =============================================================================================== train.py
def nano_run(folder, **kw):
    """Settings of a run of some seconds: nano teacher with random weights, nano real tokens."""
    SPECS["nano"] = NANO
    tiny_recipes.RECIPES["nano"] = dict(teacher="nano", batch=8, steps=6, lr=1e-3, ema=0.9, warmup=2, gan=True, w_gan=1.0, gan_start=0, heads=2,
                                 head_width=16, head_mlp=16, log_every=1, save_every=2, eval_every=0, n_eval=0,
                                 random_weights=True, data=os.path.join(folder, "data.npz"), device="cpu", dtype="fp32")
    rng = np.random.default_rng(0)
    if not os.path.exists(os.path.join(folder, "data.npz")):
        np.savez(os.path.join(folder, "data.npz"), tokens=rng.integers(0, 8, (30, 16, 2)).astype(np.uint8),
                 labels=rng.integers(0, 3, 30).astype(np.uint8))
    given = {"teacher": "nano", "out": os.path.join(folder, "run"), **kw}
    return train.settle(given, train.flags()[1])


def run(folder, **kw):
    """Train in `folder`; the checkpoint."""
    c = nano_run(folder, **kw)
    train.train(c)
    return torch.load(os.path.join(c.out, "ckpt.pt"), weights_only=True)


def same(a, b):
    """Nested dicts, lists and tensors equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b
NETS = ("student", "aux", "disc", "ema", "optimizers", "step")


def other_world(folder, name):
    """Real tokens for a tiny teacher, made up; a text teacher's come with prompts."""
    os.makedirs(folder, exist_ok=True)
    rng, spec = np.random.RandomState(0), SPECS[name]
    net = load_teacher(name, random_weights=True).net
    np.save(f"{folder}/tokens.npy", rng.randint(0, net.V, (20, net.L, net.G)).astype(np.uint8))
    np.save(f"{folder}/labels.npy", rng.randint(0, 5, 20).astype(np.uint16))
    with open(f"{folder}/prompts.txt", "w") as f:
        f.write("a red circle\ntwo dogs!\na fox\na\n\n" if spec.text else "")
    with open(f"{folder}/meta.json", "w") as f:
        json.dump({"V": net.V, "complete": True}, f)
    return folder


def one_of_two(rank, folder, port, *runs):
    """Process `rank` of two: the nano runs with these settings, one after the other."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for kw in runs:
        train.train(nano_run(folder, **kw))


# ========================================================================== GenEval: is it what was asked for?
def judge(tag, include, exclude, seen):
    """The verdict on {class: [(box, score, color), ...]}; include and exclude are [(class, count, more), ...]."""
    clauses = lambda part: [{"class": c, "count": n, **dict(*more)} for c, n, *more in part]
    metadata = dict(tag=tag, include=clauses(include), exclude=clauses(exclude))
    color = lambda box, name: next(c for b, _, c in seen[name] if b == box)
    return geneval.verdict(metadata, {name: [found[:2] for found in boxes] for name, boxes in seen.items()}, color)
A, B, C, D = (1, 1, 9, 9), (0, 0, 5, 5), (6, 6, 9, 9), (1, 1, 2, 2)
LEFT, ABOVE, BELOW = ([("dog", 1), ("cat", 1, {"position": [name, 0]})] for name in ("left of", "above", "below"))


def command(folder, *flags):
    """The rows that a command appends."""
    evaluate.main(evaluate.flags().parse_args([*map(str, flags), "--random_weights", "--device", "cpu", "--out", f"{folder}/out"]))
    return [json.loads(line) for line in open(f"{folder}/out/results.jsonl")]


# ============================================================================================= the Inception network
def inception_file():
    """{key: shape} of the published plain file, without the counts of batches."""
    with torch.device("meta"):
        return {k.removeprefix("layers."): list(v.shape) for k, v in inception.Inception().state_dict().items()}


def inception_state():
    state = seeded(inception_file())                  # variances are 1 + 0.1 |noise|; kernels times 1.5, or 94 ReLUs kill
    for name, t in state.items():
        if name.endswith("running_var"):
            t.abs_().add_(1)
    return {name: 1.5 * t if t.ndim == 4 else t for name, t in state.items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("inception") / "plain.pth")
    counts = {k.replace("running_mean", "num_batches_tracked"): torch.tensor(7) for k in inception_file() if "mean" in k}
    torch.save(inception_state() | counts, path)      # one file with the counts, one without: both are about
    return path


def photos(folder, n=24, shift=0, kind="png"):
    """Pictures of unequal sizes, the third gray, the fourth of 16 bits, one in a subfolder; noise of 0 to 199."""
    (folder / "sub").mkdir(parents=True)
    for i in range(n):
        rng = np.random.RandomState(i)
        tint = rng.randint(0, 150, 3)
        img = (rng.randint(0, 50, (20 + 7 * (i % 3), 31 + 5 * (i % 2), 3)) + tint + shift).astype(np.uint8)
        if i == 2:
            img = img[:, :, 0]
        if i == 3:
            img = img[:, :, 0].astype(np.uint16) * 256 + 99
        Image.fromarray(img).save(folder / ("sub" if i == 5 else ".") / f"{i:02d}.{kind}")
    return str(folder)


# ================================================================================= sweeps and the paper's own numbers
def student(T, fid, model="student a"):
    return dict(model=model, kind="student", teacher="maskbit", steps=1, temperature=T, n=50_000, fid=fid)


def lines(path):
    return sum(1 for _ in open(path)) if os.path.exists(path) else 0
