"""evaluate.py: what is drawn, the real side, rows and files, many processes, tables.

Inception is replaced by `Small` (tests/test_metrics.py) here, which costs nothing.
"""

import dataclasses
import functools
import json
import math
import os
import runpy
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import teachers
from data.images import center_crop, folder_images
from machinery import pictures, processes
from machinery.errors import UserError
from machinery.files import ROOT, fingerprint
from metrics import engine, fid, reference, tables
from metrics.published import PUBLISHED, published
from networks import inception
from teachers import SPECS, load_teacher
from tests.common import command, photos, same_psnr, student
from tests.runs import free_port, one_thread
from tests.test_metrics import Small
from worlds.fashion import load_extractor

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tiny():
    return load_teacher("maskbit-tiny", random_weights=True)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(inception, "Inception", Small)
    monkeypatch.setattr(reference, "Inception", Small)
    return inception.load_inception(random_weights=True)


def adm_like(path, dim=12, **more):
    """A file of statistics, as ADM's is."""
    f = np.random.RandomState(0).standard_normal((200, dim))
    np.savez(path, mu=f.mean(0), sigma=np.cov(f, rowvar=False), **more)
    return str(path)


def black(n, size=8):
    return np.zeros((n, size, size, 3), np.uint8)


# --------------------------------------------------------------------------------- what is drawn
def test_images_are_a_function_of_the_seed_and_argmax_of_the_start(tiny):
    def draw(seed, temperature):
        return teachers.generate_student(tiny, tiny.net, torch.arange(4), temperature=temperature,
                                         generator=generator(seed))

    img = draw(1, 1.0)
    assert img.dtype == torch.uint8 and img.shape == (4, 1, 32, 32)
    assert img.equal(draw(1, 1.0)) and not img.equal(draw(2, 1.0)) and not img.equal(draw(1, 0))
    argmax = functools.partial(teachers.generate_student, tiny, tiny.net, torch.zeros(1).long(),
                               init_ratio=1.0, noise=0.0, temperature=0)
    assert argmax().equal(argmax())                   # all masked, nothing is drawn: one image

    def many(steps):
        return teachers.generate_teacher(tiny, torch.arange(2), steps, generator=generator())

    assert many(3).equal(many(3)) and not many(3).equal(many(1))


def test_pixels_are_truncated_or_rounded_as_each_teachers_authors_do(tiny, monkeypatch):
    values = torch.tensor([0.0, 0.4, 0.9999, 254.9, 255.0]) / 255
    monkeypatch.setattr(teachers, "decode_tokens", lambda tokenizer, x, cond: values)
    rounding = tiny._replace(spec=dataclasses.replace(tiny.spec, rounds=True))
    for teacher, expected in ((tiny, [0, 0, 0, 254, 255]), (rounding, [0, 0, 1, 255, 255])):
        assert teachers.to_pixels(teacher, torch.zeros(1), (), 0.0, None).tolist() == expected
    assert all(SPECS[name].rounds for name in ("maskgit", "maskgit-512", "meissonic"))
    assert not any(SPECS[name].rounds for name in ("maskbit", "maskgen", "maskgen-xl"))


# ----------------------------------------------------------------------------------- the real side
def one_by_one(extractor, folder):
    """The features of every picture below a folder, read without our reader, (n, dim)."""
    features = []
    for where, _, files in os.walk(folder):
        for name in files:
            a = np.array(Image.open(os.path.join(where, name)))
            if a.dtype != np.uint8:                   # 16 bits: uint16, in older Pillows int32
                a = (a >> 8).astype(np.uint8)
            if a.ndim == 2:
                a = np.stack([a] * 3, 2)
            img = torch.from_numpy(a).permute(2, 0, 1)[None]
            features.append(engine.extract(extractor, img)[0][0])
    return torch.stack(features).double().numpy()


