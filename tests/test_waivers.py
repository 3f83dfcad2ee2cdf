"""Waivers: known failures, with a reason and a day on which they end; those that nothing needs, or nothing could."""

import datetime as dt
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from translution.conformance.exam.draws import SeededDraws
from translution.conformance.exam.law import FULL, QUICK, Law, Trial
from translution.conformance.exam.report import Result, Verdict
from translution.conformance.exam.session import run, unneeded
from translution.conformance.exam.setting import Setting
from translution.conformance.exam.subject import LiveSubject
from translution.conformance.exam.waivers import Waiver, WaiverError, Waivers, read_waivers
from translution.conformance.laws import all_laws
from translution.conformance.mutants.catalogue import catalogue
from translution.conformance.mutants.naive import Naive
from translution.conformance.strategies import draw_question
from translution.spec.serialization import operator_to_data

MIRRORED = "translution.conformance.mutants.catalogue:value_mirrored"

TODAY = dt.date(2026, 11, 24)


def waiver_file(folder: Path, text: str) -> Path:
    path = folder / "waivers.toml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def test_a_waived_failure_holds_until_it_expires(tmp_path: Path) -> None:
    text = """
        [[waiver]]
        law = "VALUE-TRACER"
        reason = "tables are mirrored"
        expires = 2099-01-01
        when = { dtype = "float64" }
    """
    report = run(MIRRORED, laws=["VALUE-TRACER"], dtypes=["float64", "float32"], waivers=waiver_file(tmp_path, text))
    assert {r.dtype: r.verdict for r in report.results} == {"float64": Verdict.WAIVED, "float32": Verdict.FAIL}
    assert report.results[0].message == "tables are mirrored"
    with pytest.raises(WaiverError, match="expired on 2020-01-01"):
        read_waivers(waiver_file(tmp_path, text.replace("2099", "2020")), all_laws())


def test_a_waiver_may_depend_on_the_structure() -> None:
    question = draw_question(SeededDraws(3), "float32", layouts=["causal-line"])
    here = Waiver("A", "why", TODAY, when={"layout.causal": True, "dtype": "float32"})
    elsewhere = Waiver("A", "why", TODAY, when={"layout.causal": False})
    assert here.matches("A", "pairwise", "float32", question)
    assert not elsewhere.matches("A", "pairwise", "float32", question)
    assert not here.matches("A", "pairwise", "float64", question)
    assert not here.matches("B", "pairwise", "float32", question)
    assert Waivers((elsewhere, here)).find("A", "stream", "float32", question) is here


