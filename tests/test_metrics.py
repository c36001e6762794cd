"""The formulas of the metrics, and Inception: against golden numbers, closed forms, definitions."""

import hashlib
import os

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from machinery.errors import UserError
from machinery.files import ROOT, fingerprint
from metrics import engine, fid
from networks import inception
from teachers import SPECS, decode_tokens, load_teacher
from tests.common import agrees, golden, inception_file, inception_state
from worlds.fashion import load_extractor

GOLDEN = golden("metrics")


# ------------------------------------------------------------------------------------------ FID
def golden_sets():
    """(real (200, 16), fake (180, 16)): the inputs of the golden FID and PRDC numbers."""
    M = np.random.RandomState(30).standard_normal((16, 16)) / np.sqrt(16)
    real = np.random.RandomState(10).standard_normal((200, 16)) @ M
    fake = (1.1 * np.random.RandomState(20).standard_normal((180, 16)) + 0.2) @ M
    return tuple(torch.from_numpy(f.astype(np.float32)) for f in (real, fake))


def moments_of(f, shift=0.0, batch=7):
    moments = engine.Moments(f.shape[1], shift)
    for part in f.split(batch):
        moments.add(part)
    return moments.result()


@pytest.mark.parametrize("way", ["fid", "fid_eigenvalues"])
def test_fid_agrees_with_clean_fid_also_when_rank_deficient(way):
    real, fake = golden_sets()
    expected = GOLDEN["fid"]
    all_of_them = fid.fid(*moments_of(real), *moments_of(fake))
    assert all_of_them[way] == pytest.approx(expected["all"], rel=1e-6)
    few = fid.fid(*moments_of(real[:8]), *moments_of(fake))
    assert few[way] == pytest.approx(expected["8 images in 16 dimensions"], rel=1e-6)
    mu, sigma = moments_of(real)
    assert np.allclose(mu[:3], expected["mu"], atol=1e-8)
    assert np.trace(sigma) == pytest.approx(expected["trace of sigma"], rel=1e-9)     # 1 / (N - 1)


@pytest.mark.parametrize("way", ["fid", "fid_eigenvalues"])
def test_fid_has_its_closed_forms(way):
    rng = np.random.default_rng(0)
    A = rng.normal(size=(12, 12))
    mu, shift = rng.normal(size=(2, 12))
    s1, s2 = rng.uniform(0.1, 4, (2, 12))
    S, Q = A @ A.T, np.linalg.qr(A)[0]

    def distance(*moments):
        return fid.fid(*moments)[way]

    assert distance(mu, S, mu, S) == pytest.approx(0, abs=1e-9)               # against itself
    assert distance(mu, S, mu + shift, S) == pytest.approx(shift @ shift)     # shifted
    commuting = distance(mu, (Q * s1) @ Q.T, mu, (Q * s2) @ Q.T)
    assert commuting == pytest.approx(((np.sqrt(s1) - np.sqrt(s2)) ** 2).sum())
    assert distance(mu, 0 * S, mu, S) == pytest.approx(np.trace(S))           # one image, repeated


def test_moments_add_up_over_batches_and_keep_their_digits_far_from_zero():
    f = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 9)) + 1e7)
    mu, sigma = moments_of(f, shift=f[0], batch=33)
    assert np.allclose(mu, f.mean(0), rtol=1e-15)
    assert np.allclose(sigma, np.cov(f - 1e7, rowvar=False), rtol=1e-8)


# ------------------------------------------------------------------------------- Inception Score
@pytest.mark.parametrize("name", ["torch-fidelity", "stylegan", "adm"])
def test_inception_score_agrees_in_three_conventions(name):
    expected = GOLDEN["inception_score"][name]
    logits = 2.0 * np.random.RandomState(60).standard_normal((300, 40)).astype(np.float32)
    mean, std = fid.inception_score(torch.from_numpy(logits), **expected["how"])
    assert mean == pytest.approx(expected["mean"], rel=1e-8)
    if expected["std"]:
        assert std == pytest.approx(expected["std"], rel=1e-8)


