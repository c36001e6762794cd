"""Algorithm 1 a second time, as the paper writes it: what train.py must come to.

train.py takes each term of Eq. 10 as a gradient at the logits, in float32, in micro-batches, on
several processes. Here is one function, to be read from top to bottom with the paper beside it: a
scalar for each loss, autograd for each gradient, one batch, float64, an optimizer written out. It
shares no line with train.py and with what that calls, but the networks, which have proofs of their
own, and what is random: both are given.
"""

import contextlib
import copy
import math
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.autograd import grad


def algorithm1(teacher, theta_0, heads, rewards, draws, c):
    """Algorithm 1 with settings c and a step for each of `draws`; all networks are in float64.

    teacher: net (phi), tokenizer, spec. heads: the discriminator's trained part at its start, or
    None. rewards: (images, prompts) -> {name: (B,)}, or None. draws: the random tensors of a whole
    batch, with conditions and real tokens. Returns networks, optimizers, and a log.
    """
    phi, V = teacher.net, teacher.net.V
    E, bias = phi.tables()                                                   # Emb_phi: (G, V+1, d)
    scale = teacher.spec.noise_scale or E[:, :V].square().mean().sqrt()
    theta, psi, eta = copy.deepcopy((theta_0, phi, heads))                                  # l. 1
    average = copy.deepcopy(theta)
    updates = dict(student=Updates(theta, c, c.lr))
    if c.w_dimo:
        updates["aux"] = Updates(psi, c, c.aux_lr or c.lr)
    if c.gan:
        updates["disc"] = Updates(eta, c, c.disc_lr or c.lr, beta1=0.0)
    log, margins = [], []

    def generate(start):
        x_init = start.tokens.masked_fill(lowest(start.scores, c.init_ratio), V)            # l. 4
        noise = scale * start.noise
        return theta(embed(x_init, E, bias), start.cond, s=c.noise, noise=noise)            # l. 5

    for step, d in enumerate(draws):                                                        # l. 2
        # --- Generate logits z_theta and tokens x_theta
        z = z_gan = generate(d.start)                                                # (B, L, G, V)
        cond = cond_gan = d.start.cond
        if d.pair:                                    # real images with conditions of their own
            z_gan, cond_gan = generate(d.pair), d.pair.cond
        x, margin = draw(z, d.start.u)                                                      # l. 6
        margins.append(margin)
        p = torch.cat([z, z_gan] if d.pair else [z]).softmax(-1)
        row = dict(entropy=-(p * p.log()).sum(-1).mean(), top1=p.amax(-1).mean())

        # --- Update the generator theta by Eq. 10
        learns, terms = step >= c.student_start, {}
        if c.w_dimo and learns:
            t = SCHEDULES[c.schedule](d.ratio).clamp(*c.ratio_range)
            mask = lowest(d.scores_t, t)                                                    # l. 8
            e_t = embed(x.masked_fill(mask, V), E, bias)
            if c.soft_state:                                                           # App. I.15
                e_t = soft(z.softmax(-1), E, bias, mask)
            with torch.no_grad():
                z_phi, z_psi = guided(phi, e_t, cond, t, c), psi(e_t, cond)                 # l. 9
            D = divergence(z_phi, z_psi.requires_grad_(), c.beta)                       # (B, L, G)
            w = 1 / t if c.w_t == "inverse" else torch.ones_like(t)
            row["loss_dimo"] = (w * (D * mask).sum((1, 2))).mean()                         # l. 11
            g, = grad(row["loss_dimo"], z_psi)                         # Eq. (2): taken at z_psi,
            surrogate = 0.5 * (z - (z - g).detach()).square().sum()                 # applied at z
            terms["dimo"] = c.w_dimo * surrogate, z
        if c.gan and c.w_gan and learns and step >= c.gan_start:
            mask_gan = lowest(d.scores_gan, between(c.gan_ratio, d.ratio_gan), least=0)
            e = soft(probabilities(z_gan, c, d.gumbel_gan), E, bias, mask_gan)             # l. 12
            fake = phi(e, cond_gan, eta.layers)
            D_fake = eta(noisy(fake, c, d.noise_gan)).sigmoid()
            row["loss_gan"] = -D_fake.log().mean()                                # Eq. (8), l. 14
            terms["gan"] = c.w_gan * row["loss_gan"], z_gan
        if c.reward and c.w_reward and learns and step >= c.reward_start:
            e = soft(probabilities(z, c, d.gumbel_reward), *teacher.tokenizer.tables())   # Emb_Dec
            R = rewards(teacher.tokenizer.decode(e, cond).clamp(0, 1), d.prompts)
            L = -sum(weight * R[name] for name, weight in c.rewards.items())      # Eq. (9), (B,)
            row |= {name: score.mean() for name, score in R.items()} | dict(loss_reward=L.mean())
            if c.clip_reward:                      # an image weighs as much as its gradient allows
                g, = grad(L.sum(), z, retain_graph=True)
                L = L * (c.clip_reward / g.flatten(1).norm(dim=1)).clamp(max=1)
            terms["reward"] = c.w_reward * L.mean(), z                                     # l. 16
        for name, (L, at) in terms.items():
            row[f"grad_{name}"] = grad(L, at, retain_graph=True)[0].norm()
        if terms:
            total = sum(L for L, _ in terms.values())
            row["norm_student"] = updates["student"](total, step)                      # l. 17, 18
            n = step - c.student_start
            rate = min(c.ema, (1 + n) / (10 + n))
            with torch.no_grad():
                for mean, p in zip(average.parameters(), theta.parameters()):
                    mean.copy_(rate * mean + (1 - rate) * p)

        # --- Update the auxiliary psi, an MDM whose data are the generator's tokens
        if c.w_dimo:
            z_data = z.detach()
            if c.redraw:                                 # the official code: from the new generator
                with torch.no_grad():
                    z_data, cond = generate(d.again), d.again.cond
                x, margin = draw(z_data, d.again.u)
                margins.append(margin)
            if not (c.share_passes and "dimo" in terms):              # else the mask of Eq. (2)
                t = SCHEDULES[c.schedule](d.ratio_aux).clamp(*c.ratio_range)
                mask = lowest(d.scores_aux, t)                                             # l. 20
            log_p = psi(embed(x.masked_fill(mask, V), E, bias), cond).log_softmax(-1)
            K = log_p.shape[-1]
            q = (1 - c.smoothing) * F.one_hot(x, K) + c.smoothing / K
            hard = -(q * log_p).sum(-1)[mask].mean()                                     # Eq. (1)
            log_q = z_data.log_softmax(-1)
            easy = (log_q.exp() * (log_q - log_p)).mean(-1)[mask].mean()
            row["loss_aux"] = (1 - c.soft_target) * hard + c.soft_target * easy
            row["norm_aux"] = updates["aux"](row["loss_aux"], step)                        # l. 21

        # --- Update the discriminator eta
        if c.gan:
            if not (c.share_passes and "gan" in terms):           # else mask and fakes of Eq. (8)
                mask_gan = lowest(d.scores_disc, between(c.gan_ratio, d.ratio_disc), least=0)
                e = soft(probabilities(z_gan.detach(), c, d.gumbel_disc), E, bias, mask_gan)
                fake = phi(e, cond_gan, eta.layers)                                        # l. 23
            e = embed(d.x_real.masked_fill(mask_gan, V), E, bias)                          # l. 24
            d_real = eta(noisy(phi(e, cond_gan, eta.layers), c, d.noise_real))
            d_fake = eta(noisy([h.detach() for h in fake], c, d.noise_fake))
            D_real, D_fake = d_real.sigmoid(), d_fake.sigmoid()
            row["loss_disc"] = -(D_real.log().mean() + (1 - D_fake).log().mean())        # Eq. (7)
            row["norm_disc"] = updates["disc"](row["loss_disc"], step)                     # l. 25
            row |= dict(d_real=d_real.mean(), d_fake=d_fake.mean())

        row = {name: value.item() for name, value in row.items()}
        log.append(row | dict(step=step + 1, lr=c.lr * share_of_rate(step, c)))
    nets = dict(student=theta, aux=psi, disc=eta, ema=average)
    nets = {name: net for name, net in nets.items() if name in updates or name == "ema"}   # l. 27
    return SimpleNamespace(nets=nets, updates=updates, log=log, margin=min(margins))


