"""Whether the exam can tell right from wrong: every law must catch the mutants that it names, every mutant must be
caught, and correct backends must pass.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from translution.conformance.exam.examine import examine
from translution.conformance.exam.law import FULL, QUICK, Law
from translution.conformance.exam.report import HOLDS, Result, Verdict
from translution.conformance.exam.subject import LiveSubject
from translution.conformance.laws import all_laws
from translution.conformance.mutants.catalogue import catalogue
from translution.conformance.mutants.mutant import Mutant
from translution.conformance.mutants.naive import Naive
from translution.conformance.mutants.orders import orders
from translution.conformance.mutants.processes import in_processes
from translution.progress import Update
from translution.registry import Backend

DTYPES = ("float64", "float32", "bfloat16", "float16")
LIMIT = 20.0


@dataclass(frozen=True, slots=True)
class Kill:
    """A law that was asked about a mutant; ``level`` is empty where it did not notice.

    ``named``: the law says of itself that it does. ``cases`` it took, ``message`` is what the law had to say.
    """

    law: str
    named: bool
    level: str = ""
    dtype: str = ""
    cases: int = 0
    message: str = ""

    @property
    def noticed(self) -> bool:
        """Whether the law failed, as it should."""
        return bool(self.level)


@dataclass(frozen=True, slots=True)
class Sought:
    """A mutant, and the laws that it was given to: those that name it, else others until one noticed."""

    mutant: str
    mistake: str
    clause: str
    family: str
    kills: tuple[Kill, ...]

    @property
    def killed(self) -> bool:
        """Whether some law noticed."""
        return any(kill.noticed for kill in self.kills)


@dataclass(frozen=True, slots=True)
class Sat:
    """A correct backend that sat a law, and the verdict."""

    backend: str
    law: str
    dtype: str
    verdict: str
    cases: int
    message: str


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What was found. ``laws`` are all laws that were at hand."""

    tested: tuple[Sought, ...]
    sat: tuple[Sat, ...]
    laws: tuple[str, ...]
    seconds: float = 0.0

    @property
    def missed(self) -> list[tuple[str, str]]:
        """Laws and the mutants that they name and did not notice."""
        return [(k.law, t.mutant) for t in self.tested for k in t.kills if k.named and not k.noticed]

    @property
    def alive(self) -> list[str]:
        """Mutants that no law noticed."""
        return [t.mutant for t in self.tested if not t.killed]

    @property
    def idle(self) -> list[str]:
        """Laws that noticed nothing that they name: nothing shows that they can fail."""
        busy = {k.law for t in self.tested for k in t.kills if k.named and k.noticed}
        return [law for law in self.laws if law not in busy]

    @property
    def blamed(self) -> list[Sat]:
        """Correct backends that a law did not let pass."""
        return [s for s in self.sat if Verdict(s.verdict) not in HOLDS]

    @property
    def holds(self) -> bool:
        """Whether there is no fault at all."""
        return bool(self.tested) and not self.faults()

    def faults(self) -> list[str]:
        """One sentence each."""
        return [
            *(f"{law} names {mutant} and does not notice it" for law, mutant in self.missed),
            *(f"{mutant} is noticed by no law" for mutant in self.alive),
            *(f"{law} notices no mutant that it names: nothing shows that it can fail" for law in self.idle),
            *(f"{s.backend} is correct, and {s.law} says {s.verdict} in {s.dtype}: {s.message}" for s in self.blamed),
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "holds": self.holds,
            "faults": self.faults(),
            "laws": list(self.laws),
            "mutants": [asdict(t) for t in self.tested],
            "correct": [asdict(s) for s in self.sat],
            "seconds": round(self.seconds, 1),
        }

    def markdown_table(self) -> str:
        """Who notices which mistake, after how many cases; float64 and level quick where nothing else is said."""
        lines = ["| mutant | it … | clause | noticed by (cases needed) |", "|---|---|---|---|"]
        for t in self.tested:
            by = ", ".join(_in_words(kill) for kill in t.kills if kill.noticed) or "**nobody**"
            lines.append(f"| `{t.mutant}` | {t.mistake.replace('|', chr(92) + '|')} | {t.clause} | {by} |")
        return "\n".join(lines) + "\n"


def _in_words(kill: Kill) -> str:
    where = [kill.dtype] * (kill.dtype != "float64") + [kill.level] * (kill.level != QUICK)
    return f"{kill.law} ({', '.join([str(kill.cases), *where])})"


def _needed(result: Result) -> int:
    """Cases until the law failed; what is judged over all cases needs them all."""
    return result.cases + (result.counterexample is not None)


