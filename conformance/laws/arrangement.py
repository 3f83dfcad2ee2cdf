"""What a layout and a relevance are made of: windows, chunks, far classes, biases and mixtures written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import Array, Question
from translution.conformance.laws.equality import (
    agree,
    ask,
    by_classes,
    chosen,
    compare,
    displacement,
    draw_reader,
    embedded,
    full_mask,
    gathered,
    is_register,
    quarters,
    question_on,
    require_held,
    rows_by,
    several,
    tokens_of,
)
from translution.conformance.laws.positions import Label, far, links, row_numbers
from translution.conformance.laws.sight import unchanged
from translution.conformance.strategies import (
    LAYOUT_KINDS,
    draw_layout,
    draw_operator,
    draw_params,
    draw_question,
)
from translution.spec import (
    BiasTable,
    Lattice,
    Layout,
    Mean,
    Mixture,
    Ones,
    PairTable,
    QuadraticBias,
    Relevance,
    SlopeBias,
    Softmax,
    SpecError,
    operator_from_json,
    operator_to_json,
)

Plain = Softmax | Ones | Mean
_CLASSWISE: tuple[Relevance, ...] = (
    Softmax(),
    Ones(),
    Softmax(scale=2.0, bias=BiasTable()),
    Mean(),
    Softmax(content=False, bias=BiasTable()),
    Mixture(Softmax(), Softmax(content=False, bias=BiasTable())),
)


def _with_support(question: Question, linked: Array) -> Question:
    """The question with a mask that leaves only the linked pairs."""
    mask = full_mask(question)
    if mask is None:
        return question.but(mask=linked)
    return question.but(mask=mask & linked if mask.dtype == np.bool_ else np.where(linked, mask, -np.inf))


@law(
    "PAIR-TABLE",
    clauses=("L1", "L2", "L3", "L4", "L6", "L7", "L8"),
    kills=("pair-table-transposed", "rows-descending", "row-off-by-one", "registers-first"),
)
def pair_table(trial: Trial) -> None:
    """A lattice on which no pair is linked twice is the pair table of its classes, worked out pair by pair from the
    positions.
    """
    draws = trial.draws

    def single(layout: Layout) -> bool:
        seen = [(link.query, link.key) for link in links(layout)]
        once = len(set(seen)) == len(seen) and all(j is not None for _, j in seen)
        return once and several(layout)

    kinds = tuple(k for k in LAYOUT_KINDS if k not in ("graph", "cross-graph", "dead-rows"))
    operator = by_classes(draw_reader(draws, kinds, single, _CLASSWISE))
    layout = operator.layout
    classes = np.full((2, layout.num_queries, layout.num_keys), -1)
    for link in links(layout):
        classes[:, link.query, link.key] = link.value_row, link.key_row
    first, second = (tuple(map(tuple, part.tolist())) for part in classes)
    question = question_on(trial, operator)
    mirrored = layout.is_self and second == tuple(zip(*first, strict=True))
    table = replace(operator, layout=PairTable(first, layout.num_classes, None if mirrored else second))
    compare(trial, "a lattice against its pair table", question, question.but(operator=table))


@law("FAR-IS-TIED", clauses=("L7",), kills=("far-dropped", "far-clipped-early", "log-buckets-rounded"))
def far_is_tied(trial: Trial) -> None:
    """Far displacements that share a class do what tables do in which each displacement has its own row, and those rows
    are equal.
    """
    draws = trial.draws
    question = question_on(trial, draw_reader(draws, ("log-buckets", "clip")))
    layout = question.operator.layout
    assert isinstance(layout, Lattice)
    apart = replace(layout, far=None)
    classes = layout.far

    def shared(label: Label) -> Label:
        return label if is_register(label) else tuple(far(classes, d) for d in displacement(label))

    tied = gathered(question.params, *rows_by(layout, apart, shared))
    other = question.but(operator=replace(question.operator, layout=apart), params=tied)
    compare(trial, f"{classes} against tied rows", question, other)


@law("RESTRICT", clauses=("L1", "L3", "L4", "L6", "M1", "M4"), kills=("row-off-by-one", "row-wraps", "mask-inverted"))
def restrict(trial: Trial) -> None:
    """A grid is a part of a larger one whose other keys are masked: with the rows of the small tables in their places
    among other rows, the same rows come out.
    """
    draws = trial.draws

    def plain(layout: Layout) -> bool:
        return several(layout) and layout.keys == layout.grid and layout.boundary == "absent"  # type: ignore[union-attr]

    kinds = ("grid", "registers", "line", "window", "causal-grid", "clip", "causal-line", "causal-axes")
    operator = by_classes(draw_reader(draws, kinds, plain))
    layout = operator.layout
    assert isinstance(layout, Lattice)
    corner = [draws.integer(0, 1) for _ in layout.grid]
    corner[0] = max(corner[0], int(layout.rank == 1))
    extents = tuple(n + c + draws.integer(0, 1) for n, c in zip(layout.grid, corner, strict=True))
    larger = replace(layout, grid=extents, key_grid=None)
    part = tuple(slice(c, c + n) for c, n in zip(corner, layout.grid, strict=True))
    tokens = tokens_of(larger, "query", lambda grid: grid[part])
    small = question_on(trial, operator)
    large = embedded(trial, small, replace(operator, layout=larger), tokens, tokens)
    agree(trial, f"{layout.grid} at {corner} of {extents}", ask(trial, small), ask(trial, large).rows(tokens))


@law("CHUNK", clauses=("L1", "L2", "L4"), kills=("offset-ignored", "causal-by-index"))
def chunk(trial: Trial) -> None:
    """Queries in two chunks, each a layout of its own that starts at the chunk's offset, give the rows of the whole, in
    causal order too.
    """
    draws = trial.draws

    def splits(layout: Layout) -> bool:
        if not isinstance(layout, Lattice) or layout.grid[0] == 1:
            return False
        return layout.boundary != "shift" and not (layout.boundary == "circular" and not layout.kernel_size)

    kinds = (
        "causal-line", "grid", "window", "causal-grid", "cross-grid", "registers", "window-zeros", "strided", "clip",
        "line", "causal-axes", "log-buckets", "window-reflect", "transposed", "window-circular",
    )  # fmt: skip
    question = question_on(trial, draw_reader(draws, kinds, splits))
    layout = question.operator.layout
    assert isinstance(layout, Lattice)
    if question.y is None:
        question = question.but(y=question.x.copy())
    whole = ask(trial, question)
    at = draws.integer(1, layout.grid[0] - 1)
    for start, stop in ((0, at), (at, layout.grid[0])):
        offset = (layout.offsets[0] + layout.strides[0] * start, *layout.offsets[1:])
        try:
            own = replace(layout, grid=(stop - start, *layout.grid[1:]), key_grid=layout.keys, offset=offset)
        except SpecError:
            draws.reject("a chunk that sees no key")
        queries = tokens_of(layout, "query", lambda grid, s=start, e=stop: grid[s:e])  # type: ignore[misc]
        part = chosen(question, queries, np.arange(layout.num_keys), own)
        part = part.but(params=gathered(question.params, *rows_by(layout, own)))
        agree(trial, f"rows {start} to {stop}", ask(trial, part), whole.rows(queries))


@law(
    "WINDOW-IS-MASK",
    clauses=("L2", "L3", "L5", "M1"),
    kills=("window-one-short", "padding-off-by-one", "dilation-ignored", "shift-cut-at-border"),
)
def window_is_mask(trial: Trial) -> None:
    """A window, with nothing beyond the border or shifted to stay inside, is the layout of all displacements with a
    mask, and its tables are rows among others.
    """
    draws = trial.draws

    def windowed(layout: Layout) -> bool:
        return several(layout) and layout.boundary in ("absent", "shift")  # type: ignore[union-attr]

    kinds = ("window", "shift", "transposed", "strided", "window", "dead-rows")
    question = question_on(trial, draw_reader(draws, kinds, windowed))
    layout = question.operator.layout
    assert isinstance(layout, Lattice)
    every = replace(layout, kernel_size=None, dilation=1, padding=None, boundary="absent")
    operator = replace(question.operator, layout=every)
    more = draw_params(draws.generator(), operator, trial.dtype)
    params = gathered(question.params, *rows_by(layout, every), into=more)
    linked = np.zeros((layout.num_queries, layout.num_keys), bool)
    for link in links(layout):
        linked[link.query, link.key] = True
    compare(
        trial,
        "a window against a mask",
        question,
        _with_support(question.but(operator=operator, params=params), linked),
    )


@law("MEAN-IS-SOFTMAX", clauses=("R1", "R3", "R7"), kills=("mean-over-window", "mean-ignores-mask"))
def mean_is_softmax(trial: Trial) -> None:
    """The mean over the live links of a row is a softmax of equal logits, which has no content and no bias."""
    windows = ("window", "window-zeros", "shift", "window-circular", "dead-rows")
    draws = trial.draws
    layouts = draws.walk((windows, LAYOUT_KINDS))
    operator = draw_operator(draws, layout=draw_layout(draws, kinds=layouts, accepted=several), relevances=(Mean(),))
    question = question_on(trial, operator, masked=draws.walk((None, True, None)))
    equal = replace(operator, relevance=Softmax(content=False))
    compare(trial, "mean against softmax of nothing", question, question.but(operator=equal))


def _branch(question: Question, relevance: Relevance, prefix: str) -> Question:
    """One branch of a mixture by itself."""
    operator = question.operator
    content = isinstance(relevance, Softmax) and relevance.content
    sides = {} if content else {"query": None, "key": None}
    alone = replace(operator, relevance=relevance, **sides)  # type: ignore[arg-type]
    params = {name.replace(f"relevance.{prefix}.", "relevance."): value for name, value in question.params.items()}
    return question.but(operator=alone, params={name: params[name] for name in alone.parameters})


@law("MIXTURE", clauses=("R4",), kills=("gate-swapped", "gate-raw", "mixture-of-logits"), quick=10)
def mixture(trial: Trial) -> None:
    """A gate of 0 gives the mean of the two branches, far below 0 the first and far above the second; two equal
    branches give that branch; exchanging the branches and the sign of the gate changes nothing.
    """
    draws = trial.draws
    kind = draws.walk(("half", "first", "second", "exchanged", "equal"))
    bias = Softmax(scale=0.5, bias=BiasTable())
    pairs: tuple[tuple[Plain, Plain], ...] = (
        (bias, Softmax()),
        (Softmax(content=False, bias=BiasTable()), bias),
        (Softmax(), Mean()),
        (Ones(), bias),
    )
    first, second = draws.pick(pairs[:2] if kind == "half" else pairs)
    relevance = Mixture(first, first if kind == "equal" else second)
    question = question_on(trial, draw_reader(draws, relevances=(relevance,)))
    heads, params = question.operator.num_heads, dict(question.params)
    if kind == "equal":
        params |= {n: params[n.replace(".second.", ".first.")] for n in params if ".second." in n}
        question = question.but(params=params)
        compare(trial, "equal branches", question, _branch(question, first, "first"))
        return
    if kind == "exchanged":
        swapped = {"first": "second", "second": "first"}
        other = {".".join(swapped.get(part, part) for part in n.split(".")): v for n, v in params.items()}
        other["relevance.gate"] = -params["relevance.gate"]
        operator = replace(question.operator, relevance=Mixture(second, first))
        compare(trial, "branches exchanged", question, question.but(operator=operator, params=other))
        return
    # The sigmoid of -800 is 0 in every dtype.
    gate = {"first": -800.0, "half": 0.0, "second": 800.0}[kind]
    question = question.but(params=params | {"relevance.gate": np.full(heads, gate)})
    if kind != "half":
        compare(trial, f"gate {gate}", question, _branch(question, first if kind == "first" else second, kind))
        return
    both = ask(trial, _branch(question, first, "first")).plus(ask(trial, _branch(question, second, "second")))
    agree(trial, "gate 0", ask(trial, question), both.times(np.eye(question.operator.out_features) / 2))


@law("BIAS-KINDS", clauses=("R5", "L3"), kills=("slopes-squared", "quadratic-sign", "bias-mirrored"))
def bias_kinds(trial: Trial) -> None:
    """Slopes and quadratic biases are bias tables that hold -slope |delta|_1, or weight . (-delta, |delta|^2), for each
    displacement, and 0 for a pair with a register.
    """
    draws = trial.draws
    content = draws.some(0.8)
    biases: tuple[SlopeBias | QuadraticBias, ...] = (SlopeBias(), QuadraticBias(), SlopeBias((0.75, -0.5)))
    bias = draws.walk(biases)

    def exact(layout: Layout) -> bool:
        return isinstance(layout, Lattice) and layout.far is None and several(layout)

    operator = draw_reader(draws, LAYOUT_KINDS, exact, (Softmax(content=content, bias=bias),))
    layout = operator.layout
    assert isinstance(layout, Lattice)
    heads, question = operator.num_heads, question_on(trial, operator)
    rows = sorted(row_numbers(layout, 1).items(), key=lambda item: item[1])
    delta = np.array(
        [(0,) * layout.rank if is_register(label) else displacement(label) for label, _ in rows], np.float64
    )
    delta = delta.reshape(-1, layout.rank)
    params = dict(question.params)
    if isinstance(bias, SlopeBias):
        table = -np.outer(bias.slopes_for(heads), np.abs(delta).sum(axis=1))
    else:
        params["relevance.weight"] = quarters(draws.generator(), (heads, layout.rank + 1))
        features = np.concatenate([-delta, (delta**2).sum(axis=1, keepdims=True)], axis=1)
        table = params["relevance.weight"] @ features.T
    require_held(trial, table)
    tabled = replace(operator, relevance=Softmax(content=content, bias=BiasTable()))
    other = {n: v for n, v in params.items() if n != "relevance.weight"} | {"relevance.bias": table}
    compare(
        trial,
        f"{type(bias).__name__} against a table",
        question.but(params=params),
        question.but(operator=tabled, params=other),
    )


@law("ADDITIVE", clauses=("R2", "M1"), kills=("ones-normalised", "ones-ignores-mask"))
def additive(trial: Trial) -> None:
    """Under Ones a row is a sum over its keys: what two masks without a common pair leave adds up to what their union
    leaves.
    """
    draws = trial.draws
    # Zero tokens are never masked, so that they would count twice.
    kinds = tuple(k for k in LAYOUT_KINDS if k not in ("window-zeros", "window-wide-padding", "strided"))
    operator = replace(draw_operator(draws, layouts=kinds, relevances=(Ones(),)), output=None)
    question = question_on(trial, operator, masked=True)
    generator = draws.generator()
    mask = full_mask(question)
    assert mask is not None
    part = np.asarray(generator.random(mask.shape) < 0.5)
    one, other = (ask(trial, question.but(mask=mask & own)) for own in (part, ~part))
    agree(trial, "the parts against the whole", one.plus(other), ask(trial, question))


@law("STATE", clauses=("P1", "P2"), kills=("noise",))
def state(trial: Trial) -> None:
    """An operator that was written as JSON and read again, with parameters given in another order, gives every bit of
    the same result.
    """
    question = draw_question(trial.draws, trial.dtype)
    names = list(question.params)
    order = trial.draws.generator().permutation(len(names))
    out = trial.run(question).out
    read = operator_from_json(operator_to_json(question.operator))
    trial.require(read == question.operator, f"read back as {read}")
    other = question.but(operator=read, params={names[n]: question.params[names[n]].copy() for n in order})
    unchanged(trial, "after a round trip", question, trial.run(other).out, out)
