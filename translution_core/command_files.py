"""Files that a command writes, and how it says that it was called wrongly: exit code 2, one line."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")]


def wrong_use(message: str) -> typer.Exit:
    """Print the message; raise what is returned."""
    typer.echo(f"translution: {message}", err=True)
    return typer.Exit(2)


def check_file(option: str, path: Path | None) -> None:
    """Nothing is computed that could not be written."""
    if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
        raise wrong_use(f"{option} {path}: give a file in a folder that exists and can be written")


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Write ``data`` where a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