def confront(law: Law, mutant: Mutant, levels: Iterable[str] = (QUICK, FULL), dtypes: Iterable[str] = DTYPES) -> Kill:
    """Let a law look for a mutant: dtype after dtype, with few cases first."""
    named, backend = mutant.name in law.kills, mutant.backend
    chosen = [d for d in dtypes if law.applies_to(d) and d in backend.dtypes]
    for level in levels:
        for dtype in chosen:
            for algorithm in backend.algorithms:
                result = examine(law, LiveSubject(backend, algorithm, dtype), level, limit=LIMIT)
                if result.verdict is Verdict.FAIL:
                    return Kill(law.id, named, level, dtype, _needed(result), result.message)
    return Kill(law.id, named)


def search(mutant: Mutant, laws: Mapping[str, Law], levels: Sequence[str] = (QUICK, FULL)) -> Sought:
    """Every law that names a mutant; where none of them notices, the others until one does."""
    kills = [confront(law, mutant, levels) for law in laws.values() if mutant.name in law.kills]
    if not any(kill.noticed for kill in kills):
        others = [law for law in laws.values() if mutant.name not in law.kills]
        found = (confront(law, mutant, (level,)) for level in levels for law in others)
        kills += [kill for kill in (next((k for k in found if k.noticed), None),) if kill is not None]
    return Sought(mutant.name, mutant.mistake, mutant.clause, mutant.family, tuple(kills))


def sit(backend: Backend, dtype: str, laws: Iterable[Law]) -> Iterator[Sat]:
    """A correct backend before every law in one dtype."""
    for law in laws:
        if law.applies_to(dtype):
            for algorithm in backend.algorithms:
                result = examine(law, LiveSubject(backend, algorithm, dtype), QUICK)
                message = (result.message.strip().splitlines() or [""])[-1]
                yield Sat(backend.name, law.id, dtype, result.verdict.value, result.cases, message)


def correct() -> dict[str, Backend]:
    """Backends without a mistake: the one that mutants are made of, and its other orders."""
    return {"naive": Naive(), **orders()}


@dataclass(frozen=True, slots=True)
class _Task:
    """A mutant by name; or a correct backend in a dtype, before one law."""

    name: str
    dtype: str = ""
    law: str = ""


def _work(task: _Task) -> tuple[_Task, Sought | list[Sat]]:
    laws = all_laws()
    if task.law:
        return task, list(sit(correct()[task.name], task.dtype, [laws[task.law]]))
    return task, search(catalogue()[task.name], laws)


def selftest(jobs: int = 2, progress: Update | None = None) -> SelfTest:
    """All mutants, all laws and all correct backends; ``jobs`` processes."""
    began, laws = time.perf_counter(), all_laws()
    mutants = [_Task(name) for name in catalogue()]
    # The slow ones first.
    clean = [
        _Task(name, dtype, law.id)
        for law in sorted(laws.values(), key=lambda law: -law.cases[QUICK])
        for name in correct()
        for dtype in DTYPES
        if law.applies_to(dtype)
    ]
    tested: dict[str, Sought] = {}
    sat: list[Sat] = []
    every = [*clean, *mutants]
    for done, (task, found) in enumerate(in_processes(_work, every, jobs), 1):
        if isinstance(found, Sought):
            tested[task.name] = found
        else:
            sat += found
        if progress is not None:
            progress("self-test", done, len(every))
    sat.sort(key=lambda s: (s.backend, list(laws).index(s.law), DTYPES.index(s.dtype)))
    return SelfTest(tuple(tested[task.name] for task in mutants), tuple(sat), tuple(laws), time.perf_counter() - began)


def show(found: SelfTest) -> None:
    """Print the mutants with who noticed them, and every fault."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    table = Table(title="what the laws notice", title_justify="left", title_style="bold", pad_edge=False)
    for name in ("mutant", "it ...", "clause", "noticed by (cases needed)"):
        table.add_column(name, overflow="fold")
    for t in found.tested:
        by = ", ".join(_in_words(kill) for kill in t.kills if kill.noticed)
        missed = ", ".join(kill.law for kill in t.kills if kill.named and not kill.noticed)
        shown = escape(by) or "[bold red]nobody[/]"
        table.add_row(t.mutant, t.mistake, t.clause, shown + (f" [bold red]not by {missed}[/]" if missed else ""))
    console.print(table)
    for fault in found.faults():
        console.print(f"[bold red]fault[/] {escape(fault)}")
    killed, passed = len(found.tested) - len(found.alive), len(found.sat) - len(found.blamed)
    colour = "green" if found.holds else "red"
    console.print(
        f"[bold {colour}]{killed} of {len(found.tested)} mutants are noticed[/] by {len(found.laws)} laws; correct "
        f"backends pass {passed} of {len(found.sat)} times; {found.seconds:.0f} s"
    )


def run_selftest(json_file: Path | None = None, jobs: int = 2) -> bool:
    """Run it, show it, write it where asked; whether it holds."""
    from translution.progress import Progress as Bars

    with Bars() as bars:
        found = selftest(jobs, bars.update)
    show(found)
    if json_file is not None:
        json_file.write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")
    return found.holds
