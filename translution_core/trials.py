"""Timing computations against one another: interleaved rounds, medians with intervals, and who is faster for certain.

Times of one machine drift, so only those of the same round are compared. An interval of a median is given by two order
statistics, which assumes nothing of how times are distributed: of n rounds the k-th smallest and the k-th largest hold
the median between them with probability 1 - 2 P(Binomial(n, 1/2) < k).
"""

import math
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from translution.progress import Update, silently

CONFIDENCE = 0.95
ROUNDS = 9
MORE_ROUNDS = 27
# Medians that are further apart than this are no tie.
CLOSE = 1.10
# Wall times below a few milliseconds snap to steps of the scheduler.
LEAST_SECONDS = 0.02
# NumPy's threads look for work this long after a product, on the cores where those of torch are to run.
REST = 0.1
# A longer call does not notice them.
LONG_SECONDS = 1.0


def interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median with at least ``CONFIDENCE``; all values where they are too few for that."""
    ordered, count = sorted(values), len(values)
    tail, k = 0.0, 0
    while k < count // 2:
        tail += math.comb(count, k) / 2**count
        if 2 * tail > 1 - CONFIDENCE:
            break
        k += 1
    cut = max(k - 1, 0)
    return ordered[cut], ordered[count - 1 - cut]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds for one call, one figure for every round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of all rounds."""
        return median(self.seconds)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the median lies with ``CONFIDENCE``."""
        return interval(self.seconds)

    def ratio(self, other: "Timing") -> tuple[float, float, float]:
        """How many times as long as ``other``, round by round: median and interval."""
        ratios = [own / its for own, its in zip(self.seconds, other.seconds, strict=True)]
        return median(ratios), *interval(ratios)


def _once(call: Callable[[], object]) -> float:
    """Seconds of a call; the first one is not counted."""
    call()
    return max(timeit.Timer(call).timeit(1), 1e-9)


def measure(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = ROUNDS,
    most: int = MORE_ROUNDS,
    update: Update = silently,
    *,
    rest: float = 0.0,
) -> dict[str, Timing]:
    """Time every call in interleaved rounds, forwards and backwards in turn.

    After ``rounds`` it goes on, up to ``most``, for as long as the two fastest can't be told apart.

    Args:
        rest: seconds before each turn in which the threads of the one before come to rest, and a call that is not
            counted wakes its own. ``REST`` where calls have threads of different libraries.
    """
    once = {name: _once(call) for name, call in calls.items()}
    counts = {name: math.ceil(LEAST_SECONDS / seconds) for name, seconds in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    done = 0
    while done < rounds or (done < most and not _told_apart(samples)):
        for name in sorted(calls, key=list(calls).index, reverse=done % 2 == 1):
            if rest and once[name] < LONG_SECONDS:
                time.sleep(rest)
                calls[name]()
            samples[name].append(timeit.Timer(calls[name]).timeit(counts[name]) / counts[name])
        done += 1
        update("timing", min(done, rounds), rounds)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _told_apart(samples: Mapping[str, Sequence[float]]) -> bool:
    first, *others = sorted((Timing(tuple(values)) for values in samples.values()), key=lambda found: found.median)
    return not others or others[0].ratio(first)[1] > 1


def contenders(timings: Mapping[str, Timing]) -> list[str]:
    """The fastest, and all that are not slower than it for certain nor by more than ``CLOSE``; fastest first.

    Without the second, everything would be a tie on a machine that is noisy enough.
    """
    ordered = sorted(timings, key=lambda name: timings[name].median)
    best, found = timings[ordered[0]], ordered[:1]
    for name in ordered[1:]:
        middle, low, _ = timings[name].ratio(best)
        if low <= 1 and middle <= CLOSE:
            found.append(name)
    return found
