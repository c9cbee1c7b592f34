"""A few blocks tell what all of them take, and the plan is replaced by what they told."""

import weakref
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from architectures import CONFIGS, build, config
from mlx.utils import tree_flatten
from peaks import begin
from tiny import run_options

from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data import Batch
from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.measure.meter import peak_memory
from mlx_edgelora.model.checkpoint import write_model
from mlx_edgelora.model.loading import open_model
from mlx_edgelora.model.lora import add_lora
from mlx_edgelora.planner.machine import Machine, Rates
from mlx_edgelora.planner.measured import Measurements
from mlx_edgelora.planner.plan import MIB, Plan
from mlx_edgelora.planner.run_plan import Budget, RunPlan
from mlx_edgelora.planner.search import expected, smallest
from mlx_edgelora.planner.shape import shape_of
from mlx_edgelora.planner.sizes import BatchShape
from mlx_edgelora.training import finetune as module
from mlx_edgelora.training import opening, sampling
from mlx_edgelora.training.finetune import finetune
from mlx_edgelora.training.rehearsal import measure_pass
from mlx_edgelora.training.sampling import measure_and_replan, sample

MACHINE = Machine("a machine", Rates(5e10, 5e9, 1e9, 4e9, 2e9, 2e9, 2e-6))
# As wide as Qwen-2.5-0.5B, six blocks, a small vocabulary.
WIDE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 6,
    "vocab_size": 2048,
}
TOKENS = 96
STEPS = 3
PLANS = {
    "tiles": Plan(
        prefetch=False, adapters="paged", tile_tokens=80, mlp_bytes=4 * MIB, loss_bytes=16 * MIB
    ),
    "streamed": Plan(adapters="paged", mlp_bytes=8 * MIB),
    "resident": Plan(streamed_blocks=0, head="resident", inputs="memory", mlp_bytes=16 * MIB),
    "some kept": Plan(streamed_blocks=5, kept_blocks=4, inputs="memory"),
    "in parts": Plan(streamed_blocks=0, head="resident", micro_batches=2, kept_blocks=2),
}


