"""Train CCLM.

    python train.py                                         the demo: emoji, 21 languages, minutes
    torchrun --nproc_per_node=8 train.py --preset base ...  the published recipe on eight GPUs
    python train.py --images 'cc3m/*.tar' --texts 'wiki/*.tsv' --tokenizer spm.model   your data
    python train.py --init ckpt.pt --out out/more           start from a checkpoint
    python train.py --no-parallel_text --out out/ablation   what the parallel text is worth
    python train.py --explain                               one example through every station
    python train.py --benchmark --preset base               what a step costs on this machine
    python train.py --task xvnli --init ckpt.pt --data ROOT --image_root DIR       fine-tuning

A preset is a model and its recipe (model.py: PRESETS, RECIPES); a flag overrides one value. One
step is one image-text batch and one parallel-text batch through one model: the sum of both streams'
losses, one backward pass, one update. out/ receives ckpt.pt, log.csv (one row per step) and
results.json.

Resume, the policy:
  1. If OUT/ckpt.pt exists, the same command continues from it; a finished run only evaluates.
     --fresh starts over: what the earlier run wrote is moved to OUT/before_DATE.
  2. Settings that change the result must be those of the checkpoint, else exit status 2, naming the
     first that differs. Files may move: of a path only its last name counts, and --image_root not
     at all. Another number of records is told, and the order is a new one from there on.
  3. log.csv is cut back to the checkpoint's step, so that no step stands there twice. Rows that are
     not whole, as a power cut leaves them, are dropped.
  4. Promised: bitwise the same weights, optimizer and log (but for timing and memory) as the
     uninterrupted run, on the same machine, number of processes and of threads. Not promised:
     bitwise equality on another number of either.
  5. A checkpoint is written beside its place and renamed: a kill at any moment leaves the old or
     the new one, never half of one. --keep counts and deletes only what this run wrote.
  6. No generator has a state to save: every random number is drawn from (seed, step, process) or
     (seed, epoch, index).
  7. Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and a closed stdout (| head) save at the step at hand and end
     the run. A second Ctrl-C ends it at once. Two runs never write into one OUT.

Fine-tuning on a benchmark (tasks/) is the same loop with another objective. It validates on
English, keeps the best weights in OUT/best.pt, and tests these. --init best.pt --few_shot ar,48
goes on with few examples in another language.

The file in its order: flags and recipe; the objectives (what a step minimises and what a run is
judged by); one step; checkpoint and log; the run from start to finish. To read the training alone:
Pretraining.forward, train_step, train.

Letters: B examples per process, W processes, N = W*B per step, V vocabulary.
"""
import argparse
import contextlib
import csv
import datetime
import json
import math
import multiprocessing.queues
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from statistics import fmean
from typing import NamedTuple

try:
    import fcntl
except ImportError:                                             # Windows
    fcntl = None

# Every step has other lengths, which breaks CUDA's memory into pieces; these can be joined again.
# torch reads this when it is imported.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import benchmark
import data
import evaluate
from demo import emoji
from explain import explain
from formats.checkpoints import keep_earlier, read_checkpoint, write_checkpoint
from formats.images import normalise
from formats.sources import BadRecords, parse_all
from kernels.packed import offsets
from losses import MaskedText, Options, all_reduce, cross_view, translation_lm, world
from model import (PRESETS, RECIPE, RECIPE_SOURCES, RECIPES, Config, View, inference_context,
                   training_dtype)
from optimizer import OPTIMIZERS, parameter_groups
from tasks import TASKS
from tasks.common import Examples
from weights import starting_point

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------

# These may differ when a run is resumed: they do not change its result (the last three: only by
# rounding, so that a run that is out of memory can go on with --checkpointing).
FREE = {"out", "stop_after", "save_every", "validate_every", "log_every", "keep", "fresh", "eval",
        "explain", "html", "benchmark", "full", "json", "workers", "processes", "cache",
        "image_root", "val", "max_bad", "compile", "checkpointing", "chunk"}
PATHS = {"images", "texts", "tokenizer", "init", "data"}        # of these the last names must agree
LOSSES = ("contrast", "match", "mask")
RECALLS = ("t2i_r1", "i2t_r1")                                  # of a validation
ON_OFF = argparse.BooleanOptionalAction


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help keeps the lines of the docstring above and ends every flag with its default."""


def settings(argv=None):
    """The command line -> argparse.Namespace. The preset's recipe gives the defaults."""
    # --preset is read first, by a parser that overlooks everything else: the defaults of the other
    # flags, which --help shows too, are those of its recipe.
    # A task changes some of them.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "task", "init"):
        first.add_argument(f"--{name}")
    known = first.parse_known_args(argv)[0]
    preset = known.preset or preset_of(known)
    values = RECIPES.get(preset, RECIPES["demo"])
    types = {name: type(value) for name, value in values.items()} | {"epochs": float}
    # Without a usage an error of argparse is one line.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help,
                                     allow_abbrev=False, usage=argparse.SUPPRESS)
    add_run_flags(parser.add_argument_group("run").add_argument)
    add_data_flags(parser.add_argument_group("data and losses").add_argument)
    add_model_flags(parser.add_argument_group("model and optimizer").add_argument)
    parser.set_defaults(preset=preset)
    if known.task in TASKS:
        task = TASKS[known.task]
        values = values | task.recipe_of(preset)
        parser.set_defaults(image_size=None if preset == "demo" else task.image_size)
    # RECIPE names the flags of a recipe and says what they mean; the types are those of the values.
    recipe = parser.add_argument_group("recipe: these defaults are the preset's")
    choices = {"optimizer": OPTIMIZERS}
    for name, value in values.items():
        recipe.add_argument(f"--{name}", type=types[name], default=value, help=RECIPE[name],
                            choices=choices.get(name))
    return parser.parse_args(argv)


def preset_of(known):
    """The preset where none is named: of a task that of its --init. A published model has none:
    its recipe is the published one."""
    if not known.task or not known.init:
        return "demo"
    try:
        return read_checkpoint(known.init, mmap=True)["config"]["train"].get("preset", "base")
    except (ValueError, OSError):                               # told when the run begins
        return "demo"


def add_run_flags(flag):
    flag("--out", default="out", help="folder for ckpt.pt, log.csv and results.json")
    flag("--stop_after", type=int, metavar="N", help="stop after step N of the same schedule")
    flag("--seed", type=int, default=0, help="of weights, data and dropout")
    flag("--keep", type=int, default=0, help="earlier checkpoints to keep as ckpt_STEP.pt")
    flag("--log_every", type=int, default=50, help="steps between printed lines")
    flag("--fresh", action="store_true", help="start over although OUT holds a checkpoint")
    flag("--eval", action=ON_OFF, default=True, help="evaluate on the demo's test sets at the end")
    flag("--explain", action="store_true", help="show one example at every station and exit")
    flag("--html", metavar="FILE", help="--explain writes a page too")
    flag("--benchmark", action="store_true", help="measure a step on random data and exit")
    flag("--full", action="store_true", help="--benchmark with the longest sentences")
    flag("--json", metavar="FILE", help="--benchmark writes its numbers too")
    flag("--checkpointing", action="store_true", help="keep no activations: slower, less memory")
    flag("--chunk", type=int, metavar="N", help="gradient cache: N images at a time")
    flag("--compile", action="store_true", help="torch.compile the encoders")


