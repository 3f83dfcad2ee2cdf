"""The commands of docs/conformance-ci.md are commands that exist; the one about other languages runs."""

import re
import shlex
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from translution.cli import app
from translution.conformance.exam.waivers import read_waivers
from translution.conformance.laws import all_laws

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "conformance-ci.md").read_text()


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every line of a shell block and every `run` of a workflow."""
    found = [line for block in blocks("sh") for line in block.splitlines()]
    for block in blocks("yaml"):
        for job in yaml.safe_load(block)["jobs"].values():
            found += [step["run"] for step in job["steps"] if "run" in step]
    return found


def check(command: str) -> str:
    """The program that a command calls; an error where it has no such option."""
    program, *words = shlex.split(command)
    if program == "translution":
        group = typer.main.get_command(app)
        name, *words = words
        found = group.get_command(group.make_context("translution", ["doctor"]), name)  # type: ignore[attr-defined]
        found.make_context(name, words)
    elif program == "pytest":
        options = {word for word in words if word.startswith("--")}
        shown = subprocess.run(
            [Path(sysconfig.get_path("scripts")) / "pytest", "--help"],
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout  # fmt: skip
        unknown = [option for option in options if not re.search(rf"^\s+{option}\b", shown, flags=re.MULTILINE)]
        assert unknown == []
    return program


@pytest.mark.parametrize("command", commands())
def test_every_command_exists(command: str) -> None:
    assert check(command) in ("translution", "pytest", "pip", "mkdir", "your_program")


@pytest.mark.parametrize("command", ["translution conform x --no-such-option", "pytest --translution-no-such-option"])
def test_a_command_that_does_not_exist_is_seen(command: str) -> None:
    with pytest.raises(Exception, match="no-such-option"):
        check(command)


def test_the_waiver_file_is_one(tmp_path: Path) -> None:
    (block,) = blocks("toml")
    assert tomllib.loads(block)
    (tmp_path / "waivers.toml").write_text(block)
    (waiver,) = read_waivers(tmp_path / "waivers.toml", all_laws()).every
    assert waiver.covers("BOUNDARY-TRACER", "stream", "float32")
    assert not waiver.covers("BOUNDARY-TRACER", "stream", "float64")


def test_another_language_goes_in_and_comes_out(tmp_path: Path) -> None:
    """As written, with two laws for all and the program of tests/toy_c as yours."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("NO C COMPILER: the recipe for other languages is not tested on this machine")
    source = ROOT / "tests" / "toy_c" / "toy.c"
    subprocess.run(
        [compiler, "-std=c99", "-O1", source, "-o", tmp_path / "your_program", "-lm"], check=True, timeout=120
    )
    (script,) = (block for block in blocks("sh") if "your_program exam" in block)
    script = script.replace("--export exam", "--export exam --law VALUE-TRACER --law KEY-TRACER")
    path = f"{tmp_path}:{sysconfig.get_path('scripts')}:/usr/bin:/bin"
    done = subprocess.run(
        ["/bin/sh", "-eu"], input=script, cwd=tmp_path, env={"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"(\d+) of \d+ questions answered", done.stdout)
    assert "The exam holds." in done.stdout
    assert (tmp_path / "conformance.xml").read_text().count("<testcase") == 4
