"""What this backend claims, and every reason why it can't run a request (clause B1)."""

import math

import numpy as np
import torch

from translution.algorithms import Request
from translution.backends.triton.roles import relative_term
from translution.backends.triton.targets import INTERPRETED, MAX_OFFSET
from translution.normal_form import NormalForm, Role
from translution.spec import Lattice, Operator

NO_DEVICE = (
    "triton finds no GPU that torch can use: run on a machine with a CUDA or ROCm build of torch and its GPU, "
    "or set TRITON_INTERPRET=1 before Python starts to interpret the kernel on the CPU (slow)"
)


def unavailable() -> list[str]:
    """Nothing runs without a GPU or the interpreter."""
    if INTERPRETED or torch.cuda.is_available():
        return []
    return [NO_DEVICE]


def not_supported(request: Request, algorithm: str) -> list[str]:
    """Every reason; empty where the request runs."""
    reasons = [] if algorithm == "fused" else [f"triton has no algorithm {algorithm!r}"]
    if request.return_weights:
        reasons.append("fused: a running softmax never holds the weights, so it can't return them")
    if not INTERPRETED and request.device != "cuda":
        reasons.append(f"the tensors are on {request.device}; a compiled kernel reads GPU memory, move them to 'cuda'")
    layout = request.operator.layout
    form = request.normal_form
    if isinstance(layout, Lattice):
        reasons += _layout_reasons(layout, form)
    else:
        reasons.append("fused: a PairTable has no displacements to loop over")
    for role in form.roles:
        reasons += _role_reasons(role)
    reasons += _logit_reasons(form)
    return reasons + _size_reasons(request.operator)


def _layout_reasons(layout: Lattice, form: NormalForm) -> list[str]:
    reasons = []
    if layout.rank > 3:
        reasons.append(f"fused: tiles have at most 3 axes, the lattice has {layout.rank}")
    # A token of zeros adds nothing to a sum of linear values.
    adds_nothing = {branch.kind for branch in form.branches} == {"ones"} and not form.value.constants
    if layout.boundary != "absent" and not (layout.boundary == "zeros" and adds_nothing):
        reasons.append(
            f"fused: boundary {layout.boundary!r}; it needs 'absent', or 'zeros' under Ones without a value bias"
        )
    if layout.far is not None:
        reasons.append("fused: displacements share classes (far)")
    if max(layout.key_strides) > 1:
        reasons.append("fused: key_stride above 1, a displacement then has no key for most queries")
    elif any(len(set(np.diff(layout.axis_displacements(axis)))) > 1 for axis in range(layout.rank)):
        reasons.append("fused: the displacements of an axis are not evenly spaced")
    return reasons


def _role_reasons(role: Role) -> list[str]:
    reasons = []
    tables = [term for term in role.linears if term.table is not None]
    if len(tables) > 1:
        reasons.append(f"fused: {role.name} has {len(tables)} per-displacement terms, the kernel multiplies one")
    if any(term.groups > 1 for term in tables):
        reasons.append(f"fused: {role.name} has a per-displacement table in groups")
    if any(term.per_class for term in role.constants):
        reasons.append(f"fused: {role.name} has a vector per displacement")
    if role.name != "value" and any(term.after for term in tables):
        reasons.append(f"fused: {role.name} is low-rank with an up-projection, which only aggregated values take")
    slices = [(turn.start, turn.start + turn.width) for turn in role.rotations]
    if any(start < term.start + term.width and term.start < stop for term in tables for start, stop in slices):
        reasons.append(f"fused: {role.name} rotates a per-displacement term")
    return reasons


def _logit_reasons(form: NormalForm) -> list[str]:
    if form.query is None or form.key is None:
        return []
    query, key = relative_term(form.query), relative_term(form.key)
    if query and key and (query.start, query.width) != (key.start, key.width):
        return ["fused: the per-displacement terms of query and key are in different slices of a head"]
    return []


def _size_reasons(operator: Operator) -> list[str]:
    shapes = operator.parameters
    matrices = [math.prod(shape[1:]) for name, shape in shapes.items() if name.endswith("table")]
    tokens = max(operator.layout.num_queries, operator.layout.num_keys)
    widest = max(
        operator.dim,
        operator.keys_dim,
        operator.num_heads * operator.head_dim,
        operator.num_heads * operator.value_head_dim,
        *(operator.num_heads * shape[1] for name, shape in shapes.items() if name.endswith("table")),
    ) if shapes else operator.dim  # fmt: skip
    if max(matrices, default=0) > MAX_OFFSET or tokens * widest > MAX_OFFSET:
        return ["fused: one batch item or one matrix has more than 2^31 elements, offsets within a tile are 32 bits"]
    return []
