"""Training: losses fall, schedule, parameter groups, the guard, ablations."""
import csv
import math

import numpy as np
import pytest
import samples
import torch

import data
import evaluate
import train
from demo import emoji
from model import PRESETS, RECIPE, RECIPES, FusionLayer, View

TINY = ("--batch 16 --text_batch 16 --width 64 --vision_mlp 128 --text_mlp 128 --fusion_mlp 128 "
        "--vision_layers 1 --workers 0 --no-eval").split()


def rows(out):
    return list(csv.DictReader(open(out / "log.csv", newline="")))


class First:
    """The first n examples of a dataset."""

    def __init__(self, dataset, n):
        self.dataset = dataset
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        return self.dataset[key]


def test_every_loss_falls(tmp_path):
    """Forty steps over the same sixteen examples: each of the six losses ends below its start."""
    args = train.settings([*TINY, "--out", str(tmp_path), "--steps", "40", "--warmup", "5", "--lr", "5e-3", "--seed", "1"])
    run = train.prepare(args, torch.device("cpu"))
    streams = [data.Stream(First(dataset, 16), 16) for dataset in (data.DemoImages(), data.DemoParallel())]
    run.batches = data.Batches(run.objective.tokenizer, *streams, seed=1)
    train.train(run)
    log = rows(tmp_path)
    for name in run.objective.chance:
        first, last = (sum(float(r[name]) for r in part) / 5 for part in (log[:5], log[-5:]))
        assert last < first, (name, first, last)


def test_the_rate_warms_up_and_falls_to_zero():
    args = train.settings(["--steps", "100", "--warmup", "10"])
    rates = [train.lr_at(step, args) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[100] == 0 and math.isclose(rates[55], 0.5)


def rates(run):
    """{name of a parameter: (its peak rate, its weight decay)}."""
    found = {id(p): group for group in run.optimizer.param_groups for p in group["params"]}
    named = dict(run.objective.model.named_parameters())
    assert len(found) == len(named)
    return {name: (found[id(p)]["peak_lr"], found[id(p)]["weight_decay"]) for name, p in named.items()}


def test_every_tower_has_its_rate_and_vectors_do_not_decay():
    flags = ["--vision_lr", "0.5", "--text_lr", "2", "--fusion_lr", "3", "--temperature_lr", "1e-5", "--out", "nowhere"]
    run = train.prepare(train.settings([*TINY, *flags, "--lr", "1e-3"]), torch.device("cpu"))
    factors = {"vision": 0.5, "text": 2, "fusion": 3, "itm_head": 3, "temperature": 0.01}
    for name, (rate, decay) in rates(run).items():
        assert rate == pytest.approx(1e-3 * factors.get(name.split(".")[0], 1)), name
        assert (decay > 0) == (run.objective.model.get_parameter(name).ndim >= 2), name


@pytest.mark.parametrize("preset", RECIPES)
def test_a_preset_brings_its_recipe_and_a_flag_overrides_one_value(preset):
    """The run says both first. base and large are the published runs (docs/paper.md)."""
    args = train.settings(["--preset", preset, "--batch", "4"])
    assert {name: getattr(args, name) for name in RECIPES[preset]} == RECIPES[preset] | {"batch": 4}
    assert RECIPES[preset].keys() == RECIPE.keys() - {"epochs"}              # of fine-tuning
    said = " ".join(train.recipe_lines(args, PRESETS[preset].vocabulary).split())
    assert f"recipe of {preset}," in said and said.endswith("overridden: batch 4")
    if preset == "base":
        assert "steps 406614, warmup 1000, batch 480, text_batch 480, lr 4e-05, vision_lr 0.5, text_lr 2" in said


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    """It is skipped and counted; weights and moments stay; the next step is a normal one."""
    run = train.prepare(train.settings([*TINY, "--out", str(tmp_path), "--steps", "9"]), torch.device("cpu"))
    *batch, stats = run.batches[0]

    def step(weight):
        run.objective.weights["contrast"] = weight
        return train.train_step(run, batch, stats, 0)[1]
    step(1.0)
    before = {n: p.clone() for n, p in run.objective.named_parameters()}
    moments = [{k: v.clone() for k, v in s.items()} for s in run.optimizer.state.values()]
    verdict = step(float("nan"))
    assert verdict == (False, False, False)
    assert all(torch.equal(before[n], p) for n, p in run.objective.named_parameters())
    assert all(torch.equal(a[k], b[k]) for a, b in zip(moments, run.optimizer.state.values()) for k in a)
    assert step(1.0).finite and any(not torch.equal(before[n], p) for n, p in run.objective.named_parameters())


def test_validation_goes_into_the_log_by_group_of_languages(tmp_path, capsys):
    """On the val split, every --validate_every steps; the same numbers as evaluate.retrieval gives afterwards."""
    assert train.main([*TINY, "--out", str(tmp_path), "--steps", "2", "--validate_every", "2", "--log_every", "2"]) == 0
    log = rows(tmp_path)
    assert log[0]["val_seen_t2i_r1"] == "" and "val_never_i2t_r1" in capsys.readouterr().out
    model, tokenizer, _ = evaluate.load(tmp_path / "ckpt.pt")
    scores = evaluate.retrieval(model, tokenizer, emoji.split("val"), rerank=0)
    seen = [scores[k]["t2i_r1"] for k in emoji.languages("seen")]
    assert float(log[1]["val_seen_t2i_r1"]) == pytest.approx(sum(seen) / len(seen))


@pytest.mark.parametrize("flag", ["--no-parallel_text", "--no-match", "--no-condition", "--no-shared_fusion",
                                  "--translation_lm", "--checkpointing", "--chunk=5"])
def test_ablations_and_memory_savers_train_and_resume(tmp_path, flag):
    args = [*TINY, "--out", str(tmp_path), "--steps", "3", flag]
    assert train.main([*args, "--stop_after", "2"]) == 0 and train.main(args) == 0
    log = rows(tmp_path)
    assert len(log) == 3 and all(math.isfinite(float(r["loss"])) for r in log)
    assert (log[0]["text_contrast"] == "") == (flag == "--no-parallel_text")
    parts = {name.split(".")[0] for name in torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]}
    assert ("text_fusion" in parts) == (flag == "--no-shared_fusion")


