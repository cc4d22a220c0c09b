"""What the kernels get wrong, what they cost, and whether they would run: one command, on any
machine.

    python -m kernels.bench              everything this machine can do
    python -m kernels.bench --quick      the same on small cases, half a minute
    python -m kernels.bench --only resources --targets sm_80,sm_90,gfx942

  errors      largest error against a dense float64 reference, per dtype. Without a GPU: in Triton's
              interpreter
  cpu         contrast by tiles against the naive N x N loss: seconds and peak memory, each run in a
              process of its own
  resources   without a GPU: every kernel compiled for GPUs that are not here; registers, spilled
              bytes, shared memory, tensor core instructions. Not a speed, but what makes a kernel
              slow or impossible shows here
  gpu         attention of preset base by our kernels and by torch's functions: products executed,
              bytes moved (counted, not measured); with a GPU milliseconds, of contrast too

Letters as in the kernel files: B, N, T, H, d, E.
"""
import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import kernels
from kernels import interpreting, triton_installed
from kernels.attention import attention
from kernels.contrastive import contrastive, contrastive_naive
from kernels.packed import gather_sequences, offsets
from kernels.reference import (ALLOWED, DTYPES, attention_and_reference, contrast_errors,
                               contrast_loss, random_attention, random_contrast, relative)


def table(title: str, *columns):
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def table_row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------

def print_errors(device: str, quick: bool) -> int:
    """-> how many entries of the kernels are over what is allowed; torch's own are only shown."""
    where = "kernels" if device == "cuda" else "torch on a CPU"
    if interpreting():
        where = "kernels in the interpreter"
    table(f"errors against float64: {where}; of attention by the largest |reference| of a matrix, "
          f"and by every element's own", "dtype", "allowed to kernels", "attention", "by element",
          "cases", "contrast, by element", "cases")
    count = 3 if quick else 50
    shapes = [(1, 1, 0), (70, 150, 33), (300, 300, 0), (600, 600, 0)][:count]
    bad = 0
    for name, dtype in DTYPES.items():
        if name == "fp64" and device == "cuda":
            continue                                                     # left to torch
        by_matrix = by_element = contrast = 0.0
        for i in range(count):
            results = attention_and_reference(random_attention(5 * i, dtype, device))
            by_matrix = max(by_matrix, *relative(*results).values())
            by_element = max(by_element, *relative(*results, each=True).values())
        for i, shape in enumerate(shapes):
            for t in (0.5, 0.07, 0.02):
                errors = contrast_errors(random_contrast(i, shape, t, dtype, device))
                contrast = max(contrast, *errors.values())
        if where != "torch on a CPU":
            bad += sum(not error <= ALLOWED[name] for error in (by_matrix, contrast))
        table_row(name, f"{ALLOWED[name]:.0e}", f"{by_matrix:.1e}", f"{by_element:.1e}", count,
                  f"{contrast:.1e}", 3 * len(shapes))
    return bad


# --------------------------------------------------------------------------------------------------
# CPU: tiles against the naive matrix
# --------------------------------------------------------------------------------------------------

