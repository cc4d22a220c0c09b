"""One HTML page about a model and its runs: no script, no other file, nothing from a network. For a
screen, a phone or paper.

    gallery     one concept asked in eight languages
    recall      by language, of several runs or ablations
    tasks       the tables of demo/table.py
    curves      losses and validation of the runs, with chance
    maps        which patches of a picture speak for a word
    space       pictures and words of several languages in one plane
    across      from text to text: query language x caption language
    mistakes    wrong answers that teach something

What is not there is left out, with a line that says why.

Letters: I pictures, n of them with captions in two languages, C concepts, L languages, E embedding.

    python report.py --ckpt out/ckpt.pt --out report.html
    python report.py --ckpt out/ckpt.pt --runs out out/two --images my.jsonl --out report.html
"""
import argparse
import base64
import collections
import contextlib
import html
import io
import itertools
import math
import pathlib
from statistics import fmean
from typing import NamedTuple

import torch
from PIL import Image

import data
import evaluate
from demo import emoji, table
from formats.checkpoints import read_checkpoint
from formats.records import BadRecord
from model import CCLM, Config
from tasks import TASKS
from tasks.common import read_json
from train import chance_levels, is_demo, whole_rows

PICTURES = 1000                         # so many of a set are read, the first ones
POINTS = 100                            # of a curve; more steps are averaged
CONCEPTS = 8                            # on the map of the space
WIDTH = 760                             # of that map
HEIGHT = 520
PIECES = 12                             # of a wrong query's tokens that are shown
THUMBNAIL = 128                         # pixels of the longer side
COLOURS = ("#2b7bba", "#d55e00", "#009e73", "#b5579b", "#b8860b", "#7b68c8", "#c0392b", "#7f7f7f")
DASHES = ("none", "6 2", "2 2", "8 2 2 2")
SHOWN = ("en", "zh", "de", "ar", "ru", "ko", "sw", "hi", "it")      # first, where only some fit
SCORES = {"t2i_r1": "text to image, R@1", "accuracy": "accuracy"}


class LeftOut(Exception):
    """Why there is nothing to show."""


# --------------------------------------------------------------------------------------------------
# The numbers that it draws
# --------------------------------------------------------------------------------------------------

class Pictures(NamedTuple):
    """A set of pictures, and of each language the first caption of a picture."""
    rows: list                          # I of evaluate.evaluation_set
    vectors: torch.Tensor               # (I, E) of the pictures
    groups: dict                        # groups_of its languages
    texts: dict                         # {language: [I captions; "" where there is none]}
    text_vectors: dict                  # {language: (I, E); zero where there is none}

    def has(self, *languages):
        """(L, I) bool: which pictures have a caption in each of the languages?"""
        return torch.tensor([[text != "" for text in self.texts[k]] for k in languages])

    def name(self, i):
        """A caption of picture i, if possible in English."""
        codes = sorted(self.texts, key=lambda k: k != "en")
        return next(self.texts[k][i] for k in codes if self.texts[k][i])

    def group_of(self, language):
        return next(group for group, codes in self.groups.items() if language in codes)

    def some_languages(self, count):
        present = list(self.texts)
        shown = [k for k in SHOWN if k in present]
        return list(dict.fromkeys(shown + present))[:count]

    def one_of_each_group(self):
        """A language of each group; three languages where there are no groups."""
        if "all" in self.groups:
            return self.some_languages(3)
        ordered = self.some_languages(len(self.texts))
        return [next(k for k in ordered if k in codes) for codes in self.groups.values()]


def groups_of(codes, languages):
    """Languages by what a checkpoint learned them from: {"seen" | "text_only" | "never": [code]},
    or {"all": [code]} where languages, as evaluate.load gives them, is None."""
    groups = {"all": list(codes)}
    if languages:
        known = set(itertools.chain(*languages.values()))
        groups = languages | {"never": [k for k in codes if k not in known]}
    present = {group: [k for k in members if k in codes] for group, members in groups.items()}
    return {group: members for group, members in present.items() if members}


