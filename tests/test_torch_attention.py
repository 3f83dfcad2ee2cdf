"""``stream``'s softmax over links as they are visited: origins, parts of the batch, mirrored displacements, memory."""

from collections import Counter

import numpy as np
import pytest
import torch

import translution
from translution.algorithms import Request
from translution.backends.torch import attention, few_rows, passes
from translution.backends.torch.backend import backend
from translution.backends.torch.bands import Reader
from translution.backends.torch.links import links
from translution.execution import predict
from translution.spec import BiasTable, Clip, Lattice, Operator, PairTable, PerDisplacement, Softmax, presets

CPU = torch.device("cpu")
FULL = presets.translution((3, 4), 8, 2, registers=1)
LAYOUTS = {
    "grid": FULL.layout,
    "large grid": Lattice((12, 12)),
    "causal": Lattice((6,), causal=True),
    "window": Lattice((4, 5), kernel_size=(3, 3)),
    "strided": Lattice((5,), kernel_size=(3,), stride=(2,)),
    "volume": Lattice((2, 3, 2)),
    "far": Lattice((7,), far=Clip(2)),
    "pairs": PairTable(((0, 1, 2, 1), (2, 0, 1, 0), (1, 2, 2, 0), (0, 2, 1, -1)), 3),
}


def parameters(operator, scale=0.4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return {n: scale * torch.randn(s, generator=generator, dtype=dtype) for n, s in operator.parameters.items()}


def tokens(operator, batch=3, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return scale * torch.randn((batch, operator.layout.num_queries, operator.dim), generator=generator, dtype=dtype)


def results(operator, params, x, mask=None, algorithm="stream", y=None):
    """The result and all gradients of its square."""
    leaves = [x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in params.values())]
    own = dict(zip(params, leaves[1:], strict=True))
    out = translution.run(operator, own, leaves[0], y, mask=mask, backend="torch", algorithm=algorithm)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def assert_close(found, expected, tolerance=1e-11):
    for own, other in zip(found, expected, strict=True):
        assert (own - other).abs().max() <= tolerance * max(1.0, other.abs().max())


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_link_is_visited_once_with_its_own_rows(name):
    """What the places of a visit read is what its steps say, for each role in its order."""
    layout = LAYOUTS[name]
    found = links(layout, CPU)
    index = {"query": torch.arange(found.geometry.num_queries), "key": torch.arange(found.geometry.num_keys)}
    readers = {side: Reader(index[side].double()[:, None, None]) for side in index}
    seen = []
    for visit in found.visits:
        steps = visit.steps
        expected = {
            "query": [s.query_index for s in steps],
            "key": [s.key_index for s in reversed(steps)],
            "value": [s.key_index for s in steps],
        }
        for role, rows in expected.items():
            own = readers["query" if role == "query" else "key"].rows(getattr(visit, role))
            assert own[..., 0].tolist() == [list(map(float, r)) for r in rows]
        classes = range(layout.num_classes)
        assert list(classes[visit.value_rows]) == [s.value_class for s in steps]
        assert list(classes[visit.key_rows]) == [s.key_class for s in reversed(steps)]
        seen += [(s.value_class, *pair) for s in steps for pair in zip(s.query_index, s.key_index, strict=True)]
    every = [(s.value_class, *p) for s in found.geometry.steps for p in zip(s.query_index, s.key_index, strict=True)]
    assert sorted(seen) == sorted(every)
    assert len(set(seen)) == len(seen)


def test_a_grid_is_visited_by_displacement_and_its_mirror():
    found = links(presets.translution((7, 7), 4, 1).layout, CPU)
    assert sorted(visit.shape[0] for visit in found.visits) == [1] + [2] * 84


def test_large_displacements_are_visited_in_pieces():
    """The workspaces are as large as the largest visit."""
    found = links(LAYOUTS["large grid"], CPU)
    assert found.widest <= 128
    pieces = Counter(visit.value_rows.start for visit in found.visits)
    neighbours = next(step for step in found.geometry.steps if len(step.query_index) == 12 * 11)
    assert pieces[neighbours.value_class] == 3


def test_a_causal_order_has_no_mirror():
    assert {visit.shape[0] for visit in links(LAYOUTS["causal"], CPU).visits} == {1}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_origin_does_not_show(name, monkeypatch):
    """m_i = 0 and m_i the largest logit give the same result and gradients, which are those of ``pairwise``."""
    matrices = PerDisplacement(8)
    operator = Operator(LAYOUTS[name], 8, 2, matrices, matrices, matrices, Softmax(bias=BiasTable()))
    params, x = parameters(operator), tokens(operator)
    expected = results(operator, params, x, algorithm="pairwise")
    assert_close(results(operator, params, x), expected)
    monkeypatch.setattr(attention, "SUMS", (np.inf, np.inf))
    assert_close(results(operator, params, x), expected)


@pytest.mark.parametrize("scale", [1e2, 3e4])
@pytest.mark.parametrize("sign", [-1, 1])
def test_logits_of_any_size_are_those_of_the_definition(scale, sign):
    """Beyond what exp can hold, in both directions and differing between queries."""
    operator = presets.translution((2, 3), 4, 1)
    params = parameters(operator)
    params["key.table"] = sign * scale * params["query.table"]
    x = tokens(operator)
    x[:, ::2] *= 1e-3
    assert_close(results(operator, params, x)[:1], [translution.run(operator, params, x, backend="reference")])


@pytest.mark.usefixtures("way")
def test_sums_at_the_ends_of_the_range_are_looked_at_again(monkeypatch):
    """The first visit shows nothing, a later one overflows; and sums so small that exp loses them."""
    matrices = PerDisplacement(4)
    operator = Operator(Lattice((4,)), 4, 1, matrices, matrices, matrices, Softmax(bias=BiasTable()))
    looked = []
    original = attention._Part.highest
    monkeypatch.setattr(attention._Part, "highest", lambda self, out: looked.append(1) or original(self, out))
    params, x = parameters(operator), tokens(operator, batch=2)
    for low, high in ((1.0, 800.0), (-900.0, -900.0)):
        params["relevance.bias"] = torch.linspace(low, high, 7, dtype=torch.float64).view_as(params["relevance.bias"])
        looked.clear()
        found = results(operator, params, x)
        assert looked
        assert_close(found, results(operator, params, x, algorithm="pairwise"))


def test_queries_that_see_nothing_are_zero_and_cost_no_second_pass(monkeypatch):
    params, x = parameters(FULL), tokens(FULL)
    mask = torch.ones((3, 1, 13, 13), dtype=torch.bool)
    mask[0, :, 4] = False
    mask[1, :, :, 6] = False
    monkeypatch.setattr(attention._Part, "highest", lambda *_: pytest.fail("looked for the largest logit"))
    found = results(FULL, params, x, mask=mask)
    assert_close([found[0][0, 4]], [params["output.bias"]])
    assert_close(found, results(FULL, params, x, mask=mask, algorithm="pairwise"))


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("origin", ["zero", "largest"])
def test_parts_of_the_batch_add_up(kind, origin, monkeypatch):
    params, x = parameters(FULL), tokens(FULL, batch=5)
    generator = torch.Generator().manual_seed(5)
    live = torch.rand((5, 2, 13, 13), generator=generator) < 0.7
    mask = {"none": None, "bool": live, "float": torch.where(live, 0.3, -np.inf).double()}[kind]
    whole = results(FULL, params, x, mask=mask, algorithm="pairwise")
    # Two items: six times 13 tokens and four times the 24 links of mirrored neighbours, of eight float64 each.
    monkeypatch.setattr(attention, "WORKSPACE_BYTES", 2 * (6 * 13 + 4 * 24) * 8 * 8)
    monkeypatch.setattr(attention, "STRETCH_BYTES", (0, 0))
    monkeypatch.setattr(attention, "FEW_BYTES", 0)
    if origin == "largest":
        monkeypatch.setattr(attention, "SUMS", (np.inf, np.inf))
    seen = []
    original = attention._Part.sums
    monkeypatch.setattr(
        attention._Part, "sums", lambda self, outs, *rest: seen.append(outs[0].shape[1]) or original(self, outs, *rest)
    )
    assert_close(results(FULL, params, x, mask=mask), whole)
    assert set(seen) == {1, 2}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("stretch", [0, 2_000, attention.FEW_STRETCH_BYTES])
def test_few_rows_are_multiplied_from_copies(name, stretch, monkeypatch):
    """In stretches of one visit, of some, and in one; where there is a bias too.

    With classes of pairs a visit can be the first of a key's matrix and not of a value's.
    """
    monkeypatch.setattr(attention, "FEW_STRETCH_BYTES", stretch)
    for unused in ("Forward", "Backward"):
        monkeypatch.setattr(passes, unused, lambda *_: pytest.fail("read bands"))
    matrices = PerDisplacement(8)
    operator = Operator(LAYOUTS[name], 8, 2, matrices, matrices, matrices, Softmax(bias=BiasTable()))
    params, x = parameters(operator), tokens(operator)
    y = None if operator.layout.is_self else tokens(operator)[:, :1].repeat(1, operator.layout.num_keys, 1)
    assert_close(results(operator, params, x, y=y), results(operator, params, x, y=y, algorithm="pairwise"))


def test_few_rows_of_another_width():
    """Tokens, keys and values each as wide as nothing else is."""
    widths = {"query": PerDisplacement(8), "key": PerDisplacement(8), "value": PerDisplacement(10)}
    operator = Operator(Lattice((3, 3), registers=1), 12, 2, **widths, key_dim=6)
    params, x = parameters(operator), tokens(operator)
    y = tokens(operator)[..., :6].flip(1)
    assert_close(results(operator, params, x, y=y), results(operator, params, x, y=y, algorithm="pairwise"))


def taken(monkeypatch, compute):
    """Which ways a computation went."""
    found = set()
    for module in (few_rows, passes):
        for name in ("Forward", "Backward"):
            own = getattr(module, name)
            monkeypatch.setattr(
                module, name, lambda *a, own=own, module=module: found.add((module, own.__name__)) or own(*a)
            )
    compute()
    return found


def test_the_way_depends_on_rows_masks_and_onednn(monkeypatch):
    params, x = parameters(FULL, dtype=torch.float32), tokens(FULL, dtype=torch.float32)
    mask = torch.ones((13, 13), dtype=torch.bool).tril()
    few, bands = ({(module, name) for name in ("Forward", "Backward")} for module in (few_rows, passes))
    with monkeypatch.context() as patch:
        assert taken(patch, lambda: results(FULL, params, x)) == few
    with monkeypatch.context() as patch:
        assert taken(patch, lambda: results(FULL, params, x, mask=mask)) == bands
    # 169 links x 3 items of 8 floats, over 38 displacements and registers.
    steps = len(links(FULL.layout, CPU).steps)
    for limit, expected in ((169 * 3 * 32 / steps, few), (169 * 3 * 32 / steps - 1, bands)):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "FEW_BYTES", limit)
            assert taken(patch, lambda: results(FULL, params, x)) == expected
    with monkeypatch.context() as patch:
        patch.setattr(attention, "is_for_onednn", lambda rows, *_: rows >= 12 * 3)
        expected = {(few_rows, "Forward"), (passes, "Backward")}
        assert taken(patch, lambda: results(FULL, params, x)) == expected


