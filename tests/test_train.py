"""Training: losses fall, schedule, parameter groups, the guard, ablations."""
import csv
import math

import pytest
import torch

import data
import train
from model import CCLM, build, parameter_groups

TINY = ("--batch 16 --text_batch 16 --width 64 --vision_mlp 128 --text_mlp 128 --fusion_mlp 128 "
        "--vision_layers 1 --workers 0 --no-eval").split()


def rows(out):
    return list(csv.DictReader(open(out / "log.csv", newline="")))


def test_every_loss_falls(tmp_path):
    """Forty steps over the same few examples: each of the six losses ends below its start."""
    args = [*TINY, "--out", str(tmp_path), "--steps", "40", "--warmup", "5", "--lr", "5e-3", "--seed", "1"]
    source = data.DemoImages.__len__
    data.DemoImages.__len__ = lambda self: 16                                # one batch an epoch, to learn by heart
    try:
        assert train.main(args) == 0
    finally:
        data.DemoImages.__len__ = source
    log = rows(tmp_path)
    for name in (f"{s}_{n}" for s in ("image", "text") for n in ("contrast", "match", "mask")):
        first, last = (sum(float(r[name]) for r in part) / 5 for part in (log[:5], log[-5:]))
        assert last < first, (name, first, last)


def test_the_rate_warms_up_and_falls_to_zero():
    args = train.settings(["--steps", "100", "--warmup", "10"])
    rates = [train.lr_at(step, args) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[100] == 0 and math.isclose(rates[55], 0.5)


def test_vectors_do_not_decay_and_the_temperature_has_its_own_rate(tokenizer):
    model = CCLM(build("demo", vocabulary=tokenizer.size))
    groups = parameter_groups(model, lr=1e-3, new={"itm_head.0.weight"})
    found = {id(p): g for g in groups for p in g["params"]}
    assert len(found) == len(list(model.parameters()))
    assert found[id(model.temperature)]["lr"] == 1e-4 and found[id(model.itm_head[0].weight)]["lr"] == 2e-3
    assert all((g["weight_decay"] > 0) == (p.ndim >= 2) for g in groups for p in g["params"])


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    """It is skipped and counted; weights and moments stay; the next step is a normal one."""
    args = train.settings([*TINY, "--out", str(tmp_path), "--steps", "9"])
    run = train.prepare(args, torch.device("cpu"))
    batch, context = run.batches[0][:2], torch.autocast("cpu", enabled=False)
    step = lambda weight: (run.objective.weights.update(contrast=weight), train.train_step(
        run.objective, run.objective, run.optimizer, batch, 0, args, context, False, (0, 0, False)))[1]
    step(1.0)
    before = {n: p.clone() for n, p in run.objective.named_parameters()}
    moments = [{k: v.clone() for k, v in s.items()} for s in run.optimizer.state.values()]
    _, skipped, stop, _ = step(float("nan"))
    assert skipped and not stop and all(torch.equal(before[n], p) for n, p in run.objective.named_parameters())
    assert all(torch.equal(a[k], b[k]) for a, b in zip(moments, run.optimizer.state.values()) for k in a)
    assert not step(1.0)[1] and any(not torch.equal(before[n], p) for n, p in run.objective.named_parameters())


@pytest.mark.parametrize("flag", ["--no-parallel_text", "--no-match", "--no-condition", "--no-shared_fusion",
                                  "--checkpointing", "--chunk=5"])
def test_ablations_and_memory_savers_train_and_resume(tmp_path, flag):
    args = [*TINY, "--out", str(tmp_path), "--steps", "3", flag]
    assert train.main([*args, "--stop_after", "2"]) == 0 and train.main(args) == 0
    log = rows(tmp_path)
    assert len(log) == 3 and all(math.isfinite(float(r["loss"])) for r in log)
    assert (log[0]["text_contrast"] == "") == (flag == "--no-parallel_text")
    parts = {name.split(".")[0] for name in torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]}
    assert ("text_fusion" in parts) == (flag == "--no-shared_fusion")


def test_unshared_fusion_learns_apart_from_the_same_start(tmp_path):
    args = train.settings([*TINY, "--out", str(tmp_path), "--no-shared_fusion"])
    run = train.prepare(args, torch.device("cpu"))
    a, b = run.objective.model.fusion.state_dict(), run.objective.model.text_fusion.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    losses = run.objective(*run.batches[0][:2], seed=0)
    losses["text"]["loss"].backward()
    assert all(p.grad is None for p in run.objective.model.fusion.parameters())
    assert all(p.grad is not None for p in run.objective.model.text_fusion.parameters())


def test_an_unshared_run_that_starts_from_a_shared_checkpoint_has_its_fusion_encoder_twice(tmp_path):
    assert train.main([*TINY, "--out", str(tmp_path / "a"), "--steps", "1"]) == 0
    args = train.settings([*TINY, "--out", str(tmp_path / "b"), "--init", str(tmp_path / "a" / "ckpt.pt"),
                           "--no-shared_fusion"])
    model = train.prepare(args, torch.device("cpu")).objective.model
    old = torch.load(tmp_path / "a" / "ckpt.pt", weights_only=True)["model"]
    for name, p in model.fusion.state_dict().items():
        assert torch.equal(p, old["fusion." + name]) and torch.equal(p, model.text_fusion.state_dict()[name])


def test_a_new_run_can_start_from_a_checkpoint(tmp_path):
    assert train.main([*TINY, "--out", str(tmp_path / "a"), "--steps", "1"]) == 0
    args = train.settings([*TINY, "--out", str(tmp_path / "b"), "--init", str(tmp_path / "a" / "ckpt.pt")])
    run, old = train.prepare(args, torch.device("cpu")), torch.load(tmp_path / "a" / "ckpt.pt", weights_only=True)
    assert run.step == 0 and all(torch.equal(p, old["model"][n]) for n, p in run.objective.model.state_dict().items())
    assert run.tokenizer.model == old["tokenizer"]


def test_bf16_autocast_gives_nearly_the_losses_of_fp32(tmp_path):
    args = train.settings([*TINY, "--out", str(tmp_path)])
    run = train.prepare(args, torch.device("cpu"))
    exact = run.objective(*run.batches[0][:2], seed=0)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = run.objective(*run.batches[0][:2], seed=0)["loss"]
    rough.backward()
    assert abs(float((rough - exact).detach())) < 0.02 * float(exact.detach())


def test_the_fusion_encoder_and_match_head_start_wider_and_learn_faster_than_the_rest():
    args = train.settings(["--no-shared_fusion", "--fusion_std", "0.3", "--fusion_lr", "3", "--out", "nowhere"])
    run = train.prepare(args, torch.device("cpu"))
    rate = {id(p): group["peak_lr"] for group in run.optimizer.param_groups for p in group["params"]}
    for name, p in run.objective.named_parameters():
        if name.endswith("temperature"):
            assert rate[id(p)] == args.temperature_lr
            continue
        special = name.split(".")[1] in ("fusion", "text_fusion", "itm_head")
        assert rate[id(p)] == pytest.approx(3e-3 if special else 1e-3), name
        if p.ndim == 2 and "token_embedding" not in name and "positions" not in name and name != "model.itm_head.3.weight":
            assert p.std().item() == pytest.approx(0.3 if special else 0.02, rel=0.1), name
