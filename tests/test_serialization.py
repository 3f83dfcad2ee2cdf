"""Operators as JSON (clause P2): exact round trips, and a named place for every mistake."""

import copy
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from translution.conformance.strategies import random_operator
from translution.spec import (
    Clip,
    Mixture,
    Ones,
    Operator,
    PairTable,
    QuadraticBias,
    Rotary,
    Shared,
    SlopeBias,
    Softmax,
    SpecError,
    operator_from_data,
    operator_from_json,
    operator_to_data,
    operator_to_json,
    parse_spec,
    presets,
)
from translution.spec.serialization import KINDS, MAX_BYTES, MAX_DEPTH

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ROOT / "spec" / "schema" / "operator-1.schema.json"
RANDOM = range(161)

ALPHA = presets.alpha_translution((7, 7), 192, 3, registers=1, far=Clip(4), rotary=True)
SPECS = [
    "translution2d:height=7,width=7,dim=192,num_heads=3",
    "alpha_translution1d:length=16,dim=8,num_heads=2,causal=true,roles=qv",
    "convolution2d:height=8,width=8,in_channels=3,out_channels=4,kernel_size=3,padding=1,padding_mode=reflect",
    "transposed_convolution1d:length=8,in_channels=3,out_channels=4,kernel_size=3,stride=2",
    "average_pooling3d:depth=4,height=4,width=4,channels=2,kernel_size=2",
    "self_attention2d:height=4,width=4,dim=8,num_heads=2,key_grid=2x2,key_dim=5,scale=0.1",
    "neighborhood_attention2d:height=7,width=7,dim=8,num_heads=2,kernel_size=3,bias=true",
    "rope_attention2d:height=4,width=4,dim=8,num_heads=2,pairing=interleaved",
    "shaw_attention1d:length=9,dim=8,num_heads=2,max_distance=3",
    "swin_attention2d:height=7,width=7,dim=96,num_heads=3",
    "t5_attention1d:length=20,dim=8,num_heads=2",
    "alibi_attention1d:length=9,dim=8,num_heads=2,slopes=0.3x0.1",
    "convit_attention2d:height=4,width=4,dim=8,num_heads=2",
]


@pytest.mark.parametrize("spec", SPECS)
def test_round_trip_of_every_preset(spec: str) -> None:
    operator = parse_spec(spec)
    text = operator_to_json(operator)
    assert operator_from_json(text) == operator
    assert operator_to_json(operator_from_json(text.encode())) == text


@pytest.mark.parametrize("seed", RANDOM)
def test_round_trip_of_random_operators(seed: int) -> None:
    operator = random_operator(seed)
    found = operator_from_json(operator_to_json(operator))
    assert found == operator
    assert hash(found) == hash(operator)
    assert operator_from_data(operator_to_data(operator)) == operator


def test_random_operators_hold_every_kind() -> None:
    """So that the round trips above leave no kind out."""
    seen = "".join(operator_to_json(random_operator(seed)) for seed in RANDOM)
    seen += "".join(operator_to_json(parse_spec(spec)) for spec in SPECS)
    assert [kind.__name__ for kind in KINDS if f'"kind": "{kind.__name__}"' not in seen] == []


def test_round_trip_keeps_every_digit() -> None:
    scale = 0.1 + 2**-54
    slopes = SlopeBias((1 / 3, 5e-324, -1.7976931348623157e308))
    operator = Operator(
        PairTable(((0, 1), (1, 0)), 2), 3, 3, Shared(3), Shared(3), Shared(3), relevance=Softmax(scale=scale)
    )
    assert operator_from_json(operator_to_json(operator)) == operator
    shown = presets.alibi_attention((2,), 3, 3, slopes=slopes.slopes)
    assert operator_from_json(operator_to_json(shown)) == shown


