"""Evaluate one segment while the graph of the next one is built."""

from typing import Any

import mlx.core as mx


class Pipeline:
    """Evaluates arrays in order, with at most one submission pending.

    Args:
        ahead: whether `submit` returns before the arrays are computed, so that a GPU does not
            wait for the host. On a CPU this would only cost memory.
    """

    def __init__(self, ahead: bool) -> None:
        self.ahead, self._pending = ahead, None

    def submit(self, *trees: Any) -> None:
        """Evaluate trees of arrays; earlier submissions are finished when this returns."""
        if not self.ahead:
            mx.eval(trees)
            return
        mx.async_eval(trees)
        before, self._pending = self._pending, trees
        if before is not None:
            mx.eval(before)

    def drain(self) -> None:
        """Wait for the pending submission."""
        before, self._pending = self._pending, None
        if before is not None:
            mx.eval(before)
