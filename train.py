"""Soft-Di[M]O (Algorithm 1): a multi-step teacher, distilled into one step and refined beyond it.

    python train.py                                                # the tiny world, on a laptop
    python train.py --teacher maskbit --gan --data data/imagenet   # one GPU
    torchrun --nproc_per_node=4 train.py --teacher maskbit --gan   # four: the paper's run
    python train.py --teacher meissonic-tiny --reward              # text to image, and rewards
    python train.py --out out/run --resume                         # go on after any interruption

Each idea is a flag: --w_dimo 0 leaves the GAN alone, --no-gan leaves Di[M]O alone, --reward adds
Eq. 9, --estimator straight-through takes the baseline's gradient (recipes/settings.py has all).

Every term of the generator's loss (Eq. 10) is computed as its gradient at the logits z. There the
terms are weighed, compared and logged, and the student is differentiated once: z.backward(g).

All randomness of a step is a function of (seed, step, place in the global batch). So a resumed run
repeats nothing and forgets nothing, and two processes make the same update as one, as do two
accumulation steps. Only dropout, where it is on, is drawn by each process for itself.
"""

import contextlib
import functools
import os
import sys
import time
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from dimo import (aux_loss, dimo_grad, exact_mask, guidance_scale, initial_tokens, mask_ratio,
                  student_logits)
from gan import disc_loss, gan_grad, real_and_fake
from machinery.checkpoint import FORMAT, due, restarted, resumed_settings
from machinery.errors import UserError, guard
from machinery.optim import ema_update, lr_factor
from machinery.processes import all_reduce, is_main, rank, world_size
from machinery.profile import phase
from machinery.records import append_rows
from recipes.selftest import selftest
from recipes.set_up import set_up
from recipes.settings import flags, settle
from reward import reward_grad, weighted
from soft_embed import (ESTIMATORS, concentration, embed_tokens, gumbel, sample_tokens,
                        soft_embed)
from worlds.looking import finish, look


# ------------------------------------------------------------------------------------ Algorithm 1
def train(c):
    """Algorithm 1, with settings c of recipes/settings.py. What it calls stands below, in order."""
    run = set_up(c)                                   # phi, theta, psi, eta, and the data  l. 1
    for step in steps(run):                           # repeat                              l. 2
        factor = lr_factor(step, c.warmup, c.steps, c.lr_end)
        batches = draw_batches(run, step)             # all that is random, per accumulation step
        norms = {}                                    # of the gradients, before clipping
        seen = defaultdict(float)                     # means over the batch, for the log

        # --- Generate logits z_theta and tokens x_theta, update the generator theta        l. 3-18
        for batch in batches:
            z = generate(run, batch)                                                        # l. 4-6
            g = {}                                    # each term's gradient at the logits z
            if "dimo" in batch.on:
                g["dimo"] = c.w_dimo / run.images * dimo_term(run, batch, seen)            # l. 8-11
            if "gan" in batch.on:
                g["gan"] = c.w_gan / c.accum * gan_term(run, batch, seen)                 # l. 12-14
            if "reward" in batch.on:
                g["reward"] = c.w_reward / c.accum * reward_term(run, batch, seen)        # l. 15-16
            if g:
                backward(run, batch, z, g, seen)                                # Eq. (10), l. 17-18
            if batch.shared:
                aux_term(run, batch, seen)            # --share_passes: before the graph grows old
        if terms_of_the_loss(c, step):
            norms["student"] = run.student.update(c.clip, factor)
            ema_update(run.ema, run.student.module, step - c.student_start, c.ema)

        # --- Update the auxiliary psi, an MDM of the student's tokens                      l. 19-21
        if c.w_dimo:
            for batch in batches:
                if "dimo" in batch.roles and not batch.shared:
                    aux_term(run, batch, seen)                                   # Eq. (1), l. 20-21
            norms["aux"] = run.aux.update(c.clip, factor)

        # --- Update the discriminator eta                                                  l. 22-25
        if c.gan:
            for batch in batches:
                if "gan" in batch.roles:
                    disc_term(run, batch, seen)                                  # Eq. (7), l. 23-25
            norms["disc"] = run.disc.update(c.clip, factor)

        log(run, step, factor, batches, norms, seen)
        look(run, step + 1)
        save(run, step + 1)
    finish(run)                                       # theta's average is the result  l. 26-27


