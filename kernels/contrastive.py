"""Contrast: N x N similarities without an N x N matrix, and hard negatives without a loop.

Letters: B items of this process, N items of all processes, E embedding. Item i's true partner is column first_row + i.

    s_ij = <a_i, b_j> / temperature                  pairs that are `same` but not partners are left out of both sums:
    row_lse_i = log sum_j exp s_ij                   they agree in the first or in the second of their two ids
    column_lse_j = log sum_i exp s_ij

The slow version (contrastive_naive) keeps s (B, N) and, until the backward pass is over, five more matrices of its
size: 6.4 GB at B = N = 16,384. The trick has three steps and is the same on a CPU and on a GPU:

  1. A log-sum-exp can be built tile by tile: lse(x, y) = logaddexp(lse(x), lse(y)). One pass over the tiles of s gives
     rows AND columns, and a tile never leaves the cache.
  2. The backward pass needs only exp(s - lse): a tile can be computed again from a, b and two vectors.
         ds_ij = g_row_i exp(s_ij - row_lse_i) + g_column_j exp(s_ij - column_lse_j) + (j is i's partner) g_positive_i
         da = ds b / temperature            db = ds^T a / temperature
  3. The temperature's gradient then costs no pass: -1/temperature sum_ij ds_ij s_ij = -1/temperature sum_i <a_i, da_i>.

A third more arithmetic (five products of this size on a GPU, four here, three in the naive version); memory O(B + N).

Hard negatives are drawn within the process's own B x B block from w_ij = softmax_j(s_ij) + 1e-5, 0 at i's partner and
at `same`. The draw is a race: clock j rings at time e_ij / w_ij with e_ij exponential, and j rings first with
probability w_ij / sum w (the Gumbel-max trick before the logarithm). e_ij = -log(u_ij) where u_ij is a hash of (seed,
side, row, column): no state, so every tiling and every device holds the same race. It is run in float64: sums in
another order then differ by 1e-15 instead of 1e-6, and the same clock wins.

The kernels are in kernels/contrastive_triton.py.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import use_triton

TILE_ROWS, TILE_COLUMNS = 512, 2048      # torch: a tile of 4 MB in float32 stays in the cache between its few steps
DRAW_ELEMENTS = 2 ** 19                  # torch: float64 elements of one strip of the B x B block
MAX_EMBEDDING = 256                      # kernels: a program keeps whole vectors
UNIFORM_WEIGHT = 1e-5                    # added to the softmax: any pair can be drawn (F2.2)


class Contrast(NamedTuple):
    row_lse: Tensor       # (B,)
    column_lse: Tensor    # (N,) over this process's rows only; -inf where every row is left out
    positives: Tensor     # (B,) s of the true pairs
    wrong_a: Tensor       # (B,) int64: the a drawn for own column j, an index 0..B-1; -1: there is none
    wrong_b: Tensor       # (B,) int64: the b drawn for row i, likewise


# ------------------------------------------------------------------------------------------------------------------
# The slow version: the definition, one (B, N) matrix at a time
# ------------------------------------------------------------------------------------------------------------------

def contrastive_naive(a, b_all, temperature, a_ids, b_ids, first_row: int):
    """-> row_lse, column_lse, positives, and two (B, B) matrices of weights: row i draws a b, column j draws an a."""
    B, rows = len(a), torch.arange(len(a), device=a.device)
    s = a @ b_all.T / temperature                                                      # (B, N)
    positives = s[rows, first_row + rows]                                              # (B,)
    same = (a_ids[:, None] == b_ids).any(-1)                                           # (B, N)
    same[rows, first_row + rows] = False
    kept = s.masked_fill(same, -torch.inf)
    block = s[:, first_row:first_row + B].detach()                                     # (B, B)
    forbidden = same[:, first_row:first_row + B].clone().fill_diagonal_(True)
    weights_b = (block.softmax(1) + UNIFORM_WEIGHT).masked_fill(forbidden, 0)
    weights_a = (block.softmax(0) + UNIFORM_WEIGHT).masked_fill(forbidden, 0)
    return kept.logsumexp(1), kept.logsumexp(0), positives, weights_b, weights_a


# ------------------------------------------------------------------------------------------------------------------
# torch, tile by tile
# ------------------------------------------------------------------------------------------------------------------

def tiles(B: int, N: int):
    for r in range(0, B, TILE_ROWS):
        for c in range(0, N, TILE_COLUMNS):
            yield slice(r, min(r + TILE_ROWS, B)), slice(c, min(c + TILE_COLUMNS, N))


def same_ids(a_ids, b_ids):
    """Two ids per item, (rows, 2) and (columns, 2) -> (rows, columns): do they agree in either?"""
    return (a_ids[:, None, 0] == b_ids[:, 0]).logical_or_(a_ids[:, None, 1] == b_ids[:, 1])


def tile_logits(r, c, x, y, a_ids, b_ids, positives, first_row: int):
    """s of one tile, `same` pairs at -inf; x = a / temperature. A true pair is `same` too, so it is written back."""
    s = x[r] @ y[c].T                                                                  # (rows, columns)
    s.masked_fill_(same_ids(a_ids[r], b_ids[c]), -torch.inf)
    offset = first_row + r.start - c.start                                             # the diagonal of true pairs
    diagonal, start = s.diagonal(offset), r.start + max(0, -offset)
    diagonal.copy_(positives[start:start + len(diagonal)])
    return s


def scaled(a, b_all, temperature):
    """a / temperature and b_all in the type that is computed in: 16-bit vectors are multiplied in float32."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b_all.dtype), torch.float32)
    return a.to(dtype) / temperature.to(dtype), b_all.to(dtype)


