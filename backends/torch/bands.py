"""Rows of tokens visit by visit: read from the bands that are open, or summed into them; and room for one product."""

import math
from collections.abc import Hashable

import torch
from torch import Tensor

from translution.backends.torch.memory import Memory, Store
from translution.backends.torch.visits import Band, Place


class _Copies:
    """Room for the bands of a lane, [rows, features], and what is looked up in it: tensors by number of their object,
    which the layout keeps alive."""

    def __init__(self, name: Hashable, store: Store, like: Tensor, features: int) -> None:
        self._name, self._store, self._like, self._features = name, store, like.new_empty(0), features
        self._rows = self._like.new_empty((0, features))
        self.places: dict[int, Tensor] = {}
        self.bands: dict[int, list[Tensor]] = {}
        self.turned = self._like

    def rows(self, length: int) -> Tensor:
        """So many rows."""
        if len(self._rows) < length:
            before, self.places, self.bands = self._rows.numel(), {}, {}
            self._rows = self._like  # two at a time are one too many
            grown = self._store.grown(("rows", self._name), self._like, before, length * self._features)
            self._rows = grown.view(-1, self._features)
        return self._rows[:length]

    def room_to_turn(self, size: int) -> Tensor:
        """So many numbers."""
        if len(self.turned) < size:
            before, self.turned = len(self.turned), self._like
            self.turned = self._store.grown(("turned", self._name), self._like, before, size)
        return self.turned[:size]


class _Lane:
    """The bands that are open: their rows in the tokens themselves, or in a copy."""

    def __init__(self, tokens: Tensor, item: tuple[int, int] | None, copies: _Copies) -> None:
        _, self._batch, self._features = tokens.shape
        self._item, self._tokens = item, tokens.flatten(1)
        self._room, self._rows = copies, copies.rows(0)
        # The bands that are open.
        self.bands: tuple[Band, ...] = ()
        self._is_copy = False
        # Roles and both directions ask for the same rows again: a look costs less than to make the view anew.
        self.place: Place | None = None
        self.view = self._rows
        self._turned: Tensor | None = None

    def open(self, place: Place) -> None:
        """Make room for the rows of all bands, where they don't lie in the tokens together."""
        self.bands, self.place, self.view = place.bands, None, self._tokens
        self._turned = None
        own = place.bands[0].lies_in(self._tokens) if len(place.bands) == 1 else None
        self._is_copy = own is None
        if own is not None:
            self._rows = own.view(-1, self._features)
            return
        self._rows = self._tokens  # not the copy, which may have to make way
        self._rows = self._room.rows(place.length * self._batch)

    def read(self) -> None:
        """Copy the bands, where rows are a copy."""
        for band, rows in self._copies():
            band.read(self._tokens, rows)

    def clear(self) -> None:
        """Set the copy to zero."""
        if self._is_copy:
            self._rows.zero_()

    def close(self) -> None:
        """Add the copy to the tokens."""
        for band, rows in self._copies():
            band.add(rows, self._tokens)
        self.bands, self._is_copy, self.place = (), False, None

    def _copies(self) -> list[tuple[Band, Tensor]]:
        if not self._is_copy:
            return []
        found = self._room.bands.get(id(self.bands))
        if found is None:
            parts = torch.split(self._rows, [band.length * self._batch for band in self.bands])
            views = [p.view(b.length, self._tokens.shape[1]) for b, p in zip(self.bands, parts, strict=True)]
            found = self._room.bands[id(self.bands)] = views
        return list(zip(self.bands, found, strict=True))

    def rows(self, place: Place) -> Tensor:
        """The rows of ``place``, whose bands are open."""
        found = self._room.places.get(id(place)) if self._is_copy else None
        if found is None:
            found = self._view(place)
            if self._is_copy:
                self._room.places[id(place)] = found
        self.place, self.view = place, found
        return found

    def _view(self, place: Place) -> Tensor:
        batch, features, item = self._batch, self._features, self._item
        row, number = batch * features, 2 if place.stride else 1
        start = self._rows.storage_offset() + place.first * row
        if item is None:
            sizes: tuple[int, ...] = number, place.count * batch, features
            strides: tuple[int, ...] = place.stride * row or 1, features, 1
        else:
            sizes = number, place.count, batch, *item
            strides = place.stride * row or 1, row, features, item[1], 1
        return self._rows.as_strided(sizes, strides, start)

    def turned(self, place: Place) -> Tensor:
        """The rows of ``place``, each a column, [displacements, F, P * B]; of all bands they are turned at once."""
        if self._turned is None:
            self._turned = self._room.room_to_turn(self._rows.numel()).view(self._features, len(self._rows))
            self._turned.copy_(self._rows.mT)
        return self._turned.as_strided(
            (place.displacements, self._features, place.count * self._batch),
            (max(place.stride, 1) * self._batch, len(self._rows), 1),
            self._turned.storage_offset() + place.first * self._batch,
        )


