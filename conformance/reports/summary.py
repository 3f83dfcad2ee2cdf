"""What every form of a report says: which columns, which failures belong together, how to repeat one, the last line."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from translution.conformance.exam.examine import LIMIT
from translution.conformance.exam.law import Law
from translution.conformance.exam.report import HOLDS, Counterexample, Report, Result, Verdict
from translution.conformance.reports.clauses import TITLES

MEANING = {
    Verdict.PASS: "every case holds; the figure is the worst use of an error bound, 'exact' where only equality counts",
    Verdict.NOT_CLAIMED: "the backend says that it does not do this; nothing was checked",
    Verdict.WAIVED: "it fails, and the waiver file says why that is put up with for now",
    Verdict.UNKNOWN: "nobody knows: the check itself broke, or too few cases ran; the exam does not hold",
    Verdict.FAIL: "a case breaks the law; the exam does not hold",
}
ELSEWHERE = "other"
# The algorithm of answers that were marked on paper, and the edition of an exam that explored.
WRITTEN, EXPLORED = "written", "explored"


@dataclass(frozen=True, slots=True)
class Failure:
    """Results of one law with the same verdict and diagnosis; ``shown`` speaks for all."""

    law: str
    verdict: Verdict
    diagnosis: tuple[str, ...]
    results: tuple[Result, ...]

    @property
    def shown(self) -> Result:
        """The first with a shrunken counterexample, else the first with any, else the first."""

        def rank(result: Result) -> int:
            return 2 if result.counterexample is None else 0 if result.counterexample.shrunk else 1

        return min(self.results, key=rank)

    @property
    def diagnosed(self) -> str:
        """The diagnosis as a sentence; empty where there is none."""
        return f"Your output equals that of the mutant {' and of '.join(self.diagnosis)}." if self.diagnosis else ""


def failures(report: Report) -> list[Failure]:
    """The broken results by law, verdict and diagnosis.

    FAIL before UNKNOWN; then those that say most: with a diagnosis, with a shrunken counterexample; then as reported.
    """
    groups: dict[tuple[str, Verdict, tuple[str, ...]], list[Result]] = {}
    for result in report.broken():
        groups.setdefault((result.law, result.verdict, result.diagnosis), []).append(result)
    found = [Failure(*key, tuple(results)) for key, results in groups.items()]

    def rank(failure: Failure) -> tuple[bool, bool, bool]:
        example = failure.shown.counterexample
        return failure.verdict is not Verdict.FAIL, not failure.diagnosis, example is None or not example.shrunk

    return sorted(found, key=rank)


def diagnoses(report: Report) -> list[str]:
    """A sentence for each diagnosis, the most frequent first."""
    counts = Counter(result.diagnosis for result in report.broken() if result.diagnosis)
    return [
        f"Your output equals that of the mutant {' and of '.join(names)} in {plural(count, 'result')}."
        for names, count in counts.most_common()
    ]


def plural(count: int, noun: str) -> str:
    """``1 item``, ``2,000 items``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def columns(report: Report) -> dict[str, list[str]]:
    """The dtypes of each algorithm, both in the order in which the report first has them."""
    found: dict[str, list[str]] = {}
    for result in report.results:
        dtypes = found.setdefault(result.algorithm, [])
        if result.dtype not in dtypes:
            dtypes.append(result.dtype)
    return found


def themes(report: Report, laws: Mapping[str, Law]) -> dict[str, list[str]]:
    """The laws of the report by the file they are in, files and laws in the order of ``laws``."""
    present = dict.fromkeys(result.law for result in report.results)
    found: dict[str, list[str]] = {}
    for name in (*(name for name in laws if name in present), *(name for name in present if name not in laws)):
        theme = laws[name].body.__module__.rpartition(".")[2] if name in laws else ELSEWHERE
        found.setdefault(theme, []).append(name)
    return found


def clauses(law: Law | None) -> list[str]:
    """The clauses of a law with their headings."""
    return [f"{clause} {TITLES[clause]}" if clause in TITLES else clause for clause in (law.clauses if law else ())]


def command(report: Report, result: Result) -> str:
    """The command line that examines this law, algorithm and dtype again."""
    waived = [] if report.waivers is None else ["--waivers", report.waivers]
    if result.algorithm == WRITTEN:
        return shlex.join(clean(word) for word in ["translution", "conform", "--import", "DIR", *waived])
    words = ["translution", "conform", report.backend, "--law", result.law]
    words += ["--algorithm", result.algorithm, "--dtype", result.dtype]
    if report.edition == EXPLORED:
        # What failed before is remembered and comes first.
        words += ["--explore", str(max(result.tried, 1))]
    elif report.level != "quick":
        words += ["--level", report.level]
    words += [] if report.device == "cpu" else ["--device", report.device]
    words += [] if report.limit in (None, LIMIT) else ["--limit", f"{report.limit:.12g}"]
    words += waived
    return shlex.join(clean(word) for word in words)


