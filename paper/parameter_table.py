"""Parameter counts of the paper's models beside the paper's figures (arXiv 2510.10060, tables 1 to 4)."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from translution.paper.description import SIZES, ModelDescription
from translution.paper.models import build_model
from translution.paper.operators import Roles
from translution.progress import Update, silently

IMAGE_SIZE, NUM_CLASSES, VOCABULARY_SIZE, RANK = 224, 1000, 50257, 8
PATCHES, LENGTHS = (56, 32, 16), (160, 256)


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One row of the paper: the figure that it prints, and the exact count of the authors' code."""

    name: str
    printed: str
    exact: int
    description: ModelDescription


@dataclass(frozen=True, slots=True)
class Count:
    """What a model was found to have; ``unreached`` of them have no influence on the result."""

    parameters: int
    unreached: int
    description: ModelDescription

    @property
    def size(self) -> str | None:
        """The name of the model's size, None where it is none of the paper's."""
        return next((name for name, known in SIZES.items() if known == self.description.size), None)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        described = asdict(self.description) | {"size": self.size or asdict(self.description.size)}
        return {**described, "parameters": self.parameters, "unreached": self.unreached}


def _vit(size: str, patch_size: int) -> ModelDescription:
    """Attention without positions; the variants are made from it."""
    return ModelDescription(
        family="vit",
        size=SIZES[size],
        kind="attention",
        image_size=IMAGE_SIZE,
        patch_size=patch_size,
        channels=3,
        num_classes=NUM_CLASSES,
    )


def _gpt(size: str, length: int) -> ModelDescription:
    return ModelDescription(
        family="gpt", size=SIZES[size], kind="attention", length=length, vocabulary_size=VOCABULARY_SIZE
    )


def paper_rows() -> tuple[PaperRow, ...]:
    """The ten rows whose parameters the paper prints."""
    images, text = _vit("tiny", 56), _gpt("tiny", 160)
    digits = replace(images, image_size=84, patch_size=12, channels=1, num_classes=10)

    def forms(base: ModelDescription) -> tuple[ModelDescription, ...]:
        return (
            replace(base, position_embedding=True),
            replace(base, kind="alpha", rank=RANK),
            replace(base, kind="full"),
        )

    (d_attention, d_alpha, d_full), (i_attention, i_alpha, i_full), (t_attention, t_alpha, t_full) = map(
        forms, (digits, images, text)
    )
    return (
        PaperRow("MNIST, self-attention", "2.7M", 2_706_346, d_attention),
        PaperRow("MNIST, alpha-Translution", "4.6M", 4_590_634, d_alpha),
        PaperRow("MNIST, Translution", "116.2M", 116_164_138, d_full),
        PaperRow("ViT-A/56, self-attention", "4.69M", 4_688_296, i_attention),
        PaperRow("ViT-A/56, RoFormer", "4.69M", 4_688_296, replace(i_attention, kind="rope")),
        PaperRow("ViT-A/56, alpha-Translution", "5.33M", 5_334_760, i_alpha),
        PaperRow("ViT-A/56, Translution", "38.53M", 38_526_184, i_full),
        PaperRow("LM, self-attention", "22.0M", 21_995_904, t_attention),
        PaperRow("LM, alpha-Translution", "23.7M", 23_734_656, t_alpha),
        PaperRow("LM, Translution", "127.5M", 127_469_952, t_full),
    )


def whole_grid() -> Iterator[ModelDescription]:
    """Five sizes, patches of 56, 32 and 16 pixels and lengths of 160 and 256: each with attention (without and with a
    position embedding), Translution and alpha in seven role sets.
    """
    for size in SIZES:
        for base in (*(_vit(size, patch) for patch in PATCHES), *(_gpt(size, length) for length in LENGTHS)):
            yield base
            yield replace(base, position_embedding=True)
            for roles in get_args(Roles):
                yield replace(base, kind="full", roles=roles)
                yield replace(base, kind="alpha", roles=roles, rank=RANK)


def count(description: ModelDescription) -> Count:
    """The parameters of one model, built on torch's meta device: nothing is allocated."""
    model = build_model(description, device="meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Count(parameters, sum(description.unreached_parameters.values()), description)


def count_all(update: Update = silently) -> tuple[list[tuple[PaperRow, Count]], list[Count]]:
    """The paper's rows and the whole grid, counted."""
    rows = [(row, count(row.description)) for row in paper_rows()]
    wanted = list(whole_grid())
    found = []
    for done, description in enumerate(wanted):
        update("models", done, len(wanted))
        found.append(count(description))
    update("models", len(wanted), len(wanted))
    return rows, found
