"""Which backend and algorithm to deploy for one request: correct first, then measured, within a memory budget.

Every candidate is checked on the very operator and shape before it is timed. Candidates are timed in interleaved rounds
(:mod:`translution.trials`); where the best can't be told apart the simplest of them is chosen, which is an answer too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from translution.algorithms import ALGORITHMS, ITEM_BYTES, Cost, Request, cost
from translution.errors import NotSupported
from translution.execution import Plan, as_asked, predict, reasons_against
from translution.peak_memory import CannotMeasure, peak_memory
from translution.plan_file import request_data
from translution.progress import Update, silently
from translution.registry import BACKENDS, Backend, get_backend
from translution.trials import REST, Timing, contenders, measure
from translution.workload import Workload

OBJECTIVES = ("latency", "throughput", "memory")
# One native call, then plain arrays, then loops over displacements, then kernels of our own.
SIMPLEST = ("sdpa", "conv", "pairwise", "stream", "fused", "definition")
# Who takes this many times as long as the fastest, once, is out before the rounds begin.
HOPELESS = 20.0
# Peaks that are closer than this, or than a MiB, are no difference.
SAME_MEMORY = 1.05

# The largest error as a share of its bound; raises where a backend does not compute the request.
Check = Callable[[Backend, str], float]


@dataclass(frozen=True, slots=True)
class Entry:
    """One candidate at one batch size: what was found of it, or why it is ``out``.

    ``share`` is the largest error as a share of its bound, ``peak`` measured bytes beyond tokens and parameters.
    """

    backend: str
    algorithm: str
    batch: int
    predicted: int
    share: float | None = None
    timing: Timing | None = None
    peak: int | None = None
    out: str = ""

    @property
    def name(self) -> str:
        """Who this is."""
        return f"{self.backend} {self.algorithm}"

    @property
    def per_item(self) -> float:
        """Median seconds for an item of the batch."""
        assert self.timing is not None
        return self.timing.median / self.batch


@dataclass(frozen=True, slots=True)
class Selection:
    """All entries of a request, those that are left first and the best of them at the top.

    ``tied`` names the entries that can't be told from the best; ``chosen`` is the simplest of them, None if none is
    left.
    """

    request: Request
    objective: str
    entries: tuple[Entry, ...]
    tied: tuple[Entry, ...]
    chosen: Entry | None

    @property
    def is_clear(self) -> bool:
        """Whether one entry is better than all others for certain."""
        return len(self.tied) == 1

    def plan(self) -> Plan:
        """The chosen plan."""
        assert self.chosen is not None
        return Plan(self.request.operator, self.chosen.backend, self.chosen.algorithm)

    def data(self) -> dict[str, Any]:
        """What was measured, as plain data."""
        return {
            "request": request_data(self.request),
            "objective": self.objective,
            "clear": self.is_clear,
            "tied": [entry.name for entry in self.tied],
            "chosen": None if self.chosen is None else self.chosen.name,
            "entries": [_entry_data(entry) for entry in self.entries],
        }


def _entry_data(entry: Entry) -> dict[str, Any]:
    timing = entry.timing
    return {
        "backend": entry.backend,
        "algorithm": entry.algorithm,
        "batch": entry.batch,
        "error_over_bound": entry.share,
        "seconds": None if timing is None else timing.median,
        "seconds_interval": None if timing is None else list(timing.interval),
        "rounds": None if timing is None else len(timing.seconds),
        "predicted_bytes": entry.predicted,
        "peak_bytes": entry.peak,
        "out": entry.out or None,
    }


def candidates(request: Request, backends: Sequence[str] = tuple(BACKENDS), limit: int | None = None) -> list[Entry]:
    """Every algorithm of these backends; ``out`` where it can't run, or is predicted to take more than ``limit`` bytes
    with its parameters.

    The ``definition`` is out: it is what the others are compared with.
    """
    found: list[Entry] = []
    for name in backends:
        try:
            backend = get_backend(name)
        except NotSupported as error:
            found.append(Entry(name, "-", request.batch, 0, out="; ".join(error.reasons)))
            continue
        for algorithm in backend.algorithms:
            reasons = reasons_against(backend, as_asked(backend, request), algorithm)
            if algorithm == "definition":
                reasons.append("the definition is what the others are compared with, not for deployment")
            expected, failure = _predicted(backend, request, algorithm, count=not reasons)
            reasons += failure
            predicted = 0 if expected is None else expected.working_bytes
            if limit is not None and expected is not None and expected.total_bytes > limit:
                reasons.append(f"predicted to take {expected.total_bytes:,} bytes of {limit:,}")
            found.append(Entry(name, algorithm, request.batch, predicted, out="; ".join(dict.fromkeys(reasons))))
    return found


def _predicted(backend: Backend, request: Request, algorithm: str, *, count: bool) -> tuple[Cost | None, list[str]]:
    """The cost, None for an algorithm of somebody else's; and why it can't be known, as a reason to be out."""
    if algorithm not in ALGORITHMS:
        return None, []
    try:
        return predict(backend, request, algorithm) if count else cost(request, algorithm), []
    except Exception as error:  # noqa: BLE001 - a dry run is the backend's own code
        return None, [f"dry run: {error}"]


def checked(entry: Entry, check: Check) -> Entry:
    """The entry with its share of the bound, or out with what is wrong."""
    try:
        return replace(entry, share=check(get_backend(entry.backend), entry.algorithm))
    except Exception as error:  # noqa: BLE001 - whatever a backend does wrong, it is not chosen
        return replace(entry, out=f"check: {error}")


def _ready(entry: Entry, request: Request) -> Callable[[], object]:
    call = Workload(replace(request, batch=entry.batch)).call(entry.backend, entry.algorithm)
    call()
    return call


def timed(entries: Sequence[Entry], request: Request, update: Update = silently) -> list[Entry]:
    """The entries with their times; out where one call takes ``HOPELESS`` times as long as the fastest for an item."""
    calls = {number: _ready(entry, request) for number, entry in enumerate(entries)}
    first = {n: measure({"": call}, 1, 1)[""].median / entries[n].batch for n, call in calls.items()}
    fastest = min(first.values(), default=0.0)
    kept = {str(n): call for n, call in calls.items() if first[n] <= HOPELESS * fastest}
    kinds = {get_backend(entries[int(n)].backend).kind for n in kept}
    timings = measure(kept, update=update, rest=REST if len(kinds) > 1 else 0.0) if kept else {}
    return [
        replace(entry, timing=timings[str(n)])
        if str(n) in timings
        else replace(entry, out=f"takes {first[n] / fastest:.0f} times as long as the fastest")
        for n, entry in enumerate(entries)
    ]


def weighed(entry: Entry, request: Request, limit: int | None) -> Entry:
    """The entry with its measured peak; out where that and the parameters are more than ``limit``."""
    own = replace(request, batch=entry.batch)
    try:
        peak = peak_memory(Plan(request.operator, entry.backend, entry.algorithm), own)
    except CannotMeasure as error:
        return entry if limit is None else replace(entry, out=f"its memory can't be measured: {error}")
    except RuntimeError as error:
        return replace(entry, out=str(error))
    total = peak + request.operator.num_parameters * ITEM_BYTES[request.dtype]
    over = limit is not None and total > limit
    return replace(entry, peak=peak, out=f"takes {total:,} bytes of {limit:,}" if over else "")


def _batches(request: Request, objective: str) -> list[int]:
    """Throughput may be highest below the largest batch."""
    if objective != "throughput":
        return [request.batch]
    return sorted({request.batch, *(1 << n for n in range(request.batch.bit_length()))})


def _simplicity(entry: Entry) -> tuple[int, int]:
    known = SIMPLEST.index(entry.algorithm) if entry.algorithm in SIMPLEST else len(SIMPLEST)
    return known, entry.batch


def _best(entries: Sequence[Entry], objective: str) -> tuple[list[Entry], list[Entry]]:
    """The entries, best first, and those that can't be told from the best."""
    if objective == "memory":
        known = sorted((e for e in entries if e.peak is not None), key=lambda e: e.peak or 0)
        if not known:
            return list(entries), []
        least = known[0].peak or 0
        tied = [e for e in known if (e.peak or 0) <= max(SAME_MEMORY * least, least + 2**20)]
        return known + [e for e in entries if e.peak is None], tied
    by_name = {str(n): entry for n, entry in enumerate(entries)}
    per_item = {
        name: Timing(tuple(seconds / entry.batch for seconds in entry.timing.seconds))
        for name, entry in by_name.items()
        if entry.timing is not None
    }
    ordered = [by_name[name] for name in sorted(per_item, key=lambda name: per_item[name].median)]
    return ordered, [by_name[name] for name in contenders(per_item)] if per_item else []


