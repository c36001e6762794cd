"""Soft-Di[M]O (Algorithm 1): a multi-step teacher distilled into a one-step generator, and refined beyond it.

    python train.py                                                   # the tiny world, minutes on a laptop's CPU
    python train.py --teacher maskbit --gan --data data/imagenet      # one GPU
    torchrun --nproc_per_node=4 train.py --teacher maskbit --gan      # four, the paper's run
    python train.py --teacher meissonic-tiny --reward                 # text to image, and a reward on top
    python train.py --out out/run --resume                            # go on after any interruption

Each idea is a flag: --w_dimo 0 leaves the GAN alone, --no-gan leaves Di[M]O alone, --estimator straight-through
takes the baseline's gradient, --reward adds Eq. 9. Every term of the generator's loss (Eq. 10) is computed as its gradient at the
logits z, so terms are weighed, compared and logged there, and the student is differentiated once: z.backward(g).

All randomness of a step is a function of (seed, step, place in the global batch). So a resumed run repeats nothing
and forgets nothing, and two processes make the same update as one with the joint batch.
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import os
import time

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from data.prompts import read_prompts
from data.tokens import RealTokens, TextFeatures, synthetic_prompts
from dimo import SCHEDULES, aux_loss, dimo_grad, exact_mask, guidance_scale, initial_tokens, mask_ratio, student_logits
from gan import Discriminator, disc_logits, disc_loss, gan_grad, head_layers
from machinery.checkpoint import FORMAT, logged, restarted, save_checkpoint, trim_log
from machinery.errors import UserError, guard
from machinery.files import local, replacing
from machinery.flags import check_device
from machinery.optim import Muon, ema_update, lr_factor, update
from machinery.pictures import sheet, spread
from machinery.processes import autocast, barrier, join_processes
from machinery.profile import Profile
from metrics.tables import headline, table
from networks.weights import load_state, read_weights
from recipes.tiny import RECIPES
from reward import REWARDS, SEED, rewards_for, mix, reward_grad
from soft_embed import ESTIMATORS, concentration, embed_tokens, sample_tokens, soft_embed
from teachers import SPECS, fixed_sample, generate_student, generate_teacher, load_teacher
from worlds.judges import load_judge

# ============================================================================================ settings


def flags():
    """The parser, and the defaults that hold where neither a flag nor the teacher's column of Tab. 5 says otherwise."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {}

    def add(group, name, default, help, **kw):
        if isinstance(default, bool):
            kw.update(action=argparse.BooleanOptionalAction)
        elif "type" not in kw and default is not None:
            kw.update(type=type(default))
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=f"{help} (default: {default})", **kw)
        defaults[name] = default

    g = ap.add_argument_group("run")
    add(g, "teacher", "maskbit-tiny", f"one of {', '.join(SPECS)}")
    add(g, "recipe", None, f"column of Tab. 5, one of {', '.join(RECIPES)}; the teacher's own if not given")
    add(g, "out", "out/run", "folder for checkpoints, log.jsonl, pictures and the final table")
    add(g, "resume", False, "go on from the checkpoint in --out; its settings hold")
    add(g, "overwrite", False, "start anew where --out already holds a run")
    add(g, "steps", 50_000, "student updates in all")
    add(g, "batch", 256, "images a step, over all processes and accumulation steps")
    add(g, "accum", 1, "gradient accumulation steps: memory for time")
    add(g, "seed", 0, "of everything random")
    add(g, "init_from", "teacher", "one-step generator theta_0 to start from (Alg. 1): weights, a checkpoint, or: teacher", type=str)
    add(g, "log_every", 50, "steps between log lines; the host waits for the device only then")
    add(g, "save_every", 1000, "steps between checkpoints")
    add(g, "eval_every", 2000, "steps between evaluations (FID and a strip of samples); 0: none, nor at the end")
    add(g, "n_eval", 5000, "images an evaluation")
    g = ap.add_argument_group("teacher")
    add(g, "teacher_weights", None, "local file instead of the published one")
    add(g, "tokenizer_weights", None, "local file instead of the published one")
    add(g, "text_weights", None, "local file of the text encoder instead of the published one", type=str)
    add(g, "text_activation", None, "of the text encoder, where its files leave it open", choices=["gelu", "quick_gelu"])
    add(g, "random_weights", False, "no files at all: to try memory and speed")
    add(g, "prompts", None, "what text teachers are asked for: a text file, one prompt a line; with --gan the data's", type=str)
    add(g, "text_cache", "memory", "where prompts' features are kept: memory, off, or a folder, for later runs too", metavar="WHERE")
    add(g, "cfg", 1.5, "teacher guidance w of u + w (c - u)")
    add(g, "cfg_low", 1.0, "where guidance falls to as the mask ratio falls, with --cfg_schedule linear or cosine")
    add(g, "cfg_schedule", "constant", "guidance over the mask ratio (App. I.9)", choices=["constant", "linear", "cosine"])
    g = ap.add_argument_group("Di[M]O (Eq. 2)")
    add(g, "w_dimo", 1.0, "weight of the Di[M]O term")
    add(g, "beta", 0.0, "divergence: 0 forward KL, 1 reverse KL, else generalized Jeffreys")
    add(g, "init_ratio", 0.6, "share of masked units in x_init")
    add(g, "noise", 0.1, "embedding perturbation s of the start")
    add(g, "schedule", "arccos", "mask schedule, student's and auxiliary's", choices=SCHEDULES)
    add(g, "ratio_range", [0.0, 1.0], "bounds of the mask ratio it gives", nargs=2, type=float, metavar=("A", "B"))
    add(g, "w_t", "one", "w(t) of Eq. 2: one, or 1 / mask ratio", choices=["one", "inverse"])
    add(g, "soft_state", False, "soft embeddings in the forward state x_t (App. I.15)")
    add(g, "smoothing", 0.1, "label smoothing of the auxiliary loss")
    add(g, "soft_target", 0.0, "share of the soft target in the auxiliary loss")
    add(g, "redraw", False, "the auxiliary gets fresh tokens from the updated student (official code), not x_theta (Alg. 1)")
    add(g, "student_start", 0, "first updates of the auxiliary and the discriminator alone")
    add(g, "temperature", 1.0, "of sampling the student in evaluations; training always draws at 1")
    g = ap.add_argument_group("GAN (Eq. 7-8)")
    add(g, "gan", False, "refine by the masked-embedding GAN on real tokens")
    add(g, "data", None, "real tokens: a folder written by data/*.py, or a packed .npz", type=str)
    add(g, "w_gan", 25.0, "weight of the GAN term")
    add(g, "gan_start", 1000, "steps before the GAN term joins the student's loss (Fig. 9)")
    add(g, "gan_ratio", [0.0, 0.95], "masking of the discriminator's input, r ~ U[a, b]", nargs=2, type=float, metavar=("A", "B"))
    add(g, "estimator", "soft", "gradient through the tokens (Fig. 4a)", choices=list(ESTIMATORS))
    add(g, "tau", 1.0, "softmax temperature of the soft embedding (Fig. 8)")
    add(g, "heads", 4, "layers of the teacher that the discriminator reads")
    add(g, "head_width", 1024, "channels of a head")
    add(g, "head_mlp", 2048, "hidden width of the last MLP")
    add(g, "feature_noise", 0.0, "std of noise on the teacher's features (App. H.3)")
    g = ap.add_argument_group("reward (Eq. 9)")
    add(g, "reward", False, "refine by differentiable rewards, through the tokenizer's decoder; text teachers alone")
    add(g, "w_reward", 2000.0, "weight of the reward term")
    add(g, "rewards", SEED, "which, and how they are mixed", type=mix, metavar="NAME=W,NAME=W")
    add(g, "reward_start", 0, "steps before the reward term joins the student's loss")
    add(g, "reward_chunk", 1, "images decoded and judged at a time")
    add(g, "clip_reward", 0.0, "largest norm of one image's reward gradient at its logits, before --w_reward; 0: no limit")
    for name in REWARDS:
        add(g, f"{name}_weights", None, "local file instead of the published one", type=str)
    add(g, "bert_vocab", None, "local file instead of the published one, for imagereward", type=str)
    add(g, "clip_cosine", False, "CLIP's reward is the bare cosine, not 100 times it")
    g = ap.add_argument_group("optimizer")
    add(g, "optimizer", "adam", "adam, adamw, or muon for matrices", choices=["adam", "adamw", "muon"])
    add(g, "lr", 1e-6, "of the student")
    add(g, "aux_lr", None, "of the auxiliary; the student's if not given", type=float)
    add(g, "disc_lr", None, "of the discriminator; the student's if not given", type=float)
    add(g, "warmup", 100, "steps of linear warm-up")
    add(g, "lr_end", 1.0, "last learning rate as a share of the first, by a cosine; 1 is constant")
    add(g, "weight_decay", 0.0, "")
    add(g, "clip", 1.0, "largest gradient norm, for each of the three networks")
    add(g, "ema", 0.9999, "decay of the student's average, reached by the ramp (1 + n) / (10 + n)")
    add(g, "dropout", 0.0, "in student and auxiliary")
    g = ap.add_argument_group("system")
    add(g, "device", "cuda" if torch.cuda.is_available() else "cpu", "where it runs", choices=["cuda", "cpu"])
    add(g, "dtype", "bf16" if torch.cuda.is_available() else "fp32", "autocast; weights stay float32", choices=["bf16", "fp32"])
    add(g, "compile", torch.cuda.is_available(), "torch.compile the networks in place: minutes at the start, faster steps")
    add(g, "zero", False, "shard the optimizers' state over the processes (ZeRO stage 1): memory for traffic")
    add(g, "profile", 0, "time N steps on random weights and tokens, print where the time goes, write nothing", metavar="N")
    add(g, "checkpointing", False, "recompute activations in the backward pass: memory for time")
    return ap, defaults


