"""Kernels: attention over packed sequences and one-pass contrast.

Each file holds a torch version that runs everywhere, a Triton version of the same function, and a public function that
picks one. triton is 1 GB and absent on macOS, so nothing here imports it: kernels are written as plain functions, and
load_triton turns them into Triton kernels when the first one is needed. What both files share is below.
"""
from __future__ import annotations           # `tl.constexpr` in a signature is only a word until triton reads it

import functools
import importlib.util
import os

import torch


def interpreting() -> bool:
    """True in a process started with TRITON_INTERPRET=1: Triton then runs on CPU tensors, slowly, to be tested."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def amd() -> bool:
    return torch.version.hip is not None


@functools.cache
def capable() -> bool:
    return amd() or torch.cuda.get_device_capability() >= (8, 0)                       # bfloat16 products: Ampere


def use_triton(x) -> bool:
    """GPU tensors take the kernel, but for float64; so do CPU tensors in an interpreting process."""
    return interpreting() or (x.is_cuda and x.dtype != torch.float64 and triton_installed() and capable())


def load_triton(scope: dict, *names: str):
    """Replaces the plain functions `names` of a module (scope: its globals()) by Triton kernels."""
    import triton
    for module in (globals(), scope):
        module["tl"] = triton.language
    for name in ("load_rows", "narrow"):
        scope[name] = globals()[name] = jitted(triton, globals()[name])
    for name in names:
        scope[name] = jitted(triton, scope[name])


def jitted(triton, function):
    return triton.jit(function) if function.__class__.__name__ == "function" else function


def precision(dtype) -> dict:
    """What a kernel computes in: PRODUCT, the type of the operands of a matrix product; SUM, of all else; PASSES, how
    float32 is multiplied (three passes of tf32 on NVIDIA's tensor cores). The interpreter cannot multiply bfloat16,
    it silently returns garbage: there operands are float32, rounded as bfloat16 would be (ROUND)."""
    import triton.language as tl
    kind = getattr(tl, str(dtype).removeprefix("torch."))
    emulated = dtype == torch.bfloat16 and interpreting()
    return dict(PRODUCT=tl.float32 if emulated else kind, SUM=tl.float64 if dtype == torch.float64 else tl.float32,
                ROUND=emulated, PASSES="ieee" if amd() else "tf32x3")


# ------------------------------------------------------------------------------------------------------------------
# Device functions
# ------------------------------------------------------------------------------------------------------------------

def load_rows(matrix, rows, valid, stride, E: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    """Rows of a matrix (., E) -> (len(rows), WIDTH): 0 where a row is not valid or a column past E (WIDTH is a power of
    two). No column test where none is needed: a mask along the contiguous dimension costs speed."""
    columns = tl.arange(0, WIDTH)
    mask = valid[:, None]
    if WIDTH > E:
        mask = mask & (columns < E)[None, :]
    return tl.load(matrix + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0).to(TYPE)


def narrow(x, TYPE: tl.constexpr, ROUND: tl.constexpr):
    """x in the type of a product's operands; ROUND: float32, rounded to bfloat16's bits (to nearest, ties to even)."""
    if ROUND:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(TYPE)
