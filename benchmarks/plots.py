"""The plots of docs/performance.md, as SVG that is the same for the same measurements."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from reading import SHARES, Data, medians, shares, time_exponent
from workload import FORWARD, TRAINING

LABELS = {FORWARD: "forward", TRAINING: "both"}
COLOURS = {FORWARD: "#3b6fb6", TRAINING: "#c8553d"}
STYLE: Any = {"svg.hashsalt": "translution", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False}  # fmt: skip


def _saved(figure: Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def plot_shares(family: Data, path: Path) -> None:
    """Bars: what ``stream`` reaches of the rate of its own products, with the range over the rounds."""
    found = [(group["name"], case) for group in family["groups"] for case in group["cases"] if "machine" in case]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 3.2), layout="constrained")
        axes = figure.subplots()
        for number, (which, label) in enumerate(SHARES.items()):
            values = [shares(case, which)[0] for _, case in found]
            places = [place + 0.27 * (number - 1) for place in range(len(found))]
            errors = [[100 * (v.middle - v.low) for v in values], [100 * (v.high - v.middle) for v in values]]
            axes.bar(places, [100 * v.middle for v in values], 0.25, yerr=errors, label=label, capsize=2,
                     color=("#3b6fb6", "#7fa7d9", "#c8553d")[number])  # fmt: skip
        axes.axhline(100, color="black", linewidth=0.8)
        axes.set_xticks(range(len(found)), [name for name, _ in found])
        axes.set_ylabel("% of the rate of its own products")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
        _saved(figure, path)


def plot_growth(family: Data, path: Path) -> None:
    """Logarithmic curves: medians of every pass and the straight line through them."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        panels: list[Axes] = list(figure.subplots(2, 3).flat)
        for axes, group in zip(panels, family["groups"], strict=True):
            values = [case["value"] for case in group["cases"]]
            for which, colour in COLOURS.items():
                times = medians(group["cases"], which)
                fitted = time_exponent(group["cases"], which).middle
                axes.loglog(values, [1e3 * t for t in times], "o", color=colour, markersize=4)
                # Least squares go through the mean of both logarithms.
                mid, level = _geometric(values), 1e3 * _geometric(times)
                axes.loglog(values, [level * (v / mid) ** fitted for v in values], color=colour, linewidth=1,
                            label=f"{LABELS[which]}: {fitted:.2f}")  # fmt: skip
            axes.set_title(group["name"], fontsize=9)
            axes.set_xlabel(group["variable"])
            axes.set_xticks(values, [f"{v:g}" for v in values], rotation=45 if max(values) > 1000 else 0)
            axes.minorticks_off()
            axes.legend(frameon=False, title="exponent", fontsize=8, title_fontsize=8)
        for axes in panels[::3]:
            axes.set_ylabel("ms")
        _saved(figure, path)


def _geometric(values: list[float]) -> float:
    product = 1.0
    for value in values:
        product *= value ** (1 / len(values))
    return product
