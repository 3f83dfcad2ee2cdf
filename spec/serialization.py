"""Operators as JSON (clause P2): an exact round trip, and a strict reader that names the place of every mistake.

The checks come in this order, each before anything is allocated for the operator: size of the text, syntax, nesting and
numbers, schema version, the JSON Schema in ``schema/``, and the rules of the spec itself. Only the schema check needs
the jsonschema library, and only when an operator is read.
"""

import dataclasses
import functools
import importlib.resources
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from translution.spec.checks import MAX_ENCODERS
from translution.spec.classes import Clip, LogBuckets
from translution.spec.encoders import ENCODERS, LowRankOutput
from translution.spec.errors import SpecError, require
from translution.spec.layout import Lattice
from translution.spec.operator import Operator
from translution.spec.pair_table import PairTable
from translution.spec.relevance import BIASES, RELEVANCES

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

SCHEMA = "translution/operator"
VERSION = 1
SCHEMA_FILE = f"operator-{VERSION}.schema.json"
KINDS: tuple[type, ...] = (Lattice, PairTable, Clip, LogBuckets, *ENCODERS, LowRankOutput, *RELEVANCES, *BIASES)

MAX_BYTES = 2**26
MAX_DEPTH = 2 * MAX_ENCODERS + 4
MAX_NUMBER = 2**63

WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
    "array": "an array",
    "object": "an object",
}

_BY_NAME = {kind.__name__: kind for kind in KINDS}


class _Repeated(dict[str, object]):
    """A JSON object in which ``key`` stands more than once."""

    key = ""


def operator_to_data(operator: Operator) -> dict[str, Any]:
    """The operator as dicts, lists and plain values: every field written out, in the order of declaration."""
    require(
        isinstance(operator, Operator),
        "P2",
        f"{type(operator).__name__} in place of an operator",
        "an operator is a translution.spec.Operator",
        "Give the operator itself",
    )
    return {"schema": SCHEMA, "version": VERSION, **_fields_to_data(operator)}


def operator_to_json(operator: Operator) -> str:
    """The operator as JSON text, the same text for equal operators; arrays of numbers on one line."""
    text = json.dumps(operator_to_data(operator), indent=2, allow_nan=False) + "\n"
    text = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    _check_size(len(text))
    return text


def operator_from_json(source: str | bytes | Path) -> Operator:
    """The operator that ``source`` (JSON text, its UTF-8 bytes, or the path of a file) describes.

    Raises:
        SpecError: with clause P2 and the JSON path where the text is not such a description, with the rule's own
            clause and the JSON path where it describes an operator that cannot be.
    """
    if isinstance(source, Path):
        _check_size(source.stat().st_size)
        source = source.read_bytes()
    _check_size(len(source))
    try:
        text = source.decode("utf-8") if isinstance(source, bytes) else source
        data = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise _too_deep("$") from None
    except ValueError as error:
        raise SpecError(
            "P2", f"$: {error}", "an operator is one JSON object in UTF-8", "Correct the text there"
        ) from None
    return operator_from_data(data)


def operator_from_data(data: object) -> Operator:
    """The operator that ``data``, as :func:`operator_to_data` gives it, describes; errors as for
    :func:`operator_from_json`.
    """
    _check_values(data)
    if not isinstance(data, dict):
        raise SpecError(
            "P2", f"$: {_shown(data)}", "an operator is a JSON object", f'Begin with {{"schema": "{SCHEMA}"'
        )
    _check_version(data)
    try:
        error = next(_validator().iter_errors(data), None)
    except RecursionError:
        raise _too_deep("$") from None
    except BaseException as panic:
        # Where room ends within jsonschema's tables, which are in Rust, that is no Exception.
        if type(panic).__name__ != "PanicException":
            raise
        raise _too_deep("$") from None
    if error is not None:
        raise _explained(error)
    fields = {name: value for name, value in data.items() if name not in ("schema", "version")}
    return cast(Operator, _build(Operator, fields, "$"))


