"""Concurrent calls: the interpreter keeps its state in globals, so its launches take turns."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

import translution
from translution.spec import presets as p

OPERATORS = (
    p.translution((2, 2), 4, 2, registers=1),
    p.alpha_translution((3,), 4, 1, rank=2),
    p.self_attention((2, 2), 4, 2, registers=2),
    p.convolution((3,), 2, 3, 3, padding=1),
)


def test_concurrent_calls_give_the_bits_of_single_ones(draw):
    cases = [(operator, *draw(operator)[:2]) for operator in OPERATORS]

    def result(case):
        operator, params, x = case
        return translution.run(operator, params, x, backend="triton")

    alone, together = [result(case) for case in cases], Barrier(len(cases))

    def repeated(case):
        together.wait(timeout=60)
        return [result(case) for _ in range(5)]

    with ThreadPoolExecutor(len(cases)) as pool:
        found = list(pool.map(repeated, cases))
    for expected, results in zip(alone, found, strict=True):
        assert all(np.array_equal(one, expected) for one in results)
