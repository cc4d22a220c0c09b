"""Weights in and out: published models become checkpoints, and these go out as safetensors.

A source is a published file, or a folder with one, its sentencepiece.bpe.model and its config.json.
formats/checkpoints.py opens it, formats/layouts.py knows its names. Every tensor is used, or unused
for a reason, or missing and new for a reason. Anything else is an error. A later source replaces
the parts of earlier ones that it holds.

    python weights.py import cclm_x2vlm_base.th --out ckpt.pt        the authors' model
    python weights.py import beitv2_base.pth xlmr/ --out ckpt.pt     two encoders; the rest is new
    python weights.py import xlmr/ x2vlm_base_1b.th --out ckpt.pt    where CCLM-X2VLM began
    python weights.py import xvnli.th --out ckpt.pt                  CCLM-X2VLM after fine-tuning
    python weights.py import beitv2_large.pth xlmr_large/ --every_second --out ckpt.pt
                                                                     texts as CCLM-3M/4M began
    python weights.py export ckpt.pt DIR                             safetensors; DIR/text_encoder
"""
import argparse
import functools
import json
import pathlib
import re
from dataclasses import asdict, fields

import torch

import benchmark
import data
from formats.checkpoints import (read_checkpoint, read_pickle, read_safetensors, write_checkpoint,
                                 write_safetensors)
from formats.layouts import (PARTS, Note, Source, adapt_to_model, merge, part_of, report,
                             text_encoder, translate, without_tied_decoder)
from model import PRESETS, CCLM, Config, build
from tasks import TASKS

# --------------------------------------------------------------------------------------------------
# Reading sources
# --------------------------------------------------------------------------------------------------

SUFFIXES = (".th", ".pth", ".bin", ".safetensors")
USUAL = ("model.safetensors", "pytorch_model.bin")
WRAPPERS = r"^(module\.|_orig_mod\.)+"       # prefixes of DistributedDataParallel, torch.compile


def weights_file(path):
    """A file, or the one that a folder means: one of USUAL, or its only one."""
    if not path.is_dir():
        return path
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    usual = [file for file in found if file.name in USUAL]
    if not usual and len(found) != 1:
        names = ", ".join(file.name for file in found) or f"none of {' '.join(SUFFIXES)}"
        raise ValueError(f"{path} should hold one file of weights, but holds {names}: name a file")
    return (usual or found)[0]


def read_tensors(file):
    """{name: tensor} of a file of weights; the tensors map the file."""
    safe = file.suffix == ".safetensors"
    whole = read_safetensors(file) if safe else read_pickle(file, mmap=True)
    if isinstance(whole, dict):
        for tensors in (whole.get("model"), whole.get("module"), whole.get("state_dict"), whole):
            if isinstance(tensors, dict) and tensors:
                if all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
                    return {re.sub(WRAPPERS, "", str(name)): t for name, t in tensors.items()}
    raise ValueError(f"{file} holds no state dict, neither bare nor under 'model' or 'module'")


def read_config_json(path):
    """A config.json -> dict. ValueError names the file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{path} is not readable as the settings of a model ({error})") from None


def fields_from_config_json(source, path):
    """Model settings that the config.json beside XLM-R's or CLIP's weights has and tensor shapes
    cannot show: the number of heads, LayerNorm's epsilon."""
    tower = {"XLM-R": "text", "CLIP": "vision"}.get(source.title)
    if not tower or not path.is_file():
        return {}
    settings = read_config_json(path)
    is_clip = "clip" in str(settings.get("model_type", "")).lower()
    if is_clip != (tower == "vision"):                           # it describes another file
        return {}
    settings = settings.get("vision_config", settings)           # CLIP with its text side has both
    if is_clip and settings.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise ValueError(f"{path}: hidden_act is {settings['hidden_act']!r}, but only CLIP with "
                         f"quick_gelu is read")
    found = {}
    if "num_attention_heads" in settings:
        found[f"{tower}_heads"] = settings["num_attention_heads"]
        if "fusion" in source.parts:                             # --every_second
            found["fusion_heads"] = settings["num_attention_heads"]
    if "layer_norm_eps" in settings:
        found[f"{tower}_eps"] = settings["layer_norm_eps"]
    return check_fields(found, path)


