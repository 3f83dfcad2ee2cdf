"""What every device holds, sends and does, by hand, by law and against counted runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from translution.algorithms import Request
from translution.backends.torch.dry_run import Counter
from translution.cli import main
from translution.execution import predict
from translution.inputs import Inputs
from translution.registry import get_backend
from translution.scale import (
    WAYS,
    fewest_devices,
    merged_bytes,
    need,
    placements,
    ring_all_gather,
    ring_all_reduce,
    sharded_parameters,
    why_not,
)
from translution.shares import shares
from translution.spec import parse_spec, presets

FULL = "translution2d:height=4,width=4,dim=24,num_heads=3,registers=1"
ALPHA = "alpha_translution2d:height=4,width=4,dim=24,num_heads=3,registers=1,rank=2"
CAUSAL = "translution1d:length=12,dim=16,num_heads=2,causal=true"
LINE = presets.translution((3,), 4, 2)  # 5 classes: tables of 80 numbers, an output of 16 and a bias of 4


def training(spec, batch=8, dtype="float32"):
    return Request(parse_spec(spec), batch, dtype, gradient=True)


def test_rings_by_hand():
    # Of 4 parts each device sends 3 on, once to gather or scatter, twice to sum everywhere.
    assert ring_all_gather(400, 4) == 300
    assert ring_all_reduce(400, 4) == 600
    assert ring_all_reduce(400, 1) == ring_all_gather(400, 1) == 0
    assert ring_all_gather(10, 3) == 7


@pytest.mark.parametrize("spec", [FULL, ALPHA, CAUSAL])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_one_device_takes_what_explain_says_and_the_moments(spec, dtype):
    request = training(spec, dtype=dtype)
    explained = predict(get_backend("torch"), request, "stream")
    found = need(request, "one device", 1)
    moments = 2 * request.operator.num_parameters * (8 if dtype == "float64" else 4)
    assert found.total == explained.total_bytes + moments
    assert (found.flops, found.sent, found.optimiser) == (explained.flops, 0, moments)
    forward = replace(request, gradient=False)
    found = need(forward, "one device", 1)
    assert found.total == predict(get_backend("torch"), forward, "stream").total_bytes
    assert found.gradients == found.optimiser == 0


@pytest.mark.parametrize("way", WAYS)
def test_on_one_device_every_way_holds_the_same(way):
    request = training(FULL)
    one, found = need(request, "one device", 1, layers=3), need(request, way, 1, layers=3)
    assert (found.parameters, found.gradients, found.optimiser) == (one.parameters, one.gradients, one.optimiser)
    assert found.sent == found.gathered == 0


def test_two_devices_by_hand():
    request = Request(LINE, 4, gradient=True)
    data = need(request, "data parallel", 2)
    assert (data.items, data.parameters, data.gradients, data.optimiser) == (2, 4 * 260, 4 * 260, 8 * 260)
    assert data.sent == 4 * 260
    # Cut along their first axis: 3 of 5 rows of each table, 2 of 4 of the output and its bias.
    assert sharded_parameters(LINE, 2) == 3 * 3 * 16 + 2 * 4 + 2
    sharded = need(request, "fully sharded", 2)
    assert (sharded.items, sharded.parameters, sharded.optimiser) == (2, 4 * 154, 8 * 154)
    # The layer's parameters and its gradient, padded; gathered twice and scattered once.
    assert sharded.gathered == 2 * (2 * 154 * 4)
    assert sharded.sent == 3 * 154 * 4
    # 3 of 5 rows of each table, everything else.
    split = need(request, "split displacements", 2)
    assert (split.items, split.parameters, split.optimiser) == (4, 4 * (144 + 20), 8 * (144 + 20))
    # 4 items of 3 queries with 2 heads of 2 features, a highest logit and a sum; the tokens' gradient.
    assert merged_bytes(request) == 4 * (4 * 3 * 2 * (2 + 2) + 4 * 3 * 4)
    assert split.sent == merged_bytes(request)
    assert merged_bytes(replace(request, gradient=False)) == 4 * (4 * 3 * 2 * (2 + 2))


def test_layers_by_hand():
    request = Request(LINE, 4, gradient=True)
    for way in WAYS[1:]:
        one, three, five = (need(request, way, 2, layers) for layers in (1, 3, 5))
        for name in ("parameters", "gradients", "optimiser", "sent", "flops"):
            assert getattr(five, name) == 5 * getattr(one, name)
        # Every further layer keeps the same for its backward.
        assert five.working - three.working == three.working - one.working > 0
        assert five.gathered == three.gathered
    copies = [need(request, "fully sharded", 2, layers).gathered // (2 * 154 * 4) for layers in (1, 2, 3, 4)]
    assert copies == [2, 3, 4, 4]
    forward = replace(request, gradient=False)
    copies = [need(forward, "fully sharded", 2, layers).gathered // (2 * 154 * 4) for layers in (1, 2, 3, 4)]
    assert copies == [2, 3, 3, 3]
    assert need(forward, "fully sharded", 2, 3).sent == 3 * 154 * 4
    assert need(forward, "one device", 1, 3).working == need(forward, "one device", 1).working


def test_what_every_device_reads_whole_is_summed():
    request = training(ALPHA)
    shapes = request.operator.parameters
    tables = {"query.1.table", "key.1.table", "value.1.table"}
    read = sum(torch.Size(shape).numel() for name, shape in shapes.items() if not name.startswith("output.")) - sum(
        torch.Size(shapes[name]).numel() for name in tables
    )
    queries = 8 * 17
    assert merged_bytes(request) == 4 * (queries * 3 * (8 + 2 + 2) + queries * 24 + read)
    # In halves the parameters' gradients are halves, what is merged is not.
    halves = replace(request, dtype="bfloat16")
    assert merged_bytes(request) - merged_bytes(halves) == 2 * read


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("spec", [FULL, ALPHA, CAUSAL])
def test_more_devices_never_hold_more(spec, gradient):
    request = replace(training(spec), gradient=gradient)
    for way in WAYS[1:]:
        every = [need(request, way, devices, 2) for devices in range(1, 10)]
        held = [one.total - one.gathered - one.working for one in every]
        assert held == sorted(held, reverse=True), way
        assert all(one.working <= every[0].working for one in every)
        # What a share's call takes depends on how its links lie.
        if way == "data parallel":
            totals = [one.total for one in every]
            assert totals == sorted(totals, reverse=True), way


@pytest.mark.parametrize("spec", [FULL, ALPHA, CAUSAL])
def test_what_is_gathered_is_a_layer_and_less_than_a_row_of_padding_for_each_device(spec):
    request = training(spec)
    size = 4 * request.operator.num_parameters
    row = 4 * sum(torch.Size(shape[1:]).numel() for shape in request.operator.parameters.values())
    for devices in range(2, 10):
        found = need(request, "fully sharded", devices, 2)
        assert 3 * size <= found.gathered < 3 * (size + devices * row)


@pytest.mark.parametrize(("spec", "layers"), [(FULL, 2), (ALPHA, 4), (CAUSAL, 3)])
def test_a_stack_takes_at_most_what_is_said(spec, layers):
    """Operators in a row, counted together: as if all gradients and all that is kept were there at the same time."""
    request, backend = training(spec, batch=32), get_backend("torch")
    operator, found = request.operator, need(request, "one device", 1, layers)

    def empty(*shape):
        return torch.empty(shape, device="meta", requires_grad=True)

    stack = [{name: empty(*shape) for name, shape in operator.parameters.items()} for _ in range(layers)]
    x = empty(32, operator.layout.num_queries, operator.dim)
    pull = torch.empty_like(x).detach()
    leaves = [x, *(value for params in stack for value in params.values())]
    with Counter([pull, *leaves]) as counter:
        out = x
        for params in stack:
            out, _ = backend.forward(request, "stream", params, Inputs(out, out, None, (32,)))
        gradients = torch.autograd.grad(out, leaves, pull)
    del gradients, out
    one = predict(backend, request, "stream")
    # Of a result between two operators only the next one's copy of it is kept.
    assert counter.saved == layers * one.saved_bytes - (layers - 1) * pull.nbytes
    less = (layers - 1) * (min(one.saved_bytes, one.parameter_bytes) + pull.nbytes)
    assert found.gradients + found.working - less <= counter.peak <= found.gradients + found.working


def test_what_is_kept_for_the_backward_is_what_the_forward_leaves():
    request, backend = training(FULL), get_backend("torch")
    shapes = request.operator.parameters
    params = {name: torch.empty(shape, device="meta", requires_grad=True) for name, shape in shapes.items()}
    x = torch.empty((8, 17, 24), device="meta", requires_grad=True)
    with Counter([x, *params.values()]) as counter:
        out, _ = backend.forward(request, "stream", params, Inputs(x, x, None, (8,)))
        kept = counter.left
    del out
    found = predict(backend, request, "stream")
    assert found.saved_bytes == kept > 4 * x.numel()
    assert predict(backend, replace(request, gradient=False), "stream").saved_bytes is None


def test_large_16_of_the_paper():
    """24 operators on 14x14 and CLS; with the closed forms of the rest the whole network's parameters."""
    operator = parse_spec("translution2d:height=14,width=14,dim=1024,num_heads=16,registers=1")
    channels, mlp, depth, patch = 1024, 4096, 24, 3 * 16 * 16
    assert operator.num_parameters == 3 * (27 * 27 + 3) * channels**2 + channels**2 + channels
    forward = 2 * channels + 2 * channels * mlp + mlp + channels
    embedding = 2 * patch + (patch + 1) * channels + 2 * channels + channels
    head = 2 * channels + 1000 * (channels + 1)
    assert depth * (2 * channels + operator.num_parameters + forward) + embedding + head == 55_492_706_792
    found = need(Request(operator, 1, gradient=True), "split displacements", 732, depth)
    assert found.parameters == 4 * depth * (3 * channels**2 + channels**2 + channels)


