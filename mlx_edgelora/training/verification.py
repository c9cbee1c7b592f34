"""Are the gradients of the walk those of plain MLX, on this model and this machine?

For each kind of block (same code, same shapes) and each way in which the plan computes it, one
block is walked as a step walks it, and differentiated once more by MLX's own autodiff with
every replacement of this package taken back: its own classes of layers, attention, norms. The
adapters are random, B included, because with B = 0 the gradient of A is zero. The same for the
head with the loss; and what the model calls its blocks with while the walk stands in for them
is compared with what it calls them with when nobody does.

Agreement is judged in float32, array by array, by two numbers: the relative error
||g - r|| / ||r||, and the slope <g, r> / <r, r> - 1, which rounding hardly moves. What float32
allows is 1e-5 or, where that is exceeded, ten times what one unit in the last place of the
parameters changes. A run in 16 bits is walked twice, in float32 and as it is: there rounding hides
a scale of 1.01, and what is left to see is a gradient that is wrong altogether.

Memory: one block with plain autodiff's activations. The light form takes few tokens, and tiles
so small that they are cut as long rows are; a window is as short.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.layers import attention as attention_layer
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.memory.blockwise import BlockWalk
from mlx_edgelora.model import attention as attention_hook
from mlx_edgelora.model import norms as norms_hook
from mlx_edgelora.model.attention import masks_known
from mlx_edgelora.model.blocks import BlockList, array_slots, bound, described, signature
from mlx_edgelora.model.masks import band_of, causal_array
from mlx_edgelora.model.sources import WeightSource, cast
from mlx_edgelora.model.walkable import MODEL_ERRORS, different_argument
from mlx_edgelora.training.step import Engine

Arrays = dict[str, mx.array]
# Largest relative error, and largest |slope - 1|, that rounding explains at once in float32,
# and where plain MLX's own rounding was measured to be larger.
BOUND, MOST = 1e-5, 5e-3
# The same of the error in 16 bits.
BOUNDS_16, MOST_16 = {mx.float16: 1e-2, mx.bfloat16: 6e-2}, 0.3
OFF, SCALED = "{} is {:.1e} of its norm off", "{} is scaled by 1 plus or minus {:.1e}"
# Of the light form: rows of a batch, their tokens (MLX's kernels on a GPU want more), tokens of
# a tile (so few that not every expert is picked in each) and bytes of a tile of scores.
LIGHT_ROWS, LIGHT_TOKENS, LIGHT_TOKENS_GPU, LIGHT_TILE, LIGHT_BYTES = 2, 32, 128, 4, 2048
# Tokens of the head's test, and its rows in the light form.
HEAD_TOKENS, LIGHT_VOCABULARY = 32, 600
# Tokens with which the model is called to see how it calls its blocks.
CALL_TOKENS = 16
# Tokens at which the memory of plain autodiff is measured; it is a square of their number.
PROBES = (64, 128, 256)


@dataclass(frozen=True)
class Verdict:
    """How one kind of block, or the head with the loss, compares with plain MLX.

    Attributes:
        kind: class of the block, or what else was compared.
        blocks: which ones are of this kind; empty where it is no block.
        way: how the plan computes it.
        error: largest relative error of an array, in float32.
        problem: what rounding does not explain; empty where nothing is left.
    """

    kind: str
    blocks: str
    way: str
    error: float
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.kind}{f' {self.blocks}' if self.blocks else ''}, {self.way}"


def verify(
    engine: Engine,
    rows: int,
    tokens: int,
    dtype: mx.Dtype | None = None,
    light: bool = False,
    memory: int | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> list[Verdict]:
    """Compare the gradients of an engine under its plan with those of plain MLX.

    Args:
        engine: put together, before any step; it is left as it was found.
        rows, tokens: of the batches that it will get.
        dtype: that was asked for, of hidden states; None for the model's own.
        light: few tokens, whatever the batches are like.
        memory: bytes that plain autodiff of one block may take; rows that it could not
            differentiate within them are compared shorter. None for any number.
        notify: is told of that.

    Returns:
        A verdict for the blocks' calls, for each kind of block and way, and for the head.
    """
    with _generator_restored(), _small_tiles(engine, rows * tokens) if light else ExitStack():
        comparison = _Comparison(engine, rows, tokens, dtype, light)
        while memory is not None and comparison.plain_peak() > memory and tokens > PROBES[-1]:
            needed, tokens = comparison.plain_peak(), -(-tokens // 2)
            notify(
                f"plain MLX would need {needed / 1e9:.1f} GB for a block of {2 * tokens} tokens: "
                f"rows of {tokens} are compared"
            )
            comparison = _Comparison(engine, rows, tokens, dtype, light)
        found = [comparison.calls()]
        found += [comparison.kind(group, way) for way, group in comparison.groups()]
        found += comparison.head()
    mx.clear_cache()
    return found


def refuse_wrong(verdicts: Sequence[Verdict]) -> None:
    """Raise where a gradient is not plain MLX's.

    Raises:
        EdgeLoraError: names the worst of them.
    """
    wrong = [verdict for verdict in verdicts if verdict.problem]
    if wrong:
        worst = max(wrong, key=lambda verdict: verdict.error)
        raise EdgeLoraError(
            f"verify: {worst}: {worst.problem}; expected the gradients of plain MLX. Nothing was "
            "trained. Train this model with mlx_lm.lora, or go on at your own risk with "
            "--verify off; please report it"
        )


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts in lines of columns."""
    rows = [("kind", "blocks", "computed", "largest relative error", "verdict")]
    rows += [
        (v.kind, v.blocks, v.way, f"{v.error:.1e}", f"WRONG: {v.problem}" if v.problem else "ok")
        for v in verdicts
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)] + [0]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


