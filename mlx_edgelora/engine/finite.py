"""What keeps NaN and infinity out of parameters and files, and the norm that comes of it."""

import math
from collections.abc import Mapping

import mlx.core as mx
import numpy as np


class Magnitudes:
    """Sums of squares of gradients: whether all are finite, and their norm.

    Nothing waits for them: on a GPU they are computed in the background, and they are read once, at
    the end of a step. Memory: a number for each array, and one array in float32 where it is of 16
    bits.
    """

    def __init__(self) -> None:
        self._squares: dict[str, mx.array | float] = {}

    def add(self, arrays: Mapping[str, mx.array]) -> None:
        """Look at some more evaluated arrays; a name that came before is forgotten first."""
        for name in arrays:
            self._squares.pop(name, None)
        if mx.default_device() == mx.cpu:  # NumPy takes a tenth of the time for small arrays
            with np.errstate(over="ignore", invalid="ignore"):
                self._squares |= {name: _square(array) for name, array in arrays.items()}
        elif arrays:
            found = {n: a.astype(mx.float32).square().sum() for n, a in arrays.items()}
            self._squares |= found
            mx.async_eval(list(found.values()))

    def first_bad(self) -> str | None:
        """Name of the first array that holds a NaN or an infinity, or None.

        On a GPU numbers above 1e19 count as infinite, for their squares are.
        """
        self._read()
        return next((name for name, x in self._squares.items() if not math.isfinite(x)), None)

    def norm(self) -> float | None:
        """Root of the sum over all arrays; None where there are none."""
        self._read()
        return math.sqrt(math.fsum(self._squares.values())) if self._squares else None

    def clear(self) -> None:
        """Forget all arrays."""
        self._squares.clear()

    def _read(self) -> None:
        """Make numbers of what is still on its way, all of them at once."""
        lazy = [name for name, x in self._squares.items() if isinstance(x, mx.array)]
        if lazy:
            numbers = mx.stack([self._squares[name] for name in lazy]).tolist()
            self._squares |= dict(zip(lazy, numbers, strict=True))


def first_non_finite(arrays: Mapping[str, mx.array]) -> str | None:
    """Name of the first array that holds a NaN or an infinity, or None."""
    if mx.default_device() == mx.cpu:
        return next((name for name, x in arrays.items() if not _is_finite(x)), None)
    flags = [mx.isfinite(array).all() for array in arrays.values()]
    answers = mx.stack(flags).tolist() if flags else []
    return next((name for name, flag in zip(arrays, answers, strict=True) if not flag), None)


def _square(array: mx.array) -> float:
    """Sum of squares; finite if the array is."""
    numbers = _numbers(array).ravel(order="K")  # in the order of memory, so that none is copied
    found = float(numbers @ numbers)
    if not math.isfinite(found) and np.isfinite(numbers).all():
        numbers = numbers.astype(np.float64)
        found = float(numbers @ numbers)
    return found


def _is_finite(array: mx.array) -> bool:
    return bool(np.isfinite(_numbers(array)).all())


def _numbers(array: mx.array) -> np.ndarray:
    """The array for NumPy, which counts in 16 bits slowly or not at all."""
    if array.dtype in (mx.bfloat16, mx.float16):
        array = array.astype(mx.float32)
    return np.array(array, copy=False)
