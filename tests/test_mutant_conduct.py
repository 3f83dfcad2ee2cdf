"""Mutants whose mistake ordinary results do not show, each in the one situation that does (B1 to B4, M4)."""

import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from translution import run
from translution.conformance.exam.question import Question
from translution.conformance.exam.subject import BackendFailure, LiveSubject
from translution.conformance.mutants.catalogue import catalogue
from translution.conformance.mutants.naive import Naive
from translution.registry import Backend
from translution.spec import (
    BiasTable,
    Identity,
    Lattice,
    Mean,
    Ones,
    Operator,
    PerDisplacement,
    Shared,
    Softmax,
    presets,
)

MUTANTS = catalogue()


def question(operator: Operator, seed: int = 0, batch: int = 2) -> Question:
    """Normal values, with a cotangent."""
    generator = np.random.default_rng(seed)
    params = {name: generator.standard_normal(shape) for name, shape in operator.parameters.items()}
    x = generator.standard_normal((batch, operator.layout.num_queries, operator.dim))
    y = None if operator.layout.is_self else generator.standard_normal((batch, operator.layout.num_keys, operator.dim))
    found = Question(operator, params, x, y, return_weights=True)
    return found.but(cotangent=generator.standard_normal(found.out_shape))


def subject(backend: Backend, dtype: str = "float64") -> LiveSubject:
    return LiveSubject(backend, "pairwise", dtype)


def masked_question() -> Question:
    """The last of three keys is masked for query 0 and dead for nobody else."""
    mask = np.array([[True, True, False], [True, True, True], [True, True, True]])
    op = Operator(Lattice((3,)), 2, 1, PerDisplacement(2), Shared(2), Shared(2))
    return question(op, batch=1).but(mask=mask, y=np.random.default_rng(1).standard_normal((1, 3, 2)))


def with_nan(q: Question, key: int) -> Question:
    y = np.array(q.y)
    y[:, key] = np.nan
    return q.but(y=y)


def test_absent_times_zero() -> None:
    """NaN in a masked key reaches the query that does not see it."""
    q = with_nan(masked_question(), 2)
    assert np.isfinite(subject(Naive()).run(q).out[0, 0]).all()
    assert np.isnan(subject(MUTANTS["absent-times-zero"].backend).run(q).out[0, 0]).all()


def test_nan_to_num() -> None:
    """NaN in a live key is lost."""
    q = with_nan(masked_question(), 0)
    assert np.isnan(subject(Naive()).run(q).out).all()
    assert np.isfinite(subject(MUTANTS["nan-to-num"].backend).run(q).out).all()


def test_live_nan_spreads() -> None:
    """NaN in a key reaches a query that does not see it, although another does."""
    q = with_nan(masked_question(), 2)
    assert np.isnan(subject(MUTANTS["live-nan-spreads"].backend).run(q).out[0, 0]).all()


def test_absent_gradient_nan() -> None:
    """The result is right, the gradients are not numbers."""
    q = masked_question()
    q = with_nan(q.but(mask=np.array([True, True, False])), 2)
    backend = MUTANTS["absent-gradient-nan"].backend
    assert np.array_equal(subject(backend).run(q).out, subject(Naive()).run(q).out)
    assert np.isfinite(subject(Naive()).vjp(q).gradients["value.table"]).all()
    assert np.isnan(subject(backend).vjp(q).gradients["value.table"]).any()


def test_no_max_subtraction() -> None:
    """Large logits overflow."""
    op = Operator(Lattice((2,)), 1, 1, Identity(), relevance=Softmax(content=False, bias=BiasTable()))
    q = Question(op, {"relevance.bias": np.array([[800.0, 800.0, 800.0]])}, np.array([[1.0], [3.0]]))
    assert subject(Naive()).run(q).out.ravel().tolist() == [2.0, 2.0]
    assert np.isnan(subject(MUTANTS["no-max-subtraction"].backend).run(q).out).all()


