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
from mlx_edgelora.blocks.dropout import KeyTape
from mlx_edgelora.blocks.experts import calls_experts, expert_adapters
from mlx_edgelora.blocks.masks import pack_masks, unpack_masks
from mlx_edgelora.blocks.outputs import pack_links, unpack_links
from mlx_edgelora.blocks.packing import Packing, UnknownUseError, Use, packing_now
from mlx_edgelora.blocks.parts import BlockParts
from mlx_edgelora.blocks.tracing import EVALUATES
from mlx_edgelora.blocks.visits import has_visits, visited_adapters
from mlx_edgelora.engine.expert_gradients import vjp_by_experts
from mlx_edgelora.engine.record import BlockCall
from mlx_edgelora.engine.visited_gradients import vjp_with_visits

Arrays = dict[str, mx.array]
RowIndices = mx.array | None
# Part of MLX's error for arguments that are neither arrays nor constants.
NO_TREE = "Function arguments must be trees"
# Number of forms of batches for which a function of rows that share rows is compiled.
MOST_FORMS = 48
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
        # Of functions of rows that share rows: what attention is given, and the forms of batches.
        self._uses: dict[Hashable, list[Use]] = {}
        self._forms: dict[Hashable, set[Hashable]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def call(self, key: Hashable, function: Callable, *args: Any) -> Any:
        """Call a function, or the compiled function with the same key.

        Args:
            key: the same for functions that compute the same of their arguments; None for one
                that is not to be compiled.
            function: what it captures must be the same for all of one key.
            args: trees of arrays and constants.
        """
        if not self.compiles or key is None or key in self._refused:
            return function(*args)
        if (packing := packing_now()) is not None:
            return self._call_packed(packing, (key, packing.shape), function, args)
        return self._call_compiled(key, function, args, function, args)

    def _call_packed(self, packing: Packing, key: Hashable, function: Callable, args: tuple) -> Any:
        """Call a function of rows that share rows; it is compiled for each form of a batch."""
        if (uses := self._uses.get(key)) is None:  # known after a call
            with packing.recording() as seen:
                found = function(*args)
            self._uses[key] = list(seen)
            return found
        form, forms = packing.form(uses), self._forms.setdefault(key, set())
        if key in self._refused or (form not in forms and len(forms) >= MOST_FORMS):
            return function(*args)
        forms.add(form)

        def bound(arrays: list[mx.array], *args: Any) -> Any:
            with packing_now().bound(uses, arrays):
                return function(*args)

        try:
            every = packing.arrays(uses), *args
            return self._call_compiled((key, form), bound, every, function, args)
        except UnknownUseError:
            self._refused.add(key)
            return function(*args)

    def _call_compiled(
        self, key: Hashable, function: Callable, args: tuple, plain: Callable, plain_args: tuple
    ) -> Any:
        """Call the compiled function with a key; if MLX cannot compile it, `plain`."""
        if key in self._refused:
            return plain(*plain_args)
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
            return plain(*plain_args)


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
        self._dtypes: dict[tuple[int, mx.Dtype], list[mx.Dtype]] = {}
        self._apart: dict[int, bool] = {}
        self.affine: dict[Hashable, bool] = {}  # kinds of blocks with experts

    def refresh(self) -> None:
        """Forget what is known of blocks, because their settings may have changed."""
        self._signatures.clear()
        self._dtypes.clear()
        self._apart.clear()

    def signature(self, index: int) -> str:
        """Signature of a block: equal for blocks that are the same function of their arrays."""
        if index not in self._signatures:
            self._signatures[index] = signature(self.blocks.blocks[index])
        return self._signatures[index]

    def _is_apart(self, index: int) -> bool:
        """Whether a part of a block is computed apart from its graph."""
        if index not in self._apart:
            block = self.blocks.blocks[index]
            self._apart[index] = calls_experts(block) or has_visits(block)
        return self._apart[index]

    def _of_parts(self, index: int) -> list[str]:
        """Local names of the trained arrays of such parts."""
        block = self.blocks.blocks[index]
        return [*expert_adapters(block), *visited_adapters(block)]

    def call_block(
        self, index: int, x: mx.array, args: tuple, kwargs: dict, wanted: OutputRows
    ) -> list[mx.array]:
        """Call a block whose arrays are bound.

        Returns:
            The hidden state [B, T, D], or [1, n, D] for some rows, and what later blocks read.
        """
        block = self.blocks.function(index)
        if wanted.rows is not None and wanted.rows_only:  # the last block, which none reads
            parts = BlockParts(block, args, kwargs, form=self.blocks.forms[index])
            return [parts.output_rows(x, wanted.rows)]
        out, *read = self.blocks.outputs(index, block(x, *args, **kwargs))
        return [out if wanted.rows is None else rows_of(out, wanted.rows), *read]

    def _kind(self, index: int) -> tuple:
        """Equal for blocks that are the same function of their arrays and return the same."""
        form = self.blocks.forms[index]
        return self.signature(index), form and form.read

    def forward(
        self,
        index: int,
        arrays: tuple[Arrays, Arrays],
        inputs: list[mx.array],
        call: BlockCall,
        wanted: OutputRows,
    ) -> list[mx.array]:
        """The block's outputs, lazy; the keys drawn by dropout are recorded in `call`.

        Args:
            index: index of the block.
            arrays: its trained arrays and its other arrays, by local name.
            inputs: input [B, T, D], and what the block reads of earlier ones (`call.links`).
            call: the other arguments of the block.
            wanted: rows of the output that are needed.

        Returns:
            See `call_block`.
        """

        def function(
            trained: Arrays,
            frozen: Arrays,
            inputs: list[mx.array],
            args: tuple,
            kwargs: dict,
            rows: RowIndices,
        ) -> list[mx.array]:
            x, *shared = inputs
            args, kwargs = unpack_arguments(args, kwargs, shared)
            with bind_arrays(self.slots[index], frozen | trained):
                return self.call_block(index, x, args, kwargs, wanted._replace(rows=rows))

        key = "forward", self._kind(index), wanted.rows_only
        if self.tape.is_used or self._is_apart(index):  # keys are drawn while the graph is built
            key = None
        with self.tape.recording() as call.keys:
            arguments = *pack_arguments(call), wanted.rows
            return self.functions.call(key, function, *arrays, inputs, *arguments)

    def dtypes(
        self,
        index: int,
        arrays: tuple[Arrays, Arrays],
        inputs: list[mx.array],
        call: BlockCall,
        wanted: OutputRows,
    ) -> list[mx.Dtype]:
        """Dtypes of the block's outputs, from a graph that is built once; see `forward`."""
        x, *shared = inputs
        key = index, x.dtype
        if key not in self._dtypes:
            args, kwargs = unpack_arguments(*pack_arguments(call), shared)
            trained, frozen = arrays
            with bind_arrays(self.slots[index], frozen | trained), self.tape.playing(SAME_KEY):
                found = self.call_block(index, x, args, kwargs, wanted)
            self._dtypes[key] = [array.dtype for array in found]
        return self._dtypes[key]

    def gradients(
        self,
        index: int,
        arrays: tuple[Arrays, Arrays],
        inputs: list[mx.array],
        cotangents: list[mx.array],
        call: BlockCall,
        wanted: OutputRows,
        needs_input_grad: bool,
        first: bool = False,
    ) -> tuple[list[mx.array], Arrays, list[mx.array]]:
        """Gradients of a block's trained arrays and, if `needs_input_grad`, of its inputs; lazy.

        Args:
            index, arrays, inputs, call, wanted: as in `forward`.
            cotangents: gradients of the block's outputs.
            needs_input_grad: whether the gradients of the inputs are needed.
            first: whether to return the outputs too, because they were not computed before.

        Returns:
            The outputs or none, gradients by local name, and gradients of the inputs or none.
        """

        apart = self._is_apart(index)

        def function(
            trained: Arrays,
            frozen: Arrays,
            inputs: list[mx.array],
            cotangents: list[mx.array],
            args: tuple,
            kwargs: dict,
            keys: list[mx.array],
            rows: RowIndices,
        ) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
            of_parts = self._of_parts(index) if apart else []
            visited = {n: trained[n] for n in of_parts if n in trained}
            others = {name: value for name, value in trained.items() if name not in visited}
            count = len(others)

            def forward(*primals: mx.array) -> list[mx.array]:
                values = frozen | visited | dict(zip(others, primals[:count], strict=True))
                x, *shared = primals[count:]
                own = unpack_arguments(args, kwargs, shared)
                with (
                    tracing_gradient(),
                    bind_arrays(self.slots[index], values),
                    self.tape.playing(keys),
                ):
                    return self.call_block(index, x, *own, wanted._replace(rows=rows))

            primals = [*others.values(), *inputs]
            if not apart:
                out, found = mx.vjp(forward, primals, cotangents)
                return out if first else [], found[:count], found[count:] * needs_input_grad
            sums = {name: mx.zeros(value.shape) for name, value in visited.items()}
            mx.eval(sums)
            by_id = {id(visited[name]): total for name, total in sums.items()}
            if has_visits(self.blocks.blocks[index]):
                out, found = vjp_with_visits(forward, primals, cotangents, by_id)
            else:
                kind = self.affine, self.signature(index)
                out, found = vjp_by_experts(forward, primals, cotangents, by_id, *kind)
            named = dict(zip(others, found[:count], strict=True)) | sums
            own = [named[name].astype(value.dtype) for name, value in trained.items()]
            return out if first else [], own, found[count:] * needs_input_grad

        key = "gradients", self._kind(index), wanted.rows_only, needs_input_grad, first
        if first and self.tape.is_used:
            key = None
        if apart:  # a visit is evaluated at once
            key = None
        arguments = *pack_arguments(call), call.keys, wanted.rows
        out, own, of_inputs = self.functions.call(
            key, function, *arrays, inputs, cotangents, *arguments
        )
        return out, dict(zip(arrays[0], own, strict=True)), of_inputs


def pack_arguments(call: BlockCall) -> tuple[tuple, dict]:
    """A block's arguments for `mx.compile`, which would evaluate masks and stand-ins."""
    return pack_links(*pack_masks(call.args, call.kwargs))


def unpack_arguments(args: tuple, kwargs: dict, shared: list[mx.array]) -> tuple[tuple, dict]:
    """The arguments given to `pack_arguments`, with `shared` in place of the stand-ins."""
    return unpack_masks(*unpack_links(args, kwargs, shared))


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
