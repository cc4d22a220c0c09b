"""report.py: one page that holds every section, the numbers of the files, and nothing from elsewhere."""
import dataclasses
import html.parser
import json
import math
import re

import pytest
import samples
import torch

import evaluate
import report
from demo import emoji, table
from model import CCLM, PRESETS
from test_table import arguments, pretend

SECTIONS = ["One concept, many languages", "Recall by language", "Tasks", "Training", "Which patches speak for a word",
            "The shared space", "From language to language", "Wrong answers"]
VOID = {"meta", "link", "img", "br"}


def write_checkpoint(path, tokenizer, step, **settings):
    config = dataclasses.replace(PRESETS["demo"], vocabulary=tokenizer.size, width=32, embedding=16, image_size=32)
    torch.manual_seed(settings.get("seed", 5))
    torch.save({"model": CCLM(config).state_dict(), "step": step, "tokenizer": tokenizer.model, "kept": [4],
                "config": {"model": dataclasses.asdict(config), "train": settings, "task": None,
                           "languages": {k: emoji.languages(k) for k in ("seen", "text_only")}}}, path)
    return path


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """The folder of a made-up run: a tiny model, nine steps, results in three languages."""
    folder = tmp_path_factory.mktemp("run")
    settings = {"seed": 3, "init": None, "images": None, "batch": 128, "text_batch": 64}
    write_checkpoint(folder / "ckpt.pt", tokenizer, 9, **settings)
    write_checkpoint(folder / "ckpt_4.pt", tokenizer, 4, **settings)
    rows = [f"{step},1,{9 / step},{5 / step},0.07,{12.5 if step == 9 else ''}" for step in range(1, 10)]
    (folder / "log.csv").write_text("\n".join(["step,lr,loss,image_contrast,temperature,val_seen_t2i_r1", *rows]) + "\n")
    scores = {"en": 61.23, "de": 52.5, "ar": 33.37, "hi": 7.9}
    report_ = {"test_style": {k: {"t2i_r1": x, "chance_r1": 0.25} for k, x in scores.items()}, "groups": {}}
    (folder / "results.json").write_text(json.dumps(report_))
    return folder


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    """The page of that run on 50 drawings, with the runs of demo.table."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "run", pretend([]))
        table.run_all(arguments(folder / "table"))
    for variant in ("full", "no_matching"):
        (folder / "table" / variant / "0/pretrained/results.json").write_bytes((run / "results.json").read_bytes())
        for name in ("ckpt.pt", "best.pt"):
            (folder / "table" / variant / "0/pretrained" / name).unlink()
    command = f"--ckpt {run}/ckpt.pt --table {folder}/table --images demo:val_concept --out {folder}/r.html"
    assert report.main(command.split()) == 0
    return (folder / "r.html").read_text(encoding="utf-8"), (folder / "table/table.md").read_text(encoding="utf-8")


def part(text, title):
    return re.search(rf"<h2>{title}</h2>(.*?)</section>", text, re.S)[1]


def cells(text, label):
    """The numbers of a table's first row of that label."""
    row = re.search(rf'<th scope="row">(?:<bdi lang="en">)?{re.escape(label)}(?:</bdi>)?</th>(.*?)</tr>', text)[1]
    return re.findall(r"<td[^>]*>(?:<bdi[^>]*>)?([^<]*)", row)


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes; an end that nothing began fails."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_small_file_whose_pictures_are_all_labelled(page):
    text = page[0]
    assert len(text.encode()) < 3 * 2 ** 20 and "http" not in text and "<script" not in text and "url(" not in text
    for tag, attributes in Tags(text).found:
        for name in {"src", "href"} & set(attributes):
            assert attributes[name].startswith(("data:", "#")), attributes[name][:40]
        if tag == "img":
            assert attributes["alt"] and attributes["src"].startswith("data:image/jpeg;base64,")
        if tag in ("svg", "image"):
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
    assert re.findall("<h2>(.*?)</h2>", text) == SECTIONS and "Left out" not in text