# ----------------------------------------------------------------------------- masks and tokens
SCHEDULES = {                                           # share of masked units, for u ~ U(0, 1)
    "arccos": lambda u: u.arccos() * 2 / math.pi,
    "cosine": lambda u: (u * math.pi / 2).cos(),
    "linear": lambda u: u,
    "square": lambda u: u**2,
}


def between(bounds, u):
    return bounds[0] + (bounds[1] - bounds[0]) * u


def lowest(scores, ratio, least=1):
    """True at the round(ratio * units) units of each image that have the lowest scores."""
    flat = scores.flatten(1)
    count = (torch.as_tensor(ratio) * flat.shape[1]).round().clamp(min=least).long()
    ordered = F.pad(flat.sort(1).values, (1, 0), value=-1.0)              # before all: for count 0
    return (flat <= ordered.gather(1, count.expand(len(flat))[:, None])).view_as(scores)


def draw(z, u):
    """Tokens by the inverse CDF; and how near the nearest u is to becoming another token."""
    sums = z.detach().softmax(-1).cumsum(-1)[..., :-1]
    return (sums <= u[..., None]).sum(-1), (sums - u[..., None]).abs().min().item()


# ---------------------------------------------------------------------------------- embeddings
def embed(x, E, bias):
    return sum(rows[x[..., g]] for g, rows in enumerate(E)) + bias                      # (B, L, d)


