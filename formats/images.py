"""Images: opened without being decoded; what is cut out of one, resized and augmented for training; the whole of it, resized, for evaluation (F3.7).

    undecoded        bytes or a path -> Pillow image; open_image decodes it, to RGB
    random_cut       Pillow image -> Cut: the box that RandomResizedCrop draws, decoded, and the dice of what follows
    train_images     Cuts -> resized, mirrored, RandAugment
    eval_transform       Pillow image -> resized
    normalise        uint8 (B, 3, s, s) -> what a model takes

Everything is uint8 in torch or NumPy: on one core several times as fast as Pillow's own operations and, on photos,
within two grey levels of them. What it costs beside decoding: README, "Your data".
"""
import contextlib
import ctypes
import functools
import io
import math
import types
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)       # CLIP's (F3.7)
SCALE, LEVEL = (0.2, 1.0), 0.7           # parts of an image's area that a crop may take; RandAugment's 7 of 10 (F3.7)
LARGE = 1 << 22                          # bytes of a cut that does not wait for others
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")       # what a path may lead to; others (EPS) start programs


# ------------------------------------------------------------------------------------------------------------------
# Pixels
# ------------------------------------------------------------------------------------------------------------------

def rgb(image):
    """Pillow's convert("RGB"), but 16 bits of grey are scaled: convert clips them, nearly all to white."""
    if image.mode.startswith("I;16"):
        image = image.point(lambda grey: grey / 256).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")            # convert copies even where nothing changes


def undecoded(picture):
    """Bytes or a path -> image, not yet decoded. Pillow's limit against decompression bombs stays on."""
    return Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture, formats=FORMATS)


def open_image(path):
    """RGB image of a file; ValueError that names the file when it is missing or no image."""
    try:
        with undecoded(path) as image:
            image.load()
            return rgb(image)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None


pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi))
Words = ctypes.c_int64 * 7               # Arrow's array: length, nulls, offset, how many buffers, children; then both


def memory(image):
    """RGB image -> uint8 (h, w, 4), red, green, blue and a byte of nothing: Pillow's own memory, to be read while the
    image lives. tobytes, crop and np.asarray copy it. Source: Arrow's C data interface, as Pillow fills it."""
    shape = image.height, image.width, 4
    with contextlib.suppress(ValueError):                                    # over 16 MB, which may lie in pieces
        _, capsule = image.__arrow_c_array__()                               # h * w lists of four numbers: their child
        lists = Words.from_address(pointer(capsule, b"arrow_array"))
        numbers = Words.from_address(Words.from_address(lists[6])[0])
        if numbers[0] == math.prod(shape):
            place = Words.from_address(numbers[5])[1]
            found = {"data": (place, True), "shape": shape, "typestr": "|u1", "version": 3}
            return np.asarray(types.SimpleNamespace(__array_interface__=found))                     # (h, w, 4)
    return np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8).reshape(shape)


