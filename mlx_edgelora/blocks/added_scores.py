"""Scores that a model makes itself and adds to those of attention, which remember their factors.

Multi-head latent attention (arXiv 2405.04434) gives attention the scores of its rotary parts as a
floating mask, `q_pe @ k_pe^T`, hidden by a causal mask: an array of heads x queries x keys. But
MLX's arrays are lazy, and an array that is never evaluated costs nothing. So a product of four axes
is mlx-lm's own array as `AddedScores`, which carries its factors, and attention appends these to
its queries and keys. Any other operation on the product gives a plain array with the right values,
and an operation in place removes the factors. So every architecture still works, and none is named.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_edgelora.blocks.masks import CausalMask, forget_in_place


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
    product, where = mx.array.__matmul__, mx.where

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

    mx.array.__matmul__, mx.where = multiply, choose
    try:
        yield
    finally:
        mx.array.__matmul__, mx.where = product, where


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