def test_second_order_zero() -> None:
    """First derivatives are right (tests/test_mutants.py), second ones are 0."""
    q = masked_question()
    found = []
    for backend in (Naive(), MUTANTS["second-order-zero"].backend):
        given = subject(backend).arguments(q)
        given["x"].requires_grad_()
        (first,) = torch.autograd.grad(run(**given).square().sum(), given["x"], create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), given["x"])
        found.append(second.numpy())
    assert found[0].any()
    assert not found[1].any()


def test_returns_float32() -> None:
    """A subject sees the dtype."""
    backend = MUTANTS["returns-float32"].backend
    q = masked_question()
    with pytest.raises(BackendFailure, match="out is float32, expected an array of float64"):
        subject(backend).run(q)
    assert np.array_equal(subject(backend, "float32").run(q).out, subject(Naive(), "float32").run(q).out)


def test_overflow_in_half() -> None:
    """An inner product beyond 65504 is lost although the logit is small."""
    op = Operator(Lattice((1,), key_grid=(2,)), 1, 1, Identity(), Identity(), Identity(), Softmax(scale=2.0**-16))
    q = Question(op, {}, np.array([[512.0]]), np.array([[512.0], [0.0]]))
    assert np.isfinite(subject(Naive(), "float16").run(q).out).all()
    assert np.isnan(subject(MUTANTS["overflow-in-half"].backend, "float16").run(q).out).all()


# Conduct


def test_writes_input() -> None:
    """Its tokens are changed."""
    given = subject(Naive()).arguments(masked_question()) | {"backend": MUTANTS["writes-input"].backend}
    before = given["x"].clone()
    run(**given)
    assert torch.equal(given["x"], before + 1)


def test_output_reused_buffer() -> None:
    """A result changes when another is computed."""
    given = subject(Naive()).arguments(masked_question()) | {"backend": MUTANTS["output-reused-buffer"].backend}
    first = run(**given)
    kept = first.clone()
    assert not torch.equal(run(**given | {"y": 2 * given["y"]}), kept)
    assert not torch.equal(first, kept)


def test_output_aliases_input() -> None:
    """The result stands where x stood."""
    given = subject(Naive()).arguments(masked_question()) | {"backend": MUTANTS["output-aliases-input"].backend}
    assert run(**given).data_ptr() == given["x"].data_ptr()


def test_caches_weights() -> None:
    """A parameter that is changed in place is not seen; another is."""
    given = subject(Naive()).arguments(masked_question()) | {"backend": MUTANTS["caches-weights"].backend}
    first = run(**given)
    given["params"]["value.table"].mul_(2)
    assert torch.equal(run(**given), first)
    other = given["params"] | {"value.table": given["params"]["value.table"].clone()}
    assert torch.equal(run(**given | {"params": other}), 2 * first)


