"""Gradients where a mistake would hide: masks, dead rows, logits far from 0, absent tokens, what torch may ask for."""

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import translution
from translution import NotSupported
from translution.conformance.comparison import check
from translution.conformance.error_model import budget
from translution.spec import (
    BiasTable,
    Lattice,
    Mean,
    Mixture,
    Ones,
    Operator,
    PairTable,
    PerDisplacement,
    Shared,
    Softmax,
)
from translution.spec import presets as p

# torch's own, when it loads what forward mode needs.
LOADING = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
TABLE = PerDisplacement(4)
OPERATORS = {
    "translution": p.translution((2, 2), 4, 2, registers=1),
    "biased": Operator(Lattice((4,), causal=True), 4, 2, TABLE, TABLE, Shared(4), Softmax(bias=BiasTable())),
    "alpha": p.alpha_translution((3,), 4, 2, rank=2),
    "attention": p.self_attention((2, 2), 4, 2, registers=2),
    "mean": Operator(Lattice((2, 2), kernel_size=2, registers=1), 4, 2, TABLE, relevance=Mean()),
    "ones": Operator(Lattice((2, 2), registers=1), 4, 2, TABLE, relevance=Ones()),
    "mixture": Operator(Lattice((3,)), 4, 2, TABLE, Shared(4), TABLE, Mixture(Softmax(bias=BiasTable()), Ones())),
    "strided window": Operator(
        Lattice((2, 2), key_grid=(4, 3), stride=2, kernel_size=3), 4, 2, TABLE, TABLE, TABLE, Softmax(bias=BiasTable())
    ),
}


def pull(operator, batch=2, seed=5):
    shape = (batch, operator.layout.num_queries, operator.out_features)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def gradients(operator, params, x, y=None, **more):
    _, found = translution.vjp(operator, params, x, y, backend="triton", **more)
    return {**found.params, "x": found.x} | ({} if y is None else {"y": found.y})


def within(operator, params, x, y=None, mask=None):
    cotangent = pull(operator)
    exact = budget(operator, params, x, y, mask, cotangent)
    for name, found in gradients(operator, params, x, y, mask=mask, cotangent=cotangent).items():
        check(name, found, exact.gradient_values[name], exact.gradients[name], dtype="float32")


@pytest.mark.parametrize("shape", [(2, 1, 1, None), (1, 2, None, None)], ids=["keys", "heads"])
@pytest.mark.parametrize("name", OPERATORS)
def test_bool_masks(name, shape, draw):
    operator = OPERATORS[name]
    params, x, y = draw(operator)
    sides = operator.layout.num_queries, operator.layout.num_keys
    mask = np.random.default_rng(3).random([n or sides[axis - 2] for axis, n in enumerate(shape)]) < 0.6
    within(operator, params, x, y, mask)


@pytest.mark.parametrize("name", ["translution", "alpha", "strided window"])
def test_float_masks(name, draw):
    operator, rng = OPERATORS[name], np.random.default_rng(4)
    params, x, y = draw(operator)
    mask = rng.standard_normal((2, 2, operator.layout.num_queries, operator.layout.num_keys)).astype(np.float32)
    mask[rng.random(mask.shape) < 0.3] = -np.inf
    within(operator, params, x, y, mask)


@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (1, 1, 4, 4), (1, 2, 1, 4), (1, 1, 4, 1), (4,)], ids=str)
def test_gradient_of_a_float_mask(shape, draw):
    """A mask is a bias with a row of its own for every pair."""
    operator = Operator(Lattice((4,)), 4, 2, Shared(4), Shared(4), Shared(4))
    params, x, _ = draw(operator, batch=1)
    mask = torch.from_numpy(np.random.default_rng(2).standard_normal(shape).astype(np.float32)).requires_grad_()
    own, cotangent = {n: torch.from_numpy(a) for n, a in params.items()}, pull(operator, batch=1)
    translution.run(operator, own, torch.from_numpy(x), mask=mask, backend="triton").backward(
        torch.from_numpy(cotangent)
    )
    every = PairTable(tuple(tuple(range(4 * i, 4 * i + 4)) for i in range(4)), 16)
    biased = Operator(every, 4, 2, Shared(4), Shared(4), Shared(4), Softmax(bias=BiasTable()))
    params["relevance.bias"] = np.broadcast_to(mask.detach().numpy(), (1, 2, 4, 4)).reshape(2, 16)
    exact = budget(biased, params, x, cotangent=cotangent)
    value, bound = (p["relevance.bias"].reshape(1, 2, 4, 4) for p in (exact.gradient_values, exact.gradients))
    wide = (1,) * (4 - len(shape)) + shape
    summed = tuple(axis for axis, n in enumerate(wide) if n == 1)
    # A sum of up to 8 numbers rounds each of them three times more.
    bound = (bound + 3 * 2.0**-24 * np.abs(value)).sum(summed)
    check("mask", mask.grad.reshape(bound.shape), value.sum(summed), bound)


