"""Test-time embedding optimization, TTEO: spend seconds at one prompt, and get a better picture (Sec. 3.2.3).

A one-step generator is differentiable from its input to its logits. Soft embeddings bridge the two gaps beside it,
tokens -> input and logits -> tokenizer, so a reward R of the pixels and the prompt c has a gradient at the input:

    e* = argmax R(Dec(Emb_Dec(z_theta(e_in))), c)  over e_in                                  (Eq. 11)

Optimized is e_in (L, d), which starts as the frozen table's rows at the tokens of x_init. All positions move, the
masked ones too: a mask is one more row. After one update e_in is no sequence's embedding any more, and need not be.
Weights, prompt, and the start's noise stay fixed. Nothing is sampled on the way, for two reasons: a draw would cut
the gradient, and iterates could not be compared, for one might owe its reward to a lucky draw.

The loop is ReNO's (Eyring et al. 2024): gradient descent with momentum, and the best image seen is kept. Counting,
as there: k iterations are k images and k - 1 updates. Iteration 0 is the unoptimized start, and takes part in the
selection, so the result is never worse than without, by R's account. N starts (four in the paper, with k = 4) share
a batch. Their losses are summed, not averaged: so each start sees the gradient of its own loss, whatever N is, and
lr means the same. The best of all starts and iterations is the sample. With k = 1 that is best-of-N, the baseline.

Cost, published (Tab. 6), seconds a prompt: best of 8 1.46, of 16 2.64, of 32 4.70, of 64 8.57; four starts with two
iterations 2.52, with four 5.66. The last two are k F + (k - 1) B with F = 0.95 s forward, B = 0.62 s backward, and
0.95 is what the best-of-N times give for four starts.

    python tteo.py --ckpt out/run/ckpt.pt --prompt "a blue ring above a green square"
    python tteo.py --ckpt out/run/ckpt.pt --benchmark 300         # one start, TTEO, best-of-N: GenEval on shapes
    python tteo.py --ckpt student.pt --teacher maskgen --prompt "..." --rewards clip --starts 8 --iterations 2
"""

import argparse
import functools
import json
import math
import os
import time
from collections import Counter
from typing import NamedTuple

import torch

from dimo import initial_tokens
from machinery.errors import UserError, guard
from machinery.files import fingerprint
from machinery.flags import check_device, number
from machinery.pictures import sheet, spread
from machinery.processes import now
from metrics.tables import table
from reward import RENO, clip_each, rewards_for, reno_loss, weighted
from soft_embed import embed_tokens, soft_embed
from teachers import FILES, fixed_sample, load_student, load_teacher, to_bytes
from worlds.judges import judge_shapes
from worlds.shapes import benchmark as shapes_benchmark


class Best(NamedTuple):
    """The best iterate of each of N starts."""

    e: torch.Tensor         # (N, ...)
    img: torch.Tensor       # (N, C, H, W) in [0, 1]
    loss: torch.Tensor      # (N,)
    index: torch.Tensor     # (N,) the iteration that it is from, 0 is the start itself
    history: torch.Tensor   # (iterations, N), the losses of all


def norm_penalty(e):
    """n^2/2 - (D - 1) ln n for each start of e (N, ...), with n its norm and D its entries: (N,), in float32.

    The negative log-density of the norm of D standard normal numbers: it pulls n to sqrt(D - 1), which is right for
    ReNO's variable, Gaussian noise. # choice: embeddings have another norm, so by default it is off.
    """
    n = e.flatten(1).float().norm(dim=1)                                                      # (N,)
    return n**2 / 2 - (e[0].numel() - 1) * n.log()


def like(per_start, t):
    """(N,) -> (N, 1, ..., 1), to be broadcast over t (N, ...)."""
    return per_start.view(-1, *[1] * (t.ndim - 1))


