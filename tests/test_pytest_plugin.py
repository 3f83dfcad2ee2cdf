"""The exam inside somebody else's pytest: each run is a pytest of its own in a project of its own."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

# What a backend must not do to its host: each does it in one dtype and is the numpy backend otherwise.
BACKENDS = """
import os, time
from translution.backends.numpy import NumpyBackend

class Misbehaving(NumpyBackend):
    name = "misbehaving"
    algorithms = ("pairwise",)
    dtypes = ("float64", "float32")

    def __init__(self, mischief):
        super().__init__()
        self.mischief = mischief

    def forward(self, request, algorithm, params, inputs):
        if request.dtype == "float32":
            self.mischief()
        return super().forward(request, algorithm, params, inputs)

def hang():
    while True:
        time.sleep(0.01)

def crash():
    os.abort()

def print_garbage():
    print("GARBAGE \\x1b[31m FROM THE BACKEND", flush=True)
    raise RuntimeError("mischief")

def leave():
    raise SystemExit(3)

hanging, crashing, printing, leaving = map(Misbehaving, (hang, crash, print_garbage, leave))

class Absent(NumpyBackend):
    def unavailable(self):
        return ["the moon is full"]

absent = Absent()
"""


class Host:
    """A project with its own settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("pytest.ini", "[pytest]\nfilterwarnings = error\naddopts = --strict-markers --strict-config\n")

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def pytest(self, *options: str, code: int = 0, backend: str | None = "numpy") -> str:
        """The output of a run that must end with that exit code."""
        chosen = () if backend is None else ("--translution-backend", backend)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV_"))}
        environment |= {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *chosen, *options],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


ONE = ("--translution-law", "VALUE-TRACER", "--translution-algorithm", "pairwise", "--translution-dtype", "float64")


def test_items_run_without_tests_of_the_host(host: Host) -> None:
    shown = host.pytest(*ONE, "-v", "-p", "no:cacheprovider")
    assert (
        "translution::VALUE-TRACER[pairwise-float64] PASSED" in shown
        or "VALUE-TRACER[pairwise-float64] PASSED" in shown
    )
    assert "collected 1 item" in shown
    assert re.search(r"translution: 12 cases of 1 items ran on numpy, worst use of an error bound \d", shown)


def test_collection_shows_the_ids(host: Host) -> None:
    shown = host.pytest("--collect-only", "-q", "--translution-law", "VALUE-TRACER")
    assert re.findall(r"^translution::.*", shown, flags=re.MULTILINE) == [
        f"translution::VALUE-TRACER[{algorithm}-{dtype}]"
        for algorithm in ("stream", "pairwise")
        for dtype in ("float64", "float32", "float16")
    ]


def test_the_algorithm_is_in_the_id_only_where_there_are_several(host: Host) -> None:
    host.write("mischief.py", BACKENDS)
    shown = host.pytest("--collect-only", "-q", "--translution-law", "VALUE-TRACER", backend="mischief:hanging")
    assert "translution::VALUE-TRACER[float32]" in shown


def test_host_tests_stay_and_k_and_m_choose(host: Host) -> None:
    host.write("test_host.py", "def test_host():\n    pass\n")
    law = ("--translution-law", "VALUE-TRACER", "--translution-algorithm", "stream")
    assert "4 passed" in host.pytest(*law)
    assert "1 passed, 3 deselected" in host.pytest(*law, "-k", "float64")
    assert "3 passed, 1 deselected" in host.pytest(*law, "-m", "translution")
    assert "1 passed, 3 deselected" in host.pytest(*law, "-m", "not translution")
    assert "1 passed" in host.pytest(backend=None)


def test_xdist_shares_the_items(host: Host) -> None:
    shown = host.pytest("--translution-law", "VALUE-TRACER", "-n", "2")
    assert "6 passed" in shown
    assert "60 cases of 6 items" in shown


