"""Images: opened, cropped and augmented for training; resized whole for evaluation; normalised.

    undecoded          bytes or a path -> Pillow image that is not decoded yet
    rgb                Pillow image -> upright and RGB: one rule for training, evaluation and search
    open_image         bytes or a path -> RGB image
    train_transform    Pillow image -> random crop, resized, mirrored, RandAugment: (3, s, s) uint8
    eval_transform     Pillow image -> the whole, resized: (3, s, s) uint8
    normalise          (B, 3, s, s) uint8 -> float32, what a model takes

Letters: B images, s pixels a side. Pillow and torch do the work, on uint8. The transforms are those
of the official code, which does them in OpenCV: the same up to rounding.
"""
import contextlib
import functools
import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

MEAN = (0.48145466, 0.4578275, 0.40821073)      # CLIP's, as published
STD = (0.26862954, 0.26130258, 0.27577711)
AREA = (0.2, 1.0)                               # share of an image's area that a crop may take
FINE_TUNING_AREA = (0.5, 1.0)                   # the same where a task asks for details
RATIO = (3 / 4, 4 / 3)                          # width by height of a crop
OPERATIONS = 2                                  # of RandAugment on an image
MAGNITUDE = 0.7                                 # of RandAugment: 7 of 10
GREY = (128, 128, 128)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP") # Pillow starts other programs for some others (EPS)
ORIENTATION = 0x0112                            # EXIF's number of how a camera was held
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
           6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


# --------------------------------------------------------------------------------------------------
# Opening
# --------------------------------------------------------------------------------------------------

def undecoded(picture):
    """Bytes or a path -> image. Pillow's limit against decompression bombs stays on."""
    file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    return Image.open(file, formats=FORMATS)


def rgb(image):
    """The image, or a part of it, as a viewer shows it: upright (EXIF), transparent parts on white,
    16 bits of grey scaled to 8. Of an animation the first picture."""
    image.load()
    orientation = None
    with contextlib.suppress(Exception):            # damaged EXIF data say nothing of the pixels
        orientation = image.getexif().get(ORIENTATION)
    if image.mode.startswith("I"):                  # convert alone would clip 16 bits to white
        image = image.point(lambda grey: grey / 256).convert("L")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer)
    elif image.mode != "RGB":
        image = image.convert("RGB")
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
        image.info = {}                             # a second rgb() must not turn it again
    return image


def open_image(picture, size=None):
    """Bytes or a path -> RGB image. size: what it will be resized to. A JPEG is then decoded at
    1/2, 1/4 or 1/8, which is faster and takes less memory, but not below twice that size."""
    with undecoded(picture) as image:
        if size:
            image.draft("RGB", (2 * size, 2 * size))
        return rgb(image)


# --------------------------------------------------------------------------------------------------
# RandAugment
# --------------------------------------------------------------------------------------------------

def affine(image, *matrix):
    """Pixel (x, y) comes from (a x + b y + c, d x + e y + f), grey from outside the image."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR,
                           fillcolor=GREY)


def shift(image, x, y):
    """As affine could, but ten times as fast."""
    moved = Image.new("RGB", image.size, GREY)
    moved.paste(image, (x, y))
    return moved


# Image and magnitude in -1..1 -> image. Brightness and sharpness have no direction.
AUGMENT = {
    "identity": lambda image, m: image,
    "autocontrast": lambda image, m: ImageOps.autocontrast(image),
    "equalize": lambda image, m: ImageOps.equalize(image),
    "rotate": lambda image, m: image.rotate(30 * m, Image.Resampling.BILINEAR, fillcolor=GREY),
    "brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * abs(m)),
    "sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * abs(m)),
    "shear_x": lambda image, m: affine(image, 1, 0.3 * m, 0, 0, 1, 0),
    "shear_y": lambda image, m: affine(image, 1, 0, 0, 0.3 * m, 1, 0),
    "shift_x": lambda image, m: shift(image, round(10 * m), 0),
    "shift_y": lambda image, m: shift(image, 0, round(10 * m)),
}


def rand_augment(image, rng):
    """Two of the ten operations, drawn at random, each applied with probability 1/2."""
    operations = list(AUGMENT.values())
    for i in rng.integers(len(operations), size=OPERATIONS):
        if rng.random() < 0.5:
            sign = 1 if rng.random() < 0.5 else -1
            image = operations[i](image, sign * MAGNITUDE)
    return image


# --------------------------------------------------------------------------------------------------
# For training
# --------------------------------------------------------------------------------------------------

def random_box(width, height, rng, share=AREA):
    """RandomResizedCrop's (left, top, right, bottom): a random share of the area and a random
    shape; the whole image after ten boxes that do not fit."""
    for _ in range(10):
        area = width * height * rng.uniform(*share)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x = int(rng.integers(width - w + 1))
            y = int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    return 0, 0, width, height


def random_crop(image, size, rng, share=AREA):
    """A random box of the image, resized -> RGB image of size x size pixels. The box is drawn
    before the image is upright: turned or mirrored, each box has the same probability."""
    width, height = image.size
    left, top, right, bottom = random_box(width, height, rng, share)

    # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, which is faster. draft chooses the
    # smallest that is not below the size asked for: here one that leaves the crop `size` pixels.
    image.draft("RGB", (math.ceil(width * size / (right - left)),
                        math.ceil(height * size / (bottom - top))))
    x = image.size[0] / width                   # 1, 1/2, 1/4 or 1/8, nearly
    y = image.size[1] / height
    box = (round(left * x), round(top * y), round(right * x), round(bottom * y))
    return resize(rgb(image.crop(box)), size)


def resize(image, size):
    """Pillow's resize(BICUBIC) in torch: a quarter of the time, within two grey levels."""
    rows = torch.from_numpy(np.array(image))[None]                  # (1, h, w, 3)
    rows = rows.permute(0, 3, 1, 2)                                 # (1, 3, h, w), as it lies
    small = F.interpolate(rows, (size, size), mode="bicubic", antialias=True)   # (1, 3, s, s)
    return Image.fromarray(small[0].permute(1, 2, 0).numpy())       # (s, s, 3)


def train_transform(image, size, rng, share=AREA, mirror=True):
    """Random crop, mirrored with probability 1/2, RandAugment -> uint8 (3, size, size). share: how
    much of the image's area a crop takes. mirror=False: where left and right have a meaning."""
    image = random_crop(image, size, rng, share)
    if rng.random() < 0.5 and mirror:
        image = ImageOps.mirror(image)
    return pixels(rand_augment(image, rng))


# --------------------------------------------------------------------------------------------------
# For evaluation, and on the device
# --------------------------------------------------------------------------------------------------

def pixels(image):
    return np.asarray(image).transpose(2, 0, 1)                     # (s, s, 3) -> (3, s, s)


def eval_transform(image, size):
    """Resized without keeping the aspect, as published -> uint8 (3, size, size)."""
    image = rgb(image)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return pixels(image)


@functools.cache
def mean_and_std(device):
    """(3, 1, 1) each, of values in 0..255: copied to a device once, not in every step."""
    return [torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (MEAN, STD)]


def normalise(images):
    """uint8 (B, 3, s, s) -> float32, CLIP's mean and deviation."""
    mean, std = mean_and_std(images.device)
    return (images - mean) / std