def add_data_flags(flag):
    flag("--task", choices=TASKS, help="fine-tune on this benchmark")
    flag("--data", metavar="ROOT", help="folder of the benchmarks' annotations (docs/data.md)")
    flag("--few_shot", metavar="LANG,N", help="on its file of N examples in this language")
    flag("--images", nargs="+", metavar="FILES", help="images with captions: files, folders, globs")
    flag("--texts", nargs="+", metavar="FILES", help="parallel text; demo: the built-in")
    flag("--tokenizer", metavar="FILE", help="sentencepiece model: XLM-R's, or data.py tokenizer's")
    flag("--languages", nargs="+", help="only these languages of the files")
    flag("--image_root", metavar="DIR", help="folder of images that JSON lines name")
    flag("--cache", metavar="DIR", help="folder for indices of the files; None: beside the files")
    flag("--held_out", type=int, default=0, metavar="N", help="own images for validation, about N")
    flag("--val", nargs="+", metavar="FILES", help="validate on these own images; not trained on")
    flag("--max_bad", type=float, default=0.01, help="share of bad records that stops no run")
    flag("--scenes", type=float, default=0.25, help="demo: scenes per single emoji")
    flag("--text_scenes", type=float, default=0.2, help="demo: the same in the parallel text")
    flag("--keywords", type=float, default=0.1, help="demo: share of captions that are keywords")
    flag("--parallel_text", action=ON_OFF, default=True, help="train on the second stream")
    flag("--match", action=ON_OFF, default=True, help="the matching loss")
    flag("--translation_lm", action="store_true", help="no match or masked LM for parallel text")
    flag("--condition", action=ON_OFF, default=True, help="masked tokens see the other view")
    for name in LOSSES:
        flag(f"--{name}_weight", type=float, default=1.0, help="weight of the loss")


def add_model_flags(flag):
    flag("--preset", choices=PRESETS, help="model and recipe")
    flag("--init", metavar="CKPT", help="start from its weights, tokenizer and model settings")
    flag("--weight_decay", type=float, default=0.01, help="not on vectors")
    flag("--clip", type=float, default=1.0, help="largest norm of the whole gradient")
    choices = {"vision": ("vit", "beit2", "clip"), "pool": ("first", "mean")}
    for field in fields(Config):
        if field.name == "vocabulary":                          # the tokenizer decides
            continue
        options = {"type": field.type, "choices": choices.get(field.name)}
        if field.type is bool:
            options = {"action": ON_OFF}
        flag(f"--{field.name}", **options, help="None: the preset's")


# Smallest and largest value of a flag; all other numbers must be at least 0.
LIMITS = {"seed": (0, 2 ** 40), "epochs": (1e-3, 1e6), "mask_probability": (0, 1),
          "subword_sampling": (0, 1),
          "keywords": (0, 1), "max_bad": (0, 1),
          "dropout": (0, 0.999), "lr": (1e-12, 1e6), "clip": (1e-12, 1e12),
          "caption_tokens": (3, math.inf), "sentence_tokens": (3, math.inf), "workers": (-1, 64)}
for name in ("steps", "batch", "text_batch", "log_every", "save_every", "chunk", "stop_after"):
    LIMITS[name] = (1, math.inf)


def check(args):
    """ValueError on values that cannot work; weights.starting_point checks the model's sizes."""
    for name, value in vars(args).items():
        low, high = LIMITS.get(name, (0, math.inf))
        if isinstance(value, (int, float)) and not low <= value <= high:
            upper = f" and at most {high:g}" if high < math.inf else ""
            raise ValueError(f"--{name} {value} must be at least {low}{upper}")
    if pathlib.Path(args.out).is_file():
        raise ValueError(f"--out {args.out} is a file, not a folder")
    for name in ("batch", "text_batch"):
        value, W = getattr(args, name), world()[1]
        if value % W:
            raise ValueError(f"--{name} {value} is not a multiple of {W} processes")
    if args.task and not (args.init and args.data):
        raise ValueError("--task needs --init CKPT, --data ROOT (annotations) and --image_root DIR "
                         "(docs/data.md, Benchmarks)")
    if args.task and (args.images or args.texts or args.val or args.held_out):
        raise ValueError("--task trains and validates on the benchmark's own data: leave --images, "
                         "--texts, --val and --held_out out")
    if not args.task and (args.data or args.few_shot):
        raise ValueError("--data and --few_shot are for a --task")
    if args.few_shot and (args.languages or "," not in args.few_shot):
        raise ValueError(f"--few_shot {args.few_shot}: give LANG,N, for example ar,48, and no "
                         f"--languages")
    if args.texts and not args.images:
        raise ValueError("--texts needs --images too: FILES, or demo for the built-in ones")
    if args.explain and (args.task or args.translation_lm):
        raise ValueError("--explain shows cross_view of both streams: leave --task and "
                         "--translation_lm out")
    if args.html and not args.explain:
        raise ValueError("--html is the page of --explain")
    check_benchmark(args)
    if args.held_out and args.val:
        raise ValueError("--held_out and --val are two ways to validate: choose one")
    if args.held_out and is_demo(args):
        raise ValueError("--held_out is for your own --images; the demo has a val split")


def check_benchmark(args):
    """ValueError on flags that make no sense with --benchmark, or only with it."""
    if not args.benchmark and (args.full or args.json):
        raise ValueError("--full and --json are for --benchmark")
    names = ("images", "texts", "val", "held_out", "tokenizer", "init", "task", "explain",
             "translation_lm")
    given = [f"--{name}" for name in names if getattr(args, name)]
    # DDP wants a gradient for every parameter, and images alone do not use its second encoder.
    if args.shared_fusion is False:
        given.append("--no-shared_fusion")
    if args.benchmark and given:
        raise ValueError(f"--benchmark measures a new model on random data: leave "
                         f"{' '.join(given)} out")
    data.check_target(args.json and pathlib.Path(args.json))


def recipe_lines(args, vocabulary):
    """What the run prints first: its recipe, and what was overridden."""
    def show(name, value):
        return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
    recipe = TASKS[args.task].recipe_of(args.preset) if args.task else RECIPES[args.preset]
    source = RECIPE_SOURCES[args.preset]
    if args.task:
        source = "for the demo's model" if args.preset == "demo" else "as published"
    given = vars(args)
    recipe = {name: given[name] if value is None else value for name, value in recipe.items()}
    changed = [show(name, given[name]) for name in recipe if given[name] != recipe[name]]
    for field in fields(Config):
        if given.get(field.name) is not None:
            changed.append(show(field.name, given[field.name]))
    if vocabulary != PRESETS[args.preset].vocabulary:
        changed.append(f"vocabulary {vocabulary} (the tokenizer's)")
    values = ", ".join(show(name, value) for name, value in recipe.items())
    lines = (f"recipe of {args.task or args.preset}, {source}: {values}",
             f"overridden: {', '.join(changed) or 'nothing'}")
    return "\n".join(textwrap.fill(text, 100, subsequent_indent="  ") for text in lines)


