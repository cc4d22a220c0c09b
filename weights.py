"""Weights in and out: checkpoints of train.py, published models and encoders, safetensors.

A checkpoint is one file of plain dicts and tensors, read with weights_only=True: it cannot run code.

    {"model": state dict, "optimizer": ..., "step": int, "rng": [one per process],
     "tokenizer": bytes of the sentencepiece model,
     "config": {"model": the fields of model.Config, "train": the settings of train.py}}

A source is a published file, or a folder that holds one and its sentencepiece.bpe.model. Its layout is recognised by its names, its
architecture read from shapes; every tensor is accounted for (used as, unused because, missing -> initialised how) or it is an error.

    python weights.py out/ckpt.pt                                             what a checkpoint holds
    python weights.py import cclm_x2vlm_base.th --out ckpt.pt                 the authors' model, for --init and --ckpt
    python weights.py import x2vlm_base_1b.th xlm-roberta-base/ --out ckpt.pt     several sources: where CCLM-X2VLM began (F4.7)
    python weights.py import beit2_large.pth xlm-roberta-large/ --every_second --out ckpt.pt      where CCLM-3M/4M began (F4.5)
    python weights.py export ckpt.pt DIR                                      safetensors, and the text encoder for transformers
"""
import argparse
import collections
import fnmatch
import functools
import json
import math
import os
import pathlib
import pickle
import re
import sys
import zipfile
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
from model import CCLM, Config, build, relative_index

# ------------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------------


def write_checkpoint(path, state, keep=0):
    """Written beside its place, flushed to disk, then renamed: a kill at any moment, or a full disk, leaves the old
    file or the new one. keep: how many earlier ones stay as ckpt_STEP.pt."""
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if keep and path.exists():
        os.replace(path, path.with_name(f"ckpt_{torch.load(path, weights_only=True, mmap=True)['step']}.pt"))
        for stale in sorted(path.parent.glob("ckpt_*.pt"), key=lambda p: int(p.stem[5:]))[:-keep]:
            stale.unlink()
    os.replace(beside, path)