def check_fields(config, path):
    """The fields of a Config, unchanged. ValueError for one that this program cannot build."""
    types = {field.name: field.type for field in fields(Config)}
    for name, value in config.items():
        wanted = (int, float) if types.get(name) is float else (types.get(name),)
        if type(value) not in wanted:                            # not isinstance: True is no width
            raise ValueError(f"{path} was saved by another version of this program, which this one "
                             f"cannot read: setting {name!r} is {value!r}; use that version")
        least = 0 if name == "offset" else 1
        if type(value) is int and value < least:
            raise ValueError(f"{path}: {name} is {value}, but must be at least {least}")
        if name == "image_size" and value > 4096:
            raise ValueError(f"{path}: {name} is {value}, but must be at most 4096")
    return config


def own_source(path, weights, config, tokenizer, task):
    """The Source of a checkpoint or an export of this program: the names are ours."""
    notes = [Note(name, [name], "") for name in weights]
    parts = (*PARTS, "mlm_head")
    return without_tied_decoder(Source(str(path), weights, notes, config, parts, {}, tokenizer,
                                       task))


def checkpoint_source(path, state):
    """The Source of a checkpoint that was read from `path`."""
    config = check_fields(state["config"]["model"], path)
    task = state["config"].get("task")
    return own_source(path, state["model"], config, state["tokenizer"], task)


def read_source(path, every_second=False):
    """A published file, a folder with one, a checkpoint or an export of ours -> Source."""
    path = pathlib.Path(path)
    file = weights_file(path)
    tensors = read_tensors(file)
    ours = "temperature" in tensors                             # the official code calls it temp
    if ours and file.suffix != ".safetensors":
        return checkpoint_source(path, read_checkpoint(file, mmap=True))
    tokenizer_file = file.parent / "sentencepiece.bpe.model"
    tokenizer = tokenizer_file.read_bytes() if tokenizer_file.exists() else None
    config_file = file.parent / "config.json"
    if ours:
        settings = read_config_json(config_file)
        task = settings.pop("task", None)
        config = check_fields(settings, config_file)
        return own_source(path, tensors, config, tokenizer, task)
    try:
        source = translate(tensors, every_second)
        settings = fields_from_config_json(source, config_file)
        return source._replace(tokenizer=tokenizer, fields=source.fields | settings)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    except (TypeError, IndexError, RuntimeError, AttributeError):
        raise ValueError(f"{file}: its tensors have names that are known here, but shapes that are "
                         f"not") from None


def read_sources(paths, every_second=False):
    """Several sources as one: a later one replaces the parts of earlier ones that it holds."""
    source = functools.reduce(merge, [read_source(path, every_second) for path in paths])
    if every_second and "XLM-R" not in source.title.split(" + "):
        raise ValueError(f"--every_second takes layers of XLM-R, and {source.title} is not one")
    if source.tokenizer is None:
        return source
    try:
        tokens = data.Tokenizer(source.tokenizer).size
    except ValueError as error:
        raise ValueError(f"{source.title}: its sentencepiece.bpe.model: {error}") from None
    rows = source.fields.get("vocabulary", tokens)
    if tokens != rows:
        raise ValueError(f"{source.title}: its sentencepiece.bpe.model has {tokens:,} tokens, its "
                         f"word embedding {rows:,} rows: take the one it was trained with")
    return source


# --------------------------------------------------------------------------------------------------
# From a source to a model
# --------------------------------------------------------------------------------------------------

