"""The comparison of gradients itself: what it lets through, and what it does not."""

import mlx.core as mx
import pytest
from harness import (
    assert_same_gradients,
    close_engines,
    engine,
    norm,
    plain,
    plain_value_and_grad,
    random_batch,
    resolution,
    save,
)
from mlx.utils import tree_flatten, tree_unflatten

GATE = "model.layers.0.mlp.shared_expert_gate.lora_b"
ONE = {"a": {"b": mx.array([3.0, 4.0])}}


def moved(gradients, name, factor):
    """The same gradients with one array scaled."""
    arrays = dict(tree_flatten(gradients))
    return tree_unflatten(list((arrays | {name: factor * arrays[name]}).items()))


def test_a_small_gradient_that_is_wrong_by_a_thousandth_is_seen(tmp_path):
    """In the architecture whose gradients float32 defines least finely."""
    model = plain(save(tmp_path, "qwen3_next", True))
    batch = random_batch(share=2.0)
    _, expected = plain_value_and_grad(model, batch)
    moves = resolution(model, batch)
    sizes = {name: norm(value) for name, value in tree_flatten(expected)}
    for name in (min(sizes, key=sizes.get), GATE):
        with pytest.raises(AssertionError, match=rf"{name}: 1.00e-03 of its norm, at most"):
            assert_same_gradients(moved(expected, name, 1.001), expected, resolution=moves)


@pytest.mark.parametrize(
    ("unresolved", "passes", "fails"),
    [(0.0, 0.9e-5, 1.2e-5), (4e-5, 3.6e-5, 4.4e-5), (3e-4, 0.9e-4, 1.1e-4)],
    ids=["the tolerance", "the resolution", "ten times the tolerance"],
)
def test_what_bounds_a_difference(unresolved, passes, fails):
    def moves():
        return {"a.b": 5 * unresolved}

    assert_same_gradients(moved(ONE, "a.b", 1 + passes), ONE, resolution=moves)
    with pytest.raises(AssertionError, match=r"a.b: .* of its norm, at most"):
        assert_same_gradients(moved(ONE, "a.b", 1 + fails), ONE, resolution=moves)


def test_the_resolution_is_asked_only_beyond_the_tolerance():
    assert_same_gradients(moved(ONE, "a.b", 1 + 5e-6), ONE, resolution=pytest.fail)
    with pytest.raises(AssertionError, match=r"at most 1.0e-05"):
        assert_same_gradients(moved(ONE, "a.b", 1 + 2e-5), ONE)


def test_the_resolution_of_a_model_is_small_and_leaves_it_as_it_was(tmp_path):
    model, batch = plain(save(tmp_path, "llama", True)), random_batch()
    before = dict(tree_flatten(model.parameters()))
    moves = resolution(model, batch)()
    after = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(after[name], value) for name, value in before.items())
    expected = dict(tree_flatten(plain_value_and_grad(model, batch)[1]))
    assert moves.keys() == expected.keys()
    assert all(1e-7 < moves[name] / norm(value) < 1e-5 for name, value in expected.items())


def test_an_engine_that_a_failing_test_leaves_open_is_closed(tmp_path):
    ours = engine(save(tmp_path, "llama", True))
    close_engines()
    assert ours.walk.store._file.closed
    ours.close()  # once more does no harm
