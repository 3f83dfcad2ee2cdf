"""Tiles: every shape gives the same result, nothing outside an operand is read or written, programs are independent."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import translution
from translution.backends.triton import launch, operation, targets
from translution.conformance.comparison import check
from translution.conformance.error_model import budget
from translution.spec import Lattice, Mean, Ones, Operator, PerDisplacement, Shared
from translution.spec import presets as p

CASES = {
    "2d": p.translution((2, 3), 17, 2, head_dim=9),
    "causal": p.translution((6,), 5, 1, causal=True, registers=1),
    "raster": p.translution((3, 3), 5, 1, causal=True, kernel_size=3),
    # The later rows of queries see no displacement of the row where the raster order begins.
    "raster-across": Operator(
        Lattice((3, 2), key_grid=(1, 3), causal=True), 4, 1, PerDisplacement(3), Shared(3), Shared(3)
    ),
    "3d": p.translution((2, 2, 3), 3, 1, causal=(True, False, False)),
    "across": Operator(
        Lattice((3, 2), key_grid=(2, 3), offset=(-1, 1)), 4, 1, PerDisplacement(6), PerDisplacement(4), Shared(4)
    ),
    "alpha": p.alpha_translution((2, 3), 6, 2, rank=3, registers=1),
    "ones": Operator(Lattice((3, 2), kernel_size=(3, 2)), 5, 1, PerDisplacement(35), relevance=Ones()),
    "mean": Operator(Lattice((5,), kernel_size=2, dilation=2), 5, 1, PerDisplacement(4), relevance=Mean()),
}
# One site and one item per program; several sites; several items; more rows than there is to do.
ROWS = {"1": 1, "2": 2, "4": 4, "64": 64}
TOKENS = ("q_tokens", "k_tokens", "v_tokens", "q_static", "k_static", "v_static", "q_plain", "k_plain")
SMALL = targets.Blocks(rows=1, channels=16, features=16, results=16, warps=1, stages=1)


@pytest.fixture
def rows(request, monkeypatch):
    monkeypatch.setattr(targets, "interpreter_rows", lambda *_: request.param)
    monkeypatch.setattr(targets, "INTERPRETER", SMALL)


def padded(value: torch.Tensor | None) -> torch.Tensor | None:
    """The same tokens, and tokens of NaN before and after those of every batch item."""
    if value is None:
        return None
    around = value.new_full((value.shape[0] + 2, value.shape[1] + 2, *value.shape[2:]), math.nan)
    inner = around[1:-1, 1:-1]
    inner.copy_(value)
    return inner


def dense(value: torch.Tensor | None) -> torch.Tensor | None:
    """The same values between NaN, without a gap."""
    if value is None:
        return None
    around = value.new_full((value.numel() + 2000,), math.nan)
    inner = around[1000:-1000].view(value.shape)
    inner.copy_(value)
    return inner


def launch_between_guards(operands, *results):
    guard, edge = 12345.0, 500
    own = dataclasses.replace(
        operands,
        **{name: padded(getattr(operands, name)) for name in TOKENS},
        **{name: dense(getattr(operands, name)) for name in ("q_table", "k_table", "v_table", "bias")},
    )
    buffers = [torch.full((r.numel() + 2 * edge,), guard) for r in results]
    for buffer in buffers:
        buffer[edge : len(buffer) - edge] = math.nan
    inner = [b[edge : len(b) - edge].view(r.shape) for b, r in zip(buffers, results, strict=True)]
    launch.launch(own, *inner)
    for buffer, own_result, result in zip(buffers, inner, results, strict=True):
        assert (buffer[:edge] == guard).all()
        assert (buffer[len(buffer) - edge :] == guard).all()
        if operands.normalise or not any(result is unwritten for unwritten in results[2:]):
            result.copy_(own_result)


@pytest.mark.parametrize("name", CASES)
def test_nothing_outside_the_operands_is_read_or_written(name, draw, monkeypatch):
    params, x, y = draw(CASES[name], batch=3)
    plain = translution.run(CASES[name], params, x, y, backend="triton")
    monkeypatch.setattr(operation, "launch", launch_between_guards)
    assert np.array_equal(translution.run(CASES[name], params, x, y, backend="triton"), plain)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS, indirect=True)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("rows")
def test_every_tile_is_within_the_bound(name, draw):
    params, x, y = draw(CASES[name], batch=1 if CASES[name].layout.num_queries > 6 else 3)
    found = translution.run(CASES[name], params, x, y, backend="triton")
    exact = budget(CASES[name], params, x, y)
    check(name, found, exact.value, exact.out)


@pytest.mark.parametrize("rows", [2], indirect=True)
@pytest.mark.parametrize("name", ["causal", "alpha", "ones"])
@pytest.mark.usefixtures("rows")
def test_programs_in_reverse_order_give_the_same_bits(name, draw, monkeypatch):
    params, x, y = draw(CASES[name])
    forwards = translution.run(CASES[name], params, x, y, backend="triton")
    builder, seen = interpreter.interpreter_builder, []
    place = builder.set_grid_idx

    def reverse(first, second, third):
        seen.append(first)
        place(builder.grid_dim[0] - 1 - first, second, third)

    monkeypatch.setattr(builder, "set_grid_idx", reverse)
    assert np.array_equal(translution.run(CASES[name], params, x, y, backend="triton"), forwards)
    assert len(seen) > 2


def test_no_integer_overflows(draw, monkeypatch):
    """With debug the interpreter checks every 32-bit operation."""
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    params, x, y = draw(CASES["across"])
    translution.run(CASES["across"], params, x, y, backend="triton")


@pytest.mark.parametrize(
    ("rows", "batch", "grid", "tile"),
    [
        (64, 64, (1, 14, 14), (1, 1, 1, 64)),
        (64, 16, (1, 14, 14), (1, 2, 2, 16)),
        (64, 1, (1, 14, 14), (1, 8, 8, 1)),
        (64, 1, (1, 1, 500), (1, 1, 64, 1)),
        (64, 3, (1, 2, 500), (1, 2, 8, 4)),
        (64, 1, (4, 4, 4), (4, 4, 4, 1)),
        (16, 1, (1, 1, 1), (1, 1, 16, 1)),
    ],
)
def test_tile_shape(rows, batch, grid, tile):
    assert targets.tile_for(rows, batch, grid, 1) == tile


def test_a_tile_never_spans_more_than_32_bits():
    assert targets.tile_for(64, 64, (1, 1, 64), 2**28)[3] == 4