@pytest.mark.parametrize("spec", [FULL, ALPHA, CAUSAL])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.95])
def test_the_fewest_devices_fit_and_no_fewer_do(spec, share):
    request = training(spec, batch=5)
    memory = int(share * need(request, "one device", 1, 2).total)
    for way in WAYS:
        most = {"one device": 1, "data parallel": 5, "fully sharded": 52, "split displacements": 12}[way]
        fits = [
            n for n in range(1, most + 1) if not why_not(request, way, n) and need(request, way, n, 2).total <= memory
        ]
        found = fewest_devices(request, way, memory, 2)
        if way == "split displacements":  # too many classes to try all
            assert found == fits[0] if fits else found == 0 or found > most
        else:
            assert found == (fits[0] if fits else 0)


def test_placements_look_for_more_devices_only_where_nothing_fits():
    request = training(FULL)
    everything = need(request, "one device", 1).total
    found = placements(request, 2, everything)
    assert [one.way for one in found] == list(WAYS)
    assert all(not one.reasons and one.fewest is None for one in found)
    none = placements(request, 2, everything // 10)
    assert all(one.reasons and one.fewest is not None for one in none)
    assert all(f"{one.need.total:,} bytes are more than" in one.reasons[0] for one in none)
    assert none[0].fewest == none[1].fewest == 0


def test_what_can_not_be_split_says_why():
    assert why_not(replace(training(FULL), mask="bool"), "split displacements", 2) == [
        "a mask is given: split displacements take none"
    ]
    (one,) = (one for one in placements(training(FULL), 100, 10**9) if one.way == "split displacements")
    assert one.need is None
    assert "52 groups of classes for 100 devices" in one.reasons[0]
    with pytest.raises(ValueError, match="ways are one device"):
        need(training(FULL), "by magic", 2)


def test_the_figures_of_the_page_are_these():
    """Of docs/scale.json what is arithmetic, for every model and way."""
    rows = json.loads((Path(__file__).parents[1] / "docs" / "scale.json").read_text())["predicted"]
    assert {row["way"] for row in rows} == set(WAYS)
    for row in rows:
        operator, devices = parse_spec(row["spec"]), row["devices"]
        request = Request(operator, row["batch"], gradient=True)
        own = sharded_parameters(operator, devices) if row["way"] == "fully sharded" else operator.num_parameters
        if row["way"] == "split displacements":
            own = max(share.num_parameters for share in shares(operator, devices))
            assert row["sent"] == row["layers"] * ring_all_reduce(merged_bytes(request), devices)
        assert row["parameters"] == row["gradients"] == row["optimiser"] // 2 == 4 * row["layers"] * own
        parts = ("parameters", "gradients", "optimiser", "gathered", "working")
        assert row["total"] == sum(row[part] for part in parts)


# The command


class Explained(NamedTuple):
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """``translution explain`` of one operator, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def explained(*arguments: str) -> Explained:
        with pytest.raises(SystemExit) as ended:
            main(["explain", FULL, "--train", "--batch", "8", *arguments])
        assert isinstance(ended.value.code, int)
        return Explained(ended.value.code, *capsys.readouterr())

    return explained


def test_explain_shows_what_fits(explain, tmp_path: Path) -> None:
    done = explain("--devices", "2", "--device-memory", "4MB", "--layers", "3", "--json", "o.json")
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "o.json").read_text())["scale"]
    assert (data["devices"], data["device_memory"], data["layers"]) == (2, 4_000_000, 3)
    assert f"{data['num_parameters']:,} parameters" in done.stdout
    request = training(FULL)
    for row in data["ways"]:
        found = need(request, row["way"], 2, 3)
        assert row["need"]["total"] == found.total
        assert row["need"]["sent"] == found.sent
        assert row["fits"] == (found.total <= 4_000_000)
        assert row["way"] in done.stdout
    assert not data["ways"][0]["fits"]
    assert data["ways"][3]["fits"]


def test_explain_says_how_many_would_do_where_nothing_fits(explain, tmp_path: Path) -> None:
    done = explain("--devices", "2", "--device-memory", "1MB", "--layers", "3", "--json", "o.json")
    assert done.returncode == 1, done.stdout + done.stderr
    ways = {row["way"]: row for row in json.loads((tmp_path / "o.json").read_text())["scale"]["ways"]}
    assert not any(row["fits"] for row in ways.values())
    assert ways["one device"]["fewest"] == 0
    fewest = ways["split displacements"]["fewest"]
    assert fewest > 2
    assert f"no: {fewest} would do" in done.stdout
    assert "no number would do" in done.stdout


def test_an_operator_without_parameters_has_devices_too():
    request = Request(parse_spec("average_pooling1d:length=6,channels=4,kernel_size=2"), 4)
    assert request.operator.num_parameters == 0
    memory = need(request, "one device", 1).total // 2
    found = fewest_devices(request, "fully sharded", memory)
    assert need(request, "fully sharded", found, 1).total <= memory < need(request, "fully sharded", found - 1, 1).total
    assert fewest_devices(request, "split displacements", memory) == 0


def test_without_torch_nothing_is_counted(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')\n")
    command = [sys.executable, "-m", "translution", "explain", FULL, "--devices", "2", "--device-memory", "1GB"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "pip install 'translution[torch]'" in done.stderr


def test_devices_without_items_are_named(explain) -> None:
    done = explain("--devices", "11", "--device-memory", "1GB")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "yes, 3 idle" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--devices", "8"), ("--device-memory", "go together")),
        (("--device-memory", "80GB"), ("--devices", "go together")),
        (("--layers", "2"), ("--devices", "go together")),
        (("--devices", "8", "--device-memory", "lots"), ("--device-memory lots", "2GB")),
        (("--devices", "8", "--device-memory", "1GB", "--max-memory", "1GB"), ("--max-memory", "leave it out")),
        (("--devices", "0", "--device-memory", "1GB"), ("--devices",)),
    ],
)
def test_wrong_use_exits_with_2(explain, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    done = explain(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr
