"""Packed batches: sequences of different lengths as one matrix of tokens, without padding.

Sequence i is rows starts[i]..starts[i+1] (flash-attention calls starts cu_seqlens). Here are the few operations on
such batches that torch lacks: lengths to starts, some sequences of many, rows to and from a larger matrix.

Letters: B sequences, T tokens.
"""
import torch
import torch.nn.functional as F


class ScatterRows(torch.autograd.Function):
    """Rows of x to the unique rows `where` of a zero matrix. The backward of such a copy is a plain look-up; torch's
    own indexing would add, which is slower, and on several CPU threads not even the same twice."""

    @staticmethod
    def forward(ctx, x, where, rows):
        ctx.save_for_backward(where)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, where, x)                   # (T, ...) -> (rows, ...)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class GatherRows(torch.autograd.Function):
    """The inverse of ScatterRows: the unique rows `where` of x."""

    @staticmethod
    def forward(ctx, x, where):
        ctx.save_for_backward(where)
        ctx.rows = x.shape[0]
        return x.index_select(0, where)                                                    # (rows, ...) -> (T, ...)

    @staticmethod
    def backward(ctx, gradient):
        where, = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_copy_(0, where, gradient), None


def offsets(lengths):
    """lengths (B,) -> starts (B+1,) int32."""
    return F.pad(lengths.cumsum(0), (1, 0)).int()


def gather_sequences(starts, index):
    """Sequences `index` (Q,) of a packed batch, in that order, repeats allowed -> (rows (T',) int64, starts (Q+1,))."""
    lengths = starts.diff()[index]
    new = offsets(lengths)
    shift = torch.repeat_interleave(starts[index] - new[:-1], lengths)       # host sync: how many rows there are
    return torch.arange(len(shift), device=starts.device) + shift, new
