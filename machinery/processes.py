"""Several processes, each with a device. Nothing else in this repository asks torch.distributed
anything but these.
"""

import contextlib
import ctypes
import os
import platform
import time
from datetime import timedelta

import torch
import torch.distributed as dist


# How long a process waits for the others. Meanwhile the first may draw pictures, or fetch files.
PATIENCE = timedelta(minutes=30)


def join_processes(kind):
    """This process's device, of kind "cuda" or "cpu"; and the process group, where torchrun
    started several processes.

    A restart (torchrun --max-restarts) on one node meets under a name of its own: torchrun's
    store still has the addresses of the processes that died. On several nodes no count of
    restarts is shared; there the store itself must be new, which
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 sees to (docs/running.md).
    """
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_memory()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=PATIENCE,
            device_id=device if kind == "cuda" else None)
    return device


@contextlib.contextmanager
def group_of_one(kind):
    """A process group of this process alone, as several would have it; the backend's name."""
    backend = "nccl" if kind == "cuda" else "gloo"
    device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else None
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        yield backend
    finally:
        dist.destroy_process_group()


def joined():
    """Is there a process group, of one process at least?"""
    return dist.is_initialized()


def rank():
    return dist.get_rank() if joined() else 0


def world_size():
    return dist.get_world_size() if joined() else 1


def is_main():
    """Is this the one process that prints and writes?"""
    return rank() == 0


def barrier():
    if joined():
        dist.barrier()


def all_reduce(t):
    """The sum over processes, in place; every process must call it."""
    if joined():
        dist.all_reduce(t)
    return t


def broadcast(t, source):
    """Overwrite t by that of process `source`, once the result has waited; all must call it."""
    return dist.broadcast(t, source, async_op=True)


def gather(thing):
    """What every process passed in, as a list; every process must call it."""
    everyone = [thing]
    if joined():
        everyone = [None] * world_size()
        dist.all_gather_object(everyone, thing)
    return everyone


def from_first(thing):
    """What the first process passed in; every process must call it."""
    things = [thing]
    if joined():
        dist.broadcast_object_list(things)
    return things[0]


# ---------------------------------------------------------------------------------------- devices
def keep_memory():
    """Let the process keep the memory that it has freed, for its next batch (glibc alone).

    Otherwise each large tensor is mapped anew, and the system fills it with zeros, page by page.
    Per second of one core, in two trials each, theta_0 of fashion draws 252 and 251 images without
    this, 286 and 275 with it; peak memory is the same within 3%.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3       # names and numbers of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 2**25)             # 32 MB, the most that glibc takes
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def now(device):
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def send(t, device):
    """A tensor of the host to a device, which the host does not wait for."""
    if device.type == "cuda":
        return t.pin_memory().to(device, non_blocking=True)
    return t


def autocast(kind, bf16):
    """bfloat16 for what is worth it, on devices of kind "cuda" or "cpu"; or, where not wanted,
    nothing.
    """
    return torch.autocast(kind, torch.bfloat16, enabled=bf16)


@contextlib.contextmanager
def true_float32():
    """Float32 to its last digit: neither autocast, nor TF32 in matrix products and convolutions.

    For what others compare or keep: pixels, tokens of real images, features. Training's own float32
    products may be TF32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), autocast(kind, False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
