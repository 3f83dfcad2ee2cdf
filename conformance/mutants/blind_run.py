"""One process per mutation: import the changed backend, sit the exam until something fails.

Processes are forks of one that has imported everything and answered every question once: they start in milliseconds,
with geometries, normal forms and error bounds at hand. Nothing here starts a thread.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import CodeType
from typing import Any

from translution.conformance.exam.examine import examine
from translution.conformance.exam.law import Law
from translution.conformance.exam.report import HOLDS, Verdict
from translution.conformance.exam.subject import LiveSubject
from translution.conformance.mutants.blind_package import Package
from translution.conformance.mutants.blind_points import Mutation
from translution.conformance.mutants.blind_reach import Function, forget, reached
from translution.registry import Backend

MEMORY = 2 << 30
CASE_LIMIT = 10.0


@dataclass(frozen=True, slots=True)
class Item:
    """One law asked of one algorithm in one dtype."""

    law: str
    algorithm: str
    dtype: str
    level: str

    def __str__(self) -> str:
        return f"{self.law} ({self.algorithm}, {self.dtype}, {self.level})"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutation: ``how`` it was noticed, or empty for a survivor."""

    mutation: Mutation
    how: str
    law: str = ""
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        """Whether it was noticed."""
        return bool(self.how)


@dataclass(slots=True)
class Order:
    """Which items to try first: those that noticed most so far for what they cost, counted by module and overall.

    Items in one of the dtypes ``last`` come after the others.
    """

    seconds: dict[Item, float]
    last: frozenset[str]
    kills: Counter[Item] = field(default_factory=Counter)
    own: Counter[tuple[str, Item]] = field(default_factory=Counter)

    def for_module(self, module: str) -> list[Item]:
        """All items, the most promising ones first."""

        def worth(item: Item) -> tuple[bool, float]:
            expected = 0.2 if item.law.startswith("ORACLE") else 0.1 if "GRAD" in item.law else 0.02
            found = expected + self.kills[item] + 8 * self.own[module, item]
            return item.dtype not in self.last, found / (self.seconds[item] + 0.02)

        return sorted(self.seconds, key=worth, reverse=True)

    def learn(self, module: str, item: Item) -> None:
        """``item`` noticed a mutation of ``module``."""
        self.kills[item] += 1
        self.own[module, item] += 1


@dataclass(frozen=True, slots=True)
class Clean:
    """The exam of the unchanged backend: seconds of the items that hold, those that pass, what is wrong with others.

    ``reached`` are the functions that each item calls, ``at_import`` those that run when the package is imported.
    """

    seconds: dict[Item, float]
    passed: frozenset[Item]
    broken: dict[Item, str]
    reached: dict[Item, set[Function]]
    at_import: set[Function]

    def concerns(self, item: Item, mutation: Mutation) -> bool:
        """Whether a mutation can make a difference to an item: its function runs, or did when it was imported."""
        own = mutation.module, mutation.function
        return mutation.function == "<module>" or own in self.at_import or own in self.reached[item]


def sit(package: Package, laws: dict[str, Law], items: Sequence[Item], progress: Callable[[int], None]) -> Clean:
    """Every item once, which also fills the caches that forks inherit."""
    clean = Clean({}, frozenset(), {}, {}, set())
    passed = set()
    with reached(package) as at_import:
        package.import_anew(package.compiled())
    backend: Backend = import_module(package.name).backend
    for number, item in enumerate(items):
        began = time.perf_counter()
        forget(package)
        with reached(package) as functions:
            result = examine(laws[item.law], LiveSubject(backend, item.algorithm, item.dtype), item.level)
        if result.verdict in HOLDS:
            clean.seconds[item] = time.perf_counter() - began
            clean.reached[item] = functions
            if result.verdict is Verdict.PASS:
                passed.add(item)
        else:
            clean.broken[item] = f"{result.verdict.value}: {result.message}"
        progress(number + 1)
    return replace(clean, passed=frozenset(passed), at_import=at_import)


