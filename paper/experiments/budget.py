"""What every model of an experiment is given: a size, and so many updates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from translution.paper.description import Size
from translution.paper.training import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Size of the models and length of their training; the same for every model of an experiment."""

    size: Size
    rank: int
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.05
    gradient_clip: float = 1.0

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """What ``dataclasses.asdict`` made of it."""
        return cls(**{**data, "size": Size(**data["size"])})

    def training(self, seed: int, device: str) -> Settings:
        """Of one run."""
        return Settings(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=min(self.warmup_steps, self.steps // 2),
            weight_decay=self.weight_decay,
            gradient_clip=self.gradient_clip,
            seed=seed,
            evaluate_every=max(1, self.steps // 5),
            checkpoint_every=max(1, self.steps // 20),
            device=device,
        )