class OneBlock(nn.Module):
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
        args, kwargs = recorded_calls(self._others[0], tokens)[self._index]
        self._count = tokens.shape[1]
        return (
            tuple(map(self._shortened, args)),
            {name: self._shortened(value) for name, value in kwargs.items()},
        )

    def _shortened(self, value: Any) -> Any:
        if self._window is None or not isinstance(value, mx.array | str) or band_of(value) is None:
            return value
        count = self._count
        return causal_array(range(count), count, min(self._window, count))


class _Only:
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

    def block(self, index: int, without: str = "") -> Arrays:
        found = self._source.block(self._index, without)
        if self._dtype is None:
            return found
        trained = {name for name, _ in tree_flatten(self._block.trainable_parameters())}
        held = {name: box[key] for name, (box, key) in array_slots(self._block).items()}
        return {
            name: cast(array, self._dtype)
            for name, array in (held | found).items()
            if name not in trained and not (without and name.startswith(f"{without}."))
        }

    def prefetch(self, index: int) -> None:
        """Nothing follows."""


class _Random:
    """Random values for what is trained of a block."""

    def __init__(self, block: nn.Module) -> None:
        self._arrays = {
            name: _random(name, value) for name, value in tree_flatten(block.trainable_parameters())
        }

    def block(self, index: int, without: str = "") -> Arrays:
        kept = {
            name: array
            for name, array in self._arrays.items()
            if not without or not name.startswith(f"{without}.")
        }
        mx.eval(kept)
        return kept

    def prefetch(self, index: int) -> None:
        """They are in memory."""


def _random(name: str, value: mx.array) -> mx.array:
    """B small beside A: what an adapter adds is less than the layer's own output."""
    noise = mx.random.normal(value.shape, key=mx.random.key(len(name)))
    size = 0.01 if name.endswith("lora_b") else max(value.shape[-2:]) ** -0.5
    return (size * noise).astype(value.dtype)


