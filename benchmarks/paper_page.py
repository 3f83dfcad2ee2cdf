"""Writes docs/paper.md from paper_page.md, docs/results/*.json, docs/performance.json and the models' descriptions.

``python benchmarks/paper_page.py --digits DIR --text DIR`` first takes the results and plots of finished experiments,
DIR being their ``--output``. Nothing is run here.
"""

import argparse
import json
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from string import Template
from typing import Any

from markdown import table
from reading import Data, ratio, seconds, spread

from translution.display import formatted_bytes
from translution.paper.experiments.statistics import Estimate
from translution.paper.parameter_table import paper_rows

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results"
TEMPLATE = Path(__file__).with_name("paper_page.md")
PLOTS = {"digits": ("distance.png", "training.png"), "text": ("training.png",)}
NAMES = {
    "none": "attention, no positions",
    "attention": "self-attention, position embedding",
    "wide": "the same, with as many parameters as Translution",
    "swin": "Swin bias",
    "shaw": "Shaw vectors",
    "rope": "RoPE",
    "convit": "ConViT",
    "alpha": "alpha-Translution",
    "translution": "Translution",
    "cnn": "CNN",
}
SMALLER = """\
The size that a CPU can do in minutes has the paper's images and its 7 x 7 grid of patches, but a model of {dim}
features and {depth} layers instead of 192 and 6, {train:,} digits to train on instead of 60,000, and {steps} updates of
{batch_size} digits. So the accuracies can't be the paper's; what can be compared is which model is ahead, and where."""
NOT_RUN = "Not run yet at any size. `{command}` does it."


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False)


def read_results() -> dict[str, Any]:
    """Experiment -> what it found, of those that were run."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def _parameters() -> list[str]:
    rows = [[row.name, row.printed, f"{row.exact:,}"] for row in paper_rows()]
    wrong = [row.name for row in paper_rows() if row.description.num_parameters != row.exact]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: the models' descriptions give another number of parameters")
    return table(["", "the paper", "here"], rows)


def _where(found: Mapping[str, Any], hours: float) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    machine = found["machine"]
    seeds = f"{found['seeds']} seed{'s' * (found['seeds'] > 1)}"
    return _wrapped(
        f"`{found['command']}`: {seeds}; {machine['processor']}, {machine['cores']} cores; {versions}; "
        f"{60 * hours:.0f} minutes of one processor in all."
    )


def _experiment(found: Mapping[str, Any]) -> list[str]:
    """Its tables: the figures beside the paper's, and what is beyond attention."""
    names = [figure["name"] for figure in found["summary"][0]["figures"]]
    rows, beyond = [], []
    for row in found["summary"]:
        figures = row["figures"]
        pairs = [
            [Estimate(**f["measured"]).shown(digits=2), "" if f["paper"] is None else f"{f['paper']:.2f}"]
            for f in figures
        ]
        label = NAMES[row["model"]]
        rows.append([label, f"{row['parameters']:,}", *chain.from_iterable(pairs), f"{row['seconds']:,.0f}"])
        if figures[0]["beyond_attention"] is not None:
            beyond.append([label, *(_marked(Estimate(**f["beyond_attention"])) for f in figures)])
    head = [
        "",
        "parameters",
        *chain.from_iterable((name, "the paper") for name in names),
        "seconds of a processor each",
    ]
    lines = table(head, rows)
    if beyond:
        said = "Beyond self-attention, seed by seed; bold where the interval leaves out zero:"
        lines += ["", said, "", *table(["", *names], beyond)]
    return lines


def _marked(beyond: Estimate) -> str:
    shown = beyond.shown(digits=2, sign=True)
    return f"**{shown}**" if beyond.is_apart_from_zero else shown


def _verdict(found: Mapping[str, Any], figure: int, better: int) -> str:
    """Which of the paper's orders holds in a figure: between attention, alpha and Translution."""
    own = {row["model"]: row["figures"][figure] for row in found["summary"]}
    said = []
    for model in ("alpha", "translution"):
        found_beyond = own[model]["beyond_attention"] if model in own else None
        if found_beyond is None or found_beyond["half_width"] is None:
            continue
        beyond = Estimate(**found_beyond)
        how = "can't be told from"
        if beyond.is_apart_from_zero:
            how = "is better than" if better * beyond.mean > 0 else "is worse than"
        said.append(f"{NAMES[model]} {how} self-attention ({beyond.shown(digits=2, sign=True)})")
    return f"{own['attention']['name'].capitalize()}: {'; '.join(said)}." if said else ""