def test_the_conventions_of_inception_scores_have_their_names():
    how = {name: expected["how"] for name, expected in GOLDEN["inception_score"].items()}
    assert fid.IS_CONVENTIONS["is"] == how["torch-fidelity"]
    assert fid.IS_CONVENTIONS["is_stylegan"] == how["stylegan"]
    assert fid.IS_CONVENTIONS["is_adm"] == dict(shuffle=False, split_size=5000)


def test_inception_score_of_a_sure_classifier_that_sees_all_classes_alike_is_their_number():
    sure = 1000.0 * torch.eye(10).repeat(10, 1)
    assert fid.inception_score(sure, shuffle=False) == pytest.approx((10, 0))


# ------------------------------------------------------- precision, recall, density, coverage
@pytest.mark.parametrize("k", [3, 5])
def test_prdc_agrees_with_the_package_whatever_the_blocks(k):
    real, fake = golden_sets()
    expected = pytest.approx(GOLDEN["prdc"][str(k)], abs=1e-9)
    for block_bytes in (1, 10_000, 2**26):
        assert fid.prdc(real, fake, k, block_bytes) == expected
    assert fid.prdc(real.double() + 1e4, fake.double() + 1e4, k) == expected


def test_the_surface_of_a_ball_is_outside():
    real = np.repeat(np.random.RandomState(40).randint(0, 3, (15, 2)), 2, axis=0)
    fake = np.random.RandomState(50).randint(0, 4, (24, 2))
    got = fid.prdc(torch.from_numpy(real), torch.from_numpy(fake), 3)
    assert got == pytest.approx(GOLDEN["prdc"]["duplicates"], abs=1e-9)


def test_ties_are_decided_as_exact_arithmetic_decides_them():
    """Points of a small lattice, times what no float holds: many distances tie, and integers know."""
    def square(x, y):
        return ((x[:, None] - y[None]) ** 2).sum(-1)                          # (300, 300) integers

    a, b = np.random.RandomState(0).randint(0, 3, (2, 300, 5))
    r_a, r_b = np.sort(square(a, a), 1)[:, 3], np.sort(square(b, b), 1)[:, 3]
    d = square(a, b)
    expected = dict(precision=(d < r_a[:, None]).any(0).mean(), recall=(d < r_b).any(1).mean(),
                    density=(d < r_a[:, None]).sum() / 900, coverage=(d.min(1) < r_a).mean())
    for scale, block_bytes in ((1.0, 2**26), (0.1, 50_000), (1e-3, 2**26)):
        points = torch.from_numpy(a * scale), torch.from_numpy(b * scale)
        assert fid.prdc(*points, 3, block_bytes) == pytest.approx(expected, abs=1e-12)


def test_prdc_of_a_set_against_itself_and_against_one_mode():
    real = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    same = fid.prdc(real, real.clone())
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    mode = fid.prdc(real, real[:1] + 1e-3 * torch.randn(100, 8))
    assert mode["precision"] == 1 and mode["recall"] < 0.02 and mode["coverage"] < 0.2


def test_neighbors_need_more_images_than_there_are_neighbors():
    with pytest.raises(UserError, match="neighbors"):
        fid.prdc(torch.zeros(3, 2), torch.zeros(9, 2))


