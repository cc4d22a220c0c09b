"""The doctor warns of what is wrong with texts and pairs, names its first place, and is silent on good data."""
import contextlib
import io
import os
import random
import re

import pytest
from PIL import Image
import samples
from test_evaluate import make

import data
import evaluate
from demo import emoji
from formats import checks
from formats.sources import open_readers, parse


@pytest.fixture(scope="module")
def scenes():
    """1,600 captions of drawings, line i of each language says the same."""
    draw, ids = random.Random(0), list(emoji.concepts())
    chosen = [draw.sample(ids, draw.randint(2, 4)) for _ in range(1600)]
    languages = emoji.languages("seen") + emoji.languages("text_only") + emoji.languages("never")
    return {k: [emoji.caption(x, k) for x in chosen] for k in languages}


def warnings(capsys, *words, status=0):
    assert data.main([str(word) for word in words]) == status
    found, inside = [], False
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  warning"):
            found.append(line[18:].strip())
            inside = True
        elif inside and line.startswith(" " * 19):
            found[-1] += " " + line.strip()
        else:
            inside = False
    return found


def write(path, texts):
    path.write_text("".join(text + "\n" for text in texts), "utf-8")


def parallel(folder, **texts):
    for k, lines in texts.items():
        write(folder / f"train.{k}", lines)
    return f"{folder}/train.*"


def test_good_data_give_no_warning(tmp_path, capsys, scenes):
    assert warnings(capsys, parallel(tmp_path, **scenes)) == []              # 25 languages
    names = {k: [x["name"][k] for x in emoji.concepts().values()] for k in scenes}
    assert warnings(capsys, parallel(tmp_path, **names)) == []               # a word or two each
    folder = samples.official(tmp_path)
    assert warnings(capsys, samples.multi30k(tmp_path) / "train.*") == []
    assert warnings(capsys, folder / "cc3m", f"{folder}/wikimatrix_en_bn@en,bn") == []
    found = warnings(capsys, folder / "cc3m", f"{folder}/wikimatrix@en,de")
    assert len(found) == 1 and found[0].startswith("48 texts of ")           # both are made from the same patterns


@pytest.mark.parametrize("side, late", [("de", "en"), ("en", "de")])
def test_a_slip_by_one_line_is_named_with_its_place(tmp_path, capsys, scenes, side, late):
    """Line 1,001 of one side is missing: from there on the other is one line late."""
    pair = {k: list(scenes[k]) for k in ("de", "en")}
    pair[side] = pair[side][:1000] + pair[side][1001:] + ["end"]
    found = warnings(capsys, parallel(tmp_path, **pair))
    assert len(found) == 1 and f"pairs lie where {late} seems 1 line(s) late" in found[0]
    assert "600 of 1,600" in found[0] and "train.* line 1001;" in found[0]


def test_shuffled_lines_have_other_lengths_and_numbers(tmp_path, capsys, scenes):
    lines = [f"{text} {i}" for i, text in enumerate(scenes["en"])]
    path = parallel(tmp_path, de=scenes["de"], en=random.Random(1).sample(lines, len(lines)))
    assert any("1,600 of 1,600 pairs lie where lengths do not" in x for x in warnings(capsys, path))
    path = parallel(tmp_path, de=[f"{text} {i}" for i, text in enumerate(scenes["de"])], en=lines[1:] + lines[:1])
    assert any("1,600 of 1,600 pairs with numbers have other numbers" in x for x in warnings(capsys, path))


def test_pairs_that_are_not_translated_or_five_times_as_long(tmp_path, capsys, scenes):
    path = parallel(tmp_path, en=scenes["en"], fr=scenes["en"][:400] + scenes["fr"][400:])
    assert any("400 of 1,600 pairs say the same" in x and "line 1: " in x for x in warnings(capsys, path))
    path = parallel(tmp_path, en=scenes["en"], fr=[x * 9 if i % 9 == 5 else x for i, x in enumerate(scenes["fr"])])
    assert any("five times as long" in x and "line 6" in x for x in warnings(capsys, path))


