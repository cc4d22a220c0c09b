"""A plain padded CCLM, written from the paper with the parameters of our packed one: (B, L, D) tensors, key masks, one
fusion pass per kind of pair, every row through every layer. Slow and obvious; the packed model must give the same
numbers."""
import math

import torch
import torch.nn.functional as F


def unpack(x, starts):
    """(T, ...) -> padded (B, L, ...) and mask (B, L)."""
    rows = [x[s:e] for s, e in zip(starts[:-1].tolist(), starts[1:].tolist())]
    mask = torch.arange(max(len(r) for r in rows))[None] < torch.tensor([len(r) for r in rows])[:, None]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


def attend(m, x, y, mask, bias=None):
    """m: model.Attention; x (B, L, D) looks at y (B, S, D) where mask (B, S)."""
    split = lambda z: z.unflatten(-1, (m.heads, -1)).transpose(1, 2)
    q, k, v = split(m.q(x)), split(m.k(y)), split(m.v(y))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    scores = scores + (0 if bias is None else bias)
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)       # nothing to see: 0
    return m.out((weights @ v).transpose(1, 2).flatten(2))


def mlp(m, x):
    h = m.up(x)
    return m.down(h * torch.sigmoid(1.702 * h) if m.quick else F.gelu(h))


def text_layer(m, x, mask, context=None, context_mask=None):
    x = m.norm1(x + attend(m.attention, x, x, mask))
    if context is not None:
        x = m.cross_norm(x + attend(m.cross, x, context, context_mask))
    return m.norm2(x + mlp(m.mlp, x))


def encode_text(model, words, mask):
    """words (B, L) int64 -> states (B, L, D)."""
    t = model.text
    x = t.norm(t.token_embedding(words) + t.positions(torch.arange(words.shape[1]) + t.offset) + t.token_type)
    for layer in t.layers:
        x = text_layer(layer, x, mask)
    return x


def encode_image(model, images):
    """(B, 3, s, s) -> states (B, P, D)."""
    v, c, B = model.vision, model.config, len(images)
    x = v.patches(images).flatten(2).transpose(1, 2)
    x = torch.cat([v.class_token.expand(B, 1, -1), x], 1)
    x = v.pre_norm(x + (0 if v.positions is None else v.positions))
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    for layer in v.layers:
        a, bias, y = layer.attention, None, layer.norm1(x)
        if hasattr(a, "relative_position_bias"):
            bias = a.relative_position_bias[a.relative_index].permute(2, 0, 1)
        x = x + layer.layer_scale1 * attend(a, y, y, mask, bias)
        x = x + layer.layer_scale2 * mlp(layer.mlp, layer.norm2(x))
    x = v.norm(x)
    return torch.cat([x[:, 1:].mean(1, keepdim=True), x[:, 1:]], 1) if c.vision == "beit2" else x


def vectors(model, project, states, mask):
    if model.config.pool == "mean":
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    else:
        pooled = states[:, 0]
    return F.normalize(project(pooled), dim=-1)


def fuse(model, x, mask, context, context_mask):
    for layer in model.fusion.layers:
        x = text_layer(layer, x, mask, context, context_mask)
    return x


def cross_view(model, a, a_mask, a_vectors, b, b_mask, b_vectors, masked, hidden, truth, ids, wrong):
    """Losses of a process. a (B, S, D), b, masked (B, L, D); hidden (B, L) bool; truth (M,); wrong: two (B,) lists."""
    logits = a_vectors @ b_vectors.T / model.temperature
    drop = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool)
    logits, target = logits.masked_fill(drop, -torch.inf), torch.arange(len(ids))
    contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    firsts, labels = [], []
    for i in range(len(ids)):
        for label, j, k in ((1, i, i), (0, int(wrong[0][i]), i), (0, i, int(wrong[1][i]))):         # a_j with b_k
            if min(int(wrong[0][i]), int(wrong[1][i])) >= 0:
                firsts.append(fuse(model, b[k:k + 1], b_mask[k:k + 1], a[j:j + 1], a_mask[j:j + 1])[:, 0])
                labels.append(label)
    match = F.cross_entropy(model.itm_head(torch.cat(firsts)), torch.tensor(labels)) if labels else torch.tensor(0.0)
    blanks = fuse(model, masked, b_mask, a, a_mask)[hidden]
    mask = F.cross_entropy(F.linear(model.mlm_head(blanks), model.mlm_head.weight, model.mlm_head.bias), truth)
    return {"contrast": contrast, "match": match, "mask": mask}
