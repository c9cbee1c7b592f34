"""Measure the memory and time of a plan on a few of its blocks, for the planner.

The engine computes the largest batch, but only with one or two blocks of each kind and one or two
of the kept blocks. Of the blocks of a kind, those are taken that need most: whose outputs later
blocks read, and whose weights are read from disk. The peak of all blocks follows from these
measurements (`planner/cost.py`).
"""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from mlx.utils import tree_flatten

from mlx_edgelora.blocks.dropout import restore_generator
from mlx_edgelora.blocks.outputs import links_of
from mlx_edgelora.blocks.tiling import block_calls
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import memory_limit
from mlx_edgelora.measure.profile import PhasePeak
from mlx_edgelora.measure.units import duration, size
from mlx_edgelora.model.weights import StreamedWeights
from mlx_edgelora.planner.cost import Memory
from mlx_edgelora.planner.duration import OVERLAPPED
from mlx_edgelora.planner.measured import Measurement
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.planner.run_plan import RunPlan
from mlx_edgelora.planner.search import Choice
from mlx_edgelora.planner.sizes import BatchShape
from mlx_edgelora.training import summary
from mlx_edgelora.training.rehearsal import measure_pass, synthetic_batch

# Largest number of times that a plan is measured and possibly replaced.
ROUNDS = 4
# A new engine must read its weights again, so its plan must be better by this share.
WORTH = 0.05
# Choices of a plan that are fixed when an engine is built.
ENGINE_CHOICES = {"streamed_blocks", "head", "adapters", "kernel", "loss_bytes"}
# A budget below this share of the smallest plan's expected peak is too small for certain.
SURE = 0.5
# If everything fits into this share of the budget, no plan needs to be measured.
PLENTY = 0.5
# Smallest share of a block's time that counts as computing, however long reading should take.
COMPUTING = 0.3
# Largest number of kinds of blocks that are measured.
KINDS = 8
# The first pass compiles. If it takes longer than this, in seconds, it is not repeated.
LONG = 5.0


def measure_and_replan(
    engine: Engine, chosen: RunPlan, log: Callable[[str], None], stays: bool = False
) -> RunPlan | None:
    """Measure the plan of a run and replace it by a better one, until the best plan is known.

    Nothing is measured if the user gave a plan, if memory is plentiful, or if an earlier run
    measured the plan.

    Args:
        engine: the engine of the current plan.
        chosen: the run; its plan is replaced.
        log: called with a line for every measurement.
        stays: consider only plans that this engine can use.

    Returns:
        The run with a better plan that needs a new engine; None if the engine uses the best plan.

    Raises:
        EdgeLoraError: no plan fits.
    """
    for _ in range(ROUNDS):
        if not needs_measuring(chosen):
            break
        spent, before, fixed_at_start = sample(engine, chosen), chosen.plan, chosen.fixed_at_start
        best = chosen.search(fixed_at_start if stays else None)
        names = ENGINE_CHOICES & fixed_at_start.keys()
        if best.plan.streams != before.streams or any(
            getattr(best.plan, name) != fixed_at_start[name] for name in names
        ):
            here = _best_for_engine(chosen, fixed_at_start)
            worth = here is None or _better(best, here, chosen.budget.bytes is None)
            if worth and not stays:
                text = f"a few blocks in {spent:.1f} s: another plan is better"
                log(summary.line("measured", text))
                return chosen.with_choice(best)
            best = here
        chosen.choice = best
        message = f"a few blocks in {spent:.1f} s"
        if best.plan == before:
            message += f": {size(best.peak)} and {duration(best.seconds)} a step expected"
            log(summary.line("measured", message))
        else:
            engine.set_plan_and_residency(best.plan)
            message = summary.line("measured", f"{message}: another plan is better")
            log(f"{message}\n{summary.memory(chosen)}")
    return None


def first_plan(request: RunPlan) -> RunPlan:
    """The run with the best plan according to the measurements so far.

    If no plan fits according to formulas alone, the smallest plan is returned to be measured,
    unless the budget is too small for certain.

    Args:
        request: the run without a plan.

    Raises:
        EdgeLoraError: no plan fits.
    """
    try:
        return request.with_choice(request.search())
    except EdgeLoraError:
        least = request.with_choice(request.smallest())
        if not needs_measuring(least) or request.budget.bytes < SURE * least.choice.peak:
            raise
        return least


def _better(best: Choice, here: Choice, least: bool) -> bool:
    """Whether a plan is so much better that it is worth a new engine.

    Args:
        best: the best plan.
        here: the best plan for the current engine.
        least: compare memory instead of time, in a run without a budget.
    """
    if least:
        return best.needs < (1 - WORTH) * here.needs
    return best.seconds < (1 - WORTH) * here.seconds


