"""All settings of train.py: what each is, its default and its range; and what cannot be set
together.
"""

import argparse
import os

import torch

from dimo import SCHEDULES
from machinery.errors import UserError
from machinery.flags import (Flags, check_device, default_device, nonnegative, nonnegative_int,
                             number, positive, positive_int, share)
from recipes import paper, tiny
from reward import REWARDS, SEED, mix
from soft_embed import ESTIMATORS
from teachers import SPECS

RECIPES = {**paper.RECIPES, **tiny.RECIPES}
LOCAL_FILE = "local file instead of the published one"


def flags(description=None):
    """The command line of train.py: Flags, with a parser and the defaults."""
    f = Flags(description)
    add = f.add

    f.group("run")
    add("teacher", "maskbit-tiny", list(SPECS), "the model to distill", metavar="NAME")
    add("recipe", None, list(RECIPES),
        "settings of a whole run; None: those of the teacher's name", metavar="NAME")
    add("out", "out/run", str, "folder for checkpoints, log.jsonl, pictures and the final table")
    add("resume", False, bool, "go on from the checkpoint in --out; its settings hold")
    add("overwrite", False, bool, "start anew where --out already holds a run")
    add("steps", 50_000, positive_int, "updates of the student, in all")
    add("batch", 256, positive_int, "images per step, over all processes and accumulation steps")
    add("accum", 1, positive_int, "gradient accumulation steps: less memory, more time")
    add("seed", 0, number(0, 2**32, int), "seed of everything random")
    add("init_from", "teacher", str,
        "the one-step generator theta_0 to start from (Alg. 1): weights, a checkpoint, or the"
        " word teacher")
    add("log_every", 50, positive_int,
        "steps between log lines; the host waits for the device only then")
    add("save_every", 1000, positive_int, "steps between checkpoints")
    add("eval_every", 2000, nonnegative_int,
        "steps between evaluations with samples; 0: none, nor at the end")
    add("n_eval", 5000, nonnegative_int, "images per evaluation; 0: samples alone")
    add("eval_reference", None, str,
        "evaluate by Inception against this .npz of evaluate.py --save_reference; adm: ImageNet's",
        metavar="PATH")
    add("eval_metadata", None, str,
        "evaluate by GenEval's tasks (Mask2Former) and CLIP score: its evaluation_metadata.jsonl",
        metavar="PATH")
    add("keep", 0, nonnegative_int,
        "weights of so many evaluations stay in --out, student_STEP.safetensors, besides the best")

    f.group("teacher")
    add("teacher_weights", None, str, LOCAL_FILE)
    add("tokenizer_weights", None, str, LOCAL_FILE)
    add("text_weights", None, str, f"{LOCAL_FILE}, for the text encoder")
    add("text_activation", None, ["gelu", "quick_gelu"],
        "activation of the text encoder, where its files leave it open")
    add("random_weights", False, bool, "no files at all: to try memory and speed")
    add("prompts", None, str,
        "prompts for text teachers: a text file, one per line. With --gan those of the data serve; "
        "if given as well, Di[M]O and rewards take these, for a second pass of the student")
    add("text_cache", "memory", str,
        "where the features of prompts are kept: memory, off, or a folder, for later runs too",
        metavar="WHERE")
    add("cfg", 1.5, number(), "guidance w of the teacher, in u + w (c - u)")
    add("cfg_low", 1.0, number(),
        "what guidance falls to as the mask ratio falls, with --cfg_schedule linear or cosine")
    add("cfg_schedule", "constant", ["constant", "linear", "cosine"],
        "guidance over the mask ratio (App. I.9)")

    f.group("Di[M]O (Eq. 2)")
    add("w_dimo", 1.0, nonnegative, "weight of the Di[M]O term")
    add("beta", 0.0, number(),
        "divergence: 0 forward KL, 1 reverse KL, others generalized Jeffreys")
    add("init_ratio", 0.6, share, "share of masked units in x_init")
    add("noise", 0.1, share, "scale s of the noise on the start's embedding")
    add("schedule", "arccos", list(SCHEDULES), "mask schedule of student and auxiliary")
    add("ratio_range", [0.0, 1.0], share,
        "bounds of the mask ratio that the schedule gives", nargs=2, metavar=("A", "B"))
    add("w_t", "one", ["one", "inverse"], "w(t) of Eq. 2: one, or 1 / mask ratio")
    add("soft_state", False, bool, "soft embeddings in the forward state x_t (App. I.15)")
    add("smoothing", 0.1, share, "label smoothing in the auxiliary's loss")
    add("soft_target", 0.0, share, "share of the soft target in the auxiliary's loss")
    add("redraw", False, bool,
        "the auxiliary gets fresh tokens from the updated student (the official code), and "
        "not x_theta (Alg. 1)")
    add("share_passes", False, bool,
        "one mask for Eq. 2 and Eq. 1, and one for Eq. 8 and Eq. 7, so that two passes in eleven "
        "are saved; Alg. 1 draws each anew")
    add("student_start", 0, nonnegative_int,
        "updates of auxiliary and discriminator before the student's first")
    add("temperature", 1.0, nonnegative,
        "temperature of the student in evaluations; training always draws at 1")

    f.group("GAN (Eq. 7-8)")
    add("gan", False, bool, "refine by the masked-embedding GAN on real tokens")
    add("data", None, str,
        "real tokens: a folder written by a script of data/ or worlds/, or a packed .npz")
    add("w_gan", 25.0, nonnegative, "weight of the GAN term")
    add("gan_start", 1000, nonnegative_int,
        "steps before the GAN term joins the student's loss (Fig. 9)")
    add("gan_ratio", [0.0, 0.95], share,
        "masking of the discriminator's input, r ~ U[a, b]", nargs=2, metavar=("A", "B"))
    add("estimator", "soft", list(ESTIMATORS),
        "gradient through the tokens, for the GAN (Fig. 4a) and rewards (Fig. 11)")
    add("tau", 1.0, positive, "softmax temperature of the soft embedding (Fig. 8), for both")
    add("heads", 4, positive_int, "layers of the teacher that the discriminator reads")
    add("head_width", 1024, positive_int, "channels of each head")
    add("head_mlp", 2048, positive_int, "hidden width of the discriminator's last MLP")
    add("feature_noise", 0.0, nonnegative,
        "standard deviation of the noise on the teacher's features (App. H.3)")

    f.group("reward (Eq. 9)")
    add("reward", False, bool,
        "refine by differentiable rewards, through the tokenizer's decoder; text teachers only")
    add("w_reward", 2000.0, nonnegative, "weight of the reward term")
    add("rewards", SEED, mix, "which rewards, and how they are mixed", metavar="NAME=W,NAME=W")
    add("reward_start", 0, nonnegative_int,
        "steps before the reward term joins the student's loss")
    add("reward_chunk", 1, positive_int, "images that are decoded and scored together")
    add("clip_reward", 0.0, nonnegative,
        "largest norm of one image's reward gradient at its logits, before --w_reward; 0: no "
        "limit")
    for name in REWARDS:
        add(f"{name}_weights", None, str, LOCAL_FILE)
    add("bert_vocab", None, str, f"{LOCAL_FILE}: the vocabulary of imagereward")
    add("clip_cosine", False, bool, "CLIP's reward is the bare cosine, not 100 times it")

    f.group("optimizer")
    add("optimizer", "adam", ["adam", "adamw", "muon"], "adam, adamw, or muon for matrices")
    add("lr", 1e-6, positive, "learning rate of the student")
    add("aux_lr", None, nonnegative, "learning rate of the auxiliary; None: the student's")
    add("disc_lr", None, nonnegative, "learning rate of the discriminator; None: the student's")
    add("warmup", 100, nonnegative_int, "steps of linear warm-up")
    add("lr_end", 1.0, share,
        "last learning rate as a share of the first, reached by a cosine; 1 is constant")
    add("weight_decay", 0.0, nonnegative, "weight decay of all three networks")
    add("clip", 1.0, positive, "largest gradient norm, for each of the three networks")
    add("ema", 0.9999, share,
        "decay of the student's average, reached by the ramp (1 + n) / (10 + n)")
    add("dropout", 0.0, share, "dropout in student and auxiliary")

    f.group("system")
    gpu = torch.cuda.is_available()
    add("device", default_device(), ["cuda", "cpu"], "where it runs")
    add("dtype", "bf16" if gpu else "fp32", ["bf16", "fp32"],
        "precision of autocast; weights stay float32")
    add("compile", gpu, bool,
        "torch.compile the networks in place: minutes at the start, then faster steps")
    add("zero", False, bool,
        "shard the optimizers' state over the processes (ZeRO stage 1): memory for traffic")
    add("profile", 0, nonnegative_int,
        "time N steps on random weights and tokens, print where the time goes, write nothing",
        metavar="N")
    add("selftest", False, bool,
        "instead of a run: does everything agree on this machine, and how fast is it? Heard with "
        "it: --out, --device, --compile")
    add("checkpointing", False, bool,
        "recompute activations in the backward pass: less memory, more time")
    return f


