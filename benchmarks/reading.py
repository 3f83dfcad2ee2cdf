"""What the measurements in performance.json mean: ratios round by round, shares of the machine's rates, exponents."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from scipy import stats
from workload import BACKWARD, FORWARD, TRAINING

Data = Mapping[str, Any]
ONEDNN = "large product of oneDNN"
SHARES = {FORWARD: "forward", BACKWARD: "backward, operations executed", TRAINING: "both, useful operations"}


@dataclass(frozen=True)
class Spread:
    """A median with the range over all rounds, or an estimate with its interval."""

    middle: float
    low: float
    high: float

    def shown(self, digits: int = 1, factor: float = 1.0) -> str:
        """In print."""
        middle, low, high = (f"{factor * value:,.{digits}f}" for value in (self.middle, self.low, self.high))
        return middle if low == middle == high else f"{middle} ({low} to {high})"


def spread(values: Sequence[float]) -> Spread:
    """Of one value for each round."""
    return Spread(median(values), min(values), max(values))


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def cases(data: Data, family: str, group: str) -> list[Data]:
    """The cases of a group. KeyError where it was not measured."""
    (found,) = (one for one in data[family]["groups"] if one["name"] == group) if family in data else (None,)
    if found is None:
        raise KeyError(f"{family} was not measured")
    every: list[Data] = found["cases"]
    return every


def seconds(case: Data, which: str, candidate: str = "torch stream") -> list[float]:
    """One for each round."""
    found: list[float] = case["passes"][which]["seconds"][candidate]
    return found


def shares(case: Data, which: str) -> tuple[Spread, Spread, Spread | None]:
    """What ``stream`` reaches of the rate of its own bare products, of that of one large product, and of that of one by
    oneDNN where torch has it.

    Forward counts one product for each link; forward and backward three, which no algorithm can do without; backward
    alone what is executed, encoding again included, each priced at the rate of the products that it is.
    """
    machine, taken = case["machine"], seconds(case, which)
    forward, gradient = machine["seconds"]["products"], machine["seconds"]["gradient products"]
    useful, executed = case["useful_flops"], case["passes"][which]["executed_flops"]
    again = executed / useful - 2
    counted = {FORWARD: useful, BACKWARD: executed, TRAINING: 3 * useful}[which]
    bare = [
        {FORWARD: f, BACKWARD: g + again * f, TRAINING: f + g}[which] for f, g in zip(forward, gradient, strict=True)
    ]

    def large(name: str) -> Spread:
        rate = [counted * one / machine["large_product_flops"] for one in machine["seconds"][name]]
        return ratio(rate, taken)

    fastest = large(ONEDNN) if ONEDNN in machine["seconds"] else None
    return ratio(bare, taken), large("large product"), fastest


def table_share(case: Data) -> Spread:
    """What reading every table once would take of a forward pass, at the higher of two rates: summing, copying."""
    machine = case["machine"]["seconds"]
    # A copy reads and writes.
    once = [min(read, copy / 2) for read, copy in zip(machine["tables read"], machine["tables copied"], strict=True)]
    return ratio(once, seconds(case, FORWARD))


def exponent(values: Sequence[float], results: Sequence[float]) -> Spread:
    """The slope of a straight line through both logarithms, by least squares, with its 95% interval (Student's t)."""
    line = stats.linregress([math.log(v) for v in values], [math.log(r) for r in results])
    margin = float(stats.t.ppf(0.975, len(values) - 2)) * line.stderr
    return Spread(float(line.slope), float(line.slope - margin), float(line.slope + margin))


def medians(curve: Sequence[Data], which: str) -> list[float]:
    """Median seconds at every value of a growth curve."""
    return [median(seconds(case, which)) for case in curve]


def time_exponent(curve: Sequence[Data], which: str) -> Spread:
    """How the median time grows."""
    return exponent([case["value"] for case in curve], medians(curve, which))


def operations_exponent(curve: Sequence[Data], which: str) -> Spread:
    """How the operations of ``translution.algorithms.cost`` grow, fitted in the same way."""
    return exponent([case["value"] for case in curve], [case["passes"][which]["estimated_flops"] for case in curve])


def last_exponent(curve: Sequence[Data], which: str) -> float:
    """Between the two largest values alone, where what a call costs in itself counts least."""
    (_, first), (_, second) = sorted(zip([c["value"] for c in curve], medians(curve, which), strict=True))[-2:]
    small, large = sorted(case["value"] for case in curve)[-2:]
    return math.log(second / first) / math.log(large / small)
