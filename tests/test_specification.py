"""docs/specification.md, the code and the tests name the same clauses."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "specification.md").read_text()
SECTIONS = re.split(r"^#{2,3} ", TEXT, flags=re.MULTILINE)[1:]
CLAUSES = {section.partition(".")[0]: section for section in SECTIONS if re.match(r"[A-Z][0-9]+\. ", section)}
CLAUSE = r"\b[LERMODPB][0-9]{1,2}\b"
FOLDERS = ("spec", "translution_core", "backends", "conformance", "paper")
# "clause L3", "clauses E1 to E10, R2", "[M6]", and the clause that stands alone in quotes: the first part of an error.
MENTIONS = re.compile(rf"clauses? ((?:{CLAUSE}(?:,? (?:to|and) |, )?)+)|\[({CLAUSE})\]|[\"']({CLAUSE})[\"']")


def mentioned(text: str) -> set[str]:
    groups = (group for match in MENTIONS.finditer(text) for group in match.groups() if group)
    return {clause for group in groups for clause in re.findall(CLAUSE, group)}


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_clauses_are_numbered_without_gaps() -> None:
    for letter in "LERMODPB":
        numbers = [int(clause[1:]) for clause in CLAUSES if clause[0] == letter]
        assert numbers == list(range(1, len(numbers) + 1))
    assert len(CLAUSES) == sum(1 for section in SECTIONS if re.match(r"[A-Z][0-9]+\.", section))


@pytest.mark.parametrize("path", [*sources()], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_clause_in_the_code_is_in_the_text(path: Path) -> None:
    assert mentioned(path.read_text()) - CLAUSES.keys() == set()


def test_the_reader_of_clauses_sees_every_form() -> None:
    text = """(clauses E1 to E3, M4) f"[B3] x" SpecError(\n "L9", require(a, "L7" 'D1' (clause P2) E7 "R6x" """
    assert mentioned(text) == {"E1", "E3", "M4", "B3", "L9", "L7", "D1", "P2"}


@pytest.mark.parametrize("clause", CLAUSES)
def test_every_clause_has_its_parts(clause: str) -> None:
    """A meaning, an example that runs, and the files of tests it names hold the clause."""
    section = CLAUSES[clause]
    meaning, fence, example = section.partition("```python\n")
    assert len(meaning.splitlines()) > 2
    assert fence
    assert "assert" in example
    checked = re.findall(r"^Checked by (.*)\.$", section, flags=re.MULTILINE)
    assert len(checked) == 1
    files = re.findall(r"tests/\w+\.py", checked[0])
    assert files
    for file in files:
        found = re.findall(rf"(?<![A-Za-z0-9]){clause}(?![0-9])", (ROOT / file).read_text())
        assert found, f"{file} does not name {clause}"


@pytest.mark.parametrize("clause", CLAUSES)
def test_what_a_clause_says_it_is_checked_by_exists(clause: str) -> None:
    checked = re.findall(r"^Checked by (.*)\.$", CLAUSES[clause], flags=re.MULTILINE)[0]
    code = "\n".join(path.read_text() for path in sources())
    for name in re.findall(r"`([\w.]+)`", checked):
        assert re.search(rf"(?:def|class) {name.rpartition('.')[2]}\b", code), name


def test_every_rule_of_the_spec_is_broken_by_a_test() -> None:
    """Each clause that spec/ raises has a row of that name in tests/test_spec_rules.py or a test of its own."""
    tests = "\n".join(path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py")))
    raised = {
        clause for path in (ROOT / "spec").glob("*.py") for clause in re.findall(rf"\"({CLAUSE})\"", path.read_text())
    }
    assert raised
    unbroken = [c for c in raised if not re.search(rf"\"{c}-[\w-]+\"|def test_{c}_|\"{c}\"", tests)]
    assert unbroken == []
