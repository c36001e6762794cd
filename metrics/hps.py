"""HPS v2."""

import json
import os

import torch

from machinery.errors import UserError
from machinery.pictures import save_images


HPS_STYLES = ("anime", "concept-art", "paintings", "photo")      # 800 prompts each
JPEG = dict(quality=75)


def write_hps(root, style, images):
    """<root>/<style>/<00000>.jpg, where hpsv2.evaluate looks: uint8 images (3, H, W), in the order of the prompts.

    JPEG of quality 75 is PIL's default, and so what published scores were taken from.
    """
    if style not in HPS_STYLES:
        raise ValueError(f"unknown style {style!r}: expected one of {', '.join(HPS_STYLES)}")
    save_images(os.path.join(root, style), images, "jpg", **JPEG)


def hps_benchmark(scores_by_style):
    """{style: (mean, deviation), "averaged": mean of all} of 100 cos, 800 a style, rounded as hpsv2 prints them.

    The deviation is that of ten means, of 80 consecutive prompts each (population), not of images. Without all four
    styles "averaged" is None. HPS v2.0 and v2.1 are different networks: say which one it was.
    """
    table, every = {}, []
    for style, scores in scores_by_style.items():
        if len(scores) != 800:
            raise UserError(f"HPS v2, {style}: expected 800 scores, one a prompt, got {len(scores)}")
        every.append(torch.as_tensor(scores, dtype=torch.float64).reshape(10, 80).mean(1))
        table[style] = round(every[-1].mean().item(), 2), round(every[-1].std(correction=0).item(), 4)
    whole = set(table) == set(HPS_STYLES)
    return {**table, "averaged": round(torch.cat(every).mean().item(), 2) if whole else None}


def read_hps(folder):
    """{style: its 800 prompts}, from the folder `benchmark` of the data set HPDv2."""
    prompts, wanted = {}, f"expected HPDv2's folder `benchmark`, with {', '.join(f'{s}.json' for s in HPS_STYLES)}"
    for path in (os.path.join(folder, f"{style}.json") for style in HPS_STYLES):
        try:
            with open(path, encoding="utf-8") as f:
                lines = json.load(f)
        except (OSError, ValueError) as err:
            raise UserError(f"cannot read {path} ({err}): {wanted}")
        if not (isinstance(lines, list) and len(lines) == 800 and all(isinstance(line, str) for line in lines)):
            got = f"{len(lines)} entries" if isinstance(lines, list) else type(lines).__name__
            raise UserError(f"{path}: expected a list of 800 strings, got {got}; {wanted}")
        prompts[os.path.basename(path)[:-5]] = lines
    return prompts
