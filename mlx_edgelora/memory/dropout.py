"""Dropout whose masks are the same when a block is computed a second time.

`nn.Dropout` draws from a global generator at every call, so a block recomputed in the
backward pass gets another mask and its gradients are silently wrong (`mx.checkpoint`
has this flaw). Here each call draws its key from the same generator in the same order,
so that masks equal those of plain MLX, and the key is kept for the second time.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn


class KeyTape:
    """The keys of the dropout calls of one segment: drawn and kept, or played back."""

    def __init__(self) -> None:
        self._keys: list[mx.array] | None = None
        self._playback: Iterator[mx.array] | None = None

    def next(self) -> mx.array:
        """Give the key of the next call, uint32 [2]."""
        if self._playback is not None and (key := next(self._playback, None)) is not None:
            return key
        key = mx.random.split(mx.random.state[0])[1]
        mx.random.uniform()  # unused and never computed: it moves the generator as a mask would
        if self._keys is not None:
            self._keys.append(key)
        return key

    @contextmanager
    def recording(self) -> Iterator[list[mx.array]]:
        """Keep the keys drawn from here on in the list that is given back."""
        before, self._keys = self._keys, []
        try:
            yield self._keys
        finally:
            self._keys = before

    @contextmanager
    def playing(self, keys: Iterable[mx.array]) -> Iterator[None]:
        """Give these keys, in order, and draw again when they have run out."""
        before, self._playback = self._playback, iter(keys)
        try:
            yield
        finally:
            self._playback = before


class _KeyedDropout(nn.Dropout):
    def __call__(self, x: mx.array) -> mx.array:
        if self._p_1 == 1 or not self.training:
            return x
        mask = mx.random.bernoulli(self._p_1, x.shape, key=self._tape.next())
        return (mask * x) * (1 / self._p_1)


@contextmanager
def keyed_dropout(model: nn.Module, tape: KeyTape) -> Iterator[None]:
    """Give every `nn.Dropout` of the model its keys from one tape; undone on exit."""
    # By identity: a layer that hangs in two places is one layer.
    layers = {id(m): m for m in model.modules() if type(m) is nn.Dropout}.values()
    for layer in layers:
        object.__setattr__(layer, "_tape", tape)
        object.__setattr__(layer, "__class__", _KeyedDropout)
    try:
        yield
    finally:
        for layer in layers:
            object.__setattr__(layer, "__class__", nn.Dropout)
            object.__delattr__(layer, "_tape")
