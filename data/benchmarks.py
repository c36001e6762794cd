"""Benchmarks of text to image: GenEval, HPS v2, CLIP score. What to draw, where it is written, how it is judged.

GenEval. A detector says what it sees, and rules say whether that is what the prompt asked for: six tasks, 553 prompts,
four images each (Ghosh et al. 2023; the rules are evaluation/evaluate_images.py of their repository). Published scores
rest on one detector, mmdetection's Mask2Former with Swin-S, and one judge of colours, OpenAI's CLIP ViT-L-14; with
others, numbers compare only with each other. So both are arguments here,

    detector(image) -> {class: [((x1, y1, x2, y2), score), ...]}, in any order
    colour_of(image, box, class) -> one of COLOURS; the box comes as the detector made it, and may carry a mask

and `write_geneval` writes the folder that the official programs read.

COCO-30k. A fixed list of 30,000 captions (DMD2's captions_coco14_test.txt), an image each. FID compares with *all*
40,504 images of val2014, and both sides go through `coco_crop` to 256 px, then `clean_resize` to Inception's 299.
MJHQ-30k: its 30,000 prompts against its 30,000 images, `clean_resize` alone; the paper states no crop.
--benchmark clip --save_images writes the generated side of either.

evaluate.py runs them: --metrics clip hps geneval.
"""

import functools
import itertools
import json
import os
import re
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data.inception import coco_crop
from data.prompts import read_prompts
from data.weights import UserError, fingerprint
from reward import CLIP_G, CLIP_H, CLIP_L, ClipReward, load_model, preprocess_longest, preprocess_pil
from teachers import SPECS, byte_pairs

# ============================================================================================ GenEval: the rules
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


def kept(found, tag):
    """The boxes of a class that count, surest first: scores strictly above 0.3 (0.9 in counting), 16 at most."""
    score = np.array([s for _, s in found], dtype=np.float32)
    low = np.float32(0.9 if tag == "counting" else 0.3)          # in float32 as well: a score of 0.3 is out
    order = np.argsort(score, kind="stable")[::-1]               # (numpy's default orders ties by CPU)
    return [found[i][0] for i in order if score[i] > low][:16]


def relations(box_a, box_b):
    """Where A is, seen from B: a set of RELATIONS, none, one or two of them (y points down).

    With o from B's centre to A's, per axis r = sign(o) max(|o| - 0.1 (size A + size B), 0): boxes about one centre
    have no relation. A is left of B where r_x < -|o| / 2, and so on; |o| is the length before shrinking.
    """
    a, b = (np.asarray(box, dtype=np.float32)[:4].reshape(2, 2) for box in (box_a, box_b))    # corners (x, y)
    o = a.mean(0) - b.mean(0)
    size = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])             # absolute: corners may come in any order
    r = np.maximum(np.abs(o) - np.float32(0.1) * size, 0) * np.sign(o)
    if (np.abs(r) < 1e-3).all():
        return set()
    x, y = r / np.linalg.norm(o)
    return {name for name, holds in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)) if holds}


def complaint(clause, boxes, groups, colour):
    """What is wrong with the boxes for an `include` clause, or None. groups: what fulfilled each earlier clause."""
    name, count = clause["class"], clause["count"]
    if len(boxes) < count:
        return f"expected {count} {name}, found {len(boxes)}"
    if "color" in clause:
        seen = [colour(box, name) for box in boxes]
        if any(c != clause["color"] for c in seen):
            return f"expected {count} {clause['color']} {name}, found {' and '.join(seen)}"
    if "position" in clause:
        where, target = clause["position"]
        if groups[target] is None:
            return f"expected {name} {where} something that is missing or wrong itself"
        for true in (relations(a, b) for a in boxes for b in groups[target]):
            if where not in true:
                return f"expected {name} {where} its target, found it {' and '.join(sorted(true)) or 'at no side'}"
    return None


