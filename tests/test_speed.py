"""Speed: nothing waits, nothing breaks a graph, a profile adds up, and a student leaves as one file."""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._functorch.config
import torch.nn as nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import teachers
import train
from gan import gan_grad
from machinery import compiling, optim, profile
from machinery.errors import UserError
from machinery.files import ROOT
from machinery.processes import group_of_one
from networks.blocks import linear32
from recipes import selftest
from recipes.settings import settle
from soft_embed import soft_embed
from teachers import load_teacher
from tests.runs import run

START = dict(init_ratio=0.6, noise=0.1, temperature=1.0)


def seeded(n):
    return torch.Generator().manual_seed(n)


def test_exported_students_draw_the_same_images_without_this_repository(tmp_path):
    expected = {}
    for name in ("maskbit-tiny", "meissonic-tiny", "maskgen-tiny"):
        teacher = load_teacher(name, random_weights=True)
        teachers.export(teacher, teacher.net, f"{tmp_path}/{name}.pt2", **START)
        asked = teacher.conditions(["a cat", "two dogs", "a cup"] if teacher.text else None)[:3]
        torch.save(asked, f"{tmp_path}/{name}.asked")
        expected[name] = teachers.generate_student(
            teacher, teacher.net, asked, generator=seeded(5), **START)
    code = (
        "import torch\n"
        f"for name in {list(expected)}:\n"
        "    asked = torch.load(f'{name}.asked')\n"
        "    torch.manual_seed(5)\n"
        "    torch.save(torch.export.load(f'{name}.pt2').module()(asked), f'{name}.img')")
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    for name, img in expected.items():
        assert torch.equal(torch.load(f"{tmp_path}/{name}.img"), img), name


def test_the_four_lines_of_the_docs_draw_from_a_checkpoint_and_the_command_exports_it(tmp_path):
    ckpt = f"{tmp_path}/run/ckpt.pt"
    state = run(tmp_path, teacher="maskbit-tiny", steps=1, batch=4, random_weights=True,
                init_from="teacher", data="assets/fashion/tokens.npz", eval_every=0, head_width=16,
                head_mlp=16)
    with open(os.path.join(ROOT, "docs", "running.md")) as f:
        lines = re.search(r"```python\n(.*?)```", f.read(), re.S).group(1)
    assert len(lines.splitlines()) == 4
    known = {}
    exec(lines.replace("out/run/ckpt.pt", ckpt), known)
    assert known["images"].shape == (8, 1, 32, 32) and known["images"].dtype == torch.uint8
    assert known["start"] == {key: state["config"][key] for key in START}

    def ask(*flags):
        evaluate.main(evaluate.flags().parse_args(
            ["--out", f"{tmp_path}/e", "--device", "cpu", *flags]))

    ask("--ckpt", ckpt, "--export", f"{tmp_path}/student.pt2")
    torch.manual_seed(3)
    img = torch.export.load(f"{tmp_path}/student.pt2").module()(torch.arange(5))
    assert torch.equal(img, teachers.generate_student(
        known["teacher"], known["net"], torch.arange(5), generator=seeded(3), **known["start"]))
    with pytest.raises(UserError, match="--export .*none/x: cannot write there"):
        ask("--ckpt", ckpt, "--export", f"{tmp_path}/none/x")
    with pytest.raises(UserError, match="writes one student"):
        ask("--export", f"{tmp_path}/x")


@pytest.mark.parametrize("kernel, product", [
    ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", True), ("aten::addmm", True),
    ("aten::add", False), ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", True),
    ("triton_poi_fused_convolution_silu_3", False), ("triton_red_fused_addmm_gelu_7", False),
    ("triton_tem_fused_mm_2", True), ("void at::native::vectorized_elementwise_kernel<4>", False),
])
def test_a_profile_knows_matrix_products_by_the_names_of_kernels(kernel, product):
    assert bool(profile.MATMUL.match(kernel)) == product


