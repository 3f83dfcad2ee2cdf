"""Reports to look at, an HTML page and a terminal: nothing that is broken is left out, and text stays text."""

import importlib.resources
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from translution.conformance.exam.law import Law
from translution.conformance.exam.report import Report, Result, Verdict
from translution.conformance.reports.html import html_page, write_html
from translution.conformance.reports.markup import join, tag
from translution.conformance.reports.strips import Axis
from translution.conformance.reports.summary import clean, command, headline
from translution.conformance.reports.terminal import IN_FULL, show_report
from translution.conformance.reports.words import operator_words
from translution.spec import Mean, Operator, Shared
from translution.spec.layout import Lattice
from translution.spec.serialization import operator_to_data


def many(count: int) -> Report:
    results = tuple(
        Result(f"LAW-{n // 4}", "pairwise", f"dtype{n % 4}", Verdict.FAIL, 1, 1, 4, message=f"broke in case {n}")
        for n in range(count)
    )
    return Report("b", "2026.1", "quick", count, results)


def shown(report: Report, laws: dict[str, Law], width: int = 100) -> str:
    stream = io.StringIO()
    show_report(report, laws, Console(file=stream, width=width))
    return stream.getvalue()


def words(text: str) -> str:
    """Text without frames and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


# HTML


class Page(HTMLParser):
    """The elements of a page, its text outside styles and scripts, and its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & {*self._open}:
            self.text.append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == name]


def test_html_escapes_what_the_backend_says(
    laws: dict[str, Law], every_verdict: Report, hostile: str, odd: str
) -> None:
    text = html_page(every_verdict, laws)
    page = Page(text)
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert hostile in page.text
    assert clean(odd) in page.text
    assert "\x1b" not in text
    text.encode()


def test_html_needs_nothing_else(real: Report, laws: dict[str, Law], every_verdict: Report) -> None:
    for report in (real, every_verdict):
        page = Page(html_page(report, laws))
        assert {name for name, _ in page.elements} & {"link", "iframe", "object", "embed", "base"} == set()
        for _, attributes in page.elements:
            assert attributes.keys() & {"src", "srcset", "action", "style", "xlink:href", "data"} == set()
            assert not [name for name in attributes if name.startswith("on")]
            assert (attributes.get("href") or "#").startswith("#")
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        assert {(link["href"] or "")[1:] for link in page.all("a")} <= set(ids)
    folder = importlib.resources.files("translution.conformance.reports") / "page"
    for file in folder.iterdir():
        assert re.search(r"https?:|url\(|@import|fetch|import\(", file.read_text()) is None


def test_html_has_every_item_as_text_under_real_headings(laws: dict[str, Law], every_verdict: Report) -> None:
    page = Page(html_page(every_verdict, laws))
    assert {heading["scope"] for heading in page.all("th")} == {"col", "colgroup", "row", "rowgroup"}
    for text in ("ORACLE", "25%", "NOT CLAIMED", "FAIL", "UNKNOWN", "WAIVED", "no float16 here", "known since May",
                 "only 1 of 4 cases ran", "Lattice(grid=(2, 3))", "a note", "cuda:1"):  # fmt: skip
        assert any(text in part for part in page.text), text
    assert any(part == laws["VALUE-TRACER"].statement for part in page.text)


