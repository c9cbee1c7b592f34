"""Compute a recurrent or convolutional block for a part of its tokens, with its own code.

mlx-lm generates text with a cache for each block, and fills it by chunks of a prompt: a chunk is a
function of its tokens and of the arrays that the chunks before left in an `ArraysCache`. The same
call, with a stand-in for that cache, computes a tile of tokens in training. What kind of cache a
block has is seen from a call of the model with an empty one (`find_recurrences`); no architecture
is named, and `blocks/tiling.py` tries whether the tiles agree with the whole block.

A block may also have attention besides its states, in parallel or behind a convolution. Its keys
and values are then found as in `blocks/parts.py`, given the states before the tile.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache

from mlx_edgelora.blocks.attention import banded_masks
from mlx_edgelora.blocks.block_list import BlockList
from mlx_edgelora.blocks.checks import MODEL_ERRORS
from mlx_edgelora.blocks.outputs import OutputForm, Position
from mlx_edgelora.blocks.parts import AttentionInputs, BlockParts, TokenPosition, TokenSpan
from mlx_edgelora.errors import is_killed

# Number of states; None for keys and values; nested where a block has several caches.
Layout = int | None | tuple
# The position of the tokens of that call, where it is 0 in training.
OFFSET = 19


class NoLayout(Exception):
    """A block is called with a cache of another kind, or the model cannot be called with one."""


class States(ArraysCache):
    """Takes the place of mlx-lm's `ArraysCache`: the states of a recurrence or a convolution.

    Args:
        states: those after the tokens before; None each at the start.
        offset: position of the first token.
    """

    def __init__(self, states: Sequence[mx.array | None], offset: int | mx.array) -> None:
        super().__init__(len(states))
        self.cache, self.offset = list(states), offset


class _StatesReached(Exception):
    """Ends a block's call where its last state is known, and carries the states."""


class _LastStates(States):
    """States that end the call of a block once all are known."""

    def __setitem__(self, index: int, value: mx.array) -> None:
        super().__setitem__(index, value)
        if all(state is not None for state in self.cache):
            raise _StatesReached(*self.cache)


class _Caches(CacheList):
    """Takes the place of mlx-lm's `CacheList`."""

    def __init__(self, caches: Sequence[object], offset: int | mx.array) -> None:
        super().__init__(*caches)
        self.offset = offset


def states_in(layout: Layout) -> int:
    """Number of states in a layout."""
    if isinstance(layout, tuple):
        return sum(map(states_in, layout))
    return layout or 0


def attends(layout: Layout) -> bool:
    """Whether a layout holds keys and values."""
    return layout is None or (isinstance(layout, tuple) and any(map(attends, layout)))


class Recurrence(NamedTuple):
    """How a block that has states is called for tiles of tokens.

    Attributes:
        layout: what its cache holds.
        positions: names of its arguments that are the position of the first token.
        state_bytes: size of its states for a row of the batch.
    """

    layout: Layout
    positions: frozenset[str] = frozenset()
    state_bytes: int = 0