# --------------------------------------------------------------------------------------------------
# Set-up
# --------------------------------------------------------------------------------------------------

def start_processes():
    """Joins the process group of torchrun or launch_others where there is one -> device. Each
    process has a GPU of its own (nccl), or all share the CPU (gloo)."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "RANK" not in os.environ:
        raise ValueError("srun alone starts runs that know nothing of each other: use srun "
                         "--ntasks-per-node=1 torchrun ... (docs/gpus.md, SLURM)")
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "nccl"
    if "RANK" in os.environ:
        # Who waits longer in a step waits for a process that hangs. (Run.patient waits longer.)
        patience = datetime.timedelta(minutes=10)
        own = device if backend == "nccl" else None
        dist.init_process_group(backend, timeout=patience, device_id=own)
        # The strides of 1 x 1 convolutions differ only along dimensions of size 1.
        warnings.filterwarnings("ignore", "Grad strides do not match")
    return device


def launch_others(args):
    """Starts the other processes of a run on CPUs (--processes) and makes this one the first of
    them. Beside other programs, processes of one thread each wait less for each other's threads."""
    cores = os.cpu_count() or 1
    # Their number must divide both batches.
    count = math.gcd(min(args.processes, cores) or 1, args.batch, args.text_batch)
    known = {"RANK", "SLURM_STEP_NUM_TASKS"} & os.environ.keys()           # others start processes
    if count < 2 or args.explain or known or torch.cuda.is_available():
        return
    # A port that is free now. All processes meet there: torch reads these variables.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
                   "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(cores // count)}
    torch.set_num_threads(cores // count)
    for rank in map(str, range(1, count)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        # In a session of its own Ctrl-C does not reach it: this process tells it (train_step).
        subprocess.Popen([sys.executable, *sys.argv], env=os.environ | place,
                         start_new_session=True)
    os.environ["RANK"] = "0"


def worker_count(args):
    """--workers; -1: one fewer than the cores of this trainer, at most 8, on a GPU at least 1. A
    trainer with one core prepares its batches itself: a worker would only take the core from it."""
    if args.workers >= 0:
        return args.workers
    trainers = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = (os.cpu_count() or 1) // trainers
    return max(int(torch.cuda.is_available()), min(8, cores - 1))


# --------------------------------------------------------------------------------------------------
# The objective
# --------------------------------------------------------------------------------------------------

def chance_levels(args, vocabulary):
    """{name of a loss of pre-training: what a model that knows nothing gets}. A loss that stays
    there says that nothing is learned (README, "Is my run healthy?")."""
    chance = {}
    for stream, batch in (("image", args.batch), ("text", args.text_batch)):
        chance[f"{stream}_contrast"] = math.log(batch)
        chance[f"{stream}_match"] = 0.6365                      # entropy of 1 true : 2 false pairs
        chance[f"{stream}_mask"] = math.log(vocabulary)
    return chance


class Pretraining(nn.Module):
    """The losses of both streams in ONE forward, so that DDP sees one forward and one backward.

    An objective is all that the loop knows of a task:
        forward(image, text, seed)  -> (loss to minimise, {name: number to log})
        chance                      {name of a loss: what a model that knows nothing gets}
        validation                  columns of log.csv that validate() fills
        validate()                  -> {column: score} on data that are neither trained on nor test
        test()                      -> results.json of a finished run, after printing its table
        keeps_best                  is OUT/best.pt, the best of the validations, what a run is for?
    """
    keeps_best = False

    def __init__(self, model, tokenizer, args, validation_rows=None, languages=None):
        """validation_rows: a function that makes the rows to validate on, or None. languages: those
        "seen" with images and "text_only", for a score of each group; None: one score of all."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.weights = {name: getattr(args, f"{name}_weight") for name in LOSSES}
        if not args.match:
            self.weights["match"] = 0.0
        self.options = Options(self.weights, condition=args.condition)
        self.chance = chance_levels(args, tokenizer.size)
        self.validation = []
        if validation_rows:
            # Made when they are first needed.
            size = model.config.image_size
            self.validation_rows = cache(lambda: evaluate.small_rows(validation_rows(), size))
            self.languages = languages
            groups = evaluate.GROUPS if languages else ("all",)
            self.validation = [f"val_{group}_{key}" for group in groups for key in RECALLS]

    def forward(self, image, text, seed):
        """A step's batches (data.Batches) -> loss, {"image_contrast": ..., "temperature": ...}."""
        model = self.model
        with torch.no_grad():
            model.temperature.clamp_(0.001, 0.5)     # lower, the softmax saturates in bf16

        # All sentences of the step in one pass of the text encoder: one look-up, one gradient.
        sentences = [image["b"], masked_sentences(image)]
        if text:
            sentences += [text["a"], text["b"], masked_sentences(text)]
        caption, masked_caption, *parallel = self.encode(sentences)

        # Stream 1: an image and its caption are two views of one thing ...
        picture = model.encode_image(normalise(image["images"]), image["ids"])
        found = {"image": self.losses(model, picture, caption, masked_caption, image, seed)}
        # ... stream 2: so are a sentence and its translation. The loss function is the same.
        if text:
            a, b, masked_b = parallel
            a = a._replace(ids=text["ids"])
            found["text"] = self.losses(model.for_parallel_text(), a, b, masked_b, text, seed + 1)

        loss = sum(losses["loss"] for losses in found.values())
        numbers = {f"{stream}_{name}": losses[name].detach()
                   for stream, losses in found.items() for name in LOSSES}
        return loss, numbers | {"temperature": model.temperature.detach()}

    def encode(self, sentences):
        """Several packed batches -> their Views, by one call of the text encoder."""
        token_ids = torch.cat([s.token_ids for s in sentences])               # (T,) of all of them
        lengths = torch.cat([s.starts.diff() for s in sentences])
        view = self.model.encode_text(token_ids, offsets(lengths), None)
        states = view.states.split([len(s.token_ids) for s in sentences])     # (T, D) -> (T_k, D)
        vectors = view.vectors.split([len(s.starts) - 1 for s in sentences])  # (B, E) -> (B_k, E)
        return [View(x, s.starts, v, None) for x, s, v in zip(states, sentences, vectors)]

    def losses(self, model, a, b, masked_b, batch, seed):
        """cross_view of one stream, whatever its a is."""
        masked = MaskedText(masked_b.states, batch["masked"].positions, batch["masked"].labels)
        if "joined" in batch:
            return translation_lm(model, a, b, masked_b, masked, self.options)
        return cross_view(model, a, b, masked, seed, options=self.options)

    def validate(self):
        """Recall of the cosine, means by group of languages -> {"val_seen_t2i_r1": %, ...}."""
        rows = self.validation_rows()
        if not rows:
            raise ValueError("no record to validate on can be read: python data.py FILES")
        scores = evaluate.validation_scores(self.model, self.tokenizer, rows, self.languages)
        return {f"val_{group}_{key}": scores[group][key] for group in scores for key in RECALLS}

    def test(self):
        """Recall on the demo's test sets -> results.json."""
        report = evaluate.demo_report(self.model, self.tokenizer)
        evaluate.print_table(report)
        return report


class FineTuning(nn.Module):
    """A benchmark as an objective (see Pretraining): its loss, and its score on English. The task
    brings both (tasks/common.py); here they get the form that the loop asks for."""
    keeps_best = True

    def __init__(self, model, tokenizer, args, task, languages):
        """languages: of the pre-training, for the means of groups, or None."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.task = task
        self.languages = languages
        self.chance = task.chance(args.batch, tokenizer)
        self.validation = [f"val_{key}" for key in task.validation]

    def forward(self, batch, text, seed):
        """A step's batch -> loss, {name: number to log}. text: None, there is no second stream."""
        # As in pre-training: retrieval divides by it.
        with torch.no_grad():
            self.model.temperature.clamp_(0.001, 0.5)
        losses = self.task.losses(self.model, batch, seed, self.tokenizer)
        numbers = {name: loss.detach() for name, loss in losses.items()}
        temperature = self.model.temperature.detach()
        return sum(losses.values()), numbers | {"temperature": temperature}

    def validate(self):
        """The choice of a checkpoint is made in English, as IGLUE's is: languages that only the
        tests have are seen by nobody before."""
        scores = dict(evaluate.task_scores(self.task, self.model, self.tokenizer, "val", ["en"]))
        return {f"val_{key}": scores["en"][key] for key in self.task.validation}

    def test(self):
        """The test sets in the published languages -> results.json."""
        scores = dict(evaluate.task_scores(self.task, self.model, self.tokenizer, "test",
                                           self.task.languages))
        report = evaluate.task_report(self.task, scores, self.languages)
        evaluate.print_task(self.task, report)
        return report


def masked_sentences(batch):
    """The sentences b of a batch, or with translation LM a and b, with their masked tokens."""
    return batch.get("joined", batch["b"])._replace(token_ids=batch["masked"].token_ids)


def is_demo(args):
    """Are the images those of the demo? (data.streams decides in the same way.)"""
    return args.images in (None, ["demo"])


# --------------------------------------------------------------------------------------------------
# One step
# --------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """All that a run needs, new or from a checkpoint."""
    args: argparse.Namespace
    device: torch.device
    objective: nn.Module
    wrapped: nn.Module                  # the objective in DDP where there are several processes
    optimizer: torch.optim.Optimizer
    autocast: torch.autocast
    batches: data.Batches
    bad_records: BadRecords
    path: pathlib.Path                  # of ckpt.pt
    new: list                           # parameters that the files behind --init did not hold
    languages: dict                     # codes "seen" with images and in parallel "text_only"
    step: int = 0                       # steps done
    saved: int = 0                      # of these, steps in ckpt.pt
    skipped: int = 0                    # of these, steps without an update
    kept: tuple = ()                    # steps of this run's files ckpt_STEP.pt
    best: float = -math.inf             # score of best.pt
    signal: str = ""                    # the name of a signal that asks this process to stop
    waiting: bool = False               # may a signal end the wait for data?
    waited: float = 0.0                 # seconds that the last step waited for its data
    patient: object = None              # process group that waits for the first process


class Verdict(NamedTuple):
    """What all processes decide alike after a backward pass. They must: a process that alone skips
    an update has other weights from then on, and one that alone stops leaves the others waiting."""
    finite: bool                        # loss and gradient are: the weights may be updated
    stop: bool                          # some process got a signal
    too_many_bad: bool                  # some process read too many bad records


def to_device(batch, device):
    """A batch, whatever it is made of, with all its tensors on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    if batch is None:
        return None
    return type(batch)(*(to_device(value, device) for value in batch))       # Sentences, Masked


def lr_at(step, args):
    """Share of the peak rate at a step: it grows linearly to 1 in `warmup` steps, then falls
    linearly to 0 at the end of the schedule."""
    warmup = (step + 1) / max(1, args.warmup)
    decay = (args.steps - step) / max(1, args.steps - args.warmup)
    return min(warmup, decay)


def gradient_norms(objective):
    """{"norm_all", "norm_vision", ...}: norms of the gradient, scalars; nan where a gradient is."""
    # Parameters are called model.vision.layers.0.norm1.weight: the second word is the tower.
    towers = {"vision": [], "text": [], "fusion": [], "heads": []}
    for name, p in objective.named_parameters():
        tower = name.removeprefix("model.").split(".")[0].replace("text_fusion", "fusion")
        if p.requires_grad:
            towers.get(tower, towers["heads"]).append(p.grad)
    norms = {f"norm_{name}": nn.utils.get_total_norm(grads).to(p.device)
             for name, grads in towers.items()}                 # a frozen tower: 0, of the CPU
    return {"norm_all": torch.stack(list(norms.values())).norm()} | norms


def train_step(run, batch, stats, step):
    """Forward, backward, update -> (row of log.csv, Verdict). batch: [image, text]."""
    args = run.args
    batch = [to_device(stream, run.device) for stream in batch]
    rank, W = world()
    # 1. The rates of this step: every group has a peak of its own.
    factor = lr_at(step, args)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor

    # 2. Forward and backward, with DDP's mean of the processes' gradients.
    # Seeded anew at every step: dropout differs between steps and processes, and a resumed run
    # draws what the uninterrupted one drew. (2 * seed: the second stream draws with 2 * seed + 1.)
    seed = args.seed * 1_000_003 + step
    torch.manual_seed(seed * W + rank)
    run.optimizer.zero_grad()                    # frees the last gradient before activations come
    with run.autocast:
        loss, numbers = run.wrapped(*batch, seed=2 * seed)
    loss.backward()
    norms = gradient_norms(run.objective)

    # 3. All that processes must know of each other goes through ONE all-reduce and one wait for the
    # device. Every process then holds the same sums, so all of them decide alike.
    numbers = {"loss": loss.detach()} | numbers | norms
    bad, too_many = run.bad_records.count(stats["bad_records"])
    own = torch.tensor([bad, stats["cut"], bool(run.signal), too_many])
    own = own.to(loss, non_blocking=True)                       # the host does not wait for it
    sums = all_reduce(torch.cat([torch.stack(list(numbers.values())), own])).tolist()
    *values, bad, cut, stop, too_many = sums
    row = {name: value / W for name, value in zip(numbers, values)}           # means, see losses.py
    row |= {"step": step + 1, "lr": args.lr * factor, "bad_records": int(bad), "cut": int(cut)}
    finite = math.isfinite(row["loss"]) and math.isfinite(row["norm_all"])

    # 4. The update; none where a loss or a gradient is not finite, on any process.
    if finite and not too_many:
        nn.utils.clip_grads_with_norm_(run.objective.parameters(), args.clip, norms["norm_all"])
        run.optimizer.step()
    return row, Verdict(finite, stop > 0, too_many > 0)


# --------------------------------------------------------------------------------------------------
# Checkpoint and log
# --------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def claimed(folder):
    """Makes the folder of --out and locks it for this process. However the process ends, the system
    takes the lock back. ValueError where another run has it."""
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    with open(pathlib.Path(folder, "lock"), "w") as file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another run writes into {folder}: choose another --out") from None
        except OSError:                                         # a file system without locks
            pass
        yield


def set_aside(folder):
    """Moves what an earlier run wrote into a folder of its own (policy 1)."""
    place = folder / time.strftime("before_%Y-%m-%d_%H.%M.%S")
    for file in list(folder.iterdir()):
        if re.fullmatch(r"(ckpt(_\d+)?|best)\.pt|log\.csv|results\.json", file.name):
            place.mkdir(exist_ok=True)
            file.rename(place / file.name)


def save(run):
    """Writes the checkpoint (formats/checkpoints.py). All processes call it, the first writes."""
    if run.step == run.saved:
        return
    if world()[0] == 0:
        write(run)
    run.saved = run.step
    wait_for_first(run)


def write(run):
    """ckpt.pt, and of the earlier ones as many as --keep says."""
    keep = run.args.keep
    stale = []
    if keep and run.saved:
        # Policy 5: the checkpoint before this one gets a second name. Where that fails the run goes
        # on, and the new checkpoint is written all the same.
        try:
            keep_earlier(run.path, kept_path(run, run.saved))
            run.kept += (run.saved,)
        except OSError as error:
            say(f"the checkpoint of step {run.saved} is not kept: {error}")
        stale = run.kept[:-keep]
        run.kept = run.kept[-keep:]
    state = weights_of(run)
    state |= {"optimizer": run.optimizer.state_dict(), "skipped": run.skipped, "kept": run.kept,
              "best": run.best}
    write_checkpoint(run.path, state)
    for step in stale:
        kept_path(run, step).unlink(missing_ok=True)


def weights_of(run):
    """What of a checkpoint evaluate.py and --init read."""
    model = run.objective.model
    config = {"model": asdict(model.config), "train": vars(run.args), "new": run.new,
              "records": run.batches.records(), "languages": run.languages, "task": run.args.task}
    return {"model": model.state_dict(), "step": run.step, "config": config,
            "tokenizer": run.objective.tokenizer.model}


def wait_for_first(run):
    """Here the other processes wait while the first one writes, validates or evaluates."""
    if run.patient:
        dist.barrier(run.patient)


def kept_path(run, step):
    return run.path.with_name(f"ckpt_{step}.pt")


def compare(args, saved, path):
    """Policy 2: ValueError that names the first setting that differs from the checkpoint's. (A
    recipe that changed in the code is such a setting: an old run goes on only as it began.)"""
    for name, value in vars(args).items():
        before = saved.get(name)
        same = last_names(before) == last_names(value) if name in PATHS else before == value
        if name not in FREE and not same:
            raise ValueError(f"{path} was trained with --{name} {before}, not {value}: "
                             f"repeat that setting, choose another --out, or use --fresh")


def last_names(paths):
    """None, a path or several -> their last names, for example ["*.tar@en"]."""
    paths = [paths] if isinstance(paths, str) else paths or []
    return [pathlib.PurePath(path).name for path in paths]


class Log:
    """out/log.csv: a row per step, written at once, cut back to `step` on resume (policy 3).

    loss and one column for each loss of the objective: means over all processes. norm_*: of the
    gradient before it is clipped. skipped: steps without an update so far. bad_records, cut: of
    this step. The columns of a validation are filled at its steps only."""

    def __init__(self, path, step, objective):
        columns = ["step", "lr", "loss", *objective.chance, "temperature"]
        columns += [f"norm_{tower}" for tower in ("all", "vision", "text", "fusion", "heads")]
        columns += ["skipped", "bad_records", "cut"]
        columns += objective.validation
        columns += ["seconds", "images_per_s", "sentences_per_s", "data_wait",
                    "memory_mb"]                                # these differ from run to run
        self.validation = objective.validation
        self.best = (0.0, 0)                    # mean of a validation's recalls, its step
        rows = whole_rows(path, step) if path.exists() else []
        self.file = open(path, "w", newline="")
        self.writer = csv.DictWriter(self.file, columns, extrasaction="ignore")
        self.writer.writeheader()
        for row in rows:
            self.write(row)
        self.say_best()

    def write(self, row):
        self.writer.writerow(row)
        self.file.flush()
        recalls = [float(row[name]) for name in self.validation if row.get(name, "") != ""]
        if recalls:
            self.best = max(self.best, (fmean(recalls), int(row["step"])))

    def say_best(self):
        if self.best[1]:
            say("best validation so far: mean {:.1f} at step {}".format(*self.best))


def whole_rows(path, step):
    """The rows of a log.csv up to a step. A run that was killed logged steps that it did not save:
    they are done, and logged, again."""
    text = path.read_bytes().decode("utf-8-sig", "replace")     # Excel writes a byte order mark
    rows = []
    for row in csv.DictReader(text.replace("\0", "").splitlines()):
        whole = None not in row.values() and row.get("step", "").isdigit()
        if whole and int(row["step"]) <= step:
            rows.append(row)
    return rows


def speed(batch, seconds, waited):
    """Throughput of one step on all processes, how much of it (%) this process waited for data, and
    the most memory that it held."""
    W = world()[1]
    images, sentences = (W * len(stream["ids"]) if stream else 0 for stream in batch)
    memory = benchmark.peak_memory() / 2 ** 20
    return {"seconds": f"{seconds:.4f}", "images_per_s": f"{images / seconds:.1f}",
            "sentences_per_s": f"{sentences / seconds:.1f}",
            "data_wait": f"{100 * waited / seconds:.0f}", "memory_mb": f"{memory:.0f}"}


def line(row, run):
    """One printed line; each loss beside what a model that knows nothing gets."""
    parts = [f"step {row['step']:5}/{run.args.steps} |"]
    for name, chance in run.objective.chance.items():
        if name in row:
            parts.append(f"{name} {row[name]:.3g}/{chance:.3g}")
    parts.append(f"| gradient {row['norm_all']:.2f} | {float(row['images_per_s']):.0f} images/s "
                 f"{float(row['sentences_per_s']):.0f} pairs/s {row['memory_mb']} MB "
                 f"{row['data_wait']} % waiting for data")
    for name in run.objective.validation:
        if name in row:
            parts.append(f"{name} {row[name]:.1f}")
    return " ".join(parts)


# --------------------------------------------------------------------------------------------------
# The run, from start to finish
# --------------------------------------------------------------------------------------------------

def say(text):
    """Prints on rank 0, above the progress bar."""
    if world()[0] > 0:
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        if signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN:              # outside the loop
            raise
        leave_stdout()                          # SIGPIPE stops the loop: see signals_noted


def leave_stdout():
    """Once the reader of stdout has gone (| head): its buffer goes nowhere, stderr takes over."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = sys.stderr


def pace(seconds, left):
    """Seconds a step, and steps that are left -> a line about speed and end."""
    end = datetime.datetime.now() + datetime.timedelta(seconds=seconds * left)
    return f"{1 / seconds:.2f} steps a second, {left} steps to go: until {end:%a %d %b %H:%M}"


def learning_rate(args, task, new):
    """-> a function of a parameter's name -> its peak rate; 0: a part that a task does not use.

    An encoder that was trained before learns slowly, what is new fast: the published rates of the
    towers differ by a factor of four (docs/paper.md). new: names of parameters that the files
    behind --init did not hold."""
    towers = {"vision": args.vision_lr, "text": args.text_lr, "fusion": args.fusion_lr,
              "text_fusion": args.fusion_lr}

    def rate(name):
        name = name.removeprefix("model.")
        part = name.split(".")[0]
        if task and part in task.unused:
            return 0.0
        if name == "temperature":               # at the trunk's rate it hits its clamp in 30 steps
            return min(args.temperature_lr, args.lr)
        if part in towers:                      # as published, a tower's rate goes before --new_lr
            return args.lr * towers[part]
        if name in new or part == "task_head":
            return args.lr * args.new_lr
        return args.lr * (args.fusion_lr if part == "itm_head" else 1.0)
    return rate


def wrap(objective, args):
    """The objective as the loop calls it."""
    # 1. Ways to save memory or time; none changes the gradient (model.py says where they are read).
    model = objective.model
    model.chunk = args.chunk
    for layer in model.modules():
        layer.checkpointing = args.checkpointing
    if args.compile:
        for part in (model.vision, model.text, model.fusion):
            part.compile(dynamic=True)
    # 2. Several processes. Gradients are their own buckets, and the only buffers are constants: DDP
    #    need not copy either.
    if world()[1] == 1:
        return objective
    return nn.parallel.DistributedDataParallel(objective, forward_sync_buffers=False,
                                               gradient_as_bucket_view=True)


def precision(objective, device):
    """Weights and optimizer stay in float32; autocast casts the products' operands -> autocast."""
    dtype, reason = training_dtype(device)
    parameters = sum(p.numel() for p in objective.parameters())
    say(f"{parameters:,} parameters, {world()[1]} process(es), {device}, "
        f"{torch.get_num_threads()} threads, {dtype} because {reason}")
    return inference_context(device)


def prepare(args, device):
    """Builds everything that a run needs, new or from the checkpoint in --out -> Run. The checks of
    the command line come first, then what reads files, then what takes memory: a mistake is told
    before anybody waited."""
    rank, W = world()

    # 0. A benchmark's examples: how many there are decides about the schedule.
    task = TASKS[args.task](args.data, args.image_root, args.cache) if args.task else None
    examples = training_examples(args, task) if task else []
    if task:
        set_schedule(args, len(examples))
        task.check("val", ["en"])               # what is missing is told now, not after hours
        task.check("test", task.languages if args.eval else ())

    # 1. Weights: from the checkpoint in --out, else from --init, else random. mmap: several
    #    processes share the pages of one file and do not each hold a copy of it.
    path = pathlib.Path(args.out, "ckpt.pt")
    resumes = path.exists() and not (args.fresh or args.benchmark)
    state = read_checkpoint(path, mmap=True) if resumes else None
    if state and not args.explain:
        compare(args, state["config"]["train"], path)
    # Long before workers are forked: Python 3.11 can lock up a process that is forked while a
    # thread of gloo cleans up after Python's objects.
    if W > 1:
        check_steps(args, state)
    torch.manual_seed(args.seed)
    model, tokenizer, origin = starting_point(path, state, vars(args), task)
    say(recipe_lines(args, tokenizer.size))
    say(f"{path}: {state['step']} of {args.steps} steps are done" if state else f"start: {origin}")

    # 2. Data, and the objective that the loop minimises.
    if task:
        # Which languages had images is a matter of the pre-training.
        languages = (state or initial(args))["config"].get("languages")
        batches = finetuning_batches(args, model, tokenizer, task, examples)
        objective = FineTuning(model, tokenizer, args, task, languages)
    else:
        batches, validation_rows = make_batches(args, model, tokenizer)
        languages = survey(args, batches.streams, model.config.image_size)
        groups = None if args.held_out else languages
        objective = Pretraining(model, tokenizer, args, validation_rows, groups)
    objective = objective.to(device)

    # 3. Optimizer.
    new = new_parameters(args, state)
    groups = parameter_groups(objective, learning_rate(args, task, new), args.weight_decay)
    optimizer = OPTIMIZERS[args.optimizer](groups, betas=(0.9, 0.98), fused=True)
    if state:
        optimizer.load_state_dict(state["optimizer"])

    # 4. Ways to save memory or time, several processes, precision.
    wrapped = wrap(objective, args)
    autocast = precision(objective, device)
    run = Run(args, device, objective, wrapped, optimizer, autocast, batches,
              BadRecords(rank, args.max_bad), path, new, languages)
    if state:
        resume(run, state)
    if W > 1:
        run.patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=2))
    return run


