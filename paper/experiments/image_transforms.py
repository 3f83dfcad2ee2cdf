"""What ImageNet's recipe does to images: crops, flips, RandAugment; MixUp and CutMix of a batch.

Every function draws from the generator that it is given, so an image of a step is a function of seed, step and place.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from translution.paper.training import seed_of

# Mean and standard deviation of ImageNet's channels.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (124, 116, 104)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A generator that starts from :func:`translution.paper.training.seed_of` ``parts``."""
    return np.random.default_rng(seed_of(*parts))


def random_resized_crop(
    image: Image.Image,
    size: int,
    draw: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """A part of random area and shape (Szegedy et al. 2015), as a square of ``size`` pixels.

    ``scale`` bounds its share of the area, ``ratio`` width by height; after ten shapes that don't fit, the centre.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
            return image.resize((size, size), BICUBIC, box=(left, top, left + w, top + h))
    return centre_crop(image, size, share=1.0)


def centre_crop(image: Image.Image, size: int, share: float = 224 / 256) -> Image.Image:
    """The middle square, ``share`` of the shorter side, as ``size`` pixels."""
    width, height = image.size
    side = min(width, height) * share
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), BICUBIC, box=(left, top, left + side, top + side))


def _affine(image: Image.Image, *numbers: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, numbers, BILINEAR, fillcolor=GREY)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance], image: Image.Image, amount: float) -> Image.Image:
    return kind(image).enhance(1 + 0.9 * amount)


# Of an image and an amount in -1..1 whose size is the magnitude; those that have no sign take its size.
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "rotate": lambda image, a: image.rotate(30 * a, BILINEAR, fillcolor=GREY),
    "posterize": lambda image, a: ImageOps.posterize(image, 8 - round(4 * abs(a))),
    "solarize": lambda image, a: ImageOps.solarize(image, round(256 * (1 - abs(a)))),
    "colour": lambda image, a: _enhance(ImageEnhance.Color, image, a),
    "contrast": lambda image, a: _enhance(ImageEnhance.Contrast, image, a),
    "brightness": lambda image, a: _enhance(ImageEnhance.Brightness, image, a),
    "sharpness": lambda image, a: _enhance(ImageEnhance.Sharpness, image, a),
    "shear x": lambda image, a: _affine(image, 1, 0.3 * a, 0, 0, 1, 0),
    "shear y": lambda image, a: _affine(image, 1, 0, 0, 0.3 * a, 1, 0),
    "translate x": lambda image, a: _affine(image, 1, 0, 0.45 * a * image.size[0], 0, 1, 0),
    "translate y": lambda image, a: _affine(image, 1, 0, 0, 0, 1, 0.45 * a * image.size[1]),
}


def rand_augment(image: Image.Image, draw: np.random.Generator, count: int = 2, magnitude: float = 0.9) -> Image.Image:
    """``count`` of :data:`OPERATIONS` one after another (Cubuk et al. 2020), of ``magnitude`` 0..1 and random sign."""
    for name in draw.choice(list(OPERATIONS), count):
        image = OPERATIONS[name](image, magnitude * float(draw.choice((-1.0, 1.0))))
    return image


def as_tensor(image: Image.Image) -> Tensor:
    """Float32 [3, height, width], each channel less ImageNet's mean over its deviation."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def soft_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Probabilities float32 [B, num_classes]: ``smoothing`` spread over all classes, the rest on the label."""
    even = torch.full((len(labels), num_classes), smoothing / num_classes)
    return even.scatter_add(1, labels[:, None], torch.full((len(labels), 1), 1 - smoothing))


def mixed(
    images: Tensor, targets: Tensor, draw: np.random.Generator, mixup: float = 0.8, cutmix: float = 1.0
) -> tuple[Tensor, Tensor]:
    """MixUp (Zhang et al. 2018) or CutMix (Yun et al. 2019), one or the other for the whole batch at even odds.

    Images 2k and 2k + 1 are mixed with each other, so a batch may be split between two pairs. ``mixup`` and ``cutmix``
    are the parameters of their beta distributions. B is even.
    """
    swapped = torch.arange(len(images)) ^ 1
    partners, wanted = images[swapped], targets[swapped]
    if draw.random() < 0.5:
        share = float(draw.beta(mixup, mixup))
        return share * images + (1 - share) * partners, share * targets + (1 - share) * wanted
    height, width = images.shape[-2:]
    cut = math.sqrt(1 - float(draw.beta(cutmix, cutmix)))
    y, x = draw.uniform(0, height), draw.uniform(0, width)
    top, bottom = (min(max(round(y + sign * cut * height / 2), 0), height) for sign in (-1, 1))
    left, right = (min(max(round(x + sign * cut * width / 2), 0), width) for sign in (-1, 1))
    out = images.clone()
    out[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return out, share * targets + (1 - share) * wanted
