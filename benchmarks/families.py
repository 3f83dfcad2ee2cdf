"""What is measured: families of cases. Sizes are those of the paper's smallest model, 192 channels and 3 heads.

All candidates of all cases in a group take turns in the same rounds, so that cases can be compared as well.
"""

from dataclasses import dataclass

from workload import BACKWARD, FORWARD, MACHINE, TRAINING, Case

_FULL = "translution2d:height={0},width={0},dim=192,num_heads=3,registers=1"
_WINDOW = "translution2d:height=14,width=14,dim=192,num_heads=3,kernel_size=5"
_SEQUENCE = "translution1d:length=160,dim=192,num_heads=3,causal={}"
_ALPHA = "alpha_translution2d:height={0},width={0},dim=192,num_heads=3,registers=1,rank={1}"
_ATTENTION = "self_attention2d:height={0},width={0},dim=192,num_heads=3,registers=1"
_ORDERED = "self_attention1d:length={},dim=192,num_heads=3,causal=true"
_NEIGHBOURHOOD = "neighborhood_attention2d:height={0},width={0},dim=128,num_heads=4,kernel_size={1}"
_CONVOLUTION = "convolution2d:height={0},width={0},in_channels={1},out_channels={1},kernel_size=3,padding=1"
_GROWING = "translution2d:height={0},width={0},dim=64,num_heads=1"
# Wide enough that at the fewest tokens, too, products take longer than calling them.
_WIDE = "translution2d:height={0},width={0},dim=192,num_heads=3"
LARGE_WINDOW = "translution2d:height=64,width=64,dim=64,num_heads=1,kernel_size=7"


@dataclass(frozen=True)
class Group:
    """Cases that are measured in the same rounds. A growth curve runs over ``variable``."""

    name: str
    cases: tuple[Case, ...]
    variable: str = ""


@dataclass(frozen=True)
class Peak:
    """One pass of one candidate whose peak memory is measured in a process of its own."""

    spec: str
    batch: int
    candidate: str
    which: str

    @property
    def case(self) -> Case:
        """As a case."""
        return Case(self.spec, self.batch, (self.candidate,), (self.which,))


def _shares(side: int, batch: int) -> Case:
    return Case(_FULL.format(side), batch, ("torch stream", *MACHINE), (FORWARD, BACKWARD, TRAINING))


def _alone(name: str, case: Case) -> Group:
    return Group(name, (case,))


def _curve(name: str, variable: str, cases: dict[float, tuple[str, int]]) -> Group:
    found = tuple(Case(spec, batch, value=value) for value, (spec, batch) in cases.items())
    return Group(name, found, variable)


_RELATIVE = ("torch stream", "torch pairwise", "numpy stream", "triton fused")
_PLAIN = ("torch sdpa", "torch stream", "torch pairwise", "numpy stream", "triton fused", "SDPA", "flex")
TIMED: dict[str, tuple[Group, ...]] = {
    "translution": (
        _alone("against the authors' algorithm", Case(_FULL.format(7), 4, ("torch stream", "authors"))),
        *(
            _alone(f"{side}x{side} + 1, batch {batch}", _shares(side, batch))
            for side, batch in ((4, 32), (7, 1), (7, 32), (14, 16))
        ),
    ),
    "sparse": (
        Group("causal order", tuple(Case(_SEQUENCE.format(causal), 8) for causal in ("true", "false"))),
        Group("window", tuple(Case(spec, 8) for spec in (_WINDOW, _WINDOW.removesuffix(",kernel_size=5")))),
    ),
    "alpha": (
        *(
            Group(
                f"against attention, {side}x{side} + 1, batch {batch}",
                (Case(_ALPHA.format(side, 8), batch), Case(_ATTENTION.format(side), batch, ("SDPA",))),
            )
            for side, batch in ((7, 32), (14, 8))
        ),
        *(
            _alone(
                f"against the authors' algorithm, {side}x{side} + 1, batch {batch}",
                Case(_ALPHA.format(side, 8), batch, ("torch stream", "authors' alpha")),
            )
            for side, batch in ((7, 8), (14, 4))
        ),
    ),
    "growth": (
        _curve("tokens", "N", {side**2: (_WIDE.format(side), 16) for side in (10, 14, 18, 22)}),
        _curve(
            "tokens, window of 7x7",
            "N",
            {side**2: (f"{_GROWING.format(side)},kernel_size=7", 2) for side in (16, 24, 32, 48, 64)},
        ),
        _curve("batch", "B", {batch: (_FULL.format(7), batch) for batch in (1, 2, 4, 8, 16, 32, 64)}),
        _curve("width", "C", {dim: (_FULL.format(7).replace("192", str(dim)), 8) for dim in (48, 96, 192, 384)}),
        _curve(
            "window on 28x28",
            "k",
            {size: (f"{_GROWING.format(28)},kernel_size={size}", 8) for size in (3, 5, 7, 11, 15)},
        ),
        _curve("rank of alpha", "r", {rank: (_ALPHA.format(14, rank), 8) for rank in (2, 4, 8, 16, 32)}),
    ),
    "operators": tuple(
        _alone(case.name, case)
        for case in (
            Case(_FULL.format(4), 8, (*_RELATIVE, "authors")),
            Case(_FULL.format(7), 2, (*_RELATIVE, "authors")),
            Case("translution1d:length=64,dim=192,num_heads=3,causal=true", 8, _RELATIVE),
            Case(_WINDOW, 2, _RELATIVE),
            Case(_ALPHA.format(4, 8), 32, (*_RELATIVE, "authors' alpha")),
            Case(_ALPHA.format(7, 8), 8, (*_RELATIVE, "authors' alpha")),
            Case(_ATTENTION.format(7), 32, _PLAIN),
            Case(_ATTENTION.format(14), 8, _PLAIN),
            Case(_ORDERED.format(160), 8, _PLAIN),
            Case(_ORDERED.format(512), 4, _PLAIN),
            Case(_NEIGHBOURHOOD.format(14, 5), 8, (*_PLAIN, "neighbourhood")),
            Case(_NEIGHBOURHOOD.format(28, 7), 4, (*_PLAIN, "neighbourhood")),
            Case(_CONVOLUTION.format(28, 64), 8, ("torch conv", *_RELATIVE, "conv2d")),
            Case(_CONVOLUTION.format(14, 128), 16, ("torch conv", *_RELATIVE, "conv2d")),
        )
    ),
}
WEIGHED: dict[str, tuple[Peak, ...]] = {
    "memory": tuple(
        Peak(spec, batch, candidate, which)
        for spec, batch, candidates in (
            (_FULL.format(7), 4, ("torch stream", "authors")),
            (_ALPHA.format(14, 8), 4, ("torch stream", "authors' alpha")),
            (LARGE_WINDOW, 1, ("torch stream",)),
        )
        for candidate in candidates
        for which in (FORWARD, TRAINING)
    )
}
NAMES = (*TIMED, *WEIGHED)
