"""ImageNet, or any folder of one subfolder per class, as tokens of a teacher's own tokenizer.

    python data/imagenet.py /path/to/train --teacher maskbit --out data/imagenet           # the plain images
    python data/imagenet.py /path/to/train --teacher maskbit --flip                        # and mirrored
    python data/imagenet.py /path/to/train --teacher maskbit --crops 4 --out data/crops    # and 4 random crops each

Class ids are the subfolders' ranks by name: ImageNet's WordNet ids, sorted, are what the published teachers learned.
An image becomes one row, or more (its variants, side by side):

    plain    shorter side resized to the teacher's size (Pillow's antialiased bicubic), center crop
    --flip   the same, mirrored
    --crops  K random-resized crops, as the teacher was trained: area 0.8 to 1 of the image, square, mirrored with
             p = 1/2. A square of that area fits only where the sides differ by less than 5:4. Other images, most of
             ImageNet's, fall back to the center square, so their crops are the plain image or its mirror.

Kill it whenever you like; the same command goes on where it stopped. Unreadable images are left out and listed in
skipped.txt. The result is the folder that data/tokens.py describes.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.images import list_images, variants  # noqa: E402
from data.tokens import describe, load_tokenizer, token_dtype  # noqa: E402
from machinery.errors import UserError, guard  # noqa: E402
from machinery.files import replacing  # noqa: E402
from teachers import SPECS  # noqa: E402


HERE = os.path.dirname(os.path.abspath(__file__))
ARRAYS = ("tokens.npy", "labels.npy")
SAVE_EVERY = 5.0                                      # seconds of work that a kill may cost


def allocate(path, dtype, shape):
    """An .npy file of zeros whose blocks are really taken: a full disk shows now, and not as a crash hours later."""
    try:
        rows = np.lib.format.open_memmap(path, "w+", dtype, shape)                            # as yet without blocks
        with open(path, "r+b") as f:
            f.seek(rows.offset)
            for start in range(0, rows.nbytes, 1 << 24):
                f.write(bytes(min(1 << 24, rows.nbytes - start)))
            os.fsync(f.fileno())
    except OSError as err:
        if os.path.exists(path):
            os.remove(path)
        need = math.prod(shape) * np.dtype(dtype).itemsize / 1e6
        raise UserError(f"cannot allocate {need:,.1f} MB for {path} ({err.strerror}); no work is lost")


def begin(out, arrays):
    """A folder with its arrays {path: (dtype, shape)}, all zero; an older result there is no longer valid."""
    os.makedirs(out, exist_ok=True)
    for stale in ("meta.json", "skipped.txt"):
        if os.path.exists(os.path.join(out, stale)):
            os.remove(os.path.join(out, stale))
    for path, (dtype, shape) in arrays.items():
        allocate(path, dtype, shape)


def record(out, meta, arrays):
    """Put on disk the data first, then the claim that they are there."""
    for rows in arrays:
        rows.flush()
    with replacing(os.path.join(out, "meta.json")) as f:
        f.write(json.dumps(meta, indent=1).encode())


def shrink(path, n):
    """Keep the first n rows: skipped images leave no gaps, since rows are appended, but room at the end."""
    rows = np.load(path, mmap_mode="r")
    if len(rows) > n:
        with replacing(path) as f:
            np.save(f, rows[:n])


def earlier_run(out, meta):
    """The meta.json of an earlier run with the same arguments, or None; a UserError names the one that differs."""
    if not all(os.path.exists(os.path.join(out, name)) for name in ("meta.json", *ARRAYS)):
        return None
    with open(os.path.join(out, "meta.json")) as f:
        old = json.load(f)
    other = dict(files="another list of images", tokenizer="other --tokenizer_weights or --random_weights")
    for key in ("teacher", "tokenizer", "files", "flip", "crops", "seed"):
        if old.get(key) != meta[key]:
            what = other.get(key, f"--{key} {old.get(key)} instead of {meta[key]}")
            raise UserError(f"{out} holds tokens made with {what}: give the same arguments to go on, "
                            "another --out, or --overwrite to begin anew")
    return old


def main(args):
    if args.crops < 0 or args.batch < 1 or args.workers < 1:
        raise UserError("expected --crops of 0 or more, --batch and --workers of 1 or more")
    spec = SPECS[args.teacher]
    classes, names, labels = list_images(args.folder)
    if len(classes) > spec.classes or len(classes) < spec.classes and not args.allow_other_classes:
        raise UserError(f"{args.folder} has {len(classes)} class folders ({', '.join(classes[:3])} ...), {args.teacher} "
                        f"knows {spec.classes}: the labels would not mean what it learned"
                        + ("; --allow_other_classes goes on all the same" if len(classes) < spec.classes else ""))
    tokenizer = load_tokenizer(args.teacher, args.tokenizer_weights, args.random_weights).to(args.device)
    K, paths = 1 + args.flip + args.crops, [os.path.join(args.out, name) for name in ARRAYS]

    # begin, or go on: `done` counts images looked at, n rows written
    meta = describe(tokenizer, args.teacher, os.path.abspath(args.folder))
    meta |= dict(variants=K, flip=args.flip, crops=args.crops, seed=args.seed, class_names=classes,
                 files=hashlib.sha256(os.fsencode("\n".join(names))).hexdigest(), complete=False, done=0, n=0, skipped=[])
    old = None if args.overwrite else earlier_run(args.out, meta)
    if old and old["complete"]:
        return print(f"{args.out} is complete, {old['n']:,} rows; --overwrite makes it anew")
    if old:
        meta = old
        print(f"{args.out}: going on after {meta['done']:,} of {len(names):,} images")
    else:
        begin(args.out, {paths[0]: (token_dtype(meta["V"]), (len(names) * K, meta["L"], meta["G"])),
                         paths[1]: (np.uint16, (len(names) * K,))})
    arrays = tokens, classes_of = [np.lib.format.open_memmap(path, "r+") for path in paths]

    def decode(start):                                # begins at once, in threads: Pillow works outside the GIL
        ids = range(start, min(start + args.batch, len(names)))
        return ids, pool.map(lambda i: variants(os.path.join(args.folder, names[i]), i, spec.image, args.flip,
                                                args.crops, args.seed), ids)

    saved = time.time()
    with ThreadPoolExecutor(args.workers) as pool, tqdm(total=len(names), initial=meta["done"], unit="image") as bar:
        ahead = decode(meta["done"])
        while meta["done"] < len(names):
            (ids, batch), ahead = ahead, decode(ahead[0].stop)       # the threads are one batch ahead
            batch = list(batch)
            good = [i for i, item in zip(ids, batch) if not isinstance(item, str)]
            bad = [(names[i], item) for i, item in zip(ids, batch) if isinstance(item, str)]
            if bad and not os.path.isdir(args.folder):
                raise UserError(f"{args.folder} has disappeared after {bar.n:,} images; the same command goes on")
            if good:
                img = torch.from_numpy(np.concatenate([item for item in batch if not isinstance(item, str)]))
                x = torch.cat([tokenizer.encode(part.to(args.device).float() / 255) for part in img.split(args.batch)])
                rows = slice(meta["n"], meta["n"] + len(x))                                   # K for each good image
                tokens[rows], classes_of[rows] = x.cpu().numpy(), np.repeat([labels[i] for i in good], K)
                meta["n"] = rows.stop
            meta["done"] = ids.stop
            meta["skipped"] += bad
            bar.set_postfix(skipped=len(meta["skipped"]), refresh=False)
            bar.update(len(ids))
            if time.time() - saved > SAVE_EVERY or ids.stop == len(names):
                record(args.out, meta, arrays)
                saved = time.time()

    if not meta["n"]:
        for path in (*paths, os.path.join(args.out, "meta.json")):
            os.remove(path)
        raise UserError(f"none of the {len(names):,} images in {args.folder} can be read; the first, "
                        f"{meta['skipped'][0][0]}: {meta['skipped'][0][1]}")
    if meta["skipped"]:
        with replacing(os.path.join(args.out, "skipped.txt")) as f:
            f.writelines(os.fsencode(f"{name}\t{why}\n") for name, why in meta["skipped"])
    for path in paths:
        shrink(path, meta["n"])
    skipped = len(meta["skipped"])
    record(args.out, meta | dict(complete=True, skipped=skipped), ())
    print(f"{args.out}: {len(names) - skipped:,} images, {meta['n']:,} rows, {os.path.getsize(paths[0]) / 1e6:,.1f} MB; "
          + (f"{skipped} images unreadable, named in skipped.txt" if skipped else "none skipped"))


def parser():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", help="one subfolder per class, images in them")
    ap.add_argument("--teacher", default="maskbit", choices=[k for k, spec in SPECS.items() if spec.classes],
                    help="whose tokenizer, size and classes (%(default)s)")
    ap.add_argument("--out", default=os.path.join(HERE, "imagenet"), help="folder to write")
    ap.add_argument("--flip", action="store_true", help="add every image mirrored")
    ap.add_argument("--crops", type=int, default=0, metavar="K", help="add K random-resized crops of every image")
    ap.add_argument("--seed", type=int, default=0, help="of the crops")
    ap.add_argument("--allow_other_classes", action="store_true", help="fewer classes than the teacher's are no error")
    ap.add_argument("--overwrite", action="store_true", help="begin anew in a folder that already holds tokens")
    ap.add_argument("--tokenizer_weights", metavar="PATH", help="local file instead of the published one")
    ap.add_argument("--random_weights", action="store_true", help="untrained tokenizer, to try speed before a download")
    ap.add_argument("--batch", type=int, default=64, help="images the tokenizer takes at a time")
    ap.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that decode images")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return ap


if __name__ == "__main__":
    guard(lambda: main(parser().parse_args()), cannot_write="what is encoded is kept, the same command goes on")
