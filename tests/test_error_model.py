"""The error bound: no correct run leaves it, structural mistakes do.

``naive`` is a float32 implementation written here, with a choice of summation order and of mistakes.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from translution import vjp
from translution.conformance.axes import axes_of
from translution.conformance.comparison import share
from translution.conformance.error_model import Budget, budget
from translution.conformance.exam.question import Question
from translution.conformance.rounding import ARITHMETIC, Segments, exact
from translution.conformance.strategies import random_case
from translution.geometry import geometry
from translution.normal_form import Branch, Role, normal_form
from translution.spec import Lattice, Operator, Softmax
from translution.spec.presets import convolution, self_attention, translution

Keep = Callable[[Tensor], Tensor]
MISTAKES = ("delta with the other sign", "query table at -delta", "a link dropped", "scale by the wrong width")
ORDERS = ("forward", "backward", "shuffled")


class Naive:
    """Encodes every link with its own matrix; sums run one element after another in the given order of the links.

    ``keep`` is applied to whatever is stored, ``operand`` to the factors of matrix products.
    """

    def __init__(
        self,
        case: Question,
        order: str = "forward",
        mistake: str | None = None,
        dtype: torch.dtype = torch.float32,
        keep: Keep = lambda value: value,
        operand: Keep = lambda value: value,
    ) -> None:
        self.operator, self.form, self.mistake = case.operator, normal_form(case.operator), mistake
        self.keep, self.operand, self.dtype = keep, operand, dtype
        self.links = geometry(case.operator.layout)
        count = self.links.num_links
        which = np.arange(count)
        if order == "backward":
            which = which[::-1].copy()
        if order == "shuffled":
            which = np.random.default_rng(0).permutation(count)
        if mistake == "a link dropped":
            which = np.sort(which)[: count - 1]
        rows = (self.links.query_index, self.links.key_index, self.links.value_class, self.links.key_class)
        self.query_index, self.key_index, self.toward, self.back = (torch.from_numpy(r[which]) for r in rows)
        self.leaves = {
            name: torch.tensor(value, dtype=dtype, requires_grad=True)
            for name, value in {"x": case.x, "y": case.x if case.y is None else case.y, **case.params}.items()
        }
        self.alone = case.y is None
        self.mask = self._mask(case)
        self.live = self.mask != -torch.inf

    def _mask(self, case: Question) -> Tensor:
        heads, nq, nk = case.operator.num_heads, self.links.num_queries, self.links.num_keys
        batch = math.prod(case.x.shape[:-2])
        full = torch.zeros(batch, heads, nq, nk + 1, dtype=self.dtype)
        if case.mask is not None:
            given = np.where(case.mask, 0.0, -np.inf) if case.mask.dtype == np.bool_ else case.mask
            wide = np.broadcast_to(given, (*case.x.shape[:-2], heads, nq, nk)).reshape(batch, heads, nq, nk)
            full[..., :nk] = torch.tensor(wide, dtype=self.dtype)
        return full[:, :, self.query_index, self.key_index].transpose(1, 2)

    def _rows(self, role: str) -> Tensor:
        if self.mistake == "delta with the other sign":
            return self.toward if role == "key" else self.back
        if self.mistake == "query table at -delta" and role == "query":
            return self.back
        return self.back if role == "key" else self.toward

    def _times(self, tokens: Tensor, weight: Tensor, groups: int) -> Tensor:
        """tokens [B, L, C] times weight [C, E], [L, C, E], [G, C / G, E / G] or [L, G, C / G, E / G]."""
        if groups == 1:
            weight = weight.unsqueeze(-3)
        weight = self.operand(weight if weight.dim() == 4 else weight.unsqueeze(0))
        grouped = self.operand(tokens.unflatten(2, (groups, weight.shape[-2])))
        return self.keep((grouped.unsqueeze(-2) @ weight.unsqueeze(0)).squeeze(-2).flatten(2))

    def _encode(self, role: Role, tokens: Tensor) -> Tensor:
        rows = self._rows(role.name) if role.name != "output" else torch.zeros(tokens.shape[1], dtype=torch.long)
        result = torch.zeros(*tokens.shape[:2], role.num_heads, role.head_dim, dtype=self.dtype)
        for term in role.linears:
            found = tokens
            for name in (term.before, term.table, term.after):
                if name is not None:
                    weight = self.leaves[name]
                    found = self._times(found, weight[rows] if name == term.table else weight, term.groups)
            found = found.unflatten(2, (role.num_heads, term.width))
            result = result + _placed(found, term.start, role.head_dim)
        for constant in role.constants:
            vector = self.leaves[constant.name]
            vector = vector[rows] if constant.per_class else vector[None]
            heads = 1 if constant.shared_heads else role.num_heads
            found = vector.unflatten(1, (heads, constant.width)).expand(-1, role.num_heads, -1)
            result = result + _placed(found, constant.start, role.head_dim)
        result = self.keep(result)
        for turn in role.rotations:
            angles = torch.tensor(self.links.rotary_angles(role.name, turn.width, turn.base), dtype=self.dtype)
            index = self.query_index if role.name == "query" else self.key_index
            angle = torch.cat([angles, torch.zeros(1, angles.shape[1], dtype=self.dtype)])[index][:, None]
            own = result[..., turn.start : turn.start + turn.width]
            if turn.pairing == "interleaved":
                a, b = own[..., ::2], own[..., 1::2]
            else:
                a, b = own.chunk(2, -1)
            first, second = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
            if turn.pairing == "interleaved":
                own = torch.stack([first, second], -1).flatten(-2)
            else:
                own = torch.cat([first, second], -1)
            stop = turn.start + turn.width
            result = self.keep(torch.cat([result[..., : turn.start], own, result[..., stop:]], -1))
        return result

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over the links of each query, one after another."""
        zero = torch.zeros(values.shape[0], self.links.num_queries, *values.shape[2:], dtype=self.dtype)
        return zero.index_add(1, self.query_index, values)

    def _weights(self, branch: Branch, query: Tensor | None, key: Tensor | None) -> Tensor:
        live = self.live.to(self.dtype)
        if branch.kind != "softmax":
            count = self._sum(live)[:, self.query_index].clamp(min=1)
            return live if branch.kind == "ones" else live / count
        logits = torch.where(self.live, self.mask, 0)
        if query is not None and key is not None and branch.content:
            products = self.operand(query) * self.operand(key)
            scale = branch.scale
            if self.mistake == "scale by the wrong width":
                scale *= math.sqrt(self.operator.head_dim / (self.operator.head_dim + 1))
            logits = logits + products.cumsum(-1)[..., -1] * scale
        if branch.bias is not None and branch.bias.kind == "slopes":
            distance = torch.tensor(self.links.distances, dtype=self.dtype)[self.toward]
            logits = logits - distance[:, None] * torch.tensor(branch.bias.slopes, dtype=self.dtype)
        elif branch.bias is not None:
            assert branch.bias.parameter is not None
            given = self.leaves[branch.bias.parameter]
            if branch.bias.kind == "table":
                logits = logits + given[:, self.toward].T
            else:
                features = torch.tensor(self.links.quadratic_features, dtype=self.dtype)[self.toward]
                logits = logits + features @ given.T
        logits = self.keep(logits)
        index = self.query_index[None, :, None].expand_as(logits)
        top = torch.full((logits.shape[0], self.links.num_queries, logits.shape[2]), -torch.inf, dtype=self.dtype)
        top = top.scatter_reduce(1, index, torch.where(self.live, logits.detach(), -torch.inf), "amax")
        shifted = torch.where(self.live, logits - top[:, self.query_index], 0)
        exponential = torch.where(self.live, shifted.exp(), 0)
        norm = self._sum(exponential)[:, self.query_index]
        return self.keep(exponential / torch.where(self.live, norm, 1))

    def forward(self) -> Tensor:
        batch = len(self.mask)
        x, y = (self.leaves[name].reshape(batch, *self.leaves[name].shape[-2:]) for name in "xy")
        y = torch.cat([y, torch.zeros(len(y), 1, y.shape[2], dtype=self.dtype)], 1)
        form, at_query, at_key = self.form, x[:, self.query_index], y[:, self.key_index]
        query = None if form.query is None else self._encode(form.query, at_query)
        key = None if form.key is None else self._encode(form.key, at_key)
        weights = [self._weights(branch, query, key) for branch in form.branches]
        mixed = weights[0]
        if form.gate is not None:
            gate = self.leaves[form.gate].sigmoid()
            mixed = self.keep((1 - gate) * weights[0] + gate * weights[1])
        value = self._encode(form.value, at_key)
        heads = self.keep(self._sum(mixed[..., None] * value)) * self.operator.output_scale
        if form.uplift is not None:
            full, low = heads[..., : -form.uplift.width].flatten(2), heads[..., -form.uplift.width :].flatten(2)
            heads = self.keep(full + self._times(low, self.leaves[form.uplift.name], 1))
        joined = heads.flatten(2)
        return self.keep(joined if form.output is None else self._encode(form.output, joined)[:, :, 0])

    def shares(self, want: Budget, cotangent: np.ndarray) -> Iterator[tuple[str, float]]:
        """Name and share of the bound of the result and of every gradient."""
        out = self.forward()
        yield "out", share("out", out.reshape(want.value.shape), want.value, want.out)
        names = list(self.leaves)
        found = torch.autograd.grad(
            out,
            [self.leaves[name] for name in names],
            torch.tensor(cotangent, dtype=self.dtype).reshape(out.shape),
            materialize_grads=True,
            allow_unused=True,
        )
        gradients = dict(zip(names, found, strict=True))
        if self.alone:
            gradients["x"] = gradients["x"] + gradients["y"]
        for name, value in gradients.items():
            yield name, share(name, value, want.gradient_values[name], want.gradients[name])


