"""A distribution of its own, installed by itself, goes through each door: Python, the command line, pytest."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from translution.conformance.exam.report import Report, Verdict
from translution.conformance.exam.session import run

SOURCE = Path(__file__).parent / "toy_backend"
SOME = ("--law", "VALUE-TRACER", "--law", "KEY-TRACER", "--dtype", "float64")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy alone, built and installed by pip without the network."""
    source, target = tmp_path_factory.mktemp("source") / "toy", tmp_path_factory.mktemp("site")
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", target, source],
        check=True, timeout=200, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    return target


@pytest.fixture
def on_path(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started find the toy."""
    monkeypatch.setenv("PYTHONPATH", str(installed))


def verdicts(report: Report) -> set[Verdict]:
    return {result.verdict for result in report.results}


def test_it_is_a_distribution_of_its_own(installed: Path) -> None:
    assert {item.name for item in installed.iterdir()} - {"__pycache__"} == {
        "toy_translution.py", "toy_translution-0.1.0.dist-info",
    }  # fmt: skip
    assert importlib.util.find_spec("toy_translution") is None


@pytest.mark.usefixtures("on_path")
def test_by_python() -> None:
    """All laws; where the exam has more cases than the toy claims, enough are left."""
    report = run("toy_translution:backend", jobs=1)
    assert report.holds, report.broken()
    assert verdicts(report) == {Verdict.PASS, Verdict.NOT_CLAIMED}
    assert report.counts[Verdict.PASS] > report.counts[Verdict.NOT_CLAIMED]


@pytest.mark.usefixtures("on_path")
def test_by_python_mirrored() -> None:
    report = run("toy_translution:mirrored", laws=["VALUE-TRACER", "KEY-TRACER", "ORACLE"], jobs=1)
    assert not report.holds
    found = {(result.law, result.dtype): result.verdict for result in report.results}
    for dtype in ("float64", "float32"):
        assert found["VALUE-TRACER", dtype] is found["ORACLE", dtype] is Verdict.FAIL
        assert found["KEY-TRACER", dtype] is Verdict.PASS


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize(("attribute", "code"), [("backend", 0), ("mirrored", 1)])
def test_by_command_line(attribute: str, code: int, tmp_path: Path) -> None:
    command = [str(Path(sysconfig.get_path("scripts")) / "translution"), "conform", f"toy_translution:{attribute}"]
    done = subprocess.run(
        [*command, *SOME, "--jobs", "1", "--json", "report.json", "--junit", "junit.xml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    report = Report.from_json(json.loads((tmp_path / "report.json").read_text()))
    assert report.backend == f"toy_translution:{attribute}"
    assert report.holds is (code == 0)
    root = ET.parse(tmp_path / "junit.xml").getroot()
    assert len(list(root.iter("testcase"))) == 2
    assert len(list(root.iter("failure"))) == code


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize(("attribute", "code"), [("backend", 0), ("mirrored", 1)])
def test_by_pytest(attribute: str, code: int, tmp_path: Path) -> None:
    options = [word.replace("--", "--translution-") for word in SOME]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--translution-backend", f"toy_translution:{attribute}", *options, "-rA"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "PASSED translution::KEY-TRACER[float64]" in done.stdout
    assert f"{'FAILED' if code else 'PASSED'} translution::VALUE-TRACER[float64]" in done.stdout
