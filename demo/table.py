"""The paper's Table 1 and its ablations in miniature: pre-trains, fine-tunes and scores on the
stand-in benchmark (demo/benchmark.py), one process after the other. Hours on two CPU cores.

    python -m demo.table                    three seeds of everything
    python -m demo.table --seeds 1 --quick  short runs, eight languages
    python -m demo.table --print            only the tables of what is there

Everything is fine-tuned on English and chosen by the English validation set. Ablations are not
fine-tuned for retrieval, which they can do without. Stopped at any time, the same command goes on:
a step whose results are there is left out, a run that was cut continues from its checkpoint
(train.py). OUT/VARIANT/SEED/ holds pretrained/ and a folder for each task, each with log.csv,
settings and results; OUT/table.md holds the tables.
"""
import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
import sys

from demo import emoji

# What of the method is left out: flags of the pre-training.
VARIANTS = {
    "full": [],
    "no parallel text": ["--no-parallel_text"],
    "no matching": ["--no-match"],
    "no conditional masking": ["--no-condition"],
    "unshared fusion": ["--no-shared_fusion"],
    "translation LM": ["--translation_lm"],
}
FINE_TUNED = ("xvnli", "xgqa", "marvl", "xflickrco", "wit")
RETRIEVAL = ("xflickrco", "wit")
# Columns: a title, the file of a run's scores, the task, what of its scores is shown.
RECALL = {"t2i": "reranked_t2i_r1", "i2t": "reranked_i2t_r1"}
COLUMNS = [(task, f"{task}/languages.json", task, "accuracy")
           for task in ("xvnli", "xgqa", "marvl")]
COLUMNS += [(f"{task} {way}", f"{task}/languages.json", task, key)
            for task in RETRIEVAL for way, key in RECALL.items()]
COLUMNS += [(f"{task} {way}, zero-shot", f"zero_shot/{task}.json", task, key)
            for task in RETRIEVAL for way, key in RECALL.items()]
GROUPS = {"English": ["en"],
          "other languages with images": [k for k in emoji.languages("seen") if k != "en"],
          "languages only in parallel text": emoji.languages("text_only"),
          "languages never in training": emoji.languages("never")}
# Rows of demo/benchmark.py's guess.json.
GUESSES = {"always one answer": "nothing", "the best without pictures": "text"}
QUICK_LANGUAGES = ["en", "de", "ja", "ar", "ru", "sw", "it", "uk"]
QUICK = {"pretrained": ["--steps", "200", "--no-eval"], "task": ["--epochs", "2"]}


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------

