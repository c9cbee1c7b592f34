"""Find the decoder blocks of any model, intercept their calls, and bind their arrays.

No architecture is named. The model's own `__call__` does embedding, scaling and masks, while calls
of blocks reach a handler with their arguments. The list and its blocks are not changed, because a
model's loop may depend on their class, their attributes or their identity.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_edgelora.blocks.call_form import CallForm, StandardBlock
from mlx_edgelora.blocks.outputs import Linked, OutputForm
from mlx_edgelora.blocks.refusals import Refusal, refusal_error
from mlx_edgelora.errors import EdgeLoraError

# handler(index, x, args, kwargs) -> the block's hidden state, or all that it returns
Handler = Callable[[int, mx.array, tuple, dict], Any]
# The place of an array: its container (a module, dict or list) and its key.
Slot = tuple[Any, Any]


class BlockList:
    """The list of decoder blocks of a model, found by its contents and not by its name.

    Attributes:
        model: the model that contains it.
        blocks: the blocks, first to last.
        hidden_dtype: dtype of the last block's output, which may be wider than that of the first
            block's input; set by `checks.checked_blocks`.
        prefix: prefix of the blocks' parameter names, such as `model.layers.`: the parameters of
            block 3 begin with `model.layers.3.`.
        forms: what each block returns; None for a block that returns its hidden state alone. Set
            by `checks.checked_blocks`.
        call_form: how the model passes hidden states to its blocks; None for [B, T, D] as the
            first argument, as most do. Set by `checks.checked_blocks`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.hidden_dtype: mx.Dtype | None = None
        self.call_form: CallForm | None = None
        layers = getattr(model, "layers", None)
        wanted = {id(layer) for layer in layers} if isinstance(layers, Iterable) else set()
        for path, module in model.named_modules():
            for key, value in module.items():
                if isinstance(value, list) and wanted and wanted <= {id(v) for v in value}:
                    self.blocks: list[nn.Module] = list(value)
                    self.forms: list[OutputForm | None] = [None] * len(value)
                    self.prefix = ".".join(filter(None, [path, key])) + "."
                    return
        raise refusal_error(model, Refusal.NO_LIST)

    def __len__(self) -> int:
        return len(self.blocks)

    def function(self, index: int) -> Callable[..., Any]:
        """A block as a function of [B, T, D] and the other arguments that a handler gets."""
        block = self.blocks[index]
        return block if self.call_form is None else StandardBlock(block, self.call_form)

    def local(self, name: str) -> tuple[int, str] | None:
        """Split a parameter's name into block index and local name; None outside the blocks."""
        if not name.startswith(self.prefix):
            return None
        index, _, rest = name[len(self.prefix) :].partition(".")
        return int(index), rest

    def refusal(self, index: int, reason: Refusal, **values: str) -> EdgeLoraError:
        """The error for a model with a block that cannot be trained; see `refusal_error`."""
        return refusal_error(self.model, reason, index, self.blocks[index], **values)

    def outputs(self, index: int, out: Any) -> list[mx.array]:
        """The hidden state of what a block returned, then the arrays that later blocks read."""
        form = self.forms[index]
        return [out] if form is None else form.outputs(out)

    @property
    def share_outputs(self) -> bool:
        """Whether blocks read more of earlier ones than their hidden states."""
        return any(form is not None and form.read for form in self.forms)

    def modules_outside(self) -> list[nn.Module]:
        """The modules outside the blocks."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        return [module for module in self.model.modules() if id(module) not in inside]

    @contextmanager
    def intercept(self, handler: Handler) -> Iterator[None]:
        """Send the calls of every block to `handler`; undone on exit.

        If `handler` calls a block (`function`), the block itself runs. In nested contexts the inner
        one counts. If it returns one array for a block that returns more, the model's loop gets
        that array with stand-ins for the others (`outputs.Linked`).
        """
        with intercept_calls(self.blocks, self._wrapping(handler), self.call_form):
            yield

    def _wrapping(self, handler: Handler) -> Handler:
        if not any(self.forms):
            return handler

        def wrapping(index: int, *call: Any) -> Any:
            found, form = handler(index, *call), self.forms[index]
            if form is None or not isinstance(found, mx.array):
                return found
            return form.wrap(found, index, call)

        return wrapping

    @contextmanager
    def skip_blocks(self, hidden: mx.array) -> Iterator[None]:
        """Skip all blocks: the last one returns `hidden`, so a call of the model is its tail."""
        last = len(self.blocks) - 1
        with self.intercept(lambda index, x, args, kwargs: hidden if index == last else x):
            yield


@contextmanager
def intercept_calls(
    modules: Sequence[nn.Module], handler: Handler, form: CallForm | None = None
) -> Iterator[None]:
    """Send the calls of some modules to `handler`, with their index; see `BlockList.intercept`."""
    calls = _CallInterceptor(modules, handler, form)
    with ExitStack() as stack:
        for kind in dict.fromkeys(map(type, modules)):
            stack.enter_context(calls.replaced_call(kind))
        yield


class _CallInterceptor:
    """Sends the calls of modules to a handler, by replacing `__call__` of their classes."""

    def __init__(
        self, modules: Sequence[nn.Module], handler: Handler, form: CallForm | None
    ) -> None:
        self._handler, self._form = handler, form
        self._indices: dict[int, list[int]] = {}
        for index, module in enumerate(modules):
            self._indices.setdefault(id(module), []).append(index)
        self._next, self._is_handling = 0, False

    @contextmanager
    def replaced_call(self, kind: type[nn.Module]) -> Iterator[None]:
        """Replace `__call__` of a class; its other modules behave as before."""
        own, call = vars(kind).get("__call__"), kind.__call__
        first = _second_parameter(call)

        @wraps(call)
        def replacement(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._is_handling or id(module) not in self._indices:
                return call(module, *args, **kwargs)
            if self._form is not None:
                x, kwargs = self._form.split(module, args, kwargs)
                found = self._handle(module, x, (), kwargs)
                return self._form.original(found) if isinstance(found, mx.array) else found
            x, *args = args or (kwargs.pop(first),)
            return self._handle(module, x, tuple(args), kwargs)

        kind.__call__ = replacement
        try:
            yield
        finally:
            if own is None:
                del kind.__call__
            else:
                kind.__call__ = own

    def _handle(self, module: nn.Module, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        # A module that is in the list twice is the next expected block, if it can be.
        places = self._indices[id(module)]
        index = next((place for place in places if place >= self._next), places[0])
        self._next, self._is_handling = index + 1, True
        try:
            return self._handler(index, x, args, kwargs)
        finally:
            self._is_handling = False


def _second_parameter(function: Callable) -> str:
    """The name of the parameter after `self`; empty if it cannot be found."""
    try:
        return next(iter(list(inspect.signature(function).parameters)[1:]), "")
    except ValueError:  # not a Python function
        return ""


def array_slots(module: nn.Module) -> dict[str, Slot]:
    """The places of all arrays of a module by name, private ones (rotary frequencies) included."""
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
def bind_arrays(slots: Mapping[str, Slot], values: Mapping[str, mx.array]) -> Iterator[None]:
    """Put `values` into the slots of the same names; undone on exit."""
    before = {}
    for name, value in values.items():
        container, key = slots[name]
        before[name] = container[key]
        container[key] = value
    try:
        yield
    finally:
        # In reverse: a slot may have two names, and its first value must be restored last.
        for name, value in reversed(before.items()):
            container, key = slots[name]
            container[key] = value


def signature(block: nn.Module) -> str:
    """Hash of a block: equal for blocks that are the same function of their arrays.

    It covers the classes, the tree of modules, and every attribute that is not an array. Blocks
    with the same signature may share a compiled function. An attribute of an unknown type makes a
    block different from all others.
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


