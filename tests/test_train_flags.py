"""Every flag of train.py does what it says, and none is forgotten.

Flags that change the arithmetic of Algorithm 1 are proved in tests/test_algorithm1.py. The others
are proved here by two commands that differ in one flag, or by the test that PROVED_BY names. A new
flag fails until it has a proof.

    pytest tests/test_train_flags.py -k temperature
"""

import hashlib
import os
import sys

import numpy as np
import pytest
import torch

import reward
import train
from machinery.errors import UserError
from machinery.files import ROOT
from networks.blocks import PostNormBlock
from networks.clip import ClipReward
from recipes.settings import flags
from reward import Rewards, make_imagereward
from teachers import SPECS, build
from tests.common import CLIP, reward_file, seeded
from tests.runs import log_of, nano_settings, run
from tests.test_algorithm1 import BY_TWO, PLAIN, RUNS
from tests.test_flags import networks_of

PROVED_BY = {
    "out": "test_train_flags.py::test_a_run_is_overwritten_only_if_asked_for",
    "recipe": "test_train.py::test_settings_of_the_papers_tables_reach_every_recipe",
    "resume": "test_train.py::test_resumed_run_equals_the_uninterrupted_one_to_the_bit",
    "overwrite": "test_train_flags.py::test_a_run_is_overwritten_only_if_asked_for",
    "prompts": "test_train.py::test_prompts_beside_a_gan_are_for_eq_2_and_the_pairs_keep_their_own",
    "keep": "test_looking.py::test_a_run_is_judged_as_evaluate_py_judges_it_and_keeps_the_best_and_"
            "the_last_weights",
    "eval_reference": "test_looking.py::test_a_run_is_judged_by_all_that_its_flags_name",
    "eval_metadata": "test_looking.py::test_a_run_is_judged_by_all_that_its_flags_name",
    "text_cache": "test_train.py::test_features_of_prompts_are_the_same_bits_however_they_came_and_"
                  "outlive_the_run_in_a_folder",
    "compile": "test_speed.py::test_compiled_networks_are_compiled_once_whole_whatever_is_evaluated_and_"
               "however_many_train",
    "zero": "test_train.py::test_two_gloo_processes_make_the_same_update_as_one_also_with_sharded_"
            "optimizers",
    "profile": "test_speed.py::test_the_selftest_finds_a_cpu_in_order_and_its_profile_adds_up",
    "selftest": "test_speed.py::test_the_selftest_finds_a_cpu_in_order_and_its_profile_adds_up",
    "device": "test_train_flags.py::test_a_gpu_that_is_not_there_is_refused",
    "reward_chunk": "test_train_flags.py::test_so_many_images_are_decoded_at_once",
    "checkpointing": "test_train_flags.py::test_checkpointing_computes_blocks_again",
    "dropout": "test_algorithm1.py::test_dropout_reaches_student_and_auxiliary",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with two of everything that a flag may name; the numbers are 1 and 2."""
    folder = tmp_path_factory.mktemp("files")
    nano_settings(folder)                             # writes data.npz
    rng = np.random.default_rng(9)
    np.savez(folder / "other.npz", tokens=rng.integers(0, 8, (30, 16, 2)).astype(np.uint8),
             labels=rng.integers(0, 3, 30).astype(np.uint8))
    for i in (1, 2):
        for name in ("maskgen-tiny", "maskbit-tiny"):
            networks_of(name, folder, i)
        spec = SPECS["meissonic-tiny"]
        _, sizes = spec.rewards["clip"]
        torch.manual_seed(i)
        torch.save(ClipReward(sizes, "clip").clip.state_dict(), folder / f"clip{i}.pt")
        _, sizes = spec.rewards["imagereward"]
        vocab = f"{ROOT}/{spec.bert_vocab}"
        judge = make_imagereward(vocab, sizes)
        torch.save(judge.state_dict(), folder / f"imagereward{i}.pt")
        with open(vocab) as f:
            pieces = f.read().split()
        order = pieces if i == 1 else [*pieces[:4], *reversed(pieces[4:])]
        (folder / f"vocab{i}.txt").write_text("\n".join(order))
        for name in ("hps", "pickscore"):
            torch.save(seeded(reward_file(name), seed=i), folder / f"{name}{i}.pt")
    write_other_tokenizer(f"{folder}/tokenizer.pt")
    return folder


def write_other_tokenizer(path):
    tokenizer = build(SPECS["meissonic-tiny"], "tokenizer", random_weights=True)
    torch.save(tokenizer.state_dict(), path)


NANO = "--teacher nano --data FILES/data.npz --steps 2 --log_every 1 --save_every 1"
JUDGED = ("--teacher maskbit-tiny --no-gan --steps 1 --batch 2 --n_eval 20 "
          "--eval_every 1")
TEXT = ("--teacher maskgen-tiny --no-gan --prompts assets/prompts.txt --steps 2 --batch 2 --warmup 0 "
        "--eval_every 0 --log_every 1")
LOCAL = ("--teacher_weights FILES/maskgen-tiny-net2.pt --text_weights FILES/maskgen-tiny-text2.pt "
         "--tokenizer_weights FILES/maskgen-tiny-tokenizer2.pt")
REWARD = ("--teacher meissonic-tiny --reward --steps 1 --batch 2 --warmup 0 --student_start 0 "
          "--reward_start 0 --eval_every 0 --log_every 1 --dtype fp32 --rewards")

# flag, what both commands have, the one, the other, and where they must differ
PAIRS = [
    ("teacher", f"{NANO} --no-gan", "", "--teacher maskbit-tiny --random_weights --init_from teacher "
     "--batch 2 --eval_every 0 --student_start 0", "student"),
    ("steps", NANO, "", "--steps 3", "student log"),
    ("log_every", NANO, "", "--log_every 2", "log"),
    ("save_every", NANO, "", "--save_every 2", "saves"),
    ("eval_every", JUDGED, "", "--eval_every 0", "log files"),
    ("n_eval", JUDGED, "", "--n_eval 21", "log"),
    ("temperature", JUDGED, "", "--temperature 0", "fid"),
    ("data", f"{NANO} --gan", "", "--data FILES/other.npz", "student"),
    ("random_weights", f"{TEXT} {LOCAL}", "", "--random_weights --steps 1", "student"),
    ("teacher_weights", f"{TEXT} {LOCAL}", "", "--teacher_weights FILES/maskgen-tiny-net1.pt",
     "student"),
    ("text_weights", f"{TEXT} {LOCAL}", "", "--text_weights FILES/maskgen-tiny-text1.pt", "student"),
    ("text_activation", f"{TEXT} {LOCAL}", "", "--text_activation gelu", "student"),
    ("dtype", f"{NANO} --gan", "", "--dtype bf16", "student"),
    ("clip_cosine", f"{REWARD} clip=1", "", "--clip_cosine", "clip"),
    ("clip_weights", f"{REWARD} clip=1", "", "--clip_weights FILES/clip1.pt", "clip"),
    ("imagereward_weights", f"{REWARD} imagereward=1", "",
     "--imagereward_weights FILES/imagereward1.pt", "imagereward"),
    ("bert_vocab", f"{REWARD} imagereward=1", "", "--bert_vocab FILES/vocab2.txt", "imagereward"),
    ("hps_weights", f"{REWARD} hps=1", "--hps_weights FILES/hps1.pt",
     "--hps_weights FILES/hps2.pt", "hps"),
    ("pickscore_weights", f"{REWARD} pickscore=1", "--pickscore_weights FILES/pickscore1.pt",
     "--pickscore_weights FILES/pickscore2.pt", "pickscore"),
    ("tokenizer_weights", f"{REWARD} clip=1", "",
     "--tokenizer_weights FILES/tokenizer.pt", "clip"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The published rewards' classes at a size that costs nothing; a table of one teacher's step."""
    monkeypatch.setattr(reward, "CLIP_H", CLIP)
    monkeypatch.setattr(SPECS["maskbit-tiny"], "sampling", {1: {}})


def command(line, out, files, patch):
    words = line.replace("FILES", str(files)).split()
    patch.setattr(sys, "argv", ["train.py", *words, "--device", "cpu", "--out", str(out)])
    train.main()


KNOWN = {}                                            # most commands are half of several pairs


def outcome(line, out, files):
    """What a command leaves, by name; numbers of its log by theirs."""
    if line in KNOWN:
        return KNOWN[line]
    saves, true = [], torch.save

    def save(state, f):
        saves.append(state["step"])
        true(state, f)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save)
        command(line, out, files, patch)
    ckpt = torch.load(f"{out}/ckpt.pt", weights_only=True)
    rows = [{key: value for key, value in row.items() if not key.endswith("/s")}
            for row in log_of(out)]
    sha = hashlib.sha256()
    for tensor in ckpt["student"].values():
        sha.update(tensor.numpy().tobytes())
    numbers = {key: value for row in rows for key, value in row.items()}
    KNOWN[line] = numbers | dict(student=sha.digest(), log=rows, saves=saves,
                                 files=sorted(os.listdir(out)))
    return KNOWN[line]


