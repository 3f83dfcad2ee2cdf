"""Translution: one operator that holds convolution and self-attention (arXiv 2510.10060).

`translution.spec` says what an operator is, :func:`run` computes it, `translution.backends` holds the ways to do so.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from translution import spec
    from translution.algorithms import ALGORITHMS, Cost, Request
    from translution.errors import CostError, InputError, NotSupported, PlanError, UnknownName
    from translution.execution import Candidate, CompiledOperator, Plan, compile, explain, run, vjp  # noqa: A004 - as torch.compile
    from translution.registry import BACKENDS, Backend, Claims, Gradients, get_backend
    from translution.spec import Operator, SpecError

__all__ = [
    "ALGORITHMS",
    "BACKENDS",
    "Backend",
    "Candidate",
    "Claims",
    "CompiledOperator",
    "Cost",
    "CostError",
    "Gradients",
    "InputError",
    "NotSupported",
    "Operator",
    "Plan",
    "PlanError",
    "Request",
    "SpecError",
    "UnknownName",
    "compile",
    "explain",
    "get_backend",
    "run",
    "spec",
    "vjp",
]

# Names are imported when first used, so that the command line answers before NumPy is loaded.
_HOMES = {
    "translution.algorithms": ("ALGORITHMS", "Cost", "Request"),
    "translution.errors": ("CostError", "InputError", "NotSupported", "PlanError", "UnknownName"),
    "translution.execution": ("Candidate", "CompiledOperator", "Plan", "compile", "explain", "run", "vjp"),
    "translution.registry": ("BACKENDS", "Backend", "Claims", "Gradients", "get_backend"),
    "translution.spec": ("Operator", "SpecError"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("translution")
    if name == "spec":
        return import_module("translution.spec")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'translution' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
