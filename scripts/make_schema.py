"""Write spec/schema/operator-1.schema.json from the dataclasses of translution.spec; with --check only compare."""

import argparse
import dataclasses
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

from translution.spec.operator import Operator
from translution.spec.serialization import KINDS, SCHEMA, SCHEMA_FILE, VERSION

FILE = Path(__file__).resolve().parents[1] / "spec" / "schema" / SCHEMA_FILE
JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}


def alternatives(annotation: Any) -> list[Any]:
    """Return the members of a union, flat; a single type is its own only member."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [member for part in typing.get_args(annotation) for member in alternatives(part)]
    return [annotation]


def schema_of(annotation: Any) -> dict[str, Any]:
    """Return the JSON Schema of one field. No anyOf: each error then belongs to one place."""
    names: list[str] = []
    schema: dict[str, Any] = {}
    kinds: list[str] = []
    for member in alternatives(annotation):
        if typing.get_origin(member) is tuple:
            names.append("array")
            schema["items"] = schema_of(typing.get_args(member)[0])
        elif typing.get_origin(member) is typing.Literal:
            names.append("string")
            schema["enum"] = list(typing.get_args(member))
        elif member in KINDS:
            kinds.append(member.__name__)
        else:
            names.append(JSON_TYPES[member])
    if kinds:
        names.insert(0, "object")
        schema |= {"properties": {"kind": {"enum": kinds}}, "required": ["kind"]}
        schema["allOf"] = [
            {
                "if": {"type": "object", "properties": {"kind": {"const": kind}}},
                "then": {"$ref": f"#/$defs/{kind}"},
            }
            for kind in kinds
        ]
    return {"type": names if len(names) > 1 else names[0], **schema}


def object_schema(kind: type, head: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of a dataclass; fields with a default may be left out."""
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [*head, *required],
        "properties": {**head, **{field.name: schema_of(hints[field.name]) for field in fields}},
    }


def make_schema() -> dict[str, Any]:
    """Return the whole schema."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{SCHEMA}, version {VERSION}",
        "description": (
            "What a Translution operator computes; docs/specification.md says what each field means. "
            "The reader is stricter than this schema in one point: a whole number is written without a decimal point."
        ),
        **object_schema(Operator, {"schema": {"const": SCHEMA}, "version": {"const": VERSION}}),
        "$defs": {kind.__name__: object_schema(kind, {"kind": {"const": kind.__name__}}) for kind in KINDS},
    }


def main() -> int:
    """Return 1 with --check if the file on disk is another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    text = json.dumps(make_schema(), indent=2) + "\n"
    if parser.parse_args().check:
        return int(FILE.read_text() != text)
    FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
