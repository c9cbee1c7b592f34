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
gradients of the adapters. A step's backward requests every group twice: y is needed for the
gradient of what it is multiplied by.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

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


class _Rows:
    """The rows of an array, read and written in its memory."""

    def __init__(self, array: mx.array) -> None:
        mx.eval(array)
        self.dtype = array.dtype
        self._view = _view(array)

    def take(self, rows: np.ndarray | int) -> mx.array:
        """A copy of some rows, or of one, that is no part of any graph."""
        found = mx.array(self._view[rows])
        return found.view(mx.bfloat16) if self.dtype == mx.bfloat16 else found

    def put(self, rows: np.ndarray, values: mx.array) -> None:
        self._view[rows] = _view(values)

    def add(self, rows: np.ndarray | int, values: mx.array) -> None:
        """Add to float32 rows; the same row may be there twice."""
        if np.size(rows) == np.unique(rows).size:
            self._view[rows] += _view(values)
        else:
            np.add.at(self._view, rows, _view(values))


def _view(array: mx.array) -> np.ndarray:
    """The memory of an array; bfloat16 as uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


class _Visit:
    """One pass over the experts that the tokens pick."""

    def __init__(self, indices: mx.array, adapters: Arrays, experts: Experts) -> None:
        mx.eval(indices)
        picked = np.array(indices)
        self.shape, self.experts = picked.shape, experts
        self._adapters = {name: _Rows(array) for name, array in adapters.items()}
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
    visit = _Visit(indices, adapters, experts)
    rows, (tokens, k) = _Rows(x), visit.shape
    out, into = None, None
    for _, picks, frozen, own in visit:
        piece = experts.function(rows.take(picks // k), frozen | own).astype(x.dtype)
        mx.eval(piece)
        if out is None:
            out = mx.zeros((tokens * k, piece.shape[-1]), x.dtype)
            into = _Rows(out)
        into.put(picks, piece)
        del piece, frozen, own
    return out.reshape(tokens, k, -1)


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
    visit = _Visit(indices, adapters, experts)
    rows, k = _Rows(x), visit.shape[1]
    given = _Rows(cotangent.reshape(-1, cotangent.shape[-1]))
    dx, into = mx.zeros(x.shape), {name: _Rows(total) for name, total in sums.items()}
    dx_rows, names = _Rows(dx), list(adapters)
    for expert, picks, frozen, own in visit:

        def function(x: mx.array, *values: mx.array, frozen: Arrays = frozen) -> list[mx.array]:
            arrays = frozen | dict(zip(names, values, strict=True))
            return [experts.function(x, arrays).astype(x.dtype)]

        tokens = picks // k
        inputs = [rows.take(tokens), *own.values()]
        # The outputs are not kept: they hold what was computed for the gradient.
        found = mx.vjp(function, inputs, [given.take(picks).astype(x.dtype)])[1]
        found = [array.astype(mx.float32) for array in found]
        mx.eval(found)
        dx_rows.add(tokens, found[0])
        for name, gradient in zip(names, found[1:], strict=True):
            into[name].add(expert, gradient)
        del found, inputs, function, frozen, own
    dx = dx.astype(x.dtype)
    mx.eval(dx)
    return dx
