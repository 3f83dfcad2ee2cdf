"""The algorithms by name, when each applies, and what each costs, from the normal form alone (clause B3).

definition  the formula as loops over pairs
pairwise    encodes every pair, then one softmax over the pairs of a query: O(links x features) memory
stream      one matrix product per displacement, nothing of size links x features
compiled    the same in kernels that are compiled for the CPU at hand, from tokens to results block by block
conv        the native convolution, for operators that are one
sdpa        the native scaled_dot_product_attention, for operators that are one
fused       one kernel per block of queries and head, running softmax
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from translution.errors import InputError, UnknownName
from translution.geometry import count_links, geometry
from translution.normal_form import Linear, NormalForm, Role, normal_form
from translution.spec import Lattice, Operator

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex128": 16}
ALGORITHMS = ("definition", "pairwise", "stream", "compiled", "conv", "sdpa", "fused")


@dataclass(frozen=True, slots=True)
class Request:
    """One call, as far as the choice of a backend and an algorithm depends on it."""

    operator: Operator
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    mask: str = "none"
    return_weights: bool = False
    gradient: bool = False

    def __post_init__(self) -> None:
        if self.batch < 0 or self.dtype not in ITEM_BYTES:
            raise InputError(
                "D1",
                f"batch={self.batch}, dtype={self.dtype!r}",
                f"batch is at least 0, dtype one of {', '.join(ITEM_BYTES)}",
                "Name the dtype in full, such as float32",
            )

    @property
    def normal_form(self) -> NormalForm:
        """The operator's normal form."""
        return normal_form(self.operator)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call costs; with ``Request.gradient`` forward and backward together.

    ``flops``: of its matrix products. ``working_bytes``: at most at any time, beyond tokens and parameters; gradients
    of the parameters are part of it. ``parameter_bytes``. ``traffic_bytes``: what all operations read and write, None
    where that is not known. ``counted``: whether the backend's own operations were counted, or this is an estimate.
    ``saved_bytes``: of the working memory, what is kept from forward to backward, the result included; None where that
    is not known.
    """

    flops: int
    working_bytes: int
    parameter_bytes: int
    traffic_bytes: int | None = None
    counted: bool = False
    saved_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        """Parameters and working memory."""
        return self.parameter_bytes + self.working_bytes


def why_not(request: Request, algorithm: str) -> list[str]:
    """Reasons why ``algorithm`` can't compute this request, whatever the backend; empty where it can."""
    if algorithm == "conv":
        return _why_not_convolution(request)
    if algorithm == "sdpa":
        return _why_not_attention(request)
    return []


def _why_not_convolution(request: Request) -> list[str]:
    form, layout = request.normal_form, request.operator.layout
    reasons = []
    if not isinstance(layout, Lattice) or layout.kernel_size is None:
        return ["conv: the layout has no window (kernel_size)"]
    if layout.registers:
        reasons.append("conv: the layout has registers")
    if layout.far is not None:
        reasons.append("conv: displacements share classes (far)")
    if layout.boundary == "shift":
        reasons.append("conv: a shifted window is not a convolution")
    if layout.rank > 3:
        reasons.append(f"conv: native convolutions have at most 3 axes, the lattice has {layout.rank}")
    if layout.num_classes != math.prod(layout.window):
        reasons.append("conv: the causal order cuts the window")
    if any(layout.offsets):
        reasons.append("conv: the query grid has an offset")
    if max(layout.key_strides) > 1 and max(layout.strides) > 1:
        reasons.append("conv: query stride and key stride together")
    if [branch.kind for branch in form.branches] != ["ones"]:
        reasons.append("conv: the relevance is not Ones")
    term = form.value.linears[0] if form.value.linears else None
    if len(form.value.linears) != 1 or form.value.constants or term != _plain_table(term):
        reasons.append("conv: the value encoder is not a single PerDisplacement without bias")
    if request.mask != "none":
        reasons.append("conv: a mask is given")
    if request.return_weights:
        reasons.append("conv: native convolutions return no weights")
    return reasons