def test_large_batches_take_two_bands_for_mirrored_displacements():
    """Three where one part is enough: then the values of both are one product."""
    own = links(presets.translution((7, 7), 192, 3).layout, torch.device("cpu"))

    def bands(found):
        return {len(visit.query.bands) for visit in found.visits if len(visit.steps) > 1}

    assert (bands(own), bands(own.apart)) == ({2, 3}, {2})
    assert own.apart is own.apart
    assert sorted(own.pair_of_link.tolist()) == sorted(own.apart.pair_of_link.tolist())


@pytest.mark.usefixtures("way")
def test_one_tensor_under_two_names_gets_the_gradient_of_both():
    operator = presets.translution((3, 3), 4, 1)
    params, x = parameters(operator), tokens(operator)
    table = params["query.table"].clone().requires_grad_()
    own = params | {"query.table": table, "key.table": table}
    out = translution.run(operator, own, x, backend="torch", algorithm="stream")
    (found,) = torch.autograd.grad(out.square().sum(), [table])
    apart = results(operator, params | {"key.table": params["query.table"]}, x)
    names = ["out", "x", *params]
    expected = apart[names.index("query.table")] + apart[names.index("key.table")]
    assert_close([found], [expected])


@pytest.mark.parametrize(("side", "batch"), [(5, 100), (7, 8), (7, 32), (7, 128), (14, 16), (14, 32)])
def test_training_takes_no_more_than_attention(side, batch):
    """6 x B N C' floats and 32 MB beyond what is given, its gradients and those of the parameters; only counted."""
    operator = presets.translution((side, side), 192, 3, registers=1)
    expected = predict(backend, Request(operator, batch, gradient=True), "stream")
    beyond = expected.working_bytes - expected.parameter_bytes
    tokens = batch * (side * side + 1) * 192 * 4
    assert beyond <= 6 * tokens + 32e6
