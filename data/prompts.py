"""Prompts to distil from, one a line; or images with their captions, as real tokens for the GAN on text.

    python data/prompts.py captions.parquet --min_score 6                        # writes data/prompts.txt
    python data/prompts.py a.jsonl b.csv --column caption --limit 100000         # several sources, one list
    python data/prompts.py --images /path/to/pairs --teacher maskgen             # writes data/pairs/

A text teacher is distilled from prompts alone, train.py --prompts FILE. Di[M]O takes for Meissonic the captions of
LAION-Aesthetics with a score of 6 or more: published elsewhere, as parquet, a row an image, with columns such as TEXT
or caption, and AESTHETIC_SCORE; bring your own copy. Sources are told apart by their names:

    .txt         a prompt a line                  .json      a list of strings or of records, or as .jsonl
    .csv .tsv    the first line names the fields  .jsonl     a string or a record a line
    .parquet     takes pyarrow

A prompt becomes one line: white space of any kind one blank, control characters gone. Empty, long and repeated ones
are left out, order is kept. What is broken is named by file and line, or left out and counted by --skip_broken.

The GAN needs real images too, train.py --gan --data FOLDER: for MaskGen, images by DALL-E 3 with their captions, of
which lists are published elsewhere as well. --images takes a folder of images, each with its prompt in NAME.txt beside
it, and writes the folder that data/tokens.py describes, and prompts.txt: a label is a line of it, counted from 0.
What cannot be read is listed in skipped.txt. A folder without meta.json is unfinished; the command makes it anew.
"""

import argparse
import csv
import json
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.images import SUFFIXES, variants  # noqa: E402
from data.tokens import describe, load_tokenizer, token_dtype, write_folder  # noqa: E402
from machinery.errors import UserError, guard  # noqa: E402
from machinery.files import local, replacing  # noqa: E402
from teachers import SPECS  # noqa: E402


HERE = os.path.dirname(os.path.abspath(__file__))
CAPTIONS = ("caption", "TEXT", "text", "prompt")
SCORES = ("AESTHETIC_SCORE", "aesthetic", "aesthetic_score")
# Not white space, which becomes a blank. What joins emoji or turns the direction of writing is no control character.
CONTROL = dict.fromkeys(i for i in (*range(32), *range(127, 160), 0xFEFF) if not chr(i).isspace())


class Broken(Exception):
    """Why an entry of a source is no prompt. Readers yield it in the entry's place: they can go on after it."""


def clean(text):
    return " ".join(text.translate(CONTROL).split())


def read_prompts(path, flag="--prompts", numbered=False):
    """The prompts of a text file, one a line, empty lines left out; numbered: there must be none but at the end."""
    try:
        with open(local(path), encoding="utf-8") as f:
            lines = f.read().rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"{flag} {path}: cannot read ({err}); expected a text file, one prompt a line")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{flag} {path}: no prompt in it; expected a text file, one prompt a line")
    if numbered and len(prompts) < len(lines):
        raise UserError(f"{flag} {path}: a line amid it is empty; expected a caption on each, as image i has line i")
    return prompts


# Readers yield (where, entry): a string, a record (dict), or Broken. Bytes that are no UTF-8 pass as surrogates, and
# `find_prompt` names them, since an error of the decoder could not be skipped.
TEXT = dict(encoding="utf-8-sig", errors="surrogateescape")


def read_text(path, args):
    with open(path, **TEXT) as f:
        for n, line in enumerate(f, 1):
            yield f"line {n}", line


def read_table(path, args):
    with open(path, newline="", **TEXT) as f:
        lines = (line.replace("\0", "") for line in f)            # older versions of csv stop at a NUL
        rows, names = csv.reader(lines, delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True), None
        while True:
            where = f"line {rows.line_num + 1}"                   # the first of a row: quoted fields may have several
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as err:
                if names is None:
                    raise UserError(f"{path}, {where}: {err}, where the names of the fields should be")
                yield where, Broken(f"not a row of fields ({err})")
                continue
            if row and names is None:
                names = [name.strip() for name in row]
            elif row:                                             # and not an empty line
                yield where, (dict(zip(names, row)) if len(row) == len(names) else
                              Broken(f"{len(row)} fields instead of {len(names)}"))


def read_json(path, args):
    with open(path, **TEXT) as f:
        is_list = path.lower().endswith(".json") and f.read(1000).lstrip().startswith("[")
        f.seek(0)
        for n, text in enumerate([f.read()] if is_list else f, 1):
            try:
                items = json.loads(text) if is_list else [json.loads(text)] if text.strip() else []
            except (ValueError, RecursionError) as err:           # also numbers and nestings beyond all bounds
                why = f"invalid JSON ({getattr(err, 'msg', err)})"
                if is_list:                                       # nothing to go on with
                    raise UserError(f"{path}, line {getattr(err, 'lineno', 1)}: {why}")
                items = [Broken(why)]
            for i, item in enumerate(items, 1):
                yield f"item {i}" if is_list else f"line {n}", item


