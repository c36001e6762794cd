"""The claims of this repository as proofs: `pytest test_all.py`. CPU, no network, every run the same.

Expected numbers ("golden") were measured on the public implementations of the four teachers and of Di[M]O, at small
sizes and on weights that `seeded` makes from names and shapes alone: so two programs are compared without a download.

    FULL_SIZE=1 pytest test_all.py -k full_size    # MaskBit at its published size too: a minute, 4 GB of memory
"""

import copy
import csv
import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import runpy
import struct
import subprocess
import sys
import threading
import time
import types
import unicodedata
import weakref
import zlib

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dimo
import evaluate as ev
import gan
import reward
import soft_embed as se
import teachers
import train
import tteo
from data import benchmarks, fashion, imagenet, inception, prompts, shapes, weights
from data.tiny import mdm_loss, tokenizer_loss
from data.tokens import TextFeatures, describe, load_tokens
from data.weights import ROOT, UserError
from teachers import SPECS, BitTokenizer, MaskBit, Spec, load_teacher


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


def f32(a):
    return torch.from_numpy(np.asarray(a, dtype=np.float32))


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


def enumerate_tokens(L, G, V):
    """All V^(L*G) token arrays, (V^(L*G), L, G)."""
    return torch.tensor(list(itertools.product(range(V), repeat=L * G))).view(-1, L, G)


# ============================================================================================ soft embeddings
def test_soft_embedding_of_one_hot_logits_is_the_hard_embedding_bit_for_bit():
    any_table, any_bias = normal(0, 1, 12, 20), normal(1, 20)
    for E, bias in [(any_table, any_bias), small_net().tables(), small_tokenizer().tables()]:
        x, V = integers(2, E.shape[1] - 1, 5, 16, len(E)), E.shape[1] - 1
        z, mask = 1e4 * F.one_hot(x, V).float(), uniform(3, *x.shape) < 0.5
        assert torch.equal(se.soft_embed(z, E, bias), se.embed_tokens(x, E, bias))
        assert torch.equal(se.soft_embed(z, E, bias, mask), se.embed_tokens(x.masked_fill(mask, V), E, bias))


def test_masked_units_become_the_mask_row_and_pass_no_gradient():
    E, bias, mask = normal(0, 2, 6, 8), normal(1, 8), uniform(2, 3, 4, 2) < 0.5
    z = normal(3, 3, 4, 2, 5).requires_grad_()
    se.soft_embed(z, E, bias, mask).square().sum().backward()
    assert (z.grad[mask] == 0).all() and (z.grad[~mask].abs().sum(-1) > 0).all()
    everything = se.soft_embed(z, E, bias, torch.ones_like(mask))
    assert close(everything, (E[0, -1] + E[1, -1] + bias).expand_as(everything))


def test_probabilities_of_the_mask_itself_weigh_its_row():
    E, p = normal(0, 1, 6, 8), normal(1, 2, 3, 1, 6).softmax(-1)                    # V+1 entries, as MaskGit's
    assert close(se.embed_probs(p, E), p[:, :, 0] @ E[0])


def test_gradient_is_exact_for_linear_f():
    E, w = normal(0, 2, 4, 5), normal(1, 2, 5)                                      # L = 2, G = 2, V = 3
    z = normal(2, 1, 2, 2, 3).requires_grad_()
    x = enumerate_tokens(2, 2, 3)                                                   # (81, 2, 2)
    p = z.softmax(-1).expand(81, 2, 2, 3).gather(-1, x[..., None]).flatten(1).prod(1)  # (81,) joint
    truth = (p * (se.embed_tokens(x, E) * w).sum((1, 2))).sum()
    surrogate = (se.soft_embed(z, E) * w).sum()
    assert abs(truth - surrogate) < 1e-6
    assert close(*(torch.autograd.grad(f, z)[0] for f in (truth, surrogate)))


def test_eq_5_bias_is_half_the_trace_of_curvature_times_covariance():
    E, A = normal(0, 1, 17, 6), normal(1, 6, 6)
    H = A + A.T
    f = lambda e: 0.5 * (e @ H * e).sum(-1)
    last = math.inf
    for sharpness in (1, 3, 9, 27):
        z = sharpness * normal(2, 1, 1, 1, 16)
        p, e = z.softmax(-1).flatten(), se.soft_embed(z, E)[0, 0]
        S = torch.einsum("v,vi,vj->ij", p, E[0, :16] - e, E[0, :16] - e)
        bias = (p * f(E[0, :16])).sum() - f(e)
        assert abs(bias - 0.5 * (H @ S).trace()) < 2e-5
        C = torch.linalg.eigvalsh(H).abs().max()
        assert abs(bias) <= C / 2 * S.trace() + 1e-5                                # Eq. (5)
        assert S.trace() < last, "the sharper the logits, the tighter the bound"
        last = S.trace()
    assert last < 1e-3


def test_two_groups_and_a_flat_vocabulary_agree_where_they_mean_the_same():
    tok = teachers.BitTokenizer(hidden=32, mult=(1,), blocks=1)                     # 14 bits, two groups of 128
    E, bias = tok.tables()
    flat = F.pad(teachers.bits_of(torch.arange(2**14), 14), (0, 0, 0, 1))[None]     # (1, 16384 + 1, 14)
    z = 2 * normal(0, 2, 3, 2, 128)
    joint = (z[..., 1, :, None] + z[..., 0, None, :]).flatten(-2)[:, :, None]       # t = g0 + 128 g1
    assert close(se.soft_embed(z, E, bias), se.soft_embed(joint, flat), atol=5e-6)


def test_tau_divides_the_logits():
    E, z = normal(0, 2, 6, 8), normal(1, 3, 4, 2, 5)
    assert close(se.soft_embed(z, E, tau=0.25), se.soft_embed(4 * z, E))
    assert close(se.soft_embed(z, E, tau=1e-4), se.embed_tokens(z.argmax(-1), E))
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    assert close(se.gumbel_embed(z, E, tau=0.25, noise=noise), se.soft_embed(4 * (z + noise), E))


def test_soft_embedding_is_float32_under_bf16_autocast():
    E, z = normal(0, 1, 1025, 8), normal(1, 2, 3, 1, 1024)
    with torch.autocast("cpu", torch.bfloat16):
        e = se.soft_embed(z.bfloat16(), E.bfloat16())
    assert e.dtype == torch.float32
    assert close(e, se.soft_embed(z.bfloat16().float(), E.bfloat16().float()))


def test_gumbel_without_noise_is_the_soft_embedding():
    E, z, mask = normal(0, 2, 6, 8), normal(1, 3, 4, 2, 5), uniform(2, 3, 4, 2) < 0.5
    without = se.gumbel_embed(z, E, 0.5, mask, 0.7, torch.zeros_like(z))
    assert torch.equal(without, se.soft_embed(z, E, 0.5, mask, 0.7))


def test_gumbel_noise_makes_argmax_a_draw_from_the_softmax():
    z = normal(0, 6)
    noise = se.gumbel_noise((40000, 6), generator=torch.Generator().manual_seed(0))
    freq = torch.bincount((z + noise).argmax(-1), minlength=6) / 40000
    assert close(freq, z.softmax(-1), atol=0.01) and noise.isfinite().all()
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.std() - math.pi / 6**0.5) < 0.02


def test_straight_through_is_hard_forward_and_gumbel_backward():
    E, mask, w = normal(0, 2, 6, 8), uniform(2, 3, 4, 2) < 0.3, normal(4, 3, 4, 8)
    z, noise = normal(1, 3, 4, 2, 5).requires_grad_(), normal(3, 3, 4, 2, 5)
    hard = se.straight_through_embed(z, E, 0.5, mask, 0.7, noise)
    x = (z + noise).argmax(-1).masked_fill(mask, 5)
    assert close(hard, se.embed_tokens(x, E, 0.5))
    soft = se.gumbel_embed(z, E, 0.5, mask, 0.7, noise)
    assert close(*(torch.autograd.grad((e * w).sum(), z)[0] for e in (hard, soft)))


def test_reinforce_is_unbiased_over_all_tokens():
    z, x = normal(0, 1, 2, 2, 3).requires_grad_(), enumerate_tokens(2, 2, 3)
    many = z.detach().expand(81, 2, 2, 3).clone().requires_grad_()
    p = z.softmax(-1).expand(81, 2, 2, 3).gather(-1, x[..., None]).flatten(1).prod(1)  # (81,)
    f = normal(1, 81)                                                               # any function of the tokens
    truth = torch.autograd.grad((p * f).sum(), z)[0][0]
    each = 81 * torch.autograd.grad(se.reinforce(many, x, f), many)[0]              # (81, 2, 2, 3): f grad log p
    assert close((p.detach()[:, None, None, None] * each).sum(0), truth)


def test_given_uniforms_decide_the_tokens_by_the_cumulative_rule():
    z, u = 2 * normal(0, 3, 4, 2, 5), uniform(1, 3, 4, 2)
    x = se.sample_tokens(z, 0.7, u)
    steps = (z / 0.7).softmax(-1).double().cumsum(-1)
    for i in np.ndindex(3, 4, 2):
        assert x[i] == min(int(np.searchsorted(steps[i].numpy(), u[i].item(), side="right")), 4)
    almost_one = torch.full((100, 1, 1), 1 - 1e-12, dtype=torch.float64)            # rounded p often sum to less
    assert se.sample_tokens(normal(2, 100, 1, 1, 50), u=almost_one).max() == 49


def test_sampled_frequencies_are_the_softmax_and_temperature_zero_is_argmax():
    N, z = 5000, normal(0, 1, 1, 1, 7)
    grid = ((torch.arange(N) + 0.5) / N).view(N, 1, 1)                              # every quantile once
    for temperature in (1.0, 3.0):
        x = se.sample_tokens(z.expand(N, 1, 1, 7), temperature, grid)
        freq = torch.bincount(x.flatten(), minlength=7) / N
        assert close(freq, (z / temperature).softmax(-1).flatten(), atol=1.5 / N)
    torch.manual_seed(0)
    freq = torch.bincount(se.sample_tokens(z.expand(20000, 1, 1, 7)).flatten(), minlength=7) / 20000
    assert close(freq, z.softmax(-1).flatten(), atol=0.015)                # and with its own uniforms
    assert torch.equal(se.sample_tokens(z, 0), z.argmax(-1))


def test_concentration_of_known_distributions():
    entropy, top1 = se.concentration(torch.zeros(2, 3, 2, 8))
    assert abs(entropy - math.log(8)) < 1e-6 and abs(top1 - 1 / 8) < 1e-6
    entropy, top1 = se.concentration(torch.tensor([0.7, 0.2, 0.1]).log().view(1, 1, 1, 3))
    assert abs(entropy - 0.801819) < 1e-5 and abs(top1 - 0.7) < 1e-6


def test_teacher_fed_soft_tokens_gives_the_golden_logits():
    z, mask = 3 * normal(12, 3, 16, 2, 16), uniform(13, 3, 16, 2) < 0.5
    net = small_net()
    first, _, logits = run_with_hooks(net, se.soft_embed(z, *net.tables(), mask), half_masked_tokens()[1])
    agrees(first, [0.3112896, -0.1164358, 0.8452866, 0.7128058, 1.536242, 0.2294082], 1053.83687)
    agrees(logits, [-0.8597666, 0.3805242, -0.8862616, 0.8370671, 1.13025, 0.7418389], 1339.17286)


def test_decoder_fed_soft_tokens_gives_the_golden_image():
    z, tok = 3 * normal(12, 3, 16, 2, 16)[:2], small_tokenizer()
    img = tok.decode(se.soft_embed(z, *tok.tables()), clamp=False)
    agrees(img, [-0.1725584, -0.3846125, -0.5363255, -0.6236732, -0.6844736, -0.6414636], 13561.109)


# ========================================================================= Di[M]O: masks, starts and guidance
U = [0.0, 0.01, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 0.99, 0.9999]
MASKED_OF_256 = {  # golden: masked positions of 256 at each of U
    "linear": [1, 3, 26, 64, 77, 128, 179, 192, 230, 253, 256],
    "square": [1, 1, 3, 16, 23, 64, 125, 144, 207, 251, 256],
    "cosine": [256, 256, 253, 237, 228, 181, 116, 98, 40, 4, 1],
    "arccos": [256, 254, 240, 215, 206, 171, 130, 118, 74, 23, 2],
}


@pytest.mark.parametrize("schedule", MASKED_OF_256)
def test_schedules_mask_the_golden_number_of_positions(schedule):
    ratio = dimo.mask_ratio(torch.tensor(U), schedule)
    exact = {"linear": lambda u: u, "square": lambda u: u * u, "cosine": lambda u: math.cos(u * math.pi / 2),
             "arccos": lambda u: math.acos(u) / (math.pi / 2)}[schedule]
    assert close(ratio, torch.tensor([exact(u) for u in U]))
    mask = dimo.exact_mask(ratio, uniform(0, len(U), 256, 1))
    assert mask.sum((1, 2)).tolist() == MASKED_OF_256[schedule]


def test_a_token_of_probability_zero_is_not_drawn_even_where_u_is_on_its_edge():
    z = torch.tensor([-math.inf, 0.0, 0.0, -math.inf]).expand(1, 3, 1, 4)
    assert se.sample_tokens(z, u=torch.tensor([0.0, 0.5, 0.49]).view(1, 3, 1)).flatten().tolist() == [1, 2, 1]


def test_mage_ratios_are_a_normal_truncated_to_half_and_one():
    r = dimo.mask_ratio((torch.arange(20000) + 0.5) / 20000, "mage")                # every quantile once
    assert (r >= 0.5).all() and (r <= 1).all() and (r.diff() >= 0).all() and r[0] < 0.501 and r[-1] > 0.999
    pdf = lambda b: math.exp(-b * b / 2) / math.sqrt(2 * math.pi)
    cdf = lambda b: (1 + math.erf(b / math.sqrt(2))) / 2
    lo, hi = (0.5 - 0.55) / 0.25, (1 - 0.55) / 0.25
    assert abs(r.mean() - (0.55 + 0.25 * (pdf(lo) - pdf(hi)) / (cdf(hi) - cdf(lo)))) < 1e-4  # 0.694


def test_unknown_schedules_are_named():
    for f in (dimo.mask_ratio, lambda u, s: dimo.guidance_scale(u, 2.0, schedule=s)):
        with pytest.raises(ValueError, match="unknown .* schedule 'sine'"):
            f(torch.rand(2), "sine")


@pytest.mark.parametrize("L, counts", [(128, [1, 13, 64, 77, 115, 122, 128]),
                                       (256, [1, 26, 128, 154, 230, 243, 256]),
                                       (4096, [1, 410, 2048, 2458, 3686, 3891, 4096])])
def test_initial_mask_has_the_golden_count(L, counts):
    for ratio, count in zip([0.0, 0.1, 0.5, 0.6, 0.9, 0.95, 1.0], counts):
        x = dimo.initial_tokens(integers(1, 9, 3, L, 1), ratio, uniform(2, 3, L, 1), V=9)
        assert (x == 9).sum((1, 2)).tolist() == [count] * 3


def test_mask_counts_round_half_to_even_and_differ_by_sample():
    assert dimo.exact_mask(0.5, uniform(0, 2, 5, 1)).sum((1, 2)).tolist() == [2, 2]  # 2.5 -> 2
    assert dimo.exact_mask(0.5, uniform(0, 2, 7, 1)).sum((1, 2)).tolist() == [4, 4]  # 3.5 -> 4
    ratio = torch.tensor([0.0, 0.25, 1.0])
    assert dimo.exact_mask(ratio, uniform(0, 3, 4, 2)).sum((1, 2)).tolist() == [1, 2, 8]  # units, not positions
    assert dimo.exact_mask(ratio, uniform(0, 3, 4, 2), least=0).sum((1, 2)).tolist() == [0, 2, 8]


def test_smallest_scores_are_masked_so_that_every_unit_is_equally_likely():
    scores = uniform(0, 4000, 5, 2)
    mask = dimo.exact_mask(0.3, scores)
    assert (scores.masked_fill(~mask, 0).amax((1, 2)) < scores.masked_fill(mask, 1).amin((1, 2))).all()
    assert close(mask.float().mean(0), torch.full((5, 2), 0.3), atol=0.025)
    assert (mask[..., 0] != mask[..., 1]).any(), "the groups of one position are masked on their own"


def test_initial_tokens_are_the_given_ones_where_not_masked():
    tokens, scores = integers(0, 9, 3, 16, 2), uniform(1, 3, 16, 2)
    x = dimo.initial_tokens(tokens, 0.6, scores, V=9)
    mask = dimo.exact_mask(0.6, scores)
    assert torch.equal(x[~mask], tokens[~mask]) and (x[mask] == 9).all()
    assert (x == 9).sum((1, 2)).tolist() == [19] * 3                                # of 32 units, at 0.6


def test_perturbation_keeps_the_variance_and_reaches_the_network():
    e, noise, E = normal(0, 400, 16, 32), normal(1, 400, 16, 32), normal(2, 1, 5, 32)
    assert abs(dimo.perturb(e, 0.3, noise).var() - 1) < 0.01
    assert close(dimo.perturb(e, 0.6, noise), 0.6 * noise + 0.8 * e)
    x, identity = integers(3, 5, 400, 16, 1), lambda e, cond, s=0.0, noise=None: dimo.perturb(e, s, noise) if s else e
    assert torch.equal(dimo.student_logits(identity, x, (), E, 1.0), se.embed_tokens(x, E, 1.0))
    assert close(dimo.student_logits(identity, x, (), E, 1.0, 0.6, noise),
                          0.6 * noise + 0.8 * se.embed_tokens(x, E, 1.0))


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


def test_guidance_extrapolates_from_the_unconditional_logits_in_one_batch():
    c, u, cond = normal(0, 2, 4, 1, 7), normal(1, 2, 4, 1, 7), (torch.tensor([3, 5]),)
    net, e = TableNet(c, u), torch.zeros(2, 4, 8)
    assert torch.equal(dimo.guided_logits(net, e, cond, 1.0), c) and net.calls == [2]  # w = 1 costs one pass
    assert close(dimo.guided_logits(net, e, cond, 2.0), 2 * c - u) and net.calls == [2, 4]
    z = dimo.guided_logits(net, e, cond, torch.tensor([0.0, 1.5]))
    assert close(z[0], u[0]) and close(z[1], 1.5 * c[1] - 0.5 * u[1])


def test_guidance_schedules_start_low_and_end_high():
    r = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert dimo.guidance_scale(r, 3.0).tolist() == [3.0] * 4
    for low, schedule, expected in [(1.0, "linear", [1.0, 1.5, 2.0, 3.0]), (2.0, "linear", [2.0, 2.25, 2.5, 3.0]),
                                    (1.0, "cosine", [1.0, 2 - 0.5**0.5, 2.0, 3.0])]:
        assert close(dimo.guidance_scale(r, 3.0, low, schedule), torch.tensor(expected))


# ======================================================================================= Di[M]O: the gradient
def four_logits():
    """Golden inputs: teacher with and without condition, auxiliary, student, (2, 4, 1, 7) each; mask; targets."""
    rng = np.random.RandomState(0)
    z = [torch.from_numpy((2 * rng.standard_normal((2, 4, 1, 7))).astype(np.float32)) for _ in range(4)]
    mask = torch.from_numpy(rng.uniform(size=(2, 4, 1)) < 0.6)
    return *z, mask, torch.from_numpy(rng.randint(0, 7, (2, 4, 1)))


@pytest.mark.parametrize("beta, first, abs_sum, half_square", [
    (0.0, [-0.01945913, 0.3668868, 0.001037836, -0.2920607, -0.08509952, 0.005899787], 2.0657158, 0.54736656),
    (1.0, [-0.01301312, 0.886135, -0.02885032, -0.3401237, -0.3921244, 0.01457721], 2.7841565, 1.2037075),
    (-0.2, [-0.02074838, 0.2630371, 0.007015467, -0.2824481, -0.02369452, 0.004164279], 2.0444738, 0.5456574),
])
def test_guided_loss_gradient_is_the_golden_one(beta, first, abs_sum, half_square):
    c, u, z_aux, _, mask, _ = four_logits()
    unguided = TableNet(z_aux, torch.full_like(z_aux, math.nan))                    # the auxiliary is not guided
    args = TableNet(c, u), unguided, torch.zeros(2, 4, 8), (torch.tensor([0, 1]),), mask
    g = dimo.dimo_grad(*args, w=2.0, beta=beta)
    agrees(g / 2, first, abs_sum, tol=1e-6)
    assert abs(0.5 * g.square().sum() / 2 - half_square) < 1e-6
    weighted = dimo.dimo_grad(*args, w=2.0, beta=beta, weight=torch.tensor([3.0, 5.0]))
    assert close(weighted, g * torch.tensor([3.0, 5.0]).view(2, 1, 1, 1))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.2, 0.5])
def test_surrogate_gradient_is_the_gradient_of_the_divergence(beta):
    z_phi, z_psi = (2 * normal(seed, 3, 6, 2, 9).double() for seed in (0, 1))
    mask, _ = uniform(2, 3, 6, 2) < 0.5, z_psi.requires_grad_()
    log_q, log_p = z_phi.log_softmax(-1), z_psi.log_softmax(-1)
    forward, reverse = (log_q.exp() * (log_q - log_p)).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)
    assert (forward > 0).all() and (reverse > 0).all()
    (((1 - beta) * forward + beta * reverse) * mask).sum().backward()               # float64 autograd
    g = dimo.divergence_grad(z_phi, z_psi.detach(), mask, beta)
    assert close(g.double(), z_psi.grad, atol=2e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.2, 0.5])
def test_gradient_vanishes_at_equality_off_the_mask_and_in_sum(beta):
    z_phi, z_psi, mask = normal(0, 3, 6, 2, 9), normal(1, 3, 6, 2, 9), uniform(2, 3, 6, 2) < 0.5
    g = dimo.divergence_grad(z_phi, z_psi, mask, beta)
    assert (g[~mask] == 0).all() and (g[mask].abs().sum(-1) > 0.01).all()
    assert g.sum(-1).abs().max() < 1e-6, "a shift of the logits changes nothing"
    same = dimo.divergence_grad(z_phi, z_phi + 3.0, mask, beta)                     # equal up to such a shift
    assert same.abs().max() < 1e-6


def test_gradient_of_bf16_logits_is_computed_in_float32():
    z_phi, z_psi = normal(0, 2, 3, 1, 9).bfloat16(), normal(1, 2, 3, 1, 9).bfloat16()
    mask = torch.ones(2, 3, 1).bool()
    g = dimo.divergence_grad(z_phi, z_psi, mask, -0.2)
    assert g.dtype == torch.float32
    assert torch.equal(g, dimo.divergence_grad(z_phi.float(), z_psi.float(), mask, -0.2))


def test_descending_the_gradient_lowers_the_divergence():
    z_phi, z_psi, mask = normal(0, 2, 3, 1, 9), normal(1, 2, 3, 1, 9), torch.ones(2, 3, 1).bool()
    for beta in (0.0, 1.0, -0.2):
        z = z_psi.clone()
        for _ in range(2000):
            z -= dimo.divergence_grad(z_phi, z, mask, beta)
        assert close(z.softmax(-1), z_phi.softmax(-1), atol=1e-3), f"beta = {beta} does not arrive"


def test_backward_with_g_is_the_squared_error_trick():
    W, h, g = normal(0, 5, 9).requires_grad_(), normal(1, 2, 3, 1, 5), normal(2, 2, 3, 1, 9)
    z = h @ W
    direct = torch.autograd.grad(z, W, g / 2, retain_graph=True)[0]
    trick = torch.autograd.grad(0.5 * (z - (z - g).detach()).square().sum() / 2, W)[0]
    assert close(direct, trick, atol=1e-5)


def test_no_gradient_reaches_teacher_or_auxiliary():
    teacher, aux = (nn.Linear(8, 9) for _ in range(2))
    nets = [lambda e, cond, m=m: m(e)[:, :, None] for m in (teacher, aux)]
    g = dimo.dimo_grad(*nets, normal(0, 2, 3, 8), (), torch.ones(2, 3, 1).bool())
    assert not g.requires_grad and g.shape == (2, 3, 1, 9)


# ====================================================================================== Di[M]O: the auxiliary
@pytest.mark.parametrize("alpha, loss, first, abs_sum", [
    (0.0, 2.1218758, [-0.003803841, 0.2398664, -0.00162385, 0.02193434, -0.2690989, -0.0008281669], 1.2416957),
    (1.0, 0.24525063, [-0.01899043, 0.03159697, -0.01076135, 0.0004518298, -0.004767571, 7.860296e-05], 0.1936351),
])
def test_auxiliary_loss_is_the_golden_one(alpha, loss, first, abs_sum):
    _, _, z, z_student, mask, x = four_logits()
    z.requires_grad_(), z_student.requires_grad_()
    value = dimo.aux_loss(z, x, mask, z_student=z_student, alpha=alpha)
    value.backward()
    assert abs(value - loss) < 1e-6 and z_student.grad is None
    agrees(z.grad, first, abs_sum, tol=1e-6)


def test_auxiliary_loss_mixes_its_targets_and_divides_by_a_given_count():
    _, _, z, z_student, mask, x = four_logits()
    hard, soft, mixed = (dimo.aux_loss(z, x, mask, z_student=z_student, alpha=a) for a in (0.0, 1.0, 0.25))
    assert close(mixed, 0.75 * hard + 0.25 * soft)
    for alpha, loss in ((0.0, hard), (1.0, soft)):                                  # three units are masked
        assert close(dimo.aux_loss(z, x, mask, count=6, z_student=z_student, alpha=alpha), loss / 2)


def test_auxiliary_of_unsmoothed_loss_is_least_at_the_students_distribution():
    p = normal(0, 7).softmax(-1)
    x = torch.repeat_interleave(torch.arange(7), (p * 1e4).round().long())[None, :, None]  # in the shares of p
    z = p.log().expand(1, x.shape[1], 1, 7).clone().requires_grad_()
    dimo.aux_loss(z, x, torch.ones_like(x).bool(), smoothing=0.0).backward()
    assert z.grad.sum((0, 1, 2)).abs().max() < 1e-4


# =========================================================================== Di[M]O: two whole training steps
def seeded_maskgit(seed):
    """A small MaskGit on seeded weights, all trained but the embedding layer, as the official code has it."""
    net = filled(teachers.MaskGit, maskgit_file, seed, V=32, grid=4, width=48, depth=2, heads=4, mlp=96, classes=10)
    net.requires_grad_()
    for p in net.frozen():
        p.requires_grad_(False)
    return net


@functools.cache
def two_training_steps(beta, B=3):
    """The official recipe, composed of dimo's functions, all random choices given: student, aux, ema, log."""
    teacher, student, aux = (seeded_maskgit(seed) for seed in range(3))
    ema, log, rng = {k: v.clone() for k, v in student.state_dict().items()}, [], np.random.RandomState(0)
    opt, opt_aux = (torch.optim.Adam(m.parameters(), 1e-3, eps=1e-6) for m in (student, aux))

    def choices():
        labels, x_init = rng.randint(0, 10, (B,)), rng.randint(0, 33, (B, 16, 1))
        noise = rng.standard_normal((B, 17, 48)).astype(np.float32)[:, :16]
        x, mask = rng.randint(0, 33, (B, 16, 1)), rng.uniform(size=(B, 16, 1)) < 0.6
        return *(torch.from_numpy(a) for a in (labels, x_init, noise, x, mask)),

    embed = lambda net, x: se.embed_tokens(x, *net.tables())
    for step in range(2):
        labels, x_init, noise, x, mask = choices()
        z = dimo.student_logits(student, x_init, (labels,), *student.tables(), 0.1, noise)
        x_t = x.masked_fill(mask, 32)
        aux_on_x_t = lambda e, cond: aux(embed(aux, x_t), cond)                     # here its table is its own
        g = dimo.dimo_grad(teacher, aux_on_x_t, embed(teacher, x_t), (labels,), mask, 2.0, beta)
        opt.zero_grad(), z.backward(g / B)
        grad = student.last[4].weight.grad.clone()
        student_norm = nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        opt.step()

        labels, x_init, noise, x, mask = choices()                                  # everything is drawn again
        loss = dimo.aux_loss(aux(embed(aux, x.masked_fill(mask, 32)), (labels,)), x, mask)
        opt_aux.zero_grad(), loss.backward()
        aux_norm = nn.utils.clip_grad_norm_(aux.parameters(), math.inf)
        opt_aux.step()

        rate = min(0.9999, (1 + step) / (10 + step))
        for k, v in student.state_dict().items():
            ema[k].lerp_(v, 1 - rate)
        log.append((0.5 * g.square().sum() / B, student_norm, loss, aux_norm, grad))
    return student.state_dict(), aux.state_dict(), ema, log


@pytest.mark.parametrize("beta, loss, norms, grads", [
    (-0.2, (0.47420433, 0.35533658), (20.74114, 17.771184),
     [([-0.07407922, -0.4134999, 0.1088503, -0.01595422], 6.4698722),
      ([-0.05430209, -0.6395177, -0.052214, 0.1377407], 6.191268)]),
    (0.0, (0.5104354, 0.35864231), (21.860379, 18.213448),
     [([-0.07854707, -0.4319198, 0.142542, -0.01691756], 6.7175602),
      ([-0.04627868, -0.7026296, -0.04909799, 0.1416506], 6.2604123)]),
])
def test_training_steps_have_the_golden_losses_and_gradients(beta, loss, norms, grads):
    log = two_training_steps(beta)[-1]
    for step in range(2):
        half_square, student_norm, aux_loss, aux_norm, grad = log[step]
        assert half_square.item() == pytest.approx(loss[step], rel=5e-6)
        assert student_norm.item() == pytest.approx(norms[step], rel=5e-6)
        assert aux_loss.item() == pytest.approx((4.2303147, 3.8511181)[step], rel=1e-6)
        assert aux_norm.item() == pytest.approx((7.1805265, 5.0439053)[step], rel=5e-6)
        agrees(grad, *grads[step], tol=1e-5)


AUX_AFTER = [5576.88174, [-0.02610291, 0.04906511, 0.0842131, -0.2704769], 785.50728]  # sees no divergence


@pytest.mark.parametrize("beta, student, ema", [
    (-0.2, [5554.20803, [0.04294834, 0.1343205, 0.1013394, -0.08482286], 804.87903],
           [5554.18135, [0.0429663, 0.1341298, 0.101259, -0.08474259], 804.88023]),
    (0.0, [5554.34129, [0.04293081, 0.1343279, 0.1012743, -0.08480835], 804.8785],
          [5554.30522, [0.04295196, 0.1341359, 0.1012057, -0.08473072], 804.87683]),
])
def test_training_steps_leave_the_golden_weights(beta, student, ema):
    for state, (total, first, abs_sum) in zip(two_training_steps(beta), (student, AUX_AFTER, ema)):
        assert abs(sum(v.double().abs().sum() for v in state.values()) - total) < 2e-3
        agrees(state["blocks.0.attn.qkv.weight"], first, abs_sum, tol=5e-6)


# ================================================================================= teachers: MaskBit's tokens
def test_tokens_are_bits_lowest_first_in_two_groups():
    t = torch.tensor([0, 1, 2, 127, 128, 129, 5461, 8192, 10000, 16383])
    groups = [[0, 0], [1, 0], [2, 0], [127, 0], [0, 1], [1, 1], [85, 42], [0, 64], [16, 78], [127, 127]]
    bits = teachers.bits_of(t, 14)
    assert bits[8].tolist() == [-1, -1, -1, -1, 1, -1, -1, -1, 1, 1, 1, -1, -1, 1]
    tok = teachers.BitTokenizer(hidden=32, mult=(1,), blocks=1)
    tok.encoder = nn.Identity()                                                     # an image that is its latent
    assert tok.encode(0.1 * bits.T.view(1, 14, 1, 10))[0].tolist() == groups
    assert torch.equal(se.embed_tokens(torch.tensor([groups]), *tok.tables())[0], bits)


def test_a_zero_latent_is_a_minus_bit():
    tok = teachers.BitTokenizer(hidden=32, mult=(1,), blocks=1)
    tok.encoder = nn.Identity()
    assert (tok.encode(torch.zeros(1, 14, 2, 2)) == 0).all()


def test_a_masked_group_is_zero_and_leaves_the_other_alone():
    E, bias = teachers.BitTokenizer(hidden=32, mult=(1,), blocks=1).tables()
    e = se.embed_tokens(torch.tensor([[[128, 5], [5, 128], [128, 128]]]), E, bias)[0]
    assert e.tolist() == [[0] * 7 + [1, -1, 1, -1, -1, -1, -1], [1, -1, 1, -1, -1, -1, -1] + [0] * 7, [0] * 14]
    net = small_net()
    assert torch.equal(se.embed_tokens(torch.full((1, 1, 2), 16), *net.tables())[0, 0], net.input_proj.bias)


def test_generator_reads_tokens_through_its_input_layer():
    x, net = half_masked_tokens()[0], small_net()
    bits = teachers.bits_of(x, 4) * (x < 16)[..., None]                             # (3, 16, 2, 4)
    assert bits.sum() == -6 and bits.abs().sum() == 188                             # golden, of generator.bits
    assert close(se.embed_tokens(x, *net.tables()), net.input_proj(bits.flatten(2)), atol=2e-6)


# ============================================================================== teachers: MaskBit's generator
def test_generator_gives_the_golden_embedding_features_and_logits():
    x, cond = half_masked_tokens()
    net = small_net()
    e = se.embed_tokens(x, *net.tables())
    first, hidden, z = run_with_hooks(net, e, cond)                                 # L+1 positions, class last
    agrees(first, [0.2041739, 0.0593009, -0.1778337, 0.05064904, -0.1017807, -0.1957781], 1462.59853)
    agrees(hidden[0], [1.609295, 0.3136073, -2.033577, -0.2294688, -0.804172, -0.8612922], 2528.26462)
    agrees(hidden[1], [0.3004954, -0.3590499, -2.578125, -1.140411, 0.07654111, -0.010068], 2646.99346)
    agrees(hidden[2], [0.9116711, 0.1087366, -3.01099, -1.663104, 0.05276957, -0.4673339], 2569.55283)
    agrees(z, [-1.884787, -0.2110016, -0.5188801, -1.249709, 1.302471, -1.137711], 1364.17221)
    assert z.shape == (3, 16, 2, 16)
    for layers in [(0,), (1,), (0, 2), (0, 1, 2)]:                                  # without the class position
        features = net(e, cond, layers=layers)
        assert all(torch.equal(f, hidden[i][:, :16]) for f, i in zip(features, layers, strict=True))


def test_generator_gives_the_golden_logits_from_nothing_but_masks():
    net = small_net()
    z = net(se.embed_tokens(torch.full((3, 16, 2), 16), *net.tables()), (torch.tensor([3, 7, 0]),))
    agrees(z, [-1.786882, -0.1671775, 0.1113678, -0.9100456, 1.626079, -2.006689], 1603.0981)


def test_features_cost_only_the_layers_up_to_the_last_asked_for():
    net, calls = small_net(), []
    parts = enumerate([*net.blocks, net.head])
    handles = [m.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, m in parts]
    net(torch.zeros(1, 16, 64), (torch.tensor([0]),), layers=(1,))
    assert calls == [0, 1]
    for h in handles:
        h.remove()


def test_null_condition_is_the_last_class_and_writes_nothing():
    labels = torch.tensor([3, 7, 0])
    assert small_net().null((labels,))[0].tolist() == [10, 10, 10] and labels.tolist() == [3, 7, 0]


def test_frozen_parameters_are_the_embedding_layer():
    net = teachers.MaskBit(bits=4, grid=2, width=8, depth=1, heads=2, mlp=16, classes=3)
    frozen = [k for k, p in net.named_parameters() if any(p is q for q in net.frozen())]
    assert sorted(frozen) == ["class_emb.weight", "input_proj.bias", "input_proj.weight", "pos_emb"]


def test_dropout_is_active_in_training_alone_and_can_be_switched_off():
    net, x = mini_net().set_dropout(0.5), (torch.zeros(1, 4, 8), (torch.tensor([0]),))
    dropping = [m for m in net.modules() if isinstance(m, (nn.Dropout, teachers.Attention))]
    assert [getattr(m, "p", None) or m.dropout for m in dropping] == [0.5] * 5
    still = net.eval()(*x)
    assert torch.equal(net(*x), still) and not torch.equal(net.train()(*x), net(*x))
    assert close(net.set_dropout(0.0).train()(*x), still)


def test_noise_is_measured_in_the_root_mean_square_of_the_table():
    teacher = teachers.Teacher(small_net(), None, teachers.SPECS["maskbit-tiny"])
    E, _ = teacher.net.tables()
    assert teacher.noise_unit() == pytest.approx(E[:, :16].square().mean().sqrt().item())  # but the mask's row
    spec = dataclasses.replace(teacher.spec, noise_scale=1.5)                       # or as a spec says itself
    assert teacher._replace(spec=spec).noise_unit() == 1.5


def test_logits_are_float32_under_bf16_autocast():
    net = small_net()
    with torch.autocast("cpu", torch.bfloat16):
        z = net(torch.zeros(1, 16, 64), (torch.tensor([0]),))
    assert z.dtype == torch.float32
    assert z.bfloat16().float().ne(z).any(), "they were not rounded on the way"


# ============================================================================== teachers: MaskBit's tokenizer
def test_same_padding_puts_the_odd_pixel_right_and_below():
    step, img = teachers.Level(2, 2, 0, 1, "down"), normal(0, 1, 2, 6, 8)
    padded = F.pad(img, (0, 1, 0, 1))                                               # left, right, above, below
    assert close(step(img), F.conv2d(padded, step.down_conv.weight, step.down_conv.bias, 2))


def test_tokenizer_gives_the_golden_latent_tokens_and_reconstruction():
    img = F.interpolate(uniform(14, 2, 3, 8, 8).float(), scale_factor=8)            # (2, 3, 64, 64)
    tok = small_tokenizer()
    agrees(tok.encoder(img), [0.9607242, 0.1037607, -0.3168073, 0.03060886, 0.3128473, -1.208614], 135.664892)
    x = tok.encode(img)                                                             # (2, 16, 2)
    assert (x[..., 0] + 16 * x[..., 1]).tolist() == [
        [43, 137, 12, 169, 5, 72, 138, 139, 135, 13, 139, 159, 40, 205, 129, 207],
        [41, 162, 74, 170, 35, 137, 10, 11, 160, 8, 76, 170, 168, 107, 11, 139]]
    out = tok.decode(se.embed_tokens(x, *tok.tables()), clamp=False)
    agrees(out, [-0.1793668, -0.4257776, -0.2768627, -0.2023513, -0.2577169, -0.09058406], 12694.6894)


def test_tokenizer_decodes_the_golden_image_and_clamps_it():
    t, tok = integers(15, 256, 2, 16), small_tokenizer()
    x = torch.stack([t % 16, t // 16], -1)
    img = tok.decode(se.embed_tokens(x, *tok.tables()), clamp=False)
    agrees(img, [-0.09063487, -0.2989325, -0.2536427, -0.1758197, -0.2095416, -0.174988], 13203.471)
    assert close(teachers.decode_tokens(tok, x), img.clamp(0, 1))
    parts = tok.decode(se.embed_tokens(x, *tok.tables()), clamp=False, chunk=1)
    assert close(parts, img, atol=2e-4), "a batch decoded in parts is the same batch"


def test_masked_tokens_are_not_decoded():
    with pytest.raises(ValueError, match="below V = 16, got 16: unmask"):
        teachers.decode_tokens(small_tokenizer(), torch.full((1, 16, 2), 16))


# ====================================================================================== teachers: the sampler
def golden_run():
    trace, net = [], small_net()
    plan = teachers.maskbit_plan(32, 8, guidance=7.1, temperature=7.8)
    x = teachers.sample(net, (torch.tensor([1, 5, 2]),), plan, trace=trace,
                        draws=lambda i: (uniform(1000 + i, 3, 16, 2), uniform(2000 + i, 3, 16, 2)))
    return x, torch.stack(trace)                                                    # (8, 3, 16, 2)


def test_sampler_draws_the_golden_tokens():
    x, trace = golden_run()
    assert (trace == 16).sum((2, 3)).T.tolist() == [[32, 29, 26, 24, 21, 18, 14, 10]] * 3
    assert trace[3, 0].flatten().tolist() == [16, 16, 4, 8, 16, 16, 4, 16, 16, 16, 16, 16, 16, 16, 16, 2,
                                              16, 16, 5, 8, 16, 16, 16, 16, 4, 16, 16, 8, 16, 16, 16, 16]
    assert trace[7, 0].flatten().tolist() == [16, 2, 4, 8, 4, 12, 4, 5, 12, 13, 16, 16, 16, 16, 16, 2,
                                              10, 16, 5, 8, 16, 8, 7, 13, 4, 11, 5, 8, 16, 14, 16, 14]
    assert (x[..., 0] + 16 * x[..., 1]).tolist() == [
        [42, 132, 196, 84, 220, 93, 138, 42, 10, 133, 138, 215, 180, 133, 232, 238],
        [138, 36, 234, 43, 182, 212, 217, 232, 139, 132, 228, 234, 251, 142, 140, 204],
        [76, 248, 134, 196, 133, 235, 232, 252, 232, 232, 107, 232, 198, 107, 127, 228]]
    tok = small_tokenizer()
    img = tok.decode(se.embed_tokens(x, *tok.tables()), clamp=False)
    agrees(img, [-0.1283947, -0.2535913, -0.36886, -0.4228836, -0.4629348, -0.4474446], 19274.2005)


def test_sampler_never_changes_a_known_token():
    x, trace = golden_run()
    for before, after in zip(trace, [*trace[1:], x]):
        assert torch.equal(before[before < 16], after[before < 16])
    assert (x < 16).all()


class Coin:
    """A full-size grid of coins, V = 2: conditional logits (1, 0), unconditional (0, 0)."""

    V, G, L = 2, 2, 256

    def __init__(self):
        self.batches = []

    def tables(self):
        return torch.zeros(2, 3, 1), torch.zeros(1)

    def null(self, cond):
        return (torch.ones_like(cond[0]),)

    def at(self, cond, t):
        return cond

    def __call__(self, e, cond):
        self.batches.append(len(e))
        return torch.tensor([1.0, 0.0]) * (cond[0] == 0).float().view(-1, 1, 1, 1).expand(-1, 256, 2, 1)


@pytest.mark.parametrize("steps, masked, guidance", [
    (64, ([512, 471, 429, 386, 341, 291, 235, 164], 21071),
     ([0.0, 6.686449e-05, 0.004276153, 0.04860625, 0.2702278, 0.9939912, 2.687421, 5.356347], 99.6918643)),
    (128, ([512, 471, 429, 386, 341, 291, 235, 164], 41904),
     ([0.0, 6.686449e-05, 0.004276153, 0.04860625, 0.2702278, 0.9939912, 2.687421, 5.356347], 202.933709)),
    (256, ([512, 471, 429, 386, 341, 291, 235, 164], 83562),
     ([0.0, 5.46217e-05, 0.003493196, 0.03970652, 0.2207494, 0.8119929, 2.195358, 4.375607], 334.453678)),
])
def test_published_sampling_has_the_golden_schedules(steps, masked, guidance):
    plan = teachers.maskbit_plan(512, steps, **SPECS["maskbit"].settings(steps))
    counts, scale = [512, *(p.hidden for p in plan)][:-1], torch.tensor([p.w - 1 for p in plan])
    assert (counts[:: steps // 8], sum(counts)) == masked and plan[-1].hidden == 0
    assert close(scale[:: steps // 8], torch.tensor(guidance[0]), atol=2e-6)
    assert scale.sum().item() == pytest.approx(guidance[1], rel=1e-5)
    T = SPECS["maskbit"].sampling[steps]["temperature"]
    assert [p.noise for p in plan] == pytest.approx([T * (1 - (i + 1) / steps) for i in range(steps)])


def test_sampler_reveals_a_unit_every_step_until_one_is_left():
    trace, net, plan = [], mini_net(), teachers.maskbit_plan(8, 12)                 # 8 units, more steps than that
    teachers.sample(net, (torch.tensor([0]),), plan, trace=trace, draws=lambda i: uniform(i, 2, 1, 4, 2))
    assert [(x == net.V).sum().item() for x in trace] == [8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 1, 1]


def test_published_settings_are_those_of_the_readme_and_the_nearest_is_taken():
    spec = teachers.SPECS["maskbit"]
    assert spec.sampling == {64: dict(guidance=7.1, temperature=7.8), 128: dict(guidance=7.1, temperature=9.0),
                             256: dict(guidance=5.8, temperature=10.3)}
    assert [spec.settings(n)["temperature"] for n in (1, 90, 93, 185, 999)] == [7.8, 7.8, 9.0, 10.3, 10.3]
    assert spec.settings(64, guidance=2.0, temperature=None) == dict(guidance=2.0, temperature=7.8)



def test_sampler_applies_the_plans_guidance_and_temperature_and_may_go_without(monkeypatch):
    seen, net = [], Coin()                                                          # first guided logits, by step

    def watching(z, temperature, u):
        seen.append((z.flatten()[0].item(), temperature))
        return se.sample_tokens(z, temperature, u)

    for settings, w, batch in [(dict(guidance=3.0, annealing="none"), [4, 4, 4, 4], [2] * 4),
                               (dict(guidance=4.0, annealing="linear"), [1, 2, 3, 4], [1, 2, 2, 2]),
                               (dict(guidance=0.0), [1, 1, 1, 1], [1] * 4)]:
        seen.clear(), net.batches.clear()
        plan = [p._replace(divide=0.5, draw=0.7) for p in teachers.maskbit_plan(512, 4, **settings)]
        teachers.sample(net, (torch.tensor([0]),), plan, draw=watching)
        assert seen == [(2 * scale, 0.7) for scale in w] and net.batches == batch


def test_sampling_ratios_are_the_golden_ones():
    golden = {"arccos": [0.839139, 0.666667, 0.460107, 1e-06], "cosine": [0.92388, 0.707107, 0.382683, 1e-06],
              "linear": [0.75, 0.5, 0.25, 1e-06], "square": [0.9375, 0.75, 0.4375, 1e-06],
              "root": [0.5, 0.292893, 0.133975, 1e-06]}
    for schedule, expected in golden.items():
        ratios = [float(teachers.schedule_ratio(q, schedule, 1e-6)) for q in (0.25, 0.5, 0.75, 1.0)]
        assert ratios == pytest.approx(expected, rel=1e-9, abs=6e-7)


# ========================================================================================== teachers: MaskGit
MASKGIT = dict(V=32, grid=4, width=48, depth=2, heads=4, mlp=96, classes=10)
small_maskgit = functools.cache(functools.partial(filled, teachers.MaskGit, maskgit_file, **MASKGIT))
small_vqgan = functools.cache(lambda: filled(
    teachers.VQTokenizer, vqgan_file, widths=(32, 32, 64), latent=16, embed=8, V=24, attention=(2,)))


def test_maskgit_gives_the_golden_logits_plain_perturbed_and_guided():
    rng, net = np.random.RandomState(0), small_maskgit()
    x, labels = torch.from_numpy(rng.randint(0, 33, (3, 16, 1))), torch.from_numpy(rng.randint(0, 10, 3))
    noise = f32(rng.standard_normal((3, 17, 48)))[:, :16]
    e, cond = se.embed_tokens(x, *net.tables()), (torch.where(torch.tensor([0, 1, 0]).bool(), 10, labels),)
    agrees(net(e, cond), [3.040429, -1.247109, 0.1730151, 1.052807, -2.329601], 1291.95635)
    agrees(net(e, cond)[2, 15, 0], [1.110613, -1.880531, 1.27534, 0.9858406, -0.5086411])  # positions have biases
    agrees(net(e, cond, s=0.3, noise=noise), [0.7930675, -1.106606, -0.474539, 0.7637024, -0.2837803], 1204.98514)
    guided = dimo.guided_logits(net, e, (labels,), 2.0)
    agrees(guided, [2.959652, -1.439541, 0.1565083, 0.9828535, -2.259242], 1312.6903)


def test_vqgan_gives_the_golden_latents_codes_and_images():
    rng, tok = np.random.RandomState(0), small_vqgan()
    codes, img = torch.from_numpy(rng.randint(0, 24, (2, 64, 1))), (f32(rng.uniform(-1, 1, (2, 3, 32, 32))) + 1) / 2
    latent = f32(rng.standard_normal((2, 8, 8, 8))).flatten(2).transpose(1, 2)      # no codes
    agrees(tok.latents(img), [1.113699, -0.340395, 1.082254, -0.2492165, -0.5980241], 542.36282)
    x = tok.encode(img)
    assert x[0, :32, 0].tolist() == [8, 11, 8, 8, 9, 6, 2, 2, 8, 8, 15, 2, 8, 8, 15, 9,
                                     6, 11, 8, 2, 9, 5, 2, 8, 2, 2, 6, 22, 11, 8, 4, 6] and x.sum() == 1099
    inside = lambda e: 2 * tok.decode(e, clamp=False) - 1                                       # it works in [-1, 1]
    agrees(inside(se.embed_tokens(codes, *tok.tables())), [0.2152174, 0.1369084, 0.1600291, 0.1554386], 2941.28657)
    agrees(inside(latent), [0.1506191, 0.3182902, 0.3938015, 0.1113399, 0.3747067], 2993.66295)


def test_maskgit_sampler_draws_the_golden_tokens():
    u, rng, trace = uniform(1, 5, 3, 16, 1), np.random.RandomState(0), []
    noise = torch.from_numpy(np.stack([rng.gumbel(size=(3, 16, 1)) for _ in range(5)]))
    plan = teachers.maskgit_plan(16, 5, guidance=3.0, temperature=4.5)
    assert [p.w for p in plan] == [1.0, 1.75, 2.5, 3.25, 4.0]
    x = teachers.sample(small_maskgit(), (torch.tensor([7, 9, 9]),), plan, trace=trace,
                        draws=lambda i: (u[i], (-(-noise[i]).exp()).exp()))         # whose Gumbel noise is noise[i]
    masks = [(t == 32).sum((1, 2)).tolist() for t in trace]                         # those that were drawn stay
    assert masks == [[16] * 3, [15] * 3, [13, 13, 14], [9, 9, 11], [4, 4, 7]]
    assert trace[3][..., 0].tolist() == [[32, 20, 32, 22, 32, 8, 32, 32, 29, 32, 32, 32, 24, 15, 1, 32],
                                         [22, 26, 32, 28, 32, 32, 32, 32, 32, 32, 32, 8, 30, 32, 24, 30],
                                         [32, 32, 29, 32, 19, 0, 32, 32, 32, 32, 32, 30, 24, 32, 32, 32]]
    assert x[..., 0].tolist() == [[23, 20, 8, 22, 0, 8, 2, 31, 29, 8, 8, 23, 24, 15, 1, 28],
                                  [22, 26, 22, 28, 12, 5, 2, 20, 2, 16, 31, 8, 30, 22, 24, 30],
                                  [24, 31, 29, 31, 19, 0, 30, 31, 23, 14, 20, 30, 24, 31, 12, 3]]


def test_a_mask_that_maskgit_draws_counts_as_revealed_and_is_decoded_as_the_last_code():
    net, trace, always = small_maskgit(), [], lambda z, temperature, u: torch.full(z.shape[:-1], 32)
    x = teachers.sample(net, (torch.tensor([7]),), teachers.maskgit_plan(16, 3), draw=always, trace=trace)
    assert len(trace) == 3 and all((t == 32).all() for t in trace) and (x == 31).all()
    E, _ = small_vqgan().tables()
    assert E.shape == (1, 25, 8) and torch.equal(E[0, 24], E[0, 23])


@pytest.mark.parametrize("schedule, grid, revealed", [
    ("arccos", 16, [1, 18, 26, 32, 38, 43, 48, 50]), ("arccos", 16, [1, 9, 13, 17, 19, 22, 24, 26, 28, 30, 32, 35]),
    ("arccos", 16, [1, 6, 9, 10, 12, 14, 15, 16, 18, 19, 20, 21, 22, 23, 25, 25]),
    ("arccos", 32, [1, 26, 38, 46, 54, 61, 67, 73, 79, 84, 89, 94, 99, 104, 109]),
    ("cosine", 16, [1, 12, 22, 32, 41, 47, 51, 50]), ("linear", 16, [1, 9, 18, 27, 37, 46, 55, 63]),
    ("square", 16, [1, 13, 24, 34, 41, 46, 49, 48]), ("root", 16, [1, 7, 14, 22, 30, 41, 55, 86]),
    ("square", 16, [1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 7, 7, 8, 8, 8, 9, 9, 10, 10, 10,
                    11, 11, 11, 11, 11, 12, 12, 12, 12, 12, 12, 10]),
    ("root", 32, [1, 7, 15, 22, 30, 39, 48, 57, 68, 79, 91, 105, 122, 144, 196])])
def test_maskgit_reveals_the_golden_numbers_of_tokens(schedule, grid, revealed):
    plan = teachers.maskgit_plan(grid**2, len(revealed), schedule=schedule)
    hidden = [grid**2, *(p.hidden for p in plan)]
    assert [a - b for a, b in zip(hidden, hidden[1:])] == revealed


# ======================================================================================== teachers: Meissonic
MEISSONIC = dict(V=64, table=80, heads=4, head_width=16, joint=2, single=3, text_width=48, axes=(4, 6, 6))
small_meissonic = functools.cache(lambda grid=(8, 12): filled(
    teachers.Meissonic, meissonic_file, grid=grid, **MEISSONIC))
small_vqvae = functools.cache(lambda: filled(
    teachers.VQTokenizer, vqvae_file, widths=(16, 32, 32, 48, 64), latent=8, embed=8, V=64, attention=(),
    signed=False, norm_groups=8, grid=(4, 6)))
small_tower = functools.cache(lambda: filled(
    teachers.TextTower, clip_file, width=48, heads=4, depth=3, out=64, vocab=100, context=9))


def meissonic_inputs():
    """Half masked tokens of an 8 x 12 grid (2, 96, 1), their embedding, and a condition."""
    rng, net = np.random.RandomState(100), small_meissonic()
    x, masked = (torch.from_numpy(a) for a in (rng.randint(0, 64, (2, 96, 1)), rng.random_sample((2, 96, 1)) < 0.5))
    text, pooled = f32(rng.standard_normal((2, 9, 48))), f32(rng.standard_normal((2, 64)))
    x, micro = x.masked_fill(masked, 64), torch.tensor([[1024, 1024, 0, 0, 6.0], [768, 640, 16, 32, 5.5]])
    return x, se.embed_tokens(x, *net.tables()), (text, pooled, micro, torch.zeros(2))


channels_first = lambda z: z[:, :, 0].transpose(1, 2)                               # (B, L, 1, V) -> (B, V, L)


def test_meissonic_gives_the_golden_features_and_logits():
    net, hidden, (_, e, cond) = small_meissonic(), [], meissonic_inputs()
    handles = [b.register_forward_hook(lambda m, args, out: hidden.append(out)) for b in net.single]
    agrees(channels_first(net(e, cond)), [-1.166283, 0.5756382, -1.038456, 0.5028391, -1.265301], 9758.62206)
    for h in handles:
        h.remove()
    agrees(hidden[0], [-1.622211, -1.410151, 1.000096, 0.8734197, -1.606949], 3647.3362)        # text and image
    agrees(hidden[1], [-1.16055, -1.537131, 0.714828, 0.8842726, -1.5574], 3737.01458)
    agrees(hidden[2], [-1.144361, -1.717116, 0.8635588, 0.879055, -1.593311], 3775.14453)
    features = net(e, cond, layers=(0, 1, 2, 3, 4))
    agrees(features[0], [1.214843, -1.745568, -1.158067, 0.2639668, -0.9403231], 2594.85733)    # the image alone
    agrees(features[1], [1.257167, -1.575159, -0.9358265, 0.54066, -0.7855623], 2678.98439)
    assert all(torch.equal(f, h[:, 9:]) for f, h in zip(features[2:], hidden, strict=True))


def test_meissonic_sees_the_time_step_times_a_thousand():
    net, (_, e, (*cond, t)) = small_meissonic(), meissonic_inputs()
    z = net(e, net.at((*cond, t), 63))
    agrees(channels_first(z), [-1.439358, 0.6985233, -1.338871, -0.5228322, -2.10769], tol=5e-3)
    z = net(e, (*cond, torch.tensor([37.0, 512.0])))                                # fast waves: a float32 ulp shows
    agrees(channels_first(z), [-1.86701, 0.4928803, -1.490666, -0.8348637, -1.568403], tol=5e-2)


def test_rotary_angles_are_the_golden_ones_and_turn_no_text():
    cos, sin = teachers.rope_table(9, 4, 6, (4, 6, 6), torch.device("cpu"))         # 9 text states, 4 x 6 places
    agrees(cos[-1], [1, 1, -0.9899925, 0.9903207, 0.9999791, 0.2836622, 0.9731902, 0.999942], 14.4741735 / 2)
    agrees(sin[-1], [0, 0, 0.14112, 0.1387981, 0.006463259, -0.9589243, 0.2300017, 0.01077196], 2.97215868 / 2)
    agrees(cos, [1], 497.77266 / 2), agrees(sin, [0], 60.8519495 / 2)
    assert (cos[:10] == 1).all() and (sin[:10] == 0).all()                          # text, and the place (0, 0)


def test_rotated_queries_and_keys_know_only_their_distance():
    rope = teachers.rope_table(0, 5, 5, (4, 6, 6), torch.device("cpu"))
    q, k = (teachers.rotate(normal(seed, 1, 1, 1, 16).expand(1, 1, 25, 16), rope)[0, 0] for seed in (0, 1))
    scores = (q @ k.T).view(5, 5, 5, 5)                                             # (row, column) of q, then of k
    assert close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1], atol=1e-5)
    assert abs(scores[0, 0, 1, 0] - scores[0, 0, 0, 1]) > 0.1, "rows and columns turn different pairs"


def test_meissonic_fed_soft_tokens_gives_the_golden_logits_and_gradient():
    net, (x, _, cond) = small_meissonic(), meissonic_inputs()
    z = (3 * normal(1100, 2, 96, 1, 64)).requires_grad_()
    out = net(se.soft_embed(z, *net.tables()), cond)
    agrees(channels_first(out), [-1.099551, 1.486006, 1.14651, -0.1283769, -0.3659184], 9877.10391)
    grad = torch.autograd.grad(out.square().mean(), z)[0]
    agrees(grad, [1.374088e-07, -1.374844e-09, -1.580505e-06, 4.929963e-08, -2.877073e-07], 0.279342228, tol=1e-10)
    masked = net(se.soft_embed(z, *net.tables(), x == 64), cond)
    agrees(channels_first(masked), [-2.71031, 0.1827533, 0.1007663, 0.9931123, -0.3730617], 9649.89819)


def test_meissonic_is_perturbed_behind_its_first_norm_and_projection():
    net, (x, _, cond) = small_meissonic(), meissonic_inputs()
    noise = normal(3100, 2, 64, 96).transpose(1, 2)
    z = dimo.student_logits(net, x, cond, *net.tables(), 0.3, noise)
    agrees(channels_first(z), [-1.390639, 0.6362945, -1.154932, 1.288452, -1.238725], 9723.78088)


def test_vqvae_gives_the_golden_latents_codes_and_images():
    rng, tok = np.random.RandomState(200), small_vqvae()
    img, codes = f32(rng.random_sample((2, 3, 64, 96))), torch.from_numpy(rng.randint(0, 64, (2, 24, 1)))
    z, image = 3 * f32(rng.standard_normal((2, 24, 1, 64))), lambda e: tok.decode(e, clamp=False)
    agrees(tok.latents(img), [-1.145846, 0.4275272, -0.4326202, 0.5921248, 0.1774369], 210.392954)
    x = tok.encode(img)
    assert x[..., 0].tolist() == [
        [17, 61, 32, 0, 46, 35, 0, 25, 25, 25, 8, 25, 25, 25, 25, 16, 25, 25, 8, 25, 25, 22, 8, 25],
        [23, 25, 8, 25, 31, 25, 16, 25, 25, 27, 25, 48, 2, 8, 25, 25, 61, 8, 47, 46, 2, 25, 25, 25]]
    agrees(image(se.embed_tokens(codes, *tok.tables())), [-0.192274, -0.1027096, -0.1745134, -0.1166877], 18009.6954)
    agrees(image(se.soft_embed(z, *tok.tables())), [-0.1785347, -0.1150031, -0.1612418, -0.08281529], 18804.3633)
    agrees(image(se.embed_tokens(x, *tok.tables())), [-0.2408127, -0.2313782, -0.3302997, -0.306192], 18594.7956)


def test_text_tower_of_meissonic_gives_the_golden_states():
    states, final, pooled = small_tower()(torch.tensor([
        [98, 5, 17, 33, 99, 0, 0, 0, 0], [98, 7, 8, 9, 10, 11, 12, 13, 99], [98, 99, 0, 0, 0, 0, 0, 0, 0]]))
    agrees(states, [-0.662697, 0.6808965, 0.1706954, 0.8630649, 1.420114], 1407.78673)  # before the last block
    agrees(final, [-0.3470765, 0.641583, -0.7551892, 0.3370731, 1.442524], 1023.25181)
    agrees(pooled, [-0.3563226, -1.453548, -0.8372415, -0.3706013, -0.3569431], 146.228141)  # at the end token


@pytest.mark.parametrize("units, N, hidden, total", [
    (4096, 64, [4094, 3996, 3744, 3348, 2824, 2191, 1474, 700], 164797),
    (4096, 48, [4093, 3919, 3478, 2799, 1930, 930], 123082), (64, 8, [62], 290)])
def test_meissonic_hides_the_golden_numbers_of_tokens(units, N, hidden, total):
    plan = teachers.meissonic_plan(units, N)
    assert [p.hidden for p in plan[::8]] == hidden and sum(p.hidden for p in plan) == total and not plan[-1].hidden
    noise = torch.tensor([p.noise for p in teachers.meissonic_plan(64, 8)])
    assert close(noise, torch.linspace(2, 0, 8)) and {p.w for p in plan} == {9.0}   # golden: both ends included


@pytest.mark.parametrize("t, total, row", [
    (3, [5298, 5065], [2, 79, 79, 79, 49, 48, 79, 79, 36, 79, 79, 58]),
    (1, [3912, 3953], [2, 79, 10, 79, 49, 48, 22, 22, 36, 59, 59, 58]),
    (0, [3017, 3098], [2, 23, 10, 37, 49, 48, 22, 22, 36, 59, 59, 58])])
def test_a_sampling_step_from_partly_known_tokens_is_the_golden_one(t, total, row):
    z, gen, noise = 2 * normal(2100, 2, 64, 96).transpose(1, 2)[:, :, None], torch.Generator().manual_seed(7), torch.empty(2, 96, 1)

    def draw(z, temperature, u):                                                    # one generator for both
        x = torch.multinomial(z.softmax(-1).view(-1, 64), 1, generator=gen).view(2, 96, 1)
        noise.copy_(torch.rand(2, 96, 1, generator=gen))
        return x

    trace, x = [], meissonic_inputs()[0]                                            # 50 and 43 of 96 are masked
    end = teachers.sample(TableNet(z, z), (torch.zeros(2),), teachers.meissonic_plan(96, 8)[7 - t:], x=x, trace=trace,
                          draws=lambda i: (None, noise), draw=draw)
    x = (trace[1] if t else end).masked_fill((trace[1] if t else end) == 64, 79)    # the golden numbers call the mask 79
    assert x.sum((1, 2)).tolist() == total and x[0, 12:24, 0].tolist() == row


def test_meissonic_from_prompt_to_tokens_is_the_golden_one():
    net, tower, gen = small_meissonic(8), small_tower(), torch.Generator().manual_seed(11)
    cond = net.condition(*tower(torch.tensor([[98, 5, 17, 33, 99, 0, 0, 0, 0]])))
    net.null_text, net.null_pooled = net.condition(*tower(torch.tensor([[98, 99, 0, 0, 0, 0, 0, 0, 0]])))[:2]
    noise = torch.empty(1, 64, 1)

    def draw(z, temperature, u):                                                    # one generator for both
        x = torch.multinomial(z.softmax(-1)[0, :, 0], 1, generator=gen)[None]
        noise.copy_(torch.rand(1, 64, 1, generator=gen))
        return x

    x = teachers.sample(net, cond, teachers.meissonic_plan(64, 6), draws=lambda i: (None, noise), draw=draw)
    assert x.view(8, 8).tolist() == [
        [29, 13, 29, 10, 5, 28, 29, 0], [1, 8, 41, 62, 41, 28, 19, 53], [62, 14, 59, 30, 21, 18, 12, 13],
        [59, 42, 59, 57, 59, 54, 50, 55], [48, 16, 27, 60, 29, 13, 63, 13], [50, 8, 7, 57, 4, 57, 4, 30],
        [45, 16, 29, 61, 34, 5, 23, 10], [2, 46, 41, 46, 63, 63, 63, 36]]


class StepCounter:
    """A net of two tokens that remembers the times it was asked at."""

    V, G, L, at = 2, 1, 4, teachers.Meissonic.at

    def __init__(self):
        self.times = []

    def tables(self):
        return torch.zeros(1, 3, 1), 0.0

    def __call__(self, e, cond):
        self.times += cond[3].tolist()
        return torch.zeros(len(e), 4, 1, 2)


def test_meissonics_sampler_counts_its_steps_down_to_zero():
    net, cond = StepCounter(), (torch.zeros(1, 2, 8), torch.zeros(1, 8), torch.zeros(1, 5), torch.zeros(1))
    teachers.sample(net, cond, teachers.meissonic_plan(4, 4, guidance=1))
    assert net.times == [3, 2, 1, 0]


def test_official_start_of_meissonics_student_is_initial_tokens():
    torch.manual_seed(5)
    tokens = torch.randint(0, 64, (2, 64, 1), dtype=torch.float32).long()
    x = dimo.initial_tokens(tokens, 0.6, torch.rand(2, 64).argsort(1)[..., None], 79)
    assert (x == 79).sum((1, 2)).tolist() == [38, 38]
    assert x[0, :16, 0].tolist() == [35, 79, 79, 79, 38, 54, 16, 9, 8, 79, 79, 62, 79, 79, 79, 16]
    assert x[1, 48:, 0].tolist() == [30, 18, 0, 39, 79, 79, 59, 79, 79, 79, 79, 79, 79, 37, 79, 79]


# ========================================================================================== teachers: MaskGen
MASKGEN = dict(V=40, L=12, width=48, depth=3, heads=4, text_width=32, micro=16, spare=11)
TITOK = dict(V=40, L=12, size=16, patch=4, embed=8, enc=(32, 2, 4), dec=(48, 3, 4), text=9, text_width=32)
small_titok = functools.cache(lambda: filled(teachers.TATiTok, titok_file, **TITOK))


@functools.cache
def maskgen_tower(quick_gelu):
    """The three outputs of its text tower for two prompts and the empty one."""
    tower = filled(teachers.TextTower, open_clip_file, width=32, heads=4, depth=3, out=32, vocab=64, context=9,
                   quick_gelu=quick_gelu)
    return tower(torch.tensor([
        [62, 9, 25, 4, 40, 24, 16, 49, 63], [62, 11, 31, 53, 63, 0, 0, 0, 0], [62, 63, 0, 0, 0, 0, 0, 0, 0]]))


@functools.cache
def small_maskgen():
    """A MaskGen, and the condition of the two prompts."""
    net = filled(teachers.MaskGen, maskgen_file, **MASKGEN)
    cond = net.condition(*maskgen_tower(True))
    net.null_text, net.null_pooled = cond[0][2:], cond[1][2:]
    return net, tuple(c[:2] for c in cond)


def maskgen_inputs():
    """Tokens (2, 12, 1), partly masked, and a condition."""
    rng = np.random.RandomState(101)
    x, masked = (torch.from_numpy(a) for a in (rng.randint(0, 40, (2, 12, 1)), rng.random_sample((2, 12, 1)) < 0.6))
    text, pooled = f32(rng.standard_normal((2, 9, 32))), f32(rng.standard_normal((2, 32)))
    return x.masked_fill(masked, 40), (text, pooled, torch.tensor([6.5, 5.2]), None)


@pytest.mark.parametrize("quick, states, final, pooled", [
    (True, ([-0.7630023, 2.115347, -1.964464, -1.929082], 1283.18202),
     ([-0.7705418, 0.7416261, -0.74286, -2.033098], 729.58188),
     ([0.8040828, 1.665547, 0.2471397, 0.1167166], 91.0273508)),
    (False, ([-0.7632355, 2.122303, -1.966903, -1.931517], 1284.48339),
     ([-0.7710462, 0.7456155, -0.7479507, -2.031553], 729.784607),
     ([0.8038819, 1.67443, 0.2455183, 0.1306152], 91.0925008))])
def test_text_tower_of_maskgen_gives_the_golden_states_with_either_activation(quick, states, final, pooled):
    for got, expected in zip(maskgen_tower(quick), (states, final, pooled)):
        agrees(got, *expected)


def test_maskgen_gives_the_golden_features_and_logits():
    net, (x, cond) = small_maskgen()[0], maskgen_inputs()
    e = se.embed_tokens(x, *net.tables())
    agrees(net(e, cond), [-1.913822, -0.5555093, 0.4065936, -2.077173, 1.213661], 895.460211)
    features = net(e, cond, layers=(0, 1, 2))
    agrees(features[0], [-0.7984279, 0.2440962, -0.3116992, 0.5822107], 398.320702)
    agrees(features[1], [-0.8664747, -0.046124, -0.8839275, 0.4483891], 634.561451)
    agrees(features[2], [-1.052604, 0.02200247, -1.193571, 0.3775352], 848.990143)
    cos, sin = teachers.sinusoid(100 * torch.tensor([6.5, 5.0]), 256, period=1000.0)  # of the scores
    agrees(torch.cat([sin, cos], 1), [0.3047532, 0.0989351, -0.7443697, -0.07842953, 0.7503219], 330.493433)


def test_maskgen_and_its_decoder_fed_soft_tokens_give_the_golden_numbers():
    net, tok, (x, cond) = small_maskgen()[0], small_titok(), maskgen_inputs()
    z = f32(3 * np.random.RandomState(102).standard_normal((2, 12, 1, 40)))
    agrees(se.soft_embed(z, *net.tables()), [-0.1172604, -0.01681067, -0.2186748, 0.06650103, -0.1632817], 84.7191359)
    logits = net(se.soft_embed(z, *net.tables(), x == 40), cond)
    agrees(logits, [-2.152438, -0.6280303, 0.2724501, -2.21175], 906.309109)
    rng = np.random.RandomState(105)
    codes, guide = torch.from_numpy(rng.randint(0, 40, (2, 12, 1))), f32(rng.standard_normal((2, 9, 32)))
    image = lambda e: tok.decode(e, (guide,), clamp=False)
    agrees(image(se.embed_tokens(codes, *tok.tables())), [-0.4007056, -0.3281703, -1.815939, -0.3795486], 1185.11061)
    agrees(se.soft_embed(z, *tok.tables()), [-0.1985765, 0.3213078, 0.4190021, 0.3666705], 37.8919125)
    agrees(image(se.soft_embed(z, *tok.tables())), [-0.3407001, -0.1757645, -1.543245, -0.3000831], 1187.89241)


def test_titok_gives_the_golden_latents_and_codes():
    img = uniform(104, 2, 3, 16, 16).float()
    agrees(small_titok().latents(img).transpose(1, 2), [0.7846547, -0.04996341, -0.1444936, -0.5832853], 113.064351)
    assert small_titok().encode(img)[..., 0].tolist() == [[6, 8, 25, 32, 8, 21, 31, 22, 32, 6, 25, 35],
                                                          [6, 8, 31, 32, 8, 21, 31, 22, 32, 6, 25, 35]]


def test_maskgen_from_prompts_to_images_is_the_golden_one():
    (net, cond), rng, trace, shown = small_maskgen(), np.random.RandomState(103), [], maskgen_inputs()[0]
    e = se.embed_tokens(shown, *net.tables())
    agrees(net(e, cond), [-1.623105, -2.559797, -0.2644933, -1.364312, -0.2603985], 1201.24412)
    agrees(dimo.guided_logits(net, e, cond, 5.0), [-5.610256, -7.887344, 2.604558, -5.543235, -11.21913], 3741.85291)
    draws = lambda i: (f32(rng.random_sample((2, 12, 1, 40))), f32(rng.random_sample((2, 12, 1))))
    highest = lambda z, temperature, u: (z + temperature * teachers.gumbel(u)).argmax(-1)  # Gumbel noise draws
    x = teachers.sample(net, cond, teachers.maskgen_plan(12, 6, 3.0, 6.0), draws=draws, draw=highest, trace=trace)
    assert [(t == 40).sum((1, 2)).tolist() for t in trace] == [[n] * 2 for n in (12, 10, 9, 8, 6, 4)]
    assert trace[5][..., 0].tolist() == [[19, 40, 40, 40, 16, 19, 19, 17, 40, 16, 23, 8],
                                         [40, 3, 40, 17, 5, 17, 8, 8, 40, 38, 40, 17]]
    assert x[..., 0].tolist() == [[19, 19, 19, 19, 16, 19, 19, 17, 19, 16, 23, 8],
                                  [17, 3, 17, 17, 5, 17, 8, 8, 17, 38, 17, 17]]
    img = small_titok().decode(se.embed_tokens(x, *small_titok().tables()), cond, clamp=False)  # told the prompt
    agrees(img, [-0.1625785, -0.6285173, -2.09211, -0.6503586, -0.3968382], 1240.8958)


def test_maskgens_published_plan_is_the_golden_one():
    plan = teachers.maskgen_plan(128, 16, **SPECS["maskgen"].settings(16))
    assert [p.hidden for p in plan] == [122, 117, 112, 107, 102, 96, 91, 85, 79, 72, 66, 58, 50, 41, 28, 0]
    guidance = [1.10568082, 1.41866279, 1.9269172, 2.6109128, 3.44436407, 4.39524126, 5.42700386, 6.5, 7.57299662,
                8.60475922, 9.55563736, 10.3890877, 11.0730829, 11.5813379, 11.8943195, 12.0]
    assert [p.w - 1 for p in plan] == pytest.approx(guidance, abs=2e-6)
    assert [p.divide for p in plan] == pytest.approx([1.25 - 0.05 * i for i in range(16)])
    assert [p.noise for p in plan] == [p.draw for p in plan] == pytest.approx([1.875 - 0.125 * i for i in range(16)])
    hidden = [p.hidden for p in teachers.maskgen_plan(128, 64)]
    assert (hidden[7::8], sum(hidden)) == ([117, 107, 96, 85, 72, 58, 41, 0], 5243 - 128)


# ========================================================================================== teachers: prompts
def test_prompts_become_the_golden_tokens_of_clip():
    tower = teachers.TextTower(32, 2, 1, 32)
    ids = tower.tokenize(["A cozy cabin in the middle of a snowy forest.", "", "word " * 100])
    assert ids.shape == (3, 77) and ids[:, :14].tolist() == [
        [49406, 320, 14873, 14178, 530, 518, 3694, 539, 320, 14191, 4167, 269, 49407, 0], [49406, 49407] + [0] * 12,
        [49406] + [2653] * 13]
    assert ids[:, -3:].tolist() == [[0, 0, 0], [0, 0, 0], [2653, 2653, 49407]]      # cut, but for the end


def test_meissonics_tokenizer_reads_a_bang_as_padding():
    bang, plain = (teachers.TextTower(32, 2, 1, 32, pads_with_bang=b) for b in (True, False))
    start, a, cat, end = 49406, 320, 2368, 49407
    expected = {"a cat": [start, a, cat, end], "a cat!!": [start, a, cat, 0, 0, end], "!": [start, 0, end],
                "a! cat": [start, a, 0, cat, end], "!a!": [start, 0, a, 0, end]}
    for prompt, ids in expected.items():
        assert bang.tokenize([prompt])[0, : len(ids) + 1].tolist() == [*ids, 0]
    assert plain.tokenize(["a cat!!"])[0, :5].tolist() == [start, a, cat, 748, end]     # elsewhere "!!" is a word
    assert bang.tokenize(["!" * 99])[0].tolist() == [start] + [0] * 75 + [end]


def test_the_activation_of_a_text_tower_is_the_specs_or_the_flags():
    for flag, name in ((None, "QuickGELU"), ("gelu", "GELU"), ("quick_gelu", "QuickGELU")):
        text = load_teacher("maskgen-tiny", random_weights=True, text_activation=flag).text
        assert {type(block.mlp.gelu).__name__ for block in text.tower.transformer.resblocks} == {name}


# ============================================================================== teachers: what all four share
TINY = ("maskbit-tiny", "maskgit-tiny", "meissonic-tiny", "maskgen-tiny")
tiny_teacher = functools.cache(functools.partial(load_teacher, random_weights=True))


def tiny_inputs(name):
    """A teacher with random weights, half masked tokens, their embedding, and a condition; batch of 2."""
    teacher = tiny_teacher(name)
    net, rows = teacher.net, teacher.conditions(["a cat", "two dogs on a red boat"])[:2]
    x = integers(0, net.V, 2, net.L, net.G).masked_fill(uniform(1, 2, net.L, net.G) < 0.5, net.V)
    return teacher, x, se.embed_tokens(x, *net.tables()), teacher.cond(rows)


@pytest.mark.parametrize("name", TINY)
def test_one_hot_logits_are_hard_tokens_bit_for_bit_in_every_teacher(name):
    net, tok, *_ = tiny_teacher(name)
    for E, bias in (net.tables(), tok.tables()):
        V = E.shape[1] - 1
        x, mask = integers(2, V, 3, net.L, net.G), uniform(3, 3, net.L, net.G) < 0.5
        z = 1e4 * F.one_hot(x, V + (name == "maskgit-tiny")).float()                # whose logits have a mask entry
        assert E.shape[:2] == (net.G, net.V + 1)
        assert torch.equal(se.soft_embed(z, E, bias), se.embed_tokens(x, E, bias))
        assert torch.equal(se.soft_embed(z, E, bias, mask), se.embed_tokens(x.masked_fill(mask, V), E, bias))


@pytest.mark.parametrize("name", TINY)
def test_every_teacher_samples_tokens_that_its_tokenizer_decodes(name):
    teacher, _, _, cond = tiny_inputs(name)
    net, tok, spec, _ = teacher
    trace, _ = [], torch.manual_seed(0)
    x = teachers.sample(net, cond, spec.plan(net.L * net.G, 3, **spec.settings(3)), trace=trace)
    for before, after in zip(trace, [*trace[1:], x]):
        assert torch.equal(before[before < net.V], after[before < net.V])           # what is known stays
    img = teachers.decode_tokens(tok, x, cond)
    assert (x < net.V).all() and img.shape == (2, *spec.image) and img.min() >= 0 and img.max() <= 1
    assert tok.encode(img).shape == x.shape and (tok.V, tok.G) == (net.V, net.G)


@pytest.mark.parametrize("name", TINY)
def test_features_stop_at_the_last_layer_asked_for(name):
    teacher, _, e, cond = tiny_inputs(name)
    net, calls, blocks = teacher.net, [], [*teacher.net.blocks, *getattr(teacher.net, "single", ())]
    handles = [b.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, b in enumerate(blocks)]
    every = net(e, cond, layers=tuple(range(net.depth)))
    assert calls == list(range(net.depth)) and len(every) == net.depth
    for layers in [(0,), (1,), (0, 2), (1, 2), (net.depth - 1,)]:                   # Meissonic: 2 joint, 2 single
        calls.clear()
        features = net(e, cond, layers=layers)
        assert calls == list(range(max(layers) + 1))
        assert all(torch.equal(f, every[i]) for f, i in zip(features, layers, strict=True))
    for h in handles:
        h.remove()


def value_and_gradients(module, f, e):
    e = e.clone().requires_grad_()
    out = f(e)
    loss = (out * normal(5, *out.shape)).sum()
    return [out, *torch.autograd.grad(loss, [e, *module.parameters()], allow_unused=True)]


@pytest.mark.parametrize("name", TINY)
def test_checkpointing_changes_neither_outputs_nor_gradients(name):
    teacher, x, e, cond = tiny_inputs(name)
    net, tok = (copy.deepcopy(m).requires_grad_() for m in teacher[:2])
    e_dec = se.embed_tokens(x.clamp(max=net.V - 1), *tok.tables()).detach()
    last = tok.decoder.transformer[-1] if name == "maskgen-tiny" else tok.decoder.mid.res_blocks[0]
    for module, f, inputs, block in ((net, lambda e: net(e, cond), e, net.blocks[-1]),
                                     (tok, lambda e: tok.decode(e, cond, clamp=False), e_dec, last)):
        runs, results = [], []
        handle = block.register_forward_pre_hook(lambda *_: runs.append(1))
        for on in (False, True):
            module.set_checkpointing(on)
            results.append(value_and_gradients(module, f, inputs))
        handle.remove()
        assert len(runs) == 1 + 2, "computed again on the way back"
        assert all(torch.equal(a, b) if a is not None else b is None for a, b in zip(*results, strict=True))


def test_the_unconditional_condition_changes_the_prompt_alone():
    for name, keeps in (("meissonic-tiny", (2, 3)), ("maskgen-tiny", (2, 3))):
        teacher, _, e, cond = tiny_inputs(name)
        null, empty = teacher.net.null(cond), teacher.cond(teacher.conditions([teacher.spec.negative]))
        assert all(null[i] is cond[i] for i in keeps)                               # size and time; score and guide
        assert all(torch.equal(null[i], empty[i].expand_as(cond[i])) for i in (0, 1))
        assert not torch.equal(teacher.net(e, null), teacher.net(e, cond))
    labels = torch.tensor([3, 0])
    assert tiny_teacher("maskgit-tiny").net.null((labels,))[0].tolist() == [10, 10] and labels.tolist() == [3, 0]


def test_the_decoder_of_maskgen_reads_the_prompt_and_no_other_does():
    for name in TINY:
        teacher, x, _, cond = tiny_inputs(name)
        x, swapped = x.clamp(max=teacher.net.V - 1), tuple(c.flip(0) for c in cond)
        a, b = (teachers.decode_tokens(teacher.tokenizer, x, c) for c in (cond, swapped))
        assert torch.equal(a, b) == (name != "maskgen-tiny")


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("name", TINY)
def test_logits_of_every_teacher_are_float32_under_bf16_autocast(name):
    teacher, _, e, cond = tiny_inputs(name)
    exact = teacher.net(e, cond)
    with torch.autocast("cpu", torch.bfloat16):
        z = teacher.net(e, cond)
    assert z.dtype == torch.float32 and z.bfloat16().float().ne(z).any(), "they were not rounded on the way"
    assert 0 < (z - exact).abs().max() < 0.1 * exact.abs().max()


def test_dropout_is_where_a_teacher_was_trained_with_it():
    for name in TINY:
        teacher, _, e, cond = tiny_inputs(name)
        net = copy.deepcopy(teacher.net).set_dropout(0.5)
        still = net.eval()(e, cond)
        assert torch.equal(net.train()(e, cond), still) == (name in ("meissonic-tiny", "maskgen-tiny"))
        assert torch.equal(net.set_dropout(0.0).train()(e, cond), still)


def test_perturbed_input_is_noise_on_the_embedding_where_no_norm_comes_first():
    for name in set(TINY) - {"meissonic-tiny"}:
        teacher, _, e, cond = tiny_inputs(name)
        noise = normal(2, *e.shape)
        assert torch.equal(teacher.net(e, cond, s=0.3, noise=noise), teacher.net(dimo.perturb(e, 0.3, noise), cond))


@pytest.mark.parametrize("make, millions", [(teachers.Meissonic, 988.0), (teachers.MaskGit, 171.9),
                                            (teachers.MaskGen, 594.8)])
def test_distillation_trains_all_but_the_embedding_layer_and_the_output_layer(make, millions):
    with torch.device("meta"):
        net = make()
    frozen = {id(p) for p in net.frozen()}
    assert abs(sum(p.numel() for p in net.parameters() if id(p) not in frozen) / 1e6 - millions) < 0.05


# ==================================================================================== memory, counted at full size
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages alive; with fake tensors, which have sizes and no data, at any size."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def see(self, t):
        storage = t.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.see(t)
        return out


def test_memory_of_a_meissonic_step_at_1024_pixels_counts_well_below_80_gb():
    B, spec, bf16 = 4, SPECS["meissonic"], torch.autocast("cpu", torch.bfloat16)
    with FakeTensorMode(), LiveBytes() as live:
        net, student, aux, ema = (spec.Net(**spec.net) for _ in range(4))
        tok = spec.Tokenizer(**spec.tokenizer).requires_grad_(False)
        net.requires_grad_(False), ema.requires_grad_(False)
        for m in (m for blocks in (net.blocks, net.single) for m in blocks.modules() if isinstance(m, nn.Linear)):
            m.weight, m.bias = (nn.Parameter(p.bfloat16(), requires_grad=False) for p in (m.weight, m.bias))    # net.halve()
        for m in (net, student, aux, tok):
            m.set_checkpointing()
        opts = [torch.optim.Adam([p.requires_grad_(False) if any(p is q for q in m.frozen()) else p for p in m.parameters()],
                                 foreach=False) for m in (student, aux)]
        cond = torch.empty(B, 77, 1024), torch.empty(B, 1024), torch.empty(B, 5), torch.empty(B)
        net.null_text, net.null_pooled = cond[0][:1], cond[1][:1]
        x, mask, noise = torch.zeros(B, 4096, 1).long(), torch.ones(B, 4096, 1).bool(), torch.empty(B, 4096, 1024)
        E, bias = (t.detach() for t in student.tables())
        for opt in opts:                                          # Adam's moments exist from the first step on
            for p in opt.param_groups[0]["params"]:
                p.grad = torch.empty_like(p) if p.requires_grad else None
            opt.step(), opt.zero_grad()
        del p
        live.peak = live.now
        with bf16:
            z = dimo.student_logits(student, x, cond, E, bias, 0.3, noise)
            drawn = se.sample_tokens(z.detach(), u=torch.empty(B, 4096, 1))
            z.backward(dimo.dimo_grad(net, aux, se.embed_tokens(drawn, E, bias), cond, mask, 4.0))
        opts[0].step(), opts[0].zero_grad()
        with bf16:
            dimo.aux_loss(aux(se.embed_tokens(drawn, E, bias), cond), drawn, mask).backward()
        opts[1].step(), opts[1].zero_grad()
        del z, drawn
        step, rest = live.peak, live.now
        live.peak, z = rest, torch.empty(1, 4096, 1, 8192, requires_grad=True)
        tok.decode(se.soft_embed(z, *tok.tables())).mean().backward()
    print(f"at rest {rest / 1e9:.1f} GB, Di[M]O step {step / 1e9:.1f}, decoder {(live.peak - rest) / 1e9:.1f} above rest")
    assert 30e9 < rest < 32e9 and step < 40e9 and live.peak - rest < 11e9


# ============================================================================== teachers: the Halton baseline
def test_halton_order_visits_every_cell_and_begins_as_by_hand():
    for rows, columns in [(2, 2), (4, 4), (8, 8), (16, 16), (32, 32), (8, 12)]:
        order = teachers.halton_order((rows, columns))
        assert order.shape == (rows * columns, 1) and set(order[:, 0].tolist()) == set(range(rows * columns))
    points = [(1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), (5/8, 7/9), (3/8, 2/9), (7/8, 5/9), (1/16, 8/9)]
    cells = [4 * int(4 * a) + int(4 * b) for a, b in points]
    assert cells == [9, 6, 12, 1, 11, 4, 14, 3]                                     # row-major, all different
    assert teachers.halton_order((4, 4))[cells, 0].tolist() == list(range(8))
    wide = [8 * int(2 * a) + int(8 * b) for a, b in points[:4]]                     # 2 rows, 8 columns
    assert wide == [10, 5, 8, 3] and teachers.halton_order((2, 8))[wide, 0].tolist() == [0, 1, 2, 3]


def test_given_an_order_the_sampler_keeps_the_lowest_ranks_first():
    net, order, trace = small_maskgit(), teachers.halton_order(small_maskgit().grid), []
    plan = teachers.maskbit_plan(16, 6, guidance=2.0, temperature=5.0)
    x = teachers.sample(net, (torch.tensor([1, 2]),), plan, order=order, trace=trace,
                        draw=lambda z, temperature, u: z[..., :32].argmax(-1))      # never the mask
    assert (x < 32).all()
    for t, hidden in zip(trace, [16, *(p.hidden for p in plan)]):
        assert ((t < 32) == (order < 16 - hidden)).all()


# ============================================================================= teachers: how they are trained
class Recorder:
    """A net for mdm_loss: gives the logits z, embeds a group's mask as 1, other tokens as 0, keeps its input."""

    V, classes = 16, 10

    def __init__(self, z):
        self.z = z

    def tables(self):
        E = torch.zeros(2, 17, 2)
        E[0, 16, 0] = E[1, 16, 1] = 1
        return E, torch.zeros(2)

    def __call__(self, e, cond):
        self.masked, self.labels = e > 0, cond[0]
        return self.z


def test_mdm_loss_is_the_golden_one(monkeypatch):
    net, x, mask = Recorder(normal(16, 3, 16, 2, 16)), integers(10, 16, 3, 16, 2), uniform(11, 3, 16, 2) < 0.5
    drawn = iter([torch.full((3,), 0.5), 1.0 - mask.float(), torch.ones(3)])        # ratio, units, label dropping
    monkeypatch.setattr(torch, "rand", lambda *size, **_: next(drawn))
    loss, log = mdm_loss(net, x, torch.tensor([1, 2, 3]))
    assert loss.item() == pytest.approx(3.2203765, abs=2e-6)
    assert log["masked"].item() == pytest.approx(3.1023631, abs=2e-6)
    assert torch.equal(net.masked, mask) and net.labels.tolist() == [1, 2, 3]


def test_mdm_training_masks_units_independently_at_one_ratio_an_image():
    torch.manual_seed(0)
    net = Recorder(torch.zeros(4000, 16, 2, 16))
    mdm_loss(net, torch.zeros(4000, 16, 2, dtype=torch.long), torch.zeros(4000, dtype=torch.long))
    m = net.masked.float()
    assert abs(m.mean() - 2 / math.pi) < 0.01                                       # E r, r = arccos(u) 2/pi
    assert abs((m[..., 0] * m[..., 1]).mean() - 4 * (math.pi - 2) / math.pi**2) < 0.01  # E r^2: both groups
    assert abs((m[:, 0] * m[:, 9]).mean() - 4 * (math.pi - 2) / math.pi**2) < 0.015  # and two positions
    assert set(net.labels.tolist()) == {0, 10} and abs((net.labels == 10).float().mean() - 0.1) < 0.015


def test_tokenizer_loss_knows_the_entropies_over_all_joint_codes():
    tok = teachers.BitTokenizer(channels=4, hidden=4, mult=(1,), blocks=1, bits=4, norm_groups=1)
    tok.encoder, tok.decoder, img = nn.Identity(), nn.Identity(), 0.3 * normal(0, 3, 4, 5, 5)
    log = tokenizer_loss(tok, img)[1]
    z = img.permute(0, 2, 3, 1).reshape(-1, 1, 4)                                   # (75, 1, 4)
    codes = torch.sigmoid(4 * z * teachers.bits_of(torch.arange(16), 4)).prod(-1)   # (75, 16), all 2^4 enumerated
    entropy = lambda p: -(p * p.log()).sum(-1)
    assert log["sure"].item() == pytest.approx(entropy(codes).mean().item(), abs=1e-4)
    assert log["used"].item() == pytest.approx(entropy(codes.mean(0)).item(), abs=1e-4)


# ========================================================================= teachers: published files, loading
def fingerprint(shapes):
    return hashlib.sha256("\n".join(sorted(f"{k} {list(s)}" for k, s in shapes.items())).encode()).hexdigest()


@pytest.mark.parametrize("teacher, role, file, count, digest, parameters", [
    ("maskbit", "net", generator_file, 301,
     "1eeed3f0dcfef5574a3a85d21d46677c225546c88f96f55821276d353b8c2d48", 304_929_024),
    ("maskbit", "tokenizer", tokenizer_file, 177,
     "e4f39a5bb2de414bf1017f5331331a8906af42181e96e5c0446e153f18f57dc1", 54_489_489),
    ("maskgit", "net", maskgit_file, 305,
     "05951913674e114e9c3a7eed3a0034148e9855bbdb29455a39d1b463bdf98cce", 174_160_874),
    ("maskgit-512", "net", maskgit_file, 305,
     "75b5b86b31174ee4ee04ba387b62686a7dbeb951d21b76fcc350bf9cea489f04", 176_306_666),
    ("maskgit", "tokenizer", vqgan_file, 343,
     "daa361925932ed87b817215688950b279b7a18066684a6df4da5a26a61434258", 72_141_699),
    ("meissonic", "net", meissonic_file, 867,
     "9ec30148fd1d0824fa07ae1b3458e913f4e6871d9ba796bd50d37969f83065da", 1_006_946_304),
    ("meissonic", "tokenizer", vqvae_file, 277,
     "5d919826cdd3bff4b1cb8ab1d15b7af812af027b51a3f5a1a6363b5984e352c5", 146_244_675),
    ("meissonic", "text", clip_file, 389,
     "a89288e7a8db1ef0ab1516f4d95fdb7a5277ed8d75e43836e0ba19824022c68a", 354_032_640),
    ("meissonic", "text", lambda: open_clip_file(1024, 24, 1024), 294,
     "cc1dcd8205bd26c35514546a332054e7f38cba4b6f1e34d011e99c43e1b8272f", 354_032_640),
    ("maskgen", "net", maskgen_file, 450,
     "360e8da7bec94792a8f2b35fa6436bcfa4de3c4ad1aa39da4ed1c8955d4473c3", 604_311_552),
    ("maskgen-xl", "net", maskgen_file, 562,
     "346e220267b87e68d61c4468077479f6ee7ebaef09694681b37db6b993e26dd2", 1_176_611_840),
    ("maskgen", "tokenizer", titok_file, 462,
     "3740cb0deb2894bd433d1168e1f2920ae5580e970f5a3c9bd013dae59dc246c8", 391_046_292),
    ("maskgen", "text", open_clip_file, 150,
     "063377c770e7ff633838b906f2ff5b3838384ade1b302c2d93b9f4f57e271ec6", 123_650_304),
])
def test_published_sizes_have_exactly_the_published_tensors(teacher, role, file, count, digest, parameters):
    spec = SPECS[teacher]
    make, sizes = {"net": (spec.Net, spec.net), "tokenizer": (spec.Tokenizer, spec.tokenizer),
                   "text": (teachers.TextTower, spec.text)}[role]
    shapes = shapes_in(file, sizes)
    assert len(shapes) == count and fingerprint(shapes) == digest                   # the files' true key list
    with torch.device("meta"):
        module = make(**sizes)
        state, complaints = weights.published_state({k: torch.empty(s) for k, s in shapes.items()}, module)
    shape = lambda tensors: {k: v.shape for k, v in tensors.items()}
    assert not complaints and shape(state) == shape(module.state_dict())
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_head_counts_are_right_though_no_file_says_them():
    heads = lambda module, *kinds: {m.heads for m in module.modules() if isinstance(m, kinds)}
    with torch.device("meta"):                                                      # others load as well: nonsense
        net = {k: spec.Net(**spec.net) for k, spec in SPECS.items()}
        tok = {k: spec.Tokenizer(**spec.tokenizer) for k, spec in SPECS.items()}
    Attention, Stream = teachers.Attention, teachers.Stream
    assert heads(net["maskbit"], Attention) == heads(net["maskgit"], Attention) == {16}
    assert heads(net["meissonic"], Stream, teachers.SingleBlock) == {8}
    assert heads(net["maskgen"], Stream) == heads(net["maskgen-xl"], Stream) == {16}
    assert heads(tok["maskgit"], Attention) == {1} and not heads(tok["meissonic"], Attention)
    assert heads(tok["maskgen"].encoder, Attention) == {12} and heads(tok["maskgen"].decoder, Attention) == {16}


def test_aliases_prefixes_wrappers_and_extras_load_to_the_same_weights():
    file = seeded(generator_file(**SIZES))
    file["bits_to_indices"] = torch.tensor([1, 2], dtype=torch.int32)
    without_extra = {k: v for k, v in file.items() if k != "bits_to_indices"}
    plain = weights.load_state(mini_net(), file, "plain").state_dict()
    assert torch.equal(plain["blocks.1.attn.qkv.weight"], file["transformer.layers.1.0.mha.in_proj_weight"])
    assert torch.equal(plain["blocks.0.mlp.2.bias"], file["transformer.layers.0.1.net.2.bias"])
    for variant in (without_extra, plain, {"state_dict": file}, {"model_state_dict": file, "step": 7},
                    {k.replace("input_proj.", "token_emb."): v for k, v in file.items()},
                    {f"module.{k}": v for k, v in file.items()}, {f"_orig_mod.{k}": v for k, v in file.items()},
                    {f"module._orig_mod.{k.replace('input_proj.', 'token_emb.')}": v for k, v in file.items()}):
        state = weights.load_state(mini_net(), variant, "variant").state_dict()
        assert all(torch.equal(state[k], v) for k, v in plain.items())


def test_half_precision_files_load_into_float32():
    for name, theirs, ours in [("MaskGit", "pos_emb", "pos_emb"), ("MaskGen", "embeddings.weight", "tok_emb.weight"),
                               ("Meissonic", "mlm_layer.conv2.weight", "to_logits.weight")]:
        for dtype in (torch.float16, torch.bfloat16):
            file = {k: v.to(dtype) for k, v in published(name).items()}
            state = weights.load_state(empty(name), file, "half").state_dict()
            assert all(v.dtype == torch.float32 for v in state.values())
            assert torch.equal(state[ours].flatten(), file[theirs].float().flatten())


def test_a_file_that_does_not_fit_is_refused_by_name():
    file = seeded(generator_file(**SIZES))
    file["class.weight"] = file.pop("class_emb.weight")
    file["pos_emb"] = file["pos_emb"][:, :3]
    net = mini_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(weights.UserError) as err:
        weights.load_state(net, file, "some.bin")
    for words in ("some.bin does not fit MaskBit", "missing class_emb.weight", "unexpected class.weight",
                  "pos_emb (1, 3, 8) instead of (1, 5, 8)"):
        assert words in str(err.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "nothing is half loaded"
    with pytest.raises(weights.UserError, match="and 9 more"):
        weights.load_state(net, {f"x{i}": torch.zeros(1) for i in range(13)} | net.state_dict(), "long.bin")
    with pytest.raises(weights.UserError, match="expected a dict of tensors, got list"):
        weights.load_state(net, [1, 2], "list.bin")


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
    "VQGAN": (teachers.VQTokenizer, vqgan_file, dict(VQ, attention=(1,))),
    "VQ-VAE": (teachers.VQTokenizer, vqvae_file, dict(VQ, attention=(), signed=False)),
    "Meissonic": (teachers.Meissonic, meissonic_file, MEISSONIC),
    "MaskGen": (teachers.MaskGen, maskgen_file, MASKGEN),
    "TATiTok": (teachers.TATiTok, titok_file, TITOK),
    "TextTower": (teachers.TextTower, clip_file, dict(width=32, heads=2, depth=2, out=48, vocab=64, context=9)),
}


def empty(name):
    """A small network of its class, its weights of no meaning."""
    make, _, sizes = SMALL[name]
    return make(**sizes)


def published(name, extras={}):
    """Its seeded published file, perhaps with more in it."""
    _, file, sizes = SMALL[name]
    return seeded(shapes_in(file, sizes) | extras)


@pytest.mark.parametrize("name", SMALL)
def test_every_file_but_the_right_one_is_refused_with_a_sentence(name):
    net, file = empty(name), published(name)
    for other in SMALL.keys() - {name}:
        sentence = refusal(net, published(other), f"{other}.bin")
        assert f"{other}.bin does not fit {type(net).__name__}: " in sentence and "another teacher's file" in sentence
    for key in list(file)[::7]:                                                     # one under another name
        sentence = refusal(net, {"else." + k if k == key else k: v for k, v in file.items()})
        assert "missing" in sentence and "unexpected else." in sentence
        assert "of another shape" in refusal(net, {**file, key: torch.cat([file[key]] * 2)})
    assert weights.load_state(net, file, "right.bin") is net


@pytest.mark.parametrize("name, part, packed", [
    ("Meissonic", "transformer_blocks.1.attn.to_{}.weight", "blocks.1.image.qkv.weight"),
    ("Meissonic", "transformer_blocks.0.attn.add_{}_proj.bias", "blocks.0.text.qkv.bias"),
    ("Meissonic", "single_transformer_blocks.2.attn.to_{}.weight", "single.2.qkv.weight"),
    ("MaskGen", "blocks.2.attn.add_{}_proj.weight", "blocks.2.text.qkv.weight"),
    ("VQGAN", "decoder.up.1.attn.2.{}.weight", "decoder.up.0.attn.2.attn.qkv.weight"),
    ("TextTower", "text_model.encoder.layers.1.self_attn.{}_proj.bias",
     "tower.transformer.resblocks.1.attn.in_proj_bias")])
def test_packed_rows_are_the_files_q_k_and_v_in_this_order(name, part, packed):
    net, file = empty(name), published(name)
    own = weights.load_state(net, dict(reversed(file.items())), "reversed").state_dict()
    rows = torch.cat([file[part.format(c)] for c in "qkv"])
    assert torch.equal(own[packed], rows.flatten(1) if rows.ndim == 4 else rows)
    sentence = refusal(net, {k: v for k, v in file.items() if k != part.format("k")})
    assert f"part k of {packed} missing" in sentence and "unexpected" not in sentence


def test_last_text_stream_of_maskgen_has_no_way_out_and_its_scale_comes_first():
    net, file, h, s = empty("MaskGen"), published("MaskGen"), normal(0, 1, 5, 48), normal(1, 1, 48)
    assert not any("blocks.2.ff_context" in k or "blocks.2.attn.to_add_out" in k for k in file)
    through = lambda x, name: F.linear(x, file[f"blocks.2.{name}.weight"], file[f"blocks.2.{name}.bias"])
    scale, shift = through(s, "norm1_context.linear").chunk(2, -1)
    q = through(F.layer_norm(h, (48,), eps=1e-6) * (1 + scale) + shift, "attn.add_q_proj")
    entered = weights.load_state(net, file, "seeded").blocks[2].text.enter(h, s)[0][0]         # (1, heads, 5, 12)
    assert close(entered.transpose(1, 2).flatten(2), q, atol=1e-5)


def test_a_tied_output_layer_may_be_in_the_file_twice_but_not_differ():
    file = published("MaskGen")
    plain, head = weights.load_state(empty("MaskGen"), file, "plain").state_dict(), file["embeddings.weight"]
    alone = {k.replace("embeddings", "lm_head"): v for k, v in file.items()}
    for variant in (alone, file | {"lm_head.weight": head.clone()}, {"lm_head.weight": head} | file):
        state = weights.load_state(empty("MaskGen"), variant, "tied").state_dict()
        assert all(torch.equal(state[k], v) for k, v in plain.items())
    sentence = refusal(empty("MaskGen"), file | {"lm_head.weight": head + 1e-3})
    assert "two different tensors for tok_emb.weight, one of them lm_head.weight" in sentence


@pytest.mark.parametrize("name, extras", [
    ("VQGAN", {"loss.discriminator.main.0.weight": [4, 3, 4, 4], "loss.perceptual_loss.lin0.model.1.weight": [1, 4]}),
    ("TATiTok", {"quantize.embed_prob": [40]}),
    ("TextTower", {"logit_scale": [], "vision_model.encoder.layers.0.mlp.fc1.weight": [4, 4],
                   "visual_projection.weight": [48, 4], "text_model.embeddings.position_ids": [1, 9]})])
def test_what_else_a_published_file_holds_is_dropped(name, extras):
    plain, wrapped = published(name), {f"module.{k}": v for k, v in published(name, extras).items()}
    own = weights.load_state(empty(name), plain, "plain").state_dict()
    state = weights.load_state(empty(name), {"state_dict": wrapped, "epoch": 3}, "extras").state_dict()
    assert all(torch.equal(state[k], v) for k, v in own.items())
    assert "unexpected other.weight" in refusal(empty(name), plain | {"other.weight": torch.zeros(1)})


def test_a_text_tower_loads_from_either_librarys_file():
    file = published("TextTower")
    own = weights.load_state(empty("TextTower"), file, "transformers").state_dict()
    assert torch.equal(own["tower.text_projection"], file["text_projection.weight"].T)  # (32, 48) from (48, 32)
    other = {k.removeprefix("tower."): v for k, v in own.items()}                   # open_clip's names
    assert other.keys() == open_clip_file(32, 2, 48, 64, 9).keys() - {"logit_scale"}
    visual = {"visual.conv1.weight": torch.zeros(3), "logit_scale": torch.zeros(())}
    state = weights.load_state(empty("TextTower"), other | visual, "open_clip").state_dict()
    assert all(torch.equal(state[k], v) for k, v in own.items())


@pytest.mark.parametrize("name, role", [(n, r) for n in TINY for r in SPECS[n].roles])
def test_a_networks_own_names_load_unchanged(name, role):
    module = teachers.build(SPECS[name], role, random_weights=True)
    state = {k: v + 1 if v.is_floating_point() else v for k, v in module.state_dict().items()}
    loaded = weights.load_state(module, state, "own").state_dict()                 # nothing stays by accident
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


def test_decoder_levels_are_stored_from_the_finest_in_one_file_and_the_coarsest_in_the_other():
    for name, finest in (("VQGAN", "up.0.block.0.norm1"), ("VQ-VAE", "up_blocks.1.resnets.0.norm1")):
        file = published(name)
        own = weights.load_state(empty(name), file, name).state_dict()
        assert own["decoder.up.0.res_blocks.0.conv1.weight"].shape == (16, 16, 3, 3)  # the coarsest
        assert torch.equal(own["decoder.up.1.res_blocks.0.norm1.weight"], file[f"decoder.{finest}.weight"])


def test_a_hubs_folder_is_read_with_the_file_in_it_or_in_its_subfolder(tmp_path):
    from safetensors.torch import save_file

    for role, name in (("net", "transformer"), ("tokenizer", "vqvae"), ("text", "text_encoder")):
        (tmp_path / "hub" / name).mkdir(parents=True)
        save_file({"w": torch.ones(2)}, tmp_path / "hub" / name / "diffusion_pytorch_model.safetensors")
        (tmp_path / f"x{role}").mkdir()
        with pytest.raises(UserError, match=f"no weights in the folder .*x{role}, nor in its {name}/: expected"):
            weights.read_weights(str(tmp_path / f"x{role}"), role)
        for folder in ("hub", f"hub/{name}"):
            assert weights.read_weights(str(tmp_path / folder), role)["w"].tolist() == [1, 1]
    torch.save({"w": torch.zeros(2)}, tmp_path / "hub" / "pytorch_model.bin")
    assert weights.read_weights(str(tmp_path / "hub"), "text")["w"].tolist() == [0, 0]         # the nearer one first


def test_a_config_beside_the_weights_knows_the_head_count(tmp_path):
    from safetensors.torch import save_file

    spec = SPECS["maskgen-tiny"]
    save_file(teachers.build(spec, "net", random_weights=True).state_dict(), tmp_path / "model.safetensors")
    heads = lambda path: {b.image.heads for b in teachers.build(spec, "net", str(path)).blocks}
    assert heads(tmp_path) == {4}                                                   # the spec's
    stated = {"decoder_num_heads": 2, "sample_aesthetic_score": 5.0, "weight_init": [1]}
    (tmp_path / "config.json").write_text(json.dumps({"model": {"maskgen": stated}, "seed": 1}))
    assert heads(tmp_path) == heads(tmp_path / "model.safetensors") == {2}
    assert teachers.build(spec, "net", str(tmp_path)).score == 5.0
    (tmp_path / "config.json").write_text("{ cut short")
    with pytest.raises(UserError, match="cannot read .*config.json beside the weights"):
        teachers.build(spec, "net", str(tmp_path))


def test_unreadable_files_are_refused_with_a_sentence(tmp_path):
    from safetensors.torch import save_file

    file = seeded(generator_file(**SIZES))
    torch.save(file, tmp_path / "a.bin"), save_file(file, tmp_path / "a.safetensors")
    for name in ("a.bin", "a.safetensors"):
        whole = (tmp_path / name).read_bytes()
        state = weights.read_weights(str(tmp_path / name))
        assert all(torch.equal(state[k], v) for k, v in file.items())
        for size in (0, 100, len(whole) // 2, len(whole) - 50):
            (tmp_path / f"cut_{name}").write_bytes(whole[:size])
            with pytest.raises(weights.UserError, match=f"cannot read .*cut_{name}"):
                weights.read_weights(str(tmp_path / f"cut_{name}"))
    with pytest.raises(weights.UserError, match="no weights at .*nowhere.bin"):
        weights.read_weights(str(tmp_path / "nowhere.bin"))


class Payload:
    """What an attacker would put into a pickle: a call."""

    def __init__(self, f, path):
        self.call = f, (path,)

    def __reduce__(self):
        return self.call


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"pos_emb": torch.zeros(2), "x": Payload(os.mkdir, str(tmp_path / "ran"))}, tmp_path / "evil.bin")
    with pytest.raises(weights.UserError, match="cannot read .*evil.bin .*mkdir"):
        weights.read_weights(str(tmp_path / "evil.bin"))
    assert not (tmp_path / "ran").exists()
    torch.save({"pos_emb": torch.zeros(2), "x": Payload(os.path.normpath, str(tmp_path))}, tmp_path / "os.bin")
    torch.save({"pos_emb": torch.zeros(2), "x": Payload(zlib.crc32, b"a")}, tmp_path / "odd.bin")
    with pytest.raises(weights.UserError, match="posixpath|ntpath"):
        weights.read_weights(str(tmp_path / "os.bin"))
    assert weights.read_weights(str(tmp_path / "odd.bin"))["pos_emb"].tolist() == [0, 0]       # not called, replaced


def test_a_pickle_that_mentions_unknown_classes_gives_its_tensors_and_runs_nothing(tmp_path):
    trainer = types.ModuleType("old_trainer")
    exec("class Callback:\n    def __init__(self): self.best, self.seen = 0.5, [1, 2]", vars(trainer))
    trainer.Callback.__module__, sys.modules["old_trainer"] = "old_trainer", trainer
    w = normal(0, 3, 4)
    try:
        callbacks = {trainer.Callback: trainer.Callback(), "n": 1}
        torch.save({"state_dict": {"w": w}, "callbacks": callbacks}, tmp_path / "last.ckpt")
    finally:
        del sys.modules["old_trainer"]
    with pytest.raises(Exception, match="old_trainer"):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(weights.read_weights(str(tmp_path / "last.ckpt"))["state_dict"]["w"], w)


@pytest.mark.parametrize("name, file", [("maskgit-tiny", maskgit_file), ("meissonic-tiny", meissonic_file)])
def test_a_bare_student_in_the_published_names_is_loaded_beside_its_teacher(tmp_path, name, file):
    torch.save(seeded(shapes_in(file, SPECS[name].net)), tmp_path / "theta.bin")
    teacher, net, config = teachers.load_student(str(tmp_path / "theta.bin"), name, random_weights=True)
    expected = filled(SPECS[name].Net, file, **SPECS[name].net).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in net.state_dict().items()) and config == {}
    assert all(torch.equal(v, w) for v, w in zip(teacher.net.parameters(), tiny_teacher(name).net.parameters()))
    if teacher.text is not None:                                                    # guidance needs the empty prompt
        assert torch.equal(net.null_text, teacher.net.null_text) and not net.training


def test_a_shipped_file_that_is_missing_is_a_sentence():
    with pytest.raises(UserError, match="assets/none.bin does not ship .*--teacher_weights PATH, or add --random_weights"):
        weights.fetch(None, "assets/none.bin", "--teacher_weights")
    assert os.path.isfile(weights.fetch(None, "assets/fashion/teacher.safetensors", "--teacher_weights"))


def test_without_network_the_message_names_repository_file_and_flag(monkeypatch):
    def no_network(repo, name, **_):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=no_network))
    for role, flag in (("net", "--teacher_weights"), ("tokenizer", "--tokenizer_weights")):
        repo, name = teachers.SPECS["maskbit"].files[role]
        with pytest.raises(weights.UserError) as err:
            weights.fetch(repo, name, flag)
        assert all(word in str(err.value) for word in (repo, name, flag, "ConnectionError", "--random_weights"))
    assert repo == "markweber/maskbit_tokenizer_14bit" and name == "maskbit_tokenizer_14bit.bin"


def test_a_teacher_is_frozen_and_with_random_weights_needs_no_file():
    teacher = teachers.load_teacher("maskbit-tiny", random_weights=True)
    assert not any(p.requires_grad for m in teacher[:2] for p in m.parameters())
    assert not teacher.net.training and not teacher.tokenizer.training
    with pytest.raises(weights.UserError, match="unknown teacher 'maskgoat': expected one of maskbit,"):
        teachers.load_teacher("maskgoat")


@pytest.mark.parametrize("name", TINY)
def test_random_weights_are_always_the_same_and_leave_the_random_stream_alone(name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = load_teacher(name, random_weights=True)
    assert torch.equal(torch.rand(3), expected)
    for m, n in zip((a.net, a.tokenizer), tiny_teacher(name)[:2]):
        assert all(torch.equal(v, w) for v, w in zip(m.parameters(), n.parameters(), strict=True))


def test_attention_on_a_cpu_is_the_fused_kernel_of_a_gpu():
    torch.manual_seed(0)
    attn, h = teachers.Attention(32, 4), torch.randn(2, 9, 32)
    q, k, v = (t.view(2, 9, 4, 8).transpose(1, 2) for t in attn.qkv(h).chunk(3, -1))
    fused = attn.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 32))
    assert close(attn(h), fused)


def test_a_file_that_is_no_dict_is_refused_with_a_sentence(tmp_path):
    for content in ([1, 2], {"state_dict": [1]}):
        torch.save(content, tmp_path / "list.bin")
        with pytest.raises(UserError, match="expected a dict of tensors, got list"):
            teachers.load_student(str(tmp_path / "list.bin"), "maskbit-tiny")


def test_teacher_files_given_by_path_are_the_ones_loaded(tmp_path):
    spec, paths = teachers.SPECS["maskbit-tiny"], [str(tmp_path / f) for f in ("net.bin", "tokenizer.bin")]
    modules = teachers.MaskBit(**spec.net), teachers.BitTokenizer(**spec.tokenizer)
    for m, path in zip(modules, paths):
        torch.save(m.state_dict(), path)
    for m, n in zip(modules, teachers.load_teacher("maskbit-tiny", *paths)[:2]):
        assert all(torch.equal(v, w) for v, w in zip(m.parameters(), n.parameters(), strict=True))
    with pytest.raises(weights.UserError, match="net.bin does not fit BitTokenizer"):
        teachers.load_teacher("maskbit-tiny", paths[0], paths[0])


def test_a_student_checkpoint_brings_its_teacher_and_its_ema_weights(tmp_path):
    student, ema = (teachers.MaskBit(**teachers.SPECS["maskbit-tiny"].net).state_dict() for _ in range(2))
    config = {"teacher": "maskbit-tiny", "random_weights": True}
    torch.save({"config": config, "student": student, "ema": ema}, tmp_path / "ckpt.pt")
    teacher, net, loaded = teachers.load_student(str(tmp_path / "ckpt.pt"))
    assert loaded == config and teacher.spec.name == "maskbit-tiny" and not net.training
    assert all(torch.equal(v, ema[k]) for k, v in net.state_dict().items())
    torch.save(ema, tmp_path / "bare.bin")
    with pytest.raises(weights.UserError, match="bare.bin is a bare state dict.*--teacher NAME"):
        teachers.load_student(str(tmp_path / "bare.bin"))


# ========================================================================================== teachers: --check
def photo(path, seed, size=(40, 36)):
    img = Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    img.save(path)
    return img


def test_real_images_come_with_the_label_of_their_folder_or_the_prompt_beside_them(tmp_path):
    for c in "ab":
        (tmp_path / "classes" / c).mkdir(parents=True)
    (tmp_path / "prompts").mkdir()
    photos = [photo(tmp_path / "classes" / "ab"[i // 3] / f"{i}.png", i) for i in range(6)]
    spec = SPECS["maskgit-tiny"]
    img, labels = teachers.real_images(str(tmp_path / "classes"), spec, 6)
    cropped = [np.asarray(imagenet.centre_crop(p, 32)).transpose(2, 0, 1) for p in photos]
    assert labels == [0, 0, 0, 1, 1, 1] and np.array_equal(img.numpy(), np.stack(cropped))
    img, labels = teachers.real_images(str(tmp_path / "classes"), spec, 3)          # spread over the folder
    assert labels == [0, 0, 1] and np.array_equal(img.numpy(), np.stack(cropped[::2]))
    for i in (1, 0, 2):
        photo(tmp_path / "prompts" / f"{i}.png", i)
    for i in range(2):                                                              # the third has no prompt
        (tmp_path / "prompts" / f"{i}.txt").write_text(f" prompt {i}\n")
    img, prompts = teachers.real_images(str(tmp_path / "prompts"), SPECS["maskgen-tiny"], 64)
    assert prompts == ["prompt 0", "prompt 1"] and np.array_equal(img.numpy(), np.stack(cropped[:2]))


def test_folders_that_cannot_check_a_teacher_are_refused_with_a_sentence(tmp_path):
    (tmp_path / "prompts").mkdir(), photo(tmp_path / "prompts" / "0.png", 0)
    for folder, words in (("prompts", "each with its prompt in a text file"), ("nowhere", "no such folder")):
        with pytest.raises(UserError, match=words):
            teachers.real_images(str(tmp_path / folder), SPECS["meissonic-tiny"], 4)
    (tmp_path / "prompts" / "0.txt").write_text("x"), (tmp_path / "prompts" / "0.png").write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot read 0.png: UnidentifiedImageError"):
        teachers.real_images(str(tmp_path / "prompts"), SPECS["meissonic-tiny"], 4)


class AllKnowing:
    """Net and tokenizer of a world where an image of class c is all tokens c: certain of them if told the class."""

    V, L, G, null = 8, 16, 1, lambda self, cond: (torch.full_like(cond[0], 8),)

    def tables(self):
        return torch.zeros(1, 9, 1), torch.zeros(())

    def parameters(self):
        return iter([torch.zeros(1)])

    def __call__(self, e, cond):
        return 100 * F.one_hot(cond[0], 9)[:, None, None, :8].expand(-1, 16, 1, 8).float()

    def encode(self, img):
        return (img[:, :1, 0, 0] * 255 / 10).round().long()[..., None].expand(-1, 16, 1)

    def decode(self, e, cond):
        return torch.full((len(e), 3, 4, 4), 0.25)


def test_knowing_is_measured_in_decibels_and_in_nats_a_masked_token():
    labels, world = [0, 3, 7, 3, 5], AllKnowing()
    img = (10 * torch.tensor(labels, dtype=torch.uint8)).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    found = teachers.knows(teachers.Teacher(world, world, SPECS["maskgit-tiny"]), img, labels, batch=2)
    error = (0.25 - img.double() / 255).square().mean().item()
    assert found == pytest.approx({"psnr": -10 * math.log10(error), "nats": 0, "nats_null": math.log(8),
                                   "nats_uniform": math.log(8), "images": 5}, abs=1e-5)


def test_check_reports_each_file_and_what_the_teacher_knows(tmp_path, capsys):
    teacher, spec = tiny_teacher("maskgen-tiny"), SPECS["maskgen-tiny"]
    for role in spec.roles:
        torch.save(getattr(teacher, role).state_dict(), tmp_path / f"{role}.bin")
    photo(tmp_path / "a.png", 0), (tmp_path / "a.txt").write_text("a cat")
    path = lambda role: str(tmp_path / f"{role}.bin")
    args = types.SimpleNamespace(check="maskgen-tiny", random_weights=False, text_activation=None, device="cpu", n=4,
                                 images=str(tmp_path), teacher_weights=path("net"),
                                 tokenizer_weights=path("tokenizer"), text_weights=path("text"))
    teachers.check(args)
    out = capsys.readouterr().out.splitlines()
    for line, role in zip(out, spec.roles):
        n = sum(p.numel() for p in getattr(teacher, role).parameters())
        assert line.startswith(role) and " ok " in line and path(role) in line
        assert f"{n:,} parameters, all finite: yes" in line
    found, expected = json.loads(out[-1]), teachers.knows(teacher, *teachers.real_images(str(tmp_path), spec, 4))
    assert found.pop("teacher") == "maskgen-tiny" and found == pytest.approx(expected)
    args.tokenizer_weights = args.teacher_weights
    with pytest.raises(UserError, match="maskgen-tiny is not complete"):
        teachers.check(args)
    assert "tokenizer  NOT  " in capsys.readouterr().out


def test_check_ends_with_2_and_a_sentence_where_a_file_is_not_right(tmp_path):
    command = [sys.executable, os.path.join(ROOT, "teachers.py"), "--check", "maskbit-tiny"]
    done = subprocess.run([*command, "--teacher_weights", str(tmp_path / "no.bin")], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "maskbit-tiny is not complete" in done.stderr
    assert "net        NOT  no weights at" in done.stdout and "tokenizer  ok " in done.stdout
    with pytest.raises(UserError, match="--n 0: expected 1 image or more"):
        teachers.check(teachers.flags().parse_args(["--check", "maskbit-tiny", "--n", "0"]))


@pytest.mark.skipif(not os.environ.get("FULL_SIZE"), reason="a minute and 4 GB of memory: set FULL_SIZE=1")
def test_full_size_maskbit_gives_the_golden_numbers():
    net = weights.load_state(teachers.MaskBit(), seeded(generator_file()), "seeded").eval()
    x = integers(20, 128, 2, 256, 2).masked_fill(uniform(21, 2, 256, 2) < 0.5, 128)
    tok = weights.load_state(teachers.BitTokenizer(), seeded(tokenizer_file()), "seeded").eval()
    t, img = integers(22, 2**14, 1, 256), F.interpolate(uniform(23, 1, 3, 16, 16).float(), scale_factor=16)
    with torch.no_grad():
        z = net(se.embed_tokens(x, *net.tables()), (torch.tensor([207, 1000]),))
        out = tok.decode(se.embed_tokens(torch.stack([t % 128, t // 128], -1), *tok.tables()), clamp=False)
        latent = tok.encoder(img)
    agrees(z, [0.01411667, 0.09739441, -1.184911, 1.158718, 0.2430829, -1.178903], 105622.891)
    agrees(out, [-0.1405859, -0.003939517, -0.009886682, -0.1175381, -0.193871, -0.1649193], 103770.847)
    agrees(latent, [0.09320036, 0.4105314, 0.1292425, -0.364826, 0.2273682, 0.3171203], 1785.9486)


# ================================================================================================= gan.py
NANO = Spec("nano", MaskBit, dict(bits=6, grid=4, width=32, depth=3, heads=2, mlp=64, classes=3),
            BitTokenizer, dict(channels=1, hidden=8, mult=(1, 2), blocks=1, bits=6, norm_groups=4),
            teachers.maskbit_plan, {4: dict(guidance=1.0, temperature=1.0)}, image=(1, 8, 8),
            student=dict(init_ratio=0.6, noise=0.1, temperature=1.0))


def nano_gan(B=4):
    """A frozen nano teacher, a discriminator, logits, condition and tables, all seeded."""
    torch.manual_seed(0)
    net = MaskBit(**NANO.net).eval().requires_grad_(False)
    disc = gan.Discriminator(32, gan.head_layers(3, 2), width=16, mlp=16, grid=4)
    return net, disc, torch.randn(B, 16, 2, 8), (torch.arange(B) % 3,), *net.tables()


def test_gan_gradient_is_autograd_of_equation_8_and_reaches_the_student_alone():
    net, disc, z, cond, E, bias = nano_gan()
    mask = torch.rand(4, 16, 2) < 0.5
    g, loss = gan.gan_grad(z, disc, net, cond, mask, E, bias)
    z64 = z.double().requires_grad_()                       # the same by hand, in float64, without the functions of gan.py
    p = z64.softmax(-1)
    e = sum(torch.where(mask[:, :, k, None], E[k, -1].double(), p[:, :, k] @ E[k, :-1].double()) for k in range(2)) + bias
    d = copy.deepcopy(disc).double()(copy.deepcopy(net).double()(e, cond, disc.layers))
    true = -torch.sigmoid(d).log().mean()
    true.backward()
    assert abs(loss - true) < 1e-6 and (g - z64.grad).abs().max() < 1e-6 * max(1, z64.grad.abs().max())
    assert g.abs().sum() > 0 and all(p.grad is None for p in (*net.parameters(), *disc.parameters()))
    assert (g[mask] == 0).all() and (g[~mask].abs().sum(-1) > 0).all()      # masked units hide their logits


def test_discriminator_step_trains_the_heads_alone_and_masks_real_and_fake_alike():
    net, disc, z, cond, E, bias = nano_gan()
    x = torch.randint(8, (4, 16, 2))
    z = (F.one_hot(x, 8) * 1e4).float().requires_grad_()                    # one-hot fakes that equal the real tokens
    for share in (0.0, 0.4, 1.0):
        d_real, d_fake = gan.disc_logits(z, x, disc, net, cond, torch.rand(4, 16, 2) < share, E, bias)
        assert torch.allclose(d_real, d_fake, atol=1e-6)                    # same masks, so D cannot tell them apart
    gan.disc_loss(d_real, d_fake).backward()
    assert z.grad is None and all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in disc.parameters())


def test_gan_losses_are_equations_7_and_8():
    d_real, d_fake = torch.tensor([0.3, -1.2, 4.0]), torch.tensor([-0.7, 2.0, 0.1])
    D = torch.sigmoid
    assert torch.allclose(gan.disc_loss(d_real, d_fake), -D(d_real).log().mean() - (1 - D(d_fake)).log().mean())
    assert torch.allclose(gan.gen_loss(d_fake), -D(d_fake).log().mean())


def test_gan_mask_ratio_zero_masks_nothing():
    scores = torch.rand(2, 16, 2)
    assert dimo.exact_mask(0.0, scores, least=0).sum() == 0 and dimo.exact_mask(0.95, scores, least=0).sum() == 2 * 30


@pytest.mark.parametrize("teacher, depth, features, heads, mlp, grid, millions", [
    ("MaskBit", 24, 1024, 4, 2048, 16, 85), ("MaskGit", 24, 768, 4, 2048, 16, 72), ("MaskGen", 16, 1024, 6, 4096, None, 65)])
def test_discriminator_has_about_the_size_of_table_5(teacher, depth, features, heads, mlp, grid, millions):
    with torch.device("meta"):
        disc = gan.Discriminator(features, gan.head_layers(depth, heads), 1024, mlp, grid)
    assert abs(sum(p.numel() for p in disc.parameters()) / 1e6 / millions - 1) < 0.1
    assert len(disc.layers) == heads and disc.layers[-1] == depth - 1


@pytest.mark.parametrize("name", TINY)
def test_discriminator_reads_every_teacher_and_its_gradient_reaches_the_logits(name):
    teacher, x, _, cond = tiny_inputs(name)
    net, mask = teacher.net, x == teacher.net.V
    torch.manual_seed(0)
    disc = gan.Discriminator(net.width, gan.head_layers(net.depth, 2), 16, 16, net.feature_grid)
    z = torch.randn(*x.shape, net.V + (name == "maskgit-tiny"))
    g, _ = gan.gan_grad(z, disc, net, cond, mask, *net.tables())
    assert g.shape == z.shape and (g[mask] == 0).all() and (g[~mask].abs().sum(-1) > 0).all()


def test_heads_read_a_row_of_tokens_by_convolutions_in_one_dimension():
    row = gan.Head(8, 8, grid=None)
    assert isinstance(row.net[0], torch.nn.Conv1d) and row(torch.randn(2, 12, 8)).shape == (2, 8)
    assert gan.head_layers(24, 4) == (5, 11, 17, 23) and gan.head_layers(16, 6) == (1, 4, 7, 9, 12, 15)


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
        model = reward.ImageReward(**BLIP) if name == "imagereward" else reward.ClipReward(CLIP, name)
    return model.to_empty(device="cpu")


@functools.cache
def small_reward(name):
    """A small frozen reward on seeded weights, which come through the published names."""
    return weights.load_state(new_reward(name), seeded(reward_file(name)), name).eval().requires_grad_(False)


def ids_of(name):
    return BLIP_IDS if name == "imagereward" else CLIP_IDS


@pytest.mark.parametrize("name, image, image_sum, text, text_sum", [
    ("clip", [-0.21972844, -0.89318186, -1.3126886, -0.3063544, -1.1361356, -0.71204489], 52.8878,
     [1.953198, 2.3370972, -0.82737952, -0.48016497, 0.43021369, 1.5099404], 65.974692),
    ("pickscore", [-0.65420979, 1.1045085, -0.65057993, -2.8145766, -0.88793361, 0.27163789], 55.672854,
     [-0.10486971, -1.9256587, 0.42523232, -1.2880697, -0.99182034, -1.3936963], 60.077098)])
def test_towers_of_clip_give_the_golden_features_from_either_librarys_file(name, image, image_sum, text, text_sum):
    model, x = small_reward(name), normal(100, 2, 3, 56, 56)
    f, g = model.image_features(x), model.text_features(CLIP_IDS)
    agrees(model.clip.encode_image(x), image, image_sum)
    agrees(model.clip.encode_text(CLIP_IDS), text, text_sum)
    assert close(f.norm(dim=-1), torch.ones(2)) and close(g, F.normalize(model.clip.encode_text(CLIP_IDS), dim=-1))


@pytest.mark.parametrize("name, first, second, crossed", [
    ("hps", 0.033681177, -0.13000922, (-0.16778989, 0.038214296)),
    ("clip", 0.033681177 * 1.0999289, -0.13000922 * 1.0999289, (-0.16778989 * 1.0999289, 0.038214296 * 1.0999289)),
    ("pickscore", 0.037653606, 0.23647058, (0.27435723, -0.0013552046))])
def test_scores_of_the_clips_are_the_golden_ones_of_the_pairs(name, first, second, crossed):
    model, x = small_reward(name), normal(100, 2, 3, 56, 56)
    agrees(model(x, CLIP_IDS), [first, second], tol=1e-6)               # image i with prompt i, and no other pair
    agrees(model(x, CLIP_IDS.flip(0)), crossed, tol=1e-6)
    agrees(model(x[1:], CLIP_IDS[1:]), [second], tol=1e-6)


def test_imagereward_gives_the_golden_states_and_rewards():
    model, x = small_reward("imagereward"), normal(200, 2, 3, 56, 56)
    image = model.see(x)
    agrees(image, [-0.5971055, 0.20513274, 1.7414109, -0.45013115, -0.10107156, 1.2976359], 1316.3491)
    text = model.read(BLIP_IDS, image)
    agrees(text, [1.1846226, 0.66946173, -1.9006683, 0.63922787, -0.28535184, -1.1390226], 623.1195)
    agrees(model.head(text[:, 0]), [-2.0334203, -1.6663176])
    agrees(model(x, BLIP_IDS), [-2.1295943, -1.7743357])


def test_padding_is_not_read():
    model, x = small_reward("imagereward"), normal(200, 2, 3, 56, 56)
    assert close(model(x, BLIP_IDS), model(x, F.pad(BLIP_IDS, (0, 9))))
    assert close(model(x[1:], BLIP_IDS[1:, :4]), model(x, BLIP_IDS)[1:])
    unpadded = torch.where(BLIP_IDS == 0, 9, BLIP_IDS)                  # other words in its place do matter
    assert (model(x, unpadded) - model(x, BLIP_IDS)).abs().min() > 0.01


def test_renos_total_and_its_gradient_at_the_pixels_are_the_golden_ones():
    img = uniform(400, 1, 3, 80, 72).float().requires_grad_()
    pixels = reward.preprocess(img, 56)
    scores = {name: small_reward(name)(pixels, ids_of(name)[:1]) for name in reward.RENO}
    for name, loss in {"hps": 0.95804465, "clip": 99.95385, "pickscore": 29.914022, "imagereward": 4.3909478}.items():
        assert abs(reward.REWARDS[name].offset - scores[name].item() - loss) < 1e-5
    total = reward.reno_loss(scores)
    g = torch.autograd.grad(total.sum(), img)[0]
    assert abs(total.item() - 11.676411) < 1e-5
    assert (g[:, :, :2] == 0).all() and abs(g.abs().sum() / 228.1995 - 1) < 1e-5
    assert abs(g.mean() + 0.00045628383) < 1e-8 and abs(g.std(correction=0) - 0.017959689) < 1e-7
    assert close(reward.reno_loss(scores), 5 + 2 + 1 + 1.5 - reward.weighted(scores, reward.RENO))


# ==================================================================================== reward.py: preprocessing
def test_preprocessing_is_the_golden_one():
    img = uniform(300, 2, 3, 80, 72).float()
    x = reward.preprocess(img, 56)
    agrees(x, [0.44861475, -1.2568077, -0.99515504, -0.45824152, 1.1641777, 1.4389834], 11104.956)
    assert x.shape == (2, 3, 56, 56) and abs(x.mean() - 0.19588417) < 1e-6
    y = reward.preprocess_longest(img[:1], 56)                          # HPSv2's own: before normalisation
    black = reward.normalise(torch.zeros(1, 3, 56, 56))
    plain = (y - black) / (reward.normalise(torch.ones(1, 3, 56, 56)) - black)
    agrees(plain, [0.0, 0.0, 0.0, 0.4495967, 0.29344335, 0.38462675, 0.51855481], tol=1e-6)
    assert abs(plain.abs().sum() / 4215.5192 - 1) < 1e-6
    agrees(plain[0, 0, 28], [0.0, 0.0, 0.0, 0.26428786, 0.34196347, 0.43008566], tol=1e-6)
    agrees(reward.preprocess_longest((img[:1] * 255).byte().float() / 255, 56),
           [-1.7922626, -1.7922626, -1.7922626, -0.12263338, -0.70447391, -0.3652218], 6131.3823)


@pytest.mark.parametrize("H, W, h, w, top, left", [
    (64, 64, 56, 56, 0, 0), (80, 72, 62, 56, 3, 0), (72, 80, 56, 62, 0, 3), (63, 40, 88, 56, 16, 0),
    (41, 40, 57, 56, 0, 0), (40, 42, 56, 58, 0, 1), (56, 59, 56, 59, 0, 2), (30, 40, 56, 74, 0, 9),
    (56, 56, 56, 56, 0, 0), (56, 61, 56, 61, 0, 2), (56, 63, 56, 63, 0, 4)])
def test_sizes_are_truncated_and_crops_start_at_the_rounded_half(H, W, h, w, top, left):
    img = uniform(1, 1, 3, H, W)
    big = F.interpolate(img, (h, w), mode="bicubic", antialias=True)
    assert close(reward.preprocess(img, 56), reward.normalise(big[:, :, top : top + 56, left : left + 56]))


@pytest.mark.parametrize("H, W, h, w, top, left", [
    (80, 72, 56, 50, 0, 3), (40, 63, 36, 56, 10, 0), (56, 31, 56, 31, 0, 12), (80, 71, 56, 50, 0, 3),
    (64, 64, 56, 56, 0, 0), (20, 32, 35, 56, 10, 0)])
def test_the_longer_side_may_be_fitted_instead_and_the_rest_is_black(H, W, h, w, top, left):
    img = uniform(2, 1, 3, H, W)
    black = torch.zeros(1, 3, 56, 56).double()
    black[:, :, top : top + h, left : left + w] = F.interpolate(img, (h, w), mode="bicubic", antialias=True)
    assert close(reward.preprocess_longest(img, 56), reward.normalise(black))


def test_grey_images_count_as_three_equal_channels_and_half_precision_is_resized_in_float32():
    img = uniform(3, 2, 1, 32, 28).float()
    assert torch.equal(reward.preprocess(img, 56), reward.preprocess(img.expand(-1, 3, -1, -1), 56))
    half = reward.preprocess(img.bfloat16(), 56)
    assert half.dtype == torch.float32 and torch.equal(half, reward.preprocess(img.bfloat16().float(), 56))


# ====================================================================================== reward.py: gradients
@pytest.mark.parametrize("name", reward.REWARDS)
def test_gradient_of_every_reward_at_the_pixels_is_its_finite_difference(name):
    model, ids = copy.deepcopy(small_reward(name)).double(), ids_of(name)
    img, direction = uniform(4, 2, 3, 61, 58).requires_grad_(), normal(5, 2, 3, 61, 58).double()
    f = lambda x: model(reward.preprocess(x, 56), ids)
    score = f(img)
    g = torch.autograd.grad(score[0], img)[0]
    step = 1e-5
    slope = (f(img + step * direction) - f(img - step * direction)).detach() / (2 * step)
    assert score.dtype == torch.float64 and abs((g * direction).sum() - slope[0]) < 1e-7 * max(1, abs(slope[0]))
    assert (g[1] == 0).all() and g[0].abs().sum() > 0                   # the second image is another pair's
    assert all(p.grad is None for p in model.parameters())


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


@pytest.mark.parametrize("name", ["maskbit-tiny", "maskgit-tiny", "maskgen-tiny"])
def test_reward_gradient_is_autograd_of_equation_9_and_reaches_the_student_alone(name):
    (z, tokenizer, cond, prompts), rewards = eq9_inputs(name), rewards_of("imagereward", "clip")
    z.requires_grad_()
    g, means = reward.reward_grad(z, tokenizer, cond, rewards, prompts, reward.SEED, tau=1.5)
    E, bias = tokenizer.tables()                                        # by hand, all images at once
    p = (z / 1.5).softmax(-1)
    img = tokenizer.decode(sum(p[:, :, k] @ E[k, :-1] for k in range(len(E))) + bias, cond).clamp(0, 1)
    scores = rewards(img, prompts)
    loss = -(1.0 * scores["imagereward"] + 0.2 * scores["clip"]).mean()
    expected = torch.autograd.grad(loss, z)[0]
    assert (g - expected).abs().max() < 1e-5 * expected.abs().max() and expected.abs().max() > 0
    assert means.keys() == scores.keys() and all(abs(means[k] - s.mean()) < 1e-5 for k, s in scores.items())
    assert z.grad is None and not g.requires_grad and not means["clip"].requires_grad
    assert all(p.grad is None and not p.requires_grad for m in (tokenizer, rewards) for p in m.parameters())


def test_chunks_change_nothing_but_the_memory():
    (z, tokenizer, cond, prompts), rewards = eq9_inputs("maskgen-tiny", B=5), rewards_of("imagereward", "clip")
    seen = []
    rewards.register_forward_pre_hook(lambda module, args: seen.append((len(args[0]), args[1])))
    g, means = reward.reward_grad(z, tokenizer, cond, rewards, prompts, reward.SEED, chunk=5)
    for chunk, sizes in ((1, [1] * 5), (2, [2, 2, 1]), (8, [5])):
        seen.clear()
        g_c, means_c = reward.reward_grad(z, tokenizer, cond, rewards, prompts, reward.SEED, chunk=chunk)
        assert [n for n, _ in seen] == sizes and sum([p for _, p in seen], []) == prompts
        assert (g_c - g).abs().max() < 1e-5 * g.abs().max()
        assert all(abs(means_c[k] - v) < 1e-5 for k, v in means.items())


def test_an_images_reward_gradient_is_clipped_by_itself():
    (z, tokenizer, cond, prompts), rewards = eq9_inputs("maskgen-tiny", B=5), rewards_of("imagereward", "clip")
    g, _ = reward.reward_grad(z, tokenizer, cond, rewards, prompts, reward.SEED)
    norms = 5 * g.flatten(1).norm(dim=1)                          # of R_i: without the 1/B of the mean
    limit = norms.sort()[0][2].item() * 1.01                      # three of five are below
    clipped, _ = reward.reward_grad(z, tokenizer, cond, rewards, prompts, reward.SEED, chunk=2, clip=limit)
    for own, image, norm in zip(clipped, g, norms):
        assert (own - image * min(1, limit / norm.item())).abs().max() < 1e-5 * image.abs().max()
    assert (norms > limit).sum() == 2


def test_only_one_chunks_graph_is_alive_at_a_time():
    (z, tokenizer, cond, prompts), rewards, alive = eq9_inputs("maskgen-tiny", B=4), rewards_of("clip"), []

    def look(module, args):
        assert not any(earlier() is not None for earlier in alive), "an earlier chunk's image is still in memory"
        alive.append(weakref.ref(args[0]))

    rewards.register_forward_pre_hook(look)
    reward.reward_grad(z, tokenizer, cond, rewards, prompts, {"clip": 1.0})
    assert len(alive) == 4


def test_climbing_the_gradient_raises_the_reward():
    (z, tokenizer, cond, prompts), rewards = eq9_inputs("maskbit-tiny"), rewards_of("hps")
    means = []
    for _ in range(15):
        g, mean = reward.reward_grad(z, tokenizer, cond, rewards, prompts, {"hps": 1.0}, chunk=3)
        z, _ = z - 0.5 * g / g.abs().max(), means.append(mean["hps"].item())
    assert all(b > a for a, b in zip(means[:8], means[1:])) and means[-1] > means[0] + 0.05


def test_checkpointing_changes_neither_scores_nor_gradients():
    plain, saving = (rewards_of("clip", "imagereward", checkpointing=on) for on in (False, True))
    img = uniform(6, 2, 3, 40, 40).float().requires_grad_()
    results, passes = [], {False: 0, True: 0}
    for rewards in (plain, saving):
        def count(module, args, on=rewards.checkpointing):
            passes[on] += 1

        rewards.models["clip"].clip.visual.register_forward_pre_hook(count)
        scores = rewards(img, ASKED[:2])
        results.append((scores, torch.autograd.grad(reward.weighted(scores, reward.SEED).sum(), img)[0]))
    (a, g), (b, h) = results
    assert all(torch.equal(a[k], b[k]) for k in a) and close(g, h) and passes == {False: 1, True: 2}


# ======================================================================================== reward.py: loading
@pytest.mark.parametrize("name, file, count, digest, parameters", [
    ("clip", clip_reward_file, 686, "2d21a943bdca7a5569e9ad67870e7f0e5fc6deb5d023c6c177a279cc47148c4e", 986_109_441),
    ("hps", clip_reward_file, 686, "2d21a943bdca7a5569e9ad67870e7f0e5fc6deb5d023c6c177a279cc47148c4e", 986_109_441),
    ("pickscore", pickscore_file, 912, "3e7dfbae763da2a86242ae85086d490c3eded4729854ab00fe76ba105f7c615a", 986_109_441),
    ("imagereward", imagereward_file, 625, "b483298b77da9ee322e5b54d925cbce2019d169d5b4c4b48789138fa629baa7c",
     446_665_953)])
def test_published_rewards_have_exactly_the_published_tensors(name, file, count, digest, parameters):
    shapes = file()
    if name == "pickscore":
        shapes |= {"text_model.embeddings.position_ids": [1, 77], "vision_model.embeddings.position_ids": [1, 257]}
    assert len(shapes) == count and fingerprint(shapes) == digest       # the files' true key list
    with torch.device("meta"):
        model = reward.ImageReward() if name == "imagereward" else reward.ClipReward(kind=name)
        state, complaints = weights.published_state({k: torch.empty(s) for k, s in shapes.items()}, model)
    shape = lambda tensors: {k: v.shape for k, v in tensors.items()}
    assert not complaints and shape(state) == shape(model.state_dict())
    unused = sum(math.prod(s) for k, s in shapes.items() if k.startswith(("blip.vision_proj", "blip.text_proj")))
    assert sum(p.numel() for p in model.parameters()) + unused == parameters


def test_no_file_says_the_numbers_of_heads():
    with torch.device("meta"):
        clip, judge = reward.ClipReward().clip, reward.ImageReward()
    assert {b.attn.num_heads for b in (*clip.visual.transformer.resblocks, *clip.transformer.resblocks)} == {16}
    assert {b.attn.heads for b in judge.blocks} == {16}
    assert {r.heads for b in judge.layers for r in (b.attn, b.cross)} == {12}
    activations = {type(m) for model in (clip, judge) for m in model.modules() if "GELU" in type(m).__name__}
    assert activations == {nn.GELU} and {m.approximate for m in clip.modules() if isinstance(m, nn.GELU)} == {"none"}
    eps = lambda model: {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}
    assert eps(clip) == {1e-5} and eps(judge.blocks) == {judge.norm.eps} == {1e-6} and eps(judge.layers) == {1e-12}


def test_packed_rows_of_a_tower_are_the_files_q_k_and_v_and_projections_are_turned():
    file, state = seeded(reward_file("pickscore")), small_reward("pickscore").state_dict()
    name = "encoder.layers.2.self_attn"
    for side, block in (("text_model", "clip.transformer.resblocks.2.attn"),
                        ("vision_model", "clip.visual.transformer.resblocks.2.attn")):
        for end in ("weight", "bias"):
            rows = torch.cat([file[f"{side}.{name}.{part}_proj.{end}"] for part in "qkv"])
            assert torch.equal(state[f"{block}.in_proj_{end}"], rows)
    assert torch.equal(state["clip.visual.proj"], file["visual_projection.weight"].T)
    assert torch.equal(state["clip.text_projection"], file["text_projection.weight"].T)


@pytest.mark.parametrize("name", reward.REWARDS)
def test_rewards_load_from_half_precision_wrapped_and_own_files_with_what_else_they_hold(name, tmp_path):
    expected, file = small_reward(name).state_dict(), seeded(reward_file(name))
    ids = {"imagereward": {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]},
           "pickscore": {"text_model.embeddings.position_ids": torch.arange(16)[None],
                         "vision_model.embeddings.position_ids": torch.arange(17)[None]}}.get(name, {})
    half = {k: v.half() for k, v in file.items()}
    for i, variant in enumerate((file | ids, expected, {"state_dict": file, "epoch": 3}, {"state_dict": half})):
        torch.save(variant, tmp_path / f"{i}.pt")
        model = weights.load_state(new_reward(name), weights.read_weights(str(tmp_path / f"{i}.pt")), "variant")
        for k, v in model.state_dict().items():
            assert v.dtype == torch.float32 and torch.equal(v, expected[k].half().float() if i == 3 else expected[k])


@pytest.mark.parametrize("name", reward.REWARDS)
def test_every_file_but_the_right_one_is_refused_by_a_reward(name):
    file, model = seeded(reward_file(name)), small_reward(name)
    assert "missing" in refusal(model, {k: v for k, v in file.items() if "fc" not in k and "dense" not in k})
    assert "unexpected" in refusal(model, file | {"visual.extra": torch.zeros(1)})
    key = next(k for k, v in file.items() if k.endswith(("ln_1.bias", "layer_norm1.bias", "norm1.bias")))
    assert "of another shape" in refusal(model, file | {key: torch.zeros(7)})
    other = "clip" if name == "imagereward" else "imagereward"
    message = refusal(model, seeded(reward_file(other)), "wrong.pt")
    assert message.startswith(f"wrong.pt does not fit {type(model).__name__}") and len(message) < 900


def test_a_vocabulary_that_the_user_names_is_taken_also_where_a_tiny_world_has_its_own(tmp_path):
    (tmp_path / "words.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    with pytest.raises(UserError, match="words.txt has 5 pieces, expected 31"):
        reward.load_judges(SPECS["meissonic-tiny"], {"imagereward": 1.0}, vocab=str(tmp_path / "words.txt"))


def test_load_rewards_reads_the_given_files_and_freezes(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "ROOT", str(tmp_path))                # relative paths may be the repository's
    for name in reward.RENO:
        torch.save(seeded(reward_file(name)), tmp_path / f"{name}.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(64))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    paths = {name: str(tmp_path / f"{name}.pt") for name in reward.RENO} | {"clip": "clip.pt"}
    configs = {name: BLIP if name == "imagereward" else CLIP for name in reward.RENO}
    rewards = reward.load_rewards(list(reward.RENO), paths, vocab=str(tmp_path / "vocab.txt"), configs=configs)
    img, prompts = uniform(7, 2, 3, 80, 72).float(), ["w3 w60", "w1"]
    scores = rewards(img, prompts)
    pixels = reward.preprocess(img, 56)
    for name, model in rewards.models.items():
        assert close(scores[name], small_reward(name)(pixels, model.tokenize(prompts)))
        assert scores[name].shape == (2,) and scores[name].dtype == torch.float32
    assert not rewards.training and not any(p.requires_grad for p in rewards.parameters())
    assert rewards.models["imagereward"].tokenize(prompts)[:, :5].tolist() == [[2, 7, 64, 3, 0], [2, 5, 3, 0, 0]]


def test_the_scale_of_the_clip_score_is_an_option():
    img = uniform(8, 2, 3, 56, 56).float()
    (s, p), (cosine, q) = (rewards_of("clip", "pickscore", clip_scaled=on)(img, ASKED[:2]).values()
                           for on in (True, False))
    scale = rewards_of("clip").models["clip"].clip.logit_scale.exp()
    assert close(s, scale * cosine) and torch.equal(p, q) and abs(scale - 1 / 0.07) < 1e-4


def test_bf16_rewards_are_close_and_keep_their_norms_in_float32():
    torch.manual_seed(0)
    for name in reward.REWARDS:
        full, half = rewards_of(name), rewards_of(name, dtype=torch.bfloat16)
        img = uniform(9, 4, 3, 60, 60).float().requires_grad_()
        a, b = full(img, ASKED[:4])[name], half(img, ASKED[:4])[name]
        g, h = (torch.autograd.grad(s.sum(), img)[0] for s in (a, b))
        unit = 1 / 0.07 if name in ("clip", "pickscore") else 1.0
        assert b.dtype == torch.float32 and (a - b).abs().max() < 0.01 * unit
        assert F.cosine_similarity(g.flatten(), h.flatten(), dim=0) > 0.99
        kinds = lambda *types: {p.dtype for m in half.modules() if isinstance(m, types) for p in m.parameters()}
        assert kinds(nn.LayerNorm) == {torch.float32} and kinds(nn.Conv2d, nn.MultiheadAttention) == {torch.bfloat16}
        bits = [sum(p.nbytes for k, p in r.named_parameters() if "head" not in k) for r in (full, half)]
        assert bits[1] < 0.56 * bits[0]


def test_rewards_run_in_their_own_precision_whatever_the_callers():
    rewards, img = rewards_of("clip", "imagereward"), uniform(10, 2, 3, 56, 56).float()
    plain = rewards(img, ASKED[:2])
    with torch.autocast("cpu", torch.bfloat16):
        inside = rewards(img, ASKED[:2])
    assert all(torch.equal(plain[k], inside[k]) for k in plain)


def test_random_rewards_are_always_the_same_and_leave_the_random_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = rewards_of("clip", "imagereward")
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(v, w) for v, w in zip(a.parameters(), rewards_of("clip", "imagereward").parameters()))


@pytest.mark.parametrize("change, words", [
    (dict(names=["clop"]), "unknown reward 'clop': expected some of clip, hps, pickscore, imagereward"),
    (dict(paths={"hsp": "x"}), "unknown reward 'hsp'"), (dict(names=[]), "expected names of rewards"),
    (dict(dtype=torch.float16), "in float32 or bfloat16"),
    (dict(paths={"clip": "/nowhere/x.pt"}), "no weights at /nowhere/x.pt"),
    (dict(names=["imagereward"], vocab="/nowhere/v.txt"), "cannot read /nowhere/v.txt as a vocabulary")])
def test_rewards_that_cannot_be_loaded_are_refused_with_a_sentence(change, words):
    with pytest.raises(UserError, match=words):
        reward.load_rewards(**{"names": ["clip"], "configs": {"clip": CLIP}, **change})


def test_vocabularies_that_do_not_fit_are_refused_with_a_sentence(tmp_path):
    path = tmp_path / "vocab.txt"
    for text, words in (("a\nb", "is not BERT's vocabulary"), ("[CLS]\n[PAD]\n[UNK]\n[SEP]", "expected .PAD. first"),
                        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\na", "has 5 pieces, expected 68")):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            reward.load_rewards(["imagereward"], vocab=str(path), random_weights=True, configs={"imagereward": BLIP})
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="UnicodeDecodeError"):
        reward.WordPiece(str(path))


def test_missing_packages_and_missing_network_are_named(monkeypatch):
    def no_network(repo, name, **_):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=no_network))
    for name, (repo, file, _) in reward.REWARDS.items():
        with pytest.raises(UserError) as err:
            reward.load_rewards([name], vocab=None, configs={} if name == "imagereward" else {name: CLIP})
        repo, file = reward.VOCAB if name == "imagereward" else (repo, file)
        flag = "--bert_vocab" if name == "imagereward" else f"--{name}_weights"
        assert all(w in str(err.value) for w in (repo, file, flag, "ConnectionError"))
    monkeypatch.setitem(sys.modules, "open_clip.model", None)
    with pytest.raises(UserError, match="pip install open_clip_torch"):
        reward.ClipReward(CLIP)


# ======================================================================================== reward.py: prompts
@pytest.mark.parametrize("img, prompts, words", [
    (torch.rand(2, 3, 8, 8), "a cat", "expected a list of 2 prompts, one string an image, got str"),
    (torch.rand(2, 3, 8, 8), ["a cat"], "got 1"), (torch.rand(1, 3, 8, 8), ["a", "b"], "got 2"),
    (torch.rand(2, 3, 8, 8), ["a", None], "expected a list of 2"),
    (torch.rand(1, 4, 8, 8), ["a"], r"got \(1, 4, 8, 8\)"),
    (torch.rand(3, 8, 8), ["a"], r"got \(3, 8, 8\)"), ((torch.rand(1, 3, 8, 8) * 255).byte(), ["a"], "torch.uint8"),
    (torch.rand(1, 3, 8, 8) * 255, ["a"], r"pixels in \[0, 1\], got"),
    (torch.rand(1, 3, 8, 8) * 2 - 1, ["a"], r"pixels in")])
def test_what_cannot_be_scored_is_refused_with_a_sentence(img, prompts, words):
    with pytest.raises(UserError, match=words):
        rewards_of("clip")(img, prompts)


def test_eq9_refuses_the_wrong_number_of_prompts_and_weights_without_a_reward():
    z, tokenizer, cond, prompts = eq9_inputs("maskbit-tiny")
    with pytest.raises(UserError, match="expected a list of 3 prompts"):
        reward.reward_grad(z, tokenizer, cond, rewards_of("hps"), prompts + ["more"], {"hps": 1.0})
    with pytest.raises(UserError, match="no reward 'imagereward' among those loaded: hps"):
        reward.reward_grad(z, tokenizer, cond, rewards_of("hps"), prompts, reward.SEED)


ODD = ["", " \n\t ", "x" * 10_000, "word " * 2_000, "\U0001F600\U0001F1FA\U0001F1F8\u200d", "!?.,;:-()[]{}'\"",
       "\u5c71 \u0301 caf\u00e9"]


def test_odd_prompts_are_scored_and_no_sequence_is_too_long():
    rewards = rewards_of("clip", "imagereward")
    scores = rewards(torch.rand(len(ODD), 3, 8, 8), ODD)
    assert all(torch.isfinite(s).all() and s.shape == (len(ODD),) for s in scores.values())
    ids = rewards.models["clip"].tokenize(ODD)
    assert ids.shape == (len(ODD), 16) and ((ids == 63).sum(1) == 1).all() and (ids[:, 0] == 62).all()
    assert ids[0].tolist() == ids[1].tolist() == [62, 63] + [0] * 14 and ids[2, -1] == 63
    ids = rewards.models["imagereward"].tokenize(ODD)
    assert ids.shape == (len(ODD), 35) and ids[0, :3].tolist() == [2, 3, 0] and ids[3, -1] == 3


def test_prompts_become_the_golden_tokens_of_every_reward(tmp_path):
    clip = reward.ClipReward(dict(CLIP, text_cfg=dict(CLIP["text_cfg"], context_length=77, vocab_size=49408)))
    known = """
        101 [CLS] 102 [SEP] 0 [PAD] 100 [UNK] 1037 a 6302 photo 1997 of 6379 purple 4511 wine 3221 glass
        1998 and 2304 black 6207 apple 2417 red 3899 dog 1010 , 1016 2 8870 cats 1004 & 7668 cafe 1011 -
        2009 it 1005 ' 1055 s 24057 raining 999 ! 2019 an 5186 extremely 6851 detailed 4717 matt 2063 ##e
        4169 painting 3418 ancient 26433 overgrown 16941 cyber 14289 ##pu 8950 ##nk 5040 cathedral 2007 with
        16231 neon 9702 stained 3872 volume 12412 ##tric 2422 light 17796 intricate 9874 trend 2075 ##ing
        2006 on 2840 arts 12516 ##tation 1022 8 2243 ##k
    """.split()
    lines = [f"[unused{i}]" for i in range(30522)]
    for i, piece in zip(known[::2], known[1::2]):
        lines[int(i)] = piece
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n")
    bert = reward.WordPiece(str(tmp_path / "vocab.txt"))
    for prompt, bert_ids, clip_ids in (
        ("a photo of a purple wine glass and a black apple",
         [101, 1037, 6302, 1997, 1037, 6379, 4511, 3221, 1998, 1037, 2304, 6207, 102],
         [49406, 320, 1125, 539, 320, 5496, 2604, 3313, 537, 320, 1449, 3055, 49407]),
        ("A red dog, 2 cats & a caf\u00e9 -- it's RAINING!",
         [101, 1037, 2417, 3899, 1010, 1016, 8870, 1004, 1037, 7668, 1011, 1011, 2009, 1005, 1055, 24057, 999, 102],
         [49406, 320, 736, 1929, 267, 273, 3989, 261, 320, 15304, 2432, 585, 568, 13964, 256, 49407]),
        ("An extremely detailed matte painting of an ancient overgrown cyberpunk cathedral with neon stained glass, "
         "volumetric light, intricate, trending on artstation, 8k, by greg rutkowski and alphonse mucha, in the style "
         "of studio ghibli",
         [101, 2019, 5186, 6851, 4717, 2063, 4169, 1997, 2019, 3418, 26433, 16941, 14289, 8950, 5040, 2007, 16231,
          9702, 3221, 1010, 3872, 12412, 2422, 1010, 17796, 1010, 9874, 2075, 2006, 2840, 12516, 1010,
          1022, 2243, 102],
         [49406, 550, 6519, 12609, 19771, 3086, 539, 550, 5810, 1658, 7120, 36896, 7865, 593, 13919, 13751, 3313,
          267, 3563, 19950, 1395, 267, 29616, 267, 6087, 525, 1486, 2631, 267, 279, 330, 267, 638, 7943,
          14973, 17649, 537, 37865, 611, 42191, 267, 530, 518, 1844, 539, 3155, 40555, 49407])):
        assert bert(prompt) == bert_ids + [0] * (35 - len(bert_ids))
        assert clip.tokenize([prompt])[0].tolist() == clip_ids + [0] * (77 - len(clip_ids))


def test_wordpiece_takes_the_longest_piece_and_gives_up_whole_words(tmp_path):
    pieces = "[PAD] [UNK] [CLS] [SEP] un ##aff ##able ##a ##b a aa aff \u5c71 ! ' \u03c3 i ##i $ e".split()
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    bert = reward.WordPiece(str(tmp_path / "vocab.txt"))
    said = lambda text: [pieces[i] for i in bert(text) if i > 3 or i == 1]
    assert said("unaffable") == ["un", "##aff", "##able"] and said("aaa") == ["aa", "##a"]
    assert said("unaffx un") == ["[UNK]", "un"] and said("a" * 101) == ["[UNK]"]
    assert said("a" * 100) == ["aa"] + ["##a"] * 32                 # cut to 35 with start and end
    assert said("UN\u0301AFFABLE!a\u5c71a") == ["un", "##aff", "##able", "!", "a", "\u5c71", "a"]
    assert said("a\x00\u200da\tun\u00a0un\ufffd") == ["aa", "un", "un"]      # controls go, any space separates
    assert said("\u0130") == ["i"] and said("$e\u0301'") == ["$", "e", "'"]      # \u0130 is a dotted capital I
    assert bert("", 4) == [2, 3, 0, 0] and bert("un un un un", 4) == [2, 4, 4, 3]


# ================================================================================================= tteo.py
# ReNO's own loop, run on two losses of a linear-sigmoid generator, five times: settings of `optimise`, the weighted
# loss and the norm of the variable at every generation, the index of the best, first entries of the last variable.
RENO_RUNS = {
    "its defaults": (dict(iterations=8, lr=5.0, clip=0.1, regularise=0.01),
        [3.45747113, 3.16622734, 2.8104279, 2.50045347, 2.37743664, 2.41202855, 2.42957163, 2.41393423],
        [5.40261364, 4.78872108, 4.09782362, 3.71388507, 4.12794256, 4.82698536, 5.19040442, 5.22804499], 4,
        [-1.00446677, 1.28331852, -0.311138779, -0.684122801, 0.200449735, -1.46944427, 0.0507860035, -1.65121281]),
    "the paper's": (dict(iterations=4, lr=0.2),
        [3.45747113, 3.41872311, 3.36441422, 3.29718637], [5.40261364, 5.31785297, 5.19934893, 5.05322742], 3,
        [0.000586079143, -0.36716339, -1.22242379, -0.52241379, 0.482113838, -0.371284783, -0.183770269, -0.519194365]),
    "regularised": (dict(iterations=4, lr=0.2, regularise=0.01),
        [3.45747113, 3.41900992, 3.36525202, 3.29893541], [5.40261364, 5.31912708, 5.20309734, 5.06114149], 3,
        [0.00063741405, -0.367852747, -1.22430158, -0.52319628, 0.4828628, -0.371749878, -0.184104532, -0.519938171]),
    "plain momentum": (dict(iterations=4, lr=0.2, nesterov=False),
        [3.45747113, 3.43703437, 3.39856315, 3.34455991], [5.40261364, 5.35782576, 5.27378559, 5.15639925], 3,
        [0.0138891432, -0.40656656, -1.23729861, -0.521114767, 0.490625083, -0.346714646, -0.199974805, -0.512826264]),
    "overshooting": (dict(iterations=6, lr=200.0),
        [3.45747113, 5.75727272, 5.73713017, 5.73413324, 5.72744465, 5.67194653],
        [5.40261364, 117.876198, 170.306625, 217.164215, 259.369598, 297.425873], 0,
        [-22.0539742, 72.563591, 33.0910759, -3.09352708, 1.55658948, -49.0561523, 20.1533775, -23.3849716]),
}


def toy_generator(seen):
    """ReNO's toy problem: its start, image_of (which notes each variable it is given in `seen`), loss_of."""
    W, T, Q = normal(700, 32, 192) / 32**0.5, normal(800, 1, 3, 8, 8).sigmoid(), normal(900, 1, 3, 8, 8)

    def image_of(e):
        seen.append(e.detach().clone())
        return (e.flatten(1) @ W).sigmoid().view(-1, 3, 8, 8)

    def loss_of(img):
        return 20 * (img - T).square().mean((1, 2, 3)) + 0.05 * (30 - (img * Q).sum((1, 2, 3)))

    return normal(600, 1, 2, 4, 4), image_of, loss_of


@pytest.mark.parametrize("run", RENO_RUNS)
def test_the_loop_does_what_renos_own_does(run):
    settings, losses, norms, index, last = RENO_RUNS[run]
    e, image_of, loss_of = toy_generator(seen := [])
    best = tteo.optimise(e, image_of, loss_of, **settings)
    for ours, theirs in ((best.history, losses), (torch.stack([v.norm() for v in seen]), norms), (seen[-1], last)):
        agrees(ours, theirs, tol=1e-6 * max(map(abs, theirs)))
    assert best.index.tolist() == [index] and best.loss == best.history[index]
    assert torch.equal(best.e, seen[index]) and torch.equal(best.img, image_of(best.e))
    assert len(seen) == settings["iterations"] + 1, "an image an iteration, and the one of the line above"


def test_the_best_iterate_is_a_copy_and_the_start_is_left_alone():
    e, image_of, loss_of = toy_generator(seen := [])
    before = e.clone()
    best = tteo.optimise(e, image_of, loss_of, iterations=6, lr=200.0)
    assert torch.equal(e, before) and torch.equal(best.e, before), "overshooting: the best is the start"
    assert not any(torch.equal(v, before) for v in seen[1:]) and best.e.data_ptr() != e.data_ptr()
    assert not any(t.requires_grad for t in best)


@pytest.mark.parametrize("settings", [dict(lr=0.2), dict(lr=5.0, clip=0.1, regularise=0.01), dict(lr=200.0)])
def test_starts_of_a_batch_do_not_know_of_each_other(settings):
    e, image_of, loss_of = toy_generator([])
    pair = torch.cat([e, 2 * normal(601, *e.shape)])
    both, one, two = (tteo.optimise(part, image_of, loss_of, **settings) for part in (pair, pair[:1], pair[1:]))
    for together, a, b in zip(both[:4], one, two):
        assert torch.allclose(together, torch.cat([a, b]), rtol=1e-5, atol=1e-5)
    assert torch.allclose(both.history, torch.cat([one.history, two.history], 1), atol=1e-5)


def test_two_nesterov_steps_by_hand():
    e, a, lr = normal(1, 2, 3).double(), torch.tensor([1.0, 0.5, 3.0]).double(), 0.1
    loss_of = lambda e: (a * e**2).sum(1) / 2
    v1 = a * e
    e1 = e - lr * (v1 + 0.9 * v1)                                                             # 1.9 lr g
    v2 = 0.9 * v1 + a * e1
    e2 = e1 - lr * (a * e1 + 0.9 * v2)
    best = tteo.optimise(e, lambda e: e, loss_of, iterations=3, lr=lr)
    assert torch.allclose(best.history, torch.stack([loss_of(t) for t in (e, e1, e2)]), rtol=1e-12)
    plain = tteo.optimise(e, lambda e: e, loss_of, iterations=2, lr=lr, momentum=0.0)
    assert torch.allclose(plain.history[1], loss_of(e - lr * a * e), rtol=1e-12), "without momentum no Nesterov either"


def test_the_regulariser_pulls_the_norm_to_that_of_noise_and_does_not_select():
    e = normal(2, 3, 4, 5).requires_grad_()
    n = e.detach().flatten(1).norm(dim=1).view(3, 1, 1)
    g, = torch.autograd.grad(tteo.norm_penalty(e).sum(), e)
    assert torch.allclose(g, e.detach() * (1 - 19 / n**2), atol=1e-6)
    at_rest = (e * 19**0.5 / n).detach().requires_grad_()
    assert torch.autograd.grad(tteo.norm_penalty(at_rest).sum(), at_rest)[0].abs().max() < 1e-6
    seen = []
    best = tteo.optimise(e, lambda e: seen.append(e.detach().clone()) or e, lambda e: 0 * e.sum((1, 2)) + 7,
                         iterations=3, lr=0.1, regularise=0.5)
    assert torch.allclose(seen[1], (e - 0.1 * 1.9 * 0.5 * g).detach(), atol=1e-6), "it moves the variable"
    assert (best.history == 7).all() and best.index.tolist() == [0, 0, 0], "it is no part of the loss that selects"


def test_gradients_are_clipped_start_by_start():
    g = torch.stack([torch.tensor([3.0, 4.0]), torch.tensor([0.03, 0.04])])[:, None]          # norms 5 and 0.05
    clipped = reward.clip_each(g, 0.1)
    assert torch.allclose(clipped[0], g[0] * 0.1 / 5) and torch.equal(clipped[1], g[1])
    seen = []
    tteo.optimise(torch.zeros_like(g), lambda e: seen.append(e.detach().clone()) or e,
                  lambda e: (e * g).sum((1, 2)), iterations=2, lr=1.0, clip=0.1)
    assert torch.allclose(seen[1], -1.9 * clipped)


def test_k_iterations_are_k_images_and_the_last_keeps_no_graph():
    e, image_of, loss_of = toy_generator([])
    graphs = []
    spy = lambda img: graphs.append(img.requires_grad) or loss_of(img)
    with torch.no_grad():                                         # also where the caller has gradients switched off
        tteo.optimise(e, image_of, spy, iterations=4)
    assert graphs == [True, True, True, False]
    with pytest.raises(AssertionError, match="one iteration at least"):
        tteo.optimise(e, image_of, loss_of, iterations=0)


def test_a_loss_of_nan_is_never_the_best():
    losses = iter([[float("nan"), 1.0, float("nan")], [2.0, float("nan"), float("nan")], [2.0, 0.5, float("nan")]])
    best = tteo.optimise(torch.ones(3, 1), lambda e: e, lambda e: 0 * e[:, 0] + torch.tensor(next(losses)), 3)
    assert best.index.tolist() == [1, 2, 0] and best.loss.tolist() == [2.0, 0.5, float("inf")]


@functools.cache
def tiny_world(name):
    """A teacher of random weights as its own student; two things to ask for; the distance to a target image."""
    teacher = load_teacher(name, random_weights=True)
    what = ["a blue ring above a green square", "two cats"] if teacher.text else torch.tensor([3, 1])
    target = normal(5, *teacher.spec.image).mul(0.2).add(0.5).clamp(0, 1)
    return teacher, what, lambda img, what: (img - target).square().flatten(1).sum(1)


seed = lambda n: torch.Generator().manual_seed(n)


@pytest.mark.parametrize("name", ["maskbit-tiny", "maskgit-tiny", "meissonic-tiny", "maskgen-tiny"])
def test_tteo_lowers_its_loss_from_every_start(name):
    teacher, what, loss_of = tiny_world(name)
    found = tteo.tteo(teacher, teacher.net, what, loss_of, starts=3, lr=0.01, generator=seed(0))
    every, (C, H, W) = found.every, teacher.spec.image
    assert every.history.shape == (4, 2, 3) and every.img.shape == (2, 3, C, H, W) and found.seconds > 0
    assert (every.loss < every.history[0]).all(), f"{name}: {every.history.tolist()}"
    assert torch.equal(every.loss, every.history.min(0).values) and torch.equal(every.index, every.history.argmin(0))
    assert torch.equal(found.loss, every.loss.min(1).values) and torch.equal(found.start, every.loss.argmin(1))
    assert torch.equal(found.img[1], every.img[1, found.start[1]]), "each prompt has its own best"
    assert torch.allclose(loss_of(found.img, what), found.loss, rtol=1e-5), "the image is the one that was judged"
    assert 0 <= found.img.min() and found.img.max() <= 1


def test_networks_are_left_as_they_were_and_dropout_is_refused():
    teacher, what, loss_of = tiny_world("maskgen-tiny")
    net = load_teacher("maskgen-tiny", random_weights=True).net.requires_grad_()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    tteo.tteo(teacher, net, what, loss_of, starts=2, generator=seed(0))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for m in (net, *teacher[:2], teacher.text) for p in m.parameters())
    with pytest.raises(AssertionError, match="eval mode"):
        tteo.tteo(teacher, net.train(), what, loss_of)


@pytest.mark.parametrize("name", ["meissonic-tiny", "maskgen-tiny"])
def test_the_embedding_of_the_mask_has_a_gradient_too(name):
    teacher, what, loss_of = tiny_world(name)
    net = teacher.net
    x, e, noise, cond = tteo.draw_starts(teacher, net, teacher.cond(teacher.conditions(what)), 2, 0.6, seed(0))
    e.requires_grad_()
    g, = torch.autograd.grad(loss_of(tteo.soft_image(teacher, net, e, cond, 0.1, noise), what).sum(), e)
    masked = (x == net.V)[:, :, 0]
    assert masked.sum(1).tolist() == [round(0.6 * net.L)] * 4
    assert (g.norm(dim=-1) > 0).all() and g[masked].norm() > 0.1 * g.norm()


def test_a_start_is_the_one_that_evaluate_draws_with_this_seed():
    for name in ("maskbit-tiny", "meissonic-tiny", "maskgen-tiny"):
        teacher, what, _ = tiny_world(name)
        net, rows = teacher.net, teacher.conditions(what) if teacher.text else what
        x, e, noise, cond = tteo.draw_starts(teacher, net, teacher.cond(rows), 1, 0.6, seed(4))
        assert torch.equal(e, se.embed_tokens(x, *net.tables()))
        z = dimo.student_logits(net, x, cond, *net.tables(), 0.3, noise)
        img = teachers.decode_tokens(teacher.tokenizer, z.argmax(-1), cond)
        there = ev.generate_student(teacher, net, rows, init_ratio=0.6, noise=0.3, temperature=0, generator=seed(4))
        assert torch.equal((img * 255 + teacher.spec.rounds / 2).to(torch.uint8), there)
        one_hot = lambda *a, **kw: 1e4 * torch.eye(net.V)[net(*a, **kw).argmax(-1)]
        assert torch.allclose(tteo.soft_image(teacher, one_hot, e, cond, 0.3, noise), img, atol=1e-6), "nothing is soft"


def test_best_of_n_is_the_smallest_of_n_and_runs_repeat():
    teacher, what, loss_of = tiny_world("maskgen-tiny")
    run = functools.partial(tteo.best_of, teacher, teacher.net, what, loss_of)
    one, again, other = (run(5, generator=seed(n)) for n in (0, 0, 1))
    assert one.every.history.shape == (1, 2, 5) and torch.equal(one.loss, one.every.history[0].min(1).values)
    assert torch.equal(one.img, again.img) and not torch.equal(one.img, other.img)
    assert len(one.every.loss.unique()) == 10, "starts differ"
    run = functools.partial(tteo.tteo, teacher, teacher.net, what, loss_of, starts=5, lr=0.01)
    a, b, c = run(generator=seed(0)), run(generator=seed(0)), run(generator=seed(0), chunk=3)
    assert torch.equal(a.img, b.img) and torch.allclose(a.every.history, c.every.history, rtol=1e-5)
    assert torch.allclose(a.img, c.img, atol=1e-5), "chunks only save memory"
    assert torch.equal(a.every.history[0], one.every.loss), "the same seed, the same starts"
    cond = teacher.cond(teacher.conditions(what))
    repeated = tteo.draw_starts(teacher, teacher.net, cond, 2, 0.6)[3]
    assert all(torch.equal(many, few[[0, 0, 1, 1]]) for many, few in zip(repeated, cond, strict=True))


def test_the_loss_is_told_what_each_image_was_asked_for():
    teacher, what, loss_of = tiny_world("maskgen-tiny")
    asked = []
    tteo.tteo(teacher, teacher.net, what, lambda img, what: asked.append(what) or loss_of(img, what), starts=3,
              iterations=1, chunk=4)
    assert asked == [[what[0]] * 3 + [what[1]], [what[1]] * 2]


# ---------------------------------------------------------------------------------------- its command line
class Redness(torch.nn.Module):
    """A reward for a test: how red an image is, for prompts about red things."""

    def forward(self, img, prompts):
        assert all("red" in p for p in prompts) and len(prompts) == len(img)
        return {"clip": 10 * (2 * img[:, 0] - img[:, 1] - img[:, 2]).mean((1, 2))}


def run_script(monkeypatch, *argv, load=lambda names, paths={}, **_: Redness()):
    """tteo.py as a script, in this process, with `load` for load_rewards: its exit code."""
    monkeypatch.setattr(reward, "load_rewards", load)
    monkeypatch.setattr(sys, "argv", ["tteo.py", *argv])
    try:
        runpy.run_path(f"{ROOT}/tteo.py", run_name="__main__")
    except SystemExit as err:
        return err.code
    return 0


def test_the_command_line_draws_tells_and_records(monkeypatch, tmp_path, capsys):
    net = load_teacher("maskgen-tiny", random_weights=True).net
    torch.save(net.state_dict(), tmp_path / "student.pt")
    assert run_script(monkeypatch, "--ckpt", f"{tmp_path}/student.pt", "--teacher", "maskgen-tiny", "--random_weights",
                      "--prompt", "a red ball", "--rewards", "clip", "--starts", "3", "--iterations", "3", "--lr", "20",
                      "--checkpointing", "--device", "cpu", "--out", f"{tmp_path}/out") == 0
    row, = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    history = torch.tensor(row["history"])                                                    # (iterations, starts)
    assert history.shape == (3, 3) and row["after"]["loss"] == history.min() < row["before"]["loss"]
    assert row["before"]["loss"] == pytest.approx(history[0].min().item(), abs=1e-6)
    assert history[row["after"]["iteration"], row["after"]["start"]] == history.min()
    assert row["after"]["score"] == pytest.approx(1 - row["after"]["loss"], abs=1e-6) and row["best_of"]["n"] >= 1
    assert row["student"] == weights.fingerprint(net) and (row["noise"], row["init_ratio"]) == (0.1, 0.9)
    assert (tmp_path / "out" / "tteo.png").stat().st_size > 1000 and "with TTEO" in capsys.readouterr().out


def test_a_benchmark_compares_one_start_tteo_and_best_of_n_by_reward_geneval_and_time(monkeypatch, tmp_path, capsys):
    assert run_script(monkeypatch, "--teacher", "meissonic-tiny", "--random_weights", "--benchmark", "12", "--starts", "2",
                      "--iterations", "3", "--lr", "50", "--device", "cpu", "--out", f"{tmp_path}/out",
                      load=reward.load_rewards) == 0
    one, best, more = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert [row["model"] for row in (one, best)] == ["1 start", "TTEO, 2 starts x 3"]
    assert re.fullmatch(r"best of \d+", more["model"]) and int(more["model"].split()[-1]) > 1     # TTEO's time, in starts
    assert one["clip"] < best["clip"] and one["clip"] < more["clip"] and one["n"] == 12
    assert min(row["images/s"] for row in (one, best, more)) > 0 and 0 <= best["geneval"] <= 1
    assert "TTEO, 2 starts x 3" in capsys.readouterr().out and (tmp_path / "out" / "tteo.png").stat().st_size > 1000
    assert run_script(monkeypatch, "--teacher", "maskgen-tiny", "--random_weights", "--benchmark", "12") == 2
    assert "--benchmark is of the world of shapes, which maskgen-tiny does not draw" in capsys.readouterr().err


def test_the_command_line_climbs_real_rewards(monkeypatch, tmp_path):
    tiny = dict(embed_dim=16, vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=8),
                text_cfg=dict(context_length=16, vocab_size=512, width=32, heads=2, layers=1))
    load = functools.partial(reward.load_rewards, configs={"hps": tiny, "pickscore": tiny})
    assert run_script(monkeypatch, "--teacher", "meissonic-tiny", "--random_weights", "--prompt", "a red ball",
                      "--rewards", "hps", "pickscore", "--starts", "2", "--iterations", "2", "--regularise", "0.01",
                      "--clip", "0.1", "--chunk", "1", "--device", "cpu", "--out", f"{tmp_path}", load=load) == 0
    row = json.loads((tmp_path / "results.jsonl").read_text())
    for kind in ("before", "after", "best_of"):
        score = 5 * row[kind]["hps"] + 0.05 * row[kind]["pickscore"]
        assert row[kind]["score"] == pytest.approx(score, abs=1e-5)
        assert row[kind]["loss"] == pytest.approx(5 + 0.05 * 30 - score, abs=1e-5)
    assert row["after"]["loss"] <= row["before"]["loss"] + 1e-6 and row["weights"] == {"hps": 5.0, "pickscore": 0.05}
    assert row["history"][0] != row["history"][1]


def test_what_tteo_cannot_do_is_refused_with_a_sentence(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    tiny = ["--teacher", "maskgen-tiny", "--random_weights"]
    for argv, words in ((["--rewards", "taste"], "taste"), (["--starts", "0"], "expected a number"),
                        ([], "--teacher NAME"), (["--teacher", "nobody"], "unknown teacher"),
                        (["--ckpt", "nowhere.pt"], "nowhere.pt"), (["--teacher", "maskgen-tiny"], "--random_weights"),
                        (["--teacher", "maskbit-tiny", "--random_weights"], "needs a text teacher"),
                        ([*tiny, "--out", f"{tmp_path}/file/out"], "cannot write")):
        argv = ["--out", f"{tmp_path}/out", *argv]
        assert run_script(monkeypatch, "--prompt", "a red ball", "--device", "cpu", *argv) == 2, argv
        assert words in (said := capsys.readouterr().err) and "Traceback" not in said
    assert run_script(monkeypatch, *tiny) == 2 and "--prompt" in capsys.readouterr().err


# ================================================================================================== data/
# Real tokens: written once by the scripts of data/, killed at any moment, read back by train.py as memory maps.
def load(path):
    """(tokens, labels, meta) through train.py's own reader."""
    meta = None if str(path).endswith(".npz") else json.loads((path / "meta.json").read_text())
    return *load_tokens(str(path), tiny_teacher("maskbit-tiny"))[:2], meta


def make_photos(folder, per_class=5, side=28):
    """10 class folders of small random pictures, the first of class 0 unreadable."""
    rng = np.random.default_rng(0)
    for i in range(10 * per_class):
        os.makedirs(folder / str(i % 10), exist_ok=True)
        photo = Image.fromarray(rng.integers(0, 256, (side, side + i % 3), dtype=np.uint8))
        photo.save(folder / str(i % 10) / f"{i:02d}.png")
    (folder / "0" / "00.png").write_bytes(b"not a picture")
    return str(folder)


def imagenet_args(folder, out, *more):
    return imagenet.parser().parse_args([folder, "--teacher", "maskbit-tiny", "--random_weights", "--out", str(out),
                                         "--workers", "2", "--batch", "8", "--device", "cpu", *more])


def write_idx(path, array):
    with gzip.open(path, "wb") as f:
        f.write(struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(">" + "I" * array.ndim, *array.shape) + array.tobytes())


def make_raw(folder, n=20):
    """Fashion-MNIST's two training files in small, the way they are published."""
    rng = np.random.default_rng(0)
    write_idx(folder / "train-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
    write_idx(folder / "train-labels-idx1-ubyte.gz", (np.arange(n) % 10).astype(np.uint8))
    return str(folder)


def test_fashion_folder_and_packed_file_hold_the_tokenizers_own_tokens(tmp_path, monkeypatch):
    monkeypatch.setitem(fashion.COUNT, "train", 20)
    raw, torch_file = make_raw(tmp_path), str(tmp_path / "tokenizer.pt")
    tokenizer = BitTokenizer(**SPECS["maskbit-tiny"].tokenizer).eval()
    torch.save(tokenizer.state_dict(), torch_file)
    args = dict(raw=raw, tokenizer_weights=torch_file, out=str(tmp_path / "t"))
    fashion.main(types.SimpleNamespace(**args, pack=None))
    fashion.main(types.SimpleNamespace(**args, pack=str(tmp_path / "t.npz")))
    (x, y, meta), (x_packed, y_packed, _) = load(tmp_path / "t"), load(tmp_path / "t.npz")
    assert x.dtype == np.uint8 and x.shape == (20, 64, 2) and isinstance(x, np.memmap)
    assert json.loads(str(np.load(tmp_path / "t.npz")["meta"])) == meta and meta["complete"]
    assert np.array_equal(x, x_packed) and np.array_equal(y, y_packed) and list(y) == [i % 10 for i in range(20)]
    img = torch.from_numpy(fashion.load_images("train", raw)[0]).float() / 255
    assert np.array_equal(x, tokenizer.encode(img).numpy()) and not img[:, :, :2].any()      # padded, never flipped


def test_fashion_files_that_are_short_or_of_another_set_are_refused(tmp_path):
    raw = make_raw(tmp_path)
    with pytest.raises(UserError, match="expected 60000 images"):
        fashion.load_images("train", raw)
    whole = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    for broken in (whole[:3000], whole[:3000] + bytes(100) + whole[3100:], b"", b"\x1f\x8b"):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(broken)
        with pytest.raises(UserError, match="--raw"):
            fashion.load_images("train", raw)
    with pytest.raises(UserError, match="--raw"):
        fashion.load_images("train", str(tmp_path / "nowhere"))


def test_encoding_interrupted_anywhere_ends_in_the_same_bytes(tmp_path, monkeypatch):
    folder = make_photos(tmp_path / "photos")
    monkeypatch.setattr(imagenet, "SAVE_EVERY", -1)
    imagenet.main(imagenet_args(folder, tmp_path / "a", "--crops", "1"))
    encode, calls = BitTokenizer.encode, []

    def dies_now_and_then(self, img):
        calls.append(len(img))
        if len(img) > 1 and len(calls) % 5 == 4:
            raise KeyboardInterrupt
        return encode(self, img)

    monkeypatch.setattr(BitTokenizer, "encode", dies_now_and_then)
    for _ in range(20):
        try:
            imagenet.main(imagenet_args(folder, tmp_path / "b", "--crops", "1"))
        except KeyboardInterrupt:
            if (tmp_path / "b" / "meta.json").exists():
                with pytest.raises(UserError, match="unfinished"):
                    load(tmp_path / "b")
    for name in ("tokens.npy", "labels.npy", "meta.json", "skipped.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_unreadable_images_are_named_and_leave_no_rows(tmp_path):
    folder = make_photos(tmp_path / "photos")
    imagenet.main(imagenet_args(folder, tmp_path / "a", "--flip"))
    x, y, meta = load(tmp_path / "a")
    assert (tmp_path / "a" / "skipped.txt").read_text().startswith("0/00.png\tUnidentifiedImageError")
    assert meta["skipped"] == 1 and x.shape == (98, 64, 2) and list(y[:10]) == [0] * 8 + [1] * 2
    tokenizer = imagenet.load_tokenizer("maskbit-tiny", random_weights=True)
    assert meta["tokenizer"] == describe(tokenizer, "maskbit-tiny", "")["tokenizer"]
    next(tokenizer.parameters()).data += 1e-3                                                # other weights: other hash
    assert meta["tokenizer"] != describe(tokenizer, "maskbit-tiny", "")["tokenizer"]
    tokenizer = imagenet.load_tokenizer("maskbit-tiny", random_weights=True)
    views = imagenet.variants(os.path.join(folder, "9/49.png"), 49, (1, 32, 32), flip=True, crops=0, seed=0)
    assert np.array_equal(views[0][:, :, ::-1], views[1])
    assert np.array_equal(x[-2:], tokenizer.encode(torch.from_numpy(views.copy()).float() / 255).numpy())


def test_going_on_with_other_arguments_is_refused_by_name(tmp_path):
    folder = make_photos(tmp_path / "photos", per_class=1)
    (tmp_path / "photos" / "0" / "more.png").write_bytes((tmp_path / "photos" / "1" / "01.png").read_bytes())
    imagenet.main(imagenet_args(folder, tmp_path / "a"))
    for flags, named in ((("--flip",), "--flip"), (("--crops", "2"), "--crops"), (("--seed", "1"), "--seed")):
        with pytest.raises(UserError, match=named):
            imagenet.main(imagenet_args(folder, tmp_path / "a", *flags))
    (tmp_path / "photos" / "0" / "more.png").unlink()
    (tmp_path / "photos" / "0" / "00.png").write_bytes((tmp_path / "photos" / "1" / "01.png").read_bytes())
    with pytest.raises(UserError, match="list of images"):
        imagenet.main(imagenet_args(folder, tmp_path / "a"))
    imagenet.main(imagenet_args(folder, tmp_path / "a", "--overwrite"))
    assert load(tmp_path / "a")[2]["n"] == 10 and not (tmp_path / "a" / "skipped.txt").exists()


def test_folders_without_classes_or_images_are_refused(tmp_path):
    run = lambda *more: imagenet.main(imagenet_args(str(tmp_path / "in"), tmp_path / "out", *more))
    with pytest.raises(UserError, match="no folder"):
        run()
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="one for each class"):
        run()
    (tmp_path / "in" / "cats").mkdir()
    with pytest.raises(UserError, match="hold no images .cats"):
        run()
    (tmp_path / "in" / "cats" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 class folders .* knows 10"):
        run()
    for _ in range(2):                                # the second time too: nothing is left of the first
        with pytest.raises(UserError, match="none of the 1 images"):
            run("--allow_other_classes")
    assert os.listdir(tmp_path / "out") == []


def test_full_disk_is_a_sentence_before_any_work(tmp_path, monkeypatch):
    folder = make_photos(tmp_path / "photos", per_class=1)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imagenet.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        imagenet.main(imagenet_args(folder, tmp_path / "a"))
    assert os.listdir(tmp_path / "a") == []


def test_every_kind_of_picture_becomes_rgb_or_grey():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = Image.fromarray(ramp)
    deep = Image.fromarray(ramp.astype(np.uint16) * 256 + 7)
    for img in (grey, deep, grey.convert("RGB"), grey.convert("LA"), grey.convert("RGBA"), grey.convert("P")):
        assert np.array_equal(np.asarray(imagenet.convert(img, "L")), ramp), img.mode
        assert np.array_equal(np.asarray(imagenet.convert(img, "RGB")), np.stack([ramp] * 3, -1)), img.mode
    cmyk = Image.new("CMYK", (2, 2), (0, 255, 255, 0))                                        # red
    assert imagenet.convert(cmyk, "RGB").getpixel((0, 0)) == (255, 0, 0) and imagenet.convert(cmyk, "L").mode == "L"
    assert imagenet.convert(Image.new("RGBA", (2, 2), (9, 9, 9, 0)), "RGB").getpixel((0, 0)) == (255, 255, 255)


def test_crops_depend_on_seed_image_and_number_alone():
    rng = lambda *key: np.random.default_rng(key)
    square = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    crop = lambda img, *key: np.asarray(imagenet.random_crop(img, 32, rng(*key)))
    assert np.array_equal(crop(square, 0, 5, 1), crop(square, 0, 5, 1))
    assert len({crop(square, s, i, k).tobytes() for s in (0, 1) for i in (0, 1) for k in (0, 1)}) == 8
    wide = square.resize((96, 64))                    # 0.8 of its area is a square of 70, more than 64 high: it falls back
    centre = np.asarray(wide.crop((16, 0, 80, 64)).resize((32, 32), Image.Resampling.BICUBIC))
    assert all(any(np.array_equal(crop(wide, 0, 0, k), c) for c in (centre, centre[:, ::-1])) for k in range(8))
    assert imagenet.centre_crop(wide, 32).size == imagenet.centre_crop(square, 32).size == (32, 32)


# ========================================================================================= data/prompts.py
def listed(tmp_path, name, content, *flags):
    """What becomes of a source file: the lines of prompts.txt."""
    source, out = tmp_path / name, tmp_path / "out.txt"
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    prompts.main(prompts.parser().parse_args([str(source), "--out", str(out), *flags]))
    return out.read_bytes().decode().split("\n")[:-1]


def test_a_prompt_becomes_one_line_whatever_characters_it_holds(tmp_path):
    family, hebrew = "a 👩‍👩‍👧 on a beach", "\u200fשלום\u200e, world"
    text = f"\ufeff{family}\r\n\t two\u00a0 \t blanks \u3000 \r\n{hebrew}\na\x00 b\x07\x1b[0m\nc\u2028d\x85e\x0bf\n"
    assert listed(tmp_path, "a.txt", text) == [family, "two blanks", hebrew, "a b[0m", "c d e f"]
    assert prompts.read_prompts(str(tmp_path / "out.txt")) == (tmp_path / "out.txt").read_text().splitlines()
    # all characters there are, in a row: one line comes of them, and nothing is lost but line breaks and controls
    every = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    kept = prompts.clean("".join(every))
    assert len(kept.splitlines()) == 1
    assert set(every) - set(kept) == {c for c in every if unicodedata.category(c) == "Cc" or c.isspace() and c != " "
                                      or c == "\ufeff"}
    assert prompts.clean("a\u2028\x1cb") == "a b" and prompts.clean("a \0 b") == "a b" == prompts.clean("a\x1fb")


def test_ten_thousand_prompts_keep_their_order_and_lose_repetitions(tmp_path, capsys):
    lines = [f"prompt {i % 9000}" + " " * (i % 3) for i in range(10_000)] + ["", " \t ", "x" * 1001, "x" * 1000]
    assert listed(tmp_path, "a.txt", "\n".join(lines)) == [f"prompt {i}" for i in range(9000)] + ["x" * 1000]
    said = capsys.readouterr().out
    assert said.endswith("out.txt: 9,001 prompts; 10,004 read; 1,000 left out, repeated; 2 left out, empty; "
                         "1 left out, longer than 1,000 characters\n")
    assert listed(tmp_path, "a.txt", "\n".join(lines), "--limit", "7") == [f"prompt {i}" for i in range(7)]
    assert listed(tmp_path, "a.txt", "a\nabc\nabcd", "--max_chars", "3") == ["a", "abc"]
    assert ", 7 " not in capsys.readouterr().out                  # reading ended with the seventh prompt


RECORDS = [dict(url="u", TEXT="a cat, \"red\"", AESTHETIC_SCORE=6.5), dict(url="v", TEXT="two\nlines", AESTHETIC_SCORE=6),
           dict(url="w", TEXT="dull", AESTHETIC_SCORE=5.9), dict(url="x", TEXT="unscored", AESTHETIC_SCORE=None)]


def write_records(path, records):
    """The same records in any of the formats."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="reading parquet takes pyarrow")
        from pyarrow import parquet
        parquet.write_table(pyarrow.Table.from_pylist(records), str(path), row_group_size=2)
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as f:
            table = csv.DictWriter(f, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(records)
    else:
        lines = [json.dumps(record) for record in records]
        path.write_text("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n\n".join(lines))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_format_of_the_same_records_gives_the_same_prompts(tmp_path, suffix):
    write_records(source := tmp_path / f"a{suffix}", RECORDS)
    read = lambda *flags: listed(tmp_path, source.name, source.read_bytes(), *flags)
    assert read() == ["a cat, \"red\"", "two lines", "dull", "unscored"]
    assert read("--min_score", "6") == ["a cat, \"red\"", "two lines"]
    assert read("--min_score", "5.9", "--score_column", "AESTHETIC_SCORE", "--limit", "3")[2] == "dull"
    assert read("--column", "url") == ["u", "v", "w", "x"]
    for flags, words in ((("--column", "nope"), "a field nope, found url, TEXT.*--column"),
                         (("--min_score", "6", "--score_column", "nope"), "a field nope.*--score_column"),
                         (("--min_score", "9"), "no prompt to keep.*4 read; 4 left out, with a score below 9, or none")):
        with pytest.raises(UserError, match=words if suffix != ".parquet" else words.replace("url, ", "(url, )?")):
            read(*flags)


def test_the_usual_names_of_fields_have_an_order_and_lists_of_strings_have_none(tmp_path):
    assert listed(tmp_path, "a.csv", "prompt,text,caption\r\n1,2,3\r\n\r\n4,5,6\r\n") == ["3", "6"]
    assert listed(tmp_path, "a.tsv", "\ufeffprompt\ttext\n1\t2\n") == ["2"]
    assert listed(tmp_path, "a.csv", "text,aesthetic\n1,\n2,6\n3,nan\n4,7\n", "--min_score", "6") == ["2", "4"]
    for name, text in (("a.json", '\ufeff ["a", "b\\nc"]'), ("a.jsonl", '"a"\n\n"b\\tc"\n'), ("b.json", '"a"\n"b  c"')):
        assert listed(tmp_path, name, text) == ["a", "b c"]
    assert listed(tmp_path, "a.jsonl", '{"prompt": "\\ud83d\\ude00 \\u0000x"}') == ["😀 x"]
    (tmp_path / "a.txt").write_text("1\n2\n")
    (tmp_path / "b.csv").write_text("caption\nfrom b\n2\n")
    prompts.main(prompts.parser().parse_args(["--limit", "9", *(str(tmp_path / f) for f in ("a.txt", "b.csv")), "--out",
                                              str(tmp_path / "out.txt")]))
    assert prompts.read_prompts(str(tmp_path / "out.txt")) == ["1", "2", "from b"]


BROKEN = [("a.txt", b"one\ntw\xff\nthree", "a.txt, line 2: invalid UTF-8", ["one", "three"]),
          ("a.csv", b"id,text\n1,one\n2\n3,\"th\nree\"\n4,5,6\n", "a.csv, line 3: 1 fields instead of 2", ["one", "th ree"]),
          ("b.csv", b"text,id\n\"on\ne\",1\n\"t\"wo,2\nthree,3", "b.csv, line 4: not a row", ["on e", "three"]),
          ("c.csv", b"text\none\n\"two\nthree", "c.csv, line 3: not a row of fields .unexpected end", ["one"]),
          ("d.csv", b"text\none\ntw\xe9\n", "d.csv, line 3: invalid UTF-8", ["one"]),
          ("e.csv", b"text,aesthetic\none,7\ntwo,high\n", "e.csv, line 3: the score in the field aesthetic", ["one"]),
          ("a.jsonl", b'"one"\n\n{"text"\n"two"', "a.jsonl, line 3: invalid JSON", ["one", "two"]),
          ("b.jsonl", b'{"text": "one"}\n{"txt": "two"}', "b.jsonl, line 2: .* field text, got nothing", ["one"]),
          ("c.jsonl", b'{"text": "one"}\n{"text": 2}', "c.jsonl, line 2: .* field text, got int", ["one"]),
          ("d.jsonl", b'null\n[]\n"one"', "d.jsonl, line 1: expected a string or a record, got nothing", ["one"]),
          ("e.jsonl", b'"one"\n"t\xffwo"', "e.jsonl, line 2: invalid UTF-8", ["one"]),
          ("f.jsonl", b'"\\ud83d"\n"one"', "f.jsonl, line 1: invalid UTF-8", ["one"]),
          ("g.jsonl", b'"one"\n' + b"[" * 10**5 + b"\n" + b"9" * 5000, "g.jsonl, line 2: invalid JSON", ["one"]),
          ("a.json", b'["one", null, {"caption": ["two"]}]', "a.json, item 2: expected a string", ["one"])]


@pytest.mark.parametrize("name, content, words, rest", BROKEN, ids=[case[0] for case in BROKEN])
def test_what_is_broken_is_named_by_line_or_skipped_and_counted(tmp_path, capsys, name, content, words, rest):
    flags = ("--min_score", "6") if name == "e.csv" else ()
    with pytest.raises(UserError, match=words + ".*--skip_broken"):
        listed(tmp_path, name, content, *flags)
    assert not (tmp_path / "out.txt").exists()
    assert listed(tmp_path, name, content, "--skip_broken", *flags) == rest
    assert "left out, broken" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"", "no prompt to keep in .*a.txt: 0 read$"), ("a.txt", b"\n \r\n", "2 read; 2 left out, empty"),
    ("a.csv", b"", "0 read"), ("a.csv", b"text\n", "0 read"), ("a.csv", b'"text\na', "line 1: .*names of the fields"),
    ("a.json", b"", "0 read"), ("a.json", b"[]", "0 read"), ("a.json", b'["a",\n"b"\n"c"]', "a.json, line 3: invalid JSON"),
    ("a.json", b'{"a.png": "cat"}', "a field caption or .*found a.png; name it by --column"),
    ("a.jsonl", b"{}", "found none"), ("a.jsonl", "\ufeff".encode("utf-16"), "line 1: invalid JSON"),
    ("a.txt", "cat".encode("utf-16"), "line 1: invalid UTF-8"), ("a.doc", b"cat", "ends in .txt, .csv, .*.parquet")])
def test_sources_without_a_prompt_are_refused_and_write_nothing(tmp_path, name, content, words):
    (tmp_path / "out.txt").write_text("the earlier list\n")
    with pytest.raises(UserError, match=words):
        listed(tmp_path, name, content)
    assert (tmp_path / "out.txt").read_text() == "the earlier list\n" and len(os.listdir(tmp_path)) == 2


def test_parquet_without_pyarrow_and_damaged_parquet_are_sentences(tmp_path, monkeypatch):
    if importlib.util.find_spec("pyarrow"):
        with pytest.raises(UserError, match="cannot read on after row 0"):
            listed(tmp_path, "a.parquet", b"PAR1 and no more")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        listed(tmp_path, "a.parquet", b"PAR1")


def make_pairs(folder, n=11):
    """Images, each with its prompt beside it; two share one, and four cannot be read."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (32 + i, 40, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"  picture\n{max(i, 1)} \u2028👩‍👩‍👧\n", encoding="utf-8")
    (folder / "02.png").write_bytes(b"no picture")
    (folder / "03.txt").write_bytes(b"\xff")
    (folder / "04.txt").write_text(" \n")
    (folder / "05.txt").unlink()                                  # not a pair: not even counted
    (folder / "notes.txt").write_text("no image beside it")
    return folder


def pairs_args(folder, out, *more):
    return prompts.parser().parse_args(["--images", str(folder), "--teacher", "maskgen-tiny", "--random_weights", "--out",
                                        str(out), "--batch", "4", "--device", "cpu", *more])


def test_pairs_are_the_tokenizers_own_tokens_and_train_reads_them_back(tmp_path, capsys, monkeypatch):
    folder, teacher = make_pairs(tmp_path / "in"), load_teacher("maskgen-tiny", random_weights=True)
    seen, encode = [], type(teacher.tokenizer).encode
    monkeypatch.setattr(type(teacher.tokenizer), "encode", lambda self, img: (seen.append(img), encode(self, img))[1])
    prompts.main(pairs_args(folder, tmp_path / "out"))
    images = torch.cat(seen[1:])                      # the pictures themselves: random weights hardly tell them apart
    x, labels, lines = load_tokens(str(tmp_path / "out"), teacher)
    good = [0, 1, 6, 7, 8, 9, 10]
    assert [lines[i] for i in labels] == [f"picture {max(i, 1)} 👩‍👩‍👧" for i in good] and labels[0] == labels[1] == 0
    assert len(x) == len(images) == len(good)
    for row, img, i in zip(x, images, good):
        view = prompts.variants(str(folder / f"{i:02d}.png"), 0, (3, 32, 32), False, 0, 0)
        view = torch.from_numpy(view).float() / 255
        assert torch.equal(img, view[0]) and np.array_equal(row, encode(teacher.tokenizer, view)[0]), i
    skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in skipped] == ["02.png", "03.png", "04.png"]
    assert "cannot identify" in skipped[0] and "utf-8" in skipped[1] and "empty" in skipped[2]
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    said = describe(teacher.tokenizer, "maskgen-tiny", str(folder))
    assert meta == said | dict(n=7, variants=1, prompts=6, skipped=3, complete=True)
    assert "7 images, 6 prompts; 3 images left out" in capsys.readouterr().out
    prompts.main(pairs_args(folder, tmp_path / "out", "--limit", "2"))                        # anew, and nothing of before
    assert len(load_tokens(str(tmp_path / "out"), teacher)[0]) == 2
    assert sorted(os.listdir(tmp_path / "out")) == ["labels.npy", "meta.json", "prompts.txt", "tokens.npy"]


def test_batches_of_the_gan_see_the_prompts_of_their_images(tmp_path):
    teacher = load_teacher("maskgen-tiny", random_weights=True)
    prompts.main(pairs_args(make_pairs(tmp_path / "in"), tmp_path / "out"))
    x, labels, lines = load_tokens(str(tmp_path / "out"), teacher)
    assert labels.max() == len(lines) - 1 and teacher.conditions(lines).shape[0] == len(lines) == 6


@pytest.mark.parametrize("name", ["prompts.txt.tmp", "tokens.npy.tmp", "labels.npy.tmp", "meta.json.tmp", "encode"])
def test_a_kill_at_any_file_leaves_a_folder_that_train_refuses_or_the_old_one(tmp_path, monkeypatch, name):
    folder, teacher = make_pairs(tmp_path / "in"), load_teacher("maskgen-tiny", random_weights=True)
    prompts.main(pairs_args(folder, tmp_path / "out", "--limit", "2"))
    replace, encode = os.replace, type(teacher.tokenizer).encode

    def killed(*args):
        if name == "encode" and len(args[1]) > 1 or str(args[0]).endswith(name):
            raise KeyboardInterrupt
        return replace(*args) if name != "encode" else encode(*args)

    with monkeypatch.context() as m:
        m.setattr(*((type(teacher.tokenizer), "encode", killed) if name == "encode" else (os, "replace", killed)))
        with pytest.raises(KeyboardInterrupt):
            prompts.main(pairs_args(folder, tmp_path / "out"))
    if name == "encode":                              # before anything is written the old folder stays whole
        assert len(load_tokens(str(tmp_path / "out"), teacher)[0]) == 2
    else:
        with pytest.raises(UserError, match="cannot read real tokens"):
            load_tokens(str(tmp_path / "out"), teacher)
    prompts.main(pairs_args(folder, tmp_path / "out"))
    assert len(load_tokens(str(tmp_path / "out"), teacher)[0]) == 7


def test_folders_without_pairs_and_class_teachers_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "in" / "alone.png")
    run = lambda *more: prompts.main(pairs_args(tmp_path / "in", tmp_path / "out", *more))
    for flags, words in (((), "each with its prompt"), (("--teacher", "maskbit-tiny"), "learned classes.*data/imagenet.py"),
                         (("--images", "/nowhere"), "--images /nowhere"), (("a.txt",), "either SOURCE"),
                         (("--out", str(tmp_path / "in")), "overwrite"), (("--batch", "0"), "--batch of 1 or more")):
        with pytest.raises(UserError, match=words):
            run(*flags)
    (tmp_path / "in" / "alone.txt").write_text("alone")
    with pytest.raises(UserError, match="--device nowhere"):
        run("--device", "nowhere")
    (tmp_path / "in" / "alone.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 pairs .* alone.png"):
        run()
    assert os.listdir(tmp_path / "out") == []


def test_the_script_answers_bad_input_with_one_sentence_and_status_2(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"fine\nbr\xffken\n")
    for flags in ([str(tmp_path / "a.txt")], ["/nowhere.txt"]):
        done = subprocess.run([sys.executable, os.path.join(ROOT, "data", "prompts.py"), *flags, "--out",
                               str(tmp_path / "out.txt")], capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "prompts.py: " in done.stderr
        assert not done.stdout and not (tmp_path / "out.txt").exists()
    monkeypatch.chdir(tmp_path)
    for flags, words in ((("--out", "a.txt"), "overwrite"), (("--out", "."), "is a folder"), (("--limit", "0"), "of 1 or")):
        with pytest.raises(UserError, match=words):
            prompts.main(prompts.parser().parse_args(["a.txt", *flags]))


# ================================================================================================= evaluate.py
def golden_sets():
    """(real (200, 16), fake (180, 16)) float32: the inputs of the golden FID and PRDC numbers."""
    M = np.random.RandomState(30).standard_normal((16, 16)) / np.sqrt(16)
    real = np.random.RandomState(10).standard_normal((200, 16)) @ M
    fake = (1.1 * np.random.RandomState(20).standard_normal((180, 16)) + 0.2) @ M
    return real.astype(np.float32), fake.astype(np.float32)


def moments_of(f, shift=0.0, batch=7):
    m = ev.Moments(f.shape[1], shift)
    for part in torch.as_tensor(f).split(batch):
        m.add(part)
    return m.result()


def test_fid_agrees_with_clean_fid_and_by_eigenvalues_also_when_rank_deficient():
    real, fake = golden_sets()
    for some, expected in ((real, 1.617839027), (real[:8], 15.51948243)):     # 8 images in 16 dimensions: rank 7
        pair = (*moments_of(some), *moments_of(fake))
        assert ev.fid(*pair) == pytest.approx(expected, rel=1e-6)
        assert ev.fid_eigenvalues(*pair) == pytest.approx(expected, rel=1e-6)
    mu, sigma = moments_of(real)
    assert np.allclose(mu[:3], [-0.01107388735, 0.08009858429, 0.05349292606], atol=1e-8)
    assert np.trace(sigma) == pytest.approx(15.85219538, rel=1e-9)            # unbiased: 1 / (N - 1)


@pytest.mark.parametrize("distance", [ev.fid, ev.fid_eigenvalues])
def test_fid_has_its_closed_forms(distance):
    rng = np.random.default_rng(0)
    A, mu, shift, s1, s2 = rng.normal(size=(12, 12)), *rng.normal(size=(2, 12)), *rng.uniform(0.1, 4, (2, 12))
    S, Q = A @ A.T, np.linalg.qr(A)[0]
    assert distance(mu, S, mu, S) == pytest.approx(0, abs=1e-9)               # a set against itself
    assert distance(mu, S, mu + shift, S) == pytest.approx(shift @ shift)     # shifted
    S1, S2 = (Q * s1) @ Q.T, (Q * s2) @ Q.T                                   # commuting
    assert distance(mu, S1, mu, S2) == pytest.approx(((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum())
    assert distance(mu, 0 * S, mu, S) == pytest.approx(np.trace(S))           # a single image, repeated


def test_moments_add_up_over_batches_and_keep_their_digits_far_from_zero():
    f = np.random.default_rng(0).normal(size=(500, 9)) + 1e7
    mu, sigma = moments_of(f, shift=f[0], batch=33)
    assert np.allclose(mu, f.mean(0), rtol=1e-15) and np.allclose(sigma, np.cov(f - 1e7, rowvar=False), rtol=1e-8)


@pytest.mark.parametrize("convention, mean, std", [
    (dict(), 3.639085854, 0.2541956773),                                      # torch-fidelity
    (dict(shuffle=False), 3.618812457, 0.2243190045),                         # StyleGAN
    (dict(shuffle=False, split_size=100), 3.893615936, None)])                # ADM
def test_inception_score_agrees_in_three_conventions(convention, mean, std):
    logits = 2.0 * np.random.RandomState(60).standard_normal((300, 40)).astype(np.float32)
    got = ev.inception_score(logits, **convention)
    assert got[0] == pytest.approx(mean, rel=1e-8) and (std is None or got[1] == pytest.approx(std, rel=1e-8))
    sure = 1000.0 * torch.eye(10).repeat(10, 1)                               # certain, and all classes alike
    assert ev.inception_score(sure, shuffle=False) == pytest.approx((10, 0))


@pytest.mark.parametrize("k, expected", [(3, (0.7277777778, 0.915, 0.6666666667, 0.655)),
                                         (5, (0.8222222222, 0.965, 0.6877777778, 0.855))])
def test_prdc_agrees_with_the_package_whatever_the_blocks(k, expected):
    real, fake = golden_sets()
    for block_bytes in (1, 10_000, 2**26):
        assert tuple(ev.prdc(real, fake, k, block_bytes).values()) == pytest.approx(expected, abs=1e-9)
    far = (f.astype(np.float64) + 1e4 for f in (real, fake))
    assert tuple(ev.prdc(*far, k).values()) == pytest.approx(expected, abs=1e-9)


def test_the_surface_of_a_ball_is_outside():
    real = np.repeat(np.random.RandomState(40).randint(0, 3, (15, 2)), 2, axis=0).astype(np.float32)
    fake = np.random.RandomState(50).randint(0, 4, (24, 2)).astype(np.float32)
    expected = (0.1666666667, 0.9333333333, 0.1111111111, 0.06666666667)
    assert tuple(ev.prdc(real, fake, 3).values()) == pytest.approx(expected, abs=1e-9)


def test_ties_are_decided_as_exact_arithmetic_decides_them():
    """Points of a small lattice, shifted by what no float holds: many distances tie, and integers know which."""
    a, b = np.random.RandomState(0).randint(0, 3, (2, 300, 5))
    square = lambda x, y: ((x[:, None] - y[None]) ** 2).sum(-1)                # (300, 300) integers
    r_a, r_b = (np.sort(square(x, x), 1)[:, 3] for x in (a, b))
    d = square(a, b)
    expected = ((d < r_a[:, None]).any(0).mean(), (d < r_b).any(1).mean(),
                (d < r_a[:, None]).sum() / 900, (d.min(1) < r_a).mean())
    for scale, block_bytes in ((1.0, 2**26), (0.1, 50_000), (1e-3, 2**26)):
        assert tuple(ev.prdc(a * scale, b * scale, 3, block_bytes).values()) == pytest.approx(expected, abs=1e-12)


def test_prdc_of_a_set_against_itself_and_against_one_mode():
    real = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    same, mode = ev.prdc(real, real.clone()), ev.prdc(real, real[:1] + 1e-3 * torch.randn(100, 8))
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert mode["precision"] == 1 and mode["recall"] < 0.02 and mode["coverage"] < 0.2


# ------------------------------------------------------------------------------------------ generation
@pytest.fixture(scope="module")
def tiny():
    return teachers.load_teacher("maskbit-tiny", random_weights=True)


def test_images_are_a_function_of_the_seed_and_argmax_of_the_start(tiny):
    draw = lambda seed, T: ev.generate_student(tiny, tiny.net, torch.arange(4), temperature=T,
                                               generator=torch.Generator().manual_seed(seed))
    a = draw(1, 1.0)
    assert a.dtype == torch.uint8 and a.shape == (4, 1, 32, 32)
    assert a.equal(draw(1, 1.0)) and not a.equal(draw(2, 1.0)) and not a.equal(draw(1, 0))
    start = dict(init_ratio=1.0, noise=0.0, temperature=0)                    # all masked, nothing drawn: one image
    b, c = (ev.generate_student(tiny, tiny.net, torch.zeros(1).long(), **start) for _ in range(2))
    assert b.equal(c)
    steps = [ev.generate_teacher(tiny, torch.arange(2), n, generator=torch.Generator().manual_seed(0)) for n in (3, 3, 1)]
    assert steps[0].equal(steps[1]) and not steps[0].equal(steps[2])


def test_pixels_are_truncated_or_rounded_as_each_teachers_authors_do(tiny, monkeypatch):
    monkeypatch.setattr(ev, "decode_tokens", lambda tokenizer, x, cond: torch.tensor([0.0, 0.4, 0.9999, 254.9, 255.0]) / 255)
    rounding = tiny._replace(spec=dataclasses.replace(tiny.spec, rounds=True))
    assert ev.to_pixels(tiny, torch.zeros(1), (), 0.0, None).tolist() == [0, 0, 0, 254, 255]
    assert ev.to_pixels(rounding, torch.zeros(1), (), 0.0, None).tolist() == [0, 0, 1, 255, 255]
    assert {name for name, spec in SPECS.items() if spec.rounds} >= {"maskgit", "maskgit-512", "meissonic"}
    assert not any(SPECS[name].rounds for name in ("maskbit", "maskgen", "maskgen-xl"))


# ------------------------------------------------------------------------------------- the tiny world's metric
def test_features_see_what_independent_tokens_do_to_a_picture():
    """Real tokens against real tokens exchanged position by position within a class: each token likely, together not."""
    with np.load(os.path.join(ROOT, "assets/fashion/tokens.npz")) as f:
        x, labels = torch.from_numpy(f["tokens"][:2000]).long(), torch.from_numpy(f["labels"][:2000])
    order = torch.Generator().manual_seed(0)
    mixed = torch.zeros_like(x)
    for c in range(10):
        rows = (labels == c).nonzero()[:, 0]
        for i in range(x.shape[1]):
            mixed[rows, i] = x[rows[torch.randperm(len(rows), generator=order)], i]
    tok = teachers.load_teacher("maskbit-tiny").tokenizer
    net, reference = ev.load_extractor(teachers.SPECS["maskbit-tiny"])
    make = lambda tokens: lambda i, **_: (teachers.decode_tokens(tok, tokens[i]) * 255).to(torch.uint8)
    real, patchwork = (ev.evaluate(make(t), torch.arange(500), net, reference) for t in (x, mixed))
    assert real["fid"] < 25 and patchwork["fid"] > 3 * real["fid"] and patchwork["precision"] < real["precision"]


def test_two_processes_measure_what_one_does(tmp_path):
    command = [sys.executable, os.path.join(ROOT, "evaluate.py"), "--random_weights", "--steps", "2", "--n", "50",
               "--batch", "15", "--device", "cpu"]
    one = subprocess.Popen([*command, "--out", str(tmp_path / "1")], env=dict(os.environ, OMP_NUM_THREADS="1"))
    port = str(20000 + os.getpid() % 20000)
    two = [subprocess.Popen([*command, "--out", str(tmp_path / "2")], env=dict(
        os.environ, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port,
        OMP_NUM_THREADS="1")) for r in range(2)]
    assert [p.wait(timeout=120) for p in (one, *two)] == [0, 0, 0]
    a, b = (json.loads((tmp_path / d / "results.jsonl").read_text()) for d in "12")
    assert (a["processes"], b["processes"]) == (1, 2)
    for key in ("fid", "fid_eigenvalues", "is", "is_std", "precision", "recall", "density", "coverage"):
        assert a[key] == pytest.approx(b[key], rel=1e-6), key
    assert (tmp_path / "2" / "sheet.png").stat().st_size > 1000


def test_what_cannot_be_evaluated_is_refused_with_a_sentence(tmp_path, capsys):
    assert ev.load_extractor(teachers.SPECS["maskbit"]) == (None, None)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 32, 32)))
    np.savez(tmp_path / "other.npz", mu=np.zeros(4), sigma=np.eye(4))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut short")
    for name, message in (("images", "mu"), ("other", "feature network"), ("cut", "npz"), ("missing", "missing.npz")):
        with pytest.raises(UserError, match=message):
            ev.load_reference(str(tmp_path / f"{name}.npz"), 208)
    with pytest.raises(UserError, match="neighbours"):
        ev.prdc(torch.zeros(3, 2), torch.zeros(9, 2))
    for flags in (["--n", "0"], ["--n", "9"], ["--temperature", "-1"], ["--ckpt", "nowhere.pt"], ["--teacher", "maskgot"],
                  ["--prompts", "nowhere.txt", "--teacher", "maskgen-tiny", "--random_weights"],
                  ["--order", "halton", "--teacher", "maskgen-tiny", "--random_weights"]):
        with pytest.raises((UserError, SystemExit)) as end:
            ev.main(ev.flags().parse_args([*flags, "--out", str(tmp_path)]))
        assert flags[1] in (str(end.value) if isinstance(end.value, UserError) else capsys.readouterr().err), flags
    done = subprocess.run([sys.executable, os.path.join(ROOT, "evaluate.py"), "--n", "9", "--out", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--n 9" in done.stderr


def test_a_sheet_has_a_column_a_class_and_a_table_says_what_n_does(tmp_path):
    from PIL import Image
    img = torch.zeros(12, 1, 32, 32, dtype=torch.uint8)
    img[10] = 200
    ev.sheet([("teacher, 16 steps", img), ("student, 1 step", img[:10])], str(tmp_path / "s.png"), scale=3)
    page = Image.open(tmp_path / "s.png")
    assert page.size == (10 * 98 + 2, 3 * 98 + 2 * 16 + 2) and page.getpixel((50, 16 + 98 + 48)) == (200,) * 3
    row = dict(model="teacher", kind="teacher", steps=16, n=5000, fid=4.0, **{"images/s": 10.0, "tokens_only/s": 12.0})
    text = ev.table([row, dict(row, model="student", kind="student", steps=1, **{"images/s": 200.0})])
    assert "| teacher | 16 " in text and "biased upward" in text and "20.0 times faster" in text
    assert "biased" not in ev.table([dict(row, n=50_000)])


# =============================================================================================== train.py
def nano_run(folder, **kw):
    """Settings of a run of some seconds: nano teacher with random weights, nano real tokens."""
    SPECS["nano"] = NANO
    train.TABLE_5["nano"] = dict(teacher="nano", batch=8, steps=6, lr=1e-3, ema=0.9, warmup=2, gan=True, w_gan=1.0, gan_start=0, heads=2,
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


def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path):
    whole = run(tmp_path, out=f"{tmp_path}/whole", dropout=0.1)
    run(tmp_path, out=f"{tmp_path}/cut", dropout=0.1, steps=4)
    with open(f"{tmp_path}/cut/log.jsonl", "a") as f:
        f.write('{"step": 5, "loss_aux": 9.0}\n{"step": 6, "lo')            # what a killed process leaves behind
    cut = run(tmp_path, out=f"{tmp_path}/cut", dropout=0.1, resume=True)
    assert all(same(whole[k], cut[k]) for k in NETS) and whole["step"] == 6
    lines = [[{k: v for k, v in json.loads(line).items() if k != "img_s"} for line in open(f"{tmp_path}/{d}/log.jsonl")]
             for d in ("whole", "cut")]
    assert [row["step"] for row in lines[0]] == [1, 2, 3, 4, 5, 6] and lines[0][:3] == lines[1][:3]
    assert lines[0][4:] == lines[1][4:]


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


@pytest.mark.parametrize("name", ["maskgit-tiny", "meissonic-tiny", "maskgen-tiny"])
def test_every_tiny_teacher_trains_with_every_flag_and_resumes_to_the_bit(name, tmp_path):
    data = other_world(f"{tmp_path}/data", name)
    every = dict(gan=True, data=data, redraw=True, soft_state=True, cfg_schedule="cosine", w_t="inverse", beta=-0.2, dropout=0.1,
                 soft_target=0.3, estimator="straight-through", feature_noise=0.1, checkpointing=True, dtype="bf16", accum=2)
    for kw in (dict(gan=False), dict(gan=True, data=data), every):
        def go(out, **more):
            given = {"dtype": "fp32", **kw, **more, "out": f"{tmp_path}/{out}"}
            given |= dict(teacher=name, random_weights=True, init_from="teacher", student_start=0, device="cpu", save_every=1, log_every=1, batch=4, eval_every=0, warmup=0)
            c = train.settle(given, train.flags()[1])
            train.train(c)
            return torch.load(f"{c.out}/ckpt.pt", weights_only=True)
        whole = go(f"whole{len(kw)}", steps=2)
        go(f"cut{len(kw)}", steps=1)
        cut = go(f"cut{len(kw)}", steps=2, resume=True)
        assert all(same(whole[k], cut[k]) for k in NETS if k in whole) and ("disc" in whole) == kw["gan"]
        assert whole["skipped"] == 0
        moved = [k for k, v in whole["student"].items() if not torch.equal(v, load_teacher(name, random_weights=True).net.state_dict()[k])]
        assert len(moved) > 40 and not any(k.startswith(("tok_emb", "pos_emb", "to_logits")) for k in moved)


@pytest.mark.parametrize("name", ["maskgit-tiny", "meissonic-tiny", "maskgen-tiny"])
def test_every_tiny_teacher_is_evaluated_beside_its_student(name, tmp_path):
    c = train.settle(dict(teacher=name, random_weights=True, device="cpu", dtype="fp32", steps=1, warmup=0, n_eval=12, batch=4,
                          init_from="teacher", eval_every=1, student_start=0, out=f"{tmp_path}/run"), train.flags()[1])
    train.train(c)                                                # with a strip of samples, and a picture at the end
    assert {"samples_000000.png", "samples_000001.png", "picture.png", "student.safetensors"} <= set(os.listdir(c.out))
    args = ev.flags().parse_args(["--ckpt", f"{c.out}/ckpt.pt", "--steps", "2", "--n", "12", "--out", f"{tmp_path}/e", "--device", "cpu"])
    ev.main(args)
    rows = [json.loads(line) for line in open(f"{tmp_path}/e/results.jsonl")]
    assert [(row["kind"], row["steps"], row["n"]) for row in rows] == [("student", 1, 12), ("teacher", 2, 12)]
    assert all(("geneval" in row) == (name == "meissonic-tiny") for row in rows)
    assert all("fid" not in row and row["images/s"] > 0 for row in rows) and rows[0]["noise"] == SPECS[name].student["noise"]
    assert rows[1].items() >= next(iter(SPECS[name].sampling.values())).items()
    C, H, W = SPECS[name].image
    with Image.open(f"{tmp_path}/e/sheet.png") as sheet:
        assert sheet.size[0] > 3 * W and sheet.size[1] > 2 * H


def test_mask_ratios_keep_within_the_bounds_that_the_official_meissonic_code_has(tmp_path):
    teacher = load_teacher("meissonic-tiny", random_weights=True)
    rows, ratios = teacher.conditions(["a", "b"]), {}
    for bounds in ([0.0, 1.0], [0.02, 0.98]):
        c = train.settle(dict(teacher="meissonic-tiny", schedule="cosine", ratio_range=bounds, batch=200, out=f"{tmp_path}"), train.flags()[1])
        steps = [train.draw_step(c, n, 0, 200, teacher.net, rows) for n in range(10)]
        ratios[bounds[0]] = torch.cat([r for s in steps for r in (s.ratio, s.ratio_aux)])
    assert ratios[0.0].min() < 0.01 and ratios[0.0].max() > 0.99
    assert torch.equal(ratios[0.02], ratios[0.0].clamp(0.02, 0.98))
    assert train.TABLE_5["meissonic"]["ratio_range"] == [0.02, 0.98]


@pytest.mark.parametrize("name", ["meissonic-tiny", "maskgen-tiny"])
def test_features_of_prompts_are_the_same_bits_however_they_came_and_outlive_the_run_in_a_folder(name, tmp_path):
    teacher = load_teacher(name, random_weights=True)
    rows = teacher.conditions([f"thing {i}" for i in range(40)])
    memory, folder, off = (TextFeatures(teacher, rows, k) for k in ("memory", f"{tmp_path}/t", "off"))
    for i in range(6):
        which = torch.randint(40, (9,), generator=seed(i))
        assert same(memory(which), folder(which))
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(memory(which), off(which)))
    backwards, every = TextFeatures(teacher, rows), torch.arange(40)                    # another order of arrival
    assert same(backwards(every.flip(0)), memory(every.flip(0)))
    (kept,) = os.listdir(f"{tmp_path}/t")
    again = TextFeatures(teacher, rows, f"{tmp_path}/t")
    assert torch.equal(again.known, folder.known) and 9 < again.known.sum() <= 40
    again.parts[0][which] += 1                                    # read, not encoded anew; another prompt list, another folder
    assert torch.equal(TextFeatures(teacher, rows, f"{tmp_path}/t")(which)[0], memory(which)[0] + 1)
    TextFeatures(teacher, rows[:30], f"{tmp_path}/t")
    assert len(os.listdir(f"{tmp_path}/t")) == 2
    much = TextFeatures(teacher, rows, limit=1000)
    assert "--text_cache FOLDER" in much.why and same(much(which), off(which))


@pytest.mark.parametrize("name", ["maskbit-tiny", "maskgit-tiny", "meissonic-tiny", "maskgen-tiny"])
def test_frozen_weights_in_bf16_change_nothing_under_autocast(name):
    teacher, text = load_teacher(name, random_weights=True), SPECS[name].text
    cond = teacher.cond(teacher.conditions(["a", "b!"] if text else None)[:2])
    e = se.embed_tokens(integers(0, teacher.net.V + 1, 2, teacher.net.L, teacher.net.G), *teacher.net.tables())
    before = sum(p.nbytes for p in teacher.net.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = teacher.net(e, cond)
        assert torch.equal(teacher.net.halve()(e, cond), expected)
    assert sum(p.nbytes for p in teacher.net.parameters()) < 0.75 * before


def test_settings_of_table_5_reach_every_teacher():
    columns = {"maskgit": (256, 30_000, 2.0, 0.6, -0.2, 12.0, "arccos", 100.0, [0.0, 0.5], 4, 1e-5),
               "maskbit": (256, 50_000, 1.5, 0.6, 0.0, 0.1, "arccos", 25.0, [0.0, 0.95], 4, 1e-6),
               "meissonic": (16, 10_000, 4.0, 0.6, 0.0, 0.5, "cosine", None, None, None, 1e-6),
               "maskgen": (64, 50_000, 4.0, 0.9, 0.0, 1.0, "arccos", 100.0, [0.0, 0.95], 6, 1e-6)}
    keys = ("batch", "steps", "cfg", "init_ratio", "beta", "temperature", "schedule", "w_gan", "gan_ratio", "heads", "lr")
    for name, values in columns.items():
        c = train.settle(dict(teacher=name, prompts="assets/prompts.txt", out="nowhere"), train.flags()[1])
        for key, value in zip(keys, values):
            assert value is None or getattr(c, key) == value, (name, key)
        assert c.ema == 0.9999 and c.warmup == 100 and c.clip == 1.0 and c.weight_decay == 0.0 and c.optimizer == "adam"


def test_accumulation_equals_the_joint_batch(tmp_path):
    one, two = (run(tmp_path, out=f"{tmp_path}/{a}", accum=a, clip=1e9) for a in (1, 2))
    for k in ("student", "aux", "disc", "ema"):
        assert all(torch.allclose(one[k][n], two[k][n], atol=2e-5) for n in one[k]), k


def one_of_two(rank, folder, port, *runs):
    """Process `rank` of two: the nano runs with these settings, one after the other."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for kw in runs:
        train.train(nano_run(folder, **kw))


def test_two_gloo_processes_make_the_same_update_as_one(tmp_path):
    one = run(tmp_path, out=f"{tmp_path}/one")
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), 29531, dict(out=f"{tmp_path}/two")), nprocs=2)
    two = torch.load(f"{tmp_path}/two/ckpt.pt", weights_only=True)
    for k in ("student", "aux", "disc", "ema"):
        assert all(torch.allclose(one[k][n], two[k][n], atol=2e-5) for n in one[k]), k


def test_ablations_are_flags(tmp_path):
    dimo_only = run(tmp_path, out=f"{tmp_path}/a", gan=False, steps=3)
    gan_only = run(tmp_path, out=f"{tmp_path}/b", w_dimo=0.0, steps=3)
    late = run(tmp_path, out=f"{tmp_path}/c", w_dimo=0.0, gan_start=3, steps=3)
    assert "disc" not in dimo_only and not same(dimo_only["student"], gan_only["student"])
    frozen = MaskBit(**NANO.net)
    start = load_teacher("nano", random_weights=True).net.state_dict()
    assert same(late["student"], dict(start)) and not same(late["aux"], dict(start))     # nothing joined the student yet
    names = {n for n, p in frozen.named_parameters() if any(p is q for q in frozen.frozen())}
    assert len(names) == 4 and all(torch.equal(gan_only["student"][n], start[n]) for n in names)
    for kw in (dict(estimator="straight-through"), dict(estimator="gumbel", tau=2.0), dict(soft_state=True),
               dict(redraw=True), dict(cfg_schedule="cosine"), dict(w_t="inverse"), dict(beta=-0.2), dict(soft_target=0.5)):
        ckpt = run(tmp_path, out=f"{tmp_path}/d", steps=2, overwrite=True, **kw)
        assert all(torch.isfinite(t).all() for t in ckpt["student"].values()), kw


def test_warm_up_starts_at_zero_and_ema_follows_the_official_ramp():
    factors = [train.lr_factor(n, 100, 5000) for n in (0, 1, 2, 50, 99, 100, 1000)]
    assert factors == [0.0, 0.01, 0.02, 0.5, 0.99, 1.0, 1.0] and abs(train.lr_factor(5000, 100, 5000, 0.1) - 0.1) < 1e-12
    for n, rate in ((0, 0.1), (1, 0.18181818), (10, 0.55), (1000, 0.99108911), (30000, 0.9997001), (89991, 0.9999)):
        ema, net = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        ema.weight.data.fill_(1.0), net.weight.data.fill_(0.0)
        train.ema_update(ema, net, n, 0.9999)
        assert abs(ema.weight.item() - rate) < 1e-6


def test_muon_moves_matrices_by_orthogonal_steps_and_the_rest_as_adam_does():
    torch.manual_seed(0)
    matrix, gain, kernel = (nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (8,), (4, 3, 3, 3)))
    other = [nn.Parameter(p.detach().clone()) for p in (gain, kernel)]
    opt = train.Muon([matrix, gain, kernel], 0.01, (0.9, 0.999), eps=1e-6, weight_decay=0.0, fused=True)
    adam, before = torch.optim.Adam(other, 0.01, (0.9, 0.999), eps=1e-6, fused=True), matrix.detach().clone()
    for p in (matrix, gain, kernel):
        p.grad = torch.randn_like(p)
    for p, q in zip(other, (gain, kernel)):
        p.grad = q.grad.clone()
    opt.step(), adam.step()
    assert torch.equal(gain, other[0]) and torch.equal(kernel, other[1])
    scale = torch.linalg.svdvals((matrix - before).detach()) / (0.01 * 0.2 * math.sqrt(24))   # all near 1, whatever g was
    assert scale.min() > 0.6 and scale.max() < 1.3
    assert {id(group) for group in opt.param_groups} == {id(group) for part in opt.parts for group in part.param_groups}
    again = train.Muon([matrix, gain, kernel], 0.01, (0.9, 0.999), eps=1e-6, weight_decay=0.0, fused=True)
    again.load_state_dict(opt.state_dict())
    assert torch.equal(again.parts[0].state[matrix]["momentum_buffer"], opt.parts[0].state[matrix]["momentum_buffer"])
    opt.zero_grad()
    assert matrix.grad is gain.grad is None


def test_a_step_that_is_not_finite_is_skipped_counted_and_ends_the_run_after_ten(tmp_path, monkeypatch):
    true, calls = train.dimo_grad, []

    def broken(*a, **k):
        calls.append(1)
        return true(*a, **k) * (float("nan") if len(calls) == 3 or len(calls) > 6 else 1.0)
    monkeypatch.setattr(train, "dimo_grad", broken)
    ckpt = run(tmp_path, steps=6)
    assert ckpt["skipped"] == 1 and all(torch.isfinite(t).all() for t in ckpt["student"].values())
    with pytest.raises(UserError, match="not finite in 10 steps.*--resume"):
        run(tmp_path, steps=40, resume=True)


def test_a_full_disk_or_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = str(tmp_path / "ckpt.pt")
    train.save_checkpoint(path, dict(step=1))

    def full(state, f):
        f.write(b"half of a checkpoint")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="disk full.*--resume"):
        train.save_checkpoint(path, dict(step=2))
    assert torch.load(path, weights_only=True) == dict(step=1) and os.listdir(tmp_path) == ["ckpt.pt"]
    killed = ("import torch, os, train\n"                                  # the process dies in the middle of a write
              "def save(state, f): f.write(b'half'); f.flush(); os._exit(9)\n"
              f"torch.save = save\ntrain.save_checkpoint({path!r}, dict(step=3))")
    assert subprocess.run([sys.executable, "-c", killed], cwd=ROOT).returncode == 9
    assert torch.load(path, weights_only=True) == dict(step=1)


@pytest.mark.parametrize("kw, words", [
    (dict(teacher="nope"), "unknown --teacher 'nope'.*maskbit"), (dict(batch=9), "--batch 9 .*2 accumulation"),
    (dict(data=None), "--gan .*--data"), (dict(w_dimo=0.0, gan=False), "nothing to train"), (dict(lr=-1.0), "--lr -1"),
    (dict(gan_ratio=[0.5, 0.2]), "--gan_ratio"), (dict(init_ratio=1.5), "at most 1")])
def test_bad_settings_are_answered_with_a_sentence(tmp_path, kw, words):
    with pytest.raises(UserError, match=words):
        nano_run(tmp_path, **{"accum": 2, **kw}) if "teacher" not in kw else train.settle(kw, train.flags()[1])


def test_a_text_teacher_without_prompts_is_answered_with_a_sentence(tmp_path):
    settle = lambda **kw: train.settle(dict(teacher="maskgen-tiny", random_weights=True, device="cpu", out=f"{tmp_path}/o", **kw),
                                       train.flags()[1])
    with pytest.raises(UserError, match="maskgen draws what it is told: add --prompts FILE"):
        train.settle(dict(teacher="maskgen", out=f"{tmp_path}/o"), train.flags()[1])
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for name, words in (("none.txt", "cannot read"), ("empty.txt", "no prompt in it"), ("latin.txt", "cannot read")):
        with pytest.raises(UserError, match=f"--prompts .*{name}: {words}"):
            train.train(settle(prompts=f"{tmp_path}/{name}"))
    data = other_world(f"{tmp_path}/data", "maskgen-tiny")
    (tmp_path / "data/prompts.txt").write_text("only one\n")
    with pytest.raises(UserError, match="label 4, but 1 prompts"):
        train.train(settle(gan=True, data=data))
    os.remove(f"{data}/prompts.txt")
    with pytest.raises(UserError, match="cannot read real tokens with their prompts .*prompts.txt"):
        train.train(settle(gan=True, data=data))


def test_bad_files_are_answered_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot read real tokens.*data/imagenet.py"):
        run(tmp_path, data=f"{tmp_path}/missing")
    np.savez(tmp_path / "other.npz", tokens=np.zeros((5, 9, 1), np.uint8), labels=np.zeros(5, np.uint8))
    with pytest.raises(UserError, match=r"expected tokens \(n, 16, 2\)"):
        run(tmp_path, data=f"{tmp_path}/other.npz")
    with pytest.raises(UserError, match="no weights at .*ckpt.pt"):
        run(tmp_path, resume=True)
    run(tmp_path, steps=1)
    command = [sys.executable, "train.py", "--resume", "--out", f"{tmp_path}/run", "--teacher", "maskbit"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "is a run with --teacher nano, and now --teacher is maskbit" in done.stderr
    assert "Traceback" not in done.stderr


# ========================================================================== GenEval: is it what was asked for?
def judge(tag, include, exclude, seen):
    """The verdict on {class: [(box, score, colour), ...]}; include and exclude are [(class, count, more), ...]."""
    clauses = lambda part: [{"class": c, "count": n, **dict(*more)} for c, n, *more in part]
    metadata = dict(tag=tag, include=clauses(include), exclude=clauses(exclude))
    colour = lambda box, name: next(c for b, _, c in seen[name] if b == box)
    return benchmarks.verdict(metadata, {name: [found[:2] for found in boxes] for name, boxes in seen.items()}, colour)


A, B, C, D = (1, 1, 9, 9), (0, 0, 5, 5), (6, 6, 9, 9), (1, 1, 2, 2)
DOG, CAT = [((60, 10, 100, 50), 0.9, "red")], ((5, 12, 40, 48), 0.9, "red")
LEFT, ABOVE, BELOW = ([("dog", 1), ("cat", 1, {"position": [name, 0]})] for name in ("left of", "above", "below"))
BLUE, BLACK = [("bench", 1, {"color": "blue"})], [("dog", 1, {"color": "purple"}), ("apple", 1, {"color": "black"})]


@pytest.mark.parametrize("right, tag, include, exclude, seen", [
    (True, "single_object", [("dog", 1)], [], {"dog": [(A, 0.31, "red")]}),
    (False, "single_object", [("dog", 1)], [], {"dog": [(A, 0.3, "red")]}),
    (True, "two_object", [("dog", 1), ("cat", 1)], [], {"dog": [(A, 0.8, "red")], "cat": [(A, 0.35, "red")]}),
    (True, "counting", [("apple", 2)], [("apple", 3)], {"apple": [(B, 0.95, ""), (C, 0.91, ""), (D, 0.89, "")]}),
    (False, "counting", [("apple", 2)], [("apple", 3)], {"apple": [(B, 0.95, ""), (C, 0.91, ""), (D, 0.905, "")]}),
    (False, "counting", [("apple", 3)], [("apple", 4)], {"apple": [(B, 0.95, ""), (C, 0.91, ""), (D, 0.5, "")]}),
    (True, "colors", BLUE, [], {"bench": [(B, 0.5, "red"), (C, 0.9, "blue")]}),
    (False, "colors", BLUE, [], {"bench": [(B, 0.95, "red"), (C, 0.9, "blue")]}),
    (True, "position", LEFT, [], {"dog": DOG, "cat": [CAT]}),
    (False, "position", LEFT, [], {"dog": DOG, "cat": [CAT, ((70, 70, 90, 90), 0.95, "red")]}),
    (False, "position", ABOVE, [], {"dog": [((10, 30, 60, 90), 0.9, "")], "cat": [((12, 25, 58, 82), 0.9, "")]}),
    (False, "position", BELOW, [], {"cat": [((12, 25, 58, 82), 0.9, "red")]}),
    (True, "color_attr", BLACK, [], {"dog": [(B, 0.7, "purple")], "apple": [(B, 0.7, "black")]}),
    (False, "color_attr", BLACK, [], {"dog": [(B, 0.7, "black")], "apple": [(B, 0.7, "purple")]})])
def test_golden_geneval_verdicts(right, tag, include, exclude, seen):
    correct, why = judge(tag, include, exclude, seen)
    assert correct is right and (why == "") == right


@pytest.mark.parametrize("a, b, names", [
    ((31, 29, 91, 67), (16, 25, 95, 82), ""), ((77, 18, 80, 82), (0, 0, 9, 10), "right of"),
    ((12, 4, 26, 9), (48, 70, 75, 80), "above"), ((31, 14, 97, 66), (34, 17, 83, 75), ""),
    ((32, 6, 86, 71), (30, 3, 78, 67), ""), ((56, 19, 97, 57), (45, 27, 84, 53), ""),
    ((45, 40, 87, 59), (14, 3, 84, 43), "below"), ((50, 17, 62, 98), (39, 17, 60, 90), ""),
    ((93, 32, 97, 97), (54, 54, 86, 95), "right of"), ((52, 8, 61, 53), (19, 72, 40, 90), "above"),
    ((26, 47, 91, 72), (45, 17, 76, 66), "below"), ((14, 40, 20, 48), (34, 44, 69, 51), "left of"),
    ((44, 65, 56, 77), (53, 76, 51, 63), ""), ((24, 5, 64, 59), (19, -7, 78, 68), "")])
def test_golden_geneval_relations(a, b, names):
    assert benchmarks.relations(a, b) == ({names} if names else set())


def test_a_box_can_be_left_and_above_at_once_and_a_reversed_box_has_its_size():
    assert benchmarks.relations((0, 0, 2, 2), (20, 20, 22, 22)) == {"left of", "above"}
    assert benchmarks.relations((20, 20, 22, 22), (0, 0, 2, 2)) == {"right of", "below"}
    # 10 apart, sizes 60 and 30: shrunk to 1, a tenth of the way. With a size of -30 it were 7, and "right of".
    where = benchmarks.relations
    assert where((0, 0, 60, 0), (35, 0, 5, 0)) == where((0, 0, 60, 0), (5, 0, 35, 0)) == set()
    assert benchmarks.relations((0, 0, 20, 0), (10, 0, -10, 0)) == {"right of"}                         # 6 of 10


def test_a_relation_needs_more_than_half_of_the_way():
    # Centres (3, 4) apart, so |o| = 5. Without height y stays 4 of 5; x is shrunk from 3 by a tenth of the width.
    wide = lambda w: benchmarks.relations((3 - w / 2, 4, 3 + w / 2, 4), (0, 0, 0, 0))
    assert wide(4) == {"right of", "below"} and wide(6) == {"below"}                            # 2.6 and 2.4 of 5
    assert benchmarks.relations((-1, -1, 1, 1), (-3, -3, 3, 3)) == set()                                # one centre
    points = [benchmarks.relations((x, 0, x, 0), (0, 0, 0, 0)) for x in (9e-4, 2e-3)]
    assert points == [set(), {"right of"}]                       # less than a thousandth of a pixel is no distance


@pytest.mark.parametrize("tag, limit", [(tag, 0.9 if tag == "counting" else 0.3) for tag in benchmarks.TASKS])
def test_a_score_at_the_threshold_is_out_in_float32_too(tag, limit):
    just = np.nextafter(np.float32(limit), np.float32(1))
    for score, right in ((limit, False), (np.float32(limit), False), (just, True), (limit + 1e-9, False)):
        assert judge(tag, [("dog", 1)], [], {"dog": [(A, score, "red")]})[0] is right


def test_at_most_sixteen_boxes_count_the_surest():
    boxes = [((i, 0, i + 1, 1), 0.4 + 0.01 * i) for i in range(20)]
    kept = benchmarks.kept(boxes, "colors")
    assert kept == [box for box, _ in boxes[:3:-1]] and len(kept) == 16
    many = {"dog": [(*found, "red") for found in boxes]}
    assert judge("single_object", [("dog", 16)], [("dog", 17)], many)[0]                # all 20 are above 0.3
    assert not judge("single_object", [("dog", 1)], [("dog", 16)], many)[0]


def test_a_position_fails_with_its_target_and_says_so():
    red_dog = [("dog", 1, {"color": "red"}), LEFT[1]]
    assert judge("position", red_dog, [], {"dog": DOG, "cat": [CAT]}) == (True, "")
    correct, why = judge("position", red_dog, [], {"dog": [(*DOG[0][:2], "blue")], "cat": [CAT]})
    assert not correct and why == ("expected 1 red dog, found blue; "
                                   "expected cat left of something that is missing or wrong itself")
    why = judge("position", ABOVE, [], {"dog": DOG, "cat": [CAT]})[1]
    assert why == "expected cat above its target, found it left of"


def test_each_placed_object_must_stand_right_to_each_target():
    two = [("dog", 2), ("cat", 2, {"position": ["left of", 0]})]
    at = lambda *xs: [((x, 0, x + 4, 4), 0.9, "red") for x in xs]
    assert judge("position", two, [], {"dog": at(50, 60), "cat": at(0, 10)})[0]
    for step in (1, -1):                                         # whichever of the two is looked at first
        assert not judge("position", two, [], {"dog": at(50, 5)[::step], "cat": at(0, 10)})[0]
        assert not judge("position", two, [], {"dog": at(50, 60), "cat": at(0, 70)[::step]})[0]


def test_all_of_several_objects_must_have_the_colour():
    for seen, right in (("red red", True), ("red blue", False), ("blue red", False)):
        boxes = [((i, 0, i + 1, 1), 0.9, colour) for i, colour in enumerate(seen.split())]
        assert judge("color_attr", [("dog", 2, {"color": "red"})], [], {"dog": boxes})[0] is right


def test_what_is_excluded_may_be_there_in_smaller_number():
    for n, right in ((0, True), (1, True), (2, False), (3, False)):
        seen = {"dog": [(A, 0.9, "red")], "cat": [(A, 0.8, "red")] * n}
        assert judge("single_object", [("dog", 1)], [("cat", 2)], seen)[0] is right


def test_geneval_is_the_mean_of_tasks_not_of_images():
    rows = [("counting", True)] + [("single_object", False)] * 3 + [(tag, True, "") for tag in benchmarks.TASKS[1:]]
    table = benchmarks.geneval_table(rows + [("position", False), ("position", False), ("position", False)])
    assert table["position"] == 0.25 and table["counting"] == 1 and list(table) == ["geneval", *benchmarks.TASKS]
    assert table["geneval"] == pytest.approx((0 + 1 + 1 + 1 + 0.25 + 1) / 6)
    assert benchmarks.geneval_table([("colors", True), ("colors", False)]) == {"geneval": None, "colors": 0.5}


PROMPTS = [
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}],
     "prompt": "a photo of two cats"}]


def test_a_geneval_folder_is_read_back_and_judged_by_any_detector(tmp_path):
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    prompts = benchmarks.read_metadata(str(tmp_path / "meta.jsonl"))
    img = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 2, 3, 6, 8), dtype=np.uint8))
    benchmarks.write_geneval(f"{tmp_path}/g", prompts, (part for part in img))
    files = sorted(str(f.relative_to(tmp_path / "g")) for f in (tmp_path / "g").rglob("*.*"))
    each = "metadata.jsonl", "samples/00000.png", "samples/00001.png"
    assert files == [f"0000{i}/{name}" for i in (0, 1) for name in each]
    (tmp_path / "g/00001/grid.png").write_bytes(b""), (tmp_path / "g/00001/samples/notes.txt").write_bytes(b"")
    back = list(benchmarks.read_geneval(f"{tmp_path}/g"))
    assert [metadata for metadata, _ in back] == prompts == PROMPTS
    assert np.array_equal(np.array([[np.array(p) for p in part] for _, part in back]), img.permute(0, 1, 3, 4, 2))
    detector = lambda image: {"dog": [(A, 0.5)], "cat": [(A, 0.95), (B, 0.92)]} if image == back[0][1][0] else {}
    rows = list(benchmarks.geneval(f"{tmp_path}/g", detector, lambda image, box, name: "red"))
    assert [row[:2] for row in rows] == [("colors", True), ("colors", False)] + [("counting", False)] * 2
    with pytest.raises(UserError, match="cannot make the folder .*00000.samples .*a new one"):
        benchmarks.write_geneval(f"{tmp_path}/g", prompts, img)


@pytest.mark.parametrize("change, words", [
    ("{cut", "Expecting property name"), ("", "Expecting value"), ("[1]", "expected tag, prompt and include"),
    ("7", "not iterable"), (dict(include=3), "iterable"), (dict(include=[{"class": "dog"}]), "class and count"),
    (dict(tag="colours"), "a tag out of single_object, .*got 'colours'"),
    (dict(exclude=[{"class": "dog", "count": 0}]), "a count from 1 to 16, got 0"),
    (dict(include=[{"class": "dog", "count": 1, "color": "grey"}]), "a color out of red"),
    (dict(include=[{"class": "dog", "count": 1, "position": ["above", 0]}]), "a position .*earlier entry")])
def test_a_broken_metadata_line_is_named(tmp_path, change, words):
    line = change if isinstance(change, str) else json.dumps({**PROMPTS[0], **change})
    (tmp_path / "meta.jsonl").write_text(f"{json.dumps(PROMPTS[1])}\n{line}\n")
    with pytest.raises(UserError, match=f"meta.jsonl, line 2 is no prompt of GenEval: .*{words}"):
        benchmarks.read_metadata(str(tmp_path / "meta.jsonl"))


def test_unreadable_geneval_files_are_answered_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.jsonl .*evaluation_metadata.jsonl"):
        benchmarks.read_metadata(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="cannot read .*none .*<index>/metadata.jsonl"):
        list(benchmarks.read_geneval(str(tmp_path / "none")))
    benchmarks.write_geneval(str(tmp_path / "g"), PROMPTS[:1], [torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)])
    picture = tmp_path / "g/00000/samples/00000.png"
    whole = picture.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:50] + b"?" * 20 + whole[70:]):
        picture.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot read .*00000.png"):
            list(benchmarks.read_geneval(str(tmp_path / "g")))


# ======================================================================================== COCO-30k and HPS v2
@pytest.mark.parametrize("excess, start", [(0, 0), (1, 0), (2, 1), (3, 2), (5, 2), (7, 4)])   # 0.5 0, 1.5 2
def test_the_crop_of_an_odd_excess_starts_at_the_even_half(excess, start):
    pixels = np.random.RandomState(3).randint(0, 256, (16, 16 + excess, 3), dtype=np.uint8)
    for p in (pixels, pixels.transpose(1, 0, 2)):
        crop = p[:, start:start + 16] if p.shape[0] == 16 else p[start:start + 16]
        assert np.array_equal(inception.coco_crop(Image.fromarray(p), 16), crop)    # LANCZOS to the same size copies


def test_golden_coco_crop():
    pixels = np.random.RandomState(80).randint(0, 256, (37, 50, 3)).astype(np.uint8).repeat(2, 0).repeat(2, 1)
    out = inception.coco_crop(Image.fromarray(pixels), 32)
    assert out.dtype == np.uint8
    agrees(torch.from_numpy(out), [174, 95, 74, 136, 163, 60, 194, 195, 215, 183, 157, 59, 192, 78, 73, 115], 392894)
    grey = inception.coco_crop(Image.fromarray(pixels[:, :, 0]))                                       # COCO has some
    assert grey.shape == (256, 256, 3) and (grey == grey[:, :, :1]).all()


def test_golden_clip_score_tokens():
    long = " ".join(["a very long caption about a dog and a cat playing in the snow"] * 6)
    ids = benchmarks.clip_score_tokens(["A man riding a wave on top of a surfboard.", long])
    short = [320, 786, 6765, 320, 4535, 525, 1253, 539, 320, 10176, 1972, 269]
    assert ids.shape == (2, 77) and ids[0].tolist() == [49406, 320, 1125, 29340, *short, 49407, *[0] * 60]
    once = [320, 1070, 1538, 11327, 781, 320, 1929, 537, 320, 2368, 1629, 530, 518, 2583]
    assert ids[1].tolist() == [49406, 320, 1125, 29340, *(once * 6)[:72], 49407]


def test_the_prefix_pushes_a_long_captions_end_out_and_another_takes_its_place():
    for words in (71, 72, 73, 75, 200):                          # 72 and the prefix fill all 77
        ids = benchmarks.clip_score_tokens(["dog " * words])[0].tolist()
        assert [x for x in ids if x] == [49406, 320, 1125, 29340, *[1929] * min(words, 72), 49407]
    ids = benchmarks.clip_score_tokens(["dog " * 71 + "1 !-- a dog"])[0].tolist()            # "!--" is 0, 2432
    assert ids[75:] == [272, 0] and 49407 not in ids             # a zero in the last place passes for padding


def test_hps_averages_blocks_of_eighty():
    # Block b of style s: 10 s + b, half of it 5 more and half 5 less. Of means 0 to 9 the variance is 99 / 12.
    score = lambda s, i: 10 * s + i // 80 + (5 if i % 80 < 40 else -5)
    scores = {style: [score(s, i) for i in range(800)] for s, style in enumerate(benchmarks.HPS_STYLES)}
    table = benchmarks.hps_benchmark(scores)
    assert table == {"anime": (4.5, 2.8723), "concept-art": (14.5, 2.8723), "paintings": (24.5, 2.8723),
                     "photo": (34.5, 2.8723), "averaged": 19.5}
    assert benchmarks.hps_benchmark({"photo": torch.full((800,), 27.126)}) == {"photo": (27.13, 0.0), "averaged": None}
    with pytest.raises(UserError, match="anime: expected 800 scores, one a prompt, got 799"):
        benchmarks.hps_benchmark({"anime": [1.0] * 799})


def test_hps_images_lie_where_its_package_looks_as_jpegs_of_quality_75(tmp_path):
    img = torch.from_numpy(np.random.RandomState(5).randint(0, 256, (3, 3, 16, 16), dtype=np.uint8))
    benchmarks.write_hps(str(tmp_path), "concept-art", (part for part in img))
    assert sorted(os.listdir(tmp_path / "concept-art")) == ["00000.jpg", "00001.jpg", "00002.jpg"]
    Image.fromarray(img[1].permute(1, 2, 0).numpy()).save(tmp_path / "default.jpg")        # PIL's default is 75
    assert (tmp_path / "default.jpg").read_bytes() == (tmp_path / "concept-art/00001.jpg").read_bytes()
    with pytest.raises(ValueError, match="unknown style 'anime2'"):
        benchmarks.write_hps(str(tmp_path), "anime2", img)


# ============================================================================ clean-fid's resize, open_clip's transform
def test_golden_clean_resize():
    pixels = np.random.RandomState(70).randint(0, 256, (2, 3, 5, 7)).astype(np.uint8).repeat(8, 2).repeat(8, 3)[0]
    out = inception.clean_resize(pixels.transpose(1, 2, 0))
    assert out.shape == (299, 299, 3) and out.dtype == np.float32 and out.min() >= 0 and out.max() <= 255
    agrees(torch.from_numpy(out), [78, 10, 159] * 5 + [78], 31562269.13)
    agrees(torch.from_numpy(out[150, ::19, 0].copy()), [200, 200, 198.246521, 224, 224, 23, 23, 53.80029678, 52, 164.2348328,
                                                        225, 235.0661316, 84, 84, 114, 114])


def test_golden_transform_of_open_clip():
    pixels = (uniform(300, 2, 3, 80, 72).float()[0] * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    out = reward.preprocess_pil(Image.fromarray(pixels), 56)
    agrees(out, [0.44129676, -1.2667192, -1.0039475, -0.46380571, 1.1566195, 1.4339896], 5522.1797)
    wide = np.random.RandomState(0).randint(0, 256, (16, 19, 3)).astype(np.uint8)             # an excess of 3: starts at 2
    agrees(reward.preprocess_pil(Image.fromarray(wide), 16).flatten(),
           reward.normalise(torch.from_numpy(wide[:, 2:18]).permute(2, 0, 1) / 255).flatten().tolist())


@pytest.mark.parametrize("config, count", [(reward.CLIP_G, 1_366_678_273), (reward.CLIP_L, 427_616_513)])
def test_the_clips_that_measure_have_their_published_size(config, count):
    one = {k: dict(v, layers=1) if isinstance(v, dict) else v for k, v in config.items()}
    with torch.device("meta"):
        model = reward.ClipReward(one)
    size = lambda m: sum(p.numel() for p in m.parameters())
    towers = ((model.clip.visual.transformer, "vision_cfg"), (model.clip.transformer, "text_cfg"))
    assert size(model) + sum((config[cfg]["layers"] - 1) * size(t.resblocks[0]) for t, cfg in towers) == count
    assert model.clip.visual.transformer.resblocks[0].mlp.c_fc.out_features == {1024: 6144, 768: 4096}[config["embed_dim"]]
    gelu = type(model.clip.transformer.resblocks[0].mlp.gelu).__name__
    assert gelu == ("QuickGELU" if config is reward.CLIP_L else "GELU")                      # OpenAI's alone is quick


# ================================================================================================ GenEval's detector
def test_instances_are_pairs_of_query_and_class_with_masks_in_the_images_pixels():
    DOG, CAT, Q = benchmarks.CLASSES.index("dog"), benchmarks.CLASSES.index("cat"), 3
    z_class = torch.full((Q, 81), -9.0)
    z_class[0, DOG], z_class[0, CAT], z_class[0, 80] = 2.0, 1.0, 3.0                          # both, and "nothing" most
    z_class[1, CAT], z_class[2, DOG] = 4.0, 4.0
    z_mask = torch.full((Q, 2, 2), -5.0)
    z_mask[0] = torch.tensor([[-1.0, 3.0], [-1.0, 3.0]])
    z_mask[1] = 2.0                                               # all of it; query 2 has an empty mask
    found = benchmarks.instances(z_class, z_mask, (8, 8), (8, 8), (8, 8), best=4)
    assert sorted((name, len(boxes)) for name, boxes in found.items()) == [("cat", 2), ("dog", 2)]
    p = z_class.softmax(-1)
    columns = torch.tensor([0.5, 1.5, 2.5, 3.0, 3.0])             # half-pixel bilinear: -1 -1 -.5 .5 1.5 2.5 3 3
    right = columns.sigmoid().mean().item()
    for name, c in (("dog", DOG), ("cat", CAT)):                  # one query, two classes, one mask
        (box, score), = [(b, s) for b, s in found[name] if b == (3, 0, 8, 8)]
        assert score == pytest.approx(p[0, c].item() * right, abs=1e-5)
        assert box.mask.shape == (8, 8) and box.mask[:, 3:].all() and not box.mask[:, :3].any()
    assert ((0, 0, 8, 8), pytest.approx(p[1, CAT].item() * torch.tensor(2.0).sigmoid().item(), abs=1e-5)) in found["cat"]
    assert ((0, 0, 0, 0), 0.0) in found["dog"]
    assert not benchmarks.relations(benchmarks.Box((3, 0, 8, 8)), (0, 0, 8, 8))
    assert benchmarks.kept(found["cat"], "colors")[0] == (0, 0, 8, 8)
    z_class[0, 80], z_class[0, DOG] = -9.0, 30.0
    half = benchmarks.instances(z_class, z_mask, (8, 16), (8, 8), (40, 20), best=1)        # the right half was padding
    (name, ((box, _),)), = half.items()                           # the ramp is 0 at column 6 of 8, so at 15 of 20
    assert name == "dog" and box == (15, 0, 20, 40)


class SeesRed(nn.Module):
    """A network of a Mask2Former's interface: one query for what is red, as a laptop."""

    def forward(self, pixel_values):
        self.seen = pixel_values
        red = (pixel_values[:, :1] - pixel_values[:, 1:2])[:, :, ::4, ::4] - 2
        z = torch.full((1, 1, 81), -9.0)
        z[..., benchmarks.CLASSES.index("laptop")] = 9.0
        return type("Output", (), dict(class_queries_logits=z, masks_queries_logits=30 * red))


@pytest.mark.parametrize("size, scaled, padded", [((40, 30), (1067, 800), (1088, 800)), ((100, 10), (1333, 133), (1344, 160)),
                                                  ((1000, 1100), (800, 880), (800, 896))])
def test_the_detector_scales_normalises_pads_and_its_boxes_return_to_the_image(size, scaled, padded):
    net, (W, H) = SeesRed(), size
    image = Image.new("RGB", size, (10, 60, 200))
    box = (W // 5, H // 5, W // 2, H // 2)
    image.paste((255, 0, 0), box)
    (found, score), = benchmarks.mask2former(net)(image)["laptop"]
    assert net.seen.shape == (1, 3, padded[1], padded[0])
    corner = net.seen[0, :, 0, 0].tolist()
    assert corner == pytest.approx([(10 - 123.675) / 58.395, (60 - 116.28) / 57.12, (200 - 103.53) / 57.375], abs=1e-4)
    assert (net.seen[:, :, scaled[1]:] == 0).all() and (net.seen[:, :, :, scaled[0]:] == 0).all()
    assert net.seen[0, 2, scaled[1] - 1, scaled[0] - 1] == pytest.approx(corner[2], abs=1e-4)  # no further than the image
    assert np.abs(np.array(found) - box).max() <= 1 and score > 0.9 and found.mask.shape == (H, W)


def test_transformers_mask2former_is_loaded_strictly_and_detects(tmp_path):
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file
    net, path = benchmarks.load_mask2former(random_weights=True), str(tmp_path / "net")
    net.save_pretrained(path)
    again = benchmarks.load_mask2former(path)
    assert weights.fingerprint(net) == weights.fingerprint(again) and not again.training
    image = Image.fromarray(np.random.RandomState(1).randint(0, 256, (6, 60, 3)).astype(np.uint8))
    a, b = benchmarks.mask2former(net)(image), benchmarks.mask2former(again)(image)
    assert a == b and sum(map(len, a.values())) == 100 and set(a) <= set(benchmarks.CLASSES)
    state = load_file(path + "/model.safetensors")
    name = sorted(state)[5]
    del state[name]
    save_file(state, path + "/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks {name}"):
        benchmarks.load_mask2former(path)
    (tmp_path / "net" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot load the detector .*--detector_weights"):
        benchmarks.load_mask2former(path)
    with pytest.raises(UserError, match="no such folder; expected a folder with config.json"):
        benchmarks.load_mask2former(path + "/none")


def test_without_transformers_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        benchmarks.load_mask2former()


def tiny_clip():
    model = reward.load_model("clip_l", lambda: reward.ClipReward(benchmarks.TINY_CLIP, "clip_l"), random_weights=True)
    return model.eval().requires_grad_(False)


def test_a_colours_vector_is_the_direction_of_the_mean_of_three_templates():
    model = tiny_clip()
    vectors = benchmarks.colour_vectors(model, "dog")
    for i, c in ((0, "red"), (9, "white")):
        g = model.clip.encode_text(model.tokenize([f"a photo of a {c} dog", f"a photo of a {c}-colored dog",
                                                   f"a photo of a {c} object"]))
        mean = sum(v / v.norm() for v in g) / 3
        assert torch.allclose(vectors[i], mean / mean.norm(), atol=1e-6)
    assert vectors.shape == (10, 16) and not torch.allclose(vectors, benchmarks.colour_vectors(model, "cat"), atol=1e-3)


def test_the_judge_of_colours_sees_the_object_on_grey_cut_to_its_box():
    model, rng, names = tiny_clip(), np.random.RandomState(3), set()
    colour_of = benchmarks.colour_judge(model)
    for i in range(12):
        pixels = (rng.rand(3) * 256 + 40 * rng.randn(30, 40, 3)).clip(0, 255).astype(np.uint8)
        box = benchmarks.Box((5, 4, 25, 24))
        box.mask = torch.zeros(30, 40, dtype=torch.bool)
        box.mask[4:24, 5:18 + i % 3] = True
        seen = pixels.copy()
        seen[~box.mask.numpy()] = 0x99
        crop = Image.fromarray(seen[4:24, 5:25]).resize((32, 32), Image.Resampling.BICUBIC)
        f = model.clip.encode_image(reward.normalise(torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None] / 255))[0]
        expected = benchmarks.COLOURS[int((benchmarks.colour_vectors(model, "dog") @ f).argmax())]
        names.add(expected)
        assert colour_of(Image.fromarray(pixels), box, "dog") == expected
        outside = np.where(box.mask.numpy()[..., None], pixels, 255 - pixels)
        assert colour_of(Image.fromarray(outside), box, "dog") == expected
    assert len(names) > 1
    assert colour_of(Image.fromarray(pixels), (5, 4, 25, 24), "dog") in benchmarks.COLOURS    # a box without mask


# ===================================================================================================== the benchmarks
LINES = [{"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}], "prompt": "a red ring"},
         {"tag": "single_object", "include": [{"class": "square", "count": 1}], "prompt": "a square"}]


def command(folder, *flags):
    """The rows that a command appends."""
    ev.main(ev.flags().parse_args([*map(str, flags), "--random_weights", "--device", "cpu", "--out", f"{folder}/out"]))
    return [json.loads(line) for line in open(f"{folder}/out/results.jsonl")]


def test_geneval_is_drawn_in_its_layout_and_scored_alike_in_passing_and_from_the_folder(tmp_path, capsys):
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    flags = ["--benchmark", "geneval", "--metadata", tmp_path / "meta.jsonl", "--teacher", "meissonic-tiny", "--steps", 1]
    row, = command(tmp_path, *flags, "--detector", "shapes", "--batch", 3)
    back = list(benchmarks.read_geneval(row["folder"]))
    assert [line for line, _ in back] == LINES and [len(images) for _, images in back] == [4, 4]
    assert row["n"] == 8 and row["per_prompt"] == 4 and row["geneval"] is None and "not comparable" in row["note"]
    again = command(tmp_path, "--geneval_folder", row["folder"], "--detector", "shapes")[1]
    assert all(again[k] == row[k] for k in ("n", "colors", "single_object", "detector")) and again["kind"] == "folder"
    assert "not comparable with published GenEval" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot make the folder .*a new one"):
        command(tmp_path, *flags)
    row = command(tmp_path, *flags[:-1], 2, "--per_prompt", 1)[-1]                            # without detector
    assert [len(images) for _, images in benchmarks.read_geneval(row["folder"])] == [1, 1] and "colors" not in row


def test_a_batch_of_geneval_is_judged_by_its_own_prompt(tmp_path):
    """Drawn scenes in place of a model: the first prompt is fulfilled by two of its images, the second by one."""
    from data.shapes import render
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    args = ev.flags().parse_args(["--benchmark", "geneval", "--metadata", f"{tmp_path}/meta.jsonl", "--detector", "shapes",
                                  "--per_prompt", "3", "--teacher", "meissonic-tiny"])
    bench = benchmarks.load_benchmarks(args, "cpu")["geneval"]
    drawn = [("ring", "red"), ("ring", "blue"), ("ring", "red"), ("ring", "red"), ("square", "red"), ("cross", "red")]
    pictures = [Image.fromarray(render(np.random.default_rng(i), [shape])) for i, shape in enumerate(drawn)]
    bench.lay(f"{tmp_path}/g")
    scores = bench.score(f"{tmp_path}/g", slice(0, 4), pictures[:4]) + bench.score(f"{tmp_path}/g", slice(4, 8), pictures[4:])
    assert scores == [1, 0, 1, 0, 1, 0]
    row = bench.row(torch.tensor(scores))
    assert row["colors"] == pytest.approx(2 / 3) and row["single_object"] == pytest.approx(1 / 3)
    assert [np.array(p).tolist() for _, part in benchmarks.read_geneval(f"{tmp_path}/g") for p in part] == \
        [np.array(p).tolist() for p in pictures]


def test_hps_is_scored_from_the_jpegs_as_written(tmp_path):
    for s in benchmarks.HPS_STYLES:
        (tmp_path / f"{s}.json").write_text(json.dumps([f"{s} number {i}" for i in range(800)]))
    args = ev.flags().parse_args(["--benchmark", "hps", "--metadata", str(tmp_path), "--random_weights",
                                  "--teacher", "maskgen-tiny"])
    bench = benchmarks.load_benchmarks(args, "cpu")["hps"]
    assert len(bench.prompts) == 3200 and bench.prompts[799:801] == ["anime number 799", "concept-art number 0"]
    pixels = np.random.RandomState(0).randint(0, 256, (2, 40, 40, 3)).astype(np.uint8)
    bench.lay(f"{tmp_path}/h")
    scores = bench.score(f"{tmp_path}/h", slice(799, 801), [Image.fromarray(p) for p in pixels])
    model, _ = benchmarks.load_clip(args, "hps", reward.CLIP_H, "cpu")
    for score, path, prompt in zip(scores, ("anime/00799.jpg", "concept-art/00000.jpg"), bench.prompts[799:801]):
        img = torch.from_numpy(np.array(Image.open(f"{tmp_path}/h/{path}"))).permute(2, 0, 1)[None] / 255
        f = model.clip.encode_image(reward.preprocess_longest(img, 32))[0]
        g = model.clip.encode_text(model.tokenize([prompt]))[0]
        assert score.item() == pytest.approx(100 * F.cosine_similarity(f, g, dim=0).item(), abs=1e-3)
    row = bench.row(torch.cat([torch.full((800,), 20.0 + i) for i in range(4)]).double())
    assert (row["hps"], row["anime"], row["photo"], row["hps_version"]) == (21.5, 20, 23, "v2.1")
    assert "v2.1" in row["note"] and "random weights" in row["note"] and row["hps_weights"] == "random"


def test_clip_score_is_the_mean_cosine_of_image_i_and_line_i_on_crops(tmp_path, capsys):
    captions = ["a red ring", "two blue crosses", "a green square above a ring"]
    (tmp_path / "captions.txt").write_text("\n".join(captions) + "\n\n")
    flags = ["--benchmark", "clip", "--metadata", tmp_path / "captions.txt", "--teacher", "maskgen-tiny", "--steps", 1]
    row, = command(tmp_path, *flags, "--batch", 2, "--save_images")
    args = ev.flags().parse_args(["--random_weights"])
    model, cosines = benchmarks.load_clip(args, "clip_g", reward.CLIP_G, "cpu")[0], []
    for i, words in enumerate(captions):
        crop = Image.open(f"{row['folder']}/{i:05d}.png")
        assert crop.size == (256, 256)
        f = model.clip.encode_image(reward.preprocess_pil(crop, 32)[None])[0]
        g = model.clip.encode_text(benchmarks.clip_score_tokens([words]))[0]
        cosines.append(F.cosine_similarity(f, g, dim=0).item())
    assert len(os.listdir(row["folder"])) == 3 and np.ptp(cosines) > 1e-3
    assert row["clip_score"] == pytest.approx(np.mean(cosines), abs=1e-6) and abs(row["clip_score"]) < 1
    assert row["clip_g_weights"] == "random" and "random weights" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    ("--benchmark geneval", "needs --metadata PATH: GenEval's evaluation_metadata.jsonl"),
    ("--benchmark hps --metadata {0}/none", "cannot read .*none/anime.json .*HPDv2's folder `benchmark`, with anime.json"),
    ("--benchmark hps --metadata {0}/short", "short/anime.json: expected a list of 800 strings, got 2 entries"),
    ("--benchmark clip --metadata {0}/gap.txt", "gap.txt: a line amid it is empty; expected a caption on each"),
    ("--benchmark clip --metadata {0}/empty.txt", "--metadata .*empty.txt: no prompt in it"),
    ("--benchmark clip --metadata {0}/ok.txt --teacher maskbit-tiny", "draws prompts, and maskbit-tiny draws classes"),
    ("--benchmark clip --metadata {0}/ok.txt --clip_g_weights {0}/none.pt", "no weights at .*none.pt"),
    ("--benchmark geneval --metadata {0}/ok.txt", "line 1 is no prompt of GenEval"),
    ("--benchmark geneval --metadata {0}/dog.jsonl --detector shapes", "does not know the class 'dog' of 'a dog'; it knows circle"),
    ("--detector shapes", "--detector shapes belongs to --benchmark geneval"),
    ("--benchmark clip --metadata {0}/ok.txt --detector shapes", "--detector shapes belongs to --benchmark geneval"),
    ("--geneval_folder {0}", "is scored here: add --detector mask2former, or shapes"),
    ("--geneval_folder {0}/bare --detector shapes", "bare: no images; expected <index>/samples/<n>.png")])
def test_what_a_benchmark_cannot_read_is_answered_with_a_sentence_before_anything_is_drawn(tmp_path, flags, words):
    for name, text in (("gap.txt", "a\n\nb\n"), ("empty.txt", "\n"), ("ok.txt", "a ring\n"), ("dog.jsonl", json.dumps(
            {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}))):
        (tmp_path / name).write_text(text)
    (tmp_path / "bare").mkdir(), (tmp_path / "short").mkdir()
    (tmp_path / "short" / "anime.json").write_text('["a", "b"]')
    flags = flags.format(tmp_path).split()
    with pytest.raises(UserError, match=words):
        command(tmp_path, *flags, *([] if "--teacher" in flags else ["--teacher", "maskgen-tiny"]))
    assert os.listdir(tmp_path / "out") == []


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


@pytest.fixture(scope="module")
def inception_net(plain):
    return inception.load_inception(plain)


PIXELS = torch.from_numpy(np.random.RandomState(70).randint(0, 256, (2, 3, 5, 7)).astype(np.uint8).repeat(8, 2).repeat(8, 3))


def test_inception_gives_the_golden_maps_features_and_logits(inception_net):
    golden = {"pool1": ([0.04040373117, 0.1376905888, 0.5643054843, 0.0775424093, 0.2483923286], 41.1663048),
              "pool2": ([0.7106261253, 0.2125332654, 0.4897961318, 0.4081763327, 0.4522225857], 155.4851989),
              "Mixed_6e": ([0.7932898998, 0.07295541465, 0.5227518082, 0.03555404767, 0.730756104], 779.5677457),
              "pool3": ([0, 1.36724174, 0.2266804427, 0, 1.30498147], 2801.464567)}
    h = inception_net.scaled(PIXELS.float() / 255)
    for name, layer in inception_net.layers.named_children():
        h = layer(h)
        if name in golden:
            agrees(h.mean((2, 3)), *golden[name], tol=1e-5)
    features, logits = ev.extract(inception_net, PIXELS)
    agrees(features, *golden["pool3"], tol=1e-5)
    agrees(logits, [0.595255971, 2.429360867, -0.2632558644, 0.1663454771, 0.7864996791], 1782.319151, tol=1e-5)
    biased = F.linear(features, inception_net.fc.weight, inception_net.fc.bias)
    agrees(biased, [0.5396906137, 2.346317053], 1788.125319, tol=1e-5)


def test_inception_has_the_published_tensors(inception_net):
    assert sum(p.numel() for p in inception_net.parameters()) == 23_850_960
    file = inception_file()                           # the published keys and shapes, less 94 counts of batches
    listed = "".join(f"{k} {v}\n" for k, v in sorted(file.items()))
    assert len(file) == 566 - 94 and hashlib.sha256(listed.encode()).hexdigest().startswith("a5dab5458935")


def test_both_published_files_and_images_one_by_one_give_the_same_features(inception_net, plain, tmp_path):
    class Published(nn.Module):                       # the parts of NVIDIA's file that are used
        def __init__(self):
            super().__init__()
            self.layers, self.output = inception_net.layers, inception_net.fc

        def forward(self, x):
            return self.output(self.layers(x).flatten(1)).softmax(1)

    x = PIXELS[:1].float() / 255
    torch.jit.save(torch.jit.trace(Published(), inception_net.scaled(x)), tmp_path / "script.pt")
    script = inception.load_inception(str(tmp_path / "script.pt"))
    torch.save(inception_state(), tmp_path / "bare.pth")
    bare = inception.load_inception(str(tmp_path / "bare.pth"))
    assert weights.fingerprint(bare) == weights.fingerprint(inception_net)
    expected = ev.extract(inception_net, PIXELS)
    for got in (ev.extract(script, PIXELS), ev.extract(inception_net, list(PIXELS))):
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(got, expected))
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt: a TorchScript file, but not inception"):
        inception.load_inception(str(tmp_path / "other.pt"))


def test_files_that_are_no_inception_are_refused_and_a_download_that_fails_is_a_sentence(tmp_path, monkeypatch):
    torch.save({k: torch.zeros(v) for k, v in inception_file().items() if "7c" not in k}, tmp_path / "less.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut short")
    for name, words in (("less.pth", "missing .*Mixed_7c"), ("cut.pth", "cannot read"), ("none.pth", "no weights at")):
        with pytest.raises(UserError, match=words):
            inception.load_inception(str(tmp_path / name))
    asked = []

    def fetch(url, path, digest):
        asked.append((url, digest))
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for name in ("plain", "torchscript"):
        with pytest.raises(UserError, match="cannot download https://.* .no network.: fetch it .* by --inception PATH"):
            inception.load_inception(name)
    assert asked[0][1] == "6726825d" and asked[1][0].endswith("/inception-2015-12-05.pt")
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    torch.save(inception_state(), tmp_path / "checkpoints" / os.path.basename(asked[0][0]))
    assert isinstance(inception.load_inception(), inception.Inception)    # what was fetched once is not asked for


def test_the_conventions_of_inception_scores_have_their_names():
    logits = 2.0 * np.random.RandomState(60).standard_normal((300, 40)).astype(np.float32)
    for name, mean in (("is", 3.639085854), ("is_stylegan", 3.618812457)):
        assert ev.inception_score(logits, **ev.IS_CONVENTIONS[name])[0] == pytest.approx(mean, rel=1e-8)
    assert ev.IS_CONVENTIONS["is_adm"] == dict(shuffle=False, split_size=5000)


@pytest.mark.parametrize("mode, abs_sum, row", [
    ("legacy_tensorflow", 65741931.76, [200, 200, 202.8093567, 224, 224, 23, 23, 52, 52, 225, 225, 204.7227478, 84, 84, 114, 114]),
    ("clean", 31562269.13, [200, 200, 198.246521, 224, 224, 23, 23, 53.80029678, 52, 164.2348328, 225, 235.0661316, 84, 84, 114, 114]),
    ("legacy_pytorch", 31569274.19, [200, 200, 200, 224, 224, 23, 23, 52, 52, 159.3291016, 225, 225, 84, 84, 114, 114])])
def test_golden_resizes(mode, abs_sum, row):
    out = inception.resize(PIXELS.float(), mode)
    assert out.shape == (2, 3, 299, 299) and out.dtype == torch.float32
    agrees(out[0, 0, 150, ::19], row, tol=1e-3)
    agrees(out if mode == "legacy_tensorflow" else out[0], [78] * 3, abs_sum)


@pytest.mark.parametrize("H, W", [(256, 256), (512, 375), (3, 299), (1, 700)])
def test_tf1s_bilinear_is_its_definition(H, W):
    img = np.random.RandomState(H).randint(0, 256, (H, W)).astype(np.float64)
    expected = np.zeros((299, 299))
    y, x = np.arange(299) * H / 299, np.arange(299) * W / 299
    for dy in (0, 1):
        for dx in (0, 1):
            i, j = (np.minimum(np.floor(c).astype(int) + d, n - 1) for c, d, n in ((y, dy, H), (x, dx, W)))
            w = np.abs(1 - dy - y % 1)[:, None] * np.abs(1 - dx - x % 1)
            expected += w * img[np.ix_(i, j)]
    got = inception.resize(torch.from_numpy(img).float()[None, None].expand(1, 3, H, W))[0, 2]
    assert np.abs(got.numpy() - expected).max() < 2e-2                        # float32 coordinates: 1e-2 of 255 on noise


def test_bytes_pass_exactly_and_each_resize_has_its_own_normalisation():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 1, 256, 299)
    net = Small("legacy_tensorflow")
    assert torch.equal(every.float() / 255 * 255, every.float())              # a division, not a product with 1 / 255
    white = lambda mode: Small(mode).scaled(torch.ones(1, 1, 9, 9)).flatten()
    for mode, high in (("legacy_tensorflow", 127 / 128), ("clean", 127 / 128), ("legacy_pytorch", 1.0)):
        assert torch.allclose(white(mode), torch.tensor(high), rtol=0, atol=1e-6)
    assert net.scaled(every.float() / 255).shape == (1, 3, 299, 299)          # grey becomes three channels


# ====================================================================== real images: folders, files and processes
class Small(inception.Inception):
    """The extractor's code around a network of no cost: features are mean colours of the four quarters."""

    dim, classes = 12, 5

    def __init__(self, resize=inception.RESIZES[0], crop=False):
        nn.Module.__init__(self)
        self.resize, self.crop = resize, crop
        self.layers, self.fc = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), nn.Linear(12, 5)


@pytest.fixture
def small(monkeypatch):
    for module in (inception, ev):
        monkeypatch.setattr(module, "Inception", Small)
    return inception.load_inception(random_weights=True)


def photos(folder, n=24, shift=0, kind="png"):
    """Pictures of unequal sizes, the third grey, the fourth of 16 bits, one in a subfolder; noise of 0 to 199."""
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


def one_by_one(extractor, folder):
    rows = []
    for where, _, files in os.walk(folder):
        for f in files:
            a = np.array(Image.open(os.path.join(where, f)))
            a = (a >> 8).astype(np.uint8) if a.dtype == np.uint16 else a
            a = np.stack([a] * 3, 2) if a.ndim == 2 else a
            rows.append(ev.extract(extractor, torch.from_numpy(a).permute(2, 0, 1)[None])[0][0])
    return torch.stack(rows).double().numpy()


def test_statistics_of_a_folder_are_those_of_its_images_whatever_their_size_depth_and_order(small, tmp_path):
    folder = photos(tmp_path / "a")
    f = one_by_one(small, folder)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    for batch in (5, 64):
        ref = ev.folder_reference(folder, small, torch.device("cpu"), batch)
        assert np.allclose(ref.mu, f.mean(0), atol=1e-7) and np.allclose(ref.sigma, np.cov(f, rowvar=False), atol=1e-7)
        assert sorted(ref.features.double().sum(1).tolist()) == pytest.approx(sorted(f.sum(1)), abs=1e-5)
    assert ref.name.startswith("a, 24 images, ")
    os.remove(os.path.join(folder, "23.png"))
    other = ev.folder_reference(folder, small, torch.device("cpu"), 5)
    assert other.name.split()[-1] != ref.name.split()[-1]


def test_a_folder_against_itself_and_against_a_shifted_copy(small, tmp_path):
    a, b = photos(tmp_path / "a", 11), photos(tmp_path / "b", 11, shift=50)   # fewer images than features
    ref = ev.folder_reference(a, small, torch.device("cpu"), 4)
    row = lambda folder: ev.evaluate(ev.folder_images(folder, "--fake")[1], torch.arange(11), small, ref, 4)
    assert row(a)["fid"] == pytest.approx(0, abs=1e-6) and row(a)["precision"] == 1
    assert row(b)["fid"] == pytest.approx(12 * (50 / 128) ** 2, rel=1e-4)     # 12 features, each shifted alike
    assert row(b)["fid_eigenvalues"] == pytest.approx(row(b)["fid"], abs=1e-4)


def test_images_that_cannot_be_read_are_counted_named_and_never_left_out(small, tmp_path):
    folder = photos(tmp_path / "a", 12)
    (tmp_path / "a" / "07.png").write_bytes((tmp_path / "a" / "07.png").read_bytes()[:60])
    (tmp_path / "a" / "sub" / "x.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"--real .*a: 2 of 13 images cannot be read: .* first is .*07.png \(\w+"):
        ev.folder_reference(folder, small, torch.device("cpu"), 4)
    for path, words in (("none", "no such folder"), ("a/sub", "statistics need 10 images at least, found 2")):
        with pytest.raises(UserError, match=words):
            ev.folder_images(str(tmp_path / path), "--real")


def test_of_a_large_folder_every_kth_feature_is_kept_and_all_count(small):
    img = torch.randint(0, 256, (23, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    whole = ev.extracted(lambda i, **_: img[i], torch.arange(23), small, batch=4)
    some = ev.extracted(lambda i, **_: img[i], torch.arange(23), small, batch=4, every=5)
    assert torch.equal(some[0], whole[0][::5]) and torch.equal(some[1], whole[1][::5])
    assert np.array_equal(some[2], whole[2]) and np.array_equal(some[3], whole[3])


def test_the_crop_comes_before_the_resize_on_both_sides(small, tmp_path):
    cropped = Small("clean", crop=True)
    pixels = np.random.RandomState(0).randint(0, 256, (300, 411, 3)).astype(np.uint8)
    square = inception.coco_crop(Image.fromarray(pixels))
    expected = (torch.from_numpy(inception.clean_resize(square)).permute(2, 0, 1)[None] - 128) / 128
    assert torch.equal(cropped.scaled(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255), expected)
    drawn = torch.randint(0, 256, (1, 3, 256, 256), generator=torch.Generator().manual_seed(0)).float() / 255
    assert torch.equal(cropped.scaled(drawn), Small("clean").scaled(drawn))   # 256 px are left alone


class Processes:
    """torch.distributed in threads: rank r of `world`, sums and gathers meet at a barrier."""

    def __init__(self, world):
        self.world, self.rank, self.meet, self.table = world, threading.local(), threading.Barrier(world, timeout=20), {}

    is_initialized = lambda self: self.world > 1
    get_rank = lambda self: self.rank.value
    get_world_size = lambda self: self.world
    barrier = lambda self: self.meet.wait()

    def exchange(self, thing):
        self.table[self.get_rank()] = thing
        self.meet.wait()
        everyone = [self.table[r] for r in range(self.world)]
        self.meet.wait()
        return everyone

    def all_reduce(self, t):
        t.copy_(sum(self.exchange(t.clone())))

    def all_gather_object(self, out, thing):
        out[:] = self.exchange(thing)

    def run(self, f):
        results = [None] * self.world

        def work(r):
            self.rank.value = r
            try:
                results[r] = f()
            except UserError as err:
                results[r] = str(err)
        threads = [threading.Thread(target=work, args=(r,)) for r in range(self.world)]
        [t.start() for t in threads], [t.join(60) for t in threads]
        return results


def test_one_two_and_four_processes_give_the_same_numbers_and_the_same_complaint(small, tmp_path, monkeypatch):
    folder, img = photos(tmp_path / "a"), torch.rand(50, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    make = lambda i, generator, **_: ((img[i] + 0.2 * torch.rand(len(i), 3, 9, 9, generator=generator)) * 200).to(torch.uint8)
    whole = None
    for world in (1, 2, 4):
        monkeypatch.setattr(ev, "dist", Processes(world))

        def measured():
            ref = ev.folder_reference(folder, small, torch.device("cpu"), 5)
            return ev.evaluate(make, torch.arange(50), small, ref, 7)
        rows = ev.dist.run(measured)
        whole = whole or rows[0]
        for row in rows:
            assert row["processes"] == world
            assert row["reference"] == whole["reference"]
            for key in ("fid", "fid_eigenvalues", "is", "is_stylegan", "is_adm", "precision", "recall", "density", "coverage"):
                assert row[key] == pytest.approx(whole[key], rel=1e-6), (world, key)
    assert whole["fid"] > 0.01
    (tmp_path / "a" / "20.png").write_bytes(b"broken")
    complaints = ev.dist.run(measured)
    assert len(set(complaints)) == 1 and "1 of 24 images cannot be read" in complaints[0]


class Largest(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return out


def test_no_tensor_of_prdc_outgrows_a_block_or_its_input():
    real, fake = torch.randn(400, 16), torch.randn(1500, 16)
    whole = ev.prdc(real, fake)
    with Largest() as largest:
        assert ev.prdc(real, fake, block_bytes=2**20) == whole
    assert largest.bytes <= 2**20 < 8 * 400 * 1500    # by blocks; all distances would take 5 and 18 MB


# ======================================================================================= the command line and its rows
def adm_like(path, dim=12, n=30, **more):
    f = np.random.RandomState(0).standard_normal((200, dim))
    np.savez(path, mu=f.mean(0), sigma=np.cov(f, rowvar=False), **more)
    return str(path)


def test_a_row_names_everything_that_makes_fids_differ(small, tmp_path, capsys):
    images = np.random.RandomState(0).randint(0, 256, (20, 16, 16, 3)).astype(np.uint8)
    path = adm_like(tmp_path / "ref.npz", arr_0=images)
    with np.load(path) as f:
        digest = weights.fingerprint([f["mu"], f["sigma"]])
    flags = ["--teacher", "maskgit-tiny", "--steps", 1, 2, "--n", 40, "--reference", path, "--batch", 16, "--seed", 3]
    rows = command(tmp_path, *flags, "--resize", "clean", "--save_images")
    classes = SPECS["maskgit-tiny"].classes
    for row, steps in zip(rows, (1, 2)):
        expected = dict(n=40, per_class=40 / classes, seed=3, steps=steps, resize="clean", crop=None, features="fp32",
                        dtype="fp32", inception="random", labels="each class in turn", batch=16, k=3)
        assert {key: row[key] for key in expected} == expected
        assert row["reference"] == f"ref.npz {digest}, neighbours: its 20 images" and "temperature" in row
        assert row["extractor"] == f"Small {weights.fingerprint(Small())}" or row["extractor"].startswith("Small ")
        assert all(np.isfinite(row[key]) for key in ("fid", "is", "is_std", "is_stylegan", "is_adm", "precision", "coverage"))
        assert row["reference"] in row["note"] and ", resize clean, no crop, in float32" in row["note"]
    out = capsys.readouterr().out
    assert "below 10,000, FID is biased" in out and digest in out and "seed 3" in out
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["fid"] for row in table] == [row["fid"] for row in rows] and "| teacher |" in out
    assert (tmp_path / "out" / "table.md").read_text().strip() in out
    folders = sorted((tmp_path / "out" / "images").iterdir())                 # and asked for, every image is on the disk
    assert [len(list(f.iterdir())) for f in folders] == [40, 40]
    again = command(tmp_path, "--fake", folders[0], "--reference", path, "--resize", "clean", "--batch", 16)[-1]
    assert all(again[key] == pytest.approx(rows[0][key], abs=1e-9) for key in ("fid", "is", "precision", "recall"))
    assert again["kind"] == "folder" and again["n"] == 40


def test_only_the_metrics_asked_for_are_computed(small, tmp_path, monkeypatch):
    path = adm_like(tmp_path / "ref.npz", arr_0=np.zeros((20, 8, 8, 3), np.uint8))
    monkeypatch.setattr(ev, "prdc", None), monkeypatch.setattr(ev, "npz_images", None), monkeypatch.setattr(ev, "fid", None)
    row, = command(tmp_path, "--teacher", "maskgit-tiny", "--steps", 1, "--n", 12, "--reference", path, "--metrics", "is")
    assert row["is"] >= 1 and "fid" not in row and "precision" not in row


def test_a_reference_made_from_a_folder_is_kept_and_knows_how(small, tmp_path):
    folder, path = photos(tmp_path / "a"), str(tmp_path / "kept.npz")
    flags = ["--teacher", "maskgit-tiny", "--steps", 1, "--n", 12]
    ev.main(ev.flags().parse_args(["--real", folder, "--crop", "--save_reference", path, "--random_weights", "--out",
                                   f"{tmp_path}/out", "--device", "cpu"]))
    assert os.listdir(tmp_path / "out") == []                                 # nothing was drawn
    kept = command(tmp_path, *flags, "--reference", path, "--crop")[-1]
    made = command(tmp_path, *flags, "--real", folder, "--crop")[-1]
    for key in ("fid", "precision", "recall", "density", "coverage"):
        assert kept[key] == made[key]
    with pytest.raises(UserError, match="was made with resize legacy_tensorflow, coco_crop, and these flags say .*no crop"):
        command(tmp_path, *flags, "--reference", path)


@pytest.mark.parametrize("flags, words", [
    ("--metrics fid --teacher maskgit-tiny", "--metrics fid of maskgit-tiny needs --reference PATH.npz"),
    ("--metrics fid prdc --reference {0}/ref.npz", "--metrics prdc needs real images"),
    ("--reference {0}/none.npz", "none.npz"),
    ("--reference {0}/images.npz", "expected an .npz with mu and sigma"),
    ("--reference {0}/array.npy", "expected an .npz with mu and sigma"),
    ("--reference {0}/weights.pt", "expected an .npz with mu and sigma"),
    ("--reference {0}/wide.npz", "expected mu .12,. and sigma .12, 12., got .14,. and .14, 14.: made with another"),
    ("--reference {0}/nan.npz", "not finite"),
    ("--reference {0}/grey.npz", "expected images, uint8 .n, H, W, 3., in its arr_0, got float64 .4, 8, 8."),
    ("--reference {0}/ref.npz --real {0}", "both the real side: give one"),
    ("--real {0}/none", "--real .*none: no such folder"),
    ("--real {0}", "statistics need 10 images at least, found 0"),
    ("--fake {0}", "--fake belongs to a FID by Inception: add --reference"),
    ("--fake {0} --metrics fid", "--fake belongs to a FID by Inception: add --reference"),
    ("--reconstruction --reference {0}/ref.npz", "add --real FOLDER, what to reconstruct"),
    ("--fake {0}/none --reference {0}/ref.npz", "--fake .*none: no such folder"),
    ("--resize clean", "--resize belongs to a FID by Inception"),
    ("--reference {0}/ref.npz --save_reference x.npz", "add --real FOLDER"),
    ("--reference {0}/ref.npz --inception {0}/none.pth", "no weights at .*none.pth"),
    ("--reference {0}/ref.npz --n 9", "statistics need 10 images at least"),
    ("--reconstruction --teacher maskgit-tiny", "for other images add --real FOLDER"),
    ("--metrics clip geneval --metadata {0}/captions.txt --teacher maskgen-tiny", "a path for each of clip, geneval, in this order"),
    ("--metrics clip --benchmark clip", "short for --metrics clip: give one"),
    ("--metrics fid --metadata {0}/captions.txt", "--metadata .*captions.txt belongs to --benchmark")])
def test_what_a_fid_cannot_be_made_of_is_answered_with_a_sentence_before_anything_is_drawn(small, tmp_path, flags, words):
    adm_like(tmp_path / "ref.npz"), adm_like(tmp_path / "wide.npz", 14), np.save(tmp_path / "array.npy", np.zeros(12))
    adm_like(tmp_path / "grey.npz", arr_0=np.zeros((4, 8, 8)))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "nan.npz", mu=np.full(12, np.nan), sigma=np.eye(12))
    torch.save({"mu": torch.zeros(12)}, tmp_path / "weights.pt")
    (tmp_path / "captions.txt").write_text("a ring\n")
    flags = flags.format(tmp_path).split()
    with pytest.raises(UserError, match=words):
        command(tmp_path, *flags, *([] if "--teacher" in flags else ["--teacher", "maskgit-tiny"]))
    assert os.listdir(tmp_path / "out") == []


def test_imagenet_has_adms_reference_and_50_000_images_unless_told(small, tmp_path, monkeypatch):
    path, asked = adm_like(tmp_path / "adm.npz", arr_0=np.zeros((20, 8, 8, 3), np.uint8)), []
    monkeypatch.setattr(ev, "download", lambda url, digest, flag: path)
    teacher = teachers.load_teacher("maskgit-tiny", random_weights=True)
    teacher = teacher._replace(spec=dataclasses.replace(teacher.spec, name="maskgit", image=(3, 256, 256),
                                                        net={**teacher.spec.net, "classes": 1000}))
    monkeypatch.setattr(ev, "load_teacher", lambda *_, **__: teacher)

    def evaluate(make, labels, extractor, reference, *args, metrics, **kw):
        asked.append((len(labels), labels.bincount().unique().tolist(), reference.name.split()[0], metrics))
        return dict(n=len(labels), fid=7.0, extractor="x", reference=reference.name, seed=0, **extractor.facts)
    monkeypatch.setattr(ev, "evaluate", evaluate)
    monkeypatch.setattr(type(teacher), "conditions", lambda self, prompts=None: torch.arange(1000))
    monkeypatch.setattr(ev, "fixed_sample", lambda *_: torch.zeros(4, 3, 256, 256, dtype=torch.uint8))
    row, = command(tmp_path, "--teacher", "maskgit", "--steps", 8, "--metrics", "fid", "is")
    assert asked == [(50_000, [50], "adm.npz", ("fid", "is"))] and row["per_class"] == 50
    assert row["published"] == [{"of": "8", "table": "Tab.2", "fid": 6.66}]


def test_torchrun_understands_every_flag_of_the_readme():
    """torchrun reads an abbreviation of its own flags even behind the script's name: --n is one, --n_images is none."""
    from torch.distributed.run import parse_args
    line = "--nproc_per_node=4 evaluate.py --ckpt a --metrics fid is prdc --n_images 10 --reference adm --real x --out y"
    assert parse_args(line.split()).training_script == "evaluate.py"
    assert ev.flags().parse_args(["--n_images", "12"]).n == ev.flags().parse_args(["--n", "12"]).n == 12


def test_several_benchmarks_in_one_command_take_their_metadata_in_order(tmp_path, capsys):
    lines = [{"tag": "single_object", "include": [{"class": "square", "count": 1}], "prompt": "a square"}]
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "captions.txt").write_text("a red ring\ntwo crosses\n")
    rows = command(tmp_path, "--teacher", "maskgen-tiny", "--steps", 1, "--metrics", "clip", "geneval", "--per_prompt", 1,
                   "--detector", "shapes", "--metadata", tmp_path / "captions.txt", tmp_path / "meta.jsonl")
    assert [row["n"] for row in rows] == [2, 1] and "clip_score" in rows[0] and "single_object" in rows[1]
    assert [os.path.basename(row["labels"]) for row in rows] == ["captions.txt", "meta.jsonl"]
    assert len(os.listdir(tmp_path / "out" / "geneval")) == 1


def test_reconstruction_of_a_folder_has_the_psnr_of_its_crops_and_a_fid_against_them(small, tmp_path):
    from data.imagenet import centre_crop
    folder = photos(tmp_path / "a", 12)
    row, = command(tmp_path, "--reconstruction", "--teacher", "maskgit-tiny", "--real", folder, "--batch", 5)
    teacher = teachers.load_teacher("maskgit-tiny", random_weights=True)
    spec, error = teacher.spec, 0
    names, make, _ = ev.folder_images(folder, "--real", spec.image)
    for i, name in enumerate(names):
        img = make(torch.tensor([i]))[0]
        if i not in (2, 3):                                                   # the grey ones aside, against Pillow itself
            crop = centre_crop(Image.open(name).convert("RGB"), spec.image[1])
            assert np.array_equal(img.permute(1, 2, 0).numpy(), np.array(crop))
        back = teachers.decode_tokens(teacher.tokenizer, teacher.tokenizer.encode(img[None].float() / 255))
        error += ((back * 255 + spec.rounds / 2).to(torch.uint8).double() - img).square().mean().item()
    assert row["psnr"] == pytest.approx(10 * math.log10(255**2 / (error / 12)), abs=1e-6)
    assert row["fid"] > 0 and row["reference"].startswith("the same 12 images") and row["n"] == 12
    rows = command(tmp_path, "--reconstruction", "--teacher", "maskgen-tiny", "--real", folder, "--reference",
                   adm_like(tmp_path / "r.npz"), "--metrics", "fid")[1:]
    assert [r["model"] for r in rows] == [f"real {folder}", f"{folder} reconstructed"] and rows[0]["fid"] != rows[1]["fid"]


# ================================================================================= sweeps and the paper's own numbers
def student(T, fid, model="student a"):
    return dict(model=model, kind="student", teacher="maskbit", steps=1, temperature=T, n=50_000, fid=fid)


def test_a_sweep_is_a_table_a_checkpoint_and_its_best_stands_in_the_joint_one():
    rows = [student(T, f) for T, f in ((0, 3.1), (0.5, 2.9), (1, 3.0))] + [student(1, 2.0, "student b")]
    text = ev.report(rows + [dict(model="teacher", kind="teacher", steps=8, n=50_000, fid=1.5)])
    sweep, joint = text.split("student a: the best of 3 temperatures is 0.5, FID 2.90")
    assert [line.count("student a") for line in (sweep, joint)] == [3, 1] and "2.90" in joint and "3.00" not in joint
    assert "student b" not in sweep and "student b" in joint and "teacher" in joint
    assert "(argmax), FID 1.00" in ev.report([student(0, 1.0), student(1, 2.0)])
    assert ev.report(rows[:1] + rows[3:]) == ev.table(rows[:1] + rows[3:])    # without a sweep: the table


def test_published_numbers_stand_beside_the_rows_they_belong_to():
    lines = [line.split() for line in ev.PUBLISHED.strip().splitlines()]
    for name, kind, place, *pairs in lines:
        assert name in SPECS and place.startswith("Tab.") and len(pairs) % 2 == 0 and all(map(float, pairs[1::2]))
        assert kind in ("Di[M]O", "Soft-Di[M]O", "longer") or kind.removesuffix("-halton").isdigit()
    assert len({(name, kind) for name, kind, *_ in lines}) == len(lines)
    row = dict(teacher="maskgit", kind="teacher", steps=8, order="confidence", fid=7.0, precision=0.8)
    assert ev.published(row, {}) == [{"of": "8", "table": "Tab.2", "fid": 6.66, "precision": 0.83}]
    assert ev.published(dict(row, order="halton"), {})[0]["fid"] == 7.73 and ev.published(dict(row, steps=7), {}) == []
    row = student(1, 2.0)
    of = lambda **config: [(found["of"], found["fid"]) for found in ev.published(row, config)]
    assert of(recipe="maskbit", gan=True) == [("Soft-Di[M]O", 1.96)] and of(recipe="maskbit", gan=False) == [("Di[M]O", 2.89)]
    assert of(recipe="maskbit-long", gan=True) == [("longer", 1.56)] and [f for _, f in of()] == [2.89, 1.96, 1.56]
    row["published"] = ev.published(row, dict(gan=True))
    text = ev.table([row, dict(student(1, 3.0), teacher="maskbit-tiny")])
    assert "published (the paper's, not measured here)" in text and "Soft-Di[M]O: fid 1.96 (Tab.1)" in text
    assert "published" not in ev.table([student(1, 3.0)])
    text_row = dict(teacher="maskgen", kind="teacher", steps=16, order="confidence", fid=20.0)
    assert ev.published(text_row, {}) == [{"of": "16", "table": "Tab.11-13", "fid_coco": 22.64, "fid_mjhq": 7.59}]
    assert ev.published(dict(teacher="maskgen", kind="student", steps=1, hps=1.0), dict(reward=True))[0]["hps"] == 29.38


# ================================================================================================ data/shapes.py
def test_the_reader_is_right_on_99_of_100_fresh_renderings_of_every_task():
    assert all(share >= 0.99 for share in shapes.accuracy(n=900, seed=11).values())


def test_the_reader_sees_shape_color_and_place_of_what_was_drawn():
    for i, shape in enumerate(shapes.SHAPES):
        for color in shapes.COLORS:
            img = shapes.render(np.random.default_rng([3, i]), [(shape, color)])
            (found,) = shapes.read(img.transpose(2, 0, 1))
            assert found[:2] == (shape, color)
    for k, relation in enumerate(shapes.RELATIONS):
        img = shapes.render(np.random.default_rng([4, k]), [("circle", "red"), ("ring", "blue")], relation)
        boxes = {shape: box for shape, _, box in shapes.read(img.transpose(2, 0, 1))}
        assert relation in benchmarks.relations(boxes["ring"], boxes["circle"])


def test_the_reader_finds_nothing_on_empty_grounds_and_no_shape_in_blobs():
    ground = shapes.render(np.random.default_rng(0), [])
    assert shapes.read(ground.transpose(2, 0, 1)) == []
    bar = np.full((3, 32, 32), 128, np.uint8)
    bar[:, 4:8, 2:28] = np.array([255, 0, 0])[:, None, None]
    assert [found[:2] for found in shapes.read(bar)] == [(None, "red")]


def test_scenes_depend_on_seed_and_place_alone_and_vary():
    a, prompts, metas = shapes.scenes(40, seed=3)
    b = shapes.scenes(20, seed=3)
    assert np.array_equal(a[:20], b[0]) and prompts[:20] == b[1] and not np.array_equal(a[:20], shapes.scenes(20, seed=4)[0])
    same = [shapes.render(np.random.default_rng(i), [("circle", "red")]) for i in range(6)]
    assert len({shapes.read(img.transpose(2, 0, 1))[0][2] for img in same}) >= 5            # place and size
    assert len({int(img[0, 0].mean()) for img in same}) >= 4                                # ground
    assert len({shapes.scenes(1, seed=s)[0].tobytes() for s in range(40)}) == 40
    assert all(meta["prompt"] == prompt for meta, prompt in zip(metas, prompts))


@pytest.mark.parametrize("task", shapes.TASKS)
def test_captions_and_metadata_have_genevals_form(task):
    for i in range(30):
        prompt, meta, objects, relation = shapes.caption(np.random.default_rng(i), task)
        assert benchmarks.parse_metadata(json.dumps(meta), "here") == meta and meta["tag"] == task
        assert sum(clause["count"] for clause in meta["include"]) == len(objects)
        assert all(shape in prompt and (color or "") in prompt for shape, color in objects)
        assert ("exclude" in meta) == (task == "counting") and (relation is not None) == (task == "position")
        if relation:                                              # "A left of B": A is placed, B the target
            assert prompt.index(objects[1][0]) < prompt.index(relation) and meta["include"][1]["class"] == objects[1][0]


def test_a_picture_of_something_else_is_wrong_under_genevals_rules():
    rng = np.random.default_rng(0)
    _, meta, _, _ = shapes.caption(rng, "counting")
    shape, n = meta["include"][0]["class"], meta["include"][0]["count"]
    see = lambda objects: benchmarks.verdict(meta, *shapes.detect(shapes.render(rng, objects).transpose(2, 0, 1)))
    assert see([(shape, "red")] * n)[0]
    other = next(s for s in shapes.SHAPES if s != shape)
    assert "found" in see([(shape, "red")] * (n - 1))[1] and not see([(other, "red")] * n)[0]


def test_a_caption_gone_astray_is_one_of_the_worlds_and_no_picture_of_the_right_one_fulfils_it():
    drawn = [shapes.caption(np.random.default_rng([1, i]), str(np.random.default_rng(i).choice(shapes.MIXED))) for i in range(9000)]
    metas, rng, seen = {prompt: meta for prompt, meta, *_ in drawn}, np.random.default_rng(2), set()
    for prompt, meta, objects, relation in drawn[:500]:
        wrong = shapes.astray(rng, prompt)
        found = shapes.detect(shapes.render(rng, objects, relation).transpose(2, 0, 1))
        if wrong in metas:                                        # else a mixture that was not drawn: there are 7,000
            assert benchmarks.verdict(meta, *found)[0] and not benchmarks.verdict(metas[wrong], *found)[0], (prompt, wrong)
            seen.add(meta["tag"])
        else:
            assert meta["tag"] == "mixture" or "and" in wrong and len(wrong.split()) == 7, wrong
        assert set(wrong.split()) <= set(shapes.WORDS) and " a orange" not in f" {wrong}"
    assert seen == set(shapes.MIXED)


def test_a_spoiled_picture_has_patches_of_another_and_half_of_the_pictures_blends_of_both():
    torch.manual_seed(0)
    x = torch.arange(64 * 200).view(200, 64).float()              # every patch of every picture says where it is from
    out = shapes.spoiled(torch.stack([x, torch.zeros_like(x)], -1))
    changed = out[..., 0] != x
    share = changed.float().mean(1)
    assert (share == 0).float().mean() < 0.05 and share.max() < 0.7 and 0.08 < share.mean() < 0.25 and (out[..., 1] == 0).all()
    hard = ((out[..., 0] == out[..., 0].round()) | ~changed).all(1)
    assert 0.35 < hard.float().mean() < 0.65
    donor, own = (out[..., 0][hard] / 64).floor(), torch.arange(200)[hard, None]
    assert torch.equal(donor, torch.where(changed[hard], (own - 1) % 200, own).float())


@pytest.mark.parametrize("touching", [False, True])
def test_objects_are_a_unit_apart_or_touch(touching):
    def gap(a, b):                                    # of two boxes, pixels; negative where they overlap
        return max(max(a[i] - b[i] - b[2], b[i] - a[i] - a[2]) for i in (0, 1))
    for i in range(60):
        n, relation = 2 + i % 3, "above" if i % 3 == 0 else None
        boxes = shapes.place(np.random.default_rng(i), n, relation, touching)
        nearest = [min(gap(b, a) for a in boxes[:k]) for k, b in enumerate(boxes) if k]
        assert len(boxes) == n and (set(nearest) == {0} if touching else min(nearest) >= shapes.UNIT)
        if relation:
            assert boxes[1][1] + boxes[1][2] <= boxes[0][1]


def test_other_pictures_of_a_caption_fit_it_too_unless_objects_touch():
    img, prompts, metas = shapes.scenes(120, seed=31)
    touching, same, _ = shapes.scenes(120, seed=31, touching=True)
    twin, again, _ = shapes.scenes(120, seed=31, again=1)
    several = (img != touching).any((1, 2, 3))
    assert prompts == same and all(s == (m["tag"] not in ("single_object", "colors")) for s, m in zip(several, metas))
    right = lambda img: np.array([benchmarks.verdict(m, *shapes.detect(i))[0] for m, i in zip(metas, img)])
    assert right(img).all() and right(touching)[several].mean() < 0.5
    assert again == prompts and right(twin).all() and (img != twin).any((1, 2, 3)).all()        # the same, drawn anew


def test_the_grid_code_tells_columns_in_its_first_half_and_rows_in_the_second_by_their_distance():
    code = shapes.grid_code(8, 64).view(8, 8, 2, 32)              # (row, column, column's or row's, 32)
    assert torch.equal(code[0, :, 0], code[5, :, 0]) and torch.equal(code[:, 0, 1], code[:, 5, 1])
    turn = 2 * math.pi / 8 * 2 ** torch.linspace(-3, 1, 16)       # an eighth of a turn over the picture to two
    far = (torch.arange(8)[:, None] - torch.arange(8)).float()
    expected = 0.25 * (far[..., None] * turn).cos().sum(-1)
    assert close(code[0, :, 0] @ code[0, :, 0].T, expected) and close(code[:, 0, 1] @ code[:, 0, 1].T, expected)


def test_alike_is_the_share_of_equal_tokens_over_all_pairs_of_pictures_of_a_prompt():
    got = shapes.alike("assets/shapes/theta0.safetensors", n=2, times=3, seed=4)
    teacher, net, _ = teachers.load_student("assets/shapes/theta0.safetensors", "meissonic-tiny")
    torch.manual_seed(4)
    rows = teacher.conditions([p for p in shapes.benchmark(2, 4)[0] for _ in range(3)])
    x = teacher.tokenizer.encode(ev.generate_student(teacher, net, rows, **teacher.spec.student).float() / 255)
    pairs = [(a, b) for first in (0, 3) for a in range(first, first + 3) for b in range(first, a)]
    assert 0 < got < 1 and abs(got - sum((x[a] == x[b]).double().mean().item() for a, b in pairs) / len(pairs)) < 1e-6


def test_a_judge_of_two_captions_and_of_two_pictures_learns_by_imagerewards_loss():
    torch.manual_seed(0)
    model = reward.ImageReward(wordpiece=reward.WordPiece(f"{ROOT}/assets/shapes/words.txt"), **teachers.SHAPES_REWARD)
    good, worse = (torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8) for _ in range(2))
    ids, *wrong = (model.tokenize(p) for p in (["a ring", "two rings", "a red cross"], ["a circle", "four rings", "a blue cross"],
                                               ["a cross", "two squares", "a red ring"]))
    wrong = torch.stack(wrong)                                    # (2, 3, S)
    assert 1 not in ids                                           # [UNK]
    loss, log = shapes.judge_loss(model, good, worse, ids, wrong)
    raw = lambda img, ids: model(reward.preprocess(img.float() / 255, 32), ids) * model.STD + model.MEAN
    r, w, s = raw(good, ids), torch.stack([raw(good, ids) for ids in wrong]), raw(worse, ids)
    ranks = -(r - w).sigmoid().log().mean() - (r - s).sigmoid().log().mean()
    assert close(loss, ranks + 1e-3 * (r.square().mean() + w.square().mean() + s.square().mean()))
    assert close(log["caption"], (r > w).float().mean()) and close(log["picture"], (r > s).float().mean())


def test_the_shipped_imagereward_prefers_the_right_caption_and_the_sound_picture():
    torch.manual_seed(0)
    right = shapes.judged(400, seed=21)["imagereward"]
    assert min(right["color"], right["shape"], right["number"]) > 0.9 and min(right["order"], right["place"]) > 0.75
    assert right["touching"] > 0.6 and 0.3 < right["taste"] < 0.7   # of touching pictures a third have a gap all the same
    img, prompts, _ = shapes.scenes(200, seed=21)
    teacher = load_teacher("meissonic-tiny")
    score = lambda img, prompts: reward.load_judges(teacher.spec, {"imagereward": 1.0})(img, prompts)["imagereward"]
    e = se.embed_tokens(teacher.tokenizer.encode(torch.from_numpy(img).float() / 255), *teacher.tokenizer.tables())
    sound, broken = (teacher.tokenizer.decode(h) for h in (e, shapes.spoiled(e)))
    assert (score(sound, prompts) > score(broken, prompts)).float().mean() > 0.85


# ----------------------------------------------------------------------------------- rewards in training
def shapes_run(folder, **kw):
    given = {**dict(teacher="meissonic-tiny", random_weights=True, device="cpu", dtype="fp32", batch=4, steps=2, warmup=0,
                    save_every=1, log_every=1, eval_every=0, reward=True, reward_start=0, student_start=0,
                    init_from="teacher", out=folder), **kw}
    c = train.settle(given, train.flags()[1])
    train.train(c)
    return torch.load(f"{c.out}/ckpt.pt", weights_only=True), [json.loads(line) for line in open(f"{c.out}/log.jsonl")]


def test_reward_training_resumes_to_the_bit_whatever_the_chunks_and_logs_score_and_gradient(tmp_path):
    whole, log = shapes_run(f"{tmp_path}/whole", reward_chunk=2)
    shapes_run(f"{tmp_path}/cut", reward_chunk=2, steps=1)
    cut, _ = shapes_run(f"{tmp_path}/cut", reward_chunk=2, resume=True)
    assert all(same(whole[k], cut[k]) for k in NETS if k in whole)
    assert log[0]["grad_reward"] > 0 and log[0]["grad_dimo"] > 0 and "clip" in log[0]
    _, again = shapes_run(f"{tmp_path}/chunked", reward_chunk=4)
    assert again[0]["grad_reward"] == pytest.approx(log[0]["grad_reward"], rel=1e-3)


def test_the_shipped_teacher_draws_what_it_is_told_in_many_steps_and_not_in_one():
    teacher = load_teacher("meissonic-tiny")
    judge = ev.load_judge(teacher)
    many, one = (judge(functools.partial(ev.generate_teacher, teacher, steps=N), 60, batch=60) for N in (16, 1))
    assert many["geneval"] > 0.5 > 0.3 > one["geneval"] and many["clip"] > 15 > 5 > one["clip"]
    student = copy.deepcopy(teacher.net)
    weights.load_state(student, weights.read_weights(f"{ROOT}/assets/shapes/theta0.safetensors"), "theta0")
    row = judge(functools.partial(ev.generate_student, teacher, student, **{k: SPECS["meissonic-tiny"].student[k] for k in
                                                                           ("init_ratio", "noise")}), 60, batch=60)
    assert row["clip"] > 10 and row["chroma"] < 0.2 < one["chroma"]                           # no crumbs


def test_reward_without_a_text_teacher_is_refused(tmp_path):
    with pytest.raises(UserError, match="--reward judges pictures by their prompts, and maskbit-tiny draws classes"):
        train.settle(dict(teacher="maskbit-tiny", reward=True, out=f"{tmp_path}/x"), train.flags()[1])
    done = subprocess.run([sys.executable, "train.py", "--teacher", "meissonic-tiny", "--reward", "--rewards", "beauty=1"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown reward 'beauty'" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Speed: nothing waits, nothing breaks the graph, and a student leaves as one file.
def test_an_update_that_is_not_finite_changes_nothing_and_the_host_does_not_look():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = torch.optim.Adam([p], 0.1, fused=True)
    for g, inf in ((1.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, 0.0)):
        before, state = p.detach().clone(), {k: v.clone() for k, v in opt.state[p].items()}
        p.grad = torch.full((2,), g)
        norm, found = train.update(opt, [p], 1.0, 0.1)
        assert found.item() == inf and bool(torch.isfinite(norm)) == (inf == 0) and p.grad is None
        assert torch.equal(p.detach(), before) == (inf == 1)
        assert inf == 0 or all(torch.equal(opt.state[p][k], v) for k, v in state.items())
    assert opt.state[p]["step"] == 2


def test_exported_students_draw_the_same_images_without_this_repository(tmp_path):
    start, expected = dict(init_ratio=0.6, noise=0.1, temperature=1.0), {}
    for name in ("maskbit-tiny", "meissonic-tiny", "maskgen-tiny"):
        teacher = load_teacher(name, random_weights=True)
        ev.export(teacher, teacher.net, f"{tmp_path}/{name}.pt2", **start)
        rows = teacher.conditions(["a cat", "two dogs", "a cup"] if teacher.text else None)[:3]
        expected[name] = ev.generate_student(teacher, teacher.net, rows, generator=torch.Generator().manual_seed(5), **start)
        torch.save(rows, f"{tmp_path}/{name}.rows")
    code = ("import torch\n"
            f"for name in {list(expected)}:\n"
            "    rows = torch.load(f'{name}.rows'); torch.manual_seed(5)\n"
            "    torch.save(torch.export.load(f'{name}.pt2').module()(rows), f'{name}.img')")
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    for name, img in expected.items():
        assert torch.equal(torch.load(f"{tmp_path}/{name}.img"), img), name


def test_the_four_lines_of_the_readme_draw_from_a_checkpoint_and_the_command_exports_it(tmp_path, capsys):
    state = run(tmp_path, teacher="maskbit-tiny", recipe=None, steps=1, out=f"{tmp_path}/run", batch=4, random_weights=True,
                init_from="teacher", data="assets/fashion/tokens.npz", eval_every=0, head_width=16, head_mlp=16)
    with open(os.path.join(ROOT, "README.md")) as f:
        lines = re.search(r"```python\n(.*?)```", f.read(), re.S).group(1)
    assert len(lines.splitlines()) == 4
    known = {}
    exec(lines.replace("out/run/ckpt.pt", f"{tmp_path}/run/ckpt.pt"), known)
    assert known["images"].shape == (8, 1, 32, 32) and known["images"].dtype == torch.uint8
    assert known["start"] == {k: state["config"][k] for k in ("init_ratio", "noise", "temperature")}
    ask = lambda *more: ev.main(ev.flags().parse_args(["--out", f"{tmp_path}/e", "--device", "cpu", *more]))
    ask("--ckpt", f"{tmp_path}/run/ckpt.pt", "--export", f"{tmp_path}/student.pt2")
    torch.manual_seed(3)
    img = torch.export.load(f"{tmp_path}/student.pt2").module()(torch.arange(5))
    drawn = ev.generate_student(known["teacher"], known["net"], torch.arange(5), generator=torch.Generator().manual_seed(3),
                                **known["start"])
    assert torch.equal(img, drawn)
    with pytest.raises(UserError, match="--export .*none/x: cannot write there"):
        ask("--ckpt", f"{tmp_path}/run/ckpt.pt", "--export", f"{tmp_path}/none/x")
    with pytest.raises(UserError, match="writes one student"):
        ask("--export", f"{tmp_path}/x")


def test_a_profile_adds_up_and_writes_nothing(tmp_path, capsys):
    out = f"{tmp_path}/out"
    c = train.settle(dict(teacher="maskbit-tiny", gan=True, profile=2, batch=4, device="cpu", dtype="fp32", out=out),
                     train.flags()[1])
    row = train.train(c)
    assert sum(row["phases"].values()) == pytest.approx(row["ms"]) and not os.path.exists(out)
    assert row["share_of_ceiling"] == pytest.approx(row["tflop_per_s"] / row["ceiling_tflop_per_s"])
    B = 4
    linear = lambda m: sum(p.numel() for p in m.parameters() if p.ndim == 2)
    assert row["tflop"] * 1e12 > 12 * 2 * B * 64 * linear(load_teacher("maskbit-tiny").net.blocks)     # 12 passes or more
    assert 0 < row["not_matmul"] < 1 and "passes" in capsys.readouterr().out


def test_compiled_networks_have_no_graph_breaks_and_are_compiled_once(tmp_path, monkeypatch):
    from torch._dynamo.testing import CompileCounter
    frames = []
    for steps in (3, 6):
        torch._dynamo.reset()
        counter = CompileCounter()
        monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: self._set(counter, kw), raising=True)
        monkeypatch.setattr(nn.Module, "_set", lambda self, backend, kw: setattr(
            self, "_compiled_call_impl", torch.compile(self._call_impl, backend=backend, fullgraph=True, **kw)), raising=False)
        run(tmp_path, steps=steps, compile=True, overwrite=True, feature_noise=0.1, dtype="bf16")
        frames.append(counter.frame_count)
    # student; auxiliary in Eq. 2, in Eq. 1; teacher guided, for Eq. 8, for Eq. 7; heads for Eq. 8, for Eq. 7
    assert frames == [8, 8]


def test_the_host_reads_nothing_of_the_device_between_log_lines(tmp_path, monkeypatch):
    """On a GPU each such read waits for all that is queued. CPU tensors have the same calls, so they are counted here."""
    reads = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
                                        torch.ops.aten.equal, torch.ops.aten.is_nonzero):
                reads.append(str(func))
            return func(*args, **(kwargs or {}))
    true = train.draw_step

    def draw_step(c, step, *args):
        reads.append(step)
        return true(c, step, *args)
    monkeypatch.setattr(train, "draw_step", draw_step)
    with Count():
        run(tmp_path, steps=5, log_every=5, save_every=5, accum=2)
    between = reads[reads.index(0) : len(reads) - reads[::-1].index(4)]                # the last step logs, saves
    assert between == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert "aten._local_scalar_dense.default" in reads[len(between):]


# ---------------------------------------------------------------------------------------------------------------------
# Runs that survive. KILLS=20 pytest test_all.py -k kill is the long form.
KILLS = int(os.environ.get("KILLS", 0))
STEPS = 12 * KILLS or 30
SHORT_RUN = (f"--teacher maskbit-tiny --random_weights --init_from teacher --gan --steps {STEPS} --batch 4 --head_width 16 --head_mlp 16 "
             "--student_start 3 --eval_every 0 --save_every 3 --log_every 1 --dropout 0.1 --device cpu").split()


def end_of(out):
    """What a run came to: networks, optimisers, and its log but for the clock."""
    ckpt = torch.load(f"{out}/ckpt.pt", weights_only=True)
    rows = [json.loads(line) for line in open(f"{out}/log.jsonl")]
    return {k: ckpt[k] for k in NETS}, [{k: v for k, v in row.items() if k != "img_s"} for row in rows]


def lines(path):
    return sum(1 for _ in open(path)) if os.path.exists(path) else 0


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    command = lambda out: [sys.executable, "train.py", *SHORT_RUN, "--out", f"{tmp_path}/{out}"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    whole = subprocess.Popen(command("whole"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    draw, killed, log = np.random.default_rng(0), 0, f"{tmp_path}/cut/log.jsonl"
    while True:
        more = ["--resume"] * os.path.exists(f"{tmp_path}/cut/ckpt.pt")
        process, before = subprocess.Popen(command("cut") + (more or ["--overwrite"]), cwd=ROOT, stdout=subprocess.DEVNULL,
                                           stderr=subprocess.DEVNULL, env=env), lines(log)
        if killed < (KILLS or 2):
            while process.poll() is None and lines(log) <= min(before, STEPS - 1):   # a step further, then any moment
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.6))
            process.kill()
            killed += 1
        if process.wait() == 0:
            break
        assert process.returncode == -9
    assert whole.wait() == 0
    assert same(end_of(f"{tmp_path}/whole"), end_of(f"{tmp_path}/cut"))


def test_two_processes_of_which_one_is_killed_go_on_by_themselves_and_end_the_same(tmp_path):
    def start(out):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                   f"--max-restarts={KILLS or 1}", "train.py", *SHORT_RUN, "--out", f"{tmp_path}/{out}"]
        return subprocess.Popen(command, cwd=ROOT, stdout=open(f"{tmp_path}/{out}.txt", "w"), stderr=subprocess.STDOUT,
                                env=dict(os.environ, OMP_NUM_THREADS="1"))

    def ended(process, out):
        assert process.wait(120) == 0, open(f"{tmp_path}/{out}.txt").read()[-3000:]
    ended(start("whole"), "whole")
    draw, log, process = np.random.default_rng(1), f"{tmp_path}/cut/log.jsonl", start("cut")
    for _ in range(KILLS or 1):
        before = lines(log)
        while process.poll() is None and lines(log) <= before + 2:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.6))
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        if workers and process.poll() is None:
            os.kill(int(workers[draw.integers(len(workers))]), 9)
    ended(process, "cut")
    assert same(end_of(f"{tmp_path}/whole"), end_of(f"{tmp_path}/cut"))


def test_a_run_whose_peer_dies_ends_with_a_sentence_within_seconds(tmp_path):
    """Without torchrun, which would stop it: two processes, one is killed, the other says so."""
    port, start = 29547, time.time()
    peers = [subprocess.Popen([sys.executable, "train.py", *SHORT_RUN, "--steps", "4000", "--out", f"{tmp_path}/out"], cwd=ROOT,
                              stdout=subprocess.DEVNULL, stderr=open(f"{tmp_path}/{rank}.txt", "w"),
                              env=dict(os.environ, OMP_NUM_THREADS="1", WORLD_SIZE="2", RANK=str(rank), MASTER_ADDR="localhost",
                                       MASTER_PORT=str(port))) for rank in range(2)]
    while not os.path.exists(f"{tmp_path}/out/ckpt.pt") and all(p.poll() is None for p in peers) and time.time() < start + 90:
        time.sleep(0.05)
    peers[1].kill()
    assert peers[0].wait(60) == 3
    said = open(f"{tmp_path}/0.txt").read()
    assert "train.py: another process is gone" in said and "--resume" in said and "Traceback" not in said


def test_sharded_optimisers_make_the_same_run_and_checkpoints_for_any_number_of_processes(tmp_path):
    whole = run(tmp_path, out=f"{tmp_path}/whole")
    zero = dict(out=f"{tmp_path}/zero", zero=True)
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), 29533, dict(zero, steps=4), dict(zero, resume=True)), nprocs=2)
    two = torch.load(f"{tmp_path}/zero/ckpt.pt", weights_only=True)
    for k in ("student", "aux", "disc", "ema"):
        assert all(torch.allclose(whole[k][n], two[k][n], atol=2e-5) for n in whole[k]), k
    state = lambda ckpt: [s["exp_avg"] for k in ("student", "aux", "disc") for s in ckpt["optimizers"][k]["state"].values()]
    assert len(state(two)) == len(state(whole)) > 0
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(state(whole), state(two)))
    on = run(tmp_path, out=f"{tmp_path}/zero", resume=True, steps=8)             # by one process, not sharded
    assert on["step"] == 8 and all(torch.isfinite(t).all() for t in on["student"].values())
    with pytest.raises(UserError, match="--zero shards the state of adam and adamw"):
        nano_run(tmp_path, zero=True, optimizer="muon")


def test_damaged_data_and_checkpoints_of_other_versions_are_answered_with_a_sentence(tmp_path, monkeypatch, capsys):
    data = other_world(f"{tmp_path}/data", "maskgit-tiny")
    settle = lambda **kw: train.settle(dict(teacher="maskgit-tiny", random_weights=True, gan=True, data=data, device="cpu",
                                            out=f"{tmp_path}/o", **kw), train.flags()[1])
    x, whole = np.load(f"{data}/tokens.npy"), open(f"{data}/tokens.npy", "rb").read()
    for content, words in ((x.astype(np.float32) * np.nan, "expected integers, got tokens of float32"),
                           (np.where(np.arange(len(x))[:, None, None] == 3, 200, x).astype(np.uint8), "a token 200 .* below 64")):
        np.save(f"{data}/tokens.npy", content)
        with pytest.raises(UserError, match=words):
            train.train(settle(steps=6, overwrite=True))
    with open(f"{data}/tokens.npy", "wb") as f:
        f.write(whole[:-100])                                              # cut short
    with pytest.raises(UserError, match="cannot read real tokens"):
        train.train(settle())
    other = {**run(tmp_path, steps=2), "format": 0}
    torch.save(other, f"{tmp_path}/run/ckpt.pt")
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", f"{tmp_path}/run", "--resume"])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2 and "another version of train.py (format 0, here 1)" in capsys.readouterr().err


def test_a_resumed_run_writes_where_the_flags_say_and_not_where_the_checkpoint_does(tmp_path, monkeypatch):
    state = run(tmp_path, steps=2, out=f"{tmp_path}/out/run")
    state["config"].update(out=f"{tmp_path}/elsewhere", text_cache=f"{tmp_path}/cache", steps=3)
    torch.save(state, f"{tmp_path}/out/run/ckpt.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume"])              # --out has its default, out/run
    train.main()
    assert torch.load(f"{tmp_path}/out/run/ckpt.pt", weights_only=True)["step"] == 3
    assert not os.path.exists(f"{tmp_path}/elsewhere") and not os.path.exists(f"{tmp_path}/cache")


def test_without_a_compiler_the_way_out_is_named(tmp_path):
    done = subprocess.run([sys.executable, "train.py", *SHORT_RUN, "--compile", "--out", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, env=dict(os.environ, CXX="/bin/false", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "train.py: --compile failed" in done.stderr and "--no-compile" in done.stderr


def test_a_new_run_in_an_old_folder_leaves_no_older_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    run(tmp_path, steps=4)
    monkeypatch.setattr(train, "draw_step", lambda *_: 1 / 0)               # dies before its first checkpoint
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, overwrite=True)
    assert not os.path.exists(f"{tmp_path}/run/ckpt.pt")


FUZZ = int(os.environ.get("FUZZ", 8))


@pytest.mark.parametrize("script", ["train", "evaluate", "tteo", "teachers"])
def test_whatever_the_flags_the_answer_is_a_result_or_a_sentence(script, tmp_path, monkeypatch, capsys):
    """FUZZ=200 pytest test_all.py -k whatever is the long form."""
    module, draw = dict(train=train, evaluate=ev, tteo=tteo, teachers=teachers)[script], np.random.default_rng(FUZZ)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "text").write_text("a cat\n")
    numbers, words = ["-1", "0", "-7", "x", "1.5", "", "nan", "inf", "1e300", "3"], ["", "nope", "/dev/null", "..", "🙂", "\x01",
        "a" * 300, *(f"{tmp_path}/{name}" for name in ("binary", "text", "none"))]
    base = dict(train="--random_weights --init_from teacher --steps 2 --batch 4 --head_width 16 --head_mlp 16 --eval_every 0 "
                      "--student_start 0 --log_every 1 --device cpu --teacher",
                evaluate="--random_weights --steps 1 --n 8 --device cpu --teacher",
                tteo="--ckpt assets/shapes/theta0.safetensors --starts 2 --iterations 1 --device cpu --prompt cat --teacher",
                teachers="--random_weights --device cpu --check")[script]
    parser = train.flags()[0] if script == "train" else module.flags()
    flags = [a for a in parser._actions if a.option_strings and a.dest not in ("help", "real", "n")]

    def word(a):
        pool = [*map(str, a.choices), "nope"] if a.choices else words if a.type in (None, str) else numbers
        return pool[draw.integers(len(pool))]
    for i in range(FUZZ):
        names = ["maskgen-tiny", "meissonic-tiny", "maskbit-tiny", "nope"]
        argv = [*base.split(), names[draw.integers(4)]] + ["--nonsense"] * (draw.random() < 0.1)
        argv += ["--out", f"{tmp_path}/{i}"] * (script != "teachers")
        for a in draw.choice(flags, draw.integers(1, 4), replace=False):
            argv += [a.option_strings[0], *(word(a) for _ in range(0 if a.nargs == 0 else a.nargs if isinstance(a.nargs, int) else 1))]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
        monkeypatch.chdir(tmp_path)
        try:
            if script == "train":
                train.main()
            else:
                getattr(module, "main", teachers.check)(parser.parse_args())
        except (SystemExit, UserError) as end:
            assert isinstance(end, UserError) or end.code == 2, argv
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err, argv
