"""search.py: a ranking, one safe HTML file, what is left out is told, a mistake is one line."""
import base64
import dataclasses
import re

import pytest
import torch

import evaluate
import search
from demo import emoji
from model import CCLM, PRESETS


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["demo"], vocabulary=tokenizer.size, width=32, embedding=16, image_size=32)
    path = tmp_path_factory.mktemp("search") / "ckpt.pt"
    torch.save({"model": CCLM(config).state_dict(), "step": 1, "tokenizer": tokenizer.model,
                "config": {"model": dataclasses.asdict(config), "train": {}}}, path)
    return path


@pytest.fixture
def folder(tmp_path):     # four images and a text that is called an image
    for i, row in enumerate(emoji.split("val")[:4]):
        row["image"].save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_text("this is no image")
    return tmp_path


def test_search_prints_a_ranking_and_writes_one_safe_file(checkpoint, folder, capsys):
    command = f"--ckpt {checkpoint} --images {folder} --top 3 --html {folder}/g.html <b>dog</b> Hund"
    assert search.main(command.split()) == 0
    out, page = capsys.readouterr().out, (folder / "g.html").read_text(encoding="utf-8")
    assert len(re.findall(r"^   [123]  [ -]0\.\d{3}  .*\.png$", out, re.M)) == 6
    assert out.endswith(f"wrote {folder}/g.html\n")
    assert "<b>" not in page and "&lt;b&gt;dog" in page and "<script" not in page and "http" not in page
    pictures = re.findall(r"base64,([^\"]+)", page)
    assert len(pictures) == 6 and base64.b64decode(pictures[0]).startswith(b"\x89PNG")


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_searched(checkpoint, folder, capsys):
    command = f"--ckpt {checkpoint} --images {folder} --top 9 --html {folder}/g.html dog"
    assert search.main(command.split()) == 0
    out, err = capsys.readouterr()
    assert err.startswith("left out:") and "broken.png" in err and err.count("\n") == 1
    assert "broken.png" not in out and sorted(re.findall(r"(\d)\.png", out)) == ["0", "1", "2", "3"]


def test_a_folder_is_encoded_in_batches_with_the_same_ranking(checkpoint, folder, capsys, monkeypatch):
    command = f"--ckpt {checkpoint} --images {folder} --html {folder}/g.html dog Hund"
    rankings = []
    for batch in (256, 1, 3):                                                # 1: a batch without any readable image
        monkeypatch.setattr(evaluate, "BATCH", batch)
        assert search.main(command.split()) == 0
        rankings.append(re.findall(r"\d\.png", capsys.readouterr().out))
    assert rankings[0] == rankings[1] == rankings[2] and len(rankings[0]) == 8


def test_a_query_longer_than_the_model_reads_is_cut_and_told(checkpoint, folder, capsys):
    assert search.main(["--ckpt", str(checkpoint), "--images", str(folder), "--html", f"{folder}/g.html",
                        "dog " * 99, "dog"]) == 0
    out = capsys.readouterr().out
    assert out.count("(cut at 64 tokens)") == 1 and "(cut at 64 tokens)" in (folder / "g.html").read_text()


MISTAKES = """empty folder       --ckpt {c} --images {d}/empty dog
broken images      --ckpt {c} --images {d} dog --html {d}/g.html
top 0              --ckpt {c} --images {d} --top 0 dog
empty query        --ckpt {c} --images {d} --html {d}/g.html \u00a0
unwritable html    --ckpt {c} --images {d} dog --html {d}""".splitlines()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(mistake, checkpoint, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("this is no image")
    assert search.main(mistake[19:].format(c=checkpoint, d=tmp_path).split(" ")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
