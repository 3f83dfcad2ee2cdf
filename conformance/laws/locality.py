"""What a row sees: its support and no more, in results and gradients, tokens and tables."""

from __future__ import annotations

import numpy as np

from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import Array, Question, rounded
from translution.conformance.laws.sight import (
    BATCHES,
    TRACERS,
    BoolArray,
    check_traced,
    flat,
    gradients,
    keys_of,
    links_of,
    seen,
    some,
    tracer,
    unchanged,
)
from translution.conformance.strategies import draw_question
from translution.spec import BiasTable, Lattice, Ones, Operator, PerDisplacement, Shared, Softmax


@law("LOCAL", clauses=("E1", "L2", "L5", "M1"), kills=("batch-shares-keys",), quick=6)
def local(trial: Trial) -> None:
    """A row depends on its own query and on the keys that it is linked with and may attend to: whatever else changes,
    other tokens or other items of the batch, it keeps every bit.
    """
    question = draw_question(trial.draws, trial.dtype, batch=trial.draws.pick(BATCHES))
    sight = some(seen(question)[..., :-1], 1)
    item, row = trial.draws.integer(0, sight.shape[0] - 1), trial.draws.integer(0, sight.shape[1] - 1)
    own_keys = np.zeros(sight.shape[::2], bool)
    own_keys[item] = sight[item, row]
    own_query = np.zeros(sight.shape[:2], bool)
    own_query[item, row] = True
    generator = trial.draws.generator()

    def replaced(tokens: Array, kept: BoolArray) -> Array:
        new = rounded(2 * generator.standard_normal(tokens.shape), trial.dtype)
        return np.where(kept.reshape(*tokens.shape[:-1], 1), tokens, new)

    if question.y is not None:
        kept = own_query, own_keys
        other = question.but(x=replaced(question.x, own_query), y=replaced(question.y, own_keys))
    else:
        both = own_keys | own_query if question.operator.uses_content else own_keys
        kept = both, both
        other = question.but(x=replaced(question.x, both))
    if all(part.all() for part in kept):
        trial.draws.reject("the row sees everything")
    before, after = flat(trial.run(question).out), flat(trial.run(other).out)
    unchanged(trial, f"row {row} of item {item}", question, after[item, row], before[item, row], (item, row))


def _causal_layout(draws: Draws) -> Lattice:
    registers = draws.pick((0, 1, 2))
    length, flags = draws.integer(3, 6), draws.pick(((True, False), (False, True), (True, True)))
    chunk, step = draws.integer(2, 3), draws.pick((1, 2, 3))
    return draws.walk(
        (
            Lattice((length,), causal=True, registers=registers),
            Lattice((2, 3), causal=True, registers=registers),
            Lattice((3, 2), causal=flags, registers=registers),
            Lattice((chunk,), key_grid=(length,), offset=length - chunk, causal=True),
            Lattice((5,), key_grid=(3,), key_stride=2, offset=draws.pick((0, 1)), causal=True),
            Lattice((2, 2), key_grid=(3, 3), offset=(1, 0), causal=True, registers=min(registers, 1)),
            Lattice((3,), key_grid=(6,), stride=2, offset=draws.pick((0, 1)), causal=True),
            Lattice((6,), kernel_size=2, dilation=step, causal=True),
        )
    )


def _may_see(layout: Lattice, query: int, key: int) -> bool:
    """Clauses L4 and L6: positions decide between grid tokens, numbers between registers."""
    registers = layout.registers
    if key < registers:
        return key <= query or query >= registers
    if query < registers:
        return False
    a, b = np.unravel_index(query - registers, layout.grid), np.unravel_index(key - registers, layout.keys)
    delta = [
        stride * int(i) + offset - key_stride * int(j)
        for stride, i, offset, key_stride, j in zip(
            layout.strides, a, layout.offsets, layout.key_strides, b, strict=True
        )
    ]
    if layout.kernel_size is not None:
        return delta[0] in range(0, layout.dilations[0] * layout.window[0], layout.dilations[0])
    if layout.raster_causal:
        return next((d > 0 for d in delta if d != 0), True)
    return all(d >= 0 for d, causal in zip(delta, layout.axis_causal, strict=True) if causal)


@law(
    "CAUSAL",
    clauses=("L4", "L6"),
    kills=(
        "causal-strict",
        "causal-ignored",
        "causal-by-index",
        "causal-per-axis",
        "causal-reversed",
        "registers-not-causal",
        "offset-ignored",
    ),
)
def causal(trial: Trial) -> None:
    """In a causal layout a row sees exactly the keys at or before its own position (offsets and strides count), so that
    the first row of a sequence sees itself alone, and a change of any later key leaves every bit of it.
    """
    layout, kind = _causal_layout(trial.draws), trial.draws.walk((TRACERS[1], TRACERS[0], TRACERS[3]))
    generator = trial.draws.generator()
    question = tracer(layout, kind, generator, trial.dtype)
    pairs = [(i, j) for i in range(layout.num_queries) for j in range(layout.num_keys)]
    allowed = np.array([_may_see(layout, i, j) for i, j in pairs]).reshape(layout.num_queries, layout.num_keys)
    trial.require(bool((seen(question)[0, 0, :, :-1] == allowed).all()), "the definition's links are not causal")
    check_traced(trial, "causal order", kind, question, trial.run(question).out)
    rows = np.flatnonzero(~allowed.all(axis=1))
    row = int(rows[trial.draws.integer(0, len(rows) - 1)])
    y = rounded(generator.standard_normal(keys_of(question).shape), trial.dtype)
    later = y.copy()
    later[:, ~allowed[row]] = rounded(3 * generator.standard_normal(later[:, ~allowed[row]].shape), trial.dtype)
    before, after = question.but(y=y), question.but(y=later)
    one, two = trial.run(before).out[:, row], trial.run(after).out[:, row]
    unchanged(trial, f"row {row} after a change of later keys", before, two, one, (slice(None), row))


