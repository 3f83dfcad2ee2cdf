"""``translution explain --devices``: what fits how on several devices, as a table and as JSON."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from translution.command_files import wrong_use
from translution.pick_command import memory_size

if TYPE_CHECKING:
    from translution.algorithms import Request
    from translution.scale import Placement

Devices = Annotated[
    int | None, typer.Option(min=1, help="What fits how on so many devices; the batch is that of all together.")
]
DeviceMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory of each of them, e.g. 80GB; with --devices.")
]
Layers = Annotated[int | None, typer.Option(min=1, help="Count so many operators in a row; with --devices.")]
NUMBERS = (
    "items", "parameters", "gradients", "optimiser", "gathered", "working", "in all", "of memory", "sent", "TFLOP",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scale:
    """The devices that the options name, and how many operators in a row they compute."""

    devices: int
    memory: int
    layers: int

    def show(self, request: "Request") -> tuple[bool, dict[str, Any]]:
        """Print the table; whether any way fits, and the same as data."""
        from translution.display import formatted_bytes, new_console, titled_table
        from translution.errors import NotSupported
        from translution.progress import Progress
        from translution.scale import placements

        try:
            with Progress() as progress:
                found = placements(request, self.devices, self.memory, self.layers, progress.update)
        except NotSupported as error:
            raise wrong_use(str(error)) from error
        count = self.layers * request.operator.num_parameters
        what = "forward and backward with AdamW" if request.gradient else "forward"
        title = (
            f"{self.layers:,} in a row, {count:,} parameters, batch {request.batch:,} in all, {request.dtype}, {what}: "
            f"each of {self.devices:,} devices of {formatted_bytes(self.memory)}"
        )
        table = titled_table(title, "way", *NUMBERS, "fits", numbers=NUMBERS)
        for one in found:
            table.add_row(one.way, *self._cells(one), self._verdict(one, request.batch))
        new_console().print(table)
        data = {
            "devices": self.devices,
            "device_memory": self.memory,
            "layers": self.layers,
            "num_parameters": count,
            "gradient": request.gradient,
            "ways": [_data(one) for one in found],
        }
        return any(not one.reasons for one in found), data

    def _cells(self, one: "Placement") -> list[str]:
        from translution.display import formatted_bytes

        need = one.need
        if need is None:
            return [""] * len(NUMBERS)
        sizes = (need.parameters, need.gradients, need.optimiser, need.gathered, need.working, need.total)
        shown = [formatted_bytes(size) if size else "-" for size in sizes]
        if not need.counted:
            shown[4:] = [f"~ {size}" for size in shown[4:]]
        share, sent = f"{100 * need.total / self.memory:,.0f}%", formatted_bytes(need.sent) if need.sent else "-"
        return [f"{need.items:,}", *shown, share, sent, f"{need.flops / 1e12:,.3g}"]

    def _verdict(self, one: "Placement", batch: int) -> str:
        if one.need is None:
            return "no: " + "; ".join(one.reasons)
        if one.fewest is not None:
            return f"no: {one.fewest:,} would do" if one.fewest else "no number would do"
        if one.reasons:
            return "no"
        idle = one.need.devices - batch if one.way in ("data parallel", "fully sharded") else 0
        return f"[green]yes[/], {idle:,} idle" if idle > 0 else "[green]yes[/]"


def _data(one: "Placement") -> dict[str, Any]:
    need = None if one.need is None else {**asdict(one.need), "total": one.need.total}
    return {"way": one.way, "fits": not one.reasons, "reasons": list(one.reasons), "need": need, "fewest": one.fewest}


def scale_for(
    devices: int | None, device_memory: str | None, layers: int | None, max_memory: str | None
) -> Scale | None:
    """The devices that the options name, None where they name none; exit code 2 where they don't go together."""
    if devices is None and device_memory is None and layers is None:
        return None
    if devices is None or device_memory is None:
        raise wrong_use("--devices, --device-memory (and --layers) go together, e.g. --devices 8 --device-memory 80GB")
    if max_memory is not None:
        raise wrong_use("--max-memory is for one device: leave it out with --devices")
    return Scale(devices, memory_size(device_memory, "--device-memory"), 1 if layers is None else layers)
