"""Single blocks computed by plain MLX, and the calls by which a model runs its blocks."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.block_list import BlockList, array_slots, bind_arrays
from mlx_edgelora.blocks.call_form import StandardBlock
from mlx_edgelora.blocks.masks import band_of, causal_array
from mlx_edgelora.blocks.outputs import Linked, map_leaves
from mlx_edgelora.blocks.trained import is_adapter
from mlx_edgelora.blocks.weight_source import WeightSource
from mlx_edgelora.model.weights import cast

Arrays = dict[str, mx.array]


class OneBlockModel(nn.Module):
    """A model with a single block of another model, called with the same arguments as there.

    The block's input is random noise plus the parameter `shift`. It is trained, so that its
    gradient is that of the block's input.

    Args:
        blocks: blocks of the original model.
        index: index of the block.
        dtype: dtype of the block's input.
        shape: shape of the block's input, [rows, tokens, width].
        window: window of a causal mask that replaces the model's mask; None keeps the mask.
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
        """The block's output for int tokens [rows, tokens], of which only the shape matters."""
        args, kwargs = self.call(tokens)
        return self.hidden(self.block(self.input(tokens), *args, **kwargs))

    def block(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block as a function (`BlockList.function`)."""
        block, form = self.layers[0], self._others[0].call_form
        return (block if form is None else StandardBlock(block, form))(*args, **kwargs)

    def hidden(self, out: Any) -> mx.array:
        """The hidden state of what the block returned."""
        return self._others[0].outputs(self._index, out)[0]

    def block_list(self) -> BlockList:
        """The list of this block, which is known to return what it returns in its model."""
        blocks, form = BlockList(self), self._others[0].forms[self._index]
        blocks.forms = [form and replace(form, read=())]
        blocks.call_form = self._others[0].call_form
        return blocks

    def input(self, tokens: mx.array) -> mx.array:
        """The block's input, which replaces the embedded tokens."""
        rows, count = tokens.shape
        shape = (rows, count, self.shift.shape[-1])
        noise = mx.random.normal(shape, key=mx.random.key(self._index)).astype(self.shift.dtype)
        return noise + self.shift[:rows, :count]

    def call(self, tokens: mx.array) -> tuple[tuple, dict]:
        """The arguments after the input with which the original model calls the block.

        What it reads of earlier blocks is random.
        """
        _, args, kwargs = recorded_calls(self._others[0], tokens)[self._index]
        self._count = tokens.shape[1]
        return (
            tuple(map_leaves(_detached, self._shorten(value)) for value in args),
            {k: map_leaves(_detached, self._shorten(value)) for k, value in kwargs.items()},
        )

    def _shorten(self, value: Any) -> Any:
        if self._window is None or not isinstance(value, mx.array | str) or band_of(value) is None:
            return value
        count = self._count
        return causal_array(range(count), count, min(self._window, count))


def _detached(leaf: Any) -> Any:
    return Linked(leaf, None, leaf.token_axis) if isinstance(leaf, Linked) else leaf


class OneBlockWeights:
    """Frozen weights of one block, as a weight source for a `OneBlockModel`.

    Args:
        source: weight source of the original model.
        index: index of the block in that model.
        block: the block.
        dtype: floating-point weights are cast to this dtype; None keeps theirs.
    """

    def __init__(
        self, source: WeightSource, index: int, block: nn.Module, dtype: mx.Dtype | None
    ) -> None:
        self._source, self._index, self._block, self._dtype = source, index, block, dtype

    def block(self, index: int, own_memory: bool = False) -> Arrays:
        """The block's frozen arrays by name; empty if the block holds them itself."""
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
        """Do nothing: there is only one block."""

    def close(self) -> None:
        """Do nothing: the original model's source stays open."""


class RandomAdapters:
    """Random values for the trainable parameters of a block."""

    def __init__(self, block: nn.Module) -> None:
        self._arrays = {
            name: random_adapter(name, value)
            for name, value in tree_flatten(block.trainable_parameters())
        }

    def cast(self, dtype: mx.Dtype) -> "RandomAdapters":
        """The same values with trained weights of the block itself in another dtype."""
        other = copy(self)
        other._arrays = {
            name: value if is_adapter(name) else value.astype(dtype)
            for name, value in self._arrays.items()
        }
        return other

    def block(self, index: int, own_memory: bool = False) -> Arrays:
        """Evaluated arrays by their names in the block."""
        mx.eval(self._arrays)
        return dict(self._arrays)

    def prefetch(self, index: int) -> None:
        """Do nothing: the arrays are in memory."""

    def close(self) -> None:
        """Do nothing: the arrays stay in memory."""


def random_adapter(name: str, value: mx.array) -> mx.array:
    """Random values like a parameter; B is small, so that LoRA adds less than the layer's output.

    Args:
        name: name of the parameter, also the seed.
        value: gives shape and dtype.
    """
    noise = mx.random.normal(value.shape, key=mx.random.key(len(name)))
    size = 0.01 if name.endswith("lora_b") else max(value.shape[-2:]) ** -0.5
    return (size * noise).astype(value.dtype)


def recorded_calls(blocks: BlockList, tokens: mx.array) -> list[tuple[mx.array, tuple, dict]]:
    """The call of each block as the walk intercepts it: (input, args, kwargs), first to last."""
    calls = []

    def record(*call: Any) -> mx.array:
        calls.append(call[1:])
        return call[1]

    with blocks.intercept(record):
        blocks.model(tokens)
    return calls


def plain_calls(blocks: BlockList, tokens: mx.array) -> dict[int, dict[str, Any]]:
    """The arguments of each block's call, by block index and name, found by Python's profiler.

    No call is intercepted. The blocks are called with zeros as weights and are not evaluated.
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
            # Only the first call counts: a class may call `__call__` of its base class.
            found.setdefault(index, {name: values[name] for name in names[1:]})

    before = sys.getprofile()
    with ExitStack() as stack:
        for block in blocks.blocks:
            slots = array_slots(block)
            zeros = {n: mx.zeros(box[key].shape, box[key].dtype) for n, (box, key) in slots.items()}
            stack.enter_context(bind_arrays(slots, zeros))
        # A profiler written in C, such as cProfile's, is no function that Python could call.
        is_function = before is None or callable(before)
        stack.callback(partial(sys.setprofile, before) if is_function else before.enable)
        sys.setprofile(look)
        blocks.model(tokens)
    return found


def _is_python(block: nn.Module) -> bool:
    return hasattr(type(block).__call__, "__code__")


def named_arguments(block: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of a block's call by parameter name, defaults included; the input is None."""
    function = type(block).__call__
    call = inspect.signature(function, follow_wrapped=False).bind(block, None, *args, **kwargs)
    call.apply_defaults()
    return dict(list(call.arguments.items())[1:])


@contextmanager
def plain_classes(modules: Sequence[nn.Module], unpack: bool = False) -> Iterator[None]:
    """Give modules their original classes of MLX and mlx-lm; undone on exit.

    Args:
        modules: the modules; those inside them are included.
        unpack: on a CPU, multiply by whole dequantized matrices. This is 20 times faster there
            and more exact for long sums, but takes more memory.
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
    """A quantized layer that multiplies by the whole dequantized matrix."""

    def __call__(self, x: mx.array) -> mx.array:
        y = _product(self, x)
        return y + self["bias"] if "bias" in self else y


class _UnpackedEmbedding(nn.QuantizedEmbedding):
    """A quantized embedding that, as a head, multiplies by the whole dequantized matrix."""

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(self, x)


UNPACKED = {nn.QuantizedLinear: _UnpackedLinear, nn.QuantizedEmbedding: _UnpackedEmbedding}


def _product(layer: nn.Module, x: mx.array) -> mx.array:
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    packed = layer["weight"], layer["scales"], layer.get("biases")
    return x @ mx.dequantize(*packed, **settings).astype(x.dtype).T
