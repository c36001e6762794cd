"""Soft-Di[M]O (Algorithm 1): a multi-step teacher is distilled into a one-step generator, and refined beyond it.

    python train.py                                                   # the tiny world, minutes on a laptop
    python train.py --teacher maskbit --gan --data data/imagenet      # one GPU
    torchrun --nproc_per_node=4 train.py --teacher maskbit --gan      # four: the paper's run
    python train.py --teacher meissonic-tiny --reward                 # text to image, with rewards on top
    python train.py --out out/run --resume                            # go on after any interruption

Each idea is a flag: --w_dimo 0 leaves the GAN alone, --no-gan leaves Di[M]O alone, --reward adds Eq. 9, and
--estimator straight-through takes the baseline's gradient. All flags and recipes: recipes/settings.py.

Every term of the generator's loss (Eq. 10) is computed as its gradient at the logits z. There the terms are weighed,
compared and logged, and the student is differentiated once: z.backward(g).

All randomness of a step is a function of (seed, step, place in the global batch). So a resumed run repeats nothing
and forgets nothing, and two processes make the same update as one with the joint batch.
"""

import contextlib
import copy
import functools
import json
import os
import time
from types import SimpleNamespace

import torch
from safetensors.torch import save as to_safetensors
from tqdm import tqdm

from data.prompts import read_prompts
from data.tokens import RealTokens, TextFeatures, synthetic_prompts
from dimo import aux_loss, dimo_grad, exact_mask, guidance_scale, initial_tokens, mask_ratio, student_logits
from gan import Discriminator, disc_logits, disc_loss, gan_grad, head_layers
from machinery.checkpoint import (FORMAT, append_rows, logged_evaluations, restarted, resumed_settings,
                                  save_checkpoint, trim_log)
from machinery.errors import UserError, guard
from machinery.files import local, read_tensors, replacing
from machinery.optim import Trained, ema_update, lr_factor
from machinery.pictures import sheet, spread
from machinery.processes import autocast, barrier, is_main, join_processes, rank, world_size
from machinery.profile import Profile, phase
from metrics.tables import headline, table
from networks.weights import load_state
from recipes.settings import flags, settle
from reward import reward_grad, rewards_for
from soft_embed import concentration, embed_tokens, sample_tokens, soft_embed
from teachers import fixed_sample, generate_student, generate_teacher, load_teacher
from worlds.judges import load_judge


# ========================================================================================== Algorithm 1
def train(c):
    """Algorithm 1 with the settings c (recipes/settings.py): the loop. What it calls stands below, in order."""
    run = set_up(c)                                   # phi, theta, psi, eta, and the data       l. 1
    for step in steps(run):                           # repeat                                   l. 2
        on = terms_of_the_loss(c, step)               # of Eq. 10: dimo, gan, reward; none while the others warm up
        factor = lr_factor(step, c.warmup, c.steps, c.lr_end)
        batches = draw_batches(run, step)             # all random choices; one batch per accumulation step
        norms, seen = {}, {}                          # of the gradients; what else the log should tell

        # --- Generate logits z_theta and tokens x_theta, update the generator theta             l. 3-18
        for batch in batches:
            z = generate(run, batch, learning=bool(on))                                       # l. 4-6
            g = {}                                    # the gradient of each term at the logits z
            if "dimo" in on:
                g["dimo"] = c.w_dimo / run.images * dimo_term(run, batch)                     # l. 8-11
            if "gan" in on:
                g["gan"] = c.w_gan / c.accum * gan_term(run, batch)                           # l. 12-14
            if "reward" in on:
                g["reward"] = c.w_reward / c.accum * reward_term(run, batch, seen)            # l. 15-16
            if on:
                backward(run.student, z, sum(g.values()), batch.last)                         # Eq. (10), l. 18
        if on:
            norms["student"] = run.student.update(c.clip, factor)
            ema_update(run.ema, run.student.module, step - c.student_start, c.ema)

        # --- Update the auxiliary psi, an MDM of the student's tokens                           l. 19-21
        for batch in batches:
            seen["loss_aux"] = aux_term(run, batch)                                           # Eq. (1)
        norms["aux"] = run.aux.update(c.clip, factor)

        # --- Update the discriminator eta                                                       l. 22-25
        if c.gan:
            for batch in batches:
                seen |= disc_term(run, batch)                                                 # Eq. (7)
            norms["disc"] = run.disc.update(c.clip, factor)

        log(run, step, factor, g, norms, seen)
        look(run, step + 1)
        save(run, step + 1)
    return finish(run)                                # the average of theta is the generator    l. 26-27


