"""Blind mutation: change a backend's own source in every small way there is, and see whether the exam notices.

``python -m translution.conformance.mutants.blind numpy``: each mutation is a fork of this process that sits the exam
until something fails. What survives must be explained in ``survivors.toml``.

Exit codes: 0, every survivor is explained and every explanation needed; 1, not so; 2, wrong use.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from translution.conformance.exam.journal import JsonLines
from translution.conformance.mutants.blind_points import Mutation
from translution.conformance.mutants.blind_survivors import Survivor, explanation, read_survivors
from translution.progress import Update, silently

MUTATION = tuple(field.name for field in fields(Mutation))
BACKENDS = ("reference", "numpy", "torch")
FIRST_DTYPES, LATER_DTYPES = ("float64", "float32"), ("bfloat16", "float16")
# Threads of a library do not survive a fork.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True, slots=True)
class Found:
    """A mutation, how it was noticed (empty for a survivor), and the explanation of a survivor."""

    mutation: Mutation
    how: str
    law: str
    seconds: float
    explained: Survivor | None = None

    @property
    def killed(self) -> bool:
        """Whether it was noticed."""
        return bool(self.how)

    @property
    def counts(self) -> bool:
        """Whether the net share counts it: noticed, or a survivor that should have been."""
        return self.killed or self.explained is None or self.explained.kind == "gap"

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        own = {"how": self.how, "law": self.law, "seconds": round(self.seconds, 3)}
        entry = self.explained
        return asdict(self.mutation) | own | {"explained": entry and {"kind": entry.kind, "reason": entry.reason}}


@dataclass(frozen=True, slots=True)
class BlindRun:
    """Outcomes of a backend's mutations; ``whole`` where none was left out, ``points`` is how many there are."""

    backend: str
    points: int
    found: tuple[Found, ...]
    stale: tuple[Survivor, ...]
    broken: tuple[str, ...]
    seconds: float

    @property
    def killed(self) -> int:
        """How many were noticed."""
        return sum(f.killed for f in self.found)

    @property
    def raw(self) -> float:
        """Share noticed of all that were run."""
        return self.killed / max(len(self.found), 1)

    @property
    def net(self) -> float:
        """Share noticed of those that are not explained as the same function."""
        return self.killed / max(sum(f.counts for f in self.found), 1)

    @property
    def unexplained(self) -> list[Found]:
        """Survivors without an entry."""
        return [f for f in self.found if not f.killed and f.explained is None]

    @property
    def holds(self) -> bool:
        """Whether survivors and entries are the same."""
        return bool(self.found) and not (self.unexplained or self.stale or self.broken)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "backend": self.backend,
            "points": self.points,
            "run": len(self.found),
            "killed": self.killed,
            "raw": self.raw,
            "net": self.net,
            "holds": self.holds,
            "seconds": round(self.seconds, 1),
            "stale": [asdict(entry) for entry in self.stale],
            "broken": list(self.broken),
            "mutations": [f.as_json() for f in self.found],
        }


class Journal(JsonLines):
    """Outcomes so far, under a line that says of what sources."""

    other = "other sources, laws or levels"

    def __init__(self, path: Path, heading: dict[str, Any]) -> None:
        super().__init__(path, heading, resume=True)
        self.known = dict[Mutation, Found]()
        for record in self.records:
            data = dict(record)
            mutation = Mutation(**{name: data.pop(name) for name in MUTATION})
            self.known[mutation] = Found(mutation, **data)

    def add(self, found: Found) -> None:
        """Keep an outcome."""
        self.write(asdict(found.mutation) | {"how": found.how, "law": found.law, "seconds": found.seconds})


def sampled(mutations: Sequence[Mutation], count: int | None) -> list[Mutation]:
    """``count`` of them, always the same ones, spread over everything; in source order."""
    if count is None:
        return list(mutations)
    chosen = set(sorted(mutations, key=lambda m: hashlib.sha256(repr(m).encode()).digest())[:count])
    return [m for m in mutations if m in chosen]


def survived(path: Path) -> set[Mutation]:
    """The survivors of an earlier run, from its JSON."""
    every = json.loads(path.read_text(encoding="utf-8"))["mutations"]
    return {Mutation(**{name: data[name] for name in MUTATION}) for data in every if not data["how"]}