def test_a_waiver_that_nothing_needs_is_red() -> None:
    waivers = Waivers((Waiver("A", "old trouble", TODAY), Waiver("B", "trouble", TODAY)))
    results = [
        Result("A", "x", "float64", Verdict.PASS),
        Result("B", "x", "float64", Verdict.WAIVED, message="trouble"),
        Result("B", "x", "float32", Verdict.PASS),
    ]
    found = unneeded(waivers, results)
    assert [r.verdict for r in found] == [Verdict.FAIL, Verdict.WAIVED, Verdict.PASS]
    assert "'old trouble'" in found[0].message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[waiver]]\nlaw = 'NO'\nreason = 'r'\nexpires = 2099-01-01", "there is no law 'NO'"),
        ("[[waiver]]\nlaw = 'ORACLE'\nexpires = 2099-01-01", "reason is missing"),
        ("[[waiver]]\nlaw = 'ORACLE'\nreason = 'r'", "expires is missing"),
        ("[[waiver]]\nlaw = 'ORACLE'\nreason = 'r'\nexpires = '2099-01-01'", "expires is a str, expected a date"),
        ("[[waiver]]\nlaw = 'ORACLE'\nreason = 'r'\nexpires = 2099-01-01\nwhat = 1", "unknown field"),
        ("[[waiver]]\nlaw = 'ORACLE'\nreason = '  '\nexpires = 2099-01-01", "the reason is blank"),
        ("[[waiver]]\nlaw = 'ORACLE'\nreason = ''\nexpires = 2099-01-01", "the reason is blank"),
        ("[[waiver]]\nlaw = 'ORACEL'\nreason = 'r'\nexpires = 2099-01-01", "Did you mean 'ORACLE'?"),
        ("[[waiver]]\nlaw = 'ORACLE'\nreason = 'r'\nexpires = 2099-01-01\nwhen = 3", "when is a int, expected a dict"),
        ("[waivers]\nlaw = 'ORACLE'", "[[waiver]] tables and nothing else"),
        ("[[waiver", "waivers.toml"),
    ],
)
def test_a_wrong_waiver_file_says_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(WaiverError) as caught:
        read_waivers(waiver_file(tmp_path, text), all_laws())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ('algoritm = "stream"', ("there is no 'algoritm'; known are ", "Did you mean 'algorithm'?")),
        ('"layout.boundry" = "circular"', ("there is no 'layout.boundry'; known are ", "'layout.boundary'?")),
        ('"layout.boundary" = "circlar"', ("one of absent, zeros, circular, ", "Did you mean 'circular'?")),
        ('"layout.kind" = "Latice"', ("one of Lattice, PairTable. Did you mean 'Lattice'?",)),
        ('"layout.kind.boundary" = "zeros"', ("layout.kind has nothing inside",)),
        ('"value.parts.kind" = "Shared"', ("value.parts has nothing inside",)),
        ('dtype = "float99"', ("one of float64, float32, float16, bfloat16. Did you mean 'float",)),
        ('dtype = "complex128"', ("one of float64, float32, float16, bfloat16",)),
        ('dtype = ["float16", "float32"]', ("one of float64, float32, float16, bfloat16",)),
        (
            'algorithm = "fuse"',
            ("one of definition, pairwise, stream, compiled, conv, sdpa, fused, written. Did you mean 'fused'?",),
        ),
        ('"layout.kernel_size" = 3', ("when layout.kernel_size = 3 can never be: it is a list, such as [3, 3]",)),
        ('"layout.stride" = [1, true]', ("it is a list, such as [3, 3]",)),
        ('"layout.causal" = 1', ("it is true or false or a list, such as [true, false]",)),
        ('"layout.registers" = true', ("it is a whole number",)),
        ("dim = 4.0", ("it is a whole number",)),
        ("output_scale = nan", ("it is a number",)),
        ('layout = "Lattice"', ("it is an object; name a field of it, such as layout.kind",)),
        ('layout.boundary = "circular"', ('a path is written in quotes, with its dots: "layout.boundary" = ...',)),
        (
            'layout = { boundary = "circular" }',
            ('a path is written in quotes, with its dots: "layout.boundary" = ...',),
        ),
        ("dim = 2020-01-01", ("it is a whole number",)),
    ],
)
def test_a_waiver_that_can_never_match_is_refused(tmp_path: Path, when: str, words: tuple[str, ...]) -> None:
    text = f"[[waiver]]\nlaw = 'ORACLE'\nreason = 'r'\nexpires = 2099-01-01\n[waiver.when]\n{when}\n"
    with pytest.raises(WaiverError) as caught:
        read_waivers(waiver_file(tmp_path, text), all_laws())
    for word in words:
        assert word in str(caught.value)
    assert "waiver 1: when " in str(caught.value)


def test_every_entry_of_an_operator_can_be_waived(tmp_path: Path) -> None:
    """Whatever a question's JSON has, but null, which TOML can't say."""
    seen: dict[str, str] = {}
    for number in range(60):
        waiting = list(operator_to_data(draw_question(SeededDraws(number), "float32").operator).items())
        while waiting:
            path, value = waiting.pop()
            if isinstance(value, dict):
                waiting += [(f"{path}.{name}", inner) for name, inner in value.items()]
            elif value is not None and not (isinstance(value, list) and any(isinstance(one, dict) for one in value)):
                seen[path] = f'"{path}" = {json.dumps(value)}'
    assert {"layout.kernel_size", "layout.causal", "value.kind", "relevance.kind", "output_scale"} <= seen.keys()
    body = "\n".join(f"{entry}" for entry in seen.values())
    text = f"[[waiver]]\nlaw = 'ORACLE'\nreason = 'r'\nexpires = 2099-01-01\n[waiver.when]\n{body}\n"
    (waiver,) = read_waivers(waiver_file(tmp_path, text), all_laws()).every
    assert len(waiver.when) == len(seen)


