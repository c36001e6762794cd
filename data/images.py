"""Pictures in folders: found, opened, and cut to a teacher's size.

Every folder of pictures in this repository is one of three kinds, and is listed here:

    list_images      one subfolder per class, as ImageNet has them
    list_pairs       pictures, each with its prompt beside it in NAME.txt
    folder_images    any pictures, at any depth: what FID compares with

A picture that cannot be read raises Unreadable with the reason, and the caller decides: scripts
that prepare data leave it out and name it, statistics refuse the whole folder.

# choice: 16-bit gray keeps its high byte, transparency is laid on white (clean-fid clips the one
# and drops the other). An EXIF orientation is ignored, as in the teachers' own training pipelines.
"""

import contextlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from machinery.errors import UserError
from machinery.processes import gather

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


# ---------------------------------------------------------------------------------------- finding
def is_image(name):
    """Judged by the name alone; hidden files do not count."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def find_images(folder):
    """Paths of all images in a folder and below it, sorted."""
    found = []
    for where, _, files in os.walk(folder):
        found += [os.path.join(where, name) for name in files if is_image(name)]
    return sorted(found)


def list_images(folder):
    """(class names, {image name: class id}) of a folder with one subfolder per class.

    Both are sorted; image names are relative to the folder, and a class id is the class's rank.
    """
    if not os.path.isdir(folder):
        raise UserError(f"no folder at {folder}")
    _, inside, _ = next(os.walk(folder))
    classes = sorted(name for name in inside if not name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no subfolders: expected one for each class, as in "
                        "train/n01440764/*.JPEG")
    labels, empty = {}, []
    for label, name in enumerate(classes):
        found = find_images(os.path.join(folder, name))
        labels |= {os.path.relpath(path, folder): label for path in found}
        if not found:
            empty.append(name)
    if empty:
        some = ", ".join(empty[:4]) + (", ..." if len(empty) > 4 else "")
        raise UserError(f"{len(empty)} of the {len(classes)} class folders in {folder} hold no "
                        f"images ({some}): fill or remove them")
    return classes, labels


def text_beside(name):
    """The name of the file with an image's prompt."""
    return os.path.splitext(name)[0] + ".txt"


def list_pairs(folder):
    """Names of the images in a folder that have a prompt beside them, sorted."""
    files = set(os.listdir(folder)) if os.path.isdir(folder) else ()
    names = sorted(name for name in files if is_image(name) and text_beside(name) in files)
    if not names:
        raise UserError(f"--images {folder}: expected a folder of images, each with its prompt "
                        "beside it in NAME.txt")
    return names


# ---------------------------------------------------------------------------------------- opening
class Unreadable(Exception):
    """Why a picture or its text cannot be used, on one line."""


@contextlib.contextmanager
def opened(path, channels):
    """The picture in a file, gray or RGB. What goes wrong inside the block becomes Unreadable."""
    try:
        with Image.open(path) as file:
            yield convert(file, {1: "L", 3: "RGB"}[channels])
    except Exception as err:                          # Pillow has a dozen kinds for a broken file
        raise Unreadable(" ".join(f"{type(err).__name__}: {err}".split()))


def convert(img, mode):
    """Any Pillow image as 8-bit "RGB" or "L"."""
    if img.mode.startswith("I"):                      # Pillow itself would clip 16 bits to 255
        high_byte = np.asarray(img) // 256
        img = Image.fromarray(high_byte.clip(0, 255).astype(np.uint8))
    if img.has_transparency_data:
        white = Image.new("RGBA", img.size, "white")
        img = Image.alpha_composite(white, img.convert("RGBA"))
    return img.convert("RGB").convert(mode)           # CMYK has no direct path to gray


def pixels(img):
    """A Pillow picture as uint8 (C, H, W)."""
    return np.atleast_3d(np.array(img)).transpose(2, 0, 1)


# ---------------------------------------------------------------------------------------- cutting
def center_crop(img, size):
    """The shorter side resized to `size`, then the central square."""
    w, h = (int(size * n / min(img.size)) for n in img.size)
    x, y = round((w - size) / 2), round((h - size) / 2)
    return img.resize((w, h), Image.Resampling.BICUBIC).crop((x, y, x + size, y + size))