def memory(field: str) -> int:
    """Bytes of memory of this process, "VmRSS": now, "VmHWM": the most so far. (Elsewhere than on
    Linux always the most; ru_maxrss there starts at the size of whoever started the process.)"""
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as file:
            return int(re.search(rf"{field}:\s+(\d+) kB", file.read())[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def one_contrast(kind: str, N: int, E: int = 256) -> dict:
    """Forward and backward once, in this process: seconds, bytes its peak lies above the start,
    numbers to compare."""
    run = contrastive_naive if kind == "naive" else contrastive
    contrast_loss(*run(*random_contrast(0, (64, 64, 0), 0.07, torch.float32, E=E))).backward()
    case = random_contrast(0, (N, N, 0), 0.07, torch.float32, E=E)
    before = memory("VmRSS")
    start = time.perf_counter()
    contrast_loss(*run(*case)).backward()
    seconds = time.perf_counter() - start
    da, db, dt = (x.grad for x in case[:3])
    return {"seconds": seconds, "bytes": memory("VmHWM") - before, "gradient": da.norm().item(),
            "checksum": (db * torch.arange(E)).sum().item(), "dt": dt.item()}


def print_cpu(quick: bool):
    table("contrast on CPU, forward + backward, float32, E = 256, medians of alternating processes",
          "N", "naive, s", "tiles, s", "naive, MB", "tiles, MB", "gradients differ by")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    for N in (1024, 4096) if quick else (512, 4096, 16384):
        runs = {"naive": [], "tiles": []}
        for _ in range(3 if quick else 5):
            for kind, results in runs.items():
                command = [sys.executable, "-m", "kernels.bench", "--child", kind, str(N)]
                child = subprocess.run(command, check=True, capture_output=True, text=True,
                                       env=environment)
                results.append(json.loads(child.stdout.splitlines()[-1]))
        seconds = {k: statistics.median(x["seconds"] for x in runs[k]) for k in runs}
        bytes_ = {k: statistics.median(x["bytes"] for x in runs[k]) for k in runs}
        naive, tiles = (runs[kind][0] for kind in runs)
        apart = max(abs(naive[key] - tiles[key]) / abs(naive[key])
                    for key in ("gradient", "checksum", "dt"))
        table_row(N, f"{seconds['naive']:.3f}", f"{seconds['tiles']:.3f}",
                  f"{bytes_['naive'] / 1e6:.0f}", f"{bytes_['tiles'] / 1e6:.0f}", f"{apart:.0e}")


# --------------------------------------------------------------------------------------------------
# Resources: the launches of a real call are recorded and compiled for GPUs that are not here
# --------------------------------------------------------------------------------------------------

QUICK = ("attention bf16 d=64 bias", "attention bf16 d=48", "attention fp32 d=80 bias",
         "contrast bf16 E=256")
# KB a program can have: A100, RTX 40, H100, B200, RTX 50, MI300
SHARED_LIMIT = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}


class PretendGPU:
    """As much of a driver as triton asks for to compile, and no more."""

    def __init__(self, name):
        from triton.backends.compiler import GPUTarget
        self.name = name
        if name.startswith("gfx"):
            self.target = GPUTarget("hip", name, 64)
        else:
            self.target = GPUTarget("cuda", int(name[3:]), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.name

    def get_current_stream(self, device):
        return 0


class Recorder:
    """Stands in for a kernel: kernel[grid](**arguments) is written down and not run."""

    def __init__(self, kernel, log):
        self.kernel = kernel
        self.log = log

    def __getitem__(self, grid):
        return self.launch

    def launch(self, **arguments):
        self.log[self.kernel.__name__.removesuffix("_kernel")] = (self.kernel, arguments)


def launches(module, call) -> dict:
    """Runs call() with the kernels of a module replaced by recorders -> {name: (kernel, arguments)}
    as a GPU would get them."""
    log = {}
    plain = {name: x for name, x in vars(module).items() if name.endswith("_kernel")}
    vars(module).update({name: Recorder(kernel, log) for name, kernel in plain.items()})
    call()
    vars(module).update(plain)
    return log


def attention_launches(dtype, d: int, bias: bool):
    """Attention, forward and backward, of 3 sequences of 197 tokens."""
    from kernels import attention_triton

    def call():
        q, k, v = (torch.zeros(3 * 197, 2, d, dtype=dtype, requires_grad=True) for _ in range(3))
        starts = torch.arange(4, dtype=torch.int32) * 197
        b = torch.zeros(2, 197, 197, requires_grad=True) if bias else None
        attention_triton.attention_triton(q, k, v, starts, starts, b).sum().backward()
    return launches(attention_triton, call)


def contrast_launches(dtype, E: int):
    from kernels import contrastive_triton
    from kernels.contrastive import contrastive_triton as run
    case = random_contrast(0, (512, 4096, 512), 0.07, dtype, E=E)
    return launches(contrastive_triton, lambda: contrast_loss(*run(*case)).backward())


def compiled(kernel, arguments, name: str) -> dict:
    """-> registers, spilled bytes, shared memory and tensor core instructions on one GPU."""
    from triton import knobs
    from triton.runtime import driver
    driver.set_active(PretendGPU(name))
    done = kernel.warmup(grid=(1,), **arguments)
    shared = done.metadata.shared
    if name.startswith("gfx"):
        text = done.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1])
                              for key in ("vgpr_count", "private_segment_fixed_size"))
        tensor = len(re.findall(r"\bv_mfma", text))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(done.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True).stdout
        registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1])
                                   for key in ("REG", "STACK", "LOCAL"))
        spilled = stack + local
        products = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"
        tensor = len(re.findall(products, done.asm["ptx"]))
    return {"registers": registers, "spilled": spilled, "shared": shared, "tensor": tensor}


