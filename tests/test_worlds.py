"""worlds: tests."""

import json
import math

import numpy as np
import pytest
import torch

import soft_embed as se
import reward
import teachers
from metrics import geneval
from networks import blip
from networks import clip as clip_net
from worlds import make_shapes, shapes
from machinery.files import ROOT
from teachers import load_teacher
from tests.common import close


# ================================================================================================ data/shapes.py
def test_the_reader_is_right_on_99_of_100_fresh_renderings_of_every_task():
    assert all(share >= 0.99 for share in shapes.accuracy(n=900, seed=11).values())


def test_the_reader_sees_shape_color_and_place_of_what_was_drawn():
    for i, shape in enumerate(shapes.SHAPES):
        for color in shapes.COLORS:
            img = shapes.render(np.random.default_rng([3, i]), [(shape, color)])
            (found,) = shapes.read(img.transpose(2, 0, 1))
            assert found[:2] == (shape, color)
    for k, relation in enumerate(shapes.RELATIONS):
        img = shapes.render(np.random.default_rng([4, k]), [("circle", "red"), ("ring", "blue")], relation)
        boxes = {shape: box for shape, _, box in shapes.read(img.transpose(2, 0, 1))}
        assert relation in geneval.relations(boxes["ring"], boxes["circle"])


def test_the_reader_finds_nothing_on_empty_grounds_and_no_shape_in_blobs():
    ground = shapes.render(np.random.default_rng(0), [])
    assert shapes.read(ground.transpose(2, 0, 1)) == []
    bar = np.full((3, 32, 32), 128, np.uint8)
    bar[:, 4:8, 2:28] = np.array([255, 0, 0])[:, None, None]
    assert [found[:2] for found in shapes.read(bar)] == [(None, "red")]


def test_scenes_depend_on_seed_and_place_alone_and_vary():
    a, prompts, metas = shapes.scenes(40, seed=3)
    b = shapes.scenes(20, seed=3)
    assert np.array_equal(a[:20], b[0]) and prompts[:20] == b[1] and not np.array_equal(a[:20], shapes.scenes(20, seed=4)[0])
    same = [shapes.render(np.random.default_rng(i), [("circle", "red")]) for i in range(6)]
    assert len({shapes.read(img.transpose(2, 0, 1))[0][2] for img in same}) >= 5            # place and size
    assert len({int(img[0, 0].mean()) for img in same}) >= 4                                # ground
    assert len({shapes.scenes(1, seed=s)[0].tobytes() for s in range(40)}) == 40
    assert all(meta["prompt"] == prompt for meta, prompt in zip(metas, prompts))


@pytest.mark.parametrize("task", geneval.TASKS)
def test_captions_and_metadata_have_genevals_form(task):
    for i in range(30):
        prompt, meta, objects, relation = shapes.caption(np.random.default_rng(i), task)
        assert geneval.parse_metadata(json.dumps(meta), "here") == meta and meta["tag"] == task
        assert sum(clause["count"] for clause in meta["include"]) == len(objects)
        assert all(shape in prompt and (color or "") in prompt for shape, color in objects)
        assert ("exclude" in meta) == (task == "counting") and (relation is not None) == (task == "position")
        if relation:                                              # "A left of B": A is placed, B the target
            assert prompt.index(objects[1][0]) < prompt.index(relation) and meta["include"][1]["class"] == objects[1][0]


def test_a_picture_of_something_else_is_wrong_under_genevals_rules():
    rng = np.random.default_rng(0)
    _, meta, _, _ = shapes.caption(rng, "counting")
    shape, n = meta["include"][0]["class"], meta["include"][0]["count"]
    see = lambda objects: geneval.verdict(meta, *shapes.detect(shapes.render(rng, objects).transpose(2, 0, 1)))
    assert see([(shape, "red")] * n)[0]
    other = next(s for s in shapes.SHAPES if s != shape)
    assert "found" in see([(shape, "red")] * (n - 1))[1] and not see([(other, "red")] * n)[0]


