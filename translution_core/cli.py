"""The command line. Exit codes: 0 holds, 1 does not hold, 2 wrong use. A command imports what it needs itself."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from translution.command_files import JsonFile, check_file, write_json, wrong_use
from translution.conform_command import conform
from translution.paper_command import paper
from translution.pick_command import (
    Batch,
    Device,
    Dtype,
    Mask,
    MaxMemory,
    Spec,
    Train,
    bench,
    memory_size,
    pick,
    request_for,
)
from translution.scale_command import DeviceMemory, Devices, Layers, scale_for

app = typer.Typer(
    name="translution",
    help="One operator that holds convolution and self-attention: verify it, see what runs it, examine a backend.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(conform)
app.command()(bench)
app.command()(pick)
app.add_typer(paper, name="paper")


@app.command()
def verify(
    module: Annotated[
        str | None,
        typer.Option(metavar="PKG.MOD:FACTORY", help="A function that returns your torch model: each Conv*/MHA in it."),
    ] = None,
    input: Annotated[  # noqa: A002 - the option's name
        str | None, typer.Option(metavar="SHAPE", help="Shape of the model's input, e.g. 1,3,32,32.")
    ] = None,
    cases: Annotated[
        int | None, typer.Option(min=1, help="Random cases for each reduction, backend and dtype; 12 if not given.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="PART", help="reductions or digits; both where not given.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Prove that convolution and attention are special cases: reductions on every backend, then real digits.

    With --module, on every nn.Conv*, nn.ConvTranspose* and nn.MultiheadAttention of your own model.
    """
    check_file("--json", json_file)
    if (module is None) != (input is None):
        raise wrong_use("--module and --input go together, e.g. --module my.models:build --input 1,3,32,32")
    if only not in (None, "reductions", "digits"):
        raise wrong_use(f"--only {only}: choose reductions or digits")
    if module is not None and (only is not None or cases is not None):
        raise wrong_use("--only and --cases choose among the library's own checks: leave them out with --module")
    from translution.conformance.results import CannotVerify
    from translution.conformance.verify import verify_everything, verify_factory
    from translution.display import show_rows
    from translution.progress import Progress

    try:
        with Progress() as progress:
            if module is not None and input is not None:
                rows = verify_factory(module, input, progress.update)
            else:
                rows = verify_everything(12 if cases is None else cases, only, progress.update)
    except ModuleNotFoundError as error:
        need = f"verify needs {error.name}, which is not installed: pip install 'translution[conformance]'"
        raise wrong_use(need) from error
    except CannotVerify as error:
        raise wrong_use(str(error)) from error
    holds = show_rows(rows)
    write_json(json_file, {"holds": holds, "rows": [row.as_json() for row in rows]})
    raise typer.Exit(0 if holds else 1)


@app.command()
def explain(
    spec: Spec,
    batch: Batch = 1,
    dtype: Dtype = "float32",
    train: Train = False,
    mask: Mask = "none",
    device: Device = "cpu",
    max_memory: MaxMemory = None,
    devices: Devices = None,
    device_memory: DeviceMemory = None,
    layers: Layers = None,
    json_file: JsonFile = None,
) -> None:
    """Normal form, parameters, and every backend and algorithm: what it costs, or why it can't run.

    Nothing is computed or allocated. With --max-memory, exit code 1 where nothing fits; then other operators that do
    are shown. With --devices, what each holds where the operator is distributed: exit code 1 where no way fits; then on
    how many devices it would.
    """
    check_file("--json", json_file)
    scale = scale_for(devices, device_memory, layers, max_memory)
    from translution.cheaper import cheaper
    from translution.display import explanation_json, show_explanation, show_fits
    from translution.execution import explain as candidates
    from translution.progress import Progress

    request = request_for(spec, batch, dtype, train, mask, device)
    limit = None if max_memory is None else memory_size(max_memory)
    found = candidates(request, limit)
    show_explanation(request, found)
    fits = None
    if limit is not None and all(c.reasons for c in found):
        with Progress() as progress:
            fits = cheaper(request, limit, update=progress.update)
        show_fits(fits, limit)
    data, holds = explanation_json(request, found, fits), fits is None
    if scale is not None:
        holds, data["scale"] = scale.show(request)
    write_json(json_file, data)
    raise typer.Exit(0 if holds else 1)


@app.command()
def doctor(json_file: JsonFile = None) -> None:
    """What is installed, which backends run here, and why the others don't."""
    check_file("--json", json_file)
    from translution.display import diagnosis, show_diagnosis

    found = diagnosis()
    show_diagnosis(found)
    write_json(json_file, found)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Print the version where asked."""
    if show:
        from importlib.metadata import version as installed

        typer.echo(f"translution {installed('translution')}")
        raise typer.Exit(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``translution``."""
    app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="translution")
