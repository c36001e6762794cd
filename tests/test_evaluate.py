"""evaluate: tests."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evaluate
import teachers
from data import images
from machinery import pictures, processes
from machinery import files as machinery_files
from metrics import engine, fid, reference, tables
from networks import inception
from worlds import fashion
from machinery.errors import UserError
from machinery.files import ROOT
from teachers import SPECS
from tests.common import tiny, plain, agrees, command, inception_file, inception_state, photos, student


# ================================================================================================= evaluate.py
def golden_sets():
    """(real (200, 16), fake (180, 16)) float32: the inputs of the golden FID and PRDC numbers."""
    M = np.random.RandomState(30).standard_normal((16, 16)) / np.sqrt(16)
    real = np.random.RandomState(10).standard_normal((200, 16)) @ M
    fake = (1.1 * np.random.RandomState(20).standard_normal((180, 16)) + 0.2) @ M
    return real.astype(np.float32), fake.astype(np.float32)


def moments_of(f, shift=0.0, batch=7):
    m = engine.Moments(f.shape[1], shift)
    for part in torch.as_tensor(f).split(batch):
        m.add(part)
    return m.result()


def test_fid_agrees_with_clean_fid_and_by_eigenvalues_also_when_rank_deficient():
    real, fake = golden_sets()
    for some, expected in ((real, 1.617839027), (real[:8], 15.51948243)):     # 8 images in 16 dimensions: rank 7
        pair = (*moments_of(some), *moments_of(fake))
        assert fid.fid(*pair) == pytest.approx(expected, rel=1e-6)
        assert fid.fid_eigenvalues(*pair) == pytest.approx(expected, rel=1e-6)
    mu, sigma = moments_of(real)
    assert np.allclose(mu[:3], [-0.01107388735, 0.08009858429, 0.05349292606], atol=1e-8)
    assert np.trace(sigma) == pytest.approx(15.85219538, rel=1e-9)            # unbiased: 1 / (N - 1)


@pytest.mark.parametrize("distance", [fid.fid, fid.fid_eigenvalues])
def test_fid_has_its_closed_forms(distance):
    rng = np.random.default_rng(0)
    A, mu, shift, s1, s2 = rng.normal(size=(12, 12)), *rng.normal(size=(2, 12)), *rng.uniform(0.1, 4, (2, 12))
    S, Q = A @ A.T, np.linalg.qr(A)[0]
    assert distance(mu, S, mu, S) == pytest.approx(0, abs=1e-9)               # a set against itself
    assert distance(mu, S, mu + shift, S) == pytest.approx(shift @ shift)     # shifted
    S1, S2 = (Q * s1) @ Q.T, (Q * s2) @ Q.T                                   # commuting
    assert distance(mu, S1, mu, S2) == pytest.approx(((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum())
    assert distance(mu, 0 * S, mu, S) == pytest.approx(np.trace(S))           # a single image, repeated


def test_moments_add_up_over_batches_and_keep_their_digits_far_from_zero():
    f = np.random.default_rng(0).normal(size=(500, 9)) + 1e7
    mu, sigma = moments_of(f, shift=f[0], batch=33)
    assert np.allclose(mu, f.mean(0), rtol=1e-15) and np.allclose(sigma, np.cov(f - 1e7, rowvar=False), rtol=1e-8)


@pytest.mark.parametrize("convention, mean, std", [
    (dict(), 3.639085854, 0.2541956773),                                      # torch-fidelity
    (dict(shuffle=False), 3.618812457, 0.2243190045),                         # StyleGAN
    (dict(shuffle=False, split_size=100), 3.893615936, None)])                # ADM
def test_inception_score_agrees_in_three_conventions(convention, mean, std):
    logits = 2.0 * np.random.RandomState(60).standard_normal((300, 40)).astype(np.float32)
    got = fid.inception_score(logits, **convention)
    assert got[0] == pytest.approx(mean, rel=1e-8) and (std is None or got[1] == pytest.approx(std, rel=1e-8))
    sure = 1000.0 * torch.eye(10).repeat(10, 1)                               # certain, and all classes alike
    assert fid.inception_score(sure, shuffle=False) == pytest.approx((10, 0))


@pytest.mark.parametrize("k, expected", [(3, (0.7277777778, 0.915, 0.6666666667, 0.655)),
                                         (5, (0.8222222222, 0.965, 0.6877777778, 0.855))])
def test_prdc_agrees_with_the_package_whatever_the_blocks(k, expected):
    real, fake = golden_sets()
    for block_bytes in (1, 10_000, 2**26):
        assert tuple(fid.prdc(real, fake, k, block_bytes).values()) == pytest.approx(expected, abs=1e-9)
    far = (f.astype(np.float64) + 1e4 for f in (real, fake))
    assert tuple(fid.prdc(*far, k).values()) == pytest.approx(expected, abs=1e-9)


def test_the_surface_of_a_ball_is_outside():
    real = np.repeat(np.random.RandomState(40).randint(0, 3, (15, 2)), 2, axis=0).astype(np.float32)
    fake = np.random.RandomState(50).randint(0, 4, (24, 2)).astype(np.float32)
    expected = (0.1666666667, 0.9333333333, 0.1111111111, 0.06666666667)
    assert tuple(fid.prdc(real, fake, 3).values()) == pytest.approx(expected, abs=1e-9)


def test_ties_are_decided_as_exact_arithmetic_decides_them():
    """Points of a small lattice, shifted by what no float holds: many distances tie, and integers know which."""
    a, b = np.random.RandomState(0).randint(0, 3, (2, 300, 5))
    square = lambda x, y: ((x[:, None] - y[None]) ** 2).sum(-1)                # (300, 300) integers
    r_a, r_b = (np.sort(square(x, x), 1)[:, 3] for x in (a, b))
    d = square(a, b)
    expected = ((d < r_a[:, None]).any(0).mean(), (d < r_b).any(1).mean(),
                (d < r_a[:, None]).sum() / 900, (d.min(1) < r_a).mean())
    for scale, block_bytes in ((1.0, 2**26), (0.1, 50_000), (1e-3, 2**26)):
        assert tuple(fid.prdc(a * scale, b * scale, 3, block_bytes).values()) == pytest.approx(expected, abs=1e-12)


def test_prdc_of_a_set_against_itself_and_against_one_mode():
    real = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    same, mode = fid.prdc(real, real.clone()), fid.prdc(real, real[:1] + 1e-3 * torch.randn(100, 8))
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert mode["precision"] == 1 and mode["recall"] < 0.02 and mode["coverage"] < 0.2


def test_images_are_a_function_of_the_seed_and_argmax_of_the_start(tiny):
    draw = lambda seed, T: teachers.generate_student(tiny, tiny.net, torch.arange(4), temperature=T,
                                               generator=torch.Generator().manual_seed(seed))
    a = draw(1, 1.0)
    assert a.dtype == torch.uint8 and a.shape == (4, 1, 32, 32)
    assert a.equal(draw(1, 1.0)) and not a.equal(draw(2, 1.0)) and not a.equal(draw(1, 0))
    start = dict(init_ratio=1.0, noise=0.0, temperature=0)                    # all masked, nothing drawn: one image
    b, c = (teachers.generate_student(tiny, tiny.net, torch.zeros(1).long(), **start) for _ in range(2))
    assert b.equal(c)
    steps = [teachers.generate_teacher(tiny, torch.arange(2), n, generator=torch.Generator().manual_seed(0)) for n in (3, 3, 1)]
    assert steps[0].equal(steps[1]) and not steps[0].equal(steps[2])


def test_pixels_are_truncated_or_rounded_as_each_teachers_authors_do(tiny, monkeypatch):
    monkeypatch.setattr(teachers, "decode_tokens", lambda tokenizer, x, cond: torch.tensor([0.0, 0.4, 0.9999, 254.9, 255.0]) / 255)
    rounding = tiny._replace(spec=dataclasses.replace(tiny.spec, rounds=True))
    assert teachers.to_pixels(tiny, torch.zeros(1), (), 0.0, None).tolist() == [0, 0, 0, 254, 255]
    assert teachers.to_pixels(rounding, torch.zeros(1), (), 0.0, None).tolist() == [0, 0, 1, 255, 255]
    assert {name for name, spec in SPECS.items() if spec.rounds} >= {"maskgit", "maskgit-512", "meissonic"}
    assert not any(SPECS[name].rounds for name in ("maskbit", "maskgen", "maskgen-xl"))


# ------------------------------------------------------------------------------------- the tiny world's metric
def test_features_see_what_independent_tokens_do_to_a_picture():
    """Real tokens against real tokens exchanged position by position within a class: each token likely, together not."""
    with np.load(os.path.join(ROOT, "assets/fashion/tokens.npz")) as f:
        x, labels = torch.from_numpy(f["tokens"][:2000]).long(), torch.from_numpy(f["labels"][:2000])
    order = torch.Generator().manual_seed(0)
    mixed = torch.zeros_like(x)
    for c in range(10):
        rows = (labels == c).nonzero()[:, 0]
        for i in range(x.shape[1]):
            mixed[rows, i] = x[rows[torch.randperm(len(rows), generator=order)], i]
    tok = teachers.load_teacher("maskbit-tiny").tokenizer
    net, reference = fashion.load_extractor(teachers.SPECS["maskbit-tiny"])
    make = lambda tokens: lambda i, **_: (teachers.decode_tokens(tok, tokens[i]) * 255).to(torch.uint8)
    real, patchwork = (fid.image_metrics(make(t), torch.arange(500), net, reference) for t in (x, mixed))
    assert real["fid"] < 25 and patchwork["fid"] > 3 * real["fid"] and patchwork["precision"] < real["precision"]


def test_two_processes_measure_what_one_does(tmp_path):
    command = [sys.executable, os.path.join(ROOT, "evaluate.py"), "--random_weights", "--steps", "2", "--n", "50",
               "--batch", "15", "--device", "cpu"]
    one = subprocess.Popen([*command, "--out", str(tmp_path / "1")], env=dict(os.environ, OMP_NUM_THREADS="1"))
    port = str(20000 + os.getpid() % 20000)
    two = [subprocess.Popen([*command, "--out", str(tmp_path / "2")], env=dict(
        os.environ, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port,
        OMP_NUM_THREADS="1")) for r in range(2)]
    assert [p.wait(timeout=120) for p in (one, *two)] == [0, 0, 0]
    a, b = (json.loads((tmp_path / d / "results.jsonl").read_text()) for d in "12")
    assert (a["processes"], b["processes"]) == (1, 2)
    for key in ("fid", "fid_eigenvalues", "is", "is_std", "precision", "recall", "density", "coverage"):
        assert a[key] == pytest.approx(b[key], rel=1e-6), key
    assert (tmp_path / "2" / "sheet.png").stat().st_size > 1000


def test_what_cannot_be_evaluated_is_refused_with_a_sentence(tmp_path, capsys):
    assert fashion.load_extractor(teachers.SPECS["maskbit"]) == (None, None)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 32, 32)))
    np.savez(tmp_path / "other.npz", mu=np.zeros(4), sigma=np.eye(4))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut short")
    for name, message in (("images", "mu"), ("other", "feature network"), ("cut", "npz"), ("missing", "missing.npz")):
        with pytest.raises(UserError, match=message):
            reference.load_reference(str(tmp_path / f"{name}.npz"), 208)
    with pytest.raises(UserError, match="neighbors"):
        fid.prdc(torch.zeros(3, 2), torch.zeros(9, 2))
    for flags in (["--n", "0"], ["--n", "9"], ["--temperature", "-1"], ["--ckpt", "nowhere.pt"], ["--teacher", "maskgot"],
                  ["--prompts", "nowhere.txt", "--teacher", "maskgen-tiny", "--random_weights"],
                  ["--order", "halton", "--teacher", "maskgen-tiny", "--random_weights"]):
        with pytest.raises((UserError, SystemExit)) as end:
            evaluate.main(evaluate.flags().parse_args([*flags, "--out", str(tmp_path)]))
        assert flags[1] in (str(end.value) if isinstance(end.value, UserError) else capsys.readouterr().err), flags
    done = subprocess.run([sys.executable, os.path.join(ROOT, "evaluate.py"), "--n", "9", "--out", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--n 9" in done.stderr


def test_a_sheet_has_a_column_a_class_and_a_table_says_what_n_does(tmp_path):
    from PIL import Image
    img = torch.zeros(12, 1, 32, 32, dtype=torch.uint8)
    img[10] = 200
    pictures.sheet([("teacher, 16 steps", img), ("student, 1 step", img[:10])], str(tmp_path / "s.png"))
    page = Image.open(tmp_path / "s.png")
    assert page.size == (10 * 98 + 2, 3 * 98 + 2 * 16 + 2) and page.getpixel((50, 16 + 98 + 48)) == (200,) * 3
    row = dict(model="teacher", kind="teacher", steps=16, n=5000, fid=4.0, **{"images/s": 10.0, "tokens_only/s": 12.0})
    text = tables.table([row, dict(row, model="student", kind="student", steps=1, **{"images/s": 200.0})])
    assert "| teacher | 16 " in text and "biased upward" in text and "20.0 times faster" in text
    assert "biased" not in tables.table([dict(row, n=50_000)])


@pytest.fixture(scope="module")
def inception_net(plain):
    return inception.load_inception(plain)
PIXELS = torch.from_numpy(np.random.RandomState(70).randint(0, 256, (2, 3, 5, 7)).astype(np.uint8).repeat(8, 2).repeat(8, 3))


def test_inception_gives_the_golden_maps_features_and_logits(inception_net):
    golden = {"pool1": ([0.04040373117, 0.1376905888, 0.5643054843, 0.0775424093, 0.2483923286], 41.1663048),
              "pool2": ([0.7106261253, 0.2125332654, 0.4897961318, 0.4081763327, 0.4522225857], 155.4851989),
              "Mixed_6e": ([0.7932898998, 0.07295541465, 0.5227518082, 0.03555404767, 0.730756104], 779.5677457),
              "pool3": ([0, 1.36724174, 0.2266804427, 0, 1.30498147], 2801.464567)}
    h = inception_net.scaled(PIXELS.float() / 255)
    for name, layer in inception_net.layers.named_children():
        h = layer(h)
        if name in golden:
            agrees(h.mean((2, 3)), *golden[name], tol=1e-5)
    features, logits = engine.extract(inception_net, PIXELS)
    agrees(features, *golden["pool3"], tol=1e-5)
    agrees(logits, [0.595255971, 2.429360867, -0.2632558644, 0.1663454771, 0.7864996791], 1782.319151, tol=1e-5)
    biased = F.linear(features, inception_net.fc.weight, inception_net.fc.bias)
    agrees(biased, [0.5396906137, 2.346317053], 1788.125319, tol=1e-5)


def test_inception_has_the_published_tensors(inception_net):
    assert sum(p.numel() for p in inception_net.parameters()) == 23_850_960
    file = inception_file()                           # the published keys and shapes, less 94 counts of batches
    listed = "".join(f"{k} {v}\n" for k, v in sorted(file.items()))
    assert len(file) == 566 - 94 and hashlib.sha256(listed.encode()).hexdigest().startswith("a5dab5458935")


def test_both_published_files_and_images_one_by_one_give_the_same_features(inception_net, plain, tmp_path):
    class Published(nn.Module):                       # the parts of NVIDIA's file that are used
        def __init__(self):
            super().__init__()
            self.layers, self.output = inception_net.layers, inception_net.fc

        def forward(self, x):
            return self.output(self.layers(x).flatten(1)).softmax(1)

    x = PIXELS[:1].float() / 255
    torch.jit.save(torch.jit.trace(Published(), inception_net.scaled(x)), tmp_path / "script.pt")
    script = inception.load_inception(str(tmp_path / "script.pt"))
    torch.save(inception_state(), tmp_path / "bare.pth")
    bare = inception.load_inception(str(tmp_path / "bare.pth"))
    assert machinery_files.fingerprint(bare) == machinery_files.fingerprint(inception_net)
    expected = engine.extract(inception_net, PIXELS)
    for got in (engine.extract(script, PIXELS), engine.extract(inception_net, list(PIXELS))):
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(got, expected))
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt: a TorchScript file, but not inception"):
        inception.load_inception(str(tmp_path / "other.pt"))


def test_files_that_are_no_inception_are_refused_and_a_download_that_fails_is_a_sentence(tmp_path, monkeypatch):
    torch.save({k: torch.zeros(v) for k, v in inception_file().items() if "7c" not in k}, tmp_path / "less.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut short")
    for name, words in (("less.pth", "missing .*Mixed_7c"), ("cut.pth", "cannot read"), ("none.pth", "no weights at")):
        with pytest.raises(UserError, match=words):
            inception.load_inception(str(tmp_path / name))
    asked = []

    def fetch(url, path, digest):
        asked.append((url, digest))
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for name in ("plain", "torchscript"):
        with pytest.raises(UserError, match="cannot download https://.* .no network.: fetch it .* by --inception PATH"):
            inception.load_inception(name)
    assert asked[0][1] == "6726825d" and asked[1][0].endswith("/inception-2015-12-05.pt")
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    torch.save(inception_state(), tmp_path / "checkpoints" / os.path.basename(asked[0][0]))
    assert isinstance(inception.load_inception(), inception.Inception)    # what was fetched once is not asked for


def test_the_conventions_of_inception_scores_have_their_names():
    logits = 2.0 * np.random.RandomState(60).standard_normal((300, 40)).astype(np.float32)
    for name, mean in (("is", 3.639085854), ("is_stylegan", 3.618812457)):
        assert fid.inception_score(logits, **fid.IS_CONVENTIONS[name])[0] == pytest.approx(mean, rel=1e-8)
    assert fid.IS_CONVENTIONS["is_adm"] == dict(shuffle=False, split_size=5000)


@pytest.mark.parametrize("mode, abs_sum, row", [
    ("legacy_tensorflow", 65741931.76, [200, 200, 202.8093567, 224, 224, 23, 23, 52, 52, 225, 225, 204.7227478, 84, 84, 114, 114]),
    ("clean", 31562269.13, [200, 200, 198.246521, 224, 224, 23, 23, 53.80029678, 52, 164.2348328, 225, 235.0661316, 84, 84, 114, 114]),
    ("legacy_pytorch", 31569274.19, [200, 200, 200, 224, 224, 23, 23, 52, 52, 159.3291016, 225, 225, 84, 84, 114, 114])])
def test_golden_resizes(mode, abs_sum, row):
    out = inception.resize(PIXELS.float(), mode)
    assert out.shape == (2, 3, 299, 299) and out.dtype == torch.float32
    agrees(out[0, 0, 150, ::19], row, tol=1e-3)
    agrees(out if mode == "legacy_tensorflow" else out[0], [78] * 3, abs_sum)


@pytest.mark.parametrize("H, W", [(256, 256), (512, 375), (3, 299), (1, 700)])
def test_tf1s_bilinear_is_its_definition(H, W):
    img = np.random.RandomState(H).randint(0, 256, (H, W)).astype(np.float64)
    expected = np.zeros((299, 299))
    y, x = np.arange(299) * H / 299, np.arange(299) * W / 299
    for dy in (0, 1):
        for dx in (0, 1):
            i, j = (np.minimum(np.floor(c).astype(int) + d, n - 1) for c, d, n in ((y, dy, H), (x, dx, W)))
            w = np.abs(1 - dy - y % 1)[:, None] * np.abs(1 - dx - x % 1)
            expected += w * img[np.ix_(i, j)]
    got = inception.resize(torch.from_numpy(img).float()[None, None].expand(1, 3, H, W))[0, 2]
    assert np.abs(got.numpy() - expected).max() < 2e-2                        # float32 coordinates: 1e-2 of 255 on noise


def test_bytes_pass_exactly_and_each_resize_has_its_own_normalization():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 1, 256, 299)
    net = Small("legacy_tensorflow")
    assert torch.equal(every.float() / 255 * 255, every.float())              # a division, not a product with 1 / 255
    white = lambda mode: Small(mode).scaled(torch.ones(1, 1, 9, 9)).flatten()
    for mode, high in (("legacy_tensorflow", 127 / 128), ("clean", 127 / 128), ("legacy_pytorch", 1.0)):
        assert torch.allclose(white(mode), torch.tensor(high), rtol=0, atol=1e-6)
    assert net.scaled(every.float() / 255).shape == (1, 3, 299, 299)          # gray becomes three channels


# ====================================================================== real images: folders, files and processes
class Small(inception.Inception):
    """The extractor's code around a network of no cost: features are mean colors of the four quarters."""

    dim, classes = 12, 5

    def __init__(self, resize=inception.RESIZES[0], crop=False):
        nn.Module.__init__(self)
        self.resize, self.crop = resize, crop
        self.layers, self.fc = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), nn.Linear(12, 5)


