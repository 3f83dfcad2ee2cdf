"""Randomness without a state: every draw is a function of names and numbers, so nothing has to be kept and restored."""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def seed_of(*parts: int | str) -> int:
    """A whole number below 2^63 that depends on all ``parts`` and their order, the same on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A generator on the CPU that starts from :func:`seed_of` ``parts``."""
    return torch.Generator().manual_seed(seed_of(*parts))


@lru_cache(maxsize=4)
def order_of_epoch(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of ``count`` samples, int64 [count]."""
    return torch.randperm(count, generator=generator("order", seed, epoch))


def samples_of_step(count: int, batch_size: int, seed: int, step: int) -> tuple[int, Tensor]:
    """The epoch and the samples of a step, int64 [batch_size]: what is left over at the end of an epoch is left out.

    Where there are fewer samples than ``batch_size``, the epoch's order is repeated.
    """
    if count < batch_size:
        repeated = order_of_epoch(count, seed, step).repeat(-(-batch_size // count))
        return step, repeated[:batch_size]
    epoch, position = divmod(step, count // batch_size)
    return epoch, order_of_epoch(count, seed, epoch)[position * batch_size : (position + 1) * batch_size]
