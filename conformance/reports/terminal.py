"""A report on a terminal or in a pipe. ``--json`` has the same and more."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from translution.conformance.exam.law import Law
from translution.conformance.exam.report import Counterexample, Report, Result, Verdict
from translution.conformance.reports.summary import (
    MEANING,
    Failure,
    cases_run,
    clauses,
    clean,
    columns,
    command,
    diagnoses,
    example_line,
    excerpt,
    failures,
    figures,
    headline,
    mark,
    not_claimed,
    plural,
    themes,
    where,
)
from translution.conformance.reports.words import operator_words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STYLES = {
    Verdict.PASS: "green",
    Verdict.NOT_CLAIMED: "dim",
    Verdict.WAIVED: "yellow",
    Verdict.UNKNOWN: "bold magenta",
    Verdict.FAIL: "bold red",
}
# A column is as wide as a dtype.
SHORT = {Verdict.NOT_CLAIMED: "-", Verdict.WAIVED: "waived", Verdict.UNKNOWN: "unknown"}

PIPE_WIDTH = 120
# What a table puts between two columns.
GAP = 3
IN_FULL, LISTED, MESSAGES, REASONS, TITLED = 6, 30, 3, 8, 8


def show_report(report: Report, laws: Mapping[str, Law], console: Console | None = None) -> bool:
    """Print a report: heading, matrix, legend, what is not claimed or waived, failures, verdict and notes.

    Returns:
        Whether the exam holds.
    """
    from rich.text import Text

    out = console or _console()
    out.print(Text(f"conformance of {clean(report.backend)}", "bold"))
    about = [f"edition {report.edition}", f"level {report.level}", f"device {report.device}"]
    about += [f"{name} {version}" for name, version in report.versions.items()]
    out.print(Text(clean(", ".join(about)), "dim"))
    for table in _matrix(report, laws, out.width):
        out.print(table)
        out.print()
    _legend(report, out)
    _put_up_with(report, out)
    _failures(report, laws, out)
    for line in diagnoses(report):
        out.print(Text(clean(line), "bold yellow"))
    out.print(Text(headline(report), "bold green" if report.holds else "bold red"))
    out.print(Text(figures(report)))
    for note in report.notes:
        out.print(Text(clean(note), "yellow"))
    return report.holds


def _console() -> Console:
    from rich.console import Console

    console = Console()
    # A pipe has no width of its own.
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=PIPE_WIDTH)


def _matrix(report: Report, laws: Mapping[str, Law], width: int) -> Iterable[Table]:
    """One line per law, one column per algorithm and dtype; as many tables as the width asks for."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    results = {result.key: result for result in report.results}
    grouped = themes(report, laws)
    ways = [(algorithm, dtype) for algorithm, dtypes in columns(report).items() for dtype in dtypes]
    counts = {
        name: cases_run([result for result in report.results if result.law == name])
        for group in grouped.values()
        for name in group
    }
    ran = {name: f"{ran:,}/{floor:,}" if floor else f"{ran:,}" if ran else "" for name, (ran, floor) in counts.items()}
    taken = sum(max([5, *map(len, texts)]) + GAP for texts in (ran, ran.values()))
    for block in _blocks([max(7, *map(len, way)) for way in ways], width - taken):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("law", no_wrap=True)
        table.add_column("cases", justify="right", no_wrap=True)
        for algorithm, dtype in (ways[n] for n in block):
            table.add_column(Text(clean(f"{algorithm}\n{dtype}")), justify="right", no_wrap=True)
        for theme, group in grouped.items():
            table.add_row(Text(theme, "bold"))
            for name in group:
                own = [results.get((name, *ways[n])) for n in block]
                style = "bold magenta" if counts[name][0] < counts[name][1] else ""
                table.add_row(Text(clean(name)), Text(ran[name], style), *map(_cell, own))
        yield table


def _blocks(widths: list[int], room: int) -> list[list[int]]:
    """Columns of these widths, in order, in blocks that fit into ``room``; at least one in each."""
    blocks: list[list[int]] = []
    left = room
    for n, width in enumerate(widths):
        if width + GAP > left or not blocks:
            blocks.append([])
            left = room
        blocks[-1].append(n)
        left -= width + GAP
    return blocks


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    return f"[{STYLES[result.verdict]}]{SHORT.get(result.verdict, mark(result))}[/]"


