"""What the command line shows: tables. ``--json`` writes the same data."""

import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from translution.algorithms import Cost, Request
from translution.errors import NotSupported
from translution.execution import Candidate
from translution.registry import BACKENDS, get_backend
from translution.spec import Lattice
from translution.spec.serialization import operator_to_data

if TYPE_CHECKING:
    from translution.cheaper import Fit
    from translution.conformance.exam.law import Law
    from translution.conformance.results import Row

PACKAGES = (
    "numpy", "torch", "llvmlite", "triton", "transformers", "mlxtend", "hypothesis", "matplotlib", "safetensors",
)  # fmt: skip


def new_console() -> Console:
    console = Console()
    # A pipe has no width; tables are then as wide as they need.
    return console if console.is_terminal else Console(width=160)


def titled_table(title: str, *columns: str, numbers: Iterable[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    right = set(numbers)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def _share(row: "Row") -> str:
    return "exact" if row.worst_error == 0 else f"{100 * row.worst_share:.2g}%"


def _verdict(row: "Row") -> str:
    if row.cases:
        return "[green]holds[/]" if row.passed else "[bold red]FAILS[/]"
    return "[yellow]not compared[/]" if row.passed else "[bold red]not compared[/]"


def _matrix(title: str, rows: "list[Row]") -> Table:
    """One line per subject, one column per backend and algorithm: the worst error as a share of its bound."""
    ways = list(dict.fromkeys((row.backend, row.algorithm) for row in rows if row.cases))
    shown = [f"{backend}\n{algorithm}" for backend, algorithm in ways]
    table = titled_table(
        title, "subject", "compared with", "cases", "exact", *shown, numbers=("cases", "exact", *shown)
    )
    for subject in dict.fromkeys(row.subject for row in rows if row.cases):
        own = {(row.backend, row.algorithm): row for row in rows if row.subject == subject}
        peers = ", ".join(dict.fromkeys(row.peer for row in own.values() if row.peer))
        cells = [
            "" if (row := own.get(way)) is None else f"[green]{_share(row)}[/]" if row.passed else "[bold red]FAILS[/]"
            for way in ways
        ]
        cases, exact = (sum(getattr(row, name) for row in own.values()) for name in ("cases", "exact_cases"))
        table.add_row(subject, peers, f"{cases:,}", f"{exact:,}" if exact else "", *cells)
    return table


def _listing(title: str, rows: "list[Row]") -> Table:
    numbers = ("cases", "worst error", "of its bound")
    table = titled_table(title, "subject", "backend", "algorithm", *numbers, "verdict", "note", numbers=numbers)
    for row in rows:
        figures = (f"{row.cases:,}", f"{row.worst_error:.1e}", _share(row)) if row.cases else ("", "", "")
        note = "; ".join(part for part in (row.peer, row.detail) if part)
        table.add_row(row.subject, row.backend, row.algorithm, *figures, _verdict(row), note)
    return table


def show_rows(rows: "Iterable[Row]") -> bool:
    """Print the sections and a closing line; whether everything holds."""
    console, found = new_console(), list(rows)
    for section in dict.fromkeys(row.section for row in found):
        own = [row for row in found if row.section == section]
        if len({(row.backend, row.algorithm) for row in own if row.cases}) > 1:
            console.print(_matrix(f"{section}: worst error as a share of its bound", own))
            own = [row for row in own if not row.passed or not row.cases]
            section = f"{section}: what was not compared, or failed"
        if own:
            console.print(_listing(section, own))
    run = [row for row in found if row.cases]
    holds = all(row.passed for row in found) and bool(run)
    worst, colour = max((row.worst_share for row in run), default=0.0), "green" if holds else "red"
    console.print(
        f"[bold {colour}]{sum(row.passed for row in run)} of {len(run)} comparisons hold[/]: "
        f"{sum(row.cases for row in run):,} cases, {sum(row.exact_cases for row in run):,} of them for equality; "
        f"the worst error is {100 * worst:.2g}% of its bound."
    )
    if partial := [row for row in run if "not claimed" in row.detail]:
        console.print(
            f"[dim]{len(partial)} comparisons leave out what their backend does not claim; --json says what.[/]"
        )
    if missing := [row for row in found if not row.cases]:
        console.print(f"[bold yellow]{len(missing)} could not be compared[/]: the table says why.")
    return holds


def show_laws(laws: "Iterable[Law]") -> None:
    """Print every law with its statement and the clauses that it checks."""
    found = list(laws)
    table = titled_table(f"{len(found)} laws", "law", "clauses", "statement", "cases", numbers=("cases",))
    for law in found:
        table.add_row(law.id, ", ".join(law.clauses), law.statement, " / ".join(str(n) for n in law.cases.values()))
    new_console().print(table)


def formatted_bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def _cost_data(cost: Cost | None) -> dict[str, Any]:
    names = ("flops", "working_bytes", "parameter_bytes", "traffic_bytes", "counted")
    return {name: None if cost is None else getattr(cost, name) for name in names}


def explanation_json(
    request: Request, candidates: Iterable[Candidate], fits: "Iterable[Fit] | None" = None
) -> dict[str, Any]:
    """The explanation as plain data; ``fits``, where nothing did, is what would."""
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
                **_cost_data(c.cost),
            }
            for c in candidates
        ],
    } | ({} if fits is None else {"fits": [_fit_data(fit) for fit in fits]})


