"""Sources that cannot become a model, and commands that cannot be meant: one line with the file's name, status 2, and
nothing written."""
import json
import os
from dataclasses import asdict

import pytest
import torch

import train
import weights
from model import CCLM, build
from published import beit, clip, random, xlmr

HERE = "--batch 4 --text_batch 4 --workers 0 --no-eval --steps 1 --out run".split()
SWIN = {"layers.0.blocks.0.attn.qkv.bias": torch.zeros(9), "norm.bias": torch.zeros(8)}
XLMR, BEIT = xlmr(64, 1), random(beit("", 64, 1, 1))
TABLE, PATCHES = "blocks.0.attn.relative_position_bias_table", "patch_embed.proj.weight"
POSITIONS = "roberta.embeddings.position_embeddings.weight"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, words, *said, main=weights.main):
    assert main(list(map(str, words))) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(word in line for word in said), line


@pytest.mark.parametrize("tensors, said", [
    (SWIN, "no encoder"), ({"class_embedding": torch.zeros(64)}, "no encoder"),
    (BEIT | {PATCHES: torch.zeros(64, 3, 0, 0)}, "patch_size is 0"),
    (BEIT | {TABLE: torch.zeros(732, 0)}, "vision_heads is 0"),
    (BEIT | {TABLE: torch.zeros(5, 1)}, "relative table of shape (5, 1)"),
    (BEIT | {TABLE: torch.zeros(())}, "a.pth: its tensors have names that are known here"),
    (BEIT | {"blocks.0.attn.relative_position_index": torch.zeros(0)}, "a table of 0 rows"),
    (BEIT | {PATCHES: torch.zeros(64, 3, 16, 16).to_sparse()}, PATCHES + " is not a tensor of plain numbers"),
    (clip(64) | {"vision_model.embeddings.position_embedding.weight": torch.zeros(7, 64)}, "a table of 7 rows"),
    (XLMR | {"roberta.embeddings.word_embeddings.weight": torch.zeros(0, 64)}, "vocabulary is 0"),
    (XLMR | {POSITIONS: torch.zeros(20, 64)}, "room for 18 tokens"),
    (BEIT | {"blocks.99999999.norm1.bias": torch.zeros(64)}, "there is a layer 99999999, but no layer 1"),
    ({"rel_pos_bias.relative_position_bias_table": torch.zeros(732, 1)} | BEIT |
     {"blocks.99999999.norm1.bias": torch.zeros(64)}, "but no layer 1"),
    (clip(64) | {"vision_model.encoder.layers.2.mlp.fc1.bias": torch.zeros(256)}, "but no layer 1")])
def test_sources_of_impossible_shapes_are_refused(capsys, tensors, said):
    torch.save(tensors, "a.pth")
    refused(capsys, ["import", "a.pth", "--out", "b.pt"], said)
    assert os.listdir() == ["a.pth"]


def test_a_vision_encoder_named_before_or_after_swin_is_enough(capsys):
    torch.save(SWIN, "swin.pth")
    torch.save(BEIT, "beit.pth")
    for pair in (["swin.pth", "beit.pth"], ["beit.pth", "swin.pth"]):
        assert weights.main(["import", *pair, "--out", "a.pt"]) == 0


def test_flags_of_an_import_that_cannot_be_are_refused(capsys):
    torch.save(XLMR, "a.bin")
    for layers in (1, 2, 6):
        torch.save(xlmr(64, layers), "b.bin")
        refused(capsys, ["import", "b.bin", "--every_second", "--out", "b.pt"], "b.bin", "multiple of 4", str(layers))
    refused(capsys, ["import", "a.bin", "--out", "b.pt", "--image_size", "160000000"], "image_size", "at most 4096")
    refused(capsys, ["import", "a.bin", "--out", "b.pt", "--text_heads", "5"], "5 heads", "another --text_heads")
    refused(capsys, [*HERE, "--image_size", "160000000"], "image_size", "4096", main=train.main)
    refused(capsys, [*HERE, "--positions", "20"], "--positions", "room for 18 tokens", main=train.main)
    for words in (["export", "a.pt", "folder", "--image_size", "384"], ["a.pt", "--out", "b.pt"]):
        refused(capsys, words, words[-2], "only for weights.py import")
    os.mkdir("folder")
    for out, said in (("folder", "folder is not a file"), ("", "is not a file"), ("a.bin/b.pt", "a.bin is no folder")):
        refused(capsys, ["import", "a.bin", "--out", out], "--out", said)
    assert sorted(os.listdir()) == ["a.bin", "b.bin", "folder", "run"]


