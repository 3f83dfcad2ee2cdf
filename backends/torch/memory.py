"""What outlives a call: tensors that are made once, and on a CPU the memory that a thread's calls work in.

To look up a range of rows takes as long as to call an operation on it, and a visit has as many views as operations.
"""

import math
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from translution.backends.torch.stretches import Stretch

Result = TypeVar("Result")
# A thread keeps no more than this, and of calls that need more nothing; views of as many kinds of call.
MOST_BYTES = 32 << 20
MOST_CALLS = 8
_ALIGNMENT = 64
_own = threading.local()


def kept(compute: Callable[..., Result]) -> Callable[..., Result]:
    """Tensors that outlive the call must be usable in every mode, whatever holds where the first call is made.

    Inference mode, the transforms of ``torch.func`` and fake tensors belong to a thread: another one has none of them.
    """

    @wraps(compute)
    def computed(*arguments: Any) -> Result:
        if getattr(_own, "thread", False):
            return compute(*arguments)
        with ThreadPoolExecutor(1, initializer=setattr, initargs=(_own, "thread", True)) as another:
            return another.submit(compute, *arguments).result()

    return computed


class Store:
    """Where tensors come from, one after another: a ``room`` of bytes, and what it has no space for from elsewhere.

    ``most`` is what was taken at most at a time. ``sizes`` has how large what grows became, from one call to the next.
    """

    def __init__(self, room: Tensor | None = None, sizes: dict[Hashable, int] | None = None) -> None:
        self.room, self.most, self._taken = room, 0, 0
        self._sizes = {} if sizes is None else sizes

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """As ``like.new_empty(shape)``."""
        size = math.prod(shape) * like.element_size()
        start, self._taken = self._taken, self._taken + _aligned(size)
        self.most = max(self.most, self._taken)
        if self.room is None or self._taken > len(self.room):
            return like.new_empty(shape)
        return self.room[start : start + size].view(like.dtype).view(shape)

    def rest(self) -> Tensor | None:
        """The room that is not taken yet."""
        return None if self.room is None else self.room[self._taken :]

    def grown(self, name: Hashable, like: Tensor, before: int, size: int) -> Tensor:
        """At least ``size`` numbers in place of ``before``, which were let go: as many as this ``name`` ever had."""
        if self.room is None:
            self._taken -= _aligned(before * like.element_size())
        self._sizes[name] = max(size, self._sizes.get(name, 0))
        return self.empty(like, self._sizes[name])


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


class Memory:
    """What one call works in, and keeps for the next of its kind: nothing of it may hold a tensor given to the call,
    or the memory itself, but only its store."""

    def __init__(
        self, key: Hashable = None, room: Tensor | None = None, sizes: dict[int, dict[Hashable, int]] | None = None
    ) -> None:
        self.key, self.store = key, Store(room)
        self._sizes = {} if sizes is None else sizes
        self._made: dict[Hashable, Any] = {}
        self._parts: dict[int, Memory] = {}
        self._most = 0

    @property
    def room(self) -> Tensor | None:
        """What of it the thread keeps."""
        return self.store.room

    @property
    def taken(self) -> int:
        """Bytes at most at a time."""
        return self.store.most + max(self._most, *(part.taken for part in self._parts.values()), 0)

    @property
    def fits(self) -> bool:
        """Whether all of it is in the room."""
        return self.room is not None and self.taken <= len(self.room)

    def anew(self, room: Tensor | None = None) -> "Memory":
        """The same kind with nothing made yet."""
        return Memory(self.key, room, self._sizes)

    def part(self, size: int) -> "Memory":
        """What parts of the batch of this size work in, one after another: in the same room as any other.

        It comes after what all parts have together, which is to be taken before.
        """
        found = self._parts.get(size)
        if found is None:
            if self.room is None:  # what the parts before had is freed
                self._most = self.taken - self.store.most
                self._parts.clear()
            found = self._parts[size] = Memory()
            found.store = Store(self.store.rest(), self._sizes.setdefault(size, {}))
        return found

    def views(self) -> list[Tensor]:
        """What is held for later; each takes memory of its own beside the numbers that it shows."""
        return list(_tensors([self._made, *(part._made for part in self._parts.values())]))

    def once(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """What ``make`` makes, and for this key has made before."""
        found: Result | None = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return found


def _tensors(value: object) -> Iterator[Tensor]:
    """Those in dictionaries, sequences and the fields of objects of this package that no layout has."""
    if isinstance(value, Tensor):
        yield value
        return
    own: list[object] = list(value) if isinstance(value, list | tuple) else []
    if isinstance(value, dict):
        own += value.values()
    if type(value).__module__.startswith("translution.backends.torch") and not isinstance(value, Stretch):
        slots = [name for one in type(value).__mro__ for name in getattr(one, "__slots__", ())]
        own += [*getattr(value, "__dict__", {}).values(), *(getattr(value, name) for name in slots)]
    for one in own:
        yield from _tensors(one)


class _Thread(threading.local):
    """One room for all calls of a thread, which come one after another, and the memory of each kind.

    ``most`` is what one of them takes; a kind that has no place in the room yet has made nothing.
    """

    def __init__(self) -> None:
        self.room: Tensor | None = None
        self.most = 0
        self.memories: dict[Hashable, Memory] = {}


_thread = _Thread()


@kept
def _bytes(number: int) -> Tensor:
    return torch.empty(number, dtype=torch.uint8)


def _counter() -> Any:
    """The dispatch mode's ``keep``, where it counts what calls take (dry_run.py)."""
    return getattr(_get_current_dispatch_mode(), "keep", None)


def take(key: Hashable, like: Tensor) -> Memory:
    """Memory for a call on tensors as ``like``, of a kind that ``key`` tells; to be given back when it has ended.

    The first call of a kind leaves nothing behind.
    """
    if (keep := _counter()) is not None:
        keep(None)
        return Memory(key)
    is_plain = type(like) is Tensor and like.device.type == "cpu" and not torch.compiler.is_compiling()
    if not is_plain or _get_current_dispatch_mode() is not None:
        return Memory()
    key = key, torch.is_inference_mode_enabled()  # whose views no other mode may write
    if key not in _thread.memories:
        return Memory(key)
    found, room = _thread.memories.pop(key), _thread.room
    if room is None or len(room) < _thread.most:
        found, room, _thread.room = found.anew(), None, None  # the smaller room goes before the larger comes
        _thread.memories = {kind: memory.anew() for kind, memory in _thread.memories.items()}
        room = _bytes(_thread.most)
    _thread.room = None  # until it is given back: what fails on the way takes it along
    return found if found.room is room else found.anew(room)


def give_back(memory: Memory) -> None:
    """The call has ended, and its results lie elsewhere."""
    if memory.taken > MOST_BYTES:
        return
    if (keep := _counter()) is not None:
        keep(memory)
        return
    if memory.key is None:
        return
    _thread.most = max(_thread.most, memory.taken)
    _thread.room = memory.room if memory.room is not None else _thread.room
    _thread.memories[memory.key] = memory if memory.fits else memory.anew()
    if len(_thread.memories) > MOST_CALLS:
        del _thread.memories[next(iter(_thread.memories))]


def release() -> None:
    """Free what this thread keeps."""
    _thread.room, _thread.most, _thread.memories = None, 0, {}
