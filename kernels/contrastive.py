"""Contrast: N x N similarities without an N x N matrix.

Letters: B items of this process, N items of all processes, E embedding. Item i's true partner is
column first_row + i.

    s_ij = <a_i, b_j> / temperature         pairs that are `same` (equal ids) but not partners are
    row_lse_i = log sum_j exp s_ij          left out of both sums
    column_lse_j = log sum_i exp s_ij

The slow version (contrastive_naive) keeps s (B, N) and, until the backward pass is over, five more
matrices of its size: 6.4 GB at B = N = 16,384. The trick has three steps and is the same on a CPU
and on a GPU:

  1. A log-sum-exp can be built tile by tile: lse(x, y) = logaddexp(lse(x), lse(y)). One pass over
     the tiles of s gives rows AND columns, and a tile never leaves the cache.
  2. The backward pass needs only exp(s - lse): a tile can be computed again from a, b and two
     vectors.
         ds_ij = g_row_i exp(s_ij - row_lse_i) + g_column_j exp(s_ij - column_lse_j)
                 + (j is i's partner) g_positive_i
         da = ds b / temperature            db = ds^T a / temperature
  3. The temperature's gradient then costs no pass:
         -1/temperature sum_ij ds_ij s_ij = -1/temperature sum_i <a_i, da_i>

A third more arithmetic (five products of this size on a GPU, four here, three in the naive
version); memory O(B + N). The kernels are in kernels/contrastive_triton.py.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import use_triton

TILE_ROWS = 512                  # torch: a tile of 4 MB in float32 stays in the cache between its
TILE_COLUMNS = 2048              # few steps
MAX_EMBEDDING = 256              # kernels: a program keeps whole vectors


class Contrast(NamedTuple):
    row_lse: Tensor              # (B,)
    column_lse: Tensor           # (N,) over this process's rows; -inf where every row is left out
    positives: Tensor            # (B,) s of the true pairs


# --------------------------------------------------------------------------------------------------
# The slow version: the definition, with the whole (B, N) matrix
# --------------------------------------------------------------------------------------------------

def contrastive_naive(a, b_all, temperature, a_ids, b_ids, first_row: int) -> Contrast:
    rows = torch.arange(len(a), device=a.device)
    s = a @ b_all.T / temperature                                        # (B, N)
    positives = s[rows, first_row + rows]                                # (B,)
    same = a_ids[:, None] == b_ids                                       # (B, N)
    same[rows, first_row + rows] = False
    kept = s.masked_fill(same, -torch.inf)                               # (B, N)
    return Contrast(kept.logsumexp(1), kept.logsumexp(0), positives)


# --------------------------------------------------------------------------------------------------
# torch, tile by tile
# --------------------------------------------------------------------------------------------------

def tiles(B: int, N: int):
    """Slices of rows and of columns that cover (B, N)."""
    for r in range(0, B, TILE_ROWS):
        for c in range(0, N, TILE_COLUMNS):
            yield slice(r, min(r + TILE_ROWS, B)), slice(c, min(c + TILE_COLUMNS, N))


class Logits:
    """s tile by tile. x = a / temperature (B, E) and y = b_all (N, E) are in float32 at least:
    16-bit vectors are multiplied in float32."""

    def __init__(self, a, b_all, temperature, a_ids, b_ids, first_row: int):
        dtype = torch.promote_types(torch.promote_types(a.dtype, b_all.dtype), torch.float32)
        self.x = a.to(dtype) / temperature.to(dtype)
        self.y = b_all.to(dtype)
        self.a_ids = a_ids
        self.b_ids = b_ids
        self.first_row = first_row
        partners = self.y[first_row:first_row + len(a)]                  # (B, E)
        self.positives = (self.x * partners).sum(1)                      # (B,)

    def tile(self, r, c):
        """(rows, columns), `same` pairs at -inf."""
        s = self.x[r] @ self.y[c].T
        s.masked_fill_(self.a_ids[r, None] == self.b_ids[c], -torch.inf)
        # A true pair is `same` too: its s is written back. The true pairs of this tile lie on a
        # diagonal, which begins in a later row where first_row + r.start is left of the tile.
        offset = self.first_row + r.start - c.start
        diagonal = s.diagonal(offset)
        start = r.start + max(0, -offset)
        diagonal.copy_(self.positives[start:start + len(diagonal)])
        return s


def statistics_torch(logits):
    """-> row_lse (B,), column_lse (N,), and s if one tile holds it all: a small matrix is worth
    keeping."""
    B = len(logits.x)
    N = len(logits.y)
    row_lse = logits.x.new_full((B,), -torch.inf)
    column_lse = logits.x.new_full((N,), -torch.inf)
    s = None
    for r, c in tiles(B, N):
        s = logits.tile(r, c)                                            # (rows, columns)
        row_lse[r] = torch.logaddexp(row_lse[r], s.logsumexp(1))
        column_lse[c] = torch.logaddexp(column_lse[c], s.logsumexp(0))
    return row_lse, column_lse, s if s.shape == (B, N) else None


def gradients_torch(logits, a, row_lse, column_lse, g_row, g_column, kept):
    """-> ds b (B, E) and ds^T a (N, E), without the true pairs' own gradient, not yet divided by
    the temperature. kept: s, or None."""
    da = torch.zeros_like(logits.x)
    db = torch.zeros_like(logits.y)
    a = a.to(da.dtype)
    for r, c in tiles(len(da), len(db)):
        s = logits.tile(r, c) if kept is None else kept                  # (rows, columns)
        ds = (s - row_lse[r, None]).exp_().mul_(g_row[r, None])
        ds += (s - column_lse[c]).exp_().mul_(g_column[c])
        da[r].addmm_(ds, logits.y[c])
        db[c].addmm_(ds.T, a[r])
    return da, db


class Statistics(torch.autograd.Function):
    """row_lse, column_lse, positives by torch (kernels: None) or by the kernels (the module
    kernels.contrastive_triton); what both share is here."""

    @staticmethod
    def forward(ctx, kernels, first_row, a, b_all, temperature, a_ids, b_ids):
        logits = Logits(a, b_all, temperature, a_ids, b_ids, first_row)
        ctx.kernels = kernels
        ctx.first_row = first_row
        ctx.kept = None
        unit = 1.0
        if kernels:
            unit = math.log(2)                                           # kernels: powers of 2
            row_lse, column_lse = kernels.statistics_op(a, b_all, temperature, a_ids, b_ids,
                                                        first_row)
        else:
            row_lse, column_lse, ctx.kept = statistics_torch(logits)
        ctx.save_for_backward(a, b_all, temperature, a_ids, b_ids, row_lse, column_lse)
        return row_lse * unit, column_lse * unit, logits.positives

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_row, g_column, g_positive):
        a, b_all, temperature, a_ids, b_ids, row_lse, column_lse = ctx.saved_tensors
        first_row = ctx.first_row

        # 1. ds b and ds^T a of both sums. A column that lost every row has lse = -inf: with +inf
        #    its exp(s - lse) is 0, not nan.
        column_lse = column_lse.masked_fill(column_lse == -torch.inf, torch.inf)
        with torch.autocast(a.device.type, enabled=False):
            if ctx.kernels:
                # one kernel, called twice with the roles of a and b swapped
                op = ctx.kernels.gradient_op
                da = op(a, b_all, temperature, a_ids, b_ids, row_lse, column_lse, g_row, g_column,
                        first_row)
                db = op(b_all, a, temperature, b_ids, a_ids, column_lse, row_lse, g_column, g_row,
                        -first_row)
            else:
                logits = Logits(a, b_all, temperature, a_ids, b_ids, first_row)
                da, db = gradients_torch(logits, a, row_lse, column_lse, g_row, g_column, ctx.kept)

        # 2. The true pairs' own part: d positive_i / d a_i = b_i / temperature, and so for b_i.
        own = slice(first_row, first_row + len(a))
        da += g_positive[:, None] * b_all[own]                           # (B, E)
        db[own] += g_positive[:, None] * a                               # (B, E)

        # 3. Divide once. The temperature's gradient is a product of what is there (docstring, 3).
        t = temperature.to(da.dtype)
        da /= t
        db /= t
        dt = -(a * da).sum().to(temperature.dtype) / temperature
        return None, None, da.to(a.dtype), db.to(b_all.dtype), dt, None, None


# --------------------------------------------------------------------------------------------------
# Which one runs
# --------------------------------------------------------------------------------------------------

def contrastive_torch(a, b_all, temperature, a_ids, b_ids, first_row: int) -> Contrast:
    with torch.autocast(a.device.type, enabled=False):
        inputs = (a, b_all, temperature, a_ids, b_ids)
        return Contrast(*Statistics.apply(None, first_row, *inputs))


def contrastive_triton(a, b_all, temperature, a_ids, b_ids, first_row: int) -> Contrast:
    from kernels import contrastive_triton as kernels
    dtype = torch.promote_types(a.dtype, b_all.dtype)
    if dtype == torch.float32 and torch.is_autocast_enabled(a.device.type):
        dtype = torch.get_autocast_dtype(a.device.type)                  # as for any product
    a = kernels.contiguous_rows(a.to(dtype))
    b_all = kernels.contiguous_rows(b_all.to(dtype))
    with torch.autocast(a.device.type, enabled=False):
        inputs = (a, b_all, temperature, a_ids.contiguous(), b_ids.contiguous())
        return Contrast(*Statistics.apply(kernels, first_row, *inputs))


def contrastive(a, b_all, temperature, a_ids, b_ids, first_row: int) -> Contrast:
    """Row and column log-sum-exps of a b_all^T / temperature in O(B + N) memory.

    a (B, E), b_all (N, E), any float type; temperature: a tensor without dimensions, > 0;
    a_ids (B,), b_ids (N,) int64. The results are float32 (float64 for float64) and differentiable
    in a, b_all and temperature. The kernels take E up to MAX_EMBEDDING, torch any. Under CUDA
    autocast the kernels round float32 vectors to autocast's 16 bits, for the tensor cores; the
    torch path keeps float32. Raises ValueError when the shapes do not fit."""
    B = len(a)
    N = len(b_all)
    if a_ids.shape != (B,) or b_ids.shape != (N,) or not 0 <= first_row <= N - B:
        raise ValueError(f"contrastive: {B} rows with ids {tuple(a_ids.shape)} from column "
                         f"{first_row} do not fit {N} columns with ids {tuple(b_ids.shape)}: ids "
                         f"are (B,) and (N,)")
    run = contrastive_torch
    if use_triton(a) and a.shape[1] <= MAX_EMBEDDING:
        run = contrastive_triton
    return run(a, b_all, temperature, a_ids, b_ids, first_row)