@torch.inference_mode()
def encode_set(model, tokenizer, rows, languages):
    """rows of evaluate.evaluation_set -> Pictures. languages: as evaluate.load gives them."""
    bad = []
    good, images = evaluate.encode_images(model, evaluate.bar(rows, "pictures"), bad)
    evaluate.report_bad(bad, len(rows))
    present = dict.fromkeys(k for row in good for k in row["captions"] if row["captions"][k])
    groups = groups_of(present, languages)
    texts = {}
    text_vectors = {}
    for k in itertools.chain(*groups.values()):
        texts[k] = [next(iter(row["captions"].get(k) or []), "") for row in good]
        numbers = [i for i, text in enumerate(texts[k]) if text]
        encoded, place = evaluate.encode_texts(model, tokenizer, [texts[k][i] for i in numbers])
        text_vectors[k] = torch.zeros(images.vectors.shape)                  # (I, E)
        text_vectors[k][numbers] = encoded.vectors[place].cpu()
    return Pictures(good, images.vectors.cpu(), groups, texts, text_vectors)


def chance_of(folder):
    """{column of log.csv: what a model that knows nothing gets}, from a run's checkpoint."""
    files = [folder / name for name in ("ckpt.pt", "best.pt") if (folder / name).exists()]
    if not files:
        return {}
    state = read_checkpoint(files[0], mmap=True)
    args = argparse.Namespace(**state["config"]["train"])
    if "batch" not in args:                                 # imported weights, not a run
        return {}
    if state["config"].get("task"):
        with contextlib.suppress(ValueError, OSError):      # xgqa's is that of its list of answers
            task = TASKS[state["config"]["task"]](args.data, args.image_root)
            return task.chance(args.batch, data.Tokenizer(state["tokenizer"]))
        return {}
    chance = chance_levels(args, state["config"]["model"]["vocabulary"])
    if is_demo(args):
        recall = 100 / len(emoji.drawings_of("val"))
        chance |= {f"val_{group}_t2i_r1": recall for group in evaluate.GROUPS}
    return chance


def curves_of(folder):
    """A run's log.csv -> {column: [(step, number)]} of its losses and validation scores."""
    log = folder / "log.csv"
    rows = whole_rows(log, math.inf) if log.exists() else []
    if not rows:
        return {}
    curves = {}
    try:
        columns = list(rows[0])
        losses = columns[columns.index("loss") + 1:columns.index("temperature")]
        scores = [k for k in columns if k.startswith("val_") and not k.endswith("i2t_r1")]
        for column in losses + scores:
            points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
            curves[column] = [(x, y) for x, y in points if math.isfinite(y)]
    except ValueError as error:
        raise ValueError(f"{log} is no log of train.py: {error}") from None
    return {column: points for column, points in curves.items() if points}


def averaged(points):
    """At most POINTS of them: the mean of neighbours, at the last one's step."""
    size = math.ceil(len(points) / POINTS) or 1
    parts = [points[first:first + size] for first in range(0, len(points), size)]
    return [(part[-1][0], fmean(y for _, y in part)) for part in parts]


def first_words(ckpt, words):
    """The vectors of some words before the end of training: [(step, (L, E))], of the checkpoints
    that train.py --keep left, and of step 0 where the weights were random."""
    state = read_checkpoint(ckpt, mmap=True)
    config = state["config"]
    tokenizer = data.Tokenizer(state["tokenizer"])
    models = []
    if "seed" in config["train"] and not config["train"]["init"]:
        torch.manual_seed(config["train"]["seed"])
        models.append((0, CCLM(Config(**config["model"])).eval()))
    for step in state.get("kept", ()):
        file = ckpt.with_name(f"ckpt_{step}.pt")
        if file.exists():
            models.append((step, evaluate.load(file)[0]))
    found = []
    for step, model in models:
        encoded, place = evaluate.encode_texts(model, tokenizer, words)
        found.append((step, encoded.vectors[place]))
    return found


# --------------------------------------------------------------------------------------------------
# HTML and SVG
# --------------------------------------------------------------------------------------------------

