"""One token through one encoder, and back: row vectors stand on the left (clauses E1 to E10).

Everything works on a single token [C] and one row of the tables; a result has all heads' features [E], head after head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from translution.spec import (
    Concat,
    Encoder,
    Identity,
    LowRank,
    PerDisplacement,
    Rotary,
    Shared,
    Sum,
    Vectors,
)

Vector = npt.NDArray[Any]
Number = Any  # one float64 or complex128
Parameters = Mapping[str, Vector]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a token stands in a pair: the row of its class, and its own lattice position, if it has one."""

    heads: int
    row: int = -1
    position: tuple[int, ...] | None = None


def encode(encoder: Encoder, name: str, params: Parameters, token: Vector, place: Place) -> Vector:
    """E(y ; c): the features [E] of all heads. ``name`` is the prefix of the encoder's parameters."""
    found: Vector
    match encoder:
        case Identity(bias):
            found = token + params[f"{name}.bias"] if bias else token
        case Shared(_, bias):
            found = _times(token, params[f"{name}.weight"])
            found = found + params[f"{name}.bias"] if bias else found
        case PerDisplacement(_, bias):
            found = _times(token, params[f"{name}.table"][place.row])
            found = found + params[f"{name}.bias"] if bias else found
        case LowRank(_, features):
            found = token @ params[f"{name}.down"] @ params[f"{name}.table"][place.row]
            found = found if features is None else found @ params[f"{name}.up"]
        case Vectors(_, shared_heads):
            found = params[f"{name}.vectors"][place.row]
            found = np.concatenate([found] * place.heads) if shared_heads else found
        case Sum(parts):
            found = np.sum([encode(part, f"{name}.{n}", params, token, place) for n, part in enumerate(parts)], axis=0)
        case Concat(parts):
            each = [encode(part, f"{name}.{n}", params, token, place) for n, part in enumerate(parts)]
            found = np.concatenate([part.reshape(place.heads, -1) for part in each], axis=1).reshape(-1)
        case Rotary(inner):
            found = _rotated(encoder, encode(inner, name, params, token, place), place, 1)
    return found


def encode_backward(
    encoder: Encoder,
    name: str,
    params: Parameters,
    token: Vector,
    place: Place,
    cotangent: Vector,
    gradients: dict[str, Vector],
) -> Vector:
    """Add the gradients of <cotangent, E(y ; c)> to ``gradients`` and return the one for y."""
    nothing = np.zeros_like(token)
    match encoder:
        case Identity(bias):
            if bias:
                gradients[f"{name}.bias"] += cotangent
            return cotangent
        case Shared(_, bias):
            if bias:
                gradients[f"{name}.bias"] += cotangent
            weight = f"{name}.weight"
            return _times_backward(token, params[weight], cotangent, gradients[weight])
        case PerDisplacement(_, bias):
            if bias:
                gradients[f"{name}.bias"] += cotangent
            table = f"{name}.table"
            return _times_backward(token, params[table][place.row], cotangent, gradients[table][place.row])
        case LowRank(_, features):
            down, matrix = params[f"{name}.down"], params[f"{name}.table"][place.row]
            inner = token @ down
            if features is not None:
                gradients[f"{name}.up"] += np.outer(inner @ matrix, cotangent)
                cotangent = params[f"{name}.up"] @ cotangent
            gradients[f"{name}.table"][place.row] += np.outer(inner, cotangent)
            cotangent = matrix @ cotangent
            gradients[f"{name}.down"] += np.outer(token, cotangent)
            return down @ cotangent
        case Vectors(_, shared_heads):
            summed = cotangent.reshape(place.heads, -1).sum(axis=0) if shared_heads else cotangent
            gradients[f"{name}.vectors"][place.row] += summed
            return nothing
        case Sum(parts):
            for n, part in enumerate(parts):
                nothing = nothing + encode_backward(part, f"{name}.{n}", params, token, place, cotangent, gradients)
            return nothing
        case Concat(parts):
            by_head, start = cotangent.reshape(place.heads, -1), 0
            for n, part in enumerate(parts):
                width = len(encode(part, f"{name}.{n}", params, token, place)) // place.heads
                own = by_head[:, start : start + width].reshape(-1)
                nothing = nothing + encode_backward(part, f"{name}.{n}", params, token, place, own, gradients)
                start += width
            return nothing
        case Rotary(inner):
            turned = _rotated(encoder, cotangent, place, -1)
            return encode_backward(inner, name, params, token, place, turned, gradients)


def _times(token: Vector, matrix: Vector) -> Vector:
    """y W, or group by group with W [groups, C / groups, E / groups]."""
    if matrix.ndim == 2:
        return token @ matrix
    return np.concatenate([part @ block for part, block in zip(token.reshape(len(matrix), -1), matrix, strict=True)])


def _times_backward(token: Vector, matrix: Vector, cotangent: Vector, gradient: Vector) -> Vector:
    if matrix.ndim == 2:
        gradient += np.outer(token, cotangent)
        return matrix @ cotangent
    tokens, cotangents = token.reshape(len(matrix), -1), cotangent.reshape(len(matrix), -1)
    for group in range(len(matrix)):
        gradient[group] += np.outer(tokens[group], cotangents[group])
    return np.concatenate([block @ part for block, part in zip(matrix, cotangents, strict=True)])


def _rotated(rotary: Rotary, features: Vector, place: Place, direction: int) -> Vector:
    """Every head turned by the angles of the token's position, or back with ``direction`` -1 (clause E10)."""
    if place.position is None:
        return features
    turned = features.reshape(place.heads, -1).copy()
    width, rank = turned.shape[1], len(place.position)
    for axis, index in enumerate(place.position):
        for k in range(width // (2 * rank)):
            angle = direction * index * rotary.base ** (-2.0 * k * rank / width)
            cos, sin = math.cos(angle), math.sin(angle)
            u = axis * (width // (2 * rank)) + k
            one, other = (u, u + width // 2) if rotary.pairing == "half" else (2 * u, 2 * u + 1)
            for head in turned:
                a, b = head[one], head[other]
                head[one], head[other] = a * cos - b * sin, a * sin + b * cos
    return turned.reshape(-1)
