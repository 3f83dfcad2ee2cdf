"""Numbers of all links of a stretch, one for each head, and their parts by visit and displacement."""

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from translution.backends.torch.memory import Store
from translution.backends.torch.stretches import Stretch


class ByLink:
    """Numbers of all links of a stretch, ``whole`` [links, B, H], and the views of it that are asked for."""

    def __init__(self, whole: Tensor, stretch: Stretch) -> None:
        self.whole, self.factors, self._stretch = whole, whole.unsqueeze(-1), stretch

    @cached_property
    def visits(self) -> list[Tensor]:
        """For each visit [displacements, P, B, H, 1]."""
        return self._stretch.visit_parts(self.factors)

    @cached_property
    def displacements(self) -> list[Sequence[Tensor]]:
        """For each visit, and each of its displacements, [P, B, H, 1]."""
        return self._stretch.displacement_parts(self.factors)


class Numbers(dict[Stretch, ByLink]):
    """Room for the numbers of one stretch at a time.

    Args:
        store: where from.
        like: of their dtype and device.
        links: most links of a stretch.
        item: what a link has, (B, H).
    """

    def __init__(self, store: Store, like: Tensor, links: int, item: tuple[int, int]) -> None:
        self._whole = store.empty(like, links, *item)

    def __missing__(self, stretch: Stretch) -> ByLink:
        found = self[stretch] = ByLink(self._whole[: stretch.count], stretch)
        return found
