"""Contrast by tiles in torch, and who runs where."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from kernels import contrastive as module
from kernels import interpreting
from kernels.contrastive import contrastive, contrastive_torch
from kernels.reference import ALLOWED, DTYPES, contrast_errors, random_contrast

CHILD = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", DTYPES)
def test_tiles_equal_dense_float64(name, monkeypatch):
    monkeypatch.setattr(module, "TILE_ROWS", 48)
    monkeypatch.setattr(module, "TILE_COLUMNS", 80)
    for B, N, first_row in [(1, 1, 0), (2, 3, 1), (37, 91, 50), (130, 130, 0), (259, 600, 341), (48, 80, 32)]:
        for t in (0.5, 0.07, 0.02, 0.001):
            errors = contrast_errors(random_contrast(N, (B, N, first_row), t, DTYPES[name]), contrastive_torch)
            extreme = 10 if t == 0.001 and name in ("fp64", "fp32") else 1
            assert max(errors.values()) <= extreme * ALLOWED[name], (B, N, t, errors)


def test_gradcheck_in_tiles_and_with_one_matrix(monkeypatch):
    case = random_contrast(0, (4, 9, 3), 0.2, torch.float64, E=5)
    for size in (512, 3):
        monkeypatch.setattr(module, "TILE_ROWS", size)
        assert torch.autograd.gradcheck(lambda *x: contrastive_torch(*x, *case[3:]), case[:3])


def test_inputs_without_gradient_are_left_alone():
    a, b, t, *rest = random_contrast(0, (4, 9, 3), 0.2, torch.float32)
    loss = contrastive_torch(a.detach(), b, t.detach(), *rest).row_lse.sum()
    assert torch.autograd.grad(loss, b)[0].isfinite().all()
    assert not contrastive_torch(a.detach(), b.detach(), t.detach(), *rest).row_lse.requires_grad


def test_a_column_that_lost_every_row_has_gradient_zero():
    a, b, t, *_ = random_contrast(0, (3, 9, 0), 0.07, torch.float32)
    ids, all_ids = torch.full((3,), 100), torch.arange(9)
    all_ids[7] = 100
    out = contrastive_torch(a, b, t, ids, all_ids, 0)
    assert out.column_lse[7] == -torch.inf
    da, db, dt = torch.autograd.grad(out.column_lse, (a, b, t), torch.ones(9))
    assert (db[7] == 0).all() and all(x.isfinite().all() for x in (da, db, dt))


def test_ids_of_the_wrong_shape_are_refused():
    a, b, t, ids, all_ids, first_row = random_contrast(0, (3, 6, 2), 0.07, torch.float32)
    with pytest.raises(ValueError, match="ids are"):
        contrastive(a, b, t, ids[:2], all_ids, first_row)


@pytest.mark.skipif(interpreting(), reason="this process interprets kernels")
def test_a_cpu_trains_without_triton():
    code = ("import sys; sys.modules['triton'] = None; import torch; from kernels.reference import *; import losses\n"
            "assert max(attention_errors(random_attention(3, torch.float32)).values()) < 1e-5\n"
            "contrastive(*random_contrast(0, (4, 4, 0), .1, torch.float32))")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=CHILD, check=True)


def test_peak_memory_of_tiles_is_a_fraction_of_the_naive_matrix():
    """At N = 4,096; `python -m kernels.bench --only cpu` does it at 16,384."""
    def run(kind):
        command = [sys.executable, "-m", "kernels.bench", "--child", kind, "4096"]
        child = subprocess.run(command, cwd=ROOT, env=CHILD, check=True, capture_output=True, text=True)
        return json.loads(child.stdout)
    naive, tiles = run("naive"), run("tiles")
    assert tiles["bytes"] < naive["bytes"] / 6, (naive, tiles)
    assert all(tiles[key] == pytest.approx(naive[key], rel=1e-4) for key in ("gradient", "checksum", "dt"))
