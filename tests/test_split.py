"""Displacements split over real processes, and `fully_shard`: results, gradients, memory and traffic."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist

from translution import run
from translution.backends.torch import split
from translution.backends.torch.split import Exchange, run_share
from translution.conformance.strategies import random_operator
from translution.errors import InputError
from translution.shares import share_of, why_not_split
from translution.spec import Lattice, Mean, Operator, PerDisplacement, Softmax, parse_spec
from translution.spec.serialization import operator_to_data

FULL = "translution2d:height=3,width=4,dim=12,num_heads=3,registers=1"
SPECS = (
    FULL,
    "alpha_translution2d:height=3,width=3,dim=12,num_heads=3,registers=1,rank=2",
    "translution1d:length=7,dim=8,num_heads=2,causal=true",
    "alpha_translution1d:length=6,dim=8,num_heads=2,causal=true,rotary=true",
    "translution2d:height=3,width=3,dim=6,num_heads=2,registers=1,causal=true,roles=kv,qkv_bias=true",
    "shaw_attention1d:length=7,dim=8,num_heads=2,max_distance=2",
)
# Random operators: biases, mixtures, pair tables, other sides, windows. A third have tables to deal out.
SEEDS = tuple(range(200, 224))
SECONDS = 120


def together(command: Sequence[str], folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run a command as two processes that meet in a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    own = [sys.executable, "-W", "error", *command, "--store", str(folder / "store"), "--world", "2", "--rank"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*own, str(rank)], cwd=folder, env=environment, **pipes) for rank in (0, 1)]
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(started, outputs, strict=True)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, in one start for all operators."""
    folder = tmp_path_factory.mktemp("two")
    drawn = [(seed, operator) for seed in SEEDS if not why_not_split(operator := random_operator(seed), 2)]
    for seed, operator in drawn:
        (folder / f"{seed}.json").write_text(json.dumps(operator_to_data(operator)))
    # Logits of some thousands: the devices' highest ones are far apart.
    steep = replace(parse_spec(FULL), relevance=Softmax(scale=2e3))
    (folder / "steep.json").write_text(json.dumps(operator_to_data(steep)))
    specs = [*SPECS, "steep.json", *(f"{seed}.json" for seed, _ in drawn)]
    module = ["-m", "translution.conformance.split_check", *specs, "--json", "found.json"]
    for process in together(module, folder):
        assert process.returncode in (0, 1), process.stderr
    rows: list[dict[str, Any]] = json.loads((folder / "found.json").read_text())
    assert len(drawn) >= 8
    assert {(row["spec"], row["rank"]) for row in rows} == {(spec, rank) for spec in specs for rank in (0, 1)}
    return rows


@pytest.mark.parametrize("way", ["split displacements", "fully sharded"])
def test_results_and_all_gradients_are_within_the_bound(found, way):
    rows = [row for row in found if row["way"] == way]
    assert len(rows) >= 2 * (len(SPECS) + 8)
    assert [row for row in rows if not row["share"] <= 1] == []


@pytest.mark.parametrize("way", ["split displacements", "fully sharded"])
def test_every_process_holds_and_exchanges_what_is_predicted(found, way):
    for row in found:
        if row["way"] == way:
            assert row["parameters"] == row["predicted_parameters"] > 0, row
            assert row["exchanged"] == row["predicted_exchanged"] > 0, row


def test_every_process_takes_what_is_predicted(found):
    rows = [row for row in found if row["way"] == "split displacements"]
    for row in rows:
        assert 0 <= row["working"] - row["predicted_working"] <= row["exchanged"], row
    # Threads of gloo may hold for a moment what they have summed.
    assert sum(row["working"] == row["predicted_working"] for row in rows) >= 0.8 * len(rows)


def test_everything_that_is_found_holds(found):
    assert all(row["holds"] for row in found)


