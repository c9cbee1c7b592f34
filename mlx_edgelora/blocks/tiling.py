"""Find out by trials which blocks can be computed by tiles of tokens."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.attention import attention_found, banded_masks
from mlx_edgelora.blocks.block_list import (
    BlockList,
    array_slots,
    bind_arrays,
    call_signature,
    signature,
)
from mlx_edgelora.blocks.cached_parts import CachedParts
from mlx_edgelora.blocks.cached_trial import try_caches
from mlx_edgelora.blocks.checks import MODEL_ERRORS
from mlx_edgelora.blocks.dropout import without_dropout
from mlx_edgelora.blocks.experts import EXPERTS, any_experts
from mlx_edgelora.blocks.masks import band_of, simplest_mask
from mlx_edgelora.blocks.outputs import links_of
from mlx_edgelora.blocks.packing import rows_packed
from mlx_edgelora.blocks.parts import BlockParts, TokenSpan
from mlx_edgelora.blocks.states import (
    Recurrence,
    RecurrentParts,
    find_recurrences,
    states_in,
)
from mlx_edgelora.blocks.tracing import depends_on_values, gradient_hook
from mlx_edgelora.blocks.weight_source import WeightSource, reading_once
from mlx_edgelora.errors import is_killed
from mlx_edgelora.layers.fused import is_floating

# Shape of the trial batch (rows, tokens), and the tiles of tokens.
TRIAL_SHAPE = (2, 7)
TRIAL_SPANS = (TokenSpan(0, 3), TokenSpan(3, 7))
# Indices of some tokens of both rows, and of some tokens of the second tile.
TRIAL_ROWS = (0, 3, 5, 11, 12, 13)
TRIAL_TILE_ROWS = (0, 3, 5)
TRIAL_WINDOW = 3
# Scale of each row's input. A small input shows the block's own contribution. A large one shows
# positions if there is no norm before attention: small inputs give all tokens the same scores.
TRIAL_SCALES = (0.01, 1.0)
# Allowed difference, relative to the norm. Rounding stays below it (TF32 makes 1e-3 of float32);
# a wrong position or mask gives differences of a tenth and more.
TOLERANCES = {mx.float32: 5e-3, mx.float16: 2e-2, mx.bfloat16: 5e-2}

Parts = TypeVar("Parts", bound=BlockParts)


class Tileable(NamedTuple):
    """Whether a block can be computed by tiles of tokens, and why not.

    Attributes:
        keys: entries of a token's keys or values, the larger of the two; for a block that is cut
            at its cache, of the arrays that it passes to the cache.
        through_cache: see `BlockParts`.
        by_rows: whether it can be computed for some of a tile's tokens only.
        appended: number of arrays that its tokens append to several caches; 0 for a block that is
            not computed by these.
        recurrence: how tiles hand on the states of a recurrent block, or are called where tokens
            know nothing of each other; None for a block whose tokens see each other's keys alone.
    """

    possible: bool
    reason: str = ""
    keys: int = 0
    through_cache: bool = False
    by_rows: bool = False
    appended: int = 0
    recurrence: Recurrence | None = None


class Tiling:
    """Decides for each block of a model whether it can be computed by tiles of tokens.

    Args:
        blocks: the model's blocks; they passed `check_walk`.
        weights: sources of the blocks' arrays; one block of each kind is read.
        like: a tiling of blocks that include these, whose results are reused.
    """

    def __init__(
        self, blocks: BlockList, weights: Sequence[WeightSource], like: "Tiling | None" = None
    ) -> None:
        self._blocks, self._weights = blocks, weights
        self._calls: list[tuple] | None = None
        self._recurrences: list[Recurrence | None] = []
        self._keys: dict[int, str] = {}
        self._found: dict[str, Tileable] = {} if like is None else like._found

    def tileable(self, index: int) -> Tileable:
        """Whether block `index` can be computed by tiles; not inside an intercepted call.

        The first call for a kind of block makes a trial: it reads the block and runs it on 14
        tokens, whole and by parts.
        """
        block = self._blocks.blocks[index]
        if has_active_dropout(block):  # checked each time: it depends on the training mode
            return Tileable(False, "dropout would draw other masks for parts of the tokens")
        if index not in self._keys:
            if self._calls is None:
                self._calls = block_calls(self._blocks)
                self._recurrences = find_recurrences(self._blocks)
            _, args, kwargs = self._calls[index]
            form = self._blocks.forms[index]
            read = str(form.read) if form else ""
            self._keys[index] = signature(block) + call_signature(args, kwargs) + read
        key = self._keys[index]
        if key not in self._found:
            with (
                attention_found(),
                rows_packed(None),
                reading_once(self._weights),
                EXPERTS.handled_by(any_experts),
            ):
                found = self._trial(index)
                if not found.possible:
                    found = self._by_caches(index) or found
                self._found[key] = found
        return self._found[key]

    def summary(self) -> str:
        """Describe the tiling of all blocks in words."""
        found = [self.tileable(index) for index in range(len(self._blocks))]
        reasons = sorted({choice.reason for choice in found if not choice.possible})
        count = sum(choice.possible for choice in found)
        return f"{count} of {len(found)} blocks" + (f" ({'; '.join(reasons)})" if reasons else "")

    def _trial(self, index: int) -> Tileable:
        recurrence = self._recurrences[index]
        ways = [self._with_keys(index)] if recurrence is None else self._ways(index, recurrence)
        tried = []
        for found in ways:
            if found.possible:
                return found
            tried.append(found)
        return tried[0]

    def _ways(self, index: int, recurrence: Recurrence) -> Iterator[Tileable]:
        """Trials of a block, that which its cache suggests first."""
        if states_in(recurrence.layout):
            yield self._with_states(index, recurrence)
        yield self._with_keys(index)
        if not isinstance(recurrence.layout, tuple):  # its tokens may see no others at all
            yield self._with_states(index, Recurrence(0, recurrence.positions))

    def _with_keys(self, index: int) -> Tileable:
        """Whether tokens know no more of each other than keys and values."""
        block, reasons = self._blocks.function(index), []
        for through_cache in (False, True):
            try:
                form = self._blocks.forms[index]
                x, *call = self._calls[index]
                parts = BlockParts(block, *call, through_cache, form)
                reason, keys, by_rows = self._compare(index, _trials(parts, x))
                if not reason and _depends_on_length(x, parts):
                    reason = "what a block computes depends on how long the text is"
                if not reason:
                    return Tileable(True, "", keys, through_cache, by_rows)
            except MODEL_ERRORS as error:
                if is_killed(error):
                    raise
                reason = f"a block cannot be called for parts of its tokens: {error}"
            reasons.append(reason)
        return Tileable(False, reasons[0])

    def _by_caches(self, index: int) -> Tileable | None:
        """How a block with several caches is computed by tiles; None if it cannot be."""
        x, args, kwargs = self._calls[index]
        parts = CachedParts(self._blocks.function(index), args, kwargs)
        reads = self._blocks.forms[index] is not None or links_of(args, kwargs)
        if reads or not parts.is_causal or parts.untileable_reason(TRIAL_SHAPE[1]):
            return None
        scaled = mx.array(TRIAL_SCALES, x.dtype)[:, None, None] * x
        window = simplest_mask(range(TRIAL_SHAPE[1]), TRIAL_SHAPE[1], TRIAL_WINDOW)
        try:
            for mask in (parts.mask, window):
                got, expected, appended = try_caches(
                    self._computing(index), parts.with_mask(mask), scaled, TRIAL_SPANS
                )
                if not difference(got, expected, scaled) <= TOLERANCES[x.dtype]:
                    return None
        except MODEL_ERRORS as error:
            if is_killed(error):
                raise
            return None
        keys = -(-appended.entries // 2)  # those of a pair of keys and values, on the average
        return Tileable(True, "", keys, through_cache=True, appended=appended.count)

    def _with_states(self, index: int, recurrence: Recurrence) -> Tileable:
        """Whether tokens know no more of those before than states, and perhaps keys and values."""
        x, *call = self._calls[index]
        parts = RecurrentParts(
            self._blocks.function(index), *call, self._blocks.forms[index], recurrence
        )
        keys, size = 0, 0
        try:
            known = parts.attends and band_of(parts.mask) is not None
            if parts.no_states and parts.mask is not None and not known:
                raise ValueError("its mask is none that a recurrence knows")
            for scaled, masked in _trials(parts, x):
                reason, key_values, size = self._states_differ(index, scaled, masked)
                if reason:
                    return Tileable(False, reason)
                keys = max([array.shape[1] * array.shape[3] for array in key_values], default=0)
            if _depends_on_length(x, parts):
                return Tileable(False, "what a block computes depends on how long the text is")
        except MODEL_ERRORS as error:
            if is_killed(error):
                raise
            return Tileable(False, f"a block cannot be called for parts of its tokens: {error}")
        size //= TRIAL_SHAPE[0]
        return Tileable(True, "", keys, recurrence=recurrence._replace(state_bytes=size))

    def _states_differ(
        self, index: int, x: mx.array, parts: RecurrentParts
    ) -> tuple[str | None, list[mx.array], int]:
        """How tiles that hand on states differ, their keys and values, and bytes of the states."""
        compute, states, tiles = self._computing(index), parts.no_states, []
        key_values: list[mx.array] = []
        for span in TRIAL_SPANS:
            mine = x[:, span.start : span.stop]
            if parts.attends:
                own = compute(parts.tile_key_values, mine, span, states)
                pairs = zip(key_values or [None] * len(own), own, strict=True)
                key_values = [b if a is None else mx.concatenate([a, b], axis=2) for a, b in pairs]
            seen = parts.visible_keys(span, x.shape[1])
            some = [array[:, :, seen.start : seen.stop] for array in key_values]
            tile, states = compute(parts.tile_outputs, mine, span, states, seen, some)
            tiles.append(tile)
        reason = self._tiles_differ(x, parts, tiles, compute(parts.whole, x))
        return reason, key_values, sum(state.nbytes for state in states)

    def _compare(
        self, index: int, trials: Iterable[tuple[mx.array, BlockParts]]
    ) -> tuple[str | None, int, bool]:
        """How the tiles differ from the whole block (None if they do not), and for `Tileable`:
        entries of a token's keys or values, and whether some tokens of a tile can be computed.
        """
        compute, keys, by_rows = self._computing(index), 0, True
        for x, parts in trials:
            if not parts.through_cache and _mask_is_computed(x, parts, self._blocks.blocks[index]):
                return "a block adds a mask to its scores that depends on its input", 0, False
            key_values = compute(_key_values, x, parts)
            keys = max(array.shape[1] * array.shape[3] for array in key_values)
            tiles = [compute(_tile, x, parts, span, key_values) for span in TRIAL_SPANS]
            whole = compute(parts.whole, x)
            if reason := self._tiles_differ(x, parts, tiles, whole):
                return reason, 0, False
            by_rows = by_rows and not parts.through_cache
            by_rows = by_rows and not self._rows_differ(index, x, parts, whole[0], key_values)
        return None, keys, by_rows

    def _tiles_differ(
        self, x: mx.array, parts: BlockParts, tiles: list[list[mx.array]], expected: list[mx.array]
    ) -> str | None:
        """How tiles of outputs differ from those of the whole block; None if they do not."""
        whole, *read = expected
        off = difference(mx.concatenate([tile[0] for tile in tiles], axis=1), whole, x)
        if not off <= TOLERANCES[x.dtype]:  # NaN is no agreement
            return f"computed by parts a block differs by {off:.1e} of its norm"
        mine, form = [tile[1:] for tile in tiles], parts.form
        if form and not form.read_alike(mine, read, TOLERANCES[x.dtype]):
            return "computed by parts a block returns something else to later blocks"
        return None

    def _rows_differ(
        self,
        index: int,
        x: mx.array,
        parts: BlockParts,
        whole: mx.array,
        key_values: Sequence[mx.array],
    ) -> bool:
        """Whether the block gives something else if it is computed for some tokens only."""
        compute, span = self._computing(index), TRIAL_SPANS[1]
        rows, tile_rows = mx.array(TRIAL_ROWS), mx.array(TRIAL_TILE_ROWS)
        mine, seen, some = _seen(x, parts, span, key_values)
        try:
            pairs = [
                (compute(parts.output_rows, x, rows), TokenSpan(0, x.shape[1]), rows),
                (compute(parts.output_at, mine, span, seen, some, tile_rows), span, tile_rows),
            ]
            for got, part, places in pairs:
                expected, before = (
                    v[:, part.start : part.stop].reshape(1, -1, x.shape[2])[:, places]
                    for v in (whole, x)
                )
                if not difference(got, expected, before) <= TOLERANCES[x.dtype]:
                    return True
        except MODEL_ERRORS as error:
            if is_killed(error):
                raise
            return True
        return False

    def _computing(self, index: int) -> Callable:
        """A function that calls another one with a block's arrays bound, and evaluates the result.

        The arrays are requested each time, so that what is cast belongs to one graph only, which
        frees each matrix after its product.
        """
        slots = array_slots(self._blocks.blocks[index])

        def compute(function: Callable, *args: Any) -> Any:
            arrays = {k: v for source in self._weights for k, v in source.block(index).items()}
            with bind_arrays(slots, arrays):
                made = function(*args)
            del arrays
            mx.eval(made)
            return made

        return compute


def _seen(
    x: mx.array, parts: BlockParts, span: TokenSpan, key_values: Sequence[mx.array]
) -> tuple[mx.array, TokenSpan, list[mx.array]]:
    """The tokens of a span, the span of keys that they see, and these keys and values."""
    seen = parts.visible_keys(span, x.shape[1])
    some = [array[:, :, seen.start : seen.stop] for array in key_values]
    return x[:, span.start : span.stop], seen, some


def _tile(
    x: mx.array, parts: BlockParts, span: TokenSpan, key_values: Sequence[mx.array]
) -> list[mx.array]:
    mine, seen, some = _seen(x, parts, span, key_values)
    return parts.outputs(mine, span, seen, some)


def _key_values(x: mx.array, parts: BlockParts) -> list[mx.array]:
    """Keys and values of all tokens, computed by tiles."""
    pairs = [parts.key_values(x[:, span.start : span.stop], span) for span in TRIAL_SPANS]
    return [mx.concatenate(both, axis=2) for both in zip(*pairs, strict=True)]


def difference(got: mx.array, expected: mx.array, before: mx.array) -> float:
    """The largest difference of a token, over the norm of what the block adds to it.

    A large input may round the contribution; twice that rounding is allowed. The result is NaN if
    the block contributes nothing, because then nothing can be compared.
    """
    dtype = expected.dtype
    got, expected, before = (value.astype(mx.float32) for value in (got, expected, before))
    off, added, size = (
        mx.linalg.norm(value, axis=-1) for value in (got - expected, expected - before, before)
    )
    rounding = 2 * mx.finfo(dtype).eps / TOLERANCES[dtype] * size
    return mx.where(added > 0, off / (added + rounding), mx.nan).max().item()


def _depends_on_length(x: mx.array, parts: BlockParts) -> bool:
    """Whether the control flow of a block depends on the position of its tokens.

    For example, rotary frequencies may change after some length. A trial on a few tokens would not
    show it, and a tile does not know the length of the text.
    """

    def part(offset: mx.array) -> list[mx.array]:
        if isinstance(parts, RecurrentParts):
            return parts.placed(x[:, :3], offset)
        return parts.key_values(x[:, :3], TokenSpan(0, 3), offset)

    return depends_on_values(part, [mx.array(3)])


def has_active_dropout(module: nn.Module) -> bool:
    """Whether a module contains a dropout layer that is active."""
    return any(
        isinstance(layer, nn.Dropout) and layer.training and layer._p_1 < 1
        for layer in module.modules()
    )


def block_calls(blocks: BlockList) -> list[tuple]:
    """The arguments of each block on the tokens of the trial; nothing is computed."""
    calls: list[tuple] = []

    def record(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        calls.append(
            (mx.random.normal(x.shape, key=mx.random.key(index)).astype(x.dtype), args, kwargs)
        )
        return x

    with blocks.intercept(record), banded_masks(), without_dropout(blocks.model):
        blocks.model(mx.zeros(TRIAL_SHAPE, mx.int32))
    return calls


def _trials(parts: Parts, x: mx.array) -> Iterator[tuple[mx.array, Parts]]:
    """The call with scaled inputs, also with a window, because long texts may have one."""
    if reason := parts.untileable_reason(TRIAL_SHAPE[1]):
        raise ValueError(reason)
    mask = parts.mask
    masks, window = [mask], simplest_mask(range(TRIAL_SHAPE[1]), TRIAL_SHAPE[1], TRIAL_WINDOW)
    if band_of(mask) is not None:
        masks.append(window)
    scaled = mx.array(TRIAL_SCALES, x.dtype)[:, None, None] * x
    for mask in masks:
        yield scaled, parts.with_mask(mask)


def _mask_is_computed(x: mx.array, parts: BlockParts, block: nn.Module) -> bool:
    """Whether a gradient passes through the mask that a block passes to attention.

    A tile would then compute the mask from some tokens instead of all.
    """
    reached: list[bool] = []
    watch = gradient_hook(lambda: reached.append(True))
    trained = dict(tree_flatten(block.trainable_parameters()))
    slots = array_slots(block)

    def constants(x: mx.array, *values: mx.array) -> list[mx.array]:
        seen = {name: watch(value) for name, value in zip(trained, values, strict=True)}
        with bind_arrays(slots, seen):
            inputs = parts.attention_inputs(watch(x), TokenSpan(0, x.shape[1]))
        return [inputs.mask.astype(mx.float32).sum() if is_floating(inputs.mask) else mx.array(0.0)]

    # Only the graph is built: nothing is computed, no weights are read.
    every = list(range(1 + len(trained)))
    mx.grad(lambda *arrays: sum(constants(*arrays)), argnums=every)(x, *trained.values())
    return bool(reached)
