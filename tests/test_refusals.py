"""What the commands refuse: one line that says what, where and what to do, status 2, and nothing is written. One table:
name of the case, files, command, words of the line."""
import io
import json
import os
import pathlib
import shlex
from dataclasses import asdict

import pytest
import sentencepiece
import torch

import data
import evaluate
import report
import samples
import search
import train
import weights
from formats.checkpoints import write_safetensors
from model import CCLM, build
from published import beit, clip, random, single_stack, xlmr

PROGRAMS = {"weights": weights.main, "train": train.main, "evaluate": evaluate.main, "search": search.main,
            "data": data.main, "report": report.main}
TRAIN = "train --batch 4 --text_batch 4 --workers 0 --no-eval --steps 1 --out run "
OWN = TRAIN + "--images a.tar --tokenizer spm.model "                        # these two files are made
RETRIEVAL = "evaluate retrieval --ckpt a.pt "
XM3600 = "evaluate xm3600 --ckpt a.pt --data . --languages en"
IMPORT = "weights import a.pth --out new.pt"
XLMR, BEIT, CLIP = xlmr(64, 1), random(beit("", 64, 1, 1)), clip(64)
SWIN = {"layers.0.blocks.0.attn.qkv.bias": torch.zeros(9), "norm.bias": torch.zeros(8)}
TABLE, PATCHES = "blocks.0.attn.relative_position_bias_table", "patch_embed.proj.weight"
WORDS, POSITIONS = (f"roberta.embeddings.{name}_embeddings.weight" for name in ("word", "position"))


class Malice:
    def __reduce__(self):
        return os.system, ("touch harm",)


class Old(dict):
    """A dict that is written in torch's old format."""


def write(name, content, tokenizer):
    """bytes as they are; a function of the tokenizer is called; anything else by torch.save."""
    path = pathlib.Path(name)
    path.parent.mkdir(exist_ok=True)
    content = content(tokenizer) if callable(content) else content
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content, new = (dict(content), False) if isinstance(content, Old) else (content, True)
        torch.save(content, path, _use_new_zipfile_serialization=new)


def cut(share, content=XLMR):
    """The first bytes of a file of weights."""
    def made(_):
        if content == "safetensors":
            write_safetensors("whole", XLMR)
        else:
            write("whole", content, None)
        whole = pathlib.Path("whole").read_bytes()
        os.remove("whole")
        return whole[:int(share * len(whole))]
    return made


def header(content):
    """A safetensors file with this header and nothing behind it."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(content).to_bytes(8, "little") + content


def own(config=None, tokens=True, model={}, more={}):
    """A checkpoint of the demo's model, changed. config: its fields; tokens: with its tokenizer or not."""
    def made(tokenizer):
        cclm = CCLM(build("demo", width=32, vision_heads=1, vocabulary=tokenizer.size, **model))
        settings = {} if config == {} else asdict(cclm.config) | (config or {})
        return {"model": cclm.state_dict(), "step": 1, "tokenizer": tokenizer.model if tokens else None,
                "config": {"model": settings, "train": {}}} | more
    return made


def pieces(**layout):
    """A sentencepiece model of other texts; layout: ids of its special pieces."""
    def made(_):
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a red dog"] * 9), model_writer=out, vocab_size=15,
                                                 hard_vocab_limit=False, minloglevel=2, **layout)
        return out.getvalue()
    return made


def exported(text=None, **change):
    """The config.json of an export: changed, or other text."""
    def made(tokenizer):
        write("whole.pt", own({})(tokenizer) | {"config": {"model": asdict(build(
            "demo", width=32, vision_heads=1, vocabulary=tokenizer.size)), "train": {}}}, None)
        weights.export("whole.pt", "a")
        os.remove("whole.pt")
        settings = json.loads(pathlib.Path("a/config.json").read_text()) | change
        return (json.dumps(settings) if text is None else text).encode()
    return made


