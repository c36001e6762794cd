"""The tokenizer alone: real images against decode(encode(them)). It bounds every student (App. D).

rFID compares with a given real side, or with the very images before. PSNR is of the mean squared
error over all images.
"""

import math
import os
from typing import Callable, NamedTuple

import torch

from data.images import folder_images, text_beside
from data.prompts import read_prompts
from machinery.files import fingerprint
from machinery.processes import gather
from metrics.engine import extracted
from metrics.fid import image_metrics
from metrics.reference import Reference
from teachers import decode_tokens, to_bytes


class Source(NamedTuple):
    """Real images of a teacher's size."""

    name: str
    n: int
    read: Callable                # read(i (b,)) -> uint8 images (C, H, W)
    complain: Callable | None = None              # raises where some could not be read
    captions: torch.Tensor | None = None          # of teacher.conditions, for decoders that listen


def folder_source(folder, teacher):
    """A folder's images, resized and center-cropped to the teacher's size.

    The caption of NAME.png is in NAME.txt beside it, or "".
    """
    names, make, complain = folder_images(folder, "--real", teacher.spec.image)
    captions = None
    if teacher.text:
        paths = map(text_beside, names)
        captions = teacher.conditions([read_prompts(path)[0] if os.path.exists(path) else ""
                                       for path in paths])
    return Source(folder, len(names), make, complain, captions)


def reconstruction(teacher, source, n, extractor, reference, batch, device):
    """Rows for n images of a source (None: all), evenly spread, and for what becomes of them.

    Without a Reference the first row becomes one.
    """
    n = n or source.n
    asked = torch.arange(source.n, device=device)[:: max(1, source.n // n)][:n]
    squares = []                                      # a sum of squared errors per batch

    def real(i, **_):
        return torch.stack([*source.read(i)]).to(device)

    def rebuilt(i, **_):
        img = real(i)
        x = teacher.tokenizer.encode(img / 255)
        cond = () if source.captions is None else teacher.cond(source.captions[i])
        back = to_bytes(decode_tokens(teacher.tokenizer, x, cond), teacher.spec)
        squares.append((back.double() - img).square().sum().item())
        return back

    def row(model, make_images):
        metrics = image_metrics(make_images, asked, extractor, reference, batch, desc=model)
        if source.complain:
            source.complain()
        return {"model": model, "kind": "real", "teacher": teacher.spec.name,
                "tokenizer": fingerprint(teacher.tokenizer), **metrics}

    if reference:
        yield row(f"real {source.name}", real)
    else:
        before = extracted(real, asked, extractor, batch=batch, desc=f"real {source.name}")
        name = f"the same {len(asked):,} images before"
        reference = Reference(before.mu, before.sigma, before.features, name)
    found = row(f"{source.name} reconstructed", rebuilt)
    error = sum(gather(sum(squares))) / (len(asked) * math.prod(teacher.spec.image))
    yield found | {"psnr": 10 * math.log10(255**2 / error)}