def optimize(e, image_of, loss_of, iterations=4, lr=0.2, momentum=0.9, nesterov=True, clip=None, regularize=0.0):
    """ReNO's loop on N starts e (N, ...) at once: a Best. No parameter of any network gets a gradient.

    image_of(e) -> images (N, ...), loss_of(images) -> (N,), smaller is better; neither may mix starts, or draw.
    regularize is the weight of the norm penalty, which steers but does not select; clip as in `clip_each`.
    # choice: momentum, Nesterov and the counting are ReNO's. The paper states SGD, lr 0.2 and no clipping; its
    Tab. 6 agrees with the counting, see above.
    """
    assert iterations >= 1, f"expected one iteration at least, the start itself, got {iterations}"
    e, history = e.detach().clone().requires_grad_(), []
    # Nesterov as torch has it: v <- momentum v + g, then e <- e - lr (g + momentum v), so 1.9 lr g at first.
    opt = torch.optim.SGD([e], lr, momentum, nesterov=nesterov and momentum > 0)
    for k in range(iterations):
        last = k == iterations - 1
        with torch.set_grad_enabled(not last):                    # no update follows the last image: no graph
            img = image_of(e)
            loss = loss_of(img)                                                               # (N,)
            total = loss.sum() + (regularize * norm_penalty(e).sum() if regularize else 0.0)  # a sum, not a mean
        history.append(loss.detach())
        new = e.detach(), img.detach(), history[k], torch.full_like(loss, k, dtype=torch.long)
        if k == 0:
            best = *new[:2], torch.full_like(loss, math.inf), new[3]                          # NaN is never better
        better = history[k] < best[2]                             # strictly: the first of equals stays
        best = tuple(torch.where(like(better, a), a, b) for a, b in zip(new, best))           # a copy: e moves on
        if last:
            return Best(*best, torch.stack(history))
        g = torch.autograd.grad(total, e)[0]                      # of e alone: the weights' gradients stay None
        e.grad = g if clip is None else clip_each(g, clip, eps=1e-6)                   # eps as in ReNO
        opt.step()


def draw_starts(teacher, net, cond, n, init_ratio, generator=None):
    """n starts for each row of cond: x_init (B, L, G), e_in (B, L, d), noise (B, L, d), and the rows repeated.

    A seed gives the same start as in evaluate.py.
    """
    cond = tuple(c.repeat_interleave(n, 0) for c in cond)                                     # B = rows * n
    E, bias = net.tables()
    tokens, scores, _, noise = teacher.draw_start(net, len(cond[0]), generator)
    x_init = initial_tokens(tokens, init_ratio, scores, net.V)
    return x_init, embed_tokens(x_init, E, bias).detach(), noise, cond


def soft_image(teacher, net, e, cond, s=0.0, noise=None, tau=1.0):
    """Dec(Emb_Dec(z_theta(e))): input embeddings e (B, L, d) -> images (B, C, H, W) in [0, 1], differentiable in e.

    s and noise: the start's perturbation, the same in every iteration. # choice: the networks apply it behind e_in
    (Meissonic behind a projection), so e_in itself starts on the table, as Eq. 11 has it. Pixels beyond [0, 1] are
    clamped, and send no gradient back.
    """
    z = net(e, cond, s=s, noise=noise) if s else net(e, cond)                                 # (B, L, G, V)
    with torch.autocast(e.device.type, enabled=False):            # the decoder in float32, as everywhere
        e_dec = soft_embed(z, *teacher.tokenizer.tables(), tau=tau)                           # (B, L, d_dec)
        return teacher.tokenizer.decode(e_dec, cond)


class Found(NamedTuple):
    """The samples for P prompts, of N starts each."""

    img: torch.Tensor       # (P, C, H, W) in [0, 1]
    loss: torch.Tensor      # (P,)
    start: torch.Tensor     # (P,) which of the starts it is from
    seconds: float          # all of it, from the prompts on
    every: Best             # what became of each start, with (P, N) in the place of (N,)