# "screen": paper stays white. --x: a cell's number in %.
STYLE = """
:root {color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --page: #fff; --box: #f4f6f8;
  --line: #8885; --bar: #2b7bba44; --right: #1a7f37}
@media screen and (prefers-color-scheme: dark) {:root {--ink: #e6edf3; --soft: #9da7b3;
  --page: #12161c; --box: #1c222b; --bar: #4c9be077; --right: #4ac26b}}
* {box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact}
body {font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 72rem; margin: auto; padding: 1rem; overflow-wrap: anywhere}
h1 {font-size: 1.6rem; line-height: 1.2} h2 {font-size: 1.25rem} h3 {font-size: 1rem}
h1, h2, h3, p {margin: 0 0 .5rem} p {max-width: 45rem}
section {margin: 2.5rem 0}
nav a {color: inherit; margin-right: .75rem; display: inline-block; padding: .25rem 0}
figcaption, .soft {color: var(--soft); font-size: .85rem; line-height: 1.35; padding-top: .3rem}
.grid {display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr))}
.box {background: var(--box); border-radius: .5rem; padding: .75rem; min-width: 0}
.row {display: grid; gap: .5rem; grid-auto-flow: column; grid-auto-columns: minmax(0, 10rem)}
figure {margin: 0} figure, .box, tr, p {break-inside: avoid}
h2, caption, section > p {break-after: avoid}
img {display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff;
  border-radius: .4rem}
.right img {outline: 3px solid var(--right); outline-offset: 1px}
.right figcaption {color: var(--right); font-weight: 600}
svg {display: block; width: 100%; fill: currentColor} svg.key {display: inline; width: 2rem}
.space text {paint-order: stroke; stroke: var(--page); stroke-width: 3px}
.wide {overflow-x: auto} .wide svg {min-width: 44rem}
table {border-collapse: collapse; font-size: .85rem; margin: .5rem 0 1rem}
caption {text-align: left; font-weight: 600}
th, td {padding: .15rem .5rem; border-bottom: 1px solid var(--line); text-align: right;
  font-variant-numeric: tabular-nums; overflow-wrap: normal}
th:first-child {text-align: left; position: sticky; left: 0; background: var(--page)}
.bars th:first-child {min-width: 8rem} .bars td {min-width: 4.5rem; background:
  linear-gradient(to right, var(--bar) calc(var(--x) * 1%), transparent 0)}
.heat th, .heat td {padding: .1rem .25rem; font-size: .75rem; border: 0; text-align: center}
.heat td {background: rgb(43 123 186 / calc(var(--x) * .6%))}
@media print {body {max-width: none; font-size: 10pt} nav {display: none} .wide {overflow: visible}
  section {margin: 1rem 0} .wide svg {min-width: 0} .grid {grid-template-columns: repeat(3, 1fr)}
  table {font-size: 7pt} th, td {padding: 0 .25rem} .heat th, .heat td {font-size: 6pt}}
"""


def text(words, language="en"):
    """Words of any script and direction, escaped. The language chooses the shapes of letters."""
    return f'<bdi lang="{html.escape(language)}">{html.escape(words)}</bdi>'


def data_url(image):
    """A small JPEG as an address that holds it."""
    file = io.BytesIO()
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def figure(image, alt, caption, kind=""):
    """caption: HTML."""
    return (f'<figure class="{kind}"><img alt="{html.escape(alt)}" src="{data_url(image)}">'
            f"<figcaption>{caption}</figcaption></figure>")


def picture(s, i, caption, kind=""):
    """Picture i of a set as a figure."""
    return figure(evaluate.read_image(s.rows[i]), s.name(i), caption, kind)


def box(title, note, figures):
    """A framed row of figures. title, note: HTML."""
    return (f'<div class="box"><h3>{title}</h3><p class="soft">{note}</p>'
            f'<div class="row">{"".join(figures)}</div></div>')


def html_table(caption, head, rows, kind=""):
    """rows: [[label, cells]]; a cell is HTML, a number in %, or None."""
    titles = "".join(f'<th scope="col">{name}</th>' for name in head)
    lines = []
    for label, *cells in rows:
        line = f'<tr><th scope="row">{label}</th>'
        for cell in cells:
            if isinstance(cell, float):
                shown = f"{cell:.0f}" if kind == "heat" else f"{cell:.1f}"
                line += f'<td style="--x:{cell:.0f}">{shown}</td>'
            else:
                line += f"<td>{cell or ''}</td>"
        lines.append(f"{line}</tr>")
    return (f'<div class="wide"><table class="{kind}"><caption>{caption}</caption><thead><tr>'
            f"{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>")


def stroke(number):
    """How the line of a run is drawn. Dashes tell lines apart that are printed in grey."""
    return (f'fill="none" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="2" '
            f'stroke-dasharray="{DASHES[number % len(DASHES)]}"')


