"""A small backend: a table of the key of every query and class, and one matrix product for each class and role.

``backend`` is right; ``mirrored`` reads the value table at the opposite displacement, a mistake for the exam to find.
"""

from itertools import product

import numpy as np

from translution import Claims, Gradients
from translution.spec import BiasTable, Identity, Lattice, Mean, Ones, PerDisplacement, Shared, Softmax

NONE = type(None)


def query_sites(layout, axis):
    """Positions of the queries along one axis."""
    return [layout.strides[axis] * a + layout.offsets[axis] for a in range(layout.grid[axis])]


def displacements(layout, axis):
    """Displacements of one axis, ascending."""
    if layout.kernel_size is None:
        keys = [layout.key_strides[axis] * b for b in range(layout.keys[axis])]
        every = {p - k for p in query_sites(layout, axis) for k in keys}
    else:
        every = {layout.paddings[axis] - t * layout.dilations[axis] for t in range(layout.window[axis])}
    return sorted(d for d in every if d >= 0 or not layout.axis_causal[axis])


def key_at(layout, position):
    """The key at a position; the number of keys for the zero token, -1 where there is none."""
    key = 0
    for axis, at in enumerate(position):
        extent, step = layout.keys[axis], layout.key_strides[axis]
        if layout.boundary == "circular":
            at %= extent
        if not 0 <= at < extent * step:
            return layout.num_keys if layout.boundary == "zeros" else -1
        if at % step:
            return -1
        key = key * extent + at // step
    return key


def key_table(layout):
    """The key of every query and class, [Nq, T]."""
    classes = list(product(*(displacements(layout, axis) for axis in range(layout.rank))))
    queries = product(*(query_sites(layout, axis) for axis in range(layout.rank)))
    return np.array([[key_at(layout, np.subtract(q, d).tolist()) for d in classes] for q in queries])


