"""The text-to-image benchmarks that evaluate.py runs: GenEval, HPS v2, CLIP score.

Each is a function that reads what the benchmark needs and returns a `Benchmark`: prompts, and what
to do with their images: write them where the official programs look, and score them.
`load_benchmarks` makes them from the flags, and `run_benchmark` draws and scores one. The rules of
GenEval are in metrics/geneval.py.
"""

import json
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from data.prompts import read_prompts
from machinery.errors import UserError, explain
from machinery.files import fingerprint
from machinery.pictures import picture, save_images
from machinery.processes import is_main
from metrics.engine import scored
from metrics.geneval import (
    Detector, color_classifier, expect, geneval_table, read_geneval, read_metadata, write_geneval
)
from networks.clip import CLIP_G, CLIP_H, CLIP_L, ClipReward, preprocess_longest, preprocess_pil
from networks.inception import coco_crop
from networks.mask2former import CLASSES, load_mask2former, mask2former
from networks.text import byte_pairs
from reward import load_model
from teachers import SPECS


RANDOM = "random weights: the numbers of this benchmark say nothing"
OTHER_DETECTOR = (
    "transformers' Mask2Former detects: not comparable with published GenEval, "
    "whose detector is another"
)
TINY_CLIP = dict(                                        # to try the code without files
    embed_dim=16,
    vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=16),
    text_cfg=dict(width=16, heads=1, layers=1),
)


class Benchmark(NamedTuple):
    """Prompts, and what becomes of their images."""

    prompts: list            # one per image
    lay: Callable            # lay(folder) makes the folders for the images; they must be new
    score: Callable          # score(folder, part, pictures) -> (b,): of prompts[part], a slice
    row: Callable            # row(scores (n,) of all images) -> what a row of results says


# -------------------------------------------------------------------- the networks that score
def load_clip(args, name, config, device):
    """(a frozen CLIP that measures cosines, what rows say of it).

    With --random_weights and no file of its own it is tiny and random.
    """
    path = getattr(args, f"{name}_weights")
    tiny = args.random_weights and not path
    if tiny:
        config = TINY_CLIP
    model = load_model(name, lambda: ClipReward(config, name), path, tiny)
    model.to(device).eval().requires_grad_(False)
    model.scaled = False
    if tiny:
        return model, {f"{name}_weights": "random", "note": RANDOM}
    return model, {f"{name}_weights": fingerprint(model)}


def mask2former_detector(args, device):
    """The Detector of --detector mask2former."""
    net = load_mask2former(args.detector_weights, args.random_weights, device)
    model, facts = load_clip(args, "clip_l", CLIP_L, device)
    kind, facts["note"] = "transformers", OTHER_DETECTOR
    if args.random_weights and not (args.detector_weights and args.clip_l_weights):
        kind, facts["note"] = "random", RANDOM
    facts["detector"] = f"{kind} mask2former {fingerprint(net)}"
    return Detector(mask2former(net, device), color_classifier(model, device), CLASSES, facts)


def load_checked(args, metadata, device, load_detector):
    """The Detector of --detector; UserError where it does not know a class that is asked for."""
    detector = Detector(*load_detector(args, device))
    for line in metadata:
        for clause in line["include"] + line.get("exclude", []):
            if clause["class"] not in detector.classes:
                raise UserError(
                    f"--detector {args.detector} does not know the class {clause['class']!r} of "
                    f"{line['prompt']!r}; it knows {', '.join(detector.classes)}"
                )
    return detector


# ------------------------------------------------------------------------------------ GenEval
def geneval(args, path, device, load_detector):
    """Images in GenEval's layout, for its own programs; with --detector also scored here."""
    lines, per_prompt = read_metadata(path), args.per_prompt
    metadata = [line for line in lines for _ in range(per_prompt)]       # of each image
    detector = load_checked(args, lines, device, load_detector) if args.detector else None

    def lay(folder):
        write_geneval(folder, lines)

    def score(folder, part, pictures):
        for i, img in enumerate(pictures, part.start):
            img.save(f"{folder}/{i // per_prompt:05d}/samples/{i % per_prompt:05d}.png")
        if not detector:
            return [False] * len(pictures)
        return [detector.is_right(line, img) for line, img in zip(metadata[part], pictures)]

    def row(scores):
        if not detector:
            return {"per_prompt": per_prompt, "geneval": None}
        verdicts = zip([line["tag"] for line in metadata], scores.tolist())
        return {"per_prompt": per_prompt, **geneval_table(verdicts), **detector.facts}

    return Benchmark([line["prompt"] for line in metadata], lay, score, row)


