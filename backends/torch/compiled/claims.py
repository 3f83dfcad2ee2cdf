"""Every reason why kernels are not compiled for a request (clause B1)."""

from importlib.util import find_spec

import torch

from translution.algorithms import Request

NOT_INSTALLED = "compiled: llvmlite is not installed; pip install 'translution[compiled]'"


def why_not(request: Request) -> list[str]:
    """Reasons; empty where the request runs."""
    reasons = [] if find_spec("llvmlite") is not None else [NOT_INSTALLED]
    if not reasons and not _has_kernels():
        reasons.append("compiled: kernels are made for AVX2 with FMA, AVX-512 and 64-bit ARM; this processor has none")
    if request.device != "cpu":
        reasons.append(f"compiled: the tensors are on {request.device}, kernels are made for the CPU")
    if request.dtype != "float32":
        reasons.append(f"compiled: kernels compute in float32, not in {request.dtype}")
    if request.mask != "none":
        reasons.append("compiled: a mask is given")
    if request.return_weights:
        reasons.append("compiled: no kernel holds the weights, so that none can return them")
    if torch.compiler.is_compiling():
        reasons.append("compiled: torch.compile can't look into these kernels; 'stream' is for it")
    form = request.normal_form
    branch = form.branches[0]
    if len(form.branches) > 1 or branch.kind != "softmax" or not branch.content:
        reasons.append("compiled: the relevance is not one Softmax over content")
    if form.value.num_heads != request.operator.num_heads or any(t.table and t.after for t in form.value.linears):
        reasons.append("compiled: the values are low-rank with a matrix after the tables")
    for role in form.roles:
        if any(term.table and term.groups > 1 for term in role.linears):
            reasons.append(f"compiled: the {role.name}'s tables have groups")
        if role.is_relative and role.rotations:
            reasons.append(f"compiled: the {role.name} is turned after its tables")
    return reasons


def _has_kernels() -> bool:
    from translution.backends.torch.compiled.processor import processor

    return processor() is not None
