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
CONCEPTS = 8                            # on the map of the space
WIDTH = 760                             # of that map
HEIGHT = 520
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

    def group_of(self, language):
        return next(group for group, codes in self.groups.items() if language in codes)

    def has(self, language):
        """(I,) bool: which pictures have a caption in the language?"""
        return torch.tensor([text is not None for text in self.texts[language]])

    def name(self, i):
        """The picture's caption in English, or in another language."""
        names = [texts[i] for texts in self.texts.values() if texts[i]]
        return self.texts.get("en", [None] * (i + 1))[i] or names[0]


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
        texts[k] = [next(iter(row["captions"].get(k) or []), None) for row in good]
        numbers = [i for i, text in enumerate(texts[k]) if text is not None]
        encoded, place = evaluate.encode_texts(model, tokenizer, [texts[k][i] for i in numbers])
        text_vectors[k] = torch.zeros(images.vectors.shape)                  # (I, E)
        text_vectors[k][numbers] = encoded.vectors[place].cpu().float()
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
    size = math.ceil(len(points) / POINTS) or 1
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


def picture(s, i, caption, kind=""):
    """Picture i of a set."""
    return figure(evaluate.read_image(s.rows[i]), s.name(i), caption, kind)


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


def recall(results, languages):
    """results {name: results.json} -> tables by language; of a run's further test sets the means
    of the groups. languages: as evaluate.load gives them."""
    sets = dict.fromkeys(name for report in results.values() for name in report if name != "groups")
    tables = []
    for name in sets:
        having = {run: report[name] for run, report in results.items() if name in report}
        tables += recall_table(name, having, languages, whole=not tables)
    if not tables:
        raise LeftOut("no results.json of a run, and no pictures to measure on")
    return ("<p>How often is the first answer right? In bold the means over a group's languages; "
            f"a whole bar is 100 %.</p>{''.join(tables)}")


def recall_table(name, scores, languages, whole):
    """A test set's {run: {language: {key: %}}} -> [HTML], or [] without a score that is known.
    whole: with a row for each language."""
    everyone = list(itertools.chain(*(x.values() for x in scores.values())))
    key = next((key for key in SCORES if any(key in x for x in everyone)), None)
    if not key:
        return []
    chance = next((x[k] for x in everyone for k in ("chance_r1", "chance") if k in x), None)

    def row(label, codes):
        cells = []
        for of_run in scores.values():
            values = [of_run[k][key] for k in codes if key in of_run.get(k, {})]
            mean = fmean(values) if values else None
            cells.append("" if mean is None else (f"{mean:.1f}", mean / 100))
        return [label, *cells]

    rows = []
    groups = groups_of(dict.fromkeys(itertools.chain(*scores.values())), languages)
    for group, codes in groups.items():
        rows.append(row(f"<b>{evaluate.GROUPS.get(group, group)} ({len(codes)})</b>", codes))
        rows += [row(k, [k]) for k in codes if whole]
    beside = "" if chance is None else f"; chance {chance:.2f}"
    caption = f"{text(name)}: {SCORES[key]}, %{beside}"
    return [html_table(caption, ["", *map(text, scores)], rows, "bars")]


def task_tables(folder):
    """The tables of demo/table.py, from the runs in its folder."""
    if not folder:
        raise LeftOut("no folder of demo.table is named (--table)")
    variants = [name for name in table.VARIANTS if table.folder_of(folder, name, 0).is_dir()]
    seeds = sum(path.is_dir() for path in table.folder_of(folder, "full", 0).parent.glob("[0-9]*"))
    settings = argparse.Namespace(out=folder, variants=variants, seeds=seeds)
    found = []
    lines = table.tables(settings)
    while lines:                                    # a table ends with an empty line
        end = lines.index("")
        cells = [[text(cell.strip()) for cell in line.split("|")[1:-1]] for line in lines[:end]]
        (caption, *head), _, *rows = cells
        if head:
            found.append(html_table(caption, ["", *head], rows))
        lines = lines[end + 1:]
    if not found:
        raise LeftOut(f"{folder} has no scores of demo.table yet")
    return ("<p>The paper's tasks in miniature: fine-tuned on English, tested in other languages. "
            f"Numbers are means of {seeds} seeds.</p>{''.join(found)}")