def test_statistics_of_a_folder_are_those_of_its_images_whatever_their_size_depth_and_order(small,
                                                                                            tmp_path):
    folder = photos(tmp_path / "a")
    f = one_by_one(small, folder)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    for batch in (5, 64):
        real = reference.folder_reference(folder, small, CPU, batch)
        assert np.allclose(real.mu, f.mean(0), atol=1e-7)
        assert np.allclose(real.sigma, np.cov(f, rowvar=False), atol=1e-7)
        sums = sorted(real.features.double().sum(1).tolist())
        assert sums == pytest.approx(sorted(f.sum(1)), abs=1e-5)
    assert real.name.startswith("a, 24 images, ")
    os.remove(os.path.join(folder, "23.png"))
    other = reference.folder_reference(folder, small, CPU, 5)
    assert other.name.split()[-1] != real.name.split()[-1]


def test_a_folder_against_itself_and_against_a_shifted_copy(small, tmp_path):
    a, b = photos(tmp_path / "a", 11), photos(tmp_path / "b", 11, shift=50)    # fewer than features
    real = reference.folder_reference(a, small, CPU, 4)

    def row(folder):
        make = folder_images(folder, "--fake")[1]
        return fid.image_metrics(make, torch.arange(11), small, real, 4)

    same, shifted = row(a), row(b)
    assert same["fid"] == pytest.approx(0, abs=1e-6) and same["precision"] == 1
    assert shifted["fid"] == pytest.approx(12 * (50 / 128) ** 2, rel=1e-4)     # 12 features, all shifted
    assert shifted["fid_eigenvalues"] == pytest.approx(shifted["fid"], abs=1e-4)


def test_images_that_cannot_be_read_are_counted_named_and_never_left_out(small, tmp_path):
    folder = photos(tmp_path / "a", 12)
    broken = tmp_path / "a" / "07.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (tmp_path / "a" / "sub" / "x.jpg").write_bytes(b"no picture")
    words = r"--real .*a: 2 of 13 images cannot be read: .* first is .*07.png \(\w+"
    with pytest.raises(UserError, match=words):
        reference.folder_reference(folder, small, CPU, 4)
    for path, words in (("none", "no such folder"),
                        ("a/sub", "statistics need 10 images at least, found 2")):
        with pytest.raises(UserError, match=words):
            folder_images(str(tmp_path / path), "--real")


def test_of_a_large_folder_every_kth_feature_is_kept_and_all_count(small):
    img = torch.randint(0, 256, (23, 3, 8, 8), generator=generator()).to(torch.uint8)
    take = functools.partial(engine.extracted, lambda i, **_: img[i], torch.arange(23), small, batch=4)
    whole, some = take(), take(every=5)
    assert torch.equal(some.features, whole.features[::5])
    assert torch.equal(some.logits, whole.logits[::5])
    assert np.array_equal(some.mu, whole.mu) and np.array_equal(some.sigma, whole.sigma)


def test_files_that_are_no_statistics_are_refused_with_a_sentence(tmp_path):
    assert load_extractor(SPECS["maskbit"]) == (None, None)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 32, 32)))
    np.savez(tmp_path / "other.npz", mu=np.zeros(4), sigma=np.eye(4))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut short")
    for name, words in (("images", "mu"), ("other", "feature network"), ("cut", "npz"),
                        ("missing", "missing.npz")):
        with pytest.raises(UserError, match=words):
            reference.load_reference(str(tmp_path / f"{name}.npz"), 208)


def test_a_reference_made_from_a_folder_is_kept_and_knows_how(small, tmp_path):
    folder, path = photos(tmp_path / "a"), str(tmp_path / "kept.npz")
    flags = ["--teacher", "maskgit-tiny", "--steps", 1, "--n", 12]
    save = f"--real {folder} --crop --save_reference {path} --random_weights --device cpu"
    evaluate.main(evaluate.flags().parse_args([*save.split(), "--out", f"{tmp_path}/out"]))
    assert os.listdir(tmp_path / "out") == []                                  # nothing was drawn
    kept = command(tmp_path, *flags, "--reference", path, "--crop")[-1]
    made = command(tmp_path, *flags, "--real", folder, "--crop")[-1]
    for key in ("fid", "precision", "recall", "density", "coverage"):
        assert kept[key] == made[key]
    words = "was made with resize legacy_tensorflow, coco_crop, and these flags say .*no crop"
    with pytest.raises(UserError, match=words):
        command(tmp_path, *flags, "--reference", path)