def print_resources(targets: list, quick: bool) -> int:
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="kernels_bench_"))
    calls = {}
    for t, widths in {"bf16": range(16, 129, 16), "fp16": (64, 128),
                      "fp32": range(16, 129, 16)}.items():
        for d in widths:
            calls[f"attention {t} d={d}"] = (attention_launches, DTYPES[t], d, False)
            calls[f"attention {t} d={d} bias"] = (attention_launches, DTYPES[t], d, True)
        for E in (128, 256):
            calls[f"contrast {t} E={E}"] = (contrast_launches, DTYPES[t], E)
    table("resources, compiled offline: registers / spilled bytes / shared memory, KB / tensor "
          "core instructions", "kernel", "tile, warps", *targets)
    bad = 0
    for title in QUICK if quick else calls:
        function, *arguments = calls[title]
        cells = {}
        for name in targets:
            kernels.amd = lambda: name.startswith("gfx")                 # tiles as on that GPU
            for kernel_name, (kernel, given) in function(*arguments).items():
                r = compiled(kernel, given, name)
                wrong = r["spilled"] or r["shared"] > 1024 * SHARED_LIMIT[name]
                wrong = wrong or "16" in title and not r["tensor"]
                bad += bool(wrong) and not name.startswith("gfx")
                rows, columns = given["c"][-2:]
                tile = f"{rows} x {columns}, {given['num_warps']}"
                cell = f"{r['registers']} / {r['spilled']} / {r['shared'] / 1024:.0f}"
                cell += f" / {r['tensor']}" + (" !" if wrong else "")
                cells.setdefault(kernel_name, [tile]).append(cell)
        for kernel_name, row in cells.items():
            table_row(f"{title} {kernel_name}", *row)
    limits = ", ".join(f"{name} {SHARED_LIMIT[name]}" for name in targets)
    print(f"\n{bad} NVIDIA entries spill, do not fit or lack tensor core instructions "
          f"(limits, KB: {limits})")
    return bad


# --------------------------------------------------------------------------------------------------
# Attention in one layer of preset base, 128 images and 128 pairs of sentences per GPU, four ways
# --------------------------------------------------------------------------------------------------

HEADS = 12
HEAD = 64
# Forward q k^T and p v; each of our backward kernels computes q k^T and g v^T again.
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}
# flash-attention's two kernels at this HEAD: products, and its tile
FLASH = {"forward": (2, 128, 128), "backward": (5, 128, 128)}


def base_cases() -> dict:
    """{case: (lengths (B, copies) of the query sequences that read each view, lengths (B,) of the
    views, is there a bias?)}. Captions have 10 to 18 tokens, sentences 8 to 42. In the fusion
    encoder every view is read by four: a true pair, one with a wrong a, one with a wrong b, and the
    masked text."""
    g = torch.Generator().manual_seed(0)
    images = torch.full((128,), 197)
    captions = torch.randint(10, 19, (128, 4), generator=g)
    sentences = torch.randint(8, 43, (128, 4), generator=g)
    return {
        "128 images, biased": (images[:, None], images, True),
        "512 captions": (captions.view(-1, 1), captions.flatten(), False),
        "512 captions read 128 images": (captions, images, False),
        "512 sentences read 128 sentences": (sentences, sentences[:, 0], False),
    }


