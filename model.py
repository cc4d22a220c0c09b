"""CCLM: two encoders, one fusion encoder, three heads.

    image ----> ViT ---------> View a --+               +-> itm_head  does b belong to a?    (R, 2)
                                        +--> Fusion ----+
    sentence -> TextEncoder -> View b --+  b's tokens   +-> mlm_head  b's masked tokens      (M, V)
                                           attend to a's

    every View also carries a unit vector (vision_proj or text_proj) for the contrastive loss

View a can also be a sentence, the translation of b: the fusion encoder does not know which. This
sharing is CCLM, and is why the vision width must equal the text width. Nothing here pads: a batch
is one matrix (T, D) and `starts` (B+1,): sequence i is rows starts[i] to starts[i+1] - 1. Only in
kernels/attention.py do tokens see each other, so this file has no attention mask and no mask bug.

Letters: B sequences, T tokens in the packed batch, P patches + 1, Q query sequences of the fusion
encoder, R rows asked of its last layer, M masked tokens, D width, E embedding, H heads, V
vocabulary.

    python model.py         parameters of every preset
"""
import copy
import pathlib
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention
from kernels.packed import GatherRows, ScatterRows, gather_sequences

# --------------------------------------------------------------------------------------------------
# What is configured
# --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """One model. Every field is also a flag of train.py. PRESETS holds the combinations we vouch
    for, RECIPES how each of them is trained."""
    width: int = 128                    # D, of all three parts
    embedding: int = 256                # E, the contrastive vectors
    dropout: float = 0.1                # of text and fusion encoder, on embeddings and sublayer
                                        # outputs; none on attention
    pool: str = "first"                 # the vector is of the "first" token (as published) or of
                                        # the "mean" of all tokens
    # vision
    vision: str = "vit"                 # "vit" (ViT, DeiT), "clip" or "beit2"
    image_size: int = 64                # pixels, square
    patch_size: int = 16
    stem: bool = False                  # small convolutions for patches (arXiv 2106.14881)
    vision_layers: int = 4
    vision_heads: int = 2
    vision_mlp: int = 512
    vision_eps: float = 1e-6
    drop_path: float = 0.0              # stochastic depth: the last layer's rate
    # text
    vocabulary: int = 8002              # V; the tokenizer decides
    positions: int = 130                # rows of the position table; the first `offset` are unused
    offset: int = 2                     # XLM-R counts positions from 2; CCLM-3M/4M counted from 0
    text_layers: int = 2
    text_heads: int = 2
    text_mlp: int = 512
    text_eps: float = 1e-5
    # fusion
    fusion_layers: int = 1
    fusion_heads: int = 2
    fusion_mlp: int = 512
    fusion_eps: float = 1e-5
    shared_fusion: bool = True          # False, an ablation: parallel text has one of its own
    tied: bool = True                   # masked LM's decoder is the token embedding (CCLM-3M/4M);
                                        # False: a matrix of its own (CCLM-X2VLM)
    # initial weights: standard deviations, see init_weights
    init_std: float = 0.02
    fusion_std: float = 0.02            # fusion encoder and itm_head
    embedding_std: float = 0.02         # tokens and positions; small: rare tokens move early


PRESETS = {
    # two CPU cores, minutes; chosen on the val split (docs/experiments.md)
    "demo": Config(
        pool="mean", stem=True, dropout=0.0, vision_layers=2, text_layers=1,
        embedding_std=0.002, fusion_std=128 ** -0.5),           # 1 / sqrt(width)
    # one GPU, from random weights
    "small": Config(
        width=384, vocabulary=250002, positions=514, image_size=224,
        vision_layers=12, vision_heads=6, vision_mlp=1536,
        text_layers=6, text_heads=6, text_mlp=1536,
        fusion_layers=3, fusion_heads=6, fusion_mlp=1536),
    # CCLM-X2VLM-base and -large: BEiT-2, XLM-R, six fusion layers (docs/paper.md, Architecture)
    "base": Config(
        width=768, vocabulary=250002, positions=514, image_size=224, tied=False,
        vision="beit2", vision_layers=12, vision_heads=12, vision_mlp=3072, drop_path=0.1,
        text_layers=12, text_heads=12, text_mlp=3072,
        fusion_layers=6, fusion_heads=12, fusion_mlp=3072, fusion_eps=1e-12),
    "large": Config(
        width=1024, vocabulary=250002, positions=514, image_size=224, tied=False,
        vision="beit2", vision_layers=24, vision_heads=16, vision_mlp=4096, drop_path=0.1,
        text_layers=24, text_heads=16, text_mlp=4096,
        fusion_layers=6, fusion_heads=16, fusion_mlp=4096, fusion_eps=1e-12),
}


# How a preset is trained: {flag of train.py: what it means}. RECIPES holds the values.
RECIPE = {
    "steps": "length of the schedule",
    "epochs": "of fine-tuning; --steps, if given, goes before it",
    "warmup": "steps of linear warm-up, from which the rate falls linearly to 0",
    "batch": "image-caption pairs per step, all processes together",
    "text_batch": "sentence pairs per step",
    "lr": "peak learning rate",
    "vision_lr": "rate of the image encoder, times --lr",
    "text_lr": "rate of the text encoder, times --lr",
    "fusion_lr": "rate of fusion encoder and match head, times --lr",
    "new_lr": "rate of what the files behind --init did not hold, times --lr",
    "temperature_lr": "peak rate of the temperature",
    "optimizer": "adamw, or muon for the weights of layers (optimizer.py)",
    "subword_sampling": "share of sentences that get other pieces at every step (data.py)",
    "mask_probability": "share of a sentence's tokens that are masked",
    "caption_masked": "most tokens of a caption that are masked",
    "sentence_masked": "most tokens of a sentence of parallel text that are masked",
    "caption_tokens": "tokens at which a caption is cut, with <s> and </s>",
    "sentence_tokens": "tokens at which a sentence of parallel text is cut",
    "save_every": "steps between checkpoints; the last step is always saved",
    "validate_every": "steps between validations; 0: none",
    "workers": "processes that prepare batches for each trainer; 0: none, -1: by the cores",
    "processes": "trainers that python train.py starts on CPUs; torchrun starts those of GPUs",
}
RECIPES = {
    # Chosen on the demo's val splits (docs/experiments.md).
    "demo": dict(
        steps=1200, warmup=80, batch=256, text_batch=256,
        lr=1.5e-3, vision_lr=1.0, text_lr=1.0, fusion_lr=2.0, new_lr=1.0, temperature_lr=3e-4,
        optimizer="muon", subword_sampling=0.4,
        mask_probability=0.15, caption_masked=20, sentence_masked=20,
        caption_tokens=64, sentence_tokens=64, save_every=400, validate_every=400, workers=-1,
        processes=2),
    # NOT published and never trained: a guess. The contrastive loss wants a large batch; a model of
    # this size from random weights stands a few 1e-4 after a long warm-up; masking is CCLM-3M's.
    "small": dict(
        steps=100_000, warmup=5000, batch=1024, text_batch=1024,
        lr=5e-4, vision_lr=1.0, text_lr=1.0, fusion_lr=1.0, new_lr=1.0, temperature_lr=5e-4,
        optimizer="adamw", subword_sampling=0.0,
        mask_probability=0.4, caption_masked=12, sentence_masked=20,
        caption_tokens=40, sentence_tokens=64, save_every=5000, validate_every=5000, workers=-1,
        processes=1),
    # CCLM-X2VLM-base and -large as published (docs/paper.md), but for save_every, which was 50,000.
    "base": dict(
        steps=406_614, warmup=1000, batch=480, text_batch=480,
        lr=4e-5, vision_lr=0.5, text_lr=2.0, fusion_lr=1.0, new_lr=2.0, temperature_lr=4e-5,
        optimizer="adamw", subword_sampling=0.0,
        mask_probability=0.4, caption_masked=10, sentence_masked=16,
        caption_tokens=30, sentence_tokens=64, save_every=5000, validate_every=5000, workers=-1,
        processes=1),
    "large": dict(
        steps=406_614, warmup=1000, batch=480, text_batch=480,
        lr=3e-5, vision_lr=1 / 3, text_lr=2.0, fusion_lr=1.0, new_lr=2.0, temperature_lr=3e-5,
        optimizer="adamw", subword_sampling=0.0,
        mask_probability=0.4, caption_masked=10, sentence_masked=16,
        caption_tokens=30, sentence_tokens=64, save_every=5000, validate_every=5000, workers=-1,
        processes=1),
}
RECIPE_SOURCES = {
    "demo": "chosen on its val splits",
    "small": "not published: a guess, never trained",
    "base": "CCLM-X2VLM-base as published",
    "large": "CCLM-X2VLM-large as published",
}


def training_dtype(device):
    """bf16 where the hardware multiplies it, else fp32 -> (dtype, reason)."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU multiplies it"
        return torch.float32, "this GPU does not multiply bfloat16"
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in flags:
            return torch.bfloat16, f"the CPU has {flag}"
    return torch.float32, "this CPU has neither amx_bf16 nor avx512_bf16"


