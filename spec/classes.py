"""Which far displacements share one class: exact, clipped, or log-bucketed (clause L7)."""

from dataclasses import dataclass

from translution.spec.errors import require


@dataclass(frozen=True, slots=True)
class Clip:
    """Displacements farther than ``max_distance`` along an axis share the class at that distance."""

    max_distance: int

    def __post_init__(self) -> None:
        require(
            isinstance(self.max_distance, int) and self.max_distance >= 0,
            "L7",
            f"Clip(max_distance={self.max_distance!r})",
            "max_distance is a whole number of lattice steps, at least 0",
            "Give max_distance=0 for one class in all, or drop the clipping",
        )

    def label(self, displacement: int) -> int:
        """The representative of the class of one axis displacement."""
        return max(-self.max_distance, min(self.max_distance, displacement))


@dataclass(frozen=True, slots=True)
class LogBuckets:
    """Exact near classes, logarithmic far ones, as in T5 (Raffel et al. 2020, section 2.1).

    Per direction there are ``num_buckets`` classes. A distance n below ``num_buckets // 2`` (= e) has a class of its own;
    beyond, the class is ``e + floor((num_buckets - e) log(n / e) / log(max_distance / e))``, at most
    ``num_buckets - 1``. The label carries the sign of the displacement, so that +n and -n differ.
    T5's ``num_buckets`` counts both directions: T5's 32 is ``num_buckets=16`` here (32 if causal).
    """

    num_buckets: int
    max_distance: int

    def __post_init__(self) -> None:
        require(
            isinstance(self.num_buckets, int) and isinstance(self.max_distance, int) and self.num_buckets >= 2,
            "L7",
            f"LogBuckets(num_buckets={self.num_buckets!r}, max_distance={self.max_distance!r})",
            "num_buckets is a whole number per direction, at least 2",
            "Give num_buckets=16, max_distance=128 for the buckets of T5",
        )
        require(
            self.max_distance > self.num_buckets // 2,
            "L7",
            f"LogBuckets(num_buckets={self.num_buckets}, max_distance={self.max_distance})",
            "max_distance must exceed num_buckets // 2, where the logarithmic classes begin",
            f"Give max_distance of at least {self.num_buckets // 2 + 1}",
        )

    def label(self, displacement: int) -> int:
        """The signed bucket of one axis displacement, in exact integer arithmetic."""
        distance = abs(displacement)
        exact = self.num_buckets // 2
        if distance < exact:
            return displacement
        far = self.num_buckets - exact
        bucket = exact
        # floor(far * log(n/e) / log(D/e)) >= t  <=>  n^far * e^t >= D^t * e^far, free of rounding.
        while bucket < self.num_buckets - 1:
            t = bucket - exact + 1
            if distance**far * exact**t < self.max_distance**t * exact**far:
                break
            bucket = bucket + 1
        return bucket if displacement > 0 else -bucket


FarClasses = Clip | LogBuckets
