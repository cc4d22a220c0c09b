"""Weights in and out: published models and encoders become checkpoints of train.py, and these go out as safetensors.

A source is a published file, or a folder with one, its sentencepiece.bpe.model and, where it has one, its config.json.
formats/checkpoints.py reads it, as plain data that cannot run code; formats/layouts.py recognises it; every tensor is accounted for (used as,
unused because, missing -> initialised how), or it is an error.

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
import pathlib
import sys
from dataclasses import asdict, fields, replace

import torch

import data
from formats.checkpoints import read_checkpoint, read_pickle, read_safetensors, write_checkpoint, write_safetensors
from formats.layouts import (PARTS, Source, check_sizes, fit, merge, part, patches, report, text_encoder,
                             translate)
from model import CCLM, Config, build, relative_index

# ------------------------------------------------------------------------------------------------------------------
# Import
# ------------------------------------------------------------------------------------------------------------------

def known_fields(config, path):
    """The fields of a saved Config -> the same; ValueError for one that this version of the program cannot build."""
    kinds = {field.name: (int, float) if field.type is float else (field.type,) for field in fields(Config)}
    for name, value in config.items():
        if type(value) not in kinds.get(name, ()):                           # True is no int here
            raise ValueError(f"{path} was saved by another version of this program, which this one cannot read: "
                             f"setting {name!r} is {value!r}; use that version")
    check_sizes(config, path)
    return config


def words_of(tokenizer, path):
    """The number of words of a sentencepiece model, None of None; ValueError that names its file."""
    try:
        return None if tokenizer is None else data.Tokenizer(tokenizer or b"nothing").size
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def own_source(path, weights, config, tokenizer):
    """A checkpoint or an export of this program: the names are ours, and every part must be there."""
    notes = [(name, [name], "") for name in weights]
    words_of(tokenizer, path)
    return Source(str(path), weights, notes, known_fields(config, path), (*PARTS, "mlm_head"), {}, tokenizer)


SUFFIXES = (".th", ".pth", ".bin", ".safetensors")


def weights_file(path):
    """A file, or the one that a folder means: model.safetensors, else pytorch_model.bin, else its only one."""
    if not path.is_dir():
        return path
    found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()][:1]
    found = found or sorted(x for x in path.iterdir() if x.suffix in SUFFIXES and x.is_file())
    if not found:
        raise ValueError(f"{path} holds no pytorch_model.bin nor another file of weights ({' '.join(SUFFIXES)})")
    if len(found) > 1:
        raise ValueError(f"{path} holds {', '.join(x.name for x in found)}: name one of them")
    return found[0]


def read_settings(path):
    """A config.json -> dict; ValueError that names it."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path} is not readable as the settings of a model ({error})") from None


def told(source, path):
    """Fields that the config.json beside XLM-R's or CLIP's weights tells and shapes do not."""
    tower = {"XLM-R": "text", "CLIP": "vision"}.get(source.title)
    settings = read_settings(path) if tower and path.is_file() else {}
    clip = "clip" in str(settings.get("model_type", "")).lower()
    if not settings or clip != (tower == "vision"):                          # none, or another model's
        return {}
    settings = settings.get("vision_config", settings) if clip else settings
    if clip and settings.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise ValueError(f"{path}: hidden_act is {settings['hidden_act']!r}, but only CLIP with quick_gelu is read")
    names = {"num_attention_heads": f"{tower}_heads", "layer_norm_eps": f"{tower}_eps"}
    known = known_fields({ours: settings[name] for name, ours in names.items() if name in settings}, path)
    return known | ({"fusion_heads": known["text_heads"]} if "fusion_heads" in source.fields and known else {})


def check_patch_order(tensors):
    """ValueError when a file numbers its pairs of patches in another way than model.relative_index."""
    for name, tensor in tensors.items():
        if name.endswith("relative_position_index") and not torch.equal(tensor, relative_index(patches(tensor))):
            raise ValueError(f"{name} is not BEiT's order of patches")


