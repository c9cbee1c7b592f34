"""Verify the engine's gradients against plain MLX, on the user's model and machine.

For each kind of block (same code, same shapes) and each way in which the plan computes it, the
gradients of one block are computed as in a step, and again by MLX's own autodiff without any
replacement of this package (layers, attention, norms). The adapters are random, B included,
because with B = 0 the gradient of A is zero. The head with the loss is compared in the same way.
The arguments with which the model calls its blocks are compared too, with and without the walk's
interception.

Limits of the differences are in `training/verdict.py`.

Memory: one block with the activations of plain autodiff. The light form uses few tokens, with
tiles and windows so small that rows are divided as long rows are.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_edgelora.blocks import attention as attention_hook
from mlx_edgelora.blocks import norms as norms_hook
from mlx_edgelora.blocks.arguments import different_argument
from mlx_edgelora.blocks.attention import banded_masks
from mlx_edgelora.blocks.block_list import (
    array_slots,
    bind_arrays,
    call_signature,
    signature,
)
from mlx_edgelora.blocks.dropout import restore_generator
from mlx_edgelora.blocks.masks import band_of
from mlx_edgelora.blocks.outputs import Linked, leaves_of, links_of, map_leaves
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.engine.walk import Walk
from mlx_edgelora.layers import attention as attention_layer
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.measure.units import size
from mlx_edgelora.model.weights import cast
from mlx_edgelora.training.plain import (
    OneBlockModel,
    OneBlockWeights,
    RandomAdapters,
    named_arguments,
    plain_calls,
    plain_classes,
    random_adapter,
    recorded_calls,
)
from mlx_edgelora.training.verdict import Arrays, Verdict, compare_gradients, unit

# The light form: rows of a batch, their tokens (MLX's GPU kernels need more), tokens of a tile (so
# few that not every tile uses every expert) and bytes of a tile of attention scores.
LIGHT_ROWS, LIGHT_TOKENS, LIGHT_TOKENS_GPU, LIGHT_TILE, LIGHT_BYTES = 2, 32, 128, 4, 2048
# Tokens in the comparison of the head, and size of its vocabulary in the light form.
HEAD_TOKENS, LIGHT_VOCABULARY = 32, 600
# Entries of the vocabulary that are summed in one piece.
PIECE = 256
# Tokens of the call in which the arguments of the blocks are compared.
CALL_TOKENS = 16
# Tokens at which the memory of plain autodiff is measured; it is quadratic in their number.
PROBES = (64, 128, 256)


def verify(
    engine: Engine,
    rows: int,
    tokens: int,
    dtype: mx.Dtype | None = None,
    light: bool = False,
    memory: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> list[Verdict]:
    """Compare the gradients of an engine and its plan with those of plain MLX.

    Args:
        engine: an engine before its first step; it is unchanged afterwards.
        rows: rows of the batches that the engine will get.
        tokens: tokens of each row.
        dtype: configured dtype of hidden states; None for the model's own.
        light: compare few tokens, whatever the size of the batches.
        memory: bytes that plain autodiff of one block may take; if it needs more, shorter rows
            are compared. None for no limit.
        log: called with a line if shorter rows are compared.

    Returns:
        A verdict for the calls of blocks, for each kind of block and way, and for the head.
    """
    with restore_generator(), _small_tiles(engine, rows * tokens) if light else ExitStack():
        comparison = _GradientComparison(engine, rows, tokens, dtype, light)
        while memory is not None and (needed := comparison.plain_peak()) > memory:
            log(
                f"plain MLX would need {size(needed)} for a block of {tokens} tokens: rows "
                f"of {tokens // 2} are compared"
            )
            tokens //= 2
            comparison = _GradientComparison(engine, rows, tokens, dtype, light)
        found = [comparison.calls()]
        found += [comparison.kind(group, way) for way, group in comparison.groups()]
        found += comparison.head()
    mx.clear_cache()
    return found


class _GradientComparison:
    """Compares one engine with plain MLX, on batches of one size."""

    def __init__(
        self, engine: Engine, rows: int, tokens: int, dtype: mx.Dtype | None, light: bool
    ) -> None:
        self._engine, self._light, self._asked = engine, light, dtype
        self._walk, self._plan, self._blocks = engine.walk, engine.plan, engine.walk.blocks
        with banded_masks():
            long = recorded_calls(self._blocks, mx.zeros((rows, tokens), mx.int32))
        self._windowed = [_is_windowed(call) for call in long]
        if light:
            least = LIGHT_TOKENS_GPU if mx.default_device() == mx.gpu else LIGHT_TOKENS
            rows, tokens = min(rows, LIGHT_ROWS), min(tokens, least)
        self._tokens = mx.zeros((rows, tokens), mx.int32)
        with banded_masks():
            self._recorded = recorded_calls(self._blocks, self._tokens)
        self._first = self._recorded[0][0]

    def calls(self) -> Verdict:
        """Compare the arguments of the blocks' calls with and without interception."""
        tokens = self._tokens[:1, :CALL_TOKENS]
        with banded_masks():
            ours = recorded_calls(self._blocks, tokens)
        theirs = plain_calls(self._blocks, tokens)
        for index, (_, args, kwargs) in enumerate(ours):
            if index not in theirs:
                continue  # called by compiled code, which Python's profiler does not see
            mine = named_arguments(self._blocks.blocks[index], args, kwargs)
            given = {name: theirs[index][name] for name in mine if name in theirs[index]}
            hidden = next(iter(mine))  # the input is None here; only other arguments count
            given, mine = _without_stand_ins(given, mine)
            if name := different_argument(((), given | {hidden: None}), ((), mine)):
                problem = f"block {index} is called with another {name}"
                return Verdict("calls of blocks", "", "by the model", np.inf, problem)
        return Verdict("calls of blocks", "", "by the model", 0.0)

    def plain_peak(self) -> int:
        """Bytes of plain autodiff of the largest block at full length, estimated from short rows.

        Returns 0 if the rows are short.
        """
        rows, tokens = self._tokens.shape
        if tokens <= PROBES[-1]:
            return 0
        peaks = []
        for count in PROBES:
            short = _GradientComparison(self._engine, rows, count, self._asked, light=False)
            mx.reset_peak_memory()
            for _, group in short.groups():
                one, trained = short.alone(group[0], mx.float32)
                own = trained.cast(mx.float32)
                short._plain(one, group[0], own, None, mx.float32, None)
            peaks.append(mx.get_peak_memory())
        return int(np.polyval(np.polyfit(PROBES, peaks, 2), tokens))

    def groups(self) -> Iterator[tuple[str, list[int]]]:
        """The groups of blocks of one kind that are computed in one way: (way, indices)."""
        found: dict[tuple, list[int]] = {}
        last = len(self._blocks) - 1
        for index, block in enumerate(self._blocks.blocks):
            shapes = [(n, v.shape, str(v.dtype)) for n, v in tree_flatten(block.parameters())]
            way = self._way(index)
            key = (
                way,
                signature(block),
                str(shapes),
                call_signature(*self._recorded[index][1:]),
                self._windowed[index],
                index == last,
            )
            found.setdefault(key, []).append(index)
        for key, group in found.items():
            yield key[0], group

    def kind(self, group: list[int], way: str) -> Verdict:
        """Compare the first block of a group and, except in the light form, the last one."""
        numbers = group[:1] if self._light else sorted({group[0], group[-1]})
        verdicts = [self._block(index, group, way) for index in numbers]
        return max(verdicts, key=lambda verdict: (bool(verdict.problem), verdict.error))

    def _block(self, index: int, group: list[int], way: str) -> Verdict:
        last = group[-1] == len(self._blocks) - 1
        one, trained = self.alone(index, mx.float32)
        rows = _some_rows(self._tokens.size) if last else None

        def again(function: Callable, *args: Any) -> Arrays:
            mx.random.seed(0)  # dropout must draw the same masks each time
            return function(*args)

        def walked(dtype: mx.Dtype) -> Arrays:
            alone, own = self.alone(index, dtype)[0], trained.cast(dtype)
            return again(self._walked, alone, index, own, rows, way)

        def plain(dtype: mx.Dtype, nudge: int | None) -> Arrays:
            return again(self._plain, one, index, trained.cast(dtype), rows, dtype, nudge)

        name = type(self._blocks.blocks[index]).__name__
        how = f"{way}, labelled tokens" if last else way
        return compare_gradients(walked, plain, self._dtype(index), name, _ranges(group), how)

    def alone(self, index: int, dtype: mx.Dtype) -> tuple[OneBlockModel, RandomAdapters]:
        """A model of a single block, whose input has a given dtype, and its random adapters."""
        window = None
        if self._light and self._windowed[index]:
            window = max(2, self._tokens.shape[1] // 3)
        shape = (*self._tokens.shape, self._first.shape[-1])
        one = OneBlockModel(self._blocks, index, dtype, shape, window)
        return one, RandomAdapters(one.layers[0])

    def head(self) -> list[Verdict]:
        """Compare the head with the loss; empty if plain MLX computes the logits in the engine."""
        head, loss = self._engine.head, self._engine.training_loss
        if head is None:
            return []
        if not isinstance(loss, CrossEntropy):  # the approximate loss differs on purpose
            loss = CrossEntropy(loss.exact.tile_bytes)
        count = min(head.vocabulary, LIGHT_VOCABULARY) if self._light else head.vocabulary
        hidden = mx.random.normal((HEAD_TOKENS, self._first.shape[-1]), key=mx.random.key(0))
        labels = mx.random.randint(0, count, (HEAD_TOKENS,), key=mx.random.key(1))
        if self._light:
            loss = replace(loss, tile_bytes=4 * (count // 3) * head.dims)
        adapter = {n: random_adapter(n, v) for n, v in head.adapter_arrays(count).items()}

        def walked(dtype: mx.Dtype) -> Arrays:
            some = _FirstRows(head, count)
            # With kept blocks the loss is a part of their graph.
            if self._plan.kept_blocks and not self._plan.reads_head:
                return self._graph(
                    some, loss, {"hidden states": hidden.astype(dtype)} | adapter, labels
                )
            with bind_arrays(array_slots(self._blocks.model), adapter):
                _, gradients = loss.value_and_grad(hidden.astype(dtype), some, labels)
                return {"hidden states": gradients.hidden} | head.gradients_by_name(gradients)

        def plain(dtype: mx.Dtype, nudge: int | None) -> Arrays:
            values = _nudged({"hidden states": hidden.astype(dtype)} | adapter, nudge)
            return self._plain_head(values, labels, count, loss.label_smoothing)

        dtype, way = self._dtype(len(self._blocks)), f"{count} tokens of the vocabulary"
        return [compare_gradients(walked, plain, dtype, "head and loss", "", way)]

    def _way(self, index: int) -> str:
        plan, count = self._plan, len(self._blocks)
        if index >= count - plan.kept_blocks:
            return "kept"
        choice = self._walk.tile_choice(index, self._tokens.size)
        if choice is None or not choice.possible:
            return "whole"
        return "by tiles"

    def _dtype(self, index: int) -> mx.Dtype:
        """The dtype of the hidden states at the input of a block, or of the head."""
        if self._asked is not None:
            return self._asked
        return self._first.dtype if index == 0 else self._blocks.hidden_dtype

    def _walked(
        self,
        one: OneBlockModel,
        index: int,
        trained: RandomAdapters,
        rows: mx.array | None,
        way: str,
    ) -> Arrays:
        """The block's output and gradients, computed as in a step."""
        plan = replace(self._plan, kept_blocks=int(way == "kept"))
        if not way.startswith("by tiles"):
            plan = replace(plan, tile_tokens=None)
        walk = Walk(
            one,
            self._walk.store,
            OneBlockWeights(self._walk.weights, index, one.layers[0], one.shift.dtype),
            self._walk.is_compiled and not links_of(*self._recorded[index][1:]),
            trained,
            plan=plan,
            blocks=one.block_list(),
            like=self._walk,
        )
        with walk.forward(lambda: one(self._tokens), rows=rows) as state:
            if state.tail is not None:
                (_, out), found = walk.finish(state, _ProjectedLoss())
            else:
                out, state.hidden, found = state.hidden, None, {}
                state.cotangent = _cotangent(out.shape, out.dtype)
            found = found | {"output": out}
            for more in walk.backward(state):
                found |= {name.removeprefix("layers.0."): value for name, value in more.items()}
        return found

    def _plain(
        self,
        one: OneBlockModel,
        index: int,
        trained: RandomAdapters,
        rows: mx.array | None,
        dtype: mx.Dtype,
        nudge: int | None,
    ) -> Arrays:
        """The block's output and gradients, computed by MLX's autodiff."""
        block = one.layers[0]
        slots, own = array_slots(block), trained.block(0)
        frozen = {name: box[key] for name, (box, key) in slots.items() if name not in own}
        frozen |= self._walk.weights.block(index)
        frozen = {name: cast(value, dtype) for name, value in frozen.items()}
        frozen, own = _nudged(frozen, nudge), _nudged(own, nudge)
        with banded_masks():
            args, kwargs = one.call(self._tokens)

        def function(*primals: mx.array) -> mx.array:
            with bind_arrays(slots, frozen | dict(zip(own, primals[:-1], strict=True))):
                out = one.hidden(one.block(primals[-1], *args, **kwargs))
            return out if rows is None else out.reshape(1, -1, out.shape[-1])[:, rows]

        x = one.input(self._tokens).astype(dtype)
        shape = x.shape if rows is None else (1, rows.size, x.shape[-1])
        with plain_classes([block], unpack=not self._light):
            (out,), gradients = mx.vjp(function, [*own.values(), x], [_cotangent(shape, dtype)])
        frozen.clear()
        mx.eval(out, gradients)
        return {"output": out, "shift": gradients[-1]} | dict(zip(own, gradients[:-1], strict=True))

    def _graph(
        self, head: "_FirstRows", loss: CrossEntropy, values: Arrays, labels: mx.array
    ) -> Arrays:
        """The gradients of the loss, computed by MLX's autodiff of `loss.graph`."""
        slots = array_slots(self._blocks.model)

        def function(values: Arrays) -> mx.array:
            with bind_arrays(slots, {n: v for n, v in values.items() if n in slots}):
                return loss.graph(values["hidden states"], head, labels)

        gradients = mx.grad(function)(values)
        mx.eval(gradients)
        return gradients

    def _plain_head(self, values: Arrays, labels: mx.array, count: int, smoothing: float) -> Arrays:
        head, slots = self._engine.head, array_slots(self._blocks.model)

        def function(values: Arrays) -> mx.array:
            with bind_arrays(slots, {n: v for n, v in values.items() if n in slots}):
                logits = head.own_logits(values["hidden states"], count).astype(mx.float32)
            return _cross_entropy(logits, labels, smoothing)

        with plain_classes(self._blocks.modules_outside(), unpack=True):
            gradients = mx.grad(function)(values)
        mx.eval(gradients)
        return gradients


class _ProjectedLoss:
    """Replaces a loss by the sum of hidden states times a cotangent; see `tail.GraphLoss`."""

    key, arrays = "projected", ()

    def __init__(self) -> None:
        self.outside: Arrays = {}

    def graph(self, hidden: mx.array, outside: Arrays) -> tuple[mx.array, mx.array]:
        """The sum, and the hidden states."""
        return (hidden * _cotangent(hidden.shape, hidden.dtype)).sum(), hidden


class _FirstRows:
    """A head with a vocabulary of its first `count` rows."""

    def __init__(self, head: Any, count: int) -> None:
        self._head, self.vocabulary = head, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)


def _cross_entropy(logits: mx.array, labels: mx.array, smoothing: float) -> mx.array:
    """The mean of `nn.losses.cross_entropy`, with sums over the vocabulary in pieces.

    With MLX's float32 sum over 49,152 entries in one piece, the relative error of the gradient is
    5e-5 compared with float64 on a CPU; with this package's loss it is 2e-6.
    """
    pieces = mx.split(logits, range(PIECE, logits.shape[-1], PIECE), axis=-1)
    whole = mx.logsumexp(mx.stack([mx.logsumexp(p, axis=-1) for p in pieces]), axis=0)
    target = (1 - smoothing) * mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    if smoothing:
        sums = mx.stack([piece.sum(axis=-1) for piece in pieces]).sum(axis=0)
        target = target + smoothing * sums / logits.shape[-1]
    return (whole - target).mean()


def _is_windowed(call: tuple[mx.array, tuple, dict]) -> bool:
    """Whether a block is called with a sliding-window mask."""
    masks = [value for value in (*call[1], *call[2].values()) if isinstance(value, mx.array)]
    return any(band is not None and band.window is not None for band in map(band_of, masks))


@contextmanager
def _small_tiles(engine: Engine, tokens: int) -> Iterator[None]:
    """Make tiles so small that few tokens are divided like batches of `tokens` tokens."""
    plan, modules = engine.plan, (attention_hook, attention_layer, norms_hook)
    before = [module.TILE_BYTES for module in modules]
    small = plan
    if engine.walk.tile_choice(0, tokens) is not None:
        small = replace(plan, tile_tokens=min(plan.tile_tokens, LIGHT_TILE))
    for module in modules:
        module.TILE_BYTES = LIGHT_BYTES
    engine.set_plan(small)
    try:
        yield
    finally:
        for module, size in zip(modules, before, strict=True):
            module.TILE_BYTES = size
        engine.set_plan(plan)


def _some_rows(count: int) -> mx.array:
    """Indices of labelled tokens: scattered in the first half, contiguous at the end."""
    scattered = np.arange(0, count // 2, 3)
    return mx.array(np.concatenate([scattered, np.arange(count - count // 4 - 1, count)]))


def _cotangent(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(5)).astype(dtype)


def _without_stand_ins(
    given: dict[str, Any], mine: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments by name, with shapes in place of what a block reads of earlier ones."""
    read = [n for n, value in mine.items() if any(type(v) is Linked for _, v in leaves_of(value))]

    def shape(leaf: Any) -> Any:
        return str(leaf.shape) if isinstance(leaf, mx.array) else leaf

    return tuple(
        values | {name: map_leaves(shape, values[name]) for name in read if name in values}
        for values in (given, mine)
    )


def _nudged(arrays: Arrays, seed: int | None) -> Arrays:
    """Float32 arrays changed by the relative error `unit`, up or down at random."""
    if seed is None:
        return arrays
    rng = np.random.RandomState(seed)

    def nudged(value: mx.array) -> mx.array:
        if value.dtype != mx.float32:
            return value
        signs = rng.choice(np.float32([-1, 1]), value.shape)
        return value * mx.array(1 + signs * np.float32(unit()))

    return {name: nudged(value) for name, value in arrays.items()}


def _ranges(numbers: list[int]) -> str:
    """Numbers as text with ranges: `0-3, 5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
