"""The backward of one block by tiles: sums over tiles, and the experts of all of them.

Used by every kind of block that is computed by tiles (`tiled_block.py`, `recurrent_block.py`,
`cached_block.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx

from mlx_edgelora.blocks.attention import add_key_gradients, tracing_gradient
from mlx_edgelora.blocks.block_list import bind_arrays
from mlx_edgelora.blocks.experts import calls_experts, expert_adapters
from mlx_edgelora.blocks.parts import TokenSpan
from mlx_edgelora.blocks.tracing import gradient_hook
from mlx_edgelora.blocks.visits import has_visits, visited_adapters
from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.expert_gradients import ExpertTiles, vjp_by_experts
from mlx_edgelora.engine.expert_tiles import expert_tiles
from mlx_edgelora.engine.hidden import Hidden
from mlx_edgelora.engine.key_windows import KeyWindows
from mlx_edgelora.engine.visited_gradients import vjp_with_visits
from mlx_edgelora.layers.attention import KeySums


class TiledBackward:
    """One backward of a block whose arrays are bound: sums over its tiles.

    Attributes:
        key_values: keys and values of all tokens.
    """

    def __init__(self, block: Any, trained: Arrays) -> None:
        self._block, self._trained = block, trained
        self._sums: Arrays = {}
        self.key_value_sums: KeySums | None = None
        self.key_windows: KeyWindows | None = None
        module = block._context.functions.blocks.blocks[block.index]
        # Summed where they are made: in the graph each tile would have those of all experts.
        self._by_experts = calls_experts(module)
        self._has_visits = has_visits(module)
        apart = [*expert_adapters(module), *visited_adapters(module)]
        self._apart = [name for name in apart if name in trained]
        for name in self._apart:
            self._sums[name] = mx.zeros(trained[name].shape)
        mx.eval(self._sums)
        self.key_values: list[mx.array] = []
        self.experts: ExpertTiles | None = None

    def tile(self, number: int, x: mx.array, cotangent: mx.array | None, dx: Hidden | None) -> None:
        """Differentiate a tile.

        Args:
            x: input [B, t, D].
            cotangent: gradient of the wanted rows of the tile's output; None if there are none.
            dx: where the gradient of the input is put; None if it is not needed.
        """
        block, shared = self._block, self._block._shared(number)
        found = [mx.zeros_like(array) for array in (x, *shared)]
        if self.key_windows is not None:
            self.key_windows.reach(number, self)
        if cotangent is not None:
            with self._part(number, x, cotangent) as part:
                found = self.vjp(*part, tile=number)
            sums, found, pair = (
                self.key_value_sums,
                found[: 1 + len(shared)],
                found[1 + len(shared) :],
            )
            if not sums.used:
                sums.add_whole(pair)
        if block._parts.is_causal:
            found = self._with_own_keys(number, [x, *shared], found)
        self._settle(number, found, dx)

    def compute_experts(self, x: Hidden, cotangent_of: Callable[[int], mx.array | None]) -> None:
        """Compute the experts of all tiles, and their gradients, before the tiles.

        Args:
            x: input of the block.
            cotangent_of: `tile`'s `cotangent` by the number of the tile.
        """
        self.experts = expert_tiles(self._block._context, self._block.index)

        def parts() -> Iterator[tuple]:
            for number in range(len(self._block._context.spans)):
                if (cotangent := cotangent_of(number)) is not None:
                    with self._part(number, x.tile(number), cotangent) as part:
                        yield number, *part

        self.run_experts(parts)

    def run_experts(self, parts: Callable[[], Iterator[tuple]]) -> None:
        """Compute `experts` for all tiles, and their gradients.

        Args:
            parts: each call gives the tiles with a gradient: number, function, inputs, cotangents.
        """
        if (experts := self.experts) is None:
            return
        with tracing_gradient():
            for part in parts():
                experts.begin_gradient(*part)
            if experts.needs_values:
                experts.compute()
                for part in parts():
                    experts.add_gradient(*part)
        experts.differentiate(self._by_id())

    @contextmanager
    def _part(
        self, number: int, x: mx.array, cotangent: mx.array
    ) -> Iterator[tuple[Callable, list[mx.array], list[mx.array]]]:
        """The function that gives the outputs of a tile, its inputs and its cotangents."""
        block, spans, shared = self._block, self._block._context.spans, self._block._shared(number)
        seen = block._parts.visible_keys(spans[number], spans[-1].stop)

        def outputs(*inputs: mx.array) -> list[mx.array]:
            x, *others = inputs
            own, key_values = others[: len(shared)], others[len(shared) :]
            return block._tile_outputs(x, number, seen, key_values, own)

        cotangents = [cotangent, *block._context.shared.cotangent_tile(block.index, number)]
        inputs = [x, *shared, *tokens_of_keys(seen, self.key_values)]
        sums = self.sums_from(seen)
        with ExitStack() as stack:
            # Only attention reads these keys and values.
            if not block._parts.through_cache:
                stack.enter_context(add_key_gradients(sums))
            yield outputs, inputs, cotangents

    def finish_tile(self, number: int, x: mx.array, dx: Hidden | None) -> None:
        """Add the gradient through a tile's own keys and values, which is complete now."""
        shared = self._block._shared(number)
        found = [mx.zeros_like(array) for array in (x, *shared)]
        if dx is not None:
            found[0] = dx.tile(number)
        self._settle(number, self._with_own_keys(number, [x, *shared], found), dx)

    def _with_own_keys(
        self, number: int, inputs: list[mx.array], found: list[mx.array]
    ) -> list[mx.array]:
        """Gradients of a tile's inputs, plus those through its own keys and values."""
        if self.key_value_sums is None:
            return found
        block = self._block
        span = block._context.spans[number]
        cotangents = self.sums_of(span)
        more = self.vjp(
            lambda x, *shared: block._parts.key_values(x, span, shared=shared), inputs, cotangents
        )
        return [a + b for a, b in zip(found, more, strict=True)]

    def totals(self) -> Arrays:
        """Gradients of all trained arrays; zeros for those that no gradient reached."""
        if self.experts is not None:
            self.experts.forget()
        found = {n: self._sums.get(n, mx.zeros_like(v)) for n, v in self._trained.items()}
        found = {name: value.astype(self._trained[name].dtype) for name, value in found.items()}
        mx.eval(found)
        return found

    def submit(self, *arrays: object) -> None:
        """Compute these arrays and the sums so far."""
        self._block._context.pipeline.submit(*arrays, self._sums)

    def _settle(self, number: int, found: list[mx.array], dx: Hidden | None) -> None:
        """Evaluate and store the gradients of a tile's inputs, and the sums so far."""
        key_values = self.key_value_sums.arrays if self.key_value_sums else []
        own, *shared = found
        context = self._block._context
        calls = [call.arrays for call in self.key_value_sums.calls] if self.key_value_sums else []
        context.pipeline.submit(found if dx is not None else [], self._sums, key_values, calls)
        if self.key_windows is not None:
            self.key_windows.keep_calls(number, self)
        if dx is not None:
            dx.put(number, own)
            context.shared.add_tile(self._block._links, number, shared)
        if self.key_value_sums and self._block._parts.is_causal:
            self.key_value_sums.drop(context.spans[number].start)  # no earlier tile sees these

    def sums_from(self, seen: TokenSpan) -> KeySums:
        """The sums of the gradients of keys and values, for a tile that sees these tokens."""
        if self.key_value_sums is None:
            (batch, heads, _, size), other = self.key_values[0].shape, self.key_values[1].shape[-1]
            self.key_value_sums = KeySums(batch, heads, (size, other))
            if self.key_windows is not None:
                self.key_value_sums.window = self.key_windows.window
        self.key_value_sums.start, self.key_value_sums.used = seen.start, False
        return self.key_value_sums

    def sums_of(self, span: TokenSpan) -> list[mx.array]:
        """The gradients of a tile's own keys and values, in their dtypes."""
        totals = self.key_value_sums.tokens(span.start, span.stop)
        pairs = zip(totals, self.key_values, strict=True)
        return [total.astype(array.dtype) for total, array in pairs]

    def vjp(
        self,
        function: Callable[..., list[mx.array]],
        inputs: list[mx.array],
        cotangents: list[mx.array],
        tile: int | None = None,
    ) -> list[mx.array]:
        """Differentiate a part of the block: return gradients of its inputs, sum the others.

        Args:
            function: the part.
            inputs: its inputs.
            cotangents: gradients of its outputs.
            tile: number of the tile, if its experts were computed for this part.
        """
        trained = {n: v for n, v in self._trained.items() if n not in self._apart}
        reached, count = set(), len(trained)

        def bound_function(*primals: mx.array) -> list[mx.array]:
            seen = {
                name: gradient_hook(lambda name=name: reached.add(name))(value)
                for name, value in zip(trained, primals[:count], strict=True)
            }
            with tracing_gradient(), bind_arrays(self._block.slots, seen):
                return function(*primals[count:])

        primals = [*trained.values(), *inputs]
        if self.experts is not None and tile is not None:
            _, found = self.experts.vjp(tile, bound_function, primals, cotangents)
        elif self._by_experts:
            functions = self._block._context.functions
            # Parts of the same block differ in what they are given and give.
            kind = functions.signature(self._block.index), len(inputs), len(cotangents)
            arguments = self._by_id(), functions.affine, kind
            _, found = vjp_by_experts(bound_function, primals, cotangents, *arguments)
        elif self._has_visits:
            _, found = vjp_with_visits(bound_function, primals, cotangents, self._by_id())
        else:
            _, found = mx.vjp(bound_function, primals, cotangents)
        # Arrays that a part does not use have zero gradients, which are not evaluated or added.
        # The values of a tile may decide which arrays these are (experts).
        for name, value in zip(trained, found, strict=False):
            if name in reached:
                # In float32: trained weights may have 16 bits, and a row many tiles.
                before = self._sums.get(name)
                self._sums[name] = value if before is None else before.astype(mx.float32) + value
        return found[count:]

    def _by_id(self) -> dict[int, mx.array]:
        """The sums of gradients of adapters of parts that are computed apart, by their `id`."""
        return {id(self._trained[name]): self._sums[name] for name in self._apart}


def tokens_of_keys(span: TokenSpan, arrays: list[mx.array]) -> list[mx.array]:
    """The tokens of a span, of arrays [B, heads, T, n]."""
    return [array[:, :, span.start : span.stop] for array in arrays]
