"""Whether rows can share a row in a model: tried, by what its blocks do with it.

A block of each kind is computed for rows that share a row, and for the same rows alone. A
recurrence, a convolution, attention of its own, a learned position: each gives something else.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_edgelora.blocks.attention import bounded_attention
from mlx_edgelora.blocks.block_list import (
    BlockList,
    array_slots,
    bind_arrays,
    call_signature,
    signature,
)
from mlx_edgelora.blocks.checks import MODEL_ERRORS
from mlx_edgelora.blocks.dropout import without_dropout
from mlx_edgelora.blocks.outputs import links_of
from mlx_edgelora.blocks.packing import Packing, rows_packed
from mlx_edgelora.blocks.parts import BlockParts, TokenSpan
from mlx_edgelora.blocks.tiling import TOLERANCES, TRIAL_SCALES, Tiling, difference
from mlx_edgelora.blocks.weight_source import WeightSource, reading_once
from mlx_edgelora.errors import EdgeLoraError, is_killed

# The rows that share one, in tokens: those that are compared, behind some others.
FIRST, ROWS = 20, (13, 7)
SHORT = FIRST + sum(ROWS)

Call = tuple[mx.array, tuple, dict]


def check_packing(
    blocks: BlockList, weights: Sequence[WeightSource], tiling: Tiling, tokens: int
) -> None:
    """Prove that rows can share a row of so many tokens, or refuse the architecture by name.

    The rows that are compared are the last ones of a row, whose positions are the farthest from
    those they have alone. A block that can be computed by tiles is called for these alone there,
    another one for the whole row. Memory: the latter's forward for one row.

    Args:
        blocks: of the model.
        weights: where the blocks' arrays come from.
        tiling: of these blocks.
        tokens: inputs of the longest row.

    Raises:
        EdgeLoraError: names the architecture, the block and the reason.
    """
    tokens = max(tokens, SHORT)
    with without_dropout(blocks.model), bounded_attention(), reading_once(weights):
        short, long = _calls(blocks, SHORT), _calls(blocks, tokens)
        alone = {count: _calls(blocks, count) for count in ROWS}
        _check_entry(blocks, long[0][0], {count: calls[0][0] for count, calls in alone.items()})
        tried = set()
        for index, block in enumerate(blocks.blocks):
            kind = signature(block) + call_signature(*long[index][1:])
            if kind in tried:
                continue
            tried.add(kind)
            choice = tiling.tileable(index)
            if links_of(*long[index][1:]):
                where = f"block {index} ({type(block).__name__})"
                raise _refused(blocks, f"{where} reads what an earlier block returns")
            trial = _Trial(blocks, weights, index, {n: calls[index] for n, calls in alone.items()})
            trial.whole(short[index], len(TRIAL_SCALES))
            if choice.possible and not choice.through_cache and choice.recurrence is None:
                trial.by_tiles(long[index], tokens)
            else:
                trial.whole(long[index], 1)


def _calls(blocks: BlockList, tokens: int) -> list[Call]:
    """What the model calls its blocks with for a row of so many tokens."""
    calls: list[Call] = []

    def record(_: int, *call: Any) -> mx.array:
        calls.append(call)
        return call[0]

    # Of rows of the same tokens, so that embedded they differ by their positions only.
    with blocks.intercept(record):
        blocks.model(mx.ones((1, tokens), mx.int32))
    return calls


def _check_entry(blocks: BlockList, whole: mx.array, alone: dict[int, mx.array]) -> None:
    """Whether what embeds a token knows its position."""
    far = whole.shape[1]
    for count in reversed(ROWS):
        far -= count
        same = mx.allclose(whole[:, far : far + count], alone[count], rtol=1e-3, atol=1e-6)
        if not same.item():
            raise _refused(blocks, "what embeds its tokens depends on their positions")


class _Trial:
    """One block, computed for rows that share a row and for the same rows alone."""

    def __init__(
        self,
        blocks: BlockList,
        weights: Sequence[WeightSource],
        index: int,
        alone: dict[int, Call],
    ) -> None:
        self._blocks, self._weights, self._index, self._alone = blocks, weights, index, alone
        self._block, self._function = blocks.blocks[index], blocks.function(index)

    def whole(self, call: Call, rows: int) -> None:
        """Compare where the block is computed for all tokens at once."""
        x, args, kwargs = call
        tokens = x.shape[1]
        x = self._input(x, tokens)
        if rows > 1:
            x = mx.array(TRIAL_SCALES, x.dtype)[:, None, None] * x
        packing = Packing(np.repeat(_starts(tokens)[None], rows, 0))
        got = self._computed(lambda: self._function(x, *args, **kwargs), packing)
        last = tokens - sum(ROWS)
        self._compare(got[:, last:], x[:, last:])

    def by_tiles(self, call: Call, tokens: int) -> None:
        """Compare where the block is computed for the last tokens of a row by its parts."""
        x, args, kwargs = call
        parts, span = (
            BlockParts(self._function, args, kwargs),
            TokenSpan(tokens - sum(ROWS), tokens),
        )
        x = self._input(x, sum(ROWS))
        packing = Packing(_starts(tokens)[None])

        def compute() -> mx.array:
            return parts.output(
                x, span, parts.visible_keys(span, tokens), parts.key_values(x, span)
            )

        self._compare(self._computed(compute, packing), x)

    def _input(self, like: mx.array, tokens: int) -> mx.array:
        shape = (1, tokens, like.shape[2])
        return mx.random.normal(shape, key=mx.random.key(self._index)).astype(like.dtype)

    def _compare(self, got: mx.array, x: mx.array) -> None:
        """Compare what the last rows gave with what they give alone."""
        begin = 0
        for count in ROWS:
            own = x[:, begin : begin + count]
            _, args, kwargs = self._alone[count]
            expected = self._computed(
                lambda own=own, args=args, kwargs=kwargs: self._function(own, *args, **kwargs), None
            )
            off = difference(got[:, begin : begin + count], expected, own)
            if not off <= TOLERANCES[x.dtype]:  # NaN is no agreement
                raise self._refusal(f"a row differs by {off:.1e} of its norm from itself alone")
            begin += count

    def _computed(self, function: Callable[[], mx.array], packing: Packing | None) -> mx.array:
        arrays = {k: v for source in self._weights for k, v in source.block(self._index).items()}
        try:
            with rows_packed(packing), bind_arrays(array_slots(self._block), arrays):
                made = self._blocks.outputs(self._index, function())[0]
            del arrays
            mx.eval(made)
        except MODEL_ERRORS as error:
            if is_killed(error):
                raise
            raise self._refusal(str(error)) from error
        return made

    def _refusal(self, reason: str) -> EdgeLoraError:
        where = f"block {self._index} ({type(self._block).__name__})"
        return _refused(self._blocks, f"{where}: {reason}")


def _refused(blocks: BlockList, reason: str) -> EdgeLoraError:
    architecture = type(blocks.model).__module__.rpartition(".")[2]
    return EdgeLoraError(
        f"packing: {architecture} mixes rows that share a row, expected each to be computed as if "
        f"it were alone ({reason}); leave --packing out"
    )


def _starts(tokens: int) -> np.ndarray:
    """Where the rows begin of a row whose last ones are compared."""
    lengths = [tokens - sum(ROWS), *ROWS]
    return np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
