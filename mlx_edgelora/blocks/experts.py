"""Find the layers of experts of a model by what their code does, and compute them by experts.

A layer of experts is a module that is called with tokens and the experts that each of them picks,
and whose only arrays are in linear layers with a matrix for each expert. In a trial its own code,
with small stand-ins for these layers, must give the same for one expert after the other as for all
at once. Then this code, whatever its activation, is the function of one expert.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_edgelora.blocks.apart import PartCalls
from mlx_edgelora.blocks.block_list import BlockList
from mlx_edgelora.blocks.checks import MODEL_ERRORS
from mlx_edgelora.blocks.lora_layers import LoRASwitchLinear
from mlx_edgelora.blocks.stand_in import stand_in
from mlx_edgelora.blocks.trained import trains_weights
from mlx_edgelora.blocks.visits import Place
from mlx_edgelora.layers.experts import Arrays, Experts, compute_experts
from mlx_edgelora.layers.linear import frozen_matmul, plus_product

# Tokens, experts for each of them, experts and width of the trial.
TRIAL = (5, 2, 3, 4)
FROZEN = ("weight", "scales", "biases", "bias")
TRAINED = ("lora_a", "lora_b")


@dataclass(frozen=True)
class _Place(Place):
    """Where a layer of experts is, and how many each token picks."""

    picks: list[int] = field(default_factory=list, repr=False)  # of a token in the last call


class _ByExperts:
    """Mixin for the class of a layer of experts."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Map [..., d] through the experts `indices` [..., k] to [..., k, out]."""
        if self._group_bytes is None:
            return super().__call__(x, indices)
        adapters = {
            f"{name}.{key}": self[name][key]
            for name in self._layers
            for key in TRAINED
            if key in self[name]
        }
        names = _frozen_names(self)
        held = {name: _array(self, name) for name in names}
        bytes_of_one = sum(array.nbytes for array in held.values()) // self._experts
        place = self._place

        def frozen(rows: list[int]) -> Callable[[], Arrays]:
            if place.source is not None:
                of_file = [f"{place.path}.{name}" for name in names]
                wait = place.source.start_rows(place.index, of_file, rows)
                if wait is not None:
                    return lambda: dict(zip(names, wait().values(), strict=True))
            return lambda: {name: array[mx.array(rows)] for name, array in held.items()}

        # Half of it, if that is an expert, because the next group is read while one is used.
        group = self._group_bytes // max(1, 2 * bytes_of_one)
        settings = Experts(_function_of_one(self), frozen, max(1, group), ahead=group > 0)
        k = indices.shape[-1]
        place.picks[:] = [k]
        flat, picked = x.reshape(-1, x.shape[-1]), mx.stop_gradient(indices.reshape(-1, k))
        call = ExpertCall(flat, picked, adapters, settings, self._width(flat, held | adapters))
        y = EXPERTS.handle(call)
        if y is None:
            y = compute_experts(*call[:4])
        return y.reshape(*indices.shape, -1)

    def _width(self, x: mx.array, arrays: Arrays) -> int:
        """Entries of what an expert gives; only a graph is built."""
        one = {name: array[0] for name, array in arrays.items()}
        return _function_of_one(self)(mx.zeros_like(x[:1]), one).shape[-1]


class ExpertCall(NamedTuple):
    """A call of a layer of experts.

    Attributes:
        x: [n, d].
        indices: int [n, k].
        adapters: trained arrays by name in the layer.
        experts: see `Experts`.
        width: entries of what an expert gives.
    """

    x: mx.array
    indices: mx.array
    adapters: Arrays
    experts: Experts
    width: int


# Of layers that are computed by groups; they return [n, k, out].
EXPERTS = PartCalls[ExpertCall]("experts")


def any_experts(call: ExpertCall) -> mx.array:
    """What stands in for experts in trials of blocks: a function of each token and its picks.

    That experts compute token by token is known of layers that are computed by groups
    (`find_experts`), so a trial reads none of them. Which are picked depends on values, as it may.
    """
    picks = mx.stop_gradient(call.indices)[..., None]
    return call.x[:, None] * (1 + 0.1 * picks).astype(call.x.dtype)


