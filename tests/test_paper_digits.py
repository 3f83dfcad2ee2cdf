"""Dynamic MNIST: which digits are where, that every model gets the same, that what is finished is kept."""

import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from translution.cli import app
from translution.errors import UnknownName
from translution.paper.description import Size
from translution.paper.experiments import digits, runs
from translution.paper.experiments.digit_data import (
    FILES,
    Split,
    anywhere,
    at_distance,
    farthest,
    load_digits,
    placed,
    read_idx,
)  # fmt: skip
from translution.paper.experiments.digits import DigitTask, Scale, run_digits
from translution.paper.experiments.models import CNN, MODELS, build, count_parameters, describe
from translution.paper.experiments.statistics import difference, estimate
from translution.paper.experiments.summaries import digit_rows, distance_curves
from translution.paper.training import Part, TrainingError, generator
from translution.paper.training.files import read_json

TINY = Scale(
    size=Size(dim=8, depth=1, num_heads=2, head_dim=4, mlp_dim=16), rank=2, steps=3, batch_size=8, learning_rate=3e-3,
    warmup_steps=0, image_size=36,
)  # fmt: skip


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty digits to test and to look at, so that a run takes a moment."""
    every = load_digits()
    small = {
        field.name: Split(getattr(every, field.name).images[:20], getattr(every, field.name).labels[:20])
        for field in dataclasses.fields(every)
    }
    few = dataclasses.replace(every, **small)
    monkeypatch.setattr(digits, "load_digits", lambda _: few)


def test_splits_are_disjoint_and_hold_every_class() -> None:
    found = load_digits()
    names = [field.name for field in dataclasses.fields(found)]
    assert [len(getattr(found, name)) for name in names] == [3500, 500, 1000]
    seen = [{image.numpy().tobytes() for image in getattr(found, name).images} for name in names]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 5000
    for name in names:
        assert getattr(found, name).labels.unique().tolist() == list(range(10))


def test_a_digit_stands_where_it_was_put() -> None:
    images = torch.arange(2 * 28 * 28).reshape(2, 28, 28).remainder(255).add(1).to(torch.uint8)
    shifts = torch.tensor([[0, 0], [-4, 3]])
    found = placed(images, shifts, 36)
    assert found.shape == (2, 1, 36, 36)
    assert torch.equal(found[0, 0, 4:32, 4:32], images[0].float() / 255)
    assert torch.equal(found[1, 0, 0:28, 7:35], images[1].float() / 255)
    assert int(found.count_nonzero()) == 2 * 28 * 28


def test_places_are_uniform_within_the_image_and_on_the_border() -> None:
    most = farthest(36)
    free = anywhere(4000, 36, generator("a"))
    assert {tuple(shift) for shift in free.tolist()} == {
        (y, x) for y in range(-most, most + 1) for x in range(-most, most + 1)
    }
    for distance in (0, 1, 3):
        border = at_distance(2000, distance, generator("b"))
        assert set(border.abs().max(1).values.tolist()) == {distance}
        places, counts = border.unique(dim=0, return_counts=True)
        assert len(places) == max(1, 8 * distance)
        assert float(counts.double().std(correction=0)) < 3 * math.sqrt(2000 / len(places))


def write_idx(path: Path, values: "np.ndarray[Any, np.dtype[np.uint8]]", packed: bool = False) -> None:
    content = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def mnist_folder(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    for number, (images, labels) in enumerate(FILES.values()):
        count = 40 - 10 * number
        write_idx(folder / images, draw.integers(0, 256, (count, 28, 28), np.uint8), packed=number == 0)
        write_idx(folder / labels, (np.arange(count) % 10).astype(np.uint8))
    return folder


def test_mnist_files_plain_and_packed(tmp_path: Path) -> None:
    found = load_digits(mnist_folder(tmp_path))
    assert [len(found.train), len(found.validation), len(found.test)] == [20, 20, 30]
    assert found.test.labels.tolist() == [n % 10 for n in range(30)]
    assert torch.equal(found.test.images, read_idx(tmp_path / "t10k-images-idx3-ubyte"))


def test_wrong_mnist_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz"):
        load_digits(tmp_path)
    labels = mnist_folder(tmp_path) / "t10k-labels-idx1-ubyte"
    content = labels.read_bytes()
    for wrong in (b"", b"\0\0", content[:-1], b"\0\0\x09" + content[3:], content + b"\0"):
        labels.write_bytes(wrong)
        with pytest.raises(TrainingError, match="t10k-labels-idx1-ubyte has"):
            load_digits(tmp_path)
    write_idx(labels, np.zeros(29, np.uint8))
    with pytest.raises(TrainingError, match=r"test files .* have shapes \(30, 28, 28\) and \(29,\)"):
        load_digits(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(TrainingError, match="can't be read"):
        load_digits(tmp_path)


def test_batches_depend_on_seed_and_step_and_join() -> None:
    data = load_digits()
    static, moving = (DigitTask(data.train, data.validation, TINY, on, 4) for on in ("static", "dynamic"))
    images, labels = moving.batch(7, Part())
    halves = [moving.batch(7, Part(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([half[0] for half in halves]), images)
    assert torch.equal(torch.cat([half[1] for half in halves]), labels)
    centred, same = static.batch(7, Part())
    assert torch.equal(same, labels)
    assert torch.equal(centred.flatten(1).sort(1).values, images.flatten(1).sort(1).values)
    assert not torch.equal(centred, images)
    # MNIST keeps four pixels around a digit free.
    assert not centred[:, :, :8].any()
    assert not torch.equal(moving.batch(8, Part())[0], images)
    other = DigitTask(data.train, data.validation, TINY, "dynamic", 5)
    assert not torch.equal(other.batch(7, Part())[0], images)


@pytest.mark.parametrize("name", [*MODELS, CNN])
def test_every_model_can_be_built_and_has_gradients(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, **digits.model_fields(TINY))
    logits = model(torch.rand(3, 1, 36, 36))
    assert logits.shape == (3, 10)
    torch.autograd.backward(logits.square().sum())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_wide_model_has_translutions_parameters() -> None:
    fields = digits.model_fields(TINY)
    wide, full = (describe(name, **fields).num_parameters for name in ("wide", "translution"))
    assert full <= wide < full + TINY.size.depth * (2 * TINY.size.dim + 1)
    assert count_parameters(build("wide", **fields)) == wide


def test_intervals_are_students() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.302652729749464 / math.sqrt(3))
    assert estimate([5.0]).half_width is None
    assert difference([3.0, 5.0, 7.5], [1.0, 3.0, 5.0]).is_apart_from_zero
    assert not difference([3.0, 5.0, 7.0], [1.0, 6.0, 7.0]).is_apart_from_zero


@pytest.mark.usefixtures("few")
def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_digits(TINY, tmp_path, models=("attention", "cnn"), seeds=2)
    assert [(run["model"], run["trained_on"], run["seed"]) for run in first["runs"]] == [
        (model, on, seed) for seed in range(2) for model in ("attention", "cnn") for on in ("static", "dynamic")
    ]
    trained: list[str] = []
    train = digits.train

    def noted(*given: Any, **more: Any) -> Any:
        trained.append(str(given[3]))
        return train(*given, **more)

    monkeypatch.setattr(digits, "train", noted)
    assert run_digits(TINY, tmp_path, models=("attention", "cnn"), seeds=2) == first
    assert trained == []
    (missing,) = tmp_path.glob("dynamic-cnn-seed-1-*")
    (missing / "result.json").unlink()
    again = run_digits(TINY, tmp_path, models=("attention", "cnn"), seeds=2)
    assert trained == [str(missing)]
    assert [run["test"] for run in again["runs"]] == [run["test"] for run in first["runs"]]
    # Other settings are other runs.
    run_digits(dataclasses.replace(TINY, learning_rate=1e-3), tmp_path, models=("cnn",), seeds=1)
    assert len(trained) == 3
    with pytest.raises(UnknownName, match="attention"):
        run_digits(TINY, tmp_path, models=("atention",))


@pytest.mark.usefixtures("few")
def test_rows_hold_means_and_differences_to_attention(tmp_path: Path) -> None:
    found = run_digits(TINY, tmp_path, models=("attention", "translution"), seeds=2)
    attention, translution = digit_rows(found)
    assert [figure.name for figure in attention.figures] == [
        "static to static", "dynamic to dynamic", "static to dynamic",
    ]  # fmt: skip
    own = {
        model: [
            100 * run["test"]["dynamic"]
            for run in found["runs"]
            if (run["model"], run["trained_on"]) == (model, "static")
        ]
        for model in found["models"]
    }
    figure = translution.figures[2]
    assert figure.measured.values == tuple(own["translution"])
    assert figure.beyond_attention is not None
    assert figure.beyond_attention.mean == pytest.approx(
        estimate(own["translution"]).mean - estimate(own["attention"]).mean
    )
    assert (attention.figures[2].paper, figure.paper) == (18.18, 36.40)
    assert attention.figures[0].beyond_attention is None
    curves = distance_curves(found)
    assert set(curves) == {(model, on) for model in found["models"] for on in ("static", "dynamic")}
    assert sorted(curves["attention", "static"]) == [0, 1, 2, 3, 4]
    assert curves["attention", "static"][0].mean == pytest.approx(attention.figures[0].measured.mean)


def test_a_model_learns_where_digits_stay(tmp_path: Path) -> None:
    scale = dataclasses.replace(TINY, steps=60, batch_size=64, learning_rate=1e-2, size=Size(16, 1, 2, 8, 32))
    found = digits.work(
        None, "cpu", {"scale": dataclasses.asdict(scale), "model": "attention", "trained_on": "static", "seed": 0},
        tmp_path,
    )  # fmt: skip
    assert found["test"]["static"] > 0.5


def test_two_at_a_time_give_what_one_gives(tmp_path: Path) -> None:
    """In processes of their own, with one thread each."""
    data, threads = mnist_folder(tmp_path), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = run_digits(TINY, tmp_path / "one", models=("attention",), seeds=1, data=data)
    finally:
        torch.set_num_threads(threads)
    told: list[tuple[str, int, int]] = []

    def update(*now: Any) -> None:
        told.append(now)

    shared = run_digits(TINY, tmp_path / "two", models=("attention",), seeds=1, data=data, jobs=2, update=update)
    assert [run["test"] for run in shared["runs"]] == [run["test"] for run in alone["runs"]]
    assert told[-1] == ("steps of all runs", 6, 6)


def refuse(*_: object) -> dict[str, Any]:
    raise TrainingError("something", "something else is expected", "Change it")


def test_an_error_of_a_run_reaches_the_caller(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^something: something else is expected\. Change it\.$"):
        runs.run_all(refuse, [runs.Run("one", {"steps": 1})], tmp_path, jobs=1)


@pytest.mark.usefixtures("few")
def test_the_command_shows_and_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(digits.SCALES, "small", TINY)
    command = ["paper", "digits", "--models", "attention,alpha", "--seeds", "2", "--jobs", "1", "--output",
               str(tmp_path / "runs"), "--json", str(tmp_path / "out.json")]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "18.18" in done.output
    assert "34.90" in done.output
    assert "beyond attention" in done.output
    data = read_json(tmp_path / "out.json")
    assert data == read_json(tmp_path / "runs" / "results.json")
    assert data["scale"] == json.loads(json.dumps(dataclasses.asdict(TINY)))
    assert [row["model"] for row in data["summary"]] == ["attention", "alpha"]
    assert {"machine", "versions", "command", "runs", "data"} <= data.keys()
    for plot in ("distance.png", "training.png"):
        assert (tmp_path / "runs" / plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("options", "said"), [
    (["--models", "attention,atention"], "--models attention,atention: choose among"),
    (["--size", "huge"], "--size huge: choose one of small, paper"),
    (["--device", "tpu"], "--device tpu: choose cpu or cuda"),
    (["--output", "a file"], "--output a file: give a folder"),
    (["--json", "nowhere/out.json"], "--json nowhere/out.json"),
    (["--data", "nowhere"], "nowhere has neither train-images-idx3-ubyte"),
], ids=str)  # fmt: skip
def test_wrong_use_is_told(options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a file").touch()
    done = CliRunner().invoke(app, ["paper", "digits", *options])
    assert done.exit_code == 2
    assert said in done.output