def test_a_mask_has_gradients_where_there_is_no_displacement(draw):
    operator = p.translution((5,), 4, 1, kernel_size=3)
    params, x, _ = draw(operator, batch=1)
    own = {n: torch.from_numpy(a) for n, a in params.items()}
    mask = torch.zeros(5, 5, requires_grad=True)
    translution.run(operator, own, torch.from_numpy(x), mask=mask, backend="triton").sum().backward()
    far = (torch.arange(5)[:, None] - torch.arange(5)).abs() > 1
    assert mask.grad[far].eq(0).all()
    assert mask.grad[~far].ne(0).any()


@pytest.mark.parametrize("name", OPERATORS)
def test_rows_without_a_live_key_give_no_gradient(name, draw):
    """Clause M3: exact zeros, in every operand that only such rows read."""
    operator = OPERATORS[name]
    params, x, y = draw(operator)
    mask = np.ones((2, 1, operator.layout.num_queries, operator.layout.num_keys), bool)
    mask[0] = False
    cotangent = pull(operator)
    cotangent[1] = 0
    for of, found in gradients(operator, params, x, y, mask=mask, cotangent=cotangent).items():
        assert np.isfinite(found).all()
        if of != "output.bias":
            assert not found.any(), of
    within(operator, params, x, y, mask)


@pytest.mark.parametrize("level", [-6e4, 6e4])
def test_logits_of_any_size(level, draw):
    operator = OPERATORS["biased"]
    params, x, _ = draw(operator)
    params["relevance.bias"] = params["relevance.bias"] + np.float32(level)
    within(operator, params, x)


def test_keys_beyond_the_grid_have_no_weight(draw):
    """With every real logit below -100, a pair that counts with a logit of 0 would outweigh all."""
    operator = Operator(Lattice((2, 2)), 4, 2, TABLE, TABLE, TABLE)
    params, x, _ = draw(operator)
    x = np.abs(x) + 1
    params["query.table"] = np.abs(params["query.table"]) + 4
    params["key.table"] = -np.abs(params["key.table"]) - 4
    within(operator, params, x)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "bool") for name in ("translution", "attention", "mean", "ones")] + [("alpha", "float")],
)
def test_a_masked_key_reaches_no_gradient(name, kind, draw):
    """Clause M4: NaN in a token that nothing sees, as a key or as a query."""
    operator = OPERATORS[name]
    params, x, _ = draw(operator)
    last = operator.layout.num_keys - 1
    mask = np.ones((operator.layout.num_queries, operator.layout.num_keys), bool)
    mask[:, last] = False
    mask[last] = False
    if kind == "float":
        mask = np.where(mask, np.float32(0), np.float32(-np.inf))
    spoilt, zeroed = x.copy(), x.copy()
    spoilt[:, last], zeroed[:, last] = np.nan, 0
    clean = gradients(operator, params, zeroed, mask=mask, cotangent=pull(operator))
    for of, found in gradients(operator, params, spoilt, mask=mask, cotangent=pull(operator)).items():
        assert np.array_equal(found, clean[of]), of


@pytest.mark.parametrize(
    "layout",
    [
        Lattice((3,), key_grid=(5,), kernel_size=1, stride=2),
        Lattice((4,), key_grid=(2,), kernel_size=1),
        Lattice((2, 2), key_grid=(3, 2), causal=True, kernel_size=2),
        Lattice((2, 3), key_grid=(4, 5), kernel_size=1, stride=2, registers=1, causal=True),
    ],
    ids=str,
)
def test_tokens_out_of_reach_get_no_gradient(layout, draw):
    """Clause M4, without a mask: what no window touches."""
    operator = Operator(layout, 4, 2, Shared(4), Shared(4), Shared(4))
    params, x, y = draw(operator)
    x, y = x, draw(operator, seed=1)[1][:, :1].repeat(layout.num_keys, 1) if y is None else y
    every = translution.run(operator, params, x, y, backend="reference", return_weights=True)[1]
    queries, keys = every.any((0, 1, 3)), every.any((0, 1, 2))
    assert not (queries.all() and keys.all()) or layout.registers
    rough_x, rough_y = x.copy(), y.copy()
    rough_x[:, ~queries], rough_y[:, ~keys] = np.nan, np.inf
    x[:, ~queries], y[:, ~keys] = 0, 0
    clean = gradients(operator, params, x, y, cotangent=pull(operator))
    found = gradients(operator, params, rough_x, rough_y, cotangent=pull(operator))
    for of, value in found.items():
        assert np.array_equal(value, clean[of]), of


def leaves_of(operator, draw, dtype=torch.float32):
    params, x, _ = draw(operator)
    own = {n: torch.from_numpy(a).to(dtype).requires_grad_() for n, a in params.items()}
    return own, torch.from_numpy(x).to(dtype).requires_grad_()