# -------------------------------------------------------------------------------- the steps of Algorithm 1
def terms_of_the_loss(c, step):
    """Which terms of Eq. 10 the student's update of this step has."""
    if step < c.student_start:
        return ()
    on = {"dimo": c.w_dimo > 0,
          "gan": c.gan and c.w_gan > 0 and step >= c.gan_start,
          "reward": c.reward and c.w_reward > 0 and step >= c.reward_start}
    return tuple(term for term in on if on[term])


def draw_step(c, step, net, conditions):
    """Every random choice of one step, for its whole global batch, as a dict of tensors, images first.

    They come from a generator that is seeded by (seed, step) alone: so they depend neither on the number of processes
    nor on restarts. (Dropout, Gumbel and feature noise are drawn by each process for itself, seeded by (seed, step,
    rank).) Classes and prompts are drawn on the host, which looks prompts up.
    """
    device, B, units = conditions.device, c.batch, (net.L, net.G)
    seed = (c.seed + 1) * 1_000_003 + step
    gen = torch.Generator(device).manual_seed(seed)
    host = gen if device.type == "cpu" else torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(B, *shape, generator=gen, device=device)

    def start():
        """What a student's pass starts from: conditions, tokens, which are masked, the draw of x_theta, noise."""
        return dict(
            which=torch.randint(len(conditions), (B,), generator=host),
            tokens=torch.randint(net.V, (B, *units), generator=gen, device=device),
            scores=uniform(*units), u=uniform(*units),
            noise=torch.randn(B, net.L, net.width, generator=gen, device=device))

    def mdm_mask(name):
        return {f"ratio_{name}": mask_ratio(uniform(), c.schedule).clamp(*c.ratio_range),
                f"scores_{name}": uniform(*units)}

    def gan_mask(name):
        low, high = c.gan_ratio
        return {f"ratio_{name}": low + (high - low) * uniform(), f"scores_{name}": uniform(*units)}

    draws = start() | mdm_mask("dimo") | mdm_mask("aux") | gan_mask("gan") | gan_mask("disc")
    if c.redraw:
        draws |= {f"again_{key}": value for key, value in start().items()}
    return draws


@phase("random choices")
def draw_batches(run, step):
    """This process's micro-batches of a step, with all that is random in them, and real tokens where the GAN is on."""
    c, micro = run.c, run.images // run.c.accum
    torch.manual_seed((c.seed + 1) * 7_919 + step * world_size() + rank())
    draws = draw_step(c, step, run.net, run.conditions)
    masked = (draws["ratio_aux"] * run.net.L * run.net.G).round().clamp(min=1).sum()
    batches = []
    for i in range(c.accum):
        first = (i * world_size() + rank()) * micro
        batch = SimpleNamespace(**{key: value[first : first + micro] for key, value in draws.items()})
        batch.last = i == c.accum - 1
        batch.aux_units = masked / world_size()       # masked units of the global batch, one process's share
        if c.gan:      # choice: real images bring the labels, so that real and fake share them (App. H.3)
            batch.x_real, batch.which = run.real.batch(step * c.batch + first, micro)
        batch.cond = run.features(batch.which)
        batches.append(batch)
    run.batch = batches[-1]
    return batches


@phase("student forward")
def generate(run, batch, learning):
    """z_theta with its graph, if learning; z and tokens x_theta without it are kept in the batch (l. 4-6)."""
    c, student = run.c, run.student
    x_init = initial_tokens(batch.tokens, c.init_ratio, batch.scores, run.net.V)              # l. 4
    model = student.model if learning else student.module
    with run.autocast(), student.syncing(batch.last), torch.set_grad_enabled(learning):
        noise = batch.noise * run.noise_scale
        z = student_logits(model, x_init, batch.cond, run.E, run.bias, c.noise, noise)        # l. 5: (B, L, G, V)
    batch.z = z.detach()
    batch.x = sample_tokens(batch.z, u=batch.u)                                               # l. 6
    return z


