"""The tokenizer alone: real images against decode(encode(them)). It bounds every student (App. D).

rFID compares with a given real side, or with the very images before. PSNR is of the mean squared
error over all images.
"""

import math
import os

import torch

from data.images import text_beside
from data.prompts import read_prompts
from machinery.files import fingerprint
from machinery.processes import gather
from metrics.engine import extracted
from metrics.fid import image_metrics
from metrics.reference import Reference
from teachers import decode_tokens, to_bytes


def captions_beside(names, teacher):
    """Rows of teacher.conditions: the caption of NAME.png is in NAME.txt beside it, or ""."""
    paths = map(text_beside, names)
    return teacher.conditions([read_prompts(path)[0] if os.path.exists(path) else ""
                               for path in paths])


def reconstruction(teacher, source, images, n, extractor, reference, batch, device):
    """Rows for n images of a source (None: all), evenly spread, and for what becomes of them.

    images: (names, make, complain) as of data.images.folder_images, all of the teacher's size; a
    decoder that listens is told what is written beside them. Without a Reference the first row
    becomes one.
    """
    names, make, complain = images
    n = n or len(names)
    asked = torch.arange(len(names), device=device)[:: max(1, len(names) // n)][:n]
    captions = captions_beside(names, teacher) if teacher.text else None
    squares = []                                      # a sum of squared errors per batch

    def real(i, **_):
        return torch.stack([*make(i)]).to(device)

    def rebuilt(i, **_):
        img = real(i)
        x = teacher.tokenizer.encode(img / 255)
        cond = teacher.cond(captions[i]) if teacher.text else ()
        back = to_bytes(decode_tokens(teacher.tokenizer, x, cond), teacher.spec)
        squares.append((back.double() - img).square().sum().item())
        return back

    def row(model, make_images):
        metrics = image_metrics(make_images, asked, extractor, reference, batch, desc=model)
        complain()
        return {"model": model, "kind": "real", "teacher": teacher.spec.name,
                "tokenizer": fingerprint(teacher.tokenizer), **metrics}

    if reference:
        yield row(f"real {source}", real)
    else:
        before = extracted(real, asked, extractor, batch=batch, desc=f"real {source}")
        complain()
        name = f"the same {len(asked):,} images before"
        reference = Reference(before.mu, before.sigma, before.features, name)
    found = row(f"{source} reconstructed", rebuilt)
    error = sum(gather(sum(squares))) / (len(asked) * math.prod(teacher.spec.image))
    yield found | {"psnr": 10 * math.log10(255**2 / error)}
