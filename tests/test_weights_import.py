"""Import: sizes to the unit, every tensor accounted for, where CCLM began, other resolutions."""
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import weights
from formats import layouts
from model import CCLM, build
from published import beit, random, single_stack, x2vlm, xlmr, zeros


@pytest.mark.parametrize("preset, d, layers, keys, count", [("base", 768, 12, 587, 615_540_825),
                                                            ("large", 1024, 24, 983, 1_225_073_817)])
def test_sizes_are_the_official_ones_to_the_unit(preset, d, layers, keys, count):
    """Names and numbers of parameters of the official classes, with the box head, which we leave out; every name is
    explained; the preset is this model."""
    tensors = x2vlm(d, layers)
    double = sum(t.numel() for name, t in tensors.items() if name.endswith(("position_ids", "position_index",
                 "decoder.bias")))                                           # buffers, and one bias under two names
    assert len(tensors) == keys and sum(t.numel() for t in tensors.values()) - double == count
    source = layouts.translate(tensors)
    with torch.device("meta"):
        model = CCLM(build(preset, **source.fields))
    assert model.config == build(preset)
    _, missing = layouts.adapt_to_model(source, model)
    box = sum(t.numel() for name, t in tensors.items() if name.startswith("bbox"))
    assert not missing and sum(p.numel() for p in model.parameters()) == count - box


def test_every_tensor_is_explained_or_it_is_an_error(tmp_path, capsys):
    tensors = {k: v.clone() for k, v in x2vlm(64, 1, 50).items()}
    strange = {"cls_head.0.weight": torch.zeros(3)}
    for name, change in (("cls_head.0.weight", strange), ("text_proj.bias", {})):
        torch.save({"model": {k: v for k, v in tensors.items() if k != name} | change}, tmp_path / "a.th")
        words = ["import", str(tmp_path / "a.th"), "--out", str(tmp_path / "ckpt.pt")]
        assert weights.main(words) == 2
        said = capsys.readouterr().err
        assert name in said and "--allow_missing" in said and said.count("\n") == 1
        assert weights.main([*words, "--allow_missing", name]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if name.replace(".0.", ".*.") in line]
        assert len(lines) == 1 and "named by --allow_missing" in lines[0] and ("unused" in lines[0]) == bool(change)
    torch.save(tensors, tmp_path / "a.th")
    assert weights.main(words) == 0                                          # all of it, bare
    out = capsys.readouterr().out
    assert f"{len(tensors)} tensors, {len(tensors) - 9} used; 0 missing" in out and "region losses" in out


def test_cclm_3m_needs_another_vision_encoder(tmp_path, capsys):
    """Its Swin is left out and said to be; a ViT named after it takes its place, and everything else comes along."""
    swin = {"layers.0.blocks.0.attn.qkv.bias": zeros(9), "layers.0.blocks.1.attn_mask": zeros(4, 9, 9),
            "patch_embed.norm.bias": zeros(8), "norm.bias": zeros(8)}
    tensors = single_stack(swin, 50, token_types=1)
    torch.save({"model": tensors}, tmp_path / "cclm_3m.th")
    torch.save(random(beit("", 64, 1, 1)), tmp_path / "beit2.pth")
    words = ["import", str(tmp_path / "cclm_3m.th"), str(tmp_path / "beit2.pth"), "--out", str(tmp_path / "ckpt.pt")]
    assert weights.main(words) == 0
    out = capsys.readouterr().out
    assert out.count("unused: Swin is out of scope") == 4 and "; 0 missing" in out
    state = weights.read_checkpoint(tmp_path / "ckpt.pt")
    c, fused = state["config"]["model"], tensors["text_encoder.bert.encoder.layer.2.output.dense.bias"]
    assert torch.equal(state["model"]["fusion.layers.0.mlp.down.bias"], fused)
    assert (c["vision"], c["text_layers"], c["offset"], c["tied"], c["fusion_eps"]) == ("beit2", 2, 0, True, 1e-5)
    torch.save({k: t for k, t in random(beit("", 64, 1, 1)).items() if k != "cls_token"}, tmp_path / "beit2.pth")
    assert weights.main(words) == 2 and "vision.class_token" in capsys.readouterr().err            # the ViT's own gap


def test_where_cclm_began(tmp_path):
    """CCLM-X2VLM: XLM-R, then from the English X2VLM everything but words; the new decoder is random. CCLM-3M/4M:
    XLM-R's layers 1, 3, 5 ... as one stack without cross-attention."""
    head, text, english = xlmr(layers=8), xlmr(layers=4), single_stack(beit("", 64, 1, 1), 30, token_types=2)
    torch.save(english, tmp_path / "x2vlm.th")
    torch.save(text | {"lm_head.bias": torch.randn(100), "lm_head.dense.weight": torch.randn(64, 64)},
               tmp_path / "xlmr.bin")
    state, report = weights.import_sources([tmp_path / "xlmr.bin", tmp_path / "x2vlm.th"])
    w, c = state["model"], state["config"]["model"]
    assert torch.equal(w["text.layers.3.mlp.up.weight"], text["roberta.encoder.layer.3.intermediate.dense.weight"])
    cross = english["text_encoder.bert.encoder.layer.2.crossattention.self.key.weight"]
    assert torch.equal(w["fusion.layers.0.cross.k.weight"], cross)
    assert torch.equal(w["mlm_head.dense.weight"], english["text_encoder.cls.predictions.transform.dense.weight"])
    assert w["mlm_head.weight"].shape == (100, 64)
    assert (c["text_layers"], c["fusion_layers"], c["tied"], c["fusion_eps"]) == (4, 1, False, 1e-12)
    assert any("missing mlm_head.weight -> random: for English words" in line for line in report)
    torch.save(head, tmp_path / "large.bin")
    state, report = weights.import_sources([tmp_path / "large.bin"], every_second=True)
    w, c = state["model"], state["config"]["model"]
    assert (c["text_layers"], c["fusion_layers"], c["offset"], c["tied"]) == (2, 2, 0, True)
    for ours, theirs in (("text.layers.1", 3), ("fusion.layers.0", 5), ("fusion.layers.1", 7)):
        bias = head[f"roberta.encoder.layer.{theirs}.output.LayerNorm.bias"]
        assert torch.equal(w[f"{ours}.norm2.bias"], bias)
    assert any("-> random" in line and "no cross-attention" in line for line in report)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
