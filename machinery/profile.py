"""Where the time of a training step goes."""

import contextlib
import os
import re
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from machinery.processes import autocast


class Profile:
    """--profile: milliseconds a phase, by marks on the device's own clock, and what they amount to.

    The first step runs eagerly and is counted, FLOP by FLOP; three warm up; the last runs once more under torch.profiler.
    """

    SKIP, MATMUL = 4, re.compile(r"gemm|xmma|cutlass|nvjet|fmha|flash|conv|aten::(mm|addmm|bmm|baddbmm)$|mkldnn", re.I)

    def __init__(self, device):
        self.cuda, self.phases, self.last, self.step = device.type == "cuda", {}, None, 0
        self.flops, self.tracer = FlopCounterMode(display=False), None
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")           # it complains where there is no GPU

    def clock(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, step, steps):
        self.step, self.stack = step, contextlib.ExitStack()
        if step == 0:
            self.stack.enter_context(torch.compiler.set_stance("force_eager"))
            self.stack.enter_context(self.flops)
        if step == steps - 1:
            kind = torch.profiler.ProfilerActivity
            self.tracer = self.stack.enter_context(torch.profiler.profile(activities=[kind.CUDA if self.cuda else kind.CPU]))
        self.last = self.clock()

    def mark(self, phase):
        """What has been queued since the last mark was this phase."""
        now = self.clock()
        if self.step >= self.SKIP and self.tracer is None:
            self.phases.setdefault(phase, []).append((self.last, now))
        self.last = now

    def end(self):
        self.mark("other")
        self.stack.close()

    def report(self, c, net, e, cond):
        """Print the table; returns it as a dict."""
        device = next(net.parameters()).device
        between = lambda a, b: a.elapsed_time(b) if self.cuda else 1000 * (b - a)

        def fastest(f, n=5):
            """ms of the fastest of n calls, after two."""
            times = []
            for _ in range(n + 2):
                start = self.clock()
                f()
                stop = self.clock()
                if self.cuda:
                    torch.cuda.synchronize()
                times.append(between(start, stop))
            return min(times[2:])

        if self.cuda:
            torch.cuda.synchronize()
        ms = {phase: sum(between(*pair) for pair in pairs) / c.profile for phase, pairs in self.phases.items()}
        total, flops = sum(ms.values()), self.flops.get_total_flops()
        side = 8192 if self.cuda else 2048
        a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if c.dtype == "bf16" else torch.float32)
        ceiling = 2 * side**3 / fastest(lambda: a @ a) / 1e9                                  # TFLOP/s
        with torch.no_grad(), autocast(c.device, c.dtype == "bf16"):
            forward = fastest(lambda: net(e, cond))
        spent = {}
        for event in self.tracer.key_averages():
            if event.device_type == (torch.autograd.DeviceType.CUDA if self.cuda else torch.autograd.DeviceType.CPU):
                spent[event.key] = event.self_device_time_total if self.cuda else event.self_cpu_time_total
        other = 1 - sum(t for key, t in spent.items() if self.MATMUL.search(key)) / sum(spent.values())
        row = dict(ms=total, forward_ms=forward, passes=total / forward / c.accum, images_per_s=1000 * c.batch / total,
                   tflop=flops / 1e12, tflop_per_s=flops / total / 1e9, ceiling_tflop_per_s=ceiling,
                   share_of_ceiling=flops / total / 1e9 / ceiling, not_matmul=other,
                   peak_gb=torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None, phases=ms)
        print("\n".join(f"{phase:24s} {t:9.2f} ms  {t / total:6.1%}" for phase, t in ms.items()))
        print(f"{'a step':24s} {total:9.2f} ms, {row['images_per_s']:.1f} images/s; {row['passes']:.2f} forward passes of "
              f"{forward:.2f} ms\n{row['tflop']:.3f} TFLOP a step on this process, {row['tflop_per_s']:.2f} TFLOP/s: "
              f"{row['share_of_ceiling']:.1%} of the {ceiling:.2f} that one {side} x {side} {c.dtype} product reaches\n"
              f"{other:.1%} of the time is not in matrix products"
              + (f"; peak memory {row['peak_gb']:.1f} GB" if self.cuda else ""))
        return row
