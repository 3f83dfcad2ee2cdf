"""``torchrun --nproc-per-node N -m translution.conformance.split_check SPEC ...``: several processes against the bound.

Each operator is computed by all processes together, once with its displacement classes split over them, once with its
parameters cut by ``fully_shard`` (FSDP2) and its items dealt out. Results and all gradients are compared with the exact
ones, element by element, up to the error bound of the dtype; what each process holds, takes and exchanges is compared
with what :mod:`translution.scale` says. Exit code 0 where everything holds, 1 where something does not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import translution
from translution.algorithms import ITEM_BYTES, Request
from translution.backends.torch.dry_run import Counter
from translution.backends.torch.split import dry_run_share, run_share
from translution.conformance.comparison import share as share_of_bound
from translution.conformance.error_model import budget
from translution.scale import merged_bytes, sharded_parameters
from translution.shares import Share, share_of, why_not_split
from translution.spec import Operator, parse_spec

Array = npt.NDArray[Any]
SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Found:
    """What one process found: its worst error as a share of the bound, and bytes beside the predicted ones."""

    spec: str
    way: str
    rank: int
    share: float
    parameters: int
    predicted_parameters: int
    exchanged: int
    predicted_exchanged: int
    working: int | None = None
    predicted_working: int | None = None

    @property
    def holds(self) -> bool:
        """Whether the errors are within their bounds, and every figure is the predicted one.

        What was exchanged may stay a moment longer than it is needed: the library's threads refer to it.
        """
        exact = (self.parameters, self.exchanged) == (self.predicted_parameters, self.predicted_exchanged)
        if self.working is None or self.predicted_working is None:
            return self.share <= 1 and exact
        return self.share <= 1 and exact and 0 <= self.working - self.predicted_working <= self.exchanged


class Exchanged(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of what collectives sum, gather and scatter, each as a whole."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = str(func.name())
        if name.startswith("c10d::"):
            # A gathered result is the first argument; what is scattered is the second, as is what is reduced in place.
            own = args[1] if "reduce_scatter" in name else args[0]
            self.size += sum(t.nbytes for t in (own if isinstance(own, list | tuple) else [own]))
        return func(*args, **dict(kwargs or {}))


class ShardedOperator(nn.Module):
    """An operator with its parameters, as ``fully_shard`` takes it."""

    def __init__(self, operator: Operator, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.operator = operator
        self.numbers = nn.ParameterList([nn.Parameter(params[name]) for name in operator.parameters])

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The operator's result."""
        params = dict(zip(self.operator.parameters, self.numbers, strict=True))
        out: Tensor = translution.run(self.operator, params, x, y, algorithm="stream")
        return out.clone()  # fully_shard asks for a result that is no view


class Stack(nn.Module):
    """Operators in a row, each a unit of its own that is gathered and freed."""

    def __init__(self, layers: Sequence[ShardedOperator]) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__()
        self.layers = nn.ModuleList(layers)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (*layers, self):
            fully_shard(module, mesh=mesh)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The last operator's result; every one has the same keys, or its queries for keys."""
        for layer in self.layers:
            x = layer(x, y)
        return x


