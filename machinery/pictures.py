"""Pictures: tensors to files and sheets."""

import math
import os
import textwrap

from PIL import Image

from machinery.errors import UserError
from machinery.files import replacing


def picture(pixels):
    """uint8 (C, H, W) -> a PIL picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).cpu().numpy())


def save_images(folder, images, kind, **options):
    """uint8 images (3, H, W) as <folder>/00000.<kind>, ... in a new folder: old ones in it would be judged, too."""
    try:
        os.makedirs(folder)
    except OSError as err:
        raise UserError(f"cannot make the folder {folder} ({err.strerror}): images go to a new one, lest they mix")
    for n, img in enumerate(images):
        picture(img).save(os.path.join(folder, f"{n:05d}.{kind}"), **options)


def sheet(rows, path, scale=None, columns=None, words=None):
    """A PNG of labeled rows: [(caption, uint8 images (n, C, H, W)), ...], wrapped after `columns` images.

    Pixels are enlarged `scale` times, never smoothed; by default small images become 96 px high, and ten fit a row.
    words: what the images of every row were asked for, written over each.
    """
    from PIL import ImageDraw, ImageFont

    H, W = rows[0][1].shape[2:]
    scale, gap, caption = scale or max(1, 96 // H), 2, 16
    over, font = 26 if words else 0, ImageFont.load_default(10)
    high, wide = scale * H + gap + over, scale * W + gap
    columns = min(columns or max(2, min(10, 2048 // wide)), max(len(img) for _, img in rows))
    heights = [caption + high * math.ceil(len(img) / columns) for _, img in rows]
    page = Image.new("RGB", (wide * columns + gap, sum(heights) + gap), "white")
    draw, top = ImageDraw.Draw(page), 0
    for (text, img), height in zip(rows, heights):
        draw.text((gap + 1, top + 1), text, "black", ImageFont.load_default(12))
        for i, pixels in enumerate(img):                                                      # (C, H, W)
            tile = picture(pixels).resize((scale * W, scale * H), Image.Resampling.NEAREST)
            x, y = gap + i % columns * wide, top + caption + i // columns * high
            if words:
                lines = textwrap.wrap(words[i], max(8, scale * W // 6), max_lines=2, placeholder=" ...")
                draw.multiline_text((x + 1, y), "\n".join(lines), "black", font, spacing=1)
            page.paste(tile, (x, y + over))
        top += height
    with replacing(path) as f:
        page.save(f, format="PNG", optimize=True)


def spread(everything, n):
    """n of them, in even steps, from the first on; some twice where there are fewer."""
    return [everything[i * len(everything) // n] for i in range(n)]
