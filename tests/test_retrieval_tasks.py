"""Retrieval benchmarks: made-up rows in every published layout, read, fine-tuned on and scored; recall and mean recall
against a loop over all pairs and against cases that were counted by hand."""
import base64
import csv
import dataclasses
import json
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

import evaluate
import train
from samples import jpeg, lines
from tasks import TASKS
from tasks.common import Examples, to_batch
from tasks.retrieval import Multi30K, Wit, XFlickrCO, Xm3600, Xtd
from test_evaluate import in_float32, make, one_pair                         # noqa: F401, a fixture of this file too

FLICKR = [f"{i}.jpg" for i in range(3)]
COCO = [f"COCO_{'train' if i == 5 else 'val'}2014_{i:012}.jpg" for i in range(3, 6)]
KEYS = [f"{i:016x}" for i in range(3)]


def text(language, i, j=0):
    return f"{language} picture {i}, caption {j}"


def listed(path, rows):
    """A JSON list, or JSON lines where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        return lines(path, rows)
    return path.write_text(json.dumps(rows))


def xflickrco(root):
    def rows(names, language, n=1):
        return [{"sentences": [text(language, i, j) for j in range(n)], "id": name[:-4], "img_path": name}
                for i, name in enumerate(names)]
    own = root / "xFlickrCO"
    for k in XFlickrCO.languages:
        listed(own / "annotations" / k / "test.jsonl", rows(FLICKR + COCO[:2], k))
    for k in XFlickrCO.languages[1:]:
        listed(own / "annotations" / k / "train_100.jsonl", rows(FLICKR[:2], k))
        listed(own / "annotations_machine-translate" / k / "test_gmt.jsonl", rows(FLICKR + COCO[:2], f"{k} in English"))
    for name in ("train_ann", "valid_ann"):
        listed(root / "flickr30k" / "annotations" / f"{name}.jsonl", rows(FLICKR, name, 5))


# The pictures of each language, in the order of the file: some come twice, and not side by side.
WIT = {"en": [0, 1, 2, 3, 0, 4, 5, 1, 6], "ar": [7, 8, 7, 9, 10, 11, 12], "vi": [0, 13]}


def wit_rows(numbers, language, **more):
    return [{"image_idx": i, "image_url": f"https://upload.wikimedia.org/{i}.jpg", "meta_url": f"http://commons/{i}",
             "caption_reference_description": text(language, i, j), "language": language, "page_url": "https://a/b",
             "wit_ix": f"wit-test_{j}", "image_content": base64.b64encode(jpeg(i)).decode()} | more
            for j, i in enumerate(numbers)]


def wit(root):
    empty = wit_rows([99], "en", caption_reference_description=None) + wit_rows([4], "en", caption_reference_description=" ")
    for k, numbers in WIT.items():
        listed(root / "wit/annotations-bs64" / f"test_{k}.jsonl", wit_rows(numbers, k) + empty)
    listed(root / "wit/annotations-bs64" / "val_en.jsonl", wit_rows([20, 21], "val"))
    listed(root / "wit/annotations_machine-translate-bs64" / "test_ar_gmt.jsonl", wit_rows(WIT["ar"], "ar in English"))


def caption_lists(root):
    """Multi30K and COCO: a training list has a row for each caption, a test list for each picture."""
    def write(path, names, language, n, training):
        rows = [{"image": name, "caption": [text(language, i, j) for j in range(n)], "image_id": i}
                for i, name in enumerate(names)]
        if training:
            rows = [row | {"caption": caption} for row in rows for caption in row["caption"]]
        listed(root / path, rows)
    flickr = [f"flickr30k-images/{name}" for name in FLICKR]
    coco = [f"coco/{name.split('_')[1]}/{name}" for name in COCO]
    for k in Multi30K.languages:
        for split in ("train", "val", "test_2016_flickr"):
            write(f"multi30k/{split}.{k}.json", flickr, f"{k} {split}", 5 if k in ("en", "de") else 1, split == "train")
    for k, val, test in (("en", "valid", "1k_test"), ("ja", "valid", "1k_test"), ("zh", "val", "test")):
        for split in ("train", val, test):
            write(f"mscoco/{k}.{split}.json", coco, f"{k} {split}", 5, split == "train")
    write("mscoco/coco_test.json", [name.removeprefix("coco/") for name in coco], "5k", 5, False)


def xm3600(root):
    rows = []
    for i, key in enumerate(KEYS):
        said = {k: {"caption": [text(k, i, j) for j in range(2)], "caption/tokenized": []} for k in Xm3600.languages}
        rows.append({"image/key": key, "image/locale": "cs"} | said)
    rows[0]["de"]["caption"][0] = "ein\u2028Ball"                            # a line separator inside a text
    listed(root / "xm3600" / "captions.jsonl", rows)


def xtd(root):
    folders = {"en": "MIC", "de": "MIC", "fr": "MIC", "ja": "STAIR"}
    for k in Xtd.languages:
        path = root / "xtd" / folders.get(k, "XTD10") / f"test_1kcaptions_{'jp' if k == 'ja' else k}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(text(k, i) + "\n" for i in range(3)))
    (root / "xtd/XTD10/test_image_names.txt").write_text("\n".join(COCO))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """-> (folder of the annotations, folder of the pictures)."""
    folder = tmp_path_factory.mktemp("retrieval")
    root, images = folder / "datasets", folder / "images"
    for write in (xflickrco, wit, caption_lists, xm3600, xtd):
        write(root)
    names = [f"flickr30k-images/{name}" for name in FLICKR] + [f"{name.split('_')[1]}/{name}" for name in COCO]
    for i, name in enumerate(names + [f"xm3600/{key}.jpg" for key in KEYS]):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(jpeg(i))
    return root, images


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    model = make(tokenizer)
    path = tmp_path_factory.mktemp("model") / "ckpt.pt"
    torch.save({"model": model.state_dict(), "step": 1, "tokenizer": tokenizer.model,
                "config": {"model": dataclasses.asdict(model.config), "train": {}}}, path)
    return path


def flags(made):
    return ["--data", str(made[0]), "--image_root", str(made[1])]


# --------------------------------------------------------------------------------------------------
# Readers
# --------------------------------------------------------------------------------------------------

FLICKR_TEST = {"flickr30k-images/0.jpg": 1, "flickr30k-images/1.jpg": 1, "flickr30k-images/2.jpg": 1,
               "val2014/COCO_val2014_000000000003.jpg": 1, "val2014/COCO_val2014_000000000004.jpg": 1}
FLICKR_LIST = {f"flickr30k-images/{name}": 5 for name in FLICKR}
COCO_LIST = {f"{name.split('_')[1]}/{name}": 5 for name in COCO}
XM3600_TEST = {f"xm3600/{key}.jpg": 2 for key in KEYS}


@pytest.mark.parametrize("name, arguments, pictures, first", [
    *(("xflickrco", ("test", k), FLICKR_TEST, f"{k} picture 0, caption 0") for k in XFlickrCO.languages),
    ("xflickrco", ("test", "tr", None, True), FLICKR_TEST, "tr in English picture 0, caption 0"),
    ("xflickrco", ("test", "en", None, True), FLICKR_TEST, "en picture 0, caption 0"),
    ("xflickrco", ("train", "ru", "100"), dict.fromkeys(list(FLICKR_TEST)[:2], 1), "ru picture 0, caption 0"),
    ("xflickrco", ("train", "en"), FLICKR_LIST, "train_ann picture 0, caption 0"),
    ("xflickrco", ("val", "en"), FLICKR_LIST, "valid_ann picture 0, caption 0"),
    *(("multi30k", (split, k), FLICKR_LIST if k in ("en", "de") else dict.fromkeys(FLICKR_LIST, 1),
       f"{k} {file} picture 0, caption 0") for k in Multi30K.languages
      for split, file in (("train", "train"), ("val", "val"), ("test", "test_2016_flickr"))),
    *(("coco", (split, k), COCO_LIST, f"{k} {file} picture 0, caption 0") for k, split, file in (
        ("en", "train", "train"), ("en", "val", "valid"), ("en", "test", "1k_test"), ("ja", "test", "1k_test"),
        ("zh", "train", "train"), ("zh", "val", "val"), ("zh", "test", "test"))),
    ("coco5k", ("train", "en"), COCO_LIST, "en train picture 0, caption 0"),
    ("coco5k", ("test", "en"), COCO_LIST, "5k picture 0, caption 0"),
    *(("xm3600", ("test", k), XM3600_TEST, f"{k} picture 0, caption 0") for k in ("en", "quz")),
    ("xm3600", ("test", "de"), XM3600_TEST, "ein\u2028Ball"),
    *(("xtd", ("test", k), dict.fromkeys(COCO_LIST, 1), f"{k} picture 0, caption 0") for k in Xtd.languages)])
def test_each_layout_gives_its_pictures_and_their_captions(made, name, arguments, pictures, first):
    task = TASKS[name](*made)
    images = task.images(*arguments)
    assert {str(path.relative_to(made[1])): len(texts) for path, texts in images.values()} == pictures
    examples = task.checked(task.examples(*arguments))
    assert examples[0].text == first and len(examples) == sum(pictures.values())
    assert len({example.label for example in examples}) == len(pictures)


def test_a_picture_has_the_same_label_in_all_languages_and_splits(made):
    task = XFlickrCO(*made)
    labels = [{example.pictures: example.label for example in task.examples(*arguments)}
              for arguments in (("train",), ("test", "ja"), ("train", "de", "100"))]
    assert all(labels[0][key] == labels[1][key] for key in labels[0]) and labels[2].items() <= labels[0].items()


def test_wit_merges_the_captions_of_a_url_and_leaves_out_empty_ones(made):
    task = Wit(*made)
    for translated, language in ((False, "ar"), (True, "ar in English")):
        images = task.images("test", "ar", translated=translated)
        assert list(images) == [f"https://upload.wikimedia.org/{i}.jpg" for i in (7, 8, 9, 10, 11, 12)]
        picture, texts = next(iter(images.values()))
        assert texts == [text(language, 7, 0), text(language, 7, 2)] and picture() == jpeg(7)
    assert str(picture).endswith("wit/annotations_machine-translate-bs64/test_ar_gmt.jsonl line 1")
    assert task.open(picture).size == (40, 30)
    assert len(task.examples("test", "en")) == 9 and len(task.images("val", "en")) == 2


def test_each_language_of_wit_has_candidates_of_its_own(made, tokenizer):
    task = Wit(*made)
    rows = task.rows("test", *WIT)
    assert len(rows) == 7 + 6 + 1 and sorted(rows[0]["captions"]) == ["en", "vi"]    # picture 0 is in both
    scores = dict(evaluate.task_scores(task, make(tokenizer), tokenizer, "test", list(WIT)))
    assert [(x["images"], x["n"]) for x in scores.values()] == [(7, 9), (6, 7), (2, 2)]
    assert [x["chance_r1"] for x in scores.values()] == [100 / 7, 100 / 6, 50]


# --------------------------------------------------------------------------------------------------
# Recall
# --------------------------------------------------------------------------------------------------

def recall(orders, k):
    """% of queries with a right candidate among the first k. orders: of each query [(score, is it right?)]; a wrong
    candidate that scores like the right one is before it, and no right one at all is not found."""
    found = 0
    for candidates in orders:
        best = max((score for score, right in candidates if right), default=None)
        if best is not None:
            found += sum(not right and score >= best for score, right in candidates) < k
    return 100 * found / len(orders)


def brute_force(task, model, tokenizer, language, K):
    """Each caption with each picture, one pair at a time -> {"", "reranked_", "matched_": the mean of six recalls}."""
    images = task.images("test", language)
    pictures = [task.open(picture) for picture, _ in images.values()]
    captions = [(caption, i) for i, (_, texts) in enumerate(images.values()) for caption in texts]
    pairs = [[one_pair(model, tokenizer, image, caption) for image in pictures] for caption, _ in captions]
    t2i = [[(pair, i == owner) for i, pair in enumerate(row)] for row, (_, owner) in zip(pairs, captions)]
    i2t = [[(row[i], owner == i) for row, (_, owner) in zip(pairs, captions)] for i in range(len(pictures))]
    means = {}
    for name, score in (("", 0), ("matched_", 1), ("reranked_", 2)):         # as one_pair returns them
        recalls = []
        for queries in (t2i, i2t):
            if name:                                                         # only the K best by cosine
                queries = [sorted(query, key=lambda x: -x[0][0])[:K] for query in queries]
            orders = [[(pair[score], right) for pair, right in query] for query in queries]
            recalls += [recall(orders, k) for k in (1, 5, 10)]
        means[name] = fmean(recalls)
    return means


@pytest.mark.parametrize("K", [3, 128])                                      # 128: more than there are candidates
def test_mean_recall_is_that_of_a_loop_over_all_pairs(made, tokenizer, K, monkeypatch):
    monkeypatch.setattr(Wit, "k", K)
    task, model = Wit(*made), make(tokenizer)
    for language, x in evaluate.task_scores(task, model, tokenizer, "test", ["en", "ar"]):
        for name, mean in brute_force(task, model, tokenizer, language, K).items():
            assert x[f"{name}mean_recall"] == pytest.approx(mean), (language, name)


def by_hand(similarity, owner):
    """Cosines (n captions, I pictures) as given -> what rank_all finds in both directions for K = 2."""
    n, I = similarity.shape
    captions = evaluate.Captions(SimpleNamespace(vectors=similarity), torch.arange(n), torch.arange(n), torch.zeros(0),
                                 torch.tensor(owner), torch.arange(I), torch.eye(I))
    return {direction: evaluate.rank_all(captions, direction, 2) for direction in ("t2i", "i2t")}


def test_a_case_that_was_counted_by_hand():
    """Three pictures: fewer candidates than 5 or 10. The first has two captions; a tie is lost."""
    found = by_hand(torch.tensor([[.9, .1, .0],                              # picture 0: first
                                  [.5, .5, .2],                              # picture 0: ties with picture 1, second
                                  [.0, .3, .6],                              # picture 1: second
                                  [.1, .2, .3]]), [0, 0, 1, 2])              # picture 2: first
    # Columns: picture 0 finds caption 0 (.9); picture 1 has .3 after .5; picture 2 has .3 after .6.
    found["t2i"]["matched_"] = torch.tensor([[1., 1.],                       # a tie: lost
                                             [2., 1.], [1., 2.], [2., 1.]])
    found["t2i"]["right"] = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0]]).bool()        # the last: not among the two
    found["i2t"]["matched_"] = torch.tensor([[1., 2.], [torch.nan, torch.nan], [3., 1.]])
    assert found["i2t"]["right"].tolist() == [[True, True], [False, True], [False, True]]
    x = evaluate.recalls("t2i", found["t2i"]) | evaluate.recalls("i2t", found["i2t"])
    assert [x[f"t2i_r{k}"] for k in (1, 5, 10)] == [50, 100, 100]
    assert [x[f"i2t_r{k}"] for k in (1, 5, 10)] == pytest.approx([100 / 3, 100, 100])
    assert [x[f"matched_t2i_r{k}"] for k in (1, 5, 10)] == [50, 75, 75]
    assert [x[f"matched_i2t_r{k}"] for k in (1, 5, 10)] == pytest.approx([100 / 3, 200 / 3, 200 / 3])
    means = evaluate.mean_recalls(x)
    assert means == pytest.approx({"mean_recall": (50 + 100 + 100 + 100 / 3 + 100 + 100) / 6,
                                   "matched_mean_recall": (50 + 75 + 75 + 100 / 3 + 200 / 3 + 200 / 3) / 6})


# --------------------------------------------------------------------------------------------------
# What is not there
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, arguments, words", [
    ("xflickrco", ("train", "de"), ["xflickrco: the train set is in English only, not in de"]),
    ("xflickrco", ("train", "en", "100"), ["en/train_100.jsonl is missing", "e-bug/iglue", "docs/data.md"]),
    ("wit", ("val", "ar"), ["wit: the val set is in English only"]), ("wit", ("train", "ar", "5"), ["no few-shot set"]),
    ("wit", ("test", "ja"), ["annotations-bs64/test_ja.jsonl is missing", "wit_preproc.py, makes it"]),
    ("multi30k", ("test", "ja"), ["multi30k is in en de fr cs, not in ja"]),
    ("multi30k", ("test", "de", None, True), ["multi30k has no few-shot and no translated sets"]),
    ("xm3600", ("val", "en"), ["xm3600 is a test set"]), ("xtd", ("test", "fi"), ["xtd is in en de", "not in fi"])])
def test_a_set_that_a_benchmark_does_not_have_is_said_in_one_line(made, name, arguments, words):
    with pytest.raises(ValueError) as error:
        TASKS[name](*made).images(*arguments)
    line = str(error.value)
    assert all(word in line for word in words) and "\n" not in line


@pytest.mark.parametrize("name, files, words", [
    ("xflickrco", {"xFlickrCO/annotations/en/test.jsonl": ""}, ["xflickrco: the test set in en has no caption"]),
    ("wit", {"wit/annotations-bs64/test_en.jsonl": ""}, ["wit: the test set in en has no caption"]),
    ("multi30k", {"multi30k/test_2016_flickr.en.json": ""}, ["test_2016_flickr.en.json is not JSON"]),
    ("coco", {"mscoco/en.1k_test.json": "[]"}, ["coco: the test set in en has no caption"]),
    ("xm3600", {"xm3600/captions.jsonl": "\n"}, ["xm3600: the test set in en has no caption"]),
    ("xtd", {"xtd/MIC/test_1kcaptions_en.txt": "", "xtd/XTD10/test_image_names.txt": ""}, ["1 lines", "names.txt 0"]),
    ("xtd", {"xtd/MIC/test_1kcaptions_en.txt": "a\nb\n", "xtd/XTD10/test_image_names.txt": COCO[0]}, ["2 lines", "1"]),
    # rows of something else
    ("xflickrco", {"xFlickrCO/annotations/en/test.jsonl": '{"img_path": "1.jpg"}'}, ["row 1: no field 'sentences'"]),
    ("xflickrco", {"xFlickrCO/annotations/en/test.jsonl": '{"img_path": 1, "sentences": ["a"]}'}, ["img_path is no text"]),
    ("xflickrco", {"xFlickrCO/annotations/en/test.jsonl": '{"img_path": "1.jpg", "sentences": [1]}'}, ["no text"]),
    ("wit", {"wit/annotations-bs64/test_en.jsonl": json.dumps({"image_url": "a", "caption_reference_description": "a"})},
     ["test_en.jsonl line 1: no image_content", "wit_preproc.py"]),
    ("wit", {"wit/annotations-bs64/test_en.jsonl": json.dumps({"image_content": "a", "caption_reference_description": "a"})},
     ["test_en.jsonl line 1: no field 'image_url'"]),
    ("wit", {"wit/annotations-bs64/test_en.jsonl": json.dumps({"image_content": "a", "image_url": None,
                                                               "caption_reference_description": "a"})}, ["None", "no text"]),
    ("multi30k", {"multi30k/test_2016_flickr.en.json": '{"images": [], "annotations": []}'}, ["row 1: "]),
    ("xm3600", {"xm3600/captions.jsonl": '{"image/key": "a", "en": ["a ball"]}'}, ["row 1: no field 'caption' in 'en'"]),
    ("xtd", {"xtd/MIC/test_1kcaptions_en.txt": "a", "xtd/XTD10/test_image_names.txt": "a.jpg"}, ["a.jpg", "are missing"])])
def test_an_empty_file_and_rows_of_another_benchmark_are_one_line(tmp_path, name, files, words):
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    with pytest.raises(ValueError) as error:
        TASKS[name](tmp_path, tmp_path).check("test", ["en"])
    line = str(error.value)
    assert all(word in line for word in words) and "\n" not in line


def test_missing_pictures_are_counted_and_named(made, tmp_path):
    for name, first in (("xflickrco", "flickr30k-images/0.jpg and 4 more of 5"),
                        ("xm3600", f"xm3600/{KEYS[0]}.jpg and 2 more"),
                        ("coco", "train2014/COCO_train2014_000000000005.jpg and 2 more")):
        with pytest.raises(ValueError, match=f"{first} .*are missing: .*--image_root"):
            TASKS[name](made[0], tmp_path).check("test", ["en"])


def test_broken_pictures_of_wit_are_left_out_and_named(made, checkpoint, tmp_path, capsys):
    """One of English; all of Arabic, which then has no scores."""
    folder = tmp_path / "wit" / "annotations-bs64"
    listed(folder / "test_en.jsonl", wit_rows([0, 1], "en") + wit_rows([2], "en", image_content="!"))
    listed(folder / "test_ar.jsonl", wit_rows([3, 4], "ar", image_content=base64.b64encode(jpeg(3)[:99]).decode()))
    words = ["wit", "--ckpt", checkpoint, "--data", tmp_path, "--languages", "en", "ar", "--json", tmp_path / "a"]
    assert evaluate.main([*map(str, words), "--cache", str(tmp_path / "cache")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2].partition(": ")[0] for line in said] == [
        f"{folder}/test_en.jsonl line 3", f"{folder}/test_ar.jsonl line 1", f"{folder}/test_ar.jsonl line 2"]
    report = json.loads((tmp_path / "a").read_text())
    assert list(report["wit"]) == ["en"] and report["wit"]["en"]["n"] == 2
    assert not list(folder.glob(".*.index")) and list((tmp_path / "cache").glob("*.index"))


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------

def test_xm3600_is_scored_without_fine_tuning(made, checkpoint, tmp_path, capsys):
    words = ["xm3600", "--ckpt", str(checkpoint), *flags(made), "--languages", "en", "quz", "th", "--json"]
    assert evaluate.main([*words, str(tmp_path / "a.json")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert {k: (x["n"], x["images"]) for k, x in report["xm3600"].items()} == {k: (6, 3) for k in ("en", "quz", "th")}
    others = report["groups"]["xm3600"]["others"]
    assert others["languages"] == 2
    for key in ("t2i_r1", "i2t_r1", "matched_mean_recall"):
        assert others[key] == pytest.approx((report["xm3600"]["quz"][key] + report["xm3600"]["th"][key]) / 2)
    assert "all but English" in capsys.readouterr().out


def test_fine_tuned_on_flickr30k_it_is_scored_in_eight_languages(made, checkpoint, tmp_path, capsys):
    """Three steps, two validations: the checkpoint is chosen by the recall of English captions."""
    words = ["--task", "xflickrco", "--init", str(checkpoint), "--out", str(tmp_path), *flags(made), "--batch", "5",
             "--epochs", "1", "--validate_every", "2", "--workers", "0", "--processes", "1"]
    assert train.main(words) == 0
    log = list(csv.DictReader(open(tmp_path / "log.csv", newline="")))
    assert len(log) == 3 and all(float(row["contrast"]) > 0 and float(row["match"]) > 0 for row in log)
    assert log[1]["val_matched_mean_recall"] and not log[0]["val_matched_mean_recall"]
    report = json.loads((tmp_path / "results.json").read_text())
    assert {k: x["n"] for k, x in report["xflickrco"].items()} == dict.fromkeys(XFlickrCO.languages, 5)
    assert report["groups"]["xflickrco"]["others"]["languages"] == 7
    assert "published, few-shot 100" in capsys.readouterr().out
    old, new = (torch.load(path, weights_only=True)["model"] for path in (checkpoint, tmp_path / "best.pt"))
    changed = {name.split(".")[0] for name, tensor in old.items() if not torch.equal(tensor, new[name])}
    assert {"vision", "text", "fusion", "itm_head", "vision_proj", "text_proj"} <= changed


def test_captions_of_one_picture_are_never_hard_negatives_of_each_other(made, tokenizer):
    """A batch of one picture has nothing to match."""
    task, model = Multi30K(*made), make(tokenizer)
    examples = [example for example in task.examples("train") if example.pictures[0].name == "1.jpg"]
    dataset = Examples(examples, model.config.image_size)
    batch = to_batch(examples, [dataset.whole(i) for i in range(5)], tokenizer, 40, "cpu")
    found = task.losses(model, batch, 0, tokenizer)
    assert found["match"] == 0
    assert list(found) == list(task.chance(5, tokenizer)) == ["contrast", "match"]
