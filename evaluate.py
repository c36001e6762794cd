"""How good are the images? A page that draws, judges and tabulates: FID, IS, and how fast.

FID and its relatives compare features of N generated images with those of real ones. With mean mu
and covariance S of each set (every formula is a function in metrics/fid.py),

    FID = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))     `fid`: 0 for equal Gaussians
    IS  = exp(mean KL(p(y|x) || p(y)))                  `inception_score`: sharp and diverse is high
    precision, recall      `prdc`: share of fakes inside a ball of some real, which reaches to its
                           third neighbor; share of reals inside a ball of some fake
    density, coverage      `prdc`: balls of reals that a fake is in, counted, so that outliers weigh
                           little; share of reals' balls with a fake inside

None of these is a property of a model alone. FID falls as N grows (below 10,000 by more than papers
argue about). It depends on the feature network, the reference images, the resize, the rounding of
pixels (truncated to uint8, or rounded, as each teacher's authors do), temperature, guidance, the
seed and the labels (here every class equally often). So every row of results.jsonl holds all of
them, with hashes: compare rows that differ in one.

Published FIDs rest on the Inception network of 2015 (networks/inception.py) and on statistics of
real images: --reference, an .npz with mu and sigma (`adm` fetches ADM's of ImageNet), or --real, a
folder. Either switches Inception on. The tiny worlds have judges of their own (worlds/judges.py).
Fashion's is a small classifier whose features are means and standard deviations of the maps of
*all* layers: the last layer alone hardly sees texture, and texture betrays tokens that were drawn
independently. Its FIDs compare only with each other; where real images stand, the floor, says
assets/fashion/classifier.json.

    python evaluate.py --ckpt out/run/ckpt.pt --steps 1 16       # a student, its teacher beside it
    python evaluate.py --ckpt out/run/ckpt.pt --temperature 0 0.5 1   # a sweep; 0: argmax (Tab. 14)
    python evaluate.py --ckpt A B --steps 8 16 --temperature 0 0.5 1      # one table of all
    python evaluate.py --steps 1 2 4 8 16                        # the teacher alone
    python evaluate.py --teacher maskgit --steps 8 --order halton         # Tab. 2's baseline
    torchrun --nproc_per_node=4 evaluate.py --ckpt ... --metrics fid is prdc      # ImageNet: 50,000
    python evaluate.py --real val2014 --crop --resize clean --save_reference coco.npz     # once
    python evaluate.py --fake FOLDER --reference coco.npz --crop --resize clean   # drawn already
    python evaluate.py --teacher meissonic-tiny --steps 1 16     # the shapes: GenEval, CLIP's score
    python evaluate.py --ckpt ... --metrics clip hps geneval \\
        --metadata captions.txt HPDv2/benchmark metadata.jsonl
    python evaluate.py --ckpt ... --benchmark geneval --metadata metadata.jsonl \\
        --detector mask2former
    python evaluate.py --reconstruction                      # the tokenizer limits every student
    python evaluate.py --reconstruction --teacher maskgit --real imagenet/val    # its rFID and PSNR
    python evaluate.py --ckpt out/run/ckpt.pt --export student.pt2       # a file that needs no code

Rows are appended to OUT/results.jsonl as they come; OUT/table.md, table.json and sheet.png (images
of all models, from the same starts) have what this command did.
"""

import argparse
import json
import os
import time
from functools import partial
from typing import Callable, NamedTuple

import torch

from data.images import folder_images
from data.prompts import read_prompts
from machinery.errors import UserError, guard
from machinery.files import file_name, fingerprint, replacing
from machinery.flags import (add_device, add_teacher_files, add_weights, check_device, nonnegative,
                             number, parser, positive_int, share)
from machinery.pictures import sheet, spread
from machinery.processes import autocast, is_main, join_processes
from machinery.records import append_rows
from metrics.benchmarks import (BENCHMARKS, HPS, benchmark_flags, expect_text, geneval_folder,
                                load_benchmarks, run_benchmark)