def test_translation_lm_masks_a_sentence_and_its_translation_as_one_text(tmp_path):
    """Of the batch, and the loss against a sum over one joined text at a time."""
    args = train.settings([*TINY, "--out", str(tmp_path), "--translation_lm", "--dropout", "0"])
    run = train.prepare(args, torch.device("cpu"))
    model, batch = run.objective.model.eval(), run.batches[0][1]
    texts = [batch[name].token_ids.tensor_split(batch[name].starts[1:-1].long()) for name in ("a", "b", "joined")]
    assert all(torch.equal(joined, torch.cat([a, b[1:]])) for a, b, joined in zip(*texts))
    masked = batch["masked"]
    assert torch.equal(batch["joined"].token_ids[masked.positions], masked.labels)
    total = 0
    for i in range(len(batch["ids"])):
        first, end = batch["joined"].starts[i:i + 2].tolist()
        own = (masked.positions >= first) & (masked.positions < end)
        view = model.encode_text(masked.token_ids[first:end], torch.tensor([0, end - first], dtype=torch.int32), None)
        states = model.fuse(view, view, torch.tensor([0]), torch.tensor([-1]), masked.positions[own] - first)
        logits = torch.nn.functional.linear(model.mlm_head(states), model.mlm_head.weight, model.mlm_head.bias)
        total += torch.nn.functional.cross_entropy(logits, masked.labels[own], reduction="sum").item()
    got = run.objective(*run.batches[0][:2], seed=0)[1]
    assert got["text_mask"].item() == pytest.approx(total / len(masked.labels), rel=1e-5) and got["text_match"] == 0


