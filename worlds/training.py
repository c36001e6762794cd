"""How the worlds' networks are trained and shipped."""

import json
import math
import os
import time

import torch
import torch.nn as nn
from tqdm import tqdm

from machinery.files import replacing


def fit(model, loss_fn, steps, lr, betas=(0.9, 0.99), weight_decay=0.01, ema_decay=0.999, bf16=False, muon=False):
    """Minimize loss_fn() for `steps` steps of AdamW, warm-up then cosine; leaves the average of the weights.

    muon: matrices of the blocks by Muon instead (Jordan et al. 2024), scaled as AdamW: the shapes teacher's loss after
    300 steps is 5.51, not 5.77.
    """
    of_blocks = lambda name, p: muon and p.ndim == 2 and "emb" not in name
    rest = [p for name, p in model.named_parameters() if not of_blocks(name, p)]
    opts = [torch.optim.AdamW(rest, lr, betas, weight_decay=weight_decay)]
    if muon:
        blocks = [p for name, p in model.named_parameters() if of_blocks(name, p)]
        opts += [torch.optim.Muon(blocks, lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]
    factor = lambda n: min(1.0, (n + 1) / 200) * (0.02 + 0.98 * (1 + math.cos(math.pi * n / steps)) / 2)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    bar = tqdm(range(steps), mininterval=5, unit="step")
    device = next(model.parameters()).device.type
    for n in bar:
        for group in (group for opt in opts for group in opt.param_groups):
            group["lr"] = lr * factor(n)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss, log = loss_fn()
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        rate = min(ema_decay, (1 + n) / (10 + n))
        for k, v in model.state_dict().items():
            ema[k].lerp_(v, 1 - rate)
        if n % 50 == 0:
            bar.set_postfix_str(" ".join(f"{k} {float(v):.4f}" for k, v in log.items()))
    model.load_state_dict(ema)
    return model.eval()


def pixel_loss(out, img):
    """Distance of pixels, absolute and squared, and of edges: images (B, C, H, W) -> a number."""
    edges = sum((out.diff(dim=a) - img.diff(dim=a)).abs().mean() for a in (2, 3))
    return (out - img).abs().mean() + 5 * (out - img).square().mean() + edges


def ship(model, path, args, start, report=dict):
    """Write a module as float16 safetensors, and how it was made beside it, as JSON; report() adds what it came to."""
    from safetensors.torch import save

    os.makedirs(os.path.dirname(path), exist_ok=True)
    with replacing(path) as f:
        f.write(save({k: (v.half() if v.is_floating_point() else v).cpu().contiguous() for k, v in model.state_dict().items()}))
    record = dict(vars(args), parameters=sum(p.numel() for p in model.parameters()), seconds=round(time.time() - start))
    record.update(report())
    with replacing(path.replace(".safetensors", ".json")) as f:
        f.write(json.dumps(record, indent=1).encode())
    print(json.dumps(record, indent=1))
