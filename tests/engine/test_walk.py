import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from architectures import CONFIGS, add_lora, build, narrow_llama, quantizable
from harness import assert_same_gradients
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.trainer import default_loss
from peaks import ROUNDS, Stepped, growth_with_depth

from mlx_edgelora.engine.adapter_state import ResidentAdapterState
from mlx_edgelora.engine.gradients import gradient_tree, value_and_grad
from mlx_edgelora.engine.walk import Walk
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.storage.stores import RamStore

LENGTHS = mx.array([[3, 17], [0, 12]])


def tokens(seed=0):
    return mx.random.randint(0, 101, (2, 18), key=mx.random.key(seed))


def plain(model, loss=default_loss, *args):
    args = args or (tokens(), LENGTHS)
    value, gradients = nn.value_and_grad(model, loss)(model, *args)
    mx.eval(value, gradients)
    return value, gradients


def small(**changes):
    return build("llama", vocab_size=101, **changes)


@pytest.mark.parametrize(
    ("name", "quantized"), [(name, number % 2 == 0) for number, name in enumerate(CONFIGS)]
)
def test_gradients_equal_plain_autodiff(name, quantized, spill):
    model = build(name)
    if quantized:
        nn.quantize(model, **quantizable())
    add_lora(model)
    (loss, count), expected = plain(model)
    (got_loss, got_count), got = value_and_grad(model, default_loss, store=spill)(
        model, tokens(), LENGTHS
    )
    # A recurrence is computed in chunks, which round otherwise than mlx-lm's loop.
    assert got_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert got_count.item() == count.item()
    assert_same_gradients(got, expected)


def test_a_dropped_gradient_is_seen():
    model = small()
    add_lora(model)
    _, expected = plain(model)
    broken = tree_map(lambda g: g, expected)
    layer = broken["model"]["layers"][1]["mlp"]["up_proj"]
    layer["lora_a"] = mx.zeros_like(layer["lora_a"])
    with pytest.raises(AssertionError, match="up_proj"):
        assert_same_gradients(broken, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_backward_serves_all_blocks_and_steps(dropout, compiles):
    model = small(num_hidden_layers=4)
    add_lora(model, dropout=dropout)
    walk = Walk(model, compiled=True)

    def gradient(batch, lengths):
        with walk.forward(lambda: default_loss(model, batch, lengths)) as state:

            def tail(hidden):
                with walk.tail(state, hidden):
                    return default_loss(model, batch, lengths)[0]

            state.cotangent = mx.grad(tail)(state.hidden)
            gradients = {name: g for some in walk.backward(state) for name, g in some.items()}
            return gradient_tree(model, gradients)

    for width in (18, 13):  # a new length is traced anew
        batch, lengths = tokens()[:, :width], mx.minimum(LENGTHS, width - 1)
        mx.random.seed(5)
        _, expected = plain(model, default_loss, batch, lengths)
        mx.random.seed(5)
        assert_same_gradients(gradient(batch, lengths), expected)
    # Backward one for the lowest block, whose input needs no gradient, and one for the others;
    # forward one for all, but where keys of dropout are drawn while the graph is built.
    assert walk.compiled_functions == (3 if dropout == 0 else 2)


def test_blocks_of_different_kind_do_not_share_a_compiled_backward(compiles):
    model = build("smollm3")  # its second block has no rotary embedding
    add_lora(model)
    _, expected = plain(model)
    _, got = value_and_grad(model, default_loss, compiled=True)(model, tokens(), LENGTHS)
    assert_same_gradients(got, expected)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_dropout_has_one_mask_per_step(name):
    model = build(name)
    add_lora(model, dropout=0.4)
    mx.random.seed(5)
    (loss, _), expected = plain(model)
    mx.random.seed(5)
    (got_loss, _), got = value_and_grad(model, default_loss)(model, tokens(), LENGTHS)
    assert got_loss.item() == loss.item()
    assert_same_gradients(got, expected)
    following = mx.random.uniform()
    mx.random.seed(5)
    plain(model)
    assert following.item() == mx.random.uniform().item()  # the generator moved as far


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("qwen2", ["model.embed_tokens", "self_attn.q_proj"]),
        ("llama", ["model.embed_tokens", "mlp.down_proj"]),
        ("llama", ["lm_head", "self_attn.k_proj"]),
    ],
)
def test_adapters_outside_the_blocks(name, keys):
    model = build(name)
    add_lora(model, keys=keys, dropout=0.2)
    mx.random.seed(5)
    _, expected = plain(model)
    mx.random.seed(5)
    _, got = value_and_grad(model, default_loss)(model, tokens(), LENGTHS)
    assert_same_gradients(got, expected)


