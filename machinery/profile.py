"""Where the time of a training step goes: --profile N.

Functions that are a phase of the step say so (`@phase("student forward")`). While a Profile is
on, each call is timed on the device's own clock; otherwise the decorator does nothing. The first
step runs eagerly and is counted, FLOP by FLOP; three warm up; N are timed; the last runs once
more under torch.profiler, which tells matrix products from the rest.
"""

import contextlib
import functools
import os
import re
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from machinery.processes import autocast

COUNTED, WARM_UP, TRACED = 1, 3, 1                    # steps besides the N that are timed
# Kernels of matrix products, by name. Fused pointwise kernels and reductions by Triton are named
# after all that they contain, as triton_poi_fused_convolution_silu: they are none.
MATMUL = re.compile(
    r"(?!triton_(poi|red|per))"
    r".*(gemm|xmma|cutlass|nvjet|fmha|flash|conv|aten::(mm|addmm|bmm|baddbmm)$|mkldnn|triton_tem)",
    re.I)
current = None                                        # the Profile that is on


def phase(name):
    """Decorator: calls of this function are the phase `name` of a training step."""
    def decorate(function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            if current is None:
                return function(*args, **kwargs)
            start = current.clock()
            result = function(*args, **kwargs)
            current.add(name, start, current.clock())
            return result
        return timed
    return decorate


class Profile:
    def __init__(self, device, steps):
        global current
        current = self
        self.cuda, self.steps = device.type == "cuda", steps
        self.spans = {}                               # phase: its (start, stop) pairs
        self.flops = FlopCounterMode(display=False)
        self.timing, self.tracer = False, None
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")           # it complains without a GPU

    def clock(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start, stop):
        return start.elapsed_time(stop) if self.cuda else 1000 * (stop - start)

    def add(self, name, start, stop):
        if self.timing:
            self.spans.setdefault(name, []).append((start, stop))

    @contextlib.contextmanager
    def step(self, n):
        """Around step n of COUNTED + WARM_UP + N + TRACED."""
        with contextlib.ExitStack() as stack:
            if n < COUNTED:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                stack.enter_context(self.flops)
            if n == COUNTED + WARM_UP + self.steps:
                kind = torch.profiler.ProfilerActivity
                activity = kind.CUDA if self.cuda else kind.CPU
                self.tracer = stack.enter_context(torch.profiler.profile(activities=[activity]))
            if self.cuda and n == COUNTED + WARM_UP:
                torch.cuda.reset_peak_memory_stats()  # eager counting and compilation need more
            self.timing = n >= COUNTED + WARM_UP and self.tracer is None
            start = self.clock()
            yield
            self.add("step", start, self.clock())

    def fastest(self, f, n=5):
        """Milliseconds of the fastest of n calls, after two to warm up."""
        times = []
        for _ in range(n + 2):
            start = self.clock()
            f()
            stop = self.clock()
            if self.cuda:
                torch.cuda.synchronize()
            times.append(self.ms(start, stop))
        return min(times[2:])

    def share_of_matmul(self):
        """Share of the traced step's time that its matrix products took."""
        kind = torch.autograd.DeviceType.CUDA if self.cuda else torch.autograd.DeviceType.CPU
        products = everything = 0
        for event in self.tracer.key_averages():
            if event.device_type != kind:
                continue
            spent = event.self_device_time_total if self.cuda else event.self_cpu_time_total
            everything += spent
            if MATMUL.match(event.key):
                products += spent
        return products / everything

    def report(self, c, net, e, cond):
        """Print where the time went, and keep it as the dict `row`.

        A step is also counted in forward passes, net(e, cond).
        """
        if self.cuda:
            torch.cuda.synchronize()
        phases = {}
        for name, spans in self.spans.items():
            phases[name] = sum(self.ms(*span) for span in spans) / self.steps
        total = phases.pop("step")
        phases["other"] = total - sum(phases.values())

        side = 8192 if self.cuda else 2048
        dtype = torch.bfloat16 if c.dtype == "bf16" else torch.float32
        a = torch.randn(side, side, device=e.device, dtype=dtype)
        ceiling = 2 * side**3 / self.fastest(lambda: a @ a) / 1e9             # TFLOP/s
        with torch.no_grad(), autocast(c.device, c.dtype == "bf16"):
            forward = self.fastest(lambda: net(e, cond))
        tflop = self.flops.get_total_flops() / 1e12
        speed = 1000 * tflop / total
        row = dict(
            ms=total, phases=phases, images_per_s=1000 * c.batch / total,
            forward_ms=forward, passes=total / forward / c.accum,
            tflop=tflop, tflop_per_s=speed,
            ceiling_tflop_per_s=ceiling, share_of_ceiling=speed / ceiling,
            not_matmul=1 - self.share_of_matmul(), peak_gb=None)
        if self.cuda:
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9

        for name, t in phases.items():
            print(f"{name:24s} {t:9.2f} ms  {t / total:6.1%}")
        print(f"{'a step':24s} {total:9.2f} ms, {row['images_per_s']:.1f} images/s; "
              f"{row['passes']:.2f} forward passes of {forward:.2f} ms")
        print(f"{tflop:.3f} TFLOP per step on this process, {speed:.2f} TFLOP/s: "
              f"{row['share_of_ceiling']:.1%} of the {ceiling:.2f} that one {side} x {side} "
              f"{c.dtype} product reaches")
        print(f"{row['not_matmul']:.1%} of the time is not in matrix products")
        if self.cuda:
            print(f"peak memory {row['peak_gb']:.1f} GB")
        self.row = row
