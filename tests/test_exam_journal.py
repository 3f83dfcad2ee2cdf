"""Journals: an interrupted exam goes on, and only with results of the same code, waivers and settings."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from translution.cli import app
from translution.conformance.exam.code import MOST_BYTES, code_of
from translution.conformance.exam.journal import Journal, JournalError
from translution.conformance.exam.law import FULL
from translution.conformance.exam.report import Report, Verdict
from translution.conformance.exam.session import run
from translution.conformance.mutants.naive import Naive

MIRRORED = "translution.conformance.mutants.catalogue:value_mirrored"
RIGHT = "from translution.conformance.mutants.naive import Naive\nbackend = Naive()\n"
WRONG = "from translution.conformance.mutants.catalogue import value_mirrored as backend\n"
ASKED: dict[str, Any] = {"laws": ["COUNT", "VALUE-TRACER"], "dtypes": ["float64"], "jobs": 1}
WAIVER = '[[waiver]]\nlaw = "VALUE-TRACER"\nreason = "mirrored"\nexpires = 2099-01-01\n'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a command is given."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and output of ``translution conform``; backends live in processes of their own."""
    done = CliRunner().invoke(app, ["conform", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def interrupted_after(count: int) -> Any:
    def interrupt(*told: Any) -> None:
        if told[1] == count:
            raise KeyboardInterrupt

    return interrupt


def reused(report: Report) -> list[str]:
    return [note for note in report.notes if "from an earlier run" in note]


def test_an_interrupted_exam_keeps_what_it_had_and_goes_on(tmp_path: Path) -> None:
    journal = tmp_path / "deep" / "journal.jsonl"
    given: dict[str, Any] = {"laws": ["VALUE-TRACER", "COUNT"], "jobs": 1, "journal": journal}
    first = run(Naive(), **given, progress=interrupted_after(3))
    assert (len(first.results), first.complete, first.holds) == (3, False, False)
    assert "interrupted" in first.notes[0]
    # A line that was being written when the machine stopped.
    journal.write_text(journal.read_text() + '{"law": "COU')

    seen: list[int] = []
    second = run(Naive(), **given, resume=True, progress=lambda *told: seen.append(told[1]))
    assert seen == [4, 5, 6, 7, 8]
    assert second.complete
    assert second.holds
    assert second.notes == (f"3 of 8 items are from an earlier run (journal {journal})",)
    assert [r.seconds for r in second.results if r in first.results] == [r.seconds for r in first.results]
    with pytest.raises(JournalError, match=r"another exam .*level"):
        run(Naive(), **given, level=FULL, resume=True)
    with pytest.raises(JournalError, match=r"limit: 60.0, now 30.0"):
        run(Naive(), **given, limit=30.0, resume=True)
    fresh = run(Naive(), **given)
    assert fresh.complete
    assert not reused(fresh)


def test_results_of_other_laws_are_not_counted(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    run(Naive(), **ASKED, journal=journal)
    seen: list[tuple[Any, ...]] = []
    found = run(
        Naive(), laws="CLAIMS", dtypes="float64", journal=journal, resume=True,
        progress=lambda *told: seen.append(told[1:]),
    )  # fmt: skip
    assert seen == [(1, 1)]
    assert not reused(found)


def test_a_journal_holds_results_as_they_were(tmp_path: Path) -> None:
    failed = run(MIRRORED, laws=["VALUE-TRACER"], dtypes=["float64"]).results[0]
    assert failed.counterexample is not None
    path = tmp_path / "journal"
    book = Journal(path, {"backend": "x"}, resume=False)
    book.add(failed)
    again = Journal(path, {"backend": "x"}, resume=True)
    assert again.results == {failed.key: failed}
    assert all(json.loads(line) for line in path.read_text().splitlines())


# What changed in between


@pytest.mark.parametrize("home", ["kernels.py", "kernels/inner.py"], ids=["module", "package"])
def test_a_backend_that_changed_is_examined_anew(here: Path, home: str) -> None:
    """The module that is named, and what it imports from beside it."""
    code = here / home
    code.parent.mkdir(exist_ok=True)
    code.write_text(RIGHT)
    (here / "named.py").write_text(f"import json, {home[:-3].replace('/', '.')} as found\nbackend = found.backend\n")
    given: dict[str, Any] = {**ASKED, "journal": here / "journal"}
    assert run("named:backend", **given).holds
    again = run("named:backend", **given, resume=True)
    assert again.holds
    assert reused(again) == [f"2 of 2 items are from an earlier run (journal {here / 'journal'})"]

    code.write_text(WRONG)
    with pytest.raises(JournalError, match=r"code of kernels.*: 'sha256 \w+', now 'sha256 \w+'\): start without"):
        run("named:backend", **given, resume=True)
    (here / "named.py").write_text("import kernels\n" + RIGHT)
    with pytest.raises(JournalError, match="code of named"):
        run("named:backend", **given, resume=True)


def test_another_backend_of_the_same_name_is_another(here: Path) -> None:
    (here / "one.py").write_text(RIGHT)
    (here / "two.py").write_text(RIGHT)
    run("one:backend", **ASKED, journal="journal")
    with pytest.raises(JournalError, match="backend: 'one:backend', now 'two:backend'"):
        run("two:backend", **ASKED, journal="journal", resume=True)


def test_code_that_is_not_found_is_told(tmp_path: Path) -> None:
    """As of a backend that was made by hand, without a file."""
    made = type("Made", (Naive,), {"__module__": "nowhere"})
    run(made(), **ASKED, journal=tmp_path / "journal")
    found = run(made(), **ASKED, journal=tmp_path / "journal", resume=True)
    assert len(reused(found)) == 1
    assert "the backend's code was not found" in found.notes[1]


def test_waivers_count_by_what_they_say(here: Path) -> None:
    waivers, journal = here / "waivers.toml", here / "journal"
    waivers.write_text(WAIVER)
    given: dict[str, Any] = {**ASKED, "journal": journal, "waivers": "waivers.toml"}
    assert run(MIRRORED, **given).results[0].verdict is Verdict.WAIVED
    again = run(MIRRORED, **given, resume=True)
    assert again.results[0].verdict is Verdict.WAIVED
    assert len(reused(again)) == 1
    waivers.write_text("")
    with pytest.raises(JournalError, match=r"waivers: 'sha256 \w+', now 'sha256 \w+'"):
        run(MIRRORED, **given, resume=True)
    assert run(MIRRORED, **given).results[0].verdict is Verdict.FAIL


def test_code_is_told_by_content_and_without_importing_it(here: Path) -> None:
    package = here / "space" / "pack"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError\n")
    (package / "data.txt").write_text("1")
    (package / "kernel.cu").write_text("1")
    first = code_of("space.pack.deep:backend")
    assert first.keys() == {"space.pack", "translution"}
    os.utime(package / "kernel.cu", ns=(1, 1))
    (package / "data.txt").write_text("2")
    assert code_of("space.pack.deep:backend") == first
    (package / "kernel.cu").write_text("2")
    assert code_of("space.pack.deep:backend")["space.pack"] != first["space.pack"]
    assert code_of("no_such_module:backend")["no_such_module"] == "not found"
    assert code_of("pytest:backend")["pytest"].startswith(f"{pytest.__version__} sha256 ")
    assert "sha256" in code_of("numpy")["translution"]
    assert code_of(Naive()) == code_of("numpy")


def test_what_is_installed_beside_a_backend_counts_by_its_version(here: Path) -> None:
    (here / "uses.py").write_text("from hypothesis import given\nfrom . import x\nimport no_such_module, json\n")
    found = code_of("uses:backend")
    assert found.keys() == {"uses", "hypothesis", "translution"}
    assert "sha256" not in found["hypothesis"]


def test_code_is_told_in_no_time(here: Path) -> None:
    """Of files too large to be read, the time of change counts."""
    (here / "vast").mkdir()
    (here / "vast" / "__init__.py").write_text("")
    with (here / "vast" / "a.so").open("wb") as file:
        file.truncate(100 * MOST_BYTES)
    code_of("vast:backend")
    spent = []
    for _ in range(5):
        begin = time.perf_counter()
        first = code_of("vast:backend")
        spent.append(time.perf_counter() - begin)
    assert min(spent) < 0.05
    os.utime(here / "vast" / "a.so", ns=(1, 1))
    assert code_of("vast:backend") != first


def test_a_folder_that_changes_when_a_backend_is_imported(here: Path) -> None:
    (here / "away.py").write_text(f"import os\nos.mkdir('there')\nos.chdir('there')\n{WRONG}")
    (here / "waivers.toml").write_text(WAIVER)
    report = run("away:backend", **ASKED, waivers="waivers.toml", journal="j/journal")
    assert report.results[0].verdict is Verdict.WAIVED
    assert (here / "j" / "journal").exists()

    class Wanders(Naive):
        def forward(self, *given: Any) -> Any:
            os.chdir(here / "there")
            return super().forward(*given)

    run(Wanders(), **ASKED, journal="k/journal")
    assert (here / "k" / "journal").exists()
    assert not list((here / "there").iterdir())


# Damage


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Those of a good journal: a heading and two results."""
    path = tmp_path_factory.mktemp("good") / "journal"
    run(Naive(), **ASKED, journal=path)
    return path.read_text().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda _: [], "is empty"),
        (lambda _: ["\n", "\n"], "is empty"),
        (lambda _: ["garbage\n"], "damaged in line 1 (no heading)"),
        (lambda _: ["garbage"], "damaged in line 1"),
        (lambda lines: lines[1:], "another exam"),
        (lambda lines: [*lines, '{"law":"X"}\n'], "damaged in line 4 (KeyError: 'algorithm')"),
        (lambda lines: [*lines, '{"law":"X"}'], "damaged in line 4"),
        (lambda lines: [lines[0], lines[1].replace('"PASS"', '"PASSED"'), lines[2]], "line 2 (ValueError: 'PASSED'"),
        (lambda lines: [lines[0], lines[1][:40] + "\n", lines[2]], "damaged in line 2 (no JSON object)"),
        (lambda lines: [lines[0], "[1]\n", *lines[1:]], "damaged in line 2 (no JSON object)"),
        (lambda lines: [lines[0], lines[1].replace('"shares": [', '"shares": 3, "x": ['), lines[2]], "in line 2"),
        (lambda lines: [lines[0], lines[1].replace('"printed"', '"more": 1, "printed"'), lines[2]], "in line 2"),
        (lambda lines: [lines[0], lines[1].replace('"counterexample": null', '"counterexample": 3')], "in line 2"),
        (lambda lines: [*lines, "\0\0\n"], "damaged in line 4"),
    ],
)
def test_a_damaged_journal_says_where(tmp_path: Path, lines: list[str], damage: Any, words: str) -> None:
    path = tmp_path / "journal"
    damaged = "".join(damage(list(lines)))
    path.write_text(damaged)
    with pytest.raises(JournalError) as caught:
        Journal(path, json.loads(lines[0]), resume=True)
    assert words in str(caught.value)
    assert "start without resuming" in str(caught.value)
    assert path.read_text() == damaged
    assert len(Journal(path, {}, resume=False).results) == 0


@pytest.mark.parametrize("tail", ['{"law": "CO', "\0\0\0", "\udce4", ""])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path: Path, lines: list[str], tail: str) -> None:
    path = tmp_path / "journal"
    path.write_bytes(("".join(lines) + tail).encode(errors="surrogateescape"))
    assert len(Journal(path, json.loads(lines[0]), resume=True).results) == 2
    assert path.read_text() == "".join(lines)


def test_a_damaged_journal_is_wrong_use_of_the_command(here: Path) -> None:
    asked = ("numpy", "--law", "COUNT", "--dtype", "float64", "--jobs", "1")
    assert command(*asked)[0] == 0
    (journal,) = (here / ".translution").glob("*.jsonl")
    with journal.open("a") as file:
        file.write('{"law":"X"}\n')
    code, output = command(*asked, "--resume")
    assert code == 2
    assert "damaged in line 4" in output
    assert command(*asked)[0] == 0


# The command


def test_an_exam_of_one_law_leaves_the_journal_of_the_whole_alone(here: Path) -> None:
    (here / "mine.py").write_text(RIGHT)
    whole = here / ".translution" / "mine-backend-quick.jsonl"
    whole.parent.mkdir()
    whole.write_text("what was found so far\n")
    one = ("mine:backend", "--law", "COUNT", "--dtype", "float64", "--jobs", "1")
    code, output = command(*one)
    assert code == 0
    assert "earlier run" not in output
    assert whole.read_text() == "what was found so far\n"
    assert len(list(whole.parent.glob("*.jsonl"))) == 2
    code, output = command(*one[:5], "--law", "COUNT", *one[5:], "--resume")
    assert code == 0
    assert "1 of 1 items are from an earlier run (journal .translution/mine-backend-quick-" in " ".join(output.split())
    command(*one, "--law", "CLAIMS")
    assert len(list(whole.parent.glob("*.jsonl"))) == 3
    code, output = command("mine:backend", "--resume")
    assert code == 2
    assert "damaged in line 1" in output


def test_reports_go_to_where_the_command_was_given(here: Path) -> None:
    away = f"import os\nos.makedirs('there', exist_ok=True)\nos.chdir('there')\n{RIGHT}"
    (here / "away.py").write_text(away)
    done = subprocess.run(
        [sys.executable, "-m", "translution", "conform", "away:backend", "--law", "COUNT", "--dtype", "float64",
         "--jobs", "1", "--json", "a.json", "--junit", "a.xml", "--html", "a.html"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"a.json", "a.xml", "a.html"} <= {path.name for path in here.iterdir()}
    report = Report.from_json(json.loads((here / "a.json").read_text()))
    assert (report.device, report.limit, report.waivers) == ("cpu", 60.0, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("numpy", "--limit", "inf"), "--limit is inf: give seconds, more than 0"),
        (("numpy", "--limit", "nan"), "--limit is nan"),
        (("numpy", "--limit", "0"), "--limit is 0"),
        (("numpy", "--limit", "-1"), "--limit is -1"),
        (("numpy", "--limit", "1e300"), "at most 1,000,000"),
        (("numpy", "--json", "a", "--junit", "a"), "--json and --junit are both a: give two files"),
        (("numpy", "--html", "./a", "--junit", "a"), "--junit and --html are both"),
        (("numpy", "--json", "a", "--waivers", "a"), "--json and --waivers are both"),
        (("--laws", "--law", "COUNT"), "--laws does not take --law;"),
        (("--laws", "--level", "quick"), "--laws does not take --level;"),
        (
            ("--export", "e", "--explore", "5", "--algorithm", "stream"),
            "--export does not take --algorithm, --explore;",
        ),
        (("--export", "e", "--waivers", "w", "--resume"), "--export does not take --waivers, --resume;"),
        (("--export", "e", "--jobs", "2", "--device", "cpu"), "--export does not take --device, --jobs;"),
        (("--export", "e", "--junit", "j"), "--export does not take --junit; beside it there may be --level, --dtype"),
        (("--import", "e", "--law", "COUNT", "--level", "full"), "--import does not take --level, --law;"),
        (("--import", "e", "--limit", "3", "--dtype", "float64"), "--import does not take --dtype, --limit;"),
        (("--selftest", "--law", "COUNT"), "--selftest does not take --law; beside it there may be --jobs, --json"),
        (("--selftest", "--laws"), "one of these"),
        (("numpy", "--export", "e"), "one of these"),
        ((), "one of these"),
    ],
)
def test_wrong_use_is_told_before_anything_happens(here: Path, arguments: tuple[str, ...], words: str) -> None:
    code, output = command(*arguments)
    assert code == 2
    assert words in " ".join(output.split())
    assert not list(here.iterdir())
