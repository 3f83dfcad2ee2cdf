"""AdamW (Loshchilov and Hutter 2019) whose weight decay holds for matrices and tables alone."""

import torch
from torch import Tensor, nn

from translution.paper.training.settings import Settings

# What these modules hold shifts or scales features, whatever its shape.
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
# Names of parameters that stand for a place, a token or a head rather than multiply features.
ADDED = ("bias", "vectors", "gate", "position", "class_token", "register")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix or a table of matrices: not a bias, a position, a token or a head's number."""
    last = name.rpartition(".")[2]
    return parameter.ndim >= 2 and not any(word in last for word in ADDED)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups for an optimiser, decayed and not, in the order of ``named_parameters``.

    A module can name more that does not decay, as the layers of :mod:`translution.nn` do: ``no_weight_decay()``.
    """
    kept = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", set)()
    }
    norms = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            multiplies = decays(name, parameter) and id(parameter) not in norms and name not in kept
            (decayed if multiplies else others).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def optimiser_for(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """The learning rate is set anew at every step."""
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )


def set_learning_rate(optimiser: torch.optim.Optimizer, learning_rate: float) -> None:
    """For every group."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
