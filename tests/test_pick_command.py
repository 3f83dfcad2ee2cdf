"""``translution bench`` and ``translution pick``: what they print and write, and their exit codes."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import translution
from translution.cli import app
from translution.pick_command import memory_size
from translution.plan_file import load_plan
from translution.spec import parse_spec

SPEC = "translution1d:length=6,dim=8,num_heads=2"


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def picked(tmp_path_factory):
    """A plan with everything beside it."""
    folder = tmp_path_factory.mktemp("picked")
    done = command(
        "pick", SPEC, "--batch", 2, "--backend", "numpy", "--backend", "torch", "--plan", folder / "plan.json",
        "--json", folder / "found.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder, done.output


def test_pick_writes_a_plan_that_runs(picked):
    folder, output = picked
    operator, data = parse_spec(SPEC), json.loads((folder / "found.json").read_text())
    plan = load_plan(folder / "plan.json")
    assert data["chosen"] == f"{plan.backend} {plan.algorithm}"
    assert data["chosen"] in output
    params = {name: np.ones(shape, np.float32) for name, shape in operator.parameters.items()}
    out = translution.compile(operator, plan=folder / "plan.json")(params, np.ones((2, 6, 8), np.float32))
    assert out.shape == (2, 6, 8)
    assert json.loads((folder / "plan.json").read_text())["evidence"] == data


def test_pick_draws_time_against_memory(picked):
    folder, _ = picked
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_plan_is_rechecked_on_request(picked, tmp_path):
    folder, _ = picked
    done = command("pick", "--recheck", folder / "plan.json", "--plan", tmp_path / "again.json")
    assert done.exit_code == 0, done.output
    assert "is right here" in done.output
    assert load_plan(tmp_path / "again.json") == load_plan(folder / "plan.json")


def test_a_plan_from_elsewhere_holds_here_once_it_is_rechecked(picked, tmp_path, monkeypatch):
    folder, _ = picked
    monkeypatch.setattr("translution.plan_file._processor", lambda: "another one")
    with pytest.raises(translution.PlanError, match="processor"):
        load_plan(folder / "plan.json")
    done = command("pick", "--recheck", folder / "plan.json", "--plan", tmp_path / "here.json")
    assert "those of the other machine" in done.output
    assert load_plan(tmp_path / "here.json").operator == parse_spec(SPEC)
    assert "rechecked_from" in json.loads((tmp_path / "here.json").read_text())["evidence"]


def test_bench_prints_and_writes_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command("bench", SPEC, "--backend", "numpy", "--train", "--mask", "bool", "--json", "bench.json")
    assert done.exit_code == 0, done.output
    assert "forward and backward" in done.output
    data = json.loads((tmp_path / "bench.json").read_text())
    assert {entry["algorithm"] for entry in data["entries"]} == {"pairwise", "stream"}
    assert all(entry["seconds_interval"][0] <= entry["seconds"] for entry in data["entries"])
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_nothing_that_is_right_is_exit_code_1(tmp_path):
    done = command("pick", SPEC, "--backend", "reference", "--plan", tmp_path / "plan.json")
    assert done.exit_code == 1
    assert "Nothing is left" in done.output
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pick",), "give a SPEC to choose for, or --recheck"),
        (("pick", SPEC, "--recheck", "plan.json"), "and not both"),
        (("pick", SPEC, "--objective", "beauty"), "--objective beauty: choose one of latency, throughput, memory"),
        (("pick", SPEC, "--max-memory", "much"), "--max-memory much: give a size such as 2GB"),
        (
            ("pick", SPEC, "--plan", "nowhere/plan.json"),
            "--plan nowhere/plan.json: give a file in a folder that exists",
        ),
        (("bench", SPEC, "--dtype", "int8"), "--dtype int8: choose one of float64"),
        (("bench", SPEC, "--mask", "float64"), "--mask float64: choose one of none, bool, float"),
        (("bench", "translution1d:length=6"), "dim"),
        (("bench", SPEC, "--backend", "nump"), "Did you mean 'numpy'?"),
        (("pick", "--recheck", "nowhere.json"), "No such file"),
    ],
)
def test_wrong_use_is_exit_code_2(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command(*arguments)
    assert done.exit_code == 2
    assert words in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("2GiB", 2**31), ("500m", 5 * 10**8), ("1.5 KiB", 1536), ("1e9", 10**9), ("12", 12)],
)
def test_memory_sizes(text, size):
    assert memory_size(text) == size
