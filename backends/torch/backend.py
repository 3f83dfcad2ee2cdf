"""The backend ``torch``: CPU and CUDA, differentiable (clauses B1, D1 to D3, M3, M4, O1 to O3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from translution.algorithms import Cost, Request, why_not
from translution.arrays import Kind
from translution.backends.torch import attention, line_attention, native, pairwise, stream
from translution.backends.torch.compiled import claims as compiled
from translution.backends.torch.derivatives import no_autocast
from translution.backends.torch.encoding import (
    Encoded,
    accumulator,
    encode_role,
    encode_values,
    join_values,
    project_output,
)
from translution.backends.torch.links import Links, links
from translution.backends.torch.relevance import LinkMask, bias_table, dense_weights, link_mask, link_weights
from translution.geometry import geometry
from translution.inputs import Inputs
from translution.normal_form import NormalForm
from translution.recorded import recorded_vjp
from translution.registry import Claims, Gradients

DEVICES = ("cpu", "cuda")


class TorchBackend:
    """What :class:`translution.Backend` asks for. Under autocast the dtype of x still decides (clause D1)."""

    name: str = "torch"
    kind: Kind = "torch"
    algorithms: tuple[str, ...] = ("conv", "sdpa", "stream", "compiled", "pairwise")
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    # On CUDA index_add_ adds in an order of its own.
    claims: Claims = Claims(gradient_order=2, deterministic=("cpu",))

    def unavailable(self) -> list[str]:
        """Reasons why nothing runs on this machine: none, torch is imported."""
        return []

    def not_supported(self, request: Request, algorithm: str) -> list[str]:
        """Every reason why this request can't run with ``algorithm``."""
        reasons = why_not(request, algorithm) + native.why_not(request, algorithm)
        if algorithm == "compiled":
            return reasons + compiled.why_not(request)
        if request.device not in DEVICES:
            reasons.append(f"torch computes on {' and '.join(DEVICES)} here, not on {request.device}")
        if request.device == "cuda" and not torch.cuda.is_available():
            reasons.append("torch finds no GPU here: run on a machine with a CUDA or ROCm build of torch and its GPU")
        return reasons

    def dry_run(self, request: Request, algorithm: str) -> Cost:
        """What one call costs, counted without computing it."""
        from translution.backends.torch.dry_run import dry_run

        return dry_run(self, request, algorithm)

    def forward(
        self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs
    ) -> tuple[Tensor, Tensor | None]:
        """out [B, Nq, F], and weights [B, H, Nq, Nk] where the request asks for them."""
        with no_autocast(inputs.x):
            if algorithm == "sdpa" and _is_plain(request, inputs):
                return _plain_attention(request, params, inputs), None
            if algorithm == "conv":
                return _convolution(request, params, inputs), None
            found = links(request.operator.layout, inputs.x.device)
            mask = None if inputs.mask is None else link_mask(inputs.mask, found, accumulator(inputs.x.dtype))
            call = _Call(request.normal_form, params, *_tokens(inputs, found, mask), found, mask)
            weights = None
            if algorithm == "sdpa":
                heads = call.attention(inputs.mask)
            elif algorithm == "compiled":
                heads = call.compiled()
            else:
                heads, weights = call.general(stream if algorithm == "stream" else pairwise, request.return_weights)
            out = _projected(request, params, inputs, heads)
            return out, None if weights is None else weights.to(inputs.x.dtype)

    def vjp(
        self,
        request: Request,
        algorithm: str,
        params: Mapping[str, Tensor],
        inputs: Inputs,
        cotangent: Tensor,
    ) -> tuple[Tensor, Gradients]:
        """out, and the gradients of <cotangent, out>; x and y are leaves of their own."""
        return recorded_vjp(
            lambda own, given: self.forward(request, algorithm, own, given)[0], params, inputs, cotangent
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """One call: position-major x [Nq, B, Cq], y [Nk, B, Ck] in the accumulation dtype; results are [Nq, B, H, D]."""

    form: NormalForm
    params: Mapping[str, Tensor]
    x: Tensor
    y: Tensor
    links: Links
    mask: LinkMask | None

    def attention(self, mask: Tensor | None) -> Tensor:
        """Plain attention by torch's kernel."""
        return native.attention(self.form, self.params, *self._roles(), self.links, mask)

    def compiled(self) -> Tensor:
        """One softmax over content by compiled kernels."""
        from translution.backends.torch.compiled.softmax import attend

        return attend(self.form, self.links, self._bias(), *self._roles())

    def _roles(self) -> tuple[Encoded, Encoded, Encoded]:
        """Query, key and the only value."""
        form, geometry = self.form, self.links.geometry
        assert form.query is not None
        assert form.key is not None
        query = encode_role(form.query, self.params, self.x, geometry, "query")
        key = encode_role(form.key, self.params, self.y, geometry, "key")
        (value,) = encode_values(form.value, self.params, self.y, geometry)
        return query, key, value.encoded

    def _bias(self) -> Tensor | None:
        """The bias of the only branch, [T, H]."""
        (branch,) = self.form.branches
        return None if branch.bias is None else bias_table(branch.bias, self.links, self.params, self.x.dtype)

    def general(self, method: ModuleType, return_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Any operator by ``stream`` or ``pairwise``; the weights [B, H, Nq, Nk] too where asked for."""
        form, links, mask, heads = self.form, self.links, self.mask, self.form.value.num_heads
        parts = encode_values(form.value, self.params, self.y, links.geometry)
        content = None
        if form.query is not None and form.key is not None:
            query = encode_role(form.query, self.params, self.x, links.geometry, "query")
            key = encode_role(form.key, self.params, self.y, links.geometry, "key")
            roles = [query, key, *(part.encoded for part in parts)]
            attended = self._attended(roles) if method is stream and not return_weights else None
            if attended is not None:
                return join_values(parts, attended, heads, form.value.head_dim), None
            content = method.inner_products(query, key, links, mask)
        weights = link_weights(form, content, self.params, links, mask, self.x.dtype)
        full = None if weights is None else weights.expand(links.count, self.x.shape[1], heads)
        aggregated = [method.aggregate(full, part.encoded, links, mask) for part in parts]
        found = join_values(parts, aggregated, heads, form.value.head_dim)
        return found, dense_weights(weights, links, self.x, heads) if return_weights else None

    def _attended(self, roles: Sequence[Encoded]) -> list[Tensor] | None:
        """o_i of every value role [Nq, B, H, D], where logits need not be held; None where they must."""
        form, links, mask = self.form, self.links, self.mask
        by_lines = line_attention.attend(form, links, mask, roles)
        if by_lines is not None:
            return [by_lines]
        if not attention.is_one_pass(form, links, mask, roles):
            return None
        return attention.attend(form, links, mask, self._bias(), roles)


def _projected(request: Request, params: Mapping[str, Tensor], inputs: Inputs, heads: Tensor) -> Tensor:
    """out [B, Nq, F] from the heads [Nq, B, H, D]."""
    out = project_output(request.normal_form, params, heads)
    return out.transpose(0, 1).to(inputs.x.dtype).contiguous()


def _is_plain(request: Request, inputs: Inputs) -> bool:
    """Whether every query sees every key alike: the links then say nothing, and are not built.

    Rotations want tokens that are position-major.
    """
    form, found = request.normal_form, geometry(request.operator.layout)
    alike = inputs.mask is None and form.branches[0].bias is None and found.links_every_pair
    return alike and not any(role.rotations for role in form.roles)


def _plain_attention(request: Request, params: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """out [B, Nq, F], batch-major all the way."""
    form, found = request.normal_form, geometry(request.operator.layout)
    assert form.query is not None
    assert form.key is not None
    dtype = accumulator(inputs.x.dtype)
    x, y = inputs.x.to(dtype), inputs.y.to(dtype)
    query = encode_role(form.query, params, x, found, "query")
    key = encode_role(form.key, params, y, found, "key")
    (value,) = encode_values(form.value, params, y, found)
    heads = native.plain_attention(form, query, key, value.encoded)
    return project_output(form, params, heads).to(inputs.x.dtype)


def _convolution(request: Request, params: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """out [B, Nq, F], batch-major all the way. The kernel reads no key that no window touches (clause M4)."""
    y = inputs.y.to(accumulator(inputs.x.dtype))
    return native.convolution(request.normal_form, params, y).to(inputs.x.dtype)


def _position_major(inputs: Inputs) -> tuple[Tensor, Tensor]:
    dtype = accumulator(inputs.x.dtype)
    x = inputs.x.to(dtype).transpose(0, 1).contiguous()
    return x, x if inputs.y is inputs.x else inputs.y.to(dtype).transpose(0, 1).contiguous()


def _tokens(inputs: Inputs, found: Links, mask: LinkMask | None) -> tuple[Tensor, Tensor]:
    """Both sides, with what no head of any query sees zeroed at the source (clause M4), and the zero token appended."""
    x, y = _position_major(inputs)
    if mask is not None or not found.all_seen:
        live = torch.ones((found.count, 1), dtype=torch.bool, device=x.device) if mask is None else mask.rows
        x, y = _zero_unseen(x, live, found.query_index), _zero_unseen(y, live, found.key_index)
    if found.geometry.has_zero_token:
        y = torch.nn.functional.pad(y, (0, 0, 0, 0, 0, 1))
    return x, y


def _zero_unseen(tokens: Tensor, live: Tensor, index: Tensor) -> Tensor:
    count = torch.zeros((len(tokens) + 1, live.shape[1]), device=tokens.device)
    seen = count.index_add_(0, index, live.to(count.dtype))[:-1] > 0
    return torch.where(seen.unsqueeze(-1), tokens, 0.0)


backend = TorchBackend()
