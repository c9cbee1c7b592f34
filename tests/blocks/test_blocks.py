"""Finding blocks, standing in for them, binding arrays, telling kinds of blocks apart."""

import importlib

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import CONFIGS, build
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.block_list import BlockList, array_slots, bind_arrays, signature
from mlx_edgelora.errors import EdgeLoraError


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_are_found_and_own_their_parameters(name):
    model = build(name)
    blocks = BlockList(model)
    assert [id(block) for block in blocks.blocks] == [id(layer) for layer in model.layers]
    owned = [blocks.local(key) for key, _ in tree_flatten(model.parameters())]
    inside = [place for place in owned if place]
    expected = [
        (index, key)
        for index, layer in enumerate(model.layers)
        for key, _ in tree_flatten(layer.parameters())
    ]
    assert sorted(inside) == sorted(expected)
    assert None in owned  # embedding and norm


def test_a_model_without_one_list_of_blocks_is_named():
    afm7 = importlib.import_module("mlx_lm.models.afm7")
    settings = {"vocab_size": 50, "hidden_dim": 64, "num_layers": 4, "num_kv_reuse_layers": 2}
    args = afm7.ModelArgs(model_type="afm7", num_heads=4, num_kv_heads=2, **settings)
    with pytest.raises(EdgeLoraError, match=r"afm7: .* no list of blocks was found"):
        BlockList(afm7.Model(args))


def test_interceptors_see_calls_show_attributes_and_go_away():
    model = build("gemma3_text")  # its loop reads the blocks' attributes
    blocks, seen = BlockList(model), []
    before = list(model.model.layers)

    def handler(index, x, args, kwargs):
        seen.append(index)
        return blocks.blocks[index](x, *args, **kwargs)

    tokens = mx.array([[1, 2, 3, 4, 5, 6, 7]])
    expected = model(tokens)
    with blocks.intercept(handler):
        assert mx.array_equal(model(tokens), expected).item()
    assert seen == [0, 1, 2]
    assert [id(layer) for layer in model.model.layers] == list(map(id, before))
    with pytest.raises(ZeroDivisionError), blocks.intercept(lambda *call: 1 / 0):
        model(tokens)
    assert [id(layer) for layer in model.model.layers] == list(map(id, before))


def test_returning_starts_behind_the_blocks():
    model, tokens = build("gemma2"), mx.array([[1, 2, 3]])
    hidden = mx.random.normal((1, 3, 64))
    with BlockList(model).skip_blocks(hidden):
        logits = model(tokens)
    table = model.model.embed_tokens.as_linear
    assert mx.allclose(logits, 30 * mx.tanh(table(model.model.norm(hidden)) / 30), atol=1e-5)


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self._frequencies = mx.ones((3,))
        self.experts = [nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)]
        self.extra = {"scale": mx.ones((1,))}
        self.factor = 1.5


def test_every_array_has_a_slot():
    parts = Parts()
    slots = array_slots(parts)
    assert sorted(slots) == [
        "_frequencies",
        "experts.0.weight",
        "experts.1.weight",
        "extra.scale",
        "linear.bias",
        "linear.weight",
    ]
    container, key = slots["experts.1.weight"]
    assert container[key] is parts.experts[1].weight


def test_bound_values_are_undone_on_error_too():
    parts = Parts()
    slots = array_slots(parts)
    before = {name: box[key] for name, (box, key) in slots.items()}
    values = {name: mx.zeros((1,)) for name in slots}
    with pytest.raises(RuntimeError, match="stop"), bind_arrays(slots, values):
        assert parts.experts[0].weight is values["experts.0.weight"]
        raise RuntimeError("stop")
    assert all(box[key] is before[name] for name, (box, key) in slots.items())


def test_one_array_under_two_names_is_undone_to_what_it_was():
    parts = Parts()
    parts.experts[1] = parts.experts[0]
    slots, weight = array_slots(parts), parts.experts[0].weight
    with bind_arrays(
        slots, {"experts.0.weight": mx.zeros((1,)), "experts.1.weight": mx.ones((1,))}
    ):
        pass
    assert parts.experts[0].weight is weight


def changed(change) -> Parts:
    parts = Parts()
    change(parts)
    return parts


class Other(nn.Linear):
    pass


def test_whatever_differs_is_seen_by_the_signature():
    """The plain one and all changed ones, alive together, have a signature each."""
    changes = [
        lambda parts: None,
        lambda parts: setattr(parts, "factor", 2.5),
        lambda parts: setattr(parts, "factor", None),
        lambda parts: setattr(parts, "flag", True),
        lambda parts: setattr(parts, "flag", 1),
        lambda parts: setattr(parts, "window", (1, 2)),
        lambda parts: setattr(parts, "window", (1, 3)),
        lambda parts: setattr(parts, "window", [1, 2]),
        lambda parts: setattr(parts, "window", [1, 3]),
        lambda parts: setattr(parts, "window", {"size": 2}),
        lambda parts: setattr(parts, "window", {"size": 3}),
        lambda parts: setattr(parts, "kinds", frozenset({"a", "b"})),
        lambda parts: setattr(parts, "activation", nn.silu),
        lambda parts: setattr(parts, "activation", nn.gelu),
        lambda parts: setattr(parts, "unknown", object()),
        lambda parts: setattr(parts, "unknown", object()),
        lambda parts: setattr(parts, "linear", Other(2, 2)),
        lambda parts: setattr(parts, "linear", nn.Linear(2, 2, bias=False)),
        lambda parts: setattr(parts, "linear", nn.QuantizedLinear(64, 64, False, 32, 4)),
        lambda parts: setattr(parts, "linear", nn.QuantizedLinear(64, 64, False, 64, 4)),
        lambda parts: setattr(parts, "linear", nn.QuantizedLinear(64, 64, False, 32, 8)),
        lambda parts: parts.experts.append(nn.Linear(2, 2, bias=False)),
        lambda parts: parts.eval(),
        lambda parts: parts.linear.freeze(),
    ]
    variants = [changed(change) for change in changes]
    seen = {}
    for index, variant in enumerate(variants):
        first = seen.setdefault(signature(variant), index)
        assert first == index, f"change {index} looks as change {first}"


def test_blocks_of_other_weights_have_one_signature():
    assert signature(Parts()) == signature(Parts())
    first, second, third = build("smollm3", num_hidden_layers=3).layers
    assert signature(first) == signature(third) != signature(second)  # it has no rotary embedding
    first, second, _ = build("qwen3_moe").layers
    assert signature(first) != signature(second)  # it has no experts
