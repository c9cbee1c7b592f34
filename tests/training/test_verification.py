"""The gate: it agrees with what is right, sees what is wrong, and leaves everything as it was."""

import cProfile
import json
import re
from contextlib import closing, contextmanager
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import CONFIGS, add_lora, build, config
from harness import engine, random_batch, save
from mlx.utils import tree_flatten
from mlx_lm.utils import save_config, save_model
from pairwise import pairwise
from tf32 import tf32
from toy import Block, Toy

from mlx_edgelora import EdgeLoraError, TrainConfig, finetune
from mlx_edgelora import verify as command
from mlx_edgelora.blocks import attention as hook
from mlx_edgelora.blocks import parts
from mlx_edgelora.blocks.added_scores import factors_of
from mlx_edgelora.blocks.block_list import BlockList
from mlx_edgelora.engine.hidden import Hidden
from mlx_edgelora.engine.tail import Tail
from mlx_edgelora.engine.tiled_backward import TiledBackward
from mlx_edgelora.engine.walk import Walk
from mlx_edgelora.layers import attention as attention_layer
from mlx_edgelora.layers import grid
from mlx_edgelora.layers.key_sums import KeySums
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.planner.plan import Plan
from mlx_edgelora.storage.deferred import DeferredArray
from mlx_edgelora.training import plain, verdict, verification
from mlx_edgelora.training.verdict import refuse_wrong
from mlx_edgelora.training.verification import verify

TILES = {"tile_tokens": 16, "prefetch": False}
PLANS = {
    "whole": {},
    "tiles": TILES,
    "kept": {"kept_blocks": 2},
    "tail": {"kept_blocks": 2, "head": "resident"},
}


def problems(folder, light=True, dtype=None, rows=2, tokens=40, spoil=lambda: None, **options):
    """What is wrong with an engine, and whether it is refused.

    `spoil` is called when it was tried which blocks can be computed by tiles: a trial sees much.
    """
    with closing(engine(folder, dtype=dtype, **options)) as ours:
        if "tile_tokens" in options and not options.get("dropout"):
            assert ours.walk.tile_choice(0, rows * tokens).possible
        spoil()
        kind = None if dtype is None else getattr(mx, dtype)
        found = verify(ours, rows, tokens, kind, light)
    return [f"{verdict}: {verdict.problem}" for verdict in found if verdict.problem]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(tmp_path_factory.mktemp("llama"), "llama", True)


# --- it agrees with what is right -----------------------------------------------------------


# With a window, with sinks and experts, with latent attention; the others take their time.
FAST = ("llama", "gemma3_text", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CONFIGS],
)
def test_right_gradients_pass(name, tmp_path):
    with closing(engine(save(tmp_path, name, True), head="resident")) as ours:
        for plan in PLANS.values():
            ours.set_plan(Plan(**plan))
            assert_passed(verify(ours, 2, 40, light=True))


def assert_passed(found):
    refuse_wrong(found)
    kinds = [verdict.kind for verdict in found]
    assert kinds[0] == "calls of blocks" and kinds[-1] == "head and loss"
    covered = ", ".join(verdict.blocks for verdict in found if verdict.blocks)
    assert sorted(
        number
        for part in covered.split(", ")
        for number in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)
    ) == [0, 1, 2]
    assert max(verdict.error for verdict in found) < 1e-5


@pytest.mark.parametrize("plan", PLANS)
def test_at_full_length(llama, plan):
    assert problems(llama, light=False, rows=3, tokens=41, **PLANS[plan]) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("plan", PLANS)
def test_in_16_bits_rounding_is_no_error(llama, plan, dtype):
    assert problems(llama, dtype=dtype, **PLANS[plan]) == []


@pytest.fixture(params=[10, 8])
def in_fewer_bits(request, monkeypatch):
    """The walk multiplies float32 as TF32 does, or worse; the reference happens not to."""
    walked = verification._GradientComparison._walked

    def rounding(*args):
        with tf32(bits=request.param):
            return walked(*args)

    with tf32(bits=request.param):
        error = verdict._rounding.__wrapped__()
    assert error > verdict.EXACT > verdict._rounding()
    monkeypatch.setattr(verdict, "_rounding", lambda: error)
    monkeypatch.setattr(verification._GradientComparison, "_walked", rounding)


@pytest.mark.parametrize("plan", PLANS)
def test_fewer_bits_of_float32_are_no_error(llama, plan, in_fewer_bits):
    assert problems(llama, **PLANS[plan]) == []


