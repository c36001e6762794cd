"""Test-time embedding optimization, TTEO: seconds on one prompt for a better picture (Sec. 3.2.3).

A one-step generator is differentiable from its input to its logits. Soft embeddings bridge the gap
on either side, tokens -> input and logits -> tokenizer, so a reward R of the pixels and the prompt
c has a gradient at the input:

    e* = argmax R(Dec(Emb_Dec(z_theta(e_in))), c)  over e_in                                (Eq. 11)

What is optimized is e_in (L, d). It starts as the frozen table's rows at the tokens of x_init. All
positions move, the masked ones too: a mask is one more row. After one update e_in is no sequence's
embedding any more, and need not be. Weights, prompt, and the start's noise stay fixed. Nothing is
sampled on the way, for two reasons: a draw would cut the gradient, and iterates could not be
compared, because one might owe its reward to a lucky draw.

The loop is ReNO's (Eyring et al. 2024): gradient descent with momentum, and the best image seen is
kept. Counting, as there: k iterations are k images and k - 1 updates. Iteration 0 is the start
before any update, and takes part in the selection, so by R's account the result is never worse than
without. N starts (four in the paper, with k = 4) share a batch. Their losses are summed, not
averaged: each start sees the gradient of its own loss, and lr means the same for every N. The best
of all starts and iterations is the sample. With k = 1 that is best-of-N, the baseline.

Cost, published (Tab. 6), seconds per prompt: best of 8 1.46, of 16 2.64, of 32 4.70, of 64 8.57;
four starts with two iterations 2.52, with four 5.66. The last two are k F + (k - 1) B with
F = 0.95 s forward, B = 0.62 s backward, and 0.95 is what the best-of-N times give for four starts.

    python tteo.py --ckpt out/run/ckpt.pt --prompt "a blue ring above a green square"
    python tteo.py --ckpt out/run/ckpt.pt --benchmark 300      # one start, TTEO, best-of-N: GenEval
    python tteo.py --ckpt student.pt --teacher maskgen --prompt "..." --rewards clip --starts 8
"""

import argparse
import functools
import math
import os
from typing import NamedTuple

import torch

