"""Packed == padded: without padding, the features, fused states, losses and gradients of the padded textbook model."""
import dataclasses
import weakref

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import data
import losses
import reference
from kernels.attention import attention_torch
from kernels.packed import offsets
from model import CCLM, PRESETS

TINY = dataclasses.replace(PRESETS["demo"], width=32, embedding=16, dropout=0.0, image_size=32, patch_size=16,
                           vision_layers=2, vision_mlp=64, text_layers=2, text_mlp=64, fusion_layers=2,
                           fusion_mlp=64, vocabulary=60)
VARIANTS = {"demo": {}, "one fusion layer": {"fusion_layers": 1}, "mean": {"pool": "mean"},
            "beit2": {"vision": "beit2"}, "clip": {"vision": "clip"},
            "first": {"pool": "first", "offset": 0, "tied": False}, "stem": {"stem": True}}


def make(seed=0, **changes):
    """A tiny float64 model whose every parameter is random, so that none hides behind a zero."""
    torch.manual_seed(seed)
    model = CCLM(dataclasses.replace(TINY, **changes)).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim:
                p += 0.1 * torch.randn_like(p)
    return model


def example(model, lengths=(5, 2, 9, 4, 7), seed=1):
    """Images, packed tokens, their starts, masked tokens, masked positions, ids with one repeated thing."""
    g = torch.Generator().manual_seed(seed)
    c, T = model.config, sum(lengths)
    token_ids, masked_ids = (torch.randint(4, c.vocabulary, (T,), generator=g) for _ in range(2))
    positions = torch.arange(T)[torch.rand(T, generator=g) < 0.4]
    images = torch.randn(len(lengths), 3, c.image_size, c.image_size, generator=g).double()
    return images, token_ids, offsets(torch.tensor(lengths)), masked_ids, positions, torch.tensor([0, 1, 2, 1, 4])


def packed_losses(model, a, token_ids, starts, masked_ids, positions, ids, negatives):
    b, masked = (model.encode_text(x, starts, ids) for x in (token_ids, masked_ids))
    masked = losses.MaskedText(masked.states, positions, token_ids[positions])
    return losses.cross_view(model, a, b, masked, seed=0, negatives=negatives)


def padded_losses(model, a, token_ids, starts, masked_ids, positions, ids, negatives):
    """a: (padded states, mask, vectors)."""
    padded, mask = reference.unpack(token_ids, starts)
    states = reference.encode_text(model, padded, mask)
    is_masked, _ = reference.unpack(torch.zeros(len(token_ids), dtype=torch.bool).index_fill(0, positions, True), starts)
    masked_states = reference.encode_text(model, reference.unpack(masked_ids, starts)[0], mask)
    return reference.cross_view(model, a, (states, mask, reference.vectors(model, model.text_proj, states, mask)),
                                (masked_states, is_masked, token_ids[positions]), ids, negatives)