def terms_of_the_loss(c, step):
    """The terms that the student's loss (Eq. 10) has in this step; none while others warm up."""
    if step < c.student_start:
        return set()
    on = {
        "dimo": c.w_dimo > 0,
        "gan": c.gan and c.w_gan > 0 and step >= c.gan_start,
        "reward": c.reward and c.w_reward > 0 and step >= c.reward_start,
    }
    return {term for term in on if on[term]}


# ----------------------------------------------------------------------- what is random in a step
def draw_step(c, step, net, choices, device, apart=False):
    """Every random choice of one step for its whole global batch: a dict of tensors, batch first.

    All come from a generator seeded by (seed, step) alone: so they depend neither on the number of
    processes nor on restarts. Conditions, of which there are `choices`, are drawn on the host,
    which looks them up. apart: a second start, "pair_...", for the GAN's own conditions.
    """
    B, units = c.batch, (net.L, net.G)
    seed = (c.seed + 1) * 1_000_003 + step
    gen = torch.Generator(device).manual_seed(seed)
    host = gen if device.type == "cpu" else torch.Generator().manual_seed(seed)

    on_device = dict(generator=gen, device=device)

    def uniform(*shape):
        return torch.rand(B, *shape, **on_device)

    def start(name=""):
        """What the student's pass starts from; u decides which tokens are drawn from its logits."""
        return {
            f"{name}which": torch.randint(choices, (B,), generator=host),
            f"{name}tokens": torch.randint(net.V, (B, *units), **on_device),
            f"{name}scores": uniform(*units),
            f"{name}u": uniform(*units),
            f"{name}noise": torch.randn(B, net.L, net.width, **on_device)}

    def mdm_ratio():
        return mask_ratio(uniform(), c.schedule).clamp(*c.ratio_range)

    def gan_ratio():
        low, high = c.gan_ratio
        return low + (high - low) * uniform()

    draws = start()
    draws |= dict(ratio=mdm_ratio(), scores_t=uniform(*units))
    draws |= dict(ratio_aux=mdm_ratio(), scores_aux=uniform(*units))
    draws |= dict(ratio_gan=gan_ratio(), scores_gan=uniform(*units))
    draws |= dict(ratio_disc=gan_ratio(), scores_disc=uniform(*units))
    if c.redraw:
        draws |= start("again_")
    if apart:
        draws |= start("pair_")
    return draws


def draw_each(generators, shape, draw=torch.randn):
    """Noise (images, *shape), each image's from a generator of its own.

    For Gumbel and feature noise, which are too large to be drawn for all processes by each.
    """
    noise = [draw(shape, generator=gen, device=gen.device) for gen in generators]
    return torch.stack(noise)


@phase("random choices")
def draw_batches(run, step):
    """This process's micro-batches: what is random in them, real tokens, and the conditions.

    Each has `roles`, the terms that it may serve, and `on`, those of them that are on in this step.
    One batch serves all, unless the GAN has conditions of its own: then there are two.
    """
    c, world = run.c, world_size()
    own_seed = (c.seed + 1) * 7_919 + step * world + rank()
    torch.manual_seed(own_seed)                       # for dropout
    apart = len(run.roles) > 1
    draws = draw_step(c, step, run.net, run.choices, run.device, apart)
    on = terms_of_the_loss(c, step)
    shared = c.share_passes and "dimo" in on
    units = draws["ratio" if shared else "ratio_aux"] * run.net.L * run.net.G
    masked = units.round().clamp(min=1).sum()         # units that the auxiliary's loss is a mean of
    micro = run.images // c.accum
    batches = []
    for i in range(c.accum):
        first = (i * world + rank()) * micro
        for roles in run.roles:
            batch = micro_batch(run, step, draws, range(first, first + micro), roles)
            batch.on = on & roles
            batch.shared = shared and "dimo" in roles
            batch.aux_units = masked / world          # of the global batch, this process's share
            batches.append(batch)
    # gradients travel between processes once per step and network, with the last batch
    served_by = {"student": on, "aux": {"dimo"}, "disc": {"gan"}}
    for network, terms in served_by.items():
        serving = [batch for batch in batches if batch.roles & terms]
        for batch in serving[-1:]:
            batch.last_of.add(network)
    run.batch = batches[-1]
    return batches