@pytest.mark.parametrize(
    ("backend", "message", "spread"),
    [
        ("hanging", "no answer within 1 s", ()),
        ("crashing", "the process ended (SIGABRT) in case 0", ()),
        ("crashing", "the process ended (SIGABRT) in case 0", ("-n", "1")),
        ("printing", "RuntimeError: mischief", ()),
        ("leaving", "", ()),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)
def test_misbehaviour_fails_its_own_item(backend: str, message: str, spread: tuple[str, ...], host: Host) -> None:
    host.write("mischief.py", BACKENDS)
    options = ("--translution-law", "VALUE-TRACER", "--translution-limit", "1", "-rA", *spread)
    # Where the process was lost, the next item must find a new one.
    more = ("--translution-law", "KEY-TRACER") if backend == "crashing" else ()
    shown = host.pytest(*options, *more, code=1, backend=f"mischief:{backend}")
    assert message in shown
    for law in ("VALUE-TRACER", "KEY-TRACER") if more else ("VALUE-TRACER",):
        assert f"FAILED translution::{law}[float32]" in shown
        assert f"PASSED translution::{law}[float64]" in shown
    if backend == "printing":
        assert "printed by the backend" in shown
        assert "FROM THE BACKEND" in shown


WRONG = """
from translution.backends.numpy import NumpyBackend

class Wrong(NumpyBackend):
    name = "wrong"
    algorithms = ("pairwise",)
    dtypes = ("float64",)

    def forward(self, request, algorithm, params, inputs):
        out, weights = super().forward(request, algorithm, params, inputs)
        return out * 1.5, weights

wrong = Wrong()
"""


def test_a_failure_tells_the_law_the_case_and_how_to_repeat_it(host: Host) -> None:
    host.write("wrong.py", WRONG)
    shown = host.pytest("--translution-law", "VALUE-TRACER", code=1, backend="wrong:wrong")
    for part in (
        "FAIL: VALUE-TRACER with pairwise in float64",
        "clause     L3",
        "expected exactly",
        "Lattice(grid=",
        "x                array (",
        "again      pytest --translution-backend wrong:wrong --translution-law VALUE-TRACER ",
        "FAILED translution::VALUE-TRACER[float64]",
    ):
        assert part in shown
    assert "Traceback" not in shown
    assert "pytest_plugin.py" not in shown


def test_not_claimed_is_skipped_with_the_reason(host: Host) -> None:
    host.write(
        "modest.py",
        WRONG.replace(
            "def forward",
            "def not_supported(self, request, algorithm):\n        return ['too modest']\n\n    def forward",
        ),
    )
    options = ("--translution-law", "VALUE-TRACER", "--translution-law", "ORACLE", "-rs")
    shown = host.pytest(*options, backend="modest:wrong", code=1)
    assert "2 skipped" in shown
    assert "not claimed: too modest" in shown


MODEST = """
from translution.backends.numpy import NumpyBackend

class Modest(NumpyBackend):
    name = "modest"
    algorithms = ("pairwise",)
    dtypes = ("float64",)

    def not_supported(self, request, algorithm):
        return ["never"] if self.name == "modest" else super().not_supported(request, algorithm)

modest = Modest()
able = Modest()
able.name = "able"
"""
NOTHING = "translution: The exam does not hold: nothing that had to be computed passed: the backend claims none of it."


def test_who_refuses_everything_fails(host: Host) -> None:
    """As with the command: only the law of refusals passes, or none."""
    host.write("modest.py", MODEST)
    host.write("test_host.py", "def test_host():\n    pass\n")
    claims, oracle = ("--translution-law", "CLAIMS"), ("--translution-law", "ORACLE")
    shown = host.pytest(*claims, *oracle, "-n", "1", backend="modest:modest", code=1)
    assert "2 passed, 1 skipped" in shown
    assert NOTHING in shown
    shown = host.pytest(*oracle, backend="modest:modest", code=1)
    assert "1 passed, 1 skipped" in shown
    assert NOTHING in shown
    shown = host.pytest(*claims, *oracle, backend="modest:able")
    assert "3 passed" in shown
    assert "does not hold" not in shown


def test_where_nothing_of_the_exam_ran_nothing_is_said_of_it(host: Host) -> None:
    host.write("modest.py", MODEST)
    host.write("test_host.py", "def test_host():\n    pass\n")
    claims, oracle = ("--translution-law", "CLAIMS"), ("--translution-law", "ORACLE")
    for options, code in (
        (("-k", "test_host"), 0),
        (("-k", "CLAIMS"), 0),
        (("--collect-only",), 0),
        (("-k", "nothing"), pytest.ExitCode.NO_TESTS_COLLECTED),
    ):
        shown = host.pytest(*claims, *oracle, *options, backend="modest:modest", code=code)
        assert "does not hold" not in shown


def test_waived_is_an_expected_failure(host: Host) -> None:
    host.write("wrong.py", WRONG)
    waiver = '[[waiver]]\nlaw = "VALUE-TRACER"\nreason = "under repair"\nexpires = 2999-01-01\n'
    file = str(host.write("waivers.toml", waiver))
    options = ("--translution-law", "VALUE-TRACER", "--translution-waivers", file, "-rx")
    # PURE looks at memory, where this backend makes no mistake.
    shown = host.pytest(*options, "--translution-law", "PURE", backend="wrong:wrong")
    assert "1 passed, 1 xfailed" in shown
    assert "waived: under repair" in shown
    assert "FAILED" not in shown
    assert "1 failed" in host.pytest(*options, "--runxfail", code=1, backend="wrong:wrong")
    shown = host.pytest(*options, code=1, backend="wrong:wrong")
    assert "1 xfailed" in shown
    assert "nothing that had to be computed passed: what is claimed is waived" in shown


def test_the_command_that_repeats_an_item_has_its_options(host: Host) -> None:
    host.write("wrong.py", WRONG)
    waiver = '[[waiver]]\nlaw = "KEY-TRACER"\nreason = "under repair"\nexpires = 2999-01-01\n'
    host.write("some waivers.toml", waiver)
    options = ("--translution-limit", "30", "--translution-waivers", "some waivers.toml", "--translution-device", "cpu")
    shown = host.pytest("--translution-law", "VALUE-TRACER", *options, code=1, backend="wrong:wrong")
    assert "level quick, device cpu" in shown
    # Where CI is set, pytest shows a message in its summary as a whole once more.
    (line,) = set(re.findall(r"again +pytest (.*)", shown))
    assert shlex.split(line) == [
        "--translution-backend", "wrong:wrong", "--translution-law", "VALUE-TRACER", "--translution-dtype", "float64",
        "--translution-limit", "30", "--translution-waivers", "some waivers.toml",
    ]  # fmt: skip
    assert "1 failed" in host.pytest(*shlex.split(line), backend=None, code=1)


def test_the_device_reaches_the_backend(host: Host) -> None:
    host.write("naive.py", "from translution.conformance.mutants.naive import Naive\nbackend = Naive()\n")
    options = ("--translution-law", "VALUE-TRACER", "--translution-dtype", "float64", "--translution-device", "meta")
    shown = host.pytest(*options, "-rs", backend="naive:backend", code=1)
    assert "level quick, device meta" in shown
    assert "not claimed: naive computes on cpu, not on meta" in shown


def test_waivers_expire(host: Host) -> None:
    waiver = '[[waiver]]\nlaw = "VALUE-TRACER"\nreason = "old"\nexpires = 2001-01-01\n'
    file = str(host.write("waivers.toml", waiver))
    assert "the waiver of VALUE-TRACER expired on 2001-01-01" in host.pytest(
        "--translution-waivers", file, code=pytest.ExitCode.USAGE_ERROR
    )


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("nump", (), "unknown backend 'nump': known are numpy, reference, torch, triton. Did you mean 'numpy'?"),
        ("no_such.module:backend", (), "There is no module no_such"),
        ("nump", ("-n", "2"), "unknown backend 'nump'"),
        ("numpy", ("--translution-dtype", "float23"), "unknown dtype 'float23'"),
        ("numpy", ("--translution-algorithm", "magic"), "unknown algorithm 'magic'"),
        ("numpy", ("--translution-law", "VALUE-TRACE"), "Did you mean 'VALUE-TRACER'?"),
        ("numpy", ("--translution-level", "some"), "invalid choice: 'some'"),
        ("numpy", ("--translution-limit", "0"), "--translution-limit is 0: give seconds, more than 0"),
        ("numpy", ("--translution-limit", "nan"), "give seconds, more than 0"),
        ("numpy", ("--translution-limit", "inf"), "give seconds, more than 0"),
        ("mischief:Absent", (), "Absent is a class"),
        ("numpy", ("--translution-waivers", "none.toml"), "none.toml"),
        ("mischief:absent", (), "the moon is full"),
        (None, ("--translution-law", "VALUE-TRACER"), "--translution-law needs --translution-backend"),
    ],
    ids=lambda value: value[0].removeprefix("--translution-") if isinstance(value, tuple) and value else "",
)
def test_wrong_options_are_usage_errors(
    backend: str | None, options: tuple[str, ...], message: str, host: Host
) -> None:
    host.write("mischief.py", BACKENDS)
    shown = host.pytest(*options, code=pytest.ExitCode.USAGE_ERROR, backend=backend)
    assert message in shown
    assert "Traceback" not in shown


def test_the_hypothesis_profile_of_the_host_is_untouched(host: Host) -> None:
    host.write(
        "conftest.py",
        "from hypothesis import settings as s\ns.register_profile('mine', max_examples=7)\ns.load_profile('mine')\n",
    )
    host.write(
        "test_host.py", "from hypothesis import settings\ndef test_host():\n    assert settings().max_examples == 7\n"
    )
    assert "2 passed" in host.pytest(*ONE)


def test_junit_has_a_case_for_each_item(host: Host) -> None:
    host.pytest(*ONE, "--junitxml", "junit.xml")
    text = (host.folder / "junit.xml").read_text()
    assert 'classname="translution" name="VALUE-TRACER[pairwise-float64]"' in text
    assert '<property name="translution cases" value="12"' in text


def test_the_plugin_costs_nothing_where_it_is_not_used() -> None:
    code = """
import sys, json, pytest
before = set(sys.modules)
import translution.conformance.pytest_plugin
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == [
        "translution", "translution.conformance", "translution.conformance.pytest_plugin",
    ]  # fmt: skip
