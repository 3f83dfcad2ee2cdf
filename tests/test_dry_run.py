"""What the torch backend says a call costs, without computing it: the same operations as the call itself."""

import sys

import numpy as np
import pytest
import torch

from translution.algorithms import Request
from translution.backends.torch import dry_run
from translution.backends.torch.backend import backend
from translution.conformance.strategies import random_operator
from translution.execution import Plan, predict, reasons_against
from translution.inputs import Inputs
from translution.peak_memory import peak_memory
from translution.spec import parse_spec, presets

TRANSLUTION = "translution2d:height=4,width=4,dim=24,num_heads=3,registers=1"
ALPHA = "alpha_translution2d:height=4,width=4,dim=24,num_heads=3,rank=2"
SWIN = "swin_attention2d:height=4,width=4,dim=24,num_heads=3"
CONVOLUTION = "convolution2d:height=8,width=8,in_channels=6,out_channels=4,kernel_size=3,padding=1"


def counted(request, algorithm):
    """The same counter beside a call that computes."""
    operator, layout, dtype = request.operator, request.operator.layout, getattr(torch, request.dtype)
    # Of ones the logits are so large that ``stream`` looks for the largest, which a dry run can not foresee.
    params = {name: torch.full(shape, 0.1, dtype=dtype) for name, shape in operator.parameters.items()}
    x = torch.ones((request.batch, layout.num_queries, operator.dim), dtype=dtype)
    alone = layout.is_self and operator.keys_dim == operator.dim
    y = x if alone else torch.ones((request.batch, layout.num_keys, operator.keys_dim), dtype=dtype)
    pull = torch.ones((request.batch, layout.num_queries, operator.out_features), dtype=dtype)
    mask = None
    if request.mask != "none":
        kind = torch.bool if request.mask == "bool" else dtype
        mask = torch.ones((request.batch, 1, layout.num_queries, layout.num_keys), dtype=kind)
    inputs, given = Inputs(x, y, mask, (request.batch,)), [x, y, pull, *params.values()]
    # What is kept from call to call is there before a dry run too.
    backend.forward(request, algorithm, params, inputs)
    with dry_run.Counter([*given, *([] if mask is None else [mask])]) as counter:
        dry_run.compute(backend, request, algorithm, params, inputs, pull)
    return counter


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("spec", "algorithm", "mask", "dtype"),
    [
        (TRANSLUTION, "stream", "none", "float32"),
        (TRANSLUTION, "stream", "bool", "float64"),
        (TRANSLUTION, "pairwise", "float", "float32"),
        (ALPHA, "stream", "none", "bfloat16"),
        (ALPHA, "pairwise", "none", "float32"),
        (SWIN, "stream", "none", "float32"),
        (CONVOLUTION, "stream", "none", "float32"),
        (CONVOLUTION, "conv", "none", "float32"),
        (SWIN, "sdpa", "none", "float32"),
        (TRANSLUTION.replace("translution", "self_attention", 1), "sdpa", "none", "float32"),
    ],
)
def test_it_counts_what_the_call_does(spec, algorithm, mask, dtype, gradient):
    request = Request(parse_spec(spec), 3, dtype, mask=mask, gradient=gradient)
    found, real = predict(backend, request, algorithm), counted(request, algorithm)
    assert found.counted
    assert (found.flops, found.traffic_bytes, found.working_bytes) == (real.flops, real.traffic, real.peak)


def test_operations_are_those_of_the_products():
    request = Request(parse_spec(TRANSLUTION), 3)
    layout, form = request.operator.layout, request.normal_form
    assert form.relative_roles == ("query", "key", "value")
    links = layout.num_queries * layout.num_keys
    forward = 2 * 3 * (3 * links * 24 * 24 + layout.num_queries * 24 * 24)
    assert predict(backend, request, "stream").flops == forward
    training = predict(backend, Request(parse_spec(TRANSLUTION), 3, gradient=True), "stream").flops
    # Backward: q, k and v again, and two products for each; the output projection only twice more.
    assert training == 4 * forward - 2 * 3 * layout.num_queries * 24 * 24


def test_a_convolution_reads_and_writes_its_tokens_once():
    operator = presets.convolution((28, 28), 16, 16, 3, padding=1)
    tokens = 4 * 8 * 28 * 28 * 16
    found = predict(backend, Request(operator, 8), "conv")
    assert found.traffic_bytes <= 2 * tokens + 8 * found.parameter_bytes
    # The result, and for a moment the kernel.
    assert found.working_bytes <= tokens + 4 * found.parameter_bytes


def test_attention_reads_and_writes_what_its_products_need():
    operator = presets.self_attention((49,), 48, 3, qkv_bias=True)
    tokens = 4 * 16 * 49 * 48
    found = predict(backend, Request(operator, 16), "sdpa")
    # x three times, q, k, v and the heads twice, the result once.
    assert found.traffic_bytes <= 12 * tokens + 2 * found.parameter_bytes + 4 * 16 * 3 * 49


def test_every_further_item_costs_the_same():
    # One item is laid out as its tokens already are, and not copied.
    one, two, three = (predict(backend, Request(parse_spec(TRANSLUTION), n), "stream") for n in (2, 3, 4))
    assert three.working_bytes - two.working_bytes == two.working_bytes - one.working_bytes > 0
    assert three.parameter_bytes == one.parameter_bytes


@pytest.mark.parametrize("seed", range(40))
def test_any_operator_can_be_counted(seed):
    operator = random_operator(seed)
    for mask in ("none", "float"):
        for gradient in (False, True):
            request = Request(operator, 2, mask=mask, gradient=gradient)
            for algorithm in backend.algorithms:
                if not reasons_against(backend, request, algorithm):
                    assert predict(backend, request, algorithm).working_bytes > 0, (algorithm, mask, gradient)


def test_half_a_terabyte_is_counted_without_being_allocated():
    # 14x14 and one register: 732 matrices for each role.
    operator = parse_spec("translution2d:height=14,width=14,dim=8192,num_heads=16,registers=1")
    found = predict(backend, Request(operator, 1), "stream")
    assert found.parameter_bytes == 4 * operator.num_parameters > 5e11
    assert found.working_bytes > 0


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is measured on Linux")
@pytest.mark.parametrize(
    ("spec", "batch", "algorithm", "gradient"),
    [
        ("translution2d:height=7,width=7,dim=96,num_heads=3,registers=1", 8, "stream", True),
        ("translution2d:height=7,width=7,dim=192,num_heads=3,registers=1", 16, "pairwise", True),
        ("self_attention2d:height=14,width=14,dim=192,num_heads=3", 32, "sdpa", False),
    ],
)
def test_a_process_takes_as_much(spec, batch, algorithm, gradient, monkeypatch):
    """Where the allocator gives freed blocks back at once; docs/memory.md has the whole grid."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    request = Request(parse_spec(spec), batch, gradient=gradient)
    measured = peak_memory(Plan(request.operator, "torch", algorithm), request)
    np.testing.assert_allclose(predict(backend, request, algorithm).working_bytes, measured, rtol=0.1)
