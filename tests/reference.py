"""A plain padded CCLM, written from the paper with the parameters of our packed one: (B, L, D)
tensors, key masks, one fusion pass per kind of pair, every row through every layer. Slow and
obvious; the packed model must give the same numbers.

Letters: B items, L longest sentence, P patches + 1, S tokens of a view (L or P), D width, E
embedding, H heads, M masked tokens, V vocabulary.
"""
import math

import torch
import torch.nn.functional as F


def unpack(x, starts):
    """(T, ...) -> padded (B, L, ...) and mask (B, L): True where a token is real."""
    rows = [x[start:end] for start, end in zip(starts[:-1].tolist(), starts[1:].tolist())]
    lengths = torch.tensor([len(row) for row in rows])                   # (B,)
    mask = torch.arange(max(lengths)) < lengths[:, None]                 # (B, L)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------

def attend(m, x, y, mask, bias=None):
    """m: model.Attention; x (B, L, D) attends to y (B, S, D) where mask (B, S) -> (B, L, D)."""
    def split(z):
        return z.unflatten(-1, (m.heads, -1)).transpose(1, 2)            # (B, L, D) -> (B, H, L, d)

    q = split(m.q(x))
    k = split(m.k(y))
    v = split(m.v(y))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])              # (B, H, L, S)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)                         # nothing to attend to: 0
    return m.out((weights @ v).transpose(1, 2).flatten(2))


def mlp(m, x):
    h = m.up(x)
    h = h * torch.sigmoid(1.702 * h) if m.quick else F.gelu(h)
    return m.down(h)


def text_layer(m, x, mask, view=None, view_mask=None):
    """Post-norm: self-attention, cross-attention to a view (in the fusion encoder), MLP."""
    x = m.norm1(x + attend(m.attention, x, x, mask))
    if view is not None:
        x = m.cross_norm(x + attend(m.cross, x, view, view_mask))
    return m.norm2(x + mlp(m.mlp, x))


def encode_text(model, token_ids, mask):
    """token_ids (B, L) int64 -> states (B, L, D)."""
    t = model.text
    positions = torch.arange(token_ids.shape[1]) + t.offset
    x = t.norm(t.token_embedding(token_ids) + t.positions(positions) + t.token_type)
    for layer in t.layers:
        x = text_layer(layer, x, mask)
    return x


def encode_image(model, images):
    """(B, 3, s, s) -> states (B, P, D)."""
    v = model.vision
    B = len(images)
    x = v.patches(images).flatten(2).transpose(1, 2)                     # (B, P-1, D)
    x = torch.cat([v.class_token.expand(B, 1, -1), x], 1)                # (B, P, D)
    if v.positions is not None:
        x = x + v.positions
    x = v.pre_norm(x)
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    for layer in v.layers:
        m = layer.attention
        bias = None
        if hasattr(m, "relative_position_bias"):
            bias = m.relative_position_bias[m.relative_index].permute(2, 0, 1)     # (H, P, P)
        y = layer.norm1(x)
        x = x + layer.layer_scale1 * attend(m, y, y, mask, bias)
        x = x + layer.layer_scale2 * mlp(layer.mlp, layer.norm2(x))
    x = v.norm(x)
    if model.config.vision == "beit2":                                   # row 0: mean of patches
        x = torch.cat([x[:, 1:].mean(1, keepdim=True), x[:, 1:]], 1)
    return x


def vectors(model, project, states, mask):
    """states (B, S, D) -> unit vectors (B, E)."""
    pooled = states[:, 0]
    if model.config.pool == "mean":
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return F.normalize(project(pooled), dim=-1)


def fuse(model, x, mask, view, view_mask):
    """x (B, L, D) reads view (B, S, D) -> (B, L, D)."""
    for layer in model.fusion.layers:
        x = text_layer(layer, x, mask, view, view_mask)
    return x


# --------------------------------------------------------------------------------------------------
# The losses
# --------------------------------------------------------------------------------------------------

def contrastive_loss(model, a_vectors, b_vectors, ids):
    B = len(ids)
    same = (ids[:, None] == ids) & ~torch.eye(B, dtype=torch.bool)       # neither right nor wrong
    logits = a_vectors @ b_vectors.T / model.temperature                 # (B, B)
    logits = logits.masked_fill(same, -torch.inf)
    labels = torch.arange(B)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def matching_loss(model, a, a_mask, b, b_mask, negatives):
    """negatives: two lists (B,): the a that is wrong for b_i, and the b that is wrong for a_i."""
    firsts = []
    labels = []
    for i, (negative_a, negative_b) in enumerate(zip(*(x.tolist() for x in negatives))):
        if min(negative_a, negative_b) < 0:
            continue                                                     # there is none: left out
        for j, k, label in ((i, i, 1), (negative_a, i, 0), (i, negative_b, 0)):    # a_j with b_k
            fused = fuse(model, b[k:k + 1], b_mask[k:k + 1], a[j:j + 1], a_mask[j:j + 1])
            firsts.append(fused[:, 0])                                   # (1, D)
            labels.append(label)
    if not labels:
        return torch.tensor(0.0)
    return F.cross_entropy(model.itm_head(torch.cat(firsts)), torch.tensor(labels))


def masked_lm_loss(model, a, a_mask, masked, b_mask, is_masked, labels):
    """masked (B, L, D): states of b with some tokens masked, those where is_masked (B, L)."""
    states = fuse(model, masked, b_mask, a, a_mask)[is_masked]           # (B, L, D) -> (M, D)
    head = model.mlm_head
    logits = F.linear(head(states), head.weight, head.bias)              # (M, V)
    return F.cross_entropy(logits, labels)


def cross_view(model, a, b, masked, ids, negatives):
    """The three losses of B items. a, b: (states, mask, vectors); masked: (states, is_masked,
    labels)."""
    a_states, a_mask, a_vectors = a
    b_states, b_mask, b_vectors = b
    masked_states, is_masked, labels = masked
    return {
        "contrast": contrastive_loss(model, a_vectors, b_vectors, ids),
        "match": matching_loss(model, a_states, a_mask, b_states, b_mask, negatives),
        "mask": masked_lm_loss(model, a_states, a_mask, masked_states, b_mask, is_masked, labels),
    }
