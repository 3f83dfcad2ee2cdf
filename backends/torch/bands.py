"""Rows of tokens visit by visit: read from the bands that are open, or summed into them; and room for one product."""

import math

import torch
from torch import Tensor

from translution.backends.torch.visits import Band, Place


class _Lane:
    """The bands that are open: their rows in the tokens themselves, or in a copy."""

    def __init__(self, tokens: Tensor, item: tuple[int, int] | None) -> None:
        _, self._batch, self._features = tokens.shape
        self._item, self._tokens = item, tokens.flatten(1)
        self._rows = self._buffer = tokens.new_empty((0, self._features))
        # The bands that are open.
        self.bands: tuple[Band, ...] = ()
        self._is_copy = False
        # Roles and both directions ask for the same rows again: a look costs less than to make the view anew.
        self.place: Place | None = None
        self.view = self._rows
        self._turned = self._turned_buffer = tokens.new_empty(0)

    def open(self, place: Place) -> None:
        """Make room for the rows of all bands, where they don't lie in the tokens together."""
        self.bands, self.place, self.view = place.bands, None, self._tokens
        self._turned = self._turned[:0]
        own = place.bands[0].lies_in(self._tokens) if len(place.bands) == 1 else None
        self._is_copy = own is None
        if own is not None:
            self._rows = own.view(-1, self._features)
            return
        length = place.length * self._batch
        if len(self._buffer) < length:
            self._rows = self._buffer = self._buffer[:0].clone()  # two at a time are one too many
            self._buffer = self._tokens.new_empty((length, self._features))
        self._rows = self._buffer[:length]

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
        parts = torch.split(self._rows, [band.length * self._batch for band in self.bands])
        return [(b, p.view(b.length, self._tokens.shape[1])) for b, p in zip(self.bands, parts, strict=True)]

    def rows(self, place: Place) -> Tensor:
        """The rows of ``place``, whose bands are open."""
        batch, features, item = self._batch, self._features, self._item
        row, number = batch * features, 2 if place.stride else 1
        start = self._rows.storage_offset() + place.first * row
        if item is None:
            sizes: tuple[int, ...] = number, place.count * batch, features
            strides: tuple[int, ...] = place.stride * row or 1, features, 1
        else:
            sizes = number, place.count, batch, *item
            strides = place.stride * row or 1, row, features, item[1], 1
        self.place, self.view = place, self._rows.as_strided(sizes, strides, start)
        return self.view

    def turned(self, place: Place) -> Tensor:
        """The rows of ``place``, each a column, [displacements, F, P * B]; of all bands they are turned at once."""
        if not len(self._turned):
            size = self._rows.numel()
            if len(self._turned_buffer) < size:
                self._turned_buffer = self._turned_buffer[:0].clone()
                self._turned_buffer = self._tokens.new_empty(size)
            self._turned = self._turned_buffer[:size].view(self._features, len(self._rows))
            self._turned.copy_(self._rows.mT)
        return self._turned.as_strided(
            (place.displacements, self._features, place.count * self._batch),
            (max(place.stride, 1) * self._batch, len(self._rows), 1),
            self._turned.storage_offset() + place.first * self._batch,
        )


class Reader:
    """Rows of tokens [N, B, F], band by band. An ``item`` (heads, width) says what F is to be seen as."""

    def __init__(self, tokens: Tensor, item: tuple[int, int] | None = None) -> None:
        self.shape = tokens.shape
        if tokens.flatten(1).stride(1) != 1:  # one feature that is expanded to all
            tokens = tokens.contiguous()
        self._lanes = _Lane(tokens, item), _Lane(tokens, item)

    def rows(self, place: Place) -> Tensor:
        """The rows of ``place``, not to be written: [displacements, P * B, F], by item [displacements, P, B, *item]."""
        lane = self._lanes[place.lane]
        if place is lane.place:
            return lane.view
        if place.bands is not lane.bands:
            lane.open(place)
            lane.read()
        return lane.rows(place)

    def turned(self, place: Place) -> Tensor:
        """What :meth:`rows` gives without an item, as columns [displacements, F, P * B]."""
        self.rows(place)
        return self._lanes[place.lane].turned(place)


class Adder:
    """Sums into tokens [N, B, F], band by band. An ``item`` (heads, width) says what F is to be seen as."""

    def __init__(self, tokens: Tensor, item: tuple[int, int] | None = None) -> None:
        self._lanes = _Lane(tokens, item), _Lane(tokens, item)

    def rows(self, place: Place) -> Tensor:
        """The sums of ``place``, to add to: [displacements, P * B, F], or by item [displacements, P, B, *item]."""
        lane = self._lanes[place.lane]
        if place is lane.place:
            return lane.view
        if place.bands is not lane.bands:
            lane.close()
            lane.open(place)
            lane.clear()
        return lane.rows(place)

    def close(self) -> None:
        """Let the tokens have all sums."""
        for lane in self._lanes:
            lane.close()


class Scratch:
    """Room for one product at a time: what is allocated anew for every visit costs more than to compute it."""

    def __init__(self, like: Tensor) -> None:
        self._room = like.new_empty(0)
        self._views: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, *shape: int) -> Tensor:
        """Room of this shape, until the next call."""
        found = self._views.get(shape)
        if found is None:
            size = math.prod(shape)
            if len(self._room) < size:
                self._views.clear()
                self._room = self._room.new_empty(size)
            found = self._views[shape] = self._room[:size].view(shape)
        return found