@pytest.mark.parametrize("kind", ["image", "sentence"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packing_equals_padding(variant, kind):
    """Losses and the gradient of every parameter, with repeated negatives, one that nobody has, and a -1."""
    model = make(**VARIANTS[variant])
    images, words, starts, masked, rows, ids = example(model)
    wrong = (torch.tensor([2, 2, -1, 0, 2]), torch.tensor([4, 4, 4, 2, 2]))
    results = []
    for build in (packed_losses, padded_losses):
        model.zero_grad()
        if kind == "sentence":
            others = words.flip(0), offsets(starts.diff().flip(0))
            a = model.encode_text(*others, ids)
        else:
            a = model.encode_image(images, ids)
        if build is padded_losses:
            if kind == "sentence":
                padded, mask = reference.unpack(*others)
                states, project = reference.encode_text(model, padded, mask), model.text_proj
            else:
                states, project = reference.encode_image(model, images), model.vision_proj
                mask = torch.ones(states.shape[:2], dtype=torch.bool)
            assert torch.allclose(reference.unpack(a.states, a.starts)[0][mask], states[mask], rtol=0, atol=1e-10)
            a = states, mask, reference.vectors(model, project, states, mask)
        got = build(model, a, words, starts, masked, rows, ids, wrong)
        sum(got[name] * w for name, w in zip(("contrast", "match", "mask"), (1.0, 0.7, 0.4))).backward()
        results.append((got, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (packed, gradients), (padded, expected) = results
    for name in padded:
        assert abs(float(packed[name].detach() - padded[name].detach())) < 1e-9, name
    floor = 1e-6 * torch.stack([g.norm() for g in expected.values()]).norm()
    for name, g in expected.items():
        assert float((gradients[name] - g).norm() / max(g.norm(), floor)) < 1e-9, name


def test_fused_states_equal_a_loop_over_pairs():
    """Any texts, any views - repeated, missing, -1 - and any positions: each equals its pair fused alone."""
    model = make()
    images, words, starts, *_ = example(model)
    image, text = model.encode_image(images, None), model.encode_text(words, starts, None)
    query_text, query_view = torch.tensor([3, 0, 0, 2, 3, 1]), torch.tensor([1, 1, -1, 4, 0, 1])
    asked = offsets(starts.diff()[query_text])
    fused = model.fuse(text, image, query_text, query_view)
    for i, (s, m) in enumerate(zip(query_text.tolist(), query_view.tolist())):
        x = text.states[starts[s]:starts[s + 1]][None]
        y = image.states.view(len(images), -1, 32)[m][None]
        alone = reference.fuse(model, x, torch.ones(x.shape[:2], dtype=torch.bool),
                               y, torch.full(y.shape[:2], m >= 0))[0]
        assert torch.allclose(fused[asked[i]:asked[i + 1]], alone, rtol=0, atol=1e-10)
    rows = torch.tensor([0, 3, 4, 5, 11, len(fused) - 1])
    for chunk in (None, 1):                                                  # 1: four query sequences at a time
        model.chunk = chunk
        assert torch.allclose(model.fuse(text, image, query_text, query_view), fused, rtol=0, atol=1e-10)
        some = model.fuse(text, image, query_text, query_view, rows)
        assert torch.allclose(some, fused[rows], rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_chunks_of_queries_fuse_as_all_at_once(seed):
    """Whatever they read: chunks that read nothing, a view that fills several chunks, views that nobody reads."""
    model, g = make(), torch.Generator().manual_seed(seed)
    images, words, starts, *_ = example(model)
    texts, views = model.encode_text(words, starts, None), model.encode_image(images, None)
    query_text = torch.randint(5, (22 + seed,), generator=g)
    query_view = torch.tensor([-1, -1, 0, 3, 3, 3, 4])[torch.randint(7 - seed, (22 + seed,), generator=g)]
    positions = torch.rand(int(starts.diff()[query_text].sum()), generator=g).lt(0.1).nonzero()[:, 0]
    every = model.fuse(texts, views, query_text, query_view, positions)
    model.chunk = 1
    assert torch.allclose(model.fuse(texts, views, query_text, query_view, positions), every, rtol=0, atol=1e-10)


def test_attention_of_nothing_is_zero_with_zero_gradient():
    """Sequences of length 0: queries that look at nothing, keys nobody looks at."""
    q, k, v = (torch.randn(n, 2, 16, dtype=torch.float64, requires_grad=True) for n in (6, 7, 7))
    q_starts, k_starts = (torch.tensor(s, dtype=torch.int32) for s in ([0, 2, 2, 6], [0, 3, 7, 7]))
    out = attention_torch(q, k, v, q_starts, k_starts)
    assert out[2:].abs().max() == 0 and out[:2].abs().min() > 0
    out.square().sum().backward()
    assert q.grad[2:].abs().max() == 0 and k.grad[3:].abs().max() == 0 and v.grad[3:].abs().max() == 0
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


def test_sixteen_bit_attention_is_close_to_double():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, 2, 16, generator=g, dtype=torch.float64) for _ in range(3))
    starts = torch.tensor([0, 1, 13, 13, 40], dtype=torch.int32)
    exact = attention_torch(q, k, v, starts, starts)
    rounded = attention_torch(*(x.bfloat16() for x in (q, k, v)), starts, starts)
    assert (rounded.double() - exact).abs().max() < 0.05


def test_drop_path_drops_whole_images_in_training_only():
    """A layer of three images: branches are 0 for a whole image or grow by 1 / (1 - rate). The rate grows linearly."""
    model = make(vision="beit2", vision_layers=3, drop_path=0.5)
    assert [layer.drop_path for layer in model.vision.layers] == [0, 0.25, 0.5]
    layer, starts = model.vision.layers[2], torch.arange(0, 16, 5, dtype=torch.int32)
    x = torch.randn(15, 32, dtype=torch.float64)
    layer.layer_scale2.data.zero_()                                          # one branch: attention
    branch = layer.eval()(x, starts) - x
    layer.train()
    seen = set()
    for _ in range(50):
        share = ((layer(x, starts) - x) / branch).view(3, -1)                # (image, values)
        assert torch.allclose(share, share[:, :1].expand_as(share))
        seen.add(tuple(share[:, 0].round().int().tolist()))
    assert len(seen) == 8 and {value for images in seen for value in images} == {0, 2}


@pytest.mark.parametrize("vision", ["vit", "clip", "beit2"])
def test_image_encoders_have_no_dropout(vision):
    """As published: only text and fusion encoder have it."""
    model = make(vision=vision, dropout=0.5).train()
    images, words, starts, *_ = example(model)
    first, second = ([model.encode_image(images, None).states, model.encode_text(words, starts, None).states]
                     for _ in range(2))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


def test_a_training_batch_has_no_padding(tokenizer):
    batch = data.Batches(tokenizer, data.Stream(data.DemoImages(), 8), None, seed=0)[0][0]
    assert not (batch["b"].token_ids == data.PAD).any() and len(batch["b"].token_ids) == batch["b"].starts[-1]


@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradient_cache_and_checkpointing_are_exact_and_keep_less(dtype, allowed):
    gradients_in_chunks_and_with_checkpointing("cpu", dtype, allowed)


def gradients_in_chunks_and_with_checkpointing(device, dtype, allowed, size=1, **smaller):
    """--chunk and --checkpointing: the same gradients, and fewer bytes kept for the backward pass."""
    def gradients(chunk, checkpointing):
        model, kept = make(**smaller).to(device, dtype), {}
        model.chunk = chunk
        for layer in (*model.vision.layers, *model.text.layers, *model.fusion.layers):
            layer.checkpointing = checkpointing
        images, words, starts, masked, rows, ids = (x.to(device) for x in example(model))
        images = images.to(dtype)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: kept.__setitem__(x.data_ptr(), x.nbytes) or x, lambda x: x):
            a = model.encode_image(images, ids)
            got = packed_losses(model, a, words, starts, masked, rows, ids, None)
        got["loss"].backward()
        return {n: p.grad for n, p in model.named_parameters()}, sum(kept.values())
    plain, much = gradients(None, False)
    floor = 1e-3 * torch.stack([g.norm() for g in plain.values()]).norm()
    for chunk, checkpointing in ((size, False), (None, True), (size, True)):
        again, less = gradients(chunk, checkpointing)
        assert less < 0.8 * much
        for name, g in plain.items():
            error = (again[name] - g).norm() / g.norm().clamp(min=floor)
            assert error < allowed, (chunk, checkpointing, name, error)


class Live(TorchDispatchMode):
    """now, peak: bytes of the tensors that operations made and that are alive."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage._cdata not in given and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, key):
        self.now -= self.sizes.pop(key)


def test_a_batch_in_chunks_costs_little_more_than_the_plain_step_and_one_chunk():
    """Of 16 images with captions, 2 at a time: products of the plain step times 1.4, memory of a step of 2 times 1.25."""
    def step(mode, B, chunk):
        model = make(vision_layers=4, text_layers=4, fusion_layers=4)
        images, words, starts, masked, rows, _ = example(model, lengths=(5, 9, 14, 7) * (B // 4) or (5, 14))
        model.chunk = chunk
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with sdpa_kernel(SDPBackend.MATH), mode:
            a = model.encode_image(images, torch.arange(B))
            packed_losses(model, a, words, starts, masked, rows, torch.arange(B), None)["loss"].backward()
        return mode
    plain, chunked = (step(FlopCounterMode(display=False), 16, chunk).get_total_flops() for chunk in (None, 2))
    assert plain < chunked < 1.4 * plain
    small, chunked = (step(Live(), B, chunk).peak for B, chunk in ((2, None), (16, 2)))
    assert chunked < 1.25 * small
