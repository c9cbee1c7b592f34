"""What a block is: finding the list of them in any model, standing in for them, their arrays.

Nothing here names an architecture. The model's own `__call__` does embedding,
scaling and masks; each block in its list is replaced, for the length of a call,
by an interceptor that sees the arguments. `check_walk` proves beforehand that a
model can be walked this way, and refuses by name one that cannot.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_edgelora.errors import EdgeLoraError

# handler(index, x, args, kwargs) -> what the model's loop goes on with
Handler = Callable[[int, mx.array, tuple, dict], mx.array]
# Where an array hangs: its container (a module or a plain dict or list) and its key.
Slot = tuple[Any, Any]


class BlockList:
    """The list of decoder blocks of a model, found by what it holds, not by its name.

    Attributes:
        model: the model it was found in.
        blocks: the blocks, first to last.
        prefix: their names' beginning among the model's parameters, as in
            `model.layers.`: block 3 owns every parameter under `model.layers.3.`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        wanted = {id(block) for block in model.layers}
        for path, module in model.named_modules():
            for key, value in module.items():
                if isinstance(value, list) and wanted and wanted <= {id(v) for v in value}:
                    self._owner, self._key = module, key
                    self.blocks: list[nn.Module] = list(value)
                    self.prefix = ".".join(filter(None, [path, key])) + "."
                    return
        raise EdgeLoraError(
            f"{type(model).__module__}: no list of blocks was found, expected one list that "
            "holds what model.layers returns; this architecture cannot be trained block by block"
        )

    def __len__(self) -> int:
        return len(self.blocks)

    def local(self, name: str) -> tuple[int, str] | None:
        """Split a parameter's name into block index and name inside it; None outside the blocks."""
        if not name.startswith(self.prefix):
            return None
        index, _, rest = name[len(self.prefix) :].partition(".")
        return int(index), rest

    @contextmanager
    def intercepted(self, handler: Handler) -> Iterator[None]:
        """Let calls of every block reach `handler` instead; undone on exit, on error too."""
        self._owner[self._key] = [
            _Interceptor(index, block, handler) for index, block in enumerate(self.blocks)
        ]
        try:
            yield
        finally:
            self._owner[self._key] = list(self.blocks)

    @contextmanager
    def returning(self, hidden: mx.array) -> Iterator[None]:
        """Skip every block: the last one returns `hidden`, so a call of the model is its tail."""
        last = len(self.blocks) - 1
        with self.intercepted(lambda index, x, args, kwargs: hidden if index == last else x):
            yield


class _Interceptor:
    """Stands in the list for a block: its attributes are the block's, its call the handler's."""

    def __init__(self, index: int, block: nn.Module, handler: Handler) -> None:
        self._index, self._block, self._handler = index, block, handler

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return self._handler(self._index, x, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


def array_slots(module: nn.Module) -> dict[str, Slot]:
    """Name every array a module holds, private ones (rotary frequencies) included."""
    slots: dict[str, Slot] = {}

    def visit(container: Any, path: str) -> None:
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in items:
            name = f"{path}.{key}" if path else str(key)
            if isinstance(value, mx.array):
                slots[name] = (container, key)
            elif isinstance(value, dict | list):
                visit(value, name)

    visit(module, "")
    return slots


@contextmanager
def bound(slots: Mapping[str, Slot], values: Mapping[str, mx.array]) -> Iterator[None]:
    """Put `values` where the slots of the same names are; undone on exit, on error too."""
    before = {}
    for name, value in values.items():
        container, key = slots[name]
        before[name] = container[key]
        container[key] = value
    try:
        yield
    finally:
        for name, value in before.items():
            container, key = slots[name]
            container[key] = value


def signature(block: nn.Module) -> str:
    """Hash all that makes two blocks the same function of their arrays.

    Classes, the tree of modules, and every attribute that is not an array. Two
    blocks of one signature may share one compiled function; an attribute whose
    value is unknown to us (any object) makes a block differ from all others.
    """
    parts = []
    for path, module in sorted(block.named_modules(), key=lambda item: item[0]):
        attributes = sorted((key, _fingerprint(value)) for key, value in vars(module).items())
        plain = sorted(
            (key, type(value).__name__) for key, value in module.items() if value is not None
        )
        parts.append((path, type(module).__qualname__, id(type(module)), attributes, plain))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _fingerprint(value: Any) -> str:
    if isinstance(value, set | frozenset):
        return repr(sorted(map(_fingerprint, value)))
    if isinstance(value, bool | int | float | str | None | tuple):
        return repr(value)
    if hasattr(value, "__dataclass_fields__"):
        return repr(value)
    return f"{type(value).__qualname__} at {id(value)}"


def check_walk(blocks: BlockList) -> None:
    """Prove that the model can be walked block by block, or refuse it by name.

    The model's loop is run once on four tokens with blocks that return NaN: each
    must be called once, in order, on exactly what the one before returned, and no
    other argument may become NaN (state handed from block to block would carry a
    gradient that a walk does not see). Then each block's own graph is built: it
    must return one array of its input's shape and leave its attributes alone.
    Nothing but such arguments is evaluated, so no weights are read.

    Raises:
        EdgeLoraError: names the architecture, the block and the reason.
    """
    model = blocks.model
    calls: list[tuple[int, mx.array, tuple, dict]] = []
    returned: list[mx.array] = []

    def poison(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        calls.append((index, x, args, kwargs))
        returned.append(mx.full(x.shape, float("nan"), x.dtype))
        return returned[-1]

    with blocks.intercepted(poison):
        model(mx.array([[1, 2, 3, 4]]))
    order = [index for index, *_ in calls]
    if order != list(range(len(blocks))):
        raise _refusal(blocks, 0, f"blocks are called in the order {order[:8]}...")
    for index, x, args, kwargs in calls:
        if index and x is not returned[index - 1]:
            raise _refusal(blocks, index, "its input is not what the block before returned")
        if any(_has_nan(value) for _, value in tree_flatten((args, kwargs))):
            raise _refusal(blocks, index, "it shares state with earlier blocks")
        _check_block(blocks, index, mx.zeros(x.shape, x.dtype), args, kwargs)


def _check_block(blocks: BlockList, index: int, x: mx.array, args: tuple, kwargs: dict) -> None:
    block = blocks.blocks[index]
    before = _identity(block)
    out = block(x, *args, **kwargs)
    if not isinstance(out, mx.array):
        raise _refusal(blocks, index, f"it returns a {type(out).__name__}, not one array")
    if out.shape != x.shape:
        raise _refusal(blocks, index, f"it maps {x.shape} to {out.shape}")
    if _identity(block) != before:
        raise _refusal(blocks, index, "it changes its own attributes when called")


def _identity(block: nn.Module) -> list:
    arrays = [(name, id(box[key])) for name, (box, key) in array_slots(block).items()]
    plain = [(path, key, id(v)) for path, m in block.named_modules() for key, v in vars(m).items()]
    return arrays + plain


def _has_nan(value: Any) -> bool:
    return (
        isinstance(value, mx.array)
        and mx.issubdtype(value.dtype, mx.floating)
        and bool(mx.isnan(value).any().item())
    )


def _refusal(blocks: BlockList, index: int, reason: str) -> EdgeLoraError:
    architecture = type(blocks.model).__module__.rpartition(".")[2]
    return EdgeLoraError(
        f"{architecture}: block {index} ({type(blocks.blocks[index]).__name__}) cannot be trained "
        f"block by block: {reason}; train this architecture with mlx_lm.lora"
    )