@pytest.mark.parametrize("case", PAIRS, ids=[case[0] for case in PAIRS])
def test_a_flag_changes_what_a_run_leaves(case, files, tmp_path):
    flag, both, one, other, where = case
    ends = [outcome(f"{both} {own}", tmp_path / f"{i}", files)
            for i, own in enumerate((one, other))]
    for part in where.split():
        assert ends[0][part] != ends[1][part], f"--{flag} changes nothing in {part}"


def test_every_flag_has_a_proof():
    known = flags().defaults.keys()
    arithmetic = {key for given in (*RUNS.values(), BY_TWO) for key, value in given.items()
                  if key in PLAIN and value != PLAIN[key]}
    arithmetic |= {"gan", "reward", "heads", "head_width", "head_mlp", "noise", "seed"}
    pairs = {flag for flag, *_ in PAIRS}
    assert known == arithmetic | pairs | PROVED_BY.keys()
    for proof in PROVED_BY.values():
        file, test = proof.split("::")
        with open(f"{ROOT}/tests/{file}") as f:
            assert f"def {test}(" in f.read(), f"no test {proof}"


# ------------------------------------------------------------------------- flags of another kind
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(files, monkeypatch):
    monkeypatch.setattr(sys, "argv", f"train.py {NANO} --device cuda".split())
    with pytest.raises(UserError, match="--device cuda: this machine has no usable GPU"):
        train.main()