def group_experts(blocks: BlockList, source: object) -> int:
    """Let every layer of experts be computable by groups; call it after `add_lora`.

    Until `set_groups` is called, they are computed as before.

    Args:
        blocks: the blocks of a model; the classes of their layers of experts are replaced.
        source: source of the blocks' weights; used if it is a `RowSource`.

    Returns:
        Their number.
    """
    found = 0
    kinds: dict[tuple, type] = {}
    reader = source if hasattr(source, "start_rows") else None
    for index, block in enumerate(blocks.blocks):
        for path, module in block.named_modules():
            layers = find_experts(module)
            if layers is None or trains_weights(module):
                continue
            found += 1
            key = type(module), layers
            if key not in kinds:
                members = {"_layers": layers, "_group_bytes": None, "_kind": key[0]}
                kinds[key] = type(key[0].__name__, (_ByExperts, key[0]), members)
            object.__setattr__(module, "__class__", kinds[key])
            count = _base(module[layers[0]])["weight"].shape[0]
            object.__setattr__(module, "_experts", count)
            object.__setattr__(module, "_place", _Place(reader, index, path))
    return found


def set_groups(blocks: BlockList, group_bytes: int | None, stop: int) -> list[set[str]]:
    """Change the size of groups, after `group_experts`.

    Args:
        blocks: as in `group_experts`.
        group_bytes: most bytes of a group in the blocks below `stop`, at least one expert; None
            computes all experts at once.
        stop: in this block and those above, all experts are computed at once.

    Returns:
        For every block, the local names of the frozen arrays that only groups of experts use.
    """
    names: list[set[str]] = []
    for index, block in enumerate(blocks.blocks):
        names.append(set())
        for path, module in block.named_modules():
            if isinstance(module, _ByExperts):
                size = group_bytes if index < stop else None
                object.__setattr__(module, "_group_bytes", size)
                if size is not None:
                    names[-1] |= {f"{path}.{name}" for name in _frozen_names(module)}
    return names


def are_experts(module: nn.Module) -> bool:
    """Whether a module is a layer of experts that can be computed by groups."""
    return isinstance(module, _ByExperts)


def calls_experts(block: nn.Module) -> bool:
    """Whether a block computes experts by groups."""
    return any(
        isinstance(module, _ByExperts) and module._group_bytes is not None
        for module in block.modules()
    )


def expert_picks(block: nn.Module) -> int:
    """Experts that a token picked in the last call of a block; 0 without experts by groups."""
    found = [m for m in block.modules() if isinstance(m, _ByExperts) and m._group_bytes is not None]
    return max((k for module in found for k in module._place.picks), default=0)


def expert_adapters(block: nn.Module) -> list[str]:
    """Local names of the trained arrays of experts that are computed by groups."""
    return [
        f"{path}.{name}.{key}"
        for path, module in block.named_modules()
        if isinstance(module, _ByExperts) and module._group_bytes is not None
        for name in module._layers
        for key in TRAINED
        if key in module[name]
    ]


