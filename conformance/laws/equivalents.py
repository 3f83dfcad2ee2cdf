"""Other people's implementations: for each, an operator that must compute the same from the same weights.

The reductions are those of :mod:`translution.conformance.reductions`. A peer computes in float64 from numbers that the
subject's dtype holds, so that what may lie between the two is the bound of the subject's arithmetic and the peer's own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from translution.conformance.error_model import budget
from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import Question, rounded
from translution.conformance.laws.equality import require_held

if TYPE_CHECKING:
    from translution.conformance.reductions import Reduction, ReductionCase


@cache
def _peers(kind: str) -> tuple[Reduction, ...]:
    """The reductions of a kind. They import torch, which takes a second that a list of laws is not worth."""
    from translution.conformance.reductions_attention import ATTENTION
    from translution.conformance.reductions_convolution import CONVOLUTIONS
    from translution.conformance.reductions_relative import RELATIVE

    every = {reduction.id: reduction for reduction in (*CONVOLUTIONS, *ATTENTION, *RELATIVE)}

    def named(*starts: str) -> tuple[Reduction, ...]:
        return tuple(reduction for start in starts for name, reduction in every.items() if name.startswith(start))

    return {
        "convolution": named("convolution", "depthwise"),
        "transposed": named("transposed"),
        "pooling": named("average"),
        "attention": ATTENTION[:3],
        "attention with weights": ATTENTION[:2],
        "encodings": RELATIVE,
        "alike": (ATTENTION[3], every["translution-weights-one"]),
    }[kind]


def _case(trial: Trial, kind: str) -> tuple[ReductionCase, bool]:
    """A case of one of the reductions of that kind in numbers that the dtype holds; whether both sides are exact."""
    import torch

    draws = trial.draws
    reduction = draws.walk(_peers(kind))
    integers = reduction.exact and draws.some(0.4)
    case = reduction.sample(draws.integer(0, 9999), integers=integers)
    weights = {name: torch.from_numpy(rounded(value.numpy(), trial.dtype)) for name, value in case.peer.weights.items()}
    case = replace(
        case,
        x=rounded(case.x, trial.dtype),
        y=None if case.y is None else rounded(case.y, trial.dtype),
        cotangent=rounded(case.cotangent, trial.dtype),
        peer=replace(case.peer, weights=weights),
    )
    # The peer holds its own copy of a mask; sums of weights need not be numbers of the dtype.
    require_held(trial, *case.params.values(), *(() if case.mask is None else (case.mask,)))
    # Whole numbers stay exact in float32 and float64; a half dtype may round a sum when it is written down.
    return case, integers and trial.dtype in ("float64", "float32")


def _question(case: ReductionCase) -> Question:
    return Question(case.operator, case.params, case.x, case.y, case.mask, case.cotangent, label=case.note)


def _values(trial: Trial, kind: str) -> None:
    """The result is the peer's."""
    case, exact = _case(trial, kind)
    question = _question(case).but(cotangent=None)
    out, expected = trial.run(question).out, case.expected.out
    if exact:
        trial.same(f"result, {case.note}", out, expected)
        return
    q, theirs = question, case.peer.arithmetic
    peer = budget(q.operator, q.params, q.x, q.y, q.mask, None, theirs)
    trial.within(f"result, {case.note}", out, expected, trial.budget(question).out + peer.out)


def _gradients(trial: Trial, kind: str) -> None:
    """The gradients are the peer's, those of parameters after the transpose of what made them from its weights."""
    case, exact = _case(trial, kind)
    question = _question(case)
    found = trial.vjp(question).gradients
    own = {name: value for name, value in found.items() if name in ("x", "y")}
    own |= case.to_peer({name: value for name, value in found.items() if name not in own})
    if exact:
        for name, wanted in case.expected.gradients.items():
            trial.same(f"gradient of {name}, {case.note}", own[name], wanted)
        return
    q = question
    peer = budget(q.operator, q.params, q.x, q.y, q.mask, q.cotangent, case.peer.arithmetic)
    allowed = {name: bound + peer.gradients[name] for name, bound in trial.budget(question).gradients.items()}
    bounds = case.to_peer(allowed)
    for name, wanted in case.expected.gradients.items():
        bound = bounds[name] if name in bounds else allowed[name]
        trial.within(f"gradient of {name}, {case.note}", own[name], wanted, bound)


@law(
    "CONVOLUTION",
    clauses=("L1", "L2", "L5", "E5", "R2"),
    kills=(
        "dilation-ignored",
        "stride-phase",
        "circular-as-zeros",
        "reflect-repeats-edge",
        "double-links-once",
        "groups-swapped",
    ),
    quick=8,
)
def convolution(trial: Trial) -> None:
    """One matrix per displacement under Ones is ``torch.nn.Conv1d``, ``Conv2d`` or ``Conv3d``: any stride, padding,
    dilation, groups and padding mode, with and without bias.
    """
    _values(trial, "convolution")