def call_signature(args: tuple, kwargs: dict) -> str:
    """Description of a block's arguments: equal for calls that compute the same function.

    It has the type and shape of arrays, the window of masks with a band, and plain values. Two
    objects of unknown types are never equal.
    """
    return _fingerprint([*args, kwargs])


def _fingerprint(value: Any, child: bool = False) -> str:
    """Description of a value; modules and arrays below a module are described elsewhere."""
    if child and isinstance(value, nn.Module | mx.array):
        return type(value).__name__
    if isinstance(value, mx.array):
        band = getattr(value, "band", None)
        return f"{type(value).__name__} {value.shape} {value.dtype} {band and band.window}"
    if isinstance(value, dict):
        return repr(sorted((str(key), _fingerprint(item, child)) for key, item in value.items()))
    if isinstance(value, list | set | frozenset):
        found = [_fingerprint(item, child) for item in value]
        return repr((type(value).__name__, found if isinstance(value, list) else sorted(found)))
    # Neither MLX nor `array_slots` looks into tuples: what is in there is a constant.
    return _constant(value)


def _constant(value: Any) -> str:
    """Description of a plain value, or of an object by its identity."""
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    if isinstance(value, Linked):
        return f"linked {value.shape} {value.dtype}"
    if isinstance(value, tuple):
        return repr((type(value).__name__, [_constant(item) for item in value]))
    if hasattr(value, "__dataclass_fields__"):
        found = {name: getattr(value, name, None) for name in value.__dataclass_fields__}
        if not any(_holds_arrays(item) for item in found.values()):
            return repr(value)
    return f"{type(value).__qualname__} at {id(value)}"


def _holds_arrays(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(map(_holds_arrays, value))
    return isinstance(value, mx.array | nn.Module)
