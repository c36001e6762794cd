"""What several test files share: seeded weights, comparisons, small networks.

Expected numbers ("golden") stand in tests/golden/*.json. They were measured on public
implementations, at small sizes and on weights that `seeded` makes from names and shapes alone: so
two programs are compared without a download. The names and shapes in the published files are in
tests/published_files.py.
"""

import functools
import hashlib
import inspect
import json
import math
import pathlib
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import reward
import soft_embed as se
import teachers
from data.tokens import load_tokens
from machinery.errors import UserError
from networks import autoencoders, blip, inception, titok, weights
from networks import clip as clip_net
from networks import text as text_net
from networks.autoencoders import BitTokenizer
from teachers import MaskBit, Spec, load_teacher
from tests.published_files import (clip_file, clip_reward_file, generator_file, imagereward_file,
                                   maskgen_file, maskgit_file, meissonic_file,
                                   open_clip_file,  # noqa: F401  (tests import them from here)
                                   pickscore_file, titok_file, tokenizer_file, vqgan_file,
                                   vqvae_file)


# --------------------------------------------------------------------------------------
# Comparing
# --------------------------------------------------------------------------------------
def golden(name):
    """The numbers in tests/golden/NAME.json; its "source" says which program returned them."""
    path = pathlib.Path(__file__).parent / "golden" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def agrees(t, first, abs_sum=None, tol=5e-5, sum_tol=1e-6):
    """Assert the first entries of t within tol, and the sum of all absolute values within sum_tol
    of its size.

    Where the tolerances come from: two float32 programs that add in different orders differ by a
    few units in the seventh digit per layer. Over all golden tests that is at most 6e-6 for entries
    around 1, and 4e-7 for sums, in which errors cancel. 5e-5 leaves room for the kernels of another
    CPU, and is still far below what a wrong constant or formula does (1e-3 and more). Where tol is
    given, the numbers are small or the computation short, and it is as tight as that allows.
    Gradients of a divergence are differences of two softmaxes that nearly agree, so a digit is
    lost, and their sums get sum_tol=5e-6: 1.1e-6 was seen with AVX2 alone.
    """
    t = t.detach().double().flatten()
    error = (t[: len(first)] - torch.tensor(first, dtype=torch.float64)).abs().max()
    assert error < tol, f"first entries {t[: len(first)].tolist()} are {error:.1e} off"
    if abs_sum is not None:
        total = t.abs().sum()
        assert abs(total / abs_sum - 1) < sum_tol, f"abs sum {total:.9g}, expected {abs_sum}"


def close(a, b, atol=1e-6):
    """Equal within some roundings of a float32 around 1: for one sum, computed in two ways."""
    return torch.allclose(a, b, rtol=0, atol=atol)


def same_psnr(a, b):
    """Equal PSNRs in dB, where the same uint8 images were computed in batches of other sizes.

    Another batch size is another order of sums, and which one depends on the CPU. A value that
    stands close to the edge between two bytes may then fall on the other side. Among 12 images of
    32x32, 36,864 values with errors around 80, one such step moves the sum of squares by 2 x 80,
    and the PSNR by 3e-6 dB. 1e-4 is thirty of them; a wrong divisor or a lost image is 0.1 dB.
    """
    return abs(a - b) < 1e-4


def fingerprint(shapes):
    """SHA-256 of names and shapes, whatever their order."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def refusal(module, state, source="some.bin"):
    """The sentence with which a file is refused; the module stays as it was."""
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(UserError) as err:
        weights.load_state(module, state, source)
    for name, t in module.state_dict().items():
        assert torch.equal(t, before[name]), "nothing is half loaded"
    return str(err.value)


# --------------------------------------------------------------------------------------
# Random numbers that are the same everywhere
# --------------------------------------------------------------------------------------
def seeded(shapes, seed=0):
    """Tensors for {name: shape}: normal noise, seeded by the name, its scale by the role.

    Matrices, tables and kernels get fan-in scaling, gains are around 1, biases around 0. numpy
    promises that RandomState's streams never change.
    """
    state = {}
    for name, shape in shapes.items():
        stream = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
        noise = torch.from_numpy(stream.standard_normal(shape).astype(np.float32))
        if noise.ndim > 1:
            state[name] = noise / math.prod(shape[1:]) ** 0.5
        else:
            state[name] = 0.1 * noise + float(name.endswith("weight"))
    return state


def uniform(seed, *shape):
    """float64, in [0, 1)."""
    return torch.from_numpy(np.random.RandomState(seed).random_sample(shape))


def normal(seed, *shape):
    """float32."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def integers(seed, high, *shape):
    """In [0, high)."""
    return torch.from_numpy(np.random.RandomState(seed).randint(0, high, shape))