@phase("Di[M]O: teacher, aux")
def dimo_term(run, batch):
    """Eq. 2 as a gradient at the logits, to be divided by the batch: (B, L, G, V)."""
    c = run.c
    mask = exact_mask(batch.ratio_dimo, batch.scores_dimo)                                    # l. 8
    if c.soft_state:
        e_t = soft_embed(batch.z, run.E, run.bias, mask)                                      # App. I.15
    else:
        e_t = embed_tokens(batch.x.masked_fill(mask, run.net.V), run.E, run.bias)
    w = c.cfg
    if c.cfg_schedule != "constant":
        w = guidance_scale(batch.ratio_dimo, c.cfg, c.cfg_low, c.cfg_schedule)
    weight = 1.0 if c.w_t == "one" else 1 / batch.ratio_dimo                                  # w(t)
    with run.autocast():
        return dimo_grad(run.net, run.aux.module, e_t, batch.cond, mask, w, c.beta, weight)   # l. 9-11


@phase("GAN gradient")
def gan_term(run, batch):
    """Eq. 8 as a gradient at the logits: (B, L, G, V)."""
    c = run.c
    mask = exact_mask(batch.ratio_gan, batch.scores_gan, least=0)
    with run.autocast():
        g, _ = gan_grad(batch.z, run.disc.module, run.net, batch.cond, mask, run.E, run.bias,
                        c.estimator, c.tau, c.feature_noise)                                  # l. 14
    return g


@phase("reward gradient")
def reward_term(run, batch, seen):
    """Eq. 9 as a gradient at the logits: (B, L, G, V); the scores of the soft images go to `seen`."""
    c = run.c
    prompts = [run.prompts[i] for i in batch.which.tolist()]
    g, scores = reward_grad(batch.z, run.teacher.tokenizer, batch.cond, run.rewards, prompts, c.rewards,
                            chunk=c.reward_chunk, clip=c.clip_reward)                         # l. 16
    seen |= scores
    return g


@phase("student backward")
def backward(student, z, g, last):
    with student.syncing(last):
        z.backward(g)


@phase("aux forward, backward")
def aux_term(run, batch):
    """Adds the gradient of Eq. 1 to the auxiliary's; returns the loss."""
    c, z, x = run.c, batch.z, batch.x
    if c.redraw:       # choice: off, x_theta is used again (l. 20); the official code draws all anew, from the new theta
        z, x = draw_again(run, batch)
    mask = exact_mask(batch.ratio_aux, batch.scores_aux)                                      # l. 20
    with run.autocast(), run.aux.syncing(batch.last):
        z_aux = run.aux.model(embed_tokens(x.masked_fill(mask, run.net.V), run.E, run.bias), batch.cond)
        loss = aux_loss(z_aux, x, mask, c.smoothing, batch.aux_units, z, c.soft_target)       # Eq. (1), l. 21
        loss.backward()
    return loss.detach() * c.accum


def draw_again(run, batch):
    """Logits and tokens of the updated student, from starts of their own."""
    c = run.c
    if not c.gan:
        batch.cond = run.features(batch.again_which)
    x_init = initial_tokens(batch.again_tokens, c.init_ratio, batch.again_scores, run.net.V)
    with torch.no_grad(), run.autocast():
        noise = batch.again_noise * run.noise_scale
        z = student_logits(run.student.module, x_init, batch.cond, run.E, run.bias, c.noise, noise)
    return z, sample_tokens(z, u=batch.again_u)


@phase("discriminator")
def disc_term(run, batch):
    """Adds the gradient of Eq. 7 to the discriminator's; returns its loss, and its mean logits on real and fake."""
    c = run.c
    mask = exact_mask(batch.ratio_disc, batch.scores_disc, least=0)                           # l. 23: one for both
    with run.autocast(), run.disc.syncing(batch.last):
        d_real, d_fake = disc_logits(batch.z, batch.x_real, run.disc.model, run.net, batch.cond, mask, run.E,
                                     run.bias, c.estimator, c.tau, c.feature_noise)           # l. 24
        loss = disc_loss(d_real, d_fake)                                                      # Eq. (7), l. 25
        (loss / c.accum).backward()
    return dict(loss_disc=loss.detach(), d_real=d_real.detach().mean(), d_fake=d_fake.detach().mean())


# ---------------------------------------------------------------------------------- logging, looking, saving
def steps(run):
    """The numbers of the steps still to do, behind a progress bar; under --profile each is timed."""
    c = run.c
    run.bar = tqdm(range(run.first_step, c.steps), initial=run.first_step, total=c.steps, unit="step",
                   disable=not is_main(), dynamic_ncols=True)
    if run.first_step == 0:
        look(run, 0)
    run.clock = time.time(), run.first_step
    for step in run.bar:
        with run.profile.step(step) if c.profile else contextlib.nullcontext():
            yield step


