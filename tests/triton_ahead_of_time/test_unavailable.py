"""On a machine with neither a GPU nor the interpreter the backend says so, and what to do."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import translution
from translution import NotSupported
from translution.spec import presets

OPERATOR = presets.translution((2,), 2, 1)

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@needs_no_gpu
def test_run_names_both_ways_out():
    params = {name: np.zeros(shape, np.float32) for name, shape in OPERATOR.parameters.items()}
    with pytest.raises(NotSupported) as caught:
        translution.run(OPERATOR, params, np.zeros((1, 2, 2), np.float32), backend="triton")
    assert caught.value.backend == "triton"
    text = str(caught.value)
    assert all(part in text for part in ("no GPU", "CUDA or ROCm", "TRITON_INTERPRET=1"))


@needs_no_gpu
def test_compile_is_refused_before_a_call():
    with pytest.raises(NotSupported, match="TRITON_INTERPRET=1"):
        translution.compile(OPERATOR, backend="triton")


@needs_no_gpu
def test_explain_gives_the_reason():
    found = next(c for c in translution.explain(translution.Request(OPERATOR)) if c.backend == "triton")
    assert any("no GPU" in reason for reason in found.reasons)


@needs_no_gpu
def test_check_says_that_there_is_no_gpu():
    command = [sys.executable, "-m", "translution.conformance.device_check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "no GPU" in done.stdout + done.stderr


def test_import_translution_leaves_triton_alone():
    code = "import sys, translution; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
