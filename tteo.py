"""Test-time embedding optimization, TTEO: seconds on one prompt for a better picture (Sec. 3.2.3).

A one-step generator is differentiable from its input to its logits. Soft embeddings bridge the gap
on either side, tokens -> input and logits -> tokenizer, so a reward R of the pixels and the prompt
c has a gradient at the input:

    e* = argmax R(Dec(Emb_Dec(z_theta(e_in))), c)  over e_in                                (Eq. 11)

What is optimized is e_in (L, d). It starts as the frozen table's rows at the tokens of x_init. All
positions move, the masked ones too: a mask is one more row. After one update e_in is no sequence's
embedding any more, and need not be. Weights, prompt, and the start's noise stay fixed. Nothing is
sampled on the way: a draw would cut the gradient, and an iterate might owe its reward to its luck.

The loop is ReNO's (Eyring et al. 2024): gradient descent with momentum, and the best image seen is
kept. Counting, as there: k iterations are k images and k - 1 updates. Iteration 0 is the start
before any update, and takes part in the selection, so by R's account the result is never worse than
without. N starts (four in the paper, with k = 4) share a batch. Their losses are summed, not
averaged: each start sees the gradient of its own loss, and lr means the same for every N. The best
of all starts and iterations is the sample. With k = 1 that is best-of-N, the baseline.

Cost, published (Tab. 6), seconds per prompt: best of 8 1.46, of 16 2.64, of 32 4.70, of 64 8.57;
four starts with two iterations 2.52, with four 5.66. The last two are k F + (k - 1) B, B = 0.62
backward, and F = 0.95 forward, which the best-of-N times give for four starts, too.

    python tteo.py --ckpt out/run/ckpt.pt --prompt "a blue ring above a green square"
    python tteo.py --ckpt out/run/ckpt.pt --benchmark 300      # one start, TTEO, best-of-N: GenEval
    python tteo.py --ckpt student.pt --teacher maskgen --prompt "..." --rewards clip --starts 8
    torchrun --nproc_per_node=4 tteo.py --ckpt ... --metrics geneval hps \\
        --metadata metadata.jsonl HPDv2/benchmark --best_of 8 16 32 64         # Tab. 3, 6; Fig. 14
"""

import functools
import math
import os
from typing import NamedTuple

import torch

from dimo import initial_tokens
from machinery.errors import UserError, guard
from machinery.files import fingerprint
from machinery.flags import (add_device, add_teacher_files, add_weights, check_device, nonnegative,
                             number, parser, positive_int, share)
from machinery.processes import autocast, join_processes, now, world_size
from metrics.benchmarks import BENCHMARKS, benchmark_flags, load_benchmarks
from reward import RENO, clip_each, reno_loss, rewards_for
from soft_embed import embed_tokens, soft_embed
from teachers import FILES, load_student, load_teacher
from worlds.comparing import on_benchmark, on_shapes, one_prompt
from worlds.judges import load_detector


# ---------------------------------------------------------------------------------------- the loop
class Best(NamedTuple):
    """The best iterate of each of N starts."""

    e: torch.Tensor             # (N, ...)
    img: torch.Tensor           # (N, C, H, W) in [0, 1]
    loss: torch.Tensor          # (N,)
    index: torch.Tensor         # (N,) the iteration that it is from, 0 is the start itself
    history: torch.Tensor       # (iterations, N) the losses of all iterates


def norm_penalty(e):
    """n^2/2 - (D - 1) ln n for each start of e (N, ...), with n its norm and D its entries: (N,).

    The negative log-density of the norm of ReNO's Gaussian variable: it pulls n to sqrt(D - 1).
    # choice: embeddings have another norm, so by default it is off.
    """
    n = e.flatten(1).float().norm(dim=1)                                                      # (N,)
    return n**2 / 2 - (e[0].numel() - 1) * n.log()