def line_chart(title, lines, chances=()):
    """lines [[(x, y)]], one for each run -> SVG, with a level for each value of chance."""
    ys = [y for points in lines for _, y in points] + list(chances)
    last = max(x for points in lines for x, _ in points)
    low = 0.0 if min(ys) < 0.3 * max(ys) else min(ys)
    high = max(max(ys), low + 1e-9)

    def place(x, y):
        return f"{42 + 270 * x / last:.1f} {20 + 150 * (high - y) / (high - low):.1f}"

    def level(y, style):
        return f'<path d="M{place(0, y)}h270" stroke="currentColor" {style}/>'

    parts = []
    for y in (low, (low + high) / 2, high):
        parts.append(level(y, 'opacity=".2"') + f'<text x="38" y="{place(0, y).split()[1]}" dy="4" '
                     f'text-anchor="end">{y:.3g}</text>')
    for number, chance in enumerate(sorted(chances)):               # labels side by side
        parts.append(level(chance, 'stroke-dasharray="1 3"') + f'<text x="{312 - 80 * number}" '
                     f'y="{place(0, chance).split()[1]}" dy="-4" text-anchor="end">'
                     f"chance {chance:.3g}</text>")
    parts += [f'<polyline points="{" ".join(place(x, y) for x, y in points)}" {stroke(number)}/>'
              for number, points in enumerate(lines)]
    return (f'<svg viewBox="0 0 320 190" role="img" aria-label="{title}" font-size="11">'
            f'{"".join(parts)}<text x="42" y="186">step 0</text>'
            f'<text x="312" y="186" text-anchor="end">{last:,}</text></svg>')


# --------------------------------------------------------------------------------------------------
# Of runs
# --------------------------------------------------------------------------------------------------

def curves(runs):
    """runs {name: folder} -> a chart of each column of their log.csv."""
    found = {name: curves_of(folder) for name, folder in runs.items()}
    if not any(found.values()):
        raise LeftOut(f"no log.csv with rows in {' or '.join(map(str, runs.values()))}")
    chances = collections.defaultdict(set)                      # other batches, other chances
    for folder in runs.values():
        for column, chance in chance_of(folder).items():
            chances[column].add(chance)
    keys = [f'<svg class="key" viewBox="0 0 32 8" aria-hidden="true"><path d="M0 4h32" '
            f"{stroke(number)}/></svg> {text(name)}" for number, name in enumerate(runs)]
    boxes = []
    for column in dict.fromkeys(itertools.chain(*found.values())):
        lines = [averaged(curve.get(column, [])) for curve in found.values()]
        last = [f"{text(name)} {curve[column][-1][1]:.4g}" for name, curve in found.items()
                if column in curve]
        name = html.escape(column)
        chart = line_chart(f"{name} by step", lines, chances[column])
        boxes.append(f'<figure class="box"><h3>{name}</h3>{chart}<figcaption>last: '
                     f"{'; '.join(last)}</figcaption></figure>")
    return ("<p>The losses, and a validation's scores (val_) in %. Chance is the value of a model "
            f"that has learned nothing.</p><p>{' &nbsp; '.join(keys)}</p>"
            f'<div class="grid">{"".join(boxes)}</div>')


def results_of(runs):
    """{name: results.json} of the runs that have one."""
    files = {name: folder / "results.json" for name, folder in runs.items()}
    return {name: read_json(file, "train.py") for name, file in files.items() if file.exists()}


def recall(results, languages):
    """results {name: results.json} -> tables by language; of further test sets the groups' means.
    languages: as evaluate.load gives them."""
    sets = dict.fromkeys(name for report in results.values() for name in report if name != "groups")
    tables = []
    for name in sets:
        having = {run: report[name] for run, report in results.items() if name in report}
        tables += recall_table(name, having, languages, whole=not tables)
    if not tables:
        raise LeftOut("no results.json of a run, and no pictures to measure on")
    return ("<p>How often is the first answer right? A group's row is the mean of its languages; a "
            f"whole bar is 100 %.</p>{''.join(tables)}")


def recall_table(name, scores, languages, whole):
    """A test set's {run: {language: {key: %}}} -> [HTML], or [] without a score that is known.
    whole: with a row for each language."""
    everyone = list(itertools.chain(*(x.values() for x in scores.values())))
    key = next((key for key in SCORES if any(key in x for x in everyone)), None)
    if not key:
        return []

    def mean(of_run, codes):
        values = [of_run[k][key] for k in codes if key in of_run.get(k, {})]
        return fmean(values) if values else None

    rows = []
    groups = groups_of(dict.fromkeys(itertools.chain(*scores.values())), languages)
    for group, codes in groups.items():
        members = {f"{evaluate.GROUPS.get(group, group)} ({len(codes)})": codes}
        members |= {text(k): [k] for k in codes if whole}
        rows += [[label, *(mean(of_run, some) for of_run in scores.values())]
                 for label, some in members.items()]
    chance = [f"; chance {x[k]:.2f}" for x in everyone for k in ("chance_r1", "chance") if k in x]
    caption = f"{text(name)}: {SCORES[key]}, %{''.join(chance[:1])}"
    return [html_table(caption, ["", *map(text, scores)], rows, "bars")]


