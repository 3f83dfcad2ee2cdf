"""Blind mutation: what is changed and what is left alone, and that the exam notices."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from translution.conformance.mutants.blind import BlindRun, Found, Journal, sampled
from translution.conformance.mutants.blind_package import Package
from translution.conformance.mutants.blind_points import Mutation, mutated, mutations, points
from translution.conformance.mutants.blind_reach import reached
from translution.conformance.mutants.blind_survivors import KINDS, Survivor, SurvivorError, explanation, read_survivors

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

# Each line, and the changes that are made of it.
CHANGED = {
    "a + b": ["a + b -> a - b"],
    "a - b": ["a - b -> a + b"],
    "a * b": ["a * b -> a + b"],
    "a / b": ["a / b -> a * b"],
    "a // b": ["a // b -> a * b"],
    "a % b": ["a % b -> a // b"],
    "a ** b": ["a ** b -> a * b"],
    "a @ b": ["a @ b -> a * b"],
    "a & b": ["a & b -> a | b"],
    "-a": ["-a -> a"],
    "not a": ["not a -> a"],
    "~a": ["~a -> a"],
    "a < b": ["a < b -> a <= b"],
    "a <= b": ["a <= b -> a < b"],
    "a > b": ["a > b -> a >= b"],
    "a >= b": ["a >= b -> a > b"],
    "a == b": ["a == b -> a != b"],
    "a is b": ["a is b -> a is not b"],
    "a in b": ["a in b -> a not in b"],
    "a < b < c": ["a < b < c -> a <= b < c", "a < b < c -> a < b <= c"],
    "a and b": ["a and b -> a or b"],
    "a or b": ["a or b -> a and b"],
    "True": ["True -> False"],
    "0": ["0 -> 1"],
    "5": ["5 -> 6", "5 -> 4"],
    "0.5": ["0.5 -> 1.5", "0.5 -> -0.5"],
    "min(a)": ["min(a) -> pass", "min -> max"],
    "np.maximum": ["np.maximum -> np.minimum"],
    "np.zeros": ["np.zeros -> np.ones"],
    "x.any": ["x.any -> x.all"],
    "a[b:c]": ["b:c -> :c", "b:c -> b:"],
    "a += b": ["a += b -> a -= b", "a += b -> a = b"],
    "b if a else c": ["... if a -> ... if True", "... if a -> ... if False"],
    "[a for a in b if a]": ["if a -> if True"],
    "f(a)": ["f(a) -> pass"],
    # These are read by people and by type checkers.
    "'text'": [],
    "f'{a + 1}'": [],
    "a + 'text'": [],
    "raise E(a + 1)": [],
    "assert a < 1": [],
    "x: L[1]": [],
    "None": [],
    "a.reshape(-1)": ["a.reshape(-1) -> pass", "-1 -> 1"],
    "zip(strict=True)": ["zip(strict=True) -> pass"],
}


@pytest.mark.parametrize(("line", "changes"), CHANGED.items(), ids=list(CHANGED))
def test_changes_of_a_line(line: str, changes: list[str]) -> None:
    assert [m.change for m in mutations(line, "m")] == changes


def test_a_change_does_what_it_says() -> None:
    for line, changes in CHANGED.items():
        for number, change in enumerate(changes):
            after = change.split(" -> ")[1].removeprefix("... ").removeprefix("if ")
            assert after in ast.unparse(mutated(line, number)), change


SOURCE = '''"""A docstring with 1 + 1."""

from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    LIMIT = 3

__all__ = ["f"[0:1]]
Array = dict[str, int] | None


@cache(maxsize=4)
def f(a: Annotated[int, 7], b: int = 2) -> Annotated[int, 8]:
    """Another, with 2 * 2."""
    if a < b:
        return 0
    while a:
        a -= 1
    return a


class C:
    size: int = 9

    def g(self) -> None:
        for a in self:
            if a:
                continue

    def __repr__(self) -> str:
        return str(1 + 1)
'''


def test_changes_of_a_module() -> None:
    found = {(m.function, m.text, m.change) for m in mutations(SOURCE, "m")}
    assert found == {
        ("f", "def f(a: Annotated[int, 7], b: int = 2) -> Annotated[int, 8]:", "2 -> 3"),
        ("f", "def f(a: Annotated[int, 7], b: int = 2) -> Annotated[int, 8]:", "2 -> 1"),
        ("f", "if a < b:", "if a < b -> if True"),
        ("f", "if a < b:", "if a < b -> if False"),
        ("f", "if a < b:", "a < b -> a <= b"),
        ("f", "return 0", "0 -> 1"),
        ("f", "while a:", "while a -> while False"),
        ("f", "a -= 1", "a -= 1 -> a += 1"),
        ("f", "a -= 1", "a -= 1 -> a = 1"),
        ("f", "a -= 1", "1 -> 2"),
        ("f", "a -= 1", "1 -> 0"),
        ("C", "size: int = 9", "9 -> 10"),
        ("C", "size: int = 9", "9 -> 8"),
        ("C.g", "if a:", "if a -> if True"),
        ("C.g", "if a:", "if a -> if False"),
        ("C.g", "continue", "continue -> break"),
    }


def test_equal_changes_of_equal_lines_are_counted() -> None:
    assert [m.ordinal for m in mutations("def f():\n    g = 0\n    g = 0\n", "m")] == [0, 1]


@pytest.mark.parametrize("backend", ["reference", "numpy", "torch"])
def test_every_change_of_a_backend_is_another_program_and_has_a_name_of_its_own(backend: str) -> None:
    package = Package.of(f"translution.backends.{backend}")
    for module in package.paths:
        source = package.source(module)
        found, plain = mutations(source, module), ast.unparse(ast.parse(source))
        assert len(set(found)) == len(found) == len(points(ast.parse(source)))
        for number in range(0, len(found), 7):
            changed = ast.unparse(mutated(source, number))
            assert changed != plain
            compile(changed, module, "exec")


def test_the_package_holds_what_the_backend_imports_of_it() -> None:
    found = Package.of("translution.backends.torch").paths
    assert "translution.backends.torch.steps" in found
    assert "translution.backends.torch.conversion" not in found


@needs_fork
def test_a_changed_package_stands_beside_the_one_that_is() -> None:
    package = Package.of("translution.backends.numpy")
    before = import_module(package.name)
    number, mutation = next(
        (n, m)
        for n, m in enumerate(mutations(package.source(package.name), package.name))
        if m.change == "if request.device != 'cpu' -> if True"
    )
    assert package.mutations()[mutation] == number
    with reached(package) as functions:
        changed = package.import_anew(package.compiled() | {package.name: package.changed(mutation, number)})
    assert import_module(package.name) is before
    assert type(changed) is not type(before.backend)
    from translution.algorithms import Request
    from translution.spec import Lattice, Operator, Shared

    request = Request(Operator(Lattice((3,)), 2, 1, Shared(2), Shared(2), Shared(2)), dtype="float64")
    assert before.backend.not_supported(request, "stream") == []
    assert changed.not_supported(request, "stream") != []
    # Classes run when they are imported, methods don't.
    assert (package.name, "NumpyBackend") in functions
    assert (package.name, "NumpyBackend.forward") not in functions


def entry(**changes: object) -> str:
    data = {"module": "m", "function": "f", "line": "a", "change": "b", "kind": "speed", "reason": "r"} | changes
    return "[[survivor]]\n" + "".join(f"{name} = {value!r}\n" for name, value in data.items())


def test_survivors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "survivors.toml"
    path.write_text(entry() + entry(ordinal=1, change="c") + entry(ordinal="all", change="d"), encoding="utf-8")
    found = read_survivors(path)
    first = Mutation("m", "f", "a", "b")
    assert explanation(found, first) is found[0]
    assert explanation(found, Mutation("m", "f", "a", "b", 1)) is None
    assert explanation(found, Mutation("m", "f", "a", "c", 1)) is found[1]
    assert explanation(found, Mutation("m", "f", "a", "d", 5)) is found[2]


@pytest.mark.parametrize("wrong", [{"kind": "luck"}, {"because": "so"}])
def test_what_a_survivors_file_may_not_say(tmp_path: Path, wrong: dict[str, str]) -> None:
    path = tmp_path / "survivors.toml"
    path.write_text(entry(**wrong), encoding="utf-8")
    with pytest.raises(SurvivorError, match=next(iter(wrong.values() if "kind" in wrong else wrong))):
        read_survivors(path)


def test_shipped_survivors_are_about_what_there_is() -> None:
    every = {
        m for name in ("reference", "numpy", "torch") for m in Package.of(f"translution.backends.{name}").mutations()
    }
    gone = [str(s) for s in read_survivors() if not any(s.explains(m) for m in every)]
    assert not gone
    assert all(s.kind in KINDS and s.reason for s in read_survivors())


def found(name: str, how: str, kind: str | None = None) -> Found:
    mutation = Mutation("m", name, "a", "b")
    return Found(mutation, how, "", 0.0, None if kind is None else Survivor("m", name, "a", "b", kind, "r"))


def test_figures_of_a_run() -> None:
    every = (found("f", "FAIL"), found("g", "FAIL"), found("h", "", "speed"), found("i", "", "gap"))
    run = BlindRun("numpy", 9, every, (), (), 1.0)
    assert (run.killed, run.raw, run.net, run.holds) == (2, 2 / 4, 2 / 3, True)
    worse = BlindRun("numpy", 9, (*every, found("j", "")), (), (), 1.0)
    assert (worse.raw, worse.net, worse.holds) == (2 / 5, 2 / 4, False)
    assert [f.mutation.function for f in worse.unexplained] == ["j"]


def test_a_journal_goes_on_and_refuses_other_sources(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    kept = found("f", "FAIL ORACLE")
    Journal(path, {"sources": "1"}).add(kept)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"module": "m", "fun')
    assert Journal(path, {"sources": "1"}).known == {kept.mutation: kept}
    with pytest.raises(ValueError, match="other sources"):
        Journal(path, {"sources": "2"})


def test_a_sample_is_always_the_same_and_a_larger_one_holds_it() -> None:
    every = [Mutation("m", "f", str(n), "b") for n in range(50)]
    assert len(sampled(every, 7)) == 7
    assert set(sampled(every, 7)) < set(sampled(every[::-1], 20))


@needs_fork
def test_the_exam_notices_a_sample_of_mutations(tmp_path: Path) -> None:
    """In a process of its own: a fork should have no threads, and laws are few to keep it short."""
    laws = [part for name in ("ORACLE", "ORACLE-GRADIENT", "ORACLE-WEIGHTS", "CLAIMS") for part in ("--law", name)]
    file = tmp_path / "blind.json"
    command = [
        sys.executable,
        "-m",
        "translution.conformance.mutants.blind",
        "numpy",
        "--sample",
        "16",
        "--json",
        str(file),
    ]
    done = subprocess.run([*command, *laws], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode in (0, 1), done.stderr
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["run"] == 16
    assert data["broken"] == []
    # Four laws alone notice so many of this sample; the whole exam notices more.
    assert data["killed"] >= 10, done.stdout