@pytest.mark.parametrize(
    ("in_fewer_bits", "factor"),
    [
        (10, 1.1),
        pytest.param(8, 1.1, marks=pytest.mark.slow),
        pytest.param(10, 0.0, marks=pytest.mark.slow),
        pytest.param(8, float("nan"), marks=pytest.mark.slow),
    ],
    indirect=["in_fewer_bits"],
)
def test_what_is_wrong_is_seen_in_fewer_bits(llama, factor, in_fewer_bits, monkeypatch):
    monkeypatch.setattr(Walk, "backward", scaled(factor))
    for plan in PLANS.values():
        found = problems(llama, **plan)
        assert found and all("o_proj.lora_a" in text for text in found)


@pytest.mark.parametrize(
    "lora",
    [
        {"dropout": 0.5},
        {"num_layers": 2},
        {"keys": ["model.embed_tokens", "lm_head", "self_attn.q_proj"]},
    ],
    ids=str,
)
def test_dropout_lower_blocks_and_adapters_outside_the_blocks(llama, lora):
    for plan in PLANS.values():
        assert problems(llama, **lora, **plan) == []


def test_packed_as_floats_and_compiled(tmp_path):
    model = build("llama")
    packing = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    nn.quantize(model, **packing)
    save_model(tmp_path, model)

    save_config(config("llama") | {"quantization": packing}, tmp_path / "config.json")
    assert problems(tmp_path) == []
    assert problems(tmp_path, compiled=True) == []


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_reference_of_the_head_is_mlxs_loss(smoothing):
    logits, labels = 5 * mx.random.normal((7, 601)), mx.arange(7) * 80
    function = verification._cross_entropy
    got = mx.value_and_grad(lambda x: function(x, labels, smoothing))(logits)
    expected = mx.value_and_grad(
        lambda x: nn.losses.cross_entropy(x, labels, label_smoothing=smoothing).mean()
    )(logits)
    assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert mx.allclose(got[1], expected[1], rtol=1e-5, atol=1e-8).item()


class Collecting(Block):
    """Its arguments have no names of their own."""

    def __call__(self, x, *args, **kwargs):
        return super().__call__(x, *args, **kwargs)


@pytest.mark.parametrize("kind", [Block, Collecting])
def test_however_a_block_names_its_arguments(kind):
    model = Toy(kind)
    model.layers[1] = Block()
    add_lora(model)
    blocks, tokens = BlockList(model), mx.array([[1, 2, 3]])
    found = plain.plain_calls(blocks, tokens)
    for index, (_, args, kwargs) in enumerate(plain.recorded_calls(blocks, tokens)):
        mine = plain.named_arguments(blocks.blocks[index], args, kwargs)
        assert list(found[index])[1:] == list(mine)[1:]


def test_a_profile_of_the_whole_program_goes_on():
    """cProfile's profiler is no function, and Python cannot put it back as one."""
    blocks, tokens = BlockList(Toy()), mx.array([[1, 2, 3]])
    with cProfile.Profile() as profile:
        plain.plain_calls(blocks, tokens)
        sorted([])
    seen = {entry.code for entry in profile.getstats()}
    assert any("sorted" in str(code) for code in seen)


# --- it sees what is wrong ------------------------------------------------------------------


def scaled(factor):
    """A walk whose gradients of one matrix are multiplied."""
    original = Walk.backward

    def backward(self, state):
        for more in original(self, state):
            for name in [n for n in more if n.endswith("o_proj.lora_a")]:
                more[name] = more[name] * factor
            yield more

    return backward


@pytest.mark.parametrize(
    ("factor", "dtype", "plan"),
    pairwise([1.01, 0.0, float("nan")], [None, "float16", "bfloat16"], PLANS),
)
def test_a_scaled_gradient_is_seen(llama, factor, plan, dtype, monkeypatch):
    monkeypatch.setattr(Walk, "backward", scaled(factor))
    found = problems(llama, dtype=dtype, **PLANS[plan])
    assert len(found) >= 2
    assert all("o_proj.lora_a" in text for text in found)


@pytest.mark.parametrize("light", [True, False])
def test_a_small_scale_is_seen_in_float32(llama, light, monkeypatch):
    monkeypatch.setattr(Walk, "backward", scaled(1.0001))
    assert problems(llama, light)


def test_a_dropped_mask_is_seen(llama, monkeypatch):
    original = hook.tiled_attention

    def unmasked(*args, mask, **kwargs):
        return original(*args, mask=None, **kwargs)

    monkeypatch.setattr(hook, "tiled_attention", unmasked)
    assert problems(llama)


