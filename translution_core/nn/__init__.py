"""Layers for PyTorch models: operators of the spec as ``torch.nn.Module``."""

from translution.nn.decoding import DecodingState
from translution.nn.operator_layer import OperatorLayer, OperatorModule
from translution.nn.translution_layers import (
    AlphaTranslution1d,
    AlphaTranslution2d,
    AlphaTranslution3d,
    Translution1d,
    Translution2d,
    Translution3d,
    attention_class,
)

__all__ = [
    "AlphaTranslution1d",
    "AlphaTranslution2d",
    "AlphaTranslution3d",
    "DecodingState",
    "OperatorLayer",
    "OperatorModule",
    "Translution1d",
    "Translution2d",
    "Translution3d",
    "attention_class",
]
