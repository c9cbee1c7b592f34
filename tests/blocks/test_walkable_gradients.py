"""What is trained must be reached one way; what is accepted gets the right gradients."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import add_lora
from harness import assert_same_gradients
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from toy import WIDTH, Block, Toy

from mlx_edgelora.blocks.block_list import BlockList
from mlx_edgelora.blocks.checks import _separations, check_walk
from mlx_edgelora.engine.gradients import value_and_grad
from mlx_edgelora.engine.walk import Walk
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.stores import RamStore


def adapted(model, *modules):
    """Only `lora_a` and `lora_b` of the given modules are trained; B is not zero."""
    model.freeze()
    for module in modules:
        module.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
        module.lora_b = mx.random.normal(module.lora_b.shape)
    return model


def test_a_trained_matrix_in_two_blocks_is_refused():
    model = Toy()
    shared = LoRALinear.from_base(model.layers[1].proj, r=2)
    model.layers[1].proj = model.layers[3].proj = shared
    check_walk(BlockList(model.freeze()))  # frozen, it may hang where it likes
    with pytest.raises(EdgeLoraError, match=r"block 3 .*layers.3.proj.* trained in block 1 too"):
        check_walk(BlockList(adapted(model, shared)))


@pytest.mark.parametrize(("count", "fewest"), [(1, 1), (2, 2), (3, 3), (6, 4), (28, 7), (70, 8)])
def test_gradients_of_any_two_blocks_are_built_apart(count, fewest):
    chosen = _separations(count)
    assert len(chosen) == fewest
    for first in range(count):
        assert any(first in own for own in chosen)
        for second in set(range(count)) - {first}:
            assert any(first in own and second not in own for own in chosen)


def test_a_block_in_two_places_is_refused():
    model = Toy()
    model.layers[2] = model.layers[0]
    model.layers[0].proj = LoRALinear.from_base(model.layers[0].proj, r=2)
    with pytest.raises(EdgeLoraError, match=r"block 2 .* trained in block 0 too"):
        check_walk(BlockList(adapted(model, model.layers[0].proj)))


def test_a_trained_matrix_inside_and_outside_the_blocks_is_refused():
    model = Toy()
    model.extra = model.layers[2].proj = LoRALinear.from_base(model.layers[2].proj, r=2)
    with pytest.raises(EdgeLoraError, match=r"block 2 .* trained outside the blocks too"):
        check_walk(BlockList(adapted(model, model.extra)))


def embedding_around_the_blocks(self, h):
    first = h
    for layer in self.layers:
        h = layer(h, first)
    return h


class Gated(Block):
    def __call__(self, x, first):
        return x + mx.tanh(self.proj(x * first))


def test_a_trained_embedding_must_not_reach_blocks_around_the_first():
    model = type("Toy", (Toy,), {"loop": embedding_around_the_blocks})(Gated)
    check_walk(BlockList(model.freeze()))  # a frozen one is a constant
    model.embed = LoRAEmbedding.from_base(model.embed, r=2)
    with pytest.raises(EdgeLoraError, match=r"block 0 .*trained parameters outside the blocks"):
        check_walk(BlockList(adapted(model, model.embed)))


def loss(model, tokens):
    return mx.logsumexp(model(tokens), axis=-1).mean()


def assert_right_gradients(model, store):
    tokens = mx.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    value, expected = nn.value_and_grad(model, loss)(model, tokens)
    mx.eval(value, expected)
    got_value, got = value_and_grad(model, loss, store=store)(model, tokens)
    assert got_value.item() == pytest.approx(value.item(), rel=1e-6)
    assert_same_gradients(got, expected)


class InPlace(Block):
    def __call__(self, x):
        x += mx.tanh(self.proj(x))
        x *= 1.5
        return x


@pytest.mark.parametrize("kind", [Block, InPlace])
@pytest.mark.parametrize("spilled", [False, True], ids=["ram", "mapped"])
def test_blocks_may_work_in_place(kind, spilled, spill):
    model = Toy(kind)
    add_lora(model)
    assert_right_gradients(model, spill if spilled else RamStore())


def test_frozen_extras_may_go_around_the_blocks(spill):
    model = type("Toy", (Toy,), {"loop": embedding_around_the_blocks})(Gated)
    add_lora(model)
    assert_right_gradients(model, spill)


def test_a_frozen_matrix_may_hang_in_two_blocks(spill):
    model = Toy()
    model.layers[1].frozen = model.layers[3].frozen = nn.Linear(WIDTH, WIDTH)
    add_lora(model, keys=["proj"])
    assert_right_gradients(model, spill)


def test_checking_leaves_model_and_generator_alone():
    model = Toy()
    add_lora(model, dropout=0.5)
    layers, state = [id(layer) for layer in model.layers], mx.array(mx.random.state[0])
    Walk(model)
    assert [id(layer) for layer in model.layers] == layers
    assert mx.array_equal(mx.random.state[0], state).item()


class Wider(Block):
    def __call__(self, x, factor=1.0):
        return x + factor * mx.tanh(self.proj(x))


def asks_with_isinstance(layer):
    return isinstance(layer, Wider)


def asks_for_the_type(layer):
    return type(layer) is Wider


def asks_for_the_name(layer):
    return type(layer).__name__ == "Wider"


def asks_for_a_child(layer):
    return "wide" in layer


def asks_for_an_attribute(layer):
    return getattr(layer, "is_wide", False)


def asks_for_identity(layer):
    return layer is asks_for_identity.second


@pytest.mark.parametrize(
    "asks",
    [
        asks_with_isinstance,
        asks_for_the_type,
        asks_for_the_name,
        asks_for_a_child,
        asks_for_an_attribute,
        asks_for_identity,
    ],
    ids=lambda function: function.__name__,
)
def test_a_loop_may_ask_a_block_what_it_is(asks, spill):
    def loop(self, h):
        for layer in self.layers:
            h = layer(h, 3.0) if asks(layer) else layer(h)
        return h

    model = type("Toy", (Toy,), {"loop": loop})()
    model.layers[1] = Wider()
    model.layers[1].wide, model.layers[1].is_wide = nn.Linear(1, 1), True
    asks_for_identity.second = model.layers[1]
    add_lora(model, keys=["proj"])
    assert_right_gradients(model, spill)


def test_a_loop_may_call_a_block_through_its_class(spill):
    def loop(self, h):
        for layer in self.layers:
            h = Block.__call__(layer, h)
        return h

    model = type("Toy", (Toy,), {"loop": loop})()
    add_lora(model)
    assert_right_gradients(model, spill)


def test_a_loop_may_give_the_hidden_state_by_name(spill):
    def loop(self, h):
        for layer in self.layers:
            h = layer(x=h)
        return h

    model = type("Toy", (Toy,), {"loop": loop})()
    add_lora(model)
    assert_right_gradients(model, spill)


def test_a_frozen_block_may_be_in_two_places(spill):
    model = Toy()
    add_lora(model, num_layers=2)
    model.layers[1] = model.layers[0]
    assert_right_gradients(model, spill)


@pytest.mark.parametrize(
    ("long", "reason"),
    [
        (lambda self, h, layer: layer(h) * 2, "its input is not what the block before returned"),
        (lambda self, h, layer: layer(layer(h)), "it is called where block 1 is due"),
    ],
    ids=["scaled", "twice"],
)
def test_a_loop_that_does_otherwise_with_more_tokens_is_refused_then(long, reason):
    """The check has seen four."""

    def loop(self, h):
        for layer in self.layers:
            h = layer(h) if h.shape[1] < 8 else long(self, h, layer)
        return h

    model = type("Toy", (Toy,), {"loop": loop})()
    add_lora(model)
    with pytest.raises(EdgeLoraError, match=reason):
        value_and_grad(model, loss)(model, mx.zeros((1, 9), mx.int32))


def test_a_block_that_is_left_out_with_more_tokens_is_refused_then():
    def loop(self, h):
        for layer in self.layers[: 4 if h.shape[1] < 8 else 2]:
            h = layer(h)
        return h

    model = type("Toy", (Toy,), {"loop": loop})()
    add_lora(model)
    with pytest.raises(EdgeLoraError, match=r"block 2 .*does not call it from its list"):
        value_and_grad(model, loss)(model, mx.zeros((1, 9), mx.int32))


def called_twice(model, tokens):
    return loss(model, tokens) - loss(model, tokens[:, ::-1])


def penalized(model, tokens):
    return loss(model, tokens) + sum((v * v).sum() for _, v in tree_flatten(adapters(model)))


def adapters(model):
    return [layer.trainable_parameters() for layer in model.layers]


def with_a_block(model, tokens):
    return loss(model, tokens) + model.layers[1](mx.ones((1, 2, WIDTH))).sum()


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (called_twice, "calls the model or a block of it a second time"),
        (penalized, r"depends on layers.0.proj.lora_a other than through what"),
        (with_a_block, "calls the model or a block of it a second time"),
    ],
    ids=["two calls", "penalty", "a block alone"],
)
def test_a_loss_that_reaches_the_blocks_another_way_is_refused(other, reason):
    """In place of a gradient that lacks a part."""
    model = Toy()
    add_lora(model)
    with pytest.raises(EdgeLoraError, match=reason):
        value_and_grad(model, other)(model, mx.array([[1, 2, 3, 4, 5]]))