def test_a_dropped_mask_is_seen_by_tiles(llama, monkeypatch):
    def spoil():
        monkeypatch.setattr(parts, "mask_at", lambda mask, span, keys: None)

    assert problems(llama, spoil=spoil, **TILES)


def test_a_lost_window_is_seen(tmp_path, monkeypatch):
    """It hides nothing from the few tokens of the light form, so these get a shorter one."""
    original = hook.tiled_mask

    def causal(mask, queries, keys):
        found = original(mask, queries, keys)
        return "causal" if isinstance(found, grid.Band) else found

    folder = save(tmp_path, "gemma3_text", True, sliding_window=60)
    assert problems(folder, tokens=100) == []
    monkeypatch.setattr(hook, "tiled_mask", causal)
    assert problems(folder, tokens=100)


def test_a_skipped_tile_is_seen(llama, monkeypatch):
    """What one tile adds to the gradients of all keys and values."""
    original, sizes = KeySums.add_whole, []

    def add(self, gradients):
        sizes.append(gradients[0].shape[2])
        skipped = sizes[-1] == max([size for size in sizes if size < max(sizes)], default=0)
        return original(self, [mx.zeros_like(g) if skipped else g for g in gradients])

    monkeypatch.setattr(KeySums, "add_whole", add)
    assert problems(llama, **TILES)


def test_keys_and_values_of_a_tile_without_a_gradient_are_seen(llama, monkeypatch):
    original = TiledBackward._with_own_keys

    def rest(self, number, inputs, found):
        return found if number == 1 else original(self, number, inputs, found)

    monkeypatch.setattr(TiledBackward, "_with_own_keys", rest)
    found = problems(llama, **TILES)
    assert found and all("k_proj" in text or "v_proj" in text for text in found)


def test_gradients_of_matrices_that_leave_a_tile_out_are_seen(llama, monkeypatch):
    """The input's gradient is right, and so is that of what other tiles alone reach."""
    original = TiledBackward.vjp

    def vjp(self, function, inputs, cotangents, tile=None):
        before, first = dict(self._sums), not self._sums
        found = original(self, function, inputs, cotangents, tile)
        if not first and inputs[0].shape == cotangents[0].shape and len(inputs) == 3:
            self._sums = before
        return found

    monkeypatch.setattr(TiledBackward, "vjp", vjp)
    found = problems(llama, **TILES)
    assert found and not any("shift is" in text for text in found)


@pytest.mark.parametrize("wrong", [lambda tile: 1.01 * tile, mx.zeros_like], ids=["large", "none"])
def test_a_tile_that_is_kept_wrong_is_seen(llama, wrong, monkeypatch):
    """Of the input, which every pass reads twice, or of the gradient."""
    original = Hidden.put

    def put(self, number, tile):
        original(self, number, wrong(tile) if number == 1 else tile)

    monkeypatch.setattr(Hidden, "put", put)
    assert problems(llama, **TILES)


def test_tiles_in_another_order_are_seen(llama, monkeypatch):
    original = Hidden.put

    def put(self, number, tile):
        spans = self._spans
        lengths = {span.stop - span.start for span in spans}
        whole = len(lengths) == 1 and tile.shape[0] == 2  # not the wanted rows of a tile, [1, m, D]
        original(self, len(spans) - 1 - number if whole else number, tile)

    monkeypatch.setattr(Hidden, "put", put)
    assert problems(llama, **TILES)


def test_a_wrong_gradient_below_the_kept_blocks_is_seen(llama, monkeypatch):
    original = Tail.value_and_grad

    def value_and_grad(self, x, loss):
        finished = original(self, x, loss)
        return finished._replace(dx=None if finished.dx is None else 1.01 * finished.dx)

    monkeypatch.setattr(Tail, "value_and_grad", value_and_grad)
    found = problems(llama, **PLANS["tail"])
    assert found and all("kept" in text and "shift is" in text for text in found)


def test_a_wrong_gradient_of_a_kept_block_is_seen(llama, monkeypatch):
    original = DeferredArray.fill
    monkeypatch.setattr(DeferredArray, "fill", lambda self, value: original(self, 1.01 * value))
    found = problems(llama, **PLANS["kept"])
    assert found and all("kept" in text for text in found)


def test_a_wrong_head_is_seen(llama, monkeypatch):
    original = CrossEntropy.value_and_grad

    def value_and_grad(self, hidden, head, labels):
        result, gradients = original(self, hidden, head, labels)
        return result, replace(gradients, hidden=1.01 * gradients.hidden)

    monkeypatch.setattr(CrossEntropy, "value_and_grad", value_and_grad)
    (found,) = problems(llama)
    assert found.startswith("head and loss")


