"""Backends that fail to answer at all: an exam has to survive them. No part of the catalogue."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from translution.algorithms import Request
from translution.conformance.mutants.naive import Naive
from translution.inputs import Inputs


class Raises(Naive):
    """Raises an error of no particular kind."""

    name = "raises"

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Any:
        """Always raises."""
        raise RuntimeError("something broke inside")


class Hangs(Naive):
    """Sleeps for ever."""

    name = "hangs"

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Any:
        """Never returns."""
        while True:
            time.sleep(60)


class Spins(Naive):
    """Computes for ever."""

    name = "spins"

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Any:
        """Never returns."""
        while True:
            pass


class HangsInC(Naive):
    """Sleeps where no Python signal handler can run."""

    name = "hangs-in-c"

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Any:
        """Never returns; the sum of whole numbers looks for no signal."""
        return sum(itertools.repeat(0))


class ReturnsList(Naive):
    """Returns nested lists."""

    name = "returns-a-list"

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Any:
        """The right numbers in the wrong container."""
        return [part if part is None else part.tolist() for part in super().forward(request, algorithm, params, inputs)]


class ReturnsNone(Naive):
    """Returns nothing."""

    name = "returns-none"

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Any:
        """None in place of (out, weights)."""
        return None


class WrongShape(Naive):
    """Returns one row too many."""

    name = "wrong-shape"

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Any:
        """out [B, Nq + 1, F]."""
        out, weights = super().forward(request, algorithm, params, inputs)
        return torch.nn.functional.pad(out, (0, 0, 0, 1)), weights


class Prints(Naive):
    """Prints what could be taken for a report, to both streams."""

    name = "prints-garbage"

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Any:
        """The right answer, loudly."""
        for stream in (1, 2):
            os.write(stream, b'{"verdict": "PASS"}\x00\xff\n]}[\n' * 50)
        return super().forward(request, algorithm, params, inputs)


class Exits(Naive):
    """Ends the process at its third call."""

    name = "exits"
    calls = 0

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Any:
        """Two answers, and no more."""
        self.calls += 1
        if self.calls == 3:
            os._exit(3)
        return super().forward(request, algorithm, params, inputs)


class Aborts(Naive):
    """Crashes the process at its third call."""

    name = "crashes-the-process"
    calls = 0

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Any:
        """Two answers, then SIGABRT."""
        self.calls += 1
        if self.calls == 3:
            os.abort()
        return super().forward(request, algorithm, params, inputs)


raises = Raises()
hangs = Hangs()
spins = Spins()
hangs_in_c = HangsInC()
returns_list = ReturnsList()
returns_none = ReturnsNone()
wrong_shape = WrongShape()
prints = Prints()
exits = Exits()
aborts = Aborts()
