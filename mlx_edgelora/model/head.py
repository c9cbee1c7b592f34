"""Find the vocabulary head of any model by what it does, and read it by rows.

The head is the matrix outside the blocks whose output becomes the logits: if its output has fewer
columns, the model returns as few logits. The layers before it (final norm) and after it (logit
scaling, soft-capping) stay the model's own code. The same matrix may be the token embedding, of
which only the batch's rows are needed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.lora import LoRAEmbedding
from mlx_lm.tuner.lora import LoRALinear as MlxLoRALinear

from mlx_edgelora.blocks.block_list import BlockList, bind_arrays
from mlx_edgelora.blocks.dropout import without_dropout
from mlx_edgelora.blocks.refusals import Refusal, refusal_error
from mlx_edgelora.layers.dequantize import dequantize
from mlx_edgelora.layers.linear import DequantizedEmbedding
from mlx_edgelora.losses.exact import Gradients
from mlx_edgelora.losses.head import Adapter, Arrays, Tile
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.model.weights import cast
from mlx_edgelora.storage.safetensors import RowReader

MATRICES = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
ADAPTED = (MlxLoRALinear, LoRAEmbedding)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding, LoRAEmbedding)
# Parameters of such a module; each of their rows belongs to one token.
ROW_NAMES = ("weight", "scales", "biases", "bias")
# Size of the pieces in which embeddings are looked up, because unpacking takes several of them.
LOOKUP_BYTES = 2**20
# Allowed difference of a token's logits, relative to their norm: one product may use TF32 and the
# other not. The relative error of a single logit near zero may be far larger.
ROUNDING = 5e-3


class HeadRows(Protocol):
    """Rows of a module's parameters, by parameter name."""

    def slice(self, start: int, stop: int) -> Arrays:
        """Rows `start` to `stop` of every parameter."""

    def take(self, indices: mx.array) -> Arrays:
        """The rows named by `indices`, int [m]."""


class ResidentRows:
    """Rows of a module that is in memory."""

    def __init__(self, module: nn.Module) -> None:
        self._arrays = {n: module[n] for n in ROW_NAMES if module.get(n) is not None}

    def slice(self, start: int, stop: int) -> Arrays:
        """Rows `start` to `stop` of every parameter, without a copy."""
        return {name: array[start:stop] for name, array in self._arrays.items()}

    def take(self, indices: mx.array) -> Arrays:
        """Gather the rows named by `indices`, int [m]."""
        return {name: array[indices] for name, array in self._arrays.items()}


class StreamedRows:
    """Rows of a module that stays on disk."""

    def __init__(
        self, readers: Mapping[str, RowReader], dtype: mx.Dtype | None, meter: DiskMeter
    ) -> None:
        self._readers, self._dtype, self._meter = readers, dtype, meter

    @property
    def columns(self) -> int:
        """Columns of the stored matrix, packed if it is quantized."""
        return self._readers["weight"].shape[1]

    def slice(self, start: int, stop: int) -> Arrays:
        """Read rows `start` to `stop` of every parameter."""
        return self._count_and_cast({n: r.slice(start, stop) for n, r in self._readers.items()})

    def take(self, indices: mx.array) -> Arrays:
        """Read the rows named by `indices`, int [m], each different one once."""
        rows, places = np.unique(np.array(indices), return_inverse=True)
        read = self._count_and_cast({n: r.take(rows) for n, r in self._readers.items()})
        if len(rows) == len(places) and (places[:-1] < places[1:]).all():
            return read
        return {name: array[mx.array(places)] for name, array in read.items()}

    def _count_and_cast(self, arrays: Arrays) -> Arrays:
        self._meter.add_read(sum(array.nbytes for array in arrays.values()))
        return {name: self.cast(array) for name, array in arrays.items()}

    def cast(self, array: mx.array) -> mx.array:
        """Cast floating rows to the requested dtype."""
        return array if self._dtype is None else cast(array, self._dtype)


