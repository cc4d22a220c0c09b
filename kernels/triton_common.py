"""What attention_triton.py and contrastive_triton.py share: the types that a kernel computes in,
and how it loads rows, multiplies and rounds.

A kernel's constants travel as one NamedTuple `c`, a tl.constexpr: triton compiles a kernel for each
value of it. The device functions here read the fields of c that computing_types fills.
"""
import torch
import triton
import triton.language as tl

import kernels

LOG2_E = tl.constexpr(1.4426950408889634)       # exp(x) = 2^(x LOG2_E): GPUs have 2^x in hardware
LN_2 = tl.constexpr(0.6931471805599453)         # and back


def computing_types(dtype) -> dict:
    """The types a kernel computes in: PRODUCT, of the operands of a matrix product; SUM, of all
    else; PASSES, how float32 is multiplied (three passes of tf32 on NVIDIA's tensor cores).

    The interpreter cannot multiply bfloat16, it silently returns garbage. There operands are
    float32, rounded as bfloat16 would be (ROUND)."""
    emulated = dtype == torch.bfloat16 and kernels.interpreting()
    product = getattr(tl, str(dtype).removeprefix("torch."))
    return {
        "PRODUCT": tl.float32 if emulated else product,
        "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
        "ROUND": emulated,
        "PASSES": "ieee" if kernels.amd() else "tf32x3",
    }


def power_of_two(width: int) -> int:
    """The width of a tile: `width` rounded up to a power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def load_rows(matrix, rows, valid, stride, E: tl.constexpr, WIDTH: tl.constexpr,
              TYPE: tl.constexpr):
    """Rows of a matrix (., E) -> (len(rows), WIDTH): 0 where a row is not valid or a column past E
    (WIDTH is a power of two). There is no column test where none is needed: a mask along the
    contiguous dimension costs speed."""
    columns = tl.arange(0, WIDTH)
    mask = valid[:, None]
    if WIDTH > E:
        mask = mask & (columns < E)[None, :]
    where = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(matrix + where, mask=mask, other=0).to(TYPE)


@triton.jit
def store_rows(matrix, x, rows, valid, stride, E: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of load_rows: x (len(rows), WIDTH) to the valid rows of a matrix (., E)."""
    columns = tl.arange(0, WIDTH)
    where = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(matrix + where, x, mask=valid[:, None] & (columns < E)[None, :])


@triton.jit
def dot(a, b, total, c: tl.constexpr):
    """total (None: 0) + a b, summed in c.SUM."""
    return tl.dot(a, b, total, out_dtype=c.SUM, input_precision=c.PASSES)


@triton.jit
def narrow(x, c: tl.constexpr):
    """x in the type of a product's operands. c.ROUND: float32, rounded to bfloat16's bits (to
    nearest, ties to even)."""
    if c.ROUND:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(c.PRODUCT)
