"""``translution conform``: examine a backend, the exam itself, or answers from elsewhere."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from translution.command_files import JsonFile, check_file, write_json, wrong_use

if TYPE_CHECKING:
    from translution.conformance.exam.report import Report

# Journals and remembered failures, in the folder where the command is given.
FOLDER = Path(".translution")
# What is examined, listed, written or marked, and the options that it takes beside itself.
TAKES: dict[str, tuple[str, ...] | None] = {
    "backend": None,  # all
    "selftest": ("jobs", "json_file"),
    "show_laws": ("json_file",),
    "export": ("level", "dtype", "law", "json_file"),
    "marked": ("waivers", "json_file", "junit", "html"),
}


def conform(
    context: typer.Context,
    backend: Annotated[
        str | None,
        typer.Argument(metavar="BACKEND", help="package.module:backend, or reference, numpy, torch, triton."),
    ] = None,
    level: Annotated[str, typer.Option(help="quick (seconds) or full (minutes).")] = "quick",
    algorithm: Annotated[list[str] | None, typer.Option(help="Only this algorithm; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only this dtype; may be repeated.")] = None,
    law: Annotated[list[str] | None, typer.Option(help="Only this law; may be repeated.")] = None,
    explore: Annotated[
        int, typer.Option(min=0, metavar="N", help="N new random cases for each law, instead of the edition's.")
    ] = 0,
    waivers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Known failures, with reason and expiry.")
    ] = None,
    limit: Annotated[float, typer.Option(metavar="SECONDS", help="What one case may take.")] = 60.0,
    device: Annotated[str, typer.Option(help="Where a torch backend gets its tensors: cpu or cuda.")] = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted exam of this backend.")] = False,
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Examine the exam: every shipped mutant must be caught.")
    ] = False,
    show_laws: Annotated[bool, typer.Option("--laws", help="List the laws.")] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the exam as files, for backends that are not Python.")
    ] = None,
    marked: Annotated[
        Path | None,
        typer.Option("--import", metavar="DIR", help="Mark the answers in DIR/answers to an exported exam."),
    ] = None,
    json_file: JsonFile = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write JUnit XML.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page to look at.")] = None,
) -> None:
    """Examine a backend: what is right, what is wrong, and which mistake it looks like.

    Exit code 0 where everything that is claimed holds, 1 where it does not, 2 for wrong use.
    """
    _check_options(context)
    files = {"--json": json_file, "--junit": junit, "--html": html}
    for option, path in files.items():
        check_file(option, path)
    _check_apart({**files, "--waivers": waivers})
    # Whatever happens to the folder of this process from now on.
    json_file, junit, html = (None if path is None else path.absolute() for path in files.values())
    try:
        from translution.conformance.exam.session import choose
        from translution.conformance.laws import all_laws
        from translution.errors import UnknownName

        try:
            choose("level", ("quick", "full"), [level])
            choose("law", list(all_laws()), law)
        except UnknownName as error:
            raise wrong_use(str(error)) from error
        if show_laws:
            _list_laws(json_file)
        elif selftest:
            _selftest(jobs, json_file)
        elif export is not None:
            _export(export, level, dtype, law, json_file)
        else:
            report = (
                _mark(marked, waivers)
                if marked is not None
                else _examine(str(backend), level, algorithm, dtype, law, explore, waivers, limit, device, jobs, resume)
            )
            _publish(report, json_file, junit, html)
    except ModuleNotFoundError as error:
        raise wrong_use(
            f"conform needs {error.name}, which is not installed: pip install 'translution[conformance]'"
        ) from error


def _check_options(context: typer.Context) -> None:
    """Exactly one thing to do, and no option that it would ignore."""
    names = {one.name: one.opts[0] for one in context.command.params if one.name is not None}
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    wanted = [name for name in given if name in TAKES]
    if len(wanted) != 1:
        raise wrong_use("conform takes a BACKEND, or --selftest, --laws, --export DIR or --import DIR: one of these")
    takes = TAKES[wanted[0]]
    ignored = [names[name] for name in given if takes is not None and name not in (*takes, wanted[0])]
    if ignored:
        more = ", ".join(names[name] for name in takes or ())
        raise wrong_use(f"{names[wanted[0]]} does not take {', '.join(ignored)}; beside it there may be {more}")


def _check_apart(files: dict[str, Path | None]) -> None:
    """No file is given twice."""
    taken: dict[Path, str] = {}
    for option, path in files.items():
        if path is not None and (other := taken.setdefault(path.resolve(), option)) != option:
            raise wrong_use(f"{other} and {option} are both {path}: give two files")


def _file_name(backend: str) -> str:
    return re.sub(r"[^\w.-]+", "-", backend)


def _journal(backend: str, level: str, explore: int, only: Sequence[Sequence[str] | None]) -> Path:
    """Where the results of an exam are kept: an exam of some laws, algorithms or dtypes has a journal of its own."""
    parts = [_file_name(backend), "explore" if explore else level]
    if any(names is not None for names in only):
        chosen = json.dumps([sorted(set(names)) if names is not None else None for names in only])
        parts.append(hashlib.sha256(chosen.encode()).hexdigest()[:8])
    return FOLDER / f"{'-'.join(parts)}.jsonl"


def _examine(
    backend: str,
    level: str,
    algorithms: list[str] | None,
    dtypes: list[str] | None,
    laws: list[str] | None,
    explore: int,
    waivers: Path | None,
    limit: float,
    device: str,
    jobs: int,
    resume: bool,
) -> Report:
    from translution.conformance.exam.examiner import CannotExamine
    from translution.conformance.exam.journal import JournalError
    from translution.conformance.exam.session import run
    from translution.conformance.exam.setting import check_limit
    from translution.conformance.exam.waivers import WaiverError
    from translution.errors import UnknownName
    from translution.progress import Progress

    try:
        check_limit(limit)
    except ValueError as error:
        raise wrong_use(f"--{error}") from error
    journal = _journal(backend, level, explore, (algorithms, dtypes, laws))
    if not FOLDER.exists():
        try:
            FOLDER.mkdir()
            (FOLDER / ".gitignore").write_text("*\n", encoding="utf-8")
        except OSError as error:
            raise wrong_use(
                f"{FOLDER.absolute()} can't be written ({error.strerror}): give the command in a folder of your own"
            ) from error
    try:
        with Progress() as progress:
            report = run(
                backend, level=level, algorithms=algorithms, dtypes=dtypes, laws=laws, explore=explore,
                database=FOLDER / "examples" / _file_name(backend), waivers=waivers, limit=limit, device=device,
                jobs=jobs, journal=journal, resume=resume, progress=progress.update,
            )  # fmt: skip
    except (CannotExamine, JournalError, UnknownName, WaiverError) as error:
        raise wrong_use(str(error)) from error
    if not report.complete:
        typer.echo(f"Interrupted. What was found is in {journal}: the same command with --resume goes on.", err=True)
    return report


def _mark(folder: Path, waivers: Path | None) -> Report:
    from translution.conformance.exam.waivers import WaiverError
    from translution.conformance.exchange import ExchangeError, mark

    try:
        return mark(folder, folder / "answers", waivers=waivers)
    except (ExchangeError, WaiverError) as error:
        raise wrong_use(str(error)) from error


def _publish(report: Report, json_file: Path | None, junit: Path | None, html: Path | None) -> None:
    """Show the report and write it wherever it was asked for; exit with its verdict."""
    from translution.conformance.laws import all_laws
    from translution.conformance.reports.terminal import show_report

    laws = all_laws()
    show_report(report, laws)
    if json_file is not None:
        from translution.conformance.reports.as_json import write_json as write_report

        write_report(report, json_file)
    if junit is not None:
        from translution.conformance.reports.junit import write_junit

        write_junit(report, laws, junit)
    if html is not None:
        from translution.conformance.reports.html import write_html

        write_html(report, laws, html)
    raise typer.Exit(0 if report.holds else 1)


def _export(folder: Path, level: str, dtypes: list[str] | None, laws: list[str] | None, json_file: Path | None) -> None:
    from translution.conformance.exchange import ExchangeError
    from translution.conformance.exchange import export as write_exam
    from translution.errors import UnknownName

    chosen: dict[str, Any] = {} if dtypes is None else {"dtypes": tuple(dtypes)}
    try:
        found = write_exam(folder, level=level, laws=laws, **chosen)
    except (ExchangeError, UnknownName) as error:
        raise wrong_use(str(error)) from error
    questions = ", ".join(f"{count:,} in {dtype}" for dtype, count in found.questions.items())
    size = f"{found.bytes / 2**20:.1f} MiB"
    typer.echo(
        f"{found.folder}: {found.laws} laws, {found.cases:,} cases, {size}; questions: {questions}.\n"
        f"Write the answers to {found.folder / 'answers'}, then: translution conform --import {found.folder}\n"
        f"Not on paper, since they look at a backend while it runs: {', '.join(found.live)}."
    )
    summary = {
        "folder": str(found.folder), "laws": found.laws, "cases": found.cases, "questions": dict(found.questions),
        "bytes": found.bytes, "live": list(found.live),
    }  # fmt: skip
    write_json(json_file, summary)


def _selftest(jobs: int, json_file: Path | None) -> None:
    from translution.conformance.mutants.selftest import run_selftest

    raise typer.Exit(0 if run_selftest(json_file, jobs) else 1)


def _list_laws(json_file: Path | None) -> None:
    from translution.conformance.laws import all_laws
    from translution.display import show_laws

    laws = all_laws()
    show_laws(laws.values())
    write_json(
        json_file,
        {"laws": [{"id": law.id, "clauses": law.clauses, "statement": law.statement} for law in laws.values()]},
    )
