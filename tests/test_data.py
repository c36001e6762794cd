"""data: tests."""

import csv
import gzip
import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
import types
import unicodedata

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import soft_embed as se
import teachers
from data import check, imagenet, images, prompts, tokens
from networks import autoencoders, weights
from worlds import fashion
from data.tokens import describe, load_tokens
from machinery.errors import UserError
from machinery.files import ROOT
from networks.autoencoders import BitTokenizer
from teachers import SPECS, load_teacher
from tests.common import seeded, agrees, uniform, integers, generator_file, tokenizer_file, tiny_teacher, load, listed


# ========================================================================================== teachers: --check
def photo(path, seed, size=(40, 36)):
    img = Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    img.save(path)
    return img


def test_real_images_come_with_the_label_of_their_folder_or_the_prompt_beside_them(tmp_path):
    for c in "ab":
        (tmp_path / "classes" / c).mkdir(parents=True)
    (tmp_path / "prompts").mkdir()
    photos = [photo(tmp_path / "classes" / "ab"[i // 3] / f"{i}.png", i) for i in range(6)]
    spec = SPECS["maskgit-tiny"]
    img, labels = check.real_images(str(tmp_path / "classes"), spec, 6)
    cropped = [np.asarray(images.center_crop(p, 32)).transpose(2, 0, 1) for p in photos]
    assert labels == [0, 0, 0, 1, 1, 1] and np.array_equal(img.numpy(), np.stack(cropped))
    img, labels = check.real_images(str(tmp_path / "classes"), spec, 3)          # spread over the folder
    assert labels == [0, 0, 1] and np.array_equal(img.numpy(), np.stack(cropped[::2]))
    for i in (1, 0, 2):
        photo(tmp_path / "prompts" / f"{i}.png", i)
    for i in range(2):                                                              # the third has no prompt
        (tmp_path / "prompts" / f"{i}.txt").write_text(f" prompt {i}\n")
    img, prompts = check.real_images(str(tmp_path / "prompts"), SPECS["maskgen-tiny"], 64)
    assert prompts == ["prompt 0", "prompt 1"] and np.array_equal(img.numpy(), np.stack(cropped[:2]))


def test_folders_that_cannot_check_a_teacher_are_refused_with_a_sentence(tmp_path):
    (tmp_path / "prompts").mkdir(), photo(tmp_path / "prompts" / "0.png", 0)
    for folder, words in (("prompts", "each with its prompt in a text file"), ("nowhere", "no such folder")):
        with pytest.raises(UserError, match=words):
            check.real_images(str(tmp_path / folder), SPECS["meissonic-tiny"], 4)
    (tmp_path / "prompts" / "0.txt").write_text("x"), (tmp_path / "prompts" / "0.png").write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot read 0.png: UnidentifiedImageError"):
        check.real_images(str(tmp_path / "prompts"), SPECS["meissonic-tiny"], 4)


class AllKnowing:
    """Net and tokenizer of a world where an image of class c is all tokens c: certain of them if told the class."""

    V, L, G, null = 8, 16, 1, lambda self, cond: (torch.full_like(cond[0], 8),)

    def tables(self):
        return torch.zeros(1, 9, 1), torch.zeros(())

    def parameters(self):
        return iter([torch.zeros(1)])

    def __call__(self, e, cond):
        return 100 * F.one_hot(cond[0], 9)[:, None, None, :8].expand(-1, 16, 1, 8).float()

    def encode(self, img):
        return (img[:, :1, 0, 0] * 255 / 10).round().long()[..., None].expand(-1, 16, 1)

    def decode(self, e, cond):
        return torch.full((len(e), 3, 4, 4), 0.25)


def test_knowing_is_measured_in_decibels_and_in_nats_a_masked_token():
    labels, world = [0, 3, 7, 3, 5], AllKnowing()
    img = (10 * torch.tensor(labels, dtype=torch.uint8)).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    found = check.knows(teachers.Teacher(world, world, SPECS["maskgit-tiny"]), img, labels, batch=2)
    error = (0.25 - img.double() / 255).square().mean().item()
    assert found == pytest.approx({"psnr": -10 * math.log10(error), "nats": 0, "nats_null": math.log(8),
                                   "nats_uniform": math.log(8), "images": 5}, abs=1e-5)


def test_check_reports_each_file_and_what_the_teacher_knows(tmp_path, capsys):
    teacher, spec = tiny_teacher("maskgen-tiny"), SPECS["maskgen-tiny"]
    for role in spec.roles:
        torch.save(getattr(teacher, role).state_dict(), tmp_path / f"{role}.bin")
    photo(tmp_path / "a.png", 0), (tmp_path / "a.txt").write_text("a cat")
    path = lambda role: str(tmp_path / f"{role}.bin")
    args = types.SimpleNamespace(check="maskgen-tiny", random_weights=False, text_activation=None, device="cpu", n=4,
                                 images=str(tmp_path), teacher_weights=path("net"),
                                 tokenizer_weights=path("tokenizer"), text_weights=path("text"))
    check.check(args)
    out = capsys.readouterr().out.splitlines()
    for line, role in zip(out, spec.roles):
        n = sum(p.numel() for p in getattr(teacher, role).parameters())
        assert line.startswith(role) and " ok " in line and path(role) in line
        assert f"{n:,} parameters, all finite: yes" in line
    found, expected = json.loads(out[-1]), check.knows(teacher, *check.real_images(str(tmp_path), spec, 4))
    assert found.pop("teacher") == "maskgen-tiny" and found == pytest.approx(expected)
    args.tokenizer_weights = args.teacher_weights
    with pytest.raises(UserError, match="maskgen-tiny is not complete"):
        check.check(args)
    assert "tokenizer  NOT  " in capsys.readouterr().out


def test_check_ends_with_2_and_a_sentence_where_a_file_is_not_right(tmp_path):
    command = [sys.executable, os.path.join(ROOT, "data", "check.py"), "--check", "maskbit-tiny"]
    done = subprocess.run([*command, "--teacher_weights", str(tmp_path / "no.bin")], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "maskbit-tiny is not complete" in done.stderr
    assert "net        NOT  no weights at" in done.stdout and "tokenizer  ok " in done.stdout
    with pytest.raises(UserError, match="--n 0: expected 1 image or more"):
        check.check(check.flags().parse_args(["--check", "maskbit-tiny", "--n", "0"]))


@pytest.mark.skipif(not os.environ.get("FULL_SIZE"), reason="a minute and 4 GB of memory: set FULL_SIZE=1")
def test_full_size_maskbit_gives_the_golden_numbers():
    net = weights.load_state(teachers.MaskBit(), seeded(generator_file()), "seeded").eval()
    x = integers(20, 128, 2, 256, 2).masked_fill(uniform(21, 2, 256, 2) < 0.5, 128)
    tok = weights.load_state(autoencoders.BitTokenizer(), seeded(tokenizer_file()), "seeded").eval()
    t, img = integers(22, 2**14, 1, 256), F.interpolate(uniform(23, 1, 3, 16, 16).float(), scale_factor=16)
    with torch.no_grad():
        z = net(se.embed_tokens(x, *net.tables()), (torch.tensor([207, 1000]),))
        out = tok.decode(se.embed_tokens(torch.stack([t % 128, t // 128], -1), *tok.tables()), clamp=False)
        latent = tok.encoder(img)
    agrees(z, [0.01411667, 0.09739441, -1.184911, 1.158718, 0.2430829, -1.178903], 105622.891)
    agrees(out, [-0.1405859, -0.003939517, -0.009886682, -0.1175381, -0.193871, -0.1649193], 103770.847)
    agrees(latent, [0.09320036, 0.4105314, 0.1292425, -0.364826, 0.2273682, 0.3171203], 1785.9486)


def make_photos(folder, per_class=5, side=28):
    """10 class folders of small random pictures, the first of class 0 unreadable."""
    rng = np.random.default_rng(0)
    for i in range(10 * per_class):
        os.makedirs(folder / str(i % 10), exist_ok=True)
        photo = Image.fromarray(rng.integers(0, 256, (side, side + i % 3), dtype=np.uint8))
        photo.save(folder / str(i % 10) / f"{i:02d}.png")
    (folder / "0" / "00.png").write_bytes(b"not a picture")
    return str(folder)


def imagenet_args(folder, out, *more):
    return imagenet.parser().parse_args([folder, "--teacher", "maskbit-tiny", "--random_weights", "--out", str(out),
                                         "--workers", "2", "--batch", "8", "--device", "cpu", *more])


def write_idx(path, array):
    with gzip.open(path, "wb") as f:
        f.write(struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(">" + "I" * array.ndim, *array.shape) + array.tobytes())


def make_raw(folder, n=20):
    """Fashion-MNIST's two training files in small, the way they are published."""
    rng = np.random.default_rng(0)
    write_idx(folder / "train-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
    write_idx(folder / "train-labels-idx1-ubyte.gz", (np.arange(n) % 10).astype(np.uint8))
    return str(folder)


def test_fashion_folder_and_packed_file_hold_the_tokenizers_own_tokens(tmp_path, monkeypatch):
    monkeypatch.setitem(fashion.COUNT, "train", 20)
    raw, torch_file = make_raw(tmp_path), str(tmp_path / "tokenizer.pt")
    tokenizer = BitTokenizer(**SPECS["maskbit-tiny"].tokenizer).eval()
    torch.save(tokenizer.state_dict(), torch_file)
    args = dict(raw=raw, tokenizer_weights=torch_file, out=str(tmp_path / "t"))
    fashion.main(types.SimpleNamespace(**args, pack=None))
    fashion.main(types.SimpleNamespace(**args, pack=str(tmp_path / "t.npz")))
    (x, y, meta), (x_packed, y_packed, _) = load(tmp_path / "t"), load(tmp_path / "t.npz")
    assert x.dtype == np.uint8 and x.shape == (20, 64, 2) and isinstance(x, np.memmap)
    assert json.loads(str(np.load(tmp_path / "t.npz")["meta"])) == meta and meta["complete"]
    assert np.array_equal(x, x_packed) and np.array_equal(y, y_packed) and list(y) == [i % 10 for i in range(20)]
    img = torch.from_numpy(fashion.load_images("train", raw)[0]).float() / 255
    assert np.array_equal(x, tokenizer.encode(img).numpy()) and not img[:, :, :2].any()      # padded, never flipped


def test_fashion_files_that_are_short_or_of_another_set_are_refused(tmp_path):
    raw = make_raw(tmp_path)
    with pytest.raises(UserError, match="expected 60000 images"):
        fashion.load_images("train", raw)
    whole = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    for broken in (whole[:3000], whole[:3000] + bytes(100) + whole[3100:], b"", b"\x1f\x8b"):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(broken)
        with pytest.raises(UserError, match="--raw"):
            fashion.load_images("train", raw)
    with pytest.raises(UserError, match="--raw"):
        fashion.load_images("train", str(tmp_path / "nowhere"))


def test_encoding_interrupted_anywhere_ends_in_the_same_bytes(tmp_path, monkeypatch):
    folder = make_photos(tmp_path / "photos")
    monkeypatch.setattr(imagenet, "SAVE_EVERY", -1)
    imagenet.main(imagenet_args(folder, tmp_path / "a", "--crops", "1"))
    encode, calls = BitTokenizer.encode, []

    def dies_now_and_then(self, img):
        calls.append(len(img))
        if len(img) > 1 and len(calls) % 5 == 4:
            raise KeyboardInterrupt
        return encode(self, img)

    monkeypatch.setattr(BitTokenizer, "encode", dies_now_and_then)
    for _ in range(20):
        try:
            imagenet.main(imagenet_args(folder, tmp_path / "b", "--crops", "1"))
        except KeyboardInterrupt:
            if (tmp_path / "b" / "meta.json").exists():
                with pytest.raises(UserError, match="unfinished"):
                    load(tmp_path / "b")
    for name in ("tokens.npy", "labels.npy", "meta.json", "skipped.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_unreadable_images_are_named_and_leave_no_rows(tmp_path):
    folder = make_photos(tmp_path / "photos")
    imagenet.main(imagenet_args(folder, tmp_path / "a", "--flip"))
    x, y, meta = load(tmp_path / "a")
    assert (tmp_path / "a" / "skipped.txt").read_text().startswith("0/00.png\tUnidentifiedImageError")
    assert meta["skipped"] == 1 and x.shape == (98, 64, 2) and list(y[:10]) == [0] * 8 + [1] * 2
    tokenizer = tokens.load_tokenizer("maskbit-tiny", random_weights=True)
    assert meta["tokenizer"] == describe(tokenizer, "maskbit-tiny", "")["tokenizer"]
    next(tokenizer.parameters()).data += 1e-3                                                # other weights: other hash
    assert meta["tokenizer"] != describe(tokenizer, "maskbit-tiny", "")["tokenizer"]
    tokenizer = tokens.load_tokenizer("maskbit-tiny", random_weights=True)
    views = images.variants(os.path.join(folder, "9/49.png"), 49, (1, 32, 32), flip=True, crops=0, seed=0)
    assert np.array_equal(views[0][:, :, ::-1], views[1])
    assert np.array_equal(x[-2:], tokenizer.encode(torch.from_numpy(views.copy()).float() / 255).numpy())


def test_going_on_with_other_arguments_is_refused_by_name(tmp_path):
    folder = make_photos(tmp_path / "photos", per_class=1)
    (tmp_path / "photos" / "0" / "more.png").write_bytes((tmp_path / "photos" / "1" / "01.png").read_bytes())
    imagenet.main(imagenet_args(folder, tmp_path / "a"))
    for flags, named in ((("--flip",), "--flip"), (("--crops", "2"), "--crops"), (("--seed", "1"), "--seed")):
        with pytest.raises(UserError, match=named):
            imagenet.main(imagenet_args(folder, tmp_path / "a", *flags))
    (tmp_path / "photos" / "0" / "more.png").unlink()
    (tmp_path / "photos" / "0" / "00.png").write_bytes((tmp_path / "photos" / "1" / "01.png").read_bytes())
    with pytest.raises(UserError, match="list of images"):
        imagenet.main(imagenet_args(folder, tmp_path / "a"))
    imagenet.main(imagenet_args(folder, tmp_path / "a", "--overwrite"))
    assert load(tmp_path / "a")[2]["n"] == 10 and not (tmp_path / "a" / "skipped.txt").exists()


def test_folders_without_classes_or_images_are_refused(tmp_path):
    run = lambda *more: imagenet.main(imagenet_args(str(tmp_path / "in"), tmp_path / "out", *more))
    with pytest.raises(UserError, match="no folder"):
        run()
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="one for each class"):
        run()
    (tmp_path / "in" / "cats").mkdir()
    with pytest.raises(UserError, match="hold no images .cats"):
        run()
    (tmp_path / "in" / "cats" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 class folders .* knows 10"):
        run()
    for _ in range(2):                                # the second time too: nothing is left of the first
        with pytest.raises(UserError, match="none of the 1 images"):
            run("--allow_other_classes")
    assert os.listdir(tmp_path / "out") == []


def test_full_disk_is_a_sentence_before_any_work(tmp_path, monkeypatch):
    folder = make_photos(tmp_path / "photos", per_class=1)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imagenet.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        imagenet.main(imagenet_args(folder, tmp_path / "a"))
    assert os.listdir(tmp_path / "a") == []


def test_every_kind_of_picture_becomes_rgb_or_grey():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    gray = Image.fromarray(ramp)
    deep = Image.fromarray(ramp.astype(np.uint16) * 256 + 7)
    for img in (gray, deep, gray.convert("RGB"), gray.convert("LA"), gray.convert("RGBA"), gray.convert("P")):
        assert np.array_equal(np.asarray(images.convert(img, "L")), ramp), img.mode
        assert np.array_equal(np.asarray(images.convert(img, "RGB")), np.stack([ramp] * 3, -1)), img.mode
    cmyk = Image.new("CMYK", (2, 2), (0, 255, 255, 0))                                        # red
    assert images.convert(cmyk, "RGB").getpixel((0, 0)) == (255, 0, 0) and images.convert(cmyk, "L").mode == "L"
    assert images.convert(Image.new("RGBA", (2, 2), (9, 9, 9, 0)), "RGB").getpixel((0, 0)) == (255, 255, 255)


def test_crops_depend_on_seed_image_and_number_alone():
    rng = lambda *key: np.random.default_rng(key)
    square = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    crop = lambda img, *key: np.asarray(images.random_crop(img, 32, rng(*key)))
    assert np.array_equal(crop(square, 0, 5, 1), crop(square, 0, 5, 1))
    assert len({crop(square, s, i, k).tobytes() for s in (0, 1) for i in (0, 1) for k in (0, 1)}) == 8
    wide = square.resize((96, 64))                    # 0.8 of its area is a square of 70, more than 64 high: it falls back
    center = np.asarray(wide.crop((16, 0, 80, 64)).resize((32, 32), Image.Resampling.BICUBIC))
    assert all(any(np.array_equal(crop(wide, 0, 0, k), c) for c in (center, center[:, ::-1])) for k in range(8))
    assert images.center_crop(wide, 32).size == images.center_crop(square, 32).size == (32, 32)


def test_a_prompt_becomes_one_line_whatever_characters_it_holds(tmp_path):
    family, hebrew = "a 👩‍👩‍👧 on a beach", "\u200fשלום\u200e, world"
    text = f"\ufeff{family}\r\n\t two\u00a0 \t blanks \u3000 \r\n{hebrew}\na\x00 b\x07\x1b[0m\nc\u2028d\x85e\x0bf\n"
    assert listed(tmp_path, "a.txt", text) == [family, "two blanks", hebrew, "a b[0m", "c d e f"]
    assert prompts.read_prompts(str(tmp_path / "out.txt")) == (tmp_path / "out.txt").read_text().splitlines()
    # all characters there are, in a row: one line comes of them, and nothing is lost but line breaks and controls
    every = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    kept = prompts.clean("".join(every))
    assert len(kept.splitlines()) == 1
    assert set(every) - set(kept) == {c for c in every if unicodedata.category(c) == "Cc" or c.isspace() and c != " "
                                      or c == "\ufeff"}
    assert prompts.clean("a\u2028\x1cb") == "a b" and prompts.clean("a \0 b") == "a b" == prompts.clean("a\x1fb")


def test_ten_thousand_prompts_keep_their_order_and_lose_repetitions(tmp_path, capsys):
    lines = [f"prompt {i % 9000}" + " " * (i % 3) for i in range(10_000)] + ["", " \t ", "x" * 1001, "x" * 1000]
    assert listed(tmp_path, "a.txt", "\n".join(lines)) == [f"prompt {i}" for i in range(9000)] + ["x" * 1000]
    said = capsys.readouterr().out
    assert said.endswith("out.txt: 9,001 prompts; 10,004 read; 1,000 left out, repeated; 2 left out, empty; "
                         "1 left out, longer than 1,000 characters\n")
    assert listed(tmp_path, "a.txt", "\n".join(lines), "--limit", "7") == [f"prompt {i}" for i in range(7)]
    assert listed(tmp_path, "a.txt", "a\nabc\nabcd", "--max_chars", "3") == ["a", "abc"]
    assert ", 7 " not in capsys.readouterr().out                  # reading ended with the seventh prompt
RECORDS = [dict(url="u", TEXT="a cat, \"red\"", AESTHETIC_SCORE=6.5), dict(url="v", TEXT="two\nlines", AESTHETIC_SCORE=6),
           dict(url="w", TEXT="dull", AESTHETIC_SCORE=5.9), dict(url="x", TEXT="unscored", AESTHETIC_SCORE=None)]


def write_records(path, records):
    """The same records in any of the formats."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="reading parquet takes pyarrow")
        from pyarrow import parquet
        parquet.write_table(pyarrow.Table.from_pylist(records), str(path), row_group_size=2)
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as f:
            table = csv.DictWriter(f, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(records)
    else:
        lines = [json.dumps(record) for record in records]
        path.write_text("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n\n".join(lines))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_format_of_the_same_records_gives_the_same_prompts(tmp_path, suffix):
    write_records(source := tmp_path / f"a{suffix}", RECORDS)
    read = lambda *flags: listed(tmp_path, source.name, source.read_bytes(), *flags)
    assert read() == ["a cat, \"red\"", "two lines", "dull", "unscored"]
    assert read("--min_score", "6") == ["a cat, \"red\"", "two lines"]
    assert read("--min_score", "5.9", "--score_column", "AESTHETIC_SCORE", "--limit", "3")[2] == "dull"
    assert read("--column", "url") == ["u", "v", "w", "x"]
    for flags, words in ((("--column", "nope"), "a field nope, found url, TEXT.*--column"),
                         (("--min_score", "6", "--score_column", "nope"), "a field nope.*--score_column"),
                         (("--min_score", "9"), "no prompt to keep.*4 read; 4 left out, with a score below 9, or none")):
        with pytest.raises(UserError, match=words if suffix != ".parquet" else words.replace("url, ", "(url, )?")):
            read(*flags)


def test_the_usual_names_of_fields_have_an_order_and_lists_of_strings_have_none(tmp_path):
    assert listed(tmp_path, "a.csv", "prompt,text,caption\r\n1,2,3\r\n\r\n4,5,6\r\n") == ["3", "6"]
    assert listed(tmp_path, "a.tsv", "\ufeffprompt\ttext\n1\t2\n") == ["2"]
    assert listed(tmp_path, "a.csv", "text,aesthetic\n1,\n2,6\n3,nan\n4,7\n", "--min_score", "6") == ["2", "4"]
    for name, text in (("a.json", '\ufeff ["a", "b\\nc"]'), ("a.jsonl", '"a"\n\n"b\\tc"\n'), ("b.json", '"a"\n"b  c"')):
        assert listed(tmp_path, name, text) == ["a", "b c"]
    assert listed(tmp_path, "a.jsonl", '{"prompt": "\\ud83d\\ude00 \\u0000x"}') == ["😀 x"]
    (tmp_path / "a.txt").write_text("1\n2\n")
    (tmp_path / "b.csv").write_text("caption\nfrom b\n2\n")
    prompts.main(prompts.parser().parse_args(["--limit", "9", *(str(tmp_path / f) for f in ("a.txt", "b.csv")), "--out",
                                              str(tmp_path / "out.txt")]))
    assert prompts.read_prompts(str(tmp_path / "out.txt")) == ["1", "2", "from b"]
BROKEN = [("a.txt", b"one\ntw\xff\nthree", "a.txt, line 2: invalid UTF-8", ["one", "three"]),
          ("a.csv", b"id,text\n1,one\n2\n3,\"th\nree\"\n4,5,6\n", "a.csv, line 3: 1 fields instead of 2", ["one", "th ree"]),
          ("b.csv", b"text,id\n\"on\ne\",1\n\"t\"wo,2\nthree,3", "b.csv, line 4: not a row", ["on e", "three"]),
          ("c.csv", b"text\none\n\"two\nthree", "c.csv, line 3: not a row of fields .unexpected end", ["one"]),
          ("d.csv", b"text\none\ntw\xe9\n", "d.csv, line 3: invalid UTF-8", ["one"]),
          ("e.csv", b"text,aesthetic\none,7\ntwo,high\n", "e.csv, line 3: the score in the field aesthetic", ["one"]),
          ("a.jsonl", b'"one"\n\n{"text"\n"two"', "a.jsonl, line 3: invalid JSON", ["one", "two"]),
          ("b.jsonl", b'{"text": "one"}\n{"txt": "two"}', "b.jsonl, line 2: .* field text, got nothing", ["one"]),
          ("c.jsonl", b'{"text": "one"}\n{"text": 2}', "c.jsonl, line 2: .* field text, got int", ["one"]),
          ("d.jsonl", b'null\n[]\n"one"', "d.jsonl, line 1: expected a string or a record, got nothing", ["one"]),
          ("e.jsonl", b'"one"\n"t\xffwo"', "e.jsonl, line 2: invalid UTF-8", ["one"]),
          ("f.jsonl", b'"\\ud83d"\n"one"', "f.jsonl, line 1: invalid UTF-8", ["one"]),
          ("g.jsonl", b'"one"\n' + b"[" * 10**5 + b"\n" + b"9" * 5000, "g.jsonl, line 2: invalid JSON", ["one"]),
          ("a.json", b'["one", null, {"caption": ["two"]}]', "a.json, item 2: expected a string", ["one"])]


@pytest.mark.parametrize("name, content, words, rest", BROKEN, ids=[case[0] for case in BROKEN])
def test_what_is_broken_is_named_by_line_or_skipped_and_counted(tmp_path, capsys, name, content, words, rest):
    flags = ("--min_score", "6") if name == "e.csv" else ()
    with pytest.raises(UserError, match=words + ".*--skip_broken"):
        listed(tmp_path, name, content, *flags)
    assert not (tmp_path / "out.txt").exists()
    assert listed(tmp_path, name, content, "--skip_broken", *flags) == rest
    assert "left out, broken" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"", "no prompt to keep in .*a.txt: 0 read$"), ("a.txt", b"\n \r\n", "2 read; 2 left out, empty"),
    ("a.csv", b"", "0 read"), ("a.csv", b"text\n", "0 read"), ("a.csv", b'"text\na', "line 1: .*names of the fields"),
    ("a.json", b"", "0 read"), ("a.json", b"[]", "0 read"), ("a.json", b'["a",\n"b"\n"c"]', "a.json, line 3: invalid JSON"),
    ("a.json", b'{"a.png": "cat"}', "a field caption or .*found a.png; name it by --column"),
    ("a.jsonl", b"{}", "found none"), ("a.jsonl", "\ufeff".encode("utf-16"), "line 1: invalid JSON"),
    ("a.txt", "cat".encode("utf-16"), "line 1: invalid UTF-8"), ("a.doc", b"cat", "ends in .txt, .csv, .*.parquet")])
def test_sources_without_a_prompt_are_refused_and_write_nothing(tmp_path, name, content, words):
    (tmp_path / "out.txt").write_text("the earlier list\n")
    with pytest.raises(UserError, match=words):
        listed(tmp_path, name, content)
    assert (tmp_path / "out.txt").read_text() == "the earlier list\n" and len(os.listdir(tmp_path)) == 2


def test_parquet_without_pyarrow_and_damaged_parquet_are_sentences(tmp_path, monkeypatch):
    if importlib.util.find_spec("pyarrow"):
        with pytest.raises(UserError, match="cannot read on after row 0"):
            listed(tmp_path, "a.parquet", b"PAR1 and no more")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        listed(tmp_path, "a.parquet", b"PAR1")


def make_pairs(folder, n=11):
    """Images, each with its prompt beside it; two share one, and four cannot be read."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (32 + i, 40, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"  picture\n{max(i, 1)} \u2028👩‍👩‍👧\n", encoding="utf-8")
    (folder / "02.png").write_bytes(b"no picture")
    (folder / "03.txt").write_bytes(b"\xff")
    (folder / "04.txt").write_text(" \n")
    (folder / "05.txt").unlink()                                  # not a pair: not even counted
    (folder / "notes.txt").write_text("no image beside it")
    return folder


def pairs_args(folder, out, *more):
    return prompts.parser().parse_args(["--images", str(folder), "--teacher", "maskgen-tiny", "--random_weights", "--out",
                                        str(out), "--batch", "4", "--device", "cpu", *more])


def test_pairs_are_the_tokenizers_own_tokens_and_train_reads_them_back(tmp_path, capsys, monkeypatch):
    folder, teacher = make_pairs(tmp_path / "in"), load_teacher("maskgen-tiny", random_weights=True)
    seen, encode = [], type(teacher.tokenizer).encode
    monkeypatch.setattr(type(teacher.tokenizer), "encode", lambda self, img: (seen.append(img), encode(self, img))[1])
    prompts.main(pairs_args(folder, tmp_path / "out"))
    seen_images = torch.cat(seen[1:])                      # the pictures themselves: random weights hardly tell them apart
    x, labels, lines = load_tokens(str(tmp_path / "out"), teacher)
    good = [0, 1, 6, 7, 8, 9, 10]
    assert [lines[i] for i in labels] == [f"picture {max(i, 1)} 👩‍👩‍👧" for i in good] and labels[0] == labels[1] == 0
    assert len(x) == len(seen_images) == len(good)
    for row, img, i in zip(x, seen_images, good):
        view = images.variants(str(folder / f"{i:02d}.png"), 0, (3, 32, 32), False, 0, 0)
        view = torch.from_numpy(view).float() / 255
        assert torch.equal(img, view[0]) and np.array_equal(row, encode(teacher.tokenizer, view)[0]), i
    skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in skipped] == ["02.png", "03.png", "04.png"]
    assert "cannot identify" in skipped[0] and "utf-8" in skipped[1] and "empty" in skipped[2]
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    said = describe(teacher.tokenizer, "maskgen-tiny", str(folder))
    assert meta == said | dict(n=7, variants=1, prompts=6, skipped=3, complete=True)
    assert "7 images, 6 prompts; 3 images left out" in capsys.readouterr().out
    prompts.main(pairs_args(folder, tmp_path / "out", "--limit", "2"))                        # anew, and nothing of before
    assert len(load_tokens(str(tmp_path / "out"), teacher)[0]) == 2
    assert sorted(os.listdir(tmp_path / "out")) == ["labels.npy", "meta.json", "prompts.txt", "tokens.npy"]


def test_batches_of_the_gan_see_the_prompts_of_their_images(tmp_path):
    teacher = load_teacher("maskgen-tiny", random_weights=True)
    prompts.main(pairs_args(make_pairs(tmp_path / "in"), tmp_path / "out"))
    x, labels, lines = load_tokens(str(tmp_path / "out"), teacher)
    assert labels.max() == len(lines) - 1 and teacher.conditions(lines).shape[0] == len(lines) == 6


@pytest.mark.parametrize("name", ["prompts.txt.tmp", "tokens.npy.tmp", "labels.npy.tmp", "meta.json.tmp", "encode"])
def test_a_kill_at_any_file_leaves_a_folder_that_train_refuses_or_the_old_one(tmp_path, monkeypatch, name):
    folder, teacher = make_pairs(tmp_path / "in"), load_teacher("maskgen-tiny", random_weights=True)
    prompts.main(pairs_args(folder, tmp_path / "out", "--limit", "2"))
    replace, encode = os.replace, type(teacher.tokenizer).encode

    def killed(*args):
        if name == "encode" and len(args[1]) > 1 or str(args[0]).endswith(name):
            raise KeyboardInterrupt
        return replace(*args) if name != "encode" else encode(*args)

    with monkeypatch.context() as m:
        m.setattr(*((type(teacher.tokenizer), "encode", killed) if name == "encode" else (os, "replace", killed)))
        with pytest.raises(KeyboardInterrupt):
            prompts.main(pairs_args(folder, tmp_path / "out"))
    if name == "encode":                              # before anything is written the old folder stays whole
        assert len(load_tokens(str(tmp_path / "out"), teacher)[0]) == 2
    else:
        with pytest.raises(UserError, match="cannot read real tokens"):
            load_tokens(str(tmp_path / "out"), teacher)
    prompts.main(pairs_args(folder, tmp_path / "out"))
    assert len(load_tokens(str(tmp_path / "out"), teacher)[0]) == 7


def test_folders_without_pairs_and_class_teachers_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "in" / "alone.png")
    run = lambda *more: prompts.main(pairs_args(tmp_path / "in", tmp_path / "out", *more))
    for flags, words in (((), "each with its prompt"), (("--teacher", "maskbit-tiny"), "learned classes.*data/imagenet.py"),
                         (("--images", "/nowhere"), "--images /nowhere"), (("a.txt",), "either SOURCE"),
                         (("--out", str(tmp_path / "in")), "overwrite"), (("--batch", "0"), "--batch of 1 or more")):
        with pytest.raises(UserError, match=words):
            run(*flags)
    (tmp_path / "in" / "alone.txt").write_text("alone")
    with pytest.raises(UserError, match="--device nowhere"):
        run("--device", "nowhere")
    (tmp_path / "in" / "alone.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 pairs .* alone.png"):
        run()
    assert os.listdir(tmp_path / "out") == []


def test_the_script_answers_bad_input_with_one_sentence_and_status_2(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"fine\nbr\xffken\n")
    for flags in ([str(tmp_path / "a.txt")], ["/nowhere.txt"]):
        done = subprocess.run([sys.executable, os.path.join(ROOT, "data", "prompts.py"), *flags, "--out",
                               str(tmp_path / "out.txt")], capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "prompts.py: " in done.stderr
        assert not done.stdout and not (tmp_path / "out.txt").exists()
    monkeypatch.chdir(tmp_path)
    for flags, words in ((("--out", "a.txt"), "overwrite"), (("--out", "."), "is a folder"), (("--limit", "0"), "of 1 or")):
        with pytest.raises(UserError, match=words):
            prompts.main(prompts.parser().parse_args(["a.txt", *flags]))