def _verdicts(found: Mapping[str, Any], figures: Iterable[int], better: int) -> list[str]:
    said = [f"- {verdict}" for figure in figures if (verdict := _verdict(found, figure, better))]
    return ["", *said] if said else ["", "One seed has no interval, so nothing is said of differences."]


def _hours(found: Mapping[str, Any]) -> float:
    return float(sum(run["processor_seconds"] for run in found["runs"])) / 3600


def _digits(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [NOT_RUN.format(command="translution paper digits")]
    scale = found["scale"]
    smaller = SMALLER.format(**scale["size"], train=found["data"]["digits"]["train"], steps=scale["steps"],
                             batch_size=scale["batch_size"])  # fmt: skip
    lines = [_wrapped(smaller), "", _where(found, _hours(found)), "", "Accuracy in percent:", "", *_experiment(found)]
    lines += _verdicts(found, range(3), better=1)
    plots = ("digits-distance.png", "digits-training.png")
    lines += ["", *(f"![{plot.split('-')[1].split('.')[0]}](results/{plot})" for plot in plots)]
    return lines


def _text(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [NOT_RUN.format(command="translution paper text")]
    scale, tokens = found["scale"], found["data"]["tokens"]
    what = (
        f"Models of {scale['size']['dim']} features and {scale['size']['depth']} layers, windows of {scale['length']}, "
        f"{scale['steps']} updates of {scale['batch_size']} windows; {tokens['train']:,} bytes to train on and "
        f"{tokens['held_out']:,} held out."
    )
    lines = [_wrapped(what), "", _where(found, _hours(found)), "", *_experiment(found)]
    return [
        *lines,
        *_verdicts(found, (0,), better=-1),
        "",
        "![training](results/text-training.png)",
    ]


def _times(performance: Data) -> list[str]:
    rows = []
    for family, theirs in (("translution", "authors"), ("alpha", "authors' alpha")):
        for case in (case for group in performance[family]["groups"] for case in group["cases"]):
            for which in case["passes"]:
                if theirs not in case["passes"][which]["seconds"]:
                    continue
                own, other = seconds(case, which), seconds(case, which, theirs)
                rows.append([f"`{case['spec']}`, batch {case['batch']}", which, spread(own).shown(1, 1e3),
                             spread(other).shown(0, 1e3), f"**{ratio(other, own).shown(1)}**"])  # fmt: skip
    return table(["", "pass", "`stream`, ms", "authors' algorithm, ms", "times as fast"], rows, 2)


def _memory(performance: Data) -> list[str]:
    rows, found = [], performance["memory"]["peaks"]
    peaks = {(one["spec"], one["batch"], one["which"], one["candidate"]): one["peak_bytes"] for one in found}
    for (spec, batch, which, candidate), size in peaks.items():
        own = peaks.get((spec, batch, which, "torch stream"))
        if candidate.startswith("authors") and own is not None:
            rows.append([f"`{spec}`, batch {batch}", which, formatted_bytes(own), formatted_bytes(size),
                         f"**{size / own:.0f}**"])  # fmt: skip
    return table(["", "pass", "`stream`", "authors' algorithm", "times as much"], rows, 2)


def page(results: Mapping[str, Any], performance: Data) -> str:
    """The text of docs/paper.md."""
    parts = {
        "parameters": _parameters(),
        "digits": _digits(results.get("digits")),
        "text": _text(results.get("text")),
        "times": _times(performance),
        "memory": _memory(performance),
    }
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute({name: "\n".join(lines) for name, lines in parts.items()})


def take(name: str, folder: Path) -> None:
    """Copy the results and plots of an experiment into docs/results."""
    RESULTS.mkdir(exist_ok=True)
    shutil.copyfile(folder / "results.json", RESULTS / f"{name}.json")
    for plot in PLOTS[name]:
        shutil.copyfile(folder / plot, RESULTS / f"{name}-{plot}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in PLOTS:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR")
    for name, folder in vars(parser.parse_args()).items():
        if folder is not None:
            take(name, folder)
    performance = json.loads((DOCS / "performance.json").read_text(encoding="utf-8"))
    (DOCS / "paper.md").write_text(page(read_results(), performance), encoding="utf-8")
    print(f"{DOCS / 'paper.md'} says what {', '.join(read_results()) or 'no experiment'} found")


if __name__ == "__main__":
    main()
