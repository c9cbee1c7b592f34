"""The last block for labelled tokens only: what it returns for the others nobody reads.

Keys and values are needed of every token, queries, attention output and MLP of the
labelled ones alone. No architecture is named: mlx-lm's blocks know how to go on from a
cache of keys and values, and this is all that is used. The block is called twice. First
with all tokens and a cache that takes their keys and values and ends the call; what else
was begun is never computed. Then with each labelled token as a batch of one, at its own
position, and a cache that holds those keys and values; attention is exchanged for one that
brings each such token together with the keys of its own row of the batch.

Cost of n labelled of B x T tokens: all of a block but the products for keys and values and
what lies before them shrinks by n / (B T). Where queries, keys and values come of one
matrix, that product is made for B T + n rows. Largest array: on devices without a fused
gradient of attention its scores, [H, n, T] in place of [B, H, T, T].

Not optimal yet: labels of one row that are not one run, or under a window, are an array
mask to MLX, with which it has no fused gradient of attention on Metal: they go in tiles.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_edgelora.model.attention import Attention, attention_replaced, masks_known
from mlx_edgelora.model.blocks import BlockList
from mlx_edgelora.model.masks import banded
from mlx_edgelora.model.parts import FullCache, Picked, given_to_cache, keys_seen, mask_at
from mlx_edgelora.model.sources import WeightSource
from mlx_edgelora.model.trial import Compute, trial_of
from mlx_edgelora.model.walkable import MODEL_ERRORS

# What the trial is made of. In its first row labels are scattered and begin at 0, in the
# second they are one run up to the end: attention has a way of its own for each.
TRIAL_SHAPE = (2, 7)
TRIAL_ROWS = (0, 3, 5, 11, 12, 13)
TRIAL_WINDOW = 3
# Its inputs. Small ones, so that what the block adds outweighs what it passes through; and
# larger ones, for a block without a norm before attention: its scores are the same for all
# tokens where inputs are small, whatever their positions.
TRIAL_SCALES = (0.01, 1.0)
# Rows may differ by so much of their norm. Rounding stays below it (TF32 makes 1e-3 of
# float32); a token at a wrong position or under a wrong mask is off by a tenth and more.
TOLERANCES = {mx.float32: 5e-3, mx.float16: 2e-2, mx.bfloat16: 5e-2}


class Choice(NamedTuple):
    """Whether the last block is computed for labelled tokens only, and why."""

    spared: bool
    reason: str

    def __str__(self) -> str:
        return f"{'labelled tokens only' if self.spared else 'every token'} ({self.reason})"


class LastBlock:
    """The last block of a model, whole or for some tokens.

    Args:
        blocks: the model's blocks; they passed `check_walk`.
        weights: where the block's frozen weights come from; read for the trial.
        like: of another list of blocks: if it ends in the same block, its trial is this one's.
    """

    def __init__(
        self, blocks: BlockList, weights: WeightSource, like: "LastBlock | None" = None
    ) -> None:
        self._blocks, self._weights = blocks, weights
        self._trial: Choice | None = None
        if like is not None and like._blocks.blocks[-1] is blocks.blocks[-1]:
            self._trial = like._trial

    def choice(self) -> Choice:
        """Whether tokens without a label can be spared now; not inside an intercepted call.

        The first call makes a trial: it reads the block and runs it on 14 tokens.
        """
        if self._trial is None:
            reason = _refusal(self._blocks, self._weights)
            self._trial = Choice(reason is None, reason or "a trial gave the same")
        # Asked anew: it goes on and off with the model's training mode.
        if self._trial.spared and _drops(self._blocks.blocks[-1]):
            return Choice(False, "dropout would draw other masks for fewer tokens")
        return self._trial

    def function(self, rows: mx.array) -> Callable[..., mx.array]:
        """The block as a function of what it is called with; see `labelled_rows`."""
        return partial(labelled_rows, self._blocks.blocks[-1], rows)


def labelled_rows(
    block: nn.Module, rows: mx.array, x: mx.array, *args: Any, **kwargs: Any
) -> mx.array:
    """Call a block that can be spared (see `LastBlock.choice`) for some tokens only.

    Args:
        block: its weights are bound.
        rows: int [n], ascending: which of the B * T tokens; evaluated here, because how
            many fall to each row of the batch shapes the graph.
        x: [B, T, D].
        args, kwargs: what else the model calls the block with.

    Returns:
        [1, n, D]: the rows of `block(x, ...)`, up to rounding; differentiable in `x` and
        in what is bound.

    Raises:
        ValueError: rows are not what they should be.
    """
    batch, tokens, width = x.shape
    indices = checked_rows(rows, batch * tokens)
    call = inspect.signature(block.__call__).bind(x, *args, **kwargs)
    keys, values = given_to_cache(partial(_called_with, block, call))
    positions = indices % tokens
    rowwise = _RowwiseAttention(indices // tokens, positions, tokens)
    cache = FullCache(mx.array(positions.astype(np.int32)), keys, values)
    for name, value in list(call.arguments.items())[1:]:
        # Something said about each token, such as a scale of its queries.
        if name != "mask" and isinstance(value, mx.array):
            call.arguments[name] = value[mx.array(positions)][:, None, None]
    call.arguments[next(iter(call.arguments))] = x.reshape(-1, width)[rows][:, None]
    call.arguments["cache"] = cache
    with attention_replaced(rowwise):
        out = block(*call.args, **call.kwargs)
    if (rowwise.calls, cache.calls) != (1, 1):
        raise RuntimeError(
            f"attention was called {rowwise.calls} times and its cache {cache.calls} times, "
            "expected once each"
        )
    return out.reshape(1, indices.size, width)


def take_rows(whole: mx.array, rows: mx.array) -> mx.array:
    """The rows of [B, T, D] as [1, n, D]; no copy where they are all of them.

    Raises:
        ValueError: rows are not what they should be.
    """
    flat = whole.reshape(1, -1, whole.shape[-1])
    count = flat.shape[1]
    return flat if checked_rows(rows, count).size == count else flat[:, rows]


def put_rows(part: mx.array, rows: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The gradient of `take_rows`: [1, n, D] put into zeros of shape [B, T, D]."""
    if part.size == np.prod(shape):
        return part.reshape(shape)
    whole = mx.zeros((shape[0] * shape[1], shape[2]), part.dtype)
    whole[rows] = part[0]
    return whole.reshape(shape)


