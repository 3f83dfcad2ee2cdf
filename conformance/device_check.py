"""``python -m translution.conformance.device_check``: the kernels on this machine's GPU against the exact results.

Everything else about the kernels is tested without a GPU; this proves the rest. Exit code 0 where every result and
every gradient is within its running error bound and comes out the same twice, 1 where one is not, 2 without a GPU.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import translution
from translution.backends.triton import claims
from translution.backends.triton.targets import INTERPRETED
from translution.conformance.comparison import share, worst_error
from translution.conformance.error_model import budget
from translution.spec import Lattice, Mean, Operator, PerDisplacement, presets

Array = npt.NDArray[Any]
DTYPES = ("float32", "float16", "bfloat16")


def operators() -> dict[str, Operator]:
    """Cases whose tiles, chunks and warps are those of real sizes; small enough for an exact result in float64."""
    return {
        "translution 7x7, CLS": presets.translution((7, 7), 96, 3, head_dim=32, registers=1),
        "translution 5x5, head 64, biases": presets.translution((5, 5), 128, 2, qkv_bias=True),
        "translution 4x4, head 128": presets.translution((4, 4), 128, 1),
        "translution 9x8, odd sizes": presets.translution((9, 8), 37, 3, head_dim=13),
        "translution 3x4x3": presets.translution((3, 4, 3), 32, 2),
        "causal 48": presets.translution((48,), 64, 2, causal=True),
        "causal raster 6x6": presets.translution((6, 6), 48, 2, causal=True, registers=2),
        "window 5x5 on 12x12": presets.translution((12, 12), 32, 2, kernel_size=5),
        "queries and keys only": presets.translution((6, 6), 64, 2, roles="qk"),
        "values only": presets.translution((6, 6), 64, 2, roles="v"),
        "alpha 7x7, CLS": presets.alpha_translution((7, 7), 96, 3, registers=1),
        "alpha causal, rotary": presets.alpha_translution((32,), 64, 2, causal=True, rotary=True),
        "attention across": presets.self_attention((9,), 64, 2, key_grid=(17,)),
        "window bias": presets.swin_attention((7, 7), 64, 2),
        "convolution 3x3": presets.convolution((15, 15), 70, 100, 3, stride=2, padding=1),
        "mean": Operator(Lattice((9, 9), kernel_size=3), 64, 2, PerDisplacement(64), relevance=Mean()),
    }


@dataclass(frozen=True, slots=True)
class Found:
    """One case: its worst error and the same as a share of the bound, the gradients' share, and ``trouble`` where it
    did not run to the end or a second call gave other bits.
    """

    name: str
    dtype: str
    batch: int
    error: float
    share: float
    gradients: float
    seconds: float
    trouble: str = ""

    @property
    def passed(self) -> bool:
        """Whether every element is within its bound."""
        return not self.trouble and max(self.share, self.gradients) <= 1


def drawn(
    operator: Operator, batch: int, seed: int
) -> tuple[dict[str, Array], Array, Array | None, npt.NDArray[np.bool_] | None]:
    """Parameters, x, y and, for an even seed under softmax or mean, a key-padding mask; float64."""
    rng, layout = np.random.default_rng(seed), operator.layout
    params = {name: rng.standard_normal(shape) * shape[-2 if len(shape) > 1 else -1] ** -0.5
              for name, shape in operator.parameters.items()}  # fmt: skip
    x = rng.standard_normal((batch, layout.num_queries, operator.dim))
    y = None if layout.is_self else rng.standard_normal((batch, layout.num_keys, operator.keys_dim))
    mask = rng.random((batch, 1, 1, layout.num_keys)) < 0.8 if seed % 2 == 0 else None
    return params, x, y, mask


def measured(name: str, operator: Operator, dtype: str, batch: int, seed: int, device: str) -> Found:
    """One case on the device."""
    params, x, y, mask = drawn(operator, batch, seed)

    def rounded(value: Array) -> torch.Tensor:
        return torch.from_numpy(value).to(getattr(torch, dtype))

    def exact(value: Array) -> Array:
        wide: Array = rounded(value).double().numpy()
        return wide

    cotangent = np.random.default_rng(seed).standard_normal((batch, operator.layout.num_queries, operator.out_features))
    own: Mapping[str, torch.Tensor] = {key: rounded(value).to(device) for key, value in params.items()}
    given: dict[str, Any] = {
        "y": None if y is None else rounded(y).to(device),
        "mask": None if mask is None else torch.from_numpy(mask).to(device),
    }

    def answers() -> dict[str, Array]:
        out = translution.run(operator, own, rounded(x).to(device), **given, backend="triton")
        _, found = translution.vjp(
            operator, own, rounded(x).to(device), **given, cotangent=rounded(cotangent).to(device), backend="triton"
        )
        every = {"out": out, **found.params, "x": found.x} | ({} if found.y is None else {"y": found.y})
        return {key: value.double().cpu().numpy() for key, value in every.items()}

    start = time.perf_counter()
    results = answers()
    seconds = time.perf_counter() - start
    changed = [key for key, value in answers().items() if not np.array_equal(value, results[key], equal_nan=True)]
    wide = {key: exact(value) for key, value in params.items()}
    bounded = budget(operator, wide, exact(x), None if y is None else exact(y), mask, exact(cotangent), dtype=dtype)
    result = results.pop("out")
    used = share(name, result, bounded.value, bounded.out)
    worst = max(
        share(f"{name}, gradient of {of}", value, bounded.gradient_values[of], bounded.gradients[of])
        for of, value in results.items()
    )
    trouble = f"a second call gave other bits: {', '.join(changed)}" if changed else ""
    error = worst_error(name, result, bounded.value)
    return Found(name, dtype, batch, error, used, worst, seconds, trouble)


def every_case(chosen: Sequence[str], batches: Sequence[int], device: str) -> Iterator[Found]:
    """Every operator in every dtype and batch size; a failure to run is a result too."""
    for number, (name, operator) in enumerate(operators().items()):
        for dtype in chosen:
            for batch in batches:
                try:
                    yield measured(name, operator, dtype, batch, number + batch, device)
                except Exception:  # noqa: BLE001 - a kernel that does not compile or run must not hide the other cases
                    yield Found(
                        name, dtype, batch, float("nan"), float("inf"), float("inf"), 0.0, traceback.format_exc()
                    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every case and show one row each."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m translution.conformance.device_check", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be given again; all by default")
    parser.add_argument("--batch", action="append", type=int, help="may be given again; 1 and 5 by default")
    given = parser.parse_args(arguments)
    console = Console()
    on_gpu = torch.device(given.device).type == "cuda"
    missing = [claims.NO_DEVICE] if on_gpu and not torch.cuda.is_available() else claims.unavailable()
    if on_gpu and INTERPRETED:
        missing.append("TRITON_INTERPRET is set: the kernel would be interpreted, not compiled; unset it")
    if missing:
        console.print("\n".join(missing))
        return 2
    columns = ("case", "dtype", "batch", "worst error", "share of bound", "of gradients", "first call", "")
    table = Table(*columns, title=f"triton on {given.device}")
    failures = []
    for found in every_case(given.dtype or DTYPES, given.batch or (1, 5), given.device):
        shown = "passed" if found.passed else "FAILED"
        numbers = (f"{found.error:.2e}", f"{found.share:.3f}", f"{found.gradients:.3f}", f"{found.seconds:.2f} s")
        table.add_row(found.name, found.dtype, str(found.batch), *numbers, shown)
        failures += [] if found.passed else [found]
    console.print(table)
    for found in failures:
        if found.trouble:
            console.print(f"{found.name}, {found.dtype}, batch {found.batch}:\n{found.trouble}", markup=False)
    console.print(f"{table.row_count - len(failures)} of {table.row_count} cases within their bounds")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
