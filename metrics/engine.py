"""Images drawn batch by batch, over all processes, and what they are turned into."""

import math
import os
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from machinery.pictures import picture, save_images
from machinery.processes import all_reduce, barrier, is_main, rank, world_size


class Moments:
    """Mean and covariance of features that come in batches, on several processes, by float64 sums.

    The sums run about `shift`, a point near the mean and the same on every process (here the reference's mean):
    E[f f^T] - mu mu^T would lose digits where means are large against the spread.
    """

    def __init__(self, dim, shift=0.0, device="cpu"):
        self.shift = torch.as_tensor(shift, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, f):
        f = f.double() - self.shift                                                           # (B, dim)
        self.count += len(f)
        self.sum += f.sum(0)
        self.outer += f.T @ f

    def result(self):
        """mu (dim,) and the unbiased covariance (dim, dim) of what all processes have seen, as float64 arrays."""
        n, total, outer = (all_reduce(t.clone()) for t in (self.count, self.sum, self.outer))
        mean = total / n
        sigma = (outer - n * mean[:, None] * mean) / (n - 1)
        return (mean + self.shift).cpu().numpy(), sigma.cpu().numpy()


@torch.no_grad()
def extract(extractor, img):
    """(features, logits) of uint8 images (B, C, H, W), or of a list of them of unequal sizes.

    In float32, without TF32, even where the caller generates under autocast.
    """
    device = next(extractor.parameters()).device
    unit = lambda i: i.to(device).float() / 255
    with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return extractor([unit(i) for i in img] if isinstance(img, list) else unit(img))


def in_batches(make_images, rows, batch, seed, desc, facts, folder=None):
    """The images of `rows`, batch by batch, this process's share of them: yields (slice, uint8 images).

    Batch i draws from a generator seeded by (seed, i), and whole batches go to processes in turn. At the end the
    speed of all processes together is put into `facts`. folder: a new one, where they are written, as PNG.
    """
    if folder and is_main():
        save_images(folder, (), "png")
    if folder:
        barrier()
    device, seconds, timed = rows.device, Counter(), 0
    me, world = rank(), world_size()
    mine = range(me, math.ceil(len(rows) / batch), world)
    for i in tqdm(mine, desc, unit="batch", disable=me > 0 or desc is None, leave=False, dynamic_ncols=True):
        if i == me + world:                         # the first batch only warmed caches and kernels up
            seconds.clear()
            timed = 0
        part = slice(i * batch, (i + 1) * batch)
        own_seed = int(np.random.SeedSequence((seed, i)).generate_state(1)[0])
        generator = torch.Generator(device).manual_seed(own_seed)
        img = make_images(rows[part], generator=generator, seconds=seconds)
        timed += len(img)
        for k, pixels in zip(range(len(rows))[part], img if folder else ()):
            picture(pixels).save(os.path.join(folder, f"{k:05d}.png"))
        yield part, img
    rates = [timed / s if s else 0.0 for s in (seconds.total(), seconds["tokens"])]
    rates = all_reduce(torch.tensor(rates, dtype=torch.float64, device=device)).tolist()
    facts.update({"images/s": rates[0] or None, "tokens_only/s": rates[1] or None, "processes": world})


@torch.no_grad()
def extracted(make_images, rows, extractor, shift=0.0, batch=250, seed=0, desc=None, folder=None, every=1):
    """features (n, dim), logits (n, classes), mu, sigma, facts of the images of `rows`, of all processes together.

    every: features and logits of each `every`-th image alone are kept; mu and sigma are of all.
    """
    device, facts = rows.device, dict(seed=seed, batch=batch)
    features, logits = (torch.zeros(math.ceil(len(rows) / every), width, device=device)
                        for width in (extractor.dim, extractor.classes))
    moments = Moments(extractor.dim, shift, device)
    for part, img in in_batches(make_images, rows, batch, seed, desc, facts, folder):
        f, z = extract(extractor, img)
        moments.add(f)
        i = torch.arange(len(rows), device=device)[part]
        keep = i % every == 0
        features[i[keep] // every], logits[i[keep] // every] = f[keep], z[keep]
    return all_reduce(features), all_reduce(logits), *moments.result(), facts                 # else a row is zero


def scored(make_images, rows, score, width, batch, seed, desc):
    """(scores (n, width) float64, facts) of the images of `rows`, where score(slice, uint8 images) -> (b, width)."""
    scores = torch.zeros(len(rows), width, dtype=torch.float64, device=rows.device)
    facts = dict(seed=seed, batch=batch)
    for part, img in in_batches(make_images, rows, batch, seed, desc, facts):
        with torch.autocast(img.device.type, enabled=False):
            scores[part] = score(part, img).to(scores)
    return all_reduce(scores), facts                  # each row is zero but on the process that made it


def in_turn(conditions, n):
    """n rows of conditions, 0, 1, ..., then from the first again: every class, or prompt, equally often."""
    return conditions[torch.arange(n, device=conditions.device) % len(conditions)]
