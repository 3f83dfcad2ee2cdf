"""The torch backend: equal to the definition within a derived bound, clean behind masks, small, pure.

Two results that each keep the bound of ``conformance.error_model`` differ by at most twice that bound.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import translution
from translution.algorithms import Request
from translution.conformance.error_model import Budget, budget
from translution.conformance.exam.draws import SeededDraws
from translution.conformance.exam.question import Array, Question, rounded
from translution.conformance.strategies import draw_question, random_case
from translution.execution import vjp
from translution.geometry import geometry
from translution.registry import Backend, get_backend
from translution.spec import (
    BiasTable,
    Clip,
    Identity,
    Lattice,
    LowRank,
    Ones,
    Operator,
    PairTable,
    PerDisplacement,
    Rotary,
    Shared,
    Softmax,
    presets,
)

GENERAL = ("stream", "pairwise")
Results = dict[str, Array]


def _numbers(value: Tensor) -> Array:
    found: Array = value.detach().double().numpy()
    return found


def _results(case: Question, cotangent: Array, algorithm: str, dtype: torch.dtype = torch.float64) -> Results:
    """out, weights where the algorithm has them, and every gradient, by name; through ``run`` and autograd."""
    leaf = lambda value: torch.tensor(value, dtype=dtype, requires_grad=True)  # noqa: E731
    params = {name: leaf(value) for name, value in case.params.items()}
    x, y = leaf(case.x), None if case.y is None else leaf(case.y)
    mask = None if case.mask is None else torch.tensor(case.mask)
    found, has_weights = {}, algorithm in GENERAL
    given = translution.run(case.operator, params, x, y, mask=mask, algorithm=algorithm, return_weights=has_weights)
    out, weights = given if has_weights else (given, None)
    assert out.dtype == dtype
    if weights is not None:
        assert weights.dtype == dtype
        found["weights"] = _numbers(weights)
    leaves = {"x": x, **params} | ({} if y is None else {"y": y})
    pulled = [None] * len(leaves)
    if out.requires_grad:
        pull = torch.tensor(cotangent, dtype=dtype)
        pulled = list(torch.autograd.grad(out, list(leaves.values()), pull, allow_unused=True))
    for (name, value), gradient in zip(leaves.items(), pulled, strict=True):
        found[name] = np.zeros(value.shape) if gradient is None else _numbers(gradient)
        assert gradient is None or gradient.dtype == dtype
    return found | {"out": _numbers(out)}


def _cotangent(case: Question) -> Array:
    return np.random.default_rng(0).integers(-3, 4, case.out_shape).astype(np.float64)


def _bounds(found: Budget) -> Results:
    return {"out": found.out, "weights": found.weights_bound, **found.gradients}


def _assert_within(case: Question, actual: Results, expected: Results, bounds: Results) -> None:
    for name, value in actual.items():
        assert value.shape == expected[name].shape, f"{name}: {case}"
        difference = np.abs(value - expected[name])
        # "not >" and not "<=": NaN fails.
        assert (difference <= bounds[name]).all(), f"{name} is off by {difference.max()}: {case}"


def _reference(case: Question, cotangent: Array) -> Results:
    operator, mask = case.operator, case.mask
    out, weights = translution.run(
        operator, case.params, case.x, case.y, mask=mask, backend="reference", return_weights=True
    )
    _, found = vjp(operator, case.params, case.x, case.y, cotangent=cotangent, mask=mask, backend="reference")
    results = {"out": out, "weights": weights, "x": found.x, **found.params}
    return results if case.y is None else results | {"y": found.y}


def _check_against_reference(case: Question, algorithms: tuple[str, ...]) -> None:
    cotangent = _cotangent(case)
    expected = _reference(case, cotangent)
    bounds = _bounds(budget(case.operator, case.params, case.x, case.y, case.mask, cotangent, "float64"))
    twice = {name: 2 * bounds[name] for name in expected}
    for algorithm in algorithms:
        _assert_within(case, _results(case, cotangent, algorithm), expected, twice)


# 115 seeds: every layout kind with many relevances, encoders and masks (see conformance.strategies).
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("first", range(0, 115, 23))
def test_equals_the_definition(first: int) -> None:
    for seed in range(first, first + 23):
        _check_against_reference(random_case(seed), GENERAL)


def test_equals_the_definition_where_no_displacement_can_occur() -> None:
    layout = Lattice((1, 1), key_grid=(4, 3), offset=-1, causal=True)
    assert layout.num_classes == 0
    for seed in range(34):
        _check_against_reference(draw_question(SeededDraws(seed), layout=layout), GENERAL)


def _case(operator: Operator, seed: int = 0, *, mask: Array | None = None, batch: int = 2) -> Question:
    rng = np.random.default_rng(seed)
    params = {name: rng.standard_normal(shape) / 2 for name, shape in operator.parameters.items()}
    x = rng.standard_normal((batch, operator.layout.num_queries, operator.dim))
    alone = operator.layout.is_self and operator.keys_dim == operator.dim
    y = None if alone else rng.standard_normal((batch, operator.layout.num_keys, operator.keys_dim))
    return Question(operator, params, x, y, mask)


CONVOLUTIONS = [
    presets.convolution((7,), 4, 6, 3, stride=2, padding=1, groups=2),
    presets.convolution((5, 6), 4, 4, (3, 2), padding=(4, 1), dilation=(1, 2), groups=4),
    presets.convolution((5, 4), 2, 3, 3, stride=(2, 1), padding=2, padding_mode="circular"),
    presets.convolution((2, 3), 2, 3, 3, padding=5, padding_mode="circular"),
    presets.convolution((5, 4), 2, 3, 3, padding=2, padding_mode="reflect", bias=False),
    presets.convolution((5, 4), 2, 3, 3, padding=1, padding_mode="replicate"),
    presets.convolution((3, 2, 4), 2, 3, 2, padding=1, stride=2),
    presets.transposed_convolution((4,), 4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
    presets.transposed_convolution((3, 4), 2, 3, (3, 2), stride=(2, 3), padding=(2, 0), dilation=(1, 2)),
    presets.transposed_convolution((2, 2, 3), 2, 3, 2, stride=(1, 2, 1)),
    Operator(Lattice((6,), kernel_size=3, padding=-1), 2, 2, PerDisplacement(4), relevance=Ones()),
    # So few queries that the window leaves all the keys on one side.
    Operator(Lattice((3, 2), key_grid=(3, 3), kernel_size=2, padding=4), 2, 2, PerDisplacement(4), relevance=Ones()),
    Operator(
        Lattice((2,), key_grid=(2,), kernel_size=2, key_stride=2, padding=9), 2, 1, PerDisplacement(3), relevance=Ones()
    ),
    Operator(Lattice((6,), kernel_size=4, causal=True), 2, 2, PerDisplacement(4), relevance=Ones(), output_scale=-2.0),
]


@pytest.mark.parametrize("operator", CONVOLUTIONS)
def test_conv_equals_the_definition(operator: Operator) -> None:
    case = _case(operator)
    assert get_backend("torch").not_supported(Request(operator), "conv") == []
    _check_against_reference(case, ("conv", "stream", "pairwise"))


def _attention(layout: Lattice | PairTable, **more: Any) -> Operator:
    settings = {"query": Shared(4, bias=True), "key": Shared(4), "value": Shared(6)} | more
    return Operator(layout, 3, 2, output=Shared(3, bias=True), **settings)


GRAPH = PairTable(((0, 1, -1), (1, 0, -1), (-1, -1, -1)), 2)
ATTENTIONS = [
    _attention(Lattice((5,))),
    _attention(Lattice((2, 3), registers=1), relevance=Softmax(scale=-0.7, bias=BiasTable())),
    _attention(Lattice((4,), causal=True)),
    _attention(Lattice((2, 3), causal=True), relevance=Softmax(bias=BiasTable())),
    _attention(Lattice((3,), key_grid=(5,)), key_dim=2, relevance=Softmax(scale=0.0)),
    _attention(Lattice((4, 4), kernel_size=3)),
    _attention(GRAPH),
    Operator(
        Lattice((2, 2), registers=1), 4, 2, Shared(4), Rotary(Shared(8)), Rotary(Shared(8), pairing="interleaved")
    ),
]


def _masks(operator: Operator) -> list[Array | None]:
    rng, layout = np.random.default_rng(3), operator.layout
    full = (2, operator.num_heads, layout.num_queries, layout.num_keys)
    dead = rng.random(full) < 0.6
    dead[..., -1, :] = False
    padding = rng.random((2, 1, 1, layout.num_keys)) < 0.5
    padding[0] = False
    return [None, dead, padding, np.where(dead, rng.standard_normal(full), -np.inf), rng.standard_normal(full[-2:])]


@pytest.mark.parametrize("operator", ATTENTIONS)
def test_sdpa_equals_the_definition(operator: Operator) -> None:
    assert get_backend("torch").not_supported(Request(operator), "sdpa") == []
    for mask in _masks(operator):
        _check_against_reference(_case(operator, mask=mask), ("sdpa", "stream"))


@pytest.mark.parametrize("operator", ATTENTIONS)
def test_sdpa_of_an_empty_batch_has_gradients_of_zero(operator: Operator) -> None:
    case = _case(operator, batch=0)
    for mask in (None, np.zeros(case.weights_shape[-2:])):
        found = _results(replace(case, mask=mask), np.zeros(case.out_shape), "sdpa")
        assert found["out"].shape == case.out_shape
        assert not any(value.any() for value in found.values())


def test_B1_shortcuts_are_chosen_unless_another_algorithm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from translution.backends.torch import native

    used = []
    for name in ("convolution", "attention", "plain_attention"):
        original = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, n=name, f=original: (used.append(n), f(*a))[1])
    for operator, shortcut in ((CONVOLUTIONS[0], "convolution"), (ATTENTIONS[0], "plain_attention")):
        case = _case(operator)
        translution.run(operator, case.params, case.x, case.y, backend="torch")
        assert used == [shortcut]
        used.clear()
        translution.run(operator, case.params, case.x, case.y, backend="torch", algorithm="stream")
        assert used == []


@pytest.mark.parametrize("operator", [CONVOLUTIONS[1], CONVOLUTIONS[2], CONVOLUTIONS[8]])
def test_R2_integers_are_exact_by_every_algorithm(operator: Operator) -> None:
    """Relevance ones on small integers in float32: every sum is below 2^24, so no rounding occurs."""
    rng = np.random.default_rng(0)
    case = _case(operator)
    assert case.y is not None
    params = {name: rng.integers(-4, 5, value.shape).astype(float) for name, value in case.params.items()}
    whole = replace(case, params=params, y=rng.integers(-4, 5, case.y.shape).astype(float))
    cotangent = _cotangent(whole)
    expected = _reference(whole, cotangent)
    for algorithm in ("conv", "stream", "pairwise"):
        for name, value in _results(whole, cotangent, algorithm, torch.float32).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=f"{algorithm}: {name}")


def _held(case: Question, dtype: str) -> Question:
    """The case with values that ``dtype`` can hold."""
    params = {name: rounded(value, dtype) for name, value in case.params.items()}
    return replace(case, params=params, x=rounded(case.x, dtype), y=None if case.y is None else rounded(case.y, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_D2_lower_precision_stays_within_its_bound(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    random = [(draw_question(SeededDraws(seed), name), GENERAL) for seed in range(300, 323)]
    native = [(o, ("conv",)) for o in CONVOLUTIONS] + [(o, ("sdpa",)) for o in ATTENTIONS]
    for case, algorithms in random + [(_held(_case(o), name), algorithms) for o, algorithms in native]:
        cotangent = _cotangent(case)
        bound = budget(case.operator, case.params, case.x, case.y, case.mask, cotangent, name)
        weights = translution.run(
            case.operator, case.params, case.x, case.y, mask=case.mask, backend="reference", return_weights=True
        )[1]
        values = {"out": bound.value, "weights": weights, **bound.gradient_values}
        for algorithm in algorithms:
            _assert_within(case, _results(case, cotangent, algorithm, dtype), values, _bounds(bound))


@pytest.mark.parametrize("algorithm", GENERAL)
def test_vjp_gives_each_side_its_own_gradient(algorithm: str) -> None:
    operator = presets.translution((2, 3), 4, 2, registers=1)
    case = _case(operator)
    params = {name: torch.tensor(value) for name, value in case.params.items()}
    x = torch.tensor(case.x)
    cotangent = torch.tensor(_cotangent(case))
    _, both = vjp(operator, params, x, cotangent=cotangent, backend="torch", algorithm=algorithm)
    _, apart = vjp(operator, params, x, x.clone(), cotangent=cotangent, backend="torch", algorithm=algorithm)
    assert both.y is None
    assert torch.equal(both.x, apart.x + apart.y)
    assert all(torch.equal(both.params[name], apart.params[name]) for name in params)


@pytest.mark.parametrize("algorithm", GENERAL)
@pytest.mark.usefixtures("way")
def test_strided_and_expanded_inputs(algorithm: str) -> None:
    operator = presets.alpha_translution((2, 3), 4, 2, rank=2)
    case = _case(operator, mask=np.random.default_rng(0).random((2, 1, 6, 6)) < 0.7)
    x = np.repeat(case.x[:1], 2, 0)
    bound = budget(operator, case.params, x, mask=case.mask, dtype="float64")
    assert case.mask is not None
    mask = torch.tensor(case.mask).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    params = {n: torch.tensor(p).movedim(-1, 0).contiguous().movedim(0, -1) for n, p in case.params.items()}
    assert not params["value.1.table"].is_contiguous()
    whole = torch.tensor(x)
    for given in (whole[:1].expand(2, -1, -1), whole.mT.contiguous().mT, torch.stack((whole, whole), -1)[..., 0]):
        assert not given.is_contiguous()
        out = translution.run(operator, params, given, mask=mask, algorithm=algorithm)
        assert (np.abs(_numbers(out) - bound.value) <= bound.out).all()


def _call(case: Question, algorithm: str) -> tuple[Callable[[], None], list[Tensor]]:
    """A call with its backward, and everything that it is given."""
    leaf = lambda value: torch.tensor(value, requires_grad=True)  # noqa: E731
    params = {name: leaf(value) for name, value in case.params.items()}
    x, y = leaf(case.x), None if case.y is None else leaf(case.y)
    mask = None if case.mask is None else torch.tensor(case.mask)

    def call() -> None:
        out = translution.run(case.operator, params, x, y, mask=mask, algorithm=algorithm)
        out.backward(torch.ones_like(out))

    return call, [t for t in (x, y, mask, *params.values()) if t is not None]


@pytest.mark.usefixtures("way")
def test_inputs_are_never_written_and_results_own_their_memory() -> None:
    pairs = [(_case(CONVOLUTIONS[0]), "conv"), (_case(ATTENTIONS[0]), "sdpa")]
    for case, algorithm in pairs + [(random_case(s), a) for s in range(46) for a in GENERAL]:
        call, given = _call(case, algorithm)
        if not any(case.x.shape[:1]):
            continue
        copies = [(t.detach().clone(), t._version) for t in given]
        if case.operator.parameters:
            call()
        for t, (copy, version) in zip(given, copies, strict=True):
            assert torch.equal(t, copy)
            assert t._version == version, case
    operator = Operator(Lattice((3,)), 2, 1, Identity(), relevance=Ones())
    x = torch.ones(1, 3, 2)
    for algorithm in GENERAL:
        translution.run(operator, {}, x, algorithm=algorithm).zero_()
    assert torch.equal(x, torch.ones(1, 3, 2))


def test_concurrent_calls_do_not_disturb_each_other() -> None:
    operator = presets.translution((4, 4), 8, 2, registers=1)
    chosen = [_case(operator, seed) for seed in range(8)]
    alone = [_results(case, _cotangent(case), "stream") for case in chosen]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: _results(case, _cotangent(case), "stream"), chosen * 3))
    for number, found in enumerate(together):
        for name, value in found.items():
            np.testing.assert_array_equal(value, alone[number % 8][name])


@pytest.mark.parametrize("algorithm", ["stream", "pairwise", "conv", "sdpa"])
def test_D1_autocast_does_not_change_dtypes(algorithm: str) -> None:
    operator = {"conv": CONVOLUTIONS[0], "sdpa": ATTENTIONS[1]}.get(
        algorithm, Operator(Lattice((3, 3)), 4, 2, PerDisplacement(4, groups=2), PerDisplacement(4), Shared(4))
    )
    case = _case(operator)
    plain = _results(case, _cotangent(case), algorithm, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under = _results(case, _cotangent(case), algorithm, torch.float32)
    np.testing.assert_array_equal(under["out"], plain["out"])


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation gave, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                # A view takes no memory beyond what it looks at.
                self.elements = max(self.elements, min(t.numel(), t.untyped_storage().nbytes() // t.element_size()))
        return out


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "operator",
    [
        presets.translution((8, 8), 48, 2, registers=1),
        presets.translution((64,), 48, 2, causal=True),
        presets.translution((8, 8), 48, 2, far=Clip(0)),
        presets.alpha_translution((8, 8), 48, 2, rank=3),
        Operator(Lattice((8, 8)), 48, 2, LowRank(6, 48), LowRank(6, 48), LowRank(6, 48)),
    ],
)
def test_stream_creates_no_tensor_of_links_times_features(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing larger than tokens x features, links x heads, or the largest table; ``pairwise`` creates it.

    But for a stretch of visits, whose size no operator and no batch changes.
    """
    for name, nothing in (("STRETCH_BYTES", (0, 0)), ("FEW_STRETCH_BYTES", 0)):
        monkeypatch.setattr(f"translution.backends.torch.attention.{name}", nothing)
    case, batch = _case(operator, batch=16), 16
    links, tokens = geometry(operator.layout).num_links, operator.layout.num_queries
    features = operator.num_heads * max(operator.head_dim, operator.value_head_dim)
    folded = operator.layout.num_classes * 6 * 48  # a low-rank query's or key's table with its ``up``
    largest = max(
        batch * (tokens + 1) * max(features, operator.dim),
        batch * (links + 1) * operator.num_heads,
        *(int(np.prod(shape)) for shape in operator.parameters.values()),
        folded,
    )
    assert largest < batch * links * features / 3
    seen = {}
    for algorithm in GENERAL:
        call, _ = _call(case, algorithm)
        with _Largest() as recorded:
            call()
        seen[algorithm] = recorded.elements
    assert seen["stream"] <= largest
    assert seen["pairwise"] >= batch * links * features


