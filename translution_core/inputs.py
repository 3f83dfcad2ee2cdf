"""Checks of everything that is given to an operator, and the one shape in which backends see it."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from translution.arrays import FLOATS, Array, broadcast_to, dtype_name, kind_of, zeros
from translution.errors import InputError
from translution.spec import Operator, Softmax
from translution.spec.relevance import branches


@dataclass(frozen=True, slots=True)
class Inputs:
    """x [B, Nq, Cq], y [B, Nk, Ck] (x in the self case), mask [B|1, H|1, Nq|1, Nk|1] or None, and the batch shape."""

    x: Array
    y: Array
    mask: Array | None
    batch_shape: tuple[int, ...]


def check_parameters(operator: Operator, params: Mapping[str, Array], dtype: str) -> None:
    """Raise unless ``params`` has exactly the operator's names and shapes, all of dtype ``dtype`` (clause P1)."""
    if not isinstance(params, Mapping):
        raise InputError(
            "P1",
            f"params is a {type(params).__name__}",
            "params maps every parameter's name to its array",
            "Give a dict; operator.parameters lists every name with its shape",
        )
    expected = operator.parameters
    missing, unknown = sorted(expected.keys() - params.keys()), sorted(params.keys() - expected.keys())
    if missing or unknown:
        close = [f"{n} (did you mean {m[0]}?)" for n in unknown if (m := difflib.get_close_matches(n, missing, n=1))]
        raise InputError(
            "P1",
            f"parameters missing: {missing or 'none'}; unknown: {close or unknown or 'none'}",
            f"this operator has exactly the parameters {sorted(expected)}",
            "operator.parameters lists every name with its shape",
        )
    for name, shape in expected.items():
        kind_of(name, params[name])
        if tuple(params[name].shape) != shape:
            raise InputError(
                "P1",
                f"parameter {name} has shape {tuple(params[name].shape)}",
                f"it must be {shape} (a table has {operator.layout.num_classes} rows, one per displacement class)",
                "operator.parameters lists every name with its shape",
            )
        if dtype_name(params[name]) != dtype:
            raise InputError(
                "D1",
                f"parameter {name} is {dtype_name(params[name])}, x is {dtype}",
                "tokens and parameters of one call have one dtype",
                f"Cast the parameter or x, e.g. x.astype or x.to({dtype_name(params[name])})",
            )


def _check_tokens(name: str, value: Array, tokens: int, channels: int, dtypes: tuple[str, ...]) -> None:
    kind_of(name, value)
    shape = tuple(value.shape)
    if len(shape) < 2 or shape[-2:] != (tokens, channels):
        raise InputError(
            "D1",
            f"{name} has shape {shape}",
            f"{name} must be [..., {tokens} tokens, {channels} channels] for this operator",
            "Flatten the grid in row-major order, registers first, channels last",
        )
    if dtype_name(value) not in dtypes:
        raise InputError(
            "D1", f"{name} is {dtype_name(value)}", f"{name} must be one of {', '.join(dtypes)}", f"Cast {name} first"
        )


def _check_mask(operator: Operator, mask: Array, batch_shape: tuple[int, ...]) -> Array:
    kind_of("mask", mask)
    full = (*batch_shape, operator.num_heads, operator.layout.num_queries, operator.layout.num_keys)
    shape = tuple(mask.shape)
    padded = (1,) * (len(full) - len(shape)) + shape
    if len(padded) != len(full) or any(m not in (1, n) for m, n in zip(padded, full, strict=True)):
        raise InputError(
            "M6",
            f"mask has shape {shape}",
            f"it must broadcast to [batch, heads, queries, keys] = {full}",
            "A key-padding mask [B, Nk] is given as mask[:, None, None, :]",
        )
    dtype = dtype_name(mask)
    if dtype != "bool" and dtype not in FLOATS:
        raise InputError(
            "M1",
            f"mask is {dtype}",
            "a mask is bool (True = may attend) or a float added to the logits",
            "Convert with mask.astype(bool) or mask.bool(); torch.nn.MultiheadAttention means the opposite: pass ~mask",
        )
    if dtype != "bool" and not all(isinstance(branch, Softmax) for _, branch in branches(operator.relevance)):
        raise InputError(
            "M2",
            "a float mask with a relevance that has no logits",
            "only softmax adds a mask to its logits",
            "Give a bool mask, True = may attend",
        )
    if math.prod(padded[: len(batch_shape)]) == 1:
        return mask.reshape((1, *padded[len(batch_shape) :]))
    target = (*batch_shape, *padded[len(batch_shape) :])
    return broadcast_to(mask.reshape(padded), target).reshape((math.prod(batch_shape), *padded[len(batch_shape) :]))


def check_inputs(
    operator: Operator,
    params: Mapping[str, Array],
    x: Array,
    y: Array | None,
    mask: Array | None,
    dtypes: tuple[str, ...],
) -> Inputs:
    """Check every array against the operator and flatten the batch dimensions.

    Where the relevance does not look at content there are no queries to encode: x alone then holds keys and values, and
    the x of the result is a stand-in of zeros that has the queries' shape.
    """
    layout = operator.layout
    only_keys = y is None and not operator.uses_content
    tokens, channels = (layout.num_keys, operator.keys_dim) if only_keys else (layout.num_queries, operator.dim)
    _check_tokens("x", x, tokens, channels, dtypes)
    batch_shape = tuple(x.shape[:-2])
    batch = math.prod(batch_shape)
    flat_x = x.reshape((batch, *x.shape[-2:]))
    if only_keys:
        flat_y, flat_x = flat_x, zeros(x, (batch, layout.num_queries, operator.dim))
    elif y is None:
        if not layout.is_self or operator.keys_dim != operator.dim:
            raise InputError(
                "D1",
                "y is not given",
                f"this operator takes {layout.num_keys} key tokens of {operator.keys_dim} channels beside its queries",
                "Pass y; x alone is enough where both sides are the same tokens",
            )
        flat_y = flat_x
    else:
        _check_tokens("y", y, layout.num_keys, operator.keys_dim, dtypes)
        if tuple(y.shape[:-2]) != batch_shape or dtype_name(y) != dtype_name(x):
            raise InputError(
                "D1",
                f"y is {dtype_name(y)} {tuple(y.shape)}, x is {dtype_name(x)} {tuple(x.shape)}",
                "x and y have the same batch dimensions and dtype",
                "Expand or cast one of them",
            )
        flat_y = y.reshape((batch, *y.shape[-2:]))
    check_parameters(operator, params, dtype_name(x))
    flat_mask = None if mask is None else _check_mask(operator, mask, batch_shape)
    return Inputs(flat_x, flat_y, flat_mask, batch_shape)
