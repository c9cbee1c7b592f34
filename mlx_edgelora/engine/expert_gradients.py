"""The experts of a block for the tokens of all its tiles at once, each read and unpacked once.

    x, picks = block up to its experts, tile by tile     # x and y are rows in the store
    y = experts(x)                                       # expert by expert, for all tiles
    out = block with y in place of its experts, tile by tile

and backward, where most blocks are affine in y, so that dy does not depend on it:

    x, picks, dy = block and (block after its experts)', tile by tile
    y, dx = experts(x), experts'(x; dy)                  # expert by expert, not traced
    block' with y as an input, x and dx as an output, tile by tile

In other blocks, such as those with a norm after the experts, y is computed before dy, so that each
expert is read twice. What comes before the experts is computed twice in the forward and, where dy
depends on y, three times in the backward, in place of once; it is differentiated once. Files, for
n tokens of which each picks k experts: n (k + 3) rows of the width of the block at most.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager

import mlx.core as mx
import numpy as np

from mlx_edgelora.blocks.experts import EXPERTS, ExpertCall
from mlx_edgelora.blocks.tracing import gradient_hook
from mlx_edgelora.engine.hidden import Slots
from mlx_edgelora.engine.rows import HeldRows, StoredRows
from mlx_edgelora.layers.experts import run_backward, run_forward

Function = Callable[..., list[mx.array]]
Arrays = list[mx.array]
# Exponents of ten of the values with which a block is tried: some are beyond any bend.
MAGNITUDES = (-2, 3)


class ExpertTiles:
    """One visit of the experts of a block. Memory: that of a group of experts, and one tile.

    First every tile is begun, then the experts are computed, then every tile is finished.

    Args:
        slots: where rows are kept; None keeps them in memory.
        affine: what was found out about kinds of blocks, by `key`; it is added to.
        key: equal for blocks that are the same function.
    """

    def __init__(
        self,
        slots: Slots | None = None,
        affine: dict[Hashable, bool] | None = None,
        key: Hashable = None,
    ) -> None:
        self._slots, self._affine, self._key = slots, {} if affine is None else affine, key
        self._call: ExpertCall | None = None
        self._numbers: dict[int, int] = {}  # of the rows of a tile
        self._picked: list[np.ndarray] = []
        self._x = self._y = self._dy = self._dx = None

    def __contains__(self, tile: int) -> bool:
        return tile in self._numbers

    def begin(self, tile: int, function: Callable[[], object]) -> bool:
        """Begin the forward of a tile; whether `function`, a part of the block, calls experts."""
        call = EXPERTS.first(function)
        if call is not None:
            self._append(tile, call)
        return call is not None

    @contextmanager
    def beginning(self, tile: int) -> Iterator[None]:
        """Begin the forward of a tile by a call whose other results do not depend on experts."""
        with _given(None) as calls:
            yield
        for call in calls:
            self._append(tile, call)

    def compute(self) -> None:
        """Compute the experts of all tiles."""
        if self._call is not None:
            self._y = self._new_y()
            call, picked = self._call, np.concatenate(self._picked)
            run_forward(self._x, picked, call.adapters, call.experts, lambda width: self._y)

    def begin_gradient(
        self, tile: int, function: Function, primals: Arrays, cotangents: Arrays
    ) -> bool:
        """Begin the backward of a tile; see `begin`.

        Args:
            tile: its number.
            function: the part of the block for the tile.
            primals: its inputs.
            cotangents: gradients of its outputs.
        """
        call = EXPERTS.first(lambda: function(*primals))
        if call is None:
            return False
        if self._key not in self._affine:
            self._affine[self._key] = _is_affine(function, primals, call)
        if not self._affine[self._key]:
            self._append(tile, call)
            return True
        dy, call = _gradient_after(function, primals, cotangents, _zeros(call))
        self._append(tile, call)
        self._dy = self._dy or self._rows(call.width, dy.dtype)
        self._dy.append(dy.reshape(-1, call.width))
        return True

    @property
    def needs_values(self) -> bool:
        """Whether `compute` and `add_gradient` must come before `differentiate`."""
        return self._call is not None and self._dy is None

    def add_gradient(
        self, tile: int, function: Function, primals: Arrays, cotangents: Arrays
    ) -> None:
        """Add what could not be computed by `begin_gradient`; tiles in the same order."""
        if tile in self:
            self._dy = self._dy or self._rows(self._call.width, self._y.dtype)
            y = self._shaped(self._numbers[tile])
            dy = _gradient_after(function, primals, cotangents, y)[0]
            self._dy.append(dy.reshape(-1, self._call.width))

    def differentiate(self, sums: dict[int, mx.array]) -> None:
        """Compute the experts of all tiles and their gradients.

        Args:
            sums: evaluated float32 arrays by the `id` of an expert's adapter, to which gradients
                are added in place.
        """
        if (call := self._call) is None:
            return
        self._dx = self._rows(call.x.shape[-1], mx.float32)
        for picked in self._picked:
            self._dx.extend(picked.shape[0])
        made = None
        if self._y is None:
            made = self._y = self._dy
            if self._slots is None:  # the memory of its arrays may be that of others
                made = self._y = self._new_y()
        own = {name: sums[id(array)] for name, array in call.adapters.items()}
        arguments = self._x, np.concatenate(self._picked), self._dy, call.adapters, call.experts
        run_backward(*arguments, own, self._dx, made)
        self._forget(self._x, None if self._dy is self._y else self._dy)
        self._x = self._dy = None

    @contextmanager
    def given(self, tile: int) -> Iterator[None]:
        """Let the experts of a tile return what was computed: zeros if it was not begun."""
        with _given(self._shaped(self._numbers[tile]) if tile in self else None):
            yield

    def vjp(
        self, tile: int, function: Function, primals: Arrays, cotangents: Arrays
    ) -> tuple[Arrays, Arrays]:
        """As `mx.vjp`, for the part of the block with which a tile was begun.

        Args:
            tile: its number.
            function: as in `begin_gradient`; it may give more, which does not depend on experts.
                If the tile was not begun, nothing may depend on them.
            primals: its inputs, without the adapters of experts.
            cotangents: gradients of its outputs.
        """
        if tile not in self:
            with self.given(tile):
                return mx.vjp(function, primals, cotangents)
        y = self._shaped(self._numbers[tile])
        dx = self._dx.tile(self._numbers[tile]).astype(y.dtype)

        def both(*primals: mx.array) -> Arrays:
            with _given(y) as calls:
                return [*function(*primals), *(call.x for call in calls)]

        outputs, gradients = mx.vjp(both, primals, [*cotangents, dx])
        return outputs[: len(cotangents)], gradients

    def forget(self) -> None:
        """Release all rows."""
        self._forget(self._x, self._y, self._dx)
        self._x = self._y = self._dx = None

    def _forget(self, *every: HeldRows | None) -> None:
        for rows in every:
            if rows is not None:
                rows.forget()

    def _append(self, tile: int, call: ExpertCall) -> None:
        """Keep what the experts of a tile are given."""
        mx.eval(call.x, call.indices)
        self._numbers[tile] = len(self._picked)
        self._picked.append(np.array(call.indices))
        # Without the arrays of the tile, which are in the rows.
        empty = mx.zeros((0, call.x.shape[1]), call.x.dtype)
        self._call = self._call or call._replace(x=empty, indices=None)
        self._x = self._x or self._rows(call.x.shape[-1], call.x.dtype)
        self._x.append(call.x)

    def _rows(self, width: int, dtype: mx.Dtype) -> HeldRows:
        if self._slots is None:
            return HeldRows(width, dtype)
        return StoredRows(width, dtype, self._slots)

    def _new_y(self) -> HeldRows:
        """Rows for what the experts of all tiles give."""
        made = self._rows(self._call.width, self._call.x.dtype)
        for picked in self._picked:
            made.extend(picked.size, clear=False)
        return made

    def _shaped(self, number: int) -> mx.array:
        """What the experts of a tile give, [n, k, width]."""
        return self._y.tile(number).reshape(*self._picked[number].shape, -1)


def vjp_by_experts(
    function: Function,
    primals: Arrays,
    cotangents: Arrays,
    sums: dict[int, mx.array],
    affine: dict[Hashable, bool] | None = None,
    key: Hashable = None,
) -> tuple[Arrays, Arrays]:
    """As `mx.vjp`, for a part of a block that calls one layer of experts, or none.

    Args:
        function: called several times.
        primals: without the adapters of experts.
        cotangents: gradients of the outputs.
        sums: see `ExpertTiles.differentiate`.
        affine, key: as for `ExpertTiles`.

    Raises:
        RuntimeError: experts are called more than once.
    """
    experts = ExpertTiles(None, affine, key)
    if not experts.begin_gradient(0, function, primals, cotangents):
        return mx.vjp(function, primals, cotangents)
    if experts.needs_values:
        experts.compute()
        experts.add_gradient(0, function, primals, cotangents)
    experts.differentiate(sums)
    return experts.vjp(0, function, primals, cotangents)


def reads_experts(function: Callable[[], Arrays]) -> bool:
    """Whether what a part of a block gives depends on its experts; nothing is computed."""
    if (call := EXPERTS.first(function)) is None:
        return False
    reached: list[bool] = []
    watch = gradient_hook(lambda: reached.append(True))

    def given(y: mx.array) -> Arrays:
        with _given(watch(y)):
            return function()

    mx.vjp(given, [_zeros(call)], [mx.zeros_like(array) for array in given(_zeros(call))])
    return bool(reached)


def _zeros(call: ExpertCall) -> mx.array:
    """Zeros in place of what experts give."""
    return mx.zeros((*call.indices.shape, call.width), call.x.dtype)


def _gradient_after(
    function: Function, primals: Arrays, cotangents: Arrays, y: mx.array
) -> tuple[mx.array, ExpertCall]:
    """The gradient of what experts give, at `y`, and their call, all evaluated."""
    found: list[ExpertCall] = []

    def after(y: mx.array) -> Arrays:
        with _given(y) as calls:
            outputs = function(*primals)
        found.extend(calls)
        return outputs

    # The outputs are not kept: they hold what was computed for the gradient.
    (dy,) = mx.vjp(after, [y], cotangents)[1]
    mx.eval(dy, found[0].x, found[0].indices)
    return dy, found[0]


def _is_affine(function: Function, primals: Arrays, call: ExpertCall) -> bool:
    """Whether the gradient of what experts give does not depend on what they give."""
    keys = mx.random.split(mx.random.key(0), 2)
    y = _zeros(call)
    lowest, highest = MAGNITUDES
    sizes = 10 ** mx.random.uniform(lowest, highest, y.shape, key=keys[0])
    large = (mx.random.normal(y.shape, key=keys[1]) * sizes).astype(y.dtype)
    with _given(y):
        outputs = function(*primals)
    keys = mx.random.split(keys[0], len(outputs))
    cotangents = [
        mx.random.normal(one.shape, key=key).astype(one.dtype)
        for one, key in zip(outputs, keys, strict=True)
    ]
    del outputs
    one, other = (_gradient_after(function, primals, cotangents, at)[0] for at in (y, large))
    return mx.array_equal(one, other).item()


def _given(y: mx.array | None) -> AbstractContextManager[list[ExpertCall]]:
    """Let experts return `y`, or zeros; its value is a list that gets their call."""
    return EXPERTS.given(lambda call: _zeros(call) if y is None else y)
