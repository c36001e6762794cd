"""How fashion's tokenizer, teacher and judge were made: the published classes, trained at small size on real images.

    python worlds/make_fashion.py --train_tokenizer    # assets/fashion/tokenizer.safetensors, from the photographs
    python worlds/make_fashion.py --train_mdm          # assets/fashion/teacher.safetensors, from their tokens
    python worlds/make_fashion.py --train_classifier   # assets/fashion/classifier.safetensors and reference.npz, FID's network

README, "The tiny world", has the settings, times and results. Each file's record lies beside it, as JSON.
"""

import argparse
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.tokens import write_packed  # noqa: E402
from dimo import mask_ratio  # noqa: E402
from machinery.errors import UserError  # noqa: E402
from machinery.files import ROOT, replacing  # noqa: E402
from metrics.engine import Moments, extract  # noqa: E402
from metrics.fid import image_metrics  # noqa: E402
from networks.autoencoders import BitTokenizer, bits_of  # noqa: E402
from soft_embed import embed_tokens  # noqa: E402
from teachers import SPECS, MaskBit, decode_tokens  # noqa: E402
from worlds.fashion import ASSETS, FashionNet, load_extractor, load_images  # noqa: E402
from worlds.training import fit, pixel_loss, ship  # noqa: E402


def tokenizer_loss(tok, img, w_entropy=0.02, w_commit=0.02):
    """Reconstruction of pixels and edges, commitment, and LFQ's entropy term.

    Each latent channel gives its bit a probability, sigmoid(4 z). Every position should be sure of its bits (low
    entropy of each), and the batch should use all codes (high entropy of the mean over the joint 2^bits codes, which
    factorizes per position into the two groups). Without the second term a sign quantizer keeps a handful of codes.
    """
    z = tok.encoder(img).float()                                                              # (B, bits, h, w)
    sign = torch.where(z > 0, 1.0, -1.0)
    out = tok.decoder(z + (sign - z).detach()).float()                                        # straight-through
    recon = pixel_loss(out, img)
    commit = (z - sign).square().mean()
    p = torch.sigmoid(4 * z).flatten(2).transpose(1, 2).reshape(-1, tok.bits).clamp(1e-6, 1 - 1e-6)    # (N, bits)
    sure = -(p * p.log() + (1 - p) * (1 - p).log()).sum(1).mean()
    n, on = tok.bits // tok.G, (bits_of(torch.arange(tok.V, device=p.device), tok.bits // tok.G) > 0).float()
    groups = [(p_g.log() @ on.T + (1 - p_g).log() @ (1 - on).T).exp() for p_g in p.split(n, 1)]        # (N, V) each
    joint = groups[0].T @ groups[-1] / len(p) if tok.G == 2 else groups[0].mean(0)
    used = -(joint * (joint + 1e-12).log()).sum()
    loss = recon + w_commit * commit + w_entropy * (sure - used)
    return loss, dict(recon=recon.detach(), sure=sure.detach(), used=used.detach())


def mdm_loss(net, x, labels, dropout_label=0.1):
    """Eq. 1 as MaskBit trains: label-smoothed cross-entropy over all units, each masked with its image's ratio."""
    ratio = mask_ratio(torch.rand(len(x), device=x.device), "arccos")
    x_t = torch.where(torch.rand(x.shape, device=x.device) < ratio[:, None, None], net.V, x)
    cond = torch.where(torch.rand(len(x), device=x.device) < dropout_label, net.classes, labels)
    z = net(embed_tokens(x_t, *net.tables()), (cond,))
    ce = F.cross_entropy(z.flatten(0, 2), x.flatten(), reduction="none", label_smoothing=0.1)
    masked = (x_t == net.V).flatten()
    return ce.mean(), dict(all=ce.detach().mean(), masked=(ce.detach() * masked).sum() / masked.sum())


