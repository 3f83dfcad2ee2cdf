"""Softmax where some features of every head are relative, and few, for ``stream``: a line of the lattice at a time.

That is alpha-Translution. All logits of a query are held at once, for some of the columns and items of the batch. The
weights of a small batch are kept for the backward, those of a large one computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from translution.backends.torch import memory, plain
from translution.backends.torch.call import Call, Gathered
from translution.backends.torch.derivatives import Operation, gradients_with_graph, without_autocast
from translution.backends.torch.encoding import Encoded
from translution.backends.torch.line_part import LinePart
from translution.backends.torch.line_plan import LinePlan
from translution.backends.torch.line_pull import LinePull
from translution.backends.torch.lines import lines_of
from translution.backends.torch.links import Links
from translution.backends.torch.relevance import LinkMask
from translution.normal_form import NormalForm

# Features of a table, in and out, up to which lines are faster than visits.
FEW = 64


def _attend(plan: LinePlan, tensors: Sequence[Tensor], kept: list[Tensor] | None) -> Tensor:
    """The result [N, B, H, D], the relative features last; ``kept`` gets the weights."""
    _, _, value, *rest = tensors
    width = value.shape[3] + (plan.call.roles[-1].head_dim if plan.has_values else 0)
    out = value.new_empty((*value.shape[:3], width))
    work, batch = plan.take(tensors, kept is not None), value.shape[1]
    turned = plan.turned(rest, work)
    for part in plan.parts(batch, kept is not None):
        LinePart(plan, tensors, turned, part, kept, work.part(part.stop - part.start)).attend(out[:, part])
    memory.give_back(work)
    return out


class _Softmax(Operation):
    @staticmethod
    def forward(ctx: Any, plan: LinePlan, *tensors: Tensor) -> Tensor:
        kept: list[Tensor] | None = [] if plan.keeps_weights(tensors[0].shape[1]) else None
        out = _attend(plan, tensors, kept)
        ctx.plan, ctx.kept = plan, len(kept or ())
        ctx.save_for_backward(out, *(kept or ()), *tensors)
        return out

    @staticmethod
    def compute(plan: LinePlan, *tensors: Tensor) -> Tensor:
        return _attend(plan, tensors, None)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        plan: LinePlan = ctx.plan
        needs = ctx.needs_input_grad[1:]
        out, *tensors = ctx.saved_tensors
        kept, tensors = tensors[: ctx.kept], tensors[ctx.kept :]
        if torch.is_grad_enabled():
            return (None, *gradients_with_graph(lambda *own: plan.whole(own), tensors, needs, cotangent))
        outside, rest = tensors[:3], tensors[3:]
        gathered = Gathered(plan.call, rest, needs[3:])
        d_outside = [torch.empty_like(t) for t in outside]
        work = plan.take([*outside, *rest], bool(kept), backward=True)
        turned = plan.turned(rest, work)
        d_turned = [
            None if t is None or gathered.totals[plan.call.matrices(n)[0]] is None else t.zero_()
            for n, t in enumerate(plan.tables("d turned", rest, work))
        ]
        weights = iter(kept) if kept else None
        for own in plan.parts(out.shape[1], bool(kept)):
            memory_of_part = work.part(own.stop - own.start)
            part = LinePart(plan, tensors, turned, own, kept or None, memory_of_part, gathered, d_turned)
            pull = LinePull(part, cotangent[:, own], out[:, own])
            pull.back(weights)
            gathered.close()
            for total, found in zip(d_outside, (pull.d_query, pull.d_key, pull.d_value), strict=True):
                total[:, own] = torch.unflatten(found, 0, (plan.heads, -1)).permute(2, 1, 0, 3)
            for number, role in enumerate(part.roles):
                d_tokens = gathered.totals[plan.call.tokens(number)[0]]
                if d_tokens is not None:
                    inside = d_tokens[plan.lines.registers :, own]
                    inside.add_(role.d_tokens().view(inside.shape))
        for number, d_table in enumerate(d_turned):
            if d_table is not None:
                table = gathered.totals[plan.call.matrices(number)[0]]
                assert table is not None
                natural = d_table if plan.call.roles[number].name == "key" else d_table.flip(1)
                table[: plan.lines.classes] = natural.transpose(0, 1)
        memory.give_back(work)
        return (None, *d_outside, *gathered.results())


def _is_few(role: Encoded, heads: int) -> bool:
    """Whether the role is one small table for every displacement, or none."""
    if role.turns or role.heads != heads or len(role.tables) + (role.base is not None) != 1:
        return False
    return all(
        table.matrices.dim() == 3 and max(table.matrices.shape[1:]) <= FEW and table.width == role.head_dim
        for table in role.tables
    )


def attend(form: NormalForm, links: Links, mask: LinkMask | None, roles: Sequence[Encoded]) -> Tensor | None:
    """o_i [Nq, B, H, D] for roles query, key and value; None where something else than lines is the way."""
    (branch, *others), heads = form.branches, form.value.num_heads
    if others or branch.kind != "softmax" or not branch.content or branch.bias is not None or len(roles) != 3:
        return None
    lines = None if mask is not None else lines_of(links)
    if lines is None:
        return None
    query, key, value = roles
    spans = plain.relative_span(links, mask, query, key), plain.relative_span(links, mask, value)
    inside = []
    for span, own in zip(spans, ((query, key), (value,)), strict=True):
        if span == (0, own[0].head_dim):
            return None
        if span[0] < span[1]:
            inside += [plain.within(role, span) for role in own]
    if not any(role.tables for role in inside) or not all(_is_few(role, heads) for role in inside):
        return None
    outside = [plain.outside(role, span) for role, span in ((query, spans[0]), (key, spans[0]), (value, spans[1]))]
    call, tensors = Call.of(links, mask, *inside)
    features = heads * max(query.head_dim, value.head_dim)
    plan = LinePlan(lines, call, branch.scale, features)
    found = _Softmax.call(plan, *outside, *tensors)
    if spans[1][0] == spans[1][1]:
        return found
    width = outside[2].shape[3]
    return plain.joined(found[..., :width], found[..., width:], spans[1][0])
