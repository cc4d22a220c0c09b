"""Contrast as Triton kernels: the steps of kernels/contrastive.py with tiles in registers instead of in the cache.

One pass gives both sums. A program keeps ROWS rows of a and walks over tiles of COLUMNS columns. The rows' log-sum-exp
is online (a running maximum and sum); a column's, over the ROWS rows of the tile, is complete at once and written to
its own place [row block, column]. torch merges the few partial results: no atomics, no locks, the same bits every time.

The backward pass needs ds b and ds^T a. One kernel does both, called twice with the roles of a and b swapped: computing
a tile again is cheaper than adding its share of db to memory with atomics, and deterministic.

The race for hard negatives walks over its B columns twice: for the row's log-sum-exp, then for the first bell.

Letters: B rows, N columns, E embedding (WIDTH: E rounded up to a power of two, at most 256), all logits in powers of 2.
"""
from __future__ import annotations           # `tl.constexpr` in a signature is only a word until triton reads it

import functools
from typing import Tuple

import torch
from torch import Tensor

from kernels import amd, interpreting, load_triton, precision   # load_triton also brings tl, load_rows and narrow

ROWS_PER_LAUNCH = 8192          # bounds the columns' partial results: 8192 / ROWS x N numbers, not B / ROWS x N
PROGRAMS = 264                  # two for each of an H100's 132 multiprocessors: few rows are split over their columns


# ------------------------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------------------------

def tile(xs, ys, x_ids, y_ids, i, j, B, N, shift, scale, SUM: tl.constexpr, PASSES: tl.constexpr):
    """Logits of rows i (their true partners: columns i + shift) and columns j; -inf where `same` or outside."""
    s = tl.dot(xs, ys.T, out_dtype=SUM, input_precision=PASSES) * scale
    x_0, x_1 = tl.load(x_ids + 2 * i, mask=i < B, other=0), tl.load(x_ids + 2 * i + 1, mask=i < B, other=0)
    y_0, y_1 = tl.load(y_ids + 2 * j, mask=j < N, other=0), tl.load(y_ids + 2 * j + 1, mask=j < N, other=0)
    same = (x_0[:, None] == y_0[None, :]) | (x_1[:, None] == y_1[None, :])
    kept = (i[:, None] + shift == j[None, :]) | (same == 0)
    return tl.where(kept & (i < B)[:, None] & (j < N)[None, :], s, float("-inf"))