@torch.no_grad()
def codebook_report(tok, img):
    """PSNR of the reconstruction in dB, codes used, and their perplexity, over uint8 images (N, C, H, W)."""
    error, count = 0.0, torch.zeros(2**tok.bits)
    for part in img.split(500):
        part = part.float() / 255
        x = tok.encode(part)
        error += (decode_tokens(tok, x) - part).square().sum().item()
        shift = torch.arange(tok.G, device=x.device) * (tok.bits // tok.G)
        count += torch.bincount((x << shift).sum(-1).flatten().cpu(), minlength=2**tok.bits)
    p = count / count.sum()
    return dict(psnr=-10 * math.log10(error / img.numel()), codes_used=int((count > 0).sum()), codes=2**tok.bits,
                perplexity=math.exp(-(p * (p + 1e-12).log()).sum()))


def make_reference(args):
    """Train FashionNet, then write its weights (float16), the training set's statistics, and a record of both."""
    start = time.time()
    torch.manual_seed(args.seed)
    img, labels, test, test_labels = (torch.from_numpy(a) for s in ("train", "t10k") for a in load_images(s))
    net, batch = FashionNet().to(args.device), args.batch
    opt = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    bar = tqdm(range(args.steps), "classifier", mininterval=2)
    for n in bar:
        epoch, k = divmod(n, len(img) // batch)
        if k == 0:
            order = torch.randperm(len(img)).split(batch)
        decay = (1.01 + 0.99 * math.cos(math.pi * n / args.steps)) / 2
        opt.param_groups[0]["lr"] = args.lr * min(1, (n + 1) / 100) * decay
        z = net(img[order[k]].to(args.device).float() / 255)[1]
        loss = F.cross_entropy(z, labels[order[k]].to(args.device).long())
        opt.zero_grad()
        loss.backward()
        opt.step()
        if n % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")

    net.half().float().eval().requires_grad_(False)   # as `ship` rounds them: the statistics are the shipped weights'
    features = torch.cat([extract(net, part.to(args.device))[0] for part in img.split(500)])
    moments = Moments(net.dim, features.double().mean(0), args.device)
    moments.add(features)
    mu, sigma = moments.result()
    some = features[:: len(img) // 5000].half().cpu().numpy()    # (5000, dim)
    os.makedirs(ASSETS, exist_ok=True)
    with replacing(os.path.join(ASSETS, "reference.npz")) as f:
        write_packed(f, mu=mu, sigma=sigma.astype(np.float32), n=len(img), features=some)

    def report():                  # what the metric says of real images it was not made from: the floor of every number here
        net, reference = load_extractor(SPECS["maskbit-tiny"], args.device)
        right = [extract(net, part.to(args.device))[1].argmax(1).cpu() for part in test.split(500)]
        shown, rows = test.to(args.device), torch.arange(len(test), device=args.device)
        return dict(n=len(img), n_features=len(some), dim=net.dim,
                    test_accuracy=(torch.cat(right) == test_labels).double().mean().item(),
                    test_images=image_metrics(lambda i, **_: shown[i], rows, net, reference))

    ship(net, os.path.join(ASSETS, "classifier.safetensors"), args, start, report)


def make_tiny(args):
    """Train the tiny tokenizer or the tiny teacher, and ship it."""
    torch.manual_seed(args.seed)
    spec, start = SPECS["maskbit-tiny"], time.time()
    if args.train_tokenizer:
        img = torch.from_numpy(load_images()[0])
        model = BitTokenizer(**spec.tokenizer).to(args.device, memory_format=torch.channels_last)

        def loss_fn():
            part = img[torch.randint(len(img), (args.batch,))].to(args.device).float() / 255
            return tokenizer_loss(model, part.contiguous(memory_format=torch.channels_last))
    else:
        with np.load(os.path.join(ROOT, "assets/fashion/tokens.npz")) as f:
            x, labels = torch.from_numpy(f["tokens"]).long(), torch.from_numpy(f["labels"]).long()
        model = MaskBit(**spec.net, dropout=args.dropout).to(args.device)

        def loss_fn():
            i = torch.randint(len(x), (args.batch,))
            return mdm_loss(model, x[i].to(args.device), labels[i].to(args.device))

    fit(model, loss_fn, args.steps, args.lr, bf16=args.bf16)
    path = os.path.join(ROOT, spec.files["tokenizer" if args.train_tokenizer else "net"][1])
    ship(model, path, args, start, lambda: codebook_report(model.half().float(), torch.from_numpy(load_images("t10k")[0]))
         if args.train_tokenizer else {})


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--train_tokenizer", action="store_true", help="train the tiny tokenizer on Fashion-MNIST")
    ap.add_argument("--train_mdm", action="store_true", help="train the tiny teacher on the tokens in assets/")
    ap.add_argument("--train_classifier", action="store_true", help="train FashionNet, and take its statistics of real images")
    ap.add_argument("--steps", type=int, default=6000)
    ap.add_argument("--batch", type=int, default=64)
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--dropout", type=float, default=0.0)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--bf16", action="store_true", help="bfloat16 autocast (fast on CPUs with AMX and on GPUs)")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = ap.parse_args()
    if args.train_tokenizer + args.train_mdm + args.train_classifier != 1:
        ap.exit(2, "make_fashion.py: name one of --train_tokenizer, --train_mdm and --train_classifier\n")
    if min(args.steps, args.batch) < 1 or not args.lr > 0 or not 0 <= args.dropout < 1:
        ap.exit(2, "make_fashion.py: --steps and --batch are 1 or more, --lr is above 0, --dropout below 1\n")
    try:
        (make_reference if args.train_classifier else make_tiny)(args)
    except (UserError, OSError) as err:
        ap.exit(2, f"make_fashion.py: {err}\n")
