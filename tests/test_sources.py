"""Layouts as people have them: read, or named for what they are; and what a dataset says of itself."""
import json
import os
import tarfile

import numpy as np
import pytest
import samples
from PIL import Image

import data
import evaluate
from formats import records, sources


def tar(path, names):
    """A tar of members with these names: pictures, captions "en: NAME" in JSON, or the name as text."""
    with tarfile.open(path, "w") as file:
        for name in names:
            body = {"g": samples.jpeg(0), "n": json.dumps({"caption": name}).encode(), "t": name.encode()}[name[-1].lower()]
            samples.add(file, name, body)
    return records.Tar(str(path))


def found(reader):
    """{where: captions, or why it is bad}."""
    result = {}
    for i in range(len(reader)):
        try:
            with records.reading(reader, i):
                result[reader.where(i)] = reader.record(i)[1]
        except records.BadRecord as error:
            result[reader.where(i)] = str(error)
    return result


def test_a_key_ends_at_the_last_known_suffix_and_a_member_alone_is_reported(tmp_path):
    names = ["2019.01.02.JPG", "2019.01.02.txt", "b.c.d.jpg", "b.c.d.json", "b.c.jpg", "b.c.json", "e.jpg", "f.txt",
             "._h.jpg", "i.v2.webp.png", "i.v2.webp.txt"]
    path = tmp_path / "a.tar"
    reader = tar(path, names)
    result = {where.removeprefix(f"{path} KEY "): said for where, said in found(reader).items()}
    assert sorted(result) == ["2019.01.02", "b.c", "b.c.d", "e", "f", "i.v2.webp"]
    assert result["b.c"] == {"unknown": ["b.c.json"]} and result["b.c.d"] == {"unknown": ["b.c.d.json"]}
    assert result["e"] == f"{path} KEY e: no caption next to it: KEY.json or KEY.txt"
    assert result["f"].startswith(f"{path} KEY f: no image next to it")


def test_the_key_of_a_long_name_is_named_in_full(tmp_path):
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        reader = records.Tar(samples.write_tar(tmp_path / f"{form}.tar", 1, form=form, long="ü" * 60 + "/" + "x" * 90))
        assert reader.where(0).endswith(" KEY " + "ü" * 60 + "/" + "x" * 90 + "000000")


@pytest.mark.parametrize("body", [{}, {"caption": None}, {"url": "x", "key": "0"}])
def test_json_without_a_caption_does_not_hide_the_text(tmp_path, body):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for suffix, raw in (("jpg", samples.jpeg(0)), ("json", json.dumps(body).encode()), ("txt", b"a dog")):
            samples.add(file, f"0.{suffix}", raw)
            (tmp_path / f"0.{suffix}").write_bytes(raw)
    assert records.Tar(f"{tmp_path}/a.tar", ("en",)).record(0)[1] == {"en": ["a dog"]}
    os.remove(tmp_path / "a.tar")
    assert data.files(data.ImageFiles, [f"{tmp_path}@en"], 32).row(0)["captions"] == {"en": ["a dog"]}


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def captions(*arguments, **settings):
    dataset = data.files(data.ImageFiles, list(map(str, arguments)), 32, *settings.values())
    assert all(isinstance(dataset.row(i)["image"](), Image.Image) for i in range(len(dataset)))
    return [dataset.row(i)["captions"] for i in range(len(dataset))]


def test_a_folder_of_pictures_is_read_also_nested(tmp_path):
    """As img2dataset writes files: folders with KEY.jpg, KEY.txt, KEY.json, and sidecars above."""
    write(tmp_path, {"00000/0.jpg": samples.jpeg(0), "00000/0.txt": "text", "00000/0.json": '{"caption": "json"}',
                     "00000.parquet": b"PAR1", "00000_stats.json": "{}", "00001/1.a.png": samples.jpeg(1),
                     "00001/1.a.txt": "dotted", "00002/2.jpg": samples.jpeg(2), "00002/2.de.txt": "zwei",
                     "00002/2.en.txt": "two\n", "00002/README.md": "no", "00002/.2.jpg": b"no"})
    assert captions(tmp_path) == [{"unknown": ["json"]}, {"unknown": ["dotted"]}, {"de": ["zwei"], "en": ["two"]}]
    dataset = data.files(data.ImageFiles, [f"{tmp_path}"], 32, ["de"])
    assert len(dataset) == 1 and dataset.languages() == ["de"]
    write(tmp_path, {"00002/3.jpg": samples.jpeg(3)})
    assert data.main([str(tmp_path)]) == 1                                   # a picture without a caption