# ------------------------------------------------------------------------------------ rows and files
def test_a_row_names_everything_that_makes_fids_differ(small, tmp_path, capsys):
    images = np.random.RandomState(0).randint(0, 256, (20, 16, 16, 3)).astype(np.uint8)
    path = adm_like(tmp_path / "ref.npz", arr_0=images)
    with np.load(path) as f:
        digest = fingerprint([f["mu"], f["sigma"]])
    rows = command(tmp_path, "--teacher", "maskgit-tiny", "--steps", 1, 2, "--n", 40, "--batch", 16,
                   "--seed", 3, "--reference", path, "--resize", "clean", "--save_images")
    for row, steps in zip(rows, (1, 2)):
        expected = dict(n=40, per_class=40 / SPECS["maskgit-tiny"].classes, seed=3, steps=steps,
                        resize="clean", crop=None, features="fp32", dtype="fp32", batch=16, k=3,
                        inception="random", labels="each class in turn",
                        reference=f"ref.npz {digest}, neighbors: its 20 images")
        assert {key: row[key] for key in expected} == expected
        assert "temperature" in row and row["extractor"].startswith("Small ")
        for key in ("fid", "is", "is_std", "is_stylegan", "is_adm", "precision", "coverage"):
            assert np.isfinite(row[key])
        assert row["reference"] in row["note"]
        assert ", resize clean, no crop, in float32" in row["note"]

    out = capsys.readouterr().out
    for words in ("below 10,000, FID is biased", digest, "seed 3", "| teacher |"):
        assert words in out
    assert (tmp_path / "out" / "table.md").read_text().strip() in out
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["fid"] for row in table] == [row["fid"] for row in rows]

    folders = sorted((tmp_path / "out" / "images").iterdir())                  # as --save_images asked
    assert [len(list(f.iterdir())) for f in folders] == [40, 40]
    again = command(tmp_path, "--fake", folders[0], "--reference", path, "--resize", "clean",
                    "--batch", 16)[-1]
    for key in ("fid", "is", "precision", "recall"):
        assert again[key] == pytest.approx(rows[0][key], abs=1e-9)
    assert again["kind"] == "folder" and again["n"] == 40


def test_only_the_metrics_asked_for_are_computed(small, tmp_path, monkeypatch):
    path = adm_like(tmp_path / "ref.npz", arr_0=black(20))
    for module, name in ((fid, "prdc"), (fid, "fid"), (reference, "extracted")):
        monkeypatch.setattr(module, name, None)                               # a call would fail
    row, = command(tmp_path, "--teacher", "maskgit-tiny", "--steps", 1, "--n", 12,
                   "--reference", path, "--metrics", "is")
    assert row["is"] >= 1 and "fid" not in row and "precision" not in row


REFUSED_BY_ARGPARSE_OR_A_SENTENCE = [
    "--n 0", "--n 9", "--temperature -1", "--ckpt nowhere.pt", "--teacher maskgot",
    "--prompts nowhere.txt --teacher maskgen-tiny --random_weights",
    "--order halton --teacher maskgen-tiny --random_weights"]


@pytest.mark.parametrize("flags", REFUSED_BY_ARGPARSE_OR_A_SENTENCE)
def test_what_cannot_be_evaluated_is_refused_and_the_words_say_what(flags, tmp_path, capsys):
    with pytest.raises((UserError, SystemExit)) as end:
        evaluate.main(evaluate.flags().parse_args([*flags.split(), "--out", str(tmp_path)]))
    said = str(end.value) if isinstance(end.value, UserError) else capsys.readouterr().err
    assert flags.split()[1] in said


def test_the_script_ends_with_code_2_and_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--n", "9", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(os.path.join(ROOT, "evaluate.py"), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err == "evaluate.py: --n 9: statistics need 10 images at least\n"


