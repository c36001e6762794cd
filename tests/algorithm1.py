"""Algorithm 1 a second time, as the paper writes it: what train.py must come to.

train.py takes each term of Eq. 10 as a gradient at the logits, in float32, in micro-batches, on
several processes. Here there is one function, read from top to bottom with the paper beside it: a
scalar for each loss, autograd for each gradient, one batch, float64, and an optimizer written out.
It shares no line with train.py and what that calls. Given are only the networks, which have proofs
of their own, and what is random.

float64 costs seconds and saves the question whether a difference is a mistake or a rounding: what
differs from train.py by more than float32's roundings is a mistake in one of the two.
"""

import contextlib
import copy
import math
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F


@contextlib.contextmanager
def in_float64():
    """Networks call .float() where bf16 would not do: here it means float64, too."""
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def algorithm1(teacher, theta_0, heads, rewards, draws, c):
    """Algorithm 1 with settings c, a step for each of `draws`; all networks are in float64.

    teacher has net (phi), tokenizer and spec; heads is the discriminator's trained part before
    training, or None; rewards is the judge, (images, prompts) -> {name: (B,)}, or None. Each of
    `draws` has the random tensors of a step's batch, its condition, and real tokens. Returns the
    networks, the optimizers, and what the log tells of each step.
    """
    phi = teacher.net
    E, bias = phi.tables()                                              # Emb_phi: (G, V+1, d)
    E_dec, bias_dec = teacher.tokenizer.tables()                        # Emb_Dec
    scale = teacher.spec.noise_scale or E[:, : phi.V].square().mean().sqrt()
    theta, psi, eta = copy.deepcopy((theta_0, phi, heads))                                  # l. 1
    average = copy.deepcopy(theta)
    updates = dict(student=Updates(theta, c, c.lr))
    if c.w_dimo:
        updates["aux"] = Updates(psi, c, c.aux_lr or c.lr)
    if c.gan:
        updates["disc"] = Updates(eta, c, c.disc_lr or c.lr, beta1=0.0)
    log = []
    for step, d in enumerate(draws):                                                        # l. 2
        B = len(d.u)
        if c.share_passes:
            d.ratio_aux, d.scores_aux = d.ratio, d.scores_t
            d.ratio_disc, d.scores_disc, d.gumbel_disc = d.ratio_gan, d.scores_gan, d.gumbel_gan
        row, terms = {}, {}
        factor = step / c.warmup if step < c.warmup else cosine(step, c)

        # --- Generate logits z_theta and tokens x_theta
        x_init = d.tokens.masked_fill(lowest(d.scores, c.init_ratio), phi.V)                # l. 4
        z = theta(embed(x_init, E, bias), d.cond, s=c.noise, noise=scale * d.noise)         # l. 5
        x = draw(z, d.u)                                                                    # l. 6

        # --- The generator's loss, Eq. 10
        if c.w_dimo and step >= c.student_start:
            t = SCHEDULES[c.schedule](d.ratio).clamp(*c.ratio_range)                        # l. 8
            mask = lowest(d.scores_t, t)
            e_t = embed(x.masked_fill(mask, phi.V), E, bias)
            if c.soft_state:                                                           # App. I.15
                e_t = soft(z.softmax(-1), E, bias, mask)
            with torch.no_grad():
                z_phi, z_psi = guided(phi, e_t, d.cond, t, c), psi(e_t, d.cond)             # l. 9
            z_psi.requires_grad_()
            D = divergence(z_phi.log_softmax(-1), z_psi.log_softmax(-1), c.beta)     # (B, L, G)
            w = 1 / t if c.w_t == "inverse" else torch.ones(B)
            row["loss_dimo"] = (w * (D * mask).sum((1, 2))).mean()
            g = gradient(row["loss_dimo"], z_psi)
            # Eq. (2): a loss of z_theta that has this gradient, taken at z_psi
            terms["dimo"] = c.w_dimo * 0.5 * (z - (z - g).detach()).square().sum()         # l. 11
        if c.gan and c.w_gan and step >= max(c.gan_start, c.student_start):
            mask = lowest(d.scores_gan, between(c.gan_ratio, d.ratio_gan), least=0)
            e = soft(probabilities(z, c, d.gumbel_gan), E, bias, mask)                     # l. 12
            features = phi(e, d.cond, eta.layers)
            p_real = eta(noisy(features, c, d.features_gan)).sigmoid()
            row["loss_gan"] = -p_real.log().mean()                             # Eq. (8), l. 14
            terms["gan"] = c.w_gan * row["loss_gan"]
        if c.reward and c.w_reward and step >= max(c.reward_start, c.student_start):
            e = soft(probabilities(z, c, d.gumbel_reward), E_dec, bias_dec)
            R = rewards(teacher.tokenizer.decode(e, d.cond).clamp(0, 1), d.prompts)
            L = -sum(weight * R[name] for name, weight in c.rewards.items())    # (B,), Eq. (9)
            row |= {name: score.mean() for name, score in R.items()}
            row["loss_reward"] = L.mean()
            if c.clip_reward:                     # no image may weigh more than by this gradient
                L = L * (c.clip_reward / gradient(L.sum(), z).flatten(1).norm(dim=1)).clamp(max=1)
            terms["reward"] = c.w_reward * L.mean()                                        # l. 16
        if terms:
            row |= {f"grad_{name}": gradient(L, z).norm() for name, L in terms.items()}
            row["norm_student"] = updates["student"](sum(terms.values()), factor)      # l. 17, 18
            n = step - c.student_start
            move(average, theta, min(c.ema, (1 + n) / (10 + n)))

        # --- The auxiliary: an MDM, whose data are the generator's tokens
        if c.w_dimo:
            z_fixed, cond = z.detach(), d.cond
            if c.redraw:                               # the official code: from the new generator
                x_init = d.again_tokens.masked_fill(lowest(d.again_scores, c.init_ratio), phi.V)
                cond = d.again_cond
                with torch.no_grad():
                    z_fixed = theta(embed(x_init, E, bias), cond, s=c.noise,
                                    noise=scale * d.again_noise)
                x = draw(z_fixed, d.again_u)
            t = SCHEDULES[c.schedule](d.ratio_aux).clamp(*c.ratio_range)                   # l. 20
            mask = lowest(d.scores_aux, t)
            log_p = psi(embed(x.masked_fill(mask, phi.V), E, bias), cond).log_softmax(-1)
            q = (1 - c.smoothing) * F.one_hot(x, z.shape[-1]) + c.smoothing / z.shape[-1]
            hard = -(q * log_p).sum(-1)[mask].mean()                                    # Eq. (1)
            log_q = z_fixed.log_softmax(-1)
            easy = (log_q.exp() * (log_q - log_p)).mean(-1)[mask].mean()
            row["loss_aux"] = (1 - c.soft_target) * hard + c.soft_target * easy
            row["norm_aux"] = updates["aux"](row["loss_aux"], factor)                      # l. 21

        # --- The discriminator: real tokens against the generator's soft embeddings
        if c.gan:
            z = z.detach()
            mask = lowest(d.scores_disc, between(c.gan_ratio, d.ratio_disc), least=0)      # l. 23
            fake = soft(probabilities(z, c, d.gumbel_disc), E, bias, mask)
            real = embed(d.x_real.masked_fill(mask, phi.V), E, bias)                       # l. 24
            real, fake = (phi(e, d.cond, eta.layers) for e in (real, fake))
            d_real = eta(noisy(real, c, d.features_real))
            d_fake = eta(noisy(fake, c, d.features_fake))
            p_real, p_fake = d_real.sigmoid(), d_fake.sigmoid()
            row["loss_disc"] = -p_real.log().mean() - (1 - p_fake).log().mean()        # Eq. (7)
            row["norm_disc"] = updates["disc"](row["loss_disc"], factor)                   # l. 25
            row |= dict(d_real=d_real.mean(), d_fake=d_fake.mean())

        p = z.softmax(-1)
        row |= dict(entropy=-(p * p.log()).sum(-1).mean(), top1=p.amax(-1).mean())
        log.append({key: float(value) for key, value in row.items()})
        log[-1] |= dict(step=step + 1, lr=c.lr * factor)
    nets = dict(student=theta, aux=psi, disc=eta, ema=average)                             # l. 27
    return SimpleNamespace(nets=nets, updates=updates, log=log)


