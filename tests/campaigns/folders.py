"""Makes folders of pictures with captions in every layout that docs/data.md names: mixed, renamed, turned, transparent
and damaged. It knows which records are good. Training, the doctor, evaluation and search must find the same ones good
and see the same pictures: upright, on white.

    python tests/campaigns/folders.py 200                       folders of the seeds 0 .. 199
    python tests/campaigns/folders.py 1 --seed 57               the folder of one seed

A small slice runs in tests/test_faults.py.
"""
import argparse
import base64
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

BYTE = os.fsdecode(b"\xff")                                                  # in names: not UTF-8
KEYS = ["{:04}", "v1.{}", "my dog {}", "Müller{}", "{}.ab", "deep/er/{}", BYTE + "{}", "{before:04}.5"]
NAMES = ["plain", "v1.0", "my data", "Bücher", "x[1]", "a@b", "c=1", "d.de", BYTE + "e"]
IMAGE = ["cut", "empty", "garbage", "gone"]                                  # damage of the image
TEXT = ["no caption", "blank", "not UTF-8", "no JSON"]                       # and of the captions
LIKE = 40                                # grey levels by which JPEG and resizing may change the middle of a block


class Record(NamedTuple):
    key: str
    seen: Image.Image                    # what everybody must see
    raw: bytes                           # of the image's file
    suffix: str
    texts: dict                          # {language: text}
    damage: str                          # "" for a good record


def picture(draw):
    """6 x 4 blocks of colour -> (the picture as a viewer shows it, bytes of a file that holds it, its suffix)."""
    blocks = np.random.default_rng(draw.randrange(2 ** 32)).integers(0, 256, (4, 6, 3), np.uint8)
    seen = Image.fromarray(blocks).resize((96, 64), Image.Resampling.NEAREST)
    mode, kinds = draw.choice([("RGB", "JPEG PNG WEBP"), ("L", "JPEG PNG"), ("CMYK", "JPEG"), ("I;16", "PNG"), ("P", "PNG"),
                               ("RGBA", "PNG WEBP"), ("LA", "PNG")])
    grey, options = seen.convert("L"), {}
    if mode in ("L", "I;16", "LA"):
        seen = grey.convert("RGB")
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "P":                                                        # one of its colours is transparent
        stored = seen.quantize(256)
        options["transparency"] = stored.getpixel((0, 0))
        seen.paste("white", (0, 0, 16, 16))
    else:
        stored = seen.convert(mode)
    if mode in ("RGBA", "LA"):                                               # transparent blocks, black under them
        clear = Image.fromarray((blocks[:, :, 0] < 99).astype(np.uint8) * 255).resize(seen.size, Image.Resampling.NEAREST)
        stored.paste(Image.new(mode, seen.size), mask=clear)
        seen.paste("white", mask=clear)
    if draw.random() < 0.5:                                                  # EXIF: how the camera was held
        options["exif"] = seen.getexif()
        options["exif"][0x0112] = draw.randint(1, 8)
        seen = ImageOps.exif_transpose(seen)
    file, kind = io.BytesIO(), draw.choice(kinds.split())
    stored.save(file, kind, quality=95, **options)
    return seen, file.getvalue(), draw.choice([f".{kind.lower()}", ".jpg", ".JPG", ".jpeg"])


def record(draw, number):
    seen, raw, suffix = picture(draw)
    texts = samples.said(number, draw.sample(samples.LANGUAGES, draw.randint(1, 3)))
    damage = draw.choice([""] * 16 + IMAGE + TEXT) if number else ""         # one is good
    broken = {"cut": raw[:int(len(raw) * draw.uniform(0.05, 0.6))], "empty": b"", "garbage": b"<html>not found</html>"}
    return Record(draw.choice(KEYS).format(number, before=number - 1), seen, broken.get(damage, raw), suffix, texts, damage)


def json_of(made, row, field="captions", one=False):
    """A row with captions as JSON. one: a text and its language beside it."""
    texts = dict.fromkeys(made.texts, " ") if made.damage == "blank" else made.texts
    captions = {field: first(texts), "language": first(list(texts))} if one else {field: texts}
    text = json.dumps(row if made.damage == "no caption" else row | captions)
    return {"not UTF-8": b"\xff\xfe" + text.encode(), "no JSON": text[:-1].encode()}.get(made.damage, text.encode())


def text_of(made, text):
    return {"not UTF-8": b"\xff\xfe", "blank": b" \n", "no JSON": b""}.get(made.damage, text.encode())


def first(texts):
    return next(iter(texts.values() if isinstance(texts, dict) else texts))


def write(path, raw):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)


