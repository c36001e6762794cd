"""GenEval, HPS v2, CLIP score: their rules, their files, their networks, and what evaluate.py does.

Expected numbers are those of the official programs (tests/golden/), or are computed here by hand.
"""

import itertools
import json
import os
import sys

import numpy as np
import open_clip
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import evaluate
import reward
from machinery.errors import UserError
from machinery.files import fingerprint
from metrics import benchmarks, geneval
from networks import clip, inception, mask2former
from tests.common import agrees, command, golden, uniform
from worlds import judges, shapes


GENEVAL = golden("geneval")
PREPROCESSING = golden("preprocessing")
RED_DOG = {"class": "dog", "count": 1, "color": "red"}
PROMPTS = [
    {"tag": "colors", "include": [RED_DOG], "prompt": "a photo of a red dog"},
    {
        "tag": "counting",
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
        "prompt": "a photo of two cats",
    },
]
SHAPES = [                                               # prompts for the world of shapes
    {
        "tag": "colors",
        "include": [{"class": "ring", "count": 1, "color": "red"}],
        "prompt": "a red ring",
    },
    {
        "tag": "single_object",
        "include": [{"class": "square", "count": 1}],
        "prompt": "a square",
    },
]


def write_lines(path, lines):
    """A file of JSON lines, as GenEval's evaluation_metadata.jsonl; its name."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def noise(seed, *shape):
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def noise_in_blocks(seed, size, *shape):
    """Noise uint8 (H, W, C) whose pixels are repeated `size` times."""
    pixels = np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)
    return pixels.repeat(size, 0).repeat(size, 1)


def load(name, *flags):
    """(args, the benchmark called `name`) for flags of evaluate.py."""
    args = evaluate.flags().parse_args(["--benchmark", name, *map(str, flags)])
    return args, evaluate.benchmarks_of(args, "cpu")[name]


# ================================================================================== GenEval's rules
A = (1, 1, 9, 9)                                         # any box


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


def verdict_on(tag, include, exclude, seen):
    """The verdict on {class: [(box, score, color), ...]}."""
    def color(box, name):
        return next(c for b, _, c in seen[name] if tuple(b) == tuple(box))

    detections = {name: [found[:2] for found in boxes] for name, boxes in seen.items()}
    return geneval.verdict({"tag": tag, "include": include, "exclude": exclude}, detections, color)


def boxes_at(*places):
    """Boxes of 4 x 4 pixels with their left sides at these places."""
    return [((x, 0, x + 4, 4), 0.9, "red") for x in places]


@pytest.mark.parametrize("case", GENEVAL["verdicts"])
def test_golden_geneval_verdicts(case):
    exclude = case.get("exclude", [])
    correct, why = verdict_on(case["tag"], case["include"], exclude, case["detections"])
    assert correct is case["right"]
    assert (why == "") == case["right"]


@pytest.mark.parametrize("case", GENEVAL["relations"])
def test_golden_geneval_relations(case):
    assert geneval.relations(case["a"], case["b"]) == set(case["where_a_is"])


def test_a_box_can_be_left_and_above_at_once_and_a_reversed_box_has_its_size():
    where = geneval.relations
    assert where((0, 0, 2, 2), (20, 20, 22, 22)) == {"left of", "above"}
    assert where((20, 20, 22, 22), (0, 0, 2, 2)) == {"right of", "below"}
    # 10 apart, sizes 60 and 30: shrunk to 1, a tenth of the way. A size of -30 would leave 7.
    assert where((0, 0, 60, 0), (35, 0, 5, 0)) == set()
    assert where((0, 0, 60, 0), (5, 0, 35, 0)) == set()
    assert where((0, 0, 20, 0), (10, 0, -10, 0)) == {"right of"}     # shrunk to 6 of 10


def test_a_relation_needs_more_than_half_of_the_way():
    # Centers (3, 4) apart, so |o| = 5. Boxes without height: y stays 4 of 5, and x is shrunk from 3
    # by a tenth of the width.
    def wide(w):
        return geneval.relations((3 - w / 2, 4, 3 + w / 2, 4), (0, 0, 0, 0))

    assert wide(4) == {"right of", "below"}              # x is 2.6 of 5
    assert wide(6) == {"below"}                          # x is 2.4 of 5
    assert geneval.relations((-1, -1, 1, 1), (-3, -3, 3, 3)) == set()                # one center
    # less than a thousandth of a pixel is no distance
    assert geneval.relations((9e-4, 0, 9e-4, 0), (0, 0, 0, 0)) == set()
    assert geneval.relations((2e-3, 0, 2e-3, 0), (0, 0, 0, 0)) == {"right of"}


@pytest.mark.parametrize("tag", geneval.TASKS)
def test_a_score_at_the_threshold_is_out_in_float32_too(tag):
    limit = 0.9 if tag == "counting" else 0.3
    just_above = np.nextafter(np.float32(limit), np.float32(1))
    cases = [(limit, False), (np.float32(limit), False), (just_above, True), (limit + 1e-9, False)]
    for score, right in cases:
        assert verdict_on(tag, [clause("dog")], [], {"dog": [(A, score, "red")]})[0] is right


def test_at_most_sixteen_boxes_count_the_surest():
    boxes = [((i, 0, i + 1, 1), 0.4 + 0.01 * i) for i in range(20)]              # all above 0.3
    assert geneval.kept(boxes, "colors") == [box for box, _ in boxes[:3:-1]]
    assert len(geneval.kept(boxes, "colors")) == 16
    many = {"dog": [(*found, "red") for found in boxes]}
    assert verdict_on("single_object", [clause("dog", 16)], [clause("dog", 17)], many)[0]
    assert not verdict_on("single_object", [clause("dog", 1)], [clause("dog", 16)], many)[0]


def test_a_position_fails_with_its_target_and_says_so():
    include = [RED_DOG, clause("cat", position=["left of", 0])]
    dog, cat = ((60, 10, 100, 50), 0.9), ((5, 12, 40, 48), 0.9, "red")
    assert verdict_on("position", include, [], {"dog": [(*dog, "red")], "cat": [cat]}) == (True, "")
    seen = {"dog": [(*dog, "blue")], "cat": [cat]}
    assert verdict_on("position", include, [], seen) == (False, "expected 1 red dog, found blue")
    include = [clause("dog"), clause("cat", position=["above", 0])]
    why = "expected cat above its target, found it left of"
    assert verdict_on("position", include, [], seen) == (False, why)
    missing = verdict_on("position", include, [], {"cat": [cat]})
    assert missing == (False, "expected 1 dog, found 0")
    concentric = {"dog": [(A, 0.9, "red")], "cat": [(A, 0.9, "red")]}
    assert verdict_on("position", include, [], concentric)[1].endswith("found it at no side")


def test_each_placed_object_must_stand_right_to_each_target():
    include = [clause("dog", 2), clause("cat", 2, position=["left of", 0])]

    def right(dogs, cats):
        seen = {"dog": boxes_at(*dogs), "cat": boxes_at(*cats)}
        return verdict_on("position", include, [], seen)[0]

    assert right((50, 60), (0, 10))
    for dogs in ((50, 5), (5, 50)):                      # whichever of the two is looked at first
        assert not right(dogs, (0, 10))
    for cats in ((0, 70), (70, 0)):
        assert not right((50, 60), cats)


@pytest.mark.parametrize("colors, right", [
    (("red", "red"), True), (("red", "blue"), False), (("blue", "red"), False),
])
def test_all_of_several_objects_must_have_the_color(colors, right):
    dogs = [((i, 0, i + 1, 1), 0.9, color) for i, color in enumerate(colors)]
    assert verdict_on("color_attr", [clause("dog", 2, color="red")], [], {"dog": dogs})[0] is right


@pytest.mark.parametrize("cats, right", [(0, True), (1, True), (2, False), (3, False)])
def test_what_is_excluded_may_be_there_in_smaller_number(cats, right):
    seen = {"dog": [(A, 0.9, "red")], "cat": [(A, 0.8, "red")] * cats}
    correct, why = verdict_on("single_object", [clause("dog")], [clause("cat", 2)], seen)
    assert correct is right
    assert why == ("" if right else f"expected fewer than 2 cat, found {cats}")


def test_geneval_is_the_mean_of_tasks_not_of_images():
    verdicts = [("counting", True)] + [("single_object", False)] * 3 + [("position", False)] * 3
    verdicts += [(task, True) for task in geneval.TASKS[1:]]
    table = geneval.geneval_table(verdicts)
    assert list(table) == ["geneval", *geneval.TASKS]
    assert table["position"] == 0.25
    assert table["counting"] == 1
    assert table["geneval"] == pytest.approx((0 + 1 + 1 + 1 + 0.25 + 1) / 6)
    some = geneval.geneval_table([("colors", True), ("colors", False)])
    assert some == {"geneval": None, "colors": 0.5}


# ================================================================= GenEval's prompts and its folder
def written(folder, metadata_list, images):
    """A GenEval folder with images uint8 (prompts, n, H, W, 3); its name."""
    geneval.write_geneval(folder, metadata_list)
    for i, part in enumerate(images):
        for n, pixels in enumerate(part):
            Image.fromarray(pixels).save(f"{folder}/{i:05d}/samples/{n:05d}.png")
    return folder


def test_a_geneval_folder_is_read_back_and_judged_by_any_detector(tmp_path):
    prompts = geneval.read_metadata(write_lines(tmp_path / "meta.jsonl", PROMPTS))
    pixels = noise(0, 2, 2, 6, 8, 3)
    folder = written(f"{tmp_path}/g", prompts, pixels)
    files = sorted(str(f.relative_to(folder)) for f in (tmp_path / "g").rglob("*.*"))
    each = ("metadata.jsonl", "samples/00000.png", "samples/00001.png")
    assert files == [f"0000{i}/{name}" for i in (0, 1) for name in each]
    (tmp_path / "g/00001/grid.png").write_bytes(b"")     # neither of these is an image of it
    (tmp_path / "g/00001/samples/notes.txt").write_bytes(b"")
    back = list(geneval.read_geneval(folder))
    assert [metadata for metadata, _ in back] == prompts == PROMPTS
    assert np.array_equal([[np.array(img) for img in images] for _, images in back], pixels)

    def find(picture):                                   # sees something in the first picture alone
        if picture != back[0][1][0]:
            return {}
        return {"dog": [(A, 0.5)], "cat": [(A, 0.95), ((0, 0, 5, 5), 0.92)]}

    detector = find, lambda picture, box, name: "red", ("dog", "cat"), {"detector": "mine"}
    args = evaluate.flags().parse_args(["--geneval_folder", folder, "--detector", "shapes"])
    row = benchmarks.geneval_folder(args, "cpu", lambda args, device: detector)
    assert row == {
        "model": folder, "kind": "folder", "n": 4, "geneval": None,
        "counting": 0, "colors": 0.5, "detector": "mine",
    }
    with pytest.raises(UserError, match="cannot make the folder .*00000.samples .*a new one"):
        geneval.write_geneval(folder, prompts)


@pytest.mark.parametrize("change, words", [
    ("{cut", "Expecting property name"),
    ("", "Expecting value"),
    ("[1]", "expected tag, prompt and include"),
    ("7", "not iterable"),
    ({"include": 3}, "iterable"),
    ({"include": [{"class": "dog"}]}, "class and count"),
    ({"tag": "colours"}, "a tag out of single_object, .*got 'colours'"),
    ({"exclude": [clause("dog", 0)]}, "a count from 1 to 16, got 0"),
    ({"include": [clause("dog", color="gray")]}, "a color out of red"),
    ({"include": [clause("dog", position=["above", 0])]}, "a position .*earlier entry"),
    ({"include": [clause("dog"), clause("cat", position=["beside", 0])]}, "a position .relation"),
    ({"include": [clause("dog"), clause("cat", position=["above", None])]}, "a position"),
])
def test_a_broken_metadata_line_is_named(tmp_path, change, words):
    line = change if isinstance(change, str) else json.dumps({**PROMPTS[0], **change})
    (tmp_path / "meta.jsonl").write_text(f"{json.dumps(PROMPTS[1])}\n{line}\n")
    sentence = f"meta.jsonl, line 2 is no prompt of GenEval: .*{words}"
    with pytest.raises(UserError, match=sentence):
        geneval.read_metadata(str(tmp_path / "meta.jsonl"))


def test_unreadable_geneval_files_are_answered_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.jsonl .*evaluation_metadata.jsonl"):
        geneval.read_metadata(str(tmp_path / "none.jsonl"))
    folder = written(f"{tmp_path}/g", PROMPTS[:1], noise(1, 1, 1, 8, 8, 3))
    picture = tmp_path / "g/00000/samples/00000.png"
    whole = picture.read_bytes()
    half, damaged = whole[: len(whole) // 2], whole[:50] + b"?" * 20 + whole[70:]
    for content in (b"", half, damaged):
        picture.write_bytes(content)
        with pytest.raises(UserError, match="cannot read .*00000.png"):
            list(geneval.read_geneval(folder))


# ================================================================== GenEval's detector: Mask2Former
DOG, CAT, NOTHING = mask2former.CLASSES.index("dog"), mask2former.CLASSES.index("cat"), 80


def three_queries():
    """Logits of classes (3, 81) and of masks (3, 2, 2).

    Query 0 is both a dog and a cat, on a ramp from left to right. Query 1 is a cat everywhere.
    Query 2 is a dog with an empty mask.
    """
    z_class = torch.full((3, 81), -9.0)
    z_class[0, DOG], z_class[0, CAT], z_class[0, NOTHING] = 2.0, 1.0, 3.0
    z_class[1, CAT] = 4.0
    z_class[2, DOG] = 4.0
    z_mask = torch.full((3, 2, 2), -5.0)
    z_mask[0] = torch.tensor([-1.0, 3.0])
    z_mask[1] = 2.0
    return z_class, z_mask


def test_instances_are_pairs_of_query_and_class_with_masks_in_the_images_pixels():
    z_class, z_mask = three_queries()
    found = mask2former.instances(z_class, z_mask, (8, 8), (8, 8), (8, 8), best=4)
    assert {name: len(boxes) for name, boxes in found.items()} == {"cat": 2, "dog": 2}
    p = z_class.softmax(-1)
    columns = torch.tensor([0.5, 1.5, 2.5, 3.0, 3.0])    # half-pixel bilinear: -1 -1 -.5 .5 1.5 ...
    inside = columns.sigmoid().mean().item()
    for name, c in (("dog", DOG), ("cat", CAT)):         # one query, two classes, one mask
        (box, score), = [(box, score) for box, score in found[name] if box == (3, 0, 8, 8)]
        assert score == pytest.approx(p[0, c].item() * inside, abs=1e-5)
        assert box.mask.shape == (8, 8)
        assert box.mask[:, 3:].all() and not box.mask[:, :3].any()
    everywhere = p[1, CAT].item() * torch.tensor(2.0).sigmoid().item()
    assert ((0, 0, 8, 8), pytest.approx(everywhere, abs=1e-5)) in found["cat"]
    assert ((0, 0, 0, 0), 0.0) in found["dog"]
    assert geneval.relations(mask2former.Box((3, 0, 8, 8)), (0, 0, 8, 8)) == set()
    assert geneval.kept(found["cat"], "colors")[0] == (0, 0, 8, 8)


def test_a_mask_is_cut_to_the_image_before_it_is_scaled_to_its_size():
    z_class, z_mask = three_queries()
    z_class[0, NOTHING], z_class[0, DOG] = -9.0, 30.0
    # The right half was padding. The ramp is 0 at column 6 of 8, so at 15 of 20.
    found = mask2former.instances(z_class, z_mask, (8, 16), (8, 8), (40, 20), best=1)
    assert list(found) == ["dog"]
    (box, _), = found["dog"]
    assert box == (15, 0, 20, 40)


class SeesRed(nn.Module):
    """A network with Mask2Former's interface: one query for what is red, as a laptop."""

    class Output:
        pass

    def forward(self, pixel_values):
        self.seen = pixel_values
        out = self.Output()
        red = pixel_values[:, :1] - pixel_values[:, 1:2]
        out.masks_queries_logits = 30 * (red[:, :, ::4, ::4] - 2)
        out.class_queries_logits = torch.full((1, 1, 81), -9.0)
        out.class_queries_logits[..., mask2former.CLASSES.index("laptop")] = 9.0
        return out


