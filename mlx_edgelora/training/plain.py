"""Blocks alone, as plain MLX computes them, and how a model calls them."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.block_list import BlockList, array_slots, bind_arrays
from mlx_edgelora.blocks.masks import band_of, causal_array
from mlx_edgelora.blocks.weight_source import WeightSource
from mlx_edgelora.model.weights import cast

Arrays = dict[str, mx.array]


class OneBlockModel(nn.Module):
    """A model of one block of another one, which it calls as that other one does.

    Its input is random, plus `shift`, which is trained, so that a gradient goes through the block
    to its input.

    Args:
        blocks: of the other model.
        index: of the block.
        dtype: of the hidden states there.
        shape: of the hidden states, [rows, tokens, width].
        window: of a causal mask in place of the model's own; None leaves that.
    """

    def __init__(
        self,
        blocks: BlockList,
        index: int,
        dtype: mx.Dtype,
        shape: tuple[int, int, int],
        window: int | None,
    ) -> None:
        super().__init__()
        self.layers = [blocks.blocks[index]]
        self.shift = mx.zeros(shape, dtype)
        self._others, self._index, self._window = [blocks], index, window

    def __call__(self, tokens: mx.array) -> mx.array:
        """Map int tokens [rows, tokens], of which only the number counts, to what it returns."""
        args, kwargs = self.call(tokens)
        return self.layers[0](self.input(tokens), *args, **kwargs)

    def input(self, tokens: mx.array) -> mx.array:
        """The block's input, in the place of embedded tokens."""
        rows, count = tokens.shape
        shape = (rows, count, self.shift.shape[-1])
        noise = mx.random.normal(shape, key=mx.random.key(self._index)).astype(self.shift.dtype)
        return noise + self.shift[:rows, :count]

    def call(self, tokens: mx.array) -> tuple[tuple, dict]:
        """What the other model calls the block with beside its input."""
        _, args, kwargs = recorded_calls(self._others[0], tokens)[self._index]
        self._count = tokens.shape[1]
        return (
            tuple(map(self._shorten, args)),
            {name: self._shorten(value) for name, value in kwargs.items()},
        )

    def _shorten(self, value: Any) -> Any:
        if self._window is None or not isinstance(value, mx.array | str) or band_of(value) is None:
            return value
        count = self._count
        return causal_array(range(count), count, min(self._window, count))


class OneBlockWeights:
    """The frozen weights of one block of a model, as those of a model of one block.

    Args:
        source: of all blocks.
        index, block: which one.
        dtype: floating ones are cast to it; None leaves them.
    """

    def __init__(
        self, source: WeightSource, index: int, block: nn.Module, dtype: mx.Dtype | None
    ) -> None:
        self._source, self._index, self._block, self._dtype = source, index, block, dtype

    def block(self, index: int, own_memory: bool = False) -> Arrays:
        """The block's frozen arrays; empty where it has them."""
        found = self._source.block(self._index, own_memory)
        if self._dtype is None:
            return found
        trained = {name for name, _ in tree_flatten(self._block.trainable_parameters())}
        held = {name: box[key] for name, (box, key) in array_slots(self._block).items()}
        return {
            name: cast(array, self._dtype)
            for name, array in (held | found).items()
            if name not in trained
        }

    def prefetch(self, index: int) -> None:
        """Nothing follows."""

    def close(self) -> None:
        """The source is another's."""


class RandomAdapters:
    """Random values for what is trained of a block."""

    def __init__(self, block: nn.Module) -> None:
        self._arrays = {
            name: random_adapter(name, value)
            for name, value in tree_flatten(block.trainable_parameters())
        }

    def block(self, index: int, own_memory: bool = False) -> Arrays:
        """Evaluated values by their names in the block."""
        mx.eval(self._arrays)
        return dict(self._arrays)

    def prefetch(self, index: int) -> None:
        """They are in memory."""

    def close(self) -> None:
        """They stay."""


