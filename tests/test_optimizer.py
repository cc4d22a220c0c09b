"""Muon against a singular value decomposition and torch's own; AdamW's part against AdamW."""
import pytest
import torch
from torch import nn

import optimizer
import train
from model import PRESETS, CCLM
from optimizer import Muon, orthogonal, parameter_groups

RATE = 0.01
MATRICES = ("layers.0.weight", "patches.0.weight", "head.weight")     # of Small


@pytest.mark.parametrize("shape", [(8, 8), (8, 32), (32, 8), (1, 5)])
def test_orthogonal_keeps_singular_vectors_and_brings_the_values_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    values = U.T @ orthogonal(matrix) @ Vh.T                                 # the same vectors: diagonal
    assert torch.allclose(values, torch.diag(values.diagonal()), atol=1e-9)
    assert values.diagonal().min() > 0.6 and values.diagonal().max() < 1.3
    # Each value is what the polynomial makes of it.
    x = S / S.norm()
    for _ in range(5):
        a, b, c = optimizer.POLYNOMIAL
        x = a * x + b * x ** 3 + c * x ** 5
    assert torch.allclose(values.diagonal(), x)


def test_orthogonal_of_nothing_is_nothing():
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


class Small(nn.Module):
    """A layer, a convolution, and what AdamW keeps."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 24)])
        self.patches = nn.Sequential(nn.Conv2d(3, 8, 2))
        self.token_embedding = nn.Embedding(10, 16)
        self.head = nn.Linear(24, 3)


def trained(kind, steps=4):
    """A Small after some steps on random gradients, and its groups."""
    torch.manual_seed(0)
    model = Small()
    groups = parameter_groups(model, lambda name: RATE)
    own = kind(groups, betas=(0.9, 0.98))
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        own.step()
    return model, own


def test_weights_of_layers_and_convolutions_move_as_torchs_muon_moves_them():
    """torch's computes in bf16 and takes matrices alone."""
    start, model = trained(Muon, 0)[0], trained(Muon)[0]
    torch.manual_seed(0)
    same = Small()
    weights = [same.layers[0].weight, same.patches[0].weight, same.head.weight]
    flat = [nn.Parameter(p.detach().flatten(1).clone()) for p in weights]
    reference = torch.optim.Muon(flat, lr=RATE, weight_decay=0.01, momentum=optimizer.MOMENTUM,
                                 adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p in same.parameters():
            p.grad = torch.randn_like(p)
        for p, matrix in zip(weights, flat):
            matrix.grad = p.grad.flatten(1)
        reference.step()
    for name, matrix in zip(MATRICES, flat):
        own, before = model.get_parameter(name).flatten(1), start.get_parameter(name).flatten(1)
        assert (own - matrix).norm() < 0.03 * (own - before).norm(), name


def test_all_else_moves_as_with_adamw():
    muon, adamw = trained(Muon)[0], trained(torch.optim.AdamW)[0]
    moved = {name for name, p in muon.named_parameters() if not torch.equal(p, adamw.get_parameter(name))}
    assert moved == set(MATRICES)


def one_of_two(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(trained(Muon)[0].state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_work_and_move_as_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), 2)
    one = trained(Muon)[0].state_dict()
    for rank in (0, 1):
        two = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_parameter_without_a_gradient_stays():
    model, own = trained(Muon)
    own.zero_grad()
    before = {name: p.clone() for name, p in model.named_parameters()}
    own.step()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_tables_and_vectors_stay_with_adamw():
    for preset, config in PRESETS.items():
        with torch.device("meta"):
            model = CCLM(config)
        names = {id(p): name for name, p in model.named_parameters()}
        groups = parameter_groups(model, lambda name: RATE)
        others = [names[id(p)] for group in groups if not group["matrices"] for p in group["params"] if p.ndim > 1]
        tables = ("token_embedding", "positions", "token_type", "relative", "class_token", "mlm_head.weight")
        assert others and all(any(table in name for table in tables) for name in others), (preset, others)
        assert all(p.ndim > 1 for group in groups if group["matrices"] for p in group["params"])


def test_the_demo_takes_muon_and_what_is_published_takes_adamw():
    assert train.settings([]).optimizer == "muon"
    assert train.settings(["--preset", "base"]).optimizer == "adamw"
    assert train.settings(["--task", "xvnli"]).optimizer == "adamw"