def held(tensors: Sequence[Tensor]) -> int:
    """Bytes of the memory behind these tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Check:
    """One operator in this process, on normal values: the same in every process."""

    def __init__(self, spec: str, operator: Operator, batch: int, dtype: str) -> None:
        self.spec, self.operator, self.dtype = spec, operator, dtype
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.request = Request(operator, batch, dtype, gradient=True)
        generator, layout = np.random.default_rng(0), operator.layout

        def normal(*shape: int, scale: float = 1.0) -> Array:
            drawn: Array = (scale * generator.standard_normal(shape)).astype(dtype)
            return drawn

        self.params = {
            name: normal(*shape, scale=shape[-2] ** -0.5 if len(shape) > 1 else 1.0)
            for name, shape in operator.parameters.items()
        }
        alone = layout.is_self and operator.keys_dim == operator.dim
        self.x = normal(batch, layout.num_queries, operator.dim)
        self.y = None if alone else normal(batch, layout.num_keys, operator.keys_dim)
        self.pull = normal(batch, layout.num_queries, operator.out_features)
        self.exact = budget(operator, self.params, self.x, self.y, None, self.pull, dtype)

    def _tokens(self, part: slice) -> dict[str, Tensor]:
        """Leaves of these items."""
        every = {"x": self.x, **({} if self.y is None else {"y": self.y})}
        return {name: torch.from_numpy(value[part].copy()).requires_grad_() for name, value in every.items()}

    def _compared(self, name: str, got: Tensor, part: Callable[[Any], Any]) -> float:
        want, bound = (
            (self.exact.value, self.exact.out)
            if name == "out"
            else (self.exact.gradient_values[name], self.exact.gradients[name])
        )
        return share_of_bound(name, got, part(want), part(bound), dtype=self.dtype)

    def split(self) -> Found:
        """The displacement classes split over the processes."""
        own, tokens, pull = share_of(self.operator, self.rank, self.world), self._tokens(slice(None)), self.pull.copy()
        params = {name: torch.from_numpy(v.copy()).requires_grad_() for name, v in own.take(self.params).items()}
        leaves, cotangent = {**tokens, **params}, torch.from_numpy(pull)
        with Exchanged() as exchanged, Counter([cotangent, *leaves.values()]) as counter:
            out = run_share(own, params, tokens["x"], tokens.get("y"))
            gradients = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
        errors = [self._compared("out", out, lambda exact: exact)]
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            got = torch.zeros_like(leaf) if gradient is None else gradient
            errors.append(self._compared(name, got, partial(_rows, own, name)))
        return Found(
            self.spec, "split displacements", self.rank, max(errors),
            held(list(params.values())), own.num_parameters * ITEM_BYTES[self.dtype],
            exchanged.size, merged_bytes(self.request),
            counter.peak, dry_run_share(own, self.request).working_bytes,
        )  # fmt: skip

    def sharded(self) -> Found:
        """Every parameter cut along its first axis, the items dealt out."""
        mine = slice(self.rank, None, self.world)
        layer = ShardedOperator(self.operator, {name: torch.from_numpy(v.copy()) for name, v in self.params.items()})
        model, tokens = Stack([layer]), self._tokens(mine)
        with Exchanged() as exchanged:
            out = model(**tokens)
            out.backward(torch.from_numpy(self.pull[mine].copy()))
        errors = [self._compared("out", out, lambda exact: exact[mine])]
        for name, leaf in tokens.items():
            got = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            errors.append(self._compared(name, got, lambda exact: exact[mine]))
        numbers: list[Any] = list(layer.numbers)
        for name, parameter in zip(self.operator.parameters, numbers, strict=True):
            # fully_shard takes the mean over the processes, and the exact gradient is the sum over all items.
            errors.append(self._compared(name, parameter.grad.full_tensor() * self.world, lambda exact: exact))
        own = sharded_parameters(self.operator, self.world) * ITEM_BYTES[self.dtype]
        return Found(
            self.spec, "fully sharded", self.rank, max(errors),
            held([parameter.to_local() for parameter in numbers]), own, exchanged.size, 3 * self.world * own,
        )  # fmt: skip


def _rows(own: Share, name: str, exact: Array) -> Any:
    """Of a table's exact gradient the rows that this process owns; else all of it."""
    return own.take({name: exact})[name]


def checked(specs: Sequence[str], batch: int, dtype: str) -> list[Found]:
    """Every operator in both ways, as far as its classes can be dealt out to so many processes."""
    found = []
    for spec in specs:
        one = Check(spec, parse_spec(spec), batch, dtype)
        if not why_not_split(one.operator, one.world):
            found.append(one.split())
        found.append(one.sharded())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where everything holds in every process."""
    parser = argparse.ArgumentParser(prog="translution.conformance.split_check", description=__doc__)
    parser.add_argument("specs", nargs="+", metavar="SPEC")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="written by process 0, with all processes' figures")
    parser.add_argument("--store", type=Path, metavar="FILE", help="where processes meet without torchrun")
    parser.add_argument("--rank", type=int, default=-1)
    parser.add_argument("--world", type=int, default=-1)
    options = parser.parse_args(arguments)
    place = "env://" if options.store is None else f"file://{options.store}"
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", place, rank=options.rank, world_size=options.world, timeout=limit)
    try:
        own = checked(options.specs, options.batch, options.dtype)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, own)
        found: list[Found] = [one for process in every for one in process]
        if dist.get_rank() == 0:
            for one in found:
                print(f"{'holds' if one.holds else 'FAILS'} {one}")  # noqa: T201
            if options.json is not None:
                rows = [{**asdict(one), "holds": one.holds} for one in found]
                options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        return 0 if all(one.holds for one in found) else 1
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # What still refers to a group when the interpreter ends would have gloo's threads abort it.
    os._exit(code)