def read_parquet(path, args):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet takes pyarrow: pip install pyarrow")
    n, wanted = 0, {*CAPTIONS, *SCORES, args.column, args.score_column}
    try:
        with pyarrow.parquet.ParquetFile(path) as f:
            names = f.schema_arrow.names
            for batch in f.iter_batches(columns=[name for name in names if name in wanted] or names):
                for n, record in enumerate(batch.to_pylist(), n + 1):
                    yield f"row {n}", record
    except (OSError, ValueError, pyarrow.ArrowException) as err:
        raise UserError(f"{path}: cannot read on after row {n} ({err})")


READERS = {".txt": read_text, ".csv": read_table, ".tsv": read_table, ".json": read_json, ".jsonl": read_json,
           ".parquet": read_parquet}


def entries(args):
    """(path, where, entry) of all sources, one after another."""
    for path in args.sources:
        if (suffix := os.path.splitext(path)[1].lower()) not in READERS:
            raise UserError(f"{path}: expected a name that ends in {', '.join(READERS)}")
        yield from ((path, *found) for found in READERS[suffix](path, args))


def choose(names, given, usual, path, flag):
    """The field `given`, or the first usual one, among the names in a source's first record."""
    for name in [given] if given else usual:
        if name in names:
            return name
    raise UserError(f"{path}: expected a field {given or ' or '.join(usual)}, found {', '.join(names) or 'none'}; "
                    f"name it by {flag}")


def find_prompt(entry, fields):
    """(clean prompt, score) of an entry; nan where there is no score."""
    if isinstance(entry, Broken):
        raise entry
    prompt, score = (entry.get(name) for name in fields) if isinstance(entry, dict) else (entry, None)
    if not isinstance(prompt, str):
        where = f"in the field {fields[0]}" if isinstance(entry, dict) else "or a record"
        raise Broken(f"expected a string {where}, got {'nothing' if prompt is None else type(prompt).__name__}")
    try:
        prompt.encode()
        return clean(prompt), float("nan" if score in (None, "") else score)
    except UnicodeEncodeError:
        raise Broken("invalid UTF-8")
    except (TypeError, ValueError, OverflowError):
        raise Broken(f"the score in the field {fields[1]} is no number")


def write_prompts(args):
    n, kept, dropped, fields = 0, {}, Counter(), {}   # kept: a dict keeps order, and finds what is repeated
    for n, (path, where, entry) in enumerate(tqdm(entries(args), unit=" entries", leave=False), 1):
        if isinstance(entry, dict) and path not in fields:
            fields[path] = (choose(entry, args.column, CAPTIONS, path, "--column"), None if args.min_score is None else
                            choose(entry, args.score_column, SCORES, path, "--score_column"))
        try:
            prompt, score = find_prompt(entry, fields.get(path))
        except Broken as err:
            if not args.skip_broken:
                raise UserError(f"{path}, {where}: {err}; mend it, or leave out what is broken by --skip_broken")
            dropped["broken"] += 1
            continue
        if args.min_score is not None and not score >= args.min_score:
            dropped[f"with a score below {args.min_score:g}, or none"] += 1
        elif not prompt:
            dropped["empty"] += 1
        elif len(prompt) > args.max_chars:
            dropped[f"longer than {args.max_chars:,} characters"] += 1
        elif prompt in kept:
            dropped["repeated"] += 1
        else:
            kept[prompt] = None
        if len(kept) == args.limit:
            break
    story = "; ".join([f"{n:,} read", *(f"{count:,} left out, {why}" for why, count in dropped.most_common())])
    if not kept:
        raise UserError(f"no prompt to keep in {', '.join(args.sources)}: {story}")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with replacing(args.out) as f:
        f.writelines(f"{prompt}\n".encode() for prompt in kept)
    print(f"{args.out}: {len(kept):,} prompts; {story}")


def read_pair(path, image):
    """(prompt, uint8 (C, H, W)) of an image and the text beside it, or why they cannot be read."""
    try:
        with open(os.path.splitext(path)[0] + ".txt", encoding="utf-8-sig") as f:
            prompt = clean(f.read())
    except (OSError, UnicodeDecodeError) as err:
        return f"its prompt: {err}"
    views = variants(path, 0, image, False, 0, 0)
    return views if isinstance(views, str) else (prompt, views[0]) if prompt else "its prompt is empty"


