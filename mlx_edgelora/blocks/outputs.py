"""What a block returns besides its hidden state, and which later blocks read it.

Some blocks return a tuple: the hidden state, and arrays that the model's loop passes to later
blocks, such as keys and values that several blocks share. The loop is run with stand-ins for these
arrays (`Linked`), so a stand-in among the arguments of a block shows what it reads. No architecture
is named.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_edgelora.blocks.masks import IN_PLACE

# Batch and tokens of the two runs whose shapes are compared.
SHAPES = ((2, 7), (3, 11))
_PACKED = "mlx_edgelora link"


class Link(NamedTuple):
    """An array that a block returns besides its hidden state.

    Attributes:
        source: index of the block.
        leaf: its number among the leaves of what the block returns.
    """

    source: int
    leaf: int


class Linked(mx.array):
    """Takes the place of an array of an earlier block, in the model's loop.

    Args:
        array: random values of its shape, not evaluated unless they are used.
        link: the array that it stands for; None once it was changed in place.
        axis: axis of the tokens; None if there is none.
    """

    def __init__(self, array: mx.array, link: Link, axis: int | None) -> None:
        super().__init__(array)
        self.link: Link | None = link
        self.token_axis = axis


def _forgetting(name: str) -> Callable[..., Any]:
    plain = getattr(mx.array, name)

    def changed(self: Linked, *args: Any) -> Any:
        self.link = None
        return plain(self, *args)

    return changed


for _name in IN_PLACE:
    setattr(Linked, _name, _forgetting(_name))


class Position(int):
    """A number that an earlier block returned, such as the position of its first token."""


@dataclass(frozen=True)
class Extra:
    """An array among the outputs of a block.

    Attributes:
        axes: size of each axis; "B" and "T" stand for batch and tokens.
        dtype: its dtype on the trial's inputs.
    """

    axes: tuple[int | str, ...]
    dtype: mx.Dtype

    def shape(self, batch: int, tokens: int) -> tuple[int, ...]:
        """The shape for a batch."""
        sizes = {"B": batch, "T": tokens}
        return tuple(sizes.get(axis, axis) for axis in self.axes)

    @property
    def token_axis(self) -> int | None:
        """The axis of the tokens; None if there is not exactly one."""
        return self.axes.index("T") if self.axes.count("T") == 1 else None

    @property
    def is_tokens(self) -> bool:
        """Whether it can be cut into tokens, after an axis of the batch, and has a gradient."""
        return (
            bool(self.token_axis) and self.axes[0] == "B" and mx.issubdtype(self.dtype, mx.floating)
        )


class Passed(NamedTuple):
    """An output that is an argument of the block, unchanged; `path` is its place."""

    path: str


@dataclass
class OutputForm:
    """What a block returns: a tree whose first leaf is the hidden state.

    Attributes:
        tree: nested tuples, lists and dicts with the number of each leaf.
        leaves: an `Extra`, a `Passed` or a constant for each leaf; None for the first.
        read: numbers of the leaves that later blocks read.
    """

    tree: Any
    leaves: tuple[Any, ...]
    read: tuple[int, ...] = field(default=())

    def wrap(
        self, hidden: mx.array, index: int, call: tuple[mx.array, tuple, dict], nan: bool = False
    ) -> Any:
        """Return what the model's loop expects from the block: `hidden` and stand-ins.

        Args:
            hidden: the hidden state to return.
            index: index of the block.
            call: the call of the block: x, args, kwargs.
            nan: whether stand-ins are filled with NaN, not with random numbers.
        """
        x, *arguments = call
        values = dict(leaves_of(arguments))

        def leaf(number: int) -> Any:
            what = self.leaves[number]
            if number == 0:
                return hidden
            if isinstance(what, Passed):
                return values[what.path]
            if isinstance(what, Extra):
                shape, link = what.shape(*x.shape[:2]), Link(index, number)
                if nan:
                    return Linked(mx.full(shape, float("nan"), what.dtype), link, what.token_axis)
                key = mx.random.key(1000 * index + number)
                array = mx.random.normal(shape, key=key).astype(what.dtype)
                return Linked(array, link, what.token_axis)
            return Position(what) if type(what) is int else what

        return tree_map(leaf, self.tree)

    @property
    def read_entries(self) -> int:
        """Entries of a token in the arrays that later blocks read."""
        axes = [self.leaves[number].axes for number in self.read]
        return sum(math.prod(size for size in sizes if size not in ("B", "T")) for sizes in axes)

    def outputs(self, out: Any) -> list[mx.array]:
        """The hidden state of what the block returned, then the arrays that later blocks read."""
        _, leaves = _numbered(out)
        return [leaves[0], *(leaves[number] for number in self.read)]

    def read_alike(
        self, tiles: list[list[mx.array]], whole: list[mx.array], tolerance: float
    ) -> bool:
        """Whether tiles of tokens of what later blocks read are those of the whole arrays."""
        for number, *parts, expected in zip(self.read, *tiles, whole, strict=True):
            got = mx.concatenate(parts, axis=self.leaves[number].token_axis)
            if got.shape != expected.shape:
                return False
            off = mx.linalg.norm((got - expected).astype(mx.float32).reshape(-1))
            size = mx.linalg.norm(expected.astype(mx.float32).reshape(-1))
            if not (off <= tolerance * size).item():  # NaN is no agreement
                return False
        return True

    def fits(self, out: Any) -> bool:
        """Whether a block returned this."""
        tree, leaves = _numbered(out)
        if tree != self.tree:
            return False
        arrays = [True, *(isinstance(what, Extra | Passed) for what in self.leaves[1:])]
        return [isinstance(leaf, mx.array) for leaf in leaves] == arrays


def find_form(outputs: list[Any], arguments: list[Any]) -> OutputForm | None:
    """What a block returns, from one call for each of `SHAPES`; None if that is not understood."""
    trees, values = zip(*map(_numbered, outputs), strict=True)
    if trees[0] != trees[1] or not all(isinstance(v[0], mx.array) for v in values):
        return None
    paths = [{id(leaf): path for path, leaf in leaves_of(given)} for given in arguments]
    found: list[Any] = [None]
    for first, second in zip(*(leaves[1:] for leaves in values), strict=True):
        if isinstance(first, mx.array) and isinstance(second, mx.array):
            passed = paths[0].get(id(first))
            if passed is not None and passed == paths[1].get(id(second)):
                found.append(Passed(passed))
            elif extra := _extra(first, second):
                found.append(extra)
            else:
                return None
        elif type(first) in (bool, int, float, str, type(None)) and first == second:
            found.append(first)
        else:
            return None
    return OutputForm(trees[0], tuple(found))


def _numbered(out: Any) -> tuple[Any, list[Any]]:
    """A tree with numbers in place of its leaves, and the leaves."""
    numbers, leaves = count(), []

    def number(leaf: Any) -> int:
        leaves.append(leaf)
        return next(numbers)

    return tree_map(number, out), leaves


def _extra(first: mx.array, second: mx.array) -> Extra | None:
    if first.ndim != second.ndim or first.dtype != second.dtype:
        return None
    names = dict(zip(zip(*SHAPES, strict=True), "BT", strict=True))
    axes = []
    for pair in zip(first.shape, second.shape, strict=True):
        if pair[0] != pair[1] and pair not in names:
            return None
        axes.append(names.get(pair, pair[0]))
    return Extra(tuple(axes), first.dtype)


def leaves_of(tree: Any) -> list[tuple[str, Any]]:
    """Paths and leaves of nested arguments; modules are leaves."""
    return tree_flatten(tree, is_leaf=_is_module)


def links_of(args: tuple, kwargs: dict) -> list[Link]:
    """What a block reads of earlier ones, by its arguments; each once, in order."""
    found = (leaf.link for _, leaf in leaves_of([args, kwargs]) if isinstance(leaf, Linked))
    return list(dict.fromkeys(link for link in found if link is not None))


def pack_links(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments for `mx.compile`: stand-ins become numbered constants."""
    numbers = {link: number for number, link in enumerate(links_of(args, kwargs))}

    def pack(leaf: Any) -> Any:
        if isinstance(leaf, Linked) and leaf.link is not None:
            return f"{_PACKED} {numbers[leaf.link]} {leaf.token_axis}"
        return leaf

    return _mapped(pack, args, kwargs) if numbers else (args, kwargs)


def unpack_links(args: tuple, kwargs: dict, arrays: list[mx.array]) -> tuple[tuple, dict]:
    """The arguments that were given to `pack_links`, with arrays in the order of `links_of`."""
    if not arrays:
        return args, kwargs

    def unpack(leaf: Any) -> Any:
        if isinstance(leaf, str) and leaf.startswith(_PACKED):
            number, axis = map(int, leaf.removeprefix(_PACKED).split())
            return Linked(arrays[number], Link(0, number), axis)
        return leaf

    return _mapped(unpack, args, kwargs)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Nested arguments with a function of each leaf in its place; modules are leaves."""
    return tree_map(function, tree, is_leaf=_is_module)


def _mapped(function: Callable[[Any], Any], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return map_leaves(function, tuple(args)), map_leaves(function, kwargs)


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)