def test_a_folder_of_pictures_stays_one_when_a_picture_is_lost(tmp_path):
    write(tmp_path, {f"{i}.json": '{"caption": "x"}' for i in range(3)} | {"0.jpg": samples.jpeg(0), "1.jpg": samples.jpeg(1)})
    assert captions(tmp_path) == [{"unknown": ["x"]}] * 2                    # 2.json alone is no file of JSON lines


def test_img2datasets_folder_of_tars_is_read_as_it_is(tmp_path):
    samples.write_tar(tmp_path / "00000.tar", 2)
    write(tmp_path, {"00000_stats.json": "{}", "00000.parquet": b"PAR1", "wandb.log": ""})
    for argument in (tmp_path, f"{tmp_path}/0*"):
        assert [list(row) for row in captions(argument)] == [samples.LANGUAGES] * 2


def test_braces_are_those_of_a_shell(tmp_path):
    write(tmp_path, {f"{k}/{i:03}.tsv": "a\tb\n" for k in (1, 2) for i in range(8, 12)} | {"{1..2}.tsv": "a\tb\n"})
    for pattern in ("{1..2}/{008..010}.tsv", "{2..1}/{010..008}.tsv"):
        names = [os.path.relpath(file, tmp_path) for file in sources.parse(f"{tmp_path}/{pattern}").files]
        assert names == [f"{k}/{i}.tsv" for k in "12" for i in ("008", "009", "010")]
    assert sources.parse(f"{tmp_path}/{{1..2}}.tsv").files == [f"{tmp_path}/{{1..2}}.tsv"]      # a file of that name
    with pytest.raises(ValueError, match="1/012.tsv: no such file"):
        sources.parse(f"{tmp_path}/1/{{010..012}}.tsv")


def test_rows_as_hugging_face_has_them(tmp_path):
    write(tmp_path, {"x.jpg": samples.jpeg(0), "metadata.jsonl": '{"file_name": "x.jpg", "text": "a dog", "lang": "en"}\n'})
    assert captions(tmp_path) == [{"en": ["a dog"]}]                         # the picture's row, not the picture alone
    write(tmp_path, {"b.jsonl": '{"translation": {"en": "one", "de": "eins"}}\n'})
    assert data.files(data.PairFiles, [str(tmp_path / "b.jsonl")]).readers[0].texts(0) == {"en": ["one"], "de": ["eins"]}


def test_a_picture_that_is_gone_is_one_broken_record_of_its_folder(tmp_path, capsys):
    write(tmp_path, {"0.jpg": samples.jpeg(0), "0.txt": "a", "1.txt": "b"})
    (tmp_path / "1.jpg").symlink_to("gone")
    assert data.main([str(tmp_path)]) == 1 and "1.jpg: no such image" in " ".join(capsys.readouterr().out.split())


def test_a_sentence_may_begin_with_a_bracket(tmp_path):
    write(tmp_path, {"a.de-en.tsv": "[Beifall]\t[Applause]\n"})
    reader = data.files(data.PairFiles, [f"{tmp_path}/a.de-en.tsv"]).readers[0]
    assert reader.texts(0) == {"de": ["[Beifall]"], "en": ["[Applause]"]}


def test_equal_pairs_have_one_id_in_any_layout(tmp_path):
    write(tmp_path, {"a.de-en.tsv": "eins\tone\n", "b.jsonl": '{"text": {"en": "one", "de": "eins"}}\n'
                     '{"translation": {"de": "eins", "en": "one"}}\n', "c.de": "eins\n", "c.en": "one\n"})
    dataset = data.files(data.PairFiles, [f"{tmp_path}/{name}" for name in ("a.de-en.tsv", "b.jsonl", "c.*")])
    assert len({dataset[i, data.generator(i)][2] for i in range(4)}) == 1 and len(dataset) == 4


def test_one_broken_line_is_no_data_in_the_languages_that_are_wanted(tmp_path):
    write(tmp_path, {"W.bn-en.tsv": "one\ttwo\nbroken\n", "a.jsonl": '{"text": {"bn": "x", "en": "y"}}\n{}\n'})
    for name in ("W.bn-en.tsv", "a.jsonl"):
        with pytest.raises(ValueError, match="no record in two of bn de, but in bn en"):
            data.files(data.PairFiles, [f"{tmp_path}/{name}"], ["bn", "de"])


