"""The shapes world: captions, pictures, the reader that scores them, and how its networks learn."""

import json
import math
import time
import types

import numpy as np
import pytest
import torch

import reward
import soft_embed
import teachers
from machinery.files import ROOT
from metrics import geneval
from networks import blip, clip
from networks.weights import read_weights
from tests.common import close
from worlds import make_shapes, measure_shapes, shapes, training


THETA_0 = "assets/shapes/theta0.safetensors"


def drawn(seed, objects, relation=None):
    """A picture (3, 32, 32) of objects."""
    return shapes.render(np.random.default_rng(seed), objects, relation).transpose(2, 0, 1)


def is_right(metadata, img):
    """Does the reader find what GenEval's metadata ask for?"""
    return geneval.verdict(metadata, *shapes.detect(img))[0]


# =========================================================================== what is asked for
@pytest.mark.parametrize("task", geneval.TASKS)
def test_captions_and_metadata_have_genevals_form(task):
    for i in range(30):
        prompt, metadata, objects, relation = shapes.caption(np.random.default_rng(i), task)
        assert geneval.parse_metadata(json.dumps(metadata), "here") == metadata
        assert metadata["tag"] == task
        assert sum(clause["count"] for clause in metadata["include"]) == len(objects)
        assert all(shape in prompt and (color or "") in prompt for shape, color in objects)
        assert ("exclude" in metadata) == (task == "counting")
        assert (relation is not None) == (task == "position")
        if relation:                               # "A left of B": A is placed, B is the target
            target, placed = objects
            assert prompt.index(placed[0]) < prompt.index(relation)
            assert metadata["include"][1]["class"] == placed[0]


def test_a_caption_gone_astray_is_one_of_the_worlds_and_no_picture_of_the_right_one_fulfils_it():
    captions = []
    for i in range(9000):
        task = str(np.random.default_rng(i).choice(shapes.MIXED))
        captions.append(shapes.caption(np.random.default_rng([1, i]), task))
    known = {caption.prompt: caption.metadata for caption in captions}
    rng = np.random.default_rng(2)
    seen = set()
    for prompt, metadata, objects, relation in captions[:500]:
        wrong = shapes.astray(rng, prompt)
        img = shapes.render(rng, objects, relation).transpose(2, 0, 1)
        if wrong in known:
            assert is_right(metadata, img) and not is_right(known[wrong], img), (prompt, wrong)
            seen.add(metadata["tag"])
        else:                                      # a mixture that was not drawn: there are 7,000
            assert metadata["tag"] == "mixture" or ("and" in wrong and len(wrong.split()) == 7)
        assert set(wrong.split()) <= set(shapes.WORDS)
        assert " a orange" not in f" {wrong}"
    assert seen == set(shapes.MIXED)


# ================================================================================= what is drawn
def test_scenes_depend_on_seed_and_place_alone_and_vary():
    forty, twenty = shapes.scenes(40, seed=3), shapes.scenes(20, seed=3)
    assert torch.equal(forty.img[:20], twenty.img)
    assert forty.prompts[:20] == twenty.prompts
    assert not torch.equal(twenty.img, shapes.scenes(20, seed=4).img)
    assert [metadata["prompt"] for metadata in forty.metas] == forty.prompts
    assert len({shapes.scenes(1, seed=s).img.numpy().tobytes() for s in range(40)}) == 40

    same = [drawn(i, [("circle", "red")]) for i in range(6)]
    assert len({shapes.read(img)[0][2] for img in same}) >= 5                # place and size
    assert len({int(img[:, 0, 0].mean()) for img in same}) >= 4              # ground


@pytest.mark.parametrize("touching", [False, True])
def test_objects_are_a_cell_apart_or_touch(touching):
    def gap(a, b):                                 # of two boxes, in pixels; negative: they overlap
        return max(max(a[i] - b[i] - b[2], b[i] - a[i] - a[2]) for i in (0, 1))

    for i in range(60):
        n = 2 + i % 3
        relation = "above" if i % 3 == 0 else None
        boxes = shapes.place(np.random.default_rng(i), n, relation, touching)
        nearest = [min(gap(boxes[k], before) for before in boxes[:k]) for k in range(1, n)]
        assert len(boxes) == n
        assert set(nearest) == {0} if touching else min(nearest) >= shapes.CELL
        if relation:
            assert boxes[1][1] + boxes[1][2] <= boxes[0][1]


