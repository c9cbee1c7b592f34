"""Find the gated MLPs of a model by what their code does, and compute them in slices.

A gated MLP is a module with three linear layers and nothing else. It passes its input to two of
them, and the third gets an entrywise function of their outputs. That function is the module's own
code, called with stand-ins for its layers, so every activation works. A function that combines
features (a top-k, a norm) is detected in a trial, and the module is left unchanged.

Its matrices can be left out of the block and read by rows, for every tile of tokens anew
(`layers/mlp_rows.py`).
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_edgelora.blocks.block_list import BlockList
from mlx_edgelora.blocks.checks import MODEL_ERRORS
from mlx_edgelora.blocks.experts import are_experts
from mlx_edgelora.blocks.lora_layers import DoRALinear, LoRALinear
from mlx_edgelora.blocks.stand_in import stand_in
from mlx_edgelora.blocks.trained import trains_weights
from mlx_edgelora.blocks.visits import VISITS, Place
from mlx_edgelora.layers.linear import DequantizedLinear
from mlx_edgelora.layers.mlp import TILE_BYTES, Activation, Packing, Projection, gated_mlp
from mlx_edgelora.layers.mlp_rows import RowMlp, compute_by_rows, visit_backward, visit_forward
from mlx_edgelora.layers.tile_order import Span

MATRICES = (nn.Linear, nn.QuantizedLinear, DequantizedLinear)
MATRIX_ARRAYS = ("weight", "scales", "biases")
ADAPTER_ARRAYS = ("lora_a", "lora_b")
# Tokens and features of the trial.
TRIAL = (2, 8)


class MlpLayers(NamedTuple):
    """The names of a gated MLP's layers: the two that take its input, and the last one."""

    inputs: tuple[str, str]
    down: str


class _Sliced:
    """Mixin for the class of a gated MLP; its settings are attributes of the mixed class."""

    @property
    def is_visited(self) -> bool:
        """Whether its matrices are read by rows."""
        return self._reads_rows and self._tile_bytes is not None

    def adapters(self) -> dict[str, mx.array]:
        """The trained arrays by name."""
        return {
            f"{name}.{key}": self[name][key]
            for name in (*self._form.inputs, self._form.down)
            for key in ADAPTER_ARRAYS
            if key in self[name]
        }

    def __call__(self, x: mx.array) -> mx.array:
        """Map [..., d] to [..., d] in slices, or at once if an adapter has dropout."""
        if self.is_visited:
            call = MlpCall(x.reshape(-1, x.shape[-1]), self.adapters(), _read_by_rows(self))
            y = VISITS.handle(call)
            y = compute_by_rows(*call) if y is None else y
            return y.reshape(*x.shape[:-1], -1)
        layers = [self[name] for name in (*self._form.inputs, self._form.down)]
        if self._tile_bytes is None or any(_drops(layer) for layer in layers):
            return super().__call__(x)
        projections = [_projection(layer) for layer in layers]
        down, gain = projections[-1], projections[-1].gain
        if gain is not None:  # its rows span all slices: it multiplies their sum, before the bias
            projections[-1] = replace(down, gain=None, bias=None)
        y = gated_mlp(x, *projections, self._activation, tile_bytes=self._tile_bytes)
        if gain is None:
            return y
        y = gain.astype(y.dtype) * y
        return y if down.bias is None else y + down.bias.astype(y.dtype)


