"""The exam inside pytest: ``pytest --translution-backend package.module:attribute``.

One item for each law, algorithm and dtype, examined in a process of its own. pytest loads this module in every
project that has translution installed, so it imports nothing before the option is given.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from translution.conformance.exam.examiner import Examiner
    from translution.conformance.exam.report import Report, Result
    from translution.conformance.exam.session import Item

NAME = "translution"
CASES, USE, VERDICT = "translution cases", "translution bound use", "translution verdict"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup(NAME, "conformance of a translution backend")

    def add(name: str, **more: Any) -> None:
        group.addoption(f"--translution-{name}", dest=f"translution_{name}", **more)

    add("backend", metavar="PKG.MOD:OBJ", help="examine this backend: a name, or package.module:attribute")
    add("level", choices=("quick", "full"), help="how many cases of each law; quick if not given")
    for name, article in (("algorithm", "an"), ("dtype", "a"), ("law", "a")):
        add(name, action="append", metavar=name.upper(), help=f"only {article} {name}; may be given several times")
    add("waivers", metavar="FILE", help="a TOML file of known failures")
    add("limit", type=float, metavar="SECONDS", help="for one case; 60 if not given")
    add("device", metavar="DEVICE", help="where a torch backend gets its tensors: cpu if not given, or cuda")


def pytest_configure(config: pytest.Config) -> None:
    """Find the backend and the items; whatever is wrong with the options is a usage error."""
    config.addinivalue_line("markers", f"{NAME}: a law of the translution exam, added by --translution-backend")
    given = {
        name: value
        for name in ("level", "algorithm", "dtype", "law", "waivers", "limit", "device")
        if (value := config.getoption(f"translution_{name}")) is not None
    }
    backend = config.getoption("translution_backend")
    if backend is not None:
        exam = Exam(backend, given)
        if getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput"):
            # The processes of pytest-xdist examine; this one has checked the options.
            exam.pytest_unconfigure()
        config.pluginmanager.register(exam, f"{NAME}-exam")
    elif given:
        raise pytest.UsageError(f"--translution-{next(iter(given))} needs --translution-backend")


class Exam:
    """The plugin of a run in which a backend is examined."""

    def __init__(self, backend: str, given: dict[str, Any]) -> None:
        try:
            from translution.conformance.exam.examiner import CannotExamine, Examiner
            from translution.conformance.exam.session import choose, items_of
            from translution.conformance.exam.setting import EXAMINED, Setting, check_limit
            from translution.conformance.exam.waivers import WaiverError
            from translution.conformance.laws import all_laws
            from translution.errors import UnknownName
        except ModuleNotFoundError as error:
            need = f"{error.name}, which is not installed: pip install 'translution[conformance]'"
            raise pytest.UsageError(f"--translution-backend needs {need}") from error
        # A test or the backend may change the folder.
        own: dict[str, Any] = {name: given[name] for name in ("level", "limit", "device") if name in given}
        own |= {"waivers": str(Path(given["waivers"]).absolute())} if "waivers" in given else {}
        self._setting = Setting(**own)
        try:
            check_limit(self._setting.limit)
        except ValueError as error:
            raise pytest.UsageError(f"--translution-{error}") from error
        laws = all_laws()
        self._examiner: Examiner | None = None
        try:
            chosen = [laws[name] for name in choose("law", list(laws), given.get("law"))]
            self._setting.read_waivers()
            self._examiner = Examiner(backend, self._setting)
            about = self._examiner.backend
            if about["unavailable"]:
                raise CannotExamine(f"{backend} does not run here: {'; '.join(about['unavailable'])}")
            dtypes = [dtype for dtype in EXAMINED if dtype in about["dtypes"]]
            algorithms = choose("algorithm", about["algorithms"], given.get("algorithm"))
            self._items = items_of(chosen, algorithms, choose("dtype", dtypes, given.get("dtype")))
        except (UnknownName, CannotExamine, WaiverError) as error:
            self.pytest_unconfigure()
            raise pytest.UsageError(f"translution: {error}") from error
        self._backend, self._several = backend, len(about["algorithms"]) > 1
        self._given = given
        self._found: dict[str, Result] = {}

    def pytest_unconfigure(self) -> None:
        """End the process."""
        if self._examiner is not None:
            self._examiner.close()
            self._examiner = None

    def pytest_report_header(self) -> str:
        """What is examined."""
        own = self._setting
        return f"translution: {self._backend}, edition {own.edition}, level {own.level}, device {own.device}"

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """The items come after those of the host, before anything is deselected."""
        items.extend(session.genitems(_Laws.from_parent(session, name=NAME, nodeid=NAME, exam=self)))

    def items(self, parent: _Laws) -> list[pytest.Item]:
        """One for each law, algorithm and dtype."""
        names = [
            f"{item.law.id}[{item.algorithm}-{item.dtype}]" if self._several else f"{item.law.id}[{item.dtype}]"
            for item in self._items
        ]
        return [
            LawItem.from_parent(parent, name=name, item=item, exam=self)
            for name, item in zip(names, self._items, strict=True)
        ]

    def examine(self, item: Item) -> Result:
        """The verdict on one item."""
        if self._examiner is None:
            from translution.conformance.exam.examiner import Examiner

            self._examiner = Examiner(self._backend, self._setting)
        return self._examiner.examine(item.law, item.algorithm, item.dtype)

    def again(self, item: Item) -> str:
        """The options that examine one item."""
        from translution.conformance.exam.setting import Setting

        usual = Setting()
        words = {"backend": self._backend, "law": item.law.id}
        words |= {"algorithm": item.algorithm} if self._several else {}
        words["dtype"] = item.dtype
        for name in ("level", "device", "limit", "waivers"):
            value = self._given.get(name)
            if value not in (None, getattr(usual, name)):
                words[name] = f"{value:g}" if isinstance(value, float) else str(value)
        return " ".join(f"--{NAME}-{name} {shlex.quote(value)}" for name, value in words.items())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a result; with pytest-xdist it comes from another process."""
        told: dict[str, Any] = dict(report.user_properties)
        if VERDICT in told:
            from translution.conformance.exam.report import Result, Verdict

            law, _, rest = told[VERDICT].partition("/")
            algorithm, dtype, verdict = rest.rsplit("/", 2)
            self._found[report.nodeid] = Result(
                law, algorithm, dtype, Verdict(verdict), cases=told[CASES], worst_share=told[USE]
            )

    def report(self) -> Report:
        """What was found, without what each result says."""
        from translution.conformance.exam.report import Report

        own = self._setting
        return Report(self._backend, own.edition, own.level, len(self._found), tuple(self._found.values()))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A run in which no law passed that needs an answer fails, even if no item of it does."""
        if session.exitstatus == pytest.ExitCode.OK and self._found and not self.report().answered:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """How much ran, which a row of dots does not say."""
        if not self._found:
            return
        from translution.conformance.reports.summary import headline

        report = self.report()
        use = max(result.worst_share for result in report.results)
        terminalreporter.write_line(
            f"{NAME}: {report.cases:,} cases of {len(report.results):,} items ran on {self._backend}, "
            f"worst use of an error bound {100 * use:.2g}%"
        )
        if not report.answered and not report.broken():
            terminalreporter.write_line(f"{NAME}: {headline(report)}", red=True)


class _Laws(pytest.Collector):
    """The parent of all items."""

    def __init__(self, *, exam: Exam, **more: Any) -> None:
        super().__init__(**more)
        self._exam = exam

    def collect(self) -> Sequence[pytest.Item]:
        """The items."""
        return self._exam.items(self)


class BrokenLaw(Exception):
    """A FAIL or UNKNOWN; the text says it all."""


class LawItem(pytest.Item):
    """One law for one algorithm and dtype."""

    def __init__(self, *, item: Item, exam: Exam, **more: Any) -> None:
        super().__init__(**more)
        self._item, self._exam = item, exam
        self.add_marker(NAME)

    def runtest(self) -> None:
        """PASS passes, NOT CLAIMED skips, WAIVED is an expected failure, FAIL and UNKNOWN fail."""
        result = self._exam.examine(self._item)
        self.user_properties += [
            (CASES, result.cases),
            (USE, result.worst_share),
            (VERDICT, "/".join((*result.key, result.verdict.value))),
        ]
        if result.printed:
            self.add_report_section("call", "printed by the backend", result.printed)
        if result.verdict == "NOT CLAIMED":
            pytest.skip("not claimed: " + ("; ".join(result.reasons) or "no case was left"))
        if result.verdict == "WAIVED":
            pytest.xfail(f"waived: {result.message}")
        if result.verdict != "PASS":
            raise BrokenLaw(_text(self._item, result, self._exam.again(self._item)))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The text of a broken law, without a traceback through this file."""
        return str(excinfo.value) if isinstance(excinfo.value, BrokenLaw) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """Where the item is said to be."""
        return self.path, None, self.nodeid


def _text(item: Item, result: Result, again: str) -> str:
    from translution.conformance.reports.summary import clauses
    from translution.conformance.reports.words import operator_words

    law, shown = item.law, result.counterexample
    lines = [
        f"{result.verdict}: {law.id} with {result.algorithm} in {result.dtype}, {result.cases} cases held before",
        "",
        f"law        {law.statement}",
        *(f"clause     {clause}" for clause in clauses(law)),
        f"found      {result.message}",
    ]
    if shown is not None:
        made = "made smaller from" if shown.shrunk else "as it is in"
        lines.append(f"in         case {shown.number} ({made} the edition), the last of {shown.questions} questions")
        lines += [f"  {name:<16} {value}" for name, value in operator_words(shown.operator)]
        lines += [f"  {name:<16} array {tuple(shape)}" for name, shape in shown.shapes.items()]
    if result.diagnosis:
        lines.append(f"diagnosis  your output equals that of the mutant {' and of '.join(result.diagnosis)}")
    return "\n".join([*lines, f"again      pytest {again}"])
