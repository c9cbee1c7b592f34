"""Blocks that cannot be computed for a part of their tokens: the trial must see it of each."""

import re

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import base
from mlx_lm.models.base import create_attention_mask
from part_helpers import assert_rows_equal_whole, assert_tiles_equal_whole

from mlx_edgelora.blocks.block_list import BlockList
from mlx_edgelora.blocks.tiling import Tiling
from mlx_edgelora.model.weights import ResidentWeights

WIDTH = 16


def choice(model):
    return Tiling(BlockList(model), (ResidentWeights(),)).tileable(1)


class Attending(nn.Module):
    """Two heads, after a norm, with rotary positions: can be cut. Others change a part."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.rope = nn.RoPE(8)

    def __call__(self, x, mask=None, cache=None):
        x = x + self.attend(self.norm(x), mask, cache)
        return x + mx.tanh(self.mlp(x))

    def attend(self, x, mask, cache):
        batch, tokens, _ = x.shape
        shape = (batch, tokens, 2, 8)
        q, k, v = (part.reshape(shape).swapaxes(1, 2) for part in mx.split(self.qkv(x), 3, axis=-1))
        q, k = self.positions(q, cache), self.positions(k, cache)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = self.attention(q, k, v, mask, cache)
        return self.out(out.swapaxes(1, 2).reshape(batch, tokens, -1))

    def positions(self, x, cache):
        return self.rope(x, offset=0 if cache is None else cache.offset)

    def attention(self, q, k, v, mask, cache):
        return base.scaled_dot_product_attention(q, k, v, cache=cache, scale=0.35, mask=mask)


class Toy(nn.Module):
    def __init__(self, kind, **given):
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = [Attending(), kind()]
        self.head = nn.Linear(WIDTH, 11)
        self._given = given

    def __call__(self, tokens):
        h = self.embed(tokens)
        mask = create_attention_mask(h)
        for layer in self.layers:
            given = {name: value(h) for name, value in self._given.items()}
            h = layer(h, **{"mask": mask} | given)
        return self.head(h)


def changed(**methods):
    """A kind of block with some methods of its own."""
    return type("Changed", (Attending,), methods)


def table(tokens):
    return mx.random.normal((tokens, WIDTH), key=mx.random.key(4))


def call_with(before):
    """A block that does something to its input first, given (block, x, cache)."""
    return changed(
        __call__=lambda self, x, mask=None, cache=None: Attending.__call__(
            self, before(self, x, cache), mask, cache
        )
    )


def shifted(x):
    return mx.concatenate([mx.zeros_like(x[:, :1]), x[:, :-1]], axis=1)


def no_offset(self, x, cache):
    return self.rope(x)


def offset_of_the_first(self, x, cache):
    return self.rope(x, offset=0 if cache is None else cache.offset.reshape(-1)[0].item())


def offset_as_a_number(self, x, cache):
    return self.rope(x, offset=0 if cache is None else int(cache.offset))


def first_offset_for_all(self, x, cache):
    return self.rope(x, offset=0 if cache is None else mx.array(cache.offset).reshape(-1)[0])


def one_behind(self, x, cache):
    return self.rope(x, offset=0 if cache is None else mx.maximum(cache.offset - 1, 0))


def own_attention(self, q, k, v, mask, cache):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.35, mask=mask)


def without_a_mask(self, q, k, v, mask, cache):
    return Attending.attention(self, q, k, v, None if cache is not None else mask, cache)


def twice(self, q, k, v, mask, cache):
    return Attending.attention(self, q, k, v, mask, cache) + Attending.attention(
        self, q, k, v, mask, cache
    )


def last_keys_only(self, q, k, v, mask, cache):
    """Its own window, on single queries only."""
    if q.shape[2] == 1 and k.shape[2] > 5:
        k, v = k[:, :, -5:], v[:, :, -5:]
    return Attending.attention(self, q, k, v, mask, cache)


def ignores_the_cache(self, x, mask, cache):
    return Attending.attend(self, x, mask, None)


def asserts(self, x, mask, cache):
    assert x.shape[1] > 1, "whole sequences"
    return Attending.attend(self, x, mask, cache)


def broken_for_one(self, x, mask, cache):
    out = Attending.attend(self, x, mask, cache)
    return out if x.shape[1] > 1 else out * mx.nan


class NoNorm(Attending):
    """Small inputs give equal scores, whatever the positions."""

    def __call__(self, x, mask=None, cache=None):
        x = x + self.attend(x, mask, cache)
        return x + mx.tanh(self.mlp(x))


class Still(Attending):
    """Adds nothing, so nothing can be seen of what it does."""

    def __call__(self, x, mask=None, cache=None):
        return x + 0 * Attending.__call__(self, x, mask, cache)


class PoolsBehind(Attending):
    def __call__(self, x, mask=None, cache=None):
        x = super().__call__(x, mask, cache)
        return x + x.mean(axis=1, keepdims=True)


class PlacesBehind(Attending):
    """Adds something that depends on the place of a token behind attention."""

    def __init__(self):
        super().__init__()
        self.places = mx.random.normal((20, WIDTH))

    def __call__(self, x, mask=None, cache=None):
        first = mx.array(0 if cache is None else cache.offset).reshape(-1, 1)
        return super().__call__(x, mask, cache) + self.places[first + mx.arange(x.shape[1])]


class NoMask(Attending):
    def __call__(self, x, cache=None, **others):
        return super().__call__(x, others.get("mask"), cache)


class NoCache(Attending):
    def __call__(self, x, mask=None):
        return super().__call__(x, mask)


DIFFERS = "computed by parts a block differs by"
CANNOT = "a block cannot be called for parts of its tokens: "
REFUSED = {
    "absolute positions": (call_with(lambda s, x, c: x + table(x.shape[1])), DIFFERS),
    "pools over tokens": (call_with(lambda s, x, c: x + x.mean(axis=1, keepdims=True)), DIFFERS),
    "sums over tokens": (call_with(lambda s, x, c: mx.cumsum(x, axis=1)), DIFFERS),
    "shifts tokens": (call_with(lambda s, x, c: x + shifted(x)), DIFFERS),
    "normalizes over tokens": (
        call_with(lambda s, x, c: x / mx.linalg.norm(x, axis=1, keepdims=True)),
        DIFFERS,
    ),
    "another path with a cache": (
        call_with(lambda s, x, c: x if c is None else 1.1 * x),
        DIFFERS,
    ),
    "pools behind attention": (PoolsBehind, DIFFERS),
    "positions without offset": (changed(positions=no_offset), DIFFERS),
    "positions one behind": (changed(positions=one_behind), DIFFERS),
    "an offset that is an array": (
        changed(positions=offset_of_the_first),
        CANNOT + "'int' object has no attribute",
    ),
    "an offset that is looked at": (
        changed(positions=offset_as_a_number),
        "what a block computes depends on how long the text is",
    ),
    "no norm, positions without offset": (
        type("Changed", (NoNorm,), {"positions": no_offset}),
        DIFFERS,
    ),
    "no mask with a cache": (changed(attention=without_a_mask), DIFFERS),
    "ignores its cache": (changed(attend=ignores_the_cache), DIFFERS),
    "adds nothing": (Still, DIFFERS + " nan"),
    "no cache": (NoCache, DIFFERS),
    "no name for its mask": (NoMask, CANNOT + "a block takes mask by no name of its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    kind, reason = REFUSED[name]
    made = choice(Toy(kind))
    assert (made.possible, made.by_rows) == (False, False)
    assert made.reason.startswith(reason)


@pytest.mark.parametrize(
    "kind",
    [changed(attend=asserts), changed(attend=broken_for_one)],
    ids=["asserts", "not a number"],
)
def test_cut_into_tiles_but_not_into_single_tokens(kind):
    model = Toy(kind)
    made = choice(model)
    assert (made.possible, made.through_cache, made.by_rows) == (True, False, False)
    x = mx.random.normal((2, 9, WIDTH))
    assert_tiles_equal_whole(model.layers[-1], [2, 7], x, mask="causal")


@pytest.mark.parametrize(
    "kind", [changed(attention=own_attention), changed(attention=twice)], ids=["own", "twice"]
)
def test_attention_of_its_own_or_twice_is_cut_at_the_cache(kind):
    model = Toy(kind)
    made = choice(model)
    assert (made.possible, made.through_cache, made.by_rows) == (True, True, False)
    x, block = mx.random.normal((2, 9, WIDTH)), model.layers[-1]
    assert_tiles_equal_whole(block, [2, 7], x, mask="causal", through_cache=True)


@pytest.mark.parametrize(
    "kind",
    [
        Attending,
        NoNorm,
        PlacesBehind,
        changed(attention=last_keys_only),
        changed(positions=first_offset_for_all),
    ],
    ids=["plain", "no norm", "places behind", "its own window", "one offset for all"],
)
def test_cut_at_attention_and_into_single_tokens(kind):
    """What the refused ones change, and blocks that are cut in a way that does them no harm."""
    model = Toy(kind)
    made = choice(model)
    assert (made.possible, made.through_cache, made.by_rows) == (True, False, True)
    block, x, rows = model.layers[-1], mx.random.normal((2, 9, WIDTH)), [1, 5, 9, 17]
    for given in ({}, {"mask": "causal"}):
        assert_rows_equal_whole(block, rows, x, **given)
        assert_tiles_equal_whole(block, [2, 7], x, **given)
        assert_tiles_equal_whole(block, [2, 7], x, rows=rows, **given)


def test_positions_without_offset_are_not_seen_in_small_inputs(monkeypatch):
    """Why the trial takes large ones too."""
    monkeypatch.setattr("mlx_edgelora.blocks.tiling.TRIAL_SCALES", (0.01, 0.01))
    assert choice(Toy(REFUSED["no norm, positions without offset"][0])).possible


class Faint(Attending):
    """Adds a hundredth of a large input, of which half precision keeps one digit."""

    def __call__(self, x, mask=None, cache=None):
        return x + (0.005 * (Attending.__call__(self, x, mask, cache) - x)).astype(x.dtype)


def rounded_otherwise(self, x, mask=None, cache=None):
    """As another kernel may: the last digit of all that is returned is another one."""
    out = Faint.__call__(self, x, mask, cache)
    return out if cache is None else out * (1 + mx.finfo(x.dtype).eps)


@pytest.mark.parametrize(
    ("change", "possible"),
    [({}, True), ({"__call__": rounded_otherwise}, True), ({"positions": no_offset}, False)],
    ids=["same", "rounded otherwise", "positions without offset"],
)
def test_rounding_of_a_large_input_is_no_fault_and_hides_none(change, possible):
    """Why rounding is allowed for, and why the trial takes small inputs too."""
    model = Toy(type("Changed", (Faint,), change))
    model.set_dtype(mx.bfloat16)
    made = choice(model)
    assert (made.possible, made.by_rows) == (possible, possible)


def test_a_difference_under_a_window_alone_is_seen():
    def array_mask_is_lost(self, q, k, v, mask, cache):
        lost = cache is not None and isinstance(mask, mx.array)
        return Attending.attention(self, q, k, v, "causal" if lost else mask, cache)

    made = choice(Toy(changed(attention=array_mask_is_lost)))
    assert (made.possible, made.reason.startswith(DIFFERS)) == (False, True)


def test_not_a_number_under_a_window_alone_is_seen():
    def broken(self, q, k, v, mask, cache):
        out = Attending.attention(self, q, k, v, mask, cache)
        return out * mx.nan if cache is not None and isinstance(mask, mx.array) else out

    assert choice(Toy(changed(attention=broken))).reason.startswith(DIFFERS + " nan")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (lambda h: mx.ones((h.shape[0], h.shape[1])), r"extra of a block is \(2, 7\), not"),
        (lambda h: mx.ones((h.shape[1],)), r"extra of a block is \(7,\), not a row"),
        (lambda h: mx.ones((1, 3, h.shape[1])), r"extra of a block is \(1, 3, 7\), not"),
        (lambda h: (mx.ones(3), 1), "extra of a block holds arrays"),
        (lambda h: {"cos": [mx.ones(3)]}, "extra of a block holds arrays"),
    ],
)
def test_arguments_that_cannot_be_cut(given, reason):
    def call(self, x, mask=None, cache=None, extra=None):
        return Attending.__call__(self, x, mask, cache)

    made = choice(Toy(changed(__call__=call), extra=given))
    assert (made.possible, made.by_rows) == (False, False)
    assert re.match(CANNOT + reason, made.reason)
