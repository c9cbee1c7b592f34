"""Models in which a gradient would go another way than the walk are refused by name."""

import importlib
import random
from typing import ClassVar

import mlx.core as mx
import numpy as np
import pytest
from toy import WIDTH, Block, Toy, looped

from mlx_edgelora.blocks.block_list import BlockList
from mlx_edgelora.blocks.checks import check_walk
from mlx_edgelora.blocks.outputs import links_of
from mlx_edgelora.engine.walk import Walk
from mlx_edgelora.errors import EdgeLoraError


def twice(self, h):
    for layer in self.layers:
        h = layer(layer(h))
    return h


def backwards(self, h):
    for layer in reversed(self.layers):
        h = layer(h)
    return h


def skips_one(self, h):
    for layer in self.layers[:2] + self.layers[3:]:
        h = layer(h)
    return h


def stops_early(self, h):
    for layer in self.layers[:3]:
        h = layer(h)
    return h


def around_its_call(self, h):
    for layer in self.layers:
        h = h + mx.tanh(layer.proj(h))
    return h


def scales(self, h):
    for layer in self.layers:
        h = layer(h) * 2
    return h


def scales_in_place(self, h):
    for layer in self.layers:
        h = layer(h)
        h *= 2
    return h


def overwrites_in_place(self, h):
    for layer in self.layers:
        h = layer(h)
        h[:, 0] = 0.0
    return h


def parallel(self, h):
    return sum(layer(h) for layer in self.layers)


def unpacks(self, h):
    for layer in self.layers:
        h, _ = layer(h)
    return h


def hands_on_by_keyword(self, h):
    state = mx.zeros_like(h)
    for layer in self.layers:
        h = layer(h, state=state)
        state = h[..., :1].mean()
    return h


def hands_on_by_position(self, h):
    state = None
    for layer in self.layers:
        h = layer(h, {"nested": [state]})
        state = h
    return h


class State:
    def __init__(self, value):
        self.value = value


def hands_on_an_object(self, h):
    state = State(None)
    for layer in self.layers:
        h = layer(h, state=state)
        state = State(h)
    return h


def sums_all(self, h):
    total = 0
    for layer in self.layers:
        h = layer(h)
        total = total + h
    return total


def skips_around(self, h):
    kept = []
    for layer in self.layers:
        h = layer(h)
        kept.append(h)
    return h + kept[1]


LOOPS = {
    twice: "block 0 .*called where block 1 is due",
    backwards: "block 3 .*called where block 0 is due",
    skips_one: "block 3 .*called where block 2 is due",
    stops_early: "block 3 .*does not call it from its list",
    around_its_call: "block 0 .*does not call it from its list",
    scales: "block 1 .*input is not what the block before returned",
    scales_in_place: "block 1 .*changes what the block before returned",
    overwrites_in_place: "block 1 .*changes what the block before returned",
    parallel: "block 1 .*input is not what the block before returned",
    unpacks: "block 0 .*cannot go on with one array from it .not enough values",
    hands_on_by_keyword: "block 1 .*shares state with earlier blocks",
    hands_on_by_position: "block 1 .*shares state with earlier blocks",
    hands_on_an_object: "block 1 .*shares state with earlier blocks",
    sums_all: "block 0 .*used behind the last block too",
    skips_around: "block 1 .*used behind the last block too",
}


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loops_that_lead_gradients_elsewhere_are_refused(loop):
    with pytest.raises(EdgeLoraError, match=r"^toy: .*" + LOOPS[loop]):
        check_walk(BlockList(looped(loop)))


class Pair(Block):
    def __call__(self, x):
        return x, x


class Narrows(Block):
    def __call__(self, x):
        return x[..., : WIDTH // 2]


class Remembers(Block):
    def __call__(self, x):
        self.last = super().__call__(x)
        return self.last


class Counts(Block):
    calls = 0

    def __call__(self, x):
        self.calls += 1
        return super().__call__(x)


class Collects(Block):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, x):
        self.seen.append(x)
        return super().__call__(x)