def _placed(features: Tensor, start: int, width: int) -> Tensor:
    return torch.nn.functional.pad(features, (start, width - start - features.shape[-1]))


def _rounded(case: Question, round_to: Callable[[np.ndarray], np.ndarray]) -> tuple[Question, np.ndarray]:
    """The case with values that the arithmetic can hold, and a cotangent."""

    def fit(value: np.ndarray | None) -> np.ndarray | None:
        return value if value is None or value.dtype == np.bool_ else round_to(value).astype(np.float64)

    cotangent = round_to(np.random.default_rng(1).standard_normal(case.out_shape)).astype(np.float64)
    params = {name: round_to(value).astype(np.float64) for name, value in case.params.items()}
    return dataclasses.replace(case, x=fit(case.x), y=fit(case.y), mask=fit(case.mask), params=params), cotangent


def _single(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32)


def _budget(case: Question, cotangent: np.ndarray | None, dtype: str) -> Budget:
    return budget(case.operator, case.params, case.x, case.y, case.mask, cotangent, dtype)


@pytest.mark.parametrize("part", range(4))
def test_no_summation_order_leaves_the_bound(part: int, record_property: Callable[[str, object], None]) -> None:
    worst: dict[str, float] = {}
    runs = 0
    for seed in range(part * 75, part * 75 + 75):
        case, cotangent = _rounded(random_case(seed), _single)
        want = _budget(case, cotangent, "float32")
        for order in ORDERS:
            for name, used in Naive(case, order).shares(want, cotangent):
                assert used <= 1, (seed, order, name, used, case)
                kind = name if name in ("out", "x", "y") else "parameters"
                worst[kind] = max(worst.get(kind, 0.0), used)
            runs += case.x.size > 0
    assert runs >= 150
    record_property("runs", runs)
    record_property("worst shares", {name: round(value, 3) for name, value in worst.items()})


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_structural_mistake_leaves_the_bound(mistake: str, record_property: Callable[[str, object], None]) -> None:
    # Whether a mistake changes anything at all is decided in float64: one token or an empty row hide some. Saturated
    # weights hide others from float32 alone, so there are no large logits here.
    changed = caught = 0
    for seed in range(300):
        case, cotangent = _rounded(random_case(seed), _single)
        axes = axes_of(case)
        if case.x.size == 0 or geometry(case.operator.layout).num_links == 0:
            continue
        if axes["values"] != "normal" or axes["bias QuadraticBias"] == "yes":
            continue
        double = _budget(case, cotangent, "float64")
        if all(used <= 1 for _, used in Naive(case, mistake=mistake, dtype=torch.float64).shares(double, cotangent)):
            continue
        changed += 1
        want = _budget(case, cotangent, "float32")
        caught += any(used > 1 for _, used in Naive(case, mistake=mistake).shares(want, cotangent))
    record_property("caught", f"{caught} of {changed}")
    assert changed >= 30
    assert caught == changed


