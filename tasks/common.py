"""What the benchmarks share: examples, their batches, and a classifier on the fusion encoder.

A benchmark is a class, a Task. It reads the annotation files as they are published, adds parameters
to the model, and brings a loss and a metric. train.py and evaluate.py know no more of it:

    task = Xvnli(root, image_root)              folders of the annotations and of the pictures
    task.examples("train", "en")                [Example]: pictures, a sentence, a label
    task.head(config)                           the new parameters: model.task_head from then on
    task.losses(model, batch, seed, tokenizer)  {name: scalar}; their sum is minimised
    task.scores(model, tokenizer, "test", "ar") {key: number} of one language

Letters: B examples, n pictures of each, s pixels a side, T tokens, D width, C classes.
"""
import json
import math
import pathlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from formats.images import (FINE_TUNING_AREA, eval_transform, normalise, train_transform,
                            undecoded)
from formats.records import reading
from losses import global_means
from model import at_least_float32, inference_context

BATCH = 128                             # examples that are evaluated at once

# The published recipe of the tasks (docs/paper.md, "Optimisation"), over the preset's; None: by the
# number of examples (train.set_schedule).
RECIPE = dict(steps=None, epochs=10.0, warmup=None, batch=128, lr=3e-5, vision_lr=1.0, text_lr=1.0,
              fusion_lr=1.0, new_lr=2.0, optimizer="adamw", caption_tokens=80, save_every=None,
              validate_every=None)
# The same for the small model of the demo, which was trained for minutes: a higher rate.
DEMO_RECIPE = RECIPE | dict(lr=3e-4)


# --------------------------------------------------------------------------------------------------
# Examples
# --------------------------------------------------------------------------------------------------

class Example(NamedTuple):
    pictures: tuple                     # of n pictures each the path, or a function that reads one
    text: str
    label: int                          # the right class; -1: none is
    mirror: bool = True                 # may a picture be mirrored?


class Examples:
    """A dataset of examples, as data.py wants it. Training augments the pictures."""

    def __init__(self, examples, size):
        self.examples = examples
        self.size = size

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, key):
        """(index, rng) -> n pictures (n, 3, s, s) uint8, text, label."""
        index, rng = key
        example = self.examples[index]
        with reading(self, index):
            pixels = [train_transform(picture, self.size, rng, FINE_TUNING_AREA, example.mirror)
                      for picture in opened(example)]
        return np.stack(pixels), example.text, example.label

    def whole(self, index):
        """The pictures as an evaluation sees them: not cropped. (n, 3, s, s) uint8"""
        with reading(self, index):
            pictures = opened(self.examples[index])
            return np.stack([eval_transform(picture, self.size) for picture in pictures])

    def where(self, index):
        """What an error message calls an example."""
        example = self.examples[index]
        return f"{' and '.join(map(str, example.pictures))} ({example.text[:40]!r})"


def opened(example):
    """Yields the example's pictures, which are not decoded yet."""
    for picture in example.pictures:
        with undecoded(picture() if callable(picture) else picture) as image:
            yield image


def to_batch(examples, pixels, tokenizer, longest, device):
    """Examples and their pixels [(n, 3, s, s)] -> a batch as training has it, without masks."""
    token_ids = [tokenizer.encode(example.text, longest) for example in examples]
    sentences = data.Sentences(*(x.to(device) for x in data.pack(token_ids)))
    return {"images": torch.from_numpy(np.stack(pixels)).to(device),         # (B, n, 3, s, s)
            "b": sentences,
            "ids": torch.tensor([example.label for example in examples], device=device)}   # (B,)


def encode(model, batch):
    """A batch -> (View of its B sentences, View of its B n pictures)."""
    texts = model.encode_text(batch["b"].token_ids, batch["b"].starts, batch["ids"])
    pixels = normalise(batch["images"].flatten(0, 1))                        # (B n, 3, s, s)
    return texts, model.encode_image(pixels, None)


def fused_first_tokens(model, texts, images):
    """B sentences, each read with each of its n pictures -> (B, n D): first tokens side by side."""
    B = len(texts.starts) - 1
    n = (len(images.starts) - 1) // B
    # Query sequence i n + j is sentence i, which reads picture i n + j.
    query_view = torch.arange(B * n, device=texts.states.device)             # (B n,)
    query_text = query_view // n                                             # (B n,)
    lengths = texts.starts.diff()[query_text]
    first = lengths.cumsum(0) - lengths                                      # (B n,)
    states = model.fuse(texts, images, query_text, query_view, first)        # (B n, D)
    return states.view(B, -1)                                                # (B, n D)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------

