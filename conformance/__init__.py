"""The exam that any backend can sit (:func:`run`), and what it measures with: cases, error bounds, reductions, laws."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from translution.conformance.exam.report import Report, Result, Verdict
    from translution.conformance.exam.session import run

__all__ = ["Report", "Result", "Verdict", "run"]

_HOMES = {"run": "session", "Report": "report", "Result": "report", "Verdict": "report"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'translution.conformance' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"translution.conformance.exam.{_HOMES[name]}"), name)
    return value