# --------------------------------------------------------------------------------------------------
# Pictures of a model
# --------------------------------------------------------------------------------------------------

def gallery(s):
    """One concept asked in eight languages: the first five answers, the right one framed."""
    eight = s.some_languages(8)
    cosine = torch.stack([s.text_vectors[k] @ s.vectors.T for k in eight])   # (8, I, I)
    right = torch.eye(len(s.rows), dtype=torch.bool)
    rank = torch.stack([evaluate.ranks(scores, right) for scores in cosine])  # (8, I)
    has = torch.stack([s.has(k) for k in eight])                             # (8, I)
    found = (rank == 0) & has
    # The concept that three quarters of them find, so that right and wrong answers are seen.
    distance = (found.sum(0) - 0.75 * len(eight)).abs() - len(eight) * has.sum(0)
    concept = int(distance.argmin())
    boxes = []
    for k, scores, place in zip(eight, cosine[:, concept], rank[:, concept]):
        if s.texts[k][concept] is None:
            continue
        figures = []
        for i in scores.topk(min(5, len(scores))).indices.tolist():
            note = "right" if i == concept else f"{scores[i]:.2f}"
            figures.append(picture(s, i, note, "right" if i == concept else ""))
        boxes.append(f'<div class="box"><h3>{k}: {text(s.texts[k][concept], k)}</h3><p class="soft">'
                     f"{evaluate.GROUPS.get(s.group_of(k), '')} the right "
                     f'picture came {place + 1}. of {len(scores)}</p><div class="row">'
                     f"{''.join(figures)}</div></div>")
    share = evaluate.percent(found[has])
    return (f"<p>The same thing asked in {len(boxes)} languages. The right picture has a frame; "
            "the others have their cosine below. We chose a concept that about three quarters of "
            f"these languages find; over all concepts {share:.0f} % of the queries are right.</p>"
            f'<div class="grid">{"".join(boxes)}</div>')


def lit(image, parts):
    """An image, darkened where a map (side, side) is low."""
    image = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    parts = (parts.clamp(min=0) / parts.max().clamp(min=1e-9)).detach().cpu()
    light = Image.fromarray((255 * parts).byte().numpy()).resize(image.size)
    return Image.composite(image, image.point(lambda value: DARK * value), light)


def word_maps(model, tokenizer, s, scene):
    """Which patches speak for a word, in three languages? scene: (image, [{language: word}])."""
    image, words = scene
    maps = {"parts of the cosine": evaluate.cosine_map, "cross-attention": evaluate.attention_map}
    boxes = []
    for word in words:
        for k in s.one_of_each_group():
            if k not in word:
                continue
            figures = [figure(lit(image, make(model, tokenizer, image, word[k])),
                              f"{name} for {word[k]}", name) for name, make in maps.items()]
            boxes.append(f'<div class="box"><h3>{k}: {text(word[k], k)}</h3>'
                         f'<div class="row">{"".join(figures)}</div></div>')
    whole = figure(image, "the whole picture", "the picture")
    side = model.config.image_size // model.config.patch_size
    return (f"<p>A model cuts a picture into {side} x {side} patches. Bright patches speak for the "
            "word. Left: how much of the cosine of the two vectors comes from each patch. Right: "
            "what the match head's answer owes to each patch that the word's first token reads in "
            "the fusion encoder's last cross-attention (its weight times its gradient).</p>"
            f'<div class="grid"><div class="box"><h3>{text("picture")}</h3><div class="row">'
            f"{whole}<span></span></div></div>{''.join(boxes)}</div>")