def tteo(teacher, net, what, loss_of, starts=4, iterations=4, init_ratio=None, noise=None, tau=1.0, chunk=None,
         generator=None, **sgd):
    """Eq. 11 for each of P prompts, from `starts` starts each: a Found.

    what: a list of prompts, or rows of teacher.conditions. loss_of(images (B, C, H, W), a list of what each was
    asked for) -> (B,). init_ratio, noise: as the teacher's students start, if not given. chunk: starts that share a
    batch, all by default; the result is the same. sgd: lr, momentum, nesterov, clip, regularize of `optimize`.
    # choice: the images are the soft ones, which the rewards saw; the paper does not say that tokens are drawn.
    """
    assert not (net.training or teacher.tokenizer.training), "expected networks in eval mode: dropout would redraw"
    device, student = next(net.parameters()).device, teacher.spec.student
    begin = now(device)
    with torch.no_grad():
        cond = teacher.cond(what if isinstance(what, torch.Tensor) else teacher.conditions(what))
        ratio = student["init_ratio"] if init_ratio is None else init_ratio
        _, e, n, cond = draw_starts(teacher, net, cond, starts, ratio, generator)             # B = P * starts
    s = student["noise"] if noise is None else noise
    asked = [one for one in what for _ in range(starts)]
    size, runs = chunk or len(e), []
    for i in range(0, len(e), size):
        e_i, n_i, asked_i, *cond_i = (t[i : i + size] for t in (e, n, asked, *cond))
        image_of = lambda e: soft_image(teacher, net, e, tuple(cond_i), s, n_i, tau)
        runs.append(optimize(e_i, image_of, lambda img: loss_of(img, asked_i), iterations, **sgd))
    *best, history = zip(*runs)
    every = Best(*(torch.cat(t).unflatten(0, (-1, starts)) for t in best),
                 torch.cat(history, 1).unflatten(1, (-1, starts)))
    start = every.loss.argmin(1)                                                              # (P,)
    chosen = torch.arange(len(start), device=start.device), start
    return Found(every.img[chosen], every.loss[chosen], start, now(device) - begin, every)


def best_of(teacher, net, what, loss_of, n=4, **kwargs):
    """The baseline: the best of n starts as they are. The same selection, and no gradient anywhere."""
    return tteo(teacher, net, what, loss_of, starts=n, iterations=1, **kwargs)


REWARD_NAMES = "hps", "imagereward", "clip", "pickscore"


def flags():

    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument_group("what to draw, and who draws").add_argument
    what = ap.add_mutually_exclusive_group(required=True).add_argument
    what("--prompt", help="what to draw")
    what("--benchmark", type=number(6, 10**5, int), metavar="N", help="N prompts of the world of shapes, and GenEval of all")
    add("--ckpt", metavar="PATH", help="the student: a checkpoint of train.py, or bare weights with --teacher; "
        "without, the teacher itself takes the one step")
    add("--teacher", metavar="NAME", help="a text teacher: meissonic, maskgen, maskgen-xl, meissonic-tiny")
    for role in ("teacher", "tokenizer", "text", *REWARD_NAMES):
        add(f"--{role}_weights", metavar="PATH", help="local file instead of the published one")
    add("--bert_vocab", metavar="PATH", help="likewise, for imagereward's tokenizer")
    add("--text_activation", choices=["gelu", "quick_gelu"], help="of the text encoder")
    add("--random_weights", action="store_true", help="networks and rewards without files, to try memory and speed")
    add("--rewards", nargs="+", choices=REWARD_NAMES, help="those to climb, in ReNO's mix (default: all four; a tiny world's own)")
    add("--scale", type=number(0), default=1.0, help="times their weights (%(default)s)")

    add = ap.add_argument_group("how (default: as the paper; where it is silent, as ReNO)").add_argument
    add("--starts", type=number(1, 10**4, int), default=4, help="N (%(default)s)")
    add("--iterations", type=number(1, 10**4, int), default=4, help="images a start (%(default)s)")
    add("--lr", type=number(0), default=0.2, help="of SGD (%(default)s; ReNO has 5, and clips)")
    add("--momentum", type=number(0, 1), default=0.9, help="Nesterov's (%(default)s)")
    add("--clip", type=number(0), help="largest gradient norm of a start (default: none; ReNO has 0.1)")
    add("--regularize", type=number(0), default=0.0, help="weight of the norm penalty (%(default)s; ReNO has 0.01)")
    add("--seed", type=number(0, 2**32, int), default=0, help="of the starts (%(default)s)")

    add = ap.add_argument_group("system").add_argument
    add("--chunk", type=number(1, 10**4, int), help="starts that share a batch (default: as --starts)")
    add("--checkpointing", action="store_true", help="recompute activations on the way back, do not keep them")
    add("--bf16", action="store_true", help="generator and rewards in bfloat16; the decoder stays in float32")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", default="out/tteo", help="folder of results.jsonl (appended) and tteo.png (%(default)s)")
    return ap


