"""Trains the tiny model: ``program.py FOLDER STEPS PARALLEL [kill-step N | kill-save N]``; run by tests.

PARALLEL is data, or several with commas between, then without dropout."""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import translution
from translution.paper.training import Part, Settings, generator, processes, train
from translution.paper.training import checkpoint as checkpoints
from translution.spec import presets

OPERATOR = presets.translution((3, 3), 8, 2)


class Layer(nn.Module):
    """x plus an operator of it, its parameters under names without dots."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters_of = nn.ParameterDict(
            {
                name.replace(".", "_"): nn.Parameter(torch.randn(shape) / 4)
                for name, shape in OPERATOR.parameters.items()
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, 9, 8] to the same."""
        params = {name: self.parameters_of[name.replace(".", "_")] for name in OPERATOR.parameters}
        return x + translution.run(OPERATOR, params, x, algorithm="stream")


class Model(nn.Module):
    """Two layers, dropout between them, a mean and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 9, 8] to logits [B, 3]."""
        for block in self.blocks:
            x = self.dropout(block(x))
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class Task:
    """Which third of the features is largest, on random tokens; ``kill`` ends the process when it asks for a step."""

    def __init__(self, kill: int | None = None) -> None:
        self.kill = kill

    def batch(self, step: int, part: Part) -> list[Tensor]:
        if step == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn((8, 9, 8), generator=generator("data", step))
        return [x[part.of(8)], x[:, 0, :3].argmax(1)[part.of(8)]]

    def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module, part: Part) -> dict[str, tuple[float, float]]:
        x = torch.randn((21, 9, 8), generator=generator("held out"))
        right = weights = 0.0
        for numbers, weight in part.batches(21, 4):
            right += float((weight * (model(x[numbers]).argmax(1) == x[numbers, 0, :3].argmax(1))).sum())
            weights += float(weight.sum())
        return {"accuracy": (right, weights)}


def main(folder: str, steps: str, parallel: str, *kill: str) -> None:
    torch.set_num_threads(1)
    when = {kill[0]: int(kill[1])} if kill else {}
    if "kill-save" in when:
        write = checkpoints.save_file

        def half(tensors: dict[str, Tensor], path: Path) -> None:
            write(tensors, path)
            if int(path.name.split("-")[1].split(".")[0]) == when["kill-save"]:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoints.save_file = half  # type: ignore[assignment]
    with processes("cpu"):
        for one in filter(None, parallel.split(",")):
            settings = Settings(
                steps=int(steps), batch_size=8, learning_rate=1e-2, warmup_steps=2, gradient_clip=1.0, seed=3,
                evaluate_every=3, checkpoint_every=2, parallel=one,  # type: ignore[arg-type]
            )  # fmt: skip
            torch.manual_seed(settings.seed)
            model = Model()
            if "," in parallel:  # every process drops others
                model.dropout.p = 0.0
            train(Task(when.get("kill-step")), model, settings, Path(folder) / one)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # as processes says