def test_swapped_records_are_found_by_their_trigrams(tmp_path, capsys, scenes):
    """30 of 800 records have German and French exchanged."""
    rows = [{k: scenes[k][i] for k in ("de", "fr", "en")} for i in range(800)]
    for row in rows[::27]:
        row["de"], row["fr"] = row["fr"], row["de"]
    found = warnings(capsys, samples.lines(tmp_path / "a.jsonl", [{"text": row} for row in rows]))
    assert [x.split()[0] for x in found] == ["de:", "fr:"]
    assert "most like fr" in found[0] and "most like de" in found[1]
    assert all(24 <= int(x.split()[1]) <= 30 for x in found)
    first = [int(x.split("a.jsonl line ")[1].split(":")[0]) for x in found]
    assert all((line - 1) % 27 == 0 for line in first)                       # the worst are among them


def test_codes_that_were_exchanged_in_a_whole_source_are_found_beside_another(tmp_path, capsys, scenes):
    for name, half in (("a.de-fr.tsv", slice(800)), ("b.fr-de.tsv", slice(800, 1600))):
        write(tmp_path / name, map("\t".join, zip(scenes["de"][half], scenes["fr"][half])))
    found = warnings(capsys, tmp_path / "a.de-fr.tsv", tmp_path / "b.fr-de.tsv")
    assert any("de and fr cannot be told apart" in x for x in found)


def test_every_script_is_known_by_its_code(scenes):
    for k, texts in scenes.items():
        for code, wrong in ((k, 0), ("el" if k != "el" else "th", len(texts)), ("xx", 0)):
            found = checks.Checks()
            for text in texts:
                found.text("x", code, text)
            assert found.wrong["script", code] >= 0.95 * wrong and (wrong or not found.wrong["script", code])


@pytest.mark.parametrize("text, words", [
    ("sch\u00f6n".encode().decode("latin-1"), "1 of 40 texts were read in a wrong encoding"),
    ("\u20ac and \u201cso\u201d".encode().decode("cp1252", "replace"), "wrong encoding"),
    ("\u043f\u0440\u0438\u0432\u0435\u0442".encode().decode("latin-1"), "wrong encoding"),
    ("\u7ea2\u8272\u7684\u7403".encode().decode("latin-1"), "wrong encoding"),
    ("a \ufffd b", "wrong encoding"), ("NULL", "missing value"), ("nan", "missing value"), ("None", "missing value")])
def test_a_text_that_is_wrong_is_named(tmp_path, capsys, text, words):
    path = samples.lines(tmp_path / "a.jsonl", [
        {"text": {"en": f"the ball {chr(97 + i % 26)}", "xx": text if i == 6 else f"ball {i}"}} for i in range(40)])
    found = warnings(capsys, path)
    assert len(found) == 1 and words in found[0] and f"{path} line 7: " in found[0]


@pytest.mark.parametrize("text", ["Eine Stra\u00dfe in K\u00f6ln", "N\u00c3O \u00c9 \u00c2NGELO", "caf\u00e9\u201d\u2026 \u00e9\u201d", "\u00d0\u00f3r \u00d1and\u00fa",
                                  "\u043f\u0440\u0438\u0432\u0435\u0442", "20 \u00b0C", "nana", "\u2019tis \u00e0 \u00bb"])
def test_a_text_that_is_right_is_not(text):
    found = checks.Checks()
    found.text("x", "xx", text)
    assert not found.wrong