def write_pairs(args):
    spec, folder, batch = SPECS[args.teacher], args.images, args.batch
    if spec.text is None:
        raise UserError(f"{args.teacher} learned classes, not prompts: its tokens are made by data/imagenet.py")
    files = set(os.listdir(folder)) if os.path.isdir(folder) else ()
    names = sorted(f for f in files if f.lower().endswith(SUFFIXES) and os.path.splitext(f)[0] + ".txt" in files
                   and not f.startswith("."))[: args.limit]
    if not names:
        raise UserError(f"--images {folder}: expected a folder of images, each with its prompt beside it in NAME.txt")
    try:
        tokenizer = load_tokenizer(args.teacher, args.tokenizer_weights, args.random_weights).to(args.device)
    except (RuntimeError, AssertionError) as err:     # torch's answers to a device that is not there
        raise UserError(f"--device {args.device}: {str(err).splitlines()[0]}")
    meta = describe(tokenizer, args.teacher, os.path.abspath(folder))
    os.makedirs(args.out, exist_ok=True)              # a place that cannot be written to shows before the work

    tokens = np.empty((len(names), meta["L"], meta["G"]), token_dtype(meta["V"]))
    labels, lines, skipped = [], {}, []               # lines: each prompt once, and its place
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, tqdm(total=len(names), unit="image") as bar:
        for part in (names[i : i + batch] for i in range(0, len(names), batch)):
            pairs = list(pool.map(lambda f: read_pair(os.path.join(folder, f), spec.image), part))
            skipped += [f"{f}\t{why}\n" for f, why in zip(part, pairs) if isinstance(why, str)]
            if good := [pair for pair in pairs if not isinstance(pair, str)]:
                img = torch.from_numpy(np.stack([view for _, view in good])).to(args.device).float() / 255
                tokens[len(labels) : len(labels) + len(good)] = tokenizer.encode(img).cpu().numpy()
                labels += [lines.setdefault(prompt, len(lines)) for prompt, _ in good]
            bar.set_postfix(skipped=len(skipped), refresh=False)
            bar.update(len(part))
    if not labels:
        raise UserError(f"none of the {len(names):,} pairs in {folder} can be read; the first, {skipped[0].strip()}")

    for stale in ("meta.json", "skipped.txt"):        # the claim goes first and comes last, with the arrays
        if os.path.exists(os.path.join(args.out, stale)):
            os.remove(os.path.join(args.out, stale))
    for name, text in (("prompts.txt", [f"{prompt}\n" for prompt in lines]), ("skipped.txt", skipped)):
        if text:
            with replacing(os.path.join(args.out, name)) as f:
                f.writelines(line.encode(errors="surrogateescape") for line in text)          # names can be any bytes
    meta |= dict(n=len(labels), variants=1, prompts=len(lines), skipped=len(skipped), complete=True)
    write_folder(args.out, tokens[: len(labels)], np.array(labels, np.uint32), meta)
    print(f"{args.out}: {len(labels):,} images, {len(lines):,} prompts; "
          + (f"{len(skipped)} images left out, listed in skipped.txt" if skipped else "none skipped"))


def main(args):
    if bool(args.sources) == bool(args.images):
        raise UserError("expected either SOURCE files with prompts, or --images FOLDER")
    if args.batch < 1 or args.max_chars < 1 or args.limit is not None and args.limit < 1:
        raise UserError("expected --limit, --max_chars and --batch of 1 or more")
    args.out = args.out or os.path.join(HERE, "pairs" if args.images else "prompts.txt")
    if os.path.realpath(args.out) in map(os.path.realpath, args.sources or [args.images]):
        raise UserError(f"--out {args.out} would overwrite what it is made from")
    if args.sources and os.path.isdir(args.out):
        raise UserError(f"--out {args.out} is a folder: name a file")
    (write_pairs if args.images else write_prompts)(args)


def parser():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", help="file of prompts, or folder of pairs, to write (data/prompts.txt, data/pairs)")
    ap.add_argument("--limit", type=int, metavar="N", help="keep the first N prompts; take the first N images")
    g = ap.add_argument_group("prompts")
    g.add_argument("sources", nargs="*", metavar="SOURCE", help="a file with prompts; several are read as one")
    g.add_argument("--column", metavar="NAME", help=f"the prompt's field (the first found of {', '.join(CAPTIONS)})")
    g.add_argument("--min_score", type=float, metavar="X", help="keep prompts with a score of X or more")
    g.add_argument("--score_column", metavar="NAME", help=f"the score's field (the first of {', '.join(SCORES)})")
    g.add_argument("--max_chars", type=int, default=1000, help="leave out longer prompts (%(default)s)")
    g.add_argument("--skip_broken", action="store_true", help="leave out and count what is broken")
    g = ap.add_argument_group("pairs")
    g.add_argument("--images", metavar="FOLDER", help="images, each with its prompt beside it in NAME.txt")
    g.add_argument("--teacher", default="maskgen", choices=SPECS, metavar="NAME",
                   help="whose tokenizer and size (%(default)s): " + ", ".join(k for k, s in SPECS.items() if s.text))
    g.add_argument("--tokenizer_weights", metavar="PATH", help="local file instead of the published one")
    g.add_argument("--random_weights", action="store_true", help="untrained tokenizer, to try speed without a download")
    g.add_argument("--batch", type=int, default=64, help="images the tokenizer takes at a time")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return ap


if __name__ == "__main__":
    guard(lambda: main(parser().parse_args()))
