"""The authors' operators in float32, from files that their code wrote in float64.

TRANSLUTION_GOLDEN names the folder of the files; without it, ../shared/golden is tried.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import translution
from translution.conformance.comparison import check
from translution.conformance.error_model import budget
from translution.paper import load_operator

BESIDE = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
FOLDER = Path(os.environ.get("TRANSLUTION_GOLDEN") or BESIDE)
INDEX = json.loads((FOLDER / "INDEX.json").read_text())["files"] if (FOLDER / "INDEX.json").is_file() else {}
OPERATORS = sorted(name for name, entry in INDEX.items() if entry["kind"] != "whole model")


def loaded(name):
    entry = INDEX[name]
    with np.load(FOLDER / name) as file:
        arrays = dict(file)
    state = {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith(("param/", "buffer/"))}
    kind = "attention" if entry["kind"].endswith("attention") else entry["kind"].rpartition("_")[2]
    place = (
        {"family": "gpt", "length": entry["seq_len"]}
        if entry["causal"]
        else {"family": "vit", "grid": tuple(entry["grid"])}
    )
    rank = {"rank": entry["relenc_dim_per_head"]} if kind == "alpha" else {}
    rope = entry.get("rope", False) or "rope" in f"{name} {entry['kind']}"
    sizes = {"num_heads": entry["heads"], "head_dim": entry["head_dim"]} | rank
    operator, params = load_operator(state, kind=kind, variant=entry["variant"], rope=rope, **sizes, **place)
    x = arrays["x"]
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + entry["layernorm_eps"])
    return (
        operator,
        params,
        (x - x.mean(axis=-1, keepdims=True)) / deviation * state["norm.weight"] + state["norm.bias"],
        arrays["out"],
    )


@pytest.mark.skipif(not INDEX, reason=f"no golden files in {FOLDER}; set TRANSLUTION_GOLDEN to their folder")
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_the_authors(name, record_property):
    """Tokens and parameters rounded to float32 add 2 units, and float32 angles 3, to the C >= 8 of every sum."""
    operator, params, tokens, expected = loaded(name)
    single = {n: a.astype(np.float32) for n, a in params.items()}
    found = translution.run(operator, single, tokens.astype(np.float32), backend="triton")
    bound = 2 * budget(operator, params, tokens).out
    record_property("share", f"{check(name, found, expected, bound, dtype='float32'):.4f}")
