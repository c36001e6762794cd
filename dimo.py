"""Di[M]O: a multi-step masked diffusion model (MDM) distilled into a generator of one step (Sec. 2, Eq. 1-2).

The student theta reads a partly random, partly masked start x_init and gives the logits of all tokens at once.
Tokens x_theta are drawn, masked again to x_t, and two MDMs say what belongs under the masks: the frozen teacher
phi, which knows the data, and the auxiliary psi, which is trained on the student's own tokens (Eq. 1) and so knows
what the student does. Where they disagree the student is wrong, and the disagreement is its gradient:

    grad_theta L = E[ w(t) * grad_{z_psi} D(p_phi || p_psi)(x_t) * d z_theta / d theta ]      (Eq. 2; Alg. 1, l. 8-11)

It is strange, and it is the heart of the method: the gradient is taken at the *auxiliary's* logits, in state x_t,
and applied to the *student's* logits, in state x_init, position by position. (psi stands in for the student: if it
has learned p_theta(x_0 | x_t), raising its logits raises the student's probabilities too.) No gradient passes
through the drawing, the teacher or the auxiliary. So here a loss is not a scalar, it is `g`, a tensor like z, and
training calls z.backward(g): exact, and cheaper than the usual trick 0.5 |z - stopgrad(z - g)|^2, which loses
digits. Signs: g is the gradient to *descend*. It is summed over masked units and divided by the batch alone.

What the start is for: from the all-masked sequence a one-step generator has one input and so one output a class.
Randomness must come from somewhere, here from random tokens at 40% of the units and a little embedding noise.

`python dimo.py` distils two coupled tokens: drawn in parallel they agree by chance, after Di[M]O nearly always.
"""

import math

import torch
import torch.nn.functional as F

from soft_embed import embed_tokens

SCHEDULES = ("arccos", "cosine", "linear", "square", "mage")


# ------------------------------------------------------------------------- masks and starts
def mask_ratio(u, schedule="arccos"):
    """Share of units to mask, in [0, 1], for u ~ U(0, 1) (a tensor): the forward process's gamma(t)."""
    if schedule == "arccos":  # MaskGit, MaskBit, MaskGen; mean 0.637
        return torch.arccos(u) * 2 / math.pi
    if schedule == "cosine":  # Meissonic; mean 0.637 too, with more weight near 1
        return torch.cos(u * math.pi / 2)
    if schedule == "linear":
        return u
    if schedule == "square":
        return u**2
    if schedule == "mage":  # normal(0.55, 0.25) truncated to [0.5, 1], by its inverse CDF
        lo, hi = ((1 + math.erf((b - 0.55) / 0.25 / math.sqrt(2))) / 2 for b in (0.5, 1.0))
        return 0.55 + 0.25 * torch.special.ndtri(lo + u * (hi - lo))
    raise ValueError(f"unknown mask schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")


def exact_mask(ratio, scores, least=1):
    """Boolean mask like scores (B, L, G), true at exactly round(ratio * L*G) units of a sample, at least `least`.

    ratio is a number or (B,). The units with the smallest scores are masked, so uniform scores give a uniform
    subset. # choice: a unit is one (position, group), as the teacher MaskBit was trained; the paper does not say.
    """
    flat = scores.flatten(1)                                                                  # (B, L*G)
    if not torch.is_tensor(ratio):                    # filled on the device: a copy from the host would wait
        ratio = torch.full((), ratio, dtype=torch.float32, device=scores.device)
    count = (ratio.float() * flat.shape[1]).round().clamp(min=least)                         # half to even
    rank = flat.argsort(1).argsort(1)
    return (rank < count.reshape(-1, 1)).view_as(scores)


def initial_tokens(tokens, ratio, scores, V):
    """x_init (B, L, G): the given random tokens, with exactly `ratio` of the units masked by V (Alg. 1, l. 4)."""
    return tokens.masked_fill(exact_mask(ratio, scores), V)


def perturb(e, s, noise):
    """Embedding perturbation of the start, s n + sqrt(1 - s^2) e, before positions are added; noise n is like e.

    It is in the official Di[M]O code, though not in the paper: continuous randomness on top of random tokens. The
    networks apply it themselves, for Meissonic's place for it is behind its input projection.
    """
    return s * noise + math.sqrt(1 - s**2) * e


def student_logits(net, x_init, cond, E, bias, s=0.0, noise=None):
    """The one forward pass of the generator: z_theta(x_init, cond), (B, L, G, V), without guidance (Alg. 1, l. 5)."""
    e = embed_tokens(x_init, E, bias)                                                         # (B, L, d)
    return net(e, cond, s=s, noise=noise) if s else net(e, cond)


# --------------------------------------------------------------------------- teacher guidance
def guidance_scale(ratio, high, low=1.0, schedule="constant"):
    """Guidance w as a function of the mask ratio (B,): `high` where all is masked, falling to `low` (App. I.9)."""
    if schedule == "constant":
        return torch.full_like(ratio, high)
    if schedule == "linear":
        return low + (high - low) * ratio
    if schedule == "cosine":
        return low + (high - low) * (1 - torch.cos(math.pi * ratio)) / 2
    raise ValueError(f"unknown guidance schedule {schedule!r}: expected constant, linear or cosine")


