"""Fine-tuning on a benchmark: a made-up XVNLI in the published format, through train.py and evaluate.py."""
import json
import sys

import pytest
import torch
from PIL import Image

import evaluate
import train
from model import CCLM, Config, View
from samples import lines
from tasks import TASKS
from tasks.common import Example, Examples, encode, fused_first_tokens, to_batch
from tasks.xvnli import Xvnli
from test_resume import TINY, same

LABELS = ("contradiction", "entailment", "neutral")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
SENTENCES = {"en": "it is {}", "ar": "انه {}"}


SETS = [("en", "train"), ("en", "dev"), ("ar", "train_48"), *((k, "test") for k in Xvnli.languages)]


def xvnli(folder, n=24):
    """Squares of one colour; entailed where the sentence names it, neutral where it names none."""
    (folder / "images" / "flickr30k-images").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 40), colour).save(folder / "images" / "flickr30k-images" / f"{name}.jpg")
    for language, split in SETS:
        rows = []
        for i in range(n):
            picture = list(COLOURS)[i % 3]
            label = LABELS[i // 3 % 3]
            word = {"entailment": picture, "contradiction": list(COLOURS)[(i + 1) % 3], "neutral": "nice"}[label]
            rows.append({"gold_label": label, "sentence1": "a square", "sentence2": SENTENCES.get(language, '{}').format(word),
                         "Flikr30kID": picture})
        rows.append(rows[0] | {"gold_label": "-"})
        path = folder / "datasets" / "XVNLI" / "annotations" / language / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines(path, rows)
    return ["--data", str(folder / "datasets"), "--image_root", str(folder / "images")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """-> (folder, what train.py and evaluate.py take, a checkpoint of two steps of pre-training)."""
    folder = tmp_path_factory.mktemp("xvnli")
    flags = xvnli(folder)
    assert train.main(["--out", str(folder / "pre"), *TINY, "--steps", "2", "--save_every", "9"]) == 0
    return folder, flags, folder / "pre" / "ckpt.pt"


def fine_tune(made, out, *more):
    _, flags, init = made
    return train.main(["--task", "xvnli", "--init", str(init), "--out", str(out), *flags, "--batch", "8", "--epochs", "4",
                       "--workers", "0", "--log_every", "4", *more])


def test_the_readers_find_text_picture_and_label(made):
    task = Xvnli(made[0] / "datasets", made[0] / "images")
    test = task.examples("test", "ar")
    assert len(test) == 25 and [x.label for x in test[:10:3]] == [0, 1, 2, 0] and test[-1].label == -1
    assert test[0] == Example((made[0] / "images" / "flickr30k-images" / "red.jpg",), "انه green", 0)
    assert len(task.examples("train")) == 24                                 # "-" trains nobody
    assert len(task.examples("train", "ar", few_shot="48")) == 24
    premise = TASKS["xvnli_premise"](made[0] / "datasets", made[0] / "images").examples("val")
    assert premise[0].text == "a square it is green"


def test_first_tokens_of_two_pictures_are_those_of_each_alone(made, tokenizer):
    """The packed batch against one fusion pass for every sentence and picture."""
    torch.manual_seed(0)
    model = CCLM(Config(vocabulary=tokenizer.size, width=32, vision_layers=1)).double().eval()
    paths = sorted((made[0] / "images" / "flickr30k-images").iterdir())
    examples = [Example((paths[0], paths[1]), "a red ball", 1), Example((paths[2], paths[0]), "dog", 0)]
    dataset = Examples(examples, 64)
    batch = to_batch(examples, [dataset.whole(0), dataset.whole(1)], tokenizer, 20, "cpu")
    batch["images"] = batch["images"].double()
    texts, images = encode(model, batch)
    got = fused_first_tokens(model, texts, images)                           # (2, 2 D)
    for i in range(2):
        sentence = slice(texts.starts[i], texts.starts[i + 1])
        text = View(texts.states[sentence], texts.starts[i:i + 2] - texts.starts[i], None, None)
        for j in range(2):
            begin, end = images.starts[2 * i + j:2 * i + j + 2]
            image = View(images.states[begin:end], torch.tensor([0, end - begin], dtype=torch.int32), None, None)
            zero = torch.zeros(1, dtype=torch.long)
            alone = model.fuse(text, image, zero, zero)[0]
            assert torch.allclose(got[i].view(2, -1)[j], alone, rtol=1e-10, atol=1e-12)


def test_fine_tuning_learns_and_its_best_checkpoint_is_tested(made, tmp_path, capsys):
    assert fine_tune(made, tmp_path, "--lr", "3e-3", "--epochs", "20") == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    english = results["xvnli"]["en"]
    assert english["accuracy"] > 60 and english["n"] == 24 and english["chance"] == 100 / 3
    assert english["accuracy_all_lines"] == pytest.approx(english["accuracy"] * 24 / 25)
    assert "published, zero-shot" in printed and (tmp_path / "best.pt").exists()


def test_evaluate_gives_the_results_of_the_run(made, tmp_path):
    assert fine_tune(made, tmp_path, "--no-eval", "--languages", "en") == 0
    for name in ("a", "b"):
        words = ["xvnli", "--ckpt", str(tmp_path / "best.pt"), *made[1], "--languages", "en", "ar"]
        assert evaluate.main([*words, "--json", str(tmp_path / f"{name}.json")]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert report == json.loads((tmp_path / "b.json").read_text())
    assert report["groups"]["xvnli"]["others"]["accuracy"] == report["xvnli"]["ar"]["accuracy"]


def test_an_interrupted_evaluation_goes_on_after_its_last_language(made, tmp_path, monkeypatch, capsys):
    assert fine_tune(made, tmp_path, "--no-eval") == 0
    words = ["xvnli", "--ckpt", str(tmp_path / "best.pt"), *made[1], "--json", str(tmp_path / "a.json")]
    scores, asked = Xvnli.scores, []

    def until_fr(task, model, tokenizer, split, language, translated=False):
        asked.append(language)
        if language == "fr" and asked.count("fr") == 1:
            raise ValueError("the power went")
        return scores(task, model, tokenizer, split, language, translated)

    monkeypatch.setattr(Xvnli, "scores", until_fr)
    assert evaluate.main(words) == 2 and evaluate.main(words) == 0
    assert asked == ["en", "ar", "es", "fr", "fr", "ru"] and not list(tmp_path.glob("*.partial"))
    assert list(json.loads((tmp_path / "a.json").read_text())["xvnli"]) == list(Xvnli.languages)


def test_a_stopped_fine_tuning_resumes_bitwise(made, tmp_path):
    assert fine_tune(made, tmp_path / "whole", "--no-eval", "--dropout", "0.1") == 0
    assert fine_tune(made, tmp_path / "parts", "--no-eval", "--dropout", "0.1", "--stop_after", "5") == 0
    assert fine_tune(made, tmp_path / "parts", "--no-eval", "--dropout", "0.1") == 0
    same(tmp_path / "whole", tmp_path / "parts")
    best = [torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("whole", "parts")]
    assert best[0]["step"] == best[1]["step"]
    assert all(torch.equal(tensor, best[1]["model"][name]) for name, tensor in best[0]["model"].items())


def test_few_shot_goes_on_from_a_fine_tuned_head(made, tmp_path, capsys):
    assert fine_tune(made, tmp_path / "en", "--no-eval") == 0
    capsys.readouterr()
    again = (made[0], made[1], tmp_path / "en" / "best.pt")
    assert fine_tune(again, tmp_path / "ar", "--few_shot", "ar,48", "--no-eval", "--lr", "1e-9") == 0
    assert "task_head" not in capsys.readouterr().out.split("new:")[1].split("\n")[0]
    old, new = (torch.load(tmp_path / k / "best.pt", weights_only=True)["model"] for k in ("en", "ar"))
    assert torch.allclose(old["task_head.0.weight"], new["task_head.0.weight"], atol=1e-6)


def test_parts_that_a_task_does_not_use_stay_as_they_are(made, tmp_path):
    assert fine_tune(made, tmp_path, "--no-eval") == 0
    old = torch.load(made[2], weights_only=True)["model"]
    new = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    for name, tensor in old.items():
        frozen = name.split(".")[0] in Xvnli.unused and name != "mlm_head.weight"        # the word embedding
        assert not frozen or torch.equal(tensor, new[name]), name
    assert not torch.equal(old["fusion.layers.0.cross.q.weight"], new["fusion.layers.0.cross.q.weight"])