class _StreamedLookup:
    """Lookup of tokens in an embedding that stays on disk; only their rows are read."""

    def __call__(self, x: mx.array) -> mx.array:
        """Map int tokens [...] to embeddings [..., dims].

        Memory in addition to the result: the packed rows and some pieces of `LOOKUP_BYTES`, if it
        is evaluated by `meter.eval_without_run_ahead`.
        """
        tokens = np.array(x).reshape(-1)
        packed = isinstance(self, nn.QuantizedEmbedding)
        width = self._rows.columns * (32 // self.bits if packed else 1)
        step = max(1, LOOKUP_BYTES // (4 * width))
        whole = piece = self._looked_up(tokens[:step], None)
        if tokens.size > step:
            whole = mx.zeros((tokens.size, piece.shape[1]), piece.dtype)
            whole[:step] = piece
        for start in range(step, tokens.size, step):
            # Written before the next piece is made, and in place if MLX does not run ahead.
            whole[start : start + step] = self._looked_up(tokens[start : start + step], whole)
        return whole.reshape(*x.shape, whole.shape[1])

    def _looked_up(self, tokens: np.ndarray, after: mx.array | None) -> mx.array:
        """The embeddings of int [m] as [m, dims], computed after `after`."""
        rows = self._rows.take(mx.array(tokens))
        if after is not None:
            rows = dict(zip(rows, mx.depends(list(rows.values()), [after]), strict=True))
        if "scales" not in rows:
            return rows["weight"]
        settings = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        return self._rows.cast(dequantize(*rows.values(), **settings))


class StreamedEmbedding(_StreamedLookup, nn.Embedding):
    """An embedding on disk."""


class StreamedQuantizedEmbedding(_StreamedLookup, DequantizedEmbedding):
    """A packed embedding on disk; bound to a tile of its rows, it is a head for that tile."""


def stream_embedding(module: nn.Module, rows: StreamedRows) -> None:
    """Turn an embedding in place into one that reads its rows from disk."""
    packed = isinstance(module, nn.QuantizedEmbedding)
    object.__setattr__(module, "_rows", rows)
    kind = StreamedQuantizedEmbedding if packed else StreamedEmbedding
    object.__setattr__(module, "__class__", kind)


def cast_lookups(modules: Iterable[nn.Module], dtype: mx.Dtype) -> None:
    """Let packed embeddings return their rows in a dtype, in place.

    Otherwise fp4 and fp8 embeddings return bfloat16, and others the dtype of their scales.
    """
    for module in modules:
        if isinstance(module, nn.QuantizedEmbedding) and module.mode != "affine":
            object.__setattr__(module, "_row_dtype", dtype)
            object.__setattr__(module, "__class__", _casting_kind(type(module)))


@cache
def _casting_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """A cached class, as in `_replaced_class`."""
    call = kind.__call__
    return type(
        kind.__name__, (kind,), {"__call__": lambda self, x: call(self, x).astype(self._row_dtype)}
    )


class ModelHead:
    """The head of a model, with the layers before and after it: a `losses.head.Head`.

    Args:
        blocks: the blocks of the model.
        module: the head, adapted or not.
        rows: its frozen parameters.
    """

    tail = None

    def __init__(self, blocks: BlockList, module: nn.Module, rows: HeadRows) -> None:
        self._blocks, self._module, self._rows = blocks, module, rows
        self._matrix = frozen_matrix(module)
        self.vocabulary, packed = self._matrix["weight"].shape
        self.dims = packed * 32 // self._matrix.bits if "scales" in self._matrix else packed
        self._width = _width(blocks)
        marker = mx.zeros((1, 2, 3))
        self.logits_transform = (
            None if self._logits_of(marker) is marker else self._transform_logits
        )

    @property
    def adapter(self) -> Adapter | None:
        """The current adapter of the head; None without one."""
        if not isinstance(self._module, ADAPTED):
            return None
        a, b, scale = self._module.lora_a, self._module.lora_b, self._module.scale
        if isinstance(self._module, LoRAEmbedding):
            return Adapter(b, a, scale)
        return Adapter(a.T, b.T, scale)

    @property
    def module(self) -> nn.Module:
        """The head, adapted or not."""
        return self._module

    @property
    def is_resident(self) -> bool:
        """Whether its rows are in memory."""
        return isinstance(self._rows, ResidentRows)

    def gradients_by_name(self, gradients: Gradients) -> Arrays:
        """Gradients of the adapter by the names of the model's parameters; empty without one."""
        if gradients.up is None:
            return {}
        return self._by_name(gradients.down, gradients.up)

    def adapter_arrays(self, count: int) -> Arrays:
        """The adapter of the first `count` rows, by the same names; empty without one."""
        adapter = self.adapter
        return {} if adapter is None else self._by_name(adapter.down, adapter.up[:count])

    def _by_name(self, down: mx.array, up: mx.array) -> Arrays:
        a, b = (up, down) if isinstance(self._module, LoRAEmbedding) else (down.T, up.T)
        path = next(n for n, m in self._blocks.model.named_modules() if m is self._module)
        return {f"{path}.lora_a": a, f"{path}.lora_b": b}

    def slice(self, start: int, stop: int) -> Arrays:
        """Rows `start` to `stop`, from memory or disk."""
        return self._rows.slice(start, stop)

    def take(self, indices: mx.array) -> Arrays:
        """The rows named by `indices`, int [m]."""
        return self._rows.take(indices)

    def unpack(self, rows: Arrays) -> Tile:
        """Dequantize in float32."""
        bias = rows["bias"].astype(mx.float32) if "bias" in rows else None
        if "scales" not in rows:
            return Tile(rows["weight"].astype(mx.float32), bias)
        packed = [rows["weight"], cast(rows["scales"], mx.float32)]
        if "biases" in rows:
            packed.append(cast(rows["biases"], mx.float32))
        m = self._matrix
        weight = dequantize(*packed, group_size=m.group_size, bits=m.bits, mode=m.mode)
        return Tile(weight.astype(mx.float32), bias)

    def final_norm(self, hidden: mx.array, tokens: mx.array | None = None) -> mx.array:
        """Map last hidden states [n, width] to the input of the matrix, [n, dims].

        Args:
            hidden: hidden states of any tokens.
            tokens: int [n], these tokens; only for the check that the result does not depend on
                them.
        """
        reached: list[mx.array] = []

        def reach(x: mx.array) -> mx.array:
            reached.append(x)
            return x[..., :1]

        tokens = mx.zeros(hidden.shape[0], mx.int32) if tokens is None else tokens
        with replace_output(self._module, reach), self._blocks.skip_blocks(hidden[None]):
            self._blocks.model(tokens[None])
        return reached[0][0]

    def check_rows(self) -> None:
        """Check that the layers after the blocks work token by token.

        Raises:
            EdgeLoraError: they do not, so they cannot be computed for labelled tokens only.
        """
        check_rows(self._blocks, self.final_norm)
        if self.logits_transform is not None:
            check_rows(self._blocks, lambda products, _: self.logits_transform(products), 5)

    def is_separable(self) -> bool:
        """Whether this head gives the model's logits, each computed from its own row only."""
        hidden = mx.random.normal((2, self._width), key=mx.random.key(0))
        half = min(8, self.vocabulary // 2)
        x = self.final_norm(hidden).astype(mx.float32)
        products = []
        for start in (0, half):
            tile = self.unpack(self.slice(start, start + half))
            up = None if self.adapter is None else self.adapter.up[start : start + half]
            y = x @ tile.weight.T + (0.0 if tile.bias is None else tile.bias)
            if up is not None:
                y = y + self.adapter.scale * (x @ self.adapter.down.T) @ up.T
            products.append(y)
        parts = [p if self.logits_transform is None else self.logits_transform(p) for p in products]
        own = self.own_logits(hidden, 2 * half).astype(mx.float32)
        off, size = (
            mx.linalg.norm(value, axis=-1)
            for value in (own - mx.concatenate(parts, axis=-1).astype(mx.float32), own)
        )
        return bool((off <= ROUNDING * size).all().item())  # NaN is no agreement

    def _transform_logits(self, products: mx.array) -> mx.array:
        return self._logits_of(products[None])[0]

    def _logits_of(self, products: mx.array) -> mx.array:
        """The model's logits if the product with its head is `products` [1, n, m]."""
        hidden = mx.zeros((*products.shape[:2], self._width))
        with replace_output(self._module, lambda x: products), self._blocks.skip_blocks(hidden):
            return self._blocks.model(mx.zeros(products.shape[:2], mx.int32))

    def own_logits(self, hidden: mx.array, count: int) -> mx.array:
        """The model's own first `count` logits, with only these rows bound to its head.

        Args:
            hidden: last hidden states, [n, width].
            count: number of logits.

        Returns:
            [n, count], differentiable in `hidden` and in the adapter of the head; in the dtype of
            `hidden`, to which the rows are cast.
        """
        rows = self.slice(0, count)
        values = {name: cast(array, hidden.dtype) for name, array in rows.items()}
        slots = {name: (self._matrix, name) for name in values}
        if self.adapter is not None:
            embeds = isinstance(self._module, LoRAEmbedding)
            name, up = ("lora_a" if embeds else "lora_b"), self.adapter.up[:count]
            slots[name], values = (self._module, name), values | {name: up if embeds else up.T}
        with bind_arrays(slots, values), self._blocks.skip_blocks(hidden[None]):
            return self._blocks.model(mx.zeros((1, hidden.shape[0]), mx.int32))[0]


def check_rows(
    blocks: BlockList, tail: Callable[[mx.array, mx.array], mx.array], width: int | None = None
) -> None:
    """Check that a function of last hidden states and tokens works token by token.

    Args:
        blocks: the model's blocks, for the error.
        tail: hidden states [n, width] and tokens int [n] -> [n, ...].
        width: of the hidden states; the model's by default.

    Raises:
        EdgeLoraError: a row of the result depends on its place, on other rows, or on the tokens.
    """
    rows = mx.random.normal((4, width or _width(blocks)), key=mx.random.key(2))
    with without_dropout(blocks.model):
        whole = tail(rows, mx.arange(1, 5)).astype(mx.float32)
        single = [tail(rows[i : i + 1], mx.zeros(1, mx.int32)).astype(mx.float32) for i in range(4)]
    difference = mx.linalg.norm(whole - mx.concatenate(single))
    if not (difference <= 1e-2 * mx.linalg.norm(whole)).item():
        raise refusal_error(blocks.model, Refusal.TOKENS)


def frozen_matrix(module: nn.Module) -> nn.Module:
    """The matrix of a module, which may be an adapter around it."""
    return module.get("linear") or module.get("embedding") or module


@contextmanager
def replace_output(module: nn.Module, answer: Callable[[mx.array], mx.array]) -> Iterator[None]:
    """Let a linear layer, or an embedding used as one, return `answer(x)`; undone on exit."""
    kind, before = type(module), vars(module).get("_answer")
    object.__setattr__(module, "_answer", answer)
    object.__setattr__(module, "__class__", _replaced_class(kind))
    try:
        yield
    finally:
        object.__setattr__(module, "__class__", kind)
        object.__setattr__(module, "_answer", before)
        if before is None:
            object.__delattr__(module, "_answer")


@cache
def _replaced_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A cached class: a class is part of a reference cycle and would not be freed at once."""
    method = "as_linear" if issubclass(kind, EMBEDDINGS) else "__call__"
    return type(kind.__name__, (kind,), {method: lambda self, x: self._answer(x)})


def find_head(blocks: BlockList) -> nn.Module | None:
    """Find the one module that computes logits from hidden states; None if there is none.

    Only shapes are used; nothing is evaluated.
    """
    hidden = mx.zeros((1, 2, _width(blocks)))
    for module in blocks.modules_outside():
        if not isinstance(module, MATRICES + ADAPTED):
            continue
        with replace_output(module, lambda x: mx.zeros((*x.shape[:-1], 3))):
            if _logit_count(blocks, hidden) == 3:
                return module
    return None


def _logit_count(blocks: BlockList, hidden: mx.array) -> int | None:
    try:
        with blocks.skip_blocks(hidden):
            return blocks.model(mx.zeros((1, 2), mx.int32)).shape[-1]
    except ValueError:  # not the head: the next layer cannot take three columns
        return None


def _width(blocks: BlockList) -> int:
    seen: list[int] = []

    def look(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        seen.append(x.shape[-1])
        return x

    with blocks.intercept(look):
        blocks.model(mx.zeros((1, 2), mx.int32))
    return seen[-1]
