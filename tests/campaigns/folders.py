"""Makes folders of pictures with captions in every layout that docs/data.md names: mixed, renamed, turned, transparent
and damaged. It knows which records are good, as it made them. Training, the doctor, evaluation and search must find the
same records good and see the same pictures: upright, on white.

    python tests/campaigns/folders.py 200                100 and more: another seed for each folder
    python tests/campaigns/folders.py 1 --seed 57        the one folder of a seed

A small slice runs in tests/test_faults.py.
"""
import argparse
import base64
import collections
import contextlib
import io
import json
import os
import pathlib
import random
import sys
import tarfile
import tempfile
from typing import NamedTuple
from unittest import mock

import numpy as np
from PIL import Image, ImageOps

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import data                                                                  # noqa: E402
import evaluate                                                              # noqa: E402
import samples                                                               # noqa: E402
import search                                                                # noqa: E402
from formats import images                                                   # noqa: E402
from formats.records import BadRecord, printable                             # noqa: E402

BYTE = os.fsdecode(b"\xff")                                                  # a name that is not UTF-8
KEYS = ["{:04}", "v1.{}", "my dog {}", "Müller{}", "{}.ab", "deep/er/{}", BYTE + "{}"]
NAMES = ["plain", "v1.0", "my data", "Bücher", "x[1]", "a@b", "c=1", "d.de", BYTE + "e"]


class Record(NamedTuple):
    key: str
    seen: Image.Image                                                        # what everybody must see
    raw: bytes                                                               # of the image's file
    suffix: str
    texts: dict                                                              # {language: text}
    damage: str                                                              # "" for a good record


# --------------------------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------------------------