def verdict(metadata, detections, colour):
    """(right?, why not) of one image: what the detector found, against a line of the benchmark.

    colour(box, class) -> name is asked where a clause speaks of one. Of each class only the surest boxes are
    judged, as many as were asked for: a blue bench beside a surer red one is no blue bench.
    """
    found = {name: kept(boxes, metadata["tag"]) for name, boxes in detections.items()}
    groups, wrong = [], []
    for clause in metadata.get("include", []):                   # all must hold
        boxes = found.get(clause["class"], [])[:clause["count"]]
        why = complaint(clause, boxes, groups, colour)
        groups.append(None if why else boxes)
        wrong += [why] if why else []
    for clause in metadata.get("exclude", []):                   # none may: "two apples" excludes three
        if (n := len(found.get(clause["class"], []))) >= clause["count"]:
            wrong.append(f"expected fewer than {clause['count']} {clause['class']}, found {n}")
    return not wrong, "; ".join(wrong)


def geneval_table(rows):
    """{"geneval": mean of the six tasks, not of the images, task: share of right images, ...} from `geneval`'s rows.

    A task without images is left out, and then the mean is None.
    """
    right = {tag: [] for tag in TASKS}
    for tag, correct, *_ in rows:
        right[tag].append(correct)
    table = {tag: sum(r) / len(r) for tag, r in right.items() if r}
    return {"geneval": sum(table.values()) / len(TASKS) if len(table) == len(TASKS) else None, **table}


# ========================================================================================== GenEval: its folders
def parse_metadata(text, where):
    """A line of evaluation_metadata.jsonl as a dict, or a sentence on what the rules above would not understand."""
    def expect(holds, words):
        if not holds:
            raise ValueError(f"expected {words}")
    try:
        line = json.loads(text)
        expect({"tag", "prompt", "include"} <= set(line), "tag, prompt and include")
        expect(line["tag"] in TASKS, f"a tag out of {', '.join(TASKS)}, got {line['tag']!r}")
        for i, clause in enumerate([*line["include"], *line.get("exclude", [])]):
            expect({"class", "count"} <= set(clause), "class and count in every entry")
            expect(clause["count"] in range(1, 17), f"a count from 1 to 16, got {clause['count']!r}")
            expect(clause.get("color", "red") in COLOURS, f"a color out of {', '.join(COLOURS)}")
            where_to, target = clause.get("position", ("above", None))
            expect(where_to in RELATIONS and target in (None, *range(i)), "a position [relation, earlier entry]")
    except (ValueError, TypeError) as err:
        raise UserError(f"{where} is no prompt of GenEval: {err}")
    return line


def read_metadata(path):
    """GenEval's prompts, from its evaluation_metadata.jsonl. The place of a line, from 0, is its folder's name."""
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.readlines() or [""]
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"cannot read {path} ({err}): expected GenEval's evaluation_metadata.jsonl")
    return [parse_metadata(text, f"{path}, line {i}") for i, text in enumerate(lines, 1)]


def picture(pixels):
    """uint8 (C, H, W) -> a PIL picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).cpu().numpy())


def save_images(folder, images, kind, **options):
    """uint8 images (3, H, W) as <folder>/00000.<kind>, ... in a new folder: old ones in it would be judged, too."""
    try:
        os.makedirs(folder)
    except OSError as err:
        raise UserError(f"cannot make the folder {folder} ({err.strerror}): images go to a new one, lest they mix")
    for n, img in enumerate(images):
        picture(img).save(os.path.join(folder, f"{n:05d}.{kind}"), **options)


def write_geneval(folder, metadata_list, images_per_prompt):
    """<folder>/<00000>/metadata.jsonl and samples/<00000>.png. For each prompt uint8 images (n, 3, H, W).

    images_per_prompt may be a generator: 2,212 images need not fit into memory.
    """
    for i, (metadata, images) in enumerate(zip(metadata_list, images_per_prompt, strict=True)):
        save_images(os.path.join(folder, f"{i:05d}", "samples"), images, "png")
        with open(os.path.join(folder, f"{i:05d}", "metadata.jsonl"), "w") as f:
            json.dump(metadata, f)


def read_geneval(folder):
    """(metadata, [RGB pictures]) of such a folder, prompt by prompt."""
    path = folder
    try:
        for prompt in sorted(filter(str.isdigit, os.listdir(folder))):
            path = os.path.join(folder, prompt, "metadata.jsonl")
            with open(path, encoding="utf-8") as f:
                metadata = parse_metadata(f.read(), path)
            images, samples = [], os.path.join(folder, prompt, "samples")
            for name in sorted(n for n in os.listdir(samples) if re.fullmatch(r"\d+\.png", n)):
                path = os.path.join(samples, name)
                images.append(Image.open(path).convert("RGB"))
            yield metadata, images
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"cannot read {path} ({err}): expected <index>/metadata.jsonl, <index>/samples/<n>.png")


def geneval(folder, detector, colour_of):
    """Rows (task, right?, why not), one an image, of a folder that `write_geneval` wrote."""
    for metadata, images in read_geneval(folder):
        for img in images:
            yield metadata["tag"], *verdict(metadata, detector(img), functools.partial(colour_of, img))


# ======================================================================= GenEval: a detector, a judge of colours
CLASSES = tuple("""person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,
parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,
frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,
cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,
bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,
refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(","))   # COCO's order
MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


