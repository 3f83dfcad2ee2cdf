"""Reports as data, JSON and JUnit XML, and what all forms say: what is written can be read, nothing is left out."""

import copy
import importlib.resources
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest

from translution.conformance.exam.examine import LIMIT
from translution.conformance.exam.explore import explore
from translution.conformance.exam.law import Law
from translution.conformance.exam.report import LONGEST, REPORT_VERSION, Counterexample, Report, Result, Verdict
from translution.conformance.exam.subject import LiveSubject
from translution.conformance.mutants.catalogue import catalogue
from translution.conformance.reports.as_json import SCHEMA_FILE, ReportError, read_json, report_schema, write_json
from translution.conformance.reports.clauses import TITLES
from translution.conformance.reports.html import html_page
from translution.conformance.reports.junit import junit_xml, write_junit
from translution.conformance.reports.summary import clean, command, failures, headline

ROOT = Path(__file__).resolve().parents[2]

# JSON


def test_the_schema_is_shipped_and_valid() -> None:
    shipped = importlib.resources.files("translution.conformance.reports") / "schema" / SCHEMA_FILE
    assert json.loads(shipped.read_text()) == report_schema()
    jsonschema.Draft202012Validator.check_schema(report_schema())
    assert report_schema()["properties"]["version"]["const"] == REPORT_VERSION


def test_the_schema_has_the_fields_of_the_dataclasses(real: Report) -> None:
    schema = report_schema()
    result = schema["$defs"]["result"]
    found = result["properties"]["counterexample"]
    for kind, part in ((Result, result), (Counterexample, found)):
        names = [field.name for field in fields(kind)]
        assert [*part["properties"]] == names == part["required"]
        assert part["additionalProperties"] is False
    assert [*schema["properties"]] == [*real.as_json()] == schema["required"]
    assert schema["$defs"]["verdict"]["enum"] == [*Verdict] == schema["properties"]["counts"]["required"]


def test_round_trip(real: Report, tmp_path: Path, every_verdict: Report) -> None:
    for report in (real, every_verdict, Report("b", "2026.1", "quick", 0, ())):
        write_json(report, tmp_path / "report.json")
        assert read_json(tmp_path / "report.json") == report
        assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("share", [float("nan"), float("inf")])
def test_no_number_that_json_lacks(share: float, tmp_path: Path, every_verdict: Report) -> None:
    report = every_verdict
    wrong = replace(report, results=(replace(report.results[0], shares=(0.5, share)), *report.results[1:]))
    with pytest.raises(ReportError, match=re.escape(f"$.results[0].shares[1] is {share}")):
        write_json(wrong, tmp_path / "report.json")
    assert [*tmp_path.iterdir()] == []


