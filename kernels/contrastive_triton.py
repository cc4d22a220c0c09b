"""Contrast as Triton kernels: the steps of kernels/contrastive.py with tiles in registers instead
of in the cache.

One pass gives both sums. A program keeps ROWS rows of a and walks over tiles of COLUMNS columns.
The rows' log-sum-exp is online (a running maximum and sum). A column's, over the ROWS rows of the
tile, is complete at once and written to its own place [row block, column]. torch merges the few
partial results: no atomics, no locks, the same bits every time.

The backward pass needs ds b and ds^T a. One kernel does both, called twice with the roles of a and
b swapped: computing a tile again is cheaper than adding its share of db to memory with atomics, and
deterministic.

Letters: B rows, N columns, E embedding (WIDTH: E rounded up to a power of two, at most 256). All
logits are in powers of 2.
"""
from typing import NamedTuple, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import kernels
from kernels.triton_common import (LOG2_E, computing_types, dot, load_rows, narrow, power_of_two,
                                   store_rows)

ROWS_PER_LAUNCH = 8192          # bounds the columns' partial results: 8192 / ROWS x N numbers
PROGRAMS = 264                  # two for each of an H100's 132 multiprocessors


# --------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------

class Constants(NamedTuple):
    """What a kernel is compiled for: see triton_common."""
    PRODUCT: object
    SUM: object
    ROUND: bool
    PASSES: str
    E: int
    WIDTH: int
    ROWS: int
    COLUMNS: int


@triton.jit
def tile(xs, ys, x_ids, y_ids, i, j, B, N, shift, scale, c: tl.constexpr):
    """Logits of rows i (their true partners: columns i + shift) and columns j; -inf where `same` or
    outside."""
    s = dot(xs, ys.T, None, c) * scale
    x_id = tl.load(x_ids + i, mask=i < B, other=0)
    y_id = tl.load(y_ids + j, mask=j < N, other=0)
    partners = i[:, None] + shift == j[None, :]
    kept = partners | (x_id[:, None] != y_id[None, :])
    inside = (i < B)[:, None] & (j < N)[None, :]
    return tl.where(kept & inside, s, float("-inf"))


