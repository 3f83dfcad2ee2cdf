"""Checkpoints: tensors as safetensors, the rest as JSON, which is written last and names the tensors' file.

``checkpoint.json`` is what makes a checkpoint: whatever happens before it is in place leaves the one before. A file of
tensors that it does not name is a leftover, removed when the next checkpoint is there.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from translution.paper.training.files import read_json, write_json, write_whole
from translution.paper.training.settings import TrainingError

NAME = "checkpoint.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where training stands: ``step`` updates done, in so many seconds; ``about`` is what it must belong to."""

    step: int
    seconds: float
    processor_seconds: float
    about: Mapping[str, Any]
    evaluation: Mapping[str, float] = field(default_factory=dict)


def gathered(model: nn.Module, optimiser: torch.optim.Optimizer, keep: bool = True) -> dict[str, Tensor]:
    """Parameters, buffers and the optimiser's state, whole and on the CPU, under one name each.

    Where they are sharded every process has to call; those that don't ``keep`` them get nothing.
    """
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimiser.state.get(parameter, {})
        tensors |= {f"optimiser/{name}/{key}": value for key, value in state.items()}
    found = {}
    for name, value in tensors.items():
        whole = _whole(value)
        if keep:
            found[name] = whole.detach().cpu().contiguous()
    return found


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def restore(model: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`gathered` gave, into shards where the model has them.

    Raises:
        TrainingError: the names or shapes are those of another model.
    """
    own = model.state_dict()
    named = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
    shapes = {name: tuple(value.shape) for name, value in named.items()}
    expected = {name: tuple(value.shape) for name, value in own.items()}
    if shapes != expected:
        wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        raise TrainingError(
            f"the checkpoint's {wrong[0]} has shape {shapes.get(wrong[0])}",
            f"the model has {expected.get(wrong[0])}; {len(wrong)} of {len(expected)} tensors differ",
            "Give another folder, or the model that the checkpoint is of",
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(_like(value, named[name]))
    for name, parameter in model.named_parameters():
        prefix = f"optimiser/{name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        # The count of updates stays on the CPU, as AdamW makes it.
        optimiser.state[parameter] = {
            key: value.clone() if value.ndim == 0 and parameter.ndim > 0 else _like(parameter, value)
            for key, value in state.items()
        }


def _like(own: Tensor, value: Tensor) -> Tensor:
    if isinstance(own, DTensor):
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value.to(own.device, copy=True)


def save(folder: Path, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """When this returns, the checkpoint is on the disk, and those before it are gone.

    Raises:
        TrainingError: it could not be written; the one before is still there.
    """
    path = folder / f"step-{checkpoint.step:09d}.safetensors"
    write_whole(path, lambda beside: save_file(tensors, beside))
    data = {
        "format": FORMAT,
        "step": checkpoint.step,
        "seconds": checkpoint.seconds,
        "processor_seconds": checkpoint.processor_seconds,
        "evaluation": dict(checkpoint.evaluation),
        "tensors": path.name,
        "sha256": _digest(path),
        "about": dict(checkpoint.about),
    }
    write_json(folder / NAME, data)
    for other in folder.glob("step-*.safetensors"):
        if other != path:
            other.unlink(missing_ok=True)


def load(folder: Path, about: Mapping[str, Any]) -> tuple[Checkpoint, dict[str, Tensor]] | None:
    """The checkpoint in ``folder``, None where there is none.

    Raises:
        TrainingError: it is damaged, or of a training about something else.
    """
    if not (folder / NAME).exists():
        return None
    data = read_json(folder / NAME)
    remedy = "Give another folder, or remove this one to start anew"
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise TrainingError(f"{folder / NAME} has no format {FORMAT}", "a checkpoint of this version has one", remedy)
    if data["about"] != about:
        differs = sorted(key for key in data["about"].keys() | about.keys() if data["about"].get(key) != about.get(key))
        own, other = ({key: held.get(key) for key in differs} for held in (about, data["about"]))
        raise TrainingError(f"{folder} holds a training with {other}", f"this one has {own}", remedy)
    path = folder / data["tensors"]
    if not path.exists() or _digest(path) != data["sha256"]:
        raise TrainingError(f"{path} is damaged or gone", f"{NAME} names it with its SHA-256", remedy)
    times = data["seconds"], data["processor_seconds"]
    return Checkpoint(data["step"], *times, data["about"], data["evaluation"]), load_file(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
