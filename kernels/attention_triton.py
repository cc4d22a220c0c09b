"""Attention over packed sequences as Triton kernels: the contract of kernels/attention.py, without padding.

The slow version pads every sequence to the longest, writes all scores of a head to memory, reads them for the softmax
and writes them again for the product with the values. Three tricks remove all of it:

  1. Blocks. One program takes QUERIES rows of one sequence and one head, and walks over that sequence's keys, KEYS at a
     time. A sequence of 13 tokens costs one block, not the longest one's. The list of blocks is made on the device.
  2. Online softmax. A running maximum, sum and mean: when a block of keys raises the maximum, what was summed so far is
     scaled down to it. Scores live in registers only. Kept for the backward pass: one log-sum-exp per row.
  3. Sharing turned inside out. `memory` says which keys a query sequence reads; its inverse, made once per call, says
     who reads a key sequence. One program gathers the gradient of one block of keys from all its readers. No two
     programs write the same number: no atomics, the same bits every time.

Letters: B sequences, T query tokens, S key tokens, H heads, d width of a head (WIDTH: d rounded up to a power of two).
"""
from __future__ import annotations           # `tl.constexpr` in a signature is only a word until triton reads it

import functools
import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import interpreting, load_triton, precision   # load_triton also brings tl, load_rows and narrow


# ------------------------------------------------------------------------------------------------------------------
# Forward
# ------------------------------------------------------------------------------------------------------------------

