"""Crop, resize and RandAugment on uint8 are Pillow's, within rounding; Pillow's memory is read as it is."""
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

import transforms


def test_image_transforms_keep_the_contract():
    image = Image.effect_noise((90, 50), 80).convert("RGB")
    for seed in range(30):
        x = transforms.train_images([transforms.random_cut(image, 32, np.random.default_rng(seed))], 32)[0]
        assert x.shape == (3, 32, 32) and x.dtype == np.uint8
    assert transforms.test_image(image, 48).shape == (3, 48, 48)
    white = transforms.normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    expected = [(1 - m) / s for m, s in zip(transforms.MEAN, transforms.STD)]
    assert torch.allclose(white[0, :, 0, 0], torch.tensor(expected), atol=1e-6)


def as_tensor(image):
    return torch.from_numpy(np.array(image).transpose(2, 0, 1))


def as_rgbx(image):
    return np.array(image.convert("RGBX"))


@pytest.fixture(scope="module")
def photo():
    noise = np.random.default_rng(0).integers(20, 230, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("box", [(0, 0, 400, 300), (37, 20, 350, 290), (100, 100, 180, 150)])
def test_resizing_is_pillows_bicubic_within_two_grey_levels(photo, box):
    theirs = as_tensor(photo.crop(box).resize((96, 96), Image.Resampling.BICUBIC))
    ours, mirrored = (transforms.resize(as_rgbx(photo.crop(box)), 96, mirror) for mirror in (False, True))
    wrong = (ours.int() - theirs.int()).abs()
    assert wrong.max() <= 2 and (wrong > 1).float().mean() < 1e-3
    assert torch.equal(mirrored, ours.flip(2))


def test_randaugment_on_uint8_is_pillows_within_two_grey_levels(photo):
    """Identity, AutoContrast, Equalize, Rotate 21, Brightness 1.36, Sharpness 1.36, shears 0.21, shifts of 7 (F3.7)."""
    small, grey = photo.resize((96, 96)), (128, 128, 128)

    def moved(*matrix):                                                      # about the centre, as published rotates
        a, b, c, d, e, f = matrix
        matrix = (a, b, c + 48 * (1 - a - b), d, e, f + 48 * (1 - d - e))
        return small.transform(small.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=grey)

    expected = [small, ImageOps.autocontrast(small), ImageOps.equalize(small),
                small.rotate(21, Image.Resampling.BILINEAR, fillcolor=grey),
                ImageEnhance.Brightness(small).enhance(1.36), ImageEnhance.Sharpness(small).enhance(1.36),
                moved(1, 0.21, 0, 0, 1, 0), moved(1, 0, 0, 0.21, 1, 0),
                moved(1, 0, -7, 0, 1, 0), moved(1, 0, 0, 0, 1, -7)]
    for i, (operation, theirs) in enumerate(zip(transforms.AUGMENT, expected)):
        wrong = (operation(as_tensor(small), 0.7, 1).int() - as_tensor(theirs).int()).abs().amax(0) > 2
        assert wrong.float().mean() < (0.03 if i in (3, 6, 7) else 1e-9), i  # grey mixes in where a leaning edge lies


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(photo):
    out = io.BytesIO()
    photo.resize((8, 6)).resize((1600, 1200)).save(out, "JPEG", quality=95)
    for seed in range(6):
        lazy, whole = Image.open(out), Image.open(out)
        whole.load()                                                         # no draft any more
        cuts = [transforms.random_cut(im, 64, np.random.default_rng(seed)) for im in (lazy, whole)]
        x, y = (image.astype(int) for image in transforms.train_images(cuts, 64))
        assert max(lazy.size) < 1600 and abs(x - y).mean() < 4


def test_pillows_memory_is_read_without_a_copy_where_it_lies_in_one_piece(photo, monkeypatch):
    large = photo.resize((3000, 2000))                                       # 24 MB: in pieces
    for image, shared in ((photo, True), (photo.crop((0, 0, 1, 1)), True), (large, False)):
        seen = transforms.memory(image)
        assert np.array_equal(seen[..., :3], np.asarray(image)) and seen.shape[2] == 4
        image.putpixel((0, 0), (1, 2, 3))
        assert shared == (seen[0, 0, :3].tolist() == [1, 2, 3])
    monkeypatch.delattr(Image.Image, "__arrow_c_array__")                    # Pillow before 11.2
    assert np.array_equal(transforms.memory(photo)[..., :3], np.asarray(photo))