def test_other_pictures_of_a_caption_fit_it_too_unless_objects_touch():
    img, prompts, metas = shapes.scenes(120, seed=31)
    touching = shapes.scenes(120, seed=31, touching=True)
    twins = shapes.scenes(120, seed=31, again=1)
    assert prompts == touching.prompts == twins.prompts
    assert (img != twins.img).any((1, 2, 3)).all()                           # drawn anew
    several = (img != touching.img).any((1, 2, 3))
    assert several.tolist() == [m["tag"] not in ("single_object", "colors") for m in metas]

    def right(pictures):
        return np.array(list(map(is_right, metas, pictures)))

    assert right(img).all() and right(twins.img).all()
    assert right(touching.img)[several].mean() < 0.5


# ===================================================================================== the reader
def test_the_reader_is_right_on_99_of_100_fresh_renderings_of_every_task():
    table = measure_shapes.accuracy(n=900, seed=11)
    assert set(table) == {"geneval", *geneval.TASKS}
    assert all(share >= 0.99 for share in table.values())


def test_the_reader_sees_shape_color_and_place_of_what_was_drawn():
    for i, shape in enumerate(shapes.SHAPES):
        for color in shapes.COLORS:
            (found,) = shapes.read(drawn([3, i], [(shape, color)]))
            assert found[:2] == (shape, color)
    for k, relation in enumerate(shapes.RELATIONS):
        img = drawn([4, k], [("circle", "red"), ("ring", "blue")], relation)
        boxes = {shape: box for shape, _, box in shapes.read(img)}
        assert relation in geneval.relations(boxes["ring"], boxes["circle"])


def test_the_reader_finds_nothing_on_empty_grounds_and_no_shape_in_blobs():
    assert shapes.read(drawn(0, [])) == []
    bar = np.full((3, 32, 32), 128, np.uint8)
    bar[:, 4:8, 2:28] = np.array([255, 0, 0])[:, None, None]
    (found,) = shapes.read(bar)
    assert found[:2] == (None, "red")


def test_a_picture_of_something_else_is_wrong_under_genevals_rules():
    rng = np.random.default_rng(0)
    metadata = shapes.caption(rng, "counting").metadata
    shape, n = metadata["include"][0]["class"], metadata["include"][0]["count"]
    other = next(s for s in shapes.SHAPES if s != shape)

    def verdict(shape, n):
        img = shapes.render(rng, n * [(shape, "red")]).transpose(2, 0, 1)
        return geneval.verdict(metadata, *shapes.detect(img))

    assert verdict(shape, n)[0]
    assert "found" in verdict(shape, n - 1)[1]
    assert not verdict(other, n)[0]


# =================================================================== what the networks learn from
def test_a_spoiled_picture_has_patches_of_another_and_half_of_the_pictures_blends_of_both():
    torch.manual_seed(0)
    x = torch.arange(64 * 200).view(200, 64).float()       # each patch says where it is from
    out, zero = make_shapes.spoiled(torch.stack([x, torch.zeros_like(x)], -1)).unbind(-1)
    changed = out != x
    share = changed.float().mean(1)
    assert (zero == 0).all()
    assert (share == 0).float().mean() < 0.05 and share.max() < 0.7
    assert 0.08 < share.mean() < 0.25

    hard = ((out == out.round()) | ~changed).all(1)        # no blends
    assert 0.35 < hard.float().mean() < 0.65
    donor, own = (out[hard] / 64).floor(), torch.arange(200)[hard, None]
    assert torch.equal(donor, torch.where(changed[hard], (own - 1) % 200, own).float())


def test_the_grid_code_tells_columns_in_its_first_half_and_rows_in_the_second_by_their_distance():
    code = make_shapes.grid_code(8, 64).view(8, 8, 2, 32)    # (row, column, column's or row's, 32)
    of_columns, of_rows = code[:, :, 0], code[:, :, 1]
    assert torch.equal(of_columns[0], of_columns[5])
    assert torch.equal(of_rows[:, 0], of_rows[:, 5])
    turns = 2 ** torch.linspace(-3, 1, 16)         # over the picture: an eighth to two
    turn = 2 * math.pi / 8 * turns
    far = (torch.arange(8)[:, None] - torch.arange(8)).float()
    expected = 0.25 * (far[..., None] * turn).cos().sum(-1)
    assert close(of_columns[0] @ of_columns[0].T, expected)
    assert close(of_rows[:, 0] @ of_rows[:, 0].T, expected)