def micro_batch(run, step, draws, places, roles):
    """The part of the draws at `places` of the global batch."""
    c = run.c
    mine = slice(places.start, places.stop)
    own = {key: value[mine] for key, value in draws.items()}
    batch = SimpleNamespace(**own, roles=roles, last_of=set())
    pair = roles == {"gan"}
    if pair:
        for key in ("tokens", "scores", "u", "noise"):
            setattr(batch, key, getattr(batch, f"pair_{key}"))
    if c.feature_noise or c.estimator != "soft":      # nothing else draws from them
        batch.generators = [generator(run, (c.seed, step, place, pair)) for place in places]
    if c.gan and "gan" in roles:
        # choice: real images bring the labels, so that real and fake share them (App. H.3)
        first = step * c.batch + places.start
        batch.x_real, labels = run.real.batch(first, len(places))
        batch.which = labels + run.first_pair
    batch.cond = run.features(batch.which)
    return batch


def generator(run, numbers):
    """A generator on the device, seeded by a few numbers."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator(run.device).manual_seed(seed.item())


# ----------------------------------------------------------------------- the steps of Algorithm 1
@phase("student forward")
def generate(run, batch):
    """z_theta, with its graph if it is to learn; the batch keeps z and x_theta, without it."""
    student, learning = run.student, bool(batch.on)
    model = student.model if learning else student.module
    with student.syncing("student" in batch.last_of), torch.set_grad_enabled(learning):
        z = one_pass(run, model, batch.tokens, batch.scores, batch.noise, batch.cond)
    batch.z = z.detach()                                                          # (B, L, G, V)
    batch.x = sample_tokens(batch.z, u=batch.u)                                             # l. 6
    return z


def one_pass(run, model, tokens, scores, noise, cond):
    """The generator's logits z_theta(x_init, c), (B, L, G, V)."""
    c = run.c
    x_init = initial_tokens(tokens, c.init_ratio, scores, run.net.V)                        # l. 4
    noise = noise * run.noise_scale
    with run.autocast():
        return student_logits(model, x_init, cond, run.E, run.bias, c.noise, noise)         # l. 5


def embed_masked(run, x, mask):
    """Embeddings of the tokens x, and of the mask where `mask` is true: (B, L, d)."""
    return embed_tokens(x.masked_fill(mask, run.net.V), run.E, run.bias)


@phase("Di[M]O: teacher, aux")
def dimo_term(run, batch, seen):
    """Eq. 2 as a gradient at the logits, (B, L, G, V), to be divided by the batch."""
    c = run.c
    mask = exact_mask(batch.ratio, batch.scores_t)                                          # l. 8
    if c.soft_state:
        e_t = soft_embed(batch.z, run.E, run.bias, mask)                                # App. I.15
    else:
        e_t = embed_masked(run, batch.x, mask)
    w = c.cfg
    if c.cfg_schedule != "constant":
        w = guidance_scale(batch.ratio, c.cfg, c.cfg_low, c.cfg_schedule)
    weight = 1.0 if c.w_t == "one" else 1 / batch.ratio                                      # w(t)
    psi = run.aux.module
    if batch.shared:
        psi = functools.partial(shared_pass, run, batch)
    with run.autocast():                                                                 # l. 9-11
        g, loss = dimo_grad(run.net, psi, e_t, batch.cond, mask, w, c.beta, weight)
    batch.mask = mask
    seen["loss_dimo"] += loss.sum() / run.images
    return g


def shared_pass(run, batch, e, cond):
    """The auxiliary's pass of Eq. 2, whose graph is kept: Eq. 1 takes the same one."""
    with torch.enable_grad(), run.aux.syncing("aux" in batch.last_of):
        batch.z_aux = run.aux.model(e, cond)
    return batch.z_aux.detach()


def embedder(run, batch):
    """From logits to embeddings, with a gradient, as --estimator and --tau say.

    # choice: at all units, also where x_init held a random token: the student draws those, too.
    """
    c = run.c
    how = dict(tau=c.tau)
    if c.estimator != "soft":
        u = draw_each(batch.generators, batch.z.shape[1:], torch.rand)
        how["noise"] = gumbel(u)
    return functools.partial(ESTIMATORS[c.estimator], **how)