def _fit_data(fit: "Fit") -> dict[str, Any]:
    return {
        "change": fit.change,
        "operator": operator_to_data(fit.request.operator),
        "batch": fit.request.batch,
        "backend": fit.backend,
        "algorithm": fit.algorithm,
        **_cost_data(fit.cost),
    }


def show_fits(fits: "Iterable[Fit]", limit: int) -> None:
    """Print what would fit."""
    found = list(fits)
    if not found:
        new_console().print(f"Nothing that is known to be cheaper fits into {formatted_bytes(limit)} either.")
        return
    numbers = ("parameters", "memory in all")
    title = f"what fits into {formatted_bytes(limit)}: of each kind the least change"
    table = titled_table(title, "change", "backend", "algorithm", *numbers, numbers=numbers)
    for fit in found:
        count = f"{fit.request.operator.num_parameters:,}"
        table.add_row(fit.change, fit.backend, fit.algorithm, count, formatted_bytes(fit.cost.total_bytes))
    new_console().print(table)


def _cost_cells(cost: Cost | None) -> tuple[str, str, str]:
    if cost is None:
        return "-", "-", "-"
    about = "" if cost.counted else "~ "
    traffic = "" if cost.traffic_bytes is None else formatted_bytes(cost.traffic_bytes)
    return f"{about}{cost.flops / 1e9:,.3g}", traffic, f"{about}{formatted_bytes(cost.working_bytes)}"


def show_explanation(request: Request, candidates: Iterable[Candidate]) -> None:
    """Print the normal form, the parameters and the candidates."""
    console, operator, form = new_console(), request.operator, request.normal_form
    layout = operator.layout
    place = f"Lattice {layout.grid}" if isinstance(layout, Lattice) else "PairTable"
    console.print(
        f"[bold]{place}[/]: {layout.num_queries:,} queries, {layout.num_keys:,} keys, "
        f"{layout.num_classes:,} displacement classes; {operator.num_heads} heads"
    )
    table = titled_table("normal form", "role", "features per head", "terms (added up in their slice of a head)")
    for role in (*form.roles, *((form.output,) if form.output else ())):
        terms = [
            f"[{t.start}:{t.start + t.width}] " + " . ".join(("y", *(n for n in (t.before, t.table, t.after) if n)))
            for t in role.linears
        ]
        terms += [f"[{t.start}:{t.start + t.width}] {t.name}" for t in role.constants]
        terms += [f"[{t.start}:{t.start + t.width}] rotated, base {t.base:g}" for t in role.rotations]
        table.add_row(role.name, str(role.head_dim), "\n".join(t.replace("[", "\\[") for t in terms))
    console.print(table)
    table = titled_table(f"{operator.num_parameters:,} parameters", "parameter", "shape")
    for name, shape in operator.parameters.items():
        table.add_row(name, " x ".join(str(n) for n in shape))
    console.print(table)
    numbers = ("GFLOP", "read and written", "working memory")
    table = titled_table(
        f"candidates at batch {request.batch}, {request.dtype}: "
        f"{'forward and backward' if request.gradient else 'forward'}; ~ marks estimates, the others were counted",
        *("backend", "algorithm", *numbers, "runs here"),
        numbers=numbers,
    )
    for c in candidates:
        table.add_row(
            c.backend,
            c.algorithm or "-",
            *_cost_cells(c.cost),
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
    console = new_console()
    console.print(" ".join(f"{name} {value}" for name, value in found["machine"].items()))
    table = titled_table("packages", "package", "version")
    for name, installed in found["packages"].items():
        table.add_row(name, installed or "[yellow]not installed[/]")
    console.print(table)
    table = titled_table("backends", "backend", "algorithms", "dtypes", "runs here")
    for name, entry in found["backends"].items():
        runs = "[green]yes[/]" if entry["runs"] else "no: " + "; ".join(entry["reasons"])
        table.add_row(name, ", ".join(entry["algorithms"]), ", ".join(entry["dtypes"]), runs)
    console.print(table)
