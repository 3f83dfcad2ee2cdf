"""From the runs of an experiment to its table: a mean over seeds with its interval, beside the paper's figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from translution.paper.experiments.statistics import Estimate, difference, estimate

BASELINE = "attention"
# Trained on, tested on -> model -> accuracy in percent, of 84 x 84 images and the tiny model (table 2 of the paper).
PAPER_DIGITS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("static", "static"): {"attention": 98.48, "alpha": 98.48, "translution": 98.60},
    ("dynamic", "dynamic"): {"attention": 92.64, "alpha": 97.31, "translution": 97.35},
    ("static", "dynamic"): {"attention": 18.18, "alpha": 34.90, "translution": 36.40},
}
# Perplexity by GPT-2's tokens on OpenWebText, tiny, length 160.
PAPER_TEXT: Mapping[str, float] = {"attention": 60.40, "alpha": 57.97, "translution": 56.26}
# Top-1 and top-5 of ViT-A/56 on ImageNet-1K, in percent.
PAPER_IMAGES: Mapping[str, tuple[float, float]] = {
    "none": (42.49, 67.39),
    "attention": (46.28, 71.17),
    "swin": (46.36, 71.31),
    "rope": (46.65, 71.51),
    "alpha": (48.36, 73.31),
    "translution": (52.41, 76.50),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a model: what we measured, its difference to attention seed by seed, what the paper has."""

    name: str
    measured: Estimate
    beyond_attention: Estimate | None
    paper: float | None

    def as_json(self) -> dict[str, Any]:
        """The same as data."""
        beyond = self.beyond_attention
        return {
            "name": self.name,
            "measured": self.measured.as_json(),
            "beyond_attention": None if beyond is None else beyond.as_json(),
            "paper": self.paper,
        }


@dataclass(frozen=True, slots=True)
class Row:
    """A model's figures over its seeds; ``seconds`` of a processor is what one of its trainings took on average."""

    model: str
    parameters: int
    figures: tuple[Figure, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The same as data."""
        figures = [figure.as_json() for figure in self.figures]
        return {"model": self.model, "parameters": self.parameters, "figures": figures, "seconds": self.seconds}


def _row(
    model: str, runs: Sequence[Mapping[str, Any]], values: Mapping[str, Mapping[str, list[float]]], paper: Any
) -> Row:
    """``values`` holds every model's, by figure; ``paper`` gives the paper's figure of a name, or None."""
    own = [run for run in runs if run["model"] == model]
    figures = []
    for name, by_model in values.items():
        compared = BASELINE in by_model and model != BASELINE
        beyond = difference(by_model[model], by_model[BASELINE]) if compared else None
        figures.append(Figure(name, estimate(by_model[model]), beyond, paper(name)))
    seconds = sum(run["processor_seconds"] for run in own) / len(own)
    return Row(model, own[0]["parameters"], tuple(figures), seconds)


def digit_rows(data: Mapping[str, Any]) -> list[Row]:
    """Accuracy in percent: trained static and tested static, dynamic on dynamic, static on dynamic."""
    values = {
        f"{trained} to {tested}": {
            model: [
                100 * run["test"][tested]
                for run in data["runs"]
                if (run["model"], run["trained_on"]) == (model, trained)
            ]
            for model in data["models"]
        }
        for trained, tested in PAPER_DIGITS
    }
    printed = {f"{trained} to {tested}": found for (trained, tested), found in PAPER_DIGITS.items()}
    return [_row(model, data["runs"], values, lambda name, m=model: printed[name].get(m)) for model in data["models"]]


def text_rows(data: Mapping[str, Any]) -> list[Row]:
    """Perplexity of held-out text; the paper's is by other tokens on other text."""
    values = {
        "perplexity": {
            model: [run["perplexity"] for run in data["runs"] if run["model"] == model] for model in data["models"]
        }
    }
    return [_row(model, data["runs"], values, lambda _, m=model: PAPER_TEXT.get(m)) for model in data["models"]]


def image_rows(data: Mapping[str, Any]) -> list[Row]:
    """Top-1 and top-5 accuracy in percent."""
    names = ("top1", "top5")
    values = {
        name: {model: [100 * run[name] for run in data["runs"] if run["model"] == model] for model in data["models"]}
        for name in names
    }
    printed = {model: dict(zip(names, found, strict=True)) for model, found in PAPER_IMAGES.items()}
    return [
        _row(model, data["runs"], values, lambda name, m=model: printed.get(m, {}).get(name))
        for model in data["models"]
    ]


def distance_curves(data: Mapping[str, Any]) -> dict[tuple[str, str], dict[int, Estimate]]:
    """(Model, trained on) -> pixels from the centre -> accuracy in percent, over seeds."""
    found: dict[tuple[str, str], dict[int, Estimate]] = {}
    for model in data["models"]:
        for trained_on in ("static", "dynamic"):
            own = [run for run in data["runs"] if (run["model"], run["trained_on"]) == (model, trained_on)]
            curves = [run["test"]["distance"] for run in own]
            found[model, trained_on] = {
                int(distance): estimate([100 * curve[distance] for curve in curves]) for distance in curves[0]
            }
    return found
