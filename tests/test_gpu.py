"""A GPU that holds no surprise: what fake CUDA tensors show without one, and, with one, `pytest -m gpu`."""

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import reward
from data import tokens
from machinery.optim import Sharded
from machinery.processes import send
from networks import blocks, clip
from networks.text import TextTower
from soft_embed import soft_embed
from teachers import SPECS, generate_student, load_teacher
from tests.common import BLIP, CLIP


# ------------------------------------------------------------------------- fake tensors: no GPU
def test_a_resumed_sharded_optimizer_has_its_state_on_the_gpu_where_fused_adam_wants_it():
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(n, device="cuda")) for n in (4, 3)]
        optimizer = Sharded(torch.optim.Adam, params, lr=1.0, fused=True)
        saved = {i: dict(step=torch.tensor(2.0), exp_avg=torch.zeros(len(p)),
                         exp_avg_sq=torch.zeros(len(p))) for i, p in enumerate(params)}
        group = optimizer.own.state_dict()["param_groups"][0]
        optimizer.load_state_dict(dict(state=saved, param_groups=[group]))
        for p in params:
            state = optimizer.own.state[p]
            assert {t.device.type for t in state.values()} == {"cuda"}
            assert state["step"].dtype == torch.float32


class Waits(TorchDispatchMode):
    """Collects what would make the host wait for a GPU: reads, and copies to it that block."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._pin_memory.default:        # fake tensors do not know it
            return args[0].clone()
        out = func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found.append(func)
        moved = torch.is_tensor(out) and out.is_cuda and any(
            torch.is_tensor(t) and t.ndim and not t.is_cuda for t in args)
        if moved and not kwargs.get("non_blocking"):
            self.found.append(func)
        return out


def test_text_and_rewards_send_to_the_gpu_without_waiting_and_read_nothing_from_it():
    spec, prompts = SPECS["meissonic-tiny"], ["a fox", "two dogs"]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with torch.device("cuda"):
            text, net = TextTower(**spec.text), spec.Net(**spec.net)
            tokenizer = spec.Tokenizer(**spec.tokenizer)
            models = dict(clip=reward.ClipReward(CLIP), imagereward=reward.ImageReward(
                **BLIP, wordpiece=reward.WordPiece()))
            rewards = reward.Rewards(models, dtype=None, checkpointing=False)
            z = torch.empty(2, net.L, 1, net.V)

        def step():
            cond = net.condition(*text(send(text.tokenize(prompts), z.device)))
            net(soft_embed(z, *net.tables()), cond)
            img = tokenizer.decode(soft_embed(z, *tokenizer.tables()), cond, clamp=True)
            rewards(img, prompts, in_range=True)

        with Waits() as waits:
            step()
            constants = len(waits.found)              # sent once: CLIP's moments, two angles
            step()
    clip.moments.cache_clear()
    blocks.angles.cache_clear()
    assert len(waits.found) == constants == 3


def test_pixels_and_tokens_are_made_without_tf32_and_without_bf16():
    teacher, seen = load_teacher("maskbit-tiny", random_weights=True), []

    def look(*_):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
                     torch.is_autocast_enabled("cpu")))

    for part in (teacher.tokenizer.encoder, teacher.tokenizer.decoder):
        part.register_forward_hook(look)
    torch.set_float32_matmul_precision("high")        # as train.py does
    try:
        with torch.autocast("cpu", torch.bfloat16):
            img = generate_student(teacher, teacher.net, torch.arange(2))
            tokens.encode(teacher.tokenizer, img)
            look()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("highest", False, False), ("highest", False, False), ("high", True, True)]
