"""Answers as other programs write them: in half formats, and by a program in C that has no library."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from translution.conformance.exam.report import Report, Result, Verdict
from translution.conformance.exchange import export, mark
from translution.conformance.exchange.paper import read_tensors

TOY = Path(__file__).parent / "toy_c" / "toy.c"

Arrays = dict[str, np.ndarray[Any, Any]]


def questions(folder: Path) -> Iterator[tuple[dict[str, Any], Arrays]]:
    """Every question with its arrays, as any reader of the files sees them."""
    for question in json.loads((folder / "exam.json").read_text())["questions"]:
        yield question, {name: value for name, (_, value) in read_tensors(folder / question["file"]).items()}


def by_item(report: Report) -> dict[tuple[str, str], Result]:
    return {(result.law, result.dtype): result for result in report.results}


# Half formats


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("halves")
    export(folder, laws=["ORACLE"], dtypes=["bfloat16", "float16"], breadth=1)
    return folder


@pytest.mark.parametrize("wide", [False, True], ids=["in the dtype", "in F32"])
def test_half_formats(wide: bool, halves: Path, tmp_path: Path) -> None:
    for question, tensors in questions(halves):
        out = torch.from_numpy(tensors["expected.out"]).to(getattr(torch, question["dtype"]))
        save_file({"out": out.float() if wide else out}, tmp_path / f"{question['id']}.safetensors")
    report = mark(halves, tmp_path)
    assert [result.verdict for result in report.results] == [Verdict.PASS, Verdict.PASS]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_formats_hold_only_their_own_values(dtype: str, halves: Path, tmp_path: Path) -> None:
    for question, tensors in questions(halves):
        if question["dtype"] == dtype:
            save_file(
                {"out": torch.from_numpy(tensors["expected.out"]).float()}, tmp_path / f"{question['id']}.safetensors"
            )
    found = by_item(mark(halves, tmp_path))["ORACLE", dtype]
    assert found.verdict is Verdict.FAIL
    assert f"which no {dtype} holds" in found.message


def test_inputs_are_values_of_the_dtype(halves: Path) -> None:
    for question, tensors in questions(halves):
        for name, value in tensors.items():
            if not name.startswith(("expected.", "bound.")) and value.dtype != bool:
                there = torch.from_numpy(value).to(getattr(torch, question["dtype"])).double().numpy()
                np.testing.assert_array_equal(there, value)


# A backend in C

C_LAWS = ("ORACLE", "ORACLE-WEIGHTS", "VALUE-TRACER", "KEY-TRACER", "BOUNDARY-TRACER")
COMPILER = shutil.which("gcc") or shutil.which("cc")


@pytest.fixture(scope="module")
def wide_paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    export(folder, laws=C_LAWS, breadth=3)
    return folder


def toy_answers(exam: Path, folder: Path, *flags: str) -> Report:
    if COMPILER is None:
        pytest.skip("NO C COMPILER: that the written exam can be sat without Python is not tested on this machine")
    program, strict = folder / "toy", ("-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-sign-compare")
    subprocess.run([COMPILER, *strict, *flags, TOY, "-o", program, "-lm"], check=True, timeout=120)
    (folder / "answers").mkdir()
    subprocess.run([program, exam, folder / "answers"], check=True, timeout=120, stdout=subprocess.PIPE)
    return mark(exam, folder / "answers")


def test_a_backend_in_c_passes(wide_paper: Path, tmp_path: Path) -> None:
    report = toy_answers(wide_paper, tmp_path)
    assert report.holds, report.broken()
    assert {result.verdict for result in report.results} == {Verdict.PASS}
    assert all(result.cases >= result.floor for result in report.results)
    assert report.cases >= 60
    assert report.backend == "toy_c"
    assert "manifest.json says that these are all" in report.notes[0]


def test_a_backend_in_c_that_ends_early_is_not_green(wide_paper: Path, tmp_path: Path) -> None:
    """Its manifest is written last."""
    toy_answers(wide_paper, tmp_path)
    (tmp_path / "answers" / "manifest.json").unlink()
    report = mark(wide_paper, tmp_path / "answers")
    assert not report.holds
    assert Verdict.UNKNOWN in report.counts


def test_a_mirrored_value_table_in_c_fails(wide_paper: Path, tmp_path: Path) -> None:
    found = by_item(toy_answers(wide_paper, tmp_path, "-DMIRRORED"))
    for law in ("VALUE-TRACER", "ORACLE", "BOUNDARY-TRACER"):
        for dtype in ("float64", "float32"):
            assert found[law, dtype].verdict is Verdict.FAIL
    # The mistake is not in the keys.
    assert found["KEY-TRACER", "float64"].verdict is Verdict.PASS
