"""What the kernels get wrong, what they cost, and whether they would run: one command, on any machine.

    python -m kernels.bench              everything this machine can do
    python -m kernels.bench --quick      the same on small cases, half a minute
    python -m kernels.bench --only resources --targets sm_80,sm_90,gfx942

  errors      largest error against a dense float64 reference, per dtype. Without a GPU: in Triton's interpreter
  cpu         contrast by tiles against the naive N x N loss: seconds and peak memory, each run in a process of its own
  resources   without a GPU: every kernel compiled for GPUs that are not here; registers, spilled bytes, shared memory,
              tensor core instructions. Not a speed, but what makes a kernel slow or impossible shows here
  gpu         with a GPU: milliseconds beside torch's own functions, and the share of what the GPU could do at best

Letters as in the two kernel files: B, N, T, H, d, E.
"""
import argparse
import functools
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

import kernels
from kernels import interpreting, triton_installed
from kernels.attention import attention
from kernels.contrastive import contrastive
from kernels.reference import (ALLOWED, DTYPES, attention_and_reference, contrast_errors, contrast_loss,
                               random_attention, random_contrast, relative)


# ------------------------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------------------------

def print_errors(device: str, quick: bool) -> int:
    """-> how many entries of the kernels are over what is allowed; torch's own, in 16 bits, are only shown."""
    where = "kernels in the interpreter" if interpreting() else "kernels" if device == "cuda" else "torch on a CPU"
    bad, judged = 0, not where.startswith("torch")
    print(f"\nerrors against float64: {where}; of attention by the largest |reference| of a matrix, "
          "and by every element's own\n"
          "\n| dtype | allowed to kernels | attention | by element | cases | contrast, by element | cases |\n"
          "|---|---|---|---|---|---|---|")
    for name, dtype in DTYPES.items():
        if name == "fp64" and device == "cuda":
            continue                                                                   # the kernels leave it to torch
        seeds = range(3 if quick else 50)
        shapes = [(1, 1, 0), (70, 150, 33), (300, 300, 0), (600, 600, 0)][:3 if quick else 4]
        both = [attention_and_reference(random_attention(4 * s + i, dtype, device)) for i, s in enumerate(seeds)]
        attend, elements = ([relative(*x, each) for x in both] for each in (False, True))
        contrast = [contrast_errors(random_contrast(i, *shape, t, dtype, device)) for i, shape in enumerate(shapes)
                    for t in (0.5, 0.07, 0.02)]
        worst = [max(max(errors.values()) for errors in table) for table in (attend, elements, contrast)]
        marks = [" !" * (limit and not x <= ALLOWED[name]) for x, limit in zip(worst, (judged, False, judged))]
        bad += sum(map(bool, marks))
        first, second, third = (f"{x:.1e}{mark}" for x, mark in zip(worst, marks))
        print(f"| {name} | {ALLOWED[name]:.0e} | {first} | {second} | {len(attend)} | {third} | {len(contrast)} |",
              flush=True)
    return bad


# ------------------------------------------------------------------------------------------------------------------
# CPU: tiles against the naive matrix
# ------------------------------------------------------------------------------------------------------------------

