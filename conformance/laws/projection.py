"""What comes after the heads: output encoders, the uplift of low-rank features, and alpha-Translution as a whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import Array, FloatArray
from translution.conformance.laws.composition import HEADS, PLAIN_KINDS, Params, Relay, biased, repeated
from translution.conformance.laws.equality import (
    agree,
    ask,
    compare,
    in_quarters,
    question_on,
    require_held,
)
from translution.conformance.strategies import LAYOUT_KINDS, draw_layout
from translution.spec import (
    Concat,
    Encoder,
    Identity,
    LowRank,
    LowRankOutput,
    Ones,
    Operator,
    PerDisplacement,
    Shared,
    Softmax,
)
from translution.spec.encoders import OutputEncoder
from translution.spec.presets import Roles, alpha_translution


def _with_output(
    trial: Trial, name: str, output: OutputEncoder, scale: float, other: OutputEncoder | None, relay: Relay
) -> None:
    """Two output encoders that do the same, the first after ``scale``."""
    draws = trial.draws
    plain = draws.walk((False, False, True))
    value: Encoder
    if isinstance(output, LowRankOutput):
        value = Concat((Shared(4), LowRank(output.inner_features)))
    else:
        value = Shared(4) if plain else PerDisplacement(4)
    sides: dict[str, Any] = {"query": Shared(4), "key": Shared(4)} if plain else {}
    layout = draw_layout(draws, kinds=PLAIN_KINDS if plain else LAYOUT_KINDS)
    one = Operator(
        layout, 4, HEADS, value, relevance=Softmax() if plain else Ones(), output=output, output_scale=scale, **sides
    )
    params = in_quarters(draws, one)
    question = question_on(trial, one)
    inner = {n: v for n, v in params.items() if not n.startswith("output.")}
    own = {n.removeprefix("output."): v for n, v in params.items() if n.startswith("output.")}
    moved = relay(own, 1)
    bare = question.but(operator=replace(one, output=None, output_scale=1.0), params=inner)
    found = ask(trial, question.but(params=params))
    agree(
        trial, f"{name}: the heads, projected", found, ask(trial, bare).times(moved["weight"], moved.get("bias", 0.0))
    )
    if other is not None:
        outer = {f"output.{n}": np.asarray(v) for n, v in moved.items()}
        require_held(trial, *outer.values())
        changed = replace(one, output=other, output_scale=1.0)
        agree(trial, name, found, ask(trial, question.but(operator=changed, params={**inner, **outer})))


@law(
    "OUTPUT",
    clauses=("O1", "O2", "O3"),
    kills=("output-scale-after-bias", "output-scale-missing", "output-bias-missing"),
)
def output(trial: Trial) -> None:
    """The output encoder is applied to the concatenated heads after the output scale, which a matrix with that factor
    replaces; its bias is not scaled. An identity does what the unit matrix does.
    """
    scale = trial.draws.pick((-2.0, 0.5, 2.0))
    kind = trial.draws.walk(("shared", "groups", "identity"))

    def scaled(own: Params, _count: int) -> Params:
        if kind == "identity":
            return {"weight": scale * np.eye(4), "bias": own["bias"]}
        matrix = own["weight"]
        if kind == "groups":
            first, second = own["weight"]
            none = np.zeros_like(first)
            matrix = np.block([[first, none], [none, second]])
        return {"weight": scale * matrix, "bias": own["bias"]}

    features = 4 if kind == "identity" else trial.draws.pick((2, 4, 6))
    found: OutputEncoder = Identity(bias=True)
    if kind != "identity":
        found = Shared(features, bias=True, groups=2 if kind == "groups" else 1)
    _with_output(trial, "output scale and encoder", found, scale, Shared(features, bias=True), scaled)


def _uplifted(up: Array, weight: Array) -> FloatArray:
    """The matrix of clause O4 over the concatenated heads, whose last features are of low rank: rows of ``weight``
    beside those of up times weight.
    """
    each, low = len(weight) // HEADS, len(up) // HEADS
    raised = (up @ weight).reshape(HEADS, low, -1)
    found: FloatArray = np.concatenate([weight.reshape(HEADS, each, -1), raised], axis=1).reshape(-1, weight.shape[1])
    return found


@law("UPLIFT", clauses=("O4",), kills=("uplift-by-head", "uplift-missing"))
def uplift(trial: Trial) -> None:
    """A low-rank output does what a shared one does whose matrix is composed: the low-rank features of all heads go
    through up and the output's matrix, the others through the matrix alone.
    """
    inner = trial.draws.pick((2, 4))
    features, bias = trial.draws.pick((3, 4)), trial.draws.some()
    scale = trial.draws.pick((1.0, 0.5))

    def composed(own: Params, _count: int) -> Params:
        return biased(own, {"weight": scale * _uplifted(own["up"], own["weight"])})

    found = LowRankOutput(inner, features, bias=bias)
    _with_output(trial, "uplift against the composed matrix", found, scale, Shared(features, bias=bias), composed)


_ROLES: tuple[Roles, ...] = ("qkv", "v", "qk", "kv", "q", "qv", "k")


@law("ALPHA", clauses=("E6", "E9", "O3", "O4", "R6"), kills=("uplift-by-head", "concat-not-per-head"))
def alpha(trial: Trial) -> None:
    """Alpha-Translution is the full operator with composed matrices, half the scale and half the output."""
    draws = trial.draws
    roles = draws.walk(_ROLES)
    grid = draws.pick(((2, 3), (4,), (3, 2)))
    causal, registers = draws.pick((False, False, True)), draws.pick((0, 1))
    one = alpha_translution(
        grid, 4, HEADS, rank=draws.pick((1, 2)), head_dim=2, roles=roles, registers=registers, causal=causal
    )
    params = in_quarters(draws, one)
    count = one.layout.num_classes

    def composed(role: str) -> tuple[Encoder, dict[str, FloatArray]]:
        encoder = getattr(one, role)
        if not isinstance(encoder, Concat):
            return encoder, {f"{role}.weight": params[f"{role}.weight"]}
        second = params.get(f"{role}.1.weight")
        table = params[f"{role}.1.down"] @ params[f"{role}.1.table"] if second is None else repeated(second, count)
        parts = [repeated(params[f"{role}.0.weight"], count), table]
        by_head = np.concatenate([p.reshape(count, 4, HEADS, -1) for p in parts], axis=-1).reshape(count, 4, -1)
        return PerDisplacement(by_head.shape[-1]), {f"{role}.table": by_head}

    sides = {role: composed(role) for role in ("query", "key", "value")}
    own = {name: value for _, found in sides.values() for name, value in found.items()}
    weight, half = params["output.weight"], "v" in roles
    own["output.weight"] = _uplifted(params["output.up"], weight) if half else weight
    own["output.bias"] = params["output.bias"]
    require_held(trial, *own.values())
    scale = 2**-0.5 * (0.5 if "q" in roles or "k" in roles else 1.0)
    other = Operator(
        one.layout, 4, HEADS, **{role: encoder for role, (encoder, _) in sides.items()},  # type: ignore[arg-type]
        relevance=Softmax(scale=scale), output=Shared(4, bias=True), output_scale=0.5 if half else 1.0,
    )  # fmt: skip
    question = question_on(trial, one)
    compare(trial, f"alpha, roles {roles}", question.but(params=params), question.but(operator=other, params=own))
