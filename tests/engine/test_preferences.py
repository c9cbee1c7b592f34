"""Losses of preferences: values and gradients are those of TRL's formulas under plain autodiff."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from harness import assert_same_gradients, engine, plain, resolution, save
from peaks import above, lowest
from preference_references import LOSSES, preference_batch, trl_value_and_grad, value_and_grad

from mlx_edgelora.engine.preferences import PreferenceEngine, answer_parts
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.planner.plan import Plan

# What a batch is computed by: all kept in memory, by tiles of tokens, block by block from disk.
WAYS = {
    "whole": Plan(kept_blocks=3, streamed_blocks=0, inputs="memory"),
    "tiles": Plan(tile_tokens=12),
    "streamed": Plan(),
}


class Reference:
    """What TRL's formulas give for a batch, and where float32 leaves it open."""

    def __init__(self, folder, loss, batch, moves=False, **lora):
        self.loss, self.batch, model = loss, batch, plain(folder, **lora)

        def compute(model, batch):
            return trl_value_and_grad(loss, model, folder, batch)

        self.value, self.gradients, self.rewards = compute(model, batch)
        self.moves = resolution(model, batch, compute) if moves else None

    def check(self, made):
        """The batch by an engine."""
        ours, (chosen, rejected) = PreferenceEngine(made, self.loss), self.rewards
        (value, count), got = value_and_grad(ours, self.batch)
        figures = ours.take_figures()
        without, _ = ours.loss(self.batch)
        assert count == self.batch.terms
        assert value.item() == pytest.approx(self.value, rel=1e-5)
        assert without.item() == pytest.approx(self.value, rel=1e-5)
        margin = chosen.mean() - rejected.mean()
        assert figures.margin == pytest.approx(margin, rel=1e-4, abs=1e-5)
        right = chosen > rejected if self.loss.name != "kto" else [*(chosen > 0), *(rejected < 0)]
        assert figures.accuracy == np.mean(right)
        assert_same_gradients(got, self.gradients, resolution=self.moves)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "qwen3_next", "gemma3_text"])
def test_values_and_gradients_are_trls(architecture, tmp_path):
    """Of each loss, each way and each kind of architecture."""
    folder = save(tmp_path, architecture, quantized=True)
    with closing(engine(folder, loss=CrossEntropy(16_384))) as made:
        for name, loss in LOSSES.items():
            batch = preference_batch(name)
            expected = Reference(folder, loss, batch, moves=architecture == "qwen3_next")
            for plan in WAYS.values():
                made.set_plan_and_residency(plan)
                expected.check(made)


@pytest.mark.parametrize(("name", "way"), list(zip(LOSSES, [*WAYS, "whole"], strict=True)))
def test_each_loss_one_way(name, way, tmp_path):
    folder = save(tmp_path, "llama", quantized=True, num_hidden_layers=2)
    with closing(engine(folder, loss=CrossEntropy(16_384))) as made:
        made.set_plan_and_residency(replace(WAYS[way], kept_blocks=2 * (way == "whole")))
        Reference(folder, LOSSES[name], preference_batch(name)).check(made)


@pytest.mark.parametrize(
    ("name", "kept", "whole_logits"),
    [
        ("kto", 0, False),
        ("dpo", 2, True),
        pytest.param("orpo", 0, True, marks=pytest.mark.slow),
        pytest.param("kto", 2, False, marks=pytest.mark.slow),
        pytest.param("simpo", 2, True, marks=pytest.mark.slow),
    ],
)
def test_with_an_adapted_head_and_in_parts(name, kept, whole_logits, tmp_path):
    folder, keys = save(tmp_path, "llama", quantized=True), ["lm_head", "mlp.down_proj"]
    options = {"micro_batches": 2, "kept_blocks": kept, "keys": keys}
    with closing(engine(folder, loss=CrossEntropy(16_384), **options)) as made:
        if whole_logits:
            made.head = None
        Reference(folder, LOSSES[name], preference_batch(name, pairs=3), keys=keys).check(made)


def test_pairs_are_not_divided():
    batch = preference_batch("dpo", pairs=5)
    parts = answer_parts(batch, 8, fills=True)
    assert [len(part.places) for part in parts] == [2] * 5
    assert [len(part.places) for part in answer_parts(batch, 2, fills=False)] == [6, 4]
    assert [len(part.places) for part in answer_parts(batch, 1, fills=False)] == [10]
    assert all(part.desirable.tolist() == [1.0, 0.0] for part in parts)


@pytest.mark.slow
def test_compiled_and_filled_up(compiles, tmp_path):
    """The loss is one compiled function for batches with other numbers of labels."""
    folder, loss = save(tmp_path, "llama", quantized=True), LOSSES["dpo"]
    options = {"compiled": True, "kept_blocks": 3, "streamed": False, "spilled": False}
    with closing(engine(folder, loss=CrossEntropy(16_384), head="resident", **options)) as made:
        Reference(folder, loss, preference_batch("dpo")).check(made)
        count = made.walk.compiled_functions
        Reference(folder, loss, preference_batch("dpo", seed=1, share=0.2)).check(made)
        assert made.walk.compiled_functions == count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_step_takes_little_more_memory_than_a_supervised_one(name, tmp_path, memory):
    """The reference model is the same weights, of whose pass nothing is kept."""
    folder = save(tmp_path, "llama", quantized=True, hidden_size=128, intermediate_size=256)
    batch = preference_batch(name, pairs=4, tokens=96)
    with closing(engine(folder, loss=CrossEntropy(2**16), kept_blocks=1)) as made:
        ours = PreferenceEngine(made, LOSSES[name])
        plain_batch = replace(batch, preferences=None)
        steps = (lambda: ours.backward(batch, dict.clear), lambda: made.backward(plain_batch, drop))
        for step in steps:  # the first one also tries what can be tiled
            step()
        bound = 1.2 * above(steps[1])
        assert lowest(lambda: above(steps[0]), bound) < bound


def drop(gradients):
    gradients.clear()
