"""The authors' algorithms, written anew from the paper's description: the yardsticks for ``stream``.

Every table is gathered to one matrix per pair of tokens, [N, N, C, C'], and multiplied with the tokens by broadcasting,
so each role holds N N C C' numbers (arXiv 2510.10060, sections 3 and 4). Windows and masks are outside what they do.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from translution.geometry import geometry
from translution.spec import Operator, Softmax


def _pair_classes(operator: Operator) -> tuple[Tensor, Tensor]:
    """Rows c(i, j) of query and value tables and c(j, i) of key tables, int64 [N, N]."""
    found, tokens = geometry(operator.layout), operator.layout.num_queries
    if found.num_links != tokens * tokens:
        raise ValueError(f"{found.num_links:,} links of {tokens} tokens: the authors' algorithm links every pair once")
    own, mirrored = torch.empty((2, tokens, tokens), dtype=torch.int64)
    query, key = torch.from_numpy(found.query_index), torch.from_numpy(found.key_index)
    own[query, key] = torch.from_numpy(found.value_class)
    mirrored[query, key] = torch.from_numpy(found.key_class)
    return own, mirrored


class Gather:
    """Full Translution: a matrix per displacement for queries, keys and values (equation 3).

    ``call(params, x)`` takes the parameters of ``presets.translution(..., roles="qkv")`` and x [B, N, C].
    """

    def __init__(self, operator: Operator) -> None:
        assert isinstance(operator.relevance, Softmax)
        self.heads, self.scale = operator.num_heads, operator.scale_of(operator.relevance)
        self.own, self.mirrored = _pair_classes(operator)

    def __call__(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Out [B, N, F]."""
        heads = (self.heads, -1)
        mine, theirs = x[:, :, None, None, :], x[:, None, :, None, :]
        q = (mine @ params["query.table"][self.own]).squeeze(-2).unflatten(-1, heads)
        k = (theirs @ params["key.table"][self.mirrored]).squeeze(-2).unflatten(-1, heads)
        v = (theirs @ params["value.table"][self.own]).squeeze(-2).unflatten(-1, heads)
        weights = (self.scale * (q * k).sum(-1)).softmax(2)
        out = (weights.unsqueeze(-1) * v).sum(2).flatten(-2)
        return out @ params["output.weight"] + params["output.bias"]


class AlphaGather:
    """Alpha-Translution: attention averaged with a low-rank branch whose small tables are gathered for every pair.

    The values of a pair are summed at the inner width C1 and go up to C' once for each query, which is the paper's
    memory-efficient order. ``call(params, x)`` takes the parameters of ``presets.alpha_translution(..., roles="qkv")``.
    """

    def __init__(self, operator: Operator) -> None:
        assert isinstance(operator.relevance, Softmax)
        self.heads, self.half_scale = operator.num_heads, operator.scale_of(operator.relevance)
        self.own, self.mirrored = _pair_classes(operator)

    def __call__(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Out [B, N, F]."""
        heads = (self.heads, -1)
        q, k, v = ((x @ params[f"{role}.0.weight"]).unflatten(-1, heads) for role in ("query", "key", "value"))
        down_q, down_k, down_v = (x @ params[f"{role}.1.down"] for role in ("query", "key", "value"))
        q2 = (down_q[:, :, None, None, :] @ params["query.1.table"][self.own]).squeeze(-2).unflatten(-1, heads)
        k2 = (down_k[:, None, :, None, :] @ params["key.1.table"][self.mirrored]).squeeze(-2).unflatten(-1, heads)
        v2 = (down_v[:, None, :, None, :] @ params["value.1.table"][self.own]).squeeze(-2).unflatten(-1, heads)
        logits = torch.einsum("bihd,bjhd->bijh", q, k) + (q2 * k2).sum(-1)
        weights = (self.half_scale * logits).softmax(2)
        shared = torch.einsum("bijh,bjhd->bihd", weights, v).flatten(-2)
        relative = (weights.unsqueeze(-1) * v2).sum(2).flatten(-2)
        return 0.5 * (shared + relative @ params["output.up"]) @ params["output.weight"] + params["output.bias"]
