"""Choose the questions of translution.conformance.mutants.diagnosis: print NUMBERS, few that show every mutant.

Greedily, from the first ``--pool`` numbers: each mutant shall be shown ``--times`` times, where so many show it. What
the coarsest dtype allows counts as not shown, where any question shows more.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from translution.conformance.exam.subject import LiveSubject
from translution.conformance.mutants.diagnosis import candidates, drawn


def shown_by(pool: int, dtype: str, names: Iterable[str]) -> dict[int, set[str]]:
    """The mutants that each number shows: beyond what the dtype allows."""
    backends = {name: candidates()[name].backend for name in names}
    subjects = {name: LiveSubject(backend, backend.algorithms[0], "float64") for name, backend in backends.items()}
    return {
        probe.number: {name for name, subject in subjects.items() if not probe.is_right(probe.parts(subject))}
        for probe in drawn(dtype, dtype, range(pool))
    }


def choose(shown: Mapping[int, set[str]], times: int) -> list[int]:
    """Numbers, each the one that shows the most mutants that still need to be shown."""
    every: Counter[str] = Counter(name for names in shown.values() for name in names)
    needed = {name: min(times, count) for name, count in every.items()}
    left, chosen = dict(shown), list[int]()
    while any(needed.values()):
        # What few numbers show weighs more.
        best = max(left, key=lambda number: sum(needed[name] / every[name] for name in left[number]))
        chosen.append(best)
        for name in left.pop(best):
            needed[name] = max(needed[name] - 1, 0)
    return sorted(chosen)


def main() -> None:
    """Print the numbers, and the mutants that none of the pool shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=int, default=240)
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shown = shown_by(given.pool, "bfloat16", candidates())
    small = candidates().keys() - set().union(*shown.values())
    for number, names in shown_by(given.pool, "float64", small).items():
        shown.setdefault(number, set()).update(names)
    chosen = choose(shown, given.times)
    print(f"NUMBERS = {tuple(chosen)}  # {len(chosen)}")
    print("shown by none:", ", ".join(sorted(candidates().keys() - set().union(*shown.values()))))


if __name__ == "__main__":
    main()
