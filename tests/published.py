"""State dicts with the names and shapes of published files, at any size: zeros that take no memory, or random
numbers."""
import torch

from model import relative_index


def zeros(*shape):
    return torch.zeros(()).expand(shape)                                     # of any size, without memory


def linear(name, out, into, bias=True):
    return {f"{name}.weight": zeros(out, into)} | ({f"{name}.bias": zeros(out)} if bias else {})


def norm(name, width):
    return {f"{name}.weight": zeros(width), f"{name}.bias": zeros(width)}


def bert_layer(name, d, cross=False):
    made = {}
    for kind in ("attention", "crossattention") if cross else ("attention",):
        for x in ("query", "key", "value"):
            made |= linear(f"{name}.{kind}.self.{x}", d, d)
        made |= linear(f"{name}.{kind}.output.dense", d, d) | norm(f"{name}.{kind}.output.LayerNorm", d)
    return made | linear(f"{name}.intermediate.dense", 4 * d, d) | linear(f"{name}.output.dense", d, 4 * d) | norm(
        f"{name}.output.LayerNorm", d)


def embeddings(name, d, vocabulary):
    made = {f"{name}.position_ids": torch.arange(514)[None], f"{name}.word_embeddings.weight": zeros(vocabulary, d),
            f"{name}.position_embeddings.weight": zeros(514, d), f"{name}.token_type_embeddings.weight": zeros(1, d)}
    return made | norm(f"{name}.LayerNorm", d)


def beit(name, d, layers, heads, pretrained=False):
    """pretrained: as BEiT-2's pre-training leaves it, with a norm in place of fc_norm, and its own head and layers."""
    if pretrained:
        made = {k: t for k, t in beit(name, d, layers, heads).items() if "fc_norm" not in k} | norm(f"{name}norm", d)
        return made | {f"{name}mask_token": zeros(1, 1, d)} | linear(f"{name}lm_head", 90, d) | linear(
            f"{name}cls_pt_layers.0.mlp.fc1", 4 * d, d)
    made = {f"{name}cls_token": zeros(1, 1, d), f"{name}patch_embed.proj.weight": zeros(d, 3, 16, 16),
            f"{name}patch_embed.proj.bias": zeros(d)} | norm(f"{name}fc_norm", d)
    for b in range(layers):
        p = f"{name}blocks.{b}"
        made |= {f"{p}.{x}": zeros(d) for x in ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias")}
        made |= {f"{p}.attn.relative_position_bias_table": zeros(732, heads),
                 f"{p}.attn.relative_position_index": relative_index(14)}
        made |= linear(f"{p}.attn.qkv", 3 * d, d, bias=False) | linear(f"{p}.attn.proj", d, d)
        made |= linear(f"{p}.mlp.fc1", 4 * d, d) | linear(f"{p}.mlp.fc2", d, 4 * d)
        made |= norm(f"{p}.norm1", d) | norm(f"{p}.norm2", d)
    return made


def clip(d=64, layers=1, grid=4, prefix="vision_model."):
    made = {f"{prefix}embeddings.class_embedding": zeros(d),
            f"{prefix}embeddings.patch_embedding.weight": zeros(d, 3, 16, 16),
            f"{prefix}embeddings.position_ids": torch.arange(grid ** 2 + 1)[None],
            f"{prefix}embeddings.position_embedding.weight": zeros(grid ** 2 + 1, d)}
    made |= norm(f"{prefix}pre_layrnorm", d) | norm(f"{prefix}post_layernorm", d)
    for n in range(layers):
        p = f"{prefix}encoder.layers.{n}"
        for x in ("q_proj", "k_proj", "v_proj", "out_proj"):
            made |= linear(f"{p}.self_attn.{x}", d, d)
        made |= norm(f"{p}.layer_norm1", d) | norm(f"{p}.layer_norm2", d)
        made |= linear(f"{p}.mlp.fc1", 4 * d, d) | linear(f"{p}.mlp.fc2", d, 4 * d)
    return random(made)


def x2vlm(d, layers, vocabulary=250002):
    """The names and shapes of a CCLM-X2VLM checkpoint, as the official classes make it."""
    made = {"temp": zeros()} | beit("vision_encoder.", d, layers, d // 64)
    made |= embeddings("text_encoder.embeddings", d, vocabulary)
    for n in range(layers):
        made |= bert_layer(f"text_encoder.encoder.layer.{n}", d)
    for n in range(6):
        made |= bert_layer(f"cross_encoder.encoder.layer.{n}", d, cross=True)
    for head, out in (("itm_head", 2), ("bbox_head", 4)):
        made |= linear(f"{head}.0", 2 * d, d) | norm(f"{head}.1", 2 * d) | linear(f"{head}.3", out, 2 * d)
    head = "mlm_head.predictions"
    made |= linear("vision_proj", 256, d) | linear("text_proj", 256, d) | linear(f"{head}.transform.dense", d, d)
    made |= norm(f"{head}.transform.LayerNorm", d) | linear(f"{head}.decoder", vocabulary, d)
    return made | {f"{head}.bias": zeros(vocabulary)}


def random(tensors):
    return {name: torch.randn(t.shape) if t.is_floating_point() else t for name, t in tensors.items()}


def lm_head(vocabulary=100, d=64):
    made = linear("lm_head.dense", d, d) | norm("lm_head.layer_norm", d) | {"lm_head.bias": zeros(vocabulary)}
    return random(made | {"lm_head.decoder.weight": zeros(vocabulary, d)})


def xlmr(d=64, layers=4, vocabulary=100, prefix="roberta."):
    made = embeddings(prefix + "embeddings", d, vocabulary)
    for n in range(layers):
        made |= bert_layer(f"{prefix}encoder.layer.{n}", d)
    return random(made)


def single_stack(vision, vocabulary, token_types):
    """Two text layers and one fusion layer in one stack: the layout of CCLM-3M/4M (one token type) and X2VLM (two)."""
    upper, made = x2vlm(64, 1, vocabulary), {f"vision_encoder.{name}": t for name, t in vision.items()}
    made |= {k: t for k, t in upper.items() if k.startswith(("temp", "vision_proj", "text_proj", "itm_head"))}
    for n in range(3):
        made |= bert_layer(f"text_encoder.bert.encoder.layer.{n}", 64, cross=n == 2)
    made |= embeddings("text_encoder.bert.embeddings", 64, vocabulary)
    made["text_encoder.bert.embeddings.token_type_embeddings.weight"] = zeros(token_types, 64)
    made |= {k.replace("mlm_head", "text_encoder.cls"): t for k, t in upper.items() if k.startswith("mlm_head")}
    made = random(made)
    made["text_encoder.cls.predictions.decoder.bias"] = made["text_encoder.cls.predictions.bias"]
    if token_types == 1:                                                           # tied
        words = made["text_encoder.bert.embeddings.word_embeddings.weight"]
        made["text_encoder.cls.predictions.decoder.weight"] = words
    return made
