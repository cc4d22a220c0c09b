"""The doctor counts what a naive parse counts and exits with the right status; the formats of others train and pass it;
memory does not grow with the number of records."""
import collections
import os
import pathlib
import subprocess
import sys

from campaigns import bench_data
from campaigns import faults
import pytest
import samples

import data
from formats import doctor
from formats import records
import train

ROOT = pathlib.Path(__file__).parents[1]


def told(capsys, *words):
    """-> (exit status, {label: what stands there, joined}) of the doctor."""
    status, found, label = data.main([str(w) for w in words]), {}, None
    for line in capsys.readouterr().out.splitlines():
        label = line[:18].strip() or label
        found[label] = " ".join((found.get(label, "") + " " + line[18:]).split())                # as if not wrapped
    return status, found


def test_a_whole_source_passes_and_is_counted_as_a_naive_parse_counts_it(tmp_path, tokenizer, capsys):
    rows = [{"image": samples.base64.b64encode(samples.jpeg(i % 20)).decode(),
             "captions": samples.said(i % 23, ["en", "de", "ja"][:1 + i % 3]) | (
                 {"fr": ["a", "b" * i]} if i % 4 == 1 else {})} for i in range(60)]
    path = samples.lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "spm.model").write_bytes(tokenizer.model)
    status, found = told(capsys, path, "--tokenizer", tmp_path / "spm.model")
    texts = [(k, t) for row in rows for k, said in row["captions"].items()
             for t in (said if isinstance(said, list) else [said])]
    languages = collections.Counter(k for row in rows for k in row["captions"])
    per = collections.Counter(len(row["captions"]) + ("fr" in row["captions"]) for row in rows)
    lengths = sorted(len(tokenizer.encode(t, None)) for _, t in texts)
    assert status == 0 and found["broken"] == "none"
    assert found["languages"] == " ".join(f"{k} {n}" for k, n in sorted(languages.items()))
    assert found["texts a record"] == " ".join(f"{k}: {n}" for k, n in sorted(per.items()))
    cut = 100 * sum(n > 64 for n in lengths) / len(lengths)
    middle, nine = (lengths[-(-len(lengths) * share // 100) - 1] for share in (50, 90))
    assert found["tokens"].startswith(f"median {middle}, 90 % up to {nine}, ")
    assert found["tokens"].endswith(f"longest {lengths[-1]}; {cut:.2f} % are cut at 64")
    assert found["exact duplicates"] == f"40 of 60 images, {len(texts) - len(set(texts))} of {len(texts)} texts"
    assert found["longest"].startswith(f"{lengths[-1]} ") and f"{path} line 58 fr: bbbb" in found["longest"]
    assert found["longest"].count(" line ") == 10
    assert found["samples"].count(" line ") == 3


def test_broken_records_are_named_with_file_record_and_reason_and_give_status_1(tmp_path, capsys):
    rows = [{"image": "x.jpg", "caption": {"en": f"sentence {i}"}} for i in range(30)]
    (tmp_path / "x.jpg").write_bytes(samples.jpeg(0))
    rows[4]["image"], rows[9]["caption"], rows[17] = "gone.jpg", {"en": ""}, {"image": "x.jpg"}
    status, found = told(capsys, samples.lines(tmp_path / "a.jsonl", rows))
    assert status == 1 and found["broken"].startswith("3 records")
    for line, why in ((5, "no such image"), (10, "a text in en is empty"), (18, "no field captions or caption")):
        assert f"a.jsonl line {line}: {why}" in found["broken"]


def test_data_py_is_the_command(tmp_path):
    """`python data.py PATH`, with its status, also in a terminal that knows no umlauts."""
    samples.lines(tmp_path / "a.jsonl", [{"text": {"en": "one", "de": "f\u00fcnf"}}, {"text": {"en": "two"}}])
    done = subprocess.run([sys.executable, "data.py", tmp_path / "a.jsonl"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1 and done.stderr == ""
    assert "a.jsonl line 2: one language only (en), not two" in " ".join(done.stdout.split())


def test_the_tokenizer_command_makes_one_that_reads_the_texts(tmp_path, capsys):
    folder = samples.multi30k(tmp_path, 60)
    out = tmp_path / "spm.model"
    assert data.main(["tokenizer", "--texts", str(folder / "train.*"), "--vocab", "300", "--out", str(out)]) == 0
    made = data.Tokenizer(out.read_bytes())
    text = samples.PHRASES["de"].format(7)
    assert made.processor.decode([i - 1 for i in made.encode(text)[1:-1]]) == text
    assert "no 9,000 pieces" not in capsys.readouterr().out
    assert data.main(["tokenizer", "--texts", str(folder / "train.*"), "--vocab", "9000", "--out", str(out)]) == 0
    assert "hold no 9,000 pieces" in capsys.readouterr().out
    assert data.main(["tokenizer", "--texts", str(folder / "train.*"), "--vocab", "9", "--out", str(out)]) == 2
    assert "no tokenizer of 9 pieces" in capsys.readouterr().err


def formats(folder):
    """{name: (paths for --images, paths for --texts, more)}"""
    official, multi30k, (iglue, images) = samples.official(folder), samples.multi30k(folder), samples.iglue(folder)
    return {"official": ([official / "cc3m", official / "cc3m_path"], [f"{official}/wikimatrix@en,de=0.5",
                         f"{official}/wikimatrix_en_bn=0.5"], []),
            "multi30k": (["demo"], [multi30k / "train.*"], ["--image_size", "64"]),
            "iglue": ([f"{iglue}/de/test.jsonl@de", f"{iglue}/ja/test.jsonl@ja"], [], ["--image_root", images]),
            "languages": ([official / "cc3m"], [multi30k / "train.*"], ["--languages", "de", "fr"])}


@pytest.mark.parametrize("name", ["official", "multi30k", "iglue", "languages"])
def test_the_layouts_of_others_pass_the_doctor_and_train(tmp_path, capsys, tokenizer, name):
    images, texts, more = formats(tmp_path)[name]
    (tmp_path / "spm.model").write_bytes(tokenizer.model)
    for path in [*images, *texts]:
        plain = str(path).split("=")[0]
        if plain != "demo":
            status, found = told(capsys, plain, *(more if "--image_root" in more else []))
            assert status == 0 and found["broken"] == "none", found
    words = ["--images", *images, *(["--texts", *texts] if texts else []), "--tokenizer", tmp_path / "spm.model",
             "--out", tmp_path / "out", *faults.TINY, *more, "--steps", "4", "--workers", "0"]
    assert train.main([str(w) for w in words]) == 0
    out = capsys.readouterr().out
    assert "step 4 of 4 is done" in out and not (tmp_path / "out" / "results.json").exists()
    rows = (tmp_path / "out" / "log.csv").read_text().splitlines()
    assert len(rows) == 5 and all(row.split(",")[rows[0].split(",").index("bad_records")] == "0" for row in rows[1:])


def test_memory_does_not_grow_with_the_number_of_records(tmp_path):
    """200,000 pairs beside 2,000, each in a process of its own; the full sizes are bench_data.py memory's."""
    code = """if 1:
        import resource, sys, data
        source = data.files(data.PairFiles, [sys.argv[1]])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        n = len(source)
        for position in range(3000):
            source[data.example_at(position, n, 0, 1)[1], data.generator(position)]
        print(n, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    sizes = {}
    for n in (2_000, 200_000):
        path = bench_data.write_pairs(tmp_path / f"{n}.tsv", 0, n)
        found = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True).stdout
        count, _, sizes[n] = map(int, found.split())
        assert count == n
    assert sizes[200_000] - sizes[2_000] < 20_000                            # KB; the file itself has 21 MB


def test_the_doctor_keeps_a_few_bytes_of_an_image_and_of_a_text(tmp_path):
    reader = records.Columns(str(bench_data.write_pairs(tmp_path / "a.tsv", 0, 50)))
    found = doctor.Findings([reader])
    for i in range(50):
        found.look(reader, i)
    assert len(found.records) == 50 and found.records.itemsize == found.texts.itemsize == 8
    assert len(found.lengths) == 100 and len(found.top) == 10 and len(found.samples) == 3


@pytest.mark.parametrize("rows, said", [
    ([("a", "b" * 64), ("c", "d" * 65), ("e", "e" * 64), ("f", "a")], ["12.50 % are cut", "0 of 8 texts"]),
    ([("a", "bb")], ["median 1,"])])
def test_the_numbers_at_their_edges(tmp_path, capsys, rows, said):
    """64 is not cut, 65 is; the same text in two languages is no duplicate; the median of 1 and 2 is 1.
    Tokens are letters."""
    (tmp_path / "a.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    reader = records.Columns(str(tmp_path / "a.tsv"))
    found = doctor.Findings([reader], list, 64)
    for i in range(len(rows)):
        found.look(reader, i)
    found.report("x")
    out = capsys.readouterr().out
    assert all(words in out for words in said), out


def test_an_empty_file_is_broken(tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("a\tb\n")
    (tmp_path / "b.tsv").write_text("")
    assert data.main([f"{tmp_path}/*.tsv"]) == 1 and "b.tsv: no records" in capsys.readouterr().out
