"""A gated MLP in slices of its intermediate size: forward and backward never hold one whole.

`y = down(act(gate(x), up(x)))`, each projection frozen, packed or not, with a LoRA branch or
none. For one slice f of the intermediate features after the other

    h_f = act(x G_f^T, x U_f^T),   y += h_f D_f^T

and in the backward, which keeps nothing of the forward but x,

    dh_f = dy D_f,   (dg_f, du_f) = act'(dh_f),   dx += dg_f G_f + du_f U_f

with the slice's three pieces of weights dequantized once for both. The LoRA branches go
along: what they map from x is made once, what they map to x or y is summed over slices.
Exact; sums over slices are float32 whatever the activations are.

Memory in addition to input and output, for n tokens of width d: `tile_bytes`, once or twice
because MLX allocates ahead (slices depend on one another by `mx.depends`), and in the backward one
or two arrays of n x d in float32. Without slices it would be about seven arrays of n x
intermediate. Time: one forward more than autodiff, which keeps the activations, and two
dequantizations of three matrices fewer than recomputing the layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import mlx.core as mx

from mlx_edgelora.layers.dequantize import dequantize
from mlx_edgelora.layers.linear import plus_product
from mlx_edgelora.layers.tile_order import Span, depend_on

# Three pieces of weights and what is made of 1024 tokens: at 3072 x 8192 slices of 4 to 32 MiB
# took the same time but for noise.
TILE_BYTES = 16 * 2**20
# Number of tokens for which a slice's activations are computed at a time.
TOKENS = 1024
# The graph of a slice takes some 100 KB of the process, which MLX does not count: 448 slices
# of a 70B shape took more than they saved.
MOST_SLICES = 192

# (a, b) [n, m] -> [n, m], each entry of its own two alone.
Activation = Callable[[mx.array, mx.array], mx.array]


class Packing(NamedTuple):
    """How a matrix was quantized: the arguments of `mx.quantize`."""

    group_size: int
    bits: int
    mode: str = "affine"


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer, [out, in], with its LoRA branch.

    Attributes:
        weight: [out, in] floating, or packed.
        scales, biases: of a packed weight.
        bias: [out] or None.
        lora_a, lora_b: [in, r] and [r, out], or None.
        gain: [out], multiplies the product before the bias, or None; not for `down`.
        packing: of a packed weight.
        scale: of the LoRA branch.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bias: mx.array | None = None
    lora_a: mx.array | None = None
    lora_b: mx.array | None = None
    gain: mx.array | None = None
    packing: Packing | None = None
    scale: float = 0.0

    @property
    def out_dims(self) -> int:
        """Rows of the matrix."""
        return self.weight.shape[0]

    @property
    def in_dims(self) -> int:
        """Columns of the matrix."""
        if self.packing is None:
            return self.weight.shape[1]
        return self.weight.shape[1] * 32 // self.packing.bits


# The fields of a projection that hold arrays.
ARRAYS = tuple(f.name for f in fields(Projection) if f.name not in ("packing", "scale"))


def gated_mlp(
    x: mx.array,
    first: Projection,
    second: Projection,
    down: Projection,
    activation: Activation,
    *,
    tile_bytes: int = TILE_BYTES,
) -> mx.array:
    """Compute `down(activation(first(x), second(x)))` in slices.

    Args:
        x: [..., d], floating.
        first, second: [intermediate, d], gate and up in whichever order `activation` has.
        down: [d, intermediate].
        activation: entry by entry.
        tile_bytes: bound on a slice's weights, and activations for up to 1024 tokens; at
            least one group of a packed `down`, and one of 192 parts.

    Returns:
        [..., d] in the dtype of `x`, differentiable in `x`, the six LoRA matrices and the
        gains; what is frozen gets zeros.

    Raises:
        ValueError: the matrices do not fit together, or `down` has a gain.
    """
    _check(x, first, second, down)
    projections = (first, second, down)
    held = [[n for n in ARRAYS if getattr(p, n) is not None] for p in projections]

    def rebuild(arrays: Sequence[mx.array]) -> list[Projection]:
        rest, result = iter(arrays), []
        for p, names in zip(projections, held, strict=True):
            own = {name: next(rest) for name in names}
            result.append(Projection(**own, packing=p.packing, scale=p.scale))
        return result

    @mx.custom_function
    def mlp(x: mx.array, *arrays: mx.array) -> mx.array:
        return _forward(x, Slices(x, *rebuild(arrays), activation, tile_bytes))

    @mlp.vjp
    def backward(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        x, *arrays = primals
        slices = Slices(x, *rebuild(arrays), activation, tile_bytes)
        dx, gradients = _backward(x, cotangent, slices)
        flat = [g.get(n) for g, names in zip(gradients, held, strict=True) for n in names]
        return [
            dx,
            *(mx.zeros_like(a) if g is None else g for a, g in zip(arrays, flat, strict=True)),
        ]

    flat = x.reshape(-1, x.shape[-1])
    own = [getattr(p, n) for p, names in zip(projections, held, strict=True) for n in names]
    return mlp(flat, *own).reshape(*x.shape[:-1], down.out_dims)


def slice_features(tile_bytes: int, width: int, tokens: int, intermediate: int, group: int) -> int:
    """Number of intermediate features in a slice.

    Args:
        tile_bytes: see `gated_mlp`.
        width: number of rows or columns of the three matrices together.
        tokens: number of tokens computed at a time, at most `TOKENS`.
        intermediate: intermediate size of the MLP.
        group: number of features that are quantized together; 1 for none.
    """
    # The same for 16 bits, because factors are cast to float32 (`add_product`).
    wanted = tile_bytes // (4 * (width + 6 * tokens))
    fewest = -(-intermediate // MOST_SLICES)
    return max(group, wanted // group * group, -(-fewest // group) * group)


def _check(x: mx.array, first: Projection, second: Projection, down: Projection) -> None:
    shapes = [(p.out_dims, p.in_dims) for p in (first, second, down)]
    fits = shapes[0] == shapes[1] and shapes[2][1] == shapes[0][0] and x.shape[-1] == shapes[0][1]
    if not fits:
        raise ValueError(
            f"gated MLP: got x {x.shape} and matrices of {shapes}, expected [f, d] twice, then "
            "[any, f], for x of [..., d]"
        )
    if down.gain is not None:
        raise ValueError("gated MLP: got a gain of down, expected none; multiply the result by it")


class Slices:
    """The slices of one call, and the weights of each."""

    def __init__(
        self,
        x: mx.array,
        first: Projection,
        second: Projection,
        down: Projection,
        activation: Activation,
        tile_bytes: int,
    ) -> None:
        self.inputs, self.down, self.activation = (first, second), down, activation
        self.dtype = x.dtype
        chunk = min(TOKENS, x.shape[0])
        # A slice begins and ends where groups of packed columns do.
        group = 1 if down.packing is None else down.packing.group_size
        width = 2 * x.shape[-1] + down.out_dims
        step = slice_features(tile_bytes, width, chunk, first.out_dims, group)
        self.features = spans_of_features(first.out_dims, step)
        self.chunks = spans_of_features(x.shape[0], chunk)

    def weights(self, span: Span, after: list[mx.array]) -> list[mx.array]:
        """The pieces of both inputs' rows and of down's columns, in the activations' dtype."""
        pieces = [self.piece(p, (span, None), after) for p in self.inputs]
        return [*pieces, self.piece(self.down, (None, span), after)]

    def piece(self, p: Projection, spans: tuple, after: list[mx.array]) -> mx.array:
        """Rows or columns of a matrix, in the activations' dtype."""
        rows, columns = (slice(None) if s is None else slice(*s) for s in spans)
        if p.packing is None:
            return depend_on([p.weight[rows, columns]], after)[0].astype(self.dtype)
        packed = [a for a in (p.weight, p.scales, p.biases) if a is not None]
        if spans[1] is not None:
            # As many words or groups as the array has of each column.
            start, stop = spans[1]
            cuts = [
                slice(start * a.shape[1] // p.in_dims, stop * a.shape[1] // p.in_dims)
                for a in packed
            ]
            packed = [a[:, cut] for a, cut in zip(packed, cuts, strict=True)]
        else:
            packed = [a[rows] for a in packed]
        packed = depend_on(packed, after)
        floats = [a if a.dtype == mx.uint8 else a.astype(self.dtype) for a in packed[1:]]
        dense = dequantize(packed[0], *floats, **p.packing._asdict())
        return dense.astype(self.dtype)

    def lora(self, p: Projection) -> tuple[mx.array, mx.array] | None:
        """The branch's matrices in the activations' dtype, its scale in the second."""
        if p.lora_a is None:
            return None
        return p.lora_a.astype(self.dtype), (p.scale * p.lora_b).astype(self.dtype)

    def product(
        self, p: Projection, span: Span, x: mx.array, weight: mx.array, z: mx.array | None
    ) -> mx.array:
        """A slice of an input projection's product with x, whose LoRA part is z."""
        y = x @ weight.T
        return y if z is None else plus_product(y, z, self.lora(p)[1][:, slice(*span)])

    def gain(self, p: Projection, span: Span) -> mx.array:
        """A slice of a projection's gain in the activations' dtype."""
        return p.gain[slice(*span)].astype(self.dtype)

    def output(self, p: Projection, span: Span, product: mx.array) -> mx.array:
        """What an input projection makes of a slice of its product."""
        y = product if p.gain is None else self.gain(p, span) * product
        return y if p.bias is None else y + p.bias[slice(*span)].astype(self.dtype)


def _forward(x: mx.array, s: Slices) -> mx.array:
    loras, down_lora = [s.lora(p) for p in s.inputs], s.lora(s.down)
    xs = [x[slice(*c)] for c in s.chunks]
    zs = [[None if lora is None else rows @ lora[0] for lora in loras] for rows in xs]
    sums: list[list] = [[None, None] for _ in xs]  # of y and of what down's branch maps
    after: list[mx.array] = []
    for span in s.features:
        *weights, w_down = s.weights(span, after)
        for rows, z, total in zip(xs, zs, sums, strict=True):
            ready = depend_on([rows], after)[0]
            parts = [
                s.output(p, span, s.product(p, span, ready, w, part))
                for p, w, part in zip(s.inputs, weights, z, strict=True)
            ]
            h = s.activation(*parts)
            total[0] = add_product(total[0], h, w_down.T)
            if down_lora is not None:
                total[1] = add_product(total[1], h, down_lora[0][slice(*span)])
            after = [t for t in total if t is not None]
    pieces = []
    for y, z in sums:
        piece = depend_on([y], after)[0].astype(s.dtype)
        if down_lora is not None:
            piece = plus_product(piece, z.astype(s.dtype), down_lora[1])
        pieces.append(piece if s.down.bias is None else piece + s.down.bias.astype(s.dtype))
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)