def tasks(folder):
    """The tables of demo/table.py, from the runs in its folder."""
    if not folder:
        raise LeftOut("no runs of demo.table are named (--table)")
    variants = [name for name in table.VARIANTS if table.folder_of(folder, name, 0).is_dir()]
    seeds = len(list(folder.glob("full/[0-9]*")))
    try:
        lines = table.tables(argparse.Namespace(out=folder, variants=variants, seeds=seeds))
    except (OSError, KeyError, TypeError):
        raise LeftOut(f"{folder}/benchmark/images/guess.json is missing or of another version: "
                      "python -m demo.benchmark writes it") from None
    found = []
    for filled, block in itertools.groupby(lines, bool):    # an empty line ends a table
        cells = [[text(cell.strip()) for cell in line.split("|")[1:-1]] for line in block]
        if filled and cells[0][1:]:
            found.append(html_table(cells[0][0], ["", *cells[0][1:]], cells[2:]))
    if not found:
        raise LeftOut(f"{folder} has no scores yet")
    return ("<p>The paper's tasks in miniature: fine-tuned on English, tested in all languages. "
            f"Seeds: {seeds}.</p>{''.join(found)}")


# --------------------------------------------------------------------------------------------------
# Of a model
# --------------------------------------------------------------------------------------------------

def gallery(s):
    """One concept asked in eight languages: the first five answers, the right one framed."""
    codes = s.some_languages(8)
    has = s.has(*codes)                                                      # (L, I)
    cosine = torch.stack([s.text_vectors[k] @ s.vectors.T for k in codes])   # (L, I, I)
    own = torch.eye(len(s.rows), dtype=torch.bool)
    rank = torch.stack([evaluate.ranks(scores, own) for scores in cosine])   # (L, I)
    found = (rank == 0) & has
    # Of the pictures with the most captions, one that three quarters of the languages find.
    distance = (found.sum(0) - 0.75 * len(codes)).abs()
    concept = int((distance - len(codes) * has.sum(0)).argmin())
    boxes = []
    for k, scores, place in zip(codes, cosine[:, concept], rank[:, concept]):
        figures = []
        for i in scores.topk(min(5, len(scores))).indices.tolist():
            kind = "right" if i == concept else ""
            figures.append(picture(s, i, kind or f"{scores[i]:.2f}", kind))
        if s.texts[k][concept]:
            boxes.append(box(f"{k}: {text(s.texts[k][concept], k)}",
                             f"{evaluate.GROUPS.get(s.group_of(k), '')} (right: {place + 1}. of "
                             f"{len(scores)})", figures))
    return ("<p>Below the other pictures is their cosine. We chose a concept that about three "
            "quarters of these languages find, so that right and wrong answers are seen; of all "
            f"their queries {evaluate.percent(found[has]):.0f} % find their picture.</p>"
            f'<div class="grid">{"".join(boxes)}</div>')


def scene(s, demo):
    """A picture and the words to look for in it: [{language: word}]. In the demo a test scene of
    four drawings and two of its words; else a picture with many captions, and these."""
    if demo:
        four = next(names for names in emoji.drawings_of("test_scenes") if len(names) == 4)
        ids = [name.split("/")[1] for name in four[:2]]
        return emoji.draw(four), [emoji.concepts()[i]["name"] for i in ids]
    number = int(s.has(*s.texts).sum(0).argmax())
    words = {k: texts[number] for k, texts in s.texts.items() if texts[number]}
    return evaluate.read_image(s.rows[number]), [words]


