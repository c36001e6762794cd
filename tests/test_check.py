"""data/check.py: are a teacher's files the right ones, and does it know real images?

    pytest tests/test_check.py
    FULL_SIZE=1 pytest tests/test_check.py       # MaskBit at its published size too: a minute, 4 GB
"""

import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import soft_embed as se
import teachers
from data import check, images
from machinery.errors import UserError
from machinery.files import ROOT
from networks import autoencoders, weights
from teachers import SPECS
from tests.common import agrees, generator_file, integers, seeded, tiny_teacher, tokenizer_file
from tests.common import uniform
from tests.runs import exit_code, start


def photo(path, seed):
    """A picture of noise in a new file; what a teacher of 32 px sees of it, (C, H, W)."""
    noise = np.random.RandomState(seed).randint(0, 256, (36, 40, 3), dtype=np.uint8)
    img = Image.fromarray(noise)
    img.save(path)
    return np.asarray(images.center_crop(img, 32)).transpose(2, 0, 1)


# ------------------------------------------------------------------------------------ real images
def test_real_images_come_with_the_label_of_their_folder(tmp_path):
    seen = []
    for label, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for i in range(3):
            seen.append(photo(tmp_path / name / f"{i}.png", 3 * label + i))
    spec = SPECS["maskgit-tiny"]
    img, labels = check.real_images(str(tmp_path), spec, 6)
    assert labels == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(img, np.stack(seen))
    img, labels = check.real_images(str(tmp_path), spec, 3)       # spread over the folder
    assert labels == [0, 0, 1]
    assert np.array_equal(img, np.stack(seen[::2]))


def test_real_images_come_with_the_prompt_beside_them(tmp_path):
    seen = [photo(tmp_path / f"{i}.png", i) for i in range(3)]
    for i in range(2):                                            # the third has no prompt
        (tmp_path / f"{i}.txt").write_text(f" prompt {i}\n")
    img, prompts = check.real_images(str(tmp_path), SPECS["maskgen-tiny"], 64)
    assert prompts == ["prompt 0", "prompt 1"]
    assert np.array_equal(img, np.stack(seen[:2]))


def test_folders_that_cannot_check_a_teacher_are_refused_with_a_sentence(tmp_path):
    def refused(folder, words):
        with pytest.raises(UserError, match=words):
            check.real_images(str(folder), SPECS["meissonic-tiny"], 4)

    photo(tmp_path / "0.png", 0)
    refused(tmp_path, "expected a folder of images, each with its prompt beside it")
    refused(tmp_path / "nowhere", "nowhere: expected a folder of images")
    (tmp_path / "0.txt").write_text("x")
    (tmp_path / "0.png").write_bytes(b"cut")
    refused(tmp_path, "cannot read 0.png: UnidentifiedImageError")


# --------------------------------------------------------------------------- what a teacher knows
class AllKnowing:
    """Net and tokenizer of a world where an image of class c is all tokens c. Told c, it is sure."""

    V, L, G = 8, 16, 1

    def tables(self):
        return torch.zeros(1, 9, 1), torch.zeros(())

    def parameters(self):
        return iter([torch.zeros(1)])

    def null(self, cond):
        return (torch.full_like(cond[0], 8),)

    def __call__(self, e, cond):
        certain = F.one_hot(cond[0], 9)[:, None, None, :8]
        return 100 * certain.expand(-1, 16, 1, 8).float()

    def encode(self, img):
        return (img[:, :1, 0, 0] * 255 / 10).round().long()[..., None].expand(-1, 16, 1)

    def decode(self, e, cond):
        return torch.full((len(e), 3, 4, 4), 0.25)


def test_knowing_is_measured_in_decibels_and_in_nats_per_masked_token():
    labels, world = [0, 3, 7, 3, 5] * 2, AllKnowing()             # two batches, of 8 and 2
    img = (10 * torch.tensor(labels, dtype=torch.uint8)).view(10, 1, 1, 1).expand(10, 3, 4, 4)
    teacher = teachers.Teacher(world, world, SPECS["maskgit-tiny"])
    found = check.knows(teacher, img, labels)
    error = (0.25 - img.double() / 255).square().mean().item()
    guess = math.log(8)
    assert found == pytest.approx({"psnr": -10 * math.log10(error), "nats": 0, "nats_null": guess,
                                   "nats_uniform": guess, "images": 10}, abs=1e-5)


