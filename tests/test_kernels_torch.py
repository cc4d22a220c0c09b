"""Contrast by tiles in torch, the draw of hard negatives, and who runs where."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from kernels import contrastive as module
from kernels import interpreting
from kernels.contrastive import contrastive, contrastive_naive, contrastive_torch, counters, draw_torch
from kernels.reference import ALLOWED, DTYPES, contrast_errors, random_contrast

CHILD = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", DTYPES)
def test_tiles_equal_dense_float64(name, monkeypatch):
    monkeypatch.setattr(module, "TILE_ROWS", 48)
    monkeypatch.setattr(module, "TILE_COLUMNS", 80)
    for B, N, first_row in [(1, 1, 0), (2, 3, 1), (37, 91, 50), (130, 130, 0), (259, 600, 341), (48, 80, 32)]:
        for t in (0.5, 0.07, 0.02, 0.001):
            errors = contrast_errors(random_contrast(N, B, N, first_row, t, DTYPES[name]), contrastive_torch)
            extreme = 10 if t == 0.001 and name in ("fp64", "fp32") else 1
            assert max(errors.values()) <= extreme * ALLOWED[name], (B, N, t, errors)


def test_gradcheck_in_tiles_and_with_one_matrix(monkeypatch):
    case = random_contrast(0, 4, 9, 3, 0.2, torch.float64, E=5)
    for size in (512, 3):
        monkeypatch.setattr(module, "TILE_ROWS", size)
        assert torch.autograd.gradcheck(lambda *x: contrastive_torch(*x, *case[3:], None)[:3], case[:3])


def test_inputs_without_gradient_are_left_alone():
    a, b, t, *rest = random_contrast(0, 4, 9, 3, 0.2, torch.float32)
    loss = contrastive_torch(a.detach(), b, t.detach(), *rest, None).row_lse.sum()
    assert torch.autograd.grad(loss, b)[0].isfinite().all() and not contrastive_torch(
        a.detach(), b.detach(), t.detach(), *rest, None).row_lse.requires_grad


def test_a_column_that_lost_every_row_has_gradient_zero():
    a, b, t, _, _, _ = random_contrast(0, 3, 9, 0, 0.07, torch.float32)
    ids, all_ids = torch.full((3, 2), 100), torch.arange(18).view(9, 2)
    all_ids[7] = 100
    out = contrastive_torch(a, b, t, ids, all_ids, 0, None)
    assert out.column_lse[7] == -torch.inf
    da, db, dt = torch.autograd.grad(out.column_lse, (a, b, t), torch.ones(9))
    assert (db[7] == 0).all() and all(x.isfinite().all() for x in (da, db, dt))


@pytest.mark.parametrize("side", [0, 1])
def test_draws_follow_the_weights(side):
    """Chi-square over 80,000 draws, 4,000 of each row."""
    B, seeds = 20, 4000
    a, b, t, ids, _, _ = random_contrast(3, B, B, 0, 0.1, torch.float64, E=8)
    ids = torch.randint(0, 2 * B, (B, 2), generator=torch.Generator().manual_seed(0)) # some `same` in either id
    weights = contrastive_naive(a, b, t, ids, ids, 0)[3 + side].detach()
    x, y = (a, b) if side == 0 else (b, a)
    if side:
        weights = weights.T
    counts = torch.zeros(B, B, dtype=torch.float64)
    for seed in range(seeds):
        chosen = draw_torch(x, y, t, ids, ids, *counters(B, 0, seed, side, "cpu"))
        counts[torch.arange(B), chosen] += 1
    expected = weights / weights.sum(1, keepdim=True) * seeds
    assert (counts[weights == 0] == 0).all() and (counts.diagonal() == 0).all() and (weights == 0).sum() > B
    cells = expected > 4
    rest = torch.stack([(x * ~cells).sum(1) for x in (counts, expected)])            # rare cells, together
    chi2 = ((counts - expected) ** 2 / expected)[cells].sum() + ((rest[0] - rest[1]) ** 2 / rest[1])[rest[1] > 4].sum()
    freedom = cells.sum() + (rest[1] > 4).sum() - B
    assert abs(chi2 - freedom) < 4 * (2 * freedom) ** 0.5, (chi2, freedom)


def test_draws_depend_on_seed_side_and_place_only(monkeypatch):
    case = random_contrast(0, 60, 130, 40, 0.5, torch.float32)
    first = contrastive_torch(*case, 7)
    monkeypatch.setattr(module, "DRAW_ELEMENTS", 60 * 7)                             # other strips, same draws
    again, other = contrastive_torch(*case, 7), contrastive_torch(*case, 8)
    assert first.wrong_a.equal(again.wrong_a) and first.wrong_b.equal(again.wrong_b)
    differ = lambda x, y: (x != y).float().mean() > 0.5
    assert differ(first.wrong_b, other.wrong_b) and differ(first.wrong_a, first.wrong_b)
    elsewhere = contrastive_torch(case[0], case[1].roll(-40, 0), *case[2:4], case[4].roll(-40, 0), 0, 7)
    assert differ(first.wrong_b, elsewhere.wrong_b)                                  # another process's races differ


def test_nothing_to_draw_is_minus_one():
    a, b, t, *_ = random_contrast(0, 3, 3, 0, 0.07, torch.float32)
    ids = torch.tensor([[0, 5], [0, 6], [1, 6]])                                     # 1 is `same` as 0 and as 2
    out = contrastive_torch(a, b, t, ids, ids, 0, 1)
    assert out.wrong_a.tolist() == out.wrong_b.tolist() == [2, -1, 0]
    assert contrastive_torch(a[:1], b[:1], t, ids[:1], ids[:1], 0, 1).wrong_a.tolist() == [-1]


def test_ids_of_the_wrong_shape_are_refused():
    a, b, t, ids, all_ids, first_row = random_contrast(0, 3, 6, 2, 0.07, torch.float32)
    with pytest.raises(ValueError, match="ids are"):
        contrastive(a, b, t, ids[:, 0], all_ids, first_row, 0)


@pytest.mark.skipif(interpreting(), reason="this process interprets kernels")
def test_a_cpu_trains_without_triton():
    code = ("import sys; sys.modules['triton'] = None; import torch; from kernels.reference import *; import losses\n"
            "assert max(attention_errors(random_attention(3, torch.float32)).values()) < 1e-5\n"
            "contrastive(*random_contrast(0, 4, 4, 0, .1, torch.float32), 1)")
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