def check_steps(args, state):
    """ValueError where two nodes do not see the same --out: one would resume, the other begin."""
    steps = [None] * world()[1]
    dist.all_gather_object(steps, state["step"] if state else 0)
    if len(set(steps)) > 1:
        raise ValueError(f"processes found checkpoints of steps {sorted(set(steps))} in "
                         f"{args.out}: it must be one folder that all nodes see")


def resume(run, state):
    """What a checkpoint says of the run itself."""
    run.step = run.saved = state["step"]
    run.skipped = state["skipped"]
    run.best = state.get("best", -math.inf)
    run.kept = state.get("kept", ())
    before = state["config"]["records"]
    now = run.batches.records()
    if before != now:
        say(f"the data changed: {before} records then, {now} now, from here on in a new order")


def new_parameters(args, state):
    """Names of what the published files behind --init did not hold (weights.py import lists it in
    its checkpoint). They have a rate of their own, also after a resume."""
    state = state or initial(args)
    return state["config"].get("new", []) if state else []


def initial(args):
    """The checkpoint of --init, or None. Its tensors are not read (mmap), only what stands beside
    them."""
    return read_checkpoint(args.init, mmap=True) if args.init else None


def set_schedule(args, examples):
    """The numbers of a fine-tuning that depend on how many examples there are: an epoch's length is
    when it validates and saves; a tenth of all steps is its warm-up, as published."""
    epoch = math.ceil(examples / args.batch)
    for name, value in (("steps", math.ceil(args.epochs * epoch)), ("save_every", epoch),
                        ("validate_every", epoch)):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.warmup is None:
        args.warmup = args.steps // 10


