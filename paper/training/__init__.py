"""One training loop for digits, text and images: what PyTorch has, plus files that survive an interruption."""

from translution.paper.training.distribution import Part, processes
from translution.paper.training.engine import Task, Trained, train
from translution.paper.training.seeds import generator, order_of_epoch, seed_of
from translution.paper.training.settings import Settings, TrainingError

__all__ = [
    "Part",
    "Settings",
    "Task",
    "Trained",
    "TrainingError",
    "generator",
    "order_of_epoch",
    "processes",
    "seed_of",
    "train",
]
