"""What a training run is told: everything that decides its result, in one dataclass that lands whole in its files."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Precision = Literal["float32", "bfloat16"]
Parallel = Literal["data", "sharded"]
# A run may go on with other values of these: they say where and how it computes, not what.
WHERE = ("device", "parallel", "checkpoint_every")


class TrainingError(ValueError):
    """A setting, a file or a result that training can't go on with: what was given, what is expected, what to do."""

    def __init__(self, given: str, rule: str, remedy: str) -> None:
        super().__init__(f"{given}: {rule}. {remedy}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a model is trained.

    Attributes:
        steps: updates of the parameters.
        batch_size: samples of one update, over all processes together.
        learning_rate: the highest, reached after ``warmup_steps``; then a cosine goes to zero at ``steps``.
        weight_decay: of matrices and tables (:mod:`translution.paper.training.optimiser`).
        gradient_clip: the largest 2-norm of all gradients together; None does not clip.
        precision: ``bfloat16`` computes under autocast; parameters and their updates stay float32.
        seed: of the initial parameters, the order of the data and everything random.
        evaluate_every: steps between two evaluations; None evaluates at the end alone, which always happens.
        checkpoint_every: steps between two checkpoints; there is always one at the end.
        parallel: with several processes, ``data`` keeps all parameters in each (DistributedDataParallel), ``sharded``
            a share of them (``fully_shard``).
        device: ``cpu`` or ``cuda``.
    """

    steps: int
    batch_size: int
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    gradient_clip: float | None = None
    precision: Precision = "float32"
    seed: int = 0
    evaluate_every: int | None = None
    checkpoint_every: int = 100
    parallel: Parallel = "data"
    device: str = "cpu"

    def __post_init__(self) -> None:
        self._require(self.steps >= 1, "steps", "at least 1")
        self._require(self.batch_size >= 1, "batch_size", "at least 1")
        self._require(math.isfinite(self.learning_rate) and self.learning_rate > 0, "learning_rate", "above 0")
        self._require(0 <= self.warmup_steps <= self.steps, "warmup_steps", f"from 0 to steps, which is {self.steps}")
        self._require(math.isfinite(self.weight_decay) and self.weight_decay >= 0, "weight_decay", "at least 0")
        self._require(0 <= self.beta1 < 1, "beta1", "from 0 to below 1")
        self._require(0 <= self.beta2 < 1, "beta2", "from 0 to below 1")
        self._require(self.gradient_clip is None or self.gradient_clip > 0, "gradient_clip", "above 0, or None")
        self._require(self.precision in get_args(Precision), "precision", " or ".join(get_args(Precision)))
        self._require(self.evaluate_every is None or self.evaluate_every >= 1, "evaluate_every", "at least 1, or None")
        self._require(self.checkpoint_every >= 1, "checkpoint_every", "at least 1")
        self._require(self.parallel in get_args(Parallel), "parallel", " or ".join(get_args(Parallel)))
        self._require(self.device in ("cpu", "cuda"), "device", "cpu or cuda")

    def _require(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise TrainingError(f"{name}={getattr(self, name)!r}", f"{name} is {rule}", f"Change {name}")

    def learning_rate_at(self, step: int) -> float:
        """Of update ``step``, counted from 0: linear up, then half a cosine wave down (Loshchilov and Hutter 2017)."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.learning_rate * (1 + math.cos(math.pi * share)) / 2

    def as_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    def deciding(self) -> dict[str, Any]:
        """The fields that decide the result."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in WHERE}
