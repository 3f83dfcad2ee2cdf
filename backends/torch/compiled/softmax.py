"""Algorithm ``compiled``: a softmax over links, forward and backward, by kernels that hold rows of one block of links.

As in ``stream`` m_i is 0 where no sum comes near the ends of the number range, else the largest logit
(attention.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from translution.backends.torch import memory
from translution.backends.torch.attention import Attention, Softmax, far
from translution.backends.torch.call import Call, Gathered
from translution.backends.torch.compiled import launch
from translution.backends.torch.compiled.plan import Numbers, Plan, Steps, common, sizes_of, steps
from translution.backends.torch.compiled.sizes import Sizes
from translution.backends.torch.encoding import Encoded
from translution.backends.torch.links import Links
from translution.backends.torch.memory import Memory
from translution.errors import NotSupported
from translution.normal_form import NormalForm


def _count(call: Call, sizes: Sizes, batch: int) -> None:
    """Tell the mode that counts (dry_run.py) what a kernel does: products, tables read and written, rows of tokens."""
    rows, tables = call.links.count * batch, len(call.links.geometry.steps)
    numbers = sum(number * size for number, size in zip(sizes.products, sizes.table_sizes, strict=True))
    features = sum(source.features * (1 + 2 * source.wanted) for source in sizes.sources)
    features += 3 * sizes.features(sizes.roles[2])
    counter: Any = _get_current_dispatch_mode()
    if hasattr(counter, "count"):
        counter.count(2 * rows * numbers, 4 * (tables * numbers + rows * features))


@dataclass(frozen=True, slots=True)
class _Forward:
    """All of the batch, part after part. ``bias`` [T, H]; ``nothing`` is 0 for every query and head."""

    attention: Attention
    bias: Tensor
    nothing: Tensor
    tensors: Sequence[Tensor]
    sizes: Sizes
    numbers: Numbers

    def _call(self, name: str, totals: Sequence[Tensor], highest: Tensor, part: slice, own: Memory) -> None:
        """Run ``name``; results are added to the part's ``totals``, the largest logits taken into the last of them."""
        call, plan = self.attention.call, self.plan
        size = part.stop - part.start
        room = own.once("room", lambda: plan.room(size, self.nothing, own.store))
        found = steps(call.links.geometry)
        start = 0.0 if name == "sums" else -torch.inf
        given = room.opened(totals, highest.shape[1], found.cut(size, room.number), (0.0, start))
        outs, highests = given.pop("each")
        values = {**common(self.numbers, found, self.tensors, part), **given, "outs": outs, "totals": highests}
        values |= {"scale": self.attention.scale, "bias": self.bias, "highest": highest[:, part]}
        if self.nothing.is_meta:
            _count(call, self.sizes, size)
            return
        launch.forward(self.sizes, name, values)
        if name == "sums":
            room.close(totals)
        else:
            room.raise_to(totals[1])

    @property
    def plan(self) -> Plan:
        """How links and batch are shared out."""
        (queries, _, heads), features = self.nothing.shape, self.sizes.features(self.sizes.roles[2])
        return Plan(
            steps(self.attention.call.links.geometry), self.sizes, ((queries, features), (queries, heads)), False
        )

    def run(self, out: Tensor, total: Tensor, work: Memory) -> Tensor | None:
        """Add o_i s_i and s_i to zeros; m_i, None where all are 0."""
        links, highest = self.attention.call.links, None
        for part in self.plan.parts(out.shape[1]):
            own, sums = work.part(part.stop - part.start), [out[:, part], total[:, part]]
            self._call("sums", sums, self.nothing, part, own)
            where = far(links, None, [sums[0]], sums[1])
            if where is None:
                continue
            highest = torch.zeros_like(total) if highest is None else highest
            sums[0].zero_()
            largest = highest[:, part].fill_(-torch.inf)
            self._call("highest", [sums[0], largest], self.nothing, part, own)
            largest.masked_fill_(~where, 0.0)
            sums[1].zero_()
            self._call("sums", sums, highest, part, own)
        return highest