@pytest.mark.parametrize("seeds", [range(60), range(300, 360)])
def test_the_values_are_those_of_the_definition(seeds: range) -> None:
    for seed in seeds:
        case = random_case(seed)
        _, cotangent = _rounded(case, lambda value: value)
        want = _budget(case, cotangent, "float64")
        out, gradients = vjp(
            case.operator, case.params, case.x, case.y, cotangent=cotangent, mask=case.mask, backend="reference"
        )
        found = {**gradients.params, "x": gradients.x} | ({} if gradients.y is None else {"y": gradients.y})
        assert share("out", out, want.value, want.out) <= 1, case
        for name, value in found.items():
            assert share(name, value, want.gradient_values[name], want.gradients[name]) <= 1, (name, case)


def _to_bfloat16(value: np.ndarray) -> np.ndarray:
    return torch.tensor(value).bfloat16().double().numpy()


def _to_float16(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float16)


@pytest.mark.parametrize(
    ("name", "dtype", "round_to"),
    [("bfloat16", torch.bfloat16, _to_bfloat16), ("float16", torch.float16, _to_float16)],
)
def test_storage_in_half_precision_stays_inside(
    name: str, dtype: torch.dtype, round_to: Callable[[np.ndarray], np.ndarray]
) -> None:
    for seed in range(120):
        case, cotangent = _rounded(random_case(seed), round_to)
        want = _budget(case, cotangent, name)
        # The cast's own gradient is stored in half precision too.
        for what, used in Naive(case, keep=lambda value: value.to(dtype).float()).shares(want, cotangent):
            assert used <= 1, (seed, what, used, case)


