"""The multi-step samplers of the published teachers, as tables of numbers.

All four sample alike: guess every masked token, keep the guesses one is surest of, mask the rest
again. They differ in numbers that change from step to step. So a sampler is a *plan*: a table with
one row per step. Below, i is the step and N their number.
"""

import math
from typing import NamedTuple

import torch

from dimo import guided_logits, mask_ratio
from soft_embed import embed_tokens, gumbel, sample_tokens


class Step(NamedTuple):
    w: float                # guidance u + w (c - u)
    noise: float            # scale of the Gumbel noise on the confidence
    hidden: int             # units masked again afterwards, those of least confidence; 0 ends it
    divide: float = 1.0     # softmax temperature: guided logits are divided by it
    draw: float = 1.0       # temperature of the draw, on top of `divide`; 0 is argmax
    by_logit: bool = False  # confidence is the logit of the drawn token, else its log-probability


def schedule_ratio(q, schedule):
    """Share of units masked at progress q, falling from 1 to 0: as in training, or `root`."""
    q = torch.as_tensor(q, dtype=torch.float32)
    powers = {"linear": 1, "square": 2, "root": 0.5}
    if schedule in powers:
        return 1 - q ** powers[schedule]
    return mask_ratio(q, schedule).clamp(0, 1)


def hidden_counts(units, N, schedule):
    """Units left masked after each step: floor(units * ratio), one fewer at least; at the end 0."""
    hidden = units
    for i in range(1, N):
        ratio = float(schedule_ratio(i / N, schedule))
        wanted = math.floor(units * ratio)
        hidden = min(wanted, hidden - 1)
        hidden = max(hidden, 1)
        yield hidden
    yield 0


def rise(r):
    """From 0 to 1 as r goes from 0 to 1, along half a cosine."""
    return (1 - math.cos(math.pi * r)) / 2


def maskbit_plan(units, N, guidance=0.0, temperature=0.0, schedule="arccos"):
    """guidance G: c + s (c - u), so w = 1 + s, with s = G (1 - cos(pi (i/N)^3)) / 2.

    temperature T: noise T (1 - (i+1)/N).
    """
    plan = []
    for i, hidden in enumerate(hidden_counts(units, N, schedule)):
        s = guidance * rise((i / N) ** 3)
        noise = temperature * (1 - (i + 1) / N)
        plan.append(Step(1 + s, noise, hidden))
    return plan


def maskgit_plan(units, N, guidance=3.0, temperature=4.5, schedule="arccos"):
    """guidance G: u + (1 + G f) (c - u), f from 0 in the first step to 1 in the last.

    temperature T: noise T (1 - f). The schedule says how many tokens each step reveals, and not how
    many it leaves.
    """
    ratio = schedule_ratio(torch.linspace(1, 0, N), schedule)
    revealed = ratio / ratio.sum().clamp(min=1e-9) * units
    revealed = revealed.round().clamp(min=1).int()                          # half to even
    hidden = units - revealed.cumsum(0)
    hidden = hidden.clamp(min=0).tolist()
    hidden[-1] = 0
    fs = [i / (N - 1) for i in range(N - 1)] + [1.0]
    plan = []
    for f, k in zip(fs, hidden):
        w = 1 + guidance * f
        plan.append(Step(w, temperature * (1 - f), k))
    return plan


def meissonic_plan(units, N, guidance=9.0, temperature=2.0, schedule="cosine"):
    """guidance: w itself, constant. temperature T: noise, from T in the first step to 0."""
    noise = torch.linspace(temperature, 0, N).tolist()
    hidden = hidden_counts(units, N, schedule)
    return [Step(guidance, *row) for row in zip(noise, hidden)]


def maskgen_plan(units, N, guidance=12.0, temperature=2.0, schedule="arccos"):
    """guidance G: c + s (c - u), so w = 1 + s, where s goes from about 1 to G with r = (i+1)/N.

    temperature T: the draw's and the confidence's, T (1 - r). The softmax's falls from 1.25 to 0.5.
    Confidence is the logit itself.
    """
    plan = []
    for i, hidden in enumerate(hidden_counts(units, N, schedule)):
        r = (i + 1) / N
        s = 1 + (guidance - 1) * rise(r)
        noise = temperature * (1 - r)
        divide = 0.5 + 0.8 * (1 - r)
        plan.append(Step(1 + s, noise, hidden, divide, draw=noise, by_logit=True))
    return plan


@torch.no_grad()
def sample(net, cond, plan, *, x=None, order=None, rand=torch.rand):
    """The multi-step sampler: tokens (B, L, G) after the steps of `plan`.

    A mask that MaskGit drew becomes token V-1. x: tokens to start from, V where there is none yet;
    by default all are masked. order (L, G), if given, takes the place of confidence: units of low
    rank are kept first (`halton_order`). rand gives the uniforms (2, B, L, G) of each step: for the
    draw, and for the noise on the confidence.
    """
    E, bias = net.tables()
    if x is None:
        x = torch.full((len(cond[0]), net.L, net.G), net.V, device=E.device)
    masked = x == net.V
    for i, step in enumerate(plan):
        e = embed_tokens(x, E, bias)
        cond_i = net.at(cond, len(plan) - 1 - i)
        z = guided_logits(net, e, cond_i, step.w)                           # (B, L, G, V)
        z = z.float() / step.divide
        u, u_noise = rand(2, *x.shape, device=x.device)
        guess = sample_tokens(z, step.draw, u)
        drawn = torch.where(masked, guess, x)
        if not step.hidden:
            return drawn.clamp(max=net.V - 1)
        if order is None:
            score = z if step.by_logit else z.log_softmax(-1)
            score = score.gather(-1, drawn[..., None])[..., 0]              # (B, L, G)
            confidence = score + step.noise * gumbel(u_noise)
        else:
            confidence = -order.to(z).expand(x.shape)
        confidence = torch.where(masked, confidence, torch.inf)             # known units stay
        k = (masked.flatten(1).sum(1) - 1).clamp(1, step.hidden)            # (B,)
        ranked = confidence.flatten(1).sort(1).values                       # all units of a sample
        threshold = ranked.gather(1, k[:, None] - 1)                        # (B, 1)
        unsure = confidence <= threshold[:, None]
        masked = masked & unsure
        x = torch.where(masked, net.V, drawn)


def halton_order(grid):
    """Ranks (L, 1) of a (rows, columns) grid's cells: when a 2-D Halton sequence first visits each.

    Bases are 2 and 3, the first point is (1/2, 1/3). It spreads the tokens of one step evenly over
    the image, so that they depend on each other least (Besnier et al. 2025): the training-free
    baseline of Tab. 2.
    """
    from scipy.stats import qmc

    rows, columns = grid
    points = qmc.Halton(2, scramble=False).fast_forward(1).random(100 * rows * columns)
    cells = (points * grid).astype(int) @ (columns, 1)                      # (n,)
    visited = list(dict.fromkeys(cells))                                    # keeps the first visits
    if len(visited) < rows * columns:
        raise ValueError(f"{len(points)} Halton points miss cells of a {rows} x {columns} grid")
    return torch.tensor(visited).argsort()[:, None]
