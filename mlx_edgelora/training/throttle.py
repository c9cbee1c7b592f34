"""Pauses during training, so that a laptop stays cool and responsive."""

import time


class DutyCycle:
    """Pauses in proportion to the time spent on computing.

    Args:
        share: share of the time spent on computing, above 0 and at most 1; with 0.5 pauses are as
            long as the computing before them.
    """

    def __init__(self, share: float) -> None:
        self._share, self._since = share, None

    def pause(self) -> None:
        """Sleep in proportion to the time since the last call; the first call does not sleep."""
        if self._share == 1:
            return
        if self._since is not None:
            spent = time.perf_counter() - self._since
            time.sleep(spent * (1 / self._share - 1))
        self._since = time.perf_counter()