@pytest.mark.parametrize("size, scaled, padded", [
    ((40, 30), (1067, 800), (1088, 800)),
    ((100, 10), (1333, 133), (1344, 160)),
    ((1000, 1100), (800, 880), (800, 896)),
])
def test_the_detector_scales_normalizes_pads_and_its_boxes_return_to_the_image(
    size, scaled, padded
):
    net, (W, H), (w, h) = SeesRed(), size, scaled
    image = Image.new("RGB", size, (10, 60, 200))
    box = (W // 5, H // 5, W // 2, H // 2)
    image.paste((255, 0, 0), box)
    (found, score), = mask2former.mask2former(net)(image)["laptop"]
    assert net.seen.shape == (1, 3, padded[1], padded[0])
    corner = [(10 - 123.675) / 58.395, (60 - 116.28) / 57.12, (200 - 103.53) / 57.375]
    assert net.seen[0, :, 0, 0].tolist() == pytest.approx(corner, abs=1e-4)
    assert (net.seen[:, :, h:] == 0).all() and (net.seen[:, :, :, w:] == 0).all()
    assert net.seen[0, 2, h - 1, w - 1] == pytest.approx(corner[2], abs=1e-4)    # and no further
    assert np.abs(np.array(found) - box).max() <= 1
    assert score > 0.9
    assert found.mask.shape == (H, W)


def test_transformers_mask2former_is_loaded_strictly_and_detects(tmp_path):
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    path, file = str(tmp_path / "net"), str(tmp_path / "net/model.safetensors")
    net = mask2former.load_mask2former(random_weights=True)
    net.save_pretrained(path)
    again = mask2former.load_mask2former(path)
    assert fingerprint(net) == fingerprint(again)
    assert not again.training
    image = Image.fromarray(noise(1, 6, 60, 3))
    found = mask2former.mask2former(net)(image)
    assert found == mask2former.mask2former(again)(image)
    assert sum(map(len, found.values())) == 100
    assert set(found) <= set(mask2former.CLASSES)
    state = load_file(file)
    name = sorted(state)[5]
    del state[name]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks {name}"):
        mask2former.load_mask2former(path)
    (tmp_path / "net/model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot load the detector .*--detector_weights"):
        mask2former.load_mask2former(path)
    with pytest.raises(UserError, match="no such folder; expected a folder with config.json"):
        mask2former.load_mask2former(path + "/none")


def test_without_transformers_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        mask2former.load_mask2former()


def test_the_detector_of_mask2former_says_whether_it_is_random_or_another_than_the_published(
    monkeypatch
):
    def facts(*flags):
        args = evaluate.flags().parse_args(["--detector", "mask2former", *flags])
        find, color_of, classes, facts = judges.load_detector(args, "cpu")
        assert classes is mask2former.CLASSES
        return facts

    def load(name, make, path, random):
        return clip.ClipReward(benchmarks.TINY_CLIP, name)

    monkeypatch.setattr(benchmarks, "load_mask2former", lambda *_: SeesRed())
    monkeypatch.setattr(benchmarks, "load_model", load)
    published = facts()
    assert published["detector"].startswith("transformers mask2former ")
    assert "not comparable with published GenEval" in published["note"]
    assert published["clip_l_weights"] != "random"
    for flags in ([], ["--detector_weights", "net"], ["--clip_l_weights", "clip.pt"]):
        some = facts("--random_weights", *flags)
        assert some["detector"].startswith("random mask2former ")
        assert some["note"] == benchmarks.RANDOM


# ================================================================================= GenEval's colors
def tiny_clip():
    def make():
        return clip.ClipReward(benchmarks.TINY_CLIP, "clip_l")

    model = reward.load_model("clip_l", make, random_weights=True)
    return model.eval().requires_grad_(False)


def test_a_colors_vector_is_the_direction_of_the_mean_of_three_templates():
    model = tiny_clip()
    vectors = geneval.color_vectors(model, "dog", "cpu")
    assert vectors.shape == (10, 16)
    for i, c in ((0, "red"), (9, "white")):
        things = (f"{c} dog", f"{c}-colored dog", f"{c} object")
        texts = [f"a photo of a {thing}" for thing in things]
        g = model.clip.encode_text(model.tokenize(texts))
        mean = sum(v / v.norm() for v in g) / 3
        assert torch.allclose(vectors[i], mean / mean.norm(), atol=1e-6)
    assert not torch.allclose(vectors, geneval.color_vectors(model, "cat", "cpu"), atol=1e-3)


def test_the_judge_of_colors_sees_the_object_on_gray_cut_to_its_box():
    model, rng, names = tiny_clip(), np.random.RandomState(3), set()
    color_of = geneval.color_classifier(model, "cpu")
    for i in range(12):
        pixels = (rng.rand(3) * 256 + 40 * rng.randn(30, 40, 3)).clip(0, 255).astype(np.uint8)
        box = mask2former.Box((5, 4, 25, 24))
        box.mask = torch.zeros(30, 40, dtype=torch.bool)
        box.mask[4:24, 5 : 18 + i % 3] = True
        inside = box.mask.numpy()[..., None]
        seen = np.where(inside, pixels, 0x99).astype(np.uint8)
        crop = Image.fromarray(seen[4:24, 5:25]).resize((32, 32), Image.Resampling.BICUBIC)
        crop = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None] / 255
        f = model.clip.encode_image(clip.normalize(crop))[0]
        cosines = geneval.color_vectors(model, "dog", "cpu") @ f
        expected = geneval.COLORS[cosines.argmax()]
        names.add(expected)
        assert color_of(Image.fromarray(pixels), box, "dog") == expected
        other_ground = np.where(inside, pixels, 255 - pixels)
        assert color_of(Image.fromarray(other_ground), box, "dog") == expected
    assert len(names) > 1