class MlpCall(NamedTuple):
    """A call of a gated MLP that is read by rows; see `VisitedCall`.

    Attributes:
        x: [n, d].
        adapters: trained arrays by name in the module.
        mlp: see `RowMlp`.
    """

    x: mx.array
    adapters: dict[str, mx.array]
    mlp: RowMlp

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output."""
        return self.x.shape[0], self.mlp.projections[2].out_dims

    def inputs(self) -> list[mx.array]:
        """See `VisitedCall`."""
        return [self.x]

    def forward(self) -> mx.array:
        """The output [n, out], evaluated."""
        return visit_forward(self.x, self.mlp)

    def backward(self, dy: mx.array, sums: dict[str, mx.array]) -> mx.array:
        """See `VisitedCall`."""
        return visit_backward(self.x, dy, self.mlp, sums)


def slice_mlps(
    blocks: BlockList, tile_bytes: int = TILE_BYTES, source: object | None = None
) -> str:
    """Let every gated MLP in the blocks compute in slices; call it after `add_lora`.

    Args:
        blocks: the blocks of a model; the classes of their gated MLPs are replaced.
        tile_bytes: see `gated_mlp`.
        source: source of the blocks' weights; used if it is a `RowSource`.

    Returns:
        The number of gated MLPs and of blocks with one, as text.
    """
    found = 0
    with_one: set[int] = set()
    kinds: dict[tuple, type] = {}
    reader = source if hasattr(source, "start_rows") else None
    for index, block in enumerate(blocks.blocks):
        for path, module in block.named_modules():
            form = find_gated_mlp(module)
            if form is None or trains_weights(module):
                continue
            found += 1
            with_one.add(index)
            # One class for modules with the same settings, so that they share a compiled function.
            key = type(module), form, _settings(module)
            if key not in kinds:
                members = {
                    "_form": form,
                    "_activation": staticmethod(own_activation(module, form)),
                    "_tile_bytes": tile_bytes,
                    "_reads_rows": False,
                }
                kinds[key] = type(key[0].__name__, (_Sliced, key[0]), members)
            object.__setattr__(module, "__class__", kinds[key])
            object.__setattr__(module, "_place", Place(reader, index, path))
    return f"{found} gated MLPs in {len(with_one)} of {len(blocks)} blocks"


def set_slices(
    blocks: BlockList, tile_bytes: int | None, stop: int, by_rows: bool = False
) -> list[set[str]]:
    """Change the size of slices, after `slice_mlps`.

    Args:
        blocks: as in `slice_mlps`.
        tile_bytes: size in the blocks below `stop`; None computes MLPs layer by layer.
        stop: in this block and those above, MLPs are computed layer by layer.
        by_rows: whether the matrices are read by rows, in blocks where that is possible.

    Returns:
        For every block, the local names of the frozen arrays that are read by rows.
    """
    names: list[set[str]] = []
    for index, block in enumerate(blocks.blocks):
        names.append(set())
        for module in block.modules():
            if isinstance(module, _Sliced):
                size = tile_bytes if index < stop else None
                object.__setattr__(module, "_tile_bytes", size)
                object.__setattr__(module, "_reads_rows", by_rows and can_read_rows(block))
                if module.is_visited:
                    names[-1] |= {name for layer in _arrays_on_disk(module) for name in layer}
    return names


def can_read_rows(block: nn.Module) -> bool:
    """Whether a block's only gated MLP can be read by rows.

    Parts of a block are visited one at a time, so there must be no experts. Adapters with dropout
    or gains need whole matrices. `planner/shape.py` asks the same of a block without slices.
    """
    parts = [m for m in block.modules() if isinstance(m, _Sliced) or are_experts(m)]
    if len(parts) != 1 or not isinstance(parts[0], _Sliced):
        return False
    return needs_no_whole_matrix(parts[0])


def needs_no_whole_matrix(mlp: nn.Module) -> bool:
    """Whether the adapters of a gated MLP have neither dropout nor gains."""
    return not any(isinstance(layer, DoRALinear) or has_dropout(layer) for layer in mlp.values())


def find_gated_mlp(module: nn.Module) -> MlpLayers | None:
    """The layers of a module if it is a gated MLP that can be sliced, else None.

    No weights are evaluated: stand-ins take the place of the layers.
    """
    if isinstance(module, _Sliced) or len(module) != 3 or not all(map(_is_known, module.values())):
        return None
    signature = inspect.signature(type(module).__call__)
    if len(signature.parameters) != 2:
        return None
    x = mx.zeros((1, TRIAL[0], 4))
    calls: list[tuple[str, mx.array]] = []
    results = {
        name: mx.random.normal((1, *TRIAL), key=mx.random.key(i)) for i, name in enumerate(module)
    }

    def answer(name: str) -> Callable[[mx.array], mx.array]:
        def layer(given: mx.array) -> mx.array:
            calls.append((name, given))
            return results[name]

        return layer

    try:
        out = stand_in(module, {name: answer(name) for name in module})(x)
    except MODEL_ERRORS:
        return None
    names = [name for name, given in calls if given is x]
    if len(calls) != 3 or sorted(name for name, _ in calls) != sorted(module) or len(names) != 2:
        return None
    down = next(name for name in module if name not in names)
    if out is not results[down]:
        return None
    form = MlpLayers((names[0], names[1]), down)
    parts = [results[name][0] for name in form.inputs]
    return (
        form
        if _is_pointwise(own_activation(module, form), *parts) and _fits(module, form)
        else None
    )


def own_activation(module: nn.Module, form: MlpLayers) -> Activation:
    """The module's own function of the outputs of its first two layers."""
    results: dict[str, mx.array] = {}

    def last(h: mx.array) -> mx.array:
        results[form.down] = h
        return h

    answers: dict[str, Any] = {name: lambda x, name=name: results[name] for name in form.inputs}
    copy = stand_in(module, answers | {form.down: last})

    def activation(first: mx.array, second: mx.array) -> mx.array:
        results.update(zip(form.inputs, (first[None], second[None]), strict=True))
        copy(first[None])
        h = results.pop(form.down)[0]
        results.clear()
        return h

    return activation


