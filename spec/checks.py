"""What counts as a number or a sequence in a spec, and the sizes beyond which a spec is refused unbuilt."""

import math
from collections.abc import Iterable
from typing import TypeGuard

from translution.spec.errors import SpecError, require

MAX_AXES = 8
MAX_TOKENS = 2**24
MAX_CLASSES = 2**24
MAX_STEPS = 2**31
MAX_FEATURES = 2**20
MAX_PARAMETERS = 2**38
MAX_ENCODERS = 32
MAX_BUCKETS = 256


def is_whole(value: object) -> TypeGuard[int]:
    """An int; True and False are not numbers here."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """An int or a float that a finite float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def as_tuple(value: object, clause: str, given: str, rule: str, remedy: str) -> tuple[object, ...]:
    """``value`` as a tuple, so that it hashes; text and single values are refused."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise SpecError(clause, given, rule, remedy)
    return tuple(value)


def per_axis(name: str, value: object, rank: int, least: int | None = None) -> tuple[int, ...]:
    """One int per axis from an int or a sequence of ints (clause L1)."""
    shown = f"{name}={value!r}"
    rule = f"{name} is one whole number, or one for each of the {rank} axes"
    remedy = f"Give {name} as an int or a tuple of {rank} ints"
    given = (value,) * rank if is_whole(value) else as_tuple(value, "L1", shown, rule, remedy)
    whole = tuple(v for v in given if is_whole(v))
    require(len(given) == rank and len(whole) == rank, "L1", shown, rule, remedy)
    if least is not None:
        require(min(whole) >= least, "L1", shown, f"{name} must be at least {least}", f"Give {least} or more")
    require(
        max(abs(v) for v in whole) <= MAX_STEPS,
        "L1",
        shown,
        f"{name} must not exceed {MAX_STEPS:,} either way",
        "Give a smaller number",
    )
    return whole


def flag(clause: str, owner: str, name: str, value: object) -> None:
    """Raise unless ``value`` is True or False."""
    require(isinstance(value, bool), clause, f"{owner}({name}={value!r})", f"{name} is a bool", "Give True or False")


def positive(clause: str, owner: str, **sizes: object) -> None:
    """Raise unless every size is an int from 1 to MAX_FEATURES."""
    for name, value in sizes.items():
        require(
            is_whole(value) and 1 <= value <= MAX_FEATURES,
            clause,
            f"{owner}({name}={value!r})",
            f"{name} is a whole number from 1 to {MAX_FEATURES:,}",
            f"Give a positive {name}",
        )
