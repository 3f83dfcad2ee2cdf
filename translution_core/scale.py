"""What every device holds where an operator, or a stack of them, is computed by several: ways to distribute it.

one device            everything
data parallel         the items of a batch are dealt out, everything else is everywhere (``DistributedDataParallel``)
fully sharded         items are dealt out, and every parameter, gradient and moment is cut along its first axis; the
                      parameters of one layer at a time are gathered where they are needed (``fully_shard``, FSDP2)
split displacements   the displacement classes are dealt out (:mod:`translution.shares`): each device has its rows of
                      the tables for itself, sees every item, and what it finds is merged (``backends.torch.split``)

The unit that ``fully_shard`` gathers is one layer's operator. A layer is one operator, applied to the result of the one
before; what stands between two in a network is not counted, nor are tokens, what a communication library takes for
itself and what an allocator leaves unused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module

from translution.algorithms import ITEM_BYTES, Cost, Request, cost
from translution.errors import NotSupported
from translution.execution import MOST_LINKS, predict, reasons_against
from translution.geometry import count_links
from translution.progress import Update, silently
from translution.registry import BACKENDS, get_backend
from translution.shares import num_groups, read_by_links, shares, why_not_split
from translution.spec import Operator

WAYS = ("one device", "data parallel", "fully sharded", "split displacements")


@dataclass(frozen=True, slots=True)
class Need:
    """What the device with the most of everything holds and does, in bytes and operations of one step.

    ``items``: of the batch, at most. ``gathered``: copies of a layer's parameters and gradients beyond the device's own
    parts. ``working``: all else that a layer takes at most, and what every other layer keeps for its backward.
    ``sent``: by every device, which receives as much, with ring algorithms. ``counted``: whether ``working`` was.
    """

    way: str
    devices: int
    items: int
    parameters: int
    gradients: int
    optimiser: int
    gathered: int
    working: int
    sent: int
    flops: int
    counted: bool

    @property
    def total(self) -> int:
        """Bytes of everything together, as if all of it were there at the same time."""
        return self.parameters + self.gradients + self.optimiser + self.gathered + self.working


@dataclass(frozen=True, slots=True)
class Placement:
    """One way on the devices there are: what it needs, or why it can't be.

    ``fewest``: devices on which it would fit, 0 where it fits on no number of them, None where nobody looked.
    """

    way: str
    need: Need | None
    reasons: tuple[str, ...]
    fewest: int | None = None


def ring_all_reduce(size: int, devices: int) -> int:
    """Bytes that each device sends to have ``size`` bytes summed on all of them: 2 (n - 1) / n of them."""
    return _part(2 * size * (devices - 1), devices)


def ring_all_gather(size: int, devices: int) -> int:
    """Bytes that each device sends so that all have all ``size`` bytes, or, scattered, its sums: (n - 1) / n."""
    return _part(size * (devices - 1), devices)


def _part(count: int, parts: int) -> int:
    """The largest of ``parts`` equal parts."""
    return -(-count // parts)


def why_not(request: Request, way: str, devices: int) -> list[str]:
    """Reasons why that way can't be, whatever memory there is."""
    if way == "one device":
        return [] if devices >= 1 else ["there is no device"]
    if way != "split displacements":
        return []
    if request.mask != "none":
        return ["a mask is given: split displacements take none"]
    if count_links(request.operator.layout) > MOST_LINKS:
        return [f"more than {MOST_LINKS:,} links are not counted"]
    return why_not_split(request.operator, devices)


def need(request: Request, way: str, devices: int, layers: int = 1) -> Need:
    """What one device holds where ``layers`` operators of a request are distributed in that way.

    ``request.batch`` is the whole batch; ``request.gradient`` counts gradients and AdamW's moments as well.

    Raises:
        NotSupported: that way can't be; carries every reason.
    """
    if way not in WAYS or devices < 1 or layers < 1:
        known = f"ways are {', '.join(WAYS)}, devices and layers at least 1"
        raise ValueError(f"way={way!r}, devices={devices}, layers={layers}: {known}")
    if reasons := why_not(request, way, devices):
        raise NotSupported("torch", way, reasons)
    if way == "split displacements":
        items, found = request.batch, _counted_shares(request, devices)
    else:
        devices = 1 if way == "one device" else devices
        items = _part(request.batch, devices)
        found = (_counted(replace(request, batch=items)),)
    numbers, gathered = _held(request, way, devices, layers)
    parameters, gradients, optimiser = _state(request, numbers)
    return Need(
        way=way,
        devices=devices,
        items=items,
        parameters=parameters,
        gradients=gradients,
        optimiser=optimiser,
        gathered=gathered,
        working=max(_stacked(one, request, layers) for one in found),
        sent=layers * _sent(request, way, devices),
        flops=layers * max(one.flops for one in found),
        counted=all(one.counted for one in found),
    )


