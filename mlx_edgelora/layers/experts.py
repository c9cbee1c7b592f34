"""A layer of experts, one expert after the other: only what one of them needs is in memory.

Each token picks k of E experts. For one expert e after the other, forward and backward,

    y[picks of e] = f_e(x[tokens of e]),    dx[tokens of e] += f_e'(x; dy[picks of e])

where f_e is a function of an expert's own arrays, differentiated by MLX. Frozen arrays are
requested for a group of experts at a time, perhaps while the group before is used, and dropped
after it, so they may come from a file; experts that no token picks are never requested. Exact:
sums over the picks of a token are float32.

Which rows belong to an expert depends on values, so all this is evaluated at once, and arrays go in
and out through views of their memory. Evaluated while MLX traces a gradient, an expert's arrays are
freed only when it is done, and those before it not at all (`engine/walk.py`): `visit_forward` and
`visit_backward` are for a walk that is not traced.

Memory in addition to x [n, d], the output and its gradient [n, k, out]: the arrays of a group, or
of two, what `f_e` needs for at most `TOKENS` rows, in the backward [n, d] in float32, and the
gradients of the adapters. Rows may be in a file instead (`engine/rows.py`). `run_backward` gives y
as well as the gradients, from the same arrays, because y is needed for the gradient of what it is
multiplied by.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

Arrays = dict[str, mx.array]
# Rows of one expert that are computed at a time. Few, because how many tokens pick the same expert
# differs from batch to batch and from block to block, and a plan must know what they take.
TOKENS = 256


class Experts(NamedTuple):
    """What is the same in each call of a layer of experts.

    Attributes:
        function: maps (x [m, d], arrays of one expert by name) to [m, out].
        frozen: begins to read the frozen arrays of a list of experts; returns a function that
            waits for them and returns [len(experts), ...] by name.
        group: number of experts whose frozen arrays are requested at a time.
        ahead: whether the next group is requested before one is used, so that two are in memory.
    """

    function: Callable[[mx.array, Arrays], mx.array]
    frozen: Callable[[list[int]], Callable[[], Arrays]]
    group: int
    ahead: bool = True


def compute_experts(x: mx.array, indices: mx.array, adapters: Arrays, experts: Experts) -> mx.array:
    """Map each token through the experts that it picks.

    Args:
        x: [n, d], floating.
        indices: int [n, k], the experts of each token; gets no gradient.
        adapters: trained arrays [E, ...] by name.
        experts: see `Experts`.

    Returns:
        [n, k, out] in the dtype of `x`, evaluated; differentiable in `x` and `adapters`.
    """
    names = list(adapters)

    @mx.custom_function
    def call(x: mx.array, indices: mx.array, *arrays: mx.array) -> mx.array:
        return visit_forward(x, indices, dict(zip(names, arrays, strict=True)), experts)

    @call.vjp
    def backward(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        x, indices, *arrays = primals
        held = dict(zip(names, arrays, strict=True))
        sums = {name: mx.zeros(value.shape) for name, value in held.items()}
        mx.eval(sums)
        dx = visit_backward(x, indices, cotangent, held, experts, sums)
        return [dx, mx.zeros_like(indices), *(sums[n].astype(held[n].dtype) for n in names)]

    return call(x, indices, *adapters.values())


class Rows(Protocol):
    """Rows of a matrix that are read and written by their numbers, wherever they are kept.

    Attributes:
        dtype: of what is read and written.
    """

    dtype: mx.Dtype

    def take(self, rows: np.ndarray) -> mx.array:
        """A copy of some rows, which is no part of any graph."""

    def put(self, rows: np.ndarray, values: mx.array) -> None:
        """Overwrite some rows."""

    def add(self, rows: np.ndarray, values: mx.array) -> None:
        """Add to float32 rows; the same row may be there twice."""


class ArrayRows:
    """The rows of an evaluated array, read and written in its memory."""

    def __init__(self, array: mx.array) -> None:
        mx.eval(array)
        self.dtype = array.dtype
        self._view = view_of(array)

    def take(self, rows: np.ndarray | int) -> mx.array:
        """A copy of some rows, or of one; see `Rows`."""
        return array_of(self._view[rows], self.dtype)

    def put(self, rows: np.ndarray, values: mx.array) -> None:
        """See `Rows`."""
        self._view[rows] = view_of(values)

    def add(self, rows: np.ndarray | int, values: mx.array) -> None:
        """Add to some rows, or to one; see `Rows`."""
        add_rows(self._view, rows, view_of(values))


def add_rows(to: np.ndarray, rows: np.ndarray | int, values: np.ndarray) -> None:
    """Add to rows of a matrix; the same row may be there twice."""
    if np.size(rows) == np.unique(rows).size:
        to[rows] += values
    else:
        np.add.at(to, rows, values)


def view_of(array: mx.array) -> np.ndarray:
    """The memory of an array; bfloat16 as uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def array_of(view: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """A copy of memory as an array of a dtype; the opposite of `view_of`."""
    array = mx.array(view)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


class _Visit:
    """One pass over the experts that the tokens pick."""

    def __init__(self, picked: np.ndarray, adapters: Arrays, experts: Experts) -> None:
        self.experts = experts
        self._adapters = {name: ArrayRows(array) for name, array in adapters.items()}
        flat = picked.reshape(-1)
        # Picks in the order of their experts, and where those of each expert begin.
        self._order = np.argsort(flat, kind="stable")
        self._picked, starts = np.unique(flat[self._order], return_index=True)
        self._starts = [*starts.tolist(), flat.size]

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, Arrays, Arrays]]:
        """Each expert that is picked: itself, its picks, its frozen arrays and its adapters."""
        step = max(1, self.experts.group)
        groups = [
            self._picked[first : first + step].tolist()
            for first in range(0, self._picked.size, step)
        ]
        coming = None
        for number, group in enumerate(groups):
            wait, first = coming or self.experts.frozen(group), number * step
            arrays, coming = wait(), None
            del wait  # it may hold what it returned
            if self.experts.ahead and group is not groups[-1]:
                coming = self.experts.frozen(groups[number + 1])
            for place, expert in enumerate(group):
                frozen = {name: array[place] for name, array in arrays.items()}
                adapters = {name: rows.take(expert) for name, rows in self._adapters.items()}
                start, stop = self._starts[first + place : first + place + 2]
                for some in range(start, stop, TOKENS):
                    yield expert, self._order[some : min(stop, some + TOKENS)], frozen, adapters
            del arrays, frozen


