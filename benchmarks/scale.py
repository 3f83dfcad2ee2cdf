"""What several devices need for the paper's largest models, and what two processes really take at a small size.

The first is arithmetic and counted operations. For the second two processes of this machine train a stack of small
operators in every way; the peak of each is measured beyond what it holds before a step (glibc gives freed blocks back
at once: ``MALLOC_MMAP_THRESHOLD_``). Writes docs/scale.md and docs/scale.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from string import Template
from typing import Any

import torch
from markdown import table
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch import distributed as dist

from translution.algorithms import Request
from translution.backends.torch.split import run_share
from translution.conformance.split_check import ShardedOperator, Stack, held
from translution.display import formatted_bytes
from translution.peak_memory import resident_peak
from translution.scale import WAYS, fewest_devices, need, why_not
from translution.shares import share_of
from translution.spec import Operator, parse_spec

MEMORY = 80 * 10**9
LARGE_16 = "translution2d:height=14,width=14,dim=1024,num_heads=16,registers=1"
MODELS = (
    ("large/16, Translution", LARGE_16, 24, (8, 16, 32)),
    ("large/16, alpha", f"alpha_{LARGE_16},rank=8", 24, (1, 8)),
    ("base/16, Translution", "translution2d:height=14,width=14,dim=768,num_heads=12,registers=1", 12, (2, 4, 8)),
    ("base at length 1024, Translution", "translution1d:length=1024,dim=768,num_heads=12,causal=true", 12, (2, 4, 8)),
)
BATCH = 256
TEXT_BATCH = 8
SMALL = "translution2d:height=4,width=4,dim=256,num_heads=4,registers=1"
SMALL_ALPHA = "alpha_translution2d:height=7,width=7,dim=256,num_heads=4,registers=1,rank=16"
CASES = ((SMALL, 1), (SMALL, 2), (SMALL, 3), (SMALL, 4), (SMALL_ALPHA, 3))
SMALL_BATCH = 8
SETTLED = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "32768", "OMP_NUM_THREADS": "1"}
PAGE = Template((Path(__file__).parent / "scale_page.md").read_text(encoding="utf-8"))


# Two processes


def _parameters(operator: Operator) -> dict[str, Tensor]:
    return {name: torch.randn(shape) * 0.05 for name, shape in operator.parameters.items()}


def _stepped(model: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> int:
    """The peak of a second step."""

    def step() -> None:
        model(x).sum().backward()
        for parameter in parameters:
            parameter.grad = None

    step()
    return resident_peak(step)


def _measured(spec: str, layers: int, way: str) -> dict[str, int]:
    """What this process holds before a step, and takes beyond it."""
    operator, rank, world = parse_spec(spec), dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    items = SMALL_BATCH // (world if way == "fully sharded" else 1)
    x = torch.randn(items, operator.layout.num_queries, operator.dim)
    if way == "fully sharded":
        model: Any = Stack([ShardedOperator(operator, _parameters(operator)) for _ in range(layers)])
        local: list[Any] = [parameter.to_local() for parameter in model.parameters()]
        return {"held": held(local), "peak": _stepped(model, x, list(model.parameters()))}
    share = share_of(operator, rank, world)
    stack = [
        {name: value.requires_grad_() for name, value in share.take(_parameters(operator)).items()}
        for _ in range(layers)
    ]

    def split(tokens: Tensor) -> Tensor:
        for params in stack:
            tokens = run_share(share, params, tokens)
        return tokens

    own = [value for params in stack for value in params.values()]
    return {"held": held(own), "peak": _stepped(split, x, own)}


def process(rank: int, store: str) -> None:
    """One of the two; process 0 prints the larger figures of both."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=300))
    rows = []
    for spec, layers in CASES:
        for way in ("fully sharded", "split displacements"):
            both: list[Any] = [None, None]
            dist.all_gather_object(both, _measured(spec, layers, way))
            largest = {name: max(one[name] for one in both) for name in ("held", "peak")}
            rows.append({"spec": spec, "layers": layers, "way": way, **largest})
    if rank == 0:
        print(json.dumps(rows))
    sys.stdout.flush()
    os._exit(0)


