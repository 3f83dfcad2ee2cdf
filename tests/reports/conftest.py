"""Reports that every form of them is tested with."""

import pytest

from translution.conformance.exam.examine import examine
from translution.conformance.exam.law import Law
from translution.conformance.exam.report import Counterexample, Report, Result, Verdict
from translution.conformance.exam.subject import LiveSubject
from translution.conformance.laws import all_laws
from translution.conformance.mutants.catalogue import catalogue
from translution.spec import Mean, Operator, Shared
from translution.spec.layout import Lattice
from translution.spec.serialization import operator_to_data


@pytest.fixture(scope="session")
def hostile() -> str:
    """The name of a backend that would break a page or a command."""
    return "my.pkg:<script>alert(1)</script>&\"'"


@pytest.fixture(scope="session")
def odd() -> str:
    """What such a backend says."""
    return "off \x00by\x1b[31m one ]]> \ud800 \ufffe </pre><img src=x onerror=alert(2)> \x85\u202e"


@pytest.fixture(scope="session")
def laws() -> dict[str, Law]:
    return all_laws()


@pytest.fixture(scope="session")
def real(laws: dict[str, Law]) -> Report:
    """The report of a mistaken backend; two of its results hold."""
    backend = catalogue()["value-mirrored"].backend
    results = tuple(
        examine(laws[name], LiveSubject(backend, backend.algorithms[0], dtype), "quick")
        for name in ("ORACLE", "VALUE-TRACER", "QUERY-TRACER")
        for dtype in ("float64", "float32")
    )
    return Report(str(backend.name), "2026.1", "quick", len(results), results, {"translution": "0.1.0"}, 1.5)


@pytest.fixture(scope="session")
def example() -> Counterexample:
    """A small one."""
    operator = Operator(Lattice((2, 3)), 4, 2, Shared(6), relevance=Mean())
    return Counterexample(3, "ORACLE asks", operator_to_data(operator), {"x": [1, 6, 4]}, 2)


@pytest.fixture(scope="session")
def every_verdict(hostile: str, odd: str, example: Counterexample) -> Report:
    """One result of each kind, from a backend whose name and words are made to break a page."""
    results = (
        Result("ORACLE", "pairwise", "float64", Verdict.PASS, 4, 4, 4, 8, 0.25, (0.25, 0.0, 1e-12, 0.1)),
        Result("ORACLE", "pairwise", "float16", Verdict.NOT_CLAIMED, 0, 48, 4, reasons=("no float16 here",)),
        Result("ORACLE", "stream", "float64", Verdict.FAIL, 1, 2, 4, message=odd, counterexample=example,
               printed=odd, diagnosis=("value-mirrored",), shares=(0.5,), worst_share=0.5),
        Result("VALUE-TRACER", "pairwise", "float64", Verdict.UNKNOWN, 1, 48, 4, message="only 1 of 4 cases ran"),
        Result("VALUE-TRACER", "stream", "float64", Verdict.WAIVED, 4, 4, 4, message="known since May"),
    )  # fmt: skip
    return Report(hostile, "2026.1", "full", 5, results, {"translution": "0.1.0", "torch": "<2>"}, 3.25, ("a note",),
                  "cuda:1", 30.0, "known failures.toml")  # fmt: skip
