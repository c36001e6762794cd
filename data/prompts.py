"""Prompts to distill from, one per line; or images with their captions, as real tokens for the GAN.

    python data/prompts.py captions.parquet --min_score 6                  # data/prompts.txt
    python data/prompts.py a.jsonl b.csv --column caption --limit 100000   # several, one list
    python data/prompts.py --images /path/to/pairs --teacher maskgen       # data/pairs/

A text teacher is distilled from prompts alone, train.py --prompts FILE. For Meissonic, Di[M]O takes
the captions of LAION-Aesthetics with a score of 6 or more: published elsewhere, as parquet, one row
per image, with columns such as TEXT or caption, and AESTHETIC_SCORE; bring your own copy. Names of
files say what is in them:

    .txt         a prompt per line
    .csv .tsv    the first line names the fields
    .json        a list of strings or of records, or as .jsonl
    .jsonl       a string or a record per line
    .parquet     needs pyarrow

A prompt becomes one line: white space of any kind is one blank, control characters are gone. Empty,
long and repeated prompts are left out, and the order is kept. What is broken is named by file and
line; --skip_broken leaves it out and counts it.

The GAN needs real images too, train.py --gan --data FOLDER: for MaskGen, images by DALL-E 3 with
their captions, of which lists are published elsewhere as well. --images takes a folder of images,
each with its prompt beside it in NAME.txt, and writes the folder that data/tokens.py describes: a
label is a line of its prompts.txt. What cannot be read is listed in skipped.txt. A folder without
meta.json is unfinished; the command makes it anew.
"""

import csv
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, f"{os.path.dirname(__file__)}/..")
from data.images import list_pairs, read_ahead, text_beside, variants  # noqa: E402
from data.tokens import (  # noqa: E402
    describe, encode, load_tokenizer, tokenizer_flags, write_folder, write_lines)
from machinery.errors import UserError, explain, guard  # noqa: E402
from machinery.files import ROOT, local  # noqa: E402
from machinery.flags import number, parser, positive_int  # noqa: E402
from teachers import SPECS  # noqa: E402

CAPTIONS = "caption TEXT text prompt".split()
SCORES = "AESTHETIC_SCORE aesthetic aesthetic_score".split()

# Not white space, which becomes a blank; nor what joins emoji or turns the direction of writing.
CONTROL = r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]"


# ------------------------------------------------------------------------------------- one prompt
def clean(text):
    """The text on one line, without control characters."""
    return " ".join(re.sub(CONTROL, "", text).split())


def read_prompts(path, flag="--prompts", numbered=False):
    """The prompts of a text file, one per line; empty lines are left out, if numbered refused."""
    expected = "expected a text file, one prompt per line"
    with explain(f"{flag} {path}: cannot read ({{}}); {expected}"):
        lines = Path(local(path)).read_text("utf-8").rstrip().split("\n")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{flag} {path}: no prompt in it; {expected}")
    if numbered and len(prompts) < len(lines):
        raise UserError(f"{flag} {path}: there is an empty line in it; expected a caption on every "
                        "line, because image i belongs to line i")
    return prompts


# ---------------------------------------------------------------------------------------- sources
# A reader yields (where, entry) for all that is in a file. An entry is a string, a record (dict),
# or a UserError: what is there is broken, and the reader can go on after it. Bytes that are not
# UTF-8 pass as surrogates and are named later, by find_prompt: a decoder that raises cannot go on.
# `wanted` are the fields that may be asked for.
TEXT = dict(encoding="utf-8-sig", errors="surrogateescape")


def read_text(path, wanted):
    with open(path, **TEXT) as f:
        for n, line in enumerate(f, 1):
            yield f"line {n}", line


def read_table(path, wanted):
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    with open(path, newline="", **TEXT) as f:
        table = csv.reader(f, delimiter=delimiter, strict=True)
        with explain(f"{path}, line 1: {{}}, where the names of the fields should be", csv.Error):
            names = next(filter(None, table), [])                 # the first line that is not empty
        names = [name.strip() for name in names]
        while True:
            where = f"line {table.line_num + 1}"                  # where a row begins
            try:
                row = next(table)
            except StopIteration:
                return
            except csv.Error as err:
                yield where, UserError(f"not a row of fields ({err})")
                continue
            if len(row) == len(names):
                yield where, dict(zip(names, row))
            elif row:                                             # and not an empty line
                yield where, UserError(f"{len(row)} fields instead of {len(names)}")


