"""How much memory one call takes at most beyond what is there before it, measured in a process of its own.

Linux keeps the highest resident size of a process and forgets it on request; what a first call loads or keeps is
loaded before. On CUDA torch's own allocator is asked.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from translution.algorithms import Request
from translution.execution import Plan
from translution.plan_file import request_data, request_of
from translution.spec.serialization import operator_from_data, operator_to_data
from translution.workload import Workload

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class CannotMeasure(Exception):
    """The peak can't be measured; the message says why."""


def _resident(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise CannotMeasure(f"{_STATUS} has no {name}")


def _give_back() -> None:
    """What the first call freed goes back to the system, or the second would take it unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # not with every C library
        trim(0)


def peak_of(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes of this process at most during a second call, beyond those before it.

    Raises:
        CannotMeasure: there is no /proc.
    """
    if device == "cpu" and not _FORGET.exists():
        raise CannotMeasure("the peak of a process is measured on Linux, which has /proc/self/clear_refs")
    call()
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return int(torch.cuda.max_memory_allocated() - before)
    return resident_peak(call)


def resident_peak(call: Callable[[], object]) -> int:
    """Bytes of this process at most during ``call``, beyond those before it. What is loaded or kept, load before."""
    _give_back()
    _FORGET.write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    call()
    return max(_resident("VmHWM") - before, 0)


def peak_memory(plan: Plan, request: Request, limit: float = 600.0) -> int:
    """Bytes that a call of ``plan`` takes at most beyond its tokens and parameters.

    With ``request.gradient`` forward and backward together, the gradients of the parameters included.

    Raises:
        CannotMeasure: there is no /proc (Linux has one), or it takes longer than ``limit`` seconds.
        RuntimeError: the call fails there; the message is its last line.
    """
    if request.device == "cpu" and not _FORGET.exists():
        raise CannotMeasure("the peak of a process is measured on Linux, which has /proc/self/clear_refs")
    asked = {
        "operator": operator_to_data(plan.operator),
        "backend": plan.backend,
        "algorithm": plan.algorithm,
        "request": request_data(request),
        "path": sys.path,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "translution.peak_memory"],
            input=json.dumps(asked), capture_output=True, text=True, timeout=limit, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CannotMeasure(f"two calls took more than {limit:g} s") from None
    if done.returncode != 0:
        told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"a process of its own fails: {told[-1]}")
    return int(done.stdout.split()[-1])


def _main(asked: Mapping[str, Any]) -> None:
    sys.path[:] = asked["path"]
    operator = operator_from_data(asked["operator"])
    plan = Plan(operator, asked["backend"], asked["algorithm"])
    request = request_of(operator, asked["request"])
    call = Workload(request).call(plan.backend, plan.algorithm)
    sys.stdout.write(f"{peak_of(call, request.device)}\n")


if __name__ == "__main__":
    _main(json.load(sys.stdin))