CASES = [
    # files that are not weights
    ("code", {"a.pth": {"model": Malice()}}, IMPORT, ["a.pth is refused", "system"]),
    ("code in the old format", {"a.pth": Old(model=Malice())}, IMPORT, ["a.pth is refused", "system"]),
    *((f"{form} cut at {share}", {name: cut(share, content)}, f"weights import {name} --out new.pt",
       [f"{name} is truncated"])
      for form, name, content in (("new", "a.bin", XLMR), ("old", "a.th", Old(XLMR)),
                                  ("safetensors", "a.safetensors", "safetensors"))
      for share in (0.0, 0.0001, 0.02, 0.5, 0.999)),
    ("text", {"a.pth": b"hello\nworld"}, IMPORT, ["a.pth is truncated or not a checkpoint or file of weights\n"]),
    ("a list", {"a.pth": [1, 2]}, IMPORT, ["a.pth holds no state dict"]),
    ("numbers", {"a.pth": {"model": {"a": 1}}}, IMPORT, ["a.pth holds no state dict"]),
    ("another model", {"a.pth": {"conv.weight": torch.zeros(2)}}, IMPORT, ["a.pth", "conv.weight are none of CCLM"]),
    *((f"header {content}", {"a.safetensors": header(content)}, "weights import a.safetensors --out new.pt",
       ["a.safetensors is truncated or not a safetensors file"])
      for content in (b"[]", b"{\"a\": 3}", b"\xff",
                      *({"a": {"dtype": "F32", "shape": [9], "data_offsets": place}}
                        for place in ([0, 36], [0, 0], [-44, -8])))),
    ("no file", {}, IMPORT, ["a.pth: no such"]),
    ("a folder without weights", {"a/b.txt": b""}, "weights import a --out new.pt", ["a should", "holds none of .th .pth .bin"]),
    ("a folder with two", {"a/b.th": BEIT, "a/c.pth": BEIT}, "weights import a --out new.pt", ["a should hold one", "b.th, c.pth: name a file"]),
    ("no tokenizer beside", {"a.pth": XLMR, "sentencepiece.bpe.model": b"no model"}, IMPORT,
     ["XLM-R: its sentencepiece.bpe.model: this is not"]),
    ("another tokenizer", {"a.pth": XLMR, "sentencepiece.bpe.model": lambda tokenizer: tokenizer.model}, IMPORT,
     ["XLM-R: its sentencepiece.bpe.model has", "its word embedding 100 rows"]),
    # tensors that are no model
    ("a classifier of five", {"a.pth": {"cross_encoder.encoder.layer.0.a": torch.zeros(1),
                                        "cls_head.3.weight": torch.zeros(5, 4)}}, IMPORT, ["a.pth: its cls_head has 5 classes"]),
    ("Swin alone", {"a.pth": SWIN}, IMPORT, ["Swin: no encoder"]),
    ("one tensor", {"a.pth": {"class_embedding": torch.zeros(64)}}, IMPORT, ["CLIP: no encoder"]),
    ("no words", {"a.pth": {n: t for n, t in XLMR.items() if n != WORDS}}, IMPORT, ["a.pth: XLM-R, but without", "text.tok"]),
    ("vocabulary 0", {"a.pth": XLMR | {WORDS: torch.zeros(0, 64)}}, IMPORT, ["vocabulary is 0"]),
    ("patches of 0 pixels", {"a.pth": BEIT | {PATCHES: torch.zeros(64, 3, 0, 0)}}, IMPORT, ["BEiT-2", "is 0, but must be at least 1"]),
    ("no heads", {"a.pth": BEIT | {TABLE: torch.zeros(732, 0)}}, IMPORT, ["vision_heads is 0"]),
    ("a table of no grid", {"a.pth": BEIT | {TABLE: torch.zeros(5, 1)}}, IMPORT, ["relative table of shape (5, 1)"]),
    ("a table of no shape", {"a.pth": BEIT | {TABLE: torch.zeros(())}}, IMPORT, ["a.pth", "names that are known here"]),
    ("positions of no grid", {"a.pth": CLIP | {"vision_model.embeddings.position_embedding.weight": torch.zeros(7, 64)}},
     IMPORT, ["a table of 7 rows"]),
    *((f"a gap in {name}", {"a.pth": tensors | {name: torch.zeros(size)}}, IMPORT, ["tensors are unknown", name])
      for name, tensors, size in (("blocks.99999999.norm1.bias", BEIT, 64),
                                  ("vision_model.encoder.layers.2.mlp.fc1.bias", CLIP, 256))),
    ("two decoders", {"a.pth": single_stack(SWIN, 50, token_types=1) | {
        "text_encoder.cls.predictions.decoder.bias": torch.ones(50)}}, IMPORT, ["with different numbers is mlm_head.bias"]),
    ("two widths", {"a.pth": BEIT, "b.pth": xlmr(128, 1)}, "weights import a.pth b.pth --out new.pt",
     ["BEiT-2 has width 64, XLM-R 128: one fusion encoder reads both"]),
    ("a head for other words", {"a.pt": own(), "b.pth": xlmr(32, 1)}, "weights import a.pt b.pth --out new.pt",
     ["a.pt + XLM-R does not fit this model: mlm_head.bias is"]),
    # settings beside the weights
    ("CLIP with another activation", {"a.pth": CLIP, "config.json": b'{"model_type": "clip", "hidden_act": "gelu"}'},
     IMPORT, ["config.json: hidden_act is 'gelu'"]),
    ("settings of no type", {"a.pth": XLMR, "config.json": b'{"num_attention_heads": "four"}'}, IMPORT,
     ["config.json", "'four'"]),
    ("settings of no JSON", {"a.pth": XLMR, "config.json": b"{"}, IMPORT, ["config.json is not readable"]),
    # commands
    ("no --out", {"a.pth": XLMR}, "weights import a.pth", ["--out"]),
    ("no command", {}, "weights", ["command"]),
    ("a flag of another command", {}, "weights export a.pt b --image_size 384", ["unrecognized", "--image_size"]),
    *((f"--every_second of {n} layers", {"a.pth": xlmr(64, n)}, IMPORT + " --every_second", ["multiple of 4", f"are {n}"])
      for n in (1, 2, 6)),
    ("--every_second of another", {"a.pth": BEIT}, IMPORT + " --every_second", ["layers of XLM-R, and BEiT-2 is not"]),
    ("heads that do not fit", {"a.pth": XLMR}, IMPORT + " --text_heads 5", ["64 is not a multiple of 5 heads", "--text_heads"]),
    ("no heads at all", {"a.pth": XLMR}, IMPORT + " --text_heads 0", ["text_heads is 0", "at least 1"]),
    ("an image too large", {"a.pth": XLMR}, IMPORT + " --image_size 160000000", ["image_size", "at most 4096"]),
    ("an image too small", {"a.pth": BEIT}, IMPORT + " --image_size 128", ["choose an image size"]),
    ("--out is a folder", {"a.pth": XLMR, "b/c": b""}, "weights import a.pth --out b", ["--out b is not a file"]),
    ("--out is nothing", {"a.pth": XLMR}, "weights import a.pth --out ''", ["is not a file"]),
    ("--out in a file", {"a.pth": XLMR}, "weights import a.pth --out a.pth/b.pt", ["a.pth"]),
    # our own files
    *((f"a checkpoint with {name} {value} to {command.split()[0]}", {"a.pt": own({name: value})}, command,
       ["a.pt", f"{name!r} is {value!r}"])
      for name, value in (("depth", 3), ("width", "wide"), ("width", True), ("tied", 2))
      for command in ("weights import a.pt --out new.pt", "weights export a.pt b", TRAIN + "--init a.pt",
                      "evaluate retrieval --ckpt a.pt")),
    *((f"a checkpoint with {what}", {"a.pt": own(more=more)}, TRAIN + "--init a.pt", ["a.pt is not a checkpoint of"])
      for what, more in (("a text as tokenizer", {"tokenizer": "abc"}), ("no step", {"step": None}),
                         ("no tensors", {"model": {"a": 1}}), ("no settings", {"config": {}}))),
    *((f"no settings to {command.split()[0]}", {"a.pt": own({})}, command, ["a.pt", "no width"])
      for command in ("weights import a.pt --out new.pt", TRAIN + "--init a.pt")),
    *((f"an export with {text}", {"a/config.json": exported(text)}, "weights import a --out new.pt", ["a", said])
      for text, said in (("{}", "no width"), ("{", "not readable"), ("[1]", "not readable"))),
    *((f"an export with {change}", {"a/config.json": exported(**change)}, "weights import a --out new.pt", ["config.json"])
      for change in ({"patch_size": 0}, {"vision_heads": 0}, {"width": -128}, {"width": True}, {"image_size": 2 ** 24})),
    ("an export with another number of layers", {"a/config.json": exported(text_layers=3)}, "weights import a --out new.pt",
     ["are missing, among them text.layers.1."]),
    ("a second fusion encoder", {"a.pt": own(model={"shared_fusion": False})}, TRAIN + "--init a.pt --shared_fusion",
     ["a.pt: ", "tensors are unknown", "text_fusion.layers.0"]),
    # where a run begins
    ("a published file", {"a.pth": {"model": XLMR, "config": {}}}, TRAIN + "--init a.pth",
     ["a.pth is not a checkpoint", "python weights.py import a.pth --out CKPT"]),
    ("a folder", {"a/pytorch_model.bin": XLMR}, TRAIN + "--init a", ["python weights.py import a --out CKPT"]),
    ("an export", {"a/config.json": exported()}, TRAIN + "--init a/model.safetensors",
     ["python weights.py import a/model.safetensors --out CKPT"]),
    ("no checkpoint", {}, TRAIN + "--init a.pt", ["a.pt: no such"]),
    ("another width", {"a.pt": own()}, TRAIN + "--init a.pt --width 128", ["does not fit"]),
    ("tied decoder", {"a.pt": own(model={"tied": False})}, TRAIN + "--init a.pt --tied", ["a.pt", "leave --tied out"]),
    ("an image too large to learn", {}, TRAIN + "--image_size 160000000", ["image_size", "4096"]),
    # flags that nobody has, or that cannot work
    ("an unknown flag", {}, "train --stpes 3", ["--stpes"]),
    ("half a flag", {}, "train --step 3", ["--step"]),
    ("an unknown preset", {}, "train --preset huge", ["huge", "demo"]),
    ("no query", {}, "search --ckpt a.pt --images .", ["queries"]),
    ("an unknown command", {}, "evaluate retreival", ["retreival"]),
    ("no command", {}, "evaluate", ["retrieval"]),
    *((flags, {}, TRAIN + flags, words) for flags, words in (
        ("--batch 0", ["--batch 0 must be at least 1"]), ("--lr nan", ["--lr nan"]), ("--clip -1", ["--clip -1"]),
        ("--mask_probability 2", ["at most 1"]), ("--max_bad 2", ["--max_bad 2.0 must", "at most 1"]), ("--seed -1", ["--seed"]), ("--stop_after 0", ["--stop_after 0"]),
        ("--scenes -1", ["--scenes"]), ("--workers -2", ["--workers"]), ("--held_out 5", ["--held_out", "val split"]),
        ("--text_layers 0", ["text_layers is 0"]), ("--width 100", ["100"]), ("--texts a.tsv", ["--texts needs --images"]),
        ("--width 66 --vision_heads 4 --no-stem", ["multiple of 4 heads"]), ("--patch_size 24 --no-stem", ["patch size 24"]),
        ("--no-parallel_text --no-shared_fusion", ["--no-shared_fusion needs parallel text"]),
        ("--benchmark --init a.pt --no-shared_fusion", ["leave --init --no-shared_fusion out"]),
        ("--full", ["--full and --json are for --benchmark"]),
        ("--benchmark --json none/x.json", ["none/x.json cannot be written"]),
        ("--positions 3", ["room for 1 tokens", "--positions"]), ("--positions 2 --offset 3", ["--positions"]))),
    ("one image held out of one", {}, OWN + "--images one.tar --held_out 1", ["--held_out needs at least two"]),
    # what is not there, or is something else
    ("--out in a file", {"a": b"text"}, "train --out a/out", ["a"]),
    ("--out is a file", {"a": b"text"}, "train --out a", ["a is a file, not a folder"]),
    *((f"a checkpoint of {len(raw)} bytes", {"run/ckpt.pt": raw}, TRAIN, ["ckpt.pt", "not a checkpoint"])
      for raw in (b"", b"hello, I am a text", b"PK\x03\x04 a broken archive")),
    ("no images", {}, OWN + "--images none/*.tar", ["none/*.tar: no such file"]),
    ("nothing to validate on", {}, OWN + "--val none.tar", ["none.tar: no such file"]),
    ("two ways to validate", {}, OWN + "--val a.tar --held_out 2", ["--held_out and --val", "choose one"]),
    ("no tokenizer", {}, OWN + "--tokenizer none", ["none is not a tokenizer"]),
    ("no tokenizer for the demo", {}, TRAIN + "--tokenizer none", ["none is not a tokenizer"]),
    ("no tokenizer beside --init", {"a.pt": own()}, TRAIN + "--init a.pt --tokenizer none", ["none is not a tokenizer"]),
    ("another tokenizer than --init's", {"a.pt": own(), "b": pieces()}, TRAIN + "--init a.pt --tokenizer b",
     ["--tokenizer b is not the tokenizer", "leave --tokenizer out"]),
    *((f"a tokenizer in which {what} is a word", {"b": pieces(**layout)}, OWN + "--tokenizer b", ["b is not a tokenizer", piece])
      for what, piece, layout in (("the second piece", "its piece 1 is", {"bos_id": -1, "eos_id": -1}),
                                  ("the first piece", "its piece 0 is", {"unk_id": 4, "bos_id": 1, "eos_id": 2}))),
    ("a tokenizer into no folder", {"a.en": b"a\n", "a.de": b"b\n"}, "data tokenizer --texts a.en a.de --out none/spm.model",
     ["none/spm.model cannot be written"]),
    ("no texts", {}, OWN + "--texts none.tsv", ["none.tsv: no such file"]),
    ("a language that nobody speaks", {}, OWN + "--languages xx", ["no record in xx, but in cs de en fr ja zh"]),
    ("one of two languages", {}, OWN + "--languages en xx", ["--languages: no record is in xx; `python data.py"]),
    ("languages of the demo", {}, TRAIN + "--languages en", ["--languages", "your own files"]),
    # sources: layouts of others, folders, braces
    *((f"{name} as {flag}", {name: content}, OWN + f"--{flag} {name}", [name, said, "Other layouts"])
      for name, content, said in (
          ("b.json", b'[{"image": "x.jpg", "caption": "x"}]', "one JSON array"), ("b.csv", b"image,caption\nx.jpg,x\n", "CSV"),
          ("c.json", b'{"info": {}, "images": [{"id": 1}], "annotations": []}', "captions JSON of COCO or Karpathy"),
          ("results.token", b"123.jpg#0\ta dog\n", "list of pictures"), ("b.parquet", b"PAR1", "Parquet"))
      for flag in ("images", "texts")),
    ("a list of pictures in columns", {"b.tsv": b"123.jpg#0\ta dog\n"}, OWN + "--texts b.tsv", ["b.tsv looks like a list of pictures"]),
    ("a folder of nothing", {"b/x.md": b"", "b/c/x.h5": b""}, OWN + "--images b", ["b holds no picture", "but c x.md"]),
    ("a picture", {"x.jpg": b""}, OWN + "--images x.jpg", ["x.jpg is a picture: name its folder"]),
    ("a gap in braces", {"1.tar": b""}, OWN + "--images '{1..2}.tar'", ["2.tar: no such file"]),
    ("a pattern of Parquet files alone", {"x/b.parquet": b"PAR1"}, OWN + "--images 'x/*'", ["x/b.parquet is a Parquet file"]),
    ("the demo among files", {}, OWN + "--images demo a.tar", ["demo is the built-in data", "alone"]),
    ("no folder after a colon", {}, OWN + "--images a.tar:none", ["a.tar:none: no folder none"]),
    ("text in no language", {"b.md": b"x"}, OWN + "--texts b.md", ["b.md has no suffix of a language"]),
    ("pairs without a tokenizer", {}, TRAIN + "--images demo --texts a.tsv", ["--tokenizer"]),
    ("a compressed archive", {"x.tar.gz": b"\x1f\x8b"}, OWN + "--images x.tar.gz", ["x.tar.gz is compressed: unpack it"]),
    ("images as texts", {}, OWN + "--texts a.tar", ["give it to --images"]),
    ("no data", {}, "data none", ["none: no such file"]),
    ("a weight of 0", {"a.tsv": b"a\tb\n"}, "data a.tsv=0", ["weight"]),
    ("texts too few for a tokenizer", {"a.tsv": b"a\tb\n"}, "data tokenizer --texts a.tsv --vocab 9 --out x", ["9"]),
    # evaluation and search
    ("no tokenizer to evaluate", {"a.pt": own(tokens=False)}, "evaluate retrieval --ckpt a.pt", ["no tokenizer"]),
    ("no checkpoint to evaluate", {}, RETRIEVAL, ["a.pt: no such"]),
    ("an unknown split", {"a.pt": own()}, RETRIEVAL + "--data demo:nonsense", ["nonsense", "test_style"]),
    ("an empty caption", {"a.pt": own(), "x.png": samples.jpeg(0), "a.jsonl": b'{"image": "x.png", "captions": {"en": " "}}'},
     RETRIEVAL + "--data a.jsonl", ["a.jsonl line 1", "empty"]),
    ("a text as image", {"a.pt": own(), "x.png": b"text", "a.jsonl": b'{"image": "x.png", "captions": {"en": "a"}}'},
     RETRIEVAL + "--data a.jsonl", ["a.jsonl line 1", "image"]),
    ("no common image", {"a.pt": own(), "en.png": samples.jpeg(0), "de.png": samples.jpeg(1), "a.jsonl": b"".join(
        b'{"image": "%s.png", "captions": {"%s": "a"}}\n' % (k, k) for k in (b"en", b"de"))}, RETRIEVAL + "--data a.jsonl --common",
     ["no image has a caption in each of en de"]),
    ("the demo among files to evaluate", {"a.pt": own()}, RETRIEVAL + "--data demo:val a.tar", ["demo:SPLIT", "alone"]),
    ("all of the demo", {"a.pt": own()}, RETRIEVAL + "--data demo", ["is not a split", "test_style"]),
    ("pairs that cannot be read", {"a.pt": own(), "a.tsv": b"a\nb\n"}, "evaluate pairs --ckpt a.pt --data a.tsv",
     ["can be read: a.tsv line 1: 1 column"]),
    ("a negative K", {"a.pt": own()}, RETRIEVAL + "--rerank -1", ["--rerank"]),
    ("a folder that is not there", {"a.pt": own()}, RETRIEVAL + "--json none/x.json", ["none/x.json cannot be written"]),
    ("an unknown language", {"a.pt": own()}, RETRIEVAL + "--data demo:val_concept --languages xx", ["'xx'", "en"]),
    # benchmarks
    ("an empty file of a benchmark", {"a.pt": own(), "xm3600/captions.jsonl": b""}, XM3600,
     ["xm3600: the test set in en has no caption"]),
    ("a picture of a benchmark that is not there", {"a.pt": own(), "xm3600/captions.jsonl":
     b'{"image/key": "1", "en": {"caption": ["a"]}}'}, XM3600, ["xm3600/1.jpg", "1 pictures are missing", "--image_root"]),
    ("no pictures", {"a.pt": own(), "b/x.txt": b""}, "search --ckpt a.pt --images b dog", ["b holds no picture"]),
    ("broken pictures", {"a.pt": own(), "b/x.png": b"text"}, "search --ckpt a.pt --images b dog", ["x.png"]),
    ("top 0", {"a.pt": own(), "b/x.png": b"text"}, "search --ckpt a.pt --images b --top 0 dog", ["--top 0"]),
    ("an empty query", {"a.pt": own(), "b/x.png": b"text"}, "search --ckpt a.pt --images b '\u00a0'", ["is empty"]),
    ("a page that is a folder", {"a.pt": own(), "b/x.png": b"text"}, "search --ckpt a.pt --images b --html b dog", ["b cannot be written"]),
    ("features in no folder", {}, "search --ckpt a.pt --images . --features none/f.npz", ["none/f.npz cannot be written"]),
    ("a port that is none", {}, "search --ckpt a.pt --images . --serve 99999", ["--serve 99999: "]),
    ("a run that is not there", {"a.pt": own()}, "report --ckpt a.pt --runs none", ["--runs none", "--out of a run"]),
    ("results that are no JSON", {"a.pt": own(), "b/results.json": b"{"}, "report --ckpt a.pt --runs b", ["results.json", "JSON"]),
    ("a log of another program", {"a.pt": own(), "b/log.csv": b"step,a\n1,2\n"}, "report --ckpt a.pt --runs b", ["b/log.csv", "'loss'"]),
    ("a report without a folder", {"a.pt": own()}, "report --ckpt a.pt --out none/a.html", ["none/a.html cannot be written"]),
]


@pytest.mark.parametrize("files, command, words", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_it_is_one_line_and_nothing_is_written(files, command, words, tmp_path, monkeypatch, capsys, tokenizer):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        write(name, content, tokenizer)
    if command.startswith(OWN):
        samples.write_tar("a.tar", 4)
        samples.write_tar("one.tar", 1)
        write("spm.model", tokenizer.model, None)
    before = sorted(os.listdir())
    program, *arguments = shlex.split(command)
    capsys.readouterr()
    try:
        status = PROGRAMS[program](arguments)
    except SystemExit as error:                                              # argparse's own
        status = error.code
    line = capsys.readouterr().err
    assert status == 2 and line.count("\n") == 1 and all(word in line for word in words), line
    made = {name for name in os.listdir() if not name.endswith(".index")} - set(before)
    assert made <= {"run"}                                                   # the folder of --out, which is empty
