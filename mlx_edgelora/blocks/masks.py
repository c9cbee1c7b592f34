"""Causal masks that carry a short description of themselves, so that no values are needed.

mlx-lm makes a mask of tokens x tokens as soon as a text is longer than a block's window: 256 MiB
at 16,384 tokens. But MLX's arrays are lazy, and an array that is never evaluated costs nothing. So
a model gets mlx-lm's own array as a `CausalMask`, which carries its band, and attention uses the
band. Any other operation of the model on the mask gives a plain array with the right values, and an
operation in place removes the band. So every architecture still works, and none is named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_edgelora.layers.attention import Band, Mask
from mlx_edgelora.layers.grid import Positions

# Makes a mask bool [N, offset + N] of N, offset and window_size; mlx-lm's `create_causal_mask`.
Maker = Callable[..., mx.array]
_PACKED = "mlx_edgelora causal mask"
_OPERATORS = ["add", "and", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift"]
_OPERATORS += ["sub", "truediv", "xor"]
# Methods of an array that change it in place.
IN_PLACE = ["__setitem__", *(f"__i{name}__" for name in _OPERATORS)]


class CausalMask(mx.array):
    """A bool array [Tq, Tk] with a description of the keys that each query sees.

    Args:
        array: the values; evaluating them takes three times T x T bytes.
        band: the description, with the positions of the queries.
    """

    def __init__(self, array: mx.array, band: Band) -> None:
        super().__init__(array)
        self.band: Band | None = band


def forget_in_place(kind: type[mx.array], attribute: str) -> None:
    """Let operations in place remove what arrays of a kind know, by setting `attribute` to None.

    MLX's in-place operators change the object itself.
    """
    for name in IN_PLACE:
        setattr(kind, name, _forgetting(name, attribute))


def _forgetting(name: str, attribute: str) -> Callable[..., Any]:
    plain = getattr(mx.array, name)

    def changed(self: mx.array, *args: Any) -> Any:
        setattr(self, attribute, None)
        return plain(self, *args)

    return changed


forget_in_place(CausalMask, "band")


def band_of(mask: mx.array | str | None) -> Band | None:
    """The band of "causal" or of a mask that carries one; None for any other mask."""
    if isinstance(mask, CausalMask):
        return mask.band
    return Band() if isinstance(mask, str) and mask == "causal" else None


def simplest_mask(positions: Positions, keys: int, window: int | None) -> mx.array | str | None:
    """The mask between queries and keys in its shortest form.

    Args:
        positions: index of each query's own key, ascending; may be before the first key or after
            the last one.
        keys: number of keys.
        window: number of keys that a query sees at most, its own included; None for all.

    Returns:
        None if every query sees every key, "causal" if the last query sees all keys and the
        others all up to their own, else a `CausalMask`, not evaluated.
    """
    first, last = int(positions[0]), int(positions[-1])
    if window is not None and window > last:
        window = None
    if window is None and first >= keys - 1:
        return None
    if last - first + 1 == len(positions):
        positions = range(first, last + 1)
        if window is None and last + 1 == keys:
            return "causal"
    return _causal_mask(positions, keys, window)


def _causal_mask(positions: Positions, keys: int, window: int | None) -> CausalMask:
    run = isinstance(positions, range)
    at = mx.arange(positions.start, positions.stop) if run else mx.array(positions)
    ago = at[:, None] - mx.arange(keys)
    seen = ago >= 0 if window is None else (ago >= 0) & (ago < window)
    return CausalMask(seen, Band(positions, window))


def causal_array(positions: Positions, keys: int, window: int | None = None) -> mx.array:
    """The causal mask of queries at these positions as an array [queries, keys]."""
    return _causal_mask(positions, keys, window)


def tiled_mask(mask: mx.array | str | None, queries: int, keys: int) -> Mask:
    """The mask for tiled attention: a band or "causal" if possible, else the array itself."""
    if not isinstance(mask, CausalMask) or mask.band is None or mask.shape != (queries, keys):
        return mask
    positions, window = mask.band
    plain = window is None and isinstance(positions, range) and positions.stop == keys
    return "causal" if plain else mask.band


def with_bands(original: Maker) -> Maker:
    """Wrap mlx-lm's maker of causal masks, so that its masks carry their band.

    Masks with padding get no band, nor do any masks if `original` makes other ones than expected.
    """
    return original if isinstance(original, _BandedMaskMaker) else _BandedMaskMaker(original)


@dataclass(frozen=True)
class _BandedMaskMaker:
    original: Maker

    def __call__(
        self,
        N: int,
        offset: int = 0,
        window_size: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> mx.array:
        array = self.original(N, offset, window_size, *args, **kwargs)
        padded = any(value is not None for value in (*args, *kwargs.values()))
        if padded or not _is_known(self.original):
            return array
        window = None if window_size is None or window_size >= offset + N else window_size
        return CausalMask(array, Band(range(offset, offset + N), window))


@lru_cache(maxsize=8)
def _is_known(original: Maker) -> bool:
    """Whether a maker's masks are those that a band describes, found by a trial."""
    ago = np.arange(2, 9)[:, None] - np.arange(9)
    made = [np.array(original(7, 2, window)) for window in (3, None)]
    expected = [(ago >= 0) & (ago < window) for window in (3, 9)]
    return all(np.array_equal(*pair) for pair in zip(made, expected, strict=True))


def pack_masks(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A block's arguments for `mx.compile`: masks become constants, or they would be evaluated."""
    return tuple(map(_pack_mask, args)), {name: _pack_mask(value) for name, value in kwargs.items()}


def unpack_masks(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments that were given to `pack_masks`."""
    return tuple(map(_unpack_mask, args)), {
        name: _unpack_mask(value) for name, value in kwargs.items()
    }


def _pack_mask(value: Any) -> Any:
    band = band_of(value) if isinstance(value, CausalMask) else None
    if band is None or not isinstance(band.positions, range):
        return value
    return f"{_PACKED} {band.positions.start} {value.shape[1]} {band.window or 0}"


def _unpack_mask(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(_PACKED):
        return value
    offset, keys, window = map(int, value.removeprefix(_PACKED).split())
    return _causal_mask(range(offset, keys), keys, window or None)
