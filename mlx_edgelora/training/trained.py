"""Where what is trained lives: the model, as in plain MLX, or a file (`training/paged.py`).

With LoRA, parameters, gradients and an Adam's two moments are four arrays of the adapters'
size, most of what a step still holds once blocks are walked. Every bit of the result is
that of `optimizer.update(model, gradients)`, whichever home is chosen.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_unflatten

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.model.sources import ResidentWeights, WeightSource
from mlx_edgelora.training.optimizer import global_norm, scaled, squares, update

Arrays = dict[str, mx.array]


class Trained(WeightSource, Protocol):
    """The trained parameters of a model, their gradients and what the optimizer remembers.

    As a `WeightSource` it gives a block's parameters, for those that are not in the model.
    """

    def load(self, weights: Iterable[tuple[str, mx.array]]) -> None:
        """Take over values of parameters, by their names in the model."""

    def start(self, optimizer: optimizers.Optimizer) -> None:
        """Make room for a run with an optimizer that was not used yet; forgets gradients."""

    def add(self, gradients: Arrays) -> None:
        """Add evaluated gradients to the sum; each name once for a batch. Empties the mapping."""

    def norm(self, count: int) -> mx.array:
        """Global norm of the gradients' sum divided by `count`: float32 scalar, evaluated."""

    def update(
        self, optimizer: optimizers.Optimizer, count: int, factor: mx.array | None = None
    ) -> None:
        """Apply the gradients' sum divided by `count`, times `factor`; then the sum is empty."""

    def weights(self) -> Mapping[str, mx.array]:
        """Parameters by name, in the model's order, each evaluated when it is looked at.

        Raises:
            EdgeLoraError: an update was broken off, so that some are newer than others.
        """

    def close(self) -> None:
        """Give disk space back."""


class Update:
    """Knows whether an update was begun and broken off."""

    def __init__(self) -> None:
        self._broken = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around an update; whatever ends it early leaves it broken off."""
        self.check()
        self._broken = True
        yield
        self._broken = False

    def check(self) -> None:
        """Refuse to go on with parameters of which some are newer than others.

        Raises:
            EdgeLoraError: an update was broken off.
        """
        if self._broken:
            raise EdgeLoraError(
                "an update of the adapters was broken off half way, expected whole ones; resume "
                "from the adapter that was saved last"
            )


class ResidentTrained(ResidentWeights):
    """Everything in memory, parameters in the model. Memory: all of it.

    Args:
        model: adapted; its parameters are evaluated.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._sum, self._update = model, {}, Update()
        mx.eval(model.trainable_parameters())

    def load(self, weights: Iterable[tuple[str, mx.array]]) -> None:
        """Put the values into the model."""
        self._model.load_weights(list(weights), strict=False)

    def start(self, optimizer: optimizers.Optimizer) -> None:
        """Forget gradients; the optimizer makes its own room."""
        self._sum.clear()

    def add(self, gradients: Arrays) -> None:
        """Add to the sum."""
        add_to(gradients, self._sum)

    def norm(self, count: int) -> mx.array:
        """Norm of the mean."""
        return global_norm(squares(self._sum, count), names_of(self._model))

    def update(
        self, optimizer: optimizers.Optimizer, count: int, factor: mx.array | None = None
    ) -> None:
        """Let the optimizer update the model."""
        with self._update.running():
            gradients = tree_of(scaled(self._sum, count, factor))
            update(self._model, optimizer, gradients)

    def weights(self) -> Mapping[str, mx.array]:
        """The model's own arrays."""
        self._update.check()
        return dict(tree_flatten(self._model.trainable_parameters()))

    def close(self) -> None:
        """Nothing to do."""


def names_of(model: nn.Module) -> list[str]:
    """Names of the trained parameters, in the model's order."""
    return [name for name, _ in tree_flatten(model.trainable_parameters())]


def tree_of(arrays: Arrays) -> dict:
    """The tree of arrays by dotted names; `tree_unflatten` makes a list of none."""
    return tree_unflatten(list(arrays.items())) if arrays else {}


def add_to(gradients: Arrays, total: Arrays) -> None:
    """Add to the evaluated `total` in place; `gradients` is emptied.

    Sums are laid out densely, for how an array lies in memory decides in which order its
    elements are summed up later, and a file has one order only.
    """
    names = list(gradients)
    for name in names:
        more = gradients.pop(name)
        total[name] = mx.contiguous(more + total.pop(name) if name in total else more)
        del more
    mx.eval([total[name] for name in names])
