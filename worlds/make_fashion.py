"""How fashion's networks were made: the published classes, trained at small size on real images.

    python worlds/make_fashion.py --train_tokenizer     # from the photographs
    python worlds/make_fashion.py --train_mdm           # the teacher, from their tokens
    python worlds/make_fashion.py --train_classifier    # FID's network, and reference.npz

Each writes into assets/fashion/, and a record beside the weights. assets/fashion/README.md has the
settings, times and results of the files that ship.
"""

import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, f"{os.path.dirname(__file__)}/..")
from data.tokens import write_packed  # noqa: E402
from dimo import mask_ratio  # noqa: E402
from machinery.errors import guard  # noqa: E402
from machinery.files import replacing  # noqa: E402
from machinery.flags import add_device, parser, share  # noqa: E402
from metrics.engine import Moments, extract  # noqa: E402
from metrics.fid import image_metrics  # noqa: E402
from metrics.reference import load_reference  # noqa: E402
from networks.autoencoders import BitTokenizer, bits_of  # noqa: E402
from soft_embed import embed_tokens  # noqa: E402
from teachers import SPECS, MaskBit, decode_tokens  # noqa: E402
from worlds.fashion import ASSETS, FashionNet, load_images  # noqa: E402
from worlds.training import fit, pixel_loss, ship, training_flags  # noqa: E402


SPEC = SPECS["maskbit-tiny"]


def photographs(split, device):
    """(images uint8 (N, 1, 32, 32), labels (N,)) of a split, on the device."""
    img, labels = map(torch.from_numpy, load_images(split))
    return img.to(device), labels.long().to(device)


# ------------------------------------------------------------------------------- the tokenizer
def tokenizer_loss(tok, img):
    """Reconstruction of pixels and edges, commitment, and LFQ's entropy term.

    Each latent channel gives its bit a probability, sigmoid(4 z). Every position should be sure of
    its bits (low entropy of each), and the batch should use all codes (high entropy of the mean
    over the joint 2^bits codes, which factorizes per position into the two groups). Without the
    second term a sign quantizer keeps a handful of codes.
    """
    z = tok.encoder(img).float()                                             # (B, bits, h, w)
    sign = torch.where(z > 0, 1.0, -1.0)
    out = tok.decoder(z + (sign - z).detach()).float()                       # straight-through
    recon = pixel_loss(out, img)
    commit = (z - sign).square().mean()

    p = torch.sigmoid(4 * z).clamp(1e-6, 1 - 1e-6)
    p = p.flatten(2).transpose(1, 2).reshape(-1, tok.bits)                   # (N, bits)
    sure = -(p * p.log() + (1 - p) * (1 - p).log()).sum(1).mean()
    n = tok.bits // 2
    on = (bits_of(torch.arange(tok.V, device=p.device), n) > 0).float()      # (V, n)

    def of_codes(q):
        """Probabilities of a group's bits (N, n) -> of its codes (N, V)."""
        return (q.log() @ on.T + (1 - q).log() @ (1 - on).T).exp()

    first, second = map(of_codes, p.split(n, 1))
    joint = first.T @ second / len(p)                                        # (V, V)
    used = -(joint * (joint + 1e-12).log()).sum()
    log = dict(recon=recon, sure=sure, used=used)
    return recon + 0.02 * commit + 0.02 * (sure - used), log