def test_a_run_is_overwritten_only_if_asked_for(files, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command(NANO, out, files, monkeypatch)
    with pytest.raises(UserError, match="already holds a run"):
        command(f"{NANO} --steps 3", out, files, monkeypatch)
    command(f"{NANO} --steps 1 --overwrite", out, files, monkeypatch)
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == len(log_of(out)) == 1


def test_so_many_images_are_decoded_at_once(files, tmp_path, monkeypatch):
    seen, true = [], Rewards.forward

    def forward(self, img, *args, **kwargs):
        seen.append(len(img))
        return true(self, img, *args, **kwargs)

    monkeypatch.setattr(Rewards, "forward", forward)
    for n in (1, 2):
        command(f"{REWARD} clip=1 --reward_chunk {n}", tmp_path / f"{n}", files, monkeypatch)
    assert seen == [1, 1, 2]


def test_checkpointing_computes_blocks_again(tmp_path, monkeypatch):
    """Student and auxiliary on their way back, and the teacher on that of Eq. 8."""
    true, calls = PostNormBlock.forward, []

    def forward(self, *args):
        calls.append(self)
        return true(self, *args)

    monkeypatch.setattr(PostNormBlock, "forward", forward)
    counts = []
    for on in (False, True):
        calls.clear()
        run(tmp_path, steps=1, checkpointing=on, out=f"{tmp_path}/{on}")
        counts.append(len(calls))
    depth = SPECS["nano"].net["depth"]
    assert counts == [6 * depth, 9 * depth]
