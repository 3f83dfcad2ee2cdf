"""Plans as JSON files: what computes an operator, where and why that was chosen, and whether it still holds here.

A choice rests on measurements of one machine with certain versions of the libraries. A plan file carries both, and a
hash over all it says; it is loaded only where they are still the same. ``translution pick --recheck`` checks a plan
from elsewhere and writes it anew.
"""

import functools
import hashlib
import importlib.resources
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from translution.algorithms import Request
from translution.errors import PlanError
from translution.execution import Plan
from translution.spec import Operator, SpecError
from translution.spec.serialization import operator_from_data, operator_to_data

SCHEMA = "translution/plan"
VERSION = 1
SCHEMA_FILE = f"plan-{VERSION}.schema.json"
# Whatever can change what is fastest.
PACKAGES = ("translution", "numpy", "torch", "llvmlite", "triton")
_MOST_BYTES = 2**26


def _processor(described: Path = Path("/proc/cpuinfo")) -> str:
    """Name, family and model: virtual machines give the same name to several generations."""
    try:
        text = described.read_text(encoding="utf-8")
    except OSError:
        text = ""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    if "model name" not in found:
        return platform.processor() or platform.machine()
    numbers = [
        f"{title} {found[name]}" for name, title in (("cpu family", "family"), ("model", "model")) if name in found
    ]
    return ", ".join([found["model name"], *numbers])


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _accelerator(device: str) -> str | None:
    if device == "cpu":
        return None
    import torch

    return torch.cuda.get_device_name(device)


def fingerprint(device: str = "cpu") -> dict[str, dict[str, str]]:
    """The machine and the versions that a measurement on ``device`` depends on."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    machine = {"system": platform.system(), "processor": _processor(), "cores": str(_cores())}
    accelerator = _accelerator(device)
    return {"machine": machine if accelerator is None else machine | {"accelerator": accelerator}, "versions": versions}


def _hash(data: Mapping[str, Any]) -> str:
    told = json.dumps({name: value for name, value in data.items() if name != "hash"}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(told.encode()).hexdigest()


def request_data(request: Request) -> dict[str, Any]:
    """All of a request but its operator."""
    return {
        "batch": request.batch,
        "dtype": request.dtype,
        "device": request.device,
        "mask": request.mask,
        "gradient": request.gradient,
    }


def request_of(operator: Operator, data: Mapping[str, Any]) -> Request:
    """The inverse of :func:`request_data`."""
    return Request(operator, **data)


def plan_data(plan: Plan, request: Request, objective: str, evidence: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan file holds. ``evidence`` is what the choice rests on, as plain data."""
    data = {
        "schema": SCHEMA,
        "version": VERSION,
        "operator": operator_to_data(plan.operator),
        "request": request_data(request),
        "backend": plan.backend,
        "algorithm": plan.algorithm,
        "objective": objective,
        "fingerprint": fingerprint(request.device),
        "evidence": dict(evidence),
    }
    return data | {"hash": _hash(data)}


def write_plan(path: Path, data: Mapping[str, Any]) -> None:
    """Write ``plan_data``; the file appears as a whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


@functools.cache
def plan_schema() -> dict[str, Any]:
    """The JSON Schema of plan files."""
    file = importlib.resources.files("translution") / "schema" / SCHEMA_FILE
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def read_plan(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a plan file that says what was written, wherever that was.

    Raises:
        PlanError: it is no plan file, of another version of the format, or was changed since it was written.
        OSError: it can't be read.
    """
    file = Path(path)
    if file.stat().st_size > _MOST_BYTES:
        raise PlanError(f"{file}: {file.stat().st_size:,} bytes are no plan, which has at most {_MOST_BYTES:,}")
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{file} is not JSON ({error}): give a file that translution pick wrote") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise PlanError(f'{file} is no plan: there is no "schema": "{SCHEMA}" at the top. translution pick writes one')
    if data.get("version") != VERSION:
        raise PlanError(
            f"{file} is a plan of version {data.get('version')!r}, this library reads version {VERSION}: pick again"
        )
    import jsonschema

    wrong = next(jsonschema.Draft202012Validator(plan_schema()).iter_errors(data), None)
    if wrong is not None:
        raise PlanError(f"{file}: {wrong.json_path}: {wrong.message}. Pick again, which writes a whole plan")
    if data["hash"] != _hash(data):
        raise PlanError(f"{file} was changed since it was written (its hash is another). Pick again")
    return data


def differences(data: Mapping[str, Any]) -> list[str]:
    """Why measurements in this plan say nothing here: each difference between its machine and versions and these."""
    theirs, ours = data["fingerprint"], fingerprint(data["request"]["device"])
    return [
        f"{name} was {theirs[part].get(name, 'not there')}, here it is {ours[part].get(name, 'not there')}"
        for part in ("machine", "versions")
        for name in sorted({*theirs[part], *ours[part]})
        if theirs[part].get(name) != ours[part].get(name)
    ]


def plan_of(data: Mapping[str, Any]) -> Plan:
    """The plan in the content of a file."""
    try:
        operator = operator_from_data(data["operator"])
    except SpecError as error:
        raise PlanError(f"the plan's operator: {error}") from error
    return Plan(operator, data["backend"], data["algorithm"])


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file that was written for this machine and these versions.

    Raises:
        PlanError: as :func:`read_plan`; or it is from another machine or another version, with every difference.
    """
    data = read_plan(path)
    if found := differences(data):
        raise PlanError(
            f"{path} was chosen elsewhere, so its measurements say nothing here: {'; '.join(found)}. Pick again, or "
            f"check it on this machine: translution pick --recheck {path}"
        )
    return plan_of(data)
