"""Losses of preferences: values and gradients are those of TRL's formulas under plain autodiff."""

from contextlib import closing

import pytest
from harness import assert_same_gradients, engine, plain, save
from preference_references import (
    LOSSES,
    preference_batch,
    trl_value_and_grad,
    value_and_grad,
)

from mlx_edgelora.engine.preferences import PreferenceEngine
from mlx_edgelora.losses.exact import CrossEntropy

WAYS = {
    "whole": {"kept_blocks": 3, "streamed": False, "spilled": False, "head": "resident"},
    "tiles": {"tile_tokens": 12, "head": "streamed"},
    "streamed": {"head": "streamed"},
}


def check(folder, loss, batch, **options):
    lora = {key: options[key] for key in ("keys",) if key in options}
    expected_loss, rewards, expected = trl_value_and_grad(
        loss, plain(folder, **lora), folder, batch
    )
    with closing(engine(folder, loss=CrossEntropy(16_384), **options)) as made:
        ours = PreferenceEngine(made, loss)
        (value, count), got = value_and_grad(ours, batch)
        figures = ours.take_figures()
        without, _ = ours.loss(batch)
    assert count == batch.terms
    assert value.item() == pytest.approx(expected_loss, rel=1e-5)
    assert without.item() == pytest.approx(expected_loss, rel=1e-5)
    assert_same_gradients(got, expected)
    chosen, rejected = rewards
    assert figures.margin == pytest.approx(chosen.mean() - rejected.mean(), rel=1e-4, abs=1e-5)
    if loss.name != "kto":
        assert figures.accuracy == (chosen > rejected).mean()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "qwen3_next", "gemma3_text"])
def test_values_and_gradients_are_trls(architecture, name, way, tmp_path):
    folder = save(tmp_path, architecture, quantized=True)
    check(folder, LOSSES[name], preference_batch(name), **WAYS[way])
