"""One HTML page that shows a model and its runs: no script, no other file, nothing from a network.

    retrieval       one concept asked in eight languages
    recall          by language, of several runs or ablations
    tasks           the tables of demo/table.py
    curves          losses and validation of the runs, with chance
    maps            which patches of a picture speak for a word
    space           pictures and words of several languages in one plane
    across          text to text: query language x caption language
    mistakes        wrong answers that teach something

What is not there is left out, with a line that says why. At most PICTURES pictures are read.

Letters: I pictures, n of them with captions in two languages, E embedding, side patches a side.

    python report.py --ckpt out/ckpt.pt --out report.html
    python report.py --ckpt out/ckpt.pt --runs out out/two --images my.jsonl --out report.html
"""
import argparse
import base64
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
from tasks import TASKS
from tasks.common import read_json
from train import chance_levels, is_demo, whole_rows

PICTURES = 1000                         # so many of a set are read
POINTS = 100                            # of a curve; more steps are averaged
THUMBNAIL = 128                         # pixels of the longer side
DARK = 0.2                              # brightness where a map is lowest
COLOURS = ("#2b7bba", "#d55e00", "#009e73", "#b5579b", "#b8860b", "#7b68c8", "#c0392b", "#7f7f7f")
DASHES = ("none", "6 2", "2 2", "8 2 2 2")
# Languages of many scripts: where only some fit, these come first.
SHOWN = ("en", "zh", "de", "ar", "ru", "ko", "sw", "hi", "it", "ja", "bn", "ta", "el")
SCORES = {"t2i_r1": "text to image, R@1", "accuracy": "accuracy"}


class LeftOut(Exception):
    """Why there is nothing to show."""


# --------------------------------------------------------------------------------------------------
# The numbers that it draws
# --------------------------------------------------------------------------------------------------

class Pictures(NamedTuple):
    """A set of I pictures and its captions: of each language the first one of a picture."""
    rows: list                          # of evaluate.evaluation_set
    vectors: torch.Tensor               # (I, E) of the pictures
    groups: dict                        # {"seen" | "text_only" | "never" | "all": [language]}
    texts: dict                         # {language: [I texts; None where there is none]}
    text_vectors: dict                  # {language: (I, E); zero where there is none}

    def some_languages(self, count, groups=None):
        """`count` languages, those of SHOWN first."""
        present = [k for group in groups or self.groups for k in self.groups[group]]
        shown = [k for k in SHOWN if k in present]
        return (shown + [k for k in present if k not in shown])[:count]

    def one_of_each_group(self):
        """A language of each group; three languages where there are no groups."""
        if len(self.groups) == 1:
            return self.some_languages(3)
        return [self.some_languages(1, [group])[0] for group in self.groups]

    def has(self, language):
        """(I,) bool: which pictures have a caption in the language?"""
        return torch.tensor([text is not None for text in self.texts[language]])

    def name(self, i):
        """The picture's caption in English, or in another language."""
        names = [texts[i] for texts in self.texts.values() if texts[i]]
        return self.texts.get("en", [None] * (i + 1))[i] or names[0]


@torch.inference_mode()
def encode_set(model, tokenizer, rows, languages):
    """rows of evaluate.evaluation_set -> Pictures. languages: as evaluate.load gives them."""
    bad = []
    good, images = evaluate.encode_images(model, evaluate.bar(rows, "pictures"), bad)
    evaluate.report_bad(bad, len(rows))
    present = dict.fromkeys(k for row in good for k in row["captions"] if row["captions"][k])
    groups = {"all": list(present)}
    if languages:
        known = set(itertools.chain(*languages.values()))
        groups = languages | {"never": [k for k in present if k not in known]}
        groups = {group: [k for k in codes if k in present] for group, codes in groups.items()}
    texts = {}
    text_vectors = {}
    for k in itertools.chain(*groups.values()):
        texts[k] = [next(iter(row["captions"].get(k) or []), None) for row in good]
        numbers = [i for i, text in enumerate(texts[k]) if text is not None]
        encoded, place = evaluate.encode_texts(model, tokenizer, [texts[k][i] for i in numbers])
        text_vectors[k] = torch.zeros(images.vectors.shape)                  # (I, E)
        text_vectors[k][numbers] = encoded.vectors[place].cpu().float()
    groups = {group: codes for group, codes in groups.items() if codes}
    return Pictures(good, images.vectors.cpu().float(), groups, texts, text_vectors)


def chance_of(folder):
    """{column of log.csv: what a model that knows nothing gets}, from a run's checkpoint."""
    file = next((folder / name for name in ("ckpt.pt", "best.pt") if (folder / name).exists()), None)
    if not file:
        return {}
    state = read_checkpoint(file, mmap=True)
    args = argparse.Namespace(**state["config"]["train"])
    task = state["config"].get("task")
    if task:
        with contextlib.suppress(ValueError, OSError):      # xgqa's needs its list of answers
            tokenizer = data.Tokenizer(state["tokenizer"])
            return TASKS[task](args.data, args.image_root).chance(args.batch, tokenizer)
        return {}
    chance = chance_levels(args, state["config"]["model"]["vocabulary"])
    if is_demo(args):
        recall = 100 / len(emoji.drawings_of("val"))
        chance |= {f"val_{group}_t2i_r1": recall for group in evaluate.GROUPS}
    return chance


