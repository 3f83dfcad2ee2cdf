"""Every rule of the spec broken once: the error carries the clause, what was given, the rule and the remedy."""

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from translution.spec import (
    BiasTable,
    Clip,
    Concat,
    Identity,
    Lattice,
    LogBuckets,
    LowRank,
    LowRankOutput,
    Mixture,
    Ones,
    Operator,
    PairTable,
    PerDisplacement,
    QuadraticBias,
    Rotary,
    Shared,
    SlopeBias,
    Softmax,
    SpecError,
    Sum,
    Vectors,
    presets,
)

# Wrong types are the point of this file.
Wrong: Any = None
PAIR = Lattice((2,))
RING = PairTable(((0, 1), (1, 0)), 2)


def attention(**more: Any) -> Operator:
    settings: dict[str, Any] = {"query": Shared(4), "key": Shared(4), "value": Shared(4)}
    return Operator(**{"layout": PAIR, "dim": 4, "num_heads": 2, **settings, **more})


def convolving(value: Any, layout: Any = PAIR, num_heads: int = 2, dim: int = 4, **more: Any) -> Operator:
    return Operator(layout, dim, num_heads, value, relevance=Ones(), **more)


def nested(depth: int) -> Sum:
    encoder = Sum((Shared(4),))
    for _ in range(depth):
        encoder = Sum((encoder,))
    return encoder


class Rule(NamedTuple):
    name: str
    broken: Callable[[], object]
    given: str
    rule: str
    remedy: str

    @property
    def clause(self) -> str:
        return self.name.partition("-")[0]


