"""Readers by offset give what a naive parse of the whole file gives, for every format; the index follows the file."""
import base64
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
import samples
from campaigns import bench_data
from conftest import ROOT
from PIL import Image

import data
from formats import images, records, sources


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
    ([{"en": "a", "de": "b"}, {"en": "c"}], (), {"en": ["a", "c"], "de": ["b"]}), ({"en": "a", "de": None}, (), {"en": ["a"]}),
    ([{"text": "a", "lang": "de"}, {"raw": "b", "tokens": ["b"]}], ("en",), {"de": ["a"], "en": ["b"]}),
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
    source = data.files(data.PairFiles, [str(folder / f"train.{k}") for k in ("en", "de", "fr", "cs", "zh")])
    assert source.readers[0].record(5)[1] == {k: [samples.PHRASES[k].format(5)] for k in ("en", "de", "fr", "cs", "zh")}
    (folder / "train.fr").write_text("one line\n")
    with pytest.raises(ValueError, match="fr has 1 lines"):
        data.files(data.PairFiles, [str(folder / "train.*")])


def test_the_index_is_made_once_and_again_when_the_file_changed(tmp_path):
    path, cache, index = tmp_path / "a.tsv", tmp_path / "cache", tmp_path / ".a.tsv.index"
    path.write_text("a\tb\n" * 5)

    def opened(lines):
        """Opens the file -> a mark of its index, that another index would not have."""
        assert len(records.Columns(str(path))) == lines
        return index.stat().st_ino, index.stat().st_mtime_ns

    first = opened(5)
    assert opened(5) == first
    assert len(records.Columns(str(path), cache=str(cache))) == 5 and len(list(cache.iterdir())) == 1
    with open(path, "a") as file:
        file.write("c\td\n")
    second = opened(6)
    os.utime(path, ns=(1, 1))                                                # same size, another time
    third = opened(6)
    index.write_bytes(index.read_bytes()[:-8])                               # a cut index is no index
    fourth = opened(6)
    raw = index.read_bytes()
    index.write_bytes(raw[:-24] + bytes(8) + raw[-16:])                      # nor is one of another version
    assert len({first, second, third, fourth, opened(6)}) == 5