def inference_context(device):
    """For the encoders and the fusion encoder: the autocast of training."""
    dtype, _ = training_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def at_least_float32(x):
    """x in float32 or wider: lengths and logits are not left in 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class View(NamedTuple):
    """One encoded batch of images or of sentences: all that the losses ever see of it."""
    states: torch.Tensor                # (T, D)
    starts: torch.Tensor                # (B+1,) int32
    vectors: torch.Tensor               # (B, E), unit length
    ids: torch.Tensor                   # (B,) int64: equal ids mean the same thing


# --------------------------------------------------------------------------------------------------
# Sublayers
# --------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention of x over y (y = x: self-attention). `grid` (patches a side) adds
    BEiT-2's learned relative position bias."""

    def __init__(self, width, heads, k_bias=True, grid=None):
        super().__init__()
        if width % heads:
            below = width // heads * heads
            raise ValueError(f"width {width} is not a multiple of {heads} heads: choose {below} or "
                             f"{below + heads}")
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=k_bias)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        if grid is not None:
            rows = (2 * grid - 1) ** 2 + 3
            self.relative_position_bias = nn.Parameter(torch.zeros(rows, heads))
            self.register_buffer("relative_index", relative_index(grid), persistent=False)

    def forward(self, x, y, x_starts, y_starts):
        """x (T, D), y (S, D) -> (T, D): sequence i of x reads sequence i of y. With y = x, one
        product gives q, k and v."""
        if y is x:
            q, k, v = self.project(x, self.q, self.k, self.v)            # (T, D) -> (T, H, D/H)
        else:
            q = self.q(x).unflatten(1, (self.heads, -1))                 # (T, D) -> (T, H, D/H)
            k, v = self.project(y, self.k, self.v)                       # (S, D) -> (S, H, D/H)
        bias = None
        if hasattr(self, "relative_position_bias"):
            bias = F.embedding(self.relative_index, self.relative_position_bias)   # (P, P, H)
            bias = bias.permute(2, 0, 1)                                 # (H, P, P)
        out = attention(q, k, v, x_starts, y_starts, bias)               # (T, H, D/H)
        return self.out(out.flatten(1))                                  # (T, D)

    def project(self, x, *linears):
        """The n Linears of one x as one product: fewer launches, and larger products, on a GPU.
        x (T, D) -> n times (T, H, D/H)"""
        weight = torch.cat([linear.weight for linear in linears])        # (n D, D)
        biases = [torch.zeros_like(self.q.bias) if linear.bias is None else linear.bias
                  for linear in linears]                                 # BEiT-2's k has none
        x = F.linear(x, weight, torch.cat(biases))                       # (T, D) -> (T, n D)
        return x.unflatten(1, (len(linears), self.heads, -1)).unbind(1)