def _held(request: Request, way: str, devices: int, layers: int) -> tuple[int, int]:
    """Numbers that a device holds of the parameters, and bytes of others that it gathers."""
    operator = request.operator
    if way == "split displacements":
        return layers * max(share.num_parameters for share in shares(operator, devices)), 0
    if way != "fully sharded":
        return layers * operator.num_parameters, 0
    own = sharded_parameters(operator, devices)
    if devices == 1:
        copies = 0
    elif request.gradient:
        # At most: a layer's parameters and gradient, the parameters of the one before it on their way, and the gradient
        # of the one after it, being scattered.
        copies = 1 + min(layers, 3)
    else:
        # A layer's parameters, in one piece as they arrive and each on its own, and what arrived for the last one.
        copies = 1 + min(layers, 2)
    return layers * own, copies * own * devices * ITEM_BYTES[request.dtype]


def _state(request: Request, numbers: int) -> tuple[int, int, int]:
    """Bytes of so many parameters, of their gradients and of AdamW's two moments, in float32 or in what is wider."""
    item = ITEM_BYTES[request.dtype]
    return numbers * item, request.gradient * numbers * item, request.gradient * 2 * numbers * max(item, 4)


def _sent(request: Request, way: str, devices: int) -> int:
    """Bytes that a device sends in one layer's step."""
    if way == "split displacements":
        return ring_all_reduce(merged_bytes(request), devices)
    item = ITEM_BYTES[request.dtype]
    if way == "fully sharded":
        # The parameters are gathered for the forward and again for the backward, the gradient is scattered.
        layer = sharded_parameters(request.operator, devices) * devices * item
        return (3 if request.gradient else 1) * ring_all_gather(layer, devices)
    return ring_all_reduce(request.operator.num_parameters * item, devices) if request.gradient else 0


def sharded_parameters(operator: Operator, devices: int) -> int:
    """Numbers that each device holds of an operator's parameters, every one cut along its first axis and padded."""
    return sum(_part(shape[0], devices) * math.prod(shape[1:]) for shape in operator.parameters.values())


def merged_bytes(request: Request) -> int:
    """Bytes that split displacements sum over the devices in one layer's step, in the accumulation dtype.

    Forward: for every softmax the highest logit and the sum of each query and head, and the values' weighted sums.
    Backward: the gradient of the tokens, and of the parameters, in their dtype, that links read and no class divides.
    """
    operator, form = request.operator, request.normal_form
    layout, shapes, value = operator.layout, operator.parameters, form.value
    apart = [t for t in value.linears if t.table is not None and t.after is not None]
    together = len(apart) < len(value.linears) or bool(value.constants)
    width = sum(shapes[t.after][0] for t in apart if t.after is not None) + (value.head_dim if together else 0)
    sums = sum(width + (2 if branch.kind == "softmax" else 0) for branch in form.branches)
    count = request.batch * layout.num_queries * operator.num_heads * sums
    if not request.gradient:
        return count * max(ITEM_BYTES[request.dtype], 4)
    queries, keys = layout.num_queries * operator.dim, layout.num_keys * operator.keys_dim
    from_queries = queries if form.query is not None and form.query.linears else 0
    from_keys = keys if value.linears or (form.key is not None and form.key.linears) else 0
    alone = layout.is_self and operator.keys_dim == operator.dim
    count += request.batch * (max(from_queries, from_keys) if alone else from_queries + from_keys)
    read = sum(math.prod(shapes[name]) for name in read_by_links(operator))
    return count * max(ITEM_BYTES[request.dtype], 4) + read * ITEM_BYTES[request.dtype]


