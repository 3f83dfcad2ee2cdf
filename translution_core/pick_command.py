"""``translution bench`` and ``translution pick``: what is right and fastest for one operator, on this machine."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from translution.command_files import JsonFile, check_file, write_json, wrong_use

if TYPE_CHECKING:
    from translution.algorithms import Request
    from translution.selection import Selection

_UNITS = {
    "": 1,
    "K": 1000,
    "M": 1000**2,
    "G": 1000**3,
    "T": 1000**4,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
# Written where nothing else is said.
PLAN_FILE = Path("translution-plan.json")

Spec = Annotated[str, typer.Argument(metavar="SPEC", help="A JSON file, or NAME2d:height=7,width=7,dim=192,...")]
Batch = Annotated[int, typer.Option(min=1)]
Dtype = Annotated[str, typer.Option(help="float64, float32, float16 or bfloat16.")]
Train = Annotated[bool, typer.Option("--train", help="Forward and backward instead of forward.")]
Mask = Annotated[str, typer.Option(help="none, bool or float.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
BackendNames = Annotated[
    list[str] | None,
    typer.Option("--backend", help="Only this backend; may be repeated, and be package.module:attribute."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="What parameters and a call may take together, e.g. 2GB, 500MiB."),
]


def memory_size(text: str, option: str = "--max-memory") -> int:
    """Bytes of ``2GB`` (1000^3), ``2GiB`` (1024^3), ``500M``, ``1e9``."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?I?)B?\s*", text.upper().replace("E", "e"))
    try:
        count = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    except (KeyError, ValueError):
        count = 0
    if count <= 0:
        raise wrong_use(f"{option} {text}: give a size such as 2GB, 500MiB or 1.5G")
    return count


def request_for(spec: str, batch: int, dtype: str, train: bool, mask: str, device: str) -> "Request":
    """The request that these options make; exit code 2 where they don't."""
    from translution.algorithms import Request
    from translution.spec import SpecError, parse_spec

    for option, value, known in (
        ("--dtype", dtype, ("float64", "float32", "float16", "bfloat16")),
        ("--mask", mask, ("none", "bool", "float")),
    ):
        if value not in known:
            raise wrong_use(f"{option} {value}: choose one of {', '.join(known)}")
    try:
        return Request(parse_spec(spec), batch, dtype, device, mask, gradient=train)
    except (SpecError, OSError) as error:
        raise wrong_use(str(error)) from error


def _selected(request: "Request", objective: str, backends: list[str] | None, max_memory: str | None) -> "Selection":
    from translution.errors import UnknownName
    from translution.progress import Progress
    from translution.registry import BACKENDS
    from translution.selection import OBJECTIVES, select

    if objective not in OBJECTIVES:
        raise wrong_use(f"--objective {objective}: choose one of {', '.join(OBJECTIVES)}")
    limit = None if max_memory is None else memory_size(max_memory)
    try:
        from translution.conformance.operator_check import CannotCheck, OperatorCheck
    except ModuleNotFoundError as error:
        need = f"the check of what is right needs {error.name}: pip install 'translution[conformance]'"
        raise wrong_use(need) from error
    try:
        with Progress() as progress:
            check = OperatorCheck(request)
            return select(
                request, check.share, objective=objective, backends=backends or tuple(BACKENDS), limit=limit,
                update=progress.update,
            )  # fmt: skip
    except (CannotCheck, UnknownName, TypeError) as error:
        raise wrong_use(str(error)) from error


def bench(
    spec: Spec,
    batch: Batch = 1,
    dtype: Dtype = "float32",
    train: Train = False,
    mask: Mask = "none",
    device: Device = "cpu",
    backend: BackendNames = None,
    max_memory: MaxMemory = None,
    json_file: JsonFile = None,
) -> None:
    """Time every backend and algorithm that computes SPEC rightly: interleaved rounds, medians with intervals.

    Exit code 1 where nothing that is right is left.
    """
    check_file("--json", json_file)
    from translution.selection_display import show_selection

    found = _selected(request_for(spec, batch, dtype, train, mask, device), "latency", backend, max_memory)
    show_selection(found, "bench")
    write_json(json_file, found.data())
    raise typer.Exit(0 if found.chosen else 1)


