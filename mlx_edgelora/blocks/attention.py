"""The one place where attention of mlx-lm's models is exchanged: for a while, and undone.

Every architecture of mlx-lm that has standard attention calls one function,
`mlx_lm.models.base.scaled_dot_product_attention`, which it imported by name. So it is
replaced wherever a loaded module holds it. An architecture with attention of its own
never calls it and is not touched: who relies on the replacement must see that it is called.
So is the one function that makes causal masks: see `blocks/masks.py`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
from mlx_lm.models import base

from mlx_edgelora.blocks.masks import tiled_mask, with_bands
from mlx_edgelora.blocks.packing import packing_now
from mlx_edgelora.layers.attention import (
    TILE_BYTES,
    KeySums,
    promote,
    tiled_attention,
    use_fused,
)
from mlx_edgelora.layers.fused import is_floating

# (queries [B, H, Tq, D], keys [B, Hkv, Tk, D], values [B, Hkv, Tk, Dv], cache, scale, mask,
# sinks=None) -> [B, H, Tq, Dv]; the last four by position or by name.
Attention = Callable[..., mx.array]
PACKAGE = "mlx_lm.models."


class _Dispatcher:
    """Stands for mlx-lm's attention and calls the function whose turn it is."""

    def __init__(self, function: Callable[..., mx.array]) -> None:
        self.function = function

    def __call__(self, *args: object, **kwargs: object) -> mx.array:
        return self.function(*args, **kwargs)


@contextmanager
def replace_attention(function: Callable[..., mx.array]) -> Iterator[None]:
    """Let mlx-lm's architectures call `function` as their attention; undone on exit, on error too.

    Contexts nest: the inner function is given the outer one as what it replaces. They are
    for one thread: every model of the process sees the replacement. Only the outermost looks
    through all modules, which takes a millisecond.

    Args:
        function: called as `function(original, queries, keys, values, ...)`, with whatever
            mlx-lm gives `scaled_dot_product_attention` behind `original`, which is the
            function that stood there before.
    """
    current = base.scaled_dot_product_attention
    if isinstance(current, _Dispatcher):
        before = current.function
        current.function = partial(function, before)
        try:
            yield
        finally:
            current.function = before
        return
    with _replace_temporarily(current, _Dispatcher(partial(function, current))):
        yield


@contextmanager
def banded_masks() -> Iterator[None]:
    """Let mlx-lm's causal masks know what they mean (`blocks/masks.py`); undone on exit."""
    original = base.create_causal_mask
    with _replace_temporarily(original, with_bands(original)):
        yield


@contextmanager
def bounded_attention() -> Iterator[None]:
    """Let mlx-lm's architectures attend without tokens x tokens, scores or mask; undone on exit."""
    with replace_attention(attend_bounded), banded_masks():
        yield


# Whether a gradient is traced where blocks call attention: what MLX does then is not the same.
_traced = [False]


@contextmanager
def tracing_gradient() -> Iterator[None]:
    """Let `attend_bounded` know that a gradient is traced of what is called; undone on exit."""
    before, _traced[0] = _traced[0], True
    try:
        yield
    finally:
        _traced[0] = before


# Where tiles add the gradients of keys and values, of the calls of attention that go on.
_sums: list[KeySums] = []


@contextmanager
def add_key_gradients(sums: KeySums) -> Iterator[None]:
    """Let `attend_bounded` add the gradients of keys and values to `sums` where it uses tiles."""
    _sums.append(sums)
    try:
        yield
    finally:
        _sums.pop()


@contextmanager
def _replace_temporarily(original: Callable, replacement: Callable) -> Iterator[None]:
    try:
        _replace_everywhere(original, replacement)
        yield
    finally:
        # Looked for again: a module that was imported meanwhile took the replacement.
        _replace_everywhere(replacement, original)


def _replace_everywhere(old: Callable, new: Callable) -> None:
    """Put `new` wherever a module of the package holds `old`, under whatever name."""
    for name, module in list(sys.modules.items()):
        # None stands for a module that may not be imported.
        if name.startswith(PACKAGE) and module is not None:
            for key in [key for key, value in vars(module).items() if value is old]:
                setattr(module, key, new)


def attend_bounded(
    original: Attention,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: object,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """For `replace_attention`: the same, but tokens x tokens is never held, forward or backward.

    MLX's own where it is fused (`use_fused`), or where all scores are no more than a tile; in
    tiles elsewhere, where a floating mask gets its gradient as well. Masks that know what they
    mean are not evaluated where there is more than a tile. With a cache, or what tiles do not
    know, `original` as it is. Rows that share a row attend to themselves alone (`packing.py`).
    """
    packing, sums = packing_now(), _sums[-1] if _sums else None
    if packing is None:
        return _bounded(original, queries, keys, values, cache, scale, mask, sinks, sums)
    if cache is not None:
        raise ValueError("a block that shares rows is called with a cache")

    def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
        return _bounded(original, q, k, v, None, scale, mask, sinks, None)

    return packing.attention(attend, queries, keys, values, mask)


def _bounded(
    original: Attention,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: object,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
    sums: KeySums | None,
) -> mx.array:
    tiled = tiled_mask(mask, queries.shape[2], keys.shape[2])
    if cache is None and isinstance(tiled, str):
        mask = tiled
    # On a GPU MLX's kernels raise where a floating mask is to have a gradient.
    small = 4 * queries.size // queries.shape[-1] * keys.shape[2] <= TILE_BYTES and not (
        is_floating(mask) and mx.default_device() == mx.gpu
    )
    if (
        cache is not None
        or small
        or not _is_known(mask)
        or use_fused(queries, keys, values, traced=_traced[0], mask=tiled, sinks=sinks)[0]
    ):
        return original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
    operands = promote(queries, keys, values)
    return tiled_attention(*operands, scale=scale, mask=tiled, sinks=sinks, sums=sums)


def _is_known(mask: object) -> bool:
    """Whether tiles know a mask: MLX takes masks of whole numbers as well."""
    if isinstance(mask, mx.array):
        return mask.dtype == mx.bool_ or is_floating(mask)
    return mask is None or mask == "causal"
