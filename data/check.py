"""Are a teacher's published files the right ones, and does it know real images?

    python data/check.py maskgit                                  # fetched, complete, how large?
    python data/check.py maskgit --images /path/to/imagenet/val   # a folder per class
    python data/check.py maskgen --images my/pictures             # NAME.txt beside NAME.jpg

Look before you spend days of GPUs (README.md, "The four teachers"). Every key and every shape must
fit; but weights that load can be wrong all the same. With images it shows in the tokenizer's
reconstruction error, and in the network's cross-entropy on masked tokens: nats per token with the
condition, without it, and for a guess. MaskGit's head count is in no file (a user reports 5.00 nats
with the right 16 heads and 5.72 with 12), and neither is the activation of MaskGen's text encoder
(--text_activation: the fewer nats, the better).
"""

import json
import math
import os
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, f"{os.path.dirname(__file__)}/..")
from data.images import list_images, list_pairs, variants  # noqa: E402
from data.prompts import read_pair  # noqa: E402
from dimo import exact_mask  # noqa: E402
from machinery.errors import UserError, guard  # noqa: E402
from machinery.flags import (  # noqa: E402
    add_device, add_teacher_files, check_device, parser, positive_int)
from soft_embed import embed_tokens  # noqa: E402
from teachers import SPECS, assemble, build, decode_tokens, source  # noqa: E402


def real_images(folder, spec, n):
    """n images spread over a folder, uint8 (n, C, H, W), and what they show: class ids, or prompts.

    Classes are subfolders; a prompt stands in NAME.txt beside its image.
    """
    labels = None if spec.text else list_images(folder)[1]
    names = list(labels or list_pairs(folder))
    n = min(n, len(names))
    shown, views = [], []
    for i in range(n):
        name = names[i * len(names) // n]
        path = f"{folder}/{name}"
        try:
            if labels:
                what, view = labels[name], variants(path, spec.image)
            else:
                what, view = read_pair(path, spec.image)
        except UserError as err:
            raise UserError(f"--images {folder}: cannot read {name}: {err}")
        shown.append(what)
        views.append(view)
    return torch.cat(views), shown


@torch.no_grad()
def knows(teacher, img, shown):
    """What right weights do well, on uint8 images (n, C, H, W), as a dict.

    psnr: the tokenizer's reconstruction, in dB. nats: cross-entropy per masked token, half of them
    masked; nats_null, without the condition; nats_uniform, of a network that knows nothing.
    """
    net, tokenizer = teacher.net, teacher.tokenizer
    asked = teacher.conditions(shown)
    if not teacher.spec.text:
        asked = asked[shown]
    generator = torch.Generator().manual_seed(0)
    error, nats = 0.0, torch.zeros(2)
    for pixels, some in zip(img.split(8), asked.split(8)):
        cond = teacher.cond(some)
        pixels = pixels.to(asked.device).float() / 255
        x = tokenizer.encode(pixels)                                          # (B, L, G)
        again = decode_tokens(tokenizer, x, cond)
        error += (again - pixels).square().sum().item()
        mask = exact_mask(0.5, torch.rand(x.shape, generator=generator)).to(asked.device)
        e = embed_tokens(x.masked_fill(mask, net.V), *net.tables())           # (B, L, d)
        for i, c in enumerate((cond, net.null(cond))):
            mean = F.cross_entropy(net(e, c)[mask], x[mask]).item()           # over masked tokens
            nats[i] += mean * len(pixels) / len(img)
    return dict(
        psnr=-10 * math.log10(error / img.numel()), nats=nats[0].item(), nats_null=nats[1].item(),
        nats_uniform=math.log(net.V), images=len(img))


def check(args):
    """Report on a teacher's files: found, fitting, how large; and what they know of real images."""
    check_device(args.device)
    spec, modules = SPECS[args.teacher], {}
    paths = args.teacher_weights, args.tokenizer_weights, args.text_weights
    for role, path in zip(spec.roles, paths):
        try:
            module = build(spec, role, path, args.random_weights, args.text_activation)
            where = "random weights" if args.random_weights else source(spec, role, path)
        except UserError as err:
            print(f"{role:9s}  NOT  {err}")
            continue
        modules[role], state = module, module.state_dict()
        count = sum(p.numel() for p in module.parameters())
        finite = all(torch.isfinite(t).all() for t in state.values())
        print(f"{role:9s}  ok   {where}: {type(module).__name__}, {len(state)} tensors, "
              f"{count:,} parameters, all finite: {'yes' if finite else 'NO'}")
    if len(modules) < len(spec.roles):
        raise UserError(f"{spec.name} is not complete: see the lines above")
    if args.images:
        teacher = assemble(spec, modules, args.device)
        found = knows(teacher, *real_images(args.images, spec, args.n))
        print("on {images} real images: reconstruction {psnr:.2f} dB; {nats:.3f} nats per masked "
              "token, {nats_null:.3f} without the condition, {nats_uniform:.3f} for a guess"
              .format(**found))
        print(json.dumps({"teacher": spec.name, **found}))


def flags():
    ap = parser(__doc__)
    add = ap.add_argument
    add("teacher", choices=SPECS, metavar="NAME", help=f"one of {', '.join(SPECS)}")
    add_teacher_files(add)
    add("--images", metavar="FOLDER",
        help="real images: a subfolder per class, or prompts beside them in NAME.txt")
    add("--n", type=positive_int, default=64,
        help="how many of these images to look at (%(default)s)")
    add_device(add)
    return ap


if __name__ == "__main__":
    guard(lambda: check(flags().parse_args()))
