"""Di[M]O: a multi-step masked diffusion model (MDM), distilled into a one-step generator (Sec. 2).

The student theta reads a partly random, partly masked start x_init and gives the logits of all
tokens at once. Tokens x_theta are drawn and masked again to x_t, and two MDMs say what belongs
under the masks: the frozen teacher phi, which knows the data, and the auxiliary psi, which is
trained on the student's own tokens, Eq. (1), and so knows what the student does. Where they
disagree the student is wrong, and the disagreement is its gradient (Alg. 1, l. 8-11):

    grad_theta L = E[ w(t) * grad_{z_psi} D(p_phi || p_psi)(x_t) * d z_theta / d theta ]    Eq. (2)

It is strange, and it is the heart of the method: the gradient is taken at the *auxiliary's* logits,
in state x_t, and applied to the *student's* logits, in state x_init, position by position. (psi
stands in for the student: if it has learned p_theta(x_0 | x_t), raising its logits raises the
student's probabilities, too.) No gradient passes through the drawing, the teacher or the auxiliary.
So here a loss is not a scalar: it is `g`, a tensor like z, and training calls z.backward(g). That
is exact, and cheaper than the usual trick 0.5 |z - stopgrad(z - g)|^2, which loses digits. Signs: g
is the gradient to *descend*. It is summed over masked units and divided by the batch alone.

What the start is for: from the all-masked sequence a one-step generator would have one input per
class, and so one output. Randomness must come from somewhere: here from random tokens at 40% of the
units, and from a little noise on the embeddings.

`python dimo.py` distills two coupled tokens: they agree by chance before, nearly always after.
"""

import math
from statistics import NormalDist

import torch
import torch.nn.functional as F

from soft_embed import embed_tokens, sample_tokens

SCHEDULES = ("arccos", "cosine", "linear", "square", "mage")


# ------------------------------------------------------------------------ masks and starts
def mask_ratio(u, schedule="arccos"):
    """Share of units to mask, in [0, 1], for u ~ U(0, 1), a tensor: the forward process's gamma."""
    if schedule == "arccos":  # MaskGit, MaskBit, MaskGen; mean 0.637
        return torch.arccos(u) * 2 / math.pi
    if schedule == "cosine":  # Meissonic; mean 0.637 as well, with more weight near 1
        return torch.cos(u * math.pi / 2)
    if schedule == "linear":
        return u
    if schedule == "square":
        return u**2
    if schedule == "mage":    # normal(0.55, 0.25) truncated to [0.5, 1], by its inverse CDF
        normal = NormalDist(0.55, 0.25)
        low, high = normal.cdf(0.5), normal.cdf(1.0)
        return 0.55 + 0.25 * torch.special.ndtri(low + u * (high - low))
    raise ValueError(f"unknown mask schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")


def exact_mask(ratio, scores, least=1):
    """Boolean mask like scores (B, L, G): the round(ratio * L*G) units of the smallest scores.

    ratio is a number or (B,); at least `least` units per sample. Uniform scores: a uniform subset.
    # choice: a unit is one (position, group), as in MaskBit's own training; the paper is silent.
    """
    flat = scores.flatten(1)                                                # (B, L*G)
    if not torch.is_tensor(ratio):          # filled on the device: a copy from the host would wait
        ratio = flat.new_full((), ratio, dtype=torch.float32)
    count = (ratio.float() * flat.shape[1]).round()                         # half to even
    count = count.clamp(min=least).reshape(-1, 1)                           # (B, 1)
    rank = flat.argsort(1).argsort(1)
    return (rank < count).view_as(scores)


def initial_tokens(tokens, ratio, scores, V):
    """x_init (B, L, G): random tokens, with exactly `ratio` of the units masked by V."""
    return tokens.masked_fill(exact_mask(ratio, scores), V)                 # Alg. 1, l. 4


def perturb(e, s, noise):
    """Perturbed start, s n + sqrt(1 - s^2) e, before positions are added; the noise n is like e.

    Continuous randomness on top of random tokens, from the official Di[M]O code (not in the paper).
    The networks call it, because Meissonic's place for it is behind its input projection.
    """
    return s * noise + math.sqrt(1 - s**2) * e


def student_logits(net, x_init, cond, E, bias, s=0.0, noise=None):
    """The generator's one forward pass, without guidance: z_theta(x_init, cond), (B, L, G, V)."""
    e = embed_tokens(x_init, E, bias)                                       # (B, L, d)
    return net(e, cond, s=s, noise=noise)                                   # Alg. 1, l. 5


# ------------------------------------------------------------------------ teacher guidance
def guidance_scale(ratio, high, low=1.0, schedule="constant"):
    """Guidance w at mask ratios (B,): `high` where all is masked, falling to `low` (App. I.9).

    # choice: the paper's "from 1.5 to 2" does not say which end is masked.
    """
    if schedule == "constant":
        return torch.full_like(ratio, high)
    if schedule == "linear":
        return low + (high - low) * ratio
    if schedule == "cosine":
        return low + (high - low) * (1 - torch.cos(math.pi * ratio)) / 2
    raise ValueError(f"unknown guidance schedule {schedule!r}: expected constant, linear or cosine")


def guided_logits(net, e, cond, w):
    """Classifier-free guidance u + w (c - u), both passes in one batch of 2B; w = 1 is off.

    cond is a tuple of tensors, batch first; net.null(cond) is the unconditional one. w may be (B,).
    # choice: the paper's "teacher CFG" is read as this w, as the official Di[M]O code has it.
    # MaskBit's and MaskGen's own samplers count s in c + s (c - u), so w = 1 + s.
    """
    per_sample = torch.is_tensor(w)
    if not per_sample and w == 1:
        return net(e, cond)
    both = tuple(torch.cat(pair) for pair in zip(cond, net.null(cond)))
    c, u = net(torch.cat([e, e]), both).chunk(2)
    if per_sample:
        w = w.to(c.dtype).reshape(-1, 1, 1, 1)
    return torch.lerp(u, c, w)


