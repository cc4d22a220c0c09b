"""Crop, resize and RandAugment on uint8 are Pillow's, within rounding; Pillow's memory is read as it is."""
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from formats import images


def test_image_images_keep_the_contract():
    image = Image.effect_noise((90, 50), 80).convert("RGB")
    for seed in range(30):
        x = images.train_images([images.random_cut(image, 32, np.random.default_rng(seed))], 32)[0]
        assert x.shape == (3, 32, 32) and x.dtype == np.uint8
    assert images.eval_transform(image, 48).shape == (3, 48, 48)
    white = images.normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    expected = [(1 - m) / s for m, s in zip(images.MEAN, images.STD)]
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
    ours = torch.from_numpy(images.resize(as_rgbx(photo.crop(box)), 96)[..., :3].transpose(2, 0, 1))
    wrong = (ours.int() - theirs.int()).abs()
    assert wrong.max() <= 2 and (wrong > 1).float().mean() < 1e-3


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
    for i, (operation, theirs) in enumerate(zip(images.AUGMENT, expected)):
        wrong = (operation(as_tensor(small), 0.7, 1).int() - as_tensor(theirs).int()).abs().amax(0) > 2
        assert wrong.float().mean() < (0.03 if i in (3, 6, 7) else 1e-9), i  # grey mixes in where a leaning edge lies


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(photo):
    out = io.BytesIO()
    photo.resize((8, 6)).resize((1600, 1200)).save(out, "JPEG", quality=95)
    for seed in range(6):
        lazy, whole = Image.open(out), Image.open(out)
        whole.load()                                                         # no draft any more
        cuts = [images.random_cut(im, 200, np.random.default_rng(seed)) for im in (lazy, whole)]
        assert min(cuts[0].pixels.shape[:2]) >= 200                          # not decoded smaller than it is shown
        x, y = (image.astype(int) for image in images.train_images(cuts, 200))
        assert max(lazy.size) < 1600 and abs(x - y).mean() < 4


def test_pillows_memory_is_read_without_a_copy_where_it_lies_in_one_piece(photo):
    large = photo.resize((3000, 2000))                                       # 24 MB: in pieces
    for image, shared in ((photo, True), (photo.crop((0, 0, 1, 1)), True), (large, False)):
        seen = images.memory(image)
        assert np.array_equal(seen[..., :3], np.asarray(image)) and seen.shape[2] == 4
        image.putpixel((0, 0), (1, 2, 3))
        assert shared == (seen[0, 0, :3].tolist() == [1, 2, 3])


def test_a_cut_is_a_box_of_the_image_and_what_follows_is_what_its_dice_say():
    """Red is x, green is y: a cut shows where it comes from. The published box: 0.2 to 1 of the area, 3/4 to 4/3."""
    y, x = np.mgrid[:250, :256].astype(np.uint8)
    colour = Image.fromarray(np.stack([x, y, 0 * x], 2))
    cuts = [images.random_cut(colour, 32, np.random.default_rng(seed)) for seed in range(300)]
    boxes = []
    for cut in cuts:
        (y0, x0), (h, w) = cut.pixels[0, 0, [1, 0]].tolist(), cut.pixels.shape[:2]
        assert np.array_equal(cut.pixels[..., :3], np.asarray(colour)[y0:y0 + h, x0:x0 + w])
        boxes.append((w * h / (250 * 256), w / h, x0 / (257 - w), y0 / (251 - h)))
        plain, = images.train_images([cut._replace(dice=[])], 32)
        assert (plain[0, 0, 0] > plain[0, 0, -1]) == cut.mirrored and plain[1, 0, 0] < plain[1, -1, 0]
    areas, ratios, across, down = np.array(boxes).T
    assert 0.19 < areas.min() < 0.23 and areas.max() > 0.9 and 0.73 < ratios.min() < 0.8 and 1.25 < ratios.max() < 1.36
    assert all(abs(x.mean() - 0.5) < 0.1 for x in (across, down)) and abs(np.corrcoef(across, down)[0, 1]) < 0.2
    assert 120 < sum(cut.mirrored for cut in cuts) < 180 and all(len(cut.dice) == 2 for cut in cuts)
    bright, = images.train_images([cuts[0]._replace(dice=[4 / 10])], 32)     # the fifth operation, applied
    plain, = images.train_images([cuts[0]._replace(dice=[])], 32)
    assert np.array_equal(bright, images.stretch(torch.from_numpy(plain), 1.36).numpy())
    grey = Image.fromarray(x)                                                # converted: this memory must live
    for seed, cut in enumerate(cuts[:20]):
        again = images.random_cut(grey, 32, np.random.default_rng(seed))
        assert np.array_equal(again.pixels[..., 2], cut.pixels[..., 0])
    for shape in ((900, 10), (10, 900)):                                     # no box fits: the whole
        assert images.random_cut(colour.resize(shape), 32, np.random.default_rng(0)).pixels.shape[1::-1] == shape


def test_a_large_cut_is_made_small_before_it_waits_for_others_and_is_the_same(photo, monkeypatch):
    large = photo.resize((1500, 1000))
    cuts = [images.random_cut(large, 64, np.random.default_rng(seed)) for seed in range(9)]
    assert {cut.pixels.shape == (64, 64, 4) for cut in cuts} == {True, False}
    for seed, cut in enumerate(cuts):
        if cut.pixels.shape == (64, 64, 4):
            monkeypatch.setattr(images, "resize", lambda pixels, size: pixels)
            whole = images.random_cut(large, 64, np.random.default_rng(seed))
            monkeypatch.undo()
            assert whole.pixels.nbytes >= images.LARGE
            assert np.array_equal(*images.train_images([cut, whole], 64))
