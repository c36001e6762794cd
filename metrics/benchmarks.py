"""The text-to-image benchmarks that evaluate.py runs: GenEval, HPS v2, CLIP score.

Each is a class with the same four things:

    prompts                          one per image
    lay(folder)                      makes the folders for the images; they must be new
    score(folder, part, pictures)    writes and scores the images of prompts[part], a slice: (b,)
    row(scores)                      the scores (n,) of all images -> what a row of results says

`load_benchmarks` makes them from the flags, and `run_benchmark` draws and scores one.
"""

import functools
import os

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
from metrics.geneval import (
    Detector, color_classifier, geneval_table, read_geneval, read_metadata, write_geneval
)
from metrics.hps import HPS_STYLES, PER_STYLE, as_jpeg, hps_table, read_hps
from networks.clip import CLIP_G, CLIP_H, CLIP_L, ClipReward, preprocess_longest, preprocess_pil
from networks.inception import coco_crop
from networks.mask2former import CLASSES, load_mask2former, mask2former
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


# -------------------------------------------------------------------- the networks that score
def load_clip(args, name, config, device):
    """(a frozen CLIP that measures cosines, what rows say of it).

    With --random_weights and no file of its own it is tiny and random.
    """
    path = getattr(args, f"{name}_weights")
    tiny = args.random_weights and not path
    make = functools.partial(ClipReward, TINY_CLIP if tiny else config, name)
    model = load_model(name, make, path, tiny).to(device).eval().requires_grad_(False)
    model.scaled = False
    if tiny:
        return model, {f"{name}_weights": "random", "note": RANDOM}
    return model, {f"{name}_weights": fingerprint(model)}


def mask2former_detector(args, device):
    """The Detector of --detector mask2former."""
    net = load_mask2former(args.detector_weights, args.random_weights, device)
    model, facts = load_clip(args, "clip_l", CLIP_L, device)
    kind, note = "transformers", OTHER_DETECTOR
    if args.random_weights and not (args.detector_weights and args.clip_l_weights):
        kind, note = "random", RANDOM
    facts.update(detector=f"{kind} mask2former {fingerprint(net)}", note=note)
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


# -------------------------------------------------------------------------------- the benchmarks
class GenEval:
    """Images in GenEval's layout, for its own programs; with --detector also scored here."""

    def __init__(self, args, path, device, load_detector):
        lines = read_metadata(path)
        self.per_prompt = args.per_prompt
        self.metadata = [line for line in lines for _ in range(self.per_prompt)]
        self.prompts = [line["prompt"] for line in self.metadata]
        self.detector = None
        if args.detector:
            self.detector = load_checked(args, lines, device, load_detector)

    def lay(self, folder):
        write_geneval(folder, self.metadata[:: self.per_prompt])

    def score(self, folder, part, pictures):
        for i, img in enumerate(pictures, part.start):
            prompt, sample = divmod(i, self.per_prompt)
            img.save(f"{folder}/{prompt:05d}/samples/{sample:05d}.png")
        if not self.detector:
            return [False] * len(pictures)
        pairs = zip(self.metadata[part], pictures)
        return [self.detector.is_right(line, img) for line, img in pairs]

    def row(self, scores):
        row = {"per_prompt": self.per_prompt, "geneval": None}
        if self.detector:
            tags = [line["tag"] for line in self.metadata]
            row |= geneval_table(zip(tags, scores.tolist())) | self.detector.facts
        return row


class HPS:
    """HPS v2's 3,200 prompts, scored by the v2.1 weights from the JPEGs as written.

    # choice: in float32; hpsv2 itself computes in float16 on a GPU.
    """

    def __init__(self, args, path, device, load_detector):
        self.prompts = read_hps(path)
        self.model, self.facts = load_clip(args, "hps", CLIP_H, device)
        self.device = device

    def lay(self, folder):
        for style in HPS_STYLES:
            save_images(f"{folder}/{style}", (), "jpg")

    def score(self, folder, part, pictures):
        pixels = []
        for i, img in enumerate(pictures, part.start):
            place = f"{HPS_STYLES[i // PER_STYLE]}/{i % PER_STYLE:05d}.jpg"
            pixels.append(as_jpeg(img, f"{folder}/{place}"))
        pixels = preprocess_longest(torch.stack(pixels).to(self.device) / 255, self.model.size)
        ids = self.model.tokenize(self.prompts[part])
        return 100 * self.model(pixels, ids.to(self.device))

    def row(self, scores):
        row = self.facts | hps_table(scores)
        if "note" in self.facts:
            row["note"] += f"; {self.facts['note']}"
        return row