def settle(given):
    """All settings: the defaults, the teacher's own, the recipe's, then what was given; checked
    before any work.
    """
    defaults = flags().defaults
    name = given.get("recipe") or given.get("teacher", defaults["teacher"])
    if name not in RECIPES:
        raise UserError(f"the teacher {name} has no recipe of its own: name one by --recipe, out "
                        f"of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    start = SPECS[recipe["teacher"]].student          # how its student starts and draws
    c = argparse.Namespace(**(defaults | start | recipe | given | dict(recipe=name)))
    if c.teacher != recipe["teacher"]:
        raise UserError(f"--recipe {name} is for --teacher {recipe['teacher']}, not {c.teacher}")
    for key in ("aux_lr", "disc_lr"):
        if getattr(c, key) is None:
            setattr(c, key, c.lr)
    if c.profile:
        # one step to count in, three to warm up, N to time, one to trace; nothing read or written
        c.steps = c.profile + 5
        c.random_weights, c.init_from, c.data = True, "teacher", None
        c.resume = False
        c.student_start = c.gan_start = c.reward_start = c.eval_every = 0
    check(c)
    return c


def check(c):
    """Refuse settings that cannot go together, each with a sentence."""
    text = SPECS[c.teacher].text is not None
    for key in ("gan_ratio", "ratio_range"):
        low, high = getattr(c, key)
        if low > high:
            raise UserError(f"--{key} {low} {high}: expected 0 <= A <= B <= 1")
    if not (c.w_dimo or c.gan and c.w_gan or c.reward and c.w_reward):
        raise UserError("nothing to train: --w_dimo 0, and neither GAN nor reward; add --gan "
                        "with --w_gan above 0, or --reward")
    if c.share_passes and (c.redraw or c.soft_state):
        other = "redraw" if c.redraw else "soft_state"
        raise UserError(f"--share_passes lets Eq. 1 take the pass of Eq. 2, and with --{other} the "
                        "two read different inputs: leave one of the flags out")
    if c.reward and not text:
        raise UserError(f"--reward judges pictures by their prompts, and {c.teacher} draws "
                        "classes: take a text teacher")
    if c.gan and not (c.data or c.profile):
        raise UserError("--gan compares with real images and found none: add --data FOLDER, "
                        "written by data/imagenet.py or worlds/fashion.py, or leave out --gan")
    if text and not (c.prompts or c.gan or c.profile):
        raise UserError(f"{c.teacher} draws what it is told: add --prompts FILE, one prompt per "
                        "line (the paper's are captions of LAION-Aesthetics; to try it, "
                        "assets/prompts.txt)")
    if c.zero and c.optimizer == "muon":
        raise UserError("--zero shards the state of adam and adamw: leave it out, or take "
                        "another --optimizer than muon")
    check_device(c.device)
    occupied = os.path.exists(f"{c.out}/ckpt.pt")
    if occupied and not (c.resume or c.overwrite or c.profile):
        raise UserError(f"--out {c.out} already holds a run: go on with --resume, start anew "
                        "with --overwrite, or name another folder")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if c.batch % (world * c.accum):
        raise UserError(f"--batch {c.batch} does not divide by {world} processes x {c.accum} "
                        "accumulation steps")
