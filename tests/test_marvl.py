"""MaRVL and NLVR2: made-up rows in every published layout, read, fine-tuned on and scored."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import reference
import train
from formats.images import normalise
from model import CCLM, Config
from samples import lines
from tasks.common import Example, to_batch
from tasks.marvl import Marvl
from test_resume import TINY

RED, BLUE = (220, 30, 30), (30, 30, 220)
LANGUAGES = Marvl.languages[1:]
WHO = {"annotator_info": {"annotator_id": "id_01", "gender": "male", "age": 31}, "chapter": "Animal"}


def picture(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), colour).save(path)


def nlvr2(datasets, images, split, n, folder):
    """n pairs with two sentences each; pair i shows red on the left if i is even, and on the right if i < 2 mod 4."""
    rows = []
    for i in range(n):
        left, right = i % 2 == 0, i % 4 < 2
        for j, is_red in enumerate((left, right)):
            picture(images / "nlvr2" / folder / f"{split}-{i}-0-img{j}.png", RED if is_red else BLUE)
        for k, text, label in ((0, "both are red", left and right), (1, "the left one is red", left)):
            rows.append({"validation": {"1": str(label)}, "sentence": text, "left_url": "http://a/b.jpg",
                         "label": str(label), "right_url": "http://a/c.png", "synset": "red", "query": "red2",
                         "identifier": f"{split}-{i}-0-{k}"})
    lines(datasets / "nlvr2" / "annotations" / f"{split.removesuffix('1')}.jsonl", rows)


def marvl(datasets, images, language, n=4):
    """A zero-shot file, its translation, and a few-shot file, whose names of pictures hold the concept."""
    for folder in ("zero_shot/annotations", "zero_shot/annotations_machine-translate", "few_shot/annotations"):
        (datasets / "marvl" / folder).mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        rows.append({"concept": "39-Panci", "language": language, "caption": f"{language} merah {i}",
                     "left_img": f"39-{i}.jpg", "right_img": "39-n-1.jpg", "id": f"{language}-{i}",
                     "label": i % 2 == 0} | WHO)
    for name in {row[side] for row in rows for side in ("left_img", "right_img")}:
        picture(images / "marvl-images" / language / "images" / "39-Panci" / name, RED)
        picture(images / "marvl_fewshot" / language / "all" / name, BLUE)
    lines(datasets / "marvl/zero_shot/annotations" / f"marvl-{language}.jsonl", rows)
    lines(datasets / "marvl/zero_shot/annotations_machine-translate" / f"marvl-{language}_gmt.jsonl",
          [row | {"caption": "in English"} for row in rows])
    lines(datasets / "marvl/few_shot/annotations" / f"marvl-{language}_train10x2.jsonl",
          [row | {side: f"39-Panci/{row[side]}" for side in ("left_img", "right_img")} for row in rows])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """-> (folder of the annotations, folder of the pictures)."""
    folder = tmp_path_factory.mktemp("marvl")
    datasets, images = folder / "datasets", folder / "images"
    (datasets / "nlvr2" / "annotations").mkdir(parents=True)
    for split, n, below in (("train", 8, "images/train/38"), ("dev", 4, "dev"), ("test1", 4, "")):
        nlvr2(datasets, images, split, n, below)
    for language in LANGUAGES:
        marvl(datasets, images, language)
    return datasets, images


def test_nlvr2_is_read_and_its_pictures_are_found_wherever_they_lie_below_its_folder(made):
    task = Marvl(*made)
    for split, n, below in (("train", 16, "images/train/38"), ("val", 8, "dev"), ("test", 8, "")):
        examples = task.checked(task.examples(split))
        assert len(examples) == n and [x.label for x in examples[:8]] == [1, 1, 0, 0, 0, 1, 0, 0]
        assert {path.parent for x in examples for path in x.pictures} == {made[1] / "nlvr2" / below}
    assert [path.name[-8:] for path in examples[1].pictures] == ["img0.png", "img1.png"]                 # left first
    assert examples[1].text == "the left one is red"


def test_the_lists_of_x_vlm_give_the_same_examples(made, tmp_path):
    """{"sentence", "label", "images"} with paths of another machine, and labels that may be JSON's true."""
    rows = []
    for row in (json.loads(line) for line in open(made[0] / "nlvr2" / "annotations" / "dev.jsonl")):
        pair = row["identifier"][:-2]
        rows.append({"sentence": row["sentence"], "label": row["label"] == "True" if len(rows) % 2 else row["label"],
                     "images": [f"images/nlvr2/dev/{pair}-img{side}.png" for side in (0, 1)]})
    (tmp_path / "nlvr_en").mkdir()
    (tmp_path / "nlvr_en" / "nlvr_dev.json").write_text(json.dumps(rows))
    assert Marvl(tmp_path, made[1]).examples("val") == Marvl(*made).examples("val")


def test_marvl_is_read_in_every_language_translated_and_few_shot(made):
    task = Marvl(*made)
    for language in LANGUAGES:
        pictures = made[1] / "marvl-images" / language / "images" / "39-Panci"
        test = task.checked(task.examples("test", language))
        assert test[1] == Example((pictures / "39-1.jpg", pictures / "39-n-1.jpg"), f"{language} merah 1", 0)
        assert task.examples("test", language, translated=True)[1] == test[1]._replace(text="in English")
        few = task.checked(task.examples("train", language, few_shot="10x2"))
        assert few[2].pictures[0] == made[1] / "marvl_fewshot" / language / "all" / "39-2.jpg" and few[2].label == 1


