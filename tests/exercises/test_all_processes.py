"""Exercise 3: hard negatives from all processes.

    python -m pytest tests/exercises/test_all_processes.py   fails until you have solved it

What to build
    The contrastive loss sees the items of all processes. The hard negatives of the matching loss
    are drawn among the items of ONE process, as in the official code. So a run on eight GPUs has
    easier negatives than a run with the same batch on one. Draw them among all N items: then
    cross_view on two processes is, to the last digits, cross_view on one.

    losses.py: cross_view must fuse a pair whose negative is an item of another process. The
    gradient of that negative flows back to the process that has it.

Where to read
    losses.py: AllGather, gather_vectors, "2. Match", fuse_pairs. model.py: View and CCLM.fuse.

How the test judges
    Two processes with half of the items each, against one process with all items: the losses, and
    the gradient of every parameter, in float64.

Hint
    All processes draw the same if all of them draw for all N items with the same generator; then
    each takes its own B. States are the hard part, as sentences differ in length: add zero rows up
    to the longest process, AllGather, and cut them off again. If fuse_pairs gets Views of all N
    items, its own items have the numbers rank * B to rank * B + B - 1.

Then
    How many numbers does a process of eight now receive in a step of preset base, and how many did
    it before? (480 images of 197 states of width 768, and the captions.) Is there a cheaper way?
    (Only the drawn negatives must travel.)
"""
import pytest
import torch
import torch.distributed as dist

import losses
from kernels.packed import offsets
from losses import MaskedText, cross_view
from test_packing import make

LENGTHS = (5, 2, 9, 4, 7, 3, 6, 8)
IDS = torch.tensor([0, 1, 2, 3, 4, 1, 6, 7])


def problem(kind, rank, W):
    """This process's share of eight items -> what cross_view takes of model, a, b and masked."""
    model = make()
    g = torch.Generator().manual_seed(1)
    tokens = [torch.randint(4, 60, (length,), generator=g) for length in LENGTHS]
    images = torch.randn(8, 3, 32, 32, generator=g).double()
    own = slice(rank * 8 // W, (rank + 1) * 8 // W)
    starts = offsets(torch.tensor(LENGTHS[own]))
    token_ids = torch.cat(tokens[own])
    positions = starts[:-1].long() + 1                                  # one of each sentence
    masked_ids = token_ids.index_fill(0, positions, 59)
    b = model.encode_text(token_ids, starts, None)
    masked = MaskedText(model.encode_text(masked_ids, starts, None).states, positions,
                        token_ids[positions])
    if kind == "image":
        return model, model.encode_image(images[own], IDS[own]), b, masked
    shorter = torch.cat([sentence[1:] for sentence in tokens[own]])
    a = model.encode_text(shorter, offsets(starts.diff() - 1), IDS[own])
    return model, a, b, masked


def worker(rank, W, folder):
    torch.set_num_threads(1)
    if W > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                world_size=W)
    found = {}
    for kind in ("image", "sentence"):
        model, a, b, masked = problem(kind, rank, W)
        got = cross_view(model, a, b, masked, seed=3)
        got["loss"].backward()
        found[kind] = {
            "losses": {name: losses.all_reduce(loss) / W for name, loss in got.items()},
            "gradients": {name: losses.all_reduce(p.grad) / W for name, p in
                          model.named_parameters() if p.grad is not None}}
    torch.save(found, f"{folder}/{W}.{rank}.pt")
    if W > 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """{number of processes: what each of them found}"""
    folder = str(tmp_path_factory.mktemp("worlds"))
    found = {}
    for W in (1, 2):
        torch.multiprocessing.start_processes(worker, (W, folder), nprocs=W, start_method="fork")
        found[W] = [torch.load(f"{folder}/{W}.{rank}.pt") for rank in range(W)]
    return found


@pytest.mark.parametrize("kind", ["image", "sentence"])
def test_two_processes_have_the_losses_and_gradients_of_one(worlds, kind):
    (whole,), halves = worlds[1], worlds[2]
    for half in halves:
        for name in ("losses", "gradients"):
            torch.testing.assert_close(half[kind][name], whole[kind][name], rtol=1e-9, atol=1e-12)