def read_source(path, every_second=False):
    """A published file, a folder with one, or a checkpoint or export of ours -> Source; its tensors map the file."""
    path = pathlib.Path(path)
    file = weights_file(path)
    whole = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file, mmap=True)
    whole = whole if isinstance(whole, dict) else {}
    inner = [whole[key] for key in ("model", "module", "state_dict") if isinstance(whole.get(key), dict)]
    tensors = (inner or [whole])[0]
    if not tensors or not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in tensors.items()):
        raise ValueError(f"{file} holds no state dict, neither bare nor under 'model' or 'module'")
    odd = [n for n, t in tensors.items() if t.layout != torch.strided or t.is_complex() or t.is_quantized or t.is_meta]
    if odd:
        raise ValueError(f"{file}: {odd[0]} is not a tensor of plain numbers, but sparse, complex, quantized or empty")
    spm, settings = file.parent / "sentencepiece.bpe.model", file.parent / "config.json"
    tokenizer = spm.read_bytes() if spm.exists() else None
    if "temperature" in tensors and inner:                                   # our own names
        state = read_checkpoint(file, mmap=True)
        source = own_source(path, tensors, state["config"]["model"], state["tokenizer"])
        return source
    words_of(tokenizer, spm)
    if "temperature" in tensors:
        return own_source(path, tensors, known_fields(read_settings(settings), settings), tokenizer)
    try:
        check_patch_order(tensors)
        source = translate(tensors, every_second)
        return source._replace(tokenizer=tokenizer, fields=source.fields | told(source, settings))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except (TypeError, IndexError, RuntimeError, AttributeError):
        raise ValueError(f"{file}: its tensors have names that are known here, but shapes that are not") from None


def read_sources(paths, every_second=False, towers=()):
    """Several sources as one: a later one replaces parts of earlier ones, see layouts.merge. towers: what each must
    hold, or ""."""
    found = [read_source(path, every_second) for path in paths]
    for one, path, tower in zip(found, paths, towers):
        if tower and tower not in map(part, one.weights):
            raise ValueError(f"--init_{tower} {path}: {one.title} holds no {tower} encoder")
    source = functools.reduce(merge, found)
    if every_second and "XLM-R" not in source.title.split(" + "):
        raise ValueError(f"--every_second takes layers of XLM-R, and {source.title} is not one")
    words, rows = words_of(source.tokenizer, source.title), source.fields.get("vocabulary")
    if words and rows and words != rows:
        raise ValueError(f"{source.title}: the tokenizer beside it has {words:,} words, its table {rows:,}: put the "
                         f"sentencepiece.bpe.model it was trained with into its folder")
    return source


