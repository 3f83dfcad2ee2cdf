"""Images in one folder for each class, as ImageNet is kept: ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from translution.paper.training import TrainingError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Paths in order of class and name, the number of each one's class, and the classes' names."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> str:
        """Of the names below the folder, not of what is in the files."""
        names = "\n".join(f"{path.parent.name}/{path.name}" for path in self.paths)
        return hashlib.sha256(names.encode()).hexdigest()


def read_folder(folder: Path) -> ImageFolder:
    """What lies below ``folder``; files are opened when they are needed.

    Raises:
        TrainingError: there is no such folder, no class in it, or a class without an image.
    """
    rule = f"images lie in one folder for each class and end with {', '.join(SUFFIXES)}"
    if not folder.is_dir():
        raise TrainingError(f"{folder} is no folder", rule, "Give the folder that holds train/ and val/")
    found: list[tuple[Path, int]] = []
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise TrainingError(f"{folder} has no folder in it", rule, "Put the images of each class into one")
    for number, one in enumerate(classes):
        own = sorted(path for path in one.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not own:
            raise TrainingError(f"{one} has no image in it", rule, "Remove it, or put its images there")
        found += [(path, number) for path in own]
    paths, labels = zip(*found, strict=True)
    return ImageFolder(paths, labels, tuple(path.name for path in classes))


def read_pair(folder: Path) -> tuple[ImageFolder, ImageFolder]:
    """``train`` and ``val`` below ``folder``.

    Raises:
        TrainingError: one of them is missing or empty, or they have different classes.
    """
    train, held_out = read_folder(folder / "train"), read_folder(folder / "val")
    if train.classes != held_out.classes:
        differs = sorted(set(train.classes) ^ set(held_out.classes))
        raise TrainingError(
            f"{len(differs)} classes are in only one of {folder / 'train'} and {folder / 'val'}, {differs[0]} first",
            "both have the same classes",
            "Sort the images of val into folders of the same names",
        )
    return train, held_out


def open_image(path: Path) -> Image.Image:
    """The image in RGB.

    Raises:
        TrainingError: it can't be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for damaged files
        raise TrainingError(
            f"{path} can't be read as an image ({error})", "every file with such a name is one", "Remove or replace it"
        ) from error