def log(run, step, factor, g, norms, seen):
    """Count steps whose gradients are not finite; every --log_every steps, a line of what tells health.

    Such steps were skipped, on every process alike. After ten in a row the run gives up, at the next log line.
    """
    c = run.c
    inf = (~torch.isfinite(torch.stack([*norms.values()]))).any().float()
    run.skipped = run.skipped + inf
    run.in_a_row = (run.in_a_row + 1) * inf
    if c.profile or ((step + 1) % c.log_every and step + 1 < c.steps):
        return
    if run.in_a_row >= 10:
        found = ", ".join(f"{k} {float(v):.3g}" for k, v in norms.items())
        raise UserError(f"gradients were not finite in 10 steps in a row, up to step {step} (norms: {found}). The "
                        f"checkpoint of step {step // c.save_every * c.save_every} is good: lower --lr, or try "
                        "--dtype fp32, and --resume")
    entropy, top1 = concentration(run.batch.z)
    row = dict(step=step + 1, entropy=entropy, top1=top1, skipped=run.skipped, **seen)
    row |= {f"grad_{term}": g[term].norm() for term in g}         # of each term at the logits
    row |= {f"norm_{name}": norm for name, norm in norms.items()}             # of all parameters, before clipping
    row = {key: round(float(value), 6) for key, value in row.items()}
    now, (then, since) = time.time(), run.clock
    run.clock = now, step + 1
    row |= dict(lr=run.student.lr * factor, img_s=round(c.batch * (step + 1 - since) / (now - then), 1))
    if is_main():
        append_rows(run.log_path, [row])
        text = " ".join(f"{k} {v:.3g}" for k, v in row.items() if k not in ("step", "lr", "skipped"))
        run.bar.write(f"step {step + 1:5d} | {text}")


def look(run, step):
    """Every --eval_every steps and at the end: a row of metrics, and samples from starts that stay the same."""
    c = run.c
    if not c.eval_every or (step % c.eval_every and step < c.steps):
        return
    name = f"student, step {step}" if step else "start of this run"
    if run.judge and c.n_eval:
        row = run.judge(one_step(run, run.ema), c.n_eval, desc=name if is_main() else None)
        run.say(f"{name}: {headline(row)}")
        row = dict(model=name, kind="student", steps=1, temperature=c.temperature, **row)
        run.rows.append(row)
        if is_main():
            append_rows(run.log_path, [dict(step=step, **row)])
    if is_main():
        img = samples(run, one_step(run, run.ema))
        path = os.path.join(c.out, f"samples_{step:06d}.png")
        sheet([(name, img)], path, words=run.prompts and spread(run.prompts, len(img)))


def save(run, step):
    """Every --save_every steps and at the end: all that a run needs to go on, in one file."""
    c = run.c
    if c.profile or (step % c.save_every and step < c.steps):
        return
    if c.zero and world_size() > 1:
        for net in run.trained.values():
            net.optimizer.consolidate_state_dict()    # every process sends its share to the first
    if is_main():
        save_checkpoint(run.ckpt_path, dict(
            format=FORMAT, launch=os.environ.get("TORCHELASTIC_RUN_ID"), step=step, skipped=int(run.skipped),
            config=vars(c), ema=run.ema.state_dict(),
            optimizers={name: net.optimizer.state_dict() for name, net in run.trained.items()},
            **{name: net.module.state_dict() for name, net in run.trained.items()}))


def one_step(run, net):
    """make_images(asked, generator=, seconds=) by one pass of `net`, as judges call it."""
    c = run.c
    return functools.partial(generate_student, run.teacher, net, init_ratio=c.init_ratio, noise=c.noise,
                             temperature=c.temperature)


def samples(run, make_images):
    """The pictures of a strip, from starts that are the same at every look."""
    with run.autocast():
        return fixed_sample(make_images, run.conditions, n=20 if run.teacher.spec.image[1] < 100 else 4)