class ClipScore:
    """The mean cosine, not times 100, of ViT-g-14's features of an image and of its caption."""

    def __init__(self, args, path, device, load_detector):
        self.prompts = read_prompts(path, "--metadata", numbered=True)
        self.model, self.facts = load_clip(args, "clip_g", CLIP_G, device)
        self.device = device
        self.save_images = args.save_images              # "cropped", "whole" or None

    def lay(self, folder):
        if self.save_images:
            save_images(folder, (), "png")

    def score(self, folder, part, pictures):
        crops = [Image.fromarray(coco_crop(img)) for img in pictures]
        if self.save_images:
            images = crops if self.save_images == "cropped" else pictures
            for i, img in enumerate(images, part.start):
                img.save(f"{folder}/{i:05d}.png")
        pixels = torch.stack([preprocess_pil(img, self.model.size) for img in crops])
        ids = clip_score_tokens(self.prompts[part])
        return self.model(pixels.to(self.device), ids.to(self.device))

    def row(self, scores):
        return {"clip_score": scores.mean().item(), **self.facts}


BENCHMARKS = {                                           # name: (class, what its --metadata is)
    "geneval": (GenEval, "GenEval's evaluation_metadata.jsonl"),
    "hps": (HPS, "HPDv2's folder `benchmark`"),
    "clip": (ClipScore, "a caption a line"),
}
READ_BY = {                                              # flag: the only benchmark that reads it
    "detector": "geneval",
    "detector_weights": "geneval",
    "clip_l_weights": "geneval",
    "hps_weights": "hps",
    "clip_g_weights": "clip",
}


# ---------------------------------------------------------------------------------- running them
def expect_text(spec, benchmark):
    if spec.text is None:
        texts = ", ".join(name for name, other in SPECS.items() if other.text)
        raise UserError(
            f"--benchmark {benchmark} draws prompts, and {spec.name} draws classes: "
            f"take --teacher {texts}, or a student of one of them"
        )


def expect_flags(args, names):
    """UserError for flags that do not belong to the benchmarks called `names`."""
    if args.benchmark and args.metrics:
        one = args.benchmark
        raise UserError(f"--benchmark {one} is short for --metrics {one}: give one of the two")
    running = [*names, "geneval"] if args.geneval_folder else names
    if args.metadata and not running:
        users = " or ".join(BENCHMARKS)
        raise UserError(f"--metadata {args.metadata[0]} belongs to --benchmark {users}")
    for flag, reader in READ_BY.items():
        value = getattr(args, flag)
        if value and reader not in running:
            raise UserError(f"--{flag} {value} belongs to --benchmark {reader}")
    if args.geneval_folder and not args.detector:
        raise UserError(
            f"--geneval_folder {args.geneval_folder} is scored here: "
            "add --detector mask2former, or shapes"
        )
    if args.save_images and {"geneval", "hps"} & set(names):
        raise UserError(
            "--save_images: geneval and hps write their images anyway; "
            "it belongs to clip and to FID"
        )
    if names and not args.metadata:
        raise UserError(f"--benchmark {names[0]} needs --metadata PATH: {BENCHMARKS[names[0]][1]}")
    count = len(args.metadata or [])
    if count != len(names):
        raise UserError(
            f"--metadata: expected a path for each of {', '.join(names)}, in this order, "
            f"got {count}"
        )


def load_benchmarks(args, device, load_detector):
    """{name: benchmark} of --benchmark, or of those in --metrics, each with its own --metadata.

    load_detector(args, device) -> Detector, for --detector. Everything that the benchmarks read is
    read and checked here.
    """
    named = [args.benchmark] if args.benchmark else args.metrics or []
    names = [name for name in named if name in BENCHMARKS]
    expect_flags(args, names)
    teacher = args.teacher or (None if args.ckpt else "maskbit-tiny")
    if names and teacher in SPECS:
        expect_text(SPECS[teacher], names[0])            # before anything large is read
    return {
        name: BENCHMARKS[name][0](args, path, device, load_detector)
        for name, path in zip(names, args.metadata or [])
    }


def run_benchmark(bench, teacher, make_images, folder, batch=250, seed=0, desc=None):
    """Draw an image per prompt, write them below `folder`, score them: a row of results.

    Batches are seeded, and go to processes in turn, as in `image_metrics`.
    """
    if is_main():
        bench.lay(folder)
    barrier()                                            # the others write into these folders

    def score(part, img):
        scores = bench.score(folder, part, [picture(pixels) for pixels in img])
        return torch.as_tensor(scores)[:, None]          # (b, 1)

    asked = teacher.conditions(bench.prompts)
    scores, facts = scored(make_images, asked, score, 1, batch=batch, seed=seed, desc=desc)
    row = {"n": len(asked), **bench.row(scores[:, 0].cpu()), **facts}
    if os.path.isdir(folder):
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
    row = {"model": folder, "kind": "folder", "n": len(verdicts)}
    return row | geneval_table(verdicts) | detector.facts