def test_a_caption_gone_astray_is_one_of_the_worlds_and_no_picture_of_the_right_one_fulfils_it():
    drawn = [shapes.caption(np.random.default_rng([1, i]), str(np.random.default_rng(i).choice(shapes.MIXED))) for i in range(9000)]
    metas, rng, seen = {prompt: meta for prompt, meta, *_ in drawn}, np.random.default_rng(2), set()
    for prompt, meta, objects, relation in drawn[:500]:
        wrong = shapes.astray(rng, prompt)
        found = shapes.detect(shapes.render(rng, objects, relation).transpose(2, 0, 1))
        if wrong in metas:                                        # else a mixture that was not drawn: there are 7,000
            assert geneval.verdict(meta, *found)[0] and not geneval.verdict(metas[wrong], *found)[0], (prompt, wrong)
            seen.add(meta["tag"])
        else:
            assert meta["tag"] == "mixture" or "and" in wrong and len(wrong.split()) == 7, wrong
        assert set(wrong.split()) <= set(shapes.WORDS) and " a orange" not in f" {wrong}"
    assert seen == set(shapes.MIXED)


def test_a_spoiled_picture_has_patches_of_another_and_half_of_the_pictures_blends_of_both():
    torch.manual_seed(0)
    x = torch.arange(64 * 200).view(200, 64).float()              # every patch of every picture says where it is from
    out = make_shapes.spoiled(torch.stack([x, torch.zeros_like(x)], -1))
    changed = out[..., 0] != x
    share = changed.float().mean(1)
    assert (share == 0).float().mean() < 0.05 and share.max() < 0.7 and 0.08 < share.mean() < 0.25 and (out[..., 1] == 0).all()
    hard = ((out[..., 0] == out[..., 0].round()) | ~changed).all(1)
    assert 0.35 < hard.float().mean() < 0.65
    donor, own = (out[..., 0][hard] / 64).floor(), torch.arange(200)[hard, None]
    assert torch.equal(donor, torch.where(changed[hard], (own - 1) % 200, own).float())


@pytest.mark.parametrize("touching", [False, True])
def test_objects_are_a_unit_apart_or_touch(touching):
    def gap(a, b):                                    # of two boxes, pixels; negative where they overlap
        return max(max(a[i] - b[i] - b[2], b[i] - a[i] - a[2]) for i in (0, 1))
    for i in range(60):
        n, relation = 2 + i % 3, "above" if i % 3 == 0 else None
        boxes = shapes.place(np.random.default_rng(i), n, relation, touching)
        nearest = [min(gap(b, a) for a in boxes[:k]) for k, b in enumerate(boxes) if k]
        assert len(boxes) == n and (set(nearest) == {0} if touching else min(nearest) >= shapes.UNIT)
        if relation:
            assert boxes[1][1] + boxes[1][2] <= boxes[0][1]


def test_other_pictures_of_a_caption_fit_it_too_unless_objects_touch():
    img, prompts, metas = shapes.scenes(120, seed=31)
    touching, same, _ = shapes.scenes(120, seed=31, touching=True)
    twin, again, _ = shapes.scenes(120, seed=31, again=1)
    several = (img != touching).any((1, 2, 3))
    assert prompts == same and all(s == (m["tag"] not in ("single_object", "colors")) for s, m in zip(several, metas))
    right = lambda img: np.array([geneval.verdict(m, *shapes.detect(i))[0] for m, i in zip(metas, img)])
    assert right(img).all() and right(touching)[several].mean() < 0.5
    assert again == prompts and right(twin).all() and (img != twin).any((1, 2, 3)).all()        # the same, drawn anew


