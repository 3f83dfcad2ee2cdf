"""Which functions of a package run while something happens: a mutation elsewhere can't be noticed by it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from translution.conformance.mutants.blind_package import Package

# Module and function, without what is nested anonymously inside.
Function = tuple[str, str]
_ANONYMOUS = frozenset({"<locals>", "<lambda>", "<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})


@contextmanager
def reached(package: Package) -> Iterator[set[Function]]:
    """The functions of the package that are called inside, in this thread and in those that it starts."""
    modules = {str(path): module for module, path in package.paths.items()}
    found: set[Function] = set()

    def called(frame: FrameType, _event: str, _argument: object) -> None:
        module = modules.get(frame.f_code.co_filename)
        if module is not None:
            names = [n for n in frame.f_code.co_qualname.split(".") if n not in _ANONYMOUS]
            found.add((module, ".".join(names)))

    before = sys.gettrace()
    sys.settrace(called)
    threading.settrace(called)
    try:
        yield found
    finally:
        sys.settrace(before)
        threading.settrace(None)


def forget(package: Package) -> None:
    """Empty the caches of the package's modules, so that what fills them runs again."""
    for module in package.paths:
        if module in sys.modules:
            for value in vars(sys.modules[module]).values():
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()
