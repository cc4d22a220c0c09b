"""What one training step costs on this machine. It needs no data, and writes no checkpoint.

    python train.py --benchmark                                               the demo
    torchrun --nproc_per_node=8 train.py --benchmark --preset base            eight GPUs
    python train.py --benchmark --preset base --batch 8 --text_batch 8        fits a CPU: minutes
    ... --full --json FILE          sentences as long as the recipe allows; the numbers as a file

The step is train.train_step, the flags are those of training, and batches come from data.Batches
by its workers; but pixels and tokens are random, and the model is untrained. Captions have 14
tokens on average, sentences of parallel text 25. Step by step:

    seconds      median of MEASURED steps after WARM_UP, with the wait for data. The row "text",
                 of parallel text, is both streams minus the images: it is not trained alone
    GFLOP        of all matrix products of one process, counted in a step that is not timed
    official     the same by the official code: padded to the recipe's limits, and keys and values
                 of a view projected for each pair that reads it (computed)
    utilisation  GFLOP per second, as a share of what one large product of the same type reaches
    peak         memory of one process; on a CPU the most so far
    %            shares of one more step, by torch.profiler; on a GPU of the time of kernels.
                 Functions are marked in the forward pass; the numbers of autograd's nodes find
                 them in the backward pass. communication: what the losses and the log exchange.
                 DDP's sums run beside the backward pass; on a CPU the wait for their end is in
                 other, with the gradient's norm, the contrastive loss and Python

Letters: B examples per process, L tokens of a sequence, P patches + 1, D width, V vocabulary.
"""
import collections
import contextlib
import json
import math
import os
import pathlib
import platform
import time
from functools import partial
from statistics import median
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function

import data
import losses
from losses import world
from model import training_dtype

try:
    import resource
except ImportError:                                             # Windows
    resource = None

WARM_UP = 3
MEASURED = 5
STEPS = WARM_UP + MEASURED             # of one or of both streams

# --------------------------------------------------------------------------------------------------
# Synthetic data
# --------------------------------------------------------------------------------------------------

CAPTION = 14                            # tokens on average, with <s> and </s>: CC3M in XLM-R's
SENTENCE = 25                           # tokens, and WikiMatrix


class Tokenizer:
    """What data.Batches asks of a tokenizer. Synthetic sentences are lists of ids already: no
    other segmentation can be drawn."""
    model = b""

    def __init__(self, size):
        self.size = size                                                     # V
        self.mask = size - 1

    def encode(self, ids, longest=None):
        return data.cut(ids, longest) if longest else ids

    def sample(self, ids, rng):
        return ids


class Synthetic:
    """A dataset (data.Stream) of random sentences, paired with random images or sentences."""

    def __init__(self, vocabulary, mean, pixels=None):
        """mean: tokens of a sentence; inf: more than any limit. pixels: of an image, a side; None:
        sentences instead."""
        self.vocabulary = vocabulary
        self.mean = mean
        self.pixels = pixels

    def __len__(self):
        return 2 ** 20

    def __getitem__(self, key):
        index, rng = key
        a = self.sentence(rng)
        if self.pixels:
            a = rng.integers(256, size=(3, self.pixels, self.pixels), dtype="uint8")
        return a, self.sentence(rng), index

    def sentence(self, rng):
        # Lengths of real text have a long tail. The mean of this one, of exp(z / 2), is 1.13.
        length = 512
        if self.mean < math.inf:
            length = 3 + round((self.mean - 3) / 1.13 * rng.lognormal(0, 0.5))
        inner = rng.integers(data.UNKNOWN + 1, self.vocabulary - 1, size=length - 2)
        return [data.BOS, *inner.tolist(), data.EOS]


def datasets(args, config):
    """Settings of train.py -> (dataset of images, dataset of parallel text or None)."""
    V = config.vocabulary
    images = Synthetic(V, math.inf if args.full else CAPTION, config.image_size)
    texts = Synthetic(V, math.inf if args.full else SENTENCE)
    return images, texts if args.parallel_text else None


# --------------------------------------------------------------------------------------------------
# FLOPs
# --------------------------------------------------------------------------------------------------

def addmm_flops(_, a, b, *args, **kwargs):
    """Of addmm_, which torch does not count: a (n, k) @ b (k, m)."""
    return 2 * a[0] * a[1] * b[1]


def attention_flops(q, k, v, q_starts, k_starts, *args, **kwargs):
    """Of the attention kernel's two products on real rows, q k^T and p v."""
    pairs = (q_starts.diff().long() * k_starts.diff()).sum().item()
    return 4 * pairs * q.shape[1] * q.shape[2]


def attention_backward_flops(gradient, *args, **kwargs):
    """Of the four products that its gradient is made of; those done again are not counted."""
    return 2 * attention_flops(*args, **kwargs)


