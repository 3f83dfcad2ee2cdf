"""The process in which a backend is examined: ``python -m translution.conformance.exam.worker BACKEND FD SETTING``.

It reads items from standard input, one JSON list [law, algorithm, dtype] a line, and reports to the file descriptor
FD. Its standard output and error belong to the backend.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from translution.conformance.exam.examine import NO_ANSWER, Started
from translution.conformance.exam.report import Result, Verdict
from translution.conformance.exam.setting import Setting, versions
from translution.conformance.exam.subject import LiveSubject
from translution.conformance.exam.waivers import Waivers
from translution.conformance.laws import all_laws
from translution.registry import Backend, claims_of, get_backend

# Seconds for one counterexample.
SHRINKING = 6.0


class Desk:
    """Examines items of one backend, in this process."""

    def __init__(self, backend: Backend, setting: Setting) -> None:
        self.backend, self.setting, self.laws = backend, setting, all_laws()
        self.waivers: Waivers = setting.read_waivers()
        self._seconds = setting.refine
        self._subjects: dict[tuple[str, str], LiveSubject] = {}
        self._named: dict[tuple[str, str], tuple[str, ...]] = {}

    def subject(self, algorithm: str, dtype: str) -> LiveSubject:
        """The backend with that algorithm and dtype."""
        key = algorithm, dtype
        if key not in self._subjects:
            self._subjects[key] = LiveSubject(self.backend, algorithm, dtype, self.setting.device)
        return self._subjects[key]

    def examine(self, law: str, algorithm: str, dtype: str, started: Started) -> Result:
        """The verdict, without refinement."""
        return self.setting.examine(self.laws[law], self.subject(algorithm, dtype), self.waivers, started)

    def refine(self, result: Result, started: Started) -> Result:
        """A failure with a smaller counterexample and the mutants that it looks like, as long as there is time."""
        # What gave no answer once would take as long at every attempt.
        if result.verdict is not Verdict.FAIL or result.message.startswith(NO_ANSWER):
            return result
        subject, begin = self.subject(result.algorithm, result.dtype), time.monotonic()
        if self._seconds > 0:
            from translution.conformance.exam.explore import smaller

            seconds = min(self._seconds, SHRINKING)
            found = smaller(self.laws[result.law], subject, seconds, limit=self.setting.limit, started=started)
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
    """What the backend says of itself."""
    claims_of(backend)
    return {
        "name": str(backend.name),
        "kind": backend.kind,
        "algorithms": [str(a) for a in backend.algorithms],
        "dtypes": [str(d) for d in backend.dtypes],
        "unavailable": [str(reason) for reason in backend.unavailable()],
        "versions": versions(),
    }


def main() -> None:
    """Answer until standard input ends."""
    name, descriptor, text = sys.argv[1:]
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
            tell({"error": f"{type(error).__name__}: {error}"})
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