def settled(preset, source, changes, title):
    """The Config of a source: what it says, and where it says nothing heads 64 wide and MLPs four times the width, then
    the preset; `changes` win. ValueError names the setting that does not fit."""
    if "width" not in source.fields:
        raise ValueError(f"{title}: no encoder in it that is read here, so no width; name a file with one")
    width, towers = source.fields["width"], ("vision", "text", "fusion")
    usual = {f"{t}_heads": max(1, width // 64) for t in towers} | {f"{t}_mlp": 4 * width for t in towers}
    config = build(preset, **usual | source.fields | known_fields(changes, "the command line"))
    for tower in towers:
        heads = getattr(config, f"{tower}_heads")
        if config.width % heads:
            raise ValueError(f"{title}: width {config.width} is not a multiple of {heads} heads: choose another "
                             f"--{tower}_heads")
    return config


def check_positions(config, title):
    """ValueError when a sentence as long as training and search make it would not fit."""
    if config.positions - config.offset < data.LONGEST:
        raise ValueError(f"{title}: the position table has room for {config.positions - config.offset} tokens, and "
                         f"sentences here have up to {data.LONGEST}: a longer one is needed")


def initialise(model, source):
    """Loads a source into a model that was just made -> a line about what came and what is new."""
    weights, missing = fit(source, model, ["text_fusion.*"])
    model.load_state_dict(weights, strict=False)
    if model.text_fusion is not None and "text_fusion" not in map(part, weights):
        model.text_fusion.load_state_dict(model.fusion.state_dict())         # the same start for both
    new = sorted({part(name) for name in missing})
    title = source.title
    if model.text_fusion is None and "text_fusion" in map(part, source.weights):
        title += " (without its text fusion encoder)"
    return f"{len(weights)} tensors from {title}; new: {', '.join(new) or 'nothing'}"


INITS = ("init", "init_vision", "init_text")                                 # flags of train.py


def starting_point(path, state, flags):
    """Where train.py begins: at the checkpoint `state` of `path` to resume, else at the files of --init, --init_vision,
    --init_text, else at random weights -> (CCLM, data.Tokenizer, a line about it). flags: the command line as a dict;
    its fields of Config (None: not given) win over the source's, and the source's over the preset's."""
    changes = {field.name: flags[field.name] for field in fields(Config) if flags.get(field.name) is not None}
    preset, named = flags["preset"], [name for name in INITS if flags[name]]
    paths, own_data = [flags[name] for name in named], bool(flags.get("images"))
    given = (lambda: data.load_tokenizer(flags["tokenizer"])) if own_data else data.demo_tokenizer
    if not state and not paths:
        check_sizes(changes, "the command line")
        tokenizer = given()
        config = build(preset, **changes | {"vocabulary": tokenizer.size})
        check_positions(config, "--positions")
        return CCLM(config), tokenizer, "random weights"
    source = (own_source(path, state["model"], state["config"]["model"], state["tokenizer"]) if state else
              read_sources(paths, towers=[name[5:] for name in named]))
    if not source.tokenizer and not own_data and "text" in map(part, source.weights):
        raise ValueError(f"{' and '.join(paths)}: no tokenizer; put its sentencepiece.bpe.model into the same folder")
    tokenizer = data.Tokenizer(source.tokenizer) if source.tokenizer else given()
    config = settled(preset, source, changes | {"vocabulary": tokenizer.size}, source.title)
    check_positions(config, source.title)
    model = CCLM(config)
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
    config = settled("base", source, changes or {}, source.title)
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
    if not config.shared_fusion:
        raise ValueError(f"{path} was trained with --no-shared_fusion: an export has no place for its second fusion "
                         f"encoder")
    own = {name: t for name, t in state["model"].items() if name != "mlm_head.weight" or not config.tied}
    parts = (folder, asdict(config), own), (folder / "text_encoder", *text_encoder(own, config))
    for place, settings, tensors in parts:
        place.mkdir(parents=True, exist_ok=True)
        write_safetensors(place / "model.safetensors", tensors)
        (place / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        if state["tokenizer"]:
            (place / "sentencepiece.bpe.model").write_bytes(state["tokenizer"])
    start = " + ".join(filter(None, map(state["config"]["train"].get, INITS))) or "random weights"
    settings = "\n".join(f"- {name}: {value}" for name, value in asdict(config).items())
    (folder / "README.md").write_text(CARD.format(sum(t.numel() for t in own.values()), state["step"], start, settings))


CARD = """# A CCLM model

Image-text and text-text retrieval in many languages (Cross-View Language Modeling, arXiv 2206.00621). {:,} parameters,
{} training steps from {}. What it was trained on, measured on and is licensed for: please add before publishing.

    python weights.py import THIS_FOLDER --out ckpt.pt          for train.py --init and evaluate.py --ckpt
    XLMRobertaModel.from_pretrained("THIS_FOLDER/text_encoder", add_pooling_layer=False)      its text encoder

{}
"""


SIZES = ("vision_heads", "text_heads", "fusion_heads", "image_size")


def check_out(out):
    """ValueError, before anything is read, where no checkpoint can be written."""
    taken = [folder for folder in out.parents if folder.exists() and not folder.is_dir()]
    if taken or not out.name or out.exists() and not out.is_file():
        raise ValueError(f"--out {taken[0]} is no folder" if taken else
                         f"--out {out} is not a file: name the checkpoint to write, as in --out ckpt.pt")


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
    changes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    flags = [f"--{name}" for name, value in vars(args).items() if name != "words" and value not in (None, False, [])]
    try:
        if command == "import" and rest and args.out is not None:
            check_sizes({f"--{name}": value for name, value in changes.items()}, "import")
            check_out(args.out)
            state, lines = import_sources(rest, changes, args.every_second, args.allow_missing)
            check_positions(Config(**state["config"]["model"]), " and ".join(rest))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(args.out, state)
            print(*lines, f"wrote {args.out}", sep="\n")
        elif command != "import" and flags:
            raise ValueError(f"{', '.join(flags)}: only for weights.py import")
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
        return data.fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
