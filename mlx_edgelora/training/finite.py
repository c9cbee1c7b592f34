"""The one check that keeps NaN and infinity out of parameters and files."""

from collections.abc import Mapping

import mlx.core as mx


def first_non_finite(arrays: Mapping[str, mx.array]) -> str | None:
    """Name of the first array that holds a NaN or an infinity, or None.

    A sum is non-finite if any term is, and needs no temporary array, so sums screen
    all arrays in one evaluation; only when one of them is suspicious (it may also have
    overflowed) are the arrays looked at one by one.
    """
    if not arrays:
        return None
    sums = mx.stack([mx.sum(array.astype(mx.float32)) for array in arrays.values()])
    if mx.isfinite(sums).all().item():
        return None
    for name, array in arrays.items():
        if not mx.isfinite(array).all().item():
            return name
    return None
