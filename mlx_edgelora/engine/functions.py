"""A block as a function of all its arrays, and its gradient, both compiled.

Weights are arguments, because a compiled function keeps the arrays that it captures. One function
serves all blocks with the same signature (`block_list.signature`) and is traced once per shape.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from itertools import repeat
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_edgelora.blocks.attention import tracing_gradient
from mlx_edgelora.blocks.block_list import BlockList, Slot, bind_arrays, signature
from mlx_edgelora.blocks.checks import EVALUATES
from mlx_edgelora.blocks.dropout import KeyTape
from mlx_edgelora.blocks.experts import calls_experts, expert_adapters
from mlx_edgelora.blocks.masks import pack_masks, unpack_masks
from mlx_edgelora.blocks.packing import packing_now
from mlx_edgelora.blocks.parts import BlockParts
from mlx_edgelora.engine.expert_gradients import vjp_by_experts
from mlx_edgelora.engine.record import BlockCall

Arrays = dict[str, mx.array]
RowIndices = mx.array | None
# Part of MLX's error for arguments that are neither arrays nor constants.
NO_TREE = "Function arguments must be trees"
# Keys for dropout where a graph is built but not computed: MLX's generator must not advance.
SAME_KEY = repeat(mx.random.key(0))


class OutputRows(NamedTuple):
    """The rows of a block's output that are needed.

    Attributes:
        rows: int [n], ascending, of the B * T tokens; None for all.
        rows_only: whether the block computes only these rows.
    """

    rows: RowIndices = None
    rows_only: bool = False


class Functions:
    """Calls functions, compiled where that is possible.

    Args:
        compiles: whether to compile.
    """

    def __init__(self, compiles: bool) -> None:
        self.compiles = compiles
        self._known: dict[Hashable, Callable] = {}
        self._refused: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._known)

    def call(self, key: Hashable, function: Callable, *args: Any) -> Any:
        """Call a function, or the compiled function with the same key.

        Args:
            key: the same for functions that compute the same of their arguments; None for one
                that is not to be compiled. Nor is one that computes rows that share rows, which
                are others in every batch.
            function: what it captures must be the same for all of one key.
            args: trees of arrays and constants.
        """
        if not self.compiles or key is None or key in self._refused or packing_now() is not None:
            return function(*args)
        if key not in self._known:
            self._known[key] = mx.compile(function)
        try:
            return self._known[key](*args)
        except (ValueError, RuntimeError, IndexError) as error:
            # MLX cannot compile a function whose control flow depends on values, some arguments,
            # and some graphs (IndexError).
            lost = isinstance(error, IndexError)
            if not lost and not any(text in str(error) for text in (EVALUATES, NO_TREE)):
                raise
            self._refused.add(key)
            del self._known[key]
            return function(*args)


class BlockFunctions:
    """The blocks of a model as functions.

    Args:
        blocks: the model's blocks.
        slots: for every block, the places of its arrays.
        tape: provides the keys of dropout.
        compiles: see `Functions`.
    """

    def __init__(
        self,
        blocks: BlockList,
        slots: Sequence[dict[str, Slot]],
        tape: KeyTape,
        compiles: bool,
    ) -> None:
        self.blocks, self.slots, self.tape = blocks, slots, tape
        self.functions = Functions(compiles)
        self._signatures: dict[int, str] = {}
        self._dtypes: dict[tuple[int, mx.Dtype], mx.Dtype] = {}

    def refresh(self) -> None:
        """Forget signatures and dtypes, because settings of blocks may have changed."""
        self._signatures.clear()
        self._dtypes.clear()

    def signature(self, index: int) -> str:
        """Signature of a block: equal for blocks that are the same function of their arrays."""
        if index not in self._signatures:
            self._signatures[index] = signature(self.blocks.blocks[index])
        return self._signatures[index]

    def _has_experts(self, index: int) -> bool:
        return calls_experts(self.blocks.blocks[index])

    def _of_experts(self, index: int) -> list[str]:
        return expert_adapters(self.blocks.blocks[index])

    def call_block(
        self, index: int, x: mx.array, args: tuple, kwargs: dict, wanted: OutputRows
    ) -> mx.array:
        """Call a block whose arrays are bound; returns [B, T, D], or [1, n, D] for some rows."""
        block = self.blocks.blocks[index]
        if wanted.rows is None:
            return block(x, *args, **kwargs)
        if wanted.rows_only:
            return BlockParts(block, args, kwargs).output_rows(x, wanted.rows)
        return rows_of(block(x, *args, **kwargs), wanted.rows)

    def forward(
        self,
        index: int,
        arrays: tuple[Arrays, Arrays],
        x: mx.array,
        call: BlockCall,
        wanted: OutputRows,
    ) -> mx.array:
        """The block's output, lazy; the keys drawn by dropout are recorded in `call`.

        Args:
            index: index of the block.
            arrays: its trained arrays and its other arrays, by local name.
            x: input [B, T, D].
            call: the other arguments of the block.
            wanted: rows of the output that are needed.
        """

        def function(
            trained: Arrays,
            frozen: Arrays,
            x: mx.array,
            args: tuple,
            kwargs: dict,
            rows: RowIndices,
        ) -> mx.array:
            args, kwargs = unpack_masks(args, kwargs)
            with bind_arrays(self.slots[index], frozen | trained):
                return self.call_block(index, x, args, kwargs, wanted._replace(rows=rows))

        key = "forward", self.signature(index), wanted.rows_only
        if self.tape.is_used or self._has_experts(index):  # keys are drawn while the graph is built
            key = None
        with self.tape.recording() as call.keys:
            arguments = *pack_masks(call.args, call.kwargs), wanted.rows
            return self.functions.call(key, function, *arrays, x, *arguments)

    def dtype(
        self,
        index: int,
        arrays: tuple[Arrays, Arrays],
        x: mx.array,
        call: BlockCall,
        wanted: OutputRows,
    ) -> mx.Dtype:
        """Dtype of the block's output, from a graph that is built once; arguments as `forward`."""
        key = index, x.dtype
        if key not in self._dtypes:
            args, kwargs = unpack_masks(*pack_masks(call.args, call.kwargs))
            trained, frozen = arrays
            with bind_arrays(self.slots[index], frozen | trained), self.tape.playing(SAME_KEY):
                self._dtypes[key] = self.call_block(index, x, args, kwargs, wanted).dtype
        return self._dtypes[key]

    def gradients(
        self,
        index: int,
        arrays: tuple[Arrays, Arrays],
        x: mx.array,
        cotangent: mx.array,
        call: BlockCall,
        wanted: OutputRows,
        needs_input_grad: bool,
        first: bool = False,
    ) -> tuple[mx.array | None, Arrays, mx.array | None]:
        """Gradients of a block's trained arrays and, if `needs_input_grad`, of its input; lazy.

        Args:
            index, arrays, x, call, wanted: as in `forward`.
            cotangent: gradient of the block's output.
            needs_input_grad: whether the gradient of the input is needed.
            first: whether to return the output too, because it was not computed before.

        Returns:
            The output or None, gradients by local name, and the gradient of the input or None.
        """

        grouped = self._has_experts(index)

        def function(
            trained: Arrays,
            frozen: Arrays,
            x: mx.array,
            cotangent: mx.array,
            args: tuple,
            kwargs: dict,
            keys: list[mx.array],
            rows: RowIndices,
        ) -> list[mx.array]:
            args, kwargs = unpack_masks(args, kwargs)
            of_experts = {n: trained[n] for n in self._of_experts(index) if n in trained}
            others = {name: value for name, value in trained.items() if name not in of_experts}

            def forward(*primals: mx.array) -> list[mx.array]:
                values = frozen | of_experts | dict(zip(others, primals[:-1], strict=True))
                with (
                    tracing_gradient(),
                    bind_arrays(self.slots[index], values),
                    self.tape.playing(keys),
                ):
                    x, own = primals[-1], wanted._replace(rows=rows)
                    return [self.call_block(index, x, args, kwargs, own)]

            sums = {name: mx.zeros(value.shape) for name, value in of_experts.items()}
            if sums:
                mx.eval(sums)
            by_id = {id(of_experts[name]): total for name, total in sums.items()}
            primals = [*others.values(), x]
            if grouped:
                out, found = vjp_by_experts(forward, primals, [cotangent], by_id)
            else:
                out, found = mx.vjp(forward, primals, [cotangent])
            dx = found.pop()
            named = dict(zip(others, found, strict=True)) | sums
            gradients = [named[name].astype(value.dtype) for name, value in trained.items()]
            return [*out[:first], *gradients, *([dx] if needs_input_grad else [])]

        key = "gradients", self.signature(index), wanted.rows_only, needs_input_grad, first
        if first and self.tape.is_used:
            key = None
        arguments = *pack_masks(call.args, call.kwargs), call.keys, wanted.rows
        if grouped:  # experts are picked by values
            key = None
        found = self.functions.call(key, function, *arrays, x, cotangent, *arguments)
        out = found.pop(0) if first else None
        dx = found.pop() if needs_input_grad else None
        return out, dict(zip(arrays[0], found, strict=True)), dx


def rows_of(whole: mx.array, rows: mx.array) -> mx.array:
    """Select rows, int [n], of [B, T, D] as [1, n, D]; no copy if these are all rows."""
    flat = whole.reshape(1, -1, whole.shape[-1])
    return flat if rows.size == flat.shape[1] else flat[:, rows]


@cache
def can_compile() -> bool:
    """Whether MLX can compile: it can be switched off, and on a CPU it needs a C++ compiler."""
    traced = []

    def probe(x: mx.array) -> mx.array:
        traced.append(x)
        return mx.exp(x * x + 1)

    function, one = mx.compile(probe), mx.ones(2)
    try:
        for _ in range(2):
            mx.eval(function(one))
    except RuntimeError:
        return False
    return len(traced) == 1  # switched off, it is called every time
