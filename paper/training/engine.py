"""The loop: batches that depend on the step alone, updates, evaluations, a log, checkpoints.

A run that was interrupted goes on from its last checkpoint and ends with the same bits on the CPU as one that was not:
the state is parameters, the optimiser's and the number of the step; learning rate, order of the data and seeds of
everything random are functions of the step.
"""

import contextlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from translution.paper.training import checkpoint as checkpoints
from translution.paper.training.checkpoint import Checkpoint
from translution.paper.training.distribution import (
    Part,
    distribute,
    mean_over_processes,
    ratios,
    this_part,
    wait_for_all,
)
from translution.paper.training.files import Log
from translution.paper.training.optimiser import optimiser_for, set_learning_rate
from translution.paper.training.seeds import seed_of
from translution.paper.training.settings import Settings, TrainingError
from translution.progress import Update, silently

LOG = "log.jsonl"
Batch = Sequence[Tensor]
# Sums and what to divide them by, over this process' part.
Totals = Mapping[str, tuple[float, float]]


class Task(Protocol):
    """What is learnt: where batches come from, what is minimised, how the model is judged."""

    def batch(self, step: int, part: Part) -> Batch:
        """This process' part of the batch of a step, tensors on the CPU: a function of its arguments alone."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the batch, a number; ``model`` is called once."""
        ...

    def evaluate(self, model: nn.Module, part: Part) -> Totals:
        """Sums over this process' part of the held-out data; ``model`` is called equally often in every process."""
        ...


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run: the last evaluation, what it took in all, the step it went on from (0: from scratch).

    ``seconds`` passed; ``processor_seconds`` are those that the threads of this process computed.
    """

    evaluation: dict[str, float]
    seconds: float
    processor_seconds: float
    resumed_at: int


def train(
    task: Task,
    model: nn.Module,
    settings: Settings,
    folder: Path,
    *,
    about: Mapping[str, Any] | None = None,
    update: Update = silently,
    label: str = "training",
) -> Trained:
    """Train ``model`` in place, or go on where the checkpoint in ``folder`` stands. Sets torch's seed at every step.

    Under ``torchrun``, within :func:`translution.paper.training.processes`, every process calls it in the same way.

    Args:
        model: initialised, with float32 parameters, on any device.
        folder: made where it is missing; ``log.jsonl``, ``checkpoint.json`` and a file of tensors go there.
        about: what else the run depends on (JSON data); a checkpoint about something else is an error.
        update: is told ``label``, steps done and steps in all.

    Raises:
        TrainingError: the loss is no longer a number, the checkpoint is of another run, or files can't be written.
    """
    part, device = this_part(), torch.device(settings.device)
    part.of(settings.batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    belongs = json.loads(json.dumps({**settings.deciding(), **(about or {})}))
    called = distribute(model.to(device), settings.parallel)
    optimiser = optimiser_for(model, settings)
    found = checkpoints.load(folder, belongs)
    start = Checkpoint(0, 0.0, 0.0, belongs) if found is None else found[0]
    if found is not None:
        checkpoints.restore(model, optimiser, found[1])
    # After the checkpoint is read by all, before the first process writes another.
    wait_for_all()
    log = Log(folder / LOG, start.step) if part.rank == 0 else None
    evaluation, clock = dict(start.evaluation), _Clock(start)
    try:
        for step in range(start.step, settings.steps):
            update(label, step, settings.steps)
            line = _update_parameters(task, called, optimiser, settings, step, part, device)
            if log is not None:
                log.add(step=step + 1, **line, seconds=round(clock.seconds, 3))
            last = step + 1 == settings.steps
            if last or (settings.evaluate_every is not None and (step + 1) % settings.evaluate_every == 0):
                evaluation = _evaluate(task, called, settings, part)
                if log is not None:
                    log.add(step=step + 1, evaluation=evaluation)
            if last or (step + 1) % settings.checkpoint_every == 0:
                reached = Checkpoint(step + 1, clock.seconds, clock.processor_seconds, belongs, evaluation)
                tensors = checkpoints.gathered(model, optimiser, keep=log is not None)
                if log is not None:
                    log.to_disk()
                    checkpoints.save(folder, reached, tensors)
                wait_for_all()
    finally:
        if log is not None:
            log.close()
    update(label, settings.steps, settings.steps)
    return Trained(evaluation, clock.seconds, clock.processor_seconds, start.step)


class _Clock:
    """Goes on from a checkpoint."""

    def __init__(self, start: Checkpoint) -> None:
        self._seconds = start.seconds - time.perf_counter()
        self._processor_seconds = start.processor_seconds - time.process_time()

    @property
    def seconds(self) -> float:
        return self._seconds + time.perf_counter()

    @property
    def processor_seconds(self) -> float:
        return self._processor_seconds + time.process_time()


def _update_parameters(
    task: Task,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    settings: Settings,
    step: int,
    part: Part,
    device: torch.device,
) -> dict[str, float]:
    """One step; what the log says of it."""
    torch.manual_seed(seed_of("step", settings.seed, step, part.rank))
    model.train()
    learning_rate = settings.learning_rate_at(step)
    set_learning_rate(optimiser, learning_rate)
    optimiser.zero_grad(set_to_none=True)
    batch = [tensor.to(device, non_blocking=True) for tensor in task.batch(step, part)]
    with autocast(settings):
        loss = task.loss(model, batch)
    torch.autograd.backward(loss)
    line = {"loss": mean_over_processes(loss), "learning_rate": learning_rate}
    if settings.gradient_clip is not None:
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        line["gradient_norm"] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    for name, value in line.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"{name} of step {step + 1} is {value}",
                "training goes on while it is a number",
                "Lower learning_rate, set gradient_clip, or add warmup_steps; the last checkpoint is still there",
            )
    optimiser.step()
    return line


def autocast(settings: Settings) -> contextlib.AbstractContextManager[object]:
    """Where ``bfloat16`` is asked for."""
    if settings.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(settings.device, dtype=torch.bfloat16)


def _evaluate(task: Task, model: nn.Module, settings: Settings, part: Part) -> dict[str, float]:
    model.eval()
    with torch.no_grad(), autocast(settings):
        return ratios(task.evaluate(model, part), settings.device)
