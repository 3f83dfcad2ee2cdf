"""Holds a worker process and asks it item by item; outlives whatever the backend does there."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from types import TracebackType
from typing import IO, Any, Self

from translution.conformance.exam.examine import NO_ANSWER
from translution.conformance.exam.law import Law
from translution.conformance.exam.report import Result, Verdict
from translution.conformance.exam.setting import LONGEST, Setting

# A worker that can be interrupted says so itself at the limit; one in native code is stopped this much later.
GRACE = 5.0
STARTING = 180.0
# Making a failure small and naming it may take longer than a case.
REFINING = 60.0
PRINTED = 2000


class CannotExamine(Exception):
    """There is no such backend, or it can't be imported."""


class _Gone(Exception):
    """The worker process ended, or had to be ended; says how."""


class _Lines:
    """Messages from the worker, each within its time."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._rest = descriptor, b""

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None when the worker has closed its end. ``TimeoutError`` after ``seconds``."""
        until = time.monotonic() + seconds
        while b"\n" not in self._rest:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._descriptor], [], [], left)[0]:
                raise TimeoutError
            data = os.read(self._descriptor, 1 << 16)
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        os.close(self._descriptor)


class Examiner:
    """Examines one backend by name, in a process of its own that is started again whenever it is lost.

    The process starts at construction; whether the backend can be imported is known when :attr:`backend` is read.

    Raises:
        WaiverError: the waiver file says something it can't.
    """

    def __init__(self, backend: str, setting: Setting) -> None:
        self._backend, self._setting = backend, replace(setting, limit=min(setting.limit, LONGEST))
        self._waivers = setting.read_waivers()
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: _Lines | None = None
        self._held: int | None = None
        self._printed: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._about: dict[str, Any] | None = None
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._stop()
        self._printed.close()

    def _start(self) -> None:
        self._about = None
        here, there = os.pipe()
        # Nothing is ever written to it: its end is that of this process, or of this examiner.
        life, self._held = os.pipe()
        command = [
            sys.executable, "-m", "translution.conformance.exam.worker",
            self._backend, str(there), str(life), self._setting.as_text(),
        ]  # fmt: skip
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._printed,
            stderr=self._printed,
            pass_fds=(there, life),
            env={**threads, **os.environ},
            # An interrupt at the terminal is for the parent, which then ends its workers.
            start_new_session=True,
        )
        os.close(there)
        os.close(life)
        self._lines = _Lines(here)

    @property
    def backend(self) -> dict[str, Any]:
        """What the backend says of itself, once it is imported.

        Raises:
            CannotExamine: it can't be.
        """
        return self._imported()

    def _imported(self) -> dict[str, Any]:
        """Wait until the process has imported the backend, where it has not said so yet."""
        if self._about is None:
            assert self._lines is not None
            try:
                message: dict[str, Any] | None = self._lines.next(STARTING)
            except TimeoutError:
                message = {"error": f"importing {self._backend} took longer than {STARTING:g} s"}
            if message is None or "ready" not in message:
                how = "the process ended while it was imported" if message is None else str(message["error"])
                words = self._tail(0)
                self.close()
                raise CannotExamine(f"{self._backend}: {how}" + (f"\n{words}" if message is None and words else ""))
            self._about = dict(message["ready"])
        return self._about

    def _stop(self) -> int:
        """End the process if it lives; its exit code."""
        process, self._process = self._process, None
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        if process is not None and process.poll() is None:
            process.kill()
        if self._held is not None:
            os.close(self._held)
            self._held = None
        if process is None:
            return 0
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        return process.wait()

    def _tail(self, since: int) -> str:
        """What was printed since that position, shortened."""
        end = os.fstat(self._printed.fileno()).st_size
        start = max(since, end - PRINTED)
        text = os.pread(self._printed.fileno(), end - start, start).decode(errors="replace")
        return ("[...] " if start > since else "") + text.strip()

    def examine(self, law: Law, algorithm: str, dtype: str) -> Result:
        """The verdict on one item; a worker that hangs or dies is a failure of the backend, which may be waived.

        What the operator was is not known then, so that a waiver for some operators does not cover it.
        """
        if self._process is None:
            self._start()
        self._imported()
        begin, since = time.perf_counter(), os.fstat(self._printed.fileno()).st_size
        result: Result | None = None
        number: int | None = None
        try:
            self._send([law.id, algorithm, dtype])
            while True:
                message = self._receive(self._setting.limit + GRACE + (REFINING if result else 0))
                if "case" in message:
                    number = message["case"]
                elif "result" in message:
                    result = Result.from_json(message["result"])
                else:
                    result = Result.from_json(message["refined"])
                    break
        except _Gone as error:
            if result is None:
                ending = f"{error}" if number is None else f"{error} in case {number}"
                waiver = self._waivers.find(law.id, algorithm, dtype, None)
                result = Result(
                    law.id, algorithm, dtype, Verdict.WAIVED if waiver else Verdict.FAIL,
                    0, 1, law.floor(self._setting.level, dtype),
                    message=f"{waiver.reason}: {ending}" if waiver else ending,
                    seconds=time.perf_counter() - begin,
                )  # fmt: skip
        told = replace(result, printed=self._tail(since))
        if result.message.startswith(NO_ANSWER):
            # What an interruption left behind must not spoil the next law.
            self._stop()
        return told

    def _send(self, item: list[str]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(item) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise _Gone(self._ending()) from None

    def _receive(self, seconds: float) -> dict[str, Any]:
        assert self._lines is not None
        try:
            message = self._lines.next(seconds)
        except TimeoutError:
            self._stop()
            raise _Gone(
                f"no answer within {self._setting.limit:g} s, and it could not be interrupted: the process was ended"
            ) from None
        except json.JSONDecodeError:
            self._stop()
            raise _Gone("the report of the process was written over") from None
        if message is None:
            raise _Gone(self._ending())
        return message

    def _ending(self) -> str:
        """How the process ended by itself."""
        assert self._process is not None
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            code = 0
        self._stop()
        return f"the process ended ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
