"""Packed batches: sequences of different lengths as one matrix of tokens, without padding.

Sequence i is rows starts[i]..starts[i+1] (flash-attention calls starts cu_seqlens). Here are the
few operations on such batches that torch lacks: lengths to starts, some sequences of many, rows to
and from a larger matrix.

Letters: B sequences, T tokens.
"""
import torch
import torch.nn.functional as F


class ScatterRows(torch.autograd.Function):
    """Rows of x to the unique rows `where` of a zero matrix. The backward of such a copy is a plain
    look-up. The backward of torch's own indexing adds into a zero matrix: slower, and on several
    CPU threads the order of the sum changes from run to run."""

    @staticmethod
    def forward(ctx, x, where, rows):
        ctx.save_for_backward(where)
        out = x.new_zeros(rows, *x.shape[1:])
        return out.index_copy_(0, where, x)                              # (T, ...) -> (rows, ...)

    @staticmethod
    def backward(ctx, gradient):
        where, = ctx.saved_tensors
        return gradient.index_select(0, where), None, None               # (rows, ...) -> (T, ...)


class GatherRows(torch.autograd.Function):
    """The inverse of ScatterRows: the unique rows `where` of x."""

    @staticmethod
    def forward(ctx, x, where):
        ctx.save_for_backward(where)
        ctx.rows = x.shape[0]
        return x.index_select(0, where)                                  # (rows, ...) -> (T, ...)

    @staticmethod
    def backward(ctx, gradient):
        where, = ctx.saved_tensors
        out = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return out.index_copy_(0, where, gradient), None                 # (T, ...) -> (rows, ...)


def offsets(lengths):
    """lengths (B,) -> starts (B+1,) int32."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def gather_sequences(starts, index, total=None):
    """Sequences `index` (Q,) of a packed batch, in that order, repeats allowed.

    Returns their rows (T',) int64 in the batch, and their own starts (Q+1,) int32. total: T', where
    the caller knows it. Without it the host waits for the GPU."""
    lengths = starts.diff()[index]                                       # (Q,)
    new_starts = offsets(lengths)                                        # (Q+1,)
    # row r of the result, in sequence q, is row starts[index[q]] + (r - new_starts[q]) of the batch
    shift = starts[index] - new_starts[:-1]                              # (Q,)
    shift = torch.repeat_interleave(shift, lengths, output_size=total)   # (Q,) -> (T',)
    return torch.arange(len(shift), device=starts.device) + shift, new_starts
