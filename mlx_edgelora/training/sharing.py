"""What the processes of a run divide: the rows of a batch, and the sums of its gradients."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_edgelora.data.batches import Batch
from mlx_edgelora.engine.adapter_state import AdapterState
from mlx_edgelora.engine.finite import Magnitudes
from mlx_edgelora.engine.optimizer import group_by_block
from mlx_edgelora.training.group import Group, Message

# How much the newest step counts for the speed of a process.
NEWEST = 0.5
# The first step whose speed counts.
FIRST_MEASURED = 2


class Shares:
    """How many rows of a batch each process computes, evenly or in proportion to its speed.

    A process never computes more rows at a time than its even share, which is what it has planned
    its memory for: a larger share is computed in pieces.

    Args:
        group: the processes.
        batch_size: rows of a whole batch.
        balance: whether speeds are measured; without it all processes get the same.
    """

    def __init__(self, group: Group, batch_size: int, balance: bool = False) -> None:
        self._group, self._most = group, group.rows(batch_size)
        self._batch_size, self._told = batch_size, []
        self._balances = balance and group.size > 1
        self._speeds = [1.0] * group.size  # rows per second, once they are measured
        self._steps = 0
        self._seconds, self._rows = 0.0, 0

    def pieces(self, batch: Batch) -> list[Batch]:
        """This process's rows of a batch, those with a label, in pieces that fit its plan.

        Pairs of answers count as rows do, and are not divided.
        """
        if self._group.size == 1:
            return [batch]
        owners = self._owners(len(batch.tokens) // batch.together)
        mine = [number for number, owner in enumerate(owners) if owner == self._group.rank]
        count = -(-len(mine) // self._most)
        pieces = [batch.share(mine[number::count]) for number in range(count)]
        return [piece for piece in pieces if piece.mask.any()]

    @contextmanager
    def timed(self, pieces: Sequence[Batch]) -> Iterator[None]:
        """Context of the computation of this process's rows; waiting does not count."""
        start, waited = time.perf_counter(), self._group.waited
        yield
        self._seconds = time.perf_counter() - start - (self._group.waited - waited)
        self._rows = sum(len(piece.tokens) // piece.together for piece in pieces)

    def speeds(self) -> list[float]:
        """What this process adds to the sums that `measured` gets: its own speed at its place."""
        if not self._balances:
            return []
        own = [0.0] * self._group.size
        rank = self._group.rank
        is_known = self._rows and self._seconds > 0
        own[rank] = self._rows / self._seconds if is_known else self._speeds[rank]
        return own

    def measured(self, speeds: Sequence[float]) -> None:
        """Take over the speeds of all processes, which all of them must do after the same step."""
        self._steps += 1
        # The first step compiles functions, and its speed says nothing.
        if not speeds or self._steps < FIRST_MEASURED:
            return
        before = self._speeds if self._steps > FIRST_MEASURED else speeds
        pairs = zip(before, speeds, strict=True)
        self._speeds = [(1 - NEWEST) * old + NEWEST * new for old, new in pairs]

    def news(self) -> str | None:
        """The rows of a whole batch by process, for people, if they have changed."""
        if not self._balances:
            return None
        owners = self._owners(self._batch_size)
        counts = [owners.count(rank) for rank in range(self._group.size)]
        if counts == self._told:
            return None
        self._told = counts
        return f"rows of a batch by process: {', '.join(map(str, counts))}"

    def _owners(self, rows: int) -> list[int]:
        """The process of each row: each goes to the one that would be done with it first."""
        counts, owners = [0] * self._group.size, []
        for _ in range(rows):
            ends = [(n + 1) / speed for n, speed in zip(counts, self._speeds, strict=True)]
            owners.append(int(np.argmin(ends)))
            counts[owners[-1]] += 1
        return owners


class SharedSums:
    """Adds up the gradients of all processes, a block at a time while the backward goes on.

    `begin`, then `add` while the last rows before an update are computed, then `finish`.

    All processes send the same messages in the same order, the last block of the model first, as
    the backward computes them; a message is on its way while the next block is computed. A process
    whose plan computes blocks in another order sends them when their turn comes.

    Memory: the gradients of a block in float32, twice.

    Args:
        adapters: holds the sums of this process, and gets those of all.
        model: its trainable parameters are those of the adapters.
        group: the processes.

    Attributes:
        magnitudes: of the sums of all processes since `begin`.
    """

    def __init__(self, adapters: AdapterState, model: nn.Module, group: Group) -> None:
        self._adapters, self._group = adapters, group
        trained = tree_flatten(model.trainable_parameters())
        self._specs = {name: (array.shape, array.dtype) for name, array in trained}
        blocks = group_by_block(self._specs)
        outside = [blocks.pop("")] if "" in blocks else []
        self._order = [*reversed(blocks.values()), *outside]
        self.magnitudes = Magnitudes()
        self._ready: set[str] = set()
        self._sent = len(self._order)
        self._message: Message | None = None

    def begin(self) -> None:
        """An update follows the gradients that come next."""
        if self._group.size > 1:
            self.magnitudes.clear()
            self._ready.clear()
            self._sent = 0

    def add(self, names: Sequence[str]) -> None:
        """Sums of this process that are complete; sends those whose turn it is."""
        if self._sent == len(self._order):
            return
        self._ready.update(names)
        while self._sent < len(self._order) and self._ready.issuperset(self._order[self._sent]):
            self._send()

    def finish(self) -> None:
        """Send what was not sent since `begin`, zeros where nothing was added, and wait."""
        while self._sent < len(self._order):
            self._send()
        self._settle()

    def _send(self) -> None:
        self._settle()
        gradients, own = self._adapters.gradients(), {}
        for name in self._order[self._sent]:
            own[name] = gradients[name] if name in gradients else mx.zeros(*self._specs[name])
        self._sent += 1
        self._message = self._group.send(own)

    def _settle(self) -> None:
        if self._message is None:
            return
        message, self._message = self._message, None
        self._adapters.replace(message.sums(), self.magnitudes.add)
