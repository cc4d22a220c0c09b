"""Attention over packed sequences: no padding in the model, no mask, and many queries may share one memory.

A batch of sequences is one long matrix of tokens and `starts` (B+1,): sequence i is rows starts[i]..starts[i+1].

    attention(q, k, v, q_starts, k_starts, memory=None, bias=None) -> (T, H, d)
        q (T, H, d); k, v (S, H, d); starts int32 on the tensors' device
        memory (B,) or None    query sequence i attends to key sequence memory[i]; None: its own; -1: nothing, output 0
        bias (H, N, N) or None BEiT-2's relative position bias, only where every sequence has N tokens
        softmax(q k^T / sqrt(d) + bias) v, for every head alone

`memory` is what makes matching with hard negatives cheap: four fusion queries look at one encoded view, and its keys
and values are neither projected nor stored four times. On a GPU the kernel never pads; on a CPU, where small matrix
products are expensive, attention_torch pads, attends and unpads, and everything outside attention still runs on real
tokens only.

Letters: B sequences, T query tokens, S key tokens, L longest, H heads, d width of a head.
"""
import math

import torch
import torch.nn.functional as F

from kernels import use_triton
from kernels.packed import GatherRows, ScatterRows, offsets, gather_sequences

# ------------------------------------------------------------------------------------------------------------------
# The torch version: group -> sort by length -> pad -> attend -> unpad
# ------------------------------------------------------------------------------------------------------------------

BUCKETS = 4             # sentences of 4 and of 40 words in one padded batch: nine tenths of it would be padding


def attention_torch(q, k, v, q_starts, k_starts, memory=None, bias=None):
    """The contract above in torch. No key is ever copied: all queries that look at one memory are put side by side, as
    if they were one longer query sequence, since a query does not see its neighbours."""
    if memory is None:
        return attend_buckets(q, k, v, q_starts, k_starts, bias)
    lengths, order = q_starts.diff(), memory.argsort(stable=True)
    rows, starts = gather_sequences(q_starts, order)                                                   # (T,): sorted by memory
    nothing = int(starts[(memory < 0).sum()])                                              # queries of -1 come first
    grouped = offsets(lengths.new_zeros(len(k_starts) - 1).index_add_(0, memory.clamp(min=0), lengths * (memory >= 0)))
    sorted_q = GatherRows.apply(q, rows)
    out = attend_buckets(sorted_q[nothing:], k, v, grouped, k_starts, bias)
    return ScatterRows.apply(torch.cat([torch.zeros_like(sorted_q[:nothing]), out]), rows, len(q))


def attend_buckets(q, k, v, q_starts, k_starts, bias):
    """Attention of sequence i to sequence i; ragged batches in buckets of similar lengths."""
    q_lengths, k_lengths = q_starts.diff(), k_starts.diff()
    B, Q, K = len(q_lengths), *(int(x.max()) if len(x) else 0 for x in (q_lengths, k_lengths))
    if B * Q == len(q) and B * K == len(k):                                                # all alike: nothing to pad
        return attend(q, k, v, None, None, None, (B, Q, K), bias)
    order = (q_lengths + k_lengths).argsort(stable=True)
    q_rows, k_rows = gather_sequences(q_starts, order)[0], gather_sequences(k_starts, order)[0]
    q, k, v = GatherRows.apply(q, q_rows), GatherRows.apply(k, k_rows), GatherRows.apply(v, k_rows)    # sorted by length
    outs, q_done, k_done = [], 0, 0
    for chunk in order.chunk(BUCKETS):
        (q_where, q_here, Q), (k_where, k_here, K) = (padded_rows(x[chunk]) for x in (q_lengths, k_lengths))
        seen = torch.arange(K, device=q.device) < k_lengths[chunk, None]                   # (chunk, K): real keys
        q_slice, k_slice = slice(q_done, q_done + q_here), slice(k_done, k_done + k_here)
        outs.append(attend(q[q_slice], k[k_slice], v[k_slice], q_where, k_where, seen, (len(chunk), Q, K), None))
        q_done, k_done = q_slice.stop, k_slice.stop
    return ScatterRows.apply(torch.cat(outs), q_rows, len(q))


def padded_rows(lengths):
    """lengths (B,) -> row of each token in the padded (B * longest) matrix, number of tokens, longest."""
    longest = int(lengths.max())
    row = torch.arange(longest, device=lengths.device)
    where = (torch.arange(len(lengths), device=lengths.device)[:, None] * longest + row)[row < lengths[:, None]]
    return where, len(where), longest


def attend(q, k, v, q_where, k_where, seen, shape, bias):
    """Attention on the padded view. fp32 and fp64 take F.scaled_dot_product_attention; 16-bit types on a CPU a plain
    product, softmax and product, which is 2 to 6 times faster there on sentences."""
    (B, Q, K), H = shape, q.shape[1]
    if not len(q) or not len(k):
        return q * 0 + (k.sum() + v.sum()) * 0                               # nobody asks, or nothing to see
    def pad(x, where, L):
        return (x if where is None else ScatterRows.apply(x, where, B * L)).view(B, L, H, -1).transpose(1, 2)
    q, k, v = pad(q, q_where, Q), pad(k, k_where, K), pad(v, k_where, K)     # (B, H, L, d)
    mask = bias if seen is None else seen[:, None, None]                     # (H, Q, K), or (B, 1, 1, K) bool
    if q.dtype in (torch.float32, torch.float64) or q.is_cuda:
        out = F.scaled_dot_product_attention(
            q, k, v, mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype))
    else:
        scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])    # (B, H, Q, K)
        if mask is not None:
            scores = scores + mask if seen is None else scores.masked_fill(~mask, -1e30)
        out = scores.softmax(-1).to(q.dtype) @ v                             # (B, H, Q, d)
        if seen is not None:
            out = out * seen.any(1)[:, None, None, None]                     # no key at all: 0, not a mean
    out = out.transpose(1, 2).reshape(B * Q, H, -1)                          # (B * Q, H, d)
    return out if q_where is None else GatherRows.apply(out, q_where)            # (T, H, d)


# ------------------------------------------------------------------------------------------------------------------
# Which one runs
# ------------------------------------------------------------------------------------------------------------------

def attention(q, k, v, q_starts, k_starts, memory=None, bias=None):
    """The contract in the file's docstring, by the fastest path for the tensors' device (kernels.use_triton says
    which). memory must stay below the number of key sequences: nothing checks it on a GPU. ValueError for a bias that
    does not fit."""
    if bias is not None and (memory is not None or not len(q) == len(k) == (len(q_starts) - 1) * bias.shape[1]):
        raise ValueError(f"attention: a bias {tuple(bias.shape)} needs {len(q_starts) - 1} sequences of "
                         f"{bias.shape[1]} tokens that attend to themselves (no memory), "
                         f"not {len(q)} queries and {len(k)} keys")
    if use_triton(q) and q.shape[2] % 16 == 0 and q.shape[2] <= 128:
        from kernels.attention_triton import attention_triton
        return attention_triton(q, k, v, q_starts, k_starts, memory, bias)
    return attention_torch(q, k, v, q_starts, k_starts, memory, bias)
