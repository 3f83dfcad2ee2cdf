"""The authors' way to compute Translution, written anew from the paper's description: the yardstick for ``stream``.

Every table is gathered to one matrix per pair of tokens, [N, N, C, C'], and multiplied with the tokens by broadcasting,
so each role holds N N C C' numbers (arXiv 2510.10060, section 3). Masks and windows are outside what it does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from translution.geometry import geometry
from translution.spec import Operator, Softmax


class Gather:
    """softmax attention with a matrix per displacement for queries, keys and values, every pair linked once.

    ``call(params, x)`` takes the parameters of ``presets.translution(..., roles="qkv")`` and x [B, N, C].
    """

    def __init__(self, operator: Operator) -> None:
        found = geometry(operator.layout)
        tokens = operator.layout.num_queries
        assert isinstance(operator.relevance, Softmax)
        assert found.num_links == tokens * tokens
        self.operator = operator
        self.scale = operator.scale_of(operator.relevance)
        self.value_class = torch.empty((tokens, tokens), dtype=torch.int64)
        self.key_class = torch.empty((tokens, tokens), dtype=torch.int64)
        query, key = torch.from_numpy(found.query_index), torch.from_numpy(found.key_index)
        self.value_class[query, key] = torch.from_numpy(found.value_class)
        self.key_class[query, key] = torch.from_numpy(found.key_class)

    def __call__(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Out [B, N, F]."""
        heads = (self.operator.num_heads, -1)
        mine, theirs = x[:, :, None, None, :], x[:, None, :, None, :]
        q = (mine @ params["query.table"][self.value_class]).squeeze(-2).unflatten(-1, heads)
        k = (theirs @ params["key.table"][self.key_class]).squeeze(-2).unflatten(-1, heads)
        v = (theirs @ params["value.table"][self.value_class]).squeeze(-2).unflatten(-1, heads)
        weights = (self.scale * (q * k).sum(-1)).softmax(2)
        out = (weights.unsqueeze(-1) * v).sum(2).flatten(-2)
        return out @ params["output.weight"] + params["output.bias"]
