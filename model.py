"""CCLM: two encoders, one fusion encoder, three heads.

    image  -> ViT ---------> View a --+                             +-> itm_head  does b belong to a?        (R, 2)
                                      +-> Fusion (b's words look    |
    sentence -> TextEncoder -> View --+   at a by cross-attention) -+-> mlm_head  b's masked words           (M, V)
                               a or b
    every View also carries a unit vector (vision_proj or text_proj): contrast needs nothing else.

The fusion encoder does not know whether a is an image or a sentence. This sharing is CCLM, and is why the vision width
must equal the text width. Nothing here pads: a batch is one matrix (T, D) and `starts` (B+1,), sequence i being rows
starts[i]..starts[i+1]; only kernels/attention.py knows about sequences, so there is no attention mask and no mask bug.

Letters: B sequences, T tokens in the packed batch, P patches + 1, R rows asked of the last fusion layer, M masked
tokens, D width, E embedding, H heads, V vocabulary.

    python model.py         parameters of every preset
"""
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention
from kernels.packed import GatherRows, offsets, gather_sequences

# ------------------------------------------------------------------------------------------------------------------
# What is configured
# ------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """One model. Every field is also a flag of train.py; PRESETS holds the combinations we vouch for, RECIPES how each
    of them is trained."""
    width: int = 128                    # D, of all three parts
    embedding: int = 256                # E, the contrastive vectors
    dropout: float = 0.1                # on embeddings and sublayer outputs; none on attention probabilities
    pool: str = "first"                 # what becomes the vector: "first" token (as published) or "mean" of all tokens
    # vision
    vision: str = "vit"                 # "vit" (ViT, DeiT), "clip" or "beit2"
    image_size: int = 64                # pixels, square
    patch_size: int = 16
    stem: bool = False                  # a few small convolutions instead of one patch-wide one (arXiv 2106.14881)
    vision_layers: int = 4
    vision_heads: int = 2
    vision_mlp: int = 512
    vision_eps: float = 1e-6
    # text
    vocabulary: int = 8002              # V; the tokenizer decides
    positions: int = 130                # rows of the position table, the first `offset` of which belong to padding
    offset: int = 2                     # XLM-R counts positions from 2; CCLM-3M/4M counted from 0 (F1.2)
    text_layers: int = 2
    text_heads: int = 2
    text_mlp: int = 512
    text_eps: float = 1e-5
    # fusion
    fusion_layers: int = 1
    fusion_heads: int = 2
    fusion_mlp: int = 512
    fusion_eps: float = 1e-5
    tied: bool = True                   # masked LM's decoder: word embedding (CCLM-3M/4M) or own matrix (CCLM-X2VLM)
    init_std: float = 0.02
    fusion_std: float = 0.02            # fusion encoder and itm_head
    embedding_std: float = 0.02         # words, positions; small values let rare words move early (README, what helped)


PRESETS = {
    # two CPU cores, minutes; chosen on the val split, see the README's list of what helped
    "demo": Config(pool="mean", stem=True, dropout=0.0, vision_layers=2, text_layers=1, embedding_std=0.002,
                   fusion_std=128 ** -0.5),        # 1 / sqrt(width)
    # one GPU, from random weights
    "small": Config(width=384, image_size=224, vision_layers=12, vision_heads=6, vision_mlp=1536,
                    text_layers=6, text_heads=6, text_mlp=1536, fusion_layers=3, fusion_heads=6, fusion_mlp=1536,
                    vocabulary=250002, positions=514),
    # CCLM-X2VLM-base and -large (F1.5): BEiT-2, XLM-R, six fusion layers
    "base": Config(width=768, vision="beit2", image_size=224, vision_layers=12, vision_heads=12, vision_mlp=3072,
                   text_layers=12, text_heads=12, text_mlp=3072, fusion_layers=6, fusion_heads=12,
                   fusion_mlp=3072, fusion_eps=1e-12, vocabulary=250002, positions=514, tied=False),
    "large": Config(width=1024, vision="beit2", image_size=224, vision_layers=24, vision_heads=16, vision_mlp=4096,
                    text_layers=24, text_heads=16, text_mlp=4096, fusion_layers=6, fusion_heads=16,
                    fusion_mlp=4096, fusion_eps=1e-12, vocabulary=250002, positions=514, tied=False),
}


# How a preset is trained: {flag of train.py: what it means}. RECIPES holds the values.
RECIPE = {
    "steps": "length of the schedule",
    "warmup": "steps of linear warm-up, from which the rate falls linearly to 0",
    "batch": "image-caption pairs per step, all processes together",
    "text_batch": "sentence pairs per step",
    "lr": "peak learning rate",
    "vision_lr": "rate of the image encoder, times --lr",
    "text_lr": "rate of the text encoder, times --lr",
    "fusion_lr": "rate of fusion encoder and match head, times --lr",
    "new_lr": "rate of what the files behind --init did not hold, times --lr",
    "temperature_lr": "peak rate of the temperature",
    "mask_probability": "share of a sentence's tokens that are masked",
    "caption_masked": "most tokens of a caption that are masked",
    "sentence_masked": "most tokens of a sentence of parallel text that are masked",
    "caption_tokens": "tokens at which a caption is cut, with <s> and </s>",
    "sentence_tokens": "tokens at which a sentence of parallel text is cut",
    "save_every": "steps between checkpoints; the last step is always saved",
    "validate_every": "steps between validations; 0: none",
    "workers": "processes that prepare batches for each trainer; 0: none, -1: by the cores",
}
RECIPES = {
    # Chosen on the demo's val splits (docs/experiments.md).
    "demo": dict(
        steps=1500, warmup=100, batch=128, text_batch=128,
        lr=1e-3, vision_lr=1.0, text_lr=1.0, fusion_lr=2.0, new_lr=1.0, temperature_lr=3e-4,
        mask_probability=0.15, caption_masked=20, sentence_masked=20,
        caption_tokens=64, sentence_tokens=64, save_every=500, validate_every=500, workers=1),
    # NOT published and never trained: a guess. The contrastive loss wants a large batch; a model of
    # this size from random weights stands a few 1e-4 after a long warm-up; masking is CCLM-3M's.
    "small": dict(
        steps=100_000, warmup=5000, batch=1024, text_batch=1024,
        lr=5e-4, vision_lr=1.0, text_lr=1.0, fusion_lr=1.0, new_lr=1.0, temperature_lr=5e-4,
        mask_probability=0.4, caption_masked=12, sentence_masked=20,
        caption_tokens=40, sentence_tokens=64, save_every=5000, validate_every=5000, workers=-1),
    # CCLM-X2VLM-base and -large as published (docs/paper.md), but for save_every, which was 50,000.
    "base": dict(
        steps=406_614, warmup=1000, batch=480, text_batch=480,
        lr=4e-5, vision_lr=0.5, text_lr=2.0, fusion_lr=1.0, new_lr=2.0, temperature_lr=4e-5,
        mask_probability=0.4, caption_masked=10, sentence_masked=16,
        caption_tokens=30, sentence_tokens=64, save_every=5000, validate_every=5000, workers=-1),
    "large": dict(
        steps=406_614, warmup=1000, batch=480, text_batch=480,
        lr=3e-5, vision_lr=1 / 3, text_lr=2.0, fusion_lr=1.0, new_lr=2.0, temperature_lr=3e-5,
        mask_probability=0.4, caption_masked=10, sentence_masked=16,
        caption_tokens=30, sentence_tokens=64, save_every=5000, validate_every=5000, workers=-1),
}
RECIPE_SOURCES = {"demo": "chosen on its val splits", "small": "not published: a guess, never trained",
                  "base": "CCLM-X2VLM-base as published", "large": "CCLM-X2VLM-large as published"}


def at_least_float32(x):
    """x in float32 at least: lengths and logits are not left in 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class View(NamedTuple):
    """One encoded batch of images or of sentences: all that the losses ever see of it."""
    states: torch.Tensor                # (T, D)
    starts: torch.Tensor                # (B+1,) int32
    vectors: torch.Tensor               # (B, E), unit length
    ids: torch.Tensor                   # (B,) int64: equal ids mean the same thing


