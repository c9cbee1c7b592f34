"""A run by several processes, each with a share of the rows of every batch.

The processes are those of `mx.distributed`, which `mlx.launch` starts on one machine or several.
Every process draws the same batches, computes its own rows, and adds up gradients with the others
before an update, so that all of them hold the same adapter as one process with the whole batch
would, except for rounding. As in mlx-lm, `batch_size` counts the rows of all processes.
"""

import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data.batches import Batch
from mlx_edgelora.engine.adapter_state import Arrays
from mlx_edgelora.errors import EdgeLoraError

# Seconds that a process waits for the others before it gives up. A step of the slowest process must
# not take longer.
PATIENCE = 600
# Seconds within which all processes must have started.
JOINING = 60
# Exit status of a process that gave up.
ALONE = 2
# Files and displays of a run that only the first process has.
OF_THE_FIRST = dict.fromkeys(("log", "report", "report_to", "plan_out", "memory_profile"))


class Group:
    """The processes of a run.

    Args:
        members: group of `mx.distributed`; None for a run by one process.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self, members: mx.distributed.Group | None = None) -> None:
        self._members = members
        self.rank = 0 if members is None else members.rank()
        self.size = 1 if members is None else members.size()

    @classmethod
    def joined(cls) -> "Group":
        """The processes that were launched together; this one alone if there are no others.

        Raises:
            EdgeLoraError: the others cannot be reached.
        """
        if "MLX_RANK" not in os.environ:  # set by mlx.launch, except with MPI
            members = mx.distributed.init()
            return cls(members) if members.size() > 1 else cls()
        end = time.monotonic() + JOINING
        while True:  # processes do not start at the same moment
            try:
                # Not strict, a process that finds no other would train alone.
                return cls(mx.distributed.init(strict=True))
            except (RuntimeError, ValueError) as error:
                if time.monotonic() > end:
                    raise EdgeLoraError(
                        f"process {os.environ['MLX_RANK']}: the other processes of the run cannot "
                        f"be reached ({' '.join(str(error).split())[:200]}); check the hosts and "
                        "ports given to mlx.launch, and start all of them again"
                    ) from error
                time.sleep(1)

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and the output of the run."""
        return self.rank == 0

    def own_options(self, config: TrainConfig) -> TrainConfig:
        """The options without the files that only the first process writes."""
        return config if self.leads else dataclasses.replace(config, **OF_THE_FIRST)

    def rows(self, batch_size: int) -> int:
        """The largest number of rows of a batch that one process gets."""
        return -(-batch_size // self.size)

    def share(self, batch: Batch) -> Batch | None:
        """This process's rows of a batch; None if it has none, or none with a label."""
        if self.size == 1:
            return batch
        own = batch.share(slice(self.rank, None, self.size))
        return own if own.mask.any() else None

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums of numbers over all processes, in float32."""
        if self.size == 1:
            return list(numbers)
        return self._all_sum(mx.array(numbers, mx.float32)).tolist()

    def sum(self, arrays: Arrays) -> Arrays:
        """Sums of arrays over all processes, in one message.

        Args:
            arrays: the same names, shapes and dtypes in all processes.

        Returns:
            Evaluated sums by name, in the order of the names.
        """
        names = sorted(arrays)
        flat = [arrays[name].astype(mx.float32).reshape(-1) for name in names]
        cuts = np.cumsum([array.size for array in flat])[:-1].tolist()
        parts = mx.split(self._all_sum(mx.concatenate(flat)), cuts)
        sums = {
            name: part.reshape(arrays[name].shape).astype(arrays[name].dtype)
            for name, part in zip(names, parts, strict=True)
        }
        mx.eval(sums)
        return sums

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Check that facts are the same in all processes.

        Args:
            facts: SHA-256 in hexadecimal digits by what it is of; the same names everywhere.

        Raises:
            EdgeLoraError: one differs.
        """
        if self.size == 1:
            return
        own = np.frombuffer(bytes.fromhex("".join(facts.values())), np.uint8)
        every = mx.distributed.all_gather(mx.array(own.astype(np.uint32)), group=self._members)
        self._evaluate(every)
        rows = np.array(every).reshape(self.size, len(facts), -1)
        for number, name in enumerate(facts):
            others = [r for r in range(self.size) if (rows[r, number] != rows[0, number]).any()]
            if others:
                raise EdgeLoraError(
                    f"process {others[0]} of {self.size}: its {name} differs from that of process "
                    "0, expected the same in all processes of a run; give all of them the same "
                    "files and options"
                )

    @contextlib.contextmanager
    def failing_together(self, numbers: int) -> Iterator[None]:
        """Context of what each process computes alone; a failure is made known to the others.

        They are in `exchange` then, with as many numbers.
        """
        try:
            yield
        except Exception:
            with contextlib.suppress(EdgeLoraError):
                self.total([1.0, *[0.0] * numbers])
            raise

    def exchange(self, numbers: Sequence[float]) -> list[float]:
        """Sums of numbers over all processes.

        Raises:
            EdgeLoraError: another process has failed.
        """
        failed, *sums = self.total([0.0, *numbers])
        if failed:
            raise EdgeLoraError("another process of this run has failed, and says why itself")
        return sums

    def _all_sum(self, array: mx.array) -> mx.array:
        found = mx.distributed.all_sum(array, group=self._members)
        self._evaluate(found)
        return found

    def _evaluate(self, array: mx.array) -> None:
        """Evaluate what needs all processes; a process that waits too long ends."""
        # A waiting evaluation cannot be interrupted, not even by a signal.
        timer = threading.Timer(PATIENCE, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            mx.eval(array)
        except RuntimeError as error:
            raise EdgeLoraError(
                f"process {self.rank} of {self.size}: another process of this run has ended or "
                f"cannot be reached ({' '.join(str(error).split())[:200]}); start all of them "
                "again, with --resume if there is a checkpoint"
            ) from error
        finally:
            timer.cancel()

    def _give_up(self) -> None:
        print(
            f"error: process {self.rank} of {self.size}: another process of this run has not "
            f"answered for {PATIENCE} seconds; start all of them again, with --resume if there "
            "is a checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(ALONE)
