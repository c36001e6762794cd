"""Every flag of evaluate.py, tteo.py and data/check.py does what it says, and none is forgotten.

A flag is proved by two commands that differ in it alone, and end differently in what was measured
or drawn (what only repeats the flag does not count). The few that change no result are proved by
what they do instead, in tests that PROVED_BY names. A new flag fails until it has a proof.

    pytest tests/test_flags.py -k guidance
"""

import hashlib
import collections
import functools
import json

import numpy as np
import pytest
import torch

import evaluate
import reward
import teachers
import tteo
from data import check, imagenet, prompts
from machinery.errors import UserError
from machinery.files import ROOT
from metrics import benchmarks, reference
from networks import inception
from networks.clip import ClipReward
from tests.common import BLIP, CLIP, photos, reward_file, seeded, tiny_teacher
from tests.test_benchmarks import SHAPES, hps_folder, load, noise, write_lines
from tests.test_metrics import Small
from worlds import comparing

# What no pair of commands proves: the test that does.
PROVED_BY = {
    "evaluate.py": {
        "device": "test_flags.py::test_a_gpu_that_is_not_there_is_refused_by_every_script",
        "export": "test_speed.py::test_the_four_lines_of_the_docs_draw_from_a_checkpoint_and_the_"
                  "command_exports_it",
        "geneval_folder": "test_benchmarks.py::test_geneval_is_drawn_in_its_layout_and_scored_alike"
                          "_in_passing_and_from_the_folder",
        "out": "test_flags.py::test_results_are_where_out_says",
        "save_reference": "test_evaluate.py::test_a_reference_made_from_a_folder_is_kept_and_knows"
                          "_how",
        "detector_weights": "test_flags.py::test_local_weights_of_a_judge_are_taken",
        "clip_l_weights": "test_flags.py::test_local_weights_of_a_judge_are_taken",
        "hps_weights": "test_flags.py::test_local_weights_of_a_judge_are_taken",
        "hps_version": "test_benchmarks.py::test_each_version_of_hps_has_its_published_weights_and_"
                       "its_own_column",
    },
    "tteo.py": {
        "device": "test_flags.py::test_a_gpu_that_is_not_there_is_refused_by_every_script",
        "benchmark": "test_tteo.py::test_a_benchmark_compares_one_start_tteo_and_best_of_n_by_"
                     "reward_geneval_and_time",
        "detector_weights": "test_flags.py::test_local_weights_of_a_judge_are_taken",
        "clip_l_weights": "test_flags.py::test_local_weights_of_a_judge_are_taken",
        "chunk": "test_flags.py::test_a_chunk_is_what_passes_the_networks_at_once_and_changes_"
                 "no_result",
        "checkpointing": "test_flags.py::test_checkpointing_computes_again_and_changes_no_result",
        "out": "test_flags.py::test_results_are_where_out_says",
    },
    "data/check.py": {
        "device": "test_flags.py::test_a_gpu_that_is_not_there_is_refused_by_every_script",
    },
}