from dimo import initial_tokens
from machinery.errors import UserError, guard
from machinery.files import fingerprint
from machinery.flags import check_device, default_device, nonnegative, number, positive_int, share
from machinery.pictures import sheet, spread
from machinery.processes import autocast, now
from machinery.records import append_rows, environment, print_rows
from metrics.tables import table
from reward import RENO, clip_each, reno_loss, rewards_for, weighted
from soft_embed import embed_tokens, soft_embed
from teachers import FILES, fixed_sample, load_student, load_teacher, to_bytes
from worlds.judges import judge_shapes
from worlds.shapes import benchmark as shapes_benchmark


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

    The negative log-density of the norm of D standard normal numbers: it pulls n to sqrt(D - 1),
    which is right for ReNO's variable, Gaussian noise.
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
    # choice: momentum, Nesterov and the counting are ReNO's. The paper states SGD, lr 0.2 and no
    clipping; its Tab. 6 agrees with the counting, see above.
    """
    assert iterations >= 1, f"expected one iteration at least, the start itself, got {iterations}"
    e = e.detach().clone().requires_grad_()
    # Nesterov in torch: v <- momentum v + g, then e <- e - lr (g + momentum v): first 1.9 lr g.
    opt = torch.optim.SGD([e], lr, momentum, nesterov=nesterov and momentum > 0)
    history = []
    for k in range(iterations):
        is_last = k == iterations - 1
        with torch.set_grad_enabled(not is_last):     # no update follows the last image: no graph
            img = image_of(e)
            loss = loss_of(img)                                                               # (N,)
            total = loss.sum()                        # a sum, not a mean
            if regularize:
                total = total + regularize * norm_penalty(e).sum()
        history.append(loss.detach())
        index = torch.full_like(loss, k, dtype=torch.long)
        iterate = {"e": e.detach(), "img": img.detach(), "loss": history[k], "index": index}
        if k == 0:
            best = {name: t.clone() for name, t in iterate.items()}
            best["loss"].fill_(math.inf)              # NaN is never better
        better = loss < best["loss"]                  # strictly: the first of equals stays
        for name, t in iterate.items():
            best[name][better] = t[better]            # a copy: e moves on
        if not is_last:
            (g,) = torch.autograd.grad(total, e)      # of e alone: the weights' gradients stay None
            e.grad = g if clip is None else clip_each(g, clip, eps=1e-6)              # eps: ReNO's
            opt.step()
    return Best(**best, history=torch.stack(history))


# ---------------------------------------------------------------------- from a prompt to an image
def draw_starts(teacher, net, cond, n, init_ratio, generator=None):
    """n starts for each row of cond: x_init (B, L, G), e_in (B, L, d), noise (B, L, d), and cond
    with its rows repeated, B in all. A seed gives the same start as in evaluate.py."""
    cond = tuple(c.repeat_interleave(n, 0) for c in cond)
    tokens, scores, _, noise = teacher.draw_start(net, len(cond[0]), generator)
    x_init = initial_tokens(tokens, init_ratio, scores, net.V)
    return x_init, embed_tokens(x_init, *net.tables()).detach(), noise, cond


def soft_image(teacher, net, e, cond, s=0.0, noise=None):
    """Dec(Emb_Dec(z_theta(e))): input embeddings e (B, L, d) -> images (B, C, H, W) in [0, 1].

    Differentiable in e. s and noise: the start's perturbation, the same in every iteration.
    # choice: the networks apply it after e_in (Meissonic after a projection), so e_in itself starts
    on the table, as in Eq. 11. Pixels beyond [0, 1] are clamped, and send no gradient back.
    """
    z = net(e, cond, s=s, noise=noise) if s else net(e, cond)                        # (B, L, G, V)
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
    # choice: the images are the soft ones, which the rewards saw; the paper does not say that
    tokens are drawn.
    """
    training = net.training or teacher.tokenizer.training
    assert not training, "expected networks in eval mode: dropout would redraw"
    device = next(net.parameters()).device
    config = config or teacher.spec.student
    begin = now(device)
    with torch.no_grad():
        cond = teacher.cond(asked if torch.is_tensor(asked) else teacher.conditions(asked))
        ratio = config["init_ratio"]
        _, e, noise, cond = draw_starts(teacher, net, cond, starts, ratio, generator)  # P * starts
    asked = [one for one in asked for _ in range(starts)]
    size, runs = chunk or len(e), []
    for i in range(0, len(e), size):
        part = slice(i, i + size)
        image_of = functools.partial(soft_image, teacher, net, cond=tuple(c[part] for c in cond),
                                     s=config["noise"], noise=noise[part])
        runs.append(
            optimize(e[part], image_of, lambda img: loss_of(img, asked[part]), iterations, **sgd)
        )
    *best, history = zip(*runs)
    best = [torch.cat(field).unflatten(0, (-1, starts)) for field in best]
    every = Best(*best, torch.cat(history, 1).unflatten(1, (-1, starts)))
    start = every.loss.argmin(1)                                                              # (P,)
    chosen = torch.arange(len(start), device=device), start
    return Found(every.img[chosen], every.loss[chosen], start, now(device) - begin, every)


def best_of(teacher, net, asked, loss_of, n=4, **kwargs):
    """The baseline: the best of n starts as they are. The same selection, no gradient anywhere."""
    return tteo(teacher, net, asked, loss_of, starts=n, iterations=1, **kwargs)


