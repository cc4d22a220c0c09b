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
from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

import kernels
from kernels.triton_common import (LN_2, LOG2_E, computing_types, dot, load_rows, narrow,
                                   power_of_two, store_rows)

# --------------------------------------------------------------------------------------------------
# Shared by the kernels
# --------------------------------------------------------------------------------------------------

class Constants(NamedTuple):
    """What a kernel is compiled for: see triton_common."""
    PRODUCT: object
    SUM: object
    ROUND: bool
    PASSES: str
    HEAD: int               # d
    WIDTH: int
    SCALE: float            # log2(e) / sqrt(d): scores in powers of 2
    BIAS: bool
    QUERIES: int
    KEYS: int


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
def load(matrix, h, rows, valid, row, c: tl.constexpr):
    """Rows of head h, ready to be multiplied -> (len(rows), WIDTH)."""
    return load_rows(matrix + h * c.HEAD, rows, valid, row, c.HEAD, c.WIDTH, c.PRODUCT)


@triton.jit
def store(matrix, x, h, rows, valid, row, c: tl.constexpr):
    store_rows(matrix + h * c.HEAD, narrow(x, c), rows, valid, row, c.HEAD, c.WIDTH)


@triton.jit
def scores(a, b, bias, h, i, j, bias_row, c: tl.constexpr):
    """a b^T in powers of 2, plus the bias of head h for positions i and j in their sequences (tiles
    that broadcast). The bias is padded to whole tiles, so it needs no mask."""
    s = dot(a, b.T, None, c) * c.SCALE
    if c.BIAS:
        s += LOG2_E * tl.load(bias + h * bias_row * bias_row + i * bias_row + j).to(c.SUM)
    return s


# --------------------------------------------------------------------------------------------------
# Forward
# --------------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=["B", "T"])
def forward_kernel(q, k, v, bias, q_starts, k_starts, out, lse, B, T, q_row, k_row, row,
                   bias_row, c: tl.constexpr):
    sequence, first_row, q_first, q_end = find_block(q_starts, B, c.QUERIES)
    if first_row >= q_end:                                                   # a spare program
        return
    h = tl.program_id(1)
    rows = first_row + tl.arange(0, c.QUERIES)
    real = rows < q_end
    k_first = tl.load(k_starts + sequence)
    k_end = tl.load(k_starts + sequence + 1)
    queries = load(q, h, rows, real, q_row, c)

    top = tl.full([c.QUERIES], float("-inf"), c.SUM)
    total = tl.zeros([c.QUERIES], c.SUM)
    mean = tl.zeros([c.QUERIES, c.WIDTH], c.SUM)
    for first in range(k_first, k_end, c.KEYS):
        columns = first + tl.arange(0, c.KEYS)
        valid = columns < k_end
        keys = load(k, h, columns, valid, k_row, c)
        s = scores(queries, keys, bias, h, (rows - q_first)[:, None], (columns - k_first)[None, :],
                   bias_row, c)
        s = tl.where(valid[None, :], s, float("-inf"))
        # The new maximum; what was summed under the old one shrinks by their difference.
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        values = load(v, h, columns, valid, k_row, c)
        mean = dot(narrow(p, c), values, mean * shrink[:, None], c)
        top = new_top

    # A sequence without keys: output 0, and lse = inf, so that the backward pass finds p = 0.
    total_or_1 = tl.where(total == 0, 1.0, total)
    own_lse = tl.where(total == 0, float("inf"), top + tl.log2(total_or_1))
    tl.store(lse + h * T + rows, own_lse, mask=real)
    store(out, mean / total_or_1[:, None], h, rows, real, row, c)


