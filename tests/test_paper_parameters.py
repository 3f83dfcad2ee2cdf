"""Parameter counts of the paper's models: its figures, and closed forms that know nothing of specs."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from translution.cli import app
from translution.errors import InputError
from translution.paper import parameter_table
from translution.paper.description import SIZES, ModelDescription
from translution.paper.parameter_table import count, paper_rows, whole_grid

VIT: dict[str, Any] = {"family": "vit", "image_size": 224, "patch_size": 56, "channels": 3, "num_classes": 1000}
GPT: dict[str, Any] = {"family": "gpt", "length": 160, "vocabulary_size": 50257}
GRID = list(whole_grid())


def closed_form(model: ModelDescription) -> int:
    """Every number counted by hand (the paper's models as its authors' code builds them)."""
    size, roles, low_rank = model.size, model.roles or "", model.kind == "alpha"
    channels, width = size.dim, size.num_heads * size.head_dim
    if model.family == "vit":
        assert isinstance(model.image_size, tuple)
        assert isinstance(model.patch_size, tuple)
        rows, columns = (i // p for i, p in zip(model.image_size, model.patch_size, strict=True))
        tokens, table = rows * columns + 1, (2 * rows - 1) * (2 * columns - 1) + 3
        patch = (model.channels or 0) * model.patch_size[0] * model.patch_size[1]
        ends = 2 * patch + (patch + 1) * channels + 2 * channels + channels
        ends += 2 * channels + (channels + 1) * (model.num_classes or 0)
    else:
        tokens = table = model.length or 0
        ends = 4 * channels + 2 * channels * (model.vocabulary_size or 0)
    if model.position_embedding:
        ends += tokens * channels
    inner = size.num_heads * (model.rank or 0)
    if low_rank:
        operator = 3 * channels * width + len(roles) * table * inner**2
        operator += 2 * channels * inner * ("q" in roles or "k" in roles)
        operator += (channels * inner + inner * width) * ("v" in roles)
    else:
        operator = len(roles) * table * channels * width + (3 - len(roles)) * channels * width
    operator += 2 * channels + width * channels + channels
    feed_forward = 2 * channels + 2 * channels * size.mlp_dim + size.mlp_dim + channels
    return ends + size.depth * (operator + feed_forward)


@pytest.mark.parametrize("row", paper_rows(), ids=lambda row: row.name)
def test_rows_of_the_paper_are_exact(row: parameter_table.PaperRow) -> None:
    found = count(row.description).parameters
    assert found == row.description.num_parameters == row.exact == closed_form(row.description)
    digits = len(row.printed.partition(".")[2]) - 1
    assert f"{found / 1e6:.{digits}f}M" == row.printed


def test_without_a_position_embedding() -> None:
    model = ModelDescription(size=SIZES["tiny"], kind="attention", **VIT)
    assert count(model).parameters == 4_685_032


@pytest.mark.parametrize("size", SIZES)
def test_closed_forms_hold_on_the_whole_grid(size: str) -> None:
    own = [model for model in GRID if model.size == SIZES[size]]
    assert len(own) == 5 * 16
    differ = [model for model in own if model.num_parameters != closed_form(model)]
    assert differ == []


def test_the_largest() -> None:
    largest = max(GRID, key=closed_form)
    assert count(largest).parameters == largest.num_parameters == 55_492_706_792
    assert (largest.size, largest.patch_size, largest.roles) == (SIZES["large"], (16, 16), "qkv")


def test_unreached_rows() -> None:
    """With the class token alone read, two of the T rows of each table of the last layer matter."""
    full = ModelDescription(size=SIZES["tiny"], kind="full", **VIT)
    assert sum(full.unreached_parameters.values()) == 3 * 50 * 192 * 192
    assert set(full.unreached_parameters) == {f"layers.5.operator.{role}.table" for role in ("query", "key", "value")}
    assert not replace(full, pooling="mean").unreached_parameters
    assert not replace(full, relative_depth=5).unreached_parameters
    assert not ModelDescription(size=SIZES["tiny"], kind="full", **GPT).unreached_parameters


def test_defaults_are_the_papers() -> None:
    alpha = ModelDescription(size=SIZES["tiny"], kind="alpha", **GPT)
    assert (alpha.roles, alpha.rank, alpha.relative_depth, alpha.grid) == ("qkv", 8, 6, (160,))


def test_hybrids_count_their_layers() -> None:
    whole, none = (ModelDescription(size=SIZES["tiny"], kind=kind, **VIT) for kind in ("full", "attention"))
    counts = [replace(whole, relative_depth=depth).num_parameters for depth in range(7)]
    assert counts[0] == none.num_parameters
    assert counts[6] == whole.num_parameters
    assert {b - a for a, b in itertools.pairwise(counts)} == {3 * 51 * 192 * 192}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"family": "vgg"}, "family is one of vit, gpt"),
        ({"kind": "lor"}, "kind is one of attention"),
        ({"size": "tiny"}, "size is a Size"),
        ({"size": replace(SIZES["tiny"], depth=0)}, "size.depth is a positive whole number"),
        ({"roles": "vk"}, "roles is one of qkv"),
        ({"kind": "swin", "roles": "v"}, "roles belongs to full and alpha"),
        ({"rank": 8}, "rank belongs to alpha"),
        ({"kind": "alpha", "rank": 0}, "rank is a positive whole number"),
        ({"rotary": True}, "rotary belongs to alpha"),
        ({"relative_depth": 7}, "relative_depth is a whole number of the 6 layers"),
        ({"patch_size": 50}, "image_size divides into patches of"),
        ({"patch_size": None}, "patch_size is a positive whole number"),
        ({"image_size": (224, 224, 3)}, "image_size is one number"),
        ({"length": 160}, "length does not belong to family 'vit'"),
        ({"class_token": False}, "pooling is mean where there is no class token"),
        ({"position_embedding": 1}, "position_embedding is a bool"),
    ],
)
def test_what_does_not_fit_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelDescription(**({"size": SIZES["tiny"], "kind": "full"} | VIT | fields))


def test_command(tmp_path: Path) -> None:
    """Counts of models that are built, against forms that know nothing of them."""
    done = CliRunner().invoke(app, ["paper", "params", "--json", str(tmp_path / "params.json")])
    assert done.exit_code == 0, done.output
    assert "116,164,138" in done.output
    data = json.loads((tmp_path / "params.json").read_text())
    assert data["holds"] is True
    assert [(row["parameters"], row["paper"]) for row in data["rows"]] == [(r.exact, r.printed) for r in paper_rows()]
    assert [entry["parameters"] for entry in data["grid"]] == [closed_form(model) for model in GRID]
    asked = {(e["family"], e["size"], e["kind"], e["roles"]) for e in data["grid"]}
    assert len(asked) == 2 * 5 * (1 + 2 * 7)


def test_command_ends_with_1_where_a_count_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter_table, "whole_grid", lambda: iter(GRID[:16]))
    first, *others = paper_rows()
    wrong = replace(first, exact=first.exact + 1)
    monkeypatch.setattr(parameter_table, "paper_rows", lambda: (wrong, *others))
    done = CliRunner().invoke(app, ["paper", "params"])
    assert done.exit_code == 1
    assert "DIFFERS" in done.output
