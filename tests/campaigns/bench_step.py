"""Our training step beside the padded step of the official kind: FLOPs, CPU seconds, peak memory.

    python tests/campaigns/bench_step.py [--dtype bf16] [--turns 2] [--checkpointing] [--chunk 8]

The model is as large as CCLM-3M with a ViT: 224 px, 12 + 6 + 6 layers of width 768, 250,002 tokens. The batch is 8
image-caption pairs and 8 sentence pairs of realistic lengths. The padded step has the same parameters, the official
limits of 40 and 64 tokens, three fusion passes a stream, and no dropout. Each side runs in fresh processes, by turns,
on one thread. Nothing here is a test.
"""
import argparse
import json
import pathlib
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data                                                                  # noqa: E402
import reference                                                             # noqa: E402
import train                                                                 # noqa: E402
from formats.images import normalise                                         # noqa: E402
from formats.sources import BadRecords                                       # noqa: E402
from losses import hard_negatives                                            # noqa: E402
from model import CCLM, View, build, parameter_groups                        # noqa: E402

LIMITS = {"image": (40, 14, 12), "text": (64, 25, 20)}          # most tokens, mean tokens, most masked


def batch(c, B, stream, seed):
    """A batch as data.Batches makes it, of random tokens."""
    g = torch.Generator().manual_seed(seed)
    most, mean, most_masked = LIMITS[stream]

    def sentences():
        lengths = torch.empty(B).log_normal_(0, 0.5, generator=g)            # the mean is 1.13
        lengths = (3 + (mean - 3) / 1.13 * lengths).round().int().clamp(max=most).tolist()
        return [torch.randint(4, c.vocabulary - 1, (n,), generator=g).tolist() for n in lengths]
    b = sentences()
    token_ids, starts = data.pack(b)
    positions = torch.cat([starts[i] + 1 + torch.randperm(len(x) - 2, generator=g)[:min(most_masked, -(-len(x) * 2 // 5))]
                           .sort()[0] for i, x in enumerate(b)])
    masked = data.Masked(token_ids.index_fill(0, positions, c.vocabulary - 1), positions, token_ids[positions])
    a = {"images": torch.randint(256, (B, 3, c.image_size, c.image_size), generator=g, dtype=torch.uint8)}
    if stream == "text":
        a = {"a": data.pack(sentences())}
    return a | {"b": data.Sentences(token_ids, starts), "masked": masked, "ids": torch.arange(B)}


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
    empty = B * LIMITS[stream][2] - len(labels)
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


def in_place_flops(_, a, b, *args, **kwargs):
    """FLOPs of addmm_, which torch does not count."""
    return 2 * a[0] * a[1] * b[1]


def one(side, args):
    """Runs one side in this process -> {"flops", "seconds" of process time a step, "peak" bytes}."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    c = build("base", vision="vit", text_layers=6, tied=True, drop_path=0.0)
    model = CCLM(c)
    model.chunk = args.chunk
    for layer in model.modules():
        layer.checkpointing = args.checkpointing
    settings = train.settings(["--preset", "base", "--batch", str(args.batch), "--text_batch", str(args.batch)])
    objective = train.Pretraining(model, SimpleNamespace(size=c.vocabulary), settings).train()
    optimizer = torch.optim.AdamW(parameter_groups(objective, lambda name: 1e-6), betas=(0.9, 0.98), fused=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16")
    run = train.Run(settings, torch.device("cpu"), objective, objective, optimizer, autocast, None, BadRecords(), None, [])

    def step(seed):
        streams = [batch(c, args.batch, stream, 2 * seed + k) for k, stream in enumerate(LIMITS)]
        if side == "padded":
            return padded_step(run, *streams)
        return train.train_step(run, streams, {"bad_records": [], "cut": 0}, seed)
    step(0)                                                     # the optimizer's state is made here
    start = time.process_time()
    for seed in range(1, args.steps + 1):
        step(seed)
    seconds = (time.process_time() - start) / args.steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # The math backend is made of products that can be counted.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_flops}) as counter, sdpa_kernel(SDPBackend.MATH):
        step(1)
    return {"flops": counter.get_total_flops(), "seconds": seconds, "peak": peak}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=("ours", "padded"), help="measure one side here and print JSON")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="steps a process measures")
    parser.add_argument("--turns", type=int, default=2, help="processes of each side")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--chunk", type=int)
    args = parser.parse_args()
    if args.one:
        return print(json.dumps(one(args.one, args)))
    found = {"ours": [], "padded": []}
    for side in list(found) * args.turns:
        words = [sys.executable, __file__, *sys.argv[1:], "--one", side]
        found[side].append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
        print(side, found[side][-1], flush=True)
    for key in ("flops", "seconds", "peak"):
        ours, theirs = (min(run[key] for run in found[side]) for side in found)
        print(f"{key:8} ours {ours:10.4g} padded {theirs:10.4g} ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
