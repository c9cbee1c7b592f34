"""A block for some tokens only against the whole block."""

import mlx.core as mx
from architectures import relative_error
from mlx.utils import tree_flatten

from mlx_edgelora.model.blocks import array_slots, bound
from mlx_edgelora.model.labelled import labelled_rows, take_rows


def both(function, block, x, cotangent):
    """Output, and gradients by name of x and all the block's parameters."""
    slots, trained = array_slots(block), dict(tree_flatten(block.trainable_parameters()))

    def run(x, *values):
        with bound(slots, dict(zip(trained, values, strict=True))):
            return function(x)

    (out,), gradients = mx.vjp(run, [x, *trained.values()], [cotangent])
    mx.eval(out, gradients)
    return out, dict(zip(["x", *trained], gradients, strict=True))


def assert_spared_equals_whole(block, rows, x, *args, tolerance=1e-5, **kwargs):
    rows = mx.array(rows)
    cotangent = mx.random.normal((1, rows.size, x.shape[-1]), key=mx.random.key(9))
    expected, wanted = both(
        lambda x: take_rows(block(x, *args, **kwargs), rows), block, x, cotangent
    )
    got, gradients = both(
        lambda x: labelled_rows(block, rows, x, *args, **kwargs), block, x, cotangent
    )
    assert got.shape == expected.shape == (1, rows.size, x.shape[-1])
    assert relative_error(got, expected) < tolerance
    # Scores of a token that sees one key have no gradient; rounding of nothing is no error.
    largest = max(mx.linalg.norm(value.reshape(-1)).item() for value in wanted.values())
    for name, value in wanted.items():
        norm = mx.linalg.norm(value.reshape(-1)).item()
        difference = mx.linalg.norm((gradients[name] - value).reshape(-1)).item()
        assert difference <= tolerance * max(norm, 1e-2 * largest), name
    return gradients