def training_examples(args, task):
    """What a fine-tuning trains on: English ("zero-shot" in the paper's tables, since the tests are
    in other languages), the sets of --languages together, or the file of --few_shot."""
    if not args.few_shot:
        languages = args.languages or ["en"]
        return [example for k in languages for example in task.examples("train", k)]
    language, _, count = args.few_shot.partition(",")
    return task.examples("train", language, few_shot=count)


def finetuning_batches(args, model, tokenizer, task, examples):
    """The one stream of a fine-tuning -> data.Batches."""
    dataset = Examples(task.checked(examples), model.config.image_size)
    stream = data.Stream(dataset, args.batch, min(args.caption_tokens, model.text.longest),
                         most_masked=0, max_bad=args.max_bad)
    say(f"{len(examples):,} examples: {args.steps} steps of {args.batch} are "
        f"{args.steps * args.batch / len(examples):.3g} epochs")
    return data.Batches(tokenizer, stream, None, args.seed, *world())


def survey(args, streams, size):
    """Says what the data are -> codes of the languages "seen" with images, and of those "text_only"
    in parallel text."""
    # Random data are in no language.
    if args.benchmark:
        return {}
    found = []
    for stream, kind in zip(streams, (f"images of {size} x {size} pixels", "pairs")):
        found.append(stream.dataset.languages() if stream else [])
        if stream:
            n = len(stream.dataset)
            text = (f"{n:,} {kind} in {' '.join(found[-1])}: {args.steps} steps of {stream.batch} "
                    f"are {args.steps * stream.batch / n:.3g} epochs")
            say(textwrap.fill(text, 100, subsequent_indent="  "))
    if is_demo(args):                       # the same groups with and without parallel text
        return {group: emoji.languages(group) for group in ("seen", "text_only")}
    return {"seen": found[0], "text_only": sorted(set(found[1]) - set(found[0]))}