def read_checkpoint(path):
    """The dict that train.py saved; ValueError in one line for anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["model"], state["config"]["model"], state["config"]["train"], state["tokenizer"]
        return state
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; `python train.py` makes one") from None
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, IndexError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a checkpoint of train.py ({type(error).__name__})") from None


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor}, each a map of its own piece of the file: 8 bytes length, a JSON header, the bytes of all tensors."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length) if length < 2 ** 27 else b"")
        header.pop("__metadata__", None)
        tensors, size = {}, os.path.getsize(path)
        for name, entry in header.items():
            (start, end), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]
            if end - start != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
                raise ValueError(f"{name} does not fit into the file")
            raw = np.memmap(path, np.uint8, "c", 8 + length + start, end - start) if end > start else np.empty(0, np.uint8)
            tensors[name] = torch.from_numpy(raw).view(dtype).view(shape)
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from None


def write_safetensors(path, tensors):
    """The inverse; the wide types first, so that every tensor lies aligned."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].dtype.itemsize
        header[name] = {"dtype": names[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())


def read_tensors(path):
    """Any published file -> ({name: tensor}, the whole dict it came in). The tensors are maps of the file where its format
    allows it (not torch's before 1.6). argparse.Namespace, which trainers leave in their files, is plain data."""
    if path.suffix == ".safetensors":
        return read_safetensors(path), {}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            whole = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        tensors = next((whole[key] for key in ("model", "module", "state_dict") if isinstance(whole.get(key), dict)), whole)
        if tensors and all(isinstance(t, torch.Tensor) for t in tensors.values()):
            return tensors, whole
        raise ValueError("names and tensors are expected, bare or under 'model' or 'module'")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a folder must hold model.safetensors or pytorch_model.bin") from None
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        raise ValueError(f"{path} was refused: it asks to run {code[1]}, and weights need no code" if code else
                         f"{path} is truncated or not a file of weights ({type(error).__name__})") from None


# ------------------------------------------------------------------------------------------------------------------
# Layouts: what published files call things (F6)
# ------------------------------------------------------------------------------------------------------------------

class Layout(NamedTuple):
    title: str
    sign: str                           # pattern of "name [shape]" of a tensor by which the layout is known
    rename: dict                        # {prefix: (our prefix, {their piece: our piece, in this order})}
    unused: dict                        # {pattern of their name or of ours: why}
    fields: dict                        # of Config: what shapes do not say
    parts: tuple                        # of ours that it must hold whole
    new: dict = {}                      # {pattern of our name: why it may be missing all the same}


BERT = {"attention.self.query": "attention.q", "attention.self.key": "attention.k", "attention.self.value": "attention.v",
        "attention.output.dense": "attention.out", "attention.output.LayerNorm": "norm1", "intermediate.dense": "mlp.up",
        "output.dense": "mlp.down", "output.LayerNorm": "norm2", "embeddings.word_embeddings": "words",
        "embeddings.position_embeddings": "positions", "embeddings.token_type_embeddings.weight": "kind",
        "embeddings.LayerNorm": "norm", "encoder.layer": "layers"}           # export reads it backwards
FUSION = BERT | {"crossattention": "cross", "crossnorm1": "cross_norm"}      # what BERT's lines leave of crossattention
HEAD = {"predictions.": "", "transform.": "", "LayerNorm": "norm", "layer_norm": "norm", "decoder.": ""}
VIT = {"patch_embed.proj": "patches", "cls_token": "class_token", "pos_embed": "positions", "blocks": "layers", "attn": "attention",
       "attention.proj": "attention.out", "q_bias": "q.bias", "v_bias": "v.bias", "relative_position_bias_table": "relative",
       "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
BEIT = VIT | {"gamma_": "scale", "fc_norm": "norm"}
CLIP = {"embeddings.": "", "patch_embedding": "patches", "patch_embed": "patches", "class_embedding": "class_token",
        "position_embedding.weight": "positions", "pos_embed.weight": "positions", "pre_layrnorm": "pre_norm", "post_layernorm": "norm",
        "encoder.layers": "layers", "self_attn": "attention", "_proj": "", "layer_norm": "norm", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
COMMON = {name: (name, {}) for name in ("vision_proj", "text_proj", "itm_head")} | {"temp": ("temperature", {})}
STACK = COMMON | {"text_encoder.cls.": ("mlm_head.", HEAD), "text_encoder.bert.": ("text.", FUSION), "text_encoder.": ("text.", FUSION)}
UNUSED = {r".*position_ids": "positions are counted", r"bbox_head\..*": "region losses are out of scope",
          r".*pooler\..*": "states are used as they are", r"head\..*": "a classifier of its own task"}
ALL = ("vision", "text", "fusion", "vision_proj", "text_proj", "itm_head", "temperature")    # masked LM's head is dropped in fine-tuning
KINDS = r"text_encoder\.(bert\.)?embeddings\.token_type_embeddings\.weight \[{}, .*"
FOREIGN = "words of another language, left to XLM-R (F4.7)"
TEXTS = [
    Layout("CCLM-X2VLM", r"cross_encoder\.encoder\.layer\.0\..*", COMMON | {"text_encoder.": ("text.", BERT), "cross_encoder.": ("fusion.", FUSION),
           "mlm_head.": ("mlm_head.", HEAD)}, UNUSED, {"text_eps": 1e-5, "offset": 2, "fusion_eps": 1e-12, "tied": False, "pool": "first"}, ALL),
    Layout("English X2VLM", KINDS.format(2), STACK, UNUSED | {r"text\..*|mlm_head\.(weight|bias)": FOREIGN},
           {"fusion_eps": 1e-12, "tied": False, "pool": "first"}, ALL[2:] + ("mlm_head",), {r"mlm_head\.(weight|bias)": FOREIGN}),
    Layout("CCLM-3M/4M", KINDS.format(1), STACK, UNUSED,
           {"text_eps": 1e-5, "offset": 0, "fusion_eps": 1e-5, "tied": True, "pool": "first"}, ALL),
    Layout("XLM-R", r"(roberta\.)?encoder\.layer\.0\.attention\.self\.query\.weight .*",
           {"lm_head.": ("mlm_head.", HEAD), "roberta.": ("text.", BERT), "": ("text.", BERT)}, UNUSED,
           {"text_eps": 1e-5, "offset": 2, "tied": True}, ("text",)),
]
VISIONS = [
    Layout("CLIP", r"(vision_model\.)?(embeddings\.)?class_embedding .*", {"vision_model.": ("vision.", CLIP), "": ("vision.", CLIP)},
           UNUSED | {r"(text_model|text_projection|visual_projection|logit_scale).*": "the rest of CLIP"},
           {"vision": "clip", "vision_eps": 1e-5, "stem": False}, ("vision",)),
    Layout("BEiT-2", r"blocks\.0\.gamma_1 .*", {"": ("vision.", BEIT)}, UNUSED | {r"norm\..*": "patches have fc_norm instead (F1.5)",
           r".*relative_position_index": "computed from the grid", r"mask_token|lm_head\..*|cls_pt_layers\..*": "pre-training's own"},
           {"vision": "beit2", "vision_eps": 1e-6, "stem": False}, ("vision",), {r"vision\.norm\..*": "no fc_norm in that file"}),
    Layout("ViT", r"blocks\.0\.attn\.qkv\.bias .*", {"": ("vision.", VIT)}, UNUSED,
           {"vision": "vit", "vision_eps": 1e-6, "stem": False}, ("vision",)),
    Layout("Swin", r"layers\.0\.blocks\.0\.attn\.qkv\.bias .*", {}, {r"(layers|patch_embed|norm)\..*": "Swin is out of scope"}, {}, (),
           {r"vision\..*": "Swin is out of scope: name a ViT of the same width too"}),
]


# ------------------------------------------------------------------------------------------------------------------
# Sources: tensors under our names, and the architecture
# ------------------------------------------------------------------------------------------------------------------

class Source(NamedTuple):
    title: str
    weights: dict                       # {our name: tensor}
    notes: list                         # of (their name, our names, why it is unused or "")
    fields: dict                        # of Config
    parts: tuple
    new: dict
    tokenizer: bytes


def part(name):
    return name.split(".")[0]


def layout_of(tensors, path):
    """One layout for a whole file, put together from that of its texts and that of its images."""
    described = [f"{name.removeprefix('vision_encoder.')} {list(t.shape)}" for name, t in tensors.items()]
    found = [next((x for x in family if any(re.fullmatch(x.sign, d) for d in described)), None) for family in (TEXTS, VISIONS)]
    found = [x for x in found if x]
    if not found:
        raise ValueError(f"{path}: names like {', '.join(sorted(tensors)[:3])} are none of {', '.join(x.title for x in TEXTS + VISIONS)}")
    join = lambda field: {k: v for x in found for k, v in getattr(x, field).items()}
    return Layout(" with ".join(x.title for x in found), "", join("rename"), join("unused"), join("fields"),
                  tuple(p for x in found for p in x.parts), join("new"))


def our_names(name, layout, split, step, layers):
    """Their name -> ours: [] unknown; three for a joint q, k, v; every layer's for BEiT's shared table (F4.6). split: of one
    stack's layers 0, step, 2 step ... so many are text, the rest fusion."""
    prefix = next((p for p in layout.rename if name.startswith(p)), None)
    if prefix is None:
        return []
    ours, rest = layout.rename[prefix][0], name[len(prefix):]
    for their, our in layout.rename[prefix][1].items():
        rest = rest.replace(their, our)
    layer = re.fullmatch(r"layers\.(\d+)(\..*)", rest)
    if split and layer and ours == "text.":
        i = int(layer[1]) // step
        ours, rest = ("text.", f"layers.{i}{layer[2]}") if i < split else ("fusion.", f"layers.{i - split}{layer[2]}")
    if rest == "rel_pos_bias.relative":
        return [f"vision.layers.{i}.attention.relative" for i in range(layers)]
    return [ours + rest.replace("qkv", letter) for letter in ("qkv" if ".qkv." in rest else "q")]


def translate(tensors, layout, every_second, path):
    """-> ({our name: tensor}, [(their name, our names, why it is unused or "")])."""
    depth = lambda pattern: [int(n) for name in tensors for n in re.findall(pattern, name)]
    layers, crossed = 1 + max(depth(r"(?:blocks|layer)\.(\d+)\."), default=0), depth(r"^text_encoder.*layer\.(\d+)\.cross")
    split, step = (layers // 4, 2) if every_second else (min(crossed, default=0), 1)
    weights, notes = {}, []
    for full, tensor in sorted(tensors.items()):
        name = full.removeprefix("vision_encoder.")
        ours = our_names(name, layout, split, step, layers)
        reason = next((why for pattern, why in layout.unused.items() for n in (name, *ours) if re.fullmatch(pattern, n)), "")
        if every_second and re.search(r"layer\.\d*[02468]\.", name):
            reason = "every second layer was asked for (F4.5)"
        if name.endswith("relative_position_index") and not torch.equal(tensor, relative_index(math.isqrt(len(tensor) - 1))):
            raise ValueError(f"{path}: {name} is not BEiT's order of patches")
        pieces = tensor.chunk(3) if ".qkv." in name else [tensor] * len(ours)
        if not reason and any(new in weights for new in ours):
            if not torch.equal(weights[ours[0]], tensor):
                raise ValueError(f"{path}: {name} and another tensor both are {ours[0]}, with different numbers")
            reason = f"the same numbers are {ours[0]}"
        notes.append((full, ours, reason))
        for new, piece in zip(ours, pieces) if not reason else ():
            piece = piece.squeeze() if new in ("vision.class_token", "vision.positions", "text.kind") else piece
            weights[new] = piece.float()                                     # a no-op, still a map of the file, unless 16 bits
    return weights, notes


def shapes(w):
    """{field of Config: value} that the shapes of some parts say; heads are 64 wide where no table tells their number."""
    found = {"embedding": len(w["text_proj.weight"])} if "text_proj.weight" in w else {}
    for tower in ("vision", "text", "fusion"):
        layers = [int(name.split(".")[2]) for name in w if name.startswith(tower + ".layers.")]
        if not layers:
            continue
        hidden, width = w[f"{tower}.layers.0.mlp.up.weight"].shape
        if found.setdefault("width", width) != width:
            raise ValueError(f"vision width {found['width']} is not text width {width}: they share one fusion encoder (F1.4)")
        found |= {f"{tower}_layers": max(layers) + 1, f"{tower}_hidden": hidden, f"{tower}_heads": max(1, width // 64)}
        if tower == "text":
            found |= {"vocabulary": len(w["text.words.weight"]), "positions": len(w["text.positions.weight"])}
        if tower == "vision":
            table, patch = w.get("vision.layers.0.attention.relative"), w["vision.patches.weight"].shape[-1]
            grid = math.isqrt(len(w["vision.positions"]) - 1) if table is None else (math.isqrt(len(table) - 3) + 1) // 2
            found |= {"patch_size": patch, "image_size": grid * patch} | ({} if table is None else {"vision_heads": table.shape[1]})
    return found


def read_source(path, every_second=False):
    """A published file, a folder with one, or a checkpoint or export of ours -> Source. ValueError in one line for anything else."""
    path = pathlib.Path(path)
    folder, names = (path, ("model.safetensors", "pytorch_model.bin")) if path.is_dir() else (path.parent, (path.name,))
    tensors, whole = read_tensors(next((folder / name for name in names if (folder / name).exists()), path))
    spm, written = folder / "sentencepiece.bpe.model", folder / "config.json"
    tokenizer = spm.read_bytes() if spm.exists() else b""
    if "temperature" in tensors:                                             # our own names
        config = whole.get("config", {}).get("model") or json.loads(written.read_text())
        return Source("CCLM of this program", tensors, [(n, [n], "") for n in tensors], config, (), {}, whole.get("tokenizer") or tokenizer)
    layout = layout_of(tensors, path)
    every_second = every_second and layout.title == "XLM-R"
    weights, notes = translate(tensors, layout, every_second, path)
    try:
        fields = shapes(weights) | layout.fields
    except KeyError as error:
        raise ValueError(f"{path} ({layout.title}) lacks {error}: its architecture cannot be read") from None
    except ValueError as error:
        raise ValueError(f"{path} ({layout.title}): {error}") from None
    new = dict(layout.new)
    if every_second:                                                         # CCLM-3M/4M out of XLM-R-large
        fields, new = fields | {"offset": 0, "fusion_eps": 1e-5}, {r"fusion\..*cross.*": "XLM-R has no cross-attention (F4.5)"}
    return Source(layout.title, weights, notes, fields, layout.parts, new, tokenizer)


def merge(a, b):
    """Two sources as one: b's parts replace a's, but for the masked LM head, which stays a's (F4.7)."""
    if a.fields.get("width", b.fields["width"]) != b.fields["width"]:
        raise ValueError(f"{a.title} has width {a.fields['width']}, {b.title} {b.fields['width']}: vision and text share one fusion "
                         f"encoder and must be equally wide (F1.4)")
    ours, theirs = ({part(name) for name in s.weights} for s in (a, b))
    theirs -= ours & {"mlm_head"}
    lost = lambda s, parts: [(name, to, why or ("another source holds it" if to and part(to[0]) in parts else "")) for name, to, why in s.notes]
    weights = {n: t for n, t in a.weights.items() if part(n) not in theirs} | {n: t for n, t in b.weights.items() if part(n) in theirs}
    fields = a.fields | {k: v for k, v in b.fields.items() if k != "tied" or "tied" not in a.fields}
    return Source(f"{a.title} + {b.title}", weights, lost(a, theirs) + lost(b, ours - theirs), fields, a.parts + b.parts, a.new | b.new,
                  b.tokenizer if "text" in theirs else a.tokenizer)


def read_sources(paths, every_second=False):
    return functools.reduce(merge, [read_source(path, every_second) for path in paths])


# ------------------------------------------------------------------------------------------------------------------
# Another resolution
# ------------------------------------------------------------------------------------------------------------------

def cubic(x, at):
    """The cubic spline through knots x (n,) ascending, not-a-knot at both ends, at points `at` (m,): a matrix (m, n) that the
    values are multiplied with. What SciPy's RectBivariateSpline does along one axis."""
    n, h = len(x), np.diff(x)
    left, right = np.zeros((n, n)), np.zeros((n, n))                         # left @ second derivatives = right @ values
    for i in range(1, n - 1):
        left[i, i - 1:i + 2] = h[i - 1] / 6, (h[i - 1] + h[i]) / 3, h[i] / 6
        right[i, i - 1:i + 2] = 1 / h[i - 1], -1 / h[i - 1] - 1 / h[i], 1 / h[i]
    left[0, :3] = -1 / h[0], 1 / h[0] + 1 / h[1], -1 / h[1]                  # the third derivative does not jump at x[1], x[n-2]
    left[-1, -3:] = -1 / h[-2], 1 / h[-2] + 1 / h[-1], -1 / h[-1]
    second = np.linalg.solve(left, right)
    at = np.clip(at, x[0], x[-1])
    i = np.clip(np.searchsorted(x, at) - 1, 0, n - 2)
    a, step = ((x[i + 1] - at) / h[i])[:, None], h[i][:, None]               # (m, 1): share of the left knot
    eye, b = np.eye(n), 1 - a
    return a * eye[i] + b * eye[i + 1] + step ** 2 / 6 * ((a ** 3 - a) * second[i] + (b ** 3 - b) * second[i + 1])


def resize_relative(table, grid):
    """BEiT's relative table ((2g-1)^2 + 3, H) for another grid: the old offsets are spread geometrically over the new ones,
    near ones close together, and a cubic spline is read at every new offset; the last three rows are kept (F4.6)."""
    old, new = math.isqrt(len(table) - 3), 2 * grid - 1
    low, high = 1.01, 1.5                                                    # the ratio q: 1 + q + ... + q^(old // 2 - 1) = new // 2
    if not sum(low ** i for i in range(old // 2)) <= new // 2 <= sum(high ** i for i in range(old // 2)):
        raise ValueError(f"relative positions of {(old + 1) // 2} patches a side cannot be stretched to {grid}: choose a size between")
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if sum(q ** i for i in range(old // 2)) > new // 2 else (q, high)
    side = np.cumsum([q ** i for i in range(old // 2)])
    matrix = torch.from_numpy(cubic(np.concatenate([-side[::-1], [0], side]), np.arange(-(new // 2), new // 2 + 1.0)))    # (new, old)
    square = table[:-3].double().view(old, old, -1)
    return torch.cat([torch.einsum("ia,jb,abh->ijh", matrix, matrix, square).flatten(0, 1).to(table), table[-3:]])


def resize_positions(table, grid):
    """ViT's positions (1 + g * g, D) for another grid, bicubic; the class token's row is kept (F4.6)."""
    old = math.isqrt(len(table) - 1)
    square = table[1:].view(1, old, old, -1).permute(0, 3, 1, 2)             # (1, D, g, g)
    square = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], square.flatten(2)[0].T])


# ------------------------------------------------------------------------------------------------------------------
# A source becomes a model
# ------------------------------------------------------------------------------------------------------------------

def fit(source, model, allow=()):
    """A source's tensors for this model (on "meta" is enough): position tables resized, a tied decoder filled in.
    -> (weights, {missing name: why}). ValueError on the first thing that is not explained and not named by allow."""
    own, config, weights = model.state_dict(), model.config, dict(source.weights)
    grid, named = config.image_size // config.patch_size, lambda name: any(fnmatch.fnmatchcase(name, p) for p in allow)
    if config.tied or source.fields.get("tied") and "mlm_head.bias" in weights and "text.words.weight" in weights:
        weights["mlm_head.weight"] = weights.get("text.words.weight")        # an untied decoder starts where the tied one was
    for name, tensor in weights.items():
        if name == "vision.positions" and len(tensor) != grid ** 2 + 1:
            weights[name] = resize_positions(tensor, grid)
        if name.endswith(".relative") and len(tensor) != (2 * grid - 1) ** 2 + 3:
            weights[name] = resize_relative(tensor, grid)
    missing = {name: next((why for pattern, why in source.new.items() if re.fullmatch(pattern, name)), "named by --allow_missing"
                          if named(name) else "no source holds this part" if part(name) not in source.parts else "") for name in own
               if name not in weights}
    strange = [name for name, ours, why in source.notes if not why and not own.keys() >= set(ours or ["?"]) and not named(name)]
    weights = {name: tensor for name, tensor in weights.items() if name in own}
    misfit = [name for name, tensor in weights.items() if tensor.shape != own[name].shape]
    if misfit:
        raise ValueError(f"{source.title}: {misfit[0]} is {tuple(weights[misfit[0]].shape)} there and {tuple(own[misfit[0]].shape)} in "
                         f"this model; repeat its model settings")
    if strange or not all(missing.values()):
        lost = [name for name, why in missing.items() if not why]
        raise ValueError(f"{source.title}: {len(strange)} tensors unknown, {len(lost)} missing, among them {', '.join(strange[:3] + lost[:3])}; "
                         f"name them with --allow_missing to go on without")
    return weights, missing


def initialise(model, source):
    """Loads a source into a model that was just made (train.py --init, --init_text, --init_vision) -> one line about it."""
    weights, missing = fit(source, model)
    model.load_state_dict(weights, strict=False)
    return f"{len(weights)} tensors from {source.title}; new: {', '.join(sorted({part(name) for name in missing})) or 'nothing'}"


def fresh(config, missing):
    """Newly initialised tensors for the names in `missing`. Towers that lack nothing are built without layers, words without
    rows: they take no memory."""
    parts = {part(name) for name in missing}
    empty = {f"{tower}_layers": 0 for tower in ("vision", "text", "fusion") if tower not in parts}
    torch.manual_seed(0)
    made = CCLM(replace(config, **empty | ({} if parts & {"text", "mlm_head"} else {"vocabulary": 1}))).state_dict()
    return {name: made[name] for name in missing}


def report(source, missing, made):
    """The key report: a line for every kind of tensor, counted over layers."""
    first = lambda t: t.flatten()[0].item()
    how = {name: f"all {first(t):.3g}" if (t == first(t)).all() else f"normal, deviation {t.std().item():.2g}" for name, t in made.items()}
    lines = [f"{name} -> used as {', '.join(ours)}" if not why and ours else f"{name} -> unused: {why or 'named by --allow_missing'}" for name, ours, why in source.notes]
    lines += [f"missing {name} -> {how[name]}: {why}" for name, why in missing.items()]
    counts = collections.Counter(re.sub(r"\.\d+\.", ".*.", line) for line in lines)
    used = sum(bool(ours and not why) for _, ours, why in source.notes)
    return [f"{count:4} {line}" for line, count in counts.items()] + [
        f"{len(source.notes)} tensors: {used} used, {len(source.notes) - used} unused; {len(missing)} of the model's missing, initialised as said"]


def import_sources(paths, changes=MappingProxyType({}), every_second=False, allow=()):
    """Published files -> (a checkpoint's dict, the report). What no source says is as in the presets base and large: six
    fusion layers, heads 64 wide. changes: fields of Config that override what was read."""
    source = read_sources(paths, every_second)
    width = source.fields["width"]
    base = {f"{t}_{k}": v for t in ("vision", "text", "fusion") for k, v in (("heads", max(1, width // 64)), ("hidden", 4 * width))}
    config = build("base", **base | source.fields | changes)
    with torch.device("meta"):
        model = CCLM(config)
    weights, missing = fit(source, model, allow)
    made = fresh(config, missing) if missing else {}
    if source.tokenizer and data.Tokenizer(source.tokenizer).size != config.vocabulary:
        raise ValueError(f"the tokenizer has {data.Tokenizer(source.tokenizer).size:,} words, the model {config.vocabulary:,}: not its own")
    state = {"model": {name: weights.get(name, made.get(name)) for name in model.state_dict()}, "step": 0, "tokenizer": source.tokenizer,
             "config": {"model": asdict(config), "train": {"init": source.title}}}
    return state, report(source, missing, made) + [f"{name:16}{value}" for name, value in asdict(config).items()]


def load_weights(model, weights, source):
    """model.load_state_dict, but a misfit is one line: ValueError that names the first tensor that is missing or has
    another shape."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        ours, theirs = (tuple(d[name].shape) if name in d else "absent" for d in (own, weights))
        if ours != theirs:
            raise ValueError(f"{source} does not fit this model: {name} is {theirs} there and {ours} here; repeat its "
                             f"--preset and model settings")
    model.load_state_dict(weights)


def load_model(path):
    """A checkpoint's model, with its own Config -> (CCLM, the whole dict). ValueError in one line when it cannot be."""
    state = read_checkpoint(path)
    try:
        model = CCLM(Config(**state["config"]["model"]))
    except TypeError as error:
        raise ValueError(f"{path} was saved by another version of this program ({error})") from None
    load_weights(model, state["model"], path)
    return model, state


# ------------------------------------------------------------------------------------------------------------------
# Export, and the command line
# ------------------------------------------------------------------------------------------------------------------

CARD = """# CCLM: cross-view language model
"""


def text_encoder(state, config):
    """(config.json, tensors) of the text encoder under the names of transformers' XLMRobertaModel, which counts positions from 2."""
    w = {name.removeprefix("text."): t for name, t in state.items() if name.startswith("text.")}
    rows = w["positions.weight"][config.offset:]                             # (longest, D)
    w["positions.weight"] = torch.cat([torch.zeros_like(rows[:1]).expand(2, -1), rows])
    w["kind"] = w["kind"][None]                                              # (D,) -> (1, D)
    def named(name):
        for their, our in BERT.items():
            name = name.replace(our, their)
        return name
    return {"architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta", "hidden_size": config.width, "vocab_size": config.vocabulary,
            "num_hidden_layers": config.text_layers, "num_attention_heads": config.text_heads, "intermediate_size": config.text_hidden,
            "max_position_embeddings": len(w["positions.weight"]), "type_vocab_size": 1, "layer_norm_eps": config.text_eps,
            "hidden_act": "gelu", "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1,
            "bos_token_id": 0, "eos_token_id": 2}, {named(name): t for name, t in w.items()}


def export(path, folder):
    """A checkpoint -> folder/{model.safetensors, config.json, sentencepiece.bpe.model, README.md} and folder/text_encoder/."""
    state, folder = read_checkpoint(path), pathlib.Path(folder)
    config = Config(**state["config"]["model"])
    own = {name: t for name, t in state["model"].items() if name != "mlm_head.weight" or not config.tied}
    for place, (settings, tensors) in ((folder, (asdict(config), own)), (folder / "text_encoder", text_encoder(own, config))):
        place.mkdir(parents=True, exist_ok=True)
        write_safetensors(place / "model.safetensors", tensors)
        (place / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        if state["tokenizer"]:
            (place / "sentencepiece.bpe.model").write_bytes(state["tokenizer"])
    (folder / "README.md").write_text(CARD)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="what a checkpoint holds")
    show.add_argument("ckpt", nargs="?", default="out/ckpt.pt", help="(default: %(default)s)")
    take = commands.add_parser("import", help="published files to a checkpoint")
    take.add_argument("sources", nargs="+", help="files or folders; a later one replaces the parts of earlier ones")
    take.add_argument("--out", type=pathlib.Path, required=True, help="the checkpoint to write")
    take.add_argument("--every_second", action="store_true", help="XLM-R's layers 1, 3, 5 ... as text and fusion, as CCLM-3M/4M (F4.5)")
    take.add_argument("--allow_missing", nargs="+", default=[], metavar="NAME", help="tensors, theirs or ours, to do without; * is any text")
    for name in ("vision_heads", "text_heads", "fusion_heads", "image_size"):
        take.add_argument("--" + name, type=int, help="(default: as in the source)")
    give = commands.add_parser("export", help="a checkpoint to a folder of safetensors")
    give.add_argument("ckpt")
    give.add_argument("folder")
    args = parser.parse_args(argv if argv[:1] and argv[0] in (*commands.choices, "-h", "--help") else ["show", *argv])
    try:
        if args.command == "import":
            changes = {name: value for name, value in vars(args).items() if value and name in Config.__dataclass_fields__}
            state, lines = import_sources(args.sources, changes, args.every_second, args.allow_missing)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(args.out, state)
            print("\n".join(lines), f"wrote {args.out}", sep="\n")
        elif args.command == "export":
            export(args.ckpt, args.folder)
        else:
            model, state = load_model(args.ckpt)
            print(f"step {state['step']}, {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {model.config.vocabulary:,}")
            print("\n".join(f"  {name:16}{value}" for name, value in state["config"]["model"].items()))
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