def across(s):
    """Text to text: a caption in one language asks for the same picture's caption in another."""
    codes = list(s.text_vectors)
    if len(codes) < 2:
        raise LeftOut("the captions are in one language only")
    groups = list(s.groups)
    cells = {}
    for a, b in itertools.product(codes, codes):
        both = s.has(a) & s.has(b)
        if a != b and both.any():
            cosine = s.text_vectors[a][both] @ s.text_vectors[b][both].T     # (n, n)
            right = torch.eye(len(cosine), dtype=torch.bool)
            cells[a, b] = evaluate.percent(evaluate.ranks(cosine, right) == 0)

    def mean(group, other):
        values = [cells[pair] for pair in itertools.product(s.groups[group], s.groups[other])
                  if pair in cells]
        return (f"{fmean(values):.1f}", fmean(values) / 100) if values else ""

    names = [evaluate.GROUPS.get(group, group) for group in groups]
    means = [[name, *(mean(group, other) for other in groups)]
             for name, group in zip(names, groups)]
    rows = []
    for a in codes:
        values = [cells.get((a, b)) for b in codes]
        rows.append([a, *("" if x is None else (f"{x:.0f}", x / 100) for x in values)])
    return ("<p>Without any picture: a caption of one language (row) asks for the caption of the "
            "same picture in another language (column). R@1 by the text vectors, %. Captions that "
            "read the same in both languages are easy.</p>"
            + html_table("means of groups", ["asked in", *names], means, "bars")
            + html_table("language by language", ["", *codes], rows, "heat"))


def plane(fitted, shown):
    """-> a function: vectors (n, E) -> n points (x, y) of the drawing. Its axes are those along
    which the vectors `fitted` differ most (PCA); all of `shown` have room."""
    mean = fitted.mean(0)
    axes = torch.linalg.svd(fitted - mean, full_matrices=False).Vh[:2]       # (2, E)
    low, high = torch.aminmax((shown - mean) @ axes.T, dim=0)                # (2,) each
    size = torch.tensor([WIDTH - 200.0, HEIGHT - 60.0])

    def place(vectors):
        flat = ((vectors - mean) @ axes.T - low) / (high - low).clamp(min=1e-9)
        return (flat * size + 30).tolist()                                   # (n, 2)
    return place


def kept_checkpoints(ckpt):
    """The earlier checkpoints that train.py --keep left beside one: [(step, path)]."""
    found = [(path.stem.removeprefix("ckpt_"), path) for path in ckpt.parent.glob("ckpt_*.pt")]
    return sorted((int(step), path) for step, path in found if step.isdigit())


@torch.inference_mode()
def word_paths(kept, words):
    """kept [(step, path)] -> [vectors (words, E)], one of each checkpoint."""
    found = []
    for _, path in kept:
        model, tokenizer, _ = evaluate.load(path)
        encoded, place = evaluate.encode_texts(model, tokenizer, words)
        found.append(encoded.vectors[place].float())                         # (words, E)
    return found


def path(points, steps):
    """The way of a word through training, a dot for each checkpoint -> SVG."""
    joined = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
    line = f'<polyline points="{joined}" fill="none" stroke="{COLOURS[0]}" stroke-dasharray="4 3"/>'
    dots = [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="2.5" fill="{COLOURS[0]}"><title>step {step:,}'
            "</title></circle>" for step, (x, y) in zip(steps, points)]
    return "".join([line, *dots])


def labels(words):
    """[(x, y, word, language)] -> SVG; a label that would cover another moves down."""
    placed = []
    parts = []
    for x, y, word, k in sorted(words, key=lambda label: label[1]):
        end = x + 9 * len(word)
        while any(abs(y - v) < 13 and x < right and left < end for left, right, v in placed):
            y += 2
        placed.append((x, end, y))
        parts.append(f'<text x="{x:.0f}" y="{y:.0f}" lang="{k}">{html.escape(word)}</text>')
    return "".join(parts)