# ------------------------------------------------------------------------------------------------------------------
# Sublayers
# ------------------------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention of x over y (y = x: self-attention). `grid` (patches a side) adds BEiT-2's learned bias."""

    def __init__(self, width, heads, k_bias=True, grid=None):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads: choose {width // heads * heads} or "
                             f"{(width // heads + 1) * heads}")
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width, bias=k_bias), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        if grid is not None:
            self.relative_position_bias = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))
            self.register_buffer("relative_index", relative_index(grid), persistent=False)

    def forward(self, x, y, x_starts, y_starts, memory=None):
        q = self.q(x).unflatten(-1, (self.heads, -1))                       # (T, D) -> (T, H, D/H)
        k = self.k(y).unflatten(-1, (self.heads, -1))
        v = self.v(y).unflatten(-1, (self.heads, -1))
        bias = None
        if hasattr(self, "relative_position_bias"):
            bias = self.relative_position_bias[self.relative_index].permute(2, 0, 1)        # (P, P, H) -> (H, P, P)
        return self.out(attention(q, k, v, x_starts, y_starts, memory, bias).flatten(1))


def relative_index(grid):
    """Row of BEiT's relative table for every pair of tokens, (P, P) int64: the class token, then grid x grid patches
    row by row. The last three rows stand for class -> patch, patch -> class, class -> class (F1.5)."""
    y, x = torch.arange(grid ** 2) // grid, torch.arange(grid ** 2) % grid
    side, patches = 2 * grid - 1, (2 * grid - 1) ** 2
    index = torch.empty(grid ** 2 + 1, grid ** 2 + 1, dtype=torch.long)
    index[1:, 1:] = (y[:, None] - y + grid - 1) * side + x[:, None] - x + grid - 1
    index[0], index[:, 0], index[0, 0] = patches, patches + 1, patches + 2
    return index


