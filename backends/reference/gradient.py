"""The definition, backward: the same loops, each line of the formula answered by its adjoint.

With d(.) for the gradient of <cotangent, out>:

    d(o_i) = output_scale * O^T d(out_i)    d(v_ij^h) = a_ij^h d(o_i^h)            d(a_ij^h) = <d(o_i^h), v_ij^h>
    softmax: d(l_ij) = a_ij (d(a_ij) - sum_k a_ik d(a_ik))                         ones, mean: the weights are constants
    d(q_ij^h) = scale d(l_ij^h) k_ij^h      d(k_ij^h) = scale d(l_ij^h) q_ij^h     d(bias^h[c]) = sum of d(l_ij^h) in c
"""

from collections.abc import Mapping

import numpy as np

from translution.backends.reference.definition import (
    Seen,
    branch_weights,
    gate,
    look,
    parts_of_heads,
    project,
    quadratic_features,
    weigh,
)
from translution.backends.reference.encode import Number, Parameters, Place, Vector, encode_backward
from translution.spec import BiasTable, LowRankOutput, Mean, Ones, Operator, QuadraticBias, Softmax
from translution.spec.relevance import branches


def backward(
    operator: Operator, params: Parameters, x: Vector, y: Vector, mask: Vector | None, cotangent: Vector
) -> tuple[Vector, Mapping[str, Vector], Vector, Vector]:
    """out, and the gradients of <cotangent, out> for the parameters, x and y; shapes as in ``definition.forward``."""
    gradients = {name: np.zeros_like(value) for name, value in params.items()}
    out, dx, dy = np.zeros_like(cotangent), np.zeros_like(x), np.zeros_like(y)
    for b in range(len(x)):
        for i in range(operator.layout.num_queries):
            seen = look(operator, params, x[b], y[b], None if mask is None else mask[b], i)
            out[b, i], d_mixed = _project_backward(operator, params, seen, cotangent[b, i], gradients)
            d_query = [np.zeros_like(at.query) for at in seen]
            d_key = [np.zeros_like(at.key) for at in seen]
            d_value = [np.zeros_like(at.value) for at in seen]
            for h in range(operator.num_heads):
                weights, _ = weigh(operator, params, seen, h)
                live = [n for n, at in enumerate(seen) if at.mask[h] is not None]
                d_weights = [d_mixed[h] @ seen[n].value[h] for n in live]
                for n, a in zip(live, weights, strict=True):
                    d_value[n][h] = a * d_mixed[h]
                logits = _relevance_backward(operator, params, [seen[n] for n in live], h, d_weights, gradients)
                for n, d_content in zip(live, logits, strict=True):
                    d_query[n][h] = d_content * seen[n].key[h]
                    d_key[n][h] = d_content * seen[n].query[h]
            for n, at in enumerate(seen):
                token_gradient = encode_backward(
                    operator.value, "value", params, at.token, at.value_place, d_value[n].reshape(-1), gradients
                )
                if operator.query is not None and operator.key is not None:
                    dx[b, i] += encode_backward(
                        operator.query, "query", params, x[b, i], at.query_place, d_query[n].reshape(-1), gradients
                    )
                    token_gradient = token_gradient + encode_backward(
                        operator.key, "key", params, at.token, at.key_place, d_key[n].reshape(-1), gradients
                    )
                if at.link.key is not None:
                    dy[b, at.link.key] += token_gradient
    return out, gradients, dx, dy


def _project_backward(
    operator: Operator, params: Parameters, seen: list[Seen], cotangent: Vector, gradients: dict[str, Vector]
) -> tuple[Vector, Vector]:
    """out_i, and the gradient of the mixed values [H, width]."""
    mixed = np.zeros((operator.num_heads, operator.value_head_dim))
    for h in range(operator.num_heads):
        for a, at in zip(*weigh(operator, params, seen, h), strict=True):
            mixed[h] += a * at.value[h]
    flat, arriving = mixed.reshape(-1), cotangent
    scaled = operator.output_scale * flat
    if isinstance(operator.output, LowRankOutput):
        arriving = _low_rank_output_backward(operator, operator.output, params, scaled, cotangent, gradients)
    elif operator.output is not None:
        arriving = encode_backward(operator.output, "output", params, scaled, Place(1), cotangent, gradients)
    d_mixed = (operator.output_scale * arriving).reshape(operator.num_heads, -1)
    return project(operator, params, flat), d_mixed


def _low_rank_output_backward(
    operator: Operator,
    output: LowRankOutput,
    params: Parameters,
    joined: Vector,
    cotangent: Vector,
    gradients: dict[str, Vector],
) -> Vector:
    """Gradient of the concatenated heads for (o + z U) W + b."""
    full, low = parts_of_heads(operator, output, joined)
    if output.bias:
        gradients["output.bias"] += cotangent
    gradients["output.weight"] += np.outer(full + low @ params["output.up"], cotangent)
    d_full = params["output.weight"] @ cotangent
    gradients["output.up"] += np.outer(low, d_full)
    d_low = params["output.up"] @ d_full
    by_head = [part.reshape(operator.num_heads, -1) for part in (d_full, d_low)]
    return np.concatenate(by_head, axis=1).reshape(-1)


def _relevance_backward(
    operator: Operator,
    params: Parameters,
    live: list[Seen],
    h: int,
    d_weights: list[Number],
    gradients: dict[str, Vector],
) -> list[float]:
    """Gradients of the inner products <q_ij, k_ij>_h of the live links; those of bias and gate go to ``gradients``."""
    parts = list(branches(operator.relevance))
    shares = [1.0]
    if len(parts) == 2 and live:
        g = float(gate(params, h))
        shares = [1 - g, g]
        first, second = (branch_weights(operator, params, prefix, kind, live, h) for prefix, kind in parts)
        d_gate = sum(d * (b - a) for d, a, b in zip(d_weights, first, second, strict=True))
        gradients["relevance.gate"][h] += d_gate * g * (1 - g)
    d_content = [0.0 for _ in live]
    for share, (prefix, kind) in zip(shares, parts, strict=False):
        for n, d in enumerate(_branch_backward(operator, params, prefix, kind, live, h, d_weights, gradients, share)):
            d_content[n] += d
    return d_content


def _branch_backward(
    operator: Operator,
    params: Parameters,
    prefix: str,
    kind: Softmax | Ones | Mean,
    live: list[Seen],
    h: int,
    d_weights: list[Number],
    gradients: dict[str, Vector],
    share: float,
) -> list[float]:
    if not isinstance(kind, Softmax):
        return []
    weights = branch_weights(operator, params, prefix, kind, live, h)
    average = sum(a * d for a, d in zip(weights, d_weights, strict=True))
    d_logits = [share * a * (d - average) for a, d in zip(weights, d_weights, strict=True)]
    for at, d in zip(live, d_logits, strict=True):
        if isinstance(kind.bias, BiasTable):
            gradients[f"relevance.{prefix}bias"][h, at.link.value_row] += d
        elif isinstance(kind.bias, QuadraticBias):
            weight = gradients[f"relevance.{prefix}weight"][h]
            weight += d * quadratic_features(at.link, len(weight))
    return [float(operator.scale_of(kind) * d) for d in d_logits] if kind.content else []