def saved(folder, name, **changes):
    model = build(name, **changes)
    nn.quantize(model, 32, 4)
    settings = config(name) | changes | {"quantization": {"group_size": 32, "bits": 4}}
    write_model(folder, tree_flatten(model.parameters()), settings)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("wide"), "qwen2", **WIDE)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Six blocks too, for what needs no peak to be seen."""
    return saved(tmp_path_factory.mktemp("small"), "qwen2", num_hidden_layers=6)


def opened(folder, rank=16):
    lazy = open_model(str(folder), streamed=True, quantize=None, cache=folder)
    add_lora(lazy.model, -1, rank=rank)
    return lazy


def batch_of(rows, tokens):
    numbers = np.random.RandomState(0).randint(0, 100, (rows, tokens + 1)).astype(np.int32)
    mask = np.tile(np.arange(1, tokens + 1) >= tokens // 2, (rows, 1))
    return Batch(numbers, mask, tuple(range(rows)))


def run_by(lazy, batch, plan=None, budget=None):
    """The run by a plan, or by what is searched for."""
    shape = shape_of(checked_blocks(lazy.model), lazy.vocabulary, mx.float32)
    batch_shape = BatchShape(*batch.inputs().shape, int(batch.mask.sum()))
    measurements = Measurements()
    arguments = shape, batch_shape, MACHINE
    choice = plan and expected(*arguments, plan, measurements)
    run = RunPlan(*arguments, Budget(budget, "as asked"), choice, {}, True, measurements)
    return run if choice else run.with_choice(run.search())


def step_peak(engine, batch, most, batches=1):
    optimizer = optim.AdamW(1e-4)
    engine.adapters.start(optimizer)
    # As in a run: how far MLX runs ahead is bounded by its limit alone.
    before = mx.set_memory_limit(most)

    def step():
        begin()
        for _ in range(batches):
            engine.backward(batch, engine.adapters.add)
        engine.adapters.update(optimizer, batches)
        return mx.get_peak_memory()

    step()
    peak = max(step() for _ in range(STEPS))
    mx.set_memory_limit(before)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_few_blocks_tell_what_all_take(wide, name, memory):
    """Within a tenth of what a whole step takes; before it no more than was said."""
    lazy, batch = opened(wide), batch_of(2 if name == "in parts" else 1, TOKENS)
    chosen = run_by(lazy, batch, PLANS[name])
    guessed = chosen.choice
    with build_engine(lazy, chosen.plan, Settings(wide, "float32")) as engine:
        sample(engine, chosen)
        predicted = expected(
            chosen.shape, chosen.batch_shape, MACHINE, chosen.plan, chosen.measurements
        )
        measured = step_peak(engine, batch, predicted.needs)
    assert predicted.peak == pytest.approx(measured, rel=0.1)
    assert measured <= predicted.needs
    assert measured <= guessed.needs


@pytest.mark.slow
def test_gradients_that_are_added_up_are_planned(wide, memory):
    """Those of a batch before are in memory from the start; updates take a block at a time."""
    lazy, batch = opened(wide, rank=64), batch_of(1, 32)
    every = Plan(streamed_blocks=0, head="resident", kept_blocks=6)  # most is held at the tail
    chosen = run_by(lazy, batch, every)
    without = chosen.shape
    chosen.shape = replace(without, accumulates=True)
    with build_engine(lazy, chosen.plan, Settings(wide, "float32")) as engine:
        sample(engine, chosen)
        predicted = chosen.expected(chosen.plan)
        measured = step_peak(engine, batch, predicted.needs, batches=2)
        begin()
        measure_pass(engine, batch, keeps=True, accumulates=True)
        rehearsed = peak_memory()
    assert predicted.peak == pytest.approx(measured, rel=0.1)
    assert measured <= predicted.needs
    assert rehearsed == pytest.approx(measured, rel=0.05)
    chosen.shape = without
    assert chosen.expected(chosen.plan).needs < measured


# Blocks whose weights take much beside a batch: keys and values of blocks 0 and 1 serve the others.
SHARING = {
    "hidden_size": 512,
    "intermediate_size": 4096,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "global_head_dim": 32,
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 32,
    "num_kv_shared_layers": 3,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
}


@pytest.fixture(scope="module")
def sharing(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "gemma4_text", {})
        return saved(tmp_path_factory.mktemp("sharing"), "gemma4_text", **SHARING)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [True, False])
def test_what_reads_ahead_tells_what_does_not(sharing, ahead, memory):
    """And the other way around, where blocks by tiles read keys and values of others."""
    plan = Plan(adapters="paged", tile_tokens=48, mlp_bytes=2 * MIB, loss_bytes=2 * MIB)
    plan, other = replace(plan, prefetch=ahead), replace(plan, prefetch=not ahead)
    lazy, batch = opened(sharing, rank=4), batch_of(1, 96)
    chosen = run_by(lazy, batch, plan)
    with build_engine(lazy, plan, Settings(sharing, "float32")) as engine:
        sample(engine, chosen)
    chosen.choice = chosen.expected(other)
    assert not sampling.needs_measuring(chosen)
    with build_engine(opened(sharing, rank=4), other, Settings(sharing, "float32")) as engine:
        measured = step_peak(engine, batch, chosen.choice.needs)
    assert chosen.choice.peak == pytest.approx(measured, rel=0.1)
    assert measured <= chosen.choice.needs


def test_inputs_in_memory_are_measured_apart(small):
    """Of tiles, what experts and states are given is there as well."""
    lazy, batch = opened(small), batch_of(1, 40)
    for tile_tokens, apart in ((20, True), (None, False)):
        chosen = run_by(lazy, batch, Plan(tile_tokens=tile_tokens))
        with build_engine(opened(small), chosen.plan, Settings(small, "float32")) as engine:
            sample(engine, chosen)
        assert not sampling.needs_measuring(chosen)
        chosen.choice = chosen.expected(replace(chosen.plan, inputs="memory"))
        assert sampling.needs_measuring(chosen) == apart


def test_blocks_that_need_most_are_measured():
    """Those whose outputs are read, and those on disk, in place of others of their kind."""

    def chosen(**options):
        return sampling._blocks_to_sample([[0, 1, 2, 3], [4, 5, 6]], kept=False, **options)

    assert chosen(overlaps=False) == [3, 5, 6]
    assert chosen(overlaps=False, read={1}) == [1, 5, 6]
    assert chosen(overlaps=False, streamed=2) == [1, 5, 6]
    assert chosen(overlaps=False, streamed=7) == [3, 5, 6]
    assert chosen(overlaps=False, streamed=3, read={1}) == [1, 5, 6]
    assert chosen(overlaps=False, streamed=1, read={1}) == [0, 1, 5, 6]  # the one extra visit
    assert chosen(overlaps=True, streamed=2) == [1, 3, 4, 5, 6]
    assert chosen(overlaps=True, streamed=1, read={1}) == [0, 1, 4, 5, 6]


@pytest.mark.parametrize(
    "plan",
    [Plan(streamed_blocks=1, kept_blocks=4), Plan(streamed_blocks=1, kept_blocks=1), Plan()],
    ids=["all in memory but one", "some recomputed", "none kept"],
)
def test_what_was_measured_is_known(plan, tmp_path):
    """By the ways of the whole run: of the few blocks that are computed none may be on disk."""
    lazy = opened(saved(tmp_path, "llama", num_hidden_layers=4), rank=4)
    chosen = run_by(lazy, batch_of(1, 40), plan)
    assert sampling.needs_measuring(chosen)
    with build_engine(lazy, plan, Settings(tmp_path, "float32")) as engine:
        sample(engine, chosen)
    assert not sampling.needs_measuring(chosen)


def test_of_blocks_of_several_kinds_each_is_measured(tmp_path):
    """And nothing of the engine is other than before."""
    types = ["linear_attention", "full_attention"] * 3 + ["linear_attention"]
    folder = saved(tmp_path, "olmo_hybrid", num_hidden_layers=7, layer_types=types)
    lazy = opened(folder, rank=4)
    chosen = run_by(lazy, batch_of(1, 12), Plan(streamed_blocks=0))
    visited = []
    with build_engine(lazy, chosen.plan, Settings(folder, "float32")) as engine:
        kinds = sampling._kinds(engine, 0, 7)
        assert kinds == [[0, 2, 4, 6], [1, 3, 5]]
        assert sampling._blocks_to_sample(kinds, overlaps=False, kept=False) == [4, 5, 6]
        assert sampling._blocks_to_sample(kinds, overlaps=True, kept=False) == [2, 3, 4, 5, 6]
        assert sampling._blocks_to_sample(kinds, overlaps=False, kept=True) == [4, 5]
        assert sampling._kinds(engine, 0, 5) == [[0, 2, 4], [1, 3]]
        called = engine.walk._functions.call_block

        def spied(index, *arguments):
            visited.append(index)
            return called(index, *arguments)

        engine.walk._functions.call_block = spied
        state = mx.random.state[0].tolist()
        sample(engine, chosen)
        assert mx.random.state[0].tolist() == state
        assert set(visited) == {4, 5, 6}
        assert (engine.plan, engine.walk.sample) == (chosen.plan, None)
        visited.clear()
        engine.value_and_grad(batch_of(1, 12))
        assert set(visited) == set(range(7))


def test_gradients_after_a_sample_are_those_without(small):
    found = []
    for samples in (False, True):
        lazy, batch = opened(small), batch_of(1, 40)
        mx.random.seed(0)
        chosen = run_by(lazy, batch, Plan(kept_blocks=2, streamed_blocks=4))
        with build_engine(lazy, chosen.plan, Settings(small, "float32")) as engine:
            if samples:
                sample(engine, chosen)
            _, gradients = engine.value_and_grad(batch)
            found.append(dict(tree_flatten(gradients)))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert mx.array_equal(value, found[1][name]).item(), name


@pytest.mark.slow
@pytest.mark.alone
def test_a_plan_is_replaced_by_what_was_measured(wide, monkeypatch):
    """Until the best one is known; what needs another engine is handed back."""
    lazy, batch = opened(wide), batch_of(1, TOKENS)
    least = smallest(*_sizes(lazy, batch), MACHINE)
    lines = []
    chosen, engines = run_by(lazy, batch, budget=2 * least.needs), 0
    while chosen is not None:
        with build_engine(opened(wide), chosen.plan, Settings(wide, "float32")) as engine:
            another, engines = measure_and_replan(engine, chosen, lines.append), engines + 1
            if another is None:
                assert engine.plan == chosen.plan
                # Another engine is made for what is better by more.
                assert chosen.choice.seconds <= chosen.search().seconds / (1 - sampling.WORTH)
                peak = step_peak(engine, batch, chosen.budget.bytes)
                assert peak <= chosen.budget.bytes
                assert peak == pytest.approx(chosen.choice.peak, rel=0.1)
                count = len(lines)
                assert (
                    measure_and_replan(engine, chosen, lines.append) is None and len(lines) == count
                )
            else:
                assert another.plan != chosen.plan
        chosen = another
    assert engines <= 4 and lines
    assert all(line.startswith("measured ") for line in lines)


def test_an_engine_that_stays_is_not_given_up(small, monkeypatch):
    """Not even for a plan without weights on disk, which seems better."""
    monkeypatch.setattr(sampling, "_better", lambda *args: True)
    lazy, batch = opened(small), batch_of(1, 20)
    for stays in (False, True):
        chosen = run_by(lazy, batch, budget=10**9)
        chosen.choice = chosen.expected(Plan(kept_blocks=1))
        with build_engine(opened(small), chosen.plan, Settings(small, "float32")) as engine:
            found = measure_and_replan(engine, chosen, print, stays=stays)
        assert (found is None) == stays
    assert chosen.plan.streams


def test_a_plan_that_was_given_is_not_measured(small):
    lazy, batch = opened(small), batch_of(1, 20)
    chosen = run_by(lazy, batch, Plan())
    chosen.given = True
    assert measure_and_replan(None, chosen, None) is None


def test_nothing_is_measured_where_there_is_plenty(small):
    lazy, batch = opened(small), batch_of(1, 20)
    chosen = run_by(lazy, batch, budget=10**12)
    assert chosen.plan.kept_blocks == 6
    assert measure_and_replan(None, chosen, None) is None


def test_a_budget_that_is_too_small_by_what_was_measured(small, monkeypatch):
    lazy, batch = opened(small), batch_of(1, 20)
    chosen = run_by(lazy, batch, budget=run_by(lazy, batch).choice.needs)

    def measured(engine, chosen):
        chosen.measurements.correction = 3.0
        return 0.1

    monkeypatch.setattr(sampling, "sample", measured)
    monkeypatch.setattr(sampling, "PLENTY", 0.0)
    with pytest.raises(EdgeLoraError, match="memory_budget: got"):
        measure_and_replan(None, chosen, print)


def _sizes(lazy, batch):
    chosen = run_by(lazy, batch)
    return chosen.shape, chosen.batch_shape


@pytest.mark.slow
@pytest.mark.alone
def test_the_least_is_measured_too(wide):
    lazy, batch = opened(wide), batch_of(1, TOKENS)
    chosen = run_by(lazy, batch)
    assert chosen.budget.bytes is None and chosen.plan.adapters == "paged"
    with build_engine(opened(wide), chosen.plan, Settings(wide, "float32")) as engine:
        assert measure_and_replan(engine, chosen, print) is None
        assert step_peak(engine, batch, chosen.choice.needs) == pytest.approx(
            chosen.choice.peak, rel=0.1
        )
        assert replace(chosen.plan, reason="") == replace(engine.plan, reason="")


@pytest.mark.parametrize("keys", [["model.embed_tokens"], ["lm_head"]])
def test_adapters_outside_the_blocks_alone(keys, tmp_path):
    """All blocks carry the gradient of the one, none that of the other."""
    folder = saved(tmp_path, "llama")
    lazy = open_model(str(folder), streamed=True, quantize=None, cache=folder)
    add_lora(lazy.model, -1, rank=4, keys=keys)
    chosen = run_by(lazy, batch_of(2, 20))
    assert sampling.needs_measuring(chosen) == (keys == ["model.embed_tokens"])
    with build_engine(lazy, chosen.plan, Settings(folder, "float32")) as engine:
        assert measure_and_replan(engine, chosen, print) is None
        assert not sampling.needs_measuring(chosen)
        step_peak(engine, batch_of(2, 20), 10**9)


def test_a_rest_is_no_part_of_what_is_measured(small):
    lazy, batch, rests = opened(small), batch_of(1, 20), []
    chosen = run_by(lazy, batch, Plan())
    resting = Settings(small, "float32", pause=lambda: rests.append(1))
    with build_engine(lazy, chosen.plan, resting) as engine:
        sample(engine, chosen)
        assert not rests
        engine.value_and_grad(batch)
    assert len(rests) == 12


@pytest.fixture
def run(tiny, tmp_path):
    """A run within a budget that has something to choose; gives the lines that were told."""

    def run(**changes):
        own = {"memory_budget": "25MB", "activations": "spill", "overwrite": True}
        lines = []
        finetune(
            TrainConfig.from_dict(run_options(tiny, tmp_path) | own | changes), notify=lines.append
        )
        return lines

    return run


@pytest.mark.slow
@pytest.mark.alone
def test_a_run_remembers_what_another_measured_of_the_same(run):
    def runs_until_all_is_known(**options):
        """Of ways that seem better than what is known some may be left for the next run."""
        for count in range(5):
            if not any(line.startswith("measured ") for line in run(**options)):
                return count
        return None

    assert runs_until_all_is_known()
    assert runs_until_all_is_known(iters=1, learning_rate=1e-3) == 0
    for other in ({"lora_parameters": {"dropout": 0.1}}, {"batch_size": 1}, {"dtype": "bfloat16"}):
        assert runs_until_all_is_known(**other)
        assert runs_until_all_is_known(**other) == 0


def test_the_model_of_an_engine_that_was_given_up_is_gone(run, monkeypatch):
    """And nothing but the time of it is lost."""
    models, settled = [], []

    def settle_twice(engine, chosen, notify, stays):
        engine.itself = engine  # as callbacks and compiled functions do
        models.append(weakref.ref(engine.model))
        settled.append(stays)
        return chosen if len(settled) == 1 else None

    monkeypatch.setattr(opening, "measure_and_replan", settle_twice)
    original = module.train

    def train(*args, **more):
        assert models[0]() is None and models[1]() is not None
        return original(*args, **more)

    monkeypatch.setattr(module, "train", train)
    run()
    assert settled == [False, False]


def test_engines_are_not_made_without_end(run, monkeypatch):
    settled = []

    def never(engine, chosen, notify, stays):
        settled.append(stays)
        return None if stays else chosen

    monkeypatch.setattr(opening, "measure_and_replan", never)
    run()
    assert settled == [False, False, False, True]


def test_a_budget_that_may_do_is_tried(run):
    """A formula says of so small a model that it takes some ten MB; it takes two."""
    options = {"lora_parameters": {"rank": 3}, "activations": None}
    lines = run(memory_budget="8MB", **options)
    assert any(line.startswith("measured ") for line in lines)
    with pytest.raises(EdgeLoraError, match=r"memory_budget: got 1\.00 MB"):
        run(memory_budget="1MB", **options)