def space(s, kept):
    """Pictures and words of several languages in one plane. kept: of kept_checkpoints, for the path
    of each word of one concept."""
    codes = list(dict.fromkeys(s.one_of_each_group() + s.some_languages(5)))
    complete = torch.stack([s.has(k) for k in codes]).all(0).nonzero().flatten()
    if len(complete) < 2:
        raise LeftOut(f"fewer than two pictures have captions in all of {' '.join(codes)}")
    concepts = complete[::math.ceil(len(complete) / CONCEPTS)].tolist()      # spread over the set
    words = torch.stack([s.text_vectors[k][concepts] for k in codes], 1)     # (C, languages, E)
    ways = word_paths(kept, [s.texts[k][concepts[0]] for k in codes])
    ways = torch.stack([*ways, words[0]], 1)                                 # (languages, steps, E)
    # Words of a language that was never trained may lie anywhere: they do not turn the axes.
    trained = torch.tensor([s.group_of(k) != "never" for k in codes])
    pictures = s.vectors[concepts]                                           # (C, E)
    fitted = torch.cat([pictures, words[:, trained].flatten(0, 1)])
    place = plane(fitted, torch.cat([pictures, words.flatten(0, 1), ways.flatten(0, 1)]))
    parts = []
    if kept:
        parts += [path(place(way), [*(step for step, _ in kept), "the last"]) for way in ways]
    named = []
    for number, (i, (x, y)) in enumerate(zip(concepts, place(pictures))):
        colour = COLOURS[number % len(COLOURS)]
        for k, (u, v) in zip(codes, place(words[number])):
            parts.append(f'<path d="M{x:.0f} {y:.0f}L{u:.0f} {v:.0f}" stroke="{colour}" opacity=".5"/>'
                         f'<circle cx="{u:.0f}" cy="{v:.0f}" r="4" fill="{colour}"/>')
            named.append((u + 7, v + 4, s.texts[k][i][:24], k))
        parts.append(f'<image x="{x - 20:.0f}" y="{y - 20:.0f}" width="40" height="40" role="img" '
                     f'aria-label="{html.escape(s.name(i))}" '
                     f'href="{data_url(evaluate.read_image(s.rows[i]))}"/>')
    told = f"Words in {' '.join(codes)}; each is joined to its picture."
    if kept:
        told += (" Broken lines: the ways of the first one's words from step "
                 f"{kept[0][0]:,} to the end, on the axes of the end.")
    else:
        told += " (For the ways of words through training, keep checkpoints: train.py --keep.)"
    return (f"<p>A picture and its words should lie together, whatever the language. The axes are "
            f"the two along which these vectors differ most (PCA); most of the {len(s.vectors[0])} "
            f'dimensions are not seen. {told}</p><div class="wide"><svg viewBox="0 0 {WIDTH} '
            f'{HEIGHT}" role="img" aria-label="Pictures and words in one plane" font-size="12" '
            f'fill="currentColor">{"".join(parts)}{labels(named)}</svg></div>')


def mistakes(s, tokenizer):
    """Three wrong answers in a language of each group: nearly right, surely wrong, and lost."""
    boxes = []
    for k in s.one_of_each_group():
        cosine = s.text_vectors[k] @ s.vectors.T                             # (I, I)
        rank = evaluate.ranks(cosine, torch.eye(len(cosine), dtype=torch.bool))
        wrong = s.has(k) & (rank > 0)
        if not wrong.any():
            continue
        margin = cosine.amax(1) - cosine.diagonal()                          # (I,)
        picked = {"nearly right": margin.masked_fill(~wrong, torch.inf).argmin(),
                  "surely wrong": margin.masked_fill(~wrong, -torch.inf).argmax(),
                  "lost": rank.masked_fill(~wrong, -1).argmax()}
        for kind, i in picked.items():
            i = int(i)
            came = int(cosine[i].argmax())
            pieces = " ".join(tokenizer.pieces(tokenizer.encode(s.texts[k][i])[1:-1]))
            figures = [picture(s, came, f"came: {text(s.name(came))} {cosine[i, came]:.2f}"),
                       picture(s, i, f"right: {text(s.name(i))} {cosine[i, i]:.2f}, {rank[i] + 1}. "
                                     f"of {len(cosine)}", "right")]
            boxes.append(f'<div class="box"><h3>{k}: {text(s.texts[k][i], k)}</h3>'
                         f'<p class="soft">{kind}; read as {text(pieces)}</p>'
                         f'<div class="row">{"".join(figures)}</div></div>')
    if not boxes:
        raise LeftOut("every query finds its picture")
    return ("<p>Nearly right: the smallest distance between the wrong and the right cosine; often "
            "two things that look alike or share a word. Surely wrong: the largest one. Lost: the "
            "right picture came last of all; look at the pieces into which the word was cut. Small "
            "pieces, or unknown letters, are what a language looks like that the tokenizer or the "
            f'model never learned.</p><div class="grid">{"".join(boxes)}</div>')


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------

def section(title, make, *arguments):
    """-> (title, HTML of make(*arguments)), or why it is left out."""
    try:
        return title, make(*arguments)
    except LeftOut as reason:
        return title, f'<p class="soft">Left out: {html.escape(str(reason))}.</p>'