def test_html_forbids_what_it_does_not_contain(laws: dict[str, Law], tmp_path: Path, every_verdict: Report) -> None:
    write_html(every_verdict, laws, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    (policy,) = (meta["content"] or "" for meta in Page(text).all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_markup_escapes_by_default() -> None:
    assert tag("p", "<&", tag("b", "x"), title='"<', class_="a", data_text="b", hidden=True, open=False) == (
        '<p title="&quot;&lt;" class="a" data-text="b" hidden>&lt;&amp;<b>x</b></p>'
    )
    assert join("<", tag("br")) == "&lt;<br>"


def test_strips_put_shares_in_their_place() -> None:
    base = Result("A", "a", "float32", Verdict.PASS)
    axis = Axis.of([replace(base, shares=(1e-3, 0.0, 0.2))])
    assert axis.low == -3
    places = [float(axis.at(share).rstrip("%")) for share in (0.0, 1e-5, 1e-3, 1e-2, 1.0)]
    assert places[:3] == [0.0, 0.0, 0.0]
    assert places[3] == pytest.approx(100 / 3.3, abs=0.01)
    assert places[4] == pytest.approx(300 / 3.3, abs=0.01)
    for shares in ((0.5,), (0.0, 0.0), (0.1, 0.2, 0.9)):
        assert f"{len(shares)} cases: median" in axis.strip([replace(base, shares=shares)])
    assert Axis.of([base]).low == -2


# Terminal


@pytest.mark.parametrize("width", [60, 100, 160])
def test_terminal_shows_every_broken_result(
    width: int, real: Report, laws: dict[str, Law], every_verdict: Report
) -> None:
    for report in (real, every_verdict):
        text = shown(report, laws, width)
        assert max(map(len, text.splitlines())) <= width
        told = words(text).replace(" ", "")
        for result in report.broken():
            for part in (result.law, clean(result.message), laws[result.law].statement, command(report, result)):
                shared = report is real and result.dtype == "float32" and part.startswith("translution")
                assert shared or part.replace(" ", "").replace("\n", "") in told
        assert headline(report).replace(" ", "") in told


def test_terminal_spells_out_what_did_not_pass(laws: dict[str, Law], every_verdict: Report) -> None:
    text = words(shown(every_verdict, laws, 160))
    for part in ("NOT CLAIMED: the backend says", "WAIVED: it fails", "UNKNOWN: nobody knows",
                 "1 item: no float16 here", "VALUE-TRACER (stream float64): known since May",
                 "equals that of the mutant value-mirrored", "level full, device cuda:1, translution 0.1.0",
                 "case 3 of the edition: the last of its 2 questions", "layout = Lattice(grid=(2, 3))"):  # fmt: skip
        assert part in text
    assert "\x1b" not in text
    # Beside the verdict, where the eye is.
    assert re.search(r"The exam does not hold: .* s\. a note$", text)


def test_terminal_stays_short_when_everything_fails(laws: dict[str, Law]) -> None:
    report = many(800)
    text = shown(report, laws)
    assert text.count("╭") == IN_FULL
    assert "800 results are broken; --json has each" in text
    below = text.split("cases  how many ran")[1]
    assert len(below.splitlines()) < 150
    told = [n for n in range(200) if re.search(rf"LAW-{n}\b", below)]
    assert f"{200 - len(told)} more groups of broken results" in below
    assert 0 < len(told) < 200


def test_terminal_fits_every_column_somewhere(laws: dict[str, Law]) -> None:
    results = tuple(
        Result("ORACLE", f"algorithm{n}", "bfloat16", Verdict.PASS, 4, 4, 4, 1) for n in range(30)
    )  # fmt: skip
    text = shown(Report("b", "2026.1", "quick", 30, results), laws, 80)
    assert [n for n in range(30) if not re.search(rf"algorithm{n}\b", text)] == []
    assert sum(line.count(" exact") for line in text.splitlines() if line.startswith("ORACLE")) == 30
    assert "…" not in text


def test_rich_markup_of_a_backend_is_text(laws: dict[str, Law]) -> None:
    failed = Result("ORACLE", "[bold]", "float64", Verdict.FAIL, message="[red]x[/] [/nothing] :smile:")
    text = shown(Report("[link=x]b[/link]", "e", "quick", 1, (failed,)), laws)
    for part in ("[bold]", "[red]x[/] [/nothing] :smile:", "conformance of [link=x]b[/link]"):
        assert part in text


def test_operators_are_told_without_their_defaults() -> None:
    operator = Operator(Lattice((2, 3), kernel_size=(3, 3), stride=(2, 1)), 4, 2, Shared(6), relevance=Mean())
    assert operator_words(operator_to_data(operator)) == [
        ("layout", "Lattice(grid=(2, 3), kernel_size=(3, 3), stride=(2, 1))"),
        ("dim", "4"),
        ("num_heads", "2"),
        ("value", "Shared(features=6)"),
        ("relevance", "Mean"),
    ]
    assert operator_words({"layout": {"kind": "New", "a": 1}, "b": [1]}) == [("layout", "New(a=1)"), ("b", "(1,)")]
