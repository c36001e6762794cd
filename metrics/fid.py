"""FID and its relatives: every formula is a function, `image_metrics` takes them all of a model.

With mean mu and covariance S of the features of real (1) and generated (2) images, and p(y|x) what
a classifier says of an image,

    fid              |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))  Heusel et al. 2017
    inception_score  exp(mean KL(p(y|x) || p(y)))                           Salimans et al. 2016
    prdc             precision and recall                                   Kynkaanniemi et al. 2019
                     density and coverage                                   Naeem et al. 2020
"""

import math
import warnings

import numpy as np
import scipy.linalg
import torch

from machinery.errors import UserError
from machinery.files import fingerprint
from machinery.processes import from_first, is_main
from metrics.engine import extracted, scored

METRICS = ("fid", "is", "prdc")


# ----------------------------------------------------------------------- FID: between two Gaussians
def fid(mu1, sigma1, mu2, sigma2):
    """The Frechet distance two ways: by a matrix root, and without one, by eigenvalues.

    tr(M^(1/2)) sums the roots of M's eigenvalues, M = S1 S2. Rank-deficient covariances (of few
    images) are fine.
    """
    product = sigma1 @ sigma2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")               # "singular": as just said
        root = scipy.linalg.sqrtm(product)
        if not np.isfinite(root).all():
            eps = 1e-6 * np.eye(len(mu1))
            root = scipy.linalg.sqrtm((sigma1 + eps) @ (sigma2 + eps))
    roots = np.sqrt(np.linalg.eigvals(product).astype(complex))

    d = mu1 - mu2
    traces = {"fid": np.trace(root).real, "fid_eigenvalues": roots.real.sum()}
    rest = d @ d + np.trace(sigma1) + np.trace(sigma2)
    return {name: float(rest - 2 * trace) for name, trace in traces.items()}


# ----------------------------------------------------------------- Inception Score: of a classifier
def inception_score(logits, shuffle=True, split_size=None):
    """(mean, population std) over splits of exp(mean KL(p(y|x) || p(y))), from logits (N, classes).

    There are three conventions, IS_CONVENTIONS; at 50,000 images they differ by sampling noise.
    """
    log_p = logits.double().log_softmax(-1)                      # log p(y|x), (N, classes)
    n = len(log_p)
    if shuffle:
        log_p = log_p[np.random.RandomState(2020).permutation(n)]
    if split_size:
        splits = log_p.split(split_size)
    else:
        k = min(10, n)
        splits = [log_p[i * n // k : (i + 1) * n // k] for i in range(k)]
    kl = []
    for part in splits:
        log_marginal = part.logsumexp(0) - math.log(len(part))   # log p(y), (classes,)
        kl.append((part.exp() * (part - log_marginal)).sum(1).mean())
    scores = torch.stack(kl).exp()
    return scores.mean().item(), scores.std(correction=0).item()


IS_CONVENTIONS = {
    "is": {},                                                    # torch-fidelity's, and the paper's
    "is_stylegan": dict(shuffle=False),                          # ten splits, in the order drawn
    "is_adm": dict(shuffle=False, split_size=5000),              # chunks, in the order drawn
}


# ----------------------------------------------- precision, recall, density, coverage: of neighbors
def squared_distances(a, b):
    """|a_i - b_j|^2 (n, m), by a matrix product: ten times faster than differences."""
    return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T


def prdc(real, fake, k=3, block_bytes=2**26):
    """Precision, recall, density, coverage of features (N, dim), as a dict.

    The ball around a point reaches to its k-th neighbor in its own set, itself not counted.

        precision, recall   share of fakes inside any real's ball; share of reals inside any fake's
        density             mean over fakes of the number of reals' balls they are inside, over k
        coverage            share of reals' balls with any fake inside

    A ball's surface is outside: distances compare by a strict <. Float64 and a margin of 1e-12 see
    to that: the expanded square is off by 1e-15 or so, which would decide exact ties (duplicate
    images) at random. Rows of distances are taken by blocks, to keep 50,000 x 10,000 of them small.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"{k} neighbors need more than {k} images a side: got {len(real)} real, "
                        f"{len(fake)} fake")
    center = real.double().mean(0)                    # from there, the same distances have
    real, fake = real.double() - center, fake.double() - center       # smaller squares
    tie = 1e-12 * max(f.square().sum(1).max().item() for f in (real, fake))

    rows = max(1, block_bytes // (8 * max(len(real), len(fake))))

    def inside(points, centers):
        """In how many balls each point is, and whether each ball has a point inside."""
        own = (squared_distances(block, centers) for block in centers.split(rows))
        radii = torch.cat([d.kthvalue(k + 1).values for d in own]) - tie       # squared
        counts, full = [], torch.zeros_like(radii, dtype=torch.bool)
        for block in points.split(rows):
            within = squared_distances(block, centers) < radii                 # (b, centers)
            counts.append(within.sum(1))
            full = full | within.any(0)               # if any point is inside, the nearest one is
        return torch.cat(counts), full

    def share(hits):
        return hits.double().mean().item()

    in_real, covered = inside(fake, real)
    in_fake, _ = inside(real, fake)
    return dict(
        precision=share(in_real > 0),
        recall=share(in_fake > 0),
        density=in_real.sum().item() / (k * len(fake)),
        coverage=share(covered),
    )


# ---------------------------------------------------------------------------- all of it, of a model
def metrics_of(fake, reference, metrics):
    """Some of METRICS, as a dict, of an Extracted against a Reference."""
    numbers = {}
    if "fid" in metrics:
        numbers |= fid(fake.mu, fake.sigma, reference.mu, reference.sigma)
    if "is" in metrics:
        for name, convention in IS_CONVENTIONS.items():
            numbers[name], numbers[f"{name}_std"] = inception_score(fake.logits, **convention)
    if "prdc" in metrics and reference.features is not None:
        numbers |= prdc(reference.features, fake.features) | {"k": 3}
    return numbers


def image_metrics(make_images, asked, extractor, reference, batch=250, seed=0, metrics=METRICS,
                  **how):
    """A row of results, a dict: some of METRICS of the images of `asked`, and what they depend on.

    make_images, asked, and `how` (desc, folder): see `scored` in metrics/engine.py. Without an
    extractor, images are only drawn and timed.
    """
    row = {"n": len(asked)}
    if extractor is None:
        def nothing(part, img):
            return torch.zeros(len(img), 1)

        _, facts = scored(make_images, asked, nothing, 1, batch, seed, **how)
        return row | facts

    fake = extracted(make_images, asked, extractor, reference.mu, batch, seed, **how)
    numbers = None
    if is_main():                                     # seconds to minutes of one process's time
        numbers = metrics_of(fake, reference, metrics)
    return {
        **row,
        **from_first(numbers),
        **fake.facts,
        "extractor": f"{type(extractor).__name__} {fingerprint(extractor)}",
        "reference": reference.name,
        **getattr(extractor, "facts", {}),
    }
