"""Relevance: which keys matter to a query, and how much (clauses R1 to R7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from translution.spec.checks import as_tuple, is_finite
from translution.spec.errors import require

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BiasTable:
    """A learned number per head and class, b^h[c] (clause R5): Swin, T5. Parameters: ``bias`` [num_heads, T]."""

    def parameters(self, num_heads: int, num_classes: int, rank: int) -> Mapping[str, Shape]:
        """Names and shapes."""
        return {"bias": (num_heads, num_classes)}


@dataclass(frozen=True, slots=True)
class SlopeBias:
    """-slope_h * |delta|_1, without parameters (clause R5): ALiBi (Press et al. 2022, section 3). 0 for register pairs.

    ``slopes=None`` takes the geometric sequence of the paper: with n the largest power of two not above num_heads,
    head h < n has 2^(-8 (h + 1) / n), and the heads beyond take every other slope of the sequence for 2n.
    """

    slopes: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.slopes is None:
            return
        shown, rule, remedy = (
            f"SlopeBias(slopes={self.slopes!r})",
            "slopes is one finite number per head",
            "Give a tuple of floats, or None for those of ALiBi",
        )
        given = as_tuple(self.slopes, "R5", shown, rule, remedy)
        slopes = tuple(float(s) for s in given if is_finite(s))
        require(len(slopes) == len(given), "R5", shown, rule, remedy)
        object.__setattr__(self, "slopes", slopes)

    def parameters(self, num_heads: int, num_classes: int, rank: int) -> Mapping[str, Shape]:
        """None."""
        return {}

    def slopes_for(self, num_heads: int) -> tuple[float, ...]:
        """One slope per head."""
        if self.slopes is not None:
            require(
                len(self.slopes) == num_heads,
                "R5",
                f"SlopeBias(slopes={self.slopes}) with num_heads={num_heads}",
                "slopes is one finite number per head",
                f"Give {num_heads} slopes, or None for those of ALiBi",
            )
            return self.slopes
        near = 2 ** (num_heads.bit_length() - 1)
        first = [2.0 ** (-8.0 * (h + 1) / near) for h in range(near)]
        return tuple(first + [2.0 ** (-4.0 * (2 * h + 1) / near) for h in range(num_heads - near)])


@dataclass(frozen=True, slots=True)
class QuadraticBias:
    """w_h . (-delta, |delta|^2) per head (clause R5): the positional scores of ConViT (d'Ascoli et al. 2021, equation
    5).

    ConViT counts key minus query, hence -delta. 0 for register pairs. Parameters: ``weight`` [num_heads, rank + 1].
    """

    def parameters(self, num_heads: int, num_classes: int, rank: int) -> Mapping[str, Shape]:
        """Names and shapes."""
        return {"weight": (num_heads, rank + 1)}


Bias = BiasTable | SlopeBias | QuadraticBias
BIASES = (BiasTable, SlopeBias, QuadraticBias)


@dataclass(frozen=True, slots=True)
class Softmax:
    """softmax over the support of scale <q_ij, k_ij>_h + bias + mask (clause R1).

    Args:
        scale: factor of the inner product; None for (head width of the queries) ** -0.5 (clause R6).
        content: False leaves the inner product out, so that the bias alone decides.
        bias: a number per head and class, or None.
    """

    scale: float | None = None
    content: bool = True
    bias: Bias | None = None

    def __post_init__(self) -> None:
        require(
            self.scale is None or is_finite(self.scale),
            "R6",
            f"Softmax(scale={self.scale!r})",
            "scale is a finite number, or None for head_dim ** -0.5",
            "Give a float",
        )
        if self.scale is not None:
            object.__setattr__(self, "scale", float(self.scale))
        require(
            self.bias is None or isinstance(self.bias, BIASES),
            "R5",
            f"Softmax(bias={self.bias!r})",
            "bias is None, BiasTable, SlopeBias or QuadraticBias",
            "Give bias=BiasTable()",
        )
        require(
            isinstance(self.content, bool) and (self.content or self.scale is None),
            "R1",
            f"Softmax(scale={self.scale}, content={self.content!r})",
            "content is a bool, and scale belongs to the content term",
            "Drop scale, or set content=True",
        )


@dataclass(frozen=True, slots=True)
class Ones:
    """Weight 1 on the support (clause R2): the fixed window of convolution."""


@dataclass(frozen=True, slots=True)
class Mean:
    """Weight 1 / |support| on the support (clause R3): average pooling without padding."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """(1 - g_h) first + g_h second with g_h = sigmoid(gate_h) (clause R4): ConViT's gated positional attention.

    Parameters: ``gate`` [num_heads], those of the two under ``first.`` and ``second.``.
    """

    first: Softmax | Ones | Mean
    second: Softmax | Ones | Mean

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            require(
                isinstance(getattr(self, name), (Softmax, Ones, Mean)),
                "R4",
                f"Mixture({name}={getattr(self, name)!r})",
                "a mixture joins two of Softmax, Ones and Mean",
                "Give Mixture(Softmax(), Softmax(content=False, bias=QuadraticBias()))",
            )


Relevance = Softmax | Ones | Mean | Mixture
RELEVANCES = (Softmax, Ones, Mean, Mixture)


def branches(relevance: Relevance) -> Iterator[tuple[str, Softmax | Ones | Mean]]:
    """Each plain relevance with the prefix of its parameter names."""
    if isinstance(relevance, Mixture):
        yield "first.", relevance.first
        yield "second.", relevance.second
    else:
        yield "", relevance