def test_compiled_networks_are_compiled_once_whole_whatever_is_evaluated_and_however_many_train(
        tmp_path, monkeypatch):
    """A group of one has the DDP wrapper and its buckets, here so small that each would split a graph."""
    def compile_in_place(self, **kwargs):
        self._compiled_call_impl = torch.compile(
            self._call_impl, backend=counter, fullgraph=True, **kwargs)

    monkeypatch.setattr(nn.Module, "compile", compile_in_place)
    monkeypatch.setattr(optim, "DDP", functools.partial(optim.DDP, bucket_cap_mb=0.001))
    for group in (contextlib.nullcontext(), group_of_one("cpu")):
        torch._dynamo.reset()
        counter = CompileCounter()
        with group:
            run(tmp_path, steps=3, eval_every=2, compile=True, overwrite=True, feature_noise=0.1,
                dtype="bf16")
        # student; auxiliary in Eq. 2, in Eq. 1; teacher guided, for Eq. 8, for Eq. 7; heads for Eq. 8, 7
        assert counter.frame_count == 8


class Island(nn.Module):
    """A linear layer in bf16, and what stays float32 behind it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 8)
        self.head = nn.Parameter(torch.randn(8, 8))
        self.E = nn.Parameter(torch.randn(1, 9, 4))

    def forward(self, h):
        z = linear32(self.linear(h), self.head)                                     # (B, L, 8)
        return soft_embed(z[:, :, None], self.E)                                    # (B, L, 4)


def test_float32_islands_have_float32_gradients_when_compiled_under_bf16(monkeypatch):
    """Compiled by default, the whole backward pass is traced under the autocast of the forward pass."""
    def compile_in_place(self, **kwargs):
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager", **kwargs)

    monkeypatch.setattr(nn.Module, "compile", compile_in_place)
    torch.manual_seed(0)
    h, g, gradients = torch.randn(2, 5, 16), torch.randn(2, 5, 4), []
    net = Island()
    for compiled in (False, True):
        if compiled:
            compiling.compile_in_place(net)
        with torch.autocast("cpu", torch.bfloat16):
            e = net(h)
        net.zero_grad()
        e.backward(g)
        gradients.append((net.head.grad, net.E.grad))
    for eager, compiled in zip(*gradients):
        assert (eager - compiled).abs().max() < 1e-5 * eager.abs().max()


def test_only_the_auxiliarys_backward_pass_runs_under_autocast(tmp_path, monkeypatch):
    """There products of float32 islands are in bf16; not in other updates, nor the GAN's gradient."""
    seen, wrap = {}, optim.Trained.wrap

    def watched(self, device):
        for p in self.params:
            p.register_hook(lambda g: seen.update({self: torch.is_autocast_enabled("cpu")}))
        wrap(self, device)

    monkeypatch.setattr(optim.Trained, "wrap", watched)
    run(tmp_path, steps=1, dtype="bf16")
    assert sorted(seen.values()) == [False, False, True]

    class Disc:
        layers = (0,)

        def __call__(self, features):
            return features[0].square().sum((1, 2))

    torch.manual_seed(0)
    z, E, mask = torch.randn(2, 4, 1, 8), torch.randn(1, 9, 6), torch.zeros(2, 4, 1).bool()
    asked = z, Disc(), lambda e, *_: [e], (), mask, E, 0.0
    exact, *_ = gan_grad(*asked)
    with torch.autocast("cpu", torch.bfloat16):
        g, *_ = gan_grad(*asked)
    assert (g - exact).abs().max() < 1e-6 * exact.abs().max()


READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
         torch.ops.aten.equal, torch.ops.aten.is_nonzero)


def reads_of(monkeypatch, train_it):
    """Numbers of steps, and what is read in them, in order."""
    events = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._overloadpacket in READS:
                events.append(str(func))
            return func(*args, **(kwargs or {}))

    true = train.draw_step

    def draw_step(c, step, *args):
        events.append(step)
        return true(c, step, *args)

    monkeypatch.setattr(train, "draw_step", draw_step)
    with Count():
        train_it()
    return events[events.index(0):]


