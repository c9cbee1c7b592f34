"""Find the fastest plan within a memory budget.

A plan combines a way to compute blocks (whole, by tiles, or with the activations of the last
blocks kept) with a choice of what stays in memory. The search lists the ways and, for each, keeps
as many weights in memory as fit. In the model of `planner/duration.py` more memory is never
slower. The search therefore examines ways in the order of their best possible time and stops when
no remaining way can be faster. A larger budget never gives a slower plan, because the plans of the
smaller budget are also examined.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
# Bytes of scalars, masks and the batch, which the memory model does not contain.
SLACK = 2 * MIB
TILES = (256, 512, 1024, 2048, 4096)
# The least for recurrent blocks, which hold several times the activations of others, in float32,
# and where MLPs are read by rows: of what is left in memory, a tile is the most.
SHORT_TILE = 128
# Tokens whose gradients of keys and values are in memory at a time where MLPs are read by rows.
KEY_TOKENS = 2048
# Where queries are more than this times as wide as hidden states, a tile is mostly attention, of
# which shorter ones hold less.
WIDE_QUERIES = 2
WIDE_TILES = (64, 128)
# Bytes of a slice of a gated MLP, where packed matrices are unpacked.
SLICE = 16 * MIB
LOSSES = (16 * MIB, 40 * MIB)
# Additional sizes for GPUs, which wait for the host if there are many tiles.
LARGE_LOSSES = (160 * MIB, 640 * MIB)
# Blocks of scores in MLX's gradient of attention on Metal: MLX's default, and 1/16 of its memory.
ATTENTION_BLOCKS = (1024, 256)
# Every number of kept blocks up to this one is tried, then every fourth.
KEPT = 8
# Shorter rows are padded to this length.
SHORTEST = 32
# A plan must be faster by more than this to be preferred to one that takes less memory.
CLOSE = 1e-6


@dataclass(frozen=True)
class Choice:
    """A plan with its expected memory and time.

    Attributes:
        plan: the plan.
        peak: expected peak of MLX's allocator in bytes.
        needs: smallest budget in bytes for which the plan is chosen; the peak plus a margin for
            the error of the estimate.
        seconds: expected time of a step.
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
    """Estimate the memory and time of a plan."""
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
    """Choose the fastest plan that fits the budget.

    Args:
        shape: sizes of the model.
        batch_shape: sizes of the largest batch.
        machine: the machine.
        budget: bytes of MLX's allocator.
        fixed: fields that are fixed, by their names in `Plan`.
        measurements: measurements of the model.

    Raises:
        EdgeLoraError: no plan fits. The message gives the smallest budget that works and options
            that lower it.
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
    """The plan with the lowest memory, regardless of its time."""
    return _Search(shape, batch_shape, machine, dict(fixed or {}), measurements).least()


def largest_that(works: Callable[[int], bool], step: int, limit: int) -> int:
    """The largest multiple of `step` up to `limit` that works; 0 if none does.

    If a multiple works, all smaller ones must work too.
    """
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
        """The fastest plan that fits the budget; None if none does."""
        best: Choice | None = None
        for fastest, way in self.ways:
            if best is not None and fastest >= best.seconds - CLOSE:
                break  # no later way can be faster
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
        """The plan with the lowest memory; the fastest of several."""
        plans = (replace(way, **self._leanest()) for _, way in self.ways)
        # On a GPU each tile takes time, so that large tiles of the head come first.
        return min(map(self.choice, plans), key=partial(_least, large_tiles=self._on_gpu))

    def choice(self, plan: Plan) -> Choice:
        """Estimate the memory and time of a plan."""
        return expected(self.shape, self.batch_shape, self.machine, plan, self.measurements)

    def _fits(self, plan: Plan, budget: int) -> bool:
        _, most = Memory(self.shape, self.batch_shape, plan, self.measurements).peak()
        return most + SLACK <= budget

    def _seconds(self, plan: Plan) -> float:
        return seconds(self.shape, self.batch_shape, plan, self.machine, self.measurements)

    @cached_property
    def ways(self) -> list[tuple[float, Plan]]:
        """The ways to compute blocks with their best possible seconds, fastest first."""
        kernels = self.machine.kernels if self.shape.packed else ("auto",)
        if "kernel" in self.fixed:
            kernels = (self.fixed["kernel"],)
        found = []
        for way in self._short(list(filter(self._agrees, self._ways()))):
            ideal = replace(way, **self._richest())
            for kernel in kernels:
                spent = self._seconds(replace(ideal, kernel=kernel))
                found.append((spent, replace(way, kernel=kernel)))
        found.sort(key=lambda pair: pair[0])
        return found

    def _ways(self) -> Iterator[Plan]:
        sliced = self.shape.gated and self.fixed.get("mlp_bytes", 1) is not None
        # MLX's own kernel multiplies whole packed matrices, and slices are slow on a GPU.
        on_cpu = not self._on_gpu
        grouped = sliced and bool(self.shape.expert_bytes)
        sliced &= on_cpu
        slices = (None, SLICE) if sliced or grouped else (None,)
        # Without slices, a tile would take several times the memory and save little time.
        in_tiles = (SLICE,) if sliced else slices
        for micro in self._micro_batches():
            size = self.batch_shape.part(micro).size
            for loss_bytes in LOSSES if on_cpu else (*LOSSES, *LARGE_LOSSES):
                common = {"micro_batches": micro, "loss_bytes": loss_bytes}
                for mlp_bytes in slices:
                    for kept in self._kept():
                        yield Plan(kept_blocks=kept, mlp_bytes=mlp_bytes, **common)
                for mlp_bytes, tokens, weights in self._tiles(in_tiles):
                    if tokens < size:
                        tile = {"tile_tokens": tokens, "mlp_bytes": mlp_bytes}
                        keys = {"key_tokens": self._key_tokens} if weights == "rows" else {}
                        yield Plan(mlp_weights=weights, **tile, **keys, **common)

    def _tiles(self, slices: tuple[int | None, ...]) -> list[tuple[int | None, int, str]]:
        """Bytes of a slice of the MLP, tokens of a tile, and where the MLP's weights are."""
        wide = self.shape.queries > WIDE_QUERIES * self.shape.hidden
        tiles = (*WIDE_TILES, *TILES) if wide else TILES
        found = [(size, tokens, "block") for size, tokens in product(slices, tiles)]
        if self.shape.state_bytes:
            halves = [None if size is None else size // 2 for size in slices]
            found += [(size, SHORT_TILE, "block") for size in halves]
        # Rows are slices, and read for every tile: a GPU would wait for both, and without packing
        # they are several times as many bytes.
        by_rows = self.shape.row_bytes and self.shape.packed and not self._on_gpu
        if by_rows and self.fixed.get("mlp_bytes", 1) is not None:
            found += [(SLICE, tokens, "rows") for tokens in TILES]
            found.append((SLICE // 2, SHORT_TILE, "rows"))
        return found

    @property
    def _key_tokens(self) -> int | None:
        """Tokens of a window of `KEY_TOKENS`, where MLPs are read by rows; None for all tokens."""
        return KEY_TOKENS if self.batch_shape.tokens > KEY_TOKENS else None

    @property
    def _on_gpu(self) -> bool:
        return self.machine.kernels[0] == "fused"

    def _short(self, ways: list[Plan]) -> list[Plan]:
        """The ways whose operations keep the machine's limit; if none does, the nearest ones."""
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
        while count < self.batch_shape.most_parts:
            parts.append(count)
            count *= 2
        return [*parts, self.batch_shape.most_parts]

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
        """A way with each choice of what stays in memory, apart from the weights of blocks."""
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
        """Plans with as many blocks in memory as fit, with and without prefetch.

        Plans that take longer than `slowest` are not searched for.
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
        """The lowest number of streamed blocks that fits.

        None if no number fits or the plan would take longer than `slowest`.
        """

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


def _least(choice: Choice, large_tiles: bool) -> tuple[int, int, int, float]:
    """Sort key of the smallest plan; with equal needs, smaller tiles of the head come first.

    Then smaller tiles of tokens where MLPs are read by rows: in long rows the formula has the head
    as the peak whatever these are, and large ones took more than it says.
    """
    tile = choice.plan.loss_bytes
    tokens = choice.plan.tile_tokens if choice.plan.mlp_weights == "rows" else 0
    return choice.needs, -tile if large_tiles else tile, tokens, choice.seconds


def _better(one: Choice, other: Choice) -> bool:
    """Whether `one` is faster than `other`, or as fast and smaller."""
    if abs(one.seconds - other.seconds) > CLOSE:
        return one.seconds < other.seconds
    return one.needs < other.needs


def _too_small(search: _Search, budget: int) -> str:
    """The message for a budget that is too small.

    It gives the smallest budget that works, options that lower it, and options that do not.
    """
    shape, batch_shape = search.shape, search.batch_shape
    least = search.least().needs

    def needs(shape: ModelShape = shape, **changes: int) -> int:
        settings = search.machine, search.fixed, search.measurements
        return _Search(shape, replace(batch_shape, **changes), *settings).least().needs

    def helps(needed: int) -> bool:
        return needed < least and _said(needed) != _said(least)  # and shows after rounding

    ways = []
    tokens = batch_shape.tokens
    while tokens > SHORTEST:  # rows longer than a tile may take no more memory than one tile
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
    """The same model in a 16-bit dtype; packed weights do not change."""
    return replace(
        shape,
        itemsize=2,
        block_bytes=shape.block_bytes // (1 if shape.packed else 2),
        mlp_bytes=shape.mlp_bytes // (1 if shape.packed else 2),
        head_bytes=shape.head_bytes // (1 if shape.head_packed else 2),
        outside_bytes=shape.outside_bytes // 2,
        adapter_bytes=shape.adapter_bytes // (2 if shape.full else 1),
        by_block=(),
    )


def _with_rank(shape: ModelShape, rank: int) -> ModelShape:
    share = rank / shape.rank
    return replace(
        shape,
        rank=rank,
        adapter_bytes=round(shape.adapter_bytes * share),
        mlp_adapter_bytes=round(shape.mlp_adapter_bytes * share),
        outside_adapter_bytes=round(shape.outside_adapter_bytes * share),
        by_block=(),
    )


def _said(needed: int) -> str:
    """A size as text, rounded up to whole megabytes because a budget must not be smaller."""
    return size(-(-needed // MB) * MB, up=True)
