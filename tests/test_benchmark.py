"""The stand-in benchmark: what its files say is true of its pictures, and no guesser can know it from the words."""
import base64
import collections
import io
import itertools
import json

import pytest
from PIL import Image

from demo import benchmark, emoji, table
from tasks import TASKS

HELD_OUT = "twemoji/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark")
    benchmark.write(path, scale=1 / 50)
    return path


@pytest.fixture(scope="module")
def drawings(folder):
    """{path of a picture: its drawings}"""
    return json.loads((folder / "images/drawings.json").read_text())


@pytest.fixture(scope="module")
def meanings():
    """{word of a language: concepts that are meant}, of each language."""
    things = benchmark.names() + benchmark.groups()
    return {language: {thing.words[language]: set(thing.members) for thing in things} for language in benchmark.LANGUAGES}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def concepts(drawings, place):
    return {drawing.split("/")[1] for drawing in drawings[place]}


def things_of(text, language, meanings):
    """A sentence -> the concepts of each thing that it lists, found by trying: whichever two or three words give it."""
    words = [word for word in meanings[language] if word in text]
    for size in (1, 2, 3):
        for some in itertools.permutations(words, size):
            if emoji.join(list(some), language) == text:
                return [meanings[language][word] for word in some]
    raise AssertionError(f"no list of things gives {text!r}")


@pytest.mark.parametrize("language", ["en", "ja", "ar", "uk"])
def test_xvnli_is_all_one_or_none_of_what_the_sentence_lists(folder, drawings, meanings, language):
    rows = lines(folder / f"datasets/XVNLI/annotations/{language}/test.jsonl")
    for row in rows:
        shown = concepts(drawings, f"flickr30k-images/{row['Flikr30kID']}.jpg")
        things = things_of(row["sentence2"], language, meanings)
        there = sum(bool(thing & shown) for thing in things)
        assert row["gold_label"] == {len(things): "entailment", 0: "contradiction"}.get(there, "neutral")
        assert row["sentence1"] == emoji.caption([d.split("/")[1] for d in drawings[f"flickr30k-images/{row['Flikr30kID']}.jpg"]],
                                                 language)
    for key in ("sentence2", "Flikr30kID"):             # neither the words nor the picture alone say anything
        labels = collections.defaultdict(list)
        for row in rows:
            labels[row[key]].append(row["gold_label"])
        assert all(sorted(found) == ["contradiction", "entailment", "neutral"] for found in labels.values())


@pytest.mark.parametrize("language", ["en", "zh", "sw"])
def test_xgqa_asks_whether_which_and_how_many(folder, drawings, meanings, language):
    rows = json.loads((folder / f"datasets/xGQA/annotations/few_shot/{language}/test.json").read_text(encoding="utf-8"))
    answers = json.loads((folder / "datasets/gqa/annotations/trainval_ans2label.json").read_text())
    counts = collections.defaultdict(list)
    for row in rows.values():
        shown = concepts(drawings, f"gqa/{row['imageId']}.jpg")
        things = things_of(row["question"], language, meanings)
        if len(things) == 2:
            there, = [thing for thing in things if thing & shown]
            assert meanings["en"][row["answer"]] == there
        elif row["answer"] in ("yes", "no"):
            assert (row["answer"] == "yes") == bool(things[0] & shown)
        else:
            assert int(row["answer"]) == len(things[0] & shown)
            assert len(things[0]) >= benchmark.MEMBERS
        assert row["answer"] in answers
        counts[row["question"]].append(row["answer"])
    for found in counts.values():                       # no word tells the answer
        assert len(set(collections.Counter(found).values())) == 1 and len(set(found)) in (2, 4)