def test_a_trained_head_alone_reaches_no_block():
    model = small()
    add_lora(model, num_layers=1, keys=["lm_head", "self_attn.k_proj"])
    store = CountingStore()
    _, expected = plain(model)
    _, got = value_and_grad(model, default_loss, store=store)(model, tokens(), LENGTHS)
    assert_same_gradients(got, expected)
    assert store.slots == [0]


class CountingStore(RamStore):
    def __init__(self):
        super().__init__()
        self.slots = []

    def put(self, slot, array):
        self.slots.append(slot)
        super().put(slot, array)


def test_blocks_below_the_lowest_adapted_one_run_once(monkeypatch):
    model = small(num_hidden_layers=5)
    add_lora(model, num_layers=2)
    _, expected = plain(model)
    gradient = value_and_grad(model, default_loss, store=(store := CountingStore()))
    calls, blocks = [], list(model.layers)
    call = type(blocks[0]).__call__

    def counted(block, *args, **kwargs):
        calls.append(next(i for i, other in enumerate(blocks) if other is block))
        return call(block, *args, **kwargs)

    monkeypatch.setattr(type(blocks[0]), "__call__", counted)
    _, got = gradient(model, tokens(), LENGTHS)
    assert calls == [0, 1, 2, 3, 4, 4, 3]
    assert store.slots == [0, 1]
    assert_same_gradients(got, expected)


def test_loss_may_be_a_scalar_and_take_keywords():
    model = small()
    add_lora(model)

    def loss(model, inputs, *, weight):
        return weight * mx.logsumexp(model(inputs), axis=-1).mean()

    value, expected = nn.value_and_grad(model, loss)(model, tokens(), weight=3.0)
    got_value, got = value_and_grad(model, loss)(model, tokens(), weight=3.0)
    assert got_value.item() == value.item()
    assert_same_gradients(got, expected)


def test_loss_that_never_calls_the_model_is_an_error():
    model = small()
    add_lora(model)
    with pytest.raises(EdgeLoraError, match="without calling the model"):
        value_and_grad(model, lambda model: mx.array(1.0))(model)


def state_of(model):
    arrays = [(name, id(value)) for name, value in tree_flatten(model.parameters())]
    return arrays, [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()]


def test_model_is_left_as_found(monkeypatch):
    model = small()
    add_lora(model, dropout=0.1)
    before = state_of(model)
    gradient = value_and_grad(model, default_loss)
    gradient(model, tokens(), LENGTHS)
    assert state_of(model) == before
    calls = []

    def failing(self, x):
        calls.append(1)
        if len(calls) > 4:  # in the second block of the backward pass
            raise RuntimeError("stop here")
        return x

    monkeypatch.setattr(type(model.layers[0].mlp), "__call__", failing)
    with pytest.raises(RuntimeError, match="stop here"):
        gradient(model, tokens(), LENGTHS)
    assert state_of(model) == before


def stepped(depth, make_gradient):
    """A quantized model of so many blocks, and its whole step: gradient and update."""

    def build_model():
        model = narrow_llama(depth)
        nn.quantize(model, **quantizable())
        add_lora(model)
        return model

    def start(model):
        optimizer, gradient = optim.AdamW(1e-4), make_gradient(model, default_loss)
        trained = ResidentAdapterState(model)
        trained.start(optimizer)
        batch = mx.random.randint(0, 256, (1, 257), key=mx.random.key(0))

        def step():
            value, gradients = gradient(model, batch, mx.array([[0, 256]]))
            mx.eval(value, gradients)
            by_name = dict(tree_flatten(gradients))
            del gradients
            trained.add(by_name)
            trained.update(optimizer, 1)

        return step

    return Stepped(build_model, start)


def growth_beyond_adapters(make_gradient, rounds=ROUNDS, blocks=16):
    """Peak of so many blocks over that of 4, less parameters, gradients and moments of the others.

    A step's peak jitters by some four hidden states of 128 KiB; a third of a hidden state kept
    per block is still seen.
    """
    shallow, deep = stepped(4, make_gradient), stepped(blocks, make_gradient)
    adapters = 4 * (deep.trained - shallow.trained)
    return growth_with_depth(shallow, deep, adapters, rounds) - adapters


@pytest.mark.slow
def test_peak_does_not_grow_with_depth(memory, spill):
    growth = growth_beyond_adapters(lambda model, loss: value_and_grad(model, loss, store=spill))
    assert growth <= 0


@pytest.mark.slow
def test_the_same_measurement_sees_inputs_kept_in_memory(memory):
    assert growth_beyond_adapters(value_and_grad, rounds=1, blocks=10) > 2 * 2**17


@pytest.mark.slow
def test_the_same_measurement_fails_on_plain_backpropagation(memory):
    assert growth_beyond_adapters(nn.value_and_grad, rounds=1, blocks=10) > 5 * 2**20