def _plain_table(term: Linear | None) -> Linear | None:
    if term is None:
        return None
    return Linear(None, "value.table", None, term.groups, 0, term.width)


def _why_not_attention(request: Request) -> list[str]:
    form, layout = request.normal_form, request.operator.layout
    reasons = []
    if len(form.branches) != 1 or form.branches[0].kind != "softmax" or not form.branches[0].content:
        reasons.append("sdpa: the relevance is not one Softmax over content")
    if form.relative_roles:
        reasons.append(f"sdpa: {', '.join(form.relative_roles)} differ between displacements")
    if isinstance(layout, Lattice) and layout.boundary in ("zeros", "reflect", "replicate"):
        reasons.append(f"sdpa: boundary {layout.boundary!r} links a query to padded keys")
    elif isinstance(layout, Lattice) and layout.boundary == "circular" and geometry(layout).repeats_pairs:
        reasons.append("sdpa: some key appears twice in a window")
    if request.return_weights:
        reasons.append("sdpa: scaled_dot_product_attention returns no weights")
    return reasons


def _linear_flops(role: Role, shapes: dict[str, tuple[int, ...]], links: int, tokens: int) -> int:
    total = 0
    for term in role.linears:
        for name, rows in ((term.before, tokens), (term.table, links), (term.after, links)):
            if name is not None:
                shape = shapes[name][1:] if name == term.table else shapes[name]
                total += 2 * rows * math.prod(shape)
    return total


@lru_cache(maxsize=256)
def cost(request: Request, algorithm: str) -> Cost:
    """An estimate from the normal form alone, made at once. Halves are counted as computed: in float32 (clause D2)."""
    if algorithm not in ALGORITHMS:
        raise UnknownName("algorithm", algorithm, ALGORITHMS)
    operator, form = request.operator, request.normal_form
    layout, batch = operator.layout, request.batch
    links, shapes = count_links(layout), dict(operator.parameters)
    queries, keys, heads = layout.num_queries, layout.num_keys, operator.num_heads
    item = max(ITEM_BYTES[request.dtype], 4)
    tokens = {"query": queries, "key": keys, "value": keys}
    features = {role.name: role.num_heads * role.head_dim for role in form.roles}
    flops = sum(_linear_flops(role, shapes, links, tokens[role.name]) for role in form.roles)
    flops += 2 * links * sum(features.values())
    if form.output is not None:
        flops += _linear_flops(form.output, shapes, 0, queries)
    if form.uplift is not None:
        flops += 2 * queries * math.prod(shapes[form.uplift.name])
    encoded = sum(tokens[name] * width for name, width in features.items()) + queries * operator.out_features
    logits = 2 * heads * links
    working = {
        "definition": encoded + heads * queries * keys,
        "pairwise": encoded + logits + links * sum(features.values()),
        "stream": encoded + logits + queries * operator.dim + keys * operator.keys_dim,
        "compiled": encoded + queries * operator.dim + keys * operator.keys_dim,
        "conv": encoded + keys * operator.keys_dim,
        "sdpa": encoded,
        "fused": encoded,
    }[algorithm]
    parameters = operator.num_parameters
    if request.gradient:
        # Two products for every one of the forward pass, which stream computes again; gradients of all that is above.
        # fused computes features of a pair wherever it needs them: 13 products for 3. Between its kernels it keeps
        # weights and their gradients, and those of one side's tokens for every head.
        flops = flops * 16 // 3 if algorithm == "fused" else flops * (4 if algorithm == "stream" else 3)
        working *= 2
        if algorithm == "fused":
            working += logits + heads * max(queries * operator.dim, keys * operator.keys_dim)
    return Cost(
        flops=batch * flops,
        working_bytes=batch * working * item + 16 * links + (parameters * item if request.gradient else 0),
        parameter_bytes=parameters * ITEM_BYTES[request.dtype],
    )
