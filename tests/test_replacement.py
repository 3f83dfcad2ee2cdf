"""replace: what is swapped and what not, that swapped modules really run, and the way back."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from translution.backends.torch.modules import TranslutionAttention, TranslutionConv
from translution.backends.torch.replacement import NotRun, replace

MODES = {"train": (True, True), "eval": (False, True), "no_grad": (False, False)}


class SkippedAttention(nn.MultiheadAttention):
    """Counts calls of its own forward: the trap that replacement has to avoid."""

    calls = 0

    def forward(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        return super().forward(*args, **kwargs)  # type: ignore[arg-type]


def encoder(**more: object) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **more)  # type: ignore[arg-type]
    return nn.TransformerEncoder(layer, 2).double()


def tokens() -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_close(got: Tensor, want: Tensor) -> None:
    """Two layers of 8 features on numbers of order 1: a thousand roundings of float64 are far below 1e-12."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_replaced_attention_runs_in_every_mode(mode: str, norm_first: bool) -> None:
    training, gradients = MODES[mode]
    model, x = encoder(norm_first=norm_first), tokens()
    report = replace(copy.deepcopy(model))
    model.train(training)
    report.model.train(training)
    with torch.set_grad_enabled(gradients):
        want = model(x)
        with report.must_run(mode):
            got = report.model(x)
    assert report.calls() == {"layers.0.self_attn": 1, "layers.1.self_attn": 1}
    assert_close(got, want)


def test_the_trap_is_real() -> None:
    """A subclass of MultiheadAttention is skipped in eval without gradients; so is ours if made to look like one."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double().eval()
    layer.self_attn = SkippedAttention(8, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        layer(tokens())
    assert layer.self_attn.calls == 0
    layer(tokens())
    assert layer.self_attn.calls == 1
    report = replace(encoder().eval())
    report.check_runs(tokens())
    for replaced in report.replaced.values():
        replaced._qkv_same_embed_dim = True  # type: ignore[union-attr]
        replaced.merge_masks = partial(nn.MultiheadAttention.merge_masks, replaced)  # type: ignore[union-attr]
    with pytest.raises(NotRun, match=r"in no_grad the model never called layers\.0\.self_attn, layers\.1\.self_attn"):
        report.check_runs(tokens())


def test_nested_tensors_stay_off_and_come_back() -> None:
    """With a padding mask the encoder packs its input: live positions agree, padded ones are what they are in train."""
    model, x = encoder().eval(), tokens()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    report = replace(copy.deepcopy(model))
    with torch.no_grad(), report.must_run():
        got = report.model(x, src_key_padding_mask=padding)
    with pytest.warns(UserWarning, match="nested tensors"), torch.no_grad():
        want = model(x, src_key_padding_mask=padding)
    assert_close(got[~padding], want[~padding])
    assert torch.equal(want[padding], torch.zeros_like(want[padding]))
    assert_close(got[padding], model.train()(x, src_key_padding_mask=padding)[padding])
    assert not report.model.use_nested_tensor
    assert report.revert().use_nested_tensor


def test_decoder_with_causal_mask_and_memory() -> None:
    torch.manual_seed(2)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0), 1).double().eval()
    target, memory = tokens().transpose(0, 1), tokens()[:, :4].transpose(0, 1)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    report = replace(copy.deepcopy(model))
    with torch.no_grad():
        want = model(target, memory, tgt_mask=causal, tgt_is_causal=True)
        assert_close(report.model(target, memory, tgt_mask=causal, tgt_is_causal=True), want)
    assert report.calls() == {"layers.0.self_attn": 1, "layers.0.multihead_attn": 1}


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.again = self.first
        self.zero = nn.MultiheadAttention(2, 1, add_zero_attn=True, batch_first=True)
        self.unused = nn.Conv1d(1, 1, 1)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.again(self.first(x))).flatten(2).mT
        out: Tensor = self.zero(x, x, x)[0]
        return out


def test_report_shared_and_refused_modules() -> None:
    model = Shared()
    report = replace(model)
    assert [(r.names, r.kind, r.exact) for r in report.modules] == [
        (("first", "again"), "Conv2d", True),
        (("zero",), "MultiheadAttention", False),
        (("unused",), "Conv1d", True),
    ]
    assert "add_zero_attn" in report.modules[1].reason
    assert str(report.modules[0]) == "first = again (Conv2d): exact"
    assert model.first is model.again
    assert isinstance(model.first, TranslutionConv)
    model(torch.zeros(1, 2, 3, 4))
    assert report.calls() == {"first": 2, "unused": 0}
    statistics = model.norm.num_batches_tracked.clone()
    with pytest.raises(NotRun, match="unused"):
        report.check_runs(torch.zeros(1, 2, 3, 4))
    assert torch.equal(model.norm.num_batches_tracked, statistics)  # checked on a copy


def test_revert_gives_back_the_trained_originals() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    conv, optimiser = model[0], torch.optim.SGD(model.parameters(), lr=0.1)
    before = conv.weight.detach().clone()
    report = replace(model)
    model(torch.ones(1, 1, 4, 4)).sum().backward()
    optimiser.step()  # made before the replacement: parameters are shared
    assert not torch.equal(report.replaced["0"].weight, before)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
    trained = model[0].weight
    model.eval()
    assert report.revert() is model
    assert model[0] is conv
    assert conv.weight is trained
    assert not conv.training
    assert report.calls() == {}


def test_state_dicts_load_both_ways() -> None:
    model, other = encoder(), encoder()
    for parameter in other.parameters():
        nn.init.ones_(parameter)
    report = replace(copy.deepcopy(model))
    assert list(report.model.state_dict()) == list(model.state_dict())
    report.model.load_state_dict(other.state_dict())
    model.load_state_dict(report.model.state_dict())
    assert all(torch.equal(p, torch.ones_like(p)) for p in model.parameters())


def test_copy_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 3))
    report = replace(model, inplace=False)
    assert isinstance(model[0], nn.Conv1d)
    assert isinstance(report.model[0], TranslutionConv)


def test_model_that_is_one_module() -> None:
    conv = nn.Conv1d(1, 1, 3)
    report = replace(conv)
    assert isinstance(report.model, TranslutionConv)
    assert [r.names for r in report.modules] == [("model",)]
    assert report.revert() is conv


def test_kinds_choose_what_is_swapped() -> None:
    model = nn.ModuleList([nn.Conv1d(1, 1, 1), nn.MultiheadAttention(2, 1), nn.AvgPool1d(2)])
    report = replace(model, kinds=(nn.MultiheadAttention,))
    assert list(report.replaced) == ["1"]
    assert isinstance(model[1], TranslutionAttention)


def test_hooks_move_along() -> None:
    model, seen = nn.Sequential(nn.Conv1d(1, 1, 1)), []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    replace(model)
    model(torch.zeros(1, 1, 2))
    handle.remove()
    model(torch.zeros(1, 1, 2))
    assert seen == [1]


def test_shortcuts_can_be_switched_on() -> None:
    model, x = encoder().eval(), tokens()
    report = replace(copy.deepcopy(model), None)
    with torch.no_grad():
        assert_close(report.model(x), model(x))
    assert min(report.calls().values()) == 1
