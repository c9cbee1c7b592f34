"""The adapters, their gradients and the optimizer state: in memory, as in plain MLX.

With Adam these are four arrays of the adapters' size, which is most of a step's memory once blocks
are walked one by one; `engine/paged_adapters.py` keeps them in a file instead. In both cases the
result is that of `optimizer.update(model, gradients)`, bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.block_list import array_slots
from mlx_edgelora.blocks.weight_source import WeightSource
from mlx_edgelora.engine.optimizer import (
    BlockUpdate,
    average,
    global_norm,
    group_by_block,
    squares,
)
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.weights import ResidentWeights

# A larger block is updated before the next one: what they take on the way would add up.
ASYNC_BYTES = 32 * 2**20
# On a CPU a smaller block is evaluated with all others: what they take hardly adds up.
LAZY_BYTES = 2**18

Arrays = dict[str, mx.array]
Look = Callable[[Mapping[str, mx.array]], None]


def ignored(arrays: Mapping[str, mx.array]) -> None:
    """Where nobody looks at sums of gradients."""


class AdapterState(WeightSource, Protocol):
    """The trained parameters of a model, their gradients and the optimizer state.

    As a `WeightSource` it provides a block's parameters if they are not in the model.
    """

    def load(self, weights: Iterable[tuple[str, mx.array]]) -> None:
        """Set parameters by their names in the model."""

    def start(self, optimizer: optimizers.Optimizer) -> None:
        """Prepare for a new optimizer and discard gradients."""

    def add(self, gradients: Arrays, look: Look = ignored) -> None:
        """Add evaluated gradients to the sum; empties the mapping.

        `look` gets their sums so far, evaluated, by name; it keeps none of them.
        """

    def replace(self, sums: Arrays, look: Look = ignored) -> None:
        """Replace the sums of gradients of a whole block, or of all parameters outside the blocks.

        Args:
            sums: evaluated, by name.
            look: as in `add`.
        """

    def norm(self, count: float) -> mx.array:
        """Global norm of the gradients' sum divided by `count`: float32 scalar, evaluated."""

    def update(
        self, optimizer: optimizers.Optimizer, count: float, factor: mx.array | None = None
    ) -> None:
        """Apply the gradients' sum divided by `count`, times `factor`, and clear the sum."""

    def weights(self) -> Mapping[str, mx.array]:
        """Parameters by name, in the model's order, each evaluated when it is accessed.

        Raises:
            EdgeLoraError: an update was interrupted, so that some are newer than others.
        """

    def optimizer_state(self) -> Mapping[tuple[str, str], mx.array]:
        """What the optimizer remembers of each parameter, by the parameter's name and its own.

        Evaluated when looked at; nothing of parameters that were not updated yet.
        """

    def gradients(self) -> Mapping[str, mx.array]:
        """The sums of gradients since the last update by name, evaluated when looked at."""

    def restore(
        self,
        states: Iterable[tuple[tuple[str, str], mx.array]],
        gradients: Iterable[tuple[str, mx.array]],
    ) -> None:
        """After `start`, take over what `optimizer_state` and `gradients` gave, one at a time."""

    def close(self) -> None:
        """Free disk space."""


