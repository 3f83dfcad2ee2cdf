"""What a call costs, without computing it: the backend itself runs on tensors that have shapes and no memory.

Nothing here knows the algorithms: their own operations are counted, so that a figure can't disagree with the code. What
a native kernel takes inside one operation is not seen, except where a table here says it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from translution.algorithms import ITEM_BYTES, Cost, Request
from translution.backends.torch.memory import Memory
from translution.inputs import Inputs

if TYPE_CHECKING:
    from translution.registry import Backend

# What an operation takes inside, while it runs: one tensor as large as the cotangent (measured, benchmarks/memory.py).
_INSIDE: Mapping[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda cotangent, *_: cotangent.nbytes
}
# What a view takes beside the numbers that it shows (measured).
VIEW_BYTES = 600
# Operations that read and write nothing.
_IDLE = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
)
# Which kernel runs depends on the device, which a meta tensor hides and a fake one has; that is slow where there are
# thousands of operations.
NATIVE = ("conv", "sdpa")


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, what they read and write, and the storages that are alive; those of ``given`` are free."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.traffic = self.peak = self._held = 0
        # What is held when the backward begins, without what a thread keeps; None before.
        self.saved: int | None = None
        self._kept: Memory | None = None
        self._views: dict[Hashable, int] = {}
        self._alive = {t.untyped_storage()._cdata: 0 for t in given}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        own = dict(kwargs or {})
        if self.saved is None and torch._C._current_graph_task_id() >= 0:
            self.saved = self.left
        out = func(*args, **own)
        # What works in place has as many operations as what does not.
        formula = flop_registry.get(getattr(torch.ops.aten, func._overloadpacket.__name__.removesuffix("_"), None))
        if formula is not None:
            self.flops += formula(*args, **own, out_val=out)
        results = _tensors(out if isinstance(out, tuple | list) else (out,))
        if out is None:  # it writes its first argument
            results = _tensors(args[:1])
        inside = _INSIDE.get(func._overloadpacket)
        if results and not func.is_view and func._overloadpacket not in _IDLE:
            given = _tensors((*args, *(value for name, value in own.items() if name != "out")))
            self.traffic += sum(t.nbytes for t in (*given, *results))
        for tensor in results:
            self._hold(tensor.untyped_storage())
        if inside is not None:
            self.peak = max(self.peak, self._held + inside(*args))
        return out

    def count(self, flops: int, traffic: int) -> None:
        """What a kernel that torch does not see would have done."""
        self.flops += flops
        self.traffic += traffic

    @property
    def left(self) -> int:
        """Bytes that the operations so far leave to others; what a thread keeps is for itself."""
        kept = [] if self._kept is None else self._kept.views()
        own = {view.untyped_storage()._cdata for view in kept}
        return self._held - sum(self._views.values()) - sum(self._alive[key] for key in own)

    def keep(self, memory: Memory | None) -> None:
        """What an operation worked in stays when it has ended, until the next one takes its place; the views of every
        kind of operation stay."""
        self._kept = memory
        if memory is not None:
            views = VIEW_BYTES * len(memory.views())
            self._held += views - self._views.get(memory.key, 0)
            self._views[memory.key] = views
            self.peak = max(self.peak, self._held)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self._held += storage.nbytes()
            self.peak = max(self.peak, self._held)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._held -= self._alive.pop(key)


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


def compute(
    backend: Backend,
    request: Request,
    algorithm: str,
    params: Mapping[str, Tensor],
    inputs: Inputs,
    pull: Tensor,
) -> None:
    """One call; with ``request.gradient`` the gradients of <pull, out> too, where tokens on both sides are one leaf."""
    if not request.gradient:
        backend.forward(request, algorithm, params, inputs)
        return
    x = inputs.x.detach().requires_grad_()
    y = x if inputs.y is inputs.x else inputs.y.detach().requires_grad_()
    own = {name: value.detach().requires_grad_() for name, value in params.items()}
    out: Any = backend.forward(request, algorithm, own, Inputs(x, y, inputs.mask, inputs.batch_shape))[0]
    leaves = [x, *([] if y is x else [y]), *own.values()]
    torch.autograd.grad(out, leaves, pull, allow_unused=True)


def dry_run(backend: Backend, request: Request, algorithm: str) -> Cost:
    """Operations, traffic and peak memory of one call beyond its tokens and parameters, with ``request.gradient`` of
    forward and backward together, the gradients of the parameters included.

    A mask is taken to have one value per item and pair.
    """
    native = algorithm in NATIVE
    mode: AbstractContextManager[Any] = FakeTensorMode(allow_non_fake_inputs=True) if native else nullcontext()
    device, dtype = request.device if native else "meta", getattr(torch, request.dtype)
    operator, layout = request.operator, request.operator.layout
    with mode:

        def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=kind, device=device)

        params = {name: empty(*shape) for name, shape in operator.parameters.items()}
        x = empty(request.batch, layout.num_queries, operator.dim)
        alone = layout.is_self and operator.keys_dim == operator.dim
        y = x if alone else empty(request.batch, layout.num_keys, operator.keys_dim)
        pull = empty(request.batch, layout.num_queries, operator.out_features)
        mask = None
        if request.mask != "none":
            kind = torch.bool if request.mask == "bool" else dtype
            mask = empty(request.batch, 1, layout.num_queries, layout.num_keys, kind=kind)
        inputs = Inputs(x, y, mask, (request.batch,))
        given = [x, y, pull, *params.values(), *([] if mask is None else [mask])]
        with Counter(given) as counter:
            compute(backend, request, algorithm, params, inputs, pull)
    parameters = operator.num_parameters * ITEM_BYTES[request.dtype]
    return Cost(counter.flops, counter.peak, parameters, counter.traffic, True, counter.saved)