# =========================================================================================== HPS v2
def hps_folder(folder):
    """HPDv2's folder `benchmark`, with made-up prompts; its name."""
    for style in benchmarks.HPS_STYLES:
        lines = [f"{style} number {i}" for i in range(800)]
        (folder / f"{style}.json").write_text(json.dumps(lines))
    return str(folder)


def test_hps_averages_blocks_of_eighty():
    # Block b of style s: 10 s + b, half of it 5 more and half 5 less. Of the numbers 0 to 9 the
    # variance is 99 / 12.
    def score(s, i):
        return 10 * s + i // 80 + (5 if i % 80 < 40 else -5)

    scores = [score(s, i) for s, i in itertools.product(range(4), range(800))]
    table = benchmarks.hps_table(torch.tensor(scores, dtype=torch.float64), "v2.1")
    means = {"anime": 4.5, "concept-art": 14.5, "paintings": 24.5, "photo": 34.5}
    assert {style: table[style] for style in benchmarks.HPS_STYLES} == means
    assert table["hps_std"] == dict.fromkeys(means, 2.8723)
    assert table["hps"] == 19.5
    assert "concept-art 14.50 (2.8723)" in table["note"] and "averaged 19.50" in table["note"]
    table = benchmarks.hps_table(torch.full((3200,), 27.126, dtype=torch.float64), "v2.1")
    assert table["hps"] == table["photo"] == 27.13
    assert table["hps_std"]["photo"] == 0


