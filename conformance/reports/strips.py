"""How much of each error bound is used, as SVG strips on a logarithmic axis with the limit at 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from translution.conformance.exam.report import Result
from translution.conformance.reports.markup import Html, join, tag
from translution.conformance.reports.summary import percent

# Decades right of the limit, so that its line does not stand at the edge.
MARGIN = 0.3
LOWEST = -8


@dataclass(frozen=True, slots=True)
class Axis:
    """log10 of a share from ``low`` to MARGIN; positions are per cent of the width."""

    low: int

    @classmethod
    def of(cls, results: Sequence[Result]) -> Axis:
        """The decades that the shares of these results need."""
        positive = [share for result in results for share in result.shares if share > 0]
        return cls(max(LOWEST, min(-2, math.floor(math.log10(min(positive, default=1.0))))))

    def at(self, share: float) -> str:
        """Where a share stands; 0 and what is too small are at the left edge."""
        place = math.log10(share) if share > 0 else self.low
        return f"{100 * (max(place, self.low) - self.low) / (MARGIN - self.low):.2f}%"

    def scale(self) -> Html:
        """The heading: decades and the limit in figures."""
        found = []
        for decade in range(self.low, 1):
            at, first = self.at(10.0**decade), decade == self.low
            label = "limit" if decade == 0 else f"{'0 to ' if first else ''}{100 * 10.0**decade:g}%"
            # Where there is little room, these are left out.
            kind = None if first or decade in (-2, 0) else "minor"
            found.append(tag("text", label, x=at, y="13", text_anchor="start" if first else "middle", class_=kind))
        return tag("svg", *found, class_="strip scale", aria_hidden="true")

    def strip(self, results: Sequence[Result]) -> Html:
        """Range, middle half and median of all shares, and a dot for the worst of each algorithm."""
        shares = sorted(share for result in results for share in result.shares)
        low, middle, high = quantiles(shares, n=4, method="inclusive") if len(shares) > 1 else shares * 3
        words = (
            f"{len(shares)} cases: median {percent(median(shares))}, middle half {percent(low)} to {percent(high)}, "
            f"worst {percent(shares[-1])}"
        )
        grid = [self._rule(10.0**decade, "limit" if decade == 0 else "grid") for decade in range(self.low, 1)]
        dots = [
            tag("circle", tag("title", f"{result.algorithm}: worst {percent(max(result.shares))}"),
                cx=self.at(max(result.shares)), cy="9", r="3.5", class_="worst")
            for result in results if result.shares
        ]  # fmt: skip
        return tag(
            "svg",
            tag("title", words),
            join(*grid),
            tag("line", x1=self.at(shares[0]), x2=self.at(shares[-1]), y1="9", y2="9", class_="range"),
            tag("line", x1=self.at(low), x2=self.at(high), y1="9", y2="9", class_="half"),
            tag("line", x1=self.at(middle), x2=self.at(middle), y1="3", y2="15", class_="median"),
            *dots,
            class_="strip",
            role="img",
            aria_label=words,
        )

    def _rule(self, share: float, kind: str) -> Html:
        return tag("line", x1=self.at(share), x2=self.at(share), y1="0", y2="100%", class_=kind)
