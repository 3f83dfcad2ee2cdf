"""What a thread keeps for ``stream`` from call to call: never seen in a result, never what was given, in every mode."""

import gc
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import translution
from translution.algorithms import Request
from translution.backends.torch import attention, dry_run, few_rows, memory, passes
from translution.backends.torch.backend import backend
from translution.execution import predict
from translution.inputs import Inputs
from translution.spec import Operator, Shared, presets

FULL = presets.translution((3, 4), 8, 2, registers=1)
OPERATORS = {
    "full": FULL,
    "causal": presets.translution((6,), 8, 2, causal=True),
    "window": presets.translution((4, 5), 8, 2, kernel_size=(3, 3)),
    "low rank": presets.alpha_translution((3, 3), 8, 2, rank=2),
    "low rank, three axes": presets.alpha_translution((2, 3, 2), 8, 2, rank=2, registers=1),
    "plain values": Operator(FULL.layout, 8, 2, FULL.query, FULL.key, Shared(8), FULL.relevance),
}


@pytest.fixture(autouse=True)
def nothing_kept():
    memory.release()
    yield
    memory.release()


def given(operator, seed, batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)

    return numbers(batch, operator.layout.num_queries, operator.dim), {
        name: numbers(*shape) for name, shape in operator.parameters.items()
    }


def results(operator, x, params):
    """The result and all gradients."""
    out = translution.run(operator, params, x, backend="torch", algorithm="stream")
    return [out, *torch.autograd.grad(out.square().sum(), [x, *params.values()])]


def alone(operator, x, params):
    """The same with nothing kept."""
    memory.release()
    found = results(operator, x, params)
    memory.release()
    return found


def assert_same(found, expected):
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def has_numbers(tensor):
    """What a transform or a trace of another test has left has none."""
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        return False


def kept_bytes():
    return 0 if memory._thread.room is None else len(memory._thread.room)


@pytest.mark.usefixtures("way")
def test_calls_don_t_see_each_other():
    """Operators, batch sizes and dtypes in turns: the bits of each are those of a call on its own, and stay."""
    cases = itertools.product(OPERATORS.values(), (1, 3), (torch.float32, torch.float64))
    inputs = [(o, *given(o, n, batch, dtype)) for n, (o, batch, dtype) in enumerate(cases)]
    expected = [alone(*own) for own in inputs]
    found = [[results(*own) for own in inputs] for _ in range(3)]
    one_after_another = [[results(*own) for _ in range(4)] for own in inputs]
    for round_results in found:
        for own, other in zip(round_results, expected, strict=True):
            assert_same(own, other)
    for own_results, other in zip(one_after_another, expected, strict=True):
        for own in own_results:
            assert_same(own, other)
    assert kept_bytes() > 0


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", OPERATORS)
def test_other_numbers_give_other_results(name):
    """What is kept are places, not what was in them."""
    inputs = [(OPERATORS[name], *given(OPERATORS[name], seed)) for seed in range(3)]
    expected = [alone(*own) for own in inputs]
    for _ in range(2):
        for own, other in zip(inputs, expected, strict=True):
            assert_same(results(*own), other)


@pytest.mark.parametrize("names", [*itertools.combinations(["full", "causal", "low rank"], 2)], ids=" and ".join)
def test_calls_of_another_kind_leave_no_trace(names):
    """Both work in one room: what one of them might expect to find there, the other has overwritten."""
    inputs = [(OPERATORS[name], *given(OPERATORS[name], 1)) for name in names]
    expected = [alone(*own) for own in inputs]
    for _ in range(4):
        for own, other in zip(inputs, expected, strict=True):
            assert_same(results(*own), other)
    assert len(memory._thread.memories) == 4


@pytest.mark.usefixtures("way")
def test_parts_of_the_batch_share_the_room(monkeypatch):
    """Also where the last is smaller than the others."""
    monkeypatch.setattr(attention.Attention, "parts", lambda *_, **__: [slice(0, 3), slice(3, 6), slice(6, 7)])
    own = given(FULL, 1, batch=7)
    expected = alone(FULL, *own)
    for _ in range(3):
        assert_same(results(FULL, *own), expected)
    whole = kept_bytes()
    memory.release()
    monkeypatch.setattr(attention.Attention, "parts", lambda *_, **__: [slice(0, 3), slice(3, 6)])
    for _ in range(3):
        results(FULL, *given(FULL, 1, batch=6))
    assert kept_bytes() == whole


def test_the_first_call_of_a_kind_leaves_nothing():
    """Who asks once keeps nothing; and what a second call takes is what was predicted for one."""
    own = given(FULL, 1)
    results(FULL, *own)
    assert kept_bytes() == 0
    results(FULL, *own)
    assert 0 < kept_bytes() <= memory.MOST_BYTES
    memory.release()
    assert kept_bytes() == 0


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_given_is_kept(name):
    """No tensor that is left shares its memory with what was given."""
    operator = OPERATORS[name]
    x, params = given(operator, 1)
    for _ in range(3):
        results(operator, x, params)
    ours = [x, *params.values()]
    places = {t.untyped_storage().data_ptr() for t in ours}
    gc.collect()

    def others():
        left = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.device.type == "cpu" and has_numbers(t)]
        shared = [t for t in left if t.untyped_storage().data_ptr() in places]
        return [t for t in shared if not any(t is own for own in ours)]

    assert others() == []
    view = x.detach()[0]
    assert any(t is view for t in others())


