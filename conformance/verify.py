"""What ``translution verify`` runs: reductions on every backend, a user's own modules, real digits."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from translution.conformance.results import CannotVerify, Row, blame
from translution.errors import NotSupported
from translution.progress import Update

# What the interpreter can do while the other backends run.
INTERPRETED_CASES = 3


def verify_everything(cases: int, only: str | None, progress: Update) -> list[Row]:
    """Every reduction on every backend that claims it (``reductions``), then trained models on digits (``digits``)."""
    rows: list[Row] = []
    if only in (None, "reductions"):
        rows += _verify_reductions(cases, progress)
    if only in (None, "digits"):
        from translution.conformance.verify_digits import verify_digits

        rows += verify_digits(progress=progress)
    return rows


def _verify_reductions(cases: int, progress: Update) -> list[Row]:
    from translution.conformance import interpreted
    from translution.conformance.verify_reductions import verify_reductions
    from translution.registry import BACKENDS, get_backend

    try:
        on_gpu = not get_backend("triton").unavailable()
    except NotSupported:
        on_gpu = True  # triton is not installed; its row will say so
    if on_gpu:
        return verify_reductions(cases=cases, progress=progress)
    beside = interpreted.start(min(cases, INTERPRETED_CASES))
    try:
        rows = verify_reductions([name for name in BACKENDS if name != "triton"], cases, progress=progress)
    except BaseException:
        beside.kill()
        raise
    return rows + interpreted.finish(beside)


def load_factory(text: str) -> Callable[[], Any]:
    """The callable that ``pkg.mod:factory`` names; modules of the current folder are found too."""
    module_name, separator, attribute = text.partition(":")
    if not separator or not module_name or not attribute:
        raise CannotVerify(f"--module {text}: write package.module:factory, where factory() returns a torch.nn.Module")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with blame(f"importing {module_name}"):
        module = importlib.import_module(module_name)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        public = sorted(name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
        raise CannotVerify(f"--module {text}: {module_name} has no callable {attribute!r}; it has {', '.join(public)}")
    found: Callable[[], Any] = factory
    return found


def parse_shape(text: str) -> tuple[int, ...]:
    """``1,3,32,32`` as a tuple."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise CannotVerify(f"--input {text}: give positive sizes separated by commas, e.g. 1,3,32,32")
    return shape


def verify_factory(module: str, shape: str, progress: Update) -> list[Row]:
    """Every convertible module of the model that ``module`` (``pkg.mod:factory``) builds, on an input of ``shape``."""
    from translution.conformance.verify_modules import verify_modules

    return verify_modules(load_factory(module), parse_shape(shape), progress=progress)