class Draws(Block):
    def __call__(self, x):
        return super().__call__(x + mx.random.normal(x.shape))


class Fails(Block):
    def __call__(self, x):
        raise RuntimeError("no such kernel")


BLOCKS = {
    Pair: "returns a tuple, not one array",
    Narrows: r"maps \(1, 4, 8\) to \(1, 4, 4\)",
    Remembers: "changes its own attributes or arguments",
    Counts: "changes its own attributes or arguments",
    Collects: "changes its own attributes or arguments",
    Draws: "draws random numbers",
    Fails: "cannot be called .no such kernel",
}


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.__name__)
def test_blocks_that_do_more_than_map_are_refused(kind):
    match = rf"^toy: block 0 \({kind.__name__}\) cannot .* {BLOCKS[kind]}.*mlx_lm.lora"
    with pytest.raises(EdgeLoraError, match=match):
        check_walk(BlockList(Toy(kind)))


class Hands(Block):
    """Returns what it makes besides its hidden state, and adds what it is given."""

    def __call__(self, x, given=None):
        made = self.make(self.proj(x))
        return super().__call__(x if given is None else x + given), (made, 3)

    def make(self, y):
        return y


def hands_on(self, h):
    given = None
    for layer in self.layers:
        h, (given, _) = layer(h, given)
    return h


def hands_on_changed(self, h):
    given = None
    for layer in self.layers:
        h, (made, _) = layer(h, given)
        given = 2 * made
    return h


def hands_on_changed_in_place(self, h):
    given = None
    for layer in self.layers:
        h, (given, _) = layer(h, given)
        given += 1
    return h


def hands_to_the_head(self, h):
    for layer in self.layers:
        h, (made, _) = layer(h)
    return h + made


HANDED = {
    hands_on_changed: ({}, "block 1 .*shares state with earlier blocks"),
    hands_on_changed_in_place: ({}, "block 1 .*shares state with earlier blocks"),
    hands_to_the_head: ({}, "block 3 .*used behind the last block too"),
    hands_on: (
        {"make": lambda self, y: y.mean(axis=1, keepdims=True)},
        "block 0 .*another block reads what it computes",
    ),
}


@pytest.mark.parametrize("loop", HANDED, ids=lambda loop: loop.__name__)
def test_what_is_handed_on_is_an_output_of_a_block_for_each_token(loop):
    changes, reason = HANDED[loop]
    kind, model = type("Hands", (Hands,), changes), type("Toy", (Toy,), {"loop": loop})
    with pytest.raises(EdgeLoraError, match=reason):
        check_walk(BlockList(model(kind)))


def test_what_is_handed_on_unchanged_is_found():
    blocks = BlockList(type("Toy", (Toy,), {"loop": hands_on})(Hands))
    check_walk(blocks)
    assert [form.read for form in blocks.forms] == [(1,), (1,), (1,), ()]


class Announces(Block):
    """Tells the loop something that only a block that is computed knows."""

    seen: ClassVar[list] = []

    def __call__(self, x, factor=1.0):
        self.seen.append(1)
        return super().__call__(x)


@pytest.mark.parametrize(
    ("argument", "name"), [({"factor": None}, "factor"), ((None,), "argument 2")], ids=str
)
def test_arguments_that_depend_on_blocks_being_computed_are_refused(argument, name):
    """A placeholder cannot stand for a block whose call changes what the next one is given."""

    def loop(self, h):
        Announces.seen.clear()
        for layer in self.layers:
            factor = 1.0 + len(Announces.seen)
            h = layer(h, factor=factor) if isinstance(argument, dict) else layer(h, factor)
        return h

    model = type("Toy", (Toy,), {"loop": loop})(Announces)
    match = rf"^\w+: block 1 .* called with another {name} where the blocks before it return"
    with pytest.raises(EdgeLoraError, match=match):
        check_walk(BlockList(model))


def test_what_follows_the_blocks_must_have_a_gradient():
    def loop(self, h):
        for layer in self.layers:
            h = layer(h)
        return without_gradient(h)

    with pytest.raises(EdgeLoraError, match=r"block 3 .*cannot be differentiated .no vjp of it"):
        check_walk(BlockList(looped(loop)))


