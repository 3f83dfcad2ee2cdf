"""Displacement classes split over devices: every device computes its own links, and partial softmaxes are merged.

Each device holds its rows of the tables (:class:`translution.shares.Share`), all tokens of the batch and all other
parameters. With l_ij the logits and R the links of one device, it finds for every query i and head

    highest = max_R l_ij      sum = sum_R exp(l_ij - highest)      o = sum_R exp(l_ij - highest) v_ij

and the devices merge them: top = max over devices of highest, then the sums over devices of exp(highest - top) sum and
exp(highest - top) o; their quotient is the result. What moves is that, and in the backward pass the gradient of the
tokens and of those other parameters that the links read. Tables, their gradients and their moments stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from translution.algorithms import ITEM_BYTES, Cost, Request
from translution.backends.torch import stream
from translution.backends.torch.derivatives import no_autocast
from translution.backends.torch.dry_run import Counter
from translution.backends.torch.encoding import (
    ValuePart,
    accumulator,
    encode_role,
    encode_values,
    join_values,
    project_output,
)
from translution.backends.torch.links import Links, links
from translution.backends.torch.relevance import bias_table
from translution.errors import InputError
from translution.geometry import IntArray, geometry
from translution.normal_form import BiasForm, Branch, normal_form
from translution.shares import Share, read_by_links


class _Total(torch.autograd.Function):
    """The sum over devices of what each has found, on all of them; what follows is the same on every device."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, partial: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.reduce(partial, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, Tensor]:
        return None, _Given.apply(ctx.exchange, *cotangents)  # type: ignore[no-untyped-call]


class _Given(torch.autograd.Function):
    """What is the same on every device, for each to use in its own way; its gradient is the sum over devices."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, same: Tensor) -> Tensor:
        ctx.exchange = exchange
        return same.view_as(same)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, Tensor]:
        return None, _Total.apply(ctx.exchange, *cotangents)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the devices of a process group tell one another; ``silent`` computes one device's part and tells nothing."""

    group: dist.ProcessGroup | None
    silent: bool = False

    def reduce(self, own: Tensor, operation: Any) -> Tensor:
        """Sum or maximum over the devices, in a tensor of its own."""
        found = own.clone(memory_format=torch.contiguous_format)
        if not self.silent:
            dist.all_reduce(found, operation, group=self.group)
        return found

    def total(self, partial: Tensor) -> Tensor:
        """The differentiable sum over devices."""
        found: Tensor = _Total.apply(self, partial)  # type: ignore[no-untyped-call]
        return found

    def given(self, same: Tensor) -> Tensor:
        """A tensor that all devices hold, before each uses it in its own way."""
        found: Tensor = _Given.apply(self, same)  # type: ignore[no-untyped-call]
        return found