def forward_kernel(q, k, v, bias, out, lse, q_starts, k_starts, memory, block_sequence, block_row, B, T, q_row, q_head,
                   k_row, k_head, v_row, v_head, out_row, bias_row, bias_head, d: tl.constexpr, WIDTH: tl.constexpr,
                   SCALE: tl.constexpr, BIAS: tl.constexpr, PRODUCT: tl.constexpr, SUM: tl.constexpr,
                   ROUND: tl.constexpr, PASSES: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    i, h = tl.load(block_sequence + tl.program_id(0)), tl.program_id(1)
    if i >= B:                                                                             # a block that was not needed
        return
    rows = tl.load(block_row + tl.program_id(0)) + tl.arange(0, QUERIES)
    real = rows < tl.load(q_starts + i + 1)
    q_first = tl.load(q_starts + i)
    m = tl.load(memory + i)
    k_first = tl.load(k_starts + m, mask=m >= 0, other=0)                                  # memory -1: no keys
    k_end = tl.load(k_starts + m + 1, mask=m >= 0, other=0)
    queries = load_rows(q + h * q_head, rows, real, q_row, d, WIDTH, PRODUCT)
    top = tl.full([QUERIES], float("-inf"), SUM)
    total = tl.zeros([QUERIES], SUM)
    mean = tl.zeros([QUERIES, WIDTH], SUM)
    for first in range(k_first, k_end, KEYS):
        columns = first + tl.arange(0, KEYS)
        keys = load_rows(k + h * k_head, columns, columns < k_end, k_row, d, WIDTH, PRODUCT)
        s = tl.dot(queries, keys.T, out_dtype=SUM, input_precision=PASSES) * SCALE        # scores in powers of 2
        if BIAS:                                                                           # padded: needs no mask
            s += 1.4426950408889634 * tl.load(bias + h * bias_head + (rows - q_first)[:, None] * bias_row
                                              + (columns - k_first)[None, :]).to(SUM)
        s = tl.where((columns < k_end)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        values = load_rows(v + h * v_head, columns, columns < k_end, v_row, d, WIDTH, PRODUCT)
        mean = tl.dot(narrow(p, PRODUCT, ROUND), values, mean * shrink[:, None], out_dtype=SUM, input_precision=PASSES)
        top = new_top
    total_or_1 = tl.where(total == 0, 1.0, total)
    mean = mean / total_or_1[:, None]                                                      # no keys: 0
    tl.store(lse + h * T + rows, tl.where(total == 0, float("inf"), top + tl.log2(total_or_1)), mask=real)
    columns = tl.arange(0, WIDTH)
    tl.store(out + h * d + rows.to(tl.int64)[:, None] * out_row + columns[None, :], narrow(mean, PRODUCT, ROUND),
             mask=real[:, None] & (columns < d)[None, :])


# ------------------------------------------------------------------------------------------------------------------
# Backward: with p = softmax and delta = <out, gradient>,  ds = p (<gradient, v> - delta). p is computed again from
# lse, so nothing of size (L, S) was kept. A query block gathers its own dq; a key block gathers its own dk and dv from
# ALL query sequences that attend to it: no two programs write one number.
# ------------------------------------------------------------------------------------------------------------------

def dq_kernel(q, k, v, bias, out, gradient, lse, delta, dq, q_starts, k_starts, memory, block_sequence, block_row, B, T,
              q_row, q_head, k_row, k_head, v_row, v_head, out_row, bias_row, bias_head, d: tl.constexpr,
              WIDTH: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, PRODUCT: tl.constexpr, SUM: tl.constexpr,
              ROUND: tl.constexpr, PASSES: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    i, h = tl.load(block_sequence + tl.program_id(0)), tl.program_id(1)
    if i >= B:
        return
    rows = tl.load(block_row + tl.program_id(0)) + tl.arange(0, QUERIES)
    real = rows < tl.load(q_starts + i + 1)
    q_first = tl.load(q_starts + i)
    m = tl.load(memory + i)
    k_first = tl.load(k_starts + m, mask=m >= 0, other=0)
    k_end = tl.load(k_starts + m + 1, mask=m >= 0, other=0)
    queries = load_rows(q + h * q_head, rows, real, q_row, d, WIDTH, PRODUCT)
    g = load_rows(gradient + h * d, rows, real, out_row, d, WIDTH, PRODUCT)
    own_delta = tl.sum(load_rows(out + h * d, rows, real, out_row, d, WIDTH, SUM) * g.to(SUM), 1)
    own_lse = tl.load(lse + h * T + rows, mask=real, other=float("inf"))                   # inf: p = 0
    total = tl.zeros([QUERIES, WIDTH], SUM)
    for first in range(k_first, k_end, KEYS):
        columns = first + tl.arange(0, KEYS)
        keys = load_rows(k + h * k_head, columns, columns < k_end, k_row, d, WIDTH, PRODUCT)
        values = load_rows(v + h * v_head, columns, columns < k_end, v_row, d, WIDTH, PRODUCT)
        s = tl.dot(queries, keys.T, out_dtype=SUM, input_precision=PASSES) * SCALE
        if BIAS:
            s += 1.4426950408889634 * tl.load(bias + h * bias_head + (rows - q_first)[:, None] * bias_row
                                              + (columns - k_first)[None, :]).to(SUM)
        p = tl.where((columns < k_end)[None, :], tl.exp2(s - own_lse[:, None]), 0.0)
        dp = tl.dot(g, values.T, out_dtype=SUM, input_precision=PASSES)
        if k_end - k_first <= KEYS:                                                        # all keys are at hand: delta
            own_delta = tl.sum(p * dp, 1)                                                  # without the rounding of out
        ds = p * (dp - own_delta[:, None])
        total = tl.dot(narrow(ds, PRODUCT, ROUND), keys, total, out_dtype=SUM, input_precision=PASSES)
    tl.store(delta + h * T + rows, own_delta, mask=real)                                   # for the other two kernels
    columns = tl.arange(0, WIDTH)
    tl.store(dq + h * d + rows.to(tl.int64)[:, None] * out_row + columns[None, :],
             narrow(total * (SCALE * 0.6931471805599453), PRODUCT, ROUND), mask=real[:, None] & (columns < d)[None, :])


def dkv_kernel(q, k, v, bias, gradient, lse, delta, dk, dv, q_starts, k_starts, readers, reader_bounds, block_sequence,
               block_row, B, T, q_row, q_head, k_row, k_head, v_row, v_head, out_row, bias_row, bias_head,
               d: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, PRODUCT: tl.constexpr,
               SUM: tl.constexpr, ROUND: tl.constexpr, PASSES: tl.constexpr, QUERIES: tl.constexpr,
               KEYS: tl.constexpr):
    j, h = tl.load(block_sequence + tl.program_id(0)), tl.program_id(1)
    if j >= B:
        return
    rows = tl.load(block_row + tl.program_id(0)) + tl.arange(0, KEYS)
    real = rows < tl.load(k_starts + j + 1)
    k_first = tl.load(k_starts + j)
    keys = load_rows(k + h * k_head, rows, real, k_row, d, WIDTH, PRODUCT)
    values = load_rows(v + h * v_head, rows, real, v_row, d, WIDTH, PRODUCT)
    key_total = tl.zeros([KEYS, WIDTH], SUM)
    value_total = tl.zeros([KEYS, WIDTH], SUM)
    for reader in range(tl.load(reader_bounds + j), tl.load(reader_bounds + j + 1)):
        i = tl.load(readers + reader)
        q_first, q_end = tl.load(q_starts + i), tl.load(q_starts + i + 1)
        for first in range(q_first, q_end, QUERIES):                                       # tiles are (KEYS, QUERIES)
            columns = first + tl.arange(0, QUERIES)
            valid = columns < q_end
            queries = load_rows(q + h * q_head, columns, valid, q_row, d, WIDTH, PRODUCT)
            g = load_rows(gradient + h * d, columns, valid, out_row, d, WIDTH, PRODUCT)
            s = tl.dot(keys, queries.T, out_dtype=SUM, input_precision=PASSES) * SCALE
            if BIAS:
                s += 1.4426950408889634 * tl.load(bias + h * bias_head + (columns - q_first)[None, :] * bias_row
                                                  + (rows - k_first)[:, None]).to(SUM)
            p = tl.exp2(s - tl.load(lse + h * T + columns, mask=valid, other=float("inf"))[None, :])
            p = tl.where(real[:, None], p, 0.0)
            value_total = tl.dot(narrow(p, PRODUCT, ROUND), g, value_total, out_dtype=SUM, input_precision=PASSES)
            ds = p * (tl.dot(values, g.T, out_dtype=SUM, input_precision=PASSES)
                      - tl.load(delta + h * T + columns, mask=valid, other=0.0)[None, :])
            key_total = tl.dot(narrow(ds, PRODUCT, ROUND), queries, key_total, out_dtype=SUM, input_precision=PASSES)
    columns = tl.arange(0, WIDTH)
    where = h * d + rows.to(tl.int64)[:, None] * out_row + columns[None, :]
    mask = real[:, None] & (columns < d)[None, :]
    tl.store(dk + where, narrow(key_total * (SCALE * 0.6931471805599453), PRODUCT, ROUND), mask=mask)
    tl.store(dv + where, narrow(value_total, PRODUCT, ROUND), mask=mask)


def dbias_kernel(q, k, v, bias, gradient, lse, delta, dbias, starts, B, T, q_row, q_head, k_row, k_head, v_row, v_head,
                 out_row, bias_row, bias_head, d: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr,
                 PRODUCT: tl.constexpr, SUM: tl.constexpr, ROUND: tl.constexpr, PASSES: tl.constexpr,
                 QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """One program per tile of one head's bias: the sum of ds over all B sequences, in their order."""
    h = tl.program_id(2)
    i = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    j = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    b = 1.4426950408889634 * tl.load(bias + h * bias_head + i[:, None] * bias_row + j[None, :]).to(SUM)
    total = tl.zeros([QUERIES, KEYS], SUM)
    for sequence in range(B):
        first, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
        rows, columns = first + i, first + j
        queries = load_rows(q + h * q_head, rows, rows < end, q_row, d, WIDTH, PRODUCT)
        keys = load_rows(k + h * k_head, columns, columns < end, k_row, d, WIDTH, PRODUCT)
        s = tl.dot(queries, keys.T, out_dtype=SUM, input_precision=PASSES) * SCALE + b
        p = tl.exp2(s - tl.load(lse + h * T + rows, mask=rows < end, other=float("inf"))[:, None])
        p = tl.where((columns < end)[None, :], p, 0.0)
        g = load_rows(gradient + h * d, rows, rows < end, out_row, d, WIDTH, PRODUCT)
        values = load_rows(v + h * v_head, columns, columns < end, v_row, d, WIDTH, PRODUCT)
        ds = tl.dot(g, values.T, out_dtype=SUM, input_precision=PASSES)
        total += p * (ds - tl.load(delta + h * T + rows, mask=rows < end, other=0.0)[:, None])
    tl.store(dbias + h * bias_head + i[:, None] * bias_row + j[None, :], total)            # padded as bias is


# ------------------------------------------------------------------------------------------------------------------
# Launching
# ------------------------------------------------------------------------------------------------------------------

TILES = {       # (16-bit, wider than 64): {kernel: (QUERIES, KEYS, warps, stages)}; none spills on sm_80 or sm_90
    (True, False): dict(forward=(64, 64, 4, 2), dq=(64, 64, 4, 2), dkv=(32, 64, 4, 2), dbias=(64, 64, 4, 2)),
    (True, True): dict(forward=(64, 32, 4, 2), dq=(64, 32, 4, 2), dkv=(16, 64, 4, 2), dbias=(64, 32, 4, 2)),
    (False, False): dict(forward=(16, 32, 4, 2), dq=(16, 32, 4, 2), dkv=(16, 32, 4, 2), dbias=(16, 32, 4, 2)),
    (False, True): dict(forward=(16, 16, 4, 1), dq=(16, 32, 4, 2), dkv=(16, 16, 4, 2), dbias=(16, 32, 8, 1)),
}


def tiles(kernel: str, dtype, width: int) -> dict:
    """`python -m kernels.bench` compiles every entry and reports registers and spills. Sentences are short: a block of
    128 queries, faster on long sequences, would be nine tenths empty here."""
    if interpreting():
        return dict(QUERIES=128, KEYS=128)                                                 # fewest NumPy calls
    queries, keys, warps, stages = TILES[dtype.itemsize == 2, width > 64][kernel]
    return dict(QUERIES=queries, KEYS=keys, num_warps=warps, num_stages=stages)


@functools.cache
def load_kernels():
    load_triton(globals(), "forward_kernel", "dq_kernel", "dkv_kernel", "dbias_kernel")


def blocks(starts, rows: int, size: int):
    """Cuts every sequence into blocks of `size` rows without asking the device for a length: rows / size + B blocks are
    always enough. -> each block's sequence (B: not needed) and first row, int32."""
    B = len(starts) - 1
    count = (starts.diff() + size - 1) // size                                             # (B,)
    ends = count.cumsum(0)
    block = torch.arange(-(-rows // size) + B, device=starts.device)
    sequence = torch.searchsorted(ends, block, right=True)
    i = sequence.clamp(max=B - 1)
    return sequence.int(), (starts[i] + (block - ends[i] + count[i]) * size).int()


def common(kernel, q, k, v, bias):
    """What all four kernels are given, and the tile sizes."""
    d, bias_row = q.shape[2], 0
    if bias is not None:
        bias = F.pad(bias, 2 * (0, -bias.shape[1] % 128)).contiguous()                     # tiles then need no mask
        bias_row = bias.shape[1]
    width = max(16, 1 << (d - 1).bit_length())
    return dict(q=q, k=k, v=v, bias=q if bias is None else bias, T=len(q), q_row=q.stride(0), q_head=q.stride(1),
                k_row=k.stride(0), k_head=k.stride(1), v_row=v.stride(0), v_head=v.stride(1), out_row=q.shape[1] * d,
                bias_row=bias_row, bias_head=bias_row ** 2, d=d, WIDTH=width, SCALE=math.log2(math.e) / math.sqrt(d),
                **precision(q.dtype), **tiles(kernel, q.dtype, width), enable_fp_fusion=True)


# custom_op and not triton_op: torch.compile takes the op as it is, so a test in the interpreter covers it. Through
# triton_op it would trace into the kernels, which interpreted kernels do not allow, and find nothing to fuse them with.

@torch.library.custom_op("cclm::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, memory: Tensor,
                 bias: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """-> out (T, H, d), log2-sum-exp2 of the scores (H, T)"""
    load_kernels()
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], len(q), dtype=torch.promote_types(q.dtype, torch.float32))
    same = common("forward", q, k, v, bias)
    sequence, row = blocks(q_starts, len(q), same["QUERIES"])
    forward_kernel[len(sequence), q.shape[1]](out=out, lse=lse, q_starts=q_starts, k_starts=k_starts, memory=memory,
        block_sequence=sequence, block_row=row, B=len(q_starts) - 1, BIAS=bias is not None, **same)
    return out, lse


@torch.library.custom_op("cclm::attention_backward", mutates_args=())
def attention_backward_op(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_starts: Tensor,
                          k_starts: Tensor, memory: Tensor,
                          bias: Optional[Tensor]) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    load_kernels()
    H, (dq, dk, dv), delta = q.shape[1], (x.new_empty(x.shape) for x in (q, k, v)), torch.empty_like(lse)
    saved = dict(gradient=gradient.contiguous(), lse=lse, delta=delta)
    same = common("dq", q, k, v, bias)
    sequence, row = blocks(q_starts, len(q), same["QUERIES"])
    dq_kernel[len(sequence), H](out=out, dq=dq, q_starts=q_starts, k_starts=k_starts, memory=memory,
        block_sequence=sequence, block_row=row, B=len(q_starts) - 1, BIAS=bias is not None, **saved, **same)
    same = common("dkv", q, k, v, bias)
    sequence, row = blocks(k_starts, len(k), same["KEYS"])
    readers = memory.argsort(stable=True)                                                  # who reads key sequence j:
    bounds = torch.searchsorted(memory[readers], torch.arange(len(k_starts), dtype=memory.dtype, device=q.device))
    dkv_kernel[len(sequence), H](dk=dk, dv=dv, q_starts=q_starts, k_starts=k_starts, readers=readers.int(),
        reader_bounds=bounds.int(), block_sequence=sequence, block_row=row, B=len(k_starts) - 1, BIAS=bias is not None,
        **saved, **same)
    if bias is None:
        return dq, dk, dv, lse.new_empty(0)
    same = common("dbias", q, k, v, bias)
    dbias = torch.empty_like(same["bias"], dtype=lse.dtype)                                # (H, padded N, padded N)
    grid = (len(dbias[0]) // same["QUERIES"], len(dbias[0]) // same["KEYS"], H)
    dbias_kernel[grid](dbias=dbias, starts=q_starts, B=len(q_starts) - 1, **saved, **same)
    return dq, dk, dv, dbias[:, :bias.shape[1], :bias.shape[1]].to(bias.dtype, copy=True)


@attention_op.register_fake
def _(q, k, v, q_starts, k_starts, memory, bias):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))


@attention_backward_op.register_fake
def _(gradient, q, k, v, out, lse, q_starts, k_starts, memory, bias):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, lse.new_empty(0) if bias is None else bias))


def save(ctx, inputs, output):
    q, k, v, q_starts, k_starts, memory, bias = inputs
    ctx.save_for_backward(q, k, v, *output, q_starts, k_starts, memory, bias)


def backward(ctx, gradient, _):
    dq, dk, dv, dbias = attention_backward_op(gradient, *ctx.saved_tensors)
    return dq, dk, dv, None, None, None, None if ctx.saved_tensors[-1] is None else dbias


attention_op.register_autograd(backward, setup_context=save)


def attention_triton(q, k, v, q_starts, k_starts, memory=None, bias=None):
    """The contract of kernels.attention, by the kernels. d: a multiple of 16, at most 128."""
    if len(q) == 0 or len(k) == 0:
        return q * 0 + (k.sum() + v.sum()) * 0
    q, k, v = (x.to(q.dtype) if x.stride(2) == 1 else x.to(q.dtype).contiguous() for x in (q, k, v))
    if memory is None:
        memory = torch.arange(len(q_starts) - 1, device=q.device)
    return attention_op(q, k, v, q_starts, k_starts, memory.int(), bias)[0]
