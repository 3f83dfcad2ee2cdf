"""The paper (arXiv 2510.10060): its authors' weights, models and experiments on top of the library."""

from translution.paper.description import SIZES, ModelDescription, Size
from translution.paper.weights import load_operator

__all__ = ["SIZES", "ModelDescription", "Size", "load_operator"]