def test_hps_images_lie_where_its_package_looks_as_jpegs_of_quality_75(tmp_path):
    flags = ["--metadata", hps_folder(tmp_path), "--random_weights", "--teacher", "maskgen-tiny"]
    _, bench = load("hps", *flags)
    pictures = [Image.fromarray(pixels) for pixels in noise(5, 3, 16, 16, 3)]
    bench.lay(f"{tmp_path}/h")
    assert sorted(os.listdir(tmp_path / "h")) == sorted(benchmarks.HPS_STYLES)
    bench.score(f"{tmp_path}/h", slice(800, 803), pictures)
    files = sorted(os.listdir(tmp_path / "h/concept-art"))
    assert files == ["00000.jpg", "00001.jpg", "00002.jpg"]
    pictures[1].save(tmp_path / "default.jpg")           # PIL's default is 75
    pictures[1].save(tmp_path / "other.jpg", quality=76)
    here = (tmp_path / "h/concept-art/00001.jpg").read_bytes()
    assert (tmp_path / "default.jpg").read_bytes() == here
    assert (tmp_path / "other.jpg").read_bytes() != here


def test_hps_is_scored_from_the_jpegs_as_written(tmp_path):
    flags = ["--metadata", hps_folder(tmp_path), "--random_weights", "--teacher", "maskgen-tiny"]
    args, bench = load("hps", *flags)
    assert len(bench.prompts) == 3200
    prompts = bench.prompts[799:801]
    assert prompts == ["anime number 799", "concept-art number 0"]
    pictures = [Image.fromarray(pixels) for pixels in noise(0, 2, 40, 40, 3)]
    bench.lay(f"{tmp_path}/h")
    scores = bench.score(f"{tmp_path}/h", slice(799, 801), pictures)
    model, _ = benchmarks.load_clip(args, "hps", clip.CLIP_H, "cpu")
    files = ("anime/00799.jpg", "concept-art/00000.jpg")
    for score, file, prompt in zip(scores, files, prompts):
        img = torch.from_numpy(np.array(Image.open(f"{tmp_path}/h/{file}"))).permute(2, 0, 1)[None]
        f = model.clip.encode_image(clip.preprocess_longest(img / 255, 32))[0]
        g = model.clip.encode_text(model.tokenize([prompt]))[0]
        cosine = F.cosine_similarity(f, g, dim=0).item()
        assert score.item() == pytest.approx(100 * cosine, abs=1e-3)


