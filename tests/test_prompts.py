"""data/prompts.py: captions of every format to one prompt per line; images with texts to tokens.

    pytest tests/test_prompts.py

Reading parquet is tested where pyarrow is installed.
"""

import csv
import importlib.util
import json
import os
import sys
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from data import images, prompts
from data.tokens import describe, load_tokens
from machinery.errors import UserError
from teachers import load_teacher
from tests.runs import exit_code, start


def listed(folder, name, content, *flags):
    """The lines of out.txt that the script makes of a source file with this content."""
    source, out = folder / name, folder / "out.txt"
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    prompts.main(prompts.flags().parse_args([str(source), "--out", str(out), *flags]))
    return out.read_bytes().decode().split("\n")[:-1]


# ---------------------------------------------------------------------------------- one line each
def test_a_prompt_becomes_one_line_whatever_characters_it_holds(tmp_path):
    family, hebrew = "a 👩‍👩‍👧 on a beach", "\u200fשלום\u200e, world"
    blanks = "\t two\u00a0 \t blanks \u3000 "
    controls = "a\x00 b\x07\x1b[0m"
    breaks = "c\u2028d\x85e\x0bf"
    text = f"\ufeff{family}\r\n{blanks}\r\n{hebrew}\n{controls}\n{breaks}\n"
    found = listed(tmp_path, "a.txt", text)
    assert found == [family, "two blanks", hebrew, "a b[0m", "c d e f"]
    assert prompts.read_prompts(str(tmp_path / "out.txt")) == found
    assert (tmp_path / "out.txt").read_text().splitlines() == found


def test_of_all_characters_only_line_breaks_and_controls_are_lost():
    every = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    kept = prompts.clean("".join(every))
    assert len(kept.splitlines()) == 1
    lost = {c for c in every if unicodedata.category(c) == "Cc" or c.isspace() and c != " "}
    assert set(every) - set(kept) == lost | {"\ufeff"}
    assert prompts.clean("a\u2028\x1cb") == "a b"
    assert prompts.clean("a \0 b") == "a b" == prompts.clean("a\x1fb")


def test_ten_thousand_prompts_keep_their_order_and_lose_repetitions(tmp_path, capsys):
    lines = [f"prompt {i % 9000}" + " " * (i % 3) for i in range(10_000)]
    text = "\n".join([*lines, "", " \t ", "x" * 1001, "x" * 1000])
    assert listed(tmp_path, "a.txt", text) == [f"prompt {i}" for i in range(9000)] + ["x" * 1000]
    assert capsys.readouterr().out.endswith(
        "out.txt: 9,001 prompts; 10,004 read; 1,000 left out, repeated; 2 left out, empty; "
        "1 left out, longer than 1,000 characters\n")
    assert listed(tmp_path, "a.txt", text, "--limit", "7") == [f"prompt {i}" for i in range(7)]
    assert "7 prompts; 7 read\n" in capsys.readouterr().out       # reading ended with the seventh
    assert listed(tmp_path, "a.txt", "a\nabc\nabcd", "--max_chars", "3") == ["a", "abc"]


def test_several_sources_become_one_list(tmp_path):
    (tmp_path / "a.txt").write_text("1\n2\n")
    (tmp_path / "b.csv").write_text("caption\nfrom b\n2\n")
    out = str(tmp_path / "out.txt")
    sources = [str(tmp_path / name) for name in ("a.txt", "b.csv")]
    prompts.main(prompts.flags().parse_args(["--limit", "9", *sources, "--out", out]))
    assert prompts.read_prompts(out) == ["1", "2", "from b"]


# ---------------------------------------------------------------------------------------- formats
RECORDS = [
    dict(url="u", TEXT="a cat, \"red\"", AESTHETIC_SCORE=6.5),
    dict(url="v", TEXT="two\nlines", AESTHETIC_SCORE=6),
    dict(url="w", TEXT="dull", AESTHETIC_SCORE=5.9),
    dict(url="x", TEXT="unscored", AESTHETIC_SCORE=None),
]


