"""The process of a backend and who holds it: what is declared, how it ends, and what is waived then."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from translution import Claims
from translution.conformance.exam.examiner import CannotExamine, Examiner
from translution.conformance.exam.report import LONGEST, Verdict
from translution.conformance.exam.session import run
from translution.conformance.exam.setting import Setting
from translution.conformance.exam.worker import described
from translution.conformance.laws import all_laws
from translution.conformance.mutants.naive import Naive

MISBEHAVING = "translution.conformance.mutants.misbehaving"
TRACER = all_laws()["VALUE-TRACER"]


# What a backend declares


def declared(**attributes: Any) -> Naive:
    """A backend that says something else of itself."""
    return type("Declared", (Naive,), attributes)()


def arithmetic(**used: Any) -> Claims:
    return Claims(arithmetic=used)


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "algorithms as a text": (
        {"algorithms": "pairwise"},
        r"the backend's algorithms is 'pairwise': expected a tuple of names: write \(.pairwise.,\), with the comma",
    ),
    "dtypes as a text": ({"dtypes": "float64"}, 'the backend\'s dtypes is \'float64\': .* write \\("float64",\\)'),
    "algorithms that are no names": ({"algorithms": (1,)}, r"algorithms is \(1,\): expected a tuple of names"),
    "no algorithms": ({"algorithms": ()}, r"algorithms is \(\): give at least one"),
    "no algorithms to go through": ({"algorithms": None}, "algorithms is None: expected a tuple"),
    "an algorithm twice": ({"algorithms": ("a", "b", "a")}, r"'a'\): a name stands there twice"),
    "a dtype twice": ({"dtypes": ("float64", "float64")}, r"'float64'\): a name stands there twice"),
    "no dtype that is examined": ({"dtypes": ("double",)}, r"\('double',\): give at least one of float64, float32"),
    "a reason as a text": (
        {"unavailable": lambda _: "no GPU"}, r"unavailable\(\) is 'no GPU': expected a list of texts",
    ),
    "no reasons": ({"unavailable": lambda _: None}, r"unavailable\(\) is None: expected a list of texts"),
    "a broken reason": ({"unavailable": lambda _: 1 / 0}, r"unavailable\(\) raised ZeroDivisionError: division"),
    "no name": ({"name": None}, "name is None: expected a text"),
    "another kind": ({"kind": "jax"}, "kind is 'jax': expected 'numpy' or 'torch'"),
    "other claims": ({"claims": {"gradient_order": 0}}, "claims is a dict, expected a translution.Claims"),
    "another order": ({"claims": Claims(gradient_order=3)}, "gradient_order is 3: expected 0, 1 or 2"),
    "a truth as the order": ({"claims": Claims(gradient_order=True)}, "gradient_order is True: expected 0, 1 or 2"),
    "a device as a text": (
        {"claims": Claims(deterministic="cpu")},  # type: ignore[arg-type]
        r'deterministic is \'cpu\': expected True, False or a tuple of devices: write \("cpu",\)',
    ),
    "no such arithmetic": (
        {"claims": arithmetic(float32="fp8")},
        "expected a mapping from the backend's own dtypes to float64, float32, tf32",
    ),
    "the arithmetic of no dtype of its own": (
        {"dtypes": ("float64",), "claims": arithmetic(float32="tf32")}, "from the backend's own dtypes"
    ),
    "a list as an arithmetic": ({"claims": arithmetic(float32=["tf32"])}, "from the backend's own dtypes"),
    "arithmetic as a text": ({"claims": Claims(arithmetic="tf32")}, "arithmetic is 'tf32': expected a mapping"),  # type: ignore[arg-type]
    "float64 in less": (
        {"claims": arithmetic(float64="float32")},
        r"float64 is float64 \(D3\): compute it so, or leave it out of dtypes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_declaration_that_cannot_be_is_refused_in_words(name: str) -> None:
    attributes, message = ODD[name]
    with pytest.raises(CannotExamine, match=message):
        described(declared(**attributes))


def test_what_can_be_declared_is_described() -> None:
    claims = Claims(2, ("cpu",), MappingProxyType({"float32": "tf32", "float64": "float64"}))
    found = described(declared(algorithms=["one", "two"], dtypes=("float64", "float32"), claims=claims))
    assert (found["algorithms"], found["dtypes"], found["unavailable"]) == (["one", "two"], ["float64", "float32"], [])
    absent = described(declared(algorithms=(), dtypes=(), unavailable=lambda _: ["no GPU"]))
    assert absent["unavailable"] == ["no GPU"]


def test_a_class_and_another_object_are_no_backend() -> None:
    with pytest.raises(CannotExamine, match=r"Naive is a class, .* give Naive\(\)"):
        run(Naive)  # type: ignore[arg-type]
    half = type("Half", (), {"name": "half", "kind": "numpy", "forward": Naive.forward})()
    with pytest.raises(CannotExamine, match=r"a Half is no backend: translution\.Backend says what it must provide"):
        run(half)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules, for this process and those that it starts."""
    (tmp_path / "odd.py").write_text(
        "from translution.conformance.mutants.naive import Naive\n"
        "class Text(Naive):\n    algorithms = ('pairwise')\n"
        "text = Text()\n"
        "class Long(Naive):\n    def unavailable(self):\n        raise ValueError('x' * 10**7)\n"
        "long = Long()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("written")
def test_every_door_says_the_same() -> None:
    message = "^odd:text: the backend's algorithms is 'pairwise': expected a tuple of names"
    with pytest.raises(CannotExamine, match=message):
        assert Examiner("odd:text", Setting()).backend
    with pytest.raises(CannotExamine, match=message):
        run("odd:text")
    with pytest.raises(CannotExamine, match=r"^odd:Text: Text is a class"):
        run("odd:Text")
    main = "from translution.cli import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", main, "conform", "odd:text"], capture_output=True, text=True, timeout=100, check=False
    )
    assert shown.returncode == 2
    assert "the backend's algorithms is 'pairwise'" in " ".join(re.sub("[│╭╮╰╯─]", " ", shown.stderr).split())
    with pytest.raises(CannotExamine) as caught:
        assert Examiner("odd:long", Setting()).backend
    assert len(str(caught.value)) < 2 * LONGEST