@law("SUPPORT-GRADIENT", clauses=("E1", "M1", "M4"), kills=("mask-ignored-backward",), quick=6)
def support_gradient(trial: Trial) -> None:
    """The gradient of one row is exactly 0 for every token that the row does not see (outside the support, masked, in
    another item of the batch), and is not 0 for those on which the row depends.
    """
    masked = trial.draws.walk((True, None, None))
    batch = trial.draws.pick(BATCHES)
    question = draw_question(trial.draws, trial.dtype, masked=masked, batch=batch, cotangent=True)
    assert question.cotangent is not None
    sight = some(seen(question)[..., :-1], 1)
    item, row = trial.draws.integer(0, sight.shape[0] - 1), trial.draws.integer(0, sight.shape[1] - 1)
    pull = np.zeros_like(flat(question.cotangent))
    pull[item, row] = flat(question.cotangent)[item, row]
    question = question.but(cotangent=pull.reshape(question.cotangent.shape))
    found, exact = trial.vjp(question), trial.budget(question)
    keys = np.zeros(sight.shape[::2], bool)
    keys[item] = sight[item, row]
    queries = np.zeros(sight.shape[:2], bool)
    queries[item, row] = question.operator.uses_content
    if question.y is not None:
        touched = {"x": queries, "y": keys}
    else:
        touched = {"x": keys | queries if question.operator.uses_content else keys}
    for name, reached in touched.items():
        gradient = flat(found.gradients[name])
        trial.same(f"gradient of {name} where row {row} looks at nothing", gradient[~reached], 0 * gradient[~reached])
        certain = np.abs(exact.gradient_values[name]) > exact.gradients[name]
        zero = int((certain & (found.gradients[name] == 0)).sum())
        trial.require(zero == 0, f"gradient of {name}: {zero} elements are 0 on which the row depends")


_TABLE_LAYOUTS = (
    "window", "window-zeros", "window-wide-padding", "dead-rows", "cross-grid", "strided", "transposed", "graph",
    "cross-graph", "causal-grid", "window-circular", "grid",
)  # fmt: skip

_WIDE = Lattice((2, 3), kernel_size=(5, 3))
_WIDE_ATTENTION = Operator(_WIDE, 4, 2, Shared(4), Shared(4), Shared(4), Softmax(bias=BiasTable()))
# Of three displacements the last is never met, which is another row of the key's tables than of the others'.
_RELATIVE = PerDisplacement(4)
_BEYOND = Operator(
    Lattice((5,), key_grid=(4,), kernel_size=3, offset=3), 3, 2, _RELATIVE, _RELATIVE, _RELATIVE, Softmax()
)
_WIDE_CONVOLUTION = Operator(_WIDE, 3, 2, PerDisplacement(4), relevance=Ones())


def _rows_in_use(question: Question, masked: bool) -> dict[str, BoolArray]:
    """Which rows of each table the links use, by parameter name: [T], or [H, T] for a bias."""
    operator = question.operator
    layout, heads = operator.layout, operator.num_heads
    sight = some(seen(question if masked else question.but(mask=None)), 0)
    used = {side: np.zeros((heads, layout.num_classes), bool) for side in ("value", "key")}
    for i, links in enumerate(links_of(layout)):
        for link in links:
            live = sight[:, i, -1 if link.key is None else link.key]
            used["value"][:, link.value_row] |= live
            used["key"][:, link.key_row] |= live
    found: dict[str, BoolArray] = {}
    for name in question.params:
        role, last = name.partition(".")[0], name.rpartition(".")[2]
        if role == "relevance" and last == "bias":
            found[name] = used["value"]
        elif last in ("table", "vectors"):
            found[name] = some(used["key" if role == "key" else "value"], 0)
    return found


@law("UNUSED", clauses=("L3", "M1"), kills=("row-wraps",))
def unused_rows(trial: Trial) -> None:
    """Rows of tables that no live pair uses have no effect, whatever numbers they hold, and a gradient of exactly 0."""
    operator = trial.draws.walk((None, _BEYOND, _WIDE_ATTENTION, None, _WIDE_CONVOLUTION))
    question = draw_question(
        trial.draws,
        trial.dtype,
        operator=operator,
        layouts=_TABLE_LAYOUTS,
        batch=trial.draws.pick(BATCHES),
        cotangent=True,
    )
    live, linked = _rows_in_use(question, True), _rows_in_use(question, False)
    if all(rows.all() for rows in live.values()):
        trial.draws.reject("every row is in use")
    generator, params = trial.draws.generator(), dict(question.params)
    huge = 2.0**15 if trial.dtype == "float16" else 2.0**100
    for name, rows in live.items():
        value = params[name].copy()
        value[~rows] = rounded(3 * generator.standard_normal(value[~rows].shape), trial.dtype)
        value[~linked[name]] = huge * generator.choice([-1.0, 1.0], value[~linked[name]].shape)
        params[name] = value
    other = question.but(params=params)
    want, got = flat(trial.run(question).out), flat(trial.run(other).out)
    unchanged(trial, "result after a change of unused rows", question, got, want)
    found = gradients(trial, other)
    if found is None:
        return
    exact = trial.budget(question)
    for name, gradient in found.gradients.items():
        trial.require(bool(np.isfinite(gradient).all()), f"gradient of {name} is not finite")
        if name in live:
            own = gradient[~live[name]]
            trial.same(f"gradient of unused rows of {name}", own, np.zeros_like(own))
        trial.within(f"gradient of {name}", gradient, exact.gradient_values[name], exact.gradients[name])