class MLP(nn.Module):
    def __init__(self, width, mlp_width, quick=False):
        super().__init__()
        self.quick = quick                                                   # CLIP's cheaper GELU
        self.up, self.down = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)

    def forward(self, x):
        x = self.up(x)                                                       # (T, D) -> (T, mlp_width)
        return self.down(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


def run(layer, *inputs):
    """layer(*inputs). layer.checkpointing (train.py): its activations are recomputed in the backward pass, not kept."""
    if getattr(layer, "checkpointing", False) and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


# ------------------------------------------------------------------------------------------------------------------
# Vision: pre-norm
# ------------------------------------------------------------------------------------------------------------------

class VisionLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        beit = c.vision == "beit2"
        self.norm1, self.norm2 = nn.LayerNorm(c.width, c.vision_eps), nn.LayerNorm(c.width, c.vision_eps)
        self.attention = Attention(c.width, c.vision_heads, k_bias=not beit,
                                   grid=c.image_size // c.patch_size if beit else None)
        self.mlp = MLP(c.width, c.vision_mlp, quick=c.vision == "clip")
        self.dropout = nn.Dropout(0.0 if beit else c.dropout)
        self.layer_scale1 = nn.Parameter(torch.full((c.width,), 0.1)) if beit else 1.0
        self.layer_scale2 = nn.Parameter(torch.full((c.width,), 0.1)) if beit else 1.0

    def forward(self, x, starts):
        y = self.norm1(x)
        x = x + self.layer_scale1 * self.dropout(self.attention(y, y, starts, starts))
        return x + self.layer_scale2 * self.dropout(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """(B, 3, pixels, pixels) -> states (B * P, D). Row 0 of each image stands for the whole image."""

    def __init__(self, c):
        super().__init__()
        if c.vision not in ("vit", "clip", "beit2"):
            raise ValueError(f"vision {c.vision!r} is unknown: choose vit, clip or beit2")
        if c.image_size % c.patch_size:
            raise ValueError(f"image size {c.image_size} is not a multiple of patch size {c.patch_size}")
        self.config, patches = c, (c.image_size // c.patch_size) ** 2
        self.patches = conv_stem(c.width, c.patch_size) if c.stem else nn.Conv2d(
            3, c.width, c.patch_size, c.patch_size, bias=c.vision != "clip")
        self.class_token = nn.Parameter(torch.zeros(c.width))
        self.positions = None if c.vision == "beit2" else nn.Parameter(torch.zeros(patches + 1, c.width))
        self.pre_norm = nn.LayerNorm(c.width, c.vision_eps) if c.vision == "clip" else nn.Identity()
        self.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.vision_layers))
        self.norm = nn.LayerNorm(c.width, c.vision_eps)

    def forward(self, images):
        B, D = len(images), self.config.width
        x = self.patches(images).flatten(2).transpose(1, 2)                  # (B, 3, s, s) -> (B, P-1, D)
        x = torch.cat([self.class_token.to(x.dtype).expand(B, 1, D), x], 1)  # (B, P, D)
        if self.positions is not None:
            x = x + self.positions
        P = x.shape[1]
        starts = torch.arange(0, B * P + 1, P, dtype=torch.int32, device=images.device)
        x = self.pre_norm(x.reshape(-1, D))                                  # (B, P, D) -> (B * P, D)
        for layer in self.layers:
            x = run(layer, x, starts)
        x = self.norm(x)
        if self.config.vision == "beit2":                                    # row 0 = mean of normalised patches (F1.5)
            x = x.view(B, P, D)
            x = torch.cat([x[:, 1:].mean(1, keepdim=True), x[:, 1:]], 1).view(-1, D)
        return x


def conv_stem(width, patch):
    """A 4 x 4 patch convolution, then 3 x 3 stride-2 ones up to `patch`: patches overlap, edges are learned early."""
    if patch not in (8, 16, 32) or width % 16:
        raise ValueError(f"a stem needs a patch size of 8, 16 or 32, not {patch}, and a width of n * 16, not {width}")
    layers = [nn.Conv2d(3, width // 2, 4, 4), nn.GroupNorm(8, width // 2), nn.GELU()]
    for i in range((patch // 8).bit_length()):
        layers += [nn.Conv2d(width if i else width // 2, width, 3, 2, 1), nn.GroupNorm(8, width), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1))


# ------------------------------------------------------------------------------------------------------------------
# Text and fusion: post-norm, one layer class for both
# ------------------------------------------------------------------------------------------------------------------

class TextLayer(nn.Module):
    """Self-attention, then (in the fusion encoder) cross-attention, then the MLP; a LayerNorm after each."""

    def __init__(self, width, heads, mlp_width, eps, dropout, cross=False):
        super().__init__()
        self.attention, self.norm1 = Attention(width, heads), nn.LayerNorm(width, eps)
        if cross:
            self.cross, self.cross_norm = Attention(width, heads), nn.LayerNorm(width, eps)
        self.mlp, self.norm2 = MLP(width, mlp_width), nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, starts, y=None, y_starts=None, sources=None, context=None, context_starts=None, memory=None):
        """x (T, D): the queries. They attend to y (x itself when None), query sequence i to sequence sources[i] of it,
        and then to sequence memory[i] of the context (None: i)."""
        y, y_starts = (x, starts) if y is None else (y, y_starts)
        x = self.norm1(x + self.dropout(self.attention(x, y, starts, y_starts, sources)))
        if context is not None:
            x = self.cross_norm(x + self.dropout(self.cross(x, context, starts, context_starts, memory)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class TextEncoder(nn.Module):
    """XLM-R: token_ids (T,) int64 and starts -> states (T, D)."""

    def __init__(self, c):
        super().__init__()
        self.offset, self.longest = c.offset, c.positions - c.offset
        self.token_embedding = nn.Embedding(c.vocabulary, c.width)
        self.positions = nn.Embedding(c.positions, c.width)
        self.token_type = nn.Parameter(torch.zeros(c.width))                       # XLM-R's one token type, on every word
        self.norm, self.dropout = nn.LayerNorm(c.width, c.text_eps), nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(TextLayer(c.width, c.text_heads, c.text_mlp, c.text_eps, c.dropout)
                                    for _ in range(c.text_layers))

    def forward(self, token_ids, starts):
        lengths = starts.diff()
        place = torch.arange(len(token_ids), device=token_ids.device) - torch.repeat_interleave(
            starts[:-1], lengths, output_size=len(token_ids))                    # (T,): 0, 1, 2 ... in every sentence
        x = self.token_embedding(token_ids) + self.positions(place + self.offset) + self.token_type
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = run(layer, x, starts)
        return x


class Fusion(nn.Module):
    """b's words look at a: query sequence i is a copy of text sources[i] and looks at sequence memory[i] of the context
    (None: i; memory -1: at nothing). Four copies of a text differ only in what they look at, so the first layer
    projects the text's keys and values once, and every layer those of a context sequence once. The last layer computes
    only `rows` (R,), sorted and unique, of the query sequences: the first token of pairs to match, the masked words to
    restore. Nobody reads the others, so they cost nothing. The numbers are those of the padded loop."""

    def __init__(self, c):
        super().__init__()
        self.layers = nn.ModuleList(TextLayer(c.width, c.fusion_heads, c.fusion_mlp, c.fusion_eps, c.dropout,
                                              cross=True) for _ in range(c.fusion_layers))

    def forward(self, x, starts, context, context_starts, memory=None, rows=None, sources=None):
        """x (T, D) and starts: texts. -> states of all query sequences (T', D), or of `rows` (R, D)."""
        where, full = (torch.arange(len(x), device=x.device), starts) if sources is None else gather_sequences(starts, sources)
        y, y_starts = x, starts
        for i, layer in enumerate(self.layers):
            pick, q_starts = where, full                                     # rows of y that ask
            if rows is not None and i == len(self.layers) - 1:
                pick, q_starts = where[rows], torch.searchsorted(rows, full.long()).int()
            x = run(layer, y.index_select(0, pick), q_starts, y, y_starts, sources, context, context_starts, memory)
            where, y, y_starts, sources = torch.arange(len(x), device=x.device), x, full, None
        return x


class WordHead(nn.Module):
    """Masked LM's head up to the decoder's input; weight and bias are the decoder's. tied: weight is the embedding."""

    def __init__(self, c, embedding):
        super().__init__()
        self.dense, self.norm = nn.Linear(c.width, c.width), nn.LayerNorm(c.width, c.text_eps)
        self.weight = embedding.weight if c.tied else nn.Parameter(torch.empty(c.vocabulary, c.width))
        self.bias = nn.Parameter(torch.zeros(c.vocabulary))

    def forward(self, x):
        return self.norm(F.gelu(self.dense(x)))                              # (M, D) -> (M, D)


# ------------------------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------------------------

class CCLM(nn.Module):
    """encode_image, encode_text, fuse: three verbs, and parameters the losses need (temperature, itm_head, mlm_head).
    `chunk` (train.py --chunk) is a gradient cache: the verbs work on that many sequences at a time and recompute each
    chunk in the backward pass, so a small GPU gets the exact gradients of all three losses over a big batch."""
    chunk = None

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.vision, self.text, self.fusion = ViT(c), TextEncoder(c), Fusion(c)
        self.vision_proj, self.text_proj = nn.Linear(c.width, c.embedding), nn.Linear(c.width, c.embedding)
        self.itm_head = nn.Sequential(nn.Linear(c.width, 2 * c.width), nn.LayerNorm(2 * c.width), nn.GELU(),
                                      nn.Linear(2 * c.width, 2))
        self.mlm_head = WordHead(c, self.text.token_embedding)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        init_weights(self)

    def encode_image(self, images, ids):
        """images (B, 3, pixels, pixels) float, normalised; ids (B,) -> View."""
        states = self.in_chunks(self.vision, len(images), lambda i, j: (images[i:j],))        # (B * P, D)
        starts = torch.arange(0, len(states) + 1, len(states) // len(images), dtype=torch.int32, device=images.device)
        return View(states, starts, self.vector(self.vision_proj, states, starts), ids)

    def encode_text(self, token_ids, starts, ids):
        """token_ids (T,) int64, starts (B+1,) int32, ids (B,) -> View."""
        states = self.in_chunks(self.text, len(starts) - 1, lambda i, j: (
            token_ids[starts[i]:starts[j]], starts[i:j + 1] - starts[i]))        # (T, D)
        return View(states, starts, self.vector(self.text_proj, states, starts), ids)

    def vector(self, project, states, starts):
        if self.config.pool == "mean":
            pooled = torch.segment_reduce(states, "mean", lengths=starts.diff().long())       # (T, D) -> (B, D)
        else:
            pooled = GatherRows.apply(states, starts[:-1].long())
        return F.normalize(at_least_float32(project(pooled)), dim=-1)                    # (B, E)

    def fuse(self, x, starts, context, context_starts, memory=None, rows=None, sources=None, fusion=None):
        """Text states x (T, D) that look at a view's states (S, D) -> (T', D), or (R, D): see Fusion.forward."""
        fusion = fusion or self.fusion
        if not self.chunk:
            return fusion(x, starts, context, context_starts, memory, rows, sources)
        asked = offsets(starts.diff()[sources]).long()                       # (Q+1,) starts of the query sequences
        cut = torch.searchsorted(rows, asked)                                # (Q+1,) and of their rows
        return self.in_chunks(fusion, len(sources), lambda i, j: (x, starts, context, context_starts, memory[i:j],
                                                                  rows[cut[i]:cut[j]] - asked[i], sources[i:j]))

    def in_chunks(self, function, count, part):
        """function(*part(0, count)), or the same `chunk` sequences at a time."""
        if not self.chunk:
            return function(*part(0, count))
        return torch.cat([checkpoint(function, *part(i, min(i + self.chunk, count)), use_reentrant=False)
                          for i in range(0, count, self.chunk)])


def init_weights(model):
    """All random numbers of a new model, in one place (F1.2; the zero is ours, for training from scratch).

        Linear, class token, positions of patches            normal(0, init_std)
        Linear of the fusion encoder and itm_head            normal(0, fusion_std)
        words, positions of words                            normal(0, embedding_std)
        Conv2d                                               normal(0, 1 / sqrt(inputs))
        biases, relative position bias, token type           0
        LayerNorm                                            1, 0
        layer scale (BEiT-2)                                 0.1
        last layer of itm_head                               0: a new model says "no idea" to every pair
        temperature                                          0.07"""
    std = model.config.init_std
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight,
                            std=std if isinstance(module, nn.Linear) else module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in (*model.fusion.modules(), *model.itm_head):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=model.config.fusion_std)
    for table in (model.text.token_embedding, model.text.positions):
        nn.init.normal_(table.weight, std=model.config.embedding_std)
    if not model.config.tied:
        nn.init.normal_(model.mlm_head.weight, std=std)
    nn.init.normal_(model.vision.class_token, std=std)
    if model.vision.positions is not None:
        nn.init.normal_(model.vision.positions, std=std)
    nn.init.zeros_(model.itm_head[-1].weight)


def parameter_groups(model, rate, weight_decay=0.01):
    """AdamW's groups: no decay for vectors and scalars (biases, norms, layer scale, temperature). rate: a function of a
    parameter's name -> its peak learning rate."""
    groups = {}
    for name, p in model.named_parameters():
        decay = weight_decay if p.ndim >= 2 else 0.0
        groups.setdefault((rate(name), decay), []).append(p)
    return [{"params": params, "lr": peak, "peak_lr": peak, "weight_decay": decay}
            for (peak, decay), params in groups.items()]


def build(preset="demo", **changes):
    """The Config of a preset with some fields changed; the vision width is the text width by construction."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown: choose {', '.join(PRESETS)}")
    return replace(PRESETS[preset], **changes)


if __name__ == "__main__":
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = CCLM(config)
        print(f"{name:6} {sum(p.numel() for p in model.parameters()):13,} parameters")
