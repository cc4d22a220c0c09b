"""The built-in data: 514 emoji, drawn by six vendors and named by people in 25 languages (Unicode
CLDR). See LICENSES.

    seen with images         en de fr cs ja zh
    only in parallel text    ar bg bn da el es et id ko pt ru sw ta tr vi
    never in training        hi it nl uk
    training styles          noto, noto-v1, fluent-flat, emojione, fxemoji; held out: twemoji

One drawing is 64 x 64 pixels. A scene has two to four of them and is captioned with the language's
own list pattern ("fireworks, helmet, and old man"), so no sentence here was written by us.

    python -m demo.emoji        draws training examples to emoji.png and prints their captions
    python -m demo.emoji DIR    writes the drawings of test_style there: something to search in
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
SIZE = 64                                       # pixels a side
CELLS = {1: [(32, 32, 64)],                     # of 1 to 4 drawings: centre x, centre y, width
         2: [(16, 32, 32), (48, 32, 32)],
         3: [(16, 16, 32), (48, 16, 32), (32, 48, 32)],
         4: [(16, 16, 32), (48, 16, 32), (16, 48, 32), (48, 48, 32)]}


@functools.cache
def meta():
    return json.loads((HERE / "meta.json").read_text(encoding="utf-8"))


@functools.cache
def concepts():
    """{id: {"name": {language: str}, "kw": {language: [str]}, "split": str}}, in a fixed order."""
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
    keys = {"seen": "image_langs", "text_only": "text_langs", "never": "never_langs"}
    return meta()[keys[group]]


# --------------------------------------------------------------------------------------------------
# Captions
# --------------------------------------------------------------------------------------------------

def join(names, language):
    """['a', 'b', 'c'] -> 'a, b, and c' with the CLDR list pattern of the language.

    A pattern is like '{0}, and {1}': "2" for lists of two names; for longer ones "end" joins the
    last two, then "middle" puts one name after another before them, "start" the first."""
    patterns = meta()["list_patterns"][language]
    text = names[-1]
    for i in range(len(names) - 2, -1, -1):     # from the last name to the first
        if len(names) == 2:
            key = "2"
        elif i == len(names) - 2:
            key = "end"
        else:
            key = "start" if i == 0 else "middle"
        between, after = patterns[key].split("{0}")[1].split("{1}")
        text = names[i] + between + text + after
    return text


def caption(ids, language):
    return join([concepts()[i]["name"][language] for i in ids], language)


def keywords(i, language, rng):
    """Up to four of a concept's keywords, joined: a second kind of caption. The name where there
    are fewer than two."""
    words = concepts()[i]["kw"].get(language, [])
    if len(words) < 2:
        return concepts()[i]["name"][language]
    return join(list(rng.permutation(words)[:4]), language)


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------

# How much a training picture varies: shares of white and of grey pictures; turn and hue in radians;
# shift in cells; scale is a factor; stretch, saturation and contrast are its log; light is of 255.
JITTER = {"white": 0.8, "grey": 0.05, "scale": (0.85, 1.08), "turn": 0.12, "stretch": 0.12,
          "shift": 0.06, "hue": 0.15, "saturation": 0.4, "contrast": 0.25, "light": 20}


def draw(names, rng=None, jitter=JITTER):
    """Drawings ['vendor/id', ...] (one to four) -> RGB image. Without rng: upright on white, as in
    the test sets. With rng: every drawing is shifted, scaled and turned a little, the background
    may have any colour, and the picture's colours change. Never mirrored: hands point."""
    background = (255, 255, 255)
    if rng is not None and rng.random() >= jitter["white"]:
        background = tuple(rng.integers(0, 256, 3).tolist())
    canvas = Image.new("RGB", (SIZE, SIZE), background)
    for name, (x, y, width) in zip(names, CELLS[len(names)]):
        scale = width / SIZE
        turn = 0.0
        stretch = 1.0
        if rng is not None:
            scale *= rng.uniform(*jitter["scale"])
            turn = jitter["turn"] * rng.uniform(-1, 1)
            stretch = math.exp(jitter["stretch"] * rng.uniform(-1, 1))
            x = x + jitter["shift"] * width * rng.uniform(-1, 1)
            y = y + jitter["shift"] * width * rng.uniform(-1, 1)
        drawing = place(sprite(name), (x, y), scale, turn, stretch)
        canvas.paste(drawing, (0, 0), drawing)  # its own alpha is the mask
    return canvas if rng is None else change_colours(canvas, rng, jitter)


