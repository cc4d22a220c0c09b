"""Train CCLM.

    python train.py                                             the demo: emoji, 21 languages, minutes on two CPU cores
    torchrun --nproc_per_node=8 train.py --preset base          the same program on eight GPUs (DDP, nccl; gloo on CPUs)
    python train.py --init_text xlmr/ --init_vision beit2.pth   start from published encoders (weights.py)
    python train.py --no-parallel_text --out out/ablation       image-text alone: what the parallel text is worth
    python train.py --explain                                   one example through every station, with real numbers
    python train.py --images 'cc3m/*.tar' --texts 'wikimatrix/*.tsv' --tokenizer spm.model      your data: docs/data.md

One step is one image-text batch and one parallel-text batch through one model, the sum of both streams' losses, one
backward and one update. out/ receives ckpt.pt, log.csv (one row per step) and results.json.

Resume, the policy:
  1. If OUT/ckpt.pt exists, the same command continues from it; a finished run only evaluates. --fresh starts over.
  2. Settings that change the result must be those of the checkpoint, else exit status 2, naming the first that differs.
  3. log.csv is cut back to the checkpoint's step, so that no step stands there twice.
  4. Promised: bitwise the same weights, optimizer and log (but for timing and memory) as the uninterrupted run, on the
     same machine, number of processes and of threads. Not promised: bitwise equality on another number of either.
  5. A checkpoint is written beside its place and renamed: a kill at any moment leaves the old or new one, never half.

Letters: B examples per process, W processes, N = W*B per step, V vocabulary.
"""
import argparse
import csv
import datetime
import functools
import json
import math
import os
import pathlib
import platform
import re
import resource
import signal
import sys
import time
import warnings
from dataclasses import asdict, fields
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import data
import evaluate
from formats.checkpoints import read_checkpoint, write_checkpoint
from formats.images import normalise
from formats.sources import BadRecords
from kernels.packed import offsets
from losses import MaskedText, Options, all_reduce, cross_view, world
from model import PRESETS, Config, View, parameter_groups
from weights import starting_point

# ------------------------------------------------------------------------------------------------------------------
# Settings (the FREE ones may differ on resume)
# ------------------------------------------------------------------------------------------------------------------

FREE = {"out", "stop_after", "save_every", "log_every", "keep", "fresh", "eval", "explain", "workers", "compile",
        "cache"}
AT_LEAST_1 = ("steps", "batch", "text_batch", "log_every", "save_every", "chunk", "stop_after")
LIMITS = {**dict.fromkeys(AT_LEAST_1, (1, math.inf)), "seed": (0, 2 ** 40), "mask_probability": (0, 1),
          "keywords": (0, 1), "dropout": (0, 0.999), "lr": (1e-12, 1e6), "clip": (1e-12, 1e12)}      # others: from 0
CHOICES = {"vision": ("vit", "beit2", "clip"), "pool": ("first", "mean")}


