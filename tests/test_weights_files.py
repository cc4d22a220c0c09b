"""Files: what is read, what is refused, what train.py starts from, and that an export is the model it came from."""
import argparse
import json
import os
from dataclasses import asdict

import pytest
import torch

import data
import evaluate
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


def refused(capsys, words, *said):
    assert weights.main(list(map(str, words))) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "Traceback" not in line and all(word in line for word in said), line


class Malice:
    def __reduce__(self):
        return os.system, ("touch harm",)


def test_files_that_are_no_weights_are_refused(tmp_path, capsys, monkeypatch):
    """Nothing of a malicious file runs; of any cut of any format, and of other files, one line and status 2."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malice()}, "evil.th")
    refused(capsys, ["import", "evil.th", "--out", "ckpt.pt"], "evil.th", "refused", "system")
    torch.save({"model": Malice()}, "evil.bin", _use_new_zipfile_serialization=False)
    refused(capsys, ["import", "evil.bin", "--out", "ckpt.pt"], "evil.bin", "refused")
    assert not os.path.exists("harm") and not os.path.exists("ckpt.pt")
    tensors = xlmr(64, 1)
    torch.save(tensors, "new.bin")
    torch.save(tensors, "old.bin", _use_new_zipfile_serialization=False)
    weights.write_safetensors("a.safetensors", tensors)
    for name in ("new.bin", "old.bin", "a.safetensors"):
        whole = open(name, "rb").read()
        for share in (0.0, 0.0001, 0.02, 0.5, 0.999):
            open("cut" + name, "wb").write(whole[:int(share * len(whole))])
            refused(capsys, ["import", "cut" + name, "--out", "ckpt.pt"], "cut" + name + " is truncated")
    foreign = {"conv.weight": torch.zeros(2)}
    for name, content in (("list.pt", [1, 2]), ("odd.pt", {"model": {"a": 1}}), ("foreign.pt", foreign)):
        torch.save(content, name)
        refused(capsys, ["import", name, "--out", "ckpt.pt"], name)
    outside, hollow, before = ({"a": {"dtype": "F32", "shape": [9], "data_offsets": place}}
                               for place in ([0, 36], [0, 0], [-44, -8]))
    for header in (b"[]", b"{\"a\": 3}", b"\xff", *(json.dumps(x).encode() for x in (outside, hollow, before))):
        open("b.safetensors", "wb").write(len(header).to_bytes(8, "little") + header)
        refused(capsys, ["import", "b.safetensors", "--out", "ckpt.pt"], "truncated or not a safetensors file")
    os.mkdir("empty")
    refused(capsys, ["import", "empty", "--out", "ckpt.pt"], "pytorch_model.bin")
    refused(capsys, ["import", "none.th", "--out", "ckpt.pt"], "none.th", "no such")
    refused(capsys, ["import", "new.bin"], "usage")
    refused(capsys, ["import", "new.bin", "--out", "ckpt.pt", "--text_heads", "0"], "--text_heads", "at least 1")
    refused(capsys, ["import", "new.bin", "--out", "ckpt.pt", "--text_heads", "3"], "64 is not a multiple of 3 heads")


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


@pytest.mark.parametrize("kind", ["new", "old", "half", "safetensors"])
def test_all_formats_of_one_encoder_give_one_import(tmp_path, kind):
    """torch's two formats, 16-bit numbers (become fp32), safetensors; with and without the prefix roberta."""
    tensors = xlmr(64, 1)
    tensors = {name: t.half().float() if t.is_floating_point() else t for name, t in tensors.items()}
    bare = {name.removeprefix("roberta."): t for name, t in tensors.items()}
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.bin")
    if kind == "safetensors":
        weights.write_safetensors(path, bare)
    else:
        stored = {k: t.half() if t.is_floating_point() else t for k, t in bare.items()} if kind == "half" else tensors
        torch.save(stored, path, _use_new_zipfile_serialization=kind != "old")
    got = weights.read_source(path)
    want = {"text.token_embedding.weight": "embeddings.word_embeddings.weight",
            "text.layers.0.mlp.up.bias": "encoder.layer.0.intermediate.dense.bias"}
    assert all(got.weights[a].dtype == torch.float32 and torch.equal(got.weights[a], bare[b]) for a, b in want.items())
    assert len(got.weights) == len(bare) - 1 and got.fields["vocabulary"] == 100


def theirs_tokenizer(encoders):
    return (encoders / "xlmr" / "sentencepiece.bpe.model").read_bytes()