@triton.jit
def statistics_kernel(x, y, temperature, x_ids, y_ids, row_part, column_part, first, B, N, shift,
                      per_split, x_stride, y_stride, c: tl.constexpr):
    """Both log-sum-exps of ROWS rows of x and one split of the columns."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    i = first + block * c.ROWS + tl.arange(0, c.ROWS)
    scale = LOG2_E / tl.load(temperature).to(c.SUM)
    xs = load_rows(x, i, i < B, x_stride, c.E, c.WIDTH, c.PRODUCT)
    top = tl.full([c.ROWS], float("-inf"), c.SUM)
    total = tl.zeros([c.ROWS], c.SUM)
    end = min(split * per_split + per_split, N)
    for start in range(split * per_split, end, c.COLUMNS):
        j = start + tl.arange(0, c.COLUMNS)
        ys = load_rows(y, j, j < N, y_stride, c.E, c.WIDTH, c.PRODUCT)
        s = tile(xs, ys, x_ids, y_ids, i, j, B, N, shift, scale, c)
        # Rows: a running maximum and sum. A row that is all -inf so far must not give -inf - -inf.
        new_top = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        here = tl.sum(tl.exp2(s - finite[:, None]), 1)
        total = total * tl.exp2(top - finite) + here
        top = new_top
        # Columns: complete for these ROWS rows.
        column_top = tl.max(s, 0)
        column_top = tl.where(column_top == float("-inf"), 0.0, column_top)
        column_total = tl.sum(tl.exp2(s - column_top[None, :]), 0)
        column_lse = column_top + tl.log2(column_total)
        tl.store(column_part + block.to(tl.int64) * N + j, column_lse, mask=j < N)
    tl.store(row_part + split * B + i, top + tl.log2(total), mask=i < B)


@triton.jit
def gradient_kernel(x, y, temperature, x_ids, y_ids, x_lse, y_lse, x_gradient, y_gradient, part, B,
                    N, shift, per_split, x_stride, y_stride, c: tl.constexpr):
    """ds y for ROWS rows of x over one split of the columns. lse +inf (nothing was summed): no
    gradient."""
    block = tl.program_id(0)
    split = tl.program_id(1)
    i = block * c.ROWS + tl.arange(0, c.ROWS)
    scale = LOG2_E / tl.load(temperature).to(c.SUM)
    xs = load_rows(x, i, i < B, x_stride, c.E, c.WIDTH, c.PRODUCT)
    lse_i = tl.load(x_lse + i, mask=i < B, other=float("inf"))
    g_i = tl.load(x_gradient + i, mask=i < B, other=0.0)
    dx = tl.zeros([c.ROWS, c.WIDTH], c.SUM)
    end = min(split * per_split + per_split, N)
    for start in range(split * per_split, end, c.COLUMNS):
        j = start + tl.arange(0, c.COLUMNS)
        ys = load_rows(y, j, j < N, y_stride, c.E, c.WIDTH, c.PRODUCT)
        s = tile(xs, ys, x_ids, y_ids, i, j, B, N, shift, scale, c)
        lse_j = tl.load(y_lse + j, mask=j < N, other=float("inf"))
        g_j = tl.load(y_gradient + j, mask=j < N, other=0.0)
        by_row = g_i[:, None] * tl.exp2(s - lse_i[:, None])
        by_column = g_j[None, :] * tl.exp2(s - lse_j[None, :])
        dx = dot(narrow(by_row + by_column, c), ys, dx, c)
    store_rows(part, dx, split * B + i, i < B, c.E, c.E, c.WIDTH)


# --------------------------------------------------------------------------------------------------
# Launching
# --------------------------------------------------------------------------------------------------

def tile_sizes(kernel: str, dtype):
    """-> ROWS, COLUMNS, warps. None spills a register on an NVIDIA GPU: `python -m kernels.bench`
    compiles them all."""
    if kernels.interpreting():
        return 128, 128, 4                                               # fewest NumPy calls
    if kernels.amd():
        return 16 if dtype == torch.float32 else 64, 32, 4
    if dtype == torch.float32:
        return (16, 32, 4) if kernel == "gradient" else (32, 32, 8)
    return 64, 64, 8 if kernel == "gradient" else 4


def contiguous_rows(x):
    """The kernels need contiguous rows, at any distance from each other."""
    return x if x.stride(1) == 1 else x.contiguous()


class Launch:
    """A call of one kernel for rows x and columns y: its grid and its arguments."""

    def __init__(self, kernel: str, x, y, temperature, x_ids, y_ids, shift):
        self.rows, self.columns, warps = tile_sizes(kernel, x.dtype)
        types = computing_types(x.dtype)
        # float32 takes no tensor cores: three passes of tf32 over 256 columns spill. (Under
        # autocast vectors arrive in bfloat16.)
        types["PASSES"] = "ieee"
        E = x.shape[1]
        self.arguments = {
            "x": x, "y": y, "temperature": temperature, "x_ids": x_ids, "y_ids": y_ids,
            "B": len(x), "N": len(y), "shift": shift, "x_stride": x.stride(0),
            "y_stride": y.stride(0), "num_warps": warps, "num_stages": 2, "enable_fp_fusion": True,
            "c": Constants(**types, E=E, WIDTH=power_of_two(E), ROWS=self.rows,
                           COLUMNS=self.columns),
        }

    def splits(self, rows: int):
        """-> grid (row blocks, splits of the columns) for so many rows, and the columns of one
        split: enough programs for every multiprocessor, but few rows are split."""
        row_blocks = triton.cdiv(rows, self.rows)
        column_tiles = triton.cdiv(self.arguments["N"], self.columns)
        wanted = max(1, min(column_tiles, PROGRAMS // row_blocks))
        per_split = triton.cdiv(column_tiles, wanted)
        return (row_blocks, triton.cdiv(column_tiles, per_split)), per_split * self.columns


def log2_sum_exp2(parts):
    """(parts, n) -> (n,). Base 2 from end to end: at temperature 0.02 a change of base costs 3e-6
    of a gradient."""
    top = parts.amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    return top + (parts - top).exp2().sum(0).log2()


@torch.library.custom_op("cclm::contrast_statistics", mutates_args=())
def statistics_op(x: Tensor, y: Tensor, temperature: Tensor, x_ids: Tensor, y_ids: Tensor,
                  shift: int) -> Tuple[Tensor, Tensor]:
    """-> row_lse (B,), column_lse (N,), base 2"""
    B = len(x)
    N = len(y)
    launch = Launch("statistics", x, y, temperature, x_ids, y_ids, shift)
    row_lse = x.new_empty(B, dtype=torch.promote_types(x.dtype, torch.float32))
    column_lse = row_lse.new_full((N,), -torch.inf)
    for first in range(0, B, ROWS_PER_LAUNCH):
        rows = min(ROWS_PER_LAUNCH, B - first)
        grid, per_split = launch.splits(rows)
        row_part = row_lse.new_empty(grid[1], B)
        column_part = row_lse.new_empty(grid[0], N)
        statistics_kernel[grid](row_part=row_part, column_part=column_part, first=first,
                                per_split=per_split, **launch.arguments)
        row_lse[first:first + rows] = log2_sum_exp2(row_part[:, first:first + rows])
        column_lse = log2_sum_exp2(torch.cat([column_part, column_lse[None]]))
    return row_lse, column_lse


@torch.library.custom_op("cclm::contrast_gradient", mutates_args=())
def gradient_op(x: Tensor, y: Tensor, temperature: Tensor, x_ids: Tensor, y_ids: Tensor,
                x_lse: Tensor, y_lse: Tensor, x_gradient: Tensor, y_gradient: Tensor,
                shift: int) -> Tensor:
    """-> ds y (B, E), without the true pairs' own gradient"""
    launch = Launch("gradient", x, y, temperature, x_ids, y_ids, shift)
    # Gradients of a mean over 32,768 rows would underflow in fp16: they are scaled to 1 within the
    # kernel, and back in float32.
    size = torch.maximum(x_gradient.abs().amax(), y_gradient.abs().amax()).clamp(min=1e-30)
    grid, per_split = launch.splits(len(x))
    part = x_lse.new_empty(grid[1], *x.shape)
    gradient_kernel[grid](x_lse=x_lse, y_lse=y_lse, x_gradient=x_gradient / size,
                          y_gradient=y_gradient / size, part=part, per_split=per_split,
                          **launch.arguments)
    return part.sum(0) * size                                            # (splits, B, E) -> (B, E)


@statistics_op.register_fake
def _(x, y, temperature, x_ids, y_ids, shift):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(y.shape[0], dtype=dtype)


@gradient_op.register_fake
def _(x, y, temperature, x_ids, y_ids, x_lse, y_lse, x_gradient, y_gradient, shift):
    return x_lse.new_empty(x.shape)