def test_unshared_fusion_learns_apart_from_the_same_start(tmp_path):
    args = train.settings([*TINY, "--out", str(tmp_path), "--no-shared_fusion"])
    run = train.prepare(args, torch.device("cpu"))
    a, b = run.objective.model.fusion.state_dict(), run.objective.model.text_fusion.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    loss, _ = run.objective(*run.batches[0][:2], seed=0)
    loss.backward()
    run.optimizer.step()
    a, b = run.objective.model.fusion.state_dict(), run.objective.model.text_fusion.state_dict()
    assert not any(torch.equal(a[n], b[n]) for n in a if n.endswith("weight"))


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
    assert run.objective.tokenizer.model == old["tokenizer"]


def test_bf16_autocast_gives_nearly_the_losses_of_fp32(tmp_path):
    args = train.settings([*TINY, "--out", str(tmp_path)])
    run = train.prepare(args, torch.device("cpu"))
    exact = run.objective(*run.batches[0][:2], seed=0)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = run.objective(*run.batches[0][:2], seed=0)[0]
    rough.backward()
    assert abs(float((rough - exact).detach())) < 0.02 * float(exact.detach())


def test_the_fusion_encoder_and_match_head_start_wider_than_the_rest():
    args = train.settings(["--no-shared_fusion", "--fusion_std", "0.3", "--out", "nowhere"])
    model = train.prepare(args, torch.device("cpu")).objective.model
    for name, p in model.named_parameters():
        if p.ndim == 2 and "token_embedding" not in name and "positions" not in name and name != "itm_head.3.weight":
            wide = name.split(".")[0] in ("fusion", "text_fusion", "itm_head")
            assert p.std().item() == pytest.approx(0.3 if wide else 0.02, rel=0.1), name


def test_held_out_records_are_never_trained_on_and_give_recall(tmp_path, tokenizer, capsys):
    """About one in four of 22 own images is held out; training sees each of the others once an epoch."""
    path = samples.write_tar(tmp_path / "a.tar", 22)
    (tmp_path / "spm.model").write_bytes(tokenizer.model)
    words = [*TINY, "--out", str(tmp_path / "out"), "--images", path, "--no-parallel_text", "--image_size", "32",
             "--tokenizer", str(tmp_path / "spm.model"), "--held_out", "5", "--steps", "2", "--validate_every", "2"]
    run = train.prepare(train.settings(words), torch.device("cpu"))
    dataset = run.batches.streams[0].dataset
    rng = np.random.default_rng(0)
    trained = [dataset[i, rng][2] for i in range(len(dataset))]
    whole = [dataset.dataset[i, rng][2] for i in range(22)]
    held = [whole[i] for i in (3, 7, 11, 15, 19)]
    assert sorted(trained + held) == sorted(whole) and len(dataset.rows()) == 5
    assert {k for row in dataset.rows() for k in row["captions"]} == set(samples.LANGUAGES)
    assert train.main(words) == 0
    assert 0 <= float(rows(tmp_path / "out")[1]["val_all_t2i_r1"]) <= 100


def test_the_streams_have_the_limits_of_the_recipe_and_of_the_position_table():
    flags = ["--caption_tokens", "20", "--sentence_tokens", "50", "--caption_masked", "3", "--sentence_masked", "5",
             "--mask_probability", "0.3", "--batch", "6", "--text_batch", "4", "--out", "nowhere"]
    found = [train.prepare(train.settings([*flags, *more]), torch.device("cpu")).batches.streams
             for more in ([], ["--positions", "17"])]
    assert [stream[1:5] for stream in found[0]] == [(6, 20, 0.3, 3), (4, 50, 0.3, 5)]
    assert [stream[1:5] for stream in found[1]] == [(6, 15, 0.3, 3), (4, 15, 0.3, 5)]      # two rows are padding's