from metrics.engine import in_turn, usual_batch
from metrics.fid import METRICS, image_metrics
from metrics.published import published
from metrics.reconstruction import reconstruction
from metrics.reference import load_feature_space
from metrics.tables import report, small_print
from networks.inception import INCEPTION, RESIZES
from teachers import (FILES, SPECS, Teacher, export, fixed_sample, generate_student,
                      generate_teacher, load_student, load_teacher)
from worlds.fashion import load_extractor, load_images
from worlds.judges import load_detector, load_judge


# ---------------------------------------------------------------------------------- which models
class Model(NamedTuple):
    """Something that draws."""

    teacher: Teacher
    make_images: Callable         # rows of teacher.conditions -> uint8 images
    facts: dict                   # what a row of results says of it
    config: dict                  # how train.py made it; empty for teachers and bare weights

    @property
    def caption(self):
        words = [self.facts["model"]]
        for key in ("steps", "temperature", "guidance"):
            if key in self.facts:
                words.append(f"{key} {self.facts[key]:g}")
        return ", ".join(words)


def files_of(args):
    return {key: getattr(args, key) for key in FILES}


def hashes(teacher):
    """Which networks a teacher is made of: files may have been renamed."""
    found = dict(teacher=teacher.spec.name, teacher_weights=fingerprint(teacher.net),
                 tokenizer=fingerprint(teacher.tokenizer))
    if teacher.text:
        found["text"] = fingerprint(teacher.text)
    return found


def models(args, device):
    """Students at each temperature, then the teacher at each number of steps, one at a time."""
    name, files = args.teacher, files_of(args)
    for path in args.ckpt:
        teacher, net, config = load_student(path, args.teacher, device, **files)
        name = name or teacher.spec.name
        files = {key: value or config.get(key) for key, value in files.items()}
        settings = teacher.spec.student | config
        start = {}
        for key in ("init_ratio", "noise"):
            given = getattr(args, key)
            start[key] = settings[key] if given is None else given
        facts = dict(model=f"student {path}", kind="student", weights=fingerprint(net), steps=1)
        for temperature in args.temperature or [settings["temperature"]]:
            how = {"temperature": temperature, **start}
            draw = partial(generate_student, teacher, net, **how)
            yield Model(teacher, draw, facts | how, config)

    if not args.steps and (args.ckpt or args.reconstruction):
        return
    teacher = load_teacher(name or "maskbit-tiny", device=device, **files)
    usual = [*teacher.spec.sampling][:1]
    if teacher.spec.record:                           # a tiny one, fast enough for several
        usual = [1, 2, 4, 8, 16]
    for steps in args.steps or usual:
        how = dict(steps=steps, order=args.order) | teacher.spec.settings(
            steps, guidance=args.guidance, temperature=args.teacher_temperature)
        draw = partial(generate_teacher, teacher, **how)
        yield Model(teacher, draw, {"model": "teacher", "kind": "teacher", **how}, {})


# ----------------------------------------------------------------------------------- which judge
class Judge(NamedTuple):
    """Whoever turns a model's images into numbers."""

    score: Callable               # score(make_images, batch=, seed=, desc=) -> a row of results
    prompts: list | None          # what the images are of; None: classes
    labels: str                   # the same in words


