"""A whole run: model, adapters, data, engine, loop. What the command line and users call."""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_tokenizer

from mlx_edgelora.config import TrainConfig
from mlx_edgelora.data import Dataset, load_datasets
from mlx_edgelora.embedded import DATA_PATH, MODEL_PATH
from mlx_edgelora.errors import EdgeLoraError
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.memory.blockwise import BlockWalk
from mlx_edgelora.memory.meter import DiskMeter, reset_peak
from mlx_edgelora.memory.plan import Plan, plan_for
from mlx_edgelora.memory.profile import recording
from mlx_edgelora.memory.stores import ActivationStore, MappedStore, RamStore, spill_folder
from mlx_edgelora.model.checkpoint import LazyModel, reason
from mlx_edgelora.model.loading import attach, open_model
from mlx_edgelora.model.lora import add_lora, set_kernel
from mlx_edgelora.model.mlp import slice_mlps
from mlx_edgelora.training.adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter_weights
from mlx_edgelora.training.callbacks import TrainingCallback, reporting_callbacks
from mlx_edgelora.training.evaluate import evaluate
from mlx_edgelora.training.files import make_folder, write_atomically
from mlx_edgelora.training.loop import TrainResult, train
from mlx_edgelora.training.optimizer import build_optimizer
from mlx_edgelora.training.paged import PagedTrained
from mlx_edgelora.training.step import Engine
from mlx_edgelora.training.trained import ResidentTrained, Trained
from mlx_edgelora.training.training_loss import check_loss, training_loss

# The largest number that math.exp takes is a little above it.
MAX_EXPONENT = 700.0
# One of these holds the words of any tokenizer; without one transformers makes up an empty one.
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


def finetune(
    config: TrainConfig,
    callbacks: Sequence[TrainingCallback] = (),
    notify: Callable[[str], None] = print,
) -> TrainResult | None:
    """Fine-tune a model, test it, or both, as `config` says.

    Args:
        config: every option of the run.
        callbacks: told of every report, as in `mlx_lm.tuner`.
        notify: gets a line for every choice made, warning, and test result.

    Returns:
        How training ended; None where only a test was asked for.

    Raises:
        EdgeLoraError: something the user can mend, in one sentence; no file is damaged.
    """
    config = _with_embedded(config)
    if not config.train:
        config = _as_trained(config)
    optimizer = build_optimizer(config)  # refuses what it cannot use before anything slow
    callbacks = [*callbacks, *reporting_callbacks(config)]
    plan = plan_for(config)
    with (
        _cache_limit(plan.cache_bytes),
        _memory_told(config),
        open_engine(config, notify) as opened,
    ):
        engine, tokenizer, vocabulary = opened
        check_loss(config, engine.head)
        train_set, valid_set, test_set = _data(config, tokenizer, vocabulary, notify)
        result = None
        if config.train:
            folder, tiles = _cache(config), plan.loss_bytes
            wanted = training_loss(config, engine.head, train_set, folder, notify, tiles)
            with wanted as loss, _profiled(config, notify):
                engine.training_loss = loss
                reset_peak()
                result = train(engine, optimizer, config, train_set, valid_set, callbacks)
        if config.test:
            notify(_tested(*evaluate(engine, test_set, config, config.test_batches)))
    return result


@contextmanager
def open_engine(
    config: TrainConfig, notify: Callable[[str], None] = print
) -> Iterator[tuple[Engine, object, int]]:
    """Load and adapt the model that `config` names and settle where everything lives.

    Gives the engine, the tokenizer and the size of the model's vocabulary.
    """
    plan = plan_for(config)
    streamed = plan.weights == "streamed"
    lazy = open_model(
        config.model,
        streamed=streamed,
        quantize=config.quantize,
        cache=_cache(config),
    )
    tokenizer = _tokenizer(lazy)
    mx.random.seed(config.seed)
    _adapt(lazy.model, config)
    kernel = set_kernel(lazy.model, config.kernel)
    meter, place = DiskMeter(), _spill_place(config)
    with ExitStack() as stack:
        trained, home = _trained(lazy.model, plan, place, meter)
        stack.enter_context(closing(trained))
        _resume(trained, lazy.model, config)
        attached = attach(lazy, streamed=streamed, dtype=config.dtype, meter=meter)
        store, where = _store(plan, place, meter)
        stack.enter_context(closing(store))
        on_gpu = mx.default_device() == mx.gpu
        walk = BlockWalk(
            lazy.model,
            store,
            attached.weights,
            on_gpu,
            trained,
            tile_tokens=plan.tile_tokens,
            prefetch=plan.prefetch,
            halves=plan.halves,
        )
        lazy.model.train()
        sliced = "MLP layer by layer"
        if plan.mlp_bytes is not None:
            sliced = slice_mlps(walk.blocks, plan.mlp_bytes)
        count = sum(value.size for _, value in tree_flatten(lazy.model.trainable_parameters()))
        notify(f"model {lazy.checkpoint.path}, {count:,} trained parameters {home}")
        notify(f"plan: {plan}")
        notify(f"quantized products: {kernel}; {sliced}")
        notify(f"loss over {attached.logits}; activations {where}")
        notify(f"last block for {walk.last_block}; tiles: {walk.tiling}")
        exact = CrossEntropy(plan.loss_bytes)
        engine = Engine(lazy.model, walk, attached.head, meter, exact, trained)
        yield engine, tokenizer, lazy.vocabulary


def _with_embedded(config: TrainConfig) -> TrainConfig:
    data = config.data or (None if config.hf_dataset else str(DATA_PATH))
    return dataclasses.replace(config, model=config.model or str(MODEL_PATH), data=data)