def curves_of(folder):
    """A run's log.csv -> {column: [(step, number)]} of its losses and validation scores."""
    rows = whole_rows(folder / "log.csv", math.inf) if (folder / "log.csv").exists() else []
    columns = list(rows[0]) if rows else []
    losses = columns[columns.index("loss") + 1:columns.index("temperature")] if rows else []
    scores = [k for k in columns if k.startswith("val_") and not k.endswith("i2t_r1")]
    curves = {}
    for column in losses + scores:
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        curves[column] = [(x, y) for x, y in points if math.isfinite(y)]
    return {column: points for column, points in curves.items() if points}


def averaged(points):
    """At most POINTS of them: the mean of neighbours, at the last one's step."""
    size = math.ceil(len(points) / POINTS)
    parts = [points[first:first + size] for first in range(0, len(points), size)]
    return [(part[-1][0], fmean(y for _, y in part)) for part in parts]


def short_names(folders):
    """The last parts of paths, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names


# --------------------------------------------------------------------------------------------------
# HTML and SVG
# --------------------------------------------------------------------------------------------------

# "screen" in the dark part: paper stays white.
STYLE = """
:root {color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --page: #fff; --box: #f4f6f8;
  --line: #d0d7de; --bar: #2b7bba44; --right: #1a7f37}
@media screen and (prefers-color-scheme: dark) {:root {--ink: #e6edf3; --soft: #9da7b3;
  --page: #12161c; --box: #1c222b; --line: #3a424d; --bar: #4c9be077; --right: #4ac26b}}
* {box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact}
body {font: 1rem/1.5 system-ui, "Noto Sans", sans-serif; color: var(--ink);
  background: var(--page); max-width: 72rem; margin: auto; padding: 1rem; overflow-wrap: anywhere}
h1 {font-size: 1.6rem; line-height: 1.2; margin: .5rem 0} h2 {font-size: 1.25rem; margin: 0 0 .25rem}
h3 {font-size: 1rem; margin: 0 0 .25rem} section {margin: 2.5rem 0} p {max-width: 45rem; margin: .5rem 0}
nav a {color: inherit; margin-right: .75rem; display: inline-block; padding: .25rem 0}
small, figcaption, .soft {color: var(--soft); font-size: .85rem; line-height: 1.35}
.grid {display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr))}
.box {background: var(--box); border-radius: .5rem; padding: .75rem; break-inside: avoid; min-width: 0}
.row {display: grid; gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(0, 1fr))}
figure {margin: 0; min-width: 0; break-inside: avoid} svg {display: block; width: 100%; color: var(--ink)}
img {display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff;
  border: 1px solid var(--line); border-radius: .4rem}
.right img {outline: 3px solid var(--right); outline-offset: 1px} .right figcaption {color: var(--right);
  font-weight: 600}
.wide {overflow-x: auto} .wide svg {min-width: 44rem}
table {border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums;
  margin: .5rem 0 1rem} caption {text-align: left; font-weight: 600; padding: .25rem 0}
th, td {padding: .15rem .5rem; border-bottom: 1px solid var(--line); text-align: right;
  overflow-wrap: normal} th:first-child {text-align: left} th {font-weight: 600}
.bars td {min-width: 5rem; background: linear-gradient(to right, var(--bar) var(--x, 0%), transparent 0)}
.heat th, .heat td {padding: .1rem .25rem; font-size: .75rem; border: 0; text-align: center}
.heat td {background: rgb(43 123 186 / var(--x, 0))}
@media print {body {max-width: none; font-size: 10pt} nav {display: none} section {margin: 1.2rem 0}
  .wide {overflow: visible} .wide svg {min-width: 0} .heat th, .heat td {padding: 0 .1rem;
  font-size: 6pt} h2, caption {break-after: avoid} tr {break-inside: avoid}}
