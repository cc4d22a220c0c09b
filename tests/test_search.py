"""search.py: a ranking, one safe HTML file, what is left out is told, a mistake is one line."""
import base64
import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest
import samples
import torch

import data
import evaluate
import search
from demo import emoji
from formats import images
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
    assert out.count("(cut at 80 tokens)") == 1 and "(cut at 80 tokens)" in (folder / "g.html").read_text()


def test_pictures_deeper_inside_and_those_of_training_data_are_searched(checkpoint, tmp_path, capsys):
    """The same three pictures, in a folder's folder and in a tar: the same scores."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "a" / "b" / f"{i}.JPG").write_bytes(samples.jpeg(i))
    (tmp_path / "c").mkdir()
    samples.write_tar(tmp_path / "c" / "c.tar", 3)
    (tmp_path / "c" / "._x.jpg").write_bytes(b"macOS leaves it: no picture")
    found = []
    for source in ("a", "c"):
        assert search.main(f"--ckpt {checkpoint} --images {tmp_path / source} --html {tmp_path}/g.html dog".split()) == 0
        found.append(re.findall(r"^ +\d +(-?[\d.]+)  (.*)$", capsys.readouterr().out, re.M))
    assert [score for score, _ in found[0]] == [score for score, _ in found[1]] and len(found[0]) == 3
    assert {os.path.basename(name) for _, name in found[0]} == {"0.JPG", "1.JPG", "2.JPG"}
    assert all("c.tar" in name for _, name in found[1])


def test_one_image_at_a_time_is_open(checkpoint, folder, monkeypatch):
    """Each is resized before the next is opened."""
    events = []
    monkeypatch.setattr(search, "open_image", lambda *args: events.append("open") or opened(*args))
    monkeypatch.setattr(evaluate, "eval_transform", lambda *args: events.append("resized") or resized(*args))
    opened, resized = images.open_image, images.eval_transform
    model, *_ = evaluate.load(checkpoint)
    search.encode_pictures(model, search.find_pictures(folder))
    assert events == ["open", "resized"] * 4 + ["open"]                      # the last one is broken


def test_a_name_that_is_not_utf8_is_shown_escaped_on_any_terminal_and_in_the_gallery(checkpoint, folder):
    name = os.fsencode(folder) + b"/m\xfcnchen.png"
    os.rename(folder / "0.png", name)
    (folder / "1.png").rename(folder / "\u732b.png")
    command = [sys.executable, "search.py", "--ckpt", checkpoint, "--images", folder, "--html", folder / "g.html", "dog"]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parents[1], capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "latin-1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and b"m\\udcfcnchen.png" in done.stdout and b"\\u732b.png" in done.stdout
    page = (folder / "g.html").read_text(encoding="utf-8")
    assert "m\\udcfcnchen.png" in page and "\u732b.png" in page


def test_what_stood_in_a_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "gallery.html"
    file.write_text("old")
    (tmp_path / "link.html").symlink_to(file)
    data.write_output(tmp_path / "link.html", b"new")
    assert file.read_text() == "new" and (tmp_path / "link.html").is_symlink()
    monkeypatch.setattr(pathlib.Path, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk is gone")))
    with pytest.raises(OSError, match="gone"):
        data.write_output(file, b"newer")
    assert file.read_text() == "new" and sorted(os.listdir(tmp_path)) == ["gallery.html", "link.html"]


@pytest.mark.parametrize("end, status", [("raise KeyboardInterrupt", 130), ("print('x' * 10 ** 6)", 141)])
def test_a_closed_pipe_and_ctrl_c_end_a_command_without_a_traceback(end, status):
    """A command of a few lines through the door of all commands: main() that prints, and data.fail."""
    code = f"""if 1:
        import data
        def main():
            try:
                print("first", flush=True)
                {end}
            except (ValueError, OSError) as error:
                return data.fail(error)
        data.run(main)"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[1], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as run:
        assert run.stdout.readline() == b"first\n"
        run.stdout.close()
        assert run.stderr.read() == b"" and run.wait() == status