def seed(n):
    """A generator of torch, seeded."""
    return torch.Generator().manual_seed(n)


# --------------------------------------------------------------------------------------
# Small networks of the published classes
# --------------------------------------------------------------------------------------
SIZES = dict(bits=4, grid=2, width=8, depth=2, mlp=16, classes=3)               # of MaskBit
MASKGIT = dict(V=32, grid=4, width=48, depth=2, heads=4, mlp=96, classes=10)
MEISSONIC = dict(V=64, table=80, heads=4, head_width=16, joint=2, single=3, text_width=48,
                 axes=(4, 6, 6))
MASKGEN = dict(V=40, L=12, width=48, depth=3, heads=4, text_width=32, micro=16, spare=11)
TITOK = dict(V=40, L=12, size=16, patch=4, embed=8, enc=(32, 2, 4), dec=(48, 3, 4), text=9,
             text_width=32)
VQ = dict(widths=(8, 16), latent=8, embed=4, V=6, norm_groups=4)
TEXT = dict(width=32, heads=2, depth=2, out=48, vocab=64, context=9)
SMALL = {                                   # class, published file, and sizes of a small one
    "MaskGit": (teachers.MaskGit, maskgit_file, MASKGIT),
    "VQGAN": (autoencoders.VQTokenizer, vqgan_file, dict(VQ, attention=(1,))),
    "VQ-VAE": (autoencoders.VQTokenizer, vqvae_file, dict(VQ, attention=(), signed=False)),
    "Meissonic": (teachers.Meissonic, meissonic_file, MEISSONIC),
    "MaskGen": (teachers.MaskGen, maskgen_file, MASKGEN),
    "TATiTok": (titok.TATiTok, titok_file, TITOK),
    "TextTower": (text_net.TextTower, clip_file, TEXT),
}


def empty(name):
    """A small network of this class, its weights of no meaning."""
    make, _, sizes = SMALL[name]
    return make(**sizes)


def mini_net():
    """A MaskBit of 4 bits on a 2x2 grid."""
    return teachers.MaskBit(heads=2, **SIZES)


def shapes_in(file, sizes):
    """file(**sizes), without those sizes that no file shows: head counts above all."""
    known = inspect.signature(file).parameters
    return file(**{name: size for name, size in sizes.items() if name in known})


def filled(make, file, seed=0, **sizes):
    """The network make(**sizes) on seeded weights that come through its published file."""
    with torch.device("meta"):
        net = make(**sizes)
    state = seeded(shapes_in(file, sizes), seed)
    net = weights.load_state(net.to_empty(device="cpu"), state, "seeded")
    return net.eval().requires_grad_(False)


@functools.cache
def small_net():
    """A MaskBit generator of 8 bits on a 4x4 grid, seeded."""
    return filled(MaskBit, generator_file, bits=8, grid=4, width=64, depth=3, heads=4, mlp=256,
                  classes=10)


@functools.cache
def small_tokenizer():
    """Its tokenizer, 64x64 pixels to 4x4 tokens of 8 bits, seeded."""
    return filled(BitTokenizer, tokenizer_file, bits=8, hidden=64)


def half_masked_tokens():
    """Tokens and labels of most golden numbers; the third sample has no condition (class 10)."""
    x = integers(10, 16, 3, 16, 2).masked_fill(uniform(11, 3, 16, 2) < 0.5, 16)
    return x, (torch.tensor([3, 7, 10]),)


