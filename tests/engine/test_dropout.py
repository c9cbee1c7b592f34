"""Dropout with keys of its own: MLX's masks, the same a second time."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_edgelora.blocks.dropout import KeyTape, dropout_layers, keyed_dropout

X = mx.ones((40, 50))


def same(first, second) -> bool:
    return all(mx.array_equal(a, b).item() for a, b in zip(first, second, strict=True))


def calls(layers, rounds=2):
    return [layer(X) for _ in range(rounds) for layer in layers]


@pytest.fixture
def layers():
    return nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.6))


def test_masks_and_generator_are_those_of_mlx(layers):
    mx.random.seed(3)
    expected = [*calls(layers.layers), mx.random.uniform()]
    mx.random.seed(3)
    with keyed_dropout(dropout_layers(layers), KeyTape()):
        got = [*calls(layers.layers), mx.random.uniform()]
    assert same(got, expected)
    assert not same(expected[0:1], expected[2:3])  # two calls draw two masks


def test_played_keys_give_the_same_masks_and_leave_the_generator_alone(layers):
    tape = KeyTape()
    with keyed_dropout(dropout_layers(layers), tape):
        with tape.recording() as keys:
            first = calls(layers.layers)
        state = mx.array(mx.random.state[0])
        with tape.playing(keys):
            second = calls(layers.layers)
        assert same(second, first)
        assert len(keys) == 4
        assert same([mx.random.state[0]], [state])
        assert not same(calls(layers.layers), first)


def test_keys_drawn_elsewhere_are_not_kept(layers):
    tape = KeyTape()
    with keyed_dropout(dropout_layers(layers), tape):
        calls(layers.layers)
        with tape.recording() as outer:
            calls(layers.layers, 1)
            with tape.recording() as inner:
                calls(layers.layers, 2)
            calls(layers.layers, 1)
        calls(layers.layers)
    assert (len(outer), len(inner)) == (4, 4)
    assert len({tuple(key.tolist()) for key in outer + inner}) == 8


def test_when_the_keys_run_out_new_ones_are_drawn(layers):
    tape = KeyTape()
    with keyed_dropout(dropout_layers(layers), tape):
        with tape.recording() as keys:
            first = calls(layers.layers, 1)
        with tape.playing(keys[:1]), tape.recording() as drawn:
            second = calls(layers.layers, 1)
    assert same(second[:1], first[:1])
    assert not same(second[1:], first[1:])
    assert len(drawn) == 1


def test_playing_ends_with_its_context(layers):
    tape, key = KeyTape(), mx.random.key(9)
    with keyed_dropout(dropout_layers(layers), tape):
        with tape.playing([key, key]):
            with tape.playing([mx.random.key(1)]):
                layers.layers[0](X)
            assert tape.next() is key
        assert tape.next() is not key
        with pytest.raises(RuntimeError, match="stop"), tape.playing([key]):
            raise RuntimeError("stop")
        assert tape.next() is not key


def test_no_key_is_drawn_where_nothing_is_dropped(layers):
    layers.eval()
    nothing = nn.Dropout(0.0)
    tape = KeyTape()
    found = dropout_layers(nn.Sequential(layers, nothing))
    with keyed_dropout(found, tape), tape.recording() as keys:
        outputs = [*calls(layers.layers), nothing(X)]
    assert keys == []
    assert same(outputs, [X] * 5)


def test_layers_are_given_back_on_error_too(layers):
    before = [(type(layer), sorted(vars(layer))) for layer in layers.layers]
    with (
        pytest.raises(RuntimeError, match="stop"),
        keyed_dropout(dropout_layers(layers), KeyTape()),
    ):
        assert type(layers.layers[0]) is not nn.Dropout
        raise RuntimeError("stop")
    assert [(type(layer), sorted(vars(layer))) for layer in layers.layers] == before


def test_a_layer_in_two_places_is_given_back_once():
    shared = nn.Dropout(0.5)
    model = nn.Sequential(shared, nn.Linear(2, 2), shared)
    assert len(dropout_layers(model)) == 1
    with keyed_dropout(dropout_layers(model), KeyTape()):
        assert type(shared) is not nn.Dropout
    assert type(shared) is nn.Dropout
    assert "_tape" not in vars(shared)


def test_other_dropout_layers_are_left_alone():
    """Dropout2d and the like draw as they always did; no model in mlx-lm has one."""
    model = nn.Sequential(nn.Dropout2d(0.5))
    with keyed_dropout(dropout_layers(model), KeyTape()):
        assert type(model.layers[0]) is nn.Dropout2d


def test_a_tape_is_used_where_a_layer_drops(layers):
    tape = KeyTape()
    with keyed_dropout(dropout_layers(layers), tape):
        assert tape.is_used
    assert not tape.is_used
    layers.eval()
    with keyed_dropout(dropout_layers(layers), tape):
        assert not tape.is_used
