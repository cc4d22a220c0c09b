"""The losses: chance levels, exact gradients, wrong partners."""
import math

import pytest
import torch
import torch.nn.functional as F

import losses
from kernels.packed import offsets
from losses import (MaskedText, Options, contrastive_loss, cross_view, global_means, hard_negatives, masked_lm_loss,
                    matching_loss)
from model import View
from test_packing import example, make, packed_losses


def views(B=12, E=16, seed=0, ids=None):
    g = torch.Generator().manual_seed(seed)
    ids = torch.arange(B) if ids is None else ids
    return [View(None, None, F.normalize(torch.randn(B, E, generator=g, dtype=torch.float64), dim=-1), ids)
            for _ in range(2)]


def test_an_untrained_model_is_at_chance():
    """Mean of three seeds: contrast within 5 % of ln N, mask within 5 % of ln V, match 0.6931."""
    tables = [losses.sanity_table(seed=seed) for seed in range(3)]
    for name, allowed in (("contrast", 0.05), ("mask", 0.05), ("match", 1e-6)):
        got, chance = (sum(dict((row[0], row[i]) for row in table)[name] for table in tables) / 3 for i in (1, 2))
        chance = math.log(2) if name == "match" else chance
        assert abs(got / chance - 1) < allowed, (name, got, chance)


def test_contrast_equals_two_cross_entropies():
    a, b = views()
    t = torch.tensor(0.07, dtype=torch.float64)
    logits = a.vectors @ b.vectors.T / t
    expected = (F.cross_entropy(logits, a.ids) + F.cross_entropy(logits.T, a.ids)) / 2
    assert abs(float(contrastive_loss(a, b, t) - expected)) < 1e-12


def test_same_things_are_neither_positives_nor_negatives():
    """The loss is that of the matrix without pairs of equal ids."""
    a, b = views(6, ids=torch.tensor([0, 0, 1, 2, 2, 3]))
    t = torch.tensor(0.1, dtype=torch.float64)
    logits = a.vectors @ b.vectors.T / t
    for i, j in ((0, 1), (1, 0), (3, 4), (4, 3)):
        logits[i, j] = -torch.inf
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    assert abs(float(contrastive_loss(a, b, t) - expected)) < 1e-12


def test_positive_same_things_share_the_label():
    """Soft labels = equal ids / row sum, in both directions."""
    ids = torch.tensor([0, 1, 0, 2, 0, 1])
    a, b = views(6, ids=ids)
    t = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    a.vectors.requires_grad_(), b.vectors.requires_grad_()
    labels = (ids[:, None] == ids).double()
    labels /= labels.sum(1, keepdim=True)
    logits = a.vectors @ b.vectors.T / t
    expected = -((labels * logits.log_softmax(1)).sum() + (labels * logits.T.log_softmax(1)).sum()) / 12
    wanted = torch.autograd.grad(expected, (a.vectors, b.vectors, t))
    got = contrastive_loss(a, b, t, same="positive")
    assert abs(float((got - expected).detach())) < 1e-12
    for x, y in zip(torch.autograd.grad(got, (a.vectors, b.vectors, t)), wanted):
        assert torch.allclose(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [0, 1])
def test_hard_negatives_follow_the_stated_weights(side):
    """Chi-square of 4,000 draws per row against softmax + 1e-5 with itself and `same` at 0; never a forbidden pair.
    Side 0 draws an a for every b: its softmax is over a column of the logits."""
    ids = torch.tensor([0, 1, 2, 1, 3, 4, 5, 6])
    a, b = views(8, E=4, ids=ids)
    t, draws = torch.tensor(0.5, dtype=torch.float64), 4000
    logits = a.vectors @ b.vectors.T / t
    weights = (logits if side else logits.T).softmax(1) + 1e-5
    forbidden = ids[:, None] == ids
    weights = weights.masked_fill(forbidden, 0)
    counts = torch.zeros(8, 8, dtype=torch.float64)
    for seed in range(draws):
        counts[torch.arange(8), hard_negatives(a, b, t, seed)[side]] += 1
    assert counts[forbidden].sum() == 0
    expected = draws * weights / weights.sum(1, keepdim=True)
    chi2 = ((counts - expected).square() / expected.clamp(min=1e-9))[~forbidden].sum()
    freedom = int((~forbidden).sum()) - 8
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom), (float(chi2), freedom)


