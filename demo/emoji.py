"""The built-in data: 514 emoji, drawn by six vendors and named by people in 25 languages (Unicode CLDR). See LICENSES.

    seen with images         en de fr cs ja zh
    only in parallel text    ar bg bn da el es et id ko pt ru sw ta tr vi
    never in training        hi it nl uk
    training styles          noto, noto-v1, fluent-flat, emojione, fxemoji          held-out style: twemoji

One drawing is 64 x 64 pixels. A scene has two to four of them and is captioned with the language's own list pattern
("fireworks, helmet, and old man"), so no sentence here was written by us.

    python -m demo.emoji            draws the first training examples to emoji.png and prints their captions
    python -m demo.emoji DIR        writes the drawings of test_style there, one file each: something to search in
"""
import functools
import gzip
import io
import json
import math
import pathlib
import sys
import zipfile

import numpy as np
from PIL import Image

HERE = pathlib.Path(__file__).parent
SIZE = 64                                                                    # pixels
CELLS = {1: [(32, 32, 64)], 2: [(16, 32, 32), (48, 32, 32)], 3: [(16, 16, 32), (48, 16, 32), (32, 48, 32)],
         4: [(16, 16, 32), (48, 16, 32), (16, 48, 32), (48, 48, 32)]}        # centre x, y and width of each drawing


# ------------------------------------------------------------------------------------------------------------------
# Load
# ------------------------------------------------------------------------------------------------------------------

@functools.cache
def meta():
    return json.loads((HERE / "meta.json").read_text(encoding="utf-8"))


@functools.cache
def concepts():
    """{id: {"name": {language: str}, "kw": {language: [str]}, "split": str, ...}}, in a fixed order."""
    with gzip.open(HERE / "concepts.jsonl.gz", "rt", encoding="utf-8") as lines:
        return {c["id"]: c for c in map(json.loads, lines)}