def random_adapter(name: str, value: mx.array) -> mx.array:
    """B small beside A: what an adapter adds is less than the layer's own output."""
    noise = mx.random.normal(value.shape, key=mx.random.key(len(name)))
    size = 0.01 if name.endswith("lora_b") else max(value.shape[-2:]) ** -0.5
    return (size * noise).astype(value.dtype)


def recorded_calls(blocks: BlockList, tokens: mx.array) -> list[tuple[mx.array, tuple, dict]]:
    """What the model calls each block with, as the walk learns it: x, args, kwargs."""
    calls = []

    def record(*call: Any) -> mx.array:
        calls.append(call[1:])
        return call[1]

    with blocks.intercept(record):
        blocks.model(tokens)
    return calls


def plain_calls(blocks: BlockList, tokens: mx.array) -> dict[int, dict[str, Any]]:
    """The arguments of each block's call in a plain call of the model, by Python's own profiler.

    Nothing stands in for anything. The blocks compute with zeros for weights, lazily.
    """
    codes = {type(block).__call__.__code__ for block in blocks.blocks if _is_python(block)}
    indices = {id(block): index for index, block in enumerate(blocks.blocks)}
    found: dict[int, dict[str, Any]] = {}

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_code not in codes:
            return
        code, values = frame.f_code, dict(frame.f_locals)
        extra = bool(code.co_flags & inspect.CO_VARARGS) + bool(
            code.co_flags & inspect.CO_VARKEYWORDS
        )
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + extra]
        if (index := indices.get(id(values[names[0]]))) is not None:
            # The first call counts: a class may call that of its base class.
            found.setdefault(index, {name: values[name] for name in names[1:]})

    before = sys.getprofile()
    with ExitStack() as stack:
        for block in blocks.blocks:
            slots = array_slots(block)
            zeros = {n: mx.zeros(box[key].shape, box[key].dtype) for n, (box, key) in slots.items()}
            stack.enter_context(bind_arrays(slots, zeros))
        stack.callback(sys.setprofile, before)
        sys.setprofile(look)
        blocks.model(tokens)
    return found


def _is_python(block: nn.Module) -> bool:
    return hasattr(type(block).__call__, "__code__")


def named_arguments(block: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """A call's arguments by the names that the block's function gives them, defaults included."""
    function = type(block).__call__
    call = inspect.signature(function, follow_wrapped=False).bind(block, None, *args, **kwargs)
    call.apply_defaults()
    return dict(list(call.arguments.items())[1:])


@contextmanager
def plain_classes(modules: Sequence[nn.Module], unpack: bool = False) -> Iterator[None]:
    """Give modules the classes that MLX and mlx-lm made them of; undone on exit.

    Args:
        modules: and all within them.
        unpack: multiply by packed matrices unpacked, on a CPU: 20 times faster there, more exact
            over a long sum, and more memory.
    """
    changed = []
    try:
        for module in {id(m): m for top in modules for m in top.modules()}.values():
            kind = type(module)
            own = next(k for k in kind.__mro__ if not k.__module__.startswith("mlx_edgelora"))
            if unpack and mx.default_device() == mx.cpu:
                own = UNPACKED.get(own, own)
            if own is not kind:
                changed.append((module, kind))
                object.__setattr__(module, "__class__", own)
        yield
    finally:
        for module, kind in changed:
            object.__setattr__(module, "__class__", kind)


class _UnpackedLinear(nn.QuantizedLinear):
    """A packed layer as a product with the whole matrix."""

    def __call__(self, x: mx.array) -> mx.array:
        y = _product(self, x)
        return y + self["bias"] if "bias" in self else y


class _UnpackedEmbedding(nn.QuantizedEmbedding):
    """A packed embedding whose use as a head is a product with the whole matrix."""

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(self, x)


UNPACKED = {nn.QuantizedLinear: _UnpackedLinear, nn.QuantizedEmbedding: _UnpackedEmbedding}


def _product(layer: nn.Module, x: mx.array) -> mx.array:
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    packed = layer["weight"], layer["scales"], layer.get("biases")
    return x @ mx.dequantize(*packed, **settings).astype(x.dtype).T
