"""The miniature of the paper's tables: which commands run, once each, and what is made of their numbers."""
import argparse
import json
import pathlib

from demo import table

SCORES = {"accuracy": 60.0, "reranked_t2i_r1": 20.0, "reranked_i2t_r1": 10.0}


def arguments(out, **others):
    values = dict(out=str(out), seeds=2, quick=True, variants=["full", "no matching"], tasks=["xvnli", "wit"])
    return argparse.Namespace(**values | others)


def pretend(commands, fail_at=None):
    """A run() that only writes what the command would."""
    def run(*command):
        command = list(map(str, command))
        commands.append(command)
        if len(commands) == fail_at:
            raise SystemExit("stopped")
        if command[0] == "-m":
            files = {pathlib.Path(command[2], "images/guess.json"): dict.fromkeys(table.FINE_TUNED, {"nothing": 20.0, "text": 33.3})}
        elif command[0] == "train.py":
            out = pathlib.Path(command[command.index("--out") + 1])
            files = {out / name: {} for name in ("ckpt.pt", "results.json", "best.pt")}
        else:
            path = pathlib.Path(command[command.index("--json") + 1])
            bonus = 4 * ("/1/" in path.as_posix()) - 10 * ("no_matching" in path.as_posix())
            scores = {key: value + bonus for key, value in SCORES.items()}
            files = {path: {command[1]: dict.fromkeys(table.QUICK_LANGUAGES, scores)}}
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
    return run


def test_every_command_runs_once_and_a_stopped_table_goes_on(tmp_path, monkeypatch):
    whole = []
    monkeypatch.setattr(table, "run", pretend(whole))
    table.run_all(arguments(tmp_path / "whole"))
    # The benchmark; 2 seeds: pre-training, 2 x (fine-tuning, scores), 1 x zero-shot; the ablation
    # fine-tunes no retrieval.
    assert len(whole) == 1 + 2 * ((1 + 2 * 2 + 1) + (1 + 2 + 1))
    assert sum("--no-match" in command for command in whole) == 2

    halves = []
    monkeypatch.setattr(table, "run", pretend(halves, fail_at=9))
    try:
        table.run_all(arguments(tmp_path / "halves"))
    except SystemExit:
        table.run_all(arguments(tmp_path / "halves"))
    assert len(halves) == len(whole) + 1                        # the one that failed ran twice
    before = len(halves)
    table.run_all(arguments(tmp_path / "halves"))
    assert len(halves) == before


def test_the_tables_hold_mean_and_deviation_and_differences_seed_by_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "run", pretend([]))
    table.run_all(arguments(tmp_path))
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| English, % | xvnli | wit t2i | wit i2t | wit t2i, zero-shot | wit i2t, zero-shot |" in text
    assert "| full | 62.0 ± 2.8 | 22.0 ± 2.8 |" in text         # 60 and 64
    assert "| no matching | -10.0 ± 0.0 |" in text
    assert "| the best without pictures | 33.3 | 33.3 |" in text
    assert "marvl" not in text                                  # what no run has is no column