def write_records(path, records):
    """The same records in any of the formats."""
    lines = [json.dumps(record) for record in records]
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="reading parquet needs pyarrow")
        from pyarrow import parquet
        parquet.write_table(pyarrow.Table.from_pylist(records), str(path), row_group_size=2)
    elif path.suffix == ".json":
        path.write_text("[" + ",\n".join(lines) + "]")
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(lines))
    else:
        with open(path, "w", newline="") as f:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            table = csv.DictWriter(f, list(records[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(records)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_format_of_the_same_records_gives_the_same_prompts(tmp_path, suffix):
    source = tmp_path / f"a{suffix}"
    write_records(source, RECORDS)

    def read(*flags):
        return listed(tmp_path, source.name, source.read_bytes(), *flags)

    assert read() == ["a cat, \"red\"", "two lines", "dull", "unscored"]
    assert read("--min_score", "6") == ["a cat, \"red\"", "two lines"]
    named = ("--min_score", "5.9", "--score_column", "AESTHETIC_SCORE", "--limit", "3")
    assert read(*named) == ["a cat, \"red\"", "two lines", "dull"]
    assert read("--column", "url") == ["u", "v", "w", "x"]
    nothing = "no prompt to keep.*4 read; 4 left out, with a score below 9, or none"
    for flags, words in (
        (["--column", "nope"], "a field nope, found (url, )?TEXT.*--column"),
        (["--min_score", "6", "--score_column", "nope"], "a field nope.*--score_column"),
        (["--min_score", "9"], nothing),
    ):
        with pytest.raises(UserError, match=words):
            read(*flags)


@pytest.mark.parametrize("name, content, flags, expected", [
    ("a.csv", "prompt,text,caption\r\n1,2,3\r\n\r\n4,5,6\r\n", [], ["3", "6"]),
    ("a.tsv", "\ufeffprompt\ttext\n1\t2\n", [], ["2"]),
    pytest.param("b.csv", "\n text ,n\na\0b,1\n", [], ["ab"], marks=pytest.mark.skipif(
        sys.version_info < (3, 11), reason="csv of Python 3.10 refuses a NUL, as broken")),
    ("c.csv", "text,aesthetic\n1,\n2,6\n3,nan\n4,7\n", ["--min_score", "6"], ["2", "4"]),
    ("a.json", '\ufeff ["a", "b\\nc"]', [], ["a", "b c"]),
    ("b.json", '"a"\n"b  c"', [], ["a", "b c"]),
    ("a.jsonl", '"a"\n\n"b\\tc"\n', [], ["a", "b c"]),
    ("b.jsonl", '{"prompt": "\\ud83d\\ude00 \\u0000x"}', [], ["😀 x"]),
])
def test_the_usual_names_of_fields_have_an_order_and_lists_of_strings_have_none(
        tmp_path, name, content, flags, expected):
    assert listed(tmp_path, name, content, *flags) == expected


# --------------------------------------------------------------------------------- what is broken
BROKEN = [  # file, content, words of the refusal, what --skip_broken keeps
    ("a.txt", b"one\ntw\xff\nthree", "a.txt, line 2: invalid UTF-8", ["one", "three"]),
    ("a.csv", b"id,text\n1,one\n2\n3,\"th\nree\"\n4,5,6\n", "a.csv, line 3: 1 fields instead of 2",
     ["one", "th ree"]),
    ("b.csv", b"text,id\n\"on\ne\",1\n\"t\"wo,2\nthree,3", "b.csv, line 4: not a row",
     ["on e", "three"]),
    ("c.csv", b"text\none\n\"two\nthree", "c.csv, line 3: not a row of fields .unexpected end",
     ["one"]),
    ("d.csv", b"text\none\ntw\xe9\n", "d.csv, line 3: invalid UTF-8", ["one"]),
    ("e.csv", b"text,aesthetic\none,7\ntwo,high\n",
     "e.csv, line 3: the score in the field aesthetic", ["one"]),
    ("a.jsonl", b'"one"\n\n{"text"\n"two"', "a.jsonl, line 3: invalid JSON", ["one", "two"]),
    ("b.jsonl", b'{"text": "one"}\n{"txt": "two"}', "b.jsonl, line 2: .* field text, got nothing",
     ["one"]),
    ("c.jsonl", b'{"text": "one"}\n{"text": 2}', "c.jsonl, line 2: .* field text, got int",
     ["one"]),
    ("d.jsonl", b'null\n[]\n"one"',
     "d.jsonl, line 1: expected a string or a record, got nothing", ["one"]),
    ("e.jsonl", b'"one"\n"t\xffwo"', "e.jsonl, line 2: invalid UTF-8", ["one"]),
    ("f.jsonl", b'"\\ud83d"\n"one"', "f.jsonl, line 1: invalid UTF-8", ["one"]),
    ("g.jsonl", b'"one"\n' + b"[" * 10**5 + b"\n" + b"9" * 5000, "g.jsonl, line 2: invalid JSON",
     ["one"]),
    ("a.json", b'["one", null, {"caption": ["two"]}]', "a.json, item 2: expected a string",
     ["one"]),
]


@pytest.mark.parametrize("name, content, words, rest", BROKEN, ids=[case[0] for case in BROKEN])
def test_what_is_broken_is_named_by_line_or_skipped_and_counted(
        tmp_path, capsys, name, content, words, rest):
    flags = ["--min_score", "6"] if name == "e.csv" else []
    with pytest.raises(UserError, match=words + ".*--skip_broken"):
        listed(tmp_path, name, content, *flags)
    assert not (tmp_path / "out.txt").exists()
    assert listed(tmp_path, name, content, "--skip_broken", *flags) == rest
    assert "left out, broken" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"", "no prompt to keep in .*a.txt: 0 read$"),
    ("a.txt", b"\n \r\n", "2 read; 2 left out, empty"),
    ("a.csv", b"", "0 read"),
    ("a.csv", b"text\n", "0 read"),
    ("a.csv", b'"text\na', "line 1: .*names of the fields"),
    ("a.json", b"", "0 read"),
    ("a.json", b"[]", "0 read"),
    ("a.json", b'["a",\n"b"\n"c"]', "a.json: invalid JSON .*line 3"),
    ("a.json", b'{"a.png": "cat"}', "a field caption or .*found a.png; name it by --column"),
    ("a.jsonl", b"{}", "found none"),
    ("a.jsonl", "\ufeff".encode("utf-16"), "line 1: invalid JSON"),
    ("a.txt", "cat".encode("utf-16"), "line 1: invalid UTF-8"),
    ("a.doc", b"cat", "ends in .txt, .csv, .*.parquet"),
])
def test_sources_without_a_prompt_are_refused_and_write_nothing(tmp_path, name, content, words):
    (tmp_path / "out.txt").write_text("the earlier list\n")
    with pytest.raises(UserError, match=words):
        listed(tmp_path, name, content)
    assert (tmp_path / "out.txt").read_text() == "the earlier list\n"
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="reading parquet needs pyarrow")
def test_damaged_parquet_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot read on after row 0"):
        listed(tmp_path, "a.parquet", b"PAR1 and no more")