def _lane(tokens: Tensor, item: tuple[int, int] | None, memory: Memory, name: Hashable) -> _Lane:
    _, batch, features = tokens.shape
    key = name, batch, features, item
    return _Lane(tokens, item, memory.once(key, lambda: _Copies(key, memory.store, tokens, features)))


def _lanes(tokens: Tensor, item: tuple[int, int] | None, memory: Memory | None, name: Hashable) -> tuple[_Lane, _Lane]:
    own = Memory() if memory is None else memory
    return _lane(tokens, item, own, (name, 0)), _lane(tokens, item, own, (name, 1))


class _Bands:
    """Rows of tokens [N, B, F], band by band. An ``item`` (heads, width) says what F is to be seen as.

    Copies are what ``memory`` has by this ``name``, and belong to one reader or adder at a time.
    """

    def __init__(
        self,
        tokens: Tensor,
        item: tuple[int, int] | None = None,
        memory: Memory | None = None,
        name: Hashable = None,
    ) -> None:
        self.shape = tokens.shape
        self._lanes = _lanes(self._laid_out(tokens), item, memory, name)

    def _laid_out(self, tokens: Tensor) -> Tensor:
        """The tokens, where lanes can step through them."""
        return tokens

    def _open(self, lane: _Lane, place: Place) -> None:
        """Turn to the bands of ``place``."""
        raise NotImplementedError

    def rows(self, place: Place) -> Tensor:
        """The rows of ``place``: [displacements, P * B, F], or by item [displacements, P, B, *item]."""
        lane = self._lanes[place.lane]
        if place is lane.place:
            return lane.view
        if place.bands is not lane.bands:
            self._open(lane, place)
        return lane.rows(place)


class Reader(_Bands):
    """Reads rows, which are not to be written."""

    def _laid_out(self, tokens: Tensor) -> Tensor:
        one_for_all = tokens.flatten(1).stride(1) != 1  # a feature that is expanded
        return tokens.contiguous() if one_for_all else tokens

    def _open(self, lane: _Lane, place: Place) -> None:
        lane.open(place)
        lane.read()

    def turned(self, place: Place) -> Tensor:
        """What :meth:`rows` gives without an item, as columns [displacements, F, P * B]."""
        self.rows(place)
        return self._lanes[place.lane].turned(place)


class Adder(_Bands):
    """Sums, to be added to, which reach the tokens when other bands are opened, and at the end by :meth:`close`."""

    def _open(self, lane: _Lane, place: Place) -> None:
        lane.close()
        lane.open(place)
        lane.clear()

    def close(self) -> None:
        """Let the tokens have all sums."""
        for lane in self._lanes:
            lane.close()


class Scratch:
    """Room for one product at a time: what is allocated anew for every visit costs more than to compute it."""

    def __init__(self, like: Tensor, store: Store, name: str = "scratch") -> None:
        self._like = self._room = like.new_empty(0)
        self._store, self._name = store, name
        self._views: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, *shape: int) -> Tensor:
        """Room of this shape, until the next call."""
        found = self._views.get(shape)
        if found is None:
            size = math.prod(shape)
            if len(self._room) < size:
                self._views.clear()
                before, self._room = len(self._room), self._like
                self._room = self._store.grown(self._name, self._like, before, size)
            found = self._views[shape] = self._room[:size].view(shape)
        return found