def test_the_grid_code_tells_columns_in_its_first_half_and_rows_in_the_second_by_their_distance():
    code = make_shapes.grid_code(8, 64).view(8, 8, 2, 32)              # (row, column, column's or row's, 32)
    assert torch.equal(code[0, :, 0], code[5, :, 0]) and torch.equal(code[:, 0, 1], code[:, 5, 1])
    turn = 2 * math.pi / 8 * 2 ** torch.linspace(-3, 1, 16)       # an eighth of a turn over the picture to two
    far = (torch.arange(8)[:, None] - torch.arange(8)).float()
    expected = 0.25 * (far[..., None] * turn).cos().sum(-1)
    assert close(code[0, :, 0] @ code[0, :, 0].T, expected) and close(code[:, 0, 1] @ code[:, 0, 1].T, expected)


def test_alike_is_the_share_of_equal_tokens_over_all_pairs_of_pictures_of_a_prompt():
    got = make_shapes.alike("assets/shapes/theta0.safetensors", n=2, times=3, seed=4)
    teacher, net, _ = teachers.load_student("assets/shapes/theta0.safetensors", "meissonic-tiny")
    torch.manual_seed(4)
    rows = teacher.conditions([p for p in shapes.benchmark(2, 4)[0] for _ in range(3)])
    x = teacher.tokenizer.encode(teachers.generate_student(teacher, net, rows, **teacher.spec.student).float() / 255)
    pairs = [(a, b) for first in (0, 3) for a in range(first, first + 3) for b in range(first, a)]
    assert 0 < got < 1 and abs(got - sum((x[a] == x[b]).double().mean().item() for a, b in pairs) / len(pairs)) < 1e-6


def test_a_judge_of_two_captions_and_of_two_pictures_learns_by_imagerewards_loss():
    torch.manual_seed(0)
    model = blip.ImageReward(wordpiece=blip.WordPiece(f"{ROOT}/assets/shapes/words.txt"), **teachers.SHAPES_REWARD)
    good, worse = (torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8) for _ in range(2))
    ids, *wrong = (model.tokenize(p) for p in (["a ring", "two rings", "a red cross"], ["a circle", "four rings", "a blue cross"],
                                               ["a cross", "two squares", "a red ring"]))
    wrong = torch.stack(wrong)                                    # (2, 3, S)
    assert 1 not in ids                                           # [UNK]
    loss, log = make_shapes.judge_loss(model, good, worse, ids, wrong)
    raw = lambda img, ids: model(clip_net.preprocess(img.float() / 255, 32), ids) * model.STD + model.MEAN
    r, w, s = raw(good, ids), torch.stack([raw(good, ids) for ids in wrong]), raw(worse, ids)
    ranks = -(r - w).sigmoid().log().mean() - (r - s).sigmoid().log().mean()
    assert close(loss, ranks + 1e-3 * (r.square().mean() + w.square().mean() + s.square().mean()))
    assert close(log["caption"], (r > w).float().mean()) and close(log["picture"], (r > s).float().mean())


def test_the_shipped_imagereward_prefers_the_right_caption_and_the_sound_picture():
    torch.manual_seed(0)
    right = make_shapes.reward_accuracy(400, seed=21)["imagereward"]
    assert min(right["color"], right["shape"], right["number"]) > 0.9 and min(right["order"], right["place"]) > 0.75
    assert right["touching"] > 0.6 and 0.3 < right["taste"] < 0.7   # of touching pictures a third have a gap all the same
    img, prompts, _ = shapes.scenes(200, seed=21)
    teacher = load_teacher("meissonic-tiny")
    score = lambda img, prompts: reward.rewards_for(teacher.spec, {"imagereward": 1.0})(img, prompts)["imagereward"]
    e = se.embed_tokens(teacher.tokenizer.encode(torch.from_numpy(img).float() / 255), *teacher.tokenizer.tables())
    sound, broken = (teacher.tokenizer.decode(h) for h in (e, make_shapes.spoiled(e)))
    assert (score(sound, prompts) > score(broken, prompts)).float().mean() > 0.85
