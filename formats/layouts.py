"""What published files call things: their tensors under our names, in our shapes. weights.py opens the files.

A layout is recognised by one telling name. It renames by a table, says why a tensor is not used, and knows what shapes
do not tell: LayerNorm's epsilon, the offset of positions, a tied decoder. Sources: F1, F4.5-4.7, F6.

    CCLM-X2VLM, CCLM-3M/4M (6 + 6 layers in one stack), English X2VLM: each with any image encoder below in it
    XLM-R (transformers);  BEiT-2 (its authors', timm);  ViT and DeiT (timm);  CLIP's image side (transformers, CCLM)

    python -m formats.layouts         the layouts, and what each holds
"""
import collections
import fnmatch
import functools
import math
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------------------------
# The layouts
# ------------------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    title: str
    sign: str                           # pattern of "name [shape]" of a tensor by which the layout is known
    rename: dict                        # {prefix: (our prefix, {their piece: our piece, in this order})}
    fields: dict                        # of Config, what shapes do not say
    parts: tuple                        # of ours that it must hold whole ...
    new: dict = {}                      # ... but for these: {pattern of our name: why it may be missing}
    unused: dict = {}                   # {pattern of their name or of ours: why}, besides UNUSED


BERT = {"attention.self.query": "attention.q", "attention.self.key": "attention.k",
        "attention.self.value": "attention.v", "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "norm1", "intermediate.dense": "mlp.up", "output.dense": "mlp.down",
        "output.LayerNorm": "norm2", "embeddings.word_embeddings": "token_embedding",
        "embeddings.position_embeddings": "positions", "embeddings.token_type_embeddings.weight": "token_type",
        "embeddings.LayerNorm": "norm", "encoder.layer": "layers"}           # the export reads it backwards
