"""Readers by offset give what a naive parse of the whole file gives, for every format; the index follows the file."""
import base64
import io
import json
import os
import re
import struct
import tarfile
import zlib

import numpy as np
import pytest
import samples
from PIL import Image

import data
from formats import images, records
from formats import sources


def all_records(reader):
    return [reader.record(i) for i in range(len(reader))]


def reasons(reader):
    """{record number: why it is broken}."""
    found = {}
    for i in range(len(reader)):
        try:
            picture, _ = reader.record(i)
            images.undecoded(picture).load()
        except Exception as error:
            found[i] = records.reason(error)
    return found


@pytest.mark.parametrize("text, form, long", [("json", tarfile.GNU_FORMAT, ""), ("txt", tarfile.USTAR_FORMAT, ""),
                                              ("json", tarfile.PAX_FORMAT, "é" * 60 + "/" + "x" * 90),
                                              ("json", tarfile.GNU_FORMAT, "d" * 80 + "/" + "y" * 90)])
def test_a_tar_reads_as_pythons_tarfile_reads_it(tmp_path, text, form, long):
    path = samples.write_tar(tmp_path / "a.tar", 7, text=text, form=form, long=long)
    assert all_records(records.Tar(path)) == samples.naive_tar(path)


def test_json_lines_read_as_a_full_parse_reads_them(tmp_path):
    samples.official(tmp_path)
    for path in (tmp_path / "cc3m" / "part-00000", tmp_path / "cc3m_path" / "train.jsonl"):
        found, rows = all_records(records.ImageLines(str(path))), samples.naive_lines(path)
        for (picture, said), row in zip(found, rows, strict=True):
            expected = row["caption"][0] if isinstance(row["caption"], list) else row["caption"]
            assert said == {k: [text] for k, text in expected.items()}
            assert picture == (base64.b64decode(row["binary"]) if len(row["binary"]) > 99 else
                               (path.parent / row["binary"]).read_bytes())
    path = tmp_path / "wikimatrix" / "part-00001"
    for (_, said), row in zip(all_records(records.PairLines(str(path))), samples.naive_lines(path), strict=True):
        assert said == {"source": [row["source_text"]], "target": [row["target_text"]]}


@pytest.mark.parametrize("value, names, expected", [
    ({"en": "a"}, (), {"en": ["a"]}), ({"en": ["a", "b"], "de": "c"}, (), {"en": ["a", "b"], "de": ["c"]}),
    ([{"en": "a", "de": "b"}, {"en": "c"}], (), {"en": ["a", "c"], "de": ["b"]}),
    ("plain", ("sw",), {"sw": ["plain"]}), (["one", "two"], (), {"unknown": ["one", "two"]})])
def test_captions_of_every_official_shape(value, names, expected):
    assert records.captions(value, names) == expected


@pytest.mark.parametrize("value", ["", "  ", {}, [], None, 7, {"en": None}, {"en": [""]}, {"en": {"de": "x"}}, [["x"]]])
def test_captions_of_another_shape_are_refused(value):
    with pytest.raises(ValueError):
        records.captions(value, ())


def test_columns_read_as_a_full_parse_reads_them(tmp_path):
    two, three = tmp_path / "opus.tsv", tmp_path / "WikiMatrix.bn-en.tsv"
    two.write_bytes("a quoted \"word\tzwei\r\nthree\tvier 日本\n\n\n".encode())
    three.write_text("".join(f"1.0{i}\tবাক্য {i}\tsentence {i}\n" for i in range(9)), "utf-8")
    assert [list(said.values()) for _, said in all_records(records.Columns(str(two)))] == [
        [[a], [b]] for a, b in samples.naive_tsv(two)[:2]]
    assert [said for _, said in all_records(records.Columns(str(three)))] == [
        {"bn": [a], "en": [b]} for _, a, b in samples.naive_tsv(three)]


def test_plain_text_pairs_line_i_with_line_i_and_refuses_other_lengths(tmp_path):
    folder = samples.multi30k(tmp_path)
    source = data.pair_files([str(folder / f"train.{k}") for k in ("en", "de", "fr", "cs", "zh")])
    assert source.readers[0].record(5)[1] == {k: [samples.PHRASES[k].format(5)] for k in ("en", "de", "fr", "cs", "zh")}
    (folder / "train.fr").write_text("one line\n")
    with pytest.raises(ValueError, match="fr has 1 lines"):
        data.pair_files([str(folder / "train.*")])


def test_the_index_is_made_once_and_again_when_the_file_changed(tmp_path, monkeypatch):
    path, cache = tmp_path / "a.tsv", tmp_path / "cache"
    path.write_text("a\tb\n" * 5)
    made = []
    write = records.write_index
    monkeypatch.setattr(records, "write_index", lambda *x: made.append(1) or write(*x))
    assert len(records.Columns(str(path))) == len(records.Columns(str(path))) == 5 and len(made) == 1
    assert len(records.Columns(str(path), cache=str(cache))) == 5 and len(made) == 2 and len(list(cache.iterdir())) == 1
    with open(path, "a") as file:
        file.write("c\td\n")
    assert len(records.Columns(str(path))) == 6 and len(made) == 3
    os.utime(path, ns=(1, 1))                                                # same size, another time
    assert len(records.Columns(str(path))) == 6 and len(made) == 4
    index = tmp_path / ".a.tsv.index"
    index.write_bytes(index.read_bytes()[:-8])                               # a cut index is no index
    assert len(records.Columns(str(path))) == 6 and len(made) == 5