def example_line(shown: Counterexample) -> str:
    """Where a counterexample comes from, in words."""
    asked = "its only question" if shown.questions == 1 else f"the last of its {shown.questions} questions"
    if shown.number < 0:
        return f"a case that exploring found{', made small' if shown.shrunk else ''}: {asked}"
    if shown.shrunk:
        return f"a smaller case than number {shown.number} of the edition, found by searching: {asked}"
    return f"case {shown.number} of the edition: {asked}"


def mark(result: Result) -> str:
    """The verdict in a word: for PASS the worst use of a bound."""
    if result.verdict is not Verdict.PASS:
        return result.verdict.value
    if result.shares:
        return percent(result.worst_share)
    return "exact" if result.exact else "holds"


def percent(share: float) -> str:
    """A use of a bound, with two digits: 3e-05%, 0.12%, 43%."""
    return f"{100 * share:.2g}%" if share < 0.995 else "100%"


def cases_run(results: Sequence[Result]) -> tuple[int, int]:
    """Cases that ran and how many had to, over what is claimed."""
    claimed = [result for result in results if result.verdict is not Verdict.NOT_CLAIMED]
    return sum(result.cases for result in claimed), sum(result.floor for result in claimed)


def where(results: Sequence[Result]) -> str:
    """Algorithms, each with its dtypes: ``pairwise float64, float32; stream float64``."""
    found: dict[str, list[str]] = {}
    for result in results:
        found.setdefault(result.algorithm, []).append(result.dtype)
    return "; ".join(f"{algorithm} {', '.join(dict.fromkeys(dtypes))}" for algorithm, dtypes in found.items())


def excerpt(text: str, lines: int = 14, width: int = 400) -> str:
    """``text`` cut short: of many lines the first three and the last ones, of a long line the start."""
    found = [line if len(line) <= width else f"{line[:width]} ..." for line in clean(text).strip("\n").split("\n")]
    if len(found) > lines:
        found = [*found[:3], f"... ({len(found) - lines + 1:,} lines)", *found[4 - lines :]]
    return "\n".join(found)


def not_claimed(report: Report) -> dict[str, int]:
    """Why items are not claimed, and how many each reason concerns; the most frequent first."""
    counts: dict[str, int] = {}
    for result in report.results:
        if result.verdict is Verdict.NOT_CLAIMED:
            for reason in result.reasons or ("no reason given",):
                counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def headline(report: Report) -> str:
    """The verdict of the exam, and why not where it does not hold."""
    if report.holds:
        return "The exam holds."
    why = []
    if not report.complete:
        why.append(f"{len(report.results):,} of {report.expected:,} items have a result")
    if report.broken():
        counts = [f"{count:,} {v.value}" for v, count in report.counts.items() if count and v not in HOLDS]
        why.append(", ".join(counts))
    if not why:
        waived = any(result.verdict is Verdict.WAIVED for result in report.results)
        rest = "what is claimed is waived" if waived else "the backend claims none of it"
        why.append(f"nothing that had to be computed passed: {rest}")
    return f"The exam does not hold: {'; '.join(why)}."


def figures(report: Report) -> str:
    """Items by verdict, cases, the worst use of a bound, seconds."""
    counts = ", ".join(f"{count:,} {verdict.value}" for verdict, count in report.counts.items() if count)
    worst = max((result.worst_share for result in report.results), default=0.0)
    return (
        f"{len(report.results):,} of {report.expected:,} items ({counts or 'none'}), {report.cases:,} cases, "
        f"worst use of an error bound {percent(worst)}, {report.seconds:,.1f} s."
    )


def clean(text: str) -> str:
    """Text that a terminal, XML and UTF-8 can hold: other characters (controls, lone surrogates) become U+FFFD."""
    return "".join(char if _harmless(ord(char)) else "\N{REPLACEMENT CHARACTER}" for char in text)


def _harmless(code: int) -> bool:
    if code < 0xA0:
        return code in (0x09, 0x0A) or (0x20 <= code < 0x7F)
    # Marks that reorder what follows them could make a message read as another.
    hides = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return not (0xD800 <= code <= 0xDFFF or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF or hides)
