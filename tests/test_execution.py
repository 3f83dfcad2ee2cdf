"""Running, compiling and explaining: the caller's arrays come back, and what is named runs or raises."""

import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import translution
from translution import CostError, InputError, NotSupported, Operator, Plan, Request, UnknownName
from translution.conformance.comparison import check
from translution.conformance.error_model import budget
from translution.spec.presets import convolution, self_attention
from translution.spec.presets import translution as translution_preset

BACKENDS = ("reference", "numpy", "torch")
OPERATOR = translution_preset((2, 3), 4, 2, registers=1)


def params_of(operator: Operator, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in operator.parameters.items()}


def tokens(*shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_dimensions_come_back(backend: str) -> None:
    params, x = params_of(OPERATOR), tokens(2, 3, 7, 4)
    out, weights = translution.run(OPERATOR, params, x, backend=backend, return_weights=True)
    assert out.shape == (2, 3, 7, 4)
    assert weights.shape == (2, 3, 2, 7, 7)
    bound = budget(OPERATOR, params, x[1, 2:], None, None, dtype="float64")
    alone = translution.run(OPERATOR, params, x[1, 2], backend=backend)
    check("no batch dimension", alone, out[1, 2], 2 * bound.out[0], dtype="float64")
    assert translution.run(OPERATOR, params, x[:0], backend=backend).shape == (0, 3, 7, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_D1_kind_and_dtype_come_back(backend: str, as_tensor: bool, dtype: str) -> None:
    params = {name: value.astype(dtype) for name, value in params_of(OPERATOR).items()}
    x: Any = tokens(2, 7, 4).astype(dtype)
    expected = budget(OPERATOR, params, x, None, None, dtype=dtype)
    if as_tensor:
        x = torch.from_numpy(x)
    out = translution.run(OPERATOR, params, x, backend=backend)
    assert isinstance(out, torch.Tensor if as_tensor else np.ndarray)
    check(f"{backend}", out, expected.value, expected.out, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_R7_tokens_alone_where_nothing_looks_at_content(backend: str) -> None:
    operator = convolution((5, 4), 2, 3, 3, stride=2, padding=1)
    rng = np.random.default_rng(0)
    params = {n: rng.integers(-3, 4, shape).astype(float) for n, shape in operator.parameters.items()}
    image = rng.integers(-3, 4, (2, 2, 5, 4)).astype(float)
    kernel = torch.from_numpy(params["value.table"]).flip(0).unflatten(0, (3, 3)).permute(3, 2, 0, 1)
    leaf = torch.from_numpy(image).requires_grad_()
    native = torch.nn.functional.conv2d(leaf, kernel, torch.from_numpy(params["output.bias"]), stride=2, padding=1)
    (wanted,) = torch.autograd.grad(native.sum(), leaf)
    x = image.reshape(2, 2, 20).swapaxes(1, 2)
    out, gradients = translution.vjp(operator, params, x, cotangent=np.ones((2, 6, 3)), backend=backend)
    assert np.array_equal(out, native.detach().flatten(2).swapaxes(1, 2).numpy())
    assert np.array_equal(gradients.x, wanted.flatten(2).swapaxes(1, 2).numpy())
    assert gradients.y is None


def test_a_gradient_is_never_dropped() -> None:
    params, x = params_of(OPERATOR), torch.from_numpy(tokens(1, 7, 4)).requires_grad_()
    with pytest.raises(NotSupported, match=r"no gradient.*backend='torch'"):
        translution.run(OPERATOR, params, x, backend="numpy")
    with torch.no_grad():
        assert translution.run(OPERATOR, params, x, backend="numpy").shape == (1, 7, 4)
    leaves = {name: torch.from_numpy(value).requires_grad_() for name, value in params.items()}
    with pytest.raises(InputError, match=r"no gradient.*x as a tensor"):
        translution.run(OPERATOR, leaves, x.detach().numpy())


def test_numpy_parameters_serve_a_differentiable_call() -> None:
    params, x = params_of(OPERATOR), torch.from_numpy(tokens(1, 7, 4)).requires_grad_()
    translution.run(OPERATOR, params, x).sum().backward()
    _, gradients = translution.vjp(OPERATOR, params, x.detach().numpy(), cotangent=np.ones((1, 7, 4)))
    bound = budget(OPERATOR, params, x.detach().numpy(), None, None, np.ones((1, 7, 4)), "float64")
    assert x.grad is not None
    check("gradient of x", x.grad, gradients.x, 2 * bound.gradients["x"])


def test_B1_what_is_named_runs_or_raises_with_every_reason() -> None:
    params, x = params_of(OPERATOR), tokens(1, 7, 4)
    with pytest.raises(NotSupported) as refused:
        translution.run(OPERATOR, params, x, backend="torch", algorithm="conv")
    assert len(refused.value.reasons) >= 1
    assert "no window" in str(refused.value)
    with pytest.raises(NotSupported, match="has no algorithm 'sdpa'"):
        translution.run(OPERATOR, params, x, backend="numpy", algorithm="sdpa")
    attention = self_attention((3,), 4, 2)
    with pytest.raises(NotSupported, match=r"returns? no weights"):
        translution.run(attention, params_of(attention), tokens(1, 3, 4), algorithm="sdpa", return_weights=True)
    with pytest.raises(NotSupported, match="float16"):
        translution.run(
            OPERATOR,
            {n: torch.from_numpy(v).bfloat16() for n, v in params.items()},
            torch.from_numpy(x).bfloat16(),
            backend="reference",
        )


@pytest.mark.parametrize(
    ("operator", "expected"),
    [(convolution((5, 4), 2, 3, 3), "conv"), (self_attention((3,), 4, 2), "sdpa"), (OPERATOR, "stream")],
)
def test_the_default_of_torch_is_the_first_that_applies(operator: Operator, expected: str) -> None:
    runs = [c.algorithm for c in translution.explain(Request(operator)) if c.backend == "torch" and not c.reasons]
    assert runs[0] == expected


def test_compiled_operator_is_the_call_it_stands_for() -> None:
    call = translution.compile(OPERATOR, backend="numpy", algorithm="pairwise")
    params, x = params_of(OPERATOR), tokens(2, 7, 4)
    mask = np.arange(7) < 5
    expected = translution.run(OPERATOR, params, x, mask=mask, backend="numpy", algorithm="pairwise")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: call(params, x, mask=mask), range(8)))
    assert all(np.array_equal(out, expected) for out in results)
    assert translution.compile(OPERATOR, plan=call.plan).plan == call.plan
    with pytest.raises(InputError, match="another operator"):
        translution.compile(self_attention((3,), 4, 2), plan=Plan(OPERATOR, "numpy"))
    with pytest.raises(InputError, match="Leave backend and algorithm out"):
        translution.compile(OPERATOR, "numpy", "stream", plan=Plan(OPERATOR, "torch", "pairwise"))
    with pytest.raises(InputError, match=r"a plan is a translution\.Plan"):
        translution.compile(OPERATOR, plan=3)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="Did you mean 'numpy'"):
        translution.compile(OPERATOR, backend="nunpy")
    with pytest.raises(InputError, match=r"translution\.spec\.Operator"):
        translution.compile("translution2d")  # type: ignore[arg-type]