def optimize(e, image_of, loss_of, iterations=4, lr=0.2, momentum=0.9, nesterov=True, clip=None,
             regularize=0.0):
    """ReNO's loop on N starts e (N, ...) at once: a Best. No network's parameter gets a gradient.

    image_of(e) -> images (N, ...), loss_of(images) -> (N,), smaller is better; neither may mix
    starts, or draw. clip limits the gradient norm of each start (`clip_each`). regularize is the
    weight of the norm penalty, which steers but does not select.
    # choice: momentum, Nesterov, counting (see above) are ReNO's; the paper says SGD, lr 0.2.
    """
    assert iterations >= 1, f"expected one iteration at least, the start itself, got {iterations}"
    e = e.detach().clone().requires_grad_()
    # Nesterov in torch: v <- momentum v + g, then e <- e - lr (g + momentum v): first 1.9 lr g.
    opt = torch.optim.SGD([e], lr, momentum, nesterov=nesterov and momentum > 0)
    choose = torch.vmap(torch.where)                  # for each start, of tensors of any shape
    lowest, index, best, history = math.inf, 0, None, []
    for k in range(iterations):
        is_last = k == iterations - 1
        with torch.set_grad_enabled(not is_last):     # no update follows the last image: no graph
            img = image_of(e)
            loss = loss_of(img)                                                               # (N,)
            total = loss.sum()                        # a sum, not a mean
            if regularize:
                total = total + regularize * norm_penalty(e).sum()
        loss = loss.detach()
        history.append(loss)
        iterate = e.detach(), img.detach()
        better = loss < lowest                        # strictly: the first of equals stays, no NaN
        lowest = torch.where(better, loss, lowest)    # indexing by a mask would wait for the device
        index = torch.where(better, k, index)
        best = [choose(better, new, old) for new, old in zip(iterate, best or iterate)]   # copies
        if not is_last:
            (g,) = torch.autograd.grad(total, e)      # of e alone: the weights' gradients stay None
            e.grad = g if clip is None else clip_each(g, clip, eps=1e-6)              # eps: ReNO's
            opt.step()
    return Best(*best, lowest, index, torch.stack(history))


# ---------------------------------------------------------------------- from a prompt to an image
def draw_starts(teacher, net, cond, n, init_ratio, generator=None):
    """n starts for each row of cond: x_init (B, L, G), e_in (B, L, d), noise (B, L, d), and cond
    with its rows repeated, B in all. A seed gives the same start as in evaluate.py."""
    cond = tuple(c.repeat_interleave(n, 0) for c in cond)
    tokens, scores, _, noise = teacher.draw_start(net, len(cond[0]), generator)
    x_init = initial_tokens(tokens, init_ratio, scores, net.V)
    return x_init, embed_tokens(x_init, *net.tables()), noise, cond


def soft_image(teacher, net, e, cond, s=0.0, noise=None):
    """Dec(Emb_Dec(z_theta(e))): input embeddings e (B, L, d) -> images (B, C, H, W) in [0, 1].

    Differentiable in e. s and noise: the start's perturbation, the same in every iteration.
    # choice: the networks apply it after e_in (Meissonic after a projection), so e_in itself starts
    on the table, as in Eq. 11. Pixels beyond [0, 1] are clamped, and send no gradient back.
    """
    z = net(e, cond, s=s, noise=noise)                                               # (B, L, G, V)
    with autocast(e.device.type, False):              # the decoder in float32, as everywhere
        return teacher.tokenizer.decode(soft_embed(z, *teacher.tokenizer.tables()), cond)


class Found(NamedTuple):
    """The samples for P prompts, of N starts each."""

    img: torch.Tensor           # (P, C, H, W) in [0, 1]
    loss: torch.Tensor          # (P,)
    start: torch.Tensor         # (P,) which of the starts it is from
    seconds: float              # all of it, from the prompts on
    every: Best                 # what became of each start, with (P, N) in the place of (N,)