REWARD = dict(
    teacher="meissonic-tiny", prompts="assets/prompts.txt", batch=4, steps=3, log_every=3,
    save_every=3, student_start=0, reward=True, reward_start=0, random_weights=True, device="cpu",
    init_from="teacher", eval_every=0, text_cache="off", reward_chunk=2, optimizer="adam")


@pytest.mark.parametrize("reward", [False, True])
def test_the_host_reads_nothing_of_the_device_between_log_lines(reward, tmp_path, monkeypatch):
    """On a GPU each read waits for all that is queued. CPU tensors have the same calls."""
    def train_it():
        if reward:                                    # and prompts that are encoded at each step
            train.train(settle(REWARD | dict(out=f"{tmp_path}/out")))
        else:
            run(tmp_path, steps=3, log_every=3, save_every=3, accum=2)

    events = reads_of(monkeypatch, train_it)
    last = events.index(2)                            # the last step logs and saves
    assert events[:last + 1] == [0, 1, 2]
    assert "aten._local_scalar_dense.default" in events[last:]


# ---------------------------------------------------------------------------------- the self-test
def test_the_selftest_finds_a_cpu_in_order_and_its_profile_adds_up(tmp_path, monkeypatch, capsys):
    command = ["train.py", "--selftest", "--device", "cpu", "--no-compile", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    train.main()
    assert os.listdir(tmp_path) == ["selftest.jsonl"]
    with open(f"{tmp_path}/selftest.jsonl") as f:
        rows = [json.loads(line) for line in f]
    checks = {row["check"]: row for row in rows if "check" in row}
    assert len(checks) == 13 and all(row["ok"] for row in checks.values())
    assert [row["difference"] for row in rows if "difference" in row] == [0, 0]       # to the bit
    speeds = {row["speed"]: row for row in rows if "speed" in row}
    assert len(speeds) == 8
    assert all(row["ms"] > 0 and row["images_per_s"] > 0 for row in speeds.values())
    said = capsys.readouterr().out
    assert all(name in said for name in [*checks, *speeds])

    row = speeds["MaskBit, Di[M]O + GAN"]
    phases = {"random choices", "student forward", "Di[M]O: teacher, aux", "GAN gradient",
              "student backward", "aux forward, backward", "discriminator", "updates", "other"}
    assert row["phases"].keys() == phases and all(ms > 0 for ms in row["phases"].values())
    assert sum(row["phases"].values()) == pytest.approx(row["ms"])
    assert row["share_of_ceiling"] == pytest.approx(row["tflop_per_s"] / row["ceiling_tflop_per_s"])
    blocks = load_teacher("maskbit-tiny").net.blocks
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    assert row["tflop"] * 1e12 > 12 * 2 * 8 * 64 * weights        # 12 passes or more
    assert 0 < row["not_matmul"] < 1


def test_the_selftest_says_which_gradient_is_wrong(tmp_path):
    def dimo_term(run, batch, seen):
        g = train.dimo_term(run, batch, seen)
        return -g if run.c.dtype == "bf16" else g

    broken = SimpleNamespace(**vars(train) | dict(dimo_term=dimo_term))
    settings = selftest.TINY["maskbit-tiny"] | dict(device="cpu", out=str(tmp_path))
    rows = selftest.agreement(broken, settings, [("bf16", False)])
    failed = [row["check"] for row in rows if not row["ok"]]
    assert failed == ["maskbit-tiny, bf16, eager: Di[M]O at the logits"]
    with pytest.raises(UserError, match="Di.M.O at the logits: not as it should be"):
        selftest.verdict(rows)


def test_the_selftest_refuses_what_it_would_not_heed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--selftest", "--teacher", "nano", "--batch", "3"])
    with pytest.raises(UserError, match="of its own: leave out --batch, --teacher"):
        train.main()
    monkeypatch.setattr(sys, "argv", ["train.py", "--selftest"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one device: start it without torchrun"):
        train.main()