def maps(model, tokenizer, s, demo):
    """Which patches speak for a word, in three languages?"""
    image, words = scene(s, demo)
    shown = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    boxes = []
    for word, k in itertools.product(words, s.one_of_each_group()):
        if k in word:
            cosine, attention = (evaluate.lit(shown, make(model, tokenizer, image, word[k]))
                                 for make in (evaluate.cosine_map, evaluate.attention_map))
            boxes.append(box(f"{k}: {text(word[k], k)}", evaluate.GROUPS.get(s.group_of(k), ""), [
                figure(image, "the picture", "picture"),
                figure(cosine, f"parts of the cosine for {word[k]}", "cosine"),
                figure(attention, f"cross-attention for {word[k]}", "cross-attention")]))
    side = model.config.image_size // model.config.patch_size
    return (f"<p>The model cuts a picture into {side} x {side} patches. Bright ones speak for the "
            "text. Cosine: what of the cosine of the two vectors comes from each patch. "
            "Cross-attention: what the matching head's answer owes to each patch that the text's "
            "first token reads in the last layer of the fusion encoder (weight times gradient). "
            "Each map is as bright as its own best patch, also where no patch says much.</p>"
            f'<div class="grid">{"".join(boxes)}</div>')


def plane(fitted, shown):
    """-> a function: vectors (n, E) -> n points [x, y] of the drawing. Its axes are those along
    which the vectors `fitted` differ most (PCA); all of `shown` have room."""
    mean = fitted.mean(0)
    axes = torch.linalg.svd(fitted - mean, full_matrices=False).Vh[:2]       # (2, E)
    low, high = torch.aminmax((shown - mean) @ axes.T, dim=0)                # (2,) each
    size = torch.tensor([WIDTH - 170.0, HEIGHT - 60.0])

    def place(vectors):
        flat = ((vectors - mean) @ axes.T - low) / (high - low).clamp(min=1e-9)
        return (30 + size * flat).tolist()                                   # (n, 2)
    return place


def labels(words):
    """[(x, y, word, language)] -> SVG, the lowest y. One that would cover another moves down."""
    placed = []
    parts = []
    for x, y, word, k in sorted(words, key=lambda label: label[1]):
        end = x + 9 * len(word)
        while any(abs(y - v) < 13 and x < right and left < end for left, right, v in placed):
            y += 2
        placed.append((x, end, y))
        parts.append(f'<text x="{x:.0f}" y="{y:.0f}" lang="{html.escape(k)}">'
                     f"{html.escape(word)}</text>")
    return "".join(parts), max(y for _, _, y in placed)


def path(points, steps):
    """The way of a word through training, a dot for each checkpoint -> SVG."""
    joined = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
    dots = [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="2" fill="{COLOURS[0]}"><title>step {step:,}'
            "</title></circle>" for step, (x, y) in zip(steps, points)]
    return (f'<polyline points="{joined}" fill="none" stroke="{COLOURS[0]}" '
            f'stroke-dasharray="4 3"/>{"".join(dots)}')


def space(s, ckpt):
    """Pictures and words of several languages in one plane, and the ways of one concept's words."""
    codes = list(dict.fromkeys(s.one_of_each_group() + s.some_languages(5)))
    complete = s.has(*codes).all(0).nonzero().flatten()
    if len(complete) < 3:
        raise LeftOut(f"fewer than three pictures have captions in all of {' '.join(codes)}")
    concepts = complete[::math.ceil(len(complete) / CONCEPTS)].tolist()      # spread over the set
    pictures = s.vectors[concepts]                                           # (C, E)
    words = torch.stack([s.text_vectors[k][concepts] for k in codes], 1)     # (C, L, E)
    before = first_words(ckpt, [s.texts[k][concepts[0]] for k in codes])
    ways = torch.stack([*(vectors for _, vectors in before), words[0]], 1)   # (L, steps, E)
    # Words of a language that was never trained lie anywhere: they do not turn the axes.
    trained = [s.group_of(k) != "never" for k in codes]
    place = plane(torch.cat([pictures, words[:, trained].flatten(0, 1)]),
                  torch.cat([pictures, words.flatten(0, 1), ways.flatten(0, 1)]))
    lines, drawings, dots, named = [], [], [], []
    for number, (i, (x, y)) in enumerate(zip(concepts, place(pictures))):
        colour = COLOURS[number % len(COLOURS)]
        drawings.append(f'<image x="{x - 20:.0f}" y="{y - 20:.0f}" width="40" height="40" '
                        f'role="img" aria-label="{html.escape(s.name(i))}" '
                        f'href="{data_url(evaluate.read_image(s.rows[i]))}"/>')
        for k, (u, v) in zip(codes, place(words[number])):
            lines.append(f'<path d="M{x:.0f} {y:.0f}L{u:.0f} {v:.0f}" stroke="{colour}"/>')
            dots.append(f'<circle cx="{u:.0f}" cy="{v:.0f}" r="4" fill="{colour}"/>')
            named.append((u + 7, v + 4, s.texts[k][i][:24], k))
    steps = [step for step, _ in before]
    ways = [path(place(way), steps) for way in ways if steps]
    names, lowest = labels(named)
    height = max(HEIGHT, int(lowest) + 10)
    told = f"steps {', '.join(map(str, steps))} and the end" if steps else "left out: none are kept"
    return (f"<p>A picture and its words should lie together, whatever the language ("
            f"{' '.join(codes)}). The axes are the two along which these vectors differ most (PCA) "
            "at the end of training; more dimensions are not seen. Broken lines: the ways of the "
            f"words for {text(s.name(concepts[0]))} through checkpoints, {told}. Early in "
            "training all pictures lie apart from all words. Words of a script that was never in "
            'training stay in one heap.</p><div class="wide"><svg class="space" '
            f'viewBox="0 0 {WIDTH} {height}" role="group" font-size="12" aria-label="Pictures and '
            f'words in one plane">{"".join([*lines, *drawings, *ways, *dots, names])}'
            "</svg></div>")