def _fields_to_data(value: Any) -> dict[str, Any]:
    return {field.name: _to_data(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _to_data(value: object) -> Any:
    if isinstance(value, KINDS):
        return {"kind": type(value).__name__, **_fields_to_data(value)}
    if isinstance(value, tuple):
        return [_to_data(item) for item in value]
    return value


def _build(kind: type, fields: dict[str, Any], path: str) -> object:
    arguments = {name: _from_data(value, f"{path}.{name}") for name, value in fields.items()}
    try:
        return kind(**arguments)
    except SpecError as error:
        raise SpecError(error.clause, f"{path}: {error.given}", error.rule, error.remedy) from None


def _from_data(value: Any, path: str) -> object:
    if isinstance(value, dict):
        fields = {name: item for name, item in value.items() if name != "kind"}
        return _build(_BY_NAME[value["kind"]], fields, path)
    if isinstance(value, list):
        return tuple(
            _from_data(item, f"{path}[{n}]") if isinstance(item, (dict, list)) else item for n, item in enumerate(value)
        )
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    repeated = _Repeated(found)
    repeated.key = next(name for name in found if names.count(name) > 1)
    return repeated


def _check_size(size: int) -> None:
    require(
        size <= MAX_BYTES,
        "P2",
        f"$: {size:,} characters",
        f"the JSON of an operator has at most {MAX_BYTES:,}",
        "Describe the pairs by a Lattice, or build the operator in Python",
    )


def _too_deep(path: str) -> SpecError:
    return SpecError("P2", f"{path}: nested too deeply", f"at most {MAX_DEPTH} levels are read", "Flatten the encoders")


def _check_values(data: object) -> None:
    """Raise unless all of ``data`` is what JSON can hold; nothing here recurses."""
    waiting: list[tuple[object, str, int]] = [(data, "$", 0)]
    while waiting:
        value, path, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise _too_deep(path[:80])
        inside: Iterable[tuple[str, object]]
        if isinstance(value, _Repeated):
            raise SpecError("P2", f"{path}.{value.key} twice", "a key stands once in an object", "Keep one of the two")
        if isinstance(value, dict):
            inside = ((f".{name}", item) for name, item in value.items())
        elif isinstance(value, list):
            inside = ((f"[{n}]", item) for n, item in enumerate(value) if not _is_plain(item))
        else:
            require(
                _is_plain(value),
                "P2",
                f"{path}: {_shown(value)}",
                "values are objects, arrays, text, finite numbers of at most 64 bits, true, false and null",
                "Give one of these",
            )
            continue
        waiting += [(item, path + step, depth + 1) for step, item in inside if not _is_plain(item)]


def _is_plain(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < MAX_NUMBER)


def _check_version(data: dict[str, Any]) -> None:
    require(
        data.get("schema") == SCHEMA,
        "P2",
        f"$.schema: {_shown(data['schema']) if 'schema' in data else 'missing'}",
        f"the schema of an operator is {SCHEMA!r}",
        f'Write "schema": "{SCHEMA}" at the top',
    )
    version = data.get("version")
    known = type(version) is int and 1 <= version <= VERSION
    newer = type(version) is int and version > VERSION
    require(
        known,
        "P2",
        f"$.version: {_shown(version) if 'version' in data else 'missing'}",
        f"this library reads version {VERSION}",
        "Upgrade translution: a newer one wrote this" if newer else f'Write "version": {VERSION} at the top',
    )


@functools.cache
def operator_schema() -> dict[str, Any]:
    """The JSON Schema of operators (clause P2). Not to be changed."""
    file = importlib.resources.files("translution.spec") / "schema" / SCHEMA_FILE
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@functools.cache
def _validator() -> "Validator":
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    def is_integer(_: object, value: object) -> bool:
        return type(value) is int

    strict = Draft202012Validator.TYPE_CHECKER.redefine("integer", is_integer)
    checker = extend(Draft202012Validator, type_checker=strict)
    schema = operator_schema()
    checker.check_schema(schema)
    return cast("Validator", checker(schema))


def _explained(error: Any) -> SpecError:
    """A finding of the jsonschema library in this library's words; the schema has no other keywords that can fail."""
    from difflib import get_close_matches

    path = "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
    wanted, given = error.validator_value, error.instance
    if error.validator == "additionalProperties":
        known = list(error.schema["properties"])
        name = next(name for name in given if name not in known)
        close = get_close_matches(str(name), known, n=1)
        remedy = f"Did you mean {close[0]!r}" if close else "Drop it"
        return SpecError("P2", f"{path}.{name}: unknown field", f"the fields here are {', '.join(known)}", remedy)
    if error.validator == "required":
        name = next(name for name in wanted if name not in given)
        return SpecError(
            "P2", f"{path}.{name}: missing", f"the fields {', '.join(wanted)} are required", f"Add {name!r}"
        )
    if error.validator == "type":
        names = [WORDS[name] for name in ([wanted] if isinstance(wanted, str) else wanted)]
        rule = f"this must be {' or '.join(names)}"
        note = ", without a decimal point" if names[0] == WORDS["integer"] else ""
        return SpecError("P2", f"{path}: {_shown(given)}", rule, f"Write {names[0]}{note}")
    values = list(map(json.dumps, wanted if error.validator == "enum" else [wanted]))
    close = get_close_matches(json.dumps(given), values, n=1) if isinstance(given, str) else []
    remedy = f"Did you mean {close[0]}" if close else f"Give {values[0]}"
    return SpecError("P2", f"{path}: {_shown(given)}", f"this must be one of {', '.join(values)}", remedy)


def _shown(value: object) -> str:
    if isinstance(value, (dict, list)):
        return f"an {'object' if isinstance(value, dict) else 'array'} of {len(value):,} entries"
    if isinstance(value, int) and abs(value) >= MAX_NUMBER:
        return f"a number of {value.bit_length():,} bits"
    shown = json.dumps(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
    return shown if len(shown) <= 80 else f"{shown[:80]} ..."
