"""What else would fit, where an operator needs more memory than there is: the largest of each kind that does.

A smaller batch; a window, or far displacements that share a class; fewer relative roles; a low rank in place of one
matrix per displacement. All but the first are other operators, with other parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, cast

from translution.algorithms import Cost, Request, cost
from translution.errors import NotSupported
from translution.execution import as_asked, predict, reasons_against
from translution.progress import Update, silently
from translution.registry import BACKENDS, get_backend
from translution.spec import (
    Clip,
    Concat,
    Lattice,
    LogBuckets,
    LowRank,
    LowRankOutput,
    PerDisplacement,
    Shared,
    SpecError,
    Sum,
    presets,
)
from translution.spec.encoders import Encoder

# An estimate is seldom this far off; counting takes seconds where there are thousands of operations.
HOPELESS = 4
_ROLES = ("query", "key", "value")
_PRESET_LAYOUT = ("registers", "causal", "kernel_size", "dilation", "boundary", "far")


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits: the change, who computes it, and its cost."""

    change: str
    request: Request
    backend: str
    algorithm: str
    cost: Cost


def fit(
    request: Request, limit: int, backends: Sequence[str] = tuple(BACKENDS), change: str = "as it is"
) -> Fit | None:
    """Who computes this request within ``limit`` bytes, parameters included; None where nobody does.

    The loops of ``definition`` are left out: they fit, and nobody waits for them.
    """
    ways = []
    for name in backends:
        try:
            backend = get_backend(name)
        except NotSupported:
            continue
        ways += [
            (cost(request, algorithm).working_bytes, name, algorithm)
            for algorithm in backend.algorithms
            if algorithm != "definition" and not reasons_against(backend, as_asked(backend, request), algorithm)
        ]
    for estimate, name, algorithm in sorted(ways):
        if estimate > HOPELESS * limit:
            break
        found = predict(get_backend(name), request, algorithm)
        if found.total_bytes <= limit:
            return Fit(change, request, name, algorithm, found)
    return None


# What a change is called and what it makes, from the least change to the greatest: costs fall from one to the next.
_Changes = list[tuple[str, Callable[[], Request]]]


def _with(request: Request, **changes: Any) -> Callable[[], Request]:
    return lambda: replace(request, operator=replace(request.operator, **changes))


def _batches(request: Request) -> _Changes:
    return [(f"batch {n:,}", partial(replace, request, batch=n)) for n in range(request.batch - 1, 0, -1)]


def _windows(request: Request) -> _Changes:
    layout = request.operator.layout
    if not isinstance(layout, Lattice) or not layout.is_self or layout.far is not None:
        return []
    widest = 2 * max(layout.grid) + 1 if layout.kernel_size is None else max(layout.window)
    return [
        (f"a window of {n} along every axis", _with(request, layout=replace(layout, kernel_size=n, padding=None)))
        for n in range(widest - 2, 0, -2)
    ]


def _clips(request: Request) -> _Changes:
    layout = request.operator.layout
    if not isinstance(layout, Lattice) or layout.kernel_size is not None or isinstance(layout.far, LogBuckets):
        return []
    farthest = max(layout.grid) - 1 if layout.far is None else layout.far.max_distance
    return [
        (f"displacements beyond {n} share a class", _with(request, layout=replace(layout, far=Clip(n))))
        for n in range(farthest - 1, -1, -1)
    ]


def _role_sets(request: Request) -> _Changes:
    own = {name: getattr(request.operator, name) for name in _ROLES}
    relative = {name: encoder for name, encoder in own.items() if isinstance(encoder, PerDisplacement)}
    shared = {name: Shared(one.features, bias=one.bias, groups=one.groups) for name, one in relative.items()}
    return [
        (f"one matrix for all displacements in {' and '.join(names)}", _with(request, **{n: shared[n] for n in names}))
        for names in accumulate((name,) for name in reversed(shared))
    ]


def _ranks(request: Request) -> _Changes:
    """Alpha-Translution in place of full matrices; a lower rank where there is one."""
    operator, layout = request.operator, request.operator.layout
    own = [operator.query, operator.key, operator.value]
    inner = {part.inner_features for encoder in own for part in _parts(encoder) if isinstance(part, LowRank)}
    heads = operator.num_heads
    if len(inner) == 1:
        (now,) = inner
        changed = ("query", "key", "value", "output")
        return [
            (
                f"rank {n:,} per head",
                _with(request, **{name: _narrowed(getattr(operator, name), now, n * heads) for name in changed}),
            )
            for n in range((now - 1) // heads, 0, -1)
        ]
    plain = all(isinstance(encoder, PerDisplacement | Shared) for encoder in own)
    roles = "".join(name[0] for name, encoder in zip(_ROLES, own, strict=True) if isinstance(encoder, PerDisplacement))
    if not plain or not roles or not isinstance(layout, Lattice) or not layout.is_self:
        return []
    options = {name: getattr(layout, name) for name in _PRESET_LAYOUT}

    def alpha(rank: int) -> Request:
        other = presets.alpha_translution(
            layout.grid, operator.dim, heads, rank=rank, head_dim=operator.head_dim, roles=cast("Any", roles), **options
        )
        return replace(request, operator=other)

    return [
        (f"alpha-Translution of rank {n:,} per head", partial(alpha, n)) for n in range(operator.head_dim - 1, 0, -1)
    ]


def _parts(encoder: Encoder | None) -> tuple[Encoder, ...]:
    return encoder.parts if isinstance(encoder, Concat | Sum) else () if encoder is None else (encoder,)


def _narrowed(encoder: Any, now: int, width: int) -> Any:
    """The encoder with ``width`` inner features in place of ``now``, also in what stands beside them in a head."""
    if isinstance(encoder, Concat):
        return Concat((encoder.parts[0], *(_narrow_part(part, now, width) for part in encoder.parts[1:])))
    return replace(encoder, inner_features=width) if isinstance(encoder, LowRank | LowRankOutput) else encoder


def _narrow_part(part: Encoder, now: int, width: int) -> Encoder:
    if isinstance(part, LowRank):
        return replace(part, inner_features=width)
    return replace(part, features=width) if isinstance(part, Shared) and part.features == now else part


KINDS = (_batches, _ranks, _role_sets, _clips, _windows)


def cheaper(
    request: Request, limit: int, backends: Sequence[str] = tuple(BACKENDS), update: Update = silently
) -> list[Fit]:
    """What fits in ``limit`` bytes where the request itself does not: of every kind of change the least that does."""
    found = []
    for number, kind in enumerate(KINDS):
        update("cheaper operators", number, len(KINDS))
        if (best := _least(kind(request), limit, backends)) is not None:
            found.append(best)
    update("cheaper operators", len(KINDS), len(KINDS))
    return found


def _least(changes: _Changes, limit: int, backends: Sequence[str]) -> Fit | None:
    """The first that fits, by halves."""
    best: Fit | None = None
    low, high = 0, len(changes)
    while low < high:
        middle = (low + high) // 2
        words, make = changes[middle]
        try:
            tried = fit(make(), limit, backends, words)
        except SpecError:  # this operator has no such variant
            return None
        if tried is None:
            low = middle + 1
        else:
            best, high = tried, middle
    return best
