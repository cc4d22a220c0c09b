"""Our training step beside the padded step of the official kind: FLOPs, CPU seconds, peak memory.

    python tests/campaigns/bench_step.py [--dtype bf16] [--turns 2] [--full] [--checkpointing] [--chunk 8] ...

The model is as large as CCLM-3M with a ViT: 224 px, 12 + 6 + 6 layers of width 768, 250,002 tokens. The batch is 8
image-caption pairs and 8 sentence pairs of realistic lengths (benchmark.py). The padded step has the same parameters,
the official limits of 40 and 64 tokens, three fusion passes a stream, and no dropout. Each side runs in fresh
processes, by turns, on one thread. Other flags are those of train.py. Nothing here is a test.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import benchmark                                                             # noqa: E402
import reference                                                             # noqa: E402
import train                                                                 # noqa: E402
from formats.images import normalise                                         # noqa: E402
from losses import hard_negatives                                            # noqa: E402
from model import View                                                       # noqa: E402

LIMITS = {"image": (40, 12), "text": (64, 20)}                               # most tokens, most masked
FLAGS = ("--benchmark --preset base --vision vit --text_layers 6 --tied --drop_path 0 --lr 1e-6 --caption_tokens 40 "
         "--sentence_tokens 64 --caption_masked 12 --sentence_masked 20").split()


def padded(x, starts, most):
    """(T,) -> (B, most) and which tokens are real."""
    x, mask = reference.unpack(x, starts)
    return F.pad(x, (0, most - x.shape[1])), F.pad(mask, (0, most - mask.shape[1]))


def padded_stream(model, batch, stream):
    """The three losses as the official code computes them: everything padded, three fusion passes."""
    most = LIMITS[stream][0]
    B = len(batch["ids"])
    if stream == "image":
        a = reference.encode_image(model, normalise(batch["images"]))
        a_mask = torch.ones(a.shape[:2], dtype=torch.bool)
    else:
        tokens, a_mask = padded(*batch["a"], most)
        a = reference.encode_text(model, tokens, a_mask)
    tokens, mask = padded(*batch["b"], most)
    masked_tokens, _ = padded(batch["masked"].token_ids, batch["b"].starts, most)
    b = reference.encode_text(model, tokens, mask)
    masked = reference.encode_text(model, masked_tokens, mask)
    project = model.vision_proj if stream == "image" else model.text_proj
    a_vectors, b_vectors = (reference.vectors(model, p, x, m).float()
                            for p, x, m in ((project, a, a_mask), (model.text_proj, b, mask)))
    contrast = reference.contrastive_loss(model, a_vectors, b_vectors, batch["ids"])
    i, j = hard_negatives(*(View(None, None, x.detach(), batch["ids"]) for x in (a_vectors, b_vectors)),
                          model.temperature, 0)
    true = reference.fuse(model, b, mask, a, a_mask)
    false = reference.fuse(model, torch.cat([b, b[j]]), torch.cat([mask, mask[j]]),
                           torch.cat([a[i], a]), torch.cat([a_mask[i], a_mask]))
    logits = model.itm_head(torch.cat([true[:, 0], false[:, 0]])).float()
    match = F.cross_entropy(logits, torch.tensor([1] * B + [0] * 2 * B))
    fused = reference.fuse(model, masked, mask, a, a_mask)
    is_masked, _ = padded(torch.zeros(len(batch["b"].token_ids)).index_fill(0, batch["masked"].positions, 1),
                          batch["b"].starts, most)
    # A sentence has as many masked slots as it may have masked tokens; empty ones have the label -100.
    labels = batch["masked"].labels
    empty = B * LIMITS[stream][1] - len(labels)
    head = model.mlm_head
    x = head(F.pad(fused[is_masked.bool()], (0, 0, 0, empty)))
    logits = F.linear(x, head.weight, head.bias).float()
    return contrast + match + F.cross_entropy(logits, F.pad(labels, (0, empty), value=-100))


def padded_step(run, image, text):
    with run.autocast:
        loss = padded_stream(run.objective.model, image, "image") + padded_stream(run.objective.model, text, "text")
    run.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.objective.parameters(), 1.0)
    run.optimizer.step()


def one(side, args, flags):
    """Runs one side in this process -> {"flops", "seconds" of process time a step, "peak" bytes}."""
    torch.set_num_threads(1)
    sizes = ["--batch", str(args.batch), "--text_batch", str(args.batch)]
    run = train.prepare(train.settings([*FLAGS, *sizes, *flags]), torch.device("cpu"))
    run.autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16")
    run.objective.train()

    def step(number):
        image, text, stats = run.batches[number]
        if side == "padded":
            return padded_step(run, image, text)
        return train.train_step(run, [image, text], stats, number)
    step(0)                                                     # the optimizer's state is made here
    start = time.process_time()
    for number in range(1, args.steps + 1):
        step(number)
    seconds = (time.process_time() - start) / args.steps
    peak = benchmark.peak_memory()
    flops = benchmark.count_flops(lambda: step(1))
    official = sum(benchmark.official_flops(run.objective.model, run.args, images) for images in (True, False))
    return {"flops": flops, "seconds": seconds, "peak": peak, "official_flops": official}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=("ours", "padded"), help="measure one side here and print JSON")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="steps a process measures")
    parser.add_argument("--turns", type=int, default=2, help="processes of each side")
    args, flags = parser.parse_known_args()
    if args.one:
        return print(json.dumps(one(args.one, args, flags)))
    found = {"ours": [], "padded": []}
    for side in list(found) * args.turns:
        words = [sys.executable, __file__, *sys.argv[1:], "--one", side]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        found[side].append(json.loads(done.stdout.splitlines()[-1]))         # after the lines of train.prepare
        print(side, found[side][-1], flush=True)
    print(f"flops of a padded step as benchmark.py computes them: {found['padded'][0]['official_flops']:.4g}")
    for key in ("flops", "seconds", "peak"):
        ours, theirs = (min(run[key] for run in found[side]) for side in found)
        print(f"{key:8} ours {ours:10.4g} padded {theirs:10.4g} ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
