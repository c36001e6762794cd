"""data/images.py and data/imagenet.py: pictures in folders, their crops, and their tokens.

    pytest tests/test_images.py
"""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from data import imagenet, images, tokens
from data.tokens import describe, load_tokens
from machinery.errors import UserError
from networks.autoencoders import BitTokenizer
from tests.common import tiny_teacher


def noise(seed, height, width, channels=3):
    """A picture that no other resembles."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, channels), dtype=np.uint8))


# --------------------------------------------------------------------------------------- pictures
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
DEEP = Image.fromarray(RAMP.astype(np.uint16) * 256 + 7)                      # 16 bits


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA", "P", "I;16", "I"])
def test_every_kind_of_picture_becomes_rgb_or_gray(mode):
    if mode == "I;16":
        img = DEEP
    elif mode == "I":
        img = Image.fromarray(RAMP.astype(np.int32) * 256 + 7)
    else:
        img = Image.fromarray(RAMP).convert(mode)
    assert img.mode == mode
    assert np.array_equal(images.convert(img, "L"), RAMP)
    assert np.array_equal(images.convert(img, "RGB"), np.stack([RAMP] * 3, axis=-1))


def test_cmyk_has_its_colors_and_what_is_transparent_is_white():
    red = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert images.convert(red, "RGB").getpixel((0, 0)) == (255, 0, 0)
    assert images.convert(red, "L").mode == "L"
    glass = Image.new("RGBA", (2, 2), (9, 9, 9, 0))
    assert images.convert(glass, "RGB").getpixel((0, 0)) == (255, 255, 255)


def crop(img, *key):
    return np.asarray(images.random_crop(img, 32, np.random.default_rng(key)))


def test_crops_depend_on_seed_image_and_number_alone():
    square = noise(0, 256, 256)
    assert np.array_equal(crop(square, 0, 5, 1), crop(square, 0, 5, 1))
    keys = [(seed, i, k) for seed in (0, 1) for i in (0, 1) for k in (0, 1)]
    assert len({crop(square, *key).tobytes() for key in keys}) == 8


def test_variants_are_the_plain_image_its_mirror_and_the_numbered_crops(tmp_path):
    square = noise(0, 64, 64)
    square.save(tmp_path / "a.png")
    plain, mirrored, *crops = images.variants(f"{tmp_path}/a.png", (3, 32, 32), True, 2, (7, 5))
    assert np.array_equal(plain.permute(1, 2, 0), images.center_crop(square, 32))
    assert torch.equal(plain.flip(-1), mirrored)
    for k in range(2):
        assert np.array_equal(crops[k].permute(1, 2, 0), crop(square, 7, 5, k))


def test_a_crop_that_fits_nowhere_is_the_center_square_or_its_mirror():
    wide = noise(0, 256, 256).resize((96, 64))        # 0.8 of its area: 70 x 70, above 64
    center = wide.crop((16, 0, 80, 64)).resize((32, 32), Image.Resampling.BICUBIC)
    center = np.asarray(center)
    for k in range(8):
        found = crop(wide, 0, 0, k)
        assert np.array_equal(found, center) or np.array_equal(found, center[:, ::-1])


def test_a_center_crop_has_the_size_asked_for_whatever_the_shape():
    for w, h in ((256, 256), (96, 64), (33, 100)):
        assert images.center_crop(noise(0, h, w), 32).size == (32, 32)


def test_a_center_crop_is_the_middle_of_pillows_bicubic():
    wide = noise(0, 64, 96)
    expected = wide.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    assert np.array_equal(images.center_crop(wide, 32), expected)


# ---------------------------------------------------------------------------------------- folders
def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


def test_classes_are_subfolders_in_the_order_of_their_names_and_hidden_files_are_none(tmp_path):
    folder = touch(tmp_path, "b/2.JPEG", "b/sub/1.png", "a-b/x.webp", "a/x.gif",
                   "a/.x.png", "a/x.txt", ".hidden/x.png", "x.png")
    classes, labels = images.list_images(folder)
    assert classes == ["a", "a-b", "b"]
    assert list(labels) == ["a/x.gif", "a-b/x.webp", "b/2.JPEG", "b/sub/1.png"]
    assert list(labels.values()) == [0, 1, 2, 2]


def test_pairs_are_images_with_a_text_of_their_name_beside_them(tmp_path):
    folder = touch(tmp_path, "b.png", "b.txt", "a.JPG", "a.txt", "alone.png", "notes.txt",
                   ".c.png", ".c.txt", "sub/d.png", "sub/d.txt")
    assert images.list_pairs(folder) == ["a.JPG", "b.png"]


def test_a_folder_of_images_is_read_by_number_and_what_is_unreadable_is_named(tmp_path):
    for i in range(10):
        noise(i, 20, 30).save(tmp_path / f"{i}.png")
    names, make, complain = images.folder_images(str(tmp_path), "--real")
    img, = make(torch.tensor([3]))
    assert np.array_equal(img.permute(1, 2, 0), noise(3, 20, 30))
    assert names[3] == f"{tmp_path}/3.png"
    complain()
    (tmp_path / "3.png").write_bytes(b"cut")
    assert make(torch.tensor([3]))[0].tolist() == [[[0]]] * 3
    with pytest.raises(UserError, match="1 of 10 images cannot be read: .*3.png .Unidentified"):
        complain()


def test_batches_are_read_ahead_in_order_and_what_is_unreadable_is_named():
    def read(i):
        if i % 3 == 1:
            raise UserError(f"no {i}")
        return i

    for n, sizes in ((0, []), (1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4])):
        batches = list(images.read_ahead(read, range(n), batch=4, workers=2))
        assert [len(good) + len(bad) for good, bad in batches] == sizes
        all_good = [i for good, _ in batches for i in good]
        all_bad = [reason for _, bad in batches for reason in bad]
        assert all_good == [i for i in range(n) if i % 3 != 1]
        assert all_bad == [(i, f"no {i}") for i in range(n) if i % 3 == 1]


# ------------------------------------------------------------------------------- data/imagenet.py
def make_photos(folder, per_class=5, side=28):
    """10 class folders of small random gray pictures, the first of class 0 unreadable."""
    draw = np.random.default_rng(0)
    for i in range(10 * per_class):
        os.makedirs(folder / str(i % 10), exist_ok=True)
        photo = Image.fromarray(draw.integers(0, 256, (side, side + i % 3), dtype=np.uint8))
        photo.save(folder / str(i % 10) / f"{i:02d}.png")
    (folder / "0" / "00.png").write_bytes(b"not a picture")
    return str(folder)


def arguments(folder, out, *more):
    fixed = "--teacher maskbit-tiny --random_weights --workers 2 --batch 8 --device cpu".split()
    return imagenet.flags().parse_args([folder, *fixed, "--out", str(out), *more])


def encode(folder, out, *more):
    imagenet.main(arguments(folder, out, *more))


def load(path):
    """(tokens, labels, meta) by train.py's own reader."""
    x, labels, _ = load_tokens(str(path), tiny_teacher("maskbit-tiny"))
    return x, labels, json.loads((path / "meta.json").read_text())