def blind_run(
    backend: str,
    sample: int | None = None,
    jobs: int = 1,
    journal: Path | None = None,
    level: str = "quick",
    only: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    again: Path | None = None,
    progress: Update = silently,
) -> BlindRun:
    """Run the mutations of a backend; ``only`` names the laws and ``dtypes`` the dtypes, all where None; ``again`` is
    the JSON of an earlier run, of which only the survivors are run.

    Raises:
        ValueError: the journal is about something else, or the unchanged backend breaks every law.
    """
    from translution.conformance.exam.law import BUDGETS
    from translution.conformance.laws import all_laws
    from translution.conformance.mutants.blind_package import Package
    from translution.conformance.mutants.blind_run import Item, Order, run_mutations, sit
    from translution.registry import get_backend

    began, tell = time.perf_counter(), progress
    if "torch" in sys.modules or backend == "torch":
        import torch

        torch.set_num_threads(1)
    laws = {name: law for name, law in all_laws().items() if only is None or name in only}
    package, clean = Package.of(f"translution.backends.{backend}"), get_backend(backend)
    numbers = package.mutations()
    left = set() if again is None else survived(again)
    chosen = sampled([m for m in numbers if again is None or m in left], sample)
    asked = [d for d in (*FIRST_DTYPES, *LATER_DTYPES) if d in clean.dtypes and (dtypes is None or d in dtypes)]
    head = {
        "backend": backend, "sources": package.fingerprint, "level": level, "laws": sorted(laws), "dtypes": asked,
    }  # fmt: skip
    kept = None if journal is None else Journal(journal, head)
    items = [
        Item(law.id, algorithm, dtype, level)
        for dtype in asked
        for law in laws.values()
        if law.applies_to(dtype)
        for algorithm in clean.algorithms
    ]
    found: list[Found] = []
    known = {} if kept is None else kept.known
    survivors = read_survivors()
    # Shared with all forks.
    BUDGETS.kept = 1 << 16
    exam = sit(package, laws, items, lambda done: tell(f"{backend} unchanged", done, len(items)))
    if not exam.passed:
        raise ValueError(f"{backend} as it is passes no law: {next(iter(exam.broken.values()), '')}")
    order = Order(exam.seconds, frozenset(LATER_DTYPES))
    limit = 30 + 4 * jobs * sum(exam.seconds.values())
    found += [known[m] for m in chosen if m in known]
    rest = [(m, numbers[m]) for m in chosen if m not in known]
    for outcome in run_mutations(package, rest, laws, exam, order, jobs, limit):
        one = Found(outcome.mutation, outcome.how, outcome.law, outcome.seconds)
        found.append(one)
        if kept is not None:
            kept.add(one)
        tell(backend, len(found), len(chosen))
    place = {m: n for n, m in enumerate(chosen)}
    found = sorted(
        (replace(f, explained=None if f.killed else explanation(survivors, f.mutation)) for f in found),
        key=lambda f: place[f.mutation],
    )
    stale = _stale(survivors, package.name, numbers, found)
    broken = tuple(f"{item}: {why.strip().splitlines()[-1]}" for item, why in exam.broken.items())
    return BlindRun(backend, len(numbers), tuple(found), stale, broken, time.perf_counter() - began)


def _stale(
    survivors: Sequence[Survivor], package: str, every: dict[Mutation, int], found: Sequence[Found]
) -> tuple[Survivor, ...]:
    """Entries of the package whose mutations are gone, or all noticed. What a sample left out says nothing."""
    outcome = {f.mutation: f.killed for f in found}
    own = [s for s in survivors if s.module == package or s.module.startswith(f"{package}.")]
    return tuple(s for s in own if all(outcome.get(m, False) for m in every if s.explains(m)))


def show(run: BlindRun) -> None:
    """Print the table by module, what survives without an explanation, and entries that explain nothing."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    title = f"blind mutation of {run.backend}: {len(run.found):,} of {run.points:,} points"
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("module")
    for name in ("points", "noticed", "survive", "explained", "share", "net share"):
        table.add_column(name, justify="right")
    for module in dict.fromkeys(f.mutation.module for f in run.found):
        own = replace(run, found=tuple(f for f in run.found if f.mutation.module == module))
        _add_row(table, module.removeprefix("translution.backends."), own)
    table.add_section()
    _add_row(table, "all", run)
    console.print(table)
    laws: dict[str, int] = {}
    for f in run.found:
        if f.killed:
            by = f.law or f.how.split(":")[0][:40]
            laws[by] = laws.get(by, 0) + 1
    ranked = sorted(laws.items(), key=lambda pair: -pair[1])
    console.print("first noticed by: " + ", ".join(f"{escape(name)} {count}" for name, count in ranked))
    for f in run.unexplained:
        console.print(f"[bold red]survives without a reason[/] {escape(str(f.mutation))}")
    for entry in run.stale:
        console.print(f"[yellow]explained, but noticed or gone[/] {escape(str(entry))}")
    for line in run.broken:
        console.print(f"[bold red]the unchanged backend does not pass[/] {escape(line)}")
    console.print(f"{100 * run.raw:.1f}% noticed, {100 * run.net:.1f}% of those that can be, in {run.seconds:.0f} s")


def _add_row(table: Any, name: str, run: BlindRun) -> None:
    alive = len(run.found) - run.killed
    explained = alive - len(run.unexplained)
    table.add_row(
        name, *(f"{n:,}" for n in (len(run.found), run.killed, alive, explained)),
        f"{100 * run.raw:.1f}%", f"{100 * run.net:.1f}%",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m translution.conformance.mutants.blind", description=__doc__)
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("--sample", type=int, metavar="N", help="only so many mutations, always the same ones")
    parser.add_argument("--jobs", type=int, default=2, metavar="J", help="processes at a time; 2 if not given")
    parser.add_argument("--level", choices=("quick", "full"), default="quick", help="of the exam; quick if not given")
    parser.add_argument("--law", action="append", metavar="LAW", help="only these laws; may be given again")
    parser.add_argument("--dtype", action="append", choices=(*FIRST_DTYPES, *LATER_DTYPES), help="only these dtypes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep outcomes here, and go on from what is there")
    parser.add_argument("--again", type=Path, metavar="FILE", help="only what survived in this JSON of an earlier run")
    given = parser.parse_args(arguments)
    if not hasattr(os, "fork"):
        parser.error("this system has no fork")
    from translution.progress import Progress

    with Progress() as progress:
        try:
            run = blind_run(
                given.backend, given.sample, given.jobs, given.resume, given.level, given.law, given.dtype,
                given.again, progress.update,
            )  # fmt: skip
        except ValueError as error:
            parser.error(str(error))
    show(run)
    if given.json is not None:
        given.json.write_text(json.dumps(run.as_json(), indent=2) + "\n", encoding="utf-8")
    return 0 if run.holds else 1


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        # Libraries read these when they are loaded, which has happened.
        os.execve(sys.executable, [sys.executable, "-m", "translution.conformance.mutants.blind", *sys.argv[1:]],
                  {**os.environ, **ONE_THREAD})  # fmt: skip
    sys.exit(main())
