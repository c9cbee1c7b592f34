"""The one check that keeps NaN and infinity out of parameters and files."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np


class FiniteCheck:
    """Checks whether all arrays of a step are finite, with one evaluation at its end."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._flags: list[mx.array | bool] = []

    def add(self, arrays: Mapping[str, mx.array]) -> None:
        """Check more evaluated arrays; on a GPU in the background."""
        self._names += arrays
        if mx.default_device() == mx.cpu:  # NumPy takes a tenth of the time for small arrays
            self._flags += [_is_finite(array) for array in arrays.values()]
        elif arrays:
            self._flags += [mx.isfinite(array).all() for array in arrays.values()]
            mx.async_eval(self._flags[-len(arrays) :])

    def first_bad(self) -> str | None:
        """Return the name of the first array with a NaN or an infinity, or None; start anew."""
        names, flags = self._names, self._flags
        self._names, self._flags = [], []
        if flags and isinstance(flags[0], mx.array):
            flags = mx.stack(flags).tolist()
        return next((name for name, flag in zip(names, flags, strict=True) if not flag), None)


def _is_finite(array: mx.array) -> bool:
    if array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    return bool(np.isfinite(np.array(array, copy=False)).all())


def first_non_finite(arrays: Mapping[str, mx.array]) -> str | None:
    """Return the name of the first array with a NaN or an infinity, or None."""
    finite = FiniteCheck()
    finite.add(arrays)
    return finite.first_bad()
