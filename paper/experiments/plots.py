"""The experiments' plots as PNG: accuracy against how far a digit is moved, and the course of training."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from translution.paper.experiments.statistics import Estimate, estimate
from translution.paper.training.files import read_log, write_whole

COLOURS = ("#3b6fb6", "#7a5195", "#c8553d", "#3f8f5b", "#b58900", "#5a5a5a", "#17a2b8", "#d6589f", "#8c6d31", "#000000")
STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def _save(figure: Figure, path: Path) -> None:
    write_whole(path, lambda beside: figure.savefig(beside, format="png", dpi=120, metadata={"Software": None}))


def plot_distance(curves: Mapping[tuple[str, str], Mapping[int, Estimate]], path: Path) -> None:
    """One panel for each training; a band is the interval over seeds."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        colours = dict(zip(dict.fromkeys(model for model, _ in curves), cycle(COLOURS), strict=False))
        for axes, trained_on in zip(panels, ("static", "dynamic"), strict=True):
            for (model, trained), curve in curves.items():
                if trained == trained_on:
                    _line(axes, curve, model, colours[model])
            axes.set_title(f"trained on {trained_on} digits")
            axes.set_xlabel("pixels from the centre")
        panels[0].set_ylabel("accuracy, %")
        panels[1].legend(frameon=False)
        _save(figure, path)


def _line(axes: Any, curve: Mapping[int, Estimate], label: str, colour: str) -> None:
    places = sorted(curve)
    means = [curve[place].mean for place in places]
    axes.plot(places, means, marker="o", markersize=3, linewidth=1.2, label=label, color=colour)
    widths = [curve[place].half_width or 0.0 for place in places]
    low, high = ([m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def plot_training(logs: Mapping[str, list[Path]], evaluated: str, path: Path) -> None:
    """The loss of every tenth of training, and ``evaluated`` of the held-out data; means over the logs of a label."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (label, files), colour in zip(logs.items(), cycle(COLOURS), strict=False):
            read = [list(read_log(file)) for file in files]
            losses = [{line["step"]: line["loss"] for line in log if "loss" in line} for log in read]
            _line(left, {step: estimate(values) for step, values in _smoothed(losses).items()}, label, colour)
            held_out = [{line["step"]: line["evaluation"][evaluated] for line in log if "evaluation" in line}
                        for log in read]  # fmt: skip
            common = sorted(set.intersection(*(set(one) for one in held_out)))
            _line(right, {step: estimate([one[step] for one in held_out]) for step in common}, label, colour)
        left.set(xlabel="step", ylabel="loss")
        right.set(xlabel="step", ylabel=f"not trained on: {evaluated}")
        right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        _save(figure, path)


def _smoothed(losses: list[dict[int, float]]) -> dict[int, list[float]]:
    """Means over windows of a fortieth of the steps, for each log, by the last step of the window."""
    steps = sorted(set.intersection(*(set(one) for one in losses)))
    width = max(1, len(steps) // 40)
    windows = [steps[start : start + width] for start in range(0, len(steps), width)]
    return {window[-1]: [sum(one[step] for step in window) / len(window) for one in losses] for window in windows}