def test_lists_are_compared_as_a_whole() -> None:
    question = next(
        asked
        for number in range(200)
        if (asked := draw_question(SeededDraws(number), "float32", layouts=["window"])) is not None
    )
    size = list(question.operator.layout.kernel_size)
    assert Waiver("A", "why", TODAY, when={"layout.kernel_size": size}).matches("A", "x", "float32", question)
    assert not Waiver("A", "why", TODAY, when={"layout.kernel_size": size[:-1]}).matches("A", "x", "float32", question)


@pytest.mark.parametrize(
    ("reasons", "message", "needed"),
    [
        (("r", "other reason"), "other reason", [False, True]),
        (("r", "other; r"), "other; r", [False, True]),
        (("r", "other"), "other; r", [True, True]),
        (("a", "a; b", "b"), "a; b", [False, True, False]),
        (("r", "r: more"), "r: the process ended (exit code 3) in case 2", [True, False]),
    ],
)
def test_a_waiver_is_needed_where_its_whole_reason_is_given(
    reasons: tuple[str, ...], message: str, needed: list[bool]
) -> None:
    results = [Result("A", "x", "float64", Verdict.WAIVED, message=message), Result("A", "x", "float32", Verdict.PASS)]
    waivers = Waivers(tuple(Waiver("A", reason, TODAY) for reason in reasons))
    found = unneeded(waivers, results)
    assert found[0].verdict is Verdict.WAIVED
    assert (found[1].verdict is Verdict.FAIL) is not all(needed)
    told = [reason for reason, need in zip(reasons, needed, strict=True) if not need]
    assert found[1].message == "" if not told else repr(told[0]) in found[1].message


# Exploring


def test_waivers_hold_while_exploring(tmp_path: Path) -> None:
    text = "[[waiver]]\nlaw = 'VALUE-TRACER'\nreason = 'mirrored'\nexpires = 2099-01-01\nwhen = { dtype = 'float64' }\n"
    report = run(
        catalogue()["value-mirrored"].backend, laws="VALUE-TRACER", dtypes=["float64", "float32"], explore=60,
        waivers=waiver_file(tmp_path, text),
    )  # fmt: skip
    found = {result.dtype: (result.verdict, result.message) for result in report.results}
    assert found["float64"] == (Verdict.WAIVED, "mirrored")
    assert found["float32"][0] is Verdict.FAIL


def test_exploring_goes_on_behind_a_waived_case() -> None:
    """A failure that no waiver names is found, and the example shown is none of the waived ones."""

    def body(trial: Trial) -> None:
        layout = trial.draws.walk(("causal-line", "grid"))
        trial.run(draw_question(trial.draws, trial.dtype, layouts=[layout], masked=False))
        trial.require(False, f"{layout} is wrong")

    law = Law("A-LAW", "It holds.", ("L1",), (), body, {QUICK: 4, FULL: 8}, None, False, None)
    subject, setting = LiveSubject(Naive(), "pairwise", "float64"), Setting(explore=40)

    def explored(*whens: dict[str, Any]) -> Result:
        waivers = Waivers(tuple(Waiver("A-LAW", f"reason {when}", TODAY, when=when) for when in whens))
        return setting.examine(law, subject, waivers, lambda _: None, {})

    for causal, other in ((True, "grid"), (False, "causal-line")):
        found = explored({"layout.causal": causal})
        assert (found.verdict, found.message) == (Verdict.FAIL, f"{other} is wrong")
        assert found.counterexample is not None
        assert found.counterexample.operator["layout"]["causal"] is not causal
    both = explored({"layout.causal": True}, {"layout.causal": False})
    assert both.verdict is Verdict.WAIVED
    assert set(both.message.split("; ")) == {"reason {'layout.causal': True}", "reason {'layout.causal': False}"}
    assert both.cases > 1
    assert explored({"layout.registers": 99}).verdict is Verdict.FAIL