@pytest.mark.parametrize("name", ["translution", "mixture"])
def test_a_recorded_call_gives_gradients(name, draw):
    operator = OPERATORS[name]
    own, x = leaves_of(operator, draw)
    cotangent = pull(operator)
    translution.compile(operator, backend="triton")(own, x).backward(torch.from_numpy(cotangent))
    params, tokens, _ = draw(operator)
    exact = budget(operator, params, tokens, cotangent=cotangent)
    for of, leaf in {**own, "x": x}.items():
        check(of, leaf.grad, exact.gradient_values[of], exact.gradients[of])


def test_only_what_is_asked_for_is_computed(draw, monkeypatch):
    from translution.backends.triton import gradients as backward

    operator, asked = OPERATORS["biased"], []
    genuine = backward.Launcher.of_table
    monkeypatch.setattr(backward.Launcher, "of_owners", lambda *_: pytest.fail("no token needs a gradient"))
    monkeypatch.setattr(
        backward.Launcher, "of_table", lambda self, side, *a: (asked.append(side), genuine(self, side, *a))[1]
    )
    own, x = leaves_of(operator, draw)
    held = {n: a if n == "value.table" else a.detach() for n, a in own.items()}
    out = translution.run(operator, held, x.detach(), backend="triton")
    (gradient,) = torch.autograd.grad(out.sum(), [own["value.table"]])
    assert asked == [backward.VALUE]
    assert gradient.any()


def test_a_second_derivative_raises(draw):
    own, x = leaves_of(OPERATORS["translution"], draw)
    out = translution.run(OPERATORS["translution"], own, x, backend="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotSupported, match="second ones use backend 'torch'"):
        gradient.sum().backward()


@LOADING
def test_forward_mode_raises(draw):
    operator = OPERATORS["translution"]
    own, x = leaves_of(operator, draw)
    held = {n: a.detach() for n, a in own.items()}
    with forward_ad.dual_level(), pytest.raises(NotSupported, match="forward-mode"):
        translution.run(operator, held, forward_ad.make_dual(x.detach(), torch.ones_like(x)), backend="triton")


@pytest.mark.parametrize("transform", ["jvp", "vmap", "grad"])
@LOADING
def test_transforms_of_torch_func_raise(transform, draw):
    operator = OPERATORS["translution"]
    own, x = leaves_of(operator, draw)
    held, tokens = {n: a.detach() for n, a in own.items()}, x.detach()

    def call(tokens):
        return translution.run(operator, held, tokens, backend="triton").sum()

    transformed = {
        "jvp": lambda: torch.func.jvp(call, (tokens,), (tokens,)),
        "vmap": lambda: torch.func.vmap(call)(tokens[:, None]),
        "grad": lambda: torch.func.grad(call)(tokens),
    }[transform]
    with pytest.raises(NotSupported, match=r"torch\.func"):
        transformed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype, draw):
    """Clause D1."""
    operator = OPERATORS["alpha"]
    own, x = leaves_of(operator, draw, dtype)
    plain = translution.run(operator, own, x, backend="triton")
    expected = torch.autograd.grad(plain.sum(), [x, *own.values()])
    with torch.autocast("cpu", torch.bfloat16):
        out = translution.run(operator, own, x, backend="triton")
    assert out.dtype == dtype
    assert torch.equal(out, plain)
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), [x, *own.values()]), expected))


def test_an_empty_batch_has_gradients_of_zero(draw):
    operator = OPERATORS["translution"]
    params, x, _ = draw(operator)
    found = gradients(operator, params, x[:0], cotangent=pull(operator)[:0])
    assert found["x"].shape == (0, 5, 4)
    assert not any(value.any() for value in found.values())


def test_highest_counts_as_a_constant(draw):
    """Log-sum-exp = highest + log(total) has the gradient of the logits' softmax, by way of total alone."""
    from translution.backends.triton import assembly
    from translution.backends.triton.operation import fused_forward

    operator = Operator(Lattice((3,)), 4, 1, Shared(4), TABLE, TABLE)
    params, x, _ = draw(operator)
    box = assembly.box_of(operator.layout).flat()
    tables = [torch.from_numpy(params[n]).requires_grad_() for n in ("query.table", "key.table")]
    tokens = torch.from_numpy(x)
    values = torch.zeros(2, 3, 1, 1)
    _, _, highest, total = fused_forward(
        tokens, tables[0], None, None, tokens, tables[1], None, None, None, None, values, None, None, box, 1, 4, 0,
        False, 1.0, True,
    )  # fmt: skip
    assert not highest.requires_grad
    found = torch.autograd.grad((highest + total.log()).sum(), tables)
    wide = [t.detach().double().requires_grad_() for t in tables]
    rows = torch.arange(3)[:, None] - torch.arange(3) + 2
    q = torch.einsum("bic,ijce->bije", tokens.double(), wide[0][rows])
    k = torch.einsum("bjc,ijce->bije", tokens.double(), wide[1][4 - rows])
    expected = torch.autograd.grad((q * k).sum(-1).logsumexp(-1).sum(), wide)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