def add_noise(run, batch, features):
    """Noise on the teacher's features (App. H.3), a list of (B, L, D), or (2B, L, D)."""
    s = run.c.feature_noise
    if s == 0:
        return features
    generators = batch.generators * (len(features[0]) // len(batch.generators))
    noisy = []
    for h in features:
        noise = draw_each(generators, h.shape[1:])
        noisy.append(h + s * noise.to(h.dtype))
    return noisy


@phase("GAN gradient")
def gan_term(run, batch, seen):
    """Eq. 8 as a gradient at the logits, (B, L, G, V)."""
    c = run.c
    mask = exact_mask(batch.ratio_gan, batch.scores_gan, least=0)
    with run.autocast():                                                                    # l. 14
        g, loss, features = gan_grad(
            batch.z, run.disc.module, run.net, batch.cond, mask, run.E, run.bias,
            embedder(run, batch), functools.partial(add_noise, run, batch))
    if c.share_passes:
        batch.fake, batch.mask_disc = features, mask
    seen["loss_gan"] += loss / c.accum
    return g


@phase("reward gradient")
def reward_term(run, batch, seen):
    """Eq. 9 as a gradient at the logits, (B, L, G, V)."""
    c = run.c
    prompts = [run.prompts[i] for i in batch.which.tolist()]
    g, scores = reward_grad(                                                                # l. 16
        batch.z, run.teacher.tokenizer, batch.cond,
        run.rewards, prompts, c.rewards,
        embedder(run, batch), chunk=c.reward_chunk, clip=c.clip_reward)
    seen["loss_reward"] -= weighted(scores, c.rewards) / c.accum
    for name, score in scores.items():                # of the soft images
        seen[name] += score / c.accum
    return g


@phase("student backward")
def backward(run, batch, z, g, seen):
    """The student's part of Eq. 10, differentiated once: d loss / d theta = g dz / d theta."""
    for term in g:
        seen[f"grad_{term}"] += g[term].square().sum()
    with run.student.syncing("student" in batch.last_of):
        z.backward(sum(g.values()))


@phase("aux forward, backward")
def aux_term(run, batch, seen):
    """Adds the gradient of Eq. 1 to the auxiliary's."""
    c, z, x = run.c, batch.z, batch.x
    # choice: its backward pass, too, runs under autocast: better on shapes (docs/log.md)
    with run.autocast(), run.aux.syncing("aux" in batch.last_of):
        if batch.shared:
            # choice: off: Alg. 1 draws a mask of its own here; the same one saves a pass
            z_aux, mask = batch.z_aux, batch.mask
            del batch.z_aux
        else:
            if c.redraw:
                # choice: off: x_theta is used again; the official code draws anew, from new theta
                z, x = draw_again(run, batch)
            mask = exact_mask(batch.ratio_aux, batch.scores_aux)                            # l. 20
            z_aux = run.aux.model(embed_masked(run, x, mask), batch.cond)
        loss = aux_loss(
            z_aux, x, mask, c.smoothing, batch.aux_units, z_student=z, alpha=c.soft_target)
        loss.backward()                                                           # Eq. (1), l. 21
    seen["loss_aux"] += loss.detach()


def draw_again(run, batch):
    """Logits and tokens of the updated student, from starts of their own."""
    if "x_real" not in vars(batch):
        batch.cond = run.features(batch.again_which)
    with torch.no_grad():
        z = one_pass(run, run.student.module, batch.again_tokens, batch.again_scores,
                     batch.again_noise, batch.cond)
    return z, sample_tokens(z, u=batch.again_u)


@phase("discriminator")
def disc_term(run, batch, seen):
    """Adds the gradient of Eq. 7 to the discriminator's."""
    c, disc = run.c, run.disc
    fake = None
    if c.share_passes and "gan" in batch.on:
        fake, mask = batch.fake, batch.mask_disc      # choice: off, as in `aux_term`
    else:
        mask = exact_mask(batch.ratio_disc, batch.scores_disc, least=0)  # l. 23: for real and fake
    with disc.syncing("disc" in batch.last_of):
        with run.autocast():
            features = real_and_fake(                                                       # l. 24
                batch.z, batch.x_real, disc.module.layers, run.net, batch.cond, mask,
                run.E, run.bias, embedder(run, batch), fake)
            d_real, d_fake = disc.model(add_noise(run, batch, features)).chunk(2)
        loss = disc_loss(d_real, d_fake)                                          # Eq. (7), l. 25
        (loss / c.accum).backward()
    seen["loss_disc"] += loss.detach() / c.accum
    seen["d_real"] += d_real.detach().mean() / c.accum
    seen["d_fake"] += d_fake.detach().mean() / c.accum


# ------------------------------------------------------------------------------- steps, log, save
def steps(run):
    """The numbers of the steps still to do, behind a progress bar; --profile times each."""
    c, first = run.c, run.first_step
    run.bar = tqdm(
        range(first, c.steps), initial=first, total=c.steps, unit="step",
        disable=not is_main(), dynamic_ncols=True)
    if first == 0:
        look(run, 0)
    run.last_log = (first, time.time())
    for step in run.bar:
        run.writer.check()                            # has the last checkpoint been written?
        with run.profile.step(step) if c.profile else contextlib.nullcontext():
            yield step
    if c.profile and is_main():
        with torch.no_grad():
            e = embed_tokens(run.batch.x, run.E, run.bias)
        run.profile.report(c, run.net, e, run.batch.cond)


def log(run, step, factor, batches, norms, seen):
    """Count steps with gradients that are not finite; every --log_every steps tell of the health.

    Such steps were skipped, on every process alike. After ten in a row the run gives up.
    """
    c = run.c
    inf = torch.zeros_like(run.skipped)
    for norm in norms.values():
        inf = torch.maximum(inf, (~torch.isfinite(norm)).float())
    run.skipped = run.skipped + inf
    run.in_a_row = (run.in_a_row + 1) * inf
    if c.profile or not due(step + 1, c.log_every, c.steps):
        return
    if run.in_a_row >= 10:
        found = ", ".join(f"{name} {float(norm):.3g}" for name, norm in norms.items())
        raise UserError(
            f"gradients were not finite in 10 steps in a row, up to step {step} (norms: {found}). "
            f"The checkpoint of step {step // c.save_every * c.save_every} is good: lower --lr, or "
            "try --dtype fp32, and --resume")
    row = global_means(batches, seen)
    row |= {f"norm_{name}": float(norm) for name, norm in norms.items()}      # before clipping
    row = {key: float(f"{value:.7g}") for key, value in row.items()}
    row = dict(step=step + 1, **row, skipped=int(run.skipped))
    row["lr"] = run.student.lr * factor
    before, then = run.last_log
    run.last_log = (step + 1, time.time())
    seconds = run.last_log[1] - then
    row["img_s"] = round(c.batch * (step + 1 - before) / seconds, 1)
    if is_main():
        append_rows(run.log_path, [row])
        shown = [key for key in row if key not in ("step", "lr", "skipped")]
        text = " ".join(f"{key} {row[key]:.3g}" for key in shown)
        run.bar.write(f"step {step + 1:5d} | {text}")


def global_means(batches, seen):
    """What the step has seen, as numbers of its global batch; every process must call it."""
    for batch in batches:
        entropy, top1 = concentration(batch.z)
        seen["entropy"] += entropy / len(batches)
        seen["top1"] += top1 / len(batches)
    world = world_size()
    sums = all_reduce(torch.stack([*seen.values()]).float())
    means = sums / world
    row = dict(zip(seen, means.tolist()))
    for name in row:
        if name.startswith("grad_"):                  # so far a square, of gradients of which the
            row[name] = (row[name] / world) ** 0.5    # update takes the mean over processes
    return row


def save(run, step):
    """Every --save_every steps and at the end: all that a run needs to go on, in one file."""
    c = run.c
    if c.profile or not due(step, c.save_every, c.steps):
        return
    # with --zero every process sends its part to the first
    optimizers = {name: net.optimizer.state_dict() for name, net in run.trained.items()}
    if not is_main():
        return
    state = dict(
        format=FORMAT,
        launch=os.environ.get("TORCHELASTIC_RUN_ID"),
        step=step,
        skipped=int(run.skipped),
        config=vars(c),
        ema=run.ema.state_dict(),
        optimizers=optimizers)
    for name, net in run.trained.items():
        state[name] = net.module.state_dict()
    run.writer.save(run.ckpt_path, state)             # from a copy, while training goes on
    if step >= c.steps:
        run.writer.wait()


# ------------------------------------------------------------------------------- the command line
def main():
    command = flags(__doc__)
    given = vars(command.parser.parse_args())
    if given.get("selftest"):
        selftest(sys.modules[__name__], given, command.defaults)
        return
    out = given.get("out", command.defaults["out"])
    path = f"{out}/ckpt.pt"
    if restarted(path):
        given |= dict(resume=True, overwrite=False)
    if given.get("resume"):
        given = resumed_settings(path, given)
    train(settle(given))


if __name__ == "__main__":
    guard(
        main,
        out_of_memory="take --accum 2 or more, --checkpointing, or a smaller --batch",
        cannot_write="the last checkpoint, if there is one, is whole: go on with --resume",
        peer_lost="go on from the last checkpoint with --resume, or let torchrun do so with "
                  "--max-restarts")