def test_ignores_strides() -> None:
    """Transposed tokens are misread."""
    given = subject(Naive()).arguments(masked_question())
    turned = given | {"x": given["x"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert torch.equal(run(**turned), run(**given))
    assert not torch.equal(run(**turned | {"backend": MUTANTS["ignores-strides"].backend}), run(**given))


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        self.size = max(self.size, found.numel() if isinstance(found, torch.Tensor) else 0)
        return found


def test_gathers_matrices() -> None:
    """One matrix for each of n^2 links, where the plain backend has one token for each."""
    n, dim = 8, 16
    given = subject(Naive()).arguments(question(presets.translution((n,), dim, 2), batch=1))
    sizes = []
    for backend in (Naive(), MUTANTS["gathers-matrices"].backend):
        with Largest() as seen:
            run(**given | {"backend": backend})
        sizes.append(seen.size)
    assert sizes == [n * n * dim, n * n * dim * dim]


def test_noise() -> None:
    """Calls differ in their last bits and not on whole numbers."""
    op = Operator(Lattice((12,)), 1, 1, Identity(), relevance=Ones())
    own = subject(MUTANTS["noise"].backend)
    q = question(op)
    assert len({own.run(q).out.tobytes() for _ in range(20)}) > 1
    whole = q.but(x=np.rint(q.x * 8))
    assert len({own.run(whole).out.tobytes() for _ in range(20)}) == 1


def test_thread_shared_buffer() -> None:
    """Two threads get each other's results."""
    backend, wrong = MUTANTS["thread-shared-buffer"].backend, []
    gate = threading.Barrier(2)

    def ask(seed: int) -> None:
        given = subject(backend).arguments(question(presets.self_attention((3,), 4, 2), seed))
        expected = run(**given | {"backend": Naive()})
        gate.wait()
        wrong.extend(not torch.equal(run(**given), expected) for _ in range(200))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 400
    assert any(wrong)


def test_empty_batch_fails() -> None:
    """And only that."""
    backend = MUTANTS["empty-batch-fails"].backend
    q = question(presets.self_attention((3,), 4, 2))
    assert np.array_equal(subject(backend).run(q).out, subject(Naive()).run(q).out)
    empty = q.but(x=q.x[:0])
    assert subject(Naive()).run(empty).out.shape == (0, 3, 4)
    with pytest.raises(BackendFailure, match="IndexError"):
        subject(backend).run(empty)


# Claims


def refusal(name: str, q: Question) -> str:
    with pytest.raises(BackendFailure) as failure:
        subject(MUTANTS[name].backend).run(q)
    return str(failure.value)


def test_claims() -> None:
    """What each says and does not keep."""
    plain = question(presets.self_attention((3,), 4, 2)).but(return_weights=False)
    registers = question(presets.translution((3,), 4, 2, registers=1)).but(return_weights=False)
    floats = plain.but(mask=np.zeros((3, 3)))
    for name in ("claims-too-much", "refuses-late", "not-supported-raises"):
        assert np.array_equal(subject(MUTANTS[name].backend).run(plain).out, subject(Naive()).run(plain).out)
    assert "registers are not implemented" in refusal("claims-too-much", registers)
    assert "weights are not returned" in refusal("refuses-late", plain.but(return_weights=True))
    assert "not_supported raised" in refusal("not-supported-raises", floats)
    assert "not a second time" in refusal("claims-inconsistent", plain)


def test_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another backend is called for circular borders alone."""
    from translution.backends.numpy import backend as other

    calls: list[str] = []
    original = type(other).forward

    def counted(self, request, *arguments):  # type: ignore[no-untyped-def]
        calls.append(request.operator.layout.boundary)
        return original(self, request, *arguments)

    monkeypatch.setattr(type(other), "forward", counted)
    own = subject(MUTANTS["falls-back"].backend)
    for boundary in ("absent", "zeros", "circular"):
        own.run(question(Operator(Lattice((4,), kernel_size=3, boundary=boundary), 2, 1, Shared(2), relevance=Mean())))
    assert calls == ["circular"]


def test_misbehaving_backends() -> None:
    """Those that return: what a subject says of them."""
    from translution.conformance.mutants import misbehaving

    q = question(presets.self_attention((3,), 4, 2), batch=1).but(return_weights=False)
    for backend, message in (
        (misbehaving.raises, "RuntimeError: something broke inside"),
        (misbehaving.returns_list, "claimed, but raised"),
        (misbehaving.returns_none, "claimed, but raised TypeError"),
        (misbehaving.wrong_shape, r"out has shape \(1, 4, 4\), expected \(1, 3, 4\)"),
    ):
        with pytest.raises(BackendFailure, match=message):
            subject(backend).run(q)


def test_prints_garbage(capfd: pytest.CaptureFixture[str]) -> None:
    """Its answers are right."""
    from translution.conformance.mutants import misbehaving

    q = question(presets.self_attention((3,), 4, 2))
    assert np.array_equal(subject(misbehaving.prints).run(q).out, subject(Naive()).run(q).out)
    assert "verdict" in capfd.readouterr().out