def across(s):
    """From text to text: a caption in one language asks for the same picture's in another."""
    codes = list(s.texts)
    cells = {}
    for a, b in itertools.permutations(codes, 2):
        both = s.has(a, b).all(0)
        if both.any():
            cosine = s.text_vectors[a][both] @ s.text_vectors[b][both].T     # (n, n)
            own = torch.eye(len(cosine), dtype=torch.bool)
            cells[a, b] = evaluate.percent(evaluate.ranks(cosine, own) == 0)
    if not cells:
        raise LeftOut("no picture has captions in two languages")

    def mean(*groups):
        values = [cells[pair] for pair in itertools.product(*groups) if pair in cells]
        return fmean(values) if values else None

    members = {evaluate.GROUPS.get(group, group): codes for group, codes in s.groups.items()}
    means = [[name, *(mean(group, other) for other in members.values())]
             for name, group in members.items()]
    rows = [[text(a), *(cells.get((a, b)) for b in codes)] for a in codes]
    return ("<p>Without any picture: a caption (row) asks for the caption of the same picture in "
            "another language (column). R@1 by the text vectors, %. Captions that read the same "
            "are easy.</p>" + html_table("means of groups", ["", *members], means, "bars")
            + html_table("language by language", ["", *map(text, codes)], rows, "heat"))


def mistakes(s, tokenizer):
    """Wrong answers in a language of each group: nearly right, surely wrong, and lost."""
    boxes = []
    for k in s.one_of_each_group():
        cosine = s.text_vectors[k] @ s.vectors.T                             # (I, I)
        rank = evaluate.ranks(cosine, torch.eye(len(cosine), dtype=torch.bool))
        wrong = s.has(k)[0] & (rank > 0)
        margin = cosine.amax(1) - cosine.diagonal()                          # (I,)
        kinds = {int(margin.masked_fill(~wrong, torch.inf).argmin()): "nearly right",
                 int(margin.masked_fill(~wrong, -torch.inf).argmax()): "surely wrong",
                 int(rank.masked_fill(~wrong, -1).argmax()): "lost"}
        for i, kind in kinds.items() if wrong.any() else ():
            came = int(cosine[i].argmax())
            pieces = tokenizer.pieces(tokenizer.encode(s.texts[k][i])[1:-1])
            more = f" ... ({len(pieces)} pieces)" if len(pieces) > PIECES else ""
            figures = [picture(s, came, f"came: {text(s.name(came))} {cosine[i, came]:.2f}"),
                       picture(s, i, f"asked: {text(s.name(i))} {cosine[i, i]:.2f}, came "
                                     f"{rank[i] + 1}. of {len(cosine)}", "right")]
            boxes.append(box(f"{k}: {text(s.texts[k][i], k)}",
                             f"{kind}; read as {text(' '.join(pieces[:PIECES]))}{more}", figures))
    if not boxes:
        raise LeftOut("every query finds its picture")
    return ("<p>Nearly right: the wrong cosine is hardly the higher one; often two things are "
            "alike or share a word. Surely wrong: it is higher by the most. Lost: the right "
            "picture came last; look at the pieces into which the tokenizer cut the word.</p>"
            f'<div class="grid">{"".join(boxes)}</div>')


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------

