"""The paper (arXiv 2510.10060): its authors' weights, models and experiments on top of the library."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from translution.paper.description import SIZES, ModelDescription, Size
from translution.paper.weights import load_operator

if TYPE_CHECKING:
    from translution.paper.model_weights import load_model
    from translution.paper.models import GPT, VisionTransformer, build_model

__all__ = [
    "GPT",
    "SIZES",
    "ModelDescription",
    "Size",
    "VisionTransformer",
    "build_model",
    "load_model",
    "load_operator",
]

# Models need torch; descriptions and load_operator do not.
_HOME_OF = {
    "GPT": "translution.paper.models",
    "VisionTransformer": "translution.paper.models",
    "build_model": "translution.paper.models",
    "load_model": "translution.paper.model_weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'translution.paper' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value