def resident(field: str = "VmRSS") -> int:
    """Bytes of memory this process holds now (on Linux; elsewhere the most it ever held)."""
    if os.path.exists("/proc/self/status"):
        return int(re.search(rf"{field}:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak() -> int:
    """The most it ever held. VmHWM, not ru_maxrss: that one starts at the size of whoever started this process."""
    return resident("VmHWM")


def one_contrast(kind: str, N: int, E: int = 256) -> dict:
    """Forward and backward once, in this process: seconds, bytes its peak lies above the start, numbers to compare."""
    warm = random_contrast(0, 64, 64, 0, 0.07, torch.float32, E=E)
    contrast_loss(*contrastive(*warm, None)[:3], 64).backward()
    a, b, t, ids, all_ids, _ = random_contrast(0, N, N, 0, 0.07, torch.float32, E=E)
    run = contrastive_strip if kind == "naive" else lambda *x: contrastive(*x, None)[:3]
    before, start = resident(), time.perf_counter()
    contrast_loss(*run(a, b, t, ids, all_ids, 0), N).backward()
    seconds = time.perf_counter() - start
    return dict(seconds=seconds, bytes=peak() - before, gradient=a.grad.norm().item(),
                checksum=(b.grad * torch.arange(E)).sum().item(), dt=t.grad.item())


def contrastive_strip(a, b, t, a_ids, b_ids, first_row):
    """The naive loss alone, without the weights of hard negatives: what a user would write."""
    s = a @ b.T / t                                                                    # (N, N)
    same = ((a_ids[:, None, 0] == b_ids[:, 0]) | (a_ids[:, None, 1] == b_ids[:, 1])).fill_diagonal_(False)
    kept = s.masked_fill(same, -torch.inf)
    return kept.logsumexp(1), kept.logsumexp(0), s.diagonal()


def print_cpu(quick: bool):
    sizes = (1024, 4096) if quick else (512, 4096, 16384)
    print("\ncontrast on CPU, forward + backward, float32, E = 256, medians of alternating processes\n\n"
          "| N | naive, s | tiles, s | naive, MB | tiles, MB | gradients differ by |\n|---|---|---|---|---|---|")
    for N in sizes:
        runs = {"naive": [], "tiles": []}
        for _ in range(3 if quick else 5):
            for kind, done in runs.items():
                child = subprocess.run([sys.executable, "-m", "kernels.bench", "--child", kind, str(N)], check=True,
                                       capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
                done.append(json.loads(child.stdout.splitlines()[-1]))
        middle = lambda kind, what: statistics.median(run[what] for run in runs[kind])
        x, y = runs["naive"][0], runs["tiles"][0]
        apart = max(abs(x[k] - y[k]) / abs(x[k]) for k in ("gradient", "checksum", "dt"))
        print(f"| {N} | {middle('naive', 'seconds'):.3f} | {middle('tiles', 'seconds'):.3f} | "
              f"{middle('naive', 'bytes') / 1e6:.0f} | {middle('tiles', 'bytes') / 1e6:.0f} | {apart:.0e} |")


# ------------------------------------------------------------------------------------------------------------------
# Resources: the launches of a real call are recorded and compiled for GPUs that are not here
# ------------------------------------------------------------------------------------------------------------------

WIDTHS = dict(bf16=range(16, 129, 16), fp16=(64, 128), fp32=range(16, 129, 16))        # head dims
QUICK = ("attention bf16 d=64 bias", "attention bf16 d=48", "attention fp32 d=80 bias", "contrast bf16 E=256")
SHARED_LIMIT = dict(sm_80=163 * 1024, sm_90=227 * 1024, gfx942=64 * 1024)              # bytes a program can have


class PretendGPU:
    """As much of a driver as triton asks for to compile, and no more."""

    def __init__(self, name):
        from triton.backends.compiler import GPUTarget
        self.name = name
        self.target = GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.name

    def get_current_stream(self, device):
        return 0


class Recorder:
    def __init__(self, kernel, log):
        self.kernel, self.log = kernel, log

    def __getitem__(self, grid):
        return lambda **arguments: self.log.append((self.kernel, arguments))


def launches(module, call):
    """Runs call() with the kernels of a module replaced by recorders -> [(kernel, arguments)]: what a GPU would get."""
    module.load_kernels()
    log, names = [], [name for name in vars(module) if name.endswith("_kernel")]
    kernels = {name: getattr(module, name) for name in names}
    vars(module).update({name: Recorder(kernel, log) for name, kernel in kernels.items()})
    try:
        call()
    finally:
        vars(module).update(kernels)
    return log


def recorded(dtype, d: int, bias: bool):
    """The launches of attention, forward and backward, of 3 sequences of 197 tokens."""
    from kernels import attention_triton
    q, k, v = (torch.zeros(3 * 197, 2, d, dtype=dtype, requires_grad=True) for _ in range(3))
    starts = torch.arange(4, dtype=torch.int32) * 197
    b = torch.zeros(2, 197, 197, requires_grad=True) if bias else None
    run = attention_triton.attention_triton
    return launches(attention_triton, lambda: run(q, k, v, starts, starts, None, b).sum().backward())


def recorded_contrast(dtype, E: int):
    from kernels import contrastive_triton
    from kernels.contrastive import contrastive_triton as run
    case = random_contrast(0, 512, 4096, 512, 0.07, dtype, E=E)
    log = launches(contrastive_triton, lambda: contrast_loss(*run(*case, 0)[:3], 4096).backward())
    return list({kernel.fn.__name__: (kernel, arguments) for kernel, arguments in log}.values())


def compiled(kernel, arguments, name: str) -> dict:
    """-> registers, spilled bytes, shared memory and tensor core instructions of one kernel on one GPU."""
    from triton import knobs
    from triton.runtime import driver
    driver.set_active(PretendGPU(name))
    done = kernel.warmup(grid=(1,), **arguments)
    if name.startswith("gfx"):
        text = done.asm["amdgcn"]
        count = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))
        return dict(registers=count("vgpr_count"), spilled=count("private_segment_fixed_size"),
                    shared=done.metadata.shared, tensor=len(re.findall(r"\bv_mfma", text)))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        say = lambda tool, flag: subprocess.run([tool.path, flag, file.name], capture_output=True, text=True).stdout
        usage, code = say(knobs.nvidia.cuobjdump, "-res-usage"), say(knobs.nvidia.nvdisasm, "-c")
    count = lambda key: int(re.search(rf"{key}:(\d+)", usage).group(1))
    return dict(registers=count("REG"), spilled=count("STACK") + count("LOCAL"), shared=done.metadata.shared,
                tensor=len(re.findall(r"\b[HDIQ]G?MMA\b", code)))


def print_resources(targets: list, quick: bool) -> int:
    from kernels import attention_triton, contrastive_triton
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="kernels_bench_"))
    calls = {f"attention {t} d={d}{' bias' * b}": functools.partial(recorded, DTYPES[t], d, b)
             for t, widths in WIDTHS.items() for d in widths for b in (False, True)}
    calls |= {f"contrast {t} E={E}": functools.partial(recorded_contrast, DTYPES[t], E)
              for t in WIDTHS for E in (128, 256)}
    if quick:
        calls = {title: calls[title] for title in QUICK}
    print("\nresources, compiled offline: registers / spilled bytes / shared memory, KB / tensor core instructions\n\n"
          f"| kernel | tile, warps | {' | '.join(targets)} |\n|---|---|{'---|' * len(targets)}")
    bad, amd = 0, kernels.amd
    for title, record in calls.items():
        rows = {}
        for name in targets:
            for module in (kernels, attention_triton, contrastive_triton):
                module.amd = lambda: name.startswith("gfx")                            # choose as if on that GPU
            for kernel, arguments in record():
                r = compiled(kernel, arguments, name)
                wrong = r["spilled"] or r["shared"] > SHARED_LIMIT[name] or ("16" in title and not r["tensor"])
                bad += bool(wrong) and not name.startswith("gfx")
                sizes = [arguments[k] for k in ("QUERIES", "KEYS", "ROWS", "COLUMNS") if k in arguments]
                rows.setdefault(kernel.fn.__name__, [f"{sizes[0]} x {sizes[1]}, {arguments['num_warps']}"]).append(
                    f"{r['registers']} / {r['spilled']} / {r['shared'] / 1024:.0f} / {r['tensor']}{' !' * bool(wrong)}")
        for kernel, cells in rows.items():
            print(f"| {title} {kernel.removesuffix('_kernel')} | {' | '.join(cells)} |", flush=True)
    for module in (kernels, attention_triton, contrastive_triton):
        module.amd = amd
    print(f"\n{bad} NVIDIA entries spill, do not fit or lack tensor core instructions"
          f" (limits, KB: {', '.join(f'{n} {SHARED_LIMIT[n] // 1024}' for n in targets)})")
    return bad