def _best_for_engine(chosen: RunPlan, fixed_at_start: dict[str, Any]) -> Choice | None:
    """The best plan that the current engine can use; None if none fits."""
    try:
        found = chosen.search(fixed_at_start)
    except EdgeLoraError:
        return None
    if chosen.plan.streams and not found.plan.streams:
        # An engine built to read weights from disk reads at least one block, and the head.
        found = chosen.expected(replace(found.plan, streamed_blocks=1))
    return found


def needs_measuring(chosen: RunPlan) -> bool:
    """Whether the choice of this plan depends on something that was not measured yet."""
    budget, plan = chosen.budget.bytes, chosen.plan
    if chosen.given or not chosen.shape.adapted:
        return False
    rich = plan.kept_blocks == chosen.shape.adapted and not plan.streams
    if budget is not None and rich and chosen.choice.needs < PLENTY * budget:
        return False
    batch_shape = chosen.batch_shape.part(plan.micro_batches)
    memory = Memory(chosen.shape, chosen.batch_shape, plan, chosen.measurements)
    ways = {"tail" if memory.kept else "head"}
    if memory.kept < chosen.shape.adapted:
        ways.add("backward")
    return not all(
        chosen.measurements.find(memory.kind(w), memory.ways[w], batch_shape) for w in ways
    )


def sample(engine: Engine, chosen: RunPlan) -> float:
    """Measure the plan, add the results to `chosen.measurements`, and return the seconds spent."""
    start = time.perf_counter()
    plan, shape = chosen.plan, chosen.shape
    part = chosen.batch_shape.part(plan.micro_batches)
    memory = Memory(shape, chosen.batch_shape, plan, chosen.measurements)
    first, last = shape.blocks - shape.adapted, shape.blocks - memory.kept
    kinds = _kinds(engine, first, last)
    read = {i for i, form in enumerate(engine.walk.blocks.forms) if form and form.read}
    overlaps, streamed = chosen.measurements.overlaps, memory.streamed
    middle = _blocks_to_sample(kinds, overlaps, bool(memory.kept), streamed, read)
    tails = [0]
    if memory.kept:  # the last block, for labelled tokens only, with one and two of each kind
        count = len(_kinds(engine, first, shape.blocks))
        tails = sorted({min(memory.kept, 1 + count), min(memory.kept, 1 + 2 * count)})
    for number, kept in enumerate(tails):
        own = replace(plan, kept_blocks=kept, micro_batches=1)
        _measure(engine, chosen, own, part, middle if number + 1 == len(tails) else [])
    chosen.measurements.write()
    return time.perf_counter() - start


def _kinds(engine: Engine, first: int, stop: int) -> list[list[int]]:
    """Blocks `first` to `stop - 1` by class, parameters and use of others, largest groups first."""
    found: dict[str, list[int]] = {}
    calls = block_calls(engine.walk.blocks)
    for index in range(first, stop):
        block, (_, *arguments) = engine.walk.blocks.blocks[index], calls[index]
        held = [(n, v.shape, v.dtype) for n, v in tree_flatten(block.parameters())]
        reads = bool(links_of(*arguments))
        found.setdefault(repr((type(block), held, reads)), []).append(index)
    return sorted(found.values(), key=len, reverse=True)[:KINDS]


def _blocks_to_sample(
    kinds: list[list[int]],
    overlaps: bool,
    kept: bool,
    streamed: int = 0,
    read: Collection[int] = (),
) -> list[int]:
    """Indices of the blocks to measure: one of each kind, or two if blocks overlap in time.

    The last block is included if no blocks are kept, or if there is no other one.

    Args:
        kinds: indices of the blocks of each kind.
        overlaps: whether a block begins before the one before it has finished.
        kept: whether the last blocks are kept and measured apart.
        streamed: number of first blocks whose weights are read from disk.
        read: blocks whose outputs later blocks read, besides hidden states.
    """
    last = max((max(kind) for kind in kinds), default=-1)
    count, chosen = 2 if overlaps else 1, set()
    for kind in kinds:
        others = sorted((i for i in kind if i != last), key=lambda index: (index in read, index))
        taken = others[-count:]
        from_disk = [index for index in others if index < streamed]
        if from_disk and not any(index < streamed for index in taken):
            taken = [from_disk[-1], *(taken[1:] or [i for i in taken if i in read])]
        chosen.update(taken)
    if last >= 0 and (not kept or not chosen):
        chosen.add(last)
    return sorted(chosen)


