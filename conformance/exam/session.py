"""Holding an exam: every law for every algorithm and dtype of a backend, in worker processes; one report."""

from __future__ import annotations

import contextlib
import hashlib
import io
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import get_annotations
from pathlib import Path
from typing import Any

from translution.conformance.exam.code import NOT_FOUND, code_of
from translution.conformance.exam.examine import EDITION, LIMIT
from translution.conformance.exam.examiner import CannotExamine, Examiner
from translution.conformance.exam.journal import Journal
from translution.conformance.exam.law import FULL, QUICK, Law
from translution.conformance.exam.report import Report, Result, Verdict
from translution.conformance.exam.setting import EXAMINED, Setting, check_limit
from translution.conformance.exam.waivers import Waivers
from translution.conformance.exam.worker import Desk, described
from translution.conformance.laws import all_laws
from translution.errors import UnknownName
from translution.progress import Update, silently
from translution.registry import Backend

JOBS = 2


@dataclass(frozen=True, slots=True)
class Item:
    """One law for one algorithm and dtype."""

    law: Law
    algorithm: str
    dtype: str

    @property
    def key(self) -> tuple[str, str, str]:
        """As :attr:`Result.key`."""
        return self.law.id, self.algorithm, self.dtype


def choose(name: str, known: Sequence[str], wanted: str | Sequence[str] | None) -> list[str]:
    """The ``wanted`` in the order of ``known``, all where nothing is asked for; :class:`UnknownName` for others.

    A single name may be given as it is.
    """
    wanted = [wanted] if isinstance(wanted, str) else wanted
    for one in wanted or ():
        if one not in known:
            raise UnknownName(name, one, known)
    return [one for one in known if wanted is None or one in wanted]


def items_of(laws: Sequence[Law], algorithms: Sequence[str], dtypes: Sequence[str]) -> list[Item]:
    """All items of an exam, law by law."""
    return [
        Item(law, algorithm, dtype)
        for law in laws
        for algorithm in algorithms
        for dtype in dtypes
        if law.applies_to(dtype)
    ]


