"""The paper in one file: one loss for two views of one thing, whatever the two views are.

An image and its caption are two views of one thing; so are a sentence and its translation.
cross_view() takes a View `a` (image or sentence) and a View `b` (sentence) and does not know which
kind it was given. t is the learned temperature:

    contrast   contrastive_loss (ITC): mean over i of
               -1/2 [log softmax_j(<a_i, b_j> / t) + log softmax_j(<a_j, b_i> / t)] at j = i
    match      matching_loss (ITM): cross entropy of "does b belong to a?" on 1 true pair and
               2 hard negatives per item
    mask       masked_lm_loss (MLM): cross entropy of b's masked tokens, predicted from a too

A model that knows nothing gets ln N, 0.6365 and ln V. (0.6365 is the entropy of 1 : 2; a head that
starts at zero says 0.6931 = ln 2 first.) Every loss is a mean over the items of ALL processes. DDP
takes the mean of the processes' gradients; so each process returns W x (its own sum) / (count over
all processes), and the mean of these is the global loss.

Letters: B items per process, W processes, N = W*B, T tokens, M masked tokens, D width, E embedding,
V vocabulary.

    python losses.py        losses of an untrained and of an all-knowing model beside chance
"""
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from kernels.contrastive import contrastive
from kernels.packed import offsets
from model import PRESETS, CCLM, View, at_least_float32, in_autocast_type

# --------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------

def world():
    """(rank, number of processes); (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class AllGather(torch.autograd.Function):
    """(B, E) of every process -> (N, E) on every process. The backward pass sums the gradients that
    all processes have for this process's rows. (The official code, models/xvlm.py:82, keeps only
    its own: a gradient W times too small.)"""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(world()[1] * len(x), *x.shape[1:])
        dist.all_gather_single(out, x.contiguous())
        return out                                                       # (B, ...) -> (N, ...)

    @staticmethod
    def backward(ctx, gradient):
        out = gradient.new_empty(len(gradient) // world()[1], *gradient.shape[1:])
        dist.reduce_scatter_single(out, gradient.contiguous())
        return out                                                       # (N, ...) -> (B, ...)


def all_gather(x):
    return x if world()[1] == 1 else AllGather.apply(x)                  # (B, ...) -> (N, ...)


def gather_vectors(vectors, ids):
    """Vectors (B, E) and ids (B,) of every process, by ONE collective -> (N, E), (N,)."""
    if world()[1] == 1:
        return vectors, ids
    # The bits of an id travel behind its vector, as two float32 numbers or one float64.
    bits = ids[:, None].view(vectors.dtype)                              # (B, 2 or 1)
    rows = all_gather(torch.cat([vectors, bits], 1))                     # (N, E + 2 or 1)
    E = vectors.shape[1]
    all_ids = rows[:, E:].detach().contiguous().view(ids.dtype)          # (N, 1)
    return rows[:, :E], all_ids[:, 0]


def all_reduce(x):
    """x summed over all processes, without gradient."""
    x = x.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(x)
    return x


def global_means(*parts):
    """(own sum, own count) of several losses -> a list of W x own sum / count over all processes;
    0 (with a gradient) where nobody has a row."""
    counts = all_reduce(torch.stack([count.to(own.dtype) for own, count in parts]))
    return [world()[1] * own / count for (own, _), count in zip(parts, counts.clamp(min=1))]


# --------------------------------------------------------------------------------------------------
# 1. Contrast
# --------------------------------------------------------------------------------------------------

def contrastive_loss(a, b, temperature, same="ignore"):
    """Symmetric InfoNCE over the vectors of all processes -> scalar.

    a, b: Views of B items. Items with equal a.ids are the `same` thing. "ignore" (pre-training):
    they are neither positives nor negatives of each other. "positive" (retrieval fine-tuning): they
    are soft labels, each an equal share of 1. Only b's vectors travel: each process works on its B
    rows of the N x N matrix, and the sums of columns are put together."""
    rank, W = world()
    B = len(a.vectors)
    first = rank * B                                                     # our rows: first..first+B
    b_all, all_ids = gather_vectors(b.vectors, a.ids)                    # (N, E), (N,)
    if same == "ignore":
        s = contrastive(a.vectors, b_all, temperature, a.ids, all_ids, first)
        positives = 2 * s.positives.sum()                                # of rows and of columns
    elif same == "positive":
        # No pair is left out of the sums: every item gets an id of its own.
        own = torch.arange(W * B, device=all_ids.device)                 # (N,)
        s = contrastive(a.vectors, b_all, temperature, own[first:first + B], own, first)
        # Labels of both directions, added: an item's label is 1, in equal shares for all partners.
        alike = a.ids[:, None] == all_ids                                # (B, N)
        share = 1 / alike.sum(1).to(b_all.dtype)                         # (B,)
        labels = alike * (share[:, None] + all_gather(share))            # (B, N)
        positives = ((labels @ b_all) * a.vectors).sum() / temperature
    else:
        raise ValueError(f"same={same!r} is unknown: choose 'ignore' or 'positive'")
    columns = sum_of_columns(s.column_lse, first, B)
    return (s.row_lse.sum() + columns - positives) / (2 * B)             # W x sum / 2N


def sum_of_columns(part, first, B):
    """part (N,): the log-sum-exp of every column over this process's rows -> the sum, over this
    process's own columns, of the log-sum-exp over ALL rows."""
    W = world()[1]
    if W == 1:
        return part.sum()
    # 1. The log-sum-exp of all processes' parts, without gradient.
    parts = all_gather(part.detach()).view(W, -1)                        # (W, N)
    whole = parts.logsumexp(0)                                           # (N,)
    # 2. Our rows are part of ALL N columns. So the gradient with respect to `part` is that of the
    #    sum over all columns, not only over our own: d whole_j / d part_j = exp(part_j - whole_j).
    #    A product of part with this constant has this gradient.
    share = (part - whole).exp().detach()                                # (N,)
    seen = part.masked_fill(share == 0, 0)       # a column without rows here: 0, not 0 x -inf
    ours = (share * seen).sum()
    # 3. Straight through: the value of the sum over our columns, the gradient of `ours`.
    return ours + (whole[first:first + B].sum() - ours).detach()


