"""Reports as JUnit XML: a testsuite for each algorithm and dtype, a testcase for each law."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

from translution.conformance.exam.law import Law
from translution.conformance.exam.report import Report, Result, Verdict
from translution.conformance.reports.summary import clauses, clean, columns, command, example_line, failures, headline
from translution.conformance.reports.words import operator_words

# The XML's word for a verdict; UNKNOWN is an error, because the check and not the backend broke.
ELEMENTS = {
    Verdict.NOT_CLAIMED: "skipped",
    Verdict.WAIVED: "skipped",
    Verdict.UNKNOWN: "error",
    Verdict.FAIL: "failure",
}
_COUNTED = {"failures": "failure", "errors": "error", "skipped": "skipped"}


def junit_xml(report: Report, laws: Mapping[str, Law]) -> str:
    """The XML text. An exam that does not hold without a broken result has an error of its own."""
    root = ET.Element("testsuites", name=clean(f"translution conformance of {report.backend}"))
    for algorithm, dtypes in columns(report).items():
        for dtype in dtypes:
            own = [result for result in report.results if (result.algorithm, result.dtype) == (algorithm, dtype)]
            suite = _suite(f"{report.backend}.{algorithm}.{dtype}", sum(result.seconds for result in own))
            properties = {
                "edition": report.edition,
                "level": report.level,
                "device": report.device,
                **{f"version {name}": version for name, version in report.versions.items()},
                "cases run": str(sum(result.cases for result in own)),
                **{f"note {n}": note for n, note in enumerate(report.notes, 1)},
            }
            listed = ET.SubElement(suite, "properties")
            for name, value in properties.items():
                ET.SubElement(listed, "property", name=clean(name), value=clean(value))
            for result in own:
                _case(suite, report, result, laws)
            root.append(suite)
    if not report.holds and (not report.complete or not failures(report)):
        suite = _suite(f"{report.backend}.exam", report.seconds)
        case = ET.SubElement(suite, "testcase", name="the exam as a whole", classname=suite.attrib["name"], time="0")
        ET.SubElement(case, "error", message=headline(report), type="UNKNOWN")
        root.append(suite)
    for suite in root:
        _count(suite, list(suite.iter("testcase")))
    _count(root, list(root.iter("testcase")))
    del root.attrib["skipped"]
    root.set("time", f"{report.seconds:.3f}")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def write_junit(report: Report, laws: Mapping[str, Law], path: Path) -> None:
    """Write :func:`junit_xml` in UTF-8."""
    path.write_text('<?xml version="1.0" encoding="utf-8"?>\n' + junit_xml(report, laws), encoding="utf-8")


def _suite(name: str, seconds: float) -> ET.Element:
    return ET.Element("testsuite", name=clean(name), time=f"{seconds:.3f}")


def _count(element: ET.Element, cases: list[ET.Element]) -> None:
    element.set("tests", str(len(cases)))
    for name, tag in _COUNTED.items():
        element.set(name, str(sum(case.find(tag) is not None for case in cases)))


def _case(suite: ET.Element, report: Report, result: Result, laws: Mapping[str, Law]) -> None:
    attributes = {"name": clean(result.law), "classname": suite.attrib["name"], "time": f"{result.seconds:.3f}"}
    case = ET.SubElement(suite, "testcase", attributes)
    element = ELEMENTS.get(result.verdict)
    if element is not None:
        why = "; ".join(result.reasons) if result.verdict is Verdict.NOT_CLAIMED else result.message
        message = f"{result.verdict.value}: {why}" if element == "skipped" else why
        found = ET.SubElement(case, element, message=clean(message), type=result.verdict.value)
        if element != "skipped":
            found.text = clean(_text(report, result, laws.get(result.law)))
    if result.printed:
        ET.SubElement(case, "system-out").text = clean(result.printed)


def _text(report: Report, result: Result, law: Law | None) -> str:
    lines = [result.message, ""]
    if law is not None:
        lines += [f"law: {law.statement}", f"clauses: {', '.join(clauses(law))}"]
    if result.diagnosis:
        lines.append(f"diagnosis: your output equals that of the mutant {' and of '.join(result.diagnosis)}")
    if result.counterexample is not None:
        shown = result.counterexample
        lines.append(f"example: {example_line(shown)}")
        lines += [f"  {name} = {value}" for name, value in operator_words(shown.operator)]
        lines += [f"  {name}: array {tuple(shape)}" for name, shape in shown.shapes.items()]
    return "\n".join([*lines, f"repeat: {command(report, result)}"])