FUSION = BERT | {"crossattention": "cross", "crossnorm1": "cross_norm"}      # what BERT's lines leave of crossattention
HEAD = {"predictions.": "", "transform.": "", "LayerNorm": "norm", "layer_norm": "norm", "decoder.": ""}
VIT = {"patch_embed.proj": "patches", "cls_token": "class_token", "pos_embed": "positions", "blocks": "layers",
       "attn": "attention", "attention.proj": "attention.out", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
BEIT = VIT | {"q_bias": "q.bias", "v_bias": "v.bias", "relative_position_bias_table": "relative_position_bias", "gamma_": "layer_scale",
              "fc_norm": "norm"}
CLIP = {"embeddings.": "", "patch_embedding": "patches", "patch_embed": "patches", "class_embedding": "class_token",
        "position_embedding.weight": "positions", "pos_embed.weight": "positions", "pre_layrnorm": "pre_norm",
        "post_layernorm": "norm", "encoder.layers": "layers", "self_attn": "attention", "_proj": "",
        "layer_norm": "norm", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}
SHARED = {name: (name, {}) for name in ("vision_proj", "text_proj", "itm_head")} | {"temp": ("temperature", {})}
STACK = SHARED | {"text_encoder.cls.": ("mlm_head.", HEAD), "text_encoder.bert.": ("text.", FUSION),
                  "text_encoder.": ("text.", FUSION)}
PARTS = ("vision", "text", "fusion", "vision_proj", "text_proj", "itm_head", "temperature")
KINDS = r"text_encoder\.(bert\.)?embeddings\.token_type_embeddings\.weight \[{}, .*"         # BERT has 2, XLM-R 1
UNUSED = {r".*position_ids": "positions are counted", r"bbox_head\..*": "region losses are out of scope",
          r".*pooler\..*": "states are used as they are", r"head\..*": "a classifier of its own task",
          r".*relative_position_index": "computed from the grid, and checked"}
WORDS = ("mlm_head.weight", "mlm_head.bias")                                 # one row, one number for each word
ENGLISH = "words of another language, left to XLM-R (F4.7)"
TEXTS = [
    Layout("CCLM-X2VLM", r"cross_encoder\.encoder\.layer\.0\..*",
           SHARED | {"text_encoder.": ("text.", BERT), "cross_encoder.": ("fusion.", FUSION),
                     "mlm_head.": ("mlm_head.", HEAD)},
           {"text_eps": 1e-5, "offset": 2, "fusion_eps": 1e-12, "tied": False, "pool": "first"}, PARTS),
    Layout("English X2VLM", KINDS.format(2), STACK, {"fusion_eps": 1e-12, "tied": False, "pool": "first"},
           tuple(p for p in PARTS if p != "text") + ("mlm_head",), {r"mlm_head\.(weight|bias)": ENGLISH},
           {r"text\..*|mlm_head\.(weight|bias)": ENGLISH}),
    Layout("CCLM-3M/4M", KINDS.format(1), STACK,
           {"text_eps": 1e-5, "offset": 0, "fusion_eps": 1e-5, "tied": True, "pool": "first"}, PARTS),
    Layout("XLM-R", r"(roberta\.)?encoder\.layer\.0\.attention\.self\.query\.weight .*",
           {"lm_head.": ("mlm_head.", HEAD), "roberta.": ("text.", BERT), "": ("text.", BERT)},
           {"text_eps": 1e-5, "offset": 2, "tied": True}, ("text",)),
]
IMAGES = [
    Layout("CLIP", r"(vision_model\.)?(embeddings\.)?class_embedding .*",
           {"vision_model.": ("vision.", CLIP), "": ("vision.", CLIP)}, {"vision": "clip", "vision_eps": 1e-5},
           ("vision",), {}, {r"(text_model|text_projection|visual_projection|logit_scale).*": "the rest of CLIP"}),
    Layout("BEiT-2", r"blocks\.0\.gamma_1 .*", {"": ("vision.", BEIT)}, {"vision": "beit2", "vision_eps": 1e-6},
           ("vision",), {r"vision\.norm\..*": "no fc_norm in that file"},
           {r"norm\..*": "patches have fc_norm instead (F1.5)",
            r"mask_token|lm_head\..*|cls_pt_layers\..*": "pre-training's own"}),
    Layout("ViT", r"blocks\.0\.attn\.qkv\.bias .*", {"": ("vision.", VIT)}, {"vision": "vit", "vision_eps": 1e-6},
           ("vision",)),
    Layout("Swin", r"layers\.0\.blocks\.0\.attn\.qkv\.bias .*", {}, {}, (),
           {r"vision\..*": "Swin is out of scope; name a ViT of this width too"},
           {r"(layers|patch_embed|norm)\..*": "Swin is out of scope"}),
]


# ------------------------------------------------------------------------------------------------------------------
# A source: one published file under our names
# ------------------------------------------------------------------------------------------------------------------

class Source(NamedTuple):
    title: str
    weights: dict                       # {our name: tensor}
    notes: list                         # of (their name, [our names], "" or why it is unused)
    fields: dict                        # of Config
    parts: tuple
    new: dict
    tokenizer: bytes | None = None      # a sentencepiece model


def part(name):
    return name.split(".")[0]


def why(patterns, *names):
    """The value of the first pattern that matches one of the names whole; "" when none does."""
    return next((reason for pattern, reason in patterns.items() for name in names if re.fullmatch(pattern, name)), "")


def layout_of(tensors):
    """One Layout for a whole file, put together from that of its texts and that of its images."""
    described = [f"{name.removeprefix('vision_encoder.')} {list(t.shape)}" for name, t in tensors.items()]
    known = [[x for x in family if any(re.fullmatch(x.sign, d) for d in described)][:1] for family in (TEXTS, IMAGES)]
    found = known[0] + known[1]
    if not found:
        raise ValueError(f"names like {', '.join(sorted(tensors)[:3])} are none of "
                         f"{', '.join(x.title for x in TEXTS + IMAGES)}")
    joined = lambda field: {k: v for x in found for k, v in getattr(x, field).items()}
    return Layout(" with ".join(x.title for x in found), "", joined("rename"), joined("fields"),
                  tuple(p for x in found for p in x.parts), joined("new"), UNUSED | joined("unused"))


LARGEST = {"image_size": 4096, "vision_layers": 1000, "text_layers": 1000, "fusion_layers": 1000}


def check_sizes(fields, where):
    """ValueError for a whole number that no model has."""
    for name, value in fields.items():
        least, most = int(name != "offset"), LARGEST.get(name, math.inf)
        if type(value) is int and not least <= value <= most:
            raise ValueError(f"{where}: {name} is {value}, but must be at least {least}"
                             + f" and at most {most}" * (most < math.inf))


def our_names(name, layout, split, step, layers):
    """Their name -> ours: [] unknown; three for a joint q, k, v; every layer's for BEiT's shared table (F4.6). split:
    so many layers of one stack, of which only every step-th is taken, are text, the rest fusion."""
    prefix = next((p for p in layout.rename if name.startswith(p)), None)
    if prefix is None:
        return []
    (ours, pieces), rest = layout.rename[prefix], name[len(prefix):]
    for their, our in pieces.items():
        rest = rest.replace(their, our)
    layer = re.fullmatch(r"layers\.(\d+)(\..*)", rest)
    if split and layer and ours == "text.":
        i = int(layer[1]) // step
        ours, i = ("text.", i) if i < split else ("fusion.", i - split)
        rest = f"layers.{i}{layer[2]}"
    if rest == "rel_pos_bias.relative_position_bias":
        return [f"vision.layers.{i}.attention.relative_position_bias" for i in range(layers)]
    return [ours + rest.replace("qkv", letter) for letter in ("qkv" if ".qkv." in rest else "q")]


def translate(tensors, every_second=False):
    """The tensors of one published file -> Source; ValueError where it cannot be understood. every_second: of XLM-R's
    layers 1, 3, 5 ... the lower half are text, the upper half fusion without cross-attention (F4.5)."""
    layout = layout_of(tensors)
    every_second = every_second and layout.title == "XLM-R"
    if every_second:
        layout = layout._replace(
            fields=layout.fields | {"offset": 0, "fusion_eps": 1e-5}, parts=("text", "fusion"),
            new={r"fusion\..*\.cross.*": "XLM-R has no cross-attention (F4.5)"},
            unused=UNUSED | {r".*encoder\.layer\.\d*[02468]\..*": "every second layer was asked for (F4.5)"})
    number = lambda pattern: {int(n) for name in tensors for n in re.findall(pattern, name)}
    layers = contiguous(number(r"(?:blocks|layer)\.(\d{1,9})\d*\."), layout.title)
    if every_second and layers % 4:
        raise ValueError(f"--every_second needs a number of layers that is a multiple of 4, and here are {layers}")
    crossed = number(r"^text_encoder.*layer\.(\d+)\.cross")
    split, step = (layers // 4, 2) if every_second else (min(crossed, default=0), 1)
    weights, notes = {}, []
    for full, tensor in sorted(tensors.items()):
        name = full.removeprefix("vision_encoder.")
        ours = our_names(name, layout, split, step, layers)
        reason = why(layout.unused, name, *ours)
        if not reason and any(new in weights for new in ours):
            if not torch.equal(weights[ours[0]], tensor):
                raise ValueError(f"{full} and another tensor both are our {ours[0]}, with different numbers")
            reason = f"the same numbers as {ours[0]}"
        notes.append((full, ours, reason))
        pieces = () if reason else tensor.chunk(3) if ".qkv." in name else [tensor] * len(ours)
        for new, piece in zip(ours, pieces):
            piece = piece.squeeze() if new in ("vision.class_token", "vision.positions", "text.token_type") else piece
            weights[new] = piece.float()                                     # of fp32: a no-op, still a map of the file
    fields = shapes(weights, layout.title) | layout.fields
    decoder, words = weights.get("mlm_head.weight"), weights.get("text.token_embedding.weight")
    if fields.get("tied") and decoder is not None and words is not None and not torch.equal(decoder, words):
        fields["tied"] = False                                               # its masked LM has a decoder of its own
    return Source(layout.title, weights, notes, fields, layout.parts, layout.new)


def contiguous(numbers, title):
    """How many layers there are, 1 where none has a number; ValueError when a number between is left out."""
    if numbers and max(numbers) + 1 > len(numbers):
        gap = min(set(range(len(numbers))) - numbers)
        raise ValueError(f"{title}: there is a layer {max(numbers)}, but no layer {gap}")
    return max(len(numbers), 1)


def shapes(w, title):
    """{field of Config: value}, as far as shapes tell; heads are 64 wide where no relative table tells their number."""
    found = {"embedding": len(w["text_proj.weight"])} if "text_proj.weight" in w else {}
    try:
        for tower in ("vision", "text", "fusion"):
            layers = {int(name.split(".")[2]) for name in w if name.startswith(tower + ".layers.")}
            if not layers:
                continue
            mlp_width, width = w[f"{tower}.layers.0.mlp.up.weight"].flatten(1).shape
            if found.setdefault("width", width) != width:
                raise ValueError(f"vision width {found['width']} is not text width {width}: one fusion encoder reads "
                                 f"both (F1.4)")
            found |= {f"{tower}_layers": contiguous(layers, f"{title}, {tower}"), f"{tower}_mlp": mlp_width,
                      f"{tower}_heads": max(1, width // 64)}
            if tower == "text":
                found |= {"vocabulary": len(w["text.token_embedding.weight"]), "positions": len(w["text.positions.weight"])}
            if tower == "vision":
                table, patch = w.get("vision.layers.0.attention.relative_position_bias"), w["vision.patches.weight"].shape[-1]
                if table is None:
                    grid = patches(w["vision.positions"])
                else:
                    grid, found["vision_heads"] = offsets(table), table.shape[1]
                found |= {"patch_size": patch, "image_size": grid * patch, "stem": False}
    except KeyError as error:
        raise ValueError(f"{title}, but without {error}: its architecture cannot be read") from None
    check_sizes(found, title)
    return found


def merge(a, b):
    """Two sources as one: b's parts replace a's. But XLM-R leaves a its masked LM head (F4.7), without what that has
    for each word when the words are others; where it has a head itself, other words take it."""
    if len({s.fields["width"] for s in (a, b) if "width" in s.fields}) == 2:
        raise ValueError(f"{a.title} has width {a.fields['width']}, {b.title} {b.fields['width']}: one fusion encoder "
                         f"reads both (F1.4)")
    ours, theirs = ({part(name) for name in s.weights} for s in (a, b))
    words = a.fields.get("vocabulary", b.fields.get("vocabulary"))
    others = "text" in theirs and words != b.fields.get("vocabulary")
    theirs -= set() if others or b.title != "XLM-R" else ours & {"mlm_head"}
    apart = {}                                                               # of a's head: {name: why it stays out}
    if "mlm_head" in ours - theirs and "text" in theirs:
        apart = {"mlm_head.weight": "tied to the words of another source"} if a.fields.get("tied") else {}
        apart |= dict.fromkeys(WORDS, f"for {words:,} other words") if others else {}
    lost = lambda s, gone: [(name, to, reason or ("another source holds it" if to and part(to[0]) in gone else ""))
                            for name, to, reason in s.notes]
    notes = [(name, to, reason or apart.get("".join(to[:1]), "")) for name, to, reason in lost(a, theirs)]
    weights = {n: t for n, t in a.weights.items() if part(n) not in theirs and n not in apart}
    weights |= {n: t for n, t in b.weights.items() if part(n) in theirs}
    fields = a.fields | {k: v for k, v in b.fields.items()
                         if k != "tied" or "tied" not in a.fields or "mlm_head" in theirs}
    new = {pattern: reason for pattern, reason in a.new.items() if pattern.split("\\")[0] not in theirs}
    new |= dict.fromkeys((re.escape(name) for name in WORDS), "the words are another source's") if others else {}
    return Source(f"{a.title} + {b.title}", weights, notes + lost(b, ours - theirs), fields,
                  a.parts + b.parts, new | b.new, b.tokenizer if "text" in theirs else a.tokenizer)


# ------------------------------------------------------------------------------------------------------------------
# Another resolution
# ------------------------------------------------------------------------------------------------------------------

def cubic(x, at):
    """The cubic spline through knots x (n,) ascending, not-a-knot at both ends, read at `at` (m,): a matrix (m, n) to
    multiply the values with. What SciPy's RectBivariateSpline does along one axis."""
    n, h = len(x), np.diff(x)
    left, right = np.zeros((2, n, n))                                        # left @ 2nd derivatives = right @ values
    for i in range(1, n - 1):
        left[i, i - 1:i + 2] = h[i - 1] / 6, (h[i - 1] + h[i]) / 3, h[i] / 6
        right[i, i - 1:i + 2] = 1 / h[i - 1], -1 / h[i - 1] - 1 / h[i], 1 / h[i]
    for row, i in ((0, 0), (-1, n - 3)):                                     # third derivative: no jump at x[1], x[n-2]
        left[row, i:i + 3] = -1 / h[i], 1 / h[i] + 1 / h[i + 1], -1 / h[i + 1]
    second, at, eye = np.linalg.solve(left, right), np.clip(at, x[0], x[-1]), np.eye(n)
    i = np.clip(np.searchsorted(x, at) - 1, 0, n - 2)
    a, step = ((x[i + 1] - at) / h[i])[:, None], h[i][:, None]               # (m, 1): share of the left knot
    b = 1 - a
    return a * eye[i] + b * eye[i + 1] + step ** 2 / 6 * ((a ** 3 - a) * second[i] + (b ** 3 - b) * second[i + 1])


def patches(table):
    """ViT's positions (1 + g * g, D) -> g."""
    grid = math.isqrt(max(len(table) - 1, 0))
    if len(table) != grid ** 2 + 1:
        raise ValueError(f"a table of {len(table)} rows is not of a square of patches and a class token")
    return grid


def offsets(table):
    """BEiT's relative table ((2g-1)^2 + 3, H) -> g."""
    grid = (math.isqrt(max(len(table) - 3, 0)) + 1) // 2
    if len(table) != (2 * grid - 1) ** 2 + 3 or grid < 3 or table.ndim != 2:
        raise ValueError(f"a relative table of shape {tuple(table.shape)} is not of a square of 3 x 3 patches or more")
    return grid


def resize_relative(table, grid):
    """BEiT's relative table ((2g-1)^2 + 3, H) for another grid (F4.6): the old offsets are spread over the new ones
    geometrically, densest at 0; a cubic spline is read at every new offset; the last three rows are kept."""
    old, new, ends = 2 * offsets(table) - 1, 2 * grid - 1, lambda q: sum(q ** i for i in range(old // 2))
    low, high = 1.01, 1.5                                                    # q: 1 + q + ... + q^(old//2 - 1) = new//2
    if not ends(low) <= new // 2 <= ends(high):
        raise ValueError(f"relative positions of {(old + 1) // 2} patches a side cannot be spread over {grid} (F4.6): "
                         f"choose an image size that is larger, but not by so much")
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if ends(q) > new // 2 else (q, high)
    side = np.cumsum(q ** np.arange(old // 2))
    matrix = torch.from_numpy(cubic(np.r_[-side[::-1], 0, side], np.arange(new) - new // 2.0))       # (new, old)
    square = torch.einsum("ia,jb,abh->ijh", matrix, matrix, table[:-3].double().view(old, old, -1))
    return torch.cat([square.flatten(0, 1).to(table), table[-3:]])           # (new^2 + 3, H)


def resize_positions(table, grid):
    """ViT's positions (1 + g * g, D) for another grid, bicubic; the class token's row is kept (F4.6)."""
    old = patches(table)
    square = table[1:].view(1, old, old, -1).permute(0, 3, 1, 2)             # (1, D, g, g)
    square = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], square.flatten(2)[0].T])                    # (1 + grid * grid, D)


# ------------------------------------------------------------------------------------------------------------------
# A source in a model, and back
# ------------------------------------------------------------------------------------------------------------------

def fit(source, model, allow=()):
    """A source's tensors in this model's shapes ("meta" will do): position tables resized, a tied decoder filled in.
    -> (weights, {missing name: why}). ValueError for what is neither explained nor named by a pattern of `allow`."""
    own, config, weights = model.state_dict(), model.config, dict(source.weights)
    grid, named = config.image_size // config.patch_size, lambda name: any(fnmatch.fnmatchcase(name, p) for p in allow)
    words = weights.get("text.token_embedding.weight")
    if words is not None and (config.tied or source.fields.get("tied") and "mlm_head.bias" in weights):
        if not torch.equal(weights.setdefault("mlm_head.weight", words), words):       # untied: starts as the tied one
            raise ValueError(f"{source.title}: its masked LM's decoder is not its word embedding, and a tied model has "
                             f"no place for it: leave --tied out")
    for name, tensor in weights.items():
        if name == "vision.positions" and len(tensor) != grid ** 2 + 1:
            weights[name] = resize_positions(tensor, grid)
        if name.endswith(".relative_position_bias") and len(tensor) != (2 * grid - 1) ** 2 + 3:
            weights[name] = resize_relative(tensor, grid)
    for name in sorted(own.keys() & weights.keys()):
        if weights[name].shape != own[name].shape:
            theirs, ours = tuple(weights[name].shape), tuple(own[name].shape)
            raise ValueError(f"{source.title} does not fit this model: {name} is {theirs} there, {ours} here; repeat "
                             f"its model settings")
    held = set(map(part, source.weights)) | set(source.parts)
    missing = {name: why(source.new, name) or ("named by --allow_missing" if named(name) else
                                               "" if part(name) in held else "no source holds this part")
               for name in own if name not in weights}
    known = lambda ours, reason: reason or ours and own.keys() >= set(ours)
    strange = [name for name, ours, reason in source.notes if not known(ours, reason) and not named(name)]
    lost = [name for name, reason in missing.items() if not reason]
    if strange or lost:
        raise ValueError(f"{source.title}: {len(strange)} tensors are unknown, {len(lost)} are missing, among them "
                         f"{', '.join(strange[:3] + lost[:3])}; repeat its model settings, or import it with "
                         f"weights.py import --allow_missing NAME, which goes on without")
    return {name: tensor for name, tensor in weights.items() if name in own}, missing


def report(source, weights, missing, made):
    """The key report: one line for tensors that differ only in their layer, with their number. weights: what is used;
    made: {missing name: its new tensor}."""
    first = lambda t: t.flatten()[0].item()
    key = lambda line: re.sub(r"\.\d+\.", ".*.", re.sub(r"(random), deviation \S+:", r"\1:", line))
    lines = [f"{name} -> used as {', '.join(ours)}" if ours and not reason and weights.keys() >= set(ours) else
             f"{name} -> unused: {reason or 'named by --allow_missing'}" for name, ours, reason in source.notes]
    for name, reason in missing.items():
        t = made[name]
        how = f"all {first(t):.3g}" if (t == first(t)).all() else f"random, deviation {t.std().item():.2g}"
        lines.append(f"missing {name} -> {how}: {reason}")
    counts, used = collections.Counter(map(key, lines)), sum(" -> used" in x for x in lines)
    shown = {key(line): re.sub(r"\.\d+\.", ".*.", line) for line in lines}
    return [f"{count:4} {shown[line]}" for line, count in counts.items()] + [
        f"{source.title}: {used + sum(' -> unused' in x for x in lines)} tensors, {used} used; {len(missing)} missing"]


def text_encoder(weights, config):
    """(settings, tensors) of the text encoder as transformers' XLMRobertaModel has them; it counts positions from 2."""
    w = {name.removeprefix("text."): t for name, t in weights.items() if name.startswith("text.")}
    rows = w["positions.weight"][config.offset:]                             # (longest, D)
    w |= {"token_type": w["token_type"][None], "positions.weight": torch.cat([torch.zeros_like(rows[:2]), rows])}
    name = lambda ours: functools.reduce(lambda n, pair: n.replace(pair[1], pair[0]), BERT.items(), ours)
    return {"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"], "hidden_size": config.width,
            "vocab_size": config.vocabulary, "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_heads, "intermediate_size": config.text_mlp,
            "max_position_embeddings": len(rows) + 2, "type_vocab_size": 1,
            "layer_norm_eps": config.text_eps, "hidden_act": "gelu", "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": 0.0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
            }, {name(ours): t for ours, t in w.items()}


if __name__ == "__main__":
    for layout in TEXTS + IMAGES:
        print(f"{layout.title:15}{', '.join(layout.parts)}")