# --------------------------------------------------------------------------------------------------
# 2. Match: hard negatives, then a yes-no question
# --------------------------------------------------------------------------------------------------

UNIFORM_WEIGHT = 1e-5       # any pair can be drawn (official code, models/xvlm.py:459)


@torch.no_grad()
def hard_negatives(a, b, temperature, seed):
    """Hard negatives -> (negative_a (B,), negative_b (B,)) int64: b's item i goes with the wrong a
    negative_a[i], a's item i with the wrong b negative_b[i]. -1: there is none. Drawn among this
    process's items, and the same again for the same seed and rank."""
    x = at_least_float32(a.vectors)                                      # (B, E)
    y = at_least_float32(b.vectors)                                      # (B, E)
    with torch.autocast(x.device.type, enabled=False):
        logits = x @ y.T / temperature                                   # (B, B)
    negative_a = draw(logits.T, a.ids, seed_generator(seed, 0, x.device))
    negative_b = draw(logits, a.ids, seed_generator(seed, 1, x.device))
    return negative_a, negative_b


def draw(logits, ids, generator):
    """For row i of logits (B, B) a column j, with a probability proportional to
    w_ij = softmax_j(logits) + UNIFORM_WEIGHT; w_ij is 0 where ids are equal (i = j too) -> (B,)."""
    weights = logits.softmax(1) + UNIFORM_WEIGHT                         # (B, B)
    # An exponential race (the Gumbel-max trick before the logarithm): with clocks c_ij from
    # Exponential(1), the smallest c_ij / w_ij of a row is at j with probability w_ij / sum w.
    # (torch.multinomial does the same, but fails on a row whose weights are all 0.)
    clock = torch.empty_like(weights).exponential_(generator=generator)
    speed = weights / clock                                              # (B, B)
    speed = speed.masked_fill(ids[:, None] == ids, 0)
    best, chosen = speed.max(1)                                          # (B,), (B,)
    return torch.where(best > 0, chosen, -1)


