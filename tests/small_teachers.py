"""What tests of the four teachers share: small networks on seeded weights, a sampler's trace."""

import functools

import numpy as np
import pytest
import torch

import soft_embed as se
import teachers
from networks import samplers
from networks.autoencoders import VQTokenizer
from networks.text import TextTower
from networks.titok import TATiTok
from tests.common import (
    MASKGEN,
    MASKGIT,
    MEISSONIC,
    TITOK,
    clip_file,
    filled,
    maskgen_file,
    maskgit_file,
    meissonic_file,
    titok_file,
    vqgan_file,
    vqvae_file,
)


def f32(array):
    return torch.from_numpy(np.asarray(array, dtype=np.float32))


def first_position_last(z):
    """Logits (B, L, 1, V) as the golden numbers of Meissonic have them, (B, V, L)."""
    return z[:, :, 0].transpose(1, 2)


def traced_sample(net, cond, plan, uniforms=None, draw=None, **options):
    """The sampler's tokens, and a list of those that entered each step.

    uniforms: a pair per step, for the draw and for the noise on the confidence. draw takes the
    place of sample_tokens(z, temperature, u).
    """
    trace = []

    def embed(x, E, bias):
        trace.append(x)
        return se.embed_tokens(x, E, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "embed_tokens", embed)
        if draw is not None:
            patch.setattr(samplers, "sample_tokens", draw)
        if uniforms is not None:
            pairs = iter(uniforms)
            options["rand"] = lambda *shape, device: next(pairs)
        x = samplers.sample(net, cond, plan, **options)
    return x, trace


def count_masks(trace, V):
    """Masked units of each sample at each step: lists of B numbers."""
    return [(x == V).sum((1, 2)).tolist() for x in trace]


class Calls:
    """Forward hooks that note which of some modules ran, and what they gave."""

    def __init__(self, modules):
        self.numbers, self.outputs = [], []
        self.handles = [
            module.register_forward_hook(functools.partial(self.note, i))
            for i, module in enumerate(modules)
        ]

    def note(self, i, module, args, output):
        self.numbers.append(i)
        self.outputs.append(output)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


# ------------------------------------------------------------------------------------- MaskGit
@functools.cache
def small_maskgit():
    return filled(teachers.MaskGit, maskgit_file, **MASKGIT)


@functools.cache
def small_vqgan():
    sizes = dict(widths=(32, 32, 64), latent=16, embed=8, V=24, attention=(2,))
    return filled(VQTokenizer, vqgan_file, **sizes)


# ----------------------------------------------------------------------------------- Meissonic
@functools.cache
def small_meissonic(grid=(8, 12)):
    return filled(teachers.Meissonic, meissonic_file, grid=grid, **MEISSONIC)


@functools.cache
def small_vqvae():
    sizes = dict(widths=(16, 32, 32, 48, 64), latent=8, embed=8, V=64, attention=())
    more = dict(signed=False, norm_groups=8, grid=(4, 6))
    return filled(VQTokenizer, vqvae_file, **sizes, **more)


@functools.cache
def small_tower():
    sizes = dict(width=48, heads=4, depth=3, out=64, vocab=100, context=9)
    return filled(TextTower, clip_file, **sizes)


# ------------------------------------------------------------------------------------- MaskGen
@functools.cache
def small_maskgen():
    return filled(teachers.MaskGen, maskgen_file, **MASKGEN)


@functools.cache
def small_titok():
    return filled(TATiTok, titok_file, **TITOK)
