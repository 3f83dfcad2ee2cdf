"""The process in which a backend is examined.

``python -m translution.conformance.exam.worker BACKEND FD LIFE SETTING`` reads items from standard input, one JSON list
[law, algorithm, dtype] a line, and reports to the file descriptor FD. Its standard output and error belong to the
backend. It ends when the process that started it does, at the latest when nobody can write to the file descriptor LIFE
any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from translution.conformance.exam.examine import NO_ANSWER, Refused, Started
from translution.conformance.exam.examiner import CannotExamine
from translution.conformance.exam.report import Result, Verdict, shortened
from translution.conformance.exam.setting import EXAMINED, Setting, excused, versions
from translution.conformance.exam.subject import LiveSubject, told
from translution.conformance.exam.waivers import Waivers
from translution.conformance.laws import all_laws
from translution.conformance.rounding import ARITHMETIC
from translution.registry import Backend, Claims, claims_of, get_backend

# Seconds for one counterexample.
SHRINKING = 6.0


class Desk:
    """Examines items of one backend, in this process."""

    def __init__(self, backend: Backend, setting: Setting) -> None:
        self.backend, self.setting, self.laws = backend, setting, all_laws()
        self.waivers: Waivers = setting.read_waivers()
        self._seconds = setting.refine
        self._subjects: dict[tuple[str, str], LiveSubject] = {}
        self._refused: Refused = {}
        self._named: dict[tuple[str, str], tuple[str, ...]] = {}

    def subject(self, algorithm: str, dtype: str) -> LiveSubject:
        """The backend with that algorithm and dtype."""
        key = algorithm, dtype
        if key not in self._subjects:
            self._subjects[key] = LiveSubject(self.backend, algorithm, dtype, self.setting.device)
        return self._subjects[key]

    def examine(self, law: str, algorithm: str, dtype: str, started: Started) -> Result:
        """The verdict, without refinement."""
        return self.setting.examine(
            self.laws[law], self.subject(algorithm, dtype), self.waivers, started, self._refused
        )

    def refine(self, result: Result, started: Started) -> Result:
        """A failure with a smaller counterexample and the mutants that it looks like, as long as there is time."""
        # What gave no answer once would take as long at every attempt.
        if result.verdict is not Verdict.FAIL or result.message.startswith(NO_ANSWER):
            return result
        subject, begin = self.subject(result.algorithm, result.dtype), time.monotonic()
        if self._seconds > 0:
            from translution.conformance.exam.explore import smaller

            seconds = min(self._seconds, SHRINKING)
            # Not a case that is waived.
            law = excused(self.laws[result.law], subject, self.waivers, {})
            found = smaller(law, subject, seconds, limit=self.setting.limit, started=started)
            if found is not None and result.counterexample is not None:
                message, shown = found
                shown = replace(shown, number=result.counterexample.number)
                result = replace(result, message=message, counterexample=shown)
        result = replace(result, diagnosis=self._diagnosis(subject))
        self._seconds -= time.monotonic() - begin
        return result

    def _diagnosis(self, subject: LiveSubject) -> tuple[str, ...]:
        """What the subject's numbers look like; that depends on no law."""
        key = subject.algorithm, subject.dtype
        if key not in self._named and self._seconds > 0:
            from translution.conformance.mutants.diagnosis import diagnose

            self._named[key] = diagnose(subject)
        return self._named.get(key, ())


