"""Language modelling: which text is held out, what a window is, that no model looks ahead."""

import dataclasses
import json
import math
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from translution.cli import app
from translution.paper.description import Size
from translution.paper.experiments import text
from translution.paper.experiments.models import MODELS, build
from translution.paper.experiments.summaries import text_rows
from translution.paper.experiments.text import Scale, TextTask, run_text
from translution.paper.experiments.text_data import is_held_out, load_corpus, source_files
from translution.paper.training import Part, TrainingError

TINY = Scale(
    size=Size(dim=8, depth=2, num_heads=2, head_dim=4, mlp_dim=16), rank=2, length=8, steps=3, batch_size=4,
    learning_rate=1e-2, warmup_steps=1, held_out_windows=9,
)  # fmt: skip


def token_files(folder: Path, train: list[int], held_out: list[int]) -> Path:
    np.array(train, "<u2").tofile(folder / "train.bin")
    np.array(held_out, "<u2").tofile(folder / "val.bin")
    return folder


def test_sources_are_divided_by_their_names() -> None:
    corpus, folder = load_corpus(), Path(sysconfig.get_path("stdlib"))
    names = [name for name, _ in source_files(folder)]
    assert names == sorted(names)
    assert "json/decoder.py" in names
    assert not [name for name in names if "site-packages" in name or "/test/" in name or name.startswith("test/")]
    held_out = [name for name in names if is_held_out(name)]
    assert 0.02 < len(held_out) / len(names) < 0.1
    assert corpus.about["files"] == {"train": len(names) - len(held_out), "held_out": len(held_out)}
    # One byte stands between files, so every file is found whole in its own half.
    for name in (held_out[0], next(name for name in names if not is_held_out(name))):
        own, other = (corpus.held_out, corpus.train) if is_held_out(name) else (corpus.train, corpus.held_out)
        content = (folder / name).read_bytes()
        assert content in own.tobytes()
        assert len(content) < 200 or content not in other.tobytes()


def test_targets_are_the_next_tokens(tmp_path: Path) -> None:
    task = TextTask(load_corpus(token_files(tmp_path, list(range(40)), list(range(100, 130)))), TINY, 0)
    tokens, targets = task.batch(5, Part())
    assert torch.equal(targets, tokens + 1)
    assert tokens.shape == (4, 8)
    halves = [task.batch(5, Part(rank, 2))[0] for rank in range(2)]
    assert torch.equal(torch.cat(halves), tokens)
    assert not torch.equal(task.batch(6, Part())[0], tokens)
    # Held-out windows lie within the held-out text, from its beginning to its end.
    assert task.held_out.tolist() == [0, 10, 21]


def test_wrong_token_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"train\.bin does not exist"):
        load_corpus(tmp_path)
    token_files(tmp_path, [1, 2], [3])
    (tmp_path / "val.bin").write_bytes(b"abc")
    with pytest.raises(TrainingError, match=r"val\.bin has 3 bytes"):
        load_corpus(tmp_path)
    with pytest.raises(TrainingError, match="2 train tokens with length=8"):
        TextTask(load_corpus(token_files(tmp_path, [1, 2], [3])), TINY, 0)
    (tmp_path / "other").mkdir()
    task = TextTask(load_corpus(token_files(tmp_path / "other", [60000] * 20, [3] * 20)), TINY, 0)
    with pytest.raises(TrainingError, match="token 60000"):
        task.batch(0, Part())


class Uniform(nn.Module):
    """Knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.zero.expand(*tokens.shape, 256)


@pytest.mark.parametrize("size", [1, 2])
def test_who_knows_nothing_has_the_vocabularys_perplexity(size: int) -> None:
    task = TextTask(load_corpus(), TINY, 0)
    with torch.no_grad():
        found = [task.evaluate(Uniform(), Part(rank, size))["nats"] for rank in range(size)]
    total, count = (sum(part) for part in zip(*found, strict=True))
    assert math.exp(total / count) == pytest.approx(256)
    assert count == 9


@pytest.mark.parametrize("name", MODELS)
def test_no_model_looks_ahead(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, **text.model_fields(TINY, 256))
    tokens = torch.randint(256, (2, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_models_learn_and_are_compared(tmp_path: Path) -> None:
    scale = dataclasses.replace(TINY, steps=30, batch_size=16)
    found = run_text(scale, tmp_path, models=("attention", "translution"), seeds=2)
    assert all(run["perplexity"] < 150 for run in found["runs"])
    assert [run["perplexity"] for run in found["runs"]] == [math.exp(run["nats"]) for run in found["runs"]]
    attention, translution = text_rows(found)
    beyond = translution.figures[0].beyond_attention
    assert beyond is not None
    assert beyond.mean == pytest.approx(translution.figures[0].measured.mean - attention.figures[0].measured.mean)
    assert (attention.figures[0].paper, translution.figures[0].paper) == (60.40, 56.26)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text.SCALES, "small", TINY)
    command = ["paper", "text", "--models", "attention", "--seeds", "2", "--seed", "4", "--steps", "2", "--jobs", "1",
               "--output", str(tmp_path)]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert [run["seed"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]] == [4, 5]
    assert "perplexity" in done.output
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(app, [*command, "--models", "cnn"]).exit_code == 2
