"""Text to model: bytes of the Python standard library's sources, or token files as nanoGPT writes them."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from translution.paper.training import TrainingError

BYTES = 256
# GPT-2's, which nanoGPT's preparation of OpenWebText uses; tokens are uint16.
GPT2_VOCABULARY = 50257
# Of the standard library's files one in so many is held out.
HELD_OUT = 20
NOT_SOURCES = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Tokens in a row, to train on and held out: uint8 or uint16 [N]; ``about`` says where they come from."""

    train: npt.NDArray[Any]
    held_out: npt.NDArray[Any]
    vocabulary_size: int
    about: dict[str, Any]


@lru_cache(maxsize=1)
def load_corpus(folder: Path | None = None) -> Corpus:
    """``train.bin`` and ``val.bin`` in ``folder``, or without one the standard library's own sources as bytes.

    Raises:
        TrainingError: a file is missing, empty or no row of tokens.
    """
    return _sources(Path(sysconfig.get_path("stdlib"))) if folder is None else _token_files(folder)


def is_held_out(name: str) -> bool:
    """Whether a source file is held out: its name alone decides."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT == 0


def source_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and paths of all ``.py`` files but tests and what was installed beside them, sorted by name."""
    named = ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*.py"))
    yield from sorted((name, path) for name, path in named if not set(name.split("/")) & set(NOT_SOURCES))


def _sources(folder: Path) -> Corpus:
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name, path in source_files(folder):
        # A byte that no source has stands between two files.
        parts[is_held_out(name)].append(path.read_bytes() + b"\0")
    train, held_out = (np.frombuffer(b"".join(parts[which]), dtype=np.uint8) for which in (False, True))
    if not len(train) or not len(held_out):
        raise TrainingError(
            f"{folder} has {sum(map(len, parts.values()))} source files",
            "the standard library's sources are what is modelled",
            "Give token files with --data",
        )
    digest = hashlib.sha256(train.tobytes() + held_out.tobytes()).hexdigest()
    about = {
        "source": "the Python standard library's sources",
        "files": {"train": len(parts[False]), "held_out": len(parts[True])},
        "tokens": {"train": len(train), "held_out": len(held_out)},
        "sha256": digest,
    }
    return Corpus(train, held_out, BYTES, about)


def _token_files(folder: Path) -> Corpus:
    rows = []
    for name in ("train.bin", "val.bin"):
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size == 0 or size % 2:
            raise TrainingError(
                f"{path} {f'has {size} bytes' if path.is_file() else 'does not exist'}",
                "train.bin and val.bin hold tokens as little-endian uint16, as nanoGPT's prepare.py writes them",
                "Prepare them, or leave --data out for the Python standard library's sources",
            )
        rows.append(np.memmap(path, dtype="<u2", mode="r"))
    train, held_out = rows
    # The whole of a large file is not read for this.
    digest = hashlib.sha256(train[: 1 << 20].tobytes() + held_out[: 1 << 20].tobytes()).hexdigest()
    about = {
        "source": "token files",
        "tokens": {"train": len(train), "held_out": len(held_out)},
        "sha256_of_the_first_million_each": digest,
    }
    return Corpus(train, held_out, GPT2_VOCABULARY, about)
