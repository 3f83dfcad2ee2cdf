"""The self-test of the exam: a sample; the whole of it is run by the command line."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")

from translution.conformance.exam.law import Law, Trial
from translution.conformance.laws import all_laws
from translution.conformance.mutants.catalogue import catalogue
from translution.conformance.mutants.false_alarms import Task, Used, hold, measured
from translution.conformance.mutants.naive import Naive
from translution.conformance.mutants.orders import orders
from translution.conformance.mutants.selftest import (
    Kill,
    Sat,
    SelfTest,
    Sought,
    confront,
    correct,
    search,
    sit,
)
from translution.conformance.threads import one_thread


@pytest.fixture(autouse=True)
def in_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_every_name_in_kills_is_a_mutant() -> None:
    unknown = {(law.id, name) for law in all_laws().values() for name in law.kills if name not in catalogue()}
    assert not unknown


@pytest.mark.parametrize("name", sorted(catalogue())[::12])
def test_a_mutant_is_noticed(name: str) -> None:
    assert search(catalogue()[name], all_laws()).killed


@pytest.mark.parametrize("backend", sorted(correct()))
def test_correct_backends_pass(backend: str) -> None:
    laws = all_laws()
    chosen = [laws[name] for name in ("ORACLE", "ORACLE-GRADIENT", "VALUE-TRACER") if name in laws]
    found = list(sit(correct()[backend], "float32", chosen))
    assert {s.verdict for s in found} == {"PASS"}
    assert len(found) == len(chosen)


def blind_law(trial: Trial) -> None:
    """Looks at nothing."""


def broken_law(trial: Trial) -> None:
    """Finds everything wrong."""
    trial.require(False, "no answer will do")


def law_of(body: object, *kills: str) -> Law:
    return replace(all_laws()["ORACLE"], id="MINE", kills=kills, body=body, cases={"quick": 2, "full": 3})  # type: ignore[arg-type]


def test_a_law_that_sees_nothing_is_found_out() -> None:
    mutant = catalogue()["mask-inverted"]
    blind = law_of(blind_law, "mask-inverted")
    assert confront(blind, mutant) == Kill("MINE", True)
    found = SelfTest((search(mutant, {"MINE": blind}),), (), ("MINE",))
    assert (found.missed, found.alive, found.idle) == ([("MINE", "mask-inverted")], ["mask-inverted"], ["MINE"])
    assert not found.holds


def test_a_law_that_blames_everyone_is_found_out() -> None:
    sat = list(sit(Naive(), "float64", [law_of(broken_law)]))
    found = SelfTest((caught("ORACLE"),), tuple(sat), ("ORACLE",))
    assert [(s.backend, s.verdict) for s in found.blamed] == [("naive", "FAIL")]
    assert found.faults() == ["naive is correct, and MINE says FAIL in float64: no answer will do"]


def caught(*laws: str, level: str = "quick", dtype: str = "float64") -> Sought:
    kills = tuple(Kill(law, True, level, dtype, 3, "off by 2") for law in laws)
    return Sought("wrong", "adds a | b", "L1", "index", kills)


def test_another_law_steps_in_where_none_is_named() -> None:
    laws = {"BLIND": replace(law_of(blind_law), id="BLIND"), "ORACLE": replace(all_laws()["ORACLE"], kills=())}
    found = search(catalogue()["mask-inverted"], laws)
    assert [(kill.law, kill.named, kill.noticed) for kill in found.kills] == [("ORACLE", False, True)]
    assert SelfTest((found,), (), ("ORACLE",)).idle == ["ORACLE"]


def test_words_of_the_table() -> None:
    found = SelfTest(
        (caught("A", "B"), replace(caught("C", level="full", dtype="float16"), mutant="other")), (), ("A",)
    )
    lines = found.markdown_table().splitlines()
    assert lines[2:] == [
        "| `wrong` | adds a \\| b | L1 | A (3), B (3) |",
        "| `other` | adds a \\| b | L1 | C (3, float16, full) |",
    ]


def script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "make_kill_table.py"
    spec = importlib.util.spec_from_file_location("make_kill_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_rewritten_between_its_markers() -> None:
    module = script()
    found = SelfTest((caught("A"),), (Sat("naive", "A", "float64", "PASS", 4, ""),), ("A",), 1.5)
    page = module.with_section(f"top\n{module.BEGIN}\nold\n{module.END}\nbottom\n", module.section(found))
    assert page.startswith(f"top\n{module.BEGIN}\n1 of 1 mutants")
    assert page.endswith(f"| A (3) |\n{module.END}\nbottom\n")
    assert "old" not in page
    with pytest.raises(SystemExit):
        module.with_section("no markers", "")


def test_the_page_has_every_mutant_and_no_other() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "conformance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", page, re.MULTILINE)
    assert rows == list(catalogue()), "run scripts/make_kill_table.py"


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_other_orders_stay_within_their_bounds(dtype: str) -> None:
    found = measured(Task(dtype, 0, 46))
    assert [used.order for used in found] == list(orders())
    assert hold(found), [used.beyond for used in found]
    assert all(len(used.outs) >= 40 and used.gradients for used in found)
    # They are other orders: float64 answers differ in their last bits somewhere.
    assert dtype != "float64" or len({used.outs for used in found}) == len(found)


def test_false_alarms_are_counted() -> None:
    fine = Used("float32", "backwards", (0.5, 0.2), (), (1.0,))
    assert hold([fine])
    assert not hold([fine + Used("float32", "backwards", (2.0,), (), (), ("case 3",))])
    assert not hold([fine + Used("float32", "backwards", (), (), (1000.0,))])
    assert not hold([])