@functools.cache
def splits():
    with gzip.open(HERE / "splits.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


@functools.cache
def archive():
    with zipfile.ZipFile(HERE / "images.zip") as images:
        return {name[:-4]: images.read(name) for name in images.namelist()}


@functools.cache
def sprite(name):
    """'vendor/id' -> RGBA image, 64 x 64."""
    return Image.open(io.BytesIO(archive()[name])).convert("RGBA")


@functools.cache
def training_drawings():
    """{concept id: ['vendor/id', ...]} of the training split."""
    drawings = {}
    for name in splits()["train"]:
        drawings.setdefault(name.split("/")[1], []).append(name)
    return drawings


def languages(group):
    """Language codes of a group: 'seen', 'text_only' or 'never'."""
    return meta()[{"seen": "image_langs", "text_only": "text_langs", "never": "never_langs"}[group]]


# ------------------------------------------------------------------------------------------------------------------
# Captions
# ------------------------------------------------------------------------------------------------------------------

def join(names, language):
    """['a', 'b', 'c'] -> 'a, b, and c' with the CLDR list pattern of the language."""
    pattern, text = meta()["list_patterns"][language], names[-1]
    for i in range(len(names) - 2, -1, -1):
        key = "2" if len(names) == 2 else "end" if i == len(names) - 2 else "start" if i == 0 else "middle"
        head, tail = pattern[key].split("{0}")[1].split("{1}")
        text = names[i] + head + text + tail
    return text


def caption(ids, language):
    return join([concepts()[i]["name"][language] for i in ids], language)


def keywords(i, language, rng):
    """Up to four of a concept's keywords, joined: a second kind of caption. The name where there are fewer than two."""
    words = concepts()[i]["kw"].get(language, [])
    return join(list(rng.permutation(words)[:4]), language) if len(words) >= 2 else concepts()[i]["name"][language]


# ------------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------------

JITTER = {"white": 0.8, "scale": (0.85, 1.08), "turn": 0.12, "stretch": 0.12,       # share, factor, radians, log
          "shift": 0.06, "hue": 0.15, "saturation": 0.4, "contrast": 0.25,          # cells, radians, log, log
          "light": 20, "grey": 0.05}                                                # of 255, share


def draw(names, rng=None, jitter=JITTER):
    """Drawings ['vendor/id', ...] (one to four) -> RGB image. Without rng: upright on white, as in the test sets. With
    rng: every drawing is shifted, scaled and turned a little, the background may have any colour, and the picture's
    colours drift. Never mirrored: hands point."""
    white = rng is None or rng.random() < jitter["white"]
    canvas = Image.new("RGB", (SIZE, SIZE), (255, 255, 255) if white else tuple(rng.integers(0, 256, 3).tolist()))
    for name, (x, y, width) in zip(names, CELLS[len(names)]):
        scale, turn, stretch = width / SIZE, 0.0, 1.0
        if rng is not None:
            scale *= rng.uniform(*jitter["scale"])
            turn, stretch = jitter["turn"] * rng.uniform(-1, 1), math.exp(jitter["stretch"] * rng.uniform(-1, 1))
            x, y = (at + jitter["shift"] * width * rng.uniform(-1, 1) for at in (x, y))
        drawing = place(sprite(name), x, y, scale, turn, stretch)
        canvas.paste(drawing, (0, 0), drawing)
    return canvas if rng is None else drift(canvas, rng, jitter)


def place(image, x, y, scale, turn, stretch):
    """A canvas-sized copy of the drawing, its centre at (x, y). PIL wants the map from output to input pixels."""
    c, s, half = math.cos(turn) / scale, math.sin(turn) / scale, SIZE / 2
    a, b, d, e = c * stretch, s * stretch, -s / stretch, c / stretch
    if scale < 0.7:                                                          # bilinear sampling alone would skip pixels
        image = image.reduce(2)
        a, b, d, e, half = a / 2, b / 2, d / 2, e / 2, half / 2
    return image.transform((SIZE, SIZE), Image.Transform.AFFINE,
                           (a, b, half - a * x - b * y, d, e, half - d * x - e * y), Image.Resampling.BILINEAR)


def drift(image, rng, jitter):
    """Colours after a random turn of the hue, change of saturation and contrast, and a shift of the brightness."""
    turn, gain = jitter["hue"] * rng.uniform(-1, 1), math.exp(jitter["contrast"] * rng.uniform(-1, 1))
    vivid = math.exp(jitter["saturation"] * rng.uniform(-1, 1)) * (rng.random() > jitter["grey"])
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    rotate = math.cos(turn) * (np.eye(3) - grey) + math.sin(turn) * cross    # about the grey axis
    matrix, offset = gain * (grey + vivid * rotate), 128 * (1 - gain) + jitter["light"] * rng.uniform(-1, 1)
    return image.convert("RGB", tuple(float(v) for row in matrix for v in (*row, offset)))


# ------------------------------------------------------------------------------------------------------------------
# Splits
# ------------------------------------------------------------------------------------------------------------------

def split(name):
    """A fixed set to evaluate on: list of {"image": RGB image, "captions": {language: [text]}, "ids": concept ids} in
    all 25 languages; scenes also have "false_captions" {language: text}, one object swapped for another of its kind.

        val, val_scenes, val_concept                for every choice
        test_style      every training concept in the held-out style          test_concept    concepts never trained on
        test_scenes     unseen combinations of two to four in that style"""
    test = meta()["test_vendor"]
    names = {"val": lambda: [[n] for n in splits()["val"]],
             "val_scenes": lambda: [s["sprites"] for s in splits()["scenes"]["val"]],
             "val_concept": lambda: [[f"noto/{i}"] for i, c in concepts().items() if c["split"] == "val"],
             "test_style": lambda: [[f"{test}/{i}"] for i in training_drawings()],
             "test_concept": lambda: [[f"{test}/{i}"] for i, c in concepts().items() if c["split"] == "test"],
             "test_scenes": lambda: [s["sprites"] for s in splits()["scenes"]["test"]]}
    if name not in names:
        raise ValueError(f"demo:{name} is not a split of the demo: choose {', '.join(names)}")
    everyone = languages("seen") + languages("text_only") + languages("never")
    rows = []
    for drawings in names[name]():
        ids = [d.split("/")[1] for d in drawings]
        rows.append({"image": draw(drawings), "ids": ids, "captions": {k: [caption(ids, k)] for k in everyone}})
    if name.endswith("scenes"):
        for row, scene in zip(rows, splits()["scenes"][name.split("_")[0]]):
            row["false_captions"] = {k: caption(scene["false"], k) for k in everyone}
    return rows


if __name__ == "__main__":
    if sys.argv[1:]:
        folder = pathlib.Path(sys.argv[1])
        folder.mkdir(parents=True, exist_ok=True)
        for row in split("test_style"):
            row["image"].save(folder / (row["captions"]["en"][0].replace(" ", "_").replace("/", "_") + ".png"))
        sys.exit(print(f"wrote {len(list(folder.iterdir()))} pictures into {folder}"))
    sheet, ids = Image.new("RGB", (12 * SIZE, 4 * SIZE)), list(training_drawings())
    for k in range(48):
        rng = np.random.default_rng(k)
        chosen = [ids[i] for i in rng.choice(len(ids), 1 + k % 4, replace=False)]
        sheet.paste(draw([rng.choice(training_drawings()[i]) for i in chosen], rng), (k % 12 * SIZE, k // 12 * SIZE))
        print(f"{k:3} {caption(chosen, 'en')}  |  {caption(chosen, 'ja')}")
    sheet.save("emoji.png")
    print("wrote emoji.png")