def test_marvl_is_true_where_both_pictures_show_the_thing(folder, drawings, meanings):
    for language in ("en", "ta"):
        if language == "en":
            rows = lines(folder / "datasets/nlvr2/annotations/test.jsonl")
            pairs = [[f"nlvr2/{row['identifier'].rsplit('-', 1)[0]}-img{side}.png" for side in (0, 1)] for row in rows]
        else:
            rows = lines(folder / f"datasets/marvl/zero_shot/annotations/marvl-{language}.jsonl")
            pairs = [[f"marvl-images/{language}/images/{row['concept']}/{row[side]}" for side in ("left_img", "right_img")]
                     for row in rows]
        labels = []
        one = collections.defaultdict(list)
        for row, pair in zip(rows, pairs):
            thing, = things_of(row.get("sentence") or row["caption"], language, meanings)
            left, right = (bool(thing & concepts(drawings, place)) for place in pair)
            assert str(row["label"]) == str(left and right)
            assert left or right
            labels.append((str(row["label"])))
            one[left].append(labels[-1])
        assert collections.Counter(labels)["True"] == len(labels) / 2
        best = sum(max(collections.Counter(found).values()) for found in one.values())
        assert best == 0.75 * len(rows)                 # who sees one picture


def test_captions_name_what_a_picture_shows(folder, drawings, meanings):
    for row in lines(folder / "datasets/xFlickrCO/annotations/ko/test.jsonl"):
        place = f"{'val2014' if row['img_path'].startswith('COCO') else 'flickr30k-images'}/{row['img_path']}"
        names = [emoji.concepts()[i]["name"]["ko"] for i in concepts(drawings, place)]
        assert row["sentences"][0] in [emoji.join(list(some), "ko") for some in itertools.permutations(names)]
    assert all(len(row["sentences"]) == 5 for row in lines(folder / "datasets/flickr30k/annotations/train_ann.jsonl"))
    rows = lines(folder / "datasets/wit/annotations-bs64/test_ru.jsonl")
    for row in rows:
        image = Image.open(io.BytesIO(base64.b64decode(row["image_content"])))
        assert image.size == (64, 64)
    assert len({row["image_url"] for row in rows}) < len(rows)                  # several captions of some


def test_tests_have_the_held_out_style_and_training_has_not(drawings):
    """Pictures of a test are drawn in the style that training never shows, in all folders."""
    styles = {place: {drawing.startswith(HELD_OUT) for drawing in found} for place, found in drawings.items()}
    assert all(len(found) == 1 for found in styles.values())
    for place, (held_out,) in styles.items():
        test = "test" in place or place.startswith(("flickr30k-images/3", "flickr30k-images/7", "gqa/3", "marvl-images", "val2014"))
        assert held_out == test, place


def test_a_guesser_without_pictures_is_at_chance(folder):
    guess = json.loads((folder / "images/guess.json").read_text())
    assert guess["xvnli"]["text"] == pytest.approx(100 / 3)
    assert guess["xgqa"] == pytest.approx({"nothing": 100 / 6, "text": 100 * (1 / 2 + 1 / 2 + 1 / 4) / 3})
    assert guess["marvl"] == pytest.approx({"nothing": 50, "text": 50})


def test_groups_have_a_word_of_their_own_in_every_language():
    words = [(language, group.words[language]) for group in benchmark.groups() for language in benchmark.LANGUAGES]
    assert len(set(words)) == len(words)
    assert {"fruit", "music"} <= {group.words["en"] for group in benchmark.groups()}


def test_the_benchmark_is_the_same_every_time(folder, tmp_path):
    benchmark.write(tmp_path, scale=1 / 500)
    again = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".jpg", ".png"))
    assert again
    for path in again:                                  # the first blocks of any scale
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()
    small = (tmp_path / "datasets/XVNLI/annotations/de/test.jsonl").read_text()
    assert (folder / "datasets/XVNLI/annotations/de/test.jsonl").read_text().startswith(small)


def test_every_column_of_the_miniature_has_its_best_guess(folder):
    guess = json.loads((folder / "images/guess.json").read_text())
    assert {column[2] for column in table.COLUMNS} == set(guess)


@pytest.mark.parametrize("name", TASKS)
def test_the_readers_of_the_published_files_read_it(folder, name):
    task = TASKS[name](folder / "datasets", folder / "images")
    if not (folder / "datasets").joinpath({"multi30k": "multi30k", "coco": "mscoco", "coco5k": "mscoco"}.get(name, "")).exists() \
            or name in ("xm3600", "xtd"):
        pytest.skip("not in the stand-in")
    for split in ("train", "val"):
        assert task.checked(task.examples(split, "en"))
    for language in benchmark.LANGUAGES:
        found = task.checked(task.examples("test", language))
        assert len({example.label for example in found}) > 1
