"""Operators in the graphs of torch.compile and torch.export, and what torch.func and autocast make of them."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import translution
from translution import graph
from translution.errors import NotSupported
from translution.spec import Lattice, Ones, Operator, PerDisplacement, operator_to_json, presets

FULL = presets.translution((3, 3), 8, 2, registers=1)
ALPHA = presets.alpha_translution((3, 3), 8, 2, rank=2)


@pytest.fixture(autouse=True)
def anew():
    """Dynamo gives up on a function that it has compiled for eight operators."""
    torch._dynamo.reset()


def parameters(operator, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return {
        name: (0.3 * torch.randn(shape, generator=generator, dtype=dtype)).requires_grad_()
        for name, shape in operator.parameters.items()
    }


def tokens(operator, *batch, dtype=torch.float32):
    count = operator.layout.num_queries if operator.uses_content else operator.layout.num_keys
    generator = torch.Generator().manual_seed(4)
    return torch.randn((*batch, count, operator.dim), generator=generator, dtype=dtype).requires_grad_()


def gradients(out, params, x):
    return torch.autograd.grad(out.square().sum(), [x, *params.values()])


def operands(operator, params, x, mask=None, algorithm=""):
    return (operator_to_json(operator), "\n".join(params), list(params.values()), x, None, mask, "torch", algorithm)


@pytest.mark.parametrize(
    "operator", [FULL, ALPHA, presets.self_attention((3, 3), 8, 2)], ids=["full", "alpha", "plain"]
)
@pytest.mark.parametrize("algorithm", [None, "stream", "pairwise"])
def test_a_compiled_call_is_the_call(operator, algorithm):
    params, x, call = parameters(operator), tokens(operator, 2), translution.compile(operator, algorithm=algorithm)

    def layer(params, x):
        return call(params, x.sin()).cos()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out, expected = compiled(params, x), layer(params, x)
    assert torch.equal(out, expected)
    for found, own in zip(gradients(out, params, x), gradients(expected, params, x), strict=True):
        assert own.abs().max() > 0
        assert torch.allclose(found, own, atol=1e-6)


def test_inductor_calls_the_node_with_any_batch():
    params, call = parameters(FULL), translution.compile(FULL)
    compiled = torch.compile(lambda params, x: call(params, x) * 2, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = tokens(FULL, batch)
        out = compiled(params, x)
        assert torch.allclose(out, 2 * call(params, x), atol=1e-6)
        assert all(torch.isfinite(g).all() for g in gradients(out, params, x))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_one_node(strict):
    call, names = translution.compile(FULL), list(FULL.parameters)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.ParameterDict({n.replace(".", "_"): p.detach() for n, p in parameters(FULL).items()})

        def forward(self, x):
            return call({name: self.table[name.replace(".", "_")] for name in names}, x)

    layer, x = Layer(), tokens(FULL, 2).detach()
    program = torch.export.export(layer, (x,), strict=strict)
    nodes = [n for n in program.graph.nodes if n.target is torch.ops.translution.run.default]
    assert len(nodes) == 1
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_the_node_keeps_what_torch_asks_of_one(mask):
    """Schema, fake results and strides, autograd through AOT dispatch; a mask of floats has a gradient too."""
    params, x = parameters(FULL), tokens(FULL, 2)
    own = {None: None, "bool": torch.rand(2, 1, 10, 10) < 0.8, "float": torch.randn(2, 1, 10, 10).requires_grad_()}[
        mask
    ]
    torch.library.opcheck(torch.ops.translution.run.default, operands(FULL, params, x, own))


def test_gradients_of_what_is_needed_alone():
    params, x = parameters(FULL), tokens(FULL, 2).detach()
    params["key.table"].requires_grad_(False)
    wanted = [p for p in params.values() if p.requires_grad]
    out = torch.ops.translution.run(*operands(FULL, params, x))
    expected = translution.run(FULL, params, x)
    for found, own in zip(*(torch.autograd.grad(o.sum(), wanted) for o in (out, expected)), strict=True):
        assert torch.equal(found, own)


def test_a_layout_without_links_has_zero_gradients():
    operator = Operator(
        Lattice((3,), kernel_size=(1,), padding=None, offset=(0,)), 2, 1, PerDisplacement(2), relevance=Ones()
    )
    params, x = parameters(operator), tokens(operator, 1)
    out = torch.ops.translution.run(*operands(operator, params, x))
    assert [g.shape for g in gradients(out, params, x)] == [x.shape, *(p.shape for p in params.values())]


def test_a_second_derivative_is_refused():
    params, x = parameters(FULL), tokens(FULL, 2)
    out = torch.ops.translution.run(*operands(FULL, params, x))
    (first,) = torch.autograd.grad(out.sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match=r"translution.run_backward.* no autograd formula"):
        torch.autograd.grad(first.sum(), [x])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's forward mode
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_transforms_raise_outside_of_a_graph_or_are_right(transform):
    params = {n: p.detach().double() for n, p in parameters(ALPHA).items()}
    x = tokens(ALPHA, 1, dtype=torch.float64).detach()
    with pytest.raises(NotSupported, match="algorithm='pairwise' is"):
        transform(lambda x: translution.run(ALPHA, params, x, algorithm="stream").sum())(x)
    own = transform(lambda x: translution.run(ALPHA, params, x, algorithm="pairwise").sum())(x)
    assert own.abs().max() > 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's forward mode
def test_no_tangent_is_lost():
    params, x = {n: p.detach() for n, p in parameters(FULL).items()}, tokens(FULL, 1).detach()
    with pytest.raises(NotSupported, match="pairwise"):
        torch.func.jvp(lambda x: translution.run(FULL, params, x, algorithm="stream"), (x,), (torch.ones_like(x),))
    _, tangent = torch.func.jvp(
        lambda x: translution.run(FULL, params, x, algorithm="pairwise"), (x,), (torch.ones_like(x),)
    )
    assert tangent.abs().max() > 0


def test_autocast_changes_neither():
    """The dtype of x decides (clause D1), in a graph as outside."""
    params, x, call = parameters(FULL), tokens(FULL, 2), translution.compile(FULL)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(params, x).dtype == call(params, x).dtype == torch.float32


def test_what_a_graph_can_not_hold_is_named():
    params, x = parameters(FULL), tokens(FULL, 2)
    with pytest.raises(NotSupported, match="no weights are returned"):
        graph.call(FULL, params, x, None, None, "torch", None, True)
    with pytest.raises(NotSupported, match="by its name"):
        graph.call(FULL, params, x, None, None, translution.get_backend("torch"), None, False)


def test_operations_are_counted():
    params, x = parameters(FULL), tokens(FULL, 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.ops.translution.run(*operands(FULL, params, x))
    links = 10 * 10
    assert counter.get_total_flops() >= 2 * 2 * links * 3 * 8 * 8


def test_the_first_call_of_a_process_may_be_in_a_graph():
    code = """
import torch, translution
from translution.spec import parse_spec
operator = parse_spec("translution2d:height=2,width=2,dim=4,num_heads=1")
params = {name: torch.ones(shape) for name, shape in operator.parameters.items()}
call = torch.compile(lambda x: translution.run(operator, params, x), fullgraph=True, backend="aot_eager")
assert call(torch.ones(1, 4, 4)).shape == (1, 4, 4)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
