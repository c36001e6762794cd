"""benchmarks: tests."""

import json
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import evaluate
import reward
from machinery import files as machinery_files
from metrics import benchmarks, clip_score, geneval, hps
from networks import inception, mask2former
from networks import clip as clip_net
from worlds import judges
from machinery.errors import UserError
from tests.common import agrees, uniform, judge, A, B, C, D, ABOVE, BELOW, LEFT, command

DOG, CAT = [((60, 10, 100, 50), 0.9, "red")], ((5, 12, 40, 48), 0.9, "red")
BLUE, BLACK = [("bench", 1, {"color": "blue"})], [("dog", 1, {"color": "purple"}), ("apple", 1, {"color": "black"})]


@pytest.mark.parametrize("right, tag, include, exclude, seen", [
    (True, "single_object", [("dog", 1)], [], {"dog": [(A, 0.31, "red")]}),
    (False, "single_object", [("dog", 1)], [], {"dog": [(A, 0.3, "red")]}),
    (True, "two_object", [("dog", 1), ("cat", 1)], [], {"dog": [(A, 0.8, "red")], "cat": [(A, 0.35, "red")]}),
    (True, "counting", [("apple", 2)], [("apple", 3)], {"apple": [(B, 0.95, ""), (C, 0.91, ""), (D, 0.89, "")]}),
    (False, "counting", [("apple", 2)], [("apple", 3)], {"apple": [(B, 0.95, ""), (C, 0.91, ""), (D, 0.905, "")]}),
    (False, "counting", [("apple", 3)], [("apple", 4)], {"apple": [(B, 0.95, ""), (C, 0.91, ""), (D, 0.5, "")]}),
    (True, "colors", BLUE, [], {"bench": [(B, 0.5, "red"), (C, 0.9, "blue")]}),
    (False, "colors", BLUE, [], {"bench": [(B, 0.95, "red"), (C, 0.9, "blue")]}),
    (True, "position", LEFT, [], {"dog": DOG, "cat": [CAT]}),
    (False, "position", LEFT, [], {"dog": DOG, "cat": [CAT, ((70, 70, 90, 90), 0.95, "red")]}),
    (False, "position", ABOVE, [], {"dog": [((10, 30, 60, 90), 0.9, "")], "cat": [((12, 25, 58, 82), 0.9, "")]}),
    (False, "position", BELOW, [], {"cat": [((12, 25, 58, 82), 0.9, "red")]}),
    (True, "color_attr", BLACK, [], {"dog": [(B, 0.7, "purple")], "apple": [(B, 0.7, "black")]}),
    (False, "color_attr", BLACK, [], {"dog": [(B, 0.7, "black")], "apple": [(B, 0.7, "purple")]})])
def test_golden_geneval_verdicts(right, tag, include, exclude, seen):
    correct, why = judge(tag, include, exclude, seen)
    assert correct is right and (why == "") == right


@pytest.mark.parametrize("a, b, names", [
    ((31, 29, 91, 67), (16, 25, 95, 82), ""), ((77, 18, 80, 82), (0, 0, 9, 10), "right of"),
    ((12, 4, 26, 9), (48, 70, 75, 80), "above"), ((31, 14, 97, 66), (34, 17, 83, 75), ""),
    ((32, 6, 86, 71), (30, 3, 78, 67), ""), ((56, 19, 97, 57), (45, 27, 84, 53), ""),
    ((45, 40, 87, 59), (14, 3, 84, 43), "below"), ((50, 17, 62, 98), (39, 17, 60, 90), ""),
    ((93, 32, 97, 97), (54, 54, 86, 95), "right of"), ((52, 8, 61, 53), (19, 72, 40, 90), "above"),
    ((26, 47, 91, 72), (45, 17, 76, 66), "below"), ((14, 40, 20, 48), (34, 44, 69, 51), "left of"),
    ((44, 65, 56, 77), (53, 76, 51, 63), ""), ((24, 5, 64, 59), (19, -7, 78, 68), "")])
def test_golden_geneval_relations(a, b, names):
    assert geneval.relations(a, b) == ({names} if names else set())


def test_a_box_can_be_left_and_above_at_once_and_a_reversed_box_has_its_size():
    assert geneval.relations((0, 0, 2, 2), (20, 20, 22, 22)) == {"left of", "above"}
    assert geneval.relations((20, 20, 22, 22), (0, 0, 2, 2)) == {"right of", "below"}
    # 10 apart, sizes 60 and 30: shrunk to 1, a tenth of the way. With a size of -30 it were 7, and "right of".
    where = geneval.relations
    assert where((0, 0, 60, 0), (35, 0, 5, 0)) == where((0, 0, 60, 0), (5, 0, 35, 0)) == set()
    assert geneval.relations((0, 0, 20, 0), (10, 0, -10, 0)) == {"right of"}                         # 6 of 10