@torch.no_grad()
def codebook_report(tok, img):
    """PSNR of the reconstruction in dB, codes used, and their perplexity, over uint8 images."""
    codes = 2**tok.bits
    error, count = 0.0, torch.zeros(codes)
    for part in img.split(500):
        part = part.float() / 255
        x = tok.encode(part)                                                 # (b, L, G)
        error += (decode_tokens(tok, x) - part).square().sum().item()
        shift = torch.arange(tok.G) * (tok.bits // tok.G)
        count += torch.bincount((x << shift).sum(-1).flatten(), minlength=codes)
    p = count / count.sum()
    entropy = -(p * (p + 1e-12).log()).sum()
    return dict(psnr=-10 * math.log10(error / img.numel()),
                codes_used=int((count > 0).sum()),
                codes=codes,
                perplexity=math.exp(entropy))


def train_tokenizer(args):
    img, _ = photographs("train", args.device)
    model = BitTokenizer(**SPEC.tokenizer)
    model.to(args.device, memory_format=torch.channels_last)

    def loss_fn():
        part = img[torch.randint(len(img), (args.batch,))].float()
        part = part.contiguous(memory_format=torch.channels_last)
        return tokenizer_loss(model, part / 255)

    model = fit(model, loss_fn, args).half().float().cpu()                   # as it ships
    test, _ = photographs("t10k", "cpu")
    ship(model, f"{ASSETS}/tokenizer.safetensors", args, **codebook_report(model, test))


# ------------------------------------------------------------------------------- the teacher
def mdm_loss(net, x, labels):
    """Eq. 1 as MaskBit trains: label-smoothed cross-entropy over all units, masked or not.

    Each image has a mask ratio of its own; a tenth of the labels are left out, for guidance.
    """
    B, device = len(x), x.device
    ratio = mask_ratio(torch.rand(B, device=device), "arccos")
    mask = torch.rand(x.shape, device=device) < ratio[:, None, None]
    x_t = torch.where(mask, net.V, x)
    dropped = torch.rand(B, device=device) < 0.1
    cond = torch.where(dropped, net.classes, labels)
    z = net(embed_tokens(x_t, *net.tables()), (cond,))
    ce = F.cross_entropy(z.flatten(0, 2), x.flatten(),
                         reduction="none", label_smoothing=0.1)
    loss, masked = ce.mean(), mask.flatten()
    return loss, dict(all=loss, masked=(ce * masked).sum() / masked.sum())


def train_mdm(args):
    with np.load(f"{ASSETS}/tokens.npz") as f:
        x, labels = (torch.from_numpy(f[name]).long().to(args.device)
                     for name in ("tokens", "labels"))
    model = MaskBit(**SPEC.net, dropout=args.dropout).to(args.device)

    def loss_fn():
        i = torch.randint(len(x), (args.batch,))
        return mdm_loss(model, x[i], labels[i])

    ship(fit(model, loss_fn, args), f"{ASSETS}/teacher.safetensors", args)


# ----------------------------------------------------------------- classifier and statistics
def classify(img, labels, args):
    """A FashionNet trained on uint8 images and their labels."""
    net = FashionNet().to(args.device)
    opt = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    bar = tqdm(range(args.steps), "classifier", mininterval=2)
    for n in bar:
        k = n % (len(img) // args.batch)
        if k == 0:                                                           # a new epoch
            order = torch.randperm(len(img)).split(args.batch)
        decay = (1.01 + 0.99 * math.cos(math.pi * n / args.steps)) / 2
        warmup = min(1, (n + 1) / 100)
        opt.param_groups[0]["lr"] = args.lr * warmup * decay
        _, z = net(img[order[k]].float() / 255)
        loss = F.cross_entropy(z, labels[order[k]])
        opt.zero_grad()
        loss.backward()
        opt.step()
        if n % 50 == 0:
            bar.set_postfix(loss=loss.item())
    return net


def train_classifier(args):
    """Train FashionNet; write its weights, the training set's statistics, a record of both.

    The record says what the metric says of real images it was not made from: the floor of all
    numbers.
    """
    img, labels = photographs("train", args.device)
    test, test_labels = photographs("t10k", args.device)
    net = classify(img, labels, args)
    net.half().float().eval().requires_grad_(False)                          # as it ships
    features = torch.cat([extract(net, part)[0] for part in img.split(500)])
    moments = Moments(net.dim, features.double().mean(0), args.device)
    moments.add(features)
    mu, sigma = moments.result()
    some = features[:: len(img) // 5000].half().cpu().numpy()                # (5000, dim)
    path = f"{ASSETS}/reference.npz"
    with replacing(path) as f:
        write_packed(
            f, mu=mu,
            sigma=sigma.astype(np.float32),
            n=len(img), features=some)

    reference = load_reference(path, net.dim, args.device)
    guess = torch.cat([extract(net, part)[1].argmax(1) for part in test.split(500)])
    every = torch.arange(len(test), device=args.device)
    row = image_metrics(lambda i, **_: test[i], every, net, reference)
    ship(net, f"{ASSETS}/classifier.safetensors", args,
         n=len(img),
         n_features=len(some),
         dim=net.dim,
         test_accuracy=(guess == test_labels).double().mean().item(),
         test_images=row)


def main(args):
    torch.manual_seed(args.seed)
    if args.train_tokenizer:
        train_tokenizer(args)
    elif args.train_mdm:
        train_mdm(args)
    else:
        train_classifier(args)


if __name__ == "__main__":
    ap = parser(__doc__)
    what = ap.add_mutually_exclusive_group(required=True).add_argument
    what("--train_tokenizer", action="store_true", help="train the tiny tokenizer")
    what("--train_mdm", action="store_true", help="train the tiny teacher on the tokens in assets/")
    what("--train_classifier", action="store_true",
         help="train FashionNet, and take its statistics of real images")
    training_flags(ap.add_argument, steps=6000, batch=64, lr=2e-3)
    ap.add_argument("--dropout", type=share, default=0.0,
                    help="share of the teacher's activations to drop (%(default)s)")
    add_device(ap.add_argument)
    guard(lambda: main(ap.parse_args()))
