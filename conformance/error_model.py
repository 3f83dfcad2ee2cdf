"""How far a correct implementation may be from the exact result: a running error bound for every element.

The normal form is evaluated once in float64, forward and in reverse, on arrays that carry their bound
(:mod:`translution.conformance.rounding`). Whatever accumulates in at least float32 stays within the bound, in any
order of summation and with any association of its matrix products. Bounds of gradients come from the same rules.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from translution.conformance.encoder_bounds import EncoderBounds, Pullback
from translution.conformance.rounding import ARITHMETIC, Arithmetic, Bounded, Segments, concatenate, exact, zeros
from translution.geometry import geometry
from translution.inputs import Inputs, check_inputs
from translution.normal_form import BiasForm, Branch, Role, normal_form
from translution.spec import Operator

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Budget:
    """Results in float64 and their bounds, in the shapes of the results.

    ``gradients`` holds bounds and ``gradient_values`` values, by parameter name and for ``x`` and ``y``. ``y`` is the
    side of keys and values on its own; where no y was given, ``x`` holds the sum of both sides.
    """

    value: FloatArray
    out: FloatArray
    weights: FloatArray
    weights_bound: FloatArray
    gradients: dict[str, FloatArray] = field(default_factory=dict)
    gradient_values: dict[str, FloatArray] = field(default_factory=dict)


def budget(
    operator: Operator,
    params: Mapping[str, npt.ArrayLike],
    x: npt.ArrayLike,
    y: npt.ArrayLike | None = None,
    mask: npt.ArrayLike | None = None,
    cotangent: npt.ArrayLike | None = None,
    dtype: str = "float32",
) -> Budget:
    """The result and its bound for arithmetic in ``dtype``: float64, float32, tf32, float16 or bfloat16.

    Arrays have the shapes of :func:`translution.run` and values that ``dtype`` can hold; half formats are given as
    float32 or float64 arrays. With a ``cotangent``, shaped like the result, the gradients of <cotangent, out> are
    bounded too.
    """
    arithmetic = ARITHMETIC[dtype]
    tokens = np.asarray(x, np.float64)
    others = None if y is None else np.asarray(y, np.float64)
    own = {name: np.asarray(value, np.float64) for name, value in params.items()}
    allowed = None if mask is None else np.asarray(mask)
    if allowed is not None and allowed.dtype != np.bool_:
        allowed = allowed.astype(np.float64)
    inputs = check_inputs(operator, own, tokens, others, allowed, ("float64",))
    with np.errstate(invalid="ignore", over="ignore"):  # a live key may hold NaN or Inf
        evaluation = _Evaluation(operator, {name: exact(value) for name, value in own.items()}, inputs, arithmetic)
        out, weights = evaluation.out, evaluation.dense_weights()
        batch = inputs.batch_shape
        result = Budget(
            out.value.reshape(*batch, *out.shape[1:]),
            out.error.reshape(*batch, *out.shape[1:]),
            weights.value.reshape(*batch, *weights.shape[1:]),
            weights.error.reshape(*batch, *weights.shape[1:]),
        )
        if cotangent is None:
            return result
        gradients = evaluation.backward(exact(np.asarray(cotangent, np.float64).reshape(out.shape)))
        if y is None:
            gradients["x"] = arithmetic.add(gradients["x"], gradients["y"])
        shapes = {"x": tokens.shape, "y": tokens.shape if others is None else others.shape}
        for name, gradient in gradients.items():
            kept = arithmetic.stored(gradient)
            shape = shapes.get(name, gradient.shape)
            result.gradients[name], result.gradient_values[name] = kept.error.reshape(shape), kept.value.reshape(shape)
    return result


class _Evaluation:
    """One forward and one reverse pass; arrays of links are [B, L, ..], in the order of the geometry's steps."""

    def __init__(
        self, operator: Operator, params: Mapping[str, Bounded], inputs: Inputs, arithmetic: Arithmetic
    ) -> None:
        self.operator, self.params, self.arithmetic = operator, params, arithmetic
        self.form, self.links, self.batch = normal_form(operator), geometry(operator.layout), inputs.x.shape[0]
        self.rows = Segments(self.links.query_index, self.links.num_queries)
        self.columns = Segments(self.links.key_index, self.links.num_keys + 1)
        self.gradients = {name: zeros(*value.shape) for name, value in params.items()}
        self.encoders = EncoderBounds(arithmetic, self.links, params, self.gradients)
        self.live, self.added = self._mask(inputs.mask)
        # An absent key or a query without keys reaches nothing, whatever it holds (clause M4).
        seen = self.live.any(axis=2, keepdims=True)
        padded = np.concatenate([inputs.y, np.zeros((self.batch, 1, inputs.y.shape[2]))], axis=1)
        x = exact(np.where(seen, inputs.x[:, self.links.query_index], 0))
        y = exact(np.where(seen, padded[:, self.links.key_index], 0))
        if self.form.query is not None and self.form.key is not None:
            self.query, self.pull_query = self._features(self.form.query, x)
            self.key, self.pull_key = self._features(self.form.key, y)
        self.value, self.pull_value = self._features(self.form.value, y)
        self.branch_weights = [self._weights(branch) for branch in self.form.branches]
        self.shares = self._shares()
        self.weights = self._mixed()
        self.out = self._forward()

    def _features(self, role: Role, tokens: Bounded) -> tuple[Bounded, Pullback]:
        features, pull = self.encoders.encode(role, tokens)
        return features.where(self.live[..., None]), pull

    def _mask(self, mask: npt.NDArray[np.generic] | None) -> tuple[npt.NDArray[np.bool_], FloatArray]:
        links, heads = self.links, self.operator.num_heads
        if mask is None:
            nothing = np.zeros((self.batch, links.num_links, heads))
            return nothing == 0, nothing
        number = np.where(mask, 0.0, -np.inf) if mask.dtype == np.bool_ else mask.astype(np.float64)
        wide = np.zeros((self.batch, heads, links.num_queries, links.num_keys + 1))  # the zero token is never masked
        wide[..., :-1] = number
        added = wide[:, :, links.query_index, links.key_index].transpose(0, 2, 1)
        live = added != -np.inf
        return live, np.where(live, added, 0)

    def _bias(self, bias: BiasForm) -> Bounded:
        links, calculate = self.links, self.arithmetic
        if bias.kind == "slopes":
            found = calculate.multiply(exact(-links.distances[links.value_class, None]), exact(np.array(bias.slopes)))
        else:
            assert bias.parameter is not None
            parameter = self.params[bias.parameter]
            if bias.kind == "table":
                found = parameter[:, links.value_class].moved(0, 1)
            else:
                features = exact(links.quadratic_features[links.value_class])
                found = calculate.contract("lf,hf->lh", features, parameter, features.shape[1])
        return found.reshape(1, *found.shape)

    def _weights(self, branch: Branch) -> Bounded:
        """Weights [B, L, H] of one branch, 0 on masked links."""
        calculate, live = self.arithmetic, self.live
        if branch.kind == "ones":
            return exact(live)
        if branch.kind == "mean":
            counts = self.rows.reduce(live.astype(np.float64))[:, self.links.query_index]
            mean = exact(np.where(live, 1 / np.maximum(counts, 1), 0))
            return calculate.stored(calculate.scale(mean, 1.0))
        logits = calculate.add(zeros(*live.shape), exact(self.added))
        if branch.content:
            content = calculate.contract("blhd,blhd->blh", self.query, self.key, self.operator.head_dim)
            logits = calculate.add(logits, calculate.scale(content, branch.scale))
        if branch.bias is not None:
            logits = calculate.add(logits, self._bias(branch.bias))
        return calculate.softmax(calculate.stored(logits), live, self.rows)

    def _shares(self) -> list[Bounded]:
        """Factor [H] of each branch: 1, or 1 - g and g with g = sigmoid(gate)."""
        if self.form.gate is None:
            return [exact(np.ones(self.operator.num_heads))]
        unsure = 8 * self.arithmetic.unit
        gate = self.params[self.form.gate].value
        # 1 - g may be a difference, so its error is absolute.
        return [Bounded(g, np.ones_like(g), np.full_like(g, unsure)) for g in (_sigmoid(-gate), _sigmoid(gate))]

    def _mixed(self) -> Bounded:
        if self.form.gate is None:
            return self.branch_weights[0]
        calculate = self.arithmetic
        first, second = (
            calculate.multiply(w, share) for w, share in zip(self.branch_weights, self.shares, strict=True)
        )
        return calculate.stored(calculate.add(first, second))

    def _forward(self) -> Bounded:
        calculate = self.arithmetic
        weighted = calculate.multiply(self.weights[..., None], self.value)
        heads = calculate.stored(calculate.gather_sum(weighted, self.rows))
        if self.operator.output_scale != 1:
            heads = calculate.scale(heads, self.operator.output_scale)
        joined = self._joined(heads)
        if self.form.output is None:
            return calculate.stored(joined)
        features, self.pull_output = self.encoders.encode(self.form.output, joined)
        return calculate.stored(features[:, :, 0])

    def _joined(self, heads: Bounded) -> Bounded:
        """Heads [B, Nq, H, D] side by side, their low-rank parts brought up (clause O4)."""
        tokens = heads.shape[:2]
        uplift = self.form.uplift
        if uplift is None:
            return heads.reshape(*tokens, math.prod(heads.shape[2:]))
        full, low = heads[..., : -uplift.width], heads[..., -uplift.width :]
        up, self.pull_up = self.encoders.product(uplift.name, None, low.reshape(*tokens, math.prod(low.shape[2:])))
        return self.arithmetic.stored(self.arithmetic.add(full.reshape(*up.shape), up))

    def _parted(self, cotangent: Bounded) -> Bounded:
        """The transpose of :meth:`_joined`."""
        shape = (self.batch, self.links.num_queries, self.operator.num_heads, self.operator.value_head_dim)
        uplift = self.form.uplift
        if uplift is None:
            return cotangent.reshape(*shape)
        low = self.pull_up(cotangent).reshape(*shape[:3], uplift.width)
        return concatenate([cotangent.reshape(*shape[:3], shape[3] - uplift.width), low], 3)

    def dense_weights(self) -> Bounded:
        """Weights [B, H, Nq, Nk]: a pair's links add up, the zero token's are dropped."""
        links = self.links
        pairs = Segments(
            links.query_index * (links.num_keys + 1) + links.key_index, links.num_queries * (links.num_keys + 1)
        )
        dense = self.arithmetic.gather_sum(self.weights, pairs)
        dense = dense.reshape(self.batch, links.num_queries, links.num_keys + 1, self.operator.num_heads)
        return self.arithmetic.stored(dense[:, :, :-1].moved(3, 1))

    def backward(self, cotangent: Bounded) -> dict[str, Bounded]:
        """Gradients of <cotangent, out> by parameter name and for x and y."""
        calculate, links = self.arithmetic, self.links
        if self.form.output is not None:
            cotangent = self.pull_output(cotangent.reshape(*cotangent.shape[:2], 1, cotangent.shape[2]))
        by_head = self._parted(cotangent)
        if self.operator.output_scale != 1:
            by_head = calculate.scale(by_head, self.operator.output_scale)
        own = by_head[:, links.query_index].where(self.live[..., None])
        y = self.pull_value(calculate.stored(calculate.multiply(self.weights[..., None], own)))
        weight_gradient = calculate.stored(
            calculate.contract("blhd,blhd->blh", own, self.value, self.operator.value_head_dim)
        )
        if self.form.gate is not None:
            self._gate_gradient(self.form.gate, weight_gradient)
        content = self._content_gradient(weight_gradient)
        x = zeros(self.batch, links.num_links, self.operator.dim)
        if content is not None:
            kept = content[..., None]
            x = self.pull_query(calculate.stored(calculate.multiply(kept, self.key)))
            y = calculate.add(y, self.pull_key(calculate.stored(calculate.multiply(kept, self.query))))
        self.gradients["x"] = calculate.gather_sum(x, self.rows)
        self.gradients["y"] = calculate.gather_sum(y, self.columns)[:, :-1]
        return self.gradients

    def _gate_gradient(self, name: str, weight_gradient: Bounded) -> None:
        calculate = self.arithmetic
        first, second = self.branch_weights
        moved = calculate.total(calculate.multiply(calculate.add(second, -first), weight_gradient), (0, 1))
        self.encoders.collect(name, calculate.multiply(calculate.multiply(moved, self.shares[0]), self.shares[1]))

    def _content_gradient(self, weight_gradient: Bounded) -> Bounded | None:
        """Gradient of the inner products [B, L, H]; gradients of the biases are collected on the way."""
        calculate, links = self.arithmetic, self.links
        content: Bounded | None = None
        for branch, weights, share in zip(self.form.branches, self.branch_weights, self.shares, strict=True):
            if branch.kind != "softmax":
                continue
            own = calculate.multiply(weight_gradient, share) if self.form.gate is not None else weight_gradient
            rows = calculate.gather_sum(calculate.multiply(weights, own), self.rows)
            # The row's sum may come from a stored result, <cotangent, out>: its parts are as large as the magnitude.
            rows = Bounded(rows.value, rows.magnitude, rows.error + calculate.storage * rows.magnitude, rows.depth)
            logits = calculate.stored(calculate.multiply(weights, calculate.add(own, -rows[:, links.query_index])))
            if branch.bias is not None and branch.bias.parameter is not None:
                self._bias_gradient(branch.bias, logits)
            if branch.content:
                scaled = calculate.scale(logits, branch.scale)
                content = scaled if content is None else calculate.add(content, scaled)
        return content

    def _bias_gradient(self, bias: BiasForm, logits: Bounded) -> None:
        calculate, links = self.arithmetic, self.links
        assert bias.parameter is not None
        if bias.kind == "table":
            classes = Segments(links.value_class, links.num_classes)
            found = calculate.total(calculate.gather_sum(logits, classes), (0,)).moved(0, 1)
        else:
            features = exact(links.quadratic_features[links.value_class])
            found = calculate.contract("blh,lf->hf", logits, features, self.batch * links.num_links)
        self.encoders.collect(bias.parameter, found)


def _sigmoid(gate: FloatArray) -> FloatArray:
    return np.exp(-np.logaddexp(0, -gate))
