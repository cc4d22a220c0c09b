"""search.py and serve.py: a ranking, an index that is kept, one safe HTML file, a page that gives nothing else away, maps
that say what speaks for a query; what is left out is told, a mistake is one line."""
import base64
import contextlib
import dataclasses
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import urllib.parse

import numpy as np
import pytest
import samples
import torch

import data
import evaluate
import search
import serve
import weights
from campaigns import fuzz_search
from demo import emoji
from formats import images
from model import CCLM, PRESETS
from published import random as random_tensors, x2vlm


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
    assert len(pictures) == 6 and base64.b64decode(pictures[0]).startswith(b"\xff\xd8\xff")


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
        (folder.parent / f".{folder.name}.vectors.npz").unlink(missing_ok=True)
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


def test_a_picture_with_several_captions_is_one_picture(tmp_path):
    (tmp_path / "x.jpg").write_bytes(samples.jpeg(0))
    lines = ['{"image": "x.jpg", "captions": {"en": "%s"}}\n' % text for text in ("a dog", "one dog")]
    (tmp_path / "a.jsonl").write_text("".join(lines) + "no JSON\n" * 2)
    found = search.find_pictures(str(tmp_path / "a.jsonl"))
    assert [picture.name.split()[-1] for picture in found] == ["1", "3", "4"]


def test_one_image_at_a_time_is_open(checkpoint, folder, monkeypatch):
    """Each is resized before the next is opened."""
    events = []
    monkeypatch.setattr(search, "open_image", lambda *args: events.append("open") or opened(*args))
    monkeypatch.setattr(evaluate, "eval_transform", lambda *args: events.append("resized") or resized(*args))
    opened, resized = images.open_image, images.eval_transform
    model, *_ = evaluate.load(checkpoint)
    list(search.encode_pictures(model, search.find_pictures(folder), []))
    assert events == ["open", "resized"] * 4 + ["open"]                      # the last one is broken


@pytest.fixture
def encoded(monkeypatch):     # the names of the pictures that are read to be encoded
    names, read = [], search.read_picture
    monkeypatch.setattr(search, "read_picture", lambda picture, size: names.append(os.path.basename(picture.name)) or read(
        picture, size))
    return names


def vectors_of(checkpoint, source, place):
    """{name: vector} as search.py has them, by an index at `place`."""
    model, *_ = evaluate.load(checkpoint)
    pictures, vectors = search.index_pictures(model, search.find_pictures(source), place)
    return {os.path.basename(picture.name): vector for picture, vector in zip(pictures, vectors)}


def test_the_second_start_encodes_only_what_is_new_or_changed(checkpoint, folder, tmp_path_factory, encoded, capsys):
    """And what it then has is what a start without an index has."""
    place = tmp_path_factory.mktemp("index") / "index.npz"
    vectors_of(checkpoint, folder, place)
    assert sorted(encoded) == ["0.png", "1.png", "2.png", "3.png", "broken.png"]
    encoded.clear()
    vectors_of(checkpoint, folder, place)
    assert encoded == ["broken.png"]                                         # it may be whole by now
    encoded.clear()
    (folder / "0.png").rename(folder / "new.png")
    (folder / "1.png").write_bytes(samples.jpeg(1))
    (folder / "2.png").unlink()
    found = vectors_of(checkpoint, folder, place)
    assert sorted(encoded) == ["1.png", "broken.png", "new.png"] and list(found) == ["1.png", "3.png", "new.png"]
    naive = vectors_of(checkpoint, folder, place.with_name("other.npz"))
    assert found.keys() == naive.keys() and all(torch.allclose(found[name], naive[name], atol=1e-6) for name in naive)
    with np.load(place) as index:
        assert len(index["keys"]) == 3                                      # nothing of 2.png stays


def test_an_index_of_another_model_or_a_damaged_one_is_made_again(checkpoint, folder, tmp_path_factory, encoded):
    place = tmp_path_factory.mktemp("index") / "index.npz"
    wanted = vectors_of(checkpoint, folder, place)
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["vision.class_token"] = state["model"]["vision.class_token"] + 1e-3
    other = place.with_name("other.pt")
    torch.save(state, other)
    encoded.clear()
    assert not torch.equal(vectors_of(other, folder, place)["0.png"], wanted["0.png"]) and len(encoded) == 5
    vectors_of(checkpoint, folder, place)
    whole, draw = place.read_bytes(), random.Random(0)
    for i in range(12):
        raw = bytearray(whole)
        for _ in range(30):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        place.write_bytes(raw[:draw.randrange(len(raw))] if i % 2 else raw)
        found = vectors_of(checkpoint, folder, place)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted), i
    assert not list(place.parent.glob("*.tmp"))