def _backward(
    x: mx.array, cotangent: mx.array, s: Slices
) -> tuple[mx.array, list[dict[str, mx.array]]]:
    """The gradient of x, and of each projection's LoRA matrices by name."""
    parts = [Chunk(s, x[slice(*c)], cotangent[slice(*c)].astype(s.dtype)) for c in s.chunks]
    # Of each slice: [r, slice] of both inputs' lora_b, [slice, r] of down's lora_a, [slice] of both
    # inputs' gain.
    pieces: list[list[mx.array]] = [[], [], [], [], []]
    after = [cotangent]
    for span in s.features:
        weights = s.weights(span, after)
        sums: list[mx.array | None] = [None] * len(pieces)
        for part in parts:
            sums = part.advance(span, weights, sums, after)
            after = part.arrays() + [a for a in sums if a is not None]
        for piece, found in zip(pieces, sums, strict=True):
            piece.append(found)
    dxs = [part.input_gradient() for part in parts]
    return (dxs[0] if len(dxs) == 1 else mx.concatenate(dxs)), gradients_of(parts, pieces)


def gradients_of(parts: list["Chunk"], pieces: list[list[mx.array]]) -> list[dict[str, mx.array]]:
    """The gradients of each projection's LoRA matrices and gain by name, after the last slice."""
    s, gradients = parts[0].s, [{}, {}, {}]
    for index, p in enumerate(s.inputs):
        if p.lora_a is not None:
            a = _total([part.x.T @ part.dz[index].astype(s.dtype) for part in parts])
            b = p.scale * mx.concatenate(pieces[index], axis=1)
            gradients[index] = {"lora_a": a, "lora_b": b}
        if p.gain is not None:
            gradients[index]["gain"] = mx.concatenate(pieces[3 + index])
    if s.down.lora_a is not None:
        b = _total([part.z_down.astype(s.dtype).T @ part.dy for part in parts])
        gradients[2] = {"lora_a": mx.concatenate(pieces[2]), "lora_b": s.down.scale * b}
    for p, found in zip((*s.inputs, s.down), gradients, strict=True):
        for name in found:
            found[name] = found[name].astype(getattr(p, name).dtype)
    return gradients


