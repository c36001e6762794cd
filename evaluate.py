"""How good are the images? FID, Inception Score, precision, recall, density, coverage, and the speed.

All compare features of N generated images with features of real ones. With mean mu and covariance S of each set,

    FID = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))          lower is better, 0 for equal Gaussians
    IS  = exp(mean KL(p(y|x) || p(y)))                                   sharp and diverse, as a classifier sees it
    precision, recall       share of fakes inside some real's ball of k neighbors, and the other way round
    density, coverage       the same, counting balls, so outliers weigh little; share of real balls with a fake in

None of these is a property of a model alone. FID falls as N grows (below 10,000 by more than papers argue about),
and it depends on the feature network, the reference images, the resize, the rounding of pixels (truncated to uint8, or
rounded, as each teacher's authors do), temperature, guidance, the seed and the labels (here every class equally often).
So every row of results.jsonl holds all of them, with hashes: compare rows that differ in one.

Published FIDs rest on the Inception network of 2015 (`Inception`) and on statistics of real images: `--reference`, an
.npz with mu and sigma (`adm` fetches ADM's of ImageNet), or `--real`, a folder. Either switches Inception on.

The tiny world has its own feature network, a small classifier (`data.fashion.FashionNet`). Its features are means
and standard deviations of the maps of *all* layers: the last layer alone hardly sees texture, and texture is what
betrays tokens that were drawn independently. Its FIDs compare only with each other. Where real images stand, the
floor, says assets/fashion/classifier.json.

    python evaluate.py --ckpt out/run/ckpt.pt --steps 1 16       # a student, and its teacher beside it
    python evaluate.py --ckpt out/run/ckpt.pt --temperature 0 0.5 1          # a sweep; 0 is argmax (Tab. 14)
    python evaluate.py --steps 1 2 4 8 16                        # the teacher alone
    python evaluate.py --teacher maskgit --steps 8 --order halton             # a published one; Tab. 2's baseline
    torchrun --nproc_per_node=4 evaluate.py --ckpt ... --metrics fid is prdc # ImageNet: 50,000 images, ADM's reference
    python evaluate.py --ckpt A B --steps 8 16 --temperature 0 0.5 1         # one table: OUT/table.md, table.json
    python evaluate.py --real val2014 --crop --resize clean --save_reference coco.npz        # once, for COCO-30k
    python evaluate.py --fake FOLDER --reference coco.npz --crop --resize clean              # pictures that are there
    python evaluate.py --ckpt ... --metrics clip hps geneval --metadata captions.txt HPDv2/benchmark metadata.jsonl
    python evaluate.py --teacher meissonic-tiny --steps 1 16     # GenEval on the world of shapes, and a CLIP's score
    python evaluate.py --ckpt ... --benchmark geneval --metadata evaluation_metadata.jsonl --detector mask2former
    python evaluate.py --ckpt ... --benchmark hps --metadata HPDv2/benchmark                 # and clip, captions.txt
    python evaluate.py --ckpt out/run/ckpt.pt --export student.pt2           # one file that runs without this code
    python evaluate.py --reconstruction                          # the tokenizer: what limits every student
    python evaluate.py --reconstruction --teacher maskgit --real imagenet/val                # rFID and PSNR of another
"""

import argparse
import functools
import json
import math
import os
import re
import time

import torch

from data.images import folder_images
from data.prompts import read_prompts
from machinery.errors import UserError, guard
from machinery.files import fingerprint, replacing
from machinery.flags import check_device, number
from machinery.pictures import sheet, spread
from machinery.processes import all_reduce, is_main, join_processes
from metrics.benchmarks import BENCHMARKS, expect_text, geneval_folder, load_benchmarks, run_benchmark
from metrics.engine import extracted, in_turn
from metrics.fid import METRICS, image_metrics
from metrics.reference import Reference, load_feature_space
from metrics.tables import published, report, small_print
from networks.inception import INCEPTION, RESIZES
from teachers import FILES, SPECS, decode_tokens, export, fixed_sample, generate_student, generate_teacher, load_student, load_teacher, to_bytes
from worlds.fashion import load_extractor, load_images
from worlds.judges import load_detector, load_judge