def settings(argv=None):
    """The command line. Every field of model.Config is a flag too."""
    style = type("Help", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {})
    parser, on_off = data.Arguments(description=__doc__, formatter_class=style), argparse.BooleanOptionalAction
    run = parser.add_argument_group("run")
    run.add_argument("--out", default="out", help="folder for ckpt.pt, log.csv and results.json")
    run.add_argument("--steps", type=int, default=1500, help="length of the schedule")
    run.add_argument("--stop_after", type=int, metavar="N", help="stop cleanly after step N of the same schedule")
    run.add_argument("--seed", type=int, default=0, help="of weights, data and dropout")
    run.add_argument("--save_every", type=int, default=500, help="steps between checkpoints; the last is always saved")
    run.add_argument("--keep", type=int, default=0, help="earlier checkpoints to keep as ckpt_STEP.pt")
    run.add_argument("--log_every", type=int, default=50, help="steps between printed lines")
    run.add_argument("--fresh", action="store_true", help="start over although OUT holds a checkpoint")
    run.add_argument("--eval", action=on_off, default=True, help="evaluate on the demo's test sets at the end")
    run.add_argument("--explain", action="store_true", help="show one example at every station and exit")
    run.add_argument("--workers", type=int, default=1, help="helpers of each process that prepare batches")
    run.add_argument("--checkpointing", action="store_true", help="keep no activations in layers: slower, less memory")
    run.add_argument("--chunk", type=int, metavar="N", help="gradient cache: N sequences at a time, exact gradients")
    run.add_argument("--compile", action="store_true", help="torch.compile the two encoders and the fusion encoder")
    what = parser.add_argument_group("data and losses")
    what.add_argument("--data", default="demo", choices=["demo"], help="the built-in emoji, where no files are given")
    what.add_argument("--images", nargs="+", metavar="FILES", help="images with captions: files, folders, globs")
    what.add_argument("--texts", nargs="+", metavar="FILES", help="parallel text; 'demo' here or there: the built-in")
    what.add_argument("--tokenizer", metavar="FILE", help="sentencepiece model: XLM-R's, or data.py tokenizer's")
    what.add_argument("--languages", nargs="+", help="only these languages of the files")
    what.add_argument("--image_root", metavar="DIR", help="folder of images named by JSON lines; None: the file's own")
    what.add_argument("--cache", metavar="DIR", help="folder for indices of the files; None: beside the files")
    what.add_argument("--batch", type=int, default=128, help="image-caption pairs per step, all processes together")
    what.add_argument("--text_batch", type=int, default=128, help="sentence pairs per step")
    what.add_argument("--scenes", type=float, default=0.25, help="demo: scenes per single emoji")
    what.add_argument("--text_scenes", type=float, default=0.2, help="demo: the same in the parallel text")
    what.add_argument("--keywords", type=float, default=0.1, help="demo: share of single emoji captioned by keywords")
    what.add_argument("--mask_probability", type=float, default=0.15, help="share of words hidden; the paper's is 0.4")
    what.add_argument("--parallel_text", action=on_off, default=True, help="train on the second stream")
    what.add_argument("--match", action=on_off, default=True, help="the match loss")
    what.add_argument("--condition", action=on_off, default=True, help="masked words look at the other view")
    for name in ("contrast", "match", "mask"):
        what.add_argument(f"--{name}_weight", type=float, default=1.0, help="weight of the loss")
    how = parser.add_argument_group("optimizer")
    how.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    how.add_argument("--fusion_lr", type=float, default=2.0, help="rate of fusion encoder and match head, times --lr")
    how.add_argument("--temperature_lr", type=float, default=3e-4, help="peak rate of the temperature")
    how.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    how.add_argument("--weight_decay", type=float, default=0.01, help="AdamW's, not on vectors")
    how.add_argument("--clip", type=float, default=1.0, help="global gradient norm")
    model = parser.add_argument_group("model")
    model.add_argument("--preset", default="demo", choices=PRESETS, help="model size")
    model.add_argument("--init", metavar="CKPT", help="start from its weights, tokenizer and model settings")
    model.add_argument("--init_text", metavar="PATH", help="start from XLM-R, its file or folder (weights.py)")
    model.add_argument("--init_vision", metavar="PATH", help="start from BEiT-2, DeiT, ViT or CLIP (weights.py)")
    for field in fields(Config):
        if field.name != "vocabulary":
            kind = {"action": on_off} if field.type is bool else {
                "type": field.type, "choices": CHOICES.get(field.name)}
            model.add_argument(f"--{field.name}", **kind, help="None: the preset's")
    return parser.parse_args(argv)


def check(args):
    """ValueError on values that cannot work; weights.starting_point checks the sizes of the model."""
    for name, value in vars(args).items():
        low, high = LIMITS.get(name, (0, math.inf))
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise ValueError(f"--{name} {value} must be at least {low}" + f" and at most {high:g}" * (high < math.inf))
    if pathlib.Path(args.out).is_file():
        raise ValueError(f"--out {args.out} is a file, not a folder")
    for name in ("batch", "text_batch"):
        if getattr(args, name) % world()[1]:
            raise ValueError(f"--{name} {getattr(args, name)} is not a multiple of {world()[1]} processes")
    if args.shared_fusion is False and not args.parallel_text:
        raise ValueError("--no-shared_fusion needs parallel text: the second fusion encoder reads nothing else")
    if args.texts and not args.images:
        raise ValueError("--texts needs --images too: FILES, or demo for the built-in ones")


# ------------------------------------------------------------------------------------------------------------------
# Set-up
# ------------------------------------------------------------------------------------------------------------------