# ------------------------------------------------------------------------------------- the script
def test_check_reports_each_file_and_what_the_teacher_knows(tmp_path, capsys):
    teacher, spec = tiny_teacher("maskgen-tiny"), SPECS["maskgen-tiny"]
    paths = {role: str(tmp_path / f"{role}.bin") for role in spec.roles}
    for role, path in paths.items():
        torch.save(getattr(teacher, role).state_dict(), path)
    photo(tmp_path / "a.png", 0)
    (tmp_path / "a.txt").write_text("a cat")
    args = check.flags().parse_args([
        "maskgen-tiny", "--device", "cpu", "--n", "4", "--images", str(tmp_path),
        "--teacher_weights", paths["net"], "--tokenizer_weights", paths["tokenizer"],
        "--text_weights", paths["text"]])
    check.check(args)
    *lines, last = capsys.readouterr().out.splitlines()
    for line, (role, path) in zip(lines, paths.items()):
        count = sum(p.numel() for p in getattr(teacher, role).parameters())
        assert line.startswith(role) and " ok " in line and path in line
        assert f"{count:,} parameters, all finite: yes" in line
    found = json.loads(last)
    assert found.pop("teacher") == "maskgen-tiny"
    assert found == pytest.approx(check.knows(teacher, *check.real_images(str(tmp_path), spec, 4)))
    args.tokenizer_weights = args.teacher_weights
    with pytest.raises(UserError, match="maskgen-tiny is not complete"):
        check.check(args)
    assert "tokenizer  NOT  " in capsys.readouterr().out


def test_check_ends_with_2_and_a_sentence_where_a_file_is_not_right(tmp_path):
    said = tmp_path / "said.txt"
    process = start("data/check.py", "maskbit-tiny", "--teacher_weights", tmp_path / "no.bin",
                    log=said)
    assert exit_code(process) == 2
    said = said.read_text()
    assert "check.py: maskbit-tiny is not complete" in said and "Traceback" not in said
    assert "net        NOT  no weights at" in said
    assert "tokenizer  ok " in said


@pytest.mark.parametrize("flags, words", [
    ("maskbit-tiny --n 0", "--n: expected a whole number of 1 or more, got 0"),
    ("maskbit-tiny --device nowhere", "--device: invalid choice: 'nowhere'"),
    ("nobody", "argument NAME: invalid choice: 'nobody'"),
])
def test_flags_out_of_range_are_refused_by_name(capsys, flags, words):
    with pytest.raises(SystemExit) as end:
        check.flags().parse_args(flags.split())
    assert end.value.code == 2
    assert words in capsys.readouterr().err


# -------------------------------------------------------------------------------------- full size
@pytest.mark.skipif(not os.environ.get("FULL_SIZE"), reason="a minute and 4 GB: set FULL_SIZE=1")
def test_full_size_maskbit_gives_the_golden_numbers():
    with open(os.path.join(ROOT, "tests", "golden", "maskbit_full_size.json")) as f:
        golden = json.load(f)
    net, tokenizer = teachers.MaskBit(), autoencoders.BitTokenizer()
    net = weights.load_state(net, seeded(generator_file()), "seeded").eval()
    tokenizer = weights.load_state(tokenizer, seeded(tokenizer_file()), "seeded").eval()
    x = integers(20, 128, 2, 256, 2).masked_fill(uniform(21, 2, 256, 2) < 0.5, 128)
    entries = integers(22, 2**14, 1, 256)             # both groups in one number
    pairs = torch.stack([entries % 128, entries // 128], -1)
    img = F.interpolate(uniform(23, 1, 3, 16, 16).float(), scale_factor=16)
    with torch.no_grad():
        e = se.embed_tokens(x, *net.tables())
        found = {
            "logits": net(e, (torch.tensor([207, 1000]),)),
            "decoded": tokenizer.decode(se.embed_tokens(pairs, *tokenizer.tables()), clamp=False),
            "latent": tokenizer.encoder(img),
        }
    for name, t in found.items():
        agrees(t, golden[name]["first"], golden[name]["abs_sum"])