def select(
    request: Request,
    check: Check,
    *,
    objective: str = "latency",
    backends: Sequence[str] = tuple(BACKENDS),
    limit: int | None = None,
    update: Update = silently,
) -> Selection:
    """Check, time and weigh every candidate for a request, and choose.

    Args:
        check: see :class:`translution.conformance.operator_check.OperatorCheck`; what it raises puts a candidate out.
        objective: ``latency``, the time of a batch; ``throughput``, the time of an item at any batch size up to the
            request's; ``memory``, the measured peak.
        backends: names, or ``package.module:attribute``.
        limit: bytes that a candidate may take at most, its parameters included.
    """
    every = candidates(request, backends, limit)
    runs = [entry for entry in every if not entry.out]
    passed: list[Entry] = []
    for number, entry in enumerate(runs):
        update("checking", number, len(runs))
        passed.append(checked(entry, check))
    update("checking", len(runs), len(runs))
    out = [entry for entry in (*every, *passed) if entry.out]
    right = [replace(e, batch=size) for e in passed if not e.out for size in _batches(request, objective)]
    heavy: list[Entry] = []
    for number, entry in enumerate(right):
        update("memory", number, len(right))
        heavy.append(weighed(entry, request, limit))
    update("memory", len(right), len(right))
    out += [entry for entry in heavy if entry.out]
    fast = timed([entry for entry in heavy if not entry.out], request, update)
    out += [entry for entry in fast if entry.out]
    left, tied = _best([entry for entry in fast if not entry.out], objective)
    chosen = min(tied, key=_simplicity, default=None)
    return Selection(request, objective, (*left, *out), tuple(tied), chosen)
