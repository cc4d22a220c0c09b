"""What published files call their tensors, and which tensors of ours they become.

One telling name shows what a file is. Its Layout renames the tensors by a table, says why some are
not used, and adds what shapes cannot show: LayerNorm's epsilon, the offset of positions, a tied
decoder. A CCLM file has two Layouts, one of TEXTS and one of IMAGES. A tensor of CCLM-X2VLM:

    text_encoder.encoder.layer.3.attention.output.LayerNorm.bias    in the file
    text.        encoder.layer.3.attention.output.LayerNorm.bias    by Layout.rename
    text.        encoder.layer.3.norm1.bias             attention.output.LayerNorm -> norm1  (BERT)
    text.        layers.3.norm1.bias                    encoder.layer -> layers  (BERT)

A table replaces substrings, its first entry first. So a longer one stands before one it contains:
"output.LayerNorm -> norm2" alone would turn this name into text.layers.3.attention.norm2.bias.
"""
import collections
import fnmatch
import math
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# Tables of names: {their substring: ours}, in this order
# --------------------------------------------------------------------------------------------------

BERT = {
    "attention.self.query": "attention.q", "attention.self.key": "attention.k",
    "attention.self.value": "attention.v", "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "norm1", "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down", "output.LayerNorm": "norm2",
    "embeddings.word_embeddings": "token_embedding", "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings.weight": "token_type", "embeddings.LayerNorm": "norm",
    "encoder.layer": "layers"}
FUSION = {                                                # layers of BERT with cross-attention
    "crossattention.self.query": "cross.q", "crossattention.self.key": "cross.k",
    "crossattention.self.value": "cross.v", "crossattention.output.dense": "cross.out",
    "crossattention.output.LayerNorm": "cross_norm"} | BERT
MLM_HEAD = {"predictions.": "", "transform.": "", "decoder.": "",
            "LayerNorm": "norm", "layer_norm": "norm"}