def soft(p, E, bias, mask=None):
    """Eq. (3): p (B, L, G, V) -> expected embeddings (B, L, d); the mask's row where it is true."""
    if mask is not None:
        p = F.pad(p * ~mask[..., None], (0, E.shape[1] - p.shape[-1]))
        p = torch.cat([p[..., :-1], p[..., -1:] + mask[..., None]], -1)
    return torch.einsum("blgv,gvd->bld", p, E[:, : p.shape[-1]]) + bias


def probabilities(z, c, u):
    """What Eq. (3) averages by; or Eq. (14), or Eq. (15), which is one-hot and has its gradient."""
    if c.estimator == "soft":
        return (z / c.tau).softmax(-1)
    p = ((z - (-u.log()).log()) / c.tau).softmax(-1)                                 # Gumbel noise
    if c.estimator == "straight-through":
        p = F.one_hot(p.argmax(-1), p.shape[-1]) + p - p.detach()
    return p


def noisy(features, c, noise):
    return [h + c.feature_noise * n for h, n in zip(features, noise)]                   # App. H.3


# ------------------------------------------------------------------- teacher against auxiliary
def guided(phi, e, cond, t, c):
    """Classifier-free guidance, constant or falling with the mask ratio (App. I.9)."""
    share = dict(constant=torch.ones_like(t), linear=t, cosine=(1 - (math.pi * t).cos()) / 2)
    w = between((c.cfg_low, c.cfg), share[c.cfg_schedule])[:, None, None, None]
    z, z_null = phi(e, cond), phi(e, phi.null(cond))
    return z_null + w * (z - z_null)


def divergence(z_q, z_p, beta):
    """Generalized Jeffreys, (1 - beta) KL(q || p) + beta KL(p || q), of each unit: (B, L, G)."""
    log_q, log_p = z_q.log_softmax(-1), z_p.log_softmax(-1)
    return (((1 - beta) * log_q.exp() - beta * log_p.exp()) * (log_q - log_p)).sum(-1)


# ------------------------------------------------------------------------------------- updates
def share_of_rate(step, c):
    """A linear warm-up from 0, then half a wave from 1 to lr_end."""
    if step < c.warmup:
        return step / c.warmup
    wave = math.cos(math.pi * (step - c.warmup) / (c.steps - c.warmup))
    return c.lr_end + (1 - c.lr_end) * (1 + wave) / 2


class Updates:
    """Adam, AdamW or Muon for a network: each call goes a step down a loss."""

    def __init__(self, net, c, lr, beta1=0.9):
        frozen = set(map(id, net.frozen())) if hasattr(net, "frozen") else set()
        self.params = [p for p in net.requires_grad_(True).parameters() if id(p) not in frozen]
        self.muon = [c.optimizer == "muon" and p.ndim == 2 for p in self.params]
        self.m, self.v = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.c, self.lr, self.beta1, self.beta2, self.n = c, lr, beta1, 0.999, 0

    def __call__(self, loss, step):
        """Returns the gradient's norm before clipping."""
        c, lr = self.c, self.lr * share_of_rate(step, self.c)
        grads = grad(loss, self.params)
        norm = sum(g.square().sum() for g in grads).sqrt()
        self.n += 1
        with torch.no_grad():
            for p, g, m, v, muon in zip(self.params, grads, self.m, self.v, self.muon):
                g = g * (c.clip / norm).clamp(max=1)
                if c.optimizer == "adamw" or muon:
                    p -= lr * c.weight_decay * p
                else:
                    g = g + c.weight_decay * p
                beta1 = 0.95 if muon else self.beta1
                m.copy_(beta1 * m + (1 - beta1) * g)
                v.copy_(self.beta2 * v + (1 - self.beta2) * g.square())
                if muon:
                    p -= lr * 0.2 * math.sqrt(max(p.shape)) * orthogonal(0.95 * m + 0.05 * g)
                else:
                    m_hat, v_hat = m / (1 - beta1**self.n), v / (1 - self.beta2**self.n)
                    p -= lr * m_hat / (v_hat.sqrt() + 1e-6)
        return norm


def orthogonal(m):
    """m with singular values near 1, by five steps of Newton and Schulz (Jordan et al. 2024)."""
    m = m / m.norm()
    for _ in range(5):
        s = m @ m.T
        m = 3.4445 * m + (-4.7750 * s + 2.0315 * s @ s) @ m
    return m


@contextlib.contextmanager
def in_float64():
    """Where networks ask for float32, to be safe from bf16, they get float64."""
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
