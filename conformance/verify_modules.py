"""A user's own model: every Conv*, ConvTranspose*, AvgPool* and MultiheadAttention in it, compared with its operator.

The model runs once; what flows into each module is kept, and module and operator are compared on it: output, attention
weights, the gradients of every input and of every weight and bias, for a random cotangent. The operator runs on the
general algorithm: no native kernel is compared with itself.

Two comparisons, both with the module evaluated in float64: the operator in float64, where the bound is some 1e-15, and
the operator in the module's own dtype.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from translution.backends.torch.conversion import CONVERTIBLE, ConversionError, describe
from translution.backends.torch.modules import TranslutionAttention, drop_in
from translution.conformance.comparison import ComparisonError, share, worst_error
from translution.conformance.module_bounds import attention_bounds, evaluate, window_bounds
from translution.conformance.results import CannotVerify, Row, blame
from translution.conformance.rounding import ARITHMETIC
from translution.errors import InputError, NotSupported
from translution.progress import Update, silently
from translution.spec import SpecError

INPUTS = ("input", "query", "key", "value")


Arguments = Mapping[str, Any]


@contextmanager
def _slow_path() -> Iterator[None]:
    """Off the fast path of nn.TransformerEncoder, which reads the weights of its attention and calls nobody."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def capture(model: nn.Module, *inputs: Tensor) -> dict[nn.Module, list[Arguments]]:
    """Run ``model`` and keep the arguments of every call of a convertible module; a module that never ran has none."""
    calls: dict[nn.Module, list[Arguments]] = {m: [] for m in model.modules() if isinstance(m, CONVERTIBLE)}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        copies: dict[int, Tensor] = {}  # one copy of each tensor: query is key is value must stay so
        for value in given.values():
            if isinstance(value, Tensor):
                copies.setdefault(id(value), value.detach().clone())
        kept = {k: copies[id(v)] if isinstance(v, Tensor) else v for k, v in given.items()}
        calls[module].append(kept)

    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in calls]
    try:
        with _slow_path():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def verify_modules(
    factory: Callable[[], nn.Module],
    shape: tuple[int, ...],
    *,
    algorithm: str = "stream",
    backend: str = "torch",
    seed: int = 0,
    progress: Update = silently,
) -> list[Row]:
    """One row for each convertible module of ``factory()``, on a normal random input of ``shape``.

    The model is put into eval mode. A module that can't be converted has a row without cases that says why; one that
    never ran does not pass, as nothing was shown of it.
    """
    with blame("building the model"):
        model = factory()
    if not isinstance(model, nn.Module):
        raise CannotVerify(f"the factory returned a {type(model).__name__}, not a torch.nn.Module")
    model = model.eval()
    generator = torch.Generator().manual_seed(seed)
    example = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    with blame(f"the model on a random input {shape} of {example.dtype}"):
        inputs = torch.randn(shape, generator=generator, dtype=torch.float64).to(example.dtype).to(example.device)
        calls = capture(model, inputs)
    names: dict[nn.Module, list[str]] = {module: [] for module in calls}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names:
            names[module].append(name or "model")
    rows = []
    for done, (module, captured) in enumerate(calls.items()):
        subject = f"{' = '.join(names[module])} ({type(module).__name__})"
        progress(subject, done, len(calls))
        rows.append(_verify(subject, module, captured, algorithm, backend, generator))
    if not rows:
        rows = [Row("modules", type(model).__name__, backend, algorithm, 0, 0.0, 0.0, False, "no convertible module")]
    progress("modules", len(calls), len(calls))
    return rows


def _verify(
    subject: str,
    module: nn.Module,
    captured: list[Arguments],
    algorithm: str,
    backend: str,
    generator: torch.Generator,
) -> Row:
    def row(cases: int, error: float, used: float, passed: bool, detail: str) -> Row:
        return Row("modules", subject, backend, algorithm, cases, error, used, passed, detail)

    try:
        describe(module)
    except ConversionError as refused:
        return row(0, 0.0, 0.0, True, str(refused))
    if not captured:
        return row(0, 0.0, 0.0, False, "never ran on this input: nothing was compared")
    error, used, compared = 0.0, 0.0, ""
    for number, call in enumerate(captured):
        cotangents = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator)))
        try:
            one_error, one_share, compared = compare(module, call, cotangents, algorithm, backend)
        except ConversionError as refused:
            return row(0, 0.0, 0.0, True, f"call {number + 1}: {refused}")
        except Exception as failed:  # noqa: BLE001 - one module that breaks is its own row; the others still run
            named = isinstance(failed, (ComparisonError, NotSupported, InputError, SpecError))
            words = str(failed) if named else f"{type(failed).__name__}: {failed}"
            return row(number + 1, float("inf"), float("inf"), False, f"call {number + 1}: {words}")
        error, used = max(error, one_error), max(used, one_share)
    return row(len(captured), error, used, used <= 1, f"{'agrees' if used <= 1 else 'differs'}: {compared}")


