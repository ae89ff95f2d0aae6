"""The layers of a cache that are not paged, and the check that they have seen no more forwards than the pages."""

from __future__ import annotations

from kvarn_rs.errors import RollbackError

from . import calls
from .forward import Forwards


class UnpagedLayers:
    """Layers that stay transformers' own. They cannot undo their part of a forward that raised.

    Attributes:
        planned: by layer with K and V, why they were not to be paged.
        refused: by layer, why pages could not hold its first K and V.
    """

    def __init__(self, forwards: Forwards, planned: dict[int, str]) -> None:
        self.planned = planned
        self.refused: dict[int, str] = {}
        self._forwards = forwards
        self._num_dropped = forwards.dropped_forwards
        self._last_call: calls.Call | None = None

    def check(self) -> None:
        """RollbackError if they have seen a forward that the pages have not: to be called before each of their updates.

        It lasts until `reset`.
        """
        last = self._last_call
        if last is None or not calls.is_innermost(last):
            self._last_call = calls.innermost()
            if last is not None and last.has_raised:
                self._num_dropped = -1
        if self._num_dropped != self._forwards.dropped_forwards:
            raise RollbackError(
                "a forward stopped half-way, and layers that are not paged cannot undo their part of it; call reset()"
            )

    def reset(self) -> None:
        """To be called once they are empty."""
        self._num_dropped = self._forwards.dropped_forwards
        self._last_call = None
