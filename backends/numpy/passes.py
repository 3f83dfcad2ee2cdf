"""One call: arrays in position-major layout [tokens, B, ..], the forward pass, and the vector-Jacobian product."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from translution.algorithms import Request
from translution.backends.numpy.blocks import Array, Groups
from translution.backends.numpy.encode import RoleEncoder
from translution.backends.numpy.masks import link_mask, seen_tokens
from translution.backends.numpy.output import OutputProjection
from translution.backends.numpy.pairwise import Pairwise
from translution.backends.numpy.relevance import RelevanceWeights
from translution.backends.numpy.stream import Stream
from translution.geometry import Geometry, geometry
from translution.inputs import Inputs
from translution.registry import Gradients


class Call:
    """One operator on one set of inputs; halves are computed in float32 (clause D2). Use once."""

    def __init__(
        self, request: Request, algorithm: type[Stream] | type[Pairwise], params: Mapping[str, Array], inputs: Inputs
    ) -> None:
        self._given = inputs.x.dtype
        double = self._given == np.float64
        self._dtype: np.dtype[np.floating[Any]] = np.dtype(np.float64) if double else np.dtype(np.float32)
        self._form = request.normal_form
        self._geometry = geometry(request.operator.layout)
        self._params = {name: np.asarray(value, dtype=self._dtype) for name, value in params.items()}
        self._mask = link_mask(self._geometry, inputs.mask, self._dtype)
        tokens = {"query": self._tokens(inputs.x, "query"), "key": self._tokens(inputs.y, "key")}
        self._encoders = {
            role.name: RoleEncoder(
                role,
                self._params,
                tokens["query" if role.name == "query" else "key"],
                self._geometry,
                defer=algorithm.defers and role.name == "value",
            )
            for role in self._form.roles
        }
        self._sizes = {"query": inputs.x.shape, "key": inputs.y.shape}
        self._algorithm = algorithm(self._geometry, self._encoders, self._mask.live)
        self._relevance = RelevanceWeights(
            self._form,
            self._geometry,
            self._params,
            self._mask,
            self._algorithm.segments,
            inputs.x.shape[0],
            self._dtype,
        )

    def _tokens(self, tokens: Array, side: str) -> Array:
        """Position-major, the zero token last, and 0 where no live link leads (clause M4).

        Every product below would leave such a token out by itself; finite ones keep to the fast path of ``matrix_vjp``.
        """
        found = tokens.transpose(1, 0, 2).astype(self._dtype)
        if side == "key" and self._geometry.has_zero_token:
            found = np.concatenate([found, np.zeros((1, *found.shape[1:]), self._dtype)])
        seen = seen_tokens(self._geometry, self._mask.live, side)
        return np.ascontiguousarray(found if seen.all() else np.where(seen[..., None], found, 0))

    def forward(self) -> tuple[Array, Array]:
        """out [Nq, B, F] and the weights of the links [L, B, H]."""
        content = None if self._form.query is None else self._algorithm.contents()
        weights = self._relevance.weights(content)
        heads = self._algorithm.aggregate(weights)
        self._output = OutputProjection(self._form, self._params, heads, self._geometry)
        return self._output.result, weights

    def returned(self, out: Array) -> Array:
        """[tokens, B, ..] as [B, tokens, ..] in the dtype of x."""
        return np.ascontiguousarray(out.swapaxes(0, 1).astype(self._given))

    def dense_weights(self, weights: Array) -> Array:
        """Weights [B, H, Nq, Nk]: those of a pair's links added up, without the zero token."""
        return _dense(self._geometry, weights).transpose(2, 3, 0, 1).astype(self._given)

    def vjp(self, cotangent: Array) -> tuple[Array, Gradients]:
        """out [B, Nq, F] and every gradient of <cotangent, out>."""
        out, weights = self.forward()
        pull = cotangent.swapaxes(0, 1).astype(self._dtype)
        heads = self._output.vjp(pull)
        gradients = dict(self._output.gradients)
        content = self._relevance.vjp(self._algorithm.aggregate_vjp(weights, heads))
        if self._form.query is not None:
            self._algorithm.contents_vjp(content)
        tokens = {side: np.zeros((shape[1], shape[0], shape[2]), self._dtype) for side, shape in self._sizes.items()}
        for name, encoder in self._encoders.items():
            total = tokens["query" if name == "query" else "key"]
            total += encoder.token_gradient()[: len(total)]
            gradients |= encoder.gradients
        gradients |= self._relevance.gradients
        every = {name: gradients[name].astype(self._given) for name in self._params}
        return self.returned(out), Gradients(every, self.returned(tokens["query"]), self.returned(tokens["key"]))


def _dense(layout: Geometry, weights: Array) -> Array:
    """Link weights [L, B, H] added up by pair, [Nq, Nk, B, H]."""
    real = layout.key_index < layout.num_keys
    dense = np.zeros((layout.num_queries * layout.num_keys, *weights.shape[1:]), weights.dtype)
    pair = layout.query_index[real] * layout.num_keys + layout.key_index[real]
    Groups.of(pair).add_to(dense, weights[real])
    return dense.reshape(layout.num_queries, layout.num_keys, *weights.shape[1:])
