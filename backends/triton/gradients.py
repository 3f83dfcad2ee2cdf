"""The backward kernels in turn: scores of pairs, then for every gradient a sum over partners or pairs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from translution.backends.triton import gradient_kernels as kernels
from translution.backends.triton import targets
from translution.backends.triton.operands import Operands, held, rows_of, span_of
from translution.backends.triton.targets import (
    INTERPRETED,
    LEAST,
    Blocks,
    Target,
    block,
    blocks_for,
    current_target,
    launching,
    power_of_two,
    programs_for,
    tile_for,
)

# The operands that have a gradient, in the order of the operator's arguments.
NAMES = (
    "q_tokens", "q_table", "q_static", "q_plain", "k_tokens", "k_table", "k_static", "k_plain", "v_tokens", "v_table",
    "v_static", "bias", "mask",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cotangents:
    """Of the results, static [B, N, H, V] and relative [B, N, H, W], dense float32, and what they meet.

    highest and total [B, N, H] are the forward's; delta [B, N, H] is <d_static, static> + <d_relative, relative> less
    d_total total, so that dl_ij = P_ij (<dO_i, v_ij> - delta_i).
    """

    static: Tensor
    relative: Tensor
    highest: Tensor
    total: Tensor
    delta: Tensor


@dataclass(frozen=True, slots=True)
class Features:
    """What partners contribute, ``width`` numbers for each head: static [B, N, H, width] + tokens table."""

    static: Tensor | None
    tokens: Tensor | None
    table: Tensor | None
    width: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Input channels and columns of the table."""
        return (0, 0) if self.table is None else (self.table.shape[1], self.table.shape[2])


@dataclass(frozen=True, slots=True)
class Scores:
    """A coefficient ``scale * numbers[h, i, slot, b]`` for every pair [H, Nq, S, B]; 1 where there are no numbers.

    ``slots`` of a query are the keys, or the displacements, of which a window has fewer.
    """

    numbers: Tensor | None
    scale: float
    slots: int
    by_key: bool


@dataclass(frozen=True, slots=True)
class Side:
    """The tokens whose gradient is computed: queries or keys, by their table where they have one.

    ``key_table``: the table is the keys' own, which ascends in -delta. ``shared``: one matrix for all heads.
    """

    is_query: bool
    key_table: bool = False
    shared: bool = False


QUERY, KEY, VALUE = Side(True), Side(False, key_table=True), Side(False)


