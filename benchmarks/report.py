"""Measures ``stream`` against the authors' algorithm and writes docs/performance.md and docs/performance.json.

Within a round the candidates take turns, together with the bare matrix products of one forward pass; shares and ratios
are taken round by round, and given as median and range. Peak memory comes from one fresh process for each case.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from comparison import Workload, check_equal, paper_grid

DOCS = Path(__file__).parent.parent / "docs"
WORKLOADS = {"4x4": (4, 32), "7x7": (7, 8)}
PASSES = {"forward": 1, "forward and backward": 3}
# What must hold on 7x7: speed-up of each pass, and memory of the authors' algorithm over that of stream.
GATE = {"forward": 60.0, "forward and backward": 30.0, "memory": 10.0}


def seconds(compute: Callable[[], object], at_least: float = 0.0) -> float:
    """Median time of the calls that are made within that time, at least one."""
    taken: list[float] = []
    while not taken or sum(taken) < at_least:
        start = time.perf_counter()
        compute()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def run_pass(workload: Workload, name: str, which: str) -> object:
    """One pass of one computation."""
    return workload.forward(name) if which == "forward" else workload.forward_backward(name)


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """Times, ratios and shares of the matrix products' rate for both passes."""
    products, found = workload.products(), {}
    for which, units in PASSES.items():
        run_pass(workload, "stream", which)
        taken: dict[str, list[float]] = {"products": [], "stream": [], "gather": []}
        for _ in range(rounds):
            taken["products"].append(seconds(products, 0.3))
            taken["stream"].append(seconds(lambda w=which: run_pass(workload, "stream", w), 0.5))
            taken["gather"].append(seconds(lambda w=which: run_pass(workload, "gather", w)))
        by_round = list(zip(taken["products"], taken["stream"], taken["gather"], strict=True))
        found[which] = {
            "seconds": {name: spread(values) for name, values in taken.items()},
            "speed_up": spread([gather / stream for _, stream, gather in by_round]),
            "share": spread([units * bare / stream for bare, stream, _ in by_round]),
            "products_gflops": spread([workload.flops / bare / 1e9 for bare, _, _ in by_round]),
        }
    return found


def held(field: str) -> int:
    """Bytes by ``field`` of this process: VmRSS now, VmHWM at most so far.

    Like ru_maxrss, which on Linux would also count what the parent held before this program was started.
    """
    (line,) = (n for n in Path("/proc/self/status").read_text().splitlines() if n.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def peak_memory(workload: Workload, name: str, which: str) -> int:
    """Most bytes held in one pass above what was held before; of use in a fresh process only."""
    before = held("VmRSS")
    run_pass(workload, name, which)
    return held("VmHWM") - before


def memory_of(key: str, name: str, which: str, threads: int) -> int:
    """:func:`peak_memory` in a process of its own."""
    command = [sys.executable, __file__, "--memory", key, name, which, "--threads", str(threads)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def shown(value: dict[str, float], digits: int, factor: float = 1.0) -> str:
    """Median and range in print."""
    median, least, most = (f"{value[k] * factor:,.{digits}f}" for k in ("median", "least", "most"))
    return f"{median} ({least} to {most})"


def table(result: dict[str, Any]) -> list[str]:
    """One workload as Markdown."""
    lines = [
        f"## {result['workload']}",
        "",
        "| | `stream`, ms | authors' algorithm, ms | speed-up | matrix products alone, ms | share of their rate, % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for which, found in result["passes"].items():
        times = found["seconds"]
        lines.append(
            f"| {which} | {shown(times['stream'], 1, 1e3)} | {shown(times['gather'], 0, 1e3)} "
            f"| **{shown(found['speed_up'], 0)}** | {shown(times['products'], 1, 1e3)} "
            f"| {shown(found['share'], 0, 100)} |"
        )
    lines += ["", "| peak memory, MiB | `stream` | authors' algorithm | ratio |", "| --- | ---: | ---: | ---: |"]
    for which, memory in result["memory"].items():
        small, large = memory["stream"], memory["gather"]
        lines.append(f"| {which} | {small / 2**20:,.0f} | {large / 2**20:,.0f} | **{large / small:,.0f}** |")
    return [*lines, ""]


PAGE = """# Performance

`stream` on the torch backend against the authors' algorithm (one matrix gathered per pair of tokens): float32, 192
channels, 3 heads; queries, keys and values all relative.

Measured by `benchmarks/report.py` on {processor}, {threads} threads, torch {torch}.
The candidates took turns in {rounds} rounds; a figure is the median with the range over the rounds, ratios and shares
being taken round by round. The load average was {load} before and after, on {processors} processors; other work on the
machine changes these ratios.

Before anything was timed, the result and every gradient of both stayed within the bound of
`translution.conformance.error_model`.

*Matrix products alone* are those of one forward pass, in the shapes that the operator has. Forward and backward
together need three times as many; `stream` executes four times as many, as its backward encodes again: there its share
of the products' rate cannot exceed 75%.

{tables}

Peak memory is that of a fresh process during one pass, above what it held before; with backward, the gradients of all
tables are part of it. The same figures, unrounded: [performance.json](performance.json).
"""


def page(report: dict[str, Any]) -> str:
    """docs/performance.md."""
    tables = "\n".join("\n".join(table(result)) for result in report["results"]).rstrip()
    return PAGE.format(**report["machine"], rounds=report["rounds"], tables=tables)


def misses(results: list[dict[str, Any]]) -> list[str]:
    """What falls short of the gate."""
    (gate,) = (r for r in results if r["key"] == "7x7")
    found = []
    for which in PASSES:
        speed_up = gate["passes"][which]["speed_up"]["median"]
        if speed_up < GATE[which]:
            found.append(f"{which}: {speed_up:.0f} times as fast, not {GATE[which]:.0f}")
        memory = gate["memory"][which]
        if memory["gather"] < GATE["memory"] * memory["stream"]:
            found.append(f"{which}: a {memory['gather'] / memory['stream']:.1f}th of the memory, not a 10th")
    return found


def main() -> int:
    """0 where the gate holds, 1 where it doesn't."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", nargs=3, metavar=("WORKLOAD", "COMPUTATION", "PASS"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.memory:
        key, name, which = chosen.memory
        print(peak_memory(paper_grid(*WORKLOADS[key]), name, which))
        return 0
    results, load = [], [os.getloadavg()[0]]
    for key, (side, batch) in WORKLOADS.items():
        workload = paper_grid(side, batch)
        worst = check_equal(workload)
        print(f"{workload.name}: equal within {worst:.1%} of the bound")
        passes = measure(workload, chosen.rounds)
        memory = {
            which: {name: memory_of(key, name, which, chosen.threads) for name in workload.computations}
            for which in PASSES
        }
        results.append(
            {"key": key, "workload": workload.name, "error_share": worst, "passes": passes, "memory": memory}
        )
        print("\n".join(table(results[-1])))
    machine = {
        "processor": processor(),
        "threads": chosen.threads,
        "torch": torch.__version__,
        "load": " and ".join(f"{one:.1f}" for one in (*load, os.getloadavg()[0])),
        "processors": os.cpu_count(),
    }
    report = {"machine": machine, "rounds": chosen.rounds, "gate": GATE, "results": results}
    DOCS.mkdir(exist_ok=True)
    (DOCS / "performance.md").write_text(page(report), encoding="utf-8")
    (DOCS / "performance.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    short = misses(results)
    print("\n".join(short) or "the gate holds")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
