"""The definition, forward: loops over batch, queries, links and heads.

    q_ij = Q(x_i ; c(i,j))    k_ij = K(y_j ; c(j,i))    v_ij = V(y_j ; c(i,j))
    l_ij^h = scale <q_ij, k_ij>_h + bias^h[c(i,j)] + mask_ij
    a_ij^h = relevance(l_i^h) over the support of i
    out_i  = O(output_scale * concat_h sum_j a_ij^h v_ij^h)

A link that is masked is never looked at, so that what stands there can't matter (clause M4).
"""

from dataclasses import dataclass

import numpy as np

from translution.backends.reference.encode import Number, Parameters, Place, Vector, encode
from translution.backends.reference.support import Link, position, support
from translution.spec import Bias, BiasTable, LowRankOutput, Mean, Ones, Operator, SlopeBias, Softmax
from translution.spec.relevance import branches


@dataclass(frozen=True, slots=True)
class Seen:
    """One link of a query with everything encoded: q, k, v [H, width]; ``mask`` is what each head adds to its logit.

    A head to which the link does not exist has mask None.
    """

    link: Link
    token: Vector
    query: Vector
    key: Vector
    value: Vector
    query_place: Place
    key_place: Place
    value_place: Place
    mask: tuple[float | None, ...]


def forward(operator: Operator, params: Parameters, x: Vector, y: Vector, mask: Vector | None) -> tuple[Vector, Vector]:
    """out [B, Nq, F] and weights [B, H, Nq, Nk] for x [B, Nq, Cq], y [B, Nk, Ck] and mask [B, H, Nq, Nk]."""
    heads, layout = operator.num_heads, operator.layout
    out = np.zeros((len(x), layout.num_queries, operator.out_features), dtype=x.dtype)
    weights = np.zeros((len(x), heads, layout.num_queries, layout.num_keys), dtype=x.dtype)
    for b in range(len(x)):
        for i in range(layout.num_queries):
            seen = look(operator, params, x[b], y[b], None if mask is None else mask[b], i)
            mixed = np.zeros((heads, operator.value_head_dim), dtype=x.dtype)
            for h in range(heads):
                for a, at in zip(*weigh(operator, params, seen, h), strict=True):
                    mixed[h] += a * at.value[h]
                    if at.link.key is not None:
                        weights[b, h, i, at.link.key] += a
            out[b, i] = project(operator, params, mixed.reshape(-1))
    return out, weights


def look(operator: Operator, params: Parameters, x: Vector, y: Vector, mask: Vector | None, i: int) -> list[Seen]:
    """Everything query i sees: x [Nq, Cq], y [Nk, Ck], mask [H, Nq, Nk]. Links that no head may use are left out."""
    heads, layout = operator.num_heads, operator.layout
    found: list[Seen] = []
    for link in support(layout, i):
        added = tuple(_mask(mask, h, i, link.key) for h in range(heads))
        if all(m is None for m in added):
            continue
        # The zero token has no place of its own, hence no position to be rotated by.
        token = np.zeros(y.shape[1], dtype=y.dtype) if link.key is None else y[link.key]
        own = Place(heads, link.value_row, position(layout, "query", i))
        from_key = Place(heads, link.key_row, None if link.key is None else position(layout, "key", link.key))
        to_value = Place(heads, link.value_row)
        none = np.zeros((heads, 0), dtype=x.dtype)
        q = none if operator.query is None else encode(operator.query, "query", params, x[i], own)
        k = none if operator.key is None else encode(operator.key, "key", params, token, from_key)
        v = encode(operator.value, "value", params, token, to_value)
        q, k, v = (part.reshape(heads, -1) for part in (q, k, v))
        found.append(Seen(link, token, q, k, v, own, from_key, to_value, added))
    return found