def test_text_is_stable_readable_and_complete() -> None:
    text = operator_to_json(presets.average_pooling((4, 6), 3, 2))
    assert (
        text
        == """{
  "schema": "translution/operator",
  "version": 1,
  "layout": {
    "kind": "Lattice",
    "grid": [2, 3],
    "key_grid": [4, 6],
    "registers": 0,
    "causal": false,
    "kernel_size": [2, 2],
    "stride": [2, 2],
    "key_stride": [1, 1],
    "dilation": [1, 1],
    "padding": [0, 0],
    "offset": [0, 0],
    "boundary": "zeros",
    "far": null
  },
  "dim": 3,
  "num_heads": 1,
  "value": {
    "kind": "Identity",
    "bias": false
  },
  "query": null,
  "key": null,
  "relevance": {
    "kind": "Mean"
  },
  "output": null,
  "key_dim": null,
  "output_scale": 1.0
}
"""
    )


def test_a_file_is_read_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "operator.json"
    path.write_text(operator_to_json(ALPHA))
    assert operator_from_json(path) == ALPHA
    assert parse_spec(str(path)) == ALPHA


def test_fields_with_a_default_may_be_left_out() -> None:
    data = {
        "schema": "translution/operator",
        "version": 1,
        "layout": {"kind": "Lattice", "grid": [3], "kernel_size": 3},
        "dim": 2,
        "num_heads": 1,
        "value": {"kind": "PerDisplacement", "features": 2},
        "relevance": {"kind": "Ones"},
    }
    assert operator_from_data(data).num_parameters == 3 * 2 * 2


# The schema


def test_the_schema_is_that_of_the_dataclasses() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_schema.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, f"run scripts/make_schema.py\n{result.stderr}"


def test_the_schema_holds_without_this_library() -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert [seed for seed in range(23) if not validator.is_valid(operator_to_data(random_operator(seed)))] == []


# Mistakes in the data: what is put where, and three parts of the message

DATA = operator_to_data(ALPHA)
Step = str | int
MISSING = object()


def changed(path: tuple[Step, ...], value: object) -> dict[str, Any]:
    data: Any = copy.deepcopy(DATA)
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    if value is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    result: dict[str, Any] = data
    return result


def deep(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"kind": "Shared", "features": 4}
    for _ in range(depth):
        value = {"kind": "Sum", "parts": [value]}
    return value


