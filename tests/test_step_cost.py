"""python train.py --benchmark: what it counts, computes and prints, beside numbers made by hand."""
import json
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import benchmark
import train
from model import CCLM, build

TINY = "--benchmark --workers 0 --batch 4 --text_batch 4 --width 32 --vision_layers 1 --no-stem".split()


def test_flops_of_a_linear():
    """Three products of 2 * 5 * 7 * 3: the result, and both gradients."""
    x = torch.randn(5, 7, requires_grad=True)
    weight = torch.randn(3, 7, requires_grad=True)
    assert benchmark.count_flops(lambda: F.linear(x, weight).sum().backward()) == 3 * 2 * 5 * 7 * 3


@pytest.mark.parametrize("images", [True, False])
def test_official_flops_are_those_of_the_padded_reference(images):
    """Two items, all sentences of the longest length. A forward pass is a third of a step. The projections and the
    matching head are left out of the formula."""
    args = train.settings([*TINY, "--batch", "2", "--text_batch", "2", "--caption_masked", "3", "--sentence_masked", "3"])
    model = CCLM(build("demo", width=32, vision_layers=1, stem=False))
    L = args.caption_tokens
    mask = torch.ones(2, L, dtype=torch.bool)
    ids = torch.zeros(2, L, dtype=torch.long)

    def forward():
        a, a_mask = reference.encode_text(model, ids, mask) if not images else None, mask
        if images:
            a = reference.encode_image(model, torch.zeros(2, 3, 64, 64))
            a_mask = torch.ones(a.shape[:2], dtype=torch.bool)
        b, masked = (reference.encode_text(model, ids, mask) for _ in range(2))
        for text in (b, b, b, masked):
            fused = reference.fuse(model, text, mask, a, a_mask)
        F.linear(model.mlm_head(fused[:, :3].flatten(0, 1)), model.mlm_head.weight)
    assert benchmark.official_flops(model, args, images) == 3 * benchmark.count_flops(forward)


def test_synthetic_sentences_are_as_long_as_real_ones():
    rng = np.random.default_rng(0)
    for mean in (benchmark.CAPTION, benchmark.SENTENCE):
        lengths = [len(benchmark.Synthetic(99, mean)[0, rng][1]) for _ in range(2000)]
        assert np.mean(lengths) == pytest.approx(mean, rel=0.05) and min(lengths) >= 3
    assert len(benchmark.Synthetic(99, np.inf)[0, rng][1]) > train.settings(["--preset", "large"]).sentence_tokens


def test_a_part_has_its_forward_and_its_backward_pass():
    """Of two products of equal cost, one is named, and computed again in the backward pass: four products to three."""
    model = SimpleNamespace(**{name: nn.Linear(512, 512) for name in ("vision", "text", "fusion", "other")})
    optimizer = torch.optim.AdamW(model.vision.parameters())
    x = torch.randn(2048, 512, requires_grad=True)

    def step():
        (checkpoint(model.vision, x, use_reentrant=False) + model.other(x)).sum().backward()
        optimizer.step()
    with benchmark.parts_named(model, optimizer):
        step()
        measured = [benchmark.parts_of(torch.device("cpu"), step) for _ in range(9)]
    found = measured[0]
    # The median: other programs may delay one of the times.
    assert statistics.median(x["vision"] / x["other"] for x in measured) == pytest.approx(4 / 3, rel=0.5)
    assert found["optimizer"] and not found["text"] and "forward" not in vars(model.vision)


def test_the_numbers_fit_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in {"WARM_UP": 0, "MEASURED": 1, "STEPS": 1, "product_rate": lambda *_: 1e9}.items():
        monkeypatch.setattr(benchmark, name, value)
    assert train.main([*TINY, "--json", "x.json"]) == 0
    printed = capsys.readouterr().out
    streams = json.loads((tmp_path / "x.json").read_text())["streams"]
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]          # no checkpoint, no log
    assert list(streams) == ["image", "text", "both"]
    for name, row in streams.items():
        assert name in printed and sum(row["shares"].values()) == pytest.approx(100)
        assert row["samples_per_s"] == pytest.approx(row["batch"] / row["seconds"])
        assert row["utilisation"] == pytest.approx(row["flops"] / row["seconds"] / 1e9)
        assert row["batch"] == (8 if name == "both" else 4)