def run_with_hooks(net, e, cond):
    """(input of first LayerNorm, [output of each block], logits) of a MaskBit, all L+1 positions."""
    first, hidden = [], []
    handles = [net.norm_in.register_forward_pre_hook(lambda m, args: first.append(args[0]))]
    for block in net.blocks:
        hook = block.register_forward_hook(lambda m, args, out: hidden.append(out))
        handles.append(hook)
    z = net(e, cond)
    for handle in handles:
        handle.remove()
    return first[0], hidden, z


class TableNet:
    """Fixed logits z_c (B, L, G, V), z_u without the condition. It remembers its batch sizes."""

    def __init__(self, z_c, z_u):
        self.z_c, self.z_u = z_c, z_u
        _, self.L, self.G, self.V = z_c.shape
        self.calls = []

    def tables(self):
        return torch.zeros(self.G, self.V + 1, 1), 0.0

    def at(self, cond, t):
        return cond

    def null(self, cond):
        return (torch.full_like(cond[0], -1),)

    def __call__(self, e, cond):
        self.calls.append(len(e))
        which = torch.arange(len(e)) % len(self.z_c)
        unconditional = (cond[0] < 0)[:, None, None, None]
        return torch.where(unconditional, self.z_u[which], self.z_c[which])


# --------------------------------------------------------------------------------------
# The tiny teachers
# --------------------------------------------------------------------------------------
TINY = ("maskbit-tiny", "maskgit-tiny", "meissonic-tiny", "maskgen-tiny")
tiny_teacher = functools.cache(functools.partial(load_teacher, random_weights=True))


def tiny_inputs(name):
    """A teacher of random weights; half masked tokens, their embedding, a condition, batch of 2."""
    teacher = tiny_teacher(name)
    net = teacher.net
    asked = teacher.conditions(["a cat", "two dogs on a red boat"])[:2]
    x = integers(0, net.V, 2, net.L, net.G)
    x = x.masked_fill(uniform(1, 2, net.L, net.G) < 0.5, net.V)
    return teacher, x, se.embed_tokens(x, *net.tables()), teacher.cond(asked)


# --------------------------------------------------------------------------------------
# Small rewards
# --------------------------------------------------------------------------------------
CLIP = dict(
    embed_dim=32,
    vision_cfg=dict(image_size=56, layers=3, width=40, head_width=20, patch_size=14),
    text_cfg=dict(context_length=16, vocab_size=64, width=48, heads=4, layers=3),
)
CLIP_FILE = dict(vision=40, layers=3, size=56, out=32, text=(48, 3), vocab=64, context=16)
BLIP = dict(size=56, patch=14, vision=(48, 3, 4), text=(32, 3, 4), mlp=128, vocab=70, positions=40)
BLIP_FILE = dict(BLIP, vision=(48, 3), text=(32, 3))
CLIP_IDS = torch.tensor([[62, 5, 9, 17, 33, 63, *[0] * 10], [62, 40, 7, 63, *[0] * 12]])
BLIP_IDS = torch.tensor([[2, 11, 23, 5, 41, 60, 3, *[0] * 5], [2, 33, 9, 3, *[0] * 8]])
ASKED = ["a cat", "two dogs on a red boat", "rain", "an apple!", "blue"]


def reward_file(name):
    """Names and shapes of a small reward's published file."""
    if name == "imagereward":
        return imagereward_file(**BLIP_FILE)
    if name == "pickscore":
        return pickscore_file(**CLIP_FILE)
    return clip_reward_file(**CLIP_FILE)


def new_reward(name):
    """An empty small reward, made as load_rewards makes them: without initial values."""
    with torch.device("meta"):
        if name == "imagereward":
            model = blip.ImageReward(**BLIP)
        else:
            model = clip_net.ClipReward(CLIP, name)
    return model.to_empty(device="cpu")


@functools.cache
def small_reward(name):
    """A small frozen reward on seeded weights, which come through the published names."""
    model = weights.load_state(new_reward(name), seeded(reward_file(name)), name)
    return model.eval().requires_grad_(False)


