"""What an operator is: immutable data, no array library."""

from translution.spec.classes import Clip, FarClasses, LogBuckets
from translution.spec.encoders import (
    Concat,
    Encoder,
    Identity,
    LowRank,
    LowRankOutput,
    PerDisplacement,
    Rotary,
    Shared,
    Sum,
    Vectors,
)
from translution.spec.errors import SpecError
from translution.spec.layout import Boundary, Lattice, Layout, RegisterClass
from translution.spec.operator import Operator
from translution.spec.pair_table import PairTable
from translution.spec.preset_text import parse_spec
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
from translution.spec.serialization import operator_from_data, operator_from_json, operator_to_data, operator_to_json

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
    "LowRankOutput",
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
    "SlopeBias",
    "Softmax",
    "SpecError",
    "Sum",
    "Vectors",
    "operator_from_data",
    "operator_from_json",
    "operator_to_data",
    "operator_to_json",
    "parse_spec",
]
