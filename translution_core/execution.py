"""Running an operator: choose an algorithm, check everything, compute, return the caller's kind of array."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from translution.algorithms import ALGORITHMS, Cost, Request, cost
from translution.arrays import Array, dtype_name, kind_of, needs_gradient, to_kind
from translution.errors import CostError, InputError, NotSupported, UnknownName
from translution.geometry import count_links
from translution.inputs import Inputs, check_inputs
from translution.registry import BACKENDS, Backend, Gradients, get_backend
from translution.spec import Operator

# Seconds of a dry run.
MOST_LINKS = 2_000_000


@dataclass(frozen=True, slots=True)
class Plan:
    """An operator together with the backend and the algorithm that compute it."""

    operator: Operator
    backend: str
    algorithm: str | None = None


def reasons_against(backend: Backend, request: Request, algorithm: str) -> list[str]:
    """Every reason why ``backend`` can't run ``request`` with ``algorithm``."""
    reasons = list(backend.unavailable())
    if request.dtype not in backend.dtypes:
        reasons.append(f"{backend.name} does not compute in {request.dtype}; it claims {', '.join(backend.dtypes)}")
    if algorithm not in backend.algorithms:
        return [*reasons, f"{backend.name} has no algorithm {algorithm!r}; it has {', '.join(backend.algorithms)}"]
    return [*reasons, *backend.not_supported(request, algorithm)]


def as_asked(backend: Backend, request: Request) -> Request:
    """The request as this backend is asked whether it can: gradients of NumPy arrays are those of ``vjp``, and nothing
    is recorded.
    """
    return replace(request, gradient=request.gradient and backend.kind == "torch")


def predict(backend: Backend, request: Request, algorithm: str) -> Cost:
    """What the call costs, from the operator alone: counted by the backend's own ``dry_run`` where it has one and there
    are not more than ``MOST_LINKS`` to walk over, else estimated.

    Raises:
        UnknownName: nothing is known of that algorithm.
    """
    estimate, dry_run = cost(request, algorithm), getattr(backend, "dry_run", None)
    if dry_run is None or count_links(request.operator.layout) > MOST_LINKS:
        return estimate
    found: Cost = dry_run(request, algorithm)
    return found


def choose_algorithm(backend: Backend, request: Request, algorithm: str | None = None) -> str:
    """The named algorithm if it can run, else :class:`NotSupported`; without a name the first that can (clause B1)."""
    if algorithm is not None:
        if algorithm not in ALGORITHMS:
            raise UnknownName("algorithm", algorithm, ALGORITHMS)
        reasons = reasons_against(backend, request, algorithm)
        if reasons:
            raise NotSupported(backend.name, algorithm, reasons)
        return algorithm
    every: list[str] = []
    for candidate in backend.algorithms:
        reasons = reasons_against(backend, request, candidate)
        if not reasons:
            return candidate
        every += [r for r in reasons if r not in every]
    raise NotSupported(backend.name, None, every)


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _too_much(estimate: Cost, request: Request, algorithm: str, available: int) -> str | None:
    """Why there is not the memory for this, and what would fit."""
    if request.device != "cpu" or estimate.working_bytes <= available:
        return None
    one = cost(replace(request, batch=1), algorithm).working_bytes
    if one <= available:
        fits = f"Use a batch of at most {request.batch * available // estimate.working_bytes:,}"
    elif algorithm != "stream" and cost(request, "stream").working_bytes <= available:
        fits = "Use algorithm='stream', which fits"
    else:
        fits = "Not even a batch of 1 fits. Use a window (kernel_size) or a smaller grid"
    return (
        f"{algorithm} on batch {request.batch} in {request.dtype} would need about "
        f"{estimate.working_bytes / 2**30:,.1f} GiB of working memory: there are {available / 2**30:,.1f} GiB. {fits}."
    )


def check_memory(request: Request, algorithm: str, limit: int | None = None) -> Cost:
    """The estimated cost, or :class:`CostError` where it exceeds ``limit`` bytes (the machine's memory)."""
    estimate = cost(request, algorithm)
    too_much = _too_much(estimate, request, algorithm, physical_memory() if limit is None else limit)
    if too_much is not None:
        raise CostError(f"[B3] {too_much}")
    return estimate


def _check_operator(operator: Operator) -> None:
    if not isinstance(operator, Operator):
        raise InputError(
            "O1",
            f"operator is a {type(operator).__name__}",
            "what runs is a translution.spec.Operator",
            "Build one with a preset, or with translution.spec.operator_from_json",
        )


def _prepare(
    operator: Operator,
    params: Mapping[str, Array],
    x: Array,
    y: Array | None,
    mask: Array | None,
    backend: Backend,
    algorithm: str | None,
    return_weights: bool,
) -> tuple[Request, str, dict[str, Array], Inputs]:
    _check_operator(operator)
    every = ("float64", "float32", "float16", "bfloat16", "complex128")
    inputs = check_inputs(operator, params, x, y, mask, every)
    request = Request(
        operator,
        batch=inputs.x.shape[0],
        dtype=dtype_name(x),
        device=str(getattr(x, "device", "cpu")).partition(":")[0],
        mask="none" if mask is None else "bool" if dtype_name(mask) == "bool" else "float",
        return_weights=return_weights,
        gradient=any(needs_gradient(a) for a in (x, y, mask, *params.values())),
    )
    chosen = choose_algorithm(backend, request, algorithm)
    if request.gradient and kind_of("x", x) == "numpy":
        raise InputError(
            "B1",
            "a torch tensor that requires a gradient, with x as a NumPy array",
            "the result would be a NumPy array, which has no gradient",
            "Give x as a tensor, or detach what requires a gradient",
        )
    check_memory(request, chosen)
    device = _device(x)
    own = {name: to_kind(f"parameter {name}", value, backend.kind, device) for name, value in params.items()}
    flat_x = to_kind("x", inputs.x, backend.kind, device)
    flat_y = flat_x if inputs.y is inputs.x else to_kind("y", inputs.y, backend.kind, device)
    flat_mask = None if inputs.mask is None else to_kind("mask", inputs.mask, backend.kind, device)
    return request, chosen, own, Inputs(flat_x, flat_y, flat_mask, inputs.batch_shape)


def _device(like: Array) -> Any:
    return like.device if kind_of("x", like) == "torch" else None


def _returned(value: Array, batch_shape: tuple[int, ...], like: Array) -> Array:
    """``value`` with the caller's batch dimensions, in the caller's kind of array."""
    own, kind = kind_of("the backend's result", value), kind_of("x", like)
    shaped = value.reshape((*batch_shape, *value.shape[1:]))
    if kind == "numpy" and own == "torch":
        shaped = shaped.detach()
    return to_kind("out", shaped, kind, _device(like))


def _in_graph() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is making a graph of what is called."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def run(
    operator: Operator,
    params: Mapping[str, Array],
    x: Array,
    y: Array | None = None,
    *,
    mask: Array | None = None,
    backend: str | Backend = "torch",
    algorithm: str | None = None,
    return_weights: bool = False,
) -> Array:
    """Compute an operator.

    Args:
        params: arrays by the names and shapes of ``operator.parameters``, in x's dtype; NumPy or the backend's kind.
        x: queries [.., Nq, Cq]; numpy.ndarray or torch.Tensor.
        y: keys and values [.., Nk, Ck]; None where they are x. A relevance without content (convolution, pooling) has
            no queries: give its tokens as x alone.
        mask: broadcastable to [.., H, Nq, Nk]: bool with True = may attend, or a float added to logits (M1, M2).
        backend: ``reference``, ``numpy``, ``torch``, ``triton``, ``package.module:attribute``, or a backend itself.
        algorithm: one of the backend's, or None for its first that applies. What is named runs or raises (clause B1).
        return_weights: also return the weights [.., H, Nq, Nk].

    Returns:
        out [.., Nq, F] in the dtype and kind of x (clause D1); with ``return_weights`` the pair (out, weights).
        On the torch backend the result is differentiable.

    Raises:
        InputError: an array does not fit the operator.
        NotSupported: the backend or algorithm can't run this; carries every reason.
        CostError: it would need more memory than the machine has.
        UnknownName: no such backend or algorithm.
    """
    if _in_graph():
        from translution.graph import call

        return call(operator, params, x, y, mask, backend, algorithm, return_weights)
    found = get_backend(backend)
    request, chosen, own, inputs = _prepare(operator, params, x, y, mask, found, algorithm, return_weights)
    out, weights = found.forward(request, chosen, own, inputs)
    result = _returned(out, inputs.batch_shape, x)
    return (result, _returned(weights, inputs.batch_shape, x)) if return_weights else result