def described(backend: Backend) -> dict[str, Any]:
    """What the backend says of itself.

    Raises:
        CannotExamine: it is no backend, or says something that can't be: what was given, and what is expected.
    """
    given: object = backend
    if isinstance(given, type):
        raise CannotExamine(f"{given.__name__} is a class, and a backend is an object: give {given.__name__}()")
    if not isinstance(given, Backend):
        raise CannotExamine(f"a {type(given).__name__} is no backend: translution.Backend says what it must provide")
    _expect(isinstance(backend.name, str) and backend.name != "", "name", backend.name, "expected a text")
    _expect(backend.kind in ("numpy", "torch"), "kind", backend.kind, "expected 'numpy' or 'torch'")
    try:
        absent = backend.unavailable()
    except Exception as error:
        raise CannotExamine(f"the backend's unavailable() raised {told(error)}") from error
    wanted = "expected a list of texts: return [] where the backend runs, [reason] where it does not"
    _expect(_texts(absent), "unavailable()", absent, wanted)
    for name, names, some in (("algorithms", backend.algorithms, "pairwise"), ("dtypes", backend.dtypes, "float64")):
        wanted = f'expected a tuple of names: write ("{names if isinstance(names, str) else some}",), with the comma'
        _expect(_texts(names), name, names, wanted)
        _expect(len(set(names)) == len(names), name, names, "a name stands there twice: give each once")
    if not absent:
        _expect(bool(backend.algorithms), "algorithms", backend.algorithms, "give at least one")
        known = ", ".join(EXAMINED)
        _expect(bool({*backend.dtypes} & {*EXAMINED}), "dtypes", backend.dtypes, f"give at least one of {known}")
    try:
        _check_claims(claims_of(backend), backend.dtypes)
    except TypeError as error:
        raise CannotExamine(str(error)) from error
    return {
        "name": backend.name,
        "kind": backend.kind,
        "algorithms": list(backend.algorithms),
        "dtypes": list(backend.dtypes),
        "unavailable": list(absent),
        "versions": versions(),
    }


def _texts(value: object) -> bool:
    """Whether it is a list or tuple of texts; one text is none."""
    return isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value)


def _expect(holds: bool, name: str, given: object, otherwise: str) -> None:
    if not holds:
        raise CannotExamine(f"the backend's {name} is {given!r:.200}: {otherwise}")


def _check_claims(claims: Claims, dtypes: Sequence[str]) -> None:
    order: object = claims.gradient_order
    _expect(type(order) is int and order in (0, 1, 2), "claims.gradient_order", order, "expected 0, 1 or 2")
    certain: object = claims.deterministic
    wanted = 'expected True, False or a tuple of devices: write ("cpu",), with the comma'
    _expect(isinstance(certain, bool) or _texts(certain), "claims.deterministic", certain, wanted)
    arithmetic: object = claims.arithmetic
    wanted = f"expected a mapping from the backend's own dtypes to {', '.join(ARITHMETIC)}"
    named = isinstance(arithmetic, Mapping) and all(
        dtype in dtypes and isinstance(used, str) and used in ARITHMETIC for dtype, used in arithmetic.items()
    )
    _expect(named, "claims.arithmetic", arithmetic, wanted)
    exact = claims.arithmetic.get("float64", "float64") == "float64"
    _expect(exact, "claims.arithmetic", arithmetic, "float64 is float64 (D3): compute it so, or leave it out of dtypes")


def end_with_parent(life: int) -> None:
    """End this process when its parent ends, which otherwise would leave a hanging backend behind.

    The signal that comes when nobody can write to ``life`` ends native code too; the thread is for a ``life`` that
    other children of the parent hold as well, and for systems that have no such signal.
    """
    import fcntl

    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    os.set_inheritable(life, False)
    with contextlib.suppress(OSError):
        fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)


def main() -> None:
    """Answer until standard input ends."""
    name, descriptor, life, text = sys.argv[1:]
    end_with_parent(int(life))
    sys.path.insert(0, str(Path.cwd()))
    with os.fdopen(int(descriptor), "w", encoding="utf-8") as report:

        def tell(message: dict[str, Any]) -> None:
            report.write(json.dumps(message) + "\n")
            report.flush()

        try:
            desk = Desk(get_backend(name), Setting.from_text(text))
            if desk.backend.kind == "torch":
                import torch

                # Arrays this small only lose by being shared out.
                torch.set_num_threads(1)
            tell({"ready": described(desk.backend)})
        except Exception as error:  # noqa: BLE001 - importing a backend may fail in any way
            kind = "" if isinstance(error, CannotExamine) else f"{type(error).__name__}: "
            tell({"error": shortened(f"{kind}{error}")})
            return
        for line in sys.stdin:
            law, algorithm, dtype = json.loads(line)

            def started(number: int) -> None:
                tell({"case": number})

            result = desk.examine(law, algorithm, dtype, started)
            tell({"result": result.as_json()})
            # What comes now may end the process; the verdict is safe.
            tell({"refined": desk.refine(result, started).as_json()})


if __name__ == "__main__":
    main()