def random_crop(img, size, rng):
    """A random square of 0.8 to 1 of the area, resized, and mirrored with probability 1/2.

    After ten squares that do not fit, it is the central one.
    """
    w, h = img.size
    side = min(w, h)
    x, y = (w - side) // 2, (h - side) // 2
    for _ in range(10):
        drawn = round(math.sqrt(rng.uniform(0.8, 1.0) * w * h))
        if drawn <= side:
            side = drawn
            x, y = rng.integers(w - side + 1), rng.integers(h - side + 1)
            break
    img = img.crop((x, y, x + side, y + side))
    img = img.resize((size, size), Image.Resampling.BICUBIC)
    return ImageOps.mirror(img) if rng.random() < 0.5 else img


def variants(path, image, flip=False, crops=0, seed=()):
    """An image cut for a teacher of `image` (C, H, W): uint8 (K, C, H, W), K = 1 + flip + crops.

    Crop k has a generator of its own, from (*seed, k): it does not depend on order, threads or
    interruptions. Raises Unreadable.
    """
    channels, size, _ = image
    with opened(path, channels) as img:
        views = [center_crop(img, size)]
        if flip:
            views.append(ImageOps.mirror(views[0]))
        for k in range(crops):
            views.append(random_crop(img, size, np.random.default_rng([*seed, k])))
        return np.stack([pixels(view) for view in views])


def read_ahead(read, items, batch, workers, done=0):
    """For each batch of items: results of read(item), and (item, reason) of what is Unreadable.

    Threads are always one batch ahead of what is yielded: Pillow works outside the GIL. A bar shows
    progress; `done` were read before.
    """
    ahead, unreadable = [], 0
    bar = tqdm(total=done + len(items), initial=done, unit="image")
    with ThreadPoolExecutor(workers) as pool, bar:
        for start in range(0, len(items) + batch, batch):
            part = items[start : start + batch]
            now, ahead = ahead, [(item, pool.submit(read, item)) for item in part]
            results, skipped = [], []
            for item, future in now:
                try:
                    results.append(future.result())
                except Unreadable as err:
                    skipped.append((item, str(err)))
            if now:
                yield results, skipped
            unreadable += len(skipped)
            bar.set_postfix(skipped=unreadable, refresh=False)
            bar.update(len(now))


# ------------------------------------------------------------------------------------- statistics
class FolderImages(NamedTuple):
    names: list                                       # paths, sorted
    make: Callable                                    # indices (b,) -> b pictures, uint8 (C, H, W)
    complain: Callable                                # raises UserError if one was unreadable


def folder_images(folder, flag, image=None):
    """All images of a folder and below it as FolderImages: RGB, each of its own size.

    image (C, H, W): resized and center-cropped to that. What cannot be read counts as black until
    complain() raises, on every process: left out, it would make the statistics those of other
    images.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {folder}: no such folder; expected one with images in it")
    names, unreadable = find_images(folder), []
    if len(names) < 10:
        raise UserError(f"{flag} {folder}: statistics need 10 images at least, found {len(names)} "
                        f"({', '.join(SUFFIXES)})")
    black = torch.zeros(image or (3, 1, 1), dtype=torch.uint8)

    def read(i):
        try:
            with opened(names[i], len(black)) as img:
                return torch.from_numpy(pixels(center_crop(img, image[1]) if image else img))
        except Unreadable as err:
            unreadable.append(f"{names[i]} ({err})")
            return black

    def make(rows, **_):
        with ThreadPoolExecutor() as pool:            # Pillow works outside the GIL
            return list(pool.map(read, rows.tolist()))

    def complain():
        bad = sorted(sum(gather(unreadable), []))
        if bad:
            raise UserError(f"{flag} {folder}: {len(bad)} of {len(names)} images cannot be read: "
                            f"mend or remove them; the first is {bad[0]}")

    return FolderImages(names, make, complain)