REFUSED = [
    ("--metrics fid --teacher maskgit-tiny",
     "--metrics fid of maskgit-tiny needs --reference PATH.npz"),
    ("--metrics fid prdc --reference {0}/ref.npz", "--metrics prdc needs real images"),
    ("--reference {0}/none.npz", "none.npz"),
    ("--reference {0}/images.npz", "expected an .npz with mu and sigma"),
    ("--reference {0}/array.npy", "expected an .npz with mu and sigma"),
    ("--reference {0}/weights.pt", "expected an .npz with mu and sigma"),
    ("--reference {0}/wide.npz",
     "expected mu .12,. and sigma .12, 12., got .14,. and .14, 14.: made with another"),
    ("--reference {0}/nan.npz", "not finite"),
    ("--reference {0}/gray.npz",
     "expected images, uint8 .n, H, W, 3., in its arr_0, got float64 .4, 8, 8."),
    ("--reference {0}/ref.npz --real {0}", "both the real side: give one"),
    ("--real {0}/none", "--real .*none: no such folder"),
    ("--real {0}", "statistics need 10 images at least, found 0"),
    ("--fake {0}", "--fake belongs to a FID by Inception: add --reference"),
    ("--fake {0} --metrics fid", "--fake belongs to a FID by Inception: add --reference"),
    ("--reconstruction --reference {0}/ref.npz", "add --real FOLDER, what to reconstruct"),
    ("--fake {0}/none --reference {0}/ref.npz", "--fake .*none: no such folder"),
    ("--resize clean", "--resize belongs to a FID by Inception"),
    ("--reference {0}/ref.npz --save_reference x.npz", "add --real FOLDER"),
    ("--reference {0}/ref.npz --inception {0}/none.pth", "no weights at .*none.pth"),
    ("--reference {0}/ref.npz --n 9", "statistics need 10 images at least"),
    ("--reconstruction --teacher maskgit-tiny", "for other images add --real FOLDER"),
    ("--metrics clip geneval --metadata {0}/captions.txt --teacher maskgen-tiny",
     "a path for each of clip, geneval, in this order"),
    ("--metrics clip --benchmark clip", "short for --metrics clip: give one"),
    ("--metrics fid --metadata {0}/captions.txt",
     "--metadata .*captions.txt belongs to --metrics"),
]


@pytest.mark.parametrize("flags, words", REFUSED)
def test_what_a_fid_cannot_be_made_of_is_a_sentence_before_anything_is_drawn(small, tmp_path, flags,
                                                                             words):
    adm_like(tmp_path / "ref.npz")
    adm_like(tmp_path / "wide.npz", 14)
    adm_like(tmp_path / "gray.npz", arr_0=np.zeros((4, 8, 8)))
    np.save(tmp_path / "array.npy", np.zeros(12))
    np.savez(tmp_path / "images.npz", arr_0=black(4))
    np.savez(tmp_path / "nan.npz", mu=np.full(12, np.nan), sigma=np.eye(12))
    torch.save({"mu": torch.zeros(12)}, tmp_path / "weights.pt")
    (tmp_path / "captions.txt").write_text("a ring\n")
    flags = flags.format(tmp_path).split()
    if "--teacher" not in flags:
        flags += ["--teacher", "maskgit-tiny"]
    with pytest.raises(UserError, match=words):
        command(tmp_path, *flags)
    assert os.listdir(tmp_path / "out") == []


def test_imagenet_has_adms_reference_and_50_000_images_unless_told(small, tmp_path, monkeypatch):
    path, called = adm_like(tmp_path / "adm.npz", arr_0=black(20)), []
    teacher = load_teacher("maskgit-tiny", random_weights=True)
    spec = dataclasses.replace(teacher.spec, name="maskgit", image=(3, 256, 256),
                               net={**teacher.spec.net, "classes": 1000})
    teacher = teacher._replace(spec=spec)

    def metrics_of(make, asked, extractor, reference, metrics, **kw):
        per_class = asked.bincount().unique().tolist()
        called.append((len(asked), per_class, reference.name.split()[0], metrics))
        return dict(n=len(asked), fid=7.0, extractor="x", reference=reference.name, seed=0,
                    **extractor.facts)

    monkeypatch.setattr(reference, "download", lambda url, digest, flag: path)
    monkeypatch.setattr(evaluate, "load_teacher", lambda *_, **__: teacher)
    monkeypatch.setattr(evaluate, "image_metrics", metrics_of)
    monkeypatch.setattr(type(teacher), "conditions", lambda self, prompts=None: torch.arange(1000))
    monkeypatch.setattr(evaluate, "fixed_sample",
                        lambda *_: torch.zeros(4, 3, 256, 256, dtype=torch.uint8))
    row, = command(tmp_path, "--teacher", "maskgit", "--steps", 8, "--metrics", "fid", "is")
    assert called == [(50_000, [50], "adm.npz", ["fid", "is"])] and row["per_class"] == 50
    assert row["published"] == [{"of": "8", "table": "Tab.2", "fid": 6.66}]


