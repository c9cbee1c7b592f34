"""Replace the attention function of mlx-lm's models temporarily.

Every architecture of mlx-lm with standard attention calls one function,
`mlx_lm.models.base.scaled_dot_product_attention`, which it imports by name. So the function is
replaced in every loaded module that holds it. An architecture with its own attention never calls
it and is not affected, so code that relies on the replacement must check that it is called. The
function that makes causal masks is replaced in the same way (`blocks/masks.py`).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import is_
from types import ModuleType

import mlx.core as mx
from mlx_lm.models import base

from mlx_edgelora.blocks.added_scores import factors_of, remembered_factors
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
from mlx_edgelora.layers.head_attention import (
    HeadProduct,
    append,
    attend_by_heads,
    heads_at_a_time,
)

# (queries [B, H, Tq, D], keys [B, Hkv, Tk, D], values [B, Hkv, Tk, Dv], cache, scale, mask,
# sinks=None) -> [B, H, Tq, Dv]; the last four by position or by name.
Attention = Callable[..., mx.array]
PACKAGE = "mlx_lm.models."


class _Dispatcher:
    """Takes the place of mlx-lm's attention and calls the current replacement."""

    def __init__(self, function: Callable[..., mx.array]) -> None:
        self.function = function

    def __call__(self, *args: object, **kwargs: object) -> mx.array:
        return self.function(*args, **kwargs)


@contextmanager
def replace_attention(function: Callable[..., mx.array]) -> Iterator[None]:
    """Let mlx-lm's architectures call `function` as their attention; undone on exit.

    Contexts nest: an inner function gets the outer one as `original`. Every model of the process
    sees the replacement, so use it in one thread. Only the outermost context searches all modules,
    which takes a millisecond.

    Args:
        function: called as `function(original, queries, keys, values, ...)` with the arguments of
            `scaled_dot_product_attention`; `original` is the function that it replaces.
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
    with replace_temporarily(current, _Dispatcher(partial(function, current))):
        yield


@contextmanager
def attention_found() -> Iterator[None]:
    """Search all modules once for what is inside, which replaces attention many times."""
    with replace_attention(lambda original, *args, **kwargs: original(*args, **kwargs)):
        yield


@contextmanager
def banded_masks() -> Iterator[None]:
    """Let mlx-lm make causal masks that carry their band (`blocks/masks.py`); undone on exit."""
    original = base.create_causal_mask
    with replace_temporarily(original, with_bands(original)):
        yield


@contextmanager
def bounded_attention() -> Iterator[None]:
    """Let mlx-lm's models compute attention without tokens x tokens arrays; undone on exit."""
    with replace_attention(attend_bounded), banded_masks(), remembered_factors():
        yield


# Whether a gradient is being traced when blocks call attention: MLX then uses other kernels.
_traced = [False]


@contextmanager
def tracing_gradient() -> Iterator[None]:
    """Tell `attend_bounded` that a gradient is being traced; undone on exit."""
    before, _traced[0] = _traced[0], True
    try:
        yield
    finally:
        _traced[0] = before


# The sums to which calls of attention add the gradients of keys and values.
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
def replace_temporarily(original: Callable, replacement: Callable) -> Iterator[None]:
    """Replace a function in all of mlx-lm's modules that hold it; undone on exit."""
    modules, places = _PACKAGE.modules(), _places_of(original)
    try:
        _assign(places, replacement)
        yield
    finally:
        _assign(places, original)
        if _PACKAGE.modules() is not modules:  # what was imported meanwhile has the replacement
            _assign(_places_of(replacement), original)


class _Package:
    """The imported modules of mlx-lm's architectures, picked anew where any module is another."""

    def __init__(self) -> None:
        self._known: list[ModuleType | None] = []
        self._own: list[ModuleType] = []

    def modules(self) -> list[ModuleType]:
        every = list(sys.modules.values())  # None marks a module whose import is blocked
        if len(every) != len(self._known) or not all(map(is_, every, self._known)):
            loaded = list(sys.modules.items())
            self._known = [module for _, module in loaded]
            own = (module for name, module in loaded if name.startswith(PACKAGE))
            self._own = [module for module in own if module is not None]
        return self._own


_PACKAGE = _Package()


def _places_of(function: Callable) -> list[tuple[ModuleType, str]]:
    """The modules of the package that hold a function, and its name in each."""
    return [
        (module, key)
        for module in _PACKAGE.modules()
        for key, value in vars(module).items()
        if value is function
    ]


def _assign(places: list[tuple[ModuleType, str]], function: Callable) -> None:
    for module, key in places:
        setattr(module, key, function)


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
    """Attention that never holds tokens x tokens scores, forward or backward.

    MLX's own where it is fused (`use_fused`), or where all scores are no more than a tile; in
    tiles elsewhere, where a floating mask gets its gradient as well. Masks that know what they
    mean are not evaluated where there is more than a tile. With a cache, or what tiles do not
    know, `original` as it is. Rows that share a row attend to themselves alone (`packing.py`).
    """
    if isinstance(cache, list) and all(part is None for part in cache):
        cache = None  # of the parts of a cache that is not there
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
    # On a GPU MLX's kernels raise an error if a floating mask needs a gradient.
    small = 4 * queries.size // queries.shape[-1] * keys.shape[2] <= TILE_BYTES and not (
        is_floating(mask) and mx.default_device() == mx.gpu
    )
    if cache is not None or small or not _is_known(mask):
        return original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
    added: tuple[mx.array, ...] = ()
    if (factors := factors_of(mask, queries, keys)) is not None:
        added = factors.queries, factors.keys
        mask = tiled = tiled_mask(factors.mask, queries.shape[2], keys.shape[2])
    if sinks is None and isinstance(keys, HeadProduct) and isinstance(values, HeadProduct):
        more = added[1].shape[-1] if added else 0
        if heads_at_a_time(keys, values, more) < keys.shape[1]:
            return attend_by_heads(queries, keys, values, scale=scale, mask=tiled, added=added)
    if added:
        queries, keys = append(queries, keys, added, scale)
    if use_fused(queries, keys, values, traced=_traced[0], mask=tiled, sinks=sinks)[0]:
        return original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)
    operands = promote(queries, keys, values)
    return tiled_attention(*operands, scale=scale, mask=tiled, sinks=sinks, sums=sums)


def _is_known(mask: object) -> bool:
    """Whether tiles support a mask; MLX also takes masks of integers."""
    if isinstance(mask, mx.array):
        return mask.dtype == mx.bool_ or is_floating(mask)
    return mask is None or mask == "causal"