@dataclass(frozen=True, slots=True)
class _Backward:
    """All of the batch, part after part."""

    attention: Attention
    tensors: Sequence[Tensor]
    needs: Sequence[bool]
    sizes: Sizes
    numbers: Numbers
    by_query: dict[str, Tensor]
    by_class: Tensor

    @classmethod
    def of(
        cls,
        attention: Attention,
        bias: Tensor | None,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        cotangent: Tensor,
        out: Tensor,
        total: Tensor,
        highest: Tensor | None,
    ) -> "_Backward":
        """From what the forward saved."""
        call = attention.call
        by_query = {
            "highest": torch.zeros_like(total) if highest is None else highest,
            "inverse": 1.0 / total,
            "minus_delta": (cotangent * out).sum(-1).neg_(),
            "cotangent": cotangent.flatten(2).contiguous(),
        }
        classes = call.links.geometry.num_classes, total.shape[2]
        by_class = total.new_zeros(classes) if bias is None else bias.contiguous()
        return cls(attention, tensors, needs, *sizes_of(call, tensors, needs), by_query, by_class)

    def run(self) -> list[Tensor | None]:
        """Gradients of the bias and of all tensors, None for what needs none."""
        call, like = self.attention.call, self.tensors[0]
        gathered = Gathered(call, self.tensors, self.needs[1:])
        sources = zip(self.numbers.sources, self.sizes.sources, strict=True)
        numbers = list(dict.fromkeys(number for number, source in sources if source.wanted))
        added = tuple((len(self.tensors[n]), math.prod(self.tensors[n].shape[2:])) for n in numbers)
        plan = Plan(steps(call.links.geometry), self.sizes, added, True)
        d_bias = torch.zeros_like(self.by_class) if self.sizes.bias else None
        work = memory.take(("compiled backward", self.sizes, *call.kind(self.tensors)), like)
        for part in plan.parts(like.shape[1]) if like.shape[1] else ():
            self._part(plan, gathered, numbers, part, work.part(part.stop - part.start), d_bias)
            gathered.close()
        memory.give_back(work)
        return [d_bias, *gathered.results()]

    def _part(
        self, plan: Plan, gathered: Gathered, numbers: Sequence[int], part: slice, own: Memory, d_bias: Tensor | None
    ) -> None:
        call, sizes, size = self.attention.call, self.sizes, part.stop - part.start
        room = own.once("room", lambda: plan.room(size, self.by_class, own.store))
        cuts = plan.steps.cut(size, room.number)
        totals = [total[:, part] for n in numbers if (total := gathered.totals[n]) is not None]
        given = room.opened(totals, self.tensors[0].shape[1], cuts, [0.0] * len(totals))
        by_number = dict(zip(numbers, given.pop("each"), strict=True))
        each_bias = self.by_class.new_zeros((room.number, *self.by_class.shape)) if sizes.bias else None
        values = {
            **common(self.numbers, plan.steps, self.tensors, part),
            **given,
            **{name: tensor[:, part] for name, tensor in self.by_query.items()},
            "scale": self.attention.scale,
            "bias": self.by_class,
            "opens": int(gathered.opens and not plan.steps.share_tables),
            "d_bias": 0 if each_bias is None else launch.pointers([*each_bias]),
            "own_tables": launch.pointers([room.tables, *room.tables][: room.number]),
        }
        values |= {f"d_source {n}": by_number[own] for n, own in enumerate(self.numbers.sources) if own in by_number}
        for n, number in enumerate(self.numbers.tables):
            total = gathered.totals[number]
            values[f"d_table {n}"] = 0 if total is None else total
            if total is not None and gathered.opens and plan.steps.share_tables:
                total.zero_()
        if self.by_class.is_meta:
            _count(call, sizes, size)
            return
        launch.backward(sizes, values)
        room.close(totals)
        if d_bias is not None and each_bias is not None:
            d_bias += each_bias.sum(0)
        self._join(gathered, plan.steps, room.tables, cuts)

    def _join(self, gathered: Gathered, found: Steps, tables: Tensor, cuts: Sequence[tuple[int, int]]) -> None:
        """Add what stretches have of a step that another one began."""
        for number, (step, row) in enumerate(cuts[1:-1]):
            if row == 0 or cuts[number + 2] == (step, row):
                continue
            parts = torch.split(tables[number], self.sizes.table_sizes)
            for number_of_table, table, part in zip(self.numbers.tables, self.sizes.tables, parts, strict=True):
                total = gathered.totals[number_of_table]
                if total is not None:
                    own = found.key_class if table.name == "key" else found.value_class
                    total[int(own[step])] += part.view(total.shape[1:])


@dataclass(frozen=True, slots=True)
class _Compiled(Attention):
    """By kernels, in both directions."""

    def attend(self, bias: Tensor | None, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """o_i [Nq, B, H, Dv], s_i and m_i [Nq, B, H]; None where every m_i is 0."""
        call, like = self.call, tensors[0]
        tensors, (sizes, numbers) = [t.contiguous() for t in tensors], sizes_of(call, tensors)
        rows = call.links.geometry.num_queries, like.shape[1]
        out, total = like.new_zeros((*rows, sizes.features(sizes.roles[2]))), like.new_zeros((*rows, sizes.heads))
        for tensor in (*tensors, out):
            if type(tensor) not in (Tensor, Parameter):
                reason = f"compiled: a {type(tensor).__name__} is given, kernels read plain tensors alone"
                raise NotSupported("torch", "compiled", [reason])
        work = memory.take(("compiled forward", sizes, *call.kind(tensors)), like)
        own_bias = like.new_zeros((call.links.geometry.num_classes, sizes.heads)) if bias is None else bias.contiguous()
        highest = _Forward(self, own_bias, torch.zeros_like(total), tensors, sizes, numbers).run(out, total, work)
        memory.give_back(work)
        total.masked_fill_(total == 0, 1.0)
        return torch.unflatten(out, -1, (sizes.heads, -1)).div_(total.unsqueeze(-1)), total, highest

    def gradients(
        self,
        bias: Tensor | None,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        cotangent: Tensor,
        out: Tensor,
        total: Tensor,
        highest: Tensor | None,
    ) -> list[Tensor | None]:
        """Of the bias and of all tensors, None for what needs none, from what :meth:`attend` says."""
        own = [tensor.contiguous() for tensor in tensors]
        return _Backward.of(self, bias, own, needs, cotangent, out, total, highest).run()


def attend(form: NormalForm, links: Links, bias: Tensor | None, query: Encoded, key: Encoded, value: Encoded) -> Tensor:
    """o_i [Nq, B, H, Dv]. ``bias`` is [T, H]."""
    call, tensors = Call.of(links, None, query, key, value)
    scale = torch.full((), form.branches[0].scale, dtype=tensors[0].dtype, device=tensors[0].device)
    return Softmax.call(_Compiled(call, scale, None, None), bias, *tensors)
