"""Trained parameters, gradients and optimizer state in a file, a block in memory at a time.

QLoRA's paged optimizers (arXiv 2305.14314, section 3) let the moments wait outside a GPU's
memory until a page fault brings them back. Here parameters and gradients are on disk as well,
and the walk over blocks decides which ones are read.
"""

import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from itertools import zip_longest

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers

from mlx_edgelora.blocks.block_list import BlockList, array_slots
from mlx_edgelora.engine.adapter_state import Arrays, Look, UpdateGuard, add_to, ignored, names_of
from mlx_edgelora.engine.optimizer import BlockUpdate, average, global_norm, squares
from mlx_edgelora.measure.meter import DiskMeter
from mlx_edgelora.storage.page_file import PageFile, Section, Spec

# Bytes of parameters that are updated at a time; the blocks of most models have fewer.
PIECE_BYTES = 8 * 2**20


class PagedAdapterState:
    """The blocks' parameters, gradients and optimizer state in a file.

    The model keeps lazy arrays of NaN of the same shapes, which are never evaluated. Adapters
    outside the blocks (of embedding and head) stay in memory.

    Memory: one block's parameters and gradients; while it is updated `PIECE_BYTES` of parameters,
    or one array, with gradients, state and the new ones.
    Disk: all blocks'; each step reads parameters three times and writes them once, writes
    gradients once (and reads them once more for their norm), reads and writes the state.

    Args:
        model: adapted; its parameters may be lazy, and are evaluated a block at a time.
        folder: where the file lives.
        meter: counts what is read and written.
        compiled: whether the optimizer's arithmetic is compiled.

    Raises:
        EdgeLoraError: no file can be made there, or the volume is full.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike,
        meter: DiskMeter | None = None,
        compiled: bool = False,
    ) -> None:
        self._compiled, self._outside_states = compiled, {}
        self._repeats, self._last = False, (-1, {})
        self._arithmetic: BlockUpdate | None = None
        self._model, self._meter = model, meter or DiskMeter()
        self._blocks, self._update = BlockList(model), UpdateGuard()
        self._names = names_of(model)
        self._outside: Arrays = {}  # sums of gradients of what is in memory
        self._summed: set[int] = set()  # blocks whose sum of gradients has begun
        self._updated: set[int] = set()  # blocks that were updated
        self._gradients: dict[int, Section] = {}
        self._states: dict[int, Section] = {}
        self._file = PageFile(folder, "adapters", "--adapters resident")
        try:
            self._parameters, self._end = self._move_to_file()
        except BaseException:
            self.close()
            raise

    def block(self, index: int, own_memory: bool = False) -> Arrays:
        """Read a block's parameters.

        Raises:
            EdgeLoraError: an update was interrupted.
        """
        self._update.check()
        if self._last[0] == index:
            return dict(self._last[1])
        self._last = -1, {}
        arrays = self._parameters[index].read() if index in self._parameters else {}
        if self._repeats:
            self._last = index, dict(arrays)
        return arrays

    @property
    def repeats(self) -> bool:
        """Whether a block that is asked for twice in a row is read once."""
        return self._repeats

    @repeats.setter
    def repeats(self, repeats: bool) -> None:
        self._repeats, self._last = repeats, (-1, {})

    def prefetch(self, index: int) -> None:
        """Let the system read ahead."""
        if index in self._parameters:
            self._parameters[index].prefetch()

    def load(self, weights: Iterable[tuple[str, mx.array]]) -> None:
        """Write the values to the file, one at a time."""
        for name, value in weights:
            place = self._blocks.local(name)
            if place is None:
                self._model.load_weights([(name, value)], strict=False)
            else:
                index, local = place
                mx.eval(value)
                self._parameters[index].write({local: value})

    def start(self, optimizer: optimizers.Optimizer) -> None:
        """Take the disk space for gradients and state.

        Raises:
            EdgeLoraError: the volume is full.
        """
        self._outside.clear()
        self._outside_states.clear()
        self._arithmetic = BlockUpdate(optimizer, self._compiled)
        self._summed.clear()
        self._updated.clear()
        specs = {index: section.specs() for index, section in self._parameters.items()}
        self._gradients, end = self._sections(self._end, specs)
        states = {index: _state_specs(optimizer, arrays) for index, arrays in specs.items()}
        self._states, end = self._sections(end, states)
        self._file.reserve(end)

    def add(self, gradients: Arrays, look: Look = ignored) -> None:
        """Add to the sums in the file, block by block."""
        for index, arrays in self._by_block(gradients).items():
            if index is None:
                names = list(arrays)
                add_to(arrays, self._outside)
                look({name: self._outside[name] for name in names})
                continue
            total = self._gradients[index].read() if index in self._summed else {}
            add_to(arrays, total)
            self._gradients[index].write(total)
            self._summed.add(index)
            look({f"{self._blocks.prefix}{index}.{local}": x for local, x in total.items()})

    def replace(self, sums: Arrays, look: Look = ignored) -> None:
        """Write the sums of a block to the file."""
        look(sums)
        for index, arrays in self._by_block(dict(sums)).items():
            if index is None:
                self._outside |= arrays
            else:
                self._gradients[index].write(arrays)
                self._summed.add(index)

    def norm(self, count: float) -> mx.array:
        """Norm of the mean; reads all gradients once."""
        every = squares(self._outside, count)
        for index in sorted(self._summed):
            prefix = f"{self._blocks.prefix}{index}."
            for names in self._pieces(index):
                of_piece = squares(self._gradients[index].read(names), count)
                every |= {prefix + local: value for local, value in of_piece.items()}
        return global_norm(every, self._names)

    def update(
        self, optimizer: optimizers.Optimizer, count: float, factor: mx.array | None = None
    ) -> None:
        """Update a block at a time, after what is in memory."""
        with self._update.running():
            self._arithmetic.begin()
            self._update_outside(count, factor)
            mx.eval(optimizer.state)
            order = sorted(self._summed)
            for index, following in zip_longest(order, order[1:]):
                if following is not None:
                    self._prefetch_update(following)
                self._update_block(index, count, factor)
            self._summed.clear()

    def weights(self) -> Mapping[str, mx.array]:
        """A view that reads each array from the file when it is accessed."""
        self._update.check()
        return _View(self._names, self._array)

    def optimizer_state(self) -> Mapping[tuple[str, str], mx.array]:
        """A view that reads each array from the file when it is looked at."""
        self._update.check()
        names = [(name, key) for name, state in self._outside_states.items() for key in state]
        for index in sorted(self._updated):
            prefix = f"{self._blocks.prefix}{index}."
            names += [(prefix + local, key) for local, key in self._states[index].specs()]
        return _View(names, self._state)

    def gradients(self) -> Mapping[str, mx.array]:
        """A view that reads each array from the file when it is looked at."""
        names = list(self._outside)
        for index in sorted(self._summed):
            prefix = f"{self._blocks.prefix}{index}."
            names += [prefix + local for local in self._gradients[index].specs()]
        return _View(names, self._gradient)

    def restore(
        self,
        states: Iterable[tuple[tuple[str, str], mx.array]],
        gradients: Iterable[tuple[str, mx.array]],
    ) -> None:
        """Write the arrays of blocks to the file, one at a time."""
        for (name, key), value in states:
            place = self._blocks.local(name)
            if place is None:
                self._outside_states.setdefault(name, {})[key] = value
            else:
                index, local = place
                mx.eval(value)
                self._states[index].write({(local, key): value})
                self._updated.add(index)
        for name, value in gradients:
            place = self._blocks.local(name)
            if place is None:
                self._outside[name] = value
            else:
                index, local = place
                mx.eval(value)
                self._gradients[index].write({local: value})
                self._summed.add(index)

    def close(self) -> None:
        """Free the file's space."""
        self._file.close()

    def _move_to_file(self) -> tuple[dict[int, Section], int]:
        """Move the blocks' parameters into the file; placeholders stay in the model."""
        slots = array_slots(self._model)
        specs: dict[int, dict[str, Spec]] = {}
        for name in self._names:
            if place := self._blocks.local(name):
                box, key = slots[name]
                specs.setdefault(place[0], {})[place[1]] = (box[key].dtype, box[key].shape)
        sections, end = self._sections(0, specs)
        self._file.reserve(end)
        for index, section in sections.items():
            prefix = f"{self._blocks.prefix}{index}."
            boxes = {local: slots[prefix + local] for local in specs[index]}
            arrays = {local: box[key] for local, (box, key) in boxes.items()}
            mx.eval(arrays)
            section.write(arrays)
            for local, (box, key) in boxes.items():
                dtype, shape = specs[index][local]
                box[key] = mx.full(shape, math.nan, dtype)
        mx.eval([box[key] for box, key in (slots[name] for name in self._resident())])
        return sections, end

    def _sections(self, start: int, specs: Mapping[int, Mapping]) -> tuple[dict[int, Section], int]:
        sections = {}
        for index in sorted(specs):
            sections[index] = Section(self._file, start, specs[index], self._meter)
            start = sections[index].stop
        return sections, start

    def _update_outside(self, count: float, factor: mx.array | None) -> None:
        """Update what is in memory."""
        slots = array_slots(self._model)
        boxes = {name: slots[name] for name in self._resident()}
        gradients = average(self._outside, count)
        parameters = {name: box[key] for name, (box, key) in boxes.items()}
        updated, states = self._arithmetic.apply(
            gradients, parameters, self._outside_states, factor
        )
        mx.eval(updated, states)
        self._outside_states.update(states)
        for name, value in updated.items():
            box, key = boxes[name]
            box[key] = value

    def _update_block(self, index: int, count: float, factor: mx.array | None) -> None:
        for names in self._pieces(index):
            gradients = average(self._gradients[index].read(names), count)
            parameters, states = self._parameters[index].read(names), {name: {} for name in names}
            if index in self._updated:
                wanted = [key for key in self._states[index].specs() if key[0] in states]
                for (name, key), value in self._states[index].read(wanted).items():
                    states[name][key] = value
            parameters, states = self._arithmetic.apply(gradients, parameters, states, factor)
            del gradients
            mx.eval(parameters, states)
            self._parameters[index].write(parameters)
            self._states[index].write(
                {(name, key): v for name, state in states.items() for key, v in state.items()}
            )
            del parameters, states
        self._updated.add(index)

    def _pieces(self, index: int) -> list[list[str]]:
        """The names of a block's parameters, some at a time: those of experts are large."""
        pieces: list[list[str]] = []
        held = 0
        for name, (dtype, shape) in self._parameters[index].specs().items():
            size = math.prod(shape) * dtype.size
            if not pieces or held + size > PIECE_BYTES:
                pieces.append([])
                held = 0
            pieces[-1].append(name)
            held += size
        return pieces

    def _prefetch_update(self, index: int) -> None:
        self._parameters[index].prefetch()
        self._gradients[index].prefetch()
        if index in self._updated:
            self._states[index].prefetch()

    def _by_block(self, gradients: Arrays) -> dict[int | None, Arrays]:
        """Split gradients by block, with local names; those outside keep theirs, under None."""
        groups: dict[int | None, Arrays] = {}
        for name in list(gradients):
            index, local = self._blocks.local(name) or (None, name)
            groups.setdefault(index, {})[local] = gradients.pop(name)
        return groups

    def _resident(self) -> list[str]:
        return [name for name in self._names if self._blocks.local(name) is None]

    def _array(self, name: str) -> mx.array:
        place = self._blocks.local(name)
        if place is not None:
            return self._parameters[place[0]].read_one(place[1])
        box, key = array_slots(self._model)[name]
        return box[key]

    def _state(self, name_and_key: tuple[str, str]) -> mx.array:
        name, key = name_and_key
        place = self._blocks.local(name)
        if place is None:
            return self._outside_states[name][key]
        return self._states[place[0]].read_one((place[1], key))

    def _gradient(self, name: str) -> mx.array:
        place = self._blocks.local(name)
        if place is None:
            return self._outside[name]
        return self._gradients[place[0]].read_one(place[1])


class _View(Mapping[Hashable, mx.array]):
    """Arrays by name that are read when they are looked at."""

    def __init__(self, names: Iterable[Hashable], read: Callable[[Hashable], mx.array]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: Hashable) -> mx.array:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _state_specs(
    optimizer: optimizers.Optimizer, parameters: Mapping[str, Spec]
) -> dict[tuple[str, str], Spec]:
    """Dtype and shape of the optimizer state of each parameter; nothing is evaluated."""
    specs = {}
    for name, (dtype, shape) in parameters.items():
        state: Arrays = {}
        optimizer.init_single(mx.zeros(shape, dtype), state)
        specs |= {(name, key): (value.dtype, value.shape) for key, value in state.items()}
    return specs
