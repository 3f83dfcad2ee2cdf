"""Writes docs/performance.md and its plots from docs/performance.json alone: nothing is measured here."""

import json
import textwrap
from pathlib import Path
from statistics import median

from aims import judged
from families import NAMES, TIMED
from markdown import table
from plots import plot_growth, plot_shares
from reading import (
    ONEDNN,
    SHARES,
    Data,
    cases,
    last_exponent,
    operations_exponent,
    ratio,
    seconds,
    shares,
    spread,
    table_share,
    time_exponent,
)
from workload import FORWARD, TRAINING

from translution.display import formatted_bytes
from translution.trials import Timing, contenders

ENOUGH_ROUNDS, AIMED_THREADS = 5, 2
DOCS = Path(__file__).parents[1] / "docs"
INTRODUCTION = """\
# Performance

Times on a CPU in float32, each beside what it should be compared with: the authors' algorithm, torch's own kernels, and
the bare matrix products that the operator consists of. All candidates of a table, or of a row where it says so, took
turns in the same rounds; a figure is the median with the range over the rounds, ratios and shares being taken round by
round.

Before anything was timed, its result and its gradients were compared at that very shape with the exact result of
`translution.conformance.error_model`, element by element, and kept the bound for float32; baselines too. Where the
exact result is too large it is taken at some of the queries, and the gradients are those of what they give.

`make bench` measures everything and writes this page; `python benchmarks/report.py --only growth` measures one family
again, `--page` writes the page from [performance.json](performance.json), which holds every round.

Where the last table says so, each turn of less than a second begins with a rest, in which the threads of the one before
stop looking for work, and a call that is not counted: what is timed is a call after its like, not after a computation
that has filled the caches.
"""
LOAD = """\
The load average counts these measurements too; what exceeds the threads is other work on the machine, which changes the
figures.
"""
YARDSTICKS = """\
*Its own products* are the bare products of the operator, one for each displacement, in the shapes that they have; *one
large product* has 8192 rows of the same width. Both are `torch.mm`, of which no product is faster than the latter.
Where oneDNN multiplies faster, as on AMD's Zen 5, `stream` lets it multiply many rows, and can exceed 100%."""
COUNTED = """\
What it reaches of the machine. *Forward* counts the one product for each link and role that no algorithm can do
without, *both* three times as many; where the backward encodes again instead of keeping what is as large as all links,
*both* can't exceed 75%. *Backward, operations executed* counts what the code runs (found by a dry run), and is timed
alone.
"""
ONE_SAMPLE = """\
With one sample nearly every matrix serves a few rows alone, and no pass is faster than reading the tables. They are
{size}; reading them once (summed: {read:.1f} GB/s; copied, read and written: {copied:.1f} GB/s) takes {share}% of what
the forward pass of batch 1 does."""
SECTIONS = {
    "translution": """\
## Translution

192 channels, 3 heads, one register (CLS); queries, keys and values all relative; `stream` on the torch backend.
""",
    "sparse": """\
## Causal order and windows

Time follows the links: what is not linked is not computed. `stream` on torch, 192 channels, 3 heads.
""",
    "alpha": """\
## Alpha-Translution

Rank 8 for each head, 192 channels, 3 heads, one register. *SDPA* is ordinary attention over the same tokens:
`scaled_dot_product_attention` between projections of the same width.
""",
    "growth": """\
## Growth

`stream` on torch. The exponent is the slope of the straight line through the logarithms of the medians, with its 95%
interval; beside it that of the operations which the cost model counts, fitted at the same points, and the slope between
the two largest points alone.
""",
    "operators": """\
## Operators, backends and torch's own kernels

Milliseconds; candidates of a row took turns, and those in bold can't be told from the fastest. Columns in code style
are this library's backends and algorithms; the others are in `benchmarks/baseline.py` and `benchmarks/peers.py`.
""",
    "memory": """\
## Peak memory

Of a process of its own, beyond tokens and parameters; gradients of the parameters are part of it.
""",
}


def _table(head: list[str], rows: list[list[str]], texts: int = 1) -> list[str]:
    return [*table(head, rows, texts), ""]


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120)


def _provisional(data: Data) -> list[str]:
    """A warning where other work took turns on the machine, or it was not measured as the aims ask for."""
    busy = [name for name, found in data.items() if max(found["settings"]["load"]) > found["settings"]["threads"] + 0.5]
    other = [name for name, found in data.items() if found["settings"]["threads"] != AIMED_THREADS]
    short = [name for name in data if name in TIMED and data[name]["settings"]["rounds"] < ENOUGH_ROUNDS]
    told = [
        f"{', '.join(names)}: {what}"
        for names, what in (
            (busy, "other work ran on the machine (the load is below), so figures may be off by any factor"),
            (other, f"not on {AIMED_THREADS} threads, for which the aims are"),
            (short, f"fewer than {ENOUGH_ROUNDS} rounds"),
        )
        if names
    ]
    return [_wrapped(f"**Provisional.** {'; '.join(told)}."), ""] if told else []


