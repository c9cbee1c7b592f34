"""What a block is: finding the list of them in any model, standing in for them, their arrays.

Nothing here names an architecture. The model's own `__call__` does embedding,
scaling and masks; each block in its list is replaced, for the length of a call,
by an interceptor that sees the arguments.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

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

    def modules_outside(self) -> list[nn.Module]:
        """The modules that are part of no block."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        return [module for module in self.model.modules() if id(module) not in inside]

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
        # Backwards: one slot may have two names, and what it held first counts.
        for name, value in reversed(before.items()):
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
        children = sorted(
            (key, _fingerprint(value, child=True))
            for key, value in module.items()
            if value is not None
        )
        parts.append((path, type(module).__qualname__, id(type(module)), attributes, children))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _fingerprint(value: Any, child: bool = False) -> str:
    """Tell values apart; modules and arrays among a module's children have their own paths."""
    if child and isinstance(value, nn.Module | mx.array):
        return type(value).__name__
    if isinstance(value, dict):
        return repr(sorted((str(key), _fingerprint(item, child)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return repr((type(value).__name__, [_fingerprint(item, child) for item in value]))
    if isinstance(value, set | frozenset):
        return repr(sorted(map(_fingerprint, value)))
    if isinstance(value, bool | int | float | str | None) or hasattr(value, "__dataclass_fields__"):
        return repr(value)
    return f"{type(value).__qualname__} at {id(value)}"