def test_the_numbers_are_those_of_the_files(page):
    text, tables = page
    recall = part(text, "Recall by language")
    assert cells(recall, "en") == ["61.2"] * 3 and cells(recall, "seen with images (2)") == ["56.9"] * 3
    assert cells(recall, "only in parallel text (1)") == ["33.4"] * 3 and "chance 0.25" in recall
    curves = part(text, "Training")
    assert "0.5556" in curves and "12.5" in curves and f"chance {math.log(128):.3g}" in curves
    tasks = part(text, "Tasks")
    rows = [line.strip("| ").split(" | ") for line in tables.splitlines() if line.startswith("| full |")]
    assert cells(tasks, "full") == rows[0][1:] and tasks.count("<table") == tables.count("|---|") - tables.count("|---|---|")


def test_the_matrix_and_the_gallery_are_those_of_a_naive_loop(run):
    """Four pictures, three languages; one caption is not there."""
    torch.manual_seed(0)
    codes = ["en", "ar", "hi"]
    vectors = torch.nn.functional.normalize(torch.randn(4, 4, 8), dim=-1)
    texts = {k: [f"{k} {i}" for i in range(4)] for k in codes}
    texts["hi"][2] = ""
    rows = [{"image": emoji.draw([name]), "captions": {}} for name in emoji.splits()["val"][:4]]
    words = {k: vectors[n + 1] * s[:, None] for n, k in enumerate(codes) for s in [torch.tensor([t != "" for t in texts[k]])]}
    groups = {"seen": ["en"], "text_only": ["ar"], "never": ["hi"]}
    s = report.Pictures(rows, vectors[0], groups, texts, words)
    matrix = report.across(s)
    for a in codes:
        shown = cells(matrix.split("language by language")[1], a)
        for b, value in zip(codes, shown):
            both = [i for i in range(4) if texts[a][i] and texts[b][i]]
            hits = [max(both, key=lambda j: float(words[a][i] @ words[b][j])) == i for i in both]
            assert value == ("" if a == b else f"{100 * sum(hits) / len(hits):.0f}")
    gallery = report.gallery(s)
    orders = re.findall(r'<h3>(\w+).*?</h3>.*?<div class="row">(.*?)</div>', gallery)
    concept = int(re.search(r'lang="en">en (\d)', gallery)[1])
    for k, figures in orders:
        order = sorted(range(4), key=lambda i: -float(words[k][concept] @ vectors[0][i]))
        assert re.findall(r'alt="en (\d)"', figures) == list(map(str, order))
        assert re.search(r'class="right"><img alt="en (\d)"', figures)[1] == str(concept)


def test_the_way_of_a_word_begins_with_the_weights_that_training_begins_with(run):
    """Step 0 is not kept: it is made again from the seed. The made-up run learned nothing, so its end is its beginning."""
    (first, vectors), (later, _) = report.first_words(run / "ckpt.pt", ["dog"])
    model, tokenizer, _ = evaluate.load(run / "ckpt.pt")
    assert (first, later) == (0, 4) and torch.equal(vectors, evaluate.encode_texts(model, tokenizer, ["dog"])[0].vectors)


def test_a_page_of_ones_own_pictures_says_what_is_left_out_and_escapes_names(tmp_path, tokenizer):
    write_checkpoint(tmp_path / "ckpt.pt", tokenizer, 1, images=["a.jsonl"], seed=1, init="b.pt")
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(samples.jpeg(i))
    rows = [{"image": f"{i}.jpg", "captions": {"en": f"<b>ball</b> {i}"}} for i in range(5)]
    samples.lines(tmp_path / "a.jsonl", rows)
    command = f"--ckpt {tmp_path}/ckpt.pt --out {tmp_path}/r.html"
    assert report.main(command.split()) == 0                                 # without pictures
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert text.count("Left out") == 4 and "name some with --images" in text
    assert report.main([*command.split(), "--images", f"{tmp_path}/a.jsonl"]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    Tags(text)
    assert "<b>" not in text and "&lt;b&gt;ball" in text and "this checkpoint" in text
    assert "no log.csv" in part(text, "Training") and "no picture has captions in two" in part(text, SECTIONS[6])


def test_runs_of_an_older_demo_table_are_left_out(tmp_path):
    (tmp_path / "full/0").mkdir(parents=True)
    with pytest.raises(report.LeftOut, match="guess.json is missing"):
        report.tasks(tmp_path)
    (tmp_path / "benchmark/images").mkdir(parents=True)
    (tmp_path / "benchmark/images/guess.json").write_text('{"xvnli": 33.3}')
    with pytest.raises(report.LeftOut, match="of another version"):
        report.tasks(tmp_path)
