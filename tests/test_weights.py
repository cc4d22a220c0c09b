"""The official model's weights give the official numbers: states, vectors, losses, the gradient of every parameter.

tests/fixtures/official_*.pt hold what the official classes (zengyan-97/X2-VLM and CCLM, only sizes changed) computed
from random weights: "model" their state dict in fp32, inputs, outputs in fp64 (fp32 in the retrieval file), and of
every parameter's gradient three numbers: its norm and its inner products with two vectors of random signs."""
import functools
import pathlib

import pytest
import torch

import weights
from kernels.packed import offsets
from losses import MaskedText, Options, cross_view
from model import CCLM, Config

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
HEADS = {"vision_heads": 4, "text_heads": 4, "fusion_heads": 4}              # toy heads are 16 wide, not 64
PAIRS = Options({"contrast": 1.0, "match": 1.0, "mask": 0.0})
MASKED = Options({"contrast": 0.0, "match": 0.0, "mask": 1.0})
TOLERANCE = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-5, 1e-4)}       # of states and losses, of gradients


def path(name):
    return FIXTURES / f"official_{name}.pt"


@functools.cache
def official(name):
    return torch.load(path(name), weights_only=True)


def imported(name, dtype):
    state, _ = weights.import_sources([path(name)], HEADS)
    model = CCLM(Config(**state["config"]["model"]))
    model.load_state_dict(state["model"])
    return model.eval().to(dtype)


def pack(ids, mask):
    return ids[mask.bool()], offsets(mask.sum(1))                            # (B, L) -> (T,), (B+1,)


def masked_tokens(text):
    """token_ids (T,) with masked ones, their positions (M,) ascending, labels (M,): what they were."""
    token_ids, starts = pack(text["text_ids_masked"], text["text_atts"])
    real = text["masked_ids"] != -100
    positions, order = (starts[:-1, None] + text["masked_pos"])[real].sort()
    return token_ids, positions, text["masked_ids"][real][order]


def error(x, reference):
    return float((x.detach().double() - reference).abs().max() / reference.abs().max())


def real(padded, mask):
    return padded[mask.bool()]                                               # (B, L, D) -> (T, D)


def signs(seed, n):
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def gradient_errors(model, file, expected, dtype):
    """{official name: error} by the three numbers; floor: 1e-6 of the norm of all gradients together. A key's bias has
    gradient zero by construction: what fp32 leaves there is rounding, below 1e-7 of that norm. Takes no part: no
    gradient, or zero."""
    ours = {n: p.grad for n, p in model.named_parameters()}
    became = {theirs: to for theirs, to, why in weights.read_sources([file]).notes if not why}
    total = expected["grads"][:, 0].double().nan_to_num().norm().item()
    errors = {}
    for theirs, reference in zip(expected["names"], expected["grads"].double()):
        mine = [ours.pop(n) for n in became.get(theirs, [])]
        if reference.isnan().any():
            assert all(g is None or not g.any() for g in mine), theirs
            continue
        g = torch.cat([g.double().flatten() for g in mine])
        got = torch.stack([g.norm(), g @ signs(0, len(g)), g @ signs(1, len(g))])
        if theirs.endswith("key.bias") and dtype == torch.float32:
            assert got[0] < 1e-7 * total and reference[0] < 1e-7 * total, theirs
            continue
        errors[theirs] = float((got - reference).abs().max() / max(float(reference[0]), 1e-6 * total))
    assert all(g is None or not g.any() for g in ours.values()), ours.keys()                     # none is left over
    return errors


def check_fusion(model, expected, tolerance, a, b, mask, masked=None, other=None, masked_mask=None):
    """Fused states of true pairs (b looks at a), of pairs with the official negatives, of masked texts that look
    at `other`."""
    everyone, fused = torch.arange(6), expected["get_cross_embeds"]
    got = model.fuse(b, a, everyone, everyone)
    assert error(got, real(fused[0], mask)) < tolerance
    texts, views = torch.cat([everyone, expected["neg_text_idx"]]), torch.cat([expected["neg_image_idx"], everyone])
    got = model.fuse(b, a, texts, views)
    assert error(got, real(fused[1], mask[texts])) < tolerance
    if len(fused) > 2:                                                       # single stack: one call, states not seen
        got = model.fuse(masked, other, everyone, everyone)
        assert error(got, real(fused[2], masked_mask)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["x2vlm", "single_stack"])
