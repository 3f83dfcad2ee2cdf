"""Does the predicted peak memory hold? Every case is predicted, then measured in a process of its own.

Measured with an allocator that gives freed blocks back at once (glibc: ``MALLOC_MMAP_THRESHOLD_``), since what its heap
keeps is not the algorithm's; with glibc's own settings too, which is what a process really takes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from translution.algorithms import Request
from translution.display import formatted_bytes
from translution.execution import Plan, predict
from translution.peak_memory import peak_memory
from translution.registry import get_backend
from translution.spec import parse_spec

_GRID = "translution2d:height={0},width={0},dim=192,num_heads=3,registers=1"
_ALPHA = "alpha_translution2d:height={0},width={0},dim=192,num_heads=3,registers=1,rank=8"
CASES = (
    (_GRID.format(7), 8, "stream"),
    (_GRID.format(7), 32, "stream"),
    (_GRID.format(7), 8, "pairwise"),
    (_GRID.format(14), 4, "stream"),
    (_GRID.format(14), 16, "stream"),
    (_GRID.format(14) + ",roles=qk", 4, "stream"),
    (_GRID.format(14) + ",kernel_size=5", 16, "stream"),
    (_ALPHA.format(7), 32, "stream"),
    (_ALPHA.format(14), 8, "stream"),
    (_ALPHA.format(7), 32, "pairwise"),
    ("translution1d:length=160,dim=192,num_heads=3,causal=true", 8, "stream"),
    ("neighborhood_attention2d:height=28,width=28,dim=128,num_heads=4,kernel_size=7", 8, "stream"),
    ("shaw_attention1d:length=128,dim=256,num_heads=4,max_distance=16", 8, "stream"),
    ("convit_attention2d:height=14,width=14,dim=192,num_heads=4", 16, "stream"),
    ("self_attention2d:height=14,width=14,dim=192,num_heads=3", 32, "sdpa"),
    ("self_attention1d:length=1024,dim=256,num_heads=8", 4, "sdpa"),
    ("swin_attention2d:height=14,width=14,dim=192,num_heads=3", 32, "sdpa"),
    ("convolution2d:height=56,width=56,in_channels=64,out_channels=64,kernel_size=3,padding=1", 16, "conv"),
    ("convolution1d:length=4096,in_channels=128,out_channels=128,kernel_size=5,padding=2", 16, "conv"),
)
INTRODUCTION = """\
# Memory, predicted and measured

`translution explain` says what a call takes before anything is allocated. For the torch backend it is counted: the
backend runs on tensors that have shapes and no memory, and its own operations are added up. Here is what that says,
beside the peak of a process of its own that computes. Both are beyond tokens and parameters; training is forward and
backward, with the gradients of the parameters.

*Measured* is with an allocator that gives freed blocks back at once (`MALLOC_MMAP_THRESHOLD_=32768`): what glibc keeps
in its heap otherwise, the last column, is not the algorithm's, and changes from run to run.

{held} predictions are within 10% of what was measured, or within 0.5 MiB. float32, torch on the CPU. Made by
`python benchmarks/memory.py`; the same figures, unrounded: [memory.json](memory.json).
"""
SETTLED = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "32768"}


def _measured(plan: Plan, request: Request, settings: dict[str, str]) -> int:
    for name in SETTLED:
        os.environ.pop(name, None)
    os.environ.update(settings)
    try:
        return peak_memory(plan, request)
    finally:
        for name in SETTLED:
            os.environ.pop(name, None)


def holds(row: dict[str, Any]) -> bool:
    """Whether the prediction is within 10% of what was measured, or half a MiB: a process is never as quiet."""
    return bool(abs(row["predicted"] - row["measured"]) <= max(0.1 * row["measured"], 2**19))


def page(rows: list[dict[str, Any]]) -> str:
    """The measurements as a page."""
    names = ("operator", "batch", "algorithm", "pass", "predicted", "measured", "ratio", "glibc's own settings")
    held = f"{sum(map(holds, rows))} of {len(rows)}"
    lines = [
        INTRODUCTION.format(held=held),
        f"| {' | '.join(names)} |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        ratio = f"{row['predicted'] / row['measured']:.3f}"
        sizes = [formatted_bytes(row[name]) for name in ("predicted", "measured", "resident")]
        cells = (f"`{row['spec']}`", str(row["batch"]), row["algorithm"], "training" if row["train"] else "forward")
        lines.append(f"| {' | '.join((*cells, *sizes[:2], ratio if holds(row) else f'**{ratio}**', sizes[2]))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """0 where every prediction holds."""
    rows = []
    every = [(*case, train) for case in CASES for train in (False, True)]
    for spec, batch, algorithm, train in track(every, "cases", console=Console(stderr=True), transient=True):
        operator = parse_spec(spec)
        request, plan = Request(operator, batch, gradient=train), Plan(operator, "torch", algorithm)
        predicted = predict(get_backend("torch"), request, algorithm).working_bytes
        settled, own = (_measured(plan, request, settings) for settings in (SETTLED, {}))
        rows.append(
            {"spec": spec, "batch": batch, "algorithm": algorithm, "train": train,
             "predicted": predicted, "measured": settled, "resident": own}
        )  # fmt: skip
    docs = Path(__file__).parents[1] / "docs"
    (docs / "memory.md").write_text(page(rows), encoding="utf-8")
    (docs / "memory.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    off = [f"{row['spec']}, batch {row['batch']}, {row['algorithm']}" for row in rows if not holds(row)]
    print("\n".join(off) or f"{len(rows)} predictions hold")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