def _cast(arguments: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments in another dtype, the tokens requiring gradients; one tensor under several names stays one."""
    cast: dict[int, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            cast.setdefault(id(value), value.detach().clone().to(dtype).requires_grad_(name in INPUTS))
    return {name: cast.get(id(value), value) for name, value in arguments.items()}


def compare(
    module: nn.Module,
    arguments: Mapping[str, Any],
    generator: torch.Generator,
    algorithm: str | None = "stream",
    backend: str = "torch",
) -> tuple[float, float, str]:
    """One call of one module against its operator: largest error, largest share of its bound, and what was compared.

    ``arguments`` are those of the module's ``forward`` by name; ``generator`` draws the cotangent.

    Raises:
        ComparisonError: another shape or dtype, or NaN and Inf in other places.
        ConversionError: the module is no operator.
    """
    own = next(arguments[name].dtype for name in INPUTS if name in arguments)
    exact = copy.deepcopy(module).double().requires_grad_()
    given = _cast(arguments, torch.float64)
    out, _, _ = evaluate(exact, given)
    # Values that every dtype holds, so that all comparisons have one cotangent.
    cotangent = torch.randint(-8, 9, out.shape, generator=generator).to(out) / 4
    want = evaluate(exact, given, cotangent)
    error = used = 0.0
    for dtype in dict.fromkeys((torch.float64, own)):
        plain = copy.deepcopy(module).to(dtype).requires_grad_()
        replaced = drop_in(plain, algorithm=algorithm, backend=backend)
        got = evaluate(replaced, _cast(arguments, dtype), cotangent.to(dtype))
        name = str(dtype).removeprefix("torch.")
        bounds = _bounds(exact, arguments, cotangent, name)
        pairs: list[tuple[str, Tensor | None, Tensor, Tensor | None]] = [("output", got[0], want[0], bounds[0])]
        if want[1] is not None:
            pairs.append(("attention weights", got[1], want[1], bounds[1]))
        pairs += [(f"gradient of {key}", got[2][key], value, bounds[2][key]) for key, value in want[2].items()]
        for label, found, expected, bound in pairs:
            error = max(error, worst_error(label, found, expected))
            used = max(used, share(label, found, expected, bound, dtype=name))
    quantities = ["output", *(["attention weights"] if want[1] is not None else []), *(f"d/d {key}" for key in want[2])]
    dtypes = " and ".join(dict.fromkeys(("float64", str(own).removeprefix("torch."))))
    return error, used, f"{', '.join(quantities)} in {dtypes}"


def _bounds(
    exact: nn.Module, given: Mapping[str, Any], cotangent: Tensor, dtype: str
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Bounds of the output, the attention weights and the gradients, in the module's own shapes and names."""
    arguments = _cast(given, torch.float64)
    if not isinstance(exact, nn.MultiheadAttention):
        out, gradients = window_bounds(exact, arguments, cotangent, dtype)
        return out, None, gradients
    lowering = drop_in(exact)
    assert isinstance(lowering, TranslutionAttention)
    query, key, value = (arguments[name] for name in INPUTS[1:])
    lowered = lowering.lower(query, key, value, arguments.get("key_padding_mask"), arguments.get("attn_mask"))
    budget = attention_bounds(
        lowered.operator,
        {name: value.detach().numpy() for name, value in lowered.params.items()},
        lowered.x.detach().numpy(),
        None if lowered.y is None else lowered.y.detach().numpy(),
        None if lowered.mask is None else lowered.mask.detach().numpy(),
        lowering.tokens(cotangent).numpy(),
        dtype,
    )
    # Parameters and tokens are the module's own numbers in other places: the reverse placement carries bounds back.
    leaves: dict[str, Tensor] = {}
    for name, value in ((n, arguments[n]) for n in INPUTS[1:]):
        if all(value is not seen for seen in leaves.values()):
            leaves[name] = value
    leaves |= dict(exact.named_parameters())
    targets = {**lowered.params, "x": lowered.x} | ({} if lowered.y is None else {"y": lowered.y})
    unit = ARITHMETIC[dtype].unit
    # One rounding more for the tokens: a tensor that is both query and key adds two gradients.
    carried = [
        torch.from_numpy(budget.gradients[n] + (unit * abs(budget.gradient_values[n]) if n in "xy" else 0)).to(t)
        for n, t in targets.items()
    ]
    back = torch.autograd.grad(list(targets.values()), list(leaves.values()), carried)
    out = torch.from_numpy(budget.out)
    out = out.squeeze(0) if cotangent.dim() == 2 else lowering.tokens(out)
    weights = torch.from_numpy(budget.weights_bound)
    if arguments.get("average_attn_weights", True):
        heads = weights.shape[1]
        weights = weights.mean(dim=1) + (heads + 2) * unit * torch.from_numpy(budget.weights).mean(dim=1)
    if cotangent.dim() == 2:
        weights = weights.squeeze(0)
    return out, weights, dict(zip(leaves, back, strict=True))