def checked_rows(rows: mx.array, count: int) -> np.ndarray:
    """Evaluate row indices and see that they are ascending ones of `count` rows.

    Raises:
        ValueError: none, no whole numbers, too large, negative, or not ascending.
    """
    indices = np.asarray(rows)
    bounds = np.concatenate([[-1], indices.reshape(-1), [count]])
    whole = np.issubdtype(indices.dtype, np.integer)
    if indices.ndim != 1 or not indices.size or not whole or (np.diff(bounds) < 1).any():
        raise ValueError(
            f"rows: got {indices.tolist()}, expected one or more indices of {count} tokens, "
            "each once and in ascending order"
        )
    return indices


def _called_with(block: nn.Module, call: inspect.BoundArguments, cache: object) -> mx.array:
    call.arguments["cache"] = cache
    return block(*call.args, **call.kwargs)


class _RowwiseAttention:
    """Attention of n single tokens over the keys and values of the rows they come from.

    Args:
        batch: int [n], ascending: each token's row of the batch.
        positions: int [n]: its place there.
        tokens: how many there are in a row of the batch.
    """

    def __init__(self, batch: np.ndarray, positions: np.ndarray, tokens: int) -> None:
        self._spans = [
            (row, *np.searchsorted(batch, [row, row + 1]).tolist())
            for row in np.unique(batch).tolist()
        ]
        self._positions, self._tokens, self.calls = positions, tokens, 0

    def __call__(
        self,
        original: Attention,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: FullCache,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Map queries [n, H, 1, D], keys and values [B, Hkv, T, D] to [n, H, 1, D]."""
        self.calls += 1
        if queries.shape[0] != self._positions.size or queries.shape[2] != 1:
            raise ValueError(f"queries of {self._positions.size} single tokens are {queries.shape}")
        if keys.shape[2] != self._tokens:
            raise ValueError(f"keys of {self._tokens} tokens are {keys.shape}")
        pieces = []
        for row, start, stop in self._spans:
            place = Picked(row, self._positions[start:stop])
            span = keys_seen(mask, place, self._tokens)
            piece = original(
                queries[start:stop].transpose(2, 1, 0, 3),
                keys[row : row + 1, :, span.start : span.stop],
                values[row : row + 1, :, span.start : span.stop],
                cache=None,  # for whoever else looks at it, this is a call without one
                scale=scale,
                mask=mask_at(mask, place, span)[1],
                sinks=sinks,
            )
            pieces.append(piece.transpose(2, 1, 0, 3))
        return mx.concatenate(pieces)


def _refusal(blocks: BlockList, weights: WeightSource) -> str | None:
    """Why the last block cannot be spared: what it takes, and a trial against the plain call."""
    block = blocks.blocks[-1]
    names = inspect.signature(block.__call__).parameters
    if missing := [name for name in ("mask", "cache") if name not in names]:
        return f"the last block takes no {missing[0]}"
    with without_dropout(blocks.model):
        call = _last_call(blocks)
        if reason := _unsuited(call):
            return reason
        compute = trial_of(block, weights, len(blocks) - 1)
        try:
            # All of them: `max` would pass over NaN.
            differences = [_difference(block, trial, compute) for trial in _trials(call)]
        except MODEL_ERRORS as error:
            return f"the last block cannot be called for single tokens: {error}"
    tolerance = TOLERANCES[call.args[0].dtype]
    for difference in differences:
        if not difference <= tolerance:  # NaN is no agreement
            return (
                f"the last block's output for single tokens differs by {difference:.1e} of its norm"
            )
    return None


def _last_call(blocks: BlockList) -> inspect.BoundArguments:
    """What the model calls its last block with; as input random numbers of deviation 1."""
    calls: list[tuple] = []

    def record(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        calls.append((x, args, kwargs))
        return x

    with blocks.intercepted(record), masks_known():
        blocks.model(mx.zeros(TRIAL_SHAPE, mx.int32))
    x, args, kwargs = calls[-1]
    x = mx.random.normal(x.shape, key=mx.random.key(0)).astype(x.dtype)
    call = inspect.signature(blocks.blocks[-1].__call__).bind(x, *args, **kwargs)
    call.apply_defaults()  # a mask that is not given
    return call


def _unsuited(call: inspect.BoundArguments) -> str | None:
    """Why arguments beside `x` and the mask cannot be cut to single tokens, if so."""
    for name, value in list(call.arguments.items())[1:]:
        if isinstance(value, mx.array) and name != "mask":
            if value.ndim != 2 or value.shape[0] != TRIAL_SHAPE[1]:
                return f"{name} of the last block is {value.shape}, not a row for each token"
        elif name != "mask" and any(isinstance(leaf, mx.array) for _, leaf in tree_flatten(value)):
            return f"{name} of the last block holds arrays"
    return None


def _trials(call: inspect.BoundArguments) -> Iterator[inspect.BoundArguments]:
    """The call for inputs of each scale; as it was recorded, and under a window.

    Longer texts may have a window for a mask where a short one has a word.
    """
    x, masks = call.args[0], [call.arguments["mask"]]
    if isinstance(masks[0], str):
        masks.append(banded(range(TRIAL_SHAPE[1]), TRIAL_SHAPE[1], TRIAL_WINDOW))
    for scale, mask in product(TRIAL_SCALES, masks):
        call.arguments |= {next(iter(call.arguments)): scale * x, "mask": mask}
        yield call


def _difference(block: nn.Module, call: inspect.BoundArguments, compute: Compute) -> float:
    """The largest difference of a row, over the norm of what the block adds to it.

    Beside a large input, what is added may be rounded away: twice that is allowed for. NaN
    where nothing is added, so that nothing can be seen.
    """
    rows = mx.array(TRIAL_ROWS)
    before = take_rows(call.args[0], rows).astype(mx.float32)
    (whole,) = compute(lambda: [block(*call.args, **call.kwargs)])
    (alone,) = compute(lambda: [labelled_rows(block, rows, *call.args, **call.kwargs)])
    expected, got = take_rows(whole, rows).astype(mx.float32), alone.astype(mx.float32)
    differences, added, inputs = (
        mx.linalg.norm(value, axis=-1) for value in (got - expected, expected - before, before)
    )
    dtype = call.args[0].dtype
    rounding = 2 * mx.finfo(dtype).eps / TOLERANCES[dtype] * inputs
    return mx.where(added > 0, differences / (added + rounding), mx.nan).max().item()


def _drops(model: nn.Module) -> list[nn.Dropout]:
    """The layers of dropout that are at work."""
    found = {id(m): m for m in model.modules() if isinstance(m, nn.Dropout)}.values()
    return [layer for layer in found if layer.training and layer._p_1 < 1]


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """For a trial: dropout would move MLX's generator, and is asked about apart."""
    layers = _drops(model)
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()