def test_an_import_takes_little_more_memory_than_the_file(tmp_path):
    """Tensors map the file and are written from there, without copies. A small file first: the import itself takes
    150 MB, whatever its size."""
    for name, words in (("small", 1000), ("large", 400_000)):                # the large one is 211 MB
        torch.save({name: t.clone() for name, t in x2vlm(64, 1, words).items()}, tmp_path / name)
    code = ("import sys, weights\n"                                          # ru_maxrss would inherit this process's
            "for name in sys.argv[1:]:\n"
            "    weights.main(['import', name, '--out', 'ckpt.pt'])\n"
            "    print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])")
    root = pathlib.Path(weights.__file__).parent
    done = subprocess.run([sys.executable, "-c", code, "small", "large"], cwd=tmp_path, capture_output=True, text=True,
                          check=True, env=os.environ | {"PYTHONPATH": str(root)})
    small, large = (int(line) for line in done.stdout.splitlines() if line.isdigit())
    taken = (large - small) * 1024 / (tmp_path / "large").stat().st_size
    assert 0.3 < taken < 1.3, taken


def test_a_shared_relative_table_becomes_every_layers():
    tensors = {name: t for name, t in random(beit("", 64, 2, 1)).items() if "bias_table" not in name}
    table = torch.randn(732, 1)
    source = layouts.translate(tensors | {"rel_pos_bias.relative_position_bias_table": table})
    assert all(torch.equal(source.weights[f"vision.layers.{i}.attention.relative_position_bias"], table) for i in range(2))


def test_position_tables_follow_the_image_size(tmp_path):
    torch.save({k: t.clone() for k, t in x2vlm(64, 1, 50).items()}, tmp_path / "a.th")
    words = ["import", str(tmp_path / "a.th"), "--out", str(tmp_path / "ckpt.pt"), "--image_size"]
    assert weights.main([*words, "384"]) == 0
    model, _ = weights.load_model(tmp_path / "ckpt.pt")
    assert model.encode_image(torch.zeros(1, 3, 384, 384), torch.arange(1)).states.shape == (577, 64)


def test_position_tables_are_resized_bicubically():
    """Keys' kernel written out: four taps a side around the centre of each new patch; the class token's row is kept."""
    a, table = -0.75, torch.randn(1 + 14 ** 2, 3)
    kernel = lambda t: ((a + 2) * t ** 3 - (a + 3) * t ** 2 + 1 if t <= 1 else
                        a * t ** 3 - 5 * a * t ** 2 + 8 * a * t - 4 * a if t < 2 else 0.0)
    matrix = torch.zeros(24, 14)
    for i in range(24):
        centre = (i + 0.5) * 14 / 24 - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), 13)] += kernel(abs(centre - j))
    want = torch.einsum("iy,jx,yxd->ijd", matrix, matrix, table[1:].view(14, 14, 3)).flatten(0, 1)
    got = layouts.resize_positions(table, 24)                                # (1 + 24 * 24, 3)
    assert torch.equal(got[0], table[0]) and torch.allclose(got[1:], want, atol=1e-5)


def test_the_cubic_spline_is_scipys():
    """scipy.interpolate.CubicSpline (not-a-knot) gave these numbers; tests/test_weights_others.py runs SciPy itself."""
    matrix = layouts.spline_matrix(np.array([-4.0, -1.5, 0, 1, 3, 7]), np.array([-3.0, 0.25, 2.0, 6.5]))
    want = [0.5298155737704916, 1.197744300717213, 1.906548838797814, -1.9076065146857921]
    assert np.abs(matrix @ [2.0, -1, 0.5, 3, -2, 4] - want).max() < 1e-12


def test_resized_relative_tables_keep_cubics():
    """A cubic spline through a cubic is that cubic: the table's offsets lie at 0, 1, 1 + q, 1 + q + q^2 ... with BEiT's q."""
    side = (1.090307 ** torch.arange(13.0, dtype=torch.float64)).cumsum(0)   # the official code's q of 224 -> 384 pixels
    old, new = torch.cat([-side.flip(0), torch.zeros(1), side]), torch.arange(-23.0, 24.0)
    cubic = lambda y, x: (y ** 3 - 2 * y * x ** 2 + 5 * x - 3 * y).flatten()
    table = torch.cat([cubic(old[:, None], old), torch.tensor([1.0, 2.0, 3.0])])[:, None]         # (732, 1)
    got, want = layouts.resize_bias_table(table, 24)[:, 0], cubic(new[:, None], new)
    assert len(got) == 47 ** 2 + 3 and torch.equal(got[-3:], table[-3:, 0])
    assert (got[:-3] - want).abs().max() / want.abs().max() < 1e-4           # q has seven digits here
