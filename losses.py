"""The paper in one file: one loss for two views of one thing, whatever the two views are.

An image and its caption are two views of one thing; so are a sentence and its translation. cross_view() takes a View
`a` (image or sentence) and a View `b` (sentence) and does not know which kind it was given:

    contrast   -1/2N sum_i [log softmax_j(<a_i, b_j> / t) + log softmax_j(<a_j, b_i> / t)]_{j=i}   knows nothing: ln N
    match      cross entropy of "does b belong to a?" on 1 true : 2 hard wrong pairs               knows nothing: 0.6365
    mask       cross entropy of b's masked words, read while looking at a                          knows nothing: ln V

(0.6365 is the entropy of 1 : 2; a head that starts at zero says 0.6931 = ln 2 first.) Every loss is a mean over ALL
processes: each returns W x (its own sum) / (count over all processes), so that the mean of gradients that DDP takes is
the gradient of the global loss.

Letters: B items per process, W processes, N = W*B, T tokens, M masked words, D width, E embedding, V vocabulary.

    python losses.py        the three losses of an untrained and of an all-knowing model beside their chance levels
"""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from kernels.contrastive import contrastive
from kernels.packed import offsets
from model import PRESETS, CCLM, View, at_least_float32

# ------------------------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------------------------


def world():
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class AllGather(torch.autograd.Function):
    """(B, E) of every process -> (N, E) on every process; the backward sums what all processes want of our rows. (The
    official gather keeps only our own wishes: a gradient W times too small, F2.1.)"""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(world()[1] * len(x), *x.shape[1:])
        dist.all_gather_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, gradient):
        out = gradient.new_empty(len(gradient) // world()[1], *gradient.shape[1:])
        dist.reduce_scatter_single(out, gradient.contiguous())
        return out


def all_gather(x):
    return x if world()[1] == 1 else AllGather.apply(x)                      # (B, ...) -> (N, ...)


def all_reduce(x, op="SUM"):
    """x summed (or op) over all processes, without gradient."""
    x = x.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x


def global_mean(own_sum, own_count):
    """W x own sum / count over all processes; 0 (with a gradient path) where nobody has a row."""
    return world()[1] * own_sum / all_reduce(own_count.to(own_sum.dtype)).clamp(min=1)


# ------------------------------------------------------------------------------------------------------------------
# 1. Contrast
# ------------------------------------------------------------------------------------------------------------------

def contrastive_loss(a, b, temperature, seed, same="ignore"):
    """Symmetric InfoNCE over the vectors of all processes, and a hard wrong partner for every item of this one.

    a, b: Views of B items; i, j are `same` when their a.ids or b.ids agree: neither positives nor negatives of each
    other ("ignore", pre-training), or soft labels, each an equal share of 1 ("positive", retrieval fine-tuning, F2.1).
    Returns the loss (scalar) and (wrong_a (B,), wrong_b (B,)) int64: positions in this process's batch, -1 for none.
    Only b's vectors travel: this process works on its B rows of the N x N matrix; columns' sums are put together."""
    rank, W = world()
    B, N, first = len(a.vectors), W * len(a.vectors), rank * len(a.vectors)
    ids = torch.stack([a.ids, b.ids], 1)                                     # (B, 2)
    all_ids, b_all = all_gather(ids), all_gather(b.vectors)                          # (N, 2), (N, E)
    if same == "ignore":
        s = contrastive(a.vectors, b_all, temperature, ids, all_ids, first, seed)
        wrong, positives = (s.wrong_a, s.wrong_b), 2 * s.positives.sum()
    elif same == "positive":
        nobody = torch.arange(N, device=ids.device)[:, None].expand(N, 2)    # all different: all pairs stay in the sums
        s = contrastive(a.vectors, b_all, temperature, nobody[first:first + B], nobody, first, seed)
        with torch.no_grad():
            drawn = contrastive(a.vectors, b_all, temperature, ids, all_ids, first, seed)
        alike = (ids[:, None] == all_ids).any(-1)                            # (B, N)
        share = 1 / alike.sum(1).to(b_all.dtype)                             # (B,): every item's labels add up to 1
        labels = alike * (share[:, None] + all_gather(share))                    # rows' labels + columns' labels
        wrong, positives = (drawn.wrong_a, drawn.wrong_b), ((labels @ b_all) * a.vectors).sum() / temperature
    else:
        raise ValueError(f"same={same!r} is unknown: choose 'ignore' or 'positive'")
    columns = combine_columns(s.column_lse, first, B)
    return W * (s.row_lse.sum() + columns - positives) / (2 * N), wrong


def combine_columns(part, first, B):
    """part (N,): log-sum-exp of every column over this process's rows. Value: the sum over this process's own columns
    of the log-sum-exp over ALL rows. Gradient: that of the sum over all N columns with respect to our part of them."""
    if world()[1] == 1:
        return part.sum()
    top = all_reduce(part, "MAX")                                                 # (N,)
    whole = top + all_reduce((part - top).exp()).log()                            # (N,)
    share = (part - whole).exp().detach()                                    # d whole / d part
    ours = (share * part.masked_fill(share == 0, 0)).sum()                   # column without rows here: 0, not 0 x -inf
    return ours + (whole[first:first + B].sum() - ours).detach()


# ------------------------------------------------------------------------------------------------------------------
# 2. Match, and 3. mask: one pass through the fusion encoder
# ------------------------------------------------------------------------------------------------------------------

def fuse_pairs(model, a, b, masked, positions, negatives, condition=True):
    """True pairs, pairs with a wrong a, pairs with a wrong b, and the masked sentences go through the fusion encoder as
    ONE batch of 4B query sequences. They are copies of only 2B texts (b and masked b) that look at only B views of a.

    Returns first-token states (3B, D) in that order, and the states of the masked words (M, D)."""
    B, device = len(b.ids), b.states.device
    everyone = torch.arange(B, device=device)
    items = everyone[:len(negatives[0])]                                         # none where match is switched off
    negative_a, negative_b = (x.clamp(min=0) for x in negatives)
    text = torch.cat([items, items, negative_b, everyone + B])                  # which text asks ...
    view = torch.cat([items, negative_a, items,                                 # ... and what it looks at
                      everyone if condition else torch.full_like(everyone, -1)])
    starts = torch.cat([b.starts, b.starts[1:] + b.starts[-1]])              # (2B + 1,)
    asked = offsets(starts.diff()[text]).long()                              # (4B + 1,) starts of the query sequences
    pairs = 3 * len(items)
    wanted = torch.cat([asked[:pairs], positions + asked[pairs]])                 # first tokens, then masked tokens: sorted
    texts = View(torch.cat([b.states, masked]), starts, None, None)
    fused = model.fuse(texts, a, text, view, wanted)                         # (3B + M, D)
    return fused[:pairs], fused[pairs:]


def matching_loss(head, states, negatives):
    """states (3B, D) of true, wrong-a and wrong-b pairs -> cross entropy of head's "no, yes"; an item without wrong
    partners (-1) is left out."""
    counts = ((negatives[0] >= 0) & (negatives[1] >= 0)).repeat(3)                   # (3B,)
    labels = torch.zeros(len(states), dtype=torch.long, device=states.device)
    labels[:len(states) // 3] = 1
    losses = F.cross_entropy(at_least_float32(head(states)), labels, reduction="none")  # (3B, D) -> (3B, 2) -> (3B,)
    return global_mean((losses * counts).sum(), counts.sum())


def masked_lm_loss(head, states, labels):
    """states (M, D) of masked positions, labels (M,) the true ids -> cross entropy over the vocabulary. The logits
    (M, V) exist a chunk at a time: at M = 1,024 and V = 250,002 that is 0.2 GB instead of 2.9."""
    options = torch.nn.LinearCrossEntropyOptions() if len(labels) * len(head.bias) > 2 ** 27 else None
    x = head(states)                                                         # (M, D)
    own = F.linear_cross_entropy(x, head.weight, labels, linear_bias=head.bias, reduction="sum", options=options)
    return global_mean(own, torch.tensor(len(labels), device=states.device))


# ------------------------------------------------------------------------------------------------------------------
# The one loss
# ------------------------------------------------------------------------------------------------------------------

WEIGHTS = {"contrast": 1.0, "match": 1.0, "mask": 1.0}                       # F2.6


def cross_view(model, a, b, masked, positions, labels, seed, negatives=None, same="ignore", weights=WEIGHTS, condition=True):
    """The loss of B items seen as `a` and as `b`.

    model      anything with fuse(), itm_head, mlm_head and temperature (CCLM, or an ablation's stand-in)
    a, b       Views; b is text. ids say which items are the same thing
    masked     (T, D) b's states with some words masked (b's starts); positions (M,) sorted: which; labels (M,): the true ids
    seed       int: the draw of wrong partners. negatives: None, or given (negative_a (B,), negative_b (B,)), -1 = none
    same       "ignore" or "positive", see contrastive_loss().  condition=False: masked words are read without looking at a
    Returns {"contrast", "match", "mask"} and their weighted sum "loss", scalars with gradients."""
    loss, drawn = contrastive_loss(a, b, model.temperature, seed, same)
    negatives = drawn if negatives is None else negatives
    if not weights["match"]:
        negatives = tuple(x[:0] for x in negatives)                                  # no pairs: match is 0 x its inputs
    pairs, masked_states = fuse_pairs(model, a, b, masked, positions, negatives, condition)
    losses = {"contrast": loss, "match": matching_loss(model.itm_head, pairs, negatives),
              "mask": masked_lm_loss(model.mlm_head, masked_states, labels)}
    return losses | {"loss": sum(weights[name] * value for name, value in losses.items())}


# ------------------------------------------------------------------------------------------------------------------
# Sanity table
# ------------------------------------------------------------------------------------------------------------------

def sanity_table(B=64, length=8, seed=0):
    """Rows (loss, untrained, knows nothing, knows all) for the demo model on random images and sentences."""
    torch.manual_seed(seed)
    config = PRESETS["demo"]
    model, ids = CCLM(config).eval(), torch.arange(B)
    starts = torch.arange(0, B * length + 1, length, dtype=torch.int32)
    words = torch.randint(4, config.vocabulary - 1, (B * length,))
    image = model.encode_image(torch.randn(B, 3, config.image_size, config.image_size), ids)
    text = model.encode_text(words, starts, ids)
    rows = starts[:-1].long() + 2
    got = cross_view(model, image, text, text.states, rows, words[rows], seed)
    known = F.normalize(torch.randn(B, config.embedding), dim=-1)            # both views know which thing they show
    best = contrastive_loss(View(None, None, known, ids), View(None, None, known, ids), torch.tensor(0.01), seed)[0]
    sure = 20 * F.one_hot(torch.tensor([1] * B + [0] * 2 * B), 2).float()    # a head that knows all pairs
    reader = torch.nn.Identity()                                             # and one that knows all of B words
    reader.weight, reader.bias = torch.nn.Parameter(30 * torch.eye(B)), torch.nn.Parameter(torch.zeros(B))
    perfect = [best, matching_loss(torch.nn.Identity(), sure, (ids, ids)), masked_lm_loss(reader, torch.eye(B), ids)]
    return [(name, got[name].item(), chance, float(least.detach())) for name, chance, least in
            zip(WEIGHTS, [math.log(B), 0.6365, math.log(config.vocabulary)], perfect)]


if __name__ == "__main__":
    print(f"{'loss':10}{'untrained':>12}{'knows nothing':>16}{'knows all':>12}")
    for name, got, chance, perfect in sanity_table():
        print(f"{name:10}{got:12.4f}{chance:16.4f}{perfect:12.4f}")
