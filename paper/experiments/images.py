"""ImageNet's recipe (arXiv 2510.10060, section 5) on a folder of images: augmentation, MixUp, CutMix, soft targets."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor, nn

from translution.paper.description import SIZES, Size
from translution.paper.experiments.image_folder import ImageFolder, open_image, read_pair
from translution.paper.experiments.image_transforms import (
    as_tensor,
    centre_crop,
    mixed,
    numpy_generator,
    rand_augment,
    random_resized_crop,
    soft_targets,
)
from translution.paper.experiments.models import DEFAULT_MODELS, build, check_models, count_parameters
from translution.paper.experiments.runs import Run, described, run_all
from translution.paper.training import Part, Settings, TrainingError, seed_of, train
from translution.paper.training.distribution import this_part
from translution.paper.training.seeds import samples_of_step
from translution.paper.training.settings import Parallel, Precision
from translution.progress import Update, silently

EVALUATION_BATCH = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The paper's for ImageNet-1K: ViT-A/56, AdamW, 300 epochs, batch 256, a cosine to zero."""

    size: Size = SIZES["tiny"]
    rank: int = 8
    image_size: int = 224
    patch_size: int = 56
    epochs: int = 300
    batch_size: int = 256
    learning_rate: float = 3e-4
    warmup_epochs: int = 5
    weight_decay: float = 0.05
    gradient_clip: float = 1.0
    smoothing: float = 0.1
    precision: Precision = "float32"
    parallel: Parallel = "data"
    # Attention with rotary or other relative encodings keeps its position embedding, as the paper's RoFormer does.
    position_embedding_beside: tuple[str, ...] = ("rope", "swin", "shaw", "convit")

    def training(self, samples: int, seed: int, device: str) -> Settings:
        """Of one run over so many training images."""
        per_epoch = max(1, samples // self.batch_size)
        steps = self.epochs * per_epoch
        return Settings(
            steps=steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=min(self.warmup_epochs * per_epoch, steps // 2),
            weight_decay=self.weight_decay,
            gradient_clip=self.gradient_clip,
            precision=self.precision,
            parallel=self.parallel,
            seed=seed,
            evaluate_every=per_epoch * 10,
            checkpoint_every=min(per_epoch, 1000),
            device=device,
        )


class ImageTask:
    """Classifying images; every batch is read by ``readers`` threads while the one before is computed."""

    def __init__(self, train: ImageFolder, held_out: ImageFolder, recipe: Recipe, seed: int, readers: int = 8) -> None:
        if recipe.batch_size % 2:
            raise TrainingError(
                f"batch_size={recipe.batch_size}", "images are mixed in pairs", "Give an even batch size"
            )
        self.train, self.held_out, self.recipe, self.seed = train, held_out, recipe, seed
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="images")
        self._next: tuple[tuple[int, Part], list[Future[Tensor]]] | None = None

    def batch(self, step: int, part: Part) -> list[Tensor]:
        """Images [b, 3, height, width] and soft targets [b, classes], mixed in pairs."""
        size = self.recipe.batch_size
        own = part.of(size)
        if (own.stop - own.start) % 2:
            raise TrainingError(
                f"batch_size={size} on {part.size} processes",
                "images are mixed in pairs within a process",
                "Give a batch size that is a multiple of twice the number of processes",
            )
        waited_for = self._next[1] if self._next is not None and self._next[0] == (step, part) else None
        futures = self._ask(step, part) if waited_for is None else waited_for
        self._next = (step + 1, part), self._ask(step + 1, part)
        images = torch.stack([future.result() for future in futures])
        _, samples = samples_of_step(len(self.train), size, self.seed, step)
        labels = torch.tensor([self.train.labels[n] for n in samples[own].tolist()])
        targets = soft_targets(labels, len(self.train.classes), self.recipe.smoothing)
        return list(mixed(images, targets, numpy_generator("mix", self.seed, step)))

    def _ask(self, step: int, part: Part) -> list[Future[Tensor]]:
        own = part.of(self.recipe.batch_size)
        _, samples = samples_of_step(len(self.train), self.recipe.batch_size, self.seed, step)
        places = range(own.start, own.stop)
        return [
            self._readers.submit(self._augmented, sample, step, place)
            for sample, place in zip(samples[own].tolist(), places, strict=True)
        ]

    def _augmented(self, sample: int, step: int, place: int) -> Tensor:
        draw = numpy_generator("augment", self.seed, step, place)
        image = random_resized_crop(open_image(self.train.paths[sample]), self.recipe.image_size, draw)
        if draw.random() < 0.5:
            image = ImageOps.mirror(image)
        return as_tensor(rand_augment(image, draw))

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        """Cross-entropy with the soft targets."""
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module, part: Part) -> dict[str, tuple[float, float]]:
        """How often the label is the first, and among the first five."""
        device = next(model.parameters()).device
        first = among = count = 0.0
        for numbers, weight in part.batches(len(self.held_out), EVALUATION_BATCH):
            images = torch.stack(list(self._readers.map(self._held_out, numbers.tolist())))
            labels = torch.tensor([self.held_out.labels[n] for n in numbers.tolist()])
            best = model(images.to(device)).topk(min(5, len(self.held_out.classes)), dim=1).indices.cpu()
            hits = best == labels[:, None]
            first += float((weight * hits[:, 0]).sum())
            among += float((weight * hits.any(1)).sum())
            count += float(weight.sum())
        return {"top1": (first, count), "top5": (among, count)}

    def _held_out(self, sample: int) -> Tensor:
        return as_tensor(centre_crop(open_image(self.held_out.paths[sample]), self.recipe.image_size))

    def close(self) -> None:
        """End the readers."""
        self._readers.shutdown(cancel_futures=True)


