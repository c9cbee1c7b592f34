"""Calls of a block's part that is computed apart from the block, which a caller can answer.

A layer of experts is such a part, and a gated MLP that is read by rows: what they compute is
evaluated piece by piece and must not be traced. So a walk answers the call with what it computes
itself, or with what it has computed before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import mlx.core as mx

Call = TypeVar("Call")


class PartCalls(Generic[Call]):
    """The calls of one kind of part, in all models of the process; for one thread.

    Args:
        name: of the part, for errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._handlers: list[Callable[[Call], mx.array]] = []

    @contextmanager
    def handled_by(self, handler: Callable[[Call], mx.array]) -> Iterator[None]:
        """Let `handler` return what the part returns; undone on exit."""
        self._handlers.append(handler)
        try:
            yield
        finally:
            self._handlers.pop()

    def handle(self, call: Call) -> mx.array | None:
        """What the innermost handler returns for a call; None without a handler."""
        return self._handlers[-1](call) if self._handlers else None

    def first(self, function: Callable[[], object]) -> Call | None:
        """The call that a function comes to first, which ends it there; None if it makes none."""

        def stop(call: Call) -> mx.array:
            raise _Reached(call)

        try:
            with self.handled_by(stop):
                function()
        except _Reached as reached:
            return reached.call
        return None

    @contextmanager
    def given(self, answer: Callable[[Call], mx.array]) -> Iterator[list[Call]]:
        """Let the part return an answer; yields a list that gets its call.

        Raises:
            RuntimeError: inside, the part is called more than once.
        """
        calls: list[Call] = []

        def give(call: Call) -> mx.array:
            if calls:
                raise RuntimeError(f"a block calls its {self._name} more than once")
            calls.append(call)
            return answer(call)

        with self.handled_by(give):
            yield calls


class _Reached(Exception):
    """Ends a function at the part, and carries the call."""

    def __init__(self, call: object) -> None:
        self.call = call