def test_hard_negatives_depend_on_seed_rank_and_side_only(monkeypatch):
    a, b = views(60)
    t = torch.tensor(0.5, dtype=torch.float64)
    first, again, other = (torch.stack(hard_negatives(a, b, t, seed)) for seed in (7, 7, 8))
    monkeypatch.setattr(losses, "world", lambda: (1, 2))
    elsewhere = torch.stack(hard_negatives(a, b, t, 7))                      # another process draws by itself
    differ = lambda x, y: (x != y).float().mean() > 0.5
    assert first.equal(again)
    assert differ(first, other) and differ(first, elsewhere) and differ(first[0], first[1])


def test_a_row_without_a_negative_gets_minus_one():
    t = torch.tensor(0.07, dtype=torch.float64)
    one_thing, single = views(3, ids=torch.tensor([4, 4, 4])), views(1)
    two_things = views(3, ids=torch.tensor([4, 4, 5]))
    assert [x.tolist() for x in hard_negatives(*one_thing, t, 0)] == [[-1, -1, -1]] * 2
    assert [x.tolist() for x in hard_negatives(*single, t, 0)] == [[-1]] * 2
    assert all(x[:2].tolist() == [2, 2] and int(x[2]) in (0, 1) for x in hard_negatives(*two_things, t, 0))


def test_match_leaves_out_items_without_a_wrong_partner():
    logits = torch.randn(9, 2, dtype=torch.float64)
    wrong = torch.tensor([1, -1, 0]), torch.tensor([2, 0, -1])               # each side lacks another one
    expected = F.cross_entropy(logits[[0, 3, 6]], torch.tensor([1, 0, 0]))
    got, = global_means(matching_loss(lambda x: x, logits, wrong))
    assert abs(float(got - expected)) < 1e-12


def test_a_batch_of_one_and_a_sentence_without_hidden_words_do_not_crash():
    """Nothing to contrast, no wrong partner, nothing hidden: all losses 0, and every parameter still has a gradient."""
    model = make()
    images, words, starts, masked, *_ = example(model, lengths=(3,))
    rows = torch.empty(0, dtype=torch.long)
    a = model.encode_image(images, torch.tensor([7]))
    got = packed_losses(model, a, words, starts, masked, rows, torch.tensor([7]), None)
    assert [float(got[name].detach()) for name in ("contrast", "match", "mask")] == [0, 0, 0]
    got["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_without_match_no_pair_is_fused_and_every_parameter_takes_part():
    model = make()
    images, words, starts, masked, rows, ids = example(model)
    a, b = model.encode_image(images, ids), model.encode_text(words, starts, ids)
    options = Options(weights={"contrast": 1.0, "match": 0.0, "mask": 1.0})
    states = model.encode_text(masked, starts, ids).states
    got = cross_view(model, a, b, MaskedText(states, rows, words[rows]), 0, options=options)
    got["loss"].backward()
    assert float(got["match"].detach()) == 0 and all(p.grad is not None for p in model.parameters())


def test_without_condition_hidden_words_do_not_see_a():
    model = make()
    images, words, starts, masked, rows, ids = example(model)
    b, hidden = model.encode_text(words, starts, ids), model.encode_text(masked, starts, ids)
    hidden = MaskedText(hidden.states, rows, words[rows])
    negatives = torch.arange(5).roll(1), torch.arange(5).roll(2)              # given: drawn ones depend on the images
    mask = [float(cross_view(model, model.encode_image(x, ids), b, hidden, 0, negatives,
                             Options(condition=c))["mask"].detach())
            for c in (True, False) for x in (images, -images)]
    assert mask[0] != mask[1] and mask[2] == mask[3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, losses.PIECE, losses.PIECE + 1, 2 * losses.PIECE + 100])
