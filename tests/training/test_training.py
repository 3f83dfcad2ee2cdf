"""The loop on a tiny model: what is decayed, in which order the data comes, what survives which accident."""

import dataclasses
import itertools
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from translution.paper.training import Part, Settings, Trained, TrainingError, train
from translution.paper.training.checkpoint import NAME
from translution.paper.training.files import Log, read_json, read_log, write_json
from translution.paper.training.optimiser import parameter_groups
from translution.paper.training.seeds import samples_of_step, seed_of

SETTINGS = Settings(steps=5, batch_size=8, learning_rate=1e-2, seed=1, checkpoint_every=2)


def start(program: Any, folder: Path, settings: Settings = SETTINGS, task: Any = None, **more: Any) -> Trained:
    torch.manual_seed(settings.seed)
    return train(program.Task() if task is None else task, program.Model(), settings, folder, **more)


class Interrupted(BaseException):
    """As KeyboardInterrupt, which pytest takes for its own."""


def interrupted_at(program: Any, step: int) -> Any:
    class Task(program.Task):  # type: ignore[misc]
        def batch(self, number: int, part: Part) -> list[Tensor]:
            if number == step:
                raise Interrupted
            found: list[Tensor] = super().batch(number, part)
            return found

    return Task()


@pytest.mark.parametrize("bad", [
    {"steps": 0}, {"batch_size": 0}, {"learning_rate": float("nan")}, {"warmup_steps": 6}, {"weight_decay": -1.0},
    {"gradient_clip": 0.0}, {"precision": "float16"}, {"parallel": "model"}, {"device": "tpu"}, {"evaluate_every": 0},
], ids=str)  # fmt: skip
def test_wrong_settings_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=next(iter(bad))):
        dataclasses.replace(SETTINGS, **bad)


def test_learning_rate_rises_and_falls_to_zero() -> None:
    settings = dataclasses.replace(SETTINGS, steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [settings.learning_rate_at(step) for step in range(100)]
    assert rates[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert rates[55] == pytest.approx(0.5)
    assert all(one > other for one, other in itertools.pairwise(rates[10:]))
    assert settings.learning_rate_at(100) == 0


def test_matrices_and_tables_alone_decay() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(2, 3), "norm": nn.LayerNorm([2, 2]), "embedding": nn.Embedding(5, 2)})
    for name, shape in (("table", (4, 2, 2)), ("bias", (2, 9)), ("position_embedding", (9, 2)), ("class_token", (1, 2)),
                        ("vectors", (4, 2)), ("gate", (2, 1))):  # fmt: skip
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    model["named"] = nn.Linear(2, 2)
    model["named"].no_weight_decay = lambda: {"weight"}  # type: ignore[assignment]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = (
        [names[id(p)] for p in group["params"]]  # type: ignore[attr-defined]
        for group in parameter_groups(model, 0.1)
    )
    assert sorted(decayed) == ["embedding.weight", "linear.weight", "table"]
    assert len(decayed) + len(others) == len(names)


def test_every_epoch_is_another_order_of_all_samples() -> None:
    first, second = ([samples_of_step(10, 3, 0, step)[1] for step in range(start, start + 3)] for start in (0, 3))
    for epoch in (first, second):
        assert len(set(torch.cat(epoch).tolist())) == 9
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert samples_of_step(10, 3, 0, 4)[1].tolist() == second[1].tolist()
    assert samples_of_step(10, 3, 1, 4)[1].tolist() != second[1].tolist()
    assert sorted(samples_of_step(2, 4, 0, 0)[1].tolist()) == [0, 0, 1, 1]