def picture(draw):
    """Blocks of colours -> (the picture as a viewer shows it, the bytes of a file that holds it, its suffix)."""
    blocks = np.random.default_rng(draw.randrange(2 ** 32)).integers(0, 256, (4, 6, 3), np.uint8)
    seen = Image.fromarray(blocks).resize((96, 64), Image.Resampling.NEAREST)
    mode = draw.choice(["RGB", "RGB", "L", "CMYK", "I;16", "RGBA", "LA", "P"])
    grey = seen.convert("L")
    if mode in ("L", "I;16", "LA"):
        seen = grey.convert("RGB")
    stored = seen.convert(mode) if mode in ("RGB", "L", "CMYK") else None
    options = {}
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "P":                                                        # one colour is transparent
        stored = seen.quantize(256)
        options["transparency"] = stored.getpixel((0, 0))
        seen.paste("white", mask=stored.point(lambda i: 255 * (i == options["transparency"]), "1"))
    elif mode in ("RGBA", "LA"):                                             # black under transparent blocks
        alpha = Image.fromarray((blocks[:, :, 0] > 99).astype(np.uint8) * 255).resize(seen.size, Image.Resampling.NEAREST)
        stored = Image.new(mode, seen.size)
        stored.paste(seen.convert(mode), mask=alpha)
        stored.putalpha(alpha)
        seen.paste("white", mask=ImageOps.invert(alpha))
    kinds = {"RGB": ["JPEG", "PNG", "WEBP"], "L": ["JPEG", "PNG"], "CMYK": ["JPEG"], "RGBA": ["PNG", "WEBP"]}
    kind = draw.choice(kinds.get(mode, ["PNG"]))
    if draw.random() < 0.5:                                                  # EXIF: how the camera was held
        options["exif"] = seen.getexif()
        options["exif"][0x0112] = draw.randint(1, 8)
        seen = ImageOps.exif_transpose(seen)
    file = io.BytesIO()
    stored.save(file, kind, quality=95, **options)
    suffix = draw.choice([{"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}[kind], ".jpeg", ".JPG"])
    return seen, file.getvalue(), suffix


def record(draw, number):
    seen, raw, suffix = picture(draw)
    texts = samples.said(number, draw.sample(samples.LANGUAGES, draw.randint(1, 3)))
    damage = draw.choice([""] * 12 + ["cut", "empty", "garbage", "gone", "no caption", "blank", "not UTF-8", "no JSON"])
    changed = {"cut": raw[:int(len(raw) * draw.uniform(0.05, 0.6))], "empty": b"", "garbage": b"<html>not found</html>"}
    key = draw.choice(KEYS).format(number)
    return Record(key, seen, changed.get(damage, raw), suffix, texts, damage)


def json_of(made, row, field="captions", plain=False):
    """A row and its captions as JSON, damaged where its captions are. plain: one text without its language."""
    texts = dict.fromkeys(made.texts, " ") if made.damage == "blank" else made.texts
    captions = first(texts) if plain else texts
    text = json.dumps(row | ({} if made.damage == "no caption" else {field: captions}))
    return {"not UTF-8": b"\xff\xfe" + text.encode(), "no JSON": text[:-1].encode()}.get(made.damage, text.encode())


def text_of(made, text):
    """What a KEY.txt holds: one caption. A text cannot be broken JSON: it is empty then."""
    return {"blank": b" \n", "no JSON": b"", "not UTF-8": b"\xff\xfe"}.get(made.damage, text.encode())


def first(texts):
    return next(iter(texts.values()))


# --------------------------------------------------------------------------------------------------------------------
# Layouts: each writes records into a folder -> (what the command line says, {place as messages name it: (record,
# captions)}, {picture in a file of its own: record})
# --------------------------------------------------------------------------------------------------------------------

def write(path, raw):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)


def tar(draw, folder, made, name, named=None, way=None):
    """A KEY has a .json, a .txt, or both: the .txt counts where the .json has no captions."""
    named = draw.choice(["", "@de"]) if named is None else named
    path, found = folder / f"{name}.tar", {}
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as archive:
        for x in made:
            parts = {} if x.damage == "gone" else {x.suffix: x.raw}
            kind = way or draw.choice(["json", "txt", "both"])
            text = text_of(x, first(x.texts))
            if x.damage != "no caption":
                parts |= {"json": {".json": json_of(x, {"key": 1})}, "txt": {".txt": text},
                          "both": {".json": b'{"caption": null, "status": "success"}', ".txt": text}}[kind]
            for suffix, raw in parts.items():
                samples.add(archive, x.key + suffix, raw)
            found[f"{path} KEY {x.key}"] = x, x.texts if kind == "json" else {named[1:] or "unknown": first(x.texts)}
    return f"{path}{named}", found, {}


def img2dataset(draw, folder, made, name):
    """Tars with statistics and tables beside them."""
    found = {}
    for part, some in enumerate((made[:2], made[2:])):
        found |= tar(draw, folder / name, some, f"{part:05}", "", "both")[1]
        write(folder / name / f"{part:05}_stats.json", b'{"count": 2}')
        write(folder / name / f"{part:05}.parquet", b"PAR1")
    return str(folder / name), found, {}


def pictures(draw, folder, made, name):
    """Pictures in a folder and in folders in it, with KEY.json, KEY.txt or KEY.en.txt beside them."""
    found = {}
    for x in made:
        stem = str(folder / name / x.key)
        kind = draw.choice(["json", "txt", "languages"])
        files = {"json": {".json": json_of(x, {})}, "txt": {".txt": text_of(x, first(x.texts))},
                 "languages": {f".{k}.txt": text_of(x, text) for k, text in x.texts.items()}}[kind]
        for suffix, raw in files.items():
            if x.damage != "no caption":
                write(pathlib.Path(stem + suffix), raw)
        if x.damage != "gone":                                               # else it is no record
            write(pathlib.Path(stem + x.suffix), x.raw)
            found[stem + x.suffix] = x, {"unknown": first(x.texts)} if kind == "txt" else x.texts
    return str(folder / name), found, {place: x for place, (x, _) in found.items()}


def lines(draw, folder, made, name, roots=("", "pictures", "elsewhere")):
    """Rows of ours, of the official code, of IGLUE and of Hugging Face; pictures in files or in base64."""
    field, captions = draw.choice([("image", "captions"), ("binary", "caption"), ("img_path", "sentences"),
                                   ("file_name", "text")])
    root = draw.choice(roots)
    path = folder / name / draw.choice([f"{name}.jsonl", "part-00000", "metadata.json"])
    rows, found, files = [], {}, {}
    for number, x in enumerate(made, 1):
        image = path.parent / root / (x.key + x.suffix)
        row = {field: str(image.relative_to(path.parent / root if root == "elsewhere" else path.parent))}
        if x.damage not in ("gone", "empty", "garbage") and draw.random() < 0.4:
            row = {field: base64.b64encode(x.raw).decode()}
        elif x.damage != "gone":
            write(image, x.raw)
            files[str(image)] = x
        plain = field == "file_name" and len(x.texts) == 1
        rows.append(json_of(x, row | {"language": list(x.texts)[0]} if plain else row, captions, plain))
        found[f"{path} line {number}"] = x, x.texts
    (path.parent / root).mkdir(parents=True, exist_ok=True)
    write(path, b"\n".join(rows) + b"\n")
    return f"{path}:{path.parent / root}" if root == "elsewhere" else str(path), found, files


def mixed(draw, folder, made, name):
    """A folder with a tar, a file of lines, and what other programs leave there."""
    _, found, _ = tar(draw, folder / name, made[:2], name, "")
    _, more, files = lines(draw, folder, made[2:], name, ("", "pictures"))
    for junk in ("README.md", "_SUCCESS", ".DS_Store", "_stats.json", "._x.jpg"):
        write(folder / name / junk, b"")
    return str(folder / name), found | more, files


# --------------------------------------------------------------------------------------------------------------------
# What each of the four finds -> {place: (picture, captions or None)} of the good records; all others are bad to it
# --------------------------------------------------------------------------------------------------------------------

def same(image):
    return image


def trained(arguments, tokenizer, seed):
    """One batch is one epoch. Without random crops and colours a picture is only resized."""
    dataset = data.files(data.ImageFiles, arguments, 96)
    n = len(dataset)
    batches = data.Batches(tokenizer, data.Stream(dataset, n, longest=999, max_bad=1.0), None, seed)
    with (mock.patch.object(images, "random_box", lambda width, height, rng: (0, 0, width, height)),
          mock.patch.object(images, "rand_augment", lambda image, rng: image),
          mock.patch.object(ImageOps, "mirror", lambda image: image)):
        batch, _, stats = batches[0]
    found = {}
    for position in range(n):
        reader, i = dataset.find(data.example_at(position, n, seed, 0)[1])
        start, end = batch["b"].starts[position:position + 2].tolist()
        ids = batch["b"].token_ids[start:end].tolist()
        found[printable(reader.where(i))] = Image.fromarray(batch["images"][position].permute(1, 2, 0).numpy()), ids
    bad = {message for message in stats["bad_records"] if message}
    return {place: x for place, x in found.items() if not any(starts(message, place) for message in bad)}, set(found)


def starts(message, place):
    return printable(message).startswith(f"{place}: ")


def doctor(arguments, places):
    """-> places of good records. The list must name nothing else."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as said:
        status = data.main([*arguments, "--list", f"{folder}/bad"])
        bad = pathlib.Path(folder, "bad").read_text("utf-8").splitlines()
    good = {place for place in places if not any(starts(message, place) for message in bad)}
    assert len(good) + len(bad) == len(places) and status == bool(bad), (bad, said.getvalue())
    return dict.fromkeys(good)