def work(q_lengths, k_lengths, biased) -> dict:
    """{way: (FLOPs of all products, those of real rows alone, bytes)}, forward + backward.

    bytes: every matrix once per kernel that reads or writes it, 16 bits a number. Ours: 8 of q's
    size (forward: q, out; dq: q, out, gradient, dq; dkv: q, gradient) and 8 of k's. flash: 15
    (forward 2, delta 2, backward 2; dq in float32: set to 0, added to, rounded) and 6."""
    from kernels.attention_triton import BIAS_MULTIPLE, tile_sizes
    copies = q_lengths.shape[1]
    grouped = (q_lengths.sum(1), k_lengths)
    copied = (q_lengths.flatten(), k_lengths.repeat_interleave(copies))
    padded = [torch.full_like(lengths, lengths.max()) for lengths in copied]
    ours = {name: (products, *tile_sizes(name, torch.bfloat16, HEAD)[:2])
            for name, products in PRODUCTS.items()}
    if biased:
        ways = {"ours": (grouped, ours | {"dbias": (2, BIAS_MULTIPLE, BIAS_MULTIPLE)}, 8, 8)}
    else:
        ways = {"ours": (grouped, ours, 8, 8), "varlen_attn": (grouped, FLASH, 15, 6)}
    if copies > 1:
        ways["varlen_attn, keys copied"] = (copied, FLASH, 15, 6)
    ways["padded SDPA"] = (padded, FLASH, 15, 6)
    found = {}
    for name, ((q, k), executed, q_times, k_times) in ways.items():
        flops = needed = 0
        for products, queries, keys in executed.values():
            product = 2 * HEADS * HEAD * products                        # FLOPs of two rows
            rows = -(-q // queries) * queries                            # (B,) whole tiles
            columns = -(-k // keys) * keys                               # (B,)
            flops += product * int(rows @ columns)
            needed += product * int(copied[0] @ copied[1])
        moved = q_times * int(q.sum()) + k_times * int(k.sum())          # rows
        if name == "varlen_attn, keys copied":                           # and gradients added
            moved += 4 * int(k.sum() + k_lengths.sum())
        found[name] = flops, needed, 2 * HEADS * HEAD * moved
    return found


def ways(q_lengths, k_lengths, biased, device, dtype) -> dict:
    """{way: (a function without arguments -> attention's output, its inputs)}. All get the same
    numbers; padded SDPA gets them copied and padded already. varlen_attn takes no bias."""
    from torch.nn.attention.varlen import varlen_attn
    lengths = q_lengths.flatten()                                   # (Q,) of query sequences
    groups = q_lengths.sum(1)                                       # (B,)
    view = torch.arange(len(groups)).repeat_interleave(q_lengths.shape[1])          # (Q,)
    starts = offsets(lengths).to(device)
    group_starts = offsets(groups).to(device)
    k_starts = offsets(k_lengths).to(device)
    rows, copied_starts = gather_sequences(k_starts, view.to(device))    # rows of k, repeated
    longest, longest_group, K = (int(x.max()) for x in (lengths, groups, k_lengths))

    def random(*shape):
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    def padded(x, lengths):
        x = pad_sequence(x.detach().split(lengths.tolist()), batch_first=True)
        return x.transpose(1, 2).contiguous().requires_grad_()           # (Q, H, L, d)
    q = random(int(lengths.sum()), HEADS, HEAD)
    k = random(int(k_lengths.sum()), HEADS, HEAD)
    v = random(*k.shape)
    many = [padded(q, lengths), *(padded(x[rows], k_lengths[view]) for x in (k, v))]
    mask = bias = random(HEADS, K, K) if biased else None
    if k_lengths.min() < K:                 # with a mask SDPA may not take flash-attention
        real = torch.arange(K) < k_lengths[view, None]              # (Q, K)
        mask = real[:, None, None].to(device)                            # (Q, 1, 1, K)
    return {
        "ours": (lambda: attention(q, k, v, group_starts, k_starts, bias), (q, k, v)),
        "varlen_attn": (lambda: varlen_attn(q, k, v, group_starts, k_starts, longest_group, K),
                        (q, k, v)),
        "varlen_attn, keys copied": (
            lambda: varlen_attn(q, k[rows], v[rows], starts, copied_starts, longest, K), (q, k, v)),
        "padded SDPA": (lambda: F.scaled_dot_product_attention(*many, mask), many),
    }


def milliseconds(run) -> str:
    """Median of 20, after 5 to warm up. Each is ten calls between two events, so that a launch is
    not what counts. Before every call the L2 cache is flushed; the flushes alone are subtracted."""
    cache = torch.empty(2 ** 28, dtype=torch.uint8, device="cuda")       # larger than any L2 cache

    def ten(call):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            cache.zero_()
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 10
    times = [ten(run) - ten(lambda: None) for _ in range(25)]
    return f"{statistics.median(times[5:]):.3f}"


def print_attention(cuda: bool):
    table("attention in a layer of preset base, bf16, forward + backward. In brackets: times the "
          "products of real rows", "case", "way", "GFLOP executed", "MB", "ms")
    for title, case in base_cases().items():
        calls = ways(*case, "cuda", torch.bfloat16) if cuda else {}
        for name, (flops, needed, size) in work(*case).items():
            cells = [f"{flops / 1e9:.1f} ({flops / needed:.2f})", f"{size / 1e6:.0f}", ""]
            if cuda:
                run, inputs = calls[name]
                g = torch.randn_like(run())
                cells[-1] = milliseconds(lambda: torch.autograd.grad(run(), inputs, g))
            table_row(title, name, *cells)


def print_contrast():
    table("contrast, bf16, E = 256, forward + backward, ms", "N", "kernel", "naive", "GFLOP", "MB")
    for N in (1024, 8192, 32768):
        case = random_contrast(0, (N, N, 0), 0.07, torch.bfloat16, "cuda", E=256)
        times = [milliseconds(lambda: torch.autograd.grad(contrast_loss(*run(*case)), case[:3]))
                 for run in (contrastive, contrastive_naive)]
        # 5 products of 2 N^2 E; 8 matrices of 16 bits
        table_row(N, *times, f"{10 * N * N * 256 / 1e9:.1f}", f"{16 * N * 256 / 1e6:.0f}")


# --------------------------------------------------------------------------------------------------
# Command
# --------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small cases only")
    parser.add_argument("--only", choices=["errors", "cpu", "resources", "gpu"], help="one part")
    parser.add_argument("--targets", default="sm_80,sm_89,sm_90,sm_100,sm_120",
                        help="GPUs to compile for (default: %(default)s)")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "N"),
                        help="one timed run of the cpu part, as JSON")
    args = parser.parse_args()
    targets = args.targets.split(",")
    if not set(targets) <= set(SHARED_LIMIT):
        parser.error(f"--targets {args.targets}: choose from {', '.join(SHARED_LIMIT)}")
    if args.child:
        print(json.dumps(one_contrast(args.child[0], int(args.child[1]))))
        return 0

    cuda = torch.cuda.is_available()
    device = "no GPU: no time below is of a GPU"
    if cuda:
        device = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {device}")
    bad = 0
    if args.only in (None, "errors"):
        bad += print_errors("cuda" if cuda and not interpreting() else "cpu", args.quick)
        if not cuda and not interpreting() and triton_installed():
            # The interpreter's errors, in a process of its own: a process has one mode.
            child = [sys.executable, "-m", "kernels.bench", "--only", "errors"]
            child += ["--quick"] if args.quick else []
            environment = os.environ | {"TRITON_INTERPRET": "1"}
            bad += subprocess.run(child, env=environment).returncode
    if args.only in (None, "cpu"):
        print_cpu(args.quick)
    if args.only == "resources" or args.only is None and not cuda:
        if triton_installed():
            bad += print_resources(targets, args.quick)
        else:
            print("\nresources: triton is not installed (pip install triton)")
    if args.only in (None, "gpu") and triton_installed() and not interpreting():
        print_attention(cuda)
        if cuda:
            print_contrast()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
