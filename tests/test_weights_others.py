"""Equal outputs with the packages that the published encoders come from: transformers, timm, SciPy. None is needed to
use this program: each test is skipped when its package is absent. CCLM_BASE=1 adds base size (some GB of memory, two
minutes); -s prints the errors."""
import os

import numpy as np
import pytest
import torch

from formats import layouts
import weights
from kernels.packed import offsets
from model import CCLM, Config

SIZES = ["tiny", "base"] if os.environ.get("CCLM_BASE") else ["tiny"]
HEADS = {"vision_heads": 4, "text_heads": 4, "fusion_heads": 4}
TIMM = ["beitv2", "beit", "deit", "vit"]


def close(x, reference):
    error = float((x - reference).abs().max() / reference.abs().max())
    print(f"error {error:.1e}")
    return error < 1e-5


def shaken(model):
    """Random numbers everywhere: zero biases, unit norms and empty relative tables would hide a wrong name."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.02 * torch.randn_like(p) if p.ndim > 1 else 0.1 * torch.randn_like(p))
    return model.eval()


def imported(path, size, **changes):
    state, report = weights.import_sources([path], (HEADS if size == "tiny" else {}) | {"fusion_layers": 1} | changes)
    model = CCLM(Config(**state["config"]["model"]))
    model.load_state_dict(state["model"])
    return model.eval(), state


def sentences(vocabulary):
    lengths = torch.tensor([5, 9, 1, 7])
    ids = torch.randint(4, vocabulary - 1, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < lengths[:, None]
    return ids.masked_fill(~mask, 1), mask, ids[mask], offsets(lengths)


def exported(state, folder):
    """Our export of a checkpoint's text encoder, opened by transformers, which says what it misses or does not know."""
    transformers = pytest.importorskip("transformers")
    weights.write_checkpoint(folder / "ckpt.pt", state)
    weights.export(folder / "ckpt.pt", folder / "out")
    model, said = transformers.XLMRobertaModel.from_pretrained(
        folder / "out" / "text_encoder", add_pooling_layer=False, output_loading_info=True)
    assert not any(said.values()), said
    return model.eval()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "masked"])
@pytest.mark.parametrize("size", SIZES)
def test_xlm_r_from_transformers_and_back(tmp_path, size, file):
    """XLMRobertaModel and its masked LM, imported and exported again, give the same states and the same words."""
    transformers = pytest.importorskip("transformers")
    tiny = dict(vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=160,
                max_position_embeddings=40)
    base = dict(vocab_size=250002, max_position_embeddings=514)              # the rest of base is the default
    config = transformers.XLMRobertaConfig(**(tiny if size == "tiny" else base), type_vocab_size=1,
                                           layer_norm_eps=1e-5)
    kind = transformers.XLMRobertaForMaskedLM if file == "masked" else transformers.XLMRobertaModel
    theirs = shaken(kind(config))
    if file == "pytorch_model.bin":
        torch.save(theirs.state_dict(), tmp_path / file)
    else:
        theirs.save_pretrained(tmp_path)                                     # safetensors, by its own package
    ours, state = imported(tmp_path, size, vision_layers=1)
    padded, mask, words, starts = sentences(config.vocab_size)
    with torch.no_grad():
        states = ours.text(words, starts)
        out = theirs(padded, attention_mask=mask.long(), output_hidden_states=True)
        assert close(states, out.hidden_states[-1][mask])
        if file == "masked":
            head = ours.mlm_head
            assert close(head(states) @ head.weight.T + head.bias, out.logits[mask])
        back = exported(state, tmp_path)
        assert close(back(padded, attention_mask=mask.long()).last_hidden_state[mask], states)


def test_a_text_encoder_that_counts_positions_from_0_exports_too(tmp_path):
    """CCLM-3M/4M's: transformers counts from 2, so its table gets two empty rows."""
    pytest.importorskip("transformers")
    path = os.path.join(os.path.dirname(__file__), "fixtures", "official_single_stack.pt")
    state, _ = weights.import_sources([path], HEADS)
    theirs = exported(state, tmp_path)
    ours, _ = weights.load_model(tmp_path / "ckpt.pt")
    padded, mask, words, starts = sentences(1000)
    with torch.no_grad():
        states = ours.eval().text(words, starts)
        assert close(theirs(padded, attention_mask=mask.long()).last_hidden_state[mask], states)


