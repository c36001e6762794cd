"""The text-to-image benchmarks of evaluate.py and tteo.py: GenEval, HPS v2, CLIP score.

Each is a function that reads what the benchmark needs and returns a `Benchmark`: prompts, and what
to do with their images: write them where the official programs look, and score them.
`benchmark_flags` declares their flags, `load_benchmarks` makes them from these, and `run_benchmark`
draws and scores one. The rules of GenEval are in metrics/geneval.py.
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
from machinery.flags import add_weights, positive_int
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
from networks.weights import fetch
from reward import REWARDS, load_model
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
def load_clip(args, name, config, device, published=None):
    """(a frozen CLIP that measures cosines, what rows say of it).

    With --random_weights and no file of its own it is tiny and random. published: (repository,
    file) where it is another one than `load_model` knows by this name.
    """
    path = getattr(args, f"{name}_weights")
    tiny = args.random_weights and not path
    if tiny:
        config = TINY_CLIP
    elif published and not path:
        path = fetch(*published, f"--{name}_weights")
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
# scores do not compare: so their averages are columns of their own.
HPS = {                                                  # version: (column, published weights)
    "v2.1": ("hps", REWARDS["hps"]),
    "v2.0": ("hps_v2.0", ("xswu/HPSv2", "HPS_v2_compressed.pt")),
}
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


def hps_table(scores, version):
    """What a row says about the scores (3200,), rounded as the package hpsv2 prints them.

    A style's deviation is the one of its ten means, each of 80 consecutive prompts (population),
    not the one of its images.
    """
    blocks = scores.reshape(4, 10, -1).mean(2)           # (style, block)
    average = round(blocks.mean().item(), 2)
    means, stds, words = {}, {}, []
    for style, block in zip(HPS_STYLES, blocks):
        means[style] = round(block.mean().item(), 2)
        stds[style] = round(block.std(correction=0).item(), 4)
        words.append(f"{style} {means[style]:.2f} ({stds[style]:.4f})")
    words = ", ".join(words)
    note = f"HPS {version}, not comparable with others: {words}, averaged {average:.2f}"
    column, _ = HPS[version]
    return {column: average, **means, "hps_version": version, "hps_std": stds, "note": note}


def hps(args, path, device, load_detector):
    """HPS v2's 3,200 prompts, scored by the weights of --hps_version from the JPEGs as written.

    # choice: in float32; hpsv2 itself computes in float16 on a GPU.
    """
    prompts = read_hps(path)
    _, published = HPS[args.hps_version]
    model, facts = load_clip(args, "hps", CLIP_H, device, published)

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
        row = facts | hps_table(scores, args.hps_version)
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


def cropped(img):
    """A picture as CLIP score sees it: its center, 256 px."""
    return Image.fromarray(coco_crop(img))


def clip_cosines(model, pictures, captions):
    """The cosine of each picture's features and its caption's, (n,)."""
    device = model.clip.logit_scale.device
    pixels = torch.stack([preprocess_pil(cropped(img), model.size) for img in pictures])
    return model(pixels.to(device), clip_score_tokens(captions).to(device))


def clip_score(args, path, device, load_detector):
    """The mean cosine, not times 100, of ViT-g-14's features of an image and of its caption."""
    captions = read_prompts(path, "--metadata", numbered=True)
    model, facts = load_clip(args, "clip_g", CLIP_G, device)

    def lay(folder):
        if args.save_images:
            save_images(folder, (), "png")

    def score(folder, part, pictures):
        if args.save_images:
            for i, img in enumerate(pictures, part.start):
                if args.save_images == "cropped":
                    img = cropped(img)
                img.save(f"{folder}/{i:05d}.png")
        return clip_cosines(model, pictures, captions[part])

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


def benchmark_flags(ap):
    """Add the benchmarks' flags to a parser; returns the function that adds to their group."""
    add = ap.add_argument_group("benchmarks of text to image").add_argument
    add("--metadata", nargs="+", default=[], metavar="PATH",
        help="prompts of the benchmark, or of several in their order: "
             + "; ".join(f"{name}: {words}" for name, (_, words) in BENCHMARKS.items()))
    add("--per_prompt", type=positive_int, default=4,
        help="geneval: images per prompt (default: %(default)s)")
    add("--detector", choices=["mask2former", "shapes"],
        help="geneval: score it here, too (published: mmdetection's; --detector_weights takes a "
             "folder)")
    add("--save_images", nargs="?", const="cropped", choices=["cropped", "whole"],
        help="keep images as PNGs below OUT: CLIP score's as it sees them at 256 px (COCO-30k), "
             "or whole (MJHQ-30k)")
    add_weights(add, "detector", "clip_l", "clip_g")
    return add


def expect_text(spec, benchmark):
    if spec.text is None:
        raise UserError(
            f"--metrics {benchmark} draws prompts, and {spec.name} draws classes: take a teacher "
            "with a text encoder, such as --teacher maskgen or meissonic-tiny, or a student of one"
        )


def expect_flags(args, names, others=()):
    """UserError for flags that do not belong to the benchmarks called `names`.

    others: names of READ_BY that read their flags without being drawn here.
    """
    paths = args.metadata
    if paths and not names:
        raise UserError(f"--metadata {paths[0]} belongs to --metrics {' or '.join(BENCHMARKS)}")
    for flag, reader in READ_BY.items():
        value = getattr(args, flag)
        if value and reader not in (*names, *others):
            raise UserError(f"--{flag} {value} belongs to --metrics {reader}")
    if names and not paths:
        raise UserError(f"--metrics {names[0]} needs --metadata PATH: {BENCHMARKS[names[0]][1]}")
    if len(paths) != len(names):
        raise UserError(
            f"--metadata: expected a path for each of {', '.join(names)}, in this order, "
            f"got {len(paths)}"
        )


def load_benchmarks(args, names, device, load_detector, others=()):
    """{name: Benchmark} of the benchmarks called `names`, each with its own --metadata.

    load_detector(args, device) -> Detector, for --detector. others: see `expect_flags`. Everything
    that the benchmarks read is read and checked here.
    """
    expect_flags(args, names, others)
    if names and args.teacher in SPECS:
        expect_text(SPECS[args.teacher], names[0])       # before anything large is read
    return {
        name: BENCHMARKS[name][0](args, path, device, load_detector)
        for name, path in zip(names, args.metadata)
    }


def run_benchmark(bench, asked, make_images, folder, **how):
    """Draw an image per prompt, write them below `folder`, score them: a row of results.

    asked: for each of the prompts what make_images draws it from. how: batch=, seed= and desc=, as
    `metrics.engine.scored` takes them.
    """
    if is_main():
        bench.lay(folder)                                # `scored` waits for it before it draws

    def score(part, img):
        scores = bench.score(folder, part, [picture(pixels) for pixels in img])
        return torch.as_tensor(scores)[:, None]          # (b, 1)

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