CHANGES: list[tuple[tuple[Step, ...], object, str, str, str]] = [
    (("layout", "grid", 1), 7.0, "$.layout.grid[1]: 7.0", "this must be a whole number", "without a decimal point"),
    (("layout", "grid", 1), True, "$.layout.grid[1]: true", "this must be a whole number", "Write a whole number"),
    (("layout", "grid", 1), "7", '$.layout.grid[1]: "7"', "this must be a whole number", "Write a whole number"),
    (("layout", "grid"), 7, "$.layout.grid: 7", "this must be an array", "Write an array"),
    (("layout", "stride"), None, "$.layout.stride: null", "an array or a whole number", "Write an array"),
    (("layout", "causal"), 1, "$.layout.causal: 1", "true or false or an array", "Write true or false"),
    (("layout", "gird"), [7, 7], "$.layout.gird: unknown field", "the fields here are kind, grid", "mean 'grid'"),
    (("layout", "zzz"), 1, "$.layout.zzz: unknown field", "the fields here are kind, grid", "Drop it"),
    (("extra",), 1, "$.extra: unknown field", "the fields here are schema, version", "Drop it"),
    ((3,), 1, "$.3: unknown field", "the fields here are schema, version", "Drop it"),
    (("layout", "kind"), "Latice", '$.layout.kind: "Latice"', '"Lattice", "PairTable"', 'mean "Lattice"'),
    (("layout", "kind"), "Clip", '$.layout.kind: "Clip"', '"Lattice", "PairTable"', 'Give "Lattice"'),
    (("layout", "kind"), ["Clip"], "$.layout.kind: an array", '"Lattice", "PairTable"', 'Give "Lattice"'),
    (("layout", "kind"), MISSING, "$.layout.kind: missing", "kind are required", "Add 'kind'"),
    (("layout", "boundary"), "none", '$.layout.boundary: "none"', '"absent", "zeros"', "Give "),
    (("layout", "far", "max_distance"), MISSING, "$.layout.far.max_distance: missing", "required", "Add 'max_dis"),
    (("layout",), None, "$.layout: null", "this must be an object", "Write an object"),
    (("layout",), [], "$.layout: an array of 0 entries", "this must be an object", "Write an object"),
    (("dim",), MISSING, "$.dim: missing", "dim, num_heads, value are required", "Add 'dim'"),
    (("value", "parts", 0, "features"), "a", '$.value.parts[0].features: "a"', "a whole number", "Write"),
    (("value", "parts"), {}, "$.value.parts: an object of 0 entries", "this must be an array", "Write an array"),
    (("relevance",), "softmax", '$.relevance: "softmax"', "this must be an object", "Write an object"),
    (("relevance", "scale"), True, "$.relevance.scale: true", "a number or null", "Write a number"),
    (("output_scale",), float("nan"), "$.output_scale: NaN", "finite numbers", "Give one of these"),
    (("output_scale",), float("-inf"), "$.output_scale: -Infinity", "finite numbers", "Give one of these"),
    (("dim",), 10**300, "$.dim: a number of 997 bits", "at most 64 bits", "Give one of these"),
    (("dim",), -(10**5000), "$.dim: a number of 16,610 bits", "at most 64 bits", "Give one of these"),
    (("dim",), {1, 2}, "$.dim: a set", "objects, arrays, text", "Give one of these"),
    (("layout", "grid"), (7, 7), "$.layout.grid: a tuple", "objects, arrays, text", "Give one of these"),
    (("schema",), "other", '$.schema: "other"', "'translution/operator'", 'Write "schema"'),
    (("schema",), MISSING, "$.schema: missing", "'translution/operator'", 'Write "schema"'),
    (("version",), 2, "$.version: 2", "this library reads version 1", "Upgrade translution"),
    (("version",), 10**9, "$.version: 1000000000", "this library reads version 1", "Upgrade translution"),
    (("version",), 0, "$.version: 0", "this library reads version 1", 'Write "version": 1'),
    (("version",), 1.0, "$.version: 1.0", "this library reads version 1", 'Write "version": 1'),
    (("version",), True, "$.version: true", "this library reads version 1", 'Write "version": 1'),
    (("version",), MISSING, "$.version: missing", "this library reads version 1", 'Write "version": 1'),
    (("value",), deep(5000), "nested too deeply", f"at most {MAX_DEPTH} levels", "Flatten"),
]


@pytest.mark.parametrize(
    ("path", "value", "given", "rule", "remedy"),
    CHANGES,
    ids=[given.replace(" ", "_") for _, _, given, _, _ in CHANGES],
)
def test_P2_mistakes(path: tuple[Step, ...], value: object, given: str, rule: str, remedy: str) -> None:
    with pytest.raises(SpecError) as caught:
        operator_from_data(changed(path, value))
    assert caught.value.clause == "P2"
    assert given in caught.value.given
    assert rule in caught.value.rule
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("path", "value", "clause", "given"),
    [
        (("layout", "grid", 1), 10**9, "L1", "$.layout: grid=(7, 1000000000)"),
        (("layout", "registers"), 10**6, "L6", "$.layout: registers=1000000"),
        (("layout", "far", "max_distance"), -1, "L7", "$.layout.far: Clip(max_distance=-1)"),
        (("value", "parts", 1, "inner_features"), 0, "E6", "$.value.parts[1]: LowRank(inner_features=0)"),
        (("value", "parts"), [], "E9", "$.value: Concat(())"),
        (("query",), None, "R7", "$: query=None"),
        (("value",), deep(32), "E8", "$.value: Sum of 1 parts"),
        (("dim",), 2**40, "O1", "$: dim=1099511627776"),
    ],
)
def test_rules_of_the_spec_name_their_place(path: tuple[Step, ...], value: object, clause: str, given: str) -> None:
    with pytest.raises(SpecError) as caught:
        operator_from_data(changed(path, value))
    assert caught.value.clause == clause
    assert caught.value.given.startswith(given)