def benchmark(args, teacher, net, rewards, loss_of, start, sgd, batch=20):
    """N prompts drawn thrice: from one start, with TTEO, by best-of-N in TTEO's time. GenEval and rewards of each.

    Three columns of Tab. 6, on the world where GenEval is exact. Pictures are the soft ones in all three.
    """

    if not teacher.spec.rewards:
        raise UserError(f"--benchmark is of the world of shapes, which {teacher.spec.name} does not draw: give it a --prompt")
    prompts, _ = shapes_benchmark(args.benchmark, args.seed)
    conditions, rows, sheets = teacher.conditions(prompts), [], []
    asked = dict(zip(map(tuple, conditions.tolist()), prompts))   # what a row of conditions says

    def draw(some, n, k, generator, seconds=None):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            found = tteo(teacher, net, [asked[tuple(row)] for row in some.tolist()], loss_of, n, k, generator=generator,
                         **start, **sgd)
        if seconds is not None:
            seconds["all"] += found.seconds
        return to_bytes(found.img, teacher.spec)

    def seconds_of(n, k):
        draw(conditions[:batch], n, k, torch.Generator(args.device), seconds := Counter())
        return seconds["all"]

    seconds_of(args.starts, 2)                                    # untimed: the first pass of anything is slow
    goal = seconds_of(args.starts, args.iterations)
    many = max(1, round(args.starts * goal / seconds_of(args.starts, 1)))
    many = max(1, round(many * goal / seconds_of(many, 1)))       # a start may cost more among many
    for name, n, k in (("1 start", 1, 1), (f"TTEO, {args.starts} starts x {args.iterations}", args.starts, args.iterations),
                       (f"best of {many}", many, 1)):
        make_images = functools.partial(draw, n=n, k=k)
        row = judge_shapes(teacher, rewards, make_images, args.benchmark, batch, args.seed, name)
        rows.append({"model": name, "steps": 1, **row, **start, "sgd": sgd, "student": fingerprint(net)})
        sheets.append((name, fixed_sample(make_images, conditions, 20, args.seed)))
    with open(os.path.join(args.out, "results.jsonl"), "a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    sheet(sheets, os.path.join(args.out, "tteo.png"), words=spread(prompts, 20))
    print(table(rows))


def main(args):

    # ------------------------------------------------------------------------------- networks and rewards
    check_device(args.device)
    if not (args.ckpt or args.teacher):
        raise UserError("who draws? Name a student by --ckpt PATH, or a text teacher by --teacher NAME")
    files = {k: getattr(args, k) for k in FILES}
    if args.ckpt:
        teacher, net, config = load_student(args.ckpt, args.teacher, args.device, **files)
    else:
        teacher = load_teacher(args.teacher, device=args.device, **files)
        net, config = teacher.net, {}
    if teacher.text is None:
        raise UserError(f"{teacher.spec.name} draws classes, and rewards read prompts: TTEO needs a text teacher")
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as err:
        raise UserError(f"--out {args.out}: cannot write there ({err.strerror})")
    own = teacher.spec.rewards                        # a tiny world's judges; the published ones are mixed as by ReNO
    weights = {name: args.scale * (1.0 if name in own else RENO[name]) for name in args.rewards or own or REWARD_NAMES}
    rewards = rewards_for(teacher.spec, weights, {name: getattr(args, f"{name}_weights") for name in weights},
                                 args.random_weights, device=args.device, vocab=args.bert_vocab,
                                 dtype=torch.bfloat16 if args.bf16 else None, checkpointing=args.checkpointing)
    loss_of = lambda img, prompts: reno_loss(rewards(img, prompts), weights)           # (B,)
    for m in (net, teacher.tokenizer):
        m.set_checkpointing(args.checkpointing)

    config = {**teacher.spec.student, **config}
    start = {k: config[k] for k in ("init_ratio", "noise")}
    sgd = {k: getattr(args, k) for k in ("lr", "momentum", "clip", "regularize")}
    if args.benchmark:
        return benchmark(args, teacher, net, rewards, loss_of, start, sgd)

    # ---------------------------------- the same starts without and with; then more starts in the same time
    from_seed = lambda seed: dict(start, chunk=args.chunk or args.starts,       # equal batches, so times compare
                                  generator=torch.Generator(args.device).manual_seed(seed))
    ask = teacher, net, [args.prompt], loss_of
    with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
        tteo(*ask, 1, 2, **from_seed(args.seed))                  # untimed: the first pass of anything is slow
        before = best_of(*ask, args.starts, **from_seed(args.seed))
        after = tteo(*ask, args.starts, args.iterations, **from_seed(args.seed), **sgd)
        n = max(1, round(args.starts * after.seconds / before.seconds))
        fresh = best_of(*ask, n, **from_seed(args.seed + 1))
        with torch.no_grad():
            scores = [rewards(found.img, [args.prompt]) for found in (before, after, fresh)]
    if not all(torch.isfinite(found.loss).all() for found in (before, after, fresh)):
        raise UserError("no start has a finite loss: the student's training diverged, or a reward overflowed")

    # -------------------------------------------------------------------------------- table, record, picture
    captions = f"best of {args.starts} starts", "the same, with TTEO", f"best of {n} others"
    rows = [dict(score=weighted(score, weights).item(), loss=found.loss.item(), seconds=found.seconds,
                 **{name: score[name].item() for name in weights})
            for found, score in zip((before, after, fresh), scores)]
    print(" " * 24 + "".join(f"{column:>13s}" for column in rows[0]))
    for caption, row in zip(captions, rows):
        print(f"{caption:24s}" + "".join(f"{value:13.4f}" for value in row.values()))
    k = after.every.index[0, i := after.start.item()].item()
    print(f"TTEO's best is start {i} at iteration {k}, both counted from 0")
    record = dict(vars(args), **start, teacher=teacher.spec.name, student=fingerprint(net), weights=weights,
                  before=rows[0], after=dict(rows[1], start=i, iteration=k), best_of=dict(rows[2], n=n),
                  history=after.every.history[:, 0].tolist(), torch=torch.__version__,
                  gpu=torch.cuda.get_device_name() if args.device == "cuda" else None,
                  time=time.strftime("%Y-%m-%d %H:%M:%S"))
    with open(os.path.join(args.out, "results.jsonl"), "a") as f:
        f.write(json.dumps(record) + "\n")
    pixels = lambda img: to_bytes(img, teacher.spec)
    sheet([(f"{args.starts} starts", pixels(before.every.img[0])), (captions[1], pixels(after.every.img[0])),
              (captions[2], pixels(fresh.img))], os.path.join(args.out, "tteo.png"), columns=args.starts)


if __name__ == "__main__":
    guard(lambda: main(flags().parse_args()))
