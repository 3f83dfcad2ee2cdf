"""What ``bench`` and ``pick`` show: a table, one sentence, and time against memory as a picture."""

from pathlib import Path

from rich.markup import escape

from translution.display import formatted_bytes, new_console, titled_table
from translution.selection import Entry, Selection
from translution.spec import Lattice


def formatted_seconds(seconds: float) -> str:
    """With three digits and the unit that suits."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _times(entry: Entry) -> tuple[str, str]:
    if entry.timing is None:
        return "", ""
    low, high = entry.timing.interval
    return formatted_seconds(entry.timing.median), f"{formatted_seconds(low)} to {formatted_seconds(high)}"


def _ratio(entry: Entry, selection: Selection) -> str:
    best = selection.entries[0]
    if entry.timing is None or best.timing is None:
        return ""
    return f"{entry.timing.ratio(best.timing)[0] * best.batch / entry.batch:.2f}x"


def verdict(selection: Selection) -> str:
    """What was chosen and why, in one sentence."""
    chosen = selection.chosen
    if chosen is None:
        return "Nothing is left: the table says why each candidate is out."
    if selection.is_clear:
        return f"{chosen.name} has the best {selection.objective}."
    others = ", ".join(entry.name for entry in selection.tied if entry is not chosen)
    return f"No clear winner: {chosen.name} and {others} can't be told apart. The simplest is {chosen.name}."


def show_selection(selection: Selection, title: str) -> None:
    """Print the table and the verdict."""
    request, shown = selection.request, new_console()
    layout = request.operator.layout
    place = f"Lattice {layout.grid}" if isinstance(layout, Lattice) else f"{layout.num_queries} queries"
    what = "forward and backward" if request.gradient else "forward"
    numbers = ("batch", "time", "interval 95%", "for an item", "peak memory", "of its bound")
    table = titled_table(
        f"{title}: {what}, {place}, {request.dtype} on {request.device}",
        *("candidate", *numbers, "verdict"),
        numbers=numbers,
    )
    for entry in selection.entries:
        found = "[green]chosen[/]" if entry is selection.chosen else "tied" if entry in selection.tied else ""
        table.add_row(
            entry.name,
            str(entry.batch),
            *_times(entry),
            _ratio(entry, selection),
            "" if entry.peak is None else formatted_bytes(entry.peak),
            "" if entry.share is None else f"{100 * entry.share:.2g}%",
            f"[dim]out: {escape(entry.out.splitlines()[0])}[/]" if entry.out else found,
        )
    shown.print(table)
    shown.print(f"[bold]{verdict(selection)}[/]", highlight=False)


def plot_selection(selection: Selection, path: Path) -> None:
    """Time against memory, with the intervals; PNG, SVG or what else matplotlib writes by the file's ending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for entry in selection.entries:
        if entry.timing is None or entry.peak is None:
            continue
        low, high = (bound / entry.batch * 1e3 for bound in entry.timing.interval)
        middle, mebibytes = entry.per_item * 1e3, max(entry.peak / 2**20, 2**-10)
        best = entry is selection.chosen
        axes.errorbar(
            middle, mebibytes, xerr=[[middle - low], [high - middle]], fmt="o", capsize=4,
            color="C2" if best else "C0", markersize=9 if best else 6,
        )  # fmt: skip
        label = f"{entry.name}, batch {entry.batch}" if selection.objective == "throughput" else entry.name
        axes.annotate(label, (middle, mebibytes), textcoords="offset points", xytext=(8, 6), fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="ms for an item (95% interval)", ylabel="peak memory, MiB")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.margins(0.25)
    axes.grid(True, which="both", alpha=0.25)
    what = "forward and backward" if selection.request.gradient else "forward"
    axes.set_title(f"{what}, batch {selection.request.batch}, {selection.request.dtype}: time against memory")
    figure.savefig(path, dpi=150)
