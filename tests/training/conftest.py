"""A tiny model with tables, a tiny task, and the program that trains it in processes of its own."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).with_name("program.py")


@pytest.fixture(scope="session")
def program() -> ModuleType:
    """The program as a module: its model and its task."""
    spec = importlib.util.spec_from_file_location("training_program", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_program(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the program with arguments, under torchrun where ``processes`` is more than 1."""

    def run(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(torchrun if processes > 1 else []), str(PROGRAM), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200
        )

    return run
