"""Measures what docs/performance.md shows: python benchmarks/report.py [--only FAMILY ..] [--rounds N] [--page]

Each family goes into docs/performance.json as soon as it is measured; the others stay as they are. Exit code 1 where an
aim is not reached.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from aims import judged
from families import NAMES, TIMED, WEIGHED
from measuring import measure_family, merge, weigh_family
from page import DOCS, write_page
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from translution.progress import Progress, Update

ROUNDS, THREADS = 7, 2


def _measured(name: str, rounds: int, threads: int, update: Update) -> dict[str, object]:
    def told(label: str, done: int, total: int) -> None:
        update(f"{name}: {label}", done, total)

    if name in WEIGHED:
        return weigh_family(WEIGHED[name], threads, told)
    return measure_family(TIMED[name], rounds, threads, told)


def show_aims(source: Path) -> bool:
    """Print the table of aims; whether all that were measured are reached."""
    table = Table("", "aim", "measured", "", title="aims")
    held = True
    for aim, found in judged(json.loads(source.read_text(encoding="utf-8"))):
        if found is None:
            table.add_row(aim.text, aim.bounds, "not measured", "")
            continue
        reached = aim.reached(found)
        held &= reached
        shown = f"{found.shown(aim.digits, aim.factor)}{aim.unit}"
        table.add_row(aim.text, aim.bounds, shown, "[green]reached[/]" if reached else "[red]not reached[/]")
    Console(width=150).print(table)
    return held


def main() -> int:
    """0 where every aim that was measured is reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="FAMILY", help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"{ROUNDS} unless given; the page says how many")
    parser.add_argument("--threads", type=int, default=THREADS, help=f"of torch; {THREADS} unless given")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from the JSON")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="FOLDER", help="where JSON, page and plots go")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    threadpool_limits(chosen.threads)  # NumPy's
    source = chosen.docs / "performance.json"
    if not chosen.page:
        with Progress() as progress:
            for name in chosen.only:
                merge(source, name, _measured(name, chosen.rounds, chosen.threads, progress.update))
    write_page(source, chosen.docs)
    return 0 if show_aims(source) else 1


if __name__ == "__main__":
    sys.exit(main())