@pytest.mark.parametrize("arguments, words", [
    (("train", "id"), ["no train set in id", "--few_shot id,10x2"]),
    (("val", "tr"), ["no val set in tr"]),
    (("train", "en", "10x2"), ["marvl-en_train10x2.jsonl is missing"]),
    (("train", "sw", "1"), ["marvl-sw_train1.jsonl is missing", "e-bug/iglue", "docs/data.md"])])
def test_what_marvl_does_not_have_is_said_in_one_line(made, arguments, words):
    with pytest.raises(ValueError) as error:
        Marvl(*made).examples(*arguments)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("row", [
    {"sentence": "a", "label": "maybe", "identifier": "dev-1-0-0"}, {"sentence": "a", "label": "True"},
    {"sentence": "a", "label": "True", "images": ["one.png"]}, {"sentence": "a", "label": True, "images": [1, 2]},
    {"label": "True", "identifier": "dev-1-0-0"}])
def test_a_row_that_is_none_of_nlvr2_is_named(row, tmp_path):
    (tmp_path / "nlvr2" / "annotations").mkdir(parents=True)
    good = {"sentence": "a", "label": "True", "identifier": "dev-1-0-0"}
    path = lines(tmp_path / "nlvr2" / "annotations" / "dev.jsonl", [good, row])
    with pytest.raises(ValueError, match="row 2, is none of MaRVL, NLVR2") as error:
        Marvl(tmp_path, tmp_path).examples("val")
    assert path in str(error.value)


def test_missing_pictures_of_both_benchmarks_are_counted_and_named(made, tmp_path):
    task = Marvl(made[0], tmp_path)
    for language, first in (("en", "nlvr2/test1-0-0-img0.png and 7"), ("id", "39-0.jpg and 4")):
        with pytest.raises(ValueError, match=f"{first} more of .* are missing: MaRVL .*--image_root"):
            task.checked(task.examples("test", language))


def test_loss_and_gradients_are_those_of_two_padded_passes_and_an_mlp(made, tokenizer):
    """tests/reference.py: all sentences with their first pictures, then with their second ones."""
    torch.manual_seed(0)
    task = Marvl(*made)
    model = CCLM(Config(vocabulary=tokenizer.size, width=32, vision_layers=1, fusion_layers=2, dropout=0.0,
                        fusion_std=0.2)).double()
    model.task_head = task.head(model.config).double()
    texts = ["both are red", "one", "the left picture is blue and the right one is not"]
    examples = [Example(("", ""), text, label) for text, label in zip(texts, (1, 0, 1))]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 3, 64, 64), dtype=np.uint8)
    batch = to_batch(examples, pixels, tokenizer, 20, "cpu")
    batch["images"] = batch["images"].double()                               # (3, 2, 3, s, s), for float64 all the way

    token_ids, mask = reference.unpack(*batch["b"])                          # (3, L)
    text = reference.encode_text(model, token_ids, mask)                     # (3, L, D)
    firsts = []
    for side in (0, 1):
        image = reference.encode_image(model, normalise(batch["images"][:, side]))       # (3, P, D)
        everything = torch.ones(image.shape[:2], dtype=torch.bool)
        firsts.append(reference.fuse(model, text, mask, image, everything)[:, 0])                    # (3, D)
    logits = model.task_head(torch.cat(firsts, 1))                           # (3, 2)
    expected = F.cross_entropy(logits, torch.tensor([1, 0, 1]))
    parameters = dict(model.named_parameters())
    reference_gradients = torch.autograd.grad(expected, parameters.values(), allow_unused=True)

    assert (task.logits(model, batch) - logits).abs().max() < 1e-9
    loss = task.losses(model, batch, 0, None)["answer"]
    gradients = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
    assert abs(loss - expected) < 1e-9
    for name, ours, theirs in zip(parameters, gradients, reference_gradients):
        if theirs is None:
            assert ours is None and name.split(".")[0] in (*task.unused, "vision", "text"), name
        else:
            assert (ours - theirs).abs().max() <= 1e-9 * max(float(theirs.abs().max()), 1e-3), name


def test_fine_tuned_on_nlvr2_it_is_scored_in_the_six_languages(made, tmp_path, capsys):
    flags = ["--data", str(made[0]), "--image_root", str(made[1])]
    assert train.main(["--out", str(tmp_path / "pre"), *TINY, "--steps", "1", "--save_every", "9"]) == 0
    words = ["--task", "marvl", "--init", str(tmp_path / "pre" / "ckpt.pt"), "--batch", "8", "--workers", "0", *flags]
    assert train.main([*words, "--out", str(tmp_path / "en"), "--epochs", "2", "--validate_every", "4"]) == 0
    report = json.loads((tmp_path / "en" / "results.json").read_text())
    assert report["marvl"]["en"]["n"] == 8 and report["marvl"]["en"]["chance"] == 50
    assert set(report["marvl"]) == set(Marvl.languages)
    assert report["groups"]["marvl"]["others"]["languages"] == 5
    best = str(tmp_path / "en" / "best.pt")
    scores = ["--json", str(tmp_path / "mt.json")]
    assert evaluate.main(["marvl", "--ckpt", best, *flags, "--translate_test", *scores]) == 0
    assert set(json.loads((tmp_path / "mt.json").read_text())["marvl"]) == set(LANGUAGES)
    assert "published, few-shot 10x2" in capsys.readouterr().out
    words[3] = best
    assert train.main([*words, "--out", str(tmp_path / "tr"), "--few_shot", "tr,10x2", "--no-eval"]) == 0