def _settings(module: nn.Module) -> str:
    """Description of a module's attributes; two objects of unknown types are never equal."""
    items = sorted(vars(module).items())
    plain = (bool, int, float, str, set, type(None))
    return repr([(key, v if isinstance(v, plain) else id(v)) for key, v in items])


def _is_pointwise(activation: Activation, first: mx.array, second: mx.array) -> bool:
    """Whether an entry of the result depends only on the same entries of the inputs."""
    whole = activation(first, second)
    if whole.shape != first.shape:
        return False
    for rows, columns in ((slice(0, 1), slice(None)), (slice(None), slice(2, 5))):
        part = activation(first[rows, columns], second[rows, columns])
        if not mx.allclose(part, whole[rows, columns], rtol=1e-4, atol=1e-6).item():
            return False
    return True


def _is_known(layer: object) -> bool:
    if type(layer) in (LoRALinear, DoRALinear):
        layer = layer.linear
    return type(layer) in MATRICES


def _fits(module: nn.Module, form: MlpLayers) -> bool:
    first, second, down = (_projection(module[name]) for name in (*form.inputs, form.down))
    return (first.out_dims, first.in_dims) == (second.out_dims, second.in_dims) and (
        down.in_dims == first.out_dims
    )


def has_dropout(layer: nn.Module) -> bool:
    """Whether an adapter drops some of its inputs in training."""
    return "dropout" in layer and layer.dropout._p_1 < 1


def _drops(layer: nn.Module) -> bool:
    return has_dropout(layer) and layer.dropout.training


def _arrays_on_disk(module: nn.Module) -> list[list[str]]:
    """Names in the block of the arrays of each matrix of a gated MLP: gate and up, then down."""
    found = []
    for name in (*module._form.inputs, module._form.down):
        layer, path = module[name], f"{module._place.path}.{name}"
        if isinstance(layer, LoRALinear):
            layer, path = layer.linear, f"{path}.linear"
        found.append([f"{path}.{key}" for key in MATRIX_ARRAYS if layer.get(key) is not None])
    return found


def _read_by_rows(module: nn.Module) -> RowMlp:
    """A gated MLP with its arrays of now; its matrices are read when they are needed."""
    layers = (*module._form.inputs, module._form.down)
    projections = tuple(_projection(module[name]) for name in layers)
    names, place = _arrays_on_disk(module), module._place

    def start(number: int, span: Span) -> Callable[[], Projection]:
        projection, own = projections[number], names[number]
        keys = [name.rpartition(".")[2] for name in own]
        wait = place.source and place.source.start_rows(place.index, own, range(*span))
        if wait:
            return lambda: replace(projection, **dict(zip(keys, wait().values(), strict=True)))
        arrays = {key: getattr(projection, key)[slice(*span)] for key in keys}
        return lambda: replace(projection, **arrays)

    return RowMlp(projections, layers, module._activation, start, module._tile_bytes)


def _projection(layer: nn.Module) -> Projection:
    lora: dict[str, Any] = {}
    if isinstance(layer, LoRALinear | DoRALinear):
        lora = {"lora_a": layer.lora_a, "lora_b": layer.lora_b, "scale": layer.scale}
        if isinstance(layer, DoRALinear):
            lora["gain"] = layer.gain()
        layer = layer.linear
    own = {name: layer.get(name) for name in ("weight", "scales", "biases", "bias")}
    if own["scales"] is not None:
        lora["packing"] = Packing(layer.group_size, layer.bits, layer.mode)
    return Projection(**own, **lora)
