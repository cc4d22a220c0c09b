"""Weights in and out: checkpoints of train.py, published models and encoders, safetensors.

A checkpoint is one file of plain dicts and tensors, read with weights_only=True: it cannot run code.

    {"model": state dict, "optimizer": ..., "step": int, "rng": [one per process], "tokenizer": sentencepiece's bytes,
     "config": {"model": the fields of model.Config, "train": the settings of train.py}}

A source is a published file, or a folder with one and its sentencepiece.bpe.model. layouts.py recognises it; every
tensor is accounted for (used as, unused because, missing -> initialised how), or it is an error.

    python weights.py out/ckpt.pt                                    what a checkpoint holds
    python weights.py import cclm_x2vlm_base.th --out ckpt.pt        the authors' model, for --init and --ckpt
    python weights.py import x2vlm_base_1b.th xlmr/ --out ckpt.pt    where CCLM-X2VLM began: a later source replaces the
                                                                     parts of earlier ones (F4.7)
    python weights.py import beit2.pth xlmr/ --every_second --out F  where CCLM-3M/4M began: half the layers (F4.5)
    python weights.py export ckpt.pt DIR                             safetensors, and a text encoder for transformers
"""
import argparse
import functools
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import sys
import zipfile
from dataclasses import asdict, fields, replace

import numpy as np
import torch

import data
import sources
from layouts import PARTS, Source, fit, merge, part, report, text_encoder, translate
from model import CCLM, Config, build

# ------------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------------


def write_checkpoint(path, state, keep=0):
    """Written beside its place, flushed to disk, then renamed: a kill at any moment, or a full disk, leaves the old
    file or the new one. keep: how many earlier ones stay as ckpt_STEP.pt."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:                                 # torch hides a full disk in "enforce fail"
        beside.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and "enforce fail" not in str(error):
            raise                                                            # a worker that died at this moment
        raise ValueError(f"{path} cannot be written, {shutil.disk_usage(path.parent).free / 2 ** 20:,.0f} MB are free "
                         f"there ({error}); what stood there before is whole") from None
    if keep and path.exists():                                               # linked: at no moment is there no ckpt.pt
        earlier = path.with_name(f"ckpt_{torch.load(path, weights_only=True, mmap=True)['step']}.pt")
        earlier.unlink(missing_ok=True)
        os.link(path, earlier)
        for stale in sorted(path.parent.glob("ckpt_*.pt"), key=lambda p: int(p.stem[5:]))[:-keep]:
            stale.unlink()
    os.replace(beside, path)


def read_pickle(path, mmap=False):
    """torch.load that cannot run code; ValueError in one line for what it does not read. argparse.Namespace, which
    trainers leave in their files, is plain data."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint or file of weights") from None
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, OverflowError,
            AssertionError, MemoryError, pickle.UnpicklingError) as error:   # what broken bytes make of the unpickler
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        raise ValueError(f"{path} is refused, not a checkpoint of plain data: it asks to run {code[1]}" if code else
                         f"{path} is truncated or not a checkpoint ({type(error).__name__})") from None


def read_checkpoint(path, mmap=False):
    """The dict that train.py saved; ValueError in one line for anything else. mmap: its tensors map the file."""
    state = read_pickle(path, mmap)
    try:
        dict(state["model"]), dict(state["config"]["model"]), dict(state["config"]["train"]), state["tokenizer"]
        return state
    except (KeyError, TypeError, IndexError, ValueError):
        raise ValueError(f"{path} is not a checkpoint of train.py; or first: python weights.py import") from None


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor}, each a map of its piece of the file: 8 bytes of length, a JSON header, the tensors' bytes."""
    try:
        with open(path, "rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), os.path.getsize(path)
            header, tensors = json.loads(file.read(length) if length < size else b""), {}
        for name, entry in header.items():
            if name != "__metadata__":
                (start, end), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]
                if end - start != math.prod(shape) * dtype.itemsize or start < 0:        # an end too far: mmap refuses
                    raise ValueError(f"{name} does not fit into the file")
                tensors[name] = torch.zeros(shape, dtype=dtype) if end == start else torch.from_numpy(
                    np.memmap(path, "u1", "c", 8 + length + start, end - start)).view(dtype).view(shape)
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from None


def write_safetensors(path, tensors):
    """The inverse; wide types first, so that every tensor lies aligned."""
    codes, header, end = {dtype: code for code, dtype in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        t, start = tensors[name], end
        end += t.numel() * t.dtype.itemsize
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())


# ------------------------------------------------------------------------------------------------------------------
# Import
# ------------------------------------------------------------------------------------------------------------------

def known_fields(config, path):
    """The fields of a saved Config -> the same; ValueError for one that this version of the program cannot build."""
    kinds = {field.name: (int, float) if field.type is float else field.type for field in fields(Config)}
    for name, value in config.items():
        if not isinstance(value, kinds.get(name, ())):
            raise ValueError(f"{path} was saved by another version of this program, which this one cannot read: "
                             f"setting {name!r} is {value!r}; use that version")
    return config