def _settings(data: Data) -> list[str]:
    rows = []
    for name in (name for name in NAMES if name in data):
        own = data[name]["settings"]
        versions = ", ".join(f"{package} {number}" for package, number in own["versions"].items())
        before, after = own["load"]
        rows.append(
            [
                name, own["date"], f"{own['machine']['processor']}, {own['machine']['cores']} cores",
                str(own["threads"]), versions, str(own["rounds"]), "yes" if own.get("rest") else "no",
                f"{before:.1f} and {after:.1f}",
                f"{own['took_seconds'] / 60:.1f}",
            ]
        )  # fmt: skip
    head = ["family", "date", "machine", "threads", "versions", "rounds", "rest", "load before and after", "minutes"]
    return [
        "## Where and when",
        "",
        LOAD,
        *_table(head, rows, 5),
    ]


def _aims(data: Data) -> list[str]:
    rows = []
    for aim, found in judged(data):
        shown = "not measured" if found is None else f"{found.shown(aim.digits, aim.factor)}{aim.unit}"
        verdict = "" if found is None else "reached" if aim.reached(found) else "**not reached**"
        rows.append([aim.text, aim.bounds, shown, verdict])
    kept = sum(row[3] == "reached" for row in rows)
    return [
        "## Aims",
        "",
        _wrapped(f"{kept} of {len(rows)} are reached, judged by the median. {YARDSTICKS}"),
        "",
        *_table(["", "aim", "measured", ""], rows, 4),
    ]


def _translution(family: Data) -> list[str]:
    every = [(group["name"], case) for group in family["groups"] for case in group["cases"]]
    lines, rows = [], []
    for _, case in every:
        if "machine" in case:
            continue
        for which in case["passes"]:
            own, theirs = seconds(case, which), seconds(case, which, "authors")
            rows.append([f"`{case['spec']}`, batch {case['batch']}", which, spread(own).shown(1, 1e3),
                         spread(theirs).shown(0, 1e3), f"**{ratio(theirs, own).shown(0)}**"])  # fmt: skip
    lines += _table(["", "pass", "`stream`, ms", "authors' algorithm, ms", "times as fast"], rows, 2)
    lines += [
        COUNTED,
    ]
    rows = []
    for name, case in ((name, case) for name, case in every if "machine" in case):
        machine = case["machine"]
        for which in case["passes"]:
            reached, large, fastest = shares(case, which)
            executed = case["passes"][which]["executed_flops"] / case["useful_flops"]
            rows.append([name, SHARES[which], spread(seconds(case, which)).shown(1, 1e3), f"{executed:.2f}",
                         f"**{reached.shown(0, 100)}**", large.shown(0, 100),
                         "" if fastest is None else fastest.shown(0, 100)])  # fmt: skip
        large_rates = [
            [machine["large_product_flops"] / one / 1e9 for one in machine["seconds"].get(candidate, ())]
            for candidate in ("large product", ONEDNN)
        ]
        bare = [machine["products_flops"] / one / 1e9 for one in machine["seconds"]["products"]]
        rows.append([name, "GFLOP/s of these products", "", "", spread(bare).shown(0),
                     *(spread(rate).shown(0) if rate else "" for rate in large_rates)])  # fmt: skip
    head = ["", "", "ms", "executed / useful forward", "% of its own products' rate", "% of one large product's rate",
            "% of one by oneDNN"]  # fmt: skip
    lines += _table(head, rows, 2)
    lines += ["![share of the products' rate](performance/shares.svg)", ""]
    (one,) = cases({"translution": family}, "translution", "7x7 + 1, batch 1")
    machine = one["machine"]
    read, copied = (median(machine["seconds"][f"tables {how}"]) for how in ("read", "copied"))
    size = machine["table_bytes"]
    tables = ONE_SAMPLE.format(
        size=formatted_bytes(size),
        read=size / read / 1e9,
        copied=2 * size / copied / 1e9,
        share=table_share(one).shown(0, 100),
    )
    return [*lines, _wrapped(tables), ""]


def _sparse(family: Data) -> list[str]:
    rows = []
    for group in family["groups"]:
        first, second = group["cases"]
        for which in first["passes"]:
            own, full = seconds(first, which), seconds(second, which)
            rows.append([f"`{first['spec']}`, batch {first['batch']}", which, spread(own).shown(1, 1e3),
                         spread(full).shown(1, 1e3), f"**{ratio(own, full).shown(2)}**",
                         f"{first['links'] / second['links']:.2f}"])  # fmt: skip
    return _table(["", "pass", "ms", "all pairs, ms", "ratio", "ratio of the links"], rows, 2)