def make_batches(args, model, tokenizer):
    """The two streams as the recipe wants them -> data.Batches, and what makes the rows to
    validate on: own files, the demo's val split, records held out of own files, or None."""
    if args.benchmark:
        images, texts = benchmark.datasets(args, model.config)
    else:
        images, texts = data.streams(args, model.config.image_size)
    validation_rows = partial(emoji.split, "val") if is_demo(args) else None
    if args.held_out:
        images = data.HeldOut(images, args.held_out)
        validation_rows = images.rows
    if args.val:
        parse_all(args.val)                 # refuses missing files now, not after hours
        validation_rows = partial(evaluate.evaluation_set, args.val, args.languages, args.cache,
                                  args.image_root)
    if texts is None and not model.config.shared_fusion:
        raise ValueError("--no-shared_fusion needs parallel text: nothing else reads by it")
    longest = model.text.longest            # no sentence is longer than the table of positions
    if longest < 3:
        raise ValueError(f"the position table has room for {max(longest, 0)} tokens, a sentence "
                         f"has at least 3: choose a larger --positions")
    image_stream = data.Stream(images, args.batch, min(args.caption_tokens, longest),
                               args.mask_probability, args.caption_masked, args.max_bad,
                               subword_sampling=args.subword_sampling)
    both = 2 if args.translation_lm else 1          # sentences that stand side by side
    text_stream = texts and data.Stream(texts, args.text_batch,
                                        min(args.sentence_tokens, longest // both),
                                        args.mask_probability, both * args.sentence_masked,
                                        args.max_bad, args.translation_lm,
                                        args.subword_sampling)
    batches = data.Batches(tokenizer, image_stream, text_stream, args.seed, *world())
    return batches, validation_rows


# SLURM sends the fourth before the first. The kernel sends the last when stdout is closed (| head).
STOP = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGPIPE")
STOP_SIGNALS = [getattr(signal, name) for name in STOP if hasattr(signal, name)]


@contextlib.contextmanager
def signals_noted(run):
    """A signal asks the run to save and stop after the step at hand. A second Ctrl-C ends it at
    once; but not under torchrun, which hands on what the terminal sent to all already."""
    # Only a name is noted here. The step at hand ends first: half a step cannot be resumed, and
    # all processes must save the same one (train_step tells them of each other's signals). A single
    # process that waits for data has no step at hand.
    def note(number, frame):
        run.signal = signal.Signals(number).name
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, signal.default_int_handler)
        if run.waiting:
            raise KeyboardInterrupt
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN or number != signal.SIGHUP:            # nohup stays nohup
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_worker(worker):
    """What a process that prepares batches does first."""
    # A signal to the whole process group is for the loop: workers stay until it has saved.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # Python drops a batch that cannot be sent, for example because shared memory is full, and the
    # loop would wait for it for ever. The death of a worker is noticed.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))
    # Errors of the data go to the loop. Else a thread of torch's tells that the loop has ended.
    sys.excepthook = lambda *_: None


