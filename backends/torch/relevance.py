"""From inner products to weights, link by link (clauses R1 to R7, M1 to M5): plain autograd on [L, B, H]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from translution.backends.torch.encoding import Parameters
from translution.backends.torch.links import Links
from translution.normal_form import BiasForm, Branch, NormalForm


@dataclass(frozen=True, slots=True)
class LinkMask:
    """A mask seen from the links: ``live`` [L, B|1, H|1] bool; ``added`` to the logits, of the same shape, or None.

    ``rows`` [L, B|1] tells whether any head sees the link.
    """

    live: Tensor
    rows: Tensor
    added: Tensor | None

    def part(self, part: slice) -> "LinkMask":
        """What some of the batch items see."""
        added = None if self.added is None else items(self.added, part)
        return LinkMask(items(self.live, part), items(self.rows, part), added)


def items(value: Tensor, part: slice) -> Tensor:
    """``value`` [L, B|1, ..] for some of the batch items."""
    return value if value.shape[1] == 1 else value[:, part]


def link_mask(mask: Tensor, links: Links, dtype: torch.dtype) -> LinkMask:
    """The mask [B|1, H|1, Nq|1, Nk|1] link by link; the zero token is never masked."""
    by_pair = mask.permute(2, 3, 0, 1)
    zero_token = links.key_index == links.geometry.num_keys
    query = links.query_index if by_pair.shape[0] > 1 else torch.zeros_like(links.query_index)
    key = links.key_index.where(~zero_token, 0) if by_pair.shape[1] > 1 else torch.zeros_like(links.key_index)
    own = by_pair[query, key]
    zero_token = zero_token[:, None, None]
    live, added = own, None
    if mask.dtype != torch.bool:
        live = own != -torch.inf
        finite = own.to(dtype).clamp(min=torch.finfo(dtype).min)  # a finite float64 may round to -inf
        added = finite.masked_fill(~live | zero_token, 0.0)
    live = live | zero_token
    return LinkMask(live, live.any(-1), added)


def bias_table(bias: BiasForm, links: Links, params: Parameters, dtype: torch.dtype) -> Tensor:
    """The bias of every class and head, [T, H] (clause R5)."""
    geometry, device = links.geometry, links.device
    if bias.kind == "slopes":
        slopes = torch.tensor(bias.slopes, dtype=torch.float64, device=device)
        distances = torch.from_numpy(geometry.distances).to(device)
        return (-distances[:, None] * slopes).to(dtype)
    assert bias.parameter is not None
    own = params[bias.parameter].to(dtype)
    if bias.kind == "table":
        return own.t()
    return torch.from_numpy(geometry.quadratic_features).to(device, dtype) @ own.t()


def _branch_logits(
    branch: Branch, content: Tensor | None, params: Parameters, links: Links, dtype: torch.dtype
) -> Tensor:
    """[L, B|1, H|1] without the mask."""
    logits = None if content is None or not branch.content else branch.scale * content
    if branch.bias is not None:
        bias = bias_table(branch.bias, links, params, dtype).index_select(0, links.value_class).unsqueeze(1)
        logits = bias if logits is None else logits + bias
    return torch.zeros((links.count, 1, 1), dtype=dtype, device=links.device) if logits is None else logits


def softmax(logits: Tensor, links: Links, mask: LinkMask | None) -> Tensor:
    """Softmax over the links of each query; a query without a live one gets zeros (clause M3)."""
    if mask is not None:
        logits = logits if mask.added is None else logits + mask.added
        logits = torch.where(mask.live, logits, -torch.inf)
    padded = torch.cat((logits, logits.new_full((1, *logits.shape[1:]), -torch.inf)))
    parts = []
    for bucket in links.buckets:
        dense = torch.unflatten(padded.index_select(0, bucket.slots), 0, (-1, bucket.width))
        if mask is not None:
            dead = dense.detach().amax(1, keepdim=True) == -torch.inf
            dense = torch.where(dead, 0.0, dense)
        parts.append(dense.softmax(1).flatten(0, 1))
    weights = torch.cat(parts).index_select(0, links.slot_of_link) if parts else logits
    return weights if mask is None else torch.where(mask.live, weights, 0.0)


def _mean(links: Links, mask: LinkMask | None, dtype: torch.dtype) -> Tensor:
    if mask is None:
        return (1.0 / links.degree.to(dtype)).index_select(0, links.query_index)[:, None, None]
    live = mask.live.to(dtype)
    count = live.new_zeros((links.geometry.num_queries, *live.shape[1:])).index_add_(0, links.query_index, live)
    return live / count.clamp(min=1.0).index_select(0, links.query_index)


def _branch_weights(
    branch: Branch, content: Tensor | None, params: Parameters, links: Links, mask: LinkMask | None, dtype: torch.dtype
) -> Tensor:
    if branch.kind == "softmax":
        return softmax(_branch_logits(branch, content, params, links, dtype), links, mask)
    if branch.kind == "mean":
        return _mean(links, mask, dtype)
    ones = torch.ones((links.count, 1, 1), dtype=dtype, device=links.device)
    return ones if mask is None else mask.live.to(dtype)


def link_weights(
    form: NormalForm,
    content: Tensor | None,
    params: Parameters,
    links: Links,
    mask: LinkMask | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """Weights [L, B|1, H|1] from inner products ``content`` [L, B, H]; None where every weight is 1."""
    if mask is None and [branch.kind for branch in form.branches] == ["ones"]:
        return None
    found = [_branch_weights(branch, content, params, links, mask, dtype) for branch in form.branches]
    if form.gate is None:
        return found[0]
    gate = params[form.gate].to(dtype).sigmoid()
    return (1.0 - gate) * found[0] + gate * found[1]


def dense_weights(weights: Tensor | None, links: Links, like: Tensor, heads: int) -> Tensor:
    """Weights of links as [B, H, Nq, Nk]: a pair's links add up, links to the zero token are left out."""
    geometry = links.geometry
    keys = geometry.num_keys + 1
    given = like.new_ones((1, 1, 1)) if weights is None else weights
    weights = given.expand(links.count, like.shape[1], heads)
    flat = weights.new_zeros((geometry.num_queries * keys, *weights.shape[1:]))
    flat = flat.index_add(0, links.query_index * keys + links.key_index, weights)
    return torch.unflatten(flat, 0, (-1, keys))[:, :-1].permute(2, 3, 0, 1)
