"""A report as one HTML page that needs nothing else: styles, script and plots are inside, all text is escaped."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from translution.conformance.exam.law import Law
from translution.conformance.exam.report import Report, Result, Verdict
from translution.conformance.reports.markup import Html, join, tag
from translution.conformance.reports.strips import Axis
from translution.conformance.reports.summary import (
    MEANING,
    Failure,
    cases_run,
    clauses,
    columns,
    command,
    diagnoses,
    example_line,
    failures,
    figures,
    headline,
    mark,
    not_claimed,
    percent,
    plural,
    themes,
    where,
)
from translution.conformance.reports.words import operator_words

OPEN = 3
BROKEN = (Verdict.FAIL, Verdict.UNKNOWN)

Laws = Mapping[str, Law]


def write_html(report: Report, laws: Laws, path: Path) -> None:
    """Write :func:`html_page` in UTF-8."""
    path.write_text(html_page(report, laws), encoding="utf-8")


def html_page(report: Report, laws: Laws) -> str:
    """The whole page. Its content security policy forbids everything but its own styles and script."""
    style, script = _own("style.css"), _own("filter.js")
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"conformance of {report.backend}: {'holds' if report.holds else 'does not hold'}"),
        tag("style", style),
    )
    found = failures(report)
    sections = (_failures(found, report, laws), _matrix(found, report, laws), _bounds(report, laws), _legend(report))
    body = tag(
        "body",
        _header(report, bool(found)),
        tag("main", *sections),
        tag("footer", f"A report of translution {report.versions.get('translution', '')}, edition {report.edition}."),
        tag("script", script),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _own(name: str) -> Html:
    folder = importlib.resources.files("translution.conformance.reports") / "page"
    return Html((folder / name).read_text(encoding="utf-8"))


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _kind(verdict: Verdict) -> str:
    return verdict.value.replace(" ", "-")


def _listing(pairs: Sequence[tuple[str, str]]) -> Html:
    return tag("dl", *(join(tag("dt", name), tag("dd", value)) for name, value in pairs if value))


def _header(report: Report, broken: bool) -> Html:
    chips = [
        tag("li", f"{count:,} {verdict.value}", class_=_kind(verdict))
        for verdict, count in report.counts.items()
        if count
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    jumps = [("failures", "What is broken")] if broken else []
    jumps += [("laws", "Laws"), ("bounds", "Use of the error bounds"), ("legend", "What the words mean")]
    return tag(
        "header",
        tag("h1", "Conformance of ", tag("code", report.backend)),
        tag(
            "div",
            tag("strong", headline(report)),
            figures(report),
            *(tag("div", line) for line in diagnoses(report)),
            class_=f"banner {'PASS' if report.holds else 'FAIL'}",
        ),
        *(tag("p", note, class_="note") for note in report.notes),
        tag("ul", *chips, class_="chips", aria_label="Results by verdict"),
        _listing(
            [("edition", report.edition), ("level", report.level), ("device", report.device), ("versions", versions)]
        ),
        tag("nav", *(tag("a", text, href=f"#{place}") for place, text in jumps), aria_label="On this page"),
    )


def _failures(found: Sequence[Failure], report: Report, laws: Laws) -> Html:
    if not found:
        return Html("")
    told = [_failure(n, failure, report, laws) for n, failure in enumerate(found)]
    return tag("section", tag("h2", "What is broken"), *told, id="failures")


def _failure(number: int, failure: Failure, report: Report, laws: Laws) -> Html:
    law, shown = laws.get(failure.law), failure.shown
    summary = tag(
        "summary",
        tag("span", failure.verdict.value, class_=f"badge {_kind(failure.verdict)}"),
        tag("strong", failure.law),
        f" {where(failure.results)}",
        tag("span", f" equals {', '.join(failure.diagnosis)}" if failure.diagnosis else "", class_="dim"),
    )
    messages: dict[str, list[Result]] = {}
    for result in (shown, *(result for result in failure.results if result is not shown)):
        messages.setdefault(result.message, []).append(result)
    several = len(failure.results) > 1
    pairs: list[tuple[str, str]] = [
        ("law", law.statement if law else "not known to this translution"),
        ("clauses", ", ".join(clauses(law))),
        *(("found", join(f"{where(own)}:" if several else "", tag("pre", text))) for text, own in messages.items()),
        ("diagnosis", tag("strong", failure.diagnosed) if failure.diagnosed else ""),
        ("example", _example(shown)),
        ("printed", tag("pre", shown.printed) if shown.printed else ""),
        ("repeat", tag("pre", command(report, shown))),
    ]
    return tag("details", summary, _listing(pairs), class_="failure", id=f"failure-{number}", open=number < OPEN)


def _example(result: Result) -> str:
    shown = result.counterexample
    if shown is None:
        return ""
    arrays = [(name, f"array {tuple(shape)}") for name, shape in shown.shapes.items()]
    rows = [
        tag("tr", tag("th", name, scope="row"), tag("td", value, class_="code"))
        for name, value in (*operator_words(shown.operator), *arrays)
    ]
    return join(
        tag("p", example_line(shown)),
        tag("table", *rows, class_="fields"),
        tag("details", tag("summary", "the operator as JSON"), tag("pre", json.dumps(shown.operator, indent=1))),
    )


def _matrix(found: Sequence[Failure], report: Report, laws: Laws) -> Html:
    ways = columns(report)
    links = {result.key: f"#failure-{n}" for n, failure in enumerate(found) for result in failure.results}
    results = {result.key: result for result in report.results}
    first = tag(
        "tr",
        tag("th", "law", scope="col", rowspan="2"),
        tag("th", "cases", scope="col", rowspan="2"),
        *(tag("th", name, scope="colgroup", colspan=str(len(dtypes))) for name, dtypes in ways.items()),
    )
    second = tag("tr", *(tag("th", dtype, scope="col") for dtypes in ways.values() for dtype in dtypes))
    bodies = []
    for theme, names in themes(report, laws).items():
        width = str(2 + sum(map(len, ways.values())))
        rows = [tag("tr", tag("th", theme, scope="rowgroup", colspan=width), class_="theme")]
        for name in names:
            own = [results.get((name, algorithm, dtype)) for algorithm, dtypes in ways.items() for dtype in dtypes]
            rows.append(_row(name, theme, own, laws.get(name), links))
        bodies.append(tag("tbody", *rows))
    table = tag("table", tag("thead", first, second), *bodies, class_="grid matrix")
    return tag("section", tag("h2", "Laws"), _filter(), _scrolling(table, "Laws by algorithm and dtype"), id="laws")


def _scrolling(table: Html, label: str) -> Html:
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=label)


def _filter() -> Html:
    options = [("", "any verdict"), ("|".join(BROKEN), "FAIL or UNKNOWN"), *((v.value, v.value) for v in Verdict)]
    chosen = tag("select", *(tag("option", text, value=value) for value, text in options))
    return tag(
        "form",
        tag("label", "text", tag("input", type="search", placeholder="law, clause, words")),
        tag("label", "with", chosen),
        tag("output", aria_live="polite", class_="dim"),
        class_="filter",
        hidden=True,
    )


def _row(
    name: str, theme: str, own: Sequence[Result | None], law: Law | None, links: Mapping[tuple[str, str, str], str]
) -> Html:
    present = [result for result in own if result is not None]
    ran, floor = cases_run(present)
    heading: str = name
    if law is not None:
        told = [tag("p", law.statement), tag("p", ", ".join(clauses(law)), class_="dim")]
        heading = tag("details", tag("summary", name), *told)
    words = [name, theme, *([law.statement, *clauses(law)] if law else []), *(r.message for r in present)]
    return tag(
        "tr",
        tag("th", heading, scope="row"),
        tag("td", f"{ran} / {floor}" if floor else str(ran or ""), class_=f"number{' few' if ran < floor else ''}"),
        *(tag("td") if result is None else _cell(result, links.get(result.key)) for result in own),
        data_text=" ".join(words).lower(),
        data_verdicts="|".join({result.verdict.value: None for result in present}),
    )


def _cell(result: Result, link: str | None) -> Html:
    lines = [
        f"{result.cases} cases ran, {result.floor} had to, {result.tried} were tried",
        f"{len(result.shares)} within error bounds, {result.exact} comparisons for equality, {result.seconds:.2f} s",
        *(() if result.verdict in BROKEN else (result.message,)),
        *(f"not claimed: {reason}" for reason in result.reasons),
    ]
    told = [tag("p", line) for line in lines if line]
    if link is not None:
        told.append(tag("p", tag("a", "what is broken", href=link)))
    return tag("td", tag("details", tag("summary", mark(result)), *told), class_=_kind(result.verdict))


def _bounds(report: Report, laws: Laws) -> Html:
    measured = [result for result in report.results if result.shares]
    if not measured:
        return tag("section", tag("h2", "Use of the error bounds"), tag("p", "No law measured an error."), id="bounds")
    axis = Axis.of(measured)
    heading = [tag("th", name, scope="col") for name in ("law", "dtype")]
    heading.append(tag("th", tag("span", "share of the bound", class_="spoken"), axis.scale(), scope="col"))
    heading += [tag("th", name, scope="col", class_="number") for name in ("cases", "median", "worst")]
    rows = []
    for name in (name for names in themes(report, laws).values() for name in names):
        own: dict[str, list[Result]] = {}
        for result in measured:
            if result.law == name:
                own.setdefault(result.dtype, []).append(result)
        broken = {result.dtype for result in report.broken() if result.law == name}
        for n, (dtype, results) in enumerate(own.items()):
            first = [tag("th", name, scope="rowgroup", rowspan=str(len(own)))] if n == 0 else []
            rows.append(tag("tr", *first, *_bound(dtype, results, axis, dtype in broken)))
    table = tag(
        "table",
        tag("thead", tag("tr", *heading)),
        tag("tbody", *rows),
        class_="grid bounds",
    )
    about = (
        "The largest error of each case as a share of its bound, over all algorithms, on a logarithmic axis: the line "
        "is the range, the band the middle half, the tick the median, a dot the worst case of one algorithm. At the "
        "limit an error is as large as it may be. A case that breaks its bound has no share."
    )
    return tag(
        "section",
        tag("h2", "Use of the error bounds"),
        tag("p", about, class_="dim"),
        _scrolling(table, "Use of the error bounds by law and dtype"),
        id="bounds",
    )


def _bound(dtype: str, results: Sequence[Result], axis: Axis, broken: bool) -> list[Html]:
    shares = [share for result in results for share in result.shares]
    worst: list[str] = [percent(max(shares))]
    if broken:
        worst += [" ", tag("span", "and broken", class_="FAIL")]
    return [
        tag("td", dtype),
        tag("td", axis.strip(results), class_="plot"),
        tag("td", str(len(shares)), class_="number"),
        tag("td", percent(median(shares)), class_="number"),
        tag("td", *worst, class_="number"),
    ]


def _legend(report: Report) -> Html:
    parts = [tag("h2", "What the words mean"), _listing([(verdict.value, text) for verdict, text in MEANING.items()])]
    if reasons := not_claimed(report):
        lines = [tag("li", f"{reason} ({plural(count, 'item')})") for reason, count in reasons.items()]
        parts += [tag("h2", "Why items are not claimed"), tag("ul", *lines)]
    return tag("section", *parts, id="legend")