def page(title, about, sections):
    """sections [(title, HTML)] -> the whole page."""
    links = [f'<a href="#s{number}">{name}</a>' for number, (name, _) in enumerate(sections)]
    body = [f'<section id="s{number}"><h2>{name}</h2>{content}</section>'
            for number, (name, content) in enumerate(sections)]
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}</style></head>'
            f'<body><h1>{title}</h1><p>{about}</p><nav>{"".join(links)}</nav><main>'
            f"{''.join(body)}</main></body></html>")


def demo_scene():
    """A test scene of four drawings, and the words of the first two -> word_maps's scene."""
    row = next(row for row in emoji.split("test_scenes") if len(row["ids"]) == 4)
    return row["image"], [emoji.concepts()[i]["name"] for i in row["ids"][:2]]


def scene_of(s):
    """The first picture with captions in the most languages -> word_maps's scene."""
    number = int(torch.stack([s.has(k) for k in s.texts]).sum(0).argmax())
    words = {k: texts[number] for k, texts in s.texts.items() if texts[number] is not None}
    return evaluate.read_image(s.rows[number]), [words]


def about_model(args, model, state, languages, s):
    """What this page is about, in a few lines of HTML."""
    parameters = sum(p.numel() for p in model.parameters())
    lines = [f"{html.escape(args.ckpt.name)}: {parameters:,} parameters, step {state['step']:,}."]
    if languages:
        lines += [f"{evaluate.GROUPS[group].capitalize()}: {html.escape(' '.join(codes))}."
                  for group, codes in languages.items() if codes]
    if s:
        lines.append(f"Pictures: {html.escape(' '.join(args.images))} ({len(s.rows):,}).")
    return "<br>".join(lines)


def sections_of(args, model, tokenizer, languages, s):
    """-> [(title, HTML)]"""
    trained = list(itertools.chain(*languages.values())) if languages else ()
    runs = dict(zip(short_names(args.runs), args.runs))
    variants = {name: table.folder_of(args.table, name, 0) / "pretrained" for name in table.VARIANTS
                if args.table}
    runs |= {name: folder for name, folder in variants.items() if folder.is_dir()}
    results = results_of(runs)
    if s and not results:
        scores = evaluate.retrieval(model, tokenizer, s.rows, None, 0, trained)
        results = {"this checkpoint": {" ".join(args.images): scores}}
    parts = [section("Recall by language", recall, results, languages),
             section("Tasks", task_tables, args.table),
             section("Training", curves, runs)]
    if not s:
        return [*parts, ("Pictures", '<p class="soft">Left out: all that needs pictures with '
                                     "captions; name some with --images.</p>")]
    scene = demo_scene() if args.images[0].startswith("demo") else scene_of(s)
    return [section("One concept, eight languages", gallery, s), *parts,
            section("Which patches speak for a word", word_maps, model, tokenizer, s, scene),
            section("The shared space", space, s, kept_checkpoints(args.ckpt)),
            section("From language to language", across, s),
            section("Wrong answers", mistakes, s, tokenizer)]


def report(args, device):
    for folder in args.runs or []:
        if not folder.is_dir():
            raise ValueError(f"--runs {folder} is not a folder: name the --out of a run")
    model, tokenizer, languages = evaluate.load(args.ckpt, device)
    state = read_checkpoint(args.ckpt, mmap=True)
    args.runs = args.runs or [args.ckpt.parent]
    trained_on = argparse.Namespace(**{"images": [], **state["config"]["train"]})
    if not args.images and is_demo(trained_on):
        args.images = ["demo:test_style"]
    s = None
    if args.images:
        rows = evaluate.evaluation_set(args.images, None, args.cache, args.image_root)
        s = encode_set(model, tokenizer, rows[:PICTURES], languages)
    sections = sections_of(args, model, tokenizer, languages, s)
    title = f"CCLM: {html.escape(args.ckpt.resolve().parent.name)}"
    raw = page(title, about_model(args, model, state, languages, s), sections).encode()
    data.write_output(args.out, raw)
    print(f"wrote {args.out}: {len(raw) / 2 ** 20:.2f} MB")


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
        report(args, "cuda" if torch.cuda.is_available() else "cpu")
    except (ValueError, OSError, BadRecord) as error:
        return data.fail(error)
    return 0


if __name__ == "__main__":
    data.run(main)
