"""Soft embeddings: how the output of a discrete generator gets a gradient (Sec. 3.1).

A one-step generator gives logits z, and what comes next (the frozen teacher, the tokenizer's
decoder) reads embeddings. Drawing a token between the two cuts the gradient. Eq. (3) does not
draw, it averages:

    e~ = Emb(z) = sum_j softmax(z)_j E_j = E^T p                                     Eq. (3)

Nothing is sampled, so the gradient of f(e~) is exact and has no variance. The price is a bias,
and it is small where it matters: if f has curvature at most C, and S is the covariance of the
embedding under p, then

    |f(e~) - E_j f(E_j)| <= C/2 tr(S)                                                Eq. (5)

(# choice: the trace, which is what the proof gives; the paper prints a norm, which is smaller.)
With a top-1 probability of 1 - eps, S is O(eps): the sharper the generator, the better the
surrogate, and distilled generators are sharp (Tab. 14). The estimators that it replaces stand
beside it: REINFORCE, Eq. (13), Gumbel-softmax, Eq. (14), and its straight-through form, Eq. (15).

No function here knows which teacher it serves. These letters mean the same in every file:

    B batch   L token positions   G token groups (MaskBit 2, others 1)   V entries per group
    d embedding width
    x (B, L, G) integer tokens; entry V is the mask            z (B, L, G, V) logits
    E (G, V+1, d) an embedding table, its last row the mask    e (B, L, d) embeddings

`python soft_embed.py` shows Eq. (5) in a second, on a function whose truth can be enumerated.
"""

import torch
import torch.nn.functional as F


# --------------------------------------------------------------------- tokens -> embeddings
def embed_tokens(x, E, bias=0.0):
    """Hard embedding (B, L, d): rows of E (G, V+1, d) at the tokens x (B, L, G), summed."""
    return sum(E[g][x[..., g]] for g in range(len(E))) + bias


def embed_probs(p, E, bias=0.0, mask=None):
    """Expected embedding (B, L, d): rows of E (G, V+1, d), weighted by p (B, L, G, V), summed.

    Units where mask (B, L, G) is true get the table's last row, the mask, instead. Always float32:
    in bf16 the probabilities of a large vocabulary do not sum to one. (MaskGit's p has V+1 entries,
    so there the mask's row has a weight, too.)
    """
    e = 0.0
    with torch.autocast(p.device.type, enabled=False):
        for g, rows in enumerate(E.float()):
            e_g = p[:, :, g].float() @ rows[: p.shape[-1]]                  # (B, L, d)
            if mask is not None:
                e_g = torch.where(mask[:, :, g, None], rows[-1], e_g)
            e = e + e_g
    return e + bias


def soft_embed(z, E, bias=0.0, mask=None, tau=1.0):
    """Soft embedding, Eq. (3): the expected embedding (B, L, d) under softmax(z / tau).

    It is differentiable in z (B, L, G, V), and equal to `embed_tokens` to the bit where the logits
    are one-hot. tau is the softmax temperature of Fig. 8 (1 in the paper's runs); mask as in
    `embed_probs`.
    """
    p = (z.float() / tau).softmax(-1)
    return embed_probs(p, E, bias, mask)                                    # Eq. (3)


# ------------------------------------------------------------- the estimators it replaces
def gumbel(u):
    """Standard Gumbel noise, -log(-log u), from uniforms u in [0, 1)."""
    exponential = -u.clamp(min=1e-20).log()
    return -exponential.clamp(min=1e-20).log()


def gumbel_noise(shape, device="cpu", generator=None):
    """Standard Gumbel noise of this shape."""
    return gumbel(torch.rand(shape, device=device, generator=generator))


def add_gumbel(z, noise):
    """Noisy logits in float32. noise is like z; it is drawn here if it is None."""
    if noise is None:
        noise = gumbel_noise(z.shape, z.device)
    return z.float() + noise


def gumbel_embed(z, E, bias=0.0, mask=None, tau=1.0, noise=None):
    """Gumbel-softmax, Eq. (14): the soft embedding of noisy logits."""
    return soft_embed(add_gumbel(z, noise), E, bias, mask, tau)             # Eq. (14)