class Box(tuple):
    """(x1, y1, x2, y2) in pixels; `mask`, a bool tensor (H, W), or None, is what of it belongs to the object."""

    mask = None


def instances(z_class, z_mask, padded, resized, size, best=100):
    """Logits of a Mask2Former's queries, (Q, 81) and (Q, h, w) -> {class: [(Box, score), ...]} (mmdetection 2.x).

    padded, resized, size: (H, W) of the network's input, of the image in its upper left corner, and of the image.
    A score is the class's probability times the mean probability of the mask's pixels. One query may be in several
    of the `best` pairs (query, class).
    """
    p, pair = z_class.softmax(-1)[:, :-1].flatten().topk(min(best, z_class[:, :-1].numel()))  # the last is "nothing"
    query, label = pair // (z_class.shape[1] - 1), pair % (z_class.shape[1] - 1)
    z = F.interpolate(z_mask[None], padded, mode="bilinear")[..., : resized[0], : resized[1]]
    z = F.interpolate(z, size, mode="bilinear")[0]                                            # (Q, H, W)
    mask = z > 0
    sure = (z.sigmoid() * mask).sum((1, 2)) / (mask.sum((1, 2)) + 1e-6)
    down, across = (mask.any(axis).cpu().numpy() for axis in (2, 1))                          # (Q, H), (Q, W)
    found = {}
    for s, q, c in zip((p * sure[query]).tolist(), query.tolist(), label.tolist()):
        y, x = (np.flatnonzero(line[q]).tolist() or [0, -1] for line in (down, across))       # an empty mask: 0, 0, 0, 0
        box = Box((x[0], y[0], x[-1] + 1, y[-1] + 1))
        box.mask = mask[q]
        found.setdefault(CLASSES[c], []).append((box, s))
    return found


def mask2former(net, device="cpu"):
    """A detector from transformers' Mask2Former: PIL picture -> {class: [(Box, score), ...]}."""
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]], device=device).view(2, 3, 1, 1)

    @torch.no_grad()
    def detector(image):
        W, H = image.size
        scale = min(800 / min(W, H), 1333 / max(W, H))
        h, w = int(H * scale + 0.5), int(W * scale + 0.5)
        img = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None].float()     # (1, 3, H, W), 0 to 255
        img = F.interpolate(img, (h, w), mode="bilinear").round()                             # OpenCV's: no antialias
        img = F.pad((img - mean) / std, (0, -w % 32, 0, -h % 32))
        out = net(pixel_values=img)
        return instances(out.class_queries_logits[0], out.masks_queries_logits[0], img.shape[2:], (h, w), (H, W))
    return detector