def test_image_text_gives_the_official_numbers(name, dtype):
    """x2vlm: BEiT-2, separate encoders, untied head. single_stack: plain ViT, one stack, positions from 0, tied."""
    model, expected, inputs = imported(name, dtype), official(name)["image_text"], official(name)["inputs"]
    text, ids, (near, far) = inputs["t1"], torch.arange(6), TOLERANCE[dtype]
    image = model.encode_image(official("x2vlm")["inputs"]["image"].to(dtype), ids)
    caption = model.encode_text(*pack(text["text_ids"], text["text_atts"]), ids)
    token_ids, positions, labels = masked_tokens(text)
    masked = model.encode_text(token_ids, caption.starts, ids)
    assert error(image.states, expected["get_vision_embeds"].flatten(0, 1)) < near
    for view, states in zip((caption, masked), expected["get_text_embeds"]):
        assert error(view.states, real(states, text["text_atts"])) < near
    for view, vectors in zip((image, caption), expected["get_features"]):
        assert error(view.vectors, vectors) < near
    check_fusion(model, expected, near, image, caption, text["text_atts"], masked, image, text["text_atts"])
    negatives = expected["neg_image_idx"], expected["neg_text_idx"]
    losses = cross_view(model, image, caption, MaskedText(masked.states, positions, labels), seed=0, negatives=negatives)
    for ours, theirs in (("contrast", "loss_itc"), ("match", "loss_itm"), ("mask", "loss_mlm")):
        assert error(losses[ours], expected["loss"][theirs]) < near, ours
    losses["loss"].backward()
    errors = gradient_errors(model, path(name), expected, dtype)
    assert len(errors) >= 130 and all(e < far for e in errors.values()), max(errors, key=errors.get)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["x2vlm", "single_stack"])
def test_parallel_text_gives_the_official_numbers(name, dtype):
    """The official step matches t2's words with t1, and restores t1's words from t2 (official code, CCLM
    models/model_pretrain_cclm.py:101): two calls of cross_view."""
    model, expected, inputs = imported(name, dtype), official(name)["para_text"], official(name)["inputs"]
    t1, t2 = inputs["t1"], inputs["t2"]
    ids, (near, far) = torch.arange(6), TOLERANCE[dtype]
    a, b = (model.encode_text(*pack(t["text_ids"], t["text_atts"]), ids) for t in (t1, t2))
    token_ids, positions, labels = masked_tokens(t1)
    masked = model.encode_text(token_ids, a.starts, ids)
    for view, states, t in zip((a, b, masked), expected["get_text_embeds"], (t1, t2, t1)):
        assert error(view.states, real(states, t["text_atts"])) < near
    for view, vectors in zip((a, b), expected["get_features"]):
        assert error(view.vectors, vectors) < near
    check_fusion(model, expected, near, a, b, t2["text_atts"], masked, b, t1["text_atts"])
    negatives = expected["neg_image_idx"], expected["neg_text_idx"]
    first = cross_view(model, a, b, MaskedText(b.states, positions[:0], labels[:0]), 0, negatives, PAIRS)
    second = cross_view(model, b, a, MaskedText(masked.states, positions, labels), 0, negatives, MASKED)
    for got, theirs in ((first["contrast"], "loss_ttc"), (first["match"], "loss_ttm"), (second["mask"], "loss_mlm")):
        assert error(got, expected["loss"][theirs]) < near, theirs
    (first["loss"] + second["loss"]).backward()
    errors = gradient_errors(model, path(name), expected, dtype)
    assert len(errors) >= 90 and all(e < far for e in errors.values()), max(errors, key=errors.get)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_retrieval_fine_tuning_gives_the_official_numbers(dtype):
    """Captions of one image are soft labels of each other (same="positive") and never its negatives. fp32
    reference."""
    model, reference = imported("retrieval", dtype), official("retrieval")
    expected, text, ids = reference["image_text"], reference["inputs"]["t1"], reference["idx"]
    image = model.encode_image(official("x2vlm")["inputs"]["image"].to(dtype), ids)
    caption = model.encode_text(*pack(text["text_ids"], text["text_atts"]), ids)
    assert error(image.states, expected["get_vision_embeds"].flatten(0, 1)) < 1e-5
    assert error(caption.states, real(expected["get_text_embeds"][0], text["text_atts"])) < 1e-5
    check_fusion(model, expected, 1e-5, image, caption, text["text_atts"])
    negatives = expected["neg_image_idx"], expected["neg_text_idx"]
    losses = cross_view(model, image, caption, None, 0, negatives, PAIRS._replace(same="positive"))
    for ours, theirs in (("contrast", "loss_itc"), ("match", "loss_itm")):
        assert error(losses[ours], expected["loss"][theirs]) < 1e-5, ours
    losses["loss"].backward()
    errors = gradient_errors(model, path("retrieval"), expected, torch.float32)
    assert len(errors) >= 160 and all(e < 1e-4 for e in errors.values()), max(errors, key=errors.get)