def test_ctrl_c_keeps_what_is_encoded(checkpoint, folder, tmp_path_factory, monkeypatch, encoded):
    place = tmp_path_factory.mktemp("index") / "index.npz"
    read = search.read_picture

    def interrupted(picture, size):
        if picture.name.endswith("3.png"):
            raise KeyboardInterrupt
        return read(picture, size)
    monkeypatch.setattr(evaluate, "BATCH", 2)
    monkeypatch.setattr(search, "read_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vectors_of(checkpoint, folder, place)
    monkeypatch.setattr(search, "read_picture", read)
    encoded.clear()
    assert len(vectors_of(checkpoint, folder, place)) == 4 and sorted(encoded) == ["2.png", "3.png", "broken.png"]


def test_features_are_the_names_and_the_unit_vectors_that_rank(checkpoint, folder, capsys):
    assert search.main(f"--ckpt {checkpoint} --images {folder} --features {folder}/f.npz --cache {folder}/cache".split()) == 0
    assert search.main(f"--ckpt {checkpoint} --images {folder} --cache {folder}/cache --html {folder}/g.html dog".split()) == 0
    printed = re.findall(r"^ +\d +(-?[\d.]+)  (.*)$", capsys.readouterr().out, re.M)
    model, tokenizer, _ = evaluate.load(checkpoint)
    with np.load(folder / "f.npz") as features, torch.inference_mode():
        names, vectors = features["names"].tolist(), torch.from_numpy(features["vectors"])
        texts, _ = evaluate.encode_texts(model, tokenizer, ["dog"])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4))
    naive = sorted(zip((vectors @ texts.vectors[0]).tolist(), names), reverse=True)
    assert [(f"{cosine:.3f}", name) for cosine, name in naive] == printed


# The page

@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "pictures"
    folder.mkdir()
    return fuzz_search.tiny_library(folder)


@pytest.fixture
def port(library):
    with fuzz_search.running(library) as port:
        yield port


def test_the_page_ranks_as_the_command_and_works_without_a_script(library, port):
    status, head, body = fuzz_search.get(port, "/?q=" + urllib.parse.quote("<b>собака</b>"))
    page, hits = body.decode(), library.best(["<b>собака</b>"], 24)[0]
    assert status == 200 and "<b>" not in page and "&lt;b&gt;собака" in page
    assert re.findall(r'src="/picture/(\d)"', page) == [str(number) for _, number in hits]
    assert re.findall(r"<figcaption>\d\.png (-?[\d.]+)", page) == [f"{cosine:.3f}" for cosine, _ in hits]
    assert '<form action="/"><input name="q"' in page and all('alt=""' not in tag for tag in re.findall("<img[^>]*", page))
    for target in re.findall(r'(?:src|href)="(/[^"]+)"', page):
        status, head, body = fuzz_search.get(port, target.replace("&amp;", "&"))
        assert status == 200 and ("text/html" in head or body.startswith(b"\xff\xd8\xff")), target
    like = fuzz_search.get(port, "/like/3")[2].decode()
    assert re.findall(r'src="/picture/(\d)"', like)[0] == "3" and "3.png 1.000" in like
    for what in ("cosine", "attention"):
        status, head, body = fuzz_search.get(port, f"/{what}/3?q=dog")
        assert status == 200 and "image/jpeg" in head and body != fuzz_search.get(port, "/picture/3")[2]


def test_the_page_answers_to_this_computer_alone_and_only_reads(port):
    secure = fuzz_search.get(port, "/")[1]
    assert "default-src 'self'" in secure and "Cross-Origin-Resource-Policy: same-origin" in secure
    assert fuzz_search.get(port, "/", f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", f"127.0.0.1.evil.example:{port}"):
        assert fuzz_search.get(port, "/picture/0", host)[0] == 403
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        assert b" 501 " in fuzz_search.ask(port, f"{method} / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    assert fuzz_search.get(port, "/?q=" + "a" * 1000)[0] == 200 and fuzz_search.get(port, "/?q=" + "a" * 1001)[0] == 414
    assert fuzz_search.get(port, "/cosine/0")[0] == 400 and fuzz_search.get(port, "/picture/6")[0] == 404
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), 1):
        pass


def test_a_picture_that_is_gone_is_a_line_and_the_page_lives(library, port, capfd):
    lost = pathlib.Path(library.pictures[5].name)
    raw = lost.read_bytes()
    lost.unlink()
    status, _, body = fuzz_search.get(port, "/picture/5")
    lost.write_bytes(raw)
    assert status == 404 and b"can no longer be read" in body and capfd.readouterr().err == ""
    assert fuzz_search.get(port, "/picture/5")[0] == 200


def test_200_bad_requests_read_nothing_else_write_nothing_and_end_nothing(library):
    counts, wrong = fuzz_search.fuzz(library, os.path.dirname(library.pictures[0].name), range(200))
    assert not wrong and counts["refused"] > 90