def test_B1_claims_name_their_reasons() -> None:
    backend = get_backend("torch")
    assert isinstance(backend, Backend)
    operator = presets.translution((2, 2), 4, 1)
    request = Request(operator, device="meta")
    for algorithm in GENERAL:
        assert any("meta" in reason for reason in backend.not_supported(request, algorithm))
        assert backend.not_supported(Request(operator), algorithm) == []
    with pytest.raises(translution.NotSupported, match="sdpa: query, key, value differ"):
        translution.run(operator, {n: torch.zeros(s) for n, s in operator.parameters.items()}, torch.zeros(1, 4, 4),
                        algorithm="sdpa")  # fmt: skip
    for tf32 in (True, False):
        with torch.backends.cudnn.flags(allow_tf32=tf32):
            reasons = backend.not_supported(Request(CONVOLUTIONS[0], device="cuda"), "conv")
            assert any("tf32" in reason for reason in reasons) == tf32
            assert any("no GPU" in reason for reason in reasons) != torch.cuda.is_available()
    assert not any("tf32" in r for r in backend.not_supported(Request(CONVOLUTIONS[0], device="cpu"), "conv"))


def test_rows_that_repeat_are_listed_and_not_added_through_a_view() -> None:
    """Keys 0 1 1 2 are evenly spaced in both directions, but a view of them would hold key 1 twice."""
    from translution.backends.torch.links import links

    classes = ((0, 0, -1, -1), (-1, 0, 0, -1))
    (visit,) = links(PairTable(classes, 1, classes), torch.device("cpu")).visits
    assert visit.key.bands[0].index is not None
    assert visit.key.bands[0].index.tolist() == [0, 1, 1, 2]
