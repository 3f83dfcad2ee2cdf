"""The Python examples of README.md and docs/ run, each document in one namespace from top to bottom."""

from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from translution.spec.preset_text import preset_functions

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
SYBIL = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for example in SYBIL.parse(path).examples():
        example.evaluate()


def test_an_example_that_fails_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "wrong.md"
    path.write_text("```python\nvalue = 1\n```\n\n```python\nassert value == 2\n```\n")
    first, second = SYBIL.parse(path).examples()
    first.evaluate()
    with pytest.raises(AssertionError):
        second.evaluate()


def test_every_preset_has_its_line() -> None:
    text = (ROOT / "docs" / "operators.md").read_text()
    missing = [name for name in preset_functions() if f"**{name}**: " not in text or f'"{name}' not in text]
    assert missing == []