def in_autocast_type(x):
    """x as torch.autocast would hand it to a Linear."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def relative_index(grid):
    """Row of BEiT's relative table for every pair of tokens, (P, P) int64: the class token, then
    grid x grid patches row by row. Numbered as in the official BEiT (modeling_finetune.py). On the
    CPU also in a model that is made on the device "meta": no file holds it."""
    patch = torch.arange(grid ** 2, device="cpu")
    y = patch // grid                                                    # (P-1,) row of a patch
    x = patch % grid                                                     # (P-1,) and its column
    # Two patches are between -(grid - 1) and grid - 1 apart in each direction: 2 grid - 1 values,
    # shifted to start at 0. The table has one row for every (down, right).
    side = 2 * grid - 1
    down = y[:, None] - y + grid - 1                                     # (P-1, P-1)
    right = x[:, None] - x + grid - 1                                    # (P-1, P-1)
    index = torch.empty(grid ** 2 + 1, grid ** 2 + 1, dtype=torch.long, device="cpu")
    index[1:, 1:] = down * side + right
    # The last three rows of the table are for pairs with the class token, which is nowhere.
    index[0, :] = side ** 2                                              # class token -> patch
    index[:, 0] = side ** 2 + 1                                          # patch -> class token
    index[0, 0] = side ** 2 + 2                                          # class token -> itself
    return index


class MLP(nn.Module):
    def __init__(self, width, mlp_width, quick=False):
        super().__init__()
        self.quick = quick                                               # CLIP's cheaper GELU
        self.up = nn.Linear(width, mlp_width)
        self.down = nn.Linear(mlp_width, width)

    def forward(self, x):
        x = self.up(x)                                                   # (T, D) -> (T, mlp_width)
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)
        return self.down(x)                                              # (T, mlp_width) -> (T, D)


def run(layer, *inputs):
    """layer(*inputs). train.py --checkpointing sets the attribute `checkpointing` of every layer:
    then its activations are not kept, but computed again in the backward pass."""
    if getattr(layer, "checkpointing", False) and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


# --------------------------------------------------------------------------------------------------
# Vision: pre-norm
# --------------------------------------------------------------------------------------------------

def drop_path(x, images, rate):
    """Stochastic depth (arXiv 1603.09382): x (images * P, D), a residual branch, is 0 for a whole
    image with probability `rate`. The others grow by 1 / (1 - rate), so that the mean stays."""
    scale = F.dropout(x.new_ones(images, 1, 1), rate)                    # 0 or 1 / (1 - rate)
    x = x.view(images, -1, x.shape[-1]) * scale                          # (images, P, D)
    return x.flatten(0, 1)                                               # (images * P, D)


class VisionLayer(nn.Module):
    def __init__(self, c, drop_path):
        super().__init__()
        beit = c.vision == "beit2"
        self.norm1 = nn.LayerNorm(c.width, c.vision_eps)
        self.norm2 = nn.LayerNorm(c.width, c.vision_eps)
        grid = c.image_size // c.patch_size if beit else None
        self.attention = Attention(c.width, c.vision_heads, k_bias=not beit, grid=grid)
        self.mlp = MLP(c.width, c.vision_mlp, quick=c.vision == "clip")
        self.drop_path = drop_path
        self.layer_scale1 = 1.0
        self.layer_scale2 = 1.0
        if beit:
            self.layer_scale1 = nn.Parameter(torch.full((c.width,), 0.1))
            self.layer_scale2 = nn.Parameter(torch.full((c.width,), 0.1))

    def forward(self, x, starts):
        """x (B * P, D) -> (B * P, D)"""
        y = self.norm1(x)
        y = self.attention(y, y, starts, starts)
        x = x + self.layer_scale1 * self.drop(y, starts)
        y = self.mlp(self.norm2(x))
        return x + self.layer_scale2 * self.drop(y, starts)

    def drop(self, y, starts):
        if self.training and self.drop_path:
            y = drop_path(y, len(starts) - 1, self.drop_path)
        return y


class ViT(nn.Module):
    """(B, 3, pixels, pixels) -> states (B * P, D). Row 0 of each image stands for the whole image.
    """

    def __init__(self, c):
        super().__init__()
        if c.vision not in ("vit", "clip", "beit2"):
            raise ValueError(f"vision {c.vision!r} is unknown: choose vit, clip or beit2")
        if c.image_size % c.patch_size:
            raise ValueError(f"image size {c.image_size} is not a multiple of patch size "
                             f"{c.patch_size}")
        self.config = c
        P = (c.image_size // c.patch_size) ** 2 + 1
        if c.stem:
            self.patches = conv_stem(c.width, c.patch_size)
        else:
            self.patches = nn.Conv2d(3, c.width, c.patch_size, c.patch_size,
                                     bias=c.vision != "clip")
        self.class_token = nn.Parameter(torch.zeros(c.width))
        self.positions = None if c.vision == "beit2" else nn.Parameter(torch.zeros(P, c.width))
        self.pre_norm = nn.Identity()
        if c.vision == "clip":
            self.pre_norm = nn.LayerNorm(c.width, c.vision_eps)
        # the rate of stochastic depth grows linearly from 0 to drop_path, as in BEiT-2
        rates = torch.linspace(0, c.drop_path, c.vision_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(VisionLayer(c, rate) for rate in rates)
        self.norm = nn.LayerNorm(c.width, c.vision_eps)

    def forward(self, images):
        B = len(images)
        D = self.config.width
        x = self.patches(images)                                         # (B, D, s/patch, s/patch)
        x = x.flatten(2).transpose(1, 2)                                 # (B, P-1, D)
        class_token = self.class_token.to(x.dtype).expand(B, 1, D)
        x = torch.cat([class_token, x], 1)                               # (B, P, D)
        if self.positions is not None:
            x = x + self.positions
        P = x.shape[1]
        starts = torch.arange(0, B * P + 1, P, dtype=torch.int32, device=images.device)  # (B+1,)
        x = self.pre_norm(x.reshape(-1, D))                              # (B, P, D) -> (B * P, D)
        for layer in self.layers:
            x = run(layer, x, starts)
        x = self.norm(x)
        if self.config.vision == "beit2":
            # row 0 becomes the mean of the normalised patches (official code, beit2.py:409)
            patches = x.view(B, P, D)[:, 1:]                             # (B, P-1, D)
            mean = patches.mean(1, keepdim=True)                         # (B, 1, D)
            x = torch.cat([mean, patches], 1).view(-1, D)                # (B * P, D)
        return x


def conv_stem(width, patch):
    """A 4 x 4 patch convolution, then 3 x 3 stride-2 ones up to `patch`: patches overlap, so edges
    are learned early."""
    if patch not in (8, 16, 32) or width % 16:
        raise ValueError(f"a stem needs a patch size of 8, 16 or 32, not {patch}, and a width of "
                         f"n * 16, not {width}")
    layers = [nn.Conv2d(3, width // 2, 4, 4), nn.GroupNorm(8, width // 2), nn.GELU()]
    before = width // 2
    for _ in range((patch // 8).bit_length()):
        layers += [nn.Conv2d(before, width, 3, 2, 1), nn.GroupNorm(8, width), nn.GELU()]
        before = width
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1))


# --------------------------------------------------------------------------------------------------
# Text and fusion: post-norm
# --------------------------------------------------------------------------------------------------

class TextLayer(nn.Module):
    """Self-attention, then the MLP; a LayerNorm after each."""

    def __init__(self, width, heads, mlp_width, eps, dropout):
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, mlp_width)
        self.norm2 = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, starts):
        """x (T, D) -> (T, D)"""
        x = self.norm1(x + self.dropout(self.attention(x, x, starts, starts)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class TextEncoder(nn.Module):
    """XLM-R: token_ids (T,) int64 and starts -> states (T, D)."""

    def __init__(self, c):
        super().__init__()
        self.offset = c.offset
        self.longest = c.positions - c.offset                            # tokens of a sentence
        self.token_embedding = nn.Embedding(c.vocabulary, c.width)
        self.positions = nn.Embedding(c.positions, c.width)
        self.token_type = nn.Parameter(torch.zeros(c.width))             # XLM-R has one, for all
        self.norm = nn.LayerNorm(c.width, c.text_eps)
        self.dropout = nn.Dropout(c.dropout)
        sizes = (c.width, c.text_heads, c.text_mlp, c.text_eps, c.dropout)
        self.layers = nn.ModuleList(TextLayer(*sizes) for _ in range(c.text_layers))

    def forward(self, token_ids, starts):
        T = len(token_ids)
        first = torch.repeat_interleave(starts[:-1], starts.diff(), output_size=T)         # (T,)
        position = torch.arange(T, device=token_ids.device) - first      # (T,): 0, 1, 2 ... in each
        x = self.token_embedding(token_ids) + self.positions(position + self.offset)
        x = self.dropout(self.norm(x + self.token_type))                 # (T, D)
        for layer in self.layers:
            x = run(layer, x, starts)
        return x


class FusionLayer(TextLayer):
    """Self-attention, then cross-attention to a view, then the MLP; a LayerNorm after each."""

    def __init__(self, width, heads, mlp_width, eps, dropout):
        super().__init__(width, heads, mlp_width, eps, dropout)
        self.cross = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width, eps)

    def forward(self, x, x_starts, texts, copies, groups, views):
        """x (X, D): rows of `texts`, all or some, sequence by sequence; each attends to all rows of
        its text. copies (T',): the rows of x that go on, repeats allowed. None: all of them, once.
        groups: of these, rows groups[i]..groups[i+1] read sequence i of `views` -> (T', D)"""
        # Where x is all rows, one product gives its q, k and v. (Lengths are compared, as a tensor
        # that a checkpoint hands out twice is two objects.)
        text = x if len(x) == len(texts.states) else texts.states        # (T, D)
        own = self.attention(x, text, x_starts, texts.starts)            # (., D)
        if copies is not None:
            x = x.index_select(0, copies)                                # (T', D)
            own = own.index_select(0, copies)                            # (T', D)
        x = self.norm1(x + self.dropout(own))        # after the copy: copies drop different numbers
        seen = self.cross(x, views.states, groups, views.starts)         # (T', D)
        x = self.cross_norm(x + self.dropout(seen))
        return self.norm2(x + self.dropout(self.mlp(x)))


class Fusion(nn.Module):
    """Tokens of texts attend to views. Query sequence i is a copy of text query_text[i] and reads
    view query_view[i] (-1: nothing). The numbers are those of a padded loop over i
    (tests/reference.py), but what is equal is computed once:

      * Query sequences that read one view stand side by side. To the cross-attention they are ONE
        longer sequence, since a query does not see its neighbours: a view's keys and values are
        projected once per layer, and nothing is copied.
      * Copies of a text differ only in what they read: the first self-attention is done per text.
      * The last layer computes only `positions`: the first token of pairs to match, the masked
        tokens to predict. No loss reads its other rows."""

    def __init__(self, c):
        super().__init__()
        sizes = (c.width, c.fusion_heads, c.fusion_mlp, c.fusion_eps, c.dropout)
        self.layers = nn.ModuleList(FusionLayer(*sizes) for _ in range(c.fusion_layers))

    def forward(self, texts, views, rows, starts, groups, asked):
        """Query sequences side by side, in the order of the views they read -> their states (R, D).

        rows    (T',) row r of the query sequences copies row rows[r] of texts.states
        starts  (Q+1,) of the query sequences
        groups  (B+1,) rows groups[i]..groups[i+1] read view i; those before groups[0] read nothing
        asked   (R,) the wanted rows, ascending"""
        # Queries of one view are one group. The first group reads nothing: a view of length 0 is
        # put before the others.
        groups = F.pad(groups, (1, 0))                                   # (B+2,)
        views = View(views.states, F.pad(views.starts, (1, 0)), None, None)

        # texts are the caller's before the first layer; after it, they are the query sequences,
        # copied by that layer. The last layer goes on with asked rows only: their sequences and
        # groups then start at the number of asked rows before the old start (asked [1, 2]: a
        # sequence that started at row 2 starts at row 1 now).
        for i, layer in enumerate(self.layers):
            x = texts.states
            x_starts = texts.starts
            copies = rows if i == 0 else None                            # (T, D) -> (T', D)
            if i == len(self.layers) - 1:
                groups = torch.searchsorted(asked, groups.long()).int()  # (B+2,)
                if i == 0:
                    copies = rows[asked]                                 # (T, D) -> (R, D)
                else:
                    x = x.index_select(0, asked)                         # (T', D) -> (R, D)
                    x_starts = torch.searchsorted(asked, starts.long()).int()      # (Q+1,)
            x = run(layer, x, x_starts, texts, copies, groups, views)
            texts = View(x, starts, None, None)
        return x


class MaskedLMHead(nn.Module):
    """Masked LM's head up to the decoder's input; weight and bias are the decoder's. tied: weight
    is the token embedding."""

    def __init__(self, c, embedding):
        super().__init__()
        self.dense = nn.Linear(c.width, c.width)
        self.norm = nn.LayerNorm(c.width, c.text_eps)
        self.weight = embedding.weight
        if not c.tied:
            self.weight = nn.Parameter(torch.empty(c.vocabulary, c.width))
        self.bias = nn.Parameter(torch.zeros(c.vocabulary))

    def forward(self, x):
        return self.norm(F.gelu(self.dense(x)))                          # (M, D) -> (M, D)


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------

SENTENCES = 4               # of a chunk, for each of its images: fuse_pairs reads a view four times


def recompute(module, *inputs):
    """module(*inputs), whose activations are computed again in the backward pass."""
    return checkpoint(module, *inputs, use_reentrant=False)


def chunks_of_queries(size, texts, views, rows, starts, groups, asked):
    """Yields what Fusion.forward takes for `size` query sequences at a time. Neighbours read the
    same views or the next ones, so that nearly every view is in one chunk: the cost is linear."""
    # 1. Where each of C chunks begins and ends: its rows, asked rows, views, and rows of views. All
    #    that the host must know is in one table: it waits for the GPU once.
    cuts = torch.cat([starts[:-1:size], starts[-1:]])                    # (C+1,)
    asked_cuts = torch.searchsorted(asked, cuts.long())                  # (C+1,)
    first = torch.searchsorted(groups, cuts[:-1], right=True) - 1        # (C,) view of a first row
    last = torch.searchsorted(groups, cuts[1:]) - 1                      # (C,) view of a last row
    first = first.clamp(min=0)                                           # it may read none: -1
    last = last.clamp(min=0)
    columns = [cuts[:-1], cuts[1:], asked_cuts[:-1], asked_cuts[1:], first, last,
               views.starts[first], views.starts[last + 1]]
    table = torch.stack(columns, 1).tolist()                             # (C, 8)

    # 2. Copy the rows of all chunks at once: the backward pass then adds once, not once per chunk.
    text_states = texts.states.index_select(0, rows)                     # (T, D) -> (T', D)
    text_states = text_states.split([end - start for start, end, *_ in table])
    view_rows = [torch.arange(start, end, device=rows.device) for *_, start, end in table]
    view_states = views.states.index_select(0, torch.cat(view_rows))
    view_states = view_states.split([len(some) for some in view_rows])

    # 3. Text i of a chunk is its i-th query sequence. All counts begin anew in every chunk.
    for i, (x, y, cut) in enumerate(zip(text_states, view_states, table)):
        start, _, asked_start, asked_end, first, last, view_start, _ = cut
        own_starts = starts[i * size:(i + 1) * size + 1] - start
        text = View(x, own_starts, None, None)
        view = View(y, views.starts[first:last + 2] - view_start, None, None)
        itself = torch.arange(len(x), device=rows.device)
        own_groups = (groups[first:last + 2] - start).clamp(0, len(x))
        yield text, view, itself, own_starts, own_groups, asked[asked_start:asked_end] - start


class CCLM(nn.Module):
    """encode_image, encode_text, fuse: three verbs, and parameters that the losses need
    (temperature, itm_head, mlm_head).

    train.py --chunk sets the attribute `chunk`: a gradient cache. The verbs then work on that many
    images, or SENTENCES times as many sentences, at a time and compute each chunk again in the
    backward pass, so a small GPU gets the exact gradients of all three losses over a big batch."""
    chunk = None

    def __init__(self, config):
        super().__init__()
        c = config
        self.config = config
        self.vision = ViT(c)
        self.text = TextEncoder(c)
        self.fusion = Fusion(c)
        self.text_fusion = None if c.shared_fusion else Fusion(c)
        self.vision_proj = nn.Linear(c.width, c.embedding)
        self.text_proj = nn.Linear(c.width, c.embedding)
        self.itm_head = nn.Sequential(nn.Linear(c.width, 2 * c.width), nn.LayerNorm(2 * c.width),
                                      nn.GELU(), nn.Linear(2 * c.width, 2))
        self.mlm_head = MaskedLMHead(c, self.text.token_embedding)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.task_head = None                    # what a benchmark adds (tasks/)
        init_weights(self)

    def for_parallel_text(self):
        """The model that fuses parallel text: this one. With shared_fusion=False, an ablation that
        lives here alone, it is a shallow copy: the same parameters, but text_fusion as fusion."""
        if self.config.shared_fusion:
            return self
        twin = copy.copy(self)
        twin._modules = self._modules | {"fusion": self.text_fusion}
        return twin

    def encode_image(self, images, ids):
        """images (B, 3, pixels, pixels) float, normalised; ids (B,) -> View."""
        if self.chunk:                           # see the class
            parts = [recompute(self.vision, part) for part in images.split(self.chunk)]
            states = torch.cat(parts)                                    # (B * P, D)
        else:
            states = self.vision(images)                                 # (B * P, D)
        P = len(states) // len(images)
        starts = torch.arange(0, len(states) + 1, P, dtype=torch.int32, device=images.device)
        return View(states, starts, self.vector(self.vision_proj, states, starts), ids)

    def encode_text(self, token_ids, starts, ids):
        """token_ids (T,) int64, starts (B+1,) int32, ids (B,) -> View."""
        if self.chunk:                           # see the class
            size = SENTENCES * self.chunk
            cuts = [*starts[:-1:size].tolist(), len(token_ids)]          # the host waits for these
            parts = []
            for i, (first, end) in enumerate(pairwise(cuts)):
                own_starts = starts[i * size:(i + 1) * size + 1] - first
                parts.append(recompute(self.text, token_ids[first:end], own_starts))
            states = torch.cat(parts)                                    # (T, D)
        else:
            states = self.text(token_ids, starts)                        # (T, D)
        return View(states, starts, self.vector(self.text_proj, states, starts), ids)

    def vector(self, project, states, starts):
        """states (T, D) -> unit vectors (B, E) of the first tokens or of the means."""
        if self.config.pool == "mean":
            lengths = starts.diff().long()
            # unsafe: skips a check that makes the host wait for the GPU
            pooled = torch.segment_reduce(states, "mean", lengths=lengths, unsafe=True)    # (B, D)
        else:
            pooled = GatherRows.apply(states, starts[:-1].long())        # (B, D)
        return F.normalize(at_least_float32(project(pooled)), dim=-1)    # (B, E)

    def fuse(self, texts, views, query_text, query_view, positions=None):
        """Copies of texts read views; each query sequence is a text and what it reads.

        texts, views   Views, of which only states and starts are read
        query_text     (Q,) int64: query sequence i is a copy of text query_text[i]
        query_view     (Q,) int64: it reads view query_view[i]; -1: nothing
        positions      (R,) int64, ascending: the wanted rows. Rows are counted through the query
                       sequences 0, 1, ... Q-1, as if they were packed. None: all rows
        Returns their states (R, D), in the caller's order."""
        # 1. Sort the query sequences by the view they read; those of view -1 come first.
        #    rows[r] is the row of texts.states that row r of the query sequences copies. View i's
        #    query sequences begin at row groups[i].
        order = query_view.argsort(stable=True)                          # (Q,)
        rows, starts = gather_sequences(texts.starts, query_text[order])           # (T',), (Q+1,)
        numbers = torch.arange(len(views.starts), device=order.device)   # (B+1,)
        groups = starts[torch.searchsorted(query_view[order], numbers)]  # (B+1,)

        # 2. where[r]: our row of the caller's row r. Of these, only those at `positions` are asked
        #    for. asked is where they stand, ascending; asked[k] belongs to positions[back[k]].
        #    For example: order [1, 0] of two sequences of 2 rows gives where [2, 3, 0, 1];
        #    positions [0, 3] then give asked [1, 2] and back [1, 0].
        where, _ = gather_sequences(starts, order.argsort(), len(rows))  # (T',)
        if positions is not None:
            where = where[positions]                                     # (R,)
        asked, back = where.sort()                                       # (R,), (R,)

        # 3. Fuse, all at once or chunk by chunk. Views are cast once, not in every layer.
        views = View(in_autocast_type(views.states), views.starts, None, None)
        queries = (texts, views, rows, starts, groups, asked)
        if self.chunk:
            parts = chunks_of_queries(SENTENCES * self.chunk, *queries)
            x = torch.cat([recompute(self.fusion, *part) for part in parts])       # (R, D)
        else:
            x = self.fusion(*queries)                                    # (R, D)

        # 4. Back to the caller's order.
        return ScatterRows.apply(x, back, len(back))                     # (R, D)


# --------------------------------------------------------------------------------------------------
# Initial weights, parameter groups
# --------------------------------------------------------------------------------------------------

def init_weights(model):
    """All random numbers of a new model, in one place (as the official code; the zero is ours, for
    training from scratch).

        Linear, class token, positions of patches            normal(0, init_std)
        Linear of the fusion encoder and itm_head            normal(0, fusion_std)
        tokens, positions of tokens                          normal(0, embedding_std)
        Conv2d                                               normal(0, 1 / sqrt(inputs))
        biases, relative position bias, token type           0
        LayerNorm                                            1, 0
        layer scale (BEiT-2)                                 0.1
        last layer of itm_head                               0: a new model says 0.5 to every pair
        temperature                                          0.07
        text_fusion (shared_fusion=False)                    a copy of the fusion encoder"""
    c = model.config
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            std = c.init_std
            if isinstance(module, nn.Conv2d):
                std = module.weight[0].numel() ** -0.5
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in (*model.fusion.modules(), *model.itm_head):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=c.fusion_std)
    for table in (model.text.token_embedding, model.text.positions):
        nn.init.normal_(table.weight, std=c.embedding_std)
    if not c.tied:
        nn.init.normal_(model.mlm_head.weight, std=c.init_std)
    nn.init.normal_(model.vision.class_token, std=c.init_std)
    if model.vision.positions is not None:
        nn.init.normal_(model.vision.positions, std=c.init_std)
    nn.init.zeros_(model.itm_head[-1].weight)
    if model.text_fusion is not None:
        model.text_fusion.load_state_dict(model.fusion.state_dict())


def build(preset="demo", **changes):
    """The Config of a preset with some fields changed."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown: choose {', '.join(PRESETS)}")
    return replace(PRESETS[preset], **changes)


if __name__ == "__main__":
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = CCLM(config)
        print(f"{name:6} {sum(p.numel() for p in model.parameters()):13,} parameters")
