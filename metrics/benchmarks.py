"""Benchmarks that evaluate.py runs."""

import functools
import itertools
import os
from typing import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.prompts import read_prompts
from machinery.errors import UserError
from machinery.files import fingerprint
from machinery.pictures import picture, save_images
from machinery.processes import barrier, is_main
from metrics.clip_score import clip_score_tokens
from metrics.engine import scored
from metrics.geneval import color_judge, geneval, geneval_table, read_geneval, read_metadata, verdict, write_geneval
from metrics.hps import HPS_STYLES, JPEG, hps_benchmark, read_hps, write_hps
from networks.clip import CLIP_G, CLIP_H, CLIP_L, ClipReward, preprocess_longest, preprocess_pil
from networks.inception import coco_crop
from networks.mask2former import CLASSES, load_mask2former, mask2former
from reward import load_model
from teachers import SPECS


RANDOM = "random weights: the numbers of this benchmark say nothing"
TINY_CLIP = dict(embed_dim=16, vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=16),
                 text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=1, layers=1))       # to try the code


def load_clip(args, name, config, device):
    """(a frozen CLIP that measures, what rows say of it); tiny and random if --random_weights has no file for it."""
    path = getattr(args, f"{name}_weights")
    tiny = args.random_weights and not path
    model = load_model(name, functools.partial(ClipReward, TINY_CLIP if tiny else config, name), path, tiny)
    model = model.to(device).eval().requires_grad_(False)
    return model, {f"{name}_weights": "random" if tiny else fingerprint(model), **(dict(note=RANDOM) if tiny else {})}


def mask2former_detector(args, device):
    """(detector, color_of, the classes they know, what rows say of them) for --detector mask2former."""
    note = "transformers' Mask2Former detects: not comparable with published GenEval, whose detector is another"
    net = load_mask2former(args.detector_weights, args.random_weights, device)
    model, said = load_clip(args, "clip_l", CLIP_L, device)
    random = args.random_weights and not (args.detector_weights and args.clip_l_weights)
    said.update(detector=f"{'random' if random else 'transformers'} mask2former {fingerprint(net)}",
                note=RANDOM if random else note)
    return mask2former(net, device), color_judge(model, device), CLASSES, said


class Benchmark(NamedTuple):
    """What to draw, where it is written, how it is judged."""

    prompts: list                 # one an image
    lay: Callable                 # lay(folder): the folders below it, still without images
    score: Callable               # score(folder, slice, [PIL pictures]) -> (b,): writes these images, and judges them
    row: Callable                 # row(scores (n,) of all images) -> what a row of results says


def expect_classes(metadata, classes, detector):
    """Complain of prompts about what the detector cannot find: they would count as wrong."""
    for line in metadata:
        if unknown := {c["class"] for c in [*line["include"], *line.get("exclude", [])]} - set(classes):
            raise UserError(f"--detector {detector} does not know the class {min(unknown)!r} of {line['prompt']!r}; it "
                            f"knows {', '.join(classes)}")


