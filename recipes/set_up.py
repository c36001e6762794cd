"""What a run of train.py is made of: networks, conditions, real images, rewards, files.

Algorithm 1, l. 1: student and auxiliary begin as copies of the teacher, or the student as theta_0.
"""

import copy
import functools
import json
import os
from types import SimpleNamespace

import torch

from data.prompts import read_prompts
from data.tokens import RealTokens, TextFeatures, synthetic_prompts
from gan import Discriminator, head_layers
from machinery.checkpoint import Writer, logged_evaluations, trim_log
from machinery.compiling import compile_in_place
from machinery.errors import UserError
from machinery.files import local, read_tensors
from machinery.optim import Trained
from machinery.processes import autocast, barrier, is_main, join_processes, world_size
from machinery.profile import Profile
from networks.weights import load_state
from reward import rewards_for
from teachers import load_teacher
from worlds.judges import training_judge
from worlds.looking import one_step, samples


def set_up(c):
    """All that the loop uses, as a namespace: networks, conditions, files; resumed if asked for."""
    device = join_processes(c.device)
    torch.set_float32_matmul_precision("high")        # TF32 where there is, for what stays float32
    run = SimpleNamespace(c=c, device=device, images=c.batch // world_size())
    run.say = print if is_main() else lambda *words: None
    run.autocast = functools.partial(autocast, c.device, c.dtype == "bf16")
    run.writer = Writer()
    load_networks(run)
    load_conditions(run)
    if is_main() and c.eval_every:
        student = run.student.module
        run.start = samples(run, one_step(run, student.eval()))               # what theta_0 draws
        student.train()
    open_files(run)
    run.judge = training_judge(c, run.teacher, run.prompts, device)
    if run.judge is None:
        run.say(f"{run.teacher.spec.name}: samples are drawn, not judged, while it trains; for FID "
                "add --eval_reference")
    if c.profile:
        run.profile = Profile(device, c.profile)
    if c.compile:
        compile_in_place(run.net, *(net.module for net in run.trained.values()))
    for net in run.trained.values():
        net.wrap(device)
    return run


def load_networks(run):
    """The frozen teacher phi; trained: student theta, auxiliary psi, discriminator eta (l. 1)."""
    c = run.c
    run.teacher = load_teacher(
        c.teacher, c.teacher_weights, c.tokenizer_weights, c.random_weights, run.device,
        c.text_weights, c.text_activation)
    net = run.net = run.teacher.net
    run.E, run.bias = net.tables()                    # frozen, so one table serves all networks
    run.noise_scale = run.teacher.noise_scale()
    student = copy.deepcopy(net)
    if c.init_from != "teacher":
        state = read_tensors(local(c.init_from))
        load_state(student, state.get("ema", state), c.init_from)             # a checkpoint will do
    run.ema = copy.deepcopy(student)
    learners = {"student": student}
    if c.w_dimo:                                      # without Eq. 2 nothing reads the auxiliary
        learners["aux"] = copy.deepcopy(net)
    for module in learners.values():
        module.requires_grad_(True).set_dropout(c.dropout).train()
        for p in module.frozen():
            p.requires_grad_(False)
    if c.dtype == "bf16":
        net.halve()                                   # half the memory, and the same results
    for module in (net, *learners.values(), run.teacher.tokenizer):
        module.set_checkpointing(c.checkpointing)

    rates = {"student": c.lr, "aux": c.aux_lr}
    run.trained = {name: Trained(learners[name], c, rates[name]) for name in learners}
    run.student, run.aux = run.trained["student"], run.trained.get("aux")
    if c.gan:
        torch.manual_seed(c.seed)                     # the same initial heads on every process
        layers = head_layers(net.depth, c.heads)
        disc = Discriminator(net.width, layers, c.head_width, c.head_mlp, net.feature_grid)
        run.disc = Trained(disc.to(run.device), c, c.disc_lr, beta1=0.0)
        run.trained["disc"] = run.disc


def load_conditions(run):
    """What can be asked for, D_c; real images with their conditions, D_d; rewards."""
    c, teacher = run.c, run.teacher
    if c.gan:
        run.real = RealTokens(c.data, teacher, c.seed)
    run.roles = [{"dimo", "gan", "reward"}]
    run.first_pair = 0                                # where the conditions of real images begin
    if teacher.text is None:
        run.prompts = None
    elif c.gan:
        run.prompts = run.real.prompts
        if c.prompts:                                 # Sec. 4.1: LAION's for Eq. 2, DALL-E 3 pairs
            others = read_prompts(c.prompts)
            run.roles = [{"dimo", "reward"}, {"gan"}]
            run.first_pair = len(others)
            run.prompts = others + run.prompts
    elif c.profile:
        run.prompts = synthetic_prompts()
    else:
        run.prompts = read_prompts(c.prompts)
    run.conditions = teacher.conditions(run.prompts)
    run.choices = run.first_pair or len(run.conditions)
    run.features = TextFeatures(teacher, run.conditions, c.text_cache)
    if run.features.why:
        run.say(run.features.why)
    if c.reward:
        paths = {name: getattr(c, f"{name}_weights") for name in c.rewards}
        run.rewards = rewards_for(
            teacher.spec, c.rewards, paths, c.random_weights,
            device=run.device, dtype=torch.bfloat16 if c.dtype == "bf16" else None,
            vocab=c.bert_vocab, clip_scaled=not c.clip_cosine, checkpointing=c.checkpointing)
        if not c.w_dimo:
            run.say("warning: a reward without Di[M]O over-saturates MaskGen's pictures (App. "
                    "I.10), while the paper refines Meissonic so (Tab. 10); --w_dimo above 0 "
                    "anchors it")


def open_files(run):
    """Resume from the checkpoint, or make the folder ready for a new run; say what runs."""
    c = run.c
    run.ckpt_path = f"{c.out}/ckpt.pt"
    run.log_path = f"{c.out}/log.jsonl"
    run.first_step = 0
    run.skipped = torch.zeros((), device=run.device)              # counted on the device
    run.in_a_row = torch.zeros((), device=run.device)
    if c.resume:
        state = read_tensors(run.ckpt_path)
        load_state(run.ema, state["ema"], f"{run.ckpt_path} (ema)")
        for name, net in run.trained.items():
            if name not in state:
                raise UserError(f"{run.ckpt_path} has no auxiliary, since its run had --w_dimo 0: "
                                "go on so, or start from its weights by --init_from")
            load_state(net.module, state[name], f"{run.ckpt_path} ({name})")
            net.optimizer.load_state_dict(state["optimizers"][name])
        run.first_step = state["step"]
        run.skipped = run.skipped + state["skipped"]
    if is_main() and not c.profile:
        os.makedirs(c.out, exist_ok=True)
        if not c.resume and os.path.exists(run.ckpt_path):
            os.remove(run.ckpt_path)                  # a restart must not go on with the older run
        trim_log(run.log_path, run.first_step if c.resume else -1)
    barrier()                                         # the log is whole before any process reads it
    run.rows = logged_evaluations(run.log_path)       # of the part before a resume
    gan = "no GAN"
    if c.gan:
        real = len(run.real.labels)
        gan = f"discriminator {count(run.disc.module):,}, {real:,} real images"
    run.say(f"{run.teacher.spec.name}: {count(run.net):,} parameters, {gan}; {world_size()} "
            f"process(es), {run.device}, {c.dtype}; step {run.first_step} of {c.steps}")
    if not c.profile:
        run.say("settings", json.dumps(vars(c)))


def count(module):
    return sum(p.numel() for p in module.parameters())
