"""Scores that a model makes itself and adds to those of attention, which remember their factors.

Multi-head latent attention (arXiv 2405.04434) gives attention the scores of its rotary parts as a
floating mask, `q_pe @ k_pe^T`, hidden by a causal mask: an array of heads x queries x keys. But
MLX's arrays are lazy, and an array that is never evaluated costs nothing. So a product of four axes
is mlx-lm's own array as `AddedScores`, which carries its factors, and attention appends these to
its queries and keys. Any other operation on the product gives a plain array with the right values,
and an operation in place removes the factors. So every architecture still works, and none is named.

Sparse attention (DeepSeek V3.2) sums such scores over heads to choose what to attend to: those of
each head, cut from all, as `HeadScores` are computed when they are cut.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_edgelora.blocks.masks import CausalMask, forget_in_place
from mlx_edgelora.layers.head_attention import some_heads
from mlx_edgelora.layers.tile_order import Span, depend_on


class Factors(NamedTuple):
    """What scores are made of.

    Attributes:
        queries, keys: [B, H, Tq, r] and [B, H or 1, Tk, r]; scores are their products.
        mask: bool, what is seen, a `CausalMask` or another array; None for all.
    """

    queries: mx.array
    keys: mx.array
    mask: mx.array | None = None


class AddedScores(mx.array):
    """A floating array [B, H, Tq, Tk] with its factors.

    Args:
        array: the values, of heads x queries x keys if they are evaluated.
        factors: what it is made of.
    """

    def __init__(self, array: mx.array, factors: Factors) -> None:
        super().__init__(array)
        self.factors: Factors | None = factors


forget_in_place(AddedScores, "factors")


class HeadScores(mx.array):
    """What operations on each entry make of scores [B, H, Tq, Tk], known for some heads alone.

    Args:
        array: the values, of heads x queries x keys if they are evaluated.
        cut: gives those of some heads, computed after other arrays.
    """

    def __init__(self, array: mx.array, cut: Callable[[Span, list[mx.array]], mx.array]) -> None:
        super().__init__(array)
        self.cut: Callable[[Span, list[mx.array]], mx.array] | None = cut

    def __mul__(self, other: Any) -> mx.array:
        made, cut = mx.array.__mul__(self, other), self.cut
        fits = isinstance(other, mx.array) and other.ndim == 4 and made.shape == self.shape
        if cut is None or not fits:
            return made
        factor = _as_it_is(other)
        return HeadScores(made, lambda heads, after: cut(heads, after) * some_heads(factor, heads))

    def __getitem__(self, index: Any) -> mx.array:
        heads = _heads_in(index, self.shape[1])
        if self.cut is None or heads is None:
            return mx.array.__getitem__(self, index)
        return _CutScores(partial(self.cut, heads))


class _CutScores(mx.array):
    """Scores of some heads, which are made after the sum that they are added to.

    Otherwise those of all heads would wait for their sum.
    """

    def __init__(self, make: Callable[[list[mx.array]], mx.array]) -> None:
        super().__init__(make([]))
        self.make: Callable[[list[mx.array]], mx.array] | None = make

    def __radd__(self, other: Any) -> mx.array:
        if self.make is None or not isinstance(other, mx.array):
            return mx.array.__radd__(self, other)
        return other + self.make([other])


forget_in_place(HeadScores, "cut")
forget_in_place(_CutScores, "make")


def _heads_in(index: Any, heads: int) -> Span | None:
    """The heads of `[:, start:stop]`; None for another index."""
    if not isinstance(index, tuple) or len(index) != 2 or index[0] != slice(None):
        return None
    if not isinstance(index[1], slice) or index[1].step not in (None, 1):
        return None
    start, stop, _ = index[1].indices(heads)
    return (start, stop) if start < stop else None


def factors_of(mask: object, queries: mx.array, keys: mx.array) -> Factors | None:
    """The factors of a mask that is added to the scores of these queries and keys.

    None if the mask has none, or if they do not fit. Only shapes are used.
    """
    factors = mask.factors if isinstance(mask, AddedScores) else None
    if factors is None or factors.queries.shape[:3] != queries.shape[:3]:
        return None
    batch, heads, tokens, _ = factors.keys.shape
    wanted = keys.shape[0], keys.shape[2]
    return factors if (batch, tokens) == wanted and heads in (1, keys.shape[1]) else None


@contextmanager
def remembered_factors() -> Iterator[None]:
    """Let products and what `mx.where` hides of them remember their factors; undone on exit."""
    product, where, maximum = mx.array.__matmul__, mx.where, mx.maximum

    def multiply(self: mx.array, other: Any) -> mx.array:
        made = product(self, other)
        if not isinstance(other, mx.array) or not self.ndim == other.ndim == 4:
            return made
        return AddedScores(made, Factors(_as_it_is(self), other.swapaxes(-1, -2)))

    def choose(condition: Any, x: Any, y: Any, /, **options: Any) -> mx.array:
        made = where(condition, x, y, **options)
        factors = x.factors if isinstance(x, AddedScores) else None
        if factors is None or factors.mask is not None or made.shape != x.shape:
            return made
        if not _is_bool(condition) or not _is_least(y, x.dtype):
            return made
        return AddedScores(made, factors._replace(mask=_as_it_is(condition)))

    def largest(a: Any, b: Any, /, **options: Any) -> mx.array:
        made = maximum(a, b, **options)
        factors = a.factors if isinstance(a, AddedScores) else None
        if factors is None or factors.mask is not None or not isinstance(b, int | float):
            return made

        def cut(heads: Span, after: list[mx.array]) -> mx.array:
            some = [some_heads(array, heads) for array in factors[:2]]
            queries, keys = depend_on(some, after)
            return maximum(product(queries, keys.swapaxes(-1, -2)), b)

        return HeadScores(made, cut)

    mx.array.__matmul__, mx.where, mx.maximum = multiply, choose, largest
    try:
        yield
    finally:
        mx.array.__matmul__, mx.where, mx.maximum = product, where, maximum


def _as_it_is(array: mx.array) -> mx.array:
    """The same array as another object, which operations in place on the first do not change."""
    if isinstance(array, CausalMask):
        return CausalMask(array, array.band)
    return array.astype(array.dtype)


def _is_bool(condition: object) -> bool:
    return isinstance(condition, mx.array) and condition.dtype == mx.bool_


def _is_least(value: object, dtype: mx.Dtype) -> bool:
    """Whether scores of a dtype are hidden by this value."""
    if isinstance(value, mx.array) and value.size == 1 and value.dtype == dtype:
        value = value.item()
    return isinstance(value, float) and value <= mx.finfo(dtype).min
