"""What leaves a result alone, or changes it linearly: matrices of queries and keys, constants, values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import Array
from translution.conformance.laws.equality import (
    agree,
    ask,
    compare,
    draw_reader,
    full_mask,
    gathered,
    in_quarters,
    is_register,
    question_on,
    require_held,
    several,
    with_features,
)
from translution.conformance.laws.positions import Label, row_numbers
from translution.conformance.laws.sight import seen
from translution.conformance.strategies import LAYOUT_KINDS, draw_layout
from translution.spec import (
    BiasTable,
    Concat,
    Encoder,
    Identity,
    Lattice,
    Layout,
    LowRank,
    Mean,
    Mixture,
    Operator,
    PairTable,
    PerDisplacement,
    Relevance,
    Shared,
    SlopeBias,
    Softmax,
    Sum,
    Vectors,
)
from translution.spec.encoders import walk as inside

_WINDOW_KINDS = ("window-circular", "window", "window-zeros", "strided", "transposed", "window-replicate")


def _exchanged(label: Label) -> Label:
    """A pair with a register, seen from its other token."""
    return ("register", label[2], label[1]) if is_register(label) else label


def _counterparts(layout: Layout) -> tuple[list[int], list[int]]:
    """For each row of the query's tables the row of the key's that is read where the pair is seen from its other token,
    and the other way round.
    """
    if isinstance(layout, PairTable):
        every = list(range(layout.num_classes))
        return every, every
    assert isinstance(layout, Lattice)
    query, key = row_numbers(layout, 1), row_numbers(layout, -1)
    return [key[_exchanged(label)] for label in query], [query[_exchanged(label)] for label in key]


@law("DUALITY", clauses=("L3", "L6", "E1", "R6"), kills=("query-mirrored", "key-mirrored", "query-centre-only"))
def duality(trial: Trial) -> None:
    """Queries and keys are alike: with their encoders exchanged, class by class, the logit of (i, j) is that of (j, i).

    Row i sees key j and one key more, whose token is 0 and with it the logit, so that its weight on j shows the logit.
    """
    draws = trial.draws

    def mutual(layout: Layout) -> bool:
        if not several(layout) or not layout.is_self:
            return False
        if isinstance(layout, PairTable):
            return all(min(row) >= 0 for row in layout.classes)
        full = layout.kernel_size is None and set(layout.strides) == {1} == set(layout.key_strides)
        return full and layout.causal is False and not any(layout.offsets)

    kinds = ("grid", "registers", "line", "graph", "clip", "circular", "grid", "registers")
    layout = draw_layout(draws, kinds=kinds, accepted=mutual)
    readers: tuple[Encoder, ...] = (
        PerDisplacement(4),
        Shared(4),
        PerDisplacement(4, groups=2),
        LowRank(2, 4),
        Concat((PerDisplacement(2), Shared(2))),
        Sum((PerDisplacement(4), Shared(4))),
    )
    query, key = draws.pick(readers), draws.pick(readers)
    operator = Operator(layout, 4, 2, Shared(2), query, key)
    question = question_on(trial, operator, masked=False, self_only=True)
    count, generator = layout.num_queries, draws.generator()
    silent = draws.integer(0, count - 1)
    x = question.x.copy()
    x[..., -1] = 1.0
    x[..., silent, :] = 0.0
    reads = np.zeros((4, 2))
    reads[-1] = 1.0
    partner = np.arange(count)
    others = np.delete(partner, silent)
    partner[others] = generator.permutation(others)
    sight = np.zeros((count, count), bool)
    sight[np.arange(count), partner] = True
    sight[:, silent] = True
    back = np.zeros_like(sight)
    back[partner, np.arange(count)] = True
    back[:, silent] = True
    params = {**question.params, "value.weight": reads}
    to_key, to_query = _counterparts(layout)
    names = {"query": "key", "key": "query"}
    swapped = {".".join([names.get(n.partition(".")[0], "value"), n.partition(".")[2]]): v for n, v in params.items()}
    # The new query's row of a label is the old key's row of that label.
    swapped = gathered(swapped, to_key, to_query)
    one = ask(trial, question.but(x=x, y=None, params=params, mask=sight))
    other = replace(operator, query=key, key=query)
    two = ask(trial, question.but(operator=other, x=x, y=None, params=swapped, mask=back))
    agree(trial, "weights of (i, j) and (j, i)", one, two.rows(partner))


LOGIT_ENCODERS: tuple[Encoder, ...] = (
    PerDisplacement(4, bias=True),
    Shared(4, bias=True),
    Sum((Shared(4), Vectors(4))),
    LowRank(2, 4),
)
_CONTENT: tuple[Relevance, ...] = (
    Softmax(),
    Softmax(bias=BiasTable()),
    Mixture(Softmax(), Mean()),
    Softmax(scale=-0.5, bias=SlopeBias()),
)


def _dotted(draws: Draws, kinds: tuple[str, ...] = LAYOUT_KINDS) -> Operator:
    """An operator with an inner product of heads of width 2, whose parameters end in all features of its heads."""
    layout = draw_layout(draws, kinds=kinds, accepted=several)
    fitting = _CONTENT if isinstance(layout, Lattice) and layout.far is None else _CONTENT[:3]
    query, key = draws.pick(LOGIT_ENCODERS), draws.pick(LOGIT_ENCODERS)
    values: tuple[Encoder, ...] = (PerDisplacement(4), Shared(4))
    value = draws.pick(values)
    if draws.walk((False, False, True)):
        query, key, value = LOGIT_ENCODERS[1], LOGIT_ENCODERS[1], Shared(4)
    return Operator(layout, 4, 2, value, query, key, draws.walk(fitting))


def _unimodular(generator: np.random.Generator) -> tuple[Array, Array]:
    """A matrix of powers of two and sums of them, and its inverse transposed, both exact."""
    order, signs = generator.permutation(2), generator.choice((-1.0, 1.0), 2)
    sizes = np.ldexp(1.0, generator.integers(-1, 2, 2))
    shear = np.array([[1.0, generator.integers(-1, 2)], [0.0, 1.0]])
    back = np.array([[1.0, 0.0], [-shear[0, 1], 1.0]])
    turn = np.eye(2)[order] * signs
    return shear @ (turn * sizes), back @ (turn / sizes)


@law("GAUGE", clauses=("E2", "E4", "E5", "E6", "E7", "R1"), kills=("heads-interleaved",))
def gauge(trial: Trial) -> None:
    """Logits are inner products head by head: a matrix for each head, on the queries' features, and its inverse
    transposed on the keys', change nothing.
    """
    draws = trial.draws
    operator = _dotted(draws)
    question, params = question_on(trial, operator), in_quarters(draws, operator)
    generator = draws.generator()
    own, other = (np.zeros((4, 4)) for _ in range(2))
    for head in (slice(0, 2), slice(2, 4)):
        own[head, head], other[head, head] = _unimodular(generator)
    moved = with_features(params, "query", lambda value: value @ own)
    moved = with_features(moved, "key", lambda value: value @ other)
    require_held(trial, *moved.values())
    compare(trial, "a matrix on either side", question.but(params=moved), question.but(params=params))


@law("SCALE", clauses=("R6",), kills=("scale-missing", "scale-by-value-width", "scale-by-dim"))
def scale(trial: Trial) -> None:
    """The scale of the inner product is a factor of the queries; where none is given, it is the head width of the
    queries to the power of -1/2.
    """
    draws = trial.draws
    factor, given = draws.walk(((0.5, None), (2.0, 2.0), (0.25, None), (1.0, None), (-0.5, -0.5)))
    width = 2 * int(factor**-2) if given is None else 4
    plain = draws.walk((False, True, False))
    kind = Shared if plain else PerDisplacement
    encoder = draws.pick((kind(width), kind(width, bias=True)))
    layout = draw_layout(draws, kinds=LAYOUT_KINDS, accepted=several)
    bias = draws.pick((None, BiasTable()))
    value = draws.pick((Shared(4), Shared(2), Shared(6)))
    operator = Operator(layout, 3, 2, value, encoder, encoder, Softmax(scale=given, bias=bias))
    question = question_on(trial, operator)
    moved = with_features(dict(question.params), "query", lambda value: factor * value)
    require_held(trial, *moved.values())
    other = replace(operator, relevance=Softmax(scale=1.0, bias=bias))
    compare(
        trial, f"scale {given} against {factor} in the queries", question, question.but(operator=other, params=moved)
    )


@law("SIGN", clauses=("E1", "R1"), kills=("query-rectified",))
def sign(trial: Trial) -> None:
    """Queries and keys with the opposite sign have the same inner products, so that nothing changes."""
    draws = trial.draws
    question = question_on(trial, _dotted(draws))
    moved = with_features(dict(question.params), "query", lambda value: -value)
    moved = with_features(moved, "key", lambda value: -value)
    compare(trial, "opposite queries and keys", question.but(params=moved), question)


@law("SHIFT", clauses=("R1", "R5", "M2"), kills=("mask-after-softmax", "softmax-over-queries"))
def shift(trial: Trial) -> None:
    """A constant for each head, added to every bias, and one for each row, added to the numbers of a mask, change
    nothing.
    """
    draws = trial.draws
    content = draws.walk((True, False, True))
    operator = draw_reader(draws, relevances=(Softmax(content=content, bias=BiasTable()),))
    layout = operator.layout
    question, params = question_on(trial, operator), in_quarters(draws, operator)
    generator = draws.generator()
    moved = dict(params)
    moved["relevance.bias"] = params["relevance.bias"] + generator.integers(-32, 33, (2, 1)) / 2
    full = full_mask(question)
    # A zero token has no mask, so that a row's constant would not reach it.
    linked = isinstance(layout, Lattice) and layout.boundary == "zeros"
    if full is not None and not linked:
        live = full if full.dtype == np.bool_ else full != -np.inf
        numbers = generator.integers(-3, 4, full.shape) / 4
        added = generator.integers(-16, 17, (*full.shape[:-1], 1)) / 2
        first, second = (np.where(live, part, -np.inf) for part in (numbers, numbers + added))
        question, other = question.but(mask=first), question.but(mask=second)
    else:
        other = question
    require_held(trial, *moved.values())
    compare(trial, "constants added", other.but(params=moved), question.but(params=params))


@law(
    "UNITY",
    clauses=("R1", "R3", "R4", "M1", "M3"),
    kills=("epsilon-in-denominator", "softmax-unnormalised", "mask-after-softmax"),
)
def unity(trial: Trial) -> None:
    """Weights of a softmax or mean add up to 1: a value that is the same for every key comes out unchanged on each row
    with a live key.
    """
    draws = trial.draws
    relevances: tuple[Relevance, ...] = (
        Softmax(),
        Mean(),
        Softmax(bias=BiasTable()),
        Mixture(Softmax(), Mean()),
        Softmax(content=False, bias=BiasTable()),
    )
    operator = draw_reader(draws, relevances=relevances)
    plain = isinstance(operator.query, Shared)
    operator = replace(operator, value=Shared(4, bias=True), output=None, output_scale=1.0)
    drawn = question_on(trial, operator)
    constant = in_quarters(draws, operator)["value.bias"] + (4 if plain else 1)
    params = {**drawn.params, "value.weight": np.zeros((operator.keys_dim, 4)), "value.bias": constant}
    question = drawn.but(params=params)
    live = np.moveaxis(np.asarray(seen(question).any(axis=-1)), 1, 2)
    want = np.where(np.repeat(live, 2, axis=-1), constant, 0).reshape(question.out_shape)
    found = ask(trial, question)
    trial.within("a constant value", found.out, want, found.bound)


@law("LINEAR", clauses=("E1", "E4", "E5", "R2"), kills=("values-clipped",))
def linear(trial: Trial) -> None:
    """The result is linear in the values' parameters: it doubles with them, and is the sum of the results where they
    are sums.
    """
    draws = trial.draws
    operator = replace(draw_reader(draws, windows=_WINDOW_KINDS), output=None)
    if any(isinstance(part, (Identity, LowRank)) for part in inside(operator.value)):
        operator = replace(operator, value=PerDisplacement(4))
    question = question_on(trial, operator)
    first, second = in_quarters(draws, operator), in_quarters(draws, operator)
    own = {name for name in first if name.startswith("value.")}
    second = {name: second[name] if name in own else value for name, value in first.items()}
    both = {name: value + second[name] if name in own else value for name, value in first.items()}
    doubled = {name: 2 * value if name in own else value for name, value in first.items()}
    one, two = (ask(trial, question.but(params=params)) for params in (first, second))
    agree(trial, "a sum of values", ask(trial, question.but(params=both)), one.plus(two))
    agree(trial, "values doubled", ask(trial, question.but(params=doubled)), one.at(lambda part: 2 * part))