def model_fields(name: str, recipe: Recipe, num_classes: int) -> dict[str, Any]:
    """What a description of a model is made of, beside its kind."""
    return {
        "family": "vit", "size": recipe.size, "rank": recipe.rank, "image_size": recipe.image_size,
        "patch_size": recipe.patch_size, "channels": 3, "num_classes": num_classes,
        "position_embedding": name in recipe.position_embedding_beside,
    }  # fmt: skip


def work(data: Path, device: str, about: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One run from its JSON object."""
    given = about["recipe"]
    beside = tuple(given["position_embedding_beside"])
    recipe = Recipe(**{**given, "size": Size(**given["size"]), "position_embedding_beside": beside})
    training, held_out = read_pair(data)
    torch.manual_seed(seed_of("images", about["model"], about["seed"]))
    model = build(about["model"], **model_fields(about["model"], recipe, len(training.classes)))
    task = ImageTask(training, held_out, recipe, about["seed"])
    try:
        trained = train(task, model, recipe.training(len(training), about["seed"], device), folder, about=about)
    finally:
        task.close()
    return {
        "parameters": count_parameters(model),
        **trained.evaluation,
        "seconds": trained.seconds,
        "processor_seconds": trained.processor_seconds,
    }


def run_images(
    recipe: Recipe,
    root: Path,
    data: Path,
    *,
    models: Sequence[str] = DEFAULT_MODELS,
    seeds: int = 1,
    first_seed: int = 0,
    device: str = "cpu",
    jobs: int = 1,
    update: Update = silently,
) -> dict[str, Any]:
    """All runs, or those that are missing in ``root``; every setting and every result as JSON data.

    The seeds are ``seeds`` numbers from ``first_seed`` on.

    Raises:
        TrainingError: the folder has no images, or one of them can't be read.
    """
    check_models(models)
    training, held_out = read_pair(data)
    steps = recipe.training(len(training), 0, device).steps
    source = {
        "images": {"train": len(training), "held_out": len(held_out)},
        "classes": len(training.classes),
        "sha256_of_the_names": [training.digest(), held_out.digest()],
    }
    shared = {
        "experiment": "images", "steps": steps, "recipe": asdict(recipe), "data": source, "device": device,
        "processes": this_part().size,
    }  # fmt: skip
    runs = [
        Run(f"{model} seed {seed}", {**shared, "model": model, "seed": seed})
        for seed in range(first_seed, first_seed + seeds)
        for model in models
    ]
    results = run_all(partial(work, data, device), runs, root, jobs=jobs, update=update)
    return {
        "experiment": "images",
        "recipe": dataclasses.asdict(recipe),
        "data": source,
        "seeds": seeds,
        "device": device,
        "models": list(models),
        "runs": described(runs, results, root, ("model", "seed")),
    }
