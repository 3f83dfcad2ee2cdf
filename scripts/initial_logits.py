"""Print the table of docs/layers.md: standard deviation of the logits with which layers start."""

import math

import torch

import translution
from translution.nn import OperatorLayer
from translution.spec import Operator, presets

DIM, NUM_HEADS, GRID, LAYERS, BATCH = 192, 3, (7, 7), 4, 4
ROLES = ("qkv", "qk", "qv", "kv", "q", "k", "v")


def spread(layer: OperatorLayer) -> float:
    """Variance of the logits within rows; a softmax keeps them up to a number per row."""
    layout = layer.operator.layout
    x = torch.nn.functional.layer_norm(torch.randn(BATCH, layout.num_queries, DIM), (DIM,))
    params = layer.operator_parameters()
    _, weights = translution.run(layer.operator, params, x, algorithm="pairwise", return_weights=True)
    logits = weights.double().log()
    centred = logits - logits.mean(-1, keepdim=True)
    return (centred.square().sum(-1) / (layout.num_keys - 1)).mean().item()


def start_as_the_authors(layer: OperatorLayer) -> None:
    """Uniform within fan_in ** -0.5, where the fan-in of a table is taken to be in * out."""
    for name, parameter in layer.named_parameters():
        if name.endswith(".table"):
            fan_in = parameter.shape[-2] * parameter.shape[-1]
        elif parameter.dim() > 1:
            fan_in = parameter.shape[-2]
        else:
            continue
        torch.nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)


@torch.no_grad()
def measure(operator: Operator) -> tuple[float, float]:
    """Standard deviations with our initial values and with the authors'."""
    found: tuple[list[float], list[float]] = ([], [])
    for seed in range(LAYERS):
        torch.manual_seed(seed)
        layer = OperatorLayer(operator)
        found[0].append(spread(layer))
        start_as_the_authors(layer)
        found[1].append(spread(layer))
    first, second = (math.sqrt(sum(each) / LAYERS) for each in found)
    return first, second


def main() -> None:
    """Print it."""
    print("| operator | relative | here | with the authors' rule |\n| --- | --- | --- | --- |")
    rows = [("attention", "none", presets.self_attention(GRID, DIM, NUM_HEADS, registers=1))]
    rows += [("Translution", r, presets.translution(GRID, DIM, NUM_HEADS, roles=r, registers=1)) for r in ROLES]
    rows += [("alpha", r, presets.alpha_translution(GRID, DIM, NUM_HEADS, roles=r, registers=1)) for r in ROLES]
    for name, roles, operator in rows:
        ours, theirs = measure(operator)
        print(f"| {name} | {roles} | {ours:.3f} | {theirs:.4f} |")


if __name__ == "__main__":
    main()