def test_masked_lm_equals_the_plain_loss_on_both_sides_of_a_piece(rows, dtype):
    """The plain loss: log-softmax in float32 of the logits that autocast's product gives. bfloat16: a gradient of
    several pieces is rounded once a piece, 2 ** -9 each."""
    g = torch.Generator().manual_seed(0)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    wide = torch.float64 if dtype == torch.float64 else torch.float32        # bf16: parameters are float32, products not
    head = torch.nn.Identity()
    head.weight, head.bias = (torch.nn.Parameter(torch.randn(*shape, generator=g, dtype=wide)) for shape in ((3000, 32), (3000,)))
    x = torch.randn(rows, 32, generator=g, dtype=wide, requires_grad=True)
    labels = torch.randint(3000, (rows,), generator=g)
    with autocast:
        got, = global_means(masked_lm_loss(head, x, labels))
        logits = F.linear(x, head.weight, head.bias)
        plain = F.cross_entropy(losses.at_least_float32(logits), labels, reduction="sum") / max(rows, 1)
    assert got.dtype == wide and logits.dtype == dtype
    assert torch.allclose(got, plain, rtol=1e-14 if wide == torch.float64 else 1e-6, atol=0)
    allowed = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    for mine, wanted in zip(*(torch.autograd.grad(3 * loss, (x, head.weight, head.bias)) for loss in (got, plain))):
        assert (mine - wanted).norm() <= allowed * wanted.norm()


def test_masked_lm_loss_goes_backward_once():
    head = torch.nn.Linear(4, 9)
    head.forward = lambda x: x
    loss, _ = masked_lm_loss(head, torch.randn(3, 4), torch.tensor([1, 2, 3]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_masked_text_the_other_losses_and_their_gradients_are_the_same():
    """Retrieval fine-tuning masks nothing: its 3B pairs give what they give beside the B masked sentences."""
    model = make()
    images, words, starts, masked, rows, ids = example(model)
    states = model.encode_text(masked, starts, ids).states
    found = []
    for hidden in (MaskedText(states, rows, words[rows]), None):
        a, b = model.encode_image(images, ids), model.encode_text(words, starts, ids)
        got = cross_view(model, a, b, hidden, 0)
        (got["contrast"] + got["match"]).backward()
        found.append((got, [p.grad for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    (whole, wanted), (pairs, gradients) = found
    assert "mask" in whole and list(pairs) == ["contrast", "match", "loss"]
    for name in ("contrast", "match"):
        torch.testing.assert_close(pairs[name], whole[name], rtol=1e-12, atol=0)
    assert pairs["loss"] == pairs["contrast"] + pairs["match"]
    torch.testing.assert_close(gradients, [g for g in wanted if g.any()], rtol=1e-9, atol=1e-15)


def test_gradients_of_vectors_travel_before_those_of_matrices(monkeypatch):
    """Behind a large matrix's they would wait, and the encoders with them. Two streams, as in a step."""
    model, order = make(), []

    def gather(vectors, ids):
        gathered = vectors.clone()
        gathered.register_hook(lambda _: order.append("vectors"))            # runs when the gather's backward would
        return gathered, ids
    monkeypatch.setattr(losses, "gather_vectors", gather)
    images, words, starts, masked, rows, ids = example(model)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    views = model.encode_image(images, ids), model.encode_text(words.flip(0), offsets(starts.diff().flip(0)), ids)
    sum(packed_losses(model, a, words, starts, masked, rows, ids, None)["loss"] for a in views).backward()
    assert order[:2] == ["vectors"] * 2 and len(order) > 40 and "vectors" not in order[2:]