def guided_logits(net, e, cond, w):
    """Classifier-free guidance u + w (c - u), both passes in one batch of 2B; w a number or (B,), 1 is off.

    cond is a tuple of tensors, batch first; net.null(cond) is the unconditional one.
    """
    if isinstance(w, (int, float)) and w == 1:
        return net(e, cond)
    both = tuple(torch.cat(pair) for pair in zip(cond, net.null(cond)))
    c, u = net(torch.cat([e, e]), both).chunk(2)
    return torch.lerp(u, c, w.to(c.dtype).reshape(-1, 1, 1, 1) if torch.is_tensor(w) else w)


# ------------------------------------------------------------------------ the gradient of Eq. 2
def divergence_grad(z_teacher, z_aux, mask, beta=0.0):
    """g (B, L, G, V) = gradient at the auxiliary's logits of D(p_phi || p_psi), zero where mask (B, L, G) is false.

    beta = 0: forward KL,  D = KL(q || p),  g = p - q                          q = softmax(z_teacher)
    beta = 1: reverse KL,  D = KL(p || q),  g = p (log p/q - KL(p || q))       p = softmax(z_aux)
    else:     generalized Jeffreys, (1 - beta) FKL + beta RKL; the paper's MaskGit run takes beta = -0.2.
    Float32 throughout: log p - log q of bf16 logits is mostly rounding.
    """
    z_teacher, z_aux = z_teacher.float(), z_aux.float()
    p = z_aux.softmax(-1)
    g = (1 - beta) * (p - z_teacher.softmax(-1)) if beta != 1 else 0.0
    if beta != 0:
        log_r = z_aux.log_softmax(-1) - z_teacher.log_softmax(-1)
        g = g + beta * p * (log_r - (p * log_r).sum(-1, keepdim=True))
    return g * mask[..., None]                                                                # Eq. (2)


@torch.no_grad()
def dimo_grad(teacher, aux, e_t, cond, mask, w=1.0, beta=0.0, weight=1.0):
    """Gradient for the student's logits, Eq. 2 and Alg. 1 l. 8-11: (B, L, G, V), to be divided by the batch.

    e_t (B, L, d) embeds the masked state x_t (or, App. I.15, the masked soft embedding), once for both networks, whose
    frozen tables are the same; w is the teacher's guidance; weight is w(t), a number or (B,). The auxiliary is not
    guided: it models what the student does.
    """
    z_teacher, z_aux = guided_logits(teacher, e_t, cond, w), aux(e_t, cond)
    g = divergence_grad(z_teacher, z_aux, mask, beta)
    return g * (weight.reshape(-1, 1, 1, 1) if torch.is_tensor(weight) else weight)


# ---------------------------------------------------------------------------- the auxiliary
def aux_loss(z, x, mask, smoothing=0.1, count=None, z_student=None, alpha=0.0):
    """Cross-entropy of Eq. 1 with the student's tokens x (B, L, G) as clean data, at masked units (Alg. 1, l. 21).

    A mean over `count` masked units (default: those of mask; data parallel training gives the global number).
    smoothing is label smoothing, which the teachers were trained with, so that the two softmaxes of Eq. 2 stay
    comparable. alpha mixes in a soft target: KL(student || auxiliary), a mean over the vocabulary as well.
    """
    count = mask.sum() if count is None else count
    ce = F.cross_entropy(z.float().flatten(0, 2), x.flatten(), reduction="none", label_smoothing=smoothing)
    loss = (ce * mask.flatten()).sum() / count                                                # Eq. (1)
    if alpha:
        log_p, log_q = z.float().log_softmax(-1), z_student.detach().float().log_softmax(-1)
        soft = ((log_q.exp() * (log_q - log_p)).mean(-1) * mask).sum() / count
        loss = (1 - alpha) * loss + alpha * soft
    return loss


if __name__ == "__main__":
    # Two tokens of V = 8 that always agree. All networks are tables over the (V+1)^2 states.
    from soft_embed import sample_tokens

    torch.manual_seed(0)
    V, B = 8, 256
    state = lambda x: x[:, 0, 0] * (V + 1) + x[:, 1, 0]                                       # (B, 2, 1) -> (B,)
    agree = torch.eye(V + 1)[:, :V] * 16.0                                                    # copy the other token
    z_phi = torch.stack([agree.repeat(V + 1, 1), agree.repeat_interleave(V + 1, 0)], 1)[:, :, None]  # (81, 2, 1, 8)
    theta, psi = z_phi.clone().requires_grad_(), z_phi.clone().requires_grad_()
    opt_theta, opt_psi = torch.optim.Adam([theta], 0.05), torch.optim.Adam([psi], 0.15)
    for step in range(1001):
        x_init = initial_tokens(torch.randint(V, (B, 2, 1)), 0.5, torch.rand(B, 2, 1), V)
        z = theta[state(x_init)]                                                              # (B, 2, 1, V)
        x = sample_tokens(z)
        if step in (0, 100, 300, 1000):
            print(f"step {step:4d}: the two tokens agree in {100 * (x[:, 0] == x[:, 1]).float().mean():5.1f}%"
                  f" of samples; {len(x.unique())} of {V} values used")
        mask = exact_mask(mask_ratio(torch.rand(B)), torch.rand(B, 2, 1))
        s = state(x.masked_fill(mask, V))
        g = divergence_grad(z_phi[s], psi[s].detach(), mask)
        opt_theta.zero_grad(), z.backward(g / B), opt_theta.step()
        opt_psi.zero_grad(), aux_loss(psi[s], x, mask, smoothing=0.0).backward(), opt_psi.step()