def read_text(path, source):
    """The text of an annotation file. source: where it is published."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is missing: {source} has it (docs/data.md, Benchmarks)") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error})") from None


def read_json(path, source):
    text = read_text(path, source)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None


def read_lines(path, source):
    """A JSON-lines file -> [dict]; ValueError names the line that is none."""
    rows = []
    # Not splitlines(): JSON may have line separators of Unicode inside a text.
    for number, line in enumerate(read_text(path, source).split("\n"), 1):
        if line.strip():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}, is not a JSON object ({error})") from None
    return rows


# --------------------------------------------------------------------------------------------------
# Tasks
# --------------------------------------------------------------------------------------------------

class Task:
    """A benchmark. A subclass fills in what stands in capitals in the comments."""
    name = ""                           # of the command line
    languages = ()                      # of the test sets, "en" among them
    source = ""                         # WHERE the annotations are published
    image_source = ""                   # WHERE the pictures are
    unused = ()                         # parts of CCLM that it does not train: they are frozen
    recipe = RECIPE
    demo_recipe = DEMO_RECIPE
    image_size = 384                    # pixels, as published
    validation = ("accuracy",)          # keys of scores(); their mean chooses the checkpoint
    published = {}                      # {regime: {model: number or tuple of them}}
    published_as = "mean of the languages but en"    # what these numbers are
    columns = {}                        # {key of scores(): head of its column}

    def __init__(self, root, image_root, cache=None):
        """cache: folder for indices of the annotation files; None: beside them."""
        self.root = pathlib.Path(root)
        self.image_root = pathlib.Path(image_root or root)
        self.cache = cache

    @classmethod
    def recipe_of(cls, preset):
        return cls.demo_recipe if preset == "demo" else cls.recipe

    def examples(self, split, language="en", few_shot=None, translated=False):
        """split: "train", "val" or "test". few_shot: the train file of so many. translated: the
        test set after machine translation into English. -> [Example]"""
        raise NotImplementedError

    def picture(self, *parts):
        """The path of a picture below --image_root."""
        return self.image_root.joinpath(*parts)

    def check(self, split, languages, translated=False):
        """ValueError where files or pictures of a set in one of the languages are missing."""
        for language in languages:
            self.checked(self.examples(split, language, translated=translated))

    def checked(self, examples):
        """The examples; ValueError where pictures are missing."""
        paths = {path for example in examples for path in example.pictures
                 if isinstance(path, pathlib.Path)}
        missing = sorted(path for path in paths if not path.exists())
        if missing:
            raise ValueError(f"{missing[0]} and {len(missing) - 1} more of {len(paths)} pictures "
                             f"are missing: {self.image_source} has them; --image_root is the "
                             f"folder above (docs/data.md, Benchmarks)")
        return examples

    def head(self, config):
        """The module of the new parameters, or None."""
        raise NotImplementedError

    def begin(self, model):
        """What a new head takes over from the model that was trained before."""

    def chance(self, batch, tokenizer):
        """{name of a loss: what a model that knows nothing gets}"""
        raise NotImplementedError

    def losses(self, model, batch, seed, tokenizer):
        """A batch of Examples (data.Batches) -> {name: scalar}"""
        raise NotImplementedError

    def scores(self, model, tokenizer, split, language, translated=False):
        raise NotImplementedError


def evaluated(task, model, tokenizer, examples):
    """Yields batches of examples as an evaluation sees them."""
    dataset = Examples(examples, model.config.image_size)
    device = model.temperature.device
    longest = min(task.recipe["caption_tokens"], model.text.longest)
    for first in tqdm(range(0, len(examples), BATCH), task.name, leave=False, disable=None):
        some = range(first, min(first + BATCH, len(examples)))
        pixels = [dataset.whole(index) for index in some]
        yield to_batch([examples[i] for i in some], pixels, tokenizer, longest, device)


class Classification(Task):
    """C classes, from the fusion encoder's first tokens through an MLP, as published: official
    models/model_classification.py, and XVLMPlusForMARVL of X2-VLM for two pictures."""
    columns = {"n": "n", "chance": "chance", "accuracy": "accuracy",
               "accuracy_all_lines": "of all lines"}
    classes = 0                         # C
    pictures = 1                        # n
    unused = ("vision_proj", "text_proj", "itm_head", "mlm_head", "temperature", "text_fusion")

    def head(self, config):
        width = self.pictures * config.width                                 # n D
        return nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(),
                             nn.Linear(2 * width, self.classes))

    def chance(self, batch, tokenizer):
        return {"answer": math.log(self.classes)}

    def logits(self, model, batch):
        """(B, C) float32"""
        states = fused_first_tokens(model, *encode(model, batch))            # (B, n D)
        return at_least_float32(model.task_head(states))                     # (B, C)

    def losses(self, model, batch, seed, tokenizer):
        logits = self.logits(model, batch)                                   # (B, C)
        total = F.cross_entropy(logits, batch["ids"], reduction="sum")
        mean, = global_means((total, total.new_full((), len(logits))))
        return {"answer": mean}

    def scores(self, model, tokenizer, split, language, translated=False):
        """-> {"accuracy": % of the examples that have a label, "n": how many these are}"""
        examples = self.examples(split, language, translated=translated)
        labelled = [example for example in examples if example.label >= 0]
        if not labelled:
            raise ValueError(f"{self.name}: the {split} set in {language} has no example")
        right = 0
        for batch in evaluated(self, model, tokenizer, labelled):
            with inference_context(batch["ids"].device):
                best = self.logits(model, batch).argmax(1)                   # (B,)
            right += int((best == batch["ids"]).sum())
        return {"n": len(labelled), "chance": 100 / self.classes,
                "accuracy": 100 * right / len(labelled),
                "accuracy_all_lines": 100 * right / len(examples)}