@pytest.mark.usefixtures("way")
def test_every_mode_follows_every_other():
    """Inference mode, no_grad and gradients on the same memory."""
    x, params = given(FULL, 1)
    expected = alone(FULL, x, params)

    def forward():
        return translution.run(FULL, params, x, backend="torch", algorithm="stream")

    def inference():
        with torch.inference_mode():
            return forward()

    def without():
        with torch.no_grad():
            return forward()

    for order in ((inference, without), (without, inference)):
        memory.release()
        for mode in (*order * 3, *order[::-1]):
            assert_same([mode()], expected[:1])
            assert_same(results(FULL, x, params), expected)


def test_threads_have_memory_of_their_own():
    inputs = [(o, *given(o, n)) for n, o in enumerate(OPERATORS.values())] * 2
    expected = [alone(*own) for own in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda own: [results(*own) for _ in range(8)], inputs))
    for own_results, other in zip(found, expected, strict=True):
        for own in own_results:
            assert_same(own, other)
    assert kept_bytes() == 0


@pytest.mark.parametrize("method", ["products", "add"])
def test_what_fails_takes_its_memory_along(way, method, monkeypatch):
    own = given(FULL, 1)
    expected = alone(FULL, *own)
    for _ in range(3):
        results(FULL, *own)

    def fail(*_):
        raise RuntimeError("stopped")

    with monkeypatch.context() as changed:
        changed.setattr((few_rows if way == "few rows" else passes).Forward, method, fail)
        with pytest.raises(RuntimeError, match="stopped"):
            results(FULL, *own)
    assert kept_bytes() == 0
    for _ in range(3):
        assert_same(results(FULL, *own), expected)


def test_no_more_is_kept_than_allowed(monkeypatch):
    """A call that takes more keeps nothing; many kinds of call keep one room, and views for the latest."""
    own = given(FULL, 1)
    monkeypatch.setattr(memory, "MOST_BYTES", 100)
    for _ in range(3):
        results(FULL, *own)
    assert kept_bytes() == 0
    monkeypatch.undo()
    for batch in range(1, 20):
        for _ in range(2):
            results(FULL, *given(FULL, 1, batch))
    assert len(memory._thread.memories) == memory.MOST_CALLS
    rooms = {m.room.data_ptr() for m in memory._thread.memories.values() if m.room is not None}
    assert rooms == {memory._thread.room.data_ptr()}


def test_tensors_that_are_no_plain_ones_work_in_memory_of_their_own():
    """Meta tensors and those in a dispatch mode."""
    x, params = given(FULL, 1)
    request = Request(FULL, 3, gradient=True)
    for _ in range(3):
        predict(backend, request, "stream")
        with FlopCounterMode(display=False):
            results(FULL, x, params)
    assert not memory._thread.memories


def test_what_grows_has_its_place_at_once():
    """A second call knows how large the rooms of the first became: outgrown ones would stay in the block."""
    operator = presets.shaw_attention((20,), 8, 2, max_distance=3)
    own = given(operator, 1)
    expected = alone(operator, *own)
    results(operator, *own)
    most = memory._thread.most
    for _ in range(3):
        assert_same(results(operator, *own), expected)
    assert memory._thread.most == most
    assert all(kind.fits for kind in memory._thread.memories.values())


def test_what_is_kept_counts_where_memory_is_predicted(monkeypatch):
    """Views for their own size, in forward and backward; the block as long as nothing takes its place."""
    request = Request(presets.translution((7, 7), 24, 3, registers=1), 4, gradient=True)
    counted = []
    keep = dry_run.Counter.keep

    def count(self, own):
        counted.append(None if own is None else len(own.views()))
        keep(self, own)

    monkeypatch.setattr(dry_run.Counter, "keep", count)
    expected = predict(backend, request, "stream").working_bytes
    before, forward, between, backward = counted
    assert before is between is None
    assert 100 < forward < backward
    monkeypatch.setattr(dry_run, "VIEW_BYTES", 0)
    views = (expected - predict(backend, request, "stream").working_bytes) / 600
    assert forward < views <= forward + backward


def test_views_of_a_kind_of_call_count_once():
    request = Request(FULL, 3)
    params = {name: torch.empty(shape, device="meta") for name, shape in FULL.parameters.items()}
    x = torch.empty((3, FULL.layout.num_queries, FULL.dim), device="meta")
    held = []
    with dry_run.Counter([x, *params.values()]) as counter:
        for _ in range(3):
            backend.forward(request, "stream", params, Inputs(x, x, None, (3,)))
            held.append(counter._held)
    assert held[0] == held[1] == held[2] > 0
