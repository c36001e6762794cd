"""The masked-embedding GAN: a discriminator that reads through the frozen teacher (Sec. 3.2.1).

Distillation cannot beat its teacher. Real data can: a discriminator D compares tokens of
photographs with the generator's soft embeddings, and since those are differentiable, its verdict
reaches the generator's logits.

    max_eta  E log D(Emb(x_gt)_r) + E log(1 - D(Emb(z_theta)_r))                     Eq. (7)
    L_GAN(theta) = E[-log D(Emb(z_theta)_r)]                                         Eq. (8)

Three choices make it work. (1) D does not learn to see: the frozen teacher is its feature
extractor, at several depths, and only small convolutional heads and an MLP are trained. (2) (.)_r:
a share r ~ U[a, b] of the units is replaced by the mask, the *same* units for real and fake. The
teacher only knows masked inputs; and as in diffusion GANs, this keeps D from overfitting. (3)
Di[M]O stays on as a regularizer; alone, the GAN collapses (Fig. 13).

Gradients: the student's step needs d L_GAN / d z and nothing else, so `gan_grad` asks autograd for
exactly that, through heads, teacher, masking and softmax. Neither the heads nor the teacher receive
any gradient in it. The discriminator's step sees detached embeddings, real and fake in one forward
pass (one DDP forward, one batch).

`python gan.py` trains the heads on a random frozen backbone and lets the logits of 64 images follow
them, in seconds.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from soft_embed import embed_tokens, soft_embed


# ------------------------------------------------------------------- the discriminator (Fig. 5)
def head_layers(depth, heads):
    """The layers that are read, 0-based: `heads` of `depth`, evenly spread, including the last.

    # choice: the paper gives their number alone, and Fig. 5 shows them spread.
    """
    return tuple(depth * (i + 1) // heads - 1 for i in range(heads))


class Head(nn.Module):
    """Features (B, L, D) of one layer -> (B, width): two 3x3 convolutions on the grid, a mean.

    grid is the side of the token grid, or (rows, columns). None means tokens in a row (MaskGen),
    and convolutions in one dimension.
    # choice: the paper says "a convolutional head"; this one has about the size that Tab. 5 gives.
    """

    def __init__(self, features, width, grid):
        super().__init__()
        if isinstance(grid, int):
            grid = (grid, grid)
        self.grid = grid
        Conv = nn.Conv2d if grid else nn.Conv1d
        groups = 32 if width % 32 == 0 and width >= 256 else 8
        self.net = nn.Sequential(
            Conv(features, width, 3, padding=1),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            Conv(width, width, 3, stride=2, padding=1),
            nn.GroupNorm(groups, width),
            nn.SiLU())

    def forward(self, h):
        h = h.transpose(1, 2)                                               # (B, D, L)
        if self.grid:
            h = h.unflatten(2, self.grid)                                   # (B, D, rows, columns)
        return self.net(h).flatten(2).mean(2)                               # (B, width)


class Discriminator(nn.Module):
    """The trained part of D: a head for each layer's features, an MLP, one logit per image.

    The teacher is not a submodule: it is frozen, shared, and has no place in this state dict. At
    MaskBit's size (features = width = 1024, 4 heads, mlp = 2048) these are 84M parameters, against
    the 85M of Tab. 5.
    # choice: r is not an input, because the teacher sees how much is masked.
    """

    def __init__(self, features, layers, width, mlp, grid):
        super().__init__()
        self.layers = layers
        self.heads = nn.ModuleList(Head(features, width, grid) for _ in layers)
        self.mlp = nn.Sequential(
            nn.Linear(width * len(layers), mlp), nn.SiLU(), nn.Linear(mlp, 1))

    def forward(self, features):
        """Features (B, L, D) of each layer -> real/fake logits (B,)."""
        read = [head(h) for head, h in zip(self.heads, features)]
        return self.mlp(torch.cat(read, 1)).float().flatten()


# -------------------------------------------------------------- losses, from logits (B,) of D
def disc_loss(d_real, d_fake):
    """Eq. (7) as a loss for the heads: -log D(real) - log(1 - D(fake))."""
    return F.softplus(-d_real).mean() + F.softplus(d_fake).mean()           # Eq. (7)


def gen_loss(d_fake):
    """Eq. (8), non-saturating: -log D(fake)."""
    return F.softplus(-d_fake).mean()                                       # Eq. (8)


# --------------------------------------------------------------- the two steps that need D
def unchanged(features):
    return features


def gan_grad(z, disc, net, cond, mask, E, bias, embed=soft_embed, noisy=unchanged):
    """Gradient of Eq. (8) at the student's logits z: g (B, L, G, V), with the mean's 1/B; the loss;
    and the features of the fakes, detached.

    net is the frozen teacher; mask (B, L, G) the units replaced by the mask embedding; embed the
    estimator, Eq. (3), or one of Fig. 4a; noisy adds noise to a list of features (App. H.3). disc
    is the bare module, not its DDP wrapper: no parameter gets a gradient here, so there is nothing
    to synchronize.
    """
    z = z.detach().requires_grad_()
    e = embed(z, E, bias, mask)                                             # (B, L, d)
    features = net(e, cond, disc.layers)
    loss = gen_loss(disc(noisy(features)))                                  # Alg. 1, l. 14
    with torch.autocast(z.device.type, enabled=False):      # or the soft embedding's is in bf16
        (g,) = torch.autograd.grad(loss, z)
    return g, loss.detach(), [h.detach() for h in features]


@torch.no_grad()
def real_and_fake(z, x_real, layers, net, cond, mask, E, bias, embed=soft_embed, fake=None):
    """Features (2B, L, D) of each layer, real ones first: what the discriminator's update reads.

    x_real (B, L, G) are real tokens with the same condition as the fakes (App. H.3), masked at the
    same units. fake: features of the fakes, where they are known; else z is embedded.
    """
    real = embed_tokens(x_real.masked_fill(mask, E.shape[1] - 1), E, bias)  # (B, L, d)
    if fake is not None:
        return [torch.cat(pair) for pair in zip(net(real, cond, layers), fake)]
    cond = tuple(torch.cat([c, c]) for c in cond)
    return net(torch.cat([real, embed(z, E, bias, mask)]), cond, layers)


if __name__ == "__main__":
    from teachers import MaskBit

    torch.manual_seed(0)
    B = 64
    net = MaskBit(bits=6, grid=4, width=32, depth=4, heads=4, mlp=64, classes=2)
    E, bias = net.eval().requires_grad_(False).tables()
    disc = Discriminator(32, head_layers(4, 2), width=16, mlp=16, grid=4)
    z = torch.zeros(B, 16, 2, 8, requires_grad=True)
    x_real = torch.full((B, 16, 2), 5)                                      # real data: always 5
    cond = (torch.zeros(B).long(),)
    betas = 0.0, 0.99
    opt_z = torch.optim.Adam([z], 0.1, betas)
    opt_disc = torch.optim.Adam(disc.parameters(), 2e-3, betas)
    for step in range(201):
        mask = torch.rand(x_real.shape) < torch.rand(B, 1, 1) / 2
        features = real_and_fake(z, x_real, disc.layers, net, cond, mask, E, bias)
        d_real, d_fake = disc(features).chunk(2)
        loss_disc = disc_loss(d_real, d_fake)
        opt_disc.zero_grad()
        loss_disc.backward()
        opt_disc.step()
        z.grad, loss, _ = gan_grad(z, disc, net, cond, mask, E, bias)
        opt_z.step()
        if step % 50 == 0:
            print(f"step {step:3d}: p(real token) {z.softmax(-1)[..., 5].mean():.3f}"
                  f"   D loss {loss_disc:.3f}   G loss {loss:.3f}")
