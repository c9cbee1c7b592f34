"""A gated MLP whose matrices are read by rows: none of them is in memory whole.

`y = down(act(gate(x), up(x)))` as in `layers/mlp.py`, for the n tokens of one tile, of which all
intermediate features fit into memory. Rows of G and U are features of h, rows of D are features
of y:

    h = act(x G^T, x U^T),   y = h D^T

and in the backward, which keeps nothing of the forward but x,

    dh = dy D,   (dg, du) = act'(dh),   dx = dg G + du U

where dh is a sum over the rows of D, dx one over those of G and U, both in float32. So each matrix
is read once a visit, in the order in which it is stored.

Each piece is evaluated and dropped before the next one, so none of this may be traced. Memory in
addition to x, dy and the output: h, or dh and dx in float32, and `tile_bytes` of unpacked rows,
once or twice with what they are made of. Time: that of `gated_mlp`, and of reading the matrices for
every tile, while the piece before is used.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_edgelora.layers.mlp import (
    Activation,
    Chunk,
    Projection,
    Slices,
    add_product,
    gradients_of,
    slice_features,
    spans_of_features,
)
from mlx_edgelora.layers.tile_order import Span

Arrays = dict[str, mx.array]


class RowMlp(NamedTuple):
    """A gated MLP that is read by rows.

    Attributes:
        projections: gate and up, in whichever order `activation` has, and down. Their matrices
            are asked for shapes and dtypes only.
        names: their names; "name.lora_a" and "name.lora_b" are those of its adapter.
        activation: entry by entry.
        start: begins to read rows of a projection's matrix, by its number; returns a function
            that waits for them and returns the projection with these rows.
        tile_bytes: bound on the rows that are unpacked at a time, and their activations.
    """

    projections: tuple[Projection, Projection, Projection]
    names: tuple[str, str, str]
    activation: Activation
    start: Callable[[int, Span], Callable[[], Projection]]
    tile_bytes: int

    def read(self, numbers: Sequence[int], spans: list[Span]) -> Iterator[tuple[Span, list]]:
        """Rows of some matrices, a span after the other; the next one is read meanwhile."""
        coming = [self.start(number, spans[0]) for number in numbers]
        for place, span in enumerate(spans):
            pieces = [wait() for wait in coming]
            after = spans[place + 1 : place + 2]
            coming = [self.start(number, *after) for number in numbers if after]
            yield span, pieces
            del pieces


class _Rows(Slices):
    """The pieces of one call."""

    def __init__(self, x: mx.array, mlp: RowMlp) -> None:
        *inputs, down = mlp.projections
        super().__init__(x, *inputs, down, mlp.activation, mlp.tile_bytes)
        tokens, (outputs, features) = x.shape[0], (down.out_dims, down.in_dims)
        step = slice_features(mlp.tile_bytes, 2 * x.shape[1], tokens, features, 1)
        self.features = spans_of_features(features, step)
        step = slice_features(mlp.tile_bytes, features, tokens, outputs, 1)
        self.outputs = spans_of_features(outputs, step)

    def dense(self, pieces: list[Projection]) -> list[mx.array]:
        """The rows that were read, unpacked."""
        return [self.piece(piece, (None, None), []) for piece in pieces]


def visit_forward(x: mx.array, mlp: RowMlp) -> mx.array:
    """The output [n, out] of x [n, d], evaluated."""
    s, down = _Rows(x, mlp), mlp.projections[2]
    loras = [s.lora(p) for p in mlp.projections]
    zs = [None if lora is None else x @ lora[0] for lora in loras[:2]]
    h = mx.zeros((x.shape[0], down.in_dims), x.dtype)
    for span, rows in mlp.read((0, 1), s.features):
        parts = [
            s.output(p, span, s.product(p, span, x, weight, z))
            for p, weight, z in zip(s.inputs, s.dense(rows), zs, strict=True)
        ]
        h[:, slice(*span)] = s.activation(*parts)
        del parts, rows
        mx.eval(h)
    z = None if loras[2] is None else h @ loras[2][0]
    y = mx.zeros((x.shape[0], down.out_dims), x.dtype)
    for span, rows in mlp.read((2,), s.outputs):
        piece = h @ s.dense(rows)[0].T
        if z is not None:
            piece = piece + z @ loras[2][1][:, slice(*span)]
        if down.bias is not None:
            piece = piece + down.bias[slice(*span)].astype(x.dtype)
        y[:, slice(*span)] = piece
        del piece, rows
        mx.eval(y)
    return y


def visit_backward(x: mx.array, dy: mx.array, mlp: RowMlp, sums: Arrays) -> mx.array:
    """The gradient of x, evaluated.

    Args:
        x: input [n, d].
        dy: gradient [n, out] of the output.
        mlp: see `RowMlp`.
        sums: evaluated float32 arrays by the names of the adapters, to which their gradients are
            added in place.
    """
    s = _Rows(x, mlp)
    part = Chunk(s, x, dy.astype(x.dtype))
    for span, rows in mlp.read((2,), s.outputs):
        part.dh = add_product(part.dh, part.dy[:, slice(*span)], s.dense(rows)[0])
        del rows
        mx.eval(part.dh)
    pieces: list[list[mx.array]] = [[], [], [], [], []]
    for span, rows in mlp.read((0, 1), s.features):
        found = part.advance(span, [*s.dense(rows), None], [None] * len(pieces), [])
        del rows
        mx.eval([a for a in found if a is not None], part.arrays())
        for piece, more in zip(pieces, found, strict=True):
            piece.append(more)
    part.dh = None
    dx, gradients = part.input_gradient(), gradients_of([part], pieces)
    mx.eval(dx, gradients)
    for name, own in zip(mlp.names, gradients, strict=True):
        for key, gradient in own.items():
            total = np.array(sums[f"{name}.{key}"], copy=False)
            total += np.array(gradient.astype(mx.float32))
    return dx


def compute_by_rows(x: mx.array, adapters: Arrays, mlp: RowMlp) -> mx.array:
    """The output [n, out] of x [n, d], evaluated; differentiable in `x` and `adapters`.

    Args:
        x: floating.
        adapters: by the names of the adapters.
        mlp: see `RowMlp`; its projections have these adapters.
    """

    @mx.custom_function
    def call(x: mx.array, *_: mx.array) -> mx.array:
        return visit_forward(x, mlp)

    @call.vjp
    def backward(
        primals: tuple[mx.array, ...] | mx.array, cotangent: mx.array, _: mx.array
    ) -> list[mx.array]:
        x = primals if isinstance(primals, mx.array) else primals[0]
        sums = {name: mx.zeros(array.shape) for name, array in adapters.items()}
        mx.eval(sums)
        dx = visit_backward(x, cotangent, mlp, sums)
        if not sums:
            return dx
        return [dx, *(sums[name].astype(array.dtype) for name, array in adapters.items())]

    return call(x, *adapters.values())