def start_processes():
    """Joins torchrun's process group where there is one -> device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))     # rank 0 evaluates
        warnings.filterwarnings("ignore", "Grad strides do not match")         # 1 x 1 convolutions: strides of size 1
    return device


def precision(device):
    """bf16 where the hardware multiplies it, else fp32 -> (dtype, reason)."""
    if device.type == "cuda":
        return torch.bfloat16, "CUDA"
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in flags:
            return torch.bfloat16, f"the CPU has {flag}"
    return torch.float32, "this CPU has neither amx_bf16 nor avx512_bf16"


@functools.cache
def peak_flops(device):
    """What this device's matrix product reaches in the training precision, measured: 2048^3, best of five -> FLOP/s."""
    dtype, best = precision(device)[0], float("inf")
    x = torch.ones(2048, 2048, device=device, dtype=dtype)                   # randn would move dropout's generator
    for _ in range(5):
        start = time.perf_counter()
        (x @ x).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 ** 3 / best


class Objective(nn.Module):
    """Both streams' losses in one forward, so that DDP sees one forward and one backward."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args
        self.weights = {"contrast": args.contrast_weight, "match": args.match_weight if args.match else 0.0,
                        "mask": args.mask_weight}

    def forward(self, image, pair, seed):
        """One step's batches (data.Batches) -> {"image": losses, "text": losses, "loss": their sum}."""
        model = self.model
        batches = [image["b"], image["b"]._replace(token_ids=image["masked"].token_ids)]
        if pair:
            batches += [pair["a"], pair["b"], pair["b"]._replace(token_ids=pair["masked"].token_ids)]
        caption, hidden, *texts = self.encode(batches)
        picture = model.encode_image(normalise(image["images"]), image["ids"])
        options = Options(self.weights, condition=self.args.condition)
        masked = MaskedText(hidden.states, image["masked"].positions, image["masked"].labels)
        losses = {"image": cross_view(model, picture, caption, masked, seed, options=options)}
        if pair:
            a, b, hidden = texts
            masked = MaskedText(hidden.states, pair["masked"].positions, pair["masked"].labels)
            losses["text"] = cross_view(model.for_parallel_text(), a._replace(ids=pair["ids"]), b, masked, seed + 1,
                                        options=options)
        return losses | {"loss": sum(stream["loss"] for stream in losses.values())}

    def encode(self, batches):
        """Several packed batches of sentences in ONE pass of the text encoder: one look-up, one embedding gradient."""
        words = torch.cat([s.token_ids for s in batches])
        lengths = torch.cat([s.starts.diff() for s in batches])
        view = self.model.encode_text(words, offsets(lengths), lengths)
        states = view.states.split([len(s.token_ids) for s in batches])
        vectors = view.vectors.split([len(s.starts) - 1 for s in batches])
        return [View(x, s.starts, v, None) for x, s, v in zip(states, batches, vectors)]


def lr_at(step, args):
    """Share of the peak rate: linear warm-up, then linear to 0 (F4.2)."""
    return min((step + 1) / max(1, args.warmup), (args.steps - step) / max(1, args.steps - args.warmup))


def stem_flops(patches, size):
    """FLOPs of the convolutions on one image, forward and backward: 6 per weight and place."""
    flops = 0
    for conv in (module for module in patches.modules() if isinstance(module, nn.Conv2d)):
        size //= conv.stride[0]
        flops += 6 * conv.weight.numel() * size ** 2
    return flops


def step_flops(objective, images, words, fused, rows, hidden):
    """FLOPs of a step, forward and backward: of convolutions, and 6 per weight and token of everything linear. Products
    of attention are left out (a few %)."""
    m, size = objective.model, lambda module: sum(p.numel() for p in module.parameters() if p.ndim >= 2)
    last, patches = size(m.fusion.layers[-1]), (m.config.image_size // m.config.patch_size) ** 2
    return images * stem_flops(m.vision.patches, m.config.image_size) + 6 * (
        images * patches * size(m.vision.layers) + words * size(m.text.layers) + fused * (size(m.fusion) - last)
        + rows * last + hidden * m.mlm_head.weight.numel())


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------------------------

def save(run, step, args):
    """All processes call it; the first writes."""
    rank, W = world()
    rng = [torch.get_rng_state()]
    if W > 1:
        rng = [None] * W
        dist.all_gather_object(rng, torch.get_rng_state())
    if rank == 0:
        config = {"model": asdict(run.objective.model.config), "train": vars(args), "records": run.records}
        write_checkpoint(run.path, {
            "model": run.objective.model.state_dict(), "optimizer": run.optimizer.state_dict(), "step": step,
            "rng": rng, "config": config, "tokenizer": run.tokenizer.model}, args.keep)


def compare(args, saved, path):
    """Policy 2: ValueError that names the first setting that differs from the checkpoint's."""
    for name, value in vars(args).items():
        if name not in FREE and saved.get(name) != value:
            raise ValueError(f"{path} was trained with --{name} {saved.get(name)}, not {value}: repeat that setting, "
                             f"choose another --out, or start over with --fresh")


class Log:
    """out/log.csv: a row per step, written at once, cut back to `step` on resume (policy 3). Only rank 0 writes."""
    COLUMNS = ["step", "lr", "loss", *(f"{s}_{n}" for s in ("image", "text") for n in ("contrast", "match", "mask")),
               "temperature", *(f"norm_{t}" for t in ("all", "vision", "text", "fusion", "heads")), "skipped",
               "bad_records", "cut",
               "seconds", "images_per_s", "sentences_per_s", "utilisation", "memory_mb"]  # timing, memory: not bitwise

    def __init__(self, path, step):
        self.path, rows = path, []
        if path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["step"] and int(row["step"]) <= step]
        self.file = open(path, "w", newline="")
        self.writer = csv.DictWriter(self.file, self.COLUMNS)
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.file.flush()

    def write(self, row):
        self.writer.writerow(row)
        self.file.flush()


