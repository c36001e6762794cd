"""How the worlds' networks are trained, and how their weights are written with a record of it."""

import copy
import json
import math
import time

import torch
import torch.nn as nn
from safetensors.torch import save
from tqdm import tqdm

from machinery.files import replacing
from machinery.flags import nonnegative_int, positive, positive_int
from machinery.optim import ema_update


def training_flags(ap, steps, batch, lr):
    ap.add_argument("--steps", type=positive_int, default=steps, help="updates (%(default)s)")
    ap.add_argument("--batch", type=positive_int, default=batch,
                    help="images per update (%(default)s)")
    ap.add_argument("--lr", type=positive, default=lr, help="highest learning rate (%(default)s)")
    ap.add_argument("--seed", type=nonnegative_int, default=0, help="seed of all random choices")
    ap.add_argument("--bf16", action="store_true",
                    help="bfloat16 autocast (fast on CPUs with AMX and on GPUs)")


def learning_rate(n, steps, lr):
    """Rate of update n: a warm-up of 200 updates, times a cosine that ends at a fiftieth."""
    warmup = min(1.0, (n + 1) / 200)
    return lr * (warmup * (0.02 + 0.98 * (1 + math.cos(math.pi * n / steps)) / 2))


def fit(model, loss_fn, args, muon=False):
    """Minimize loss_fn() -> (loss, log) by AdamW; returns the running average of the weights.

    muon: the matrices of the blocks are trained by Muon instead (Jordan et al. 2024), scaled as
    AdamW. The shapes teacher's loss after 300 steps is 5.51 with it, 5.77 without.
    """
    matrices, rest = [], []
    for name, p in model.named_parameters():
        chosen = muon and p.ndim == 2 and "emb" not in name
        (matrices if chosen else rest).append(p)
    opts = [torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.01)]
    if muon:
        opts.append(torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))

    average = copy.deepcopy(model)
    device = next(model.parameters()).device.type
    bar = tqdm(range(args.steps), mininterval=5, unit="step")
    for n in bar:
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            loss, log = loss_fn()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = learning_rate(n, args.steps, args.lr)
            opt.step()
        ema_update(average, model, n, decay=0.999)
        if n % 50 == 0:
            seen = {name: value.item() for name, value in log.items()}
            bar.set_postfix(seen)
    return average.eval()


def pixel_loss(out, img):
    """Distance of pixels, absolute and squared, and of edges: images (B, C, H, W) -> a number."""
    edges = sum((out.diff(dim=a) - img.diff(dim=a)).abs().mean() for a in (2, 3))
    return (out - img).abs().mean() + 5 * (out - img).square().mean() + edges


def ship(model, path, args, start, report=dict):
    """Write a module as float16 safetensors, and beside it, as JSON, how it was made since `start`.

    The module itself becomes float16. report() is called once the weights are written; what it
    returns is added to the record.
    """
    state = {name: tensor.contiguous() for name, tensor in model.half().state_dict().items()}
    with replacing(path) as f:
        f.write(save(state))

    parameters = sum(p.numel() for p in model.parameters())
    record = dict(vars(args), parameters=parameters, seconds=round(time.time() - start))
    record.update(report())
    text = json.dumps(record, indent=1)
    with replacing(path.replace(".safetensors", ".json")) as f:
        f.write(text.encode())
    print(text)
