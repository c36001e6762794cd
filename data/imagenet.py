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

# choice: the plain images are the paper's ImageNet as we read it: it mentions no augmentation.

Kill it whenever you like; the same command goes on where it stopped. Images that cannot be read are
left out and listed in skipped.txt. The result is the folder that data/tokens.py describes.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, f"{os.path.dirname(__file__)}/..")
from data.images import list_images, read_ahead, variants  # noqa: E402
from data.tokens import (  # noqa: E402
    begin_folder, describe, encode, load_tokenizer, save_array, token_dtype, tokenizer_flags,
    write_lines, write_meta)
from machinery.errors import UserError, explain, guard  # noqa: E402
from machinery.files import ROOT  # noqa: E402
from machinery.flags import nonnegative_int, parser, positive_int  # noqa: E402
from teachers import SPECS  # noqa: E402

SAVE_EVERY = 5.0                                      # seconds of work that a kill may cost


# -------------------------------------------------------------------------------- begin, or go on
def earlier_run(out, meta):
    """The meta.json of an earlier run with these arguments, or None; UserError if they differ."""
    path = Path(f"{out}/meta.json")
    if not path.exists():
        return None
    old = json.loads(path.read_text())
    named = {"files": "another list of images",
             "tokenizer": "other --tokenizer_weights or --random_weights"}
    for key in ("teacher", "tokenizer", "files", "flip", "crops", "seed"):
        if old.get(key) != meta[key]:
            what = named.get(key, f"--{key} {old.get(key)} instead of {meta[key]}")
            raise UserError(
                f"{out} holds tokens made with {what}: give the same arguments to go on, "
                "another --out, or --overwrite to begin anew")
    return old


def allocate(path, shape, dtype):
    """An .npy file of zeros, really written: a full disk shows now, not as a crash hours later."""
    zeros = np.zeros(shape, dtype)                    # takes no memory until it is written to
    megabytes = f"{zeros.nbytes / 1e6:,.1f} MB"
    with explain(f"cannot allocate {megabytes} for {path} ({{}}); no work is lost"):
        save_array(path, zeros)


def write_labels(out, labels, variants, skipped=()):
    """The class of every row: each image has `variants` of them, a skipped one has none."""
    ids = [label for name, label in labels.items() if name not in skipped]
    save_array(f"{out}/labels.npy", np.repeat(ids, variants).astype(np.uint16))


# ----------------------------------------------------------------------------------------- encode
def encode_images(args, tokenizer, names, meta):
    """Fill tokens.npy. meta counts: "done" images looked at, "n" rows written."""
    image = SPECS[args.teacher].image
    tokens = np.load(f"{args.out}/tokens.npy", mmap_mode="r+")

    def read(i):
        path = f"{args.folder}/{names[i]}"
        return variants(path, image, args.flip, args.crops, seed=(args.seed, i))

    def record():
        """Put on disk the tokens first, then the claim that they are there."""
        tokens.flush()
        write_meta(args.out, meta)

    saved = time.time()
    todo = range(meta["done"], len(names))
    for views, skipped in read_ahead(read, todo, args.batch, args.workers):
        if skipped and not os.path.isdir(args.folder):
            raise UserError(f"{args.folder} has disappeared after {meta['done']:,} images; "
                            "the same command goes on")
        if views:
            x = encode(tokenizer, torch.cat(views), args.batch)
            start = meta["n"]
            meta["n"] += len(x)
            tokens[start : meta["n"]] = x
        meta["done"] += len(views) + len(skipped)
        meta["skipped"] += [(names[i], why) for i, why in skipped]
        if time.time() - saved > SAVE_EVERY:
            record()
            saved = time.time()
    record()


def finish(out, labels, meta):
    """Name what was skipped, cut the arrays to what was written, declare the folder complete."""
    n, skipped = meta["n"], dict(meta["skipped"])
    lines = [f"{name}\t{why}" for name, why in skipped.items()]
    if not n:
        for name in ("meta.json", "tokens.npy", "labels.npy"):
            os.remove(f"{out}/{name}")
        raise UserError(f"none of the {len(labels):,} images in {meta['source']} can be read; the "
                        f"first, {lines[0]}")
    story = "none skipped"
    if skipped:
        story = f"{len(skipped)} images unreadable, named in skipped.txt"
        write_lines(f"{out}/skipped.txt", lines)
        write_labels(out, labels, meta["variants"], skipped)
        save_array(f"{out}/tokens.npy", np.load(f"{out}/tokens.npy", mmap_mode="r")[:n])
    write_meta(out, meta | dict(complete=True, skipped=len(skipped)))
    size = os.path.getsize(f"{out}/tokens.npy") / 1e6
    print(f"{out}: {len(labels) - len(skipped):,} images, {n:,} rows, {size:,.1f} MB; {story}")


def main(args):
    out, known = args.out, SPECS[args.teacher].classes
    classes, labels = list_images(args.folder)
    fewer = len(classes) < known and args.allow_other_classes
    if len(classes) != known and not fewer:
        raise UserError(
            f"{args.folder} has {len(classes)} class folders ({', '.join(classes[:3])} ...), "
            f"{args.teacher} knows {known}: the labels would not mean what it learned; with fewer "
            "classes --allow_other_classes goes on all the same")
    tokenizer = load_tokenizer(
        args.teacher, args.tokenizer_weights, args.random_weights, args.device)
    files = hashlib.sha256(os.fsencode("\n".join(labels))).hexdigest()
    meta = describe(tokenizer, args.teacher, os.path.abspath(args.folder)) | dict(
        variants=1 + args.flip + args.crops, flip=args.flip, crops=args.crops, seed=args.seed,
        class_names=classes, files=files, complete=False, done=0, n=0, skipped=[])
    old = None if args.overwrite else earlier_run(out, meta)
    if not old:
        begin_folder(out)
        rows = len(labels) * meta["variants"]
        allocate(f"{out}/tokens.npy", (rows, meta["L"], meta["G"]), token_dtype(meta["V"]))
        write_labels(out, labels, meta["variants"])
    elif old["complete"]:
        print(f"{out} is complete, {old['n']:,} rows; --overwrite makes it anew")
        return
    else:
        meta = old
        print(f"{out}: going on after {meta['done']:,} of {len(labels):,} images")
    encode_images(args, tokenizer, list(labels), meta)
    finish(out, labels, meta)


def flags():
    ap = parser(__doc__)
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
