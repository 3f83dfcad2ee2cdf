"""The operator link by link in torch: correct and plain, each step a method in which one mistake can be planted.

Arrays of links are [B, H, L] and [B, H, L, D]; links go query after query. Gradients are those of torch's autograd.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from translution.algorithms import Request
from translution.arrays import Kind
from translution.conformance.mutants.call import Call
from translution.conformance.mutants.walk import Links, Walk, links_of
from translution.inputs import Inputs
from translution.registry import Claims, Gradients
from translution.spec import (
    Bias,
    BiasTable,
    Concat,
    Encoder,
    Identity,
    Layout,
    LowRank,
    LowRankOutput,
    Mean,
    Mixture,
    Ones,
    Operator,
    PerDisplacement,
    QuadraticBias,
    Rotary,
    Shared,
    SlopeBias,
    Softmax,
    Sum,
    Vectors,
)


class Naive:
    """The backend: accumulates in float32 at least, in the plain order of operations."""

    name: str = "naive"
    kind: Kind = "torch"
    algorithms: tuple[str, ...] = ("pairwise",)
    dtypes: tuple[str, ...] = ("float64", "float32", "float16", "bfloat16")
    claims: Claims = Claims(gradient_order=2)
    walk: type[Walk] = Walk

    # What a backend provides

    def unavailable(self) -> list[str]:
        """None: torch is imported."""
        return []

    def not_supported(self, request: Request, algorithm: str) -> list[str]:
        """Every reason against a request."""
        return [] if request.device == "cpu" else [f"{self.name} computes on cpu, not on {request.device}"]

    def forward(
        self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs
    ) -> tuple[Tensor, Tensor | None]:
        """out [B, Nq, F], and weights [B, H, Nq, Nk] where asked for."""
        out, weights = self.compute(request.operator, params, inputs.x, inputs.y, inputs.mask)
        dtype = inputs.x.dtype
        return self.stored(out, dtype), self.stored(weights, dtype) if request.return_weights else None

    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs, cotangent: Tensor
    ) -> tuple[Tensor, Gradients]:
        """out, and the gradients of <cotangent, out>."""
        x, y = inputs.x.detach().requires_grad_(), inputs.y.detach().requires_grad_()
        own = {name: value.detach().requires_grad_() for name, value in params.items()}
        leaves = [x, y, *own.values()]
        with torch.enable_grad():
            out, _ = self.forward(request, algorithm, own, Inputs(x, y, inputs.mask, inputs.batch_shape))
            given = self.pulled_back(out, leaves, cotangent) if out.requires_grad else [None] * len(leaves)
        found = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, given, strict=True)]
        return out.detach(), Gradients(dict(zip(own, found[2:], strict=True)), found[0], found[1])

    def pulled_back(self, out: Tensor, leaves: list[Tensor], cotangent: Tensor) -> list[Tensor | None]:
        """The gradients of the leaves; None where nothing of one reaches the result."""
        return list(torch.autograd.grad(out, leaves, cotangent, allow_unused=True))

    # The operator

    def accumulator(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that everything is computed in (D2, D3)."""
        return dtype if dtype == torch.float64 else torch.float32

    def stored(self, result: Tensor, dtype: torch.dtype) -> Tensor:
        """The result in the dtype of x (D1)."""
        return result.to(dtype)

    def links(self, layout: Layout) -> Links:
        """The links of a layout."""
        return links_of(layout, self.walk)  # type: ignore[arg-type] # mypy doubts that classes can be hashed

    def compute(
        self, operator: Operator, params: Mapping[str, Tensor], x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """out [B, Nq, F] and weights [B, H, Nq, Nk] in the accumulation dtype."""
        links, dtype = self.links(operator.layout), self.accumulator(x.dtype)
        live, added = self.masked(links, mask, (len(x), operator.num_heads), dtype)
        call = Call(operator, {name: value.to(dtype) for name, value in params.items()}, links, live, added, x.dtype)
        queries = self.seen(call, x.to(dtype)[:, links.query])
        keys = self.seen(call, self.padded(y.to(dtype))[:, links.key])
        values, content = self.value(call, keys), self.content(call, queries, keys)
        weights = self.weights(call, content)
        return self.output(call, self.aggregate(call, weights, values)), self.dense(call, weights)

    def padded(self, y: Tensor) -> Tensor:
        """The keys with the zero token after them (L5)."""
        return torch.nn.functional.pad(y, (0, 0, 0, 1))

    # Masks

    def masked(
        self, links: Links, mask: Tensor | None, size: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Which links are live, and what is added to their logits, both [B, H, L] (M1, M2)."""
        added = torch.zeros((*size, links.num_queries, links.num_keys), dtype=dtype)
        if mask is not None:
            added = self.mask_added(mask, dtype).expand(added.shape)
        of_links = self.mask_of_links(links, added)
        live = of_links != -torch.inf
        return live, torch.where(live, of_links, 0.0)

    def mask_added(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask as numbers that are added to logits."""
        if mask.dtype != torch.bool:
            return mask.to(dtype)
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)

    def mask_of_links(self, links: Links, added: Tensor) -> Tensor:
        """From pairs [B, H, Nq, Nk] to links [B, H, L]; the zero token is never masked (M6)."""
        return torch.nn.functional.pad(added, (0, 1))[:, :, links.query, links.key]

    def seen(self, call: Call, tokens: Tensor) -> Tensor:
        """The tokens [B, L, C] of links that some head may use; the others are absent, whatever they hold (M4)."""
        return torch.where(call.live.any(1).unsqueeze(-1), tokens, 0.0)

    def kept(self, call: Call, features: Tensor) -> Tensor:
        """Features [B, H, L, D] of live links, 0 elsewhere (M4)."""
        return torch.where(call.live.unsqueeze(-1), features, 0.0)

    # Encoders

    def query(self, call: Call, tokens: Tensor) -> Tensor:
        """q_ij [B, H, L, D]."""
        assert call.operator.query is not None
        return self.by_heads(call, self.encode(call, call.operator.query, "query", "query", tokens))

    def key(self, call: Call, tokens: Tensor) -> Tensor:
        """k_ij [B, H, L, D]."""
        assert call.operator.key is not None
        return self.by_heads(call, self.encode(call, call.operator.key, "key", "key", tokens))

    def value(self, call: Call, tokens: Tensor) -> Tensor:
        """v_ij [B, H, L, D]."""
        return self.by_heads(call, self.encode(call, call.operator.value, "value", "value", tokens))

    def by_heads(self, call: Call, features: Tensor) -> Tensor:
        """[B, L, E] to [B, H, L, E / H]: contiguous slices (E2)."""
        return self.kept(call, torch.unflatten(features, -1, (call.heads, -1)).transpose(1, 2))

    def encode(self, call: Call, encoder: Encoder, role: str, name: str, tokens: Tensor) -> Tensor:
        """Features [B, L, E] of tokens [B, L, C]; ``name`` is the prefix of the encoder's parameters (E1)."""
        match encoder:
            case Identity(bias):
                return self.plus_bias(call, name, tokens) if bias else tokens
            case Shared(_, bias):
                found = self.product(tokens, call.params[f"{name}.weight"])
                return self.plus_bias(call, name, found) if bias else found
            case PerDisplacement(_, bias):
                found = self.products(tokens, call.params[f"{name}.table"], call.row(role))
                return self.plus_bias(call, name, found) if bias else found
            case LowRank():
                return self.low_rank(call, encoder, role, name, tokens)
            case Vectors():
                return self.vectors(call, encoder, role, name).expand(len(tokens), -1, -1)
            case Sum(parts):
                every = [self.encode(call, part, role, f"{name}.{n}", tokens) for n, part in enumerate(parts)]
                return self.added_up(every)
            case Concat(parts):
                every = [self.encode(call, part, role, f"{name}.{n}", tokens) for n, part in enumerate(parts)]
                return self.concatenated(call, every)
            case Rotary(inner):
                return self.rotated(call, encoder, role, self.encode(call, inner, role, name, tokens))

    def added_up(self, parts: list[Tensor]) -> Tensor:
        """The sum of all parts (E8)."""
        return sum(parts[1:], parts[0])

    def plus_bias(self, call: Call, name: str, features: Tensor) -> Tensor:
        """y + b."""
        return features + call.params[f"{name}.bias"]

    def product(self, tokens: Tensor, matrix: Tensor) -> Tensor:
        """y W, group by group where there are groups (E4)."""
        if matrix.dim() == 2:
            return tokens @ matrix
        groups = torch.unflatten(tokens, -1, (len(matrix), -1))
        return torch.einsum("blgc,gce->blge", groups, matrix).flatten(-2)

    def products(self, tokens: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        """y W[c] for each link's own row (E5); every matrix is taken once, and none is copied for a link."""
        if not len(rows):
            return tokens.new_zeros((len(tokens), 0, table.shape[1:-2].numel() * table.shape[-1]))
        order = rows.argsort(stable=True)
        counts = rows.bincount(minlength=len(table)).tolist()
        parts = torch.split(tokens[:, order], counts, 1)
        found = [self.of_class(part, own) for part, own in zip(parts, table, strict=True) if part.shape[1]]
        return torch.cat(found, 1)[:, order.argsort()]

    def of_class(self, tokens: Tensor, matrix: Tensor) -> Tensor:
        """y W[c] for all links of one class."""
        return self.product(tokens, matrix)

    def low_rank(self, call: Call, encoder: LowRank, role: str, name: str, tokens: Tensor) -> Tensor:
        """y D M[c] U (E6)."""
        down = self.product(tokens, call.params[f"{name}.down"])
        found = self.products(down, call.params[f"{name}.table"], call.row(role))
        return found if encoder.features is None else self.product(found, call.params[f"{name}.up"])

    def vectors(self, call: Call, encoder: Vectors, role: str, name: str) -> Tensor:
        """r[c] of every link [L, E] (E7)."""
        found = call.params[f"{name}.vectors"][call.row(role)]
        return found.repeat(1, call.heads) if encoder.shared_heads else found

    def concatenated(self, call: Call, parts: list[Tensor]) -> Tensor:
        """The features of all parts, head by head (E9)."""
        return torch.cat([torch.unflatten(part, -1, (call.heads, -1)) for part in parts], -1).flatten(-2)

    def rotated(self, call: Call, encoder: Rotary, role: str, features: Tensor) -> Tensor:
        """Each head turned by the token's own position (E10)."""
        heads = torch.unflatten(features, -1, (call.heads, -1))
        angles = self.angles(call, encoder, role, heads.shape[-1]).unsqueeze(1)
        cos, sin = angles.cos().to(features.dtype), angles.sin().to(features.dtype)
        if encoder.pairing == "half":
            s, t = heads.chunk(2, -1)
            return torch.cat([s * cos - t * sin, s * sin + t * cos], -1).flatten(-2)
        s, t = heads[..., 0::2], heads[..., 1::2]
        return torch.stack([s * cos - t * sin, s * sin + t * cos], -1).flatten(-3)

    def angles(self, call: Call, encoder: Rotary, role: str, width: int) -> Tensor:
        """p_n base ** (-2 k A / D) for every link, axis after axis, float64 [L, D / 2]."""
        position = call.links.query_position if role == "query" else call.links.key_position
        axes = position.shape[1]
        step = torch.arange(width // (2 * axes), dtype=torch.float64)
        return (position.unsqueeze(-1) * encoder.base ** (-2 * step * axes / width)).flatten(1)

    # Relevance

    def content(self, call: Call, queries: Tensor, keys: Tensor) -> Tensor | None:
        """<q_ij, k_ij>_h [B, H, L], or None where nothing looks at content (R7)."""
        if call.operator.query is None:
            return None
        return self.inner(call, self.query(call, queries), self.key(call, keys))

    def inner(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        """<q_ij, k_ij>_h."""
        return (query * key).sum(-1)

    def weights(self, call: Call, content: Tensor | None) -> Tensor:
        """a_ij^h [B, H, L]."""
        relevance = call.operator.relevance
        if isinstance(relevance, Mixture):
            first = self.branch(call, "first.", relevance.first, content)
            return self.mixture(call, first, self.branch(call, "second.", relevance.second, content))
        return self.branch(call, "", relevance, content)

    def mixture(self, call: Call, first: Tensor, second: Tensor) -> Tensor:
        """(1 - g) first + g second (R4)."""
        gate = call.params["relevance.gate"].sigmoid().unsqueeze(-1)
        return (1 - gate) * first + gate * second

    def branch(self, call: Call, prefix: str, relevance: Softmax | Ones | Mean, content: Tensor | None) -> Tensor:
        """Weights of one plain relevance."""
        if isinstance(relevance, Ones):
            return self.ones(call)
        if isinstance(relevance, Mean):
            return self.mean(call)
        return self.softmax(call, self.logits(call, prefix, relevance, content))

    def ones(self, call: Call) -> Tensor:
        """1 on the live links (R2)."""
        return call.live.to(call.added.dtype)

    def mean(self, call: Call) -> Tensor:
        """1 / number of live links (R3)."""
        ones = call.live.to(call.added.dtype)
        return ones / self.per_query(call, ones).clamp(min=1)[..., call.links.query]

    def logits(self, call: Call, prefix: str, relevance: Softmax, content: Tensor | None) -> Tensor:
        """scale <q_ij, k_ij>_h + bias^h[c(i,j)] + mask_ij."""
        found = call.added
        if relevance.content:
            assert content is not None
            found = self.scale(call, relevance) * content + found
        if relevance.bias is not None:
            found = found + self.bias(call, prefix, relevance.bias)
        return found

    def scale(self, call: Call, relevance: Softmax) -> float:
        """The factor of the inner product (R6)."""
        return call.operator.scale_of(relevance)

    def bias(self, call: Call, prefix: str, bias: Bias) -> Tensor:
        """bias^h[c(i,j)] [H, L] (R5)."""
        match bias:
            case BiasTable():
                return call.params[f"relevance.{prefix}bias"][:, call.links.bias_row]
            case SlopeBias():
                distance = call.links.delta.abs().sum(1).to(call.added.dtype)
                return self.slopes(call, bias).unsqueeze(-1) * -distance
            case QuadraticBias():
                return call.params[f"relevance.{prefix}weight"] @ self.features(call).to(call.added.dtype)

    def slopes(self, call: Call, bias: SlopeBias) -> Tensor:
        """slope_h [H]."""
        return torch.tensor(bias.slopes_for(call.heads), dtype=call.added.dtype)

    def features(self, call: Call) -> Tensor:
        """(-delta, |delta|^2) [axes + 1, L]."""
        delta = call.links.delta
        return torch.cat([-delta, delta.square().sum(1, keepdim=True)], 1).T

    def softmax(self, call: Call, logits: Tensor) -> Tensor:
        """exp(l_ij) / sum over the live links of i (R1); 0 where there are none (M3)."""
        grown = self.exponentials(call, logits - self.largest(call, logits)[..., call.links.query])
        total = self.per_query(call, grown)
        # In a row with NaN a masked pair still has weight 0.
        return torch.where(call.live, grown / torch.where(total == 0, 1.0, total)[..., call.links.query], 0.0)

    def largest(self, call: Call, logits: Tensor) -> Tensor:
        """Largest live logit of each query [B, H, Nq]; 0 where there are none."""
        live = logits.detach().masked_fill(~call.live, -torch.inf)
        start = live.new_full((*live.shape[:2], call.links.num_queries), -torch.inf)
        found = start.scatter_reduce(2, call.links.query.expand(live.shape), live, "amax")
        return torch.where(found == -torch.inf, 0.0, found)

    def exponentials(self, call: Call, shifted: Tensor) -> Tensor:
        """exp on live links, 0 elsewhere."""
        return torch.where(call.live, torch.where(call.live, shifted, 0.0).exp(), 0.0)

    def per_query(self, call: Call, of_links: Tensor) -> Tensor:
        """Sums over the links of each query: [B, H, L, ..] to [B, H, Nq, ..]."""
        shape = (*of_links.shape[:2], call.links.num_queries, *of_links.shape[3:])
        return of_links.new_zeros(shape).index_add(2, call.links.query, of_links)

    # Results

    def aggregate(self, call: Call, weights: Tensor, values: Tensor) -> Tensor:
        """o_i^h = sum_j a_ij^h v_ij^h, [B, H, Nq, D]."""
        return self.per_query(call, weights.unsqueeze(-1) * values)

    def output(self, call: Call, heads: Tensor) -> Tensor:
        """O(output_scale * concat_h o_i^h) [B, Nq, F] (O1 to O3)."""
        scaled = self.output_scale(call) * heads.transpose(1, 2)
        return self.project(call, scaled)

    def output_scale(self, call: Call) -> float:
        """Factor of the heads (O3)."""
        return call.operator.output_scale

    def project(self, call: Call, heads: Tensor) -> Tensor:
        """The output encoder of [B, Nq, H, D] (O2)."""
        output = call.operator.output
        if isinstance(output, LowRankOutput):
            found = self.product(self.uplifted(call, output, heads), call.params["output.weight"])
            return self.plus_bias(call, "output", found) if output.bias else found
        joined = heads.flatten(2)
        return joined if output is None else self.encode(call, output, "output", "output", joined)

    def uplifted(self, call: Call, output: LowRankOutput, heads: Tensor) -> Tensor:
        """o + z U, where z holds the last features of every head (O4)."""
        width = output.inner_features // call.heads
        full, low = heads[..., :-width].flatten(2), heads[..., -width:].flatten(2)
        return full + self.product(low, call.params["output.up"])

    def dense(self, call: Call, weights: Tensor) -> Tensor:
        """Weights [B, H, Nq, Nk]: a pair's links add up, the zero token's are left out (B5)."""
        links = call.links
        pairs = weights.new_zeros((*weights.shape[:2], links.num_queries * (links.num_keys + 1)))
        pairs = pairs.index_add(2, links.query * (links.num_keys + 1) + links.key, weights)
        return torch.unflatten(pairs, 2, (links.num_queries, -1))[..., :-1]
