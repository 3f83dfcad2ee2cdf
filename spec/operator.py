"""The operator: one immutable value that says everything about what is computed (clauses O1 to O4)."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from translution.spec.checks import MAX_FEATURES, MAX_PARAMETERS, is_finite, is_whole
from translution.spec.encoders import (
    ENCODERS,
    Context,
    Encoder,
    Identity,
    LowRankOutput,
    OutputEncoder,
    Rotary,
    Shape,
    Shared,
    check_head_width,
    rotary_angles,
    walk,
)
from translution.spec.errors import require
from translution.spec.layout import Lattice, Layout
from translution.spec.pair_table import PairTable
from translution.spec.relevance import RELEVANCES, BiasTable, Mixture, Relevance, SlopeBias, Softmax, branches


@dataclass(frozen=True, slots=True)
class Operator:
    """A Translution operator: x [.., Nq, Cq] and y [.., Nk, Ck] to out [.., Nq, F].

        q_ij = Q(x_i ; c(i,j))    k_ij = K(y_j ; c(j,i))    v_ij = V(y_j ; c(i,j))
        l_ij^h = scale <q_ij, k_ij>_h + bias^h[c(i,j)] + mask_ij
        a_ij^h = relevance(l_i^h) over the support of i
        out_i  = O(output_scale * concat_h sum_j a_ij^h v_ij^h)

    The paper (arXiv 2510.10060, section 3) writes f for x and y, W^q[delta] for the row c(i,j) of Q's table, C' for
    all heads' features; its key row W^k[-delta] is our c(j,i).

    Args:
        layout: positions, support and displacement classes.
        dim: channels Cq of the queries.
        num_heads: heads H; each encoder's features divide into H equal contiguous slices.
        value: the value encoder.
        query, key: encoders; both None where the relevance does not look at content.
        relevance: Softmax, Ones, Mean or a Mixture.
        output: Shared, Identity or LowRankOutput over the concatenated heads; None leaves them as they are.
        key_dim: channels Ck of keys and values; None for ``dim``.
        output_scale: factor of the concatenated heads, before the output encoder (1/2 in alpha-Translution).
    """

    layout: Layout
    dim: int
    num_heads: int
    value: Encoder
    query: Encoder | None = None
    key: Encoder | None = None
    relevance: Relevance = Softmax()
    output: OutputEncoder | None = None
    key_dim: int | None = None
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        require(
            isinstance(self.layout, (Lattice, PairTable)),
            "L1",
            f"layout={type(self.layout).__name__}",
            "layout is a Lattice or a PairTable",
            "Give Lattice(grid=(7, 7))",
        )
        for name, value in (("dim", self.dim), ("num_heads", self.num_heads), ("key_dim", self.keys_dim)):
            require(
                is_whole(value) and 1 <= value <= MAX_FEATURES,
                "O1",
                f"{name}={value!r}",
                f"{name} is a whole number from 1 to {MAX_FEATURES:,}",
                f"Give a positive {name}",
            )
        require(
            is_finite(self.output_scale),
            "O3",
            f"output_scale={self.output_scale!r}",
            "output_scale is a finite number",
            "Give output_scale=1.0",
        )
        object.__setattr__(self, "output_scale", float(self.output_scale))
        require(
            isinstance(self.relevance, RELEVANCES),
            "R1",
            f"relevance={self.relevance!r}",
            "relevance is Softmax, Ones, Mean or Mixture",
            "Give relevance=Softmax()",
        )
        self._check_encoders()
        self._check_relevance()
        count = self.num_parameters
        require(
            count <= MAX_PARAMETERS,
            "P1",
            f"{count:,} parameters ({count * 4 / 2**40:.1f} TiB in float32)",
            f"an operator has at most {MAX_PARAMETERS:,} parameters",
            "Use a window (kernel_size), far=Clip(...), or LowRank encoders",
        )

    def _check_encoders(self) -> None:
        for role, encoder in (("query", self.query), ("key", self.key), ("value", self.value)):
            require(
                isinstance(encoder, ENCODERS) or (encoder is None and role != "value"),
                "E1",
                f"{role}={encoder!r}",
                f"{role} is an encoder" + ("" if role == "value" else " or None"),
                f"Give {role}=Shared(features)",
            )
        require(
            self.output is None or isinstance(self.output, (Shared, Identity, LowRankOutput)),
            "O2",
            f"output={self.output!r}",
            "output is Shared, Identity, LowRankOutput or None: it sees one token, not a pair",
            "Give output=Shared(features, bias=True)",
        )
        if isinstance(self.output, LowRankOutput):
            low_rank, found = self.output.inner_features, self.output_context.input_features
            require(
                low_rank % self.num_heads == 0 and low_rank < found,
                "O4",
                f"inner_features={low_rank} with num_heads={self.num_heads} and {found} value features",
                "inner_features is a multiple of num_heads and less than the value features",
                "Give the features of the value's low-rank part, e.g. value=Concat((Shared(192), LowRank(24)))",
            )
        require(
            (self.query is not None) == self.uses_content and (self.key is not None) == self.uses_content,
            "R7",
            f"query={'given' if self.query else None}, key={'given' if self.key else None} with {self.relevance!r}",
            "queries and keys are given exactly where the relevance looks at content",
            "Add both encoders for Softmax(content=True), drop both otherwise",
        )
        require(
            not any(isinstance(e, Rotary) for e in walk(self.value)),
            "E10",
            "value holds Rotary",
            "only queries and keys are rotated",
            "Take Rotary off the value",
        )
        rotated = [
            (role, inner, context)
            for role, encoder, context in self._roles()
            if encoder is not None
            for inner in walk(encoder)
            if isinstance(inner, Rotary)
        ]
        for role, inner, context in rotated:
            require(
                isinstance(self.layout, Lattice),
                "E10",
                f"{role} holds Rotary on a {type(self.layout).__name__}",
                "a rotation needs lattice positions",
                "Use a Lattice, or a per-displacement encoder",
            )
            assert isinstance(self.layout, Lattice)
            rotary_angles(role, check_head_width(role, inner, context), self.layout.rank)
        for role, projection, context in self._roles():
            if projection is not None:
                check_head_width(role, projection, context)
        if self.query is not None and self.key is not None:
            q, k = self.head_dim, check_head_width("key", self.key, self.key_context)
            require(
                q == k,
                "E2",
                f"query heads have {q} features, key heads {k}",
                "queries and keys have the same head width",
                "Give both the same features",
            )

    def _check_relevance(self) -> None:
        for _, branch in branches(self.relevance):
            bias = branch.bias if isinstance(branch, Softmax) else None
            if bias is None:
                continue
            if isinstance(bias, SlopeBias):
                bias.slopes_for(self.num_heads)
            require(
                isinstance(bias, BiasTable) or (isinstance(self.layout, Lattice) and self.layout.far is None),
                "R5",
                f"{type(bias).__name__} on {type(self.layout).__name__} without exact displacements",
                "SlopeBias and QuadraticBias are functions of the displacement itself",
                "Use BiasTable, or a Lattice without far",
            )

    @property
    def keys_dim(self) -> int:
        """Channels of keys and values."""
        return self.dim if self.key_dim is None else self.key_dim

    @property
    def uses_content(self) -> bool:
        """Whether any part of the relevance takes the inner product of queries and keys."""
        return any(isinstance(b, Softmax) and b.content for _, b in branches(self.relevance))

    @property
    def query_context(self) -> Context:
        """What the query encoder is sized by."""
        return Context(self.dim, self.layout.num_classes, self.num_heads)

    @property
    def key_context(self) -> Context:
        """What the key and value encoders are sized by."""
        return Context(self.keys_dim, self.layout.num_classes, self.num_heads)

    @property
    def output_context(self) -> Context:
        """What the output encoder is sized by."""
        return Context(self.value.features_for(self.key_context), 1, 1)

    def _roles(self) -> Iterator[tuple[str, Encoder | LowRankOutput | None, Context]]:
        # The layout's classes are counted once: every operator that is built asks for its parameters.
        keys = self.key_context
        yield "query", self.query, Context(self.dim, keys.num_classes, self.num_heads)
        yield "key", self.key, keys
        yield "value", self.value, keys
        yield "output", self.output, Context(self.value.features_for(keys), 1, 1)

    @property
    def head_dim(self) -> int:
        """Features of one query head (0 where there are no queries)."""
        return 0 if self.query is None else self.query.features_for(self.query_context) // self.num_heads

    @property
    def value_head_dim(self) -> int:
        """Features of one value head."""
        return self.value.features_for(self.key_context) // self.num_heads

    @property
    def out_features(self) -> int:
        """Channels F of the result."""
        context = self.output_context
        return context.input_features if self.output is None else self.output.features_for(context)

    def scale_of(self, branch: Softmax) -> float:
        """The factor of the inner product (clause R6)."""
        return float(self.head_dim) ** -0.5 if branch.scale is None else branch.scale

    @property
    def parameters(self) -> Mapping[str, Shape]:
        """Every parameter's name and shape, the same on every backend and in every file (clause P1)."""
        shapes: dict[str, Shape] = {}
        for role, encoder, context in self._roles():
            if encoder is not None:
                shapes.update({f"{role}.{name}": shape for name, shape in encoder.parameters(context).items()})
        rank = self.layout.rank if isinstance(self.layout, Lattice) else 0
        for prefix, branch in branches(self.relevance):
            if isinstance(branch, Softmax) and branch.bias is not None:
                found = branch.bias.parameters(self.num_heads, self.layout.num_classes, rank)
                shapes.update({f"relevance.{prefix}{name}": shape for name, shape in found.items()})
        if isinstance(self.relevance, Mixture):
            shapes["relevance.gate"] = (self.num_heads,)
        return shapes

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters."""
        return sum(math.prod(shape) for shape in self.parameters.values())
