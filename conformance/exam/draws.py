"""Sources of choices: the structure of a case is a function of the whole numbers that one of these gives."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, TypeVar

import numpy as np

if TYPE_CHECKING:
    from hypothesis.strategies import DataObject

Drawn = TypeVar("Drawn")


class Rejected(Exception):
    """These choices lead to no case."""


class Draws(ABC):
    """Choices for one case. Smaller numbers and earlier options are simpler: shrinking moves towards them."""

    @abstractmethod
    def integer(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""

    def pick(self, options: Sequence[Drawn]) -> Drawn:
        """One of the options."""
        return options[self.integer(0, len(options) - 1)]

    def walk(self, options: Sequence[Drawn]) -> Drawn:
        """One of the options; consecutive cases of an exam take them in turn."""
        return self.pick(options)

    def some(self, share: float = 0.5) -> bool:
        """True in about that share of the cases."""
        return self.integer(0, 99) >= 100 - round(100 * share)

    def generator(self) -> np.random.Generator:
        """A generator of array values, seeded by one choice."""
        return np.random.default_rng(self.integer(0, 2**32 - 1))

    def reject(self, why: str) -> NoReturn:
        """Give up on this case."""
        raise Rejected(why)


class SeededDraws(Draws):
    """Case ``number`` of a fixed sequence: the same choices on every machine."""

    def __init__(self, number: int, salt: str = "") -> None:
        digest = hashlib.sha256(f"{salt}/{number}".encode()).digest()
        self._random = random.Random(digest)
        self._number = number

    def integer(self, low: int, high: int) -> int:
        """As :class:`Draws` says."""
        return self._random.randint(low, high)

    def walk(self, options: Sequence[Drawn]) -> Drawn:
        """Option ``number`` modulo their count."""
        return options[self._number % len(options)]


class HypothesisDraws(Draws):
    """Choices of Hypothesis, which shrinks them."""

    def __init__(self, data: DataObject) -> None:
        self._data = data

    def integer(self, low: int, high: int) -> int:
        """As :class:`Draws` says."""
        from hypothesis import strategies

        return self._data.draw(strategies.integers(low, high))

    def reject(self, why: str) -> NoReturn:
        """Tell Hypothesis that this is no example."""
        from hypothesis import reject

        reject()
