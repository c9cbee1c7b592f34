"""Attention of mlx-lm's models is exchanged wherever it is held, and put back."""

import importlib
import sys
import types

import mlx.core as mx
import pytest
from architectures import CONFIGS, build
from mlx_lm.models import base

from mlx_edgelora.blocks.attention import PACKAGE, replace_attention

ORIGINAL = base.scaled_dot_product_attention


def held():
    """Where it stands: every name of every loaded module of mlx-lm that means attention."""
    return {
        (name, key): value
        for name, module in list(sys.modules.items())
        if name.startswith(PACKAGE) and module is not None
        for key, value in vars(module).items()
        if key.endswith("scaled_dot_product_attention") or value is ORIGINAL
    }


@pytest.fixture(autouse=True)
def undone():
    """Whatever a test does, it leaves attention as it was."""
    before = held()
    yield
    assert {place: value for place, value in held().items() if place in before} == before


@pytest.fixture
def module(monkeypatch):
    """Makes modules of mlx-lm's package that live as long as the test."""

    def make(name, **contents):
        made = types.ModuleType(PACKAGE + name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, made.__name__, made)
        return made

    return make


def inputs():
    keys = mx.random.split(mx.random.key(0), 3)
    return [mx.random.normal((1, 2, 5, 4), key=key) for key in keys]


def called_by(module, name="scaled_dot_product_attention"):
    return getattr(module, name)(*inputs(), cache=None, scale=0.5, mask="causal")


def doubled(original, *args, **kwargs):
    return 2 * original(*args, **kwargs)


def test_every_architecture_that_imported_it_calls_the_replacement():
    modules = [importlib.import_module(PACKAGE + name) for name in CONFIGS]
    holding = [m for m in modules if vars(m).get("scaled_dot_product_attention") is ORIGINAL]
    assert len(holding) > 8  # all but those with attention of their own
    expected = called_by(base)
    with replace_attention(doubled):
        for each in [base, *holding]:
            assert mx.array_equal(called_by(each), 2 * expected).item()
    for each in [base, *holding]:
        assert each.scaled_dot_product_attention is ORIGINAL


def test_a_model_runs_through_the_replacement_with_what_mlx_lm_gives():
    model, seen = build("gpt_oss"), []

    def spy(original, queries, keys, values, cache, scale, mask, sinks=None):
        seen.append((queries.shape, keys.shape, cache, scale, type(mask), sinks.shape))
        return original(queries, keys, values, cache, scale=scale, mask=mask, sinks=sinks)

    tokens = mx.array([[1, 2, 3, 4, 5, 6, 7]])
    expected = model(tokens)
    with replace_attention(spy):
        got = model(tokens)
    assert mx.array_equal(got, expected).item()
    sliding, full = (mx.array, str)
    shapes = ((1, 4, 7, 16), (1, 2, 7, 16))
    assert seen == [(*shapes, None, 0.25, kind, (4,)) for kind in (sliding, full, sliding)]
    model(tokens)
    assert len(seen) == 3


def test_under_any_alias_and_twice_in_a_module(module):
    made = module("aliased", attend=ORIGINAL, also=ORIGINAL, other=len)
    with replace_attention(doubled):
        assert mx.array_equal(called_by(made, "attend"), called_by(made, "also")).item()
        assert made.attend is made.also is base.scaled_dot_product_attention is not ORIGINAL
        assert made.other is len
    assert made.attend is made.also is ORIGINAL


def test_modules_of_others_are_not_touched(monkeypatch):
    foreign = types.ModuleType("mlx_lm_models_of_others")
    foreign.attend = ORIGINAL
    monkeypatch.setitem(sys.modules, foreign.__name__, foreign)
    with replace_attention(doubled):
        assert foreign.attend is ORIGINAL


def test_a_module_that_may_not_be_imported_is_passed_over(monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGE + "forbidden", None)  # Python's way to say so
    with replace_attention(doubled):
        assert base.scaled_dot_product_attention is not ORIGINAL


def test_contexts_nest(module):
    made = module("nested", attend=ORIGINAL)
    expected = called_by(base)

    def plus_one(original, *args, **kwargs):
        return original(*args, **kwargs) + 1

    with replace_attention(doubled):
        outer = made.attend
        with replace_attention(plus_one):
            assert made.attend is outer  # one object for all contexts, whose function changes
            assert mx.array_equal(called_by(made, "attend"), 2 * expected + 1).item()
        assert made.attend is outer
        assert mx.array_equal(called_by(made, "attend"), 2 * expected).item()
        with replace_attention(plus_one), replace_attention(doubled):
            assert mx.array_equal(called_by(made, "attend"), 2 * (2 * expected + 1)).item()
    assert made.attend is ORIGINAL


def test_only_the_outermost_context_looks_through_the_modules(module):
    """A module that got the original meanwhile keeps it until the next time."""
    made = module("before", attend=ORIGINAL)
    with replace_attention(doubled):
        late = module("late", attend=ORIGINAL)
        with replace_attention(doubled):
            assert late.attend is ORIGINAL is not made.attend
    with replace_attention(doubled):
        assert late.attend is made.attend is not ORIGINAL


def test_the_same_function_twice_is_applied_twice():
    expected = called_by(base)
    with replace_attention(doubled), replace_attention(doubled):
        assert mx.array_equal(called_by(base), 4 * expected).item()
    assert mx.array_equal(called_by(base), expected).item()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_undone_on_any_error(module, error):
    made, expected = module("failing", attend=ORIGINAL), called_by(base)
    with pytest.raises(error), replace_attention(doubled):
        assert made.attend is not ORIGINAL
        raise error
    assert made.attend is ORIGINAL
    with replace_attention(doubled):
        outer = made.attend
        with pytest.raises(error), replace_attention(doubled):
            assert mx.array_equal(called_by(made, "attend"), 4 * expected).item()
            raise error
        assert made.attend is outer
        assert mx.array_equal(called_by(made, "attend"), 2 * expected).item()
    assert made.attend is ORIGINAL


def test_an_error_of_the_replacement_reaches_the_caller():
    def failing(original, *args, **kwargs):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"), replace_attention(failing):
        called_by(base)
    assert base.scaled_dot_product_attention is ORIGINAL


def test_a_module_imported_meanwhile_is_restored(module, monkeypatch):
    """It takes what it finds in `base`: the replacement, of the outer or of the inner context."""
    monkeypatch.delitem(sys.modules, PACKAGE + "helium", raising=False)
    expected = called_by(base)
    with replace_attention(doubled):
        late = importlib.import_module(PACKAGE + "helium")
        outer = late.scaled_dot_product_attention
        assert outer is base.scaled_dot_product_attention is not ORIGINAL
        with replace_attention(doubled):
            later = module("later", attend=base.scaled_dot_product_attention)
            assert mx.array_equal(called_by(later, "attend"), 4 * expected).item()
            assert mx.array_equal(called_by(late), 4 * expected).item()
        assert later.attend is late.scaled_dot_product_attention is outer
        assert mx.array_equal(called_by(later, "attend"), 2 * expected).item()
    assert later.attend is late.scaled_dot_product_attention is ORIGINAL


def test_a_module_unloaded_meanwhile_does_no_harm(module, monkeypatch):
    module("gone", attend=ORIGINAL)
    with replace_attention(doubled):
        monkeypatch.delitem(sys.modules, PACKAGE + "gone")
    assert base.scaled_dot_product_attention is ORIGINAL
