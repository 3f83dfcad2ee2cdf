"""One hand-written operation on roles: what both of its directions know, and the gradients as they are gathered."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from translution.backends.torch.bands import Adder, Reader, Scratch
from translution.backends.torch.encoding import Encoded
from translution.backends.torch.links import Links
from translution.backends.torch.memory import Memory
from translution.backends.torch.relevance import LinkMask
from translution.backends.torch.steps import RoleSteps

EVERYTHING = slice(None)


def divided(number: int, size: int, most: int) -> list[slice]:
    """``number`` things of ``size`` bytes in parts of about as many, each of at most ``most`` bytes or a single thing.

    Nothing is one part.
    """
    count = min(max(number, 1), math.ceil(number * size / max(most, 1)) or 1)
    step = math.ceil(number / count) or 1
    return [slice(start, min(start + step, number)) for start in range(0, max(number, 1), step)]


@dataclass(frozen=True, slots=True)
class Call:
    """The roles without their tensors, which torch saves; ``numbers`` tells which of those are a role's.

    Tokens that several roles share are one tensor, with one gradient.
    """

    links: Links
    mask: LinkMask | None
    roles: tuple[Encoded, ...]
    numbers: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, links: Links, mask: LinkMask | None, *roles: Encoded) -> tuple["Call", list[Tensor]]:
        """The call, and its tensors."""
        given: list[Tensor] = []
        numbers: list[tuple[int, ...]] = []
        tokens: dict[int, int] = {}
        for role in roles:
            own = []
            tables = [id(table.matrices) for table in role.tables]
            for tensor in role.tensors:
                number = None if id(tensor) in tables else tokens.get(id(tensor))
                if number is None:
                    number = len(given)
                    given.append(tensor)
                    tokens[id(tensor)] = number
                own.append(number)
            numbers.append(tuple(own))
        nothing = torch.empty(0)
        bare = tuple(role.with_tensors([nothing] * len(role.tensors)) for role in roles)
        without = None if mask is None else replace(mask, added=None)
        return cls(links, without, bare, tuple(numbers)), given

    def with_tensors(self, tensors: Sequence[Tensor]) -> list[Encoded]:
        """The roles with their tensors in place, one after another."""
        return [
            role.with_tensors([tensors[n] for n in own]) for role, own in zip(self.roles, self.numbers, strict=True)
        ]

    def tokens(self, number: int) -> list[int]:
        """Which tensors are the tokens of a role: its base, where there is one, and what its tables multiply."""
        own, with_base = self.numbers[number], self.roles[number].base is not None
        return [*own[:with_base], *own[with_base::2]]

    def matrices(self, number: int) -> list[int]:
        """Which tensors are the tables of a role."""
        return list(self.numbers[number][(self.roles[number].base is not None) + 1 :: 2])

    def is_full(self, tensors: Sequence[Tensor]) -> bool:
        """Whether every role is one full table of the tokens' dtype, with as many heads, and nothing is masked."""
        if self.mask is not None or len(self.roles) != 3:
            return False
        roles, dtype = self.with_tensors(tensors), tensors[self.tokens(0)[0]].dtype
        return all(
            role.base is None
            and not role.turns
            and role.heads == roles[0].heads
            and len(role.tables) == 1
            and role.tables[0].width == role.head_dim
            and role.tables[0].matrices.dim() == 3
            and role.tables[0].matrices.dtype == dtype
            for role in roles
        )

    def kind(self, tensors: Sequence[Tensor]) -> tuple[object, ...]:
        """What tells apart the calls that work in different memory."""
        roles = ((r.name, r.side, r.heads, r.head_dim, *((t.start, t.width) for t in r.tables)) for r in self.roles)
        return self.links, *roles, self.numbers, *((t.shape, t.dtype) for t in tensors)

    def steps(
        self,
        tensors: Sequence[Tensor],
        gathered: "Gathered | None" = None,
        part: slice = EVERYTHING,
        memory: Memory | None = None,
    ) -> list[RoleSteps]:
        """The roles ready to be encoded visit by visit for a part of the batch, and to gather gradients."""
        mask = None if self.mask is None else self.mask.part(part)
        readers: dict[int, Reader] = {}
        memory = Memory() if memory is None else memory
        scratch = memory.once("scratch", lambda: Scratch(tensors[0], memory.store))
        found = []
        for number, role in enumerate(self.with_tensors(tensors)):
            tokens, matrices = self.tokens(number), self.matrices(number)
            for n in tokens:
                if n not in readers:
                    readers[n] = Reader(tensors[n][:, part].flatten(2), None, memory, ("tokens", n))
            adders = [None if gathered is None else gathered.adder(n, part, memory) for n in tokens]
            totals = [None if gathered is None else gathered.totals[n] for n in matrices]
            opens = gathered is None or gathered.opens
            own = [readers[n] for n in tokens]
            found.append(RoleSteps(role, self.links, mask, own, adders, totals, opens, scratch, memory))
        return found


class Gathered:
    """The gradients of a call's tensors, part after part of the batch.

    ``totals`` holds those that are needed, in the dtype of sums; ``opens`` tells whether nothing is in the tables yet.
    """

    def __init__(self, call: Call, tensors: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self._call, self._tensors, self.opens = call, tensors, True
        matrices = {n for number in range(len(call.roles)) for n in call.matrices(number)}
        dtype = tensors[call.tokens(0)[0]].dtype
        self.totals = [
            None if not need
            else tensor.new_empty(tensor.shape, dtype=dtype) if number in matrices
            else tensor.new_zeros(tensor.shape)
            for number, (tensor, need) in enumerate(zip(tensors, needs, strict=True))
        ]  # fmt: skip
        self._adders: dict[int, Adder] = {}

    def adder(self, number: int, part: slice, memory: Memory) -> Adder | None:
        """Where to add the gradient of tokens, until :meth:`close`."""
        total = self.totals[number]
        if total is None:
            return None
        if number not in self._adders:
            self._adders[number] = Adder(total[:, part].flatten(2), None, memory, ("gradients", number))
        return self._adders[number]

    def close(self) -> None:
        """A part of the batch has been gone through."""
        for adder in self._adders.values():
            adder.close()
        self._adders, self.opens = {}, False

    def results(self) -> list[Tensor | None]:
        """One for each of the call's tensors, None for what is not needed."""
        for number, role in enumerate(self._call.roles):
            unused = self._call.links.unvisited["key" if role.name == "key" else "value"]
            for total in (self.totals[n] for n in self._call.matrices(number)):
                if total is not None:
                    for row in range(len(total)) if self.opens else unused:
                        total[row].zero_()
        return [
            None if total is None else total.to(tensor.dtype)
            for total, tensor in zip(self.totals, self._tensors, strict=True)
        ]