def image_judge(args, teacher, space, folder, device):
    """Inception with the real side given; or the judge of the teacher's world; or a mere clock."""
    spec = teacher.spec
    extractor, reference = space or load_extractor(spec, device)
    if args.metrics and extractor is None:
        raise UserError(f"--metrics {' '.join(args.metrics)} of {spec.name} needs --reference "
                        "PATH.npz (adm: ADM's of ImageNet), or --real FOLDER")
    world_judge = None if extractor else load_judge(teacher, device)
    scored = extractor or world_judge
    if not scored and is_main():
        print(f"{spec.name}: images are drawn and timed; FID needs --reference PATH or --real "
              "FOLDER")

    prompts, labels = None, "each class in turn"
    if teacher.text:
        path = args.prompts or spec.prompts
        prompts, labels = read_prompts(path), f"{path} in turn"
    n = args.n or 5000
    if space and not args.n:
        n = 50_000 if spec.classes else len(prompts)
    if n < 10 and scored:
        raise UserError(f"--n {n}: statistics need 10 images at least")
    if world_judge:
        return Judge(partial(world_judge, n=n), prompts, "the shapes benchmark")
    score = partial(
        image_metrics, asked=in_turn(teacher.conditions(prompts), n), extractor=extractor,
        reference=reference, metrics=args.metrics or METRICS, folder=folder)
    return Judge(score, prompts, labels)


def judges(args, model, space, benchmarks, device):
    """One Judge at a time: of images as such, then the benchmarks, with prompts of their own."""
    teacher = model.teacher
    name = file_name(f"{teacher.spec.name} {model.caption}")
    if not benchmarks or {*METRICS} & {*args.metrics}:
        folder = f"{args.out}/images/{name}" if args.save_images else None
        yield image_judge(args, teacher, space, folder, device)
    for (task, benchmark), path in zip(benchmarks.items(), args.metadata):
        expect_text(teacher.spec, task)
        asked = teacher.conditions(benchmark.prompts)
        score = partial(run_benchmark, benchmark, asked, folder=f"{args.out}/{task}/{name}")
        yield Judge(score, benchmark.prompts, path)


# ------------------------------------------------------------------------------- a row for each
def rounding(spec):
    return "uint8, rounded" if spec.rounds else "uint8, truncated"


def drawn_rows(args, space, benchmarks, device):
    """A row per model and judge; at last sheet.png, images of all models from the same starts."""
    strips = []
    for model in models(args, device):
        teacher, spec = model.teacher, model.teacher.spec
        if not space and args.metrics and (spec.classes, spec.image[1]) == (1000, 256):
            args.reference = "adm"                    # ADM's is the real side of all papers
            space = load_feature_space(args, device)
        for judge in judges(args, model, space, benchmarks, device):
            with autocast(device.type, args.bf16):
                row = judge.score(model.make_images, seed=args.seed, desc=model.caption,
                                  batch=args.batch or usual_batch(teacher))
            if spec.classes:
                row["per_class"] = row["n"] / spec.classes
            row = {**model.facts, **hashes(teacher), **row,
                   "labels": judge.labels, "pixels": rounding(spec)}
            paper = published(row, model.config)
            if paper:
                row["published"] = paper
            yield row
        shown = min(args.n or 10, 10 if spec.image[1] < 100 else 4)
        with autocast(device.type, args.bf16):
            conditions = teacher.conditions(judge.prompts)
            img = fixed_sample(model.make_images, conditions, shown, args.seed)
        strips.append((model.caption, img))
    if strips and is_main():
        words = spread(judge.prompts, shown) if judge.prompts else None
        sheet(strips, f"{args.out}/sheet.png", words=words)


def fake_row(args, space, device):
    """The row of --fake: whatever has drawn them."""
    names, make, complain = folder_images(args.fake, "--fake")
    asked = torch.arange(len(names), device=device)
    row = image_metrics(make, asked, *space, batch=args.batch or 64, desc=args.fake,
                        metrics=args.metrics or METRICS)
    complain()
    return {"model": args.fake, "kind": "folder", **row, "seed": None, "pixels": "as they are"}