def test_torchrun_understands_every_flag_of_the_readme():
    """torchrun reads abbreviations of its own flags even behind the script's name: --n is one."""
    from torch.distributed.run import parse_args
    line = ("--nproc_per_node=4 evaluate.py --ckpt a --metrics fid is prdc --n_images 10 "
            "--reference adm --real x --out y")
    assert parse_args(line.split()).training_script == "evaluate.py"
    for name in ("--n_images", "--n"):
        assert evaluate.flags().parse_args([name, "12"]).n == 12


def test_several_benchmarks_in_one_command_take_their_metadata_in_order(tmp_path):
    line = {"tag": "single_object", "include": [{"class": "square", "count": 1}], "prompt": "a square"}
    captions, meta = tmp_path / "captions.txt", tmp_path / "meta.jsonl"
    meta.write_text(json.dumps(line) + "\n")
    captions.write_text("a red ring\ntwo crosses\n")
    rows = command(tmp_path, "--teacher", "maskgen-tiny", "--steps", 1, "--metrics", "clip", "geneval",
                   "--per_prompt", 1, "--detector", "shapes", "--metadata", captions, meta)
    assert [row["n"] for row in rows] == [2, 1]
    assert "clip_score" in rows[0] and "single_object" in rows[1]
    assert [row["labels"] for row in rows] == [str(captions), str(meta)]
    assert len(os.listdir(tmp_path / "out" / "geneval")) == 1


# ------------------------------------------------------------------------------------ reconstruction
def test_reconstruction_of_a_folder_has_the_psnr_of_its_crops_and_a_fid_against_them(small, tmp_path):
    folder = photos(tmp_path / "a", 12)
    row, = command(tmp_path, "--reconstruction", "--teacher", "maskgit-tiny", "--real", folder,
                   "--batch", 5)
    teacher = load_teacher("maskgit-tiny", random_weights=True)
    spec, error = teacher.spec, 0
    names, make, _ = folder_images(folder, "--real", spec.image)
    for i, name in enumerate(names):
        img = make(torch.tensor([i]))[0]
        if i not in (2, 3):                           # the gray ones aside, against Pillow itself
            crop = center_crop(Image.open(name).convert("RGB"), spec.image[1])
            assert np.array_equal(img.permute(1, 2, 0).numpy(), np.array(crop))
        x = teacher.tokenizer.encode(img[None].float() / 255)
        back = teachers.decode_tokens(teacher.tokenizer, x) * 255 + spec.rounds / 2
        error += (back.to(torch.uint8).double() - img).square().mean().item()
    assert same_psnr(row["psnr"], 10 * math.log10(255**2 / (error / 12)))
    assert row["fid"] > 0 and row["n"] == 12
    assert f"| {row['psnr']:.2f} |" in (tmp_path / "out" / "table.md").read_text()
    assert row["reference"].startswith("the same 12 images")


