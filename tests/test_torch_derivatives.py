"""The torch backend's first and second derivatives against finite differences, and what masks keep out of them."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import translution
from translution.conformance.exam.question import Array, Question
from translution.conformance.strategies import random_case
from translution.execution import vjp
from translution.geometry import geometry
from translution.spec import (
    BiasTable,
    Clip,
    Concat,
    Encoder,
    Identity,
    Lattice,
    Layout,
    LowRank,
    Mean,
    Mixture,
    Ones,
    Operator,
    PairTable,
    PerDisplacement,
    QuadraticBias,
    Relevance,
    Rotary,
    Shared,
    SlopeBias,
    Softmax,
    Sum,
    Vectors,
    presets,
)

GENERAL = ("stream", "pairwise")
CROSS = Lattice((2,), key_grid=(3,), offset=1)

ENCODERS: dict[str, Encoder] = {
    "identity": Identity(bias=True),
    "shared": Shared(4, bias=True),
    "grouped shared": Shared(4, groups=2),
    "displacement": PerDisplacement(4, bias=True),
    "grouped displacement": PerDisplacement(4, groups=2),
    "low rank": LowRank(3, 4),
    "inner": LowRank(4),
    "vectors": Vectors(4),
    "head vectors": Vectors(4, shared_heads=True),
    "sum": Sum((Shared(4), PerDisplacement(4), LowRank(1, 4), Vectors(4))),
    "concat": Concat((Shared(2, bias=True), PerDisplacement(2))),
}
ROTARY: dict[str, Encoder] = {
    "rotary": Rotary(Shared(4)),
    "rotary displacement": Rotary(PerDisplacement(4, bias=True), base=3.0),
    "interleaved": Rotary(Sum((Identity(), Vectors(4))), pairing="interleaved"),
    "partly rotary": Concat((Rotary(PerDisplacement(4)), Rotary(Shared(4)), LowRank(2))),
}
RELEVANCES: dict[str, Relevance] = {
    "softmax": Softmax(scale=0.7),
    "bias table": Softmax(bias=BiasTable()),
    "slopes": Softmax(bias=SlopeBias()),
    "quadratic": Softmax(bias=QuadraticBias()),
    "bias alone": Softmax(content=False, bias=BiasTable()),
    "ones": Ones(),
    "mean": Mean(),
    "mixture": Mixture(Softmax(), Softmax(content=False, bias=QuadraticBias())),
    "two contents": Mixture(Softmax(scale=0.3), Softmax(bias=BiasTable())),
    "mixed ones": Mixture(Ones(), Softmax()),
}
LAYOUTS: dict[str, Layout] = {
    "registers": Lattice((2, 2), registers=2),
    "causal": Lattice((3,), causal=True, registers=1),
    "zeros": Lattice((3,), kernel_size=3, boundary="zeros"),
    "reflect": Lattice((3,), kernel_size=3, boundary="reflect", padding=1),
    "replicate": Lattice((2,), kernel_size=3, boundary="replicate", padding=2),
    "circular": Lattice((2, 2), boundary="circular"),
    "far": Lattice((4,), far=Clip(1)),
    "strided": Lattice((2,), key_grid=(4,), kernel_size=2, stride=2, padding=0),
    "transposed": Lattice((5,), key_grid=(2,), key_stride=2, kernel_size=3, padding=1),
    "graph": PairTable(((0, 1, -1), (1, 1, -1), (-1, -1, 0)), 2),
    "no links": Lattice((2,), key_grid=(2,), kernel_size=1, offset=9),
}


def _operator(layout: Layout, encoder: Encoder, relevance: Relevance, value: Encoder | None = None) -> Operator:
    content = {"query": encoder, "key": encoder}
    if isinstance(relevance, (Ones, Mean)) or (isinstance(relevance, Softmax) and not relevance.content):
        content = {}
    return Operator(layout, 4, 2, value or encoder, relevance=relevance, key_dim=4, **content)


def _tensors(operator: Operator, mask: Array | None = None) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    layout = operator.layout
    shapes = {"x": (2, layout.num_queries, 4), "y": (2, layout.num_keys, 4)} | dict(operator.parameters)
    found = {n: torch.tensor(rng.standard_normal(s) / 2, requires_grad=True) for n, s in shapes.items()}
    return found if mask is None else found | {"mask": torch.tensor(mask, requires_grad=mask.dtype != np.bool_)}


def _check(operator: Operator, algorithm: str, mask: Array | None = None) -> None:
    """gradcheck and gradgradcheck along random directions, of the result and the weights together."""
    tensors = _tensors(operator, mask)

    def call(*given: Tensor) -> Tensor | tuple[Tensor, ...]:
        own = dict(zip(tensors, given, strict=True))
        x, y, m = own.pop("x"), own.pop("y"), own.pop("mask", None)
        found = translution.run(operator, own, x, y, mask=m, algorithm=algorithm, return_weights=algorithm in GENERAL)
        several = found if isinstance(found, tuple) else (found,)
        return tuple(t for t in several if t.requires_grad)

    given = tuple(tensors.values())
    if call(*given):
        assert torch.autograd.gradcheck(call, given, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, given, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("algorithm", GENERAL)
@pytest.mark.parametrize("name", [*ENCODERS, *ROTARY])
@pytest.mark.usefixtures("way")
def test_derivatives_of_every_encoder(name: str, algorithm: str) -> None:
    encoder = ENCODERS.get(name) or ROTARY[name]
    _check(_operator(CROSS, encoder, Softmax(), ENCODERS.get(name, Shared(4))), algorithm)


@pytest.mark.parametrize("algorithm", GENERAL)
@pytest.mark.parametrize("name", RELEVANCES)
def test_derivatives_of_every_relevance(name: str, algorithm: str) -> None:
    _check(_operator(CROSS, PerDisplacement(4), RELEVANCES[name]), algorithm)


@pytest.mark.parametrize("algorithm", GENERAL)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.usefixtures("way")
def test_derivatives_on_every_layout(name: str, algorithm: str) -> None:
    _check(_operator(LAYOUTS[name], PerDisplacement(2), Softmax()), algorithm)


@pytest.mark.parametrize("algorithm", [*GENERAL, "sdpa"])
@pytest.mark.parametrize("relevance", [Softmax(), Mixture(Softmax(), Softmax(content=False, bias=BiasTable()))])
def test_derivatives_for_float_masks_and_around_dead_rows(relevance: Relevance, algorithm: str) -> None:
    encoder = Shared(4) if algorithm == "sdpa" else Sum((Shared(4), PerDisplacement(4)))
    if algorithm == "sdpa" and isinstance(relevance, Mixture):
        relevance = Softmax(bias=BiasTable())
    operator = _operator(CROSS, encoder, relevance)
    rng = np.random.default_rng(1)
    for shape in ((2, 1, 2, 3), (2, 2, 1, 3)):
        live = rng.random(shape) < 0.7
        live[..., -1, :] = False
        _check(operator, algorithm, live)
        # Finite differences need finite numbers: the float mask that takes keys away is compared below.
        _check(operator, algorithm, rng.standard_normal(shape))


@pytest.mark.parametrize("algorithm", [*GENERAL, "sdpa"])
def test_M2_the_gradient_of_a_float_mask_is_zero_where_it_takes_a_key_away(algorithm: str) -> None:
    operator = _operator(CROSS, Shared(4), Softmax())
    mask = np.array([[0.3, -np.inf, 0.1], [-np.inf, -np.inf, -np.inf]])
    tensors = _tensors(operator, mask)
    out = translution.run(
        operator, {n: tensors[n] for n in operator.parameters}, tensors["x"], tensors["y"], mask=tensors["mask"],
        algorithm=algorithm,
    )  # fmt: skip
    out.square().sum().backward()
    gradient = tensors["mask"].grad
    assert gradient is not None
    assert torch.equal(gradient != 0, torch.tensor([[True, False, True], [False, False, False]]))


NATIVE = [
    ("conv", presets.convolution((4,), 4, 4, 3, stride=2, padding=1, groups=2)),
    ("conv", presets.convolution((3, 2), 4, 2, 2, padding=1, padding_mode="circular")),
    ("conv", presets.transposed_convolution((2, 2), 4, 2, 2, stride=2, padding=1)),
    ("sdpa", _operator(Lattice((3,), causal=True), Shared(4), Softmax())),
    ("sdpa", _operator(Lattice((4,)), Rotary(Shared(4)), Softmax(bias=BiasTable()), Shared(2))),
    ("sdpa", _operator(Lattice((4,), kernel_size=3), Shared(4), Softmax(bias=QuadraticBias()))),
]


@pytest.mark.parametrize(("algorithm", "operator"), NATIVE)
def test_derivatives_of_native_kernels(algorithm: str, operator: Operator) -> None:
    _check(operator, algorithm)


def _second(operator: Operator, algorithm: str) -> Mapping[str, Tensor]:
    """Gradients of the squared gradients."""
    tensors = _tensors(operator)
    names = [n for n in tensors if n != "y"]
    params = {n: tensors[n] for n in operator.parameters}
    out = translution.run(operator, params, tensors["x"], algorithm=algorithm)
    first = torch.autograd.grad(out.square().sum(), [tensors[n] for n in names], create_graph=True)
    total = torch.stack([g.square().sum() for g in first]).sum()
    return dict(zip(names, torch.autograd.grad(total, [tensors[n] for n in names]), strict=True))


def test_second_derivatives_are_not_silently_zero() -> None:
    """x on both sides: one tensor that two roles share must not be counted twice either."""
    for layout in (Lattice((3,), registers=1), Lattice((2, 2), causal=True)):
        operator = Operator(layout, 4, 2, PerDisplacement(4), PerDisplacement(4), PerDisplacement(4))
        streamed, paired = _second(operator, "stream"), _second(operator, "pairwise")
        for name, value in streamed.items():
            assert value.abs().max() > 1e-3, name
            # Both sum fewer than 1000 products of numbers whose result is of the size of the largest.
            assert (value - paired[name]).abs().max() <= 1000 * 2.0**-52 * paired[name].abs().max(), name


@pytest.mark.parametrize("algorithm", [*GENERAL, "sdpa"])
def test_a_first_call_in_inference_mode_leaves_later_ones_differentiable(algorithm: str) -> None:
    layout = Lattice((5, len(algorithm)), kernel_size=3)  # no other test's: index arrays are kept by layout
    operator = _operator(layout, Shared(4) if algorithm == "sdpa" else PerDisplacement(4), Softmax(bias=BiasTable()))
    tensors = _tensors(operator)
    params = {n: tensors[n] for n in operator.parameters}
    mask = torch.ones(layout.num_queries, layout.num_keys, dtype=torch.bool)
    with torch.inference_mode():
        translution.run(operator, params, tensors["x"], mask=mask, algorithm=algorithm)
    translution.run(operator, params, tensors["x"], mask=mask, algorithm=algorithm).sum().backward()
    assert tensors["x"].grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's forward mode
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev"])
def test_a_first_call_in_a_transform_is_right_and_spoils_no_later_one(transform: str) -> None:
    layout = Lattice((4, 10 + len(transform)), kernel_size=3, registers=len(transform))  # no other test's, as above
    operator = _operator(layout, PerDisplacement(4), Softmax(bias=BiasTable()))
    tensors = {n: t.detach() for n, t in _tensors(operator).items()}
    params = {n: tensors[n] for n in operator.parameters}
    mask = torch.ones(layout.num_queries, layout.num_keys, dtype=torch.bool).triu(-20)

    def call(x: Tensor) -> Tensor:
        out: Tensor = translution.run(operator, params, x, mask=mask, algorithm="pairwise")
        return out

    x = tensors["x"]
    by: dict[str, Callable[[], Tensor]] = {
        "grad": lambda: torch.func.grad(lambda v: call(v).sum())(x),
        "vmap": lambda: torch.func.vmap(call)(x),
        "jvp": lambda: torch.func.jvp(call, (x,), (x,))[1],
        "jacrev": lambda: torch.func.jacrev(lambda v: call(v).sum((1, 2)))(x),
    }
    first, expected = by[transform](), call(x)
    assert torch.equal(by[transform](), first)
    if transform == "vmap":
        assert (first - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.usefixtures("way")
def test_only_wanted_gradients_are_computed() -> None:
    operator = presets.translution((2, 2), 4, 2)
    everything = _tensors(operator)
    params = {n: everything[n] for n in operator.parameters}
    translution.run(operator, params, everything["x"], algorithm="stream").sum().backward()
    for wanted in ("x", "query.table", "value.table"):
        tensors = {n: t.detach().clone().requires_grad_(n == wanted) for n, t in everything.items()}
        own = {n: tensors[n] for n in operator.parameters}
        translution.run(operator, own, tensors["x"], algorithm="stream").sum().backward()
        for name, t in tensors.items():
            if name == wanted:
                assert torch.equal(t.grad, everything[name].grad)  # type: ignore[arg-type]
            else:
                assert t.grad is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's forward mode
@pytest.mark.parametrize(("algorithm", "kind"), [("stream", PerDisplacement), ("sdpa", Shared)])
def test_what_has_no_derivative_raises_instead_of_zero(algorithm: str, kind: type[Shared]) -> None:
    operator = Operator(Lattice((3,)), 4, 1, kind(4), kind(4), kind(4))
    params = {n: torch.ones(s) for n, s in operator.parameters.items()}
    x = torch.ones(1, 3, 4)
    with forward_ad.dual_level(), pytest.raises(translution.NotSupported, match="pairwise"):
        translution.run(operator, params, forward_ad.make_dual(x, x), algorithm=algorithm)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(translution.NotSupported, match=r"torch\.func.*pairwise"):
            transform(lambda v: translution.run(operator, params, v, algorithm=algorithm).sum())(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")  # what dynamo says of our caches, and of its own steps
@pytest.mark.parametrize("algorithm", ["stream", "pairwise", "sdpa"])
@pytest.mark.parametrize("recorded", [False, True])
def test_compiled_by_dynamo_is_the_same(algorithm: str, recorded: bool) -> None:
    kind = Shared if algorithm == "sdpa" else PerDisplacement
    operator = Operator(Lattice((3,), registers=1), 4, 2, kind(4), kind(4), kind(4))
    tensors = {n: t.detach() for n, t in _tensors(operator).items()}
    params = {n: tensors[n] for n in operator.parameters}

    def call(x: Tensor) -> Tensor:
        out: Tensor = translution.run(operator, params, x, algorithm=algorithm)
        return out

    torch.compiler.reset()
    x = tensors["x"].requires_grad_(recorded)
    expected, found = call(x), torch.compile(call, backend="eager")(x)
    assert torch.equal(found, expected)
    if recorded:
        (wanted,), (got,) = (torch.autograd.grad(out.sum(), x) for out in (expected, found))
        assert torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's forward mode
def test_forward_mode_of_pairwise_is_right() -> None:
    operator = presets.translution((2, 2), 4, 2)
    tensors = {n: t.detach() for n, t in _tensors(operator).items()}
    params = {n: tensors[n] for n in operator.parameters}
    x = tensors["x"]
    with forward_ad.dual_level():
        out = translution.run(operator, params, forward_ad.make_dual(x, torch.ones_like(x)), algorithm="pairwise")
        tangent = forward_ad.unpack_dual(out).tangent
    x.requires_grad_()
    found = torch.autograd.grad(translution.run(operator, params, x, algorithm="stream").sum(), x)[0]
    assert tangent is not None
    torch.testing.assert_close(tangent.sum(), found.sum(), rtol=1e-12, atol=1e-12)


def _live(case: Question) -> Array:
    assert case.mask is not None
    live = case.mask if case.mask.dtype == np.bool_ else np.asarray(case.mask != -np.inf)
    return np.broadcast_to(live, case.weights_shape)


def _absent(case: Question) -> tuple[Array, Array, Array]:
    """Which queries see nothing, which keys nobody sees, and whether a pair is linked and live."""
    links = geometry(case.operator.layout)
    count = np.zeros((links.num_queries, links.num_keys + 1), bool)
    count[links.query_index, links.key_index] = True
    pairs = count[:, :-1] if case.mask is None else _live(case).any(-3) & count[:, :-1]
    pairs = np.broadcast_to(pairs, (*case.x.shape[:-2], *pairs.shape[-2:]))
    return ~(pairs.any(-1) | count[:, -1]), ~pairs.any(-2), pairs


def _algorithms(case: Question) -> list[str]:
    mask = "none" if case.mask is None else str(case.mask.dtype)
    request = translution.Request(case.operator, dtype="float64", mask=mask)
    backend = translution.get_backend("torch")
    return [a for a in backend.algorithms if not backend.not_supported(request, a)]


def _attention_cases() -> list[Question]:
    rng, found = np.random.default_rng(5), []
    for layout in (Lattice((4,), causal=True), Lattice((4,)), Lattice((2, 3), kernel_size=3)):
        operator = Operator(layout, 4, 2, Shared(4, bias=True), Shared(4, bias=True), Shared(4))
        params = {n: rng.standard_normal(s) for n, s in operator.parameters.items()}
        n = layout.num_queries
        live = rng.random((2, 2, n, n)) < 0.5
        for mask in (None, live, live[:, :1, :1], np.where(live, rng.standard_normal(live.shape), -np.inf)):
            x, y = rng.standard_normal((2, 2, n, 4))
            found.append(Question(operator, params, x, y, mask))
    conv = presets.convolution((8,), 2, 3, 2, stride=3)
    x, y = rng.standard_normal((2, conv.layout.num_queries, 2)), rng.standard_normal((2, 8, 2))
    return [*found, Question(conv, {n: rng.standard_normal(s) for n, s in conv.parameters.items()}, x, y)]


RANDOM = [c for c in map(random_case, range(2000, 2115)) if c.y is not None and c.x.shape[0]]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_M4_what_nobody_sees_reaches_no_result_and_no_gradient(poison: float) -> None:
    """Its content changes not one bit of the result or of any gradient."""
    poisoned = 0
    for case in RANDOM + _attention_cases():
        dead_query, dead_key, _ = _absent(case)
        poisoned += int(dead_query.sum() + dead_key.sum())
        assert case.y is not None
        x = np.where(dead_query[..., None], poison, case.x)
        y = np.where(dead_key[..., None], poison, case.y)
        pull = np.random.default_rng(0).standard_normal(case.out_shape)
        for algorithm in _algorithms(case):
            found = []
            for own_x, own_y in ((case.x, case.y), (x, y)):
                out, gradients = vjp(
                    case.operator, case.params, own_x, own_y, cotangent=pull, mask=case.mask, backend="torch",
                    algorithm=algorithm,
                )  # fmt: skip
                found.append({"out": out, "x": gradients.x, "y": gradients.y, **gradients.params})
            for name, value in found[1].items():
                np.testing.assert_array_equal(value, found[0][name], err_msg=f"{algorithm}: {name}: {case}")
            assert not found[1]["x"][dead_query].any()
            assert not found[1]["y"][dead_key].any()
    assert poisoned > 60


def test_M4_a_live_nan_reaches_exactly_the_rows_that_see_it() -> None:
    reached = 0
    for number, case in enumerate(RANDOM + _attention_cases()):
        assert case.y is not None
        key = number % case.y.shape[-2]
        y = case.y.copy()
        y[..., key, :] = np.nan
        expected = translution.run(case.operator, case.params, case.x, y, mask=case.mask, backend="reference")
        reached += int(np.isnan(expected).any(-1).sum())
        unseen = ~_absent(case)[2][..., key]
        for algorithm in _algorithms(case):
            out, clean = (
                translution.run(
                    case.operator, case.params, case.x, own, mask=case.mask, backend="torch", algorithm=algorithm
                )
                for own in (y, case.y)
            )
            np.testing.assert_array_equal(np.isnan(out), np.isnan(expected), err_msg=f"{algorithm}: {case}")
            np.testing.assert_array_equal(out[unseen], clean[unseen], err_msg=f"{algorithm}: {case}")
    assert reached > 30


@pytest.mark.parametrize("algorithm", GENERAL)
def test_M4_a_masked_pair_leaves_its_class_alone(algorithm: str) -> None:
    """Key 2 is NaN and seen by query 2 alone: of the table only the row of delta = 0 is NaN."""
    layout = Lattice((5,))
    operator = Operator(layout, 3, 1, PerDisplacement(2), relevance=Ones())
    rng = np.random.default_rng(1)
    params = {"value.table": rng.standard_normal(operator.parameters["value.table"])}
    x, y = rng.standard_normal((2, 1, 5, 3))
    y[:, 2] = np.nan
    mask = np.ones((5, 5), bool)
    mask[:, 2] = [False, False, True, False, False]
    _, found = vjp(
        operator, params, x, y, mask=mask, cotangent=np.ones((1, 5, 2)), backend="torch", algorithm=algorithm
    )
    rows = np.isnan(found.params["value.table"]).any(axis=(1, 2))
    assert [label for label, bad in zip(layout.labels(), rows, strict=True) if bad] == [(0,)]


@pytest.mark.parametrize("algorithm", [*GENERAL, "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.usefixtures("way")
def test_M5_large_logits_stay_finite_and_masks_beat_them(algorithm: str, dtype: torch.dtype) -> None:
    """Logits of +-6e4: the weights of a row are those of its largest live logit, exactly."""
    operator = Operator(Lattice((3,)), 1, 1, Identity(), query=Identity(), key=Identity(), relevance=Softmax(1.0))
    x = torch.tensor([[[240.0], [8.0], [-240.0]]], dtype=dtype, requires_grad=True)
    y = torch.tensor([[[250.0], [125.0], [-250.0]]], dtype=dtype)
    out = translution.run(operator, {}, x, y, algorithm=algorithm)
    assert out[0, :, 0].tolist() == [250, 250, -250]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for mask in (torch.tensor([False, True, True]), torch.tensor([-np.inf, 0, 0], dtype=dtype)):
        out = translution.run(operator, {}, x, y, mask=mask[None, :], algorithm=algorithm)
        assert out[0, :, 0].tolist() == [125, 125, -250]


@pytest.mark.parametrize("algorithm", [*GENERAL, "sdpa"])
def test_M2_a_float_below_the_range_of_float32_is_still_a_number(algorithm: str) -> None:
    """A row whose every key carries -1e300 has live keys: it isn't 0 but a softmax."""
    operator = Operator(Lattice((2,)), 1, 1, Identity(), query=Identity(), key=Identity(), relevance=Softmax(1.0))
    x, y = torch.zeros(1, 2, 1), torch.tensor([[[1.0], [3.0]]])
    mask = torch.tensor([[-1e300, -1e300], [-1e300, -np.inf]], dtype=torch.float64)
    out = translution.run(operator, {}, x, y, mask=mask, algorithm=algorithm)
    assert out.flatten().tolist() == [2, 1]
