"""Timing: intervals that hold the median, interleaved rounds, and who is faster for certain."""

import random
from statistics import median

import pytest

from translution import trials
from translution.trials import MORE_ROUNDS, ROUNDS, Timing, contenders, interval, measure


@pytest.mark.parametrize(("count", "ranks"), [(1, (0, 0)), (5, (0, 4)), (6, (0, 5)), (9, (1, 7)), (27, (7, 19))])
def test_interval_takes_the_order_statistics_of_the_binomial(count, ranks):
    assert interval(range(count)) == ranks


def test_interval_holds_the_median_as_often_as_it_says():
    """Exponential times, median log 2: 1 - 2 P(Binomial(9, 1/2) < 2) = 96.1%."""
    generator, held, tries = random.Random(0), 0, 4000
    for _ in range(tries):
        low, high = interval([generator.expovariate(1.0) for _ in range(9)])
        held += low <= 0.6931 <= high
    assert held / tries == pytest.approx(0.961, abs=0.012)


def test_median_of_even_and_odd_counts():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5


@pytest.fixture
def clock(monkeypatch):
    """Calls that take the time they are told to, and the order in which they were made."""
    made: list[str] = []

    class Told:
        def __init__(self, call):
            self.call = call

        def timeit(self, number):
            return number * self.call()

    monkeypatch.setattr(trials.timeit, "Timer", Told)

    def calls(**seconds):
        def one(name, times):
            return lambda: (made.append(name), next(times))[1]

        return {name: one(name, iter(times)) for name, times in seconds.items()}

    return calls, made


def test_rounds_are_interleaved_forwards_and_backwards(clock):
    calls, made = clock
    found = measure(calls(a=[0.1] * 99, b=[0.2] * 99, c=[0.3] * 99), rounds=2)
    assert "".join(made) == "aabbcc" + "abc" + "cba"
    assert {name: timing.median for name, timing in found.items()} == {"a": 0.1, "b": 0.2, "c": 0.3}


def test_short_calls_are_repeated_within_a_round(clock):
    calls, _ = clock
    found = measure(calls(a=[0.001] * 999), rounds=3)
    assert found["a"].seconds == pytest.approx((0.001,) * 3)


def test_threads_of_another_library_come_to_rest_before_a_turn(clock, monkeypatch):
    """Of the three calls of a turn of 0.01 s the first, after the rest, is not counted; long ones need no rest."""
    calls, made = clock
    monkeypatch.setattr(trials.time, "sleep", lambda seconds: made.append(f"[{seconds}]"))
    a = [0.01, 0.01, 9.0, 0.01, 9.0, 0.01]
    found = measure(calls(a=a, b=[2.0] * 9), rounds=2, rest=0.5)
    assert "".join(made) == "aabb" + "[0.5]aab" + "b[0.5]aa"
    assert found["a"].seconds == pytest.approx((0.01, 0.01))


def test_the_drift_of_a_machine_is_no_difference(clock):
    """b takes 2% more in every round, whatever the round: that is seen through a drift of 100%."""
    calls, _ = clock
    drift = [1.0 + 0.1 * n for n in range(12)]
    found = measure(calls(a=drift, b=[1.02 * t for t in drift]), rounds=9)
    assert len(found["a"].seconds) == 9
    assert contenders(found) == ["a"]


def test_noise_makes_no_tie_of_what_is_far_apart():
    # Slower by half in the median, and faster in enough rounds to be uncertain.
    found = {"a": Timing((1.0,) * 9), "b": Timing((0.9, 0.9, 0.9, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5))}
    assert found["b"].ratio(found["a"])[1] <= 1
    assert contenders(found) == ["a"]


def test_more_rounds_where_two_cannot_be_told_apart(clock):
    calls, _ = clock
    generator = random.Random(1)
    noise = [[1 + generator.random() for _ in range(40)] for _ in range(2)]
    found = measure(calls(a=noise[0], b=noise[1], c=[9.0] * 40))
    assert len(found["a"].seconds) == MORE_ROUNDS > ROUNDS
    assert sorted(contenders(found)) == ["a", "b"]


def test_ratio_is_of_rounds_and_not_of_medians():
    a, b = Timing((1.0, 10.0, 2.0)), Timing((2.0, 20.0, 4.0))
    assert b.ratio(a) == (2.0, 2.0, 2.0)
