"""The authors' operators: outputs, attention weights and every gradient, from files that their code wrote.

The files are not part of the repository. TRANSLUTION_GOLDEN names their folder; without it, ../shared/golden is tried.
"""

import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import translution
from translution.paper import load_operator

Array = npt.NDArray[Any]

FOLDER = Path(os.environ.get("TRANSLUTION_GOLDEN") or Path(__file__).resolve().parents[1].parent / "shared" / "golden")
INDEX: dict[str, Any] = {}
if (FOLDER / "INDEX.json").is_file():
    INDEX = json.loads((FOLDER / "INDEX.json").read_text())["files"]
OPERATORS = sorted(name for name, entry in INDEX.items() if entry["kind"] != "whole model")

needs_files = pytest.mark.skipif(
    not OPERATORS and not os.environ.get("TRANSLUTION_GOLDEN"),
    reason=f"no golden files in {FOLDER}; set TRANSLUTION_GOLDEN to their folder",
)


@lru_cache
def arrays(name: str) -> dict[str, Array]:
    with np.load(FOLDER / name) as file:
        return dict(file)


def under(name: str, *prefixes: str) -> dict[str, Array]:
    found = arrays(name)
    return {key.partition("/")[2]: found[key] for key in found if key.startswith(prefixes)}


def arguments(name: str) -> dict[str, Any]:
    """What `load_operator` is told about a file."""
    entry = INDEX[name]
    place: dict[str, Any] = {"family": "vit", "grid": tuple(entry["grid"] or ())}
    if entry["causal"]:
        place = {"family": "gpt", "length": entry["seq_len"]}
    kind = "attention" if entry["kind"].endswith("attention") else entry["kind"].rpartition("_")[2]
    # Files of classes with a rotary embedding say so by name; the entry's kind may carry it too.
    rope = entry.get("rope", False) or "rope" in f"{name} {entry['kind']}"
    rank = {"rank": entry["relenc_dim_per_head"]} if kind == "alpha" else {}
    sizes = {"num_heads": entry["heads"], "head_dim": entry["head_dim"]}
    return {"kind": kind, "variant": entry["variant"], "rope": rope, **place, **rank, **sizes}


def normalised(x: Array, epsilon: float) -> tuple[Array, Array]:
    """(x - mean) / deviation, and the deviation."""
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)
    return (x - x.mean(axis=-1, keepdims=True)) / deviation, deviation


def test_files_are_there_where_they_must_be() -> None:
    if not os.environ.get("TRANSLUTION_GOLDEN"):
        pytest.skip("TRANSLUTION_GOLDEN is not set")
    assert OPERATORS


@needs_files
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("name", OPERATORS)
def test_parameters_are_the_authors_numbers(name: str, kind: str) -> None:
    state = under(name, "param/", "buffer/")
    given: dict[str, Any] = {key: torch.from_numpy(value) for key, value in state.items()} if kind == "torch" else state
    operator, params = load_operator(given, **arguments(name))
    assert {key: tuple(value.shape) for key, value in params.items()} == operator.parameters
    assert all(isinstance(value, torch.Tensor if kind == "torch" else np.ndarray) for value in params.values())
    theirs = [value.ravel() for key, value in state.items() if f"param/{key}" in arrays(name) and "norm." not in key]
    ours = [np.asarray(value).ravel() for value in params.values()]
    assert np.array_equal(np.sort(np.concatenate(ours)), np.sort(np.concatenate(theirs)))


@needs_files
@pytest.mark.parametrize("backend", ["reference", "numpy", "torch"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_the_authors(name: str, backend: str, record_property: Callable[[str, object], None]) -> None:
    # The rotary files hold float32 angles.
    tolerance = 1e-6 if arguments(name)["rope"] else 1e-9
    file, state = arrays(name), under(name, "param/", "buffer/")
    operator, params = load_operator(state, **arguments(name))
    unit, deviation = normalised(file["x"], INDEX[name]["layernorm_eps"])
    tokens = unit * state["norm.weight"] + state["norm.bias"]

    out, weights = translution.run(operator, params, tokens, backend=backend, return_weights=True)
    # loss = sum(out ** 2)
    _, gradients = translution.vjp(operator, params, tokens, cotangent=2 * out, backend=backend)
    d_unit = gradients.x * state["norm.weight"]
    centred = d_unit - d_unit.mean(axis=-1, keepdims=True) - unit * (d_unit * unit).mean(axis=-1, keepdims=True)
    found = {"out": out, "attn": weights, "grad_x": centred / deviation}
    found |= {"norm.weight": (gradients.x * unit).sum(axis=(0, 1)), "norm.bias": gradients.x.sum(axis=(0, 1))}
    found |= gradients.params

    # Gradients are re-laid as their parameters are.
    theirs = under(name, "grad/")
    expected = {key: file[key] for key in ("out", "attn", "grad_x")} | load_operator(theirs, **arguments(name))[1]
    expected |= {key: theirs[key] for key in ("norm.weight", "norm.bias")}
    errors = {key: float(np.abs(found[key] - expected[key]).max()) for key in expected}
    assert found.keys() == expected.keys()
    record_property("worst error", max(errors.values()))
    assert max(errors.values()) <= tolerance, errors