# ------------------------------------------------------------------------------------------------------------------
# One step
# ------------------------------------------------------------------------------------------------------------------

def to_device(batch, device):
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, list):
        return [to_device(x, device) for x in batch]
    return batch if batch is None else type(batch)(*(to_device(x, device) for x in batch))       # Sentences, Masked


def tower_norms(objective):
    """Gradient norms {"all", "vision", "text", "fusion", "heads"}; never under 0, nan where a gradient is."""
    towers = {"vision": [], "text": [], "fusion": [], "heads": []}
    for name, p in objective.named_parameters():
        part = name.removeprefix("model.").split(".")[0]
        towers[{"text_fusion": "fusion"}.get(part, part) if part in (*towers, "text_fusion")
               else "heads"].append(p.grad)
    norms = {name: nn.utils.get_total_norm(grads) for name, grads in towers.items()}
    return {"all": torch.stack(list(norms.values())).norm()} | norms


def train_step(wrapped, objective, optimizer, batch, step, args, autocast, stopping, told):
    """Forward, backward, update -> (row for the log, was it skipped, shall we stop, are too many records bad). Every
    process decides the same. told: bad records, cut sentences, are there too many bad ones?"""
    image, pair = batch
    factor = lr_at(step, args)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    with torch.no_grad():
        objective.model.temperature.clamp_(0.001, 0.5)
    with autocast:
        losses = wrapped(image, pair, seed=(args.seed * 1_000_003 + step) * 2)
    optimizer.zero_grad()
    losses["loss"].backward()
    norms = tower_norms(objective)
    flags = torch.stack([(~torch.isfinite(losses["loss"]) | ~torch.isfinite(norms["all"])).float(),
                         *torch.tensor([bool(stopping), told[2]], device=norms["all"].device).float()])
    skipped, stop, spoiled = all_reduce(flags, "MAX").tolist()
    if not skipped and not spoiled:
        nn.utils.clip_grads_with_norm_(objective.parameters(), args.clip, norms["all"])
        optimizer.step()
    names = [(s, n) for s in ("image", "text") if s in losses for n in ("contrast", "match", "mask")]
    values = torch.stack([losses["loss"]] + [losses[s][n] for s, n in names]) / world()[1]
    *values, bad, cut = all_reduce(torch.cat([values, values.new_tensor(told[:2])])).tolist()       # one all-reduce
    row = {"step": step + 1, "lr": args.lr * factor, "loss": values[0], "bad_records": int(bad), "cut": int(cut),
           "temperature": objective.model.temperature.item(),
           **{f"{s}_{n}": v for (s, n), v in zip(names, values[1:])},
           **{f"norm_{k}": v.item() for k, v in norms.items()}}
    return row, bool(skipped), bool(stop), bool(spoiled)


# ------------------------------------------------------------------------------------------------------------------
# The run, from start to finish
# ------------------------------------------------------------------------------------------------------------------

def say(text):
    if world()[0] == 0:
        tqdm.write(text)
        sys.stdout.flush()