def changed(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data.update(values)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (changed(version=2), "of version 2; this translution reads version 1"),
    "another kind": (changed(schema="translution/operator"), "not a conformance report"),
    "no version": (lambda data: data.pop("version"), "'version' is a required property"),
    "version as text": (changed(version="1"), r"\$\.version: 1 was expected"),
    "unknown field": (changed(more=1), r"'more' was unexpected"),
    "unknown field in a result": (lambda data: data["results"][0].update(more=1), r"\$\.results\[0\]: .*'more'"),
    "unknown verdict": (lambda data: data["results"][0].update(verdict="SKIP"), r"\$\.results\[0\]\.verdict: 'SKIP'"),
    "missing field": (lambda data: data["results"][1].pop("tried"), r"\$\.results\[1\]: 'tried'"),
    "a share above 1": (lambda data: data["results"][0]["shares"].append(1.5), r"\$\.results\[0\]\.shares\[4\]: 1.5"),
    "shapes": (lambda data: data["results"][2]["counterexample"]["shapes"].update(x=["a"]), r"shapes\.x\[0\]"),
    "holds against the results": (changed(holds=True), r"\$\.holds is True, but the results say False"),
    "cases against the results": (changed(cases=1000), r"\$\.cases is 1000, but the results say 10"),
    "counts against the results": (lambda data: data["counts"].update(FAIL=0), r"\$\.counts is"),
    "cut short, but said to be complete": (changed(expected=6), r"\$\.complete is True"),
    "no device": (lambda data: data.pop("device"), "'device' is a required property"),
    "no time": (changed(limit=0), r"\$\.limit: 0 is less than or equal"),
    "waivers": (changed(waivers=["a.toml"]), r"\$\.waivers: \['a\.toml'\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_reports_are_refused_with_their_place(name: str, tmp_path: Path, every_verdict: Report) -> None:
    breaks, message = BROKEN[name]
    data = copy.deepcopy(json.loads(json.dumps(every_verdict.as_json())))
    breaks(data)
    file = tmp_path / "report.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ReportError, match=f"^{re.escape(str(file))}: .*{message}"):
        read_json(file)


def test_the_same_item_twice_is_refused(tmp_path: Path, every_verdict: Report) -> None:
    report = every_verdict
    twice = replace(report, expected=6, results=(*report.results, report.results[0]))
    write_json(twice, tmp_path / "report.json")
    with pytest.raises(ReportError, match="ORACLE, pairwise, float64 twice"):
        read_json(tmp_path / "report.json")


@pytest.mark.parametrize(
    "content",
    [b"", b'{"schema": "translution/conf', b"\xff\xfe", b'{"version": NaN}', b"[" * 200_000, b"[]", b"null"],
    ids=["empty", "cut short", "not UTF-8", "NaN", "deep", "list", "null"],
)
def test_what_is_no_report_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ReportError, match=r"report\.json: (no JSON|not UTF-8|not a conformance report)"):
        read_json(tmp_path / "report.json")


def test_an_explored_counterexample_can_be_written(laws: dict[str, Law], tmp_path: Path) -> None:
    """Its number is none of the edition's."""
    backend = catalogue()["value-mirrored"].backend
    subject = LiveSubject(backend, backend.algorithms[0], "float64")
    result = explore(laws["VALUE-TRACER"], subject, 20)
    found = Report("value-mirrored", "explored", "quick", 1, (result,))
    assert found.results[0].counterexample is not None
    assert found.results[0].counterexample.number < 0
    write_json(found, tmp_path / "report.json")
    assert read_json(tmp_path / "report.json") == found
    assert command(found, found.results[0]).endswith(f"--explore {found.results[0].tried}")


# JUnit


def test_junit_has_every_result_with_the_right_counts(
    real: Report, laws: dict[str, Law], tmp_path: Path, every_verdict: Report
) -> None:
    elements = {
        "PASS": [], "NOT CLAIMED": ["skipped"], "WAIVED": ["skipped"], "UNKNOWN": ["error"], "FAIL": ["failure"],
    }  # fmt: skip
    for report in (real, every_verdict):
        write_junit(report, laws, tmp_path / "report.xml")
        root = ET.parse(tmp_path / "report.xml").getroot()
        found = {
            (case.attrib["name"], suite.attrib["name"].removeprefix(clean(report.backend))): [
                child.tag for child in case if child.tag != "system-out"
            ]
            for suite in root
            for case in suite.iter("testcase")
        }
        assert found == {
            (result.law, f".{result.algorithm}.{result.dtype}"): elements[result.verdict] for result in report.results
        }
        for place, cases in [(root, [*root.iter("testcase")]), *((suite, [*suite.iter("testcase")]) for suite in root)]:
            assert place.attrib["tests"] == str(len(cases))
            for name, element in (("failures", "failure"), ("errors", "error")):
                assert place.attrib[name] == str(sum(case.find(element) is not None for case in cases))
        assert sum(int(suite.attrib["skipped"]) for suite in root) == len([*root.iter("skipped")])
        for suite in root:
            values = {item.attrib["name"]: item.attrib["value"] for item in suite.iter("property")}
            assert values["edition"] == report.edition
            assert values["level"] == report.level
            assert values["device"] == report.device
            assert values.get("note 1") == next(iter(report.notes), None)
            assert values["version translution"] == "0.1.0"


def test_junit_says_what_broke(laws: dict[str, Law], every_verdict: Report, odd: str) -> None:
    root = ET.fromstring(junit_xml(every_verdict, laws))
    failure = next(root.iter("failure"))
    assert failure.attrib["message"] == clean(odd)
    text = failure.text or ""
    for part in (
        laws["ORACLE"].statement,
        "L1 Positions",
        "Lattice(grid=(2, 3))",
        "mutant value-mirrored",
        "--law ORACLE",
    ):
        assert part in text
    assert sorted(found.attrib["message"] for found in root.iter("skipped")) == [
        "NOT CLAIMED: no float16 here", "WAIVED: known since May",
    ]  # fmt: skip


def test_a_junit_report_of_an_exam_that_does_not_hold_is_never_green(laws: dict[str, Law]) -> None:
    passed = Result("ORACLE", "pairwise", "float64", Verdict.PASS, 4, 4, 4)
    refused = replace(passed, verdict=Verdict.NOT_CLAIMED, cases=0)
    for report, red in (
        (Report("b", "e", "quick", 1, (passed,)), 0),
        (Report("b", "e", "quick", 2, (passed,)), 1),
        (Report("b", "e", "quick", 1, (refused,)), 1),
        (Report("b", "e", "quick", 0, ()), 1),
    ):
        root = ET.fromstring(junit_xml(report, laws))
        assert int(root.attrib["errors"]) + int(root.attrib["failures"]) == red
        assert report.holds == (red == 0)


# What they share


def test_clause_headings_are_those_of_the_specification() -> None:
    text = (ROOT / "docs" / "specification.md").read_text()
    assert dict(re.findall(r"^### ([A-Z][0-9]+)\. (.*)$", text, flags=re.MULTILINE)) == TITLES


def test_failures_are_grouped_and_the_telling_ones_come_first(example: Counterexample) -> None:
    base = Result("A", "a", "float64", Verdict.FAIL, counterexample=example)
    small = replace(example, shrunk=True)
    results = (
        replace(base, law="U", verdict=Verdict.UNKNOWN),
        base,
        replace(base, dtype="float32", counterexample=small),
        replace(base, law="B", diagnosis=("noise",)),
        replace(base, law="P", verdict=Verdict.PASS),
    )
    found = failures(Report("b", "e", "quick", 5, results))
    assert [(failure.law, len(failure.results)) for failure in found] == [("B", 1), ("A", 2), ("U", 1)]
    assert found[1].shown.counterexample == small


def test_commands_can_be_given_to_a_shell(every_verdict: Report, hostile: str) -> None:
    report = every_verdict
    line = command(report, report.results[2])
    split = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    assert split.stdout.splitlines() == [
        "translution", "conform", hostile, "--law", "ORACLE", "--algorithm", "stream", "--dtype", "float64",
        "--level", "full", "--device", "cuda:1", "--limit", "30", "--waivers", "known failures.toml",
    ]  # fmt: skip
    usual = replace(report, level="quick", device="cpu", limit=LIMIT, waivers=None)
    assert command(usual, report.results[2]).endswith("--algorithm stream --dtype float64")
    written = replace(report.results[2], algorithm="written")
    assert command(report, written) == "translution conform --import DIR --waivers 'known failures.toml'"
    assert command(usual, written) == "translution conform --import DIR"


def test_the_headline_tells_refusal_from_waivers() -> None:
    refused = Result("ORACLE", "pairwise", "float64", Verdict.NOT_CLAIMED)
    waived = replace(refused, law="VALUE-TRACER", verdict=Verdict.WAIVED)
    assert headline(Report("b", "e", "quick", 1, (refused,))).endswith("the backend claims none of it.")
    assert headline(Report("b", "e", "quick", 2, (refused, waived))).endswith("what is claimed is waived.")


def test_a_message_of_any_length_gives_a_report_of_bounded_size(laws: dict[str, Law]) -> None:
    text = f"HEAD {'<' * 10**7} TAIL"
    result = Result("ORACLE", "pairwise", "float64", Verdict.FAIL, message=text, reasons=(text,))
    for kept in (result.message, *result.reasons):
        assert len(kept) <= LONGEST
        assert kept.startswith("HEAD <")
        assert kept.endswith("< TAIL")
        (count,) = re.findall(r"\[\.\.\. ([0-9,]+) characters left out \.\.\.\]", kept)
        assert int(count.replace(",", "")) == len(text) - kept.count("<") - len("HEAD  TAIL")
    assert Result.from_json(result.as_json()) == result
    fits = "x" * LONGEST
    assert replace(result, message=fits).message == fits
    report = Report("b", "e", "quick", 1, (result,))
    for written in (json.dumps(report.as_json()), junit_xml(report, laws), html_page(report, laws)):
        assert len(written) < 20 * LONGEST


def test_reports_are_imported_without_what_they_may_not_need() -> None:
    code = (
        "import sys\n"
        "from translution.conformance.reports import as_json, html, junit, summary, terminal\n"
        "print(sorted({'rich', 'jsonschema', 'torch', 'hypothesis', 'matplotlib'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