def run(*command):
    """A command of this project. Its output is shown; when it fails, that is the end."""
    command = [sys.executable, *map(str, command)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    status = subprocess.run(command).returncode
    if status:
        sys.exit(f"stopped with status {status}: {shlex.join(command)}; the same command goes on")


def folder_of(out, variant, seed):
    return pathlib.Path(out, variant.replace(" ", "_"), str(seed))


def make_benchmark(out):
    """-> the folders of annotations and pictures, as flags."""
    folder = pathlib.Path(out, "benchmark")
    if not (folder / "images/guess.json").exists():             # the last file that is written
        run("-m", "demo.benchmark", folder)
    return ["--data", folder / "datasets", "--image_root", folder / "images"]


def pretrain(folder, variant, seed, quick):
    """-> the checkpoint."""
    checkpoint = folder / "pretrained/ckpt.pt"
    if not (folder / "pretrained/results.json").exists():
        options = QUICK["pretrained"] if quick else []
        run("train.py", *VARIANTS[variant], *options, "--seed", seed, "--out", checkpoint.parent)
    return checkpoint


def score(task, checkpoint, files, languages, result):
    """The test sets of a task in all languages -> result, a JSON file."""
    if not result.exists():
        result.parent.mkdir(parents=True, exist_ok=True)
        run("evaluate.py", task, "--ckpt", checkpoint, *files, "--languages", *languages,
            "--json", result)


def chain(args, variant, seed, files):
    """Everything of one run: pre-training, then each task."""
    folder = folder_of(args.out, variant, seed)
    languages = QUICK_LANGUAGES if args.quick else sum(GROUPS.values(), [])
    options = QUICK["task"] if args.quick else []
    checkpoint = pretrain(folder, variant, seed, args.quick)
    for task in args.tasks:
        if task in RETRIEVAL:
            score(task, checkpoint, files, languages, folder / "zero_shot" / f"{task}.json")
            if variant != "full":
                continue
        result = folder / task / "languages.json"
        if not result.exists():
            run("train.py", "--task", task, "--init", checkpoint, *files, *options,
                "--seed", seed, "--no-eval", "--out", folder / task)
            score(task, folder / task / "best.pt", files, languages, result)
            (folder / task / "ckpt.pt").unlink()                # best.pt is what was scored


def run_all(args):
    files = make_benchmark(args.out)
    for seed in range(args.seeds):
        for variant in args.variants:
            chain(args, variant, seed, files)
            print_tables(args)


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------

def number(out, variant, seed, column, languages):
    """A cell of one run: the mean over the languages that were scored; None where none was."""
    _, name, task, key = column
    path = folder_of(out, variant, seed) / name
    if not path.exists():
        return None
    scores = json.loads(path.read_text(encoding="utf-8"))[task]
    found = [scores[language][key] for language in languages if language in scores]
    return statistics.fmean(found) if found else None


def cell(values, sign=""):
    """Numbers of several seeds -> 'mean ± standard deviation'."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def table(title, rows, columns):
    """rows: {name: [cell]} -> lines of Markdown, without the columns that no run fills."""
    kept = [k for k in range(len(columns)) if any(cells[k] for name, cells in rows.items()
                                                  if name not in GUESSES)]
    lines = [f"| {' | '.join([title, *(columns[k][0] for k in kept)])} |",
             f"|{'---|' * (len(kept) + 1)}"]
    for name, cells in rows.items():
        lines.append(f"| {' | '.join([name, *(cells[k] for k in kept)])} |")
    return [*lines, ""]


def tables(args):
    """-> lines: a table for each group of languages, and one of what each part is worth."""
    path = pathlib.Path(args.out, "benchmark/images/guess.json")
    guess = json.loads(path.read_text(encoding="utf-8"))
    seeds = range(args.seeds)
    lines = []
    for group, languages in GROUPS.items():
        rows = {name: [f"{guess[column[2]][seen]:.1f}" for column in COLUMNS]
                for name, seen in GUESSES.items()}
        for variant in args.variants:
            rows[variant] = [cell([number(args.out, variant, seed, column, languages)
                                   for seed in seeds]) for column in COLUMNS]
        lines += table(f"{group}, %", rows, COLUMNS)
    for group, languages in GROUPS.items():
        rows = {variant: [cell(differences(args, variant, column, languages), "+")
                          for column in COLUMNS] for variant in args.variants[1:]}
        lines += table(f"{group}: minus full", rows, COLUMNS) if rows else []
    return lines


def differences(args, variant, column, languages):
    """Points that a variant has more than the full method, of each seed that both have."""
    found = []
    for seed in range(args.seeds):
        full, other = (number(args.out, name, seed, column, languages)
                       for name in ("full", variant))
        if full is not None and other is not None:
            found.append(other - full)
    return found


def print_tables(args):
    text = "\n".join(tables(args))
    print(f"\n{text}")
    pathlib.Path(args.out, "table.md").write_text(text + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--seeds", type=int, default=3, help="runs of everything, with seeds 0, 1, ...")
    flag("--quick", action="store_true", help="short runs and eight languages; its own --out")
    flag("--out", help="folder of all runs; out/table, or out/quick with --quick")
    flag("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
         help=f"of {', '.join(VARIANTS)}")
    flag("--tasks", nargs="+", choices=FINE_TUNED, default=FINE_TUNED, metavar="TASK",
         help=f"of {', '.join(FINE_TUNED)}")
    flag("--print", action="store_true", help="run nothing")
    args = parser.parse_args()
    args.out = args.out or ("out/quick" if args.quick else "out/table")
    try:
        print_tables(args) if args.print else run_all(args)
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
