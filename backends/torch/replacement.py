"""Swap the convertible modules of a model for Translution operators, see that they really run, and swap them back.

``nn.TransformerEncoderLayer`` and ``nn.TransformerEncoder`` have a fast path (eval mode, no gradients) that reads the
weights of their attention and never calls it. :class:`TranslutionAttention` keeps the layer off that path;
:func:`replace` also keeps the encoder from handing nested tensors to its layers (which would zero padded positions).
Counts of forward calls show whether a replaced module ran.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from translution.backends.torch.conversion import CONVERTIBLE, ConversionError
from translution.backends.torch.modules import TranslutionAttention, TranslutionConv, drop_in

DropIn = TranslutionConv | TranslutionAttention


class NotRun(RuntimeError):
    """Replaced modules that the model did not call: somebody else answered for them. ``names`` lists them."""

    def __init__(self, mode: str, names: tuple[str, ...]) -> None:
        self.mode, self.names = mode, names
        super().__init__(
            f"in {mode} the model never called {', '.join(names)}. It reads their weights itself, or does not use them "
            "on this input."
        )


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What became of a convertible module: ``names`` are its places in the model, ``reason`` why it was left."""

    names: tuple[str, ...]
    kind: str
    exact: bool
    reason: str = ""

    def __str__(self) -> str:
        return f"{' = '.join(self.names)} ({self.kind}): {'exact' if self.exact else self.reason}"


@dataclass(frozen=True, slots=True)
class _Swap:
    parent: nn.Module
    name: str
    original: nn.Module
    replaced: DropIn


@dataclass(slots=True)
class Replacement:
    """A model with replaced modules; ``model`` is the one to use (a new object only if it was itself such a module)."""

    model: nn.Module
    modules: tuple[ModuleReport, ...]
    replaced: Mapping[str, DropIn]
    _original: nn.Module
    _swaps: list[_Swap] = field(default_factory=list)
    _nested: list[nn.TransformerEncoder] = field(default_factory=list)

    def calls(self) -> dict[str, int]:
        """How often each replaced module ran so far."""
        return {name: module.calls for name, module in self.replaced.items()}

    @contextmanager
    def must_run(self, mode: str = "this call") -> Iterator[None]:
        """Raise :class:`NotRun` unless every replaced module's own forward runs inside the block."""
        before = self.calls()
        yield
        idle = tuple(name for name, count in self.calls().items() if count == before[name])
        if idle:
            raise NotRun(mode, idle)

    def check_runs(self, *args: Any, **kwargs: Any) -> None:
        """Call a deep copy in train, eval and eval without gradients; :class:`NotRun` where a module was skipped.

        The model itself, its batch statistics and its counts stay as they are.
        """
        trial = copy.deepcopy(self)
        for mode, training, gradients in (("train", True, True), ("eval", False, True), ("no_grad", False, False)):
            trial.model.train(training)
            with torch.set_grad_enabled(gradients), trial.must_run(mode):
                trial.model(*args, **kwargs)

    def revert(self) -> nn.Module:
        """Put the original modules back, with the parameters as they are now; gives back the original model."""
        for swap in self._swaps:
            for name, parameter in swap.replaced._parameters.items():
                swap.original._parameters[name] = parameter
            swap.original.train(swap.replaced.training)
            if swap.parent is not swap.original:
                swap.parent._modules[swap.name] = swap.original
        for encoder in self._nested:
            encoder.use_nested_tensor = True
        self._swaps.clear()
        self._nested.clear()
        self.model, self.replaced = self._original, {}
        return self._original


def replace(
    model: nn.Module,
    algorithm: str | None = "stream",
    *,
    backend: str = "torch",
    kinds: tuple[type[nn.Module], ...] = CONVERTIBLE,
    inplace: bool = True,
) -> Replacement:
    """Swap every convertible module of ``model`` for its Translution operator.

    A module that can't be converted stays, with the reason in the report. A module used in several places stays one.
    Parameters are shared, not copied: optimisers, state dicts and tied weights go on as before.

    Args:
        algorithm: ``stream`` and the like; None for the backend's first that applies, native kernels included.
        kinds: which classes to convert.
        inplace: False works on a deep copy and leaves ``model`` alone.
    """
    root = model if inplace else copy.deepcopy(model)
    places: dict[nn.Module, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            places.setdefault(module, []).append(name or "model")
    reports: list[ModuleReport] = []
    made: dict[nn.Module, DropIn] = {}
    for module, names in places.items():
        kind = type(module).__name__
        try:
            made[module] = drop_in(module, algorithm=algorithm, backend=backend)
            reports.append(ModuleReport(tuple(names), kind, True))
        except ConversionError as error:
            reports.append(ModuleReport(tuple(names), kind, False, str(error)))
    result = Replacement(
        made.get(root, root), tuple(reports), {places[module][0]: new for module, new in made.items()}, root
    )
    if root in made:
        result._swaps.append(_Swap(root, "", root, made[root]))
        return result
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in made:
                result._swaps.append(_Swap(parent, name, child, made[child]))
    for swap in result._swaps:
        swap.parent._modules[swap.name] = swap.replaced
    for encoder in root.modules():
        if (
            isinstance(encoder, nn.TransformerEncoder)
            and encoder.use_nested_tensor
            and any(isinstance(part, TranslutionAttention) for part in encoder.modules())
        ):
            encoder.use_nested_tensor = False
            result._nested.append(encoder)
    return result
