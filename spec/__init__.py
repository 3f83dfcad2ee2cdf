"""What an operator is: immutable data, no array library."""

from translution.spec.classes import Clip, FarClasses, LogBuckets
from translution.spec.encoders import (
    Concat,
    Encoder,
    Identity,
    LowRank,
    PerDisplacement,
    Rotary,
    Shared,
    Sum,
    Vectors,
)
from translution.spec.errors import SpecError
from translution.spec.layout import Boundary, Lattice, Layout, PairTable, RegisterClass
from translution.spec.operator import Operator
from translution.spec.relevance import (
    Bias,
    BiasTable,
    Mean,
    Mixture,
    Ones,
    QuadraticBias,
    Relevance,
    SlopeBias,
    Softmax,
)

__all__ = [
    "Bias",
    "BiasTable",
    "Boundary",
    "Clip",
    "Concat",
    "Encoder",
    "FarClasses",
    "Identity",
    "Lattice",
    "Layout",
    "LogBuckets",
    "LowRank",
    "Mean",
    "Mixture",
    "Ones",
    "Operator",
    "PairTable",
    "PerDisplacement",
    "QuadraticBias",
    "RegisterClass",
    "Relevance",
    "Rotary",
    "Shared",
    "Softmax",
    "SlopeBias",
    "SpecError",
    "Sum",
    "Vectors",
]
