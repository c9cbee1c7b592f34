"""A block for a part of its tokens against the whole block."""

from itertools import pairwise

import mlx.core as mx
from architectures import relative_error
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.block_list import array_slots, bind_arrays
from mlx_edgelora.blocks.parts import BlockParts, TokenSpan


def both(function, block, x, cotangent):
    """Output, and gradients by name of x and all the block's parameters."""
    slots, trained = array_slots(block), dict(tree_flatten(block.trainable_parameters()))
    if mx.cuda.is_available():  # MLX 0.32.4 has no gradient of few tokens' experts there
        trained = {name: value for name, value in trained.items() if ".experts." not in name}

    def run(x, *values):
        with bind_arrays(slots, dict(zip(trained, values, strict=True))):
            return function(x)

    (out,), gradients = mx.vjp(run, [x, *trained.values()], [cotangent])
    mx.eval(out, gradients)
    return out, dict(zip(["x", *trained], gradients, strict=True))


def assert_same(function, expected_function, block, x, cotangent, tolerance):
    """The same output, and the same gradients; gives them."""
    expected, wanted = both(expected_function, block, x, cotangent)
    got, gradients = both(function, block, x, cotangent)
    assert got.shape == expected.shape == cotangent.shape
    assert relative_error(got, expected) < tolerance
    # Scores of a token that sees one key have no gradient; rounding of nothing is no error.
    largest = max(mx.linalg.norm(value.reshape(-1)).item() for value in wanted.values())
    for name, value in wanted.items():
        norm = mx.linalg.norm(value.reshape(-1)).item()
        difference = mx.linalg.norm((gradients[name] - value).reshape(-1)).item()
        assert difference <= tolerance * max(norm, 1e-2 * largest), name
    return gradients


def assert_rows_equal_whole(block, rows, x, *args, tolerance=1e-5, **kwargs):
    """`output_rows`; gives the gradients."""
    rows = mx.array(rows)
    return assert_same(
        lambda x: BlockParts(block, args, kwargs).output_rows(x, rows),
        lambda x: block(x, *args, **kwargs).reshape(1, -1, x.shape[-1])[:, rows],
        block,
        x,
        mx.random.normal((1, rows.size, x.shape[-1]), key=mx.random.key(9)),
        tolerance,
    )


def key_values_of_all(parts, x, spans):
    """What is kept of all tokens, by tiles."""
    pieces = [parts.key_values(x[:, span.start : span.stop], span) for span in spans]
    return [mx.concatenate(both, axis=2) for both in zip(*pieces, strict=True)]


def tiles_of(parts, x, spans, key_values):
    """Of each tile the arguments of `output`."""
    for span in spans:
        seen = parts.visible_keys(span, x.shape[1])
        some = [array[:, :, seen.start : seen.stop] for array in key_values]
        yield x[:, span.start : span.stop], span, seen, some


def assert_tiles_equal_whole(
    block, cuts, x, *args, rows=None, tolerance=1e-5, through_cache=False, **kwargs
):
    """`output` of all tiles, or `output_at` of some rows of them.

    Args:
        cuts: where a tile begins, but the first.
        rows: of all B * T tokens, ascending; None for all.
    """
    parts = BlockParts(block, args, kwargs, through_cache)
    _, tokens, width = x.shape
    spans = [TokenSpan(*ends) for ends in pairwise([0, *cuts, tokens])]
    order, places = [], []  # of the rows, as the tiles give them; of each tile
    for span in spans if rows is not None else ():
        own = [row for row in rows if span.start <= row % tokens < span.stop]
        order += own
        length = span.stop - span.start
        places.append([row // tokens * length + row % tokens - span.start for row in own])

    def by_tiles(x):
        key_values = key_values_of_all(parts, x, spans)
        tiles = tiles_of(parts, x, spans, key_values)
        if rows is None:
            return mx.concatenate([parts.output(*tile) for tile in tiles], axis=1)
        pairs = zip(tiles, places, strict=True)
        made = [parts.output_at(*tile, mx.array(own)) for tile, own in pairs if own]
        return mx.concatenate(made, axis=1)

    def whole(x):
        out = block(x, *args, **kwargs)
        return out if rows is None else out.reshape(1, -1, width)[:, mx.array(order)]

    shape = x.shape if rows is None else (1, len(order), width)
    cotangent = mx.random.normal(shape, key=mx.random.key(9))
    return assert_same(by_tiles, whole, block, x, cotangent, tolerance)
