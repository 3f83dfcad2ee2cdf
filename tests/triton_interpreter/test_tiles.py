"""Tiles: every shape gives the same result, nothing outside an operand is read or written, programs are independent."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import translution
from translution.backends.triton import gradients, launch, operation, targets
from translution.conformance.comparison import check
from translution.conformance.error_model import budget
from translution.spec import BiasTable, Lattice, Mean, Ones, Operator, PerDisplacement, Shared, Softmax
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
    "strided": Operator(
        Lattice((2, 2), key_grid=(4, 3), stride=2, offset=-1, kernel_size=3),
        3,
        1,
        PerDisplacement(3),
        PerDisplacement(3),
        PerDisplacement(3),
        Softmax(bias=BiasTable()),
    ),
    # One row of queries, one of keys and one displacement between them, at which they do not meet.
    "nothing in reach": Operator(
        Lattice((1, 2), kernel_size=(1, 2), offset=(40, 0)),
        5,
        1,
        PerDisplacement(4),
        relevance=Softmax(content=False, bias=BiasTable()),
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


TABLES = ("q_table", "k_table", "v_table", "bias")
GUARD, EDGE = 12345.0, 500


def guarded(operands):
    """The same operands between NaN."""
    own = {name: padded(getattr(operands, name)) for name in TOKENS}
    return dataclasses.replace(operands, **own, **{name: dense(getattr(operands, name)) for name in TABLES})


def buffer(like):
    """NaN between sentinels, and the part between them in the shape of ``like``."""
    whole = torch.full((like.numel() + 2 * EDGE,), GUARD, dtype=like.dtype)
    whole[EDGE : len(whole) - EDGE] = math.nan
    return whole, whole[EDGE : len(whole) - EDGE].view(like.shape)


def assert_sentinels(whole):
    assert (whole[:EDGE] == GUARD).all()
    assert (whole[len(whole) - EDGE :] == GUARD).all()


def launch_between_guards(operands, *results):
    buffers = [buffer(r) for r in results]
    launch.launch(guarded(operands), *(inner for _, inner in buffers))
    for (whole, inner), result in zip(buffers, results, strict=True):
        assert_sentinels(whole)
        if operands.normalise or not any(result is unwritten for unwritten in results[2:]):
            result.copy_(inner)


def gradients_between_guards(operands, given, needed):
    """Every tensor that the backward allocates for itself is NaN between sentinels."""
    wholes, genuine = [], torch.Tensor.new_empty

    def empty(like, *shape, dtype=None, device=None):
        if device is not None:  # the interpreter's own
            return genuine(like, *shape, device=device)
        whole, inner = buffer(torch.empty(*shape, dtype=dtype or like.dtype))
        wholes.append(whole)
        return inner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", empty)
        patch.setattr(torch, "empty_like", lambda like, dtype=None: empty(like, like.shape, dtype=dtype))
        own = {f.name: dense(getattr(given, f.name)) for f in dataclasses.fields(given)}
        found = gradients.gradients(guarded(operands), type(given)(**own), needed)
        found = {name: gradient.clone() for name, gradient in found.items()}
    assert wholes
    for whole in wholes:
        assert_sentinels(whole)
    return found


def answers(name, draw, batch=2):
    """The result and every gradient."""
    params, x, y = draw(CASES[name], batch=batch)
    cotangent = np.random.default_rng(7).standard_normal(
        (batch, CASES[name].layout.num_queries, CASES[name].out_features)
    )
    out, found = translution.vjp(CASES[name], params, x, y, cotangent=cotangent.astype(np.float32), backend="triton")
    return {"out": out, "x": found.x, **found.params} | ({} if y is None else {"y": found.y})


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert np.array_equal(one[name], other[name]), name


@pytest.mark.parametrize("name", CASES)
def test_nothing_outside_the_operands_is_read_or_written(name, draw, monkeypatch):
    plain = answers(name, draw, batch=3)
    monkeypatch.setattr(operation, "launch", launch_between_guards)
    monkeypatch.setattr(operation, "gradients", gradients_between_guards)
    assert_same(answers(name, draw, batch=3), plain)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS, indirect=True)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("rows")
def test_every_tile_is_within_the_bound(name, draw):
    params, x, y = draw(CASES[name], batch=1 if CASES[name].layout.num_queries > 6 else 3)
    found = translution.run(CASES[name], params, x, y, backend="triton")
    exact = budget(CASES[name], params, x, y)
    check(name, found, exact.value, exact.out)


@pytest.mark.parametrize("rows", [2, 16], indirect=True)
@pytest.mark.parametrize("name", ["2d", "raster-across", "across", "strided", "alpha", "ones"])
@pytest.mark.usefixtures("rows")
def test_gradients_with_every_tile_are_within_their_bounds(name, draw):
    params, x, y = draw(CASES[name], batch=1)
    cotangent = np.random.default_rng(7).standard_normal((1, CASES[name].layout.num_queries, CASES[name].out_features))
    exact, found = budget(CASES[name], params, x, y, cotangent=cotangent.astype(np.float32)), answers(name, draw, 1)
    del found["out"]
    for of, gradient in found.items():
        check(f"{name}, {of}", gradient, exact.gradient_values[of], exact.gradients[of])


@pytest.mark.parametrize("rows", [4], indirect=True)
@pytest.mark.parametrize("name", ["causal", "alpha", "ones", "strided"])
@pytest.mark.usefixtures("rows")
def test_programs_in_reverse_order_give_the_same_bits(name, draw, monkeypatch):
    """Forward and backward: no program reads what another one of its launch writes, or adds to it."""
    forwards = answers(name, draw, 1)
    builder, seen = interpreter.interpreter_builder, []
    place = builder.set_grid_idx

    def reverse(first, second, third):
        seen.append(first)
        place(builder.grid_dim[0] - 1 - first, second, third)

    monkeypatch.setattr(builder, "set_grid_idx", reverse)
    assert_same(answers(name, draw, 1), forwards)
    assert len(seen) > 20


def test_no_integer_overflows(draw, monkeypatch):
    """With debug the interpreter checks every 32-bit operation."""
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    assert np.isfinite(answers("across", draw)["out"]).all()


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