class _Comparison:
    """One engine beside plain MLX, on batches of one size."""

    def __init__(
        self, engine: Engine, rows: int, tokens: int, dtype: mx.Dtype | None, light: bool
    ) -> None:
        self._engine, self._light, self._asked = engine, light, dtype
        self._walk, self._plan, self._blocks = engine.walk, engine.plan, engine.walk.blocks
        with masks_known():
            long = recorded_calls(self._blocks, mx.zeros((rows, tokens), mx.int32))
        self._windowed = [_is_windowed(call) for call in long]
        if light:
            least = LIGHT_TOKENS_GPU if mx.default_device() == mx.gpu else LIGHT_TOKENS
            rows, tokens = min(rows, LIGHT_ROWS), min(tokens, least)
        self._tokens = mx.zeros((rows, tokens), mx.int32)
        self._first = _first_input(self._blocks, self._tokens)
        with masks_known():
            self._recorded = recorded_calls(self._blocks, self._tokens)

    def calls(self) -> Verdict:
        """What the model calls its blocks with, beside how it calls them when nobody looks."""
        tokens = self._tokens[:1, :CALL_TOKENS]
        with masks_known():
            ours = recorded_calls(self._blocks, tokens)
        theirs = plain_calls(self._blocks, tokens)
        for index, (args, kwargs) in enumerate(ours):
            if index not in theirs:
                continue  # called by code that Python does not run
            mine = _named(self._blocks.blocks[index], args, kwargs)
            given = {name: theirs[index][name] for name in mine if name in theirs[index]}
            hidden = next(iter(mine))  # None here: what it is called with beside that counts
            if name := different_argument(((), given | {hidden: None}), ((), mine)):
                problem = f"block {index} is called with another {name}"
                return Verdict("calls of blocks", "", "by the model", np.inf, problem)
        return Verdict("calls of blocks", "", "by the model", 0.0)

    def plain_peak(self) -> int:
        """Bytes of plain autodiff of the largest block at full length, from shorter rows."""
        rows, tokens = self._tokens.shape
        if tokens <= PROBES[-1]:
            return 0
        peaks = []
        for count in PROBES:
            short = _Comparison(self._engine, rows, count, self._asked, light=False)
            mx.reset_peak_memory()
            for _, group in short.groups():
                one, trained = short.alone(group[0], mx.float32)
                short._plain(one, group[0], trained, None, mx.float32, None)
            peaks.append(mx.get_peak_memory())
        return int(np.polyval(np.polyfit(PROBES, peaks, 2), tokens))

    def groups(self) -> Iterator[tuple[str, list[int]]]:
        """The ways in which blocks are computed, and of each way the blocks of one kind."""
        found: dict[tuple, list[int]] = {}
        last = len(self._blocks) - 1
        for index, block in enumerate(self._blocks.blocks):
            shapes = [(n, v.shape, str(v.dtype)) for n, v in tree_flatten(block.parameters())]
            way = self._way(index)
            key = (
                way,
                signature(block),
                str(shapes),
                described(*self._recorded[index]),
                self._windowed[index],
                index == last,
            )
            found.setdefault(key, []).append(index)
        for key, group in found.items():
            yield key[0], group

    def kind(self, group: list[int], way: str) -> Verdict:
        """Compare the first block of a group, and in the full form the last one as well."""
        numbers = group[:1] if self._light else sorted({group[0], group[-1]})
        verdicts = [self._block(index, group, way) for index in numbers]
        return max(verdicts, key=lambda verdict: (bool(verdict.problem), verdict.error))

    def _block(self, index: int, group: list[int], way: str) -> Verdict:
        last = group[-1] == len(self._blocks) - 1
        one, trained = self.alone(index, mx.float32)
        rows = _some_rows(self._tokens.size) if last else None

        def again(function: Callable, *args: Any) -> Arrays:
            mx.random.seed(0)  # dropout must draw the same masks each time
            return function(*args)

        def walked(dtype: mx.Dtype) -> Arrays:
            return again(self._walked, self.alone(index, dtype)[0], index, trained, rows, way)

        def plain(dtype: mx.Dtype, nudge: int | None) -> Arrays:
            return again(self._plain, one, index, trained, rows, dtype, nudge)

        name = type(self._blocks.blocks[index]).__name__
        how = f"{way}, labelled tokens" if last else way
        return _judged(walked, plain, self._dtype(index), name, _ranges(group), how)

    def alone(self, index: int, dtype: mx.Dtype) -> tuple[OneBlock, "_Random"]:
        """A block as a model of its own, with hidden states of a dtype, and random adapters."""
        window = None
        if self._light and self._windowed[index]:
            window = max(2, self._tokens.shape[1] // 3)
        shape = (*self._tokens.shape, self._first.shape[-1])
        one = OneBlock(self._blocks, index, dtype, shape, window)
        return one, _Random(one.layers[0])

    def head(self) -> list[Verdict]:
        """Compare the head with the loss; nothing where whole rows of logits are plain MLX's."""
        head, loss = self._engine.head, self._engine.training_loss
        if head is None:
            return []
        if not isinstance(loss, CrossEntropy):  # it is another function, on purpose
            loss = CrossEntropy(loss.exact.tile_bytes)
        count = min(head.vocabulary, LIGHT_VOCABULARY) if self._light else head.vocabulary
        hidden = mx.random.normal((HEAD_TOKENS, self._first.shape[-1]), key=mx.random.key(0))
        labels = mx.random.randint(0, count, (HEAD_TOKENS,), key=mx.random.key(1))
        if self._light:
            loss = replace(loss, tile_bytes=4 * (count // 3) * head.dims)
        adapter = {n: _random(n, v) for n, v in head.adapter_arrays(count).items()}

        def walked(dtype: mx.Dtype) -> Arrays:
            some = _SomeRows(head, count)
            with bound(array_slots(self._blocks.model), adapter):
                _, gradients = loss.value_and_grad(hidden.astype(dtype), some, labels)
                return {"hidden states": gradients.hidden} | head.named(gradients)

        def plain(dtype: mx.Dtype, nudge: int | None) -> Arrays:
            values = _nudged({"hidden states": hidden.astype(dtype)} | adapter, nudge)
            return self._plain_head(values, labels, count, loss.label_smoothing)

        dtype, way = self._dtype(len(self._blocks)), f"{count} tokens of the vocabulary"
        return [_judged(walked, plain, dtype, "head and loss", "", way)]

    def _way(self, index: int) -> str:
        plan, count = self._plan, len(self._blocks)
        if index >= count - plan.kept_blocks:
            return "kept"
        choice = self._walk.tile_choice(index, self._tokens.size)
        if choice is None or not choice.possible:
            return "whole"
        return "by tiles, in halves" if plan.halves and choice.branches else "by tiles"

    def _dtype(self, index: int) -> mx.Dtype:
        """Of the hidden states that reach a block, or the head."""
        if self._asked is not None:
            return self._asked
        return self._first.dtype if index == 0 else self._blocks.hidden_dtype

    def _walked(
        self, one: OneBlock, index: int, trained: _Random, rows: mx.array | None, way: str
    ) -> Arrays:
        """The block's output and gradients, as a step computes them."""
        plan = replace(self._plan, kept_blocks=int(way == "kept"))
        if not way.startswith("by tiles"):
            plan = replace(plan, tile_tokens=None, halves=False)
        walk = BlockWalk(
            one,
            self._walk.store,
            _Only(self._walk.weights, index, one.layers[0], one.shift.dtype),
            self._walk.is_compiled,
            trained,
            plan=plan,
            blocks=BlockList(one),
            like=self._walk,
        )
        with walk.forward(lambda: one(self._tokens), rows=rows) as state:
            out, state.hidden = state.hidden, None
            found = {"output": out}
            state.cotangent = _cotangent(out.shape, out.dtype)
            for more in walk.backward(state):
                found |= {name.removeprefix("layers.0."): value for name, value in more.items()}
        return found

    def _plain(
        self,
        one: OneBlock,
        index: int,
        trained: _Random,
        rows: mx.array | None,
        dtype: mx.Dtype,
        nudge: int | None,
    ) -> Arrays:
        """The same by MLX's autodiff of the block itself."""
        block = one.layers[0]
        slots, own = array_slots(block), trained.block(0)
        frozen = {name: box[key] for name, (box, key) in slots.items() if name not in own}
        frozen |= self._walk.weights.block(index)
        frozen = {name: cast(value, dtype) for name, value in frozen.items()}
        frozen, own = _nudged(frozen, nudge), _nudged(own, nudge)
        with masks_known():
            args, kwargs = one.call(self._tokens)

        def function(*primals: mx.array) -> mx.array:
            with bound(slots, frozen | dict(zip(own, primals[:-1], strict=True))):
                out = block(primals[-1], *args, **kwargs)
            return out if rows is None else out.reshape(1, -1, out.shape[-1])[:, rows]

        x = one.input(self._tokens).astype(dtype)
        shape = x.shape if rows is None else (1, rows.size, x.shape[-1])
        with plain_classes([block], unpack=not self._light):
            (out,), gradients = mx.vjp(function, [*own.values(), x], [_cotangent(shape, dtype)])
        frozen.clear()
        mx.eval(out, gradients)
        return {"output": out, "shift": gradients[-1]} | dict(zip(own, gradients[:-1], strict=True))

    def _plain_head(self, values: Arrays, labels: mx.array, count: int, smoothing: float) -> Arrays:
        head, slots = self._engine.head, array_slots(self._blocks.model)

        def function(values: Arrays) -> mx.array:
            with bound(slots, {n: v for n, v in values.items() if n in slots}):
                logits = head.own_logits(values["hidden states"], count).astype(mx.float32)
            losses = nn.losses.cross_entropy(logits, labels, label_smoothing=smoothing)
            return losses.mean()

        with plain_classes(self._blocks.modules_outside()):
            gradients = mx.grad(function)(values)
        mx.eval(gradients)
        return gradients


def _judged(
    walked: Callable[[mx.Dtype], Arrays],
    plain: Callable[[mx.Dtype, int | None], Arrays],
    dtype: mx.Dtype,
    kind: str,
    blocks: str,
    way: str,
) -> Verdict:
    """Compare what was walked with plain MLX's answer.

    Args:
        walked: computes in a dtype.
        plain: computes in a dtype, with float32 parameters nudged if there is a seed.
        dtype: of the run.
        kind, blocks, way: of the verdict.
    """
    try:
        expected = plain(mx.float32, None)
    except MODEL_ERRORS as error:
        return Verdict(kind, blocks, way, np.inf, f"plain MLX cannot differentiate it ({error})")
    errors, slopes = _differences(walked(mx.float32), expected)
    limits = dict.fromkeys(expected, _bound()), dict.fromkeys(expected, _bound())
    if _worst(errors, limits[0], OFF) or _worst(slopes, limits[1], SCALED):
        nudged = [_differences(plain(mx.float32, seed), expected) for seed in range(2)]
        limits = tuple(
            {n: min(MOST, max(_bound(), 10 * max(found[part][n] for found in nudged))) for n in own}
            for part, own in enumerate(limits)
        )
    problem = _worst(errors, limits[0], OFF) or _worst(slopes, limits[1], SCALED)
    if not problem and dtype != mx.float32:
        problem = _problem_16(walked(dtype), expected, plain, dtype)
    return Verdict(kind, blocks, way, max(errors.values()), problem)


def _problem_16(
    got: Arrays,
    expected: Arrays,
    plain: Callable[[mx.Dtype, int | None], Arrays],
    dtype: mx.Dtype,
) -> str:
    """What rounding does not explain of a walk in 16 bits, beside plain float32."""
    errors, _ = _differences(got, expected)
    limits = dict.fromkeys(expected, BOUNDS_16[dtype])
    if _worst(errors, limits, OFF):
        own, _ = _differences(plain(dtype, None), expected)
        limits = {name: min(MOST_16, max(limits[name], 2 * own[name])) for name in expected}
    problem = _worst(errors, limits, OFF)
    return problem and f"in {str(dtype).rpartition('.')[2]} {problem}"


def _worst(found: dict[str, float], limits: dict[str, float], text: str) -> str:
    """The array that is farthest beyond its limit, in words; nothing where none is."""
    # NaN is no agreement.
    beyond = {name: value for name, value in found.items() if not value <= limits[name]}
    if not beyond:
        return ""
    name = max(beyond, key=lambda name: np.nan_to_num(beyond[name] / limits[name], nan=np.inf))
    return text.format(name, beyond[name])


class _SomeRows:
    """The first rows of a head."""

    def __init__(self, head: Any, count: int) -> None:
        self._head, self.vocabulary = head, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)


def recorded_calls(blocks: BlockList, tokens: mx.array) -> list[tuple[tuple, dict]]:
    """What the model calls each block with beside its input, as the walk learns it."""
    calls = []

    def record(index: int, x: mx.array, args: tuple, kwargs: dict) -> mx.array:
        calls.append((args, kwargs))
        return x

    with blocks.intercepted(record):
        blocks.model(tokens)
    return calls


def _first_input(blocks: BlockList, tokens: mx.array) -> mx.array:
    found: list[mx.array] = []
    with blocks.intercepted(lambda index, x, *_: (found.append(x), x)[1]):
        blocks.model(tokens)
    return found[0]


def _is_windowed(call: tuple[tuple, dict]) -> bool:
    """Whether a block is called with a mask under which not all earlier keys are seen."""
    masks = [value for value in (*call[0], *call[1].values()) if isinstance(value, mx.array)]
    return any(band is not None and band.window is not None for band in map(band_of, masks))


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
            stack.enter_context(bound(slots, zeros))
        stack.callback(sys.setprofile, before)
        sys.setprofile(look)
        blocks.model(tokens)
    return found


def _is_python(block: nn.Module) -> bool:
    return hasattr(type(block).__call__, "__code__")


def _named(block: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
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
        unpack: multiply by packed matrices unpacked, on a CPU: 20 times faster there, and more
            memory.
    """
    changed = []
    try:
        for module in {id(m): m for top in modules for m in top.modules()}.values():
            kind = type(module)
            own = next(k for k in kind.__mro__ if not k.__module__.startswith("mlx_edgelora"))
            if own is nn.QuantizedLinear and unpack and mx.default_device() == mx.cpu:
                own = _Unpacked
            if own is not kind:
                changed.append((module, kind))
                object.__setattr__(module, "__class__", own)
        yield
    finally:
        for module, kind in changed:
            object.__setattr__(module, "__class__", kind)


class _Unpacked(nn.QuantizedLinear):
    """A packed layer as a product with the whole matrix."""

    def __call__(self, x: mx.array) -> mx.array:
        settings = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        packed = self["weight"], self["scales"], self.get("biases")
        y = x @ mx.dequantize(*packed, **settings).astype(x.dtype).T
        return y + self["bias"] if "bias" in self else y


@contextmanager
def _generator_restored() -> Iterator[None]:
    """Put MLX's generator back on exit, on error too."""
    high, low = mx.random.state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)  # a key is the two halves of a seed


@contextmanager
def _small_tiles(engine: Engine, tokens: int) -> Iterator[None]:
    """Cut few tokens as batches of so many are cut."""
    plan, modules = engine.plan, (attention_hook, attention_layer, norms_hook)
    before = [module.TILE_BYTES for module in modules]
    small = plan
    if engine.walk.tile_choice(0, tokens) is not None:
        small = replace(plan, tile_tokens=min(plan.tile_tokens, LIGHT_TILE))
    for module in modules:
        module.TILE_BYTES = LIGHT_BYTES
    engine.obey(small)
    try:
        yield
    finally:
        for module, size in zip(modules, before, strict=True):
            module.TILE_BYTES = size
        engine.obey(plan)


def _some_rows(count: int) -> mx.array:
    """Labels of a batch's tokens: here and there, and a run up to the end."""
    scattered = np.arange(0, count // 2, 3)
    return mx.array(np.concatenate([scattered, np.arange(count - count // 4 - 1, count)]))


def _cotangent(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(5)).astype(dtype)


def _nudged(arrays: Arrays, seed: int | None) -> Arrays:
    """Float32 arrays changed by one unit in the last place, up or down at random."""
    if seed is None:
        return arrays
    rng = np.random.RandomState(seed)

    def nudged(value: mx.array) -> mx.array:
        if value.dtype != mx.float32:
            return value
        signs = rng.choice(np.float32([-1, 1]), value.shape)
        return value * mx.array(1 + signs * np.float32(2**-23))

    return {name: nudged(value) for name, value in arrays.items()}


def _differences(got: Arrays, expected: Arrays) -> tuple[dict[str, float], dict[str, float]]:
    """Relative error and |slope - 1| by array; infinite where one is missing."""
    errors, slopes = {}, {}
    for name, value in expected.items():
        if name not in got or got[name].shape != value.shape:
            errors[name] = slopes[name] = np.inf
            continue
        r, g = value.astype(mx.float32).reshape(-1), got[name].astype(mx.float32).reshape(-1)
        size, off = mx.linalg.norm(r).item(), mx.linalg.norm(g - r).item()
        slope = ((g - r) @ r).item() / size**2 if size else 0.0
        errors[name], slopes[name] = (off / size if size else off), abs(slope)
    return errors, slopes


@cache
def _bound() -> float:
    """`BOUND`, wider where the backend multiplies float32 in fewer bits (TF32)."""
    x = np.random.RandomState(0).randn(256, 256).astype(np.float32)
    product = np.array(mx.array(x) @ mx.array(x)).astype(np.float64)
    exact = x.astype(np.float64) @ x.astype(np.float64)
    rounding = np.linalg.norm(product - exact) / np.linalg.norm(exact)
    return min(MOST, max(BOUND, 10 * float(rounding)))


def _ranges(numbers: list[int]) -> str:
    """`0-3, 5` of 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
