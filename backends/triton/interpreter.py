"""Interpreted launches: one after another, and without work that the interpreter would repeat at every operation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import triton.language as tl

_LOCK = Lock()


@contextmanager
def launching() -> Iterator[None]:
    """A running kernel swaps functions of ``triton.language``, so that only one may run."""
    from triton.runtime import interpreter

    builder, semantic = interpreter.interpreter_builder, interpreter.interpreter_semantic
    with _LOCK:
        options = builder.options
        swapped: list[tuple[Any, str, Callable[[Any], Any]]] = [
            # It swaps at every call of a function within the kernel, which took a third of the time: once is enough.
            (interpreter, "_patch_lang", cache),
            (interpreter, "_get_np_dtype", _known_dtypes),
            (semantic, "broadcast_impl_value", _broadcasting(interpreter.TensorHandle)),
            (tl.tensor, "__init__", _known_shapes),
        ]
        genuine = [getattr(owner, name) for owner, name, _ in swapped]
        # Without debug the interpreter computes a 64-bit shadow of every integer operation and throws it away.
        builder.options = replace(options, sanitize_overflow=options.debug and options.sanitize_overflow)
        for (owner, name, quicker), plain in zip(swapped, genuine, strict=True):
            setattr(owner, name, quicker(plain))
        try:
            yield
        finally:
            builder.options = options
            for (owner, name, _), plain in zip(swapped, genuine, strict=True):
                setattr(owner, name, plain)


def _known_dtypes(plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The NumPy dtype of a triton type, looked up by its name: building the table of all took a tenth of the time."""
    known: dict[str, Any] = {}

    def found(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = plain(kind)
        return known[name]

    return found


def _broadcasting(handle: Any) -> Callable[[Callable[[Any, Any], Any]], Callable[[Any, Any], Any]]:
    """Two operands brought to one shape as views, their types kept: copies and new types took a third of the time."""
    types: dict[tuple[str, tuple[int, ...]], Any] = {}

    def widened(operand: Any, shape: tuple[int, ...]) -> Any:
        scalar = operand.type.scalar
        if operand.type.is_block() and operand.handle.data.shape == shape:
            return operand
        if scalar.is_ptr():
            kind = tl.block_type(scalar, list(shape))
        else:
            kind = types.get((scalar.name, shape))
            if kind is None:
                kind = types[scalar.name, shape] = tl.block_type(scalar, list(shape))
        return tl.tensor(handle(np.broadcast_to(operand.handle.data, shape), scalar), kind)

    def quicker(plain: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def broadcast(left: Any, right: Any) -> Any:
            shapes = [side.handle.data.shape for side in (left, right) if side.type.is_block()]
            if not shapes:
                return left, right
            if len({len(shape) for shape in shapes}) > 1:
                return plain(left, right)
            shape = np.broadcast_shapes(*shapes)
            return widened(left, shape), widened(right, shape)

        return broadcast

    return quicker


def _known_shapes(plain: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """Numbers of one shape share its description, which took a sixth of the time to make for each."""
    known: dict[tuple[int, ...], Any] = {}

    def initialised(self: Any, handle: Any, type: Any) -> None:  # noqa: A002 - triton's name
        shape = tuple(type.shape) if type.is_block() else ()
        if shape in known:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known[shape]
        else:
            plain(self, handle, type)
            known[shape] = self.shape, self.numel

    return initialised
