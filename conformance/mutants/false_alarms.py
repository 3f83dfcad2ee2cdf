"""Whether the error bounds ever call a correct implementation wrong: three orders of summation, many cases.

``python -m translution.conformance.mutants.false_alarms --cases 2000``. Exit codes: 0, no case is beyond its bound and
no group of cases beyond the ratio of the law QUALITY; 1, some are; 2, wrong use.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from translution.conformance.comparison import ComparisonError, share
from translution.conformance.exam.draws import Rejected, SeededDraws
from translution.conformance.exam.question import Answer
from translution.conformance.mutants.processes import in_processes

DTYPES = ("float64", "float32", "float16", "bfloat16")
# Every so many cases gradients are asked for too.
GRADIENTS = 4
CHUNK = 50
GROUP = 36
SALT = "false alarms"


@dataclass(frozen=True, slots=True)
class Task:
    """Cases ``first`` to ``last`` in one dtype, or, for the law QUALITY, that group of cases."""

    dtype: str
    first: int
    last: int
    quality: bool = False


@dataclass(frozen=True, slots=True)
class Used:
    """What one order used of its bounds in one dtype: the worst share of each case, of results and of gradients.

    ``ratios`` are those of the law QUALITY, group after group; ``beyond`` describes the cases that broke a bound.
    """

    dtype: str
    order: str
    outs: tuple[float, ...] = ()
    gradients: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    beyond: tuple[str, ...] = ()

    def __add__(self, other: Used) -> Used:
        joined = {n: getattr(self, n) + getattr(other, n) for n in ("outs", "gradients", "ratios", "beyond")}
        return Used(self.dtype, self.order, **joined)

    @property
    def alarms(self) -> int:
        """Cases beyond a bound."""
        return len(self.beyond)

    @property
    def coarse(self) -> int:
        """Groups beyond the ratio of the law QUALITY."""
        from translution.conformance.laws.quality import RATIO

        return sum(not ratio <= RATIO[self.dtype] for ratio in self.ratios)

    def as_json(self) -> dict[str, Any]:
        """Plain data: figures rather than every case."""
        return {
            "dtype": self.dtype,
            "order": self.order,
            "cases": len(self.outs),
            "worst": max(self.outs, default=0.0),
            "median": median(self.outs or (0.0,)),
            "gradient_cases": len(self.gradients),
            "gradient_worst": max(self.gradients, default=0.0),
            "gradient_median": median(self.gradients or (0.0,)),
            "alarms": self.alarms,
            "beyond": list(self.beyond),
            "quality_groups": len(self.ratios),
            "quality_worst": max(self.ratios, default=0.0),
            "quality_alarms": self.coarse,
        }


def measured(task: Task) -> list[Used]:
    """What every order uses of its bounds on the cases of a task."""
    return _qualities(task) if task.quality else _shares(task)


def _shares(task: Task) -> list[Used]:
    from translution.conformance.error_model import budget
    from translution.conformance.exam.subject import LiveSubject
    from translution.conformance.mutants.orders import orders
    from translution.conformance.strategies import draw_question

    found = [Used(task.dtype, name) for name in orders()]
    for number in range(task.first, task.last):
        backward = number % GRADIENTS == 0
        try:
            question = draw_question(SeededDraws(number, SALT), task.dtype, cotangent=backward)
        except Rejected:
            continue
        q = question
        bound = budget(q.operator, q.params, q.x, q.y, q.mask, q.cotangent, task.dtype)
        values = {"out": bound.value, **bound.gradient_values}
        bounds = {"out": bound.out, **bound.gradients}
        for place, (name, backend) in enumerate(orders().items()):
            subject = LiveSubject(backend, "pairwise", task.dtype)
            answer = subject.vjp(question) if backward else subject.run(question)
            shares = {part: _share(got, values[part], bounds[part]) for part, got in _parts(answer)}
            backwards = tuple(s for part, s in shares.items() if part != "out")
            worst = max(shares.values())
            beyond = () if worst <= 1 else (f"case {number} uses {worst:.3g} of a bound: {question}",)
            own = Used(task.dtype, name, (shares["out"],), (max(backwards),) if backwards else (), (), beyond)
            found[place] = found[place] + own
    return found


def _parts(answer: Answer) -> list[tuple[str, Any]]:
    return [("out", answer.out), *answer.gradients.items()]


def _share(got: Any, want: Any, bound: Any) -> float:
    """Infinite where the two can't be compared."""
    try:
        return share("", got, want, bound)
    except ComparisonError:
        return math.inf


