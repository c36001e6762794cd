"""Soft embeddings: how the output of a discrete generator gets a gradient (Sec. 3.1).

A one-step generator gives logits z, and what comes next (the frozen teacher, the tokenizer's decoder) reads
embeddings. Drawing a token between the two cuts the gradient. Eq. 3 does not draw, it averages:

    e~ = Emb(z) = sum_j softmax(z)_j E_j = E^T p                                              (Eq. 3)

Nothing is sampled, so the gradient of f(e~) is exact and has no variance. The price is a bias, and it is small
where it matters: if f has curvature at most C and S is the covariance of the embedding under p, then

    |f(e~) - E_j f(E_j)| <= C/2 tr(S)                                                         (Eq. 5)

With a top-1 probability of 1 - eps, S is O(eps): the sharper the generator, the better the surrogate, and
distilled generators are sharp (Tab. 14). The estimators that it replaces stand beside it: Gumbel-softmax, its
straight-through form (App. H.4), and REINFORCE (Eq. 13).

No function here knows which teacher it serves. Shapes, the same letters in every file of this repository:

    B batch   L token positions   G token groups (MaskBit 2, else 1)   V entries a group   d embedding width
    x (B, L, G) integer tokens; entry V is the mask            z (B, L, G, V) logits
    E (G, V+1, d) an embedding table, its last row the mask    e (B, L, d) embeddings

`python soft_embed.py` shows Eq. 5 on a function whose truth can be enumerated, in a second.
"""

import torch
import torch.nn.functional as F


# ----------------------------------------------------------------------- tokens -> embeddings
def embed_tokens(x, E, bias=0.0):
    """Hard embedding: the groups' rows of E (G, V+1, d) at the tokens x (B, L, G), summed: (B, L, d)."""
    return sum(E[g][x[..., g]] for g in range(len(E))) + bias


def embed_probs(p, E, bias=0.0, mask=None):
    """Expected rows of E (G, V+1, d) under the weights p (B, L, G, V), summed over groups: (B, L, d).

    Units where mask (B, L, G) is true get the table's last row, the mask, instead. Always float32: in bf16 the
    probabilities of a large vocabulary do not sum to one. (A p of V+1 entries, MaskGit's, includes the mask row.)
    """
    e = 0.0
    with torch.autocast(p.device.type, enabled=False):
        for g in range(len(E)):
            e_g = p[:, :, g].float() @ E[g, : p.shape[-1]].float()                            # (B, L, d)
            e = e + (e_g if mask is None else torch.where(mask[:, :, g, None], E[g, -1].float(), e_g))
    return e + bias


def soft_embed(z, E, bias=0.0, mask=None, tau=1.0):
    """Soft embedding, Eq. 3: the expected embedding under softmax(z / tau), (B, L, G, V) -> (B, L, d).

    Differentiable in z, and equal to `embed_tokens` to the bit where the logits are one-hot. tau is the softmax
    temperature of Fig. 8 (1 in the paper's runs); mask as in `embed_probs`.
    """
    return embed_probs((z.float() / tau).softmax(-1), E, bias, mask)                          # Eq. (3)


# ------------------------------------------------------------------- the estimators it replaces
def gumbel(u):
    """Standard Gumbel noise, -log(-log u), from uniforms u in [0, 1)."""
    exponential = -u.clamp(min=1e-20).log()
    return -exponential.clamp(min=1e-20).log()


def gumbel_noise(shape, device="cpu", generator=None):
    """Standard Gumbel noise, -log(-log u)."""
    return -(-torch.rand(shape, device=device, generator=generator).clamp_(1e-20, 1 - 1e-7).log()).log()


def gumbel_embed(z, E, bias=0.0, mask=None, tau=1.0, noise=None):
    """Gumbel-softmax, Eq. 14: the soft embedding of noisy logits. noise is like z; drawn here if not given."""
    noise = gumbel_noise(z.shape, z.device) if noise is None else noise
    return soft_embed(z.float() + noise, E, bias, mask, tau)                                  # Eq. (14)