def load(run, last):
    """Batches of the steps run.step .. last - 1, prepared by workers; fewer after a signal."""
    workers = worker_count(run.args)
    # A batch is an item of the dataset (batch_size=None), the number of the step its index: so
    # there is no state of an iterator to save. The generator is one of its own, as the loader
    # would else draw from the one that seeds dropout.
    loader = torch.utils.data.DataLoader(
        run.batches, batch_size=None, sampler=range(run.step, last), num_workers=workers,
        prefetch_factor=4 if workers else None, pin_memory=run.device.type == "cuda",
        generator=torch.Generator(), worker_init_fn=start_worker)
    batches = iter(loader)
    try:
        for _ in range(run.step, last):
            run.waiting = world()[1] == 1
            if run.waiting and run.signal:
                return
            begin = time.perf_counter()
            batch = next(batches)
            run.waited = time.perf_counter() - begin
            run.waiting = False
            yield batch
    except KeyboardInterrupt:                                   # of signals_noted
        return
    except (EOFError, ConnectionError, FileNotFoundError) as error:
        if not workers or "Traceback" in str(error):            # of the data, see data.fail
            raise
        # It died while torch fetched the tensors of a batch from it.
        raise RuntimeError("DataLoader worker (pid unknown) exited") from None
    finally:
        # Workers ignore the signal by which torch and Python would end them. torch reports the
        # first of these deaths too.
        run.waiting = False
        for worker in multiprocessing.active_children():
            with contextlib.suppress(RuntimeError):
                worker.kill()
                worker.join()