def test_a_row_of_hps_says_its_version_and_its_weights(tmp_path):
    flags = ["--metadata", hps_folder(tmp_path), "--random_weights", "--teacher", "maskgen-tiny"]
    _, bench = load("hps", *flags)
    row = bench.row(torch.arange(20.0, 24.0).double().repeat_interleave(800))
    assert (row["hps"], row["anime"], row["photo"]) == (21.5, 20, 23)
    assert row["hps_version"] == "v2.1"
    assert row["hps_weights"] == "random"
    assert "v2.1" in row["note"] and "random weights" in row["note"]


@pytest.mark.parametrize("version, file, column", [
    ("v2.1", "HPS_v2.1_compressed.pt", "hps"),
    ("v2.0", "HPS_v2_compressed.pt", "hps_v2.0"),
])
def test_each_version_of_hps_has_its_published_weights_and_its_own_column(
    tmp_path, monkeypatch, version, file, column
):
    loaded = []

    def load_model(name, make, path, random):
        loaded.append(path)
        return nn.Linear(1, 1)

    monkeypatch.setattr(benchmarks, "fetch", lambda *asked: asked)
    monkeypatch.setattr(benchmarks, "load_model", load_model)
    _, bench = load("hps", "--metadata", hps_folder(tmp_path), "--hps_version", version)
    assert loaded == [("xswu/HPSv2", file, "--hps_weights")]
    row = bench.row(torch.full((3200,), 27.0).double())
    assert row[column] == 27 and row["hps_version"] == version
    assert len({"hps", "hps_v2.0"} & row.keys()) == 1


