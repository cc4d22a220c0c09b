"""Files: what is read, what train.py starts from, and that an export is the model it came from."""
import argparse
import json
import os
import pathlib
import shlex
from dataclasses import asdict

import numpy as np
import pytest
import torch

import data
from formats import checkpoints
import train
import weights
from model import CCLM, Config, build
from published import beit, random, xlmr


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, tokenizer):
    """A tiny XLM-R in a folder with its tokenizer, and a tiny BEiT-2 of 224 pixels."""
    folder = tmp_path_factory.mktemp("encoders")
    (folder / "xlmr").mkdir()
    torch.save(xlmr(64, 2, tokenizer.size), folder / "xlmr" / "pytorch_model.bin")
    (folder / "xlmr" / "sentencepiece.bpe.model").write_bytes(tokenizer.model)
    torch.save({"model": random(beit("", 64, 2, 1)), "args": argparse.Namespace(lr=1e-3)}, folder / "beit2.pth")
    return folder


def test_safetensors_keep_every_dtype_and_shape(tmp_path):
    tensors = {str(dtype): (torch.arange(6) % 2).to(dtype).view(2, 3) for dtype in checkpoints.DTYPES.values()}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "strided": torch.arange(12.0).view(3, 4).T}
    weights.write_safetensors(tmp_path / "a.safetensors", tensors)
    back = weights.read_safetensors(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys()
    raw = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    places = {name: entry["data_offsets"][0] for name, entry in json.loads(raw[8:8 + length]).items() if name in back}
    assert all((8 + length + place) % back[name].dtype.itemsize == 0 for name, place in places.items())   # aligned
    assert all(back[k].dtype == t.dtype and torch.equal(back[k], t) for k, t in tensors.items())


@pytest.mark.parametrize("kind", ["new", "old", "half", "safetensors", "wrapped"])
def test_all_formats_of_one_encoder_give_one_import(tmp_path, kind):
    """torch's two formats, 16-bit numbers (become fp32), safetensors; with and without the prefix roberta. wrapped:
    names as DistributedDataParallel and torch.compile leave them, NumPy's numbers and arrays beside the weights."""
    tensors = xlmr(64, 1)
    tensors = {name: t.half().float() if t.is_floating_point() else t for name, t in tensors.items()}
    bare = {name.removeprefix("roberta."): t for name, t in tensors.items()}
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.bin")
    if kind == "safetensors":
        weights.write_safetensors(path, bare)
    else:
        stored = {k: t.half() if t.is_floating_point() else t for k, t in bare.items()} if kind == "half" else tensors
        if kind == "wrapped":
            stored = {"model": {f"module._orig_mod.{name}": t for name, t in tensors.items()},
                      "best": np.float64(0.5), "random": np.random.get_state(), "type": np.dtype("f4")}
        torch.save(stored, path, _use_new_zipfile_serialization=kind != "old")
    got = weights.read_source(path)
    want = {"text.token_embedding.weight": "embeddings.word_embeddings.weight",
            "text.layers.0.mlp.up.bias": "encoder.layer.0.intermediate.dense.bias"}
    assert all(got.weights[a].dtype == torch.float32 and torch.equal(got.weights[a], bare[b]) for a, b in want.items())
    assert len(got.weights) == len(bare) - 1 and got.fields["vocabulary"] == 100


def test_numpy_1_and_2_are_read_over(tmp_path):
    """Their modules have two names. The old format is one stream of pickles, in which the name stands as text."""
    torch.save({"best": np.float64(0.5), "a": torch.ones(3)}, tmp_path / "2.pt", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "2.pt").read_bytes()
    assert raw.count(b"cnumpy._core.multiarray") == 1
    (tmp_path / "1.pt").write_bytes(raw.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    for name in ("1.pt", "2.pt"):
        assert torch.equal(checkpoints.read_pickle(tmp_path / name)["a"], torch.ones(3))


def theirs_tokenizer(encoders):
    return (encoders / "xlmr" / "sentencepiece.bpe.model").read_bytes()


def test_train_starts_from_published_encoders(encoders, tmp_path, capsys):
    """weights.py import makes one checkpoint of two encoders; train.py --init takes its weights, settings and tokenizer,
    with the image size asked for, and resumes. What no file says: heads 64 wide, MLPs four times the width."""
    ckpt, out = tmp_path / "ckpt.pt", tmp_path / "run"
    sources = [str(encoders / "beit2.pth"), str(encoders / "xlmr")]
    assert weights.main(["import", *sources, "--fusion_layers", "1", "--out", str(ckpt)]) == 0
    small = "--batch 4 --text_batch 4 --workers 0 --no-eval --steps 2 --image_size 256".split()
    small += ["--init", str(ckpt), "--out", str(out)]
    model = train.prepare(train.settings(small), torch.device("cpu")).objective.model
    theirs = weights.read_pickle(encoders / "xlmr" / "pytorch_model.bin")
    assert torch.equal(model.text.token_embedding.weight, theirs["roberta.embeddings.word_embeddings.weight"])
    c = model.config
    assert (c.vision, c.image_size, c.offset, c.tied, c.stem) == ("beit2", 256, 2, True, False)
    assert (c.vision_layers, c.text_layers, c.fusion_layers, c.fusion_heads, c.fusion_mlp) == (2, 2, 1, 1, 256)
    capsys.readouterr()
    assert train.main([*small, "--stop_after", "1"]) == 0
    assert f"tensors from {ckpt}; new: nothing" in capsys.readouterr().out
    before = weights.read_checkpoint(out / "ckpt.pt")
    assert train.main(small) == 0
    after = weights.read_checkpoint(out / "ckpt.pt")
    assert (before["step"], after["step"]) == (1, 2) and after["tokenizer"] == theirs_tokenizer(encoders)
    assert not torch.equal(before["model"]["fusion.layers.0.cross.q.weight"],
                           after["model"]["fusion.layers.0.cross.q.weight"])


def test_a_short_position_table_is_read_as_it_is(tmp_path):
    """XLM-R's layout with room for 38 tokens, and train.py from a checkpoint of it: nothing asks for more room."""
    text = xlmr(64, 1) | {"roberta.embeddings.position_embeddings.weight": torch.randn(40, 64)}
    torch.save(text, tmp_path / "a.bin")
    assert weights.main(["import", str(tmp_path / "a.bin"), "--out", str(tmp_path / "a.pt")]) == 0
    model, _ = weights.load_model(tmp_path / "a.pt")
    assert model.text.longest == 38
    flags = {"preset": "demo", "init": str(tmp_path / "a.pt"), "vocabulary": None, "images": ["own.jsonl"],
             "tokenizer": None}
    with pytest.raises(ValueError, match="--tokenizer"):                     # none lay beside the file
        weights.starting_point(None, None, flags)


def test_a_tokenizer_that_is_named_is_used(tmp_path, tokenizer):
    """For the demo's data too; beside a checkpoint that has one it must be the same (tests/test_refusals.py)."""
    (tmp_path / "spm.model").write_bytes(tokenizer.model)
    flags = {"tokenizer": tmp_path / "spm.model", "images": ["demo"], "texts": None}
    for state in (None, {"tokenizer": None}, {"tokenizer": tokenizer.model}):
        assert weights.starting_tokenizer(state, flags).model == tokenizer.model
    assert weights.starting_tokenizer(None, flags | {"tokenizer": None}).model == data.demo_tokenizer().model


def test_a_second_fusion_encoder_goes_out_and_in(tmp_path, tokenizer):
    """The ablation --no-shared_fusion: an export holds both fusion encoders; a run that begins at a checkpoint with one
    begins with two copies of it."""
    config = build("demo", width=32, vision_heads=1, vocabulary=tokenizer.size, shared_fusion=False)
    model = CCLM(config)
    torch.nn.init.normal_(model.text_fusion.layers[0].cross.q.weight)
    state = {"model": model.state_dict(), "step": 1, "tokenizer": tokenizer.model,
             "config": {"model": asdict(config), "train": {}}}
    weights.write_checkpoint(tmp_path / "a.pt", state)
    weights.export(tmp_path / "a.pt", tmp_path / "out")
    back, _ = weights.import_sources([tmp_path / "out"])
    assert all(torch.equal(t, back["model"][name]) for name, t in model.state_dict().items())
    one = CCLM(build("demo", width=32, vision_heads=1, vocabulary=tokenizer.size))
    state |= {"model": one.state_dict(), "config": {"model": asdict(one.config), "train": {}}}
    weights.write_checkpoint(tmp_path / "b.pt", state)
    flags = {"preset": "demo", "init": tmp_path / "b.pt", "shared_fusion": False}
    two, _, line = weights.starting_point(None, None, flags)
    assert line.endswith("b.pt; new: text_fusion")
    assert all(torch.equal(t, one.state_dict()["fusion." + n]) for n, t in two.text_fusion.state_dict().items())


def test_a_folder_means_its_only_file_of_weights(encoders, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "beitv2_base.pth").write_bytes((encoders / "beit2.pth").read_bytes())
    assert weights.weights_file(tmp_path / "one").name == "beitv2_base.pth"
    for name in ("pytorch_model.bin", "model.safetensors"):                  # a later name wins over the others
        (tmp_path / "one" / name).write_bytes(b"")
        assert weights.weights_file(tmp_path / "one").name == name


def test_a_write_that_fails_leaves_nothing_beside_its_place(tmp_path):
    with pytest.raises(AttributeError):
        weights.write_checkpoint(tmp_path / "a.pt", {"model": lambda: None})
    (tmp_path / "b.tmp").write_text("someone's")
    weights.write_checkpoint(tmp_path / "b.pt", {"model": {}})
    assert sorted(os.listdir(tmp_path)) == ["b.pt", "b.tmp"]


def test_an_export_is_the_model_it_came_from(encoders, tmp_path):
    """export, then import of that folder: the same tensors, Config and tokenizer; the text encoder alone imports as
    XLM-R."""
    sources = [str(encoders / "beit2.pth"), str(encoders / "xlmr")]
    assert weights.main(["import", *sources, "--out", str(tmp_path / "a.pt")]) == 0
    assert weights.main(["export", str(tmp_path / "a.pt"), str(tmp_path / "out")]) == 0
    assert weights.main(["import", str(tmp_path / "out"), "--out", str(tmp_path / "b.pt")]) == 0
    a, b = (weights.read_checkpoint(tmp_path / name) for name in ("a.pt", "b.pt"))
    assert a["config"]["model"] == b["config"]["model"]
    assert a["tokenizer"] == b["tokenizer"] == theirs_tokenizer(encoders)
    assert a["model"].keys() == b["model"].keys() and all(torch.equal(t, b["model"][n]) for n, t in a["model"].items())
    model = CCLM(Config(**a["config"]["model"]))
    words, starts = torch.arange(4, 12), torch.tensor([0, 3, 8], dtype=torch.int32)
    text = weights.read_source(tmp_path / "out" / "text_encoder")
    assert text.title == "XLM-R" and data.Tokenizer(text.tokenizer).size == model.config.vocabulary
    model.load_state_dict(a["model"])
    want = model.eval().encode_text(words, starts, torch.arange(2)).states
    text_model = CCLM(Config(**a["config"]["model"]))
    weights.initialise(text_model, text)
    assert torch.equal(text_model.eval().encode_text(words, starts, torch.arange(2)).states, want)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["width"] == 64
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{sum(t.numel() for t in model.parameters()):,} parameters, 0 training steps from BEiT-2 + XLM-R." in card
    assert "\n- width: 64\n" in card


def test_a_model_without_a_tokenizer_can_be_exported_and_imported_again(encoders, tmp_path, capsys):
    ckpt, folder = str(tmp_path / "b.pt"), str(tmp_path / "out")
    assert weights.main(["import", str(encoders / "beit2.pth"), "--out", ckpt, "--image_size", "240"]) == 0
    assert "tokenizer: not found" in capsys.readouterr().out
    assert weights.main(["export", ckpt, folder]) == 0 and weights.main(["import", folder, "--out", ckpt]) == 0


def test_the_commands_of_docs_weights_are_commands():
    text = (pathlib.Path(weights.__file__).parent / "docs" / "weights.md").read_text()
    found = [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.startswith("python ")]
    for program, *words in found:
        {"weights.py": weights.arguments, "train.py": train.settings}[program](words)
    assert len(found) == 7