# --------------------------------------------------------------------------------------------------------------------
# Layouts: each writes records -> (what the command line says, {place as messages name it: (record, its captions)},
# {picture in a file of its own: record})
# --------------------------------------------------------------------------------------------------------------------

def tar(draw, folder, made, name, named=None):
    """A KEY has a .json, a .txt, or both: the .txt counts where the .json has no captions, as img2dataset writes it."""
    named = draw.choice(["", "@de"]) if named is None else named
    path, found, members = folder / f"{name}.tar", {}, []
    folder.mkdir(parents=True, exist_ok=True)
    for x in made:
        text, kind = text_of(x, first(x.texts)), draw.choice(["json", "txt", "both"])
        parts = {} if x.damage == "gone" else {x.suffix: x.raw}
        if x.damage != "no caption":
            parts |= {"json": {".json": json_of(x, {"url": "x"})}, "txt": {".txt": text},
                      "both": {".json": b'{"caption": null, "status": "success"}', ".txt": text}}[kind]
        members += [(x.key + suffix, raw) for suffix, raw in parts.items()]
        found[f"{path} KEY {x.key}"] = x, x.texts if kind == "json" else {named[1:] or "unknown": first(x.texts)}
    with tarfile.open(path, "w", format=draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as archive:
        for member in draw.choice([members, sorted(members)]):               # tar --sort=name
            samples.add(archive, *member)
    return f"{path}{named}", found, {}


def pictures(draw, folder, made, name):
    """In a folder and in folders in it, with KEY.json, KEY.txt or KEY.en.txt ... beside them."""
    found = {}
    for x in made:
        stem, kind = str(folder / name / x.key), draw.choice(["json", "txt", "languages"])
        files = {"json": {".json": json_of(x, {})}, "txt": {".txt": text_of(x, first(x.texts))},
                 "languages": {f".{k}.txt": text_of(x, text) for k, text in x.texts.items()}}[kind]
        for suffix, raw in files.items():
            if x.damage != "no caption":
                write(stem + suffix, raw)
        if x.damage != "gone":                                               # else it is no record
            write(stem + x.suffix, x.raw)
            found[stem + x.suffix] = x, {"unknown": first(x.texts)} if kind == "txt" else x.texts
    return str(folder / name), found, {place: x for place, (x, _) in found.items()}


def lines(draw, folder, made, name, roots=("", "pictures", "elsewhere")):
    """Rows of ours, of the official code, of IGLUE and of Hugging Face; the image is a path or base64."""
    field, captions = draw.choice([("image", "captions"), ("binary", "caption"), ("img_path", "sentences"),
                                   ("file_name", "text")])
    root, path = draw.choice(roots), folder / name / draw.choice([f"{name}.jsonl", "part-00000", "metadata.json"])
    rows, found, files = [], {}, {}
    for number, x in enumerate(made, 1):
        image = path.parent / root / (x.key + x.suffix)
        row = {field: os.path.relpath(image, path.parent / root if root == "elsewhere" else path.parent)}
        if x.damage not in ("gone", "empty", "garbage") and draw.random() < 0.4:
            row = {field: base64.b64encode(x.raw).decode()}
        elif x.damage != "gone":
            write(image, x.raw)
            files[str(image)] = x
        rows.append(json_of(x, row, captions, field == "file_name" and len(x.texts) == 1))
        found[f"{path} line {number}"] = x, x.texts
    write(path, b"\n".join(rows) + b"\n\n")
    (path.parent / root).mkdir(exist_ok=True)
    return f"{path}:{path.parent / root}" if root == "elsewhere" else str(path), found, files


def img2dataset(draw, folder, made, name):
    """Tars, what it and other programs leave beside them, and sometimes a file of lines."""
    found, files = tar(draw, folder / name, made[:2], "00000", "")[1], {}
    if draw.random() < 0.5:
        _, found, files = lines(draw, folder, made[4:], name, ("", "pictures"))
        found |= tar(draw, folder / name, made[:2], "00000", "")[1]
    found |= tar(draw, folder / name, made[2:4], "00001", "")[1]
    for junk in ("00000_stats.json", "00000.parquet", "README.md", "_SUCCESS", ".DS_Store", "._x.jpg"):
        write(folder / name / junk, b"")
    return str(folder / name), found, files


# --------------------------------------------------------------------------------------------------------------------
# What each of the four finds good -> {place: (picture, captions)}, None for what it does not see
# --------------------------------------------------------------------------------------------------------------------

def trained(arguments, places, tokenizer, seed):
    """One batch is one epoch. Without random crops and colours a picture is only resized."""
    dataset, found = data.files(data.ImageFiles, arguments, 96), {}
    n = len(dataset)
    batches = data.Batches(tokenizer, data.Stream(dataset, n, longest=999, max_bad=1.0), None, seed)
    with (mock.patch.object(images, "random_box", lambda width, height, rng, share: (0, 0, width, height)),
          mock.patch.object(images, "rand_augment", lambda image, rng: image),
          mock.patch.object(ImageOps, "mirror", lambda image: image)):
        batch, _, stats = batches[0]
    for i in range(n):
        reader, number = dataset.find(data.example_at(i, n, seed, 0)[1])
        place = printable(reader.where(number))
        if not any(printable(message).startswith(f"{place}: ") for message in stats["bad_records"]):
            ids = batch["b"].token_ids[batch["b"].starts[i]:batch["b"].starts[i + 1]].tolist()
            texts = {k: text for k, text in places[place][1].items() if tokenizer.encode(text) == ids}
            found[place] = Image.fromarray(batch["images"][i].permute(1, 2, 0).numpy()), texts
    return found


def doctored(arguments, places, folder):
    with contextlib.redirect_stdout(io.StringIO()):
        status = data.main([*arguments, "--list", f"{folder}/list"])
    bad = pathlib.Path(folder, "list").read_text("utf-8").splitlines()
    found = {place: (None, None) for place in places if not any(line.startswith(f"{place}: ") for line in bad)}
    assert len(found) + len(bad) == len(places) and status == bool(bad), bad
    return found


def evaluated(arguments, places):
    """A row names no place; but each record has captions of its own."""
    place_of, found = {str(sorted(texts.items())): place for place, (_, texts) in places.items()}, {}
    with contextlib.redirect_stderr(io.StringIO()):
        rows = evaluate.evaluation_set(arguments)
    for row in rows:
        with contextlib.suppress(BadRecord):
            texts = {k: text for k, (text,) in row["captions"].items()}
            place = str(sorted(texts.items()))
            found[place_of.get(place, place)] = row["image"](), texts
    return found


def searched(arguments):
    found = {}
    for picture in (picture for argument in arguments for picture in search.find_pictures(argument)):
        with contextlib.suppress(BadRecord):
            found[printable(picture.name)] = search.read_picture(picture, 16), None
    return found


def middles(picture):
    """The colours in the middle of its 6 x 4 blocks; 4 x 6 where it is turned."""
    wide = picture.resize((96, 96))
    return np.asarray(wide, int)[4::8, 4::8]


def one_folder(seed, folder, tokenizer):
    """-> (what it is, how many records, disagreements in words)."""
    draw, arguments, places, shown, what = random.Random(seed), [], {}, {}, []
    for part, layout in enumerate(draw.sample([tar, img2dataset, pictures, lines], draw.randint(1, 3))):
        made = [record(draw, 100 * part + i) for i in range(draw.randint(6, 9))]
        argument, found, files = layout(draw, pathlib.Path(folder, str(part)), made, draw.choice(NAMES))
        what.append(layout.__name__)
        arguments.append(argument)
        places |= {printable(place): x for place, x in found.items()}
        # Search shows every picture of a folder, with captions or without; of other data whole records.
        alone = os.path.isdir(argument) and files
        shown |= {printable(place): (x, None) for place, x in files.items() if alone and x.damage not in IMAGE}
        shown |= {printable(place): x for place, x in found.items() if not alone and not x[0].damage}
    good = {place: x for place, x in places.items() if not x[0].damage}
    wrong = []
    for who, expected, found in (("training", good, trained(arguments, places, tokenizer, seed)),
                                 ("doctor", good, doctored(arguments, places, folder)),
                                 ("evaluation", good, evaluated(arguments, places)), ("search", shown, searched(arguments))):
        wrong += [f"{who} says that {place} is bad" for place in expected.keys() - found.keys()]
        wrong += [f"{who} says that {place} is good" for place in found.keys() - expected.keys()]
        for place in expected.keys() & found.keys():
            (picture, texts), (x, true) = found[place], expected[place]
            if picture and abs(middles(picture) - middles(x.seen)).max() > LIKE:
                wrong.append(f"{who} sees another picture: {place}")
            if texts is not None and not (texts and texts.items() <= true.items()):
                wrong.append(f"{who} reads other captions: {place}")
    return " ".join(what), len(places), wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer, records, disagreements = data.demo_tokenizer(4000), 0, 0
    for seed in range(args.seed, args.seed + args.count):
        with tempfile.TemporaryDirectory() as folder:
            what, count, wrong = one_folder(seed, folder, tokenizer)
        records, disagreements = records + count, disagreements + len(wrong)
        print(f"{seed}: {what}, {count} records", *(printable(line.replace(folder, "")) for line in wrong), sep="\n    ")
    print(f"{args.count} folders, {records:,} records: {disagreements} disagreements")
    sys.exit(disagreements > 0)