def _noticed(
    package: Package, codes: dict[str, CodeType], laws: dict[str, Law], order: Sequence[Item], passed: Container[Item]
) -> list[Any]:
    """[how, index of the item] of the first thing that goes wrong; in a child."""
    try:
        backend = package.import_anew(codes)
        subjects = {(i.algorithm, i.dtype): LiveSubject(backend, i.algorithm, i.dtype) for i in order}
    except BaseException as error:  # noqa: BLE001 - whatever a mutated module does when it is imported
        return [f"import raised {type(error).__name__}: {error}"[:300], -1]
    for number, item in enumerate(order):
        try:
            result = examine(laws[item.law], subjects[item.algorithm, item.dtype], item.level, limit=CASE_LIMIT)
        except BaseException as error:  # noqa: BLE001 - SystemExit and its like, out of mutated code
            return [f"raised {type(error).__name__}: {error}"[:300], number]
        # What was claimed and is no longer shows in every report.
        if result.verdict not in HOLDS or (result.verdict is Verdict.NOT_CLAIMED and item in passed):
            return [f"{result.verdict.value} {item}: {result.message.strip()}"[:400], number]
    return ["", -1]


def _limit_memory() -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return
    used = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _fork(work: Callable[[], list[Any]]) -> tuple[int, int]:
    """Process id and reading end of a child that writes what ``work`` gives as JSON."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        _limit_memory()
        found = json.dumps(work()).encode()
        while found:
            found = found[os.write(writing, found) :]
    finally:
        os._exit(0)


@dataclass(frozen=True, slots=True)
class _Job:
    pid: int
    mutation: Mutation
    order: list[Item]
    began: float
    received: bytearray


def run_mutations(
    package: Package,
    wanted: Sequence[tuple[Mutation, int]],
    laws: dict[str, Law],
    clean: Clean,
    order: Order,
    jobs: int,
    limit: float,
) -> Iterator[Outcome]:
    """The outcome of every mutation as it comes, ``jobs`` at a time; one that takes ``limit`` seconds is a hang."""
    codes, waiting, running = package.compiled(), list(reversed(wanted)), selectors.DefaultSelector()
    try:
        while waiting or running.get_map():
            while waiting and len(running.get_map()) < jobs:
                mutation, number = waiting.pop()
                items = [i for i in order.for_module(mutation.module) if clean.concerns(i, mutation)]

                def work(mutation: Mutation = mutation, number: int = number, items: list[Item] = items) -> list[Any]:
                    changed = codes | {mutation.module: package.changed(mutation, number)}
                    return _noticed(package, changed, laws, items, clean.passed)

                pid, reading = _fork(work)
                job = _Job(pid, mutation, items, time.perf_counter(), bytearray())
                running.register(reading, selectors.EVENT_READ, job)
            for key, _ in running.select(timeout=0.2):
                job = key.data
                if part := os.read(key.fd, 1 << 16):
                    job.received.extend(part)
                else:
                    running.unregister(key.fd)
                    yield _finished(key.fd, job, order)
            for key in list(running.get_map().values()):
                if time.perf_counter() - key.data.began > limit:
                    os.kill(key.data.pid, signal.SIGKILL)
    finally:
        for key in list((running.get_map() or {}).values()):
            os.kill(key.data.pid, signal.SIGKILL)
            os.waitpid(key.data.pid, 0)
        running.close()


def _finished(reading: int, job: _Job, order: Order) -> Outcome:
    os.close(reading)
    _, status = os.waitpid(job.pid, 0)
    seconds = time.perf_counter() - job.began
    if not job.received:
        by = os.waitstatus_to_exitcode(status)
        return Outcome(job.mutation, "hang" if by == -signal.SIGKILL else f"died with status {by}", "", seconds)
    how, index = json.loads(bytes(job.received))
    if index >= 0:
        order.learn(job.mutation.module, job.order[index])
    return Outcome(job.mutation, how, job.order[index].law if index >= 0 else "", seconds)