# -------------------------------------------------------------------------- masks and tokens
SCHEDULES = {                                     # share of masked units, for u ~ U(0, 1)
    "arccos": lambda u: u.arccos() * 2 / math.pi,
    "cosine": lambda u: (u * math.pi / 2).cos(),
    "linear": lambda u: u,
    "square": lambda u: u**2,
}


def between(bounds, u):
    low, high = bounds
    return low + (high - low) * u


def lowest(scores, ratio, least=1):
    """True at each image's round(ratio * units) units of the lowest scores, `least` at least."""
    flat = scores.flatten(1)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    counts = (torch.as_tensor(ratio) * flat.shape[1]).round().clamp(min=least).expand(len(flat))
    for row, image, count in zip(mask, flat, counts.tolist()):
        row[image.sort().indices[: int(count)]] = True
    return mask.view_as(scores)


def draw(z, u):
    """A token per unit by the inverse CDF: as many entries lie below it as sums are at most u."""
    sums = z.detach().softmax(-1).cumsum(-1)
    return (sums <= u[..., None]).sum(-1).clamp(max=z.shape[-1] - 1)


# --------------------------------------------------------------------------------- embeddings
def embed(x, E, bias):
    """Tokens (B, L, G) -> (B, L, d)."""
    return sum(table[x[..., g]] for g, table in enumerate(E)) + bias


