"""What kernels are given and work in: names of arguments, and places in the memory of a stretch."""

from translution.backends.torch.compiled.sizes import Sizes, padded

# Rows of a block, and those that a product takes beyond them.
BLOCK, SPARE = 72, 2
# Numbers of a line of the cache: everything begins with one.
LINE = 16

_COMMON = (
    "next", "stretches", "cuts", "starts", "value_class", "key_class", "query_index", "key_index",
    "batch", "token_batch", "scale", "bias", "highest", "work", "strides",
)  # fmt: skip


def arguments(sizes: Sizes, backward: bool) -> list[str]:
    """Names, in order."""
    sources, tables = range(len(sizes.sources)), range(len(sizes.tables))
    found = [*_COMMON, *(f"source {n}" for n in sources), *(f"table {n}" for n in tables)]
    if not backward:
        return [*found, "outs", "totals"]
    found += [f"d_table {n}" for n in tables]
    found += ["cotangent", "inverse", "minus_delta", "opens", "own_tables", "d_bias"]
    return [*found, *(f"d_source {n}" for n in sources if sizes.sources[n].wanted)]


def of_each(sizes: Sizes, backward: bool) -> list[str]:
    """The arguments that are arrays with an entry for each stretch."""
    if not backward:
        return ["strides", "outs", "totals"]
    own = [name for name in arguments(sizes, True) if name.startswith("d_source")]
    return ["strides", "own_tables", "d_bias", *own]


class Work:
    """Where in a stretch's memory what lies, in numbers of 4 bytes."""

    def __init__(self, sizes: Sizes, lanes: int, backward: bool) -> None:
        self.places: dict[str, int] = {}
        self.size = 0
        rows = BLOCK + SPARE
        for name in ("query", "key", "item"):
            self._add(f"{name} of row", 2 * BLOCK)
        self._add("weights", padded(BLOCK * sizes.heads, lanes))
        for role in sizes.roles:
            self._add(role.name, rows * padded(sizes.features(role), lanes))
        used = {table.source for table in sizes.tables}
        for n in used:
            self._add(f"rows {n}", rows * padded(sizes.sources[n].features, lanes))
        self._add("narrow", rows * max((padded(sizes.columns(table), lanes) for table in sizes.tables), default=0))
        if not backward:
            return
        self._add("pulls", BLOCK * sizes.heads)
        self._add("cotangent", rows * padded(sizes.features(sizes.roles[2]), lanes))
        for n in used:
            if sizes.sources[n].wanted:
                self._add(f"gradient {n}", rows * padded(sizes.sources[n].features, lanes))
        for n, table in enumerate(sizes.tables):
            if sizes.sources[table.source].wanted:
                self._add(f"turned {n}", sizes.columns(table) * padded(table.inner, lanes))

    def _add(self, name: str, size: int) -> None:
        self.places[name] = self.size
        self.size += padded(size, LINE)