def test_a_relation_needs_more_than_half_of_the_way():
    # Centers (3, 4) apart, so |o| = 5. Without height y stays 4 of 5; x is shrunk from 3 by a tenth of the width.
    wide = lambda w: geneval.relations((3 - w / 2, 4, 3 + w / 2, 4), (0, 0, 0, 0))
    assert wide(4) == {"right of", "below"} and wide(6) == {"below"}                            # 2.6 and 2.4 of 5
    assert geneval.relations((-1, -1, 1, 1), (-3, -3, 3, 3)) == set()                                # one center
    points = [geneval.relations((x, 0, x, 0), (0, 0, 0, 0)) for x in (9e-4, 2e-3)]
    assert points == [set(), {"right of"}]                       # less than a thousandth of a pixel is no distance


@pytest.mark.parametrize("tag, limit", [(tag, 0.9 if tag == "counting" else 0.3) for tag in geneval.TASKS])
def test_a_score_at_the_threshold_is_out_in_float32_too(tag, limit):
    just = np.nextafter(np.float32(limit), np.float32(1))
    for score, right in ((limit, False), (np.float32(limit), False), (just, True), (limit + 1e-9, False)):
        assert judge(tag, [("dog", 1)], [], {"dog": [(A, score, "red")]})[0] is right


def test_at_most_sixteen_boxes_count_the_surest():
    boxes = [((i, 0, i + 1, 1), 0.4 + 0.01 * i) for i in range(20)]
    kept = geneval.kept(boxes, "colors")
    assert kept == [box for box, _ in boxes[:3:-1]] and len(kept) == 16
    many = {"dog": [(*found, "red") for found in boxes]}
    assert judge("single_object", [("dog", 16)], [("dog", 17)], many)[0]                # all 20 are above 0.3
    assert not judge("single_object", [("dog", 1)], [("dog", 16)], many)[0]


def test_a_position_fails_with_its_target_and_says_so():
    red_dog = [("dog", 1, {"color": "red"}), LEFT[1]]
    assert judge("position", red_dog, [], {"dog": DOG, "cat": [CAT]}) == (True, "")
    correct, why = judge("position", red_dog, [], {"dog": [(*DOG[0][:2], "blue")], "cat": [CAT]})
    assert not correct and why == ("expected 1 red dog, found blue; "
                                   "expected cat left of something that is missing or wrong itself")
    why = judge("position", ABOVE, [], {"dog": DOG, "cat": [CAT]})[1]
    assert why == "expected cat above its target, found it left of"


def test_each_placed_object_must_stand_right_to_each_target():
    two = [("dog", 2), ("cat", 2, {"position": ["left of", 0]})]
    at = lambda *xs: [((x, 0, x + 4, 4), 0.9, "red") for x in xs]
    assert judge("position", two, [], {"dog": at(50, 60), "cat": at(0, 10)})[0]
    for step in (1, -1):                                         # whichever of the two is looked at first
        assert not judge("position", two, [], {"dog": at(50, 5)[::step], "cat": at(0, 10)})[0]
        assert not judge("position", two, [], {"dog": at(50, 60), "cat": at(0, 70)[::step]})[0]


def test_all_of_several_objects_must_have_the_color():
    for seen, right in (("red red", True), ("red blue", False), ("blue red", False)):
        boxes = [((i, 0, i + 1, 1), 0.9, color) for i, color in enumerate(seen.split())]
        assert judge("color_attr", [("dog", 2, {"color": "red"})], [], {"dog": boxes})[0] is right


def test_what_is_excluded_may_be_there_in_smaller_number():
    for n, right in ((0, True), (1, True), (2, False), (3, False)):
        seen = {"dog": [(A, 0.9, "red")], "cat": [(A, 0.8, "red")] * n}
        assert judge("single_object", [("dog", 1)], [("cat", 2)], seen)[0] is right


def test_geneval_is_the_mean_of_tasks_not_of_images():
    rows = [("counting", True)] + [("single_object", False)] * 3 + [(tag, True, "") for tag in geneval.TASKS[1:]]
    table = geneval.geneval_table(rows + [("position", False), ("position", False), ("position", False)])
    assert table["position"] == 0.25 and table["counting"] == 1 and list(table) == ["geneval", *geneval.TASKS]
    assert table["geneval"] == pytest.approx((0 + 1 + 1 + 1 + 0.25 + 1) / 6)
    assert geneval.geneval_table([("colors", True), ("colors", False)]) == {"geneval": None, "colors": 0.5}