def test_a_model_may_return_more_than_logits():
    class Two(Toy):
        def __call__(self, tokens):
            return super().__call__(tokens), {"count": mx.array(3)}

    check_walk(BlockList(Two()))


@pytest.mark.parametrize("shape", [(4, 1, 4, WIDTH), (4, WIDTH)], ids=str)
def test_hidden_states_of_another_form_are_refused(shape):
    def loop(self, h):
        h = mx.broadcast_to(h, shape) if len(shape) == 4 else h[0]
        for layer in self.layers:
            h = layer(h)
        return h.reshape(-1, 4, WIDTH)[:1]

    with pytest.raises(EdgeLoraError, match=r"its input has shape .*not \[batch, tokens, width\]"):
        check_walk(BlockList(looped(loop)))


def test_a_block_that_looks_at_values_is_checked_without_its_weights(tmp_path):
    """Those of a checkpoint are read when they are evaluated; a check must not do that."""

    class Looks(Block):
        def __call__(self, x):
            return x + (self.proj(x).sum().item() >= 0) * self.proj(x)

    model, file = Toy(Looks), tmp_path / "weights.safetensors"
    mx.save_safetensors(str(file), {"weight": mx.zeros((WIDTH, WIDTH))})
    weights, whole = [mx.load(str(file))["weight"] for _ in model.layers], file.read_bytes()
    file.write_bytes(b"")  # whoever reads it now gets an error
    for layer, weight in zip(model.layers, weights, strict=True):
        layer.proj.weight = weight
    check_walk(BlockList(model))
    file.write_bytes(whole[:-4] + b"last")
    assert all(weight[-1, -1].item() != 0 for weight in weights), "were read before"


def writes_into_its_arguments(container, key):
    class Writes(Block):
        def __call__(self, x, shared):
            if isinstance(shared, State):
                shared.value = x
            else:
                shared[key] = x
            return super().__call__(x)

    def loop(self, h):
        shared = container()
        for layer in self.layers:
            h = layer(h, shared)
        return h

    return type("Toy", (Toy,), {"loop": loop})(Writes)


@pytest.mark.parametrize(
    ("container", "key"), [(dict, "x"), (lambda: [None], 0), (lambda: State(None), None)]
)
def test_state_in_a_shared_argument_is_refused(container, key):
    with pytest.raises(EdgeLoraError, match="changes its own attributes or arguments"):
        check_walk(BlockList(writes_into_its_arguments(container, key)))