def straight_through_embed(z, E, bias=0.0, mask=None, tau=1.0, noise=None):
    """Straight-through Gumbel-softmax, Eq. 15: a hard token forward, Eq. 14's gradient backward (App. H.4)."""
    noise = gumbel_noise(z.shape, z.device) if noise is None else noise
    p = ((z.float() + noise) / tau).softmax(-1)
    hard = F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype)
    return embed_probs(hard + p - p.detach(), E, bias, mask)                                  # Eq. (15)


ESTIMATORS = {"soft": soft_embed, "gumbel": gumbel_embed, "straight-through": straight_through_embed}


def reinforce(z, x, f):
    """REINFORCE, Eq. 13: a loss with the gradient f(x) grad log p(x), summed over units; f (B,) one value a sample.

    Unbiased, and hopeless at hundreds of tokens: its variance grows with their number (Tab. 4).
    """
    logp = z.float().log_softmax(-1).gather(-1, x[..., None]).flatten(1).sum(1)               # (B,)
    return (f.detach() * logp).mean()                                                         # Eq. (13)


# ------------------------------------------------------------------------- drawing and measuring
def sample_tokens(z, temperature=1.0, u=None):
    """Tokens (B, L, G) drawn from softmax(z / temperature); temperature 0 is argmax (Tab. 14).

    u (B, L, G) holds the uniforms in [0, 1) that decide, drawn here if not given: the token is the number of
    entries of the cumulative distribution that are <= u. The sum runs in the precision of u.
    """
    if temperature == 0:
        return z.argmax(-1)
    p = (z.float() if temperature == 1 else z.float() / temperature).softmax(-1)
    u = torch.rand(p.shape[:-1], device=p.device) if u is None else u
    below = torch.searchsorted(p.to(u.dtype).cumsum(-1), u[..., None], right=True)            # (B, L, G, 1)
    return below[..., 0].clamp_(max=z.shape[-1] - 1)


def concentration(z):
    """Mean entropy in nats and mean top-1 probability over all units (Figs. 17, 18): two scalar tensors."""
    logp = z.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).mean(), logp.max(-1).values.exp().mean()


if __name__ == "__main__":
    # One token of V = 16, f a smooth bounded function: the truth E_j f(E_j) and its gradient are sums of 16 terms.
    torch.manual_seed(0)
    V, d, draws = 16, 8, 20000
    E, w = torch.randn(1, V + 1, d) / 2, torch.randn(d)
    f = lambda e: torch.tanh(e @ w) + (e**2).sum(-1) / 4                                      # (..., d) -> (...)
    base = torch.randn(1, 1, 1, V)
    print("sharpness  top-1  |  |f(e~)-E f|   C/2 tr(S)  |  gradient error: soft   straight-through   its std")
    for sharpness in (1, 2, 4, 8, 16):
        z = (sharpness * base).requires_grad_()
        p = z.softmax(-1)
        true = (p[0, 0, 0] * f(E[0, :V])).sum()
        g_true = torch.autograd.grad(true, z, retain_graph=True)[0]
        e = soft_embed(z, E)
        g_soft = torch.autograd.grad(f(e).sum(), z, retain_graph=True)[0]
        spread = (p[0, 0, 0, :, None] * (E[0, :V] - e[0, 0]) ** 2).sum()                      # tr(S)
        many = z.detach().expand(draws, 1, 1, V).clone().requires_grad_()
        g_st = torch.autograd.grad(f(straight_through_embed(many, E)).sum(), many)[0]         # (draws, 1, 1, V)
        C = 0.5 + 0.77 * w.square().sum()                                                     # |tanh''| <= 0.77
        print(f"{sharpness:9d}  {p.max():.3f}  |  {abs(f(e).sum() - true):11.2e} {C / 2 * spread:11.2e}  |"
              f"  {(g_soft - g_true).norm():20.2e} {(g_st.mean(0) - g_true).norm():17.2e}"
              f" {g_st.std(0).norm():10.2e}")