def test_what_an_import_had_to_initialise_learns_at_its_own_rate_also_after_a_resume(tmp_path):
    """But a tower's own rate goes before it, as published: --new_lr is for heads."""
    assert train.main([*TINY, "--out", str(tmp_path / "a"), "--steps", "1"]) == 0
    state = torch.load(tmp_path / "a" / "ckpt.pt", weights_only=True)
    state["config"]["new"] = ["vision_proj.weight", "fusion.layers.0.cross.q.weight"]
    torch.save(state, tmp_path / "a.pt")
    words = [*TINY, "--out", str(tmp_path / "b"), "--init", str(tmp_path / "a.pt"), "--new_lr", "7", "--lr", "1e-3"]
    for _ in range(2):
        found = rates(train.prepare(train.settings(words), torch.device("cpu")))
        assert found["vision_proj.weight"][0] == pytest.approx(7e-3) and found["text_proj.weight"][0] == pytest.approx(1e-3)
        assert found["fusion.layers.0.cross.q.weight"][0] == pytest.approx(2e-3)
        assert train.main([*words, "--steps", "2", "--stop_after", "1"]) == 0
        words += ["--steps", "2"]


def test_one_step_clips_and_clamps_and_seeds(tmp_path):
    """The temperature is clamped before it is used; the update's gradient has at most the norm --clip; dropout and the
    two streams draw other numbers at every step."""
    args = train.settings([*TINY, "--out", str(tmp_path), "--clip", "0.01", "--chunk", "3"])
    run = train.prepare(args, torch.device("cpu"))
    assert run.objective.model.chunk == 3 and run.optimizer.defaults["betas"] == (0.9, 0.98)
    seeds = []
    forward = run.objective.forward
    run.wrapped = lambda *batch, seed: seeds.append((seed, torch.rand(()).item())) or forward(*batch, seed=seed)
    with torch.no_grad():
        run.objective.model.temperature.fill_(2.0)
    *batch, stats = run.batches[0]
    for step in (0, 1):
        row, _ = train.train_step(run, batch, stats, step)
        assert row["temperature"] == pytest.approx(0.5, abs=1e-3)
        grads = [p.grad for p in run.objective.parameters()]
        assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(0.01, rel=1e-3)
    (first, drawn), (second, drawn_then) = seeds
    assert drawn != drawn_then and len({first, first + 1, second, second + 1}) == 4      # text draws with seed + 1


def test_dropout_differs_between_processes_and_steps(tmp_path, monkeypatch):
    """The first number that a forward pass draws, in steps 0 and 1 of processes 0 and 1 of two."""
    run = train.prepare(train.settings([*TINY, "--out", str(tmp_path)]), torch.device("cpu"))
    forward, drawn = run.objective.forward, []
    run.wrapped = lambda *batch, seed: drawn.append(torch.rand(()).item()) or forward(*batch, seed=seed)
    *batch, stats = run.batches[0]
    for rank in (0, 1):
        monkeypatch.setattr(train, "world", lambda: (rank, 2))
        for step in (0, 1):
            train.train_step(run, batch, stats, step)
    assert len(set(drawn)) == 4


def test_copies_of_a_sentence_drop_different_numbers():
    """A fusion layer in which only the self-attention's output is left: two copies of a text differ by its dropout."""
    torch.manual_seed(0)
    layer, one = FusionLayer(width=8, heads=1, mlp_width=8, eps=1e-5, dropout=0.5), torch.tensor([0, 3], dtype=torch.int32)
    for part in (layer.cross.out, layer.mlp.down):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    text, copies = View(torch.randn(3, 8), one, None, None), torch.tensor([0, 1, 2, 0, 1, 2])
    for training in (True, False):
        first, second = layer.train(training)(text.states, one, text, copies, 2 * one, text).chunk(2)
        assert torch.equal(first, second) != training


def test_a_rate_of_zero_freezes_a_tower(tmp_path):
    """Its weights stay to the bit, and it takes no part in the norm that is clipped."""
    words = [*TINY, "--out", str(tmp_path), "--steps", "3", "--vision_lr", "0"]
    before = train.prepare(train.settings(words), torch.device("cpu")).objective.model.state_dict()
    assert train.main(words) == 0
    after = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    same = {name: torch.equal(after[name], value) for name, value in before.items()}
    assert all(same[name] for name in same if name.startswith("vision."))
    assert not any(same[name] for name in same if name.endswith("mlp.up.weight") and not name.startswith("vision."))
    assert all(float(row["norm_vision"]) == 0 < float(row["norm_text"]) for row in rows(tmp_path))