def own_source(path, weights, config, tokenizer):
    """A checkpoint or an export of this program: the names are ours, and every part must be there."""
    notes = [(name, [name], "") for name in weights]
    return Source(str(path), weights, notes, known_fields(config, path), (*PARTS, "mlm_head"), {}, tokenizer)


def read_source(path, every_second=False):
    """A published file, a folder with one, or a checkpoint or export of ours -> Source; its tensors map the file."""
    path = pathlib.Path(path)
    folder, names = (path, ("model.safetensors", "pytorch_model.bin")) if path.is_dir() else (path.parent, (path.name,))
    file = next((folder / name for name in names if (folder / name).exists()), path)
    if file.is_dir():
        raise ValueError(f"{path} holds neither {' nor '.join(names)}")
    whole = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file, mmap=True)
    whole = whole if isinstance(whole, dict) else {}
    inner = [whole[key] for key in ("model", "module", "state_dict") if isinstance(whole.get(key), dict)]
    tensors = (inner or [whole])[0]
    if not tensors or not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in tensors.items()):
        raise ValueError(f"{file} holds no state dict, neither bare nor under 'model' or 'module'")
    spm, settings = folder / "sentencepiece.bpe.model", folder / "config.json"
    tokenizer = spm.read_bytes() if spm.exists() else None
    if "temperature" in tensors and inner:                                   # our own names
        state = read_checkpoint(file, mmap=True)
        return own_source(path, tensors, state["config"]["model"], state["tokenizer"])
    try:
        if "temperature" in tensors:
            return own_source(path, tensors, dict(json.loads(settings.read_text(encoding="utf-8"))), tokenizer)
        return translate(tensors, every_second)._replace(tokenizer=tokenizer)
    except (ValueError, TypeError, IndexError, RuntimeError, OSError) as error:        # shapes that no layout has
        raise ValueError(f"{file}: {error}") from None


def read_sources(paths, every_second=False):
    """Several sources as one: a later one replaces parts of earlier ones, see layouts.merge."""
    source = functools.reduce(merge, [read_source(path, every_second) for path in paths])
    if every_second and "XLM-R" not in source.title.split(" + "):
        raise ValueError(f"--every_second takes layers of XLM-R, and {source.title} is not one")
    words, rows = source.tokenizer and data.Tokenizer(source.tokenizer).size, source.fields.get("vocabulary")
    if words and rows and words != rows:
        raise ValueError(f"{source.title}: the tokenizer beside it has {words:,} words, its table {rows:,}: put the "
                         f"sentencepiece.bpe.model it was trained with into its folder")
    return source