@pytest.fixture
def small(monkeypatch):
    for module in (inception, reference):
        monkeypatch.setattr(module, "Inception", Small)
    return inception.load_inception(random_weights=True)


def one_by_one(extractor, folder):
    rows = []
    for where, _, files in os.walk(folder):
        for f in files:
            a = np.array(Image.open(os.path.join(where, f)))
            a = (a >> 8).astype(np.uint8) if a.dtype == np.uint16 else a
            a = np.stack([a] * 3, 2) if a.ndim == 2 else a
            rows.append(engine.extract(extractor, torch.from_numpy(a).permute(2, 0, 1)[None])[0][0])
    return torch.stack(rows).double().numpy()


def test_statistics_of_a_folder_are_those_of_its_images_whatever_their_size_depth_and_order(small, tmp_path):
    folder = photos(tmp_path / "a")
    f = one_by_one(small, folder)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    for batch in (5, 64):
        ref = reference.folder_reference(folder, small, torch.device("cpu"), batch)
        assert np.allclose(ref.mu, f.mean(0), atol=1e-7) and np.allclose(ref.sigma, np.cov(f, rowvar=False), atol=1e-7)
        assert sorted(ref.features.double().sum(1).tolist()) == pytest.approx(sorted(f.sum(1)), abs=1e-5)
    assert ref.name.startswith("a, 24 images, ")
    os.remove(os.path.join(folder, "23.png"))
    other = reference.folder_reference(folder, small, torch.device("cpu"), 5)
    assert other.name.split()[-1] != ref.name.split()[-1]


