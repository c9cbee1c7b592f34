"""The fastest plan within a budget of memory.

A plan is a way to compute blocks (whole, by tiles, or with the activations of the
last ones kept), and what stays in memory beside it. The ways are listed; for each of them
the rest is filled in, as many blocks' weights as fit. Whatever costs more memory is faster by
the model of `planner/duration.py`, so the search looks at plans from the fastest possible one
down and stops at the first that nothing left can beat. A larger budget never gives a slower
plan: its plans are among those that were looked at.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import inf
from typing import Any

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.units import size
from mlx_edgelora.planner.cost import Memory
from mlx_edgelora.planner.duration import longest_operation, seconds
from mlx_edgelora.planner.machine import Machine
from mlx_edgelora.planner.measured import Measurements
from mlx_edgelora.planner.plan import MIB, Plan
from mlx_edgelora.planner.sizes import BatchShape, ModelShape

MB = 10**6
# What MLX holds besides: scalars, masks, a batch.
SLACK = 2 * MIB
TILES = (256, 512, 1024, 2048, 4096)
# Of a gated MLP, where packed matrices are unpacked.
SLICE = 16 * MIB
LOSSES = (16 * MIB, 40 * MIB)
# On a GPU, which waits for the host where there are many tiles.
LARGE_LOSSES = (160 * MIB, 640 * MIB)
# Of scores in MLX's gradient of attention on Metal: MLX's own, and 1/16 of its memory.
ATTENTION_BLOCKS = (1024, 256)
# Counts of kept blocks up to the end of this, then every fourth.
KEPT = 8
# Rows that are shorter are padded to it.
SHORTEST = 32
# A plan must be faster by more than this to be preferred to one that takes less memory.
CLOSE = 1e-6


@dataclass(frozen=True)
class Choice:
    """A plan and what is expected of it.

    Attributes:
        plan: which.
        peak: bytes that MLX's allocator is expected to hold at most.
        needs: the smallest budget that this plan is chosen for; more, as far as what was expected
            may miss.
        seconds: expected of a step.
    """

    plan: Plan
    peak: int
    needs: int
    seconds: float


def expected(
    shape: ModelShape,
    batch_shape: BatchShape,
    machine: Machine,
    given: Plan,
    measurements: Measurements | None = None,
) -> Choice:
    """What a plan is expected to take."""
    peak, most = Memory(shape, batch_shape, given, measurements).peak()
    return Choice(
        given, peak, most + SLACK, seconds(shape, batch_shape, given, machine, measurements)
    )


def plan(
    shape: ModelShape,
    batch_shape: BatchShape,
    machine: Machine,
    budget: int,
    fixed: Mapping[str, Any] | None = None,
    measurements: Measurements | None = None,
) -> Choice:
    """Choose the fastest plan that fits.

    Args:
        shape: of the model.
        batch_shape: the largest batch.
        machine: where.
        budget: bytes of MLX's allocator.
        fixed: choices that are made already, by their names in `Plan`.
        measurements: what was measured of the model.

    Raises:
        EdgeLoraError: no plan fits; names the smallest budget that works, and what lowers it.
    """
    search = _Search(shape, batch_shape, machine, dict(fixed or {}), measurements)
    best = search.best(budget)
    if best is None:
        raise EdgeLoraError(_too_small(search, budget))
    return best


def smallest(
    shape: ModelShape,
    batch_shape: BatchShape,
    machine: Machine,
    fixed: Mapping[str, Any] | None = None,
    measurements: Measurements | None = None,
) -> Choice:
    """The plan that takes the least memory, whatever time it takes."""
    return _Search(shape, batch_shape, machine, dict(fixed or {}), measurements).least()


def largest_that(works: Callable[[int], bool], step: int, limit: int) -> int:
    """The largest multiple of `step` up to `limit` that works, as all below it do; 0 if none."""
    low, high = 0, 1
    while high * step <= limit and works(high * step):
        low, high = high, 2 * high
    high = min(high, limit // step + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle * step) else (low, middle)
    return low * step


class _Search:
    def __init__(
        self,
        shape: ModelShape,
        batch_shape: BatchShape,
        machine: Machine,
        fixed: dict[str, Any],
        measurements: Measurements | None,
    ) -> None:
        self.shape, self.batch_shape, self.machine = shape, batch_shape, machine
        self.fixed, self.measurements = fixed, measurements

    def best(self, budget: int) -> Choice | None:
        """The fastest plan that fits, if any does."""
        best: Choice | None = None
        for fastest, way in self.ways:
            if best is not None and fastest >= best.seconds - CLOSE:
                break  # nothing that follows can be faster
            if not self._fits(replace(way, **self._leanest()), budget):
                continue
            for base in self._placements(way):
                slowest = inf if best is None else best.seconds + CLOSE
                for plan in self._with_streaming(base, budget, slowest):
                    found = self.choice(plan)
                    if best is None or _better(found, best):
                        best = found
        return best

    def least(self) -> Choice:
        """The plan that takes the least memory; of several the fastest."""
        plans = (replace(way, **self._leanest()) for _, way in self.ways)
        return min(map(self.choice, plans), key=_least)

    def choice(self, plan: Plan) -> Choice:
        """What is expected of a plan."""
        return expected(self.shape, self.batch_shape, self.machine, plan, self.measurements)

    def _fits(self, plan: Plan, budget: int) -> bool:
        _, most = Memory(self.shape, self.batch_shape, plan, self.measurements).peak()
        return most + SLACK <= budget

    def _seconds(self, plan: Plan) -> float:
        return seconds(self.shape, self.batch_shape, plan, self.machine, self.measurements)

    @cached_property
    def ways(self) -> list[tuple[float, Plan]]:
        """The ways to compute, with the seconds they take at best; fastest first."""
        # Whatever the kernel, memory is the same: of each way the fastest one is enough.
        kernels = self.machine.kernels if self.shape.packed else ("auto",)
        if "kernel" in self.fixed:
            kernels = (self.fixed["kernel"],)
        found = []
        for way in self._short(list(filter(self._agrees, self._ways()))):
            ideal = replace(way, **self._richest())
            times = [self._seconds(replace(ideal, kernel=kernel)) for kernel in kernels]
            fastest = min(times)
            found.append((fastest, replace(way, kernel=kernels[times.index(fastest)])))
        found.sort(key=lambda pair: pair[0])
        return found

    def _ways(self) -> Iterator[Plan]:
        sliced = self.shape.gated and self.fixed.get("mlp_bytes", 1) is not None
        # MLX's own kernel multiplies whole packed matrices, and a GPU has no time for slices.
        on_cpu = self.machine.kernels[0] != "fused"
        sliced &= on_cpu
        slices = (None, SLICE) if sliced else (None,)
        # Layer by layer a tile would take several times as much, for little time.
        in_tiles = (SLICE,) if sliced else (None,)
        for micro in self._micro_batches():
            size = self.batch_shape.part(micro).size
            for loss_bytes in LOSSES if on_cpu else (*LOSSES, *LARGE_LOSSES):
                common = {"micro_batches": micro, "loss_bytes": loss_bytes}
                for mlp_bytes in slices:
                    for kept in self._kept():
                        yield Plan(kept_blocks=kept, mlp_bytes=mlp_bytes, **common)
                for mlp_bytes, tokens in product(in_tiles, TILES):
                    if tokens < size:
                        yield Plan(tile_tokens=tokens, mlp_bytes=mlp_bytes, **common)

    def _short(self, ways: list[Plan]) -> list[Plan]:
        """Those without an operation that takes too long, or with the shortest ones."""
        if self.machine.longest == inf:
            return ways
        arguments = self.shape, self.batch_shape
        longest = [longest_operation(*arguments, way, self.machine) for way in ways]
        most = max(self.machine.longest, min(longest, default=0.0))
        return [way for way, spent in zip(ways, longest, strict=True) if spent <= most]

    @property
    def _attention_blocks(self) -> tuple[int | None, ...]:
        return ATTENTION_BLOCKS if self.shape.blocked_heads else (None,)

    def _kept(self) -> list[int]:
        count = self.shape.adapted
        return [k for k in range(count + 1) if k <= KEPT or k % 4 == 0 or k == count]

    def _micro_batches(self) -> list[int]:
        parts, count = [], 1
        while count < self.batch_shape.rows:
            parts.append(count)
            count *= 2
        return [*parts, self.batch_shape.rows]

    def _agrees(self, way: Plan) -> bool:
        later = {*self._leanest(), "kernel"}
        return all(getattr(way, k) == v for k, v in self.fixed.items() if k not in later)

    def _leanest(self) -> dict[str, Any]:
        values = {
            "streamed_blocks": self.shape.blocks,
            "head": "streamed",
            "prefetch": False,
            "inputs": "file",
            "adapters": "paged",
            "cache_bytes": 16 * MIB,
            "attention_block": self._attention_blocks[-1],
        }
        return values | {k: v for k, v in self.fixed.items() if k in values}

    def _richest(self) -> dict[str, Any]:
        values = {
            "streamed_blocks": 0,
            "head": "resident",
            "prefetch": False,
            "inputs": "memory",
            "adapters": "resident",
            "attention_block": self._attention_blocks[0],
        }
        return values | {k: v for k, v in self.fixed.items() if k in values}

    def _placements(self, way: Plan) -> Iterator[Plan]:
        """A way with what may stay in memory beside blocks' weights."""
        options = {
            "head": ("resident", "streamed"),
            "adapters": ("resident", "paged"),
            "inputs": ("memory", "file"),
            "attention_block": self._attention_blocks,
        }
        for name, value in self.fixed.items():
            if name in options:
                options[name] = (value,)
        cache = self.fixed.get("cache_bytes", Plan.cache_bytes)
        for values in product(*options.values()):
            yield replace(way, cache_bytes=cache, **dict(zip(options, values, strict=True)))

    def _with_streaming(self, base: Plan, budget: int, slowest: float) -> Iterator[Plan]:
        """As many blocks as fit stay in memory, with and without one more being read ahead.

        What would take longer than `slowest` is not looked for.
        """
        ahead = (True, False)
        if "prefetch" in self.fixed:
            ahead = (self.fixed["prefetch"],)
        for prefetch in ahead:
            plan = replace(base, prefetch=prefetch)
            if "streamed_blocks" in self.fixed:
                candidate = replace(plan, streamed_blocks=self.fixed["streamed_blocks"])
                if self._fits(candidate, budget):
                    yield candidate
                continue
            streamed = self._fewest(plan, budget, slowest)
            if streamed == 0:
                yield replace(plan, streamed_blocks=0, prefetch=False)
                return
            if streamed is not None:
                yield replace(plan, streamed_blocks=streamed)

    def _fewest(self, plan: Plan, budget: int, slowest: float) -> int | None:
        """The fewest streamed blocks that fit, if any do and take no longer than `slowest`."""

        def streaming(count: int) -> Plan:
            return replace(plan, streamed_blocks=count)

        low, high = 0, self.shape.blocks
        if self._seconds(streaming(low)) > slowest or not self._fits(streaming(high), budget):
            return None
        while low < high:
            tried = (low + high) // 2 if low else 0
            if self._fits(streaming(tried), budget):
                high = tried
            else:
                low = tried + 1
                if self._seconds(streaming(low)) > slowest:
                    return None
        return high


