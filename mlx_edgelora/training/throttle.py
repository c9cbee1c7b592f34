"""A slower pace, so that a laptop stays cool and responsive."""

import time


class DutyCycle:
    """Rests in proportion to what was computed.

    Args:
        share: of the time to compute in, above 0 and at most 1; 0.5 rests as long as it computes.
    """

    def __init__(self, share: float) -> None:
        self._share, self._since = share, None

    def pause(self) -> None:
        """Sleep for what was computed since the last call."""
        if self._share == 1:
            return
        if self._since is not None:
            spent = time.perf_counter() - self._since
            time.sleep(spent * (1 / self._share - 1))
        self._since = time.perf_counter()
