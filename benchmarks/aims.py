"""What is aimed at, and whether it was reached: judged by the median, on the measurements alone."""

from collections.abc import Callable
from dataclasses import dataclass

from families import LARGE_WINDOW
from reading import Data, Spread, cases, ratio, seconds, shares, time_exponent
from workload import BACKWARD, FORWARD, TRAINING

BOTH = (FORWARD, TRAINING)


@dataclass(frozen=True)
class Aim:
    """A bound on a figure. ``factor`` and ``digits`` are for print alone."""

    text: str
    measured: Callable[[Data], Spread]
    least: float | None = None
    most: float | None = None
    digits: int = 1
    factor: float = 1.0
    unit: str = ""

    def reached(self, found: Spread) -> bool:
        """Whether the median keeps the bounds."""
        return (self.least is None or found.middle >= self.least) and (self.most is None or found.middle <= self.most)

    @property
    def bounds(self) -> str:
        """In print."""
        told = [
            f"{word} {bound * self.factor:,g}{self.unit}"
            for word, bound in (("at least", self.least), ("at most", self.most))
            if bound is not None
        ]
        return ", ".join(told)


def _against(family: str, group: str, baseline: str, which: str) -> Callable[[Data], Spread]:
    """How many times as long the baseline takes, within one case."""

    def measured(data: Data) -> Spread:
        (case,) = cases(data, family, group)
        return ratio(seconds(case, which, baseline), seconds(case, which))

    return measured


def _beside(family: str, group: str, other: str, which: str) -> Callable[[Data], Spread]:
    """The time of a group's first case as a multiple of its second's."""

    def measured(data: Data) -> Spread:
        first, second = cases(data, family, group)
        return ratio(seconds(first, which), seconds(second, which, other))

    return measured


def _share(group: str, which: str, kind: int) -> Callable[[Data], Spread]:
    return lambda data: shares(cases(data, "translution", group)[0], which)[kind]


def _exponent(group: str, which: str) -> Callable[[Data], Spread]:
    return lambda data: time_exponent(cases(data, "growth", group), which)


def _peak(spec: str, which: str) -> Callable[[Data], Spread]:
    def measured(data: Data) -> Spread:
        rows = data["memory"]["peaks"]
        (found,) = (row["peak_bytes"] for row in rows if row["spec"] == spec and row["which"] == which)
        return Spread(found, found, found)

    return measured


_FASTER, _TIMES = "times as fast as the authors' algorithm", "times the time of"
_KINDS = ("of its own products' rate", "of one large product's rate")
AIMS: tuple[Aim, ...] = (
    *(
        Aim(
            f"Translution 7x7 + 1, batch 4, {which}: {_FASTER}",
            _against("translution", "against the authors' algorithm", "authors", which),
            least=least,
            digits=0,
        )
        for which, least in ((FORWARD, 100), (TRAINING, 60))
    ),
    *(
        Aim(
            f"Translution {size}, {text}: {kind}",
            _share(size, which, number),
            least=least,
            digits=0,
            factor=100,
            unit="%",
        )
        for size in ("7x7 + 1, batch 32", "14x14 + 1, batch 16")
        for which, text, least in (
            (FORWARD, "forward", 0.85),
            (BACKWARD, "backward, operations executed", 0.80),
            (TRAINING, "forward and backward, useful operations", 0.65),
        )
        for number, kind in enumerate(_KINDS)
    ),
    *(
        Aim(
            f"Translution 7x7 + 1, batch 1, forward: {kind}",
            _share("7x7 + 1, batch 1", FORWARD, number),
            least=0.40,
            digits=0,
            factor=100,
            unit="%",
        )
        for number, kind in enumerate(_KINDS)
    ),
    *(
        Aim(f"{text}, {which}", _beside("sparse", group, "torch stream", which), most=most, digits=2)
        for group, text, most in (
            ("causal order", f"causal, length 160, batch 8, {_TIMES} the non-causal", 0.6),
            ("window", f"window of radius 2 on 14x14, batch 8, {_TIMES} the full one", 0.25),
        )
        for which in BOTH
    ),
    *(
        Aim(
            f"alpha {size}, {_TIMES} SDPA with projections, {TRAINING}",
            _beside("alpha", f"against attention, {size}", "SDPA", TRAINING),
            most=most,
        )
        for size, most in (("7x7 + 1, batch 32", 5), ("14x14 + 1, batch 8", 8))
    ),
    *(
        Aim(
            f"alpha {size}, {which}: {_FASTER}",
            _against("alpha", f"against the authors' algorithm, {size}", "authors' alpha", which),
            least=least,
        )
        for size, least in (("14x14 + 1, batch 4", 20), ("7x7 + 1, batch 8", 6))
        for which in BOTH
    ),
    *(Aim(f"time over N, {which}: exponent", _exponent("tokens", which), 1.9, 2.1, 2) for which in BOTH),
    *(
        Aim(
            f"time over N with a window of 7x7, {which}: exponent",
            _exponent("tokens, window of 7x7", which),
            None,
            1.1,
            2,
        )
        for which in BOTH
    ),
    *(
        Aim(
            f"64x64 grid, window of 7x7, 64 channels, {which}: peak memory",
            _peak(LARGE_WINDOW, which),
            most=1e9,
            digits=0,
            factor=1e-6,
            unit=" MB",
        )
        for which in BOTH
    ),
)


def judged(data: Data) -> list[tuple[Aim, Spread | None]]:
    """Every aim with what was measured; None where its family was not."""
    found: list[tuple[Aim, Spread | None]] = []
    for aim in AIMS:
        try:
            found.append((aim, aim.measured(data)))
        except KeyError:
            found.append((aim, None))
    return found