TEXT = operator_to_json(ALPHA)


@pytest.mark.parametrize(
    ("source", "given", "rule"),
    [
        ("", "$: Expecting value: line 1 column 1", "one JSON object"),
        (TEXT[:-3], "line 95 column 22", "one JSON object"),
        (TEXT + "{}", "Extra data: line 97", "one JSON object"),
        (TEXT.replace('"dim"', '"dim": 3, "dim"'), "$.dim twice", "a key stands once"),
        (TEXT.replace('"max_distance"', '"kind": 3, "max_distance"'), "$.layout.far.kind twice", "a key stands once"),
        (TEXT.replace("0.5", "NaN"), "$.output_scale: NaN", "finite numbers"),
        (TEXT.replace("0.5", "-Infinity"), "$.output_scale: -Infinity", "finite numbers"),
        (TEXT.replace("0.5", "1e999"), "$.output_scale: Infinity", "finite numbers"),
        (TEXT.replace("192", "1" + "0" * 5000), "$: Exceeds the limit", "one JSON object"),
        ("[" * 10**6, "$: nested too deeply", "levels are read"),
        ("[1, 2]", "$: an array of 2 entries", "a JSON object"),
        ("null", "$: null", "a JSON object"),
        (b"\xff\xfe{}", "$: 'utf-8' codec can't decode", "in UTF-8"),
        (" " * (MAX_BYTES + 1), "$: 67,108,865 characters", "at most 67,108,864"),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, (str, bytes)) else None,
)
def test_P2_corrupt_text(source: str | bytes, given: str, rule: str) -> None:
    with pytest.raises(SpecError) as caught:
        operator_from_json(source)
    assert caught.value.clause == "P2"
    assert given in caught.value.given
    assert rule in caught.value.rule


def test_P2_large_files_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(SpecError, match=r"\[P2\] \$: 1,099,511,627,776 characters"):
        operator_from_json(path)


def test_P2_only_operators_are_written() -> None:
    for wrong in (Shared(4), Mixture(Ones(), Softmax(content=False, bias=QuadraticBias())), Rotary(Shared(4)), None):
        with pytest.raises(SpecError, match=r"\[P2\] .*an operator is a translution.spec.Operator"):
            operator_to_json(wrong)  # type: ignore[arg-type]


def test_P2_a_deep_stack_is_no_crash() -> None:
    """The schema check recurses; where the caller has left too little room it says so like any other depth."""
    data = changed(("value",), deep(30))

    def call_from(frames: int) -> object:
        return call_from(frames - 1) if frames else operator_from_data(data)

    with pytest.raises(SpecError, match=r"\[O4\] \$: inner_features=24"):
        call_from(0)
    room = sys.getrecursionlimit() - len(inspect.stack(0))
    with pytest.raises(SpecError, match=r"\[P2\] \$: nested too deeply"):
        call_from(room - 150)


def test_the_schema_has_no_keyword_that_the_messages_do_not_know() -> None:
    def keywords(schema: object, inside: bool) -> set[str]:
        if isinstance(schema, list):
            return set().union(*(keywords(item, False) for item in schema))
        if not isinstance(schema, dict):
            return set()
        own = set() if inside else set(schema)
        return own.union(*(keywords(item, name in ("properties", "$defs")) for name, item in schema.items()))

    notes = {"$schema", "title", "description", "$defs", "$ref"}
    combining = {"properties", "items", "allOf", "if", "then"}
    known = {"type", "required", "additionalProperties", "enum", "const"}
    assert keywords(json.loads(SCHEMA.read_text()), False) == notes | combining | known


def test_reading_and_writing_leave_the_data_alone() -> None:
    data = operator_to_data(ALPHA)
    before = copy.deepcopy(data)
    operator_from_data(data)
    assert data == before


@pytest.mark.parametrize("write", [operator_to_json, lambda operator: json.dumps(operator_to_data(operator))])
def test_any_layout_of_the_text_will_do(write: Callable[[Operator], str]) -> None:
    assert operator_from_json(write(ALPHA)) == ALPHA