def _as_trained(config: TrainConfig) -> TrainConfig:
    """For a test alone: the adapter in `adapter_path` says what its layers look like."""
    if config.resume_adapter_file is not None:
        raise EdgeLoraError(
            f"resume_adapter_file: got {config.resume_adapter_file!r} for a test alone, expected "
            "nothing: what adapter_path holds is tested"
        )
    if not config.adapter_path:  # the base model, as in mlx-lm
        return config
    path = Path(config.adapter_path) / CONFIG_FILE
    try:
        saved = json.loads(path.read_text())
        layers = {key: saved[key] for key in ("num_layers", "lora_parameters")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EdgeLoraError(
            f"{path}: not the configuration of an adapter ({reason(error)}); test one that was "
            "trained, or the base model with --adapter-path ''"
        ) from error
    like = TrainConfig.from_dict(layers, str(path))
    return dataclasses.replace(
        config,
        num_layers=like.num_layers,
        lora_parameters=like.lora_parameters,
        resume_adapter_file=str(Path(config.adapter_path) / WEIGHTS_FILE),
    )


def _tokenizer(lazy: LazyModel) -> object:
    path = lazy.source
    if not any(found for pattern in TOKENIZER_FILES for found in path.glob(pattern)):
        raise EdgeLoraError(
            f"{path}: has no tokenizer, expected a file such as tokenizer.json; "
            "download the model again"
        )
    try:
        return load_tokenizer(path, eos_token_ids=lazy.config.get("eos_token_id"))
    except Exception as error:  # bare ones are what the package tokenizers raises
        raise EdgeLoraError(
            f"{path}: the tokenizer cannot be loaded ({reason(error)}); download the model again"
        ) from error


def _adapt(model: nn.Module, config: TrainConfig) -> None:
    lora = config.lora_parameters
    if not config.train and config.resume_adapter_file is None:
        model.freeze()
        return
    add_lora(model, config.num_layers, lora.rank, lora.scale, lora.dropout, lora.keys)


def _trained(
    model: nn.Module, plan: Plan, place: tuple[str | Path, str], meter: DiskMeter
) -> tuple[Trained, str]:
    if plan.adapters == "resident":
        return ResidentTrained(model), "in memory"
    folder, why = place
    return PagedTrained(model, folder, meter), f"in {folder} ({why})"


def _resume(trained: Trained, model: nn.Module, config: TrainConfig) -> None:
    if config.resume_adapter_file is not None:
        shapes = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
        trained.load(read_adapter_weights(config.resume_adapter_file, shapes))


def _data(
    config: TrainConfig, tokenizer: object, vocabulary: int, notify: Callable[[str], None]
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    sets = load_datasets(config, tokenizer)
    if config.train and config.val_batches and sets[1] is None:
        notify("no valid set, so no validation")
    for dataset in sets:
        if dataset is None:
            continue
        dataset.check_vocabulary(vocabulary)
        if warning := dataset.report.warning():
            notify(f"warning: {warning}")
    return sets


def _tested(loss: float, tokens: int) -> str:
    if not math.isfinite(loss):
        raise EdgeLoraError(
            f"test loss is {loss} on {tokens} tokens, expected a finite number; test another "
            "adapter, or the base model with --adapter-path ''"
        )
    perplexity = math.exp(loss) if loss < MAX_EXPONENT else math.inf
    return f"test loss {loss:.3f}, perplexity {perplexity:.3f} on {tokens} tokens"


def _store(
    plan: Plan, place: tuple[str | Path, str], meter: DiskMeter
) -> tuple[ActivationStore, str]:
    if plan.activations == "ram":
        return RamStore(), "in memory (as asked)"
    folder, why = place
    return MappedStore(folder, meter), f"in {folder} ({why})"


def _spill_place(config: TrainConfig) -> tuple[str | Path, str]:
    """The folder of scratch files, and why it is this one."""
    if config.spill_dir:
        return config.spill_dir, "as asked"
    if not config.writes_scratch:
        return "", "no scratch file is written"
    return spill_folder([tempfile.gettempdir(), _user_cache()])


def _cache(config: TrainConfig) -> Path:
    return Path(config.cache_dir) if config.cache_dir else _user_cache()


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlx_edgelora"


@contextmanager
def _memory_told(config: TrainConfig) -> Iterator[None]:
    """MLX says that memory is used up by a RuntimeError with as little as `[malloc]` in it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        if isinstance(error, RuntimeError) and "malloc" not in text and "memory" not in text:
            raise
        raise EdgeLoraError(
            f"out of memory ({reason(error)}); lower batch_size or max_seq_length, or close other "
            f"programs; an adapter saved before stands in {config.adapter_path or 'its folder'}"
        ) from error


@contextmanager
def _profiled(config: TrainConfig, notify: Callable[[str], None]) -> Iterator[None]:
    """Where it is asked for, tell where the memory of the last step went, and write it down."""
    if config.memory_profile is None:
        yield
        return
    folder = Path(config.memory_profile)
    make_folder(folder)
    with recording() as profile:
        yield
    writers = {folder / "memory.json": lambda file: file.write(profile.json().encode())}
    if find_spec("matplotlib") is not None:
        writers[folder / "memory.png"] = profile.plot
    write_atomically(writers)
    notify(f"memory of the last step ({', '.join(map(str, writers))}):\n{profile.table()}")


@contextmanager
def _cache_limit(size: int) -> Iterator[None]:
    before = mx.set_cache_limit(size)
    mx.set_cache_limit(min(before, size))
    try:
        yield
    finally:
        mx.set_cache_limit(before)