def test_B3_more_memory_than_there_is_is_refused_before_anything_is_built() -> None:
    operator = self_attention((2**20,), 2, 1)
    params = {name: np.zeros(shape, np.float32) for name, shape in operator.parameters.items()}
    x = np.broadcast_to(np.float32(0), (1, 2**20, 2))
    with pytest.raises(CostError, match=r"GiB.*Use a window"):
        translution.run(operator, params, x, backend="numpy")


def test_a_backend_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebodys.py").write_text(
        textwrap.dedent(
            """
            from translution.backends.numpy import backend as own

            class Doubled:
                name, kind, algorithms, dtypes = "doubled", "numpy", ("stream",), ("float64",)

                def unavailable(self):
                    return []

                def not_supported(self, request, algorithm):
                    return own.not_supported(request, algorithm)

                def forward(self, request, algorithm, params, inputs):
                    out, weights = own.forward(request, algorithm, params, inputs)
                    return 2 * out, weights

                def vjp(self, request, algorithm, params, inputs, cotangent):
                    raise NotImplementedError

            backend, not_one = Doubled(), 3
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    params, x = params_of(OPERATOR), tokens(1, 7, 4)
    out = translution.run(OPERATOR, params, x, backend="somebodys:backend")
    assert np.array_equal(out, 2 * translution.run(OPERATOR, params, x, backend="numpy", algorithm="stream"))
    with pytest.raises(TypeError, match="not a backend"):
        translution.run(OPERATOR, params, x, backend="somebodys:not_one")
    with pytest.raises(UnknownName, match="backend"):
        translution.run(OPERATOR, params, x, backend="somebodys:bakend")
    assert "somebodys" in sys.modules


def test_public_names_are_there_and_sorted() -> None:
    assert list(translution.__all__) == sorted(translution.__all__)
    for name in translution.__all__:
        assert getattr(translution, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = translution.nothing