def prepare(args, device):
    """All a run needs, new or from a checkpoint -> SimpleNamespace(objective, optimizer, tokenizer, step, batches)."""
    out, (rank, W) = pathlib.Path(args.out), world()
    path = out / "ckpt.pt"
    state = read_checkpoint(path) if path.exists() and not args.fresh else None
    if state and not args.explain:
        compare(args, state["config"]["train"], path)
    torch.manual_seed(args.seed)
    model, tokenizer, start = starting_point(path, state, vars(args))
    say(f"{path}: {state['step']} of {args.steps} steps are done" if state else f"start: {start}")
    objective = Objective(model, args).to(device)
    fusion = [name for name, _ in objective.named_parameters() if "fusion" in name or "itm_head" in name]
    groups = parameter_groups(objective, args.lr, args.weight_decay, fusion, args.fusion_lr, args.temperature_lr)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)     # F4.1
    torch.manual_seed(args.seed * 1_000_003 + rank)                          # dropout differs between processes
    if state:
        optimizer.load_state_dict(state["optimizer"])
        if len(state["rng"]) == W:
            torch.set_rng_state(state["rng"][rank])
    model.chunk = args.chunk
    for layer in objective.modules():                                        # the unshared fusion encoder's too
        layer.checkpointing = args.checkpointing
    if args.compile:
        for part in (model.vision, model.text, model.fusion):
            part.compile(dynamic=True)
    images, parallel = data.streams(args, model.config.image_size)
    records = [len(images), len(parallel or ())]
    if state and state["config"].get("records", records) != records:
        say(f"the data changed: {state['config']['records']} records then, {records} now, from here on in a new order")
    batches = data.Batches(tokenizer, images, parallel, args.batch, args.text_batch, args.seed, rank, W,
                           mask_probability=args.mask_probability)
    return SimpleNamespace(objective=objective, optimizer=optimizer, tokenizer=tokenizer, batches=batches,
                           records=records, step=state["step"] if state else 0, path=path)


def outlive_sigterm(worker):     # a SIGTERM to the process group is for the loop: workers stay until it saved and ended
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def prepared(loader):
    """Its batches. Workers end here also after an error: they ignore SIGTERM, so Python's end would wait for ever."""
    batches = iter(loader)
    try:
        yield from batches
    finally:
        if loader.num_workers:
            batches._shutdown_workers()


def train(args, device, run):
    """The loop, from run.step to the end (or --stop_after, or SIGTERM) -> the last step done."""
    last = min(args.steps, args.stop_after or args.steps)
    if run.step >= last:
        return run.step
    W, objective, step = world()[1], run.objective, run.step
    wrapped = nn.parallel.DistributedDataParallel(objective) if W > 1 else objective
    dtype, reason = precision(device)
    peak = peak_flops(device)
    say(f"{sum(p.numel() for p in objective.parameters()):,} parameters, vocabulary {run.tokenizer.size:,}, "
        f"{W} process(es), {device}, {torch.get_num_threads()} threads, {dtype} because {reason}, "
        f"matrix products reach {peak / 1e9:.0f} GFLOP/s")
    log = Log(pathlib.Path(args.out) / "log.csv", step) if world()[0] == 0 else None
    stopping = []
    before = signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    loader = torch.utils.data.DataLoader(
        run.batches, batch_size=None, sampler=range(step, last), num_workers=args.workers,
        prefetch_factor=4 if args.workers else None, pin_memory=device.type == "cuda",
        generator=torch.Generator(), worker_init_fn=outlive_sigterm)         # generator: else it draws from dropout's
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    bar = tqdm(total=args.steps, initial=step, disable=world()[0] > 0 or not sys.stderr.isatty(), unit="step")
    objective.train()
    bad_records, skipped, in_a_row, clock = BadRecords(world()[0]), 0, 0, time.perf_counter()
    for batch in prepared(loader):
        *batch, stats = batch
        bad, too_many = bad_records.count(stats["bad_records"])
        told = bad, stats["cut"], too_many
        batch = to_device(batch, device)
        row, skip, stop, spoiled = train_step(wrapped, objective, run.optimizer, batch, step, args, autocast, stopping,
                                              told)
        if spoiled:
            save(run, step, args)
            raise ValueError(f"{bad_records.message()}; saved {run.path} at step {step}")
        step, skipped, in_a_row = step + 1, skipped + skip, in_a_row + 1 if skip else 0
        now = time.perf_counter()
        row |= {"skipped": skipped} | speed(objective, batch, now - clock, peak)
        clock = now
        if log:
            log.write(row)
        if step % args.log_every == 0 or step == last or skip:
            say(line(row, args, math.log(run.tokenizer.size)))
        bar.update()
        if in_a_row == 10:
            raise ValueError(f"loss or gradient was not finite in steps {step - 9} to {step}: lower --lr; "
                             f"the last batch held {run.tokenizer.pieces(batch[0]['b'].token_ids[:20])} ...")
        if step % args.save_every == 0 or step == last or stop:
            save(run, step, args)
        if stop or step == last < args.steps:
            say(f"{'SIGTERM' if stop else '--stop_after'}: saved {run.path} at step {step}; the same command continues")
            break
    signal.signal(signal.SIGTERM, before)
    bar.close()
    return step


