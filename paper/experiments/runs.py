"""Many runs of one experiment: each in a folder of its own, finished ones are not run again, several at a time.

A run is a JSON object that decides its result; a hash of it is part of the folder's name. ``result.json`` is written
last, so whatever is killed goes on where its run's checkpoint stands.
"""

import hashlib
import json
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from translution.paper.training.distribution import this_part, wait_for_all
from translution.paper.training.engine import LOG
from translution.paper.training.files import read_json, read_log, write_json
from translution.paper.training.settings import TrainingError
from translution.progress import Update, silently

RESULT = "result.json"
# Of the JSON object of a run and its folder, the result.
Work = Callable[[Mapping[str, Any], Path], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Run:
    """``name`` is for people; ``about`` decides the result and holds a number of ``steps`` for the progress bar."""

    name: str
    about: Mapping[str, Any]

    def folder(self, root: Path) -> Path:
        """Where it keeps its files."""
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()
        return root / f"{self.name.replace(' ', '-')}-{digest[:10]}"

    def result(self, root: Path) -> dict[str, Any] | None:
        """None where it is not finished."""
        path = self.folder(root) / RESULT
        if not path.exists():
            return None
        found: dict[str, Any] = read_json(path)["result"]
        return found


def run_all(
    work: Work, runs: Sequence[Run], root: Path, *, jobs: int, update: Update = silently
) -> list[dict[str, Any]]:
    """The results, in the order of ``runs``.

    Args:
        work: a function of a module, which other processes can import.
        jobs: how many processes at a time, each with one thread; 1 runs all in this one, with torch's own threads.

    Raises:
        TrainingError: of a run; those that were under way go on another time from their checkpoints.
    """
    root.mkdir(parents=True, exist_ok=True)
    open_runs = [run for run in runs if run.result(root) is None]
    if jobs == 1 or this_part().size > 1:
        for run in open_runs:
            update("runs", len(runs) - len(open_runs) + open_runs.index(run), len(runs))
            finish(work, run, root)
    else:
        _in_processes(work, open_runs, root, jobs, update)
    results = [run.result(root) for run in runs]
    return [result for result in results if result is not None]


def described(
    runs: Sequence[Run], results: Sequence[Mapping[str, Any]], root: Path, keys: Sequence[str]
) -> list[dict[str, Any]]:
    """Every run as JSON data: what ``keys`` say of it, its folder below ``root``, its result."""
    return [
        {**{key: run.about[key] for key in keys}, "folder": run.folder(root).name, **result}
        for run, result in zip(runs, results, strict=True)
    ]


def finish(work: Work, run: Run, root: Path) -> None:
    """Bring a run to its end in this process, unless another does just that: then wait for it."""
    folder = run.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    first = this_part().rank == 0
    lock = FileLock(folder / "lock")
    if first:
        lock.acquire()
    try:
        wait_for_all()
        if run.result(root) is not None:
            return
        result = work(run.about, folder)
        if first:
            write_json(folder / RESULT, {"name": run.name, "about": dict(run.about), "result": result})
        wait_for_all()
    finally:
        lock.release()


def _in_processes(work: Work, runs: Sequence[Run], root: Path, jobs: int, update: Update) -> None:
    context = multiprocessing.get_context("spawn")
    waiting, running = list(runs), dict[str, tuple[Run, SpawnProcess, Connection]]()
    steps = {run.name: int(run.about["steps"]) for run in runs}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                # A daemon ends with this process.
                process = context.Process(target=_worker, args=(work, run, root, theirs), daemon=True, name=run.name)
                process.start()
                theirs.close()
                running[run.name] = run, process, ours
            time.sleep(0.2)
            for run, process, ours in list(running.values()):
                if not process.is_alive():
                    del running[run.name]
                    _check(run, process.exitcode, ours)
            done = sum(steps[run.name] for run in runs if run not in waiting and run.name not in running)
            done += sum(_steps_done(run.folder(root)) for run, _, _ in running.values())
            update("steps of all runs", done, sum(steps.values()))
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.join()


def _worker(work: Work, run: Run, root: Path, answer: Connection) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        finish(work, run, root)
    except TrainingError as error:
        answer.send(("refused", str(error)))
    except KeyboardInterrupt:
        answer.send(("interrupted", ""))
    except Exception:  # noqa: BLE001 - whatever it is, the parent raises it
        answer.send(("failed", traceback.format_exc()))


def _check(run: Run, exit_code: int | None, answer: Connection) -> None:
    try:
        kind, text = answer.recv() if answer.poll() else ("", "")
    except EOFError:
        kind, text = "", ""
    if kind == "refused":
        # The message is a whole one already.
        raise _Passed(f"{run.name}: {text}")
    if kind == "interrupted":
        raise KeyboardInterrupt
    if kind == "failed" or exit_code:
        raise RuntimeError(f"the run {run.name} ended with exit code {exit_code}\n{text}")


class _Passed(TrainingError):
    """A TrainingError of another process."""

    def __init__(self, message: str) -> None:
        ValueError.__init__(self, message)


def _steps_done(folder: Path) -> int:
    return max((line["step"] for line in read_log(folder / LOG)), default=0)
