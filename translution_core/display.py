"""What the command line shows: tables and progress bars. ``--json`` writes the same data."""

import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from translution.algorithms import Request
from translution.errors import NotSupported
from translution.execution import Candidate
from translution.registry import BACKENDS, get_backend
from translution.spec import Lattice
from translution.spec.serialization import operator_to_data

if TYPE_CHECKING:
    from translution.conformance.results import Row

PACKAGES = ("numpy", "torch", "triton", "transformers", "mlxtend", "hypothesis", "matplotlib", "safetensors")


class Progress:
    """Progress bars on standard error, one per label; plain silence where it is not a terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=Console(stderr=True), transient=True)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bars.stop()

    def update(self, label: str, done: int, total: int) -> None:
        """``done`` of ``total`` of what ``label`` names."""
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[label], completed=done, total=total)


def _console() -> Console:
    console = Console()
    # A pipe has no width; tables are then as wide as they need.
    return console if console.is_terminal else Console(width=160)


def _share(row: "Row") -> str:
    if not row.cases:
        return "-"
    if row.worst_error == 0:
        return "exact"
    return f"{100 * row.worst_share:.2g}% of bound"


def show_rows(rows: "Iterable[Row]") -> bool:
    """Print one table per section and a closing line; whether everything holds."""
    console, found = _console(), list(rows)
    for section in dict.fromkeys(row.section for row in found):
        table = Table(title=section, title_justify="left", title_style="bold", pad_edge=False)
        for name in ("subject", "backend", "algorithm"):
            table.add_column(name)
        table.add_column("cases", justify="right")
        table.add_column("worst error", justify="right")
        table.add_column("share", justify="right")
        table.add_column("verdict")
        table.add_column("note", overflow="fold")
        previous = ""
        for row in (r for r in found if r.section == section):
            verdict = ("[green]holds[/]" if row.cases else "[yellow]not run[/]") if row.passed else "[bold red]FAILS[/]"
            table.add_row(
                "" if row.subject == previous else row.subject,
                row.backend,
                row.algorithm,
                f"{row.cases:,}" if row.cases else "-",
                f"{row.worst_error:.1e}" if row.cases else "-",
                _share(row),
                verdict,
                row.detail,
            )
            previous = row.subject
        console.print(table)
    failed, tried = [row for row in found if not row.passed], sum(row.cases for row in found)
    run = [row for row in found if row.cases]
    holds = not failed and bool(run)
    worst = max((row.worst_share for row in run), default=0.0)
    good = sum(row.passed for row in run)
    console.print(
        f"[bold {'green' if holds else 'red'}]{good} of {len(run)} rows hold[/], "
        f"{tried:,} cases, worst error {100 * worst:.2g}% of its bound."
    )
    return holds


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def explanation_json(request: Request, candidates: Iterable[Candidate]) -> dict[str, Any]:
    """The explanation as plain data."""
    operator = request.operator
    return {
        "operator": operator_to_data(operator),
        "batch": request.batch,
        "dtype": request.dtype,
        "parameters": {name: list(shape) for name, shape in operator.parameters.items()},
        "num_parameters": operator.num_parameters,
        "relative_roles": list(request.normal_form.relative_roles),
        "candidates": [
            {
                "backend": c.backend,
                "algorithm": c.algorithm,
                "runs": not c.reasons,
                "reasons": list(c.reasons),
                "flops": None if c.cost is None else c.cost.flops,
                "working_bytes": None if c.cost is None else c.cost.working_bytes,
                "parameter_bytes": None if c.cost is None else c.cost.parameter_bytes,
            }
            for c in candidates
        ],
    }


def show_explanation(request: Request, candidates: Iterable[Candidate]) -> None:
    """Print the normal form, the parameters and the candidates."""
    console, operator, form = _console(), request.operator, request.normal_form
    layout = operator.layout
    place = f"Lattice {layout.grid}" if isinstance(layout, Lattice) else "PairTable"
    console.print(
        f"[bold]{place}[/]: {layout.num_queries:,} queries, {layout.num_keys:,} keys, "
        f"{layout.num_classes:,} displacement classes; {operator.num_heads} heads"
    )
    table = Table(title="normal form", title_justify="left", title_style="bold", pad_edge=False)
    for name in ("role", "features per head", "terms (added up in their slice of a head)"):
        table.add_column(name)
    for role in (*form.roles, *((form.output,) if form.output else ())):
        terms = [
            f"[{t.start}:{t.start + t.width}] " + " . ".join(("y", *(n for n in (t.before, t.table, t.after) if n)))
            for t in role.linears
        ]
        terms += [f"[{t.start}:{t.start + t.width}] {t.name}" for t in role.constants]
        terms += [f"[{t.start}:{t.start + t.width}] rotated, base {t.base:g}" for t in role.rotations]
        table.add_row(role.name, str(role.head_dim), "\n".join(t.replace("[", "\\[") for t in terms))
    console.print(table)
    table = Table(
        title=f"{operator.num_parameters:,} parameters", title_justify="left", title_style="bold", pad_edge=False
    )
    for name in ("parameter", "shape"):
        table.add_column(name)
    for name, shape in operator.parameters.items():
        table.add_row(name, " x ".join(str(n) for n in shape))
    console.print(table)
    table = Table(
        title=f"candidates at batch {request.batch}, {request.dtype} (estimates for one forward pass)",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    for name, justify in (("backend", "left"), ("algorithm", "left"), ("GFLOP", "right"), ("working memory", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    table.add_column("runs here", overflow="fold")
    for c in candidates:
        table.add_row(
            c.backend,
            c.algorithm or "-",
            "-" if c.cost is None else f"{c.cost.flops / 1e9:,.3g}",
            "-" if c.cost is None else _bytes(c.cost.working_bytes),
            "[green]yes[/]" if not c.reasons else "no: " + "; ".join(c.reasons),
        )
    console.print(table)


def diagnosis() -> dict[str, Any]:
    """What is installed and which backends run here."""
    packages: dict[str, str | None] = {}
    for name in ("translution", *PACKAGES):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    backends: dict[str, dict[str, Any]] = {}
    for name in BACKENDS:
        try:
            backend = get_backend(name)
        except NotSupported as error:
            backends[name] = {"runs": False, "reasons": list(error.reasons), "algorithms": [], "dtypes": []}
            continue
        reasons = backend.unavailable()
        backends[name] = {
            "runs": not reasons,
            "reasons": reasons,
            "algorithms": list(backend.algorithms),
            "dtypes": list(backend.dtypes),
        }
    machine = {"python": sys.version.split()[0], "system": platform.system(), "processor": platform.machine()}
    return {"machine": machine, "packages": packages, "backends": backends}


def show_diagnosis(found: dict[str, Any]) -> None:
    """Print a diagnosis."""
    console = _console()
    console.print(" ".join(f"{name} {value}" for name, value in found["machine"].items()))
    table = Table(title="packages", title_justify="left", title_style="bold", pad_edge=False)
    for name in ("package", "version"):
        table.add_column(name)
    for name, installed in found["packages"].items():
        table.add_row(name, installed or "[yellow]not installed[/]")
    console.print(table)
    table = Table(title="backends", title_justify="left", title_style="bold", pad_edge=False)
    for name in ("backend", "algorithms", "dtypes"):
        table.add_column(name)
    table.add_column("runs here", overflow="fold")
    for name, entry in found["backends"].items():
        runs = "[green]yes[/]" if entry["runs"] else "no: " + "; ".join(entry["reasons"])
        table.add_row(name, ", ".join(entry["algorithms"]), ", ".join(entry["dtypes"]), runs)
    console.print(table)