@dataclass(frozen=True)
class Launcher:
    """The kernels for one set of operands; ``blocks`` in place of the table's."""

    operands: Operands
    target: Target
    blocks: Blocks | None = None

    def weights(self, given: Cotangents, by_key: bool) -> Scores:
        """P."""
        o, box = self.operands, self.operands.box
        slots = box.num_keys if by_key else box.num_classes
        if not o.normalise:
            return Scores(None, 1.0, slots, by_key)
        out = given.total.new_empty((o.num_heads, box.num_queries, slots, o.batch))
        chosen = self._blocks("weights", box.grid)
        tile = tile_for(chosen.rows, o.batch, box.grid, o.item_span)
        inner = [0 if t is None else t.shape[1] for t in (o.q_table, o.k_table)]
        columns = [0 if t is None else t.shape[2] for t in (o.q_table, o.k_table)]
        kernel: Any = kernels.weights_kernel
        with launching():
            kernel[(programs_for(tile, o.batch, box.grid) * o.num_heads,)](
                held(o.q_tokens, out), held(o.q_table, out), held(o.q_static, out), held(o.q_plain, out),
                held(o.k_tokens, out), held(o.k_table, out), held(o.k_static, out), held(o.k_plain, out),
                held(o.bias, out), held(o.mask, out), given.highest, given.total, out,
                rows_of(o.q_tokens), rows_of(o.q_static), rows_of(o.q_plain),
                rows_of(o.k_tokens), rows_of(o.k_static), rows_of(o.k_plain),
                *o.mask_strides,
                o.batch, 0 if o.bias is None else o.bias.shape[1], box.base, slots,
                *box.axes(),
                o.scale,
                HEADS=o.num_heads,
                Q_INNER=inner[0], K_INNER=inner[1], Q_COLUMNS=columns[0], K_COLUMNS=columns[1],
                PLAIN=o.plain_width, WIDTH=o.width,
                HAS_Q_STATIC=o.q_static is not None, HAS_K_STATIC=o.k_static is not None, HAS_BIAS=o.bias is not None,
                MASK=o.mask_kind, SLOT_IS_KEY=by_key, UPCAST=INTERPRETED,
                TZ=tile[0], TY=tile[1], TX=tile[2], BB=tile[3],
                BQ=block(chosen.channels, max(inner)),
                BP=block(chosen.features, o.plain_width), BW=block(chosen.features, o.width),
                **_options(chosen),
            )  # fmt: skip
        return Scores(out, 1.0, slots, by_key)

    def d_logits(self, given: Cotangents, weights: Scores, fill: bool) -> Scores:
        """dl, whose sums the scale of the logits belongs to; with ``fill`` 0 where no pair is."""
        o, box = self.operands, self.operands.box
        assert weights.numbers is not None
        out = (torch.zeros_like if fill else torch.empty_like)(weights.numbers)
        chosen = self._blocks("d_logits", box.grid)
        tile = tile_for(chosen.rows, o.batch, box.grid, o.item_span)
        inner, columns = (0, 0) if o.v_table is None else (o.v_table.shape[1], o.v_table.shape[2])
        kernel: Any = kernels.d_logits_kernel
        with launching():
            kernel[(programs_for(tile, o.batch, box.grid) * o.num_heads,)](
                held(o.v_tokens, out), held(o.v_table, out), held(o.v_static, out), held(o.mask, out),
                given.static, given.relative, given.delta, weights.numbers, out,
                rows_of(o.v_tokens), rows_of(o.v_static),
                *o.mask_strides,
                o.batch, box.base, weights.slots,
                *box.axes(),
                HEADS=o.num_heads,
                V_INNER=inner, V_COLUMNS=columns, V_HEAD=0 if o.value_shared else o.value_width,
                V_STATIC=o.static_width, V_WIDTH=o.value_width,
                MASK=o.mask_kind, SLOT_IS_KEY=weights.by_key, UPCAST=INTERPRETED,
                TZ=tile[0], TY=tile[1], TX=tile[2], BB=tile[3],
                BK=block(chosen.channels, inner),
                BS=block(chosen.results, o.static_width), BV=block(chosen.results, o.value_width),
                **_options(chosen),
            )  # fmt: skip
        return replace(weights, numbers=out, scale=o.scale)

    def of_owners(self, side: Side, scores: Scores, partner: Features, table: Tensor | None = None) -> Tensor:
        """Sums of coefficients times features over the partners of every token: [B, N, H, width], or, each of them
        times its own class's row of the table transposed, [B, N, R] over all heads.
        """
        o, box = self.operands, self.operands.box
        grid, axes = (box.grid, [*box.axes(), 1, 1, 1]) if side.is_query else (box.keys, box.mirrored())
        mask_batch, mask_head, mask_own, mask_partner = o.mask_strides
        if not side.is_query:
            mask_own, mask_partner = mask_partner, mask_own
        chosen, count = self._blocks("owners", grid), math.prod(grid)
        across = block(chosen.features, partner.width)
        like = next(t for t in (partner.static, partner.tokens) if t is not None)
        if table is None:
            own = (0, 0)
            out, held_columns, chunks = (
                like.new_empty((o.batch, count, o.num_heads, partner.width), dtype=torch.float32),
                LEAST,
                -(-partner.width // across),
            )
        else:
            own = table.shape[1], table.shape[2]
            held_columns = block(chosen.results, own[0])
            chunks = -(-own[0] // held_columns)
            out = like.new_empty((o.num_heads, o.batch, count, own[0]), dtype=torch.float32)
        spans = [span_of(t) for t in (partner.static, partner.tokens) if t is not None]
        tile = tile_for(chosen.rows, o.batch, grid, max(*spans, count * max(own[0], o.num_heads * partner.width)))
        kernel: Any = kernels.owners_kernel
        with launching():
            kernel[(programs_for(tile, o.batch, grid) * chunks * o.num_heads,)](
                held(table, out), held(partner.tokens, out), held(partner.table, out), held(partner.static, out),
                held(scores.numbers, out), held(o.mask, out), out,
                rows_of(partner.tokens), rows_of(partner.static),
                mask_batch, mask_head, mask_own, mask_partner,
                o.batch, box.base, scores.slots,
                *axes,
                scores.scale,
                **self._constants(side, scores, partner, own),
                TOKENS=table is not None,
                APART=max(axes[18:]) > 1,
                TZ=tile[0], TY=tile[1], TX=tile[2], BB=tile[3],
                BK=block(chosen.channels, partner.sizes[0]), BW=across, BC=held_columns, CHUNKS=chunks,
                **_options(chosen),
            )  # fmt: skip
        return out if table is None else out.sum(0)

    def of_table(self, side: Side, scores: Scores, partner: Features, tokens: Tensor, table: Tensor) -> Tensor:
        """The gradient of a table [T, R, E]; rows that are no displacement get 0."""
        o, box = self.operands, self.operands.box
        own = table.shape[1], table.shape[2]
        # The interpreter would cut float32 to bfloat16, not round.
        out = torch.empty_like(table, dtype=torch.float32 if INTERPRETED else table.dtype)
        out[box.num_classes :] = 0
        chosen, heads = self._blocks("tables", box.grid), o.num_heads if side.shared else 1
        held_columns, across = block(chosen.results, own[0]), block(chosen.features, partner.width)
        chunks, width_chunks = -(-own[0] // held_columns), -(-partner.width // across)
        programs = box.num_classes * chunks * width_chunks * (o.num_heads // heads)
        kernel: Any = kernels.tables_kernel
        with launching():
            kernel[(programs,)](
                tokens, held(partner.tokens, out), held(partner.table, out), held(partner.static, out),
                held(scores.numbers, out), held(o.mask, out), out,
                rows_of(tokens), rows_of(partner.tokens), rows_of(partner.static),
                *o.mask_strides,
                o.batch, box.base, scores.slots,
                *box.axes(),
                scores.scale,
                **self._constants(side, scores, partner, own),
                HEADS_HELD=heads, AXES=box.num_axes, TURNED=chosen.turned,
                ROWS=chosen.rows,
                BK=block(chosen.channels, partner.sizes[0]), BW=across, BC=held_columns,
                CHUNKS=chunks, WIDTH_CHUNKS=width_chunks,
                **_options(chosen),
            )  # fmt: skip
        return out.to(table.dtype)

    def of_bias(self, scores: Scores, bias: Tensor) -> Tensor:
        """[H, T]; columns that are no displacement get 0."""
        o, box = self.operands, self.operands.box
        out = torch.empty_like(bias)
        out[:, box.num_classes :] = 0
        pairs = power_of_two(o.batch * min(box.num_queries, box.num_keys))
        kernel: Any = kernels.bias_kernel
        with launching():
            kernel[(box.num_classes * o.num_heads,)](
                scores.numbers, out, o.batch, box.base, scores.slots, bias.shape[1],
                *box.grid, *box.keys, *box.taps[1:], *box.shift, *box.step, *box.stride,
                HEADS=o.num_heads, SLOT_IS_KEY=scores.by_key, AXES=box.num_axes,
                ROWS=min(1024, pairs),
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        return out

    def _constants(self, side: Side, scores: Scores, partner: Features, own: tuple[int, int]) -> dict[str, Any]:
        """What the kernels that sum are compiled for."""
        return {
            "HEADS": self.operands.num_heads,
            "OWN_QUERY": side.is_query, "KEY_TABLE": side.key_table,
            "WEIGHTED": scores.numbers is not None, "SLOT_IS_KEY": scores.by_key,
            "HAS_STATIC": partner.static is not None,
            "MASK": self.operands.mask_kind,
            "INNER": partner.sizes[0], "COLUMNS": partner.sizes[1],
            "OWN_INNER": own[0], "OWN_COLUMNS": own[1], "OWN_HEAD": 0 if side.shared else partner.width,
            "WIDTH": partner.width,
            "UPCAST": INTERPRETED,
        }  # fmt: skip

    def _blocks(self, kernel: str, grid: targets.Axes) -> Blocks:
        found = self.blocks or blocks_for(self.target, self.operands.item_size, kernel)
        if INTERPRETED and self.blocks is None:
            return replace(found, rows=targets.interpreter_rows(self.operands.batch, grid))
        return found


def _options(chosen: Blocks) -> dict[str, Any]:
    return {"num_warps": chosen.warps, "num_stages": chosen.stages, "enable_fp_fusion": True}


def gradients(
    operands: Operands,
    given: Cotangents,
    needed: frozenset[str],
    target: Target | None = None,
    blocks: Blocks | None = None,
) -> dict[str, Tensor]:
    """The gradients of those of ``NAMES`` that are needed, in the dtype of what they are of.

    Raises ValueError where a batch item of an operand is not dense.
    """
    operands.check_dense()
    o, box = operands, operands.box
    do = Launcher(o, target or current_target(), blocks)
    weights = do.weights(given, "mask" in needed or box.num_keys <= box.num_classes)
    wants_d_logits = any(not name.startswith("v_") for name in needed)
    d_logits = do.d_logits(given, weights, "mask" in needed) if wants_d_logits else weights
    query, key = (
        Features(o.q_static, o.q_tokens, o.q_table, o.width),
        Features(o.k_static, o.k_tokens, o.k_table, o.width),
    )
    relative = Features(given.relative, None, None, o.value_width)
    value = replace(VALUE, shared=o.value_shared)
    computed: dict[str, Callable[[], Tensor]] = {
        "q_tokens": lambda: do.of_owners(QUERY, d_logits, key, o.q_table),
        "q_table": lambda: do.of_table(QUERY, d_logits, key, _some(o.q_tokens), _some(o.q_table)),
        "q_static": lambda: do.of_owners(QUERY, d_logits, key),
        "q_plain": lambda: do.of_owners(QUERY, d_logits, Features(o.k_plain, None, None, o.plain_width)),
        "k_tokens": lambda: do.of_owners(KEY, d_logits, query, o.k_table),
        "k_table": lambda: do.of_table(KEY, d_logits, query, _some(o.k_tokens), _some(o.k_table)),
        "k_static": lambda: do.of_owners(KEY, d_logits, query),
        "k_plain": lambda: do.of_owners(KEY, d_logits, Features(o.q_plain, None, None, o.plain_width)),
        "v_tokens": lambda: do.of_owners(value, weights, relative, o.v_table),
        "v_table": lambda: do.of_table(value, weights, relative, _some(o.v_tokens), _some(o.v_table)),
        "v_static": lambda: do.of_owners(value, weights, Features(given.static, None, None, o.static_width)),
        "bias": lambda: do.of_bias(d_logits, _some(o.bias)),
        "mask": lambda: _some(d_logits.numbers).permute(3, 0, 1, 2).contiguous(),
    }
    found = {name: computed[name]() for name in NAMES if name in needed}
    return {name: gradient.to(_some(getattr(o, name)).dtype) for name, gradient in found.items()}


def _some(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
