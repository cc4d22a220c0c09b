"""Fine-tuned official models: imported with their classifier, and the same logits, loss and gradient of every
parameter.

tests/fixtures/official_tasks.pt holds what XVLMPlus4XVNLI and XVLMPlusForMARVL (X2-VLM, models/model_classification.py,
only sizes changed) computed in float32 on the pictures and sentences of official_x2vlm.pt: targets, logits, loss, and of
every gradient three numbers, as in test_weights.py. Their weights were drawn one after the other from one seed, so that
the file holds seed and shapes. Our side is computed in float64."""
import functools

import pytest
import torch

import data
import evaluate
import losses
import weights
from kernels.packed import offsets
from model import CCLM, Config
from published import random, x2vlm
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
    assert sum(drawn(name)[k].double().sum() for k in expected["names"]) == pytest.approx(float(expected["sum"]), abs=1e-4)
    # Official batches hold all first pictures, then all second ones; ours pictures side by side.
    images = torch.stack(inputs["image"].double().split(n), 1)               # (B, n, 3, s, s)
    text, model = inputs["t1"], model.eval().double()
    batch = {"images": images, "ids": expected["targets"],
             "b": data.Sentences(*pack(text["text_ids"][:n], text["text_atts"][:n]))}
    monkeypatch.setattr(common, "normalise", lambda pixels: pixels)          # these are
    assert error(task.logits(model, batch), expected["logits"]) < 1e-5
    loss = task.losses(model, batch, seed=0)["answer"]
    assert error(loss, expected["loss"]) < 1e-5
    loss.backward()
    errors = gradient_errors(model, file, expected, torch.float32)
    assert len(errors) == len(expected["names"]) - 5                         # key biases: zero by construction
    assert all(e < 1e-4 for e in errors.values()), max(errors, key=errors.get)
