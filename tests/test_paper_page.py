"""docs/paper.md follows from its template and what was measured, and says whatever came out."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PERFORMANCE = json.loads((ROOT / "docs" / "performance.json").read_text())


@pytest.fixture(scope="module")
def paper_page() -> Iterator[ModuleType]:
    """The benchmarks import one another as a program started in their folder does."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("paper_page", ROOT / "benchmarks" / "paper_page.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def digits(difference: float) -> dict[str, Any]:
    """Results of two models and two seeds, Translution being so much better than attention."""
    names = ("static to static", "dynamic to dynamic", "static to dynamic")

    def row(model: str, mean: float, beyond: dict[str, Any] | None) -> dict[str, Any]:
        measured = {"mean": mean, "half_width": 1.5, "values": [mean - 1, mean + 1]}
        figures = [{"name": name, "measured": measured, "beyond_attention": beyond, "paper": 18.18} for name in names]
        return {"model": model, "parameters": 1234, "seconds": 20.0, "figures": figures}

    beyond = {"mean": difference, "half_width": 1.0, "values": [difference, difference]}
    return {
        "summary": [row("attention", 50.0, None), row("translution", 50.0 + difference, beyond)],
        "scale": {"size": {"dim": 32, "depth": 2}, "steps": 300, "batch_size": 128},
        "data": {"digits": {"train": 3500}},
        "seeds": 2,
        "command": "translution paper digits",
        "machine": {"processor": "one", "cores": "2"},
        "versions": {"torch": "2"},
        "runs": [{"processor_seconds": 1800.0}, {"processor_seconds": 1800.0}],
    }


def test_the_page_is_what_the_results_say(paper_page: ModuleType) -> None:
    written = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    assert written == paper_page.page(paper_page.read_results(), PERFORMANCE)


@pytest.mark.parametrize(("difference", "said"), [
    (4.0, "Translution is better than self-attention (+4.00 ± 1.00)"),
    (0.5, "Translution can't be told from self-attention (+0.50 ± 1.00)"),
    (-4.0, "Translution is worse than self-attention (-4.00 ± 1.00)"),
])  # fmt: skip
def test_whatever_comes_out_is_said(paper_page: ModuleType, difference: float, said: str) -> None:
    text = paper_page.page({"digits": digits(difference)}, PERFORMANCE)
    assert f"Static to dynamic: {said}." in text
    assert "60 minutes of one processor in all" in text
    assert (f"**{difference:+.2f} ± 1.00**" in text) == (abs(difference) > 1)
    assert "Not run yet at any size. `translution paper text` does it." in text


def test_a_lower_perplexity_is_the_better_one(paper_page: ModuleType) -> None:
    found = digits(-4.0)
    for row in found["summary"]:
        row["figures"] = [{**row["figures"][0], "name": "perplexity"}]
    found["scale"] |= {"length": 64}
    found["data"] = {"tokens": {"train": 1000, "held_out": 100}}
    text = paper_page.page({"text": found}, PERFORMANCE)
    assert "Perplexity: Translution is better than self-attention (-4.00 ± 1.00)." in text
    assert "1,000 bytes to train on and 100 held out" in text


def test_a_wrong_count_stops_the_page(paper_page: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    rows = paper_page.paper_rows()
    monkeypatch.setattr(paper_page, "paper_rows", lambda: (replace(rows[0], exact=1), *rows[1:]))
    with pytest.raises(ValueError, match="MNIST, self-attention: the models' descriptions give another number"):
        paper_page.page({}, PERFORMANCE)