def seed_generator(seed, side, device):
    """A generator for one draw: seed (which holds the step), this process's rank, and the side."""
    seed = seed * 1_000_003 + 2 * world()[0] + side
    return torch.Generator(device).manual_seed(seed % 2 ** 63)


def matching_loss(head, states, negatives):
    """states (3B, D) of true pairs, pairs with a negative a, and pairs with a negative b -> sum of
    the cross entropies of head's "no, yes", and their number. An item that lacks a negative (-1) is
    left out."""
    has_both = (negatives[0] >= 0) & (negatives[1] >= 0)                 # (B,)
    counts = has_both.repeat(3)                                          # (3B,)
    labels = torch.zeros(len(states), dtype=torch.long, device=states.device)
    labels[:len(states) // 3] = 1                                        # (3B,)
    logits = at_least_float32(head(states))                              # (3B, D) -> (3B, 2)
    losses = F.cross_entropy(logits, labels, reduction="none")           # (3B,)
    return (losses * counts).sum(), counts.sum()


# --------------------------------------------------------------------------------------------------
# 3. Mask
# --------------------------------------------------------------------------------------------------

class MaskedText(NamedTuple):
    """b with some of its tokens masked."""
    states: torch.Tensor                # (T, D) of the masked sentences; their starts are b's
    positions: torch.Tensor             # (M,) sorted: which tokens are masked
    labels: torch.Tensor                # (M,) the true ids


PIECE = 512                 # masked tokens whose logits exist at a time: 0.5 GB at V = 250,002


class VocabularyLoss(torch.autograd.Function):
    """The sum over M rows of cross_entropy(x @ weight.T + bias, labels). Logits of all rows are
    never held: a piece's gradient is computed as soon as its loss is, so nothing is kept of it and
    nothing is computed twice. (F.linear_cross_entropy rounds 16-bit losses row by row.)"""

    @staticmethod
    def forward(ctx, x, weight, bias, labels):
        total = at_least_float32(x.new_zeros(()))
        x_gradient = torch.empty_like(x)                                 # (M, D)
        weight_gradient = torch.zeros_like(weight)                       # (V, D)
        bias_gradient = at_least_float32(torch.zeros_like(bias))         # (V,)
        for first in range(0, len(x), PIECE):
            # 1. The product in x's type; its softmax, and all sums, in float32 or wider.
            rows = slice(first, first + PIECE)
            label = labels[rows, None]                                   # (m, 1)
            logits = F.linear(x[rows], weight, bias)                     # (m, D) -> (m, V)
            log_p = logits.log_softmax(1, dtype=total.dtype)             # (m, V)
            total -= log_p.gather(1, label).sum()
            # 2. d loss / d logits = softmax - (1 at the label), in the memory of log_p.
            gradient = log_p.exp_()
            gradient.scatter_(1, label, gradient.gather(1, label) - 1)
            bias_gradient += gradient.sum(0)
            gradient = gradient.to(x.dtype)
            x_gradient[rows] = gradient @ weight                         # (m, V) -> (m, D)
            weight_gradient.addmm_(gradient.T, x[rows])                  # += (V, m) @ (m, D)
        ctx.save_for_backward(x_gradient, weight_gradient, bias_gradient.to(bias.dtype))
        return total

    @staticmethod
    def backward(ctx, factor):
        # In place: there is one (V, D) gradient. A second backward pass through it is an error.
        return *(gradient.mul_(factor) for gradient in ctx.saved_tensors), None


def masked_lm_loss(head, states, labels):
    """states (M, D) of masked positions, labels (M,) the true ids -> sum of the cross entropies
    over the vocabulary, and their number. Under autocast its products are in 16 bits, its softmax
    and sums are not."""
    x = in_autocast_type(head(states))                                   # (M, D)
    weight = in_autocast_type(head.weight)                               # (V, D)
    bias = in_autocast_type(head.bias)                                   # (V,)
    own_sum = VocabularyLoss.apply(x, weight, bias, labels)
    return own_sum, own_sum.detach().new_full((), len(labels))


# --------------------------------------------------------------------------------------------------
# The one loss
# --------------------------------------------------------------------------------------------------

class Options(NamedTuple):
    """What a run can change in the loss."""
    weights: dict = {"contrast": 1.0, "match": 1.0, "mask": 1.0}         # as published
    same: str = "ignore"                # or "positive", see contrastive_loss
    condition: bool = True              # False, an ablation: masked tokens are predicted without a


def fuse_pairs(model, a, b, masked, negatives, condition=True):
    """True pairs, pairs with a negative a, pairs with a negative b, and the masked sentences go
    through the fusion encoder as ONE batch of 4B query sequences over B views. masked: MaskedText;
    None: the 3B pairs alone (retrieval fine-tuning masks nothing).

    Returns first-token states (3B, D) in that order, and the states of masked tokens (M, D)."""
    B = len(b.starts) - 1
    everyone = torch.arange(B, device=b.states.device)                   # (B,)
    items = everyone[:len(negatives[0])]         # (B,); (0,) where matching is switched off
    negative_a = negatives[0].clamp(min=0)       # -1: fused with item 0, but matching_loss leaves
    negative_b = negatives[1].clamp(min=0)       # the pair out

    # 1. The pairs: which text each query sequence is, which view it reads, and where its first
    #    token is, which the match head wants.
    texts = b
    query_text = torch.cat([items, items, negative_b])                   # (3B,)
    query_view = torch.cat([items, negative_a, items])                   # (3B,)
    query_starts = offsets(b.starts.diff()[query_text]).long()           # (3B+1,)
    positions = query_starts[:-1]                                        # (3B,)

    # 2. The masked sentences are texts B..2B-1. Their rows come after those of the pairs.
    if masked is not None:
        starts = torch.cat([b.starts, b.starts[1:] + b.starts[-1]])      # (2B+1,)
        texts = View(torch.cat([b.states, masked.states]), starts, None, None)     # (2T, D)
        view = everyone if condition else torch.full_like(everyone, -1)  # -1: nothing
        query_text = torch.cat([query_text, everyone + B])               # (4B,)
        query_view = torch.cat([query_view, view])                       # (4B,)
        positions = torch.cat([positions, masked.positions + query_starts[-1]])

    fused = model.fuse(texts, a, query_text, query_view, positions)      # (3B + M, D)
    return fused[:3 * len(items)], fused[3 * len(items):]


def cross_view(model, a, b, masked, seed, negatives=None, options=Options()):
    """The loss of B items seen as `a` and as `b`.

    model      anything with fuse(), itm_head, mlm_head and temperature (CCLM)
    a, b       Views; b is text. a.ids say which items are the same thing; b.ids are not read
    masked     MaskedText; None: nothing is masked, and there is no "mask"
    seed       int, for the draw of hard negatives
    negatives  None: drawn here; or (negative_a (B,), negative_b (B,)), -1 = none
    Returns {"contrast", "match", "mask"} and their weighted sum "loss", scalars with gradients."""
    weights = options.weights
    if not weights["match"]:
        negatives = (a.ids[:0], a.ids[:0])               # no pairs are fused: match is 0 x inputs
    elif negatives is None:
        negatives = hard_negatives(a, b, model.temperature, seed)
    pairs, masked_states = fuse_pairs(model, a, b, masked, negatives, options.condition)
    sums = {"match": matching_loss(model.itm_head, pairs, negatives)}
    if masked is not None:
        sums["mask"] = masked_lm_loss(model.mlm_head, masked_states, masked.labels)
    means = dict(zip(sums, global_means(*sums.values())))
    # Computed last, its backward comes first: the gradients of vectors, for which the encoders
    # wait, do not queue behind those of large parameters on their way to the other processes.
    losses = {"contrast": contrastive_loss(a, b, model.temperature, options.same)} | means
    losses["loss"] = sum(weights[name] * loss for name, loss in losses.items())
    return losses


def translation_lm(model, a, b, joined, masked, options=Options()):
    """An ablation of the paper, for parallel text: the contrastive loss stays, but instead of
    matching and masked LM there is XLM's translation LM (arXiv 1901.07291), which reads a sentence
    and its translation as ONE text. So no sentence is a view of another.

    joined     View of B texts "<s> a </s> b </s>" with tokens masked; masked: their MaskedText
    Returns what cross_view does; "match" is 0."""
    weights = options.weights | {"match": 0.0}
    losses = cross_view(model, a, b, None, 0, options=options._replace(weights=weights))
    everyone = torch.arange(len(b.starts) - 1, device=b.states.device)   # (B,)
    nothing = torch.full_like(everyone, -1)
    states = model.fuse(joined, a, everyone, nothing, masked.positions)  # (M, D)
    losses["mask"], = global_means(masked_lm_loss(model.mlm_head, states, masked.labels))
    losses["loss"] = losses["loss"] + weights["mask"] * losses["mask"]
    return losses


# --------------------------------------------------------------------------------------------------
# Sanity table
# --------------------------------------------------------------------------------------------------

def sanity_table(B=64, length=8, seed=0):
    """Rows (loss, untrained, knows nothing, knows all) for the demo model on random images and
    sentences."""
    torch.manual_seed(seed)
    config = PRESETS["demo"]
    model = CCLM(config).eval()
    ids = torch.arange(B)
    starts = torch.arange(0, B * length + 1, length, dtype=torch.int32)
    token_ids = torch.randint(4, config.vocabulary - 1, (B * length,))
    pixels = torch.randn(B, 3, config.image_size, config.image_size)
    image = model.encode_image(pixels, ids)
    text = model.encode_text(token_ids, starts, ids)
    positions = starts[:-1].long() + 2
    masked = MaskedText(text.states, positions, token_ids[positions])
    untrained = cross_view(model, image, text, masked, seed)
    knows_nothing = {"contrast": math.log(B), "match": 0.6365, "mask": math.log(config.vocabulary)}

    # A model that knows all: both views have one vector, the matching head is sure of every pair,
    # and the masked LM's decoder says 30 for the right one of B tokens and 0 for the others.
    vectors = F.normalize(torch.randn(B, config.embedding), dim=-1)
    view = View(None, None, vectors, ids)
    true = torch.tensor([1] * B + [0] * 2 * B)
    decoder = torch.nn.Identity()
    decoder.weight = torch.nn.Parameter(30 * torch.eye(B))
    decoder.bias = torch.nn.Parameter(torch.zeros(B))
    pairs = 20 * F.one_hot(true, 2).float()                              # (3B, 2)
    match, mask = global_means(matching_loss(torch.nn.Identity(), pairs, (ids, ids)),
                               masked_lm_loss(decoder, torch.eye(B), ids))
    contrast = contrastive_loss(view, view, torch.tensor(0.01))
    knows_all = {"contrast": contrast, "match": match, "mask": mask}
    return [(name, untrained[name].item(), chance, knows_all[name].item())
            for name, chance in knows_nothing.items()]


if __name__ == "__main__":
    print(f"{'loss':10}{'untrained':>12}{'knows nothing':>16}{'knows all':>12}")
    for name, got, chance, perfect in sanity_table():
        print(f"{name:10}{got:12.4f}{chance:16.4f}{perfect:12.4f}")