def place(image, centre, scale, turn, stretch):
    """A canvas-sized copy of the drawing at `centre`."""
    # Pillow wants the map from output to input: (x, y) comes from (a x + b y + c, d x + e y + f).
    # a, b, d, e turn back and divide by the scale; c and f take the centre to the middle.
    x, y = centre
    cos = math.cos(turn) / scale
    sin = math.sin(turn) / scale
    a, b = cos * stretch, sin * stretch
    d, e = -sin / stretch, cos / stretch
    half = SIZE / 2
    if scale < 0.7:                             # bilinear sampling alone would skip pixels
        image = image.reduce(2)
        a, b, d, e, half = a / 2, b / 2, d / 2, e / 2, half / 2
    matrix = (a, b, half - a * x - b * y, d, e, half - d * x - e * y)
    return image.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def change_colours(image, rng, jitter):
    """Random hue, saturation, contrast and light: a matrix and an offset for (r, g, b)."""
    turn = jitter["hue"] * rng.uniform(-1, 1)
    contrast = math.exp(jitter["contrast"] * rng.uniform(-1, 1))
    saturation = math.exp(jitter["saturation"] * rng.uniform(-1, 1))
    saturation = saturation * (rng.random() > jitter["grey"])

    # A colour is its grey part (the mean of r, g, b) and the rest, its chroma. The hue turns about
    # the axis of greys (1, 1, 1): Rodrigues' formula, where `cross` is the cross product with it.
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    rotate = math.cos(turn) * (np.eye(3) - grey) + math.sin(turn) * cross
    matrix = contrast * (grey + saturation * rotate)

    # Contrast is about the middle of 0..255; then all channels get the same light.
    offset = 128 * (1 - contrast) + jitter["light"] * rng.uniform(-1, 1)
    return image.convert("RGB", tuple(float(v) for row in matrix for v in (*row, offset)))


# --------------------------------------------------------------------------------------------------
# Splits
# --------------------------------------------------------------------------------------------------

def drawings_of(name):
    """The pictures of a split: [['vendor/id', ...], ...]."""
    part = name.split("_")[0]
    held_out = meta()["test_vendor"]
    if name == "val":
        return [[drawing] for drawing in splits()["val"]]
    if name in ("val_concept", "test_concept"):
        vendor = "noto" if name == "val_concept" else held_out
        return [[f"{vendor}/{i}"] for i, c in concepts().items() if c["split"] == part]
    if name == "test_style":
        return [[f"{held_out}/{i}"] for i in training_drawings()]
    if name in ("val_scenes", "test_scenes"):
        return [scene["sprites"] for scene in splits()["scenes"][part]]
    raise ValueError(f"demo:{name} is not a split of the demo: choose val, val_scenes, "
                     f"val_concept, test_style, test_concept, test_scenes")


def split(name):
    """A fixed set to evaluate on: [{"image": RGB image, "captions": {language: [text]}, "ids":
    concept ids}] in all 25 languages. Scenes also have "false_captions" {language: text}, where one
    object is swapped for another of its kind. The val sets are for every choice, the test sets for
    results: training concepts in the held-out style (test_style), new combinations of two to four
    of them in this style (test_scenes), and concepts never trained on (test_concept)."""
    everyone = languages("seen") + languages("text_only") + languages("never")
    rows = []
    for drawings in drawings_of(name):
        ids = [drawing.split("/")[1] for drawing in drawings]
        captions = {language: [caption(ids, language)] for language in everyone}
        rows.append({"image": draw(drawings), "ids": ids, "captions": captions})
    if name.endswith("scenes"):
        for row, scene in zip(rows, splits()["scenes"][name.split("_")[0]]):
            row["false_captions"] = {k: caption(scene["false"], k) for k in everyone}
    return rows


def write_folder(path):
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for row in split("test_style"):
        name = row["captions"]["en"][0].replace(" ", "_").replace("/", "_")
        row["image"].save(folder / f"{name}.png")
    print(f"wrote {len(list(folder.iterdir()))} pictures into {folder}")


def write_sheet():
    sheet = Image.new("RGB", (12 * SIZE, 4 * SIZE))
    ids = list(training_drawings())
    for k in range(48):
        rng = np.random.default_rng(k)
        chosen = [ids[i] for i in rng.choice(len(ids), 1 + k % 4, replace=False)]
        picture = draw([rng.choice(training_drawings()[i]) for i in chosen], rng)
        sheet.paste(picture, (k % 12 * SIZE, k // 12 * SIZE))
        print(f"{k:3} {caption(chosen, 'en')}  |  {caption(chosen, 'ja')}")
    sheet.save("emoji.png")
    print("wrote emoji.png")


if __name__ == "__main__":
    write_folder(sys.argv[1]) if sys.argv[1:] else write_sheet()