def test_a_taken_port_is_one_line_before_the_work(checkpoint, folder, capsys):
    with serve.open_server(0) as server:
        assert search.main(f"--ckpt {checkpoint} --images {folder} --serve {server.server_port}".split()) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: --serve {server.server_port}:") and line.count("\n") == 1
    assert not (folder.parent / f".{folder.name}.vectors.npz").exists()


# Maps

def test_the_cosine_is_the_sum_of_its_parts(library):
    image = library.image(0, 64)
    P = 5                                                                    # 2 x 2 patches, and row 0
    with torch.inference_mode():
        states = next(evaluate.image_batches(library.model, [image])).states.float()
        text = evaluate.encode_texts(library.model, library.tokenizer, ["a dog"])[0].vectors[0]
        vector = library.model.vision_proj(states.mean(0))
        parts = [float(library.model.vision_proj(states[p]) @ text / P / vector.norm()) for p in range(P)]
    cosine = next(cosine for cosine, number in library.best(["a dog"], 6)[0] if number == 0)
    assert sum(parts) == pytest.approx(cosine, abs=1e-2)                     # 16 bits on some CPUs
    found = evaluate.cosine_map(library.model, library.tokenizer, image, "a dog")
    assert found.flatten().tolist() == pytest.approx(parts[1:], abs=1e-2)


def test_the_attention_map_is_what_the_log_odds_lose_with_a_patch(tokenizer, monkeypatch):
    """To first order: each patch's part of what the first token reads is made a little smaller, one after the other."""
    monkeypatch.setattr("model.training_dtype", lambda device: (torch.float32, "tests compare"))
    torch.manual_seed(0)
    model = CCLM(dataclasses.replace(PRESETS["demo"], vocabulary=tokenizer.size, width=32, embedding=16, image_size=32,
                                     init_std=0.2, fusion_layers=2)).eval()
    torch.nn.init.normal_(model.itm_head[-1].weight)
    image, cross = emoji.split("val")[0]["image"], model.fusion.layers[-1].cross
    found = evaluate.attention_map(model, tokenizer, image, "a dog")
    token_ids, starts = data.pack([tokenizer.encode("a dog")])
    a = model.encode_image(images.normalise(torch.from_numpy(images.eval_transform(image, 32).copy())[None]), None)
    b, zero, less = model.encode_text(token_ids, starts, None), torch.zeros(1, dtype=torch.long), 1e-2

    def log_odds(patch):
        def smaller(module, given, out):
            q, k, v = (linear(x).unflatten(1, (cross.heads, -1)) for linear, x in (
                (cross.q, given[0]), (cross.k, given[1]), (cross.v, given[1])))
            weights = torch.einsum("thd,phd->thp", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
            weights[:, :, patch] *= 1 - less
            return cross.out(torch.einsum("thp,phd->thd", weights, v).flatten(1))
        handle = cross.register_forward_hook(smaller) if patch is not None else contextlib.nullcontext()
        with handle, torch.no_grad():
            no, yes = model.itm_head(model.fuse(b, a, zero, zero, zero))[0].double().tolist()
        return yes - no

    loss = torch.tensor([(log_odds(None) - log_odds(patch)) / less for patch in range(1, 5)])
    torch.testing.assert_close(found.flatten(), loss.float(), rtol=0.05, atol=0.02 * float(loss.abs().max()))
    assert not cross._forward_pre_hooks and not cross.out._forward_pre_hooks


def test_an_imported_official_checkpoint_searches_and_shows_its_maps(folder, tokenizer, tmp_path_factory, capsys):
    """Its names and shapes, with random numbers: BEiT-2, six fusion layers."""
    place = tmp_path_factory.mktemp("official")
    torch.manual_seed(0)
    tensors = {name: tensor for name, tensor in random_tensors(x2vlm(64, 1, tokenizer.size)).items() if "decoder.bias" not in name}
    torch.save({"model": tensors}, place / "cclm_x2vlm.th")
    (place / "sentencepiece.bpe.model").write_bytes(tokenizer.model)
    assert weights.main(["import", str(place / "cclm_x2vlm.th"), "--out", str(place / "ckpt.pt")]) == 0
    assert search.main(f"--ckpt {place}/ckpt.pt --images {folder} --cache {place} --html {place}/g.html dog".split()) == 0
    assert capsys.readouterr().out.count(".png\n") == 4
    model, words, _ = evaluate.load(place / "ckpt.pt")
    pictures = search.find_pictures(folder)[:1]
    library = search.Library(model, words, pictures, torch.ones(1, 256))
    for kind in ("cosine", "attention"):
        assert getattr(evaluate, f"{kind}_map")(model, words, library.image(0, 64), "dog").shape == (14, 14)
        assert library.map(kind, 0, "dog", 800).size == (64, 64)


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
