"""FID and its relatives."""

import math
import warnings

import numpy as np
import scipy.linalg
import torch

from machinery.errors import UserError
from machinery.files import fingerprint
from machinery.processes import all_reduce, is_main
from metrics.engine import extracted, in_batches


def fid(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two Gaussians, by the matrix root. Rank-deficient covariances (few images) are fine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", getattr(scipy.linalg, "LinAlgWarning", Warning))      # "singular": fine
        root = scipy.linalg.sqrtm(sigma1 @ sigma2)
        if not np.isfinite(root).all():
            eps = 1e-6 * np.eye(len(sigma1))
            root = scipy.linalg.sqrtm((sigma1 + eps) @ (sigma2 + eps))
    d = mu1 - mu2
    return float(d @ d + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)


def fid_eigenvalues(mu1, sigma1, mu2, sigma2):
    """The same number without a matrix root: tr((S1 S2)^(1/2)) sums the roots of the eigenvalues of S1 S2."""
    d, roots = mu1 - mu2, np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).astype(complex))
    return float(d @ d + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.real.sum())


def inception_score(logits, splits=10, split_size=None, shuffle=True):
    """(mean, population std) over splits of exp(mean KL(p(y|x) || p(y))), from the logits (N, classes).

    Three conventions are about (IS_CONVENTIONS), and differ by sampling noise at 50,000 images: torch-fidelity's, the
    default and the paper's, ten splits after a fixed permutation; StyleGAN's, ten splits in order (shuffle=False);
    ADM's, chunks of 5,000 in order (split_size=5000, shuffle=False).
    """
    logp = torch.as_tensor(logits).double().log_softmax(-1)                                   # (N, classes)
    n = len(logp)
    if shuffle:
        logp = logp[torch.from_numpy(np.random.RandomState(2020).permutation(n)).to(logp.device)]
    splits = min(splits, n)
    edges = [*range(0, n, split_size), n] if split_size else [i * n // splits for i in range(splits + 1)]
    parts = [logp[a:b] for a, b in zip(edges, edges[1:])]
    log_mean = [part.logsumexp(0) - math.log(len(part)) for part in parts]                    # log p(y), (classes,)
    kl = [(part.exp() * (part - log_p)).sum(1).mean() for part, log_p in zip(parts, log_mean)]
    scores = torch.stack(kl).exp()
    return scores.mean().item(), scores.std(correction=0).item()


IS_CONVENTIONS = {"is": {}, "is_stylegan": dict(shuffle=False), "is_adm": dict(shuffle=False, split_size=5000)}


def squared_distances(a, b):
    """|a_i - b_j|^2 (n, m) as |a|^2 + |b|^2 - 2 a b: a matrix product, and ten times faster than differences."""
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(a.square().sum(1)[:, None])


def prdc(real, fake, k=3, block_bytes=2**26):
    """Precision, recall (Kynkaanniemi 2019), density, coverage (Naeem 2020) of features (N, dim), as a dict.

    A ball about a point reaches to its k-th neighbor in its own set, itself not counted, and its surface is
    outside: distances compare by a strict <. Float64 and a margin of 1e-12 see to that: the expanded square is off
    by 1e-15 or so, which would decide exact ties (duplicate images) at random. Blocks keep 50k x 10k small.
    """
    real, fake = (torch.as_tensor(f).double() for f in (real, fake))
    if min(len(real), len(fake)) <= k:
        raise UserError(f"{k} neighbors need more than {k} images a side: got {len(real)} real, {len(fake)} fake")
    real, fake = real - real.mean(0), fake - real.mean(0)        # the same distances, of smaller squares
    tie = 1e-12 * max(f.square().sum(1).max().item() for f in (real, fake))
    blocks = lambda a, b: a.split(max(1, block_bytes // (8 * len(b))))
    radii = lambda f: torch.cat([squared_distances(part, f).kthvalue(k + 1).values for part in blocks(f, f)])
    r_real, r_fake = radii(real) - tie, radii(fake) - tie        # squared
    precise = inside = 0
    recalled = covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    start = 0
    for part in blocks(fake, real):
        d = squared_distances(part, real)                                                     # (block, N real)
        in_real = d < r_real
        precise += in_real.any(1).sum().item()
        inside += in_real.sum().item()
        covered = covered | in_real.any(0)                       # if any fake is inside, the nearest one is
        recalled = recalled | (d < r_fake[start:start + len(part), None]).any(0)
        start += len(part)
    return dict(precision=precise / len(fake), recall=recalled.double().mean().item(),
                density=inside / (k * len(fake)), coverage=covered.double().mean().item())


METRICS = ("fid", "is", "prdc")


@torch.no_grad()
def image_metrics(make_images, labels, extractor, reference, batch=250, seed=0, k=3, desc=None, metrics=METRICS, folder=None):
    """All metrics of len(labels) images, or those of `metrics`, as a dict; desc names the progress bar (none without).

    labels: conditions, a row an image. make_images(labels (b, ...), generator=, seconds=) -> uint8 images; bind the
    rest with functools.partial. Without an extractor the images are only made and timed. Batch i draws from a
    generator seeded by (seed, i), and whole batches go to processes in turn: so the images, their order, and the
    numbers do not depend on the number of processes. (They do depend on `batch`.)
    """
    n = len(labels)
    if extractor is None:
        facts = dict(seed=seed, batch=batch)
        for _ in in_batches(make_images, labels, batch, seed, desc, facts, folder):
            pass
        return dict(n=n, **facts)
    features, logits, mu, sigma, facts = extracted(make_images, labels, extractor, reference.mu, batch, seed, desc,
                                                   folder)
    row = dict(n=n)
    if "fid" in metrics:
        both = torch.zeros(2, dtype=torch.float64, device=labels.device)
        if is_main():                                # half a minute of a core at 2048 features: on one is enough
            pair = mu, sigma, reference.mu, reference.sigma
            both[:] = torch.tensor([fid(*pair), fid_eigenvalues(*pair)], dtype=torch.float64)
        row["fid"], row["fid_eigenvalues"] = all_reduce(both).tolist()
    if "is" in metrics:
        for name, convention in IS_CONVENTIONS.items():
            row[name], row[f"{name}_std"] = inception_score(logits, **convention)
    if "prdc" in metrics and reference.features is not None:
        row.update(prdc(reference.features, features, k), k=k)
    row.update(facts, extractor=f"{type(extractor).__name__} {fingerprint(extractor)}", reference=reference.name,
               **getattr(extractor, "facts", {}))
    return row