def test_only_files_of_one_name_whose_suffixes_are_languages_become_one_source(tmp_path):
    write(tmp_path, {f"a.{suffix}": "x\ty\n" for suffix in ("en", "de", "tsv")} | {"a.tar": bytes(1024)})
    given = [f"{tmp_path}/a.{suffix}" for suffix in ("tar", "tsv", "en", "de")]
    assert [len(source.files) for source in sources.parse_all(given)] == [1, 1, 2]


def test_each_source_has_its_own_folder_of_images(tmp_path):
    for name in ("a", "b"):
        write(tmp_path, {f"{name}/0.jpg": samples.jpeg(ord(name)), f"{name}.jsonl": '{"image": "0.jpg", "caption": "x"}\n'})
    given = [f"{tmp_path}/{name}.jsonl:{tmp_path}/{name}@en" for name in "ab"]
    dataset = data.files(data.ImageFiles, given, 32)
    assert [dataset.readers[i].record(0) for i in (0, 1)] == [(samples.jpeg(ord(k)), {"en": ["x"]}) for k in "ab"]
    write(tmp_path, {"c.jsonl": json.dumps({"image": str(tmp_path / "a/0.jpg"), "caption": "x"}) + "\n"})
    (tmp_path / "d").mkdir()
    assert "/ allows every absolute path" in str(found(records.ImageLines(f"{tmp_path}/c.jsonl", root=f"{tmp_path}/d")))
    assert records.ImageLines(f"{tmp_path}/c.jsonl", root="/").record(0)[0] == samples.jpeg(ord("a"))


def test_a_suffix_that_is_no_language_is_left_out_by_name(tmp_path, capsys):
    write(tmp_path, {f"O.de-en.{suffix}": "x\ny\n" for suffix in ("de", "en", "ids", "xyz")} | {"README.md": "no"})
    for pattern, left in (("O.*", ["O.de-en.ids", "O.de-en.xyz"]), ("*", ["O.de-en.ids", "O.de-en.xyz", "README.md"])):
        dataset = data.files(data.PairFiles, [f"{tmp_path}/{pattern}"])
        line = capsys.readouterr().err
        assert dataset.languages() == ["de", "en"] and line.count("\n") == 1 and all(name in line for name in left)
    write(tmp_path, {f"my-set.{suffix}": "x\n" for suffix in ("zh_Hans", "pt-BR", "ceb", "csv")})
    assert data.files(data.PairFiles, [f"{tmp_path}/my-set.*"]).languages() == ["ceb", "pt-BR", "zh_Hans"]


def test_the_score_of_three_columns_is_the_first(tmp_path):
    rows = [("1.07", "ja", "yes"), ("-5e-1", "7", "seven"), ("zwei", "two", "0.3")]
    write(tmp_path, {"a.tsv": "".join("\t".join(row) + "\n" for row in rows)})
    reader = records.Columns(str(tmp_path / "a.tsv"), ("de", "en"))
    assert [reader.texts(i) for i in (0, 1)] == [{"de": ["ja"], "en": ["yes"]}, {"de": ["7"], "en": ["seven"]}]
    assert "of three columns the first is a score, not 'zwei'" in list(found(reader).values())[2]


def test_languages_are_found_in_few_records_and_a_rare_one_when_it_is_asked_for(tmp_path):
    rows = [{"text": {"en": f"{i}", "de": f"{i}"} | ({"sw": "moja"} if i == 2_347 else {})} for i in range(5_000)]
    dataset = data.files(data.PairFiles, [samples.lines(tmp_path / "a.jsonl", rows)])
    assert dataset.languages() == ["de", "en"]
    asked = data.files(data.PairFiles, [str(tmp_path / "a.jsonl")], ["sw", "en", "xx"])
    assert asked.languages() == ["en", "sw"] and len(asked) == 1
    assert data.HeldOut(dataset, 5).languages() == ["de", "en"]
    assert data.DemoImages().languages() == ["cs", "de", "en", "fr", "ja", "zh"] and len(data.DemoParallel().languages()) == 21
    assert data.Mixture([dataset, data.DemoImages()], [1, 1]).languages() == ["cs", "de", "en", "fr", "ja", "zh"]