def test_tables_that_are_read_as_they_stand_are_told(tmp_path, capsys):
    quoted = [f'"ein Ball {i}"\t"a ball {i}"' for i in range(30)]
    scored = [f"{i / 30}\ta ball {i}" for i in range(30)]
    for lines, words in ((["source\ttarget"], "header of a table"), (["cs\ten"], "header of a table"), (quoted, "30 of 30 texts stand in quotes"),
                         (scored, "30 of 30 texts have no letter")):
        write(tmp_path / "a.de-en.tsv", lines)
        assert any(words in x for x in warnings(capsys, tmp_path / "a.de-en.tsv"))


def test_a_language_without_a_name_and_a_name_that_is_no_code():
    found = list(checks.codes_alike(["unknown", "English", "", "zh-Hans", "pt_BR", "ceb"]))
    assert len(found) == 3 and all("no language code" in x or "say FILE@en" in x for x in found)


def test_a_file_with_a_strange_code_that_is_a_line_late_is_told(tmp_path, capsys):
    texts = ["a" * (5 + i * i * 37 % 83) for i in range(300)]
    samples.lines(tmp_path / "a.jsonl", ({"text": {"": a, "zh Hans": b}} for a, b in zip(texts[1:], texts)))
    assert any("zh Hans seems 1 line(s) late" in x for x in warnings(capsys, tmp_path / "a.jsonl"))


def test_language_codes_that_mean_the_same():
    found = checks.codes_alike(["en", "EN", "en-US", "cz", "cs", "jp", "zh-Hans", "zh-Hant", "fi", "fil"])
    assert sorted(found) == ["EN, en, en-US are different languages here: use one code",
                             "cs, cz are different languages here: use one code",
                             "cz is no language code: is it cs?", "jp is no language code: is it ja?"]


def test_test_pictures_among_those_of_training_and_blank_ones_are_named(tmp_path, capsys):
    one = samples.write_tar(tmp_path / "train.tar", 20)
    other = samples.write_tar(tmp_path / "test.tar", 6, first=17)
    found = warnings(capsys, one, other)
    assert len(found) == 2 and found[0].startswith("3 records of") and "18 texts of" in found[1]
    place, again = re.search(r"train.tar KEY (\d+) = .*test.tar KEY (\d+)", found[0]).groups()
    assert place == again and int(place) in (17, 18, 19)
    for i, size in enumerate([(9, 9), (1, 1), (1, 9)]):
        Image.new("RGB", size, (i, 5, 7)).save(tmp_path / f"{i}.png")
    Image.linear_gradient("L").save(tmp_path / "3.png")
    path = samples.lines(tmp_path / "a.jsonl", [{"image": f"{i}.png", "captions": {"en": "a"}} for i in (3, 0, 1, 2)])
    assert any(x.startswith("3 pictures") and "a.jsonl line 2" in x for x in warnings(capsys, path))


def test_the_list_has_every_broken_record(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.tsv")                               # a name that is not UTF-8 is escaped
    write(path, ["a\tb" if i % 2 else "alone" for i in range(60)])
    with contextlib.redirect_stdout(io.StringIO()):                          # data.run lets a terminal print such a name
        assert data.main([str(path), "--list", str(tmp_path / "bad")]) == 1
    assert (tmp_path / "bad").read_text().splitlines() == [
        f"{tmp_path}/\\udcff.tsv line {i}: 1 column(s), not two" for i in range(1, 61, 2)]


def test_a_model_finds_the_pairs_that_do_not_fit(tmp_path, tokenizer, scenes):
    """Both sides are the same text, so that any model finds them, but for two records that are exchanged."""
    lines = list(dict.fromkeys(scenes["en"]))[:300]
    other = list(lines)
    other[70], other[80] = other[80], other[70]
    reader, = open_readers(parse(parallel(tmp_path, de=lines, en=other)))
    count, lost, worst = evaluate.lost_pairs(make(tokenizer), tokenizer, reader, [])["de and en"]
    assert (count, lost, len(worst)) == (300, 2, 10)
    assert {number for _, number, _ in worst[:2]} == {70, 80} and worst[1][0] < 0 < worst[2][0]
