"""Open a run: from its options to the adapted model, the data, the plan and the engine."""

import dataclasses
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_edgelora.blocks.checks import checked_blocks
from mlx_edgelora.config import TrainConfig
from mlx_edgelora.config.train_config import MOST_LAYERS
from mlx_edgelora.data import Dataset, load_datasets
from mlx_edgelora.data.findings import LINES
from mlx_edgelora.embedded import DATA_PATH, MODEL_PATH, PREFERENCES_PATH
from mlx_edgelora.engine.adapter_state import AdapterState
from mlx_edgelora.engine.build import Settings, build_engine
from mlx_edgelora.engine.step import Engine
from mlx_edgelora.losses.exact import CrossEntropy
from mlx_edgelora.measure.meter import can_limit_memory
from mlx_edgelora.measure.text import say
from mlx_edgelora.model.checkpoint import LazyModel
from mlx_edgelora.model.dora import renew_magnitudes
from mlx_edgelora.model.full import take_out, unfreeze_blocks
from mlx_edgelora.model.loading import DTYPES, can_stream, open_model
from mlx_edgelora.model.lora import add_lora, freeze, preset_keys
from mlx_edgelora.model.tokenizer import load_tokenizer_of
from mlx_edgelora.planner.machine import free_memory
from mlx_edgelora.planner.run_plan import RunPlan, plan_request
from mlx_edgelora.storage.files import updating, user_cache, write_atomically
from mlx_edgelora.storage.stores import spill_folder
from mlx_edgelora.storage.temporaries import remove_left_overs, remove_scratch
from mlx_edgelora.training import summary
from mlx_edgelora.training.adapters import (
    adapter_file,
    read_adapter_weights,
)
from mlx_edgelora.training.failures import explain_failures
from mlx_edgelora.training.limits import limits
from mlx_edgelora.training.sampling import first_plan, measure_and_replan
from mlx_edgelora.training.throttle import DutyCycle

# Largest number of engines that are built in search of the best plan.
ENGINES = 4

LOST_COUNT = (
    "warning: MLX lost count of its tasks when one failed earlier in this process, and would wait "
    "for good at a memory limit; without one the run can take more memory than planned; start it "
    "in a new process to avoid this"
)


@contextmanager
def open_engine(
    config: TrainConfig, log: Callable[[str], None] = say
) -> Iterator[tuple[Engine, object, int]]:
    """Load and adapt the model, and choose its memory plan.

    Args:
        config: options of the run; every row has max_seq_length tokens.
        log: called with lines to show.

    Yields:
        The engine, the tokenizer and the size of the model's vocabulary.
    """
    lazy = adapted_model(config)
    place = spill_place(config)
    with open_run(config, lazy, (), place, log, adapter_to_start(config)) as (engine, _):
        yield engine, load_tokenizer_of(lazy), lazy.vocabulary


@contextmanager
def open_planned(
    config: TrainConfig, log: Callable[[str], None] = say
) -> Iterator[tuple[Engine, RunPlan]]:
    """Like `open_engine`, but yields the engine and its plan, and explains failures."""
    with explained_failures(config):
        lazy = adapted_model(config)
        place = spill_place(config)
        with open_run(config, lazy, (), place, log, adapter_to_start(config)) as settled:
            yield settled


def adapted_model(config: TrainConfig, streamed: bool = False) -> LazyModel:
    """The model with adapters; no weights are read unless the model must be converted first."""
    lazy = open_model(
        config.model, streamed=streamed, quantize=config.quantize, cache=cache_folder(config)
    )
    lazy.streamable = can_stream(lazy)
    mx.random.seed(config.seed)
    adapt(lazy, config)
    return lazy