def soft(p, E, bias, mask=None):
    """Eq. (3): p (B, L, G, V) -> expected embeddings (B, L, d), the mask's row where it is true."""
    if mask is not None:
        p = F.pad(p, (0, E.shape[1] - p.shape[-1]))
        masked = F.one_hot(torch.full_like(mask, E.shape[1] - 1, dtype=torch.int64), E.shape[1])
        p = torch.where(mask[..., None], masked, p)
    return torch.einsum("blgv,gvd->bld", p, E[:, : p.shape[-1]]) + bias


def probabilities(z, c, gumbel):
    """What Eq. (3) averages by; or Eq. (14), or Eq. (15), which is one-hot and has its gradient."""
    if c.estimator == "soft":
        return (z / c.tau).softmax(-1)
    p = ((z + gumbel) / c.tau).softmax(-1)
    if c.estimator == "straight-through":
        p = F.one_hot(p.argmax(-1), p.shape[-1]) + p - p.detach()
    return p


def noisy(features, c, noise):
    if not c.feature_noise:
        return features
    return [h + c.feature_noise * n for h, n in zip(features, noise)]                  # App. H.3


# ------------------------------------------------------------------ teacher against auxiliary
def guided(phi, e, cond, t, c):
    """Classifier-free guidance, constant or falling with the mask ratio (App. I.9)."""
    share = dict(constant=torch.ones_like(t), linear=t, cosine=(1 - (math.pi * t).cos()) / 2)
    low = 0.0 if c.cfg_schedule == "constant" else c.cfg_low
    w = between((low, c.cfg), share[c.cfg_schedule])[:, None, None, None]
    z, z_null = phi(e, cond), phi(e, phi.null(cond))
    return z_null + w * (z - z_null)


def divergence(log_q, log_p, beta):
    """Generalized Jeffreys, (1 - beta) KL(q || p) + beta KL(p || q), of each unit."""
    forward = (log_q.exp() * (log_q - log_p)).sum(-1)
    reverse = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (1 - beta) * forward + beta * reverse


# ------------------------------------------------------------------------------------ updates
def gradient(loss, at):
    """Of a scalar at one tensor, as a constant; the graph stays."""
    return torch.autograd.grad(loss, at, retain_graph=True)[0]


def cosine(step, c):
    """Share of the learning rate after the warm-up: from 1 to lr_end by half a wave."""
    wave = math.cos(math.pi * (step - c.warmup) / (c.steps - c.warmup))
    return c.lr_end + (1 - c.lr_end) * (1 + wave) / 2


@torch.no_grad()
def move(average, net, rate):
    for mean, p in zip(average.parameters(), net.parameters()):
        mean.copy_(rate * mean + (1 - rate) * p)


class Updates:
    """Adam, AdamW or Muon for a network: each call is one step down the gradient of a loss."""

    def __init__(self, net, c, lr, beta1=0.9):
        frozen = set(map(id, net.frozen())) if hasattr(net, "frozen") else set()
        net.requires_grad_(True)
        self.params = [p for p in net.parameters() if id(p) not in frozen]
        self.c, self.lr, self.betas, self.n = c, lr, (beta1, 0.999), 0
        self.m, self.v = ([torch.zeros_like(p) for p in self.params] for _ in range(2))

    def __call__(self, loss, factor):
        """Returns the gradient's norm before clipping."""
        grads = torch.autograd.grad(loss, self.params)
        norm = sum(g.square().sum() for g in grads).sqrt()
        self.n += 1
        lr, decay, optimizer = self.lr * factor, self.c.weight_decay, self.c.optimizer
        with torch.no_grad():
            for p, g, m, v in zip(self.params, grads, self.m, self.v):
                g = g * min(1, self.c.clip / (norm + 1e-6))
                muon = optimizer == "muon" and p.ndim == 2
                if optimizer == "adamw" or muon:
                    p *= 1 - lr * decay
                else:
                    g = g + decay * p
                if muon:
                    m.copy_(0.95 * m + 0.05 * g)
                    p -= lr * 0.2 * math.sqrt(max(p.shape)) * orthogonal(0.95 * m + 0.05 * g)
                    continue
                (beta1, beta2), n = self.betas, self.n
                m.copy_(beta1 * m + (1 - beta1) * g)
                v.copy_(beta2 * v + (1 - beta2) * g.square())
                p -= lr * m / (1 - beta1**n) / ((v / (1 - beta2**n)).sqrt() + 1e-6)
        return norm


def orthogonal(m):
    """Muon's matrix: the singular values of m nearly at 1, by five steps of Newton and Schulz."""
    m = m / m.norm()
    for _ in range(5):
        s = m @ m.T
        m = 3.4445 * m + (-4.7750 * s + 2.0315 * s @ s) @ m
    return m
