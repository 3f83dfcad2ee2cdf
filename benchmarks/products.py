"""What the machine gives to the matrix products of an operator, and to reading its tables: the limits of its speed."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch

from translution.geometry import geometry
from translution.spec import Operator

# Rows of the product that is as fast as any.
MANY_ROWS = 8192


class Products:
    """Bare matrix products in the shapes that an operator has, into memory that is reused.

    One for each displacement: the rows of all its links and samples times the matrices of all roles side by side,
    [rows, C] @ [C, roles C'], each matrix from its own place in memory. The gradients take two such products.
    """

    def __init__(self, operator: Operator, batch: int, params: Mapping[str, npt.NDArray[np.float32]]) -> None:
        own = [params[name] for role in ("query", "key", "value") if (name := f"{role}.table") in params]
        if not own:
            raise ValueError("no role has a table: there are no products for each displacement")
        self.tables = torch.from_numpy(np.concatenate(own, axis=-1))
        self.rows = [(step.value_class, batch * len(step.query_index)) for step in geometry(operator.layout).steps]
        self.dim, self.width = self.tables.shape[1:]

    @property
    def flops(self) -> int:
        """Of ``products``; ``gradient products`` have twice as many."""
        return 2 * sum(rows for _, rows in self.rows) * self.dim * self.width

    @property
    def large_flops(self) -> int:
        """Of ``large product``."""
        return 2 * MANY_ROWS * self.dim * self.width

    @property
    def table_bytes(self) -> int:
        """Of all tables."""
        return math.prod(self.tables.shape) * self.tables.element_size()

    def calls(self) -> dict[str, Callable[[], object]]:
        """By the names of ``workload.MACHINE``."""
        most = max(rows for _, rows in self.rows)
        tokens, features = torch.randn(most, self.dim), torch.randn(most, self.width)
        out, d_tokens, d_tables = features.clone(), tokens.clone(), torch.empty_like(self.tables)
        many, results = torch.randn(MANY_ROWS, self.dim), torch.empty(MANY_ROWS, self.width)

        def products() -> None:
            for row, count in self.rows:
                torch.mm(tokens[:count], self.tables[row], out=out[:count])

        def gradient_products() -> None:
            for row, count in self.rows:
                torch.mm(tokens[:count].T, features[:count], out=d_tables[row])
                torch.mm(features[:count], self.tables[row].T, out=d_tokens[:count])

        by_onednn = {}
        if torch.backends.mkldnn.is_available():
            linear, weight = torch.ops.mkldnn._linear_pointwise, self.tables[0].mT
            by_onednn = {"large product of oneDNN": lambda: linear(many, weight, None, "none", [], "")}
        return {
            "products": products,
            "gradient products": gradient_products,
            "large product": lambda: torch.mm(many, self.tables[0], out=results),
            **by_onednn,
            "tables read": lambda: self.tables.sum(),
            "tables copied": lambda: d_tables.copy_(self.tables),
        }
