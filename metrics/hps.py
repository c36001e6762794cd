"""HPS v2: what people prefer, by a CLIP trained on their choices, on 3,200 prompts in four styles.

Wu et al. 2023. The prompts are the folder `benchmark` of the data set zhwang/HPDv2. A score is
100 cos of image and prompt. HPS v2.0 and v2.1 are different networks, and their scores do not
compare: always say which one it was (here v2.1).
"""

import json

import numpy as np
import torch
from PIL import Image

from machinery.errors import UserError


HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
PER_STYLE = 800                                          # prompts
FILES = (
    "expected HPDv2's folder `benchmark`, "
    "with anime.json, concept-art.json, paintings.json, photo.json"
)


def read_hps(folder):
    """HPDv2's 3,200 prompts from its folder `benchmark`, style after style."""
    prompts = []
    for style in HPS_STYLES:
        path = f"{folder}/{style}.json"
        try:
            with open(path, encoding="utf-8") as f:
                lines = json.load(f)
        except (OSError, ValueError) as err:
            raise UserError(f"cannot read {path} ({err}): {FILES}")
        got = f"{len(lines)} entries" if isinstance(lines, list) else type(lines).__name__
        if got != f"{PER_STYLE} entries" or not all(isinstance(line, str) for line in lines):
            raise UserError(f"{path}: expected a list of {PER_STYLE} strings, got {got}; {FILES}")
        prompts += lines
    return prompts


def as_jpeg(img, path):
    """Write a picture as JPEG; uint8 (3, H, W), what JPEG left of it.

    Quality 75 is PIL's default, and the one that published scores were taken with.
    """
    img.save(path, quality=75)
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def hps_table(scores):
    """What a row says about the scores (3200,), rounded as the package hpsv2 prints them.

    A style's deviation is the one of its ten means, each of 80 consecutive prompts (population),
    not the one of its images.
    """
    blocks = scores.reshape(4, 10, 80).mean(2)           # (style, block)
    average = round(blocks.mean().item(), 2)
    means, stds, words = {}, {}, []
    for style, block in zip(HPS_STYLES, blocks):
        means[style] = round(block.mean().item(), 2)
        stds[style] = round(block.std(correction=0).item(), 4)
        words.append(f"{style} {means[style]:.2f} ({stds[style]:.4f})")
    note = f"HPS v2.1, not comparable with v2.0: {', '.join(words)}, averaged {average:.2f}"
    return {"hps": average, **means, "hps_version": "v2.1", "hps_std": stds, "note": note}
