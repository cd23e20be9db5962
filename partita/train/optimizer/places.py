"""Where an update of what lies elsewhere than on the device goes, if it may be undone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from partita.parallel.offload.arenas import Arenas


class Places:
    """Second places of tensors that lie elsewhere than on the device, where an update may be undone: it goes
    to the second, what was before stays, and when it is over the two change places. Moves nothing more."""

    def __init__(self, arenas: Arenas) -> None:
        self._zeros = arenas.elsewhere()
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._views: list[tuple[Tensor, Tensor, slice]] = []

    def beside(self, category: str, flats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The second place of each, where the category lies."""
        zeros = self._zeros[category]
        made = {n: zeros("optimizer", x.numel(), x.dtype) for n, x in flats.items()}
        self._pairs += [(x, made[n]) for n, x in flats.items()]
        return made

    def seconds(self) -> list[Tensor]:
        """What is held besides."""
        return [other for _, other in self._pairs]

    def follow(self, view: Tensor, flat: Tensor, part: slice) -> None:
        """A part of one of them, which is always that of the first place."""
        self._views.append((view, flat, part))

    def holds(self, view: Tensor) -> bool:
        """Whether it is such a part."""
        return any(view is own for own, *_ in self._views)

    def change(self) -> None:
        """What is in the second is in the first, and the other way round."""
        for one, other in self._pairs:
            one.data, other.data = other.data, one.data
        for view, flat, part in self._views:
            view.data = flat[part]
