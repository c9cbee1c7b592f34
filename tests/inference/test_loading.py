"""`load` and `generate` from Python beside mlx-lm's, and the package's names."""

import importlib

import mlx.core as mx
import mlx_lm
import pytest
from tiny import make_adapter, make_model, words

import mlx_edgelora
from mlx_edgelora import EdgeLoraError, generate, load
from mlx_edgelora.inference.streamed import StreamedModel

MESSAGES = [{"role": "user", "content": words(range(9))}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    make_model(root / "model", "llama", num_hidden_layers=4)
    make_adapter(root / "adapter", root / "model", num_layers=4)
    return root


@pytest.mark.parametrize("budget", ["min", None], ids=str)
def test_answers_are_those_of_mlx_lm(made, budget):
    paths = str(made / "model"), str(made / "adapter")
    model, tokenizer = load(*paths, memory_budget=budget)
    assert isinstance(model, StreamedModel) == (budget == "min")
    theirs, _ = mlx_lm.load(paths[0], adapter_path=paths[1])
    tokens = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    expected = mlx_lm.generate(theirs, tokenizer, tokens, max_tokens=7)
    for prompt in (MESSAGES, tokens, tokenizer.decode(tokens)):
        assert generate(model, tokenizer, prompt, max_tokens=7) == expected
    assert mlx_lm.generate(model, tokenizer, tokens, max_tokens=7) == expected
    assert mlx_lm.generate(load(paths[0])[0], tokenizer, tokens, max_tokens=7) != expected


def test_a_call_gives_the_logits_of_all_tokens(made):
    model, _ = load(str(made / "model"), memory_budget="min")
    theirs, _ = mlx_lm.load(str(made / "model"))
    tokens = mx.array([[5, 6, 7, 8]])
    assert mx.allclose(model(tokens), theirs(tokens), atol=1e-4)
    with model.generating():
        assert mx.allclose(model(tokens)[:, -1], theirs(tokens)[:, -1], atol=1e-4)


def test_other_models_of_the_same_class_are_not_touched(made):
    """Calls of blocks are intercepted during a call only."""
    theirs, _ = mlx_lm.load(str(made / "model"))
    call = type(theirs.layers[0]).__call__
    model, tokenizer = load(str(made / "model"), memory_budget="min")
    generate(model, tokenizer, MESSAGES, max_tokens=2)
    assert type(theirs.layers[0]).__call__ is call


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budget": "5 elephants"}, "memory_budget: got '5 elephants'"),
        ({"memory_budget": 10**6, "tokens": 10**6}, "memory_budget: got 1.00 MB, but"),
        ({"adapter": "nowhere"}, "nowhere: is not the folder of an adapter"),
    ],
)
def test_what_is_wrong_is_said(made, options, message):
    with pytest.raises(EdgeLoraError, match=message):
        load(str(made / "model"), **options)


def test_functions_keep_their_names_after_commands_were_imported():
    for name in ("generate", "fuse", "evaluate"):
        module = importlib.import_module(f"mlx_edgelora.{name}")
        assert callable(module.main)
        assert callable(getattr(mlx_edgelora, name)) and not hasattr(
            getattr(mlx_edgelora, name), "main"
        )
    assert set(mlx_edgelora.__all__) == set(dir(mlx_edgelora)) == set(mlx_edgelora._MODULES)