def geneval_benchmark(args, path, device, load_detector):
    """Four images a prompt in GenEval's layout, for its own programs; with --detector scored here, too."""
    metadata, per, detector, said = read_metadata(path), args.per_prompt, None, {}
    if args.detector:
        detector, color_of, classes, said = load_detector(args, device)
        expect_classes(metadata, classes, args.detector)
    metadata = [line for line in metadata for _ in range(per)]                                # one an image

    def score(folder, part, pictures):
        right = []
        for i, img in zip(range(len(metadata))[part], pictures):
            img.save(os.path.join(folder, f"{i // per:05d}", "samples", f"{i % per:05d}.png"))
            right.append(detector and verdict(metadata[i], detector(img), functools.partial(color_of, img))[0])
        return [float(bool(r)) for r in right]

    def row(scores):
        right = ((line["tag"], r) for line, r in zip(metadata, scores.tolist()))
        return {"per_prompt": per, **(geneval_table(right) if detector else {"geneval": None}), **said}

    lay = lambda folder: write_geneval(folder, metadata[::per], itertools.repeat((), len(metadata) // per))
    return Benchmark([line["prompt"] for line in metadata], lay, score, row)


def geneval_folder(args, device, load_detector):
    """The row of a folder that `write_geneval`, or any other program, wrote."""
    detector, color_of, classes, said = load_detector(args, device)
    lines = [line for line, images in read_geneval(args.geneval_folder) for _ in images]      # is all of it readable?
    expect_classes(lines, classes, args.detector)
    if not lines:
        raise UserError(f"--geneval_folder {args.geneval_folder}: no images; expected <index>/samples/<n>.png in it")
    rows = tqdm(geneval(args.geneval_folder, detector, color_of), "GenEval", len(lines), unit="image", leave=False)
    return {"model": args.geneval_folder, "kind": "folder", "n": len(lines), **geneval_table(rows), **said}


def hps_v2_benchmark(args, path, device, load_detector):
    """HPS v2's 3,200 prompts, scored by the v2.1 weights from the JPEGs as written.

    # choice: in float32; hpsv2 itself computes in float16 on a GPU.
    """
    prompts = read_hps(path)
    model, said = load_clip(args, "hps", CLIP_H, device)
    places, prompts = [(s, i) for s in HPS_STYLES for i in range(800)], [p for s in HPS_STYLES for p in prompts[s]]

    def score(folder, part, pictures):
        read = []
        for (style, i), img in zip(places[part], pictures):
            path = os.path.join(folder, style, f"{i:05d}.jpg")
            img.save(path, **JPEG)
            read.append(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1))        # what JPEG left of it
        pixels = preprocess_longest(torch.stack(read).to(device).float() / 255, model.size)
        return 100 * model(pixels, model.tokenize(prompts[part]).to(device))                  # 100 cos

    def row(scores):
        table = hps_benchmark(dict(zip(HPS_STYLES, scores.split(800))))
        average, words = table.pop("averaged"), [f"{s} {mean:.2f} ({std:.4f})" for s, (mean, std) in table.items()]
        note = f"HPS v2.1, not comparable with v2.0: {', '.join(words)}, averaged {average:.2f}"
        return {"hps": average, **{s: mean for s, (mean, _) in table.items()}, "hps_version": "v2.1",
                "hps_std": {s: std for s, (_, std) in table.items()}, **said,
                "note": f"{note}; {said['note']}" if "note" in said else note}

    lay = lambda folder: [write_hps(folder, style, ()) for style in HPS_STYLES]
    return Benchmark(prompts, lay, score, row)


def clip_benchmark(args, path, device, load_detector):
    """CLIP score: the mean cosine, not times 100, of ViT-g-14's features of an image and of its caption."""
    captions = read_prompts(path, "--metadata", numbered=True)
    model, said = load_clip(args, "clip_g", CLIP_G, device)

    def score(folder, part, pictures):
        crops = [Image.fromarray(coco_crop(img)) for img in pictures]
        for i, img in zip(range(len(captions))[part], {"cropped": crops, "whole": pictures}.get(args.save_images, ())):
            img.save(os.path.join(folder, f"{i:05d}.png"))
        f = model.image_features(torch.stack([preprocess_pil(img, model.size) for img in crops]).to(device))
        return (f * model.text_features(clip_score_tokens(captions[part]).to(device))).sum(-1)

    lay = lambda folder: args.save_images and save_images(folder, (), "png")
    return Benchmark(captions, lay, score, lambda scores: {"clip_score": scores.mean().item(), **said})


BENCHMARKS = {"geneval": (geneval_benchmark, "GenEval's evaluation_metadata.jsonl"),
              "hps": (hps_v2_benchmark, "HPDv2's folder `benchmark`"), "clip": (clip_benchmark, "a caption a line")}


def expect_text(spec, benchmark):
    if spec.text is None:
        texts = ", ".join(name for name, other in SPECS.items() if other.text)
        raise UserError(f"--benchmark {benchmark} draws prompts, and {spec.name} draws classes: take --teacher "
                        f"{texts}, or a student of one of them")


def load_benchmarks(args, device, load_detector):
    """{name: Benchmark} of --benchmark, or of those in --metrics, each with its own --metadata, in their order.

    Everything that they read is read and checked here.
    """
    names = [args.benchmark] if args.benchmark else [name for name in args.metrics or () if name in BENCHMARKS]
    if args.benchmark and args.metrics:
        raise UserError(f"--benchmark {args.benchmark} is short for --metrics {args.benchmark}: give one of the two")
    uses = dict(metadata="geneval hps clip", detector="geneval", detector_weights="geneval", clip_l_weights="geneval",
                hps_weights="hps", clip_g_weights="clip")
    for flag, users in uses.items():
        if getattr(args, flag) and not {*names, args.geneval_folder and "geneval"} & {*users.split()}:
            words = args.metadata[0] if flag == "metadata" else getattr(args, flag)
            raise UserError(f"--{flag} {words} belongs to --benchmark {' or '.join(users.split())}")
    if args.geneval_folder and not args.detector:
        raise UserError(f"--geneval_folder {args.geneval_folder} is scored here: add --detector mask2former, or shapes")
    if args.save_images and {"geneval", "hps"} & {*names}:
        raise UserError("--save_images: geneval and hps write their images anyway; it belongs to clip and to FID")
    paths = args.metadata or []
    if names and not paths:
        raise UserError(f"--benchmark {names[0]} needs --metadata PATH: {BENCHMARKS[names[0]][1]}")
    if len(paths) != len(names):
        raise UserError(f"--metadata: expected a path for each of {', '.join(names)}, in this order, got {len(paths)}")
    if (teacher := args.teacher or (None if args.ckpt else "maskbit-tiny")) in SPECS and names:
        expect_text(SPECS[teacher], names[0])         # before anything large is read
    return {name: BENCHMARKS[name][0](args, path, device, load_detector) for name, path in zip(names, paths)}


def run_benchmark(bench, teacher, make_images, folder, batch=250, seed=0, desc=None):
    """Draw an image a prompt, write them below `folder`, judge them: a row. Sharded and seeded as in `image_metrics`."""
    if is_main():
        bench.lay(folder)
    barrier()                                # the others write into what the first has laid out
    rows = teacher.conditions(bench.prompts)

    def score(part, img):
        return torch.as_tensor(bench.score(folder, part, [picture(p) for p in img]))[:, None]

    scores, facts = scored(make_images, rows, score, 1, batch, seed, desc)
    written = {"folder": folder} if os.path.isdir(folder) else {}
    return {"n": len(rows), **bench.row(scores[:, 0].cpu()), **facts, **written}