def test_train_starts_from_published_encoders(encoders, tmp_path, capsys):
    """train.py --init_text --init_vision: their weights, shapes and tokenizer; the image size asked for; then it
    resumes. What no file says: heads 64 wide, MLPs four times the width."""
    flags = ["--init_text", str(encoders / "xlmr"), "--init_vision", str(encoders / "beit2.pth")]
    small = "--batch 4 --text_batch 4 --workers 0 --no-eval --steps 2 --image_size 256".split()
    args = train.settings([*small, *flags, "--out", str(tmp_path)])
    model = train.prepare(args, torch.device("cpu")).objective.model
    theirs = weights.read_pickle(encoders / "xlmr" / "pytorch_model.bin")
    assert torch.equal(model.text.token_embedding.weight, theirs["roberta.embeddings.word_embeddings.weight"])
    c = model.config
    assert (c.vision, c.image_size, c.offset, c.tied, c.stem) == ("beit2", 256, 2, True, False)
    assert (c.vision_layers, c.text_layers, c.fusion_heads, c.fusion_mlp) == (2, 2, 1, 256)
    assert train.main([*small, *flags, "--out", str(tmp_path), "--stop_after", "1"]) == 0
    assert "79 tensors from BEiT-2 + XLM-R; new: fusion, " in capsys.readouterr().out
    before = weights.read_checkpoint(tmp_path / "ckpt.pt")
    assert train.main([*small, *flags, "--out", str(tmp_path)]) == 0
    after = weights.read_checkpoint(tmp_path / "ckpt.pt")
    assert (before["step"], after["step"]) == (1, 2) and after["tokenizer"] == theirs_tokenizer(encoders)
    assert not torch.equal(before["model"]["fusion.layers.0.cross.q.weight"],
                           after["model"]["fusion.layers.0.cross.q.weight"])


def test_train_starts_from_an_imported_checkpoint_with_its_own_settings(encoders, tmp_path, capsys):
    """No flag repeats the architecture; a flag that contradicts it, and a text encoder without tokenizer, are one
    line."""
    ckpt = tmp_path / "ckpt.pt"
    assert weights.main(["import", str(encoders / "beit2.pth"), str(encoders / "xlmr"), "--out", str(ckpt)]) == 0
    small = "--batch 4 --text_batch 4 --workers 0 --no-eval --steps 1".split()
    assert train.main([*small, "--init", str(ckpt), "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    (tmp_path / "a.bin").write_bytes((encoders / "xlmr" / "pytorch_model.bin").read_bytes())
    for flags, said in ((["--init", str(ckpt), "--width", "128"], "does not fit"),
                        (["--init_text", str(tmp_path / "a.bin")], "no tokenizer")):
        assert train.main([*small, *flags, "--out", str(tmp_path / "other")]) == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1


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
    assert f"{sum(t.numel() for t in model.parameters()):,} parameters,\n0 training steps from BEiT-2 + XLM-R." in card


def test_another_tokenizer_and_none_are_one_line(encoders, tmp_path, capsys):
    """A tokenizer of another size is refused; without one there is a checkpoint, but it can only be imported again."""
    torch.save(xlmr(64, 2, 100), encoders / "xlmr" / "other.bin")
    refused(capsys, ["import", encoders / "xlmr" / "other.bin", "--out", tmp_path / "a.pt"], "tokenizer", "100")
    ckpt, empty = str(tmp_path / "b.pt"), str(tmp_path / "out")
    assert weights.main(["import", str(encoders / "beit2.pth"), "--out", ckpt, "--image_size", "240"]) == 0
    assert "tokenizer: not found" in capsys.readouterr().out
    assert evaluate.main(["retrieval", "--ckpt", ckpt]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "no tokenizer" in line
    assert weights.main(["export", ckpt, empty]) == 0 and weights.main(["import", empty, "--out", ckpt]) == 0


@pytest.mark.parametrize("setting, value", [("depth", 3), ("width", "wide"), ("tied", 2)])
def test_a_checkpoint_with_an_unknown_setting_is_one_line(tmp_path, capsys, tokenizer, setting, value):
    """Saved by a later version, or edited: train.py --init, evaluate.py, the import and the export of it say so."""
    model = CCLM(build("demo", width=32, vision_heads=1, vocabulary=tokenizer.size))
    config = {"model": asdict(model.config) | {setting: value}, "train": {}}
    ckpt = str(tmp_path / "a.pt")
    torch.save({"model": model.state_dict(), "step": 1, "tokenizer": tokenizer.model, "config": config}, ckpt)
    for command in (lambda: train.main(["--init", ckpt, "--out", str(tmp_path / "run")]),
                    lambda: evaluate.main(["retrieval", "--ckpt", ckpt]), lambda: weights.main([ckpt]),
                    lambda: weights.main(["import", ckpt, "--out", str(tmp_path / "b.pt")]),
                    lambda: weights.main(["export", ckpt, str(tmp_path / "folder")])):
        assert command() == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and "a.pt" in line and f"{setting!r} is {value!r}" in line
