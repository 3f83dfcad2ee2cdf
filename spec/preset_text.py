"""An operator from one word of a command line (clause P3): a JSON file, or a preset with its fields.

``NAME1d:length=L,...``, ``NAME2d:height=H,width=W,...``, ``NAME3d:depth=D,height=H,width=W,...`` or
``NAME:grid=HxW,...`` where NAME is a function of :mod:`translution.spec.presets` and the other fields are its
arguments. Values: ``7``, ``0.5``, ``3x3`` (one per axis), ``true``, ``false``, ``none``, a plain word, and for
``far`` ``clip8`` or ``log16x128``.
"""

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from translution.spec import presets
from translution.spec.classes import Clip, LogBuckets
from translution.spec.errors import SpecError
from translution.spec.operator import Operator
from translution.spec.serialization import operator_from_json

EXTENTS = {"1d": ("length",), "2d": ("height", "width"), "3d": ("depth", "height", "width")}
Preset = Callable[..., Operator]


@functools.cache
def preset_functions() -> Mapping[str, Preset]:
    """Every preset by its name, in the order of the module."""
    found = inspect.getmembers(presets, inspect.isfunction)
    own = [(name, f) for name, f in found if f.__module__ == presets.__name__ and not name.startswith("_")]
    return types.MappingProxyType(dict(sorted(own, key=lambda item: item[1].__code__.co_firstlineno)))


def parse_spec(text: str) -> Operator:
    """The operator that SPEC names: the path of a JSON file, or a preset such as
    ``translution2d:height=7,width=7,dim=192,num_heads=3``.

    Raises:
        SpecError: clause P3 for an unknown preset or field, a missing field or a malformed value, with what is known;
            the clause of the broken rule where the operator itself cannot be.
    """
    path = Path(text)
    if text.endswith(".json") or _is_file(path):
        if not _is_file(path):
            raise SpecError("P3", f"no file {text!r}", "a SPEC that ends in .json is a file", "Check the path")
        return operator_from_json(path)
    name, _, written = text.partition(":")
    stem, extents = _preset(name)
    preset, fields = preset_functions()[stem], _fields(written)
    rank = len(extents) or None
    if not extents or "grid" in fields:
        extents = ("grid",)
    parameters = {n: p for n, p in inspect.signature(preset).parameters.items() if n != "grid"}
    known = [*extents, *parameters]
    for field in fields:
        if field not in known:
            raise _unknown(f"field {field!r} of preset {name}", field, known)
    required = [*extents, *(n for n, p in parameters.items() if p.default is p.empty)]
    missing = [n for n in required if n not in fields]
    if missing:
        example = ",".join(f"{n}={_EXAMPLES.get(n, '64')}" for n in required)
        raise SpecError(
            "P3",
            f"preset {name} without {', '.join(missing)}",
            f"its required fields are {', '.join(required)}",
            f"Write e.g. {name}:{example}",
        )
    hints = typing.get_type_hints(preset)
    grid = _grid(fields, extents, rank)
    return preset(grid, **{n: _value(n, fields[n], hints[n]) for n in parameters if n in fields})


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _grid(fields: Mapping[str, str], extents: tuple[str, ...], rank: int | None) -> tuple[int, ...]:
    written = fields["grid"].split("x") if extents == ("grid",) else [fields[n] for n in extents]
    named = ["grid"] * len(written) if extents == ("grid",) else extents
    if rank not in (None, len(written)):
        raise SpecError("P3", f"grid={fields['grid']}", f"this preset has {rank} axes", "Give one extent for each")
    return tuple(_value(n, text, int) for n, text in zip(named, written, strict=True))


_EXAMPLES = {
    "length": "7",
    "height": "7",
    "width": "7",
    "depth": "7",
    "grid": "7x7",
    "num_heads": "4",
    "kernel_size": "3",
}


def _preset(name: str) -> tuple[str, tuple[str, ...]]:
    known = preset_functions()
    if name in known:
        return name, ()
    stem, rank = name[:-2], name[-2:]
    if stem in known and rank in EXTENTS:
        return stem, EXTENTS[rank]
    raise _unknown(f"preset {name!r}", stem if rank in EXTENTS else name, known, "; add 1d, 2d or 3d, or give grid")


def _unknown(what: str, name: str, known: Iterable[str], more: str = "") -> SpecError:
    names = list(known)
    close = get_close_matches(name, names, n=1)
    remedy = f"Did you mean {close[0]!r}" if close else "Choose one of these"
    return SpecError("P3", f"unknown {what}", f"known are {', '.join(names)}{more}", remedy)


def _fields(written: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for part in written.split(",") if written else ():
        name, equals, value = part.strip().partition("=")
        if not equals or not name or not value:
            raise SpecError(
                "P3", f"{part!r} in a preset", "fields are written name=value, with commas between", "Correct it"
            )
        if name in fields:
            raise SpecError("P3", f"field {name!r} twice", "a field is given once", "Keep one of the two")
        fields[name] = value
    return fields


def _members(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return [member for part in typing.get_args(hint) for member in _members(part)]
    return [hint]


def _value(field: str, text: str, hint: Any) -> Any:
    """The value of one field by its declared type: the first of the type's alternatives that the text fits."""
    forms = []
    for member in sorted(_members(hint), key=lambda m: m is float):
        form, reader = _reader(member)
        forms.append(form)
        try:
            return reader(text)
        except SpecError:
            raise
        except ValueError:
            continue
    raise SpecError("P3", f"{field}={text}", f"{field} is written as {' or '.join(forms)}", "Correct the value")


def _reader(member: Any) -> tuple[str, Callable[[str], object]]:
    """How a value of one type is written, and the function that reads it or raises ValueError."""
    origin = typing.get_origin(member)
    if origin in (tuple, Sequence):
        form, one = _reader(typing.get_args(member)[0])
        return f"{form} for each axis, with x between", lambda text: tuple(one(part) for part in text.split("x"))
    if origin is typing.Literal:
        words = typing.get_args(member)
        return " or ".join(words), lambda text: words[words.index(text)]
    return _READERS[member]


def _whole(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise ValueError(text)
    return int(text)


def _number(text: str) -> float:
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text, flags=re.IGNORECASE):
        raise ValueError(text)
    return float(text)


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[_listed(text, ("true", "false"))]


def _nothing(text: str) -> None:
    _listed(text, ("none",))


def _listed(text: str, words: tuple[str, ...]) -> str:
    return words[words.index(text)]


def _clip(text: str) -> Clip:
    return Clip(_whole(text.removeprefix("clip"))) if text.startswith("clip") else _refuse(text)


def _log(text: str) -> LogBuckets:
    return LogBuckets(*map(_whole, text[3:].split("x"))) if re.fullmatch(r"log[0-9]+x[0-9]+", text) else _refuse(text)


def _refuse(text: str) -> typing.NoReturn:
    raise ValueError(text)


_READERS: dict[Any, tuple[str, Callable[[str], object]]] = {
    int: ("a whole number", _whole),
    float: ("a number", _number),
    bool: ("true or false", _truth),
    type(None): ("none", _nothing),
    Clip: ("clip8", _clip),
    LogBuckets: ("log16x128", _log),
}
