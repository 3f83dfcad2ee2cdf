"""From the authors' whole-model state dicts to our models (hehefan/Translution, commit 13730aa).

    theirs                              ours
    cls_token, pos_embedding            class_token, position_embedding                  (vit)
    to_patch_embedding.1, .2, .3        patch_embedding.norm, .projection, .output_norm  (vit)
    wte, wpe                            token_embedding, position_embedding              (gpt)
    BODY.layers.N.0.norm                layers.N.norm
    BODY.layers.N.0.*                   layers.N.operator.*, as load_operator lays it out
    BODY.layers.N.1.net.0, .1, .4       layers.N.feed_forward.0, .1, .3
    BODY.norm                           norm
    norm                                head_norm                                        (gpt)
    mlp_head, output_head               head                                             (vit, gpt)

BODY is ``translution`` for Translution and alpha, ``transformer`` for attention. What the names and shapes tell is read
from them: depth, widths, relative roles, hybrids, position embeddings, rotations. What they don't is asked for.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from translution.arrays import Array, kind_of
from translution.errors import InputError
from translution.paper.description import Family, ModelDescription, Ordinary, Pooling, Size
from translution.paper.models import GPT, VisionTransformer, build_model
from translution.paper.operators import Roles
from translution.paper.weights import Kind, check_choice, check_sizes, load_operator
from translution.spec.checks import is_whole

# ours: theirs. BODY stands for the name of their stack of layers.
OUTSIDE_LAYERS: Mapping[Family, Mapping[str, str]] = {
    "vit": {
        "class_token": "cls_token",
        "position_embedding": "pos_embedding",
        "patch_embedding.norm": "to_patch_embedding.1",
        "patch_embedding.projection": "to_patch_embedding.2",
        "patch_embedding.output_norm": "to_patch_embedding.3",
        "norm": "BODY.norm",
        "head": "mlp_head",
    },
    "gpt": {
        "token_embedding": "wte",
        "position_embedding": "wpe.weight",
        "norm": "BODY.norm",
        "head_norm": "norm",
        "head": "output_head",
    },
}
WITHIN_LAYER = {"norm": "0.norm", "feed_forward.0": "1.net.0", "feed_forward.1": "1.net.1", "feed_forward.3": "1.net.4"}
BODIES = ("translution", "transformer")
ANGLES = ("rope.", "rotary_emb.")


@dataclass(frozen=True, slots=True)
class _Layers:
    """What the names of the layers tell: the first ``relative_depth`` are of ``kind``, the others ordinary."""

    body: str
    states: tuple[Mapping[str, Array], ...]
    kind: Kind
    roles: Roles | None
    relative_depth: int

    def rotates(self, layers: slice) -> bool:
        return any(name.startswith(ANGLES) for layer in self.states[layers] for name in layer)


def load_model(
    state: Mapping[str, Array],
    *,
    family: Family,
    num_heads: int,
    head_dim: int | None = None,
    kind: Kind | None = None,
    variant: Roles | Literal["none"] | None = None,
    grid: tuple[int, int] | None = None,
    length: int | None = None,
    rank: int | None = None,
    rope: bool | None = None,
    relative_depth: int | None = None,
    ordinary: Ordinary | None = None,
    patch_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    pooling: Pooling = "cls",
    backend: str = "torch",
    algorithm: str | None = None,
) -> VisionTransformer | GPT:
    """One of the authors' whole models, with copies of their numbers in their dtype.

    Every layer of a GPT is causal, those of a hybrid too. In the authors' hybrids ordinary layers look at later tokens:
    with the same numbers this model's logits are others.

    Args:
        state: their parameter names to arrays, NumPy or torch; causal masks and cached angles may be there or not.
        family: ``vit`` or ``gpt``.
        num_heads: heads of every layer.
        head_dim, kind, variant, rank: as for :func:`load_operator`. What is given must agree with it.
        grid: rows and columns of patches, for ``vit``.
        length: tokens of the longest sequence, for ``gpt``. None: what tables, position embedding or mask say.
        rope: whether the layers of ``kind`` rotate (attention; alpha v). None: where the state holds angles.
        relative_depth: how many layers are relative (their ``tln_num``). None: what the state says.
        ordinary: the layers of a hybrid after those. None: ``rope`` where the state holds angles for them.
        patch_size, channels: of the images. None: square patches of 1 or 3 channels, of which one alone can fit.
        pooling: what the head reads; the state does not say.
        backend, algorithm: of every operator, as in :func:`translution.run`.

    Raises:
        InputError: an argument, a name or a shape does not fit; says what was found and what would.
    """
    if not isinstance(state, Mapping):
        raise InputError("P1", f"state is a {type(state).__name__}", "state maps names to arrays", "Give a state dict")
    check_choice("family", family, get_args(Family))
    for name, array in state.items():
        kind_of(name, array)
    layers = _layers(state)
    depth = layers.relative_depth
    _agree("relative_depth", relative_depth, depth)
    # A hybrid without relative layers is attention under another name.
    if not (depth == 0 and relative_depth == 0):
        _agree("kind", kind, layers.kind)
        # load_operator takes these two for attention as well.
        plain = layers.kind == "attention" and variant in ("none", "qkv")
        _agree("variant", None if plain else variant, layers.roles)
    size = _size(state, layers, num_heads, head_dim)
    found_rank = _rank(layers, num_heads)
    _agree("rank", rank, found_rank)
    found_length = _length(state, layers, length) if family == "gpt" else length
    check_sizes(family, layers.kind, grid, found_length, found_rank)
    first = slice(0, depth or None)
    rotated = layers.rotates(first) if rope is None else rope
    if layers.kind == "attention" and not rotated and layers.rotates(first):
        _agree("rope", rope, True)
    if ordinary is None:
        ordinary = "rope" if 0 < depth < size.depth and layers.rotates(slice(depth, None)) else "attention"
    description = ModelDescription(
        family=family,
        size=size,
        kind="rope" if layers.kind == "attention" and rotated else layers.kind,
        roles=layers.roles,
        rank=found_rank,
        rotary=layers.kind == "alpha" and rotated,
        relative_depth=depth or None,
        ordinary=ordinary,
        output_projection="to_out.0.weight" in layers.states[0],
        position_embedding=OUTSIDE_LAYERS[family]["position_embedding"] in state,
        pooling=pooling,
        **(_images(state, grid, patch_size, channels) if family == "vit" else _text(state, found_length)),
    )
    model = build_model(description, backend=backend, algorithm=algorithm, device="meta")
    ours = _outside_operators(state, model, family, layers.body)
    for number, layer in enumerate(layers.states):
        relative = number < depth or depth == 0
        operator, params = load_operator(
            layer,
            family=family,
            kind=layers.kind if relative else "attention",
            variant=layers.roles if relative else None,
            grid=grid if family == "vit" else None,
            length=description.length,
            num_heads=num_heads,
            head_dim=size.head_dim,
            rank=found_rank if relative else None,
            rope=rotated if relative else ordinary == "rope",
        )
        assert operator == description.operator(number)
        ours |= {f"layers.{number}.operator.{name}": _tensor(value) for name, value in params.items()}
    model.load_state_dict(ours, assign=True)
    return model


def _agree(name: str, given: object, found: object) -> None:
    if given is not None and given != found:
        raise InputError(
            "P1", f"{name}={given!r}", f"the state is that of a model with {name}={found!r}", f"Leave {name} out"
        )


def _shape(state: Mapping[str, Array], name: str, axes: int) -> tuple[int, ...]:
    if name not in state:
        raise InputError(
            "P1",
            f"state misses {name!r}",
            f"every whole model of the authors has it; found {_some(state)}",
            "Check family, and give the state dict of the whole model",
        )
    shape = tuple(state[name].shape)
    if len(shape) != axes:
        raise InputError("P1", f"{name} has shape {shape}", f"it has {axes} axes", "Check the state dict")
    return shape


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def _layers(state: Mapping[str, Array]) -> _Layers:
    bodies = [body for body in BODIES if any(name.startswith(f"{body}.layers.") for name in state)]
    if len(bodies) != 1:
        raise InputError(
            "P1",
            f"state has layers under {bodies or 'no name'}",
            f"the layers of a whole model stand under {' or '.join(f'{body}.layers' for body in BODIES)}",
            "Give the state dict of one whole model; load_operator takes that of one layer",
        )
    found: dict[int, dict[str, Array]] = {}
    for name, array in state.items():
        if match := re.fullmatch(rf"{bodies[0]}\.layers\.(\d+)\.0\.(.+)", name):
            found.setdefault(int(match[1]), {})[match[2]] = array
    if sorted(found) != list(range(len(found))):
        raise InputError(
            "P1", f"state has layers {sorted(found)}", "layers count from 0 without a gap", "Give them all"
        )
    states = tuple(found[number] for number in range(len(found)))
    forms = [_form(layer) for layer in states]
    depth = next((number for number, form in enumerate(forms) if form != forms[0]), len(forms))
    if forms[0][0] == "attention":
        depth = 0
    if any(kind != "attention" for kind, _ in forms[depth:]):
        raise InputError(
            "P1",
            f"state has layers of {', '.join(' '.join(filter(None, form)) for form in forms)}",
            "the first layers have the same relative roles and the others none",
            "Load such a model layer by layer with load_operator",
        )
    kind, roles = forms[0]
    return _Layers(bodies[0], states, kind, roles, depth)


def _form(layer: Mapping[str, Array]) -> tuple[Kind, Roles | None]:
    for kind, name in (("full", "to_{}.unique_params"), ("alpha", "to_{}2.unique_params")):
        roles = "".join(role for role in "qkv" if name.format(role) in layer)
        if roles:
            return ("full" if kind == "full" else "alpha"), next(known for known in get_args(Roles) if known == roles)
    return "attention", None


def _size(state: Mapping[str, Array], layers: _Layers, num_heads: int, head_dim: int | None) -> Size:
    (dim,) = _shape(state, f"{layers.body}.norm.weight", 1)
    mlp_dim, _ = _shape(state, f"{layers.body}.layers.0.1.net.1.weight", 2)
    # They leave the projection out where one head has the model's width.
    projection = f"{layers.body}.layers.0.0.to_out.0.weight"
    width = _shape(state, projection, 2)[1] if projection in state else dim
    if not is_whole(num_heads) or num_heads < 1 or width % num_heads:
        raise InputError(
            "P1",
            f"num_heads={num_heads!r}",
            f"the heads of this state have {width} features together, which num_heads divides",
            "Check num_heads",
        )
    _agree("head_dim", head_dim, width // num_heads)
    return Size(dim, len(layers.states), num_heads, width // num_heads, mlp_dim)


def _rank(layers: _Layers, num_heads: int) -> int | None:
    if layers.kind != "alpha" or layers.roles is None:
        return None
    inner = _shape(layers.states[0], f"to_{layers.roles[0]}2.unique_params", 3)[-1]
    if inner % num_heads:
        raise InputError("P1", f"num_heads={num_heads}", f"it divides the inner width {inner}", "Check num_heads")
    return inner // num_heads


def _length(state: Mapping[str, Array], layers: _Layers, given: int | None) -> int:
    """Of the longest sequence; wherever a name tells."""
    first = layers.states[0]
    told = {name: len(array) for name, array in first.items() if name.endswith(".unique_params")}
    told |= {name: array.shape[-1] for name, array in first.items() if name == "causal"}
    told |= {name: array.shape[-2] for name, array in first.items() if name.startswith(ANGLES)}
    told |= {name: len(state[name]) for name in ("wpe.weight",) if name in state}
    if len(set(told.values())) > 1 or not (told or given is not None):
        raise InputError(
            "P1",
            f"length={given} for a state whose {told or 'names'} tell {'different lengths' if told else 'none'}",
            "a gpt has one length",
            "Check the state dict, or give length",
        )
    found = next(iter(told.values()), given)
    assert found is not None
    _agree("length", given, found)
    return found


def _images(
    state: Mapping[str, Array],
    grid: tuple[int, int] | None,
    patch_size: int | tuple[int, int] | None,
    channels: int | None,
) -> dict[str, Any]:
    (patch_dim,) = _shape(state, "to_patch_embedding.1.weight", 1)
    num_classes, _ = _shape(state, "mlp_head.weight", 2)
    _shape(state, "cls_token", 3)
    assert grid is not None
    found: list[tuple[int, tuple[int, int]]] = []
    if patch_size is None:
        # At most one of n and n / 3 is a square.
        for number in (1, 3) if channels is None else (channels,):
            extent = math.isqrt(patch_dim // number)
            found += [(number, (extent, extent))] * (number * extent**2 == patch_dim)
    else:
        height, width = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
        number = channels or patch_dim // (height * width)
        found += [(number, (height, width))] * (number * height * width == patch_dim)
    if not found:
        raise InputError(
            "P1",
            f"patch_size={patch_size}, channels={channels}",
            f"the patches of this state have {patch_dim} numbers, all channels together",
            "Give the patch_size and channels that make so many",
        )
    ((number, extents),) = found
    image_size = tuple(count * size for count, size in zip(grid, extents, strict=True))
    return {"image_size": image_size, "patch_size": extents, "channels": number, "num_classes": num_classes}


def _text(state: Mapping[str, Array], length: int | None) -> dict[str, Any]:
    vocabulary_size, _ = _shape(state, "wte.weight", 2)
    return {"length": length, "vocabulary_size": vocabulary_size}


def _their_name(ours: str, family: Family, body: str) -> str:
    """Of one of our parameters that no operator holds."""
    if match := re.fullmatch(r"layers\.(\d+)\.(norm|feed_forward\.\d)\.(weight|bias)", ours):
        return f"{body}.layers.{match[1]}.{WITHIN_LAYER[match[2]]}.{match[3]}"
    names = OUTSIDE_LAYERS[family]
    module, _, leaf = ours.rpartition(".")
    theirs = names[ours] if ours in names else f"{names[module]}.{leaf}"
    return theirs.replace("BODY", body)


def _outside_operators(
    state: Mapping[str, Array], model: VisionTransformer | GPT, family: Family, body: str
) -> dict[str, Tensor]:
    """Everything but the operators' numbers, under our names."""
    ours = {name: value for name, value in model.state_dict().items() if ".operator." not in name}
    theirs = {name: _their_name(name, family, body) for name in ours}
    own = {name for name in state if not re.match(rf"{body}\.layers\.\d+\.0\.(?!norm\.)", name)}
    wanted = set(theirs.values())
    if wanted != own:
        raise InputError(
            "P1",
            f"state misses {sorted(wanted - own) or 'nothing'} and has the unknown {sorted(own - wanted) or 'nothing'}",
            f"beside its operators this {family} has {len(wanted)} parameters",
            "Check family, and give the state dict of one whole model",
        )
    for name, value in ours.items():
        found = tuple(state[theirs[name]].shape)
        if found != tuple(value.shape):
            raise InputError(
                "P1",
                f"{theirs[name]} has shape {found}",
                f"this {family} has {tuple(value.shape)}",
                "Check grid or length, num_heads and patch_size",
            )
    return {name: _tensor(state[theirs[name]]) for name in ours}


def _tensor(value: Array) -> Tensor:
    """A copy that no graph leads to."""
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value.detach().clone()
