"""The record of a run: what it measured, small enough to commit (docs/runs/).

    python tests/campaigns/runs.py keep out/seed0 docs/runs/seed0
    python tests/campaigns/runs.py mean docs/runs/seed0 docs/runs/seed1 docs/runs/seed2

keep: of a folder and all folders in it, the JSON files with results, with two decimals, and log.csv with about 60 rows:
every n-th one, those with a validation, and the last. No checkpoint.
mean: the groups of results.json as a table of Markdown, mean and standard deviation of several runs.
"""
import csv
import json
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import evaluate                                                              # noqa: E402

RESULTS = ("results.json", "languages.json", "guess.json", "zero_shot/*.json")
ROWS = 60
COLUMNS = {"t2i_r1": "image R@1", "reranked_t2i_r1": "re-ranked", "matched_t2i_r1": "by match",
           "new_t2i_r1": "new names", "i2t_r1": "text R@1", "reranked_i2t_r1": "re-ranked",
           "false_caption_accuracy_cosine": "true > false"}


def rounded(text):
    """A cell of log.csv with five digits."""
    try:
        return f"{float(text):.5g}"
    except ValueError:
        return text


def thin(source, target):
    with open(source, newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    validation = [k for k, name in enumerate(head) if name.startswith("val_")]
    every = max(1, len(rows) // ROWS)
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        for k, row in enumerate(rows, 1):
            if k % every == 0 or k == len(rows) or any(row[column] for column in validation):
                writer.writerow([row[0], *map(rounded, row[1:])])


def keep(source, target):
    """Prints what it wrote."""
    written = []
    for pattern in (*RESULTS, "log.csv"):
        for path in sorted(pathlib.Path(source).rglob(pattern)):
            copy = pathlib.Path(target, path.relative_to(source))
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.name == "log.csv":
                thin(path, copy)
            else:
                scores = json.loads(path.read_text(encoding="utf-8"), parse_float=lambda number: round(float(number), 2))
                copy.write_text(json.dumps(scores) + "\n", encoding="utf-8")
            written.append(copy)
    if not written:
        sys.exit(f"{source} has no {', '.join(RESULTS)} or log.csv")
    size = sum(path.stat().st_size for path in written)
    print(f"wrote {len(written)} files, {size / 1e3:.0f} KB, to {target}")


def mean(*runs):
    """Prints the table of several runs."""
    reports = [json.loads(pathlib.Path(run, "results.json").read_text(encoding="utf-8"))["groups"] for run in runs]
    print(f"| test set | languages | {' | '.join(COLUMNS.values())} |\n|{'---|' * (2 + len(COLUMNS))}")
    for name, groups in reports[0].items():
        for group, scores in groups.items():
            cells = []
            for key in COLUMNS:
                values = [report[name][group][key] for report in reports] if key in scores else []
                deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.1f}{deviation}" if values else "")
            print(f"| {name} | {evaluate.GROUPS.get(group, group)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    commands = {"keep": keep, "mean": mean}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
