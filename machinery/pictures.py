"""Pictures: uint8 tensors as PIL pictures, as a folder of files, as one labeled sheet; and curves.
"""

import functools
import itertools
import math
import os
import textwrap

from PIL import Image, ImageDraw

from machinery.errors import explain
from machinery.files import replacing

GAP = 2                                               # pixels between the images of a sheet
CAPTION = 16                                          # height of the line above a strip, in pixels
WORDS = 26                                            # height of the two lines above an image


def picture(pixels):
    """uint8 (C, H, W) -> a PIL picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).cpu().numpy())


def save_images(folder, images, kind, **options):
    """Write uint8 images (C, H, W) as <folder>/00000.<kind>, ...; the folder must be new."""
    with explain(f"cannot make the folder {folder} ({{}}): images go to a new one, since old "
                 "images in it would be judged, too"):
        os.makedirs(folder)
    for n, img in enumerate(images):
        picture(img).save(f"{folder}/{n:05d}.{kind}", **options)


def sheet(strips, path, columns=None, words=None):
    """Write a PNG of labeled strips [(caption, uint8 images (n, C, H, W)), ...], all of one size.

    Small images become 96 px high, by enlarging pixels and not by smoothing. A strip is wrapped
    after `columns` images, by default after ten or 2048 px.
    words: what the images of every strip were asked for, written above each.
    """
    H, W = strips[0][1].shape[2:]
    scale = max(1, 96 // H)
    H, W = scale * H, scale * W
    above = WORDS if words else 0
    high, wide = H + GAP + above, W + GAP
    most = max(len(images) for _, images in strips)
    columns = min(most, columns or max(2, min(10, 2048 // wide)))
    height = sum(CAPTION + high * math.ceil(len(images) / columns) for _, images in strips)

    page = Image.new("RGB", (wide * columns + GAP, height + GAP), "white")
    draw = ImageDraw.Draw(page)
    top = 0
    for caption, images in strips:
        draw.text((GAP + 1, top + 1), caption, "black", font_size=12)
        for i, pixels in enumerate(images):
            x = GAP + i % columns * wide
            y = top + CAPTION + i // columns * high
            if words:
                text = textwrap.fill(words[i], W // 6, max_lines=2, placeholder=" ...")
                draw.multiline_text((x + 1, y), text, "black", spacing=1, font_size=10)
            page.paste(picture(pixels).resize((W, H), Image.Resampling.NEAREST), (x, y + above))
        top = y + high
    with replacing(path) as f:
        page.save(f, format="PNG", optimize=True)


def spread(everything, n):
    """n of them, in even steps from the first on; some come twice where there are fewer."""
    return [everything[i * len(everything) // n] for i in range(n)]


# ----------------------------------------------------------------------------------------- curves
PANEL = 400, 230                                      # width and height of a plot, in pixels
LEFT, TOP, RIGHT, BOTTOM = 64, 26, 16, 24             # its margins, with title and numbers
COLORS = "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f".split()


def curves(panels, path, columns=3):
    """Write a PNG of small plots {title: {name: [(x, y), ...]}}. All show the same range of x."""
    W, H = PANEL
    rows = math.ceil(len(panels) / columns)
    size = columns * W, rows * H
    page = Image.new("RGB", size, "white")
    xs = [x for lines in panels.values() for line in lines.values() for x, _ in line]
    first = min(xs)
    last = max(xs)
    for i, (title, lines) in enumerate(panels.items()):
        corner = i % columns * W, i // columns * H
        page.paste(plot(title, lines, first, last), corner)
    with replacing(path) as f:
        page.save(f, format="PNG", optimize=True)


def plot(title, lines, first, last):
    """One plot of `curves`, for x from first to last, as a PIL picture."""
    page = Image.new("RGB", PANEL, "white")
    draw = ImageDraw.Draw(page)
    number = functools.partial(draw.text, fill="black", font_size=11)
    W, H = PANEL
    right = W - RIGHT
    bottom = H - BOTTOM
    ys = [y for line in lines.values() for _, y in line]
    low = min(ys)
    high = max(ys)

    def place(x, y):
        along = (x - first) / (last - first or 1)
        up = (y - low) / (high - low or 1)
        x = LEFT + along * (right - LEFT)
        y = bottom - up * (bottom - TOP)
        return x, y

    for y in {low, (low + high) / 2, high}:
        _, height = place(first, y)
        draw.line([(LEFT, height), (right, height)], "#dddddd")
        number((LEFT - 6, height), f"{y:.3g}", anchor="rm")
    number((LEFT, bottom + 5), f"{first:g}")
    number((right, bottom + 5), f"{last:g}", anchor="ra")

    words = [(title, "black")]
    for (name, line), color in zip(lines.items(), itertools.cycle(COLORS)):
        points = [place(x, y) for x, y in line]
        draw.line(points, color)
        x, y = points[-1]
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], color)        # seen also where it is alone
        if len(lines) > 1:
            words.append((name, color))

    at = LEFT
    for text, color in words:
        draw.text((at, 8), text, color, font_size=12)
        at += draw.textlength(text, font_size=12) + 10
    return page