@pytest.mark.parametrize("kind", TIMM)
@pytest.mark.parametrize("size", SIZES)
def test_image_encoders_of_timm(tmp_path, size, kind):
    """BEiT and BEiT-2 (patches after fc_norm, row 0 their mean), DeiT and ViT (all rows after the last norm)."""
    timm = pytest.importorskip("timm")
    tiny = dict(img_size=64, embed_dim=64, depth=3, num_heads=4)
    theirs = shaken(timm.create_model(kind + "_base_patch16_224", **(tiny if size == "tiny" else {})))
    torch.save({"model": theirs.state_dict()}, tmp_path / "a.pth")
    ours, _ = imported(tmp_path / "a.pth", size, text_layers=1, vocabulary=10, positions=10)
    images = torch.randn(2, 3, ours.config.image_size, ours.config.image_size)
    with torch.no_grad():
        got, want = ours.vision(images).unflatten(0, (2, -1)), theirs.forward_features(images)
        if kind.startswith("beit"):
            want = theirs.fc_norm(want[:, 1:])
            assert close(got[:, 0], want.mean(1))
            got = got[:, 1:]
        assert close(got, want)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_clips_image_side(tmp_path, size, whole):
    """CLIPVisionModel, and CLIPModel's file with its text side left out; the last norm is on all rows."""
    transformers = pytest.importorskip("transformers")
    tiny = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=64)
    seen = dict(**(tiny if size == "tiny" else {}), patch_size=16, hidden_act="quick_gelu")
    if whole:
        config = transformers.CLIPConfig(vision_config=seen, text_config=dict(num_hidden_layers=1))
        model = shaken(transformers.CLIPModel(config))
        theirs = model.vision_model
    else:
        model = theirs = shaken(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**seen)))
    model.save_pretrained(tmp_path)
    ours, _ = imported(tmp_path, size, text_layers=1, vocabulary=10, positions=10)
    images = torch.randn(2, 3, ours.config.image_size, ours.config.image_size)
    with torch.no_grad():
        states = theirs(images).last_hidden_state
        last = getattr(theirs, "vision_model", theirs).post_layernorm
        assert close(ours.vision(images), last(states).flatten(0, 1))


def test_our_safetensors_open_in_the_safetensors_package(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.tensor(2.0), "d": torch.zeros(0, 4),
               "e": torch.randn(5).to(torch.bfloat16)}
    weights.write_safetensors(tmp_path / "a.safetensors", tensors)
    back = safetensors.load_file(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], t) and back[k].dtype == t.dtype for k, t in tensors.items())
    safetensors.save_file(tensors, tmp_path / "b.safetensors")
    back = weights.read_safetensors(tmp_path / "b.safetensors")
    assert all(torch.equal(back[k], t) for k, t in tensors.items())


@pytest.mark.parametrize("old, new", [(14, 24), (14, 30), (7, 12), (7, 9)])
def test_relative_tables_as_scipy_resizes_them(old, new):
    """BEiT's recipe with SciPy's RectBivariateSpline, written down again; 14 -> 24 is 224 -> 384 pixels."""
    interpolate = pytest.importorskip("scipy.interpolate")
    table = torch.randn((2 * old - 1) ** 2 + 3, 3)
    source, target = 2 * old - 1, 2 * new - 1
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2
        if (1 - q ** (source // 2)) / (1 - q) > target // 2:
            right = q
        else:
            left = q
    side, place = [], 1.0
    for i in range(source // 2):
        side.append(place)
        place += q ** (i + 1)
    x, at = np.array([-s for s in reversed(side)] + [0] + side), np.arange(-(target // 2), target // 2 + 0.1, 1.0)
    squares = table[:-3].double().view(source, source, 3).numpy()
    planes = [interpolate.RectBivariateSpline(x, x, squares[..., h])(at, at) for h in range(3)]
    want, got = np.stack(planes, -1).reshape(-1, 3), layouts.resize_bias_table(table, new)
    error = np.abs(got[:-3].numpy() - want).max() / np.abs(want).max()
    print(f"error {error:.1e}, q {q:.6f}")
    assert error < 1e-6 and torch.equal(got[-3:], table[-3:])
    if (old, new) == (14, 24):
        assert abs(q - 1.090307) < 1e-6                                      # the value of the official code
