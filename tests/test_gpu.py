"""A GPU that holds no surprise: what fake CUDA tensors show without one, and, with one, `pytest -m gpu`."""

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import reward
import train
from data import tokens
from machinery.checkpoint import Writer
from machinery.optim import Sharded
from machinery.processes import send
from networks import blocks, clip
from networks.text import TextTower
from recipes import selftest
from recipes.settings import settle
from soft_embed import soft_embed
from teachers import SPECS, generate_student, load_teacher
from tests.common import BLIP, CLIP
from tests.runs import finished
from tests.test_speed import REWARD


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


def fakes_a_gpu():
    """Older versions of torch, built for CUDA, ask the driver even for a fake tensor's sum."""
    parts = torch.__version__.split(".")
    return torch.cuda.is_available() or torch.version.cuda is None or int(parts[1]) >= 14


@pytest.mark.skipif(not fakes_a_gpu(), reason="this torch fakes no GPU without a driver")
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


# ------------------------------------------------------------------------ a GPU: `pytest -m gpu`
@pytest.fixture
def on_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU with CUDA here")
    torch.cuda.synchronize()


SETTINGS = selftest.TINY["maskbit-tiny"] | dict(device="cuda", compile=False)


@pytest.mark.gpu
def test_gradients_agree_compiled_and_in_bf16(on_gpu, tmp_path):
    for settings in selftest.TINY.values():
        given = settings | dict(device="cuda", out=str(tmp_path))
        rows = selftest.agreement(train, given, [("bf16", False), ("fp32", True), ("bf16", True)])
        assert [row for row in rows if not row["ok"]] == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_resumes_alone_and_with_sharded_optimizers_under_nccl(dtype, on_gpu, tmp_path):
    rows = selftest.survival(train, SETTINGS | dict(dtype=dtype), str(tmp_path))
    assert "nccl" in rows[1]["check"] and [row for row in rows if not row["ok"]] == []


@pytest.mark.gpu
@pytest.mark.parametrize("given", [SETTINGS, REWARD])
def test_the_host_waits_for_nothing_between_log_lines(given, on_gpu, tmp_path, monkeypatch):
    """torch raises where a step of the loop would synchronize, from the second step on."""
    true = train.draw_batches

    def draw_batches(run, step):
        torch.cuda.set_sync_debug_mode("error" if 1 <= step < 3 else "default")
        return true(run, step)

    monkeypatch.setattr(train, "draw_batches", draw_batches)
    given = given | dict(steps=4, log_every=4, save_every=4, device="cuda", compile=False,
                         out=f"{tmp_path}/out")
    try:
        finished(settle(given))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_checkpoint_is_copied_before_training_goes_on(on_gpu, tmp_path):
    weights, writer = torch.zeros(2**26, device="cuda"), Writer()
    for step in range(3):
        weights.fill_(step)
        writer.save(f"{tmp_path}/ckpt.pt", dict(weights=weights))
        weights.fill_(-1)                             # training goes on
        writer.wait()
        kept = torch.load(f"{tmp_path}/ckpt.pt", weights_only=True)["weights"]
        assert kept.device.type == "cpu" and (kept == step).all()


@pytest.mark.gpu
def test_a_step_at_full_size_fits_and_its_peak_is_measured(on_gpu, tmp_path):
    given = dict(teacher="maskbit", gan=True, batch=8, profile=2, device="cuda", dtype="bf16",
                 compile=False, out=str(tmp_path))
    row = selftest.training_speed(train, given, "MaskBit")
    assert 4 < row["peak_gb"] < torch.cuda.mem_get_info()[1] / 1e9
