"""Initial values of an operator's parameters, from its normal form.

Ordinary attention whose projections are ``torch.nn.Linear`` sets the scale: with weights uniform within
``fan_in ** -0.5`` and tokens of unit variance (after a LayerNorm), an encoded feature has variance 1/3, and a logit
``head_dim ** -0.5 <q, k>`` has variance 1/9. Every operator starts there, whatever it is made of:

- the fan-in of a table is that of *one* of its matrices: a pair meets one row of it;
- a chain of n matrices (down, table, up) shares the gain, each ``v ** (1/n) / fan_in``;
- the variances of a sum add up, so each of n parts gets a share of 1/n;
- the operator's own scale, and heads of several parts, are made up for in queries and keys alike: alpha-Translution
  halves its logits, T5 has no scale at all;
- values make up for ``output_scale``, for a low-rank part that the output adds, and where weights are 1 (convolution)
  for the number of links of a query.

What says where a token is starts small beside what says what it is: vectors per class and bias tables have standard
deviation 0.02 (vectors that stand alone are features like any other). Plain biases are zero. Positional attention
without content starts as in ConViT (d'Ascoli et al. 2021, section 3): every head looks at a neighbour of its own, and
the gate gives sigmoid(1) to position.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from translution.geometry import count_links
from translution.normal_form import Branch, Linear, NormalForm, Role, normal_form
from translution.spec import Operator

# Of a feature that torch.nn.Linear makes of a token of unit variance, and of a logit of two such features.
FEATURE_VARIANCE = 1 / 3
LOGIT_VARIANCE = FEATURE_VARIANCE**2
POSITION_DEVIATION = 0.02
CONVIT_GATE = 1.0


@dataclass(frozen=True, slots=True)
class Uniform:
    """Uniform with mean 0 and this variance."""

    variance: float

    def fill(self, parameter: Tensor) -> None:
        """Draw every entry."""
        bound = math.sqrt(3 * self.variance)
        nn.init.uniform_(parameter, -bound, bound)


@dataclass(frozen=True, slots=True)
class Normal:
    """Normal with mean 0 and this standard deviation; a constant 0 where it is 0."""

    deviation: float

    def fill(self, parameter: Tensor) -> None:
        """Draw every entry."""
        if self.deviation:
            nn.init.normal_(parameter, std=self.deviation)
        else:
            nn.init.zeros_(parameter)


@dataclass(frozen=True, slots=True)
class Values:
    """The same for every entry, or one row of numbers per head."""

    rows: float | tuple[tuple[float, ...], ...]

    def fill(self, parameter: Tensor) -> None:
        """Copy them."""
        with torch.no_grad():
            parameter.copy_(torch.tensor(self.rows, dtype=torch.float64).to(parameter).expand_as(parameter))


Start = Uniform | Normal | Values


def initial_values(operator: Operator) -> Mapping[str, Start]:
    """How every parameter of the operator starts, by name."""
    form, found = normal_form(operator), dict[str, Start]()
    query_gain, key_gain = _logit_gains(form)
    for role, variance in (
        (form.query, FEATURE_VARIANCE * query_gain),
        (form.key, FEATURE_VARIANCE * key_gain),
        (form.value, FEATURE_VARIANCE * _value_gain(form)),
        (form.output, FEATURE_VARIANCE),
    ):
        if role is not None:
            found.update(_role(role, variance, operator.parameters))
    if form.uplift is not None:
        found[form.uplift.name] = Uniform(1 / operator.parameters[form.uplift.name][0])
    for branch in form.branches:
        if branch.bias is not None and branch.bias.parameter is not None:
            found[branch.bias.parameter] = _position(branch, operator.num_heads, operator.parameters)
    if form.gate is not None:
        first, second = form.branches
        is_convit = first.content and second.kind == "softmax" and not second.content
        found[form.gate] = Values(CONVIT_GATE if is_convit else 0.0)
    return found


def _chain(linear: Linear) -> list[str]:
    return [name for name in (linear.before, linear.table, linear.after) if name is not None]


def _role(role: Role, variance: float, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Start]:
    """Every encoded feature gets ``variance`` from a token of unit variance."""
    found = dict[str, Start]()
    for linear in role.linears:
        names = _chain(linear)
        parts = sum(1 for other in role.linears if other.start == linear.start and _chain(other))
        for name in names:
            found[name] = Uniform((variance / parts) ** (1 / len(names)) / shapes[name][-2])
    for constant in role.constants:
        beside_tokens = any(linear.start == constant.start for linear in role.linears)
        if not constant.per_class:
            found[constant.name] = Values(0.0)
        elif beside_tokens:
            found[constant.name] = Normal(POSITION_DEVIATION)
        else:
            alone = sum(1 for other in role.constants if other.per_class and other.start == constant.start)
            found[constant.name] = Uniform(variance / alone)
    return found


def _is_fixed(role: Role) -> bool:
    """Whether a part of the role is the token itself, which no initial value scales."""
    return any(not _chain(linear) for linear in role.linears)


def _logit_gains(form: NormalForm) -> tuple[float, float]:
    """Factors of the variances of queries and keys that bring logits to ``LOGIT_VARIANCE``."""
    scale = max((abs(branch.scale) for branch in form.branches if branch.content), default=0.0)
    if form.query is None or form.key is None or scale == 0:
        return 1.0, 1.0
    query, key = (1.0 if _is_fixed(role) else FEATURE_VARIANCE for role in (form.query, form.key))
    gain = LOGIT_VARIANCE / (scale**2 * form.query.head_dim * query * key)
    match _is_fixed(form.query), _is_fixed(form.key):
        case (False, False):
            return math.sqrt(gain), math.sqrt(gain)
        case (False, True):
            return gain, 1.0
        case (True, False):
            return 1.0, gain
        case _:
            return 1.0, 1.0


def _value_gain(form: NormalForm) -> float:
    """Factor of the variance of values that brings what is weighted and added up to ordinary attention's."""
    operator = form.operator
    added = operator.output_scale**2 * (1 if form.uplift is None else 2)
    if any(branch.kind == "ones" for branch in form.branches):
        added *= max(1.0, count_links(operator.layout) / operator.layout.num_queries)
    return 1 / added if added else 1.0


def _position(branch: Branch, num_heads: int, shapes: Mapping[str, tuple[int, ...]]) -> Start:
    assert branch.bias is not None
    assert branch.bias.parameter is not None
    if branch.bias.kind == "table":
        return Normal(POSITION_DEVIATION)
    if branch.content:
        return Values(0.0)
    # -|d - D|^2 up to a constant, with d = key minus query; the heads' centres D fill the smallest cube that holds all.
    rank = shapes[branch.bias.parameter][1] - 1
    side = next(n for n in itertools.count(1) if n**rank >= num_heads)
    centres = itertools.islice(itertools.product(range(side), repeat=rank), num_heads)
    return Values(tuple((*(2 * (place - (side - 1) / 2) for place in centre), -1.0) for centre in centres))
