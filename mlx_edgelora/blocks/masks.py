"""Causal masks that know what they mean, so that nobody needs their values.

mlx-lm makes an array of tokens x tokens for a mask as soon as a text is longer than a
block's window: 256 MiB at 16,384 tokens. But MLX's arrays are lazy: one that is never
evaluated costs nothing. So a model is given mlx-lm's own array, of a class that remembers
what it says (`CausalMask`), and attention goes by that. Whatever else a model does with it
gives a plain array with the right values, at the old price; an operation in place makes it
forget. So no architecture can break, and none has to be named.
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
_IN_PLACE = ["add", "and", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift"]
_IN_PLACE += ["sub", "truediv", "xor"]


class CausalMask(mx.array):
    """A bool array [Tq, Tk] that knows which keys each query sees.

    Args:
        array: the values; T x T bytes, three times, once somebody evaluates them.
        band: the same in few numbers, with its positions.
    """

    def __init__(self, array: mx.array, band: Band) -> None:
        super().__init__(array)
        self.band: Band | None = band


def _forgetting(name: str) -> Callable[..., Any]:
    plain = getattr(mx.array, name)

    def changed(self: CausalMask, *args: Any) -> Any:
        self.band = None
        return plain(self, *args)

    return changed


# MLX's operators in place change the very object, values and all.
for _name in ["__setitem__", *(f"__i{name}__" for name in _IN_PLACE)]:
    setattr(CausalMask, _name, _forgetting(_name))


def band_of(mask: mx.array | str | None) -> Band | None:
    """Which keys are seen under "causal" or a mask that knows it; None of any other."""
    if isinstance(mask, CausalMask):
        return mask.band
    return Band() if isinstance(mask, str) and mask == "causal" else None


def simplest_mask(positions: Positions, keys: int, window: int | None) -> mx.array | str | None:
    """The mask between queries and keys in its shortest form.

    Args:
        positions: which key is each query's own, ascending; may be before the first key or
            behind the last one.
        keys: how many there are.
        window: how many a query sees at most, its own among them; None for all before it.

    Returns:
        None where nothing is hidden, "causal" where the last query sees the last key and
        all before it, else a `CausalMask`, not evaluated.
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
    """The mask of queries at these positions among so many keys, for whoever needs an array."""
    return _causal_mask(positions, keys, window)


def tiled_mask(mask: mx.array | str | None, queries: int, keys: int) -> Mask:
    """What tiled attention makes of a mask, of which it then needs no array if that can be."""
    if not isinstance(mask, CausalMask) or mask.band is None or mask.shape != (queries, keys):
        return mask
    positions, window = mask.band
    plain = window is None and isinstance(positions, range) and positions.stop == keys
    return "causal" if plain else mask.band


def with_bands(original: Maker) -> Maker:
    """mlx-lm's maker of causal masks, whose masks then know what they mean.

    Not those with padding, nor any where `original` makes other masks than are known here.
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
    """Whether a maker's masks are what `simplest_mask` takes them for: tried."""
    ago = np.arange(2, 9)[:, None] - np.arange(9)
    made = [np.array(original(7, 2, window)) for window in (3, None)]
    expected = [(ago >= 0) & (ago < window) for window in (3, 9)]
    return all(np.array_equal(*pair) for pair in zip(made, expected, strict=True))


def pack_masks(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A block's arguments for `mx.compile`: masks as constants, because arrays are evaluated."""
    return tuple(map(_pack_mask, args)), {name: _pack_mask(value) for name, value in kwargs.items()}


def unpack_masks(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """What `packed` was given."""
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