NOT_JSON = (ValueError, RecursionError)               # also numbers and nestings beyond all bounds


def read_json_lines(path, wanted):
    for where, line in read_text(path, wanted):
        if line.strip():
            try:
                yield where, json.loads(line)
            except NOT_JSON as err:
                yield where, UserError(f"invalid JSON ({getattr(err, 'msg', err)})")


def read_json(path, wanted):
    with open(path, **TEXT) as f:
        if not f.read(1000).lstrip().startswith("["):
            yield from read_json_lines(path, wanted)
            return
        f.seek(0)
        with explain(f"{path}: invalid JSON ({{}})", *NOT_JSON):  # there is nothing to go on with
            items = json.load(f)
    for n, item in enumerate(items, 1):
        yield f"item {n}", item


def read_parquet(path, wanted):
    with explain(f"{path}: reading parquet needs pyarrow: pip install pyarrow", ImportError):
        import pyarrow.parquet
    n = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as f:
            names = f.schema_arrow.names
            columns = [name for name in names if name in wanted]  # others may hold whole images
            for batch in f.iter_batches(columns=columns or names):
                for record in batch.to_pylist():
                    n += 1
                    yield f"row {n}", record
    except (OSError, ValueError, pyarrow.ArrowException) as err:
        raise UserError(f"{path}: cannot read on after row {n} ({err})")


READERS = {".txt": read_text, ".csv": read_table, ".tsv": read_table, ".json": read_json,
           ".jsonl": read_json_lines, ".parquet": read_parquet}


# ---------------------------------------------------------------------------- captions to prompts
def choose(record, wanted, path, flag):
    """The first of the wanted fields that a source's first record has."""
    for name in wanted:
        if name in record:
            return name
    raise UserError(f"{path}: expected a field {' or '.join(wanted)}, found "
                    f"{', '.join(record) or 'none'}; name it by {flag}")


def find_prompt(entry, column, score_column):
    """(clean prompt, score) of an entry; nan where there is no score. UserError if it is broken."""
    if isinstance(entry, UserError):
        raise entry
    prompt, score, place = entry, None, "or a record"
    if isinstance(entry, dict):
        prompt, score, place = entry.get(column), entry.get(score_column), f"in the field {column}"
    if not isinstance(prompt, str):
        found = "nothing" if prompt is None else type(prompt).__name__
        raise UserError(f"expected a string {place}, got {found}")
    with explain("invalid UTF-8", UnicodeEncodeError):
        prompt.encode()
    with explain(f"the score in the field {score_column} is no number",
                 TypeError, ValueError, OverflowError):
        return clean(prompt), float("nan" if score in (None, "") else score)


def read_source(path, args):
    """(prompt, score) of each entry of a source, or None for one that --skip_broken leaves out."""
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{path}: expected a name that ends in {', '.join(READERS)}")
    column = score_column = None
    wanted = {*CAPTIONS, *SCORES, *args.column, *args.score_column}
    for where, entry in READERS[suffix](path, wanted):
        if isinstance(entry, dict) and column is None:
            column = choose(entry, args.column, path, "--column")
            if args.min_score is not None:
                score_column = choose(entry, args.score_column, path, "--score_column")
        try:
            yield find_prompt(entry, column, score_column)
        except UserError as err:
            if not args.skip_broken:
                raise UserError(f"{path}, {where}: {err}; mend it, or leave out what is broken by "
                                "--skip_broken")
            yield None


def refusal(found, kept, args):
    """Why what was read is no prompt to keep, or None."""
    if found is None:
        return "broken"
    prompt, score = found
    if args.min_score is not None and not score >= args.min_score:        # nan is no score
        return f"with a score below {args.min_score:g}, or none"
    if not prompt:
        return "empty"
    if len(prompt) > args.max_chars:
        return f"longer than {args.max_chars:,} characters"
    if prompt in kept:
        return "repeated"


def write_prompts(args):
    everything = (found for path in args.sources for found in read_source(path, args))
    kept, dropped = {}, Counter()                     # a dict: has an order, finds repetitions
    for found in tqdm(everything, unit=" entries", leave=False):
        why = refusal(found, kept, args)
        if why:
            dropped[why] += 1
            continue
        kept[found[0]] = None
        if len(kept) == args.limit:
            break
    story = f"{len(kept) + dropped.total():,} read"
    for why, count in dropped.most_common():
        story += f"; {count:,} left out, {why}"
    if not kept:
        raise UserError(f"no prompt to keep in {', '.join(args.sources)}: {story}")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    write_lines(args.out, kept)
    print(f"{args.out}: {len(kept):,} prompts; {story}")