# ================================================================== CLIP score, and COCO's captions
def test_golden_clip_score_tokens():
    expected = golden("clip_score")
    short, long = expected["short"], expected["long"]
    ids = benchmarks.clip_score_tokens([short["caption"], " ".join([long["sentence"]] * 6)])
    assert ids.shape == (2, 77)
    assert ids[0].tolist() == short["ids"] + [0] * (77 - len(short["ids"]))
    assert ids[1].tolist() == long["ids"]


def test_the_prefix_pushes_a_long_captions_end_out_and_another_takes_its_place():
    for words in (71, 72, 73, 75, 200):                  # 72 and the prefix fill all 77
        ids = benchmarks.clip_score_tokens([" ".join(["dog"] * words)])[0].tolist()
        expected = [49406, 320, 1125, 29340, *[1929] * min(words, 72), 49407]
        assert [x for x in ids if x] == expected
    # A "!--" is two ids, 0 and 2432: a zero in the last place passes for padding.
    ids = benchmarks.clip_score_tokens(["dog " * 71 + "1 !-- a dog"])[0].tolist()
    assert ids[75:] == [272, 0]
    assert 49407 not in ids


@pytest.mark.parametrize("excess, start", [(0, 0), (1, 0), (2, 1), (3, 2), (5, 2), (7, 4)])
def test_the_crop_of_an_odd_excess_starts_at_the_even_half(excess, start):
    wide = noise(3, 16, 16 + excess, 3)                  # 0.5 becomes 0, and 1.5 becomes 2
    crop = wide[:, start : start + 16]
    assert np.array_equal(inception.coco_crop(Image.fromarray(wide), 16), crop)
    tall, crop = wide.transpose(1, 0, 2), crop.transpose(1, 0, 2)
    assert np.array_equal(inception.coco_crop(Image.fromarray(tall), 16), crop)


def test_golden_coco_crop():
    pixels = noise_in_blocks(80, 2, 37, 50, 3)
    out = inception.coco_crop(Image.fromarray(pixels), 32)
    assert out.dtype == np.uint8
    agrees(torch.from_numpy(out), **PREPROCESSING["coco_crop"])
    gray = inception.coco_crop(Image.fromarray(pixels[:, :, 0]))                 # COCO has some
    assert gray.shape == (256, 256, 3)
    assert (gray == gray[:, :, :1]).all()


# ======================================================== clean-fid's resize, open_clip's transform
def test_golden_clean_resize():
    pixels = np.random.RandomState(70).randint(0, 256, (2, 3, 5, 7)).astype(np.uint8)[0]
    pixels = pixels.repeat(8, 1).repeat(8, 2).transpose(1, 2, 0)
    out = inception.clean_resize(pixels)
    assert out.shape == (299, 299, 3)
    assert out.dtype == np.float32
    assert out.min() >= 0 and out.max() <= 255
    expected = PREPROCESSING["clean_resize"]
    agrees(torch.from_numpy(out), expected["first"], expected["abs_sum"])
    row = torch.from_numpy(out[150, ::19, 0].copy())
    agrees(row, expected["row_150_every_19th"])