def load_mask2former(path=None, random_weights=False, device="cpu"):
    """transformers' Mask2Former with the 80 classes of COCO, from a folder or the hub; or a tiny random one."""
    try:
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    except ImportError:
        raise UserError("--detector mask2former is transformers' Mask2Former: pip install transformers")
    if random_weights and not path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stages = ["stage1", "stage2", "stage3", "stage4"]
            swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_features=stages)
            return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
                backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=2,
                dim_feedforward=32, encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_queries=10,
                num_labels=80)).to(device).eval()
    hint = "expected a folder with config.json and model.safetensors, of COCO instances"
    if path and not os.path.isdir(path):
        raise UserError(f"--detector_weights {path}: no such folder; {hint}")
    try:
        net, said = Mask2FormerForUniversalSegmentation.from_pretrained(path or MASK2FORMER, output_loading_info=True)
    except Exception as err:                          # no network, another architecture, a file cut short
        raise UserError(f"cannot load the detector {path or MASK2FORMER} ({type(err).__name__}: "
                        f"{(str(err).splitlines() or [''])[0][:200]}); {hint}, named by --detector_weights PATH")
    missing = {*said["missing_keys"], *(k for k, *_ in said["mismatched_keys"])} & {k for k, _ in net.named_parameters()}
    if missing or net.config.num_labels != len(CLASSES):
        what = f"lacks {', '.join(sorted(missing)[:3])}" if missing else f"has {net.config.num_labels} classes, not 80"
        raise UserError(f"the detector {path or MASK2FORMER} {what}; {hint}")
    return net.to(device).eval()


def colour_vectors(model, name, device="cpu"):
    """A vector for each of COLOURS, (10, embed): of what TEMPLATES say of a thing called `name`, the mean direction."""
    ids = model.tokenize([words.format(colour, name) for colour in COLOURS for words in TEMPLATES])
    g = model.text_features(ids.to(device)).unflatten(0, (-1, len(TEMPLATES)))                # (10, 3, embed), length 1
    return F.normalize(g.mean(1), dim=-1)


def colour_judge(model, device="cpu"):
    """colour_of(PIL picture, box, class) -> the one of COLOURS whose text a CLIP finds nearest to the object.

    The picture is painted grey outside the object's mask, then cut to its box.
    """
    vectors = functools.cache(lambda name: colour_vectors(model, name, device))

    def colour_of(image, box, name):
        if (mask := getattr(box, "mask", None)) is not None:
            grey = Image.new("RGB", image.size, "#999")
            image = Image.composite(image, grey, Image.fromarray(mask.cpu().numpy()))
        pixels = preprocess_pil(image.crop(box), model.size)[None].to(device)
        return COLOURS[int((vectors(name) @ model.image_features(pixels)[0]).argmax())]
    return colour_of


# ========================================================================================= CLIP score and HPS v2
def clip_score_tokens(captions):
    """Token ids (n, 77) of "A photo depicts" and the caption, for CLIP score (DMD2's coco_evaluator.py).

    The caption alone is cut to 77, then the words are slid in behind its start, and what now stands last is an end.
    (Unless that is a "!" amid punctuation: its id, 0, passes for padding. Kept: published scores have it so.)
    """
    ids = byte_pairs()(list(captions), 77)              # start, byte pairs, end, then zeros
    words = torch.tensor([320, 1125, 29340]).expand(len(ids), 3)
    ids = torch.cat([ids[:, :1], words, ids[:, 1:]], dim=1)[:, :77]
    ids[:, 76].masked_fill_(ids[:, 76] > 0, 49407)
    return ids


HPS_STYLES = ("anime", "concept-art", "paintings", "photo")      # 800 prompts each
JPEG = dict(quality=75)


def write_hps(root, style, images):
    """<root>/<style>/<00000>.jpg, where hpsv2.evaluate looks: uint8 images (3, H, W), in the order of the prompts.

    JPEG of quality 75 is PIL's default, and so what published scores were taken from.
    """
    if style not in HPS_STYLES:
        raise ValueError(f"unknown style {style!r}: expected one of {', '.join(HPS_STYLES)}")
    save_images(os.path.join(root, style), images, "jpg", **JPEG)


def hps_benchmark(scores_by_style):
    """{style: (mean, deviation), "averaged": mean of all} of 100 cos, 800 a style, rounded as hpsv2 prints them.

    The deviation is that of ten means, of 80 consecutive prompts each (population), not of images. Without all four
    styles "averaged" is None. HPS v2.0 and v2.1 are different networks: say which one it was.
    """
    table, every = {}, []
    for style, scores in scores_by_style.items():
        if len(scores) != 800:
            raise UserError(f"HPS v2, {style}: expected 800 scores, one a prompt, got {len(scores)}")
        every.append(torch.as_tensor(scores, dtype=torch.float64).reshape(10, 80).mean(1))
        table[style] = round(every[-1].mean().item(), 2), round(every[-1].std(correction=0).item(), 4)
    whole = set(table) == set(HPS_STYLES)
    return {**table, "averaged": round(torch.cat(every).mean().item(), 2) if whole else None}