def page(title, about, sections):
    """sections {title: (function, its arguments)} -> HTML. What is left out says why."""
    links = []
    body = []
    for number, (name, (make, *arguments)) in enumerate(sections.items()):
        try:
            content = make(*arguments)
        except LeftOut as reason:
            content = f'<p class="soft">Left out: {html.escape(str(reason))}.</p>'
        links.append(f'<a href="#s{number}">{name}</a>')
        body.append(f'<section id="s{number}"><h2>{name}</h2>{content}</section>')
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}</style></head>'
            f'<body><h1>{title}</h1><p>{about}</p><nav aria-label="Sections">{"".join(links)}</nav>'
            f"<main>{''.join(body)}</main></body></html>")


def runs_of(args):
    """{name: folder} of --runs, and of the ablations in --table."""
    for folder in args.runs or []:
        if not folder.is_dir():
            raise ValueError(f"--runs {folder} is no folder: name the --out of a run")
    runs = {str(folder): folder for folder in args.runs or [args.ckpt.parent]}
    for name in table.VARIANTS if args.table else ():
        folder = table.folder_of(args.table, name, 0) / "pretrained"
        if folder.is_dir():
            runs[name] = folder
    return runs


def no_pictures():
    raise LeftOut("all that needs pictures with captions: name some with --images")


def report(args, device):
    """-> the page as HTML."""
    runs = runs_of(args)
    model, tokenizer, languages = evaluate.load(args.ckpt, device)
    state = read_checkpoint(args.ckpt, mmap=True)
    settings = argparse.Namespace(**{"images": []} | state["config"]["train"])
    if not args.images and is_demo(settings):
        args.images = ["demo:test_style"]
    results = results_of(runs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    about = [f"{args.ckpt.name}: {parameters:,} parameters, {state['step']:,} steps."]
    about += [f"{evaluate.GROUPS[group].capitalize()}: {' '.join(codes)}."
              for group, codes in (languages or {}).items() if codes]
    sections = {"Pictures": (no_pictures,)}
    if args.images:
        rows = evaluate.evaluation_set(args.images, None, args.cache, args.image_root)
        s = encode_set(model, tokenizer, rows[:PICTURES], languages)
        about.append(f"Pictures: {' '.join(args.images)}, {len(s.rows):,}.")
        sections = {"Which patches speak for a word":
                    (maps, model, tokenizer, s, args.images[0].startswith("demo")),
                    "The shared space": (space, s, args.ckpt),
                    "From language to language": (across, s),
                    "Wrong answers": (mistakes, s, tokenizer)}
        if not results:
            scores = evaluate.retrieval(model, tokenizer, s.rows, rerank=0)
            results = {"this checkpoint": {" ".join(args.images): scores}}
    of_runs = {"Recall by language": (recall, results, languages), "Tasks": (tasks, args.table),
               "Training": (curves, runs)}
    first = {"One concept, many languages": (gallery, s)} if args.images else {}
    title = f"CCLM: {html.escape(str(args.ckpt.parent))}"
    return page(title, "<br>".join(map(html.escape, about)), first | of_runs | sections)


def main(argv=None):
    """The command line -> exit status; a user's mistake is one line and status 2."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=pathlib.Path, required=True, help="checkpoint of train.py")
    add("--runs", type=pathlib.Path, nargs="+", metavar="OUT",
        help="folders of runs to compare (default: that of --ckpt)")
    add("--table", type=pathlib.Path, metavar="DIR", help="the --out of python -m demo.table")
    add("--images", nargs="+", metavar="FILE", help="demo:SPLIT, or what train.py --images reads "
        "(default: demo:test_style, for a model of the demo)")
    add("--image_root", metavar="DIR", help="folder of the images that JSON lines name")
    add("--cache", metavar="DIR", help="folder for indices of the files (default: beside them)")
    add("--out", type=pathlib.Path, default="report.html", metavar="FILE",
        help="the page (default: report.html)")
    args = parser.parse_args(argv)
    try:
        data.check_target(args.out)
        raw = report(args, "cuda" if torch.cuda.is_available() else "cpu")
        raw = raw.encode("utf-8", "backslashreplace")               # of any file's name
        data.write_output(args.out, raw)
        print(f"wrote {args.out}: {len(raw) / 2 ** 20:.2f} MB")
    except (ValueError, OSError, BadRecord) as error:
        return data.fail(error)
    return 0


if __name__ == "__main__":
    data.run(main)
