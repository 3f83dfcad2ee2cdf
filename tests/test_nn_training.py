"""Twenty steps of training with our kernels and with the definition: the same layer to rounding."""

import copy

import pytest
import torch

import translution
from translution.nn import AlphaTranslution1d, OperatorLayer, Translution2d
from translution.spec import presets

STEPS, RATE = 20, 1e-2


class Definition(torch.autograd.Function):
    """The operator by loops over pairs in float64, and its gradients by the same."""

    @staticmethod
    def forward(ctx, operator, names, x, *params):
        ctx.operator, ctx.names = operator, names
        ctx.save_for_backward(x, *params)
        return translution.run(operator, dict(zip(names, params, strict=True)), x, backend="reference")

    @staticmethod
    def backward(ctx, cotangent):
        x, *params = ctx.saved_tensors
        own = dict(zip(ctx.names, params, strict=True))
        _, found = translution.vjp(ctx.operator, own, x, cotangent=cotangent.contiguous(), backend="reference")
        return None, None, found.x, *(found.params[name] for name in ctx.names)


class Defined(torch.nn.Module):
    """A layer whose operator is computed by :class:`Definition`, on the same parameters."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        params = self.layer.operator_parameters()
        return Definition.apply(self.layer.operator, tuple(params), x, *params.values())


def trained(model, data):
    """Losses, and the parameters afterwards: AdamW on a LayerNorm, the layer and a residual."""
    norm = torch.nn.LayerNorm(data[0][0].shape[-1], dtype=torch.float64)
    parameters = [*model.parameters(), *norm.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.05)
    losses = []
    for x, target in data:
        loss = (x + model(norm(x)) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, [p.detach() for p in parameters]


@pytest.mark.parametrize(
    "make",
    [
        lambda way: Translution2d(8, 2, grid=(2, 3), registers=1, algorithm=way, dtype=torch.float64),
        lambda way: AlphaTranslution1d(8, 2, grid=5, causal=True, rank=2, algorithm=way, dtype=torch.float64),
        lambda way: OperatorLayer(presets.convit_attention((2, 3), 8, 2), algorithm=way, dtype=torch.float64),
    ],
    ids=["full", "alpha", "convit"],
)
def test_a_trained_layer_is_the_one_trained_by_the_definition(make):
    torch.manual_seed(0)
    layer = make("stream")
    start = copy.deepcopy(layer.state_dict())
    batch = torch.randn(2, 2, layer.operator.layout.num_queries, 8, dtype=torch.float64)
    data = [(batch[0], batch[1].roll(1, -1))] * STEPS
    losses, found = trained(layer, data)
    assert losses[-1] < 0.8 * losses[0]
    assert all((p - start[n]).abs().max() > RATE for n, p in layer.named_parameters())
    pairwise = make("pairwise")
    defined = make(None)
    for other, model in ((pairwise, pairwise), (defined, Defined(defined))):
        other.load_state_dict(start)
        other_losses, expected = trained(model, data)
        assert max(abs(a - b) for a, b in zip(losses, other_losses, strict=True)) < 1e-12
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)