def test_a_judge_of_two_captions_and_of_two_pictures_learns_by_imagerewards_loss():
    torch.manual_seed(0)
    words = blip.WordPiece(f"{ROOT}/assets/shapes/words.txt")
    model = blip.ImageReward(wordpiece=words, **teachers.SHAPES_REWARD)
    good, worse = torch.randint(256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    ids = model.tokenize(["a ring", "two rings", "a red cross"])
    wrong = torch.stack([model.tokenize(["a circle", "four rings", "a blue cross"]),
                         model.tokenize(["a cross", "two squares", "a red ring"])])
    assert 1 not in ids                                            # [UNK]
    loss, log = make_shapes.imagereward_loss(model, good, worse, ids, wrong)

    def raw(img, ids):
        return model(clip.preprocess(img.float() / 255, 32), ids) * model.STD + model.MEAN

    r, r_worse = raw(good, ids), raw(worse, ids)
    r_wrong = torch.stack([raw(good, ids) for ids in wrong])
    ranks = -(r - r_wrong).sigmoid().log().mean() - (r - r_worse).sigmoid().log().mean()
    squares = r.square().mean() + r_wrong.square().mean() + r_worse.square().mean()
    assert close(loss, ranks + 1e-3 * squares)
    assert close(log["caption"], (r > r_wrong).float().mean())
    assert close(log["picture"], (r > r_worse).float().mean())


# =============================================================================== what was learned
def test_the_shipped_imagereward_prefers_the_right_caption_and_the_sound_picture():
    torch.manual_seed(0)
    right = measure_shapes.reward_accuracy(150, seed=21)["imagereward"]
    assert min(right["color"], right["shape"], right["number"]) > 0.9
    assert min(right["order"], right["place"]) > 0.75
    assert right["touching"] > 0.6        # a third of them are right all the same
    assert 0.3 < right["taste"] < 0.7

    img, prompts, _ = shapes.scenes(100, seed=21)
    tokenizer = teachers.load_teacher("meissonic-tiny").tokenizer
    judge = reward.rewards_for(make_shapes.SPEC, {"imagereward": 1.0})
    x = tokenizer.encode(img.float() / 255)
    e = soft_embed.embed_tokens(x, *tokenizer.tables())
    sound, broken = (judge(tokenizer.decode(picture), prompts)["imagereward"]
                     for picture in (e, make_shapes.spoiled(e)))
    assert (sound > broken).float().mean() > 0.85


def test_alike_is_the_share_of_equal_tokens_over_all_pairs_of_pictures_of_a_prompt():
    got = measure_shapes.alike(THETA_0, n=2, times=3, seed=4)
    teacher, net, _ = teachers.load_student(THETA_0, "meissonic-tiny")
    torch.manual_seed(4)
    prompts = [prompt for prompt in shapes.benchmark(2, 4)[0] for _ in range(3)]
    asked = teacher.conditions(prompts)
    img = teachers.generate_student(teacher, net, asked, **teacher.spec.student)
    x = teacher.tokenizer.encode(img.float() / 255)
    pairs = [(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)]
    shares = [(x[a] == x[b]).double().mean().item() for a, b in pairs]
    assert 0 < got < 1
    assert got == pytest.approx(np.mean(shares), abs=1e-6)


# ============================================================================ how they are trained
def test_fit_gives_the_average_of_the_weights_that_were_passed_through():
    model = torch.nn.Linear(1, 1, bias=False)
    passed = [model.weight.item()]

    def loss_fn():
        passed.append(model.weight.item())
        return model.weight.square().sum(), {}

    average = training.fit(model, loss_fn, types.SimpleNamespace(steps=20, lr=0.1, bf16=False))
    expected = passed[0]
    for n, weight in enumerate([*passed[2:], model.weight.item()]):
        expected += (1 - (1 + n) / (10 + n)) * (weight - expected)
    assert average.weight.item() == pytest.approx(expected, abs=1e-6)
    assert average.weight.item() != model.weight.item()


def test_shipped_weights_are_float16_and_a_record_beside_them_says_how_they_were_made(tmp_path, monkeypatch):
    model, path = torch.nn.Linear(3, 2), f"{tmp_path}/net.safetensors"
    weight = model.weight.detach().clone()
    args = types.SimpleNamespace(steps=7, seed=1)
    monkeypatch.setattr(training, "START", time.time() - 5)
    training.ship(model, path, args, psnr=30.0)
    assert torch.equal(model.weight, weight)       # the module itself stays as it was
    assert torch.equal(read_weights(path)["weight"], weight.half())
    record = json.loads((tmp_path / "net.json").read_text())
    assert 5 <= record.pop("seconds") < 300
    assert record == dict(steps=7, seed=1, parameters=8, psnr=30.0)