def train(run, step=train_step):
    """The loop, from run.step to the end, or to --stop_after, or to a signal. step: does one."""
    args = run.args
    last = min(args.steps, args.stop_after or args.steps)
    if run.step >= last:
        return
    first = world()[0] == 0                                     # all compute, this one writes
    if first and args.fresh:
        set_aside(run.path.parent)
    log = Log(run.path.with_name("log.csv"), run.step, run.objective) if first else None
    bar = tqdm(total=args.steps, initial=run.step, disable=not first or not sys.stderr.isatty())
    skipped_in_a_row = 0
    clock = time.perf_counter()
    started = run.step
    run.objective.train()
    with signals_noted(run), bar:
        for *batch, stats in load(run, last):
            row, verdict = step(run, batch, stats, run.step)

            # Every process holds the same verdict, so all of them leave the loop at the same step.
            if verdict.too_many_bad:
                save(run)                                       # as it was before this step
                raise ValueError(f"{run.bad_records.message()}; "
                                 f"the run stands at step {run.step}")
            run.step += 1
            skipped_in_a_row = 0 if verdict.finite else skipped_in_a_row + 1
            run.skipped += not verdict.finite
            seconds = time.perf_counter() - clock
            row |= {"skipped": run.skipped} | speed(batch, seconds, run.waited) | validation(run)
            if log:
                log.write(row)
            if run.step % args.log_every == 0 or run.step == last or not verdict.finite:
                say(line(row, run))
            bar.update()
            clock = time.perf_counter()
            if run.step == started + 2:                         # the first steps are slow
                begin = clock
            if run.step == started + 12 < last:
                say(pace((clock - begin) / 10, last - run.step))

            # A single step that is not finite is bad luck. Ten in a row are a diverged run.
            if skipped_in_a_row == 10:
                raise ValueError(f"loss or gradient was not finite in steps {run.step - 9} to "
                                 f"{run.step}: lower --lr; {first_tokens(run, batch)}")
            if run.step % args.save_every == 0:
                save(run)
            if verdict.stop:
                run.signal = run.signal or "a signal"           # to another process
                break
        save(run)
    if log:
        log.say_best()
    if run.step < args.steps:
        done = f"saved {run.path} at step {run.step}" if run.step else "no step is done"
        say(f"{run.signal or '--stop_after'}: {done}; the same command continues")


def first_tokens(run, batch):
    """What a batch is about, for an error message."""
    pieces = run.objective.tokenizer.pieces(batch[0]["b"].token_ids[:20])
    return f"the last batch held {' '.join(pieces)} ..."


def validation(run):
    """Where one is due after this step: its columns of the log. The first process validates."""
    every = run.args.validate_every
    if not run.objective.validation or not every or run.step % every:
        return {}
    scores = run.objective.validate() if world()[0] == 0 else {}
    # Other processes have no score. They need none: the first one writes.
    score = fmean(scores.values()) if scores else -math.inf
    if run.objective.keeps_best and score > run.best:
        run.best = score
        write_checkpoint(best_path(run), weights_of(run))
    wait_for_first(run)
    return scores


def best_path(run):
    return run.path.with_name("best.pt")


def finish(run):
    """Evaluates a finished run -> out/results.json and the table. Rank 0 works; the others wait in
    main()."""
    args = run.args
    if run.step < args.steps or world()[0] > 0:
        return
    if not args.eval or not (args.task or is_demo(args)):
        say(f"step {run.step} of {args.steps} is done, {run.path} and log.csv are written; to "
            f"measure recall: python evaluate.py retrieval --ckpt {run.path} --data FILE")
        return
    # Test sets are read here, at the very end, and nowhere else in training.
    name = "ckpt.pt"
    # The test is of the weights that the validation chose, not of the last ones.
    if run.objective.keeps_best and best_path(run).exists():
        name = "best.pt"
        state = read_checkpoint(best_path(run), mmap=True)
        run.objective.model.load_state_dict(state["model"])
    say(f"evaluating {args.out}/{name} on the test sets ...")
    report = run.objective.test()
    results = pathlib.Path(args.out, "results.json")
    results.write_text(json.dumps(report, indent=1), encoding="utf-8")
    say(f"\nwrote {args.out}/{name}, log.csv and results.json; try: "
        f'python search.py --ckpt {args.out}/{name} --images DIR "a dog"')


# Errors for which torch has no exception of its own: what it says -> what that means.
DIED = "another process of this run died"
TOLD = {
    r"worker \(pid": "a data worker died; often memory or shared memory (/dev/shm) is full: start "
                     "Docker with --ipc=host or --shm-size, or use --workers 0",
    r"(?i)out of memory|allocate memory": "memory is full: choose a smaller --batch and "
                                          "--text_batch, or --checkpointing",
    r"C(\+\+)? compiler": "--compile and Triton on a GPU need a C compiler, for example gcc",
    r"(?i)closed by peer|likely closed|reset by peer|broken pipe|timed out|nccl": DIED,
}


def fail(error, everywhere):
    """data.fail. everywhere: all processes find this mistake, so one of each machine tells it."""
    return 2 if everywhere and int(os.environ.get("LOCAL_RANK", 0)) else data.fail(error)


def main(argv=None, step=train_step):
    """-> exit status: 0, or 2 after one line about what was wrong with the input. An error of the
    program itself is not caught: it keeps its traceback."""
    args = settings(argv)
    run = None
    try:
        if argv is None:                        # not where a test calls main() with a command line
            launch_others(args)
        device = start_processes()
        check(args)
        # One process writes. --explain reads a checkpoint if there is one and writes nothing.
        alone = args.explain or args.benchmark or world()[0] > 0
        with contextlib.nullcontext() if alone else claimed(args.out):
            run = prepare(args, device)
            # The first batch of a run, with the weights of its checkpoint or with new ones.
            if args.explain:
                image, text, _ = run.batches[0]
                explain(run.objective.eval(), to_device(image, device), to_device(text, device),
                        gradient_norms, args.html)
            # A run that is measured and thrown away; its batches are random.
            elif args.benchmark:
                steps = benchmark.STEPS * (2 if args.parallel_text else 1)
                benchmark.command(run, load(run, steps), step)
            else:
                train(run, step)
                finish(run)
        wait_for_first(run)
        status = 0
    except BrokenPipeError:                                     # stdout: | head has read enough
        leave_stdout()
        status = 0
    except (RuntimeError, ConnectionError) as error:
        told = [text for pattern, text in TOLD.items() if re.search(pattern, str(error))]
        if not told:
            raise
        reason = " ".join(str(error).split())[:160]
        status = fail(f"{told[0]} ({reason}); the same command continues from the last "
                      f"checkpoint in {args.out}", told[0] == DIED)
    except (ValueError, OSError) as error:
        status = fail(error, run is None)
    except (KeyboardInterrupt, StopIteration):                  # load ends early on a Ctrl-C
        status = fail(f"interrupted; a checkpoint in {args.out} is as it was", True)
    if dist.is_initialized():
        if not status:
            dist.destroy_process_group()
        # Not by Python's own end: there gloo's threads, which outlive their group under DDP, can
        # abort the process.
        sys.stdout.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    data.run(main)
