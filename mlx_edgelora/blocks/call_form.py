"""Call blocks that take their hidden state in another form as if it were [B, T, D] and came first.

Most models call a block as `block(x, ...)` with x [batch, tokens, width]. Some pass the embeddings
first and the hidden state after them, and some keep several hidden states of a token in one array,
such as [4, batch, tokens, width]. `blocks/hidden_argument.py` finds out which form it is.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_edgelora.blocks.masks import IN_PLACE


class Returned(mx.array):
    """A hidden state that a handler returned, in the model's form; `standard` is [B, T, D].

    A model that changes it in place makes it another array: `standard` is None then.
    """

    def __init__(self, array: mx.array, standard: mx.array) -> None:
        super().__init__(array)
        self.standard: mx.array | None = standard


def _forgetting(name: str) -> Callable[..., Any]:
    plain = getattr(mx.array, name)

    def changed(self: Returned, *args: Any) -> Any:
        self.standard = None
        return plain(self, *args)

    return changed


for _name in IN_PLACE:
    setattr(Returned, _name, _forgetting(_name))


@dataclass(frozen=True)
class CallForm:
    """How a model passes hidden states to its blocks.

    Attributes:
        parameter: name of the parameter of a block that is its hidden state.
        axes: axes of batch and tokens in it.
        others: sizes of its other axes, which together are the width of the standard form.
    """

    parameter: str
    axes: tuple[int, int]
    others: tuple[int, ...]

    def standard(self, x: mx.array) -> mx.array:
        """A hidden state in the model's form as [B, T, D]."""
        if isinstance(x, Returned) and x.standard is not None:
            return x.standard
        moved = x.transpose(self._order)
        return moved.reshape(*moved.shape[:2], -1)

    def original(self, x: mx.array) -> mx.array:
        """A hidden state [B, T, D] in the model's form."""
        return Returned(self.moved(x), x)

    def moved(self, x: mx.array) -> mx.array:
        """As `original`, of which nobody asks whether it is what a block returned."""
        back = [self._order.index(axis) for axis in range(len(self._order))]
        return x.reshape(*x.shape[:2], *self.others).transpose(back)

    @property
    def _order(self) -> list[int]:
        others = [axis for axis in range(2 + len(self.others)) if axis not in self.axes]
        return [*self.axes, *others]

    def split(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[mx.array, dict]:
        """The standard hidden state of a model's call of a block, and the other arguments."""
        given = inspect.signature(type(block).__call__).bind(block, *args, **kwargs).arguments
        _, *names = given
        others = {name: given[name] for name in names if name != self.parameter}
        return self.standard(given[self.parameter]), others


class StandardBlock:
    """A block that is called as most models call theirs: with its hidden state [B, T, D] first.

    Args:
        module: the block.
        form: how its model calls it.
    """

    def __init__(self, module: nn.Module, form: CallForm) -> None:
        self.module, self._form = module, form

    @cached_property
    def __signature__(self) -> inspect.Signature:
        """That of the block, with the hidden state as its first parameter."""
        _, *rest = inspect.signature(type(self.module).__call__).parameters.values()
        rest.sort(key=lambda parameter: parameter.name != self._form.parameter)
        first, *others = rest
        kinds = inspect.Parameter
        named = [
            p.replace(kind=kinds.KEYWORD_ONLY) if p.kind is kinds.POSITIONAL_OR_KEYWORD else p
            for p in others
        ]
        return inspect.Signature([first, *named])

    def __call__(self, x: mx.array, **others: Any) -> Any:
        """What the block returns, a hidden state as [B, T, D]."""
        hidden = self._form.moved(x)
        out = self.module(**{self._form.parameter: hidden}, **others)
        return self._form.standard(out) if isinstance(out, mx.array) else out
