"""An operator's plain data (clause P2) in a few short lines: what is not as by default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from translution.spec.operator import Operator
from translution.spec.serialization import KINDS

LONGEST = 300
_KINDS: dict[str, type] = {kind.__name__: kind for kind in KINDS}


def operator_words(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Field and value of all fields of an operator that differ from their default; any data is shown somehow."""
    fields = _told(data, Operator)
    left_out = {"schema", "version"} | ({"key_dim"} if data.get("key_dim") == data.get("dim") else set())
    return [(name, _short(value)) for name, value in fields if name not in left_out]


def _told(data: Mapping[str, Any], kind: type | None) -> list[tuple[str, Any]]:
    usual = {} if kind is None else {f.name: _plain(f.default) for f in dataclasses.fields(kind)}
    return [(name, value) for name, value in data.items() if name != "kind" and not _same(usual.get(name, ...), value)]


def _same(usual: Any, value: Any) -> bool:
    if isinstance(value, list) and not isinstance(usual, list):
        # One number for all axes is stored for each of them.
        return bool(value) and all(_same(usual, item) for item in value)
    # 1 == True, and a default of 1 is not the flag True.
    return type(usual) is type(value) and bool(usual == value)


def _plain(value: Any) -> Any:
    if value is dataclasses.MISSING:
        return ...
    if dataclasses.is_dataclass(value):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _short(value: Any) -> str:
    text = _word(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text):,} characters)"


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        kind = value.get("kind")
        inside = ", ".join(f"{name}={_word(item)}" for name, item in _told(value, _KINDS.get(str(kind))))
        return f"{kind or ''}({inside})" if inside or not kind else str(kind)
    if isinstance(value, list | tuple):
        inside = ", ".join(_word(item) for item in value)
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)