@contextmanager
def open_run(
    config: TrainConfig,
    lazy: LazyModel,
    sets: Sequence,
    place: tuple[str | Path, str],
    log: Callable[[str], None],
    start: Path | None = None,
    again: RunPlan | None = None,
) -> Iterator[tuple[Engine, RunPlan]]:
    """Choose a plan, measure it, and build the engine; MLX's memory limits are set meanwhile.

    Args:
        config: options of the run.
        lazy: the adapted model.
        sets: data sets of the run; empty if every row has max_seq_length tokens.
        place: folder of scratch files, and why it was chosen.
        log: called with lines to show.
        start: file of the adapter to load; None for a new adapter.
        again: the run with the plan to begin with, if an earlier engine could not use it.

    Yields:
        The engine and the run with its plan.
    """
    chosen = again
    if chosen is None:
        _remove_left_overs(config, Path(place[0]))
        request = plan_request(config, lazy, sets, user_cache(), Path(place[0]))
        chosen = request if request.given else first_plan(request)
        if not can_limit_memory():
            log(LOST_COUNT)
    left = ENGINES
    while chosen is not None:
        log(chosen.table() if config.verbose else summary.memory(chosen))
        with (
            limits(chosen) as limit,
            _engine(config, lazy, chosen, place, log, start) as engine,
        ):
            left -= 1
            if config.packing:
                engine.walk.check_packing(chosen.batch_shape.tokens)
            another = (
                measure_and_replan(engine, chosen, log, stays=not left) if config.train else None
            )
            if another is None:
                _reserve(config, engine, chosen)
                limit(chosen)
                engine.empties_cache = chosen.is_tight
                if config.plan_out is not None:
                    write_plan(config, chosen)
                engine.plan_for = chosen.plan_for
                yield engine, chosen
        chosen = another
        if chosen is not None:
            del engine
            renew(lazy, config)


def renew(lazy: LazyModel, config: TrainConfig) -> None:
    """Replace a model whose engine was closed by a new one, and free the old one's memory."""
    lazy.replace_with(adapted_model(config))
    gc.collect()  # engines have reference cycles, and two of them would not fit


def _remove_left_overs(config: TrainConfig, scratch: Path) -> None:
    """Remove what dead runs left in caches and in folders of scratch files."""
    for folder in {user_cache(), cache_folder(config)}:
        with suppress(OSError), updating(folder):  # a lock that a dead run left goes as well
            remove_left_overs(folder)
    for folder in {scratch, Path(tempfile.gettempdir())}:
        remove_scratch(folder)


@contextmanager
def _engine(
    config: TrainConfig,
    lazy: LazyModel,
    chosen: RunPlan,
    place: tuple[str | Path, str],
    log: Callable[[str], None],
    start: Path | None,
) -> Iterator[Engine]:
    plan, free = chosen.plan, free_memory()
    if plan.streams and not lazy.streamable:
        lazy = adapted_model(config, streamed=True)
    folder, why = place
    settings = Settings(
        folder,
        config.dtype,
        CrossEntropy(plan.loss_bytes),
        load=lambda trained: _load(trained, lazy.model, start),
        pause=DutyCycle(config.duty).pause,
        file_cache=None if free is None else max(0, free - chosen.choice.peak),
    )
    details = log if config.verbose else _discard
    if plan.spills or plan.adapters == "paged":
        details(f"scratch files in {folder} ({why})")
    with build_engine(lazy, plan, settings, details) as engine:
        yield engine


def _discard(line: str) -> None:
    """Do nothing with a line that only --verbose shows."""


def _reserve(config: TrainConfig, engine: Engine, chosen: RunPlan) -> None:
    """If the run trains, allocate the disk space of its largest batch in advance."""
    if not config.train:
        return
    batch_shape = chosen.batch_shape.part(chosen.plan.micro_batches)
    engine.walk.reserve(
        batch_shape.rows, batch_shape.tokens, chosen.shape.hidden * chosen.shape.itemsize
    )


def write_plan(config: TrainConfig, chosen: RunPlan) -> None:
    """Write the plan to the file `plan_out`."""
    text = chosen.plan.json().encode()
    write_atomically({Path(config.plan_out): lambda file: file.write(text)})


def has_data(config: TrainConfig) -> bool:
    """Whether the run has data: the config names some, or uses the embedded model."""
    return bool(config.data or config.hf_dataset or config.model is None)


def with_embedded(config: TrainConfig) -> TrainConfig:
    """Fill in the embedded model and data where the config names none."""
    own = PREFERENCES_PATH if config.compares_answers else DATA_PATH
    data = config.data or (None if config.hf_dataset else str(own))
    return dataclasses.replace(config, model=config.model or str(MODEL_PATH), data=data)