# -------------------------------------------------------------------------------- pairs to tokens
def read_pair(path, image):
    """(prompt, uint8 (1, C, H, W)) of an image and the text beside it. UserError if one is bad."""
    with explain("its prompt: {}"):
        prompt = clean(Path(text_beside(path)).read_text("utf-8-sig"))
    if not prompt:
        raise UserError("its prompt is empty")
    return prompt, variants(path, image)


def write_pairs(args):
    spec, folder = SPECS[args.teacher], args.images
    if spec.text is None:
        raise UserError(f"{args.teacher} learned classes, not prompts: its tokens are made by "
                        "data/imagenet.py")
    names = list_pairs(folder)[: args.limit]
    tokenizer = load_tokenizer(
        args.teacher, args.tokenizer_weights, args.random_weights, args.device)
    meta = describe(tokenizer, args.teacher, os.path.abspath(folder))
    os.makedirs(args.out, exist_ok=True)              # fails now where nothing can be written

    def read(name):
        return read_pair(f"{folder}/{name}", spec.image)

    x, labels, line_of, skipped = [], [], {}, []      # line_of: each prompt once, and its line
    for good, bad in read_ahead(read, names, args.batch, workers=8):
        skipped += [f"{name}\t{why}" for name, why in bad]
        if good:
            prompts, views = zip(*good)
            x.append(encode(tokenizer, torch.cat(views)))
            labels += [line_of.setdefault(prompt, len(line_of)) for prompt in prompts]
    if not labels:
        raise UserError(f"none of the {len(names):,} pairs in {folder} can be read; the first, "
                        f"{skipped[0]}")
    meta |= dict(n=len(labels), variants=1, prompts=len(line_of), skipped=len(skipped),
                 complete=True)
    texts = {"prompts.txt": line_of, "skipped.txt": skipped}
    write_folder(args.out, np.concatenate(x), np.array(labels, np.uint32), meta, texts)
    story = f"{len(skipped)} images left out, listed in skipped.txt" if skipped else "none skipped"
    print(f"{args.out}: {len(labels):,} images, {len(line_of):,} prompts; {story}")


# ------------------------------------------------------------------------------------- the script
def main(args):
    if bool(args.sources) == bool(args.images):
        raise UserError("expected either SOURCE files with prompts, or --images FOLDER")
    default = "pairs" if args.images else "prompts.txt"
    args.out = args.out or f"{ROOT}/data/{default}"
    inputs = map(os.path.realpath, args.sources or [args.images])
    if os.path.realpath(args.out) in inputs:
        raise UserError(f"--out {args.out} would overwrite what it is made from")
    if args.images:
        write_pairs(args)
    elif os.path.isdir(args.out):
        raise UserError(f"--out {args.out} is a folder: name a file")
    else:
        write_prompts(args)


def flags():
    ap = parser(__doc__)
    ap.add_argument("--out", help="what to write: a file of prompts (data/prompts.txt), or a "
                                  "folder of pairs (data/pairs)")
    ap.add_argument("--limit", type=positive_int, metavar="N",
                    help="keep the first N prompts; take the first N images (all)")
    add = ap.add_argument_group("prompts").add_argument
    add("sources", nargs="*", metavar="SOURCE", help="a file with prompts; several are read as one")
    add("--column", nargs=1, default=CAPTIONS, metavar="NAME",
        help=f"the prompt's field (the first found of {', '.join(CAPTIONS)})")
    add("--min_score", type=number(), metavar="X",
        help="keep prompts with a score of X or more (all)")
    add("--score_column", nargs=1, default=SCORES, metavar="NAME",
        help=f"the score's field (the first found of {', '.join(SCORES)})")
    add("--max_chars", type=positive_int, default=1000,
        help="leave out prompts of more characters (%(default)s)")
    add("--skip_broken", action="store_true", help="leave out and count what is broken")
    pairs = ap.add_argument_group("pairs")
    pairs.add_argument("--images", metavar="FOLDER",
                       help="images, each with its prompt beside it in NAME.txt")
    tokenizer_flags(pairs, SPECS, "maskgen")
    return ap


if __name__ == "__main__":
    guard(lambda: main(flags().parse_args()))