def settle(given, defaults):
    """All settings: defaults, then the teacher's column of Tab. 5, then the flags; checked before any work is done."""
    if given.get("teacher", "maskbit-tiny") not in SPECS:
        raise UserError(f"unknown --teacher {given['teacher']!r}: expected one of {', '.join(SPECS)}")
    name = given.get("recipe") or given.get("teacher", defaults["teacher"])
    if name not in RECIPES:
        raise UserError(f"unknown --recipe {name!r}: expected one of {', '.join(RECIPES)}")
    own = SPECS[RECIPES[name]["teacher"]].student
    c = argparse.Namespace(**{**defaults, **own, **RECIPES[name], **given, "recipe": name})
    if c.teacher != RECIPES[name]["teacher"]:
        raise UserError(f"--recipe {name} is for --teacher {RECIPES[name]['teacher']}, not {c.teacher}")
    c.aux_lr, c.disc_lr = c.aux_lr or c.lr, c.disc_lr or c.lr
    if c.profile:                                     # one step to count in, three to warm up, one to trace
        vars(c).update(resume=False, random_weights=True, data=None, init_from="teacher", steps=c.profile + 5, eval_every=0,
                       log_every=10**9, save_every=10**9, student_start=0, gan_start=0, reward_start=0)
    for key, value in vars(c).items():
        if any(isinstance(v, float) and not math.isfinite(v) for v in (value if isinstance(value, list) else [value])):
            raise UserError(f"--{key} {value}: expected a finite number")
    positive = ("steps", "batch", "accum", "log_every", "save_every", "heads", "head_width", "head_mlp", "lr", "tau", "clip",
                "reward_chunk")
    for key in positive:
        if not getattr(c, key) > 0:
            raise UserError(f"--{key} {getattr(c, key)}: expected a number above 0")
    for key in ("w_dimo", "w_gan", "noise", "init_ratio", "smoothing", "ema", "dropout", "soft_target", "feature_noise",
                "w_reward", "clip_reward", "reward_start", "gan_start", "student_start", "warmup", "eval_every",
                "n_eval", "weight_decay", "lr_end", "temperature", "profile"):
        if not getattr(c, key) >= 0:
            raise UserError(f"--{key} {getattr(c, key)}: expected 0 or more")
    for key in ("noise", "init_ratio", "smoothing", "ema", "dropout", "soft_target", "lr_end"):
        if getattr(c, key) > 1:
            raise UserError(f"--{key} {getattr(c, key)}: expected at most 1")
    for key in ("gan_ratio", "ratio_range"):
        if not 0 <= getattr(c, key)[0] <= getattr(c, key)[1] <= 1:
            raise UserError(f"--{key} {getattr(c, key)}: expected 0 <= A <= B <= 1")
    if c.w_dimo == 0 and not (c.gan and c.w_gan) and not (c.reward and c.w_reward):
        raise UserError("nothing to train: --w_dimo 0, and neither GAN nor reward; add --gan with --w_gan above 0, or --reward")
    if c.reward and SPECS[c.teacher].text is None:
        raise UserError(f"--reward judges pictures by their prompts, and {c.teacher} draws classes: take a text teacher")
    if c.gan and not (c.data or c.profile):
        raise UserError("--gan compares with real images and found none: add --data FOLDER, written by data/imagenet.py "
                        "or worlds/fashion.py, or leave out --gan")
    if SPECS[c.teacher].text and not (c.prompts or c.gan or c.profile):
        raise UserError(f"{c.teacher} draws what it is told: add --prompts FILE, one prompt a line (the paper's are "
                        "captions of LAION-Aesthetics; to try it, assets/prompts.txt)")
    if c.zero and c.optimizer == "muon":
        raise UserError("--zero shards the state of adam and adamw: leave it out, or take another --optimizer than muon")
    check_device(c.device)
    if os.path.exists(os.path.join(c.out, "ckpt.pt")) and not (c.resume or c.overwrite or c.profile):
        raise UserError(f"--out {c.out} already holds a run: go on with --resume, start anew with --overwrite, or name "
                        "another folder")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if c.batch % (world * c.accum):
        raise UserError(f"--batch {c.batch} does not divide by {world} processes x {c.accum} accumulation steps")
    return c