# -------------------------------------------------------------------------------- the command line
def flags():
    ap = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    add = ap.add_argument_group("what to draw, and who draws").add_argument
    what = ap.add_mutually_exclusive_group(required=True).add_argument
    what("--prompt", help="what to draw")
    what("--benchmark", type=number(6, 10**5, int), metavar="N",
         help="draw N prompts of the world of shapes, with GenEval of all")
    add("--ckpt", metavar="PATH", help="student: a checkpoint of train.py, or bare weights with "
        "--teacher (default: the teacher itself takes the one step)")
    add("--teacher", metavar="NAME", help="text teacher, as meissonic, maskgen, meissonic-tiny")
    for role in ("teacher", "tokenizer", "text", *RENO):
        add(f"--{role}_weights", metavar="PATH", help="local file instead of the published one")
    add("--bert_vocab", metavar="PATH", help="local vocabulary for imagereward's tokenizer")
    add("--text_activation", choices=["gelu", "quick_gelu"], help="activation of the text encoder")
    add("--random_weights", action="store_true", help="load no files, to try memory and speed")
    add("--rewards", nargs="+", choices=RENO,
        help="rewards to climb, in ReNO's mix (default: all four; a tiny world's own)")
    add("--scale", type=nonnegative, default=1.0, help="factor of the rewards' weights (1)")

    add = ap.add_argument_group("how (default: the paper's; where silent, ReNO's)").add_argument
    add("--starts", type=positive_int, default=4, help="number of starts, N (4)")
    add("--iterations", type=positive_int, default=4, help="images per start (4)")
    add("--lr", type=nonnegative, default=0.2, help="learning rate of SGD (0.2; ReNO: 5, clipped)")
    add("--momentum", type=share, default=0.9, help="Nesterov momentum (0.9)")
    add("--clip", type=nonnegative, help="largest gradient norm of a start (none; ReNO: 0.1)")
    add("--regularize", type=nonnegative, default=0.0,
        help="weight of the norm penalty (0; ReNO: 0.01)")
    add("--seed", type=number(0, 2**32, int), default=0, help="seed of the starts (0)")

    add = ap.add_argument_group("system").add_argument
    add("--chunk", type=positive_int,
        help="starts that share a batch (default: --starts; with --benchmark all of 20 prompts)")
    add("--checkpointing", action="store_true",
        help="save memory: recompute activations on the way back")
    add("--bf16", action="store_true", help="all but the decoder in bfloat16")
    add("--device", choices=["cuda", "cpu"], default=default_device())
    add("--out", default="out/tteo",
        help="folder of results.jsonl (appended) and tteo.png (out/tteo)")
    return ap


def one_prompt(args, teacher, rewards, weights, draw, facts):
    """The same starts without and with TTEO, then others in TTEO's time: table, record, picture."""

    def found(starts, iterations, seed=args.seed):
        generator = torch.Generator(args.device).manual_seed(seed)
        chunk = args.chunk or args.starts             # equal batches, so times compare
        return draw([args.prompt], starts, iterations, generator, chunk)

    found(1, 2)                                       # untimed: the first pass of anything is slow
    before = found(args.starts, 1)
    after = found(args.starts, args.iterations)
    n = max(1, round(args.starts * after.seconds / before.seconds))
    others = found(n, 1, args.seed + 1)
    captions = [f"best of {args.starts} starts", "the same, with TTEO", f"best of {n} others"]
    rows = []
    for best in (before, after, others):
        if not best.loss.isfinite():
            raise UserError("no start has a finite loss: the student's training diverged, or a "
                            "reward overflowed")
        scores = rewards(best.img, [args.prompt])
        row = {"score": weighted(scores, weights).item(), "loss": best.loss.item(),
               "seconds": best.seconds}
        rows.append(row | {name: score.item() for name, score in scores.items()})
    print_rows(dict(zip(captions, rows)))
    start = after.start.item()
    k = after.every.index[0, start].item()
    print(f"TTEO's best is start {start} at iteration {k}, both counted from 0")

    record = vars(args) | facts | environment(args.device) | {"weights": weights}
    record["history"] = after.every.history[:, 0].tolist()
    record["before"] = rows[0]
    record["after"] = rows[1] | {"start": start, "iteration": k}
    record["best_of"] = rows[2] | {"n": n}
    append_rows(os.path.join(args.out, "results.jsonl"), [record])
    captions[0] = f"{args.starts} starts"             # all of them are shown
    images = before.every.img[0], after.every.img[0], others.img
    strips = [(text, to_bytes(img, teacher.spec)) for text, img in zip(captions, images)]
    sheet(strips, os.path.join(args.out, "tteo.png"), columns=args.starts)