def usual(source):
    """Fields of Config: what a source says, and where it says nothing heads 64 wide and MLPs four times the width."""
    width, towers = source.fields["width"], ("vision", "text", "fusion")
    return ({f"{t}_heads": max(1, width // 64) for t in towers} | {f"{t}_hidden": 4 * width for t in towers}
            | source.fields)


def initialise(model, source):
    """Loads a source into a model that was just made -> a line about what came and what is new."""
    weights, missing = fit(source, model)
    model.load_state_dict(weights, strict=False)
    new = sorted({part(name) for name in missing})
    return f"{len(weights)} tensors from {source.title}; new: {', '.join(new) or 'nothing'}"


INITS = ("init", "init_vision", "init_text")                                 # flags of train.py


def starting_point(path, state, flags):
    """Where train.py begins: at the checkpoint `state` of `path` to resume, else at the files of --init, --init_vision,
    --init_text, else at random weights -> (CCLM, data.Tokenizer, a line about it). flags: the command line as a dict;
    its fields of Config (None: not given) win over the source's, and the source's over the preset's."""
    changes = {field.name: flags[field.name] for field in fields(Config) if flags.get(field.name) is not None}
    preset, paths = flags["preset"], [flags[name] for name in INITS if flags[name]]
    given = (lambda: sources.load_tokenizer(flags["tokenizer"])) if flags.get("images") else data.demo_tokenizer
    if not state and not paths:
        tokenizer = given()
        return CCLM(build(preset, **changes | {"vocabulary": tokenizer.size})), tokenizer, "random weights"
    source = (own_source(path, state["model"], state["config"]["model"], state["tokenizer"]) if state else
              read_sources(paths))
    if not source.tokenizer and not flags.get("images") and "text" in map(part, source.weights):
        raise ValueError(f"{' and '.join(paths)}: no tokenizer; put its sentencepiece.bpe.model into the same folder")
    tokenizer = data.Tokenizer(source.tokenizer) if source.tokenizer else given()
    model = CCLM(build(preset, **usual(source) | changes | {"vocabulary": tokenizer.size}))
    return model, tokenizer, initialise(model, source)


def fresh(config, names):
    """New tensors for the missing names. Towers that miss nothing are built without layers: they take no memory."""
    parts = {part(name) for name in names}
    empty = {f"{tower}_layers": 0 for tower in ("vision", "text", "fusion") if tower not in parts}
    torch.manual_seed(0)
    made = CCLM(replace(config, **empty | ({} if parts & {"text", "mlm_head"} else {"vocabulary": 1}))).state_dict()
    return {name: made[name] for name in names}


def import_sources(paths, changes=None, every_second=False, allow=()):
    """Published files -> (a checkpoint's dict, the report's lines). What no source says is as in the preset base.
    changes: fields of Config in place of what was read; allow: patterns of names that may be missing or unknown."""
    source = read_sources(paths, every_second)
    config = build("base", **usual(source) | (changes or {}))
    with torch.device("meta"):
        model = CCLM(config)
    weights, missing = fit(source, model, allow)
    made = fresh(config, missing) if missing else {}
    weights = {name: weights[name] if name in weights else made[name] for name in model.state_dict()}
    state = {"model": weights, "step": 0, "tokenizer": source.tokenizer,
             "config": {"model": asdict(config), "train": {"init": source.title}}}
    lines = report(source, weights, missing, made)
    return state, lines + [", ".join(f"{name} {value}" for name, value in asdict(config).items()),
                           f"tokenizer: {'its own' if source.tokenizer else 'not found'}"]


def load_weights(model, weights, source):
    """model.load_state_dict, but a ValueError in one line names the first tensor that is missing or misshapen."""
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
    model = CCLM(Config(**known_fields(state["config"]["model"], path)))
    load_weights(model, state["model"], path)
    return model, state


# ------------------------------------------------------------------------------------------------------------------
# Export, and the command line
# ------------------------------------------------------------------------------------------------------------------

def export(path, folder):
    """A checkpoint -> folder/{model.safetensors, config.json, sentencepiece.bpe.model, README.md, text_encoder/}."""
    state, folder = read_checkpoint(path, mmap=True), pathlib.Path(folder)
    config = Config(**known_fields(state["config"]["model"], path))
    own = {name: t for name, t in state["model"].items() if name != "mlm_head.weight" or not config.tied}
    parts = (folder, asdict(config), own), (folder / "text_encoder", *text_encoder(own, config))
    for place, settings, tensors in parts:
        place.mkdir(parents=True, exist_ok=True)
        write_safetensors(place / "model.safetensors", tensors)
        (place / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        if state["tokenizer"]:
            (place / "sentencepiece.bpe.model").write_bytes(state["tokenizer"])
    start = " + ".join(filter(None, map(state["config"]["train"].get, INITS))) or "random weights"
    (folder / "README.md").write_text(CARD.format(sum(t.numel() for t in own.values()), state["step"], start, config))


CARD = """# A CCLM model

Image-text and text-text retrieval in many languages (Cross-View Language Modeling, arXiv 2206.00621). {:,} parameters,
{} training steps from {}. What it was trained on, measured on and is licensed for: please add before publishing.

    python weights.py import THIS_FOLDER --out ckpt.pt          for train.py --init and evaluate.py --ckpt
    XLMRobertaModel.from_pretrained("THIS_FOLDER/text_encoder", add_pooling_layer=False)      its text encoder

{}
"""


SIZES = ("vision_heads", "text_heads", "fusion_heads", "image_size")


def main(argv=None):
    """-> exit status: 0, or 2 after one line about what was wrong with the input."""
    parser = data.Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="import SOURCE ..., export CKPT DIR, or CKPT (default: out/ckpt.pt)")
    parser.add_argument("--out", type=pathlib.Path, help="import: the checkpoint to write")
    parser.add_argument("--every_second", action="store_true", help="import: XLM-R's layers 1, 3, 5 as text and fusion")
    parser.add_argument("--allow_missing", action="append", default=[], metavar="NAME",
                        help="import: do without this tensor, named as there or here; * is any text; may be repeated")
    for name in SIZES:
        parser.add_argument("--" + name, type=int, help="import: (default: as in the source)")
    args = parser.parse_intermixed_args(argv)
    command, *rest = args.words or ["out/ckpt.pt"]
    try:
        if command == "import" and rest and args.out:
            changes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
            if any(value < 1 for value in changes.values()):
                raise ValueError(f"{', '.join('--' + name for name in SIZES)} must be at least 1")
            state, lines = import_sources(rest, changes, args.every_second, args.allow_missing)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(args.out, state)
            print(*lines, f"wrote {args.out}", sep="\n")
        elif command == "export" and len(rest) == 2:
            export(*rest)
            print(f"wrote {rest[1]}")
        elif rest or command in ("import", "export"):
            raise ValueError("usage: weights.py import SOURCE ... --out CKPT, or export CKPT DIR, or CKPT")
        else:
            model, state = load_model(command)
            print(f"step {state['step']}, {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary "
                  f"{model.config.vocabulary:,}", *(f"  {k:16}{v}" for k, v in asdict(model.config).items()), sep="\n")
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