def _least(choice: Choice) -> tuple[int, int, float]:
    """What the smallest plan has least of: of equal needs smaller tiles of the head decide."""
    return choice.needs, choice.plan.loss_bytes, choice.seconds


def _better(one: Choice, other: Choice) -> bool:
    """Faster, or as fast and smaller."""
    if abs(one.seconds - other.seconds) > CLOSE:
        return one.seconds < other.seconds
    return one.needs < other.needs


def _too_small(search: _Search, budget: int) -> str:
    """One sentence: the smallest budget that works, which options would lower it, and which not."""
    shape, batch_shape = search.shape, search.batch_shape
    least = search.least().needs

    def needs(shape: ModelShape = shape, **changes: int) -> int:
        settings = search.machine, search.fixed, search.measurements
        return _Search(shape, replace(batch_shape, **changes), *settings).least().needs

    def helps(needed: int) -> bool:
        return needed < least and _said(needed) != _said(least)  # else nothing is gained

    ways = []
    tokens = batch_shape.tokens
    while tokens > SHORTEST:  # rows of more than a tile may take no more than those of one
        tokens = max(SHORTEST, tokens // 2)
        labelled = max(1, batch_shape.labelled * tokens // batch_shape.tokens)
        needed = needs(tokens=tokens, labelled=labelled)
        if helps(needed) or tokens == SHORTEST:
            ways.append((f"max_seq_length {tokens}", needed))
            break
    if shape.rank > 4:
        rank = shape.rank // 2
        ways.append((f"rank {rank}", needs(_with_rank(shape, rank))))
    if batch_shape.rows > 1:
        rows = batch_shape.rows // 2
        labelled = max(1, batch_shape.labelled * rows // batch_shape.rows)
        ways.append((f"batch_size {rows}", needs(rows=rows, labelled=labelled)))
    if shape.itemsize > 2:
        ways.append(("dtype bfloat16", needs(_in_16_bits(shape))))
    helping = sorted((way for way in ways if helps(way[1])), key=lambda way: way[1])
    problem_text = ", ".join(f"{name} needs {_said(needed)}" for name, needed in helping)
    idle = " and ".join(name for name, needed in ways if not helps(needed))
    return (
        f"memory_budget: got {size(budget)}, expected at least {_said(least)} for this model and "
        f"batch; raise it, or lower what it must hold: {problem_text or 'use a smaller model'}"
        + (f" ({idle} would not help)" if idle else "")
    )


def _in_16_bits(shape: ModelShape) -> ModelShape:
    """The same model computed in 16 bits; packed weights are as they were."""
    return replace(
        shape,
        itemsize=2,
        block_bytes=shape.block_bytes // (1 if shape.packed else 2),
        mlp_bytes=shape.mlp_bytes // (1 if shape.packed else 2),
        head_bytes=shape.head_bytes // (1 if shape.head_packed else 2),
        outside_bytes=shape.outside_bytes // 2,
    )


def _with_rank(shape: ModelShape, rank: int) -> ModelShape:
    share = rank / shape.rank
    return replace(
        shape,
        rank=rank,
        adapter_bytes=round(shape.adapter_bytes * share),
        mlp_adapter_bytes=round(shape.mlp_adapter_bytes * share),
        outside_adapter_bytes=round(shape.outside_adapter_bytes * share),
    )


def _said(needed: int) -> str:
    """Rounded up to whole megabytes, for this is what a budget must be."""
    return size(-(-needed // MB) * MB, up=True)