def largest_piece(chosen: RunPlan) -> tuple[int, int]:
    """Rows and tokens of the largest micro-batch."""
    return -(-chosen.batch_shape.rows // chosen.plan.micro_batches), chosen.batch_shape.tokens


def dtype_of(config: TrainConfig) -> mx.Dtype | None:
    """The dtype of the option `dtype`; None if it is not set."""
    return DTYPES[config.dtype] if config.dtype else None


def adapt(lazy: LazyModel, config: TrainConfig) -> None:
    """Choose what is trained, then check that the model can be trained block by block."""
    lora, model = config.lora_parameters, lazy.model
    count = _default_layers(model) if config.num_layers is None else config.num_layers
    if not config.train and config.resume_adapter_file is None:
        freeze(model)
    elif config.fine_tune_type == "full":
        unfreeze_blocks(model, count)
        take_out(lazy, dtype_of(config))
    else:
        dora = config.fine_tune_type == "dora"
        keys = lora.keys if config.lora_preset is None else preset_keys(model, config.lora_preset)
        add_lora(model, count, lora.rank, lora.scale, lora.dropout, keys, dora)
        renew_magnitudes(lazy)
    lazy.blocks = checked_blocks(model)


def _default_layers(model: nn.Module) -> int:
    return min(MOST_LAYERS, len(model.layers))


def with_layers(config: TrainConfig, lazy: LazyModel, log: Callable[[str], None]) -> TrainConfig:
    """Fill in `num_layers` and the keys of `lora_preset`, which mlx-lm reads with an adapter."""
    if not config.train:
        return config
    if config.lora_preset is not None:
        keys = preset_keys(lazy.model, config.lora_preset)
        lora = dataclasses.replace(config.lora_parameters, keys=keys)
        config = dataclasses.replace(config, lora_parameters=lora, lora_preset=None)
    if config.num_layers is not None:
        return config
    count = _default_layers(lazy.model)
    if count < MOST_LAYERS:
        log(f"num_layers: all {count} blocks are adapted (by default the last {MOST_LAYERS})")
    return dataclasses.replace(config, num_layers=count)


def adapter_to_start(config: TrainConfig) -> Path | None:
    """File of the adapter in `resume_adapter_file`; None if the option is not set."""
    return adapter_file(config.resume_adapter_file) if config.resume_adapter_file else None


def _load(trained: AdapterState, model: nn.Module, start: Path | None) -> None:
    if start is not None:
        expected = dict(tree_flatten(model.trainable_parameters()))
        trained.load(read_adapter_weights(start, expected))


def read_sets(
    config: TrainConfig,
    tokenizer: object,
    vocabulary: int,
    log: Callable[[str], None],
    about: Callable[[str], None] | None = None,
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Read the data sets of a run.

    Args:
        config: options of the run.
        tokenizer: the model's tokenizer.
        vocabulary: size of the model's vocabulary.
        log: called with warnings and notes about the rows.
        about: called with lines about the source of the rows.

    Returns:
        The training, validation and test sets; None for a set that is not needed.
    """
    sets = load_datasets(config, tokenizer, about)
    for dataset in sets:
        if dataset is None:
            continue
        dataset.check_vocabulary(vocabulary)
        if warning := dataset.report.warning():
            log(f"warning: {warning}")
        for line in dataset.report.findings.lines(LINES):
            log(f"note: {line}")
    return sets


def spill_place(config: TrainConfig) -> tuple[str | Path, str]:
    """The folder of scratch files, and why it was chosen."""
    if config.spill_dir:
        return config.spill_dir, "set by --spill-dir"
    return spill_folder([tempfile.gettempdir(), user_cache()])


def cache_folder(config: TrainConfig) -> Path:
    """The folder of converted models."""
    return Path(config.cache_dir) if config.cache_dir else user_cache()


def explained_failures(config: TrainConfig) -> AbstractContextManager:
    """Explain failures before and after training; the training loop explains its own."""
    return explain_failures(
        f"an adapter saved before is unchanged in {config.adapter_path or 'its folder'}"
    )
