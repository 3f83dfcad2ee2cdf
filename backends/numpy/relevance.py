"""From inner products to weights, and back (clauses R1 to R7)."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from translution.backends.numpy.blocks import Array, Groups, query_groups
from translution.backends.numpy.masks import LinkMask
from translution.geometry import Geometry
from translution.normal_form import BiasForm, Branch, NormalForm


class Segments(Protocol):
    """Reductions over the links of each query. Values are [L, ..], results [Nq, ..]."""

    def maximum(self, values: Array) -> Array:
        """Largest value; -inf for a query without links."""
        ...

    def total(self, values: Array) -> Array:
        """Sum of the values; 0 for a query without links."""
        ...


class SortedSegments:
    """Links sorted by query, reduced stretch by stretch: nothing larger than the values."""

    def __init__(self, geometry: Geometry) -> None:
        self._groups, self._queries = query_groups(geometry), geometry.num_queries

    def maximum(self, values: Array) -> Array:
        """As :class:`Segments` says."""
        result = np.full((self._queries, *values.shape[1:]), -np.inf, values.dtype)
        self._groups.raise_to(result, values)
        return result

    def total(self, values: Array) -> Array:
        """As :class:`Segments` says."""
        result = np.zeros((self._queries, *values.shape[1:]), values.dtype)
        self._groups.add_to(result, values)
        return result


class DenseSegments:
    """Links laid out as [Nq, slots, ..] and reduced over the slots."""

    def __init__(self, geometry: Geometry) -> None:
        self._place = (geometry.query_index, geometry.slots)
        self._shape = (geometry.num_queries, int(geometry.slots.max(initial=-1)) + 1)

    def _dense(self, values: Array, fill: float) -> Array:
        dense = np.full((*self._shape, *values.shape[1:]), fill, values.dtype)
        dense[self._place] = values
        return dense

    def maximum(self, values: Array) -> Array:
        """As :class:`Segments` says."""
        return np.asarray(self._dense(values, -np.inf).max(axis=1, initial=-np.inf))

    def total(self, values: Array) -> Array:
        """As :class:`Segments` says."""
        return np.asarray(self._dense(values, 0.0).sum(axis=1))


class RelevanceWeights:
    """The relevance of one call. ``weights`` remembers what ``vjp`` needs."""

    def __init__(
        self,
        form: NormalForm,
        geometry: Geometry,
        params: Mapping[str, Array],
        mask: LinkMask,
        segments: Segments,
        batch: int,
        dtype: np.dtype[np.floating[Any]],
    ) -> None:
        self._form, self._geometry, self._params, self._mask = form, geometry, params, mask
        self._segments, self._dtype = segments, dtype
        self._shape = (geometry.num_links, batch, form.operator.num_heads)
        self._found: list[Array] = []
        names = {b.bias.parameter for b in form.branches if b.bias is not None} | {form.gate}
        self.gradients = {name: np.zeros_like(params[name]) for name in names if name is not None}

    def _gate(self) -> Array:
        assert self._form.gate is not None
        return np.asarray(1 / (1 + np.exp(-self._params[self._form.gate])))

    def weights(self, content: Array | None) -> Array:
        """Weights [L, B, H] from the inner products ``content`` [L, B, H]; 0 on links that are not live."""
        self._found = [self._branch(branch, content) for branch in self._form.branches]
        if len(self._found) == 1:
            return self._found[0]
        gate = self._gate()
        return np.asarray((1 - gate) * self._found[0] + gate * self._found[1])

    def _branch(self, branch: Branch, content: Array | None) -> Array:
        live = self._mask.live
        if branch.kind == "softmax":
            return self._softmax(self._logits(branch, content))
        present = np.empty(self._shape, self._dtype)
        present[:] = 1 if live is None else live
        return present if branch.kind == "ones" else self._shares(present)

    def _shares(self, values: Array) -> Array:
        total = self._segments.total(values)
        return values / self._spread(np.where(total == 0, 1, total))

    def _spread(self, by_query: Array) -> Array:
        return np.asarray(by_query[self._geometry.query_index])

    def _logits(self, branch: Branch, content: Array | None) -> Array:
        logits = np.zeros(self._shape, self._dtype)
        if branch.content and content is not None:
            logits += self._dtype.type(branch.scale) * content
        if branch.bias is not None:
            logits += self._bias_table(branch.bias).T[self._geometry.value_class][:, None, :]
        if self._mask.added is not None:
            logits += self._mask.added
        return logits

    def _softmax(self, logits: Array) -> Array:
        live = self._mask.live
        if live is not None:
            logits = np.where(live, logits, -np.inf)
        highest = self._segments.maximum(logits)
        highest = np.where(highest == -np.inf, 0, highest)
        powers = np.exp(logits - self._spread(highest))
        # A live NaN makes its row's maximum NaN; links that are not live stay out of it.
        shares = self._shares(powers if live is None else np.where(live, powers, 0))
        return shares if live is None else np.where(live, shares, 0)

    def _bias_table(self, bias: BiasForm) -> Array:
        """The bias [H, T]."""
        if bias.kind == "slopes":
            slopes = np.asarray(bias.slopes)
            return np.asarray(-slopes[:, None] * self._geometry.distances).astype(self._dtype)
        assert bias.parameter is not None
        parameter = self._params[bias.parameter]
        return (
            parameter if bias.kind == "table" else parameter @ self._geometry.quadratic_features.T.astype(self._dtype)
        )

    def vjp(self, cotangent: Array) -> Array:
        """Gradient [L, B, H] for ``content``, from the weights' cotangent, which is 0 on links that are not live."""
        content = np.zeros(self._shape, self._dtype)
        shares: tuple[Array | None, ...] = (None,)
        if self._form.gate is not None:
            gate = self._gate()
            difference = (cotangent * (self._found[1] - self._found[0])).sum(axis=(0, 1))
            self.gradients[self._form.gate] += gate * (1 - gate) * difference
            shares = (1 - gate, gate)
        for branch, weights, share in zip(self._form.branches, self._found, shares, strict=True):
            if branch.kind == "softmax":
                self._softmax_vjp(branch, weights, cotangent if share is None else share * cotangent, content)
        return content

    def _softmax_vjp(self, branch: Branch, weights: Array, cotangent: Array, content: Array) -> None:
        pull = weights * cotangent
        logits = pull - weights * self._spread(self._segments.total(pull))
        if self._mask.live is not None:
            logits = np.where(self._mask.live, logits, 0)
        if branch.content:
            content += self._dtype.type(branch.scale) * logits
        if branch.bias is not None and branch.bias.parameter is not None:
            table = np.zeros((self._geometry.num_classes, self._form.operator.num_heads), self._dtype)
            Groups.of(self._geometry.value_class).add_to(table, logits.sum(axis=1))
            if branch.bias.kind == "quadratic":
                self.gradients[branch.bias.parameter] += table.T @ self._geometry.quadratic_features.astype(self._dtype)
            else:
                self.gradients[branch.bias.parameter] += table.T