def benchmark(args, teacher, rewards, draw, facts, batch=20):
    """N prompts from one start, with TTEO, and by best-of-N in TTEO's time: GenEval and rewards.

    Three columns of Tab. 6, on the world where GenEval is exact. All pictures are the soft ones.
    """
    if not teacher.spec.rewards:
        raise UserError("--benchmark is of the world of shapes, which "
                        f"{teacher.spec.name} does not draw: give it a --prompt")
    prompts, _ = shapes_benchmark(args.benchmark, args.seed)
    conditions = teacher.conditions(prompts)
    prompt_of = dict(zip(map(tuple, conditions.tolist()), prompts))

    def make_images(asked, generator, starts, iterations, seconds=None):
        some = [prompt_of[tuple(row)] for row in asked.tolist()]
        found = draw(some, starts, iterations, generator)
        if seconds is not None:
            seconds["all"] += found.seconds
        return to_bytes(found.img, teacher.spec)

    def seconds_of(starts, iterations):
        return draw(prompts[:batch], starts, iterations, torch.Generator(args.device)).seconds

    N, k = args.starts, args.iterations
    seconds_of(N, 2)                                  # untimed: the first pass of anything is slow
    goal = seconds_of(N, k)
    n = max(1, round(N * goal / seconds_of(N, 1)))
    n = max(1, round(n * goal / seconds_of(n, 1)))    # a start may cost more among many
    ways = {"1 start": (1, 1), f"TTEO, {N} starts x {k}": (N, k), f"best of {n}": (n, 1)}
    rows, strips = [], []
    for name, (starts, iterations) in ways.items():
        make = functools.partial(make_images, starts=starts, iterations=iterations)
        scores = judge_shapes(teacher, rewards, make, args.benchmark, batch, args.seed, name)
        rows.append({"model": name, "steps": 1} | scores | facts)
        strips.append((name, fixed_sample(make, conditions, 20, args.seed)))
    append_rows(os.path.join(args.out, "results.jsonl"), rows)
    sheet(strips, os.path.join(args.out, "tteo.png"), words=spread(prompts, 20))
    print(table(rows))


def main(args):
    check_device(args.device)
    if not (args.ckpt or args.teacher):
        raise UserError("who draws? Name a student by --ckpt PATH, or a text teacher by "
                        "--teacher NAME")
    files = {key: getattr(args, key) for key in FILES}
    if args.ckpt:
        teacher, net, config = load_student(args.ckpt, args.teacher, args.device, **files)
    else:
        teacher = load_teacher(args.teacher, device=args.device, **files)
        net, config = teacher.net, {}
    spec = teacher.spec
    if teacher.text is None:
        raise UserError(f"{spec.name} draws classes, and rewards read prompts: "
                        "TTEO needs a text teacher")
    os.makedirs(args.out, exist_ok=True)
    mix = RENO | dict.fromkeys(spec.rewards, 1.0)     # a tiny world's judges have equal weights
    weights = {name: args.scale * mix[name] for name in args.rewards or spec.rewards or RENO}
    paths = {name: getattr(args, f"{name}_weights") for name in weights}
    rewards = rewards_for(spec, weights, paths, args.random_weights, device=args.device,
                          vocab=args.bert_vocab, dtype=torch.bfloat16 if args.bf16 else None,
                          checkpointing=args.checkpointing)
    for network in (net, teacher.tokenizer):
        network.set_checkpointing(args.checkpointing)
    config = spec.student | config
    start = {key: config[key] for key in ("init_ratio", "noise")}
    sgd = {key: getattr(args, key) for key in ("lr", "momentum", "clip", "regularize")}

    def loss_of(img, prompts):
        return reno_loss(rewards(img, prompts), weights)                                      # (B,)

    def draw(prompts, starts, iterations, generator, chunk=args.chunk):
        with autocast(args.device, args.bf16):
            return tteo(teacher, net, prompts, loss_of, starts, iterations, start, chunk,
                        generator, **sgd)

    facts = start | {"student": fingerprint(net)}
    if args.benchmark:
        benchmark(args, teacher, rewards, draw, facts | {"sgd": sgd})
    else:
        one_prompt(args, teacher, rewards, weights, draw, facts | {"teacher": spec.name})


if __name__ == "__main__":
    guard(lambda: main(flags().parse_args()),
          out_of_memory="take a smaller --chunk, or add --checkpointing or --bf16",
          cannot_write="cannot write: name another folder by --out")
