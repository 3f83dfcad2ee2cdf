"""An operator as one kernel launch per branch, with what happens once per token around it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from translution.backends.triton.operands import Box
from translution.backends.triton.operation import check_transforms, fused_forward
from translution.backends.triton.partial import Dense, Partial, mask_part
from translution.backends.triton.roles import Encoded, Params, static_terms
from translution.backends.triton.sight import without_unseen
from translution.backends.triton.targets import Axes
from translution.geometry import geometry
from translution.inputs import Inputs
from translution.normal_form import BiasForm, Branch, NormalForm
from translution.spec import Lattice


def box_of(layout: Lattice) -> Box:
    """The lattice on three axes, the missing ones of extent 1 in front."""
    lead = 3 - layout.rank
    axes = [layout.axis_displacements(axis) for axis in range(layout.rank)]
    steps = [d[1] - d[0] if len(d) > 1 else 1 for d in axes]
    # A tap's key stands at a * stride + offset - displacement.
    shifts = [offset - d[0] for offset, d in zip(layout.offsets, axes, strict=True)]

    def three(values: Sequence[int], filler: int) -> Axes:
        a, b, c = (*((filler,) * lead), *values)
        return a, b, c

    following, base = 1, 0  # displacements before 0 in lexicographic order, which a raster-causal layout leaves out
    if layout.raster_causal:
        for d in reversed(axes):
            base = sum(v < 0 for v in d) * following + (base if 0 in d else 0)
            following *= len(d)
    taps = three([len(d) for d in axes], 1)
    extents = three(layout.grid, 1), three(layout.keys, 1)
    return Box(*extents, taps, three(shifts, 0), three(steps, 1), three(layout.strides, 1), base)


def bias_table(form: BiasForm, layout: Lattice, params: Params, like: Tensor) -> Tensor:
    """[H, T] float32 (clause R5)."""
    if form.kind == "table":
        assert form.parameter is not None
        return params[form.parameter].float().contiguous()
    classes = geometry(layout)
    if form.kind == "slopes":
        slopes = torch.tensor(form.slopes, dtype=torch.float64)
        return (-slopes[:, None] * torch.from_numpy(classes.distances)).float().to(like.device)
    assert form.parameter is not None
    features = torch.from_numpy(classes.quadratic_features).float().to(like.device)
    return params[form.parameter].float() @ features.T


def float_mask(mask: Tensor) -> Tensor:
    """bool or float32; a finite number stays finite, since -inf means absent (clause M2)."""
    if mask.dtype == torch.bool:
        return mask
    if mask.dtype != torch.float64:
        return mask.float()
    limit = torch.finfo(torch.float32).max
    return torch.where(mask.isinf(), mask, mask.clamp(-limit, limit)).float()


def _without(static: Tensor | None, start: int, stop: int) -> Tensor | None:
    """The features of a head outside start:stop, [B, N, H, rest]."""
    if start == stop or static is None:
        return static
    if stop - start == static.shape[-1]:
        return None
    return torch.cat((static[..., :start], static[..., stop:]), dim=-1)


def _within(encoded: Encoded, start: int, stop: int) -> Tensor | None:
    """The features start:stop where some term without a class reaches them."""
    touched = any(term.start < stop and start < term.start + term.width for term in static_terms(encoded.role))
    return encoded.static[..., start:stop].contiguous() if touched and encoded.static is not None else None


def _grid_part(
    layout: Lattice, branch: Branch, query: Encoded | None, key: Encoded | None, value: Encoded, bias: Tensor | None,
    mask: Tensor | None,
) -> Partial:  # fmt: skip
    """The kernel: grid queries over grid keys."""
    first, heads = layout.registers, value.role.num_heads
    content = branch.content and query is not None and key is not None
    slices = [e.relative for e in (query, key) if content and e is not None and e.relative is not None]
    start, width = (slices[0].start, slices[0].width) if slices else (0, 0)

    def on_grid(tokens: Tensor | None) -> Tensor | None:
        return None if tokens is None else tokens[:, first:]

    def side(encoded: Encoded | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        if encoded is None or not content:
            return None, None, None, None
        joined = _within(encoded, start, start + width) if width else None
        beside = _without(encoded.static, start, start + width)
        return on_grid(encoded.narrowed), encoded.table, on_grid(joined), on_grid(beside)

    q, k = side(query), side(key)
    if q[3] is None or k[3] is None:  # a side that is zero there contributes nothing
        q, k = (*q[:3], None), (*k[:3], None)
    shared = value.after is not None
    table_width = 0 if value.table is None else value.table.shape[2] if shared else value.table.shape[2] // heads
    seen = None
    if mask is not None:
        grid = mask_part(mask, slice(first, None), slice(first, None))
        batch = value.tokens.shape[0]
        seen = grid.expand(batch, heads, layout.num_queries - first, layout.num_keys - first)
        seen = seen if seen.is_floating_point() else seen.view(torch.uint8)
    check_transforms((*q, *k, value.narrowed, value.table, value.static, bias, seen))
    static, relative, highest, total = fused_forward(
        *q, *k, on_grid(value.narrowed), value.table, on_grid(value.static), bias, seen, box_of(layout).flat(),
        heads, width, table_width, shared, branch.scale if content else 0.0, branch.kind != "ones",
    )  # fmt: skip
    if value.relative is None:
        return Partial(static, highest, total)
    raised = value.raise_(relative)
    if value.static is None and value.relative.width == value.role.head_dim:
        return Partial(raised, highest, total)
    start, width = value.relative.start, value.relative.width
    beside = torch.nn.functional.pad(raised, (start, value.role.head_dim - start - width))
    return Partial(beside if value.static is None else static + beside, highest, total)


def forward(form: NormalForm, params: Params, inputs: Inputs, gradient: bool = False) -> Tensor:
    """out [B, Nq, F] in the dtype of x. With ``gradient`` it may be recorded: absent tokens reach no gradient."""
    layout = form.operator.layout
    assert isinstance(layout, Lattice)
    mask = None if inputs.mask is None else float_mask(inputs.mask)
    x, y = inputs.x, inputs.y
    if gradient:
        x, y = without_unseen(x, y, layout, box_of(layout), mask)
    query = None if form.query is None else Encoded(form.query, "query", x, params, layout)
    key = None if form.key is None else Encoded(form.key, "key", y, params, layout)
    value = Encoded(form.value, "key", y, params, layout)
    results = []
    for branch in form.branches:
        bias = None if branch.bias is None else bias_table(branch.bias, layout, params, inputs.x)
        found = _grid_part(layout, branch, query, key, value, bias, mask)
        if layout.registers:
            found = Dense(layout, query, key, value, branch, bias, mask).completed(found)
        results.append(found.out)
    heads = results[0]
    if form.gate is not None:
        gate = params[form.gate].float().sigmoid()[:, None]
        heads = (1 - gate) * results[0] + gate * results[1]
    heads = heads * form.operator.output_scale
    out = heads.flatten(-2)
    if form.uplift is not None:
        low = form.uplift.width
        out = heads[..., :-low].flatten(-2) + heads[..., -low:].flatten(-2) @ params[form.uplift.name].float()
    if form.output is not None:
        encoded = Encoded(form.output, "query", out, params, layout).static
        assert encoded is not None
        out = encoded.flatten(-2)
    return out.to(inputs.x.dtype)
