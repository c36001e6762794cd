"""Pictures in folders: found, opened, and cut to a teacher's size.

Every folder of pictures in this repository is one of three kinds, and is listed here:

    list_images      one subfolder per class, as ImageNet has them
    list_pairs       pictures, each with its prompt beside it in NAME.txt
    folder_images    any pictures, at any depth: what FID compares with

A picture that cannot be read raises UserError with the reason, and the caller decides: scripts
that prepare data leave it out and name it, statistics refuse the whole folder.

# choice: 16-bit gray keeps its high byte, transparency is laid on white (clean-fid clips the one
# and drops the other). An EXIF orientation is ignored, as in the teachers' own training pipelines.
"""

import contextlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from tqdm import tqdm

from machinery.errors import UserError, explain
from machinery.processes import gather

SUFFIXES = tuple(".jpeg .jpg .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())
BICUBIC = TF.InterpolationMode.BICUBIC                # Pillow's own: antialiased


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
    labels = {}
    for label, name in enumerate(classes):
        found = find_images(f"{folder}/{name}")
        if not found:
            raise UserError(f"{folder}: the class folder {name} holds no images: fill or remove it")
        labels |= {os.path.relpath(path, folder): label for path in found}
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
@contextlib.contextmanager
def opened(path, channels):
    """The picture in a file, gray or RGB. What goes wrong inside the block becomes a UserError."""
    with explain("{}", Exception), Image.open(path) as file:      # Pillow has a dozen kinds
        yield convert(file, "L" if channels == 1 else "RGB")


def convert(img, mode):
    """Any Pillow image as 8-bit "RGB" or "L"."""
    if img.mode.startswith("I"):                      # Pillow itself would clip 16 bits to 255
        high_byte = np.asarray(img) // 256
        img = Image.fromarray(high_byte.clip(0, 255).astype(np.uint8))
    if img.has_transparency_data:
        white = Image.new("RGBA", img.size, "white")
        img = Image.alpha_composite(white, img.convert("RGBA"))
    return img.convert("RGB").convert(mode)           # CMYK has no direct path to gray


# ---------------------------------------------------------------------------------------- cutting
def center_crop(img, size):
    """The shorter side resized to `size`, then the central square."""
    return TF.center_crop(TF.resize(img, size, BICUBIC), size)


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
    img = TF.resized_crop(img, y, x, side, side, [size, size], BICUBIC)
    return TF.hflip(img) if rng.random() < 0.5 else img


def variants(path, image, flip=False, crops=0, seed=()):
    """An image cut for a teacher of `image` (C, H, W): uint8 (K, C, H, W), K = 1 + flip + crops.

    Crop k has a generator of its own, from (*seed, k): it does not depend on order, threads or
    interruptions. UserError if the file cannot be read.
    """
    channels, size, _ = image
    with opened(path, channels) as img:
        views = [center_crop(img, size)]
        if flip:
            views.append(TF.hflip(views[0]))
        for k in range(crops):
            views.append(random_crop(img, size, np.random.default_rng([*seed, k])))
        stack = torch.stack([TF.pil_to_tensor(view) for view in views])
        return stack.contiguous(memory_format=torch.channels_last)            # as Pillow has it


def read_ahead(read, items, batch, workers):
    """For each batch of items: results of read(item), and (item, reason) where it was a UserError.

    Threads are always one batch ahead of what is yielded: Pillow works outside the GIL. A bar shows
    progress.
    """
    def attempt(item):
        try:
            return read(item), None
        except UserError as err:
            return None, (item, str(err))

    unreadable = 0
    bar = tqdm(total=len(items), unit="image")
    with ThreadPoolExecutor(workers) as pool, bar:
        starts = range(0, len(items) + batch, batch)  # the last begins nothing
        begun = (pool.map(attempt, items[start : start + batch]) for start in starts)
        for now, _ in pairwise(begun):                # the next is begun before this is waited for
            now = list(now)
            skipped = [failure for _, failure in now if failure]
            yield [result for result, failure in now if not failure], skipped
            unreadable += len(skipped)
            bar.set_postfix(skipped=unreadable, refresh=False)
            bar.update(len(now))


# ------------------------------------------------------------------------------------- statistics
def folder_images(folder, flag, image=None):
    """All images of a folder and below it: RGB, each of its own size. A tuple:

    names: paths, sorted; make: indices (b,) -> b pictures, uint8 (C, H, W); complain: raises
    UserError, on every process, if one was unreadable. Until then it counts as black: left out, it
    would make the statistics those of other images.
    image (C, H, W): resized and center-cropped to that.
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
                return TF.pil_to_tensor(center_crop(img, image[1]) if image else img)
        except UserError as err:
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

    return names, make, complain