def speed(objective, batch, seconds, peak):
    """Throughput of one step on all processes, and the share of the measured matrix-product speed that it used."""
    image, pair = batch
    streams = [image, pair] if pair else [image]
    words = sum(len(s.token_ids) for x in streams for s in (x["b"], x["masked"])) + (len(pair["a"].token_ids) if pair else 0)
    fused, hidden = 4 * sum(len(x["b"].token_ids) for x in streams), sum(len(x["masked"].positions) for x in streams)
    rows = 3 * sum(len(x["ids"]) for x in streams) + hidden
    flops = step_flops(objective, len(image["ids"]), words, fused, rows, hidden)
    sentences = world()[1] * len(pair["ids"]) if pair else 0
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if platform.system() == "Darwin" else 2 ** 10)
    memory = torch.cuda.max_memory_allocated() / 2 ** 20 if torch.cuda.is_available() else held
    return {"seconds": f"{seconds:.4f}", "images_per_s": f"{world()[1] * len(image['ids']) / seconds:.1f}",
            "sentences_per_s": f"{sentences / seconds:.1f}", "utilisation": f"{flops / seconds / peak:.3f}",
            "memory_mb": f"{memory:.0f}"}


def line(row, args, blind):
    """One printed line; each loss beside its know-nothing value."""
    streams = [f"{s}: contrast {row[s + '_contrast']:.2f}/{math.log(n):.2f} match {row[s + '_match']:.3f}/0.637 mask "
               f"{row[s + '_mask']:.2f}/{blind:.2f}" for s, n in (("image", args.batch), ("text", args.text_batch))
               if s + "_contrast" in row]
    return (f"step {row['step']:5}/{args.steps} | {' | '.join(streams)} | gradient {row['norm_all']:.2f} | "
            f"{float(row['images_per_s']):.0f} images/s {float(row['sentences_per_s']):.0f} pairs/s, "
            f"{100 * float(row['utilisation']):.0f} % of peak, {row['memory_mb']} MB")


def finish(args, device, run, step):
    """Evaluates a finished run on the demo's test sets -> out/results.json and the table; rank 0 works, others wait."""
    if args.images and world()[0] == 0:
        say(f"step {step} of {args.steps} is done, {run.path} and log.csv are written; to measure recall: "
            f"python evaluate.py retrieval --ckpt {run.path} --data FILE")
    elif step == args.steps and args.eval and world()[0] == 0:
        say("evaluating on the test sets ...")
        report = evaluate.demo_report(run.objective.model, run.tokenizer, progress=sys.stderr.isatty())
        pathlib.Path(args.out, "results.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        evaluate.print_table(report)
        say(f"\nwrote {args.out}/ckpt.pt, log.csv and results.json; try: "
            f'python search.py --ckpt {args.out}/ckpt.pt --images DIR "a dog"')


def main(argv=None):
    """-> exit status: 0, or 2 after one line about what was wrong with the input."""
    args = settings(argv)
    try:
        device = start_processes()
        check(args)
        if not args.explain:
            pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
        run = prepare(args, device)
        if args.explain:
            image, *_ = run.batches[0]
            evaluate.explain(run.objective.model.eval(), run.tokenizer, to_device(image, device))
        else:
            finish(args, device, run, train(args, device, run))
        status = 0
    except (RuntimeError, ConnectionError) as error:                         # torch's words for a process that died
        if not re.search(r"(?i)worker \(pid|closed by peer|reset by peer|broken pipe|timed out|nccl", str(error)):
            raise
        status = data.fail(f"another process of this run died ({' '.join(str(error).split())[:160]}); the same "
                              f"command continues from {args.out}/ckpt.pt")
    except (ValueError, OSError) as error:
        status = data.fail(error)
    if dist.is_initialized():
        if not status:
            dist.barrier()
            dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)      # not by Python's own end: gloo's threads outlive the group under DDP and can abort in it
    return status


if __name__ == "__main__":
    sys.exit(main())
