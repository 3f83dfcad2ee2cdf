"""The kernel as a torch operator."""

import numpy as np
import pytest
import torch

import translution
from translution.backends.triton import assembly
from translution.conformance.comparison import check
from translution.conformance.error_model import budget
from translution.spec import presets as p

OPERATORS = [
    p.translution((2, 2), 4, 2, registers=1),
    p.alpha_translution((3,), 4, 1, rank=2),
    p.average_pooling((3,), 2, 2, stride=1, count_include_pad=False),
]


@pytest.fixture
def calls(draw, monkeypatch):
    """The arguments of every call of the operator on the way through run."""

    def calls(operator):
        params, x, y = draw(operator)
        seen = []
        genuine = assembly.fused_forward
        monkeypatch.setattr(assembly, "fused_forward", lambda *args: (seen.append(args), genuine(*args))[1])
        translution.run(operator, params, x, y, backend="triton")
        assert seen
        return seen

    return calls


def leaves(args):
    """The same arguments, the tensors that have a gradient as leaves."""
    return [a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


@pytest.mark.parametrize("operator", OPERATORS, ids=["full", "alpha", "mean"])
def test_opcheck_forward(operator, calls):
    """Schema, fake tensors, autograd registration and a traced forward and backward."""
    for args in calls(operator):
        torch.library.opcheck(torch.ops.translution.fused_forward.default, leaves(args))


@pytest.mark.parametrize("operator", OPERATORS, ids=["full", "alpha", "mean"])
def test_opcheck_backward(operator, calls):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # it has no backward to trace
    for args in calls(operator):
        results = torch.ops.translution.fused_forward(*args)
        given = *map(torch.ones_like, results[:2]), *results[2:], torch.ones_like(results[3])
        needed = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in args[:13]]
        torch.library.opcheck(torch.ops.translution.fused_backward.default, (*args, *given, needed), test_utils=tests)


def test_compiled_in_one_graph(calls):
    """torch.compile of values and gradients, without a break."""
    (args,) = calls(OPERATORS[0])

    def loss(*tensors):
        left = iter(tensors)
        own = (next(left) if isinstance(a, torch.Tensor) else a for a in args)
        static, relative, highest, total = torch.ops.translution.fused_forward(*own)
        return static.square().sum() + relative.square().sum() + (total.log() + highest).sum()

    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    given = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [t for t in given if t.requires_grad]
    expected = torch.autograd.grad(loss(*given), wanted)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*given), wanted)
    assert all(map(torch.equal, found, expected))


def test_traced_call_equals_a_plain_one(calls):
    (args,) = calls(OPERATORS[0])
    tensors = [a for a in args if isinstance(a, torch.Tensor)]

    def call(*tensors):
        left = iter(tensors)
        return torch.ops.translution.fused_forward(*(next(left) if isinstance(a, torch.Tensor) else a for a in args))

    traced = torch.fx.experimental.proxy_tensor.make_fx(call, tracing_mode="fake")(*tensors)
    for one, other in zip(traced(*tensors), call(*tensors), strict=True):
        assert torch.equal(one, other)


def test_empty_batch(draw):
    params, x, _ = draw(OPERATORS[0])
    assert translution.run(OPERATORS[0], params, x[:0], backend="triton").shape == (0, 5, 4)


def test_batch_shape_dtype_and_kind_are_the_callers(draw):
    params, x, _ = draw(OPERATORS[0], batch=6)
    flat = translution.run(OPERATORS[0], params, x, backend="triton")
    shaped = translution.run(OPERATORS[0], params, torch.from_numpy(x).reshape(2, 3, 5, 4), backend="triton")
    assert shaped.dtype == torch.float32
    assert np.array_equal(shaped.reshape(6, 5, 4).numpy(), flat)


def test_inputs_may_have_any_strides(draw):
    params, x, _ = draw(OPERATORS[0])
    turned = {n: torch.from_numpy(a).movedim(0, -1).contiguous().movedim(-1, 0) for n, a in params.items()}
    tokens = torch.from_numpy(x).transpose(0, 2).contiguous().transpose(0, 2)
    exact = budget(OPERATORS[0], params, x)
    check("strided", translution.run(OPERATORS[0], turned, tokens, backend="triton"), exact.value, exact.out)
