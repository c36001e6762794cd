"""ImageNet, or any folder of one subfolder per class, as tokens of a teacher's own tokenizer.

    python data/imagenet.py /path/to/train --teacher maskbit              # the plain images
    python data/imagenet.py /path/to/train --teacher maskbit --flip       # and mirrored
    python data/imagenet.py /path/to/train --teacher maskbit --crops 4    # and 4 crops each

Class ids are the subfolders' ranks by name: ImageNet's WordNet ids, sorted, are what the published
teachers learned. An image becomes one row of tokens, or more (its variants, side by side):

    plain    shorter side resized to the teacher's size (Pillow's antialiased bicubic), center crop
    --flip   the same, mirrored
    --crops  K random-resized crops, as the teacher was trained: area 0.8 to 1 of the image, square,
             mirrored with p = 1/2. A square of that area fits only where the sides differ by less
             than 5:4. Other images, most of ImageNet's, fall back to the center square, so their
             crops are the plain image or its mirror.

Kill it whenever you like; the same command goes on where it stopped. Images that cannot be read are
left out and listed in skipped.txt. The result is the folder that data/tokens.py describes.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from data.images import list_images, read_ahead, variants  # noqa: E402
from data.tokens import (  # noqa: E402
    begin_folder, describe, encode, token_dtype, tokenizer_flags, tokenizer_of, write_lines,
    write_meta)
from machinery.errors import UserError, guard  # noqa: E402
from machinery.files import ROOT, replacing  # noqa: E402
from machinery.flags import nonnegative_int, positive_int  # noqa: E402
from teachers import SPECS  # noqa: E402

ARRAYS = ("tokens.npy", "labels.npy")
SAVE_EVERY = 5.0                                      # seconds of work that a kill may cost


# ------------------------------------------------------------------------------- arrays that grow
def allocate(path, dtype, shape):
    """An .npy file of zeros, really written: a full disk shows now, not as a crash hours later."""
    zeros = np.zeros(shape, dtype)                    # takes no memory until it is written to
    try:
        with replacing(path) as f:
            np.save(f, zeros)
    except OSError as err:
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise UserError(f"cannot allocate {zeros.nbytes / 1e6:,.1f} MB for {path} "
                        f"({err.strerror or err}); no work is lost")


def shrink(path, n):
    """Keep the first n rows: what skipped images leave free is at the end."""
    rows = np.load(path, mmap_mode="r")
    if len(rows) > n:
        with replacing(path) as f:
            np.save(f, rows[:n])


# -------------------------------------------------------------------------------- begin, or go on
def check_classes(classes, args):
    """UserError where class ids would not mean what the teacher learned."""
    known = SPECS[args.teacher].classes
    if len(classes) == known or len(classes) < known and args.allow_other_classes:
        return
    hint = "; --allow_other_classes goes on all the same" if len(classes) < known else ""
    raise UserError(
        f"{args.folder} has {len(classes)} class folders ({', '.join(classes[:3])} ...), "
        f"{args.teacher} knows {known}: the labels would not mean what it learned{hint}")


def earlier_run(out, meta):
    """The meta.json of an earlier run with these arguments, or None; UserError if they differ."""
    if not all(os.path.exists(f"{out}/{name}") for name in ("meta.json", *ARRAYS)):
        return None
    old = json.loads(Path(f"{out}/meta.json").read_text())
    named = {"files": "another list of images",
             "tokenizer": "other --tokenizer_weights or --random_weights"}
    for key in ("teacher", "tokenizer", "files", "flip", "crops", "seed"):
        if old.get(key) != meta[key]:
            what = named.get(key, f"--{key} {old.get(key)} instead of {meta[key]}")
            raise UserError(
                f"{out} holds tokens made with {what}: give the same arguments to go on, "
                "another --out, or --overwrite to begin anew")
    return old


# ----------------------------------------------------------------------------------------- encode
def encode_images(args, tokenizer, labels, meta):
    """Fill the arrays. meta counts: "done" images looked at, "n" rows written."""
    names, image = list(labels), SPECS[args.teacher].image
    tokens, classes = [np.load(f"{args.out}/{name}", mmap_mode="r+") for name in ARRAYS]

    def read(i):
        path, seed = os.path.join(args.folder, names[i]), (args.seed, i)
        return variants(path, image, args.flip, args.crops, seed), labels[names[i]]

    def record():
        """Put on disk the data first, then the claim that they are there."""
        tokens.flush()
        classes.flush()
        write_meta(args.out, meta)

    saved = time.time()
    todo = range(meta["done"], len(names))
    for good, skipped in read_ahead(read, todo, args.batch, args.workers, meta["done"]):
        if skipped and not os.path.isdir(args.folder):
            raise UserError(f"{args.folder} has disappeared after {meta['done']:,} images; "
                            "the same command goes on")
        if good:
            views, label = zip(*good)
            x = encode(tokenizer, np.concatenate(views), args.batch)
            rows = slice(meta["n"], meta["n"] + len(x))
            tokens[rows] = x
            classes[rows] = np.repeat(label, meta["variants"])
            meta["n"] = rows.stop
        meta["done"] += len(good) + len(skipped)
        meta["skipped"] += [(names[i], why) for i, why in skipped]
        if time.time() - saved > SAVE_EVERY:
            record()
            saved = time.time()
    record()


def finish(args, meta):
    """Name what was skipped, cut the arrays to what was written, declare the folder complete."""
    count, skipped = meta["done"], meta["skipped"]
    if not meta["n"]:
        for name in ("meta.json", *ARRAYS):
            os.remove(f"{args.out}/{name}")
        name, why = skipped[0]
        raise UserError(f"none of the {count:,} images in {args.folder} can be read; the first, "
                        f"{name}: {why}")
    write_lines(f"{args.out}/skipped.txt", [f"{name}\t{why}" for name, why in skipped])
    for name in ARRAYS:
        shrink(f"{args.out}/{name}", meta["n"])
    write_meta(args.out, meta | dict(complete=True, skipped=len(skipped)))
    story = f"{len(skipped)} images unreadable, named in skipped.txt" if skipped else "none skipped"
    size = os.path.getsize(f"{args.out}/tokens.npy") / 1e6
    print(f"{args.out}: {count - len(skipped):,} images, {meta['n']:,} rows, {size:,.1f} MB; "
          f"{story}")


def main(args):
    classes, labels = list_images(args.folder)
    check_classes(classes, args)
    tokenizer = tokenizer_of(args)
    meta = describe(tokenizer, args.teacher, os.path.abspath(args.folder))
    files = hashlib.sha256(os.fsencode("\n".join(labels))).hexdigest()
    meta |= dict(
        variants=1 + args.flip + args.crops, flip=args.flip, crops=args.crops, seed=args.seed,
        class_names=classes, files=files, complete=False, done=0, n=0, skipped=[],
    )
    old = None if args.overwrite else earlier_run(args.out, meta)
    if old and old["complete"]:
        print(f"{args.out} is complete, {old['n']:,} rows; --overwrite makes it anew")
        return
    if old:
        meta = old
        print(f"{args.out}: going on after {meta['done']:,} of {len(labels):,} images")
    else:
        begin_folder(args.out)
        rows = len(labels) * meta["variants"]
        shape = rows, meta["L"], meta["G"]
        allocate(f"{args.out}/tokens.npy", token_dtype(meta["V"]), shape)
        allocate(f"{args.out}/labels.npy", np.uint16, (rows,))
    encode_images(args, tokenizer, labels, meta)
    finish(args, meta)


def flags():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument
    add("folder", help="one subfolder per class, images in them")
    add("--out", default=f"{ROOT}/data/imagenet", help="folder to write (%(default)s)")
    add("--flip", action="store_true", help="add every image mirrored")
    add("--crops", type=nonnegative_int, default=0, metavar="K",
        help="add K random-resized crops of every image (%(default)s)")
    add("--seed", type=nonnegative_int, default=0, help="seed of the crops (%(default)s)")
    add("--allow_other_classes", action="store_true",
        help="go on where there are fewer classes than the teacher knows")
    add("--overwrite", action="store_true", help="begin anew in a folder that already holds tokens")
    add("--workers", type=positive_int, default=min(8, os.cpu_count() or 1),
        help="threads that decode images (%(default)s)")
    tokenizer_flags(ap, [name for name, spec in SPECS.items() if spec.classes], "maskbit")
    return ap


if __name__ == "__main__":
    guard(lambda: main(flags().parse_args()),
          cannot_write="what is encoded is kept, the same command goes on")
