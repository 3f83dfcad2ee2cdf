"""Theorems as data: an operator of this library equals somebody else's implementation.

A :class:`Reduction` draws cases. A case holds the operator with its inputs, and a peer that computes the same from
weights of its own. The peer's weights become the operator's parameters by a linear map without negative coefficients
(``relay``), so that its transpose takes the operator's gradients, and their bounds, to the peer's weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from translution.spec import Operator

FloatArray = npt.NDArray[np.float64]
Weights = Mapping[str, Tensor]
Forward = Callable[[Weights, Tensor, Tensor | None], Tensor | tuple[Tensor, Tensor]]
Relay = Callable[[Weights], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Peer:
    """Somebody else's implementation in float64.

    ``forward(weights, x, y)`` gives out [B, Nq, F], or (out, attention weights [B, H, Nq, Nk]). ``arithmetic`` names
    the coarsest dtype that the peer computes a part in.
    """

    weights: Weights
    forward: Forward
    relay: Relay
    arithmetic: str = "float64"


@dataclass(frozen=True, eq=False)
class Expected:
    """The peer's out, attention weights or None, and gradients of <cotangent, out> by weight and for x and y."""

    out: FloatArray
    attention: FloatArray | None
    gradients: Mapping[str, FloatArray]


@dataclass(frozen=True, eq=False)
class ReductionCase:
    """One instance: x [B, Nq, Cq], y [B, Nk, Ck] or None, mask or None, a cotangent like the result, and the peer."""

    operator: Operator
    x: FloatArray
    y: FloatArray | None
    mask: npt.NDArray[np.generic] | None
    cotangent: FloatArray
    peer: Peer
    note: str = ""

    @cached_property
    def params(self) -> dict[str, FloatArray]:
        """The operator's parameters, re-laid from the peer's weights."""
        relayed = self.peer.relay(self.peer.weights)
        return {name: relayed[name].detach().numpy().copy() for name in self.operator.parameters}

    @cached_property
    def expected(self) -> Expected:
        """The peer's results."""
        leaves = {name: value.detach().clone().requires_grad_() for name, value in self.peer.weights.items()}
        x = torch.tensor(self.x, requires_grad=True)
        y = None if self.y is None else torch.tensor(self.y, requires_grad=True)
        found = self.peer.forward(leaves, x, y)
        out, attention = found if isinstance(found, tuple) else (found, None)
        wanted = {**leaves, "x": x} | ({} if y is None else {"y": y})
        gradients = torch.autograd.grad(
            out, list(wanted.values()), torch.tensor(self.cotangent), allow_unused=True, materialize_grads=True
        )
        return Expected(
            out.detach().numpy(),
            None if attention is None else attention.detach().numpy(),
            {name: value.numpy() for name, value in zip(wanted, gradients, strict=True)},
        )

    def to_peer(self, gradients: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, FloatArray]:
        """Gradients, or their bounds, by parameter: taken to the peer's weights by the transpose of ``relay``."""
        if not self.peer.weights:
            return {}
        leaves = {name: value.detach().clone().requires_grad_() for name, value in self.peer.weights.items()}
        relayed = self.peer.relay(leaves)
        cotangents = [torch.tensor(np.asarray(gradients[name], np.float64)) for name in relayed]
        found = torch.autograd.grad(
            list(relayed.values()), list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
        )
        return {name: value.numpy() for name, value in zip(leaves, found, strict=True)}


class Draw:
    """Random numbers of one case: a function of the reduction and the seed.

    Values are multiples of 2^-12, so that they and their sums are exact in float32.
    """

    def __init__(self, reduction: str, seed: int, integers: bool) -> None:
        self.rng = np.random.default_rng([crc32(reduction.encode()), seed])
        self.integers = integers

    def normal(self, *shape: int, size: float = 1.0) -> FloatArray:
        """Normal numbers, or whole numbers from -3 to 3."""
        if self.integers:
            return self.rng.integers(-3, 4, shape).astype(np.float64)
        return np.round(size * self.rng.standard_normal(shape) * 2**12) / 2**12

    def tensor(self, *shape: int, size: float = 1.0) -> Tensor:
        """The same as a torch tensor."""
        return torch.from_numpy(self.normal(*shape, size=size))

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Weights for every parameter of a module, matrices shrunk by the square root of their inputs."""
        return {
            name: self.tensor(*value.shape, size=(value[0].numel() if value.dim() > 1 else 4) ** -0.5)
            for name, value in module.named_parameters()
        }

    def pick(self, options: Sequence[int]) -> int:
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    def sizes(self, rank: int, options: Sequence[int]) -> tuple[int, ...]:
        """One option for each axis."""
        return tuple(self.pick(options) for _ in range(rank))

    def case(
        self,
        operator: Operator,
        peer: Peer,
        *,
        mask: npt.NDArray[np.generic] | None = None,
        alone: bool | None = None,
        batch: int = 2,
        note: str = "",
    ) -> ReductionCase:
        """Tokens and a cotangent for an operator; ``alone`` where y is x (None: wherever the peer takes one input)."""
        layout = operator.layout
        x = self.normal(batch, layout.num_queries, operator.dim)
        y = None if alone else self.normal(batch, layout.num_keys, operator.keys_dim)
        cotangent = self.normal(batch, layout.num_queries, operator.out_features)
        return ReductionCase(operator, x, y, mask, cotangent, peer, note)


Sample = Callable[[Draw, int], ReductionCase]


@dataclass(frozen=True, eq=False)
class Reduction:
    """One theorem. ``shortcuts`` names the native algorithms that apply; every other algorithm is general.

    ``exact`` says that on small whole numbers both sides are exact, so that they must be equal.
    """

    id: str
    title: str
    peer: str
    clauses: tuple[str, ...]
    draw: Sample
    shortcuts: tuple[str, ...] = ()
    exact: bool = False

    def sample(self, seed: int, *, integers: bool = False) -> ReductionCase:
        """Case number ``seed``. Consecutive seeds walk through the settings; ``integers`` draws small whole numbers."""
        return self.draw(Draw(self.id, seed, integers), seed)


def all_reductions() -> tuple[Reduction, ...]:
    """Every reduction; importing the peers takes a moment."""
    from translution.conformance.reductions_attention import ATTENTION
    from translution.conformance.reductions_convolution import CONVOLUTIONS
    from translution.conformance.reductions_relative import RELATIVE
    from translution.conformance.reductions_transformers import TRANSFORMERS

    return (*CONVOLUTIONS, *ATTENTION, *RELATIVE, *TRANSFORMERS)


def find_reduction(identifier: str) -> Reduction:
    """The reduction of that id."""
    found = {reduction.id: reduction for reduction in all_reductions()}
    if identifier not in found:
        raise LookupError(f"no reduction {identifier!r}; known are {', '.join(found)}")
    return found[identifier]


def walk(seed: int, *sizes: int) -> Iterator[int]:
    """Digits of ``seed`` in mixed radix: consecutive seeds meet every combination in turn."""
    for size in sizes:
        seed, digit = divmod(seed, size)
        yield digit
