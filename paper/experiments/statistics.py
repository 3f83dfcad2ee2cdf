"""What several seeds say: a mean with its interval, and differences taken seed by seed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds; ``half_width`` of its interval by Student's t, None for one seed alone."""

    mean: float
    half_width: float | None
    values: tuple[float, ...]

    @property
    def is_apart_from_zero(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.half_width is not None and abs(self.mean) > self.half_width

    def shown(self, factor: float = 1.0, digits: int = 1, sign: bool = False) -> str:
        """As text, e.g. ``36.4 ± 1.2``."""
        mean = f"{factor * self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half_width is None else f"{mean} ± {factor * self.half_width:.{digits}f}"

    def as_json(self) -> dict[str, Any]:
        """Mean, half width of the interval and what every seed gave."""
        return {"mean": self.mean, "half_width": self.half_width, "values": list(self.values)}


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of ``values`` with the 95% interval of a normal sample, its spread unknown: mean ± t s / sqrt(n)."""
    count = len(values)
    if count == 1:
        return Estimate(values[0], None, tuple(values))
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Estimate(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(count), tuple(values))


def difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Of two models, seed by seed: the same seed means the same data in the same order."""
    return estimate([one - other for one, other in zip(values, baseline, strict=True)])