# ------------------------------------------------------------------------------------------------------------------
# GPU: milliseconds (nobody has run this yet)
# ------------------------------------------------------------------------------------------------------------------

PEAK = {"A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)} # bf16 FLOP/s, bytes/s


def milliseconds(run) -> float:
    """Median of 20, after 5 to warm up."""
    times = []
    for i in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[5:])


def roofline(flops: float, size: float) -> str:
    """The least time, in ms, in which this GPU could do these FLOPs or move these bytes, if its data sheet held."""
    peak = next((p for name, p in PEAK.items() if name in torch.cuda.get_device_name()), None)
    return f"{1e3 * max(flops / peak[0], size / peak[1]):.3f}" if peak else "unknown GPU"


def print_gpu():
    def matrices(*shape):
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    print("\nEvery time includes its launches, as a training step does. GFLOP counts what the kernels compute, "
          "scores twice in the\n"
          "backward pass included, so the roofline is that of this algorithm; MB counts every matrix once per kernel.\n"
          "\nattention, bf16, forward + backward, ms (12 heads of 64)\n\n| sequences | kernel | SDPA, padded | "
          "varlen_attn | GFLOP | MB | roofline |\n|---|---|---|---|---|---|---|")
    for title, lengths in (("256 images of 197 tokens", torch.full((256,), 197)),
                           ("1024 sentences of 4 to 60", torch.arange(1024) % 57 + 4)):
        starts, T, L = F.pad(lengths.cumsum(0), (1, 0)).int().cuda(), int(lengths.sum()), int(lengths.max())
        (q, k, v), padded = matrices(T, 12, 64), matrices(len(lengths), 12, L, 64)
        mask = (torch.arange(L) < lengths[:, None])[:, None, None].cuda()
        mask = None if bool((lengths == L).all()) else mask                            # masked, SDPA may not take flash
        def both(out, *inputs):
            torch.autograd.grad(out.sum(), inputs)
        def varlen():
            from torch.nn.attention.varlen import varlen_attn
            both(varlen_attn(q, k, v, starts, starts, L, L), q, k, v)
        times = [milliseconds(lambda: both(attention(q, k, v, starts, starts), q, k, v)),
                 milliseconds(lambda: both(F.scaled_dot_product_attention(*padded, mask), *padded)),
                 milliseconds(varlen)]
        flops = 9 * 2 * 12 * 64 * (lengths.double() ** 2).sum().item()                 # 2 products forward, 7 backward
        size = 16 * 2 * T * 12 * 64                                                    # 4 + 6 + 6 matrices, per kernel
        print(f"| {title} | " + " | ".join(f"{t:.3f}" for t in times)
              + f" | {flops / 1e9:.1f} | {size / 1e6:.0f} | {roofline(flops, size)} |")
    print("\ncontrast, bf16, E = 256, forward + backward, ms\n\n| N | kernel | with draws | naive | GFLOP | MB | "
          "roofline |\n|---|---|---|---|---|---|---|")
    for N in (1024, 8192, 32768):
        case = random_contrast(0, N, N, 0, 0.07, torch.bfloat16, "cuda", E=256)
        def step(run):
            torch.autograd.grad(contrast_loss(*run()[:3], N), case[:3])
        times = [milliseconds(lambda: step(lambda: contrastive(*case, seed))) for seed in (None, 0)]
        naive = milliseconds(lambda: step(lambda: contrastive_strip(*case)))
        flops, size = 10 * N * N * 256, 8 * 2 * N * 256                                # 5 products of 2 N^2 E
        print(f"| {N} | {times[0]:.3f} | {times[1]:.3f} | {naive:.3f} | {flops / 1e9:.1f} | {size / 1e6:.0f} "
              f"| {roofline(flops, size)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small cases only")
    parser.add_argument("--only", choices=["errors", "cpu", "resources", "gpu"], help="one part")
    parser.add_argument("--targets", default="sm_80,sm_90", help="GPUs to compile for (default: %(default)s)")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "N"), help="one timed run of the cpu part, as JSON")
    args = parser.parse_args()
    if unknown := set(args.targets.split(",")) - set(SHARED_LIMIT):
        parser.error(f"--targets: {', '.join(sorted(unknown))} is none of {', '.join(SHARED_LIMIT)}")
    if args.child:
        print(json.dumps(one_contrast(args.child[0], int(args.child[1]))))
        return 0
    cuda, bad = torch.cuda.is_available(), 0
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'no GPU: no time below is of a GPU'}")
    if args.only in (None, "errors"):
        bad += print_errors("cuda" if cuda and not interpreting() else "cpu", args.quick)
        if not cuda and not interpreting() and triton_installed():                     # one process, one mode
            child = [sys.executable, "-m", "kernels.bench", "--only", "errors"] + ["--quick"] * args.quick
            bad += subprocess.run(child, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    if args.only in (None, "cpu"):
        print_cpu(args.quick)
    if args.only == "resources" or args.only is None and not cuda:
        if not triton_installed():
            print("\nresources: triton is not installed (pip install triton)")
        else:
            bad += print_resources(args.targets.split(","), args.quick)
    if args.only == "gpu" or args.only is None and cuda:
        print_gpu() if cuda else print("\ngpu: there is none")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
