"""``translution paper``: the tables and the experiments of the paper. Its subcommands import what they need."""

from typing import TYPE_CHECKING

import typer

from translution.command_files import JsonFile, check_file, write_json, wrong_use
from translution.experiment_command import digits, images, text

if TYPE_CHECKING:
    from translution.paper.parameter_table import Count, PaperRow

paper = typer.Typer(help="The paper's tables and experiments.", no_args_is_help=True)


paper.command()(digits)
paper.command()(text)
paper.command()(images)


@paper.callback()
def group() -> None:
    """The paper's tables and experiments (arXiv 2510.10060)."""


@paper.command()
def params(json_file: JsonFile = None) -> None:
    """Exact parameter counts beside the paper's figures; exit code 1 where one differs.

    Every model is built without memory (on torch's meta device). --json also holds five sizes at three patch sizes and
    two lengths, each with attention, and with Translution and alpha in seven role sets.
    """
    check_file("--json", json_file)
    try:
        from translution.paper.parameter_table import count_all
    except ModuleNotFoundError as error:
        need = f"paper needs {error.name}, which is not installed: pip install 'translution[paper]'"
        raise wrong_use(need) from error
    from translution.progress import Progress

    with Progress() as progress:
        rows, grid = count_all(progress.update)
    holds = all(found.parameters == row.exact for row, found in rows)
    _show_rows(rows)
    _show_grid(grid)
    shown = [
        {
            "name": row.name,
            "paper": row.printed,
            "exact": row.exact,
            **found.as_json(),
            "holds": row.exact == found.parameters,
        }
        for row, found in rows
    ]
    write_json(json_file, {"holds": holds, "rows": shown, "grid": [found.as_json() for found in grid]})
    raise typer.Exit(0 if holds else 1)


def _show_rows(rows: "list[tuple[PaperRow, Count]]") -> None:
    from translution.display import new_console, titled_table

    numbers = ("the paper", "exact", "counted", "unreached")
    table = titled_table("Parameters", "model", *numbers, "verdict", numbers=numbers)
    for row, found in rows:
        verdict = "[green]holds[/]" if found.parameters == row.exact else "[bold red]DIFFERS[/]"
        table.add_row(row.name, row.printed, f"{row.exact:,}", f"{found.parameters:,}", _share(found), verdict)
    shown = new_console()
    shown.print(table)
    shown.print(
        "Unreached: rows of the last layer's tables for pairs without the class token, when that token alone is read.\n"
        "They never get a gradient. Mean pooling and hybrids have none.",
        highlight=False,
    )


def _share(found: "Count") -> str:
    return f"{found.unreached / found.parameters:.1%}" if found.unreached else "-"


def _show_grid(grid: "list[Count]") -> None:
    """One line per size and place: the forms that the paper compares."""
    from translution.display import new_console, titled_table

    numbers = ("attention", "alpha qkv", "Translution v", "Translution qkv")
    table = titled_table("ViT at 224 pixels, GPT with 50,257 tokens", "model", *numbers, numbers=numbers)
    lines: dict[str, dict[str, int]] = {}
    for found in grid:
        about = found.description
        place = f"/{about.patch_size[0]}" if isinstance(about.patch_size, tuple) else f", length {about.length}"
        kind = {"alpha": f"alpha {about.roles}", "full": f"Translution {about.roles}"}.get(about.kind, about.kind)
        lines.setdefault(f"{about.family} {found.size}{place}", {}).setdefault(kind, found.parameters)
    for name, counts in lines.items():
        table.add_row(name, *(f"{counts[kind]:,}" for kind in numbers))
    new_console().print(table)
