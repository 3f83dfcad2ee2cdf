"""Rows of tokens visit by visit: read from the bands that are open, or summed into them; and room for one product."""

import math

import torch
from torch import Tensor

from translution.backends.torch.visits import Band, Place


class _Lane:
    """The bands that are open: their rows in the tokens themselves, or in a copy."""

    def __init__(self, tokens: Tensor) -> None:
        _, self._batch, self._features = tokens.shape
        self._tokens = tokens.flatten(1)
        self._rows = self._buffer = tokens.new_empty((0, self._features))
        self._bands: tuple[Band, ...] = ()
        self._is_copy = False
        # Roles and both directions ask for the same rows again: a look costs less than to make the view anew.
        self._place: Place | None = None
        self._view = self._rows
        self._turned = self._turned_buffer = tokens.new_empty(0)

    def holds(self, place: Place) -> bool:
        """Whether the bands of ``place`` are open."""
        return place.bands is self._bands

    def open(self, place: Place) -> None:
        """Make room for the rows of all bands, where they don't lie in the tokens together."""
        self._bands, self._place, self._view = place.bands, None, self._tokens
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
        self._bands, self._is_copy, self._place = (), False, None

    def _copies(self) -> list[tuple[Band, Tensor]]:
        if not self._is_copy:
            return []
        parts = torch.split(self._rows, [band.length * self._batch for band in self._bands])
        return [(b, p.view(b.length, self._tokens.shape[1])) for b, p in zip(self._bands, parts, strict=True)]

    def rows(self, place: Place) -> Tensor:
        """The rows of ``place``, whose bands are open."""
        if place is not self._place:
            row = self._batch * self._features
            self._place = place
            self._view = self._rows.as_strided(
                (place.displacements, place.count * self._batch, self._features),
                (max(place.stride, 1) * row, self._features, 1),
                self._rows.storage_offset() + place.first * row,
            )
        return self._view

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
    """Rows of tokens [N, B, F], band by band."""

    def __init__(self, tokens: Tensor) -> None:
        self.shape = tokens.shape
        if tokens.flatten(1).stride(1) != 1:  # one feature that is expanded to all
            tokens = tokens.contiguous()
        self._lanes = _Lane(tokens), _Lane(tokens)

    def rows(self, place: Place) -> Tensor:
        """The rows of ``place`` [displacements, P * B, F], not to be written."""
        lane = self._lanes[place.lane]
        if not lane.holds(place):
            lane.open(place)
            lane.read()
        return lane.rows(place)

    def turned(self, place: Place) -> Tensor:
        """What :meth:`rows` gives, [displacements, F, P * B]."""
        self.rows(place)
        return self._lanes[place.lane].turned(place)


class Adder:
    """Sums into tokens [N, B, F], band by band."""

    def __init__(self, tokens: Tensor) -> None:
        self._lanes = _Lane(tokens), _Lane(tokens)

    def rows(self, place: Place) -> Tensor:
        """The sums of ``place`` [displacements, P * B, F], to add to."""
        lane = self._lanes[place.lane]
        if not lane.holds(place):
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

    def __call__(self, *shape: int) -> Tensor:
        """Room of this shape, until the next call."""
        size = math.prod(shape)
        if len(self._room) < size:
            self._room = self._room.new_empty(size)
        return self._room[:size].view(shape)