@pytest.mark.parametrize("share", [0, 0.01, 0.05, 1])
def test_as_large_a_share_of_bad_records_as_one_says_is_tolerated(share):
    bad_records = sources.BadRecords(0, share)
    stops = [bad_records.count(["bad"])[1] for _ in range(1_000)]
    assert stops.count(False) == 1_000 * share and f"more than {round(1000 * share)} of" in bad_records.message()


def test_a_stream_that_tolerates_more_looks_further_for_a_good_record(tmp_path, tokenizer):
    rows = [{"text": {"en": "one", "de": "eins"}}] + [{"text": {"en": "one"}}] * 30
    dataset = data.files(data.PairFiles, [samples.lines(tmp_path / "a.jsonl", rows)])
    for share, read in ((0.01, 11), (0.05, 30)):
        batches, bad = data.Batches(tokenizer, None, data.Stream(dataset, 1, max_bad=share), 0), []
        batches.last_good[1] = 0, 0, 0
        batches.read_or_replace((1, 0, 1), bad)
        assert len(list(filter(None, bad))) == read


def test_a_line_for_every_caption_of_a_picture_is_one_picture_to_evaluate_and_to_hold_out(tmp_path):
    write(tmp_path, {f"{k}.jpg": samples.jpeg(k) for k in range(8)})
    rows = [{"image": f"{i % 8}.jpg", "caption": [{"text": f"word {i}", "lang": "en"}]} for i in range(40)]
    path = samples.lines(tmp_path / "a.jsonl", rows)
    found = evaluate.evaluation_set([path])
    assert [row["captions"] for row in found] == [{"en": [f"word {i}" for i in range(k, 40, 8)]} for k in range(8)]

    dataset = data.files(data.ImageFiles, [path], 32)
    held = data.HeldOut(dataset, 5)                              # records 7, 15 ...: all of picture 7
    numbers = {int(text.split()[1]) % 8 for _, text, _ in (held[i, np.random.default_rng(0)] for i in range(len(held)))}
    assert numbers == set(range(7)) and [row["captions"]["en"] for row in held.rows()] == [[f"word {i}" for i in range(7, 40, 8)]]
    with pytest.raises(ValueError, match="leaves no picture to train on"):
        data.HeldOut(data.files(data.ImageFiles, [samples.lines(tmp_path / "b.jsonl", rows[::8])], 32), 2)


def test_names_and_shapes_that_people_have(tmp_path, capsys):
    write(tmp_path, {"p/1.JPG": samples.jpeg(1), "p/1.TXT": "one", "p/2.png": samples.jpeg(2), "p/2.json": '{"caption": "two"}',
                     "p/3.jpg": samples.jpeg(3), "p/3.de.TXT": "drei", "p/labels.tsv": "a\tb\n"})
    reader, = sources.open_readers(sources.parse(f"{tmp_path}/p"))
    assert [reader.texts(i) for i in range(3)] == [{"unknown": ["one"]}, {"unknown": ["two"]}, {"de": ["drei"]}]
    assert "left out: " in capsys.readouterr().err
    write(tmp_path, {"t.de.txt": "eins\n", "t.en.txt": "one\n", "k.jsonl": json.dumps(
        {"filename": "p/1.JPG", "sentences": [{"raw": "a dog", "tokens": ["a", "dog"], "imgid": 1}]})})
    assert data.files(data.PairFiles, [f"{tmp_path}/t.de.txt", f"{tmp_path}/t.en.txt"]).languages() == ["de", "en"]
    assert sources.open_readers(sources.parse(f"{tmp_path}/k.jsonl@en"), "images")[0].texts(0) == {"en": ["a dog"]}
    for name, pair in (("train-de-en.tsv", ("de", "en")), ("x.de-zh_Hans.tsv", ("de", "zh_Hans")), ("en-en.tsv", ())):
        assert records.languages_of_name(name) == pair
    write(tmp_path, {"u.jsonl": '{"image": "http://a.b/1.jpg", "caption": "a"}', "w.tsv": "a\tb"})
    assert "download it first" in list(found(records.ImageLines(f"{tmp_path}/u.jsonl")).values())[0]
    (tmp_path / "w.tsv").write_text("a\tb\n", "utf-16")
    with pytest.raises(ValueError, match="UTF-16"):
        records.Columns(f"{tmp_path}/w.tsv")
