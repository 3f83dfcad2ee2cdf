"""The command line: exit codes, what it prints, what it writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from translution.spec.serialization import operator_from_data

MODEL = """
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 2, 3, groups=2, padding="same"),
    )

def build_with_an_unconvertible_part():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Conv1d(4, 4, 1)
            self.attend = torch.nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True)

        def forward(self, x):
            x = self.embed(x).mT
            return self.attend(x, x, x)[0]

    return Model()

def build_that_raises():
    raise RuntimeError("no weights here")

def build_that_exits():
    raise SystemExit(0)

def build_for_tokens():
    return torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Conv1d(4, 4, 1))

def build_not_a_module():
    return 3

def build_nothing_convertible():
    return torch.nn.Linear(4, 4)

not_callable = 3
"""


def translution(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "translution", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=240)


def test_verify_a_users_module(tmp_path: Path) -> None:
    (tmp_path / "shop_models.py").write_text(MODEL)
    done = translution(
        "verify", "--module", "shop_models:build", "--input", "1,2,9,8", "--json", "out.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["holds"] is True
    subjects = [row["subject"] for row in found["rows"] if row["cases"]]
    assert len(subjects) == 2
    for subject in subjects:
        assert subject in done.stdout
    assert all(0 < row["worst_share"] <= 1 for row in found["rows"] if row["cases"])


def test_verify_says_why_a_module_is_not_compared(tmp_path: Path) -> None:
    (tmp_path / "shop_models.py").write_text(MODEL)
    done = translution(
        "verify", "--module", "shop_models:build_with_an_unconvertible_part", "--input", "2,4,5", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "add_bias_kv" in done.stdout
    assert "1 could not be compared" in done.stdout


def test_verify_of_nothing_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / "shop_models.py").write_text(MODEL)
    done = translution("verify", "--module", "shop_models:build_nothing_convertible", "--input", "2,4", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no convertible module" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verify", "--module", "shop_models:build"), ("--module and --input go together", "--input 1,3,32,32")),
        (("verify", "--module", "shop_models", "--input", "1,2"), ("shop_models", "package.module:factory")),
        (("verify", "--module", "shop_models:nothing", "--input", "1,2"), ("nothing", "build")),
        (("verify", "--module", "shop_models:not_callable", "--input", "1,2"), ("not_callable", "build")),
        (("verify", "--module", "no_such_module:build", "--input", "1,2"), ("no_such_module",)),
        (("verify", "--module", "shop_models:build", "--input", "1,two"), ("1,two", "1,3,32,32")),
        (
            ("verify", "--module", "shop_models:build_that_raises", "--input", "1,2"),
            ("RuntimeError", "no weights"),
        ),
        (
            ("verify", "--module", "shop_models:build_that_exits", "--input", "1,2"),
            ("SystemExit", "building"),
        ),
        (("verify", "--module", "shop_models:build_for_tokens", "--input", "1,2"), ("random input", "torch.float32")),
        (("verify", "--module", "shop_models:build_not_a_module", "--input", "1,2"), ("int", "torch.nn.Module")),
        (("verify", "--module", "shop_models:build", "--input", "1,9,9,9"), ("random input (1, 9, 9, 9)", "channels")),
        (("verify", "--module", "shop_broken:build", "--input", "1,2"), ("importing shop_broken", "SyntaxError")),
        (("verify", "--module", "shop_models:build", "--input", "1,2,9,8", "--only", "digits"), ("--only", "--module")),
        (("verify", "--json", "no/such/folder.json"), ("--json", "folder that exists")),
        (("doctor", "--json", "."), ("--json", "a file")),
        (("verify", "--only", "everything"), ("everything", "reductions")),
        (("explain", "translution2d:height=7,width=7,dim=192"), ("num_heads",)),
        (("explain", "no_such_preset:height=7"), ("no_such_preset",)),
        (("explain", "missing.json"), ("missing.json",)),
        (("explain", "self_attention1d:length=3,dim=4,num_heads=2", "--dtype", "int8"), ("int8", "bfloat16")),
    ],
)
def test_wrong_use_exits_with_2_and_says_what_to_do(
    tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    (tmp_path / "shop_models.py").write_text(MODEL)
    (tmp_path / "shop_broken.py").write_text("def build(:\n")
    done = translution(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_verify_without_torch_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')\n")
    done = translution("verify", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "torch, which is not installed: pip install 'translution[conformance]'" in done.stderr


def test_explain_does_not_promise_memory_that_is_not_there(tmp_path: Path) -> None:
    done = translution(
        "explain", "self_attention2d:height=1024,width=1024,dim=4,num_heads=2", "--json", "o.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    candidates = json.loads((tmp_path / "o.json").read_text())["candidates"]
    (pairwise,) = (c for c in candidates if (c["backend"], c["algorithm"]) == ("torch", "pairwise"))
    assert not pairwise["runs"]
    assert "GiB of working memory" in pairwise["reasons"][0]


def test_explain_refuses_what_is_over_the_memory_and_says_what_fits(tmp_path: Path) -> None:
    spec = "translution2d:height=6,width=6,dim=48,num_heads=3"
    done = translution("explain", spec, "--train", "--max-memory", "5MB", "--json", "out.json", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    (stream,) = (c for c in found["candidates"] if (c["backend"], c["algorithm"]) == ("torch", "stream"))
    needed = stream["working_bytes"] + stream["parameter_bytes"]
    assert stream["counted"]
    assert f"needs {needed:,} bytes with its parameters, more than 5,000,000" in stream["reasons"][0]
    assert found["fits"]
    for fit in found["fits"]:
        assert fit["working_bytes"] + fit["parameter_bytes"] <= 5_000_000
        assert fit["change"] in " ".join(done.stdout.split())
        assert operator_from_data(fit["operator"]).num_parameters > 0
    enough = translution("explain", spec, "--train", "--max-memory", "1GB", cwd=tmp_path)
    assert enough.returncode == 0, enough.stdout + enough.stderr


def test_explain_shows_parameters_and_every_backend(tmp_path: Path) -> None:
    spec = "translution2d:height=7,width=7,dim=192,num_heads=3,registers=1"
    done = translution("explain", spec, "--batch", "8", "--json", "out.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["num_parameters"] == 3 * 172 * 192 * 192 + 192 * 192 + 192
    assert f"{found['num_parameters']:,}" in done.stdout
    assert {c["backend"] for c in found["candidates"]} == {"reference", "numpy", "torch", "triton"}
    assert all(c["runs"] or c["reasons"] for c in found["candidates"])
    conv = next(c for c in found["candidates"] if c["algorithm"] == "conv")
    assert any("no window" in reason for reason in conv["reasons"])


def test_doctor_names_every_backend_and_why_one_does_not_run(tmp_path: Path) -> None:
    done = translution("doctor", "--json", "out.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["packages"]["numpy"]
    for name, backend in found["backends"].items():
        assert name in done.stdout
        assert backend["runs"] or backend["reasons"]


def test_no_command_shows_help() -> None:
    done = translution()
    assert "verify" in done.stdout + done.stderr


def test_version() -> None:
    done = translution("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("translution 0.")
