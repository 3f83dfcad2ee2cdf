"""How far the rounding of every layer can move a network's outputs, to first order.

Each layer l adds a local error e_l, bounded elementwise by E_l from its own arithmetic. To first order the outputs move
by sum_l J_l e_l with J_l the derivative of the outputs by layer l's result, so that |change| <= sum_l |J_l| E_l (Higham
2002, section 3.8). One reverse pass for each output gives a row of every J_l. Products of two errors are left out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from translution.backends.torch.modules import TranslutionAttention, drop_in
from translution.conformance.module_bounds import attention_bounds, window_bounds
from translution.conformance.rounding import ARITHMETIC, Arithmetic

Rule = Callable[[Any, Tensor, str], Tensor]

# Absolute error of erf in units of roundoff: formula 7.1.26 of Abramowitz and Stegun, which torch uses on some
# processors, is off by 1.5e-7 (2.5 of 2^-24) before the rounding of its polynomial.
ERF_ERROR = 16


class MeanOverTokens(nn.Module):
    """[B, N, C] to [B, C]."""

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean over axis 1."""
        return tokens.mean(dim=1)


def _gamma(terms: float, arithmetic: Arithmetic) -> float:
    return float(arithmetic.gamma(terms))


def _window(module: nn.Module, x: Tensor, dtype: str) -> Tensor:
    return window_bounds(module, {"input": x}, None, dtype)[0]


def _attention(module: nn.MultiheadAttention, x: Tensor, dtype: str) -> Tensor:
    lowering = drop_in(module)
    assert isinstance(lowering, TranslutionAttention)
    lowered = lowering.lower(x, x, x)
    params = {name: value.detach().numpy() for name, value in lowered.params.items()}
    return torch.from_numpy(attention_bounds(lowered.operator, params, lowered.x.numpy(), None, None, None, dtype).out)


def _linear(module: nn.Linear, x: Tensor, dtype: str) -> Tensor:
    bias = None if module.bias is None else module.bias.abs()
    magnitude = nn.functional.linear(x.abs(), module.weight.abs(), bias)
    return _gamma(module.in_features + 2, ARITHMETIC[dtype]) * magnitude


def _layer_norm(module: nn.LayerNorm, x: Tensor, dtype: str) -> Tensor:
    """w (x - m) r + b with r = (v + eps)^(-1/2); v from any of the usual formulas, mean(x^2) - m^2 included."""
    arithmetic = ARITHMETIC[dtype]
    unit, size = arithmetic.unit, x.shape[-1]
    mean, square = x.mean(-1, keepdim=True), (x * x).mean(-1, keepdim=True)
    spread = x.var(-1, unbiased=False, keepdim=True) + module.eps
    r = spread.rsqrt()
    mean_error = _gamma(size + 1, arithmetic) * x.abs().mean(-1, keepdim=True)
    spread_error = _gamma(size + 4, arithmetic) * (square + mean * mean) + 2 * mean.abs() * mean_error
    r_error = r * (spread_error / (2 * spread) + 4 * unit)
    error = r * mean_error + 6 * unit * (x.abs() + mean.abs()) * r + (x - mean).abs() * r_error
    return module.weight.abs() * error + 2 * unit * module.bias.abs()


def _gelu(_: nn.GELU, x: Tensor, dtype: str) -> Tensor:
    """x (1 + erf(x / sqrt 2)) / 2: erf itself, the rounding of its argument (t erf'(t) < 1/2), sum, products."""
    return 0.5 * x.abs() * (ERF_ERROR + 1 + 2 + 4) * ARITHMETIC[dtype].unit


def _mean(_: MeanOverTokens, x: Tensor, dtype: str) -> Tensor:
    return _gamma(x.shape[1] + 2, ARITHMETIC[dtype]) * x.abs().mean(dim=1)


def _exact(_: nn.Module, x: Tensor, __: str) -> Tensor:
    return torch.zeros((), dtype=x.dtype)


RULES: dict[type[nn.Module], Rule] = {
    nn.Conv2d: _window,
    nn.MultiheadAttention: _attention,
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.GELU: _gelu,
    MeanOverTokens: _mean,
    nn.Flatten: _exact,
    nn.Dropout: _exact,
}


def output_bounds(model: nn.Module, inputs: Tensor, *dtypes: str) -> tuple[Tensor, ...]:
    """Outputs [B, K] of a float64 model in eval mode, then their first-order bounds for arithmetic in each dtype.

    Every layer's input may also carry one rounding, for an addition between layers. Layers have one tensor input whose
    first axis is the batch. TypeError for a layer without a rule.
    """
    local: list[tuple[Tensor, list[Tensor]]] = []

    def note(module: Any, args: tuple[Any, ...], result: Any) -> None:
        x = args[0]
        out = result[0] if isinstance(result, tuple) else result
        with torch.no_grad():
            bounds = [RULES[type(module)](module, x.detach(), dtype) for dtype in dtypes]
        if x.requires_grad:
            local.append((x, [ARITHMETIC[dtype].unit * x.detach().abs() for dtype in dtypes]))
        local.append((out, bounds))

    layers = [m for m in model.modules() if type(m) in RULES]
    inner = {part for m in layers for part in m.modules() if part is not m}
    for module in model.modules():
        if not list(module.children()) and type(module) not in RULES and module not in inner:
            raise TypeError(
                f"no rounding rule for {type(module).__name__}; there are rules for {sorted(map(str, RULES))}"
            )
    hooks = [m.register_forward_hook(note) for m in layers if m not in inner]
    try:
        outputs = model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    totals = [torch.zeros_like(outputs) for _ in dtypes]
    tensors = [tensor for tensor, _ in local]
    for column in range(outputs.shape[1]):
        gradients = torch.autograd.grad(outputs[:, column].sum(), tensors, retain_graph=True, allow_unused=True)
        for gradient, (_, bounds) in zip(gradients, local, strict=True):
            for total, bound in zip(totals, bounds, strict=True):
                if gradient is not None:
                    total[:, column] += (gradient.abs() * bound).flatten(1).sum(dim=1)
    return outputs.detach(), *(total.detach() for total in totals)