RWKV7 = {
    "intermediate_size": 32,
    "norm_eps": 1e-5,
    "head_dim": 16,
    **{f"{kind}_low_rank_dim": 8 for kind in ("a", "v", "gate", "decay")},
}
GEMMA4 = {
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": 50,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
HUNYUAN = {
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_bias": False,
    "moe_topk": 1,
    "num_experts": 2,
    "num_shared_expert": 1,
    "use_mixed_mlp_moe": True,
    "use_qk_norm": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000,
    "use_cla": True,
    "cla_share_factor": 2,
    "rope_scaling": {"alpha": 10.0, "factor": 1.0, "type": "dynamic"},
}
IQUEST = {
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "head_dim": 16,
}
REFUSED = {
    "iquestloopcoder": (IQUEST, "does not call it from its list of blocks"),
}
# What its blocks return besides their hidden state, and which blocks read it.
READ = {
    "rwkv7": (RWKV7, {0: [1, 2, 3]}),
    "gemma4_text": (GEMMA4, {0: [2], 1: [3]}),
    "hunyuan": (HUNYUAN, {0: [1], 2: [3]}),
}


def small(name, settings):
    """A model of four blocks, of mlx-lm's own module."""
    sizes = {"model_type": name, "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4}
    architecture = importlib.import_module(f"mlx_lm.models.{name}")
    return architecture.Model(architecture.ModelArgs.from_dict(sizes | settings))


@pytest.mark.parametrize("name", READ)
def test_what_blocks_read_of_earlier_ones_is_found(name):
    settings, expected = READ[name]
    model = small(name, settings)
    model.freeze()  # what is made of trained embeddings goes into every block
    blocks, found = BlockList(model), {}
    check_walk(blocks)

    def look(index, x, args, kwargs):
        for link in links_of(args, kwargs):
            found.setdefault(link.source, set()).add(index)
            assert link.leaf in blocks.forms[link.source].read
        return x

    with blocks.intercept(look):
        model(mx.array([[1, 2, 3, 4, 5]]))
    assert {source: sorted(readers) for source, readers in found.items()} == expected


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_share_state_are_refused_by_name(name):
    settings, reason = REFUSED[name]
    model = small(name, settings)
    model(mx.array([[1, 2, 3, 4]]))  # it works, and yet
    with pytest.raises(EdgeLoraError, match=rf"^{name}: block 0 .*{reason}.*mlx_lm.lora"):
        Walk(model)


class Box:
    """A plain object that blocks share."""

    value = None


class Shares(Block):
    """Reads what the block before wrote, around the loop."""

    box = Box()

    def __call__(self, x):
        before, self.box.value = self.box.value, self.proj(x)
        return x + self.proj(x) + (0 if before is None or before.shape != x.shape else before)


class Borrows(Block):
    """Computes with a matrix of another block, which no tree of modules shows."""

    def __call__(self, x):
        return x + sum((other.proj(x) for other in self.others), self.proj(x))


def sets_attributes(self, h):
    before = None
    for layer in self.layers:
        layer.skip = before
        before = h
        h = layer(h)
    return h


class Skips(Block):
    def __init__(self):
        super().__init__()
        self.skip = None

    def __call__(self, x):
        return super().__call__(x if self.skip is None else x + self.skip)


def shares():
    Shares.box.value = None
    return Toy(Shares)


def borrows():
    model = Toy(Borrows)
    for index, layer in enumerate(model.layers):
        object.__setattr__(layer, "others", (model.layers[index - 1],) if index else ())
    return model


def skips():
    return type("Toy", (Toy,), {"loop": sets_attributes})(Skips)


def outside_in_a_tuple():
    model = Toy(Borrows)
    model.extra = Block()
    for layer in model.layers:
        object.__setattr__(layer, "others", (model.extra,))
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (shares, "another block reads what it computes or what is trained in it"),
        (borrows, "another block reads what it computes or what is trained in it"),
        (skips, "the model's loop sets attributes of it"),
        (outside_in_a_tuple, "trained parameters outside the blocks reach it"),
    ],
    ids=["shared object", "another's matrix", "set by the loop", "outside, in a tuple"],
)
def test_ways_around_the_walk_that_no_argument_shows_are_refused(make, reason):
    model = make()
    with pytest.raises(EdgeLoraError, match=reason):
        check_walk(BlockList(model))


def test_an_argument_that_hidden_values_decide_is_refused():
    """No gradient goes that way, and yet a placeholder gives another mask."""

    def loop(self, h):
        for layer in self.layers:
            h = layer(h, mask=h > 0)
        return h

    with pytest.raises(EdgeLoraError, match=r"block 1 .*with another mask where the blocks before"):
        check_walk(BlockList(looped(loop)))


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_random_numbers_of_others_are_seen(draw):
    class Scaled(Block):
        def __call__(self, x):
            return draw() * super().__call__(x)

    with pytest.raises(EdgeLoraError, match="draws random numbers"):
        check_walk(BlockList(Toy(Scaled)))


def test_a_block_without_a_gradient_is_refused():
    with pytest.raises(EdgeLoraError, match=r"cannot be differentiated .no vjp of it"):
        check_walk(BlockList(no_gradient(Toy())))


def no_gradient(model):
    class Wrong(Block):
        def __call__(self, x):
            return super().__call__(without_gradient(x))

    model.layers[2] = Wrong()
    return model


@mx.custom_function
def without_gradient(x):
    return x * 1


@without_gradient.vjp
def _(*_):
    raise ValueError("no vjp of it")
