"""Images are cropped, resized and augmented as published: Pillow's own operations are the reference."""
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from formats import images


@pytest.fixture(scope="module")
def photo():
    noise = np.random.default_rng(0).integers(20, 230, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC)


def test_transforms_give_uint8_of_the_size_asked_for(photo):
    for seed in range(30):
        x = images.train_transform(photo, 32, np.random.default_rng(seed))
        assert x.shape == (3, 32, 32) and x.dtype == np.uint8
    expected = np.asarray(photo.resize((48, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(images.eval_transform(photo, 48), expected)        # the whole image, not its aspect


def test_normalise_gives_zero_mean_and_unit_deviation_in_clips_statistics():
    white = images.normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    expected = [(1 - m) / s for m, s in zip(images.MEAN, images.STD)]
    assert torch.allclose(white[0, :, 0, 0], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("box", [(0, 0, 400, 300), (37, 20, 350, 290), (100, 100, 180, 150)])
def test_resizing_is_pillows_bicubic_within_two_grey_levels(photo, box):
    part = photo.crop(box)
    theirs = np.asarray(part.resize((96, 96), Image.Resampling.BICUBIC)).astype(int)
    wrong = abs(np.asarray(images.resize(part, 96)).astype(int) - theirs)
    assert wrong.max() <= 2 and (wrong > 1).mean() < 1e-3


def test_a_box_has_the_published_area_shape_and_place():
    """0.2 to 1 of the area, 3/4 to 4/3 wide by high, anywhere; the whole image where no box fits."""
    rng = np.random.default_rng(0)
    boxes = np.array([images.random_box(256, 250, rng) for _ in range(500)])
    left, top, right, bottom = boxes.T
    w, h = right - left, bottom - top
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 256 and bottom.max() <= 250
    area, ratio = w * h / (256 * 250), w / h
    assert 0.19 < area.min() < 0.23 and area.max() > 0.9
    assert 0.73 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.36
    across, down = left / (257 - w), top / (251 - h)
    assert abs(across.mean() - 0.5) < 0.1 and abs(down.mean() - 0.5) < 0.1
    assert abs(np.corrcoef(across, down)[0, 1]) < 0.2
    assert images.random_box(900, 10, rng) == (0, 0, 900, 10)


def test_a_crop_shows_its_box_and_half_of_them_are_mirrored():
    """Red is x and green is y: a crop's mean colour is the middle of its box."""
    y, x = np.mgrid[:250, :256].astype(np.uint8)
    colour = Image.fromarray(np.stack([x, y, 0 * x], 2))
    mirrored = 0
    for seed in range(100):
        left, top, right, bottom = images.random_box(256, 250, np.random.default_rng(seed))
        crop = np.asarray(images.random_crop(colour, 32, np.random.default_rng(seed)))
        assert abs(crop[..., 0].mean() - (left + right - 1) / 2) < 1 and abs(crop[..., 1].mean() - (top + bottom - 1) / 2) < 1
        red = images.train_transform(colour, 32, np.random.default_rng(seed))[0].astype(int)
        mirrored += red[:, 8].sum() > red[:, 24].sum()
    assert 35 < mirrored < 65


def test_a_large_jpeg_is_decoded_small_but_never_smaller_than_it_is_shown(photo):
    out = io.BytesIO()
    photo.resize((8, 6)).resize((1600, 1200)).save(out, "JPEG", quality=95)
    smaller = 0
    for seed in range(9):
        lazy, whole = Image.open(out), Image.open(out)
        whole.load()                                                         # cannot be decoded small any more
        x, y = (np.asarray(images.random_crop(image, 200, np.random.default_rng(seed))).astype(int)
                for image in (lazy, whole))
        left, top, right, bottom = images.random_box(1600, 1200, np.random.default_rng(seed))
        assert min(right - left, bottom - top) * lazy.width / 1600 >= 199.5
        smaller += lazy.width < 1600
        assert abs(x - y).mean() < 4
    assert smaller > 3


def test_randaugment_has_the_ten_published_operations(photo):
    """At level 7 of 10: rotation by 21 degrees, brightness and sharpness 1.36, shears 0.21, shifts of 7 pixels."""
    small = photo.resize((96, 96))
    grey = (128, 128, 128)
    pixels = np.asarray(small).astype(int)

    def seen(name, magnitude=0.7):
        return np.asarray(images.AUGMENT[name](small, magnitude)).astype(int)

    assert list(images.AUGMENT) == ["identity", "autocontrast", "equalize", "rotate", "brightness", "sharpness",
                                    "shear_x", "shear_y", "shift_x", "shift_y"]
    assert np.array_equal(seen("identity"), pixels)
    low, high = pixels.min((0, 1)), pixels.max((0, 1))
    assert abs(seen("autocontrast") - (pixels - low) * 255 / (high - low)).max() <= 1
    counts = [np.histogram(seen("equalize")[..., c], 8, (0, 256))[0] for c in range(3)]
    assert np.abs(np.array(counts) / (96 * 96) - 1 / 8).max() < 0.02
    turned = small.transform((96, 96), Image.Transform.AFFINE, rotation(21), Image.Resampling.BILINEAR, fillcolor=grey)
    assert (abs(seen("rotate") - np.asarray(turned).astype(int)) > 2).mean() < 0.01
    assert abs(seen("brightness") - (pixels * 1.36).clip(0, 255)).max() <= 1
    assert np.array_equal(seen("brightness", -0.7), seen("brightness"))
    assert np.array_equal(seen("sharpness"), np.asarray(ImageEnhance.Sharpness(small).enhance(1.36)))
    for sign in (1, -1):
        assert np.array_equal(seen("shift_x", 0.7 * sign), np.asarray(shifted(pixels, 7 * sign, 1)))
        assert np.array_equal(seen("shift_y", 0.7 * sign), np.asarray(shifted(pixels, 7 * sign, 0)))
    moved = (pixels[50, 30] + pixels[50, 31]) / 2                            # (20, 50) comes from 20 + 0.21 * 50 = 30.5
    assert abs(seen("shear_x")[50, 20] - moved).max() < 6 and (seen("shear_x")[80:, -1] == 128).all()
    moved = (pixels[30, 50] + pixels[31, 50]) / 2
    assert abs(seen("shear_y")[20, 50] - moved).max() < 6 and (seen("shear_y")[-1, 80:] == 128).all()


def rotation(degrees):
    """About the middle of 96 x 96 pixels, anticlockwise, as the map from output to input."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return c, -s, 48 - c * 48 + s * 48, s, c, 48 - s * 48 - c * 48


def shifted(pixels, by, axis):
    moved = np.roll(pixels, by, axis)
    index = [slice(None)] * 3
    index[axis] = slice(0, by) if by > 0 else slice(by, None)
    moved[tuple(index)] = 128
    return moved


def test_randaugment_applies_each_of_two_operations_half_of_the_time(photo):
    small = photo.resize((32, 32))
    same = sum(images.rand_augment(small, np.random.default_rng(seed)) is small for seed in range(400))
    assert abs(same / 400 - 0.55 ** 2) < 0.07                                # not applied, or the identity


def test_sixteen_bits_of_grey_are_scaled(tmp_path):
    Image.new("I;16", (1, 1), 1 << 15).save(tmp_path / "x.png")
    for image in (Image.open(tmp_path / "x.png"), images.open_image(tmp_path / "x.png")):
        assert images.rgb(image).getpixel((0, 0)) == (128, 128, 128)


def held(photo, orientation, kind="JPEG"):
    """A file whose EXIF block says how the camera was held; 9 stands for a damaged block."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    photo.save(out, kind, exif=exif.tobytes() if orientation < 9 else b"Exif\0\0damaged")
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_as_pillow_says_once_and_in_training_too(photo, kind, orientation):
    raw = held(photo, orientation, kind)
    upright = images.open_image(raw)
    assert np.array_equal(upright, ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB"))
    assert images.rgb(upright) is upright                                    # not turned a second time
    assert np.array_equal(images.eval_transform(Image.open(io.BytesIO(raw)), 48), images.eval_transform(upright, 48))
    stored = Image.open(io.BytesIO(raw)).convert("RGB")
    stored.info = {}
    turned = np.array(images.random_crop(Image.open(io.BytesIO(raw)), 100, np.random.default_rng(3))).astype(int)
    crop = images.random_crop(stored, 100, np.random.default_rng(3))
    method = images.UPRIGHT.get(orientation)
    assert abs(turned - np.array(crop if method is None else crop.transpose(method))).mean() < 3


def test_damaged_exif_data_leave_the_image_as_it_is(photo):
    assert np.array_equal(images.open_image(held(photo, 9)), images.open_image(held(photo, 1)))


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_black_icons_on_nothing_are_black_on_white_in_every_kind_of_file():
    icon = Image.new("RGBA", (40, 30))
    ImageDraw.Draw(icon).rectangle((10, 10, 29, 19), "black")
    grey, palette = icon.convert("LA"), icon.quantize(4)
    red = Image.new("RGB", (40, 30), "red")
    expected = np.full((30, 40, 3), 255)
    expected[10:20, 10:30] = 0
    files = [saved(icon, "PNG"), saved(icon, "WEBP", lossless=True), saved(icon, "GIF"), saved(grey, "PNG"), saved(palette, "PNG"),
             saved(icon, "GIF", save_all=True, append_images=[red]),         # of an animation the first picture
             saved(ImageOps.invert(icon.getchannel("A")), "PNG", transparency=255)]
    for raw in files:
        assert np.array_equal(images.open_image(raw), expected)
        for transform in (images.eval_transform, lambda image, size: np.asarray(
                images.random_crop(image, size, np.random.default_rng(0))).transpose(2, 0, 1)):
            seen = transform(Image.open(io.BytesIO(raw)), 32)                # in training also through a crop
            assert seen.min() == 0 and seen.max() == 255 and seen.mean() > 100
    assert np.array_equal(images.rgb(icon.convert("PA")), expected)


def test_grey_of_one_and_sixteen_bits_and_cmyk_keep_their_brightness():
    for image, kind in ((Image.new("1", (9, 9), 1), "PNG"), (Image.new("I;16", (9, 9), 65535), "PNG"),
                        (Image.new("CMYK", (9, 9), (0, 0, 0, 0)), "JPEG")):
        assert np.asarray(images.open_image(saved(image, kind))).min() == 255
    assert images.rgb(Image.new("I", (1, 1), 1 << 15)).getpixel((0, 0)) == (128, 128, 128)


def test_an_image_opened_for_a_size_is_decoded_at_twice_that_size_or_more(photo):
    raw = saved(photo.resize((1600, 1200)), "JPEG")
    small = images.open_image(raw, 150)
    assert small.size == (400, 300)
    whole = images.eval_transform(images.open_image(raw), 150).astype(int)
    assert abs(images.eval_transform(small, 150) - whole).mean() < 1
    assert images.open_image(raw, 900).size == (1600, 1200)
