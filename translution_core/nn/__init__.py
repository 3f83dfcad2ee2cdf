"""Layers for PyTorch models: operators of the spec as ``torch.nn.Module``."""

from translution.nn.operator_layer import OperatorLayer

__all__ = ["OperatorLayer"]
