"""All links at once: queries, keys and values of every link, [L, B, H, D], and sums over [Nq, slots, ..]."""

import numpy as np

from translution.backends.numpy.blocks import Array, blocks_of
from translution.backends.numpy.encode import RoleEncoder
from translution.backends.numpy.masks import kept
from translution.backends.numpy.relevance import DenseSegments
from translution.geometry import Geometry


class Pairwise:
    """One call."""

    defers = False

    def __init__(self, geometry: Geometry, encoders: dict[str, RoleEncoder], live: Array | None) -> None:
        self._geometry, self._encoders, self._live = geometry, encoders, live
        self._links = {name: self._encoded(encoder) for name, encoder in encoders.items()}
        self.segments = DenseSegments(geometry)

    def _encoded(self, encoder: RoleEncoder) -> Array:
        _, batch, _ = encoder.tokens.shape
        features = (encoder.role.num_heads, encoder.role.head_dim)
        result = np.empty((self._geometry.num_links, batch, *features), encoder.tokens.dtype)
        for block in blocks_of(self._geometry):
            result[block.links] = encoder.links(block)
        return result

    def _take_in(self, role: str, cotangent: Array) -> None:
        for block in blocks_of(self._geometry):
            self._encoders[role].links_vjp(block, cotangent[block.links])

    def contents(self) -> Array:
        """Inner products of queries and keys, [L, B, H]."""
        return np.asarray(np.einsum("lbhd,lbhd->lbh", self._links["query"], self._links["key"]))

    def contents_vjp(self, cotangent: Array) -> None:
        """Take in the cotangent of :meth:`contents`."""
        self._take_in("query", kept(self._live, cotangent[..., None] * self._links["key"]))
        self._take_in("key", kept(self._live, cotangent[..., None] * self._links["query"]))

    def aggregate(self, weights: Array) -> Array:
        """Weighted sums of the values, [Nq, B, H, D]."""
        return self.segments.total(kept(self._live, weights[..., None] * self._links["value"]))

    def aggregate_vjp(self, weights: Array, cotangent: Array) -> Array:
        """Take in the cotangent [Nq, B, H, D] of :meth:`aggregate`; the gradient of the weights, [L, B, H]."""
        by_link = cotangent[self._geometry.query_index]
        self._take_in("value", weights[..., None] * by_link)
        return kept(self._live, np.einsum("lbhd,lbhd->lbh", by_link, self._links["value"]))