class UpdateGuard:
    """Detects an update that was interrupted."""

    def __init__(self) -> None:
        self._broken = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context of an update; an exception marks it as interrupted."""
        self.check()
        self._broken = True
        yield
        self._broken = False

    def check(self) -> None:
        """Check that no update was interrupted, or some parameters would be newer than others.

        Raises:
            EdgeLoraError: an update was interrupted.
        """
        if self._broken:
            raise EdgeLoraError(
                "an update of the adapters was interrupted, so that some are newer than others; "
                "resume from the last saved adapter"
            )


class ResidentAdapterState(ResidentWeights):
    """Everything in memory, parameters in the model. Memory: all of it.

    Args:
        model: adapted; its parameters are evaluated.
        compiled: whether the optimizer's arithmetic is compiled.
    """

    def __init__(self, model: nn.Module, compiled: bool = False) -> None:
        self._model, self._sum, self._update = model, {}, UpdateGuard()
        self._compiled, self._states = compiled, {}
        self._arithmetic: BlockUpdate | None = None
        slots = array_slots(model)
        self._slots = {name: slots[name] for name in names_of(model)}
        for box, key in self._slots.values():  # one by one: DoRA's `m` is computed from a matrix
            mx.eval(box[key])

    def load(self, weights: Iterable[tuple[str, mx.array]]) -> None:
        """Put the values into the model."""
        self._model.load_weights(list(weights), strict=False)

    def start(self, optimizer: optimizers.Optimizer) -> None:
        """Discard gradients and optimizer state."""
        self._sum.clear()
        self._states.clear()
        self._arithmetic = BlockUpdate(optimizer, self._compiled)

    def add(self, gradients: Arrays, look: Look = ignored) -> None:
        """Add to the sum."""
        names = list(gradients)
        add_to(gradients, self._sum)
        look({name: self._sum[name] for name in names})

    def replace(self, sums: Arrays, look: Look = ignored) -> None:
        """Replace the sums in memory."""
        self._sum |= sums
        look(sums)

    def norm(self, count: float) -> mx.array:
        """Norm of the mean."""
        return global_norm(squares(self._sum, count), names_of(self._model))

    def update(
        self, optimizer: optimizers.Optimizer, count: float, factor: mx.array | None = None
    ) -> None:
        """Update the model, a block at a time."""
        with self._update.running():
            self._arithmetic.begin()
            for block, names in group_by_block(self._sum).items():
                self._update_block(block, names, count, factor)
            mx.eval(optimizer.state, [box[key] for box, key in self._slots.values()], self._states)

    def _update_block(
        self, block: str, names: list[str], count: float, factor: mx.array | None
    ) -> None:
        # By their names inside the block: blocks of one kind then share a compiled function.
        local = {name.removeprefix(block): name for name in names}
        gradients = average({own: self._sum.pop(name) for own, name in local.items()}, count)
        slots = {own: self._slots[name] for own, name in local.items()}
        parameters = {own: box[key] for own, (box, key) in slots.items()}
        before = {own: self._states.get(name, {}) for own, name in local.items()}
        updated, states = self._arithmetic.apply(gradients, parameters, before, factor)
        for own, (box, key) in slots.items():
            box[key] = updated[own]
            self._states[local[own]] = states[own]
        del gradients, parameters, before
        held = sum(array.nbytes for array in updated.values())
        if mx.default_device() == mx.gpu and held < ASYNC_BYTES:
            mx.async_eval(updated, states)
        elif held >= LAZY_BYTES:
            mx.eval(updated, states)

    def weights(self) -> Mapping[str, mx.array]:
        """The model's own arrays."""
        self._update.check()
        return dict(tree_flatten(self._model.trainable_parameters()))

    def optimizer_state(self) -> Mapping[tuple[str, str], mx.array]:
        """The arrays in memory."""
        self._update.check()
        return {
            (name, key): value
            for name, state in self._states.items()
            for key, value in state.items()
        }

    def gradients(self) -> Mapping[str, mx.array]:
        """The arrays in memory."""
        return dict(self._sum)

    def restore(
        self,
        states: Iterable[tuple[tuple[str, str], mx.array]],
        gradients: Iterable[tuple[str, mx.array]],
    ) -> None:
        """Keep the arrays."""
        for (name, key), value in states:
            self._states.setdefault(name, {})[key] = value
        self._sum.update(gradients)

    def close(self) -> None:
        """Free nothing: there are no files."""


def names_of(model: nn.Module) -> list[str]:
    """Names of the trained parameters, in the model's order."""
    return [name for name, _ in tree_flatten(model.trainable_parameters())]


def add_to(gradients: Arrays, total: Arrays) -> None:
    """Add to the evaluated `total` in place; `gradients` is emptied."""
    summed = [name for name in gradients if name in total]
    for name in list(gradients):
        more = gradients.pop(name)
        total[name] = more + total.pop(name) if name in total else more
        del more
    mx.eval([total[name] for name in summed])