def resolve_config(preset, source, changes):
    """The Config of a source. A field is taken from the first of these that has it: changes, the
    source, "heads 64 wide and MLPs four times the width", the preset."""
    if "width" not in source.fields:
        raise ValueError(f"{source.title}: no encoder that is read here, so no width")
    width = source.fields["width"]
    usual = {}
    for tower in ("vision", "text", "fusion"):
        usual |= {f"{tower}_heads": max(1, width // 64), f"{tower}_mlp": 4 * width}
    changes = check_fields(changes, "the command line")
    config = build(preset, **usual | source.fields | changes)
    check_fields(asdict(config), source.title)
    for tower in ("vision", "text", "fusion"):
        heads = getattr(config, f"{tower}_heads")
        if config.width % heads:
            raise ValueError(f"{source.title}: width {config.width} is not a multiple of {heads} "
                             f"heads: choose another --{tower}_heads")
    return config


def new_model(config, source):
    """A CCLM, with a new head if the source was fine-tuned on a benchmark."""
    model = CCLM(config)
    if source.task:
        if source.task not in TASKS:
            raise ValueError(f"{source.title} is fine-tuned on {source.task}, which is none of "
                             f"{', '.join(TASKS)}")
        model.task_head = TASKS[source.task]("", "").head(config)
    return model


def import_sources(paths, changes=None, every_second=False, allow=()):
    """Published files -> (a checkpoint's dict, the lines of the key report). changes: fields of
    Config that win over the files'. allow: patterns of names that may be missing or unknown."""
    source = read_sources(paths, every_second)
    config = resolve_config("base", source, changes or {})
    with torch.device("meta"):                                  # shapes only, no memory
        model = new_model(config, source)
    weights, missing = adapt_to_model(source, model, allow)
    torch.manual_seed(0)                                        # the same ones in every import
    made = new_model(config, source).state_dict() if missing else {}
    made = {name: made[name] for name in missing}
    lines = report(source, weights, missing, made)
    lines.append(", ".join(f"{name} {value}" for name, value in asdict(config).items()))
    lines.append(f"tokenizer: {'its own' if source.tokenizer else 'not found'}")
    weights |= made
    state = {"model": {name: weights[name] for name in model.state_dict()}, "step": 0,
             "tokenizer": source.tokenizer,
             "config": {"model": asdict(config), "train": {"init": source.title},
                        "new": list(missing),                   # train.py's --new_lr is for these
                        "task": source.task}}
    return state, lines


def initialise(model, source):
    """Loads a source into a new model -> a line about what came and what is new."""
    weights, missing = adapt_to_model(source, model)
    model.load_state_dict(weights, strict=False)
    if "text_fusion" in map(part_of, missing):                  # --no-shared_fusion: the same start
        model.text_fusion.load_state_dict(model.fusion.state_dict())
    new = ", ".join(sorted(set(map(part_of, missing))))
    return f"{len(weights)} tensors from {source.title}; new: {new or 'nothing'}"


def with_task_head(model, source, task):
    """Adds the head of a task (None: none) to the model -> (the source with or without its weights,
    is the head new?)."""
    model.task_head = task.head(model.config) if task else None
    if model.task_head is not None and source.task == task.name:
        return source, False
    notes = [note for note in source.notes if part_of(note.name) != "task_head"]
    weights = {name: tensor for name, tensor in source.weights.items()
               if part_of(name) != "task_head"}
    return source._replace(weights=weights, notes=notes), model.task_head is not None


def load_model(path, task=None):
    """A checkpoint's model -> (CCLM, the whole dict); ValueError in one line if it cannot be. task:
    a benchmark (tasks/), whose head the checkpoint must have. The parameters are those of the file,
    of which a page is read when it is used: masked LM's decoder, 0.8 GB at base, is not."""
    state = read_checkpoint(path, mmap=True)
    source = checkpoint_source(path, state)
    with torch.device("meta"):                                  # shapes only, no memory
        model = CCLM(Config(**source.fields))
        source, new = with_task_head(model, source, task)
    if new:
        raise ValueError(f"{path} is not fine-tuned on {task.name}: train.py --task {task.name} "
                         f"--init {path} does that, and its OUT/best.pt is what to give here")
    weights, missing = adapt_to_model(source, model)
    if missing:
        raise ValueError(f"{path} has no {', '.join(sorted(set(map(part_of, missing))))}")
    model.load_state_dict({name: x.float() for name, x in weights.items()}, assign=True)
    if model.config.tied:
        model.mlm_head.weight = model.text.token_embedding.weight
    return model, state


def starting_point(path, state, flags, task=None):
    """Where train.py begins -> (CCLM, data.Tokenizer, a line about it).

    state: the checkpoint at `path` to resume from, or None: then the run begins at the checkpoint
    of --init, or at random weights. flags: the command line as a dict. The fields of Config in it
    (None: not given) win over the checkpoint's, and these over the preset's. task: a benchmark
    (tasks/), whose head the model gets.
    """
    if state is None and flags["init"]:
        path = flags["init"]
        state = read_checkpoint(path, mmap=True)
    tokenizer = starting_tokenizer(state, flags)
    changes = {"vocabulary": tokenizer.size}
    for field in fields(Config):
        if flags.get(field.name) is not None:
            changes[field.name] = flags[field.name]
    if state is None:
        config = build(flags["preset"], **check_fields(changes, "the command line"))
        return CCLM(config), tokenizer, "random weights"
    source = checkpoint_source(path, state)
    model = CCLM(resolve_config(flags["preset"], source, changes))
    source, new = with_task_head(model, source, task)
    line = initialise(model, source)
    if new:
        task.begin(model)
    return model, tokenizer, line


def starting_tokenizer(state, flags):
    """The tokenizer of a checkpoint; else that of --tokenizer; else, without own data, the demo's.
    ValueError if --tokenizer names another one than the checkpoint's."""
    given = flags.get("tokenizer") and data.load_tokenizer(flags["tokenizer"])
    if flags.get("benchmark"):
        return benchmark.Tokenizer(PRESETS[flags["preset"]].vocabulary)
    if state and state["tokenizer"]:
        if given and given.model != state["tokenizer"]:
            raise ValueError(f"--tokenizer {flags['tokenizer']} is not the tokenizer that the "
                             f"checkpoint was trained with: leave --tokenizer out")
        return data.Tokenizer(state["tokenizer"])
    own_files = [flags.get(name) not in (None, ["demo"]) for name in ("images", "texts")]
    if any(own_files) and not given:
        data.load_tokenizer(None)                                # ValueError: how to get one
    return given or data.demo_tokenizer()


# --------------------------------------------------------------------------------------------------
# Export
# --------------------------------------------------------------------------------------------------

CARD = """# A CCLM model

Image-text and text-text retrieval in many languages (Cross-View Language Modeling, arXiv
2206.00621). {:,} parameters, {} training steps from {}.
What it was trained on, measured on and is licensed for: please add before publishing.

    python weights.py import THIS_FOLDER --out ckpt.pt     # for train.py --init, evaluate.py --ckpt
    XLMRobertaModel.from_pretrained("THIS_FOLDER/text_encoder", add_pooling_layer=False)

{}
"""


def export(path, folder):
    """A checkpoint -> a folder with model.safetensors, config.json, sentencepiece.bpe.model,
    README.md, and text_encoder/, which transformers opens."""
    state = read_checkpoint(path, mmap=True)
    config = Config(**check_fields(state["config"]["model"], path))
    weights = dict(state["model"])
    if config.tied:
        del weights["mlm_head.weight"]                           # it is the word embedding
    folder = pathlib.Path(folder)
    settings = asdict(config)
    if state["config"].get("task"):
        settings["task"] = state["config"]["task"]
    write_export(folder, settings, weights, state["tokenizer"])
    write_export(folder / "text_encoder", *text_encoder(weights, config), state["tokenizer"])
    listed = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    start = state["config"]["train"].get("init") or "random weights"
    count = sum(tensor.numel() for tensor in weights.values())
    (folder / "README.md").write_text(CARD.format(count, state["step"], start, listed))


def write_export(folder, settings, tensors, tokenizer):
    """One folder of weights with its config.json and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    if tokenizer:
        (folder / "sentencepiece.bpe.model").write_bytes(tokenizer)


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------

CHANGES = ("vision_heads", "text_heads", "fusion_heads", "fusion_layers", "image_size")


def arguments(argv):
    """The command line."""
    options = {"usage": argparse.SUPPRESS, "allow_abbrev": False,
               "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **options)
    commands = parser.add_subparsers(dest="command", required=True, prog="weights.py")
    importer = commands.add_parser("import", help="published files -> a checkpoint", **options)
    add = importer.add_argument
    add("sources", nargs="+", help="files, or folders with one")
    add("--out", type=pathlib.Path, required=True, help="the checkpoint to write")
    add("--every_second", action="store_true", help="XLM-R's layers 1, 3, 5 ... as text and fusion")
    add("--allow_missing", action="append", default=[], metavar="NAME",
        help="go on without this tensor, named as in the file or as here; * is any text")
    for name in CHANGES:
        add(f"--{name}", type=int, help="(default: as in the source)")
    exporter = commands.add_parser("export", help="a checkpoint -> a folder", **options)
    exporter.add_argument("ckpt")
    exporter.add_argument("folder")
    return parser.parse_args(argv)


def main(argv=None):
    """-> exit status: 0, or 2 after one line about what was wrong with the input."""
    args = arguments(argv)
    try:
        if args.command == "export":
            export(args.ckpt, args.folder)
            print(f"wrote {args.folder}")
            return 0
        given = {name: getattr(args, name) for name in CHANGES}
        changes = {name: value for name, value in given.items() if value is not None}
        if not args.out.name or args.out.is_dir():
            raise ValueError(f"--out {args.out} is not a file: name the checkpoint to write")
        state, lines = import_sources(args.sources, changes, args.every_second, args.allow_missing)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(args.out, state)
        print(*lines, f"wrote {args.out}", sep="\n")
    except (ValueError, OSError) as error:
        return data.fail(error)
    return 0


if __name__ == "__main__":
    data.run(main)