# --------------------------------------------------------------------- the gradient of Eq. 2
def divergence(z_teacher, z_aux, mask, beta=0.0):
    """D(p_phi || p_psi) summed over the masked units of each image, (B,): only to be logged."""
    log_q, log_p = z_teacher.float().log_softmax(-1), z_aux.float().log_softmax(-1)
    weight = (1 - beta) * log_q.exp() - beta * log_p.exp()
    D = (weight * (log_q - log_p)).sum(-1)                                  # (B, L, G)
    return (D * mask).flatten(1).sum(1)


def divergence_grad(z_teacher, z_aux, mask, beta=0.0):
    """g (B, L, G, V): gradient of D(p_phi || p_psi) at z_aux, zero where mask (B, L, G) is false.

    beta = 0: forward KL,  D = KL(q || p),  g = p - q                        q = softmax(z_teacher)
    beta = 1: reverse KL,  D = KL(p || q),  g = p (log p/q - KL(p || q))     p = softmax(z_aux)
    else:     generalized Jeffreys, (1 - beta) FKL + beta RKL; -0.2 in the paper's MaskGit run.
    Float32 throughout: log p - log q of bf16 logits is mostly rounding.
    """
    z_teacher, z_aux = z_teacher.float(), z_aux.float()
    p = z_aux.softmax(-1)
    g = 0.0
    if beta != 1:
        g = (1 - beta) * (p - z_teacher.softmax(-1))
    if beta != 0:
        log_r = z_aux.log_softmax(-1) - z_teacher.log_softmax(-1)
        g = g + beta * p * (log_r - (p * log_r).sum(-1, keepdim=True))
    return g * mask[..., None]                                              # Eq. (2)


@torch.no_grad()
def dimo_grad(teacher, aux, e_t, cond, mask, w=1.0, beta=0.0, weight=1.0):
    """Gradient (B, L, G, V) for the student's logits, Eq. (2), and the loss (B,) of each image.

    Both are still to be divided by the batch. e_t (B, L, d) embeds the masked state x_t (App. I.15:
    or is the masked soft embedding), once for both networks, whose frozen tables are the same. w is
    the teacher's guidance; the auxiliary has none, because it models what the student does. weight
    is w(t), a number or (B,).
    """
    z_teacher = guided_logits(teacher, e_t, cond, w)                        # Alg. 1, l. 9
    z_aux = aux(e_t, cond)
    loss = weight * divergence(z_teacher, z_aux, mask, beta)
    g = divergence_grad(z_teacher, z_aux, mask, beta)                       # Alg. 1, l. 11
    if torch.is_tensor(weight):
        weight = weight.reshape(-1, 1, 1, 1)
    return g * weight, loss


# --------------------------------------------------------------------------- the auxiliary
def aux_loss(z, x, mask, smoothing=0.1, count=None, z_student=None, alpha=0.0):
    """Cross-entropy, Eq. (1), at masked units, with the student's tokens x (B, L, G) as clean data.

    A mean over `count` units (by default those of mask; data parallel training gives the global
    number). smoothing is label smoothing, with which the teachers were trained, so that the two
    softmaxes of Eq. (2) stay comparable. alpha mixes in KL(student || auxiliary), averaged over V.
    """
    if count is None:
        count = mask.sum()
    ce = F.cross_entropy(z.float().flatten(0, 2), x.flatten(),
                         reduction="none", label_smoothing=smoothing)       # (B*L*G,)
    loss = (ce * mask.flatten()).sum() / count                              # Eq. (1); Alg. 1, l. 21
    if alpha:
        log_p = z.float().log_softmax(-1)
        log_q = z_student.detach().float().log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).mean(-1)                       # (B, L, G)
        loss = (1 - alpha) * loss + alpha * ((kl * mask).sum() / count)
    return loss


if __name__ == "__main__":
    # Two tokens of V = 8 that always agree. All networks are tables over the (V+1)^2 states.
    torch.manual_seed(0)
    V, B = 8, 256
    shape = (B, 2, 1)
    other = torch.eye(V + 1)[:, :V] * 16.0                                  # logits: copy the other
    phi = torch.stack(torch.broadcast_tensors(other, other[:, None]), 2)    # (V+1, V+1, 2, V)
    phi = phi[:, :, :, None]                                                # (V+1, V+1, 2, 1, V)
    theta, psi = phi.clone().requires_grad_(), phi.clone().requires_grad_()
    opt_theta = torch.optim.Adam([theta], 0.05)
    opt_psi = torch.optim.Adam([psi], 0.15)
    for step in range(1001):
        x_init = initial_tokens(torch.randint(V, shape), 0.5, torch.rand(shape), V)
        z = theta[x_init[..., 0].unbind(1)]                                 # (B, 2, 1, V)
        x = sample_tokens(z)
        if step in (0, 100, 300, 1000):
            agree = (x[:, 0] == x[:, 1]).float().mean()
            print(f"step {step:4d}: the two tokens agree in {100 * agree:5.1f}% of samples;"
                  f" {len(x.unique())} of {V} values used")
        mask = exact_mask(mask_ratio(torch.rand(B)), torch.rand(shape))
        x_t = x.masked_fill(mask, V)[..., 0].unbind(1)
        g = divergence_grad(phi[x_t], psi[x_t].detach(), mask)
        opt_theta.zero_grad()
        z.backward(g / B)
        opt_theta.step()
        opt_psi.zero_grad()
        aux_loss(psi[x_t], x, mask, smoothing=0.0).backward()
        opt_psi.step()