def test_parquet_without_pyarrow_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        listed(tmp_path, "a.parquet", b"PAR1")


# ------------------------------------------------------------------------------------------ pairs
GOOD = [0, 1, 6, 7, 8, 9, 10]                         # of make_pairs: those that become tokens


def make_pairs(folder):
    """11 images, each with its prompt beside it; two share one, and four cannot be used."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for i in range(11):
        noise = draw.integers(0, 256, (32 + i, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02d}.png")
        text = f"  picture\n{max(i, 1)} \u2028👩‍👩‍👧\n"
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    (folder / "02.png").write_bytes(b"no picture")
    (folder / "03.txt").write_bytes(b"\xff")
    (folder / "04.txt").write_text(" \n")
    (folder / "05.txt").unlink()                      # not a pair: not even counted
    (folder / "notes.txt").write_text("no image beside it")
    return folder


def encode(folder, out, *more):
    fixed = "--teacher maskgen-tiny --random_weights --batch 4 --device cpu".split()
    places = ["--images", str(folder), "--out", str(out)]
    prompts.main(prompts.flags().parse_args([*places, *fixed, *more]))


def rows(out, teacher):
    """How many rows of tokens train.py reads from a folder."""
    x, _, _ = load_tokens(str(out), teacher)
    return len(x)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("maskgen-tiny", random_weights=True)


def test_pairs_are_the_tokenizers_own_tokens_and_train_reads_them_back(
        tmp_path, monkeypatch, teacher):
    folder = make_pairs(tmp_path / "in")
    seen, real_encode = [], type(teacher.tokenizer).encode

    def remembers(self, img):
        seen.append(img)
        return real_encode(self, img)

    monkeypatch.setattr(type(teacher.tokenizer), "encode", remembers)
    encode(folder, tmp_path / "out")
    seen = torch.cat(seen[1:])                        # random weights hardly tell pictures apart
    x, labels, lines = load_tokens(str(tmp_path / "out"), teacher)
    assert [lines[i] for i in labels] == [f"picture {max(i, 1)} 👩‍👩‍👧" for i in GOOD]
    assert labels[0] == labels[1] == 0
    assert len(x) == len(seen) == len(GOOD)
    assert x.dtype == np.uint8
    for row, img, i in zip(x, seen, GOOD):
        view = images.variants(str(folder / f"{i:02d}.png"), (3, 32, 32)).float() / 255
        assert torch.equal(img, view[0])
        assert np.array_equal(row, real_encode(teacher.tokenizer, view)[0])
    assert labels.max() == len(lines) - 1             # so the GAN sees the prompts of its images
    assert len(teacher.conditions(lines)) == len(lines) == 6


def test_what_became_of_each_pair_is_told(tmp_path, capsys, teacher):
    folder = make_pairs(tmp_path / "in")
    encode(folder, tmp_path / "out")
    skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in skipped] == ["02.png", "03.png", "04.png"]
    for line, why in zip(skipped, ("cannot identify", "utf-8", "empty")):
        assert why in line
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    counts = dict(n=7, variants=1, prompts=6, skipped=3, complete=True)
    assert meta == describe(teacher.tokenizer, "maskgen-tiny", str(folder)) | counts
    assert "7 images, 6 prompts; 3 images left out" in capsys.readouterr().out
    encode(folder, tmp_path / "out", "--limit", "2")  # anew, and nothing of before
    assert rows(tmp_path / "out", teacher) == 2
    left = sorted(os.listdir(tmp_path / "out"))
    assert left == ["labels.npy", "meta.json", "prompts.txt", "tokens.npy"]


def test_a_kill_while_images_are_encoded_leaves_the_old_folder_whole(
        tmp_path, monkeypatch, teacher):
    folder, out = make_pairs(tmp_path / "in"), tmp_path / "out"
    encode(folder, out, "--limit", "2")
    real_encode = type(teacher.tokenizer).encode

    def killed(self, img):
        if len(img) > 1:
            raise KeyboardInterrupt
        return real_encode(self, img)

    monkeypatch.setattr(type(teacher.tokenizer), "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(folder, out)
    assert rows(out, teacher) == 2


FILES = ["prompts.txt", "skipped.txt", "tokens.npy", "labels.npy", "meta.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_kill_at_any_file_leaves_a_folder_that_train_refuses(
        tmp_path, monkeypatch, teacher, name):
    folder, out = make_pairs(tmp_path / "in"), tmp_path / "out"
    encode(folder, out, "--limit", "2")
    replace = os.replace

    def killed(source, target):
        if str(source).endswith(name + ".tmp"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            encode(folder, out)
    with pytest.raises(UserError, match="cannot read real tokens"):
        load_tokens(str(out), teacher)
    encode(folder, out)
    assert rows(out, teacher) == 7


# --------------------------------------------------------------------------------------- refusals
REFUSALS = [  # flags, words; a.txt is a list of prompts, alone/ has an image without a text
    ("", "either SOURCE"),
    ("a.txt --images alone", "either SOURCE"),
    ("a.txt --out a.txt", "overwrite"),
    ("a.txt --out .", "is a folder"),
    ("--images alone", "each with its prompt"),
    ("--images alone --teacher maskbit-tiny", "learned classes.*data/imagenet.py"),
    ("--images nowhere", "--images nowhere: expected a folder of images"),
    ("--images alone --out alone", "overwrite"),
]


@pytest.mark.parametrize("flags, words", REFUSALS)
def test_what_makes_no_sense_together_is_refused(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a cat\n")
    (tmp_path / "alone").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "alone" / "alone.png")
    with pytest.raises(UserError, match=words):
        prompts.main(prompts.flags().parse_args(flags.split()))
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "alone"]


def test_a_folder_of_pairs_none_of_which_can_be_read_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "alone.txt").write_text("alone")
    (tmp_path / "in" / "alone.png").touch()
    with pytest.raises(UserError, match="none of the 1 pairs .* alone.png"):
        encode(tmp_path / "in", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("flags, words", [
    (["--limit", "0"], "--limit: expected a whole number of 1 or more, got 0"),
    (["--batch", "0"], "--batch: expected a whole number of 1 or more, got 0"),
    (["--max_chars", "0"], "--max_chars: expected a whole number of 1 or more, got 0"),
    (["--min_score", "nan"], "--min_score: expected a finite number, got nan"),
    (["--device", "nowhere"], "--device: invalid choice: 'nowhere'"),
])
def test_flags_out_of_range_are_refused_by_name(capsys, flags, words):
    with pytest.raises(SystemExit) as end:
        prompts.flags().parse_args(["a.txt", *flags])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="--device cuda: this machine has no usable GPU"):
        encode(make_pairs(tmp_path / "in"), tmp_path / "out", "--device", "cuda")


def test_the_script_answers_bad_input_with_one_sentence_and_status_2(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nbr\xffken\n")
    for source in (str(tmp_path / "a.txt"), "/nowhere.txt"):
        said = tmp_path / "said.txt"
        process = start("data/prompts.py", source, "--out", tmp_path / "out.txt", log=said)
        assert exit_code(process) == 2
        lines = said.read_text().splitlines()
        assert lines[-1].startswith("prompts.py: ") and "Traceback" not in "".join(lines)
    assert not (tmp_path / "out.txt").exists()
