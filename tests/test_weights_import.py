"""Import and export: every tensor is accounted for, sizes to the unit, resolutions, files that are refused."""

import pytest
import torch

import layouts
import weights
from model import CCLM, build


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
    return {f"{name}.position_ids": torch.arange(514)[None], f"{name}.word_embeddings.weight": zeros(vocabulary, d),
            f"{name}.position_embeddings.weight": zeros(514, d), f"{name}.token_type_embeddings.weight": zeros(1, d)} | norm(
                f"{name}.LayerNorm", d)


def beit(name, d, layers, heads):
    made = {f"{name}cls_token": zeros(1, 1, d), f"{name}patch_embed.proj.weight": zeros(d, 3, 16, 16),
            f"{name}patch_embed.proj.bias": zeros(d)} | norm(f"{name}fc_norm", d)
    for b in range(layers):
        p = f"{name}blocks.{b}"
        made |= {f"{p}.gamma_1": zeros(d), f"{p}.gamma_2": zeros(d), f"{p}.attn.q_bias": zeros(d), f"{p}.attn.v_bias": zeros(d),
                 f"{p}.attn.relative_position_bias_table": zeros(732, heads),
                 f"{p}.attn.relative_position_index": layouts.relative_index(14)}
        made |= linear(f"{p}.attn.qkv", 3 * d, d, bias=False) | linear(f"{p}.attn.proj", d, d) | linear(f"{p}.mlp.fc1", 4 * d, d)
        made |= linear(f"{p}.mlp.fc2", d, 4 * d) | norm(f"{p}.norm1", d) | norm(f"{p}.norm2", d)
    return made


