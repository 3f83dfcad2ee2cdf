"""ImageNet's recipe on a tiny folder that the tests make: what is done to images, and what is refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from translution.cli import app
from translution.paper.description import Size
from translution.paper.experiments.image_folder import open_image, read_folder, read_pair
from translution.paper.experiments.image_transforms import (
    MEAN,
    OPERATIONS,
    as_tensor,
    centre_crop,
    mixed,
    numpy_generator,
    rand_augment,
    random_resized_crop,
    soft_targets,
)  # fmt: skip
from translution.paper.experiments.images import ImageTask, Recipe, run_images
from translution.paper.experiments.summaries import image_rows
from translution.paper.training import Part, TrainingError

TINY = Recipe(
    size=Size(dim=8, depth=1, num_heads=2, head_dim=4, mlp_dim=16), image_size=16, patch_size=8, epochs=2, batch_size=4,
    rank=2,
)  # fmt: skip
COLOURS = {"cold": (20, 40, 200), "warm": (220, 60, 30)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, told apart by their colour: six images to train on and three held out of each."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name, colour in COLOURS.items():
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(draw.normal(colour, 20, (24 + number, 30, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path / "data"


def picture(width: int = 30, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


def test_what_can_not_be_read_is_refused(folder: Path) -> None:
    with pytest.raises(TrainingError, match="nowhere is no folder"):
        read_folder(folder / "nowhere")
    with pytest.raises(TrainingError, match="cold has no folder in it"):
        read_folder(folder / "train" / "cold")
    (folder / "val" / "empty").mkdir()
    with pytest.raises(TrainingError, match="empty has no image in it"):
        read_pair(folder)
    Image.new("RGB", (4, 4)).save(folder / "val" / "empty" / "one.png")
    with pytest.raises(TrainingError, match=r"1 classes are in only one of .*, empty first"):
        read_pair(folder)
    broken = folder / "train" / "cold" / "0.png"
    for content in (b"", broken.read_bytes()[:60], b"no image at all"):
        broken.write_bytes(content)
        with pytest.raises(TrainingError, match=r"0\.png can't be read as an image"):
            open_image(broken)


def test_folders_are_read_in_order(folder: Path) -> None:
    train, held_out = read_pair(folder)
    assert train.classes == ("cold", "warm")
    assert train.labels == (0,) * 6 + (1,) * 6
    assert [path.name for path in held_out.paths] == ["0.png", "1.png", "2.png"] * 2
    assert train.digest() != held_out.digest()


def test_crops_have_the_size_and_lie_inside() -> None:
    black = Image.new("RGB", (30, 24))
    for number in range(20):
        crop = random_resized_crop(black, 16, numpy_generator("crop", number))
        assert crop.size == (16, 16)
        assert not np.array(crop).any()
    one, other = (np.array(random_resized_crop(picture(), 16, numpy_generator("crop", n))) for n in (1, 2))
    assert not np.array_equal(one, other)
    marked = picture(40, 20)
    middle = np.array(centre_crop(marked, 20, share=1.0))
    assert np.array_equal(middle, np.array(marked)[:, 10:30])


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_size_and_grow_with_their_amount(name: str) -> None:
    image = picture()
    changed = [np.array(OPERATIONS[name](image, amount)).astype(int) for amount in (0.0, 0.9, -0.9)]
    assert all(one.shape == (24, 30, 3) for one in changed)
    if name in ("identity", "autocontrast", "equalize"):
        assert np.array_equal(changed[0], changed[1])
    elif name != "solarize":
        assert np.array_equal(changed[0], np.array(image))
    if name not in ("identity", "autocontrast"):
        assert not np.array_equal(changed[1], np.array(image))


def test_augmentation_depends_on_the_generator_alone() -> None:
    one, same, other = (np.array(rand_augment(picture(), numpy_generator("a", n))) for n in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_pixels_are_normalised() -> None:
    grey = Image.new("RGB", (4, 4), tuple(round(255 * mean) for mean in MEAN))
    assert float(as_tensor(grey).abs().max()) < 0.01
    assert as_tensor(picture()).shape == (3, 24, 30)


def test_soft_targets_are_probabilities() -> None:
    found = soft_targets(torch.tensor([2, 0]), 4, 0.1)
    assert torch.allclose(found, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))


@pytest.mark.parametrize("number", range(6))
def test_mixing_keeps_the_sums_and_is_the_same_for_parts(number: int) -> None:
    images = torch.rand((8, 3, 10, 10), generator=torch.Generator().manual_seed(1))
    targets = torch.eye(8)
    out, wanted = mixed(images, targets, numpy_generator("mix", number))
    assert torch.allclose(wanted.sum(1), torch.ones(8))
    share = float(wanted[0, 0])
    assert torch.allclose(wanted[0], torch.tensor([share, 1 - share] + [0.0] * 6))
    # The share of the target is the share of the image: by number of pixels for CutMix, by weight for MixUp.
    own = (out[0] == images[0]).all(0)
    if own.any() and not own.all():
        assert float(own.double().mean()) == pytest.approx(share)
        assert torch.equal(out[0][:, ~own], images[1][:, ~own])
    else:
        assert torch.allclose(out[0], share * images[0] + (1 - share) * images[1])
    parts = [mixed(images[own], targets[own], numpy_generator("mix", number))[0] for own in (slice(4), slice(4, 8))]
    assert torch.equal(torch.cat(parts), out)


def test_batches_depend_on_the_step_and_join(folder: Path) -> None:
    task, again = (ImageTask(*read_pair(folder), TINY, 0, readers=2) for _ in range(2))
    try:
        images, targets = task.batch(0, Part())
        assert images.shape == (4, 3, 16, 16)
        assert torch.allclose(targets.sum(1), torch.ones(4))
        later = task.batch(1, Part())
        # Not in order, and not what was read ahead.
        assert torch.equal(again.batch(1, Part())[0], later[0])
        assert torch.equal(again.batch(0, Part())[0], images)
        halves = [again.batch(0, Part(rank, 2))[0] for rank in range(2)]
        assert torch.equal(torch.cat(halves), images)
    finally:
        task.close()
        again.close()
    with pytest.raises(TrainingError, match="mixed in pairs"):
        ImageTask(*read_pair(folder), dataclasses.replace(TINY, batch_size=3), 0)


def test_the_recipe_runs_and_learns_colours(folder: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(TINY, epochs=20, learning_rate=1e-2)
    found = run_images(recipe, tmp_path / "runs", folder, models=("translution",))
    (row,) = image_rows(found)
    assert [figure.paper for figure in row.figures] == [52.41, 76.50]
    assert row.figures[0].measured.mean == 100.0
    assert row.figures[1].measured.mean == 100.0


def test_the_command_refuses_and_runs(folder: Path, tmp_path: Path) -> None:
    runner, output = CliRunner(), str(tmp_path / "runs")
    wrong = runner.invoke(app, ["paper", "images", str(folder / "train"), "--output", output])
    assert wrong.exit_code == 2
    assert "is no folder" in wrong.output
    done = runner.invoke(app, [
        "paper", "images", str(folder), "--output", output, "--models", "rope", "--epochs", "1", "--batch-size", "4",
        "--image", "16", "--patch", "8",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "46.65" in done.output
    (folder / "train" / "cold" / "0.png").write_bytes(b"damaged")
    small = ["--epochs", "1", "--batch-size", "12", "--image", "16", "--patch", "8"]
    damaged = runner.invoke(app, ["paper", "images", str(folder), "--output", output, "--models", "none", *small])
    assert damaged.exit_code == 2
    assert "0.png can't be read" in damaged.output