PROMPTS = [
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}],
     "prompt": "a photo of two cats"}]


def test_a_geneval_folder_is_read_back_and_judged_by_any_detector(tmp_path):
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    prompts = geneval.read_metadata(str(tmp_path / "meta.jsonl"))
    img = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 2, 3, 6, 8), dtype=np.uint8))
    geneval.write_geneval(f"{tmp_path}/g", prompts, (part for part in img))
    files = sorted(str(f.relative_to(tmp_path / "g")) for f in (tmp_path / "g").rglob("*.*"))
    each = "metadata.jsonl", "samples/00000.png", "samples/00001.png"
    assert files == [f"0000{i}/{name}" for i in (0, 1) for name in each]
    (tmp_path / "g/00001/grid.png").write_bytes(b""), (tmp_path / "g/00001/samples/notes.txt").write_bytes(b"")
    back = list(geneval.read_geneval(f"{tmp_path}/g"))
    assert [metadata for metadata, _ in back] == prompts == PROMPTS
    assert np.array_equal(np.array([[np.array(p) for p in part] for _, part in back]), img.permute(0, 1, 3, 4, 2))
    detector = lambda image: {"dog": [(A, 0.5)], "cat": [(A, 0.95), (B, 0.92)]} if image == back[0][1][0] else {}
    rows = list(geneval.geneval(f"{tmp_path}/g", detector, lambda image, box, name: "red"))
    assert [row[:2] for row in rows] == [("colors", True), ("colors", False)] + [("counting", False)] * 2
    with pytest.raises(UserError, match="cannot make the folder .*00000.samples .*a new one"):
        geneval.write_geneval(f"{tmp_path}/g", prompts, img)


@pytest.mark.parametrize("change, words", [
    ("{cut", "Expecting property name"), ("", "Expecting value"), ("[1]", "expected tag, prompt and include"),
    ("7", "not iterable"), (dict(include=3), "iterable"), (dict(include=[{"class": "dog"}]), "class and count"),
    (dict(tag="colours"), "a tag out of single_object, .*got 'colours'"),
    (dict(exclude=[{"class": "dog", "count": 0}]), "a count from 1 to 16, got 0"),
    (dict(include=[{"class": "dog", "count": 1, "color": "gray"}]), "a color out of red"),
    (dict(include=[{"class": "dog", "count": 1, "position": ["above", 0]}]), "a position .*earlier entry")])
def test_a_broken_metadata_line_is_named(tmp_path, change, words):
    line = change if isinstance(change, str) else json.dumps({**PROMPTS[0], **change})
    (tmp_path / "meta.jsonl").write_text(f"{json.dumps(PROMPTS[1])}\n{line}\n")
    with pytest.raises(UserError, match=f"meta.jsonl, line 2 is no prompt of GenEval: .*{words}"):
        geneval.read_metadata(str(tmp_path / "meta.jsonl"))


def test_unreadable_geneval_files_are_answered_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.jsonl .*evaluation_metadata.jsonl"):
        geneval.read_metadata(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="cannot read .*none .*<index>/metadata.jsonl"):
        list(geneval.read_geneval(str(tmp_path / "none")))
    geneval.write_geneval(str(tmp_path / "g"), PROMPTS[:1], [torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)])
    picture = tmp_path / "g/00000/samples/00000.png"
    whole = picture.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:50] + b"?" * 20 + whole[70:]):
        picture.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot read .*00000.png"):
            list(geneval.read_geneval(str(tmp_path / "g")))


# ======================================================================================== COCO-30k and HPS v2
@pytest.mark.parametrize("excess, start", [(0, 0), (1, 0), (2, 1), (3, 2), (5, 2), (7, 4)])   # 0.5 0, 1.5 2
def test_the_crop_of_an_odd_excess_starts_at_the_even_half(excess, start):
    pixels = np.random.RandomState(3).randint(0, 256, (16, 16 + excess, 3), dtype=np.uint8)
    for p in (pixels, pixels.transpose(1, 0, 2)):
        crop = p[:, start:start + 16] if p.shape[0] == 16 else p[start:start + 16]
        assert np.array_equal(inception.coco_crop(Image.fromarray(p), 16), crop)    # LANCZOS to the same size copies


