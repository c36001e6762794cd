"""Images in folders, and how they are cut."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from machinery.errors import UserError
from machinery.processes import gather


SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def list_images(folder):
    """(class names, file names relative to the folder, class ids), all sorted by name."""
    if not os.path.isdir(folder):
        raise UserError(f"no folder at {folder}")
    classes = sorted(d.name for d in os.scandir(folder) if d.is_dir() and not d.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no subfolders: expected one for each class, as in train/n01440764/*.JPEG")
    names, labels, empty = [], [], []
    for label, name in enumerate(classes):
        found = sorted(os.path.relpath(os.path.join(where, f), folder) for where, _, files
                       in os.walk(os.path.join(folder, name)) for f in files
                       if f.lower().endswith(SUFFIXES) and not f.startswith("."))
        names, labels = names + found, labels + [label] * len(found)
        empty += [] if found else [name]
    if empty:
        raise UserError(f"{len(empty)} of the {len(classes)} class folders in {folder} hold no images "
                        f"({', '.join(empty[:4])}{', ...' if len(empty) > 4 else ''}): fill or remove them")
    return classes, names, labels


def convert(img, mode):
    """Any Pillow image as 8-bit "RGB" or "L": 16-bit gray keeps its high byte, transparency is laid on white."""
    # choice: an EXIF orientation is ignored, as in the teachers' own training pipelines.
    if img.mode.startswith("I"):                      # Pillow itself would clip 16 bits to 255
        img = Image.fromarray((np.asarray(img).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if img.has_transparency_data:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    return img.convert("RGB").convert(mode)           # by way of RGB, since CMYK has no direct path to gray


def center_crop(img, size):
    """Shorter side resized to `size`, then the central square."""
    w, h = (int(size * n / min(img.size)) for n in img.size)
    x, y = round((w - size) / 2), round((h - size) / 2)
    return img.resize((w, h), Image.Resampling.BICUBIC).crop((x, y, x + size, y + size))


def random_crop(img, size, rng, tries=10):
    """A random square of 0.8 to 1 of the area, resized and perhaps mirrored; the central one where none fits."""
    (w, h), side = img.size, min(img.size)
    x, y = (w - side) // 2, (h - side) // 2
    for _ in range(tries):
        drawn = round(math.sqrt(rng.uniform(0.8, 1.0) * w * h))
        if drawn <= side:
            x, y, side = rng.integers(w - drawn + 1), rng.integers(h - drawn + 1), drawn
            break
    img = img.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BICUBIC)
    return mirror(img) if rng.random() < 0.5 else img


def mirror(img):
    return img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def variants(path, i, image, flip, crops, seed):
    """The variants of image i for a teacher of (C, H, W) `image`, uint8 (K, C, H, W), or why it cannot be read."""
    try:
        with Image.open(path) as file:
            img = convert(file, {1: "L", 3: "RGB"}[image[0]])
        views = [center_crop(img, image[1])]
        views += [mirror(views[0])] if flip else []
        # one generator for each crop: the result does not depend on order, threads or interruptions
        views += [random_crop(img, image[1], np.random.default_rng([seed, i, k])) for k in range(crops)]
    except Exception as err:                          # Pillow raises a dozen kinds for a broken file
        return " ".join(f"{type(err).__name__}: {err}".split())
    return np.stack([np.asarray(v).reshape(*image[1:], -1).transpose(2, 0, 1) for v in views])


def folder_images(folder, flag, image=None):
    """(names, make, complain) of a folder and what is below it: make(i (b,)) -> a list of uint8 pictures (C, H, W).

    They are RGB, each of its own size; image (C, H, W): resized and center-cropped to that. What cannot be read counts
    as black until complain() raises, on every process: left out, it would make the statistics those of other images.
    # choice: 16-bit gray keeps its high byte, transparency is laid on white (clean-fid clips the one, drops the other).
    """

    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder}: no such folder; expected one with images in it")
    names = sorted(os.path.join(where, f) for where, _, files in os.walk(folder) for f in files
                   if f.lower().endswith(SUFFIXES) and not f.startswith("."))
    if len(names) < 10:
        raise UserError(f"{flag} {folder}: statistics need 10 images at least, found {len(names)} "
                        f"({', '.join(SUFFIXES)})")
    C, H, W = image or (3, 1, 1)
    unreadable = []

    def read(i):
        try:
            with Image.open(names[i]) as file:
                img = convert(file, {1: "L", 3: "RGB"}[C])
            img = np.array(center_crop(img, H) if image else img)
            return torch.from_numpy(img.reshape(*img.shape[:2], C)).permute(2, 0, 1)
        except Exception as err:                      # Pillow raises a dozen kinds for a broken file
            unreadable.append(" ".join(f"{names[i]} ({type(err).__name__}: {err})".split()))
            return torch.zeros(C, H, W, dtype=torch.uint8)

    def make(rows, **_):
        with ThreadPoolExecutor() as pool:            # Pillow works outside the GIL
            return list(pool.map(read, rows.tolist()))

    def complain():
        if bad := sorted(sum(gather(unreadable), [])):
            raise UserError(f"{flag} {folder}: {len(bad)} of {len(names)} images cannot be read: mend or remove them; "
                            f"the first is {bad[0]}")

    return names, make, complain