def tteo(teacher, net, asked, loss_of, starts=4, iterations=4, config=None, chunk=None,
         generator=None, **sgd):
    """Eq. 11 for each of P prompts, from `starts` starts each: a Found.

    asked: a list of prompts, or rows of teacher.conditions. loss_of(images (B, C, H, W), a list of
    what each was asked for) -> (B,). config: init_ratio and noise (the scale s) of the starts, the
    teacher's by default. chunk: starts that share a batch, all by default; the result is the same.
    sgd: lr, momentum, nesterov, clip, regularize of `optimize`.
    # choice: the images are the soft ones that the rewards saw; the paper mentions no sampling.
    """
    training = net.training or teacher.tokenizer.training
    assert not training, "expected networks in eval mode: dropout would redraw"
    device = next(net.parameters()).device
    config = config or teacher.spec.student
    begin = now(device)
    with torch.no_grad():
        cond = teacher.cond(asked if torch.is_tensor(asked) else teacher.conditions(asked))
        _, e, noise, cond = draw_starts(teacher, net, cond, starts, config["init_ratio"], generator)
    asked = [one for one in asked for _ in range(starts)]
    chunk = chunk or len(e)
    runs = []
    for i in range(0, len(e), chunk):
        part = slice(i, i + chunk)
        image_of = functools.partial(soft_image, teacher, net, cond=tuple(c[part] for c in cond),
                                     s=config["noise"], noise=noise[part])
        runs.append(
            optimize(e[part], image_of, lambda img: loss_of(img, asked[part]), iterations, **sgd))
    axes = 0, 0, 0, 0, 1                              # where the starts are in the fields of Best
    every = Best(*(torch.cat(parts, axis).unflatten(axis, (-1, starts))
                   for parts, axis in zip(zip(*runs), axes)))
    start = every.loss.argmin(1)                                                              # (P,)
    img = every.img[torch.arange(len(start)), start]
    return Found(img, every.loss.amin(1), start, now(device) - begin, every)


def best_of(teacher, net, asked, loss_of, n=4, **kwargs):
    """The baseline: the best of n starts as they are. The same selection, no gradient anywhere."""
    return tteo(teacher, net, asked, loss_of, starts=n, iterations=1, **kwargs)


# -------------------------------------------------------------------------------- the command line
def flags():
    ap = parser(__doc__)
    add = ap.add_argument_group("what to draw, and who draws").add_argument
    what = ap.add_mutually_exclusive_group(required=True).add_argument
    what("--prompt", help="what to draw")
    what("--benchmark", type=number(6, 10**5, int), metavar="N",
         help="draw N prompts of the world of shapes, with GenEval of all")
    what("--metrics", nargs="+", choices=BENCHMARKS, help="draw these benchmarks")
    add("--ckpt", metavar="PATH", help="student: a checkpoint of train.py, or bare weights with "
        "--teacher (default: the teacher itself takes the one step)")
    add("--teacher", metavar="NAME", help="text teacher, as meissonic, maskgen, meissonic-tiny")
    add_teacher_files(add)
    add_weights(add, *RENO)
    add("--bert_vocab", metavar="PATH", help="local vocabulary for imagereward's tokenizer")
    add("--rewards", nargs="+", choices=RENO,
        help="rewards to climb, in ReNO's mix (default: all four; a tiny world's own)")
    add("--scale", type=nonnegative, default=1.0, help="factor of the rewards' weights (1)")
    add = ap.add_argument_group("how (default: the paper's; where silent, ReNO's)").add_argument
    add("--starts", type=positive_int, default=4, help="number of starts, N (4)")
    add("--iterations", type=positive_int, default=4, help="images per start (4)")
    add("--lr", type=nonnegative, default=0.2, help="learning rate of SGD (0.2; ReNO: 5, clipped)")
    add("--momentum", type=share, default=0.9, help="Nesterov momentum (0.9)")
    add("--clip", type=nonnegative, help="largest gradient norm of a start (none; ReNO: 0.1)")
    add("--regularize", type=nonnegative, default=0.0, help="norm penalty's weight (0; ReNO: 0.01)")
    add("--seed", type=number(0, 2**32, int), default=0, help="seed of the starts (0)")
    benchmark_flags(ap)
    ap.set_defaults(hps_version="v2.1")               # the paper's, and the reward's
    add = ap.add_argument_group("system").add_argument
    add("--best_of", type=positive_int, nargs="+", metavar="N",
        help="starts of best-of-N beside a benchmark's TTEO (default: as many as take its time)")
    add("--batch", type=positive_int,
        help="images of a benchmark that are drawn together (20 of --benchmark, 4 of --metrics)")
    add("--chunk", type=positive_int,
        help="starts that share a batch (default: --starts; of a benchmark, all of --batch images)")
    add("--checkpointing", action="store_true", help="recompute activations, to save memory")
    add("--bf16", action="store_true", help="all but the decoder in bfloat16")
    add_device(add)
    add("--out", default="out/tteo", help="folder of results.jsonl (grows), pictures (out/tteo)")
    return ap


