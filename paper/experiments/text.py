"""Language modelling (arXiv 2510.10060, section 5): what comes next, and how surprising held-out text is.

All models see the same windows of text in the same order for the same number of steps. Held-out files are read when the
models are evaluated and nothing is chosen by what comes out: the last figure counts.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from translution.paper.description import SIZES, Size
from translution.paper.experiments.budget import Budget
from translution.paper.experiments.models import DEFAULT_MODELS, MODELS, build, check_models, count_parameters
from translution.paper.experiments.runs import Run, described, run_all
from translution.paper.experiments.text_data import Corpus, load_corpus
from translution.paper.training import Part, TrainingError, generator, seed_of, train
from translution.progress import Update, silently

EVALUATION_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale(Budget):
    """Models and budget of the experiment; ``length`` tokens of a window."""

    length: int
    held_out_windows: int = 512


SCALES = {
    "small": Scale(
        size=Size(dim=64, depth=2, num_heads=2, head_dim=32, mlp_dim=256),
        rank=8,
        length=64,
        steps=600,
        batch_size=32,
        learning_rate=2e-3,
        warmup_steps=60,
    ),
    "paper": Scale(
        size=SIZES["tiny"],
        rank=8,
        length=160,
        steps=100_000,
        batch_size=8,
        learning_rate=3e-4,
        warmup_steps=2000,
        held_out_windows=4096,
    ),
}


class TextTask:
    """Predicting every token of a window from those before it."""

    def __init__(self, corpus: Corpus, scale: Scale, seed: int) -> None:
        for name, tokens in (("train", corpus.train), ("held-out", corpus.held_out)):
            if len(tokens) <= scale.length:
                raise TrainingError(
                    f"{len(tokens)} {name} tokens with length={scale.length}",
                    "there are more tokens than one window takes",
                    "Give more text, or a shorter length",
                )
        self.corpus, self.scale, self.seed = corpus, scale, seed
        places = len(corpus.held_out) - scale.length
        count = min(scale.held_out_windows, -(-places // scale.length))
        self.held_out = torch.linspace(0, places - 1, count, dtype=torch.float64).long()

    def batch(self, step: int, part: Part) -> list[Tensor]:
        """Tokens and those that come next, int64 [b, length] each; windows are drawn anew in every step."""
        size, places = self.scale.batch_size, len(self.corpus.train) - self.scale.length
        starts = torch.randint(places, (size,), generator=generator("window", self.seed, step))
        return self._windows(self.corpus.train, starts[part.of(size)])

    def _windows(self, tokens: Any, starts: Tensor) -> list[Tensor]:
        length = self.scale.length
        rows = np.stack([tokens[start : start + length + 1] for start in starts.tolist()]).astype(np.int64)
        if int(rows.max()) >= self.corpus.vocabulary_size:
            raise TrainingError(
                f"token {int(rows.max())}",
                f"tokens are below {self.corpus.vocabulary_size}, the vocabulary of GPT-2",
                "Prepare the files with GPT-2's tokens",
            )
        found = torch.from_numpy(rows)
        return [found[:, :-1], found[:, 1:]]

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        """Cross-entropy in nats, over all places of all windows."""
        return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    def evaluate(self, model: nn.Module, part: Part) -> dict[str, tuple[float, float]]:
        """Nats per token of held-out windows, which lie evenly over the held-out text."""
        device = next(model.parameters()).device
        total = count = 0.0
        for numbers, weight in part.batches(len(self.held_out), EVALUATION_BATCH):
            tokens, targets = (t.to(device) for t in self._windows(self.corpus.held_out, self.held_out[numbers]))
            losses = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none")
            total += float((losses.double().cpu().reshape(len(numbers), -1).mean(1) * weight).sum())
            count += float(weight.sum())
        return {"nats": (total, count)}


def model_fields(scale: Scale, vocabulary_size: int) -> dict[str, Any]:
    """What a description of a model is made of, beside its kind."""
    return {
        "family": "gpt", "size": scale.size, "rank": scale.rank, "length": scale.length,
        "vocabulary_size": vocabulary_size,
    }  # fmt: skip


def work(data: Path | None, device: str, about: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One run from its JSON object."""
    scale = Scale.from_data(about["scale"])
    corpus, seed = load_corpus(data), about["seed"]
    torch.manual_seed(seed_of("text", about["model"], seed))
    model = build(about["model"], **model_fields(scale, corpus.vocabulary_size))
    trained = train(TextTask(corpus, scale, seed), model, scale.training(seed, device), folder, about=about)
    nats = trained.evaluation["nats"]
    return {
        "parameters": count_parameters(model),
        "nats": nats,
        "perplexity": math.exp(nats),
        "seconds": trained.seconds,
        "processor_seconds": trained.processor_seconds,
    }


def run_text(
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
    check_models(models, tuple(MODELS))
    about = load_corpus(data).about
    shared = {"experiment": "text", "steps": scale.steps, "scale": asdict(scale), "data": about, "device": device}
    runs = [
        Run(f"{model} seed {seed}", {**shared, "model": model, "seed": seed})
        for seed in range(first_seed, first_seed + seeds)
        for model in models
    ]
    results = run_all(partial(work, data, device), runs, root, jobs=jobs, update=update)
    return {
        "experiment": "text",
        "scale": dataclasses.asdict(scale),
        "data": about,
        "seeds": seeds,
        "device": device,
        "jobs": jobs,
        "models": list(models),
        "runs": described(runs, results, root, ("model", "seed")),
    }