def test_a_write_that_fails_leaves_nothing_beside_its_place(tmp_path):
    with pytest.raises(AttributeError):
        weights.write_checkpoint(tmp_path / "a.pt", {"model": lambda: None})
    (tmp_path / "b.tmp").write_text("someone's")
    weights.write_checkpoint(tmp_path / "b.pt", {"model": {}})
    assert sorted(os.listdir()) == ["b.pt", "b.tmp"]


def test_a_folder_means_its_only_file_of_weights(capsys):
    os.mkdir("one")
    torch.save(BEIT, "one/beitv2_base.pth")
    assert weights.main(["import", "one", "--out", "a.pt"]) == 0
    torch.save(BEIT, "one/another.th")
    refused(capsys, ["import", "one", "--out", "b.pt"], "one holds another.th, beitv2_base.pth: name one")
    refused(capsys, ["one"], "one is a folder", "weights.py import one")
    open("text.pth", "w").write("hello\nworld")
    said = "text.pth is truncated or not a checkpoint or file of weights\n"
    refused(capsys, ["import", "text.pth", "--out", "b.pt"], said)
    open("one/sentencepiece.bpe.model", "w").write("no model")
    refused(capsys, ["import", "one/another.th", "--out", "b.pt"], "sentencepiece.bpe.model: this is not")


def checkpoint(tokenizer, config=None, **more):
    model = CCLM(build("demo", width=32, vision_heads=1, vocabulary=tokenizer.size))
    torch.save({"model": model.state_dict(), "step": 1, "tokenizer": tokenizer.model, "config": {
        "model": asdict(model.config) if config is None else config, "train": {}}} | more, "own.pt")
    return model


def test_our_own_files_with_impossible_settings_are_refused(capsys, tokenizer):
    model = checkpoint(tokenizer)
    assert weights.main(["export", "own.pt", "folder"]) == 0
    good = asdict(model.config)
    assert "\n- width: 32\n" in open("folder/README.md").read()
    for text, said in (("{}", "no width"), ("{", "not readable"), ("[1]", "not readable"),
                       *((json.dumps(good | change), "config.json") for change in (
                           {"patch_size": 0}, {"vision_heads": 0}, {"width": -128}, {"width": True},
                           {"image_size": 2 ** 24}, {"vision_layers": 10 ** 8}))):
        open("folder/config.json", "w").write(text)
        refused(capsys, ["import", "folder", "--out", "b.pt"], "folder", said)
    checkpoint(tokenizer, {})
    words = ["import", "own.pt", "--out", "b.pt"]
    refused(capsys, words, "own.pt", "no width")
    refused(capsys, [*HERE, "--init", "own.pt"], "own.pt", "no width", main=train.main)
    torch.save(torch.load("own.pt") | {"tokenizer": "abc"}, "own.pt")
    refused(capsys, words, "own.pt")


def test_a_second_fusion_encoder_is_not_dropped_silently(capsys, tokenizer):
    unshared = CCLM(build("demo", width=32, vision_heads=1, vocabulary=tokenizer.size, shared_fusion=False))
    checkpoint(tokenizer, asdict(unshared.config), model=unshared.state_dict())
    refused(capsys, ["export", "own.pt", "folder"], "own.pt", "--no-shared_fusion")
    assert not os.path.exists("folder")
    assert train.main([*HERE, "--init", "own.pt"]) == 0
    assert "own.pt; new: nothing" in capsys.readouterr().out
    assert train.main([*HERE, "--init", "own.pt", "--shared_fusion", "--fresh"]) == 0
    assert "own.pt (without its text fusion encoder)" in capsys.readouterr().out


def test_train_refuses_the_wrong_kind_of_encoder(capsys, tokenizer):
    """--init_vision with a text encoder, --init_text with a vision encoder, --init_text with short positions, --tied on
    a checkpoint with a decoder of its own."""
    os.mkdir("xlmr")
    open("xlmr/sentencepiece.bpe.model", "wb").write(tokenizer.model)
    torch.save(BEIT, "beit.pth")
    for rows in (130, 20):
        text = xlmr(64, 1, tokenizer.size) | {POSITIONS: torch.zeros(rows, 64)}
        torch.save(text, "xlmr/pytorch_model.bin")
        refused(capsys, [*HERE, "--init_vision", "xlmr"], "--init_vision xlmr", "no vision encoder", main=train.main)
    refused(capsys, [*HERE, "--init_text", "beit.pth"], "--init_text beit.pth", "no text encoder", main=train.main)
    refused(capsys, [*HERE, "--init_text", "xlmr"], "XLM-R", "room for 18 tokens", main=train.main)
    untied = CCLM(build("demo", width=32, vision_heads=1, vocabulary=tokenizer.size, tied=False))
    checkpoint(tokenizer, asdict(untied.config), model=untied.state_dict())
    refused(capsys, [*HERE, "--init", "own.pt", "--tied"], "own.pt", "leave --tied out", main=train.main)