def reconstruction_rows(args, space, device):
    """The rows of --reconstruction: of Fashion-MNIST, or of --real."""
    teacher = load_teacher(args.teacher or "maskbit-tiny", device=device, **files_of(args))
    extractor, reference = space or load_extractor(teacher.spec, device)
    if extractor is None:
        raise UserError(f"--reconstruction reads Fashion-MNIST, which {teacher.spec.name} does not "
                        "know: for other images add --real FOLDER")
    if args.real:
        n, sources = args.n, {args.real: folder_images(args.real, "--real", teacher.spec.image)}
    else:
        n, sources = args.n or 5000, {}
        for split in ("train", "t10k"):
            img = torch.from_numpy(load_images(split)[0]).to(device)
            sources[split] = img, img.__getitem__, lambda: None
    batch = args.batch or usual_batch(teacher)
    for name, images in sources.items():
        for row in reconstruction(teacher, name, images, n, extractor, reference, batch, device):
            yield row | {"pixels": rounding(teacher.spec)}


def all_rows(args, space, benchmarks, device):
    """The rows of a command, one at a time."""
    if args.geneval_folder:
        yield geneval_folder(args, device, load_detector)
    if args.fake:
        yield fake_row(args, space, device)
    if args.reconstruction:
        yield from reconstruction_rows(args, space, device)
    if not (args.geneval_folder or args.fake):        # their images are drawn already
        yield from drawn_rows(args, space, benchmarks, device)


# --------------------------------------------------------------------------------------- the page
def benchmarks_of(args, device):
    """{name: Benchmark} of --benchmark, or of those in --metrics."""
    if args.benchmark and args.metrics:
        raise UserError(f"--benchmark {args.benchmark} is short for --metrics {args.benchmark}: "
                        "give one of the two")
    others = []
    if args.geneval_folder:
        others = ["geneval"]
        if not args.detector:
            raise UserError(f"--geneval_folder {args.geneval_folder} is scored here: "
                            "add --detector mask2former, or shapes")
    named = [args.benchmark] if args.benchmark else args.metrics
    names = [name for name in named if name in BENCHMARKS]
    return load_benchmarks(args, names, device, load_detector, others)


def export_student(args, device):
    if len(args.ckpt) != 1:
        raise UserError(f"--export {args.export} writes one student: name it by --ckpt PATH")
    draw = next(models(args, device)).make_images
    export(*draw.args, args.export, **draw.keywords)
    print(f"wrote {args.export}: torch.export.load({args.export!r}).module() maps rows of "
          "conditions to images")


def main(args):
    check_device(args.device)
    device = join_processes(args.device)
    os.makedirs(args.out, exist_ok=True)
    if args.export:
        return export_student(args, device)
    benchmarks = benchmarks_of(args, device)
    space = load_feature_space(args, device)          # (Inception, real side), or None
    if args.save_reference:
        return

    gpu = device.type == "cuda"
    system = dict(dtype="bf16" if args.bf16 else "fp32",
                  device=torch.cuda.get_device_name(device) if gpu else "cpu",
                  torch=torch.__version__)
    rows = []
    for row in all_rows(args, space, benchmarks, device):
        if "inception" in row:
            row["note"] = small_print(row)
        row |= system
        rows.append(row)
        if is_main():                                 # at once: a later crash must not cost it
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            append_rows(f"{args.out}/results.jsonl", [row | {"time": now}])

    if is_main():
        text = report(rows)
        print(text)
        for name, content in (("table.md", text), ("table.json", json.dumps(rows, indent=1))):
            with replacing(f"{args.out}/{name}") as f:
                f.write(f"{content}\n".encode())


