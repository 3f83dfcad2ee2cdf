"""Training in processes that are killed, and in two that share the work."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from translution.paper.training.checkpoint import NAME
from translution.paper.training.files import read_json, read_log

Run = Callable[..., subprocess.CompletedProcess[str]]
STEPS = "7"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / read_json(folder / NAME)["tensors"])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(folder / "log.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, program: Any) -> Path:
    """The folder of a run that nothing interrupted, with dropout."""
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    try:
        program.main(str(folder), STEPS, "data")
    finally:
        torch.set_num_threads(threads)
    return folder / "data"


@pytest.mark.parametrize("when", [("kill-step", "5"), ("kill-save", "6")], ids=" ".join)
def test_killed_and_resumed_is_the_same_run(
    when: tuple[str, str], whole: Path, run_program: Run, program: Any, tmp_path: Path
) -> None:
    killed = run_program("run", STEPS, "data", *when)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "run" / "data"
    assert read_json(folder / NAME)["step"] == 4
    tensors(folder)  # the checkpoint that was reported last is whole

    program.main(str(tmp_path / "run"), STEPS, "data")
    assert lines(folder) == lines(whole)
    resumed, expected = tensors(folder), tensors(whole)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert [path.name for path in folder.glob("step-*")] == ["step-000000007.safetensors"]


def test_two_processes_train_as_one(run_program: Run, program: Any, tmp_path: Path) -> None:
    """Data parallel and sharded: the losses, the gradients' norms and the parameters of one process, up to rounding."""
    done = run_program("two", STEPS, "data,sharded", processes=2)
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    try:
        program.main(str(tmp_path / "one"), STEPS, "data,")
    finally:
        torch.set_num_threads(threads)
    expected, own = lines(tmp_path / "one" / "data"), tensors(tmp_path / "one" / "data")
    for parallel in ("data", "sharded"):
        folder = tmp_path / "two" / parallel
        found = lines(folder)
        assert [line["step"] for line in found] == [line["step"] for line in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.keys() == other.keys()
            if "loss" in one:
                assert one["loss"] == pytest.approx(other["loss"], rel=2e-6)
                assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=2e-5)
            else:
                assert one["evaluation"] == other["evaluation"]
        shared = tensors(folder)
        assert shared.keys() == own.keys()
        for name, value in shared.items():
            torch.testing.assert_close(value, own[name], rtol=1e-4, atol=1e-5, msg=name)