def read_hps(folder):
    """{style: its 800 prompts}, from the folder `benchmark` of the data set HPDv2."""
    prompts, wanted = {}, f"expected HPDv2's folder `benchmark`, with {', '.join(f'{s}.json' for s in HPS_STYLES)}"
    for path in (os.path.join(folder, f"{style}.json") for style in HPS_STYLES):
        try:
            with open(path, encoding="utf-8") as f:
                lines = json.load(f)
        except (OSError, ValueError) as err:
            raise UserError(f"cannot read {path} ({err}): {wanted}")
        if not (isinstance(lines, list) and len(lines) == 800 and all(isinstance(line, str) for line in lines)):
            got = f"{len(lines)} entries" if isinstance(lines, list) else type(lines).__name__
            raise UserError(f"{path}: expected a list of 800 strings, got {got}; {wanted}")
        prompts[os.path.basename(path)[:-5]] = lines
    return prompts


# ========================================================================================= what evaluate.py runs
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


def load_detector(args, device):
    """(detector, colour_of, the classes they know, what rows say of them) for --detector."""
    words = "{} detects: not comparable with published GenEval, whose detector is another"
    if args.detector == "shapes":
        from data.shapes import SHAPES, detect

        see = lambda image: detect(np.array(image).transpose(2, 0, 1))
        return (lambda image: see(image)[0], lambda image, box, name: see(image)[1](box, name), SHAPES,
                dict(detector="data/shapes.py", note=words.format("data/shapes.py")))
    net = load_mask2former(args.detector_weights, args.random_weights, device)
    model, said = load_clip(args, "clip_l", CLIP_L, device)
    random = args.random_weights and not (args.detector_weights and args.clip_l_weights)
    said.update(detector=f"{'random' if random else 'transformers'} mask2former {fingerprint(net)}",
                note=RANDOM if random else words.format("transformers' Mask2Former"))
    return mask2former(net, device), colour_judge(model, device), CLASSES, said


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


def geneval_benchmark(args, path, device):
    """Four images a prompt in GenEval's layout, for its own programs; with --detector scored here, too."""
    metadata, per, detector, said = read_metadata(path), args.per_prompt, None, {}
    if args.detector:
        detector, colour_of, classes, said = load_detector(args, device)
        expect_classes(metadata, classes, args.detector)
    metadata = [line for line in metadata for _ in range(per)]                                # one an image

    def score(folder, part, pictures):
        right = []
        for i, img in zip(range(len(metadata))[part], pictures):
            img.save(os.path.join(folder, f"{i // per:05d}", "samples", f"{i % per:05d}.png"))
            right.append(detector and verdict(metadata[i], detector(img), functools.partial(colour_of, img))[0])
        return [float(bool(r)) for r in right]

    def row(scores):
        right = ((line["tag"], r) for line, r in zip(metadata, scores.tolist()))
        return {"per_prompt": per, **(geneval_table(right) if detector else {"geneval": None}), **said}

    lay = lambda folder: write_geneval(folder, metadata[::per], itertools.repeat((), len(metadata) // per))
    return Benchmark([line["prompt"] for line in metadata], lay, score, row)


def geneval_folder(args, device):
    """The row of a folder that `write_geneval`, or any other program, wrote."""
    detector, colour_of, classes, said = load_detector(args, device)
    lines = [line for line, images in read_geneval(args.geneval_folder) for _ in images]      # is all of it readable?
    expect_classes(lines, classes, args.detector)
    if not lines:
        raise UserError(f"--geneval_folder {args.geneval_folder}: no images; expected <index>/samples/<n>.png in it")
    rows = tqdm(geneval(args.geneval_folder, detector, colour_of), "GenEval", len(lines), unit="image", leave=False)
    return {"model": args.geneval_folder, "kind": "folder", "n": len(lines), **geneval_table(rows), **said}


def hps_v2_benchmark(args, path, device):
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


def clip_benchmark(args, path, device):
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


def load_benchmarks(args, device):
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
    return {name: BENCHMARKS[name][0](args, path, device) for name, path in zip(names, paths)}
