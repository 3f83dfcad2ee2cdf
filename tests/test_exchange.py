"""The written exam: what is exported can be answered without Python, and marks are those of the exam in person."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from translution import get_backend, run, vjp
from translution.conformance.error_model import budget
from translution.conformance.exam.examine import examine
from translution.conformance.exam.report import Report, Result, Verdict
from translution.conformance.exam.subject import LiveSubject
from translution.conformance.exchange import ExchangeError, ExportSummary, export, mark
from translution.conformance.exchange import writing as writing_module
from translution.conformance.exchange.paper import read_tensors
from translution.conformance.laws import all_laws
from translution.errors import UnknownName
from translution.spec.serialization import operator_from_data

LAWS = ("ORACLE", "ORACLE-WEIGHTS", "ORACLE-GRADIENT", "VALUE-TRACER")

Arrays = dict[str, np.ndarray[Any, Any]]


def questions(folder: Path) -> Iterator[tuple[dict[str, Any], Any, Arrays]]:
    """Every question with its operator and its arrays, as any reader of the files sees them."""
    exam = json.loads((folder / "exam.json").read_text())
    for question in exam["questions"]:
        tensors = {name: value for name, (_, value) in read_tensors(folder / question["file"]).items()}
        yield question, operator_from_data(exam["operators"][question["operator"]]), tensors


def answered(question: dict[str, Any], operator: Any, tensors: Arrays, algorithm: str = "pairwise") -> Arrays:
    """The answer of the numpy backend."""
    own = {n: v if v.dtype == bool else v.astype(question["dtype"]) for n, v in tensors.items()}
    params = {name.removeprefix("params."): own[name] for name in own if name.startswith("params.")}
    call = {"mask": own.get("mask"), "backend": "numpy", "algorithm": algorithm}
    if question["kind"] == "vjp":
        out, found = vjp(operator, params, own["x"], own.get("y"), cotangent=own["cotangent"], **call)
        sides = {"x": found.x} | ({} if found.y is None or "y" not in own else {"y": found.y})
        return {"out": out} | {f"gradient.{name}": value for name, value in {**found.params, **sides}.items()}
    if question["kind"] == "weights":
        out, weights = run(operator, params, own["x"], own.get("y"), return_weights=True, **call)
        return {"out": out, "weights": weights}
    return {"out": run(operator, params, own["x"], own.get("y"), **call)}


def write(folder: Path, question: dict[str, Any], answer: Arrays) -> None:
    (folder / f"{question['id']}.safetensors").write_bytes(
        save({name: np.ascontiguousarray(value) for name, value in answer.items()})
    )


def by_item(report: Report) -> dict[tuple[str, str], Result]:
    return {(result.law, result.dtype): result for result in report.results}


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportSummary]:
    folder = tmp_path_factory.mktemp("exam")
    return folder, export(folder, laws=LAWS, breadth=1)


@pytest.fixture(scope="module")
def full_answers(paper: tuple[Path, ExportSummary], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    for question, operator, tensors in questions(paper[0]):
        write(folder, question, answered(question, operator, tensors))
    return folder


@pytest.fixture
def answers(full_answers: Path, tmp_path: Path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(full_answers, tmp_path / "answers"))


def test_summary_counts_what_is_on_disk(paper: tuple[Path, ExportSummary]) -> None:
    folder, summary = paper
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert summary.bytes == sum(path.stat().st_size for path in files)
    assert sum(summary.questions.values()) == len(files) - 1
    assert summary.laws == len(LAWS)
    assert summary.questions.keys() == {"float64", "float32"}


def test_marks_are_those_of_the_exam_in_person(paper: tuple[Path, ExportSummary], full_answers: Path) -> None:
    report = mark(paper[0], full_answers)
    assert report.holds
    backend = get_backend("numpy")
    for result in report.results:
        live = examine(all_laws()[result.law], LiveSubject(backend, "pairwise", result.dtype), "quick", attempts=1)
        assert result.verdict is live.verdict is Verdict.PASS
        assert (result.cases, result.tried, result.exact, result.shares) == (
            live.cases, live.tried, live.exact, live.shares,
        )  # fmt: skip
        assert result.cases > 0
    total = sum(paper[1].questions.values())
    assert report.notes[0] == f"{total} of {total} questions are answered"


def test_expected_and_bound_say_how_far_an_answer_may_be(paper: tuple[Path, ExportSummary]) -> None:
    """What a reader without Python compares with; other right answers than those that were written are inside."""
    compared = 0
    for question, operator, tensors in questions(paper[0]):
        answer = answered(question, operator, tensors, "stream")
        assert {name: list(value.shape) for name, value in answer.items()} == question["answers"]
        for name, value in answer.items():
            want, bound = tensors[f"expected.{name}"], tensors[f"bound.{name}"]
            finite = np.isfinite(want)
            assert (np.isfinite(value) == finite).all()
            assert (np.abs(value - want) <= bound)[finite].all(), f"{question['id']} {name}"
            compared += finite.sum()
    assert compared > 10_000


def test_export_is_the_same_every_time(paper: tuple[Path, ExportSummary], tmp_path: Path) -> None:
    export(tmp_path / "again", laws=LAWS, breadth=1)
    first = {path.relative_to(paper[0]): path.read_bytes() for path in paper[0].rglob("*") if path.is_file()}
    again = {
        path.relative_to(tmp_path / "again"): path.read_bytes()
        for path in (tmp_path / "again").rglob("*")
        if path.is_file()
    }
    assert first == again


def finished(answers: Path, **fields: Any) -> None:
    """Write that these are all answers."""
    count = len([*answers.glob("*.safetensors")])
    (answers / "manifest.json").write_text(json.dumps({"answered": count} | fields))


def test_no_answer_is_not_claimed(paper: tuple[Path, ExportSummary], tmp_path: Path) -> None:
    finished(tmp_path)
    report = mark(paper[0], tmp_path)
    assert {result.verdict for result in report.results} == {Verdict.NOT_CLAIMED}
    assert {result.reasons for result in report.results} == {("no answer",)}
    assert not report.holds


def test_half_of_the_answers_are_marked_as_a_part(paper: tuple[Path, ExportSummary], answers: Path) -> None:
    for question, *_ in questions(paper[0]):
        if question["kind"] == "vjp":
            (answers / f"{question['id']}.safetensors").unlink()
    finished(answers)
    found = by_item(mark(paper[0], answers))
    assert found["ORACLE-GRADIENT", "float32"].verdict is Verdict.NOT_CLAIMED
    assert found["ORACLE", "float32"].verdict is Verdict.PASS


def test_too_few_answers_claim_nothing(paper: tuple[Path, ExportSummary], answers: Path) -> None:
    cases = json.loads((paper[0] / "exam.json").read_text())["cases"]
    kept = [case["questions"] for case in cases if (case["law"], case["dtype"]) == ("ORACLE", "float64")][:2]
    for path in answers.iterdir():
        if path.stem not in {name for ids in kept for name in ids}:
            path.unlink()
    finished(answers)
    found = by_item(mark(paper[0], answers))["ORACLE", "float64"]
    assert (found.verdict, found.cases) == (Verdict.NOT_CLAIMED, 2)
    few = "2 answered cases hold, and a verdict needs 3: export with a larger breadth"
    assert found.reasons == ("no answer", few)


@pytest.mark.parametrize("kept", [0.0, 0.35, 0.5, 0.99])
def test_a_program_that_ended_early_is_not_green(kept: float, paper: tuple[Path, ExportSummary], answers: Path) -> None:
    """The questions stand in the order of the laws: a program that goes through them ends within one or between two."""
    ids = [question["id"] for question in json.loads((paper[0] / "exam.json").read_text())["questions"]]
    count = int(kept * len(ids))
    for name in ids[count:]:
        (answers / f"{name}.safetensors").unlink()
    left, total = len(ids) - count, len(ids)
    # The second stands for what an earlier run wrote.
    for manifest, why in (
        ({}, "the others are missing"),
        ({"answered": total}, f"manifest.json says {total} answers and there are {count}"),
    ):
        (answers / "manifest.json").write_text(json.dumps(manifest))
        report = mark(paper[0], answers)
        assert not report.holds
        broken = report.broken()
        assert {result.verdict for result in broken} == {Verdict.UNKNOWN}
        assert all(re.match(r"\d+ of \d+ questions are answered, ", result.message) for result in broken)
        assert all(f'{why}: where the program was through and refuses them, "answered": {count}' in r.message
                   for r in broken)  # fmt: skip
        complete = {result.key for result in report.results} - {result.key for result in broken}
        assert complete == {r.key for r in report.results if r.verdict is Verdict.PASS}
        assert report.notes[0] == (
            f"{count} of {total} questions are answered; {left} answers are missing, or refused without saying so"
        )
    finished(answers)
    report = mark(paper[0], answers)
    assert {result.verdict for result in report.results} <= {Verdict.PASS, Verdict.NOT_CLAIMED}
    assert report.notes[0] == (
        f"{count} of {total} questions are answered; manifest.json says that these are all, so that the other {left} "
        "are refused"
    )


def test_a_wrong_answer_outweighs_missing_ones(paper: tuple[Path, ExportSummary], answers: Path) -> None:
    first, second, *_ = (
        q
        for q in questions(paper[0])
        if q[0]["kind"] == "run" and q[0]["dtype"] == "float64" and q[2]["expected.out"].size
    )
    wrong = answered(*first)
    write(answers, first[0], {"out": wrong["out"] + 1})
    (answers / f"{second[0]['id']}.safetensors").unlink()
    assert Verdict.FAIL in {result.verdict for result in mark(paper[0], answers).results}


def test_what_is_waived_is_waived_only_where_every_question_has_an_answer(
    paper: tuple[Path, ExportSummary], answers: Path, tmp_path: Path
) -> None:
    waivers = tmp_path / "waivers.toml"
    waivers.write_text('[[waiver]]\nlaw = "ORACLE"\nreason = "under repair"\nexpires = 2999-01-01\n')
    cases = json.loads((paper[0] / "exam.json").read_text())["cases"]
    own = (case for case in cases if (case["law"], case["dtype"]) == ("ORACLE", "float64"))
    ids = [name for case in own for name in case["questions"]]
    for question, operator, tensors in questions(paper[0]):
        if question["id"] in ids:
            write(answers, question, {"out": answered(question, operator, tensors)["out"] + 1})
    report = mark(paper[0], answers, waivers=waivers)
    assert by_item(report)["ORACLE", "float64"].verdict is Verdict.WAIVED
    assert report.waivers == str(waivers)
    (answers / f"{ids[-1]}.safetensors").unlink()
    assert by_item(mark(paper[0], answers, waivers=waivers))["ORACLE", "float64"].verdict is Verdict.UNKNOWN


SPOILED: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "shape": (lambda own: {"out": own["out"][..., None]}, "has shape"),
    "dtype": (lambda own: {"out": own["out"].astype(np.float32)}, "out is F32, expected F64"),
    "name": (lambda own: {"result": own["out"]}, "holds ['result'], asked for is ['out']"),
    "value": (lambda own: {"out": own["out"] + 1e-9}, "beyond their bound"),
    "NaN": (lambda own: {"out": own["out"] * np.nan}, "nan, expected"),
    "more": (lambda own: {**own, "weights": own["out"]}, "asked for is ['out']"),
    "whole numbers": (lambda own: {"out": own["out"].astype(np.int64)}, "out is I64"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_wrong_answer_fails(how: str, paper: tuple[Path, ExportSummary], answers: Path) -> None:
    question, operator, tensors = next(
        q
        for q in questions(paper[0])
        if q[0]["kind"] == "run" and q[0]["dtype"] == "float64" and q[2]["expected.out"].size
    )
    spoil, message = SPOILED[how]
    write(answers, question, spoil(answered(question, operator, tensors)))
    broken = mark(paper[0], answers).broken()
    assert [result.verdict for result in broken] == [Verdict.FAIL]
    assert message in broken[0].message
    assert f"questions/{question['id']}.safetensors" in broken[0].message


@pytest.mark.parametrize("data", [b"", b"no tensors at all", None], ids=["empty", "text", "cut off"])
def test_a_broken_file_fails(data: bytes | None, paper: tuple[Path, ExportSummary], answers: Path) -> None:
    path = min(answers.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] if data is None else data)
    broken = mark(paper[0], answers).broken()
    assert broken
    assert all(f"{path.name} is no safetensors file" in result.message for result in broken)


def test_answers_of_another_exam_are_refused(paper: tuple[Path, ExportSummary], answers: Path) -> None:
    (answers / "0123456789abcdef.safetensors").write_bytes(b"")
    with pytest.raises(ExchangeError, match=r"1 of \d+ answers belong to no question .*0123456789abcdef"):
        mark(paper[0], answers)


def changed(paper: Path, to: Path, **fields: Any) -> Path:
    """A copy of the exam in which fields of exam.json are replaced."""
    folder = Path(shutil.copytree(paper, to))
    data = json.loads((folder / "exam.json").read_text())
    (folder / "exam.json").write_text(json.dumps(data | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"edition": "2020.1"}, "edition is '2020.1'"),
        ({"version": 2}, "version is 2"),
        ({"schema": "else"}, "is no translution/exam"),
        ({"laws": [{"id": "NO-SUCH-LAW"}]}, "unknown law 'NO-SUCH-LAW'"),
        ({"chosen_laws": None}, "written before there were the laws"),
        ({"questions": [{}]}, "is damaged: KeyError"),
        ({"cases": []}, "has another question for ORACLE in float64, case 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_exam_that_is_not_this_one_is_refused(
    fields: dict[str, Any], message: str, paper: tuple[Path, ExportSummary], tmp_path: Path
) -> None:
    (tmp_path / "answers").mkdir()
    with pytest.raises(ExchangeError, match=message):
        mark(changed(paper[0], tmp_path / "exam", **fields), tmp_path / "answers")


def test_other_versions_are_named_where_questions_differ(paper: tuple[Path, ExportSummary], tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    folder = changed(paper[0], tmp_path / "exam", cases=[], versions={"numpy": "1.0"})
    with pytest.raises(ExchangeError, match=r"it was written with numpy 1\.0, here"):
        mark(folder, tmp_path / "answers")


def test_there_must_be_an_exam(tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match=r"exam\.json.*No such file"):
        mark(tmp_path, tmp_path)
    (tmp_path / "exam.json").write_text("{")
    with pytest.raises(ExchangeError, match=r"exam\.json: Expecting property name"):
        mark(tmp_path, tmp_path)


def test_export_wants_an_empty_folder_and_known_names(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExchangeError, match="is not empty"):
        export(tmp_path, laws=LAWS)
    for wrong in ({"laws": ("NONE",)}, {"dtypes": ("int8",)}, {"level": "some"}, {"edition": "0"}):
        with pytest.raises(UnknownName):
            export(tmp_path / "exam", **wrong)  # type: ignore[arg-type]
    for few in ({"breadth": 0}, {"dtypes": ()}, {"laws": ()}):
        with pytest.raises(ExchangeError):
            export(tmp_path / "exam", **few)  # type: ignore[arg-type]
    assert not (tmp_path / "exam").exists()


def test_laws_that_watch_a_backend_are_not_on_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laws = {name: all_laws()[name] for name in LAWS}
    laws["ORACLE"] = replace(laws["ORACLE"], live=True)
    monkeypatch.setattr(writing_module, "all_laws", lambda: laws)
    with pytest.raises(ExchangeError, match="law ORACLE looks at a backend while it runs"):
        export(tmp_path / "exam", laws=["ORACLE"])
    summary = export(tmp_path / "exam", breadth=1, dtypes=["float64"])
    assert summary.live == ("ORACLE",)
    exam = json.loads((tmp_path / "exam" / "exam.json").read_text())
    assert [law["id"] for law in exam["laws"]] == [name for name in LAWS if name != "ORACLE"]


def test_every_law_says_what_it_states_and_checks(paper: tuple[Path, ExportSummary]) -> None:
    exam = json.loads((paper[0] / "exam.json").read_text())
    told = {law["id"]: (law["statement"], tuple(law["clauses"])) for law in exam["laws"]}
    assert told == {name: (all_laws()[name].statement, all_laws()[name].clauses) for name in LAWS}


# The manifest


def test_the_manifest_declares_another_arithmetic(paper: tuple[Path, ExportSummary], answers: Path) -> None:
    """Answers that are off by half of what tf32 may be hold only where that is declared."""
    for question, operator, tensors in questions(paper[0]):
        if question["kind"] != "run" or question["dtype"] != "float32":
            continue
        params = {n.removeprefix("params."): v for n, v in tensors.items() if n.startswith("params.")}
        bound = budget(operator, params, tensors["x"], tensors.get("y"), tensors.get("mask"), dtype="tf32").out
        write(answers, question, {"out": (tensors["expected.out"] + bound / 2).astype(np.float32)})
    assert by_item(mark(paper[0], answers))["ORACLE", "float32"].verdict is Verdict.FAIL
    (answers / "manifest.json").write_text(json.dumps({"name": "coarse", "arithmetic": {"float32": "tf32"}}))
    report = mark(paper[0], answers)
    assert report.backend == "coarse"
    assert by_item(report)["ORACLE", "float32"].verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"nam": "x"}, r"\['nam'\]; the fields are name, arithmetic, deterministic, answered"),
        ({"deterministic": "yes"}, "deterministic is a str, expected a bool"),
        ({"arithmetic": {"float32": "fast"}}, "arithmetic float32: fast; it maps"),
        ({"arithmetic": {"float32": ["tf32"]}}, r"arithmetic float32: \['tf32'\]; it maps"),
        ({"arithmetic": {"float64": "float32"}}, r"arithmetic float64: float32; float64 is float64 \(D3\)"),
        ({"answered": True}, "answered is a bool, expected a number of files"),
        ([], "list; the fields are"),
    ],
    ids=["field", "type", "arithmetic", "no name", "float64", "truth", "list"],
)
def test_a_manifest_is_read_strictly(
    manifest: Any, message: str, paper: tuple[Path, ExportSummary], tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExchangeError, match=message):
        mark(paper[0], tmp_path)