def test_golden_coco_crop():
    pixels = np.random.RandomState(80).randint(0, 256, (37, 50, 3)).astype(np.uint8).repeat(2, 0).repeat(2, 1)
    out = inception.coco_crop(Image.fromarray(pixels), 32)
    assert out.dtype == np.uint8
    agrees(torch.from_numpy(out), [174, 95, 74, 136, 163, 60, 194, 195, 215, 183, 157, 59, 192, 78, 73, 115], 392894)
    gray = inception.coco_crop(Image.fromarray(pixels[:, :, 0]))                                       # COCO has some
    assert gray.shape == (256, 256, 3) and (gray == gray[:, :, :1]).all()


def test_golden_clip_score_tokens():
    long = " ".join(["a very long caption about a dog and a cat playing in the snow"] * 6)
    ids = clip_score.clip_score_tokens(["A man riding a wave on top of a surfboard.", long])
    short = [320, 786, 6765, 320, 4535, 525, 1253, 539, 320, 10176, 1972, 269]
    assert ids.shape == (2, 77) and ids[0].tolist() == [49406, 320, 1125, 29340, *short, 49407, *[0] * 60]
    once = [320, 1070, 1538, 11327, 781, 320, 1929, 537, 320, 2368, 1629, 530, 518, 2583]
    assert ids[1].tolist() == [49406, 320, 1125, 29340, *(once * 6)[:72], 49407]


def test_the_prefix_pushes_a_long_captions_end_out_and_another_takes_its_place():
    for words in (71, 72, 73, 75, 200):                          # 72 and the prefix fill all 77
        ids = clip_score.clip_score_tokens(["dog " * words])[0].tolist()
        assert [x for x in ids if x] == [49406, 320, 1125, 29340, *[1929] * min(words, 72), 49407]
    ids = clip_score.clip_score_tokens(["dog " * 71 + "1 !-- a dog"])[0].tolist()            # "!--" is 0, 2432
    assert ids[75:] == [272, 0] and 49407 not in ids             # a zero in the last place passes for padding


def test_hps_averages_blocks_of_eighty():
    # Block b of style s: 10 s + b, half of it 5 more and half 5 less. Of means 0 to 9 the variance is 99 / 12.
    score = lambda s, i: 10 * s + i // 80 + (5 if i % 80 < 40 else -5)
    scores = {style: [score(s, i) for i in range(800)] for s, style in enumerate(hps.HPS_STYLES)}
    table = hps.hps_benchmark(scores)
    assert table == {"anime": (4.5, 2.8723), "concept-art": (14.5, 2.8723), "paintings": (24.5, 2.8723),
                     "photo": (34.5, 2.8723), "averaged": 19.5}
    assert hps.hps_benchmark({"photo": torch.full((800,), 27.126)}) == {"photo": (27.13, 0.0), "averaged": None}
    with pytest.raises(UserError, match="anime: expected 800 scores, one a prompt, got 799"):
        hps.hps_benchmark({"anime": [1.0] * 799})


def test_hps_images_lie_where_its_package_looks_as_jpegs_of_quality_75(tmp_path):
    img = torch.from_numpy(np.random.RandomState(5).randint(0, 256, (3, 3, 16, 16), dtype=np.uint8))
    hps.write_hps(str(tmp_path), "concept-art", (part for part in img))
    assert sorted(os.listdir(tmp_path / "concept-art")) == ["00000.jpg", "00001.jpg", "00002.jpg"]
    Image.fromarray(img[1].permute(1, 2, 0).numpy()).save(tmp_path / "default.jpg")        # PIL's default is 75
    assert (tmp_path / "default.jpg").read_bytes() == (tmp_path / "concept-art/00001.jpg").read_bytes()
    with pytest.raises(ValueError, match="unknown style 'anime2'"):
        hps.write_hps(str(tmp_path), "anime2", img)


# ============================================================================ clean-fid's resize, open_clip's transform
def test_golden_clean_resize():
    pixels = np.random.RandomState(70).randint(0, 256, (2, 3, 5, 7)).astype(np.uint8).repeat(8, 2).repeat(8, 3)[0]
    out = inception.clean_resize(pixels.transpose(1, 2, 0))
    assert out.shape == (299, 299, 3) and out.dtype == np.float32 and out.min() >= 0 and out.max() <= 255
    agrees(torch.from_numpy(out), [78, 10, 159] * 5 + [78], 31562269.13)
    agrees(torch.from_numpy(out[150, ::19, 0].copy()), [200, 200, 198.246521, 224, 224, 23, 23, 53.80029678, 52, 164.2348328,
                                                        225, 235.0661316, 84, 84, 114, 114])