# ------------------------------------------------------------------------------ two of everything
def networks_of(name, folder, number):
    """The networks of a tiny teacher in files, and a checkpoint of train.py with a student."""
    config = dict(teacher=name, init_ratio=0.6, noise=0.1, temperature=1.0, random_weights=True)
    for role in teachers.SPECS[name].roles:
        network = teachers.build(teachers.SPECS[name], role, random_weights=True)
        torch.manual_seed(number)
        for p in network.parameters():
            p.data += 0.05 * number * torch.randn_like(p)
        torch.save(network.state_dict(), f"{folder}/{name}-{role}{number}.pt")
        if role == "net":
            state = {"ema": network.state_dict(), "config": config}
            torch.save(state, f"{folder}/{name}{number}.pt")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with two of everything that a flag may name; the numbers are 1 and 2."""
    folder = tmp_path_factory.mktemp("files")
    for i in (1, 2):
        f = np.random.RandomState(i).standard_normal((200, 12))
        np.savez(folder / f"reference{i}.npz", mu=f.mean(0), sigma=np.cov(f, rowvar=False))
        photos(folder / f"photos{i}", 12 + i, shift=20 * i)
        for k in range(12):
            (folder / f"photos{i}" / f"{k:02d}.txt").write_text(f"picture {k}, {i}")
        lines = [f"a red ring, {i}", f"two blue crosses, {i}", f"a cat, {i}"]
        (folder / f"prompts{i}.txt").write_text("\n".join(lines))
        write_lines(folder / f"geneval{i}.jsonl", SHAPES[:i])
        letters = {1: "ardingx", 2: "xgnidra"}[i]
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)]
        words += [f"word{k}" for k in range(198 - len(words))]
        (folder / f"vocab{i}.txt").write_text("\n".join(words))
        for name in ("maskgit-tiny", "maskgen-tiny"):
            networks_of(name, folder, i)
        torch.manual_seed(i)
        torch.save(Small().state_dict(), folder / f"inception{i}.pt")
        torch.save(torch.nn.Linear(2, 2).state_dict(), folder / f"detector{i}.pt")
        torch.save(ClipReward(benchmarks.TINY_CLIP, "clip_g").clip.state_dict(),
                   folder / f"measure{i}.pt")
        for name in reward.RENO:
            shapes = reward_file(name)
            if name == "imagereward":
                shapes = {key: [200, *shape[1:]] if key.endswith("word_embeddings.weight") else
                          shape for key, shape in shapes.items()}
            torch.save(seeded(shapes, seed=i), folder / f"{name}{i}.pt")
    return folder


@pytest.fixture(autouse=True)
def small_judges(monkeypatch):
    """Judges of the published classes, at sizes that cost nothing."""
    monkeypatch.setattr(inception, "SIZE", 32)
    for module in (inception, reference):
        monkeypatch.setattr(module, "Inception", Small)
    for name in ("CLIP_L", "CLIP_G", "CLIP_H"):
        monkeypatch.setattr(benchmarks, name, benchmarks.TINY_CLIP)
    configs = dict.fromkeys(reward.RENO, CLIP) | {"imagereward": dict(BLIP, vocab=200)}
    real = reward.rewards_for
    monkeypatch.setattr(tteo, "rewards_for", functools.partial(real, configs=configs))


# ------------------------------------------------------------------------- what a command comes to
MEASURED = ("n", "fid", "is_adm", "recall", "psnr", "clip_score", "single_object")


def measured(rows):
    return [{key: row[key] for key in MEASURED if key in row} for row in rows]


def images(folder):
    """SHA-256 of all pictures in a folder and below it, in the order of their names."""
    paths = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def evaluated(folder, flags, capsys):
    """What evaluate.py measured, and in which batches; the images that it kept; those on its sheet,
    and their words.
    """
    args = evaluate.flags().parse_args([*flags, "--device", "cpu", "--out", str(folder)])
    shown, batches = [], []
    seen_by = Small.forward

    def forward(self, img):
        batches.append(len(img))
        return seen_by(self, img)

    def sheet(strips, path, words=None):
        shown.append([words, *(img.tolist() for _, img in strips)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "sheet", sheet)       # its captions repeat the flags
        patch.setattr(Small, "forward", forward)
        evaluate.main(args)
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {"measured": measured(rows), "images": images(folder), "sheet": shown,
            "batches": batches, "dtype": [row["dtype"] for row in rows]}


def optimized(folder, flags, capsys):
    """What tteo.py found for a prompt, without the times; or measured in a benchmark."""
    args = tteo.flags().parse_args([*flags, "--device", "cpu", "--out", str(folder)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "sheet", lambda *_, **__: None)      # writing takes longest
        tteo.main(args)
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    if args.metrics:
        return {"measured": measured(rows), "images": images(folder)}
    scores = [{key: value for key, value in rows[-1][when].items() if key != "seconds"}
              for when in ("before", "after")]
    return {"measured": [rows[-1]["history"], scores]}


def checked(folder, flags, capsys):
    """What data/check.py found in real images."""
    capsys.readouterr()
    check.check(check.flags().parse_args([*flags, "--device", "cpu"]))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    found.pop("teacher")
    return {"measured": found}


OUTCOMES = {"evaluate.py": evaluated, "tteo.py": optimized, "data/check.py": checked}


KNOWN = {}                                            # most commands are half of several pairs


def outcome(script, folder, flags, capsys):
    command = script, *flags
    if command not in KNOWN:
        try:
            KNOWN[command] = OUTCOMES[script](folder, flags, capsys)
        except UserError as err:
            KNOWN[command] = {"measured": str(err).replace(str(folder), "")}
    return KNOWN[command]


# ------------------------------------------------------------------- pairs that differ in one flag
REF = "--reference FILES/reference1.npz --n 12"
TEACHER = f"--random_weights --teacher maskgit-tiny --steps 3 {REF}"
STUDENT = f"--random_weights --ckpt FILES/maskgit-tiny2.pt {REF}"
TEXT = f"--random_weights --teacher maskgen-tiny --steps 1 {REF}"
LOCAL = ("--teacher_weights FILES/maskgen-tiny-net2.pt "
         "--tokenizer_weights FILES/maskgen-tiny-tokenizer2.pt "
         "--text_weights FILES/maskgen-tiny-text2.pt")
FROM_FILES = f"--teacher maskgen-tiny --steps 1 {REF} --inception FILES/inception1.pt {LOCAL}"
REAL = "--random_weights --teacher maskgit-tiny --steps 1 --n 12"
DRAW = "--random_weights --teacher maskgen-tiny --steps 1 --metadata FILES/prompts1.txt"
GENEVAL = ("--random_weights --teacher meissonic-tiny --steps 1 --benchmark geneval "
           "--metadata FILES/geneval2.jsonl")
REBUILD = "--random_weights --teacher maskgit-tiny --reconstruction"

# flag, what both commands have, the one, the other, and where they must differ
EVALUATE = [
    ("ckpt", f"--random_weights {REF}",
     "--ckpt FILES/maskgit-tiny1.pt", "--ckpt FILES/maskgit-tiny2.pt"),
    ("teacher", f"--random_weights --steps 1 {REF}",
     "--teacher maskgit-tiny", "--teacher maskgen-tiny"),
    ("teacher", f"--random_weights --ckpt FILES/maskgit-tiny-net1.pt {REF}",
     "", "--teacher maskgit-tiny"),
    ("teacher", "--random_weights --reconstruction --real FILES/photos1",
     "--teacher maskgit-tiny", "--teacher maskgen-tiny"),
    ("steps", f"--random_weights --teacher maskgit-tiny {REF}", "--steps 1", "--steps 3"),
    ("steps", STUDENT, "", "--steps 1"),
    ("reconstruction", "--random_weights --teacher maskgit-tiny --real FILES/photos1 --n 12",
     "", "--reconstruction"),
    ("prompts", TEXT, "--prompts FILES/prompts1.txt", "--prompts FILES/prompts2.txt", "sheet"),
    ("teacher_weights", FROM_FILES, "", "--teacher_weights FILES/maskgen-tiny-net1.pt"),
    ("tokenizer_weights", FROM_FILES, "", "--tokenizer_weights FILES/maskgen-tiny-tokenizer1.pt"),
    ("tokenizer_weights", f"{LOCAL} --teacher maskgen-tiny --reconstruction --real FILES/photos1 "
     "--inception FILES/inception1.pt", "", "--tokenizer_weights FILES/maskgen-tiny-tokenizer1.pt"),
    ("text_weights", FROM_FILES, "", "--text_weights FILES/maskgen-tiny-text1.pt"),
    ("text_activation", TEXT, "", "--text_activation gelu"),
    ("random_weights", FROM_FILES, "", "--random_weights"),
    ("temperature", STUDENT, "--temperature 0", "--temperature 3"),
    ("init_ratio", STUDENT, "", "--init_ratio 0.1"),
    ("noise", STUDENT, "", "--noise 0.9"),
    ("noise", STUDENT, "", "--noise 0"),
    ("guidance", TEACHER, "", "--guidance 40"),
    ("teacher_temperature", TEACHER, "", "--teacher_temperature 0"),
    ("order", TEACHER, "", "--order halton"),
    ("reference", REAL, "--reference FILES/reference1.npz", "--reference FILES/reference2.npz"),
    ("real", REAL, "--real FILES/photos1", "--real FILES/photos2"),
    ("real", REBUILD, "--real FILES/photos1", "--real FILES/photos2"),
    ("fake", f"--random_weights {REF}", "--fake FILES/photos1", "--fake FILES/photos2"),
    ("inception", TEACHER, "--inception FILES/inception1.pt", "--inception FILES/inception2.pt"),
    ("resize", f"{REAL} --real FILES/photos1", "", "--resize clean"),
    ("crop", f"{REAL} --real FILES/photos1", "", "--crop"),
    ("benchmark", DRAW, "", "--benchmark clip"),
    ("metadata", "--random_weights --teacher maskgen-tiny --steps 1 --benchmark clip",
     "--metadata FILES/prompts1.txt", "--metadata FILES/prompts2.txt"),
    ("per_prompt", GENEVAL, "--per_prompt 1", "--per_prompt 2"),
    ("detector", f"{GENEVAL} --per_prompt 1", "", "--detector shapes"),
    ("save_images", TEACHER, "", "--save_images", "images"),
    ("save_images", f"{DRAW} --benchmark clip", "", "--save_images", "images"),
    ("save_images", f"{DRAW} --benchmark clip", "--save_images cropped", "--save_images whole",
     "images"),
    ("clip_g_weights", f"{DRAW} --benchmark clip", "", "--clip_g_weights FILES/measure1.pt"),
    ("metrics", TEACHER, "--metrics fid", "--metrics is"),
    ("metrics", f"--random_weights --fake FILES/photos1 {REF}", "--metrics fid", "--metrics is"),
    ("metrics", f"{DRAW} --reference FILES/reference1.npz", "--metrics clip",
     "--metrics fid clip"),
    ("n", "--random_weights --teacher maskgit-tiny --steps 1 --reference FILES/reference1.npz",
     "--n 12", "--n 20"),
    ("n", f"{REBUILD} --real FILES/photos1", "", "--n 10"),
    ("batch", TEACHER, "--batch 5", "--batch 6"),
    ("batch", f"--random_weights --fake FILES/photos1 {REF}", "", "--batch 5", "batches"),
    ("batch", f"{REBUILD} --real FILES/photos1", "", "--batch 5", "batches"),
    ("seed", TEACHER, "", "--seed 5", "measured sheet"),
    ("bf16", TEACHER, "", "--bf16", "measured sheet dtype"),
]

TTEO = ("--teacher maskgen-tiny --random_weights --prompt ring --rewards hps --starts 2 "
        "--iterations 3 --lr 20")
ALL_FOUR = "--teacher maskgen-tiny --random_weights --prompt ring --starts 1 --iterations 2"
TTEO_FILES = ("--teacher maskgen-tiny --prompt ring --rewards hps --hps_weights FILES/hps1.pt "
              f"{LOCAL}")
WAYS = "--teacher maskgen-tiny --random_weights --rewards hps --starts 1 --iterations 1 --best_of 1"
WAYS_CLIP = f"{WAYS} --metrics clip --metadata FILES/prompts1.txt"
WAYS_GENEVAL = f"{WAYS} --metrics geneval --metadata FILES/geneval2.jsonl"
OPTIMIZE = [
    ("prompt", TTEO, "", "--prompt tree"),
    ("ckpt", TTEO, "", "--ckpt FILES/maskgen-tiny2.pt"),
    ("teacher", "--random_weights --prompt ring --rewards hps --iterations 2",
     "--teacher maskgen-tiny", "--teacher meissonic-tiny"),
    ("teacher", "--random_weights --prompt ring --rewards hps --iterations 2 "
     "--ckpt FILES/maskgen-tiny-net2.pt", "", "--teacher maskgen-tiny"),
    ("teacher_weights", TTEO_FILES, "", "--teacher_weights FILES/maskgen-tiny-net1.pt"),
    ("tokenizer_weights", TTEO_FILES, "", "--tokenizer_weights FILES/maskgen-tiny-tokenizer1.pt"),
    ("text_weights", TTEO_FILES, "", "--text_weights FILES/maskgen-tiny-text1.pt"),
    ("text_activation", TTEO, "", "--text_activation gelu"),
    ("random_weights", TTEO_FILES, "", "--random_weights"),
    ("hps_weights", ALL_FOUR, "--hps_weights FILES/hps1.pt", "--hps_weights FILES/hps2.pt"),
    ("imagereward_weights", ALL_FOUR, "", "--imagereward_weights FILES/imagereward1.pt"),
    ("clip_weights", ALL_FOUR, "", "--clip_weights FILES/clip1.pt"),
    ("pickscore_weights", ALL_FOUR, "", "--pickscore_weights FILES/pickscore1.pt"),
    ("bert_vocab", ALL_FOUR, "--bert_vocab FILES/vocab1.txt", "--bert_vocab FILES/vocab2.txt"),
    ("rewards", ALL_FOUR, "--rewards hps", "--rewards clip"),
    ("scale", TTEO, "", "--scale 2"),
    ("starts", TTEO, "", "--starts 3"),
    ("iterations", TTEO, "", "--iterations 2"),
    ("lr", TTEO, "", "--lr 5"),
    ("momentum", TTEO, "", "--momentum 0.2"),
    ("clip", TTEO, "", "--clip 0.0001"),
    ("regularize", TTEO, "", "--regularize 0.01"),
    ("seed", TTEO, "", "--seed 3"),
    ("bf16", TTEO, "", "--bf16"),
    ("metrics", f"{WAYS} --metadata FILES/geneval2.jsonl", "--metrics clip", "--metrics geneval"),
    ("metadata", f"{WAYS} --metrics clip",
     "--metadata FILES/prompts1.txt", "--metadata FILES/prompts2.txt"),
    ("per_prompt", WAYS_GENEVAL, "--per_prompt 1", "--per_prompt 2"),
    ("detector", f"{WAYS_GENEVAL} --per_prompt 1", "", "--detector shapes"),
    ("save_images", WAYS_CLIP, "", "--save_images", "images"),
    ("clip_g_weights", WAYS_CLIP, "", "--clip_g_weights FILES/measure1.pt"),
    ("best_of", WAYS_CLIP, "", "--best_of 3"),
    ("batch", WAYS_CLIP, "--batch 2", "--batch 3"),
    ("seed", WAYS_CLIP, "", "--seed 3"),
]

CHECK = f"maskgen-tiny --images FILES/photos1 --n 4 {LOCAL}"
LOOK = [
    ("teacher", "--random_weights --images FILES/photos1 --n 4", "maskgen-tiny", "meissonic-tiny"),
    ("teacher_weights", CHECK, "", "--teacher_weights FILES/maskgen-tiny-net1.pt"),
    ("tokenizer_weights", CHECK, "", "--tokenizer_weights FILES/maskgen-tiny-tokenizer1.pt"),
    ("text_weights", CHECK, "", "--text_weights FILES/maskgen-tiny-text1.pt"),
    ("text_activation", CHECK, "", "--text_activation gelu"),
    ("random_weights", CHECK, "", "--random_weights"),
    ("images", "maskgen-tiny --random_weights --n 4",
     "--images FILES/photos1", "--images FILES/photos2"),
    ("n", "maskgen-tiny --random_weights --images FILES/photos1", "--n 3", "--n 4"),
]

PAIRS = {"evaluate.py": EVALUATE, "tteo.py": OPTIMIZE, "data/check.py": LOOK}
CASES = [(script, *pair) for script, pairs in PAIRS.items() for pair in pairs]


@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_a_flag_changes_what_is_measured_or_drawn(files, tmp_path, capsys, case):
    script, flag, both, one, other, *where = case
    ends = []
    for i, own in enumerate((one, other)):
        flags = f"{both} {own}".replace("FILES", str(files)).split()
        ends.append(outcome(script, tmp_path / f"{i}", flags, capsys))
    for part in (where[0] if where else "measured").split():
        assert ends[0].get(part) != ends[1].get(part), f"--{flag} changes nothing in {part}"


COMMANDS = {"evaluate.py": evaluate.flags, "tteo.py": tteo.flags, "data/check.py": check.flags}


@pytest.mark.parametrize("script", COMMANDS)
def test_every_flag_has_a_proof(script):
    flags = {action.dest for action in COMMANDS[script]()._actions} - {"help"}
    proofs = PROVED_BY[script]
    assert flags == {flag for flag, *_ in PAIRS[script]} | proofs.keys()
    for proof in proofs.values():
        file, test = proof.split("::")
        with open(f"{ROOT}/tests/{file}") as f:
            assert f"def {test}(" in f.read(), f"no test {proof}"


def test_two_equal_commands_end_equally(files, tmp_path, capsys):
    """Or else that two differ would prove nothing."""
    commands = (("evaluate.py", TEACHER), ("evaluate.py", STUDENT), ("tteo.py", TTEO),
                ("tteo.py", WAYS_CLIP), ("data/check.py", CHECK))
    for n, (script, both) in enumerate(commands):
        flags = both.replace("FILES", str(files)).split()
        again = OUTCOMES[script](tmp_path / f"{n} again", flags, capsys)
        assert again == outcome(script, tmp_path / f"{n} once", flags, capsys)


# ------------------------------------------------------------------------- flags of another kind
@pytest.mark.parametrize("both", [STUDENT, f"--random_weights --fake FILES/photos1 {REF}"])
def test_no_teacher_is_drawn_where_none_was_asked_for(files, tmp_path, capsys, both):
    flags = both.replace("FILES", str(files)).split()
    assert len(outcome("evaluate.py", tmp_path, flags, capsys)["measured"]) == 1


def test_results_are_where_out_says(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script, both in (("evaluate.py", f"{TEACHER} --save_images"), ("tteo.py", TTEO)):
        flags = both.replace("FILES", str(files)).split()
        OUTCOMES[script](tmp_path / "here", flags, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert {path.name for path in (tmp_path / "here").iterdir()} >= {
        "results.jsonl", "table.md", "table.json", "images"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("main, flags, line", [
    (evaluate.main, evaluate.flags, ""),
    (tteo.main, tteo.flags, "--prompt x --teacher maskgen-tiny --random_weights"),
    (check.check, check.flags, "maskgen-tiny --random_weights"),
    (imagenet.main, imagenet.flags, "FILES/photos1 --teacher maskgit-tiny --random_weights "
     "--allow_other_classes"),
    (prompts.main, prompts.flags, "--images FILES/photos1 --teacher maskgen-tiny --random_weights"),
])
def test_a_gpu_that_is_not_there_is_refused_by_every_script(files, tmp_path, main, flags, line):
    line = f"{line} --device cuda".replace("FILES", str(files)).split()
    if main is not check.check:
        line += ["--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--device cuda: this machine has no usable GPU"):
        main(flags().parse_args(line))


def test_local_weights_of_a_judge_are_taken(files, tmp_path, monkeypatch):
    """The judges whose files are too large, or whose package is not here, for a whole command."""
    def detector(path, random_weights, device):
        net = torch.nn.Linear(2, 2)
        net.load_state_dict(torch.load(path, weights_only=True))
        return net

    monkeypatch.setattr(benchmarks, "load_mask2former", detector)

    def facts(**given):
        names = dict(detector_weights="detector1", clip_l_weights="measure1") | given
        flags = [f"--{flag}={files}/{name}.pt" for flag, name in names.items()]
        args = evaluate.flags().parse_args(["--detector", "mask2former", *flags])
        return benchmarks.mask2former_detector(args, "cpu").facts

    one = facts()
    assert facts(detector_weights="detector2")["detector"] != one["detector"]
    assert facts(clip_l_weights="measure2")["clip_l_weights"] != one["clip_l_weights"]

    pictures = [benchmarks.Image.fromarray(pixels) for pixels in noise(5, 2, 16, 16, 3)]
    scores, folder = [], hps_folder(tmp_path)
    for i in (1, 2):
        _, bench = load("hps", "--metadata", folder, "--teacher", "maskgen-tiny",
                        "--hps_weights", f"{files}/measure{i}.pt")
        bench.lay(f"{tmp_path}/{i}")
        scores.append(bench.score(f"{tmp_path}/{i}", slice(0, 2), pictures))
    assert not torch.allclose(*scores, atol=1e-3)


def in_passing(tmp_path, files, capsys, flags):
    """(modules that ran with gradients, batches of the teacher's net, what tteo.py found)."""
    ran, batches = collections.Counter(), set()

    def note(module, args):
        ran[type(module).__name__] += torch.is_grad_enabled()
        if isinstance(module, teachers.MaskGen):
            batches.add(len(args[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    found = optimized(tmp_path / f"out{flags}", f"{TTEO} {flags}".split(), capsys)
    handle.remove()
    return ran, batches, found["measured"]


def test_a_chunk_is_what_passes_the_networks_at_once_and_changes_no_result(
        files, tmp_path, capsys):
    _, together, found = in_passing(tmp_path, files, capsys, "")
    _, alone, same = in_passing(tmp_path, files, capsys, "--chunk 1")
    assert max(together) == 2 and alone == {1}
    assert np.allclose(found[0], same[0], atol=1e-5)


def test_checkpointing_computes_again_and_changes_no_result(files, tmp_path, capsys):
    once, _, found = in_passing(tmp_path, files, capsys, "")
    twice, _, same = in_passing(tmp_path, files, capsys, "--checkpointing")
    teacher = tiny_teacher("maskgen-tiny")
    for block in (teacher.net.blocks[0], teacher.tokenizer.decoder.transformer[0]):
        name = type(block).__name__
        assert twice[name] == 2 * once[name] > 0, name
    assert twice["ClipReward"] == once["ClipReward"] + 3, "one start's update, and two of both"
    assert found == same
