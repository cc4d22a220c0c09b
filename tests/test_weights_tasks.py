"""Fine-tuned official models: imported with their classifier, and the same logits, loss and gradient of every
parameter.

tests/fixtures/official_tasks.pt holds what XVLMPlus4XVNLI and XVLMPlusForMARVL (X2-VLM, only sizes changed) computed in
float32 on the pictures and sentences of official_x2vlm.pt: targets, logits, loss, and of every gradient three numbers,
as in test_weights.py. Their weights were drawn one after the other from one seed, so the file holds seed and shapes.
Ours are computed in float64, and compared at the precision of theirs."""
import functools

import pytest
import torch

import data
import weights
from formats import layouts
from published import linear, norm, x2vlm
from tasks import TASKS, common
from test_weights import FIXTURES, HEADS, error, gradient_errors, imported, official, pack, path

CLASSIFIERS = ("xvnli", "marvl")


@functools.cache
def reference(task):
    return torch.load(FIXTURES / "official_tasks.pt", weights_only=True)[task]


def drawn(task):
    """The official state dict, as its classes had it."""
    generator = torch.Generator().manual_seed(reference(task)["seed"])
    tensors = dict(reference(task)["buffers"])
    for name, shape in reference(task)["shapes"].items():
        x = torch.randn(shape, generator=generator)
        if ".gamma_" in name:
            tensors[name] = 0.5 + 0.1 * x
        elif name.endswith(".weight") and len(shape) == 1:                   # LayerNorm
            tensors[name] = 1 + 0.1 * x
        else:
            tensors[name] = 0.12 * x
    return tensors


@pytest.fixture(params=CLASSIFIERS)
def imported_task(request, tmp_path):
    """-> (name, the official file, the checkpoint that weights.py import makes of it, its model)."""
    name = request.param
    torch.save({"model": drawn(name)}, tmp_path / "official.th")
    flags = [f"--{heads}={n}" for heads, n in HEADS.items()]
    ckpt = tmp_path / "ckpt.pt"
    assert weights.main(["import", str(tmp_path / "official.th"), "--out", str(ckpt), *flags]) == 0
    model, _ = weights.load_model(ckpt, TASKS[name]("", ""))
    return name, tmp_path / "official.th", ckpt, model


def test_a_fine_tuned_official_model_gives_the_official_numbers(imported_task, monkeypatch):
    name, file, _, model = imported_task
    expected, inputs, task = reference(name), official("x2vlm")["inputs"], TASKS[name]("", "")
    n = len(expected["targets"])
    total = sum(drawn(name)[k].double().sum() for k in expected["names"])
    assert float(total) == pytest.approx(float(expected["sum"]), abs=1e-4)   # the same numbers were drawn
    # Official batches hold all first pictures, then all second ones; ours pictures side by side.
    images = torch.stack(inputs["image"].double().split(n), 1)               # (B, n, 3, s, s)
    text, model = inputs["t1"], model.eval().double()
    batch = {"images": images, "ids": expected["targets"],
             "b": data.Sentences(*pack(text["text_ids"][:n], text["text_atts"][:n]))}
    monkeypatch.setattr(common, "normalise", lambda pixels: pixels)          # these are
    assert error(task.logits(model, batch), expected["logits"]) < 1e-5
    loss = task.losses(model, batch, 0, None)["answer"]
    assert error(loss, expected["loss"]) < 1e-5
    loss.backward()
    errors = gradient_errors(model, file, expected, torch.float32)
    assert len(errors) == len(expected["names"]) - 7                         # key biases: zero by construction
    assert all(e < 1e-4 for e in errors.values()), max(errors, key=errors.get)


def test_what_a_fine_tuned_file_lacks_is_new_and_its_task_is_known(imported_task, capsys):
    name, _, ckpt, model = imported_task
    config = torch.load(ckpt, weights_only=True)["config"]
    assert config["task"] == name
    assert {part.split(".")[0] for part in config["new"]} == {
        "vision_proj", "text_proj", "itm_head", "mlm_head", "temperature"}
    other = TASKS[next(k for k in CLASSIFIERS if k != name)]("", "")
    with pytest.raises(ValueError, match=f"not fine-tuned on {other.name}"):
        weights.load_model(ckpt, other)
    assert weights.load_model(ckpt)[0].task_head is None                     # as a retrieval model: without the head


def test_an_import_and_an_export_of_a_fine_tuned_model_keep_its_head_and_its_task(imported_task, tmp_path):
    name, _, ckpt, model = imported_task
    weights.export(ckpt, tmp_path / "folder")
    for source in (ckpt, tmp_path / "folder"):
        assert weights.main(["import", str(source), "--out", str(tmp_path / "again.pt")]) == 0
        again, state = weights.load_model(tmp_path / "again.pt", TASKS[name]("", ""))
        assert state["config"]["new"] == [] and state["config"]["task"] == name
        assert all(torch.equal(tensor, model.state_dict()[k]) for k, tensor in again.state_dict().items())


def test_heads_of_the_pre_trained_model_stay_under_the_encoders_of_a_fine_tuned_one(imported_task):
    """Two sources: projections and matching head from the first, encoders and classifier from the second."""
    name, file, _, model = imported_task
    state, _ = weights.import_sources([path("x2vlm"), file], HEADS)
    assert state["config"]["new"] == [] and state["config"]["task"] == name
    first = imported("x2vlm", torch.float32).state_dict()
    for key, tensor in state["model"].items():
        source = model.state_dict() if key.split(".")[0] in ("vision", "text", "fusion", "task_head") else first
        assert torch.equal(tensor, source[key]), key


def test_every_tensor_of_a_fine_tuned_base_model_is_used_or_unused_for_a_reason():
    """The names and shapes of CCLM-X2VLM-base after XVNLI and after MaRVL at 384 pixels, without memory."""
    for task, n, classes in (("xvnli", 1, 3), ("marvl", 2, 2)):
        tensors = {k: t for k, t in x2vlm(768, 12).items() if k.split(".")[0].endswith("_encoder")}
        tensors |= linear("cls_head.0", 1536 * n, 768 * n) | norm("cls_head.1", 1536 * n)
        tensors |= linear("cls_head.3", classes, 1536 * n)
        source = layouts.translate(tensors)
        with torch.device("meta"):
            model = weights.new_model(weights.resolve_config("base", source, {}), source)
        used, missing = layouts.adapt_to_model(source, model)
        assert source.task == task and {k for k in used if k.startswith("task_head")} == {
            f"task_head.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")}
        assert set(missing.values()) == {"no source holds this part"}
