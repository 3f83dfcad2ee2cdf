"""docs/performance.md: figures mean what they say, aims are judged plainly, the page follows from what was measured."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The benchmarks import one another as a program started in their folder does."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def _case(forward, **more):
    """A case of two rounds, as it is in the JSON."""
    return {"passes": {"forward": {"seconds": {"torch stream": forward}, **more}}}


def test_shares_are_taken_round_by_round():
    from reading import shares, table_share

    machine = {
        "large_product_flops": 8.0,
        "seconds": {
            "products": [2.0, 3.0], "gradient products": [4.0, 6.0], "large product": [1.0, 1.0],
            "large product of oneDNN": [0.5, 0.5],
            "tables read": [1.0, 1.0], "tables copied": [1.0, 4.0],
        },
    }  # fmt: skip
    passes = {
        which: {"executed_flops": executed, "seconds": {"torch stream": times}}
        for which, executed, times in (
            ("forward", 16.0, [4.0, 4.0]),
            ("backward", 48.0, [12.0, 10.0]),
            ("forward and backward", 64.0, [12.0, 12.0]),
        )
    }
    case = {"useful_flops": 16.0, "machine": machine, "passes": passes}
    own, large, fastest = shares(case, "forward")
    assert (own.low, own.middle, own.high) == (0.5, 0.625, 0.75)
    assert large.middle == 0.5
    assert fastest.middle == 0.25
    own, large, fastest = shares(case, "backward")  # 48 = 3 * 16: two products of the gradient, and one to encode again
    assert (own.low, own.high) == (0.5, 0.9)
    assert (large.low, large.high) == (0.5, 0.6)
    own, large, fastest = shares(case, "forward and backward")
    assert (own.low, own.high) == (0.5, 0.75)
    assert large.middle == 0.5
    assert fastest.middle == 0.25
    del machine["seconds"]["large product of oneDNN"]
    assert shares(case, "forward")[2] is None
    assert (table_share(case).low, table_share(case).high) == (0.125, 0.25)


def test_exponents_are_those_of_the_power_law():
    from reading import exponent, last_exponent

    values = [10.0, 20.0, 40.0, 80.0]
    found = exponent(values, [3 * v**1.5 for v in values])
    assert found.middle == pytest.approx(1.5)
    assert found.high - found.low < 1e-6
    bent = exponent(values, [v**2 + 100 * v for v in values])
    assert bent.low < bent.middle < bent.high
    assert 1 < bent.low < 2
    # Four points leave two degrees of freedom: Student's t is 4.303 there.
    noisy = exponent([math.exp(v) for v in range(4)], [math.exp(v) for v in (0.0, 1.1, 1.9, 3.0)])
    assert noisy.middle == pytest.approx(0.98)
    assert noisy.high - noisy.middle == pytest.approx(4.3027 * math.sqrt(0.018 / 2 / 5), rel=1e-3)
    curve = [{"value": v, **_case([v**2, v**2])} for v in (4.0, 8.0, 2.0)]
    assert last_exponent(curve, "forward") == pytest.approx(2)


def test_aims_are_judged_by_the_median():
    from aims import Aim
    from reading import Spread

    aim = Aim("", lambda _: Spread(0, 0, 0), least=0.4, most=0.6, factor=100, unit="%")
    assert aim.bounds == "at least 40%, at most 60%"
    assert [aim.reached(Spread(v, 0, 1)) for v in (0.399, 0.4, 0.6, 0.601)] == [False, True, True, False]


@pytest.fixture
def invented():
    """Measurements of every family: candidates take as long as they have letters, times the square of a value."""
    from dataclasses import asdict

    from families import TIMED, WEIGHED
    from workload import MACHINE

    settings = {
        "machine": {"processor": "a processor", "cores": "2"}, "versions": {"torch": "2"}, "threads": 2, "rounds": 7,
        "date": "2026-01-01", "load": [0.1, 2.1], "took_seconds": 60.0,
    }  # fmt: skip

    def case_data(case):
        def found(which):
            names = [name for name in case.candidates if name not in MACHINE]
            skipped = [name for name in names if name == "triton fused"]
            seconds = {
                name: [len(name) * (case.value or 1.0) ** 2 * more for more in (1.0, 1.5, 1.25)]
                for name in names
                if name not in skipped
            }
            return {
                "seconds": seconds, "skipped": dict.fromkeys(skipped, f"no GPU for {which}"), "error_over_bound": {},
                "estimated_flops": 8 * (case.value or 1) ** 2, "executed_flops": 24,
            }  # fmt: skip

        machine = {
            "products_flops": 8, "large_product_flops": 8, "table_bytes": 2**20,
            "seconds": {name: [1.0, 1.0, 1.0] for name in MACHINE},
        }  # fmt: skip
        data = {"spec": case.spec, "batch": case.batch, "value": case.value, "links": 10, "useful_flops": 8}
        data["passes"] = {which: found(which) for which in case.passes}
        return data | ({"machine": machine} if set(MACHINE) & set(case.candidates) else {})

    return {
        name: {
            "settings": dict(settings),
            "groups": [
                {"name": group.name, "variable": group.variable, "cases": [case_data(case) for case in group.cases]}
                for group in groups
            ],
        }
        for name, groups in TIMED.items()
    } | {
        name: {"settings": dict(settings), "peaks": [asdict(peak) | {"peak_bytes": 10**6} for peak in peaks]}
        for name, peaks in WEIGHED.items()
    }


def test_every_aim_reads_what_is_measured(invented):
    from aims import judged

    assert all(found is not None for _, found in judged(invented))
    assert all(found is None for _, found in judged({}))


def test_the_page_has_every_figure_and_says_what_is_not_reached(invented):
    from aims import AIMS
    from page import page

    text = page(invented)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert all(aim.text in rows for aim in AIMS)
    slow = rows["Translution 7x7 + 1, batch 4, forward: times as fast as the authors' algorithm"]
    assert slow.endswith("| at least 100 | 1 | **not reached** |")
    small = rows["64x64 grid, window of 7x7, 64 channels, forward: peak memory"]
    assert small.endswith("| at most 1,000 MB | 1 MB | reached |")
    assert f"of {len(AIMS)} are reached" in text
    assert "- forward, forward and backward: triton fused: no GPU for forward" not in text
    assert "- forward: triton fused: no GPU for forward" in text
    assert "| tokens, N = 100 to 484 | forward | **2.00" in text
    # The median of both passes, and the range: 5 letters against 12.
    assert "| forward | 15,000.0 (12,000.0 to 18,000.0) | 5,000.0 (4,000.0 to 6,000.0) | **3.0** |" in text
    del invented["growth"]
    assert f"| {AIMS[-3].text} | at most 1.1 | not measured |  |" in page(invented)


def test_the_page_warns_of_a_busy_machine_and_of_few_rounds(invented):
    from page import page

    assert "Provisional" not in page(invented)
    invented["alpha"]["settings"]["rounds"] = 3
    invented["growth"]["settings"]["load"] = [0.1, 4.0]
    invented["sparse"]["settings"]["threads"] = 4
    words = " ".join(page(invented).split())
    assert "growth: other work ran on the machine" in words
    assert "alpha: fewer than 5 rounds" in words
    assert "sparse: not on 2 threads" in words


def test_plots_are_the_same_for_the_same_measurements(invented, tmp_path):
    from page import write_page

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        source = tmp_path / folder / "performance.json"
        source.write_text(json.dumps(invented))
        text = write_page(source, tmp_path / folder)
        assert text == (tmp_path / folder / "performance.md").read_text()
    for name in ("shares.svg", "growth.svg"):
        drawn = [(tmp_path / folder / "performance" / name).read_text() for folder in ("one", "two")]
        assert drawn[0] == drawn[1]
        assert f"performance/{name}" in text
    assert drawn[0].count("forward: 2.00") == 6


@pytest.mark.parametrize("machine", ["", "machines/xeon", "machines/zen4", "machines/zen3"])
def test_the_committed_page_and_plots_follow_from_the_committed_measurements(machine, tmp_path):
    from page import DOCS, write_page

    folder = DOCS / machine
    assert write_page(folder / "performance.json", tmp_path) == (folder / "performance.md").read_text()
    for drawn in (tmp_path / "performance").glob("*.svg"):
        assert drawn.read_bytes() == (folder / "performance" / drawn.name).read_bytes()