def visit_forward(x: mx.array, indices: mx.array, adapters: Arrays, experts: Experts) -> mx.array:
    """What `compute_experts` returns, evaluated."""
    picked, made = np.array(indices), []

    def make(width: int) -> ArrayRows:
        made.append(mx.zeros((picked.size, width), x.dtype))
        return ArrayRows(made[0])

    run_forward(ArrayRows(x), picked, adapters, experts, make)
    return made[0].reshape(*picked.shape, -1)


def run_forward(
    x: Rows, picked: np.ndarray, adapters: Arrays, experts: Experts, make: Callable[[int], Rows]
) -> None:
    """Write what experts give for rows.

    Args:
        x: n rows.
        picked: int [n, k], the experts of each row.
        adapters, experts: as in `compute_experts`.
        make: called once with the width of what experts give; returns the n * k rows for it.
    """
    out, k = None, picked.shape[1]
    for _, picks, frozen, own in _Visit(picked, adapters, experts):
        piece = experts.function(x.take(picks // k), frozen | own).astype(x.dtype)
        mx.eval(piece)
        if out is None:
            out = make(piece.shape[-1])
        out.put(picks, piece)
        del piece, frozen, own


def visit_backward(
    x: mx.array,
    indices: mx.array,
    cotangent: mx.array,
    adapters: Arrays,
    experts: Experts,
    sums: Arrays,
) -> mx.array:
    """The gradient of `x`, evaluated.

    Args:
        x, indices, adapters, experts: as in `compute_experts`.
        cotangent: [n, k, out].
        sums: evaluated float32 arrays like `adapters`, to which their gradients are added in place.
    """
    dx = mx.zeros(x.shape)
    given = ArrayRows(cotangent.reshape(-1, cotangent.shape[-1]))
    run_backward(ArrayRows(x), np.array(indices), given, adapters, experts, sums, ArrayRows(dx))
    dx = dx.astype(x.dtype)
    mx.eval(dx)
    return dx


def run_backward(
    x: Rows,
    picked: np.ndarray,
    dy: Rows,
    adapters: Arrays,
    experts: Experts,
    sums: Arrays,
    dx: Rows,
    y: Rows | None = None,
) -> None:
    """Add the gradients of rows and of adapters.

    Args:
        x, picked, adapters, experts: as in `run_forward`.
        dy: n * k rows, the gradients of what experts give.
        sums: see `visit_backward`.
        dx: n float32 rows, to which gradients are added.
        y: where to write what experts give, from the same unpacked arrays; may be `dy` itself,
            each row of which is read before it is written.
    """
    into, names = {name: ArrayRows(total) for name, total in sums.items()}, list(adapters)
    k = picked.shape[1]
    for expert, picks, frozen, own in _Visit(picked, adapters, experts):

        def function(x: mx.array, *values: mx.array, frozen: Arrays = frozen) -> list[mx.array]:
            arrays = frozen | dict(zip(names, values, strict=True))
            return [experts.function(x, arrays).astype(x.dtype)]

        tokens = picks // k
        inputs = [x.take(tokens), *own.values()]
        # Outputs that nobody wants are not kept: they hold what was computed for the gradient.
        made, found = mx.vjp(function, inputs, [dy.take(picks).astype(x.dtype)])
        made = [] if y is None else made
        found = [array.astype(mx.float32) for array in found]
        mx.eval(made, found)
        if y is not None:
            y.put(picks, made[0])
        dx.add(tokens, found[0])
        for name, gradient in zip(names, found[1:], strict=True):
            into[name].add(expert, gradient)
        del made, found, inputs, function, frozen, own