class _Exam:
    """Items that are still open, and the results so far."""

    def __init__(self, items: Sequence[Item], journal: Journal | None, progress: Update) -> None:
        known = {} if journal is None else journal.results
        self.results = {item.key: known[item.key] for item in items if item.key in known}
        self._journal, self._progress, self._total = journal, progress, len(items)
        # A law goes to one worker as a whole, which remembers what it knows of its questions.
        self._open: queue.SimpleQueue[list[Item]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.stopped = threading.Event()
        groups: dict[str, list[Item]] = {}
        for item in items:
            if item.key not in self.results:
                groups.setdefault(item.law.id, []).append(item)
        for group in groups.values():
            self._open.put(group)

    def take(self) -> Iterator[Item]:
        """Open items, until there are none or the exam is stopped."""
        with contextlib.suppress(queue.Empty):
            while True:
                for item in self._open.get_nowait():
                    if self.stopped.is_set():
                        return
                    yield item

    def add(self, result: Result) -> None:
        """Keep a result."""
        with self._lock:
            self.results[result.key] = result
            if self._journal is not None:
                self._journal.add(result)
            self._progress("laws", len(self.results), self._total)


def _in_processes(exam: _Exam, examiners: Sequence[Examiner]) -> None:
    """Share the open items among the workers."""
    errors: list[BaseException] = []

    def work(examiner: Examiner) -> None:
        try:
            for item in exam.take():
                exam.add(examiner.examine(item.law, item.algorithm, item.dtype))
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            errors.append(error)
            exam.stopped.set()

    threads = [threading.Thread(target=work, args=(examiner,), daemon=True) for examiner in examiners]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    except KeyboardInterrupt:
        exam.stopped.set()
        raise
    if errors:
        raise errors[0]


def _in_this_process(exam: _Exam, desk: Desk) -> None:
    for item in exam.take():
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            result = desk.examine(item.law.id, item.algorithm, item.dtype, silently)
            result = desk.refine(result, silently)
        exam.add(replace(result, printed=stream.getvalue()[-2000:]))


def run(
    backend: str | Backend,
    *,
    level: str = QUICK,
    algorithms: str | Sequence[str] | None = None,
    dtypes: str | Sequence[str] | None = None,
    laws: str | Sequence[str] | None = None,
    edition: str = EDITION,
    explore: int = 0,
    database: str | Path | None = None,
    waivers: str | Path | None = None,
    limit: float = LIMIT,
    device: str = "cpu",
    jobs: int = JOBS,
    journal: str | Path | None = None,
    resume: bool = False,
    progress: Update = silently,
) -> Report:
    """Examine a backend.

    Args:
        backend: ``numpy``, ``package.module:attribute`` or any name :func:`translution.get_backend` knows: examined in
            ``jobs`` processes of its own, which may hang or die. A backend object is examined in this process, where
            only Python code can be interrupted.
        level: ``quick`` or ``full``.
        algorithms, dtypes, laws: only these, or only this one; all that the backend has where not given.
        explore: so many new random cases for each item in place of the edition's; ``database`` is a folder that keeps
            the failing ones.
        waivers: a TOML file, see :mod:`translution.conformance.exam.waivers`.
        limit: seconds for one case.
        journal: a file that every result is written to; with ``resume`` the results in it are not computed again, if
            they are of the same code, waivers and settings. The report's notes say how many those are.
        progress: called with a label, how many are done, and of how many.

    Returns:
        The report. After a KeyboardInterrupt it has the results so far and is not ``complete``.

    Raises:
        CannotExamine: the backend can't be imported or does not run on this machine.
        UnknownName: it has no such algorithm or dtype, or there is no such law, level or edition.
        WaiverError, JournalError: these files say something else.
        TypeError: what is given is no backend.
        ValueError: ``limit`` is no time.
    """
    _check_backend(backend)
    check_limit(limit)
    choose("level", (QUICK, FULL), [level])
    choose("edition", (EDITION,), [edition])
    # A backend may change the folder when it is imported.
    setting = Setting(
        level, edition, limit, None if waivers is None else str(Path(waivers).absolute()), device,
        explore, None if database is None else str(Path(database).absolute()),
    )  # fmt: skip
    kept = None if journal is None else Path(journal).absolute()
    among, given = all_laws(), setting.read_waivers()
    chosen = [among[one] for one in choose("law", list(among), laws)]
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        examiners: list[Examiner] = []
        desk = None
        if isinstance(backend, str):
            # All of them import the backend at the same time; a law goes to one worker as a whole.
            workers = max(1, min(jobs, len(chosen)))
            examiners = [stack.enter_context(Examiner(backend, setting)) for _ in range(workers)]
            about = examiners[0].backend
        else:
            desk = Desk(backend, setting)
            about = described(backend)
        if about["unavailable"]:
            raise CannotExamine(f"{about['name']} does not run here: {'; '.join(about['unavailable'])}")
        claimed = [dtype for dtype in EXAMINED if dtype in about["dtypes"]]
        items = items_of(chosen, choose("algorithm", about["algorithms"], algorithms), choose("dtype", claimed, dtypes))
        heading = {} if kept is None else _heading(backend, setting, about)
        book = None if kept is None else Journal(kept, heading, resume=resume)
        exam = _Exam(items, book, progress)
        notes: list[str] = []
        if exam.results:
            notes.append(f"{len(exam.results)} of {len(items)} items are from an earlier run (journal {journal})")
            if NOT_FOUND in heading["code"].values():
                notes.append("the backend's code was not found: nobody knows whether it changed since that run")
        try:
            if desk is not None:
                _in_this_process(exam, desk)
            else:
                _in_processes(exam, examiners)
        except KeyboardInterrupt:
            notes.append("interrupted: only the results so far are here")
    found = [exam.results[item.key] for item in items if item.key in exam.results]
    if level == FULL and len(found) == len(items) and not explore:
        found = unneeded(given, found)
    name = backend if isinstance(backend, str) else str(about["name"])
    shown = "explored" if explore else edition
    return Report(
        name, shown, level, len(items), tuple(found), about["versions"], time.perf_counter() - begin, tuple(notes),
        device=device, limit=limit, waivers=None if waivers is None else str(waivers),
    )  # fmt: skip


def _check_backend(backend: object) -> None:
    """``TypeError`` where that is neither a name nor anything like a backend."""
    methods = ("unavailable", "not_supported", "forward", "vjp")
    if not isinstance(backend, str) and not any(hasattr(backend, method) for method in methods):
        parts = ", ".join((*get_annotations(Backend), *methods))
        raise TypeError(
            f"a {type(backend).__name__} is no backend: give a name ('numpy', 'package.module:attribute'), or an "
            f"object that has {parts} (translution.Backend)"
        )


def _heading(backend: str | Backend, setting: Setting, about: Mapping[str, Any]) -> dict[str, Any]:
    """All that results depend on."""
    waivers = None
    if setting.waivers is not None:
        waivers = f"sha256 {hashlib.sha256(Path(setting.waivers).read_bytes()).hexdigest()[:16]}"
    return {
        "backend": backend if isinstance(backend, str) else str(about["name"]),
        "level": setting.level, "edition": setting.edition, "explore": setting.explore, "device": setting.device,
        "limit": setting.limit, "waivers": waivers, "versions": about["versions"], "code": code_of(backend),
    }  # fmt: skip


def unneeded(waivers: Waivers, results: Sequence[Result]) -> list[Result]:
    """The results, where a waiver that nothing needed any more is a failure of what it covers."""
    found = list(results)
    for waiver in waivers.every:
        covered = [n for n, result in enumerate(found) if waiver.covers(*result.key)]
        if any(found[n].verdict is Verdict.WAIVED and waiver.reason in _reasons(waivers, found[n]) for n in covered):
            continue
        message = f"the waiver ({waiver.reason!r}) is not needed: everything that it covers passes. Remove it"
        for n in covered:
            if found[n].verdict is Verdict.PASS:
                found[n] = replace(found[n], verdict=Verdict.FAIL, message=message)
    return found


def _reasons(waivers: Waivers, result: Result) -> set[str]:
    """The reasons that the message of a waived result is joined from; how a process ended may stand after one."""
    known = [waiver.reason for waiver in waivers.covering(*result.key)]
    found, rest = set[str](), f"{result.message}; "
    while fitting := [reason for reason in known if rest.startswith((f"{reason}; ", f"{reason}: "))]:
        longest = max(fitting, key=len)
        found.add(longest)
        rest = rest[len(longest) + 2 :]
    return found
