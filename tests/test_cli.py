"""A user's mistake gives one line that says what, where and what to do, and exit status 2; never a traceback."""
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import data
import evaluate
import report
import search
import train
from demo import emoji
from model import CCLM, build

ROOT = pathlib.Path(__file__).parents[1]


def refused(capsys, call, *said):
    """call() gives status 2 and one line on stderr that holds every word of `said`."""
    assert call() == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in said), lines


def test_a_mistake_is_one_line_and_status_2_of_the_command():
    done = subprocess.run([sys.executable, "train.py", "--preset", "huge"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "demo" in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout


def test_nothing_imports_what_windows_lacks():
    """A module that is None in sys.modules cannot be imported: as on Windows, which lacks these."""
    code = ("import sys; sys.modules.update(dict.fromkeys(['fcntl', 'resource', 'grp', 'pwd', 'termios']));"
            "import report, search, train, weights")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("main, words", [(train.main, []), (evaluate.main, ["retrieval"]), (search.main, []),
                                         (report.main, [])])
def test_every_command_has_help_with_defaults(capsys, main, words):
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0 and "(default: " in capsys.readouterr().out


def test_a_malicious_pickle_is_not_run(tmp_path, capsys):
    class Malice:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harm",)
    torch.save({"model": Malice()}, tmp_path / "ckpt.pt")
    refused(capsys, lambda: train.main(["--out", str(tmp_path)]), "not a checkpoint")
    assert not (tmp_path / "harm").exists()


def test_ten_steps_that_are_not_finite_stop_the_run(tmp_path, capsys):
    """The weights are never touched by such a step; the message names the steps and the batch's words."""
    tiny = ("--width 32 --vision_layers 1 --batch 4 --text_batch 4 --steps 30 --workers 0 --no-eval "
            "--contrast_weight inf").split()
    refused(capsys, lambda: train.main(["--out", str(tmp_path), *tiny]), "not finite", "1 to 10", "<s>")


def test_results_have_the_documented_form(tmp_path):
    """out/results.json of a finished run, as other tools read it."""
    tokenizer = data.demo_tokenizer(4000)
    model = CCLM(build("demo", width=32, vocabulary=tokenizer.size))
    report = json.loads(json.dumps(evaluate.demo_report(model, tokenizer, sets=("test_concept",))))
    for scores in (report["test_concept"]["hi"], report["groups"]["test_concept"]["never"]):
        for key in ("t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10",
                    "reranked_t2i_r1", "reranked_i2t_r1", "matched_t2i_r1", "matched_i2t_r1", "n"):
            assert 0 <= scores[key] <= 100
    assert set(report["groups"]["test_concept"]) == {"seen", "text_only", "never"}
    assert len(report["test_concept"]) == len(emoji.meta()["list_patterns"])             # all languages
