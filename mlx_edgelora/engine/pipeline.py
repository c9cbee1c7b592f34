"""Evaluation of one segment while the next one's graph is built."""

from typing import Any

import mlx.core as mx


class Pipeline:
    """Evaluates arrays in order, at most one submission ahead of what is done.

    Args:
        ahead: whether a submission returns before it is computed. A GPU would wait for the host
            otherwise; on a CPU there is nothing to gain, and memory to lose.
    """

    def __init__(self, ahead: bool) -> None:
        self.ahead, self._pending = ahead, None

    def submit(self, *trees: Any) -> None:
        """Evaluate trees of arrays; what was submitted before is done when this returns."""
        if not self.ahead:
            mx.eval(trees)
            return
        mx.async_eval(trees)
        before, self._pending = self._pending, trees
        if before is not None:
            mx.eval(before)

    def drain(self) -> None:
        """Wait for everything."""
        before, self._pending = self._pending, None
        if before is not None:
            mx.eval(before)
