"""The exam as files, for backends in any language: questions are exported, written answers are marked by the same laws.

A folder holds ``exam.json`` and ``questions/ID.safetensors``; the answers are ``ID.safetensors`` in a folder of their
own. :mod:`translution.conformance.exchange.paper` says what is in them.
"""

from translution.conformance.exchange.marking import mark
from translution.conformance.exchange.paper import ExchangeError
from translution.conformance.exchange.writing import ExportSummary, export

__all__ = ["ExchangeError", "ExportSummary", "export", "mark"]