def test_truncated_tf32_operands_stay_inside() -> None:
    def truncated(value: Tensor) -> Tensor:
        return (value.detach().view(torch.int32) & ~0x1FFF).view(torch.float32)

    beyond_float32 = 0
    for seed in range(120):
        case, _ = _rounded(random_case(seed), _single)
        out = Naive(case, operand=lambda value: truncated(value.contiguous())).forward()
        want, strict = _budget(case, None, "tf32"), _budget(case, None, "float32")
        assert share("out", out.reshape(want.value.shape), want.value, want.out) <= 1, case
        beyond_float32 += share("out", out.reshape(want.value.shape), want.value, strict.out) > 1
    assert beyond_float32 > 60  # float32 does not excuse tf32


def test_the_bound_of_a_sum_is_nearly_reached() -> None:
    # 1 + many numbers just below half a unit in the last place: each one is lost when it comes after the 1.
    numbers = np.full((1, 4001), 2.0**-25 * (1 - 2.0**-10))
    numbers[0, 0] = 1.0
    bound = ARITHMETIC["float32"].total(exact(numbers), (1,))
    running = np.cumsum(numbers[0].astype(np.float32), dtype=np.float32)[-1]
    assert 0.4 < share("sum", np.array([running]), bound.value, bound.error) <= 1


def test_a_product_bound_is_one_rounding_of_each_kind() -> None:
    single = ARITHMETIC["float32"]
    found = single.contract("ij,jk->ik", exact([[3.0, 4.0]]), exact([[5.0], [-6.0]]), 2)
    assert found.value == -9
    assert found.magnitude == 39
    assert found.error == pytest.approx(39 * 3 * 2.0**-24, rel=1e-6)


def test_segments_reduce_by_index() -> None:
    segments = Segments(np.array([2, 0, 2]), 4)
    assert segments.reduce(np.array([[1.0, 2.0, 4.0]])).tolist() == [[2.0, 0.0, 5.0, 0.0]]
    assert segments.reduce(np.array([[1.0, 2.0, 4.0]]), np.maximum, -1.0).tolist() == [[2.0, -1.0, 4.0, -1.0]]


def _drawn(operator: Operator, size: float = 1.0) -> Question:
    rng = np.random.default_rng(0)
    params = {name: _single(rng.standard_normal(shape)) for name, shape in operator.parameters.items()}
    x = _single(size * rng.standard_normal((2, operator.layout.num_queries, operator.dim)))
    return Question(operator, params, x.astype(np.float64))


@pytest.mark.parametrize("size", [1e2, 3e4])
def test_logits_of_any_size_have_finite_bounds(size: float) -> None:
    case = _drawn(translution((2, 3), 4, 2), math.sqrt(size))
    case, cotangent = _rounded(case, _single)
    want = _budget(case, cotangent, "float32")
    assert np.isfinite(want.out).all()
    assert all(np.isfinite(bound).all() for bound in want.gradients.values())
    assert (want.weights_bound <= 1 + 1e-6).all()
    for name, used in Naive(case).shares(want, cotangent):
        assert used <= 1, name