def count_flops(run_step):
    """FLOPs of the matrix products of run_step()."""
    from torch.utils.flop_counter import FlopCounterMode        # it loads Triton
    mapping = {torch.ops.aten.addmm_: addmm_flops}
    if hasattr(torch.ops.cclm, "attention"):                    # its kernels are in use
        # _get_raw: they want tensors, not only shapes.
        attention_flops._get_raw = attention_backward_flops._get_raw = True
        mapping[torch.ops.cclm.attention] = attention_flops
        mapping[torch.ops.cclm.attention_backward] = attention_backward_flops
    # The math backend is made of products that can be counted.
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        with sdpa_kernel(SDPBackend.MATH):
            run_step()
    return counter.get_total_flops()


def official_flops(model, args, images):
    """FLOPs of the official step for one process's batch of a stream: forward, and twice that
    backward. All sentences have the longest length and as many masked tokens as the recipe allows.
    Each of the pairs (one true, two false, one masked) projects keys and values for itself."""
    c = model.config
    D = c.width
    B = (args.batch if images else args.text_batch) // world()[1]
    L = min(args.caption_tokens if images else args.sentence_tokens, model.text.longest)
    M = B * (args.caption_masked if images else args.sentence_masked)

    def layer(L, S, width):
        """Attention of B x L tokens to B x S, with its four projections, and an MLP (0: none)."""
        return B * (2 * D * D * (2 * L + 2 * S) + 4 * L * S * D + 2 * L * 2 * D * width)
    text = c.text_layers * layer(L, L, c.text_mlp)
    if images:
        P = (c.image_size // c.patch_size) ** 2 + 1
        patches = 2 * B * (P - 1) * 3 * c.patch_size ** 2 * D
        a = patches + c.vision_layers * layer(P, P, c.vision_mlp)
    else:
        P = L
        a = text
    pair = c.fusion_layers * (layer(L, L, c.fusion_mlp) + layer(L, P, 0))
    vocabulary = 2 * M * D * (D + c.vocabulary)
    return 3 * (a + 2 * text + 4 * pair + vocabulary)


# --------------------------------------------------------------------------------------------------
# Parts of a step
# --------------------------------------------------------------------------------------------------

PARTS = ("vision", "text", "fusion", "vocabulary", "optimizer", "communication", "other")
BACKWARD = "autograd::engine::evaluate_function"
MARK = "part: "


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def parts_named(model, optimizer):
    """While it lasts, a profiler sees the forward pass of every part under the part's name."""
    functions = [(model.vision, "forward", "vision"), (model.text, "forward", "text"),
                 (model.fusion, "forward", "fusion"), (losses, "masked_lm_loss", "vocabulary"),
                 (optimizer, "step", "optimizer")]
    # What losses.py and train_step exchange, and wait for.
    for name in ("all_reduce", "all_gather_single", "reduce_scatter_single"):
        functions.append((dist, name, "communication"))
    with contextlib.ExitStack() as stack:
        for owner, name, part in functions:
            named = record_function(MARK + part)(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, named))
        yield


def parts_of(device, repeat):
    """{part of a step: seconds} of repeat()."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")             # the profiler says nothing
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        begin = time.perf_counter()
        repeat()
        synchronize(device)
        seconds = time.perf_counter() - begin
    found = sort_events(profiler.events(), cuda)
    found["other"] += max(0.0, seconds - sum(found.values()))
    return found


def sort_events(events, cuda):
    """Events of torch.profiler -> {part: seconds}; of a GPU those of kernels."""
    found = collections.Counter()
    parts = {}                                                  # id of an event -> its part
    nodes = {}                                                  # number of a node -> its part
    backward = set()                                            # ids of events in the backward pass
    events = [event for event in events if event.device_type == DeviceType.CPU]
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        # 1. The part of the event in which it happens, if it is not named itself, or the backward
        #    of a node that the forward pass made.
        parent = event.cpu_parent and event.cpu_parent.id
        part = parts.get(parent, "other")
        if event.name.startswith(MARK):
            part = event.name.removeprefix(MARK)
        elif event.name.startswith("c10d::"):                   # DDP's
            part = "communication"
        elif event.name.startswith(BACKWARD):
            part = nodes.get(event.sequence_nr, "other")
        parts[event.id] = part
        # 2. Of the events that have a node's number, the last one made the node.
        if event.name.startswith(BACKWARD) or parent in backward:
            backward.add(event.id)
        else:
            nodes[event.sequence_nr] = part                     # -1: none
        own_time = event.self_cpu_time_total
        if cuda:
            # A kernel that has the event's name is no kernel, but the range of a mark.
            own_time = sum(k.duration for k in event.kernels if k.name != event.name)
        found[part] += own_time / 1e6                           # from microseconds
    return found


# --------------------------------------------------------------------------------------------------
# Time and memory
# --------------------------------------------------------------------------------------------------

def product_rate(device, dtype):
    """FLOP per second of one large matrix product: what utilisation is a share of."""
    n, times = (8192, 10) if device.type == "cuda" else (2048, 1)
    x, weight = torch.randn(2, n, n, device=device).to(dtype)
    seconds = []
    for _ in range(7):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(times):
            F.linear(x, weight)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * n ** 3 * times / median(seconds[2:])


def peak_memory():
    """Bytes that this process held at most, on its GPU, else at all; 0: not known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if platform.system() == "Darwin" else 1024         # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0


