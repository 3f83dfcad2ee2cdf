"""How much memory a call takes for itself (clause B3)."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from translution.conformance.exam.law import Trial, law
from translution.conformance.laws.sight import gradients
from translution.conformance.strategies import draw_question
from translution.geometry import count_links
from translution.spec import (
    BiasTable,
    Clip,
    Lattice,
    Layout,
    Ones,
    Operator,
    PairTable,
    PerDisplacement,
    Shared,
    Softmax,
)

WIDTH = 192
# Few classes and many links, so that a matrix for every link stands out.
_GRAPH = PairTable(tuple(tuple((i * j) % 3 for j in range(18)) for i in range(18)), 3)
_LAYOUTS: tuple[Layout, ...] = (
    Lattice((110,), kernel_size=3),
    Lattice((18,), far=Clip(1)),
    _GRAPH,
    Lattice((9, 13), kernel_size=(1, 3)),
)


def _allocated(compute: Callable[[], Any]) -> int:
    """Bytes that Python and NumPy held at most beyond those held before."""
    running = tracemalloc.is_tracing()
    if not running:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        compute()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        if not running:
            tracemalloc.stop()


def _largest_tensor(compute: Callable[[], Any]) -> int:
    """Bytes of the largest memory that a tensor had which any torch operation gave."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    largest = 0

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            # Nothing is compiled here: torch's compiler, which takes a second to import, need not be told.
            return False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in tree_leaves(out):
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.untyped_storage().nbytes())
            return out

    with Watch():  # type: ignore[no-untyped-call]
        compute()
    return largest


def _features(operator: Operator) -> int:
    """Features of all roles together."""
    return operator.num_heads * (2 * operator.head_dim * operator.uses_content + operator.value_head_dim)


@law("MEMORY", clauses=("B3",), kills=("gathers-matrices",), quick=2, full=5, live=True)
def memory(trial: Trial) -> None:
    """A call never takes one matrix for every pair: its memory grows with links times features, tokens and tables, and
    not with links times the size of a matrix.
    """
    draws, live = trial.draws, trial.live()
    layout = draws.walk(_LAYOUTS)
    relative, plain = PerDisplacement(WIDTH), Shared(WIDTH)
    softmax = Operator(layout, WIDTH, 2, relative, relative, relative, Softmax(bias=BiasTable()))
    native = Operator(Lattice((110,), kernel_size=3), WIDTH, 2, relative, relevance=Ones())
    attention = Operator(layout, WIDTH, 2, plain, plain, plain)
    operator = draws.walk((softmax, native, softmax, attention, Operator(layout, WIDTH, 2, relative, relevance=Ones())))
    question = draw_question(draws, trial.dtype, operator=operator, masked=False, batch=(1,), cotangent=True)
    out, exact = trial.run(question).out, trial.budget(question)  # index arrays of the layout are kept from here on
    trial.within("out", out, exact.value, exact.out)
    answered = gradients(trial, question)
    for name, gradient in () if answered is None else answered.gradients.items():
        trial.within(f"gradient of {name}", gradient, exact.gradient_values[name], exact.gradients[name])
    links, layout = count_links(operator.layout), operator.layout
    tokens = (layout.num_queries + layout.num_keys) * (WIDTH + _features(operator) + operator.out_features)
    tables = sum(int(np.prod(shape)) for shape in operator.parameters.values())
    by_link = links * (_features(operator) + 4 * operator.num_heads)
    # Numbers are float64 at worst. Pairs may be padded to twice as many, and a gradient takes as much as what it is of;
    # so one array holds at most the features of all roles twice, or all tables.
    if live.backend.kind == "torch":
        allowed, measure = 8 * (2 * by_link + 2 * tokens + tables), _largest_tensor
    else:
        # All arrays at once: features of every role, weighted ones and their padded layout, with a cotangent of each;
        # tables in the dtype of the sums, a copy for a product, and both for the gradient; objects for every link.
        allowed, measure = 8 * (2 * 4 * by_link + 4 * tokens + 4 * tables) + 2048 * links, _allocated
    matrices = 4 * links * WIDTH * WIDTH
    trial.require(allowed < matrices or not _relative(operator), "the bound would let one matrix for every pair pass")
    for name, compute in {"run": lambda: live.run(question), "vjp": lambda: live.vjp(question)}.items():
        if name == "vjp" and answered is None:
            continue
        used = measure(compute)
        trial.require(
            used <= allowed,
            f"{name} took {used:,} bytes, more than {allowed:,}, for {links} links of {_features(operator)} features "
            f"and {tables:,} parameters; one {WIDTH} x {WIDTH} matrix for every link is {matrices:,}",
        )


def _relative(operator: Operator) -> bool:
    return any(name.endswith("table") for name in operator.parameters)
