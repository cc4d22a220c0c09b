"""1, 2 and 4 gloo processes: the same losses and gradient of every parameter (dropout off, wrong partners given)."""
import os
import pathlib
import subprocess
import sys

import pytest
import torch

HERE = pathlib.Path(__file__).parent
TYPES = {"float64": torch.float64, "float32": torch.float32}


def given_wrong(N):
    """Wrong partners that stay inside every block of 1, 2 and 4 processes: the neighbour in each two, one missing."""
    wrong = torch.arange(N) ^ 1
    wrong[N // 2] = -1
    return wrong


def worker(out, spm):
    """Run under torchrun: one forward and backward of both streams through DDP, in both types; rank 0 writes losses and
    gradients."""
    sys.path.insert(0, str(HERE.parent))
    import data
    import losses
    import train
    from model import CCLM, build
    torch.set_num_threads(1)
    train.start_processes()
    rank, W = losses.world()
    args = train.settings(["--batch", "8", "--text_batch", "16"])
    tokenizer = data.Tokenizer(pathlib.Path(spm).read_bytes())

    class GivenNegatives(train.Pretraining):
        """The objective with this process's share of given negatives, in place of drawn ones."""
        def losses(self, model, a, b, masked_b, batch, seed):
            B = len(batch["ids"])
            given = given_wrong(B * W)[rank * B:(rank + 1) * B]
            given = torch.where(given < 0, given, given - rank * B)
            masked = losses.MaskedText(masked_b.states, batch["masked"].positions, batch["masked"].labels)
            return losses.cross_view(model, a, b, masked, seed, (given, given), self.options)

    found = {}
    for name, dtype in TYPES.items():
        torch.manual_seed(0)
        model = CCLM(build("demo", dropout=0.0, width=32, vision_mlp=64, text_mlp=64, fusion_mlp=64,
                           vision_layers=1, text_layers=1, fusion_layers=2, vocabulary=tokenizer.size)).to(dtype)
        with torch.no_grad():
            model.itm_head[-1].weight.normal_(std=0.2)
        objective = GivenNegatives(model, tokenizer, args)
        streams = data.Stream(data.DemoImages(), 8), data.Stream(data.DemoParallel(), 16)
        image, pair, _ = data.Batches(tokenizer, *streams, seed=3, rank=rank, world=W)[0]
        image["ids"][:] = torch.arange(rank * (8 // W), (rank + 1) * (8 // W)) // 3      # some are the same thing
        image["images"] = image["images"].to(dtype)
        wrapped = torch.nn.parallel.DistributedDataParallel(objective) if W > 1 else objective
        loss, numbers = wrapped(image, pair, seed=1)
        loss.backward()
        values = {k: losses.all_reduce(numbers[k]) / W for k in objective.chance}
        found[name] = {"losses": values, "gradients": {n: p.grad for n, p in objective.named_parameters()}}
    if rank == 0:
        torch.save(found, out)
    if W > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        os._exit(0)                                                          # as train.main ends, and for its reason


def launch(processes, out, spm):
    run = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([sys.executable, *run, __file__, str(out), str(spm)], capture_output=True, text=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, tokenizer):
    """{processes: {type: losses and gradients}}"""
    folder = tmp_path_factory.mktemp("worlds")
    spm = folder / "spm.model"
    spm.write_bytes(tokenizer.model)
    return {processes: launch(processes, folder / f"{processes}.pt", spm) for processes in (1, 2, 4)}


@pytest.mark.parametrize("dtype, allowed", [("float64", 1e-9), ("float32", 1e-4)])
def test_losses_and_gradients_do_not_depend_on_world_size(worlds, dtype, allowed):
    one = worlds[1][dtype]
    floor = 1e-6 * torch.stack([g.norm() for g in one["gradients"].values()]).norm()
    for processes in (2, 4):
        many = worlds[processes][dtype]
        for name, value in one["losses"].items():
            assert abs(float(many["losses"][name] - value)) <= allowed * abs(float(value)), (processes, name)
        for name, g in one["gradients"].items():
            error = float((many["gradients"][name] - g).norm() / torch.maximum(g.norm(), floor))
            assert error <= allowed, (processes, name, error)


if __name__ == "__main__":
    worker(*sys.argv[1:])