VIT = {
    "patch_embed.proj": "patches", "cls_token": "class_token", "pos_embed": "positions",
    "blocks": "layers", "attn.proj": "attention.out", "attn.": "attention.",
    "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
BEIT = VIT | {
    "q_bias": "q.bias", "v_bias": "v.bias", "gamma_": "layer_scale", "fc_norm": "norm",
    "relative_position_bias_table": "relative_position_bias"}
CLIP = {                                                  # transformers, and official CCLM code
    "embeddings.": "", "patch_embedding": "patches", "patch_embed": "patches",
    "class_embedding": "class_token", "position_embedding.weight": "positions",
    "pos_embed.weight": "positions", "pre_layrnorm": "pre_norm", "post_layernorm": "norm",
    "encoder.layers": "layers", "self_attn": "attention", "_proj": "", "layer_norm": "norm",
    "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
HEADS = {"vision_proj": ("vision_proj", {}), "text_proj": ("text_proj", {}),
         "itm_head": ("itm_head", {}), "temp": ("temperature", {})}
STACK = HEADS | {                                         # text and fusion layers in one stack
    "text_encoder.cls.": ("mlm_head.", MLM_HEAD),
    "text_encoder.bert.": ("text.", FUSION), "text_encoder.": ("text.", FUSION)}

# --------------------------------------------------------------------------------------------------
# Layouts. Patterns are fnmatch's: * is any text
# --------------------------------------------------------------------------------------------------

class Layout(NamedTuple):
    title: str
    signs: tuple = ()               # patterns of a tensor's "name rows", as "class_embedding 768"
    rename: dict = {}               # {their prefix: (our prefix, table)}
    fields: dict = {}               # of model.Config: what shapes cannot show
    parts: tuple = ()               # parts of our model that such a file must hold completely ...
    new: dict = {}                  # ... except {pattern of our name: why it may be missing}
    unused: dict = {}               # {pattern of their name or of ours: why it is not used}


PARTS = ("vision", "text", "fusion", "vision_proj", "text_proj", "itm_head", "temperature")
UNUSED = {                                                # in every layout
    "*position_ids": "positions are counted", "head.*": "a classifier of its own task",
    "*relative_position_index": "computed from the grid",
    "*pooler.*": "states are used as they are", "bbox_head.*": "region losses are out of scope"}
WORD_ROWS = ("mlm_head.weight", "mlm_head.bias")          # one row, one number for each word
ENGLISH = "for English words, which XLM-R's replace"       # X2-VLM models/xvlm.py:1073-1158
TOKEN_TYPES = "text_encoder.*embeddings.token_type_embeddings.weight"

# CCLM-X2VLM, X2VLM: official code, X2-VLM models/xvlm.py:960-1204 and models/beit2.py. CCLM-3M/4M:
# official code, CCLM models/xvlm.py:204-336; its positions begin at 0 (models/xbert.py:183).
XLMR = Layout(
    "XLM-R", ("encoder.layer.0.attention.self.query.weight *",
              "roberta.encoder.layer.0.attention.self.query.weight *"),
    {"lm_head.": ("mlm_head.", MLM_HEAD), "roberta.": ("text.", BERT), "": ("text.", BERT)},
    fields={"text_eps": 1e-5, "offset": 2, "tied": True}, parts=("text",))
EVERY_SECOND = XLMR._replace(                             # official code, CCLM models/xvlm.py:219
    fields=XLMR.fields | {"offset": 0, "fusion_eps": 1e-5}, parts=("text", "fusion"),
    new={"fusion.*.cross*": "XLM-R has no cross-attention"},
    unused={"*encoder.layer.*[02468].*": "every second layer was asked for"})
X2VLM = Layout(
    "CCLM-X2VLM", ("cross_encoder.encoder.layer.0.*",),
    HEADS | {"text_encoder.": ("text.", BERT), "cross_encoder.": ("fusion.", FUSION),
             "mlm_head.": ("mlm_head.", MLM_HEAD), "cls_head.": ("task_head.", {})},
    fields={"text_eps": 1e-5, "offset": 2, "fusion_eps": 1e-12, "tied": False, "pool": "first"},
    parts=PARTS)
FINE_TUNED = X2VLM._replace(                              # X2-VLM models/model_classification.py
    title="Fine-tuned CCLM-X2VLM", parts=("vision", "text", "fusion", "task_head"))
TASK_OF_CLASSES = {3: "xvnli", 2: "marvl"}                # rows of cls_head.3.weight
TEXTS = (
    X2VLM,
    Layout("English X2VLM", (f"{TOKEN_TYPES} 2",), STACK,                # BERT has two token types
           fields={"fusion_eps": 1e-12, "tied": False, "pool": "first"},
           parts=tuple(name for name in PARTS if name != "text") + ("mlm_head",),
           new=dict.fromkeys(WORD_ROWS, ENGLISH),
           unused=dict.fromkeys(("text.*", *WORD_ROWS), ENGLISH)),
    Layout("CCLM-3M/4M", (f"{TOKEN_TYPES} 1",), STACK,                   # XLM-R has one
           fields={"text_eps": 1e-5, "offset": 0, "fusion_eps": 1e-5, "tied": True,
                   "pool": "first"}, parts=PARTS),
    XLMR)
IMAGES = (
    Layout("CLIP", ("*class_embedding *",),
           {"vision_model.": ("vision.", CLIP), "": ("vision.", CLIP)},
           fields={"vision": "clip", "vision_eps": 1e-5}, parts=("vision",), unused=dict.fromkeys(
               ("text_model.*", "text_projection*", "visual_projection*", "logit_scale*"),
               "the rest of CLIP")),
    Layout("BEiT-2", ("blocks.0.gamma_1 *",), {"": ("vision.", BEIT)},
           fields={"vision": "beit2", "vision_eps": 1e-6}, parts=("vision",),
           new={"vision.norm.*": "no fc_norm in that file"},
           unused={"norm.*": "patches have fc_norm instead"} | dict.fromkeys(
               ("mask_token", "lm_head.*", "cls_pt_layers.*"), "pre-training's own")),
    Layout("ViT", ("blocks.0.attn.qkv.bias *",), {"": ("vision.", VIT)},
           fields={"vision": "vit", "vision_eps": 1e-6}, parts=("vision",)),
    Layout("Swin", ("layers.0.blocks.0.attn.qkv.bias *",),
           new={"vision.*": "Swin is out of scope; name a ViT of this width too"},
           unused=dict.fromkeys(("layers.*", "patch_embed.*", "norm.*"), "Swin is out of scope")))
NONE = Layout("")


def part_of(name):
    """ "text.layers.0.norm1.bias" -> "text": the part of our model that a tensor belongs to."""
    return name.split(".")[0]


def first_match(patterns, *names):
    """The value of the first pattern that matches one of the names; "" if none does."""
    for pattern, value in patterns.items():
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            return value
    return ""


def recognise(family, tensors):
    """The first Layout of TEXTS or IMAGES with a sign among the tensors; NONE if there is none."""
    rows = [f"{name.removeprefix('vision_encoder.')} {tensor.shape[:1].numel()}"
            for name, tensor in tensors.items()]
    for layout in family:
        if first_match(dict.fromkeys(layout.signs, "found"), *rows):
            return layout
    return NONE


# --------------------------------------------------------------------------------------------------
# One published file -> a Source
# --------------------------------------------------------------------------------------------------

class Note(NamedTuple):
    """What became of one tensor of a file."""
    name: str                       # in the file
    ours: list                      # our names: one; three for a joint q, k, v; none if unknown
    unused: str                     # why it is not used; "" if it is used


class Source(NamedTuple):
    """One or several files of weights under our names. parts, new: as in Layout."""
    title: str
    weights: dict                   # {our name: tensor}
    notes: list                     # of Note
    fields: dict                    # of model.Config
    parts: tuple
    new: dict
    tokenizer: bytes | None = None  # a sentencepiece model
    task: str | None = None         # the benchmark that task_head is for, if there is one


def translate(tensors, every_second=False):
    """The tensors of one published file -> Source. ValueError if they cannot be understood.
    every_second: of XLM-R's layers 1, 3, 5 ... the lower half are text, the upper half fusion."""
    texts = recognise(TEXTS, tensors)
    images = recognise(IMAGES, tensors)
    if texts is NONE and images is NONE:
        raise ValueError(f"names like {', '.join(sorted(tensors)[:3])} are none of "
                         f"{', '.join(layout.title for layout in TEXTS + IMAGES)}")
    if texts is XLMR and every_second:
        texts = EVERY_SECOND
    if texts is X2VLM and "cls_head.3.weight" in tensors:
        texts = FINE_TUNED
    task = task_of(texts, tensors)
    text_layers, step = division_of_stack(texts, tensors)
    blocks = len(layer_numbers(r"blocks\.(\d+)\.", tensors))
    weights = {}
    notes = []
    for full_name, tensor in sorted(tensors.items()):
        # In a CCLM file, "vision_encoder.blocks.0.norm1.bias" is BEiT's "blocks.0.norm1.bias".
        name = full_name.removeprefix("vision_encoder.")
        layout = images if name != full_name or texts is NONE else texts
        ours = [divide_stack(new, text_layers, step) for new in our_names(name, layout, blocks)]
        unused = first_match(UNUSED | layout.unused, name, *ours)
        # One tensor under two names, as a decoder's bias in CCLM's files, is used once.
        if not unused and any(new in weights for new in ours):
            if not torch.equal(weights[ours[0]], tensor):
                raise ValueError(f"{full_name}: another tensor with different numbers is {ours[0]}")
            unused = f"the same numbers as {ours[0]}"
        notes.append(Note(full_name, ours, unused))
        if not unused:
            weights |= our_tensors(tensor, ours)
    title = " with ".join(layout.title for layout in (texts, images) if layout.title)
    fields = fields_from_shapes(weights, title) | texts.fields | images.fields
    return without_tied_decoder(Source(title, weights, notes, fields, texts.parts + images.parts,
                                       texts.new | images.new, task=task))


def task_of(layout, tensors):
    """The benchmark that a file was fine-tuned on, by the number of its classes, or None."""
    if layout is not FINE_TUNED:
        return None
    classes = len(tensors["cls_head.3.weight"])
    if classes not in TASK_OF_CLASSES:
        raise ValueError(f"its cls_head has {classes} classes, which is no benchmark here")
    return TASK_OF_CLASSES[classes]


def layer_numbers(pattern, names):
    """The numbers that a pattern with one group finds in some names, as a set."""
    return {int(number) for name in names for number in re.findall(pattern, name)}


def division_of_stack(layout, tensors):
    """For a file with text and fusion layers in one stack -> (how many of ours are text layers,
    step), where ours are every step-th layer of the file. (None, 1) for another file."""
    if layout is EVERY_SECOND:
        layers = len(layer_numbers(r"layer\.(\d+)\.", tensors))
        if layers % 4:
            raise ValueError(f"--every_second needs a multiple of 4 layers, and here are {layers}")
        return layers // 4, 2
    # CCLM-3M/4M and X2VLM: the lowest layer with cross-attention is the first fusion layer.
    crossed = layer_numbers(r"^text_encoder.*layer\.(\d+)\.crossattention", tensors)
    return min(crossed, default=None), 1


def our_names(name, layout, blocks):
    """The name of a tensor in a file -> our names (the top of this file shows how).
    blocks: the number of layers of the file's image encoder."""
    prefix = next((prefix for prefix in layout.rename if name.startswith(prefix)), None)
    if prefix is None:
        return []
    our_prefix, table = layout.rename[prefix]
    rest = name[len(prefix):]
    for theirs, ours in table.items():
        rest = rest.replace(theirs, ours)
    # Pre-trained BEiT has one table for all layers: each of ours gets it, as in the official code.
    if rest == "rel_pos_bias.relative_position_bias":
        return [f"vision.layers.{i}.attention.relative_position_bias" for i in range(blocks)]
    # "layers.0.attention.qkv.weight" is our q, k and v, one above the other.
    if ".qkv." in rest:
        return [our_prefix + rest.replace("qkv", letter) for letter in "qkv"]
    return [our_prefix + rest]


def divide_stack(name, text_layers, step):
    """With 6 text layers, text.layers.7.norm1.bias -> fusion.layers.1.norm1.bias. If step is 2,
    layer 7 is our fourth: -> text.layers.3.norm1.bias. If text_layers is None: the name itself."""
    found = re.fullmatch(r"text\.layers\.(\d+)\.(.*)", name)
    if text_layers is None or not found:
        return name
    layer = int(found[1]) // step
    if layer < text_layers:
        return f"text.layers.{layer}.{found[2]}"
    return f"fusion.layers.{layer - text_layers}.{found[2]}"


def our_tensors(tensor, names):
    """A tensor of a file -> {our name: tensor} in fp32. One that is fp32 still maps the file."""
    pieces = [tensor] * len(names)
    if len(names) == 3 and ".attention.q." in names[0]:
        pieces = tensor.chunk(3)                                 # (3D, ...) -> three of (D, ...)
    weights = {}
    for name, piece in zip(names, pieces):
        if name in ("vision.class_token", "vision.positions", "text.token_type"):
            piece = piece.squeeze()                              # (1, 1, D) -> (D,)
        weights[name] = piece.float()
    return weights


def without_tied_decoder(source):
    """Leaves out a masked LM decoder that is the word embedding; fill_in_decoder puts it back. A
    decoder with other numbers makes the model untied."""
    decoder = source.weights.get("mlm_head.weight")
    words = source.weights.get("text.token_embedding.weight")
    if not source.fields.get("tied") or decoder is None or words is None:
        return source
    if not torch.equal(decoder, words):
        return source._replace(fields=source.fields | {"tied": False})
    weights = {name: t for name, t in source.weights.items() if name != "mlm_head.weight"}
    reasons = {"mlm_head.weight": "the same numbers as text.token_embedding.weight"}
    return source._replace(weights=weights, notes=with_reasons(source.notes, reasons))


def with_reasons(notes, reasons):
    """Notes in which some tensors become unused. reasons: {our name, or part of our model: why}."""
    changed = []
    for note in notes:
        if note.ours and not note.unused:
            name = note.ours[0]
            note = note._replace(unused=reasons.get(name) or reasons.get(part_of(name), ""))
        changed.append(note)
    return changed


def fields_from_shapes(weights, title):
    """{field of model.Config: value}, as far as shapes show it; heads are taken to be 64 wide."""
    fields = {}
    if "text_proj.weight" in weights:
        fields["embedding"] = len(weights["text_proj.weight"])
    try:
        for tower in ("vision", "text", "fusion"):
            layers = layer_numbers(rf"^{tower}\.layers\.(\d+)\.", weights)
            if layers:
                mlp_width, width = weights[f"{tower}.layers.0.mlp.up.weight"].shape
                fields |= {"width": width, f"{tower}_layers": len(layers),
                           f"{tower}_mlp": mlp_width, f"{tower}_heads": max(1, width // 64)}
        if "vision_layers" in fields:
            fields |= image_fields(weights)
        if "text_layers" in fields:
            fields["vocabulary"] = len(weights["text.token_embedding.weight"])
            fields["positions"] = len(weights["text.positions.weight"])
    except KeyError as error:
        raise ValueError(f"{title}, but without {error}: its architecture cannot be read") from None
    return fields


def image_fields(weights):
    """Patch size and image size; a relative position bias table also shows the number of heads."""
    fields = {"patch_size": weights["vision.patches.weight"].shape[-1], "stem": False}
    table = weights.get("vision.layers.0.attention.relative_position_bias")
    if table is None:
        grid = grid_of_positions(weights["vision.positions"])
    else:
        grid = grid_of_bias_table(table)
        fields["vision_heads"] = table.shape[1]
    return fields | {"image_size": grid * fields["patch_size"]}


def merge(a, b):
    """Two sources as one: the parts that b holds replace those of a."""
    widths = [source.fields["width"] for source in (a, b) if "width" in source.fields]
    if len(set(widths)) == 2:
        raise ValueError(f"{a.title} has width {widths[0]}, {b.title} {widths[1]}: one fusion "
                         f"encoder reads both, so they must be equal")
    replaced = set(map(part_of, b.weights))
    weights = {name: tensor for name, tensor in a.weights.items() if part_of(name) not in replaced}
    new = {pattern: why for pattern, why in a.new.items() if part_of(pattern) not in replaced}
    fields = a.fields | b.fields
    if "mlm_head" not in replaced and "tied" in a.fields:       # a setting of the head that stays
        fields["tied"] = a.fields["tied"]
    notes = with_reasons(a.notes, dict.fromkeys(replaced, "another source holds it")) + b.notes
    tokenizer = b.tokenizer if "text" in replaced else a.tokenizer
    return Source(f"{a.title} + {b.title}", weights | b.weights, notes, fields, a.parts + b.parts,
                  new | b.new, tokenizer, b.task or a.task)


# --------------------------------------------------------------------------------------------------
# Position tables for another image size
# --------------------------------------------------------------------------------------------------

def grid_of_positions(table):
    """ViT's position table (1 + g * g, D) -> g, the number of patches a side."""
    grid = math.isqrt(max(len(table) - 1, 0))
    if len(table) != grid ** 2 + 1:
        raise ValueError(f"a table of {len(table)} rows is not of a square grid of patches")
    return grid


def grid_of_bias_table(table):
    """BEiT's relative position bias table ((2g-1)^2 + 3, H) -> g, the number of patches a side."""
    grid = (math.isqrt(max(len(table) - 3, 0)) + 1) // 2
    if len(table) != (2 * grid - 1) ** 2 + 3 or grid < 3 or table.ndim != 2:
        raise ValueError(f"a relative table of shape {tuple(table.shape)} is not of a square grid")
    return grid


def resize_positions(table, grid):
    """ViT's position table (1 + g * g, D) for another grid, bicubic. The class token is kept."""
    old = grid_of_positions(table)
    square = table[1:].view(1, old, old, -1).permute(0, 3, 1, 2)             # (1, D, g, g)
    square = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], square.flatten(2)[0].T])                    # (1 + grid * grid, D)


def resize_bias_table(table, grid):
    """BEiT's relative position bias table ((2g-1)^2 + 3, H) for another grid, as in official code
    (X2-VLM models/beit2.py). Its last three rows, those of the class token, are kept."""
    # A row stands for an offset between two patches: -13 ... 13 in y and in x if g is 14. A grid of
    # 24 has -23 ... 23. The old offsets are spread over this range, densest at 0: they come to lie
    # at 0, 1, 1 + q, 1 + q + q^2 ... 23 and at their negatives. Bisection finds q.
    old = grid_of_bias_table(table)
    powers = np.arange(old - 1)
    low = 1.01
    high = 1.5
    if not (low ** powers).sum() <= grid - 1 <= (high ** powers).sum():
        raise ValueError(f"relative positions of {old} patches cannot be spread over {grid}: "
                         f"choose an image size that is larger, but not by so much")
    while high - low > 1e-6:
        q = (low + high) / 2
        if (q ** powers).sum() > grid - 1:
            high = q
        else:
            low = q
    side = np.cumsum(q ** powers)                                            # (g-1,)
    knots = np.concatenate([-side[::-1], [0], side])                         # (2g-1,)
    # A cubic spline through the old rows is read at every new offset, along y and along x.
    offsets = np.arange(1.0 - grid, grid)                                   # (2 grid - 1,)
    spline = torch.from_numpy(spline_matrix(knots, offsets))                # (2 grid - 1, 2g-1)
    square = table[:-3].double().view(2 * old - 1, 2 * old - 1, -1)          # (2g-1, 2g-1, H)
    square = torch.einsum("ia,jb,abh->ijh", spline, spline, square)
    return torch.cat([square.flatten(0, 1).to(table), table[-3:]])        # ((2 grid - 1)^2 + 3, H)


def spline_matrix(knots, at):
    """The matrix (m, n) that turns values at `knots` (n,) into their cubic spline at `at` (m,),
    not-a-knot at both ends, as SciPy's RectBivariateSpline is along one axis."""
    # Between two knots the spline is a cubic, known from its values and second derivatives at both.
    # The second derivatives solve  left @ derivatives = right @ values.
    n = len(knots)
    gaps = np.diff(knots)                                                    # (n-1,)
    left = np.zeros((n, n))
    right = np.zeros((n, n))
    for i in range(1, n - 1):                    # both cubics have one slope at an inner knot
        left[i, i - 1:i + 2] = gaps[i - 1] / 6, (gaps[i - 1] + gaps[i]) / 3, gaps[i] / 6
        right[i, i - 1:i + 2] = 1 / gaps[i - 1], -1 / gaps[i - 1] - 1 / gaps[i], 1 / gaps[i]
    for row, i in ((0, 0), (-1, n - 3)):         # no jump of the third derivative near the ends
        left[row, i:i + 3] = -1 / gaps[i], 1 / gaps[i] + 1 / gaps[i + 1], -1 / gaps[i + 1]
    values = np.eye(n)
    derivatives = np.linalg.solve(left, right)                               # (n, n)
    # A point between the knots i and i + 1 has shares a and b of their values.
    at = np.clip(at, knots[0], knots[-1])
    i = np.clip(np.searchsorted(knots, at) - 1, 0, n - 2)                    # (m,)
    gap = gaps[i][:, None]                                                   # (m, 1)
    a = (knots[i + 1] - at)[:, None] / gap
    b = 1 - a
    bend = (a ** 3 - a) * derivatives[i] + (b ** 3 - b) * derivatives[i + 1]
    return a * values[i] + b * values[i + 1] + gap ** 2 / 6 * bend           # (m, n)


# --------------------------------------------------------------------------------------------------
# A source in a model, and back
# --------------------------------------------------------------------------------------------------

def adapt_to_model(source, model, allow=()):
    """The tensors in the shapes of a model ("meta" is fine) -> (weights, {missing name: why}).
    ValueError for tensors that are neither explained nor named by a pattern of `allow`."""
    own = model.state_dict()
    weights = dict(source.weights)
    fill_in_decoder(weights, source, model.config)
    resize_tables(weights, model.config.image_size // model.config.patch_size)
    for name in sorted(own.keys() & weights.keys()):
        theirs = tuple(weights[name].shape)
        if theirs != own[name].shape:
            raise ValueError(f"{source.title} does not fit this model: {name} is {theirs} there, "
                             f"{tuple(own[name].shape)} here")
    # Tensors of ours that no file has: expected (source.new), allowed, of a part that none holds,
    # or lost.
    allowed = dict.fromkeys(allow, "named by --allow_missing")
    held = set(map(part_of, source.weights)) | set(source.parts)
    missing = {}
    for name in own:
        if name not in weights:
            other = "" if part_of(name) in held else "no source holds this part"
            missing[name] = first_match(source.new | allowed, name) or other
    lost = [name for name, why in missing.items() if not why]
    # Tensors of a file that have no name here, or a name that this model does not have.
    unknown = []
    for note in source.notes:
        known = note.unused or note.ours and own.keys() >= set(note.ours)
        if not known and not first_match(allowed, note.name):
            unknown.append(note.name)
    if unknown or lost:
        some = ", ".join(unknown[:3] + lost[:3])
        raise ValueError(f"{source.title}: {len(unknown)} tensors are unknown, {len(lost)} are "
                         f"missing, among them {some} (weights.py import has --allow_missing NAME)")
    return {name: tensor for name, tensor in weights.items() if name in own}, missing


def fill_in_decoder(weights, source, config):
    """A tied decoder is the word embedding. An untied model begins with it after a tied source."""
    words = weights.get("text.token_embedding.weight")
    if words is None or not (config.tied or source.fields.get("tied")):
        return
    if config.tied and "mlm_head.weight" in weights:
        raise ValueError(f"{source.title}: its masked LM has a decoder that is not its word "
                         f"embedding, so leave --tied out")
    weights.setdefault("mlm_head.weight", words)


def resize_tables(weights, grid):
    """Resizes the position tables that are not of a grid of this many patches a side."""
    for name, tensor in weights.items():
        if name == "vision.positions" and len(tensor) != grid ** 2 + 1:
            weights[name] = resize_positions(tensor, grid)
        if name.endswith(".relative_position_bias") and len(tensor) != (2 * grid - 1) ** 2 + 3:
            weights[name] = resize_bias_table(tensor, grid)


def report(source, weights, missing, made):
    """The key report: what became of every tensor, in one line for those that differ in the layer
    only. weights: what is used; made: {missing name: its new tensor}."""
    # Three kinds of lines: used as, unused because, missing and therefore new.
    lines = []
    for note in source.notes:
        if note.ours and not note.unused and weights.keys() >= set(note.ours):
            lines.append(f"{note.name} -> used as {', '.join(note.ours)}")
        else:
            lines.append(f"{note.name} -> unused: {note.unused or 'named by --allow_missing'}")
    used = sum(" -> used as " in line for line in lines)
    for name, why in missing.items():
        values = made[name].flatten()
        how = f"all {values[0]:.3g}" if (values == values[0]).all() else "random"
        lines.append(f"missing {name} -> {how}: {why}")
    # "layers.0.norm1.bias" and "layers.1.norm1.bias" become "   2 layers.*.norm1.bias".
    counts = collections.Counter(re.sub(r"\.\d+\.", ".*.", line) for line in lines)
    lines = [f"{count:4} {line}" for line, count in counts.items()]
    total = len(source.notes)
    return lines + [f"{source.title}: {total} tensors, {used} used; {len(missing)} missing"]


def text_encoder(weights, config):
    """(settings, tensors) of the text encoder as transformers' XLMRobertaModel has them."""
    tensors = {}
    for name, tensor in weights.items():
        if part_of(name) == "text":
            name = name.removeprefix("text.")
            for theirs, ours in BERT.items():                    # the table, read backwards
                name = name.replace(ours, theirs)
            tensors[name] = tensor
    token_type = tensors["embeddings.token_type_embeddings.weight"]
    tensors["embeddings.token_type_embeddings.weight"] = token_type[None]    # (D,) -> (1, D)
    # XLM-R counts positions from 2. A model that counts from 0 (CCLM-3M/4M) gets two empty rows.
    positions = tensors["embeddings.position_embeddings.weight"][config.offset:]
    positions = torch.cat([torch.zeros_like(positions[:2]), positions])
    tensors["embeddings.position_embeddings.weight"] = positions
    settings = {
        "model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"],
        "vocab_size": config.vocabulary, "hidden_size": config.width,
        "num_hidden_layers": config.text_layers, "num_attention_heads": config.text_heads,
        "intermediate_size": config.text_mlp, "hidden_act": "gelu",
        "max_position_embeddings": len(positions), "type_vocab_size": 1,
        "layer_norm_eps": config.text_eps, "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return settings, tensors