# ------------------------------------------------------------------------------------- HPS v2
# What people prefer, by a CLIP trained on their choices, on 3,200 prompts in four styles (Wu et al.
# 2023). A score is 100 cos of image and prompt. HPS v2.0 and v2.1 are different networks, and their
# scores do not compare: always say which one it was (here v2.1).
HPS_STYLES = "anime concept-art paintings photo".split()
PER_STYLE = 800                                          # prompts


def read_hps(folder):
    """The 3,200 prompts in the folder `benchmark` of the data set zhwang/HPDv2, style by style."""
    prompts = []
    for style in HPS_STYLES:
        path = f"{folder}/{style}.json"
        with explain(
            f"cannot read {path} ({{}}): expected HPDv2's folder `benchmark`, "
            "with anime.json, concept-art.json, paintings.json, photo.json",
            OSError, ValueError, TypeError,
        ):
            lines = json.loads(Path(path).read_text("utf-8"))
            kinds = [type(line) for line in lines]
            expect(kinds == [str] * PER_STYLE, f"{PER_STYLE} strings, got {len(lines)} entries")
        prompts += lines
    return prompts


def hps_table(scores):
    """What a row says about the scores (3200,), rounded as the package hpsv2 prints them.

    A style's deviation is the one of its ten means, each of 80 consecutive prompts (population),
    not the one of its images.
    """
    blocks = scores.reshape(4, 10, 80).mean(2)           # (style, block)
    average = round(blocks.mean().item(), 2)
    means, stds, words = {}, {}, []
    for style, block in zip(HPS_STYLES, blocks):
        means[style] = round(block.mean().item(), 2)
        stds[style] = round(block.std(correction=0).item(), 4)
        words.append(f"{style} {means[style]:.2f} ({stds[style]:.4f})")
    note = f"HPS v2.1, not comparable with v2.0: {', '.join(words)}, averaged {average:.2f}"
    return {"hps": average, **means, "hps_version": "v2.1", "hps_std": stds, "note": note}


def hps(args, path, device, load_detector):
    """HPS v2's 3,200 prompts, scored by the v2.1 weights from the JPEGs as written.

    # choice: in float32; hpsv2 itself computes in float16 on a GPU.
    """
    prompts = read_hps(path)
    model, facts = load_clip(args, "hps", CLIP_H, device)

    def lay(folder):
        for style in HPS_STYLES:
            save_images(f"{folder}/{style}", (), "jpg")

    def score(folder, part, pictures):
        pixels = []
        for i, img in enumerate(pictures, part.start):
            path = f"{folder}/{HPS_STYLES[i // PER_STYLE]}/{i % PER_STYLE:05d}.jpg"
            img.save(path, quality=75)                   # PIL's default: published scores had it
            pixels.append(pil_to_tensor(Image.open(path)))
        pixels = preprocess_longest(torch.stack(pixels).to(device) / 255, model.size)
        return 100 * model(pixels, model.tokenize(prompts[part]).to(device))

    def row(scores):
        row = facts | hps_table(scores)
        if "note" in facts:
            row["note"] += f"; {RANDOM}"
        return row

    return Benchmark(prompts, lay, score, row)


# --------------------------------------------------------------------------------- CLIP score
# It is drawn for two lists of 30,000 prompts, and so is a FID.
#
# COCO-30k: a fixed list of 30,000 captions (DMD2's captions_coco14_test.txt), one image each. FID
# compares with *all* 40,504 images of val2014, and both sides go through `coco_crop` to 256 px,
# then `clean_resize` to Inception's 299 (networks/inception.py). MJHQ-30k: its 30,000 prompts
# against its 30,000 images, by `clean_resize` alone; the paper mentions no crop. `evaluate.py
# --benchmark clip --save_images` writes the generated side of either.
def clip_score_tokens(captions):
    """Token ids (n, 77) of "A photo depicts" and the caption (as in DMD2's coco_evaluator.py).

    The caption alone is cut to 77 ids. Then the three words are pushed in behind its start, and
    what now stands last becomes an end. (Unless that is a "!" amid punctuation: its id, 0, passes
    for padding. Published scores were computed with this flaw, so it stays.)
    """
    ids = byte_pairs()(captions, 77)                     # start, byte pairs, end, then zeros
    words = torch.tensor([320, 1125, 29340]).expand(len(ids), 3)
    ids = torch.cat([ids[:, :1], words, ids[:, 1:74]], 1)
    ids[ids[:, 76] > 0, 76] = 49407
    return ids