def main(args):
    check_device(args.device)
    if not (args.ckpt or args.teacher):
        raise UserError("who draws? Name a student by --ckpt PATH, or a text teacher by "
                        "--teacher NAME")
    for flag in ("best_of", "batch"):
        if args.prompt and getattr(args, flag):
            raise UserError(f"--{flag} belongs to a benchmark: --metrics, or --benchmark")
    device = join_processes(args.device)
    if args.prompt and world_size() > 1:
        raise UserError("one --prompt is drawn by one process: start it without torchrun")
    benchmarks = load_benchmarks(args, args.metrics or [], device, load_detector,
                                 others=args.rewards or RENO)
    files = {key: getattr(args, key) for key in FILES}
    if args.ckpt:
        teacher, net, config = load_student(args.ckpt, args.teacher, device, **files)
    else:
        teacher = load_teacher(args.teacher, device=device, **files)
        net, config = teacher.net, {}
    spec = teacher.spec
    if teacher.text is None:
        raise UserError(f"{spec.name} draws classes, and rewards read prompts: "
                        "TTEO needs a text teacher")
    os.makedirs(args.out, exist_ok=True)
    mix = RENO | dict.fromkeys(spec.rewards, 1.0)     # a tiny world's judges have equal weights
    weights = {name: args.scale * mix[name] for name in args.rewards or spec.rewards or RENO}
    paths = {name: getattr(args, f"{name}_weights") for name in weights}
    rewards = rewards_for(spec, weights, paths, args.random_weights, device=device,
                          vocab=args.bert_vocab, dtype=torch.bfloat16 if args.bf16 else None,
                          checkpointing=args.checkpointing)
    for network in (net, teacher.tokenizer):
        network.set_checkpointing(args.checkpointing)

    def loss_of(img, prompts):
        return reno_loss(rewards(img, prompts), weights)                                      # (B,)

    start = {key: config.get(key, spec.student[key]) for key in ("init_ratio", "noise")}
    sgd = {key: getattr(args, key) for key in ("lr", "momentum", "clip", "regularize")}

    def draw(prompts, starts, iterations, generator=None, chunk=args.chunk):
        with autocast(args.device, args.bf16):
            return tteo(teacher, net, prompts, loss_of, starts, iterations, start, chunk,
                        generator, **sgd)

    facts = start | {"student": fingerprint(net)}
    if args.prompt:
        one_prompt(args, teacher, rewards, weights, draw, facts)
    facts |= {"sgd": sgd, "weights": weights}
    if args.benchmark:
        on_shapes(args, teacher, rewards, draw, facts, config)
    for name, bench in benchmarks.items():
        on_benchmark(args, teacher, draw, facts, config, name, bench)


if __name__ == "__main__":
    guard(lambda: main(flags().parse_args()),
          out_of_memory="take a smaller --chunk, or add --checkpointing or --bf16",
          cannot_write="cannot write: name another folder by --out")