def resize(rows, size):
    """uint8 (h, w, 4) -> (size, size, 4): Pillow's antialiased bicubic in torch, several times as fast and on photos
    within two grey levels. Its fast way wants four bytes a pixel, next to each other from (1, h, w, 4) on."""
    rows = torch.from_numpy(rows)[None].permute(0, 3, 1, 2)                         # (h, w, 4) -> (1, 4, h, w)
    return F.interpolate(rows, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------------------------------
# RandAugment's operations: uint8 (3, s, s) -> the same
# ------------------------------------------------------------------------------------------------------------------

def stretch(image, factor):
    """factor * image, rounded; a float image is used up."""
    return image.float().mul_(factor).add_(0.5).clamp_(0, 255).int().byte()  # float to byte is slower without the int32


def autocontrast(image):
    low, high = image.amin((1, 2), keepdim=True).float(), image.amax((1, 2), keepdim=True).float()
    factor, low = torch.where(high > low, 255 / (high - low), 1), torch.where(high > low, low, 0)
    return stretch(image.float().sub_(low), factor)


def equalize(image):
    """Every channel's histogram made flat, as Pillow does it."""
    flat = image.numpy().copy()
    for plane in flat:
        counts = np.bincount(plane.ravel(), minlength=256)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        if step:
            plane[:] = ((step // 2 + counts.cumsum() - counts) // step).clip(0, 255).astype(np.uint8).take(plane)
    return torch.from_numpy(flat)


def sharpness(image, factor):
    """Away from Pillow's SMOOTH, (3 x 3 ones and four more times the middle) / 13; the border stays."""
    x, y = image.short(), image.float()
    rows = (x[:, :-2] + x[:, 1:-1]).add_(x[:, 2:])
    nine = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(x[:, 1:-1, 1:-1], alpha=4)
    y[:, 1:-1, 1:-1].mul_(factor).add_(nine, alpha=(1 - factor) / 13)
    return stretch(y, 1)


@functools.lru_cache(16)
def affine_grid(size, a, b, c, d):
    return F.affine_grid(torch.tensor([[[a, b, 0.0], [c, d, 0.0]]]), (1, 3, size, size), align_corners=False)


def affine(image, *matrix):
    """Bilinear; pixel (x, y) comes from (a x + b y, c x + d y) about the centre, grey (128) from outside."""
    grid = affine_grid(image.shape[1], *matrix)
    moved = F.grid_sample(image.float().sub_(128)[None], grid, align_corners=False)[0]
    return moved.add_(128.5).int().byte()


def turn(image, angle):
    return affine(image, math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle))


def shift(image, x, y):
    moved, size = torch.full_like(image, 128), image.shape[1]
    moved[:, max(0, y):size + y, max(0, x):size + x] = image[:, max(0, -y):size - y, max(0, -x):size - x]
    return moved


AUGMENT = [
    lambda image, x, sign: image,
    lambda image, x, sign: autocontrast(image),
    lambda image, x, sign: equalize(image),
    lambda image, x, sign: turn(image, sign * math.radians(30 * x)),
    lambda image, x, sign: stretch(image, 1.8 * x + 0.1),                    # brightness
    lambda image, x, sign: sharpness(image, 1.8 * x + 0.1),
    lambda image, x, sign: affine(image, 1, sign * 0.3 * x, 0, 1),           # shear along x, along y
    lambda image, x, sign: affine(image, 1, 0, sign * 0.3 * x, 1),
    lambda image, x, sign: shift(image, round(sign * 10 * x), 0),
    lambda image, x, sign: shift(image, 0, round(sign * 10 * x)),
]


def rand_augment(image, dice):
    """uint8 (3, s, s) -> the same: for each die in 0..1, one of ten operations, applied with probability 1/2."""
    for draw in dice:
        operation, toss = divmod(int(4 * len(AUGMENT) * draw), 4)            # 0, 1: with this sign; 2, 3: not applied
        if toss < 2:
            image = AUGMENT[operation](image, LEVEL, (1, -1)[toss])
    return image


# ------------------------------------------------------------------------------------------------------------------
# For training
# ------------------------------------------------------------------------------------------------------------------

class Cut(NamedTuple):
    """The part of an image that an example shows, and what is still to be done to it."""
    pixels: np.ndarray                  # (h, w, 4) uint8: red, green, blue and a byte of nothing
    mirrored: bool
    dice: list                          # of rand_augment


def random_cut(image, size, rng):
    """RandomResizedCrop's box of a Pillow image, decoded -> Cut. A large one is made small at once: fifteen PNGs, which
    cannot be decoded small, would take much memory while they wait."""
    width, height = image.size
    x, y, w, h = 0, 0, width, height
    for part, shape, across, down in rng.random((10, 4)).tolist():           # ten tries of four dice
        area, ratio = width * height * (SCALE[0] + part * (SCALE[1] - SCALE[0])), (4 / 3) ** (2 * shape - 1)
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            x, y, w, h = int(across * (width - wide + 1)), int(down * (height - high + 1)), wide, high
            break
    image.draft("RGB", (-(-width * size // w), -(-height * size // h)))      # a JPEG decodes at 1/2, 1/4 or 1/8 if the
    sx, sy = image.size[0] / width, image.size[1] / height                   # crop still has `size` pixels then
    rows, columns = slice(round(y * sy), round((y + h) * sy)), slice(round(x * sx), round((x + w) * sx))
    image = rgb(image)                                                       # lives until its pixels are copied
    pixels = memory(image)[rows, columns].copy()                             # (h, w, 4)
    mirror, *dice = rng.random(3).tolist()
    return Cut(pixels if pixels.nbytes < LARGE else resize(pixels, size), mirror < 0.5, dice)


def train_transform(image, size, rng):
    return train_images([random_cut(image, size, rng)], size)[0]


def train_images(cuts, size):
    """Cuts -> their images as the model is trained on them, uint8 arrays (3, size, size). Several at a time: on
    its own between two decodings this takes longer, as if they drove its code out of the processor's cache."""
    small = [resize(cut.pixels, size)[:, ::-1 if cut.mirrored else 1, :3] for cut in cuts]          # (size, size, 3)
    small = [torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1))) for x in small]           # (3, size, size)
    return [rand_augment(image, cut.dice).numpy() for image, cut in zip(small, cuts)]


# ------------------------------------------------------------------------------------------------------------------
# For evaluation, and on the device
# ------------------------------------------------------------------------------------------------------------------

def eval_transform(image, size):
    """Resized without keeping the aspect, as published -> uint8 (3, size, size)."""
    small = image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb(small)).transpose(2, 0, 1)                         # (size, size, 3) -> (3, size, size)


def normalise(images):
    """uint8 (B, 3, s, s) -> float32, CLIP's mean and deviation."""
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) * 255 for x in (MEAN, STD))
    return (images - mean) / std