def measured() -> list[dict[str, Any]]:
    """Every small case, measured in two processes, with what is predicted."""
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), f"{folder}/store"], stdout=subprocess.PIPE, text=True,
                env={**os.environ, **SETTLED},
            )
            for rank in (0, 1)
        ]  # fmt: skip
        try:
            outputs = [one.communicate(timeout=600)[0] for one in started]
        finally:
            for one in started:
                one.kill()
    rows: list[dict[str, Any]] = json.loads(outputs[0])
    for row in rows:
        found = need(Request(parse_spec(row["spec"]), SMALL_BATCH, gradient=True), row["way"], 2, row["layers"])
        row["predicted_held"] = found.parameters
        row["predicted_peak"] = found.gradients + found.gathered + found.working
    return rows


# The page


def predicted() -> list[dict[str, Any]]:
    """The paper's largest models on several devices, every way."""
    rows = []
    every = [(*model, devices) for *model, counts in MODELS for devices in counts]
    for name, spec, layers, devices in track(every, "models", console=Console(stderr=True), transient=True):
        request = Request(parse_spec(spec), TEXT_BATCH if "1d:" in spec else BATCH, gradient=True)
        for way in WAYS:
            if why_not(request, way, devices) or (way == "one device") != (devices == 1):
                continue
            found = need(request, way, devices, layers)
            row = {"model": name, "spec": spec, "layers": layers, "batch": request.batch}
            row["num_parameters"] = layers * request.operator.num_parameters
            rows.append({**row, **asdict(found), "total": found.total, "fits": found.total <= MEMORY})
    return rows


def fewest() -> list[dict[str, Any]]:
    """On how few devices each model fits, every way."""
    rows = []
    every = [(name, spec, layers, way) for name, spec, layers, _ in MODELS for way in WAYS]
    for name, spec, layers, way in track(every, "fewest", console=Console(stderr=True), transient=True):
        request = Request(parse_spec(spec), TEXT_BATCH if "1d:" in spec else BATCH, gradient=True)
        rows.append({"model": name, "way": way, "devices": fewest_devices(request, way, MEMORY, layers)})
    return rows


def _table(head: tuple[str, ...], numbers: int, rows: list[tuple[str, ...]]) -> str:
    return "\n".join(table(head, rows, numbers))


def page(data: dict[str, Any]) -> str:
    """The figures as a page."""
    parts = ("parameters", "gradients", "optimiser", "gathered", "working", "total")
    models = [
        (
            row["model"], f"{row['devices']} x {row['way']}" if row["devices"] > 1 else row["way"],
            *(formatted_bytes(row[part]) if row[part] else "-" for part in parts),
            formatted_bytes(row["sent"]) if row["sent"] else "-", f"{row['flops'] / 1e12:,.4g}",
            "yes" if row["fits"] else "no",
        )
        for row in data["predicted"]
    ]  # fmt: skip
    counts = {
        (row["model"], row["way"]): f"{row['devices']:,}" if row["devices"] else "never" for row in data["fewest"]
    }
    fewest_rows = [
        (name, f"{layers * parse_spec(spec).num_parameters:,}", *(f"{counts[name, way] or 'never'}" for way in WAYS))
        for name, spec, layers, _ in MODELS
    ]
    small = [
        (
            f"`{row['spec']}`", str(row["layers"]), row["way"],
            formatted_bytes(row["predicted_held"]), formatted_bytes(row["held"]),
            formatted_bytes(row["predicted_peak"]), formatted_bytes(row["peak"]),
            f"{row['predicted_peak'] / row['peak']:.2f}",
        )
        for row in data["measured"]
    ]  # fmt: skip
    return PAGE.substitute(
        batch=SMALL_BATCH,
        models=_table(("model", "devices", *parts, "sent", "TFLOP", "fits"), 2, models),
        fewest=_table(("model", "parameters", *WAYS), 1, fewest_rows),
        small=_table(
            ("operator", "layers", "way", "held, predicted", "measured", "peak, predicted", "measured", "ratio"),
            3,
            small,
        ),
    )


def main() -> int:
    """Measure, count, and write the page."""
    data = {"memory": MEMORY, "measured": measured(), "fewest": fewest(), "predicted": predicted()}
    docs = Path(__file__).parents[1] / "docs"
    (docs / "scale.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (docs / "scale.md").write_text(page(data), encoding="utf-8")
    for row in data["measured"]:
        print(row)
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 3:
        process(int(sys.argv[1]), sys.argv[2])
    sys.exit(main())