def statistics_torch(a, b_all, temperature, a_ids, b_ids, positives, first_row: int):
    """-> row_lse (B,), column_lse (N,), and the logits if one tile holds them all: a small matrix is worth keeping."""
    B, N, (x, y) = len(a), len(b_all), scaled(a, b_all, temperature)                   # x (B, E), y (N, E)
    row_lse, column_lse = x.new_full((B,), -torch.inf), x.new_full((N,), -torch.inf)
    for r, c in tiles(B, N):
        s = tile_logits(r, c, x, y, a_ids, b_ids, positives, first_row)
        row_lse[r] = torch.logaddexp(row_lse[r], s.logsumexp(1))
        column_lse[c] = torch.logaddexp(column_lse[c], s.logsumexp(0))
    return row_lse, column_lse, s if s.shape == (B, N) else None


def gradients_torch(a, b_all, temperature, a_ids, b_ids, positives, first_row: int, row_lse, column_lse, g_row,
                    g_column, kept):
    """-> ds b (B, E) and ds^T a (N, E), without the true pairs' own gradient, not yet divided by the temperature."""
    x, y = scaled(a, b_all, temperature)
    da, db, a = torch.zeros_like(x), torch.zeros_like(y), a.to(x.dtype)
    for r, c in tiles(len(x), len(y)):
        s = tile_logits(r, c, x, y, a_ids, b_ids, positives, first_row) if kept is None else kept
        ds = (s - row_lse[r, None]).exp_().mul_(g_row[r, None])                        # (rows, columns)
        ds += (s - column_lse[c]).exp_().mul_(g_column[c])
        da[r].addmm_(ds, y[c])
        db[c].addmm_(ds.T, a[r])
    return da, db


class Statistics(torch.autograd.Function):
    """row_lse, column_lse, positives by torch or by the kernels; what both share is here."""

    @staticmethod
    def forward(ctx, a, b_all, temperature, a_ids, b_ids, first_row, kernels):
        x, y = scaled(a, b_all[first_row:first_row + len(a)], temperature)
        positives, kept = (x * y).sum(1), None                                         # (B,)
        if kernels:
            row_lse, column_lse = kernels.statistics_op(a, b_all, temperature, a_ids, b_ids, first_row)   # base 2
        else:
            row_lse, column_lse, kept = statistics_torch(a, b_all, temperature, a_ids, b_ids, positives, first_row)
        ctx.save_for_backward(a, b_all, temperature, a_ids, b_ids, positives, row_lse, column_lse)
        ctx.first_row, ctx.kernels, ctx.kept = first_row, kernels, kept
        unit = math.log(2) if kernels else 1
        return row_lse * unit, column_lse * unit, positives

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_row, g_column, g_positive):
        a, b_all, temperature, a_ids, b_ids, positives, row_lse, column_lse = ctx.saved_tensors
        column_lse = column_lse.masked_fill(column_lse == -torch.inf, torch.inf)       # an empty column: 0, not nan
        with torch.autocast(a.device.type, enabled=False):
            if ctx.kernels:
                op, t, first = ctx.kernels.gradient_op, temperature, ctx.first_row
                da = op(a, b_all, t, a_ids, b_ids, row_lse, column_lse, g_row, g_column, first)
                db = op(b_all, a, t, b_ids, a_ids, column_lse, row_lse, g_column, g_row, -first)
            else:
                da, db = gradients_torch(a, b_all, temperature, a_ids, b_ids, positives, ctx.first_row, row_lse,
                                         column_lse, g_row, g_column, ctx.kept)
        own, t = slice(ctx.first_row, ctx.first_row + len(a)), temperature.to(da.dtype)
        da = da.add_(g_positive[:, None] * b_all[own]).div_(t)                         # (B, E)
        db[own] += g_positive[:, None] * a
        dt = -(a * da).sum().to(temperature.dtype) / temperature
        return da.to(a.dtype), db.div_(t).to(b_all.dtype), dt, None, None, None, None


# ------------------------------------------------------------------------------------------------------------------
# Hard negatives
# ------------------------------------------------------------------------------------------------------------------

def mix(h):
    """A bijection of 32 bits, in place (the finalizer of MurmurHash3). int32 wraps around as uint32 does; >> copies the
    sign, hence the masks."""
    h ^= (h >> 16) & 0xFFFF
    h *= 0x85EBCA6B - 2 ** 32
    h ^= (h >> 13) & 0x7FFFF
    h *= 0xC2B2AE35 - 2 ** 32
    h ^= (h >> 16) & 0xFFFF
    return h