def measure(run, batches, step, streams):
    """STEPS steps on the first `streams` streams -> numbers of the median one."""
    done = []
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock = time.perf_counter()
    for number in range(STEPS):
        *batch, stats = next(batches)
        batch = [stream if i < streams else None for i, stream in enumerate(batch)]
        repeat = partial(step, run, batch, stats, number)
        repeat()
        synchronize(run.device)
        seconds = time.perf_counter() - clock
        clock += seconds
        done.append((seconds, run.waited, number, repeat, batch))
    peak = peak_memory()
    # Steps have other lengths: all numbers are of the step that took the median time.
    seconds, waited, _, repeat, batch = sorted(done[WARM_UP:])[MEASURED // 2]
    batch = [stream for stream in batch if stream]
    model = run.objective.model
    official = [official_flops(model, run.args, "images" in stream) for stream in batch]
    found = parts_of(run.device, repeat)
    scale = (seconds - waited) / sum(found.values())
    return {"batch": world()[1] * sum(len(stream["ids"]) for stream in batch),
            "seconds": seconds, "flops": count_flops(repeat), "official_flops": sum(official),
            "peak_memory": peak,
            "parts": {"data wait": waited} | {part: scale * found[part] for part in PARTS}}


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------

def minus(both, images):
    """The row of parallel text alone."""
    row = dict(both)
    for name in ("batch", "seconds", "flops", "official_flops"):
        row[name] -= images[name]
    row["parts"] = {part: max(0.0, seconds - images["parts"][part])
                    for part, seconds in both["parts"].items()}
    return row


def benchmark(run, batches, step):
    """Runs all steps -> the numbers, as --json writes them. batches yields what train.load does."""
    run.objective.train()
    dtype, _ = training_dtype(run.device)
    rate = product_rate(run.device, dtype)
    with parts_named(run.objective.model, run.optimizer):
        rows = {"image": measure(run, batches, step, 1)}
        if run.args.parallel_text:
            both = measure(run, batches, step, 2)
            rows |= {"text": minus(both, rows["image"]), "both": both}
    for row in rows.values():
        row["samples_per_s"] = row["batch"] / row["seconds"]
        row["utilisation"] = row["flops"] / row["seconds"] / rate
        total = sum(row["parts"].values())
        row["shares"] = {part: 100 * seconds / total for part, seconds in row.pop("parts").items()}
    return {"preset": run.args.preset, "processes": world()[1], "device": str(run.device),
            "dtype": str(dtype), "product_flops_per_s": rate, "streams": rows}


def print_report(report):
    print(f"one matrix product of {report['dtype']}: "
          f"{report['product_flops_per_s'] / 1e9:,.0f} GFLOP/s\n\n"
          f"{'':8}{'batch':>7}{'seconds':>9}{'samples/s':>11}{'GFLOP':>11}{'official':>11}"
          f"{'ratio':>7}{'utilisation':>13}{'peak GB':>9}")
    for name, row in report["streams"].items():
        flops = row["flops"] / 1e9
        official = row["official_flops"] / 1e9
        print(f"{name:8}{row['batch']:7}{row['seconds']:9.3f}{row['samples_per_s']:11.1f}"
              f"{flops:11,.1f}{official:11,.1f}{flops / official:7.2f}{row['utilisation']:13.2f}"
              f"{row['peak_memory'] / 1e9:9.2f}")
    print(f"\n{'%':8}" + "".join(f"{part:>15}" for part in ("data wait", *PARTS)))
    for name, row in report["streams"].items():
        print(f"{name:8}" + "".join(f"{share:15.0f}" for share in row["shares"].values()))


def command(run, batches, step):
    """Measures, prints, and writes --json. All processes compute, the first one tells."""
    report = benchmark(run, batches, step)
    if world()[0] > 0:
        return
    print_report(report)
    if run.args.json:
        text = json.dumps(report, indent=1)
        data.write_output(pathlib.Path(run.args.json), text.encode())
