"""The backend ``torch``."""

from translution.backends.torch.backend import backend

__all__ = ["backend"]