def _stacked(found: Cost, request: Request, layers: int) -> int:
    """Working memory of a stack without its gradients: one layer's, and what the others keep for their backward."""
    if not request.gradient:
        return found.working_bytes
    saved = found.saved_bytes
    if saved is None:
        saved = cost(replace(request, gradient=False), "stream").working_bytes
    return found.working_bytes - found.parameter_bytes + (layers - 1) * saved


@lru_cache(maxsize=256)
def _counted(request: Request) -> Cost:
    """What torch takes with the algorithm that by estimate takes the least, of those that run on every device."""
    request, backend = replace(request, device="cpu"), get_backend("torch")
    every = [name for name in backend.algorithms if name != "compiled"]
    runs = [name for name in every if not reasons_against(backend, request, name)]
    return predict(backend, request, min(runs, key=lambda name: cost(request, name).working_bytes))


@lru_cache(maxsize=256)
def _counted_shares(request: Request, devices: int) -> tuple[Cost, ...]:
    """What the device with the most parameters and the one with the most links take: as a rule they are one."""
    split = import_module(f"{BACKENDS['torch']}.split")
    hands = shares(request.operator, devices)
    most = max(hands, key=lambda share: (share.num_parameters, share.num_links))
    busiest = max(hands, key=lambda share: (share.num_links, share.num_parameters))
    return tuple(split.dry_run_share(share, request) for share in dict.fromkeys((most, busiest)))


def fewest_devices(request: Request, way: str, memory: int, layers: int = 1) -> int:
    """The fewest devices of ``memory`` bytes on which that way fits; 0 where it fits on no number of them."""
    if why_not(request, way, 1):
        return 0
    # What is held is known at once; counting what a call takes takes seconds.
    extents = [shape[0] for shape in request.operator.parameters.values()]
    most = {
        "one device": 1,
        "data parallel": max(request.batch, 1),
        "fully sharded": max([request.batch, 1, *extents]),
        "split displacements": num_groups(request.operator.layout),
    }[way]
    room = {}
    for devices in range(1, most + 1):
        numbers, gathered = _held(request, way, devices, layers)
        room[devices] = memory - sum(_state(request, numbers)) - gathered
    least = need(request, way, most, layers).working
    start = next((devices for devices in room if least <= room[devices]), None)
    if start is None:
        return 0
    roomiest = max(room.values())
    first = _first(start, most, lambda devices: need(request, way, devices, layers).working <= roomiest)

    def fits(devices: int) -> bool:
        return room[devices] > 0 and need(request, way, devices, layers).working <= room[devices]

    # Parts that are padded to be equal make room uneven, and what a call takes may grow a little with the devices.
    found = next((n for n in range(first, most + 1) if fits(n)), 0)
    while found > 1 and fits(found - 1):
        found -= 1
    return found


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The first for which something holds that holds for ``high`` and for all between; near ``low`` at little cost."""
    step, found = 1, low
    while found < high and not holds(found):
        low, found, step = found + 1, min(found + step, high), 2 * step
    while low < found:
        middle = (low + found) // 2
        if holds(middle):
            found = middle
        else:
            low = middle + 1
    return found


def placements(
    request: Request, devices: int, memory: int, layers: int = 1, update: Update = silently
) -> list[Placement]:
    """Every way on so many devices of ``memory`` bytes; where none fits, with the fewest devices on which it would.

    Raises:
        NotSupported: torch is not installed, whose operations are counted.
    """
    get_backend("torch")
    found = []
    for number, way in enumerate(WAYS):
        update("ways to distribute it", number, len(WAYS))
        reasons = tuple(why_not(request, way, devices))
        own = None if reasons else need(request, way, devices, layers)
        if own is not None and own.total > memory:
            reasons = (f"{own.total:,} bytes are more than {memory:,}",)
        found.append(Placement(way, own, reasons))
    update("ways to distribute it", len(WAYS), len(WAYS))
    if not all(one.reasons for one in found):
        return found
    for number, one in enumerate(found):
        update("fewest devices", number, len(WAYS))
        found[number] = replace(one, fewest=fewest_devices(request, one.way, memory, layers))
    update("fewest devices", len(WAYS), len(WAYS))
    return found