def _legend(report: Report, out: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column()
    for verdict, count in report.counts.items():
        if count:
            shown = "a figure" if verdict is Verdict.PASS else SHORT.get(verdict, verdict.value)
            name = "" if shown == verdict.value else f"{verdict.value}: "
            grid.add_row(Text(shown, STYLES[verdict]), Text(f"{name}{MEANING[verdict]}"))
    grid.add_row("cases", "how many ran / how many had to, of what is claimed")
    out.print(grid)
    out.print()


def _put_up_with(report: Report, out: Console) -> None:
    """Why items are not claimed, and what is waived."""
    from rich.padding import Padding
    from rich.text import Text

    reasons = not_claimed(report)
    if reasons:
        out.print(Text("not claimed", "bold"))
        for reason, count in list(reasons.items())[:REASONS]:
            line = f"{plural(count, 'item')}: {excerpt(reason, lines=4, width=200)}"
            out.print(Padding(Text(line), (0, 0, 0, 2), expand=False))
        if len(reasons) > REASONS:
            out.print(Text(f"  and {len(reasons) - REASONS:,} other reasons, which --json has"))
        out.print()
    waived: dict[tuple[str, str], list[Result]] = {}
    for result in report.results:
        if result.verdict is Verdict.WAIVED:
            waived.setdefault((result.law, result.message), []).append(result)
    if waived:
        out.print(Text("waived", "bold"))
        for (law, message), results in waived.items():
            line = f"{clean(law)} ({clean(where(results))}): {excerpt(message, lines=4)}"
            out.print(Padding(Text(line), (0, 0, 0, 2), expand=False))
        out.print()


def _failures(report: Report, laws: Mapping[str, Law], out: Console) -> None:
    from rich import box
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    found = failures(report)
    for failure in found[:IN_FULL]:
        title = Text(f"{failure.verdict.value} {clean(failure.law)}", STYLES[failure.verdict])
        style = "red" if failure.verdict is Verdict.FAIL else "magenta"
        out.print(Panel(_told(failure, report, laws), title=title, title_align="left", border_style=style))
    if rest := found[IN_FULL : IN_FULL + LISTED]:
        table = Table(title="more that is broken", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for name in ("law", "verdict", "results", "found first"):
            table.add_column(name, overflow="fold", justify="right" if name == "results" else "left")
        for failure in rest:
            verdict = Text(failure.verdict.value, STYLES[failure.verdict])
            table.add_row(Text(clean(failure.law)), verdict, str(len(failure.results)), Text(_brief(failure)))
        out.print(table)
    if len(found) > IN_FULL + LISTED:
        left = len(found) - IN_FULL - LISTED
        out.print(Text(f"{left:,} more groups of broken results are only in --json and --html."))
    if len(found) > IN_FULL:
        out.print(Text(f"{len(report.broken()):,} results are broken; --json has each of them in full."))
        out.print()


def _told(failure: Failure, report: Report, laws: Mapping[str, Law]) -> Table:
    from rich.table import Table
    from rich.text import Text

    law, shown = laws.get(failure.law), failure.shown
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text, style in (
        ("law", law.statement if law else "not known to this translution", ""),
        ("clauses", ", ".join(clauses(law) if law and len(law.clauses) <= TITLED else law.clauses if law else ()), ""),
        ("where", _where(failure), ""),
        *(("found", text, "bold") for text in _messages(failure)),
        ("diagnosis", failure.diagnosed, "bold yellow"),
        *((label, text, "") for label, text in _example(shown.counterexample)),
        ("printed", excerpt(shown.printed, lines=6, width=200), ""),
        ("repeat", command(report, shown), "cyan"),
    ):
        if text:
            grid.add_row(label, Text(clean(text), style))
    return grid


def _brief(failure: Failure) -> str:
    """A line or two: the mutant, or the message, of a traceback its end."""
    if failure.diagnosis:
        return clean(f"equals {', '.join(failure.diagnosis)}")
    lines = failure.shown.message.strip().split("\n")
    return excerpt(lines[-1] if len(lines) > 5 else lines[0], width=160)


def _where(failure: Failure) -> str:
    count = len(failure.results)
    return f"{where(failure.results)}{f' ({count} results)' if count > 1 else ''}"


def _messages(failure: Failure) -> list[str]:
    """The messages of a failure without repetition, that of the shown result first."""
    ordered = [failure.shown, *(result for result in failure.results if result is not failure.shown)]
    found: dict[str, str] = {}
    for result in ordered:
        found.setdefault(result.message, f"{result.algorithm} {result.dtype}: " if len(ordered) > 1 else "")
    texts = [f"{place}{excerpt(message)}" for message, place in found.items()]
    more = len(texts) - MESSAGES
    return [*texts[:MESSAGES], f"and {more} other messages, which --json has"] if more > 0 else texts


def _example(shown: Counterexample | None) -> list[tuple[str, str]]:
    if shown is None:
        return []
    lines = [("example", example_line(shown))]
    lines += [("", f"{name} = {value}") for name, value in operator_words(shown.operator)]
    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in shown.shapes.items())
    return [*lines, ("", shapes)]