TWICE = """
import argparse, os, sys
from datetime import timedelta
import torch
from torch import distributed as dist
import translution
from translution.backends.torch.split import run_share
from translution.shares import share_of
from translution.spec import parse_spec

parser = argparse.ArgumentParser()
for name in ("--spec", "--store"):
    parser.add_argument(name)
for name in ("--rank", "--world"):
    parser.add_argument(name, type=int)
o = parser.parse_args()
dist.init_process_group("gloo", f"file://{o.store}", rank=o.rank, world_size=o.world, timeout=timedelta(seconds=60))
operator = parse_spec(o.spec)
torch.manual_seed(0)
params = {n: torch.randn(s, dtype=torch.float64) / 3 for n, s in operator.parameters.items()}
x = torch.randn(2, operator.layout.num_queries, operator.dim, dtype=torch.float64)

def second(call, own):
    leaf = x.clone().requires_grad_()
    own = {n: v.clone().requires_grad_() for n, v in own.items()}
    (first,) = torch.autograd.grad(call(own, leaf).square().sum(), leaf, create_graph=True)
    return torch.autograd.grad(first.square().sum(), [leaf, *own.values()], allow_unused=True)

share = share_of(operator, o.rank, o.world)
whole = second(lambda own, leaf: translution.run(operator, own, leaf, algorithm="pairwise"), params)
wanted = [whole[0], *share.take(dict(zip(params, whole[1:], strict=True))).values()]
for got, want in zip(second(lambda own, leaf: run_share(share, own, leaf), share.take(params)), wanted, strict=True):
    if want is not None:
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
print("the same")
sys.stdout.flush()
os._exit(0)
"""


def test_second_derivatives_pass_through_the_merge(tmp_path):
    (tmp_path / "twice.py").write_text(TWICE)
    for process in together(["twice.py", "--spec", FULL.replace("width=4", "width=2")], tmp_path):
        assert process.returncode == 0, process.stderr
        assert process.stdout.strip() == "the same"


# One process


def numbers(operator, dtype=torch.float64):
    torch.manual_seed(0)
    params = {name: torch.randn(shape, dtype=dtype) / 3 for name, shape in operator.parameters.items()}
    return params, torch.randn(2, operator.layout.num_queries, operator.dim, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_share_of_one_is_the_operator(dtype):
    operator = parse_spec(FULL)
    params, x = numbers(operator, dtype)
    share = share_of(operator, 0, 1)
    out = split._run(share, share.take(params), x, None, Exchange(None, silent=True))
    assert out.dtype == dtype
    torch.testing.assert_close(out, run(operator, params, x, algorithm="stream"))
    without_batch = split._run(share, share.take(params), x[0], None, Exchange(None, silent=True))
    torch.testing.assert_close(without_batch, out[0])


def test_a_token_that_nobody_sees_reaches_nothing():
    layout = Lattice((2,), key_grid=(5,), stride=2, kernel_size=2, padding=0)
    operator = Operator(layout, 3, 1, PerDisplacement(3), relevance=Mean())
    params, _ = numbers(operator)
    share = share_of(operator, 0, 1)
    y = torch.randn(1, 5, 3, dtype=torch.float64)
    unseen = sorted({0, 1, 2, 3, 4} - set(np.concatenate([s.key_index for s in share.steps]).tolist()))
    assert unseen
    y[:, unseen] = torch.nan
    y.requires_grad_()
    out = split._run(
        share, share.take(params), torch.zeros(1, 2, 3, dtype=torch.float64), y, Exchange(None, silent=True)
    )
    (gradient,) = torch.autograd.grad(out.sum(), y)
    assert out.isfinite().all()
    assert gradient.isfinite().all()
    assert not gradient[:, unseen].any()


def test_without_a_process_group_nothing_runs():
    operator = parse_spec(FULL)
    params, x = numbers(operator)
    share = share_of(operator, 0, 2)
    with pytest.raises(InputError, match="init_process_group first"):
        run_share(share, share.take(params), x)


def test_a_process_computes_its_own_share(monkeypatch):
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(dist, name, lambda *_, value=value: value)
    operator = parse_spec(FULL)
    params, x = numbers(operator)
    share = share_of(operator, 0, 2)
    with pytest.raises(InputError, match="share 0 of 2 in process 1 of 2"):
        run_share(share, share.take(params), x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p, x: (p, x[:, 1:]), r"it must be \[.., 13, 12\]"),
        (lambda p, x: (p, x.float()), "several dtypes"),
        (lambda p, x: ({**p, "query.table": p["query.table"][1:]}, x), r"query.table: \(18, 12, 12\)"),
        (lambda p, x: ({n: v for n, v in p.items() if n != "output.bias"}, x), "output.bias: missing"),
    ],
)
def test_what_does_not_fit_the_share_is_named(change, words):
    operator = parse_spec(FULL)
    share = share_of(operator, 0, 2)
    params, x = numbers(operator)
    params, x = change(share.take(params), x)
    with pytest.raises(InputError, match=words):
        split._run(share, params, x, None, Exchange(None, silent=True))
