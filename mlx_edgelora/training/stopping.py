"""Requests to end a run before its last step: signals and a time limit."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """Raised when a signal ended the run between two steps, after all steps were saved.

    Attributes:
        status: exit status for the signal, such as 143 for SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class StopRequests:
    """Requests to end a run after the current step.

    Args:
        seconds: time limit of the run; None for no limit.

    Attributes:
        signal: number of the signal that was received; None before one.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self.signal: int | None = None

    @property
    def time_is_over(self) -> bool:
        """Whether the time limit has passed."""
        return self._end is not None and time.monotonic() >= self._end

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first one is recorded, a second one ends the process."""
        if self.signal is not None:
            if number == signal.SIGINT:
                signal.default_int_handler(number, frame)
            os._exit(128 + number)
        self.signal = number
        name = signal.Signals(number).name
        text = f"\n{name}: the run ends after this step and is saved; once more ends it at once\n"
        with contextlib.suppress(OSError):  # not print, which is not reentrant
            os.write(2, text.encode())


@contextlib.contextmanager
def stop_requests(seconds: float | None) -> Iterator[StopRequests]:
    """Record signals instead of ending the process; only in the main thread.

    Signals that already have a handler other than Python's default keep it.

    Args:
        seconds: time limit of the run; None for no limit.

    Yields:
        The requests received so far.
    """
    requests = StopRequests(seconds)
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    usual = {signal.SIG_DFL, signal.default_int_handler}
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number in SIGNALS if before[number] in usual]
    for number in ours:
        signal.signal(number, requests.handle)
    try:
        yield requests
    finally:
        for number in ours:
            signal.signal(number, before[number])