def _alpha(family: Data) -> list[str]:
    beside, against = [], []
    for group in family["groups"]:
        alpha, *attention = group["cases"]
        for which in alpha["passes"]:
            name = f"`{alpha['spec']}`, batch {alpha['batch']}"
            own = seconds(alpha, which)
            row = [name, which, spread(own).shown(1, 1e3)]
            if attention:
                theirs = seconds(attention[0], which, "SDPA")
                beside.append([*row, spread(theirs).shown(1, 1e3), f"**{ratio(own, theirs).shown(1)}**"])
            else:
                theirs = seconds(alpha, which, "authors' alpha")
                against.append([*row, spread(theirs).shown(0, 1e3), f"**{ratio(theirs, own).shown(1)}**"])
    return [
        *_table(["", "pass", "`stream`, ms", "SDPA, ms", "multiple of SDPA"], beside, 2),
        *_table(["", "pass", "`stream`, ms", "authors' algorithm, ms", "times as fast"], against, 2),
    ]


def _growth(family: Data) -> list[str]:
    rows = []
    for group in family["groups"]:
        curve = group["cases"]
        for which in (FORWARD, TRAINING):
            values = [case["value"] for case in curve]
            rows.append([f"{group['name']}, {group['variable']} = {min(values):g} to {max(values):g}", which,
                         f"**{time_exponent(curve, which).shown(2)}**", operations_exponent(curve, which).shown(2),
                         f"{last_exponent(curve, which):.2f}"])  # fmt: skip
    head = ["over", "pass", "exponent of the time", "of the operations", "between the last two"]
    return [*_table(head, rows, 2), "![growth of the time](performance/growth.svg)", ""]


def _kind(case: Data) -> str:
    named = {name for found in case["passes"].values() for name in (*found["seconds"], *found["skipped"])}
    return "convolution" if "conv2d" in named else "attention" if "SDPA" in named else "a matrix per displacement"


def _operators(family: Data) -> list[str]:
    every = [case for group in family["groups"] for case in group["cases"]]
    lines: list[str] = []
    for kind in dict.fromkeys(map(_kind, every)):
        own = [case for case in every if _kind(case) == kind]
        names = list(
            dict.fromkeys(name for case in own for found in case["passes"].values() for name in found["seconds"])
        )
        rows = []
        for case in own:
            for which, found in case["passes"].items():
                timings = {name: Timing(tuple(values)) for name, values in found["seconds"].items()}
                best = contenders(timings)
                cells = [spread(timings[name].seconds).shown(1, 1e3) if name in timings else "" for name in names]
                cells = [f"**{cell}**" if name in best else cell for name, cell in zip(names, cells, strict=True)]
                rows.append([f"`{case['spec']}`, batch {case['batch']}", which, *cells])
        lines += [f"### {kind.capitalize()}", ""]
        lines += _table(["", "pass", *(f"`{n}`" if n.startswith(("torch", "numpy")) else n for n in names)], rows, 2)
    reasons: dict[str, list[str]] = {}
    for case in every:
        for which, found in case["passes"].items():
            for name, reason in found["skipped"].items():
                reasons.setdefault(f"{name}: {reason}", []).append(which)
    lines += ["Not run here:", ""]
    lines += [f"- {', '.join(dict.fromkeys(passes))}: {text}" for text, passes in reasons.items()]
    return [*lines, ""]


def _memory(family: Data) -> list[str]:
    rows = [
        [f"`{row['spec']}`, batch {row['batch']}", row["which"], row["candidate"], formatted_bytes(row["peak_bytes"])]
        for row in family["peaks"]
    ]
    return _table(["", "pass", "algorithm", "peak"], rows, 3)


WRITERS = {
    "translution": _translution,
    "sparse": _sparse,
    "alpha": _alpha,
    "growth": _growth,
    "operators": _operators,
    "memory": _memory,
}


def page(data: Data) -> str:
    """docs/performance.md."""
    lines = [INTRODUCTION, *_provisional(data), *_aims(data)]
    for name in (name for name in NAMES if name in data):
        lines += [SECTIONS[name], *WRITERS[name](data[name])]
    return "\n".join([*lines, *_settings(data)]).rstrip() + "\n"


def write_page(source: Path = DOCS / "performance.json", folder: Path = DOCS) -> str:
    """Write the page and its plots into ``folder``, and return the page."""
    data = json.loads(source.read_text(encoding="utf-8"))
    text = page(data)
    (folder / "performance.md").write_text(text, encoding="utf-8")
    if "translution" in data:
        plot_shares(data["translution"], folder / "performance" / "shares.svg")
    if "growth" in data:
        plot_growth(data["growth"], folder / "performance" / "growth.svg")
    return text
