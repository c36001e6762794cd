"""Images drawn batch by batch, over all processes, and what they are turned into: features, scores.

Batch i draws from a generator seeded by (seed, i), and whole batches go to the processes in turn.
So the images, their order, and every number are the same on any number of processes. (They do
depend on the size of a batch.)

`asked` is what to draw: rows of teacher.conditions, one per image. `make_images` draws it:
make_images(asked (b, ...), generator=, seconds=) -> uint8 images (b, C, H, W); bind everything
else with functools.partial. An extractor maps images in [0, 1] to (features (b, dim),
logits (b, classes)): FashionNet in the tiny world, Inception, with the resize inside it, everywhere
else.
"""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from machinery.pictures import picture, save_images
from machinery.processes import all_reduce, barrier, is_main, rank, true_float32, world_size


# ---------------------------------------------------------------------------------------- drawing
def in_turn(conditions, n):
    """n rows of conditions, 0, 1, ..., then from the first again: each equally often."""
    return conditions[torch.arange(n, device=conditions.device) % len(conditions)]


def usual_batch(teacher):
    """As many images as have 16,384 tokens, 250 at most."""
    return min(250, 2**14 // teacher.net.L)


@torch.no_grad()
def scored(make_images, asked, score, width, batch=250, seed=0, desc=None, folder=None,
           every=1):
    """Draw all images and score them: (scores (n, width) float64, facts), on every process.

    score(slice of `asked`, uint8 images) -> (b, width). facts, for the row of results, has the
    speed of all processes together, in images per second, with and without the decoder.
    desc names the progress bar; without, there is none. folder: a new one, for the images as PNG.
    every: the scores of each `every`-th image alone are kept, in order to save memory.
    """
    if folder and is_main():
        save_images(folder, (), "png")
    barrier()                                         # the others write into the folder, too
    device = asked.device
    scores = torch.zeros(
        len(asked[::every]), width, dtype=torch.float64, device=device)
    seconds, timed = Counter(), 0
    mine = range(rank(), math.ceil(len(asked) / batch), world_size())
    bar = tqdm(mine, desc, unit="batch", leave=False, disable=not (desc and is_main()))
    for i in bar:
        if i == rank() + world_size():                # the first batch only warmed everything up
            seconds, timed = Counter(), 0
        part = slice(i * batch, (i + 1) * batch)
        own_seed = np.random.SeedSequence((seed, i)).generate_state(1).item()
        generator = torch.Generator(device).manual_seed(own_seed)
        img = make_images(asked[part], generator=generator, seconds=seconds)
        timed += len(img)
        if folder:
            for n, pixels in enumerate(img, part.start):
                picture(pixels).save(f"{folder}/{n:05d}.png")
        with torch.autocast(device.type, enabled=False):
            kept = score(part, img)[-part.start % every :: every]
        start = math.ceil(part.start / every)
        scores[start : start + len(kept)] = kept.to(scores)

    rates = [timed / (s or math.inf) for s in (seconds.total(), seconds["tokens"])]
    images, tokens = all_reduce(scores.new_tensor(rates)).tolist()
    facts = {
        "seed": seed, "batch": batch, "images/s": images or None,
        "tokens_only/s": tokens or None, "processes": world_size(),
    }
    return all_reduce(scores), facts         # a row is zero but on the process that made it


# --------------------------------------------------------------------------------------- features
class Moments:
    """Mean and covariance of features that come in batches, on several processes.

    The float64 sums run about `shift`, a point near the mean that all processes share (here the
    reference's mean): E[f f^T] - mu mu^T loses digits where means are large against the spread.
    """

    def __init__(self, dim, shift=0.0, device="cpu"):
        self.shift = torch.as_tensor(shift, dtype=torch.float64, device=device)
        self.count = self.shift.new_zeros(())
        self.sum = self.shift.new_zeros(dim)
        self.outer = self.shift.new_zeros(dim, dim)

    def add(self, f):
        f = f.double() - self.shift                   # (B, dim)
        self.count += len(f)
        self.sum += f.sum(0)
        self.outer += f.T @ f

    def result(self):
        """mu (dim,) and the unbiased covariance (dim, dim) over all processes, float64 arrays."""
        sums = self.count, self.sum, self.outer
        n, total, outer = (all_reduce(t.clone()) for t in sums)
        mean = total / n
        sigma = (outer - n * mean[:, None] * mean) / (n - 1)
        return (mean + self.shift).cpu().numpy(), sigma.cpu().numpy()


@torch.no_grad()
def extract(extractor, img):
    """(features, logits) of uint8 images (B, C, H, W), or of a list of them of unequal sizes.

    In float32, without TF32.
    """
    device = next(extractor.parameters()).device
    with true_float32():
        if isinstance(img, list):
            return extractor([pixels.to(device) / 255 for pixels in img])
        return extractor(img.to(device) / 255)


class Extracted(NamedTuple):
    """What metrics need of a set of images, from all processes together."""

    features: torch.Tensor        # (n, dim)
    logits: torch.Tensor          # (n, classes)
    mu: np.ndarray                # (dim,)
    sigma: np.ndarray             # (dim, dim)
    facts: dict                   # seed, batch and speed, for the row of results


def extracted(make_images, asked, extractor, shift=0.0, batch=250, seed=0, **how):
    """The Extracted of all images; how: see `scored`, whose `every` thins features and logits."""
    moments = Moments(extractor.dim, shift, asked.device)
    widths = extractor.dim, extractor.classes

    def score(part, img):
        features, logits = extract(extractor, img)
        moments.add(features)
        return torch.cat([features, logits], 1)

    both, facts = scored(make_images, asked, score, sum(widths), batch, seed, **how)
    return Extracted(*both.split(widths, 1), *moments.result(), facts)