# --------------------------------------------------------------------------------------------------
# Backward: with p = softmax and delta = <out, gradient>,  ds = p (<gradient, v> - delta). p is
# computed again from lse, so nothing of size (T, S) was kept.
# --------------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=["B", "T"])
def dq_kernel(q, k, v, bias, q_starts, k_starts, out, gradient, lse, delta, dq, B, T, q_row, k_row,
              row, bias_row, c: tl.constexpr):
    sequence, first_row, q_first, q_end = find_block(q_starts, B, c.QUERIES)
    if first_row >= q_end:
        return
    h = tl.program_id(1)
    rows = first_row + tl.arange(0, c.QUERIES)
    real = rows < q_end
    k_first = tl.load(k_starts + sequence)
    k_end = tl.load(k_starts + sequence + 1)
    queries = load(q, h, rows, real, q_row, c)
    g = load(gradient, h, rows, real, row, c)
    own_out = load(out, h, rows, real, row, c).to(c.SUM)
    own_delta = tl.sum(own_out * g.to(c.SUM), 1)
    own_lse = tl.load(lse + h * T + rows, mask=real, other=float("inf"))     # inf: p = 0

    total = tl.zeros([c.QUERIES, c.WIDTH], c.SUM)
    for first in range(k_first, k_end, c.KEYS):
        columns = first + tl.arange(0, c.KEYS)
        valid = columns < k_end
        keys = load(k, h, columns, valid, k_row, c)
        values = load(v, h, columns, valid, k_row, c)
        s = scores(queries, keys, bias, h, (rows - q_first)[:, None], (columns - k_first)[None, :],
                   bias_row, c)
        p = tl.where(valid[None, :], tl.exp2(s - own_lse[:, None]), 0.0)
        dp = dot(g, values.T, None, c)
        if k_end - k_first <= c.KEYS:
            # All keys are at hand: <out, gradient> = sum p dp, without the rounding of out.
            own_delta = tl.sum(p * dp, 1)
        ds = p * (dp - own_delta[:, None])
        total = dot(narrow(ds, c), keys, total, c)

    tl.store(delta + h * T + rows, own_delta, mask=real)                     # for dkv and dbias
    store(dq, total * (c.SCALE * LN_2), h, rows, real, row, c)


@triton.jit(do_not_specialize=["B", "T"])
def dkv_kernel(q, k, v, bias, q_starts, k_starts, gradient, lse, delta, dk, dv, B, T, q_row,
               k_row, row, bias_row, c: tl.constexpr):
    """One block of keys and values stays in registers; the queries of its sequence pass by."""
    sequence, first_row, k_first, k_end = find_block(k_starts, B, c.KEYS)
    if first_row >= k_end:
        return
    h = tl.program_id(1)
    rows = first_row + tl.arange(0, c.KEYS)
    real = rows < k_end
    q_first = tl.load(q_starts + sequence)
    q_end = tl.load(q_starts + sequence + 1)
    keys = load(k, h, rows, real, k_row, c)
    values = load(v, h, rows, real, k_row, c)

    key_total = tl.zeros([c.KEYS, c.WIDTH], c.SUM)
    value_total = tl.zeros([c.KEYS, c.WIDTH], c.SUM)
    for first in range(q_first, q_end, c.QUERIES):
        # Everything is transposed here: rows of a tile are keys, columns are queries.
        columns = first + tl.arange(0, c.QUERIES)
        valid = columns < q_end
        queries = load(q, h, columns, valid, q_row, c)
        g = load(gradient, h, columns, valid, row, c)
        s = scores(keys, queries, bias, h, (columns - q_first)[None, :], (rows - k_first)[:, None],
                   bias_row, c)
        # p again from the forward pass's log-sum-exp; a column past the end has lse = inf, p = 0.
        their_lse = tl.load(lse + h * T + columns, mask=valid, other=float("inf"))
        p = tl.where(real[:, None], tl.exp2(s - their_lse[None, :]), 0.0)
        # dv = p^T g: a value's gradient is that of every mean it entered, by its share.
        value_total = dot(narrow(p, c), g, value_total, c)
        # dk = ds^T q, with ds = p (<g, v> - delta)
        their_delta = tl.load(delta + h * T + columns, mask=valid, other=0.0)
        ds = p * (dot(values, g.T, None, c) - their_delta[None, :])
        key_total = dot(narrow(ds, c), queries, key_total, c)

    store(dk, key_total * (c.SCALE * LN_2), h, rows, real, row, c)
    store(dv, value_total, h, rows, real, row, c)


