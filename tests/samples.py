"""Small files in every format that can be read, made exactly as their owners write them; and a naive reader of each
that parses the whole file at once with Python's own modules, to compare with."""
import base64
import contextlib
import csv
import io
import json
import os
import pathlib
import tarfile

import numpy as np
from PIL import Image

LANGUAGES = ["en", "de", "fr", "cs", "zh", "ja"]
PHRASES = {"en": "a red ball number {}", "de": "ein roter Ball Nummer {}", "fr": "une balle rouge numéro {}",
           "cs": "červený míč číslo {}", "zh": "第 {} 个红球", "ja": "赤いボール {} 番"}


def jpeg(i, width=40, height=30, kind="JPEG"):
    out = io.BytesIO()
    noise = np.random.default_rng(i).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height)).save(out, kind)
    return out.getvalue()


def said(i, languages=LANGUAGES):
    return {k: PHRASES[k].format(i) for k in languages}


def add(tar, name, body, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = len(body), kind
    tar.addfile(info, io.BytesIO(body))


def write_tar(path, n, first=0, text="json", form=tarfile.GNU_FORMAT, long=""):
    with tarfile.open(path, "w", format=form) as tar:
        for i in range(first, first + n):
            add(tar, f"{long}{i:06}.jpg", jpeg(i))
            add(tar, f"{long}{i:06}.{text}", json.dumps({"captions": said(i)}).encode() if text == "json" else
                PHRASES["en"].format(i).encode())
    return str(path)


def lines(path, rows):
    pathlib.Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def official(folder, n=24):
    """As the official code reads them: directories of line-JSON files: CC3M with translations (base64), wiki and wikimatrix as sentence pairs."""
    for name in ("cc3m", "cc3m_path/images", "wikimatrix", "wikimatrix_en_bn"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    half = n // 2
    for part, first in enumerate((0, half)):
        lines(folder / "cc3m" / f"part-{part:05}", (
            {"binary": base64.b64encode(jpeg(i)).decode(), "caption": [said(i)]} for i in range(first, first + half)))
        lines(folder / "wikimatrix" / f"part-{part:05}", (
            {"source_text": PHRASES["en"].format(i), "target_text": PHRASES["de"].format(i)}
            for i in range(first, first + half)))
    (folder / "cc3m" / "_SUCCESS").write_text("")                            # left by their tools, skipped by theirs
    for i in range(n):
        (folder / "cc3m_path" / "images" / f"{i}.jpg").write_bytes(jpeg(i))
    lines(folder / "cc3m_path" / "train.jsonl", ({"binary": f"images/{i}.jpg", "caption": said(i)} for i in range(n)))
    lines(folder / "wikimatrix_en_bn" / "part-00000", (
        {"source_text": f"a cat {i}", "target_text": f"একটি বিড়াল {i}"} for i in range(n)))
    return folder


def multi30k(folder, n=24):
    """Five files of plain sentences, line i of each about the same picture."""
    (folder / "multi30k").mkdir(parents=True, exist_ok=True)
    for k in LANGUAGES[:5]:
        (folder / "multi30k" / f"train.{k}").write_text("".join(PHRASES[k].format(i) + "\n" for i in range(n)), "utf-8")
    return folder / "multi30k"


def iglue(folder, n=24):
    """xFlickr&CO as IGLUE ships it: annotations of a language apart from the images."""
    images = folder / "flickr_images"
    images.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (images / f"{i}.jpg").write_bytes(jpeg(i))
    for k in ("de", "ja"):
        (folder / "xFlickrCO" / "annotations" / k).mkdir(parents=True, exist_ok=True)
        lines(folder / "xFlickrCO" / "annotations" / k / "test.jsonl", (
            {"sentences": [PHRASES[k].format(i)], "id": str(i), "img_path": f"{i}.jpg"} for i in range(n)))
    return folder / "xFlickrCO" / "annotations", images


def naive_tar(path):
    """[(image bytes, captions)] with Python's tarfile, sorted by key; only whole pairs."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, suffix = os.path.splitext(member.name)
            found.setdefault(key, {})[suffix[1:]] = tar.extractfile(member).read()
    return [(x["jpg"], {k: [t] for k, t in json.loads(x["json"])["captions"].items()} if "json" in x else
             {"unknown": [x["txt"].decode()]}) for x in found.values()]


def naive_lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text("utf-8").split("\n") if line.strip()]


def naive_tsv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


# What a naive parse of a damaged file finds: for each record what identifies it, or None where it is bad

def good_image(raw):
    try:
        Image.open(io.BytesIO(raw)).convert("RGB")
        return True
    except (OSError, ValueError, SyntaxError, IndexError, Image.DecompressionBombError):
        return False


def good_texts(texts):
    return bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)


def expected_tar(path, spans):
    """spans: {key: its first byte} before the damage. ignore_zeros makes tarfile look past broken headers."""
    found, size = {}, os.path.getsize(path)
    with contextlib.suppress(tarfile.ReadError), tarfile.open(path, ignore_zeros=True, errorlevel=0) as tar:
        for member in iter(tar.next, None):
            key, suffix = os.path.splitext(member.name)                           # all before the last dot, as our KEYs
            found.setdefault(key, {})[suffix[1:]] = member
    raw, result = open(path, "rb").read(), []
    for key, start in spans.items():
        if start < size:
            body = {k: raw[m.offset_data:m.offset_data + m.size] for k, m in found.get(key, {}).items()
                    if m.offset_data + m.size <= size}
            with contextlib.suppress(ValueError, KeyError, AttributeError):
                if good_image(body["jpg"]) and good_texts(json.loads(body["json"])["captions"].values()):
                    result.append(body["jpg"])
                    continue
            result.append(None)
    return result


def without_blank_end(path):
    found = path.read_bytes().split(b"\n")
    while found and not found[-1].strip():
        found.pop()
    return found


def expected_images(path):
    return [image_of(row, path) for row in without_blank_end(path)]


def image_of(line, path):
    with contextlib.suppress(ValueError, KeyError, AttributeError, TypeError, OSError):
        row = json.loads(line)
        where = row["image"]
        raw = base64.b64decode(where, validate=True) if len(where) > 100 else (path.parent / where).read_bytes()
        if good_image(raw) and good_texts(row["caption"].values()):
            return raw if len(where) > 100 else path.parent / where
    return None


def expected_pairs(path):
    result = []
    for line in without_blank_end(path):
        with contextlib.suppress(UnicodeDecodeError):
            columns = line.decode().strip("\r\n").split("\t")
            if len(columns) == 2 and good_texts(columns):
                result.append(repr([("source", columns[:1]), ("target", columns[1:])]).encode())
                continue
        result.append(None)
    return result