# ============================================================================================ small pieces
def draw_step(c, step, first, count, net, conditions):
    """Every random choice of one step, for images first .. first + count of its global batch, as a namespace.

    All of the global batch is drawn, from a generator seeded by (seed, step) alone, and a slice returned: so the
    choices depend neither on the number of processes nor on restarts. (Dropout, Gumbel and feature noise are drawn
    by each process for itself, seeded by (seed, step, rank).)
    """
    device = conditions.device
    gen = torch.Generator(device).manual_seed((c.seed + 1) * 1_000_003 + step)
    host = gen if device.type == "cpu" else torch.Generator().manual_seed((c.seed + 1) * 1_000_003 + step)
    part = slice(first, first + count)
    rand = lambda *shape: torch.rand(c.batch, *shape, generator=gen, device=device)
    unit = (net.L, net.G)
    which = lambda: torch.randint(len(conditions), (c.batch,), generator=host)[part]         # on the host: it looks up prompts

    def start():       # conditions, random tokens, which of them are masked, embedding noise, the uniforms that draw x_theta
        return dict(which=which(),
                    tokens=torch.randint(net.V, (c.batch, *unit), generator=gen, device=device)[part],
                    scores=rand(*unit)[part], u=rand(*unit)[part],
                    noise=torch.randn(c.batch, net.L, net.width, generator=gen, device=device)[part])

    ratio = lambda: mask_ratio(rand(), c.schedule).clamp(*c.ratio_range)
    r = argparse.Namespace(**start(), ratio=ratio()[part], scores_t=rand(*unit)[part])
    ratio_aux = ratio()
    r.ratio_aux, r.scores_aux = ratio_aux[part], rand(*unit)[part]
    r.aux_units = (ratio_aux * net.L * net.G).round().clamp(min=1).sum()    # masked units of the global batch
    lo, hi = c.gan_ratio
    r.ratio_gan, r.scores_gan = (lo + (hi - lo) * rand())[part], rand(*unit)[part]
    r.ratio_disc, r.scores_disc = (lo + (hi - lo) * rand())[part], rand(*unit)[part]
    r.again = argparse.Namespace(**start()) if c.redraw else None
    return r