class RecurrentParts(BlockParts):
    """One call of a block that has states, to be made for tiles of tokens, first to last.

    Args:
        block, args, kwargs, form: as for `BlockParts`.
        recurrence: how it is called.
    """

    def __init__(
        self,
        block: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        form: OutputForm | None = None,
        recurrence: Recurrence = Recurrence(0),  # noqa: B008 - frozen
    ) -> None:
        names = list(inspect.signature(block).parameters)[1:]
        marked = dict(_marked(list(zip(names, args, strict=False)), recurrence.positions))
        args = (*marked.values(), *args[len(marked) :])
        kwargs = dict(_marked(kwargs.items(), recurrence.positions))
        super().__init__(block, args, kwargs, form=form)
        self.recurrence, self.attends = recurrence, attends(recurrence.layout)
        self.no_states: list[mx.array | None] = [None] * states_in(recurrence.layout)

    def _with_call(self, args: tuple, kwargs: dict) -> "RecurrentParts":
        return RecurrentParts(self.block, args, kwargs, self.form, self.recurrence)

    def attention_inputs(
        self,
        x: mx.array,
        span: TokenSpan,
        offset: int | mx.array | None = None,
        shared: Sequence[mx.array] | None = None,
        cache: object = None,
    ) -> AttentionInputs:
        """As in `BlockParts`; without a cache, those of the first tokens of a row."""
        if cache is None:
            at = span.start if offset is None else offset
            cache, _ = self._cache(self.no_states, at)
        return super().attention_inputs(x, span, offset, shared, cache)

    def tile_key_values(
        self,
        x: mx.array,
        span: TokenSpan,
        states: Sequence[mx.array | None],
        shared: Sequence[mx.array] | None = None,
    ) -> list[mx.array]:
        """The keys and values of a span, [B, heads, t, n] each; see `tile_outputs`.

        Raises:
            RuntimeError: the block does not call mlx-lm's attention.
        """
        inputs = self.attention_inputs(
            x, span, shared=shared, cache=self._cache(states, span.start)[0]
        )
        return [inputs.k, inputs.v]

    def tile_outputs(
        self,
        x: mx.array,
        span: TokenSpan,
        states: Sequence[mx.array | None],
        seen: TokenSpan | None = None,
        key_values: Sequence[mx.array] = (),
        shared: Sequence[mx.array] | None = None,
    ) -> tuple[list[mx.array], list[mx.array]]:
        """The block's output for a span and what later blocks read of it, and its next states.

        Args:
            x: input [B, t, D].
            span: position of the tokens.
            states: those after the tokens before; None each at the start.
            seen, key_values: with attention, the keys and values that the tokens see.
            shared: what the block reads of earlier ones.

        Raises:
            RuntimeError: the block does not have so many states, or does not call attention once.
        """
        cache, own = self._cache(states, span.start)
        if self.attends:
            made = self.outputs(x, span, seen, list(key_values), shared, cache)
        else:
            made = self._outputs(self._call(x, cache, slice(span.start, span.stop), shared=shared))
        after = [state for part in own for state in part.cache]
        if any(state is None for state in after):
            raise RuntimeError("its cache is not given all states")
        return made, after

    def placed(self, x: mx.array, offset: mx.array) -> list[mx.array]:
        """What positions go into, of tokens x [B, t, D] at this position: keys, values, states."""
        span, found = TokenSpan(0, x.shape[1]), []
        if self.attends:
            inputs = self.attention_inputs(x, span, offset)
            found += [inputs.k, inputs.v]
        if self.recurrence.positions:
            cache, _ = self._cache(self.no_states, offset, _LastStates)
            try:
                self._call(x, cache, slice(0, x.shape[1]))
            except _StatesReached as reached:
                found += reached.args
        return found

    def _cache(
        self,
        states: Sequence[mx.array | None],
        offset: int | mx.array,
        kind: type[States] = States,
    ) -> tuple[object, list[States]]:
        """A stand-in for the block's cache, and those in it that hold states, in order."""
        found: list[States] = []
        return _stand_in(self.recurrence.layout, list(states), offset, kind, found), found


def _stand_in(
    layout: Layout,
    left: list[mx.array | None],
    offset: int | mx.array,
    kind: type[States],
    found: list[States],
) -> object:
    """A stand-in for a cache: takes its states from `left`, and adds what holds them to `found`.

    Not a nested function, which would refer to itself, and so keep the states until the collector
    of reference cycles runs.
    """
    if isinstance(layout, tuple):
        return _Caches([_stand_in(part, left, offset, kind, found) for part in layout], offset)
    if layout is None:
        return TokenPosition(offset)
    found.append(kind(left[:layout], offset))
    del left[:layout]
    return found[-1]


def find_recurrences(blocks: BlockList) -> list[Recurrence | None]:
    """How each block is called for tiles, seen from a call of the model with empty caches.

    Nothing is computed.

    Returns:
        None for a block whose cache is of another kind, or if the model takes no cache.
    """
    found: list[Recurrence | None] = []

    def record(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        call = dict(BlockParts(blocks.function(index), args, kwargs).bind(None).arguments)
        positions = {name for name, value in call.items() if type(value) is int and value == OFFSET}
        try:
            layout = _layout(call["cache"]) if call.get("cache") is not None else 0
            found.append(Recurrence(layout, frozenset(positions)))
        except NoLayout:
            found.append(None)
        return x

    try:
        caches = make_prompt_cache(blocks.model)
        for cache in caches:
            _move(cache)
        with blocks.intercept(record), banded_masks():
            blocks.model(mx.zeros((1, 2), mx.int32), cache=caches)
    except MODEL_ERRORS as error:
        if is_killed(error):
            raise
    return found if len(found) == len(blocks) else [None] * len(blocks)


def _layout(cache: Any) -> Layout:
    if isinstance(cache, ArraysCache):
        return len(cache.cache)
    inner = cache.caches if isinstance(cache, CacheList) else cache
    if isinstance(inner, tuple | list):
        return tuple(map(_layout, inner))
    if hasattr(cache, "update_and_fetch"):
        return None
    raise NoLayout(type(cache).__name__)


def _move(cache: Any) -> None:
    """Let an empty cache of keys and values say that there are tokens before."""
    for inner in getattr(cache, "caches", [cache]):
        if hasattr(inner, "offset"):
            inner.offset = OFFSET


def _marked(
    arguments: Iterable[tuple[str, Any]], positions: frozenset[str]
) -> Iterator[tuple[str, Any]]:
    """Arguments by their names, with those that are positions marked as such."""
    for name, value in arguments:
        is_position = name in positions and type(value) is int and value == 0
        yield name, Position(value) if is_position else value