def test_golden_transform_of_open_clip():
    pixels = (uniform(300, 2, 3, 80, 72).float()[0] * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    out = clip_net.preprocess_pil(Image.fromarray(pixels), 56)
    agrees(out, [0.44129676, -1.2667192, -1.0039475, -0.46380571, 1.1566195, 1.4339896], 5522.1797)
    wide = np.random.RandomState(0).randint(0, 256, (16, 19, 3)).astype(np.uint8)             # an excess of 3: starts at 2
    agrees(clip_net.preprocess_pil(Image.fromarray(wide), 16).flatten(),
           clip_net.normalize(torch.from_numpy(wide[:, 2:18]).permute(2, 0, 1) / 255).flatten().tolist())


@pytest.mark.parametrize("config, count", [(clip_net.CLIP_G, 1_366_678_273), (clip_net.CLIP_L, 427_616_513)])
def test_the_clips_that_measure_have_their_published_size(config, count):
    one = {k: dict(v, layers=1) if isinstance(v, dict) else v for k, v in config.items()}
    with torch.device("meta"):
        model = clip_net.ClipReward(one)
    size = lambda m: sum(p.numel() for p in m.parameters())
    towers = ((model.clip.visual.transformer, "vision_cfg"), (model.clip.transformer, "text_cfg"))
    assert size(model) + sum((config[cfg]["layers"] - 1) * size(t.resblocks[0]) for t, cfg in towers) == count
    assert model.clip.visual.transformer.resblocks[0].mlp.c_fc.out_features == {1024: 6144, 768: 4096}[config["embed_dim"]]
    gelu = type(model.clip.transformer.resblocks[0].mlp.gelu).__name__
    assert gelu == ("QuickGELU" if config is clip_net.CLIP_L else "GELU")                      # OpenAI's alone is quick


# ================================================================================================ GenEval's detector
def test_instances_are_pairs_of_query_and_class_with_masks_in_the_images_pixels():
    DOG, CAT, Q = mask2former.CLASSES.index("dog"), mask2former.CLASSES.index("cat"), 3
    z_class = torch.full((Q, 81), -9.0)
    z_class[0, DOG], z_class[0, CAT], z_class[0, 80] = 2.0, 1.0, 3.0                          # both, and "nothing" most
    z_class[1, CAT], z_class[2, DOG] = 4.0, 4.0
    z_mask = torch.full((Q, 2, 2), -5.0)
    z_mask[0] = torch.tensor([[-1.0, 3.0], [-1.0, 3.0]])
    z_mask[1] = 2.0                                               # all of it; query 2 has an empty mask
    found = mask2former.instances(z_class, z_mask, (8, 8), (8, 8), (8, 8), best=4)
    assert sorted((name, len(boxes)) for name, boxes in found.items()) == [("cat", 2), ("dog", 2)]
    p = z_class.softmax(-1)
    columns = torch.tensor([0.5, 1.5, 2.5, 3.0, 3.0])             # half-pixel bilinear: -1 -1 -.5 .5 1.5 2.5 3 3
    right = columns.sigmoid().mean().item()
    for name, c in (("dog", DOG), ("cat", CAT)):                  # one query, two classes, one mask
        (box, score), = [(b, s) for b, s in found[name] if b == (3, 0, 8, 8)]
        assert score == pytest.approx(p[0, c].item() * right, abs=1e-5)
        assert box.mask.shape == (8, 8) and box.mask[:, 3:].all() and not box.mask[:, :3].any()
    assert ((0, 0, 8, 8), pytest.approx(p[1, CAT].item() * torch.tensor(2.0).sigmoid().item(), abs=1e-5)) in found["cat"]
    assert ((0, 0, 0, 0), 0.0) in found["dog"]
    assert not geneval.relations(mask2former.Box((3, 0, 8, 8)), (0, 0, 8, 8))
    assert geneval.kept(found["cat"], "colors")[0] == (0, 0, 8, 8)
    z_class[0, 80], z_class[0, DOG] = -9.0, 30.0
    half = mask2former.instances(z_class, z_mask, (8, 16), (8, 8), (40, 20), best=1)        # the right half was padding
    (name, ((box, _),)), = half.items()                           # the ramp is 0 at column 6 of 8, so at 15 of 20
    assert name == "dog" and box == (15, 0, 20, 40)


class SeesRed(nn.Module):
    """A network of a Mask2Former's interface: one query for what is red, as a laptop."""

    def forward(self, pixel_values):
        self.seen = pixel_values
        red = (pixel_values[:, :1] - pixel_values[:, 1:2])[:, :, ::4, ::4] - 2
        z = torch.full((1, 1, 81), -9.0)
        z[..., mask2former.CLASSES.index("laptop")] = 9.0
        return type("Output", (), dict(class_queries_logits=z, masks_queries_logits=30 * red))


@pytest.mark.parametrize("size, scaled, padded", [((40, 30), (1067, 800), (1088, 800)), ((100, 10), (1333, 133), (1344, 160)),
                                                  ((1000, 1100), (800, 880), (800, 896))])
def test_the_detector_scales_normalizes_pads_and_its_boxes_return_to_the_image(size, scaled, padded):
    net, (W, H) = SeesRed(), size
    image = Image.new("RGB", size, (10, 60, 200))
    box = (W // 5, H // 5, W // 2, H // 2)
    image.paste((255, 0, 0), box)
    (found, score), = mask2former.mask2former(net)(image)["laptop"]
    assert net.seen.shape == (1, 3, padded[1], padded[0])
    corner = net.seen[0, :, 0, 0].tolist()
    assert corner == pytest.approx([(10 - 123.675) / 58.395, (60 - 116.28) / 57.12, (200 - 103.53) / 57.375], abs=1e-4)
    assert (net.seen[:, :, scaled[1]:] == 0).all() and (net.seen[:, :, :, scaled[0]:] == 0).all()
    assert net.seen[0, 2, scaled[1] - 1, scaled[0] - 1] == pytest.approx(corner[2], abs=1e-4)  # no further than the image
    assert np.abs(np.array(found) - box).max() <= 1 and score > 0.9 and found.mask.shape == (H, W)


def test_transformers_mask2former_is_loaded_strictly_and_detects(tmp_path):
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file
    net, path = mask2former.load_mask2former(random_weights=True), str(tmp_path / "net")
    net.save_pretrained(path)
    again = mask2former.load_mask2former(path)
    assert machinery_files.fingerprint(net) == machinery_files.fingerprint(again) and not again.training
    image = Image.fromarray(np.random.RandomState(1).randint(0, 256, (6, 60, 3)).astype(np.uint8))
    a, b = mask2former.mask2former(net)(image), mask2former.mask2former(again)(image)
    assert a == b and sum(map(len, a.values())) == 100 and set(a) <= set(mask2former.CLASSES)
    state = load_file(path + "/model.safetensors")
    name = sorted(state)[5]
    del state[name]
    save_file(state, path + "/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks {name}"):
        mask2former.load_mask2former(path)
    (tmp_path / "net" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot load the detector .*--detector_weights"):
        mask2former.load_mask2former(path)
    with pytest.raises(UserError, match="no such folder; expected a folder with config.json"):
        mask2former.load_mask2former(path + "/none")


def test_without_transformers_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        mask2former.load_mask2former()


def tiny_clip():
    model = reward.load_model("clip_l", lambda: clip_net.ClipReward(benchmarks.TINY_CLIP, "clip_l"), random_weights=True)
    return model.eval().requires_grad_(False)


def test_a_colors_vector_is_the_direction_of_the_mean_of_three_templates():
    model = tiny_clip()
    vectors = geneval.color_vectors(model, "dog")
    for i, c in ((0, "red"), (9, "white")):
        g = model.clip.encode_text(model.tokenize([f"a photo of a {c} dog", f"a photo of a {c}-colored dog",
                                                   f"a photo of a {c} object"]))
        mean = sum(v / v.norm() for v in g) / 3
        assert torch.allclose(vectors[i], mean / mean.norm(), atol=1e-6)
    assert vectors.shape == (10, 16) and not torch.allclose(vectors, geneval.color_vectors(model, "cat"), atol=1e-3)


def test_the_judge_of_colors_sees_the_object_on_grey_cut_to_its_box():
    model, rng, names = tiny_clip(), np.random.RandomState(3), set()
    color_of = geneval.color_judge(model)
    for i in range(12):
        pixels = (rng.rand(3) * 256 + 40 * rng.randn(30, 40, 3)).clip(0, 255).astype(np.uint8)
        box = mask2former.Box((5, 4, 25, 24))
        box.mask = torch.zeros(30, 40, dtype=torch.bool)
        box.mask[4:24, 5:18 + i % 3] = True
        seen = pixels.copy()
        seen[~box.mask.numpy()] = 0x99
        crop = Image.fromarray(seen[4:24, 5:25]).resize((32, 32), Image.Resampling.BICUBIC)
        f = model.clip.encode_image(clip_net.normalize(torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None] / 255))[0]
        expected = geneval.COLORS[int((geneval.color_vectors(model, "dog") @ f).argmax())]
        names.add(expected)
        assert color_of(Image.fromarray(pixels), box, "dog") == expected
        outside = np.where(box.mask.numpy()[..., None], pixels, 255 - pixels)
        assert color_of(Image.fromarray(outside), box, "dog") == expected
    assert len(names) > 1
    assert color_of(Image.fromarray(pixels), (5, 4, 25, 24), "dog") in geneval.COLORS    # a box without mask
# ===================================================================================================== the benchmarks
LINES = [{"tag": "colors", "include": [{"class": "ring", "count": 1, "color": "red"}], "prompt": "a red ring"},
         {"tag": "single_object", "include": [{"class": "square", "count": 1}], "prompt": "a square"}]


def test_geneval_is_drawn_in_its_layout_and_scored_alike_in_passing_and_from_the_folder(tmp_path, capsys):
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    flags = ["--benchmark", "geneval", "--metadata", tmp_path / "meta.jsonl", "--teacher", "meissonic-tiny", "--steps", 1]
    row, = command(tmp_path, *flags, "--detector", "shapes", "--batch", 3)
    back = list(geneval.read_geneval(row["folder"]))
    assert [line for line, _ in back] == LINES and [len(images) for _, images in back] == [4, 4]
    assert row["n"] == 8 and row["per_prompt"] == 4 and row["geneval"] is None and "not comparable" in row["note"]
    again = command(tmp_path, "--geneval_folder", row["folder"], "--detector", "shapes")[1]
    assert all(again[k] == row[k] for k in ("n", "colors", "single_object", "detector")) and again["kind"] == "folder"
    assert "not comparable with published GenEval" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot make the folder .*a new one"):
        command(tmp_path, *flags)
    row = command(tmp_path, *flags[:-1], 2, "--per_prompt", 1)[-1]                            # without detector
    assert [len(images) for _, images in geneval.read_geneval(row["folder"])] == [1, 1] and "colors" not in row


def test_a_batch_of_geneval_is_judged_by_its_own_prompt(tmp_path):
    """Drawn scenes in place of a model: the first prompt is fulfilled by two of its images, the second by one."""
    from worlds.shapes import render
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    args = evaluate.flags().parse_args(["--benchmark", "geneval", "--metadata", f"{tmp_path}/meta.jsonl", "--detector", "shapes",
                                  "--per_prompt", "3", "--teacher", "meissonic-tiny"])
    bench = benchmarks.load_benchmarks(args, "cpu", judges.load_detector)["geneval"]
    drawn = [("ring", "red"), ("ring", "blue"), ("ring", "red"), ("ring", "red"), ("square", "red"), ("cross", "red")]
    pictures = [Image.fromarray(render(np.random.default_rng(i), [shape])) for i, shape in enumerate(drawn)]
    bench.lay(f"{tmp_path}/g")
    scores = bench.score(f"{tmp_path}/g", slice(0, 4), pictures[:4]) + bench.score(f"{tmp_path}/g", slice(4, 8), pictures[4:])
    assert scores == [1, 0, 1, 0, 1, 0]
    row = bench.row(torch.tensor(scores))
    assert row["colors"] == pytest.approx(2 / 3) and row["single_object"] == pytest.approx(1 / 3)
    assert [np.array(p).tolist() for _, part in geneval.read_geneval(f"{tmp_path}/g") for p in part] == \
        [np.array(p).tolist() for p in pictures]


def test_hps_is_scored_from_the_jpegs_as_written(tmp_path):
    for s in hps.HPS_STYLES:
        (tmp_path / f"{s}.json").write_text(json.dumps([f"{s} number {i}" for i in range(800)]))
    args = evaluate.flags().parse_args(["--benchmark", "hps", "--metadata", str(tmp_path), "--random_weights",
                                  "--teacher", "maskgen-tiny"])
    bench = benchmarks.load_benchmarks(args, "cpu", judges.load_detector)["hps"]
    assert len(bench.prompts) == 3200 and bench.prompts[799:801] == ["anime number 799", "concept-art number 0"]
    pixels = np.random.RandomState(0).randint(0, 256, (2, 40, 40, 3)).astype(np.uint8)
    bench.lay(f"{tmp_path}/h")
    scores = bench.score(f"{tmp_path}/h", slice(799, 801), [Image.fromarray(p) for p in pixels])
    model, _ = benchmarks.load_clip(args, "hps", clip_net.CLIP_H, "cpu")
    for score, path, prompt in zip(scores, ("anime/00799.jpg", "concept-art/00000.jpg"), bench.prompts[799:801]):
        img = torch.from_numpy(np.array(Image.open(f"{tmp_path}/h/{path}"))).permute(2, 0, 1)[None] / 255
        f = model.clip.encode_image(clip_net.preprocess_longest(img, 32))[0]
        g = model.clip.encode_text(model.tokenize([prompt]))[0]
        assert score.item() == pytest.approx(100 * F.cosine_similarity(f, g, dim=0).item(), abs=1e-3)
    row = bench.row(torch.cat([torch.full((800,), 20.0 + i) for i in range(4)]).double())
    assert (row["hps"], row["anime"], row["photo"], row["hps_version"]) == (21.5, 20, 23, "v2.1")
    assert "v2.1" in row["note"] and "random weights" in row["note"] and row["hps_weights"] == "random"


def test_clip_score_is_the_mean_cosine_of_image_i_and_line_i_on_crops(tmp_path, capsys):
    captions = ["a red ring", "two blue crosses", "a green square above a ring"]
    (tmp_path / "captions.txt").write_text("\n".join(captions) + "\n\n")
    flags = ["--benchmark", "clip", "--metadata", tmp_path / "captions.txt", "--teacher", "maskgen-tiny", "--steps", 1]
    row, = command(tmp_path, *flags, "--batch", 2, "--save_images")
    args = evaluate.flags().parse_args(["--random_weights"])
    model, cosines = benchmarks.load_clip(args, "clip_g", clip_net.CLIP_G, "cpu")[0], []
    for i, words in enumerate(captions):
        crop = Image.open(f"{row['folder']}/{i:05d}.png")
        assert crop.size == (256, 256)
        f = model.clip.encode_image(clip_net.preprocess_pil(crop, 32)[None])[0]
        g = model.clip.encode_text(clip_score.clip_score_tokens([words]))[0]
        cosines.append(F.cosine_similarity(f, g, dim=0).item())
    assert len(os.listdir(row["folder"])) == 3 and np.ptp(cosines) > 1e-3
    assert row["clip_score"] == pytest.approx(np.mean(cosines), abs=1e-6) and abs(row["clip_score"]) < 1
    assert row["clip_g_weights"] == "random" and "random weights" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    ("--benchmark geneval", "needs --metadata PATH: GenEval's evaluation_metadata.jsonl"),
    ("--benchmark hps --metadata {0}/none", "cannot read .*none/anime.json .*HPDv2's folder `benchmark`, with anime.json"),
    ("--benchmark hps --metadata {0}/short", "short/anime.json: expected a list of 800 strings, got 2 entries"),
    ("--benchmark clip --metadata {0}/gap.txt", "gap.txt: a line amid it is empty; expected a caption on each"),
    ("--benchmark clip --metadata {0}/empty.txt", "--metadata .*empty.txt: no prompt in it"),
    ("--benchmark clip --metadata {0}/ok.txt --teacher maskbit-tiny", "draws prompts, and maskbit-tiny draws classes"),
    ("--benchmark clip --metadata {0}/ok.txt --clip_g_weights {0}/none.pt", "no weights at .*none.pt"),
    ("--benchmark geneval --metadata {0}/ok.txt", "line 1 is no prompt of GenEval"),
    ("--benchmark geneval --metadata {0}/dog.jsonl --detector shapes", "does not know the class 'dog' of 'a dog'; it knows circle"),
    ("--detector shapes", "--detector shapes belongs to --benchmark geneval"),
    ("--benchmark clip --metadata {0}/ok.txt --detector shapes", "--detector shapes belongs to --benchmark geneval"),
    ("--geneval_folder {0}", "is scored here: add --detector mask2former, or shapes"),
    ("--geneval_folder {0}/bare --detector shapes", "bare: no images; expected <index>/samples/<n>.png")])
def test_what_a_benchmark_cannot_read_is_answered_with_a_sentence_before_anything_is_drawn(tmp_path, flags, words):
    for name, text in (("gap.txt", "a\n\nb\n"), ("empty.txt", "\n"), ("ok.txt", "a ring\n"), ("dog.jsonl", json.dumps(
            {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}))):
        (tmp_path / name).write_text(text)
    (tmp_path / "bare").mkdir(), (tmp_path / "short").mkdir()
    (tmp_path / "short" / "anime.json").write_text('["a", "b"]')
    flags = flags.format(tmp_path).split()
    with pytest.raises(UserError, match=words):
        command(tmp_path, *flags, *([] if "--teacher" in flags else ["--teacher", "maskgen-tiny"]))
    assert os.listdir(tmp_path / "out") == []