class Linear:
    """An encoder: tokens [.., C] and a class to [.., E], and back."""

    def __init__(self, encoder, role, params):
        self.relative = isinstance(encoder, PerDisplacement)
        self.groups = getattr(encoder, "groups", 1)
        self.name = f"{role}.{'table' if self.relative else 'weight'}"
        self.matrix, self.bias = params.get(self.name), f"{role}.bias"
        self.shift = params.get(self.bias)

    def at(self, row):
        """Matrices [groups, C / groups, E / groups] of a class."""
        own = self.matrix[row] if self.relative else self.matrix
        return own.reshape(self.groups, *own.shape[-2:])

    def split(self, values):
        """[groups, all tokens, features / groups]."""
        return values.reshape(-1, self.groups, values.shape[-1] // self.groups).swapaxes(0, 1)

    def forward(self, tokens, row):
        found = tokens
        if self.matrix is not None:
            parts = (self.split(tokens) @ self.at(row)).swapaxes(0, 1)
            found = parts.reshape(*tokens.shape[:-1], parts.shape[1] * parts.shape[2])
        return found if self.shift is None else found + self.shift

    def backward(self, tokens, row, cotangent, gradients):
        """Gradient of the tokens; those of the parameters are added."""
        if self.shift is not None:
            gradients[self.bias] += cotangent.reshape(-1, cotangent.shape[-1]).sum(0)
        if self.matrix is None:
            return cotangent
        own, to = self.split(cotangent), gradients[self.name]
        part = self.split(tokens).swapaxes(1, 2) @ own
        to[row if self.relative else ...] += part.reshape(to.shape[1:] if self.relative else to.shape)
        return (own @ self.at(row).swapaxes(1, 2)).swapaxes(0, 1).reshape(tokens.shape)


class Pass:
    """One forward pass, which keeps what the backward pass needs. Weights are [B, H, Nq, T]."""

    def __init__(self, operator, params, inputs, mirrored):
        self.operator, self.params, self.mirrored = operator, params, mirrored
        layout, self.heads, self.type = operator.layout, operator.num_heads, inputs.x.dtype.type
        self.keys = key_table(layout)
        self.num_classes = self.keys.shape[1]
        self.content = operator.uses_content
        roles = ("query", "key", "value") if self.content else ("value",)
        self.encoders = {role: Linear(getattr(operator, role), role, params) for role in roles}
        self.output = Linear(operator.output, "output", params)
        batch = len(inputs.x)
        self.added = np.zeros((batch, self.heads, layout.num_queries, layout.num_keys + 1), self.type)
        if inputs.mask is not None:
            bool_mask = inputs.mask.dtype == bool
            self.added[..., :-1] = np.where(inputs.mask, 0, -np.inf) if bool_mask else inputs.mask
        self.added = np.take_along_axis(
            self.added, np.broadcast_to(self.keys, (batch, self.heads, *self.keys.shape)), 3
        )
        self.live = (self.keys >= 0) & (self.added != -np.inf)
        # What nobody sees may hold anything.
        self.x = np.where(self.live.any((1, 3))[..., None], inputs.x, self.type(0))
        self.y = np.concatenate([inputs.y, np.zeros((batch, 1, inputs.y.shape[2]), self.type)], 1)

    def opposite(self, row):
        return self.num_classes - 1 - row

    def value_row(self, row):
        return self.opposite(row) if self.mirrored else row

    def encoded(self, role, tokens, row):
        """[B, P, H, D]."""
        found = self.encoders[role].forward(tokens, row)
        return found.reshape(*found.shape[:2], self.heads, found.shape[2] // self.heads)

    def links(self):
        """For each class its queries and keys, the key tokens [B, P, C], and which heads see them [B, P, H, 1]."""
        for row in range(self.num_classes):
            i = np.flatnonzero(self.keys[:, row] >= 0)
            j, live = self.keys[i, row], self.live[:, :, i, row].transpose(0, 2, 1)
            yield row, i, j, np.where(live.any(-1)[..., None], self.y[:, j], self.type(0)), live[..., None]

    def column(self, dense, i, row):
        """[B, P, H, 1] of an array [B, H, Nq, T]."""
        return dense[:, :, i, row].transpose(0, 2, 1)[..., None]

    def logits(self):
        relevance = self.operator.relevance
        found = np.where(self.live, self.added, -np.inf).astype(self.type)
        if relevance.bias is not None:
            found = found + self.params["relevance.bias"][:, None, :]
        if self.content:
            self.scale = self.type(self.operator.scale_of(relevance))
            for row, i, _, tokens, _ in self.links():
                q = self.encoded("query", self.x[:, i], row)
                k = self.encoded("key", tokens, self.opposite(row))
                found[:, :, i, row] += self.scale * (q * k).sum(-1).transpose(0, 2, 1)
        return np.where(self.live, found, -np.inf)

    def forward(self):
        operator, weights = self.operator, self.live.astype(self.type)
        if isinstance(operator.relevance, Softmax):
            logits = self.logits()
            top = logits.max(-1, keepdims=True, initial=-np.inf)
            weights = np.where(self.live, np.exp(logits - np.where(np.isneginf(top), 0, top)), self.type(0))
        if not isinstance(operator.relevance, Ones):
            total = weights.sum(-1, keepdims=True)
            # In a row with NaN a masked pair stays absent.
            weights = np.where(self.live, weights / np.where(total == 0, self.type(1), total), self.type(0))
        self.weights = weights
        shape = (len(self.x), operator.layout.num_queries, self.heads, operator.value_head_dim)
        joined = np.zeros(shape, self.type)
        for row, i, _, tokens, live in self.links():
            v = np.where(live, self.encoded("value", tokens, self.value_row(row)), self.type(0))
            joined[:, i] += self.column(weights, i, row) * v
        self.joined = (joined * self.type(operator.output_scale)).reshape(*shape[:2], shape[2] * shape[3])
        return self.output.forward(self.joined, 0)

    def dense_weights(self):
        """[B, H, Nq, Nk]."""
        layout = self.operator.layout
        found = np.zeros((*self.weights.shape[:3], layout.num_keys + 1), self.type)
        for row in range(self.num_classes):
            i = np.flatnonzero(self.keys[:, row] >= 0)
            found[:, :, i, self.keys[i, row]] += self.weights[:, :, i, row]
        return found[..., :-1]

    def backward(self, cotangent):
        gradients = {name: np.zeros_like(value) for name, value in self.params.items()}
        dx, dy = np.zeros_like(self.x), np.zeros_like(self.y)
        own = self.output.backward(self.joined, 0, cotangent, gradients) * self.type(self.operator.output_scale)
        own = own.reshape(*own.shape[:2], self.heads, own.shape[2] // self.heads)
        slopes = np.zeros_like(self.weights)

        def joined(parts):
            return parts.reshape(*parts.shape[:2], parts.shape[2] * parts.shape[3])

        for row, i, j, tokens, live in self.links():
            to = self.value_row(row)
            v = np.where(live, self.encoded("value", tokens, to), self.type(0))
            slopes[:, :, i, row] = (own[:, i] * v).sum(-1).transpose(0, 2, 1)
            part = joined(self.column(self.weights, i, row) * own[:, i])
            np.add.at(dy, (slice(None), j), self.encoders["value"].backward(tokens, to, part, gradients))
        if isinstance(self.operator.relevance, Softmax):
            slopes = self.weights * (slopes - (self.weights * slopes).sum(-1, keepdims=True))
            slopes = np.where(self.live, slopes, self.type(0))  # as above
            if self.operator.relevance.bias is not None:
                gradients["relevance.bias"] += slopes.sum((0, 2))
        if self.content:
            for row, i, j, tokens, live in self.links():
                slope, opposite = self.scale * self.column(slopes, i, row), self.opposite(row)
                q = self.encoded("query", self.x[:, i], row)
                k = np.where(live, self.encoded("key", tokens, opposite), self.type(0))
                dx[:, i] += self.encoders["query"].backward(self.x[:, i], row, joined(slope * k), gradients)
                part = self.encoders["key"].backward(tokens, opposite, joined(slope * q), gradients)
                np.add.at(dy, (slice(None), j), part)
        return Gradients(gradients, dx, dy[:, :-1])


class Toy:
    """The backend."""

    name = "toy"
    kind = "numpy"
    algorithms = ("pairwise",)
    dtypes = ("float64", "float32")
    claims = Claims()

    def __init__(self, mirrored=False):
        self.mirrored = mirrored

    def unavailable(self):
        return []

    def not_supported(self, request, algorithm):
        operator, layout, reasons = request.operator, request.operator.layout, []
        if request.gradient:
            reasons.append("toy computes in NumPy: it would lose the gradient of a tensor")
        if not isinstance(layout, Lattice):
            reasons.append("toy has no pair tables")
        elif layout.registers or layout.far is not None or layout.raster_causal:
            reasons.append("toy has no registers, far classes or raster order")
        elif layout.boundary not in ("absent", "zeros", "circular"):
            reasons.append(f"toy has no boundary {layout.boundary!r}")
        elif layout.boundary == "circular" and layout.kernel_size is None:
            reasons.append("toy has circular windows, but no whole circle")
        relevance = operator.relevance
        if not isinstance(relevance, Ones | Mean | Softmax):
            reasons.append(f"toy has no {type(relevance).__name__}")
        elif not isinstance(getattr(relevance, "bias", None), BiasTable | NONE):
            reasons.append(f"toy has no {type(relevance.bias).__name__}")
        for role in ("query", "key", "value", "output"):
            encoder = getattr(operator, role)
            if not isinstance(encoder, Identity | Shared | PerDisplacement | NONE):
                reasons.append(f"toy has no {type(encoder).__name__} encoder")
        return list(dict.fromkeys(reasons))

    def forward(self, request, algorithm, params, inputs):
        with np.errstate(all="ignore"):
            own = Pass(request.operator, params, inputs, self.mirrored)
            out = own.forward()
        return out, own.dense_weights() if request.return_weights else None

    def vjp(self, request, algorithm, params, inputs, cotangent):
        with np.errstate(all="ignore"):
            own = Pass(request.operator, params, inputs, self.mirrored)
            out = own.forward()
            return out, own.backward(cotangent)


backend = Toy()
mirrored = Toy(mirrored=True)
