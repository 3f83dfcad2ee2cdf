"""Registers: their pairs joined with the kernel's. Every result here is exact, whatever the size of the logits.

Up to 7 keys have integer weights and values that 420 = lcm(1..7) divides, so no step of the average rounds.
"""

import numpy as np
import pytest

import translution
from translution.spec import Identity, Lattice, Mean, Operator, Shared, Softmax

REGISTERS = (1, 2, 3)
LEVELS = (0.0, -1e6, 1e9, -1e9, -3e38, 3e38)


def average(x, live):
    """Integer averages over the live keys, 0 where there is none (clause M3)."""
    count = live.sum(-1)[:, None]
    return (live.astype(np.int64) @ x.astype(np.int64) // np.maximum(count, 1)).astype(np.float32)


def whole(count, seed=0):
    return 420 * np.random.default_rng(seed).integers(-3, 4, (1, count, 1)).astype(np.float32)


def equal_logits(registers):
    operator = Operator(Lattice((4,), registers=registers), 1, 1, Identity(), Shared(1), Identity(), Softmax(scale=1.0))
    return operator, {name: np.zeros(shape, np.float32) for name, shape in operator.parameters.items()}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("registers", REGISTERS)
@pytest.mark.parametrize("level", [1.0, -1.0, 250.0, 1e4, -1e4, 1e8])
def test_equal_tokens_give_themselves(level, registers, causal):
    """Every logit is level squared, so up to 1e16."""
    layout = Lattice((4,), registers=registers, causal=causal)
    operator = Operator(layout, 1, 1, Identity(), Identity(), Identity(), Softmax(scale=1.0))
    x = np.full((1, 4 + registers, 1), level, np.float32)
    assert np.array_equal(translution.run(operator, {}, x, backend="triton"), x)


@pytest.mark.parametrize("registers", REGISTERS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_constant_added_to_a_row_changes_nothing(level, registers):
    operator, params = equal_logits(registers)
    count = 4 + registers
    x = whole(count)
    mask = np.full((count, count), level, np.float32)
    expected = average(x[0], np.ones((count, count), bool))
    assert np.array_equal(translution.run(operator, params, x, mask=mask, backend="triton")[0], expected)


@pytest.mark.parametrize("registers", REGISTERS)
@pytest.mark.parametrize("level", LEVELS)
def test_absent_keys_beside_a_constant(level, registers):
    """Parts without a live key, and rows without one (clauses M2 and M3)."""
    operator, params = equal_logits(registers)
    count = 4 + registers
    rng, seen = np.random.default_rng(registers), set()
    for seed in range(4):
        x, live = whole(count, seed), rng.random((count, count)) < 0.4
        live[seed], live[seed + 1, :registers], live[(seed + 2) % count, registers:] = False, False, False
        mask = np.where(live, np.float32(level), np.float32(-np.inf))
        found = translution.run(operator, params, x, mask=mask, backend="triton")[0]
        assert np.array_equal(found, average(x[0], live))
        seen |= {(bool(row[:registers].any()), bool(row[registers:].any())) for row in live}
    assert len(seen) == 4


@pytest.mark.parametrize("registers", REGISTERS)
@pytest.mark.parametrize(("lower", "higher"), [(-1e6, 0.0), (-3e38, -1e9), (-1e9, 1e9), (-3e38, 3e38)])
@pytest.mark.parametrize("kept", ["grid", "registers"])
def test_the_part_with_higher_logits_decides(kept, lower, higher, registers):
    operator, params = equal_logits(registers)
    count = 4 + registers
    x = whole(count)
    live = np.zeros((count, count), bool)
    live[:, slice(registers, None) if kept == "grid" else slice(registers)] = True
    mask = np.where(live, np.float32(higher), np.float32(lower))
    found = translution.run(operator, params, x, mask=mask, backend="triton")[0]
    assert np.array_equal(found, average(x[0], live))


@pytest.mark.parametrize("registers", REGISTERS)
def test_a_mean_over_registers_and_grid_is_exact(registers):
    operator = Operator(Lattice((4,), registers=registers), 1, 1, Identity(), relevance=Mean())
    count = 4 + registers
    x = whole(count)
    live = np.random.default_rng(registers).random((count, count)) < 0.7
    found = translution.run(operator, {}, x, mask=live, backend="triton")[0]
    assert np.array_equal(found, average(x[0], live))