def test_a_name_that_is_not_utf8_has_an_index_in_the_cache_too(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/m\xfcnchen.tsv")
    with open(path, "w") as file:
        file.write("a\tb\n")
    assert len(records.Columns(path)) == len(records.Columns(path, cache=str(tmp_path / "cache"))) == 1


def test_two_processes_that_index_at_once_both_read_a_whole_index(tmp_path):
    path = bench_data.write_pairs(tmp_path / "a.tsv", 0, 300_000)
    code = f"from formats import records; print(len(records.Columns({str(path)!r})))"
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    assert [int(run.communicate()[0]) for run in runs] == [300_000] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.tsv.index", "a.tsv"]


def test_more_shards_than_a_process_may_open_files(tmp_path):
    for i in range(100):
        (tmp_path / f"{i:03}.tsv").write_text(f"a{i}\tb\n")
    code = (f"import resource, data; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\n"
            f"source = data.files(data.PairFiles, [{str(tmp_path)!r}])\n"
            f"print(sum('a' + str(i) in source[i, data.generator(i)] for i in range(100)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "100\n", done.stderr


def test_a_file_that_changes_under_a_reader_gives_bad_records_not_wrong_ones(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("a\tb\n" * 5)
    reader = records.Columns(str(path))
    path.write_text("longer\tb\n" * 5)
    with pytest.raises(ValueError, match="changed since"):
        reader.record(0)
    path.write_text("aa\tb\n")
    reader = records.Columns(str(path))
    path.write_text("a\tbb\n")                                              # as long as before
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="changed since"):
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


def test_a_link_in_a_tar_is_no_image_and_nothing_outside_the_archive_is_read(tmp_path):
    (tmp_path / "up.jpg").write_bytes(samples.jpeg(9))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("0.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "up.jpg"
        tar.addfile(link)
        samples.add(tar, "0.txt", b"a link")
        samples.add(tar, "../up.jpg", samples.jpeg(1))
        samples.add(tar, "../up.txt", b"a name")
    reader = records.Tar(str(tmp_path / "a.tar"))
    assert "is a link" in reasons(reader)[0] and reader.record(1) == (samples.jpeg(1), {"unknown": ["a name"]})


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
    source = data.files(data.ImageFiles, [path], 32)
    with pytest.raises(records.BadRecord, match="line 1: .*decompression bomb"):
        source[0, data.generator(0)]


def test_an_image_in_any_mode_or_format_becomes_rgb(tmp_path):
    rows = []
    modes = (("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("WEBP", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"))
    for kind, mode in modes:
        out = io.BytesIO()
        Image.new(mode, (50, 40), 9).save(out, kind)
        rows.append({"image": base64.b64encode(out.getvalue()).decode(), "caption": "x"})
    source = data.files(data.ImageFiles, [samples.lines(tmp_path / "a.jsonl", rows)], 32)
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


# --------------------------------------------------------------------------------------------------
# The edges of tar: sizes, names and KEYs that it allows and people make
# --------------------------------------------------------------------------------------------------

def test_a_member_of_whole_blocks_a_key_twice_and_txt_beside_json(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for i, name in enumerate("0112"):
            samples.add(tar, f"{name}.json", json.dumps({"caption": str(i)}).encode().ljust(512))
            samples.add(tar, f"{name}.jpg", samples.jpeg(i) + bytes(-len(samples.jpeg(i)) % 512))
            samples.add(tar, f"{name}.txt", b"not this")
    reader = records.Tar(str(tmp_path / "a.tar"))
    assert len(reader) == 4
    for i in range(4):
        picture, said = reader.record(i)
        assert said == {"unknown": [str(i)]} and picture.startswith(samples.jpeg(i))


def test_a_caption_file_is_read_without_its_mark_and_line_end_also_in_an_archive_in_capitals(tmp_path):
    with tarfile.open(tmp_path / "A.TAR", "w") as tar:
        samples.add(tar, "0.jpg", samples.jpeg(0))
        samples.add(tar, "0.txt", "\ufeffa dog\r\n".encode())
    assert data.files(data.ImageFiles, [f"{tmp_path}/A.TAR@en"], 32).readers[0].record(0)[1] == {"en": ["a dog"]}


def test_a_long_name_whose_member_is_damaged_goes_to_no_other(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("x" * 150 + ".jpg", "1.jpg"):
            samples.add(tar, name, samples.jpeg(1))
        samples.add(tar, "1.txt", b"one")
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    raw[1024:1100] = b"?" * 76                                               # after the header of the name and the name
    (tmp_path / "a.tar").write_bytes(raw)
    reader = records.Tar(str(tmp_path / "a.tar"))
    assert len(reader) == 2 and reader.record(1) == (samples.jpeg(1), {"unknown": ["one"]})


def test_a_size_of_many_gigabytes_is_read_and_one_below_zero_does_not_lead_back(tmp_path):
    def head(name, size):
        made = bytearray(tarfile.TarInfo(name).tobuf())
        made[124:136] = size
        made[148:156] = b"%06o\0 " % (sum(made) - sum(made[148:156]) + 8 * 32)
        return bytes(made)

    (tmp_path / "a.tar").write_bytes(head("0.jpg", b"-0000001000\0") + head("1.jpg", b"\x80" + (9 << 30).to_bytes(11, "big")))
    reader = records.Tar(str(tmp_path / "a.tar"))
    assert [reader.row(i) for i in range(2)] == [[0, 512, -512, *[0] * 4], [512, 1024, 9 << 30, *[0] * 4]]
    assert "header is broken" in reasons(reader)[0] and "longer than" in reasons(reader)[1]


def test_archives_joined_with_cat_and_gits_global_header_are_no_damage(tmp_path):
    parts = [samples.write_tar(tmp_path / f"{i}.tar", 2, first=2 * i) for i in range(2)]
    (tmp_path / "a.tar").write_bytes(b"".join(open(part, "rb").read() for part in parts))
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "a commit"}) as tar:
        samples.add(tar, "0.jpg", samples.jpeg(0))
        samples.add(tar, "0.txt", b"a dog")
    for name, count in (("a.tar", 4), ("b.tar", 1)):
        reader = records.Tar(str(tmp_path / name))
        assert len(reader) == count and reasons(reader) == {}


# --------------------------------------------------------------------------------------------------
# Files as people really have them: read, refused or told, never guessed
# --------------------------------------------------------------------------------------------------

def texts_or_reasons(reader):
    found = []
    for i in range(len(reader)):
        try:
            found.append(reader.record(i)[1])
        except Exception as error:
            found.append(records.reason(error))
    return found


def table(path, text):
    path.write_bytes(text.encode())
    return records.Columns(str(path))


def image_row(caption):
    return {"image": base64.b64encode(samples.jpeg(0)).decode(), "caption": caption}


@pytest.mark.parametrize("end", ["", "\n", "\n\t\n", "\n \n", "\r\n\n\t\t\n"])
def test_a_byte_order_mark_and_blank_lines_at_the_end_are_no_text(tmp_path, end):
    assert texts_or_reasons(table(tmp_path / "a.tsv", "\ufeffx\ty\na\tb" + end)) == [
        {"source": ["x"], "target": ["y"]}, {"source": ["a"], "target": ["b"]}]


def test_half_a_surrogate_pair_is_one_bad_record(tmp_path):
    rows = [image_row(caption) for caption in ({"en": "\ud800"}, {"\ud800": "x"}, {"\ud800": ""})]
    rows.append({"image": "\ud800.jpg", "caption": "x"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = data.files(data.ImageFiles, [str(tmp_path / "a.jsonl")], 32)
    for i in range(4):
        with pytest.raises(records.BadRecord) as error:
            dataset[i, data.generator(i)]
        str(error.value).encode()                                            # can be printed


def test_a_full_disk_leaves_no_index_and_says_so(tmp_path):
    (tmp_path / "a.tsv").write_text("a\tb\n" * 5000)
    code = (f"import resource, signal; from formats import records; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            f"try: records.Columns({str(tmp_path / 'a.tsv')!r})\n"
            f"except ValueError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "cannot be written" in done.stdout and "None" not in done.stdout and done.stderr == ""
    assert [p.name for p in tmp_path.iterdir()] == ["a.tsv"]


def test_languages_skip_whole_files_of_other_languages(tmp_path):
    for k in ("bn", "de"):
        (tmp_path / f"W.{k}-en.tsv").write_text(f"{k}\ten\n" * 3)
    for given in ([f"{tmp_path}/*.tsv"], [f"{tmp_path}/W.bn-en.tsv", f"{tmp_path}/W.de-en.tsv"]):   # as a shell expands it
        assert len(data.files(data.PairFiles, given, ["de", "en"])) == 3     # one of the two languages is no pair
    with pytest.raises(ValueError, match="no record in two of bn de"):
        data.files(data.PairFiles, [f"{tmp_path}/*.tsv"], ["bn", "de"])


def test_broken_records_stay_in_a_language_filter_and_filters_do_not_mix(tmp_path):
    rows = [{"image": "x.jpg", "caption": {k: k}} for k in ("en", "de", "de")] + [{"image": "x.jpg"}]
    path = samples.lines(tmp_path / "a.jsonl", rows)
    assert [len(data.files(data.ImageFiles, [path], 32, k)) for k in (["en"], ["de"], ["en"])] == [2, 3, 2]


def test_a_literal_name_goes_before_a_pattern_and_nothing_is_one_line(tmp_path):
    for name in ("[1].tsv", "1.tsv"):
        (tmp_path / name).write_text("a\tb\n")
    assert sources.parse(f"{tmp_path}/[1].tsv").files == [f"{tmp_path}/[1].tsv"]
    assert data.main([""]) == 2 and data.main([f"{tmp_path}/1.tsv=0"]) == 2


def test_a_folder_is_read_without_what_lies_beside_the_data(tmp_path):
    wanted = ["00000.TAR", "a.jsonl", "b.json", "c.tsv", "part-00000"]
    for name in (*wanted, "00000_stats.json", "00000.parquet", "LICENSE", "_SUCCESS", ".c.tsv.index", "README.md"):
        (tmp_path / name).touch()
    assert [os.path.basename(file) for file in sources.parse(str(tmp_path)).files] == wanted


@pytest.mark.parametrize("names", ["en", "de,en,fr", "de,de"])
def test_parallel_text_has_two_languages(tmp_path, names):
    (tmp_path / "a.TSV").write_text("a\tb\n")
    assert list(data.files(data.PairFiles, [f"{tmp_path}/a.TSV@de,en"]).readers[0].record(0)[1]) == ["de", "en"]
    with pytest.raises(ValueError, match="name its two languages"):
        data.files(data.PairFiles, [f"{tmp_path}/a.TSV@{names}"])


@pytest.mark.parametrize("first", ["", "\n" * 7, "{broken", '{"captions": {"en": "no image"}}'])
def test_a_bad_first_line_does_not_change_what_a_file_is(tmp_path, capsys, first):
    (tmp_path / "a.jsonl").write_text(first + "\n" + json.dumps(image_row("image")) + "\n")
    assert data.main([str(tmp_path / "a.jsonl")]) == 1 and "JPEG 1" in capsys.readouterr().out
    (tmp_path / "b.jsonl").write_text('{"text": {"en": "image", "de": "Bild"}}\n')
    assert data.main([str(tmp_path / "b.jsonl")]) == 0


def test_the_name_of_a_file_of_images_names_no_two_languages(tmp_path):
    path = samples.lines(tmp_path / "my-set.jsonl", [image_row("x")])
    assert records.ImageLines(path).record(0)[1] == {"unknown": ["x"]}


def test_the_doctor_counts_no_format_of_an_image_that_ends_too_early(tmp_path, capsys):
    row = image_row("x") | {"image": base64.b64encode(samples.jpeg(0)[:-300]).decode()}
    assert data.main([samples.lines(tmp_path / "a.jsonl", [image_row("x"), row])]) == 1
    assert "JPEG 1" in capsys.readouterr().out


def test_a_folder_whose_name_begins_alike_is_outside(tmp_path):
    for name in ("data", "data2"):
        (tmp_path / name).mkdir()
    (tmp_path / "data2" / "x.jpg").write_bytes(samples.jpeg(0))
    path = samples.lines(tmp_path / "data" / "a.jsonl", [{"image": "../data2/x.jpg", "caption": "x"}])
    assert "refused" in texts_or_reasons(records.ImageLines(path))[0]


def test_more_records_than_one_flush_and_more_bytes_than_two_blocks(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(20_005):
            samples.add(tar, f"{i}.txt", b"%d" % i)
    reader = records.Tar(str(tmp_path / "a.tar"))
    assert len(reader) == 20_005
    assert all(reader.texts(i) == {"unknown": [str(i)]} for i in (0, 9_999, 10_000, 10_001, 10_002, 20_004))
    rows = "".join(f"{i}\t" + "x" * (1 << 24) + f"\n{i}\ty\n" for i in range(3))
    assert [said["source"] for said in texts_or_reasons(table(tmp_path / "a.tsv", rows))] == [[i] for i in "001122"]


def test_a_record_too_long_is_broken(tmp_path):
    """A quarter of a gigabyte of nothing takes no room on a disk."""
    for name, start in (("a.tsv", b"x\ty\nx\t"), ("x.jpg", b"")):
        with open(tmp_path / name, "wb") as file:
            file.write(start)
            file.truncate(records.LARGEST + 10)
    first, second = texts_or_reasons(records.Columns(str(tmp_path / "a.tsv")))
    assert first == {"source": ["x"], "target": ["y"]} and "is longer than 268,435,456" in second
    path = samples.lines(tmp_path / "a.jsonl", [{"image": "x.jpg", "caption": "x"}])
    assert "longer than 268,435,456" in texts_or_reasons(records.ImageLines(path))[0]


def test_line_breaks_in_base64_are_none(tmp_path):
    row = image_row("x") | {"image": base64.encodebytes(samples.jpeg(0)).decode()}
    assert records.ImageLines(samples.lines(tmp_path / "a.jsonl", [row])).record(0)[0] == samples.jpeg(0)