def count(module):
    return sum(p.numel() for p in module.parameters())


# ================================================================================================= profile


# ============================================================================================== evaluation
def student_row(c, teacher, net, model, judge, say):
    """One row of results for a one-step generator, on all processes together; None without a judge."""
    if judge is None or not c.n_eval:
        return None
    row = judge(one_step(c, teacher, net), c.n_eval, desc=model if say is print else None)
    say(f"{model}: {headline(row)}")
    return dict(model=model, kind="student", steps=1, temperature=c.temperature, **row)


def show(c, make, teacher, conditions):
    """The pictures of a strip, from starts that are the same at every look."""
    with autocast(c.device, c.dtype == "bf16"):
        return fixed_sample(make, conditions, n=20 if teacher.spec.image[1] < 100 else 4)


def one_step(c, teacher, net):
    return functools.partial(generate_student, teacher, net, init_ratio=c.init_ratio, noise=c.noise,
                             temperature=c.temperature)


def finish(c, teacher, start, student, rows, conditions, prompts, judge, say):
    """The end of a run: weights in float16 for others to load, a picture, and a table against the teacher's steps.

    start is the strip of pictures with which the run began. The teacher's quality is read from the record that ships
    with it (minutes to make: evaluate.py --steps ...); its speed is measured here, on 500 images in batches like the
    student's: the ratio depends on the machine. Where no record ships, the teacher is judged here as well.
    """
    from safetensors.torch import save

    first = say is print
    if first:
        path = os.path.join(c.out, "student.safetensors")
        with replacing(path) as f:
            f.write(save({k: v.half().cpu().contiguous() for k, v in student.state_dict().items()}))
        say(f"wrote {path}")
    if not c.eval_every:
        return
    steps = next(iter(teacher.spec.sampling))
    many = functools.partial(generate_teacher, teacher, steps=steps)
    if first:
        sheet([(f"teacher, {steps} guided steps", show(c, many, teacher, conditions)),
                  ("start of this run, 1 step", start),
                  ("student, 1 step", show(c, one_step(c, teacher, student), teacher, conditions))],
                 os.path.join(c.out, "picture.png"), words=prompts and spread(prompts, len(start)))
        say(f"wrote {c.out}/picture.png")
    if not rows:
        return
    with autocast(c.device, c.dtype == "bf16"):
        timed = judge(many, 500 if teacher.spec.record else c.n_eval, desc="the teacher" if first else None)
    if teacher.spec.record:
        with open(local(teacher.spec.record)) as f:
            shipped = [dict(json.loads(line), model="teacher, shipped record") for line in f]
        for row in shipped:
            row.update({k: timed[k] if row["steps"] == steps else None for k in ("images/s", "tokens_only/s")})
    else:
        shipped = [dict(timed, model="teacher", kind="teacher", steps=steps, **teacher.spec.settings(steps))]
    rows = [row for row in shipped if row["n"] == c.n_eval] + rows
    if first:
        with open(os.path.join(c.out, "results.jsonl"), "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        text = table(rows)
        with open(os.path.join(c.out, "table.md"), "w") as f:
            f.write(text + "\n")
        say("\n" + text)


# ================================================================================================ training
def train(c):
    # ------------------------------------------------------------------------------- processes and device
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = join_processes(c.device)
    torch.set_float32_matmul_precision("high")        # TF32 where a GPU has it, for what stays in float32
    say = print if rank == 0 else lambda *a, **k: None
    micro = c.batch // (world * c.accum)              # images a forward pass

    # -------------------------------------------------------------------------- the networks (Alg. 1, l. 1)
    teacher = load_teacher(c.teacher, c.teacher_weights, c.tokenizer_weights, c.random_weights, device, c.text_weights,
                           c.text_activation)
    net, spec = teacher.net, teacher.spec
    E, bias = net.tables()                            # frozen, so one table serves teacher, student and auxiliary
    unit = teacher.noise_scale()
    student = copy.deepcopy(net)
    if c.init_from and c.init_from != "teacher":
        state = read_weights(local(c.init_from))
        load_state(student, state.get("ema", state), c.init_from)                             # a checkpoint will do
    aux, ema = copy.deepcopy(net), copy.deepcopy(student)
    for m in (student, aux):
        m.requires_grad_(True).set_dropout(c.dropout).train()
        for p in m.frozen():
            p.requires_grad_(False)
    if c.dtype == "bf16":
        net.halve()                                   # frozen: half the memory, no cast in every pass, the same results
    for m in (net, student, aux, teacher.tokenizer):
        m.set_checkpointing(c.checkpointing)
    nets = {"student": student, "aux": aux}
    if c.gan:
        real_data = RealTokens(c.data, teacher, c.seed)
        torch.manual_seed(c.seed)                     # the heads' initial weights, the same on every process
        layers = head_layers(net.depth, c.heads)
        disc = nets["disc"] = Discriminator(net.width, layers, c.head_width, c.head_mlp, net.feature_grid).to(device)
    prompts = (None if spec.text is None else real_data.prompts if c.gan else
               synthetic_prompts() if c.profile else read_prompts(c.prompts))
    conditions = teacher.conditions(prompts)
    features = TextFeatures(teacher, conditions, c.text_cache)
    if features.why:
        say(features.why)
    if c.reward:
        rewards = rewards_for(spec, c.rewards, {name: getattr(c, f"{name}_weights") for name in c.rewards}, c.random_weights,
                              device=device, dtype=torch.bfloat16 if c.dtype == "bf16" else None, vocab=c.bert_vocab,
                              clip_scaled=not c.clip_cosine, checkpointing=c.checkpointing)
        if not c.w_dimo:
            say("warning: a reward without Di[M]O over-saturates (App. I.10); --w_dimo above 0 anchors it")

    params = {k: [p for p in m.parameters() if p.requires_grad] for k, m in nets.items()}
    rates = {"student": c.lr, "aux": c.aux_lr, "disc": c.disc_lr}
    betas = {"student": (0.9, 0.999), "aux": (0.9, 0.999), "disc": (0.0, 0.999)}
    Opt = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}[c.optimizer]
    if c.zero and world > 1:
        Opt = functools.partial(ZeroRedundancyOptimizer, optimizer_class=Opt)
    opts = {k: Opt(params[k], lr=rates[k], betas=betas[k], eps=1e-6, weight_decay=c.weight_decay, fused=True) for k in nets}

    start = show(c, one_step(c, teacher, student.eval()), teacher, conditions) if rank == 0 and c.eval_every else None
    student.train()

    # ------------------------------------------------------------------------------------ files and resuming
    ckpt_path, log_path = os.path.join(c.out, "ckpt.pt"), os.path.join(c.out, "log.jsonl")
    first_step, skipped = 0, torch.zeros((), device=device)       # counted on the device: the host does not wait
    if c.resume:
        state = read_weights(ckpt_path)
        for k, m in (*nets.items(), ("ema", ema)):
            load_state(m, state[k], f"{ckpt_path} ({k})")
        for k, opt in opts.items():
            opt.load_state_dict(state["optimizers"][k])
        first_step = state["step"]
        skipped += state["skipped"]
        del state
    if rank == 0 and not c.profile:
        os.makedirs(c.out, exist_ok=True)
        if not c.resume and os.path.exists(ckpt_path):
            os.remove(ckpt_path)                      # --overwrite: a restart must not go on with the older run
        trim_log(log_path, first_step if c.resume else -1)
    barrier()                                # the log is whole before any process reads it
    say(f"{spec.name}: {count(net):,} parameters, " + (f"discriminator {count(disc):,}, {len(real_data.labels):,} real "
        "images" if c.gan else "no GAN") + f"; {world} process(es), {device}, {c.dtype}; step {first_step} of {c.steps}")
    if not c.profile:
        say("settings " + json.dumps({k: v for k, v in vars(c).items() if k not in ("resume", "overwrite", "out")}))

    def checkpoint(step):
        for opt in opts.values() if c.zero and world > 1 else ():
            opt.consolidate_state_dict()              # every process sends its share to the first
        if rank == 0:
            save_checkpoint(ckpt_path, dict(
                format=FORMAT, launch=os.environ.get("TORCHELASTIC_RUN_ID"), step=step, skipped=int(skipped), config=vars(c),
                ema=ema.state_dict(), optimizers={k: opt.state_dict() for k, opt in opts.items()},
                **{k: m.state_dict() for k, m in nets.items()}))

    def log(row):
        if rank == 0:
            with open(log_path, "a") as f:
                f.write(json.dumps(row) + "\n")

    # ------------------------------------------------------------------------------------------ evaluation
    judge = load_judge(teacher, device)
    if judge is None:
        say(f"{spec.name}: samples are drawn, not judged, while it trains; for FID see evaluate.py --reference")
    rows = logged(log_path)                           # of the part before a resume

    def look(model, net, step):
        """FID, a line in the log, and a strip of samples from starts that are the same at every look."""
        if row := student_row(c, teacher, net, model, judge, say):
            rows.append(row)
            log(dict(step=step, **row))
        if rank == 0:
            img = show(c, one_step(c, teacher, net), teacher, conditions)
            sheet([(model, img)], os.path.join(c.out, f"samples_{step:06d}.png"),
                     words=prompts and spread(prompts, len(img)))

    # --------------------------------------------------------------------------------- compile, then wrap
    if c.compile:                                     # in place: state-dict keys stay as they are
        for m in (net, *nets.values()):
            m.compile(dynamic=False)                  # a graph for each of its two or three shapes, no general one
    # Where gradients must be averaged, call the DDP wrapper; calling the bare module silently trains each rank alone.
    wrap = lambda m: DDP(m, [device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    wrapped = {k: wrap(m) if world > 1 else m for k, m in nets.items()}
    # Under accumulation gradients travel once a step, with the last micro-batch.
    hold = lambda m, a: contextlib.nullcontext() if world == 1 or a == c.accum - 1 else m.no_sync()

    # --------------------------------------------------------------------------------- the loop (Alg. 1)
    bar = tqdm(range(first_step, c.steps), initial=first_step, total=c.steps, unit="step", disable=rank > 0,
               dynamic_ncols=True)
    if c.eval_every and first_step == 0:
        look("start of this run", ema, 0)
    bad, tick, ticked = torch.zeros((), device=device), time.time(), first_step
    profile = Profile(device) if c.profile else None
    mark = profile.mark if profile else lambda phase: None
    for step in bar:
        if profile:
            profile.begin(step, c.steps)
        logging = not profile and ((step + 1) % c.log_every == 0 or step + 1 == c.steps)
        factor = lr_factor(step, c.warmup, c.steps, c.lr_end)
        torch.manual_seed((c.seed + 1) * 7_919 + step * world + rank)
        gan_on = c.gan and c.w_gan > 0 and step >= c.gan_start
        reward_on = c.reward and c.w_reward > 0 and step >= c.reward_start
        learning = step >= c.student_start and (c.w_dimo > 0 or gan_on or reward_on)
        firsts = [(a * world + rank) * micro for a in range(c.accum)]
        batches = [draw_step(c, step, first, micro, net, conditions) for first in firsts]
        mark("random choices")

        # --- Generate logits z_theta and tokens x_theta, update the generator (l. 3-18)
        for a, (r, first) in enumerate(zip(batches, firsts)):
            if c.gan:      # choice: real images bring the labels, so that real and fake share them (App. H.3)
                r.x_real, r.which = real_data.batch(step * c.batch + first, micro)
            r.cond = cond = features(r.which)
            x_init = initial_tokens(r.tokens, c.init_ratio, r.scores, net.V)                  # l. 4
            with autocast(c.device, c.dtype == "bf16"), hold(wrapped["student"], a), torch.set_grad_enabled(learning):
                model = wrapped["student"] if learning else student
                z = student_logits(model, x_init, cond, E, bias, c.noise, r.noise * unit)     # l. 5: (B, L, G, V)
            r.z, r.x = z.detach(), sample_tokens(z.detach(), u=r.u)                           # l. 6
            mark("student forward")
            terms = {}
            if learning and c.w_dimo:
                mask = exact_mask(r.ratio, r.scores_t)                                        # l. 8
                e_t = (soft_embed(r.z, E, bias, mask) if c.soft_state                         # App. I.15
                       else embed_tokens(r.x.masked_fill(mask, net.V), E, bias))
                w = c.cfg if c.cfg_schedule == "constant" else guidance_scale(r.ratio, c.cfg, c.cfg_low, c.cfg_schedule)
                weight = 1.0 if c.w_t == "one" else 1 / r.ratio
                with autocast(c.device, c.dtype == "bf16"):
                    g = dimo_grad(net, aux, e_t, cond, mask, w, c.beta, weight)               # l. 9-11
                terms["dimo"] = c.w_dimo / (micro * c.accum) * g      # DDP's average makes this a sum / global batch
                mark("Di[M]O: teacher, aux")
            if learning and gan_on:
                mask = exact_mask(r.ratio_gan, r.scores_gan, least=0)
                with autocast(c.device, c.dtype == "bf16"):
                    g, _ = gan_grad(r.z, disc, net, cond, mask, E, bias, c.estimator, c.tau, c.feature_noise)
                terms["gan"] = c.w_gan / c.accum * g                                          # l. 14
                mark("GAN gradient")
            if learning and reward_on:
                asked = [prompts[i] for i in r.which.tolist()]
                g, scores = reward_grad(r.z, teacher.tokenizer, cond, rewards, asked, c.rewards,
                                        chunk=c.reward_chunk, clip=c.clip_reward)
                terms["reward"] = c.w_reward / c.accum * g                                    # l. 16
                mark("reward gradient")
            if learning:
                with hold(wrapped["student"], a):
                    z.backward(sum(terms.values()))                                           # Eq. (10), l. 18
                mark("student backward")
        norms, broken = {}, []
        if learning:
            norms["student"], inf = update(opts["student"], params["student"], c.clip, rates["student"] * factor)
            broken.append(inf)
            ema_update(ema, student, step - c.student_start, c.ema)
            mark("student update, EMA")

        # --- Update the auxiliary, an MDM of the student's tokens (l. 19-21)
        for a, r in enumerate(batches):
            if c.redraw:   # choice: off, x_theta is used again (l. 20); the official code draws all anew, from the new theta
                r.cond = r.cond if c.gan else features(r.again.which)
                x_init = initial_tokens(r.again.tokens, c.init_ratio, r.again.scores, net.V)
                with torch.no_grad(), autocast(c.device, c.dtype == "bf16"):
                    z = student_logits(student, x_init, r.cond, E, bias, c.noise, r.again.noise * unit)
                x = sample_tokens(z, u=r.again.u)
            else:
                z, x = r.z, r.x
            mask = exact_mask(r.ratio_aux, r.scores_aux)                                      # l. 20
            with autocast(c.device, c.dtype == "bf16"), hold(wrapped["aux"], a):
                z_aux = wrapped["aux"](embed_tokens(x.masked_fill(mask, net.V), E, bias), r.cond)
                loss_aux = aux_loss(z_aux, x, mask, c.smoothing, r.aux_units / world, z, c.soft_target)
                loss_aux.backward()                                                           # Eq. (1), l. 21
            mark("aux forward, backward")
        norms["aux"], inf = update(opts["aux"], params["aux"], c.clip, rates["aux"] * factor)
        broken.append(inf)
        mark("aux update")

        # --- Update the discriminator (l. 22-25)
        if c.gan:
            for a, r in enumerate(batches):
                mask = exact_mask(r.ratio_disc, r.scores_disc, least=0)                       # l. 23: one for both
                with autocast(c.device, c.dtype == "bf16"), hold(wrapped["disc"], a):
                    d_real, d_fake = disc_logits(r.z, r.x_real, wrapped["disc"], net, r.cond, mask, E, bias,
                                                 c.estimator, c.tau, c.feature_noise)
                    loss_disc = disc_loss(d_real, d_fake)                                     # Eq. (7), l. 25
                    (loss_disc / c.accum).backward()
            norms["disc"], inf = update(opts["disc"], params["disc"], c.clip, rates["disc"] * factor)
            broken.append(inf)
            mark("discriminator")

        # --- Not finite: skipped above, on every process alike; give up after ten steps in a row, at the next log line
        inf = torch.stack(broken).amax()
        bad, skipped = (bad + 1) * inf, skipped + inf
        if logging and bad >= 10:
            raise UserError(f"gradients were not finite in 10 steps in a row, up to step {step} (norms: "
                            + ", ".join(f"{k} {float(v):.3g}" for k, v in norms.items()) + "). The checkpoint of step "
                            f"{step // c.save_every * c.save_every} is good: lower --lr, or try --dtype fp32, and --resume")

        # --- Log: what tells health, and not only loss
        if logging:
            entropy, top1 = concentration(r.z)
            row = dict(step=step + 1, entropy=entropy, top1=top1, loss_aux=loss_aux.detach() * c.accum, skipped=skipped,
                       **{f"grad_{k}": g.norm() for k, g in terms.items()},       # of each term at the logits
                       **{f"norm_{k}": v for k, v in norms.items()})              # of all parameters, before clipping
            if c.gan:
                row.update(loss_disc=loss_disc.detach(), d_real=d_real.detach().mean(), d_fake=d_fake.detach().mean())
            if "reward" in terms:
                row.update(scores)                                # of the soft images
            row = {k: round(float(v), 6) for k, v in row.items()}
            row.update(lr=rates["student"] * factor, img_s=round(c.batch * (step + 1 - ticked) / (time.time() - tick), 1))
            tick, ticked = time.time(), step + 1
            log(row)
            text = " ".join(f"{k} {v:.3g}" for k, v in row.items() if k not in ("step", "lr", "skipped"))
            if rank == 0:
                bar.write(f"step {step + 1:5d} | {text}")
        last_step = step + 1 == c.steps
        if c.eval_every and ((step + 1) % c.eval_every == 0 or last_step):
            look(f"student, step {step + 1}", ema, step + 1)
        if profile:
            profile.end()
        elif (step + 1) % c.save_every == 0 or last_step:
            checkpoint(step + 1)

    if profile:
        with torch.no_grad():
            e = embed_tokens(batches[-1].x, E, bias)
        return profile.report(c, net, e, batches[-1].cond) if rank == 0 else None
    finish(c, teacher, start, ema, rows, conditions, prompts, judge, say)


def main():
    ap, defaults = flags()
    given = vars(ap.parse_args())
    out = given.get("out", defaults["out"])
    if restarted(os.path.join(out, "ckpt.pt")):
        given = dict(given, resume=True, overwrite=False)
    if given.get("resume"):
        path = os.path.join(out, "ckpt.pt")
        state = read_weights(path)
        if "config" not in state:
            raise UserError(f"{path} holds weights, not a checkpoint of train.py: start from them by --init_from")
        if state.get("format") != FORMAT:
            raise UserError(f"{path} was written by another version of train.py (format {state.get('format')}, here "
                            f"{FORMAT}): finish it with that version, or start from its weights by --init_from {path}")
        config = {**state["config"], "out": out}             # a checkpoint says what to read, not where to write
        if config["text_cache"] != "off":
            config["text_cache"] = "memory"
        for key in ("teacher", "recipe", "seed", "batch", "heads", "head_width", "head_mlp", "gan", "optimizer"):
            if key in given and given[key] != config[key]:
                raise UserError(f"{path} is a run with --{key} {config[key]}, and now --{key} is {given[key]}: "
                                "leave the flag out, or start another run in another --out")
        given = {**config, **given}
    c = settle(given, defaults)
    train(c)


if __name__ == "__main__":
    guard(main, out_of_memory="take --accum 2 or more, --checkpointing, or a smaller --batch",
          cannot_write="the last checkpoint, if there is one, is whole: go on with --resume",
          peer_lost="go on from the last checkpoint with --resume, or let torchrun do so with --max-restarts")
