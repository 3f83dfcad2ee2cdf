"""The command for owners of a GPU, here on the interpreter: what it shows and its exit codes."""

import pytest
import torch

from translution.conformance import device_check as check
from translution.spec import presets

SMALL = ["--device", "cpu", "--dtype", "float32", "--batch", "2"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(check, "operators", lambda: {"small": presets.translution((3,), 4, 2, registers=1)})


def test_every_case_is_a_row(capsys):
    assert check.main(SMALL) == 0
    shown = capsys.readouterr().out
    assert "small" in shown
    assert "1 of 1 cases" in shown


def test_a_wrong_number_fails(monkeypatch):
    plain = check.translution.run
    monkeypatch.setattr(check.translution, "run", lambda *args, **options: plain(*args, **options) * 1.01)
    assert check.main(SMALL) == 1


def test_a_wrong_gradient_fails(monkeypatch):
    plain = check.translution.vjp

    def wrong(*args, **options):
        out, found = plain(*args, **options)
        return out, type(found)({**found.params, "key.table": found.params["key.table"] * 1.01}, found.x, found.y)

    monkeypatch.setattr(check.translution, "vjp", wrong)
    assert check.main(SMALL) == 1


def test_a_gradient_that_changes_fails_and_says_which(monkeypatch, capsys):
    plain, calls = check.translution.vjp, []

    def changing(*args, **options):
        calls.append(args)
        out, found = plain(*args, **options)
        found.x[0, 0] *= 1 + 1e-7 * len(calls)
        return out, found

    monkeypatch.setattr(check.translution, "vjp", changing)
    assert check.main(SMALL) == 1
    assert "a second call gave other bits: x" in capsys.readouterr().out


def test_a_kernel_that_does_not_run_fails_and_says_why(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(check.translution, "run", broken)
    assert check.main(SMALL) == 1
    assert "no such instruction" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_code_is_2(capsys):
    assert check.main([]) == 2
    assert "no GPU" in capsys.readouterr().out