def reconstruction(teacher, device, n, batch, measure=None, folder=None):
    """Rows for real images, and for decode(encode(them)) with PSNR: the tokenizer bounds the student (App. D).

    Of Fashion-MNIST, or, with measure = (Inception, Reference or None), of n images spread over `folder`, resized and
    center-cropped to the teacher's size; without a Reference, FID is between them and themselves before (rFID).
    PSNR is of the mean squared error over all images. MaskGen's decoder is told NAME.txt beside an image, or "".
    """
    spec, says = teacher.spec, lambda i: ()
    if measure:
        net, reference = measure
        names, make, complain = folder_images(folder, "--real", spec.image)
        sources = [(folder, torch.arange(len(names)), lambda i, **_: torch.stack(make(i)).to(device))]
        if teacher.text:
            said = [os.path.splitext(name)[0] + ".txt" for name in names]
            said = teacher.conditions([read_prompts(path)[0] if os.path.exists(path) else "" for path in said])
            says = lambda i: teacher.cond(said[i])
    else:
        (net, reference), complain = load_extractor(spec, device), lambda: None
        if net is None:
            raise UserError(f"--reconstruction reads Fashion-MNIST, which {spec.name} does not know: for other images "
                            "add --real FOLDER")
        sources = []
        for split in ("train", "t10k"):
            img = torch.from_numpy(load_images(split)[0])
            sources.append((split, torch.arange(len(img)), lambda i, img=img, **_: img[i.cpu()].to(device)))
    for split, rows, real in sources:
        rows = rows[:: max(1, len(rows) // n)][:n].to(device)
        error = torch.zeros((), dtype=torch.float64, device=device)

        def rebuild(i, **_):
            img, cond = real(i), says(i)
            x = teacher.tokenizer.encode(img.float() / 255)
            back = to_bytes(decode_tokens(teacher.tokenizer, x, cond), spec)
            error.add_((back.double() - img).square().sum())
            return back

        if reference is None:
            features, _, mu, sigma, _ = extracted(real, rows, net, batch=batch, desc=f"real {split}")
            reference = Reference(mu, sigma, features, f"the same {len(rows):,} images before")
            complain()
            models = [(f"{split} reconstructed", rebuild)]
        else:
            models = [(f"real {split}", real), (f"{split} reconstructed", rebuild)]
        for model, make_images in models:
            row = image_metrics(make_images, rows, net, reference, batch, desc=model)
            complain()
            if make_images is rebuild:
                row["psnr"] = 10 * math.log10(255**2 * len(rows) * math.prod(spec.image) / all_reduce(error).item())
            yield dict(model=model, kind="real", teacher=spec.name, tokenizer=fingerprint(teacher.tokenizer), **row,
                       pixels="uint8, rounded" if spec.rounds else "uint8, truncated")


def flags():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument_group("what to evaluate").add_argument
    add("--ckpt", nargs="+", default=[], metavar="PATH", help="students: checkpoints of train.py, or bare weights")
    add("--teacher", metavar="NAME", help=f"one of {', '.join(SPECS)}; bare weights are a student of it, too")
    add("--steps", nargs="+", metavar="N", type=number(1, 4096, int),
        help="evaluate the teacher at these numbers of steps (default: its published one without --ckpt, none with it)")
    add("--reconstruction", action="store_true", help="evaluate the tokenizer, on the raw real images")
    add("--teacher_weights", metavar="PATH", help="local file instead of the published one")
    add("--tokenizer_weights", metavar="PATH", help="local file instead of the published one")
    add("--text_weights", metavar="PATH", help="local file of the text encoder instead of the published one")
    add("--text_activation", choices=["gelu", "quick_gelu"], help="of the text encoder (MaskGen's is not certain)")
    add("--export", metavar="FILE", help="write the student and its decoder as one file of torch.export; draw nothing")
    add("--random_weights", action="store_true", help="a teacher without files, to try memory and speed")
    add("--prompts", metavar="FILE", help="what to draw with a text teacher, one prompt a line, taken in turn "
        "(default: assets/prompts.txt, or a tiny world's own)")

    add = ap.add_argument_group("how to sample (default: what the checkpoint says; the teacher's own)").add_argument
    add("--temperature", nargs="+", type=number(0), metavar="T", help="of a student's softmax, a row each")
    add("--init_ratio", type=number(0, 1), help="share of masked units in a student's start")
    add("--noise", type=number(0, 1), help="embedding perturbation of a student's start")
    add("--guidance", type=number(-100, 1000), help="the teacher's scale, as its authors count it (py, *_plan)")
    add("--teacher_temperature", type=number(0), help="noise on the confidence that orders the teacher's tokens")
    add("--order", choices=["confidence", "halton"], default="confidence",
        help="which of the teacher's tokens are kept first: its surest, or places by a Halton sequence")

    add = ap.add_argument_group("which numbers").add_argument
    add("--metrics", nargs="+", choices=[*METRICS, *BENCHMARKS], metavar="NAME",
        help="fid, is (Inception Score), prdc (precision, recall, density, coverage): all three by default; and clip, "
        "hps, geneval, the benchmarks of text to image, which have their own prompts")

    add = ap.add_argument_group("FID by the Inception network: with --reference or --real").add_argument
    add("--reference", metavar="PATH", help="real side: .npz of mu and sigma (for prdc also arr_0, images, or features)"
        "; adm fetches ADM's of ImageNet, and is its default with --metrics")
    add("--real", metavar="FOLDER", help="real side: images; with --reconstruction, what is reconstructed")
    add("--save_reference", metavar="PATH", help="write the statistics of --real, a later --reference; draw nothing")
    add("--fake", metavar="FOLDER", help="judge the images in it, draw nothing")
    add("--inception", metavar="PATH", help="its weights, plain or TorchScript; or what to fetch: "
        f"{' or '.join(INCEPTION)} (plain)")
    add("--resize", choices=RESIZES, help=f"to 299 px, as clean-fid calls it ({RESIZES[0]}; clean for COCO and MJHQ)")
    add("--crop", action="store_true", help="both sides to the central square and 256 px first (COCO-30k)")

    add = ap.add_argument_group("benchmarks of text to image").add_argument
    add("--benchmark", choices=list(BENCHMARKS), help="--metrics of one: draw it, write images below OUT, score them")
    add("--metadata", nargs="+", metavar="PATH", help="its prompts, of several benchmarks in their order: "
        + "; ".join(f"{b}: {w}" for b, (_, w) in BENCHMARKS.items()))
    add("--per_prompt", type=number(1, 1000, int), default=4, help="geneval: images a prompt (%(default)s)")
    add("--detector", choices=["mask2former", "shapes"], help="geneval: score it here, too (published: mmdetection's)")
    add("--geneval_folder", metavar="DIR", help="score this folder of GenEval's layout by --detector, draw nothing")
    add("--save_images", nargs="?", const="cropped", choices=["cropped", "whole"],
        help="keep PNGs below OUT: as CLIP score sees them at 256 px (COCO-30k), or whole (MJHQ-30k); a FID's whole")
    for name in ("detector", "clip_l", "hps", "clip_g"):
        add(f"--{name}_weights", metavar="PATH", help="local " + ("folder" if name == "detector" else "file")
            + " instead of the published one")

    add = ap.add_argument_group("how to measure").add_argument
    add("--n", "--n_images", type=number(1, 10**7, int), help="images a row (5000; by Inception 50000, or all prompts; "
        "benchmarks have their own). torchrun takes --n for its own: write --n_images")
    add("--batch", type=number(1, 10**5, int), help="images a batch of one process (250, fewer where images are large)")
    add("--seed", type=number(0, 2**32, int), default=0, help="of everything random (%(default)s)")
    add("--out", default="out/evaluate", help="folder of results.jsonl (appended) and sheet.png (%(default)s)")

    add = ap.add_argument_group("system").add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--bf16", action="store_true", help="networks in bfloat16; decoder and features stay in float32")
    return ap


def models(args, device):
    """One at a time: (teacher, make_images, what a row says of them, how a student was trained)."""
    hashes = lambda t: dict(teacher=t.spec.name, teacher_weights=fingerprint(t.net), tokenizer=fingerprint(t.tokenizer),
                            **({} if t.text is None else dict(text=fingerprint(t.text))))
    name, files = args.teacher, {k: getattr(args, k) for k in FILES}
    for path in args.ckpt:
        teacher, net, config = load_student(path, args.teacher, device, **files)
        name, config, trained = name or teacher.spec.name, {**teacher.spec.student, **config}, config
        files = {k: v or config.get(k) for k, v in files.items()}
        start = {k: config[k] if getattr(args, k) is None else getattr(args, k) for k in ("init_ratio", "noise")}
        for T in args.temperature or [config["temperature"]]:
            yield (teacher, functools.partial(generate_student, teacher, net, temperature=T, **start), dict(
                model=f"student {path}", kind="student", weights=fingerprint(net), steps=1, temperature=T, **start,
                **hashes(teacher)), trained)
    if not args.steps and (args.ckpt or args.reconstruction):
        return
    teacher = load_teacher(name or "maskbit-tiny", device=device, **files)
    for N in args.steps or ([1, 2, 4, 8, 16] if teacher.spec.record else [next(iter(teacher.spec.sampling))]):
        given = dict(guidance=args.guidance, temperature=args.teacher_temperature)
        yield (teacher, functools.partial(generate_teacher, teacher, steps=N, order=args.order, **given), dict(
            model="teacher", kind="teacher", steps=N, order=args.order, **teacher.spec.settings(N, **given),
            **hashes(teacher)), {})


def main(args):
    # ------------------------------------------------------------------------------- processes and device
    check_device(args.device)
    device = join_processes(args.device)
    first = is_main()
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as err:
        raise UserError(f"--out {args.out}: cannot write there ({err.strerror})")

    system = dict(dtype="bf16" if args.bf16 else "fp32",
                  device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", torch=torch.__version__)
    if args.export:
        if len(args.ckpt) != 1:
            raise UserError(f"--export {args.export} writes one student: name it by --ckpt PATH")
        make_images = next(models(args, device))[1]
        export(*make_images.args, args.export, **make_images.keywords)
        return print(f"wrote {args.export}: torch.export.load({args.export!r}).module() maps rows of conditions to images")
    benches, measure = load_benchmarks(args, device, load_detector), load_feature_space(args, device)
    jobs = [*((None,) if args.metrics is None and not benches or {*(args.metrics or ())} & {*METRICS} else ()), *benches]
    if args.save_reference:
        return
    judged = tuple(name for name in METRICS if name in (args.metrics or METRICS))

    # ---------------------------------------------------------------------------------------- a row each
    rows, pictures = [], []

    def record(row):                                  # at once: hours of one model survive the next one's crash
        rows.append(row)
        if first:
            with open(os.path.join(args.out, "results.jsonl"), "a") as f:
                f.write(json.dumps({**row, **system, "time": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")

    if args.geneval_folder:
        record(geneval_folder(args, device, load_detector))
    if args.fake:
        names, make, complain = folder_images(args.fake, "--fake")
        rows_of = torch.arange(len(names), device=device)
        row = image_metrics(make, rows_of, *measure, args.batch or 64, desc=args.fake, metrics=judged)
        complain()
        row = {"model": args.fake, "kind": "folder", **row, "seed": None, "pixels": "as they are"}
        record({**row, "note": small_print(row)})
    if args.reconstruction:
        teacher = load_teacher(args.teacher or "maskbit-tiny", device=device, **{k: getattr(args, k) for k in FILES})
        batch = args.batch or min(250, max(1, 2**14 // teacher.net.L))
        for row in reconstruction(teacher, device, args.n or (10**7 if args.real else 5000), batch, measure, args.real):
            record({**row, "note": small_print(row)} if measure else row)
    for teacher, make_images, facts, trained in () if args.geneval_folder or args.fake else models(args, device):
        batch = args.batch or min(250, max(1, 2**14 // teacher.net.L))
        shown = [f"{k} {facts[k]:g}" for k in ("steps", "temperature", "guidance") if k in facts]
        caption = ", ".join([facts["model"], *shown])
        name = re.sub(r"[^\w.]+", "-", " ".join([teacher.spec.name, caption]))
        for job in jobs:
            bench = benches.get(job)
            if bench:
                expect_text(teacher.spec, job)
            imagenet = teacher.spec.classes == 1000 and teacher.spec.image[1] == 256
            if args.metrics and imagenet and not (bench or measure):
                args.reference = "adm"
                measure = load_feature_space(args, device)
            extractor, reference = (None, None) if bench else measure or load_extractor(teacher.spec, device)
            judge = load_judge(teacher, device) if extractor is None and bench is None else None
            if args.metrics and not (bench or extractor):
                raise UserError(f"--metrics {' '.join(judged)} of {teacher.spec.name} needs --reference PATH.npz (adm: "
                                "ADM's of ImageNet), or --real FOLDER")
            if not (bench or judge or extractor) and first:
                print(f"{teacher.spec.name}: images are drawn and timed; FID needs --reference PATH or --real FOLDER")
            prompts = (bench.prompts if bench else
                       read_prompts(args.prompts or teacher.spec.prompts) if teacher.text else None)
            conditions = teacher.conditions(prompts)
            n = args.n or (5000 if not measure else 50_000 if teacher.spec.classes else len(prompts))
            if (judge or extractor) and n < 10:
                raise UserError(f"--n {n}: statistics need 10 images at least")
            folder = os.path.join(args.out, job or "images", name)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                if bench:
                    row = run_benchmark(bench, teacher, make_images, folder, batch, args.seed, caption)
                elif judge:
                    row = judge(make_images, n, batch=batch, seed=args.seed, desc=caption)
                else:
                    row = image_metrics(make_images, in_turn(conditions, n), extractor, reference, batch, args.seed,
                                   desc=caption, metrics=judged, folder=folder if args.save_images else None)
            if teacher.spec.classes:
                row["per_class"] = n / teacher.spec.classes
            labels = (args.metadata[list(benches).index(job)] if bench else
                      "the shapes benchmark" if "geneval" in row else
                      f"{args.prompts or teacher.spec.prompts} in turn" if teacher.text else "each class in turn")
            row = {**facts, **row, "labels": labels,
                   "pixels": "uint8, rounded" if teacher.spec.rounds else "uint8, truncated"}
            if paper := published(row, trained):
                row["published"] = paper
            if measure and not bench:
                row["note"] = small_print(row)
            record(row)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            shown = min(n, 10 if teacher.spec.image[1] < 100 else 4)
            pictures.append((caption, fixed_sample(make_images, conditions, shown, args.seed)))
    if first:
        if pictures:
            words = spread(prompts, len(pictures[0][1])) if prompts else None
            sheet(pictures, os.path.join(args.out, "sheet.png"), words=words)
        lines = [f"{row['model']}: PSNR {row['psnr']:.2f} dB" for row in rows if "psnr" in row]
        text = "\n".join([report(rows), *lines])
        print(text)
        for kind, content in (("md", text), ("json", json.dumps([{**row, **system} for row in rows], indent=1))):
            with replacing(os.path.join(args.out, f"table.{kind}")) as f:
                f.write(content.encode() + b"\n")


if __name__ == "__main__":
    guard(lambda: main(flags().parse_args()))
