"""Attention over packed sequences: no padding in the model, and no mask.

A batch of sequences is one long matrix of tokens and `starts` (B+1,): sequence i is rows
starts[i]..starts[i+1].

    attention(q, k, v, q_starts, k_starts, bias=None) -> (T, H, d)
        q (T, H, d); k, v (S, H, d); starts (B+1,) int32 on the tensors' device
        query sequence i reads key sequence i; either may have length 0: output and gradient 0
        bias (H, P, P) or None: BEiT-2's relative position bias, only where every sequence has P
        tokens and reads itself
        softmax(q k^T / sqrt(d) + bias) v, for every head alone

Many queries can read the same keys without a copy: put them side by side, as one longer query
sequence, since a query does not see its neighbours (model.Fusion does it). On a GPU the kernel
never pads. On a CPU, where small matrix products are expensive, attention_torch pads, attends and
unpads, and everything outside attention still runs on real tokens only.

Letters: B sequences, T query tokens, S key tokens, Q and K longest query and key sequence of a
bucket, H heads, d width of a head. The kernels are in kernels/attention_triton.py.
"""
import math

import torch
import torch.nn.functional as F

from kernels import use_triton
from kernels.packed import GatherRows, ScatterRows, gather_sequences

# --------------------------------------------------------------------------------------------------
# The torch version: sort by length -> pad -> attend -> unpad
# --------------------------------------------------------------------------------------------------

# sentences of 4 and of 40 words in one padded batch: nine tenths of it would be padding
BUCKETS = 4


def attention_torch(q, k, v, q_starts, k_starts, bias=None):
    """The contract above in torch: ragged batches in buckets of similar lengths."""
    q_lengths = q_starts.diff()                                          # (B,)
    k_lengths = k_starts.diff()                                          # (B,)
    B = len(q_lengths)
    if B * longest(q_lengths) == len(q) and B * longest(k_lengths) == len(k):
        return attend(Bucket(q_lengths, k_lengths, equal=True), q, k, v, bias)     # nothing to pad

    # 1. Put the sequences in order of length, so that a bucket is one slice of rows.
    order = (q_lengths + k_lengths).argsort(stable=True)                 # (B,)
    q_rows, _ = gather_sequences(q_starts, order, len(q))                # (T,)
    k_rows, _ = gather_sequences(k_starts, order, len(k))                # (S,)
    q = GatherRows.apply(q, q_rows)
    k = GatherRows.apply(k, k_rows)
    v = GatherRows.apply(v, k_rows)

    # 2. Attend bucket by bucket. split() and cat() are each other's backward: no copy of all rows
    #    is made for a bucket.
    buckets = [Bucket(q_lengths[part], k_lengths[part]) for part in order.chunk(BUCKETS)]
    q_parts = q.split([bucket.q_rows for bucket in buckets])
    k_parts = k.split([bucket.k_rows for bucket in buckets])
    v_parts = v.split([bucket.k_rows for bucket in buckets])
    outs = [attend(*part, None) for part in zip(buckets, q_parts, k_parts, v_parts)]

    # 3. Rows go back to where they came from.
    return ScatterRows.apply(torch.cat(outs), q_rows, len(q))            # (T, H, d)


def longest(lengths):
    return int(lengths.max()) if len(lengths) else 0


class Bucket:
    """Lengths of a few sequences, and where their rows lie in padded matrices (B * Q rows of
    queries, B * K rows of keys). equal: every sequence has the longest length."""

    def __init__(self, q_lengths, k_lengths, equal=False):
        self.B = len(q_lengths)
        self.Q = longest(q_lengths)
        self.K = longest(k_lengths)
        self.q_where = self.k_where = self.seen = None
        if not equal:
            real_queries = torch.arange(self.Q, device=q_lengths.device) < q_lengths[:, None]
            real_keys = torch.arange(self.K, device=q_lengths.device) < k_lengths[:, None]
            self.q_where = real_queries.flatten().nonzero()[:, 0]        # (T of the bucket,)
            self.k_where = real_keys.flatten().nonzero()[:, 0]           # (S of the bucket,)
            self.seen = real_keys                                        # (B, K)
            self.q_rows = len(self.q_where)
            self.k_rows = len(self.k_where)


def pad(x, where, B, L):
    """Rows of B sequences -> (B, H, L, d). where None: they are padded already."""
    if where is not None:
        x = ScatterRows.apply(x, where, B * L)
    return x.view(B, L, *x.shape[1:]).transpose(1, 2)


def attend(bucket, q, k, v, bias):
    """Attention of a bucket's rows on the padded view. float32 and float64 take torch's
    scaled_dot_product_attention. 16-bit types on a CPU take a plain product, softmax and product,
    which is 2 to 6 times faster there on sentences."""
    if not len(q) or not len(k):
        return q * 0 + (k.sum() + v.sum()) * 0           # no query, or no key: 0, with a gradient
    H, d = q.shape[1:]
    q = pad(q, bucket.q_where, bucket.B, bucket.Q)                       # (B, H, Q, d)
    k = pad(k, bucket.k_where, bucket.B, bucket.K)                       # (B, H, K, d)
    v = pad(v, bucket.k_where, bucket.B, bucket.K)                       # (B, H, K, d)
    # which keys are real, for all heads and queries alike
    seen = None if bucket.seen is None else bucket.seen[:, None, None]   # (B, 1, 1, K)
    if q.dtype in (torch.float32, torch.float64) or q.is_cuda:
        mask = seen if bias is None else bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, mask)              # (B, H, Q, d)
    else:
        scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])          # (B, H, Q, K)
        if bias is not None:
            scores = scores + bias
        if seen is not None:
            scores = scores.masked_fill(~seen, -1e30)
        out = scores.softmax(-1).to(q.dtype) @ v                         # (B, H, Q, d)
        if seen is not None:
            out = out * seen.any(-1, keepdim=True)                       # no key: 0, not a mean
    out = out.transpose(1, 2).reshape(-1, H, d)                          # (B * Q, H, d)
    if bucket.q_where is None:
        return out
    return GatherRows.apply(out, bucket.q_where)                         # (T, H, d)


# --------------------------------------------------------------------------------------------------
# Which one runs
# --------------------------------------------------------------------------------------------------

def attention(q, k, v, q_starts, k_starts, bias=None):
    """The contract in the file's docstring, by the fastest path for the tensors' device
    (kernels.use_triton says which). Raises ValueError for a bias that does not fit."""
    if bias is not None and not len(q) == len(k) == (len(q_starts) - 1) * bias.shape[1]:
        raise ValueError(f"attention: a bias {tuple(bias.shape)} needs {len(q_starts) - 1} "
                         f"sequences of {bias.shape[1]} tokens that attend to themselves, "
                         f"not {len(q)} queries and {len(k)} keys")
    if use_triton(q) and q.shape[2] % 16 == 0 and q.shape[2] <= 128:
        from kernels.attention_triton import attention_triton
        return attention_triton(q, k, v, q_starts, k_starts, bias)
    return attention_torch(q, k, v, q_starts, k_starts, bias)