@law(
    "CONVOLUTION-GRADIENT",
    clauses=("L2", "L5", "E5", "R2", "B1"),
    kills=("value-gradient-mirrored", "value-detached", "gradient-batch-mean"),
)
def convolution_gradient(trial: Trial) -> None:
    """The gradients of that operator are those of the convolution: input, kernel and bias."""
    _gradients(trial, "convolution")


@law("TRANSPOSED-CONVOLUTION", clauses=("L1", "L2", "E5", "R2"), kills=("key-stride-ignored",))
def transposed_convolution(trial: Trial) -> None:
    """With keys ``stride`` apart it is ``torch.nn.ConvTranspose1d``, ``2d`` or ``3d``."""
    _values(trial, "transposed")


@law("TRANSPOSED-CONVOLUTION-GRADIENT", clauses=("L1", "L2", "E5", "R2", "B1"), kills=("value-gradient-mirrored",))
def transposed_convolution_gradient(trial: Trial) -> None:
    """The gradients of that operator are those of the transposed convolution."""
    _gradients(trial, "transposed")


@law("POOLING", clauses=("L2", "L5", "E3", "R3"), kills=("mean-over-window", "zeros-as-absent"), quick=6)
def pooling(trial: Trial) -> None:
    """The mean of the keys in a window is ``torch.nn.AvgPool1d``, ``2d`` or ``3d``; padded zeros count or not, as the
    boundary says.
    """
    _values(trial, "pooling")


@law(
    "MULTIHEAD-ATTENTION",
    clauses=("E2", "E4", "R1", "R6", "M1", "M2", "L4", "O1", "O2"),
    kills=("mask-inverted", "causal-strict", "scale-missing", "scale-by-dim", "heads-interleaved"),
    quick=6,
)
def multihead_attention(trial: Trial) -> None:
    """One matrix for all displacements under a softmax is ``torch.nn.MultiheadAttention``, masks, causal order, keys
    and values of other widths included, and ``scaled_dot_product_attention``.
    """
    _values(trial, "attention")


@law(
    "MULTIHEAD-ATTENTION-GRADIENT",
    clauses=("E4", "R1", "M1", "O2", "B1"),
    kills=("query-detached", "mask-ignored-backward", "softmax-gradient-diagonal"),
)
def multihead_attention_gradient(trial: Trial) -> None:
    """The gradients of that operator are those of multi-head attention."""
    _gradients(trial, "attention")


@law(
    "MULTIHEAD-ATTENTION-WEIGHTS",
    clauses=("R1", "M1", "B5"),
    kills=("mask-inverted", "scale-missing", "weights-before-mask"),
    quick=8,
)
def multihead_attention_weights(trial: Trial) -> None:
    """Returned weights are those that ``torch.nn.MultiheadAttention`` returns, head by head."""
    case, _ = _case(trial, "attention with weights")
    if case.expected.attention is None:
        trial.draws.reject("the peer gives no weights here")
    question = _question(case).but(cotangent=None, return_weights=True)
    q, weights = question, trial.run(question).weights
    peer = budget(q.operator, q.params, q.x, q.y, q.mask, None, case.peer.arithmetic)
    bound = trial.budget(question).weights_bound + peer.weights_bound
    trial.within(f"weights, {case.note}", weights, case.expected.attention, bound)


@law(
    "RELATIVE-ENCODINGS",
    clauses=("L3", "L7", "E5", "E6", "E7", "E8", "E9", "E10", "R4", "R5"),
    kills=(
        "value-mirrored",
        "query-mirrored",
        "key-mirrored",
        "query-centre-only",
        "rotary-axes-swapped",
        "gate-swapped",
    ),
    quick=6,
)
def relative_encodings(trial: Trial) -> None:
    """Encodings of relative positions are those of their papers, written out pair by pair: Translution and
    alpha-Translution, rotations on a grid, Shaw's vectors, logits of rows and columns, gated positions.
    """
    _values(trial, "encodings")


@law(
    "RELATIVE-ENCODINGS-GRADIENT",
    clauses=("L3", "E5", "E6", "E7", "E10", "R4", "B1"),
    kills=("key-gradient-unscaled", "self-gradient-one-side", "bias-gradient-missing", "gate-gradient-missing"),
    quick=6,
)
def relative_encodings_gradient(trial: Trial) -> None:
    """The gradients of these operators are those of the formulas."""
    _gradients(trial, "encodings")


@law(
    "EQUAL-TABLES",
    clauses=("E5", "L3", "L6", "R1", "R2"),
    kills=("rows-descending", "role-bias-missing", "ones-normalised"),
)
def equal_tables(trial: Trial) -> None:
    """Translution with the same matrix for every displacement is multi-head attention, with weights of 1 a convolution
    over the whole grid.
    """
    _values(trial, "alike")
