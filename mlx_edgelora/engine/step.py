"""One training step's loss and gradients: the walk over blocks and the masked, tiled loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_edgelora.blocks.block_list import bind_arrays
from mlx_edgelora.blocks.experts import set_groups
from mlx_edgelora.blocks.gated_mlp import set_slices
from mlx_edgelora.data import Batch
from mlx_edgelora.engine.adapter_state import AdapterState, ResidentAdapterState
from mlx_edgelora.engine.block_weights import Arrays
from mlx_edgelora.engine.gradients import add_into, gradient_tree
from mlx_edgelora.engine.parts import Part, labelled_parts
from mlx_edgelora.engine.tail import GraphLoss
from mlx_edgelora.engine.walk import Pass, Walk
from mlx_edgelora.layers.fused import set_attention_block
from mlx_edgelora.losses.approximate import ApproximateCrossEntropy
from mlx_edgelora.losses.chunked import Project, chunked_cross_entropy, in_graph, token_losses
from mlx_edgelora.losses.exact import CrossEntropy, Objective, check_labels
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.measure.profile import phase
from mlx_edgelora.model.head import ModelHead
from mlx_edgelora.model.lora import without_adapter
from mlx_edgelora.model.weights import StreamedWeights
from mlx_edgelora.planner.plan import Plan

Loss = CrossEntropy | ApproximateCrossEntropy

# Float32 logits of a chunk of tokens, if all logits of a token are computed at once.
LOGITS_BYTES = 4 * 2**20

AnyPart = TypeVar("AnyPart")


class Engine:
    """Computes losses and gradients of batches within a memory plan.

    Tokens without a label never reach the final norm and the head, so a masked prompt costs no
    logits. If possible the last block, too, computes only keys and values for them.

    Args:
        model: the adapted model.
        walk: the walk over its blocks.
        head: its head, read by tiles; None computes whole rows of logits.
        disk: counts the bytes that weights and store read and write.
        training_loss: the exact cross-entropy by default. Evaluation is always exact, and so is
            training if `head` is None.
        adapters: state of the adapters, also the walk's source of them; by default in the model.

    Attributes:
        plan_for: returns the plan for a batch; by default that of the last `set_plan`.
        exact: the exact cross-entropy, for evaluation.
        in_last_part: whether gradients of the last micro-batch of a batch are computed, so that
            those passed to the sink are the last ones of their names.
        empties_cache: whether MLX's buffer cache is emptied after every step, unless
            `clear_cache_threshold` is set.
    """

    def __init__(
        self,
        model: nn.Module,
        walk: Walk,
        head: ModelHead | None,
        disk: DiskMeter,
        training_loss: Loss | None = None,
        adapters: AdapterState | None = None,
    ) -> None:
        self.model, self.disk = model, disk
        self.adapters = ResidentAdapterState(model) if adapters is None else adapters
        self._walk, self.head = walk, head
        # Evaluation uses tiles of the same size.
        tiles = getattr(training_loss, "exact", training_loss) or CrossEntropy()
        self.exact = CrossEntropy(tiles.tile_bytes)
        self.in_last_part = True
        self.training_loss = training_loss or self.exact
        self._plan = Plan()
        self.plan_for: Callable[[Batch], Plan] = lambda batch: self._plan
        self.empties_cache = True

    @property
    def walk(self) -> Walk:
        """The walk over the model's blocks."""
        return self._walk

    @property
    def plan(self) -> Plan:
        """The current plan."""
        return self._plan

    def set_plan(self, plan: Plan) -> None:
        """Follow another plan from now on; weights stay where they are."""
        self._plan = plan
        set_attention_block(plan.attention_block)
        blocks = self._walk.blocks
        stop = len(blocks) - plan.kept_blocks
        by_rows = set_slices(blocks, plan.mlp_bytes, stop, plan.mlp_weights == "rows")
        by_groups = set_groups(blocks, plan.mlp_bytes, stop)
        if isinstance(self._walk.weights, StreamedWeights):
            pairs = zip(by_rows, by_groups, strict=True)
            self._walk.weights.defer([rows | groups for rows, groups in pairs])
        self._walk.set_plan(plan)  # last, because it reads the blocks' settings

    def set_plan_and_residency(self, plan: Plan) -> None:
        """Follow another plan, and keep as many streamed blocks in memory as it says."""
        if isinstance(self._walk.weights, StreamedWeights):
            count = len(self._walk.blocks)
            streamed = count if plan.streamed_blocks is None else plan.streamed_blocks
            self._walk.weights.set_resident_from(streamed)
        self.set_plan(plan)

    def value_and_grad(self, batch: Batch) -> tuple[tuple[mx.array, int], dict]:
        """Mean loss over the labelled tokens, their count, and all gradients, evaluated."""
        gradients: Arrays = {}
        result = self.backward(batch, lambda more: add_into(gradients, more))
        return result, gradient_tree(self.model, gradients)

    def backward(self, batch: Batch, sink: Callable[[Arrays], None]) -> tuple[mx.array, int]:
        """Mean loss over the labelled tokens, and their count; gradients are passed to `sink`.

        `sink` is called with evaluated gradients by name: those of one block at a time, from the
        last block to the first, then those outside the blocks. With several micro-batches each
        name comes once per micro-batch, and the gradients add up. Gradients that `sink` does not
        keep are freed before the next block is computed.
        """
        parts = self.parts(batch, labelled_parts)
        count = sum(part.count for part in parts)
        losses = [
            self.compute(part, partial(_TokenLoss, self, part, part.count / count), sink)
            for part in self.in_turn(parts)
        ]
        loss = losses[0] if len(losses) == 1 else mx.stack(losses).sum()
        return loss, count

    def in_turn(self, parts: Sequence[AnyPart]) -> Iterator[AnyPart]:
        """The micro-batches of a batch, and whether each is the last one in `in_last_part`."""
        for number, part in enumerate(parts, start=1):
            self.in_last_part = number == len(parts)
            yield part

    def compute(
        self,
        part: Part,
        loss_of: Callable[[Pass], "PartLoss"],
        sink: Callable[[Arrays], None],
    ) -> mx.array | tuple:
        """A loss of a part of a batch, as its `graph` gives it; gradients are passed to `sink`."""
        run = partial(self.model, part.tokens)
        with self._walk.forward(run, rows=part.rows, packing=part.packing) as state:
            loss = loss_of(state)
            if state.tail is not None:
                value, outside = self._walk.finish(state, loss)
            else:
                hidden, state.hidden = state.hidden[0], None
                with phase("head"):
                    value, piece, outside = loss.value_and_grad(hidden)
                state.cotangent = piece.astype(hidden.dtype)[None]
                del hidden, piece
                mx.eval(state.cotangent)
            for more in self._walk.backward(state):
                if self._walk.blocks.local(next(iter(more), "")):
                    sink(more)
                else:
                    add_into(outside, more)
                del more
        if outside:
            mx.eval(outside)
            sink(outside)
        return value

    def loss(self, batch: Batch) -> tuple[mx.array, int]:
        """Mean loss over the labelled tokens, and their count; no activations are stored."""
        (loss,), count = self._losses(batch, None)
        return loss, count

    def base_and_adapted_loss(self, batch: Batch) -> tuple[mx.array, mx.array, int]:
        """The losses without and with the adapter, from weights read once; see `loss`.

        Raises:
            EdgeLoraError: the adapter cannot be switched off.
        """
        (adapted, base), count = self._losses(batch, partial(without_adapter, self.model))
        return base, adapted, count

    def _losses(
        self, batch: Batch, again: Callable[[], AbstractContextManager] | None
    ) -> tuple[list[mx.array], int]:
        """Mean losses over the labelled tokens, the second one inside `again`, and their count."""
        parts = self.parts(batch, labelled_parts, evaluates=True)

        def measure(state: Pass, hidden: mx.array, part: Part) -> mx.array:
            if self.head is None:
                return self.chunked(state, hidden, part.labels, gradient=False)[0]
            return self.exact.value(hidden, self.head, part.labels)[0]

        totals, count = [0.0, 0.0][: 1 + (again is not None)], 0
        for part in parts:
            losses = self.measure(part, measure, again)
            totals = [total + part.count * loss for total, loss in zip(totals, losses, strict=True)]
            count += part.count
        return [total / count for total in totals], count

    def token_losses(
        self, part: Part, again: Callable[[], AbstractContextManager] | None = None
    ) -> list[mx.array]:
        """The loss of each token of a part, float32 [n], and the same inside `again`."""

        def measure(state: Pass, hidden: mx.array, part: Part) -> mx.array:
            if self.head is None:
                return token_losses(hidden, part.labels, *self._projection(state, hidden))
            return self.exact.losses(hidden, self.head, part.labels)

        return self.measure(part, measure, again)

    def measure(
        self,
        part: Part,
        measure: Callable[[Pass, mx.array, Part], mx.array],
        again: Callable[[], AbstractContextManager] | None = None,
    ) -> list[mx.array]:
        """What `measure` gives of the last hidden states, [n, D]; no activations are stored.

        Args:
            part: part of a batch.
            measure: called with the pass, the hidden states and the part.
            again: makes a context in which it is computed a second time, from weights that are
                read once if the model's blocks share no outputs.
        """
        if again is not None and self._walk.blocks.share_outputs:
            # A second forward would replace what the first keeps.
            found = self.measure(part, measure)
            with self._walk.inside(again):
                return found + self.measure(part, measure)
        run = partial(self.model, part.tokens)
        options = {"keep": False, "rows": part.rows, "packing": part.packing, "again": again}
        with self._walk.forward(run, **options) as state:
            hidden, state.hidden = state.hidden[0], None
            found = [measure(state, hidden, part)]
            mx.eval(found)
            del hidden
            if again is not None:
                second, state.again = state.again[0], None
                with again():
                    found.append(measure(state, second, part))
                    mx.eval(found)
        return found

    def parts(
        self,
        batch: Batch,
        divide: Callable[[Batch, int, bool], list[Part]],
        evaluates: bool = False,
    ) -> list[Part]:
        """Divide a batch into micro-batches by its plan, and follow that plan.

        Args:
            batch: the batch.
            divide: divides it, as `labelled_parts` does.
            evaluates: whether no gradients are needed.
        """
        plan = self.plan_for(batch)
        if plan != self._plan:
            self.set_plan(plan)
        exact = isinstance(self.training_loss, CrossEntropy) and self.head is not None
        fills = self._walk.is_compiled and exact and not evaluates
        return divide(batch, plan.micro_batches, fills)

    def close(self) -> None:
        """Free the store's disk space and close the files of the weights."""
        self._walk.store.close()
        self._walk.weights.close()
        set_attention_block(None)

    def chunked(
        self,
        state: Pass,
        hidden: mx.array,
        labels: mx.array,
        gradient: bool,
        trained: Arrays | None = None,
        evaluate: Callable[..., None] = mx.eval,
        objective: Objective | None = None,
    ) -> tuple[mx.array | tuple, mx.array | None, Arrays]:
        """The loss from whole rows of logits; see `chunked_cross_entropy`."""
        projection = self._projection(state, hidden, trained)
        smoothing = self.training_loss.label_smoothing if gradient and objective is None else 0.0
        return chunked_cross_entropy(
            hidden, labels, *projection, gradient, smoothing, evaluate, objective
        )

    def _projection(
        self, state: Pass, hidden: mx.array, trained: Arrays | None = None
    ) -> tuple[Project, Arrays, int]:
        """The model's head as a function, its trained parameters, and the tokens of a chunk."""

        def logits(hidden: mx.array, trained: Arrays) -> mx.array:
            with self._walk.tail(state, hidden[None], trained):
                return self.model(mx.zeros((1, hidden.shape[0]), mx.int32))[0]

        trained = self._walk.outside() if trained is None else trained
        return logits, trained, max(1, LOGITS_BYTES // logits(hidden[:1], trained).nbytes)


class PartLoss(GraphLoss, Protocol):
    """A loss of a part of a batch, alone or as a part of a graph."""

    def value_and_grad(self, hidden: mx.array) -> tuple[mx.array | tuple, mx.array, Arrays]:
        """The loss of hidden states [n, D], its gradient by them, and gradients of `outside`."""
        ...


class _TokenLoss:
    """The training loss of a part: a mean over its labelled tokens; see `PartLoss`.

    Args:
        engine: the engine with the loss.
        part: part of the batch.
        share: factor of the loss.
        state: the current pass.
    """

    def __init__(self, engine: Engine, part: Part, share: float, state: Pass) -> None:
        self._engine, self._part, self._share, self._state = engine, part, share, state
        self.outside = engine.walk.outside()
        loss, head = engine.training_loss, engine.head
        # A loss that chooses tokens by the labels is another graph for every batch.
        compiles = isinstance(loss, CrossEntropy) and head is not None and head.is_resident
        self.key = ("loss", id(engine), loss) if compiles else None
        if head is not None and state.tail is not None:
            check_labels(mx.zeros((part.labels.size, head.dims)), head, part.labels)
        exact = isinstance(loss, CrossEntropy) and head is not None
        # A compiled function keeps the objects that it captures, so it captures nothing of a batch.
        self.graph = partial(_exact_graph, engine.walk, loss, head) if exact else self._any_graph

    @property
    def arrays(self) -> list[mx.array]:
        """Labels and their weights."""
        part, weights = self._part, self._part.weights
        if weights is None:
            weights = mx.full(part.labels.shape, 1 / part.count)
        return [part.labels, self._share * weights]

    def value_and_grad(self, hidden: mx.array) -> tuple[mx.array, mx.array, Arrays]:
        """See `PartLoss`; evaluated piece by piece."""
        engine, part, share = self._engine, self._part, self._share
        if engine.head is None:
            loss, piece, outside = engine.chunked(self._state, hidden, part.labels, gradient=True)
        else:
            weights = [] if part.weights is None else [part.weights]
            operands = hidden, engine.head, part.labels, *weights
            (loss, _), gradients = engine.training_loss.value_and_grad(*operands)
            piece, outside = gradients.hidden, engine.head.gradients_by_name(gradients)
        if share != 1:
            loss, piece = share * loss, share * piece
            outside = {name: share * value for name, value in outside.items()}
        return loss, piece, outside

    def _any_graph(self, hidden: mx.array, outside: Arrays, *arrays: mx.array) -> mx.array:
        """The loss of the part, times its share."""
        engine, (labels, _) = self._engine, arrays
        loss, head, hidden = engine.training_loss, engine.head, hidden.reshape(-1, hidden.shape[-1])
        if head is None:
            return self._share * in_graph(
                lambda hidden, trained: engine.chunked(
                    self._state, hidden, labels, True, trained, evaluate_nothing
                ),
                hidden,
                outside,
            )
        with bind_arrays(engine.walk.outside_slots, outside):
            return self._share * loss(hidden, head, labels)[0]


def _exact_graph(
    walk: Walk,
    loss: CrossEntropy,
    head: ModelHead,
    hidden: mx.array,
    outside: Arrays,
    labels: mx.array,
    weights: mx.array,
) -> mx.array:
    """The weighted sum of the losses of [1, n, D], with trained parameters outside the blocks."""
    with bind_arrays(walk.outside_slots, outside):
        return loss.graph(hidden.reshape(-1, hidden.shape[-1]), head, labels, weights)


def evaluate_nothing(*_: object) -> None:
    """Evaluate nothing, because a graph is being built."""