def straight_through_embed(z, E, bias=0.0, mask=None, tau=1.0, noise=None):
    """Straight-through Gumbel-softmax, Eq. (15): hard forward, Eq. (14)'s gradient (App. H.4)."""
    p = (add_gumbel(z, noise) / tau).softmax(-1)
    hard = F.one_hot(p.argmax(-1), p.shape[-1])
    p = hard.to(p.dtype) + p - p.detach()
    return embed_probs(p, E, bias, mask)                                    # Eq. (15)


ESTIMATORS = {
    "soft": soft_embed,
    "gumbel": gumbel_embed,
    "straight-through": straight_through_embed,
}


def reinforce(z, x, f):
    """REINFORCE, Eq. (13): a loss whose gradient is f(x) grad log p(x), a mean over the batch.

    x (B, L, G) are tokens drawn from z, f (B,) is the value of each sample. Unbiased, and hopeless
    at hundreds of tokens: its variance grows with their number (Tab. 4).
    """
    logp = z.float().log_softmax(-1)
    logp = logp.gather(-1, x[..., None])                                    # (B, L, G, 1)
    logp = logp.flatten(1).sum(1)                                           # (B,)
    return (f.detach() * logp).mean()                                       # Eq. (13)


# ------------------------------------------------------------------- drawing and measuring
def sample_tokens(z, temperature=1.0, u=None):
    """Tokens (B, L, G) drawn from softmax(z / temperature); temperature 0 is argmax (Tab. 14).

    u (B, L, G) are the uniforms in [0, 1) that decide, drawn here if not given: the token is the
    number of entries of the cumulative distribution that are <= u. The distribution is summed in
    the precision of u.
    """
    if temperature == 0:
        return z.argmax(-1)
    if u is None:
        u = torch.rand(z.shape[:-1], device=z.device)
    p = z.float()
    if temperature != 1:
        p = p / temperature
    p = p.softmax(-1).to(u.dtype)
    x = torch.searchsorted(p.cumsum(-1), u[..., None], right=True)          # (B, L, G, 1)
    last = p.shape[-1] - 1
    return x[..., 0].clamp_(max=last)


def concentration(z):
    """Mean entropy in nats and mean top-1 probability of all units (Figs. 17, 18): two scalars."""
    logp = z.float().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)                                  # (B, L, G)
    top1 = logp.amax(-1).exp()
    return entropy.mean(), top1.mean()


if __name__ == "__main__":
    # One token of V = 16 and a smooth f: E_j f(E_j) and its gradient are sums of 16 terms.
    torch.manual_seed(0)
    V = 16
    d = 8
    draws = 20000
    E = torch.randn(1, V + 1, d) / 2
    tokens = E[0, :V]
    w = torch.randn(d)
    C = 0.5 + 0.77 * w.square().sum()                                       # |tanh''| <= 0.77

    def f(e):
        """(..., d) -> (...)"""
        return torch.tanh(e @ w) + (e**2).sum(-1) / 4

    base = torch.randn(V)
    print("sharpness  top-1  |  |f(e~)-E f|   C/2 tr(S)  |"
          "  gradient error: soft   straight-through   its std")
    for sharpness in (1, 2, 4, 8, 16):
        z = (sharpness * base).requires_grad_()
        p = z.softmax(-1)                                                   # (V,)
        truth = (p * f(tokens)).sum()
        g_truth, = torch.autograd.grad(truth, z)
        e = soft_embed(z[None, None, None], E)                              # (1, 1, d)
        soft = f(e).sum()
        g_soft, = torch.autograd.grad(soft, z)
        spread = (p[:, None] * (tokens - e[0]) ** 2).sum()                  # tr(S)
        many = z.detach().repeat(draws, 1, 1, 1).requires_grad_()           # (draws, 1, 1, V)
        e = straight_through_embed(many, E)
        g_st, = torch.autograd.grad(f(e).sum(), many)
        print(f"{sharpness:9d}  {p.max():.3f}"
              f"  |  {abs(soft - truth):11.2e} {C / 2 * spread:11.2e}  |"    # Eq. (5)
              f"  {(g_soft - g_truth).norm():20.2e} {(g_st.mean(0) - g_truth).norm():17.2e}"
              f" {g_st.std(0).norm():10.2e}")