class Chunk:
    """The backward of some tokens, one slice of features after the other."""

    def __init__(self, s: Slices, x: mx.array, dy: mx.array) -> None:
        self.s, self.x, self.dy = s, x, dy
        self.loras, self.down_lora = [s.lora(p) for p in s.inputs], s.lora(s.down)
        self.z = [None if lora is None else x @ lora[0] for lora in self.loras]
        # The branches' sums over slices: what the inputs' get back, what down's maps.
        self.dz: list[mx.array | None] = [None, None]
        self.dz_down = None if self.down_lora is None else dy @ self.down_lora[1].T
        self.z_down: mx.array | None = None
        self.dx: mx.array | None = None
        self.dh: mx.array | None = None  # dy D of all features, where D is read by rows

    def advance(
        self, span: Span, weights: list[mx.array], sums: list, after: list[mx.array]
    ) -> list[mx.array | None]:
        """Add a slice; returns the adapters' gradients of it, added to `sums`.

        The last of `weights` is None if `dh` is known.
        """
        s, (x, dy) = self.s, depend_on([self.x, self.dy], after)
        *w_inputs, w_down = weights
        products = [
            s.product(p, span, x, w, z) for p, w, z in zip(s.inputs, w_inputs, self.z, strict=True)
        ]
        inputs = [s.output(p, span, u) for p, u in zip(s.inputs, products, strict=True)]
        dh = dy @ w_down if w_down is not None else self.dh[:, slice(*span)].astype(s.dtype)
        sums = list(sums)
        if self.down_lora is not None:
            a = self.down_lora[0][slice(*span)]
            dh = dh + self.dz_down @ a.T
        (h,), back = mx.vjp(lambda *ab: [s.activation(*ab)], inputs, [dh])
        if self.down_lora is not None:
            self.z_down = add_product(self.z_down, h, a)
            sums[2] = add_product(sums[2], h.T, self.dz_down)
        for index, p in enumerate(s.inputs):
            if p.gain is not None:
                share = (back[index].astype(mx.float32) * products[index].astype(mx.float32)).sum(0)
                sums[3 + index] = share if sums[3 + index] is None else sums[3 + index] + share
                back[index] = back[index] * s.gain(p, span)
        for index, (d, w) in enumerate(zip(back, w_inputs, strict=True)):
            self.dx = add_product(self.dx, d, w)
            if self.loras[index] is not None:
                b = self.loras[index][1][:, slice(*span)]
                self.dz[index] = add_product(self.dz[index], d, b.T)
                sums[index] = add_product(sums[index], self.z[index].T, d)
        return sums

    def arrays(self) -> list[mx.array]:
        """The arrays that the next slice depends on."""
        return [a for a in (self.dx, self.z_down, *self.dz) if a is not None]

    def input_gradient(self) -> mx.array:
        """The gradient of x, with what came back through the branches."""
        dx = self.dx
        for dz, lora in zip(self.dz, self.loras, strict=True):
            if dz is not None:
                dx = add_product(dx, dz.astype(self.s.dtype), lora[0].T)
        return dx.astype(self.x.dtype)


def add_product(total: mx.array | None, a: mx.array, b: mx.array) -> mx.array:
    """`total + a @ b` in float32; None counts as zero.

    Of 16 bits, the factors are cast: they are slices, the product is as large as the sum, and
    would be held in both widths.
    """
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return a @ b if total is None else plus_product(total, a, b)


def _total(terms: list[mx.array]) -> mx.array:
    total = terms[0].astype(mx.float32)
    for term in terms[1:]:
        total = total + term.astype(mx.float32)
    return total


def spans_of_features(count: int, step: int) -> list[Span]:
    """Cut `count` features into pieces of `step`; the last one may have fewer."""
    return [(start, min(start + step, count)) for start in range(0, count, step)]