def test_a_file_that_changes_under_a_reader_gives_bad_records_not_wrong_ones(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("a\tb\n" * 5)
    reader = records.Columns(str(path))
    path.write_text("longer\tb\n" * 5)
    with pytest.raises(OSError, match="changed since"):
        reader.record(0)


def test_a_cut_tar_loses_exactly_the_cut_record(tmp_path):
    path = samples.write_tar(tmp_path / "a.tar", 6)
    with tarfile.open(path) as tar:
        fifth = tar.getmember("000004.jpg")
    whole = open(path, "rb").read()
    for cut in (fifth.offset + 100, fifth.offset_data + 5):                  # in its header, in its data
        open(path, "wb").write(whole[:cut])
        found = reasons(records.Tar(path))
        assert list(found) == [4] and ("ends inside" in found[4]) == (cut > fifth.offset_data)


def test_a_tar_with_a_broken_header_loses_only_that_record(tmp_path):
    path = samples.write_tar(tmp_path / "a.tar", 6)
    with tarfile.open(path) as tar:
        image, text = (tar.getmember(f"000003.{k}") for k in ("jpg", "json"))
    whole = open(path, "rb").read()
    for broken in ([image], [text], [image, text]):
        damaged = bytearray(whole)
        for member in broken:
            damaged[member.offset:member.offset + 80] = os.urandom(80)
        open(path, "wb").write(damaged)
        reader = records.Tar(path)
        assert len(reader) == 6 and list(reasons(reader)) == [3]


@pytest.mark.parametrize("name, kind", [("../up.jpg", tarfile.REGTYPE), ("/etc/up.jpg", tarfile.REGTYPE),
                                        ("a/../../up.jpg", tarfile.REGTYPE), ("up.jpg", tarfile.SYMTYPE)])
def test_a_tar_member_that_leads_outside_is_refused(tmp_path, name, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        samples.add(tar, name, b"" if kind == tarfile.SYMTYPE else samples.jpeg(0), kind)
        samples.add(tar, name.replace("jpg", "txt"), b"a caption")
    assert "refused" in reasons(records.Tar(str(tmp_path / "a.tar")))[0]


def test_an_image_path_that_leads_outside_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.jpg").write_bytes(samples.jpeg(0))
    rows = [{"image": where, "caption": "x"}
            for where in ("../secret.jpg", str(tmp_path / "secret.jpg"), "a/../../secret.jpg")]
    reader = records.ImageLines(samples.lines(tmp_path / "data" / "a.jsonl", rows))
    assert all("refused" in why for why in reasons(reader).values()) and len(reasons(reader)) == 3
    inside = records.ImageLines(samples.lines(tmp_path / "data" / "b.jsonl", rows[1:2]), root=str(tmp_path))
    assert reasons(inside) == {}


def test_a_decompression_bomb_is_refused_by_pillows_own_limit(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    bomb = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))
    path = samples.lines(tmp_path / "a.jsonl", [{"image": base64.b64encode(bomb).decode(), "caption": "boom"}])
    source = data.image_files([path], 32)
    with pytest.raises(records.BadRecord, match="line 1: .*decompression bomb"):
        source[0, data.generator(0)]


def test_an_image_in_any_mode_or_format_becomes_rgb(tmp_path):
    rows = []
    modes = (("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("WEBP", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"))
    for kind, mode in modes:
        out = io.BytesIO()
        Image.new(mode, (50, 40), 9).save(out, kind)
        rows.append({"image": base64.b64encode(out.getvalue()).decode(), "caption": "x"})
    source = data.image_files([samples.lines(tmp_path / "a.jsonl", rows)], 32)
    for image, text, _ in [source[i, data.generator(i)] for i in range(len(rows))]:
        assert image.shape == (3, 32, 32) and image.dtype == np.uint8 and text == "x"


def test_wrong_types_name_what_is_wrong(tmp_path):
    rows = [5, {"caption": "x"}, {"image": 7, "caption": "x"}, {"image": "none.jpg", "caption": "x"},
            {"image": base64.b64encode(samples.jpeg(0)).decode()[:-9] + "!", "caption": "x"},
            {"image": base64.b64encode(samples.jpeg(0)).decode(), "caption": {"en": 3}}]
    path = samples.lines(tmp_path / "a.jsonl", rows)
    with open(path, "a") as file:
        file.write('{"image": \n\n' + json.dumps({"image": base64.b64encode(samples.jpeg(0)).decode(), "caption": "x"}))
    why = reasons(records.ImageLines(path))
    words = ("not a JSON object", "no field image", "of type int", "no such image", "base64|padding|alphabet",
             "of type int", "Expecting value", "Expecting value")
    for i, word in enumerate(words):
        assert re.search(word, why[i]), (i, why[i])
    assert 8 not in why