def counters(B: int, first_row: int, seed: int, side: int, device):
    """Two int32 vectors (B,), for items that draw and items drawn: the hash of pair (i, j) is mix(draws[i] ^ drawn[j]).
    Items are counted over all processes (first_row + i), so that no two processes hold the same race."""
    drawn = mix(torch.arange(first_row, first_row + B, dtype=torch.int32, device=device))
    key = (2 * seed + side) * 0x9E3779B97F4A7C15 >> 32 & 0xFFFFFFFF                    # 2^64 / golden ratio: spreads
    return mix(drawn ^ key - 2 ** 31), drawn


@torch.no_grad()
def draw_torch(x, y, temperature, x_ids, y_ids, draws, drawn):
    B = len(x)
    x, y = x.double() / temperature.double(), y.double()
    chosen = torch.empty(B, dtype=torch.int64, device=x.device)
    step = max(1, DRAW_ELEMENTS // B)
    for start in range(0, B, step):
        r = slice(start, min(start + step, B))
        weight = (x[r] @ y.T).softmax(1).add_(UNIFORM_WEIGHT)                          # (rows, B)
        weight.masked_fill_(same_ids(x_ids[r], y_ids), 0)
        weight.diagonal(start).zero_()
        uniform = mix(draws[r, None] ^ drawn).double().add_(2 ** 31 + 0.5).mul_(2 ** -32)
        rate, first = weight.div_(uniform.log_().neg_()).max(1)                        # highest w / e = first to ring
        chosen[r] = torch.where(rate > 0, first, -1)
    return chosen


def draw(x, y, temperature, x_ids, y_ids, first_row: int, seed: int, side: int, kernels):
    """For each row of x (B, E) a row of y (B, E), by weight, never its partner nor `same`. -> (B,) int64, -1: none"""
    draws, drawn = counters(len(x), first_row, seed, side, x.device)
    return (kernels.draw_op if kernels else draw_torch)(x.detach(), y.detach(), temperature, x_ids, y_ids, draws, drawn)


def contrastive_by(kernels, a, b_all, temperature, a_ids, b_ids, first_row: int, seed):
    """The whole of it by torch (kernels: None) or by the kernels (the module kernels.contrastive_triton)."""
    with torch.autocast(a.device.type, enabled=False):
        statistics = Statistics.apply(a, b_all, temperature, a_ids, b_ids, first_row, kernels)
        if seed is None:
            return Contrast(*statistics, None, None)
        own = slice(first_row, first_row + len(a))
        wrong_a = draw(b_all[own], a, temperature, b_ids[own], a_ids, first_row, seed, 1, kernels)
        wrong_b = draw(a, b_all[own], temperature, a_ids, b_ids[own], first_row, seed, 0, kernels)
    return Contrast(*statistics, wrong_a, wrong_b)


def contrastive_torch(*arguments) -> Contrast:
    return contrastive_by(None, *arguments)


def contrastive_triton(a, b_all, temperature, a_ids, b_ids, first_row: int, seed) -> Contrast:
    from kernels import contrastive_triton as kernels
    dtype = torch.promote_types(a.dtype, b_all.dtype)
    if dtype == torch.float32 and torch.is_autocast_enabled(a.device.type):
        dtype = torch.get_autocast_dtype(a.device.type)                                # tensor cores, like any product
    a, b_all = (x.to(dtype) if x.stride(1) == 1 else x.to(dtype).contiguous() for x in (a, b_all))
    return contrastive_by(kernels, a, b_all, temperature, a_ids.contiguous(), b_ids.contiguous(), first_row, seed)


# ------------------------------------------------------------------------------------------------------------------
# Which one runs
# ------------------------------------------------------------------------------------------------------------------

def contrastive(a, b_all, temperature, a_ids, b_ids, first_row: int, seed):
    """Row and column log-sum-exps of a b_all^T / temperature, and a hard negative for each side, in O(B + N) memory.

    a (B, E), b_all (N, E), any float type; temperature: a tensor without dimensions, > 0; a_ids (B, 2), b_ids (N, 2)
    int64; seed: int, or None: draw nothing, wrong_a = wrong_b = None. row_lse, column_lse and positives are float32
    (float64 for float64) and differentiable in a, b_all and temperature. The kernels take E up to MAX_EMBEDDING, torch
    any. Under CUDA autocast the kernels round float32 vectors to autocast's 16 bits, for the tensor cores; the torch
    path keeps float32, so there the two may draw different partners. ValueError when the shapes do not fit."""
    if not (a_ids.shape == (len(a), 2) and b_ids.shape == (len(b_all), 2) and 0 <= first_row <= len(b_all) - len(a)):
        raise ValueError(f"contrastive: {len(a)} rows with ids {tuple(a_ids.shape)} from column {first_row} do not fit "
                         f"{len(b_all)} columns with ids {tuple(b_ids.shape)}: ids are (B, 2) and (N, 2)")
    if use_triton(a) and a.shape[1] <= MAX_EMBEDDING:
        return contrastive_triton(a, b_all, temperature, a_ids, b_ids, first_row, seed)
    return contrastive_torch(a, b_all, temperature, a_ids, b_ids, first_row, seed)
