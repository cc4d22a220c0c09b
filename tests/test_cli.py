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
import search
import train
import weights
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


@pytest.mark.parametrize("main, words, said", [
    (train.main, ["--stpes", "3"], "--stpes"), (train.main, ["--step", "3"], "--step"),
    (search.main, ["dog"], "--ckpt"), (evaluate.main, ["retreival"], "retreival")])
def test_no_flag_is_guessed_and_a_missing_one_is_named(capsys, main, words, said):
    with pytest.raises(SystemExit) as end:
        main(words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("main, words", [(train.main, []), (evaluate.main, ["retrieval"]), (search.main, [])])
def test_every_command_has_help_with_defaults(capsys, main, words):
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0 and "(default: " in capsys.readouterr().out


def test_an_out_that_cannot_be_a_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    refused(capsys, lambda: train.main(["--out", str(tmp_path / "file" / "out")]), "file")


@pytest.mark.parametrize("content", [b"", b"hello, I am a text", b"PK\x03\x04 a broken archive"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, capsys, content):
    (tmp_path / "ckpt.pt").write_bytes(content)
    refused(capsys, lambda: train.main(["--out", str(tmp_path)]), "ckpt.pt", "not a checkpoint")


def test_a_missing_init_is_refused(tmp_path, capsys):
    refused(capsys, lambda: train.main(["--out", str(tmp_path), "--init", str(tmp_path / "none.pt")]),
            "none.pt", "no such checkpoint")


def test_a_malicious_pickle_is_not_run(tmp_path, capsys):
    class Malice:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harm",)
    torch.save({"model": Malice()}, tmp_path / "ckpt.pt")
    refused(capsys, lambda: train.main(["--out", str(tmp_path)]), "not a checkpoint")
    assert not (tmp_path / "harm").exists()


def test_a_checkpoint_of_another_shape_is_refused(tmp_path, capsys, tokenizer):
    model = CCLM(build("demo", width=32, vocabulary=tokenizer.size))
    weights.write_checkpoint(tmp_path / "a.pt", {"model": model.state_dict(), "step": 1, "tokenizer": tokenizer.model,
                                                 "config": {"model": {"width": 32}, "train": {}}})
    flags = ["--out", str(tmp_path), "--init", str(tmp_path / "a.pt"), "--width", "64"]
    refused(capsys, lambda: train.main(flags), "a.pt", "does not fit", "(32,", "(64,")


@pytest.mark.parametrize("flags, said", [(["--batch", "0"], "--batch"),
                                         (["--width", "66", "--vision_heads", "4", "--no-stem"], "multiple of 4 heads"),
                                         (["--patch_size", "24", "--no-stem"], "patch size 24"),
                                         (["--lr", "nan"], "--lr nan"), (["--clip", "-1"], "--clip -1"),
                                         (["--mask_probability", "2"], "at most 1"), (["--seed", "-1"], "--seed"),
                                         (["--stop_after", "0"], "--stop_after 0"), (["--scenes", "-1"], "--scenes"),
                                         (["--text_layers", "0"], "text_layers is 0"), (["--width", "100"], "100")])
def test_settings_that_cannot_work_are_refused(tmp_path, capsys, flags, said):
    refused(capsys, lambda: train.main(["--out", str(tmp_path), *flags]), said)


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
    assert set(report["groups"]["test_concept"]) == {"seen", "text_only", "never"} and len(report["test_concept"]) == 25