def vjp(
    operator: Operator,
    params: Mapping[str, Array],
    x: Array,
    y: Array | None = None,
    *,
    cotangent: Array,
    mask: Array | None = None,
    backend: str | Backend = "numpy",
    algorithm: str | None = None,
) -> tuple[Array, Gradients]:
    """The result and the gradients of <cotangent, out> for x, y and every parameter, on any backend.

    ``cotangent`` has the shape and dtype of the result. In the self case (``y=None``) x's gradient holds both sides.
    """
    found = get_backend(backend)
    request, chosen, own, inputs = _prepare(operator, params, x, y, mask, found, algorithm, False)
    expected = (*inputs.batch_shape, operator.layout.num_queries, operator.out_features)
    kind_of("cotangent", cotangent)
    if tuple(cotangent.shape) != expected or dtype_name(cotangent) != request.dtype:
        raise InputError(
            "D1",
            f"cotangent is {dtype_name(cotangent)} {tuple(cotangent.shape)}",
            f"it has the dtype and shape of the result, {request.dtype} {expected}",
            "Give an array like the result of run",
        )
    flat = to_kind("cotangent", cotangent.reshape((request.batch, *expected[-2:])), found.kind, _device(x))
    out, gradients = found.vjp(request, chosen, own, inputs, flat)
    dx, dy = gradients.x, gradients.y
    if y is None and dy is not None:
        # Without content x holds the keys alone; otherwise it stands on both sides.
        dx, dy = (dx + dy if operator.uses_content else dy), None
    kind, device = kind_of("x", x), _device(x)
    return _returned(out, inputs.batch_shape, x), Gradients(
        {name: to_kind(name, value, kind, device) for name, value in gradients.params.items()},
        _returned(dx, inputs.batch_shape, x),
        None if dy is None else _returned(dy, inputs.batch_shape, x),
    )


@dataclass(frozen=True, slots=True)
class CompiledOperator:
    """A plan that can be called; pure, and safe to share between threads."""

    plan: Plan

    def __call__(
        self, params: Mapping[str, Array], x: Array, y: Array | None = None, mask: Array | None = None
    ) -> Array:
        """Out [.., Nq, F], as :func:`run` computes it; differentiable on torch."""
        plan = self.plan
        return run(plan.operator, params, x, y, mask=mask, backend=plan.backend, algorithm=plan.algorithm)


def compile(  # noqa: A001 - as torch.compile
    operator: Operator,
    backend: str = "torch",
    algorithm: str | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
) -> CompiledOperator:
    """A callable ``call(params, x, y=None, mask=None)`` for one operator.

    ``plan`` carries operator, backend and algorithm; given together with another operator it is refused. The path of a
    file that ``translution pick`` wrote will do too.

    Raises:
        PlanError: the file is no plan, or was made for another machine or other versions.
    """
    _check_operator(operator)
    if isinstance(plan, (str, os.PathLike)):
        from translution.plan_file import load_plan

        plan = load_plan(plan)
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(
            "B1",
            f"plan is a {type(plan).__name__}",
            "a plan is a translution.Plan or its file",
            "Give Plan(operator, ...)",
        )
    if plan is not None and (backend, algorithm) not in (("torch", None), (plan.backend, plan.algorithm)):
        raise InputError(
            "B1",
            f"backend={backend!r}, algorithm={algorithm!r} beside a plan for {plan.backend!r}, {plan.algorithm!r}",
            "a plan says what computes",
            "Leave backend and algorithm out",
        )
    if plan is not None and plan.operator != operator:
        raise InputError(
            "B1", "a plan for another operator", "a plan fits the operator it was made for", "Compile plan.operator"
        )
    settled = plan if plan is not None else Plan(operator, backend, algorithm)
    found = get_backend(settled.backend)
    unavailable = found.unavailable()
    if unavailable:
        raise NotSupported(settled.backend, settled.algorithm, unavailable)
    if settled.algorithm is not None and settled.algorithm not in ALGORITHMS:
        raise UnknownName("algorithm", settled.algorithm, ALGORITHMS)
    return CompiledOperator(settled)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to compute a request: what it costs, or every reason why it can't run."""

    backend: str
    algorithm: str | None
    cost: Cost | None
    reasons: tuple[str, ...]


def explain(request: Request, limit: int | None = None) -> list[Candidate]:
    """Every backend and algorithm for a request, the default of each backend first among those that run.

    With ``limit``, those that need more bytes with their parameters do not run.
    """
    found: list[Candidate] = []
    for name in BACKENDS:
        try:
            backend = get_backend(name)
        except NotSupported as error:
            found.append(Candidate(name, None, None, error.reasons))
            continue
        for algorithm in backend.algorithms:
            reasons = reasons_against(backend, as_asked(backend, request), algorithm)
            expected = cost(request, algorithm) if reasons else predict(backend, request, algorithm)
            if too_much := _too_much(expected, request, algorithm, physical_memory()):
                reasons.append(too_much)
            elif not reasons and limit is not None and expected.total_bytes > limit:
                reasons.append(f"needs {expected.total_bytes:,} bytes with its parameters, more than {limit:,}")
            found.append(Candidate(name, algorithm, expected, tuple(reasons)))
    return found
