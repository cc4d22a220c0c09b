"""Attention over packed sequences as Triton kernels: the contract of kernels/attention.py, without
padding.

The slow version pads every sequence to the longest, writes all scores of a head to memory, reads
them for the softmax and writes them again for the product with the values. Two tricks remove it:

  1. Blocks. One program takes QUERIES rows of one sequence and one head, and walks over that
     sequence's keys, KEYS at a time. A sequence of 13 tokens costs one block, not the longest
     one's. A program finds its sequence from `starts` alone (find_block): no list of blocks.
  2. Online softmax. A running maximum, sum and mean: when a block of keys raises the maximum, what
     was summed so far is scaled down to it. Scores live in registers only. Kept for the backward
     pass: one log-sum-exp per row.

In the backward pass a block of queries sums its own dq, and a block of keys its own dk and dv, from
the queries of its sequence. No two programs write the same number: no atomics, the same bits every
time. All exponents are of base 2.

Letters: B sequences, T query tokens, S key tokens, H heads, d width of a head (WIDTH: d rounded up
to a power of two).
"""
import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import interpreting
from kernels.triton_common import (LN_2, LOG2_E, computing_types, load_rows, narrow, power_of_two,
                                   store_rows)

# --------------------------------------------------------------------------------------------------
# Shared by the kernels
# --------------------------------------------------------------------------------------------------

SLICE = tl.constexpr(1024)          # starts that find_block compares at once