def ids_of(name):
    """Two texts as this reward's tokens."""
    return BLIP_IDS if name == "imagereward" else CLIP_IDS


def rewards_of(*names, **settings):
    """load_rewards at small sizes with random weights, CLIP's vocabulary folded into 64 entries."""
    configs = {}
    for name in names:
        configs[name] = dict(BLIP, vocab=200) if name == "imagereward" else CLIP
    return reward.load_rewards(list(names), random_weights=True, configs=configs, **settings)


def eq9_inputs(name, B=3):
    """Logits, a tiny teacher's tokenizer, conditions and prompts, for a batch of B."""
    teacher, x, _, cond = tiny_inputs(name)
    E, _ = teacher.tokenizer.tables()
    torch.manual_seed(0)
    z = 3 * torch.randn(B, x.shape[1], len(E), E.shape[1] - 1)
    cond = tuple(c[torch.arange(B) % 2] for c in cond)
    return z, teacher.tokenizer, cond, ASKED[:B]


# --------------------------------------------------------------------------------------
# Data: real tokens, prompts, photographs
# --------------------------------------------------------------------------------------
def load(path):
    """(tokens, labels, meta) of real tokens, through train.py's own reader."""
    meta = None
    if not str(path).endswith(".npz"):
        meta = json.loads((path / "meta.json").read_text())
    tokens, labels, *_ = load_tokens(str(path), tiny_teacher("maskbit-tiny"))
    return tokens, labels, meta


def photos(folder, n=24, shift=0, kind="png"):
    """Noise of 0 to 199 in unequal sizes: one gray, one of 16 bits, one in a subfolder."""
    (folder / "sub").mkdir(parents=True)
    for i in range(n):
        rng = np.random.RandomState(i)
        tint = rng.randint(0, 150, 3)
        noise = rng.randint(0, 50, (20 + 7 * (i % 3), 31 + 5 * (i % 2), 3))
        img = (noise + tint + shift).astype(np.uint8)
        if i == 2:
            img = img[:, :, 0]
        if i == 3:
            img = img[:, :, 0].astype(np.uint16) * 256 + 99
        where = folder / "sub" if i == 5 else folder
        Image.fromarray(img).save(where / f"{i:02d}.{kind}")
    return str(folder)


NANO = Spec("nano", MaskBit, dict(bits=6, grid=4, width=32, depth=3, heads=2, mlp=64, classes=3),
            BitTokenizer, dict(channels=1, hidden=8, mult=(1, 2), blocks=1, bits=6, norm_groups=4),
            teachers.maskbit_plan, {4: dict(guidance=1.0, temperature=1.0)}, image=(1, 8, 8),
            student=dict(init_ratio=0.6, noise=0.1, temperature=1.0))


# --------------------------------------------------------------------------------------
# evaluate.py: its command, its table, its Inception network
# --------------------------------------------------------------------------------------
def command(folder, *flags):
    """The rows that a command appends."""
    args = [*map(str, flags), "--random_weights", "--device", "cpu", "--out", f"{folder}/out"]
    evaluate.main(evaluate.flags().parse_args(args))
    with open(f"{folder}/out/results.jsonl") as f:
        return [json.loads(line) for line in f]


def student(T, fid, model="student a"):
    """A row of results."""
    return dict(model=model, kind="student", teacher="maskbit", steps=1, temperature=T, n=50_000,
                fid=fid)


def inception_file():
    """{name: shape} of the published plain file, without the counts of batches."""
    with torch.device("meta"):
        state = inception.Inception().state_dict()
    return {name.removeprefix("layers."): list(t.shape) for name, t in state.items()}


def inception_state():
    """Seeded: variances are 1 + 0.1 |noise|; kernels are times 1.5, or 94 ReLUs kill the signal."""
    state = seeded(inception_file())
    for name, t in state.items():
        if name.endswith("running_var"):
            t.abs_().add_(1)
        if t.ndim == 4:
            t.mul_(1.5)
    return state