def test_encoding_interrupted_anywhere_ends_in_the_same_bytes(tmp_path, monkeypatch):
    folder = make_photos(tmp_path / "photos")
    monkeypatch.setattr(imagenet, "SAVE_EVERY", -1)
    encode(folder, tmp_path / "a", "--crops", "1")
    real_encode, calls = BitTokenizer.encode, []

    def dies_now_and_then(self, img):
        calls.append(len(img))
        if len(img) > 1 and len(calls) % 5 == 4:
            raise KeyboardInterrupt
        return real_encode(self, img)

    monkeypatch.setattr(BitTokenizer, "encode", dies_now_and_then)
    deaths = 0
    for _ in range(20):
        try:
            encode(folder, tmp_path / "b", "--crops", "1")
        except KeyboardInterrupt:
            deaths += 1
            if (tmp_path / "b" / "meta.json").exists():
                with pytest.raises(UserError, match="unfinished"):
                    load(tmp_path / "b")
    assert deaths > 2
    for name in ("tokens.npy", "labels.npy", "meta.json", "skipped.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_unreadable_images_are_named_and_leave_no_rows(tmp_path):
    folder = make_photos(tmp_path / "photos")
    encode(folder, tmp_path / "a", "--flip")
    x, y, meta = load(tmp_path / "a")
    skipped = (tmp_path / "a" / "skipped.txt").read_text()
    assert skipped.startswith("0/00.png\tUnidentifiedImageError")
    assert meta["skipped"] == 1
    assert x.shape == (98, 64, 2)
    assert list(y[:10]) == [0] * 8 + [1] * 2
    views = images.variants(os.path.join(folder, "9/49.png"), (1, 32, 32), flip=True)
    tokenizer = tokens.load_tokenizer("maskbit-tiny", random_weights=True)
    assert np.array_equal(x[-2:], tokenizer.encode(views.float() / 255))
    assert np.array_equal(x[-2:], tokens.encode(tokenizer, views, batch=1))


def test_each_image_has_crops_of_its_own(tmp_path, monkeypatch):
    folder, seen = make_photos(tmp_path / "photos"), []

    def remembers(tokenizer, pixels, batch):
        seen.append(pixels)
        return tokens.encode(tokenizer, pixels, batch)

    monkeypatch.setattr(imagenet, "encode", remembers)
    encode(folder, tmp_path / "a", "--crops", "1", "--seed", "3")
    views = images.variants(f"{folder}/9/49.png", (1, 32, 32), crops=1, seed=(3, 49))
    assert torch.equal(torch.cat(seen)[-2:], views)


def test_tokens_say_which_weights_made_them(tmp_path):
    encode(make_photos(tmp_path / "photos", per_class=1), tmp_path / "a")
    _, _, meta = load(tmp_path / "a")
    tokenizer = tokens.load_tokenizer("maskbit-tiny", random_weights=True)
    assert meta["tokenizer"] == describe(tokenizer, "maskbit-tiny", "")["tokenizer"]
    next(tokenizer.parameters()).data += 1e-3
    assert meta["tokenizer"] != describe(tokenizer, "maskbit-tiny", "")["tokenizer"]


def test_going_on_with_other_arguments_is_refused_by_name(tmp_path):
    folder = make_photos(tmp_path / "photos", per_class=1)
    photo = (tmp_path / "photos" / "1" / "01.png").read_bytes()
    more = tmp_path / "photos" / "0" / "more.png"
    more.write_bytes(photo)
    encode(folder, tmp_path / "a")
    for flags in (["--flip"], ["--crops", "2"], ["--seed", "1"]):
        with pytest.raises(UserError, match=flags[0]):
            encode(folder, tmp_path / "a", *flags)
    more.unlink()
    (tmp_path / "photos" / "0" / "00.png").write_bytes(photo)
    with pytest.raises(UserError, match="list of images"):
        encode(folder, tmp_path / "a")
    encode(folder, tmp_path / "a", "--overwrite")
    assert load(tmp_path / "a")[2]["n"] == 10
    assert not (tmp_path / "a" / "skipped.txt").exists()


def test_folders_without_classes_or_images_are_refused(tmp_path):
    def refused(words, *flags):
        with pytest.raises(UserError, match=words):
            encode(str(tmp_path / "in"), tmp_path / "out", *flags)

    refused("no folder")
    (tmp_path / "in").mkdir()
    refused("one for each class")
    (tmp_path / "in" / "cats").mkdir()
    refused("the class folder cats holds no images")
    (tmp_path / "in" / "cats" / "a.png").touch()
    refused("1 class folders .* knows 10: .* --allow_other_classes goes on")
    refused("none of the 1 images", "--allow_other_classes")
    refused("none of the 1 images", "--allow_other_classes")      # the first try left nothing
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("flags, words", [
    (["--crops", "-1"], "--crops: expected a whole number of 0 or more, got -1"),
    (["--batch", "0"], "--batch: expected a whole number of 1 or more, got 0"),
    (["--workers", "0"], "--workers: expected a whole number of 1 or more, got 0"),
    (["--device", "nowhere"], "--device: invalid choice: 'nowhere'"),
])
def test_flags_out_of_range_are_refused_by_name(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as end:
        arguments("in", "out", *flags)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_full_disk_is_a_sentence_before_any_work(tmp_path, monkeypatch):
    folder = make_photos(tmp_path / "photos", per_class=1)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot allocate 0.0 MB .*No space left"):
        encode(folder, tmp_path / "a")
    assert os.listdir(tmp_path / "a") == []
