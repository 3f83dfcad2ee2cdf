"""Measures families and gives plain data: every round of every candidate, errors, settings. Judges nothing."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from families import NAMES, Group, Peak
from workload import FORWARD, MACHINE, CannotRun, Case, Workload, useful_flops

from translution.algorithms import Request, cost
from translution.backends.torch.memory import release
from translution.peak_memory import peak_of
from translution.plan_file import fingerprint
from translution.progress import Update, silently
from translution.trials import LEAST_SECONDS, REST, measure

Call = Callable[[], object]


def settings(rounds: int, threads: int) -> dict[str, Any]:
    """What the figures depend on, before they are taken."""
    return {
        **fingerprint(),
        "threads": threads,
        "rounds": rounds,
        "least_seconds": LEAST_SECONDS,
        "rest": REST,
        "dtype": "float32",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "load": [os.getloadavg()[0]],
    }


def _prepared(case: Case, update: Update) -> tuple[dict[str, Any], dict[tuple[str, str], Call]]:
    """A case without its times, and the calls by pass and candidate; each was compared with the exact result."""
    workload = Workload(case)
    calls: dict[tuple[str, str], Call] = {}
    row: dict[str, Any] = {
        "spec": case.spec, "batch": case.batch, "value": case.value, "links": workload.links,
        "useful_flops": useful_flops(case.operator, case.batch), "passes": {},
    }  # fmt: skip
    own = [name for name in case.candidates if name not in MACHINE]
    for number, which in enumerate(case.passes):
        found: dict[str, Any] = {"error_over_bound": {}, "skipped": {}, "seconds": {}}
        request = Request(case.operator, case.batch, gradient=which != FORWARD)
        found["estimated_flops"] = cost(request, "stream").flops
        if len(own) < len(case.candidates):
            found["executed_flops"] = workload.executed[which]
        for name in own:
            try:
                calls[which, name], share = workload.checked(name, which)
            except CannotRun as reason:
                found["skipped"][name] = str(reason)
            else:
                found["error_over_bound"][name] = share
        row["passes"][which] = found
        update("checking", number + 1, len(case.passes))
    if len(own) < len(case.candidates):
        products = workload.products
        row["machine"] = {
            "products_flops": products.flops, "large_product_flops": products.large_flops,
            "table_bytes": products.table_bytes, "seconds": {},
        }  # fmt: skip
        calls |= {("", name): call for name, call in products.calls().items() if name in case.candidates}
    workload.__dict__.pop("exact", None)  # as large as the tables, several times
    return row, calls


def measure_group(group: Group, rounds: int, update: Update = silently) -> dict[str, Any]:
    """All cases of a group, seconds of every call in every round.

    Raises:
        ComparisonError: a candidate is wrong. Nothing is timed then.
    """
    prepared = [_prepared(case, update) for case in group.cases]
    calls = {
        json.dumps([number, *names]): call for number, (_, own) in enumerate(prepared) for names, call in own.items()
    }
    timings = measure(calls, rounds, rounds, update, rest=REST)
    for key, timing in timings.items():
        number, which, name = json.loads(key)
        row = prepared[number][0]
        (row["passes"][which] if which else row["machine"])["seconds"][name] = list(timing.seconds)
    return {"name": group.name, "variable": group.variable, "cases": [row for row, _ in prepared]}


def measure_family(groups: tuple[Group, ...], rounds: int, threads: int, update: Update = silently) -> dict[str, Any]:
    """A family, with its settings."""
    started, found = time.perf_counter(), settings(rounds, threads)
    measured = []
    for number, group in enumerate(groups):
        update("groups", number, len(groups))
        measured.append(measure_group(group, rounds, update))
    found["load"].append(os.getloadavg()[0])
    return {"settings": found | {"took_seconds": time.perf_counter() - started}, "groups": measured}


def peak_here(peak: Peak) -> int:
    """Bytes of this process at most during a second call, beyond those before it; checked as whatever is timed."""
    call, _ = Workload(peak.case).checked(peak.candidate, peak.which)
    release()  # what the checked calls have kept counts as well
    return peak_of(call)


def weigh_family(peaks: tuple[Peak, ...], threads: int, update: Update = silently) -> dict[str, Any]:
    """Peak memory of each, in a process of its own."""
    started, found, rows = time.perf_counter(), settings(1, threads), []
    for number, peak in enumerate(peaks):
        update("processes", number, len(peaks))
        command = [sys.executable, __file__, json.dumps(asdict(peak)), str(threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(asdict(peak) | {"peak_bytes": int(done.stdout)})
    found["load"].append(os.getloadavg()[0])
    return {"settings": found | {"took_seconds": time.perf_counter() - started}, "peaks": rows}


def merge(path: Path, name: str, family: dict[str, Any]) -> None:
    """Put a family into the file of all, where the others stay as they are."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    every = {one: family if one == name else found[one] for one in NAMES if one == name or one in found}
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(every, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(peak_here(Peak(**json.loads(sys.argv[1]))))