class Largest(TorchDispatchMode):
    """Watches how large a tensor becomes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def test_no_tensor_of_prdc_outgrows_a_block_or_its_input():
    real, fake = torch.randn(400, 16), torch.randn(1500, 16)
    whole = fid.prdc(real, fake)
    with Largest() as largest:
        assert fid.prdc(real, fake, block_bytes=2**20) == whole
    assert largest.bytes <= 2**20 < 8 * 400 * 1500    # all distances would take 5 and 18 MB


# ---------------------------------------------------------------- features of the tiny world
def exchanged_within_classes(x, labels):
    """Tokens exchanged position by position within a class: each is likely, together they are not."""
    order = torch.Generator().manual_seed(0)
    mixed = torch.zeros_like(x)
    for c in range(10):
        members = (labels == c).nonzero()[:, 0]
        for i in range(x.shape[1]):
            mixed[members, i] = x[members[torch.randperm(len(members), generator=order)], i]
    return mixed


def test_features_see_what_independent_tokens_do_to_a_picture():
    with np.load(os.path.join(ROOT, "assets/fashion/tokens.npz")) as f:
        x = torch.from_numpy(f["tokens"][:2000]).long()
        labels = torch.from_numpy(f["labels"][:2000])
    tokenizer = load_teacher("maskbit-tiny").tokenizer
    space = load_extractor(SPECS["maskbit-tiny"])

    def row(tokens):
        def make(i, **_):
            return (decode_tokens(tokenizer, tokens[i]) * 255).to(torch.uint8)
        return fid.image_metrics(make, torch.arange(500), *space)

    real, patchwork = row(x), row(exchanged_within_classes(x, labels))
    assert real["fid"] < 25 and patchwork["fid"] > 3 * real["fid"]
    assert patchwork["precision"] < real["precision"]


# ------------------------------------------------------------------------------------- Inception
PIXELS = np.random.RandomState(70).randint(0, 256, (2, 3, 5, 7)).astype(np.uint8)
PIXELS = torch.from_numpy(PIXELS.repeat(8, 2).repeat(8, 3))                    # (2, 3, 40, 56)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The published plain file, on seeded weights, with the counts of batches that some files have."""
    state = inception_state()
    for key in [key for key in state if key.endswith("running_mean")]:
        state[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(7)
    path = str(tmp_path_factory.mktemp("inception") / "plain.pth")
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def inception_net(plain):
    return inception.load_inception(plain)


def test_inception_gives_the_golden_maps_features_and_logits(inception_net):
    expected = GOLDEN["inception"]
    h = inception_net.scaled(PIXELS.float() / 255)
    for name, layer in inception_net.layers.named_children():
        h = layer(h)
        if name in expected:
            agrees(h.mean((2, 3)), **expected[name], tol=1e-5)
    features, logits = engine.extract(inception_net, PIXELS)
    agrees(features, **expected["pool3"], tol=1e-5)
    agrees(logits, **expected["logits"], tol=1e-5)
    biased = F.linear(features, inception_net.fc.weight, inception_net.fc.bias)
    agrees(biased, **expected["logits with bias"], tol=1e-5)


def test_inception_has_the_published_tensors(inception_net):
    assert sum(p.numel() for p in inception_net.parameters()) == 23_850_960
    file = inception_file()                           # published keys and shapes, less 94 counts
    listed = "".join(f"{key} {shape}\n" for key, shape in sorted(file.items()))
    assert len(file) == 566 - 94
    assert hashlib.sha256(listed.encode()).hexdigest().startswith("a5dab5458935")


def same_features(a, b):
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-5) for x, y in zip(a, b))


def test_both_published_files_and_images_one_by_one_give_the_same_features(inception_net, tmp_path):
    class Published(nn.Module):                       # the parts of NVIDIA's file that are used
        def __init__(self):
            super().__init__()
            self.layers, self.output = inception_net.layers, inception_net.fc

        def forward(self, x):
            return self.output(self.layers(x).flatten(1)).softmax(1)

    x = inception_net.scaled(PIXELS[:1].float() / 255)
    torch.jit.save(torch.jit.trace(Published(), x), tmp_path / "script.pt")
    script = inception.load_inception(str(tmp_path / "script.pt"))
    expected = engine.extract(inception_net, PIXELS)
    assert same_features(engine.extract(script, PIXELS), expected)
    assert same_features(engine.extract(inception_net, list(PIXELS)), expected)

    torch.save(inception_state(), tmp_path / "bare.pth")          # without the counts of batches
    bare = inception.load_inception(str(tmp_path / "bare.pth"))
    assert fingerprint(bare) == fingerprint(inception_net)


def test_files_that_are_no_inception_are_refused_with_a_sentence(tmp_path):
    less = {key: torch.zeros(shape) for key, shape in inception_file().items() if "7c" not in key}
    torch.save(less, tmp_path / "less.pth")
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), tmp_path / "other.pt")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut short")
    for name, words in (("less.pth", "missing .*Mixed_7c"), ("cut.pth", "cannot read"),
                        ("none.pth", "no weights at"),
                        ("other.pt", "other.pt: a TorchScript file, but not inception")):
        with pytest.raises(UserError, match=words):
            inception.load_inception(str(tmp_path / name))