def test_a_folder_against_itself_and_against_a_shifted_copy(small, tmp_path):
    a, b = photos(tmp_path / "a", 11), photos(tmp_path / "b", 11, shift=50)   # fewer images than features
    ref = reference.folder_reference(a, small, torch.device("cpu"), 4)
    row = lambda folder: fid.image_metrics(images.folder_images(folder, "--fake")[1], torch.arange(11), small, ref, 4)
    assert row(a)["fid"] == pytest.approx(0, abs=1e-6) and row(a)["precision"] == 1
    assert row(b)["fid"] == pytest.approx(12 * (50 / 128) ** 2, rel=1e-4)     # 12 features, each shifted alike
    assert row(b)["fid_eigenvalues"] == pytest.approx(row(b)["fid"], abs=1e-4)


def test_images_that_cannot_be_read_are_counted_named_and_never_left_out(small, tmp_path):
    folder = photos(tmp_path / "a", 12)
    (tmp_path / "a" / "07.png").write_bytes((tmp_path / "a" / "07.png").read_bytes()[:60])
    (tmp_path / "a" / "sub" / "x.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"--real .*a: 2 of 13 images cannot be read: .* first is .*07.png \(\w+"):
        reference.folder_reference(folder, small, torch.device("cpu"), 4)
    for path, words in (("none", "no such folder"), ("a/sub", "statistics need 10 images at least, found 2")):
        with pytest.raises(UserError, match=words):
            images.folder_images(str(tmp_path / path), "--real")


def test_of_a_large_folder_every_kth_feature_is_kept_and_all_count(small):
    img = torch.randint(0, 256, (23, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    whole = engine.extracted(lambda i, **_: img[i], torch.arange(23), small, batch=4)
    some = engine.extracted(lambda i, **_: img[i], torch.arange(23), small, batch=4, every=5)
    assert torch.equal(some[0], whole[0][::5]) and torch.equal(some[1], whole[1][::5])
    assert np.array_equal(some[2], whole[2]) and np.array_equal(some[3], whole[3])


def test_the_crop_comes_before_the_resize_on_both_sides(small, tmp_path):
    cropped = Small("clean", crop=True)
    pixels = np.random.RandomState(0).randint(0, 256, (300, 411, 3)).astype(np.uint8)
    square = inception.coco_crop(Image.fromarray(pixels))
    expected = (torch.from_numpy(inception.clean_resize(square)).permute(2, 0, 1)[None] - 128) / 128
    assert torch.equal(cropped.scaled(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255), expected)
    drawn = torch.randint(0, 256, (1, 3, 256, 256), generator=torch.Generator().manual_seed(0)).float() / 255
    assert torch.equal(cropped.scaled(drawn), Small("clean").scaled(drawn))   # 256 px are left alone


class Processes:
    """torch.distributed in threads: rank r of `world`, sums and gathers meet at a barrier."""

    def __init__(self, world):
        self.world, self.rank, self.meet, self.table = world, threading.local(), threading.Barrier(world, timeout=20), {}

    is_initialized = lambda self: self.world > 1
    get_rank = lambda self: self.rank.value
    get_world_size = lambda self: self.world
    barrier = lambda self: self.meet.wait()

    def exchange(self, thing):
        self.table[self.get_rank()] = thing
        self.meet.wait()
        everyone = [self.table[r] for r in range(self.world)]
        self.meet.wait()
        return everyone

    def all_reduce(self, t):
        t.copy_(sum(self.exchange(t.clone())))

    def all_gather_object(self, out, thing):
        out[:] = self.exchange(thing)

    def run(self, f):
        results = [None] * self.world

        def work(r):
            self.rank.value = r
            try:
                results[r] = f()
            except UserError as err:
                results[r] = str(err)
        threads = [threading.Thread(target=work, args=(r,)) for r in range(self.world)]
        [t.start() for t in threads], [t.join(60) for t in threads]
        return results


def test_one_two_and_four_processes_give_the_same_numbers_and_the_same_complaint(small, tmp_path, monkeypatch):
    folder, img = photos(tmp_path / "a"), torch.rand(50, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    make = lambda i, generator, **_: ((img[i] + 0.2 * torch.rand(len(i), 3, 9, 9, generator=generator)) * 200).to(torch.uint8)
    whole = None
    for world in (1, 2, 4):
        group = Processes(world)
        for module in (processes,):
            monkeypatch.setattr(module, "dist", group)

        def measured():
            ref = reference.folder_reference(folder, small, torch.device("cpu"), 5)
            return fid.image_metrics(make, torch.arange(50), small, ref, 7)
        rows = group.run(measured)
        whole = whole or rows[0]
        for row in rows:
            assert row["processes"] == world
            assert row["reference"] == whole["reference"]
            for key in ("fid", "fid_eigenvalues", "is", "is_stylegan", "is_adm", "precision", "recall", "density", "coverage"):
                assert row[key] == pytest.approx(whole[key], rel=1e-6), (world, key)
    assert whole["fid"] > 0.01
    (tmp_path / "a" / "20.png").write_bytes(b"broken")
    complaints = group.run(measured)
    assert len(set(complaints)) == 1 and "1 of 24 images cannot be read" in complaints[0]


class Largest(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return out


def test_no_tensor_of_prdc_outgrows_a_block_or_its_input():
    real, fake = torch.randn(400, 16), torch.randn(1500, 16)
    whole = fid.prdc(real, fake)
    with Largest() as largest:
        assert fid.prdc(real, fake, block_bytes=2**20) == whole
    assert largest.bytes <= 2**20 < 8 * 400 * 1500    # by blocks; all distances would take 5 and 18 MB


# ======================================================================================= the command line and its rows
def adm_like(path, dim=12, n=30, **more):
    f = np.random.RandomState(0).standard_normal((200, dim))
    np.savez(path, mu=f.mean(0), sigma=np.cov(f, rowvar=False), **more)
    return str(path)


def test_a_row_names_everything_that_makes_fids_differ(small, tmp_path, capsys):
    images = np.random.RandomState(0).randint(0, 256, (20, 16, 16, 3)).astype(np.uint8)
    path = adm_like(tmp_path / "ref.npz", arr_0=images)
    with np.load(path) as f:
        digest = machinery_files.fingerprint([f["mu"], f["sigma"]])
    flags = ["--teacher", "maskgit-tiny", "--steps", 1, 2, "--n", 40, "--reference", path, "--batch", 16, "--seed", 3]
    rows = command(tmp_path, *flags, "--resize", "clean", "--save_images")
    classes = SPECS["maskgit-tiny"].classes
    for row, steps in zip(rows, (1, 2)):
        expected = dict(n=40, per_class=40 / classes, seed=3, steps=steps, resize="clean", crop=None, features="fp32",
                        dtype="fp32", inception="random", labels="each class in turn", batch=16, k=3)
        assert {key: row[key] for key in expected} == expected
        assert row["reference"] == f"ref.npz {digest}, neighbors: its 20 images" and "temperature" in row
        assert row["extractor"] == f"Small {machinery_files.fingerprint(Small())}" or row["extractor"].startswith("Small ")
        assert all(np.isfinite(row[key]) for key in ("fid", "is", "is_std", "is_stylegan", "is_adm", "precision", "coverage"))
        assert row["reference"] in row["note"] and ", resize clean, no crop, in float32" in row["note"]
    out = capsys.readouterr().out
    assert "below 10,000, FID is biased" in out and digest in out and "seed 3" in out
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["fid"] for row in table] == [row["fid"] for row in rows] and "| teacher |" in out
    assert (tmp_path / "out" / "table.md").read_text().strip() in out
    folders = sorted((tmp_path / "out" / "images").iterdir())                 # and asked for, every image is on the disk
    assert [len(list(f.iterdir())) for f in folders] == [40, 40]
    again = command(tmp_path, "--fake", folders[0], "--reference", path, "--resize", "clean", "--batch", 16)[-1]
    assert all(again[key] == pytest.approx(rows[0][key], abs=1e-9) for key in ("fid", "is", "precision", "recall"))
    assert again["kind"] == "folder" and again["n"] == 40


def test_only_the_metrics_asked_for_are_computed(small, tmp_path, monkeypatch):
    path = adm_like(tmp_path / "ref.npz", arr_0=np.zeros((20, 8, 8, 3), np.uint8))
    monkeypatch.setattr(fid, "prdc", None), monkeypatch.setattr(reference, "with_neighbors", None), monkeypatch.setattr(fid, "fid", None)
    row, = command(tmp_path, "--teacher", "maskgit-tiny", "--steps", 1, "--n", 12, "--reference", path, "--metrics", "is")
    assert row["is"] >= 1 and "fid" not in row and "precision" not in row


def test_a_reference_made_from_a_folder_is_kept_and_knows_how(small, tmp_path):
    folder, path = photos(tmp_path / "a"), str(tmp_path / "kept.npz")
    flags = ["--teacher", "maskgit-tiny", "--steps", 1, "--n", 12]
    evaluate.main(evaluate.flags().parse_args(["--real", folder, "--crop", "--save_reference", path, "--random_weights", "--out",
                                   f"{tmp_path}/out", "--device", "cpu"]))
    assert os.listdir(tmp_path / "out") == []                                 # nothing was drawn
    kept = command(tmp_path, *flags, "--reference", path, "--crop")[-1]
    made = command(tmp_path, *flags, "--real", folder, "--crop")[-1]
    for key in ("fid", "precision", "recall", "density", "coverage"):
        assert kept[key] == made[key]
    with pytest.raises(UserError, match="was made with resize legacy_tensorflow, coco_crop, and these flags say .*no crop"):
        command(tmp_path, *flags, "--reference", path)


@pytest.mark.parametrize("flags, words", [
    ("--metrics fid --teacher maskgit-tiny", "--metrics fid of maskgit-tiny needs --reference PATH.npz"),
    ("--metrics fid prdc --reference {0}/ref.npz", "--metrics prdc needs real images"),
    ("--reference {0}/none.npz", "none.npz"),
    ("--reference {0}/images.npz", "expected an .npz with mu and sigma"),
    ("--reference {0}/array.npy", "expected an .npz with mu and sigma"),
    ("--reference {0}/weights.pt", "expected an .npz with mu and sigma"),
    ("--reference {0}/wide.npz", "expected mu .12,. and sigma .12, 12., got .14,. and .14, 14.: made with another"),
    ("--reference {0}/nan.npz", "not finite"),
    ("--reference {0}/gray.npz", "expected images, uint8 .n, H, W, 3., in its arr_0, got float64 .4, 8, 8."),
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
    ("--metrics clip geneval --metadata {0}/captions.txt --teacher maskgen-tiny", "a path for each of clip, geneval, in this order"),
    ("--metrics clip --benchmark clip", "short for --metrics clip: give one"),
    ("--metrics fid --metadata {0}/captions.txt", "--metadata .*captions.txt belongs to --benchmark")])
def test_what_a_fid_cannot_be_made_of_is_answered_with_a_sentence_before_anything_is_drawn(small, tmp_path, flags, words):
    adm_like(tmp_path / "ref.npz"), adm_like(tmp_path / "wide.npz", 14), np.save(tmp_path / "array.npy", np.zeros(12))
    adm_like(tmp_path / "gray.npz", arr_0=np.zeros((4, 8, 8)))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "nan.npz", mu=np.full(12, np.nan), sigma=np.eye(12))
    torch.save({"mu": torch.zeros(12)}, tmp_path / "weights.pt")
    (tmp_path / "captions.txt").write_text("a ring\n")
    flags = flags.format(tmp_path).split()
    with pytest.raises(UserError, match=words):
        command(tmp_path, *flags, *([] if "--teacher" in flags else ["--teacher", "maskgit-tiny"]))
    assert os.listdir(tmp_path / "out") == []


def test_imagenet_has_adms_reference_and_50_000_images_unless_told(small, tmp_path, monkeypatch):
    path, asked = adm_like(tmp_path / "adm.npz", arr_0=np.zeros((20, 8, 8, 3), np.uint8)), []
    monkeypatch.setattr(reference, "download", lambda url, digest, flag: path)
    teacher = teachers.load_teacher("maskgit-tiny", random_weights=True)
    teacher = teacher._replace(spec=dataclasses.replace(teacher.spec, name="maskgit", image=(3, 256, 256),
                                                        net={**teacher.spec.net, "classes": 1000}))
    monkeypatch.setattr(evaluate, "load_teacher", lambda *_, **__: teacher)

    def judged(make, labels, extractor, reference, *args, metrics, **kw):
        asked.append((len(labels), labels.bincount().unique().tolist(), reference.name.split()[0], metrics))
        return dict(n=len(labels), fid=7.0, extractor="x", reference=reference.name, seed=0, **extractor.facts)
    monkeypatch.setattr(evaluate, "image_metrics", judged)
    monkeypatch.setattr(type(teacher), "conditions", lambda self, prompts=None: torch.arange(1000))
    monkeypatch.setattr(evaluate, "fixed_sample", lambda *_: torch.zeros(4, 3, 256, 256, dtype=torch.uint8))
    row, = command(tmp_path, "--teacher", "maskgit", "--steps", 8, "--metrics", "fid", "is")
    assert asked == [(50_000, [50], "adm.npz", ("fid", "is"))] and row["per_class"] == 50
    assert row["published"] == [{"of": "8", "table": "Tab.2", "fid": 6.66}]


def test_torchrun_understands_every_flag_of_the_readme():
    """torchrun reads an abbreviation of its own flags even behind the script's name: --n is one, --n_images is none."""
    from torch.distributed.run import parse_args
    line = "--nproc_per_node=4 evaluate.py --ckpt a --metrics fid is prdc --n_images 10 --reference adm --real x --out y"
    assert parse_args(line.split()).training_script == "evaluate.py"
    assert evaluate.flags().parse_args(["--n_images", "12"]).n == evaluate.flags().parse_args(["--n", "12"]).n == 12


def test_several_benchmarks_in_one_command_take_their_metadata_in_order(tmp_path, capsys):
    lines = [{"tag": "single_object", "include": [{"class": "square", "count": 1}], "prompt": "a square"}]
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "captions.txt").write_text("a red ring\ntwo crosses\n")
    rows = command(tmp_path, "--teacher", "maskgen-tiny", "--steps", 1, "--metrics", "clip", "geneval", "--per_prompt", 1,
                   "--detector", "shapes", "--metadata", tmp_path / "captions.txt", tmp_path / "meta.jsonl")
    assert [row["n"] for row in rows] == [2, 1] and "clip_score" in rows[0] and "single_object" in rows[1]
    assert [os.path.basename(row["labels"]) for row in rows] == ["captions.txt", "meta.jsonl"]
    assert len(os.listdir(tmp_path / "out" / "geneval")) == 1


def test_reconstruction_of_a_folder_has_the_psnr_of_its_crops_and_a_fid_against_them(small, tmp_path):
    from data.images import center_crop
    folder = photos(tmp_path / "a", 12)
    row, = command(tmp_path, "--reconstruction", "--teacher", "maskgit-tiny", "--real", folder, "--batch", 5)
    teacher = teachers.load_teacher("maskgit-tiny", random_weights=True)
    spec, error = teacher.spec, 0
    names, make, _ = images.folder_images(folder, "--real", spec.image)
    for i, name in enumerate(names):
        img = make(torch.tensor([i]))[0]
        if i not in (2, 3):                                                   # the gray ones aside, against Pillow itself
            crop = center_crop(Image.open(name).convert("RGB"), spec.image[1])
            assert np.array_equal(img.permute(1, 2, 0).numpy(), np.array(crop))
        back = teachers.decode_tokens(teacher.tokenizer, teacher.tokenizer.encode(img[None].float() / 255))
        error += ((back * 255 + spec.rounds / 2).to(torch.uint8).double() - img).square().mean().item()
    assert row["psnr"] == pytest.approx(10 * math.log10(255**2 / (error / 12)), abs=1e-6)
    assert row["fid"] > 0 and row["reference"].startswith("the same 12 images") and row["n"] == 12
    rows = command(tmp_path, "--reconstruction", "--teacher", "maskgen-tiny", "--real", folder, "--reference",
                   adm_like(tmp_path / "r.npz"), "--metrics", "fid")[1:]
    assert [r["model"] for r in rows] == [f"real {folder}", f"{folder} reconstructed"] and rows[0]["fid"] != rows[1]["fid"]


def test_a_sweep_is_a_table_a_checkpoint_and_its_best_stands_in_the_joint_one():
    rows = [student(T, f) for T, f in ((0, 3.1), (0.5, 2.9), (1, 3.0))] + [student(1, 2.0, "student b")]
    text = tables.report(rows + [dict(model="teacher", kind="teacher", steps=8, n=50_000, fid=1.5)])
    sweep, joint = text.split("student a: the best of 3 temperatures is 0.5, FID 2.90")
    assert [line.count("student a") for line in (sweep, joint)] == [3, 1] and "2.90" in joint and "3.00" not in joint
    assert "student b" not in sweep and "student b" in joint and "teacher" in joint
    assert "(argmax), FID 1.00" in tables.report([student(0, 1.0), student(1, 2.0)])
    assert tables.report(rows[:1] + rows[3:]) == tables.table(rows[:1] + rows[3:])    # without a sweep: the table


def test_published_numbers_stand_beside_the_rows_they_belong_to():
    lines = [line.split() for line in tables.PUBLISHED.strip().splitlines()]
    for name, kind, place, *pairs in lines:
        assert name in SPECS and place.startswith("Tab.") and len(pairs) % 2 == 0 and all(map(float, pairs[1::2]))
        assert kind in ("Di[M]O", "Soft-Di[M]O", "longer") or kind.removesuffix("-halton").isdigit()
    assert len({(name, kind) for name, kind, *_ in lines}) == len(lines)
    row = dict(teacher="maskgit", kind="teacher", steps=8, order="confidence", fid=7.0, precision=0.8)
    assert tables.published(row, {}) == [{"of": "8", "table": "Tab.2", "fid": 6.66, "precision": 0.83}]
    assert tables.published(dict(row, order="halton"), {})[0]["fid"] == 7.73 and tables.published(dict(row, steps=7), {}) == []
    row = student(1, 2.0)
    of = lambda **config: [(found["of"], found["fid"]) for found in tables.published(row, config)]
    assert of(recipe="maskbit", gan=True) == [("Soft-Di[M]O", 1.96)] and of(recipe="maskbit", gan=False) == [("Di[M]O", 2.89)]
    assert of(recipe="maskbit-long", gan=True) == [("longer", 1.56)] and [f for _, f in of()] == [2.89, 1.96, 1.56]
    row["published"] = tables.published(row, dict(gan=True))
    text = tables.table([row, dict(student(1, 3.0), teacher="maskbit-tiny")])
    assert "published (the paper's, not measured here)" in text and "Soft-Di[M]O: fid 1.96 (Tab.1)" in text
    assert "published" not in tables.table([student(1, 3.0)])
    text_row = dict(teacher="maskgen", kind="teacher", steps=16, order="confidence", fid=20.0)
    assert tables.published(text_row, {}) == [{"of": "16", "table": "Tab.11-13", "fid_coco": 22.64, "fid_mjhq": 7.59}]
    assert tables.published(dict(teacher="maskgen", kind="student", steps=1, hps=1.0), dict(reward=True))[0]["hps"] == 29.38