def _mask(mask: Vector | None, h: int, i: int, key: int | None) -> float | None:
    """What the mask adds to a logit; None takes the link away. The zero token is never masked (clauses M1, M2)."""
    if mask is None or key is None:
        return 0.0
    if mask.dtype == np.bool_:
        return 0.0 if mask[h, i, key] else None
    added = float(mask[h, i, key])
    return None if added == -np.inf else added


def weigh(operator: Operator, params: Parameters, seen: list[Seen], h: int) -> tuple[list[Number], list[Seen]]:
    """Weights a_ij of head h, with the links that exist to it; no links, no weights (clause M3)."""
    live = [at for at in seen if at.mask[h] is not None]
    parts = [branch_weights(operator, params, prefix, kind, live, h) for prefix, kind in branches(operator.relevance)]
    if len(parts) == 1:
        return parts[0], live
    g = gate(params, h)
    return [(1 - g) * first + g * second for first, second in zip(*parts, strict=True)], live


def gate(params: Parameters, h: int) -> Number:
    """g_h = sigmoid(gate_h) (clause R4)."""
    return 1 / (1 + np.exp(-params["relevance.gate"][h]))


def branch_weights(
    operator: Operator, params: Parameters, prefix: str, kind: Softmax | Ones | Mean, live: list[Seen], h: int
) -> list[Number]:
    """Weights of one plain relevance over the live links of a query (clauses R1 to R3)."""
    if not live or isinstance(kind, Ones):
        return [1.0 for _ in live]
    if isinstance(kind, Mean):
        return [1.0 / len(live) for _ in live]
    logits = []
    for at in live:
        logit: Number = at.mask[h]
        if kind.content:
            logit = logit + operator.scale_of(kind) * (at.query[h] @ at.key[h])
        if kind.bias is not None:
            logit = logit + bias(operator, params, prefix, kind.bias, at.link, h)
        logits.append(logit)
    # Any shift leaves a softmax as it is; the largest real part keeps exp in range, complex numbers included.
    largest = np.max(np.real(logits))
    grown = [np.exp(logit - largest) for logit in logits]
    total = sum(grown)
    return [part / total for part in grown]


def bias(operator: Operator, params: Parameters, prefix: str, kind: Bias, link: Link, h: int) -> Number:
    """bias^h[c(i,j)] (clause R5)."""
    if isinstance(kind, BiasTable):
        return params[f"relevance.{prefix}bias"][h, link.value_row]
    if isinstance(kind, SlopeBias):
        distance = sum(abs(d) for d in link.displacement or ())
        return -kind.slopes_for(operator.num_heads)[h] * distance
    weight = params[f"relevance.{prefix}weight"][h]
    return weight @ quadratic_features(link, len(weight))


def quadratic_features(link: Link, count: int) -> Vector:
    """(-delta, |delta|^2); zeros where a token has no position."""
    if link.displacement is None:
        return np.zeros(count)
    return np.array([*(-float(d) for d in link.displacement), float(sum(d * d for d in link.displacement))])


def project(operator: Operator, params: Parameters, mixed: Vector) -> Vector:
    """O(output_scale * concatenated heads) (clauses O1 to O3)."""
    scaled: Vector = operator.output_scale * mixed
    if operator.output is None:
        return scaled
    if isinstance(operator.output, LowRankOutput):
        full, low = parts_of_heads(operator, operator.output, scaled)
        out: Vector = (full + low @ params["output.up"]) @ params["output.weight"]
        return out + params["output.bias"] if operator.output.bias else out
    return encode(operator.output, "output", params, scaled, Place(1))


def parts_of_heads(operator: Operator, output: LowRankOutput, joined: Vector) -> tuple[Vector, Vector]:
    """The full and the low-rank features of all heads; the latter stand last in each head (clause O4)."""
    by_head, width = joined.reshape(operator.num_heads, -1), output.inner_features // operator.num_heads
    return by_head[:, :-width].reshape(-1), by_head[:, -width:].reshape(-1)