def test_a_wrong_head_is_seen_where_it_is_a_part_of_a_tail(llama, monkeypatch):
    original = CrossEntropy.graph

    def graph(self, hidden, *args):
        return 1.01 * original(self, hidden, *args)

    monkeypatch.setattr(CrossEntropy, "graph", graph)
    assert problems(llama, **PLANS["tail"])


def test_what_plain_mlx_cannot_differentiate_is_no_pass(llama, monkeypatch):
    monkeypatch.setattr(
        verification._GradientComparison,
        "_plain",
        lambda *args: (_ for _ in ()).throw(ValueError("no vjp")),
    )
    found = problems(llama)
    assert all("plain MLX cannot differentiate it (no vjp)" in text for text in found)
    assert len(found) == 2


# --- it would have seen the three causes that an earlier version had --------------------------


def test_a_floating_mask_without_a_gradient_is_seen(tmp_path, monkeypatch):
    """DeepSeek, Kimi, GLM-4.7-Flash, LongCat, Ling: rotary scores are passed as a mask."""
    folder = save(tmp_path, "deepseek_v3", True)

    def without_gradient(*args):
        return factors_of(*args)._replace(queries=mx.stop_gradient(args[0].factors.queries))

    monkeypatch.setattr("mlx_edgelora.blocks.attention.factors_of", without_gradient)
    found = problems(folder)
    assert found and all("DeepseekV3DecoderLayer" in text for text in found)


class OldInterceptor:
    """What stood in the list for a block: no instance of its class."""

    def __init__(self, index, block, handler):
        self._index, self._block, self._handler = index, block, handler

    def __call__(self, x, *args, **kwargs):
        return self._handler(self._index, x, args, kwargs)

    def __getattr__(self, name):
        return getattr(self._block, name)


def test_a_loop_that_asks_for_a_class_is_seen(tmp_path, monkeypatch):
    """OLMo-Hybrid: its full attention lost the causal mask."""

    @contextmanager
    def intercept(self, handler):
        owner, key = next(
            (module, key)
            for _, module in self.model.named_modules()
            for key, value in module.items()
            if isinstance(value, list) and value == self.blocks
        )
        owner[key] = [OldInterceptor(i, block, handler) for i, block in enumerate(self.blocks)]
        try:
            yield
        finally:
            owner[key] = list(self.blocks)

    folder = save(tmp_path, "olmo_hybrid", True)
    monkeypatch.setattr(BlockList, "intercept", intercept)
    (found,) = problems(folder)
    assert "calls of blocks, by the model: block 1 is called with another mask" in found


DBRX = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    "vocab_size": 101,
    "model_type": "dbrx",
}


def test_experts_first_picked_in_a_later_tile_are_seen(tmp_path, monkeypatch):
    """DBRX: what a gradient reaches was remembered of the first tile."""
    monkeypatch.setitem(CONFIGS, "dbrx", DBRX)
    folder = save(tmp_path, "dbrx", True)
    assert problems(folder, **TILES) == []
    original = TiledBackward.vjp

    def vjp(self, *args, **options):
        """As if only these experts had gradients that had one in the first tile."""
        found = original(self, *args, **options)
        experts = {name for name in self._sums if "experts" in name}
        known = self.__dict__.setdefault("known", experts)
        for name in experts - known:
            del self._sums[name]
        return found

    monkeypatch.setattr(TiledBackward, "vjp", vjp)
    found = problems(folder, **TILES)
    assert found and "ffn.experts" in found[0]


# --- it leaves everything as it was -----------------------------------------------------------