@triton.jit(do_not_specialize=["B", "T"])
def dbias_kernel(q, k, v, bias, q_starts, k_starts, gradient, lse, delta, dbias, B, T, q_row,
                 k_row, row, bias_row, c: tl.constexpr):
    """One program per tile of one head's bias and per part of the B sequences: the sum of ds over
    this part, in the order of its sequences. The parts are added afterwards: an image encoder has
    few tiles, and without parts most of the GPU would wait."""
    h = tl.program_id(1)
    part = tl.program_id(2)
    across = bias_row // c.KEYS                                              # tiles side by side
    i = tl.program_id(0) // across * c.QUERIES + tl.arange(0, c.QUERIES)
    j = tl.program_id(0) % across * c.KEYS + tl.arange(0, c.KEYS)
    where = h * bias_row * bias_row + i[:, None] * bias_row + j[None, :]
    b = LOG2_E * tl.load(bias + where).to(c.SUM)                             # of all sequences
    total = tl.zeros([c.QUERIES, c.KEYS], c.SUM)
    per_part = tl.cdiv(B, tl.num_programs(2))
    for sequence in range(part * per_part, min(part * per_part + per_part, B)):
        first = tl.load(q_starts + sequence)
        end = tl.load(q_starts + sequence + 1)
        rows = first + i
        columns = first + j
        queries = load(q, h, rows, rows < end, q_row, c)
        keys = load(k, h, columns, columns < end, k_row, c)
        s = dot(queries, keys.T, None, c) * c.SCALE + b
        own_lse = tl.load(lse + h * T + rows, mask=rows < end, other=float("inf"))
        p = tl.where((columns < end)[None, :], tl.exp2(s - own_lse[:, None]), 0.0)
        g = load(gradient, h, rows, rows < end, row, c)
        values = load(v, h, columns, columns < end, k_row, c)
        own_delta = tl.load(delta + h * T + rows, mask=rows < end, other=0.0)
        total += p * (dot(g, values.T, None, c) - own_delta[:, None])
    tl.store(dbias + part * (row // c.HEAD) * bias_row * bias_row + where, total)


# --------------------------------------------------------------------------------------------------
# Launching
# --------------------------------------------------------------------------------------------------

# (QUERIES, KEYS, warps, stages). None spills on an NVIDIA GPU: `python -m kernels.bench` compiles
# every entry. Sentences are short: a block of 128 queries, faster on long sequences, would be nine
# tenths empty here.
TILES = {
    # 16 bits: d <= 64            d > 64           float32: d <= 64  d > 64
    "forward": ((64, 64, 4, 3), (64, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1)),
    "dq":      ((64, 64, 4, 2), (64, 32, 4, 2), (16, 32, 4, 1), (16, 32, 8, 2)),
    "dkv":     ((16, 64, 4, 3), (16, 64, 4, 2), (16, 32, 8, 2), (16, 16, 4, 2)),
    "dbias":   ((64, 32, 4, 2), (64, 32, 4, 2), (16, 32, 4, 2), (16, 32, 8, 1)),
}
BIAS_MULTIPLE = 128                 # a bias is padded to a multiple of every tile
PROGRAMS = 1024                     # of dbias: enough for every multiprocessor, few parts to add


def tile_sizes(kernel: str, dtype, d: int):
    """-> QUERIES, KEYS, warps, stages"""
    if kernels.interpreting():
        return 128, 128, 4, 1                                                # fewest NumPy calls
    queries, keys, warps, stages = TILES[kernel][2 * (dtype.itemsize > 2) + (d > 64)]
    if kernel == "dkv" and d == 48:
        warps = 8                       # the mask of 16 missing columns costs registers
    return queries, keys, warps, stages


class Launch:
    """The arguments that all kernels of one call are given."""

    def __init__(self, q, k, v, q_starts, k_starts, bias):
        self.dtype = q.dtype
        self.T, self.H, self.d = q.shape
        self.S = len(k)
        self.B = len(q_starts) - 1
        self.biased = bias is not None
        self.bias_row = bias.shape[1] if self.biased else 0
        self.inputs = {"q": q, "k": k, "v": v, "q_starts": q_starts, "k_starts": k_starts,
                       "bias": bias if self.biased else q,                   # q: not read
                       "q_row": q.stride(0), "k_row": k.stride(0)}           # v's too

    def grid(self, name):
        """How many programs a kernel has: (blocks, heads), of dbias also parts."""
        queries, keys, *_ = tile_sizes(name, self.dtype, self.d)
        if name == "dbias":
            tiles = (self.bias_row // queries) * (self.bias_row // keys)
            parts = max(1, min(self.B, PROGRAMS // (tiles * self.H)))
            return tiles, self.H, parts
        if name == "dkv":
            return self.S // keys + self.B, self.H                           # see find_block
        return self.T // queries + self.B, self.H

    def __call__(self, name, kernel, **others):
        queries, keys, warps, stages = tile_sizes(name, self.dtype, self.d)
        c = Constants(**computing_types(self.dtype), HEAD=self.d, WIDTH=power_of_two(self.d),
                      SCALE=math.log2(math.e) / math.sqrt(self.d), BIAS=self.biased,
                      QUERIES=queries, KEYS=keys)
        # In float32 NVIDIA's compiler by itself spills a little here, to fit one more program.
        limited = self.dtype.itemsize > 2 and name in ("forward", "dq") and not kernels.amd()
        limit = {"maxnreg": 255} if limited else {}
        kernel[self.grid(name)](**self.inputs, **others, B=self.B, T=self.T, row=self.H * self.d,
                                bias_row=self.bias_row, c=c, num_warps=warps, num_stages=stages,
                                enable_fp_fusion=True, **limit)


# custom_op and not triton_op: torch.compile takes the op as it is, so a test in the interpreter
# covers it. Through triton_op it would trace into the kernels, which interpreted kernels do not
# allow, and find nothing to fuse them with.

@torch.library.custom_op("cclm::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor,
                 bias: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """bias: padded to (H, P', P'), see attention_triton -> out (T, H, d), log2-sum-exp2 of the
    scores (H, T)"""
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[1], len(q), dtype=torch.promote_types(q.dtype, torch.float32))
    launch = Launch(q, k, v, q_starts, k_starts, bias)
    launch("forward", forward_kernel, out=out, lse=lse)
    return out, lse


@torch.library.custom_op("cclm::attention_backward", mutates_args=())
def attention_backward_op(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor,
                          k_starts: Tensor, bias: Optional[Tensor], out: Tensor,
                          lse: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, dbias (padded as bias is; empty without one)"""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    launch = Launch(q, k, v, q_starts, k_starts, bias)
    saved = {"gradient": gradient.contiguous(), "lse": lse, "delta": torch.empty_like(lse)}
    launch("dq", dq_kernel, out=out, dq=dq, **saved)                         # first: it fills delta
    launch("dkv", dkv_kernel, dk=dk, dv=dv, **saved)
    if bias is None:
        return dq, dk, dv, lse.new_empty(0)
    dbias = lse.new_empty(launch.grid("dbias")[2], *bias.shape)              # (parts, H, P', P')
    launch("dbias", dbias_kernel, dbias=dbias, **saved)
    return dq, dk, dv, dbias.sum(0).to(bias.dtype)                           # (H, P', P')


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
    ctx.set_materialize_grads(False)            # no zeros for lse, which has no gradient


def backward(ctx, gradient, _):
    if gradient is None:
        return (None,) * 6
    saved = ctx.saved_tensors                   # once: checkpointing unpacks each tensor only once
    dq, dk, dv, dbias = attention_backward_op(gradient, *saved)
    bias = saved[5]
    return dq, dk, dv, None, None, None if bias is None else dbias


attention_op.register_autograd(backward, setup_context=save)


def closed_rows(x):
    """x (T, H, d) such that the H * d numbers of a row have no gap; rows may lie apart, as they do
    where q, k and v come from one product."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def attention_triton(q, k, v, q_starts, k_starts, bias=None):
    """The contract of kernels.attention, by the kernels. d: a multiple of 16, at most 128."""
    if len(q) == 0 or len(k) == 0:
        return q * 0 + (k.sum() + v.sum()) * 0
    q, k, v = (closed_rows(x.to(q.dtype)) for x in (q, k, v))
    if k.stride(0) != v.stride(0):
        k, v = (x.contiguous() for x in (k, v))
    if bias is not None:
        missing = -bias.shape[1] % BIAS_MULTIPLE                             # tiles need no mask
        bias = F.pad(bias, (0, missing, 0, missing)).contiguous()            # -> (H, P', P')
    return attention_op(q, k, v, q_starts, k_starts, bias)[0]