def test_a_huge_finite_mask_blurs_nothing_else() -> None:
    case = _drawn(self_attention((5,), 4, 2))
    added = np.zeros((5, 5))
    added[:, 3] = -1e9
    masked = dataclasses.replace(case, mask=added)
    absent = dataclasses.replace(case, mask=added == 0)
    want, sharp = _budget(masked, None, "float32"), _budget(absent, None, "float32")
    np.testing.assert_array_equal(want.value, sharp.value)
    assert (want.out <= 2 * sharp.out).all()


def test_dead_rows_and_unused_parameters_must_be_exactly_zero() -> None:
    operator = translution((3,), 4, 2, output_bias=False)
    case = _drawn(operator)
    mask = np.ones((3, 3), bool)
    mask[1] = False
    mask[2, 0] = False  # the only pair at displacement 2
    case, cotangent = _rounded(dataclasses.replace(case, mask=mask), _single)
    want = _budget(case, cotangent, "float32")
    assert not want.value[:, 1].any()
    assert not want.out[:, 1].any()
    assert not want.gradients["value.table"][4].any()
    assert not want.gradients["query.table"][4].any()
    assert not want.gradients["key.table"][0].any()
    assert want.gradients["value.table"][3].all()
    assert not want.weights_bound[:, :, 1].any()


def test_what_stands_behind_a_mask_does_not_matter() -> None:
    case = _drawn(translution((4,), 4, 2))
    mask = np.ones((4, 4), bool)
    mask[:, 2] = False
    case, cotangent = _rounded(dataclasses.replace(case, y=case.x.copy(), mask=mask), _single)
    assert case.y is not None
    want = _budget(case, cotangent, "float32")
    for filler in (np.nan, np.inf, 1e30):
        y = case.y.copy()
        y[:, 2] = filler
        found = _budget(dataclasses.replace(case, y=y), cotangent, "float32")
        np.testing.assert_array_equal(found.out, want.out)
        np.testing.assert_array_equal(found.value, want.value)
        for name, bound in want.gradients.items():
            np.testing.assert_array_equal(found.gradients[name], bound)


def test_a_live_nan_reaches_exactly_the_rows_that_see_it() -> None:
    case = _drawn(Operator(Lattice((4,), causal=True), 4, 2, *(translution((4,), 4, 2, causal=True).value,) * 3))
    case.x[:, 2, 0] = np.nan
    assert isinstance(case.operator.relevance, Softmax)
    want = _budget(case, None, "float32")
    assert np.isnan(want.value[:, 2:]).all()
    assert np.isfinite(want.value[:, :2]).all()
    assert np.isfinite(want.out[:, :2]).all()


def test_the_self_case_adds_both_sides() -> None:
    case, cotangent = _rounded(_drawn(translution((4,), 4, 2)), _single)
    alone = _budget(case, cotangent, "float64")
    apart = _budget(dataclasses.replace(case, y=case.x), cotangent, "float64")
    np.testing.assert_array_equal(alone.gradient_values["y"], apart.gradient_values["y"])
    np.testing.assert_array_equal(alone.gradient_values["x"], apart.gradient_values["x"] + apart.gradient_values["y"])
    assert (alone.gradients["x"] > apart.gradients["x"]).all()


def test_a_sum_may_start_from_the_bias() -> None:
    # The native kernels do: every product is then rounded to the bias's place, and here all of them are lost.
    operator = convolution((3,), 16, 1, 3, padding=1)
    params = {"value.table": np.full((3, 16, 1), 2.0**-13), "output.bias": np.ones(1)}
    x = np.full((1, 3, 16), 2.0**-13)
    assert operator.layout.num_queries == 3
    want = budget(operator, params, x[:, :1] * np.ones((1, 3, 1)), x, dtype="float32")
    products = [np.float32(2.0**-26)] * 48
    lost = np.cumsum(np.array([1.0, *products], np.float32), dtype=np.float32)[-1]
    assert lost == 1
    assert share("out", np.array([lost]), want.value[0, 1], want.out[0, 1]) <= 1
    assert want.value[0, 1, 0] == 1 + 48 * 2.0**-26
    assert want.out[0, 1, 0] < 3 * 48 * 2.0**-24
