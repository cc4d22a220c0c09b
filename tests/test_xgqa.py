"""xGQA: the decoder and the ranking of answers against one forward pass for each question and answer."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import train
from model import CCLM, Config
from tasks.common import Examples, to_batch
from tasks.xgqa import Xgqa, XgqaClassifier, build_trie, wanted_nodes
from test_resume import TINY

ANSWERS = ["yes", "no", "red", "red apple", "red apples and pears", "green apple", "light bulb", "light"]
COLOURS = {"n1": (220, 30, 30), "n2": (30, 200, 30), "n3": (240, 240, 240)}


def gqa(folder, n=24):
    """GQA's lists and xGQA's dicts, with an answer that the list does not have."""
    images = folder / "images" / "gqa"
    images.mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 40), colour).save(images / f"{name}.jpg")
    root = folder / "datasets"
    (root / "gqa" / "annotations").mkdir(parents=True)
    answers = {answer: 100 - i for i, answer in enumerate(ANSWERS)}
    (root / "gqa" / "annotations" / "trainval_ans2label.json").write_text(json.dumps(answers))
    said = {"n1": "red", "n2": "green apple", "n3": "nobody says so"}
    rows = [(str(i), list(COLOURS)[i % 3], "what is to the left" if i % 2 else "what is it") for i in range(n)]
    for name in ("train", "valid"):
        questions = [{"img_id": k, "sent": q, "question_id": i, "label": {said[k]: 1.0}} for i, k, q in rows]
        (root / "gqa" / "annotations" / f"{name}.json").write_text(json.dumps(questions))
    for language in Xgqa.languages:
        path = root / "xGQA" / "annotations" / "few_shot" / language / "test.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({i: {"imageId": k, "question": q, "answer": said[k]} for i, k, q in rows}))
    return root, folder / "images"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return gqa(tmp_path_factory.mktemp("gqa"))


@pytest.fixture
def ready(made, tokenizer):
    """-> (task, model with a decoder that begins as its fusion encoder, a batch of six questions)."""
    torch.manual_seed(0)
    model = CCLM(Config(vocabulary=tokenizer.size, width=32, vision_layers=1, fusion_layers=2, init_std=0.2,
                        embedding_std=0.5, dropout=0.0)).double().eval()
    task = Xgqa(*made)
    model.task_head = task.head(model.config).double()
    task.begin(model)
    examples = task.examples("test", "de")[:6]
    dataset = Examples(examples, 64)
    batch = to_batch(examples, [dataset.whole(i) for i in range(6)], tokenizer, 40, "cpu")
    return task, model, batch | {"images": batch["images"].double()}


def step_by_step(model, state, pieces):
    """log P of each piece, and of </s> at the end, by one padded pass over "<s> pieces": naive_attention has a
    triangle as its mask, and no prefix is shared."""
    decoder = model.task_head
    token = torch.tensor([0, *pieces])
    x = decoder.norm(decoder.token_embedding(token) + decoder.positions(torch.arange(len(token)) + decoder.offset))

    def attend(module, x, y, mask):
        q, k, v = (linear(z).unflatten(1, (module.heads, -1)).transpose(0, 1)
                   for linear, z in ((module.q, x), (module.k, y), (module.v, y)))
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(mask, -torch.inf)
        return module.out((scores.softmax(2) @ v).transpose(0, 1).flatten(1))

    for layer in decoder.layers:
        future = torch.ones(len(token), len(token), dtype=torch.bool).triu(1)
        x = layer.norm1(x + attend(layer.attention, x, x, future))
        x = layer.cross_norm(x + attend(layer.cross, x, state, torch.zeros(len(token), len(state), dtype=torch.bool)))
        x = layer.norm2(x + layer.mlp(x))
    head = decoder.lm_head
    log_p = F.linear(head(x), head.weight, head.bias).log_softmax(1)
    return log_p[torch.arange(len(token)), torch.tensor([*pieces, 2])]


def naive(task, model, batch, tokenizer):
    """-> log P of the first piece and of the whole answer, (B, A) each."""
    question = task.question(model, batch)
    pieces = [tokenizer.encode(answer)[1:-1] for answer in ANSWERS]
    found = [[step_by_step(model, question.states[first:end], some) for some in pieces]
             for first, end in zip(question.starts, question.starts[1:])]
    return [torch.stack([torch.stack([kind(x) for x in row]) for row in found]) for kind in (lambda x: x[0], torch.sum)]


def test_a_trie_has_every_prefix_once_and_parents_first():
    trie = build_trie([[5], [5, 6], [7, 6], [5, 6, 9]])
    assert trie.token.tolist() == [0, 5, 6, 7, 6, 9] and trie.depth.tolist() == [0, 1, 2, 1, 2, 3]
    assert trie.path.tolist() == [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1], [0, 3, -1, -1], [0, 3, 4, -1],
                                  [0, 1, 2, 5]]
    assert trie.last.tolist() == [1, 2, 4, 5]
    nodes = wanted_nodes(trie, torch.tensor([[0, 1], [2, 2]]))
    assert nodes.number.tolist() == [0, 1, 2, 0, 3, 4] and nodes.starts.tolist() == [0, 3, 6]
    assert nodes.path[:, :3].tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2], [3, -1, -1], [3, 4, -1], [3, 4, 5]]


@pytest.mark.parametrize("k", [3, 128])
def test_the_ranking_is_that_of_one_pass_for_each_question_and_answer(ready, tokenizer, k, monkeypatch):
    task, model, batch = ready
    monkeypatch.setattr(Xgqa, "k", k)
    monkeypatch.setattr("tasks.xgqa.PIECE", 5)                               # logits in several pieces
    first, whole = naive(task, model, batch, tokenizer)
    with torch.no_grad():
        best, log_first, log_answer = task.rank(model, batch, task.trie(tokenizer, torch.device("cpu")))
    assert torch.allclose(log_first, first.topk(min(k, len(ANSWERS))).values, rtol=1e-9)
    assert torch.allclose(first.gather(1, best), log_first, rtol=1e-9)
    assert torch.allclose(whole.gather(1, best), log_answer, rtol=1e-9)


def test_the_loss_is_minus_log_p_of_the_true_answers(ready, tokenizer):
    task, model, batch = ready
    batch["ids"] = torch.tensor([0, 3, 4, 4, 6, 7])
    _, whole = naive(task, model, batch, tokenizer)
    wanted = -whole.gather(1, batch["ids"][:, None]).mean()
    names = [name for name, p in model.named_parameters() if name.split(".")[0] not in Xgqa.unused]
    parameters = [dict(model.named_parameters())[name] for name in names]
    got = task.losses(model, batch, 0, tokenizer)["answer"]
    assert got.item() == pytest.approx(wanted.item(), rel=1e-9)
    for name, x, y in zip(names, torch.autograd.grad(got, parameters), torch.autograd.grad(wanted, parameters)):
        assert (x - y).norm() <= 1e-8 * max(1e-3, y.norm()), name


def test_readers_know_both_layouts_and_answers_outside_the_list(made, capsys):
    task = Xgqa(*made)
    test = task.examples("test", "bn")
    assert len(test) == 24 and [x.label for x in test[:3]] == [2, 5, -1]
    assert [x.mirror for x in test[:2]] == [True, False]                     # "left" is asked
    assert len(task.examples("train")) == 16 and "8 questions are left out" in capsys.readouterr().err
    assert len(task.examples("val")) == 24


@pytest.mark.parametrize("name", ["xgqa", "xgqa_classifier"])
def test_both_models_learn_the_questions_of_three_pictures(made, tmp_path, name):
    assert train.main(["--out", str(tmp_path / "pre"), *TINY, "--steps", "2", "--save_every", "9"]) == 0
    words = ["--data", str(made[0]), "--image_root", str(made[1])]
    assert train.main(["--task", name, "--init", str(tmp_path / "pre" / "ckpt.pt"), "--out", str(tmp_path), *words, "--lr",
                       "3e-3", "--batch", "8", "--epochs", "60", "--validate_every", "60", "--workers", "0", "--no-eval",
                       "--dropout", "0"]) == 0
    assert evaluate.main([name, "--ckpt", str(tmp_path / "best.pt"), *words, "--languages", "en", "--json",
                          str(tmp_path / "a.json")]) == 0
    scores = json.loads((tmp_path / "a.json").read_text())[name]["en"]
    assert max(scores.get("accuracy_plain", 0), scores.get("accuracy_all_lines", 0)) > 60   # 2 of 3 have a right answer


def test_no_question_and_an_empty_list_are_one_line(made, tmp_path, tokenizer):
    task = Xgqa(tmp_path, made[1])
    path = tmp_path / "xGQA" / "annotations" / "few_shot" / "de" / "test.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no question"):
        task.scores(None, tokenizer, "test", "de")
    with pytest.raises(ValueError, match="trainval_ans2label.json is missing"):
        XgqaClassifier(tmp_path, made[1]).classes
