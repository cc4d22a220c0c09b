"""Files as people really have them: what lies at the edges of the formats is read, refused or told, never guessed."""
import base64
import json
import os
import subprocess
import sys
import tarfile

import pytest
import samples
from conftest import ROOT
from PIL import Image

import data
from formats import records
from formats import sources
from formats import images


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


def test_half_a_surrogate_pair_is_one_bad_record(tmp_path, capsys):
    rows = [image_row(caption) for caption in ("x", {"en": "\ud800"}, {"\ud800": "x"}, {"\ud800": ""})]
    rows.append({"image": "\ud800.jpg", "caption": "x"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert data.main([str(tmp_path / "a.jsonl")]) == 1
    said = capsys.readouterr().out
    assert "broken           4 records" in said and all(f"line {i}: " in said for i in (2, 3, 4, 5))


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
    assert len(data.pair_files([f"{tmp_path}/*.tsv"], ["de", "en"])) == 3      # one of the two languages is no pair
    with pytest.raises(ValueError, match="no record in bn de"):
        data.pair_files([f"{tmp_path}/*.tsv"], ["bn", "de"])


def test_broken_records_stay_in_a_language_filter_and_filters_do_not_mix(tmp_path):
    rows = [{"image": "x.jpg", "caption": {k: k}} for k in ("en", "de", "de")] + [{"image": "x.jpg"}]
    path = samples.lines(tmp_path / "a.jsonl", rows)
    assert [len(data.image_files([path], 32, k)) for k in (["en"], ["de"], ["en"])] == [2, 3, 2]


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
    assert list(data.pair_files([f"{tmp_path}/a.TSV@de,en"]).readers[0].record(0)[1]) == ["de", "en"]
    with pytest.raises(ValueError, match="name its two languages"):
        data.pair_files([f"{tmp_path}/a.TSV@{names}"])


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


def test_a_record_too_long_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LARGEST", 100)
    first, second = texts_or_reasons(table(tmp_path / "a.tsv", f"x\t{'y' * 97}\nx\t{'y' * 98}\n"))
    assert isinstance(first, dict) and "longer than 100" in second
    (tmp_path / "x.jpg").write_bytes(samples.jpeg(0))
    path = samples.lines(tmp_path / "a.jsonl", [{"image": "x.jpg", "caption": "x"}])
    assert "longer than 100" in texts_or_reasons(records.ImageLines(path))[0]


def test_a_file_that_changed_but_not_in_size_is_noticed(tmp_path):
    reader = table(tmp_path / "a.tsv", "aa\tb\n")
    (tmp_path / "a.tsv").write_text("a\tbb\n")
    os.utime(tmp_path / "a.tsv", ns=(1, 1))
    assert "changed since" in texts_or_reasons(reader)[0]


def test_an_index_of_another_version_is_made_again(tmp_path):
    table(tmp_path / "a.tsv", "a\tb\n" * 5)
    index = tmp_path / ".a.tsv.index"
    index.write_bytes(bytes(8) + index.read_bytes()[8:24] + (1).to_bytes(8, "little") + bytes(8))
    assert len(records.Columns(str(tmp_path / "a.tsv"))) == 5


def test_sixteen_bits_of_grey_are_scaled(tmp_path):
    Image.new("I;16", (1, 1), 1 << 15).save(tmp_path / "x.png")
    for image in (Image.open(tmp_path / "x.png"), images.open_image(tmp_path / "x.png")):
        assert images.rgb(image).getpixel((0, 0)) == (128, 128, 128)


def test_line_breaks_in_base64_are_none(tmp_path):
    row = image_row("x") | {"image": base64.encodebytes(samples.jpeg(0)).decode()}
    assert records.ImageLines(samples.lines(tmp_path / "a.jsonl", [row])).record(0)[0] == samples.jpeg(0)
