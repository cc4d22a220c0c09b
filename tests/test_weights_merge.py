"""Several sources in one model: whose masked LM head, whose words, whose tokenizer; what layouts say of single files;
the settings beside them."""
import json

import pytest
import torch

from formats import layouts
import weights
from model import CCLM, build
from published import beit, clip, lm_head, random, single_stack, x2vlm, xlmr

WORDS = "roberta.embeddings.word_embeddings.weight"


def small(**changes):
    return CCLM(build("demo", **dict(width=64, vision_heads=1, text_heads=1, stem=False) | changes))


def own(tmp_path, tokenizer=None, **changes):
    """A checkpoint of train.py with random weights -> its path, its model."""
    model = small(**changes)
    state = {"model": model.state_dict(), "step": 1, "tokenizer": tokenizer, "config": {
        "model": vars(model.config).copy(), "train": {}}}
    weights.write_checkpoint(tmp_path / "own.pt", state)
    return tmp_path / "own.pt", model


def test_a_decoder_of_its_own_is_never_overwritten(tmp_path):
    """XLM-R with another lm_head.decoder.weight becomes an untied model with it; a tied model cannot have it; the
    words' own numbers may stand there twice."""
    text = xlmr(64, 1) | lm_head()
    source = layouts.translate(text)
    assert source.fields["tied"] is False
    torch.save(text, tmp_path / "a.bin")
    state, _ = weights.import_sources([tmp_path / "a.bin"])
    assert torch.equal(state["model"]["mlm_head.weight"], text["lm_head.decoder.weight"])
    model = small(**source.fields | {"tied": True})
    with pytest.raises(ValueError, match="a decoder that is not its word embedding"):
        layouts.adapt_to_model(source, model)
    same = layouts.translate(text | {"lm_head.decoder.weight": text[WORDS]})
    assert same.fields["tied"] and torch.equal(layouts.adapt_to_model(same, model)[0]["mlm_head.weight"], text[WORDS])


def test_a_later_source_brings_its_masked_lm_head():
    """XLM-R and CCLM-X2VLM: the authors' head is untied, XLM-R's is tied. Without a head of its own, XLM-R leaves the
    earlier one, and its decoder."""
    text = xlmr(64, 1)
    bare, text = layouts.translate(text), layouts.translate(text | lm_head() | {"lm_head.decoder.weight": text[WORDS]})
    authors = layouts.translate({k: t for k, t in random(x2vlm(64, 1, 100)).items() if "decoder.bias" not in k})
    for first, last, tied in ((text, authors, False), (authors, bare, False), (authors, text, True)):
        both = layouts.merge(first, last)
        head = {name: t for name, t in both.weights.items() if name.startswith("mlm_head")}
        source = text if tied else authors
        assert all(torch.equal(t, source.weights[name]) for name, t in head.items()) and len(head) == 6 - tied
        assert both.fields["tied"] is tied
    said = {ours[0]: reason for name, ours, reason in layouts.merge(text, authors).notes if name.startswith("lm_head")}
    assert said.pop("mlm_head.weight") == "the same numbers as text.token_embedding.weight"
    assert set(said.values()) == {"another source holds it"} and len(said) == 5


def test_a_tied_head_that_stays_is_tied_to_the_words_that_come(tmp_path):
    path, model = own(tmp_path, vocabulary=100)
    text = xlmr(64, 1)
    torch.save(text, tmp_path / "xlmr.bin")
    state, _ = weights.import_sources([path, tmp_path / "xlmr.bin"])
    assert torch.equal(state["model"]["mlm_head.dense.weight"], model.mlm_head.dense.weight)
    assert torch.equal(state["model"]["mlm_head.bias"], model.mlm_head.bias)
    assert torch.equal(state["model"]["mlm_head.weight"], text[WORDS])


def test_a_merge_says_what_was_used_and_whose_tokenizer_it_has():
    image, text = (s._replace(tokenizer=t) for s, t in ((layouts.translate(clip()), b"a"),
                                                        (layouts.translate(xlmr(64, 1)), b"b")))
    assert layouts.merge(image, text).tokenizer == b"b" and layouts.merge(text, image).tokenizer == b"b"
    reasons = {reason for *_, reason in layouts.merge(image, text).notes}
    assert reasons == {"", "positions are counted"}
    other = layouts.merge(layouts.merge(image, text), layouts.translate(beit("", 64, 1, 1)))
    assert {r for name, _, r in other.notes if name.startswith("vision_model")} >= {"another source holds it"}
    assert not any(r for name, to, r in other.notes if to[:1] and to[0].startswith("text") and "ids" not in name)


def test_clip_and_pre_trained_beit_are_known_to_the_last_tensor(tmp_path):
    seen = clip()
    source = layouts.translate(seen)
    assert source.fields["vision_eps"] == 1e-5 and source.fields["vision"] == "clip"
    assert torch.equal(source.weights["vision.patches.weight"], seen["vision_model.embeddings.patch_embedding.weight"])
    torch.save(random(beit("", 64, 1, 1, pretrained=True)), tmp_path / "a.pth")
    _, report = weights.import_sources([tmp_path / "a.pth"])
    for name, said in (("mask_token", "pre-training's own"), ("lm_head.bias", "pre-training's own"),
                       ("cls_pt_layers.*.mlp.fc1.bias", "pre-training's own"), ("norm.weight", "patches have fc_norm"),
                       ("missing vision.norm.weight", "all 1: no fc_norm in that file")):
        assert any(name in line and said in line for line in report), name


def test_lines_of_the_report_are_kinds_of_tensors(tmp_path):
    torch.save(xlmr(64, 1), tmp_path / "a.bin")
    _, report = weights.import_sources([tmp_path / "a.bin"])
    lines = [line for line in report if "missing fusion.layers.*.mlp.up.weight" in line]
    assert len(lines) == 1 and lines[0].startswith("   6 ") and "-> random: " in lines[0]


def test_settings_beside_the_weights_are_read(tmp_path):
    """Heads that are not 64 wide (Multilingual-MiniLM has 12 of 32) and LayerNorm's epsilon stand in config.json only;
    a config.json of another model is not taken."""
    torch.save(xlmr(128, 4), tmp_path / "pytorch_model.bin")
    torch.save(clip(128), tmp_path / "clip.bin")
    read = lambda name="", **more: weights.read_source(tmp_path / name, **more).fields
    settings = lambda **said: (tmp_path / "config.json").write_text(json.dumps(said))
    settings(model_type="bert", num_attention_heads=4, layer_norm_eps=1e-12)
    assert (read()["text_heads"], read()["text_eps"]) == (4, 1e-12) and "fusion_heads" not in read()
    assert (read(every_second=True)["text_heads"], read(every_second=True)["fusion_heads"]) == (4, 4)
    assert read("clip.bin")["vision_heads"] == 2
    settings(model_type="clip", vision_config={"num_attention_heads": 8})
    assert (read("clip.bin")["vision_heads"], read()["text_heads"]) == (8, 2)
    swin = {"layers.0.blocks.0.attn.qkv.bias": torch.zeros(9), "norm.bias": torch.zeros(8)}
    assert "vision_heads" not in layouts.translate(single_stack(swin, 50, token_types=1)).fields