def x2vlm(d, layers, vocabulary=250002):
    """The names and shapes of a CCLM-X2VLM checkpoint, as F6.3 lists them."""
    made = {"temp": zeros()} | beit("vision_encoder.", d, layers, d // 64) | embeddings("text_encoder.embeddings", d, vocabulary)
    for n in range(layers):
        made |= bert_layer(f"text_encoder.encoder.layer.{n}", d)
    for n in range(6):
        made |= bert_layer(f"cross_encoder.encoder.layer.{n}", d, cross=True)
    for head, out in (("itm_head", 2), ("bbox_head", 4)):
        made |= linear(f"{head}.0", 2 * d, d) | norm(f"{head}.1", 2 * d) | linear(f"{head}.3", out, 2 * d)
    made |= linear("vision_proj", 256, d) | linear("text_proj", 256, d) | linear("mlm_head.predictions.transform.dense", d, d)
    return made | norm("mlm_head.predictions.transform.LayerNorm", d) | linear("mlm_head.predictions.decoder", vocabulary, d) | {
        "mlm_head.predictions.bias": zeros(vocabulary)}


def xlmr(d=64, layers=4, vocabulary=100, prefix="roberta."):
    made = embeddings(prefix + "embeddings", d, vocabulary)
    for n in range(layers):
        made |= bert_layer(f"{prefix}encoder.layer.{n}", d)
    return {name: torch.randn(t.shape) if t.is_floating_point() else t for name, t in made.items()}


@pytest.mark.parametrize("preset, d, layers, keys, count", [("base", 768, 12, 587, 615_540_825), ("large", 1024, 24, 983, 1_225_073_817)])
def test_sizes_are_the_official_ones_to_the_unit(preset, d, layers, keys, count):
    """F1.6, F6.3: keys and parameters with the box head, which we leave out; every key is explained; the preset is this model."""
    tensors = x2vlm(d, layers)
    double = sum(t.numel() for name, t in tensors.items() if "position_i" in name or "relative_position_index" in name
                 or name.endswith("decoder.bias"))                           # buffers, and one bias under two names
    assert len(tensors) == keys and sum(t.numel() for t in tensors.values()) - double == count
    source = layouts.translate(tensors)
    with torch.device("meta"):
        model = CCLM(build(preset, **source.fields))
    assert model.config == build(preset)
    _, missing = layouts.fit(source, model)
    box = sum(t.numel() for name, t in tensors.items() if name.startswith("bbox"))
    assert not missing and sum(p.numel() for p in model.parameters()) == count - box


def test_every_tensor_is_explained_or_it_is_an_error(tmp_path, capsys):
    tensors = {k: v.clone() for k, v in x2vlm(64, 1, 50).items()}
    for name, change in (("cls_head.0.weight", {"cls_head.0.weight": torch.zeros(3)}), ("text_proj.bias", None)):
        torch.save({"model": {k: v for k, v in tensors.items() if k != name} | (change or {})}, tmp_path / "a.th")
        words = ["import", str(tmp_path / "a.th"), "--out", str(tmp_path / "ckpt.pt")]
        assert weights.main(words) == 2
        said = capsys.readouterr().err
        assert name in said and "--allow_missing" in said and said.count("\n") == 1
        assert weights.main([*words, "--allow_missing", name]) == 0
        assert "named by --allow_missing" in capsys.readouterr().out
    torch.save(tensors, tmp_path / "a.th")
    assert weights.main(words) == 0                                          # all of it, bare: used or unused for a reason
    out = capsys.readouterr().out
    assert f"{len(tensors)} tensors, {len(tensors) - 9} used; 0 missing" in out and "region losses are out of scope" in out


def test_tensors_that_contradict_each_other_are_refused():
    """Two names of one tensor with different numbers, another order of patches, widths that no one fusion encoder can read."""
    tensors = x2vlm(64, 1, 50)
    for name, value, said in (("mlm_head.predictions.decoder.bias", torch.ones(50), "different numbers"),
                              ("vision_encoder.blocks.0.attn.relative_position_index", layouts.relative_index(14) + 1, "order")):
        with pytest.raises(ValueError, match=said):
            layouts.translate(tensors | {name: value})
    wide = layouts.translate({k: zeros(*t.shape) for k, t in xlmr(128, 1).items() if "position_ids" not in k})
    with pytest.raises(ValueError, match="F1.4"):
        layouts.merge(layouts.translate(beit("", 64, 1, 1)), wide)


def test_where_cclm_began(tmp_path):
    """F4.7: from the English X2VLM everything but words, which are XLM-R's; the new decoder is random. F4.5: XLM-R's layers
    1, 3, 5 ... as one stack without cross-attention."""
    head, text, upper = xlmr(layers=8), xlmr(layers=4), x2vlm(64, 1, 50)
    english = {k: torch.randn(t.shape) for k, t in beit("vision_encoder.", 64, 1, 1).items() if "index" not in k}
    english |= {k: torch.randn(t.shape) for k, t in upper.items() if k.startswith(("temp", "vision_proj", "text_proj", "itm_head"))}
    for n in range(3):
        english |= {k: torch.randn(t.shape) for k, t in bert_layer(f"text_encoder.bert.encoder.layer.{n}", 64, cross=n == 2).items()}
    english |= {k: torch.randn(t.shape) for k, t in embeddings("text_encoder.bert.embeddings", 64, 30).items()}
    english["text_encoder.bert.embeddings.token_type_embeddings.weight"] = torch.randn(2, 64)
    english |= {k.replace("mlm_head", "text_encoder.cls"): torch.randn(t.shape) for k, t in upper.items() if k.startswith("mlm_head")}
    english["text_encoder.cls.predictions.decoder.bias"] = english["text_encoder.cls.predictions.bias"]
    torch.save(english, tmp_path / "x2vlm.th")
    torch.save(text | {"lm_head.bias": torch.randn(100), "lm_head.dense.weight": torch.randn(64, 64)}, tmp_path / "xlmr.bin")
    state, report = weights.import_sources([tmp_path / "x2vlm.th", tmp_path / "xlmr.bin"])
    w, c = state["model"], state["config"]["model"]
    assert torch.equal(w["text.layers.3.mlp.up.weight"], text["roberta.encoder.layer.3.intermediate.dense.weight"])
    assert torch.equal(w["fusion.layers.0.cross.k.weight"], english["text_encoder.bert.encoder.layer.2.crossattention.self.key.weight"])
    assert torch.equal(w["mlm_head.dense.weight"], english["text_encoder.cls.predictions.transform.dense.weight"])
    assert not c["tied"] and c["fusion_eps"] == 1e-12 and w["mlm_head.weight"].shape == (100, 64) and c["fusion_layers"] == 1
    assert any("missing mlm_head.weight -> random" in line and "F4.7" in line for line in report)
    torch.save(head, tmp_path / "large.bin")
    state, report = weights.import_sources([tmp_path / "large.bin"], every_second=True)
    w, c = state["model"], state["config"]["model"]
    assert (c["text_layers"], c["fusion_layers"], c["offset"], c["tied"]) == (2, 2, 0, True)
    for ours, theirs in (("text.layers.1", 3), ("fusion.layers.0", 5), ("fusion.layers.1", 7)):
        assert torch.equal(w[f"{ours}.norm2.bias"], head[f"roberta.encoder.layer.{theirs}.output.LayerNorm.bias"])
    assert any("no cross-attention (F4.5)" in line for line in report) and "random" in " ".join(report)


def test_a_shared_relative_table_becomes_every_layers():
    tensors = {k: torch.randn(t.shape) if t.is_floating_point() else t for k, t in beit("", 64, 2, 1).items() if "bias_table" not in k}
    table = torch.randn(732, 1)
    source = layouts.translate(tensors | {"rel_pos_bias.relative_position_bias_table": table})
    assert all(torch.equal(source.weights[f"vision.layers.{i}.attention.relative"], table) for i in range(2))


def test_position_tables_follow_the_image_size(tmp_path, capsys):
    torch.save({k: t.clone() for k, t in x2vlm(64, 1, 50).items()}, tmp_path / "a.th")
    words = ["import", str(tmp_path / "a.th"), "--out", str(tmp_path / "ckpt.pt"), "--image_size"]
    assert weights.main([*words, "384"]) == 0
    model, _ = weights.load_model(tmp_path / "ckpt.pt")
    assert model.encode_image(torch.zeros(1, 3, 384, 384), torch.arange(1)).states.shape == (577, 64)
    capsys.readouterr()
    assert weights.main([*words, "128"]) == 2 and "choose an image size" in capsys.readouterr().err
    table = torch.randn(1 + 49, 8)
    assert torch.equal(layouts.resize_positions(table, 7)[0], table[0]) and layouts.resize_positions(table, 14).shape == (197, 8)