def _measure(
    engine: Engine, chosen: RunPlan, plan: Plan, batch_shape: BatchShape, middle: list[int]
) -> None:
    """Measure the blocks `middle` and the kept blocks of `plan`, and store the results."""
    shape, measurements, kept = chosen.shape, chosen.measurements, plan.kept_blocks
    # Results are stored for the whole model, not for the few blocks that are computed.
    ways = Memory(shape, chosen.batch_shape, chosen.plan, measurements).ways | {
        "tail": Memory(shape, batch_shape, plan, measurements).ways["tail"]
    }
    kept_from = shape.blocks - kept if kept else None
    streamed = shape.blocks if plan.streamed_blocks is None else plan.streamed_blocks
    computed = [*middle, *range(shape.blocks - kept, shape.blocks)]
    own = tuple(shape.by_block[index] for index in computed) if shape.by_block else ()
    count = len(computed)
    small = replace(shape, blocks=count, adapted=count, by_block=own, accumulates=False)
    as_small = replace(plan, streamed_blocks=sum(index < streamed for index in computed))
    batch = synthetic_batch(batch_shape, shape.vocabulary)
    best: dict[str, list[float]] = {}
    # What is as small as possible must not be measured with what MLX allocates ahead on a GPU.
    least = chosen.budget.bytes is None and measurements.overlaps
    with _sampling(engine, plan, middle), memory_limit(1) if least else nullcontext():
        weights = engine.walk.weights
        for index in computed:
            if index >= streamed:
                weights.block(index)  # weights that stay in memory are loaded before the pass
        for again in (False, True):
            if isinstance(weights, StreamedWeights):
                weights.trim()
            began = time.perf_counter()
            entries, base = measure_pass(engine, batch, plan.adapters == "resident")
            spent = time.perf_counter() - began
            if not again:
                memory = Memory(small, batch_shape, as_small, measurements, base)
                needs = _needs(entries, memory, computed, kept_from)
            for kind, seconds in _seconds(entries, kept_from).items():
                best.setdefault(kind, []).append(seconds)
            if spent > LONG:
                break
    counts = {"forward": len(middle), "backward": len(middle)}
    read = sum(index < streamed for index in middle) / max(1, len(middle))
    visits = {"forward": read, "backward": read, "tail": max(0, streamed - (shape.blocks - kept))}
    reading = _reading(chosen, plan)
    for kind, need in needs.items():
        spent = min(best.get(kind, [0.0])) / max(1, counts.get(kind, 1))
        spent = max(COMPUTING * spent, spent - visits.get(kind, 0) * reading)
        measurements.add(memory.kind(kind), ways[kind], batch_shape, Measurement(need, spent))


def _reading(chosen: RunPlan, plan: Plan) -> float:
    """Seconds to read a block's weights once, which the planner adds separately."""
    share = OVERLAPPED if plan.prefetch else 1.0
    size = chosen.shape.frozen_bytes(0, chosen.shape.blocks) / chosen.shape.blocks
    return plan.streams * share * size / chosen.machine.rates.read


@contextmanager
def _sampling(engine: Engine, plan: Plan, middle: list[int]) -> Iterator[None]:
    """Make the engine compute only the blocks `middle`, with `plan` and without pauses."""
    walk = engine.walk
    before, plan_for, pause = engine.plan, engine.plan_for, walk.pause
    engine.set_plan(plan)
    engine.plan_for, walk.sample, walk.pause = (lambda batch: plan), middle, lambda: None
    try:
        with restore_generator():
            yield
    finally:
        engine.plan_for, walk.sample, walk.pause = plan_for, None, pause
        engine.set_plan(before)


# A phase and the index of its block; all kept blocks are together in the phase "tail".
PhasePlace = tuple[str, int | None]


def _places(
    entries: list[PhasePeak], kept_from: int | None
) -> Iterator[tuple[PhasePlace, PhasePeak]]:
    """Assign each entry of a profile to a phase; reading and spilling count with their block."""
    place, turned = ("load", None), False
    for entry in entries:
        if kept_from is not None and (
            entry.phase == "head" or (entry.block is not None and entry.block >= kept_from)
        ):
            place, turned = ("tail", None), True
        elif entry.phase == "head":
            place, turned = ("head", None), True
        elif entry.block is not None and entry.phase != "spill":
            place = "backward" if turned else "forward", entry.block
        yield place, entry


def _needs(
    entries: list[PhasePeak], memory: Memory, computed: list[int], kept_from: int | None
) -> dict[str, int]:
    """Working memory of each kind of phase: largest peak minus what the planner counts as held."""
    held: dict[PhasePlace, int] = {}
    for phase in memory.phases():
        if memory.kept and phase.block == len(computed) - memory.kept:
            held["tail", None] = phase.held
        else:
            block = None if phase.block is None else computed[phase.block]
            held[phase.name, block] = phase.held
    found: dict[str, int] = {}
    for place, entry in _places(entries, kept_from):
        if place in held:
            need = max(0, entry.peak_bytes - held[place])
            found[place[0]] = max(found.get(place[0], 0), need)
    return found


def _seconds(entries: list[PhasePeak], kept_from: int | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for (kind, _), entry in _places(entries, kept_from):
        found[kind] = found.get(kind, 0.0) + entry.seconds
    return found