def test_a_download_that_fails_is_a_sentence_and_what_was_fetched_once_is_kept(tmp_path, monkeypatch):
    asked = []

    def fetch(url, path, digest):
        asked.append((url, digest))
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    words = "cannot download https://.* .no network.: fetch it .* by --inception PATH"
    for name in ("plain", "torchscript"):
        with pytest.raises(UserError, match=words):
            inception.load_inception(name)
    assert asked[0][1] == "6726825d" and asked[1][0].endswith("/inception-2015-12-05.pt")
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    torch.save(inception_state(), tmp_path / "checkpoints" / os.path.basename(asked[0][0]))
    assert isinstance(inception.load_inception(), inception.Inception)
    assert len(asked) == 2


# ------------------------------------------------------------------------- what comes before it
class Small(inception.Inception):
    """Inception's code around a network of no cost: features are mean colors of the four quarters."""

    dim, classes = 12, 5

    def __init__(self, resize=inception.RESIZES[0], crop=False):
        nn.Module.__init__(self)
        self.resize, self.crop = resize, crop
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.fc = nn.Linear(12, 5)


@pytest.mark.parametrize("mode", inception.RESIZES)
def test_golden_resizes(mode):
    expected = GOLDEN["resize"][mode]
    out = inception.resize(PIXELS.float(), mode)
    assert out.shape == (2, 3, 299, 299) and out.dtype == torch.float32
    agrees(out[0, 0, 150, ::19], expected["row"], tol=1e-3)
    agrees(out[: expected["images"]], [78] * 3, expected["abs_sum"])


@pytest.mark.parametrize("H, W", [(256, 256), (512, 375), (3, 299), (1, 700)])
def test_tf1s_bilinear_is_its_definition(H, W):
    img = np.random.RandomState(H).randint(0, 256, (H, W)).astype(np.float64)
    expected = np.zeros((299, 299))
    y, x = np.arange(299) * H / 299, np.arange(299) * W / 299
    for dy in (0, 1):
        for dx in (0, 1):
            i = np.minimum(np.floor(y).astype(int) + dy, H - 1)
            j = np.minimum(np.floor(x).astype(int) + dx, W - 1)
            weight = np.abs(1 - dy - y % 1)[:, None] * np.abs(1 - dx - x % 1)
            expected += weight * img[np.ix_(i, j)]
    got = inception.resize(torch.from_numpy(img).float()[None, None].expand(1, 3, H, W))[0, 2]
    assert np.abs(got.numpy() - expected).max() < 2e-2            # float32 coordinates: 1e-2 of 255


def test_bytes_pass_exactly_and_each_resize_has_its_own_normalization():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).expand(1, 1, 256, 299)
    assert torch.equal(every.float() / 255 * 255, every.float())  # a division, no product with 1 / 255
    assert Small().scaled(every.float() / 255).shape == (1, 3, 299, 299)       # gray has 3 channels, too
    for mode, high in (("legacy_tensorflow", 127 / 128), ("clean", 127 / 128), ("legacy_pytorch", 1)):
        white = Small(mode).scaled(torch.ones(1, 1, 9, 9))
        assert torch.allclose(white, torch.full_like(white, high), rtol=0, atol=1e-6)


def test_the_crop_comes_before_the_resize_on_both_sides():
    cropped = Small("clean", crop=True)
    pixels = np.random.RandomState(0).randint(0, 256, (300, 411, 3)).astype(np.uint8)
    square = inception.clean_resize(inception.coco_crop(Image.fromarray(pixels)))
    expected = (torch.from_numpy(square).permute(2, 0, 1)[None] - 128) / 128
    real = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    assert torch.equal(cropped.scaled(real.float() / 255), expected)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (1, 3, 256, 256), generator=generator).float() / 255
    assert torch.equal(cropped.scaled(drawn), Small("clean").scaled(drawn))    # 256 px are left alone