# Crashes


def waivers(folder: Path, when: str = "") -> str:
    """A file that waives the law TRACER."""
    path = folder / "waivers.toml"
    text = f'[[waiver]]\nlaw = "{TRACER.id}"\nreason = "under repair"\nexpires = 2999-01-01\n'
    path.write_text(text + (f"when = {{ {when} }}\n" if when else ""))
    return str(path)


@pytest.mark.parametrize(
    ("when", "waived"),
    [
        ("", True),
        ('dtype = "float64"', True),
        ('algorithm = "pairwise", dtype = "float64"', True),
        ('dtype = "float32"', False),
        ('"layout.kind" = "Lattice"', False),
    ],
)
@pytest.mark.parametrize("attribute", ["aborts", "exits"])
def test_a_process_that_ends_can_be_waived(attribute: str, when: str, waived: bool, tmp_path: Path) -> None:
    """Not for some operators: the operator is not known then."""
    setting = Setting(waivers=waivers(tmp_path, when), refine=0.0)
    with Examiner(f"{MISBEHAVING}:{attribute}", setting) as examiner:
        found = examiner.examine(TRACER, "pairwise", "float64")
    assert found.verdict is (Verdict.WAIVED if waived else Verdict.FAIL)
    assert found.message.startswith("under repair: the process ended" if waived else "the process ended")
    assert "in case" in found.message


def test_a_native_hang_can_be_waived(tmp_path: Path) -> None:
    setting = Setting(waivers=waivers(tmp_path), limit=0.5, refine=0.0)
    with Examiner(f"{MISBEHAVING}:hangs_in_c", setting) as examiner:
        assert examiner.examine(TRACER, "pairwise", "float64").verdict is Verdict.WAIVED


@pytest.mark.parametrize("limit", [float("inf"), 1e300, 1e12])
def test_a_limit_without_end_is_one(limit: float) -> None:
    with Examiner("numpy", Setting(limit=limit)) as examiner:
        assert examiner.examine(TRACER, "pairwise", "float64").verdict is Verdict.PASS


# The end of the parent

PARENT = """
import sys
from translution.conformance.exam.examiner import Examiner
from translution.conformance.exam.setting import Setting
from translution.conformance.laws import all_laws

examiner = Examiner(sys.argv[1], Setting(limit=600))
print(examiner._process.pid, flush=True)
examiner.examine(all_laws()["VALUE-TRACER"], "pairwise", "float64")
"""


def lives(process: int) -> bool:
    """Whether there is such a process, a zombie apart."""
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="whether a process lives is read in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name)
@pytest.mark.parametrize("attribute", ["hangs", "hangs_in_c"])
def test_a_worker_does_not_outlive_its_parent(attribute: str, how: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, f"{MISBEHAVING}:{attribute}"], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    try:
        time.sleep(2)  # until it hangs
        assert lives(worker)
        parent.send_signal(how)
        parent.wait(10)
        until = time.monotonic() + 8
        while lives(worker) and time.monotonic() < until:
            time.sleep(0.1)
        assert not lives(worker)
    finally:
        parent.kill()
        parent.stdout.close()
        if lives(worker):
            os.kill(worker, signal.SIGKILL)


def test_after_a_case_without_an_answer_the_process_is_another() -> None:
    """What the interruption of a backend leaves behind does not reach the next law."""
    with Examiner("translution.conformance.mutants.misbehaving:hangs", Setting(limit=0.3)) as examiner:
        assert examiner._process is not None
        first = examiner._process.pid
        found = examiner.examine(all_laws()["COUNT"], "pairwise", "float64")
        assert found.message.startswith("no answer within")
        assert examiner.examine(all_laws()["CLAIMS"], "pairwise", "float64").law == "CLAIMS"
        assert examiner._process is None or examiner._process.pid != first