def _qualities(task: Task) -> list[Used]:
    """The ratios of one group of cases, drawn as the law QUALITY draws them in an edition of its own."""
    from translution.conformance.exam.examine import draws_for, run_case
    from translution.conformance.exam.subject import LiveSubject
    from translution.conformance.laws import all_laws
    from translution.conformance.mutants.orders import orders

    law = all_laws()["QUALITY"]
    found = []
    for name, backend in orders().items():
        subject = LiveSubject(backend, "pairwise", task.dtype)
        cases: list[Any] = []
        number = 0
        while len(cases) < GROUP:
            draws = draws_for(law, number, f"{SALT} {task.first}")
            number += 1
            try:
                cases.append(run_case(law, subject, draws)[1])
            except Rejected:
                continue
        found.append(Used(task.dtype, name, ratios=(ratio(cases),)))
    return found


def ratio(cases: Sequence[Any]) -> float:
    """The largest quotient, over the groups of structure that the law keeps apart, of root mean squares."""
    ratios = []
    for group in dict.fromkeys(case.group for case in cases):
        told = [case for case in cases if case.group == group and case.count]
        mine, plain = (math.fsum(getattr(case, n) / case.count for case in told) for n in ("subject", "plain"))
        if mine or plain:
            ratios.append(math.sqrt(mine / plain) if plain else math.inf)
    return max(ratios, default=0.0)


def false_alarms(
    cases: int,
    jobs: int = 1,
    dtypes: Sequence[str] = DTYPES,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Used]:
    """Every order in every dtype, on ``cases`` cases and on as many groups of 36 as they fill."""
    tasks = [Task(dtype, n, min(n + CHUNK, cases)) for n in range(0, cases, CHUNK) for dtype in dtypes]
    tasks += [Task(dtype, n, n, True) for n in range(cases // GROUP) for dtype in dtypes if dtype != "float64"]
    total: dict[tuple[str, str], Used] = {}
    for done, found in enumerate(in_processes(measured, tasks, jobs), 1):
        for used in found:
            key = used.dtype, used.order
            total[key] = total[key] + used if key in total else used
        if progress is not None:
            progress("false alarms", done, len(tasks))
    return [total[key] for key in sorted(total, key=lambda key: (DTYPES.index(key[0]), key[1]))]


def hold(found: Iterable[Used]) -> bool:
    """Whether nothing was called wrong."""
    every = list(found)
    return bool(every) and not any(used.alarms or used.coarse for used in every)


def show(found: Sequence[Used]) -> None:
    """Print a table, and the cases that were called wrong."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    title = "correct orders of summation, as shares of their bounds"
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for name in ("dtype", "order"):
        table.add_column(name)
    for name in ("cases", "beyond", "worst", "median", "gradients", "worst", "median", "groups", "beyond", "ratio"):
        table.add_column(name, justify="right")
    for used in found:
        data = used.as_json()
        ratios = (f"{data['quality_groups']:,}", f"{used.coarse:,}", f"{data['quality_worst']:.2f}")
        table.add_row(
            used.dtype, used.order, f"{data['cases']:,}", f"{used.alarms:,}", f"{data['worst']:.3f}",
            f"{data['median']:.3f}", f"{data['gradient_cases']:,}", f"{data['gradient_worst']:.3f}",
            f"{data['gradient_median']:.3f}", *(ratios if used.ratios else ("", "", "")),
        )  # fmt: skip
    console.print(table)
    for used in found:
        for line in used.beyond:
            console.print(f"[bold red]{used.dtype}, {used.order}[/] {escape(line)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m translution.conformance.mutants.false_alarms", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000, metavar="N", help="in each dtype; 2000 if not given")
    parser.add_argument("--jobs", type=int, default=2, metavar="J", help="processes; 2 if not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    given = parser.parse_args(arguments)
    if min(given.cases, given.jobs) < 1:
        parser.error("--cases and --jobs are at least 1")
    from translution.progress import Progress

    with Progress() as progress:
        found = false_alarms(given.cases, given.jobs, progress=progress.update)
    show(found)
    if given.json is not None:
        data = {"holds": hold(found), "rows": [used.as_json() for used in found]}
        given.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return 0 if hold(found) else 1


if __name__ == "__main__":
    sys.exit(main())