def finish(run):
    """The end of a run: weights in float16 for others to load, a picture, and a table beside the teacher's steps.

    The teacher's quality is read from the record that ships with it (minutes to make: evaluate.py --steps ...); its
    speed is measured here, on 500 images: the ratio depends on the machine. Without a record it is judged here.
    """
    c, spec = run.c, run.teacher.spec
    if c.profile:
        with torch.no_grad():
            e = embed_tokens(run.batch.x, run.E, run.bias)
        return run.profile.report(c, run.net, e, run.batch.cond) if is_main() else None
    if is_main():
        path = os.path.join(c.out, "student.safetensors")
        weights = {k: v.half().cpu().contiguous() for k, v in run.ema.state_dict().items()}
        with replacing(path) as f:
            f.write(to_safetensors(weights))
        run.say(f"wrote {path}")
    if not c.eval_every:
        return
    N = next(iter(spec.sampling))
    many = functools.partial(generate_teacher, run.teacher, steps=N)
    if is_main():
        path = os.path.join(c.out, "picture.png")
        sheet([(f"teacher, {N} guided steps", samples(run, many)), ("start of this run, 1 step", run.start),
               ("student, 1 step", samples(run, one_step(run, run.ema)))], path,
              words=run.prompts and spread(run.prompts, len(run.start)))
        run.say(f"wrote {path}")
    if not run.rows:
        return
    with run.autocast():
        timed = run.judge(many, 500 if spec.record else c.n_eval, desc="the teacher" if is_main() else None)
    rows = [row for row in teacher_rows(spec, timed, N) if row["n"] == c.n_eval] + run.rows
    if is_main():
        with open(os.path.join(c.out, "results.jsonl"), "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        text = table(rows)
        with open(os.path.join(c.out, "table.md"), "w") as f:
            f.write(text + "\n")
        run.say("\n" + text)


def teacher_rows(spec, timed, N):
    """The rows of the teacher in the final table; timed: its row by N steps, measured here."""
    if not spec.record:
        return [dict(timed, model="teacher", kind="teacher", steps=N, **spec.settings(N))]
    with open(local(spec.record)) as f:
        rows = [dict(json.loads(line), model="teacher, shipped record") for line in f]
    for row in rows:
        here = timed if row["steps"] == N else {}     # speeds of other machines say nothing
        row["images/s"] = here.get("images/s")
        row["tokens_only/s"] = here.get("tokens_only/s")
    return rows


# ------------------------------------------------------------------------------------------------- set-up
def set_up(c):
    """All that the loop uses, as one namespace: networks, data, optimizers, files; resumed where c.resume says so."""
    run = SimpleNamespace(c=c, device=join_processes(c.device))
    torch.set_float32_matmul_precision("high")        # TF32 where a GPU has it, for what stays in float32
    run.say = print if is_main() else lambda *words: None
    run.autocast = functools.partial(autocast, c.device, c.dtype == "bf16")
    run.images = c.batch // world_size()              # per process and step
    load_networks(run)
    load_conditions(run)
    run.start = None                                  # what theta_0 draws
    if is_main() and c.eval_every:
        student = run.student.module
        run.start = samples(run, one_step(run, student.eval()))
        student.train()
    open_files(run)
    run.judge = load_judge(run.teacher, run.device)
    if run.judge is None:
        run.say(f"{run.teacher.spec.name}: samples are drawn, not judged, while it trains; for FID see evaluate.py "
                "--reference")
    run.profile = Profile(run.device, c.profile) if c.profile else None
    if c.compile:                                     # in place: state-dict keys stay as they are
        for module in (run.net, *(net.module for net in run.trained.values())):
            module.compile(dynamic=False)             # a graph for each of its two or three shapes, no general one
    for net in run.trained.values():
        net.wrap(run.device)
    return run


def load_networks(run):
    """The frozen teacher phi, and what is trained: student theta, auxiliary psi, discriminator eta (l. 1)."""
    c = run.c
    run.teacher = load_teacher(c.teacher, c.teacher_weights, c.tokenizer_weights, c.random_weights, run.device,
                               c.text_weights, c.text_activation)
    run.net = net = run.teacher.net
    run.E, run.bias = net.tables()                    # frozen, so one table serves teacher, student and auxiliary
    run.noise_scale = run.teacher.noise_scale()
    student = copy.deepcopy(net)
    if c.init_from != "teacher":
        state = read_tensors(local(c.init_from))
        load_state(student, state.get("ema", state), c.init_from)             # a checkpoint will do
    aux, run.ema = copy.deepcopy(net), copy.deepcopy(student)
    for module in (student, aux):
        module.requires_grad_(True).set_dropout(c.dropout).train()
        for p in module.frozen():
            p.requires_grad_(False)
    if c.dtype == "bf16":
        net.halve()                                   # frozen: half the memory, no cast in every pass, the same results
    for module in (net, student, aux, run.teacher.tokenizer):
        module.set_checkpointing(c.checkpointing)
    train = functools.partial(Trained, kind=c.optimizer, weight_decay=c.weight_decay, zero=c.zero)
    run.student = train(student, lr=c.lr, betas=(0.9, 0.999))
    run.aux = train(aux, lr=c.aux_lr, betas=(0.9, 0.999))
    run.trained = {"student": run.student, "aux": run.aux}
    if c.gan:
        torch.manual_seed(c.seed)                     # the heads' initial weights, the same on every process
        layers = head_layers(net.depth, c.heads)
        disc = Discriminator(net.width, layers, c.head_width, c.head_mlp, net.feature_grid).to(run.device)
        run.trained["disc"] = run.disc = train(disc, lr=c.disc_lr, betas=(0.0, 0.999))


def load_conditions(run):
    """What can be asked for, D_c; real images with their conditions, D_d; and the rewards that judge by prompts."""
    c, teacher = run.c, run.teacher
    if c.gan:
        run.real = RealTokens(c.data, teacher, c.seed)
    run.prompts = None
    if teacher.text:
        if c.gan:
            run.prompts = run.real.prompts
        else:
            run.prompts = synthetic_prompts() if c.profile else read_prompts(c.prompts)
    run.conditions = teacher.conditions(run.prompts)
    run.features = TextFeatures(teacher, run.conditions, c.text_cache)
    if run.features.why:
        run.say(run.features.why)
    if c.reward:
        paths = {name: getattr(c, f"{name}_weights") for name in c.rewards}
        run.rewards = rewards_for(
            teacher.spec, c.rewards, paths, c.random_weights, device=run.device, vocab=c.bert_vocab,
            dtype=torch.bfloat16 if c.dtype == "bf16" else None, clip_scaled=not c.clip_cosine,
            checkpointing=c.checkpointing)
        if not c.w_dimo:
            run.say("warning: a reward without Di[M]O over-saturates (App. I.10); --w_dimo above 0 anchors it")


def open_files(run):
    """Resume from the checkpoint, or make the folder ready for a new run; say what runs."""
    c = run.c
    run.ckpt_path = os.path.join(c.out, "ckpt.pt")
    run.log_path = os.path.join(c.out, "log.jsonl")
    run.first_step = 0
    run.skipped = run.in_a_row = torch.zeros((), device=run.device)           # counted on the device: the host does not wait
    if c.resume:
        state = read_tensors(run.ckpt_path)
        load_state(run.ema, state["ema"], f"{run.ckpt_path} (ema)")
        for name, net in run.trained.items():
            load_state(net.module, state[name], f"{run.ckpt_path} ({name})")
            net.optimizer.load_state_dict(state["optimizers"][name])
        run.first_step = state["step"]
        run.skipped = run.skipped + state["skipped"]
    if is_main() and not c.profile:
        os.makedirs(c.out, exist_ok=True)
        if not c.resume and os.path.exists(run.ckpt_path):
            os.remove(run.ckpt_path)                  # --overwrite: a restart must not go on with the older run
        trim_log(run.log_path, run.first_step if c.resume else -1)
    barrier()                                         # the log is whole before any process reads it
    run.rows = logged_evaluations(run.log_path)       # of the part before a resume
    gan = "no GAN"
    if c.gan:
        gan = f"discriminator {count(run.disc.module):,}, {len(run.real.labels):,} real images"
    run.say(f"{run.teacher.spec.name}: {count(run.net):,} parameters, {gan}; {world_size()} process(es), {run.device}, "
            f"{c.dtype}; step {run.first_step} of {c.steps}")
    if not c.profile:
        settings = {k: v for k, v in vars(c).items() if k not in ("resume", "overwrite", "out")}
        run.say("settings " + json.dumps(settings))


def count(module):
    return sum(p.numel() for p in module.parameters())


def main():
    parser = flags(__doc__).parser
    given = vars(parser.parse_args())
    path = os.path.join(given.get("out", flags().defaults["out"]), "ckpt.pt")
    if restarted(path):
        given |= dict(resume=True, overwrite=False)
    if given.get("resume"):
        given = resumed_settings(path, given)
    train(settle(given))


if __name__ == "__main__":
    guard(main, out_of_memory="take --accum 2 or more, --checkpointing, or a smaller --batch",
          cannot_write="the last checkpoint, if there is one, is whole: go on with --resume",
          peer_lost="go on from the last checkpoint with --resume, or let torchrun do so with --max-restarts")
