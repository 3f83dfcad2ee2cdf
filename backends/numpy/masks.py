"""A mask as one flag and one number per link (clauses M1 to M5)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from translution.backends.numpy.blocks import Array, key_groups, query_groups
from translution.geometry import Geometry


@dataclass(frozen=True, eq=False)
class LinkMask:
    """``live`` bool [L, B|1, H|1], or None where every link is; ``added`` to the logits, of the same shape, or None."""

    live: Array | None
    added: Array | None


def link_mask(geometry: Geometry, mask: Array | None, dtype: np.dtype[np.floating[Any]]) -> LinkMask:
    """The mask [B|1, H|1, Nq|1, Nk|1] at every link; a padded position, the zero token, is never masked."""
    if mask is None:
        return LinkMask(None, None)
    by_pair = mask.transpose(2, 3, 0, 1)
    last_key = by_pair.shape[1] - 1
    query = geometry.query_index if by_pair.shape[0] > 1 else np.zeros_like(geometry.query_index)
    found = by_pair[query, np.minimum(geometry.key_index, last_key)]
    padded = geometry.key_index == geometry.num_keys
    if mask.dtype == np.bool_:
        found[padded] = True
        return LinkMask(None if found.all() else found, None)
    found[padded] = 0
    live = found != -np.inf
    # A float64 number below the range of float32 is still a finite number, not an absent key.
    added = np.maximum(found, np.finfo(dtype).min).astype(dtype)
    return LinkMask(None if live.all() else live, added)


def seen_tokens(geometry: Geometry, live: Array | None, side: str) -> Array:
    """Whether any link that is live in any head leads to a token: bool [tokens, B|1], the zero token included."""
    groups, tokens = (
        (query_groups(geometry), geometry.num_queries)
        if side == "query"
        else (key_groups(geometry), geometry.num_keys + geometry.has_zero_token)
    )
    some_head = np.ones((geometry.num_links, 1), np.int64) if live is None else np.asarray(live.any(axis=2), np.int64)
    count = np.zeros((tokens, some_head.shape[1]), np.int64)
    groups.add_to(count, some_head)
    return count > 0


def kept(live: Array | None, values: Array) -> Array:
    """values [P, B, H, ..] of live links, 0 for the others: multiplying by a weight of 0 would keep NaN (clause M4)."""
    if live is None:
        return values
    return np.where(live.reshape(live.shape + (1,) * (values.ndim - live.ndim)), values, 0)