def run_share(
    share: Share,
    params: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The operator's result, computed by all devices of a process group together; differentiable.

    Every device calls this at the same point of its program, with its own share, the same tokens and the same values of
    the parameters that no class divides, and gets the same result; what it does with that must be the same too. It then
    finds the whole gradient of the tokens and of these parameters, and that of its own rows of the tables.

    Args:
        share: ``share_of(operator, rank, world)`` for this process's rank in the group and the group's size.
        params: this device's part of the parameters, ``share.take(params)``: names and shapes of ``share.parameters``.
        x: queries [.., Nq, Cq].
        y: keys and values [.., Nk, Ck]; None where they are x.
        group: the process group; None for the default one.

    Returns:
        out [.., Nq, F] in the dtype of x.

    Raises:
        InputError: an array does not fit the share, or the share does not fit the group.
    """
    if not dist.is_initialized():
        raise InputError(
            "B1",
            "no process group",
            f"share {share.rank} of {share.world} is computed together with the others",
            "Call torch.distributed.init_process_group first",
        )
    own = (dist.get_rank(group), dist.get_world_size(group))
    if own != (share.rank, share.world):
        raise InputError(
            "B1",
            f"share {share.rank} of {share.world} in process {own[0]} of {own[1]}",
            "every process computes its own share",
            "Give share_of(operator, dist.get_rank(group), dist.get_world_size(group))",
        )
    return _run(share, params, x, y, Exchange(group))


def _run(share: Share, params: Mapping[str, Tensor], x: Tensor, y: Tensor | None, exchange: Exchange) -> Tensor:
    operator = share.operator
    _check(share, params, x, y)
    with no_autocast(x):
        queries = _tokens(x, geometry(operator.layout).query_index, exchange)
        keys = queries if y is None else _tokens(y, geometry(operator.layout).key_index, exchange)
        read = read_by_links(operator)
        inside = {name: exchange.given(value) if name in read else value for name, value in params.items()}
        heads = _Links(share, inside, queries, keys, exchange).heads()
        out = project_output(normal_form(operator), params, heads).transpose(0, 1).to(x.dtype)
        return out.reshape(*x.shape[:-1], out.shape[-1])


def _check(share: Share, params: Mapping[str, Tensor], x: Tensor, y: Tensor | None) -> None:
    operator, held = share.operator, share.parameters
    found = {name: tuple(value.shape) for name, value in params.items()}
    if found != held:
        wrong = sorted(name for name in found.keys() | held.keys() if found.get(name) != held.get(name))
        raise InputError(
            "P1",
            ", ".join(f"{name}: {found.get(name, 'missing')}" for name in wrong),
            f"share {share.rank} of {share.world} has {', '.join(f'{n}: {held.get(n, None)}' for n in wrong)}",
            "Give share.take(params)",
        )
    expected = [("x", x, (operator.layout.num_queries, operator.dim))]
    if y is not None:
        expected.append(("y", y, (operator.layout.num_keys, operator.keys_dim)))
    elif not operator.layout.is_self or operator.keys_dim != operator.dim:
        expected.append(("x alone, which then stands for y too,", x, (operator.layout.num_keys, operator.keys_dim)))
    for name, tokens, shape in expected:
        if tuple(tokens.shape[-2:]) != shape or tokens.dim() < 2:
            rule = f"it must be [.., {shape[0]}, {shape[1]}]"
            raise InputError("D1", f"{name} has shape {tuple(tokens.shape)}", rule, "Reshape it")
    if len({t.dtype for t in (x, *params.values())} | (set() if y is None else {y.dtype})) > 1:
        raise InputError("D1", "tokens and parameters of several dtypes", "one call has one dtype", "Cast them")


def _tokens(given: Tensor, linked: IntArray, exchange: Exchange) -> Tensor:
    """Tokens position-major, [N, B, C], in the accumulation dtype; those that no link uses are zeroed (clause M4)."""
    dtype = accumulator(given.dtype)
    flat = given.reshape(-1, *given.shape[-2:]).to(dtype).transpose(0, 1).contiguous()
    tokens = exchange.given(flat)
    seen = np.bincount(linked, minlength=len(tokens)) > 0
    if seen.all():
        return tokens
    return torch.where(torch.from_numpy(seen).to(given.device)[:, None, None], tokens, 0.0)


@lru_cache(maxsize=64)
def _share_links(share: Share, device: torch.device) -> Links:
    return links(share.layout, device)


class _Links:
    """One device's links of one call: tokens [N, B, C]; results are [Nq, B, H, D]."""

    def __init__(self, share: Share, params: Mapping[str, Tensor], x: Tensor, y: Tensor, exchange: Exchange) -> None:
        self.share, self.params, self.exchange = share, params, exchange
        self.x, self.y = x, y
        self.form, self.whole = normal_form(share.operator), geometry(share.operator.layout)
        self.links = _share_links(share, x.device)

    def heads(self) -> Tensor:
        """The heads' results, merged over the devices."""
        form, content = self.form, None
        if form.query is not None and form.key is not None:
            query = encode_role(form.query, self.params, self.x, self.whole, "query")
            key = encode_role(form.key, self.params, self.y, self.whole, "key")
            content = stream.inner_products(query, key, self.links, None)
        parts = encode_values(form.value, self.params, self.y, self.whole)
        found = [self._branch(branch, content, parts) for branch in form.branches]
        total = found[0]
        if form.gate is not None:
            gate = self.params[form.gate].to(total.dtype).sigmoid()[:, None]
            total = (1.0 - gate) * found[0] + gate * found[1]
        aggregated = torch.split(total, [part.encoded.head_dim for part in parts], -1)
        return join_values(parts, aggregated, form.value.num_heads, form.value.head_dim)

    def _branch(self, branch: Branch, content: Tensor | None, parts: list[ValuePart]) -> Tensor:
        """What the value parts come to side by side under one relevance, [Nq, B, H, their widths]."""
        if branch.kind != "softmax":
            return self.exchange.total(torch.cat(self._aggregated(self._fixed(branch), parts), -1))
        logits = self._logits(branch, content)
        highest = self._highest(logits.detach())
        weights = (logits - highest.index_select(0, self.links.query_index)).exp()
        sums = torch.zeros_like(highest).index_add(0, self.links.query_index, weights)
        partial = torch.cat((*self._aggregated(weights, parts), sums.unsqueeze(-1)), -1)
        top = self.exchange.reduce(highest, dist.ReduceOp.MAX)
        factor = torch.where(highest == -torch.inf, 0.0, (highest - top).exp())
        merged = self.exchange.total(partial * factor.unsqueeze(-1))
        total = merged[..., -1:]
        # A query without a link has a result of zero (clause M3).
        return merged[..., :-1] / torch.where(total == 0, 1.0, total)

    def _aggregated(self, weights: Tensor, parts: list[ValuePart]) -> list[Tensor]:
        full = weights.expand(self.links.count, self.x.shape[1], self.form.value.num_heads)
        return [stream.aggregate(full, part.encoded, self.links, None) for part in parts]

    def _fixed(self, branch: Branch) -> Tensor:
        """Weights [L, 1, 1] that no content decides."""
        if branch.kind == "ones":
            return torch.ones((self.links.count, 1, 1), dtype=self.x.dtype, device=self.x.device)
        degree = torch.from_numpy(np.bincount(self.whole.query_index, minlength=self.whole.num_queries))
        own = degree.to(self.x.device).index_select(0, self.links.query_index)
        return (1.0 / own.to(self.x.dtype))[:, None, None]

    def _logits(self, branch: Branch, content: Tensor | None) -> Tensor:
        """[L, B, H]."""
        logits = torch.zeros((), dtype=self.x.dtype, device=self.x.device)
        if content is not None and branch.content:
            logits = branch.scale * content
        if branch.bias is not None:
            logits = logits + self._bias(branch.bias).index_select(0, self.links.value_class).unsqueeze(1)
        return logits.expand(self.links.count, self.x.shape[1], self.form.value.num_heads)

    def _bias(self, bias: BiasForm) -> Tensor:
        """The bias of this device's classes, [rows, H]."""
        if bias.kind == "table":
            return bias_table(bias, self.links, self.params, self.x.dtype)
        # A function of the displacement, which the share's own numbers don't tell.
        whole = links(self.share.operator.layout, self.x.device)
        rows = torch.from_numpy(np.array(self.share.value_rows, np.int64)).to(self.x.device)
        return bias_table(bias, whole, self.params, self.x.dtype).index_select(0, rows)

    def _highest(self, logits: Tensor) -> Tensor:
        """The highest logit of every query and head, [Nq, B, H]; -inf where this device has no link."""
        found = logits.new_full((self.whole.num_queries, *logits.shape[1:]), -torch.inf)
        return found.scatter_reduce(0, self.links.query_index[:, None, None].expand_as(logits), logits, "amax")


def dry_run_share(share: Share, request: Request) -> Cost:
    """What one device does and takes at most in one call, counted without computing and without the others.

    ``request`` says batch, dtype and whether there is a backward; its operator is the share's.
    """
    operator, layout, dtype = share.operator, share.operator.layout, getattr(torch, request.dtype)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=request.gradient)

    params = {name: empty(*shape) for name, shape in share.parameters.items()}
    x = empty(request.batch, layout.num_queries, operator.dim)
    alone = layout.is_self and operator.keys_dim == operator.dim
    y = None if alone else empty(request.batch, layout.num_keys, operator.keys_dim)
    pull = empty(request.batch, layout.num_queries, operator.out_features).detach()
    leaves = [x, *([] if y is None else [y]), *params.values()]
    with Counter([pull, *leaves]) as counter, torch.set_grad_enabled(request.gradient):
        out = _run(share, params, x, y, Exchange(None, silent=True))
        found = torch.autograd.grad(out, leaves, pull, allow_unused=True) if request.gradient else ()
    del out, found
    own = share.num_parameters * ITEM_BYTES[request.dtype]
    return Cost(counter.flops, counter.peak, own, counter.traffic, True, counter.saved)
