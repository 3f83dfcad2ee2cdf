"""Which far displacements share one class: exact, clipped, or log-bucketed (clause L7)."""

from dataclasses import dataclass

from translution.spec.checks import MAX_BUCKETS, MAX_STEPS, is_whole
from translution.spec.errors import require


@dataclass(frozen=True, slots=True)
class Clip:
    """Displacements farther than ``max_distance`` along an axis share the class at that distance."""

    max_distance: int

    def __post_init__(self) -> None:
        require(
            is_whole(self.max_distance) and 0 <= self.max_distance <= MAX_STEPS,
            "L7",
            f"Clip(max_distance={self.max_distance!r})",
            f"max_distance is a whole number of lattice steps from 0 to {MAX_STEPS:,}",
            "Give max_distance=0 for one class in all, or drop the clipping",
        )

    def label(self, displacement: int) -> int:
        """The representative of the class of one axis displacement."""
        return max(-self.max_distance, min(self.max_distance, displacement))


@dataclass(frozen=True, slots=True)
class LogBuckets:
    """Exact near classes, logarithmic far ones, as in T5 (Raffel et al. 2020, section 2.1).

    Per direction there are ``num_buckets`` classes. A distance n below ``num_buckets // 2`` (= e) has a class of its
    own; beyond, the class is ``e + floor((num_buckets - e) log(n / e) / log(max_distance / e))``, at most
    ``num_buckets - 1``. The label carries the sign of the displacement, so that +n and -n differ.
    T5's ``num_buckets`` counts both directions: T5's 32 is ``num_buckets=16`` here (32 if causal).
    """

    num_buckets: int
    max_distance: int

    def __post_init__(self) -> None:
        require(
            is_whole(self.num_buckets) and is_whole(self.max_distance) and 2 <= self.num_buckets <= MAX_BUCKETS,
            "L7",
            f"LogBuckets(num_buckets={self.num_buckets!r}, max_distance={self.max_distance!r})",
            f"num_buckets is a whole number per direction from 2 to {MAX_BUCKETS:,}, max_distance a whole number",
            "Give num_buckets=16, max_distance=128 for the buckets of T5",
        )
        require(
            self.num_buckets // 2 < self.max_distance <= MAX_STEPS,
            "L7",
            f"LogBuckets(num_buckets={self.num_buckets}, max_distance={self.max_distance})",
            "max_distance must exceed num_buckets // 2, where the logarithmic classes begin",
            f"Give max_distance from {self.num_buckets // 2 + 1} to {MAX_STEPS:,}",
        )

    def label(self, displacement: int) -> int:
        """The signed bucket of one axis displacement, in exact integer arithmetic."""
        distance = abs(displacement)
        exact = self.num_buckets // 2
        if distance < exact:
            return displacement
        far, low, high = self.num_buckets - exact, 0, self.num_buckets - 1 - exact
        # floor(far * log(n/e) / log(D/e)) >= t  <=>  n^far * e^t >= D^t * e^far, free of rounding.
        while low < high:
            t = (low + high + 1) // 2
            if distance**far * exact**t >= self.max_distance**t * exact**far:
                low = t
            else:
                high = t - 1
        bucket = exact + low
        return bucket if displacement > 0 else -bucket


FarClasses = Clip | LogBuckets
