"""The paper's models as data (arXiv 2510.10060, section 5): a ViT or a GPT, its size, and what relates its tokens.

    x = tokens (+ position embedding)
    x = x + operator(norm(x));  x = x + feed_forward(norm(x))        for each layer
    logits = head(norm(x))

Nothing here computes; `translution.paper.build_model` makes the model, on any device or on none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast, get_args

from translution.errors import InputError
from translution.paper.operators import Kind, Roles, layer_operator, unreached
from translution.spec import Operator
from translution.spec.checks import is_whole

Family = Literal["vit", "gpt"]
Pooling = Literal["cls", "mean"]
Ordinary = Literal["attention", "rope"]


@dataclass(frozen=True, slots=True)
class Size:
    """Width and depth of a model; ``num_heads * head_dim`` features are attended with."""

    dim: int
    depth: int
    num_heads: int
    head_dim: int
    mlp_dim: int


# The paper's letters: tiny is A, mini B, small C.
SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "tiny": Size(192, 6, 3, 64, 768),
        "mini": Size(192, 12, 3, 64, 768),
        "small": Size(384, 12, 6, 64, 1536),
        "base": Size(768, 12, 12, 64, 3072),
        "large": Size(1024, 24, 16, 64, 4096),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """One of the paper's models, or one built as they are.

    Args:
        family: ``vit`` maps images [B, channels, height, width] to logits [B, num_classes]; ``gpt`` maps tokens [B, N],
            N at most ``length``, to logits [B, N, vocabulary_size] and no logit looks at a later token.
        size: one of :data:`SIZES`, or another.
        kind: what relates the tokens; :func:`translution.paper.operators.layer_operator` lists the kinds.
        roles: the relative roles of ``full`` and ``alpha``; None for qkv.
        rank: inner width per head of ``alpha``; None for 8, the paper's.
        rotary: the shared queries and keys of ``alpha`` are turned by their positions.
        relative_depth: a hybrid: so many layers are of ``kind``, those after them of ``ordinary`` (the authors'
            ``tln_num``). None for all.
        ordinary: the layers after the relative ones: ``attention`` without positions, or ``rope``.
        position_embedding: a learned vector for each token's place is added to it.
        output_projection: False leaves it out of every layer.
        image_size, patch_size: height and width in pixels, or one number for both (``vit``).
        channels, num_classes: of the images (``vit``).
        class_token: a learned token before the patches (``vit``).
        pooling: ``cls`` reads the class token, ``mean`` the mean of all tokens, the class token among them (``vit``).
        length, vocabulary_size: longest sequence and number of tokens (``gpt``).

    Raises:
        InputError: a field does not fit the family or the kind, or is no positive whole number.
    """

    family: Family
    size: Size
    kind: Kind
    roles: Roles | None = None
    rank: int | None = None
    rotary: bool = False
    relative_depth: int | None = None
    ordinary: Ordinary = "attention"
    position_embedding: bool = False
    output_projection: bool = True
    image_size: int | tuple[int, int] | None = None
    patch_size: int | tuple[int, int] | None = None
    channels: int | None = None
    num_classes: int | None = None
    class_token: bool = True
    pooling: Pooling = "cls"
    length: int | None = None
    vocabulary_size: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("family", Family), ("kind", Kind), ("pooling", Pooling), ("ordinary", Ordinary)):
            _require(getattr(self, name) in get_args(known), self, name, f"is one of {', '.join(get_args(known))}")
        for name in ("rotary", "position_embedding", "output_projection", "class_token"):
            _require(isinstance(getattr(self, name), bool), self, name, "is a bool")
        _require(isinstance(self.size, Size), self, "size", "is a Size, e.g. SIZES['tiny']")
        for name in Size.__slots__:
            _require_whole(self, f"size.{name}", getattr(self.size, name))
        self._check_family()
        self._check_kind()

    def _check_family(self) -> None:
        own, other = (VIT_FIELDS, GPT_FIELDS) if self.family == "vit" else (GPT_FIELDS, VIT_FIELDS)
        for name in other:
            _require(getattr(self, name) is None, self, name, f"does not belong to family {self.family!r}")
        for name in own:
            value = getattr(self, name)
            if name in ("image_size", "patch_size"):
                value = value if isinstance(value, (tuple, list)) else (value, value)
                _require(len(value) == 2, self, name, "is one number, or height and width")
                for extent in value:
                    _require_whole(self, name, extent)
                object.__setattr__(self, name, tuple(value))
            else:
                _require_whole(self, name, value)
        if self.family == "gpt":
            _require(self.class_token and self.pooling == "cls", self, "pooling", "and class_token belong to a vit")
            return
        images, patches = self._pair("image_size"), self.patch_extents
        fits = all(i % p == 0 for i, p in zip(images, patches, strict=True))
        _require(fits, self, "image_size", f"divides into patches of {patches}")
        _require(self.class_token or self.pooling == "mean", self, "pooling", "is mean where there is no class token")

    def _check_kind(self) -> None:
        relative, low_rank = self.kind in ("full", "alpha"), self.kind == "alpha"
        _require(relative or self.roles is None, self, "roles", "belongs to full and alpha")
        _require(low_rank or self.rank is None, self, "rank", "belongs to alpha")
        _require(low_rank or not self.rotary, self, "rotary", "belongs to alpha; kind rope is attention that rotates")
        if relative and self.roles is None:
            object.__setattr__(self, "roles", "qkv")
        if low_rank and self.rank is None:
            object.__setattr__(self, "rank", 8)
        if relative:
            _require(self.roles in get_args(Roles), self, "roles", f"is one of {', '.join(get_args(Roles))}")
        if low_rank:
            _require_whole(self, "rank", self.rank)
        if self.relative_depth is None:
            object.__setattr__(self, "relative_depth", self.size.depth)
        depth = self.relative_depth
        _require(
            is_whole(depth) and 0 <= depth <= self.size.depth,
            self,
            "relative_depth",
            f"is a whole number of the {self.size.depth} layers",
        )

    def _pair(self, name: str) -> tuple[int, int]:
        return cast(tuple[int, int], getattr(self, name))

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns of patches, or the length of the sequence."""
        if self.family == "gpt":
            assert self.length is not None
            return (self.length,)
        return tuple(i // p for i, p in zip(self._pair("image_size"), self.patch_extents, strict=True))

    @property
    def num_tokens(self) -> int:
        """Tokens of one image or of the longest sequence, the class token included."""
        return math.prod(self.grid) + self.registers

    @property
    def registers(self) -> int:
        """Tokens before the grid."""
        return int(self.family == "vit" and self.class_token)

    @property
    def patch_extents(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self._pair("patch_size")

    @property
    def patch_dim(self) -> int:
        """Numbers of one patch, all channels."""
        assert self.channels is not None
        return self.channels * math.prod(self.patch_extents)

    def operator(self, layer: int) -> Operator:
        """What relates the tokens in layer ``layer``, from 0; causal in every layer of a gpt."""
        assert self.relative_depth is not None
        relative, size = layer < self.relative_depth, self.size
        return layer_operator(
            self.kind if relative else self.ordinary,
            self.grid,
            size.dim,
            size.num_heads,
            head_dim=size.head_dim,
            registers=self.registers,
            causal=self.family == "gpt",
            roles=self.roles or "qkv",
            rank=self.rank or 8,
            rotary=self.rotary,
            output_projection=self.output_projection,
        )

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters, counted from the specs."""
        size = self.size
        norm, mlp = 2 * size.dim, 2 * size.dim * size.mlp_dim + size.mlp_dim + size.dim
        layers = sum(self.operator(layer).num_parameters + 2 * norm + mlp for layer in range(size.depth))
        found = layers + norm + self.num_tokens * size.dim * self.position_embedding
        if self.family == "gpt":
            assert self.vocabulary_size is not None
            return found + norm + 2 * self.vocabulary_size * size.dim
        assert self.num_classes is not None
        patches = 2 * self.patch_dim + self.patch_dim * size.dim + size.dim + norm
        return found + patches + self.registers * size.dim + (size.dim + 1) * self.num_classes

    @property
    def unreached_parameters(self) -> Mapping[str, int]:
        """How many numbers of which parameter have no influence on the result and never get a gradient.

        With ``pooling='cls'`` the last layer is read at the class token alone, so of its tables by displacement only
        the rows for that token matter. Empty with ``pooling='mean'``, for a hybrid, and for a gpt.
        """
        last = self.size.depth - 1
        if self.family == "gpt" or self.pooling == "mean":
            return MappingProxyType({})
        found = unreached(self.operator(last))
        return MappingProxyType({f"layers.{last}.operator.{name}": count for name, count in found.items()})


VIT_FIELDS = ("image_size", "patch_size", "channels", "num_classes")
GPT_FIELDS = ("length", "vocabulary_size")


def _require(holds: bool, description: ModelDescription, name: str, rule: str) -> None:
    if not holds:
        shown = f"{name}={getattr(description, name)!r} of a {description.kind!r} {description.family!r}"
        raise InputError("P1", shown, f"{name} {rule}", f"Change {name}")


def _require_whole(description: ModelDescription, name: str, value: object) -> None:
    if not (is_whole(value) and value >= 1):
        shown = f"{name}={value!r} of a {description.kind!r} {description.family!r}"
        raise InputError("P1", shown, f"{name} is a positive whole number", f"Give {name} as a positive int")