def find_experts(module: nn.Module) -> tuple[str, ...] | None:
    """The names of the linear layers of a layer of experts; None if the module is none.

    No weights are evaluated.
    """
    if isinstance(module, _ByExperts):
        return None
    layers = tuple(name for name, child in module.items() if _is_known(child))
    arrays = [name for name, _ in tree_flatten(module.parameters())]
    if not layers or any(name.partition(".")[0] not in layers for name in arrays):
        return None
    if len(inspect.signature(type(module).__call__).parameters) != 3:
        return None
    tokens, k, experts, width = TRIAL
    keys = iter(mx.random.split(mx.random.key(0), len(layers) + 2))
    weights = {name: mx.random.normal((experts, width, width), key=next(keys)) for name in layers}
    x = mx.random.normal((tokens, width), key=next(keys))
    indices = mx.argsort(mx.random.normal((tokens, experts), key=next(keys)), axis=-1)[:, :k]

    def answer(name: str) -> Callable:
        return lambda x, indices, sorted_indices=False: x @ weights[name][indices]

    def one(weight: mx.array) -> Callable:
        return lambda x, indices, sorted_indices=False: x @ weight

    try:
        whole = stand_in(module, {name: answer(name) for name in layers})(x[None], indices[None])
        agree = [whole.shape == (1, tokens, k, width)]
        picked = np.array(indices)
        for expert in range(experts):
            # Only the tokens that pick it: others must not matter.
            rows, places = (mx.array(found) for found in np.nonzero(picked == expert))
            single = stand_in(module, {name: one(weights[name][expert]) for name in layers})
            y = single(x[rows], mx.zeros((rows.size, 1), mx.int32))
            agree.append(mx.allclose(y[:, 0], whole[0, rows, places], rtol=1e-4, atol=1e-5).item())
    except MODEL_ERRORS:
        return None
    return layers if all(agree) else None


def count_experts(module: nn.Module) -> int:
    """Number of experts of a layer of experts; 0 if the module is none."""
    layers = module._layers if isinstance(module, _ByExperts) else find_experts(module)
    return _base(module[layers[0]])["weight"].shape[0] if layers else 0


def _is_known(layer: object) -> bool:
    """Whether this is a linear layer of experts, adapted or not, that can be computed singly."""
    if isinstance(layer, LoRASwitchLinear):
        if layer.dropout._p_1 < 1:  # its keys are drawn for all experts at once
            return False
        layer = layer.linear
    if type(layer) not in (SwitchLinear, QuantizedSwitchLinear):
        return False
    return layer.get("global_scale") is None


def _base(layer: nn.Module) -> nn.Module:
    return layer.linear if isinstance(layer, LoRASwitchLinear) else layer


def _frozen_names(module: nn.Module) -> list[str]:
    names = []
    for name in module._layers:
        inner = ".linear" if isinstance(module[name], LoRASwitchLinear) else ""
        held = _base(module[name])
        names += [f"{name}{inner}.{key}" for key in FROZEN if held.get(key) is not None]
    return names


def _array(module: nn.Module, name: str) -> mx.array:
    for key in name.split("."):
        module = module[key]
    return module


def _function_of_one(module: nn.Module) -> Callable[[mx.array, Arrays], mx.array]:
    """The module's own code for a single expert, with its arrays by name."""
    on_gpu = mx.default_device() == mx.gpu

    def function(x: mx.array, arrays: Arrays) -> mx.array:
        layers = {name: _linear(module[name], name, arrays, on_gpu) for name in module._layers}
        zeros = mx.zeros((x.shape[0], 1), mx.int32)
        return stand_in(module, layers, module._kind)(x, zeros).squeeze(-2)

    return function


def _linear(layer: nn.Module, name: str, arrays: Arrays, on_gpu: bool) -> Callable[..., mx.array]:
    """A linear layer of one expert."""
    base = _base(layer)
    inner = f"{name}.linear" if base is not layer else name
    own = {key: arrays.get(f"{inner}.{key}") for key in FROZEN}
    a, b = (arrays.get(f"{name}.{key}") for key in TRAINED)

    def product(x: mx.array) -> mx.array:
        if own["scales"] is None:
            return x @ own["weight"].astype(x.dtype).T
        packed = own["weight"], own["scales"], own["biases"]
        packing = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
        if on_gpu:
            return mx.quantized_matmul(x, *packed, transpose=True, **packing)
        return frozen_matmul(x, *packed, **packing)

    def linear(x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = product(x)
        if own["bias"] is not None:
            y = y + own["bias"].astype(y.dtype)
        if a is not None:
            z = x @ a.astype(x.dtype).T
            y = plus_product(y, layer.scale * z, b.astype(x.dtype).T)
        return y

    return linear