def test_seeds_depend_on_every_part_and_their_order() -> None:
    seeds = {seed_of("a", 1, 2), seed_of("a", 2, 1), seed_of("a", 12), seed_of("a", "1", 2), seed_of(1, 2)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_parts_see_every_sample_once(size: int) -> None:
    seen: list[int] = []
    batches = []
    for rank in range(size):
        own = list(Part(rank, size).batches(11, 2))
        batches.append([len(numbers) for numbers, _ in own])
        seen += [int(n) for numbers, weights in own for n, weight in zip(numbers, weights, strict=True) if weight]
    assert sorted(seen) == list(range(11))
    assert all(other == batches[0] for other in batches)
    assert torch.cat([torch.arange(10)[Part(rank, size).of(size * 2)] for rank in range(size)]).tolist() == list(
        range(size * 2)
    )


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(TrainingError, match="multiple of the number of processes"):
        Part(0, 3).of(8)


def test_interrupted_and_resumed_gives_the_same_bits(program: Any, tmp_path: Path) -> None:
    whole = start(program, tmp_path / "whole")
    with pytest.raises(Interrupted):
        start(program, tmp_path / "parts", task=interrupted_at(program, 3))
    resumed = start(program, tmp_path / "parts")
    assert (resumed.resumed_at, resumed.evaluation) == (2, whole.evaluation)
    digests = [read_json(tmp_path / name / NAME)["sha256"] for name in ("whole", "parts")]
    assert digests[0] == digests[1]
    # Another seed gives others.
    start(program, tmp_path / "other", dataclasses.replace(SETTINGS, seed=2))
    assert read_json(tmp_path / "other" / NAME)["sha256"] != digests[0]


def test_a_finished_run_is_not_run_again(program: Any, tmp_path: Path) -> None:
    first = start(program, tmp_path)
    again = start(program, tmp_path, task=interrupted_at(program, 0))
    assert (again.resumed_at, again.evaluation) == (SETTINGS.steps, first.evaluation)
    assert again.seconds >= first.seconds - 1


def test_a_checkpoint_of_another_run_is_refused(program: Any, tmp_path: Path) -> None:
    about = {"data": "a", "shape": (1, 2)}
    start(program, tmp_path, about=about)
    with pytest.raises(TrainingError, match=r"\{'data': 'a'\}.*\{'data': 'b'\}"):
        start(program, tmp_path, about={"data": "b", "shape": (1, 2)})
    with pytest.raises(TrainingError, match="'learning_rate'"):
        start(
            program, tmp_path, dataclasses.replace(SETTINGS, learning_rate=1e-3), about={"data": "a", "shape": (1, 2)}
        )
    # Where it is computed may change.
    start(program, tmp_path, dataclasses.replace(SETTINGS, checkpoint_every=1), about=about)


def test_another_model_is_refused(program: Any, tmp_path: Path) -> None:
    start(program, tmp_path)
    other = program.Model()
    other.head = nn.Linear(8, 4)
    with pytest.raises(TrainingError, match=r"head.bias has shape \(3,\).*\(4,\)"):
        train(program.Task(), other, SETTINGS, tmp_path)


def test_damage_is_seen(program: Any, tmp_path: Path) -> None:
    start(program, tmp_path)
    path = tmp_path / read_json(tmp_path / NAME)["tensors"]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(TrainingError, match="damaged or gone"):
        start(program, tmp_path)
    (tmp_path / NAME).write_text("{")
    with pytest.raises(TrainingError, match="can't be read"):
        start(program, tmp_path)


def test_a_full_disk_loses_nothing_that_was_saved(program: Any, tmp_path: Path) -> None:
    """No file may grow beyond a limit from step 3 on: the checkpoint of step 2 remains, and the run goes on from it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Task(program.Task):  # type: ignore[misc]
        def batch(self, number: int, part: Part) -> list[Tensor]:
            if number == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
            found: list[Tensor] = super().batch(number, part)
            return found

    try:
        with pytest.raises(TrainingError, match=r"step-000000004.safetensors could not be written.*still there"):
            start(program, tmp_path, task=Task())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_json(tmp_path / NAME)["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, "log.jsonl", "step-000000002.safetensors"]
    assert start(program, tmp_path).resumed_at == 2


def test_a_log_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = Log(tmp_path / "log.jsonl", 0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        for step in range(2):
            log.add(step=step, loss=0.5)
        with pytest.raises(TrainingError, match=r"log.jsonl could not be written"):
            log.add(step=2, loss=0.5)
    finally:
        log.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [0, 1]


def test_a_loss_that_is_no_number_stops_with_its_step(program: Any, tmp_path: Path) -> None:
    class Task(program.Task):  # type: ignore[misc]
        def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
            found: Tensor = super().loss(model, batch) * (float("inf") if batch[0][0, 0, 0] == self.last else 1)
            return found

    task = Task()
    task.last = task.batch(3, Part())[0][0, 0, 0]
    with pytest.raises(TrainingError, match="loss of step 4 is inf"):
        start(program, tmp_path, task=task)
    assert read_json(tmp_path / NAME)["step"] == 2


def test_the_log_has_every_step_and_forgets_what_is_run_again(program: Any, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        start(program, tmp_path, task=interrupted_at(program, 3))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    start(program, tmp_path)
    found = list(read_log(tmp_path / "log.jsonl"))
    assert [line["step"] for line in found if "loss" in line] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in found if "evaluation" in line] == [5]


def test_bfloat16_computes_under_autocast(program: Any, tmp_path: Path) -> None:
    start(program, tmp_path / "wide")
    start(program, tmp_path / "narrow", dataclasses.replace(SETTINGS, precision="bfloat16"))
    wide, narrow = ([line["loss"] for line in read_log(tmp_path / name / "log.jsonl") if "loss" in line]
                    for name in ("wide", "narrow"))  # fmt: skip
    assert narrow != wide
    assert narrow == pytest.approx(wide, rel=0.05)


def test_progress_is_told(program: Any, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    start(program, tmp_path, update=lambda *now: told.append(now), label="digits")
    assert told == [("digits", step, 5) for step in range(6)]


def test_nothing_is_left_of_a_file_that_could_not_be_made(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"first": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"second": float("nan")})
    assert read_json(tmp_path / "a.json") == {"first": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