def pick(
    spec: Annotated[
        str | None, typer.Argument(metavar="SPEC", help="A JSON file, or NAME2d:height=7,width=7,dim=192,...")
    ] = None,
    objective: Annotated[
        str, typer.Option(help="latency, throughput (at any batch up to --batch) or memory.")
    ] = "latency",
    batch: Batch = 1,
    dtype: Dtype = "float32",
    train: Train = False,
    mask: Mask = "none",
    device: Device = "cpu",
    backend: BackendNames = None,
    max_memory: MaxMemory = None,
    plan_file: Annotated[
        Path, typer.Option("--plan", metavar="FILE", help="Where the plan goes, for translution.compile(plan=FILE).")
    ] = PLAN_FILE,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Time against memory, as .png or .svg; beside the plan if not given."),
    ] = None,
    recheck: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Check this plan on this machine, and write it for it to --plan."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Choose what to deploy for SPEC: every candidate is checked on it, then timed; the choice is written as a plan.

    Exit code 1 where nothing that is right is left.
    """
    for option, path in (("--json", json_file), ("--plan", plan_file), ("--plot", plot)):
        check_file(option, path)
    if (spec is None) == (recheck is None):
        raise wrong_use("give a SPEC to choose for, or --recheck with a plan, and not both")
    if recheck is not None:
        _recheck(recheck, plan_file, json_file)
        return
    assert spec is not None
    from translution.plan_file import plan_data, write_plan
    from translution.selection_display import show_selection

    request = request_for(spec, batch, dtype, train, mask, device)
    found = _selected(request, objective, backend, max_memory)
    show_selection(found, "pick")
    write_json(json_file, found.data())
    if found.chosen is None:
        raise typer.Exit(1)
    from dataclasses import replace

    own = replace(request, batch=found.chosen.batch)
    write_plan(plan_file, plan_data(found.plan(), own, objective, found.data()))
    typer.echo(f"{plan_file}: translution.compile(operator, plan={str(plan_file)!r}) runs it")
    _plot(found, plan_file.with_suffix(".png") if plot is None else plot, asked=plot is not None)


def _plot(found: "Selection", path: Path, *, asked: bool) -> None:
    try:
        from translution.selection_display import plot_selection

        plot_selection(found, path)
    except ModuleNotFoundError as error:
        if asked:
            raise wrong_use(f"--plot needs {error.name}: pip install 'translution[paper]'") from error
        typer.echo(f"no plot: {error.name} is not installed")
        return
    except ValueError as error:  # an ending that matplotlib does not know
        raise wrong_use(f"--plot {path}: {error}") from error
    typer.echo(f"{path}: time against memory")


def _recheck(path: Path, target: Path, json_file: Path | None) -> None:
    from translution.conformance.operator_check import CannotCheck, OperatorCheck
    from translution.errors import PlanError
    from translution.plan_file import differences, plan_data, plan_of, read_plan, request_of, write_plan
    from translution.selection import Entry, checked

    try:
        data = read_plan(path)
        plan = plan_of(data)
        request = request_of(plan.operator, data["request"])
        found = checked(Entry(plan.backend, str(plan.algorithm), request.batch, 0), OperatorCheck(request).share)
    except (PlanError, OSError, CannotCheck) as error:
        raise wrong_use(str(error)) from error
    other: list[str] = differences(data)
    result: dict[str, Any] = {
        "holds": not found.out,
        "differences": other,
        "error_over_bound": found.share,
        "out": found.out,
    }
    write_json(json_file, result)
    if found.out:
        typer.echo(f"{found.name} {found.out}")
        raise typer.Exit(1)
    evidence = {**data["evidence"], "rechecked_from": data["fingerprint"]} if other else data["evidence"]
    write_plan(target, plan_data(plan, request, data["objective"], evidence))
    whose = "of the other machine" if other else "of this machine"
    typer.echo(f"{found.name} is right here, {100 * (found.share or 0):.2g}% of its bound.")
    typer.echo(f"{target} holds here; the times in it are those {whose}.")
