"""Are the published files the right ones, and do they know real images?"""

import argparse
import json
import math
import os
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.images import SUFFIXES, list_images, variants  # noqa: E402
from dimo import exact_mask  # noqa: E402
from machinery.errors import UserError, guard  # noqa: E402
from machinery.flags import check_device  # noqa: E402
from soft_embed import embed_tokens  # noqa: E402
from teachers import SPECS, assemble, build, decode_tokens, source  # noqa: E402


def real_images(folder, spec, n):
    """n images spread over a folder, uint8 (n, C, H, W), and their conditions: labels, or prompts.

    Classes are subfolders, as for data/imagenet.py; a prompt is the text file beside an image, NAME.txt.
    """
    if spec.text is None:
        _, names, what = list_images(folder)
    else:
        if not os.path.isdir(folder):
            raise UserError(f"--images {folder}: no such folder")
        names = sorted(f for f in os.listdir(folder) if f.lower().endswith(SUFFIXES)
                       and os.path.isfile(os.path.join(folder, os.path.splitext(f)[0] + ".txt")))
        if not names:
            raise UserError(f"--images {folder}: expected images, each with its prompt in a text file of its name")
        what = [open(os.path.join(folder, os.path.splitext(f)[0] + ".txt")).read().strip() for f in names]
    some = [i * len(names) // n for i in range(n)] if n < len(names) else range(len(names))
    img = [variants(os.path.join(folder, names[i]), i, spec.image, False, 0, 0) for i in some]
    if bad := [names[i] + ": " + v for i, v in zip(some, img) if isinstance(v, str)]:
        raise UserError(f"--images {folder}: cannot read {bad[0]}")
    return torch.stack([torch.from_numpy(v[0]) for v in img]), [what[i] for i in some]


@torch.no_grad()
def knows(teacher, img, what, batch=8, ratio=0.5):
    """What right weights do well, on uint8 images: reconstruction in dB; nats a masked token, half of them masked.

    `null` is without the condition, `uniform` what a network that knows nothing would pay.
    """
    net, tokenizer, spec, _ = teacher
    (E, bias), device = net.tables(), next(net.parameters()).device
    rows = torch.tensor(what, device=device) if spec.text is None else teacher.conditions(what)
    gen, error, nats = torch.Generator().manual_seed(0), 0.0, torch.zeros(2)
    for part, row in zip(img.split(batch), rows.split(batch)):
        cond, part = teacher.cond(row), part.to(device).float() / 255
        x = tokenizer.encode(part)                                                            # (B, L, G)
        error += (decode_tokens(tokenizer, x, cond) - part).square().sum().item()
        mask = exact_mask(ratio, torch.rand(x.shape, generator=gen)).to(device)
        e = embed_tokens(x.masked_fill(mask, net.V), E, bias)
        for i, c in enumerate((cond, net.null(cond))):
            nats[i] += F.cross_entropy(net(e, c)[mask], x[mask]).item() * len(part) / len(img)
    return {"psnr": -10 * math.log10(error / img.numel()), "nats": nats[0].item(), "nats_null": nats[1].item(),
            "nats_uniform": math.log(net.V), "images": len(img)}


def check(args):
    """Report on a teacher's files: found, fitting, how large, and what they know of real images."""
    if args.n < 1:
        raise UserError(f"--n {args.n}: expected 1 image or more")
    check_device(args.device)
    spec, modules = SPECS[args.check], {}
    for role, path in zip(spec.roles, (args.teacher_weights, args.tokenizer_weights, args.text_weights)):
        try:
            modules[role] = build(spec, role, path, args.random_weights, args.text_activation)
            m, state = modules[role], modules[role].state_dict()
            where = "random weights" if args.random_weights else source(spec, role, path)
            finite = all(torch.isfinite(t).all() for t in state.values())
            print(f"{role:9s}  ok   {where}: {type(m).__name__}, {len(state)} tensors, "
                  f"{sum(p.numel() for p in m.parameters()):,} parameters, all finite: {'yes' if finite else 'NO'}")
        except UserError as err:
            print(f"{role:9s}  NOT  {err}")
    if len(modules) < len(spec.roles):
        raise UserError(f"{spec.name} is not complete: see the lines above")
    if args.images:
        found = knows(assemble(spec, modules, args.device), *real_images(args.images, spec, args.n))
        print("on {images} real images: reconstruction {psnr:.2f} dB; {nats:.3f} nats a masked token, {nats_null:.3f} "
              "without the condition, {nats_uniform:.3f} for a guess".format(**found))
        print(json.dumps({"teacher": spec.name, **found}))


def flags():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--check", required=True, metavar="NAME", choices=SPECS, help=f"one of {', '.join(SPECS)}")
    ap.add_argument("--teacher_weights", metavar="PATH", help="local file or folder instead of the published one")
    ap.add_argument("--tokenizer_weights", metavar="PATH", help="likewise")
    ap.add_argument("--text_weights", metavar="PATH", help="likewise")
    ap.add_argument("--text_activation", choices=["gelu", "quick_gelu"], help="of the text encoder")
    ap.add_argument("--random_weights", action="store_true", help="no files at all: to see sizes")
    ap.add_argument("--images", metavar="FOLDER", help="real images: a subfolder a class, or with NAME.txt prompts")
    ap.add_argument("--n", type=int, default=64, help="how many of them (%(default)s)")
    ap.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    return ap


if __name__ == "__main__":
    guard(lambda: check(flags().parse_args()))