# -------------------------------------------------------------------------------------- the flags
def flags():
    ap = parser(__doc__)

    add = ap.add_argument_group("what to evaluate").add_argument
    add("--ckpt", nargs="+", default=[], metavar="PATH",
        help="students: checkpoints of train.py, or bare weights")
    add("--teacher", help=f"one of {', '.join(SPECS)}; bare weights are a student of it, too")
    add("--steps", nargs="+", type=positive_int,
        help="evaluate the teacher at these numbers of steps (default: its published one without "
             "--ckpt, none with it)")
    add("--reconstruction", action="store_true",
        help="evaluate the tokenizer, on the raw real images")
    add("--export", metavar="FILE",
        help="write the student and its decoder as one file of torch.export; draw nothing")
    add("--prompts", metavar="FILE",
        help="what to draw with a text teacher, one prompt per line, taken in turn (default: "
             "assets/prompts.txt, or a tiny world's own)")
    add_teacher_files(add)

    add = ap.add_argument_group("how to sample (default: what the checkpoint says; the teacher's "
                                "own)").add_argument
    add("--temperature", nargs="+", type=nonnegative,
        help="temperatures of a student's softmax, one row each; 0 is argmax")
    add("--init_ratio", type=share, help="share of masked units in a student's start")
    add("--noise", type=share, help="embedding perturbation of a student's start")
    add("--guidance", type=number(-100, 1000),
        help="guidance scale of the teacher, as its authors count it (teachers.py, *_plan)")
    add("--teacher_temperature", type=nonnegative,
        help="noise on the confidence that orders the teacher's tokens")
    add("--order", choices=["confidence", "halton"], default="confidence",
        help="which of the teacher's tokens are kept first: its surest, or places by a Halton "
             "sequence (default: %(default)s)")

    add = ap.add_argument_group(
        "FID by the Inception network: with --reference or --real").add_argument
    add("--reference", metavar="PATH",
        help="real side: .npz of mu and sigma (for prdc also arr_0, images, or features); adm "
             "fetches ADM's of ImageNet, and is its default with --metrics")
    add("--real", metavar="FOLDER",
        help="real side: images; with --reconstruction, what is reconstructed")
    add("--save_reference", metavar="PATH",
        help="write the statistics of --real, a later --reference; draw nothing")
    add("--fake", metavar="FOLDER", help="judge the images in it, draw nothing")
    add("--inception", metavar="PATH",
        help="its weights, plain or TorchScript; or what to fetch: "
             f"{' or '.join(INCEPTION)} (default: plain)")
    add("--resize", choices=RESIZES,
        help=f"resize to 299 px, as clean-fid calls it (default: {RESIZES[0]}; clean for COCO and "
             "MJHQ)")
    add("--crop", action="store_true",
        help="both sides to the central square and 256 px first (COCO-30k)")

    add = benchmark_flags(ap)
    add("--benchmark", choices=BENCHMARKS,
        help="--metrics of one: draw it, write images below OUT, score them")
    add("--geneval_folder", metavar="DIR",
        help="score this folder of GenEval's layout by --detector, draw nothing")
    add("--hps_version", choices=HPS, default="v2.1",
        help="hps: which of its two networks scores (default: %(default)s)")
    add_weights(add, "hps")

    add = ap.add_argument_group("how to measure").add_argument
    add("--metrics", nargs="+", default=[], choices=[*METRICS, *BENCHMARKS],
        help="fid, is (Inception Score), prdc (precision, recall, density, coverage): all three by "
             "default; and clip, hps, geneval, the benchmarks of text to image, which have their "
             "own prompts")
    add("--n", "--n_images", type=positive_int,
        help="images per row (default: 5000; by Inception 50000, or all prompts; benchmarks have "
             "their own). torchrun takes --n for its own: write --n_images")
    add("--batch", type=positive_int,
        help="images per batch of one process (default: 250, fewer where images are large)")
    add("--seed", type=number(0, 2**32, int), default=0,
        help="seed of everything random (default: %(default)s)")
    add("--out", default="out/evaluate",
        help="folder of results.jsonl (appended), tables and sheet.png (default: %(default)s)")
    add_device(add)
    add("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="networks in bfloat16 (default: where there is a GPU); decoder and features stay in "
             "float32")
    return ap


if __name__ == "__main__":
    guard(lambda: main(flags().parse_args()), cannot_write="see --out and --save_reference")
