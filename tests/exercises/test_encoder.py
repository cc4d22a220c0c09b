"""Exercise 5: an image encoder without attention.

    python -m pytest tests/exercises/test_encoder.py         fails until you have solved it

What to build
    python train.py --vision conv. A convolutional network (ConvNeXt, arXiv 2201.03545, is a good
    model), an MLP-Mixer (arXiv 2105.01601), or what you like, but without attention. The losses do
    not know what made a View: nothing outside model.py and one line of train.py has to change.

    1. model.py: a class with forward(images (B, 3, s, s)) -> states (B * P, D). P = (s / patch) ** 2
       + 1: row 0 of an image stands for the whole image, the others for its patches, row by row.
    2. model.py: CCLM takes it where config.vision is "conv"; init_weights works with it.
    3. train.py: `--vision` has one more choice.

Where to read
    model.py: ViT, conv_stem, MLP, CCLM.__init__, encode_image, init_weights.

How the test judges
    Shapes; no attention; no image sees another image of the batch; every parameter gets a
    gradient, through all three losses; in 20 steps it learns to tell sixteen images apart.

Hint
    conv_stem makes (B, D, s / patch, s / patch). A block is a residual branch: mix neighbours
    (a depthwise convolution: groups=D), LayerNorm, MLP. Row 0 can be the mean of the others.
    BatchNorm would let images see each other.

Then
    python train.py --vision conv --steps 500 --out out/conv
    Compare `--steps 500` alone: seconds a step, and recall of `val`. Which of the two encoders
    knows where a patch is? Does a caption need to know it?
"""
import pytest
import torch
import torch.nn.functional as F

import train
from losses import MaskedText, contrastive_loss, cross_view
from model import CCLM, Attention, View, build
from test_packing import example, make


def small(**changes):
    return make(vision="conv", stem=True, **changes)


def test_train_py_knows_it():
    assert train.settings(["--vision", "conv"]).vision == "conv"


@pytest.mark.parametrize("size, patch", [(32, 16), (64, 16), (64, 8)])
def test_an_image_becomes_one_row_and_one_for_each_patch(size, patch):
    model = small(image_size=size, patch_size=patch)
    view = model.encode_image(torch.randn(3, 3, size, size).double(), torch.arange(3))
    P = (size // patch) ** 2 + 1
    assert view.states.shape == (3 * P, 32) and view.starts.tolist() == [0, P, 2 * P, 3 * P]


def test_it_has_no_attention():
    names = [name for name, m in small().vision.named_modules()
             if isinstance(m, (Attention, torch.nn.MultiheadAttention))]
    assert not names


def test_no_image_sees_another():
    vision = small().train().vision
    images = torch.randn(4, 3, 32, 32).double()
    whole = vision(images).view(4, -1, 32)
    for i in range(4):
        alone = vision(images[i:i + 1]).view(-1, 32)
        torch.testing.assert_close(whole[i], alone, rtol=0, atol=1e-10)
    assert not whole[0, 1].allclose(whole[1, 1])


def test_every_parameter_gets_a_gradient_through_the_losses():
    model = small()
    images, token_ids, starts, masked_ids, positions, ids = example(model)
    a = model.encode_image(images, ids)
    b = model.encode_text(token_ids, starts, ids)
    states = model.encode_text(masked_ids, starts, ids).states
    masked = MaskedText(states, positions, token_ids[positions])
    cross_view(model, a, b, masked, seed=0)["loss"].backward()
    lacks = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in lacks if name.startswith("vision")]


def test_it_learns_to_tell_sixteen_images_apart():
    """A new model, as train.py makes it; b is sixteen fixed vectors. Chance is ln 16 = 2.77."""
    torch.manual_seed(0)
    model = CCLM(build("demo", vision="conv", width=64, vision_mlp=128))
    images = F.interpolate(torch.randn(16, 3, 8, 8), 64)
    ids = torch.arange(16)
    b = View(None, None, F.normalize(torch.randn(16, 256), dim=1), ids)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(20):
        loss = contrastive_loss(model.encode_image(images, ids), b, model.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5
