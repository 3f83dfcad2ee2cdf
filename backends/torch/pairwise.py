"""Algorithm ``pairwise``: every role encoded for every link, [L, B, H, D]; plain autograd, differentiable at will.

The products are grouped by class: no matrix is copied per pair. ``stream`` takes its second derivatives from here.
"""

import torch
from torch import Tensor

from translution.backends.torch.encoding import Encoded
from translution.backends.torch.links import Links
from translution.backends.torch.relevance import LinkMask


def _products(
    encoded: Encoded, z: Tensor, matrices: Tensor, features: int, links: Links, mask: LinkMask | None
) -> Tensor:
    """z[token] table[c] for every link, [L, B, S]."""
    rows = z.index_select(0, links.index(encoded.side))
    if mask is not None:
        rows = torch.where(mask.rows.unsqueeze(-1), rows, 0.0)
    own = matrices.unbind(0)
    # Not slices: the gradient of each would be as large as all rows.
    by_step = torch.split(rows, [len(step.query_index) for step in links.steps])
    parts = []
    for step, tokens in zip(links.steps, by_step, strict=True):
        matrix = own[step.key_class if encoded.name == "key" else step.value_class].to(z.dtype)
        if matrix.dim() == 2:
            parts.append(tokens @ matrix)
        else:
            blocks = torch.unflatten(tokens, -1, matrix.shape[:2])
            parts.append(torch.einsum("pbgc,gce->pbge", blocks, matrix).flatten(-2))
    return torch.cat(parts) if parts else rows.new_zeros((0, z.shape[1], features))


def encode_links(encoded: Encoded, links: Links, mask: LinkMask | None) -> Tensor:
    """The role's result for every link, [L, B, heads, head_dim]; 0 where the link is masked (clause M4)."""
    index, total = links.index(encoded.side), None
    if encoded.base is not None:
        total = encoded.base.index_select(0, index)
    for table in encoded.tables:
        features = encoded.heads * table.width
        found = _products(encoded, table.z, table.matrices, features, links, mask)
        found = torch.unflatten(found, -1, (encoded.heads, table.width))
        if table.width < encoded.head_dim:
            found = torch.nn.functional.pad(found, (table.start, encoded.head_dim - table.start - table.width))
        total = found if total is None else total + found
    assert total is not None
    for turn in encoded.turns:
        before, own, after = total.tensor_split((turn.start, turn.start + turn.width), -1)
        cos, sin = (t.index_select(0, index)[:, None, None] for t in (turn.cos, turn.sin))
        total = torch.cat((before, turn.apply(own, cos, sin), after), -1)
    if mask is not None:
        live = mask.rows.unsqueeze(-1) if encoded.heads == 1 else mask.live  # one head may serve several
        total = torch.where(live.unsqueeze(-1), total, 0.0)
    return total


def inner_products(query: Encoded, key: Encoded, links: Links, mask: LinkMask | None) -> Tensor:
    """<q_ij, k_ij>_h for every link, [L, B, H]."""
    return (encode_links(query, links, mask) * encode_links(key, links, mask)).sum(-1)


def aggregate(weights: Tensor | None, value: Encoded, links: Links, mask: LinkMask | None) -> Tensor:
    """sum_j a_ij^h v_ij^h, [Nq, B, H, D], for weights [L, B, H] or None for ones. One value head may serve all H."""
    values = encode_links(value, links, mask)
    if weights is not None:
        values = weights.unsqueeze(-1) * values
        if mask is not None and value.heads < weights.shape[2]:  # NaN that one head sees is absent to another (M4)
            values = torch.where(mask.live.unsqueeze(-1), values, 0.0)
    return values.new_zeros((links.geometry.num_queries, *values.shape[1:])).index_add(0, links.query_index, values)
