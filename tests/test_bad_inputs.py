"""Bad input of every kind, in one table: the exception, and the value, the rule and the remedy in its message."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch

import translution
from translution import CostError, InputError, NotSupported, Plan, UnknownName, get_backend, run, vjp
from translution.spec import (
    Lattice,
    Ones,
    Operator,
    Shared,
    SpecError,
    operator_from_json,
    operator_to_json,
    parse_spec,
    presets,
)

Array = npt.NDArray[Any]

OP = presets.translution((2, 2), 6, 3, causal=True)
CROSS = presets.self_attention((2,), 6, 3, key_grid=(5,), key_dim=4)
CONV = presets.convolution((4, 4), 3, 5, 3, padding=1)
PLAIN = presets.self_attention((3,), 4, 2)
TEXT = operator_to_json(OP)


def parameters(operator: Operator = OP, dtype: Any = np.float64, **changes: Any) -> dict[str, Any]:
    given = {name: np.ones(shape, dtype) for name, shape in operator.parameters.items()}
    given.update({name.replace("__", "."): value for name, value in changes.items()})
    return {name: value for name, value in given.items() if value is not None}


def tokens(*shape: int, dtype: Any = np.float64) -> Array:
    return np.ones(shape, dtype)


X = tokens(2, 4, 6)


def call(operator: Operator = OP, params: Any = None, x: Any = X, y: Any = None, **more: Any) -> object:
    given = parameters(operator) if params is None else params
    return run(operator, given, x, y, **{"backend": "numpy", **more})


def call_conv(operator: Operator, x: Array, **more: Any) -> object:
    return call(operator, None, x, tokens(1, operator.layout.num_keys, operator.keys_dim), **more)


def without_gpu(attempt: Callable[[], object]) -> object:
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        return attempt()


class Bad(NamedTuple):
    name: str
    error: type[Exception]
    attempt: Callable[[], object]
    given: str
    rule: str
    remedy: str


BAD = [
    # Tokens
    Bad("D1-rank", InputError, lambda: call(x=tokens(6)), "x has shape (6,)", "[..., 4 tokens, 6 channels]", "Flatten"),
    Bad("D1-channels", InputError, lambda: call(x=tokens(2, 4, 5)), "x has shape (2, 4, 5)", "6 channels", "Flatten"),
    Bad("D1-tokens", InputError, lambda: call(x=tokens(2, 5, 6)), "x has shape (2, 5, 6)", "4 tokens", "Flatten"),
    Bad("D1-grid", InputError, lambda: call(x=tokens(2, 2, 2, 6)), "(2, 2, 2, 6)", "4 tokens", "row-major order"),
    Bad("D1-list", InputError, lambda: call(x=[[1.0]]), "x is a list", "numpy.ndarray or torch.Tensor", "Convert it"),
    Bad("D1-integers", InputError, lambda: call(x=tokens(4, 6, dtype=int)), "x is int64", "must be one of", "Cast x"),
    Bad("D1-bools", InputError, lambda: call(x=tokens(4, 6, dtype=bool)), "x is bool", "must be one of", "Cast x"),
    Bad(
        "D1-complex",
        InputError,
        lambda: call(x=tokens(4, 6, dtype=np.complex64)),
        "x is complex64",
        "must be one of",
        "Cast x",
    ),
    Bad(
        "B2-complex128",
        NotSupported,
        lambda: call(params=parameters(dtype=complex), x=tokens(4, 6, dtype=complex)),
        "backend 'numpy'",
        "numpy does not compute in complex128",
        "Ask for another backend",
    ),
    Bad("D1-no-y", InputError, lambda: call(CROSS, x=tokens(2, 6)), "y is not given", "5 key tokens of 4", "Pass y"),
    Bad(
        "D1-y-channels",
        InputError,
        lambda: call(CROSS, x=tokens(2, 6), y=tokens(5, 6)),
        "y has shape (5, 6)",
        "5 tokens, 4 channels",
        "Flatten",
    ),
    Bad(
        "D1-batches",
        InputError,
        lambda: call(CROSS, x=tokens(2, 2, 6), y=tokens(3, 5, 4)),
        "y is float64 (3, 5, 4), x is float64 (2, 2, 6)",
        "the same batch dimensions",
        "Expand or cast",
    ),
    Bad(
        "D1-mixed-tokens",
        InputError,
        lambda: call(CROSS, x=tokens(2, 6), y=tokens(5, 4, dtype=np.float32)),
        "y is float32",
        "batch dimensions and dtype",
        "Expand or cast",
    ),
    Bad(
        "D1-mixed-parameters",
        InputError,
        lambda: call(params=parameters(dtype=np.float32)),
        "is float32, x is float64",
        "have one dtype",
        "Cast the parameter or x",
    ),
    Bad(
        "D1-cotangent",
        InputError,
        lambda: vjp(OP, parameters(), X, cotangent=tokens(2, 4, 5)),
        "cotangent is float64 (2, 4, 5)",
        "shape of the result, float64 (2, 4, 6)",
        "like the result of run",
    ),
    # Parameters
    Bad(
        "P1-missing",
        InputError,
        lambda: call(params=parameters(query__table=None)),
        "missing: ['query.table']",
        "has exactly the parameters",
        "operator.parameters lists",
    ),
    Bad(
        "P1-unknown",
        InputError,
        lambda: call(params=parameters(extra=tokens(1))),
        "unknown: ['extra']",
        "has exactly the parameters",
        "operator.parameters lists",
    ),
    Bad(
        "P1-misspelled",
        InputError,
        lambda: call(params=parameters(query__table=None, query__tabel=tokens(1))),
        "query.tabel (did you mean query.table?)",
        "has exactly the parameters",
        "operator.parameters lists",
    ),
    Bad(
        "P1-table-length",
        InputError,
        lambda: call(params=parameters(value__table=tokens(9, 6, 6))),
        "value.table has shape (9, 6, 6)",
        "a table has 5 rows, one per displacement class",
        "operator.parameters lists",
    ),
    Bad(
        "D1-parameter-list",
        InputError,
        lambda: call(params=parameters(output__bias=[1.0] * 6)),
        "output.bias is a list",
        "numpy.ndarray or torch.Tensor",
        "Convert it",
    ),
    # Masks
    Bad(
        "M6-shape",
        InputError,
        lambda: call(mask=np.ones((2, 3), bool)),
        "mask has shape (2, 3)",
        "(2, 3, 4, 4)",
        "mask[:, None, None, :]",
    ),
    Bad(
        "M6-dimensions",
        InputError,
        lambda: call(mask=np.ones((1, 1, 1, 1, 4), bool)),
        "mask has shape (1, 1, 1, 1, 4)",
        "must broadcast to",
        "mask[:, None, None, :]",
    ),
    Bad(
        "M1-integers",
        InputError,
        lambda: call(mask=np.ones((4, 4), int)),
        "mask is int64",
        "True = may attend",
        "~mask",
    ),
    Bad("D1-mask-list", InputError, lambda: call(mask=[[True]]), "mask is a list", "numpy.ndarray or", "Convert it"),
    Bad(
        "M2-no-logits",
        InputError,
        lambda: call_conv(CONV, tokens(1, 16, 3), mask=tokens(16, 16)),
        "a float mask with a relevance that has no logits",
        "only softmax adds",
        "Give a bool mask",
    ),
    # Names
    Bad(
        "B1-backend",
        UnknownName,
        lambda: call(backend="nunpy"),
        "'nunpy'",
        "known are numpy, reference",
        "mean 'numpy'",
    ),
    Bad(
        "B1-algorithm",
        UnknownName,
        lambda: call(algorithm="streem"),
        "'streem'",
        "known are compiled, conv, definition",
        "mean 'stream'",
    ),
    Bad(
        "B1-no-convolution",
        NotSupported,
        lambda: call(backend="torch", algorithm="conv"),
        "backend 'torch', algorithm 'conv'",
        "the layout has no window",
        "Ask for another backend or algorithm",
    ),
    Bad(
        "B1-no-attention",
        NotSupported,
        lambda: call(backend="torch", algorithm="sdpa"),
        "algorithm 'sdpa'",
        "query, key, value differ between displacements",
        "Ask for another backend or algorithm",
    ),
    Bad(
        "B1-not-of-this-backend",
        NotSupported,
        lambda: call(algorithm="sdpa"),
        "backend 'numpy', algorithm 'sdpa'",
        "numpy has no algorithm 'sdpa'",
        "Ask for another backend or algorithm",
    ),
    Bad(
        "B1-no-gpu",
        NotSupported,
        lambda: without_gpu(lambda: call(backend="triton")),
        "backend 'triton'",
        "finds no GPU",
        "Ask for another backend or algorithm",
    ),
    Bad(
        "B1-lost-gradient",
        NotSupported,
        lambda: call(x=torch.ones(4, 6, dtype=torch.float64, requires_grad=True)),
        "backend 'numpy'",
        "records no gradient",
        "use translution.vjp, or backend='torch'",
    ),
    Bad(
        "B1-other-plan",
        InputError,
        lambda: translution.compile(CONV, plan=Plan(OP, "numpy")),
        "a plan for another operator",
        "fits the operator it was made for",
        "Compile plan.operator",
    ),
    Bad(
        "B1-no-backend",
        TypeError,
        lambda: get_backend("math:pi"),
        "math:pi is a float",
        "not a backend",
        "must provide",
    ),
    Bad(
        "O1-operator",
        InputError,
        lambda: run(TEXT, {}, X),
        "a str",
        "what runs is a translution.spec.Operator",
        "preset",
    ),  # type: ignore[arg-type]
    # Operators that cannot be
    Bad(
        "O1-heads",
        SpecError,
        lambda: presets.translution((7, 7), 192, 5),
        "dim=192, num_heads=5",
        "divisible by num_heads",
        "Change num_heads",
    ),
    Bad(
        "L1-negative-kernel",
        SpecError,
        lambda: presets.convolution((7, 7), 3, 3, -3),
        "kernel_size=-3",
        "at least 1",
        "Give 1 or more",
    ),
    Bad(
        "L1-huge-grid", SpecError, lambda: Lattice((10**9,)), "grid=(1000000000,)", "at most 16,777,216", "smaller grid"
    ),
    Bad(
        "P1-terabyte",
        SpecError,
        lambda: parse_spec("translution2d:height=384,width=384,dim=1024,num_heads=16"),
        "1,850,598,228,992 parameters",
        "at most 274,877,906,944",
        "Use a window",
    ),
    Bad(
        "R7-no-queries",
        SpecError,
        lambda: Operator(Lattice((2,)), 4, 1, Shared(4), query=Shared(4), key=Shared(4), relevance=Ones()),
        "query=given",
        "exactly where the relevance looks at content",
        "drop both otherwise",
    ),
    # Texts and files
    Bad(
        "P3-preset",
        SpecError,
        lambda: parse_spec("translutoin2d:dim=3"),
        "'translutoin2d'",
        "known are",
        "Did you mean",
    ),
    Bad(
        "P3-field",
        SpecError,
        lambda: parse_spec("translution2d:height=7,width=7,dims=8,num_heads=2"),
        "'dims'",
        "known are height, width, dim",
        "Did you mean 'dim'",
    ),
    Bad("P3-file", SpecError, lambda: parse_spec("absent.json"), "'absent.json'", "is a file", "Check the path"),
    Bad("P2-corrupt", SpecError, lambda: operator_from_json(TEXT[:-9]), "line", "one JSON object", "Correct the text"),
    Bad(
        "P2-field",
        SpecError,
        lambda: operator_from_json(TEXT.replace('"causal"', '"causual"')),
        "$.layout.causual: unknown field",
        "the fields here are kind, grid",
        "Did you mean 'causal'",
    ),
    Bad(
        "P2-type",
        SpecError,
        lambda: operator_from_json(TEXT.replace("[2, 2]", "[2, 2.5]")),
        "$.layout.grid[1]: 2.5",
        "must be a whole number",
        "Write a whole number",
    ),
    Bad(
        "P2-version",
        SpecError,
        lambda: operator_from_json(TEXT.replace('"version": 1', '"version": 7')),
        "$.version: 7",
        "this library reads version 1",
        "Upgrade translution",
    ),
    Bad("P2-not-json", SpecError, lambda: operator_from_json(b"\x89PNG\r\n"), "decode byte 0x89", "UTF-8", "Correct"),
    # Memory
    Bad(
        "B3-memory",
        CostError,
        lambda: call(x=np.broadcast_to(tokens(4, 6), (10**12, 4, 6)), algorithm="pairwise"),
        "pairwise on batch 1000000000000 in float64",
        "GiB of working memory",
        "Use a batch of at most",
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_bad_input(bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(bad.error) as caught:
        bad.attempt()
    message = str(caught.value)
    assert type(caught.value) is bad.error
    for part in (bad.given, bad.rule, bad.remedy):
        assert part in message
    assert message.index(bad.given) < message.index(bad.remedy)
    if isinstance(caught.value, (SpecError, InputError)):
        assert caught.value.clause == bad.name.partition("-")[0]


def test_there_are_at_least_twenty_kinds() -> None:
    assert len({bad.name for bad in BAD}) == len(BAD) >= 20


def test_the_same_calls_hold_where_nothing_is_wrong() -> None:
    """So that no row above fails for another reason than its own."""
    for backend in ("numpy", "torch"):
        assert np.asarray(call(backend=backend, mask=np.ones((4, 4), bool))).shape == (2, 4, 6)
        assert np.asarray(call(CROSS, x=tokens(2, 6), y=tokens(5, 4), backend=backend)).shape == (2, 6)
        assert np.asarray(call_conv(CONV, tokens(1, 16, 3), backend=backend)).shape == (1, 16, 5)
    assert np.asarray(call(PLAIN, x=tokens(3, 4), backend="torch", algorithm="sdpa")).shape == (3, 4)
    assert operator_from_json(TEXT) == OP
