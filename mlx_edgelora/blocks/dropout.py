"""Dropout with the same masks when a block is recomputed.

`nn.Dropout` draws from a global generator at every call, so a block that is recomputed in the
backward gets another mask and silently wrong gradients (`mx.checkpoint` has this flaw). Here each
call draws its key from the same generator in the same order, so that masks equal those of plain
MLX, and the key is recorded for the recomputation.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn


class KeyTape:
    """The keys of the dropout calls of one segment: drawn and recorded, or played back.

    Attributes:
        is_used: whether any layer draws keys.
    """

    def __init__(self) -> None:
        self.is_used = False
        self._keys: list[mx.array] | None = None
        self._playback: Iterator[mx.array] | None = None

    def next(self) -> mx.array:
        """The key of the next call, uint32 [2]."""
        if self._playback is not None and (key := next(self._playback, None)) is not None:
            return key
        key = mx.random.split(mx.random.state[0])[1]
        mx.random.uniform()  # never computed: it advances the generator as a mask would
        if self._keys is not None:
            self._keys.append(key)
        return key

    @contextmanager
    def recording(self) -> Iterator[list[mx.array]]:
        """Record the keys that are drawn in the returned list."""
        before, self._keys = self._keys, []
        try:
            yield self._keys
        finally:
            self._keys = before

    @contextmanager
    def playing(self, keys: Iterable[mx.array]) -> Iterator[None]:
        """Use these keys in order, then draw new ones."""
        before, self._playback = self._playback, iter(keys)
        try:
            yield
        finally:
            self._playback = before


class _KeyedDropout(nn.Dropout):
    def __call__(self, x: mx.array) -> mx.array:
        mask = mx.random.bernoulli(self._p_1, x.shape, key=self._tape.next())
        return (mask * x) * (1 / self._p_1)


def dropout_layers(model: nn.Module) -> list[nn.Dropout]:
    """Every `nn.Dropout` of a model, each once."""
    return list({id(m): m for m in model.modules() if type(m) is nn.Dropout}.values())


@contextmanager
def keyed_dropout(layers: Sequence[nn.Dropout], tape: KeyTape) -> Iterator[None]:
    """Let dropout layers take their keys from a tape; undone on exit."""
    layers = [layer for layer in layers if layer.training and layer._p_1 != 1]
    before, tape.is_used = tape.is_used, bool(layers)
    for layer in layers:
        object.__setattr__(layer, "_tape", tape)
        object.__setattr__(layer, "__class__", _KeyedDropout)
    try:
        yield
    finally:
        tape.is_used = before
        for layer in layers:
            object.__setattr__(layer, "__class__", nn.Dropout)
            object.__delattr__(layer, "_tape")


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch dropout off during a trial: it would advance MLX's generator; undone on exit."""
    layers = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.training]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()


@contextmanager
def restore_generator() -> Iterator[None]:
    """Restore MLX's random number generator on exit."""
    high, low = mx.random.state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)  # a key consists of the two halves of a seed
