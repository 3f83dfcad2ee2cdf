"""Does ``translution pick`` choose the fastest? Ten operators, chosen for and then measured again on other numbers.

    python benchmarks/picks.py [--json FILE]

A choice is good where its median, in rounds of its own, is within 10% of the best conforming candidate's. Exit code 1
where fewer than 8 of 10 are good.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from translution.algorithms import Request
from translution.conformance.operator_check import OperatorCheck
from translution.selection import Selection, select
from translution.spec import Operator, presets
from translution.trials import REST, measure
from translution.workload import Workload

WITHIN, ENOUGH = 1.10, 8
OPERATORS: dict[str, tuple[Operator, int, bool]] = {
    "Translution 7x7, batch 8": (presets.translution((7, 7), 96, 3, registers=1), 8, False),
    "Translution 7x7, batch 8, training": (presets.translution((7, 7), 96, 3, registers=1), 8, True),
    "Translution 4x4, batch 1": (presets.translution((4, 4), 48, 3), 1, False),
    "causal Translution, length 64": (presets.translution((64,), 64, 2, causal=True), 4, False),
    "window of 5 on 14x14": (presets.translution((14, 14), 64, 2, kernel_size=5), 4, False),
    "alpha-Translution 7x7": (presets.alpha_translution((7, 7), 96, 3), 8, False),
    "convolution 3x3": (presets.convolution((28, 28), 32, 64, 3, padding=1), 8, False),
    "convolution 3x3, training": (presets.convolution((14, 14), 32, 32, 3, padding=1), 8, True),
    "attention, length 196": (presets.self_attention((196,), 192, 3), 4, False),
    "Swin attention 7x7": (presets.swin_attention((7, 7), 96, 3), 16, False),
}


def measured_again(found: Selection) -> dict[str, float]:
    """Median seconds of every candidate that was right and not hopeless, on other numbers."""
    workload = Workload(found.request, seed=1)
    right = [entry for entry in found.entries if not entry.out]
    calls = {entry.name: workload.call(entry.backend, entry.algorithm) for entry in right}
    return {name: timing.median for name, timing in measure(calls, rest=REST).items()}


def main() -> int:
    """Choose, measure again, print and say whether enough choices are good."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    table = Table("operator", "chosen", "clear", "best when measured again", "ratio", title="pick, measured again")
    for name, (operator, batch, gradient) in OPERATORS.items():
        request = Request(operator, batch, gradient=gradient)
        found = select(request, OperatorCheck(request).share)
        assert found.chosen is not None
        again = measured_again(found)
        best = min(again, key=lambda one: again[one])
        ratio = again[found.chosen.name] / again[best]
        rows.append(
            {"operator": name, "chosen": found.chosen.name, "clear": found.is_clear, "best": best, "ratio": ratio}
        )
        colour = "green" if ratio <= WITHIN else "red"
        table.add_row(name, found.chosen.name, "yes" if found.is_clear else "no", best, f"[{colour}]{ratio:.2f}[/]")
    good = sum(row["ratio"] <= WITHIN for row in rows)
    Console(width=140).print(table, f"{good} of {len(rows)} choices are within {WITHIN - 1:.0%} of the best")
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if good >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
