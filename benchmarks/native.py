"""What ``conv`` and ``sdpa`` take beside the modules that they are: ``nn.Conv2d`` and ``nn.MultiheadAttention``.

Every pair is compared first; then both take turns in the same rounds. Tokens lie as each side wants them: [B, N, C] for
the operator, [B, C, H, W] for the convolution.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import translution
from translution.backends.torch.modules import from_module
from translution.conformance.comparison import ComparisonError
from translution.plan_file import fingerprint
from translution.trials import Timing, measure

THREADS, WITHIN, LEAST = 2, 1.10, 1e-3
INTRODUCTION = """\
# Special cases beside torch's own modules

`conv` and `sdpa` call torch's kernels for operators that are a convolution or plain attention. Here is the time of a
call as a multiple of that of `nn.Conv2d` or `nn.MultiheadAttention` with the same weights, checks and projections
included: below 1 the operator is faster. Both took turns in the same rounds; a figure is the median of the rounds'
ratios with its 95% interval. float32, {threads} threads, {processor}, torch {torch}.

Where convolutions are faster it is since tokens have their channels last, which oneDNN prefers to a plain [B, C, H, W].

{held} medians of those above 1 ms are at most 1.10. Made by `python benchmarks/native.py`; the same figures,
unrounded: [native.json](native.json).

| | pass | module, ms | ratio |
| --- | --- | ---: | ---: |
"""


@dataclass(frozen=True, slots=True)
class Pair:
    """One module beside its operator: two calls for each pass."""

    name: str
    passes: dict[str, tuple[Callable[[], object], Callable[[], object]]]


def _pair(
    name: str,
    module: nn.Module,
    algorithm: str,
    grid: int | tuple[int, ...],
    tokens: Tensor,
    given: Tensor,
    theirs: Callable[[Tensor], Tensor],
) -> Pair:
    operator, params = from_module(module, grid)
    call = translution.compile(operator, algorithm=algorithm)
    own = {key: value.detach().requires_grad_() for key, value in params.items()}
    with torch.no_grad():
        out, expected = call(own, tokens), theirs(given)
        rows = expected.flatten(2).transpose(1, 2) if expected.dim() == 4 else expected
        if not torch.allclose(out, rows, rtol=1e-4, atol=1e-4):
            raise ComparisonError(f"{name}: results differ by {float((out - rows).abs().max()):g}")
    pull, other_pull = torch.randn_like(out), torch.randn_like(expected)
    leaf, other_leaf = tokens.clone().requires_grad_(), given.clone().requires_grad_()

    def quiet(compute: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(compute)

    def trained() -> object:
        return torch.autograd.grad(call(own, leaf), [leaf, *own.values()], pull)

    def trained_module() -> object:
        return torch.autograd.grad(theirs(other_leaf), [other_leaf, *module.parameters()], other_pull)

    forward = quiet(lambda: call(own, tokens)), quiet(lambda: theirs(given))
    return Pair(name, {"forward": forward, "forward and backward": (trained, trained_module)})


def convolution(
    batch: int, side: int, channels: tuple[int, int], kernel: int, stride: int = 1, groups: int = 1
) -> Pair:
    """``nn.Conv2d`` on square images."""
    module = nn.Conv2d(*channels, kernel, stride, kernel // 2, groups=groups)
    image = torch.randn(batch, channels[0], side, side)
    tokens = image.flatten(2).transpose(1, 2).contiguous()
    name = f"{kernel}x{kernel} convolution, stride {stride}, {groups} groups, {channels[0]} to {channels[1]} channels"
    return _pair(f"{name}, {side}x{side}, batch {batch}", module, "conv", (side, side), tokens, image, module)


def attention(batch: int, length: int, dim: int, heads: int) -> Pair:
    """``nn.MultiheadAttention`` over its own tokens, without returned weights, as it is trained."""
    module = nn.MultiheadAttention(dim, heads, batch_first=True)
    tokens = torch.randn(batch, length, dim)
    name = f"attention over {length} tokens, {dim} channels, {heads} heads, batch {batch}"

    def theirs(x: Tensor) -> Tensor:
        found: Tensor = module(x, x, x, need_weights=False)[0]
        return found

    return _pair(name, module, "sdpa", length, tokens, tokens, theirs)


def pairs() -> Iterator[Pair]:
    """What is compared."""
    yield convolution(8, 56, (64, 64), 3)
    yield convolution(16, 28, (128, 128), 3)
    yield convolution(8, 14, (256, 256), 3)
    yield convolution(4, 112, (32, 64), 3, stride=2)
    yield convolution(8, 28, (128, 128), 1)
    yield convolution(8, 56, (128, 128), 7, groups=128)
    yield convolution(8, 28, (128, 128), 3, groups=4)
    yield convolution(8, 14, (256, 256), 5)
    yield attention(32, 49, 192, 3)
    yield attention(32, 196, 192, 3)
    yield attention(8, 196, 384, 6)
    yield attention(4, 1024, 256, 8)


def main() -> int:
    """0 where every median above a millisecond is at most ``WITHIN``."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    rows = []
    for pair in track(list(pairs()), "pairs", console=Console(stderr=True), transient=True):
        for which, (own, theirs) in pair.passes.items():
            found: dict[str, Timing] = measure({"own": own, "module": theirs})
            middle, low, high = found["own"].ratio(found["module"])
            rows.append({"name": pair.name, "pass": which, "module_seconds": found["module"].median,
                         "ratio": middle, "interval": [low, high]})  # fmt: skip
    long = [row for row in rows if row["module_seconds"] > LEAST]
    short = [row for row in long if row["ratio"] > WITHIN]
    page = INTRODUCTION.format(
        threads=THREADS,
        processor=fingerprint()["machine"]["processor"],
        torch=torch.__version__,
        held=f"{len(long) - len(short)} of {len(long)}",
    )
    for row in rows:
        low, high = row["interval"]
        page += f"| {row['name']} | {row['pass']} | {1e3 * row['module_seconds']:.2f} | "
        page += f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f}) |\n"
    docs = Path(__file__).parents[1] / "docs"
    (docs / "native.md").write_text(page, encoding="utf-8")
    data = {"threads": THREADS, "processors": os.cpu_count(), "torch": torch.__version__, "rows": rows}
    (docs / "native.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    print("\n".join(f"{row['name']}, {row['pass']}: {row['ratio']:.2f}" for row in short) or "all medians hold")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
