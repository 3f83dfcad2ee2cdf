"""Holding an exam: verdicts whatever a backend does, the edition, exploring, what run() takes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from translution import Claims, NotSupported, UnknownName
from translution.conformance.comparison import ComparisonError
from translution.conformance.exam.draws import HypothesisDraws, Rejected, SeededDraws
from translution.conformance.exam.edition import fingerprint, written
from translution.conformance.exam.examine import examine
from translution.conformance.exam.examiner import CannotExamine, Examiner
from translution.conformance.exam.explore import explore, smaller
from translution.conformance.exam.law import FULL, QUICK, Law, Trial, law
from translution.conformance.exam.question import rounded
from translution.conformance.exam.report import HOLDS, Report, Result, Verdict, merged
from translution.conformance.exam.session import run
from translution.conformance.exam.setting import Setting
from translution.conformance.exam.subject import BackendFailure, LiveSubject, NotClaimed
from translution.conformance.laws import all_laws
from translution.conformance.mutants import misbehaving
from translution.conformance.mutants.catalogue import catalogue
from translution.conformance.mutants.naive import Naive
from translution.conformance.strategies import draw_question

MISBEHAVING = "translution.conformance.mutants.misbehaving"
NAIVE = "translution.conformance.mutants.naive:backend"
MIRRORED = "translution.conformance.mutants.catalogue:value_mirrored"
TRACER = all_laws()["VALUE-TRACER"]


def by_law(body: Any, **more: Any) -> Law:
    """A law that is not registered."""
    return Law("A-LAW", "It holds.", ("L1",), (), body, {QUICK: 4, FULL: 8}, None, False, None, **more)


def plain(trial: Trial) -> None:
    trial.run(draw_question(trial.draws, trial.dtype, layouts=["grid"], masked=False))


# Verdicts


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("raises", "claimed, but raised RuntimeError: something broke inside"),
        ("hangs", "no answer within 1 s"),
        ("spins", "no answer within 1 s"),
        ("hangs_in_c", "no answer within 1 s, and it could not be interrupted: the process was ended in case 0"),
        ("returns_list", "the backend's result is a list"),
        ("returns_none", "claimed, but raised TypeError"),
        ("wrong_shape", "out has shape"),
        ("exits", "the process ended (exit code 3) in case"),
        ("aborts", "the process ended (SIGABRT) in case"),
    ],
)
def test_a_backend_that_gives_no_answer_fails_and_the_next_law_is_still_asked(attribute: str, words: str) -> None:
    with Examiner(f"{MISBEHAVING}:{attribute}", Setting(limit=1.0, refine=0.0)) as examiner:
        for _ in range(2):
            found = examiner.examine(TRACER, "pairwise", "float64")
            assert found.verdict is Verdict.FAIL
            assert words in found.message


def test_what_a_backend_prints_is_kept_apart_from_its_verdict() -> None:
    with Examiner(f"{MISBEHAVING}:prints", Setting()) as examiner:
        found = examiner.examine(TRACER, "pairwise", "float64")
    assert found.verdict is Verdict.PASS
    assert "]}[" in found.printed
    assert len(found.printed) < 2100


@pytest.mark.parametrize("attribute", ["raises", "hangs", "returns_list", "wrong_shape", "prints"])
def test_a_backend_object_is_examined_in_this_process(attribute: str, capfd: pytest.CaptureFixture[str]) -> None:
    backend = getattr(misbehaving, attribute)
    report = run(backend, laws=["VALUE-TRACER"], dtypes=["float64"], limit=1.0)
    assert report.backend == backend.name
    assert [r.verdict for r in report.results] == [Verdict.PASS if attribute == "prints" else Verdict.FAIL]
    assert capfd.readouterr().out.count("PASS") in (0, 50 * TRACER.cases[QUICK])


def test_a_law_that_breaks_itself_is_unknown_and_no_fault_of_the_backend() -> None:
    def broken(trial: Trial) -> None:
        plain(trial)
        raise ZeroDivisionError("in the law")

    found = examine(by_law(broken), LiveSubject(Naive(), "pairwise", "float64"), QUICK)
    assert found.verdict is Verdict.UNKNOWN
    assert "ZeroDivisionError: in the law" in found.message


def test_nothing_claimed_is_not_claimed_and_too_little_is_unknown() -> None:
    class Shy(Naive):
        calls = 0

        def not_supported(self, request: Any, algorithm: str) -> list[str]:
            self.calls += 1
            return [] if self.calls in self.answered else ["not today"]

        answered: tuple[int, ...] = ()

    silent, once = Shy(), Shy()
    once.answered = (7, 8)
    found = examine(by_law(plain), LiveSubject(silent, "pairwise", "float64"), QUICK)
    assert (found.verdict, found.cases, found.reasons) == (Verdict.NOT_CLAIMED, 0, ("not today",))
    assert found.tried > 4
    found = examine(by_law(plain), LiveSubject(once, "pairwise", "float64"), QUICK)
    assert (found.verdict, found.cases) == (Verdict.UNKNOWN, 1)
    assert "only 1 cases ran, of at least 3" in found.message


def test_the_conclusion_over_all_cases_counts() -> None:
    def conclude(returned: Any, dtype: str) -> None:
        if sum(returned) != 10 or dtype != "float64":
            raise ComparisonError(f"the sum is {sum(returned)}")

    def one(trial: Trial) -> int:
        plain(trial)
        return trial.draws.walk((1, 2, 3, 4))

    subject = LiveSubject(Naive(), "pairwise", "float64")
    counts = {QUICK: 4, FULL: 8}
    judged = Law("A-LAW", "It holds.", ("L1",), (), one, counts, None, False, conclude)
    assert examine(judged, subject, QUICK).verdict is Verdict.PASS
    found = examine(judged, subject, FULL)
    assert (found.verdict, found.message) == (Verdict.FAIL, "the sum is 20")


def test_sixteen_bits_are_asked_half_as_much_at_the_quick_level() -> None:
    def counts(name: str, level: str) -> list[int]:
        return [all_laws()[name].count(level, dtype) for dtype in ("float64", "float32", "float16", "bfloat16")]

    assert counts("VALUE-TRACER", QUICK) == [TRACER.cases[QUICK]] * 2 + [-(-TRACER.cases[QUICK] // 2)] * 2
    assert counts("VALUE-TRACER", FULL) == [TRACER.cases[FULL]] * 4
    judged = all_laws()["QUALITY"]
    assert counts("QUALITY", QUICK) == [judged.cases[QUICK]] * 4
    assert TRACER.floor(QUICK, "float16") <= TRACER.count(QUICK, "float16")


def test_only_claimed_dtypes_are_examined_and_names_are_checked() -> None:
    report = run("numpy", laws=["VALUE-TRACER"])
    assert [(r.algorithm, r.dtype) for r in report.results] == [
        (algorithm, dtype) for algorithm in ("stream", "pairwise") for dtype in ("float64", "float32", "float16")
    ]
    assert report.holds
    assert report.cases == 2 * sum(TRACER.count(QUICK, dtype) for dtype in ("float64", "float32", "float16"))
    for wrong in ({"laws": ["NO-LAW"]}, {"dtypes": ["bfloat16"]}, {"algorithms": ["fused"]}, {"level": "half"}):
        with pytest.raises(UnknownName):
            run("numpy", **wrong)


def test_one_name_may_be_given_as_it_is() -> None:
    report = run(Naive(), laws="VALUE-TRACER", dtypes="float64", algorithms="pairwise")
    assert [result.key for result in report.results] == [("VALUE-TRACER", "pairwise", "float64")]
    for wrong in ({"laws": "VALUE"}, {"dtypes": "float"}, {"algorithms": "pair"}):
        with pytest.raises(UnknownName, match=f"{next(iter(wrong.values()))!r}"):
            run(Naive(), **wrong)


def test_what_is_no_backend_is_told_what_one_is() -> None:
    for wrong in (42, None, ["numpy"], Path()):
        with pytest.raises(TypeError, match=r"is no backend: give a name .* or an object that has .* forward"):
            run(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0, -1.0, float("inf"), float("nan"), 1e300])
def test_a_limit_is_a_time(limit: float) -> None:
    with pytest.raises(ValueError, match="more than 0 and at most 1,000,000"):
        run(Naive(), limit=limit)


def test_a_report_says_how_the_exam_was_held() -> None:
    found = run(Naive(), laws="VALUE-TRACER", dtypes="float64", limit=5)
    assert (found.device, found.limit, found.waivers, found.notes) == ("cpu", 5, None, ())


def test_a_backend_that_is_not_there_is_told_from_one_that_is_wrong() -> None:
    for name in ("no_such_package:backend", "numpy.linalg:norm", "not a name", "translution.backends.numpy:nothing"):
        with pytest.raises(CannotExamine, match=name.partition(":")[0]):
            run(name)
    with pytest.raises(CannotExamine, match="does not run here"):
        run("triton", jobs=1)


def test_the_weightiest_verdict_counts() -> None:
    assert merged([Verdict.PASS, Verdict.FAIL, Verdict.UNKNOWN]) is Verdict.FAIL
    assert merged([Verdict.NOT_CLAIMED, Verdict.PASS]) is Verdict.PASS
    assert merged([Verdict.NOT_CLAIMED]) is Verdict.NOT_CLAIMED
    assert Verdict.UNKNOWN not in HOLDS


def test_a_report_without_a_pass_or_cut_short_does_not_hold() -> None:
    passed = Result("A", "x", "float64", Verdict.PASS, 3)
    nothing = Result("B", "x", "float64", Verdict.NOT_CLAIMED)
    assert Report("b", "e", QUICK, 2, (passed, nothing)).holds
    assert not Report("b", "e", QUICK, 1, (nothing,)).holds
    assert not Report("b", "e", QUICK, 3, (passed, nothing)).holds


def test_who_refuses_everything_does_not_hold() -> None:
    refuses, computes = Result("CLAIMS", "x", "float64", Verdict.PASS, 16), Result("A", "x", "float64", Verdict.PASS, 3)
    nothing = Result("B", "x", "float64", Verdict.NOT_CLAIMED)
    assert not Report("b", "e", QUICK, 2, (refuses, nothing)).holds
    assert Report("b", "e", QUICK, 3, (refuses, nothing, computes)).holds
    assert Report("b", "e", QUICK, 1, (refuses,)).holds  # nothing else was asked


class _Refuses(Naive):
    def not_supported(self, request: object, algorithm: str) -> list[str]:
        return ["never"]


def test_a_backend_that_refuses_everything_fails_the_exam() -> None:
    report = run(_Refuses(), laws=["CLAIMS", "ORACLE", "EMPTY"], dtypes=["float64"], algorithms=["pairwise"])
    assert report.counts == {**dict.fromkeys(Verdict, 0), Verdict.PASS: 1, Verdict.NOT_CLAIMED: 2}
    assert not report.holds


def test_determinism_is_claimed_for_every_device_or_for_some() -> None:
    assert Claims().is_deterministic("cuda")
    assert not Claims(deterministic=False).is_deterministic("cpu")
    some = Claims(deterministic=("cpu",))
    assert some.is_deterministic("cpu")
    assert not some.is_deterministic("cuda")
    backend = Naive()
    backend.claims = some
    assert LiveSubject(backend, "pairwise", "float64").deterministic
    assert not LiveSubject(backend, "pairwise", "float64", "cuda:0").deterministic


# The same exam for everybody


def test_a_case_is_the_same_for_every_backend_and_another_for_every_law() -> None:
    one, other = SeededDraws(5, "2026.1/A"), SeededDraws(5, "2026.1/A")
    assert [one.integer(0, 10**6) for _ in range(9)] == [other.integer(0, 10**6) for _ in range(9)]
    assert SeededDraws(5, "2026.1/B").integer(0, 2**60) != SeededDraws(5, "2026.1/A").integer(0, 2**60)
    assert [SeededDraws(n, "x").walk("abc") for n in range(6)] == list("abcabc")


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    import torch

    rng = np.random.default_rng(0)
    singles = (rng.standard_normal(20000) * np.exp(10 * rng.standard_normal(20000))).astype(np.float32)
    corners = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.39e38, 3.3895e38, 1e-40, 2.0**-133, 1.5 * 2.0**-133])
    values = np.concatenate([singles, corners.astype(np.float32)]).astype(np.float64)
    expected = torch.from_numpy(values).float().bfloat16().double().numpy()
    np.testing.assert_array_equal(rounded(values, "bfloat16"), expected)


def test_a_subject_refuses_an_answer_of_another_kind() -> None:
    class Changes(Naive):
        def vjp(self, *given: Any) -> Any:
            out, found = super().vjp(*given)
            params = dict(found.params)
            params.popitem()
            return out, type(found)(params, found.x, found.y)

    question = draw_question(SeededDraws(1), "float32", layouts=["grid"], masked=False, cotangent=True)
    with pytest.raises(BackendFailure, match="gradients for"):
        LiveSubject(Changes(), "pairwise", "float32").vjp(question)


def test_what_is_not_claimed_is_not_asked() -> None:
    class Narrow(Naive):
        dtypes = ("float64",)

        def not_supported(self, request: Any, algorithm: str) -> list[str]:
            return ["too wide"]

        def forward(self, *given: Any) -> Any:
            raise AssertionError

    question = draw_question(SeededDraws(1), "float32", layouts=["grid"], masked=False)
    with pytest.raises(NotClaimed) as caught:
        LiveSubject(Narrow(), "pairwise", "float32").run(question)
    assert any("float64" in reason for reason in caught.value.reasons)
    assert "too wide" in caught.value.reasons


def test_a_backend_without_gradients_says_so() -> None:
    class Forward(Naive):
        def vjp(self, *given: Any) -> Any:
            raise NotSupported("forward", "pairwise", ["no gradients yet"])

    class Honest(Forward):
        claims = Claims(gradient_order=0)

    question = draw_question(SeededDraws(1), "float32", layouts=["grid"], masked=False, cotangent=True)
    with pytest.raises(NotClaimed, match="gradient_order 0"):
        LiveSubject(Honest(), "pairwise", "float32").vjp(question)
    with pytest.raises(BackendFailure, match=r"(?s)gradients are claimed .* no gradients yet"):
        LiveSubject(Forward(), "pairwise", "float32").vjp(question)


def test_laws_come_in_the_same_order_whatever_was_imported_before() -> None:
    code = "from translution.conformance import laws; import translution.conformance.laws.{}; print([*laws.all_laws()])"
    found = [subprocess.check_output([sys.executable, "-c", code.format(first)]) for first in ("oracle", "conduct")]
    assert found[0] == found[1]


def test_the_edition_asks_what_is_written_down() -> None:
    laws = all_laws()
    book = written()
    assert list(book) == list(laws)
    for name, found in laws.items():
        own = {"quick": found.cases[QUICK], "full": found.cases[FULL], "questions": fingerprint(found)}
        assert own == book[name], f"{name} asks something else: make a new edition (scripts/make_edition.py)"


# Exploring and shrinking


def test_a_failure_is_made_small_and_named() -> None:
    found = run(MIRRORED, laws=["VALUE-TRACER"], dtypes=["float64"]).results[0]
    assert found.counterexample is not None
    assert found.counterexample.shrunk
    assert np.prod(found.counterexample.shapes["x"][:-1]) <= 4
    assert found.diagnosis == ("value-mirrored",)


def test_shrinking_gives_up_in_time_and_leaves_noise_alone() -> None:
    mutants = catalogue()
    subject = LiveSubject(mutants["value-mirrored"].backend, "pairwise", "float64")
    assert smaller(TRACER, subject, seconds=0.0) is None
    noisy = LiveSubject(mutants["noise"].backend, "pairwise", "float64")
    message = smaller(all_laws()["REPEAT"], noisy, seconds=3.0)
    assert message is None or message[1].shrunk


def test_exploring_finds_new_cases_and_remembers_what_failed(tmp_path: Path) -> None:
    right = LiveSubject(Naive(), "pairwise", "float32")
    found = explore(TRACER, right, 30, database=tmp_path)
    assert (found.verdict, found.cases) == (Verdict.PASS, 30)
    wrong = LiveSubject(catalogue()["value-mirrored"].backend, "pairwise", "float32")
    first = explore(TRACER, wrong, 30, database=tmp_path)
    assert first.verdict is Verdict.FAIL
    assert first.counterexample is not None
    # What failed comes first, and is small already.
    tries: list[int] = []
    explore(TRACER, wrong, 30, database=tmp_path, started=lambda number: tries.append(number))
    assert len(tries) < first.tried
    report = run(Naive(), laws=["VALUE-TRACER"], dtypes=["float32"], explore=5)
    assert (report.edition, report.cases) == ("explored", 5)


def test_exploring_leaves_the_profile_of_hypothesis_alone() -> None:
    from hypothesis import settings

    before = settings.get_current_profile_name(), settings().max_examples, settings().database
    explore(TRACER, LiveSubject(Naive(), "pairwise", "float32"), 3)
    assert (settings.get_current_profile_name(), settings().max_examples, settings().database) == before


def test_draws_of_hypothesis_stay_within_their_limits() -> None:
    from hypothesis import given, settings, strategies

    @settings(max_examples=20, database=None, deadline=None)
    @given(strategies.data())
    def attempt(data: Any) -> None:
        draws = HypothesisDraws(data)
        assert 3 <= draws.integer(3, 5) <= 5
        assert draws.walk("ab") in "ab"
        assert draws.some(0.0) is False
        assert draws.some(1.0) is True

    attempt()
    with pytest.raises(Rejected):
        SeededDraws(0).reject("no")


# Laws


def test_a_law_needs_a_statement_and_a_name_of_its_own() -> None:
    with pytest.raises(ValueError, match="has no statement"):
        law("NAMELESS", clauses=("L1",))(lambda _: None)
    with pytest.raises(ValueError, match="exists already"):
        law("ORACLE", clauses=("L1",))(plain)


def test_comparisons_of_a_trial_can_fail() -> None:
    trial = Trial(LiveSubject(Naive(), "pairwise", "float64"), SeededDraws(0))
    trial.same("a", [0.0, np.nan], [-0.0, np.nan])
    trial.within("a", np.ones(2), np.ones(2) + 1e-9, 2e-9)
    trial.require(True, "")
    for wrong in (
        lambda: trial.same("a", [1.0], [1.0 + 2**-52]),
        lambda: trial.same("a", [1.0], [np.nan]),
        lambda: trial.same("a", [1.0], [[1.0]]),
        lambda: trial.within("a", np.ones(2), np.ones(2) + 1e-9, 1e-10),
        lambda: trial.within("a", np.full(2, np.nan), np.ones(2), 1.0),
        lambda: trial.require(False, "no"),
    ):
        with pytest.raises(ComparisonError):
            wrong()
    assert (trial.exact, len(trial.shares)) == (2, 1)
