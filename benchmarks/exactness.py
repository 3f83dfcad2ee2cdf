"""The proof that what is timed is right, at the very shape that is timed.

The exact result is that of ``conformance.error_model``, with its bound for every element. It takes arrays over links
and tables several times over, so a large operator is looked at through some of its queries: they alone get a cotangent.
An operator with these queries, a table of pairs and the matrices that they meet gives their results and all gradients.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from translution.conformance.comparison import ComparisonError, check
from translution.conformance.error_model import budget
from translution.geometry import geometry
from translution.normal_form import normal_form
from translution.spec import Operator, PairTable

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Array = npt.NDArray[np.float32]
# Bytes that the exact result may take, and how many float64 arrays over links and over tables it takes (roughly).
MOST_BYTES, LINK_ARRAYS, TABLE_ARRAYS = 2**30, 24, 6
ROUNDOFF = 2.0**-24


def table_names(operator: Operator) -> list[str]:
    """Parameters with a row for each class."""
    return [term.table for role in normal_form(operator).roles for term in role.linears if term.table is not None]


class View:
    """An operator as some of its queries see it, over all keys, with the table rows that they meet (``classes``)."""

    def __init__(self, operator: Operator, queries: IntArray) -> None:
        found, row_of = geometry(operator.layout), np.full(operator.layout.num_queries, -1)
        row_of[queries] = np.arange(len(queries))
        kept = row_of[found.query_index] >= 0
        own, mirrored = found.value_class[kept], found.key_class[kept]
        self.queries, self.links = queries, len(own)
        self.classes: IntArray = np.unique(np.concatenate([own, mirrored]))
        self._places = row_of[found.query_index[kept]], found.key_index[kept]
        self._pairs, self._whole = (own, mirrored), operator

    def bytes(self, items: int) -> int:
        """What its exact result takes."""
        operator, shapes = self._whole, dict(self._whole.parameters)
        features = sum(role.num_heads * role.head_dim for role in normal_form(operator).roles)
        of_link = LINK_ARRAYS * items * (features + operator.dim + operator.keys_dim)
        of_class = TABLE_ARRAYS * sum(shapes[name][-2] * shapes[name][-1] for name in table_names(operator))
        return 8 * (self.links * of_link + len(self.classes) * of_class)

    def operator(self) -> Operator:
        """With a layout of its own; queries and keys are not the same tokens."""
        found = geometry(self._whole.layout)
        assert not found.repeats_pairs
        assert not found.has_zero_token
        tables = np.full((2, len(self.queries), found.num_keys), -1, np.int64)
        for table, classes in zip(tables, self._pairs, strict=True):
            table[self._places] = np.searchsorted(self.classes, classes)
        own, mirrored = (tuple(map(tuple, table.tolist())) for table in tables)
        return replace(self._whole, layout=PairTable(own, len(self.classes), mirrored))

    def params(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """The parameters of :meth:`operator`."""
        tables = table_names(self._whole)
        return {name: value[self.classes] if name in tables else value for name, value in params.items()}


def view_of(operator: Operator, items: int) -> View | None:
    """As many queries, evenly spread, as fit into ``MOST_BYTES``, at least one; None where all do."""
    total = count = operator.layout.num_queries
    while True:
        queries = np.unique(((np.arange(count) + 0.5) * total / count).astype(np.int64))
        found = View(operator, queries)
        if count == 1 or not operator.uses_content or found.bytes(items) <= MOST_BYTES:
            return None if count == total else found
        count //= 2


class Exact:
    """Results and gradients of an operator at the first and the last item of a batch, and their float32 bounds.

    ``cotangent`` [B, N, F] is 0 but at the watched queries of these two items.
    """

    def __init__(self, operator: Operator, params: Mapping[str, Array], x: Array, seed: int = 0) -> None:
        self.items: IntArray = np.unique([0, len(x) - 1])
        self.view = view_of(operator, len(self.items))
        count = operator.layout.num_queries
        self.queries: IntArray = np.arange(count) if self.view is None else self.view.queries
        generator = np.random.default_rng(seed)
        pull = generator.standard_normal((len(self.items), len(self.queries), operator.out_features), np.float32)
        self.cotangent = np.zeros((len(x), count, operator.out_features), np.float32)
        self.cotangent[np.ix_(self.items, self.queries)] = pull
        tokens = x[self.items]
        if self.view is None:
            found = budget(operator, params, tokens, cotangent=pull)
            name = "x" if operator.uses_content else "y"
            dx, dx_bound = found.gradient_values[name], found.gradients[name]
        else:
            own = self.view.params(params)
            found = budget(self.view.operator(), own, tokens[:, self.queries], tokens, cotangent=pull)
            dx, dx_bound = found.gradient_values["y"].copy(), found.gradients["y"].copy()
            dx[:, self.queries] += found.gradient_values["x"]
            dx_bound[:, self.queries] += found.gradients["x"]
            dx_bound += ROUNDOFF * np.abs(dx)
        self._out, self._out_bound = found.value, found.out
        self._gradients = {name: found.gradient_values[name] for name in params} | {"x": dx}
        self._bounds = {name: found.gradients[name] for name in params} | {"x": dx_bound}
        self._tables = [] if self.view is None else table_names(operator)

    def share(self, out: Array, gradients: Mapping[str, Array] | None) -> float:
        """The largest error as a share of its bound; ``gradients`` None where there are none.

        Raises:
            ComparisonError: an error is beyond its bound; the message says where.
        """
        worst = check("out", out[np.ix_(self.items, self.queries)], self._out, self._out_bound)
        for name, whole in (gradients or {}).items():
            value = whole
            rows = self.items if name == "x" else self.view.classes if self.view and name in self._tables else None
            if rows is not None:
                others = np.delete(whole, rows, axis=0)
                if others.any():
                    raise ComparisonError(f"gradient of {name}: rows that no cotangent reaches are not 0")
                value = whole[rows]
            worst = max(worst, check(f"gradient of {name}", value, self._gradients[name], self._bounds[name]))
        if gradients is not None and gradients.keys() != self._gradients.keys():
            raise ComparisonError(f"gradients of {sorted(gradients)}, expected {sorted(self._gradients)}")
        return worst