def clip_score(args, path, device, load_detector):
    """The mean cosine, not times 100, of ViT-g-14's features of an image and of its caption."""
    captions = read_prompts(path, "--metadata", numbered=True)
    model, facts = load_clip(args, "clip_g", CLIP_G, device)

    def lay(folder):
        if args.save_images:
            save_images(folder, (), "png")

    def score(folder, part, pictures):
        crops = [Image.fromarray(coco_crop(img)) for img in pictures]
        if args.save_images:
            images = crops if args.save_images == "cropped" else pictures
            for i, img in enumerate(images, part.start):
                img.save(f"{folder}/{i:05d}.png")
        pixels = torch.stack([preprocess_pil(img, model.size) for img in crops])
        return model(pixels.to(device), clip_score_tokens(captions[part]).to(device))

    def row(scores):
        return {"clip_score": scores.mean().item(), **facts}

    return Benchmark(captions, lay, score, row)


# ------------------------------------------------------------------------------- running them
BENCHMARKS = {                                           # name: (its function, its --metadata)
    "geneval": (geneval, "GenEval's evaluation_metadata.jsonl"),
    "hps": (hps, "HPDv2's folder `benchmark`"),
    "clip": (clip_score, "a caption a line"),
}
READ_BY = {                                              # flag: the only benchmark that reads it
    "detector": "geneval",
    "detector_weights": "geneval",
    "clip_l_weights": "geneval",
    "hps_weights": "hps",
    "clip_g_weights": "clip",
}


def expect_text(spec, benchmark):
    if spec.text is None:
        raise UserError(
            f"--benchmark {benchmark} draws prompts, and {spec.name} draws classes: take a teacher "
            "with a text encoder, such as --teacher maskgen or meissonic-tiny, or a student of one"
        )


def expect_flags(args, names):
    """UserError for flags that do not belong to the benchmarks called `names`."""
    paths = args.metadata or []
    if args.benchmark and args.metrics:
        raise UserError(
            f"--benchmark {args.benchmark} is short for --metrics {args.benchmark}: "
            "give one of the two"
        )
    if paths and not names:
        raise UserError(f"--metadata {paths[0]} belongs to --benchmark {' or '.join(BENCHMARKS)}")
    running = [*names, "geneval"] if args.geneval_folder else names
    for flag, reader in READ_BY.items():
        value = getattr(args, flag)
        if value and reader not in running:
            raise UserError(f"--{flag} {value} belongs to --benchmark {reader}")
    if args.geneval_folder and not args.detector:
        raise UserError(
            f"--geneval_folder {args.geneval_folder} is scored here: "
            "add --detector mask2former, or shapes"
        )
    if names and not paths:
        raise UserError(f"--benchmark {names[0]} needs --metadata PATH: {BENCHMARKS[names[0]][1]}")
    if len(paths) != len(names):
        raise UserError(
            f"--metadata: expected a path for each of {', '.join(names)}, in this order, "
            f"got {len(paths)}"
        )


def load_benchmarks(args, device, load_detector):
    """{name: Benchmark} of --benchmark, or of those in --metrics, each with its own --metadata.

    load_detector(args, device) -> Detector, for --detector. Everything that the benchmarks read is
    read and checked here.
    """
    named = [args.benchmark] if args.benchmark else args.metrics or []
    names = [name for name in named if name in BENCHMARKS]
    expect_flags(args, names)
    if names and args.teacher in SPECS:
        expect_text(SPECS[args.teacher], names[0])       # before anything large is read
    return {
        name: BENCHMARKS[name][0](args, path, device, load_detector)
        for name, path in zip(names, args.metadata or [])
    }


def run_benchmark(bench, teacher, make_images, folder, **how):
    """Draw an image per prompt, write them below `folder`, score them: a row of results.

    how: batch=, seed= and desc=, as `metrics.engine.scored` takes them.
    """
    if is_main():
        bench.lay(folder)                                # `scored` waits for it before it draws

    def score(part, img):
        scores = bench.score(folder, part, [picture(pixels) for pixels in img])
        return torch.as_tensor(scores)[:, None]          # (b, 1)

    asked = teacher.conditions(bench.prompts)
    scores, facts = scored(make_images, asked, score, 1, **how)
    row = {"n": len(asked), **bench.row(scores[:, 0].cpu()), **facts}
    if Path(folder).is_dir():
        row["folder"] = folder
    return row


def geneval_folder(args, device, load_detector):
    """The row of --geneval_folder, which this or any other program wrote in GenEval's layout."""
    folder = args.geneval_folder
    metadata = [line for line, _ in read_geneval(folder)]        # is all of it readable?
    detector = load_checked(args, metadata, device, load_detector)
    verdicts = []
    for line, images in tqdm(read_geneval(folder), "GenEval", len(metadata), leave=False):
        verdicts += [(line["tag"], detector.is_right(line, img)) for img in images]
    if not verdicts:
        raise UserError(
            f"--geneval_folder {folder}: no images; expected <index>/samples/<n>.png in it"
        )
    return {
        "model": folder, "kind": "folder", "n": len(verdicts),
        **geneval_table(verdicts), **detector.facts,
    }