@triton.jit
def find_block(starts, B, ROWS: tl.constexpr):
    """The sequence of this program's block of ROWS rows, its first row, and the sequence's bounds.

    Sequence i's blocks have the numbers from starts[i] // ROWS + i on. That leaves room: from one
    sequence to the next this number grows by at least ceil(length / ROWS). So T // ROWS + B
    programs are enough, and no prefix sum over lengths is needed: a program's sequence is the last
    one whose first number is not above its own. Spare programs get a first row at or past the end.
    """
    block = tl.program_id(0)
    sequence = -1
    for first in range(0, B, SLICE):
        i = first + tl.arange(0, SLICE)
        number = tl.load(starts + i, mask=i < B, other=0) // ROWS + i
        sequence += tl.sum(((number <= block) & (i < B)).to(tl.int32), 0)
    begin = tl.load(starts + sequence)
    end = tl.load(starts + sequence + 1)
    return sequence, begin + (block - begin // ROWS - sequence) * ROWS, begin, end


@triton.jit
def load_bias(bias, h, i, j, bias_row, SUM: tl.constexpr):
    """Bias of head h for positions i and j (tiles that broadcast), in powers of 2. It is padded to
    whole tiles, so it needs no mask."""
    return LOG2_E * tl.load(bias + h * bias_row * bias_row + i * bias_row + j).to(SUM)


# --------------------------------------------------------------------------------------------------
# Forward
# --------------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=["B", "T"])
def forward_kernel(q, k, v, bias, q_starts, k_starts, out, lse, B, T, row, bias_row,
                   d: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
                   PRODUCT: tl.constexpr, SUM: tl.constexpr, ROUND: tl.constexpr,
                   PASSES: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    sequence, first_row, q_first, q_end = find_block(q_starts, B, QUERIES)
    if first_row >= q_end:                                                   # a spare program
        return
    h = tl.program_id(1)
    rows = first_row + tl.arange(0, QUERIES)
    real = rows < q_end
    k_first = tl.load(k_starts + sequence)
    k_end = tl.load(k_starts + sequence + 1)
    queries = load_rows(q + h * d, rows, real, row, d, WIDTH, PRODUCT)

    top = tl.full([QUERIES], float("-inf"), SUM)
    total = tl.zeros([QUERIES], SUM)
    mean = tl.zeros([QUERIES, WIDTH], SUM)
    for first in range(k_first, k_end, KEYS):
        columns = first + tl.arange(0, KEYS)
        valid = columns < k_end
        keys = load_rows(k + h * d, columns, valid, row, d, WIDTH, PRODUCT)
        s = tl.dot(queries, keys.T, out_dtype=SUM, input_precision=PASSES) * SCALE
        if BIAS:
            s += load_bias(bias, h, (rows - q_first)[:, None], (columns - k_first)[None, :],
                           bias_row, SUM)
        s = tl.where(valid[None, :], s, float("-inf"))
        # The new maximum; what was summed under the old one shrinks by their difference.
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        values = load_rows(v + h * d, columns, valid, row, d, WIDTH, PRODUCT)
        mean = tl.dot(narrow(p, PRODUCT, ROUND), values, mean * shrink[:, None], out_dtype=SUM,
                      input_precision=PASSES)
        top = new_top

    # A sequence without keys: output 0, and lse = inf, so that the backward pass finds p = 0.
    total_or_1 = tl.where(total == 0, 1.0, total)
    own_lse = tl.where(total == 0, float("inf"), top + tl.log2(total_or_1))
    tl.store(lse + h * T + rows, own_lse, mask=real)
    mean = narrow(mean / total_or_1[:, None], PRODUCT, ROUND)
    store_rows(out + h * d, mean, rows, real, row, d, WIDTH)


# --------------------------------------------------------------------------------------------------
# Backward: with p = softmax and delta = <out, gradient>,  ds = p (<gradient, v> - delta). p is
# computed again from lse, so nothing of size (T, S) was kept.
# --------------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=["B", "T"])
def dq_kernel(q, k, v, bias, q_starts, k_starts, out, gradient, lse, delta, dq, B, T, row, bias_row,
              d: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
              PRODUCT: tl.constexpr, SUM: tl.constexpr, ROUND: tl.constexpr, PASSES: tl.constexpr,
              QUERIES: tl.constexpr, KEYS: tl.constexpr):
    sequence, first_row, q_first, q_end = find_block(q_starts, B, QUERIES)
    if first_row >= q_end:
        return
    h = tl.program_id(1)
    rows = first_row + tl.arange(0, QUERIES)
    real = rows < q_end
    k_first = tl.load(k_starts + sequence)
    k_end = tl.load(k_starts + sequence + 1)
    queries = load_rows(q + h * d, rows, real, row, d, WIDTH, PRODUCT)
    g = load_rows(gradient + h * d, rows, real, row, d, WIDTH, PRODUCT)
    own_out = load_rows(out + h * d, rows, real, row, d, WIDTH, SUM)
    own_delta = tl.sum(own_out * g.to(SUM), 1)
    own_lse = tl.load(lse + h * T + rows, mask=real, other=float("inf"))     # inf: p = 0

    total = tl.zeros([QUERIES, WIDTH], SUM)
    for first in range(k_first, k_end, KEYS):
        columns = first + tl.arange(0, KEYS)
        valid = columns < k_end
        keys = load_rows(k + h * d, columns, valid, row, d, WIDTH, PRODUCT)
        values = load_rows(v + h * d, columns, valid, row, d, WIDTH, PRODUCT)
        s = tl.dot(queries, keys.T, out_dtype=SUM, input_precision=PASSES) * SCALE
        if BIAS:
            s += load_bias(bias, h, (rows - q_first)[:, None], (columns - k_first)[None, :],
                           bias_row, SUM)
        p = tl.where(valid[None, :], tl.exp2(s - own_lse[:, None]), 0.0)
        dp = tl.dot(g, values.T, out_dtype=SUM, input_precision=PASSES)
        if k_end - k_first <= KEYS:
            # All keys are at hand: <out, gradient> = sum p dp, without the rounding of out.
            own_delta = tl.sum(p * dp, 1)
        ds = p * (dp - own_delta[:, None])
        total = tl.dot(narrow(ds, PRODUCT, ROUND), keys, total, out_dtype=SUM,
                       input_precision=PASSES)

    tl.store(delta + h * T + rows, own_delta, mask=real)                     # for dkv and dbias
    total = narrow(total * (SCALE * LN_2), PRODUCT, ROUND)
    store_rows(dq + h * d, total, rows, real, row, d, WIDTH)


@triton.jit(do_not_specialize=["B", "T"])
def dkv_kernel(q, k, v, bias, q_starts, k_starts, gradient, lse, delta, dk, dv, B, T, row, bias_row,
               d: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
               PRODUCT: tl.constexpr, SUM: tl.constexpr, ROUND: tl.constexpr, PASSES: tl.constexpr,
               QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """One block of keys and values stays in registers; the queries of its sequence pass by."""
    sequence, first_row, k_first, k_end = find_block(k_starts, B, KEYS)
    if first_row >= k_end:
        return
    h = tl.program_id(1)
    rows = first_row + tl.arange(0, KEYS)
    real = rows < k_end
    q_first = tl.load(q_starts + sequence)
    q_end = tl.load(q_starts + sequence + 1)
    keys = load_rows(k + h * d, rows, real, row, d, WIDTH, PRODUCT)
    values = load_rows(v + h * d, rows, real, row, d, WIDTH, PRODUCT)

    key_total = tl.zeros([KEYS, WIDTH], SUM)
    value_total = tl.zeros([KEYS, WIDTH], SUM)
    for first in range(q_first, q_end, QUERIES):
        # Everything is transposed here: rows of a tile are keys, columns are queries.
        columns = first + tl.arange(0, QUERIES)
        valid = columns < q_end
        queries = load_rows(q + h * d, columns, valid, row, d, WIDTH, PRODUCT)
        g = load_rows(gradient + h * d, columns, valid, row, d, WIDTH, PRODUCT)
        s = tl.dot(keys, queries.T, out_dtype=SUM, input_precision=PASSES) * SCALE
        if BIAS:
            s += load_bias(bias, h, (columns - q_first)[None, :], (rows - k_first)[:, None],
                           bias_row, SUM)
        # p again from the forward pass's log-sum-exp; a query that is not real has lse = inf.
        their_lse = tl.load(lse + h * T + columns, mask=valid, other=float("inf"))
        p = tl.where(real[:, None], tl.exp2(s - their_lse[None, :]), 0.0)
        # dv = p^T g: every query hands its gradient to the values it averaged.
        value_total = tl.dot(narrow(p, PRODUCT, ROUND), g, value_total, out_dtype=SUM,
                             input_precision=PASSES)
        # dk = ds^T q, with ds = p (<g, v> - delta)
        their_delta = tl.load(delta + h * T + columns, mask=valid, other=0.0)
        dp = tl.dot(values, g.T, out_dtype=SUM, input_precision=PASSES)
        ds = p * (dp - their_delta[None, :])
        key_total = tl.dot(narrow(ds, PRODUCT, ROUND), queries, key_total, out_dtype=SUM,
                           input_precision=PASSES)

    key_total = narrow(key_total * (SCALE * LN_2), PRODUCT, ROUND)
    store_rows(dk + h * d, key_total, rows, real, row, d, WIDTH)
    store_rows(dv + h * d, narrow(value_total, PRODUCT, ROUND), rows, real, row, d, WIDTH)


@triton.jit(do_not_specialize=["B", "T"])
def dbias_kernel(q, k, v, bias, q_starts, k_starts, gradient, lse, delta, dbias, B, T, row,
                 bias_row, d: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr,
                 BIAS: tl.constexpr, PRODUCT: tl.constexpr, SUM: tl.constexpr, ROUND: tl.constexpr,
                 PASSES: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """One program per tile of one head's bias: the sum of ds over all B sequences, in their order.
    """
    h = tl.program_id(2)
    i = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    j = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    b = load_bias(bias, h, i[:, None], j[None, :], bias_row, SUM)
    total = tl.zeros([QUERIES, KEYS], SUM)
    for sequence in range(B):
        first = tl.load(q_starts + sequence)
        end = tl.load(q_starts + sequence + 1)
        rows = first + i
        columns = first + j
        queries = load_rows(q + h * d, rows, rows < end, row, d, WIDTH, PRODUCT)
        keys = load_rows(k + h * d, columns, columns < end, row, d, WIDTH, PRODUCT)
        s = tl.dot(queries, keys.T, out_dtype=SUM, input_precision=PASSES) * SCALE + b
        own_lse = tl.load(lse + h * T + rows, mask=rows < end, other=float("inf"))
        p = tl.where((columns < end)[None, :], tl.exp2(s - own_lse[:, None]), 0.0)
        g = load_rows(gradient + h * d, rows, rows < end, row, d, WIDTH, PRODUCT)
        values = load_rows(v + h * d, columns, columns < end, row, d, WIDTH, PRODUCT)
        dp = tl.dot(g, values.T, out_dtype=SUM, input_precision=PASSES)
        own_delta = tl.load(delta + h * T + rows, mask=rows < end, other=0.0)
        total += p * (dp - own_delta[:, None])
    where = h * bias_row * bias_row + i[:, None] * bias_row + j[None, :]
    tl.store(dbias + where, total)                                           # padded as bias is


# --------------------------------------------------------------------------------------------------
# Launching
# --------------------------------------------------------------------------------------------------

# (16-bit, wider than 64): {kernel: (QUERIES, KEYS, warps, stages)}. None spills on sm_80 or sm_90:
# `python -m kernels.bench` compiles every entry. Sentences are short: a block of 128 queries,
# faster on long sequences, would be nine tenths empty here.
TILES = {
    (True, False): {"forward": (64, 64, 4, 2), "dq": (64, 64, 4, 2),
                    "dkv": (32, 64, 4, 2), "dbias": (64, 64, 4, 2)},
    (True, True): {"forward": (64, 32, 4, 2), "dq": (64, 32, 4, 2),
                   "dkv": (16, 64, 4, 2), "dbias": (64, 32, 4, 2)},
    (False, False): {"forward": (16, 32, 4, 2), "dq": (16, 32, 4, 2),
                     "dkv": (16, 32, 4, 2), "dbias": (16, 32, 4, 2)},
    (False, True): {"forward": (16, 16, 4, 1), "dq": (16, 32, 4, 2),
                    "dkv": (16, 16, 4, 2), "dbias": (16, 32, 8, 1)},
}
BIAS_MULTIPLE = 128                 # a bias is padded to a multiple of every tile


def tile_sizes(kernel: str, dtype, width: int) -> dict:
    if interpreting():
        return {"QUERIES": 128, "KEYS": 128}                                 # fewest NumPy calls
    queries, keys, warps, stages = TILES[dtype.itemsize == 2, width > 64][kernel]
    return {"QUERIES": queries, "KEYS": keys, "num_warps": warps, "num_stages": stages}


def arguments(q, k, v, q_starts, k_starts, bias) -> dict:
    """What all four kernels are given. A bias is padded, so that tiles need no mask."""
    d = q.shape[2]
    bias_row = 0
    if bias is not None:
        missing = -bias.shape[1] % BIAS_MULTIPLE
        bias = F.pad(bias, (0, missing, 0, missing)).contiguous()
        bias_row = bias.shape[1]
    return {
        "q": q, "k": k, "v": v, "q_starts": q_starts, "k_starts": k_starts,
        "bias": q if bias is None else bias,                                 # q: not read
        "B": len(q_starts) - 1, "T": len(q), "row": q.shape[1] * d, "bias_row": bias_row,
        "d": d, "WIDTH": power_of_two(d), "SCALE": math.log2(math.e) / math.sqrt(d),
        "BIAS": bias is not None, "enable_fp_fusion": True, **computing_types(q.dtype),
    }


def blocks(rows: int, B: int, size: int) -> int:
    """Programs for `rows` rows of B sequences in blocks of `size`: see find_block."""
    return rows // size + B


# custom_op and not triton_op: torch.compile takes the op as it is, so a test in the interpreter
# covers it. Through triton_op it would trace into the kernels, which interpreted kernels do not
# allow, and find nothing to fuse them with.

@torch.library.custom_op("cclm::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor,
                 bias: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """-> out (T, H, d), log2-sum-exp2 of the scores (H, T)"""
    T, H, d = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(H, T, dtype=torch.promote_types(q.dtype, torch.float32))
    sizes = tile_sizes("forward", q.dtype, d)
    grid = (blocks(T, len(q_starts) - 1, sizes["QUERIES"]), H)
    forward_kernel[grid](out=out, lse=lse, **arguments(q, k, v, q_starts, k_starts, bias), **sizes)
    return out, lse


@torch.library.custom_op("cclm::attention_backward", mutates_args=())
def attention_backward_op(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor,
                          k_starts: Tensor, bias: Optional[Tensor], out: Tensor,
                          lse: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, dbias (empty without a bias)"""
    H, d = q.shape[1:]
    B = len(q_starts) - 1
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    shared = arguments(q, k, v, q_starts, k_starts, bias)
    shared |= {"gradient": gradient.contiguous(), "lse": lse, "delta": torch.empty_like(lse)}

    # dq first: it also fills delta.
    sizes = tile_sizes("dq", q.dtype, d)
    dq_kernel[blocks(len(q), B, sizes["QUERIES"]), H](out=out, dq=dq, **shared, **sizes)
    sizes = tile_sizes("dkv", q.dtype, d)
    dkv_kernel[blocks(len(k), B, sizes["KEYS"]), H](dk=dk, dv=dv, **shared, **sizes)
    if bias is None:
        return dq, dk, dv, lse.new_empty(0)
    sizes = tile_sizes("dbias", q.dtype, d)
    dbias = torch.empty_like(shared["bias"], dtype=lse.dtype)                # (H, padded, padded)
    padded = shared["bias_row"]
    grid = (padded // sizes["QUERIES"], padded // sizes["KEYS"], H)
    dbias_kernel[grid](dbias=dbias, **shared, **sizes)
    N = bias.shape[1]
    return dq, dk, dv, dbias[:, :N, :N].to(bias.dtype, copy=True)


@attention_op.register_fake
def _(q, k, v, q_starts, k_starts, bias):
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype)


@attention_backward_op.register_fake
def _(gradient, q, k, v, q_starts, k_starts, bias, out, lse):
    dbias = lse.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def backward(ctx, gradient, _):
    saved = ctx.saved_tensors                   # once: checkpointing unpacks each tensor only once
    dq, dk, dv, dbias = attention_backward_op(gradient, *saved)
    bias = saved[5]
    return dq, dk, dv, None, None, None if bias is None else dbias


attention_op.register_autograd(backward, setup_context=save)


def attention_triton(q, k, v, q_starts, k_starts, bias=None):
    """The contract of kernels.attention, by the kernels. d: a multiple of 16, at most 128."""
    if len(q) == 0 or len(k) == 0:
        return q * 0 + (k.sum() + v.sum()) * 0
    q = q.contiguous()
    k = k.to(q.dtype).contiguous()
    v = v.to(q.dtype).contiguous()
    return attention_op(q, k, v, q_starts, k_starts, bias)[0]
