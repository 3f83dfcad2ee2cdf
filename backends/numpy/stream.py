"""Block by block: nothing of size links x features, only logits [L, B, H]; the gradient encodes every block again."""

from collections.abc import Iterator

import numpy as np

from translution.backends.numpy.blocks import Array, Block, blocks_of
from translution.backends.numpy.encode import RoleEncoder
from translution.backends.numpy.masks import kept
from translution.backends.numpy.products import matrix_vjp
from translution.backends.numpy.relevance import SortedSegments
from translution.geometry import Geometry
from translution.normal_form import Linear


class Stream:
    """One call.

    Value terms that end with a matrix for all classes (clause E6) are summed up in their inner width, [Nq, B, H, S],
    and meet that matrix once per query.
    """

    defers = True

    def __init__(self, geometry: Geometry, encoders: dict[str, RoleEncoder], live: Array | None) -> None:
        self._geometry, self._encoders, self._live = geometry, encoders, live
        self._value = encoders["value"]
        self._sums: dict[Linear, Array] = {}
        self.segments = SortedSegments(geometry)

    def _blocks(self) -> Iterator[tuple[Block, Array | None]]:
        for block in blocks_of(self._geometry):
            yield block, None if self._live is None else self._live[block.links]

    def contents(self) -> Array:
        """Inner products of queries and keys, [L, B, H]."""
        query, key = self._encoders["query"], self._encoders["key"]
        batch, heads = query.tokens.shape[1], query.role.num_heads
        content = np.empty((self._geometry.num_links, batch, heads), query.tokens.dtype)
        for block, _ in self._blocks():
            np.einsum("pbhd,pbhd->pbh", query.links(block), key.links(block), out=content[block.links])
        return content

    def contents_vjp(self, cotangent: Array) -> None:
        """Take in the cotangent of :meth:`contents`."""
        query, key = self._encoders["query"], self._encoders["key"]
        for block, live in self._blocks():
            pull = cotangent[block.links][..., None]
            queries, keys = query.links(block), key.links(block)
            query.links_vjp(block, kept(live, pull * keys))
            key.links_vjp(block, kept(live, pull * queries))

    def aggregate(self, weights: Array) -> Array:
        """Weighted sums of the values, [Nq, B, H, D]."""
        value, queries = self._value, self._geometry.num_queries
        batch, heads = weights.shape[1:]
        total = np.zeros((queries, batch, heads, value.role.head_dim), weights.dtype)
        for term in value.deferred:
            width = value.params[term.after].shape[0] if term.after is not None else 0
            self._sums[term] = np.zeros((queries, batch, heads, width), weights.dtype)
        for block, live in self._blocks():
            share = weights[block.links][..., None]
            values = value.kept_links(block)
            if values is not None:
                block.query.add_to(total, kept(live, share * values))
            for term, sums in self._sums.items():
                block.query.add_to(sums, kept(live, share * value.inner(term, block)[:, :, None, :]))
        for term, sums in self._sums.items():
            total[..., term.start : term.start + term.width] += self._by_head(sums, self._after(term))
        return total

    def aggregate_vjp(self, weights: Array, cotangent: Array) -> Array:
        """Take in the cotangent [Nq, B, H, D] of :meth:`aggregate`; the gradient of the weights, [L, B, H]."""
        value = self._value
        pulled: dict[Linear, Array] = {}
        for term, sums in self._sums.items():
            part, after = cotangent[..., term.start : term.start + term.width], self._after(term)
            pulled[term] = self._by_head(part, after.swapaxes(1, 2))
            found = [matrix_vjp(sums[:, :, h], part[:, :, h], after.shape[1:]) for h in range(len(after))]
            assert term.after is not None
            value.gradients[term.after] += np.concatenate(found, axis=1)
        result = np.zeros(weights.shape, weights.dtype)
        for block, live in self._blocks():
            rows, share = block.query.rows, weights[block.links]
            values, here = value.kept_links(block), result[block.links]
            if values is not None:
                here += np.einsum("pbhd,pbhd->pbh", cotangent[rows], values)
                value.links_vjp(block, share[..., None] * cotangent[rows])
            for term, pull in pulled.items():
                here += np.einsum("pbhs,pbs->pbh", pull[rows], value.inner(term, block))
                value.inner_vjp(term, block, np.einsum("pbhs,pbh->pbs", pull[rows], share))
            result[block.links] = kept(live, here)
        return result

    def _after(self, term: Linear) -> Array:
        """The last matrix of a deferred term, head by head: [H, S, width]."""
        assert term.after is not None
        matrix = self._value.params[term.after]
        return matrix.reshape(len(matrix), self._value.role.num_heads, term.width).swapaxes(0, 1)

    @staticmethod
    def _by_head(features: Array, matrices: Array) -> Array:
        """features [N, B, H, S] times [H, S, width]."""
        count, batch, heads, inner = features.shape
        found = features.reshape(count * batch, heads, inner).swapaxes(0, 1) @ matrices
        return found.swapaxes(0, 1).reshape(count, batch, heads, matrices.shape[2])