RULES = [
    Rule("L1-no-axis", lambda: Lattice(()), "grid=()", "1 to 8 axes", "Give grid="),
    Rule("L1-nine-axes", lambda: Lattice((1,) * 9), "grid=(1, 1", "1 to 8 axes", "Give grid="),
    Rule("L1-float-extent", lambda: Lattice((7, 7.0)), "grid=(7, 7.0)", "one whole number", "Give grid as"),  # type: ignore[arg-type]
    Rule("L1-bool-extent", lambda: Lattice((7, True)), "grid=(7, True)", "one whole number", "Give grid as"),
    Rule("L1-no-grid", lambda: Lattice(Wrong), "grid=None", "one whole number", "Give grid as"),
    Rule("L1-text-grid", lambda: Lattice("7"), "grid='7'", "one whole number", "Give grid as"),  # type: ignore[arg-type]
    Rule("L1-empty-extent", lambda: Lattice((7, 0)), "grid=(7, 0)", "at least 1", "Give 1 or more"),
    Rule("L1-huge-grid", lambda: Lattice((10**9,)), "grid=(1000000000,)", "at most 16,777,216 tokens", "smaller grid"),
    Rule("L1-huge-stride", lambda: Lattice((2,), stride=2**40), "stride=1099511627776", "not exceed", "smaller number"),
    Rule("L1-other-rank", lambda: Lattice((2, 2), key_grid=(2,)), "key_grid=(2,)", "each of the 2 axes", "tuple of 2"),
    Rule("L1-zero-kernel", lambda: Lattice((7,), kernel_size=0), "kernel_size=0", "at least 1", "Give 1 or more"),
    Rule("L1-bool-kernel", lambda: Lattice((7,), kernel_size=True), "kernel_size=True", "whole number", "as an int"),
    Rule("L1-layout", lambda: convolving(Shared(4), layout=(7, 7)), "layout=tuple", "a Lattice or", "Give Lattice("),
    Rule("L1-conv-stride", lambda: presets.convolution((7,), 1, 1, 3, stride=0), "stride=0", "at least 1", "1 or more"),
    Rule("L1-conv-padding", lambda: presets.convolution((7,), 1, 1, 3, padding=-1), "padding=-1", "at least 0", "0 or"),
    Rule("L2-dilation", lambda: Lattice((7,), dilation=2), "dilation=(2,) without", "describes a window", "or drop"),
    Rule("L2-padding", lambda: Lattice((7,), padding=1), "padding=(1,) without", "describes a window", "or drop"),
    Rule("L2-no-window", lambda: Lattice((7,)).window, "kernel_size=None", "no window", "Ask only where"),
    Rule(
        "L2-too-wide", lambda: presets.convolution((3,), 1, 1, 5), "kernel_size=(5,)", "must fit into", "more padding"
    ),
    Rule(
        "L2-all-cropped",
        lambda: presets.transposed_convolution((2,), 1, 1, 2, padding=2),
        "padding=(2,)",
        "at least one position",
        "smaller padding",
    ),
    Rule("L3-classes", lambda: Lattice((2**24,)), "grid=(16777216,)", "at most 16,777,216 displacements", "window"),
    Rule(
        "L3-strided-classes",
        lambda: Lattice((2**20,), stride=2**20),
        "grid=(1048576,)",
        "at most 16,777,216 displacements",
        "Give a window",
    ),
    Rule("L3-huge-kernel", lambda: Lattice((7,), kernel_size=2**30), "kernel_size=", "at most", "smaller grid"),
    Rule(
        "L3-nothing-left",
        lambda: Lattice((7,), kernel_size=2, padding=-3, causal=True),
        "padding=(-3,)",
        "some displacement must be left",
        "Use causal=False",
    ),
    Rule("L4-int", lambda: Lattice((7,), causal=1), "causal=1", "one flag", "Give a bool"),  # type: ignore[arg-type]
    Rule("L4-text", lambda: Lattice((7,), causal="yes"), "causal='yes'", "one flag", "Give a bool"),  # type: ignore[arg-type]
    Rule("L4-flags", lambda: Lattice((7,), causal=(True, False)), "causal=(True, False)", "the 1 axes", "tuple of 1"),
    Rule(
        "L4-circle",
        lambda: Lattice((7,), causal=True, boundary="circular"),
        "boundary='circular'",
        "no key comes before another",
        "boundary='absent'",
    ),
    Rule(
        "L4-reflected-future",
        lambda: Lattice((7,), kernel_size=2, causal=True, boundary="reflect"),
        "boundary='reflect'",
        "can stand for a later key",
        "or causal=False",
    ),
    Rule(
        "L4-replicated-future",
        lambda: Lattice((7, 7), kernel_size=3, causal=True, boundary="replicate"),
        "boundary='replicate'",
        "can stand for a later key",
        "or causal=False",
    ),
    Rule("L5-unknown", lambda: Lattice((7,), boundary=Wrong), "boundary=None", "one of absent, zeros", "Choose one"),
    Rule("L5-no-window", lambda: Lattice((7,), boundary="zeros"), "boundary='zeros' without", "only", "kernel_size"),
    Rule(
        "L5-key-stride",
        lambda: Lattice((7,), kernel_size=3, key_stride=2, boundary="zeros"),
        "key_stride=(2,)",
        "keys on every lattice site",
        "Use key_stride=1",
    ),
    Rule(
        "L5-circle-of-two-sizes",
        lambda: Lattice((7,), key_grid=(5,), boundary="circular"),
        "key_grid=(5,)",
        "the same grid on both sides",
        "or equal grids",
    ),
    Rule(
        "L5-reflect-too-far",
        lambda: Lattice((3,), kernel_size=7, boundary="reflect"),
        "reaching positions -3 to 5",
        "smaller than the key grid",
        "boundary='replicate'",
    ),
    Rule(
        "L5-shift-padding",
        lambda: Lattice((7,), kernel_size=3, padding=1, boundary="shift"),
        "padding=(1,)",
        "places itself",
        "Drop padding",
    ),
    Rule(
        "L5-shift-raster",
        lambda: Lattice((7, 7), kernel_size=3, causal=True, boundary="shift"),
        "causal=True",
        "one flag per axis",
        "tuple of flags",
    ),
    Rule(
        "L5-shift-too-wide",
        lambda: Lattice((7,), kernel_size=4, dilation=2, boundary="shift"),
        "4 * 2 on axis 0 of extent 7",
        "must fit in the grid",
        "smaller kernel_size",
    ),
    Rule(
        "L5-padding-mode",
        lambda: presets.convolution((7,), 1, 1, 3, padding_mode=Wrong),
        "padding_mode=None",
        "one of zeros",
        "Choose one",
    ),
    Rule("L6-negative", lambda: Lattice((7,), registers=-1), "registers=-1", "from 0 to", "registers=1"),
    Rule("L6-bool", lambda: Lattice((7,), registers=True), "registers=True", "a whole number of tokens", "registers=1"),
    Rule(
        "L6-too-many", lambda: Lattice((7,), registers=5000), "registers=5000", "a class of its own", "fewer registers"
    ),
    Rule("L7-clip", lambda: Clip(-1), "max_distance=-1", "from 0 to", "max_distance=0"),
    Rule("L7-clip-bool", lambda: Clip(True), "max_distance=True", "a whole number", "max_distance=0"),
    Rule("L7-buckets", lambda: LogBuckets(1, 8), "num_buckets=1", "from 2 to 256", "num_buckets=16"),
    Rule("L7-many-buckets", lambda: LogBuckets(10**6, 10**7), "num_buckets=1000000", "from 2 to 256", "num_buckets=16"),
    Rule("L7-distance", lambda: LogBuckets(8, 4), "max_distance=4", "must exceed num_buckets // 2", "from 5 to"),
    Rule("L7-far", lambda: Lattice((7,), far=3), "far=3", "None, Clip or LogBuckets", "far=Clip("),  # type: ignore[arg-type]
    Rule("L8-ragged", lambda: PairTable(((0,), (0, 0)), 1), "row lengths [1, 2]", "all rows equally long", "Pad short"),
    Rule("L8-empty", lambda: PairTable((), 1), "row lengths []", "one row per query", "Pad short"),
    Rule("L8-no-table", lambda: PairTable(Wrong, 1), "classes is a NoneType", "one row per query", "array.tolist()"),
    Rule("L8-no-row", lambda: PairTable((0,), 1), "classes is a tuple", "one row per query", "Pad short"),  # type: ignore[arg-type]
    Rule("L8-range", lambda: PairTable(((0, 2), (0, 0)), 2), "classes[0][1]=2", "0 to 1", "Raise num_classes"),
    Rule("L8-bool", lambda: PairTable(((True,),), 2), "classes[0][0]=True", "a class is an int", "correct the entry"),
    Rule("L8-num-classes", lambda: PairTable(((0,),), True), "num_classes=True", "a whole number", "Give one more"),
    Rule("L8-one-sided", lambda: PairTable(((0, 0), (-1, 0)), 1), "pair (0, 1)", "its own mirror", "Give key_classes"),
    Rule("L8-not-square", lambda: PairTable(((0, 0),), 1), "1 queries, 2 keys", "the same tokens", "Give key_classes"),
    Rule("L8-support", lambda: PairTable(((0, -1),), 1, ((0, 0),)), "key_classes", "the support of classes", "absent"),
    Rule("L8-shape", lambda: PairTable(((0, 0),), 1, ((0,),)), "key_classes", "has the shape", "Mark the same"),
    Rule("E1-no-encoder", lambda: convolving("linear"), "value='linear'", "value is an encoder", "Give value=Shared("),
    Rule("E1-query", lambda: attention(query=3), "query=3", "an encoder or None", "Give query=Shared("),
    Rule("E2-heads", lambda: attention(value=Shared(5)), "features=5, num_heads=2", "divisible", "Change num_heads"),
    Rule("E2-widths", lambda: attention(key=Shared(6)), "have 2 features, key heads 3", "same head width", "the same"),
    Rule("E3-bias", lambda: Identity(bias=1), "Identity(bias=1)", "bias is a bool", "True or False"),  # type: ignore[arg-type]
    Rule("E4-features", lambda: Shared(0), "Shared(features=0)", "from 1 to", "Give a positive features"),
    Rule("E4-huge", lambda: Shared(2**40), "Shared(features=1099511627776)", "from 1 to 1,048,576", "Give a positive"),
    Rule("E4-float", lambda: Shared(4.0), "Shared(features=4.0)", "a whole number", "Give a positive"),  # type: ignore[arg-type]
    Rule("E4-groups", lambda: Shared(6, groups=4), "features=6, groups=4", "divisible by groups", "a divisor of 6"),
    Rule(
        "E4-inputs", lambda: convolving(Shared(6, groups=3)), "input channels=4", "divisible by groups", "Change groups"
    ),
    Rule("E4-bias", lambda: Shared(4, bias=Wrong), "Shared(bias=None)", "bias is a bool", "True or False"),
    Rule("E5-groups", lambda: PerDisplacement(6, groups=4), "features=6", "divisible by groups", "Change groups"),
    Rule("E5-inputs", lambda: convolving(PerDisplacement(6, groups=3)), "channels=4", "divisible by groups", "Change"),
    Rule("E5-roles", lambda: presets.translution((2,), 4, 2, roles=Wrong), "roles=None", "one of qkv", "Choose one"),
    Rule("E6-inner", lambda: LowRank(True), "LowRank(inner_features=True)", "a whole number", "Give a positive"),
    Rule("E6-features", lambda: LowRank(2, -3), "LowRank(features=-3)", "a whole number", "Give a positive"),
    Rule("E6-rank", lambda: presets.alpha_translution((2,), 4, 2, rank=0), "rank=0", "a whole number", "positive rank"),
    Rule("E7-features", lambda: Vectors(-4), "Vectors(features=-4)", "a whole number", "Give a positive"),
    Rule("E7-flag", lambda: Vectors(4, shared_heads=2), "shared_heads=2", "is a bool", "True or False"),  # type: ignore[arg-type]
    Rule("E8-empty", lambda: Sum(()), "Sum(())", "at least one encoder", "Give Sum(("),
    Rule("E8-one", lambda: Sum(Shared(4)), "Sum(Shared(", "a tuple of", "Give Sum(("),  # type: ignore[arg-type]
    Rule("E8-other", lambda: Sum((Shared(4), 3)), "Sum((Shared(", "a tuple of", "Give Sum(("),  # type: ignore[arg-type]
    Rule("E8-features", lambda: convolving(Sum((Shared(4), Shared(2)))), "[4, 2]", "same number", "same features"),
    Rule("E8-rotary", lambda: Sum((Rotary(Shared(4)),)), "Rotary inside Sum", "plain encoders", "Rotary(Sum("),
    Rule("E8-nested", lambda: nested(5000), "Sum of 1 parts", "fewer than 32", "Merge parts"),
    Rule(
        "E9-features", lambda: convolving(Concat((Shared(3), Shared(1)))), "part=3", "divisible by num_heads", "Change"
    ),
    Rule("E9-none", lambda: Concat(Wrong), "Concat(None)", "at least one encoder", "Give Concat(("),
    Rule("E10-inner", lambda: Rotary(Wrong), "Rotary(None)", "rotates one encoder", "Rotary(Shared(64))"),
    Rule("E10-twice", lambda: Rotary(Concat((Rotary(Shared(4)),))), "Rotary(Concat(", "once", "Rotary(Shared(64))"),
    Rule("E10-base", lambda: Rotary(Shared(4), base=float("inf")), "base=inf", "positive finite", "base=10000.0"),
    Rule("E10-pairing", lambda: Rotary(Shared(4), pairing=Wrong), "pairing=None", "one of half", "Choose one"),
    Rule(
        "E10-value", lambda: attention(value=Rotary(Shared(4))), "value holds", "only queries and keys", "Take Rotary"
    ),
    Rule(
        "E10-table",
        lambda: attention(layout=RING, query=Rotary(Shared(4))),
        "query holds Rotary on a PairTable",
        "needs lattice positions",
        "Use a Lattice",
    ),
    Rule(
        "E10-width",
        lambda: attention(layout=Lattice((2, 2)), query=Rotary(Shared(4))),
        "head width 2 on 2 lattice axes",
        "divisible by 2 * 2",
        "rotate a part of the head",
    ),
    Rule("R1-relevance", lambda: attention(relevance="softmax"), "relevance='softmax'", "Softmax, Ones", "Softmax()"),
    Rule("R1-scale", lambda: Softmax(scale=2.0, content=False), "scale=2.0", "content term", "Drop scale"),
    Rule("R1-content", lambda: Softmax(content=1), "content=1", "content is a bool", "content=True"),  # type: ignore[arg-type]
    Rule(
        "R4-nested", lambda: Mixture(Mixture(Ones(), Ones()), Ones()), "first=Mixture(", "two of", "Mixture(Softmax()"
    ),  # type: ignore[arg-type]
    Rule("R5-bias", lambda: Softmax(bias="table"), "bias='table'", "BiasTable", "bias=BiasTable()"),  # type: ignore[arg-type]
    Rule("R5-slopes", lambda: SlopeBias(3), "slopes=3", "one finite number", "tuple of floats"),  # type: ignore[arg-type]
    Rule("R5-nan", lambda: SlopeBias((float("nan"),)), "nan", "one finite number", "tuple of floats"),
    Rule(
        "R5-count",
        lambda: attention(relevance=Softmax(bias=SlopeBias((1.0,)))),
        "with num_heads=2",
        "one finite number per head",
        "Give 2 slopes",
    ),
    Rule(
        "R5-table",
        lambda: attention(layout=RING, relevance=Softmax(bias=QuadraticBias())),
        "QuadraticBias on PairTable",
        "functions of the displacement",
        "Use BiasTable",
    ),
    Rule(
        "R5-far",
        lambda: attention(layout=Lattice((4,), far=Clip(1)), relevance=Softmax(bias=SlopeBias())),
        "SlopeBias on Lattice",
        "functions of the displacement",
        "Lattice without far",
    ),
    Rule("R6-nan", lambda: Softmax(scale=float("nan")), "scale=nan", "a finite number", "Give a float"),
    Rule("R6-overflow", lambda: Softmax(scale=10**400), "scale=1000", "a finite number", "Give a float"),
    Rule("R7-missing", lambda: attention(query=None), "query=None", "exactly where", "Add both encoders"),
    Rule("R7-needless", lambda: attention(relevance=Ones()), "query=given", "exactly where", "drop both otherwise"),
    Rule("O1-dim", lambda: attention(dim=0), "dim=0", "from 1 to 1,048,576", "Give a positive dim"),
    Rule("O1-heads", lambda: attention(num_heads=True), "num_heads=True", "a whole number", "Give a positive"),
    Rule("O1-key-dim", lambda: attention(key_dim=2.0), "key_dim=2.0", "a whole number", "Give a positive"),
    Rule("O1-preset", lambda: presets.self_attention((2,), 7, 3), "num_heads=3", "divisible", "give head_dim"),
    Rule("O1-no-heads", lambda: presets.self_attention((2,), 7, 0), "num_heads=0", "a whole number", "Give a positive"),
    Rule("O1-head-dim", lambda: presets.translution((2,), 7, 1, head_dim=0), "head_dim=0", "whole", "Give a positive"),
    Rule("O2-output", lambda: attention(output=PerDisplacement(4)), "output=Per", "one token, not a pair", "Shared("),
    Rule("O3-scale", lambda: attention(output_scale=float("inf")), "output_scale=inf", "finite", "output_scale=1.0"),
    Rule("O3-bool", lambda: attention(output_scale=True), "output_scale=True", "finite", "output_scale=1.0"),
    Rule(
        "O4-heads",
        lambda: attention(output=LowRankOutput(1, 4)),
        "inner_features=1",
        "multiple of num_heads",
        "Concat(",
    ),
    Rule("O4-width", lambda: attention(output=LowRankOutput(4, 4)), "4 value features", "less than", "low-rank part"),
    Rule("O4-features", lambda: LowRankOutput(2, 0), "LowRankOutput(features=0)", "whole", "Give a positive"),
    Rule(
        "P1-terabyte",
        lambda: presets.translution((384, 384), 1024, 16),
        "TiB in float32",
        "at most 274,877,906,944 parameters",
        "far=Clip(",
    ),
    Rule(
        "P1-bias-table",
        lambda: attention(
            layout=Lattice((2**22,)),
            num_heads=2**15,
            dim=2**15,
            query=Shared(2**15),
            key=Shared(2**15),
            value=Identity(),
            relevance=Softmax(bias=BiasTable()),
        ),
        "1.0 TiB",
        "at most",
        "window",
    ),
]


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_rule(rule: Rule) -> None:
    with pytest.raises(SpecError) as caught:
        rule.broken()
    message = str(caught.value)
    assert caught.value.clause == rule.clause
    assert message.startswith(f"[{rule.clause}] ")
    assert rule.given in caught.value.given
    assert rule.rule in caught.value.rule
    assert rule.remedy in caught.value.remedy
    assert message.endswith(f": {caught.value.rule}. {caught.value.remedy}.")


def test_names_of_rules_are_unique() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_long_values_are_cut() -> None:
    with pytest.raises(SpecError) as caught:
        Sum(tuple(range(10**5)))  # type: ignore[arg-type]
    assert len(str(caught.value)) < 700


def test_errors_travel_between_processes() -> None:
    error = SpecError("L1", "given", "rule", "Remedy")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.clause) == (str(error), "L1") == ("[L1] given: rule. Remedy.", "L1")