def test_golden_transform_of_open_clip():
    pixels = uniform(300, 2, 3, 80, 72).float()[0] * 255
    picture = Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())
    agrees(clip.preprocess_pil(picture, 56), **PREPROCESSING["open_clip"])
    wide = np.random.RandomState(0).randint(0, 256, (16, 19, 3)).astype(np.uint8)
    crop = torch.from_numpy(wide[:, 2:18]).permute(2, 0, 1) / 255        # 3 too wide: from 2 on
    out = clip.preprocess_pil(Image.fromarray(wide), 16)
    agrees(out.flatten(), clip.normalize(crop).flatten().tolist())


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("config, count, hidden, gelu", [
    (clip.CLIP_G, 1_366_678_273, 6144, "GELU"),
    (clip.CLIP_L, 427_616_513, 4096, "QuickGELU"),       # OpenAI's alone is quick
])
def test_the_clips_that_measure_have_their_published_size(config, count, hidden, gelu):
    config = open_clip.get_model_config(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    one_layer = {**config, "vision_cfg": {**vision, "layers": 1}, "text_cfg": {**text, "layers": 1}}
    with torch.device("meta"):
        model = clip.ClipReward(one_layer)
    block = model.clip.visual.transformer.resblocks[0]
    text_block = model.clip.transformer.resblocks[0]
    others = (vision["layers"] - 1) * parameters(block)
    others += (text["layers"] - 1) * parameters(text_block)
    assert parameters(model) + others == count
    assert block.mlp.c_fc.out_features == hidden
    assert type(text_block.mlp.gelu).__name__ == gelu


# ========================================================================= evaluate.py's benchmarks
def test_geneval_is_drawn_in_its_layout_and_scored_alike_in_passing_and_from_the_folder(
    tmp_path, capsys
):
    metadata = write_lines(tmp_path / "meta.jsonl", SHAPES)
    flags = ["--benchmark", "geneval", "--metadata", metadata, "--teacher", "meissonic-tiny"]
    row, = command(tmp_path, *flags, "--steps", 1, "--detector", "shapes", "--batch", 3)
    back = list(geneval.read_geneval(row["folder"]))
    assert [line for line, _ in back] == SHAPES
    assert [len(images) for _, images in back] == [4, 4]
    assert (row["n"], row["per_prompt"], row["geneval"]) == (8, 4, None)
    assert "not comparable" in row["note"]
    again = command(tmp_path, "--geneval_folder", row["folder"], "--detector", "shapes")[1]
    for key in ("n", "colors", "single_object", "detector"):
        assert again[key] == row[key]
    assert again["kind"] == "folder"
    assert "not comparable with published GenEval" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot make the folder .*a new one"):
        command(tmp_path, *flags, "--steps", 1)
    row = command(tmp_path, *flags, "--steps", 2, "--per_prompt", 1)[-1]         # without detector
    assert [len(images) for _, images in geneval.read_geneval(row["folder"])] == [1, 1]
    assert row["geneval"] is None
    assert "colors" not in row


def test_a_batch_of_geneval_is_judged_by_its_own_prompt(tmp_path):
    """Drawn scenes in place of a model: two of three fulfill the first prompt, one the second."""
    metadata = write_lines(tmp_path / "meta.jsonl", SHAPES)
    flags = ["--detector", "shapes", "--per_prompt", 3, "--teacher", "meissonic-tiny"]
    _, bench = load("geneval", "--metadata", metadata, *flags)
    drawn = [
        ("ring", "red"), ("ring", "blue"), ("ring", "red"),
        ("ring", "red"), ("square", "red"), ("cross", "red"),
    ]
    pixels = [shapes.render(np.random.default_rng(i), [shape]) for i, shape in enumerate(drawn)]
    pictures = [Image.fromarray(img) for img in pixels]
    bench.lay(f"{tmp_path}/g")
    scores = bench.score(f"{tmp_path}/g", slice(0, 4), pictures[:4])
    scores += bench.score(f"{tmp_path}/g", slice(4, 8), pictures[4:])
    assert scores == [1, 0, 1, 0, 1, 0]
    row = bench.row(torch.tensor(scores))
    assert row["colors"] == pytest.approx(2 / 3)
    assert row["single_object"] == pytest.approx(1 / 3)
    back = [np.array(img) for _, part in geneval.read_geneval(f"{tmp_path}/g") for img in part]
    assert np.array_equal(back, pixels)


def test_a_detector_is_a_tuple_of_four_that_also_has_names(tmp_path):
    args = evaluate.flags().parse_args(["--detector", "shapes"])
    detector = geneval.Detector(*judges.load_detector(args, "cpu"))
    find, color_of, classes, facts = detector
    assert detector.classes == shapes.SHAPES
    assert detector.facts["detector"] == "worlds/shapes.py"
    picture = Image.fromarray(shapes.render(np.random.default_rng(0), [("ring", "red")]))
    (box, score), = detector.find(picture)["ring"]
    assert detector.color_of(picture, box, "ring") == "red"
    assert [detector.is_right(line, picture) for line in SHAPES] == [True, False]


def test_clip_score_is_the_mean_cosine_of_image_i_and_line_i_on_crops(tmp_path, capsys):
    captions = ["a red ring", "two blue crosses", "a green square above a ring"]
    (tmp_path / "captions.txt").write_text("\n".join(captions) + "\n\n")
    flags = ["--benchmark", "clip", "--metadata", tmp_path / "captions.txt"]
    flags += ["--teacher", "maskgen-tiny", "--steps", 1, "--batch", 2]
    row, = command(tmp_path, *flags, "--save_images")
    args = evaluate.flags().parse_args(["--random_weights"])
    model, _ = benchmarks.load_clip(args, "clip_g", clip.CLIP_G, "cpu")
    cosines = []
    for i, words in enumerate(captions):
        crop = Image.open(f"{row['folder']}/{i:05d}.png")
        assert crop.size == (256, 256)
        f = model.clip.encode_image(clip.preprocess_pil(crop, 32)[None])[0]
        g = model.clip.encode_text(benchmarks.clip_score_tokens([words]))[0]
        cosines.append(F.cosine_similarity(f, g, dim=0).item())
    assert len(os.listdir(row["folder"])) == 3
    assert np.ptp(cosines) > 1e-3
    assert row["clip_score"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert abs(row["clip_score"]) < 1
    assert row["clip_g_weights"] == "random"
    assert "random weights" in capsys.readouterr().out
    assert "folder" not in command(tmp_path / "bare", *flags)[0]                 # nothing was kept


def test_images_of_clip_score_can_be_kept_whole(tmp_path):
    (tmp_path / "captions.txt").write_text("a ring\n")
    flags = ["--metadata", tmp_path / "captions.txt", "--teacher", "maskgen-tiny"]
    _, bench = load("clip", *flags, "--save_images", "whole", "--random_weights")
    pixels = noise(2, 20, 30, 3)
    bench.lay(f"{tmp_path}/whole")
    bench.score(f"{tmp_path}/whole", slice(0, 250), [Image.fromarray(pixels)])
    assert np.array_equal(np.array(Image.open(tmp_path / "whole/00000.png")), pixels)


# =================================================================================== wrong commands
@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A folder of files that a benchmark cannot, or can, read."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "gap.txt").write_text("a\n\nb\n")
    (folder / "empty.txt").write_text("\n")
    (folder / "ok.txt").write_text("a ring\n")
    dog = {"tag": "single_object", "include": [clause("dog")], "prompt": "a dog"}
    write_lines(folder / "dog.jsonl", [dog])
    (folder / "bare").mkdir()
    (folder / "short").mkdir()
    (folder / "short/anime.json").write_text('["a", "b"]')
    return folder


CLIP_OF = "--benchmark clip --metadata {0}/ok.txt"


@pytest.mark.parametrize("flags, words", [
    # what to draw
    ("--benchmark geneval", "needs --metadata PATH: GenEval's evaluation_metadata.jsonl"),
    ("--benchmark geneval --metadata {0}/ok.txt", "line 1 is no prompt of GenEval"),
    ("--benchmark hps --metadata {0}/none",
     "cannot read .*none/anime.json .*HPDv2's folder `benchmark`, with anime.json"),
    ("--benchmark hps --metadata {0}/short",
     "short/anime.json .*: expected 800 strings, got 2 entries"),
    ("--benchmark clip --metadata {0}/gap.txt",
     "gap.txt: there is an empty line in it; expected a caption on every line"),
    ("--benchmark clip --metadata {0}/empty.txt", "--metadata .*empty.txt: no prompt in it"),
    # who draws, and who scores
    (CLIP_OF + " --teacher maskbit-tiny", "draws prompts, and maskbit-tiny draws classes"),
    (CLIP_OF + " --clip_g_weights {0}/none.pt", "no weights at .*none.pt"),
    ("--benchmark geneval --metadata {0}/dog.jsonl --detector shapes",
     "does not know the class 'dog' of 'a dog'; it knows circle"),
    ("--geneval_folder {0}", "is scored here: add --detector mask2former, or shapes"),
    ("--geneval_folder {0}/none --detector shapes", "none: no images; expected <index>/samples"),
    ("--geneval_folder {0}/bare --detector shapes",
     "bare: no images; expected <index>/samples/<n>.png"),
    # flags of another benchmark
    ("--detector shapes", "--detector shapes belongs to --metrics geneval"),
    (CLIP_OF + " --detector shapes", "--detector shapes belongs to --metrics geneval"),
    (CLIP_OF + " --hps_weights x.pt", "--hps_weights x.pt belongs to --metrics hps"),
    ("--metadata {0}/ok.txt", "--metadata .*ok.txt belongs to --metrics geneval or hps or clip"),
])
def test_what_a_benchmark_cannot_read_is_answered_with_a_sentence_before_anything_is_drawn(
    tmp_path, broken, flags, words
):
    flags = flags.format(broken).split()
    if "--teacher" not in flags:
        flags += ["--teacher", "maskgen-tiny"]
    with pytest.raises(UserError, match=words):
        command(tmp_path, *flags)
    assert os.listdir(tmp_path / "out") == []