"""


def text(words, language=None):
    """Words of any script, escaped; a language chooses the shapes of Chinese characters."""
    tag = f' lang="{html.escape(language)}"' if language else ""
    return f"<bdi{tag}>{html.escape(words)}</bdi>"


def data_url(image):
    """A small JPEG as an address that holds it."""
    file = io.BytesIO()
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def figure(image, alt, caption, kind=""):
    """A picture of the page. caption: HTML."""
    return (f'<figure class="{kind}"><img alt="{html.escape(alt)}" src="{data_url(image)}">'
            f"<figcaption>{caption}</figcaption></figure>")


def html_table(caption, head, rows, kind=""):
    """rows: [[first cell, other cells]]; a cell is HTML, or (HTML, its share in 0 to 1)."""
    lines = [f'<div class="wide"><table class="{kind}"><caption>{caption}</caption><thead><tr>',
             *(f'<th scope="col">{name}</th>' for name in head), "</tr></thead><tbody>"]
    for first, *cells in rows:
        lines.append(f'<tr><th scope="row">{first}</th>')
        for cell in cells:
            words, share = cell if isinstance(cell, tuple) else (cell, 0)
            value = f"{share:.2f}" if kind == "heat" else f"{share:.0%}"
            lines.append(f'<td style="--x:{value}">{words}</td>' if share else f"<td>{words}</td>")
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def line_chart(title, lines, chance=None):
    """lines {name: [(x, y)]}, in the colours of their order -> an SVG of 320 x 190."""
    ys = [y for points in lines.values() for _, y in points]
    ys += [] if chance is None else [chance]
    low = 0.0 if min(ys) < 0.3 * max(ys) else min(ys)
    high = max(max(ys), low + 1e-9)
    last = max(x for points in lines.values() for x, _ in points)

    def place(x, y):
        return 42 + 270 * x / max(1, last), 12 + 150 * (high - y) / (high - low)

    parts = [f'<svg viewBox="0 0 320 190" role="img" aria-label="{html.escape(title)}" '
             'font-size="11" fill="currentColor">']
    for y in (low, (low + high) / 2, high):
        parts.append(f'<path d="M42 {place(0, y)[1]:.1f}h270" stroke="#8886"/><text x="38" '
                     f'y="{place(0, y)[1] + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    parts.append('<text x="42" y="180">step 0</text>'
                 f'<text x="312" y="180" text-anchor="end">{last:,}</text>')
    if chance is not None:
        y = place(0, chance)[1]
        parts.append(f'<path d="M42 {y:.1f}h270" stroke="currentColor" stroke-dasharray="1 3" '
                     f'stroke-width="1.5"/><text x="312" y="{max(10, y - 3):.1f}" '
                     f'text-anchor="end">chance {chance:.3g}</text>')
    for number, points in enumerate(lines.values()):
        joined = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        parts.append(f'<polyline points="{joined}" fill="none" {stroke(number)}/>')
    return "".join([*parts, "</svg>"])


def stroke(number):
    """How the line of a run is drawn; dashes also tell lines apart that are printed in grey."""
    colour = COLOURS[number % len(COLOURS)]
    dash = DASHES[number % len(DASHES)]
    return f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'


# --------------------------------------------------------------------------------------------------
# Pictures of runs
# --------------------------------------------------------------------------------------------------

def curves(runs):
    """runs {name: folder} -> a chart for each column of their log.csv."""
    found = {name: curves_of(folder) for name, folder in runs.items()}
    columns = dict.fromkeys(itertools.chain(*found.values()))
    if not columns:
        raise LeftOut(f"{' and '.join(map(str, runs.values()))}: no log.csv is there")
    chance = {}
    for folder in runs.values():
        chance = chance_of(folder) | chance
    key = [f'<svg viewBox="0 0 32 8" style="width:2rem;display:inline"><path d="M0 4h32" '
           f"{stroke(number)}/></svg> {text(name)}" for number, name in enumerate(runs)]
    boxes = []
    for column in columns:
        lines = {name: averaged(curve.get(column, [])) for name, curve in found.items()}
        last = [f"{text(name)} {curve[column][-1][1]:.4g}" for name, curve in found.items()
                if column in curve]
        chart = line_chart(f"{column} by step", lines, chance.get(column))
        boxes.append(f'<figure class="box"><h3>{column}</h3>{chart}<figcaption>last: '
                     f"{'; '.join(last)}</figcaption></figure>")
    return ("<p>Each loss beside chance, the value of a model that has learned nothing. "
            "Scores of a validation (val_) are in %.</p>"
            f"<p>{' &nbsp; '.join(key)}</p><div class=\"grid\">{''.join(boxes)}</div>")


def results_of(runs):
    """{name: results.json} of the runs that have one."""
    files = {name: folder / "results.json" for name, folder in runs.items()}
    return {name: read_json(file, "train.py") for name, file in files.items() if file.exists()}


def recall(results):
    """results {name: results.json} -> tables by language; of a run's further test sets the means
    of the groups."""
    sets = dict.fromkeys(name for report in results.values() for name in report if name != "groups")
    tables = []
    for name in sets:
        having = {run: report for run, report in results.items() if name in report}
        tables += recall_table(name, having, whole=not tables)
    if not tables:
        raise LeftOut("no results.json of a run is there, and no pictures to measure on")
    return "<p>Means over a group's languages in the grey rows. " \
           "A bar's full width is 100 %.</p>" + "".join(tables)


def recall_table(name, results, whole):
    """One test set -> [a table, or nothing]. whole: a row for each language."""
    first = next(iter(results.values()))
    scores = next(iter(first[name].values()), {})
    key = next((key for key in SCORES if key in scores), None)
    if not key:
        return []
    rows = []
    for group in dict.fromkeys(k for report in results.values() for k in report["groups"][name]):
        means = [report["groups"][name].get(group, {}) for report in results.values()]
        rows.append([f"<b>{evaluate.TASK_GROUPS.get(group, group)}</b>", *(bar_cell(x, key) for x in means)])
    return [html_table(f"{text(name)}: {SCORES[key]}, %", ["", *map(text, results)], rows, "bars")]