@pytest.mark.parametrize("light", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_nothing_is_changed_by_it(llama, plan, light):
    batch = random_batch()
    with closing(engine(llama, **PLANS[plan])) as ours:
        before = ours.value_and_grad(batch)
        classes = [type(module) for module in ours.model.modules()]
        arrays = {name: id(value) for name, value in tree_flatten(ours.model.parameters())}
        settings = ours.plan, attention_layer.TILE_BYTES, hook.TILE_BYTES
        drawn = np.array(mx.random.state[0])
        verify(ours, 2, 40, light=light)
        assert np.array_equal(mx.random.state[0], drawn)
        assert settings == (ours.plan, attention_layer.TILE_BYTES, hook.TILE_BYTES)
        assert classes == [type(module) for module in ours.model.modules()]
        assert arrays == {name: id(v) for name, v in tree_flatten(ours.model.parameters())}
        after = ours.value_and_grad(batch)
    same = [
        mx.array_equal(a, b).item()
        for (_, a), (_, b) in zip(tree_flatten(before), tree_flatten(after), strict=True)
        if isinstance(a, mx.array)
    ]
    assert same and all(same)


# --- in a run, and as a command ---------------------------------------------------------------


@pytest.fixture
def run(tiny, tmp_path):
    """run(**options) -> the lines of a short training run in a folder of its own."""

    def call(**options):
        given = {
            "model": str(tiny / "model"),
            "data": str(tiny / "data"),
            "adapter_path": str(tmp_path / "adapters"),
            "iters": 3,
            "num_layers": -1,
            "spill_dir": str(tmp_path),
        }
        lines = []
        result = finetune(TrainConfig(**given | options), notify=lines.append)
        return lines, result

    return call


def test_a_run_says_so_in_one_line_and_trains_the_same(run):
    lines, result = run(lora_parameters={"rank": 4, "scale": 9.0, "dropout": 0.3})
    (line,) = [line for line in lines if line.startswith("gradients ")]
    assert "equal in 4 comparisons with plain MLX (error " in line
    options = {"verify": "off", "overwrite": True}
    others, other = run(**options, lora_parameters={"rank": 4, "scale": 9.0, "dropout": 0.3})
    assert not [line for line in others if line.startswith("gradients ")]
    assert result.train_loss == other.train_loss


def test_the_option_is_on_or_off_as_yaml_reads_them():
    assert TrainConfig.from_dict({}).verify == "on"
    assert TrainConfig.from_dict({"verify": False}).verify == "off"
    assert TrainConfig.from_dict({"verify": "OFF"}).verify == "off"
    with pytest.raises(EdgeLoraError, match=r"verify: got 'light', expected on or off"):
        TrainConfig.from_dict({"verify": "light"})


def test_a_run_ends_before_its_first_step_where_gradients_are_wrong(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Walk, "backward", scaled(1.01))
    with pytest.raises(
        EdgeLoraError,
        match=r"^verify: TransformerBlock .*: .*o_proj.lora_a is .* expected the gradients of "
        r"plain MLX. Nothing was trained. .* --verify off",
    ):
        run()
    assert not (tmp_path / "adapters" / "adapters.safetensors").exists()
    run(verify="off")


@pytest.fixture
def run_command(tiny, tmp_path, capsys):
    def call(*flags):
        common = ["--model", tiny / "model", "--spill-dir", tmp_path, "--num-layers", "-1"]
        status = command.main([str(flag) for flag in (*common, *flags)])
        found = capsys.readouterr()
        return status, found.out, found.err

    return call


def test_the_command_prints_a_table(run_command, tiny):
    for flags in ([], ["--data", tiny / "data"], ["--memory-budget", "min"]):
        status, out, err = run_command("--max-seq-length", 33, *flags)
        assert (status, err) == (0, "")
        lines = out.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("kind "))
        assert [line.split()[-1] for line in lines[start + 1 :]] == ["ok"] * 4
        assert lines[start + 1].startswith("calls of blocks")


def test_the_command_takes_a_plan(run_command, tmp_path):
    plan = tmp_path / "a.plan"
    plan.write_text(json.dumps({"version": 2, "tile_tokens": 8}))
    status, out, _ = run_command("--max-seq-length", 33, "--plan", plan)
    assert status == 0
    assert "by tiles, labelled tokens" in out


def test_the_command_exits_with_1_on_a_mismatch(run_command, monkeypatch):
    monkeypatch.setattr(Walk, "backward", scaled(1.01))
    status, out, err = run_command("--max-seq-length", 33)
    assert (status, err) == (1, "")
    assert "WRONG\n  self_attn.o_proj.lora_a is" in out


def test_wrong_input_is_one_sentence(run_command, capsys):
    status, out, err = run_command("--max-seq-lenth", 33)
    assert (status, out) == (2, "")
    assert err.startswith("error: command line: --max-seq-lenth")


def test_rows_that_plain_mlx_has_no_memory_for_are_compared_shorter(tmp_path):
    folder, lines = save(tmp_path, "llama", True, num_hidden_layers=2), []
    with closing(engine(folder)) as ours:
        found = verify(ours, 1, 1500, memory=30_000_000, log=lines.append)
    refuse_wrong(found)
    assert lines
    assert all(re.search(r"need [\d.]+ [MG]B for a block of ", line) for line in lines)