def test_reconstruction_against_a_reference_has_a_row_of_the_images_themselves(small, tmp_path):
    folder = photos(tmp_path / "a", 12)
    real, back = command(tmp_path, "--reconstruction", "--teacher", "maskgen-tiny", "--real", folder,
                         "--reference", adm_like(tmp_path / "r.npz"), "--metrics", "fid")
    assert (real["model"], back["model"]) == (f"real {folder}", f"{folder} reconstructed")
    assert real["fid"] != back["fid"] and "psnr" in back and "psnr" not in real
    (tmp_path / "a" / "07.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="1 of 12 images cannot be read"):
        command(tmp_path, "--reconstruction", "--teacher", "maskgen-tiny", "--real", folder,
                "--metrics", "fid")


# ------------------------------------------------------------------------------------ many processes
class Processes:
    """torch.distributed in threads: rank r of `world`; sums and gathers meet at a barrier."""

    def __init__(self, world):
        self.world = world
        self.mine = threading.local()
        self.meet = threading.Barrier(world, timeout=20)
        self.table = {}

    def is_initialized(self):
        return self.world > 1

    def get_rank(self):
        return self.mine.rank

    def get_world_size(self):
        return self.world

    def barrier(self):
        self.meet.wait()

    def exchange(self, thing):
        self.table[self.mine.rank] = thing
        self.meet.wait()
        everyone = [self.table[r] for r in range(self.world)]
        self.meet.wait()
        return everyone

    def all_reduce(self, t):
        t.copy_(sum(self.exchange(t.clone())))

    def all_gather_object(self, out, thing):
        out[:] = self.exchange(thing)

    def broadcast_object_list(self, things):
        things[0] = self.exchange(things[0])[0]

    def run(self, f):
        """What f() returns in every process, or the sentence of its UserError."""
        results = [None] * self.world

        def work(r):
            self.mine.rank = r
            try:
                results[r] = f()
            except UserError as err:
                results[r] = str(err)

        threads = [threading.Thread(target=work, args=(r,)) for r in range(self.world)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        return results


NUMBERS = ("fid", "fid_eigenvalues", "is", "is_stylegan", "is_adm", "precision", "recall", "density",
           "coverage")


def test_one_two_and_four_processes_give_the_same_numbers_and_the_same_complaint(small, tmp_path,
                                                                                 monkeypatch):
    folder, img = photos(tmp_path / "a"), torch.rand(50, 3, 9, 9, generator=generator())

    def make(i, generator, **_):
        noise = torch.rand(len(i), 3, 9, 9, generator=generator)
        return ((img[i] + 0.2 * noise) * 200).to(torch.uint8)

    def measured():
        real = reference.folder_reference(folder, small, CPU, 5)
        return fid.image_metrics(make, torch.arange(50), small, real, 7)

    whole = measured()
    assert whole["fid"] > 0.01
    for world in (1, 2, 4):
        group = Processes(world)
        monkeypatch.setattr(processes, "dist", group)
        for row in group.run(measured):
            assert row["processes"] == world and row["reference"] == whole["reference"]
            for key in NUMBERS:
                assert row[key] == pytest.approx(whole[key], rel=1e-6), (world, key)
    (tmp_path / "a" / "20.png").write_bytes(b"broken")
    complaints = group.run(measured)
    assert len(set(complaints)) == 1 and "1 of 24 images cannot be read" in complaints[0]


def test_two_real_processes_measure_what_one_does(tmp_path):
    flags = ["--steps", "2", "--n", "50", "--batch", "15"]
    line = [sys.executable, os.path.join(ROOT, "evaluate.py"), *flags, "--random_weights",
            "--device", "cpu", "--out", str(tmp_path / "two")]
    group = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="localhost", OMP_NUM_THREADS="1",
                 MASTER_PORT=str(free_port()))
    started = [subprocess.Popen(line, env=dict(group, RANK=r, LOCAL_RANK=r)) for r in "01"]
    with one_thread():
        one, = command(tmp_path, *flags)
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    two = json.loads((tmp_path / "two" / "results.jsonl").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    for key in ("is_std", *NUMBERS):
        assert one[key] == pytest.approx(two[key], rel=1e-6), key
    assert (tmp_path / "two" / "sheet.png").stat().st_size > 1000


# ------------------------------------------------------------------------------- sheets and tables
def test_a_sheet_has_a_column_per_class_and_a_strip_per_model(tmp_path):
    img = torch.zeros(12, 1, 32, 32, dtype=torch.uint8)
    img[10] = 200
    strips = [("teacher, 16 steps", img), ("student, 1 step", img[:10])]
    pictures.sheet(strips, str(tmp_path / "s.png"))
    page = Image.open(tmp_path / "s.png")
    assert page.size == (10 * 98 + 2, 3 * 98 + 2 * 16 + 2)        # 32 px three times larger, and gaps
    assert page.getpixel((50, 16 + 98 + 48)) == (200,) * 3        # the eleventh image, wrapped


def test_a_table_says_what_n_does_and_how_fast_one_step_is():
    row = dict(model="teacher", kind="teacher", steps=16, n=5000, fid=4.0)
    slow = {**row, "images/s": 10.0, "tokens_only/s": 12.0}
    fast = {**row, "model": "student", "kind": "student", "steps": 1, "images/s": 200.0,
            "tokens_only/s": 240.0}
    text = tables.table([slow, fast])
    assert "| teacher | 16 " in text and "biased upward" in text and "20.0 times faster" in text
    assert "biased" not in tables.table([dict(row, n=50_000)])


def test_a_sweep_is_a_table_per_checkpoint_and_its_best_stands_in_the_joint_one():
    sweep = [student(0, 3.1), student(0.5, 2.9), student(1, 3.0)]
    other = student(1, 2.0, "student b")
    teacher = dict(model="teacher", kind="teacher", steps=8, n=50_000, fid=1.5)
    text = tables.report([*sweep, other, teacher])
    own, joint = text.split("student a: the best of 3 temperatures is 0.5, FID 2.90")
    assert own.count("student a") == 3 and joint.count("student a") == 1
    assert "2.90" in joint and "3.00" not in joint and "teacher" in joint
    assert "student b" not in own and "student b" in joint
    assert "(argmax), FID 1.00" in tables.report([student(0, 1.0), student(1, 2.0)])
    assert tables.report([sweep[0], other]) == tables.table([sweep[0], other])         # no sweep


# ------------------------------------------------------------------------------ the paper's numbers
def test_published_numbers_are_a_table_of_known_teachers():
    lines = [line.split() for line in PUBLISHED.strip().splitlines()]
    for name, kind, place, *pairs in lines:
        assert name in SPECS and place.startswith("Tab.")
        assert len(pairs) % 2 == 0 and all(map(float, pairs[1::2]))
        student_of = kind in ("Di[M]O", "Soft-Di[M]O", "longer", "TTEO-4x4")
        assert student_of or kind.removesuffix("-halton").isdigit()
    assert len({(name, kind) for name, kind, *_ in lines}) == len(lines)


def test_published_numbers_stand_beside_the_teachers_they_belong_to():
    row = dict(teacher="maskgit", kind="teacher", steps=8, order="confidence", fid=7.0, precision=0.8)
    assert published(row, {}) == [{"of": "8", "table": "Tab.2", "fid": 6.66, "precision": 0.83}]
    assert published(dict(row, order="halton"), {})[0]["fid"] == 7.73
    assert published(dict(row, steps=7), {}) == []
    row = dict(teacher="maskgen", kind="teacher", steps=16, order="confidence", fid=20.0)
    expected = {"of": "16", "table": "Tab.11-13", "fid_coco": 22.64, "fid_mjhq": 7.59}
    assert published(row, {}) == [expected]


def test_published_numbers_stand_beside_the_students_they_belong_to():
    def beside(**config):
        return [(found["of"], found["fid"]) for found in published(student(1, 2.0), config)]

    assert beside(recipe="maskbit", gan=True) == [("Soft-Di[M]O", 1.96)]
    assert beside(recipe="maskbit", gan=False) == [("Di[M]O", 2.89)]
    assert beside(recipe="maskbit-long", gan=True) == [("longer", 1.56)]
    assert [number for _, number in beside()] == [2.89, 1.96, 1.56]            # bare weights
    row = dict(teacher="maskgen", kind="student", steps=1, hps=1.0)
    assert published(row, dict(reward=True))[0]["hps"] == 29.38


def test_a_table_shows_published_numbers_as_the_papers_own():
    row = student(1, 2.0)
    row["published"] = published(row, dict(gan=True))
    text = tables.table([row, dict(student(1, 3.0), teacher="maskbit-tiny")])
    assert "published (the paper's, not measured here)" in text
    assert "Soft-Di[M]O: fid 1.96 (Tab.1)" in text
    assert "published" not in tables.table([student(1, 3.0)])