def statistics_kernel(x, y, temperature, x_ids, y_ids, row_part, column_part, first, B, N, shift, per_split, x_stride,
                      y_stride, E: tl.constexpr, WIDTH: tl.constexpr, PRODUCT: tl.constexpr, SUM: tl.constexpr,
                      ROUND: tl.constexpr, PASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    block, split = tl.program_id(0), tl.program_id(1)
    i = first + block * ROWS + tl.arange(0, ROWS)
    scale = 1.4426950408889634 / tl.load(temperature).to(SUM)
    xs = load_rows(x, i, i < B, x_stride, E, WIDTH, PRODUCT)
    top = tl.full([ROWS], float("-inf"), SUM)
    total = tl.zeros([ROWS], SUM)
    for start in range(split * per_split, min(split * per_split + per_split, N), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        ys = load_rows(y, j, j < N, y_stride, E, WIDTH, PRODUCT)
        s = tile(xs, ys, x_ids, y_ids, i, j, B, N, shift, scale, SUM, PASSES)
        new_top = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)                      # -inf - -inf would be nan
        total = total * tl.exp2(top - finite) + tl.sum(tl.exp2(s - finite[:, None]), 1)
        top = new_top
        column_top = tl.max(s, 0)
        column_top = tl.where(column_top == float("-inf"), 0.0, column_top)
        column_total = tl.sum(tl.exp2(s - column_top[None, :]), 0)
        tl.store(column_part + block.to(tl.int64) * N + j, column_top + tl.log2(column_total), mask=j < N)
    tl.store(row_part + split * B + i, top + tl.log2(total), mask=i < B)


def gradient_kernel(x, y, temperature, x_ids, y_ids, x_lse, y_lse, x_gradient, y_gradient, part, B, N, shift, per_split,
                    x_stride, y_stride, E: tl.constexpr, WIDTH: tl.constexpr, PRODUCT: tl.constexpr, SUM: tl.constexpr,
                    ROUND: tl.constexpr, PASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ds y for ROWS rows of x over one split of the columns. lse +inf (nothing was summed): no gradient."""
    block, split = tl.program_id(0), tl.program_id(1)
    i = block * ROWS + tl.arange(0, ROWS)
    scale = 1.4426950408889634 / tl.load(temperature).to(SUM)
    xs = load_rows(x, i, i < B, x_stride, E, WIDTH, PRODUCT)
    lse_i = tl.load(x_lse + i, mask=i < B, other=float("inf"))
    g_i = tl.load(x_gradient + i, mask=i < B, other=0.0)
    dx = tl.zeros([ROWS, WIDTH], SUM)
    for start in range(split * per_split, min(split * per_split + per_split, N), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        ys = load_rows(y, j, j < N, y_stride, E, WIDTH, PRODUCT)
        s = tile(xs, ys, x_ids, y_ids, i, j, B, N, shift, scale, SUM, PASSES)
        lse_j = tl.load(y_lse + j, mask=j < N, other=float("inf"))
        g_j = tl.load(y_gradient + j, mask=j < N, other=0.0)
        ds = g_i[:, None] * tl.exp2(s - lse_i[:, None]) + g_j[None, :] * tl.exp2(s - lse_j[None, :])
        dx = tl.dot(narrow(ds, PRODUCT, ROUND), ys, dx, out_dtype=SUM, input_precision=PASSES)
    e = tl.arange(0, WIDTH)
    where = (split * B + i).to(tl.int64)[:, None] * E + e[None, :]
    tl.store(part + where, dx, mask=(i < B)[:, None] & (e < E)[None, :])


def block_logits(x, y, i, j, B, temperature, x_stride, y_stride, E: tl.constexpr, DEPTH: tl.constexpr,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """<x_i, y_j> / temperature in float64, -inf outside."""
    s = tl.zeros([ROWS, COLUMNS], tl.float64)
    for e in tl.static_range(0, E, DEPTH):
        xs = load_rows(x + e, i, i < B, x_stride, E - e, DEPTH, tl.float64)
        ys = load_rows(y + e, j, j < B, y_stride, E - e, DEPTH, tl.float64)
        s = tl.dot(xs, ys.T, s, out_dtype=tl.float64)
    return tl.where((j < B)[None, :], s / tl.load(temperature).to(tl.float64), float("-inf"))


def draw_kernel(x, y, temperature, x_ids, y_ids, draws, drawn, chosen, B, x_stride, y_stride, E: tl.constexpr,
                DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), tl.float64)
    total = tl.zeros([ROWS], tl.float64)
    for start in range(0, B, COLUMNS):                                                 # softmax over ALL B columns
        j = start + tl.arange(0, COLUMNS)
        s = block_logits(x, y, i, j, B, temperature, x_stride, y_stride, E, DEPTH, ROWS, COLUMNS)
        new_top = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(s - new_top[:, None]), 1)
        top = new_top
    x_0, x_1 = tl.load(x_ids + 2 * i, mask=i < B, other=0), tl.load(x_ids + 2 * i + 1, mask=i < B, other=0)
    counter = tl.load(draws + i, mask=i < B, other=0)
    rate = tl.zeros([ROWS], tl.float64)                                                # 0: nobody has rung yet
    winner = tl.full([ROWS], -1, tl.int32)
    for start in range(0, B, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        s = block_logits(x, y, i, j, B, temperature, x_stride, y_stride, E, DEPTH, ROWS, COLUMNS)
        weight = tl.exp(s - top[:, None]) / total[:, None] + 1e-5
        y_0, y_1 = tl.load(y_ids + 2 * j, mask=j < B, other=0), tl.load(y_ids + 2 * j + 1, mask=j < B, other=0)
        allowed = (x_0[:, None] != y_0[None, :]) & (x_1[:, None] != y_1[None, :]) & (i[:, None] != j[None, :])
        weight = tl.where(allowed & (j < B)[None, :], weight, 0.0)
        h = (counter[:, None] ^ tl.load(drawn + j, mask=j < B, other=0)[None, :]).to(tl.uint32, bitcast=True)
        h = (h ^ (h >> 16)) * 0x85EBCA6B                                               # kernels.contrastive.mix
        h = (h ^ (h >> 13)) * 0xC2B2AE35
        h = h ^ (h >> 16)
        uniform = (h.to(tl.int32, bitcast=True).to(tl.float64) + 2147483648.5) * 2.3283064365386963e-10
        tile_rate, tile_winner = tl.max(weight / -tl.log(uniform), 1, return_indices=True)
        winner = tl.where(tile_rate > rate, start + tile_winner, winner)
        rate = tl.maximum(rate, tile_rate)
    tl.store(chosen + i, winner.to(tl.int64), mask=i < B)


# ------------------------------------------------------------------------------------------------------------------
# Launching
# ------------------------------------------------------------------------------------------------------------------

def tiles(kernel: str, dtype) -> dict:
    """None spills a register on sm_80 or sm_90: `python -m kernels.bench` compiles them all."""
    if interpreting():
        return dict(ROWS=128, COLUMNS=128)                                             # fewest NumPy calls
    if kernel == "draw":
        return dict(ROWS=32, COLUMNS=32, num_warps=4, num_stages=1)
    if amd():
        return dict(ROWS=16 if dtype == torch.float32 else 64, COLUMNS=32, num_warps=4, num_stages=2)
    if dtype == torch.float32:
        return dict(ROWS=32, COLUMNS=32, num_warps=8, num_stages=2)
    return dict(ROWS=64, COLUMNS=64, num_warps=8 if kernel == "gradient" else 4, num_stages=2)


@functools.cache
def load_kernels():
    load_triton(globals(), "tile", "statistics_kernel", "gradient_kernel", "block_logits", "draw_kernel")


def common(kernel: str, x, y, temperature, x_ids, y_ids):
    """What every kernel is given, and its tile sizes."""
    return dict(x=x, y=y, temperature=temperature, x_ids=x_ids, y_ids=y_ids, B=len(x), x_stride=x.stride(0),
                y_stride=y.stride(0), E=x.shape[1], **tiles(kernel, x.dtype), enable_fp_fusion=True)


def log2_sum_exp2(parts):
    """(parts, n) -> (n,). Base 2 from end to end: at temperature 0.02 a change of base costs 3e-6 of a gradient."""
    top = parts.amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    return top + (parts - top).exp2().sum(0).log2()


def wide(x):
    """What the kernels need that multiply whole vectors at once. float32 takes no tensor cores: three passes of tf32
    over 256 columns spill. (Under autocast vectors arrive in bfloat16.)"""
    return dict(WIDTH=max(16, 1 << (x.shape[1] - 1).bit_length()), **precision(x.dtype) | dict(PASSES="ieee"))


def splits(rows: int, columns: int, size: dict):
    """-> (row blocks, splits of the columns), and the columns of one split: work for every multiprocessor."""
    blocks, columns_in_tiles = -(-rows // size["ROWS"]), -(-columns // size["COLUMNS"])
    per_split = -(-columns_in_tiles // max(1, min(columns_in_tiles, PROGRAMS // blocks)))
    return (blocks, -(-columns_in_tiles // per_split)), per_split * size["COLUMNS"]


@torch.library.custom_op("cclm::contrast_statistics", mutates_args=())
def statistics_op(x: Tensor, y: Tensor, temperature: Tensor, x_ids: Tensor, y_ids: Tensor,
                  shift: int) -> Tuple[Tensor, Tensor]:
    """-> row_lse (B,), column_lse (N,), base 2"""
    load_kernels()
    same = common("statistics", x, y, temperature, x_ids, y_ids) | dict(N=len(y), shift=shift) | wide(x)
    row_lse = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    column_lse = row_lse.new_full((len(y),), -torch.inf)
    for first in range(0, len(x), ROWS_PER_LAUNCH):
        rows = min(ROWS_PER_LAUNCH, len(x) - first)
        grid, per_split = splits(rows, len(y), same)
        row_part, column_part = row_lse.new_empty(grid[1], len(x)), row_lse.new_empty(grid[0], len(y))
        statistics_kernel[grid](row_part=row_part, column_part=column_part, first=first, per_split=per_split, **same)
        row_lse[first:first + rows] = log2_sum_exp2(row_part[:, first:first + rows])
        column_lse = log2_sum_exp2(torch.cat([column_part, column_lse[None]]))
    return row_lse, column_lse


@torch.library.custom_op("cclm::contrast_gradient", mutates_args=())
def gradient_op(x: Tensor, y: Tensor, temperature: Tensor, x_ids: Tensor, y_ids: Tensor, x_lse: Tensor, y_lse: Tensor,
                x_gradient: Tensor, y_gradient: Tensor, shift: int) -> Tensor:
    load_kernels()
    same = common("gradient", x, y, temperature, x_ids, y_ids) | dict(N=len(y), shift=shift) | wide(x)
    # gradients of a mean over 32,768 rows would underflow in fp16: they are scaled to 1 within, and back in float32
    size = torch.maximum(x_gradient.abs().amax(), y_gradient.abs().amax()).clamp(min=1e-30)
    grid, per_split = splits(len(x), len(y), same)
    part = x_lse.new_empty(grid[1], *x.shape)
    gradient_kernel[grid](x_lse=x_lse, y_lse=y_lse, x_gradient=x_gradient / size, y_gradient=y_gradient / size,
                          part=part, per_split=per_split, **same)
    return part.sum(0) * size


@torch.library.custom_op("cclm::draw", mutates_args=())
def draw_op(x: Tensor, y: Tensor, temperature: Tensor, x_ids: Tensor, y_ids: Tensor, draws: Tensor,
            drawn: Tensor) -> Tensor:
    load_kernels()
    same = common("draw", x, y, temperature, x_ids, y_ids)
    chosen = torch.empty(len(x), dtype=torch.int64, device=x.device)
    draw_kernel[(-(-len(x) // same["ROWS"]),)](draws=draws, drawn=drawn, chosen=chosen, DEPTH=32, **same)
    return chosen


@statistics_op.register_fake
def _(x, y, temperature, x_ids, y_ids, shift):
    return tuple(x.new_empty(rows.shape[0], dtype=torch.promote_types(x.dtype, torch.float32)) for rows in (x, y))


@gradient_op.register_fake
def _(x, y, temperature, x_ids, y_ids, x_lse, y_lse, x_gradient, y_gradient, shift):
    return x_lse.new_empty(x.shape)


@draw_op.register_fake
def _(x, y, temperature, x_ids, y_ids, draws, drawn):
    return x_ids.new_empty(x.shape[0])
